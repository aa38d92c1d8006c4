"""Processes for benchmarks/server.py: the server, what it holds, and helpers that answer calls."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _server_figures import Level, middle
from prometheus_client.parser import text_string_to_metric_families

from lp_edge.errors import EngineError

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")
_PRELOAD = (
    "lp_edge.client.sync",
    "lp_edge.runtime.animator",
    "lp_edge.runtime.server.codec",
    "lp_edge.proto.v1.animation_pb2_grpc",
)
_SHM = Path("/dev/shm")


def names_in_shm(pid: int) -> list[str]:
    """Segments that a process, alive or dead, has left a name for in /dev/shm."""
    return [path.name for path in _SHM.glob(f"lp-edge-{pid}-*")]


def level_of(pid: int, at: float = 0.0) -> Level:
    """What a process holds now."""
    folder = Path("/proc") / str(pid)
    # /proc/PID/stat: the name may hold blanks and brackets; after it come the fields 3 and on (man 5 proc)
    stat = (folder / "stat").read_text().rpartition(")")[2].split()
    links = []
    for link in (folder / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(link))
    return Level(
        at=at,
        rss_mib=round(int(stat[21]) * _PAGE / 2**20, 2),
        threads=int(stat[17]),
        fds=len(links),
        shm=len(names_in_shm(pid)),
        shm_open=sum(link.startswith(f"{_SHM}/lp-edge-") for link in links),
        cpu_s=(int(stat[11]) + int(stat[12])) / _TICK,
    )


class Usage:
    """Processor time of some processes, and of everything else on the machine.

    Args:
        pids: name -> process.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = {**pids, "instrument": os.getpid()}
        self._last = self._read()

    def _read(self) -> dict[str, float]:
        # user, nice, system, (idle, iowait,) irq, softirq, steal: what was not idle, by us, others, or other guests
        ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        found = {who: level_of(pid).cpu_s for who, pid in self._pids.items()}
        busy = (sum(ticks) - ticks[3] - ticks[4]) / _TICK
        return {**found, "others": busy - sum(found.values()), "wall": time.perf_counter()}

    def take(self) -> dict[str, float]:
        """Seconds since the last look: of each process, of ``others``, and of the clock (``wall``)."""
        now = self._read()
        spent = {who: max(0.0, now[who] - self._last[who]) for who in now}
        self._last = now
        return spent


class Server:
    """``lp-serve`` as a process of its own; a context manager.

    Args:
        listen: as its option ``--listen``.
        options: more options.

    Attributes:
        address, metrics_address: where it listens.
        loading_s: from the start of the process to its line that says so.
    """

    def __init__(self, listen: str = "127.0.0.1:0", options: tuple[str, ...] = ()) -> None:
        code = "import sys; from lp_edge.runtime.server.command import serve; serve(sys.argv[1:])"
        where = ("--listen", listen, "--metrics-port", "0", "--json", "--log-level", "warning")
        # a file, not a pipe: nobody reads while figures are taken, and a full pipe would stop the server
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *where, *options],
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        watchdog = threading.Timer(120, self._process.kill)  # a server that never gets ready must not stop us
        watchdog.start()
        try:
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            self.kill()
            raise EngineError(
                f"lp-serve ended with code {self._process.returncode}: {self.said()}",
                "a line with addresses",
                "",
            )
        ready = json.loads(line)
        self.loading_s = time.perf_counter() - started
        self.address: str = ready["grpc"]
        self.metrics_address: str = ready["metrics"]
        self.pid = self._process.pid

    def said(self) -> str:
        """What it logged."""
        self._said.seek(0)
        return self._said.read().strip()

    def metrics(self) -> dict[tuple[str, str], float]:
        """Samples of its metrics: (name, value of the first label or "") -> sum over further labels; without buckets of histograms."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: dict[tuple[str, str], float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if not sample.name.endswith("_bucket"):
                    found[sample.name, next(iter(sample.labels.values()), "")] += sample.value
        return found

    def level(self, at: float = 0.0) -> Level:
        """What it holds now."""
        return level_of(self.pid, at)

    def rest(self, seconds: float) -> Level:
        """What it holds once no stream is open, as the median of five looks."""
        self.wait_for_streams(0)
        levels = []
        for _ in range(5):
            time.sleep(seconds / 5)
            levels.append(self.level())
        return middle(levels)

    def wait_for_streams(self, count: int, timeout_s: float = 20.0) -> float:
        """Seconds until it has that many open streams.

        Raises:
            EngineError: it has not in time.
        """
        begun = time.perf_counter()
        while (streams := self.metrics()[("lp_edge_admitted_streams", "")]) != count:
            if time.perf_counter() - begun > timeout_s:
                raise EngineError(
                    f"{streams:g} streams are open after {timeout_s} s", f"expected {count}", ""
                )
            time.sleep(0.02)
        return time.perf_counter() - begun

    def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Server:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()


class Sampler:
    """Looks at a process again and again, in a thread, while the ``with`` block runs."""

    def __init__(self, pid: int, progress: Callable[[], float], interval_s: float) -> None:
        self.levels: list[Level] = []
        self._pid, self._progress, self._interval = pid, progress, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            with contextlib.suppress(OSError):  # it has ended: the main thread finds out
                self.levels.append(level_of(self._pid, self._progress()))

    def __enter__(self) -> Sampler:  # noqa: PYI034
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Helper:
    """An object in a process of its own; its methods are called through a pipe.

    Args:
        make: makes the object there; a class or function of a module.
        args: for ``make``.
    """

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        # Children are forked from a process that has imported what takes long, and has neither threads of its own nor channels.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        self._name = make.__name__
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_answer_calls, args=(there, make, args), daemon=True)
        self._process.start()
        there.close()
        try:
            self._result()  # that it is made
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid or 0)

    def call(self, method: str, *args: Any, timeout_s: float = 1800.0) -> Any:
        """Call a method; what it returns, or its exception."""
        self._pipe.send((method, args))
        return self._result(timeout_s)

    def _result(self, timeout_s: float = 120.0) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                raise EngineError(
                    f"{self._name} has not answered for {timeout_s} s", "expected an answer", ""
                )
            error, value = self._pipe.recv()
        except (EOFError, ConnectionError) as lost:
            self._process.join(5)
            raise EngineError(
                f"the process of {self._name} ended with code {self._process.exitcode}",
                "expected an answer",
                "",
            ) from lost
        if error is not None:
            raise error
        return value

    def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def close(self) -> None:
        """Let it end; it is killed where it does not within 10 s."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Helper:  # noqa: PYI034
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer_calls(pipe: Any, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What the process of a helper does until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started us
    thing: Any = None

    def work(call: Callable[[], Any]) -> bool:
        try:
            answer = (None, call())
        except Exception as error:  # noqa: BLE001 - raised where the result is taken
            answer = (_portable(error), None)
        with contextlib.suppress(BrokenPipeError):
            pipe.send(answer)
        return answer[0] is None

    def begin() -> None:
        nonlocal thing
        thing = make(*args)

    if work(begin):
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                method, arguments = pipe.recv()
                work(lambda m=method, a=arguments: getattr(thing, m)(*a))
    if hasattr(thing, "close"):
        thing.close()


def _portable(error: Exception) -> Exception:
    """An error that a pipe carries: those of lp-edge as they are, others as text (gRPC's hold objects of their call)."""
    import traceback

    if type(error).__module__ == "lp_edge.errors":
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
