"""The LivePortrait family's motion: from what the motion extractor says to the keypoints that the warp gets. Pure NumPy.

Keypoints are ``scale · (kp @ R + expression) + t`` in a crop that spans -1 … 1, x right, y down (arXiv:2407.03168, eq. 2);
``t`` has no depth. :class:`~lp_edge.runtime.motion.Motion` holds ``rotation = Rᵀ``. Every rule and index here was read
from the reference implementation (KwaiVGI/LivePortrait, MIT): ``src/live_portrait_pipeline.py``,
``live_portrait_wrapper.py``, ``gradio_pipeline.py`` (edits) and ``utils/``. It computes in float32, this module in float64.

The order for one frame, as there:

1. pose and expression of the target, relative or absolute; smoothed over the whole clip when a clip drives a clip;
2. the chosen region of it on the source, ``tz = 0``, and an edit on top;
3. expression-friendly: the change against the neutral frame, scaled;
4. R_eye and R_lip, then S, then lip normalisation and held eyes;
5. the multiplier, on the way from the source's keypoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.runner import Array, Runner, to_host
from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime.checks import one_of
from lp_edge.runtime.edit import EditDelta
from lp_edge.runtime.geometry import euler_from_rotation, rotation_from_euler
from lp_edge.runtime.liveportrait_options import LivePortraitOptions
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import REGIONS

__all__ = [
    "EYE_KEYPOINTS",
    "KEYPOINTS",
    "LIP_ARRAY",
    "LIP_KEYPOINTS",
    "ComposeOptions",
    "Composer",
    "LivePortraitSource",
    "Retargeting",
    "RunnerRetargeting",
    "degrees_from_logits",
    "edit_keypoints",
    "eye_ratio_203",
    "hull_volume",
    "lip_ratio_203",
    "motion_from_outputs",
    "rotation_from_angles",
    "smooth_rts",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

KEYPOINTS = 21

# fmt: off
LIP_ARRAY: F32 = np.array([
    [-9.45e-05, 0.0002422, -4.01e-05], [0.0002086, 0.0004681, 1.27e-05], [-0.0001246, 0.000325, 4.4e-06],
    [0.0001197, -0.0004566, 5.41e-05], [-0.0002653, -7.46e-05, -1.55e-05], [-3.35e-05, -0.000183, -3.5e-06],
    [-5e-07, -5e-07, 1.6e-06], [-0.0005413, 0.0026328, 7.2e-06], [-1.17e-05, 5e-06, 1e-05],
    [8e-07, 5.2e-06, -0.0004093], [0.0001669, -1.98e-05, -8.85e-05], [-1.52e-05, 8.25e-05, 5.9e-06],
    [-3e-07, 2.8e-06, 2.2e-06], [-6.63e-05, -6.83e-05, -3.5e-06], [-0.0008326, -0.0017959, -2.6e-06],
    [7e-06, 3.66e-05, -1.9e-06], [-4.8e-06, 7.1e-06, -1.03e-05], [-0.0006368, -0.0011661, 5.62e-05],
    [0.0002833, -1.46e-05, 1.1e-05], [-4.2e-06, -0.0150906, -0.0025494], [0.0002225, 0.0056279, 0.0027265],
], dtype=np.float32)
"""float32 ``[21, 3]``: the expression that counts as neutral for a driver that is a single picture (``lip_array.pkl`` there)."""
# fmt: on
LIP_ARRAY.setflags(write=False)

LIP_KEYPOINTS = (6, 12, 14, 17, 19, 20)
EYE_KEYPOINTS = (11, 13, 15, 16, 18)
"""Keypoints that the reference moves alone in its regions lip and eyes (``live_portrait_pipeline.py``)."""
_BLINK_TARGET = 0.39  # where eyes are held when the first frame of a source clip shows a blink
_PROCESS_VARIANCE = 1e-5


def _mask(rows: Iterable[int], parts: Mapping[int, slice | int] | None = None) -> npt.NDArray[np.bool_]:
    mask = np.zeros((KEYPOINTS, 3), np.bool_)
    mask[list(rows)] = True
    for row, axes in (parts or {}).items():
        mask[row, axes] = True
    return mask


_EVERYTHING = _mask(range(KEYPOINTS))
_NOTHING = _mask(())
# What an absolute expression, and any expression on a source clip, changes; the rest carries identity and pose.
_EXPRESSION = _mask((1, 2, 6, *range(11, 21)), {3: 1, 4: 1, 5: 2, 8: 2, 9: slice(1, 3)})
_REGION_MASKS: Mapping[str, npt.NDArray[np.bool_]] = {
    "pose": _NOTHING,
    "lip": _mask(LIP_KEYPOINTS),
    "eyes": _mask(EYE_KEYPOINTS),
}


# -- what networks and landmarks say ---------------------------------------------------------------------


def degrees_from_logits(logits: npt.ArrayLike) -> F64:
    """Head angles from the motion extractor's raw heads: the mean of 66 bins of 3° from -97.5°, by softmax.

    Args:
        logits: ``[..., 66]``.

    Returns:
        Degrees, float64 ``[...]``.
    """
    x = np.asarray(logits, np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray((p @ np.arange(x.shape[-1])) / p.sum(-1) * 3.0 - 97.5)


def rotation_from_angles(pitch: npt.ArrayLike, yaw: npt.ArrayLike, roll: npt.ArrayLike) -> F64:
    """``Motion.rotation`` from the network's angles: ``Rz(roll) · Ry(yaw) · Rx(pitch)``.

    The network's yaw is > 0 to the left of the picture, so its sign is opposite to
    :func:`lp_edge.runtime.geometry.rotation_from_euler`.

    Args:
        pitch, yaw, roll: degrees, scalars or arrays of one shape ``[...]``.

    Returns:
        float64 ``[..., 3, 3]``; acts as ``p @ rotation.T``.
    """
    return rotation_from_euler(pitch, -np.asarray(yaw, np.float64), roll)


def motion_from_outputs(outputs: Mapping[str, Array], index: int = 0) -> tuple[Motion, F32]:
    """One face from the motion extractor's graph.

    Args:
        outputs: ``pitch``, ``yaw``, ``roll`` degrees ``[N, 1]``, ``t [N, 3]``, ``exp [N, 21, 3]``, ``scale [N, 1]``,
            ``kp [N, 21, 3]``.
        index: which of the N.

    Returns:
        Its motion (eye and lip ratios zero: they come from landmarks) and canonical keypoints float32 ``[21, 3]``.
    """
    item = {name: np.asarray(to_host(array)[index], np.float32) for name, array in outputs.items()}
    angles = (item[name].reshape(()) for name in (names.PITCH, names.YAW, names.ROLL))
    motion = Motion(
        rotation=rotation_from_angles(*angles).astype(np.float32),
        translation=item[names.T].reshape(3),
        scale=item[names.SCALE].reshape(()),
        expression=item[names.EXP].reshape(KEYPOINTS, 3),
        eye_ratio=np.zeros(2, np.float32),
        lip_ratio=np.zeros((), np.float32),
    )
    return motion, item[names.KP].reshape(KEYPOINTS, 3)


def _gap_ratio(landmarks: npt.ArrayLike, upper: int, lower: int, left: int, right: int) -> F32:
    points = np.asarray(landmarks, np.float64)

    def distance(a: int, b: int) -> F64:
        return np.asarray(np.linalg.norm(points[..., a, :] - points[..., b, :], axis=-1))

    return (distance(upper, lower) / (distance(left, right) + 1e-6)).astype(np.float32)


def eye_ratio_203(landmarks: npt.ArrayLike) -> F32:
    """Lid gap / eye width of both eyes (``utils/retargeting_utils.py`` there).

    Args:
        landmarks: ``[..., 203, 2]`` in LivePortrait's convention.

    Returns:
        float32 ``[..., 2]``: image-left, image-right.
    """
    return np.stack([_gap_ratio(landmarks, 6, 18, 0, 12), _gap_ratio(landmarks, 30, 42, 24, 36)], axis=-1)


def lip_ratio_203(landmarks: npt.ArrayLike) -> F32:
    """Inner lip gap / mouth width, float32 ``[...]``, from landmarks ``[..., 203, 2]``."""
    return _gap_ratio(landmarks, 90, 102, 48, 66)


@dataclass(frozen=True)
class LivePortraitSource:
    """A source face as the motion extractor sees it.

    Attributes:
        motion: pose, expression and ratios of one frame.
        kp: float32 ``[21, 3]`` canonical keypoints.
    """

    motion: Motion
    kp: F32

    @property
    def keypoints(self) -> F64:
        """``scale · (kp @ R + expression) + (tx, ty, 0)``, float64 ``[21, 3]``."""
        return _place(self.kp, _Pose.of(self.motion))


# -- mathematics -----------------------------------------------------------------------------------------


def hull_volume(points: npt.ArrayLike) -> float:
    """Volume of the convex hull, by adding one point after the other (each as the apex of a cone over what it sees).

    The reference's motion multiplier is ``sqrt(volume of the source) / sqrt(volume of the driver)``, of the 3-D
    hulls of 21 keypoints (``calc_motion_multiplier``).

    Args:
        points: ``[K, 3]``.

    Returns:
        The volume; 0 where all points lie in a plane (to 1e-9 of their extent).
    """
    x = np.asarray(points, np.float64)
    extent = float(np.ptp(x, axis=0).max()) if len(x) else 0.0
    if len(x) < 4 or not extent > 0 or not math.isfinite(extent):
        return 0.0
    x = (x - x.mean(0)) / extent
    # a first tetrahedron of points far apart
    a = int(np.linalg.norm(x, axis=1).argmax())
    b = int(np.linalg.norm(x - x[a], axis=1).argmax())
    off_line = np.linalg.norm(np.cross(x - x[a], x[b] - x[a]), axis=1)
    c = int(off_line.argmax())
    off_plane = (x - x[a]) @ np.cross(x[b] - x[a], x[c] - x[a])
    d = int(np.abs(off_plane).argmax())
    if abs(off_plane[d]) <= 1e-9 * off_line[c]:
        return 0.0
    if off_plane[d] > 0:  # so that abc is seen from outside in this order
        b, c = c, b
    faces = {(a, b, c), (a, d, b), (b, d, c), (c, d, a)}
    for p in range(len(x)):
        corners = x[np.array(list(faces))]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        heights = np.einsum("fi,fi->f", normals, x[p] - corners[:, 0])
        seen = {
            face
            for face, above in zip(
                list(faces), heights > 1e-12 * np.linalg.norm(normals, axis=1), strict=True
            )
            if above
        }
        edges = {(u, v) for i, j, k in seen for u, v in ((i, j), (j, k), (k, i))}
        faces = (faces - seen) | {(u, v, p) for u, v in edges if (v, u) not in edges}
    corners = x[np.array(list(faces))]
    return float(np.linalg.det(corners).sum() / 6.0) * extent**3


def smooth_rts(values: npt.ArrayLike, variance: float, process_variance: float = _PROCESS_VARIANCE) -> F64:
    """Rauch-Tung-Striebel smoother of a random walk that is observed with noise (``utils/filter.py`` there).

    Every number is smoothed on its own: ``x_t = x_(t-1) + N(0, process_variance)``, ``z_t = x_t + N(0, variance)``,
    ``x_0 ~ N(z_0, 1)`` - the defaults of the Kalman filter that the reference uses; nothing is fitted to the data. The
    gains depend on the variances alone, so they are scalars.

    Args:
        values: ``[T, ...]``, T ≥ 1.
        variance: of the observation, > 0; larger = smoother.
        process_variance: of a step from frame to frame, > 0.

    Returns:
        float64, same shape.
    """
    z = np.asarray(values, np.float64)
    mean = np.empty_like(z)
    posterior, predicted = np.empty(len(z)), np.ones(len(z) + 1)
    for t in range(len(z)):
        before = mean[t - 1] if t else z[0]
        gain = predicted[t] / (predicted[t] + variance)
        mean[t] = before + gain * (z[t] - before)
        posterior[t] = (1.0 - gain) * predicted[t]
        predicted[t + 1] = posterior[t] + process_variance
    for t in range(len(z) - 2, -1, -1):
        mean[t] += posterior[t] / predicted[t + 1] * (mean[t + 1] - mean[t])
    return mean


# -- S and R ---------------------------------------------------------------------------------------------


class Retargeting(Protocol):
    """The three small networks; all arrays float32."""

    def stitching(self, features: F32, /) -> F32:
        """Source and driving keypoints ``[N, 126]`` → change of the driving keypoints and of x, y of all ``[N, 65]``."""

    def eye(self, features: F32, /) -> F32:
        """Source keypoints, both own eye ratios, target ``[N, 66]`` → change of the keypoints ``[N, 63]``."""

    def lip(self, features: F32, /) -> F32:
        """Source keypoints, own lip ratio, target ``[N, 65]`` → change of the keypoints ``[N, 63]``."""


class RunnerRetargeting:
    """S, R_eye and R_lip of a bundle.

    Args:
        stitching, eye, lip: open runners of the graphs of that name; closing them is the caller's business.
    """

    def __init__(self, stitching: Runner, eye: Runner, lip: Runner) -> None:
        self._stitching, self._eye, self._lip = stitching, eye, lip

    def stitching(self, features: F32, /) -> F32:
        """See :class:`Retargeting`."""
        return _run(self._stitching, features)

    def eye(self, features: F32, /) -> F32:
        """See :class:`Retargeting`."""
        return _run(self._eye, features)

    def lip(self, features: F32, /) -> F32:
        """See :class:`Retargeting`."""
        return _run(self._lip, features)


def _run(runner: Runner, features: F32) -> F32:
    return np.asarray(to_host(runner.infer({names.FEATURES: features})[names.DELTA]), np.float32)


def _features(*parts: npt.ArrayLike) -> F32:
    return np.concatenate([np.asarray(part, np.float32).reshape(-1) for part in parts])[None]


def _eye_change(networks: Retargeting, x_s: F64, motion: Motion, target: float) -> F64:
    return np.asarray(networks.eye(_features(x_s, motion.eye_ratio, target)), np.float64).reshape(
        KEYPOINTS, 3
    )


def _lip_change(networks: Retargeting, x_s: F64, motion: Motion, target: float) -> F64:
    return np.asarray(networks.lip(_features(x_s, motion.lip_ratio, target)), np.float64).reshape(
        KEYPOINTS, 3
    )


def _stitched(networks: Retargeting, x_s: F64, x_d: F64) -> F64:
    change = np.asarray(networks.stitching(_features(x_s, x_d)), np.float64).reshape(-1)
    x_d = x_d + change[: 3 * KEYPOINTS].reshape(KEYPOINTS, 3)
    x_d[:, :2] += change[3 * KEYPOINTS :]
    return x_d


# -- composition -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComposeOptions:
    """What the composition depends on.

    Attributes:
        relative, region, multiplier: as in :class:`lp_edge.runtime.options.AnimateOptions`; any finite multiplier.
        liveportrait: the family's own options.

    Raises:
        ConfigError: an unknown region, or a multiplier that is no number.
    """

    relative: bool = True
    region: str = "all"
    multiplier: float = 1.0
    liveportrait: LivePortraitOptions = field(default_factory=LivePortraitOptions)

    def __post_init__(self) -> None:
        one_of("region", self.region, REGIONS)
        if not math.isfinite(self.multiplier):
            raise ConfigError(f"multiplier is {self.multiplier}", "expected a finite number", "choose 1")


@dataclass(frozen=True)
class _Pose:
    """What places canonical keypoints; float64, depth of the translation 0."""

    rotation: F64
    expression: F64
    scale: float
    translation: F64

    @staticmethod
    def of(motion: Motion) -> _Pose:
        return _Pose(
            np.asarray(motion.rotation, np.float64),
            np.asarray(motion.expression, np.float64),
            float(motion.scale),
            np.asarray(motion.translation, np.float64) * (1.0, 1.0, 0.0),
        )


def _place(kp: F32, pose: _Pose) -> F64:
    return np.asarray(pose.scale * (kp @ pose.rotation.T + pose.expression) + pose.translation)


def _edited(pose: _Pose, source: Motion, edit: EditDelta) -> _Pose:
    """``pose`` with an edit on top.

    The angles are added to the source's own, as in ``execute_image_retargeting``; the rotation that makes is put on
    ``pose`` as a driver's change is: in the face's own axes.
    """
    rotation = pose.rotation
    if any(edit.angles):
        own = np.asarray(source.rotation, np.float64)
        pitch, yaw, roll = euler_from_rotation(own)
        turned = rotation_from_angles(pitch + edit.angles[0], -yaw + edit.angles[1], roll + edit.angles[2])
        rotation = rotation @ own.T @ turned
    return _Pose(
        rotation,
        pose.expression + np.asarray(edit.expression, np.float64),
        pose.scale * edit.zoom,
        pose.translation + np.asarray(edit.translation, np.float64) * (1.0, 1.0, 0.0),
    )


def edit_keypoints(
    source: LivePortraitSource,
    edit: EditDelta | None,
    networks: Retargeting,
    options: ComposeOptions | None = None,
) -> tuple[F32, F32]:
    """Keypoints of a source that is edited and not driven, as ``execute_image_retargeting`` there.

    Lips are not normalised, eyes are not held, and there is no multiplier. Unlike there the depth of the translation is 0, so
    that an edit that changes nothing gives the source's keypoints.

    Args:
        source: the face.
        edit: None = unchanged.
        networks: S, R_eye, R_lip.
        options: only ``liveportrait.stitching`` matters.

    Returns:
        ``(kp_source, kp_driving)``, float32 ``[21, 3]``.
    """
    x_s, own = source.keypoints, _Pose.of(source.motion)
    x_d = x_s
    if edit is not None:
        x_d = _place(source.kp, _edited(own, source.motion, edit))
        if edit.eye_ratio is not None:
            x_d = x_d + _eye_change(networks, x_s, source.motion, edit.eye_ratio)
        if edit.lip_ratio is not None:
            x_d = x_d + _lip_change(networks, x_s, source.motion, edit.lip_ratio)
    if (options or ComposeOptions()).liveportrait.stitching:
        x_d = _stitched(networks, x_s, x_d)
    return x_s.astype(np.float32), x_d.astype(np.float32)


class Composer:
    """Composes frame after frame for ONE face of the source; equal to the reference for every combination of options.

    Holds one frame's motion for a picture source. For a source clip that moving frames drive, :meth:`plan` has to see all
    motions first (the smoother looks ahead) and keeps 72 numbers a frame.

    Args:
        networks: S, R_eye, R_lip.
        options: how to compose.
        source_video: the source is a clip.
        driving: ``video`` for a clip, a camera or a template of several frames; ``image`` for a picture or a template of
            one frame.

    Raises:
        ConfigError: ``options.liveportrait.animal`` with a source clip, which the reference does not have.
    """

    def __init__(
        self,
        networks: Retargeting,
        options: ComposeOptions,
        *,
        source_video: bool,
        driving: Literal["image", "video"],
    ) -> None:
        if options.liveportrait.animal and source_video:
            raise ConfigError("an animal's clip as source", "expected a picture", "take a frame of the clip")
        self._networks, self._options, self._more = networks, options, options.liveportrait
        self._source_video, self._driving = source_video, driving
        self._planned: tuple[F64, F64] | None = None  # smoothed rotation [T, 3, 3], expression [T, 21, 3]
        self._eyes_held: float | None = None
        self._next = 0
        # for a picture source: what depends on it alone, and on the neutral frame
        self._still: tuple[LivePortraitSource, F64, F64 | None] | None = None
        self._start: tuple[LivePortraitSource, Motion, F64, float] | None = None

    def plan(
        self, sources: Sequence[Motion], driving: Sequence[Motion], neutral: Motion | None = None
    ) -> None:
        """Smooth the whole of a source clip's composed motion; does nothing where the reference smooths nothing.

        Args:
            sources: motion of the source face, frame after frame.
            driving: the driver's, as many frames; the shorter one counts.
            neutral: the driver's frame that stands for "no motion"; None = its first.

        Raises:
            MediaError: there is no frame.
        """
        if not (self._source_video and self._driving == "video"):
            return
        count = min(len(sources), len(driving))
        if count == 0:
            raise MediaError("no frame to compose", "at least one of source and driver", "check both clips")
        neutral = driving[0] if neutral is None else neutral
        targets = [self._target(sources[i], driving[i], neutral) for i in range(count)]
        rotation, expression = (
            smooth_rts(np.stack(part), self._more.smooth_variance) for part in zip(*targets, strict=True)
        )
        self._planned, self._eyes_held, self._next = (rotation, expression), None, 0

    def compose(
        self,
        source: LivePortraitSource,
        driving: Motion,
        neutral: Motion,
        edit: EditDelta | None = None,
        *,
        index: int | None = None,
    ) -> tuple[F32, F32]:
        """Keypoints of one frame; frames come in order.

        Args:
            source: the source face in this frame; for a picture source the same object every time.
            driving: the driver in this frame; its ratios are the targets of retargeting.
            neutral: the driver's frame that stands for "no motion"; the reference's is the first. Not used with
                ``driving="image"``, where :data:`LIP_ARRAY` takes its place.
            edit: changes on top. Its targets for eyes and lips replace retargeting, lip normalisation and held eyes.
            index: number of the frame in :meth:`plan`; None = the one after the last.

        Returns:
            ``(kp_source, kp_driving)``, float32 ``[21, 3]``, ready for the warp.

        Raises:
            ConfigError: a source clip needs a plan and has none for this frame.
            MediaError: expression-friendly, and the driver's keypoints lie in a plane.
        """
        index = self._next if index is None else index
        self._next = index + 1
        options, more, own = self._options, self._more, source.motion
        x_s, lips_shut = self._of_source(source)
        pose = self._pose(own, driving, neutral, self._plan_at(index))
        if edit is not None:
            pose = _edited(pose, own, edit)
        x_d = _place(source.kp, pose)
        if more.animal or (
            options.relative
            and more.driving_option == "expression-friendly"
            and not self._source_video
            and self._driving == "video"
        ):
            start, factor = self._against(source, x_s, neutral if self._driving == "video" else driving)
            x_d = x_s + (x_d - start) * factor

        retargeting = (more.eye_retargeting or more.lip_retargeting) and not more.animal
        if retargeting and options.relative and not more.keep_pose_with_retargeting:
            x_d = x_s if edit is None else _place(source.kp, _edited(_Pose.of(own), own, edit))
        # Of the driver's eyes only the image-left one counts, as there.
        eyes = float(driving.eye_ratio[0]) if retargeting and more.eye_retargeting else None
        lips = float(driving.lip_ratio) if retargeting and more.lip_retargeting else None
        held = None
        if edit is not None:
            eyes = eyes if edit.eye_ratio is None else edit.eye_ratio
            lips = lips if edit.lip_ratio is None else edit.lip_ratio
        if self._source_video and more.source_video_eye_retargeting:
            held = self._held(own)
        if eyes is not None:
            x_d = x_d + _eye_change(self._networks, x_s, own, eyes)
        if lips is not None:
            x_d = x_d + _lip_change(self._networks, x_s, own, lips)
        if more.stitching:
            x_d = _stitched(self._networks, x_s, x_d)
        if not retargeting:
            if lips_shut is not None and lips is None:
                x_d = x_d + lips_shut
            if held is not None and eyes is None:
                x_d = x_d + _eye_change(self._networks, x_s, own, held)
        x_d = x_s + (x_d - x_s) * options.multiplier
        return x_s.astype(np.float32), x_d.astype(np.float32)

    # -- parts ----------------------------------------------------------------------------------------

    def _target(self, own: Motion, driving: Motion, neutral: Motion) -> tuple[F64, F64]:
        """Rotation and expression the source would take over as a whole, before region and smoothing."""
        rotation, expression = (np.asarray(x, np.float64) for x in (driving.rotation, driving.expression))
        if not self._options.relative or self._more.animal:
            return rotation, expression
        turn = np.asarray(own.rotation, np.float64)
        still = self._driving == "image"
        if not (
            still and self._source_video
        ):  # a picture that drives a clip leaves its pose as it is, to the bit
            turn = turn @ np.asarray((driving if still else neutral).rotation, np.float64).T @ rotation
        base: npt.ArrayLike = neutral.expression
        if still:
            base = 0.0 if self._options.region == "eyes" and not self._source_video else LIP_ARRAY
        return turn, np.asarray(own.expression, np.float64) + (expression - np.asarray(base, np.float64))

    def _pose(self, own: Motion, driving: Motion, neutral: Motion, planned: tuple[F64, F64] | None) -> _Pose:
        """The source's pose with the chosen region of the target."""
        rotation, expression = planned or self._target(own, driving, neutral)
        at = _Pose.of(own)
        if self._more.animal:
            return _Pose(rotation, expression, at.scale, _Pose.of(driving).translation)
        relative, region = self._options.relative, self._options.region
        whole = _EVERYTHING if relative and not self._source_video else _EXPRESSION
        scale, translation = at.scale, at.translation
        if relative and not self._source_video:
            first = driving if self._driving == "image" else neutral
            if region == "all":
                scale *= float(driving.scale) / float(first.scale)
            translation = translation + _Pose.of(driving).translation - _Pose.of(first).translation
        elif not relative:
            translation = _Pose.of(driving).translation
        posed = region in ("all", "pose")
        return _Pose(
            rotation if posed else at.rotation,
            np.where(_REGION_MASKS.get(region, whole), expression, at.expression),
            scale,
            translation if posed else at.translation,
        )

    def _plan_at(self, index: int) -> tuple[F64, F64] | None:
        if not (self._source_video and self._driving == "video"):
            return None
        if self._planned is None or not 0 <= index < len(self._planned[0]):
            count = 0 if self._planned is None else len(self._planned[0])
            raise ConfigError(
                f"frame {index} of a source clip, {count} frames planned",
                "a plan for every frame that is composed",
                "call plan() with the motion of the whole clip first",
            )
        return self._planned[0][index], self._planned[1][index]

    def _of_source(self, source: LivePortraitSource) -> tuple[F64, F64 | None]:
        """The source's keypoints, and what shuts its lips (None where they need not be shut)."""
        if self._still is None or self._still[0] is not source:
            more, own, x_s = self._more, source.motion, source.keypoints
            wanted = more.normalize_lip and self._options.relative and not more.animal
            shut = None
            if wanted and np.float32(own.lip_ratio) >= np.float32(more.lip_normalize_threshold):
                shut = _lip_change(self._networks, x_s, own, 0.0)
            self._still = source, x_s, shut
        return self._still[1], self._still[2]

    def _against(self, source: LivePortraitSource, x_s: F64, neutral: Motion) -> tuple[F64, float]:
        """Keypoints at the driver's neutral frame, and the factor on the change against them."""
        if self._start is None or self._start[0] is not source or self._start[1] is not neutral:
            start = _place(source.kp, self._pose(source.motion, neutral, neutral, None))
            volumes = hull_volume(x_s), hull_volume(start)
            if not min(volumes) > 0:
                raise MediaError(
                    f"keypoints in a plane: hulls of volume {volumes[0]} (source) and {volumes[1]} (at the neutral frame)",
                    "faces with depth",
                    "choose another neutral frame, or pose-friendly",
                )
            self._start = source, neutral, start, math.sqrt(volumes[0]) / math.sqrt(volumes[1])
        return self._start[2], self._start[3]

    def _held(self, own: Motion) -> float:
        """How open the eyes of a source clip are held; its first frame decides."""
        if self._eyes_held is None:
            mean = np.asarray(own.eye_ratio, np.float32).mean(dtype=np.float32)
            blink = mean < np.float32(self._more.source_video_eye_threshold)
            self._eyes_held = _BLINK_TARGET if blink else float(mean)
        return self._eyes_held
