"""One Animate call: frames in, animated frames out.

::

    reader ─> inbox ─> [decode] ─> [read motion] ─> [draw] ─> [encode, write]      lossless: four stages at work at once
    reader ─> newest ─> [decode, read motion, draw, encode, write]                 live: one frame at a time

A stage is a task of the event loop that runs its work in a thread and hands the frame on through a queue of one place, so
nothing runs far ahead of the client that takes the results. In lossless mode a full inbox stops the reading, and HTTP/2's
flow control stops the sender; in live mode a frame that waits gives way to a newer one. Where a device draws, [draw] begins a
frame and [encode] waits for it. What is asked between two frames (options, neutral) travels with the next frame and takes
effect in each stage as that frame passes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

import numpy as np
import numpy.typing as npt

from lp_edge.errors import (
    ConfigError,
    LimitError,
    MediaError,
    ProtocolError,
)
from lp_edge.proto.v1 import animation_pb2, common_pb2
from lp_edge.runtime.cast import DrawnFrame
from lp_edge.runtime.driver import DriverFrame
from lp_edge.runtime.live import LivePuppet, LiveReader
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.server.codec import (
    OutputSettings,
    PictureEncoder,
    decode_image,
    encode_frame,
    output_settings,
)
from lp_edge.runtime.server.core import Core, Stream, count_frame, idle_error, stopping
from lp_edge.runtime.server.portraits import StoredPortrait
from lp_edge.runtime.server.wire import (
    FrameOrder,
    animate_options,
    face_state,
    frame_timings,
    motion_from_message,
    motion_to_message,
    portrait_options_message,
)
from lp_edge.runtime.shared_frames import FrameLayout, SharedFrames, SlotRing
from lp_edge.runtime.stopwatch import Stopwatch

__all__ = ["AnimateCall", "FrameWatch"]

U8 = npt.NDArray[np.uint8]
Request = animation_pb2.AnimateRequest
Response = animation_pb2.AnimateResponse
Write = Callable[[Response], Awaitable[None]]

_MAX_PORTRAITS = 8
_SKIPS = 256
_UNTAKEN = 64
"""Frames that a lossless stream reads beyond its queue while it waits for result slots: the message that frees one comes after them."""


class FrameWatch(Stopwatch):
    """Stages of one frame with the times of their beginnings.

    Attributes:
        received_ns: nanoseconds since the Unix epoch when it was made.
        stages: name, start in seconds after that, duration in seconds.
    """

    def __init__(self) -> None:
        self.received_ns = time.time_ns()
        self._origin = time.perf_counter()
        self.stages: list[tuple[str, float, float]] = []
        # seconds of the base class stay empty: a frame's stages are few and their order counts

    def add(self, stage: str, seconds: float) -> None:
        """Add a stage that ends now."""
        self.stages.append((stage, self.elapsed - seconds, seconds))

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._origin

    def by_stage(self) -> dict[str, float]:
        """Seconds of each stage."""
        sums: dict[str, float] = {}
        for stage, _, seconds in self.stages:
            sums[stage] = sums.get(stage, 0.0) + seconds
        return sums


@dataclass
class _Item:
    """A frame on its way through the stages."""

    message: animation_pb2.DrivingFrame
    watch: FrameWatch = field(default_factory=FrameWatch)
    options: list[AnimateOptions] | None = None
    neutral: tuple[Motion | None] | None = None
    rgb: U8 | None = None
    motion: Motion | None = None
    step: DriverFrame | None = None
    drawn: list[DrawnFrame] = field(default_factory=list)
    pictures: list[common_pb2.Picture] = field(default_factory=list)
    size: int = 0

    @property
    def seconds(self) -> Fraction:
        return Fraction(self.message.timestamp_us, 1_000_000)


def _no_configuration(kind: str | None) -> ProtocolError:
    """The error of a stream that ended before its configuration (None), or began with something else."""
    if kind is None:
        return ProtocolError("the stream ended without a message", "a configuration first", "send one")
    return ProtocolError(
        f"the first message is {kind}",
        "expected AnimateConfig, and only then anything else",
        "send config first",
    )


class AnimateCall:
    """An Animate call from its configuration to its end.

    Args:
        core: devices, portraits, threads.
        stream: the admitted stream.
        requests: the client's messages.
        write: sends an answer; returns when the transport has taken it.
    """

    def __init__(self, core: Core, stream: Stream, requests: AsyncIterator[Request], write: Write) -> None:
        self._core, self._stream, self._requests = core, stream, requests
        self._send, self._sending = write, asyncio.Lock()
        self._limits, self._family = core.config.limits, stream.device.animator.family
        self._space = core.space
        self._shared: SharedFrames | None = None
        self._driving: SlotRing | None = None
        self._results: SlotRing | None = None
        self._mapped = False
        self._slot_freed = asyncio.Event()
        self._inbox: list[_Item] = []
        # something came into the inbox, or out of it, or the client has finished
        self._changed = asyncio.Event()
        self._finished = False
        self._starved = False
        self._options: common_pb2.AnimationOptions | None = None
        self._neutral: tuple[Motion | None] | None = None
        self._order = FrameOrder()
        self._kind: str | None = None
        self._taken = 0
        self._busy = 0
        # What a client that does not read will never see need not be kept: AnimatedFrame.dropped tells the numbers.
        self._skips: deque[animation_pb2.FrameSkipped] = deque(maxlen=_SKIPS)
        self._skipped = asyncio.Event()
        self._answered = False  # all frames are
        self._heard = time.monotonic()
        self._blocked: dict[object, float] = {}  # what waits for the client, since when

    # -- life ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Answer until the client has finished sending and everything is answered.

        Raises:
            LpEdgeError: what ends the stream with an error status.
        """
        request = await self._core.next_message(self._stream, self._requests)
        if request is None or request.WhichOneof("message") != "config":
            raise _no_configuration(request and (request.WhichOneof("message") or "empty"))
        async with AsyncExitStack() as stack:
            await self._start(request.config, stack)
            works = [asyncio.ensure_future(work) for work in (*self._stages(), self._read_all())]
            teller = asyncio.ensure_future(self._tell_skipped())
            guards = [asyncio.ensure_future(guard) for guard in (self._watch(), self._tell_draining())]
            tasks = [*works, teller, *guards]
            try:
                await _first_error(works, [teller, *guards])
                self._answered = True
                self._skipped.set()
                await _first_error([teller], guards)  # the client hears of every frame before the end
            finally:
                self._stream.cancel()  # what still computes stops within a batch
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self, config: animation_pb2.AnimateConfig, stack: AsyncExitStack) -> None:
        ids = list(config.portrait_ids)
        if not 1 <= len(ids) <= _MAX_PORTRAITS:
            raise ConfigError(
                f"{len(ids)} portrait_ids",
                f"expected 1 to {_MAX_PORTRAITS}",
                "register a portrait and name it",
            )
        pinned = {i: stack.enter_context(self._core.store.pinned(i)) for i in dict.fromkeys(ids)}
        portraits = [pinned[i] for i in ids]
        self._stream.log.portraits = len(ids)
        if config.mode not in animation_pb2.StreamMode.values():
            raise ConfigError(f"mode {config.mode}", "expected a StreamMode", "choose LIVE or LOSSLESS")
        self._live = config.mode != animation_pb2.STREAM_MODE_LOSSLESS
        self._output: OutputSettings = output_settings(config.output, max_pixels=self._limits.max_pixels)
        self._layout = self._space.resolve(config.motion_layout)
        self._stored = portraits
        self._started_with = self._options_of(config.options, portraits)
        neutral = motion_from_message(config.neutral, self._space) if config.HasField("neutral") else None
        self._with_motion = config.with_motion
        await self._share(config, stack)
        finder = self._stream.device.animator.finder
        self._reader = LiveReader(self._family, finder, self._started_with[0])
        self._puppets = await self._core.compute(self._stream, self._make_puppets, neutral)
        self._encoders = [PictureEncoder(self._output) for _ in portraits]
        closing = stack.enter_context(ExitStack())
        for encoder in self._encoders:
            closing.callback(encoder.close)
        started = animation_pb2.StreamStarted(stream_id=self._stream.id)
        if self._shared is not None:
            layout = self._shared.layout
            started.shared_memory.CopyFrom(
                animation_pb2.SharedMemory(
                    name=self._shared.name,
                    size=layout.size,
                    driving_stride=layout.stride("driving"),
                    results_offset=layout.start("result"),
                    result_stride=layout.stride("result"),
                )
            )
        await self._answer(Response(started=started))

    def _make_puppets(self, neutral: Motion | None) -> list[LivePuppet]:
        device = self._stream.device.index
        return [
            LivePuppet(self._family, p.rgb, p.prepared(device), options, neutral)
            for p, options in zip(self._stored, self._started_with, strict=True)
        ]

    def _options_of(
        self, options: common_pb2.AnimationOptions, stored: Sequence[StoredPortrait]
    ) -> list[AnimateOptions]:
        """Options for each portrait: its registration's and the stream's."""
        family = self._family.name
        made = [animate_options(portrait_options_message(p.options), options, family) for p in stored]
        for portrait, its in zip(stored, made, strict=True):
            if not its.paste_back and len(portrait.faces) > 1:
                raise ConfigError(
                    f"paste_back is false for a portrait of {len(portrait.faces)} faces",
                    "expected one face where the crop alone is the answer",
                    "register the picture with one face, or paste back",
                )
        return made

    async def _share(self, config: animation_pb2.AnimateConfig, stack: AsyncExitStack) -> None:
        """Make the shared memory that the client asks for."""
        wants_results = self._output.encoding == "shared_memory"
        if not config.HasField("shared_memory"):
            if wants_results:
                raise ConfigError(
                    "results in shared memory without shared memory",
                    "expected shared_memory in the configuration",
                    "ask for result slots, or choose another encoding",
                )
            return
        asked, limit = config.shared_memory, self._limits.max_shared_memory_bytes
        if limit == 0:
            raise ConfigError("shared memory", "this server gives none", "send frames in messages")
        layout = FrameLayout(
            asked.driving_slots,
            asked.driving_slot_bytes,
            asked.result_slots,
            asked.result_slot_bytes,
            limit=limit,
        )
        if wants_results and layout.result_slots < len(config.portrait_ids):
            raise ConfigError(
                f"{layout.result_slots} result slots for {len(config.portrait_ids)} portraits",
                "expected one for each at least: the pictures of a frame are sent together",
                "ask for more",
            )

        def create() -> None:
            self._shared = SharedFrames.create(layout)

        stack.callback(self._close_shared)
        await self._core.codec(create)  # reserving pages takes 0.3 ms a megabyte
        self._driving = SlotRing("driving", layout.driving_slots) if layout.driving_slots else None
        self._results = SlotRing("result", layout.result_slots) if layout.result_slots else None

    def _close_shared(self) -> None:
        if self._shared is not None:
            self._shared.close()

    # -- the client's messages ---------------------------------------------------------------------------

    async def _read_all(self) -> None:
        async for request in self._requests:
            self._heard = time.monotonic()
            if request.results_taken:
                self._acknowledge(request.results_taken)
            kind = request.WhichOneof("message")
            if kind == "frame":
                await self._take_in(request.frame)
            elif kind == "options":
                self._options_of(request.options, self._stored[:1])  # a fault is told at once
                # the rest of the work is done once a frame, however many come
                self._options = request.options
            elif kind == "set_neutral":
                given = request.set_neutral
                motion = motion_from_message(given.motion, self._space) if given.HasField("motion") else None
                self._neutral = (motion,)
            elif kind == "shared_memory_mapped":
                if self._shared is None or self._mapped:
                    raise ProtocolError(
                        "shared_memory_mapped",
                        "expected once, after shared memory was announced",
                        "leave it out",
                    )
                self._mapped = True
                self._shared.unlink()
            elif kind == "config":
                raise ProtocolError("a second configuration", "expected only one", "open another stream")
            elif not request.results_taken:
                raise ProtocolError("an empty message", "expected a frame, options or …", "leave it out")
        self._finished = True
        self._changed.set()

    def _acknowledge(self, sequence: int) -> None:
        if self._results is None:
            raise ProtocolError("results_taken without result slots", "", "leave it out")
        self._results.acknowledge(sequence)
        self._slot_freed.set()

    async def _take_in(self, frame: animation_pb2.DrivingFrame) -> None:
        """Check a frame and put it in the inbox, which in lossless mode may have to wait for room."""
        self._order.follow(frame)
        kind = frame.WhichOneof("driver")
        if kind is None or self._kind not in (None, kind):
            raise ProtocolError(
                f"frame {frame.sequence} carries {kind or 'neither picture nor motion'}",
                f"expected {self._kind or 'a picture or motion'}",
                "keep to one kind in a stream",
            )
        self._kind = kind
        item = _Item(frame, size=frame.ByteSize())
        if kind == "motion":
            item.motion = motion_from_message(frame.motion, self._space)
        if kind == "image" and frame.image.WhichOneof("kind") == "shared":
            self._claim(frame)
        elif self._driving is not None:
            self._driving.skip(frame.sequence)
        if self._options is not None:
            item.options = self._options_of(self._options, self._stored)
        item.neutral, self._options, self._neutral = self._neutral, None, None
        if self._live:
            for older in self._inbox:
                self._drop(older, item)
            self._inbox = [item]
        else:
            # Beyond the queue no more than one message may have, so that waiting costs little whatever the frames are.
            waiting = item.size + sum(i.size for i in self._inbox[self._limits.max_queue :])
            if len(self._inbox) >= self._limits.max_queue + _UNTAKEN or (
                len(self._inbox) >= self._limits.max_queue and waiting > self._limits.max_message_bytes
            ):
                raise LimitError(
                    f"{len(self._inbox)} frames wait and all result slots are full",
                    "expected results_taken in time",
                    "say which results have been taken, and keep fewer frames unanswered than there are slots",
                )
            self._inbox.append(item)
        self._changed.set()
        # While results wait for a slot, reading goes on: what frees the slot may stand behind more frames.
        while not self._live and len(self._inbox) >= self._limits.max_queue and not self._starved:
            self._changed.clear()
            await self._changed.wait()

    def _claim(self, frame: animation_pb2.DrivingFrame) -> None:
        if self._driving is None or not self._mapped:
            raise ProtocolError(
                f"frame {frame.sequence} lies in shared memory",
                "expected shared_memory_mapped before it, and driving slots",
                "ask for driving slots and map them first",
            )
        self._driving.claim(frame.image.shared.slot, frame.sequence)

    def _drop(self, older: _Item, newer: _Item) -> None:
        """A newer frame takes the place of one that waits; what was asked before either still holds."""
        newer.options = newer.options or older.options
        newer.neutral = newer.neutral or older.neutral
        self._stream.log.dropped += 1
        self._core.metrics.dropped(1, "newer")
        self._skip(older, animation_pb2.SKIP_REASON_NEWER)

    def _skip(self, item: _Item, reason: animation_pb2.SkipReason) -> None:
        self._skips.append(animation_pb2.FrameSkipped(sequence=item.message.sequence, reason=reason))
        self._skipped.set()

    async def _tell_skipped(self) -> None:
        while not self._answered:
            await self._skipped.wait()
            self._skipped.clear()
            while self._skips:
                await self._answer(Response(skipped=self._skips.popleft()))

    # -- stages ------------------------------------------------------------------------------------------

    def _stages(self) -> list[Awaitable[None]]:
        if self._live:
            return [self._one_by_one()]
        networks = partial(self._core.compute, self._stream)
        decoded: asyncio.Queue[_Item | None] = asyncio.Queue(1)
        read: asyncio.Queue[_Item | None] = asyncio.Queue(1)
        drawn: asyncio.Queue[_Item | None] = asyncio.Queue(1)
        return [
            self._stage(self._next, self._core.step, self._decode, decoded),
            self._stage(decoded.get, networks, self._read, read),
            self._stage(read.get, networks, self._draw, drawn),
            self._deliver_all(drawn),
        ]

    async def _one_by_one(self) -> None:
        """Live: nothing is begun before the client can take it, so that what it gets is never older than need be."""

        def work(item: _Item) -> None:
            self._decode(item)
            with self._stream.device.worker.scope(self._stream.scope):
                self._read(item)
                self._draw(item)
            # One change of threads less; slots are the event loop's business.
            if item.drawn and self._results is None:
                item.pictures = self._encode(item, ())

        while True:
            # before the frame is chosen: what waits meanwhile may give way to a newer one
            await self._slots_free()
            item = await self._next()
            if item is None:
                return
            await self._core.step(work, item)
            await self._deliver(item)

    async def _stage(
        self,
        take: Callable[[], Awaitable[_Item | None]],
        run: Callable[..., Awaitable[None]],
        work: Callable[[_Item], None],
        out: asyncio.Queue[_Item | None],
    ) -> None:
        """Frames from ``take`` through ``work``, which ``run`` does in a thread, into ``out``."""
        while (item := await take()) is not None:
            await run(work, item)
            await out.put(item)
        await out.put(None)

    async def _deliver_all(self, drawn: asyncio.Queue[_Item | None]) -> None:
        while (item := await drawn.get()) is not None:
            await self._deliver(item)

    async def _next(self) -> _Item | None:
        """The next frame of the inbox; None when the client has finished."""
        while not self._inbox:
            if self._finished:
                return None
            self._changed.clear()
            await self._changed.wait()
        self._changed.set()  # there is room again
        self._busy += 1
        item = self._inbox.pop(0)
        item.watch.add("queue", item.watch.elapsed)
        return item

    def _decode(self, item: _Item) -> None:
        if item.motion is not None:
            return
        try:
            with item.watch("decode"):
                item.rgb = decode_image(item.message.image, self._limits, self._read_shared)
        except MediaError:
            if not self._live:
                raise
        # Pixels in shared memory have been copied: the slot is free whatever comes next.
        self._taken = item.message.sequence
        item.message.ClearField("driver")

    def _read_shared(self, slot: int, width: int, height: int) -> U8:
        if self._shared is None:
            raise ProtocolError("a picture in shared memory", "there is none", "ask for it first")
        return self._shared.read("driving", slot, height, width)

    def _read(self, item: _Item) -> None:
        if item.options is not None:
            self._reader.set_options(item.options[0])  # what reading depends on is the same for all portraits
        if item.motion is not None:
            item.step = DriverFrame(item.seconds, item.motion, "template")
        elif item.rgb is not None:
            item.step = self._reader.read(item.rgb, float(item.seconds), item.watch)
            item.rgb = None

    def _draw(self, item: _Item) -> None:
        for index, puppet in enumerate(self._puppets):
            if item.options is not None:
                puppet.set_options(item.options[index])
            if item.neutral is not None:
                puppet.set_neutral(item.neutral[0])
            if item.step is not None and self._output.encoding != "none":
                item.drawn.append(puppet.begin(item.step, item.watch))
        if not self._family.resident:  # else the device goes on while the next frame is composed
            for frame in item.drawn:
                frame.finish()

    async def _deliver(self, item: _Item) -> None:
        """Encode and send what is drawn."""
        log = self._stream.log
        if item.step is None:  # its picture could not be decoded
            log.undecodable += 1
            self._core.metrics.dropped(1, "undecodable")
            self._skip(item, animation_pb2.SKIP_REASON_UNDECODABLE)
            self._busy -= 1
            return
        if item.drawn and not item.pictures:
            slots = await self._take_slots(item)
            item.pictures = await self._core.step(self._encode, item, slots)
        frame = animation_pb2.AnimatedFrame(
            pictures=item.pictures,
            sequence=item.message.sequence,
            timestamp_us=item.message.timestamp_us,
            face_state=face_state(item.step.state),  # type: ignore[arg-type]
            timings=frame_timings(item.watch.received_ns, item.watch.stages, item.watch.elapsed),
            dropped=log.dropped,
            undecodable=log.undecodable,
        )
        if self._with_motion and item.step.motion is not None:
            frame.motion.CopyFrom(motion_to_message(item.step.motion, self._space, self._layout))
        await self._answer(Response(frame=frame))
        self._busy -= 1
        count_frame(self._core, self._stream, item.watch.by_stage(), item.watch.elapsed)
        self._heard = time.monotonic()

    def _encode(self, item: _Item, slots: Sequence[int]) -> list[common_pb2.Picture]:
        """Pictures in messages, or, where there are ``slots``, in shared memory."""
        drawn = [frame.finish().rgb for frame in item.drawn]
        with item.watch("encode"):
            if not slots or self._shared is None:
                return encode_frame(self._encoders, drawn, self._limits.max_message_bytes)
            pictures = []
            for encoder, rgb, slot in zip(self._encoders, drawn, slots, strict=True):
                self._shared.write("result", slot, encoder.pixels(rgb))
                pictures.append(encoder.encode(rgb, slot=slot))
            return pictures

    async def _slots_free(self) -> None:
        """Wait until there is a result slot for each picture of a frame, where results travel in shared memory."""
        if self._output.encoding != "shared_memory" or self._results is None:
            return
        self._starved = self._results.free < len(self._puppets)
        self._changed.set()
        with self._blocking():
            while self._results.free < len(self._puppets):
                self._slot_freed.clear()
                await self._slot_freed.wait()
        self._starved = False

    async def _take_slots(self, item: _Item) -> list[int]:
        """A slot for each picture; none where pictures travel otherwise."""
        if self._output.encoding != "shared_memory" or self._results is None:
            return []
        if not self._mapped:
            raise ProtocolError(
                f"frame {item.message.sequence} before the shared memory was mapped",
                "expected shared_memory_mapped first",
                "answer StreamStarted with it",
            )
        await self._slots_free()
        slots = (self._results.take(item.message.sequence) for _ in item.drawn)
        return [slot for slot in slots if slot is not None]  # all are: they have been waited for

    async def _answer(self, response: Response) -> None:
        async with self._sending:  # a notice and a frame must not be written at once
            if self._driving is not None and self._taken:
                response.driving_taken = self._taken
                self._driving.acknowledge(self._taken)  # from now on the client may use these slots
            with self._blocking():
                await self._send(response)

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        """The client has to do something before the body ends: read an answer, or free a slot."""
        wait = object()
        self._blocked[wait] = time.monotonic()
        try:
            yield
        finally:
            del self._blocked[wait]

    # -- the outside -------------------------------------------------------------------------------------

    async def _tell_draining(self) -> None:
        await self._stream.draining.wait()
        left = round(1000 * self._core.time_left())
        await self._answer(Response(draining=animation_pb2.Draining(deadline_ms=left)))
        await asyncio.Event().wait()  # a guard never ends well

    async def _watch(self) -> None:
        """End a stream whose client neither sends nor takes anything, and all of them at the drain's deadline."""
        limit = self._core.config.idle_timeout_s
        while True:
            await asyncio.sleep(min(0.25, limit / 4))
            if self._stream.draining.is_set() and self._core.time_left() == 0.0:
                raise stopping()
            now = time.monotonic()
            oldest = min(self._blocked.values(), default=now)
            if (self._busy == 0 and now - self._heard > limit) or now - oldest > limit:
                raise idle_error(limit)


async def _first_error(works: Sequence[asyncio.Future[None]], guards: Sequence[asyncio.Future[None]]) -> None:
    """Wait until all ``works`` are done, or one of them or of the ``guards``, which never end well, fails."""
    waiting = {*works, *guards}
    while any(not t.done() for t in works):
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
