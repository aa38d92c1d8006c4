"""Training pictures of the built-in face detector: frames, pasted crops, backgrounds and augmentation.

Everything is drawn from `numpy.random.Generator`s seeded by (seed, step), so that a resumed run sees the pictures the
uninterrupted run would have seen. Boxes of rotated faces are never the box around a rotated box, which would be up
to 41 % too large: every face carries an outline (points of its face mesh), the outline is transformed and the box is
its extent. Crops bring their own mesh; a face of a whole frame, for which only box and five points are labelled, gets
the outline of the most similar labelled crop, fitted to it (`match_outline`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

# Five points of a face in the 478-point topology, left-of-image first for an unmirrored, upright face:
# iris centres, nose tip, mouth corners.
FIVE_POINTS = (468, 473, 1, 61, 291)
MIRRORED_POINTS = (1, 0, 2, 4, 3)
"""Order of the five points after a mirror: what was the left-of-image eye is then the right-of-image eye."""

STRIDES = (16, 32, 64)
SIZE_RANGES = ((0.0, 76.0), (58.0, 190.0), (150.0, 1e9))
"""Per stride: the face sizes (square root of the box area, pixels) for which its cells are trained. They overlap."""
RANGE_TOLERANCE = 1.2
CENTRE_RADIUS = 1.0
IGNORE_RADIUS = 1.8

SMALLEST = 25.0
"""Faces smaller than this (square root of the box area, pixels) are not trained, neither as face nor as background."""

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Face:
    """One labelled face: `outline` float32 [K,2] (x, y) pixels, `points` float32 [5,2] in the order of the labels."""

    outline: F32
    points: F32

    @property
    def box(self) -> F32:
        """float32 [4]: x0, y0, x1, y1, the extent of the outline in pixels."""
        return np.concatenate([self.outline.min(0), self.outline.max(0)])

    def transformed(self, matrix: F32) -> Face:
        """The face under a 2x3 affine `matrix`; a mirroring one also swaps left and right of the five points."""
        linear, shift = matrix[:, :2], matrix[:, 2]
        points = self.points @ linear.T + shift
        if float(linear[0, 0] * linear[1, 1] - linear[0, 1] * linear[1, 0]) < 0:
            points = points[list(MIRRORED_POINTS)]
        return Face((self.outline @ linear.T + shift).astype(np.float32), points.astype(np.float32))


@dataclass(frozen=True)
class Picture:
    """A training picture: `levels` uint8 [H,W,3] RGB, each half the size of the one before, and its faces (level 0)."""

    levels: tuple[U8, ...]
    faces: tuple[Face, ...]


@dataclass(frozen=True)
class Sample:
    """A drawn training picture: `image` uint8 [H,W,3] RGB; `boxes` [F,4] and `points` [F,5,2] float32 pixels;
    `ignored` bool [F], faces that neither count as face nor as background (mostly hidden or too small)."""

    image: U8
    boxes: F32
    points: F32
    ignored: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Corpus:
    """All training pictures: whole `frames` and single-face `crops` of one split."""

    frames: tuple[Picture, ...]
    crops: tuple[Picture, ...]


def ellipse_box(box: Sequence[float] | F32, matrix: F32) -> F32:
    """Box float32 [4] around the ellipse inscribed in `box` after the 2x3 affine `matrix`.

    The half extent of an ellipse with half axes a, b under a linear map M is sqrt((M₀₀·a)² + (M₀₁·b)²) along x and
    likewise along y: the norm of each row of M·diag(a, b).
    """
    x0, y0, x1, y1 = (float(v) for v in box)
    centre = matrix[:, :2] @ np.array([(x0 + x1) / 2, (y0 + y1) / 2]) + matrix[:, 2]
    half = np.linalg.norm(matrix[:, :2] * np.array([(x1 - x0) / 2, (y1 - y0) / 2]), axis=1)
    return np.concatenate([centre - half, centre + half]).astype(np.float32)


def outline_indices(meshes: F32) -> npt.NDArray[np.int64]:
    """Indices of the points of `meshes` [N,P,2] that are the outermost ones of some face in some direction (±60°)."""
    found: set[int] = set()
    for angle in np.radians(np.arange(-60, 61, 15)):
        turned = meshes @ np.array(
            [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32
        )
        for extreme in (turned.argmin(1), turned.argmax(1)):
            values, counts = np.unique(extreme, return_counts=True)
            found.update(values[counts >= max(1, len(meshes) // 500)].tolist())
    return np.array(sorted(found), np.int64)


def match_outline(box: F32, points: F32, outlines: F32, five: F32) -> F32:
    """Outline float32 [K,2] for a face of which only `box` [4] and five `points` [5,2] are known.

    Every face of the library (`outlines` [N,K,2], `five` [N,5,2]) is laid over the five points by the least-squares
    similarity (closed form over complex numbers); the one whose points and extent then agree best is taken and
    stretched so that its extent is exactly `box`.
    """
    source = five[..., 0] + 1j * five[..., 1]
    target = points[:, 0] + 1j * points[:, 1]
    centred = source - source.mean(1, keepdims=True)
    factor = (centred.conj() * (target - target.mean())).sum(1) / (np.abs(centred) ** 2).sum(1)
    shift = target.mean() - factor * source.mean(1)
    residual = np.abs(factor[:, None] * source + shift[:, None] - target).mean(1)
    laid = factor[:, None] * (outlines[..., 0] + 1j * outlines[..., 1]) + shift[:, None]
    extent = np.stack([laid.real.min(1), laid.imag.min(1), laid.real.max(1), laid.imag.max(1)], 1)
    best = int(np.argmin(residual + np.abs(extent - box).mean(1)))
    chosen = np.stack([laid[best].real, laid[best].imag], 1)
    low, high = chosen.min(0), chosen.max(0)
    stretched = (chosen - low) / np.maximum(high - low, 1e-3) * (box[2:] - box[:2]) + box[:2]
    return np.asarray(stretched, np.float32)


def read_rgb(path: Path) -> U8:
    """Picture `path` as uint8 [H,W,3] RGB. Raises ConfigError when it cannot be read."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ConfigError(
            f"{path} is not a readable picture",
            "expected a JPEG or PNG",
            "check that the face data is complete",
        )
    return np.ascontiguousarray(image[..., ::-1], dtype=np.uint8)


def _pyramid(image: U8) -> tuple[U8, ...]:
    levels = [image]
    while min(levels[-1].shape[:2]) >= 64 and len(levels) < 4:
        height, width = levels[-1].shape[:2]
        smaller = cv2.resize(
            levels[-1], (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_AREA
        )
        levels.append(np.asarray(smaller, np.uint8))
    return tuple(levels)


def load_labels(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], F32]:
    """Entries of `detect.json` and `mesh.json` and the landmarks float32 [N,478,3] under the folder `data`.

    Raises ConfigError when a file is missing or the landmarks do not belong to the entries.
    """
    try:
        frames: list[dict[str, Any]] = json.loads((data / "detect.json").read_text())
        crops: list[dict[str, Any]] = json.loads((data / "mesh.json").read_text())
        landmarks: F32 = np.load(data / "mesh_landmarks.npy", allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"face data in {data} cannot be read ({error})",
            "expected detect.json, mesh.json, mesh_landmarks.npy and the folders they name",
            "give the folder of the face data with --data",
        ) from error
    if landmarks.shape != (len(crops), 478, 3):
        raise ConfigError(
            f"landmarks of shape {landmarks.shape} for {len(crops)} entries of mesh.json in {data}",
            f"expected ({len(crops)}, 478, 3)",
            "fetch both files of the same version",
        )
    return frames, crops, landmarks


def load_corpus(data: Path, split: str = "train", limit: int | None = None) -> Corpus:
    """Reads the frames and crops of `split` (at most `limit` of each, evenly chosen) under the folder `data`.

    Raises ConfigError when data is missing, unreadable or the split is empty.
    """
    frames, crops, landmarks = load_labels(data)
    rows = [row for row, entry in enumerate(crops) if entry["split"] == split]
    chosen = [entry for entry in frames if entry["split"] == split]
    if not rows or not chosen:
        raise ConfigError(
            f"{data} has no frames or no crops of split {split!r}",
            "expected both",
            "use split 'train' or 'val'",
        )
    if limit is not None:
        rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int)]
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, min(limit, len(chosen))).astype(int)]
    meshes = landmarks[rows][..., :2]
    outer = outline_indices(meshes)
    # Contiguous: OpenCV does not take the strided views that fancy indexing leaves.
    outlines, five = (
        np.ascontiguousarray(meshes[:, outer]),
        np.ascontiguousarray(meshes[:, list(FIVE_POINTS)]),
    )
    crop_pictures = [
        Picture(_pyramid(read_rgb(data / crops[row]["file"])), (Face(outlines[i], five[i]),))
        for i, row in enumerate(rows)
    ]
    frame_pictures = []
    for entry in chosen:
        faces = []
        for label in entry["faces"]:
            box, points = np.array(label["box"], np.float32), np.array(label["points"], np.float32)
            faces.append(Face(match_outline(box, points, outlines, five), points))
        frame_pictures.append(Picture(_pyramid(read_rgb(data / entry["file"])), tuple(faces)))
    return Corpus(tuple(frame_pictures), tuple(crop_pictures))


def cell_centres(height: int, width: int) -> tuple[F32, F32]:
    """Centres float32 [M,2] (x, y) and strides float32 [M] of all cells for a picture of `height` by `width` pixels,
    in the order of the network's output: stride by stride, row by row."""
    centres, strides = [], []
    for stride in STRIDES:
        rows, columns = -(-height // stride), -(-width // stride)
        ys, xs = np.mgrid[0:rows, 0:columns].astype(np.float32)
        centres.append((np.stack([xs, ys], -1).reshape(-1, 2) + 0.5) * stride)
        strides.append(np.full(rows * columns, stride, np.float32))
    return np.concatenate(centres).astype(np.float32), np.concatenate(strides)


def assign(
    boxes: F32, ignored: npt.NDArray[np.bool_], height: int, width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which cell learns which face: kinds int64 [M] (POSITIVE, NEGATIVE or IGNORED) and face index int64 [M].

    A cell is positive for a face of its stride's size range whose box centre lies within CENTRE_RADIUS strides in x
    and y (of several: the smaller face). Cells a little farther off but inside the box, cells of a neighbouring
    stride when the size is just outside its range, and cells inside ignored faces do not count at all.
    """
    centres, strides = cell_centres(height, width)
    kinds = np.zeros(len(centres), np.int64)
    owner = np.zeros(len(centres), np.int64)
    if len(boxes) == 0:
        return kinds, owner
    low = np.select([strides == s for s in STRIDES], [r[0] for r in SIZE_RANGES])
    high = np.select([strides == s for s in STRIDES], [r[1] for r in SIZE_RANGES])
    extent = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-3)
    size = np.sqrt(extent.prod(1))
    for face in np.argsort(-size):
        distance = np.abs(centres - (boxes[face, :2] + boxes[face, 2:]) / 2).max(1) / strides
        inside = ((centres >= boxes[face, :2]) & (centres <= boxes[face, 2:])).all(1)
        if ignored[face]:
            kinds[inside | (distance <= CENTRE_RADIUS)] = IGNORED
            continue
        fits = (size[face] >= low) & (size[face] <= high)
        nearly = (size[face] * RANGE_TOLERANCE >= low) & (size[face] <= high * RANGE_TOLERANCE)
        around = (distance <= IGNORE_RADIUS) & inside & nearly
        kinds[around & (kinds != POSITIVE)] = IGNORED
        # A cell keeps its centre face's label only where it is the nearest cell of that stride or well inside.
        positive = fits & (distance <= CENTRE_RADIUS) & (inside | (distance <= 0.5))
        kinds[positive] = POSITIVE
        owner[positive] = face
    return kinds, owner


# --- drawing -----------------------------------------------------------------------------------------------------


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    if rng.random() < 0.3:
        grey = int(rng.integers(0, 256))
        return grey, grey, grey
    red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
    return red, green, blue


class Painter:
    """Draws training samples from a corpus; holds nothing but the pictures and a table of noise."""

    def __init__(self, corpus: Corpus, seed: int = 0) -> None:
        self.corpus = corpus
        rng = np.random.default_rng([seed, 991])
        # Noise is read at random offsets: drawing 300 000 normals per picture would cost more than all the rest.
        self._noise = rng.normal(0, 1, (1100, 1100)).astype(np.float32)

    def synthetic(self, rng: np.random.Generator, height: int, width: int) -> U8:
        """A face-free drawn background uint8 [height,width,3]: colour, gradient, clouds, stripes, shapes, writing."""
        kind = rng.integers(0, 6)
        if kind == 0:
            canvas = np.empty((height, width, 3), np.uint8)
            canvas[:] = _colour(rng)
        elif kind in (1, 2):
            cells = int(rng.integers(2, 4 if kind == 1 else 24))
            grid = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
            flag = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_NEAREST)[int(rng.integers(0, 3))]
            canvas = np.asarray(cv2.resize(grid, (width, height), interpolation=flag), np.uint8)
        elif kind == 3:
            ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
            angle, period = rng.uniform(0, math.pi), rng.uniform(4, 60)
            wave = np.sin((xs * math.cos(angle) + ys * math.sin(angle)) * 2 * math.pi / period)[..., None]
            if rng.random() < 0.4:
                wave = (
                    wave
                    * np.sin((ys * math.cos(angle) - xs * math.sin(angle)) * 2 * math.pi / period)[..., None]
                )
            one, two = np.array(_colour(rng), np.float32), np.array(_colour(rng), np.float32)
            canvas = ((one + two) / 2 + wave * (one - two) / 2).astype(np.uint8)
        else:
            canvas = np.empty((height, width, 3), np.uint8)
            canvas[:] = _colour(rng)
        if rng.random() < 0.6:
            self._clutter(rng, canvas, int(rng.integers(3, 30)))
        return canvas

    def _clutter(self, rng: np.random.Generator, canvas: U8, count: int) -> None:
        """Shapes, lines and writing over `canvas`."""
        height, width = canvas.shape[:2]
        for _ in range(count):
            x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
            size = int(math.exp(rng.uniform(math.log(4), math.log(max(8, min(height, width) / 2)))))
            colour, kind = _colour(rng), rng.integers(0, 5)
            thick = -1 if rng.random() < 0.6 else int(rng.integers(1, 6))
            if kind == 0:
                cv2.rectangle(canvas, (x, y), (x + size, y + int(size * rng.uniform(0.3, 2))), colour, thick)
            elif kind == 1:
                axes = (size // 2 + 1, int(size * rng.uniform(0.3, 0.9)) + 1)
                cv2.ellipse(
                    canvas, (x, y), axes, float(rng.uniform(0, 180)), 0, 360, colour, thick, cv2.LINE_AA
                )
            elif kind == 2:
                corners = (np.array([x, y]) + rng.normal(0, size, (int(rng.integers(3, 7)), 2))).astype(
                    np.int32
                )
                cv2.fillPoly(canvas, [corners], colour, cv2.LINE_AA)
            elif kind == 3:
                end = (x + int(rng.normal(0, 2 * size)), y + int(rng.normal(0, 2 * size)))
                cv2.line(canvas, (x, y), end, colour, int(rng.integers(1, 8)), cv2.LINE_AA)
            else:
                letters = "".join(chr(int(c)) for c in rng.integers(33, 126, int(rng.integers(2, 12))))
                font = int(rng.integers(0, 8))
                cv2.putText(
                    canvas, letters, (x, y), font, size / 30, colour, int(rng.integers(1, 4)), cv2.LINE_AA
                )

    def background(self, rng: np.random.Generator, height: int, width: int) -> U8:
        """A face-free background uint8 [height,width,3]: drawn, or part of a frame with its faces painted out."""
        if rng.random() < 0.3:
            return self.synthetic(rng, height, width)
        frame = self.corpus.frames[int(rng.integers(len(self.corpus.frames)))]
        zoom = math.exp(rng.uniform(math.log(0.5), math.log(2.5)))
        rows, columns = frame.levels[0].shape[:2]
        zoom = max(zoom, width / columns * 0.6, height / rows * 0.6)
        focus = rng.uniform((0.15 * columns, 0.15 * rows), (0.85 * columns, 0.85 * rows))
        matrix = _matrix(
            zoom, zoom, rng.uniform(-0.5, 0.5), rng.random() < 0.5, focus, (width / 2, height / 2)
        )
        border = cv2.BORDER_REFLECT_101 if rng.random() < 0.5 else cv2.BORDER_REPLICATE
        source = np.array(frame.levels[0])
        for face in frame.faces:
            self._paint_out(rng, source, face)
        return np.asarray(cv2.warpAffine(source, matrix, (width, height), borderMode=border), np.uint8)

    def _paint_out(self, rng: np.random.Generator, image: U8, face: Face) -> None:
        """Covers `face` in `image`: with another part of the picture, clouds or a colour; nothing of it stays."""
        x0, y0, x1, y1 = face.box
        rows, columns = image.shape[:2]
        grow = 0.12 * max(x1 - x0, y1 - y0)
        left, top = max(0, int(x0 - grow)), max(0, int(y0 - 1.6 * grow))
        right, bottom = min(columns, int(x1 + grow) + 1), min(rows, int(y1 + grow) + 1)
        if right <= left or bottom <= top:
            return
        wide, tall = right - left, bottom - top
        patch: npt.NDArray[Any] | None = None
        if rng.random() < 0.6:
            for _ in range(6):
                x, y = int(rng.integers(0, max(1, columns - wide))), int(rng.integers(0, max(1, rows - tall)))
                if x >= right or x + wide <= left or y >= bottom or y + tall <= top:
                    patch = image[y : y + tall, x : x + wide].copy()
                    break
        if patch is None or patch.shape[:2] != (tall, wide):
            cells = int(rng.integers(1, 6))
            base = image[top:bottom, left:right].reshape(-1, 3).mean(0)
            grid = np.clip(base + rng.normal(0, 30, (cells, cells, 3)), 0, 255).astype(np.uint8)
            patch = cv2.resize(grid, (wide, tall), interpolation=cv2.INTER_LINEAR)
        if rng.random() < 0.5:
            mask = np.zeros((tall, wide), np.uint8)
            cv2.ellipse(mask, (wide // 2, tall // 2), (wide // 2, tall // 2), 0, 0, 360, 255, -1)
            # The inscribed ellipse of the grown box covers the eyes, nose and mouth, which is what makes a face.
            region = image[top:bottom, left:right]
            region[mask > 0] = patch[mask > 0]
        else:
            image[top:bottom, left:right] = patch

    def _angle(self, rng: np.random.Generator) -> float:
        chance = rng.random()
        if chance < 0.35:
            return float(rng.uniform(-math.pi / 4, math.pi / 4))
        return float(
            np.clip(rng.normal(0, math.radians(8 if chance < 0.8 else 20)), -math.pi / 4, math.pi / 4)
        )

    def _cell(self, rng: np.random.Generator, cell: U8, low: float, high: float) -> list[tuple[Face, F32]]:
        """Warps a frame or crop into `cell` (in place) with one of its faces at a size drawn evenly in log scale
        between `low` and `high`; returns the faces it then shows in pixels of the cell."""
        crops = self.corpus.crops
        use_crop = rng.random() < 0.3
        group = crops if use_crop else self.corpus.frames
        picture = group[int(rng.integers(len(group)))]
        height, width = cell.shape[:2]
        if not picture.faces:
            return []
        anchor = picture.faces[int(rng.integers(len(picture.faces)))]
        box = anchor.box
        extent = box[2:] - box[:2]
        target = math.exp(rng.uniform(math.log(low), math.log(high)))
        zoom = min(target / math.sqrt(float(extent.prod())), 6.0)
        stretch = math.exp(rng.normal(0, 0.06))
        angle = self._angle(rng)
        half = min(target * 0.5, 0.45 * min(height, width))
        if rng.random() < 0.2:
            half *= 0.3
        to = (float(rng.uniform(half, width - half)), float(rng.uniform(half, height - half)))
        matrix = _matrix(
            zoom * stretch, zoom / stretch, angle, rng.random() < 0.5, (box[:2] + box[2:]) / 2, to
        )
        if rng.random() < 0.25:
            shear = np.array([[1, rng.normal(0, 0.08)], [rng.normal(0, 0.08), 1]], np.float32)
            centre = np.array(to, np.float32)
            matrix = np.concatenate(
                [shear @ matrix[:, :2], (shear @ (matrix[:, 2] - centre) + centre)[:, None]], 1
            )
        level = 0
        while zoom * 2**level < 0.6 and level + 1 < len(picture.levels):
            level += 1
        source = picture.levels[level]
        (full_rows, full_columns), (rows, columns) = picture.levels[0].shape[:2], source.shape[:2]
        ratio: F32 = np.array([full_columns / columns, full_rows / rows], np.float32)
        scaled = matrix.copy()
        scaled[:, :2] *= ratio
        scaled[:, 2] += matrix[:, :2] @ (ratio / 2 - 0.5)  # pixel centres of the smaller level
        if rng.random() < 0.75 and not use_crop:
            border = cv2.BORDER_TRANSPARENT
        else:
            border = cv2.BORDER_CONSTANT if rng.random() < 0.5 else cv2.BORDER_TRANSPARENT
        fill = (0, 0, 0) if rng.random() < 0.6 else _colour(rng)
        flag = cv2.INTER_LINEAR if rng.random() < 0.85 else cv2.INTER_NEAREST
        cv2.warpAffine(source, scaled, (width, height), cell, flags=flag, borderMode=border, borderValue=fill)
        return [
            (face.transformed(matrix), _visible(face, matrix, full_rows, full_columns))
            for face in picture.faces
        ]

    def _paste(
        self, rng: np.random.Generator, canvas: U8, taken: list[F32], low: float, high: float, negative: bool
    ) -> Face | None:
        """Pastes a crop's face (or, `negative`, a scrambled one) over `canvas` where no labelled face is."""
        height, width = canvas.shape[:2]
        picture = self.corpus.crops[int(rng.integers(len(self.corpus.crops)))]
        face = picture.faces[0]
        box = face.box
        size = math.sqrt(float((box[2:] - box[:2]).prod()))
        target = math.exp(rng.uniform(math.log(low), math.log(high)))
        zoom, angle = target / size, self._angle(rng)
        to = (
            float(rng.uniform(0.4 * target, width - 0.4 * target)),
            float(rng.uniform(0.4 * target, height - 0.4 * target)),
        )
        matrix = _matrix(zoom, zoom, angle, rng.random() < 0.5, (box[:2] + box[2:]) / 2, to)
        moved = face.transformed(matrix)
        rows, columns = picture.levels[0].shape[:2]
        whole = rng.random() < 0.35
        if whole:
            shape = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]], np.float32)
        else:
            hull = np.asarray(cv2.convexHull(face.outline), np.float32)[:, 0]
            centre = hull.mean(0)
            shape = (hull - centre) * rng.uniform(1.05, 1.6) + centre + (0, -rng.uniform(0, 0.15) * size)
        corners = shape @ matrix[:, :2].T + matrix[:, 2]
        left, top = np.floor(corners.min(0)).astype(int) - 4
        right, bottom = np.ceil(corners.max(0)).astype(int) + 4
        left, top, right, bottom = max(0, left), max(0, top), min(width, right), min(height, bottom)
        if right - left < 8 or bottom - top < 8:
            return None
        rect = np.array([left, top, right, bottom], np.float32)
        if any(_overlap(other, rect) > 0.12 for other in taken):
            return None
        level = 0
        while zoom * 2**level < 0.6 and level + 1 < len(picture.levels):
            level += 1
        source = picture.levels[level]
        scaled = matrix.copy()
        scaled[:, :2] *= 2.0**level
        scaled[:, 2] += matrix[:, :2] @ np.full(2, 2.0**level / 2 - 0.5, np.float32)
        scaled[:, 2] -= (left, top)
        patch = np.asarray(
            cv2.warpAffine(source, scaled, (right - left, bottom - top), borderMode=cv2.BORDER_REPLICATE),
            np.uint8,
        )
        if negative:
            patch = _scramble(rng, patch)
        mask = np.zeros(patch.shape[:2], np.uint8)
        cv2.fillPoly(mask, [np.round(corners - (left, top)).astype(np.int32)], 255)
        blur = int(rng.integers(0, max(1, int(target / 12)) + 1))
        if blur and not whole:
            mask = np.asarray(cv2.blur(mask, (2 * blur + 1, 2 * blur + 1)), np.uint8)
        alpha = mask[..., None].astype(np.uint16)
        region = canvas[top:bottom, left:right]
        region[:] = ((patch * alpha + region * (255 - alpha)) // 255).astype(np.uint8)
        return moved

    def _occlude(self, rng: np.random.Generator, canvas: U8, box: F32) -> None:
        """Covers up to a third of a face from one side, or a bar across it."""
        height, width = canvas.shape[:2]
        x0, y0, x1, y1 = box
        wide, tall = x1 - x0, y1 - y0
        side = int(rng.integers(0, 5))
        depth = rng.uniform(0.1, 0.35)
        left, top, right, bottom = x0 - 0.2 * wide, y0 - 0.2 * tall, x1 + 0.2 * wide, y1 + 0.2 * tall
        if side == 0:
            right = x0 + depth * wide
        elif side == 1:
            left = x1 - depth * wide
        elif side == 2:
            bottom = y0 + depth * tall
        elif side == 3:
            top = y1 - depth * tall
        else:
            middle = rng.uniform(y0, y1)
            top, bottom = middle - 0.07 * tall, middle + 0.07 * tall
        left, top = max(0, int(left)), max(0, int(top))
        right, bottom = min(width, int(right)), min(height, int(bottom))
        if right - left < 2 or bottom - top < 2:
            return
        patch = self.synthetic(rng, bottom - top, right - left)
        if rng.random() < 0.4:
            patch[:] = canvas[int(rng.integers(height)), int(rng.integers(width))]
        mask = np.zeros(patch.shape[:2], np.uint8)
        if rng.random() < 0.5:
            mask[:] = 255
        else:
            centre = ((right - left) // 2, (bottom - top) // 2)
            cv2.ellipse(mask, centre, (centre[0] + 1, centre[1] + 1), 0, 0, 360, 255, -1)
        canvas[top:bottom, left:right][mask > 0] = patch[mask > 0]

    def photometric(self, rng: np.random.Generator, image: U8, smallest: float) -> U8:
        """Colour, light, painted look, blur, noise and compression over a whole picture.

        Whatever takes detail away is bounded by the size of the `smallest` face (pixels), which must stay a face:
        trained on smudges, the network would find smudges.
        """
        height, width = image.shape[:2]
        out: npt.NDArray[Any] = image
        steps = np.arange(256, dtype=np.float32) / 255
        strength = 1.0 if rng.random() < 0.6 else 0.3
        gamma = math.exp(strength * rng.normal(0, 0.3))
        contrast, light = math.exp(strength * rng.normal(0, 0.25)), strength * rng.normal(0, 0.12)
        cast = rng.normal(0, 0.06 * strength, 3) * (rng.random() < 0.5)
        curve = (np.power(steps, gamma)[:, None] - 0.5) * contrast + 0.5 + light + cast
        if strength == 1.0 and smallest > 40 and rng.random() < 0.1:
            shades = int(rng.integers(3, 9))
            curve = np.round(np.clip(curve, 0, 1) * shades) / shades
        table = np.clip(curve * 255, 0, 255).astype(np.uint8)
        out = cv2.LUT(out, table[None])
        colour = rng.random() / strength
        if colour < 0.12:
            out = np.repeat(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY)[..., None], 3, -1)
            if rng.random() < 0.4:
                tint = np.array([1.0, rng.uniform(0.8, 1), rng.uniform(0.55, 1)])
                out = (out * tint).astype(np.uint8)
        elif colour < 0.45:
            hsv = cv2.cvtColor(out, cv2.COLOR_RGB2HSV)
            turn = int(rng.normal(0, 8)) if rng.random() < 0.85 else int(rng.integers(0, 180))
            shift = ((np.arange(256) + turn) % 180).astype(np.uint8)
            fill = np.clip(np.arange(256) * math.exp(rng.normal(0, 0.4)), 0, 255).astype(np.uint8)
            same = np.arange(256, dtype=np.uint8)
            out = cv2.cvtColor(cv2.LUT(hsv, np.stack([shift, fill, same], -1)[None]), cv2.COLOR_HSV2RGB)
        elif colour < 0.5:
            out = np.ascontiguousarray(out[..., rng.permutation(3)])
        if smallest > 48 and rng.random() < 0.08:
            out = cv2.medianBlur(out, 5 if smallest > 80 and rng.random() < 0.5 else 3)
        if rng.random() < 0.18:
            sigma = rng.uniform(0.4, float(np.clip(smallest / 50, 0.5, 2.5)))
            out = cv2.GaussianBlur(out, (0, 0), sigma)
        elif smallest > 48 and rng.random() < 0.08:
            length = int(rng.integers(3, min(13, int(smallest / 12) + 1)))
            kernel = np.zeros((length, length), np.float32)
            turned = rng.uniform(0, math.pi)
            middle = (length - 1) / 2
            reach = (middle * math.cos(turned), middle * math.sin(turned))
            cv2.line(
                kernel,
                (round(middle - reach[0]), round(middle - reach[1])),
                (round(middle + reach[0]), round(middle + reach[1])),
                1.0,
            )
            out = cv2.filter2D(out, -1, kernel / max(1.0, float(kernel.sum())))
        if smallest > 40 and rng.random() < 0.15:
            ratio = rng.uniform(max(0.3, 26 / smallest), 0.85)
            small = cv2.resize(out, (int(width * ratio), int(height * ratio)), interpolation=cv2.INTER_AREA)
            out = cv2.resize(
                small,
                (width, height),
                interpolation=cv2.INTER_LINEAR if rng.random() < 0.7 else cv2.INTER_NEAREST,
            )
        if rng.random() < 0.2:
            y, x = int(rng.integers(0, 1100 - height)), int(rng.integers(0, 1100 - width))
            noise = (
                self._noise[y : y + height, x : x + width]
                * rng.uniform(2, float(np.clip(smallest / 5, 6, 20)))
            )[..., None]
            out = np.clip(out + noise, 0, 255).astype(np.uint8)
        if rng.random() < 0.2:
            _, packed = cv2.imencode(
                ".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(15 if smallest > 64 else 45, 90))]
            )
            out = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR))
        return np.ascontiguousarray(out, dtype=np.uint8)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Sample:
        """One training sample of `height` by `width` pixels (each ≤ 1024)."""
        canvas = np.zeros((height, width, 3), np.uint8)
        rows, columns = height, width
        if rng.random() < 0.3:  # what letterboxing leaves: zeros at the bottom or at the right
            if rng.random() < 0.5:
                rows = int(height * rng.uniform(0.45, 1.0))
            else:
                columns = int(width * rng.uniform(0.45, 1.0))
        area = canvas[:rows, :columns]
        found: list[tuple[Face, F32]] = []
        kind = rng.random()
        area[:] = self.background(rng, rows, columns) if kind < 0.6 or rng.random() < 0.3 else _colour(rng)
        short = min(rows, columns)
        if kind < 0.15:
            pass  # nothing but background, perhaps with scrambled faces
        elif kind < 0.86:
            parts = int(rng.choice([1, 2, 3], p=[0.82, 0.13, 0.05]))
            ys = _cuts(rng, rows, parts)
            xs = _cuts(rng, columns, parts)
            for y0, y1 in pairwise(ys):
                for x0, x1 in pairwise(xs):
                    if min(y1 - y0, x1 - x0) < 24 or (parts > 1 and rng.random() < 0.15):
                        continue
                    cell = np.ascontiguousarray(area[y0:y1, x0:x1])
                    side = min(y1 - y0, x1 - x0)
                    # Evenly in log scale from 40 px on, but the many faces of a collage are small: without a
                    # higher bound for single ones the large sizes would be rare among the labels.
                    low = 31.0 if parts > 1 else (40.0 if rng.random() < 0.4 else 90.0)
                    high = max(low * 1.2, (0.95 if parts > 1 else 1.3) * side)
                    for face, seen in self._cell(rng, cell, low, high):
                        offset = np.array([[1, 0, x0], [0, 1, y0]], np.float32)
                        limit = np.array([x0, y0, x1, y1], np.float32)
                        seen = seen + np.array([x0, y0, x0, y0], np.float32)
                        found.append((face.transformed(offset), _cut(seen, limit)))
                    area[y0:y1, x0:x1] = cell
        if kind >= 0.86 or rng.random() < 0.2:
            taken = [_cut(face.box, np.array([0, 0, columns, rows], np.float32)) for face, _ in found]
            for _ in range(int(rng.integers(1, 6)) if kind >= 0.86 else int(rng.integers(1, 3))):
                negative = rng.random() < (1.0 if kind < 0.15 else 0.15)
                face_ = self._paste(rng, area, taken, 31.0, max(40.0, 0.8 * short), negative)
                if face_ is not None:
                    limit = np.array([0, 0, columns, rows], np.float32)
                    taken.append(_cut(face_.box, limit))
                    if not negative:
                        found.append((face_, limit))
        if rng.random() < 0.1:
            self._clutter_clear(rng, area, [face.box for face, _ in found])
        boxes, points, ignored = [], [], []
        for face, limit in found:
            limit = _cut(limit, np.array([0, 0, columns, rows], np.float32))
            box = face.box
            shown = _cut(box, limit)
            part = _area(shown) / max(_area(box), 1e-3)
            if part < 0.04:
                continue
            size = math.sqrt(max(_area(shown), 0.0))
            boxes.append(shown)
            points.append(face.points)
            # Half of a small face is hardly more than a smudge: a network made to find it finds smudges.
            ignored.append(part < (0.5 if size > 64 else 0.75) or size < SMALLEST)
            if not ignored[-1] and rng.random() < (0.12 if size > 48 else 0.04):
                self._occlude(rng, area, box)
        sizes = [math.sqrt(_area(box)) for box, hidden in zip(boxes, ignored, strict=True) if not hidden]
        area[:] = self.photometric(rng, np.ascontiguousarray(area), min(sizes, default=200.0))
        return Sample(
            canvas,
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(points, np.float32).reshape(-1, 5, 2),
            np.array(ignored, np.bool_),
        )

    def _clutter_clear(self, rng: np.random.Generator, area: U8, boxes: list[F32]) -> None:
        """Clutter over the picture with the faces left uncovered."""
        kept = area.copy()
        self._clutter(rng, area, int(rng.integers(1, 10)))
        for box in boxes:
            x0, y0 = np.maximum(np.floor(box[:2]).astype(int), 0)
            x1, y1 = np.maximum(np.ceil(box[2:]).astype(int), 0)
            area[y0:y1, x0:x1] = kept[y0:y1, x0:x1]


def _matrix(
    scale_x: float, scale_y: float, angle: float, mirror: bool, centre: Any, to: tuple[float, float]
) -> F32:
    """2x3 affine: scale (and mirror) about `centre`, turn by `angle` (radians), then move `centre` to `to`."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.diag([-scale_x if mirror else scale_x, scale_y])
    shift = np.array(to) - linear @ np.asarray(centre, np.float64)
    return np.concatenate([linear, shift[:, None]], 1).astype(np.float32)


def _cut(box: F32, limit: F32) -> F32:
    low, high = limit[[0, 1, 0, 1]], limit[[2, 3, 2, 3]]
    return np.clip(box, low, high).astype(np.float32)


def _area(box: F32) -> float:
    return float(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]))


def _overlap(box: F32, other: F32) -> float:
    """Part of `box` that `other` covers."""
    low, high = np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])
    return _area(np.concatenate([low, high])) / max(_area(box), 1e-3)


def _visible(face: Face, matrix: F32, rows: int, columns: int) -> F32:
    """Where the part of `face` lies that its own picture (`rows` by `columns`) shows; faces may be cut by its border."""
    clipped = np.clip(face.outline, 0, (columns, rows)).astype(np.float32)
    moved = clipped @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([moved.min(0), moved.max(0)]).astype(np.float32)


def _cuts(rng: np.random.Generator, length: int, parts: int) -> list[int]:
    inner = [int(length * (i + rng.uniform(-0.25, 0.25)) / parts) for i in range(1, parts)]
    return [0, *inner, length]


def _scramble(rng: np.random.Generator, patch: U8) -> U8:
    """A face cut into parts in another order: the same colours and textures, but no face."""
    parts = int(rng.integers(3, 5))
    height, width = (patch.shape[0] // parts) * parts, (patch.shape[1] // parts) * parts
    if min(height, width) < parts * 2:
        return np.asarray(patch[::-1, ::-1], np.uint8)
    blocks = patch[:height, :width].reshape(parts, height // parts, parts, width // parts, 3).swapaxes(1, 2)
    order = rng.permutation(parts * parts)
    mixed = blocks.reshape(parts * parts, height // parts, width // parts, 3)[order]
    if rng.random() < 0.5:
        mixed = mixed[:, ::-1]
    out = patch.copy()
    out[:height, :width] = (
        mixed.reshape(parts, parts, height // parts, width // parts, 3)
        .swapaxes(1, 2)
        .reshape(height, width, 3)
    )
    return np.asarray(out, np.uint8)
