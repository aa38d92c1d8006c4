"""A client that is made to be killed: opens a call, says what it has got, and goes on for ever.

    python -m lp_edge.tests.runtime.server.victim TARGET PORTRAIT KIND

prints a line for each answer. KIND: ``frames`` (raw pixels both ways), ``shared`` (both ways through shared memory), ``unmapped`` (asks for shared
memory and does not map it), ``upload`` (sends a file to Render that never ends).
"""

from __future__ import annotations

import itertools
import queue
import sys
from collections.abc import Iterator

import grpc
import numpy as np

from lp_edge.proto.v1 import animation_pb2, animation_pb2_grpc, common_pb2
from lp_edge.runtime.shared_frames import FrameLayout, SharedFrames

KINDS = ("frames", "shared", "unmapped", "upload")
WIDTH, HEIGHT, SLOTS = 240, 200, 4
BYTES = WIDTH * HEIGHT * 3
Request = animation_pb2.AnimateRequest


def picture() -> np.ndarray:
    """A face of the toy networks."""
    rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    rgb[60:140, 60:140] = 255
    return rgb


def animate(stub: animation_pb2_grpc.AnimationServiceStub, portrait: str, kind: str) -> None:
    """A stream of frames that never ends."""
    shared = kind != "frames"
    encoding = common_pb2.OUTPUT_ENCODING_SHARED_MEMORY if shared else common_pb2.OUTPUT_ENCODING_RAW
    config = animation_pb2.AnimateConfig(
        portrait_ids=[portrait],
        mode=animation_pb2.STREAM_MODE_LOSSLESS,
        output=common_pb2.OutputOptions(encoding=encoding),
    )
    if shared:
        config.shared_memory.driving_slots = config.shared_memory.result_slots = SLOTS
        config.shared_memory.driving_slot_bytes = config.shared_memory.result_slot_bytes = BYTES
    requests: queue.SimpleQueue[animation_pb2.AnimateRequest] = queue.SimpleQueue()
    requests.put(Request(config=config))
    answers = stub.Animate(iter(requests.get, None))
    started = next(answers).started
    say("started")
    slots = None
    if kind == "shared":
        slots = SharedFrames.attach(started.shared_memory.name, FrameLayout(SLOTS, BYTES, SLOTS, BYTES))
        requests.put(Request(shared_memory_mapped=animation_pb2.SharedMemoryMapped()))
    if kind == "unmapped":
        next(answers)
    rgb = picture()
    for sequence in itertools.count(1):
        frame = animation_pb2.DrivingFrame(sequence=sequence, timestamp_us=sequence)
        if slots is None:
            frame.image.raw.width, frame.image.raw.height, frame.image.raw.data = WIDTH, HEIGHT, rgb.tobytes()
        else:
            slot = frame.image.shared
            slot.slot, slot.width, slot.height = sequence % SLOTS, WIDTH, HEIGHT
            slots.write("driving", slot.slot, rgb)
        requests.put(Request(frame=frame, results_taken=max(0, sequence - SLOTS) if shared else 0))
        if sequence >= SLOTS - 1:  # some frames are under way when it dies
            say(f"frame {next(answers).frame.sequence}")


def upload(stub: animation_pb2_grpc.AnimationServiceStub, portrait: str) -> None:
    """A file that never ends."""

    def requests() -> Iterator[animation_pb2.RenderRequest]:
        config = animation_pb2.RenderConfig(portrait_id=portrait, upload=animation_pb2.UPLOAD_KIND_CLIP)
        yield animation_pb2.RenderRequest(config=config)
        for count in range(1, 400):  # 40 MB, and then it is silent
            yield animation_pb2.RenderRequest(upload_chunk=bytes(100_000))
            say(f"chunk {count}")
        queue.SimpleQueue().get()

    next(stub.Render(requests()))


def say(text: str) -> None:
    """Tell whoever started it."""
    print(text, flush=True)


def main(target: str, portrait: str, kind: str) -> None:
    """Run until killed."""
    with grpc.insecure_channel(target) as channel:
        stub = animation_pb2_grpc.AnimationServiceStub(channel)
        if kind == "upload":
            upload(stub, portrait)
        else:
            animate(stub, portrait, kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
