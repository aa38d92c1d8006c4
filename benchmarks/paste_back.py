"""Pasting an animated crop back: the changed region against the whole frame. Prints one JSON object a line.

    python benchmarks/paste_back.py [--repeat 25] [--crop 512] [--angle 12]

`reference` warps the crop to the whole frame and blends every pixel in float32, as LivePortrait's paste_back does; `ours` is
`PastePlan.paste`. `still` prepares mask and plan once (a picture as source), `moving` prepares both for every frame (a clip).
Each pair is timed one after the other in this process, in turn first and second; `ratio` is the median of the pairs' ratios
(ours / reference), times are medians. `max_abs_difference` is in grey levels over all pixels of all channels, on random pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import LpEdgeError
from lp_edge.runtime.paste_back import PastePlan, crop_mask
from lp_edge.runtime.provenance import provenance

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

FRAMES = {"720p": (1280, 720), "1080p": (1920, 1080), "4K": (3840, 2160)}


def place(frame: tuple[int, int], crop: int, angle: float, share: float = 0.75) -> F64:
    """A turned crop in the middle of the frame, its side `share` of the frame's height."""
    width, height = frame
    along, across = (share * height / crop * turn(np.deg2rad(angle)) for turn in (np.cos, np.sin))
    matrix = np.array([[along, -across, 0.0], [across, along, 0.0], [0.0, 0.0, 1.0]])
    matrix[:2, 2] = np.array([width, height]) / 2 - matrix[:2, :2] @ [crop / 2, crop / 2]
    return matrix


def reference_mask(mask: U8, matrix: F64, frame: tuple[int, int]) -> F32:
    """The three-channel mask over the whole frame, 0 to 1."""
    return cv2.warpAffine(np.dstack([mask] * 3), matrix[:2], frame).astype(np.float32) / np.float32(255)


def reference_paste(frame: U8, crop: U8, matrix: F64, mask: F32) -> U8:
    """Whole frame, float32, truncated."""
    placed = cv2.warpAffine(crop, matrix[:2], (frame.shape[1], frame.shape[0]))
    return np.clip(mask * placed + (1 - mask) * frame, 0, 255).astype(np.uint8)


def paired(
    first: Callable[[], object], second: Callable[[], object], repeat: int
) -> tuple[float, float, float]:
    """Median milliseconds of both and the median of second / first; who begins alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repeat + 1):
        order = ((0, first), (1, second)) if round_ % 2 else ((1, second), (0, first))
        for index, call in order:
            start = time.perf_counter()
            call()
            if round_:  # the first round warms up
                times[index].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3, ratio


def measure(name: str, crop_size: int, angle: float, repeat: int) -> list[dict[str, Any]]:
    """Both modes on one frame size."""
    size = FRAMES[name]
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    crop = rng.integers(0, 256, (crop_size, crop_size, 3), dtype=np.uint8)
    matrix, mask = place(size, crop_size, angle), crop_mask(crop_size)
    whole, plan = reference_mask(mask, matrix, size), PastePlan.prepare(matrix, size, crop_size)
    theirs, ours = reference_paste(frame, crop, matrix, whole), plan.paste(frame, crop)
    difference = int(np.abs(theirs.astype(np.int16) - ours).max())
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "still": (lambda: reference_paste(frame, crop, matrix, whole), lambda: plan.paste(frame, crop)),
        "moving": (
            lambda: reference_paste(frame, crop, matrix, reference_mask(mask, matrix, size)),
            lambda: PastePlan.prepare(matrix, size, crop_size).paste(frame, crop),
        ),
    }
    rows = []
    for mode, (first, second) in calls.items():
        reference_ms, ours_ms, ratio = paired(first, second, repeat)
        rows.append(
            {
                "benchmark": "paste_back",
                "frame": name,
                "size": list(size),
                "crop": crop_size,
                "angle": angle,
                "source": mode,
                "region": list(plan.rect),
                "reference_ms": round(reference_ms, 3),
                "ours_ms": round(ours_ms, 3),
                "ratio": round(ratio, 4),
                "max_abs_difference": difference,
            }
        )
    return rows


def main() -> int:
    """Parse, measure, print; 1 if a pixel is off by more than one level."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frame", choices=list(FRAMES), action="append", help="default: all")
    parser.add_argument("--crop", type=int, default=512, help="side of the crop in pixels")
    parser.add_argument("--angle", type=float, default=12.0, help="by how much the crop is turned, degrees")
    parser.add_argument("--repeat", type=int, default=25, help="timed pairs")
    args = parser.parse_args()
    if args.repeat < 1 or not 16 <= args.crop <= 4096:
        parser.error("expected --repeat of 1 or more and --crop of 16 to 4096")
    origin, worst = provenance(), 0
    try:
        for name in args.frame or list(FRAMES):
            for row in measure(name, args.crop, args.angle, args.repeat):
                print(json.dumps({**row, "provenance": origin}), flush=True)
                worst = max(worst, row["max_abs_difference"])
    except LpEdgeError as error:
        print(f"paste_back: {error}", file=sys.stderr)
        return error.exit_code
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
