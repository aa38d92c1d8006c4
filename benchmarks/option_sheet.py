"""What the motion options do, as a contact sheet and as figures: one JSON object, one row per cell of the sheet.

    python benchmarks/option_sheet.py [--source PICTURE] [--side 160] [--bundle BUNDLE] [--output SHEET.jpg]

The driver is one moment put together from built-in templates: it turns its head (`shake`), opens its mouth (`talk`) and shuts its
eyes (`blink`) at once, against a first frame at rest. Each cell shows the picture (default: the one that ships with the package)
under that moment and one option; each row says how the face that is found in the result differs from that of the
untouched picture, as in edit_sheet.py. The sheet in docs/ is made this way.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from edit_sheet import change, signals

from lp_edge.errors import LpEdgeError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.face_motion import Canonical
from lp_edge.runtime.image import read_image, write_image
from lp_edge.runtime.job import demo_picture
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import REGIONS, AnimateOptions
from lp_edge.runtime.provenance import provenance
from lp_edge.runtime.templates import MotionTemplate

U8 = npt.NDArray[np.uint8]

_BAND = 16  # height of the text below a cell, pixels
_COLUMNS = 7
_OPENING = 0.25  # of the driver's mouth: leaves room for a multiplier above 1

# Cell → whether the driver is at rest, and the options; two rows of the sheet, after the untouched picture.
CELLS: dict[str, tuple[bool, AnimateOptions]] = {
    **{f"region={region}": (False, AnimateOptions(region=region)) for region in REGIONS},
    "paste-back": (False, AnimateOptions()),
    **{f"multiplier={x:g}": (False, AnimateOptions(multiplier=x)) for x in (0.5, 1.0, 1.5)},
    "relative, at rest": (True, AnimateOptions()),
    "absolute, at rest": (True, AnimateOptions(relative=False)),
    "absolute": (False, AnimateOptions(relative=False)),
    "no-paste-back": (False, AnimateOptions(paste_back=False)),
}
WHOLE = ("paste-back", "no-paste-back")
"""Cells that show the whole result instead of the face."""


def moment(animator: Animator) -> MotionTemplate:
    """Two frames: at rest, and everything at once."""

    def most(name: str, of: Callable[[Motion], float]) -> tuple[Motion, Motion]:
        template = animator.family.load_template(name)
        frames = [template.motion[i] for i in range(len(template.motion))]
        return frames[template.neutral], max(frames, key=of)

    rest, turned = most("shake", lambda m: float(m.angles[1]))
    _, open_mouth = most("talk", lambda m: -abs(float(m.lip_ratio) - _OPENING))
    _, shut_eyes = most("blink", lambda m: -float(m.eye_ratio.sum()))
    everything = replace(
        turned,
        expression=open_mouth.expression + shut_eyes.expression - rest.expression,
        eye_ratio=shut_eyes.eye_ratio,
        lip_ratio=open_mouth.lip_ratio,
    )
    frames = Motion.stack([rest, everything])
    return MotionTemplate(fps=25, family=animator.family.name, motion=frames, neutral=0, source="moment")


def cell(rgb: U8, side: int, text: str) -> U8:
    """A picture fitted into a square, with a line of text below."""
    height, width = rgb.shape[:2]
    room = side - _BAND
    scale = min(side / width, room / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    out = np.zeros((side, side, 3), np.uint8)
    x, y = (side - size[0]) // 2, (room - size[1]) // 2
    out[y : y + size[1], x : x + size[0]] = small
    where = (4, side - 5)
    cv2.putText(out, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return out


def sheet(source: str, side: int, bundle: str | None) -> tuple[dict[str, Any], U8]:
    """Figures and the contact sheet: the untouched face, then the cells of :data:`CELLS`."""
    with Animator(bundle) as animator:
        canonical = Canonical.from_table(animator.bundle.load_table("canonical"))
        driver, plain = moment(animator), read_image(source)
        mesh = animator.find_faces(plain)[0].points
        before = signals(mesh, canonical)
        low, high = mesh[:, :2].min(0), mesh[:, :2].max(0)
        reach = 0.62 * float((high - low).max())
        x, y = 0.5 * (low + high)
        x0, x1, y0, y1 = (max(0, round(float(v))) for v in (x - reach, x + reach, y - reach, y + reach))

        cells, rows = [cell(plain[y0:y1, x0:x1], side, "as it is")], []
        for name, (at_rest, options) in CELLS.items():
            with closing(animator.animate(source, driver, options)) as animation:
                frames = [frame.rgb for frame in animation]
            rgb = frames[0 if at_rest else 1]
            cells.append(cell(rgb if name in WHOLE else rgb[y0:y1, x0:x1], side, name))
            after = signals(animator.find_faces(rgb)[0].points, canonical)
            rows.append({"cell": name, "frame": [rgb.shape[1], rgb.shape[0]], **change(after, before)})
        report = {
            "benchmark": "option_sheet",
            "source": Path(source).name,
            "before": {name: round(value, 3) for name, value in before.items()},
            "rows": rows,
            "provenance": provenance(animator.bundle),
        }
    return report, np.vstack([np.hstack(cells[i : i + _COLUMNS]) for i in range(0, len(cells), _COLUMNS)])


def main() -> int:
    """Parse, render, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", help="picture; default: the one that ships with the package")
    parser.add_argument("--side", type=int, default=160, help="side of a cell in pixels")
    parser.add_argument("--bundle", help="folder of a bundle of the family mesh; default: the built-in one")
    parser.add_argument("--output", type=Path, help="contact sheet to write")
    args = parser.parse_args()
    if args.side < 2 * _BAND:
        parser.error(f"expected --side of {2 * _BAND} or more")
    try:
        report, picture = sheet(args.source or str(demo_picture()), args.side, args.bundle)
        if args.output:
            write_image(args.output, picture, quality=85)
    except LpEdgeError as error:
        print(f"option_sheet: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
