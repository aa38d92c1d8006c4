"""Clients and servers that die without a word (kill -9): the others lose nothing, nothing is left behind.

``LP_EDGE_KILLS=50`` kills as many clients; the default is 5 of each kind.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc")

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
from lp_edge.tests.runtime.server.process import SECONDS, Levels, ServeProcess, settled
from lp_edge.tests.runtime.server.victim import HEIGHT, KINDS, WIDTH, picture

KILLS = int(os.environ.get("LP_EDGE_KILLS") or 5)
Serve = Callable[..., ServeProcess]


def image() -> common_pb2.Image:
    """A face as plain pixels."""
    return common_pb2.Image(raw=common_pb2.RawImage(width=WIDTH, height=HEIGHT, data=picture().tobytes()))


def register(channel: grpc.Channel) -> str:
    """A portrait's id."""
    request = portraits_pb2.RegisterPortraitRequest(image=image())
    stub = portraits_pb2_grpc.PortraitServiceStub(channel)
    return stub.RegisterPortrait(request, timeout=SECONDS).portrait.id


def streams(channel: grpc.Channel) -> int:
    """Open streams, as the server counts them."""
    stub = server_pb2_grpc.ServerServiceStub(channel)
    return stub.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=SECONDS).load.streams


class Survivor:
    """A lossless stream that goes on while others die: sends a frame, takes the answer, checks it, and so on."""

    def __init__(self, channel: grpc.Channel, portrait: str) -> None:
        self._requests: queue.SimpleQueue[animation_pb2.AnimateRequest | None] = queue.SimpleQueue()
        config = animation_pb2.AnimateConfig(
            portrait_ids=[portrait],
            mode=animation_pb2.STREAM_MODE_LOSSLESS,
            output=common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_RAW),
        )
        self._requests.put(animation_pb2.AnimateRequest(config=config))
        stub = animation_pb2_grpc.AnimationServiceStub(channel)
        self._answers = stub.Animate(iter(self._requests.get, None))
        assert next(self._answers).HasField("started")
        self._stop, self.frames = threading.Event(), 0
        self.slowest, self._error = 0.0, None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._step()
        except BaseException as error:  # noqa: BLE001 - raised in end()
            self._error = error

    def _step(self) -> None:
        pixels = None
        while not self._stop.is_set():
            sequence = self.frames + 1
            frame = animation_pb2.DrivingFrame(
                sequence=sequence, timestamp_us=sequence * 40_000, image=image()
            )
            began = time.monotonic()
            self._requests.put(animation_pb2.AnimateRequest(frame=frame))
            answer = next(self._answers).frame
            self.slowest = max(self.slowest, time.monotonic() - began)
            assert answer.sequence == sequence
            assert answer.face_state == common_pb2.FACE_STATE_TRACKED
            # The driver does not move, so every answer is the same, but for a rounding while tracking settles.
            got = np.frombuffer(answer.pictures[0].data, np.uint8).astype(np.int16)
            pixels = got if pixels is None else pixels
            assert np.abs(got - pixels).max() <= 1
            self.frames = sequence
        self._requests.put(None)
        assert list(self._answers) == []

    def end(self) -> None:
        """End it well; raises what went wrong."""
        self._stop.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "the survivor got no answer"
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def victims(target: str, portrait: str, kinds: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Clients that run in processes of their own, and have all got what is said below."""
    enough = {"frames": "frame 5", "shared": "frame 5", "unmapped": "started", "upload": "chunk 3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lp_edge.tests.runtime.server.victim", target, portrait, kind],
            stdout=subprocess.PIPE,
            bufsize=0,  # so that select sees all that was not read
        )
        for kind in kinds
    ]
    try:
        for process, kind in zip(processes, kinds, strict=True):
            assert process.stdout is not None
            said = b""
            while said.decode().strip() != enough[kind]:
                readable, _, _ = select.select([process.stdout], [], [], SECONDS)
                said = process.stdout.readline() if readable else b""
                assert said, f"a client ({kind}) did not get {enough[kind]}: {process.poll()}"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait(SECONDS)
            if process.stdout is not None:
                process.stdout.close()


def complaints(server: ServeProcess) -> list[str]:
    """Errors and tracebacks in the server's log."""
    entries = [json.loads(line) for line in server.log.splitlines()]
    return [str(e) for e in entries if e["level"] in ("error", "critical") or "traceback" in e]


@pytest.mark.timeout(60 + 30 * KILLS)
def test_clients_that_are_killed_take_nothing_with_them(lp_serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    server = lp_serve("--log-format", "json", environment={"TMPDIR": str(folder)})
    pid, target = server.process.pid, server.ready["grpc"]
    with grpc.insecure_channel(target) as channel:
        portrait = register(channel)
        survivor = Survivor(channel, portrait)
        try:
            with victims(target, portrait, list(KINDS)) as warm:  # threads and pools are as large as they get
                assert streams(channel) == 1 + len(warm)
            gone(channel)
            before = Levels.of(pid, folder)
            assert not before.segments
            assert not uploads(folder)
            for _ in range(KILLS):
                with victims(target, portrait, list(KINDS)) as processes:
                    during = Levels.of(pid, folder)
                    assert len(during.segments) == 2  # of shared and of unmapped
                    # what the client has sent, the server may not have read yet
                    wait_for(lambda: uploads(folder), "the upload has a file")
                    seen = survivor.frames
                    for process in processes:
                        process.send_signal(signal.SIGKILL)
                gone(channel)
                wait_for(lambda seen=seen: survivor.frames > seen + 1, "the survivor is answered")
            left = settled(pid, before, folder, slack=2)
        finally:
            survivor.end()
    assert not left
    assert survivor.frames > KILLS
    assert not complaints(server)
    entries = [json.loads(line) for line in server.log.splitlines()]
    ended = Counter((e["kind"], e["status"]) for e in entries if e.get("kind") in ("animate", "render"))
    died = KILLS + 1
    assert (ended["animate", "CANCELLED"], ended["animate", "OK"]) == ((len(KINDS) - 1) * died, 1), ended
    # gRPC may say that the connection broke only after the upload has seemed to end; it is then a broken clip
    assert ended["render", "CANCELLED"] + ended["render", "INVALID_ARGUMENT"] == died, ended


def uploads(folder: Path) -> list[str]:
    """Folders of uploads; libraries leave other files beside them."""
    return [name for name in os.listdir(folder) if name.startswith("lp-edge-")]


def gone(channel: grpc.Channel) -> None:
    """Wait until the server knows that only the survivor is left."""
    wait_for(lambda: streams(channel) == 1, "the streams of dead clients end")


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + SECONDS / 2
    while not condition():
        assert time.monotonic() < end, f"not in {SECONDS / 2:g} s: {what}"
        time.sleep(0.02)


def test_a_server_that_is_killed_is_unavailable_and_the_next_one_tidies_up(lp_serve: Serve) -> None:
    server = lp_serve()
    segments: set[str] = set()
    with grpc.insecure_channel(server.ready["grpc"]) as channel:
        portrait = register(channel)
        stub = animation_pb2_grpc.AnimationServiceStub(channel)

        def requests(shared: bool) -> Iterator[animation_pb2.AnimateRequest]:
            config = animation_pb2.AnimateConfig(portrait_ids=[portrait])
            if shared:
                config.shared_memory.driving_slots, config.shared_memory.driving_slot_bytes = 2, 4096
            yield animation_pb2.AnimateRequest(config=config)
            for sequence in itertools.count(1) if not shared else ():
                frame = animation_pb2.DrivingFrame(sequence=sequence, timestamp_us=sequence, image=image())
                yield animation_pb2.AnimateRequest(frame=frame)
            ended.wait(SECONDS)

        ended = threading.Event()
        streaming, mapping = stub.Animate(requests(False)), stub.Animate(requests(True))
        for _ in range(4):
            assert next(streaming).WhichOneof("message")
        segments.add(next(mapping).started.shared_memory.name)
        assert segments <= set(os.listdir("/dev/shm"))
        server.send(signal.SIGKILL)
        began = time.monotonic()
        for call in (streaming, mapping):
            with pytest.raises(grpc.RpcError) as caught:
                for _ in call:
                    pass
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < SECONDS / 2
        ended.set()
        with pytest.raises(grpc.RpcError) as caught:
            register(channel)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    lp_serve()
    left = segments & set(os.listdir("/dev/shm"))
    for name in left:
        os.unlink(f"/dev/shm/{name}")
    assert not left
