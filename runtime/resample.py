"""Resizing an animated crop to the size that is asked for."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError

__all__ = ["MAX_CROP", "resize_crop"]

U8 = npt.NDArray[np.uint8]

MAX_CROP = 2048
"""Largest side of a resized crop in pixels."""


def resize_crop(crop: U8, size: int) -> U8:
    """A square crop with ``size`` pixels a side.

    Smaller: every pixel is the mean of the area it covers. Larger (512 → 1024): Lanczos over 8 x 8 pixels, which keeps edges
    as sharp as they are and **adds no detail**: the networks draw 512 x 512 pixels, and nothing in a larger crop was not in these.
    Lanczos overshoots at hard edges by up to a tenth of their height; values are clipped to 0 … 255.

    Args:
        crop: uint8 ``[S, S, 3]``.
        size: 1 to :data:`MAX_CROP`.

    Returns:
        uint8 ``[size, size, 3]``; ``crop`` itself where it has that size.

    Raises:
        ConfigError: the crop is no square RGB picture, or the size is out of range.

    Example:
        >>> resize_crop(np.zeros((512, 512, 3), np.uint8), 1024).shape
        (1024, 1024, 3)
    """
    if crop.ndim != 3 or crop.shape[0] != crop.shape[1] or crop.shape[2] != 3 or crop.dtype != np.uint8:
        raise ConfigError(
            f"a crop {crop.dtype}{list(crop.shape)}", "expected uint8[S, S, 3]", "pass one square RGB crop"
        )
    if not 1 <= size <= MAX_CROP:
        raise ConfigError(f"size is {size}", f"expected 1 to {MAX_CROP}", "choose 256, 512 or 1024")
    if crop.shape[0] == size:
        return crop
    way = cv2.INTER_AREA if size < crop.shape[0] else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(crop, (size, size), interpolation=way), np.uint8)
