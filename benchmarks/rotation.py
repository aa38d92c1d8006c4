"""Head rotation of the built-in mesh against LivePortrait's own networks. Prints one JSON object.

    python benchmarks/rotation.py --clip d1.mp4 --template d1.pkl [--clip d5.mp4 --template d5.pkl ...]

A template is what LivePortrait's motion extractor made of the clip. Both rotations are taken relative to frame 0 as seen from
the camera (R_t R_0^T), turned into yaw, pitch and roll, and compared frame by frame: mean absolute difference in degrees, and the
correlation of each angle that moves.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.errors import LpEdgeError, MediaError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.face_motion import motion_from_points
from lp_edge.runtime.geometry import euler_from_rotation
from lp_edge.runtime.media_read import VideoReader, probe, resample
from lp_edge.runtime.provenance import provenance
from lp_edge.runtime.templates import load_template

F64 = npt.NDArray[np.float64]
ANGLES = ("pitch", "yaw", "roll")


def rotations_of_clip(animator: Animator, path: Path, *, smooth: bool) -> F64:
    """[T, 3, 3]; NaN where no face was found."""
    fps = probe(path).fps
    if fps is None:
        raise MediaError(f"{path} states no frame rate", "expected a clip", "name a clip")
    tracker, rows = animator.tracker(smooth=smooth), []
    with VideoReader(path) as reader:
        for frame in resample(reader, fps):
            face = next(iter(tracker.update(frame.rgb, float(frame.time))), None)
            visible = face is not None and face.visible
            rows.append(
                motion_from_points(face.points, animator.canonical).rotation
                if visible
                else np.full((3, 3), np.nan)
            )
    return np.array(rows, np.float64)


def angles_from_first(rotation: F64) -> F64:
    """[T, 3] pitch, yaw, roll in degrees of R_t R_0^T."""
    return np.stack(euler_from_rotation(rotation @ rotation[0].T), axis=1)


def compare_rotation(animator: Animator, clip: Path, template: Path, *, smooth: bool) -> dict[str, Any]:
    """Differences of one pair."""
    ours = rotations_of_clip(animator, clip, smooth=smooth)
    theirs = np.asarray(load_template(template, animator.canonical).motion.rotation, np.float64)
    if np.isnan(ours[0]).any():
        raise MediaError(f"no face in the first frame of {clip.name}", "expected one", "use another clip")
    frames = min(len(ours), len(theirs))
    a, b = angles_from_first(ours[:frames]), angles_from_first(theirs[:frames])
    seen = ~np.isnan(a).any(axis=1)
    a, b = a[seen], b[seen]
    out: dict[str, Any] = {
        "clip": clip.name,
        "template": template.name,
        "frames": int(seen.sum()),
        "frames_clip": len(ours),
        "frames_template": len(theirs),
    }
    for i, name in enumerate(ANGLES):
        x, y = b[:, i], a[:, i]
        moving = x.std() > 1.0 and y.std() > 0
        out[name] = {
            "mean_abs_difference": round(float(np.abs(x - y).mean()), 3),
            "p95_abs_difference": round(float(np.percentile(np.abs(x - y), 95)), 3),
            "liveportrait_std": round(float(x.std()), 3),
            "mesh_std": round(float(y.std()), 3),
            "correlation": round(float(np.corrcoef(x, y)[0, 1]), 4) if moving else None,
        }
    out["mean_abs_difference"] = round(float(np.abs(a - b).mean()), 3)
    return out


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", type=Path, action="append", required=True)
    parser.add_argument("--template", type=Path, action="append", required=True)
    parser.add_argument("--no-smooth", action="store_true", help="measure without the one-euro filter")
    parser.add_argument("--bundle", type=Path, help="bundle instead of the built-in one")
    args = parser.parse_args()
    if len(args.clip) != len(args.template):
        parser.error(
            f"{len(args.clip)} clips and {len(args.template)} templates: give one template for each clip"
        )
    try:
        with Animator(args.bundle) as animator:
            pairs = [
                compare_rotation(animator, clip, template, smooth=not args.no_smooth)
                for clip, template in zip(args.clip, args.template, strict=True)
            ]
            report = {
                "benchmark": "rotation",
                "unit": "degrees",
                "pairs": pairs,
                "mean_abs_difference": {
                    name: round(float(np.mean([p[name]["mean_abs_difference"] for p in pairs])), 3)
                    for name in ANGLES
                },
                "provenance": provenance(animator.bundle),
            }
    except LpEdgeError as error:
        print(f"rotation: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
