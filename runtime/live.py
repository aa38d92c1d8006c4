"""Driving frame by frame: a camera or a stream of motion drives a picture, one step at a time and without a look ahead.

::

    frame ── LiveReader.read ──> DriverFrame ── LivePuppet.draw ──> AnimatedFrame      (LiveAnimation is both)

The two halves share nothing, so that one thread may read the next frame while another draws, and one reader may serve
several puppets.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.runtime.cast import AnimatedFrame, Cast, DrawnFrame, Shot
from lp_edge.runtime.driver import Driver, DriverFrame
from lp_edge.runtime.family import Family, Portrait
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.runtime.tracking import FaceFinder

__all__ = ["LiveAnimation", "LivePuppet", "LiveReader"]

U8 = npt.NDArray[np.uint8]

# Frames whose boxes are averaged into the crop of a live driver; from then on it stays, so that the head may move in it.
_SETTLE = 25


class LiveReader:
    """Reads the motion of one face from frame to frame; not for use by several threads at once.

    Args:
        family: reads.
        finder: finds the face.
        options: ``smooth`` and the driving crop matter.
    """

    def __init__(self, family: Family[Any], finder: FaceFinder, options: AnimateOptions) -> None:
        self._family, self._finder, self._options = family, finder, options
        self._tracker = finder.tracker(smooth=options.smooth)
        self._readings: list[Any] = []
        self._motion: Motion | None = None

    def set_options(self, options: AnimateOptions) -> None:
        """Read on in another way; the face stays found unless smoothing changes."""
        if options.smooth != self._options.smooth:
            self._tracker = self._finder.tracker(smooth=options.smooth)
        if (options.crop, options.driving_crop) != (self._options.crop, self._options.driving_crop):
            self._readings = []
        self._options = options

    def read(self, rgb: U8, seconds: float, watch: Stopwatch) -> DriverFrame:
        """Motion of the next frame.

        Args:
            rgb: uint8 ``[H, W, 3]``.
            seconds: its time, growing from call to call.
            watch: gets the stages ``track`` and ``motion``.

        Returns:
            The step; its state is ``tracked``, ``reacquired``, ``lost`` (the last motion is held) or ``none`` (no face yet).
        """
        with watch("track"):
            face = next(iter(self._tracker.update(rgb, seconds)), None)
        state = "none" if face is None else face.state
        if face is not None and state != "lost":
            with watch("motion"):
                reading = self._family.read(rgb, face.points, self._options)
                box = None
                if self._family.needs_common_box((rgb.shape[1], rgb.shape[0]), self._options):
                    if len(self._readings) < _SETTLE:
                        self._readings.append(reading)
                    box = self._family.common_box(self._readings)
                self._motion = self._family.motion(rgb, reading, box, self._options)
        elif self._motion is not None:
            state = "lost"
        return DriverFrame(Fraction(seconds), self._motion, state, rgb)


class LivePuppet:
    """A picture that follows one step after the other; not for use by several threads at once.

    Args:
        family: draws.
        rgb: uint8 ``[H, W, 3]``, the source picture.
        portraits: its faces that follow.
        options: how.
        neutral: the motion that stands for "no motion"; None = that of the first step that has one.

    Raises:
        ConfigError: an option does not fit the family.
    """

    def __init__(
        self,
        family: Family[Any],
        rgb: U8,
        portraits: Sequence[Portrait],
        options: AnimateOptions,
        neutral: Motion | None = None,
    ) -> None:
        self._family, self._rgb, self._portraits = family, rgb, list(enumerate(portraits))
        self._options = options
        self._cast = self._new_cast(options, neutral)
        self._index = 0

    def _new_cast(self, options: AnimateOptions, neutral: Motion | None) -> Cast:
        driver = Driver("live", "video", Fraction(25), None, neutral, False, _never)
        return Cast(self._family, [driver], options, source_clip=False)

    def set_options(self, options: AnimateOptions) -> None:
        """Draw on in another way; what counts as neutral stays. ConfigError: an option does not fit the family."""
        self._cast, self._options = self._new_cast(options, self._cast.neutral_of(0)), options

    def set_neutral(self, motion: Motion | None) -> None:
        """From now on ``motion`` stands for "no motion"; None = that of the next step that has one."""
        self._cast = self._new_cast(self._options, motion)

    def begin(self, step: DriverFrame, watch: Stopwatch) -> DrawnFrame:
        """Start to draw the frame that answers a step; ``watch`` gets the stages ``compose``, ``warp`` and ``paste_back``.

        On a device the next one may be begun before this one is finished.
        """
        shot = Shot(self._index, self._rgb, step.time, self._portraits, [step])
        self._index += 1
        return self._cast.begin([shot], watch)[0]

    def draw(self, step: DriverFrame, watch: Stopwatch) -> AnimatedFrame:
        """:meth:`begin`, and the frame when it is finished."""
        return self.begin(step, watch).finish()


class LiveAnimation:
    """A picture that follows whatever comes; made by :meth:`lp_edge.runtime.animator.Animator.live`.

    Not for use by several threads at once.

    Args:
        reader: reads the driver's motion.
        puppet: draws.
        watch: collects the time of each stage.
    """

    def __init__(self, reader: LiveReader, puppet: LivePuppet, watch: Stopwatch) -> None:
        self._reader, self._puppet, self._watch = reader, puppet, watch

    def step(self, rgb: U8, seconds: float) -> AnimatedFrame:
        """The frame that answers a driving frame.

        Args:
            rgb: uint8 ``[H, W, 3]``, the driving frame.
            seconds: its time, growing from step to step.

        Returns:
            The frame; ``driver.state`` tells whether the face is ``tracked``, ``reacquired``, ``lost`` (the last motion is held) or has
            not been seen yet (``none``: the source as it is).
        """
        return self._puppet.draw(self._reader.read(rgb, seconds, self._watch), self._watch)

    def step_motion(self, motion: Motion, seconds: float) -> AnimatedFrame:
        """The frame that answers a motion of this family, one frame without leading axis; the first one counts as neutral."""
        return self._puppet.draw(DriverFrame(Fraction(seconds), motion, "template"), self._watch)

    def set_options(self, options: AnimateOptions) -> None:
        """Go on with other options; those of :meth:`Animator.prepare_source` (faces, size, crop) have no effect any more.

        Raises:
            ConfigError: an option does not fit the family.
        """
        self._puppet.set_options(options)
        self._reader.set_options(options)

    def set_neutral(self, motion: Motion | None = None) -> None:
        """From now on ``motion`` stands for "no motion"; None = that of the next step that has one."""
        self._puppet.set_neutral(motion)


def _never() -> Any:
    raise RuntimeError("a live driver is stepped, not started")
