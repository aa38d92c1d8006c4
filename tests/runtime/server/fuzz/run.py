"""Sends mutated calls to a real server and judges what comes back.

    python -m lp_edge.tests.runtime.server.fuzz.run --count 20000 --seed 7 --save found/

starts ``lp-serve`` in a process of its own. The suite runs a short campaign (tests/runtime/server/test_fuzz.py). Every call
must end in time, with a status that its content explains; afterwards the server answers a valid call, holds no more threads,
descriptors, shared memory and files than before, and its log has no traceback. corpus/README.md describes the files.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from lp_edge.proto.v1 import (
    animation_pb2,
    animation_pb2_grpc,
    common_pb2,
    portraits_pb2,
    portraits_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from lp_edge.tests.runtime.server.fuzz.cases import METHODS, Case, face, raw, regressions, seeds, with_ids
from lp_edge.tests.runtime.server.fuzz.mutate import MARKER, mutate
from lp_edge.tests.runtime.server.process import Levels, ServeProcess, settled

BOUND_S = 20.0
"""Longest that a call may take on a busy machine."""
IDLE_S = 2
OPTIONS = (
    "--max-streams", 8, "--max-pixels", "4M", "--max-upload", "8M", "--max-shared-memory", "16M",
    "--idle-timeout", IDLE_S, "--log-format", "json",
)  # fmt: skip
"""For lp-serve: small limits, so that they are reached."""
_CALLERS = 6
_SLACK = 8  # threads of pools that the warming-up did not need
_CANARY = 250
_CODECS = ("libpng ", "Corrupt JPEG", "Premature end of JPEG", "Invalid SOS", "Unsupported ", "[")
"""What libpng, libjpeg and FFmpeg write to standard error themselves begins like this."""

Code = grpc.StatusCode
_FINE = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
    Code.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        code: its status.
        details: its message.
        error: its ErrorDetail; empty where it carried none.
        answers: how many came before.
        seconds: how long it took.
    """

    code: grpc.StatusCode
    details: str = ""
    error: common_pb2.ErrorDetail = field(default_factory=common_pb2.ErrorDetail)
    answers: int = 0
    seconds: float = 0.0


def send(channel: grpc.Channel, case: Case) -> Outcome:
    """Make the call."""
    path, streams = f"/lp_edge.v1.{case.method}", METHODS[case.method][1]
    began, answers, ended = time.monotonic(), 0, threading.Event()

    def messages() -> Iterator[bytes]:
        yield from case.messages
        if case.end == "hold":
            ended.wait(BOUND_S * 2)

    try:
        if not streams:
            channel.unary_unary(path)(case.messages[0], timeout=BOUND_S * 1.5)
            return Outcome(Code.OK, answers=1, seconds=time.monotonic() - began)
        call = channel.stream_stream(path)(messages(), timeout=BOUND_S * 1.5)
        if case.end == "vanish":
            call.cancel()
        for _ in call:
            answers += 1
            if case.end == "cancel":
                call.cancel()
        return Outcome(call.code(), answers=answers, seconds=time.monotonic() - began)
    except grpc.RpcError as failed:
        metadata = {k: v for k, v in failed.trailing_metadata() or ()}
        detail = common_pb2.ErrorDetail.FromString(metadata.get("lp-edge-error-bin", b""))
        return Outcome(failed.code(), failed.details() or "", detail, answers, time.monotonic() - began)
    finally:
        ended.set()


def judge(case: Case, outcome: Outcome, secrets: Sequence[str] = ()) -> str | None:
    """What is wrong with how a call ended; None when nothing is."""
    code = outcome.code
    if outcome.seconds > BOUND_S:
        return f"took {outcome.seconds:.1f} s"
    if any(secret in outcome.details + str(outcome.error) for secret in ("Traceback", *secrets)):
        return f"tells of the server's inside: {outcome.details[:300]}"
    if code == Code.OK or (code == Code.CANCELLED and case.end in ("cancel", "vanish")):
        return None
    if code == Code.DEADLINE_EXCEEDED and outcome.error.type == "DeadlineError":
        return None  # held open, or nobody took the results out of shared memory
    if code not in _FINE:
        parsable = "" if case.parsed() else " (a message cannot be parsed)"
        return f"{code.name}: {outcome.details[:300]}{parsable}"
    if not outcome.error.type or not outcome.error.got:
        return f"{code.name} without ErrorDetail: {outcome.details[:300]}"
    return None


@dataclass
class Report:
    """What a campaign found.

    Attributes:
        sent: number of calls.
        seconds: how long they took together.
        statuses: how many ended with which status, by method.
        slowest: seconds of the longest call.
        failures: name or number of the call, and what is wrong.
        before, after: what the server held.
    """

    sent: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)
    before: Levels | None = None
    after: Levels | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        levels = {
            name: {"threads": at.threads, "descriptors": at.descriptors, "memory_mb": at.memory >> 20}
            for name in ("before", "after")
            if (at := getattr(self, name)) is not None
        }
        return {
            "sent": self.sent,
            "seconds": round(self.seconds, 1),
            "slowest_s": round(self.slowest, 2),
            "statuses": dict(sorted(self.statuses.items())),
            "failures": self.failures,
            **levels,
        }


class Campaign:
    """Calls to one server.

    Args:
        server: a process that was started with :data:`OPTIONS`.
        folder: its TMPDIR, empty.
        save: where calls that failed are kept as files; None = nowhere.
    """

    def __init__(self, server: ServeProcess, folder: Path, save: Path | None = None) -> None:
        self._server, self._folder, self._save = server, folder, save
        self._channel = grpc.insecure_channel(server.ready["grpc"])
        self._portraits = portraits_pb2_grpc.PortraitServiceStub(self._channel)
        self._ids = (self._register(), self._register())
        info = server_pb2_grpc.ServerServiceStub(self._channel).GetServerInfo(
            server_pb2.GetServerInfoRequest(), timeout=BOUND_S
        )
        self.seeds = seeds(info.motion.expression_size)
        self._lock = threading.Lock()
        self.report = Report()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _register(self) -> str:
        request = portraits_pb2.RegisterPortraitRequest(image=raw(face()))
        return self._portraits.RegisterPortrait(request, timeout=BOUND_S).portrait.id

    def run(self, count: int, seed: int, *, first: int = 0) -> Report:
        """Warm up with the valid calls, replay the regressions, send ``count`` mutated calls, and look at what is left."""
        report = self.report
        self._all([(f"valid {i}", case) for i, case in enumerate(self.seeds)] * 2, valid=True)
        pid = self._server.process.pid
        report.before = Levels.of(pid, self._folder)
        began = time.monotonic()
        self._all(list(regressions()))
        for start in range(first, first + count, _CANARY):
            end = min(start + _CANARY, first + count)
            self._all([(str(i), mutate(seed, i, self.seeds)) for i in range(start, end)])
            self._canary(f"after {end}")
        report.seconds = time.monotonic() - began
        for more in settled(pid, report.before, self._folder, _SLACK):
            report.failures.append(("levels", more))
        report.after = Levels.of(pid, self._folder)
        if MARKER in report.after.files:
            report.failures.append(("pickle", "code of an uploaded file was executed"))
        for line in self._complaints():
            report.failures.append(("log", line))
        return report

    def _all(self, cases: Iterable[tuple[str, Case]], *, valid: bool = False) -> None:
        with ThreadPoolExecutor(_CALLERS) as callers:
            for wrong in callers.map(lambda item: self._one(*item, valid=valid), cases):
                if wrong:
                    self.report.failures.append(wrong)

    def _one(self, name: str, case: Case, *, valid: bool) -> tuple[str, str] | None:
        if not case.messages and not METHODS[case.method][1]:
            return None
        outcome = send(self._channel, with_ids(case, *self._ids))
        wrong = judge(case, outcome, (str(self._folder),))
        if (
            valid
            and wrong is None
            and outcome.code not in (Code.OK, Code.NOT_FOUND, Code.FAILED_PRECONDITION)
        ):
            # pictures in shared memory that nobody maps are part of the valid calls, too
            wrong = (
                None if outcome.error.type == "DeadlineError" else f"{outcome.code.name}: {outcome.details}"
            )
        with self._lock:
            self.report.sent += not valid
            self.report.slowest = max(self.report.slowest, outcome.seconds)
            self.report.statuses[f"{case.method.partition('/')[2]} {outcome.code.name}"] += 1
            if wrong is not None and self._save is not None:
                self._save.mkdir(parents=True, exist_ok=True)
                (self._save / f"{name.replace(' ', '-')}.case").write_bytes(case.dump())
        return None if wrong is None else (f"{name} {case.method} ({case.note}, {case.end})", wrong)

    def _canary(self, when: str) -> None:
        """A valid call is answered, by the same process."""
        if self._server.process.poll() is not None:
            raise AssertionError(
                f"the server died {when}: {self._server.process.poll()}\n{self._server.log[-4000:]}"
            )
        listed = self._portraits.ListPortraits(portraits_pb2.ListPortraitsRequest(), timeout=BOUND_S)
        present = {portrait.id for portrait in listed.portraits}
        self._ids = (
            self._ids[0] if self._ids[0] in present else self._register(),
            self._ids[1] if self._ids[1] in present else self._register(),
        )

        def requests() -> Iterator[animation_pb2.AnimateRequest]:
            config = animation_pb2.AnimateConfig(
                portrait_ids=[self._ids[0]], mode=animation_pb2.STREAM_MODE_LOSSLESS
            )
            yield animation_pb2.AnimateRequest(config=config)
            for index in range(2):
                frame = animation_pb2.DrivingFrame(sequence=index + 1, timestamp_us=index, image=raw(face()))
                yield animation_pb2.AnimateRequest(frame=frame)

        stub = animation_pb2_grpc.AnimationServiceStub(self._channel)
        answers = [a.WhichOneof("message") for a in stub.Animate(requests(), timeout=BOUND_S)]
        if answers != ["started", "frame", "frame"]:
            self.report.failures.append((when, f"a valid stream was answered with {answers}"))

    def _complaints(self) -> list[str]:
        """Errors and tracebacks in the server's log."""
        found = []
        for line in self._server.log.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                if not line.startswith(_CODECS):
                    found.append(line[:2000])
                continue
            if entry.get("level") not in ("error", "critical") and "traceback" not in entry:
                continue
            found.append(f"{entry['message']} {entry.get('id', '')}: {entry.get('traceback', '')[-1500:]}")
        return found[:20]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign; 1 = something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000, help="mutated calls (default 20000)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (default 1)")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first call (with --count 1: that one alone)"
    )
    parser.add_argument(
        "--bundle",
        required=True,
        help="folder of the tests' networks (fixture toy_bundle); others find no face in the corpus",
    )
    parser.add_argument("--save", type=Path, help="folder for the calls that failed")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        folder = Path(scratch) / "tmp"
        folder.mkdir()
        bundle = ["--bundle", options.bundle]
        args = ["--listen", "127.0.0.1:0", "--backend", "cpu", "--json", *map(str, OPTIONS), *bundle]
        server = ServeProcess(args, {"TMPDIR": str(folder)}, Path(scratch) / "log")
        try:
            server.wait_ready()
            campaign = Campaign(server, folder, options.save)
            try:
                report = campaign.run(options.count, options.seed, first=options.first)
            finally:
                campaign.close()
        finally:
            server.end()
    print(json.dumps(report.as_dict(), indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
