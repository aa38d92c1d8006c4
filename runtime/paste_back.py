"""Putting an animated crop back into its source frame.

Two kinds of crop come here:

* an upright rectangle of whole frame pixels (:func:`paste_back`). The warp of the ``mesh`` family leaves the crop's border
  untouched, so a crop at the frame's own resolution is copied as it is; a crop that was made smaller is enlarged and blended
  with a soft-edged mask, because its border is the source's, but softer;
* a turned square that an affine map places in the frame (:func:`paste_back_affine`, :class:`PastePlan`), as LivePortrait
  cuts it. LivePortrait warps crop and mask to the size of the whole frame and blends every pixel in float32
  (``prepare_paste_back`` and ``paste_back`` in its ``src/utils/crop.py``). Here the same pixels come from the changed region
  alone, blended with whole numbers, and only where the mask is neither 0 nor 255.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError

__all__ = [
    "PastePlan",
    "crop_mask",
    "paste_back",
    "paste_back_affine",
    "placed_rect",
    "resized_to_frame",
    "soft_mask",
]

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]

# Up to version 4, OpenCV's warpAffine rounds the coordinates of every column to 1/1024 pixel before it adds the row's, and the
# sum to 1/32 pixel; from version 5 on it computes them in float32.
_FIXED_POINT = int(cv2.__version__.partition(".")[0]) < 5
# Rows that are blended at once: few enough to stay in the cache, enough to hide the calls.
_ROWS = 16


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


@lru_cache(maxsize=8)
def crop_mask(size: int = 512, *, band: float = 0.045, radius: float = 0.09) -> U8:
    """Weights uint8 ``[size, size]`` of a square crop: 255 inside, 0 on its outermost pixels, corners rounded.

    The weight is ``255 · s(d / band)``, where ``d`` is the distance to the border of a square with rounded corners and ``s`` the
    step ``3t² - 2t³``, which starts and ends without a kink.

    Args:
        size: side of the crop in pixels.
        band: width of the soft edge, in sides.
        radius: radius of the corners, in sides; at least ``band``.
    """
    half = (size - 1) / 2
    reach = np.abs(np.arange(size) - half) - half * (
        1 - 2 * radius
    )  # how far beyond the centres of the corners' arcs
    outside = np.hypot(np.maximum(reach[:, None], 0.0), np.maximum(reach[None, :], 0.0))
    distance = 2 * half * radius - np.where(outside > 0, outside, np.maximum(reach[:, None], reach[None, :]))
    t = np.clip(distance / (band * size), 0.0, 1.0)
    mask: U8 = np.round(255 * t * t * (3 - 2 * t)).astype(np.uint8)
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


# -- crops that an affine map places -------------------------------------------------------------------


def resized_to_frame(to_frame: npt.ArrayLike, size: int, new_size: int) -> F64:
    """The map of a crop after the crop was resized from ``size`` to ``new_size`` pixels a side.

    Pixel centres are whole numbers, so pixel ``x`` of the new crop lies at ``(x + ½) · size / new_size - ½`` of the old one.

    Args:
        to_frame: float ``[3, 3]`` or ``[2, 3]``, pixels of the old crop → pixels of the frame.

    Returns:
        float64 ``[3, 3]``, pixels of the new crop → pixels of the frame.

    Raises:
        ConfigError: ``to_frame`` is no invertible affine map.
    """
    ratio = size / new_size
    shift = 0.5 * ratio - 0.5
    resized: F64 = _affine(to_frame) @ np.array([[ratio, 0.0, shift], [0.0, ratio, shift], [0.0, 0.0, 1.0]])
    return resized


def _affine(to_frame: npt.ArrayLike) -> F64:
    matrix = np.eye(3)
    given = np.asarray(to_frame, np.float64)
    if given.shape in ((2, 3), (3, 3)):
        matrix[: len(given)] = given
    if (
        given.shape not in ((2, 3), (3, 3))
        or not np.isfinite(matrix).all()
        or not np.allclose(matrix[2], (0.0, 0.0, 1.0))
        or abs(np.linalg.det(matrix[:2, :2])) < 1e-9
    ):
        raise ConfigError(
            f"a crop's map to the frame is {given.tolist()}",
            "expected an invertible affine map [3, 3] or [2, 3]",
            "use the to_frame of the crop",
        )
    return matrix


@dataclass(frozen=True)
class PastePlan:
    """What pasting a crop needs that does not depend on the crop's pixels: once per source picture, not per frame.

    Make one with :meth:`prepare`, then call :meth:`paste` for every crop of that source.

    Attributes:
        frame_size: width, height of the frame in pixels.
        crop_size: side of the crops in pixels.
        rect: x0, y0, x1, y1 of the changed region in the frame; empty (x0 = x1) where the crop lies outside of it.
        weight: uint8 ``[y1 - y0, x1 - x0]``, the mask as it lies in the region.
    """

    frame_size: tuple[int, int]
    crop_size: int
    rect: tuple[int, int, int, int]
    weight: U8
    _warp: _Warp = field(repr=False)
    _bands: tuple[_Band, ...] = field(repr=False)

    @staticmethod
    def prepare(
        to_frame: npt.ArrayLike, frame_size: tuple[int, int], crop_size: int = 512, *, mask: U8 | None = None
    ) -> PastePlan:
        """Find the region and warp the mask.

        Args:
            to_frame: float64 ``[3, 3]`` or ``[2, 3]``, pixels of the crop → pixels of the frame (whole numbers are pixel
                centres). For a resized crop see :func:`resized_to_frame`.
            frame_size: width, height of the frame.
            crop_size: side of the crops in pixels.
            mask: uint8 ``[crop_size, crop_size]``; None takes :func:`crop_mask`.

        Raises:
            ConfigError: ``to_frame`` is no invertible affine map, or the mask has another shape or type.
        """
        matrix = _affine(to_frame)
        mask = crop_mask(crop_size) if mask is None else mask
        if mask.shape != (crop_size, crop_size) or mask.dtype != np.uint8:
            raise ConfigError(
                f"a mask {mask.dtype}{list(mask.shape)}",
                f"expected uint8[{crop_size}, {crop_size}]",
                "use a mask of the crop's size",
            )
        rect = placed_rect(matrix, frame_size, crop_size)
        weight = _Warp.of(matrix, rect, frame_size).mask(mask)
        # Shrink to where the mask is above 0.
        rows, columns = (np.flatnonzero(weight.any(axis=axis)) for axis in (1, 0))
        if len(rows) == 0:
            rect, weight = (0, 0, 0, 0), np.zeros((0, 0), np.uint8)
        else:
            inner = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            x0, y0 = rect[0] + int(columns[0]), rect[1] + int(rows[0])
            weight = np.ascontiguousarray(weight[inner])
            rect = (x0, y0, x0 + weight.shape[1], y0 + weight.shape[0])
        weight.setflags(write=False)
        return PastePlan(
            frame_size, crop_size, rect, weight, _Warp.of(matrix, rect, frame_size), tuple(_bands(weight))
        )

    def paste(self, frame: U8, crop: U8, *, out: U8 | None = None) -> U8:
        """The frame with one crop in it; see :func:`paste_back_affine`.

        Raises:
            ConfigError: frame, crop or ``out`` has another size than planned, or is no uint8 RGB picture.
        """
        width, height = self.frame_size
        result = frame.copy() if out is None else out
        for name, picture, shape in (
            ("frame", frame, (height, width, 3)),
            ("out", result, (height, width, 3)),
            ("crop", crop, (self.crop_size, self.crop_size, 3)),
        ):
            if picture.shape != shape or picture.dtype != np.uint8:
                raise ConfigError(
                    f"{name} is {picture.dtype}{list(picture.shape)}",
                    f"the plan is for uint8{list(shape)}",
                    "prepare a plan for this size",
                )
        if not result.flags.c_contiguous:
            raise ConfigError("out is a view with gaps", "expected a contiguous array", "copy it first")
        x0, y0, x1, y1 = self.rect
        if x0 < x1:
            target = result.reshape(height, -1)[y0:y1, 3 * x0 : 3 * x1]
            placed = self._warp.picture(crop).reshape(y1 - y0, -1)
            for band in self._bands:
                band.apply(target, placed)
        return result


def paste_back_affine(
    frame: U8, crop: U8, to_frame: npt.ArrayLike, *, mask: U8 | None = None, out: U8 | None = None
) -> U8:
    """The frame with a crop where ``to_frame`` places it, blended by a soft-edged mask.

    Every pixel is within one grey level of ``floor(m·warp(crop) + (1 - m)·frame)`` with ``m = warp(mask) / 255``, both warps
    bilinear ``cv2.warpAffine`` to the whole frame, in float32. Only the region where the mask is above 0 is computed and
    written. Where crop or frame repeat (a still source), :meth:`PastePlan.prepare` does the part that stays the same once.

    Args:
        frame: uint8 ``[H, W, 3]`` source frame, left as it is.
        crop: uint8 ``[S, S, 3]`` animated crop. It may reach beyond the frame.
        to_frame: float64 ``[3, 3]`` or ``[2, 3]``, pixels of the crop → pixels of the frame.
        mask: uint8 ``[S, S]``; None takes :func:`crop_mask`.
        out: uint8 ``[H, W, 3]`` to blend into instead of a copy of ``frame`` (several faces in one frame); returned.

    Raises:
        ConfigError: a size, type or map does not fit.

    Example:
        >>> frame, crop = np.zeros((90, 120, 3), np.uint8), np.full((64, 64, 3), 200, np.uint8)
        >>> out = paste_back_affine(frame, crop, [[0.5, 0, 40], [0, 0.5, 30]])
        >>> int(out[45, 55, 0]), int(out[0, 0, 0])
        (200, 0)
    """
    size = (frame.shape[1], frame.shape[0])
    return PastePlan.prepare(to_frame, size, crop.shape[0], mask=mask).paste(frame, crop, out=out)


def placed_rect(
    to_frame: npt.ArrayLike, frame_size: tuple[int, int], crop_size: int
) -> tuple[int, int, int, int]:
    """The part of a frame to which a bilinear warp of a crop contributes.

    Args:
        to_frame: float ``[3, 3]`` or ``[2, 3]``, pixels of the crop → pixels of the frame.
        frame_size: width, height of the frame.
        crop_size: side of the crop in pixels.

    Returns:
        x0, y0, x1, y1 within the frame; x0 = x1 or y0 = y1 where the crop lies outside of it.

    Raises:
        ConfigError: ``to_frame`` is no invertible affine map.
    """
    ends = (-1.0, float(crop_size))  # one pixel beyond the outermost centres the contribution has ended
    corners = np.array([(x, y, 1.0) for x in ends for y in ends]) @ _affine(to_frame)[:2].T
    low, high = np.floor(corners.min(0)), np.ceil(corners.max(0)) + 1
    x0, x1, y0, y1 = (
        int(np.clip(value, 0, limit))
        for value, limit in zip((low[0], high[0], low[1], high[1]), np.repeat(frame_size, 2), strict=True)
    )
    return x0, y0, x1, y1


@dataclass(frozen=True)
class _Warp:
    """Bilinear ``warpAffine`` to a whole frame, of which only ``rect`` is computed.

    A plain offset in the matrix is not enough with OpenCV 4: its rounding of coordinates depends on the column's number in
    the frame, and 1/32 pixel at an edge of black and white is 8 levels. There its own coordinates are computed here and
    handed to ``remap``, which gives the same bytes. OpenCV 5 is off by at most one level.
    """

    matrix: F64
    rect: tuple[int, int, int, int]
    frame_width: int
    maps: tuple[npt.NDArray[np.int16], npt.NDArray[np.uint16]] | None

    @staticmethod
    def of(matrix: F64, rect: tuple[int, int, int, int], frame_size: tuple[int, int]) -> _Warp:
        empty = rect[0] >= rect[2] or rect[1] >= rect[3]
        maps = _fixed_point_maps(matrix, rect) if _FIXED_POINT and not empty else None
        return _Warp(matrix, rect, frame_size[0], maps)

    def picture(self, crop: U8) -> U8:
        """``[S, S, 3]`` → ``[y1 - y0, x1 - x0, 3]``; within one level of the warp to the whole frame."""
        if self.maps is not None:
            return np.asarray(cv2.remap(crop, *self.maps, cv2.INTER_LINEAR), np.uint8)
        x0, y0, x1, y1 = self.rect
        moved = self.matrix[:2] - [[0.0, 0.0, x0], [0.0, 0.0, y0]]
        return np.asarray(cv2.warpAffine(crop, moved, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR), np.uint8)

    def mask(self, mask: U8) -> U8:
        """``[S, S]`` → ``[y1 - y0, x1 - x0]``; equal to the warp to the whole frame, so that errors do not add up."""
        x0, y0, x1, y1 = self.rect
        if x0 >= x1 or y0 >= y1:
            return np.zeros((0, 0), np.uint8)
        if self.maps is not None:
            return np.asarray(cv2.remap(mask, *self.maps, cv2.INTER_LINEAR), np.uint8)
        whole_rows = cv2.warpAffine(mask, self.matrix[:2], (self.frame_width, y1), flags=cv2.INTER_LINEAR)
        return np.asarray(whole_rows, np.uint8)[y0:, x0:x1]


def _fixed_point_maps(
    matrix: F64, rect: tuple[int, int, int, int]
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint16]]:
    """The coordinates OpenCV 4 uses for the pixels of ``rect``: whole pixels, and 1/32 pixels as one index of 1024."""
    x0, y0, x1, y1 = rect
    inverse = np.asarray(cv2.invertAffineTransform(matrix[:2]), np.float64)
    x, y = np.arange(x0, x1), np.arange(y0, y1)
    parts = []
    for a, b, c in inverse:
        row = np.rint((b * y + c) * 1024).astype(np.int64) + 16
        column = np.rint(a * x * 1024).astype(np.int64)
        parts.append((row[:, None] + column[None]) >> 5)
    across, down = parts
    whole = np.clip(np.stack([across >> 5, down >> 5], axis=-1), -32768, 32767).astype(np.int16)
    return whole, ((down & 31) * 32 + (across & 31)).astype(np.uint16)


@dataclass(frozen=True)
class _Band:
    """Some rows of the region: columns to blend with their weights, and columns to copy.

    Columns count bytes, three a pixel: one long row runs through NumPy several times faster than pixels of three.
    """

    rows: slice
    blended: tuple[tuple[slice, npt.NDArray[np.uint16], npt.NDArray[np.uint16]], ...]
    copied: slice

    def apply(self, target: U8, placed: U8) -> None:
        """Write ``placed`` into ``target``, both the whole region ``[h, 3 w]``."""
        into, crop = target[self.rows], placed[self.rows]
        for columns, weight, rest in self.blended:
            total = crop[:, columns].astype(np.uint16)
            total *= weight
            below = into[:, columns].astype(np.uint16)
            below *= rest
            total += below  # at most 255 · 255
            total //= 255
            into[:, columns] = total
        into[:, self.copied] = crop[:, self.copied]


def _bands(weight: U8) -> Iterator[_Band]:
    """Cut the region into bands of :data:`_ROWS` rows; what is 255 in all rows of a band is copied."""
    for top in range(0, len(weight), _ROWS):
        rows = slice(top, top + _ROWS)
        used = np.flatnonzero(weight[rows].any(axis=0))
        if len(used) == 0:
            continue
        left, right = int(used[0]), int(used[-1]) + 1
        full = np.flatnonzero((weight[rows] == 255).all(axis=0))
        # A convex mask is 255 in one piece of every row; any other is blended throughout.
        whole = len(full) > 0 and int(full[-1]) - int(full[0]) + 1 == len(full)
        start, stop = (int(full[0]), int(full[-1]) + 1) if whole else (left, left)
        blended = []
        for a, b in ((left, start), (stop, right)):
            if a < b:
                part = np.repeat(weight[rows, a:b].astype(np.uint16), 3, axis=1)
                blended.append((slice(3 * a, 3 * b), part, 255 - part))
        yield _Band(rows, tuple(blended), slice(3 * start, 3 * stop))
