"""Who asks for frames in benchmarks/server.py. Each class lives in a process of its own (:class:`_server_process.Helper`).

``InProcess`` does the work without a server. ``Client`` has one frame, or eight, on the way, through :mod:`lp_edge.client` or through the bare
stubs. ``Crowd`` is many live streams, ``Cycles`` one after the other, ``Witness`` a stream whose answers are counted, ``Victim`` one that
is to be killed, ``Survivor`` one whose server is killed.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import grpc
import numpy as np
import numpy.typing as npt

from lp_edge.client import Client as LibraryClient
from lp_edge.client import Output
from lp_edge.engines.backends import BackendConfig
from lp_edge.proto.v1 import (
    animation_pb2,
    animation_pb2_grpc,
    common_pb2,
    portraits_pb2,
    portraits_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.image import encode_image
from lp_edge.runtime.server.codec import decode_picture
from lp_edge.runtime.shared_frames import FrameLayout, SharedFrames, SlotRing
from lp_edge.runtime.stopwatch import Stopwatch

T = TypeVar("T")
U8 = npt.NDArray[np.uint8]
Driver = bytes | np.ndarray | common_pb2.Motion  # a JPEG, pixels for shared memory, motion
Request = animation_pb2.AnimateRequest

STEP_US = 40_000
WINDOW = 8
SENT_QUALITY, DRAWN_QUALITY = 95, 90  # defaults of lp_edge.client and of OutputOptions
_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),  # every client its own connection
]


def unpack(jpeg: bytes) -> U8:
    """RGB of a JPEG, as directly as OpenCV can."""
    bgr = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def pack(rgb: U8, quality: int) -> bytes:
    """JPEG of RGB, as directly as OpenCV can."""
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


@dataclass(frozen=True)
class Material:
    """What every side works with.

    Attributes:
        portrait: a PNG.
        frames: driving frames, JPEGs of one size.
        bundle, backend: the networks.
    """

    portrait: bytes
    frames: tuple[bytes, ...]
    bundle: Path | None
    backend: str

    def frame(self, index: int) -> bytes:
        """Driving frame ``index`` of an endless driver, see :func:`bounced`."""
        return bounced(self.frames, index)

    def pixels(self) -> list[U8]:
        """The frames as arrays."""
        return [unpack(jpeg) for jpeg in self.frames]


def bounced(items: Sequence[T], index: int) -> T:
    """Item ``index`` of a sequence that goes forth and back without end: motion has no jumps."""
    last = len(items) - 1
    return items[last - abs(index % (2 * last) - last)] if last else items[0]


class InProcess:
    """The same work through the Python API, frame by frame."""

    def __init__(self, material: Material) -> None:
        self._material = material
        self._animator = Animator(material.bundle, backend=BackendConfig(material.backend))
        self._rgb, self._pixels = unpack(material.portrait), material.pixels()
        self._portraits = self._animator.prepare_source(self._rgb)

    def device(self) -> str:
        """The device in words."""
        return self._animator.finder.mesh.runner.device

    def throughput(self, kind: str, count: int) -> dict[str, Any]:
        """When each frame was done; ``jpeg``: from JPEG to JPEG, ``arrays``: from array to array."""
        live = self._animator.live(self._rgb, portraits=self._portraits)
        frames = self._pixels
        done, last = [], None
        for i in range(count):
            rgb = unpack(self._material.frame(i)) if kind == "jpeg" else bounced(frames, i)
            last = live.step(rgb, i * STEP_US / 1e6).rgb
            if kind == "jpeg":
                pack(last, DRAWN_QUALITY)
            done.append(time.perf_counter())
        return {"done": done, "last": last}

    def latency(self, count: int) -> list[float]:
        """Seconds of the compute stages of each frame, one after the other."""
        frames = self._pixels
        watch = Stopwatch()
        live = self._animator.live(self._rgb, portraits=self._portraits, watch=watch)
        spent, before = [], 0.0
        for i in range(count):
            live.step(bounced(frames, i), i * STEP_US / 1e6)
            total = sum(sum(s) for s in watch.seconds.values())
            spent.append(total - before)
            before = total
        return spent

    def close(self) -> None:
        """Free the networks."""
        self._animator.close()


# -- the bare stubs ----------------------------------------------------------------------------------------


def channel_to(address: str) -> Any:
    """A connection of its own."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


async def register(channel: Any, picture: bytes) -> Any:
    """Let the server prepare a portrait."""
    stub = portraits_pb2_grpc.PortraitServiceStub(channel)
    image = common_pb2.Image(encoded=common_pb2.EncodedImage(data=picture))
    answer = await stub.RegisterPortrait(portraits_pb2.RegisterPortraitRequest(image=image), timeout=60)
    return answer.portrait


async def neutral_of(channel: Any) -> common_pb2.Motion:
    """The server's motion at rest."""
    stub = server_pb2_grpc.ServerServiceStub(channel)
    return (await stub.GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=30)).motion.neutral


def nodding(neutral: common_pb2.Motion, index: int) -> common_pb2.Motion:
    """A head that turns, nods and speaks a little."""
    motion = common_pb2.Motion()
    motion.CopyFrom(neutral)
    motion.yaw, motion.pitch = 8 * math.sin(index / 9), 5 * math.sin(index / 6)
    motion.lip_ratio = 0.2 + 0.2 * math.sin(index / 3)
    return motion


class Wire:
    """One Animate call over the bare stubs: as little work for an answer as can be."""

    def __init__(self, call: Any, side: tuple[int, int] | None) -> None:
        self.call, self._sides, self.sequence = call, side, 0
        self._frames: SharedFrames | None = None
        self._slots = SlotRing("driving", WINDOW) if side else None
        self._taken = 0

    @classmethod
    async def open(
        cls,
        channel: Any,
        portrait: str,
        *,
        lossless: bool = False,
        shared: tuple[int, int] | None = None,
        pictures: bool = True,
        mapped: bool = True,
    ) -> Wire:
        """Begin a call and wait for its first answer.

        Args:
            shared: bytes of a driving and of a result slot; None = messages.
            pictures: False = no pictures come back.
            mapped: False = never say that the shared memory is mapped.
        """
        output = common_pb2.OutputOptions(
            encoding=common_pb2.OUTPUT_ENCODING_NONE
            if not pictures
            else common_pb2.OUTPUT_ENCODING_SHARED_MEMORY
            if shared
            else common_pb2.OUTPUT_ENCODING_JPEG
        )
        mode = animation_pb2.STREAM_MODE_LOSSLESS if lossless else animation_pb2.STREAM_MODE_LIVE
        config = animation_pb2.AnimateConfig(portrait_ids=[portrait], mode=mode, output=output)
        if shared:
            config.shared_memory.CopyFrom(
                animation_pb2.SharedMemoryRequest(
                    driving_slots=WINDOW,
                    driving_slot_bytes=shared[0],
                    result_slots=WINDOW,
                    result_slot_bytes=shared[1],
                )
            )
        wire = cls(animation_pb2_grpc.AnimationServiceStub(channel).Animate(), shared)
        await wire.call.write(Request(config=config))
        started = await wire.call.read()  # raises where the call ends with an error
        if shared and mapped:
            layout = FrameLayout(WINDOW, shared[0], WINDOW, shared[1])
            wire._frames = SharedFrames.attach(started.started.shared_memory.name, layout)
            await wire.call.write(Request(shared_memory_mapped=animation_pb2.SharedMemoryMapped()))
        return wire

    @property
    def room(self) -> bool:
        """Whether a frame finds a slot; always so without shared memory."""
        return self._slots is None or self._slots.free > 0

    async def send(self, driver: Driver) -> None:
        """Send the next frame; there must be :attr:`room`."""
        self.sequence += 1
        frame = animation_pb2.DrivingFrame(sequence=self.sequence, timestamp_us=(self.sequence - 1) * STEP_US)
        if isinstance(driver, bytes):
            frame.image.encoded.data = driver
        elif isinstance(driver, common_pb2.Motion):
            frame.motion.CopyFrom(driver)
        else:
            assert self._slots is not None and self._frames is not None
            slot = self._slots.take(self.sequence)
            assert slot is not None, "no room for a frame"
            self._frames.write("driving", slot, driver)
            frame.image.shared.CopyFrom(
                common_pb2.SharedImage(slot=slot, width=driver.shape[1], height=driver.shape[0])
            )
        await self.call.write(Request(frame=frame, results_taken=self._taken))

    async def receive(self) -> Any:
        """The next answer, a frame or a notice; None at the end. Raises ``grpc.aio.AioRpcError`` where the end is no good one."""
        response = await self.call.read()
        if response is grpc.aio.EOF:
            return None
        if self._slots is not None and response.driving_taken:
            self._slots.acknowledge(response.driving_taken)
        return response

    def pixels(self, frame: animation_pb2.AnimatedFrame) -> U8:
        """The picture of an answer; its slot is free afterwards."""
        (picture,) = frame.pictures
        if self._frames is None:
            return decode_picture(picture)
        rgb = self._frames.read("result", picture.slot, picture.height, picture.width)
        self._taken = frame.sequence
        return rgb

    async def finish(self) -> None:
        """Nothing more will be sent; lossless with shared memory: once all is answered."""
        await self.call.done_writing()

    async def close(self) -> None:
        """End the call at once; one that has ended keeps its status."""
        self.call.cancel()
        await self.call.code()  # gRPC's tasks end, too
        if self._frames is not None:
            self._frames.close()


class _Looped:
    """Its coroutines run in an event loop that lives as long as the object."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)


class Client(_Looped):
    """One stream at a time, through the client library and through the bare stubs."""

    def __init__(self, address: str, material: Material) -> None:
        super().__init__()
        self._address, self._material = address, material
        self._library = LibraryClient(address, reconnect=False)
        self._known = self._library.register(material.portrait)
        self._channel = self._run(self._connect())
        portrait = self._run(register(self._channel, material.portrait))
        self._id = portrait.id
        self._pixels = material.pixels()
        height, width = self._pixels[0].shape[:2]
        self._driving_size = (width, height)
        side = 640  # what a crop has at most where it is not pasted back
        result = 3 * max(portrait.width * portrait.height, side * side)
        self._shared = (3 * width * height, result)

    async def _connect(self) -> Any:
        return channel_to(self._address)

    def fill(self, streams: int, count: int) -> None:
        """Lossless streams at once: the server's pools then have all threads that it may need later."""

        async def work() -> None:
            wires = [await Wire.open(self._channel, self._id, lossless=True) for _ in range(streams)]
            for wire in wires:
                for i in range(count):
                    await wire.send(self._material.frame(i))
                await wire.finish()
            for wire in wires:
                while await wire.receive() is not None:
                    pass

        self._run(work())

    def portrait(self) -> str:
        """The id of a portrait that stays while this client lives."""
        return str(self._id)

    def info(self) -> dict[str, Any]:
        """What the server says of itself."""
        info = self._library.info()
        device = info.devices[0]
        return {
            "device": device.name,
            "backend": device.backend,
            "threads": device.threads,
            "manifest_sha256": info.manifest_sha256,
            "versions": dict(info.versions),
            "max_batch": info.limits.max_batch,
            "max_batch_wait_s": info.limits.max_batch_wait,
        }

    def throughput(self, via: str, kind: str, count: int) -> dict[str, Any]:
        """When each answer of a lossless stream had come, eight frames on the way; ``jpeg`` or ``shm``.

        A JPEG that comes back stays one, as in the work without a server; pixels are copied out of shared memory.
        """
        frames: list[Any] = [
            bounced(self._pixels if kind == "shm" else self._material.frames, i) for i in range(count)
        ]
        work = self._drive if via == "client" else self._window
        done, last = work(kind, frames)
        return {"done": done, "last": last}

    def _open(self, kind: str, mode: Any) -> Any:
        return self._library.animate(
            self._known,
            mode=mode,
            output=Output() if kind == "shm" else Output("jpeg"),
            shared_memory=kind == "shm",
            driving_size=self._driving_size,
        )

    def _drive(self, kind: str, frames: Sequence[Any]) -> tuple[list[float], U8 | None]:
        done, last = [], None
        with self._open(kind, "lossless") as stream:
            for frame in stream.drive((i * STEP_US / 1e6, f) for i, f in enumerate(frames)):
                last = frame
                done.append(time.perf_counter())
        return done, None if last is None else last.rgb

    def _window(self, kind: str, frames: Sequence[Any]) -> tuple[list[float], U8 | None]:
        async def work() -> tuple[list[float], U8 | None]:
            wire = await Wire.open(
                self._channel, self._id, lossless=True, shared=self._shared if kind == "shm" else None
            )
            done: list[float] = []
            last = None
            while len(done) < len(frames):
                while wire.sequence < min(len(frames), len(done) + WINDOW):
                    await wire.send(frames[wire.sequence])
                response = await wire.receive()
                if response.WhichOneof("message") == "frame":
                    if kind == "shm":
                        last = wire.pixels(response.frame)
                    done.append(time.perf_counter())
            await wire.finish()
            if kind != "shm":
                last = wire.pixels(response.frame)
            while await wire.receive() is not None:
                pass
            await wire.close()
            return done, last

        return self._run(work())

    def latency(self, via: str, kind: str, count: int) -> list[dict[str, Any]]:
        """Round trips of a live stream from array to array, one frame on the way; see ``_server_figures.parts_of``."""
        frames = [bounced(self._pixels, i) for i in range(count)]
        return self._trips(kind, frames) if via == "client" else self._wire_trips(kind, frames)

    def _trips(self, kind: str, frames: Sequence[U8]) -> list[dict[str, Any]]:
        trips = []
        with self._open(kind, "live") as stream:
            for i, rgb in enumerate(frames):
                begun = time.perf_counter()
                driver = encode_image(rgb, ".jpg", quality=SENT_QUALITY) if kind == "jpeg" else rgb
                sent = time.perf_counter()
                stream.send(driver, timestamp=i * STEP_US / 1e6)
                frame = stream.receive(timeout=30.0)
                come = time.perf_counter()
                assert frame is not None and frame.rgb.size
                ended = time.perf_counter()
                stages = [(s.name, s.start, s.duration) for s in frame.timings.stages]
                trips.append(_trip(begun, sent, come, ended, frame.timings.total, stages))
        return trips

    def _wire_trips(self, kind: str, frames: Sequence[U8]) -> list[dict[str, Any]]:
        async def work() -> list[dict[str, Any]]:
            wire = await Wire.open(self._channel, self._id, shared=self._shared if kind == "shm" else None)
            trips = []
            for rgb in frames:
                begun = time.perf_counter()
                driver = encode_image(rgb, ".jpg", quality=SENT_QUALITY) if kind == "jpeg" else rgb
                sent = time.perf_counter()
                await wire.send(driver)
                while (response := await wire.receive()).WhichOneof("message") != "frame":
                    pass
                come = time.perf_counter()
                wire.pixels(response.frame)
                ended = time.perf_counter()
                timings = response.frame.timings
                stages = [(s.stage, s.start_us / 1e6, s.duration_us / 1e6) for s in timings.stages]
                trips.append(_trip(begun, sent, come, ended, timings.total_us / 1e6, stages))
            await wire.close()
            return trips

        return self._run(work())

    def close(self) -> None:
        """End the connections."""
        self._library.close()
        self._run(self._channel.close())
        self._loop.close()


def _trip(
    begun: float, sent: float, come: float, ended: float, total: float, stages: list[tuple[str, float, float]]
) -> dict[str, Any]:
    return {
        "client_encode": sent - begun,
        "wire": come - sent,
        "client_decode": ended - come,
        "total": total,
        "stages": stages,
    }


# -- many streams ------------------------------------------------------------------------------------------


class Crowd(_Looped):
    """Live streams at once, each with a connection, a portrait and a place in the driver of its own.

    Args:
        address, material: as ever.
        portraits: one picture for each stream.
        driver: ``jpeg`` or ``motion``. Pictures come back as JPEG and are not decoded.
    """

    def __init__(self, address: str, material: Material, portraits: Sequence[bytes], driver: str) -> None:
        super().__init__()
        self._material, self._motion = material, driver == "motion"
        self._run(self._connect(address, portraits))

    async def _connect(self, address: str, portraits: Sequence[bytes]) -> None:
        self._channels = [channel_to(address) for _ in portraits]
        self._ids = [
            (await register(channel, picture)).id
            for channel, picture in zip(self._channels, portraits, strict=True)
        ]
        self._neutral = await neutral_of(self._channels[0])

    def run(self, streams: int, rate: float, warmup_s: float, seconds: float) -> dict[str, Any]:
        """Drive that many streams.

        Args:
            rate: frames a second that each sends, whatever comes back; 0 = the next one when one is answered, two on the way.
        """
        return self._run(self._crowd(streams, rate, warmup_s, seconds))

    async def _crowd(self, streams: int, rate: float, warmup_s: float, seconds: float) -> dict[str, Any]:
        wires = [
            await Wire.open(channel, portrait)
            for channel, portrait in zip(self._channels[:streams], self._ids, strict=False)
        ]
        start = time.perf_counter()
        window = (start + warmup_s, start + warmup_s + seconds)
        tasks = [
            asyncio.ensure_future(self._stream(wire, i, start + i / (streams * (rate or 100)), rate, window))
            for i, wire in enumerate(wires)
        ]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            for wire in wires:
                await wire.close()
        return {"streams": found}

    def _driver(self, index: int, number: int) -> Driver:
        at = 7 * index + number
        return nodding(self._neutral, at) if self._motion else self._material.frame(at)

    async def _stream(
        self, wire: Wire, index: int, start: float, rate: float, window: tuple[float, float]
    ) -> dict[str, Any]:
        """What comes back within ``window``: latencies of the answers and when they came; frames sent, dropped."""
        sent: dict[int, float] = {}
        found: dict[str, Any] = {"latency": [], "at": [], "dropped": 0, "sent": 0}
        credit = asyncio.Semaphore(2)

        async def send() -> None:
            number = 0
            while (now := time.perf_counter()) < window[1]:
                if rate:
                    await asyncio.sleep(max(0.0, start + number / rate - now))
                else:
                    await credit.acquire()
                sent[wire.sequence + 1] = now = time.perf_counter()
                found["sent"] += window[0] <= now < window[1]
                await wire.send(self._driver(index, number))
                number += 1

        async def take() -> None:
            while (response := await wire.receive()) is not None:
                now = time.perf_counter()
                inside = window[0] <= now < window[1]
                kind = response.WhichOneof("message")
                if kind == "frame":
                    begun = sent.pop(response.frame.sequence)
                    if inside:
                        found["latency"].append(now - begun)
                        found["at"].append(now - window[0])
                elif kind == "skipped":
                    sent.pop(response.skipped.sequence)
                    found["dropped"] += inside
                credit.release()
            raise RuntimeError("a stream has ended")

        tasks = [asyncio.ensure_future(send()), asyncio.ensure_future(take())]
        left = window[1] - time.perf_counter()
        done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        return found

    def close(self) -> None:
        """End the connections."""

        async def work() -> None:
            for channel in self._channels:
                await channel.close()

        self._run(work())
        self._loop.close()


class Cycles:
    """Connect, register, animate, delete, disconnect, through the client library, again and again."""

    def __init__(self, address: str, material: Material) -> None:
        self._address, self._material = address, material
        self._pixels = material.pixels()[:3]

    def run(self, first: int, count: int) -> int:
        """Cycles ``first`` to ``first + count - 1``; odd ones through shared memory, every third ends in mid-stream.

        Returns:
            Answers that came.
        """
        answers = 0
        for number in range(first, first + count):
            with LibraryClient(self._address, reconnect=False) as client:
                portrait = client.register(self._material.portrait)
                with client.animate(
                    portrait,
                    mode="lossless",
                    shared_memory=bool(number % 2),
                    driving_size=self._pixels[0].shape[1::-1],
                    output=Output() if number % 2 else Output("jpeg"),
                ) as stream:
                    for rgb in self._pixels:
                        stream.send(rgb)
                    if number % 3 == 0:
                        answers += stream.receive(timeout=30.0) is not None
                    else:
                        stream.finish()
                        answers += sum(1 for _ in stream)
                client.delete(portrait)
        return answers


class _Background:
    """Its coroutine ``_work`` runs in a thread until :meth:`stop`."""

    def __init__(self, address: str, material: Material) -> None:
        self._address, self._material = address, material
        self._stopping = threading.Event()
        self._under_way = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._guarded()), daemon=True)
        self.error: str | None = None
        self.failed_at: float | None = None

    async def _guarded(self) -> None:
        try:
            await self._work()
        except grpc.aio.AioRpcError as error:
            self.error, self.failed_at = error.code().name, time.perf_counter()
        except Exception as error:  # noqa: BLE001 - told by stop()
            self.error, self.failed_at = repr(error), time.perf_counter()
        self._under_way.set()

    async def _work(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Begin, and wait until answers come."""
        self._thread.start()
        if not self._under_way.wait(60) or self.error:
            raise RuntimeError(f"no answers: {self.error}")


class Witness(_Background):
    """A lossless stream at a steady rate, all of whose answers are noted."""

    def __init__(self, address: str, material: Material, rate: float) -> None:
        super().__init__(address, material)
        self._rate, self._wire = rate, None
        self._sequences: list[int] = []
        self._at: list[float] = []

    async def _work(self) -> None:
        channel = channel_to(self._address)
        try:
            portrait = await register(channel, self._material.portrait)
            self._wire = wire = await Wire.open(channel, portrait.id, lossless=True)
            sender = asyncio.ensure_future(self._send(wire))
            try:
                while (response := await wire.receive()) is not None:
                    if response.WhichOneof("message") == "frame":
                        self._sequences.append(response.frame.sequence)
                        self._at.append(time.perf_counter())
                        self._under_way.set()
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
        finally:
            await channel.close()

    async def _send(self, wire: Wire) -> None:
        while not self._stopping.is_set():
            await wire.send(self._material.frame(wire.sequence))
            await asyncio.sleep(1 / self._rate)
        await wire.finish()

    def stop(self) -> dict[str, Any]:
        """Send no more, wait for what is on the way, tell what came."""
        self._stopping.set()
        self._thread.join(60)
        return {
            "sent": self._wire.sequence if self._wire else 0,
            "sequences": self._sequences,
            "at": self._at,
            "error": self.error,
            "failed_at": self.failed_at,
            "ended": not self._thread.is_alive(),
        }


class Victim(_Background):
    """A stream that sends and receives until its process is killed.

    Args:
        kind: ``jpeg`` or ``shm`` in live mode, ``jpeg lossless``, or ``unmapped``: shared memory that it never maps.
    """

    def __init__(self, address: str, material: Material, portrait: str, kind: str) -> None:
        super().__init__(address, material)
        self._portrait, self._kind = portrait, kind

    async def _work(self) -> None:
        channel = channel_to(self._address)
        kind = self._kind
        pixels = self._material.pixels()
        shared = (pixels[0].nbytes, 3 * 1280 * 1280) if kind in ("shm", "unmapped") else None
        wire = await Wire.open(
            channel, self._portrait, lossless="lossless" in kind, shared=shared, mapped=kind != "unmapped"
        )
        if kind == "unmapped":
            self._under_way.set()
            await asyncio.sleep(600)
        answered = 0
        while True:
            while wire.sequence < answered + 4 and wire.room:
                at = wire.sequence
                await wire.send(bounced(pixels if kind == "shm" else self._material.frames, at))
            response = await wire.receive()
            kind_of = response.WhichOneof("message")
            answered += kind_of in ("frame", "skipped")
            if kind_of == "frame":
                if kind == "shm":
                    wire.pixels(response.frame)
                if answered >= 3:
                    self._under_way.set()


class Survivor:
    """A lossless stream of the client library at a steady rate, which reconnects by itself."""

    def __init__(self, address: str, material: Material, rate: float, kind: str) -> None:
        self._client = LibraryClient(address, reconnect_timeout_s=60.0)
        self._rate = rate
        self._drivers = material.pixels() if kind == "shm" else material.frames
        portrait = self._client.register(material.portrait)
        self._stream = self._client.animate(
            portrait,
            mode="lossless",
            output=Output() if kind == "shm" else Output("jpeg"),
            shared_memory=kind == "shm",
            driving_size=unpack(material.frames[0]).shape[1::-1],
        )
        self._sequences: list[int] = []
        self._at: list[float] = []
        self._sent = 0
        self._stopping, self._under_way = threading.Event(), threading.Event()
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._noted, args=(work,), daemon=True)
            for work in (self._send, self._take)
        ]

    def _noted(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - told by stop()
            self._errors.append(f"{type(error).__name__}: {error}")
        self._under_way.set()

    def _send(self) -> None:
        while not self._stopping.wait(1 / self._rate):
            driver = bounced(self._drivers, self._sent)
            self._sent = self._stream.send(driver, timestamp=self._sent * STEP_US / 1e6)
        self._stream.finish()

    def _take(self) -> None:
        for frame in self._stream:
            self._sequences.append(frame.sequence)
            self._at.append(time.perf_counter())
            self._under_way.set()

    def start(self) -> None:
        """Begin, and wait until answers come."""
        for thread in self._threads:
            thread.start()
        if not self._under_way.wait(60) or self._errors:
            raise RuntimeError(f"no answers: {self._errors}")

    def count(self) -> int:
        """Answers so far."""
        return len(self._sequences)

    def stop(self) -> dict[str, Any]:
        """Send no more, wait for what is on the way, tell what came."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
        return {
            "sent": self._sent,
            "sequences": self._sequences,
            "at": self._at,
            "errors": self._errors,
            "reconnects": self._stream.reconnects,
        }

    def close(self) -> None:
        """End the connection."""
        self._client.close()
