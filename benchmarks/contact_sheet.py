"""Draws a contact sheet: one row per driver, the source at the left, then frames spread over the driver.

    python benchmarks/contact_sheet.py [--source PICTURE ...] [--driving DRIVER ...] [--columns 6] --output SHEET.jpg

Without --source it uses the picture that ships with the package, without --driving the built-in templates; the sheet in
docs/ is made that way. Cells show the animated crop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.runtime.animator import Animator
from lp_edge.runtime.gestures import GESTURES
from lp_edge.runtime.image import write_image
from lp_edge.runtime.job import demo_picture

U8 = npt.NDArray[np.uint8]


def row(animator: Animator, source: str, driving: str, columns: int, side: int) -> U8:
    """Cells uint8 ``[side, (columns + 1) * side, 3]``: the source, then ``columns`` frames at equal distances."""
    portrait = animator.prepare_source(source)[0]
    x0, y0, x1, y1 = portrait.rect

    def cell(rgb: U8) -> U8:
        return np.asarray(cv2.resize(rgb[y0:y1, x0:x1], (side, side), interpolation=cv2.INTER_AREA), np.uint8)

    def crops() -> Iterator[U8]:
        for frame in animator.animate(source, driving):
            yield cell(frame.rgb)

    frames = list(crops())
    picked = np.linspace(0, len(frames) - 1, columns + 2).round().astype(int)[1:-1]
    return np.hstack([cell(portrait.frame), *(frames[i] for i in picked)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", action="append", help="picture; may be given several times")
    parser.add_argument("--driving", action="append", help="clip, template or name of one; several times")
    parser.add_argument("--columns", type=int, default=6, help="frames per row")
    parser.add_argument("--side", type=int, default=192, help="side of a cell in pixels")
    parser.add_argument("--bundle", help="folder of a bundle; default: the built-in one")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with Animator(args.bundle) as animator:
        rows = [
            row(animator, source, driving, args.columns, args.side)
            for source in args.source or [str(demo_picture())]
            for driving in args.driving or list(GESTURES)
        ]
    write_image(args.output, np.vstack(rows))


if __name__ == "__main__":
    main()
