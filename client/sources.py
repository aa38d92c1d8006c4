"""Drivers for streams: a clip, a picture, a motion template or a camera as frames with their times."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime.motion import Motion

__all__ = ["Source", "open_source"]

U8 = npt.NDArray[np.uint8]

_CAMERA = re.compile(r"camera:([0-9]{1,3})")


@dataclass(frozen=True)
class Source:
    """A driver, opened.

    Attributes:
        name: for messages and file names.
        frames: begins the ``(seconds, frame)`` pairs; seconds count from the first frame.
        rate: frames a second.
        expected: how many frames; None = not known.
        size: width and height in pixels; ``(0, 0)`` for motion.
        audio: file whose sound belongs to it.
        camera: whether it ends only when somebody stops it.
    """

    name: str
    frames: Callable[[], Iterator[tuple[float, U8 | Motion]]]
    rate: Fraction
    expected: int | None
    size: tuple[int, int]
    audio: Path | None = None
    camera: bool = False


def open_source(
    driving: str | Path, *, family: str = "mesh", fps: Fraction | int = 25, paced: bool = False
) -> Source:
    """Open a driver.

    Args:
        driving: ``camera:N``, the path of a clip, picture or template, or the name of a built-in template.
        family: of the server, for templates.
        fps: rate that is asked of a camera.
        paced: deliver a clip's or template's frames at their times, as a camera would, instead of as fast as they are taken.

    Raises:
        MediaError: it cannot be read, or there is no such camera.
        ConfigError: a template of another family, or a camera without a number.
    """
    camera = _CAMERA.fullmatch(str(driving))
    if camera is not None:
        return _camera(int(camera[1]), Fraction(fps))
    if str(driving).startswith("camera:") and not os.path.exists(driving):
        raise ConfigError(
            f"the camera {str(driving)[:64]!r}", "expected camera: and a number from 0 to 999", "say camera:0"
        )
    from lp_edge.runtime.media_read import VideoReader, probe, sniff_kind

    path = Path(driving)
    kind = sniff_kind(path) if os.path.exists(path) else "template"
    if kind == "template":
        source = _template(path, family)
    elif kind == "image":
        source = _picture(path)
    else:
        info = probe(path)

        def frames() -> Iterator[tuple[float, U8 | Motion]]:
            with VideoReader(path) as reader:
                for frame in reader:
                    yield float(frame.time), frame.rgb

        rate = info.fps or Fraction(25)
        audio = path if info.has_audio else None
        source = Source(path.stem, frames, rate, info.frames, (info.width, info.height), audio)
    if not paced:
        return source
    return Source(
        source.name, lambda: _paced(source.frames()), source.rate, source.expected, source.size, source.audio
    )


def _template(path: Path, family: str) -> Source:
    from lp_edge.runtime.templates import load_template

    template = load_template(path, family=family)

    def frames() -> Iterator[tuple[float, U8 | Motion]]:
        for index in range(len(template)):
            yield float(index / template.fps), template.motion[index]

    return Source(path.stem, frames, template.fps, len(template), (0, 0))


def _picture(path: Path) -> Source:
    from lp_edge.runtime.image import read_image

    rgb = read_image(path)

    def frames() -> Iterator[tuple[float, U8 | Motion]]:
        yield 0.0, rgb

    return Source(path.stem, frames, Fraction(25), 1, (rgb.shape[1], rgb.shape[0]))


def _camera(number: int, fps: Fraction) -> Source:
    import cv2

    from lp_edge.runtime.image import _quiet_opencv

    with _quiet_opencv():
        capture = cv2.VideoCapture(number)
    if not capture.isOpened():
        capture.release()
        raise MediaError(
            f"camera {number} cannot be opened",
            "expected a camera that no other program uses",
            "try another number, or check the rights to /dev/video*",
        )
    capture.set(cv2.CAP_PROP_FPS, float(fps))
    size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))

    def frames() -> Iterator[tuple[float, U8 | Motion]]:
        start: float | None = None
        try:
            while True:
                good, bgr = capture.read()
                if not good:
                    raise MediaError(
                        f"camera {number} gives no more frames", "expected a next one", "connect it again"
                    )
                now = time.monotonic()
                start = now if start is None else start
                yield now - start, np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
        finally:
            capture.release()

    return Source(f"camera-{number}", frames, fps, None, size, camera=True)


def _paced(frames: Iterator[tuple[float, U8 | Motion]]) -> Iterator[tuple[float, U8 | Motion]]:
    start = time.monotonic()
    for seconds, frame in frames:
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        yield seconds, frame
