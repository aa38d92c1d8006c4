"""Who follows whom in an animation: faces of the source, drivers, and the frame that they make together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, NoFaceError
from lp_edge.runtime.driver import Driver, DriverFrame
from lp_edge.runtime.faces import Face, faces_policy, left_to_right
from lp_edge.runtime.family import Family, Follower, Portrait
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.stopwatch import Stopwatch

__all__ = ["AnimatedFrame", "Cast", "Slots", "too_many_drivers"]

U8 = npt.NDArray[np.uint8]

_MAX_FACES = 8


@dataclass(frozen=True)
class AnimatedFrame:
    """One frame of the result.

    Attributes:
        index: 0, 1, 2, …
        rgb: uint8 ``[H, W, 3]``, the animated source frame (or the crop alone, where nothing is pasted back).
        source: uint8 ``[H, W, 3]``, the source frame it was made from.
        driver: the driving step it shows, of the first driver where there are several.
    """

    index: int
    rgb: U8
    source: U8
    driver: DriverFrame


class Cast:
    """Who follows whom: one driver for all faces, or one for each from the first on; faces beyond the drivers stay still.

    Args:
        family: draws.
        drivers: at least one.
        options: how.
        source_clip: the source is a clip.
    """

    def __init__(
        self, family: Family[Any], drivers: Sequence[Driver], options: AnimateOptions, *, source_clip: bool
    ) -> None:
        self._family, self._options, self._source_clip = family, options, source_clip
        self.drivers = drivers
        self._neutral = [d.neutral for d in drivers]
        self._followers: dict[int, Follower[Any]] = {}
        for slot in range(len(drivers)):
            self.follower(slot)  # so that an option that does not fit is told before any work
        self._last: U8 | None = None

    def driver_of(self, slot: int) -> int | None:
        """Index of the driver of the face in ``slot``; None when there is none."""
        if len(self.drivers) == 1:
            return 0
        return slot if slot < len(self.drivers) else None

    def follower(self, slot: int) -> Follower[Any]:
        """The follower of the face in ``slot``, which must have a driver."""
        if slot not in self._followers:
            index = self.driver_of(slot)
            if index is None:
                raise ConfigError(f"face {slot} has no driver", f"there are {len(self.drivers)}", "add one")
            kind = self.drivers[index].kind
            self._followers[slot] = self._family.follower(self._options, kind, source_clip=self._source_clip)
        return self._followers[slot]

    def record(self) -> None:
        """Read all drivers' motion before the first frame."""
        self.drivers = [d.recorded() for d in self.drivers]
        self._neutral = [d.neutral for d in self.drivers]

    def neutral_of(self, slot: int) -> Motion | None:
        """Neutral motion of the driver of the face in ``slot``, where it is known."""
        index = self.driver_of(slot)
        return None if index is None else self._neutral[index]

    def motions(self, slot: int, steps: Sequence[DriverFrame], own: Motion) -> tuple[Motion, Motion] | None:
        """Driving and neutral motion of the face in ``slot``; None while its driver shows no face."""
        index = self.driver_of(slot)
        if index is None:
            return None
        step = steps[index]
        if step.state == "edit":
            return own, own
        if step.motion is None:
            return None
        neutral = self._neutral[index]
        if neutral is None:
            neutral = self._neutral[index] = step.motion
        return step.motion, neutral

    def draw(
        self,
        index: int,
        rgb: U8,
        when: Fraction,
        faces: Sequence[tuple[int, Portrait]],
        steps: Sequence[DriverFrame],
        watch: Stopwatch,
    ) -> AnimatedFrame:
        """One frame of an animation; a face stays as it is while its driver shows none."""
        options, family = self._options, self._family
        out: U8 | None = None
        edits = options.edits_at(float(when))
        for slot, portrait in faces:
            moves = self.motions(slot, steps, portrait.motion)
            if moves is None:
                if not options.paste_back and self._last is None:
                    self._last = family.crop_only(portrait, None, options)
                continue
            with watch("compose"):
                kp_source, kp_driving = self.follower(slot).keypoints(index, portrait, *moves, edits)
            with watch("warp"):
                crop = family.render(portrait, [kp_source], [kp_driving])[0]
            with watch("paste_back"):
                if options.paste_back:
                    out = family.paste(portrait, crop, out)
                else:
                    self._last = family.crop_only(portrait, crop, options)
        if not options.paste_back:
            size = family.crop_size(options)
            # until the first face of a clip there is nothing to cut out
            out = self._last if self._last is not None else np.zeros((size, size, 3), np.uint8)
        return AnimatedFrame(index, rgb if out is None else out, rgb, steps[0])


class Slots:
    """Gives the faces of a source clip lasting places: 0, 1, … from left to right as they stand when first seen.

    A tracker that loses a face for long finds it again under a new id; it then takes the vacant place that lies nearest.
    """

    def __init__(self, policy: str, drivers: int) -> None:
        wanted = faces_policy(policy)
        self._largest = wanted == "largest"
        self._chosen = wanted if isinstance(wanted, tuple) else None
        self._drivers = drivers
        self._slot: dict[int, int] = {}
        self._place: dict[int, npt.NDArray[np.float64]] = {}

    @property
    def max_faces(self) -> int:
        """How many faces have to be tracked."""
        return 1 if self._largest else _MAX_FACES

    def _check_first(self, count: int) -> None:
        """The first frame with faces decides how many there are to choose from."""
        if self._chosen is not None and max(self._chosen) >= count:
            raise NoFaceError(
                f"face {max(self._chosen)} was asked for, the clip's first frame with faces shows {count}",
                f"expected an index from 0 to {count - 1}, counted from left to right",
                "choose a smaller index",
            )
        places = 1 if self._largest else count if self._chosen is None else len(self._chosen)
        if places < self._drivers:
            raise too_many_drivers(self._drivers, places)

    def assign(self, faces: Sequence[Face]) -> list[tuple[int, Face]]:
        """The visible faces that are animated, with the number of their place among the chosen ones.

        Raises:
            NoFaceError: the first frame with faces shows fewer than an index asks for.
            ConfigError: it shows fewer than there are drivers.
        """
        seen = left_to_right([f for f in faces if f.visible])
        if seen and not self._place:
            self._check_first(len(seen))
        for face in seen:
            centre = np.asarray(face.points[:, :2], np.float64).mean(0)
            if face.id not in self._slot:
                taken = {self._slot[f.id] for f in seen if f.id in self._slot}
                vacant = [slot for slot in self._place if slot not in taken]
                if self._largest:
                    self._slot[face.id] = 0
                elif vacant:
                    self._slot[face.id] = min(
                        vacant, key=lambda s: float(np.linalg.norm(self._place[s] - centre))
                    )
                else:
                    self._slot[face.id] = len(self._place)
            self._place[self._slot[face.id]] = centre
        placed = [(self._slot[f.id], f) for f in seen]
        if self._chosen is None:
            return placed
        return [(self._chosen.index(slot), f) for slot, f in placed if slot in self._chosen]


def too_many_drivers(drivers: int, faces: int) -> ConfigError:
    """The error for more drivers than faces to animate."""
    return ConfigError(
        f"{drivers} drivers for {faces} face{'s' * (faces != 1)}",
        "expected one driver for all faces, or at most one for each face that is animated",
        "leave drivers out, or choose more faces (--faces left-right)",
    )
