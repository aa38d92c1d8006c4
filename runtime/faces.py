"""Faces in pictures: detection, level crops, mesh points.

Coordinates are pixels of the frame, x right, y down, pixel centres at integers. A face is *level* when the line through
both eyes is horizontal. The mesh network sees level square crops whose side is 1.5 times the larger side of the face's
bounding box, with the middle of that box in their middle; :func:`crop_from_points` makes such a crop from mesh points,
:func:`crop_from_box` estimates it from a detection.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.runner import Runner
from lp_edge.errors import ConfigError, EngineError, NoFaceError, TensorError
from lp_edge.runtime import topology

__all__ = [
    "CROP_FACTOR",
    "CropTransform",
    "DetectorConfig",
    "Face",
    "FaceBox",
    "FaceDetector",
    "FaceMeshNet",
    "FaceState",
    "box_of_points",
    "check_frame",
    "confirm_faces",
    "crop_from_box",
    "crop_from_points",
    "faces_policy",
    "iou_matrix",
    "largest",
    "left_to_right",
    "locate_faces",
    "mesh_of_boxes",
    "no_face_error",
    "non_maximum_suppression",
    "select_faces",
]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
FaceState = Literal["tracked", "reacquired", "lost"]

CROP_FACTOR = 1.5
"""Side of a mesh crop over the larger side of the level bounding box of all mesh points."""

_STRIDE = 32


@dataclass(frozen=True)
class FaceBox:
    """One detection.

    Attributes:
        box: float32 ``[4]``, x0, y0, x1, y1 in frame px, tight around the mesh (forehead top to chin); may leave the frame.
        score: 0 to 1.
        points: float32 ``[5, 2]`` frame px: eye, eye, nose tip, mouth corner, mouth corner; left before right as
            seen when the face is turned upright.
    """

    box: F32
    score: float
    points: F32


@dataclass(frozen=True)
class Face:
    """A face with mesh points.

    Attributes:
        id: number that the face keeps while it is tracked; 0 for a single picture's first face.
        points: float32 ``[478, 3]``: x, y in frame px, z in the same unit, smaller = nearer. The last known ones
            when ``state`` is ``lost``.
        score: the mesh network's confidence that the crop held a face, 0 to 1.
        box: float32 ``[4]``, x0, y0, x1, y1 tight around ``points``.
        state: ``tracked``: found from the frame before, or new; ``reacquired``: found by the detector after a failure of
            tracking, perhaps in this very frame; ``lost``: not in this frame.
        age: frames since the face was last detected (0 = in this frame).
    """

    id: int
    points: F32
    score: float
    box: F32
    state: FaceState = "tracked"
    age: int = 0

    @property
    def visible(self) -> bool:
        """Whether the points belong to this frame."""
        return self.state != "lost"

    @property
    def size(self) -> float:
        """Larger side of the box, px."""
        return float(max(self.box[2] - self.box[0], self.box[3] - self.box[1]))


# --- boxes -----------------------------------------------------------------------------------------------------------


def box_of_points(points: npt.ArrayLike) -> F32:
    """Tight boxes float32 ``[..., 4]`` (x0, y0, x1, y1) around points ``[..., K, >= 2]``."""
    xy = np.asarray(points, np.float32)[..., :2]
    return np.concatenate([xy.min(-2), xy.max(-2)], axis=-1)


def _overlaps(boxes: npt.ArrayLike, others: npt.ArrayLike) -> tuple[F32, F32, F32]:
    """Common areas ``[A, B]`` and the areas ``[A, 1]`` and ``[1, B]``."""
    a = np.asarray(boxes, np.float32).reshape(-1, 1, 4)
    b = np.asarray(others, np.float32).reshape(1, -1, 4)
    common = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(
        -1
    )
    area_a, area_b = (np.clip(box[..., 2:] - box[..., :2], 0, None).prod(-1) for box in (a, b))
    return common, area_a, area_b


def iou_matrix(boxes: npt.ArrayLike, others: npt.ArrayLike) -> F32:
    """Intersection over union of every pair of boxes.

    Args:
        boxes: ``[A, 4]`` x0, y0, x1, y1.
        others: ``[B, 4]``.

    Returns:
        float32 ``[A, B]`` in 0 to 1; boxes without area give 0.
    """
    common, area_a, area_b = _overlaps(boxes, others)
    return np.asarray(common / np.maximum(area_a + area_b - common, 1e-9), np.float32)


def _nesting(boxes: npt.ArrayLike, others: npt.ArrayLike) -> F32:
    """Intersection over the smaller box of every pair: 1 when one lies in the other."""
    common, area_a, area_b = _overlaps(boxes, others)
    return np.asarray(common / np.maximum(np.minimum(area_a, area_b), 1e-9), np.float32)


def non_maximum_suppression(
    boxes: npt.ArrayLike,
    scores: npt.ArrayLike,
    iou: float,
    overlap: Callable[[npt.ArrayLike, npt.ArrayLike], F32] = iou_matrix,
) -> list[int]:
    """Greedy non-maximum suppression.

    Args:
        boxes: ``[M, 4]`` x0, y0, x1, y1.
        scores: ``[M]``.
        iou: a box goes when it overlaps a better one by more than this.
        overlap: how overlap is measured.

    Returns:
        Indices of the boxes that stay, best score first.
    """
    b = np.asarray(boxes, np.float32).reshape(-1, 4)
    order = np.argsort(-np.asarray(scores, np.float32).reshape(-1), kind="stable")
    kept: list[int] = []
    while len(order):
        best = int(order[0])
        kept.append(best)
        order = order[1:]
        order = order[overlap(b[best], b[order])[0] <= iou]
    return kept


# --- crops -----------------------------------------------------------------------------------------------------------


_HALVE_FROM = 1.875
"""Reduction from which a crop is halved before the bilinear sampling, which reads only 2 x 2 pixels."""


@dataclass(frozen=True)
class CropTransform:
    """A level square crop of a frame: a similarity between frame and crop pixels.

    Attributes:
        centre: x, y of the crop's middle in frame px; it lands on (size / 2, size / 2).
        side: side of the crop in frame px.
        roll: angle of the crop in the frame in radians, clockwise as seen.
        size: side of the crop in crop px.
    """

    centre: tuple[float, float]
    side: float
    roll: float
    size: int

    def __post_init__(self) -> None:
        if (
            not all(map(math.isfinite, (*self.centre, self.side, self.roll)))
            or self.side <= 0
            or self.size < 1
        ):
            raise ConfigError(
                f"a crop with centre {self.centre}, side {self.side}, roll {self.roll}, size {self.size}",
                "expected finite numbers, a side above 0 and at least one pixel",
                "check the points that the crop was made from",
            )

    @property
    def scale(self) -> float:
        """Crop px per frame px."""
        return self.size / self.side

    @property
    def matrix(self) -> F64:
        """float64 ``[2, 3]``: crop = matrix @ (x, y, 1) of the frame, as ``cv2.warpAffine`` takes it."""
        c, s = math.cos(self.roll) * self.scale, math.sin(self.roll) * self.scale
        x, y = self.centre
        return np.array([[c, s, self.size / 2 - c * x - s * y], [-s, c, self.size / 2 + s * x - c * y]])

    def to_crop(self, points: npt.ArrayLike) -> F32:
        """Points ``[..., 2 or 3]`` of the frame in crop px (z by the same scale), float32 of the same shape."""
        p, m = np.asarray(points, np.float64), self.matrix
        out = p[..., :2] @ m[:, :2].T + m[:, 2]
        return np.concatenate([out, p[..., 2:] * self.scale], axis=-1).astype(np.float32)

    def to_frame(self, points: npt.ArrayLike) -> F32:
        """Points ``[..., 2 or 3]`` of the crop in frame px (z by the same scale); the inverse of :meth:`to_crop`."""
        p, m = np.asarray(points, np.float64), self.matrix
        # The inverse of a rotation is its transpose, and rows times a matrix transpose once more.
        out = (p[..., :2] - m[:, 2]) @ (m[:, :2] / self.scale**2)
        return np.concatenate([out, p[..., 2:] / self.scale], axis=-1).astype(np.float32)

    def corners(self) -> F32:
        """float32 ``[4, 2]``: the crop's corners in frame px, clockwise from the top left one."""
        e = self.size
        return self.to_frame([[0, 0], [e, 0], [e, e], [0, e]])

    def apply(self, rgb: U8) -> U8:
        """Cut the crop out of a frame.

        Args:
            rgb: uint8 ``[H, W, C]``.

        Returns:
            uint8 ``[size, size, C]``; bilinear, black beyond the frame. When the crop shrinks its part of the frame,
            that part is halved by averaging first, until less than a factor of 1.9 remains, so that fine structure
            does not alias.
        """
        matrix, halvings = self.matrix, math.floor(math.log2(max(1.0, 2 / _HALVE_FROM / self.scale)))
        if halvings:
            rgb, matrix = self._reduced(rgb, matrix, halvings)
        crop = cv2.warpAffine(rgb, matrix, (self.size, self.size), flags=cv2.INTER_LINEAR)
        return np.asarray(crop, np.uint8)

    def _reduced(self, rgb: U8, matrix: F64, halvings: int) -> tuple[U8, F64]:
        """The needed part of the frame with blocks of ``2 ** halvings`` squared pixels averaged; the matrix from it."""
        block = 2**halvings
        corners = self.corners()
        height, width = rgb.shape[:2]
        x0, y0 = (max(0, math.floor(float(v)) - 2 * block) for v in corners.min(0))
        x1, y1 = (math.ceil(float(v)) + 2 * block for v in corners.max(0))
        x1, y1 = x1 + (x0 - x1) % block, y1 + (y0 - y1) % block
        part = rgb[y0 : min(y1, height), x0 : min(x1, width)]
        h, w = part.shape[:2]
        if not h or not w:
            return rgb, matrix
        if h % block or w % block:
            part = np.asarray(
                cv2.copyMakeBorder(part, 0, -h % block, 0, -w % block, cv2.BORDER_REPLICATE), np.uint8
            )
        for _ in range(halvings):  # OpenCV has a fast path for 2, not for 3, 4, …
            h, w = part.shape[0] // 2, part.shape[1] // 2
            part = np.asarray(cv2.resize(part, (w, h), interpolation=cv2.INTER_AREA), np.uint8)
        # Small pixel i averages the block whose middle is x0 + block * i + (block - 1) / 2.
        moved = matrix.copy()
        moved[:, 2] += matrix[:, :2] @ (np.array([x0, y0]) + (block - 1) / 2)
        moved[:, :2] *= block
        return part, moved


def crop_from_points(points: npt.ArrayLike, size: int, factor: float = CROP_FACTOR) -> CropTransform:
    """The level crop around mesh points.

    Args:
        points: ``[478, >= 2]`` frame px.
        size: side of the crop in crop px.
        factor: side over the larger side of the level bounding box of all points.

    Returns:
        The transform; its roll is :func:`lp_edge.runtime.topology.eye_roll`.

    Raises:
        ConfigError: the points are not finite or all alike.
    """
    xy = np.asarray(points, np.float64)[:, :2]
    roll = float(topology.eye_roll(xy))
    c, s = math.cos(roll), math.sin(roll)
    turn = np.array([[c, -s], [s, c]])
    level = xy @ turn
    low, high = level.min(0), level.max(0)
    x, y = turn @ ((low + high) / 2)
    return CropTransform((float(x), float(y)), factor * float((high - low).max()), roll, size)


_ECCENTRICITY = 0.16
_OFF_CENTRE = 0.066
_OVERSIZE = 0.06
"""Of a typical face (mean of the training labels turned by 0 to 90 degrees): (b² - a²) / (a² + b²); how far the middle of
its upright box at 45° lies above the level one, and by how much :func:`crop_from_box` would overrate its size there."""


def crop_from_box(face: FaceBox, size: int, factor: float = CROP_FACTOR) -> CropTransform:
    """An estimate of the level crop from a detection, good enough for a first mesh pass.

    The roll is that of the eye line (twice), the mouth line and the perpendicular of the line between them, added up
    as vectors. A face is taken for an ellipse with semi-axes a, b: turned by φ, its upright box has half sides
    ``w² = a² cos²φ + b² sin²φ`` and ``h² = a² sin²φ + b² cos²φ``, so ``w² + h² = a² + b²`` at every angle; the ratio a : b
    follows from ``w² - h² = (a² - b²) cos 2φ`` near 0° and 90° and is a typical one near 45°. What a face's
    narrower chin adds to that is corrected in proportion to ``|sin 2φ|``. On labelled faces turned by 0 to 90° the
    estimate is off by 0.8° of roll, 2 % of the face's size in place and 2 % in size (means).

    Args:
        face: the detection.
        size: side of the crop in crop px.
        factor: side over the larger side of the level face box.

    Raises:
        ConfigError: box or points are not finite, or the box has no area.
    """
    p = np.asarray(face.points, np.float64)
    eyes, mouth = p[1] - p[0], p[4] - p[3]
    down = (p[3] + p[4] - p[0] - p[1]) / 2
    line = 2 * eyes + mouth + np.array([down[1], -down[0]])
    roll = math.atan2(float(line[1]), float(line[0]))
    x0, y0, x1, y1 = (float(v) for v in face.box)
    w2, h2 = ((x1 - x0) / 2) ** 2, ((y1 - y0) / 2) ** 2
    total, turn, tilt = w2 + h2, math.cos(2 * roll), abs(math.sin(2 * roll))
    difference = (
        w2 - h2
    ) * turn - _ECCENTRICITY * total * tilt * tilt  # (w² - h²) / cos 2φ where |cos 2φ| = 1
    longer = 2 * math.sqrt((total + abs(difference)) / 2) / (1 + _OVERSIZE * tilt)
    shift = _OFF_CENTRE * tilt * longer
    centre = ((x0 + x1) / 2 - shift * math.sin(roll), (y0 + y1) / 2 + shift * math.cos(roll))
    return CropTransform(centre, factor * longer, roll, size)


# --- detection -------------------------------------------------------------------------------------------------------


def check_frame(rgb: U8) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise TensorError(
            f"a frame of dtype {rgb.dtype} and shape {rgb.shape}",
            "expected uint8 [H, W, 3] RGB",
            "convert the picture first (lp_edge.runtime.image.read_image does)",
        )


@dataclass(frozen=True)
class DetectorConfig:
    """How the detector is used.

    Attributes:
        longest: longer side of the network's input, px; larger pictures are reduced to it. A multiple of 32.
        enlarged: smaller pictures are enlarged until their longer side has this many px.
        score: smallest score that counts as a face, 0 to 1.
        weak: smallest score of a candidate that only the mesh network can make a face, 0 to ``score``.
        iou: a box goes when it overlaps a better one by more than this.
        smallest: smallest larger side of a box in px of the network's input.
        max_tiles: most tiles that :meth:`FaceDetector.stages` looks at in a large picture.

    Raises:
        ConfigError: a value is out of range.
    """

    longest: int = 640
    enlarged: int = 320
    score: float = 0.5
    weak: float = 0.15
    iou: float = 0.45
    smallest: float = 16.0
    max_tiles: int = 40

    def __post_init__(self) -> None:
        if self.longest < 64 or self.longest % _STRIDE or not 1 <= self.enlarged <= self.longest:
            raise ConfigError(
                f"longest {self.longest}, enlarged {self.enlarged}",
                "expected a multiple of 32 from 64 on, and enlarged from 1 to longest",
                "use 640 and 320",
            )
        if not (0 < self.weak <= self.score < 1 and 0 < self.iou <= 1):
            raise ConfigError(
                f"score {self.score}, weak {self.weak}, iou {self.iou}",
                "expected 0 < weak <= score < 1 and iou above 0 up to 1",
                "use 0.5, 0.15 and 0.45",
            )


class FaceDetector:
    """Finds faces with the ``face_detector`` network.

    The network takes ``image`` uint8 ``[1, H, W, 3]`` RGB (H, W multiples of 32) and gives ``boxes`` ``[1, M, 4]``,
    ``scores`` ``[1, M]``, ``points`` ``[1, M, 5, 2]`` in input px.

    Args:
        runner: the network; stays the caller's to close.
        config: thresholds and sizes.

    Raises:
        EngineError: the runner is not such a network.
    """

    def __init__(self, runner: Runner, config: DetectorConfig | None = None) -> None:
        _check_runner(runner, (names.IMAGE,), (names.BOXES, names.SCORES, names.POINTS), "face detector")
        self.runner, self.config = runner, config or DetectorConfig()

    def detect(self, rgb: U8, score: float | None = None) -> list[FaceBox]:
        """Faces of one frame by one pass of the network over the whole frame.

        The longer side is reduced to ``longest`` (640) px or enlarged to ``enlarged`` px, the rest up to a multiple
        of 32 is black.

        Args:
            rgb: uint8 ``[H, W, 3]``.
            score: smallest score; ``None`` = that of the configuration.

        Returns:
            Detections in frame px, best score first.

        Raises:
            TensorError: ``rgb`` is no such array.
            EngineError: the network failed.
        """
        check_frame(rgb)
        height, width = rgb.shape[:2]
        longer, config = max(height, width), self.config
        target = min(max(longer, config.enlarged), config.longest)
        size = (max(1, round(width * target / longer)), max(1, round(height * target / longer)))
        if size != (width, height):
            mode = cv2.INTER_AREA if target < longer else cv2.INTER_LINEAR
            image = np.asarray(cv2.resize(rgb, size, interpolation=mode), np.uint8)
        else:
            image = rgb
        padded = tuple(-(-side // _STRIDE) * _STRIDE for side in image.shape[:2])
        canvas = np.zeros((1, *padded, 3), np.uint8)
        canvas[0, : size[1], : size[0]] = image
        found = self.runner.infer({names.IMAGE: canvas}, [names.BOXES, names.SCORES, names.POINTS])
        boxes, scores, points = (
            np.asarray(found[name], np.float32)[0] for name in (names.BOXES, names.SCORES, names.POINTS)
        )
        sides = (boxes[:, 2:] - boxes[:, :2]).max(-1, initial=0.0)
        sure = (scores >= (config.score if score is None else score)) & (sides >= config.smallest)
        sure &= np.isfinite(boxes).all(-1) & np.isfinite(points).all((-1, -2))
        boxes, scores, points = boxes[sure], scores[sure], points[sure]
        factor = np.array([width / size[0], height / size[1]], np.float32)
        kept = non_maximum_suppression(boxes, scores, config.iou)
        return [
            FaceBox(
                ((boxes[i].reshape(2, 2) + 0.5) * factor - 0.5).reshape(4),
                float(scores[i]),
                (points[i] + 0.5) * factor - 0.5,
            )
            for i in kept
        ]

    def stages(self, rgb: U8) -> Iterator[list[FaceBox]]:
        """More and more thorough searches of one frame, each made when it is asked for.

        1. The whole frame, as :meth:`detect` (one pass of the network).
        2. The frame in the middle of a black canvas 1.6 times as large: faces that fill or exceed it (one pass).
        3. Frames larger than ``longest``: overlapping tiles of ``longest`` px, first of the frame at half
           the reduction, and so on up to its own resolution, as long as ``max_tiles`` lasts (one pass a tile).
        4. The frame turned by 90°, -90° and 180° (three passes).

        Args:
            rgb: uint8 ``[H, W, 3]``.

        Yields:
            Detections in frame px from score ``weak`` on, best score first; perhaps none.
        """
        yield self._weak(rgb)
        yield self._detect_padded(rgb)
        yield from self._detect_tiles(rgb)
        yield self._merged([box for turns in (1, 3, 2) for box in self._detect_turned(rgb, turns)])

    def _weak(self, rgb: U8) -> list[FaceBox]:
        return self.detect(rgb, self.config.weak)

    def _merged(self, found: Sequence[FaceBox]) -> list[FaceBox]:
        if not found:
            return []
        boxes, scores = np.stack([f.box for f in found]), [f.score for f in found]
        return [found[i] for i in non_maximum_suppression(boxes, scores, self.config.iou)]

    def _detect_padded(self, rgb: U8) -> list[FaceBox]:
        height, width = rgb.shape[:2]
        scale = min(
            1.0, self.config.longest / 1.6 / max(height, width)
        )  # large frames are reduced before padding
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = (
            rgb if scale == 1.0 else np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
        )
        x, y = round(0.3 * size[0]), round(0.3 * size[1])
        canvas = np.asarray(
            cv2.copyMakeBorder(small, y, y, x, x, cv2.BORDER_CONSTANT, value=(0, 0, 0)), np.uint8
        )
        factor = np.array([width / size[0], height / size[1]], np.float32)
        moved = np.array([x, y], np.float32)
        return [
            FaceBox(
                ((b.box.reshape(2, 2) - moved + 0.5) * factor - 0.5).reshape(4),
                b.score,
                (b.points - moved + 0.5) * factor - 0.5,
            )
            for b in self._weak(canvas)
        ]

    def _detect_turned(self, rgb: U8, turns: int) -> list[FaceBox]:
        """Detections of the frame turned counter-clockwise by ``turns`` quarters, in px of the frame as it stands."""
        height, width = rgb.shape[:2]

        def back(p: F32) -> F32:
            x, y = p[..., 0], p[..., 1]
            if turns == 1:
                x, y = width - 1 - y, x
            elif turns == 2:
                x, y = width - 1 - x, height - 1 - y
            else:
                x, y = y, height - 1 - x
            return np.asarray(np.stack([x, y], -1), np.float32)

        out = []
        for b in self._weak(np.ascontiguousarray(np.rot90(rgb, turns))):
            corners = back(b.box.reshape(2, 2))
            out.append(FaceBox(np.concatenate([corners.min(0), corners.max(0)]), b.score, back(b.points)))
        return out

    def _detect_tiles(self, rgb: U8) -> Iterator[list[FaceBox]]:
        height, width = rgb.shape[:2]
        side, spent = self.config.longest, 0
        scale = side / max(height, width)
        while scale < 1.0:
            scale = min(1.0, 2 * scale)
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = (
                rgb
                if scale == 1.0
                else np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
            )
            tiles = [(x, y) for y in _tile_starts(size[1], side) for x in _tile_starts(size[0], side)]
            spent += len(tiles)
            if spent > self.config.max_tiles:
                return
            factor = np.array([width / size[0], height / size[1]], np.float32)
            found = []
            for x, y in tiles:
                moved = np.array([x, y], np.float32)
                for b in self._weak(np.ascontiguousarray(image[y : y + side, x : x + side])):
                    box = ((b.box.reshape(2, 2) + moved + 0.5) * factor - 0.5).reshape(4)
                    found.append(FaceBox(box, b.score, (b.points + moved + 0.5) * factor - 0.5))
            yield self._merged(found)


def _tile_starts(length: int, side: int) -> list[int]:
    """Starts of tiles of ``side`` that cover ``length``, neighbours overlapping by a quarter or more."""
    if length <= side:
        return [0]
    count = math.ceil((length - side) / (0.75 * side)) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _check_runner(runner: Runner, inputs: tuple[str, ...], outputs: tuple[str, ...], what: str) -> None:
    missing = [n for n in inputs if n not in runner.inputs] + [n for n in outputs if n not in runner.outputs]
    if missing:
        raise EngineError(
            f"the {what} network has no tensor {', '.join(missing)}",
            f"expected inputs {', '.join(inputs)} and outputs {', '.join(outputs)}",
            "use the network of an lp-edge bundle",
        )


# --- mesh ------------------------------------------------------------------------------------------------------------


class FaceMeshNet:
    """Mesh points of level crops by the ``face_mesh`` network.

    The network takes ``image`` uint8 ``[N, S, S, 3]`` RGB and gives ``points`` ``[N, 478, 3]`` in crop px and
    ``score`` ``[N, 1]``.

    Args:
        runner: the network; stays the caller's to close.
        max_batch: most crops in one call of the network.

    Attributes:
        size: the crop's side S in px, as the network states it.

    Raises:
        EngineError: the runner is not such a network.
    """

    def __init__(self, runner: Runner, max_batch: int = 8) -> None:
        _check_runner(runner, (names.IMAGE,), (names.POINTS, names.SCORE), "face mesh")
        shape = runner.inputs[names.IMAGE].shape
        if len(shape) != 4 or not isinstance(shape[1], int) or shape[1] != shape[2]:
            raise EngineError(
                f"the face mesh network takes {runner.inputs[names.IMAGE]}",
                "expected image uint8 [N, S, S, 3] with a fixed S",
                "use the network of an lp-edge bundle",
            )
        self.runner, self.size = runner, shape[1]
        most = min(max_batch, runner.max_batch or max_batch)
        self._batch = shape[0] if isinstance(shape[0], int) else max(1, most)

    def run(self, rgb: U8, transforms: Sequence[CropTransform]) -> tuple[F32, F32]:
        """Mesh points of several crops of one frame.

        Args:
            rgb: uint8 ``[H, W, 3]``, the frame.
            transforms: crops of it with ``size`` equal to that of the network.

        Returns:
            points float32 ``[n, 478, 3]`` in frame px (z in the same unit) and scores float32 ``[n]``, 0 to 1.

        Raises:
            TensorError: ``rgb`` is no frame, or a crop has the wrong size.
            EngineError: the network failed or gave no finite numbers.
        """
        check_frame(rgb)
        for transform in transforms:
            if transform.size != self.size:
                raise TensorError(
                    f"a crop of {transform.size} px",
                    f"expected {self.size} px",
                    "make crops with size=net.size",
                )
        points = np.empty((len(transforms), topology.NUM_POINTS, 3), np.float32)
        scores = np.empty(len(transforms), np.float32)
        for first in range(0, len(transforms), self._batch):
            part = transforms[first : first + self._batch]
            crops = np.zeros((self._batch if self._fixed else len(part), self.size, self.size, 3), np.uint8)
            for crop, transform in zip(crops, part, strict=False):
                crop[:] = transform.apply(rgb)
            found = self.runner.infer({names.IMAGE: crops}, [names.POINTS, names.SCORE])
            p, s = np.asarray(found[names.POINTS]), np.asarray(found[names.SCORE])
            for i, transform in enumerate(part):
                points[first + i] = transform.to_frame(p[i])
                scores[first + i] = s[i].reshape(-1)[0]
        if not (np.isfinite(points).all() and np.isfinite(scores).all()):
            raise EngineError(
                "the face mesh network gave numbers that are not finite",
                "expected finite points and scores",
                "use another backend or precision, or restore the bundle",
            )
        return points, scores

    @property
    def _fixed(self) -> bool:
        return isinstance(self.runner.inputs[names.IMAGE].shape[0], int)


def _spread(points: F32) -> float:
    return float(np.ptp(points[:, :2], axis=0).max())


def mesh_of_boxes(rgb: U8, boxes: Sequence[FaceBox], mesh: FaceMeshNet, passes: int = 2) -> tuple[F32, F32]:
    """Mesh points of detected faces: a pass on the crop from the box, then on the crop from the points found.

    Args:
        rgb: uint8 ``[H, W, 3]``.
        boxes: detections in frame px.
        mesh: the network.
        passes: how often it runs, 1 or more.

    Returns:
        points float32 ``[n, 478, 3]`` in frame px, scores float32 ``[n]`` of the last pass.
    """
    points, scores = mesh.run(rgb, [crop_from_box(b, mesh.size) for b in boxes])
    for _ in range(passes - 1):
        # Points in a heap (an empty crop) give no crop: those keep a score of 0.
        sound = [i for i in range(len(points)) if _spread(points[i]) >= 4.0]
        again, score = mesh.run(rgb, [crop_from_points(points[i], mesh.size) for i in sound])
        scores[:] = 0.0
        points[sound], scores[sound] = again, score
    return points, scores


def confirm_faces(
    rgb: U8, boxes: Sequence[FaceBox], mesh: FaceMeshNet, *, score: float = 0.8
) -> list[tuple[Face, float]]:
    """Detections that the mesh network confirms in two passes.

    Args:
        rgb: uint8 ``[H, W, 3]``.
        boxes: detections in frame px.
        mesh: the network.
        score: the mesh network's smallest score, 0 to 1.

    Returns:
        Faces (id 0) with their rank, the detector's score times the 8th power of that of the mesh network (which tells
        faces better), best first; of meshes that share more than 60 % of the smaller one's box the best stays.
    """
    points, scores = mesh_of_boxes(rgb, boxes, mesh)
    good = [i for i in range(len(boxes)) if scores[i] >= score]
    if not good:
        return []
    outlines = box_of_points(points[good])
    ranks = [boxes[i].score * float(scores[i]) ** 8 for i in good]
    kept = non_maximum_suppression(outlines, ranks, 0.6, _nesting)
    return [(Face(0, points[good[k]], float(scores[good[k]]), outlines[k]), ranks[k]) for k in kept]


def locate_faces(
    rgb: U8,
    detector: FaceDetector,
    mesh: FaceMeshNet,
    *,
    score: float = 0.8,
    certain: float = 0.95,
    stages: int | None = 1,
    limit: int = 32,
) -> list[Face]:
    """Faces of one frame: detection, two mesh passes, and the mesh network's word on whether it is a face.

    Detections from the detector's ``score`` on are faces where the mesh network gives them ``score`` (``certain`` beyond
    the first two stages). The first stage with such faces ends the search. When no stage has any, the best of the
    detections from ``weak`` on to which the mesh network gives ``certain`` is the only face; one found in several
    stages counts more.

    Args:
        rgb: uint8 ``[H, W, 3]``.
        detector, mesh: the networks.
        score, certain: scores of the mesh network, 0 to 1.
        stages: how many of :meth:`FaceDetector.stages` may be tried until something is found; ``None`` = all,
            for single pictures and the first frame of a clip.
        limit: how many detections of a stage are tried at most, largest first.

    Returns:
        Faces with ids 0, 1, …, largest first.
    """
    doubtful: list[tuple[Face, float]] = []
    for number, boxes in enumerate(itertools.islice(detector.stages(rgb), stages)):
        firm = sorted((b for b in boxes if b.score >= detector.config.score), key=lambda b: -_larger_side(b))
        found = confirm_faces(rgb, firm[:limit], mesh, score=score if number < 2 else certain)
        if found:
            return [replace(face, id=i) for i, face in enumerate(largest([f for f, _ in found]))]
        weak = sorted((b for b in boxes if b.score < detector.config.score), key=lambda b: -b.score)
        doubtful += confirm_faces(rgb, weak[: min(limit, _WEAK)], mesh, score=certain)
    if not doubtful:
        return []
    # A face is found in more than one stage, what only looks like one seldom is: votes count.
    outlines, ranks = np.stack([f.box for f, _ in doubtful]), np.array([rank for _, rank in doubtful])
    votes = (iou_matrix(outlines, outlines) > 0.5) @ ranks
    return [doubtful[int(np.argmax(votes + 1e-3 * ranks))][0]]


def _larger_side(face: FaceBox) -> float:
    return float((face.box[2:] - face.box[:2]).max())


_WEAK = 8
"""How many detections below the threshold are tried per stage."""


def no_face_error(rgb: U8, *, what: str = "the picture") -> NoFaceError:
    """The error for a frame in which :func:`locate_faces` with all stages found nothing."""
    height, width = rgb.shape[:2]
    smallest = 40.0 * max(1.0, max(height, width) / 2560)  # up to about there tiles reach full resolution
    return NoFaceError(
        f"no face was found in {what} ({width} x {height} px), searched whole, padded, turned and in parts",
        f"expected a face of about {smallest:.0f} px or more, less than 45 degrees from upright, uncovered",
        "use a picture that shows the face larger, or crop it around the face",
    )


# --- choosing --------------------------------------------------------------------------------------------------------


def largest(faces: Sequence[Face]) -> list[Face]:
    """Faces by falling area of their boxes."""
    return sorted(faces, key=lambda f: -float((f.box[2] - f.box[0]) * (f.box[3] - f.box[1])))


def left_to_right(faces: Sequence[Face]) -> list[Face]:
    """Faces by the x of their boxes' middles, from image left to image right."""
    return sorted(faces, key=lambda f: float(f.box[0] + f.box[2]))


def faces_policy(policy: str) -> str | tuple[int, ...]:
    """``largest``, ``left-right``, or the indices of a policy such as ``0`` or ``2,0``; ``all`` is ``left-right``.

    Raises:
        ConfigError: none of these, or an index twice.
    """
    if policy in ("all", "left-right"):
        return "left-right"
    if policy == "largest":
        return policy
    parts = policy.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(p) for p in parts}) != len(parts):
        raise ConfigError(
            f"faces is {policy!r}",
            "expected largest, all, left-right, or indices from left to right such as 0 or 0,2, each once",
            "use largest",
        )
    return tuple(int(part) for part in parts)


def select_faces(faces: Sequence[Face], policy: str) -> list[Face]:
    """Faces by a policy.

    Args:
        faces: any faces.
        policy: ``all`` or ``left-right`` (all, from left to right), ``largest`` (one), or indices from left to right,
            such as ``0`` or ``2,0`` (in that order).

    Returns:
        The faces chosen; empty when ``faces`` is.

    Raises:
        ConfigError: the policy is unknown.
        NoFaceError: there are faces, but fewer than an index asks for.
    """
    wanted = faces_policy(policy)
    if not faces:
        return []
    if wanted == "largest":
        return largest(faces)[:1]
    ordered = left_to_right(faces)
    if isinstance(wanted, str):
        return ordered
    for index in wanted:
        if index >= len(faces):
            raise NoFaceError(
                f"face {index} was asked for, {len(faces)} found",
                f"expected an index from 0 to {len(faces) - 1}, counted from left to right",
                "choose a smaller index",
            )
    return [ordered[index] for index in wanted]
