"""A server in the test's own event loop, with the toy networks, and the client's end of its calls.

Tests are plain functions that run one coroutine::

    def test_something(serve) -> None:
        async def scenario() -> None:
            async with serve(idle_timeout_s=1.0) as server:
                call = await server.animate(mode=LOSSLESS)
                ...
        run(scenario())
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.runner import Runner
from lp_edge.proto.v1 import (
    animation_pb2,
    animation_pb2_grpc,
    common_pb2,
    portraits_pb2,
    portraits_pb2_grpc,
    server_pb2_grpc,
)
from lp_edge.runtime.server.config import ServerConfig
from lp_edge.runtime.server.core import Core
from lp_edge.runtime.server.metrics import Metrics
from lp_edge.runtime.server.service import add_services
from lp_edge.runtime.server.wire import ERROR_METADATA

SECONDS = 30.0
"""What anything may take on a busy machine; nothing here waits so long when all is well."""
LIVE, LOSSLESS = animation_pb2.STREAM_MODE_LIVE, animation_pb2.STREAM_MODE_LOSSLESS
RAW = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_RAW)
NONE = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_NONE)
Request, Response = animation_pb2.AnimateRequest, animation_pb2.AnimateResponse


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; one that hangs fails."""
    asyncio.run(asyncio.wait_for(scenario, SECONDS))


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + SECONDS / 2
    while not condition():
        assert time.monotonic() < end, f"not in {SECONDS / 2:g} s: {what}"
        await asyncio.sleep(0.005)


def face(
    x: int | None = 100, y: int = 100, side: int = 80, *, width: int = 240, height: int = 200, blue: int = 255
) -> np.ndarray:
    """A picture with a face of the toy networks: a white square, its mouth open with less ``blue``; x None = no face."""
    out = np.zeros((height, width, 3), np.uint8)
    if x is not None:
        out[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = (255, 255, blue)
    return out


def raw(rgb: np.ndarray) -> common_pb2.Image:
    """A picture as plain pixels."""
    return common_pb2.Image(
        raw=common_pb2.RawImage(width=rgb.shape[1], height=rgb.shape[0], data=rgb.tobytes())
    )


def pixels(picture: common_pb2.Picture) -> np.ndarray:
    """The pixels of a RAW result."""
    assert picture.encoding == common_pb2.OUTPUT_ENCODING_RAW
    return np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width, 3)


def segments() -> set[str]:
    """Names of lp-edge's shared memory on this machine, of this process."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"lp-edge-{os.getpid()}-")}


def alive(kind: type) -> int:
    """How many objects of a class there are."""
    gc.collect()
    return sum(type(item) is kind for item in gc.get_objects())


class Gate:
    """Counts the calls of a network and holds them while it is shut.

    Args:
        runner: the network as the device's worker has wrapped it.
    """

    def __init__(self, runner: Runner) -> None:
        self._inner = runner.inner  # type: ignore[attr-defined]
        self._infer, self._open, self._lock = self._inner.infer, threading.Event(), threading.Lock()
        self.calls = 0
        self._open.set()
        self._inner.infer = self._held

    def _held(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self.calls += 1
        if not self._open.wait(SECONDS / 3):
            raise TimeoutError("the gate was never opened")
        return self._infer(*args, **kwargs)

    def shut(self) -> None:
        """Hold all calls from now on."""
        self._open.clear()

    def open(self) -> None:
        """Let them run."""
        self._open.set()


class Call:
    """The client's end of one Animate call."""

    def __init__(self, call: Any) -> None:
        self.call, self.started = call, animation_pb2.StreamStarted()
        self.sent = 0

    async def write(self, **fields: Any) -> None:
        """Send a message."""
        await self.call.write(Request(**fields))

    async def frame(self, picture: np.ndarray | bytes | common_pb2.Image, **fields: Any) -> int:
        """Send a picture as the next frame, 40 ms after the one before; ``fields`` go before. Gives its number."""
        if isinstance(picture, np.ndarray):
            picture = raw(picture)
        elif isinstance(picture, bytes):
            picture = common_pb2.Image(encoded=common_pb2.EncodedImage(data=picture))
        return await self._frame({"image": picture}, fields)

    async def motion(self, motion: common_pb2.Motion, **fields: Any) -> int:
        """Send a motion as the next frame."""
        return await self._frame({"motion": motion}, fields)

    async def _frame(self, driver: dict[str, Any], fields: dict[str, Any]) -> int:
        self.sent += 1
        message = animation_pb2.DrivingFrame(
            sequence=self.sent, timestamp_us=(self.sent - 1) * 40_000, **driver
        )
        await self.write(frame=message, **fields)
        return self.sent

    async def read(self) -> Response | None:
        """The next answer; None at the end of a call that ended well."""
        reading = asyncio.ensure_future(self.call.read())
        # not wait_for, which loses a cancellation that comes together with the answer (Python before 3.12)
        done, _ = await asyncio.wait([reading], timeout=SECONDS / 2)
        assert done, f"no answer in {SECONDS / 2:g} s"
        return None if reading.result() is grpc.aio.EOF else reading.result()

    async def answer(self) -> animation_pb2.AnimatedFrame:
        """The next frame; fails on anything else."""
        answer = await self.read()
        assert answer is not None, "the call ended"
        assert answer.WhichOneof("message") == "frame", answer
        return answer.frame

    async def end(self) -> list[Response]:
        """Close the sending side and read to the end, which must be good."""
        await self.call.done_writing()
        answers = []
        while (answer := await self.read()) is not None:
            answers.append(answer)
        assert await self.call.code() == grpc.StatusCode.OK
        return answers

    async def failure(self) -> tuple[grpc.StatusCode, common_pb2.ErrorDetail]:
        """Read to the end, which must be an error: its status and its detail."""
        return await failure_of(self._drain())

    async def _drain(self) -> None:
        while await self.read() is not None:
            pass

    async def cancelled(self) -> None:
        """Cancel it."""
        self.call.cancel()


async def failure_of(work: Any) -> tuple[grpc.StatusCode, common_pb2.ErrorDetail]:
    """Await what must fail: its status and the detail that it carries."""
    try:
        await work
    except grpc.aio.AioRpcError as error:
        values = {k: v for k, v in error.trailing_metadata() or ()}
        detail = common_pb2.ErrorDetail()
        detail.ParseFromString(values.get(ERROR_METADATA, b""))
        return error.code(), detail
    raise AssertionError("the call ended well")


class Served:
    """A server and a client's channel to it.

    Attributes:
        core: what the services work with.
        portraits, animation, info: stubs.
    """

    def __init__(self, core: Core, channel: grpc.aio.Channel, target: str) -> None:
        self.core, self.channel, self.target = core, channel, target
        self.portraits = portraits_pb2_grpc.PortraitServiceStub(channel)
        self.animation = animation_pb2_grpc.AnimationServiceStub(channel)
        self.info = server_pb2_grpc.ServerServiceStub(channel)

    async def register(self, rgb: np.ndarray | None = None, **options: Any) -> str:
        """Register a picture and give its id."""
        request = portraits_pb2.RegisterPortraitRequest(
            image=raw(face() if rgb is None else rgb), options=portraits_pb2.PortraitOptions(**options)
        )
        return (await self.portraits.RegisterPortrait(request)).portrait.id

    def open(self, timeout: float | None = None) -> Call:
        """An Animate call of which nothing is sent yet."""
        return Call(self.animation.Animate(timeout=timeout))

    async def animate(
        self, portraits: Sequence[str] | str | None = None, *, timeout: float | None = None, **config: Any
    ) -> Call:
        """An Animate call that has started; without portraits one is registered."""
        ids = await self.register() if portraits is None else portraits
        config.setdefault("output", RAW)
        call = self.open(timeout)
        await call.write(
            config=animation_pb2.AnimateConfig(portrait_ids=[ids] if isinstance(ids, str) else ids, **config)
        )
        answer = await call.read()
        assert answer is not None
        assert answer.WhichOneof("message") == "started"
        call.started = answer.started
        return call

    async def idle(self) -> None:
        """Wait until no stream is open and no network call waits."""
        await until(
            lambda: not self.core.streams and not any(d.worker.pending for d in self.core.devices),
            f"streams end: {list(self.core.streams)}",
        )
        for portrait in self.core.store.list():
            assert portrait.active == 0


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(logging.Formatter().format(record))


@asynccontextmanager
async def serving(bundle: Path, *, tolerate: str = "", **config: Any) -> AsyncIterator[Served]:
    """Serve until the end of the block; what is logged as an error meanwhile fails it, unless it contains ``tolerate``."""
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    config.setdefault("backend", BackendConfig("cpu", threads=1))
    settings = ServerConfig(bundle=bundle, **config)
    core = Core(settings, Metrics())
    try:
        await asyncio.get_running_loop().run_in_executor(None, core.open)
        options = [(f"grpc.max_{way}_message_length", 64 << 20) for way in ("send", "receive")]
        server = grpc.aio.server(options=options)
        add_services(server, core)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        target = f"127.0.0.1:{port}"
        try:
            async with grpc.aio.insecure_channel(target, options=options) as channel:
                yield Served(core, channel, target)
        finally:
            await server.stop(0.5)
    finally:
        await asyncio.get_running_loop().run_in_executor(None, core.close)
        logging.getLogger().removeHandler(errors)
    bad = [text for text in errors.records if not tolerate or tolerate not in text]
    assert not bad, "\n".join(bad)
