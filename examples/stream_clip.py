"""A clip or a camera drives a portrait through a server; the result is shown in a window or written into a file.

lp-serve &
python examples/stream_clip.py portrait.jpg driver.mp4 -o result.mp4
python examples/stream_clip.py portrait.jpg camera:0                 # q or Esc ends it
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Literal

import cv2

from lp_edge.client import AnimateStream, Client, Frame
from lp_edge.client.sources import Source, open_source
from lp_edge.errors import LpEdgeError
from lp_edge.runtime.media_write import open_writer

TITLE = "lp-edge"


def has_window() -> bool:
    """Whether OpenCV can open one: a build with a GUI, and a display."""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or os.name == "nt"):
        return False
    try:
        cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL)
    except cv2.error:  # opencv-python-headless
        return False
    return True


def show(frame: Frame) -> bool:
    """Show a frame; False when the user wants to stop."""
    cv2.imshow(TITLE, cv2.cvtColor(frame.rgb, cv2.COLOR_RGB2BGR))
    return cv2.waitKey(1) not in (ord("q"), 27)


def watch(stream: AnimateStream, source: Source, limit: int | None) -> Iterator[Frame]:
    """The answers, with a line for each second."""
    for number, frame in enumerate(stream.drive(itertools.islice(source.frames(), limit)), 1):
        if number % round(source.rate) == 0:
            trip = 1000 * (frame.round_trip or 0)
            print(f"{frame.timestamp:6.1f} s  {frame.face_state:10}  {trip:5.0f} ms  {frame.dropped} dropped")
        yield frame


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("portrait", help="picture to animate")
    parser.add_argument("driving", help="clip, picture, template, or camera:N")
    parser.add_argument("-o", "--output", help="file to write; without it a window is opened")
    parser.add_argument("--target", default="127.0.0.1:50051", help="where lp-serve listens")
    parser.add_argument("--frames", type=int, help="stop after so many frames")
    args = parser.parse_args()
    if args.output is None and not has_window():
        parser.error("there is no display, or OpenCV has no GUI (pip install opencv-python): give -o FILE")

    with (
        Client(args.target, token=os.environ.get("LP_EDGE_TOKEN")) as client,
        contextlib.ExitStack() as stack,
    ):
        to_file = args.output is not None
        source = open_source(args.driving, family=client.info().family, paced=not to_file)
        portrait = client.register(args.portrait)
        stack.callback(client.delete, portrait)
        # A file gets every frame; in a window only the newest one counts.
        live = source.camera or not to_file
        mode: Literal["live", "lossless"] = "live" if live else "lossless"
        stream = stack.enter_context(client.animate(portrait, mode=mode, driving_size=source.size))
        print(f"{mode}, {stream.transport}{stream.transport_reason and ': ' + stream.transport_reason}")
        writer, count = None, 0
        for frame in watch(stream, source, args.frames):
            count += 1
            if not to_file:
                if not show(frame):
                    break
                continue
            if writer is None:
                size = (frame.rgb.shape[1], frame.rgb.shape[0])
                writer = stack.enter_context(open_writer(args.output, size, source.rate))
            writer.write(frame.rgb)
        print(f"{count} frames, {stream.dropped} dropped")


if __name__ == "__main__":
    try:
        main()
    except LpEdgeError as error:
        sys.exit(f"stream_clip.py: {error}")
