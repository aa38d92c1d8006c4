"""LivePortrait's 203 face landmarks, read from our mesh of 478 points.

LivePortrait crops and measures faces by the 203 points of its ``landmark.onnx``. Their meaning, from how the reference
uses them (``src/utils/crop.py``, ``retargeting_utils.py``) and from the order in which the points follow each other:

======== ==================================================================================================
0-23     image-left eye, clockwise: 0 outer corner, 6 upper lid, 12 inner corner, 18 lower lid
24-47    image-right eye, clockwise: 24 inner corner, 30 upper lid, 36 outer corner, 42 lower lid
48-83    outer lips, clockwise: 48 image-left corner, 57 above, 66 image-right corner, 75 below
84-107   inner lips, clockwise: 84 image-left corner, 90 above, 96 image-right corner, 102 below
108-144  contour from the image-left temple by way of the chin (126) to the image-right temple
145-164  image-left brow, clockwise: 145 outer end, 155 inner end
165-184  image-right brow, clockwise: 165 inner end, 175 outer end
185-196  nose: down its image-left side, up the other
197-198  pupils, image left and right
199-202  bridge of the nose, downwards
======== ==================================================================================================

There is no point on the forehead. Points of ours stand on the same lines, spaced evenly between the mesh's own. The gaps of
lids and lips are then set so that the reference's formulas (:func:`~lp_edge.runtime.liveportrait_motion.eye_ratio_203`, ``lip_ratio_203``) give the
values that its own landmarks would: :class:`RatioMap`, fitted by :mod:`lp_edge.export.mesh.fit_landmarks203`;
``docs/landmarks.md`` says how well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lp_edge.errors import TensorError
from lp_edge.runtime import topology
from lp_edge.runtime.liveportrait_motion import eye_ratio_203, lip_ratio_203

__all__ = [
    "CALIBRATION",
    "NUM_LANDMARKS",
    "LandmarkSource",
    "MeshLandmarks",
    "RatioMap",
    "mesh_to_203",
]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

NUM_LANDMARKS = 203


class LandmarkSource(Protocol):
    """Gives the landmarks of a face whose mesh is known."""

    def landmarks(self, rgb: U8, points: F32) -> F32:
        """Landmarks of one face.

        Args:
            rgb: uint8 ``[H, W, 3]``, the frame.
            points: float32 ``[478, >= 2]`` frame px, the face's mesh in it.

        Returns:
            float32 ``[203, 2]`` frame px.
        """

    def picture_points(self, rgb: U8, points: F32) -> F32:
        """What a source PICTURE is cropped by; clips and drivers go by :meth:`landmarks`.

        The reference cuts pictures by InsightFace's 106 points, which stand for a slightly smaller face than its 203.

        Args:
            rgb: uint8 ``[H, W, 3]``, the picture.
            points: float32 ``[478, >= 2]`` px, the face's mesh in it.

        Returns:
            float32 ``[106 or 203, 2]`` px, for :func:`lp_edge.runtime.crop.source_matrix`.
        """


# --- ratios ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatioMap:
    """From ratios of the mesh's own points to those of LivePortrait's landmarks; both maps rise monotonically.

    Attributes:
        eye_floor: eye ratio of a shut eye, where landmarks of both lids all but coincide.
        eye_shut: up to here an eye is shut; the mesh network reads shut eyes as slightly open.
        eye_open: from here on an eye's ratio is left as it is; between ``eye_shut`` and ``eye_open`` the map is a straight line.
        lip_limit, lip_gain: lips, ``lip_limit * tanh(lip_gain * x / lip_limit)``: closed stays closed, the slope there is
            ``lip_gain``. The mesh network exaggerates wide-open mouths.
    """

    eye_floor: float
    eye_shut: float
    eye_open: float
    lip_limit: float
    lip_gain: float

    def eye(self, ratio: npt.ArrayLike) -> F64:
        """Eye ratios of any shape."""
        x = np.asarray(ratio, np.float64)
        below = np.interp(x, [self.eye_shut, self.eye_open], [self.eye_floor, self.eye_open])
        return np.asarray(np.maximum(below, np.where(x > self.eye_open, x, 0.0)))

    def lip(self, ratio: npt.ArrayLike) -> F64:
        """Lip ratios of any shape."""
        x = np.asarray(ratio, np.float64)
        return np.asarray(self.lip_limit * np.tanh(self.lip_gain * x / self.lip_limit))


CALIBRATION = RatioMap(eye_floor=0.01, eye_shut=0.12, eye_open=0.231, lip_limit=0.661, lip_gain=0.769)
"""As ``python -m lp_edge.export.mesh.fit_landmarks203`` prints it."""


# --- points ----------------------------------------------------------------------------------------------------------

_Node = int | tuple[int, int]


def _line(nodes: Sequence[_Node], steps: int) -> F32:
    """Weights float32 ``[steps + 1, 478]`` of points spaced evenly, by nodes, along a line of mesh points.

    A node is a mesh point or the middle of two.
    """
    at = np.zeros((len(nodes), topology.NUM_POINTS), np.float32)
    for row, node in zip(at, nodes, strict=True):
        row[[node] if isinstance(node, int) else list(node)] = 1.0 if isinstance(node, int) else 0.5
    place = np.linspace(0.0, len(nodes) - 1, steps + 1)
    low = np.minimum(place.astype(int), len(nodes) - 2)
    part = (place - low).astype(np.float32)[:, None]
    return np.asarray((1 - part) * at[low] + part * at[low + 1])


def _ring(upper: Sequence[_Node], lower: Sequence[_Node], steps: int) -> F32:
    """A closed ring, clockwise: the upper line from image left to image right, the lower one back, both given rightwards."""
    return np.concatenate([_line(upper, steps)[:-1], _line(lower, steps)[:0:-1]])


def _weights() -> F32:
    """float32 ``[203, 478]``: every landmark as a mean of mesh points."""
    t = topology
    # a brow has no pointed ends in the mesh: they lie between its two edges
    left_ends, right_ends = ((70, 46), (107, 55)), ((336, 285), (300, 276))
    chin = t.FACE_OVAL.index(t.CHIN)
    parts = [
        *(_ring(eye[:9], (eye[0], *eye[:7:-1]), 12) for eye in (t.LEFT_EYE, t.RIGHT_EYE)),
        _ring(t.OUTER_LIP_UPPER, t.OUTER_LIP_LOWER, 18),
        _ring(t.INNER_LIP_UPPER, t.INNER_LIP_LOWER, 12),
        # the oval runs by way of image right, the contour by way of image left
        _line(t.FACE_OVAL[chin - 11 : chin + 12][::-1], 36),
        *(
            _ring((a, *brow[1:4], b), (a, *brow[8:5:-1], b), 10)
            for brow, (a, b) in ((t.LEFT_BROW, left_ends), (t.RIGHT_BROW, right_ends))
        ),
        _line((193, 198, 48, 64, 98, 97), 5),
        _line((326, 327, 294, 278, 420, 417), 5),
        _line((t.LEFT_IRIS_CENTRE, t.RIGHT_IRIS_CENTRE), 1),
        _line((6, 197, 5, 4), 3),
    ]
    return np.concatenate(parts)


_WEIGHTS = _weights().astype(np.float64)


def _set_gap(landmarks: F64, first: int, half: int, width: tuple[int, int], ratio: float) -> None:
    """Open or close a ring of landmarks in place until its gap over the width is ``ratio``.

    Args:
        landmarks: float64 ``[203, 2]``.
        first: the ring's image-left corner; its image-right corner is ``first + half``.
        half: steps from corner to corner.
        width: the landmarks whose distance the gap is measured in.
        ratio: middle gap over width.
    """
    step = np.arange(1, half)
    upper, lower = first + step, first + 2 * half - step
    across = landmarks[width[1]] - landmarks[width[0]]
    length = float(np.linalg.norm(across))
    down = np.array([-across[1], across[0]]) / max(length, 1e-6)
    middle = (landmarks[upper] + landmarks[lower]) / 2
    gap = (landmarks[lower] - landmarks[upper]) @ down
    centre = half // 2 - 1
    # most in the middle, nothing in the corners
    share = 1.0 - ((step - half / 2) / (half / 2)) ** 2
    gap = np.maximum(gap + share * (ratio * length - gap[centre]), 0.0)
    landmarks[upper] = middle - gap[:, None] / 2 * down
    landmarks[lower] = middle + gap[:, None] / 2 * down


def mesh_to_203(points: npt.ArrayLike, calibration: RatioMap | None = CALIBRATION) -> F32:
    """The 203 landmarks of a mesh.

    Args:
        points: ``[478, >= 2]`` px of any frame; x and y count.
        calibration: sets the gaps of lids and inner lips; ``None`` = leaves them as the mesh has them.

    Returns:
        float32 ``[203, 2]`` px of the same frame.

    Raises:
        TensorError: the points have another shape.
    """
    p = np.asarray(points, np.float64)
    if p.ndim != 2 or p.shape[0] != topology.NUM_POINTS or p.shape[1] < 2:
        raise TensorError(
            f"mesh points of shape {p.shape}",
            f"expected [{topology.NUM_POINTS}, 2 or 3]",
            "pass all points of one face",
        )
    out = _WEIGHTS @ p[:, :2]
    if calibration is not None:
        eyes = calibration.eye(eye_ratio_203(out))
        for first, ratio in zip((0, 24), eyes, strict=True):
            _set_gap(out, first, 12, (first, first + 12), float(ratio))
        _set_gap(out, 84, 12, (48, 66), float(calibration.lip(lip_ratio_203(out))))
    return out.astype(np.float32)


class MeshLandmarks:
    """The 203 landmarks without a further network: :func:`mesh_to_203`. A :class:`LandmarkSource`."""

    def landmarks(self, rgb: U8, points: F32) -> F32:
        """Landmarks float32 ``[203, 2]`` of the face with these mesh points; the frame's pixels do not count."""
        return mesh_to_203(points)

    def picture_points(self, rgb: U8, points: F32) -> F32:
        """The same as :meth:`landmarks`."""
        return mesh_to_203(points)
