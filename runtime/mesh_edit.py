"""Edits on a mesh: the sliders of :mod:`lp_edge.runtime.edit` as bends of its 478 points."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt

from lp_edge.runtime import topology
from lp_edge.runtime.compose import Limits, set_gaps, soft_limit
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.face_motion import Canonical, points_from_motion
from lp_edge.runtime.geometry import euler_from_rotation, rotation_from_euler
from lp_edge.runtime.gestures import NECK, Controls, face_shape
from lp_edge.runtime.motion import Motion

__all__ = ["edit_mesh"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# One unit of move_x and move_y in inter-ocular distances: half of a crop, at the scale (about 1.3) that LivePortrait's networks
# find in their crops, is 1 / (1.3 · unit) of the fitted map.
_HALF_CROP = 2.7
_JAW = np.linspace(-0.5, 1.5, 11)
_LIPS = np.asarray(
    list(zip(topology.INNER_LIP_UPPER[1:-1], topology.INNER_LIP_LOWER[1:-1], strict=True)), np.intp
)
_LIDS = tuple(
    np.asarray(pairs, np.intp) for pairs in (topology.LID_PAIRS_IMAGE_LEFT, topology.LID_PAIRS_IMAGE_RIGHT)
)


def _mesh_controls(edits: Edits, closed: F64) -> Controls:
    """Sliders → controls of the image-left and of the image-right half of the face (two moments)."""

    def both(value: float) -> F64:
        return np.full(2, value)

    wink = np.array([edits.wink / 39.0, 0.0])
    purse = edits.purse / (15.0 if edits.purse > 0 else 20.0)
    grin, pout = edits.grin / 15.0, edits.pout / 0.09
    lips = edits.lip_open / (120.0 if edits.lip_open > 0 else 90.0)
    brow = edits.eyebrow / 30.0
    return replace(
        Controls.rest(2),
        blink=closed,
        # lips that become narrow would show a wider gap
        jaw=both((lips if lips > 0 else 0.3 * lips) - 0.1 * max(purse, 0.0) - 0.06 * abs(pout)),
        smile=both((edits.smile if edits.smile > 0 else 1.6 * edits.smile) + 0.55 * grin) + 0.45 * wink,
        rounding=both(purse - 0.5 * grin + 0.6 * abs(pout)),
        brow=both(max(brow, 0.0)) - 0.25 * wink,
        frown=both(max(-brow, 0.0)),
        bare=both(grin),
        aside=both(pout),
        gaze_x=both(edits.gaze_x / 30.0),
        gaze_y=both(-1.5 * edits.gaze_y / 63.0),
    )


def _gaps(shape: F64, pairs: npt.NDArray[np.intp]) -> F64:
    gaps: F64 = np.maximum(shape[pairs[:, 1], 1] - shape[pairs[:, 0], 1], 0.0)
    return gaps


def edit_mesh(
    motion: Motion,
    edits: Edits,
    canonical: Canonical,
    *,
    source: Motion | None = None,
    limits: Limits | None = None,
) -> Motion:
    """Put edits on top of what a mesh shall show.

    Args:
        motion: one frame, as :func:`lp_edge.runtime.compose.compose` returns it, or a source's own motion.
        edits: the sliders.
        canonical: the canonical face.
        source: the source's own motion: the head stays within ``limits`` of its pose, its eyes give the lids their
            shape. None = ``motion`` is the source's own.
        limits: how far a warp may go, and how much more than asked for it must be told.

    Returns:
        One frame of motion; ``eye_ratio`` and ``lip_ratio`` are those of its points. ``motion`` itself when nothing is edited.
    """
    if not edits:
        return motion
    source = motion if source is None else source
    limits = limits or Limits()
    rest = canonical.points.astype(np.float64)
    own, shown = (rest + np.asarray(m.expression, np.float64) for m in (source, motion))
    shape = _edit_face(shown, own, edits, canonical, limits)
    out = _edit_pose(motion, edits, source, limits)
    out = replace(out, expression=(shape - rest).astype(np.float32))
    points = points_from_motion(out, canonical)
    return replace(out, eye_ratio=topology.eye_ratio(points), lip_ratio=topology.lip_ratio(points))


def _edit_face(shape: F64, own: F64, edits: Edits, canonical: Canonical, limits: Limits) -> F64:
    """The face ``shape [478, 3]`` without pose, bent; ``own`` is the source's."""
    open_eyes = np.maximum(topology.eye_ratio(own).astype(np.float64), 0.05)
    now = topology.eye_ratio(shape).astype(np.float64)
    eyes = now if edits.eyes_open is None else np.full(2, edits.eyes_open)
    eyes = eyes * (1.0 - edits.blink) * [1.0 - edits.wink / 39.0, 1.0]
    moved = eyes != now
    eyes = np.clip(now + limits.eye_gain * (eyes - now), 0.0, limits.eye_open * open_eyes)
    controls = _mesh_controls(edits, np.clip((now - eyes) / open_eyes, 0.0, 1.0))
    # the left half of the picture does what the first of two moments does
    left = 1.0 / (1.0 + np.exp(canonical.points[:, :1].astype(np.float64) / 0.06))

    def bent(controls: Controls) -> F64:
        way = face_shape(controls, canonical) - canonical.points
        out: F64 = shape + left * way[0::2] + (1.0 - left) * way[1::2]
        return out

    if edits.mouth_open is None:
        shape = bent(controls)[0]
    else:
        shape = _open_mouth(shape, controls, bent, edits.mouth_open, limits)
    set_gaps(shape, _LIPS, _gaps(shape, _LIPS), upper_share=0.5)  # lips that have crossed meet
    for side in np.flatnonzero(moved):
        gaps = _gaps(own, _LIDS[side]) * (eyes[side] / open_eyes[side])
        set_gaps(shape, _LIDS[side], gaps, upper_share=0.85)
    return shape


def _open_mouth(
    shape: F64, controls: Controls, bent: Callable[[Controls], F64], target: float, limits: Limits
) -> F64:
    """Turn the jaw until the lip ratio is ``target``; what the jaw cannot close, the lips do."""
    many = Controls(*(np.tile(getattr(controls, f.name), len(_JAW)) for f in fields(Controls)))
    shapes = bent(replace(many, jaw=np.repeat(_JAW, 2)))
    gap = (shapes[:, 14] - shapes[:, 13])[:, 1]
    ratios = np.where(gap > 0.0, topology.lip_ratio(shapes), 0.0)
    now = float(topology.lip_ratio(shape))
    wanted = max(now + limits.lip_gain * (target - now), 0.0)
    jaw = float(np.interp(wanted, ratios, _JAW))
    shape = bent(replace(controls, jaw=np.full(2, jaw)))[0]
    reached = float(topology.lip_ratio(shape))
    if reached > wanted:
        set_gaps(shape, _LIPS, _gaps(shape, _LIPS) * (wanted / reached), upper_share=0.5)
    return shape


def _edit_pose(motion: Motion, edits: Edits, source: Motion, limits: Limits) -> Motion:
    bounds = (limits.pitch, limits.yaw, limits.roll)
    angles = []
    for now, own, edit, gain, (knee, limit) in zip(
        euler_from_rotation(motion.rotation),
        euler_from_rotation(source.rotation),
        (edits.pitch, edits.yaw, edits.roll),
        limits.gain,
        bounds,
        strict=True,
    ):
        # The way from the source that compose() has limited is unlimited first, then limited together with the edit.
        way = float((now - own + 180.0) % 360.0 - 180.0)
        over = min(abs(way) - knee, 0.999 * (limit - knee))
        if over > 0.0:
            way = math.copysign(knee + (limit - knee) * math.atanh(over / (limit - knee)), way)
        angles.append(float(own + soft_limit(way + gain * edit, knee, limit)) if edit else float(now))
    before = np.asarray(motion.rotation, np.float64)
    rotation = rotation_from_euler(*angles)
    scale = float(motion.scale) * edits.zoom
    # heads turn about the neck, not about the point that pose is measured at
    shift = (before - rotation) @ NECK + [_HALF_CROP * edits.move_x, -_HALF_CROP * edits.move_y, 0.0]
    return replace(
        motion,
        rotation=rotation.astype(np.float32),
        translation=(motion.translation + scale * shift).astype(np.float32),
        scale=np.float32(scale),
    )
