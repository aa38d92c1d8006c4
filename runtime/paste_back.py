"""Putting an animated crop back into its source frame.

The warp leaves the crop's border untouched, so a crop at the frame's own resolution is copied as it is.
A crop that was made smaller is enlarged and blended with a soft-edged mask, because its border is
the source's, but softer.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["paste_back", "soft_mask"]

U8 = npt.NDArray[np.uint8]


@lru_cache(maxsize=8)
def soft_mask(height: int, width: int, band: float = 0.08) -> npt.NDArray[np.uint8]:
    """Weights uint8 ``[height, width, 1]``: 255 inside, a smooth ramp to 0 over ``band`` of each side at the border."""

    def ramp(n: int) -> npt.NDArray[np.float64]:
        x = (np.arange(n) + 0.5) / n
        t = np.clip(np.minimum(x, 1 - x) / band, 0.0, 1.0)
        return t * t * (3 - 2 * t)

    mask = np.round(255 * ramp(height)[:, None] * ramp(width)[None, :]).astype(np.uint8)[..., None]
    mask.setflags(write=False)
    return mask


def paste_back(frame: U8, crop: U8, rect: tuple[int, int, int, int], *, out: U8 | None = None) -> U8:
    """The frame with ``crop`` in ``rect``; nothing outside ``rect`` is touched.

    Args:
        frame: uint8 ``[H, W, 3]`` source frame, left as it is.
        crop: uint8 ``[h, w, 3]`` animated crop.
        rect: x0, y0, x1, y1 in the frame.
        out: uint8 ``[H, W, 3]`` to write into instead of a copy of ``frame`` (several faces in one frame).
    """
    x0, y0, x1, y1 = rect
    result = frame.copy() if out is None else out
    target = result[y0:y1, x0:x1]
    if crop.shape[:2] == target.shape[:2]:
        target[:] = crop
        return result
    height, width = target.shape[:2]
    large = np.asarray(cv2.resize(crop, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
    mask = soft_mask(height, width)
    # Only the border is blended; inside, where the mask is full, the pixels are copied.
    top, left = (int(np.argmax(line == 255)) for line in (mask[:, width // 2, 0], mask[height // 2, :, 0]))
    inside = np.s_[top : height - top, left : width - left]
    for band in (
        np.s_[:top],
        np.s_[height - top :],
        np.s_[top : height - top, :left],
        np.s_[top : height - top, width - left :],
    ):
        weight = mask[band].astype(np.uint16)
        target[band] = (large[band] * weight + target[band] * (255 - weight) + 127) // 255
    target[inside] = large[inside]
    return result
