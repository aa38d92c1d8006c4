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
from lp_edge.runtime.pipeline import Pipeline, Stage, StageStats, prefetch, run_pipeline


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
    with pytest.raises(ConfigError, match="threads"):
        Stage(str, "none", threads=size)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("queue_size", [1, 4])
def test_pipeline_keeps_the_order_also_when_later_items_are_faster(threads: int, queue_size: int) -> None:
    def uneven(i: int) -> int:
        time.sleep(0.004 if i % 3 == 0 else 0.0)
        return i * i

    got: list[str] = []
    stages = [Stage(uneven, "square", threads), Stage(str, "text")]
    stats = run_pipeline(range(40), stages, got.append, queue_size)
    assert got == [str(i * i) for i in range(40)]
    assert [(s.name, s.count) for s in stats] == [("source", 40), ("square", 40), ("text", 40), ("sink", 40)]
    assert stats[1].busy >= 14 * 0.004


def test_stages_overlap() -> None:
    def slow(i: int) -> int:
        time.sleep(0.02)
        return i

    start = time.perf_counter()
    run_pipeline(range(15), [Stage(slow, "a"), Stage(slow, "b"), Stage(slow, "c")], slow)
    # One after the other it is 15 * 4 * 20 ms = 1.2 s; overlapped 0.36 s.
    assert time.perf_counter() - start < 0.9


def test_a_stage_with_threads_runs_calls_at_once() -> None:
    barrier = threading.Barrier(3, timeout=10)

    def together(i: int) -> int:
        barrier.wait()
        return i

    with Pipeline(range(9), [Stage(together, "together", 3)]) as pipeline:
        assert list(pipeline) == list(range(9))


def test_work_in_flight_is_bounded() -> None:
    source = Source(10_000)
    with Pipeline(source(), [Stage(lambda i: i, "one"), Stage(lambda i: i, "two", 3)], 2) as pipeline:
        next(pipeline)
        time.sleep(0.1)
        # Three queues of 2, one item in the hand of each of three threads, up to 4 in the pool, 1 delivered.
        assert source.taken <= 14


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("where", ["source", "first", "last", "sink"])
def test_an_error_anywhere_ends_the_run_at_once(where: str, threads: int) -> None:
    source = Source(10**9, fail_at=7 if where == "source" else None)

    def stage(name: str) -> Callable[[int], int]:
        def work(i: int) -> int:
            if where == name and i == 7:
                raise ValueError("item 7")
            return i

        return work

    got: list[int] = []

    def sink(i: int) -> None:
        stage("sink")(i)
        got.append(i)

    start = time.monotonic()
    with pytest.raises(ValueError, match="item 7") as caught:
        run_pipeline(source(), [Stage(stage("first"), "first", threads), Stage(stage("last"), "last")], sink)
    assert time.monotonic() - start < 5
    assert got == list(range(7))
    assert any(f.name in ("work", "__call__") for f in traceback.extract_tb(caught.value.__traceback__))
    assert source.closed_in == "lp-edge source"


def test_stop_iteration_from_a_stage_is_an_error_not_an_end() -> None:
    def work(i: int) -> int:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        run_pipeline(range(3), [Stage(work, "odd")], print)


def test_early_stop_of_a_pipeline() -> None:
    source = Source(10**9)
    with Pipeline(source(), [Stage(lambda i: i + 1, "a", 2), Stage(lambda i: i + 1, "b")]) as pipeline:
        assert [next(pipeline) for _ in range(4)] == [2, 3, 4, 5]
    assert source.closed_in == "lp-edge source"


def test_closing_wakes_a_stage_that_waits_for_a_slow_source() -> None:
    release = threading.Event()

    def slow() -> Iterator[int]:
        yield 0
        release.wait(10)
        yield 1

    pipeline = Pipeline(slow(), [Stage(lambda i: i, "a"), Stage(lambda i: i, "b")])
    assert next(pipeline) == 0
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    release.set()
    closing.join(5)
    assert not closing.is_alive()


def test_stats_keep_the_newest_durations_only() -> None:
    stats = StageStats("x")
    for _ in range(20_000):
        stats.add(0.5)
    assert stats.count == 20_000 and stats.busy == pytest.approx(10_000.0)
    assert len(stats.seconds) == 10_000


def test_ctrl_c_in_the_caller_ends_all_threads() -> None:
    program = """
import itertools, threading, time
from lp_edge.runtime.pipeline import Stage, run_pipeline

def slow(i):
    time.sleep(0.01)
    return i

try:
    print("started", flush=True)
    run_pipeline(itertools.count(), [Stage(slow, "a", 2), Stage(slow, "b")], lambda i: None)
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
