"""What every edit slider does, as a contact sheet and as figures: one JSON object, one row per slider and end of its range.

    python benchmarks/edit_sheet.py [--source PICTURE] [--columns 7] [--side 140] [--bundle BUNDLE] [--output SHEET.jpg]

Renders the picture (default: the one that ships with the package) with each slider at both ends of its range (targets:
0 and the end), finds the face again in the result and compares it with the face in the unedited result: angles in degrees,
openings of eyes and mouth as ratios, the rest in inter-ocular distances. The sheets in docs/ are made this way.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import LpEdgeError
from lp_edge.runtime import topology
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.edit import SLIDERS, Edits
from lp_edge.runtime.face_motion import Canonical, motion_from_points
from lp_edge.runtime.image import write_image
from lp_edge.runtime.job import demo_picture
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.provenance import provenance

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_BAND = 16  # height of the text below a cell, pixels
_BROWS, _IRISES = [105, 334], [topology.LEFT_IRIS_CENTRE, topology.RIGHT_IRIS_CENTRE]
_CORNERS = list(topology.MOUTH_CORNERS)
_EYE_CORNERS = [*topology.LEFT_EYE_CORNERS, *topology.RIGHT_EYE_CORNERS]


def signals(points: F32, canonical: Canonical) -> dict[str, float]:
    """What the sliders are about, of one face; y counts upwards here, as the sliders do."""
    motion = motion_from_points(points, canonical)
    face = canonical.points + motion.expression  # without pose, inter-ocular distance = 1
    gaze = face[_IRISES, :2].mean(0) - face[_EYE_CORNERS, :2].mean(0)
    pitch, yaw, roll = (float(a) for a in motion.angles)
    return {
        "pitch": pitch,
        "yaw": yaw,
        "roll": roll,
        "eye_left": float(motion.eye_ratio[0]),
        "eye_right": float(motion.eye_ratio[1]),
        "mouth": float(motion.lip_ratio),
        "mouth_width": float(np.linalg.norm(face[_CORNERS[0]] - face[_CORNERS[1]])),
        "corners_up": -float(face[_CORNERS, 1].mean()),
        "lips_right": float(face[[*_CORNERS, 13, 14], 0].mean()),
        "brows_up": -float(face[_BROWS, 1].mean()),
        "gaze_right": float(gaze[0]),
        "gaze_up": -float(gaze[1]),
        "move_right": float(motion.translation[0]),
        "move_up": -float(motion.translation[1]),
        "size": float(motion.scale),
    }


def change(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """Differences; moves in inter-ocular distances, size as a factor."""
    out = {name: after[name] - before[name] for name in after}
    unit = before["size"]
    for name in ("move_right", "move_up"):
        out[name] /= unit
    out["size"] = after["size"] / unit
    return {name: round(value, 3) for name, value in out.items()}


def render(animator: Animator, source: str, edits: Edits) -> U8:
    """The source frame uint8 ``[H, W, 3]`` with edits on its largest face."""
    with closing(animator.animate(source, None, AnimateOptions(edits=edits))) as animation:
        return next(iter(animation)).rgb


def sheet(source: str, columns: int, side: int, bundle: str | None) -> tuple[dict[str, Any], U8]:
    """Figures and the contact sheet: the unedited face, then each slider at its low and high end."""
    with Animator(bundle) as animator:

        def points(rgb: U8) -> F32:
            return animator.find_faces(rgb)[0].points

        canonical = Canonical.from_table(animator.bundle.load_table("canonical"))
        plain = render(animator, source, Edits())
        mesh = points(plain)
        before = signals(mesh, canonical)
        low, high = mesh[:, :2].min(0), mesh[:, :2].max(0)
        reach = 0.62 * float((high - low).max())
        x, y = (0.5 * (low + high)).tolist()

        def cell(rgb: U8, text: str) -> U8:
            # scaled about the face's middle; what lies beyond the picture repeats its edge
            zoom = side / (2.0 * reach)
            matrix = np.array([[zoom, 0.0, side / 2 - zoom * x], [0.0, zoom, side / 2 - zoom * y]])
            out = cv2.warpAffine(
                rgb, matrix, (side, side), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE
            )
            out[-_BAND:] = 0
            where = (4, side - 5)
            cv2.putText(out, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
            return np.asarray(out, np.uint8)

        cells, rows = [cell(plain, "as it is")], []
        for name, slider in SLIDERS.items():
            for value in (slider.low, slider.high):
                if value == slider.default:
                    continue
                rgb = render(animator, source, Edits(**{name: value}))
                rows.append(
                    {"slider": name, "value": value, **change(signals(points(rgb), canonical), before)}
                )
                cells.append(cell(rgb, f"{name}={value:g}"))
        cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
        report = {
            "benchmark": "edit_sheet",
            "source": Path(source).name,
            "before": {name: round(value, 3) for name, value in before.items()},
            "rows": rows,
            "provenance": provenance(animator.bundle),
        }
    return report, np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)])


def main() -> int:
    """Parse, render, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", help="picture; default: the one that ships with the package")
    parser.add_argument("--columns", type=int, default=7, help="cells per row")
    parser.add_argument("--side", type=int, default=140, help="side of a cell in pixels")
    parser.add_argument("--bundle", help="folder of a bundle; default: the built-in one")
    parser.add_argument("--output", type=Path, help="contact sheet to write")
    args = parser.parse_args()
    try:
        report, picture = sheet(args.source or str(demo_picture()), args.columns, args.side, args.bundle)
        if args.output:
            write_image(args.output, picture, quality=80)
    except LpEdgeError as error:
        print(f"edit_sheet: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
