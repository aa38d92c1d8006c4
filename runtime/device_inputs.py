"""What the device graphs take besides pixels, made on the host: maps between frame and crop, weights of a resize.

Maps are inverted in float64 and handed over as float32. The graphs are those of :mod:`lp_edge.export.device_graphs`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError

__all__ = ["paste_matrix", "resize_weights", "sampling_matrix"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_LANCZOS_TAPS, _COEFFICIENT = 8, 2048  # OpenCV's INTER_LANCZOS4; its weights have 11 bits


def sampling_matrix(to_output: npt.ArrayLike) -> F32:
    """The inverse of an affine map as the graphs take it.

    Args:
        to_output: float ``[2, 3]`` or ``[3, 3]``, px of the input → px of the output (``Crop.to_crop``, ``CropTransform.matrix``).

    Returns:
        float32 ``[1, 2, 3]``, px of the output → px of the input; inverted in float64.

    Raises:
        ConfigError: the map is not affine or has no inverse.
    """
    given = np.asarray(to_output, np.float64)
    if given.shape not in ((2, 3), (3, 3)) or not np.isfinite(given).all():
        raise ConfigError(
            f"a map {given.tolist()}", "expected finite [2, 3] or [3, 3]", "use a crop's to_crop"
        )
    matrix = np.eye(3)
    matrix[:2] = given[:2]
    try:
        inverse = np.linalg.inv(matrix)
    except np.linalg.LinAlgError as error:
        raise ConfigError(
            f"a map {given.tolist()}", "expected one with an inverse", "use a crop's to_crop"
        ) from error
    return np.asarray(inverse[None, :2], np.float32)


def paste_matrix(to_frame: npt.ArrayLike, origin: tuple[int, int]) -> F32:
    """Where a graph that pastes reads the crop.

    Args:
        to_frame: float ``[2, 3]`` or ``[3, 3]``, px of the crop → px of the frame.
        origin: x, y of the patch in the frame: ``PastePlan.rect[:2]``, or (0, y0) for whole rows.

    Returns:
        float32 ``[1, 2, 3]``, px of the patch → px of the crop.

    Raises:
        ConfigError: as :func:`sampling_matrix`.
    """
    moved = np.array(to_frame, np.float64)
    if moved.shape in ((2, 3), (3, 3)):
        moved[:2, 2] -= origin
    return sampling_matrix(moved)


@lru_cache(maxsize=4)
def resize_weights(given: int, wanted: int) -> F32:
    """Weights of a resize as :func:`lp_edge.runtime.resample.resize_crop` does it, for both axes alike.

    Fewer pixels: how much of an output pixel an input pixel covers. More: OpenCV's INTER_LANCZOS4, ``sinc(d)·sinc(d / 4)``
    over eight pixels, normalised to 1, rounded to 1/2048 each; the outermost pixels repeated.

    Args:
        given, wanted: sides, px.

    Returns:
        float32 ``[wanted, given]``, read-only; rows sum to 1 (to 1/512 for Lanczos).

    Raises:
        ConfigError: a side is below 1 px.

    Example:
        >>> resize_weights(4, 2).tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    if min(given, wanted) < 1:
        raise ConfigError(f"a resize from {given} to {wanted} px", "expected 1 px and more", "choose a size")
    out = np.arange(wanted)
    if wanted <= given:
        scale, into = given / wanted, np.arange(given)
        first = out[:, None] * scale
        covered = np.minimum(first + scale, into + 1.0) - np.maximum(first, into)
        weights = np.asarray(np.maximum(covered, 0.0) / scale, np.float32)
    else:
        centre = ((out + 0.5) * (given / wanted) - 0.5).astype(np.float32)
        base = np.floor(centre)
        taps = np.arange(_LANCZOS_TAPS) - (_LANCZOS_TAPS // 2 - 1)
        distance = (centre - base).astype(np.float64)[:, None] - taps
        values = np.sinc(distance) * np.sinc(distance / (_LANCZOS_TAPS // 2))
        values = np.rint(values / values.sum(1, keepdims=True) * _COEFFICIENT) / _COEFFICIENT
        weights = np.zeros((wanted, given), np.float32)
        index = np.clip(base[:, None].astype(np.int64) + taps, 0, given - 1)
        np.add.at(weights, (out[:, None], index), values.astype(np.float32))
    weights.setflags(write=False)
    return weights
