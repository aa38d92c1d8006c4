"""TensorRT engines from the cache to the result, on a fake TensorRT and a fake CUDA device of every generation."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from lp_edge.engines import (
    BackendConfig,
    names,
    open_bundle,
    open_runner,
    tensorrt,
    trt_build,
    trt_cache,
    trt_graph,
)
from lp_edge.engines import cuda as cuda_module
from lp_edge.engines.backends import BACKENDS
from lp_edge.engines.bundle import EngineKey, key_json
from lp_edge.engines.cuda import Cuda, open_cuda
from lp_edge.engines.device import DeviceArray, concatenate
from lp_edge.engines.runner import fetch
from lp_edge.engines.tensorrt import TensorRtConfig, TensorRtRunner, build_bundle_engines, open_engine
from lp_edge.engines.trt_cache import EngineCache, cache_folders
from lp_edge.errors import (
    BackendUnavailable,
    BundleError,
    ConfigError,
    EngineError,
    Interrupted,
    LimitError,
    OutputError,
    TensorError,
)
from lp_edge.tests.engines.test_tensorrt_build import half_model, quantised_model
from lp_edge.tests.fake_cuda.arrays import to_device
from lp_edge.tests.fake_cuda.device import H200, ORIN, FakeCuda
from lp_edge.tests.fake_tensorrt.module import VERSIONS, World, make_tensorrt

WARP = "warp_decode.onnx"
CONFIG = TensorRtConfig(max_batch=4, axes={"H": (4, 8, 64), "W": (4, 8, 64)})


class Place:
    """A machine with a version of TensorRT, and a folder for engines."""

    def __init__(self, version: str, folder: Path, device: FakeCuda) -> None:
        self.world = World(device)
        self.trt = make_tensorrt(version, self.world)
        self.version, self.folder = version, folder
        self.cuda: Cuda = open_cuda(runtime=device)

    def open(self, model: Path | bytes, **options: Any) -> TensorRtRunner:
        options.setdefault("cache_dir", self.folder)
        options.setdefault("config", CONFIG)
        return open_engine(model, cuda=self.cuda, trt=self.trt, **options)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Makes places; at the end nothing may be left on their devices, and nothing may have been done wrong."""
    made: list[Place] = []

    def make(version: str = "10.3", device: Any = H200) -> Place:
        made.append(Place(version, tmp_path / "cache", FakeCuda(device)))
        return made[-1]

    yield make
    for place in made:
        place.cuda.close()
        place.world.verify()


@pytest.fixture(params=list(VERSIONS))
def place(request: pytest.FixtureRequest, places: Callable[..., Place]) -> Place:
    return places(request.param)


def feeds(dx: float, n: int = 1, side: int = 8) -> dict[str, np.ndarray]:
    driving = np.zeros((n, 478, 3), np.float32)
    driving[..., 0] = dx
    return {
        names.SOURCE_IMAGE: np.zeros((1, side, side, 3), np.uint8),
        names.KP_SOURCE: np.zeros((n, 478, 3), np.float32),
        names.KP_DRIVING: driving,
    }


def red(results: dict[str, Any]) -> set[int]:
    return set(np.unique(np.asarray(results[names.IMAGE])[..., 0]).tolist())


# -- results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ["face_detector", "face_mesh", "warp_decode", "liveportrait/motion_extractor",
                                 "liveportrait/warp_decode", "liveportrait/stitching"])  # fmt: skip
def test_parity_with_onnx_runtime(place: Place, toys: Path, toy: str) -> None:
    path = toys / f"{toy}.onnx"
    rng = np.random.default_rng(5)
    with place.open(path) as runner, open_runner(path, BackendConfig("cpu")) as reference:
        assert dict(runner.inputs) == dict(reference.inputs) and set(runner.outputs) == set(reference.outputs)
        assert (runner.backend, runner.device, runner.name) == ("tensorrt", "NVIDIA H200", path.stem)
        for batch in (1, 3, 1, 1, 3):
            sizes = {"N": batch, "batch": batch, "S": 1, "sources": 1, "H": 16, "W": 24}
            data = {
                name: rng.integers(0, 256, [sizes.get(a, a) for a in spec.shape]).astype(spec.dtype)
                for name, spec in runner.inputs.items()
            }
            got, wanted = runner.infer(data), reference.infer(data)
            for name, value in wanted.items():
                np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(value))


def test_half_precision_and_a_result_without_a_shape(place: Place) -> None:
    model = half_model()
    config = TensorRtConfig(max_batch=4, axes={"K": (1, 2, 3)})
    rng = np.random.default_rng(6)
    with place.open(model, config=config) as runner, open_runner(model, BackendConfig("cpu")) as reference:
        assert [str(spec) for spec in runner.outputs.values()] == [
            "y float32 [batch, K, 4]", "picks float32 [?0, ?1, 4]"
        ]  # fmt: skip
        data = {
            "x": rng.integers(0, 3, (2, 4)).astype(np.uint8), "z": rng.normal(size=(2, 3, 4)).astype(np.float32)
        }  # fmt: skip
        got, wanted = runner.infer(data), reference.infer(data)
        for name, value in wanted.items():
            np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(value))


def test_bundles_accept_what_the_engine_says(place: Place, toy_bundle: Path) -> None:
    bundle = open_bundle(toy_bundle)
    for name, entry in bundle.manifest.networks.items():
        with place.open(bundle.path_of(name)) as runner:
            bundle._compare(f"input of {name}", runner.inputs, entry.inputs)
            bundle._compare(f"output of {name}", runner.outputs, entry.outputs)


def test_results_belong_to_the_caller(place: Place, toys: Path) -> None:
    with place.open(toys / WARP) as runner:
        assert not runner.loans
        first = runner.infer(feeds(5))
        runner.infer(feeds(9))
        assert red(first) == {5}
        only = runner.infer(feeds(7), [names.IMAGE])
        assert list(only) == [names.IMAGE] and red(only) == {7}


def test_repeated_launches_are_recorded_once_for_each_shape(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    with place.open(toys / WARP) as runner:
        for n in (2, 2, 2, 1, 1, 1, 2, 1):
            assert red(runner.infer(feeds(n, n))) == {n}
    world = place.world
    assert (world.launches, world.captured) == (2, 2) and world.cuda.count("cudaGraphLaunch") == 6
    assert world.contexts == 2


def test_8_5_has_one_context_and_records_the_shape_in_use(places: Callable[..., Place], toys: Path) -> None:
    place = places("8.5")
    with place.open(toys / WARP) as runner:
        for n in (1, 1, 1, 2, 2, 2, 1):
            assert red(runner.infer(feeds(n, n))) == {n}
    assert place.world.contexts == 1 and (place.world.launches, place.world.captured) == (3, 2)


def test_more_shapes_than_contexts(places: Callable[..., Place], toys: Path) -> None:
    place = places("11.4")
    with place.open(toys / WARP) as runner:
        for _ in range(3):
            for side in range(4, 16):
                assert red(runner.infer(feeds(side, side=side))) == {side}
    assert place.world.contexts == 8


def test_without_recording(place: Place, toys: Path) -> None:
    with place.open(toys / WARP, config=TensorRtConfig(4, axes=CONFIG.axes, cuda_graphs=False)) as runner:
        for n in range(4):
            assert red(runner.infer(feeds(n))) == {n}
    assert place.world.launches == 4 and place.world.captured == 0


def test_what_cannot_be_recorded_runs_plainly(
    place: Place, toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.world.uncapturable = True
    with caplog.at_level(logging.INFO, "lp_edge"), place.open(toys / WARP) as runner:
        for n in range(4):
            assert red(runner.infer(feeds(n))) == {n}
    assert place.world.launches == 4
    told = [r.getMessage() for r in caplog.records if "runs without CUDA graphs" in r.getMessage()]
    assert len(told) == 1 and "not permitted when stream is capturing" in told[0]


def test_threads(place: Place, toys: Path) -> None:
    wrong: list[object] = []

    def work(runner: TensorRtRunner, value: int) -> None:
        try:
            for _ in range(6):
                if (got := red(runner.infer(feeds(value, 1 + value % 2)))) != {value}:
                    wrong.append((value, got))
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            wrong.append(error)

    with place.open(toys / WARP) as runner:
        threads = [threading.Thread(target=work, args=(runner, 10 + i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert wrong == []


def test_a_record_holds_only_the_memory_of_its_own_call(
    place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another call's memory grows and is given back, after which a record that holds it could not be launched."""
    kind = place.trt.IExecutionContext
    working = kind.execute_async_v3
    others: list[threading.Thread] = []

    with place.open(toys / WARP) as runner:

        def meddled(self: Any, stream: int) -> bool:
            if getattr(runner._cuda._here, "capturing", False) and not others:
                others.append(threading.Thread(target=runner.infer, args=(feeds(2),)))
                others[0].start()
                time.sleep(0.2)  # the other call uploads, and waits for this one
            return working(self, stream)

        monkeypatch.setattr(kind, "execute_async_v3", meddled)
        for _ in range(3):
            assert red(runner.infer(feeds(1))) == {1}
        assert others
        others[0].join(30)
        graphs = [lane.graph for lane in runner._lanes if lane.graph is not None]
        assert graphs and not any(graph._buffers for graph in graphs)


def test_launches_of_two_threads_do_not_overlap(
    place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts share their scratch memory, and a recording must not catch another thread's launch."""
    kind = place.trt.IExecutionContext
    working, pause = kind.execute_async_v3, threading.Event()
    inside: list[object] = []
    most = 0

    def slow(self: Any, stream: int) -> bool:
        nonlocal most
        inside.append(self)
        most = max(most, len(inside))
        pause.wait(0.05)
        try:
            return working(self, stream)
        finally:
            inside.pop()

    monkeypatch.setattr(kind, "execute_async_v3", slow)
    with place.open(toys / WARP, config=TensorRtConfig(4, axes=CONFIG.axes, cuda_graphs=False)) as runner:
        threads = [threading.Thread(target=runner.infer, args=(feeds(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert most == 1 and place.world.launches == 4


def test_a_jetson_copies_nothing(places: Callable[..., Place], toys: Path) -> None:
    place = places("8.5", ORIN)
    with place.open(toys / WARP) as runner:
        for n in (1, 2, 2, 2):
            assert red(runner.infer(feeds(n, n))) == {n}
    assert place.world.cuda.count("cudaMemcpyAsync") == 0
    # Host and device share the memory, so tactics may not take all of it.
    free = place.world.builds[0].settings["WORKSPACE"]
    assert 0.4 * ORIN.memory < free <= 0.5 * ORIN.memory


# -- arrays on the device ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", [H200, ORIN])
def test_arrays_on_the_device_are_read_where_they_are(
    places: Callable[..., Place], toys: Path, device: Any
) -> None:
    place = places("10.3", device)
    with place.open(toys / WARP) as runner, place.cuda.stream() as stream:
        kept = {name: to_device(place.cuda, array, stream) for name, array in feeds(6, 2).items()}
        before = place.world.cuda.count("cudaMemcpyAsync")
        for _ in range(4):
            assert red(runner.infer(kept, [names.IMAGE])) == {6}
        copies = place.world.cuda.count("cudaMemcpyAsync") - before
        assert copies == (0 if device is ORIN else 4)  # the results
        del kept


def test_arrays_that_are_not_aligned_are_copied(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    with place.open(toys / WARP) as runner, place.cuda.stream() as stream:
        several = np.stack([np.full((478, 3), v, np.float32) for v in (0, 3, 8)])
        device = to_device(place.cuda, several, stream)
        data: dict[str, Any] = feeds(0)
        for row, value in ((1, 3), (2, 8), (1, 3)):
            data[names.KP_DRIVING] = device.rows(row, row + 1)
            assert data[names.KP_DRIVING].pointer % 256
            assert red(runner.infer(data)) == {value}
        del device, data


@pytest.mark.parametrize("device", [H200, ORIN])
def test_results_on_the_device(places: Callable[..., Place], toys: Path, device: Any) -> None:
    place = places("11.4", device)
    with place.open(toys / WARP) as runner:
        assert runner.resident and not runner.loans
        results = [runner.infer(feeds(value), keep=True) for value in (1, 2, 3, 4, 5)]
        assert all(isinstance(array, DeviceArray) for array in results[0].values())
        assert [red(result) for result in results] == [{1}, {2}, {3}, {4}, {5}]  # none was overwritten
        del results


def test_calls_of_both_kinds_from_several_threads(place: Place, toys: Path) -> None:
    wrong: list[object] = []

    def work(runner: TensorRtRunner, value: int) -> None:
        try:
            waiting: list[tuple[set[int], Callable[[], np.ndarray]]] = []
            for turn in range(8):
                value = (value * 7 + turn) % 200
                got = runner.infer(feeds(value, 1 + value % 2), [names.IMAGE], keep=turn % 3 != 2)
                waiting.append(({value}, fetch(got[names.IMAGE])))
                if turn % 2:
                    wrong.extend(
                        (wanted, told)
                        for wanted, wait in waiting
                        if (told := set(wait()[..., 0].flat)) != wanted
                    )
                    waiting.clear()
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            wrong.append(error)

    with place.open(toys / WARP) as runner:
        threads = [threading.Thread(target=work, args=(runner, 10 + i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert wrong == []


def test_results_that_stay_are_written_where_they_are(place: Place, toys: Path) -> None:
    """Without a copy, and by a recorded graph as soon as memory comes back."""
    with place.open(toys / WARP) as runner:
        kinds = []
        for value in range(20):
            before = len(place.world.cuda.calls)
            image = runner.infer(feeds(value), [names.IMAGE], keep=True)[names.IMAGE]
            kinds.append([
                call.inputs[3] for call in place.world.cuda.calls[before:] if call.name == "cudaMemcpyAsync"
            ])  # fmt: skip
            assert set(fetch(image)()[..., 0].flat) == {value}
            del image
    assert kinds == [[1, 1, 1]] * 20  # the three inputs, upwards
    assert place.world.captured <= 4 and place.world.cuda.count("cudaGraphLaunch") >= 12


def test_a_replay_waits_for_who_reads_the_memory(places: Callable[..., Place], toys: Path) -> None:
    """The caller drops a result that others still read; the graph writes there again."""
    place = places("10.3")
    with place.open(toys / WARP) as runner, place.cuda.stream() as other:
        copies: list[DeviceArray] = []
        for value in range(20):
            image = runner.infer(feeds(value), [names.IMAGE], keep=True)[names.IMAGE]
            copies.append(concatenate(place.cuda, [image, image], other))
            if value < 16:  # from then on nobody waits for anything
                copies[-1].synchronize()
                replayed = place.world.cuda.count("cudaGraphLaunch")
            del image
        assert place.world.cuda.count("cudaGraphLaunch") > replayed
        assert [set(np.asarray(copy)[..., 0].flat) for copy in copies] == [{value} for value in range(20)]
        del copies


@pytest.mark.parametrize(("held", "recorded"), [(3, True), (20, False)])
def test_results_that_are_held(places: Callable[..., Place], toys: Path, held: int, recorded: bool) -> None:
    """A few in flight come round to the memory that was recorded; many are launched plainly, and nothing is recorded in vain."""
    place = places("10.3")
    with place.open(toys / WARP) as runner:
        queue: list[tuple[int, Any]] = []
        for value in range(60):
            queue.append((value, runner.infer(feeds(value), [names.IMAGE], keep=True)[names.IMAGE]))
            if len(queue) > held:
                value, image = queue.pop(0)
                assert set(np.asarray(image)[..., 0].flat) == {value}
                del image
        assert place.world.contexts <= 8
        if recorded:
            assert place.world.cuda.count("cudaGraphLaunch") > 30
        else:
            assert place.world.captured <= 8
        for value, image in queue:
            assert set(np.asarray(image)[..., 0].flat) == {value}
        del queue, image


def test_a_record_that_still_runs_is_not_changed(places: Callable[..., Place], toys: Path) -> None:
    """On 8.5 a network has one context: another size takes the place of the recorded launch, which may be under way."""
    place = places("8.5")
    with place.open(toys / WARP) as runner:
        results = []
        for value in (1, 2, 3, 4, 5, 6, 7, 8):
            results.append(runner.infer(feeds(value, 1 + value // 8), [names.IMAGE], keep=True))
            if value < 6:
                assert red(results.pop()) == {value}
                place.cuda.runtime("cudaDeviceSynchronize")
        assert place.world.captured and [red(result) for result in results] == [{6}, {7}, {8}]
        del results


def test_a_download_waits_for_its_own_call_alone(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    with place.open(toys / WARP) as runner:
        first = runner.infer(feeds(1), [names.IMAGE], keep=True)
        later = [runner.infer(feeds(value), [names.IMAGE], keep=True) for value in (2, 3, 4)]
        queued = [work.label for work in place.world.cuda._pending()].count("TensorRT")
        assert queued == 4  # each call's upload waits for nothing but the one before of its slot
        assert set(fetch(first[names.IMAGE])()[..., 0].flat) == {1}
        assert [work.label for work in place.world.cuda._pending()].count("TensorRT") >= 2
        assert [red(result) for result in later] == [{2}, {3}, {4}]
        del first, later


def test_results_outlive_their_runner(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    with place.open(toys / WARP) as runner:
        results = runner.infer(feeds(3), keep=True)
    with place.open(toys / WARP) as second:
        assert red(second.infer(feeds(9))) == {9}
        assert red(results) == {3} and fetch(results[names.IMAGE])().max() == 3
        data: dict[str, Any] = {**feeds(4), names.SOURCE_IMAGE: results[names.IMAGE]}
        assert red(second.infer(data)) == {7}
    del results, data


@pytest.mark.parametrize("device", [H200, ORIN])
def test_portraits_that_stay(places: Callable[..., Place], toys: Path, device: Any) -> None:
    """What the server does: pictures on the device for good, of several portraits laid together for a call."""
    place = places("10.3", device)
    with place.open(toys / WARP) as runner:
        portraits = []
        for value in (10, 20, 30):
            pixels = np.full((1, 8, 8, 3), value, np.uint8)
            portraits.append(runner.upload(pixels))
            pixels[:] = 0
        for dx in (1, 2, 3, 4):
            data: dict[str, Any] = {**feeds(dx, 3), names.SOURCE_IMAGE: runner.concatenate(portraits)}
            image = np.asarray(runner.infer(data, [names.IMAGE], keep=True)[names.IMAGE])
            assert [set(row[..., 0].flat) for row in image] == [{10 + dx}, {20 + dx}, {30 + dx}]
        assert runner.concatenate(portraits[:1]) is portraits[0]
        del portraits, data


def test_the_largest_batch(place: Place, toys: Path) -> None:
    with place.open(toys / WARP) as runner:
        assert runner.max_batch == 4
    with place.open(toys / "liveportrait" / "stitching.onnx", config=TensorRtConfig(max_batch=3)) as runner:
        assert runner.max_batch == 3
    detector = onnx.load(toys / "face_detector.onnx")
    for value in (*detector.graph.input, *detector.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    with place.open(detector.SerializeToString()) as runner:
        assert runner.max_batch is None


def drop_and_write(place: Place, sizes: Sequence[int]) -> list[DeviceArray]:
    """Arrays of these sizes in whatever memory the pool has, written on a stream that waits for nothing."""
    stream = place.cuda.stream()
    return [to_device(place.cuda, np.full(size, 99, np.uint8), stream) for size in sizes]


@pytest.mark.parametrize("warm", [0, 8])
@pytest.mark.parametrize("side", [8, 40])
def test_results_dropped_before_they_are_written(
    places: Callable[..., Place], toys: Path, warm: int, side: int
) -> None:
    """Plain and replayed: their memory must not be given to others yet. The fake tells of the race."""
    place = places("10.3")
    config = TensorRtConfig(max_batch=4, axes=CONFIG.axes, slots=1)
    with place.open(toys / WARP, config=config) as runner:
        for value in range(warm):
            runner.infer(feeds(value, side=side), keep=True)
            place.cuda.runtime("cudaDeviceSynchronize")
            place.cuda.event()  # what was dropped goes back to the pool now, when nothing uses it any more
        launches = place.world.launches
        results = runner.infer(feeds(9, side=side), keep=True)
        assert place.world.launches == launches + (not warm)
        sizes = [array.nbytes for array in results.values()]
        del results
        others = drop_and_write(place, sizes)
        assert all((np.asarray(other) == 99).all() for other in others)
        del others


def test_unwanted_results_that_are_outgrown(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    with place.open(toys / WARP) as runner:
        first = runner.infer(feeds(1, 1), [names.IMAGE], keep=True)
        size = runner._unwanted[names.DEFORMATION]._device.nbytes  # type: ignore[union-attr]
        second = runner.infer(feeds(2, 4), [names.IMAGE], keep=True)
        others = drop_and_write(place, [size])
        assert (red(first), red(second)) == ({1}, {2})
        del first, second, others


def test_inputs_dropped_before_they_are_read(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    with place.open(toys / WARP) as runner:
        data = {name: runner.upload(array) for name, array in feeds(4).items()}
        place.cuda.runtime("cudaDeviceSynchronize")
        sizes = [array.nbytes for array in data.values()]
        result = runner.infer(data, keep=True)
        data.clear()
        others = drop_and_write(place, sizes)
        assert red(result) == {4}
        del result, others


def test_arrays_dropped_while_the_network_runs(places: Callable[..., Place], toys: Path) -> None:
    """Inputs that the caller drops, and results that were outgrown, while the network still runs."""
    place = places("10.3")
    config = TensorRtConfig(max_batch=4, axes=CONFIG.axes, slots=1)
    with (
        place.open(toys / WARP, config=config) as runner,
        place.cuda.stream() as stream,
    ):
        inputs = {name: to_device(place.cuda, array, stream) for name, array in feeds(4).items()}
        sizes = [array.nbytes for array in inputs.values()]
        stream.synchronize()
        first = runner.infer(inputs, [names.IMAGE], keep=True)
        inputs.clear()
        second = runner.infer(feeds(5, 4, side=32), [names.IMAGE], keep=True)  # in larger buffers
        sizes += [128, 192]  # the results of the first call: a deformation, a picture
        others = [to_device(place.cuda, np.full(size, 99, np.uint8), stream) for size in sizes]
        assert (red(first), red(second)) == ({4}, {5})
        assert all((np.asarray(other) == 99).all() for other in others)
        del first, second, others


def test_one_network_feeds_the_next(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    face = toys / "face_mesh.onnx"
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    pixels[:, 10:30, 20:40] = 255
    with (
        open_runner(face, BackendConfig("cpu")) as reference,
        place.open(face) as first,
        place.open(toys / WARP) as second,
    ):
        wanted = np.asarray(reference.infer({names.IMAGE: pixels})[names.POINTS])
        for _ in range(3):
            points = first.infer({names.IMAGE: pixels}, keep=True)[names.POINTS]
            data: dict[str, Any] = {**feeds(0, 2), names.KP_DRIVING: points}
            shift = np.round(wanted[..., 0].mean(1)).astype(int)
            got = np.asarray(second.infer(data)[names.IMAGE])
            assert got[..., 0].reshape(2, -1).max(1).tolist() == shift.tolist()
        del points, data


# -- what goes wrong --------------------------------------------------------------------------------


def test_sizes_beyond_the_profile(place: Place, toys: Path) -> None:
    with place.open(toys / WARP) as runner:
        with pytest.raises(
            TensorError, match=r"kp_source has shape \[5, 478, 3\]; expected one from"
        ) as caught:
            runner.infer(feeds(1, 5))
        assert "max_batch" in caught.value.remedy
        assert red(runner.infer(feeds(1, 4))) == {1}


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (("INTERNAL_ERROR", "Error Code 1: Cask (Cask convolution execution)"), EngineError),
        (("FAILED_ALLOCATION", "Error Code 2: OutOfMemory (no further information)"), LimitError),
    ],
)
def test_a_launch_that_fails(place: Place, toys: Path, said: tuple[str, str], kind: type) -> None:
    with place.open(toys / WARP) as runner:
        runner.infer(feeds(1))
        place.world.enqueue_errors = [said]
        place.world.uncapturable = True
        with pytest.raises(kind, match=r"did not start the network on source_image \[1, 8, 8, 3\]") as caught:
            runner.infer(feeds(2, 2))
        assert said[1] in caught.value.got
        for value in (3, 4):
            assert red(runner.infer(feeds(value))) == {value}


def test_a_failure_on_the_device(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    runner = place.open(toys / WARP)
    place.world.cuda.fail("cudaStreamSynchronize", 700)
    with pytest.raises(EngineError, match="700"):
        runner.infer(feeds(1))
    assert red(runner.infer(feeds(2))) == {2}
    runner.close()


def test_closing_on_a_lost_device(tmp_path: Path, toys: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = Place("10.3", tmp_path, FakeCuda(H200))
    runner = place.open(toys / WARP)
    runner.infer(feeds(1))
    place.world.cuda.break_device()
    with pytest.raises(EngineError, match="700"):
        runner.infer(feeds(1))
    caplog.clear()
    runner.close()
    assert caplog.text.count("warp_decode: closing: ") == 1 and "700" in caplog.text


def test_no_memory_for_a_call(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    with place.open(toys / WARP) as runner:
        place.world.cuda.fail("cudaMalloc", 2)
        with pytest.raises(LimitError, match="cudaMalloc"):
            runner.infer(feeds(1))
        assert red(runner.infer(feeds(2))) == {2}
        for call in ("cudaMalloc", "cudaHostAlloc"):  # of larger buffers than there are
            place.cuda.trim()
            place.world.cuda.fail(call, 2, times=2)
            with pytest.raises(LimitError, match=call):
                runner.infer(feeds(3, 4, side=32))
            place.world.cuda.fail(call, 0)
            assert red(runner.infer(feeds(4))) == {4}
        assert red(runner.infer(feeds(5, 4, side=32))) == {5}


def test_no_memory_for_the_second_input(places: Callable[..., Place], toys: Path) -> None:
    """The upload of the first one was queued: the next call must not write into what it reads."""
    place = places("10.3")
    with place.open(toys / WARP) as runner:
        first, second = feeds(1), feeds(2)
        first[names.SOURCE_IMAGE][:] = 50
        place.world.cuda.fail("cudaMalloc", 2, nth=2, times=2)
        with pytest.raises(LimitError, match="cudaMalloc"):
            runner.infer(first)
        place.world.cuda.fail("cudaMalloc", 0)
        assert red(runner.infer(second)) == {2}


def test_memory_that_tensorrt_does_not_take(places: Callable[..., Place], toys: Path) -> None:
    """What was bound before the refusal must not be taken for what is bound."""
    place = places("10.3")
    kind = place.trt.IExecutionContext
    working = kind.set_tensor_address

    def refuse(self: Any, name: str, address: int) -> bool:
        if name == names.KP_DRIVING:
            del self._addresses[name]
            return False
        return working(self, name, address)

    with place.open(toys / WARP) as runner, place.cuda.stream() as stream:
        one, two = (
            {name: to_device(place.cuda, array, stream) for name, array in feeds(dx).items()} for dx in (1, 2)
        )
        assert red(runner.infer(one)) == {1}
        kind.set_tensor_address = refuse
        with pytest.raises(EngineError, match="does not take the memory of kp_driving"):
            runner.infer(two)
        kind.set_tensor_address = working
        assert red(runner.infer(one)) == {1}
        assert red(runner.infer(two)) == {2}
        del one, two


@pytest.mark.parametrize("call", ["cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaMalloc"])
def test_failures_while_opening_leave_nothing(places: Callable[..., Place], toys: Path, call: str) -> None:
    place = places("10.3")
    place.open(toys / WARP).close()
    place.cuda.trim()
    place.world.cuda.fail(call, 2)
    with pytest.raises(LimitError, match=call):
        place.open(toys / WARP)


def test_no_context(place: Place, toys: Path) -> None:
    place.world.context_error = "Error Code 2: OutOfMemory (no further information)"
    with place.open(toys / WARP) as runner, pytest.raises(LimitError, match="makes no execution context"):
        runner.infer(feeds(1))


def test_outputs_of_unknown_shape(place: Place, toys: Path) -> None:
    with place.open(toys / WARP) as runner:
        place.world.unknown_shapes = True
        with pytest.raises(EngineError, match="does not know the shape of output"):
            runner.infer(feeds(1))


def test_no_gpu_for_tensorrt(place: Place, toys: Path) -> None:
    place.world.gpu = False
    with pytest.raises(BackendUnavailable, match=f"TensorRT {VERSIONS[place.version]} makes no"):
        place.open(toys / WARP)


def test_closing(place: Place, toys: Path) -> None:
    runner = place.open(toys / WARP)
    runner.infer(feeds(1))
    runner.close()
    runner.close()
    with pytest.raises(EngineError, match="closed"):
        runner.infer(feeds(1))
    place.cuda.trim()
    assert place.world.cuda.held == []


def test_closing_waits_for_what_runs(place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = place.trt.IExecutionContext
    working, inside, go = kind.execute_async_v3, threading.Event(), threading.Event()
    said: list[object] = []

    def held(self: Any, stream: int) -> bool:
        inside.set()
        assert go.wait(20)
        return working(self, stream)

    def work(value: int) -> None:
        try:
            said.append(red(runner.infer(feeds(value))))
        except EngineError as error:
            said.append(str(error))

    monkeypatch.setattr(kind, "execute_async_v3", held)
    runner = place.open(toys / WARP, config=TensorRtConfig(4, axes=CONFIG.axes, slots=1))
    first, waiting = (threading.Thread(target=work, args=(value,)) for value in (7, 8))
    closing = threading.Thread(target=runner.close)
    first.start()
    try:
        assert inside.wait(20)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()  # the first call still runs
        waiting.start()
    finally:
        go.set()
    for thread in (first, waiting, closing):
        thread.join(20)
    assert said[0] == {7} or said[1] == {7}
    assert any("closed" in str(words) for words in said)


# -- the cache --------------------------------------------------------------------------------------


def test_an_engine_is_built_once(place: Place, toys: Path) -> None:
    for _ in range(3):
        with place.open(toys / WARP) as runner:
            assert red(runner.infer(feeds(4))) == {4}
    assert len(place.world.builds) == 1
    (entry,) = place.folder.glob("*.json")
    said = json.loads(entry.read_text())
    assert said["key"]["tensorrt"] == VERSIONS[place.version] and said["key"]["gpu"] == "NVIDIA H200"
    assert entry.with_suffix(".engine").stat().st_size == said["size"]
    assert not list(place.folder.glob(".*"))  # nothing unfinished


def test_another_version_builds_again_and_says_why(
    places: Callable[..., Place], toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places("10.3").open(toys / WARP).close()
    later = places("11.4")
    with caplog.at_level(logging.INFO, "lp_edge"):
        later.open(toys / WARP).close()
    assert len(later.world.builds) == 1
    assert "there is one with tensorrt 10.3.0 in place of 11.4.0.106)" in caplog.text
    assert len(list(later.folder.glob("*.engine"))) == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TensorRtConfig(max_batch=2, axes=CONFIG.axes), "profile"),
        (TensorRtConfig(max_batch=4, axes=CONFIG.axes, tf32=True), 'flags ["STRONGLY_TYPED"] in place of'),
    ],
)
def test_other_options_build_again(
    places: Callable[..., Place],
    toys: Path,
    caplog: pytest.LogCaptureFixture,
    config: TensorRtConfig,
    words: str,
) -> None:
    place = places("10.3")
    place.open(toys / WARP).close()
    with caplog.at_level(logging.INFO, "lp_edge"):
        place.open(toys / WARP, config=config).close()
    assert len(place.world.builds) == 2 and f"(there is one with {words}" in caplog.text


def test_another_graph_builds_again(places: Callable[..., Place], toys: Path, tmp_path: Path) -> None:
    place, copy = places("10.3"), tmp_path / WARP
    shutil.copy(toys / WARP, copy)
    place.open(copy).close()
    model = onnx.load(copy)
    model.doc_string = "changed"
    onnx.save(model, copy)
    place.open(copy).close()
    assert len(place.world.builds) == 2


def test_other_weights_beside_build_again(places: Callable[..., Place], toys: Path, tmp_path: Path) -> None:
    place, path = places("10.3"), tmp_path / "mesh.onnx"
    onnx.save(
        onnx.load(toys / "face_mesh.onnx"),
        path,
        save_as_external_data=True,
        location="mesh.data",
        size_threshold=0,
    )
    place.open(path).close()
    place.open(path).close()
    data = bytearray((tmp_path / "mesh.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "mesh.data").write_bytes(data)
    place.open(path).close()
    assert len(place.world.builds) == 2


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "no entry", "bad entry"])
def test_a_damaged_engine_is_built_again(
    place: Place, toys: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    place.open(toys / WARP).close()
    (entry,) = place.folder.glob("*.json")
    engine = entry.with_suffix(".engine")
    data = engine.read_bytes()
    if damage == "cut":
        engine.write_bytes(data[:-5])
    elif damage == "altered":
        engine.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "gone":
        engine.unlink()
    elif damage == "no entry":
        entry.unlink()
    else:
        entry.write_text('{"schema_version": 1')
    with place.open(toys / WARP) as runner:
        assert red(runner.infer(feeds(4))) == {4}
    assert len(place.world.builds) == 2
    assert ("is not taken" in caplog.text) == (damage in ("cut", "altered", "gone"))
    place.open(toys / WARP).close()
    assert len(place.world.builds) == 2


def test_an_engine_that_tensorrt_refuses_is_built_again(
    place: Place, toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.open(toys / WARP).close()
    place.world.load_error = ("INTERNAL_ERROR", "Version tag does not match", 2)  # before and behind the lock
    with place.open(toys / WARP) as runner:
        assert red(runner.infer(feeds(4))) == {4}
    assert len(place.world.builds) == 2
    assert "does not take the engine " in caplog.text and "Version tag" in caplog.text


def test_a_fresh_engine_that_does_not_load(place: Place, toys: Path) -> None:
    place.world.load_error = ("INTERNAL_ERROR", "Magic tag does not match", 9)
    with pytest.raises(EngineError, match=r"does not load the engine that it has just built \(.*Magic tag"):
        place.open(toys / WARP)


def test_no_memory_for_a_kept_engine_builds_nothing(place: Place, toys: Path) -> None:
    place.open(toys / WARP).close()
    place.world.load_error = ("FAILED_ALLOCATION", "Requested amount of GPU memory could not be allocated", 1)
    with pytest.raises(LimitError, match="no memory for its engine"):
        place.open(toys / WARP)
    assert len(place.world.builds) == 1


def test_an_interrupted_build_leaves_nothing(place: Place, toys: Path) -> None:
    stop = threading.Event()
    place.world.during_build = stop.set
    with pytest.raises(Interrupted):
        place.open(toys / WARP, cancelled=stop.is_set)
    assert not list(place.folder.glob("*.engine")) and not list(place.folder.glob("*.json"))


def test_the_timing_cache_is_kept(place: Place, toys: Path) -> None:
    place.open(toys / WARP).close()
    for path in place.folder.glob("warp*"):
        path.unlink()
    place.open(toys / WARP).close()
    assert [record.timed > 0 for record in place.world.builds] == [True, False]


def test_two_processes_build_one_engine(place: Place, toys: Path) -> None:
    """The second waits for the lock and then finds the engine."""
    second = Place(place.version, place.folder, FakeCuda(H200))
    began, go, results = threading.Event(), threading.Event(), []

    def hold() -> None:
        began.set()
        assert go.wait(20)

    place.world.during_build = hold
    first = threading.Thread(target=lambda: results.append(place.open(toys / WARP)))
    first.start()
    try:
        assert began.wait(20)
        with pytest.raises(Interrupted, match="another process builds"):
            second.open(toys / WARP, cancelled=lambda: True)
        waiter = threading.Thread(target=lambda: results.append(second.open(toys / WARP)))
        waiter.start()
    finally:
        go.set()
        first.join(20)
    waiter.join(20)
    for runner in results:
        runner.close()
    second.cuda.close()
    assert len(results) == 2 and len(place.world.builds) == 1 and not second.world.builds
    second.world.verify()


def key(**changes: Any) -> EngineKey:
    values: dict[str, Any] = {
        "onnx_sha256": "0" * 64, "tensorrt": "10.3.0", "gpu": "G", "compute_capability": "8.7", "precision": "fp16",
        "profile": {"x": ((1,), (1,), (2,))},
    }  # fmt: skip
    return EngineKey(**{**values, **changes})


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = EngineCache((tmp_path / "file" / "engines",), "net", key())
    assert cache.read() is None
    with pytest.raises(OutputError, match="no place for engines") as caught:
        cache.write(b"plan")
    assert "XDG_CACHE_HOME" in caught.value.remedy


def test_the_next_folder_where_the_first_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = EngineCache((tmp_path / "file" / "engines", tmp_path / "mine"), "net", key())
    path = cache.write(b"plan")
    assert path.parent == tmp_path / "mine" and cache.read() == (b"plan", path)


def test_a_full_disk_leaves_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EngineCache((tmp_path,), "net", key())
    cache.write(b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        cache.write(b"new")
    monkeypatch.undo()
    assert cache.read() is None and not list(tmp_path.glob(".*"))


def test_differences_name_the_nearest(tmp_path: Path) -> None:
    EngineCache((tmp_path,), "net", key(tensorrt="8.5.3", gpu="A", onnx_sha256="1" * 64)).write(b"a")
    EngineCache((tmp_path,), "net", key(compute_capability="9.0")).write(b"b")
    EngineCache((tmp_path,), "other", key()).write(b"c")
    (tmp_path / "net.rubbish.json").write_text("[]")
    cache = EngineCache((tmp_path,), "net", key())
    assert cache.differences() == "compute capability 9.0 in place of 8.7"
    assert EngineCache((tmp_path / "none",), "net", key()).differences() == ""


def test_folders(toy_bundle: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    user = tmp_path / "xdg" / "lp-edge" / "engines"
    assert cache_folders(toy_bundle / WARP) == (toy_bundle / "engines", user)
    assert cache_folders(toys / WARP) == (user,) == cache_folders(b"model")
    assert cache_folders(open_bundle().path_of(names.FACE_MESH)) == (
        user,
    )  # ours is not the user's to write into


# -- engines for other options ----------------------------------------------------------------------

AXES = CONFIG.axes


def batch_of(place: Place, toys: Path, **options: Any) -> int | None:
    """The largest batch of what a run with these options opens, after it ran."""
    with place.open(toys / WARP, config=TensorRtConfig(**{"axes": AXES, **options})) as runner:
        assert red(runner.infer(feeds(4))) == {4}
        return runner.max_batch


def test_what_was_asked_for_serves_a_run_without_options(
    place: Place, toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lp_edge")
    assert batch_of(place, toys, max_batch=1, workspace_mib=64) == 1
    assert batch_of(place, toys) == 1 and len(place.world.builds) == 1
    assert "built for batches up to 1 with " in caplog.text and "workspace_mib=64" in caplog.text
    (engine,) = place.folder.glob("*.engine")
    assert str(engine) in caplog.text


@pytest.mark.parametrize(
    ("kept", "wanted", "taken"),
    [
        ({"max_batch": 1}, {"max_batch": 2}, False),
        ({"max_batch": 4, "usual_batch": 1}, {"usual_batch": 1}, True),
        ({"max_batch": 4, "usual_batch": 1}, {"usual_batch": 2}, False),
        ({"max_batch": 4, "usual_batch": 1}, {"max_batch": 4}, True),
        ({"max_batch": 1, "workspace_mib": 64}, {"max_batch": 1}, True),
        ({"max_batch": 1, "workspace_mib": 64}, {"workspace_mib": 32}, False),
        ({"max_batch": 1}, {"workspace_mib": 32}, False),
        ({"workspace_mib": 64}, {}, True),
        ({"max_batch": 1, "tf32": True}, {}, False),
        ({"max_batch": 1}, {"tf32": True}, False),
        ({"max_batch": 1, "tf32": True}, {"tf32": True}, True),
        ({"max_batch": 1, "axes": {"H": (4, 8, 32), "W": (4, 8, 32)}}, {}, False),
    ],
)
def test_options_that_are_given_are_honoured(
    place: Place, toys: Path, kept: dict[str, Any], wanted: dict[str, Any], taken: bool
) -> None:
    batch_of(place, toys, **kept)
    batch_of(place, toys, **wanted)
    assert len(place.world.builds) == (1 if taken else 2)


@pytest.mark.parametrize("version", ["8.6", "10.3", "11.4"])
def test_levels_that_are_left_open(places: Callable[..., Place], toys: Path, version: str) -> None:
    place = places(version)
    assert batch_of(place, toys, max_batch=2, optimization_level=1, hardware_compatibility=True) == 2
    assert batch_of(place, toys) == 2 and len(place.world.builds) == 1
    assert batch_of(place, toys, optimization_level=2) == 8 and len(place.world.builds) == 2


def test_other_typing_is_another_network(places: Callable[..., Place], toys: Path) -> None:
    place = places("10.3")
    batch_of(place, toys, max_batch=1, strongly_typed=False)
    assert batch_of(place, toys) == 8 and len(place.world.builds) == 2


def test_of_two_candidates_the_larger_batch_wins(place: Place, toys: Path) -> None:
    for batch in (2, 4, 1):
        batch_of(place, toys, max_batch=batch)
    assert batch_of(place, toys) == 4 and len(place.world.builds) == 3


def test_of_equal_batches_the_newest_wins(place: Place, toys: Path) -> None:
    for age, workspace in ((1, 64), (3, 32), (2, 16)):
        batch_of(place, toys, max_batch=2, workspace_mib=workspace)
        (fresh,) = (p for p in place.folder.glob("*.engine") if p.stat().st_mtime > 1e9)
        os.utime(fresh, (1000 - age, 1000 - age))
    with place.open(toys / WARP, config=TensorRtConfig(axes=AXES)) as runner:
        assert "workspace_mib=64" in runner.key.flags


def test_the_engine_for_exactly_these_options_comes_first(place: Place, toys: Path) -> None:
    assert batch_of(place, toys) == 8
    batch_of(place, toys, max_batch=16)
    assert batch_of(place, toys) == 8 and len(place.world.builds) == 2
    with place.open(toys / WARP, config=TensorRtConfig(axes=AXES, usual_batch=4), exact=True):
        assert len(place.world.builds) == 3


def test_batches_that_nobody_asked_for_are_not_taken(
    place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card of the same name with less memory."""
    assert batch_of(place, toys) == 8
    monkeypatch.setattr(tensorrt, "default_max_batch", lambda memory: 4)
    assert batch_of(place, toys) == 4 and len(place.world.builds) == 2


@pytest.mark.parametrize("damage", ["altered", "gone", "refused"])
def test_a_damaged_candidate_is_passed_over(
    place: Place, toys: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch_of(place, toys, max_batch=2)
    (small,) = place.folder.glob("*.engine")
    batch_of(place, toys, max_batch=4)
    for path in set(place.folder.glob("*.engine")) - {small}:
        if damage == "gone":
            path.unlink()
        elif damage == "altered":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            place.world.load_error = ("INTERNAL_ERROR", "Version tag does not match", 1)
    assert batch_of(place, toys) == 2 and len(place.world.builds) == 2
    assert damage == "gone" or "take" in caplog.text
    small.unlink()
    assert batch_of(place, toys, max_batch=0) in (4, 8)
    assert len(place.world.builds) == (2 if damage == "refused" else 3)


def test_what_the_manifest_tells_of_is_taken(place: Place, toy_bundle: Path) -> None:
    config = TensorRtConfig(max_batch=2, axes=AXES)
    build_bundle_engines(toy_bundle, cuda=place.cuda, config=config, trt=place.trt)
    for entry in (toy_bundle / "engines").glob("*.json"):
        entry.unlink()
    with place.open(toy_bundle / WARP, cache_dir=None, config=TensorRtConfig(axes=AXES)) as runner:
        assert runner.max_batch == 2
    assert len(place.world.builds) == 3


# -- 8-bit floating point ---------------------------------------------------------------------------

ADA = replace(H200, name="NVIDIA L4", compute_capability=(8, 9))
T4 = replace(H200, name="Tesla T4", compute_capability=(7, 5))


@pytest.mark.parametrize(
    ("version", "device", "words"),
    [
        ("10.3", ORIN, "compute capability 8.7"),
        ("10.3", T4, "compute capability 7.5"),
        ("8.5", ADA, "TensorRT 8.5"),
    ],
)
def test_fp8_where_it_is_not_known(
    places: Callable[..., Place], version: str, device: Any, words: str
) -> None:
    place = places(version, device)
    with pytest.raises(ConfigError, match=f"quantised to fp8, which {words}") as caught:
        place.open(quantised_model(onnx.TensorProto.FLOAT8E4M3FN))
    assert "int8" in caught.value.remedy and not place.world.builds and not place.folder.exists()


@pytest.mark.parametrize("device", [ADA, H200], ids=["8.9", "9.0"])
def test_fp8_passes_where_it_is_known(places: Callable[..., Place], device: Any) -> None:
    place = places("10.3", device)
    graph = trt_graph.read_graph(quantised_model(onnx.TensorProto.FLOAT8E4M3FN))
    trt_build.check_precision(place.trt, graph, place.cuda.compute_capability, "w")
    assert graph.precision == "fp8" and graph.quantised == {"float8e4m3fn"}


def test_int8_runs_on_all(place: Place) -> None:
    with place.open(quantised_model()) as runner:
        assert runner.key.precision == "int8"


# -- bundles ----------------------------------------------------------------------------------------


def test_engines_of_a_bundle(place: Place, toy_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = build_bundle_engines(toy_bundle, cuda=place.cuda, config=CONFIG, trt=place.trt)
    bundle = open_bundle(toy_bundle)  # which verifies every file
    assert bundle.manifest.engines == entries
    assert [entry.network for entry in entries] == list(bundle.manifest.networks)
    assert all(entry.file.startswith("engines/") for entry in entries)
    for entry in (toy_bundle / "engines").glob("*.json"):  # the manifest alone is enough
        entry.unlink()
    with place.open(toy_bundle / WARP, cache_dir=None) as runner:
        assert red(runner.infer(feeds(4))) == {4}
        assert runner.key == entries[-1].built_for
    assert len(place.world.builds) == 3
    assert build_bundle_engines(toy_bundle, cuda=place.cuda, config=CONFIG, trt=place.trt) == entries
    assert len(place.world.builds) == 3


def test_engines_for_other_gpus_stay(places: Callable[..., Place], toy_bundle: Path) -> None:
    first, second = places("10.3", H200), places("10.3", ORIN)
    wanted = [names.WARP_DECODE]
    mine = build_bundle_engines(toy_bundle, cuda=first.cuda, config=CONFIG, networks=wanted, trt=first.trt)
    theirs = build_bundle_engines(
        toy_bundle, cuda=second.cuda, config=CONFIG, networks=wanted, trt=second.trt
    )
    assert open_bundle(toy_bundle).manifest.engines == (*mine, *theirs)
    assert {entry.built_for.gpu for entry in (*mine, *theirs)} == {"NVIDIA H200", "Orin"}


def test_engines_of_a_bundle_that_lacks_the_network(place: Place, toy_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no network 'stitching'"):
        build_bundle_engines(toy_bundle, cuda=place.cuda, networks=["stitching"], trt=place.trt)


def test_a_bundle_network_through_the_registry(
    place: Place, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", place.trt)
    monkeypatch.setattr(cuda_module, "open_cuda", lambda device: open_cuda(device, runtime=place.world.cuda))
    options = {"max_batch": "4", "axes": "H=4:8:64,W=4:8:64"}
    config = BackendConfig("tensorrt", provider_options=options)
    runner = tensorrt.open_backend(toy_bundle / WARP, config, "warp_decode")
    with runner:
        assert red(runner.infer(feeds(3))) == {3}
    assert list((toy_bundle / "engines").glob("*.engine"))
    assert "warp_decode: TensorRT builds its engine, once for this GPU; that takes minutes" in caplog.text
    with pytest.raises(ConfigError, match="unknown option 'batch'"):
        tensorrt.open_backend(
            toy_bundle / WARP, BackendConfig("tensorrt", provider_options={"batch": "1"}), "w"
        )
    place.world.gpu = False
    with pytest.raises(BackendUnavailable, match="makes no runtime"):
        tensorrt.open_backend(toy_bundle / WARP, config, "warp_decode")


def test_without_tensorrt(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable) as caught:
        tensorrt.open_backend(toys / WARP, BackendConfig("tensorrt"), "warp")
    assert caught.value.got.startswith("backend tensorrt is not there: tensorrt cannot be imported")
    assert "tensorrt-cu13 (driver 580 or newer)" in caught.value.remedy and "lp-doctor" in caught.value.remedy
    monkeypatch.setattr(trt_build, "_TEGRA", Path(__file__))
    assert "JetPack's Python with --system-site-packages" in BACKENDS["tensorrt"].remedy


def test_without_cuda(places: Callable[..., Place], toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lp_edge.tests.fake_cuda.device import NO_DEVICE

    monkeypatch.setitem(sys.modules, "tensorrt", places().trt)
    monkeypatch.setattr(
        cuda_module, "open_cuda", lambda device: open_cuda(device, runtime=FakeCuda(NO_DEVICE))
    )
    with pytest.raises(BackendUnavailable, match="cudaGetDeviceCount"):
        tensorrt.open_backend(toys / WARP, BackendConfig("tensorrt"), "warp")


def test_default_batch_of_small_and_large_cards() -> None:
    assert [tensorrt.default_max_batch(gib << 30) for gib in (8, 12, 140)] == [4, 8, 8]


def test_keys_are_those_of_the_manifest(tmp_path: Path) -> None:
    trt_cache.EngineCache((tmp_path,), "net", key()).write(b"plan")
    (entry,) = tmp_path.glob("*.json")
    assert json.loads(entry.read_text())["key"] == key_json(key())
