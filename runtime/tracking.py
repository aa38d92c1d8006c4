"""Faces over time: tracking by the mesh of the frame before, re-detection, identities, one-euro smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError
from lp_edge.runtime import topology
from lp_edge.runtime.faces import (
    Face,
    FaceBox,
    FaceDetector,
    FaceMeshNet,
    FaceState,
    box_of_points,
    confirm_faces,
    crop_from_points,
    iou_matrix,
    locate_faces,
    no_face_error,
    non_maximum_suppression,
    select_faces,
)

__all__ = [
    "FaceFinder",
    "FaceTracker",
    "MeshSmoother",
    "OneEuroConfig",
    "OneEuroFilter",
    "SmoothConfig",
    "TrackerConfig",
]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


# --- smoothing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneEuroConfig:
    """Parameters of a one-euro filter (Casiez, Roussel, Vogel, CHI 2012).

    Attributes:
        min_cutoff: cut-off frequency at rest in Hz; lower = calmer.
        beta: how much the cut-off rises with speed, Hz per (size / s), where size is the face's; higher = less lag.
        derivative_cutoff: cut-off of the speed estimate in Hz.

    Raises:
        ConfigError: a value is negative or zero where it must not be.
    """

    min_cutoff: float = 1.0
    beta: float = 20.0
    derivative_cutoff: float = 4.0

    def __post_init__(self) -> None:
        if not (self.min_cutoff > 0 and self.beta >= 0 and self.derivative_cutoff > 0):
            raise ConfigError(
                f"one-euro filter with min_cutoff {self.min_cutoff}, beta {self.beta}, "
                f"derivative_cutoff {self.derivative_cutoff}",
                "expected positive cut-offs and a beta of 0 or more",
                "use the defaults",
            )


class OneEuroFilter:
    """One-euro filter over many points at once: a low-pass whose cut-off grows with each point's speed.

    With ``w(f) = 1 / (1 + 1 / (2π f Δt))``, speed ``v ← w(derivative_cutoff) · Δx/Δt + (1 - w) · v`` and
    ``x̂ ← w(f) · x + (1 - w(f)) · x̂`` at ``f = min_cutoff + beta · |v| / size``. ``|v|`` is the length of a point's
    velocity, so the result does not depend on the direction of motion, and ``size`` makes it independent of resolution.

    Args:
        config: the parameters.
        gain: per point ``[P]``, multiplies beta; ``None`` = 1.
    """

    def __init__(self, config: OneEuroConfig | None = None, gain: npt.ArrayLike | None = None) -> None:
        self.config = config or OneEuroConfig()
        self._beta = np.asarray(self.config.beta * np.asarray(1.0 if gain is None else gain), np.float32)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next values pass unchanged."""
        self._time: float | None = None
        self._raw: F32 = np.zeros((0, 0), np.float32)
        self._value, self._speed = self._raw, self._raw

    def __call__(self, values: npt.ArrayLike, time_s: float, size: float = 1.0) -> F32:
        """Filter one sample.

        Args:
            values: ``[P, D]``.
            time_s: its time in seconds; steps may be uneven. A time that does not grow restarts the filter.
            size: length that counts as 1 for speeds, in the values' unit, > 0.

        Returns:
            float32 ``[P, D]``.
        """
        x: F32 = np.array(values, np.float32)
        if self._time is None or time_s <= self._time or x.shape != self._value.shape:
            self._time, self._raw, self._value, self._speed = time_s, x, x, np.zeros_like(x)
            return np.array(x)
        step = time_s - self._time
        a = _alpha(self.config.derivative_cutoff, step)
        self._speed = self._speed + np.float32(a) * ((x - self._raw) / np.float32(step) - self._speed)
        speed = np.sqrt((self._speed**2).sum(-1)) / np.float32(max(size, 1e-6))
        rate = np.float32(2 * math.pi * step) * (np.float32(self.config.min_cutoff) + self._beta * speed)
        self._value = self._value + (rate / (1 + rate))[:, None] * (x - self._value)
        self._time, self._raw = time_s, x
        return np.array(self._value)


def _alpha(cutoff: float, step: float) -> float:
    rate = 2 * math.pi * cutoff * step
    return rate / (1 + rate)


@dataclass(frozen=True)
class SmoothConfig:
    """How mesh points are smoothed.

    With the defaults at 25 frames a second, still faces with 0.1 % of their size of noise per point jitter less than
    half as much, and a blink of four frames keeps more than 90 % of its depth.

    Attributes:
        head: filter of the head's place (mean of the rigid points).
        points: filter of every point against that place.
        quick: factor on beta for the points of eyes and lips, whose quick motion matters most.
    """

    head: OneEuroConfig = field(default_factory=lambda: OneEuroConfig(derivative_cutoff=5.0))
    points: OneEuroConfig = field(default_factory=OneEuroConfig)
    quick: float = 4.0


class MeshSmoother:
    """One-euro smoothing of one face's mesh: the place of the head and the points against it, each by itself.

    So a head that moves does not open the filter for the jitter of its points, and eyes and lips (factor ``quick``)
    react at once while the rest is calmed more.
    """

    def __init__(self, config: SmoothConfig | None = None) -> None:
        config = config or SmoothConfig()
        gain = np.ones(topology.NUM_POINTS, np.float32)
        gain[[*topology.REGIONS["eyes"], *topology.REGIONS["lip"]]] = config.quick
        self._head, self._points = OneEuroFilter(config.head), OneEuroFilter(config.points, gain)

    def reset(self) -> None:
        """Forget everything: the next points pass unchanged."""
        self._head.reset()
        self._points.reset()

    def __call__(self, points: npt.ArrayLike, time_s: float) -> F32:
        """Smooth one frame's points ``[478, 3]`` (px) at ``time_s`` seconds; float32 of the same shape."""
        p = np.asarray(points, np.float32)
        size = float(np.ptp(p[:, :2], axis=0).max())
        place = p[_RIGID].mean(0, keepdims=True)
        return self._head(place, time_s, size) + self._points(p - place, time_s, size)


_RIGID = list(topology.RIGID)


# --- tracking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrackerConfig:
    """How faces are tracked.

    Attributes:
        max_faces: most faces tracked at a time; the largest ones are taken.
        smooth: one-euro filter on the points.
        score: smallest score of the mesh network with which a tracked face goes on, 0 to 1.
        sure: its score from which a detected face is one, a tracked face needs no confirmation by the detector, and a
            lost one is found again without it.
        certain: its score that makes a face of a detection below the detector's threshold.
        jump: largest plausible move of the box's middle between frames, in sizes of the face.
        growth: largest plausible ratio of sizes between frames.
        turn: largest plausible change of roll between frames, degrees.
        detect_interval: frames between searches for further faces while fewer than ``max_faces`` are tracked.
        retry_interval: frames between searches while a face is lost or none was found yet.
        search_interval: frames between thorough searches while no face is visible.
        verify_interval: frames between checks of tracked faces against the detector; 0 = never.
        remember_s: seconds for which a lost face is reported and may come back under its id.
        smoothing: the filter's parameters.

    Raises:
        ConfigError: a value is out of range.
    """

    max_faces: int = 1
    smooth: bool = True
    score: float = 0.5
    sure: float = 0.8
    certain: float = 0.95
    jump: float = 0.5
    growth: float = 1.5
    turn: float = 30.0
    detect_interval: int = 15
    retry_interval: int = 1
    search_interval: int = 25
    verify_interval: int = 30
    remember_s: float = 2.0
    smoothing: SmoothConfig = field(default_factory=SmoothConfig)

    def __post_init__(self) -> None:
        counts = (self.max_faces, self.detect_interval, self.retry_interval, self.search_interval)
        if min(counts) < 1 or self.verify_interval < 0:
            raise ConfigError(
                f"max_faces and intervals {counts}, verify_interval {self.verify_interval}",
                "expected 1 or more, and 0 or more",
                "use the defaults",
            )
        if not (
            0 < self.score <= self.sure <= self.certain <= 1
            and self.jump > 0
            and self.growth > 1
            and self.turn > 0
        ):
            raise ConfigError(
                f"score {self.score}, sure {self.sure}, certain {self.certain}, jump {self.jump}, growth {self.growth}, turn {self.turn}",
                "expected 0 < score <= sure <= certain <= 1, jump > 0, growth > 1, turn > 0",
                "use the defaults",
            )


@dataclass
class _Track:
    """One face: what was published last, its raw points for the next crop, its filter."""

    face: Face
    raw: F32
    smoother: MeshSmoother | None
    seen_s: float
    lost_frames: int = 0

    @property
    def visible(self) -> bool:
        return self.lost_frames == 0

    def lose(self) -> None:
        """Not found in this frame."""
        self.lost_frames += 1
        self.face = replace(self.face, score=0.0, state="lost", age=self.face.age + 1)

    def publish(self, points: F32, score: float, time_s: float, state: FaceState, age: int) -> None:
        """Found in this frame; after a detection (age 0) the filter starts anew."""
        self.raw, self.seen_s, self.lost_frames = points, time_s, 0
        if self.smoother is not None:
            if age == 0:
                self.smoother.reset()
            points = self.smoother(points, time_s)
        self.face = Face(self.face.id, points, score, box_of_points(points), state, age)


class FaceTracker:
    """Follows the faces of one stream; not for use by several threads at once.

    In every frame each face is cut out around its mesh of the frame before and passed through the mesh network once. It is
    given up when the score is low, or when place, size or roll jump; then the detector looks at this very frame, and
    what it finds goes through two mesh passes. A face that is not found again is reported as ``lost`` with its last points
    for ``remember_s`` seconds and keeps its id when it comes back near its place and size. The first frame is
    searched thoroughly (:meth:`lp_edge.runtime.faces.FaceDetector.stages`), and so is every ``search_interval``-th one
    while no face is visible.

    Args:
        detector, mesh: the networks; may be shared by trackers.
        config: see :class:`TrackerConfig`.

    Example:
        >>> tracker = FaceTracker(detector, mesh)                        # doctest: +SKIP
        >>> for frame in reader:                                         # doctest: +SKIP
        ...     for face in tracker.update(frame.rgb, float(frame.time)):
        ...         if face.visible:
        ...             use(face.points)
    """

    def __init__(
        self, detector: FaceDetector, mesh: FaceMeshNet, config: TrackerConfig | None = None
    ) -> None:
        self.detector, self.mesh, self.config = detector, mesh, config or TrackerConfig()
        self.reset()

    def reset(self) -> None:
        """Forget all faces; ids start at 0 again and the next frame counts as the first."""
        self._tracks: list[_Track] = []
        self._frame = -1
        self._next_id = 0
        self._blind = 0

    def update(self, rgb: U8, time_s: float) -> list[Face]:
        """Faces of the next frame.

        Args:
            rgb: uint8 ``[H, W, 3]``.
            time_s: the frame's time in seconds, growing from frame to frame.

        Returns:
            At most ``max_faces`` faces: visible ones by id (points of this frame), then lost ones by id (their last points).

        Raises:
            TensorError: ``rgb`` is no such array.
            EngineError: a network failed.
        """
        self._frame += 1
        self._follow(rgb, time_s)
        if self._must_detect():
            self._detect(rgb, time_s)
        seen = [t for t in self._tracks if t.visible]
        self._blind = 0 if seen else self._blind + 1
        lost = [t for t in self._tracks if not t.visible and time_s - t.seen_s <= self.config.remember_s]
        self._tracks = seen + lost
        seen.sort(key=lambda t: t.face.id)
        lost.sort(key=lambda t: t.face.id)
        return [t.face for t in (seen + lost)[: self.config.max_faces]]

    # -- following ------------------------------------------------------------------------------

    def _follow(self, rgb: U8, time_s: float) -> None:
        """One mesh pass around every track's last points; tracks that fail are lost until the detector finds them."""
        config = self.config
        full = sum(t.visible for t in self._tracks) >= config.max_faces
        tried = [t for t in self._tracks if t.visible or (t.lost_frames <= _LINGER and not full)]
        points, scores = self.mesh.run(rgb, [crop_from_points(t.raw, self.mesh.size) for t in tried])
        moves = [self._move(t.raw, p) for t, p in zip(tried, points, strict=True)]
        good = [
            i
            for i, t in enumerate(tried)
            if moves[i] <= 1.0 and scores[i] >= (config.score if t.visible else config.sure)
        ]
        kept = list(range(len(good)))
        if len(good) > 1:  # two tracks on one face: the one that moved less has been there before
            ranks = [-moves[i] - 2 * tried[i].lost_frames for i in good]
            kept = non_maximum_suppression(box_of_points(points[good]), ranks, _SAME_FACE)
        found = {id(tried[good[k]]): good[k] for k in kept}
        for track in self._tracks:
            i = found.get(id(track))
            if i is None:
                track.lose()
            else:
                state: FaceState = "tracked" if track.visible else "reacquired"
                age = track.face.age + 1 if track.visible else 0
                track.publish(points[i], float(scores[i]), time_s, state, age)

    def _move(self, before: F32, after: F32) -> float:
        """How far a mesh went in one frame: 1 = the limit of what is plausible, infinite for a heap of points."""
        a, b = box_of_points(before), box_of_points(after)
        size_a, size_b = float((a[2:] - a[:2]).max()), float((b[2:] - b[:2]).max())
        if size_b < _SMALLEST:
            return math.inf
        away = float(np.hypot(*((a[:2] + a[2:] - b[:2] - b[2:]) / 2))) / size_a
        grown = abs(math.log(size_b / size_a))
        turn = abs(math.remainder(float(topology.eye_roll(after) - topology.eye_roll(before)), 2 * math.pi))
        limits = self.config.jump, math.log(self.config.growth), math.radians(self.config.turn)
        return max(away / limits[0], grown / limits[1], turn / limits[2])

    # -- detecting ------------------------------------------------------------------------------

    def _must_detect(self) -> bool:
        config = self.config
        seen = sum(t.visible for t in self._tracks)
        if self._frame == 0 or any(t.lost_frames == 1 for t in self._tracks):
            return True
        if seen == 0 or seen < min(len(self._tracks), config.max_faces):
            return self._frame % config.retry_interval == 0
        if seen < config.max_faces and self._frame % config.detect_interval == 0:
            return True
        return config.verify_interval > 0 and self._frame % config.verify_interval == 0

    def _detect(self, rgb: U8, time_s: float) -> None:
        """Look for lost and new faces, and confirm the tracked ones."""
        config = self.config
        if self._frame == 0 or (self._blind and self._blind % config.search_interval == 0):
            stages = None if self._frame == 0 else 2
            found = locate_faces(
                rgb, self.detector, self.mesh, score=config.sure, certain=config.certain, stages=stages
            )
            self._assign(found, time_s)
            return
        strong = self.detector.config.score
        nobody = not any(t.visible for t in self._tracks)
        boxes = self.detector.detect(rgb, self.detector.config.weak if nobody else strong)
        self._verify([b for b in boxes if b.score >= strong])
        seen = [t for t in self._tracks if t.visible]
        room = config.max_faces - len(seen)
        if not boxes or room <= 0:
            return
        outlines = [box_of_points(t.raw) for t in seen]
        taken = iou_matrix([b.box for b in boxes], outlines).max(-1, initial=0.0)
        free = [b for b, overlap in zip(boxes, taken, strict=True) if overlap < _CONFIRMS]
        firm = sorted(
            (b for b in free if b.score >= strong), key=lambda b: -float((b.box[2:] - b.box[:2]).max())
        )
        confirmed = confirm_faces(rgb, firm[: 2 * room + 2], self.mesh, score=config.sure)
        if not confirmed:
            weak = [b for b in free if b.score < strong]
            confirmed = confirm_faces(rgb, weak[:_WEAK], self.mesh, score=config.certain)[:1]
        faces = [f for f, _ in confirmed]
        if seen and faces:
            overlap = iou_matrix([f.box for f in faces], outlines).max(-1)
            faces = [f for f, o in zip(faces, overlap, strict=True) if o <= _SAME_FACE]
        self._assign(faces, time_s)

    def _verify(self, boxes: Sequence[FaceBox]) -> None:
        """Tracked faces that the detector does not confirm and the mesh network is not sure of are lost."""
        overlaps = iou_matrix([box_of_points(t.raw) for t in self._tracks], [b.box for b in boxes])
        for track, overlap in zip(self._tracks, overlaps.max(-1, initial=0.0), strict=True):
            if (
                track.visible
                and track.face.age > 0
                and overlap < _CONFIRMS
                and track.face.score < self.config.sure
            ):
                track.lose()

    def _assign(self, found: Sequence[Face], time_s: float) -> None:
        """Give found meshes to lost tracks near them, best match first, and the rest, largest first, new ids."""
        lost = [t for t in self._tracks if not t.visible]
        pairs = sorted(
            (cost, i, j)
            for i, t in enumerate(lost)
            for j, face in enumerate(found)
            if (cost := self._distance(t.raw, face.points)) <= 1.0
        )
        matched: dict[int, int] = {}
        for _, i, j in pairs:
            if i not in matched.values() and j not in matched:
                matched[j] = i
        room = self.config.max_faces - sum(t.visible for t in self._tracks)
        order = sorted(range(len(found)), key=lambda j: (j not in matched, -found[j].size))
        for j in order[: max(room, 0)]:
            points, score = found[j].points, found[j].score
            if j in matched:
                lost[matched[j]].publish(points, score, time_s, "reacquired", 0)
                continue
            smoother = MeshSmoother(self.config.smoothing) if self.config.smooth else None
            track = _Track(replace(found[j], id=self._next_id), points, smoother, time_s)
            track.publish(points, score, time_s, "tracked", 0)
            self._tracks.append(track)
            self._next_id += 1

    @staticmethod
    def _distance(before: F32, after: F32) -> float:
        """How unlike a lost and a found face are in place and size; up to 1 they may be the same."""
        a, b = box_of_points(before), box_of_points(after)
        size_a, size_b = _size(before), _size(after)
        away = float(np.hypot(*((a[:2] + a[2:] - b[:2] - b[2:]) / 2))) / max(size_a, size_b)
        return max(away / _RETURN_AWAY, abs(math.log(size_b / size_a)) / math.log(_RETURN_GROWTH))


def _size(points: F32) -> float:
    return float(np.ptp(points[:, :2], axis=0).max())


@dataclass(frozen=True)
class FaceFinder:
    """Detector and mesh network together: faces of pictures, trackers for streams."""

    detector: FaceDetector
    mesh: FaceMeshNet

    def tracker(self, *, smooth: bool, max_faces: int = 1) -> FaceTracker:
        """A tracker of its own for one stream."""
        return FaceTracker(self.detector, self.mesh, TrackerConfig(smooth=smooth, max_faces=max_faces))

    def find(self, rgb: U8, which: str = "largest") -> list[Face]:
        """Faces of one picture uint8 ``[H, W, 3]`` that the policy ``which`` selects (:func:`~lp_edge.runtime.faces.select_faces`).

        Raises:
            NoFaceError: there is no face, or none with that index.
        """
        faces = locate_faces(rgb, self.detector, self.mesh, stages=None)
        if not faces:
            raise no_face_error(rgb)
        return select_faces(faces, which)


_LINGER = 12
"""Frames for which a lost face is looked for around its last points too."""
_SMALLEST = 8.0
"""Px; a mesh smaller than this is no face."""
_SAME_FACE = 0.6
"""IoU above which two meshes are one face."""
_WEAK = 3
"""How many doubtful detections are tried per frame while no face is visible."""
_CONFIRMS = 0.4
"""IoU from which a detection confirms a tracked face."""
_RETURN_AWAY, _RETURN_GROWTH = 1.25, 2.0
"""How far away, in sizes, and how much larger or smaller a face may come back under its id."""
