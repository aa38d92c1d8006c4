"""Composition of a source's own motion with a driver's, for keypoints that are mesh points. Pure NumPy, no I/O.

Relative composition (the default) adds the driver's change against its neutral frame to the source's own
pose and shape, as LivePortrait's relative mode does (arXiv:2407.03168, sec. 3.4): ``R = R_d · R_0ᵀ · R_s``,
``δ = δ_s + (δ_d - δ_0)``. Lids and lips are then put where the *ratios* say, because the same displacement closes a
narrow eye and leaves a wide one open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lp_edge.runtime import topology
from lp_edge.runtime.geometry import euler_from_rotation, rotation_from_euler
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions

__all__ = ["Limits", "compose", "set_gaps", "soft_limit"]

F64 = npt.NDArray[np.float64]


_LEFT_LIDS = np.array(topology.LID_PAIRS_IMAGE_LEFT, dtype=np.intp)
_RIGHT_LIDS = np.array(topology.LID_PAIRS_IMAGE_RIGHT, dtype=np.intp)
_LIPS = np.array(topology.INNER_LIP_PAIRS, dtype=np.intp)


@dataclass(frozen=True)
class Limits:
    """How far a warp can be trusted: linear up to the first figure, never beyond the second.

    Angles are degrees away from the source's own pose; ``translation`` counts inter-ocular distances,
    ``scale`` is the natural logarithm of the ratio; ``gain`` (pitch, yaw, roll) makes up for what a flat picture that is
    bent shows too little of a rotation, as read back by ``benchmarks/follow.py``; ``lip_gain`` and ``eye_gain`` do so for lips
    and lids; ``eye_open`` bounds how much wider than in the
    source an eye may open; ``eye_closed`` is the lid gap / eye width at which an eye counts as shut.
    """

    pitch: tuple[float, float] = (18.0, 30.0)
    yaw: tuple[float, float] = (22.0, 36.0)
    roll: tuple[float, float] = (30.0, 50.0)
    translation: tuple[float, float] = (0.4, 1.0)
    scale: tuple[float, float] = (0.15, 0.3)
    gain: tuple[float, float, float] = (1.35, 1.1, 1.1)
    lip_gain: float = 1.2
    eye_gain: float = 1.15
    eye_open: float = 1.5
    eye_closed: float = 0.05


def soft_limit(value: npt.ArrayLike, knee: float, limit: float) -> F64:
    """Odd, monotone and smooth: the identity up to ``knee``, approaching ``±limit`` beyond.

    Example:
        >>> soft_limit([10.0, 1000.0], 20.0, 30.0).tolist()
        [10.0, 30.0]
    """
    x = np.asarray(value, np.float64)
    size = np.abs(x)
    over = np.maximum(size - knee, 0.0)
    room = limit - knee
    return np.sign(x) * np.where(size <= knee, size, knee + room * np.tanh(over / room))


def _region_mask(region: str) -> F64:
    """Share ``[478, 1]`` of the driver's expression at every keypoint."""
    mask = np.zeros((topology.NUM_POINTS, 1))
    if region in ("all", "exp"):
        mask[:] = 1.0
    elif region in ("lip", "eyes"):
        mask[list(topology.REGIONS[region])] = 1.0
    return mask


def _gap_ratio(source: F64, driving: F64, neutral: F64, limits: Limits, multiplier: float) -> F64:
    """How far open each eye shall be, in units of the source's own opening; ``[2]``, 0 = shut.

    A closing eye closes in proportion, so that shut is shut; a widening one gains what the driver gains, since a narrow
    driver's proportion would tear a wide eye open.
    """
    own, rest = (np.maximum(x - limits.eye_closed, 0.04) for x in (source, neutral))
    change = limits.eye_gain * (np.maximum(driving - limits.eye_closed, 0.0) - rest)
    return np.clip(
        1.0 + multiplier * np.where(change < 0.0, change / rest, change / own), 0.0, limits.eye_open
    )


def set_gaps(points: F64, pairs: npt.NDArray[np.intp], gaps: F64, upper_share: float) -> None:
    """Move the lid or lip ``pairs [P, 2]`` (upper, lower) in place until their vertical gaps are ``gaps [P]``.

    ``upper_share`` of the way is gone by the upper point. x and z follow in
    proportion, so that points that meet do meet; pairs that have crossed are put above each other.
    """
    upper, lower = points[pairs[:, 0]], points[pairs[:, 1]]
    now = np.maximum(lower[:, 1] - upper[:, 1], 1e-4)
    share = (1.0 - gaps / now)[:, None]
    sideways = np.maximum(share, -1.0)  # opening a pair that all but touches would throw it sideways
    surplus = (lower - upper) * np.concatenate([sideways, share, sideways], axis=1)
    crossed = (lower[:, 1] - upper[:, 1]) <= 1e-4
    surplus[crossed] = (lower - upper)[crossed]
    surplus[crossed, 1] -= gaps[crossed]
    points[pairs[:, 0]] += upper_share * surplus
    points[pairs[:, 1]] -= (1.0 - upper_share) * surplus


def compose(
    source: Motion,
    driving: Motion,
    neutral: Motion,
    canonical: F64,
    options: AnimateOptions | None = None,
    *,
    basis: F64 | None = None,
    limits: Limits | None = None,
) -> Motion:
    """The motion the source shall show.

    Args:
        source, driving, neutral: one frame each; expressions ``[478, 3]`` in canonical units (inter-ocular distance = 1).
            ``neutral`` is the driver's frame that stands for "no motion".
        canonical: ``[478, 3]`` canonical face.
        options: region, multiplier, relative or absolute.
        basis: ``[K, 478, 3]`` orthonormal expression directions; needed by absolute composition, where it
            separates expression from the shape of the driver's face.
        limits: how far a warp may go; see :class:`Limits`.

    Returns:
        One frame of motion in the source's pixels.

    Raises:
        ValueError: absolute composition without ``basis``.
    """
    options, limits = options or AnimateOptions(), limits or Limits()
    m, region = options.multiplier, options.region
    with_pose, with_expression = region in ("all", "pose"), region != "pose"
    out = source
    if with_pose:
        out = _compose_pose(source, driving, neutral, m, options.relative, limits)
    if not with_expression:
        return out

    e_s, e_d, e_0 = (np.asarray(x.expression, np.float64) for x in (source, driving, neutral))
    if options.relative:
        change = e_d - e_0
    else:
        if basis is None:
            raise ValueError("absolute composition needs the expression basis of the canonical face")
        change = np.tensordot(np.tensordot(basis, e_d - e_s, axes=([1, 2], [0, 1])), basis, axes=(0, 0))
    mask = _region_mask(region)
    shape_s, shape_0 = canonical + e_s, canonical + e_0
    lips = list(topology.REGIONS["lip"])
    lip_width = np.linalg.norm(shape_s[61] - shape_s[291]) / np.linalg.norm(shape_0[61] - shape_0[291])
    gain = np.full((topology.NUM_POINTS, 1), m)
    gain[lips] *= limits.lip_gain * np.clip(lip_width, 0.7, 1.4)
    shape = shape_s + mask * gain * change

    if region in ("all", "exp", "eyes"):
        eye_0 = np.asarray(neutral.eye_ratio if options.relative else source.eye_ratio, np.float64)
        ratio = _gap_ratio(
            np.asarray(source.eye_ratio, np.float64),
            np.asarray(driving.eye_ratio, np.float64),
            eye_0,
            limits,
            m,
        )
        for side, pairs in enumerate((_LEFT_LIDS, _RIGHT_LIDS)):
            gaps = np.maximum(shape_s[pairs[:, 1], 1] - shape_s[pairs[:, 0], 1], 0.0)
            set_gaps(shape, pairs, gaps * ratio[side], upper_share=0.85)
    if region in ("all", "exp", "lip"):
        gap = shape[_LIPS[:, 1], 1] - shape[_LIPS[:, 0], 1]
        set_gaps(shape, _LIPS, np.maximum(gap, 0.0), upper_share=0.5)
    return replace(out, expression=(shape - canonical).astype(np.float32))


def _compose_pose(
    source: Motion, driving: Motion, neutral: Motion, m: float, relative: bool, limits: Limits
) -> Motion:
    """Pose part of :func:`compose`: limited rotation, translation and scale."""
    r_s, r_d, r_0 = (np.asarray(x.rotation, np.float64) for x in (source, driving, neutral))
    target = r_d @ r_0.T @ r_s if relative else r_d
    # The limit is on the way from the source's own view, since that is what the warp has to bridge.
    delta = [
        float(soft_limit(m * gain * ((a - b + 180.0) % 360.0 - 180.0), *bound))
        for a, b, gain, bound in zip(
            euler_from_rotation(target),
            euler_from_rotation(r_s),
            limits.gain,
            (limits.pitch, limits.yaw, limits.roll),
            strict=True,
        )
    ]
    own = euler_from_rotation(r_s)
    rotation = rotation_from_euler(*(a + d for a, d in zip(own, delta, strict=True)))
    if not relative:
        return replace(source, rotation=rotation.astype(np.float32))
    step = (driving.translation - neutral.translation) / float(neutral.scale)
    step = soft_limit(m * step, *limits.translation) * float(source.scale)
    step[2] = 0.0
    grow = soft_limit(m * np.log(float(driving.scale) / float(neutral.scale)), *limits.scale)
    return replace(
        source,
        rotation=rotation.astype(np.float32),
        translation=(source.translation + step).astype(np.float32),
        scale=np.float32(float(source.scale) * float(np.exp(grow))),
    )
