"""Streams on a simulated GPU (fake TensorRT, fake CUDA): the pixels of a CPU's, calls that merge, memory that comes back."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("onnx", reason="the fake TensorRT reads graphs with it")

import grpc

from lp_edge.engines import cuda as cuda_module
from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.cuda import DeviceBuffer, open_cuda
from lp_edge.engines.device import DeviceArray
from lp_edge.engines.runner import Runner
from lp_edge.proto.v1 import animation_pb2, portraits_pb2
from lp_edge.runtime.cast import AnimatedFrame, DrawnFrame
from lp_edge.runtime.image import write_image
from lp_edge.runtime.server.config import Limits
from lp_edge.runtime.server.portraits import StoredPortrait, memory_of
from lp_edge.tests.fake_cuda.device import H200, ORIN, FakeCuda, Personality
from lp_edge.tests.fake_tensorrt.module import VERSIONS, World, make_tensorrt
from lp_edge.tests.runtime.server.serving import (
    LOSSLESS,
    RAW,
    SECONDS,
    Call,
    Gate,
    Served,
    face,
    failure_of,
    pixels,
    run,
    serving,
    until,
)

Code = grpc.StatusCode
Machine = Callable[..., World]
Batches = dict[str, tuple[float, float, float]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Gives this process a TensorRT and GPUs; at the end nothing may be left on a device, and nothing done wrong."""
    worlds: list[World] = []

    def make(device: Personality = H200, version: str = "10.3", *, pool_bytes: int = 256 << 20) -> World:
        world = World(FakeCuda(device))
        monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(version, world))
        opened = partial(open_cuda, runtime=world.cuda, pool_bytes=pool_bytes)
        monkeypatch.setattr(cuda_module, "open_cuda", opened)
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        world.verify()


@pytest.fixture
def config(tmp_path: Path) -> BackendConfig:
    """TensorRT with small batches, its engines where the test leaves them."""
    options = {"cache_dir": str(tmp_path / "engines"), "max_batch": "4"}
    return BackendConfig("tensorrt", provider_options=options)


def sources() -> list[np.ndarray]:
    """Different pictures, whose faces go into regions of the same size."""
    return [face(110 + 2 * i, 100, 64, blue=200 - 30 * i) for i in range(4)]


def driver(count: int, start: int = 90) -> list[np.ndarray]:
    """A face that goes to the right and opens its mouth."""
    return [face(start + 2 * i, blue=255 - 8 * (i % 16)) for i in range(count)]


async def driven(call: Call, frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Results of an open call, which is brought to a good end."""

    async def send() -> None:
        for rgb in frames:
            await call.frame(rgb)

    sending = asyncio.ensure_future(send())
    pictures = [pixels((await call.answer()).pictures[0]) for _ in frames]
    await sending
    assert await call.end() == []
    return pictures


async def together(server: Served, ids: Sequence[str], frames: int = 5) -> list[list[np.ndarray]]:
    """One stream for each portrait, all at once, each with a driver of its own."""
    calls = [await server.animate(id, mode=LOSSLESS) for id in ids]
    results = (driven(call, driver(frames, 90 + 3 * i)) for i, call in enumerate(calls))
    return list(await asyncio.gather(*results))


def apart(got: Sequence[Sequence[np.ndarray]], wanted: Sequence[Sequence[np.ndarray]]) -> int:
    """Largest difference of any two pixels."""
    pairs = [pair for a, b in zip(got, wanted, strict=True) for pair in zip(a, b, strict=True)]
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs)


def batches(server: Served) -> Batches:
    """Network -> engine calls, calls of streams in them, their rows."""
    found: dict[str, list[float]] = {}
    for line in server.core.metrics.render()[0].decode().splitlines():
        for place, name in enumerate(("batch_size_count", "batched_calls_total", "batch_size_sum")):
            if line.startswith(f'lp_edge_{name}{{network="'):
                found.setdefault(line.split('"')[1], [0.0] * 3)[place] = float(line.split()[-1])
    return {network: (a, b, c) for network, (a, b, c) in found.items()}


def buffers() -> list[DeviceBuffer]:
    """Memory on devices in anybody's hands, with what only a cycle of references holds."""
    return [item for item in gc.get_objects() if type(item) is DeviceBuffer and not item.closed]


def forget_records() -> None:
    """Let go of the tracebacks in pytest's records of the log, and so of what the code that failed had in hands."""
    for handler in logging.getLogger().handlers:
        getattr(handler, "records", []).clear()


@contextmanager
def without_collector() -> Iterator[None]:
    """What comes back inside comes back at once, not when the collector passes by."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def drawing(server: Served) -> Any:
    """The network that draws, as the worker has wrapped it."""
    family = server.core.devices[0].animator.family
    return family._networks.warp_decode if family.name == "liveportrait" else family._warp


def stored(server: Served, id: str) -> StoredPortrait:
    return server.core.store.get(id)


def arrays_of(portraits: object) -> list[DeviceArray]:
    """What prepared faces of the liveportrait family hold on a device."""
    return [
        array
        for portrait in portraits  # type: ignore[attr-defined]
        for array in (*portrait.features.values(), *portrait.place.fixed.values())
        if isinstance(array, DeviceArray)
    ]


# -- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "device", "version"),
    [
        ("toy_bundle", H200, "10.3"),
        ("toy_bundle", ORIN, "10.3"),
        ("liveportrait_bundle", ORIN, "10.3"),
        *(("liveportrait_bundle", H200, version) for version in VERSIONS),
    ],
)
def test_streams_of_different_portraits_share_engine_calls_and_give_a_cpus_pixels(
    machine: Machine,
    config: BackendConfig,
    family: str,
    device: Personality,
    version: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = request.getfixturevalue(family)
    machine(device, version)

    async def scenario() -> None:
        async with serving(bundle) as server:
            wanted = await together(server, [await server.register(rgb) for rgb in sources()])
        # Who waits for others for so long is joined by them, however busy the machine is.
        async with serving(bundle, backend=config, max_batch_wait_s=0.5) as server:
            assert server.core.devices[0].animator.family.resident
            ids = [await server.register(rgb) for rgb in sources()]
            assert apart(await together(server, ids), wanted) <= 1
            count, calls, _ = batches(server)[names.WARP_DECODE]
            assert calls == 4 * 5
            assert count <= calls - 5
            assert names.PASTE_STILL not in batches(server), (
                "regions of different faces are pasted one by one"
            )
            await server.idle()

    run(scenario())
    assert [text for record in caplog.records if "failed" in (text := record.getMessage())] == []


def test_a_frame_is_begun_while_the_one_before_is_put_together(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    going = threading.Event()
    finish = DrawnFrame.finish

    def held(self: DrawnFrame) -> AnimatedFrame:
        assert going.wait(SECONDS / 3)
        return finish(self)

    monkeypatch.setattr(DrawnFrame, "finish", held)

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            warp = Gate(drawing(server))
            call = await server.animate(await server.register(sources()[0]), mode=LOSSLESS)
            try:
                for rgb in driver(3):
                    await call.frame(rgb)
                await until(lambda: warp.calls >= 2, "the second frame is drawn")
            finally:
                going.set()
            assert [(await call.answer()).sequence for _ in range(3)] == [1, 2, 3]
            assert await call.end() == []

    run(scenario())


def test_device_memory_comes_back_with_streams_and_portraits(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    world = machine(pool_bytes=1 << 20)  # what nobody holds is kept up to this bound for whoever comes next

    async def round_of(server: Served) -> None:
        ids = [await server.register(rgb) for rgb in sources()]
        await together(server, ids, 3)
        for id in ids:
            await server.portraits.DeletePortrait(portraits_pb2.DeletePortraitRequest(id=id))
        await server.idle()

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            await round_of(server)  # engines of the device graphs, memory of the networks' slots
            gc.collect()
            held, used = len(buffers()), world.cuda.used
            with without_collector():
                for _ in range(3):
                    await round_of(server)
                await until(lambda: len(buffers()) == held, "the last stream's call returns")
                await server.register(sources()[0])  # the pool frees what came back when it is asked for more
            assert world.cuda.used <= used + (1 << 20)

    run(scenario())


def test_a_deleted_portrait_keeps_its_memory_as_long_as_a_stream_uses_it(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    machine()

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            id = await server.register(sources()[0])
            arrays = arrays_of(stored(server, id).prepared(0))
            assert len(arrays) >= 3
            kept = [array.buffer for array in arrays]
            del arrays
            call = await server.animate(id, mode=LOSSLESS)
            server.core.store.delete(id)
            assert server.core.store.memory_bytes > sum(buffer.nbytes for buffer in kept)
            assert len(await driven(call, driver(2))) == 2
            await server.idle()
            assert server.core.store.memory_bytes == 0
            with without_collector():
                # The test's own list, the loop's variable and the call's argument.
                assert max(sys.getrefcount(buffer) for buffer in kept) <= 3

    run(scenario())


def test_cancelled_streams_leave_the_others_and_nothing_on_the_device(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    machine()

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            ids = [await server.register(rgb) for rgb in sources()]
            (before,) = await together(server, ids[:1])
            held = len(buffers())
            warp = Gate(drawing(server))
            warp.shut()
            calls = [await server.animate(id, mode=LOSSLESS) for id in ids]
            for call in calls:
                for rgb in driver(3):
                    await call.frame(rgb)
            await until(lambda: warp.calls == 1, "a batch is on its way")
            for call in calls[1:]:
                await call.cancelled()
            warp.open()
            (left, *_) = calls
            got = [pixels((await left.answer()).pictures[0]) for _ in range(3)]
            assert await left.end() == []
            assert apart([got], [before[:3]]) <= 1
            await server.idle()
            gc.collect()
            assert len(buffers()) <= held

    run(scenario())


def test_draining_lets_streams_on_a_device_finish(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    machine()

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            call = await server.animate(await server.register(sources()[0]), mode=LOSSLESS)
            late = await server.animate(await server.register(sources()[1]), mode=LOSSLESS)
            await call.frame(driver(1)[0])
            await call.answer()
            server.core.drain(1.0)
            for open_call in (call, late):
                told = await open_call.read()
                assert told is not None
                assert told.WhichOneof("message") == "draining"
            await call.frame(driver(2)[1])
            await call.answer()
            assert await call.end() == []
            assert not await server.core.drained()  # one client does not close
            status, _ = await late.failure()
            assert status == Code.UNAVAILABLE

    run(scenario())


# -- failures ------------------------------------------------------------------------------------------------


def fail_launch(world: World, runner: Runner, words: str, after: int = 0) -> None:
    """Let a launch of one network fail, ``after`` so many that do not."""
    infer, left = runner.infer, iter(range(after, -1, -1))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(left) == 0:
            runner.infer = infer  # type: ignore[method-assign]
            world.enqueue_errors.append(("FAILED_EXECUTION", words))
        return infer(*args, **kwargs)

    runner.infer = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("network", [names.WARP_DECODE, names.PASTE_STILL])
@pytest.mark.parametrize(
    ("words", "status", "kind"),
    [
        ("the device said no", Code.INTERNAL, "EngineError"),
        ("Requested amount of GPU memory could not be allocated: out of memory", Code.RESOURCE_EXHAUSTED, "LimitError"),
    ],
)  # fmt: skip
def test_a_launch_that_fails_ends_its_stream_and_the_server_goes_on(
    machine: Machine,
    config: BackendConfig,
    liveportrait_bundle: Path,
    network: str,
    words: str,
    status: grpc.StatusCode,
    kind: str,
) -> None:
    world = machine()

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config, tolerate=words) as server:
            ids = [await server.register(rgb) for rgb in sources()[:2]]
            failing, other = [await server.animate(id, mode=LOSSLESS) for id in ids]
            await failing.frame(driver(1)[0])
            await failing.answer()
            family = server.core.devices[0].animator.family
            runner = (
                drawing(server).inner if network == names.WARP_DECODE else family._pixels._runners[network]
            )
            fail_launch(world, runner, words)
            await failing.frame(driver(2)[1])
            got, detail = await failing.failure()
            assert (got, detail.type) == (status, kind)
            assert network in detail.got
            assert words in detail.got
            results = [await driven(other, driver(5))]
            for _ in range(2):  # the next streams have what it would have had
                results.append(await driven(await server.animate(ids[1], mode=LOSSLESS), driver(5)))
            assert apart(results[:2], results[1:]) == 0
            await server.idle()

    run(scenario())


def test_a_portrait_that_the_device_has_no_memory_for_is_refused(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    world = machine()

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            await server.register(sources()[0])
            world.cuda.fail("cudaMalloc", 2, times=2)  # the second try comes when the pool is empty
            got, detail = await failure_of(server.register(face(240, 240, 300, width=480, height=480)))
            assert (got, detail.type) == (Code.RESOURCE_EXHAUSTED, "LimitError")
            assert len(server.core.store) == 1
            await together(server, [await server.register(sources()[1])], 2)

    run(scenario())


# -- memory of portraits --------------------------------------------------------------------------------------


def test_a_portrait_counts_with_what_it_holds_on_the_device(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    machine()
    rgb = sources()[0]

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            for other in sources():  # engines of the device graphs, memory of the networks' slots
                await server.register(other)
            before = {id(buffer) for buffer in buffers()}
            portrait = stored(server, await server.register(rgb))
            mine = sum(buffer.nbytes for buffer in buffers() if id(buffer) not in before)
            x0, y0, x1, y1 = portrait.prepared(0)[0].place.rect
            assert mine > 4 * (x1 - x0) * (y1 - y0) + 16384, (
                "pixels and weights below the face, and its features"
            )
            own = memory_of(portrait.faces, [p.motion for p in portrait.prepared(0)])
            assert mine + rgb.nbytes + own <= portrait.memory_bytes <= mine + rgb.nbytes + own + (16 << 10)

    run(scenario())


def test_what_the_first_frame_lays_ready_counts_too(
    machine: Machine, config: BackendConfig, toy_bundle: Path
) -> None:
    machine()

    async def scenario() -> None:
        async with serving(toy_bundle, backend=config) as server:
            id = await server.register(sources()[0], size=128)  # drawn smaller, so it is pasted on the device
            registered = stored(server, id).memory_bytes
            call = await server.animate(id, mode=LOSSLESS)
            await call.frame(driver(1)[0])
            await call.answer()
            server.core.store.expire()  # as the server does every few seconds
            x0, y0, x1, y1 = stored(server, id).prepared(0)[0].place.rect
            grown = stored(server, id).memory_bytes - registered
            assert grown >= 4 * (x1 - x0) * (y1 - y0)
            await call.end()
            await server.idle()
            assert stored(server, id).memory_bytes == registered + grown

    run(scenario())


def test_each_device_has_its_own_copy_of_a_portrait(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    machine(replace(H200, devices=2))

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config, devices=(0, 1)) as server:
            id = await server.register(sources()[0])
            portrait = stored(server, id)
            registered = portrait.memory_bytes
            calls = [await server.animate(id, mode=LOSSLESS) for _ in range(2)]
            assert [device.streams for device in server.core.devices] == [1, 1]
            first, second = await asyncio.gather(*(driven(call, driver(4)) for call in calls))
            assert apart([first], [second]) == 0
            for index in range(2):
                arrays = arrays_of(portrait.prepared(index))
                assert len(arrays) >= 3
                assert {array.buffer.cuda.device for array in arrays} == {index}
            on_device = sum(array.buffer.nbytes for array in arrays)
            assert portrait.memory_bytes >= registered + on_device
            await server.idle()

    run(scenario())


def test_there_may_be_no_room_for_a_second_devices_copy(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    machine(replace(H200, devices=2))
    source = face(512, 512, 400, width=1024, height=1024)

    async def scenario() -> None:
        limits = Limits(max_portrait_bytes=6 << 20)
        async with serving(liveportrait_bundle, backend=config, devices=(0, 1), limits=limits) as server:
            id = await server.register(source)
            held = len(buffers())
            first = await server.animate(id, mode=LOSSLESS)
            second = server.open()
            await second.write(config=animation_pb2.AnimateConfig(portrait_ids=[id], output=RAW))
            status, _ = await second.failure()
            assert status == Code.RESOURCE_EXHAUSTED
            await server_streams(server, 1)
            gc.collect()
            assert len([buffer for buffer in buffers() if buffer.cuda.device == 0]) <= held
            assert list(stored(server, id)._prepared) == [0]
            assert len(await driven(first, driver(2))) == 2

    run(scenario())


async def server_streams(server: Served, count: int) -> None:
    await until(lambda: len(server.core.streams) == count, f"{count} streams are open")


# -- renderings ----------------------------------------------------------------------------------------------


async def rendered(server: Served, id: str, name: str = "blink") -> list[animation_pb2.RenderResponse]:
    config = animation_pb2.RenderConfig(portrait_id=id, built_in=name, output=RAW)
    call = server.animation.Render()
    await call.write(animation_pb2.RenderRequest(config=config))
    await call.done_writing()
    return [answer async for answer in call]


def frames_of(answers: Sequence[animation_pb2.RenderResponse]) -> list[np.ndarray]:
    return [pixels(answer.frame.pictures[0]) for answer in answers[:-1]]


@pytest.mark.parametrize("family", ["toy_bundle", "liveportrait_bundle"])
def test_renderings_draw_in_batches_and_tell_of_every_frame(
    machine: Machine, config: BackendConfig, family: str, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(family)
    machine()

    async def scenario() -> None:
        async with serving(bundle) as server:
            wanted = await rendered(server, await server.register(sources()[0]))
        async with serving(bundle, backend=config) as server:
            server.core.devices[0].animator._batch_size = 4  # what an earlier animation found
            answers = await rendered(server, await server.register(sources()[0]))
            assert apart([frames_of(answers)], [frames_of(wanted)]) <= 1
            assert [a.frame.sequence for a in answers[:-1]] == list(range(1, len(answers)))
            assert answers[-1].finished == wanted[-1].finished
            count, calls, rows = batches(server)[names.WARP_DECODE]
            assert rows == len(answers) - 1
            assert count == calls == -(-rows // 4)
            for answer in answers[:-1]:
                timings = answer.frame.timings
                stages = [stage.stage for stage in timings.stages]
                assert stages == ["compose", "warp", "paste_back", "encode"]
                starts = [stage.start_us for stage in timings.stages]
                assert starts == sorted(starts)
                assert all(s.start_us + s.duration_us <= timings.total_us + 2 for s in timings.stages)
            await server.idle()

    run(scenario())


def test_renderings_draw_frame_by_frame_while_somebody_animates(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path
) -> None:
    machine()

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            server.core.devices[0].animator._batch_size = 4
            id = await server.register(sources()[0])
            live = await server.animate(id)
            answers = await rendered(server, id)
            count, calls, rows = batches(server)[names.WARP_DECODE]
            assert count == calls == rows == len(answers) - 1
            await live.end()
            assert [device.live for device in server.core.devices] == [0]

    run(scenario())


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_rendering_that_ends_early_leaves_nothing(
    machine: Machine, config: BackendConfig, liveportrait_bundle: Path, how: str
) -> None:
    world, words = machine(), "the device said no"

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config, tolerate=words) as server:
            id = await server.register(sources()[0])
            await rendered(server, id)
            gc.collect()
            held = len(buffers())
            if how == "failed":
                fail_launch(world, drawing(server).inner, words, after=4)
            call = server.animation.Render()
            settings = animation_pb2.RenderConfig(portrait_id=id, built_in="look", output=RAW)
            await call.write(animation_pb2.RenderRequest(config=settings))
            await call.done_writing()
            for _ in range(3):
                assert (await call.read()).WhichOneof("message") == "frame"
            if how == "cancelled":
                call.cancel()
            else:
                status, detail = await failure_of(drained(call))
                assert (status, detail.type) == (Code.INTERNAL, "EngineError")
            await server.idle()
            assert len(await rendered(server, id)) == 71
            forget_records()
            gc.collect()
            # gRPC lets go of its last error, and so of the batch in its traceback, with the next one.
            assert len(buffers()) <= held + (4 if how == "failed" else 0)

    run(scenario())


async def drained(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


# -- before the first stream -----------------------------------------------------------------------------------


def test_a_device_is_warm_before_it_serves(
    machine: Machine,
    config: BackendConfig,
    liveportrait_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Engines are built, also of what pastes, and the network that draws is replayed."""
    write_image(tmp_path / "demo.png", face())
    monkeypatch.setattr("lp_edge.runtime.server.core.demo_picture", lambda: tmp_path / "demo.png")
    world = machine()
    caplog.set_level(logging.INFO, "lp_edge")

    async def scenario() -> None:
        async with serving(liveportrait_bundle, backend=config) as server:
            assert "device 0: warmed up in" in caplog.text
            built = len(world.builds)
            assert any("paste_still" in path.name for path in (tmp_path / "engines").iterdir())
            await driven(await server.animate(await server.register(face()), mode=LOSSLESS), driver(2))
            assert len(world.builds) == built

    run(scenario())


def test_a_bundle_that_sees_no_face_in_the_demo_picture_serves_all_the_same(
    machine: Machine, config: BackendConfig, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_image(tmp_path / "demo.png", face(None))
    monkeypatch.setattr("lp_edge.runtime.server.core.demo_picture", lambda: tmp_path / "demo.png")
    machine()

    async def scenario() -> None:
        async with serving(toy_bundle, backend=config) as server:
            await driven(await server.animate(await server.register(face()), mode=LOSSLESS), driver(2))

    run(scenario())
