"""Whole bundles through the backend ``tensorrt``, on a fake TensorRT of every generation and a fake CUDA device.

At the end of every test nothing may be left on the device, and neither fake may have seen anything that a real one would
punish: races between streams, use after free, changed contexts, two threads in one.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from lp_edge.engines import cuda, names
from lp_edge.engines.backends import BackendConfig, available_backends, open_runner
from lp_edge.engines.batching import BatchConfig, CallScope, DeviceWorker
from lp_edge.engines.bundle import open_bundle
from lp_edge.engines.device import DeviceArray
from lp_edge.engines.runner import Runner, fetch
from lp_edge.errors import BackendUnavailable, EngineError, LimitError, LpEdgeError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.options import AnimateOptions
from lp_edge.tests.fake_cuda.device import H200, ORIN
from lp_edge.tests.fake_tensorrt.install import install
from lp_edge.tests.fake_tensorrt.module import VERSIONS, World

CPU, TENSORRT = BackendConfig("cpu", threads=1), BackendConfig("tensorrt")
SIZES = {"sources": 1, "S": 1, "H": 288, "W": 320}

Make = Callable[..., World]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Puts machines in place of this one, one after the other; everything must be closed when the test ends."""
    with ExitStack() as stack:

        def put(version: str = "10.3", device: Any = H200) -> World:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            world = install(patch, tmp_path / "cache", version, device)
            stack.callback(world.verify)
            return world

        yield put
        gc.collect()  # what was fetched is pinned memory until it is dropped
        assert not cuda._SHARES


GENERATIONS = {"8.5-jetson": ("8.5", ORIN), "10.3": ("10.3", H200), "11.4": ("11.4", H200)}
MACHINES = {**GENERATIONS, "8.6": ("8.6", H200), "10.3-jetson": ("10.3", ORIN)}
assert set(VERSIONS) == {version for version, _ in MACHINES.values()}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, make: Make) -> World:
    return make(*MACHINES[request.param])


@pytest.fixture(params=GENERATIONS)
def generation(request: pytest.FixtureRequest, make: Make) -> World:
    return make(*GENERATIONS[request.param])


@pytest.fixture(params=["toy_bundle", "liveportrait_bundle"])
def bundle(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def feeds(runner: Runner, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 200, [{"N": batch, "batch": batch, **SIZES}.get(axis, axis) for axis in spec.shape]).astype(
            spec.dtype
        )
        for name, spec in runner.inputs.items()
    }  # fmt: skip


def same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(fetch(got[name])(), value)


# -- networks ---------------------------------------------------------------------------------------


def test_every_network_of_a_bundle(machine: World, bundle: Path) -> None:
    """Built once and found again; results are those of ONNX Runtime, from the host and from the device, brought and kept."""
    opened = open_bundle(bundle)
    for name in opened.manifest.networks:
        with opened.runner(name, TENSORRT) as runner, opened.runner(name, CPU) as reference:
            assert (runner.backend, runner.resident, reference.resident) == ("tensorrt", True, False)
            for turn, batch in enumerate((1, runner.max_batch or 1, 1, 1)):
                data = feeds(reference, batch, turn)
                wanted = reference.infer(data)
                same(runner.infer(data), wanted)
                there: dict[str, Any] = {key: runner.upload(array) for key, array in data.items()}
                kept = runner.infer(there, keep=True)
                there.clear()
                assert all(isinstance(array, DeviceArray) for array in kept.values())
                same(kept, wanted)
                one = list(runner.outputs)[-1]
                same(runner.infer(data, [one], keep=True), {one: wanted[one]})
            del kept
        runner.close()
        with opened.runner(name, TENSORRT) as again:
            same(again.infer(data), wanted)
    assert len(machine.builds) == len(opened.manifest.networks) == machine.loads / 2
    assert len(list((bundle / "engines").glob("*.engine"))) == len(machine.builds)


def test_networks_share_a_device(generation: World, bundle: Path) -> None:
    """It is opened with the first and closed with the last, in whatever order; one that fails to open takes nothing along."""
    opened = open_bundle(bundle)
    some = list(opened.manifest.networks)[:3]
    runners = [opened.runner(name, TENSORRT) for name in some]
    generation.build_error = ("INTERNAL_ERROR", "no implementation")
    with pytest.raises(EngineError, match="no implementation"):
        open_runner(
            next(iter(bundle.glob("face_mesh.onnx"))),
            BackendConfig("tensorrt", provider_options={"tf32": "true"}),
        )
    (shared,) = cuda._SHARES
    assert generation.cuda.count("cudaGetDeviceCount") == 1
    array = runners[0].upload(np.zeros(4, np.uint8))
    for runner in runners:
        assert not shared.closed
        runner.infer(feeds(runner, 1), keep=True)
        runner.close()
        runner.close()
    assert shared.closed and generation.cuda.held == []
    with pytest.raises(EngineError, match="closed"):
        np.asarray(array)
    with opened.runner(some[0], TENSORRT) as runner:  # and from the start
        runner.infer(feeds(runner, 1))
    assert generation.cuda.count("cudaGetDeviceCount") == 2


def test_one_network_feeds_the_next_without_the_host(machine: World, toy_bundle: Path) -> None:
    opened = open_bundle(toy_bundle)
    with (
        opened.runner(names.FACE_MESH, TENSORRT) as mesh,
        opened.runner(names.WARP_DECODE, TENSORRT) as warp,
        opened.runner(names.FACE_MESH, CPU) as mesh_cpu,
        opened.runner(names.WARP_DECODE, CPU) as warp_cpu,
    ):
        source = feeds(warp_cpu, 1)
        for turn in range(5):
            picture = np.zeros((2, 64, 64, 3), np.uint8)
            picture[:, 10 : 30 + turn, 20:40] = 255

            def run(first: Runner, second: Runner, picture: np.ndarray = picture) -> dict[str, Any]:
                points = first.infer({names.IMAGE: picture}, [names.POINTS], keep=True)[names.POINTS]
                data = {names.KP_SOURCE: np.zeros((2, 478, 3), np.float32), names.KP_DRIVING: points}
                data[names.SOURCE_IMAGE] = source[names.SOURCE_IMAGE]
                return second.infer(data, keep=True)

            wanted = run(mesh_cpu, warp_cpu)
            before = len(machine.cuda.calls)
            got = run(mesh, warp)
            called = machine.cuda.calls[before:]
            assert not any(call.name == "cudaMemcpyAsync" and call.inputs[3] == 2 for call in called)
            assert not any(call.name == "cudaStreamSynchronize" for call in called)
            same(got, wanted)
        del got


def test_portraits_of_several_streams_in_one_batch(machine: World, toy_bundle: Path) -> None:
    """The server's case: each stream's picture stays on the device, keypoints come with every frame, threads at once."""
    opened = open_bundle(toy_bundle)
    with opened.runner(names.WARP_DECODE, CPU) as reference:
        data = [feeds(reference, 1, seed) for seed in range(5)]
        wanted = [[reference.infer({**one, names.KP_DRIVING: one[names.KP_DRIVING] + turn})[names.IMAGE]
                   for turn in range(6)] for one in data]  # fmt: skip
    sizes: list[int] = []

    class Notes:
        def batch(self, network: str, size: int, rows: int, waited_s: float, ran_s: float) -> None:
            sizes.append(rows)

    with (
        DeviceWorker(BatchConfig(max_batch=64, max_wait_s=0.5), observer=Notes()) as worker,
        worker.wrap(opened.runner(names.WARP_DECODE, TENSORRT)) as runner,
    ):
        most = runner.max_batch or 1

        def stream(number: int) -> list[np.ndarray]:
            mine: dict[str, Any] = dict(data[number])
            mine[names.SOURCE_IMAGE] = runner.upload(mine[names.SOURCE_IMAGE])
            results = []
            with worker.scope(CallScope(number)):
                for turn in range(6):
                    call = {**mine, names.KP_DRIVING: mine[names.KP_DRIVING] + turn}
                    keep = (number + turn) % 4 != 0
                    image = runner.infer(call, [names.IMAGE], keep=keep)[names.IMAGE]
                    assert isinstance(image, DeviceArray) == keep
                    results.append(np.array(fetch(image)()))
            return results

        with ThreadPoolExecutor(5) as pool:
            got = list(pool.map(stream, range(5)))
    np.testing.assert_array_equal(got, wanted)
    assert 1 < max(sizes) <= most


# -- engines that do not fit ------------------------------------------------------------------------


def test_another_version_builds_its_own(
    make: Make, toy_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, built = toy_bundle / "warp_decode.onnx", []
    caplog.set_level(logging.INFO, "lp_edge")
    for version in (*VERSIONS, *VERSIONS):
        world = make(version)
        with open_runner(path, TENSORRT) as runner:
            runner.infer(feeds(runner, 1))
        built.append(len(world.builds))
    assert built == [1] * len(VERSIONS) + [0] * len(VERSIONS)  # the second round found them all
    assert caplog.text.count("(there is one with tensorrt ") == len(VERSIONS) - 1
    assert len(list((toy_bundle / "engines").glob("*.engine"))) == len(VERSIONS)


def test_an_engine_for_another_gpu_is_not_taken(make: Make, toy_bundle: Path) -> None:
    for device in (H200, ORIN):
        world = make("10.3", device)
        with open_runner(toy_bundle / "warp_decode.onnx", TENSORRT) as runner:
            runner.infer(feeds(runner, 1))
        assert len(world.builds) == 1


def test_a_plan_that_does_not_fit_its_entry(
    machine: World, toy_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TensorRT refuses what it is given, whatever the key says: built again, with a warning, and then taken."""
    path = toy_bundle / "warp_decode.onnx"
    open_runner(path, TENSORRT).close()
    machine.load_error = ("INTERNAL_ERROR", "the engine plan file is not compatible with this version", 2)
    with open_runner(path, TENSORRT) as runner:
        runner.infer(feeds(runner, 1))
    assert len(machine.builds) == 2 and "does not take the engine" in caplog.text
    open_runner(path, TENSORRT).close()
    assert len(machine.builds) == 2


# -- what fails -------------------------------------------------------------------------------------

OUT_OF_MEMORY = "Error Code 2: OutOfMemory (no further information)"


def _fail(call: str, status: int = 2) -> Callable[[World], None]:
    return lambda world: world.cuda.fail(call, status, times=2)


def _set(name: str, value: Any) -> Callable[[World], None]:
    return lambda world: setattr(world, name, copy.copy(value))


OPENING: dict[str, tuple[Callable[[World], None], type[LpEdgeError], str]] = {
    "no GPU": (_set("gpu", False), BackendUnavailable, "makes no"),
    "no device": (_fail("cudaGetDeviceCount", 100), BackendUnavailable, "cudaGetDeviceCount"),
    "memory": (_fail("cudaMalloc"), LimitError, "cudaMalloc"),
    "stream": (_fail("cudaStreamCreateWithFlags"), LimitError, "cudaStreamCreateWithFlags"),
    "event": (_fail("cudaEventCreateWithFlags"), LimitError, "cudaEventCreateWithFlags"),
    "parse": (_set("parse_errors", ["No importer for Conv"]), EngineError, "No importer for Conv"),
    "build": (_set("build_error", ("INTERNAL_ERROR", "no implementation for node")), EngineError, "no implementation"),
    "build memory": (_set("build_error", ("FAILED_ALLOCATION", OUT_OF_MEMORY)), EngineError, "OutOfMemory"),
    "deserialise": (_set("load_error", ("INTERNAL_ERROR", "Magic tag does not match", 1)), EngineError, "Magic tag"),
    "deserialise memory": (_set("load_error", ("FAILED_ALLOCATION", OUT_OF_MEMORY, 1)), LimitError, "OutOfMemory"),
}  # fmt: skip


@pytest.mark.parametrize("what", OPENING)
def test_opening_that_fails_leaves_nothing(generation: World, toy_bundle: Path, what: str) -> None:
    breaks, kind, words = OPENING[what]
    path = toy_bundle / "warp_decode.onnx"
    breaks(generation)
    with pytest.raises(kind, match=words) as caught:
        open_runner(path, TENSORRT)
    assert caught.value.remedy
    assert not cuda._SHARES and generation.cuda.held == []
    generation.gpu, generation.build_error, generation.load_error = True, None, None
    for name in ("cudaGetDeviceCount", "cudaMalloc", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags"):
        generation.cuda.fail(name, 0)
    with open_runner(path, TENSORRT) as runner, open_runner(path, CPU) as reference:
        data = feeds(reference, 1)
        same(runner.infer(data), reference.infer(data))


RUNNING: dict[str, tuple[Callable[[World], None], type[LpEdgeError], str]] = {
    "memory": (_fail("cudaMalloc"), LimitError, "cudaMalloc"),
    "pinned memory": (_fail("cudaHostAlloc"), LimitError, "cudaHostAlloc"),
    "copy": (_fail("cudaMemcpyAsync", 1), EngineError, "cudaMemcpyAsync"),
    "wait": (_fail("cudaStreamWaitEvent", 1), EngineError, "cudaStreamWaitEvent"),
    "record": (_fail("cudaEventRecord", 1), EngineError, "cudaEventRecord"),
    "enqueue": (_set("enqueue_errors", [("INTERNAL_ERROR", "Cask convolution execution")]), EngineError, "Cask"),
    "enqueue memory": (_set("enqueue_errors", [("FAILED_ALLOCATION", OUT_OF_MEMORY)]), LimitError, "OutOfMemory"),
    "context": (_set("context_error", OUT_OF_MEMORY), LimitError, "makes no execution context"),
}  # fmt: skip


@pytest.mark.parametrize("keep", [False, True], ids=["brought", "kept"])
@pytest.mark.parametrize("what", RUNNING)
def test_a_call_that_fails_harms_no_other(make: Make, toy_bundle: Path, what: str, keep: bool) -> None:
    """A larger batch fails, which needs memory and a context; calls before and behind it are right."""
    machine = make("10.3", ORIN if what == "pinned memory" else H200)
    breaks, kind, words = RUNNING[what]
    path = toy_bundle / "warp_decode.onnx"
    with open_runner(path, TENSORRT) as runner, open_runner(path, CPU) as reference:
        small, large = feeds(reference, 1), feeds(reference, 4, 1)
        before = runner.infer(small, keep=True)
        breaks(machine)
        with pytest.raises(kind, match=words):
            runner.infer(large, keep=keep)
        machine.context_error, machine.enqueue_errors = "", []
        for name in (
            "cudaMalloc",
            "cudaHostAlloc",
            "cudaMemcpyAsync",
            "cudaStreamWaitEvent",
            "cudaEventRecord",
        ):
            machine.cuda.fail(name, 0)
        for _ in range(3):
            same(runner.infer(large, keep=keep), reference.infer(large))
        same(before, reference.infer(small))
        del before


def test_a_lost_device(make: Make, toy_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = make("10.3")
    runner = open_runner(toy_bundle / "warp_decode.onnx", TENSORRT)
    kept = runner.infer(feeds(runner, 1), [names.IMAGE], keep=True)
    world.cuda.break_device()
    with pytest.raises(EngineError, match="700"):
        runner.infer(feeds(runner, 1))
    with pytest.raises(EngineError, match="700"):
        fetch(kept.pop(names.IMAGE))()
    runner.close()
    runner.close()
    assert "closing" in caplog.text and not cuda._SHARES
    world.cuda.broken = 0  # so that the fake can be asked what is left: nothing could be freed
    for memory in world.cuda._memory:
        memory.freed = True
    world.cuda._objects.clear()


def test_doctor_finds_it(generation: World) -> None:
    (status,) = [status for status in available_backends() if status.name == "tensorrt"]
    assert status.works and generation.cuda.personality.name in status.detail
    generation.gpu = False
    (status,) = [status for status in available_backends() if status.name == "tensorrt"]
    assert not status.works and status.remedy


def test_threads_open_run_and_close_networks(generation: World, toy_bundle: Path) -> None:
    """Of one bundle at once: engines are built once, the device is shared, and nobody closes it under another."""
    opened = open_bundle(toy_bundle)
    with opened.runner(names.FACE_MESH, CPU) as reference:
        data = feeds(reference, 2)
        wanted = reference.infer(data)
    begin = threading.Barrier(4)

    def work(number: int) -> None:
        begin.wait(20)
        for turn in range(3):
            with opened.runner(names.FACE_MESH, TENSORRT) as runner:
                same(runner.infer(data, keep=bool((number + turn) % 2)), wanted)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(generation.builds) == 1


# -- the animator -----------------------------------------------------------------------------------


def picture(at: int, height: int = 200) -> np.ndarray:
    """A "face" of the toys: a square."""
    out = np.zeros((height, 240, 3), np.uint8)
    out[60:140, at - 40 : at + 40] = 255
    return out


def apart(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.abs(one.astype(np.int16) - two).max())


def drawn(animator: Animator, number: int = 0) -> list[np.ndarray]:
    """A live stream of a portrait."""
    live = animator.live(picture(90 + 10 * number), AnimateOptions(smooth=False))
    return [np.array(live.step(picture(90 + number + 3 * i), i / 25).rgb) for i in range(6)]


def test_an_animator_draws_what_the_cpu_draws(machine: World, bundle: Path) -> None:
    with Animator(bundle, backend=CPU) as animator:
        wanted = drawn(animator)
        clip = [
            np.array(frame.rgb) for frame in animator.animate(picture(100), "nod", AnimateOptions(size=256))
        ][:20]
    with Animator(bundle, backend=TENSORRT) as animator:
        assert animator.family.resident and animator.family.backend == "tensorrt"
        got = drawn(animator)
        assert machine.cuda.count("cudaGetDeviceCount") == 1
        animation = animator.animate(picture(100), "nod", AnimateOptions(size=256))
        frames = [np.array(frame.rgb) for frame, _ in zip(animation, clip, strict=False)]
        animation.close()
    assert max(apart(one, two) for one, two in zip(wanted, got, strict=True)) <= 1
    assert len(frames) == len(clip) == 20
    assert max(apart(one, two) for one, two in zip(clip, frames, strict=True)) <= 1
    assert apart(got[0], got[-1]) > 10 and apart(frames[0], frames[-1]) >= 1  # something moves
    assert machine.captured and machine.cuda.count("cudaGraphLaunch")


def test_pixels_may_stay_on_the_host(make: Make, bundle: Path) -> None:
    make("10.3")
    with Animator(bundle, backend=CPU) as animator:
        wanted = drawn(animator)
    with Animator(bundle, backend=BackendConfig("tensorrt", pixels="host")) as animator:
        assert not animator.family.resident
        got = drawn(animator)
    assert max(apart(one, two) for one, two in zip(wanted, got, strict=True)) <= 1


def test_streams_of_several_portraits_share_the_device(make: Make, bundle: Path) -> None:
    machine = make("10.3")
    with Animator(bundle, backend=CPU) as animator:
        wanted = [drawn(animator, number) for number in range(3)]
    with (
        DeviceWorker(BatchConfig(max_wait_s=0.02)) as worker,
        Animator(bundle, backend=TENSORRT, wrap=worker.wrap) as animator,
        ThreadPoolExecutor(3) as threads,
    ):

        def stream(number: int) -> list[np.ndarray]:
            with worker.scope(CallScope(number)):
                return drawn(animator, number)

        got = list(threads.map(stream, range(3)))
    for one, two in zip(wanted, got, strict=True):
        assert max(apart(*frames) for frames in zip(one, two, strict=True)) <= 1
    assert machine.cuda.count("cudaGetDeviceCount") == 1
