"""LivePortrait's crops: square parts of a frame, placed by face landmarks.

A crop's axes are the face's own: y from the middle of the eyes to the middle of the mouth's corners, x across it. Its side is
the larger extent of all landmarks along these axes times a factor, its middle that of the extents, moved by a fraction
of the side. A *source* crop is turned with the face, a *driving* crop stands upright and is the same for a whole clip, so
that the head's movement stays visible in it. (The formulas are those of LivePortrait's ``src/utils/crop.py`` and
``cropper.py``, evaluated in float64; the reference computes in float32.)

Coordinates are pixels of the frame, x right, y down, pixel centres at integers, as ``cv2.warpAffine`` has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, NoFaceError, TensorError
from lp_edge.runtime.faces import check_frame

__all__ = [
    "CROP_SIZE",
    "INPUT_SIZE",
    "Crop",
    "CropOptions",
    "average_box",
    "box_matrix",
    "cut",
    "driving_box",
    "driving_crop",
    "source_crop",
    "source_matrix",
    "transform_points",
]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

CROP_SIZE = 512
"""Side of a crop, px."""
INPUT_SIZE = 256
"""Side of the crop that appearance and motion extractor see, px."""

# fmt: off
_AXIS: dict[int, tuple[tuple[int, ...], tuple[int, int]]] = {
    203: ((0, 6, 12, 18, 24, 30, 36, 42), (48, 66)),
    106: ((33, 35, 40, 39, 87, 89, 94, 93), (52, 61)),
    68: ((36, 39, 42, 45), (48, 54)),
    9: ((0, 1, 2, 3), (5, 6)),
    5: ((0, 1), (3, 4)),
}
# fmt: on
"""Number of landmarks -> those whose mean is the middle of the eyes, and the mouth's corners. 203: LivePortrait's
``landmark.onnx``; 106: InsightFace; 68: iBUG; 9: X-Pose's animal face; 5: eyes, nose, mouth corners."""


@dataclass(frozen=True)
class CropOptions:
    """Where crops lie around a face; the defaults are LivePortrait's.

    Attributes:
        scale: side of a source crop over the larger extent of the landmarks, 1 to 10; more = more surroundings.
        vx, vy: shift of its middle along the face's axes, in sides, -1 to 1; vy < 0 = up, more forehead.
        rotate: turn source crops with the face.
        driving_scale, driving_vx, driving_vy: the same for driving crops.

    Raises:
        ConfigError: a value is out of range.
    """

    scale: float = 2.3
    vx: float = 0.0
    vy: float = -0.125
    rotate: bool = True
    driving_scale: float = 2.2
    driving_vx: float = 0.0
    driving_vy: float = -0.1

    def __post_init__(self) -> None:
        for name, low, high in (
            ("scale", 1.0, 10.0),
            ("vx", -1.0, 1.0),
            ("vy", -1.0, 1.0),
            ("driving_scale", 1.0, 10.0),
            ("driving_vx", -1.0, 1.0),
            ("driving_vy", -1.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"crop option {name} is {value}",
                    f"expected {low:g} to {high:g}",
                    f"leave it at {type(self).__dataclass_fields__[name].default}",
                )


_DEFAULTS = CropOptions()


@dataclass(frozen=True)
class Crop:
    """A square crop of a frame.

    Attributes:
        image: uint8 ``[S, S, 3]`` RGB.
        to_crop: float64 ``[3, 3]``, frame px -> crop px (the reference's M_o2c).
        to_frame: float64 ``[3, 3]``, crop px -> frame px (its M_c2o).
    """

    image: U8
    to_crop: F64
    to_frame: F64

    def network_input(self, size: int = INPUT_SIZE) -> U8:
        """The crop at the size that the extractors see: uint8 ``[size, size, 3]``, reduced by averaging areas."""
        if self.image.shape[0] == size:
            return self.image
        return np.asarray(cv2.resize(self.image, (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def transform_points(points: npt.ArrayLike, matrix: F64) -> F64:
    """Points ``[..., 2]`` through an affine float64 ``[3, 3]``, such as :attr:`Crop.to_crop`: float64 ``[..., 2]``."""
    return np.asarray(np.asarray(points, np.float64) @ matrix[:2, :2].T + matrix[:2, 2])


@dataclass(frozen=True)
class _Rect:
    """A square along the face's axes: middle, side (px) and the direction of x (unit vector)."""

    centre: F64
    side: float
    across: F64


def _face_rect(points: npt.ArrayLike, scale: float, vx: float, vy: float) -> _Rect:
    p = np.asarray(points, np.float64)
    if p.ndim != 2 or p.shape[1] != 2 or len(p) not in _AXIS:
        raise TensorError(
            f"landmarks of shape {p.shape}",
            f"expected [K, 2] with K one of {', '.join(map(str, _AXIS))}",
            "pass the x and y of all landmarks of one face",
        )
    if not np.isfinite(p).all():
        raise NoFaceError(
            "landmarks that are not finite", "expected points of a face", "use a frame that shows a face"
        )
    eyes, mouth = _AXIS[len(p)]
    down = p[list(mouth)].mean(0) - p[list(eyes)].mean(0)
    length = float(np.hypot(*down))
    down = down / length if length > 1e-3 else np.array([0.0, 1.0])
    across = np.array([down[1], -down[0]])
    middle = p.mean(0)
    along = (p - middle) @ np.stack([across, down]).T
    low, high = along.min(0), along.max(0)
    side = float((high - low).max()) * scale
    if side < 1.0:
        raise NoFaceError(
            f"landmarks within {side / scale:.3g} px",
            "expected points of a face, apart from each other",
            "use a frame that shows a face",
        )
    offset = (low + high) / 2 + side * np.array([vx, vy])
    return _Rect(middle + offset[0] * across + offset[1] * down, side, across)


def _to_crop(rect: _Rect, size: int) -> F64:
    """Frame px -> crop px; the square's middle lands on (size / 2, size / 2)."""
    s = size / rect.side
    c, n = s * rect.across
    x, y = rect.centre
    return np.array([[c, n, size / 2 - c * x - n * y], [-n, c, size / 2 + n * x - c * y], [0.0, 0.0, 1.0]])


def source_matrix(points: npt.ArrayLike, options: CropOptions = _DEFAULTS, *, size: int = CROP_SIZE) -> F64:
    """Where :func:`source_crop` lies, without its pixels.

    Args:
        points: ``[K, 2]`` frame px, K = 203, 106, 68, 9 or 5 landmarks.
        options: scale, vx, vy and rotate count.
        size: side of the crop, px.

    Returns:
        float64 ``[3, 3]``, frame px -> crop px.

    Raises:
        TensorError: the points have another shape.
        NoFaceError: the points are not finite or all in one place.
    """
    rect = _face_rect(points, options.scale, options.vx, options.vy)
    if not options.rotate:
        rect = _Rect(rect.centre, rect.side, np.array([1.0, 0.0]))
    return _to_crop(rect, size)


def cut(frame: U8, to_crop: F64, *, size: int = CROP_SIZE) -> Crop:
    """Cut a crop out of a frame.

    Args:
        frame: uint8 ``[H, W, 3]`` RGB.
        to_crop: float64 ``[3, 3]``, a similarity, frame px -> crop px.
        size: side of the crop, px.

    Returns:
        The crop: bilinear, black beyond the frame.

    Raises:
        TensorError: ``frame`` is no such array.
    """
    check_frame(frame)
    image = cv2.warpAffine(frame, to_crop[:2], (size, size), flags=cv2.INTER_LINEAR)
    return Crop(np.asarray(image, np.uint8), to_crop, np.asarray(np.linalg.inv(to_crop), np.float64))


def source_crop(
    frame: U8, points: npt.ArrayLike, options: CropOptions = _DEFAULTS, *, size: int = CROP_SIZE
) -> Crop:
    """The crop around a source face: turned with the face, eyes above the mouth.

    Args:
        frame: uint8 ``[H, W, 3]`` RGB.
        points: ``[K, 2]`` frame px, K = 203, 106, 68, 9 or 5 landmarks.
        options: scale, vx, vy and rotate count.
        size: side of the crop, px.

    Raises:
        TensorError, NoFaceError: as :func:`source_matrix` and :func:`cut`.

    Example:
        >>> eyes_nose_mouth = [[40, 40], [60, 40], [50, 50], [42, 60], [58, 60]]
        >>> crop = source_crop(np.zeros((100, 100, 3), np.uint8), eyes_nose_mouth, CropOptions(scale=2, vy=0))
        >>> transform_points([50, 50], crop.to_crop).tolist()  # 40 px of the frame around (50, 50) make 512
        [256.0, 256.0]
    """
    return cut(frame, source_matrix(points, options, size=size), size=size)


def driving_box(points: npt.ArrayLike, options: CropOptions = _DEFAULTS) -> F64:
    """The upright square around a driving face, of the side and middle that a turned crop would have.

    Args:
        points: ``[K, 2]`` frame px, K = 203, 106, 68, 9 or 5 landmarks.
        options: driving_scale, driving_vx and driving_vy count.

    Returns:
        float64 ``[4]``: x0, y0, x1, y1 in frame px.

    Raises:
        TensorError, NoFaceError: as :func:`source_matrix`.
    """
    rect = _face_rect(points, options.driving_scale, options.driving_vx, options.driving_vy)
    return np.concatenate([rect.centre - rect.side / 2, rect.centre + rect.side / 2])


def average_box(boxes: Sequence[npt.ArrayLike] | F64) -> F64:
    """The mean float64 ``[4]`` of boxes ``[T, 4]``: one driving crop for all frames of a clip.

    Raises:
        NoFaceError: there is no box.
    """
    if not len(boxes):
        raise NoFaceError(
            "no frame with a face", "expected a face to crop around", "use a clip that shows a face"
        )
    return np.asarray(np.asarray(boxes, np.float64).reshape(-1, 4).mean(0))


def box_matrix(box: npt.ArrayLike, *, size: int = CROP_SIZE) -> F64:
    """Where :func:`driving_crop` lies, without its pixels: float64 ``[3, 3]``, frame px -> crop px.

    Args:
        box: ``[4]`` x0, y0, x1, y1 in frame px, a square.
        size: side of the crop, px.

    Raises:
        TensorError: the box is not finite, empty or no square.
    """
    b = np.asarray(box, np.float64)
    if b.shape != (4,) or not np.isfinite(b).all() or b[2] - b[0] < 1 or b[3] - b[1] < 1:
        raise TensorError(
            f"box {b.tolist()}", "expected finite x0, y0, x1, y1 of one pixel and more", "use driving_box"
        )
    if not math.isclose(b[2] - b[0], b[3] - b[1], rel_tol=1e-3):
        raise TensorError(f"box {b.tolist()}", "expected a square", "use driving_box")
    return _to_crop(_Rect((b[:2] + b[2:]) / 2, float(b[2] - b[0]), np.array([1.0, 0.0])), size)


def driving_crop(frame: U8, box: npt.ArrayLike, *, size: int = CROP_SIZE) -> Crop:
    """The upright crop of a driving frame.

    Args:
        frame: uint8 ``[H, W, 3]`` RGB.
        box: ``[4]`` frame px, a square: :func:`driving_box` of a picture, :func:`average_box` of a clip's.
        size: side of the crop, px.

    Raises:
        TensorError: as :func:`box_matrix` and :func:`cut`.
    """
    return cut(frame, box_matrix(box, size=size), size=size)
