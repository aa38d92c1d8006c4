"""Training samples of the face-mesh network: reading the shared face data, positives, negatives, batches.

No torch here. Batch ``i`` of a run depends only on (seed, i, configuration), so a resumed run sees the batches
that an uninterrupted one would have seen, and any number of processes may produce them.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.export.training import face_topology as topo
from lp_edge.export.training.augment import (
    F32,
    U8,
    AugmentConfig,
    crop_matrix,
    face_frame,
    random_colour,
    random_geometry,
    random_occlusion,
)


@dataclass(frozen=True)
class SampleConfig:
    """What the batches hold: crop size, batch size, seed, share of crops without a face, augmentation."""

    size: int = 160
    batch: int = 48
    seed: int = 1
    negatives: float = 0.08
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class Batch:
    """images uint8 [n, size, size, 3] RGB, points float32 [n, 478, 3] (zeros without a face), face float32 [n]."""

    images: U8
    points: F32
    face: F32


def read_rgb(path: Path) -> U8:
    """A picture as uint8 [h, w, 3] RGB; ``FileNotFoundError`` when it cannot be read."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(
            f"{path} is missing or no picture; --data must name the folder with mesh.json"
        )
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def _content(image: U8) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the part inside the black bars that padding left at the rim."""
    lit = image.max(2) > 24
    rows, columns = np.flatnonzero(lit.mean(1) > 0.02), np.flatnonzero(lit.mean(0) > 0.02)
    h, w = image.shape[:2]
    if rows.size < h // 3 or columns.size < w // 3:
        return 0, 0, w, h
    x0, y0, x1, y1 = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    # Two pixels of the bar's blurred edge go with it.
    return x0 + 2 * (x0 > 0), y0 + 2 * (y0 > 0), x1 - 2 * (x1 < w), y1 - 2 * (y1 < h)


@dataclass(frozen=True)
class FaceSet:
    """Labelled crops: pictures uint8 [h, w, 3], points float32 [n, 478, 3] in each one's pixels, draw weights [n]."""

    images: list[U8]
    points: F32
    weights: npt.NDArray[np.float64]


def _pairs_over_width(points: F32, pairs: tuple[tuple[int, int], ...], corners: tuple[int, int]) -> F32:
    gap = np.mean([np.linalg.norm(points[:, a, :2] - points[:, b, :2], axis=1) for a, b in pairs], 0)
    out: F32 = gap / np.linalg.norm(points[:, corners[0], :2] - points[:, corners[1], :2], axis=1)
    return out


def load_faces(data: Path, split: str) -> FaceSet:
    """The crops of one split of ``mesh.json``.

    Draw weights favour clips with few frames and stills (weight of a clip ~ square root of its frames), and
    frames with closed or half-closed eyes, wide mouths or turned heads, which are rare.
    """
    entries = json.loads((data / "mesh.json").read_text())
    labels = np.load(data / "mesh_landmarks.npy").astype(np.float32)
    chosen = [i for i, e in enumerate(entries) if e["split"] == split]
    images, points = [], []
    for i in chosen:
        image = read_rgb(data / entries[i]["file"])
        x0, y0, x1, y1 = _content(image)
        images.append(np.ascontiguousarray(image[y0:y1, x0:x1]))
        points.append(labels[i] - np.array([x0, y0, 0], np.float32))
    p = np.stack(points)
    keys = [(entries[i]["origin"], entries[i]["path"]) for i in chosen]
    count = Counter(keys)
    weights = np.array([count[k] ** -0.5 for k in keys])
    right = _pairs_over_width(p, topo.RIGHT_LIDS[:3], topo.RIGHT_EYE_CORNERS)
    left = _pairs_over_width(p, topo.LEFT_LIDS[:3], topo.LEFT_EYE_CORNERS)
    weights *= np.where((right + left) / 2 < 0.2, 2.5, 1.0)
    weights *= np.where(_pairs_over_width(p, topo.LIP_GAPS[:1], topo.MOUTH_CORNERS) > 0.4, 1.5, 1.0)
    eyes = p[:, 473] - p[:, 468]
    turned = np.abs(np.degrees(np.arctan2(eyes[:, 2], np.hypot(eyes[:, 0], eyes[:, 1])))) > 18
    weights *= np.where(turned, 1.6, 1.0)
    return FaceSet(images, p, weights / weights.sum())


@dataclass(frozen=True)
class Scene:
    """A whole picture and the boxes [n, 4] (x0, y0, x1, y1) of all faces in it."""

    image: U8
    boxes: F32


def load_scenes(data: Path, split: str, longest: int = 400) -> list[Scene]:
    """The frames of one split of ``detect.json``, reduced to ``longest`` pixels, for crops without a face."""
    out = []
    for entry in json.loads((data / "detect.json").read_text()):
        if entry["split"] != split:
            continue
        image = read_rgb(data / entry["file"])
        k = min(1.0, longest / max(image.shape[:2]))
        boxes = np.array([f["box"] for f in entry["faces"]], np.float32).reshape(-1, 4) * k
        small = cv2.resize(image, None, fx=k, fy=k, interpolation=cv2.INTER_AREA)
        out.append(Scene(np.asarray(small, np.uint8), boxes))
    return out


def _overlap(box: tuple[float, float, float, float], boxes: F32) -> float:
    if not len(boxes):
        return 0.0
    w = np.minimum(boxes[:, 2], box[2]) - np.maximum(boxes[:, 0], box[0])
    h = np.minimum(boxes[:, 3], box[3]) - np.maximum(boxes[:, 1], box[1])
    both = np.clip(w, 0, None) * np.clip(h, 0, None)
    union = (box[2] - box[0]) * (box[3] - box[1]) + np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) - both
    return float((both / np.maximum(union, 1e-6)).max())


def negative_crop(rng: np.random.Generator, scenes: list[Scene], size: int) -> U8:
    """A crop that must score low: background, hair, body, a badly placed face, noise or a flat picture."""
    if not scenes or rng.random() < 0.08:
        colour = rng.integers(0, 256, 3)
        noise = rng.normal(0, rng.uniform(0, 70), (int(rng.integers(2, 40)),) * 2 + (3,))
        flat = np.clip(noise + colour, 0, 255).astype(np.uint8)
        return np.asarray(cv2.resize(flat, (size, size), interpolation=cv2.INTER_LINEAR), np.uint8)
    for _ in range(60):
        scene = scenes[int(rng.integers(len(scenes)))]
        h, w = scene.image.shape[:2]
        side = math.exp(rng.uniform(math.log(0.12), math.log(1.6))) * min(h, w)
        cx, cy = rng.uniform(0, w), rng.uniform(0, h)
        half = side / 3  # a crop that fits has the face's box in its inner two thirds
        if _overlap((cx - half, cy - half, cx + half, cy + half), scene.boxes) > 0.22:
            continue
        matrix = crop_matrix(np.array([cx, cy], np.float32), side, rng.normal(0, 0.4), size)
        border = cv2.BORDER_CONSTANT if rng.random() < 0.5 else cv2.BORDER_REPLICATE
        crop = cv2.warpAffine(scene.image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)
        return np.asarray(crop, np.uint8)
    return np.full((size, size, 3), rng.integers(0, 256), np.uint8)


def make_batch(step: int, config: SampleConfig, faces: FaceSet, scenes: list[Scene]) -> Batch:
    """Batch number ``step`` of a run (deterministic)."""
    rng = np.random.default_rng([config.seed, step])
    images = np.empty((config.batch, config.size, config.size, 3), np.uint8)
    points = np.zeros((config.batch, topo.POINTS, 3), np.float32)
    face = np.ones(config.batch, np.float32)
    drawn = rng.choice(len(faces.images), config.batch, p=faces.weights)
    for k, i in enumerate(drawn):
        if rng.random() < config.negatives:
            images[k] = random_colour(rng, negative_crop(rng, scenes, config.size))
            face[k] = 0.0
            continue
        image, points[k] = random_geometry(rng, faces.images[i], faces.points[i], config.size, config.augment)
        late = rng.random() < 0.5
        hidden = rng.random() < config.augment.occlusion
        if hidden and not late:
            image = random_occlusion(rng, image, points[k])
        image = random_colour(rng, image)
        if hidden and late:
            image = random_occlusion(rng, image, points[k])
        images[k] = image
    return Batch(images, points, face)


def _produce(data: str, config: SampleConfig, first: int, stop: int, out: Any) -> None:
    cv2.setNumThreads(1)
    try:
        faces, scenes = load_faces(Path(data), "train"), load_scenes(Path(data), "train")
        parent = os.getppid()
        for step in range(first, stop):
            batch = make_batch(step, config, faces, scenes)
            while True:
                try:
                    out.put((step, batch), timeout=5)
                    break
                except queue.Full:
                    if os.getppid() != parent:  # the training process is gone
                        return
    except BaseException as error:  # handed to the consumer, which raises it
        out.put((-1, repr(error)))
        raise


def batches(data: Path, config: SampleConfig, first: int, stop: int, workers: int) -> Iterator[Batch]:
    """Batches ``first`` .. ``stop - 1``; with ``workers`` = 1 a process prepares them ahead, with 0 none does."""
    if workers == 0:
        faces, scenes = load_faces(data, "train"), load_scenes(data, "train")
        for step in range(first, stop):
            yield make_batch(step, config, faces, scenes)
        return
    context = multiprocessing.get_context("spawn")
    ready: Any = context.Queue(maxsize=12)
    process: BaseProcess = context.Process(
        target=_produce, args=(str(data), config, first, stop, ready), daemon=True
    )
    process.start()
    try:
        for expected in range(first, stop):
            while True:
                try:
                    step, batch = ready.get(timeout=10)
                    break
                except queue.Empty:
                    if not process.is_alive():
                        raise RuntimeError(
                            f"the process that prepares samples ended (code {process.exitcode}); see its traceback"
                        ) from None
            if step != expected:
                raise RuntimeError(f"preparing samples failed at step {expected}: {batch}")
            yield batch
    finally:
        process.terminate()
        process.join(5)


def level_crop(image: U8, points: F32 | None, size: int) -> tuple[U8, F32]:
    """The crop of the runtime: from a previous result ``points``, or the centred start crop when there is none.

    Returns the crop uint8 [size, size, 3] and the 2x3 matrix from picture to crop.
    """
    if points is None:
        h, w = image.shape[:2]
        roll, centre, side = 0.0, np.array([w / 2, h / 2], np.float32), 1.5 * 0.53 * max(h, w)
    else:
        roll, centre, side = face_frame(points)
    matrix = crop_matrix(centre, side, roll, size)
    return np.asarray(cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR), np.uint8), matrix


def back_to_picture(points: F32, matrix: F32) -> F32:
    """Points [478, 3] of a crop in the pixels of the picture it was cut from (z in the same unit)."""
    inverse = cv2.invertAffineTransform(matrix)
    unit = math.sqrt(abs(float(np.linalg.det(inverse[:, :2]))))
    out = np.empty_like(points)
    out[:, :2] = points[:, :2] @ inverse[:, :2].T + inverse[:, 2]
    out[:, 2] = points[:, 2] * unit
    return out
