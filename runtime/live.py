"""Driving frame by frame: a camera or a stream of motion drives a picture, one step at a time and without a look ahead."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.runtime.cast import AnimatedFrame, Cast
from lp_edge.runtime.driver import Driver, DriverFrame
from lp_edge.runtime.family import Family, Portrait
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.runtime.tracking import FaceFinder

__all__ = ["LiveAnimation"]

U8 = npt.NDArray[np.uint8]

# Frames whose boxes are averaged into the crop of a live driver; from then on it stays, so that the head may move in it.
_SETTLE = 25


class LiveAnimation:
    """A picture that follows whatever comes; made by :meth:`lp_edge.runtime.animator.Animator.live`.

    Not for use by several threads at once.

    Args:
        family: reads and draws.
        finder: finds the driver's face.
        rgb: uint8 ``[H, W, 3]``, the source picture.
        portraits: its faces that follow.
        options: how.
        watch: collects the time of each stage.
    """

    def __init__(
        self,
        family: Family[Any],
        finder: FaceFinder,
        rgb: U8,
        portraits: Sequence[Portrait],
        options: AnimateOptions,
        watch: Stopwatch,
    ) -> None:
        driver = Driver("live", "video", Fraction(25), None, None, False, _never)
        self._family, self._options, self._watch = family, options, watch
        self._rgb, self._portraits = rgb, list(enumerate(portraits))
        self._cast = Cast(family, [driver], options, source_clip=False)
        self._tracker = finder.tracker(smooth=options.smooth)
        self._readings: list[Any] = []
        self._motion: Motion | None = None
        self._index = 0

    def step(self, rgb: U8, seconds: float) -> AnimatedFrame:
        """The frame that answers a driving frame.

        Args:
            rgb: uint8 ``[H, W, 3]``, the driving frame.
            seconds: its time, growing from step to step.

        Returns:
            The frame; ``driver.state`` tells whether the face is ``tracked``, ``reacquired``, ``lost`` (the last motion is held) or has
            not been seen yet (``none``: the source as it is).
        """
        with self._watch("track"):
            face = next(iter(self._tracker.update(rgb, seconds)), None)
        state = "none" if face is None else face.state
        if face is not None and state != "lost":
            with self._watch("motion"):
                reading = self._family.read(rgb, face.points, self._options)
                box = None
                if self._family.needs_common_box((rgb.shape[1], rgb.shape[0]), self._options):
                    if len(self._readings) < _SETTLE:
                        self._readings.append(reading)
                    box = self._family.common_box(self._readings)
                self._motion = self._family.motion(rgb, reading, box, self._options)
        elif self._motion is not None:
            state = "lost"
        return self._draw(DriverFrame(Fraction(seconds), self._motion, state, rgb))

    def step_motion(self, motion: Motion, seconds: float) -> AnimatedFrame:
        """The frame that answers a motion of this family, one frame without leading axis; the first one counts as neutral."""
        return self._draw(DriverFrame(Fraction(seconds), motion, "template"))

    def _draw(self, step: DriverFrame) -> AnimatedFrame:
        frame = self._cast.draw(self._index, self._rgb, step.time, self._portraits, [step], self._watch)
        self._index += 1
        return frame


def _never() -> Any:
    raise RuntimeError("a live driver is stepped, not started")
