"""LivePortrait's own landmarks, from face models that the user supplies.

The reference finds faces with InsightFace's SCRFD detector (``det_10g.onnx``), places 106 points in the box
(``2d106det.onnx``) and from them 203 with its own ``landmark.onnx``. The last is part of the LivePortrait release (MIT); both
InsightFace models are for NON-COMMERCIAL research only, so nothing here downloads them or needs them.

* ``landmark.onnx`` alone: the crop that it sees is placed by our mesh (:func:`lp_edge.runtime.landmarks203.mesh_to_203`).
* all three: the reference's path. Our detector and mesh still say which face is meant.

Formulas: SCRFD decoding (``insightface/model_zoo/retinaface.py`` in the reference), 106 points (``landmark.py``), 203 points
(``utils/human_landmark_runner.py``). Tensors are told apart by their shapes, never by their position.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.runner import Runner, to_host
from lp_edge.errors import ConfigError, EngineError
from lp_edge.runtime.crop import CropOptions, cut, source_matrix, transform_points
from lp_edge.runtime.faces import box_of_points, iou_matrix, non_maximum_suppression
from lp_edge.runtime.landmarks203 import NUM_LANDMARKS, LandmarkSource, mesh_to_203

__all__ = [
    "FILES",
    "InsightFaceLandmarks",
    "Landmarks106",
    "RefinedLandmarks",
    "Refiner",
    "ScrfdDetector",
    "open_face_models",
]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_log = logging.getLogger("lp_edge")

DETECTOR, POINTS106, POINTS203 = "det_10g.onnx", "2d106det.onnx", "landmark.onnx"
FILES = (DETECTOR, POINTS106, POINTS203)
_PLACES = ("", "liveportrait", "insightface/models/buffalo_l")
"""Where the files lie in the folder: all in it, or as in LivePortrait's ``pretrained_weights``."""

DETECTOR_SIZE = 512
DETECTOR_SCORE = 0.1
DETECTOR_IOU = 0.4
"""Side of the detector's input, px; smallest score; overlap from which a box goes: the reference's settings."""
_STRIDES, _ANCHORS = (8, 16, 32), 2

_REFINE = CropOptions(scale=1.5, vy=-0.1)
"""The crop that ``landmark.onnx`` sees."""
_SAME_FACE = 0.3
"""Overlap (IoU) from which two boxes may be the same face."""


def _only_input(runner: Runner, side: int | None) -> str:
    """Name of a network's only input, float32 [N, 3, side, side].

    Raises:
        EngineError: the network has other inputs.
    """
    fits = [
        name
        for name, spec in runner.inputs.items()
        if spec.dtype == np.float32
        and len(spec.shape) == 4
        and (spec.shape[1] == 3 or isinstance(spec.shape[1], str))
        and all(isinstance(size, str) or side in (None, size) for size in spec.shape[2:])
    ]
    if len(runner.inputs) != 1 or not fits:
        size = "H" if side is None else side
        raise EngineError(
            f"{runner.name} takes {', '.join(map(str, runner.inputs.values()))}",
            f"expected one input float32 [N, 3, {size}, {size}]",
            "use the file of that name from the original release",
        )
    return fits[0]


def _infer(runner: Runner, name: str, pixels: F32) -> list[F32]:
    """All outputs of one picture float32 ``[H, W, 3]``, which goes in as ``[1, 3, H, W]``."""
    blob = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
    return [np.asarray(to_host(array), np.float32) for array in runner.infer({name: blob}).values()]


def _points(runner: Runner, outputs: Sequence[F32], count: int) -> F64:
    """The output that holds ``count`` points, float64 ``[count, 2]``.

    Raises:
        EngineError: no output or more than one has that many numbers, or they are not finite.
    """
    fits = [array for array in outputs if array.size == 2 * count]
    if len(fits) != 1 or not np.isfinite(fits[0]).all():
        raise EngineError(
            f"{runner.name} gave outputs of shapes {', '.join(str(list(a.shape)) for a in outputs)}",
            f"expected one with {2 * count} finite numbers",
            "use the file of that name from the original release",
        )
    return fits[0].astype(np.float64).reshape(count, 2)


class ScrfdDetector:
    """Finds faces with an SCRFD network of three strides and two anchors, such as ``det_10g.onnx``.

    Args:
        runner: the network; stays the caller's to close.

    Raises:
        EngineError: the network takes something else.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner, self._input = runner, _only_input(runner, None)

    def detect(self, rgb: U8) -> tuple[F32, F32]:
        """Faces of one frame.

        Args:
            rgb: uint8 ``[H, W, 3]``.

        Returns:
            boxes float32 ``[n, 4]`` (x0, y0, x1, y1 in frame px) and scores float32 ``[n]`` from 0.1 to 1, best first.

        Raises:
            EngineError: the network failed or its outputs are not those of SCRFD.
        """
        height, width = rgb.shape[:2]
        side = DETECTOR_SIZE
        # as there: fractions of a pixel are cut off, and both axes go by the scale of the vertical one
        ratio = height / width
        size = (int(side / ratio), side) if ratio > 1 else (side, int(side * ratio))
        size = (max(size[0], 1), max(size[1], 1))
        canvas = np.zeros((side, side, 3), np.uint8)
        canvas[: size[1], : size[0]] = cv2.resize(rgb, size, interpolation=cv2.INTER_LINEAR)
        outputs = _infer(self._runner, self._input, (canvas.astype(np.float32) - 127.5) / 128.0)
        found = self._sorted(outputs)
        boxes, scores = [], []
        for stride in _STRIDES:
            score, reach = found[stride, 1][:, 0], found[stride, 4] * stride
            row, column = np.divmod(np.arange(len(score)) // _ANCHORS, side // stride)
            anchor = np.stack([column, row], axis=1).astype(np.float32) * stride
            good = score >= DETECTOR_SCORE
            boxes.append(np.concatenate([anchor - reach[:, :2], anchor + reach[:, 2:]], axis=1)[good])
            scores.append(score[good])
        box, score = np.concatenate(boxes) / (size[1] / height), np.concatenate(scores)
        kept = non_maximum_suppression(box, score, DETECTOR_IOU, _overlap)
        return np.asarray(box[kept], np.float32), score[kept]

    def _sorted(self, outputs: Sequence[F32]) -> Mapping[tuple[int, int], F32]:
        """Outputs ``[rows, columns]`` by (stride, columns): 1 = scores, 4 = boxes, 10 = five points, which are not used."""
        cells = {_ANCHORS * (DETECTOR_SIZE // stride) ** 2: stride for stride in _STRIDES}
        found: dict[tuple[int, int], F32] = {}
        for array in outputs:
            rows, columns = (array.size // array.shape[-1], array.shape[-1]) if array.ndim > 1 else (0, 0)
            if rows in cells:
                found[cells[rows], columns] = array.reshape(rows, columns)
        wanted = [(stride, columns) for stride in _STRIDES for columns in (1, 4)]
        if any(key not in found for key in wanted):
            raise EngineError(
                f"{self._runner.name} gave outputs of shapes {', '.join(str(list(a.shape)) for a in outputs)}",
                f"expected scores [n, 1] and boxes [n, 4] for n = {', '.join(map(str, cells))}",
                f"use InsightFace's {DETECTOR}",
            )
        return found


def _overlap(boxes: npt.ArrayLike, others: npt.ArrayLike) -> F32:
    """IoU of boxes whose last pixel belongs to them, as InsightFace counts."""
    more = np.array([0, 0, 1, 1], np.float32)
    return iou_matrix(np.asarray(boxes) + more, np.asarray(others) + more)


class Landmarks106:
    """InsightFace's 106 points in a box, by ``2d106det.onnx``.

    Args:
        runner: the network; stays the caller's to close.

    Raises:
        EngineError: the network takes something else.
    """

    SIZE = 192

    def __init__(self, runner: Runner) -> None:
        self._runner, self._input = runner, _only_input(runner, self.SIZE)

    def points(self, rgb: U8, box: npt.ArrayLike) -> F32:
        """Points of one face.

        Args:
            rgb: uint8 ``[H, W, 3]``.
            box: ``[4]`` x0, y0, x1, y1 in frame px.

        Returns:
            float32 ``[106, 2]`` frame px.

        Raises:
            EngineError: the network failed or gives something else.
        """
        x0, y0, x1, y1 = np.asarray(box, np.float64)
        half = self.SIZE / 2
        scale = self.SIZE / (max(x1 - x0, y1 - y0, 1.0) * 1.5)
        to_crop = np.array(
            [
                [scale, 0.0, half - scale * (x0 + x1) / 2],
                [0.0, scale, half - scale * (y0 + y1) / 2],
                [0.0, 0.0, 1.0],
            ]
        )
        crop = cut(rgb, to_crop, size=self.SIZE)
        # this network normalises its input itself: colours go in as 0 to 255, points come out as -1 to 1
        found = _points(self._runner, _infer(self._runner, self._input, crop.image.astype(np.float32)), 106)
        return transform_points((found + 1.0) * half, crop.to_frame).astype(np.float32)


class Refiner:
    """The 203 landmarks by ``landmark.onnx``, from landmarks of whatever kind near the right place.

    Args:
        runner: the network; stays the caller's to close.

    Raises:
        EngineError: the network takes something else.
    """

    SIZE = 224

    def __init__(self, runner: Runner) -> None:
        self._runner, self._input = runner, _only_input(runner, self.SIZE)

    def points(self, rgb: U8, start: npt.ArrayLike) -> F32:
        """Landmarks of one face.

        Args:
            rgb: uint8 ``[H, W, 3]``.
            start: ``[106 or 203, 2]`` frame px; they place the crop that the network sees.

        Returns:
            float32 ``[203, 2]`` frame px.

        Raises:
            NoFaceError: ``start`` is no face.
            EngineError: the network failed or gives something else.
        """
        crop = cut(rgb, source_matrix(start, _REFINE, size=self.SIZE), size=self.SIZE)
        outputs = _infer(self._runner, self._input, crop.image.astype(np.float32) / 255.0)
        found = _points(self._runner, outputs, NUM_LANDMARKS) * self.SIZE
        return transform_points(found, crop.to_frame).astype(np.float32)


class RefinedLandmarks:
    """``landmark.onnx`` on a crop placed by our mesh. A :class:`~lp_edge.runtime.landmarks203.LandmarkSource`."""

    def __init__(self, refiner: Refiner) -> None:
        self._refiner = refiner

    def landmarks(self, rgb: U8, points: F32) -> F32:
        """Landmarks float32 ``[203, 2]`` of the face with these mesh points ``[478, >= 2]``.

        Raises:
            NoFaceError, EngineError: as :meth:`Refiner.points`.
        """
        return self._refiner.points(rgb, mesh_to_203(points))

    def picture_points(self, rgb: U8, points: F32) -> F32:
        """Those of the mesh, float32 ``[203, 2]``: nearer to InsightFace's 106 points than the network's are."""
        return mesh_to_203(points)


class InsightFaceLandmarks:
    """The reference's path: SCRFD, 106 points, 203 points. A :class:`~lp_edge.runtime.landmarks203.LandmarkSource`.

    Every frame is treated like a first one; the reference searches the first frame of a clip only and follows the face from
    there.
    """

    def __init__(self, detector: ScrfdDetector, points: Landmarks106, refiner: Refiner) -> None:
        self._detector, self._points106, self._refiner = detector, points, refiner
        self._warned = False

    def landmarks(self, rgb: U8, points: F32) -> F32:
        """Landmarks float32 ``[203, 2]`` of the face with these mesh points ``[478, >= 2]``.

        Raises:
            NoFaceError, EngineError: as :meth:`Refiner.points`.
        """
        return self._refiner.points(rgb, self.picture_points(rgb, points))

    def picture_points(self, rgb: U8, points: F32) -> F32:
        """InsightFace's 106 points, float32 ``[106, 2]`` frame px, from which the 203 landmarks start, too.

        Where the detector does not see the face that our mesh has found, the mesh stands in (float32 ``[203, 2]``), and
        a warning says so once.
        """
        boxes, _scores = self._detector.detect(rgb)
        overlap = iou_matrix(box_of_points(points), boxes)[0]
        if not len(boxes) or overlap.max() < _SAME_FACE:
            if not self._warned:
                _log.warning(
                    "%s does not see a face that the built-in networks found; their mesh places the landmarks' crop",
                    DETECTOR,
                )
                self._warned = True
            return mesh_to_203(points)
        return self._points106.points(rgb, boxes[int(overlap.argmax())])


def _find(folder: Path) -> dict[str, Path]:
    found = {}
    for name in FILES:
        for place in _PLACES:
            path = folder / place / name
            if path.is_file():
                found[name] = path
                break
    return found


def open_face_models(
    folder: Path,
    config: BackendConfig,
    stack: ExitStack,
    wrap: Callable[[Runner], Runner] = lambda runner: runner,
) -> LandmarkSource:
    """The landmarks of a folder of face models.

    Args:
        folder: holds ``landmark.onnx``, alone or with ``det_10g.onnx`` and ``2d106det.onnx``, side by side or in the
            subfolders of LivePortrait's ``pretrained_weights``.
        config: where the networks run.
        stack: closes them.
        wrap: takes every network as it is opened and gives what is called in its place.

    Returns:
        :class:`RefinedLandmarks` or, with all three files, :class:`InsightFaceLandmarks`.

    Raises:
        ConfigError: a file is missing.
        EngineError, BackendUnavailable: a file is not such a network, or cannot be opened.
    """
    found = _find(folder)
    missing = [name for name in FILES if name not in found]
    if missing and missing != [DETECTOR, POINTS106]:
        raise ConfigError(
            f"the face models in {folder} lack {' and '.join(missing)}"
            if folder.is_dir()
            else f"there is no folder {folder}",
            f"expected {POINTS203}, alone or with both {DETECTOR} and {POINTS106}",
            f"add what is missing; {POINTS203} is in the hub repository KwaiVGI/LivePortrait, "
            "the others are in InsightFace's buffalo_l (non-commercial)",
        )

    def runner(name: str) -> Runner:
        return stack.enter_context(wrap(open_runner(found[name], config, name=name)))

    refiner = Refiner(runner(POINTS203))
    if missing:
        return RefinedLandmarks(refiner)
    _log.warning(
        "%s and %s are InsightFace models: their licence allows non-commercial research only",
        DETECTOR,
        POINTS106,
    )
    return InsightFaceLandmarks(ScrfdDetector(runner(DETECTOR)), Landmarks106(runner(POINTS106)), refiner)
