"""Stands in for ``gst-launch-1.0`` with NVIDIA's elements of a Jetson; FFmpeg's software underneath.

Takes the same words on its command line, holds them to account, and moves media between the same file descriptors.
``FAKE_GST``: ``no-encoder`` (as on Orin Nano), ``fail:N`` (dies after N frames), ``lose:N`` (keeps a frame for itself),
``stick`` (neither reads nor writes).
"""

import os
import sys
import time
from fractions import Fraction

import av
import numpy as np

MODE, _, COUNT = os.environ.get("FAKE_GST", "").partition(":")


def values(element: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in element.replace(",", " ").split()[1:])


def refuse(message: str) -> None:
    print(f"WARNING: erroneous pipeline: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


def put(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def nv12(frame: av.VideoFrame) -> np.ndarray:
    """Interleave chroma by hand: FFmpeg's scaler would also convert full range."""
    planes, chroma = frame.to_ndarray(), frame.width * frame.height // 4
    blue, red = planes.reshape(-1)[4 * chroma :].reshape(2, chroma)
    return np.concatenate([planes[: frame.height], np.stack([blue, red], -1).reshape(-1, frame.width)])


def step(number: int) -> None:
    if MODE == "fail" and number == int(COUNT):
        print("ERROR: from element nvv4l2decoder0: Failed to process frame.", file=sys.stderr, flush=True)
        sys.exit(1)


def decode(source: int, sink: int, codec: str, caps: dict[str, str]) -> None:
    width, height = int(caps["width"]), int(caps["height"])
    context = av.codec.CodecContext.create(codec, "r")
    context.thread_count = 1
    number = 0

    def show(packets: list) -> None:
        nonlocal number
        for packet in packets:
            for frame in context.decode(packet):
                step(number)
                if not (MODE == "lose" and number == int(COUNT)):
                    if (frame.width, frame.height) != (width, height):
                        frame = frame.reformat(width, height)
                    pixels = nv12(frame)
                    rows = np.zeros((height * 3 // 2, -(-width // 4) * 4), np.uint8)
                    rows[:, :width] = pixels
                    put(sink, rows.tobytes())
                number += 1

    while data := os.read(source, 1 << 16):
        show(context.parse(data))
    show([*context.parse(None), None])


def encode(source: int, sink: int, raw: dict[str, str], options: dict[str, str]) -> None:
    width, height = int(raw["width"]), int(raw["height"])
    row = -(-width // 4) * 4
    size = row * height * 3 // 2
    context = av.codec.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = width, height, "yuv420p"
    context.time_base = 1 / Fraction(raw["framerate"])
    assert options["insert-aud"] == options["insert-sps-pps"] == "true"
    assert (options["num-B-Frames"], options["ratecontrol-enable"]) == ("0", "false")
    context.options = {
        "qp": options["quant-p-frames"], "preset": "ultrafast", "bf": "0",
        "x264-params": "aud=1:repeat-headers=1:rc-lookahead=2",
    }  # fmt: skip
    held, number = b"", 0
    while True:
        data = os.read(source, 1 << 16)
        held += data
        while len(held) >= size:
            step(number)
            pixels = np.frombuffer(held[:size], np.uint8).reshape(-1, row)[:, :width]
            held = held[size:]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="nv12").reformat(
                format="yuv420p"
            )
            frame.pts = number
            number += 1
            put(sink, b"".join(bytes(p) for p in context.encode(frame)))
        if not data:
            assert not held
            put(sink, b"".join(bytes(p) for p in context.encode(None)))
            return


def main() -> None:
    assert sys.argv[1] == "-q"
    elements = [e.strip() for e in " ".join(sys.argv[2:]).split("!")]
    print(
        "NvMMLiteOpen : Block : BlockType = 261", flush=True
    )  # NVIDIA's elements do that, on standard output
    source, sink = int(values(elements[0])["fd"]), int(values(elements[-1])["fd"])
    assert elements[0].startswith("fdsrc ")
    assert elements[-1].startswith("fdsink ")
    names = [e.split()[0].split(",")[0] for e in elements]
    if MODE == "stick":
        time.sleep(60)
    if "nvv4l2decoder" in names:
        assert names[1:] == [names[1], "nvv4l2decoder", "nvvidconv", "video/x-raw", "queue", "fdsink"], names
        codec = {"h264parse": "h264", "h265parse": "hevc"}[names[1]]
        caps = values(elements[4])
        assert caps["format"] == "NV12"
        decode(source, sink, codec, caps)
    else:
        if MODE == "no-encoder":
            refuse('no element "nvv4l2h264enc"')
        assert names[1:4] == ["rawvideoparse", "nvvidconv", "video/x-raw(memory:NVMM)"], names
        assert names[4:] == ["nvv4l2h264enc", "h264parse", "video/x-h264", "queue", "fdsink"], names
        encode(source, sink, values(elements[1]), values(elements[4]))


if __name__ == "__main__":
    main()
