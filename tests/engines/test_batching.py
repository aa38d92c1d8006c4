"""Calls of many streams: merged without a trace, in fair turns, and nobody is left waiting."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lp_edge.engines import BackendConfig, open_bundle, open_runner
from lp_edge.engines.batching import BatchConfig, CallScope, DeviceWorker
from lp_edge.engines.cuda import Cuda, open_cuda
from lp_edge.engines.device import DeviceArray, concatenate, upload
from lp_edge.engines.runner import Array, Runner, TensorSpec, fetch
from lp_edge.errors import ConfigError, EngineError, Interrupted, TensorError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.options import AnimateOptions
from lp_edge.tests.fake_cuda.device import FakeCuda

CPU = BackendConfig("cpu", threads=1)
LONG = 20.0  # seconds; no test waits that long unless it fails


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, np.dtype("float32"), shape)


class Gate:
    """Open, or holds calls back until each is let through; counts who came to it."""

    def __init__(self) -> None:
        self._open, self._tokens, self.came = True, threading.Semaphore(0), threading.Semaphore(0)

    def close(self) -> None:
        self._open = False

    def open(self) -> None:
        self._open = True
        self._tokens.release(1000)

    def step(self) -> None:
        """Let one call through and wait for the next."""
        self._tokens.release()
        self.wait_for_call()

    def wait_for_call(self) -> None:
        assert self.came.acquire(timeout=LONG)

    def pass_through(self) -> None:
        self.came.release()
        if not self._open:
            assert self._tokens.acquire(timeout=LONG)


class Fake(Runner):
    """y = 2 x + source (+ bias); records what reaches it, stops at a gate, and fails on NaN."""

    backend = "fake"
    device = "nowhere"

    def __init__(
        self,
        inputs: Sequence[TensorSpec] = (spec("x", "batch", "w"),),
        outputs: Sequence[TensorSpec] = (spec("y", "batch", "w"),),
        *,
        lends: bool = False,
        name: str = "net",
        gate: Gate | None = None,
    ) -> None:
        super().__init__(name, inputs, outputs)
        self.calls: list[dict[str, Any]] = []
        self.gate = gate or Gate()
        self.lends, self.inside, self.most, self.closes = lends, 0, 0, 0
        self.lock = threading.Lock()
        self.memory = np.zeros((64, 2), np.float32)
        self.fails: Callable[[], BaseException] = lambda: EngineError("NaN came", "expected numbers", "")

    @property
    def loans(self) -> bool:
        return self.lends

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        with self.lock:
            self.calls.append(dict(feeds))
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            self.gate.pass_through()
            value = sum(2 * np.asarray(a) if name == "x" else np.asarray(a) for name, a in feeds.items())
            if np.isnan(value).any():
                raise self.fails()
            if self.lends:
                self.memory[: len(value)] = value
                value = self.memory[: len(value)]
            return {name: value for name in outputs}
        finally:
            with self.lock:
                self.inside -= 1

    def _close(self) -> None:
        assert not self.inside
        self.closes += 1

    def rows(self) -> list[list[float]]:
        """First numbers of the rows of x of every call."""
        return [[float(v) for v in np.asarray(call["x"])[:, 0]] for call in self.calls]


class OnDevice:
    """An array that only ``__array__`` brings to the host."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        self.shape, self.dtype = host.shape, host.dtype

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self.host


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lp-edge")]


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    assert our_threads() == []
    yield
    assert our_threads() == [], "close() must have ended them"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as threads:
        yield threads


def x(value: float, rows: int = 1, width: int = 2) -> np.ndarray:
    return np.full((rows, width), value, np.float32)


class Line:
    """A worker with one runner whose first call is stopped at the gate, so that the next ones line up in known order."""

    def __init__(self, pool: ThreadPoolExecutor, fake: Fake, config: BatchConfig | None = None) -> None:
        self.pool, self.fake = pool, fake
        self.worker = DeviceWorker(config or BatchConfig())
        self.runner = self.worker.wrap(fake)

    def __enter__(self) -> Line:  # noqa: PYI034 - Self needs Python 3.11
        self.fake.gate.close()
        self.first = self.call("first", x(-1))
        self.fake.gate.wait_for_call()
        return self

    def __exit__(self, *_: object) -> None:
        self.go()
        self.worker.close()

    def call(
        self,
        stream: str | CallScope | None,
        array: Any,
        runner: Runner | None = None,
        outputs: Sequence[str] | None = None,
        *,
        keep: bool = False,
        **more: Any,
    ) -> Future[dict[str, Any]]:
        """Make a call in a thread of its own and return when it stands in line (or is being run)."""
        scope = CallScope(stream) if isinstance(stream, str) else stream
        known = self.worker.pending

        def work() -> dict[str, Any]:
            with nullcontext() if scope is None else self.worker.scope(scope):
                return (runner or self.runner).infer({"x": array, **more}, outputs, keep=keep)

        future = self.pool.submit(work)
        if hasattr(self, "first"):  # the thread of the worker is at the gate
            wait_until(lambda: self.worker.pending > known or future.done())
        return future

    def go(self) -> None:
        self.fake.gate.open()


def test_configuration() -> None:
    assert BatchConfig() == BatchConfig(8, 0.0, 1)
    for wrong in (
        {"max_batch": 0},
        {"max_batch": 65},
        {"max_batch": 2.0},
        {"threads": 0},
        {"threads": True},
        {"threads": 65},
        {"max_wait_s": -0.1},
        {"max_wait_s": 1.1},
        {"max_wait_s": float("nan")},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            BatchConfig(**wrong)  # type: ignore[arg-type]


def test_a_wrapped_runner_is_the_runner() -> None:
    fake = Fake()
    with DeviceWorker(BatchConfig()) as worker:
        runner = worker.wrap(fake)
        assert (runner.name, runner.backend, runner.device, runner.loans) == ("net", "fake", "nowhere", False)
        assert runner.inputs == fake.inputs and runner.outputs == fake.outputs
        np.testing.assert_array_equal(runner.infer({"x": x(3, 2)})["y"], x(6, 2))
        with pytest.raises(TensorError, match="'z'"):
            runner.infer({"z": x(1)})
        for again in (fake, runner):
            with pytest.raises(EngineError, match="wrapped already"):
                worker.wrap(again)
        runner.close()
        runner.close()
        assert fake.closes == 1
        with pytest.raises(EngineError, match="closed runner"):
            runner.infer({"x": x(1)})


# -- merging -----------------------------------------------------------------------------------------


def test_calls_that_fit_become_one(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        futures = [line.call(f"s{i}", x(i, rows)) for i, rows in enumerate((1, 2, 1))]
        line.go()
        for i, (future, rows) in enumerate(zip(futures, (1, 2, 1), strict=True)):
            result = future.result(LONG)["y"]
            np.testing.assert_array_equal(result, x(2 * i, rows))
            assert result.base is None and result.flags.writeable, "results belong to the caller"
    assert line.fake.rows() == [[-1], [0, 1, 1, 2]]


def test_rows_are_bounded(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake(), BatchConfig(max_batch=4)) as line:
        futures = [line.call(f"s{i}", x(i, rows)) for i, rows in enumerate((2, 1, 2, 6, 1))]
        line.go()
        for i, future in enumerate(futures):
            assert future.result(LONG)["y"][0, 0] == 2 * i
    # the third does not fit into what the first two leave; the fourth is larger than a batch and runs alone
    assert line.fake.rows() == [[-1], [0, 0, 1, 4], [2, 2], [3] * 6]


def test_one_row_at_most_means_no_merging(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake(), BatchConfig(max_batch=1)) as line:
        futures = [line.call(f"s{i}", x(i)) for i in range(3)]
        line.go()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [0, 2, 4]
    assert line.fake.rows() == [[-1], [0], [1], [2]]


def test_what_does_not_fit_stays_apart(pool: ThreadPoolExecutor) -> None:
    fake = Fake(outputs=(spec("y", "batch", "w"), spec("z", "batch", "w")))
    other = Fake(name="other")
    with Line(pool, fake) as line:
        runner = line.worker.wrap(other)
        futures = [
            line.call("a", x(1)),
            line.call("b", x(2, width=3)),  # another width
            line.call("c", x(3), outputs=["z"]),  # another output
            line.call("d", x(4), runner=runner),  # another network
            line.call("e", x(5)),
        ]
        line.go()
        results = [f.result(LONG) for f in futures]
    assert [next(iter(r.values()))[0, 0] for r in results] == [2, 4, 6, 8, 10]
    assert [list(r) for r in results] == [["y", "z"], ["y", "z"], ["z"], ["y"], ["y", "z"]]
    assert fake.rows() == [[-1], [1, 5], [2], [3]] and other.rows() == [[4]]


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((spec("x", "batch", 2),), (spec("y", "other", 2),)),
        ((spec("x", "batch", 2),), (spec("y", "batch", 2), spec("z", 1, 2))),
        ((spec("x", "?0", 2),), (spec("y", "?0", 2),)),
        ((spec("x", 1, 2),), (spec("y", 1, 2),)),
        ((spec("x", "batch", 2),), (spec("y", "batch", "found"),)),
        ((spec("x", "batch", "?1"),), (spec("y", "batch", "?1"),)),
        ((spec("x", "batch", "2*batch"),), (spec("y", "batch", "2*batch"),)),
    ],
)
def test_networks_whose_calls_run_alone(
    pool: ThreadPoolExecutor, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    with Line(pool, Fake(inputs, outputs)) as line:
        futures = [line.call(f"s{i}", x(i)) for i in range(3)]
        line.go()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [0, 2, 4]
    assert line.fake.rows() == [[-1], [0], [1], [2]]


def test_sizes_by_formula_may_depend_on_the_picture(pool: ThreadPoolExecutor) -> None:
    fake = Fake((spec("x", "N", "W"),), (spec("y", "N", "2*W//(1+1)"),))
    with Line(pool, fake) as line:
        futures = [line.call(f"s{i}", x(i)) for i in range(2)]
        line.go()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [0, 2]
    assert fake.rows() == [[-1], [0, 1]]


COMMON = (spec("x", "batch", "w"), spec("table", 1, "w"))
SPREAD = (spec("x", "batch", "w"), spec("source", "sources", "w"), spec("more", "sources", "w"))


def test_an_input_without_batch_must_be_the_same_object(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        fake = Fake(COMMON)
        runner, table = line.worker.wrap(fake), x(100)
        futures = [
            line.call(f"s{i}", x(i), runner=runner, table=t)
            for i, t in enumerate((table, table, table.copy()))
        ]
        line.go()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [100, 102, 104]
    assert fake.rows() == [[0, 1], [2]]
    assert fake.calls[0]["table"] is table


def test_a_source_that_all_share_is_passed_once(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        fake = Fake(SPREAD)
        runner, source, more = line.worker.wrap(fake), x(100), x(1000)
        futures = [line.call(f"s{i}", x(i, i + 1), runner=runner, source=source, more=more) for i in range(2)]
        line.go()
        assert [f.result(LONG)["y"][:, 0].tolist() for f in futures] == [[1100], [1102, 1102]]
    assert fake.calls[0]["source"] is source and fake.calls[0]["more"] is more


def test_different_sources_are_repeated_to_their_rows(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        fake = Fake(SPREAD)
        runner, more = line.worker.wrap(fake), x(1000)
        each = np.stack([x(30)[0], x(40)[0]])
        futures = [
            line.call("a", x(0), runner=runner, source=x(10), more=more),
            line.call("b", x(1, 3), runner=runner, source=x(20), more=more),
            line.call("c", x(2, 2), runner=runner, source=each, more=np.repeat(more, 2, 0)),
        ]
        line.go()
        got = [f.result(LONG)["y"][:, 0].tolist() for f in futures]
    assert got == [[1010], [1022] * 3, [1034, 1044]]
    assert fake.calls[0]["source"][:, 0].tolist() == [10, 20, 20, 20, 30, 40]
    # it is the same object, but one of its axis is not
    assert fake.calls[0]["more"].shape == (6, 2)


def test_sources_of_one_axis_go_together(pool: ThreadPoolExecutor) -> None:
    """One input being the same object does not help when the other of its axis is not; nor when it has several rows."""
    more, each = x(1000), np.stack([x(30)[0], x(40)[0]])
    for sources, others, rows in (([x(10), x(20)], [more, more], 1), ([each, each], [each, each], 2)):
        with Line(pool, Fake()) as line:
            fake = Fake(SPREAD)
            runner = line.worker.wrap(fake)
            futures = [
                line.call(f"s{i}", x(i, rows), runner=runner, source=source, more=other)
                for i, (source, other) in enumerate(zip(sources, others, strict=True))
            ]
            line.go()
            for i, future in enumerate(futures):
                expected = 2 * x(i, rows) + sources[i] + others[i]
                np.testing.assert_array_equal(future.result(LONG)["y"], expected)
        assert [len(c["source"]) for c in fake.calls] == [len(c["more"]) for c in fake.calls] == [2 * rows]


def test_arrays_on_a_device_are_not_brought_to_the_host(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        fake = Fake(SPREAD)
        runner, source, more = line.worker.wrap(fake), OnDevice(x(100)), x(0)
        futures = [
            line.call("a", x(0), runner=runner, source=source, more=more),
            line.call("b", x(1), runner=runner, source=source, more=more),
            line.call("c", x(2), runner=runner, source=OnDevice(x(200)), more=more),
            line.call("d", OnDevice(x(3)), runner=runner, source=source, more=more),
        ]
        line.go()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [100, 102, 204, 106]
    assert sorted(fake.rows()) == [[0, 1], [2], [3]]


def test_arrays_that_are_not_contiguous(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        array = np.arange(8, dtype=np.float32).reshape(2, 4)[:, ::2]
        futures = [line.call(f"s{i}", array) for i in range(2)]
        line.go()
        for future in futures:
            np.testing.assert_array_equal(future.result(LONG)["y"], 2 * array)


def test_wrong_number_of_rows_is_noticed(pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    class Liar(Fake):
        def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
            return {name: np.asarray(array)[:1] for name, array in super()._infer(feeds, outputs).items()}

    with caplog.at_level(logging.WARNING, "lp_edge"), Line(pool, Liar()) as line:
        futures = [line.call(f"s{i}", x(i)) for i in range(2)]
        line.go()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [0, 2]
    assert line.fake.rows() == [[-1], [0, 1], [0], [1]]
    assert "output y has shape [1, 2] for 2 rows" in caplog.text


# -- real networks -----------------------------------------------------------------------------------


def together(
    pool: ThreadPoolExecutor, runner: Runner, feeds: Sequence[Mapping[str, Array]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Results of single calls, results of the same calls merged, and in how many calls."""
    singles = [runner.infer(f) for f in feeds]
    calls: list[int] = []

    class Counted(Runner):
        backend = device = "counted"

        def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
            calls.append(1)
            return runner.infer(feeds, outputs)

        def _close(self) -> None:
            pass

    counted = Counted(runner.name, list(runner.inputs.values()), list(runner.outputs.values()))
    with Line(pool, Fake()) as line:
        wrapped = line.worker.wrap(counted)
        futures = [line.pool.submit(wrapped.infer, f) for f in feeds]
        wait_until(lambda: line.worker.pending == len(feeds))
        line.go()
        return singles, [f.result(LONG) for f in futures], len(calls)


def network_feeds(name: str, runner: Runner, points: np.ndarray, n: int) -> list[dict[str, np.ndarray]]:
    """Reproducible feeds for ``n`` calls of a network, 1 and 2 rows in turn; pictures of noise, keypoints of a face."""
    rng = np.random.default_rng(5)
    sizes = {"batch": 1, "N": 1, "sources": 1, "S": 1, "H": 192, "height": 192, "W": 128, "width": 128}
    face = (points - points.min(0)) / np.ptp(points[:, :2]) * 90 + 20
    made = []
    for call in range(n):
        sizes["batch"] = sizes["N"] = 1 + call % 2
        one = {}
        for tensor, s in runner.inputs.items():
            shape = tuple(sizes[a] if isinstance(a, str) else a for a in s.shape)
            if s.dtype == np.uint8:
                one[tensor] = rng.integers(0, 256, shape, dtype=np.uint8)
            elif shape[1:] == (478, 3):
                one[tensor] = (face + rng.normal(0, 0.5, shape)).astype(np.float32)
            else:
                one[tensor] = rng.uniform(-1, 1, shape).astype(np.float32)
        made.append(one)
    return made


def same(
    network: str,
    singles: Sequence[dict[str, Any]],
    merged: Sequence[dict[str, Any]],
    levels: int,
    error: float,
) -> None:
    """Numbers in units of the larger of 1 and the output's largest: sums of a batch may be made in another order."""
    for single, result in zip(singles, merged, strict=True):
        assert list(single) == list(result)
        for name, array in single.items():
            assert array.shape == result[name].shape
            if array.dtype == np.uint8:
                assert np.abs(array.astype(int) - result[name]).max() <= levels, f"{network} {name}"
            else:
                scale = max(1.0, float(np.abs(array).max()))
                assert np.abs(array - result[name]).max() <= error * scale, f"{network} {name}"


def test_toys_merged_equal_toys_alone(toys: Path, pool: ThreadPoolExecutor) -> None:
    with np.load(toys / "canonical.npz") as table:
        points = table["points"]
    for path in sorted(toys.rglob("*.onnx")):
        with open_runner(path, CPU) as runner:
            feeds = network_feeds(path.stem, runner, points, 4)
            singles, merged, calls = together(pool, runner, feeds)
        assert calls == 1, path
        same(path.stem, singles, merged, levels=0, error=1e-7)


def test_built_in_networks_merged_equal_alone(pool: ThreadPoolExecutor) -> None:
    bundle = open_bundle()
    points = bundle.load_table("canonical")["points"]
    for network in ("face_detector", "face_mesh", "warp_decode"):
        with bundle.runner(network, CPU) as runner:
            singles, merged, calls = together(pool, runner, network_feeds(network, runner, points, 4))
        assert calls == 1, network
        same(network, singles, merged, levels=1, error=1e-5)


def test_streams_draw_the_same_frames_through_a_worker(toy_bundle: Path) -> None:
    """Four live streams at once, each of its own portrait."""

    def picture(at: int) -> np.ndarray:
        out = np.zeros((200, 240, 3), np.uint8)
        out[60:140, at - 40 : at + 40] = 255
        return out

    def frames(animator: Animator, number: int) -> list[np.ndarray]:
        live = animator.live(picture(90 + 10 * number), AnimateOptions(smooth=False))
        return [live.step(picture(90 + number * i), i / 25).rgb for i in range(8)]

    with Animator(toy_bundle, backend=CPU) as animator:
        alone = [frames(animator, number) for number in range(4)]
    notes = Notes()
    with (
        DeviceWorker(BatchConfig(max_wait_s=0.05), observer=notes) as worker,
        Animator(toy_bundle, backend=CPU, wrap=worker.wrap) as animator,
        ThreadPoolExecutor(4) as threads,
    ):

        def stream(number: int) -> list[np.ndarray]:
            with worker.scope(CallScope(number)):
                return frames(animator, number)

        together = list(threads.map(stream, range(4)))
    np.testing.assert_array_equal(alone, together)
    assert max(size for _, size, *_ in notes.notes) > 1, "some calls were merged"


# -- turns -------------------------------------------------------------------------------------------


def test_each_stream_joins_before_any_joins_twice(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake(), BatchConfig(max_batch=4)) as line:
        futures = [line.call("a", x(10 + i)) for i in range(3)]
        futures += [line.call("b", x(20 + i)) for i in range(2)] + [line.call("c", x(30))]
        line.go()
        for future in futures:
            future.result(LONG)
    assert line.fake.rows() == [[-1], [10, 20, 30, 11], [21, 12]] or line.fake.rows() == [
        [-1],
        [10, 20, 30, 11],
        [12, 21],
    ]


@pytest.mark.parametrize("network", ["same", "other"])
def test_a_flood_delays_others_by_one_batch_only(pool: ThreadPoolExecutor, network: str) -> None:
    """Step by step; also where nothing can be merged: the quiet stream is next although the flood came first."""
    with Line(pool, Fake(), BatchConfig(max_batch=1)) as line:
        gate = line.fake.gate
        other = Fake(name="other", gate=gate)
        runner = line.worker.wrap(other) if network == "other" else line.runner
        flood = [line.call("flood", x(i)) for i in range(6)]
        gate.step()  # 0 of the flood runs
        quiet = [line.call("quiet", x(100), runner=runner)]
        gate.step()  # the quiet one runs
        assert (other if network == "other" else line.fake).rows()[-1] == [100]
        gate.step()  # 1 of the flood runs
        assert quiet[0].result(LONG)["y"][0, 0] == 200
        quiet.append(line.call("quiet", x(101), runner=runner))
        gate.step()
        assert (other if network == "other" else line.fake).rows()[-1] == [101]
        line.go()
        for future in (*flood, *quiet):
            future.result(LONG)


def test_streams_are_served_as_they_came(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake(), BatchConfig(max_batch=1)) as line:
        futures = [line.call(name, x(i)) for i, name in enumerate("cabd")]
        line.go()
        for future in futures:
            future.result(LONG)
    assert line.fake.rows() == [[-1], [0], [1], [2], [3]]


def test_threads_without_a_scope_are_streams_of_their_own(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake(), BatchConfig(max_batch=2)) as line:
        futures = [line.call("a", x(0)), line.call("a", x(1)), line.call(None, x(2)), line.call(None, x(3))]
        line.go()
        for future in futures:
            future.result(LONG)
    assert line.fake.rows() == [[-1], [0, 2], [3, 1]]


def test_scopes_nest(pool: ThreadPoolExecutor) -> None:
    fake = Fake()
    outer, inner = CallScope("outer"), CallScope("inner")
    with DeviceWorker(BatchConfig()) as worker:
        runner = worker.wrap(fake)
        inner.cancel()
        with worker.scope(outer) as entered:
            assert entered is outer
            with worker.scope(inner), pytest.raises(Interrupted, match="inner"):
                runner.infer({"x": x(0)})
            runner.infer({"x": x(1)})
            outer.cancel()
            with pytest.raises(Interrupted, match="outer"):
                runner.infer({"x": x(2)})
            pool.submit(runner.infer, {"x": x(3)}).result(LONG)  # another thread, not in the scope
        runner.infer({"x": x(4)})
    assert fake.rows() == [[1], [3], [4]]


# -- waiting for more --------------------------------------------------------------------------------


def patient(**values: Any) -> BatchConfig:
    """A wait so long that whoever waits it out fails the test, whatever else the machine does."""
    config = BatchConfig(**values)
    object.__setattr__(config, "max_wait_s", 10 * LONG)
    return config


class Streams:
    """A worker that waits for more calls, and threads that enter a scope first and call when they are told to."""

    def __init__(self, pool: ThreadPoolExecutor, config: BatchConfig) -> None:
        self.pool, self.fake, self.worker = pool, Fake(), DeviceWorker(config)
        self.runner = self.worker.wrap(self.fake)
        self.leave: list[threading.Event] = []

    def __enter__(self) -> Streams:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        for event in self.leave:
            event.set()
        self.worker.close()

    def active(self) -> tuple[CallScope, Callable[[float], Future[Any]], threading.Event]:
        """A scope that a thread has entered, a function that makes it call, and an event that makes it leave."""
        scope, values, leave, entered = CallScope(len(self.leave)), [], threading.Event(), threading.Event()
        self.leave.append(leave)
        result: Future[Any] = Future()

        def work() -> None:
            with self.worker.scope(scope):
                entered.set()
                assert leave.wait(LONG)
                for value in values:
                    try:
                        result.set_result(self.runner.infer({"x": x(value)})["y"])
                    except Interrupted as error:
                        result.set_exception(error)

        def call(value: float) -> Future[Any]:
            values.append(value)
            leave.set()
            return result

        self.pool.submit(work)
        assert entered.wait(LONG)
        return scope, call, leave


def test_waits_for_active_scopes(pool: ThreadPoolExecutor) -> None:
    with Streams(pool, patient()) as streams:
        calls = [streams.active()[1] for _ in range(3)]
        futures = []
        for i, call in enumerate(calls):
            assert streams.worker.pending == i and not streams.fake.calls
            futures.append(call(i))
            wait_until(lambda i=i: streams.worker.pending == i + 1 or bool(streams.fake.calls))
        assert [f.result(LONG)[0, 0] for f in futures] == [0, 2, 4]
    assert streams.fake.rows() == [[0, 1, 2]]


def test_waits_no_longer_than_allowed(pool: ThreadPoolExecutor) -> None:
    with Streams(pool, BatchConfig(max_wait_s=0.1)) as streams:
        streams.active()  # will never call
        start = time.monotonic()
        assert streams.active()[1](7).result(LONG)[0, 0] == 14
        assert 0.1 <= time.monotonic() - start < LONG / 2


@pytest.mark.parametrize("how", ["leave", "cancel"])
def test_does_not_wait_for_scopes_that_are_over(pool: ThreadPoolExecutor, how: str) -> None:
    with Streams(pool, patient()) as streams:
        scope, _, leave = streams.active()
        future = streams.active()[1](7)
        wait_until(lambda: streams.worker.pending == 1)
        assert not streams.fake.calls
        if how == "leave":
            leave.set()
        else:
            scope.cancel()
        assert future.result(LONG)[0, 0] == 14


def test_does_not_wait_when_full_or_alone(pool: ThreadPoolExecutor) -> None:
    with Streams(pool, patient(max_batch=2)) as streams:
        assert streams.runner.infer({"x": x(1)})["y"][0, 0] == 2  # no scope at all
        with streams.worker.scope(CallScope("only")):
            assert streams.runner.infer({"x": x(2)})["y"][0, 0] == 4
        streams.active()
        assert streams.runner.infer({"x": x(3, 2)})["y"][0, 0] == 6  # full
        calls = [streams.active()[1] for _ in range(2)]
        futures = [call(4) for call in calls]
        assert [f.result(LONG)[0, 0] for f in futures] == [8, 8]  # full when the second has come
    assert streams.fake.rows() == [[1], [2], [3, 3], [4, 4]]


def test_waiting_for_one_network_does_not_stop_another(pool: ThreadPoolExecutor) -> None:
    with Streams(pool, patient(max_batch=2)) as streams:
        _, _, leave = streams.active()
        late = streams.active()[1](7)
        wait_until(lambda: streams.worker.pending == 1)
        runner = streams.worker.wrap(Fake(name="other"))
        assert runner.infer({"x": x(3, 2)})["y"][0, 0] == 6
        assert not late.done()
        leave.set()
        late.result(LONG)


def test_one_change_may_free_batches_of_several_threads(pool: ThreadPoolExecutor) -> None:
    with Streams(pool, patient(threads=2)) as streams:
        _, _, leave = streams.active()
        gate = streams.fake.gate
        gate.close()
        runner = streams.worker.wrap(Fake(name="other", gate=gate))
        futures = [pool.submit(r.infer, {"x": x(1)}) for r in (streams.runner, runner)]
        wait_until(lambda: streams.worker.pending == 2)
        leave.set()
        gate.wait_for_call()
        gate.wait_for_call()  # both are at the gate: the second was not left for the first thread to take later
        gate.open()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [2, 2]


# -- cancelling and closing --------------------------------------------------------------------------


def test_cancel_while_waiting(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        scope = CallScope("gone")
        gone = [line.call(scope, x(1)), line.call(scope, x(2))]
        stays = line.call("stays", x(3))
        scope.cancel()
        scope.cancel()
        errors = [f.exception(LONG) for f in gone]  # while the network still runs
        assert not line.first.done() and line.worker.pending == 1
        assert all(isinstance(e, Interrupted) for e in errors) and errors[0] is not errors[1]
        assert isinstance(line.call(scope, x(4)).exception(LONG), Interrupted)
        line.go()
        assert stays.result(LONG)["y"][0, 0] == 6
    assert line.fake.rows() == [[-1], [3]]


def test_cancel_while_running(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        scope = CallScope("gone")
        gone, stays = line.call(scope, x(1)), line.call("stays", x(2))
        line.fake.gate.step()
        assert line.fake.rows()[-1] == [1, 2]
        scope.cancel()
        assert not gone.done(), "the network reads the caller's arrays until the batch has ended"
        line.go()
        assert isinstance(gone.exception(LONG), Interrupted)
        assert stays.result(LONG)["y"][0, 0] == 4


def test_cancel_in_a_batch_that_is_repeated(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        scope = CallScope("gone")
        bad, gone, good = line.call("bad", x(np.nan)), line.call(scope, x(1)), line.call("good", x(2))
        line.fake.gate.step()
        scope.cancel()
        line.go()
        assert isinstance(gone.exception(LONG), Interrupted)
        assert isinstance(bad.exception(LONG), EngineError)
        assert good.result(LONG)["y"][0, 0] == 4
    assert [len(rows) for rows in line.fake.rows()] == [1, 3, 1, 1], "the cancelled one is not run again"


def test_close_while_waiting(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        waiting = [line.call(f"s{i}", x(i)) for i in range(3)]
        closing = [pool.submit(line.worker.close) for _ in range(2)]
        errors = [f.exception(LONG) for f in waiting]  # at once
        assert all(isinstance(e, EngineError) and "closed" in str(e) for e in errors)
        assert len({id(e) for e in errors}) == 3
        assert line.worker.closed and line.worker.pending == 0
        assert not any(c.done() for c in closing), "close() waits for the batch that runs"
        line.go()
        assert line.first.result(LONG)["y"][0, 0] == -2
        for close in closing:
            close.result(LONG)
        with pytest.raises(EngineError, match="worker device is closed"):
            line.runner.infer({"x": x(1)})
        line.runner.close()
        assert line.fake.closes == 1
    assert line.fake.rows() == [[-1]]


def test_closing_a_runner_waits_for_its_batch(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        other = line.worker.wrap(Fake(name="other"))
        waiting, foreign = line.call("a", x(1)), line.call("b", x(2), runner=other)
        closing = pool.submit(line.runner.close)
        assert isinstance(waiting.exception(LONG), EngineError)
        assert not closing.done() and not line.fake.closes
        line.go()
        closing.result(LONG)
        assert line.fake.closes == 1
        assert line.first.result(LONG)["y"][0, 0] == -2 and foreign.result(LONG)["y"][0, 0] == 4


# -- failures ----------------------------------------------------------------------------------------


def test_a_poisonous_call_harms_only_itself(pool: ThreadPoolExecutor) -> None:
    with Line(pool, Fake()) as line:
        line.fake.fails = lambda: TensorError("NaN came", "expected numbers", "")
        futures = [line.call(f"s{i}", x(v)) for i, v in enumerate((0, np.nan, 2, np.nan))]
        line.go()
        assert [futures[i].result(LONG)["y"][0, 0] for i in (0, 2)] == [0, 4]
        errors = [futures[i].exception(LONG) for i in (1, 3)]
    assert all(type(e) is TensorError for e in errors) and errors[0] is not errors[1]
    assert [len(rows) for rows in line.fake.rows()] == [1, 4, 1, 1, 1, 1]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_nothing_ends_the_threads(pool: ThreadPoolExecutor, error: BaseException) -> None:
    with Line(pool, Fake()) as line:
        line.fake.fails = lambda: error
        futures = [line.call("a", x(np.nan)), line.call("b", x(1))]
        line.go()
        caught = futures[0].exception(LONG)
        assert type(caught) is EngineError and caught.__cause__ is error
        assert futures[1].result(LONG)["y"][0, 0] == 2
        assert line.call("c", x(5)).result(LONG)["y"][0, 0] == 10


def test_when_the_last_thread_dies_nobody_waits(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_value))
    with Line(pool, Fake()) as line:
        waiting = line.call("a", x(1))

        def broken(now: float) -> Any:
            raise MemoryError("in the worker's own code")

        monkeypatch.setattr(line.worker, "_next", broken)
        line.go()
        assert line.first.result(LONG)["y"][0, 0] == -2
        assert isinstance(waiting.exception(LONG), EngineError)
        with pytest.raises(EngineError, match="closed"):
            line.runner.infer({"x": x(1)})
        line.worker.close()
    assert [type(e) for e in died] == [MemoryError]


def test_a_call_that_is_interrupted_leaves_the_line(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Line(pool, Fake()) as line:
        real = threading.Event.wait

        def wait(event: threading.Event, timeout: float | None = None) -> bool:
            if threading.current_thread() is threading.main_thread() and timeout is None:
                raise KeyboardInterrupt  # Ctrl-C arrives in the main thread
            return real(event, timeout)

        monkeypatch.setattr(threading.Event, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            line.runner.infer({"x": x(1)})
        assert line.worker.pending == 0
        line.go()
        line.first.result(LONG)
    assert line.fake.rows() == [[-1]]


def test_errors_and_results_keep_nothing_alive() -> None:
    fake = Fake()
    with DeviceWorker(BatchConfig()) as worker:
        runner = worker.wrap(fake)
        gc.collect()
        gc.disable()
        try:
            for value in (1.0, np.nan):
                array = x(value)
                watch = weakref.ref(array)
                try:
                    runner.infer({"x": array})
                except EngineError:
                    assert np.isnan(value)
                fake.calls.clear()
                del array
                wait_until(lambda w=watch: w() is None)
        finally:
            gc.enable()
        assert not worker._streams and not worker._scopes


# -- loans, threads ----------------------------------------------------------------------------------


def test_loans_are_copied_and_never_run_twice_at_once(pool: ThreadPoolExecutor) -> None:
    fake, free = Fake(lends=True), Fake(name="free")
    with DeviceWorker(BatchConfig(threads=4, max_batch=2)) as worker:
        runner, other = worker.wrap(fake), worker.wrap(free)
        assert not runner.loans
        fake.gate.close()
        futures = [pool.submit(runner.infer, {"x": x(i)}) for i in range(7)]
        fake.gate.wait_for_call()
        wait_until(lambda: 5 <= worker.pending <= 6)
        assert other.infer({"x": x(1)})["y"][0, 0] == 2, "the other threads are free"
        fake.gate.open()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [2 * i for i in range(7)]
    assert fake.most == 1 and len(fake.calls) < 7


def test_several_batches_run_at_once(pool: ThreadPoolExecutor) -> None:
    fake = Fake()
    with DeviceWorker(BatchConfig(threads=3, max_batch=1)) as worker:
        runner = worker.wrap(fake)
        fake.gate.close()
        futures = [pool.submit(runner.infer, {"x": x(i)}) for i in range(5)]
        for _ in range(3):
            fake.gate.wait_for_call()
        wait_until(lambda: worker.pending == 2)
        assert fake.inside == 3
        fake.gate.open()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [2 * i for i in range(5)]
    assert fake.most == 3


def test_threads_share_the_calls(pool: ThreadPoolExecutor) -> None:
    """One that took all would let the other serve the same few streams over and over."""
    fake = Fake()
    with DeviceWorker(BatchConfig(threads=2)) as worker:
        runner = worker.wrap(fake)
        fake.gate.close()
        futures = [pool.submit(runner.infer, {"x": x(i)}) for i in range(2)]
        fake.gate.wait_for_call()
        fake.gate.wait_for_call()
        for i in range(2, 9):
            futures.append(pool.submit(runner.infer, {"x": x(i)}))
            wait_until(lambda i=i: worker.pending == i - 1)
        fake.gate.step()
        assert fake.rows()[2:] == [[2, 3, 4, 5]]  # 7 wait and 1 runs
        fake.gate.open()
        assert [f.result(LONG)["y"][0, 0] for f in futures] == [2 * i for i in range(9)]


# -- results that stay on the device -------------------------------------------------------------------


class Resident(Fake):
    """Keeps results on a (fake) device; they count as written when they are let through ``landing``."""

    resident = True

    def __init__(self, cuda: Cuda, *specs: Any, most: int | None = None, **options: Any) -> None:
        super().__init__(*specs, **options)
        self.cuda, self.landing, self.joined = cuda, Gate(), 0
        self.largest, self.lost = most, False

    @property
    def max_batch(self) -> int | None:
        return self.largest

    def _stage(self, array: Array) -> Array:
        return array

    def upload(self, array: np.ndarray) -> Array:
        return upload(self.cuda, array)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        self.joined += 1
        return concatenate(self.cuda, arrays, self.cuda.transfer_stream())

    def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        stream, kept = self.cuda.transfer_stream(), {}
        for name, value in self._infer(feeds, outputs).items():
            made = upload(self.cuda, np.asarray(value))
            made.read_on(stream)
            ready = stream.record()
            landed = ready.synchronize

            def late(landed: Callable[[], None] = landed) -> None:
                self.landing.pass_through()
                if self.lost:
                    raise EngineError("the device is lost", "", "")
                landed()

            ready.synchronize = late  # type: ignore[method-assign]
            kept[name] = DeviceArray(made.buffer, made.shape, made.dtype, stream, ready=ready)
        return kept


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with FakeCuda() as fake, open_cuda(runtime=fake) as opened:
        yield opened
    gc.collect()


def numbers(future: Future[dict[str, Any]]) -> list[float]:
    """First numbers of the rows of y."""
    return [float(value) for value in fetch(future.result(LONG)["y"])()[:, 0]]


def test_a_wrapped_runner_keeps_what_the_runner_keeps(cuda: Cuda) -> None:
    with DeviceWorker(BatchConfig()) as worker:
        plain, kept = worker.wrap(Fake()), worker.wrap(Resident(cuda, most=5))
        assert (plain.resident, plain.max_batch, kept.resident, kept.max_batch) == (False, None, True, 5)
        host = x(1)
        assert plain.upload(host) is host and plain.concatenate([host]) is host
        there = kept.upload(host)
        assert isinstance(there, DeviceArray) and isinstance(kept.concatenate([there, host]), DeviceArray)
        assert isinstance(kept.infer({"x": host}, keep=True)["y"], DeviceArray)
        for runner in (plain, kept):
            assert isinstance(runner.infer({"x": host})["y"], np.ndarray)
        assert isinstance(plain.infer({"x": host}, keep=True)["y"], np.ndarray)


def test_portraits_on_the_device_become_one_batch(pool: ThreadPoolExecutor, cuda: Cuda) -> None:
    """Features of each portrait stay, keypoints come from the host; nobody's result keeps another's alive."""
    with Line(pool, Fake()) as line:
        resident = Resident(cuda, SPREAD)
        runner = line.worker.wrap(resident)
        one, two = runner.upload(x(100)), runner.upload(x(200))
        more = runner.upload(x(0))
        futures = [
            line.call("a", x(0), runner=runner, source=one, more=more, keep=True),
            line.call("b", x(1, 2), runner=runner, source=two, more=more, keep=True),
            line.call("c", runner.upload(x(2)), runner=runner, source=one, more=x(0), keep=True),
            line.call("d", x(3), runner=runner, source=one, more=more),  # brought to the host: not with them
        ]
        line.go()
        assert [numbers(future) for future in futures] == [[100], [202, 202], [104], [106]]
        assert resident.rows() == [[0, 1, 1, 2], [3]] and resident.joined == 3
        kept = resident.calls[0]
        assert all(isinstance(kept[name], DeviceArray) for name in ("x", "source", "more"))
        results = [future.result()["y"] for future in futures]
        assert [array.buffer.nbytes for array in results[:3]] == [8, 16, 8]
        assert isinstance(results[3], np.ndarray)
        same = [line.call(f"s{i}", x(i), runner=runner, source=one, more=more, keep=True) for i in range(2)]
        assert [numbers(future) for future in same] == [[100], [102]]
        resident.calls.clear()
        del kept, results, futures, same, one, two, more


def test_one_portrait_is_passed_once(pool: ThreadPoolExecutor, cuda: Cuda) -> None:
    with Line(pool, Fake()) as line:
        resident = Resident(cuda, SPREAD)
        runner = line.worker.wrap(resident)
        source, more = runner.upload(x(100)), runner.upload(x(0))
        futures = [
            line.call(f"s{i}", x(i), runner=runner, source=source, more=more, keep=True) for i in range(3)
        ]
        line.go()
        assert [numbers(future) for future in futures] == [[100], [102], [104]]
        assert resident.calls[0]["source"] is source and resident.joined == 0
        resident.calls.clear()
        del source, more, futures


def test_a_batch_is_no_larger_than_the_runner_takes(pool: ThreadPoolExecutor, cuda: Cuda) -> None:
    with Line(pool, Fake()) as line:
        resident = Resident(cuda, most=3)
        runner = line.worker.wrap(resident)
        futures = [line.call(f"s{i}", x(i), runner=runner) for i in range(7)]
        line.go()
        assert [numbers(future) for future in futures] == [[2 * i] for i in range(7)]
    assert resident.rows() == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_batch_that_fails_runs_one_by_one_and_stays_there(
    pool: ThreadPoolExecutor, cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    with Line(pool, Fake()) as line:
        runner = line.worker.wrap(Resident(cuda))
        futures = [
            line.call(f"s{i}", x(value), runner=runner, keep=True) for i, value in enumerate((1, np.nan, 3))
        ]
        line.go()
        with pytest.raises(EngineError, match="NaN came"):
            futures[1].result(LONG)
        assert [numbers(futures[0]), numbers(futures[2])] == [[2], [6]]
        assert all(isinstance(futures[i].result()["y"], DeviceArray) for i in (0, 2))
        del futures


def test_a_batch_on_the_device_gathers_the_next(pool: ThreadPoolExecutor, cuda: Cuda) -> None:
    """Results are handed out at once; what comes meanwhile becomes one batch, unless it is full or nobody can join."""
    with DeviceWorker(BatchConfig(max_batch=3)) as worker:
        resident, other = Resident(cuda), Fake(name="other")
        runner, free = worker.wrap(resident), worker.wrap(other)
        scopes = [CallScope(i) for i in range(5)]

        def call(i: int) -> Future[dict[str, Any]]:
            def work() -> dict[str, Any]:
                with worker.scope(scopes[i]):
                    return runner.infer({"x": x(i)}, keep=True)

            return pool.submit(work)

        resident.landing.close()
        with worker.scope(scopes[0]), worker.scope(scopes[4]):
            first = call(0)
            assert isinstance(first.result(LONG)["y"], DeviceArray)  # before it is written
            resident.landing.wait_for_call()
            second = [call(1)]
            wait_until(lambda: worker.pending == 1)
            assert free.infer({"x": x(5)})["y"][0, 0] == 10  # another network is not held up
            assert worker.pending == 1 and len(resident.calls) == 1
            second.append(call(2))
            wait_until(lambda: worker.pending == 2)
            assert len(resident.calls) == 1
            second.append(call(3))  # now it is full
            wait_until(lambda: len(resident.calls) == 2)
            third = [call(i) for i in (0, 1, 2)]  # full as well, but two are there
            wait_until(lambda: worker.pending == 3)
            time.sleep(0.01)
            assert len(resident.calls) == 2
            resident.landing.step()
            wait_until(lambda: len(resident.calls) == 3)
            resident.landing.open()
        values = [fetch(future.result(LONG)["y"]) for future in (first, *second, *third)]
        assert [float(wait()[0, 0]) for wait in values] == [0, 2, 4, 6, 0, 2, 4]
        del values, first, second, third
    assert [len(rows) for rows in resident.rows()] == [1, 3, 3]


@pytest.mark.parametrize("max_wait_s", [0.0, 0.001])
def test_waiting_for_the_device_takes_no_time_of_the_cpu(
    pool: ThreadPoolExecutor, cuda: Cuda, max_wait_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DeviceWorker(BatchConfig(max_wait_s=max_wait_s)) as worker:
        resident, looks = Resident(cuda), []
        runner, working = worker.wrap(resident), worker._next
        resident.landing.close()
        with worker.scope(CallScope("might join")):
            first = pool.submit(runner.infer, {"x": x(1)}, keep=True)
            resident.landing.wait_for_call()
            monkeypatch.setattr(worker, "_next", lambda now: (looks.append(now), working(now))[1])
            second = pool.submit(runner.infer, {"x": x(2)}, keep=True)
            wait_until(lambda: worker.pending == 1)
            time.sleep(0.05)
            assert len(looks) < 10 and len(resident.calls) == 1
            resident.landing.open()
            assert [numbers(first), numbers(second)] == [[2], [4]]
        del first, second


def test_a_stream_that_is_alone_is_one_ahead(pool: ThreadPoolExecutor, cuda: Cuda) -> None:
    with DeviceWorker(BatchConfig()) as worker:
        resident = Resident(cuda)
        runner = worker.wrap(resident)
        resident.landing.close()
        arrays = [runner.infer({"x": x(i)}, keep=True)["y"] for i in range(2)]
        third = pool.submit(runner.infer, {"x": x(2)}, keep=True)
        wait_until(lambda: worker.pending == 1)
        assert len(resident.calls) == 2
        resident.landing.open()
        assert numbers(third) == [4] and [float(fetch(a)()[0, 0]) for a in arrays] == [0, 2]
        del arrays, third


@pytest.mark.parametrize("which", ["runner", "worker"])
def test_closing_waits_for_the_device(pool: ThreadPoolExecutor, cuda: Cuda, which: str) -> None:
    resident = Resident(cuda)
    with DeviceWorker(BatchConfig()) as worker:
        runner = worker.wrap(resident)
        resident.landing.close()
        result = runner.infer({"x": x(1)}, keep=True)
        resident.landing.wait_for_call()
        closing = pool.submit(runner.close if which == "runner" else worker.close)
        time.sleep(0.02)
        assert not closing.done() and not resident.closes
        resident.landing.open()
        closing.result(LONG)
        assert resident.closes == (which == "runner")
        assert float(fetch(result["y"])()[0, 0]) == 2
        del result


def test_a_lost_device_holds_nobody_up(cuda: Cuda) -> None:
    with DeviceWorker(BatchConfig()) as worker:
        resident = Resident(cuda)
        runner = worker.wrap(resident)
        resident.lost = True
        for i in range(5):
            runner.infer({"x": x(i)}, keep=True)
        assert len(resident.calls) == 5


def test_the_observer_hears_when_results_are_written(cuda: Cuda) -> None:
    notes = Notes()
    with DeviceWorker(BatchConfig(), observer=notes) as worker:
        resident = Resident(cuda)
        runner = worker.wrap(resident)
        resident.landing.close()
        runner.infer({"x": x(1)}, keep=True)
        resident.landing.wait_for_call()
        assert not notes.notes
        time.sleep(0.02)
        resident.landing.open()
    assert [note[:3] for note in notes.notes] == [("net", 1, 1)] and notes.notes[0][4] >= 0.02


def test_results_on_the_device_are_not_kept_alive(cuda: Cuda) -> None:
    with DeviceWorker(BatchConfig()) as worker:
        runner = worker.wrap(Resident(cuda))
        array = runner.infer({"x": x(1)}, keep=True)["y"]
        seen = weakref.ref(array)
        del array
        wait_until(lambda: gc.collect() >= 0 and seen() is None)


class Notes:
    """An observer."""

    def __init__(self, fails: bool = False) -> None:
        self.notes: list[tuple[str, int, int, float, float]] = []
        self.fails = fails

    def batch(self, network: str, size: int, rows: int, waited_s: float, ran_s: float) -> None:
        self.notes.append((network, size, rows, waited_s, ran_s))
        if self.fails:
            raise ValueError("metrics are broken")


@pytest.mark.parametrize("fails", [False, True])
def test_observer(pool: ThreadPoolExecutor, fails: bool) -> None:
    notes = Notes(fails)
    fake = Fake()
    with DeviceWorker(BatchConfig(), observer=notes) as worker:
        runner = worker.wrap(fake)
        fake.gate.close()
        first = pool.submit(runner.infer, {"x": x(1)})
        fake.gate.wait_for_call()
        more = [pool.submit(runner.infer, {"x": x(1, 3)}) for _ in range(2)]
        wait_until(lambda: worker.pending == 2)
        time.sleep(0.02)
        fake.gate.open()
        for future in (first, *more):
            future.result(LONG)
    assert [n[:3] for n in notes.notes] == [("net", 1, 1), ("net", 2, 6)]
    assert notes.notes[0][4] >= 0.02 and notes.notes[1][3] >= 0.02


@pytest.mark.parametrize(
    "config",
    [
        BatchConfig(),
        BatchConfig(max_batch=3, threads=3),
        BatchConfig(max_batch=16, max_wait_s=0.0005, threads=2),
    ],
)
def test_many_threads(config: BatchConfig) -> None:
    """16 streams, two networks, cancellations and poison; every answer is right, and nothing is left."""
    plain, spread = Fake(), Fake(SPREAD, lends=True, name="spread")
    wrong: list[str] = []

    def stream(number: int, worker: DeviceWorker, runner: Runner, other: Runner) -> None:
        rng = np.random.default_rng(number)
        source = x(1000 * number)
        for i in range(200):
            rows, value = int(rng.integers(1, 4)), float(rng.integers(0, 1000))
            array = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) + value
            expected, kind = 2 * array, rng.integers(0, 20)
            scope = CallScope(number)
            with worker.scope(scope):
                try:
                    if kind == 0:
                        array[0, 0] = np.nan
                    if kind == 1:
                        scope.cancel()
                    if i % 2:
                        got = runner.infer({"x": array})["y"]
                    else:
                        expected = expected + 2 * source
                        got = other.infer({"x": array, "source": source, "more": source})["y"]
                except EngineError:
                    ok = kind == 0
                except Interrupted:
                    ok = kind == 1
                else:
                    ok = kind > 1 and np.array_equal(got, expected)
            if not ok:
                wrong.append(f"stream {number}, call {i}, kind {kind}")

    with DeviceWorker(config) as worker:
        runner, other = worker.wrap(plain), worker.wrap(spread)
        threads = [
            threading.Thread(target=stream, args=(number, worker, runner, other)) for number in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5 * LONG)
            assert not thread.is_alive()
        assert not wrong
        assert worker.pending == 0
        wait_until(lambda: not worker._streams)
        assert not worker._scopes
    assert spread.most == 1
