"""How far pictures are off: PSNR, SSIM, the largest difference; and the report of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["PSNR_CAP", "Figures", "compare", "markdown", "psnr_db", "summary"]

U8 = npt.NDArray[np.uint8]

PSNR_CAP: Final = 100.0
"""PSNR of equal pictures, dB."""

_WINDOW, _SIGMA = (11, 11), 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


@dataclass(frozen=True)
class Figures:
    """One frame against its reference: ``psnr_db`` up to 100, ``ssim`` up to 1, ``max_abs`` in grey levels."""

    where: str
    psnr_db: float
    ssim: float
    max_abs: int


def psnr_db(mse: float) -> float:
    """Peak signal to noise ratio of 8-bit pictures with a mean squared error, dB; :data:`PSNR_CAP` for equal ones."""
    return PSNR_CAP if mse == 0 else min(PSNR_CAP, float(10 * np.log10(255**2 / mse)))


def compare(got: U8, want: U8, where: str = "") -> Figures:
    """Compare pictures uint8 ``[H, W, 3]``, all channels alike.

    SSIM is that of Wang et al. (2004): a Gaussian window of 11 x 11 pixels with sigma 1.5, mean over pixels and channels.

    Example:
        >>> compare(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.uint8)).ssim
        1.0
    """
    a, b = got.astype(np.float64), want.astype(np.float64)
    gap = np.abs(a - b)

    def blur(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(x, _WINDOW, _SIGMA))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, both = (
        blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    )  # fmt: skip
    ssim = ((2 * mean_a * mean_b + _C1) * (2 * both + _C2)) / (
        (mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)
    )
    return Figures(where, psnr_db(float(np.square(gap).mean())), float(ssim.mean()), int(gap.max(initial=0)))


def summary(frames: Sequence[Figures]) -> dict[str, Any]:
    """Worst and mean over frames, the index of the worst by PSNR, and all frames."""
    worst = min(range(len(frames)), key=lambda i: frames[i].psnr_db)
    return {
        "psnr_db_worst": frames[worst].psnr_db,
        "psnr_db_mean": float(np.mean([f.psnr_db for f in frames])),
        "ssim_worst": min(f.ssim for f in frames),
        "ssim_mean": float(np.mean([f.ssim for f in frames])),
        "max_abs": max(f.max_abs for f in frames),
        "worst_frame": worst,
        "worst_where": frames[worst].where,
        "frames": [
            {"where": f.where, "psnr_db": f.psnr_db, "ssim": f.ssim, "max_abs": f.max_abs} for f in frames
        ],
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The report as a page; ``document`` is the content of ``quality.json``."""
    convolutions = document["convolutions"]
    facts = (
        f"convolutions in {document['precision']}: {len(convolutions['quantised'])} of {convolutions['total']}",
        f"the rest of the graph: {document['rest']}, opset {document['opset']}",
        f"scales: {document['method']}, from {len(document['calibration_frames'])} frames",
        f"judged on frames: {len(document['network']['frames'])} others",
        f"weights: {document['weights']}",
        f"bound: {document['bound_psnr_db']:g} dB for every frame; {document['verdict']}",
        f"run by {document['runtime']}",
    )
    lines = [
        f"# {document['precision']} against fp32",
        "",
        *(f"- {fact}" for fact in facts),
        "",
        "| | PSNR worst | mean | SSIM worst | mean | largest difference | worst frame |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, key in (("warp_decode, crop", "network"), ("end to end, whole frame", "end_to_end")):
        f = document[key]
        lines.append(
            f"| {title} | {f['psnr_db_worst']:.2f} dB | {f['psnr_db_mean']:.2f} dB | {f['ssim_worst']:.4f} "
            f"| {f['ssim_mean']:.4f} | {f['max_abs']} | {f['worst_frame']}: {f['worst_where']} |"
        )
    lines += [
        "",
        "The crop: the network in exact 8-bit arithmetic, fed as the fp32 bundle feeds it. The whole frame: what lp-run writes "
        "on a CPU. The worst crop is worst_quantised.png, beside worst_reference.png. Unchanged: "
        + ", ".join(f"{name} ({how})" for name, how in document["other_networks"].items())
        + ".",
        "",
        "| left in floating point | why |",
        "|---|---|",
        *(f"| {name} | {why} |" for name, why in convolutions["float"].items()),
    ]
    return "\n".join(lines) + "\n"
