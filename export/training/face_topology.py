"""The 478-point face-mesh topology: named points, mirror order, groups that training weights and measures.

"Right" and "left" are the person's own sides, so the right eye lies at smaller x in a picture that is not mirrored.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

POINTS = 478

RIGHT_EYE_CORNERS = (33, 133)
LEFT_EYE_CORNERS = (362, 263)
MOUTH_CORNERS = (61, 291)
RIGHT_IRIS = (468, 469, 470, 471, 472)
LEFT_IRIS = (473, 474, 475, 476, 477)

RIGHT_EYE = (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246)
LEFT_EYE = (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466)
OUTER_LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
INNER_LIPS = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191)
RIGHT_BROW = (70, 63, 105, 66, 107, 55, 65, 52, 53, 46)
LEFT_BROW = (300, 293, 334, 296, 336, 285, 295, 282, 283, 276)
# fmt: off
CONTOUR = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)
# fmt: on
NOSE = (168, 6, 4, 1, 2, 98, 327, 48, 278)

RIGHT_LIDS = ((159, 145), (158, 153), (160, 144), (161, 163), (157, 154))
LEFT_LIDS = ((386, 374), (385, 380), (387, 373), (388, 390), (384, 381))
LIP_GAPS = ((13, 14), (82, 87), (312, 317), (81, 178), (311, 402))


@lru_cache(maxsize=1)
def mirror_permutation() -> npt.NDArray[np.intp]:
    """[478] indices: ``points[perm]`` relabels the points of a mirrored picture (an involution)."""
    from lp_edge.export.training._mirror import MIRROR  # generated from the mean shape, see derive_mirror

    out = np.asarray(MIRROR, np.intp)
    out.setflags(write=False)
    return out


def derive_mirror(shape: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
    """The mirror order from a symmetric shape [478, 3] (x right, y down): mutual nearest mirrored neighbours.

    The iris points (centre, then the points at larger x, top, smaller x, bottom) are paired by their order, since
    they lie close together. Raises ``ValueError`` when the pairing is not an involution.
    """
    p = np.asarray(shape, np.float64)[:468]
    eyes = p[list(LEFT_EYE_CORNERS)].mean(0) - p[list(RIGHT_EYE_CORNERS)].mean(0)
    axis = eyes / np.linalg.norm(eyes)
    q = p - p[[10, 152, 168, 1]].mean(0)
    reflected = q - 2 * np.outer(q @ axis, axis)
    distance = np.linalg.norm(reflected[:, None] - q[None], axis=-1)
    cost = distance + distance.T
    nearest = cost.argmin(1)
    perm = np.concatenate([nearest, [473, 476, 475, 474, 477, 468, 471, 470, 469, 472]])
    if not np.array_equal(perm[perm], np.arange(POINTS)):
        wrong = np.flatnonzero(perm[perm] != np.arange(POINTS))
        raise ValueError(f"no symmetric pairing: points {wrong[:20].tolist()} are not mutual neighbours")
    return perm.astype(np.intp)
