"""One Animate stream without its transport: what is sent next, what an answer means, what must be sent again.

Both clients drive the same :class:`Session` from under one lock: the sender's side puts frames in (:meth:`Session.submit`), whoever
writes to the transport takes messages out (:meth:`Session.next_request`), whoever reads from it puts answers in
(:meth:`Session.answer`) and gets frames. A connection that broke is begun again with :meth:`Session.begin`.

A frame goes through three places::

    submit ─> queue ─> next_request ─> unanswered (lossless only) ─> answer
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from lp_edge.client._messages import (
    MotionCodec,
    PictureReader,
    animation_options,
    check_pixels,
    check_sending,
    frame_from,
    image_message,
    microseconds,
    output_options,
)
from lp_edge.client.types import Frame, Output, Picture, Portrait, ServerInfo
from lp_edge.errors import BackendUnavailable, ConfigError, LimitError, MediaError
from lp_edge.proto.v1 import animation_pb2, common_pb2
from lp_edge.runtime.checks import one_of, within
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.shared_frames import MAX_SLOT_BYTES, MAX_SLOTS, FrameLayout, SharedFrames

if TYPE_CHECKING:
    from lp_edge.runtime.options import AnimateOptions

__all__ = ["Plan", "Session", "Transport"]

U8 = npt.NDArray[np.uint8]
Request = animation_pb2.AnimateRequest
Response = animation_pb2.AnimateResponse
Transport = Literal["shared memory", "messages"]

_DEFAULT_SIZE = (1280, 720)
_WINDOW = {"live": 3, "lossless": 8}
_LEAST_SIDE = 640  # the server's default crop where it does not say another

_log = logging.getLogger("lp_edge")


@dataclass(frozen=True)
class Plan:
    """What a stream is to do; see :meth:`lp_edge.client.Client.animate` for the fields.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    portrait_ids: tuple[str, ...]
    options: AnimateOptions | None
    mode: str
    output: Output
    shared_memory: bool | Literal["auto"]
    driving_size: tuple[int, int] | None
    send_as: str
    quality: int
    neutral: Motion | None
    with_motion: bool
    motion_layout: str
    window: int | None
    zero_copy: bool

    def __post_init__(self) -> None:
        within("portraits", len(self.portrait_ids), 1, 8)
        one_of("mode", self.mode, ("live", "lossless"))
        one_of("shared_memory", str(self.shared_memory), ("auto", "True", "False"))
        one_of("motion_layout", self.motion_layout, ("keypoints", "coefficients"))
        check_sending(self.send_as, self.quality)
        if self.window is not None:
            within("window", self.window, 1, MAX_SLOTS)
        if self.driving_size not in (None, (0, 0)):
            for side in self.driving_size or ():
                within("driving_size", side, 16, 8192)

    @property
    def layout_name(self) -> str:
        """The protocol's name of ``motion_layout``."""
        return f"EXPRESSION_LAYOUT_{self.motion_layout.upper()}"

    @property
    def lossless(self) -> bool:
        """Whether every frame is answered."""
        return self.mode == "lossless"


@dataclass
class _Entry:
    """A frame on its way, with what was asked for before it."""

    frame: animation_pb2.DrivingFrame
    pixels: U8 | None = None  # not in the message yet
    slot: int | None = None
    options: common_pb2.AnimationOptions | None = None
    neutral: animation_pb2.SetNeutral | None = None


class Session:
    """The state of one stream. Not safe by itself: callers hold a lock, but for :meth:`prepare`.

    Args:
        plan: what it is to do.
        info: of the server.
        portraits: of the plan, for the sizes of the results.
        codec: motion to and from messages.
        local: whether the server may be on this machine.

    Attributes:
        stream_id: the stream's name in the server's log.
        transport: how pixels travel now, ``shared memory`` or ``messages``.
        transport_reason: why they travel in messages; empty with shared memory.
        draining: seconds until the server stops, once it has said so.
        finished: nothing will be submitted any more.
        oversized: frames that went in messages because they do not fit a slot.

    Raises:
        ConfigError: an option is not for a stream.
        LimitError: shared memory is required and the server does not allow as much.
        BackendUnavailable: shared memory is required and cannot be had.
    """

    def __init__(
        self, plan: Plan, info: ServerInfo, portraits: Sequence[Portrait], codec: MotionCodec, *, local: bool
    ) -> None:
        self.plan, self._codec = plan, codec
        self.stream_id = ""
        self.draining: float | None = None
        self.finished = False
        self.oversized = 0
        self.window = plan.window or _WINDOW[plan.mode]
        if plan.motion_layout == "coefficients" and info.motion.layout != "coefficients":
            raise ConfigError(
                f"motion_layout='coefficients' for the family {info.family}",
                "expected keypoints: only a mesh has a basis",
                "leave it out",
            )
        self._options = animation_options(plan.options)
        self._neutral = None if plan.neutral is None else codec.encode(plan.neutral, plan.motion_layout)
        self._next_options: common_pb2.AnimationOptions | None = None
        self._next_neutral: animation_pb2.SetNeutral | None = None
        self._queue: deque[_Entry] = deque()
        self._sent: deque[_Entry] = deque()  # not answered yet
        self._ready: deque[Request] = deque()
        self._readers = [PictureReader() for _ in plan.portrait_ids]
        self._born = time.monotonic()
        self._sequence, self._time_us = 0, -1
        self._answered = 0
        self._departed: dict[int, float] = {}
        self._dropped_here = self._dropped_before = self._dropped_there = 0
        self._shared: SharedFrames | None = None
        self._free: list[int] = []
        self._held: dict[int, int] = {}  # sequence -> driving slot
        self._freed = 0  # driving slots are free again up to this sequence, says the server
        self._taken = self._told = 0  # results released up to here; and said so
        self._untold: deque[int] = deque()  # sequences of results that lie in slots for all the server knows
        self._running = False
        self.transport_reason = ""
        self._layout = self._plan_layout(info, portraits, local)

    # -- opening ----------------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport:
        return "messages" if self._layout is None else "shared memory"

    @property
    def asks_shared(self) -> bool:
        """Whether the next connection asks for shared memory."""
        return self._layout is not None

    @contextlib.contextmanager
    def without_shared(self, reason: str) -> Iterator[None]:
        """Do without shared memory from the connection on that is begun in the ``with`` block, if it can be begun."""
        layout, self._layout, self.transport_reason = self._layout, None, reason
        try:
            yield
        except BaseException:
            self._layout, self.transport_reason = layout, ""
            raise

    def begin(self, portrait_ids: Sequence[str]) -> Request:
        """The first message of a new connection; what was not answered on the last one is queued again (lossless)."""
        if self.plan.lossless:
            self._queue.extendleft(reversed(self._sent))
            for entry in self._queue:
                self._rescue(entry)
        else:  # what the server has not seen is old by now
            for entry in self._queue:
                self._apply(entry)
            self._dropped_here += len(self._queue)
            self._queue.clear()
        self._sent.clear()
        self._ready.clear()
        self._held.clear()
        self._untold.clear()
        self._freed = self._taken = self._told = 0
        self._dropped_before += self._dropped_there
        self._dropped_there = 0
        self._running = False
        self._release_shared()
        plan, layout = self.plan, self._layout
        shares_results = layout is not None and layout.result_slots > 0
        encoding = plan.output.encoding
        if encoding == "auto":
            encoding = "shared_memory" if shares_results else "jpeg"
        mode = f"STREAM_MODE_{plan.mode.upper()}"
        config = animation_pb2.AnimateConfig(
            portrait_ids=portrait_ids,
            options=self._options,
            mode=animation_pb2.StreamMode.Value(mode),
            output=output_options(plan.output, encoding),
            neutral=self._neutral,
            with_motion=plan.with_motion,
            motion_layout=plan.layout_name,
        )
        if layout is not None:
            config.shared_memory.driving_slots = layout.driving_slots
            config.shared_memory.driving_slot_bytes = layout.driving_bytes
            config.shared_memory.result_slots = layout.result_slots
            config.shared_memory.result_slot_bytes = layout.result_bytes
        return Request(config=config)

    def started(self, response: Response) -> None:
        """Take the first answer; frames may go from now on.

        Raises:
            MediaError, BackendUnavailable: the shared memory cannot be had here.
        """
        started, layout = response.started, self._layout
        if layout is not None:
            offer = started.shared_memory
            announced = (offer.size, offer.driving_stride, offer.results_offset, offer.result_stride)
            expected = (
                layout.size,
                layout.stride("driving"),
                layout.start("result"),
                layout.stride("result"),
            )
            if not started.HasField("shared_memory") or announced != expected:
                raise MediaError(
                    f"shared memory with size, strides and offset {announced}",
                    f"expected {expected}",
                    "update lp-edge",
                )
            self._shared = SharedFrames.attach(offer.name, layout)
            self._free = list(range(layout.driving_slots))
            self._ready.append(Request(shared_memory_mapped=animation_pb2.SharedMemoryMapped()))
        self.stream_id = started.stream_id
        self._running = True

    def _plan_layout(
        self, info: ServerInfo, portraits: Sequence[Portrait], local: bool
    ) -> FrameLayout | None:
        """Slots for this stream; None = frames travel in messages, for ``transport_reason``."""
        plan, limit = self.plan, info.limits.max_shared_memory_bytes
        if plan.shared_memory is False:
            self.transport_reason = "shared_memory=False"
            return None
        width, height = plan.driving_size or _DEFAULT_SIZE
        driving = width * height * 3
        result = (
            max(_result_bytes(plan.output, p) for p in portraits) if plan.output.encoding == "auto" else 0
        )
        fault = ""
        if not local:
            fault = "the target is not on this machine"
        elif limit == 0:
            fault = "the server gives none"
        elif not driving and not result:
            fault = "neither driving frames nor results are pictures"
        elif max(driving, result) > MAX_SLOT_BYTES:
            fault = f"frames of {max(driving, result)} bytes exceed a slot's {MAX_SLOT_BYTES}"
        for window in range(0 if fault else self.window, 0, -1):
            slots = window if driving else 0, min(MAX_SLOTS, (window + 1) * len(portraits)) if result else 0
            try:
                layout = FrameLayout(slots[0], driving if slots[0] else 0, slots[1], result, limit=limit)
            except LimitError:
                continue
            if driving:
                self.window = window
            return layout
        if plan.shared_memory is True and fault:
            raise BackendUnavailable(
                f"no shared memory: {fault}",
                "expected pictures, and a server on this machine that shares memory",
                "let frames travel in messages: shared_memory='auto'",
            )
        fault = fault or f"the server allows {limit} bytes for a stream"
        if plan.shared_memory is True:
            raise LimitError(
                f"no shared memory for frames of {driving} and results of {result} bytes: {fault}",
                "expected enough for one of each",
                "give a smaller driving_size or Output(width, height), or shared_memory='auto'",
            )
        self.transport_reason = fault
        return None

    # -- sending ----------------------------------------------------------------------------------------

    def prepare(self, frame: U8 | bytes | Motion) -> common_pb2.Image | common_pb2.Motion | U8:
        """Whatever can be done to a frame without the lock: encoding, above all.

        Raises:
            MediaError: it is none, or does not fit the slots of a stream that must use shared memory.
        """
        if isinstance(frame, Motion):
            return self._codec.encode(frame, self.plan.motion_layout)
        if isinstance(frame, (bytes, bytearray, memoryview)):
            return image_message(bytes(frame), self.plan.send_as, self.plan.quality)
        check_pixels(frame)
        if self._fits(frame):
            return frame
        self._note_oversized(frame)
        return image_message(frame, self.plan.send_as, self.plan.quality)

    def _fits(self, rgb: U8) -> bool:
        layout = self._layout
        return layout is not None and rgb.nbytes <= layout.driving_bytes

    def _note_oversized(self, rgb: U8) -> None:
        if self._layout is None or not self._layout.driving_slots:
            return
        height, width = rgb.shape[:2]
        size = self.plan.driving_size or _DEFAULT_SIZE
        if self.plan.shared_memory is True:
            raise MediaError(
                f"a frame of {width}x{height} pixels for shared memory",
                f"expected at most as many as {size[0]}x{size[1]}",
                f"open the stream with driving_size=({width}, {height})",
            )
        if not self.oversized:
            _log.warning(
                "frames of %dx%d pixels exceed driving_size %dx%d and travel in messages",
                width,
                height,
                *size,
            )
        self.oversized += 1

    def room(self) -> bool:
        """Whether a frame may be submitted now; always in live mode, where it takes the place of one that waits."""
        return not self.plan.lossless or len(self._queue) + len(self._sent) < self.window

    def submit(
        self,
        prepared: common_pb2.Image | common_pb2.Motion | U8,
        timestamp: float | None,
        sequence: int | None,
    ) -> int:
        """Queue a frame and return its number.

        Raises:
            ConfigError: number or time do not grow, or the stream is finished.
        """
        if self.finished:
            raise ConfigError("a frame after finish()", "expected none", "open another stream")
        number = self._sequence + 1 if sequence is None else sequence
        if timestamp is None:
            time_us = max(self._time_us + 1, round((time.monotonic() - self._born) * 1e6))
        else:
            time_us = microseconds(timestamp)
        if not self._sequence < number < 1 << 63 or time_us <= self._time_us:
            raise ConfigError(
                f"frame {number} at {time_us / 1e6} s after frame {self._sequence} at {self._time_us / 1e6} s",
                "expected numbers from 1 and times that grow",
                "leave sequence and timestamp out, or count up",
            )
        entry = _Entry(animation_pb2.DrivingFrame(sequence=number, timestamp_us=time_us))
        if isinstance(prepared, common_pb2.Motion):
            entry.frame.motion.CopyFrom(prepared)
        elif isinstance(prepared, common_pb2.Image):
            entry.frame.image.CopyFrom(prepared)
        self._sequence, self._time_us = number, time_us
        entry.options, self._next_options = self._next_options, None
        entry.neutral, self._next_neutral = self._next_neutral, None
        while not self.plan.lossless and self._queue:
            self._replace(self._queue.popleft(), entry)
        if isinstance(prepared, np.ndarray):
            entry.pixels = prepared
            if not self._store(entry):
                entry.pixels = prepared.copy()  # the caller may draw its next frame into the same array
        self._queue.append(entry)
        self._departed[number] = time.perf_counter()
        return number

    def _replace(self, older: _Entry, newer: _Entry) -> None:
        """A frame that waits gives way to a newer one; what was asked for before it still holds."""
        newer.options = newer.options or older.options
        newer.neutral = newer.neutral or older.neutral
        if older.slot is not None:
            self._free.append(older.slot)
            del self._held[older.frame.sequence]
        self._departed.pop(older.frame.sequence, None)
        self._dropped_here += 1

    def set_options(self, options: AnimateOptions) -> None:
        """Options from the next frame on."""
        self._next_options = animation_options(options)

    def set_neutral(self, motion: Motion | None) -> None:
        """Neutral motion from the next frame on; None = that of the next frame that shows a face."""
        message = animation_pb2.SetNeutral()
        if motion is not None:
            message.motion.CopyFrom(self._codec.encode(motion, self.plan.motion_layout))
        self._next_neutral = message

    def next_request(self) -> Request | None:
        """What is to be written next; None = nothing yet, or nothing more (:attr:`exhausted`)."""
        if not self._ready and self._running and self._queue:
            self._send(self._queue[0])
        request = self._ready.popleft() if self._ready else None
        if self._taken > self._told and (request is not None or self._starving or self.finished):
            request = request or Request()
            request.results_taken = self._told = self._taken
            while self._untold and self._untold[0] <= self._told:
                self._untold.popleft()
        return request

    @property
    def over(self) -> bool:
        """Whether nothing is left to be sent or answered, for all that can be known here."""
        return self.finished and not (self.plan.lossless and (self._queue or self._sent))

    @property
    def exhausted(self) -> bool:
        """Whether the sending side may be closed: all is sent, and no slot will have to be freed any more."""
        if not self.finished or self._queue or self._ready or not self._running:
            return False
        # What still comes through shared memory needs slots, and they are freed by messages.
        return not (self._sent and self._layout is not None and self._layout.result_slots)

    @property
    def _starving(self) -> bool:
        """Whether so many result slots can be freed that the server should know without waiting for the next frame."""
        slots = 0 if self._layout is None else self._layout.result_slots
        free = sum(sequence <= self._taken for sequence in self._untold)
        return 2 * free * len(self._readers) >= slots > 0

    def _send(self, entry: _Entry) -> None:
        """Move the frame from the queue to the messages that are ready, unless it must wait for a slot."""
        if entry.pixels is not None and not self._store(entry):
            if self._fits(entry.pixels):
                return
            image = image_message(entry.pixels, self.plan.send_as, self.plan.quality)
            entry.frame.image.CopyFrom(image)
            entry.pixels = None
        self._queue.popleft()
        if entry.options is not None:
            self._ready.append(Request(options=entry.options))
        if entry.neutral is not None:
            self._ready.append(Request(set_neutral=entry.neutral))
        self._ready.append(Request(frame=entry.frame))
        self._sent.append(entry)
        if not self.plan.lossless:
            self._apply(entry)

    def _apply(self, entry: _Entry) -> None:
        """What a frame has brought with it holds for all that follow, on the next connection too."""
        if entry.options is not None:
            self._options = entry.options
        if entry.neutral is not None:
            self._neutral = entry.neutral.motion if entry.neutral.HasField("motion") else None

    def _store(self, entry: _Entry) -> bool:
        """Put an entry's pixels into a slot, where there is a free one that takes them."""
        if self._shared is None or entry.pixels is None or not self._free or not self._fits(entry.pixels):
            return False
        entry.slot = self._free.pop()
        self._shared.write("driving", entry.slot, entry.pixels)
        height, width = entry.pixels.shape[:2]
        shared = common_pb2.SharedImage(slot=entry.slot, width=width, height=height)
        entry.frame.image.CopyFrom(common_pb2.Image(shared=shared))
        self._held[entry.frame.sequence] = entry.slot
        entry.pixels = None
        return True

    def _rescue(self, entry: _Entry) -> None:
        """Take the pixels back out of a slot whose server is gone; our mapping has outlived it."""
        if entry.slot is not None and self._shared is not None:
            image = entry.frame.image.shared
            entry.pixels = self._shared.read("driving", entry.slot, image.height, image.width)
            entry.slot = None
            entry.frame.ClearField("driver")

    # -- receiving --------------------------------------------------------------------------------------

    def answer(self, response: Response) -> Frame | None:
        """Take an answer; a frame, where it is one.

        Raises:
            ProtocolError, MediaError: it names a slot that is not there.
        """
        kind = response.WhichOneof("message")
        if kind == "draining":
            self.draining = response.draining.deadline_ms / 1000
        if kind == "skipped":
            # A frame that gave way is told at once, maybe before the answer to an older one that is still being drawn.
            told_at_once = response.skipped.reason == animation_pb2.SKIP_REASON_NEWER
            self._gone(response.skipped.sequence, in_order=not told_at_once)
        if kind == "frame":
            self._answered = response.frame.sequence
        self._free_slots(response.driving_taken)
        if kind != "frame":
            return None
        message, sequence = response.frame, response.frame.sequence
        departed = self._gone(sequence, in_order=True)
        pictures = tuple(
            self._picture(reader, m, sequence)
            for reader, m in zip(self._readers, message.pictures, strict=False)
        )
        if not self.plan.zero_copy:
            self.release(sequence)
        self._dropped_there = message.dropped
        motion = self._codec.decode(message.motion) if message.HasField("motion") else None
        elapsed = None if departed is None else time.perf_counter() - departed
        return frame_from(message, pictures, motion, self.dropped, elapsed)

    def release(self, sequence: int) -> None:
        """The pictures of this frame and all earlier ones are not looked at any more."""
        done = [s for s in self._untold if s <= sequence]
        if done:
            self._taken = max(self._taken, done[-1])

    def skipped(self, frame: Frame) -> None:
        """An answer that gave way to a newer one before anybody took it (live)."""
        self._dropped_here += 1
        self.release(frame.sequence)

    @property
    def dropped(self) -> int:
        """Frames dropped since the stream began, here and in the server."""
        return self._dropped_before + self._dropped_there + self._dropped_here

    def close(self) -> None:
        """Let go of the shared memory; pictures that were lent stay valid until they are dropped."""
        self._release_shared()
        self._queue.clear()
        self._sent.clear()

    def _picture(self, reader: PictureReader, message: common_pb2.Picture, sequence: int) -> Picture:
        if message.encoding != common_pb2.OUTPUT_ENCODING_SHARED_MEMORY:
            return reader.picture(message)
        if self._shared is None:
            raise MediaError("a result in shared memory", "expected none: the stream has none", "report this")
        if not self._untold or self._untold[-1] != sequence:
            self._untold.append(sequence)
        slot, height, width = message.slot, message.height, message.width
        if not self.plan.zero_copy:
            return reader.picture(message, self._shared.read("result", slot, height, width))
        lent = self._shared.view("result", slot, height, width)
        lent.flags.writeable = False
        return reader.picture(message, lent)

    def _gone(self, sequence: int, *, in_order: bool) -> float | None:
        """A frame is answered or will never be; when it was submitted.

        Where this is told in the frames' order, the same holds for all older ones: the server keeps no more than so many notices of
        skipped frames for a client that is slow to read, so one for each cannot be waited for.
        """
        first, departed = 0 if in_order else sequence, self._departed.get(sequence)
        gone = [e for e in self._sent if first <= e.frame.sequence <= sequence]
        for entry in gone:
            self._sent.remove(entry)
            if self.plan.lossless:
                self._apply(entry)
        for number in [n for n in self._departed if first <= n <= sequence]:
            del self._departed[number]
        return departed

    def _free_slots(self, taken: int) -> None:
        """Slots of frames that might have to be sent again are kept until those are answered."""
        self._freed = max(self._freed, taken)
        upto = min(self._freed, self._answered) if self.plan.lossless else self._freed
        for sequence in [s for s in self._held if s <= upto]:
            self._free.append(self._held.pop(sequence))

    def _release_shared(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared, self._free = None, []


def _result_bytes(output: Output, portrait: Portrait) -> int:
    """Most bytes that a picture of this portrait can take, pasted back or not."""
    if output.width and output.height:
        return output.width * output.height * 3
    side = max(portrait.size, _LEAST_SIDE)
    if not output.width and not output.height:
        return max(portrait.width * portrait.height, side * side) * 3
    # One side is given; a crop's aspect is not known before it is drawn, but hardly beyond 1 : 2.
    aspect = portrait.width / portrait.height if output.height else portrait.height / portrait.width
    given = output.width or output.height
    return given * min(8192, round(given * max(aspect, 2.0) + 1)) * 3
