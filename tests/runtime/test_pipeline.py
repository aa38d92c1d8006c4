"""Threads between stages: order, bounds, errors, and that no thread outlives its work."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest

from lp_edge.errors import ConfigError
from lp_edge.runtime.pipeline import Prefetch, prefetch


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lp-edge")]


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    assert our_threads() == []
    yield
    assert wait_until(lambda: not our_threads()), our_threads()


class Source:
    """Counts what was taken from it and notices being closed, and in which thread."""

    def __init__(self, n: int, fail_at: int | None = None) -> None:
        self.taken, self.closed_in, self.n, self.fail_at = 0, "", n, fail_at

    def __call__(self) -> Iterator[int]:
        try:
            for i in range(self.n):
                if i == self.fail_at:
                    raise ValueError(f"item {i}")
                self.taken += 1
                yield i
        finally:
            self.closed_in = threading.current_thread().name


def test_prefetch_gives_every_item_in_order() -> None:
    assert list(prefetch(range(1000), 3, "numbers")) == list(range(1000))
    assert list(prefetch([], 1, "none")) == []


def test_prefetch_works_in_a_named_thread_of_its_own() -> None:
    names = prefetch((threading.current_thread().name for _ in range(2)), 1, "decode")
    assert list(names) == ["lp-edge decode"] * 2


def test_prefetch_never_runs_further_ahead_than_its_queue() -> None:
    source = Source(1000)
    with prefetch(source(), 4, "bounded") as items:
        assert next(items) == 0
        # One taken, four waiting, one in the hand of the thread.
        assert wait_until(lambda: source.taken == 6)
        time.sleep(0.05)
        assert source.taken == 6
    assert source.taken == 6


def test_prefetch_starts_only_when_it_is_used() -> None:
    source = Source(5)
    items = prefetch(source(), 2, "idle")
    assert our_threads() == [] and source.taken == 0
    items.close()
    assert list(items) == []


def test_error_comes_after_the_items_before_it_with_its_own_traceback() -> None:
    source = Source(10, fail_at=3)
    items = prefetch(source(), 8, "failing")
    got = []
    with pytest.raises(ValueError, match="item 3") as caught:
        for item in items:
            got.append(item)  # noqa: PERF402 - what came before the error counts
    assert got == [0, 1, 2]
    assert "__call__" in [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
    assert source.closed_in == "lp-edge failing"
    assert list(items) == [], "an iterator that failed is over"


def test_early_stop_closes_the_generator_in_its_thread() -> None:
    source = Source(10**9)
    items = prefetch(source(), 2, "endless")
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    items.close()
    items.close()
    assert source.closed_in == "lp-edge endless"
    assert list(items) == []


def test_a_forgotten_prefetch_ends_its_thread() -> None:
    source = Source(10**9)
    items = prefetch(source(), 2, "forgotten")
    next(items)
    del items
    gc.collect()
    assert wait_until(lambda: source.closed_in == "lp-edge forgotten")


def test_error_while_the_generator_is_closed_is_not_lost() -> None:
    def stubborn() -> Iterator[int]:
        yield 1
        raise KeyError("late")

    with pytest.raises(KeyError, match="late"):
        list(prefetch(stubborn(), 1, "stubborn"))


def test_a_container_is_not_closed() -> None:
    class Reader(list):  # type: ignore[type-arg]
        closed = False

        def close(self) -> None:
            self.closed = True

    reader = Reader([1, 2])
    assert list(prefetch(reader, 1, "reader")) == [1, 2]
    assert not reader.closed


@pytest.mark.parametrize("size", [0, -1])
def test_queue_without_room_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="queue size"):
        prefetch([1], size, "none")


def chained(source: Iterator[int], *stages: Callable[[int], int], size: int = 2) -> Prefetch[int]:
    """Stages in threads of their own, as the animator nests them."""
    link = prefetch(source, size, "source")
    for number, stage in enumerate(stages):
        link = prefetch(_stage(link, stage), size, f"stage {number}")
    return link


def _stage(upstream: Prefetch[int], work: Callable[[int], int]) -> Iterator[int]:
    with upstream:
        for item in upstream:
            yield work(item)


def test_nested_stages_overlap() -> None:
    """Each stage finishes an item only when the other one is at work too."""
    together = threading.Barrier(2, timeout=10)

    def slow(i: int) -> int:
        together.wait()
        return i

    # the last item of the first stage meets nobody
    got = list(chained(iter(range(9)), lambda i: slow(i) if i else i, lambda i: slow(i) if i < 8 else i))
    assert got == list(range(9))


def test_work_in_flight_is_bounded() -> None:
    source = Source(10_000)
    with chained(source(), int, int) as link:
        next(link)
        time.sleep(0.1)
        # Three queues of 2, one item in the hand of each of three threads, 1 delivered.
        assert source.taken <= 10


@pytest.mark.parametrize("where", ["source", "first", "last"])
def test_an_error_anywhere_ends_the_run_at_once(where: str) -> None:
    source = Source(10**9, fail_at=7 if where == "source" else None)

    def stage(name: str) -> Callable[[int], int]:
        def work(i: int) -> int:
            if where == name and i == 7:
                raise ValueError("item 7")
            return i

        return work

    got: list[int] = []
    start = time.monotonic()
    with pytest.raises(ValueError, match="item 7") as caught:
        got.extend(chained(source(), stage("first"), stage("last")))
    assert time.monotonic() - start < 5
    assert got == list(range(7))
    assert any(f.name in ("work", "__call__") for f in traceback.extract_tb(caught.value.__traceback__))
    assert wait_until(lambda: source.closed_in == "lp-edge source")


def test_early_stop_of_nested_stages() -> None:
    source = Source(10**9)
    with chained(source(), lambda i: i + 1, lambda i: i + 1) as link:
        assert [next(link) for _ in range(4)] == [2, 3, 4, 5]
    assert source.closed_in == "lp-edge source"


def test_closing_wakes_a_stage_that_waits_for_a_slow_source() -> None:
    release = threading.Event()

    def slow() -> Iterator[int]:
        yield 0
        release.wait(10)
        yield 1

    link = chained(slow(), int, int)
    assert next(link) == 0
    closing = threading.Thread(target=link.close)
    closing.start()
    release.set()
    closing.join(5)
    assert not closing.is_alive()


def test_ctrl_c_in_the_caller_ends_all_threads() -> None:
    program = """
import itertools, threading, time
from lp_edge.runtime.pipeline import prefetch

def slow(items):
    with items:
        for item in items:
            time.sleep(0.01)
            yield item

try:
    print("started", flush=True)
    with prefetch(slow(prefetch(slow(prefetch(itertools.count(), 2)), 2)), 2) as items:
        for item in items:
            pass
except KeyboardInterrupt:
    left = [t.name for t in threading.enumerate() if t.name.startswith("lp-edge")]
    print("left", left, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert out == "left []\n" and process.returncode == 0


def test_a_pass_that_gives_nothing_ends_with_its_consumer() -> None:
    """The middle stage reads an endless inner queue and never yields; who leaves must not wait for it."""
    started = threading.Event()

    def endless() -> Iterator[int]:
        while True:
            started.set()
            time.sleep(0.001)
            yield 1

    def swallow() -> Iterator[int]:
        with prefetch(endless(), 2, "inner") as inner:
            yield sum(inner)

    before = threading.active_count()
    outer = prefetch(swallow(), 2, "outer")
    taker = threading.Thread(target=lambda: next(outer, None), daemon=True)
    taker.start()
    assert started.wait(5)
    begun = time.perf_counter()
    outer.close()
    taker.join(5)
    assert time.perf_counter() - begun < 2
    assert threading.active_count() == before
