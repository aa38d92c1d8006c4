"""Adapter of the built-in ``mesh`` family: mesh points are the keypoints, the warp has a closed form.

Expects a bundle with the network ``warp_decode`` and the table ``canonical`` (see
:mod:`lp_edge.export.mesh.build`). Everything here works on one face of one frame; streams are the business of
:mod:`lp_edge.runtime.animator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.runner import Array, Runner, to_host
from lp_edge.runtime.compose import compose
from lp_edge.runtime.face_motion import Canonical, motion_from_points, points_from_motion
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions

__all__ = ["MeshFamily", "Portrait"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Extent of the crop around the mesh, in face sizes: room for hair, neck and the motion's fade-out.
_SIDE, _ABOVE, _BELOW = 0.60, 0.62, 0.50
# Crop sides are multiples of this, so that a tracked source clip does not show a new shape every frame.
_STEP = 32


@dataclass(frozen=True)
class Portrait:
    """A face of a source frame, prepared for rendering.

    Attributes:
        frame: uint8 ``[H, W, 3]`` RGB, the whole source frame.
        rect: x0, y0, x1, y1 of the crop in the frame, whole pixels.
        image: uint8 ``[1, h, w, 3]``, the crop, at most ``AnimateOptions.size`` on its longer side.
        kp_source: float32 ``[478, 3]``, mesh points in crop pixels.
        motion: the source's own motion, in frame pixels.
    """

    frame: U8
    rect: tuple[int, int, int, int]
    image: U8
    kp_source: F32
    motion: Motion


def _crop_rect(points: F32, height: int, width: int) -> tuple[int, int, int, int]:
    """Rectangle around a face, inside the frame, sides rounded up to :data:`_STEP` where the frame has room."""
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    size = float((high - low).max())
    centre = 0.5 * (low + high)
    reach = max(float(high[0] - low[0]), 0.8 * size) / 2 + _SIDE * size
    wanted = (centre[0] - reach, low[1] - _ABOVE * size, centre[0] + reach, high[1] + _BELOW * size)

    def side(a: float, b: float, limit: int) -> tuple[int, int]:
        length = min(-(-round(b - a) // _STEP) * _STEP, limit)
        start = round((a + b - length) / 2)
        # a rectangle that leaves the frame is cut, not moved: the motion's fade-out stays centred
        return max(start, 0), min(start + length, limit)

    x0, x1 = side(wanted[0], wanted[2], width)
    y0, y1 = side(wanted[1], wanted[3], height)
    return x0, y0, x1, y1


def _to_crop(points: F32, rect: tuple[int, int, int, int], shape: tuple[int, ...]) -> F32:
    """Frame pixels → pixels of a crop of ``shape`` (height, width, …) that shows ``rect``."""
    x0, y0, x1, y1 = rect
    sx, sy = shape[1] / (x1 - x0), shape[0] / (y1 - y0)
    out = np.array(points, np.float32)
    # pixel centres are whole numbers: the corner of pixel 0 lies at -0.5
    out[:, 0] = (out[:, 0] - x0 + 0.5) * sx - 0.5
    out[:, 1] = (out[:, 1] - y0 + 0.5) * sy - 0.5
    out[:, 2] *= 0.5 * (sx + sy)
    return out


class MeshFamily:
    """Prepares sources, reads motion and renders for the ``mesh`` family.

    Args:
        warp: runner of the ``warp_decode`` graph: ``image`` u8 [1, h, w, 3], ``kp_source`` and ``kp_driving`` f32 [N, 478, 3] →
            ``image`` u8 [N, h, w, 3].
        canonical: canonical face, expression basis and rigid weights of the bundle.
    """

    name = "mesh"

    def __init__(self, warp: Runner, canonical: Canonical) -> None:
        self._warp = warp
        self.canonical = canonical
        # once, not per frame
        self._points = np.asarray(canonical.points, np.float64)
        self._basis = np.asarray(canonical.basis, np.float64)

    def prepare(self, frame: U8, points: F32, options: AnimateOptions) -> Portrait:
        """Cut the crop of one face and read its motion.

        Args:
            frame: uint8 ``[H, W, 3]`` RGB.
            points: float32 ``[478, 3]`` mesh in frame pixels.
        """
        height, width = frame.shape[:2]
        rect = _crop_rect(points, height, width)
        x0, y0, x1, y1 = rect
        crop: U8 = np.ascontiguousarray(frame[y0:y1, x0:x1])
        shrink = options.size / max(x1 - x0, y1 - y0)
        if shrink < 1.0:
            size = (round((x1 - x0) * shrink), round((y1 - y0) * shrink))
            crop = np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_AREA), np.uint8)
        kp_source = _to_crop(points, rect, crop.shape)
        return Portrait(frame, rect, crop[None], kp_source, self.motion_of(points))

    def motion_of(self, points: F32) -> Motion:
        """Motion of mesh points ``[478, 3]`` in frame pixels."""
        return motion_from_points(points, self.canonical)

    def picture_neutral(self, motion: Motion) -> Motion:
        """What "no motion" means for a driver that is a single picture: the same face, frontal and without expression."""
        basis = self._basis
        own = np.asarray(motion.expression, np.float64)
        expression = np.tensordot(np.tensordot(basis, own, axes=([1, 2], [0, 1])), basis, axes=(0, 0))
        rest = self.motion_of(np.asarray(self.canonical.points, np.float32))
        return Motion(
            rotation=np.eye(3, dtype=np.float32),
            translation=motion.translation,
            scale=motion.scale,
            expression=(own - expression).astype(np.float32),
            eye_ratio=rest.eye_ratio,
            lip_ratio=rest.lip_ratio,
        )

    def keypoints(self, portrait: Portrait, driving: Motion, neutral: Motion, options: AnimateOptions) -> F32:
        """Driving keypoints ``[478, 3]`` in crop pixels for one frame of motion."""
        motion = compose(
            portrait.motion,
            driving,
            neutral,
            self._points,
            options,
            basis=self._basis,
        )
        return _to_crop(points_from_motion(motion, self.canonical), portrait.rect, portrait.image.shape[1:])

    def render(self, portrait: Portrait, kp_driving: Sequence[F32]) -> U8:
        """Animated crops uint8 ``[N, h, w, 3]`` for N sets of driving keypoints."""
        kp = np.stack(list(kp_driving)).astype(np.float32)
        feeds: dict[str, Array] = {
            names.SOURCE_IMAGE: portrait.image,
            names.KP_SOURCE: np.repeat(portrait.kp_source[None], len(kp), axis=0),
            names.KP_DRIVING: kp,
        }
        return to_host(self._warp.infer(feeds, [names.IMAGE])[names.IMAGE])
