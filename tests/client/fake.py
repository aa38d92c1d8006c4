"""A server that does what a test tells it: pictures come back as they were sent, when the test lets them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from lp_edge.errors import LpEdgeError, NotFoundError, ServerUnavailable
from lp_edge.proto.v1 import (
    animation_pb2,
    animation_pb2_grpc,
    common_pb2,
    portraits_pb2,
    portraits_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from lp_edge.runtime.image import encode_image, read_image
from lp_edge.runtime.server.codec import decode_image
from lp_edge.runtime.server.config import Limits
from lp_edge.runtime.server.wire import error_metadata
from lp_edge.runtime.shared_frames import FrameLayout, SharedFrames

SECONDS = 30.0
"""What anything may take on a busy machine; nothing here waits so long when all is well."""

WAITS = ("pause", "start", "restore")
"""What a client may wait for while it reconnects; see :meth:`Fake.breaks`."""

Response = animation_pb2.AnimateResponse


def picture(value: int = 200, width: int = 64, height: int = 48) -> np.ndarray:
    """Pixels that tell frames apart: grey, with one red corner."""
    out = np.full((height, width, 3), value, np.uint8)
    out[:8, :8] = (255, 0, 0)
    return out


class Fake:
    """Portraits, errors and answers of a server.

    Attributes:
        calls: names of the methods that were called, in order.
        errors: raised by the next calls, one each.
        messages: kinds of all messages of all Animate streams, in order.
        frames: sequence numbers of all frames, in order.
        options: multiplier of each frame (1.0 = the default).
        streams: configurations of the Animate calls.
        gate: answers wait while it is clear.
        reading: messages after the configuration are read while it is set.
        lost: frames that are neither answered nor told as skipped.
        undecodable: frames that are told as skipped because of their picture.
        break_after: the stream ends with the error after so many answers.
        shares: whether shared memory is given.
        taken: highest results_taken that came.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.errors: list[LpEdgeError] = []
        self.stream_errors: list[LpEdgeError] = []
        self.messages: list[str] = []
        self.frames: list[int] = []
        self.options: list[float] = []
        self.neutral: list[bool] = []
        self.sent_as: list[str] = []
        self.streams: list[animation_pb2.AnimateConfig] = []
        self.metadata: dict[str, str] = {}
        self.gate, self.reading, self.broken = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()
        self.reading.set()
        self.break_after: tuple[int, LpEdgeError] | None = None
        self.drain_after: int | None = None
        self.lost: set[int] = set()
        self.undecodable: set[int] = set()
        self.shares: bool | LpEdgeError = True
        self.shared_bytes = 1 << 26
        self.taken = 0
        self.registered: dict[str, bytes] = {}
        self.made = 0
        self.hold_calls = threading.Event()
        self.hold_calls.set()
        self.lock = threading.Lock()

    def check(self, name: str, context: Any) -> None:
        """Note a call; fail it, where the test wants that."""
        self.metadata = dict(context.invocation_metadata())
        with self.lock:
            self.calls.append(name)
            error = self.errors.pop(0) if self.errors else None
        if error is not None:
            fail(context, error)
        self.hold_calls.wait(SECONDS)

    def breaks(self, stream: Any, when: str) -> Callable[[], bool]:
        """Break an open stream at its next frame, and keep the client waiting while it reconnects.

        Args:
            stream: of either client.
            when: one of ``WAITS``: in the pause before the next try, for the start of the next stream, or for a server that is
                to get the portraits again.

        Returns:
            Whether the client is there.
        """
        self.break_after = (0, ServerUnavailable("gone", retry_after_s=50.0 if when == "pause" else 0.01))
        if when == "start":
            self.hold_calls.clear()
        if when == "restore":
            self.errors = [NotFoundError("no portrait"), ServerUnavailable("gone", retry_after_s=50.0)]
        before = len(self.calls)
        calls = {"pause": [], "start": ["animate"], "restore": ["animate", "list"]}[when]
        return lambda: stream._broken and self.calls[before:] == calls


def fail(context: Any, error: LpEdgeError) -> None:
    """End a call as the real server does."""
    status, message, trailing = error_metadata(error)
    context.set_trailing_metadata(tuple(trailing))
    context.abort(grpc.StatusCode[status], message)


class _Server(server_pb2_grpc.ServerServiceServicer):
    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        self.fake.check("info", context)
        answer = server_pb2.GetServerInfoResponse(
            version="1.2.3", templates=["nod"], versions={"python": "3.11"}
        )
        answer.bundle.family, answer.bundle.variant, answer.bundle.licence = "mesh", "default", "Apache-2.0"
        answer.bundle.networks.add(name="warp", sha256="ab", precision="fp32")
        answer.devices.add(name="a CPU", backend="cpu", threads=2)
        answer.motion.family, answer.motion.keypoints = "mesh", 478
        answer.motion.layout, answer.motion.expression_size = 2, 32
        answer.edits.add(
            name="smile", minimum=-1, maximum=1, neutral=0, unit="of itself", description="smiles"
        )
        answer.edits.add(name="mouth_open", minimum=0, maximum=1)
        answer.limits.max_streams, answer.limits.max_pixels = 16, 1 << 24
        answer.limits.max_shared_memory_bytes = self.fake.shared_bytes
        answer.limits.idle_timeout.FromSeconds(60)
        answer.load.streams = len(self.fake.streams)
        answer.uptime.FromMilliseconds(1500)
        return answer


class _Portraits(portraits_pb2_grpc.PortraitServiceServicer):
    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def RegisterPortrait(self, request: Any, context: Any) -> Any:
        fake = self.fake
        fake.check("register", context)
        fake.made += 1
        name = f"portrait-{fake.made:013d}"
        fake.registered[name] = request.image.encoded.data
        rgb = read_image(request.image.encoded.data)
        answer = portraits_pb2.Portrait(
            id=name, width=rgb.shape[1], height=rgb.shape[0], options=request.options
        )
        answer.faces.add(score=0.5, landmarks=[float(i) for i in range(956)]).box.right = 7
        answer.detected_faces.add(left=1, top=2, right=3, bottom=4)
        answer.created_at.FromSeconds(1_000_000_000)
        answer.thumbnail = encode_image(rgb, ".jpg")
        answer.expires_at.FromSeconds(1_000_000_000 + (request.time_to_live.seconds or 60))
        return portraits_pb2.RegisterPortraitResponse(portrait=answer)

    def ListPortraits(self, request: Any, context: Any) -> Any:
        self.fake.check("list", context)
        found = [portraits_pb2.Portrait(id=name, width=64, height=48) for name in self.fake.registered]
        return portraits_pb2.ListPortraitsResponse(portraits=found)

    def DeletePortrait(self, request: Any, context: Any) -> Any:
        self.fake.check("delete", context)
        if self.fake.registered.pop(request.id, None) is None:
            fail(context, NotFoundError(f"no portrait {request.id}"))
        return portraits_pb2.DeletePortraitResponse()


class _Animation(animation_pb2_grpc.AnimationServiceServicer):
    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def Animate(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        fake = self.fake
        fake.check("animate", context)
        first = next(requests)
        config = first.config
        fake.streams.append(config)
        for name in config.portrait_ids:
            if name not in fake.registered:
                fail(context, NotFoundError(f"no portrait {name}"))
        shared = None
        started = animation_pb2.StreamStarted(stream_id=f"stream-{len(fake.streams)}")
        if config.HasField("shared_memory"):
            if not isinstance(fake.shares, bool):
                fail(context, fake.shares)
            asked = config.shared_memory
            layout = FrameLayout(
                asked.driving_slots, asked.driving_slot_bytes, asked.result_slots, asked.result_slot_bytes
            )
            shared = SharedFrames.create(layout)
            m = started.shared_memory
            m.name, m.size, m.driving_stride = shared.name, layout.size, layout.stride("driving")
            m.results_offset, m.result_stride = layout.start("result"), layout.stride("result")
        with shared or contextlib.nullcontext():
            yield Response(started=started)
            yield from self._answers(config, requests, context, shared)

    def _answers(
        self, config: Any, requests: Iterator[Any], context: Any, shared: SharedFrames | None
    ) -> Iterator[Any]:
        fake, answered, multiplier, neutral, taken = self.fake, 0, config.options.multiplier or 1.0, False, 0
        slots = shared.layout.result_slots if shared is not None else 0
        used: list[int] = []
        while True:
            fake.reading.wait(SECONDS)
            request = next(requests, None)
            if request is None:
                return
            kind = request.WhichOneof("message")
            if request.results_taken:
                assert request.results_taken in used, "a result was acknowledged that was never given"
                taken = fake.taken = max(fake.taken, request.results_taken)
            if kind is None:
                continue
            fake.messages.append(kind)
            if kind == "shared_memory_mapped":
                assert shared is not None
                shared.unlink()
            if kind == "options":
                multiplier = request.options.multiplier
            if kind == "set_neutral":
                neutral = True
            if kind != "frame":
                continue
            frame = request.frame
            fake.frames.append(frame.sequence)
            fake.options.append(round(multiplier, 3))
            fake.neutral.append(neutral)
            fake.sent_as.append(frame.image.WhichOneof("kind") or "motion")
            pixels = None
            if frame.WhichOneof("driver") == "image":

                def read(slot: int, width: int, height: int) -> Any:
                    return shared.read("driving", slot, height, width)

                pixels = decode_image(frame.image, Limits(), read)
            while not fake.gate.wait(0.01):
                if not context.is_active():
                    return
            if fake.break_after is not None and answered >= fake.break_after[0]:
                error, fake.break_after = fake.break_after[1], None
                fake.broken.set()
                fail(context, error)
            if frame.sequence in fake.lost:
                continue
            if frame.sequence in fake.undecodable:
                notice = animation_pb2.FrameSkipped(sequence=frame.sequence, reason=2)
                yield Response(skipped=notice, driving_taken=frame.sequence)
                continue
            if fake.drain_after is not None and answered >= fake.drain_after:
                fake.drain_after = None
                yield Response(draining=animation_pb2.Draining(deadline_ms=1500))
            answer = animation_pb2.AnimatedFrame(
                sequence=frame.sequence, timestamp_us=frame.timestamp_us, face_state=2, dropped=0
            )
            answer.timings.received_us, answer.timings.total_us = 1_000_000, 2000
            answer.timings.stages.add(stage="warp", start_us=100, duration_us=500)
            if config.with_motion and frame.HasField("motion"):
                answer.motion.CopyFrom(frame.motion)
                answer.face_state = 5
            for index in range(len(config.portrait_ids) if pixels is not None else 0):
                size = (pixels.shape[1], pixels.shape[0])
                if config.output.encoding == common_pb2.OUTPUT_ENCODING_SHARED_MEMORY:
                    free = [
                        s for s in range(slots) if s not in {i for i, q in self._busy(used, slots, taken)}
                    ]
                    assert free, "all result slots are taken"
                    used.append(frame.sequence)
                    slot = (len(used) - 1) % slots
                    assert slot in free, "a slot was used again before its result was taken"
                    shared.write("result", slot, pixels)
                    answer.pictures.add(encoding=6, width=size[0], height=size[1], slot=slot)
                else:
                    data = encode_image(pixels, ".png")
                    answer.pictures.add(encoding=2, width=size[0], height=size[1], data=data)
                del index
            answered += 1
            yield Response(frame=answer, driving_taken=frame.sequence if shared is not None else 0)

    @staticmethod
    def _busy(used: list[int], slots: int, taken: int) -> list[tuple[int, int]]:
        """Slot and sequence of the results that were not taken yet."""
        return [(i % slots, sequence) for i, sequence in enumerate(used) if sequence > taken]


@contextlib.contextmanager
def fake_server(port: int = 0) -> Iterator[tuple[Fake, str]]:
    """A server on loopback and where it listens."""
    fake = Fake()
    server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.so_reuseport", 0)])
    server_pb2_grpc.add_ServerServiceServicer_to_server(_Server(fake), server)
    portraits_pb2_grpc.add_PortraitServiceServicer_to_server(_Portraits(fake), server)
    animation_pb2_grpc.add_AnimationServiceServicer_to_server(_Animation(fake), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        for event in (fake.gate, fake.reading, fake.hold_calls):
            event.set()
        server.stop(0).wait(SECONDS)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds."""
    pause = threading.Event()
    for _ in range(int(SECONDS / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError(f"not in {SECONDS:g} s: {what}")
