"""Who follows whom in an animation: faces of the source, drivers, and the frame that they make together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.engines.device import rows
from lp_edge.errors import ConfigError, LimitError, NoFaceError
from lp_edge.runtime.driver import Driver, DriverFrame
from lp_edge.runtime.faces import Face, faces_policy, left_to_right
from lp_edge.runtime.family import Family, Follower, Portrait
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.pixels import Drawn, Rect
from lp_edge.runtime.stopwatch import Stopwatch

__all__ = ["AnimatedFrame", "Cast", "DrawnFrame", "Shot", "Slots", "too_many_drivers"]

_LOG = logging.getLogger("lp_edge")

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

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


@dataclass(frozen=True)
class Shot:
    """What one frame of the result is made from.

    Attributes:
        index: 0, 1, 2, …
        rgb: uint8 ``[H, W, 3]``, the source frame.
        when: its time in seconds.
        faces: its faces, each with its slot.
        steps: the drivers' steps.
        watch: gets the stages of this frame alone; None = those of all frames go together.
    """

    index: int
    rgb: U8
    when: Fraction
    faces: Sequence[tuple[int, Portrait]]
    steps: Sequence[DriverFrame]
    watch: Stopwatch | None = None


class DrawnFrame:
    """A frame of the result, perhaps still being drawn on a device; made by :meth:`Cast.begin`."""

    def __init__(self, shot: Shot, watch: Stopwatch) -> None:
        # Not the shot, which keeps its faces' features on the device until the frame is put together.
        self._index, self._rgb, self._driver, self.watch = shot.index, shot.rgb, shot.steps[0], watch
        self._finished: AnimatedFrame | None = None
        self.faces = 0  # that move
        self.drawn: dict[int, Drawn] = {}  # those, by layer from 0, the lowest
        self.alone: Callable[[], U8] | None = None  # the crop, where nothing is pasted back

    def finish(self) -> AnimatedFrame:
        """Wait for it and put it together; once, however often it is called."""
        if self._finished is None:
            self._finished = self._put_together()
            self.drawn, self.alone = {}, None
        return self._finished

    def _put_together(self) -> AnimatedFrame:
        rgb = self._rgb
        if self.alone is not None or self.drawn:
            with self.watch("paste_back"):
                rgb = rgb.copy() if self.alone is None else self.alone()
                for _, face in sorted(self.drawn.items()):
                    face.write(rgb)
        return AnimatedFrame(self._index, rgb, self._rgb, self._driver)


@dataclass(frozen=True)
class _Part:
    """A face of a frame, composed; ``covers``: it overlaps one of a lower layer, and lies on top."""

    frame: DrawnFrame
    layer: int
    portrait: Portrait
    kp_source: F32
    kp_driving: F32
    covers: bool

    def goes_with(self, other: _Part) -> bool:
        return self.portrait is other.portrait and self.covers == other.covers


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
        self._last: Callable[[], U8] | None = None
        self._most = family.max_batch  # faces that are drawn at once

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

    def begin(self, shots: Sequence[Shot], watch: Stopwatch) -> list[DrawnFrame]:
        """Compose some frames that follow each other and start to draw them.

        What a device draws is perhaps not finished when this returns: :meth:`DrawnFrame.finish` waits for it. Frames are drawn
        in as few calls of the network as the family allows, at most :attr:`Family.max_batch` in one.

        Args:
            shots: the frames, in order.
            watch: gets the stages ``compose``, ``warp`` (on a device: what it takes to queue the work) and ``paste_back``
                (there: with waiting for it), one sample a face or frame, of shots that have no watch of their own.
        """
        frames = [DrawnFrame(shot, shot.watch or watch) for shot in shots]
        parts: list[_Part] = []
        shown = self._last is not None
        for shot, frame in zip(shots, frames, strict=True):
            parts += self._compose(shot, frame, shown)
            shown = shown or frame.faces > 0 or frame.alone is not None
        for group in self._groups(parts):
            self._draw(group)
        if not self._options.paste_back:
            for frame in frames:
                self._last = frame.alone or self._last
                frame.alone = self._last or self._blank
        return frames

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
        return self.begin([Shot(index, rgb, when, faces, steps)], watch)[0].finish()

    def _compose(self, shot: Shot, frame: DrawnFrame, shown: bool) -> Iterator[_Part]:
        """The faces of a frame that move; ``shown``: there is a crop of a frame before it."""
        edits = self._options.edits_at(float(shot.when))
        taken: list[Rect] = []
        for slot, portrait in shot.faces:
            moves = self.motions(slot, shot.steps, portrait.motion)
            if moves is None:
                if not (self._options.paste_back or shown or frame.faces or frame.alone):
                    still = self._family.still_crop(portrait)
                    (frame.alone,) = self._family.crops_alone(portrait, still, self._options)
                continue
            with frame.watch("compose"):
                keypoints = self.follower(slot).keypoints(shot.index, portrait, *moves, edits)
            covers = any(_overlap(portrait.place.rect, rect) for rect in taken)
            taken.append(portrait.place.rect)
            yield _Part(frame, frame.faces, portrait, *keypoints, covers)
            frame.faces += 1

    def _groups(self, parts: Sequence[_Part]) -> Iterator[list[_Part]]:
        """Parts that one call of the network draws: those of one portrait, or, where the family can, one of each of several.

        A portrait's features serve all rows of a call as they are; laid together with others they are copied for each row.
        """
        by_portrait: dict[int, list[_Part]] = {}
        for part in parts:
            by_portrait.setdefault(id(part.portrait), []).append(part)
        groups = [*by_portrait.values()]
        if self._family.mixes_portraits and all(len(group) == 1 for group in groups):
            groups = [[*parts]]
        size = self._most or max(1, len(parts))
        for group in groups:
            yield from (group[start : start + size] for start in range(0, len(group), size))

    def _draw(self, group: Sequence[_Part]) -> None:
        """Draw a group; in halves where there is no memory for it, and from then on none is as large."""
        started = time.perf_counter()
        try:
            self._render(group)
        except LimitError as error:
            half = len(group) // 2
            if not half:
                raise
            _LOG.warning("%d faces drawn at once: %s; from now on at most %d", len(group), error.got, half)
            self._most = half
        else:
            share = (time.perf_counter() - started) / len(group)
            for part in group:
                part.frame.watch.add("warp", share)
            return
        # Not within the handler: the error keeps what the call held.
        self._draw(group[:half])
        self._draw(group[half:])

    def _render(self, group: Sequence[_Part]) -> None:
        """Let the network draw a group, and hand rows of its crops to their frames, in runs of one portrait."""
        crops = self._family.render(
            [part.portrait for part in group],
            [part.kp_source for part in group],
            [part.kp_driving for part in group],
        )
        start = 0
        while start < len(group):
            first = group[start]
            stop = start + 1
            while stop < len(group) and group[stop].goes_with(first):
                stop += 1
            run, mine = group[start:stop], rows(crops, start, stop)
            if self._options.paste_back:
                placed = first.portrait.place.draw(mine, blend_on_host=first.covers)
                for part, drawn in zip(run, placed, strict=True):
                    part.frame.drawn[part.layer] = drawn
            else:
                alone = self._family.crops_alone(first.portrait, mine, self._options)
                for part, picture in zip(run, alone, strict=True):
                    if part.layer == part.frame.faces - 1:  # where there are several faces, the uppermost
                        part.frame.alone = picture
            start = stop

    def _blank(self) -> U8:
        """Until the first face of a clip there is nothing to cut out."""
        size = self._family.crop_size(self._options)
        return np.zeros((size, size, 3), np.uint8)


def _overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


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
