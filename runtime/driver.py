"""Drivers: clips, pictures, templates and edits, made ready to run as a stream of motion."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, MediaError, NoFaceError
from lp_edge.runtime.family import DriverKind, Family
from lp_edge.runtime.hardware_video import Video
from lp_edge.runtime.image import read_image
from lp_edge.runtime.media_read import MediaInfo, VideoReader, probe, resample, sniff_kind
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.pipeline import prefetch
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.runtime.templates import MotionTemplate
from lp_edge.runtime.tracking import FaceFinder

__all__ = ["Driver", "DriverFrame", "Drivers", "at_rate", "decode", "frame_rate"]

U8 = npt.NDArray[np.uint8]

_QUEUE = 4
_PICTURE_FPS = Fraction(25)


@dataclass(frozen=True)
class DriverFrame:
    """One step of a driver.

    Attributes:
        time: seconds from the driver's start.
        motion: motion of the face, held while the face is lost; ``None`` before the first face appears, and for edits, which have
            no motion of their own.
        state: ``tracked``, ``reacquired``, ``lost`` or ``none`` (no face yet); ``template`` for a template, ``edit`` for edits.
        rgb: the driving picture uint8 ``[H, W, 3]``; ``None`` where there is none, or none was asked for.
    """

    time: Fraction
    motion: Motion | None
    state: str
    rgb: U8 | None = None


@dataclass(frozen=True)
class Driver:
    """A driver that is ready to run, as often as wanted.

    Attributes:
        name: what it is called in messages.
        kind: clip or template, picture, or edits alone.
        fps: its frame rate, exact.
        expected: number of frames, None when unknown.
        neutral: the motion that stands for "no motion"; None = that of the first frame that has one.
        still: one step that holds for as long as the source lasts.
        start: begins a run.
        pictures: decodes its frames alone, as many as ``start`` gives; None where there are none.
    """

    name: str
    kind: DriverKind
    fps: Fraction
    expected: int | None
    neutral: Motion | None
    still: bool
    start: Callable[[], Generator[DriverFrame, None, None]]
    pictures: Callable[[], Iterator[U8]] | None = None

    def recorded(self, pixels: bool = False) -> Driver:
        """Run it once and keep its motion (a few hundred bytes to 6 kB a frame), so that it runs again without networks.

        Args:
            pixels: give the pictures too when it runs again; they are decoded anew, not kept.
        """
        with closing(self.start()) as steps:
            frames = [replace(step, rgb=None) for step in steps]

        def start() -> Generator[DriverFrame, None, None]:
            yield from frames

        neutral = self.neutral
        if neutral is None:
            neutral = next((f.motion for f in frames if f.motion is not None), None)
        recorded = replace(self, expected=len(frames), neutral=neutral, start=start)
        return recorded.with_pictures() if pixels else recorded

    def with_pictures(self) -> Driver:
        """A recorded driver whose frames carry their pictures, where it has any; they are decoded as it runs."""
        pictures = self.pictures
        if pictures is None:
            return self

        def start() -> Generator[DriverFrame, None, None]:
            with (
                closing(self.start()) as steps,
                prefetch(pictures(), _QUEUE, "decode driving again") as decoded,
            ):
                for step, rgb in zip(steps, decoded, strict=True):
                    yield replace(step, rgb=rgb)

        return replace(self, start=start)


class Drivers:
    """Opens drivers for one family.

    Args:
        family: reads the motion.
        finder: finds the faces.
        video: decodes their clips.
    """

    def __init__(self, family: Family[Any], finder: FaceFinder, video: Video) -> None:
        self._family, self._finder, self._video = family, finder, video

    def open(
        self, driving: str | Path | MotionTemplate | Driver | None, options: AnimateOptions, watch: Stopwatch
    ) -> Driver:
        """Look at a driver and make it ready to run.

        Args:
            driving: clip, picture, template file, name of a built-in template, template, an open driver, or None for edits alone.

        Raises:
            MediaError, NoFaceError, ConfigError: it cannot drive.
        """
        if isinstance(driving, Driver):
            return driving
        if driving is None:
            return _edit_driver(options)
        if isinstance(driving, MotionTemplate):
            return self._template(driving, options)
        path = Path(driving)
        kind = "template" if not path.exists() else sniff_kind(path)
        if kind == "template":
            return self._template(self._family.load_template(driving), options)
        return self._picture(path, options, watch) if kind == "image" else self._clip(path, options, watch)

    def _template(self, template: MotionTemplate, options: AnimateOptions) -> Driver:
        if template.family != self._family.name:
            raise ConfigError(
                f"the template holds motion of the family {template.family}",
                f"the bundle is of the family {self._family.name}",
                "load it with the family's load_template, or use a bundle of that family",
            )
        index = options.neutral or template.neutral
        if index >= len(template.motion):
            raise _neutral_beyond(index, len(template.motion))

        def start() -> Generator[DriverFrame, None, None]:
            for i in range(count):
                yield DriverFrame(Fraction(i) / template.fps, template.motion[i], "template")

        name = template.source or "template"
        count = len(template.motion)
        # One frame is a picture's worth of motion: it has no change over time to be relative to.
        if count == 1:
            neutral = self._family.picture_neutral(template.motion[0])
            return Driver(name, "image", template.fps, 1, neutral, True, start)
        return Driver(name, "video", template.fps, count, template.motion[index], False, start)

    def _picture(self, path: Path, options: AnimateOptions, watch: Stopwatch) -> Driver:
        rgb = read_image(path)
        with watch("motion"):
            face = self._finder.find(rgb)[0]
            reading = self._family.read(rgb, face.points, options)
            size = (rgb.shape[1], rgb.shape[0])
            box = self._family.common_box([reading]) if self._family.needs_common_box(size, options) else None
            motion = self._family.motion(rgb, reading, box, options)

        def start() -> Generator[DriverFrame, None, None]:
            yield DriverFrame(Fraction(0), motion, "tracked", rgb)

        neutral = self._family.picture_neutral(motion)
        return Driver(path.name, "image", _PICTURE_FPS, 1, neutral, True, start, lambda: iter([rgb]))

    def _clip(self, path: Path, options: AnimateOptions, watch: Stopwatch) -> Driver:
        info = probe(path)
        fps = frame_rate(info)
        boxed = self._family.needs_common_box((info.width, info.height), options)

        def start() -> Generator[DriverFrame, None, None]:
            if boxed:
                return self._boxed(path, fps, options, watch)
            return self._tracked(path, fps, options, watch)

        neutral = None
        if options.neutral:
            with prefetch(start(), 1, "neutral") as steps:
                step = next(itertools.islice(steps, options.neutral, None), None)
            if step is None:
                raise _neutral_beyond(options.neutral, info.frames or 0)
            if step.state not in ("tracked", "reacquired"):
                raise NoFaceError(
                    f"frame {options.neutral} of {path.name} shows no face",
                    "expected a face in the neutral frame",
                    "choose another --neutral",
                )
            neutral = step.motion

        def pictures() -> Iterator[U8]:
            return (rgb for _, rgb in decode(path, fps, watch, self._video))

        return Driver(path.name, "video", fps, info.frames, neutral, False, start, pictures)

    def _readings(
        self, path: Path, fps: Fraction, options: AnimateOptions, watch: Stopwatch
    ) -> Generator[tuple[Fraction, U8, str, Any], None, None]:
        """Time, picture, state and reading of every frame; the reading is None where no face is seen."""
        tracker = self._finder.tracker(smooth=options.smooth)
        any_face, seen = False, 0
        with prefetch(decode(path, fps, watch, self._video), _QUEUE, "decode driving") as frames:
            for when, rgb in frames:
                with watch("track"):
                    face = next(iter(tracker.update(rgb, float(when))), None)
                    state = "none" if face is None else face.state
                    reading = None
                    if face is not None and state != "lost":
                        reading, any_face = self._family.read(rgb, face.points, options), True
                    elif any_face:
                        state = "lost"
                seen += 1
                if not any_face and when > options.face_timeout:
                    raise NoFaceError(
                        f"no face in the first {float(when):.1f} s of {path.name}",
                        f"expected one within {options.face_timeout:g} s",
                        "trim the clip or raise --face-timeout",
                    )
                yield when, rgb, state, reading
        if not any_face:
            raise NoFaceError(
                f"no face in any of the {seen} frames of {path.name}",
                "expected a face of 40 pixels or more",
                "use a clip that shows the face larger or more upright",
            )

    def _tracked(
        self, path: Path, fps: Fraction, options: AnimateOptions, watch: Stopwatch
    ) -> Generator[DriverFrame, None, None]:
        """Motion of a driving clip in one pass."""
        with closing(self._readings(path, fps, options, watch)) as readings:
            yield from self._motions(readings, None, options, watch)

    def _boxed(
        self, path: Path, fps: Fraction, options: AnimateOptions, watch: Stopwatch
    ) -> Generator[DriverFrame, None, None]:
        """Motion of a driving clip in two passes: the box that all frames share, then the frames cut with it."""
        with closing(self._readings(path, fps, options, watch)) as found:
            notes = [(state, reading) for _, _, state, reading in found]
        box = self._family.common_box([reading for _, reading in notes if reading is not None])
        with prefetch(decode(path, fps, watch, self._video), _QUEUE, "decode driving again") as frames:
            steps = (
                (when, rgb, state, reading)
                for (when, rgb), (state, reading) in zip(frames, notes, strict=True)
            )
            yield from self._motions(steps, box, options, watch)

    def _motions(
        self,
        readings: Iterable[tuple[Fraction, U8, str, Any]],
        box: npt.NDArray[np.float32] | None,
        options: AnimateOptions,
        watch: Stopwatch,
    ) -> Generator[DriverFrame, None, None]:
        motion: Motion | None = None
        for when, rgb, state, reading in readings:
            if reading is not None:
                with watch("motion"):
                    motion = self._family.motion(rgb, reading, box, options)
            yield DriverFrame(when, motion, state, rgb)


def _edit_driver(options: AnimateOptions) -> Driver:
    """No driver: the source keeps its own motion and the edits act on it, over time where there are keyframes."""
    keyframes = options.keyframes
    count = 1 if keyframes is None else max(1, math.ceil(keyframes.duration * _PICTURE_FPS))

    def start() -> Generator[DriverFrame, None, None]:
        for i in range(count):
            yield DriverFrame(i / _PICTURE_FPS, None, "edit")

    return Driver("edits", "edit", _PICTURE_FPS, count, None, keyframes is None, start)


def at_rate(driver: Driver, fps: Fraction) -> Generator[DriverFrame, None, None]:
    """The driver's steps at another constant rate: for each output time the newest step that is due.

    A driver that is still never ends: it holds its one step for as long as it is asked.
    """
    with closing(driver.start()) as steps:
        index = 0
        current = next(steps, None)
        while current is not None:
            following = next(steps, None)
            end = following.time if following is not None else current.time + 1 / driver.fps
            while Fraction(index) / fps < end or (driver.still and following is None):
                yield current
                index += 1
            current = following


def decode(path: Path, fps: Fraction, watch: Stopwatch, video: Video) -> Iterator[tuple[Fraction, U8]]:
    """Frames of a clip at a constant rate, with their times."""
    with VideoReader(path, video=video) as reader:
        start = time.perf_counter()
        for frame in resample(reader, fps):
            watch.add("decode", time.perf_counter() - start)
            yield frame.time, frame.rgb
            start = time.perf_counter()


def frame_rate(info: MediaInfo) -> Fraction:
    """The clip's frame rate; MediaError when it states none."""
    if info.fps is None or info.fps <= 0:
        raise MediaError(
            "the clip states no frame rate",
            "expected a rate above 0",
            "convert it with a constant frame rate",
        )
    return info.fps


def _neutral_beyond(index: int, frames: int) -> ConfigError:
    return ConfigError(
        f"neutral frame {index}", f"the driver has {frames} frames", "choose a smaller --neutral"
    )
