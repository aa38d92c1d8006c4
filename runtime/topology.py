"""The 478-point face-mesh topology: named points, regions, and the openings of eyes and lips.

Names go by the side of the PICTURE: "left" is the image-left eye of an unmirrored frontal face (the person's right one).
Points 0-467 are the mesh, 468-472 the image-left iris (468 its centre), 473-477 the image-right iris (473). The regions
``eyes``, ``lip`` and ``rest`` are disjoint and together hold all points.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

__all__ = [
    "CHIN",
    "FACE_OVAL",
    "FOREHEAD_TOP",
    "INNER_LIP_LOWER",
    "INNER_LIP_PAIRS",
    "INNER_LIP_UPPER",
    "LEFT_BROW",
    "LEFT_EYE",
    "LEFT_EYE_CORNERS",
    "LEFT_IRIS",
    "LEFT_IRIS_CENTRE",
    "LEFT_SIDE",
    "LID_PAIRS_IMAGE_LEFT",
    "LID_PAIRS_IMAGE_RIGHT",
    "MOUTH_CORNERS",
    "NOSE",
    "NOSE_BRIDGE",
    "NOSE_TIP",
    "NUM_POINTS",
    "OUTER_LIP_LOWER",
    "OUTER_LIP_UPPER",
    "REGIONS",
    "RIGHT_BROW",
    "RIGHT_EYE",
    "RIGHT_EYE_CORNERS",
    "RIGHT_IRIS",
    "RIGHT_IRIS_CENTRE",
    "RIGHT_SIDE",
    "RIGID",
    "eye_ratio",
    "eye_roll",
    "five_points",
    "iris_position",
    "lip_ratio",
]

F32 = npt.NDArray[np.float32]

NUM_POINTS = 478
FOREHEAD_TOP, CHIN, LEFT_SIDE, RIGHT_SIDE, NOSE_TIP = 10, 152, 234, 454, 4

# fmt: off
FACE_OVAL: tuple[int, ...] = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)
"""Closed ring, clockwise in the picture, from the top of the forehead by way of image right and the chin."""

LEFT_EYE: tuple[int, ...] = (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7)
"""Closed ring, clockwise: outer (image-left) corner, upper lid, inner corner, lower lid."""
RIGHT_EYE: tuple[int, ...] = (362, 398, 384, 385, 386, 387, 388, 466, 263, 249, 390, 373, 374, 380, 381, 382)
"""Closed ring, clockwise: inner (image-left) corner, upper lid, outer corner, lower lid."""
LEFT_EYE_CORNERS, RIGHT_EYE_CORNERS = (33, 133), (362, 263)
"""From image left to image right: outer, inner corner of the left eye; inner, outer corner of the right one."""
LID_PAIRS_IMAGE_LEFT: tuple[tuple[int, int], ...] = (
    (246, 7), (161, 163), (160, 144), (159, 145), (158, 153), (157, 154), (173, 155),
)
"""(upper, lower) points that meet when the eye closes, from image left to image right."""
LID_PAIRS_IMAGE_RIGHT: tuple[tuple[int, int], ...] = (
    (398, 382), (384, 381), (385, 380), (386, 374), (387, 373), (388, 390), (466, 249),
)

LEFT_IRIS: tuple[int, ...] = (468, 469, 470, 471, 472)
"""Centre, then the rim at image right, top, image left, bottom."""
RIGHT_IRIS: tuple[int, ...] = (473, 474, 475, 476, 477)
LEFT_IRIS_CENTRE, RIGHT_IRIS_CENTRE = 468, 473

LEFT_BROW: tuple[int, ...] = (70, 63, 105, 66, 107, 55, 65, 52, 53, 46)
"""Closed ring, clockwise: upper edge from image left to image right, lower edge back."""
RIGHT_BROW: tuple[int, ...] = (336, 296, 334, 293, 300, 276, 283, 282, 295, 285)

OUTER_LIP_UPPER: tuple[int, ...] = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
"""From the image-left to the image-right corner; the four lip lines share their corners pairwise."""
OUTER_LIP_LOWER: tuple[int, ...] = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
INNER_LIP_UPPER: tuple[int, ...] = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
INNER_LIP_LOWER: tuple[int, ...] = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
MOUTH_CORNERS = (61, 291)
INNER_LIP_PAIRS: tuple[tuple[int, int], ...] = ((81, 178), (82, 87), (13, 14), (312, 317), (311, 402))
"""(upper, lower) points of the inner lips that meet when the mouth closes."""

NOSE_BRIDGE: tuple[int, ...] = (168, 6, 197, 195, 5, 4)
"""From between the eyes down to the tip."""
NOSE: tuple[int, ...] = (*NOSE_BRIDGE, 1, 19, 94, 2, 98, 97, 326, 327, 64, 294, 48, 278, 115, 344, 220, 440)

RIGID: tuple[int, ...] = (
    168, 6, 197, 195, 5,                                    # nose bridge
    10, 151, 9, 67, 109, 338, 297, 103, 332, 54, 284,       # forehead
    21, 251, 162, 389, 127, 356,                            # temples
    33, 133, 362, 263,                                      # eye corners
)
# fmt: on
"""Points that expression hardly moves; head pose is read from them."""

# fmt: off
_EYES: tuple[int, ...] = (
    7, 22, 23, 24, 25, 26, 27, 28, 29, 30, 33, 56, 110, 112, 130, 133, 144, 145, 153, 154, 155, 157, 158, 159, 160, 161,
    163, 173, 190, 243, 246, 247, 249, 252, 253, 254, 255, 256, 257, 258, 259, 260, 263, 286, 339, 341, 359, 362, 373,
    374, 380, 381, 382, 384, 385, 386, 387, 388, 390, 398, 414, 463, 466, 467, *LEFT_IRIS, *RIGHT_IRIS,
)
_LIP: tuple[int, ...] = (
    0, 11, 12, 13, 14, 15, 16, 17, 18, 32, 37, 38, 39, 40, 41, 42, 43, 57, 61, 62, 72, 73, 74, 76, 77, 78, 80, 81, 82,
    83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 95, 96, 106, 140, 146, 148, 152, 164, 165, 167, 171, 175, 176, 178, 179,
    180, 181, 182, 183, 184, 185, 186, 191, 194, 199, 200, 201, 202, 204, 208, 212, 262, 267, 268, 269, 270, 271, 272,
    273, 287, 291, 292, 302, 303, 304, 306, 307, 308, 310, 311, 312, 313, 314, 315, 316, 317, 318, 319, 320, 321, 322,
    324, 325, 335, 369, 375, 377, 391, 393, 396, 400, 402, 403, 404, 405, 406, 407, 408, 409, 410, 415, 418, 421, 422,
    424, 428, 432,
)
# fmt: on

REGIONS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"eyes": _EYES, "lip": _LIP, "rest": tuple(sorted(set(range(NUM_POINTS)) - set(_EYES) - set(_LIP)))}
)
"""``eyes``: lids, the ring of skin around them, irises. ``lip``: lips, the skin around them, and the chin, which
goes with the lower lip. ``rest``: all others."""


def _gap_over_width(
    points: npt.ArrayLike, pairs: tuple[tuple[int, int], ...], corners: tuple[int, int]
) -> F32:
    p = np.asarray(points, np.float32)
    upper, lower = (p[..., list(side), :2] for side in zip(*pairs, strict=True))
    gap = np.linalg.norm(upper - lower, axis=-1).mean(-1)
    width = np.linalg.norm(p[..., corners[0], :2] - p[..., corners[1], :2], axis=-1)
    return np.asarray(gap / np.maximum(width, 1e-6), np.float32)


def eye_ratio(points: npt.ArrayLike) -> F32:
    """Opening of the eyes: mean distance of five lid pairs over the distance of the eye's corners, in the picture.

    Args:
        points: ``[..., 478, >= 2]`` pixels of any frame; x and y count.

    Returns:
        float32 ``[..., 2]``: image-left and image-right eye, ≥ 0; about 0.3 open, below 0.1 closed.
    """
    left = _gap_over_width(points, LID_PAIRS_IMAGE_LEFT[1:-1], LEFT_EYE_CORNERS)
    right = _gap_over_width(points, LID_PAIRS_IMAGE_RIGHT[1:-1], RIGHT_EYE_CORNERS)
    return np.stack([left, right], axis=-1)


def lip_ratio(points: npt.ArrayLike) -> F32:
    """Opening of the mouth: mean distance of five inner lip pairs over the distance of the mouth's corners.

    Args:
        points: ``[..., 478, >= 2]`` pixels of any frame; x and y count.

    Returns:
        float32 ``[...]``, ≥ 0; about 0 closed, 0.5 and more wide open.
    """
    return _gap_over_width(points, INNER_LIP_PAIRS, MOUTH_CORNERS)


def eye_roll(points: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Roll of the head in the picture: angle of the line through the middles of both eyes' corners.

    Args:
        points: ``[..., 478, >= 2]`` pixels.

    Returns:
        float64 ``[...]`` radians in (-π, π], clockwise as seen; 0 = eyes level.
    """
    p = np.asarray(points, np.float64)
    line = p[..., list(RIGHT_EYE_CORNERS), :2].mean(-2) - p[..., list(LEFT_EYE_CORNERS), :2].mean(-2)
    return np.asarray(np.arctan2(line[..., 1], line[..., 0]))


def five_points(points: npt.ArrayLike) -> F32:
    """The detector's five points of a mesh: left eye, right eye, nose tip, left and right mouth corner (image sides).

    Args:
        points: ``[..., 478, >= 2]`` pixels.

    Returns:
        float32 ``[..., 5, 2]``; the eyes are the iris centres, as in the detector's labels.
    """
    index = [LEFT_IRIS_CENTRE, RIGHT_IRIS_CENTRE, NOSE_TIP, *MOUTH_CORNERS]
    return np.asarray(points, np.float32)[..., index, :2]


def iris_position(points: npt.ArrayLike) -> F32:
    """Where the irises stand between the corners of their eyes.

    Args:
        points: ``[..., 478, >= 2]`` pixels.

    Returns:
        float32 ``[..., 2]``: image-left and image-right eye; 0 = at the eye's image-left corner, 1 = at the other.
    """
    p = np.asarray(points, np.float32)[..., :2]
    out = []
    for centre, (a, b) in ((LEFT_IRIS_CENTRE, LEFT_EYE_CORNERS), (RIGHT_IRIS_CENTRE, RIGHT_EYE_CORNERS)):
        axis = p[..., b, :] - p[..., a, :]
        along = ((p[..., centre, :] - p[..., a, :]) * axis).sum(-1)
        out.append(along / np.maximum((axis**2).sum(-1), 1e-6))
    return np.asarray(np.stack(out, axis=-1), np.float32)
