"""What a face does over time, as six numbers a frame, and how well one clip follows another.

Signals: ``mouth`` (inner lip gap / mouth width), ``eye_left`` and ``eye_right`` (lid gap / eye width, left and right in
the picture), ``yaw``, ``pitch``, ``roll`` (degrees, see :mod:`lp_edge.runtime.geometry`). Both sides of a comparison
are measured by the same networks with the same filter, so what they agree on is motion, not the instrument's habits.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.errors import MediaError, NoFaceError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.face_motion import motion_from_points
from lp_edge.runtime.media_read import VideoReader, probe, resample, sniff_kind
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.templates import MotionTemplate, load_template

__all__ = ["FLAT", "SIGNALS", "compare", "signals_of", "signals_of_clip", "signals_of_motion"]

F64 = npt.NDArray[np.float64]

SIGNALS = ("mouth", "eye_left", "eye_right", "yaw", "pitch", "roll")
"""Names of the columns, in order."""

FLAT = {"mouth": 0.02, "eye_left": 0.02, "eye_right": 0.02, "yaw": 1.0, "pitch": 1.0, "roll": 1.0}
"""Standard deviation (ratios; degrees) below which a signal counts as not moving: what is left is noise."""


def signals_of_motion(motion: Motion) -> F64:
    """Signals float64 ``[T, 6]`` of ``T`` frames of motion."""
    pitch, yaw, roll = motion.angles
    eyes = np.asarray(motion.eye_ratio, np.float64)
    return np.stack(
        [np.asarray(motion.lip_ratio, np.float64), eyes[:, 0], eyes[:, 1], yaw, pitch, roll], axis=1
    )


def signals_of_clip(
    animator: Animator, path: str | Path, *, fps: Fraction | None = None, smooth: bool = True
) -> tuple[F64, Fraction]:
    """Track the largest face of a clip and read its signals.

    Args:
        animator: its networks measure.
        path: the clip.
        fps: rate at which frames are taken; None = the clip's own.
        smooth: one-euro filter on the points.

    Returns:
        float64 ``[T, 6]``, NaN where no face was found, and the frame rate.

    Raises:
        MediaError: the clip cannot be read.
        NoFaceError: no frame shows a face.
    """
    if fps is None:
        fps = probe(path).fps
        if fps is None:
            raise MediaError(f"{path} states no frame rate", "expected a clip", "name a clip")
    tracker = animator.tracker(smooth=smooth)
    rows: list[F64] = []
    lost = np.full(len(SIGNALS), np.nan)
    with VideoReader(path) as reader:
        for frame in resample(reader, fps):
            face = next(iter(tracker.update(frame.rgb, float(frame.time))), None)
            if face is None or not face.visible:
                rows.append(lost)
            else:
                rows.append(
                    signals_of_motion(Motion.stack([motion_from_points(face.points, animator.canonical)]))[0]
                )
    table = np.array(rows).reshape(-1, len(SIGNALS))
    if np.isnan(table).all():
        raise NoFaceError(
            f"no face in any of the {len(rows)} frames of {path}", "expected one", "use another clip"
        )
    return table, fps


def signals_of(
    animator: Animator, driving: str | Path | MotionTemplate, *, smooth: bool = True
) -> tuple[F64, Fraction]:
    """Signals of any driver that moves: clip, template file, name of a built-in template, or template.

    Raises:
        MediaError: it cannot be read, or is a picture.
        NoFaceError: a clip without a face.
    """
    if not isinstance(driving, MotionTemplate):
        kind = sniff_kind(driving) if Path(driving).exists() else "template"
        if kind == "video":
            return signals_of_clip(animator, driving, smooth=smooth)
        if kind == "image":
            raise MediaError(
                f"{driving} is a picture", "expected something that moves", "use a clip or template"
            )
        driving = load_template(driving, animator.canonical)
    return signals_of_motion(driving.motion), driving.fps


def compare(driver: F64, result: F64) -> dict[str, Any]:
    """How well ``result`` follows ``driver``, frame by frame.

    Args:
        driver, result: signals ``[T, 6]``; the longer one is cut, frames with NaN on either side are left out.

    Returns:
        Per signal ``correlation`` (Pearson; None when the driver hardly varies, which ``flat`` says, or the result
        not at all), ``driver_std``, ``result_std``, ``gain`` (least-squares slope of result over driver), for angles
        ``mean_abs_difference`` in degrees, both relative to the first frame; and ``frames``, ``frames_without_face``.

    Raises:
        NoFaceError: fewer than two frames show a face on both sides.
    """
    total = min(len(driver), len(result))
    a, b = driver[:total], result[:total]
    both = ~(np.isnan(a).any(1) | np.isnan(b).any(1))
    a, b = a[both], b[both]
    if len(a) < 2:
        raise NoFaceError(
            f"{len(a)} of {total} frames show a face on both sides", "expected 2 or more", "use another clip"
        )
    out: dict[str, Any] = {"frames": len(a), "frames_without_face": int(total - len(a)), "signals": {}}
    for i, name in enumerate(SIGNALS):
        x, y = a[:, i], b[:, i]
        x_std, y_std = float(x.std()), float(y.std())
        flat = x_std < FLAT[name]
        covariance = float(((x - x.mean()) * (y - y.mean())).mean())
        entry: dict[str, Any] = {
            "correlation": None if flat or y_std < 1e-9 else round(covariance / (x_std * y_std), 4),
            "flat": flat,
            "driver_std": round(x_std, 4),
            "result_std": round(y_std, 4),
            "gain": None if flat else round(covariance / x_std**2, 3),
        }
        if name in ("yaw", "pitch", "roll"):
            difference = np.abs((x - x[0]) - (y - y[0]))
            entry["mean_abs_difference"] = round(float(difference.mean()), 3)
        out["signals"][name] = entry
    return out
