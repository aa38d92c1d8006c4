"""Adapter of the built-in ``mesh`` family: mesh points are the keypoints, the warp has a closed form.

Expects a bundle with the network ``warp_decode`` and the table ``canonical`` (see
:mod:`lp_edge.export.mesh.build`). Drawing takes several frames of one face, all else one; streams are the business of
:mod:`lp_edge.runtime.animator`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.runner import Array, Runner
from lp_edge.errors import ConfigError
from lp_edge.runtime.compose import compose
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.face_motion import Canonical, motion_from_points, points_from_motion
from lp_edge.runtime.family import DriverKind, Family, Follower, Portrait
from lp_edge.runtime.mesh_edit import edit_mesh
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.pixels import Download, Pixels
from lp_edge.runtime.resample import resize_crop
from lp_edge.runtime.templates import MotionTemplate, load_template

__all__ = ["MeshFamily", "MeshFollower", "MeshPortrait"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Extent of the crop around the mesh, in face sizes: room for hair, neck and the motion's fade-out.
_SIDE, _ABOVE, _BELOW = 0.60, 0.62, 0.50
# Longer side of the animated crop where no size is asked for.
_SIZE = 640
# Crop sides are multiples of this, so that a tracked source clip does not show a new shape every frame.
_STEP = 32


@dataclass(frozen=True)
class MeshPortrait(Portrait):
    """A face of a source frame, prepared for rendering; its motion is in frame pixels.

    Attributes:
        rect: x0, y0, x1, y1 of the crop in the frame, whole pixels.
        image: uint8 ``[1, h, w, 3]``, the crop, at most ``AnimateOptions.size`` on its longer side; a picture's lies where the
            network reads it.
        kp_source: float32 ``[478, 3]``, mesh points in crop pixels.
    """

    rect: tuple[int, int, int, int]
    image: Array
    kp_source: F32


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


def _foreign(options: AnimateOptions) -> list[str]:
    """Options that were set although only the liveportrait family has a use for them."""
    default = AnimateOptions()
    changed = [name for name in ("crop", "driving_crop") if getattr(options, name) != getattr(default, name)]
    own, usual = options.liveportrait, default.liveportrait
    return changed + [f.name for f in fields(own) if getattr(own, f.name) != getattr(usual, f.name)]


class MeshFollower(Follower[MeshPortrait]):
    """Composes each frame on its own; there is nothing to remember or to plan."""

    def __init__(self, canonical: Canonical, options: AnimateOptions) -> None:
        self._canonical, self._options = canonical, options
        # once, not per frame
        self._points = np.asarray(canonical.points, np.float64)
        self._basis = np.asarray(canonical.basis, np.float64)

    def keypoints(
        self, index: int, portrait: MeshPortrait, driving: Motion, neutral: Motion, edits: Edits
    ) -> tuple[F32, F32]:
        """Source and driving keypoints ``[478, 3]`` in crop pixels."""
        motion = portrait.motion
        if driving is not motion:
            motion = compose(motion, driving, neutral, self._points, self._options, basis=self._basis)
        if edits:
            motion = edit_mesh(motion, edits, self._canonical, source=portrait.motion)
        points = points_from_motion(motion, self._canonical)
        return portrait.kp_source, _to_crop(points, portrait.rect, portrait.image.shape[1:])


class MeshFamily(Family[MeshPortrait]):
    """Prepares sources, reads motion and renders for the ``mesh`` family.

    Args:
        warp: runner of the ``warp_decode`` graph: ``image`` u8 [1, h, w, 3], ``kp_source`` and ``kp_driving`` f32 [N, 478, 3] →
            ``image`` u8 [N, h, w, 3].
        canonical: canonical face, expression basis and rigid weights of the bundle.
        pixels: pastes crops.
        template_map: the bundle's table ``liveportrait_map``, which lets LivePortrait's templates drive a mesh; None = none.
    """

    name = "mesh"
    mixes_portraits = False  # the graph takes one source image, and crops differ in size

    def __init__(
        self,
        warp: Runner,
        canonical: Canonical,
        pixels: Pixels,
        template_map: Mapping[str, npt.NDArray[np.generic]] | None = None,
    ) -> None:
        self._warp, self._pixels = warp, pixels
        self.backend, self.max_batch, self.resident = warp.backend, warp.max_batch, pixels.resident
        self.accelerated = warp.resident
        self.canonical, self._template_map = canonical, template_map

    def measure(self, frame: U8, points: F32, options: AnimateOptions, *, clip: bool) -> F32:
        """The mesh itself."""
        return points

    def motion_of_measure(self, measure: F32) -> Motion:
        """Motion of mesh points ``[478, 3]`` in frame pixels."""
        return motion_from_points(measure, self.canonical)

    def portrait(self, frame: U8, measure: F32, options: AnimateOptions, *, clip: bool) -> MeshPortrait:
        """Cut the crop of one face and read its motion."""
        height, width = frame.shape[:2]
        rect = _crop_rect(measure, height, width)
        x0, y0, x1, y1 = rect
        crop: U8 = np.ascontiguousarray(frame[y0:y1, x0:x1])
        shrink = (options.size or _SIZE) / max(x1 - x0, y1 - y0)
        if shrink < 1.0:
            size = (round((x1 - x0) * shrink), round((y1 - y0) * shrink))
            crop = np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_AREA), np.uint8)
        kp_source = _to_crop(measure, rect, crop.shape)
        place = self._pixels.rect_place(frame, rect)
        image: Array = crop[None] if clip else self._warp.upload(crop[None])
        return MeshPortrait(frame, self.motion_of_measure(measure), place, rect, image, kp_source)

    def read(self, rgb: U8, points: F32, options: AnimateOptions) -> Motion:
        """Motion of mesh points ``[478, 3]`` in frame pixels; pixels are not needed."""
        return motion_from_points(points, self.canonical)

    def motion(self, rgb: U8, reading: Motion, box: F32 | None, options: AnimateOptions) -> Motion:
        """What was read."""
        return reading

    def picture_neutral(self, motion: Motion) -> Motion:
        """What "no motion" means for a driver that is a single picture: the same face, frontal and without expression."""
        basis = np.asarray(self.canonical.basis, np.float64)
        own = np.asarray(motion.expression, np.float64)
        expression = np.tensordot(np.tensordot(basis, own, axes=([1, 2], [0, 1])), basis, axes=(0, 0))
        rest = motion_from_points(self.canonical.points, self.canonical)
        return Motion(
            rotation=np.eye(3, dtype=np.float32),
            translation=motion.translation,
            scale=motion.scale,
            expression=(own - expression).astype(np.float32),
            eye_ratio=rest.eye_ratio,
            lip_ratio=rest.lip_ratio,
        )

    def load_template(self, path: str | Path) -> MotionTemplate:
        """A template as mesh motion; LivePortrait's are converted."""
        return load_template(path, self.canonical, family=self.name, template_map=self._template_map)

    def follower(self, options: AnimateOptions, kind: DriverKind, *, source_clip: bool) -> MeshFollower:
        """A follower; refuses what only the networks of LivePortrait can do."""
        if changed := _foreign(options):
            raise ConfigError(
                f"{', '.join(changed)} set for the family mesh",
                "expected these only with the family liveportrait",
                "leave them out, or give a bundle of that family (--bundle)",
            )
        return MeshFollower(self.canonical, options)

    def render(
        self, portraits: Sequence[MeshPortrait], kp_source: Sequence[F32], kp_driving: Sequence[F32]
    ) -> Array:
        """Animated crops uint8 ``[N, h, w, 3]`` of one portrait."""
        feeds: dict[str, Array] = {
            names.SOURCE_IMAGE: portraits[0].image,
            names.KP_SOURCE: np.stack(list(kp_source)).astype(np.float32),
            names.KP_DRIVING: np.stack(list(kp_driving)).astype(np.float32),
        }
        return self._warp.infer(feeds, [names.IMAGE], keep=True)[names.IMAGE]

    def crop_size(self, options: AnimateOptions) -> int:
        """The size asked for, else 640."""
        return options.size or _SIZE

    def crops_alone(
        self, portrait: MeshPortrait, crops: Array, options: AnimateOptions
    ) -> list[Callable[[], U8]]:
        """The crops' rectangles made square by repeating their borders, at :meth:`crop_size`."""
        download, size = Download(crops), self.crop_size(options)

        def squared(row: int) -> U8:
            return _squared(download.row(row), size)

        return [partial(squared, row) for row in range(crops.shape[0])]

    def still_crop(self, portrait: MeshPortrait) -> Array:
        """The source's crop."""
        return portrait.image


def _squared(image: U8, size: int) -> U8:
    """A picture ``[h, w, 3]`` with its border repeated until it is square, at ``[size, size, 3]``."""
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = cv2.copyMakeBorder(
        image, top, side - height - top, left, side - width - left, cv2.BORDER_REPLICATE
    )
    return resize_crop(np.asarray(square, np.uint8), size)
