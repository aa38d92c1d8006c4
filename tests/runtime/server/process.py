"""A real ``lp-serve`` in a process of its own, and what it holds: threads, descriptors, shared memory, files."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""What a process may take for anything on a busy machine; nothing here waits so long when all is well."""


class ServeProcess:
    """A running ``lp-serve`` in a process of its own."""

    def __init__(self, args: list[str], environment: dict[str, str], errors: Path) -> None:
        self._errors = errors
        code = "from lp_edge.runtime.server.command import serve; serve(prog_name='lp-serve')"
        with errors.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *args],
                stdout=subprocess.PIPE,
                stderr=out,
                env={**os.environ, **environment},
            )
        self.ready: dict[str, Any] = {}

    @property
    def log(self) -> str:
        """What it has written to standard error so far."""
        return self._errors.read_text()

    def wait_ready(self) -> None:
        """Read the line that says where it listens; fails with its log when it ends before."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if readable else b""
        assert line, f"lp-serve did not start: {self.process.poll()}\n{self.log}"
        self.ready = json.loads(line)

    def wait_log(self, text: str) -> None:
        """Wait until the log contains a text."""
        until = time.monotonic() + SECONDS
        while text not in self.log:
            assert time.monotonic() < until, f"{text!r} is not in the log:\n{self.log}"
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, timeout: float = SECONDS) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def end(self) -> None:
        """Kill it if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass(frozen=True)
class Levels:
    """What a process holds.

    Attributes:
        threads: their number.
        descriptors: open ones.
        segments: names of its shared memory.
        files: names in its folder for temporary files.
        memory: resident bytes.
    """

    threads: int
    descriptors: int
    segments: frozenset[str]
    files: frozenset[str]
    memory: int

    @classmethod
    def of(cls, pid: int, folder: Path | None = None) -> Levels:
        """Of a process that runs, with the folder that its TMPDIR names."""
        proc = Path("/proc") / str(pid)
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        held = set()
        for descriptor in (proc / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                held.add(os.readlink(descriptor))
        # named ones, and those whose name is gone while the server still holds them
        segments = {name for name in os.listdir("/dev/shm") if name.startswith(f"lp-edge-{pid}-")}
        segments |= {
            Path(target).name.removesuffix(" (deleted)")
            for target in held
            if target.startswith("/dev/shm/lp-edge-")
        }
        return cls(
            threads=int(status["Threads"]),
            descriptors=len(list((proc / "fd").iterdir())),
            segments=frozenset(segments),
            files=frozenset(os.listdir(folder)) if folder is not None else frozenset(),
            memory=int(status["VmRSS"].split()[0]) << 10,
        )

    def above(self, before: Levels, slack: int = 0) -> list[str]:
        """What is more than it was, in words; ``slack`` threads and descriptors are let through."""
        found = []
        for name in ("threads", "descriptors"):
            was, now = getattr(before, name), getattr(self, name)
            if now > was + slack:
                found.append(f"{name}: {was} before, {now} now")
        for name in ("segments", "files"):
            if more := getattr(self, name) - getattr(before, name):
                found.append(f"{name}: {sorted(more)} more than before")
        return found


def settled(pid: int, before: Levels, folder: Path | None = None, slack: int = 0) -> list[str]:
    """Wait for a process to return to its levels; what it still holds too much of, in words."""
    end = time.monotonic() + SECONDS / 3
    while (more := Levels.of(pid, folder).above(before, slack)) and time.monotonic() < end:
        time.sleep(0.05)
    return more
