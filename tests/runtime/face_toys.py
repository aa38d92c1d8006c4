"""Painted faces and toy networks that read them: a red disc is the image-left eye, a green one the image-right eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines.runner import Array, Runner, TensorSpec
from lp_edge.runtime import topology
from lp_edge.runtime.faces import box_of_points

EYES = 0.45
"""Distance of the eyes in sizes of the face."""


def template() -> npt.NDArray[np.float32]:
    """A face-like mesh [478, 3] whose longer side is 1, level, its eyes EYES apart, the middle of its box at 0."""
    rng = np.random.default_rng(5)
    angle = rng.uniform(0, 2 * np.pi, topology.NUM_POINTS)
    radius = np.sqrt(rng.uniform(0, 0.9, topology.NUM_POINTS))
    p = np.stack(
        [0.4 * radius * np.cos(angle), 0.5 * radius * np.sin(angle), rng.uniform(-0.2, 0.2, angle.size)], 1
    )
    ring = np.arange(len(topology.FACE_OVAL)) / len(topology.FACE_OVAL) * 2 * np.pi
    p[list(topology.FACE_OVAL), 0] = 0.4 * np.sin(ring)
    p[list(topology.FACE_OVAL), 1] = -0.5 * np.cos(ring)
    for eye, corners, centre in (
        (topology.LEFT_EYE, topology.LEFT_EYE_CORNERS, -EYES / 2),
        (topology.RIGHT_EYE, topology.RIGHT_EYE_CORNERS, EYES / 2),
    ):
        turn = np.arange(16) / 16 * 2 * np.pi
        p[list(eye), 0] = centre - 0.09 * np.cos(turn)
        p[list(eye), 1] = -0.12 - 0.03 * np.sin(turn)
        assert np.isclose(p[list(corners), 0].mean(), centre, atol=1e-6)
    for iris, centre in ((topology.LEFT_IRIS, -EYES / 2), (topology.RIGHT_IRIS, EYES / 2)):
        p[list(iris), :2] = np.array([centre, -0.12]) + 0.02 * np.array(
            [[0, 0], [1, 0], [0, -1], [-1, 0], [0, 1]]
        )
    for line, sign in ((topology.OUTER_LIP_UPPER, -0.05), (topology.OUTER_LIP_LOWER, 0.05)):
        p[list(line), 0], p[list(line), 1] = (
            np.linspace(-0.15, 0.15, 11),
            0.25 + sign * np.sin(np.linspace(0, np.pi, 11)),
        )
    for line, sign in ((topology.INNER_LIP_UPPER, -0.02), (topology.INNER_LIP_LOWER, 0.02)):
        p[list(line), 0], p[list(line), 1] = (
            np.linspace(-0.12, 0.12, 11),
            0.25 + sign * np.sin(np.linspace(0, np.pi, 11)),
        )
    p[topology.NOSE_TIP] = 0.0, 0.05, -0.2
    return p.astype(np.float32)


TEMPLATE = template()


def posed(x: float, y: float, size: float, roll: float = 0.0) -> npt.NDArray[np.float32]:
    """The template with the middle of its box at (x, y), its longer side ``size`` px, turned by ``roll`` radians."""
    c, s = np.cos(roll) * size, np.sin(roll) * size
    out = TEMPLATE * size
    out[:, :2] = TEMPLATE[:, :2] @ np.array([[c, s], [-s, c]]) + np.array([x, y])
    return out.astype(np.float32)


def paint(frame: npt.NDArray[np.uint8], points: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Draw the face with mesh ``points`` into the frame (in place): grey oval, coloured eyes."""
    fixed = np.round(points[:, :2] * 16).astype(int)
    cv2.fillPoly(frame, [fixed[list(topology.FACE_OVAL)]], (90, 90, 90), cv2.LINE_AA, 4)
    width = float(np.linalg.norm(points[topology.RIGHT_IRIS_CENTRE] - points[topology.LEFT_IRIS_CENTRE]))
    for index, colour in (
        (topology.LEFT_IRIS_CENTRE, (255, 0, 0)),
        (topology.RIGHT_IRIS_CENTRE, (0, 255, 0)),
    ):
        x, y = (int(v) for v in fixed[index])
        cv2.circle(frame, (x, y), round(0.14 * width * 16), colour, -1, cv2.LINE_AA, 4)
    return frame


def picture(width: int, height: int, *faces: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """A dark frame with painted faces."""
    frame = np.full((height, width, 3), 20, np.uint8)
    for points in faces:
        paint(frame, points)
    return frame


def mesh_between(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The template moved so that its irises lie at ``left`` and ``right``."""
    apart = right - left
    size, roll = float(np.hypot(*apart)) / EYES, float(np.arctan2(apart[1], apart[0]))
    at = posed(0.0, 0.0, size, roll)
    at[:, :2] += (left + right) / 2 - at[[topology.LEFT_IRIS_CENTRE, topology.RIGHT_IRIS_CENTRE], :2].mean(0)
    return at


def _spots(image: npt.NDArray[np.uint8], channel: int) -> list[tuple[npt.NDArray[np.float64], float]]:
    """Middle and area of the discs of one colour."""
    rest = [c for c in range(3) if c != channel]
    purity = np.clip(image[..., channel].astype(np.float32) - image[..., rest].max(-1) - 40, 0, None)
    count, marks = cv2.connectedComponents((purity > 0).astype(np.uint8))
    out = []
    for mark in range(1, count):
        y, x = np.nonzero(marks == mark)
        weight = purity[y, x].astype(np.float64)
        if len(x) >= 4:
            out.append((np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum(), float(len(x))))
    return out


class _Toy(Runner):
    """Counts calls; ``deaf`` makes it find nothing."""

    def __init__(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        super().__init__(name, inputs, outputs)
        self.calls = 0
        self.crops = 0
        self.shapes: list[tuple[int, ...]] = []
        self.deaf = False

    @property
    def backend(self) -> str:
        return "toy"

    @property
    def device(self) -> str:
        return "toy"

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        image = np.asarray(feeds["image"])
        self.calls += 1
        self.crops += len(image)
        self.shapes.append(image.shape)
        return self.answer(image)

    def answer(self, image: npt.NDArray[np.uint8]) -> dict[str, Array]:
        raise NotImplementedError

    def _close(self) -> None:
        pass


class ToyMesh(_Toy):
    """Reads both eyes nearest to the middle of each crop; scores 0.95, or 0.02 where it sees none. Knows ±60° of roll."""

    def __init__(self, size: int = 128, batch: int | str = "N") -> None:
        u8, f32 = np.dtype(np.uint8), np.dtype(np.float32)
        super().__init__(
            "toy mesh",
            [TensorSpec("image", u8, (batch, size, size, 3))],
            [TensorSpec("points", f32, (batch, 478, 3)), TensorSpec("score", f32, (batch, 1))],
        )
        self.size = size
        self.score = 0.95

    def answer(self, image: npt.NDArray[np.uint8]) -> dict[str, Array]:
        points = np.zeros((len(image), 478, 3), np.float32)
        score = np.full((len(image), 1), 0.02, np.float32)
        for i, crop in enumerate(image):
            middle = np.full(2, self.size / 2)
            eyes = []
            for channel in (0, 1):
                near = sorted(_spots(crop, channel), key=lambda s: float(np.linalg.norm(s[0] - middle)))
                eyes += near[:1]
            if (
                len(eyes) == 2
                and not self.deaf
                and abs(np.arctan2(*(eyes[1][0] - eyes[0][0])[::-1])) < np.pi / 3
            ):
                points[i], score[i] = mesh_between(eyes[0][0], eyes[1][0]), self.score
        return {"points": points, "score": score}


class ToyDetector(_Toy):
    """Pairs red and green discs; finds faces of ``smallest`` px and more that lie in the input, within ±60° of upright."""

    def __init__(self, smallest: float = 30.0) -> None:
        u8, f32 = np.dtype(np.uint8), np.dtype(np.float32)
        super().__init__(
            "toy detector",
            [TensorSpec("image", u8, ("N", "H", "W", 3))],
            [
                TensorSpec("boxes", f32, ("N", "M", 4)),
                TensorSpec("scores", f32, ("N", "M")),
                TensorSpec("points", f32, ("N", "M", 5, 2)),
            ],
        )
        self.smallest = smallest
        self.inside = False

    def answer(self, image: npt.NDArray[np.uint8]) -> dict[str, Array]:
        assert len(image) == 1
        assert image.shape[1] % 32 == 0 and image.shape[2] % 32 == 0 and max(image.shape) <= 640
        boxes, scores, points = [[0.0, 0.0, 1.0, 1.0]], [0.01], [np.zeros((5, 2))]
        greens = _spots(image[0], 1)
        for left, area in _spots(image[0], 0):
            radius = np.sqrt(area / np.pi)
            fitting = [g for g, _ in greens if abs(np.linalg.norm(g - left) / radius - 1 / 0.14) < 3]
            if not fitting or self.deaf:
                continue
            right = min(fitting, key=lambda g: float(np.linalg.norm(g - left)))
            mesh = mesh_between(left, right)
            box = box_of_points(mesh)
            steep = abs(np.arctan2(*(right - left)[::-1])) > np.pi / 3
            beyond = self.inside and (box.min() < 0 or box[2] >= image.shape[2] or box[3] >= image.shape[1])
            if steep or beyond or max(box[2] - box[0], box[3] - box[1]) < self.smallest:
                continue
            for shift, score in ((0.0, 0.9), (3.0, 0.6)):  # and a double, which suppression must drop
                boxes.append([float(v) + shift for v in box])
                scores.append(score)
                points.append(topology.five_points(mesh))
        return {
            "boxes": np.array([boxes], np.float32),
            "scores": np.array([scores], np.float32),
            "points": np.array([points], np.float32),
        }
