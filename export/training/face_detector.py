"""Training and export of the built-in face detector.

    python -m lp_edge.export.training.face_detector --data ../shared/faces --out DIR [--resume] [--steps N]

A small anchor-free network (dense 3x3 convolutions, ReLU) with outputs at strides 16, 32 and 64. Every cell gives a
score, a box (offset of its centre and logarithm of its sides) and five points; decoding is part of the exported graph,
non-maximum suppression is not. Scores learn the overlap of the predicted with the labelled box (quality focal loss,
Li et al. 2020, arXiv 2006.04388), boxes GIoU (Rezatofighi et al. 2019, arXiv 1902.09630), points a smooth L1 distance
in units of the face size. Weights are averaged over the steps (EMA) and checkpoints are written whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253
import torch  # noqa: TID253
from onnx import TensorProto, helper, numpy_helper  # noqa: TID253
from torch import nn  # noqa: TID253
from torch.nn import functional  # noqa: TID253

from lp_edge.engines import names
from lp_edge.errors import ConfigError
from lp_edge.export.onnx_export import Shape
from lp_edge.export.training.detector_data import (
    IGNORED,
    POSITIVE,
    STRIDES,
    Corpus,
    Painter,
    assign,
    cell_centres,
    load_corpus,
    load_labels,
    read_rgb,
)

F32 = npt.NDArray[np.float32]

BOX_UNIT = 4.0
"""Sides and points are predicted in units of BOX_UNIT strides."""
LOG_LIMIT = 3.0
OUTPUTS = 1 + 4 + 10
CELLS = "5*H*W//1024+(H+32)//64*((W+32)//64)"
"""Number of cells at all strides of a picture [H,W] (multiples of 32): H·W/16² + H·W/32² + ⌈H/64⌉·⌈W/64⌉."""
SHAPES: dict[str, Shape] = {
    names.BOXES: ("N", CELLS, 4),
    names.SCORES: ("N", CELLS),
    names.POINTS: ("N", CELLS, 5, 2),
}
"""Outputs of the graph, M = CELLS."""


@dataclass(frozen=True)
class NetConfig:
    """Channels after the first and second convolution, per stage (strides 8, 16, 32, 64) and in the heads; blocks per
    stage."""

    stem: tuple[int, int] = (16, 16)
    stages: tuple[int, int, int, int] = (32, 48, 80, 80)
    blocks: tuple[int, int, int, int] = (1, 2, 2, 1)
    head: int = 48


@dataclass(frozen=True)
class TrainConfig:
    """How the detector is trained; `steps` is the whole budget, over which the learning rate falls as a cosine."""

    steps: int = 14600
    batch: int = 16
    side: int = 320
    large_every: int = 3
    """Every so many steps the batch shows 640x640 pictures (a quarter as many)."""
    rate: float = 2e-3
    decay: float = 0.02
    warmup: int = 300
    average: float = 0.9985
    freeze: float = 0.75
    """From this part of the steps on, normalisation uses the averaged statistics, as the exported graph does. Batches of
    few, very different pictures have statistics of their own; without this phase scores fall when they are gone."""
    frozen_rate: float = 0.3
    """Learning rate with which that phase begins, as a part of `rate`."""
    seed: int = 1
    checkpoint_s: float = 180.0
    evaluate_s: float = 360.0
    workers: int = 1


class ConvNorm(nn.Module):
    """Convolution (no bias), batch normalisation and, if `relu`, a ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Any) -> Any:
        """[N,inputs,H,W] to [N,outputs,H/stride,W/stride]."""
        y = self.norm(self.conv(x))
        return functional.relu(y) if self.relu else y

    def folded(self) -> tuple[F32, F32]:
        """Weight and bias of the one convolution that equals this module at inference."""
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        weight = self.conv.weight * scale[:, None, None, None]
        bias = self.norm.bias - self.norm.running_mean * scale
        return weight.detach().float().numpy(), bias.detach().float().numpy()


class Block(nn.Module):
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = ConvNorm(channels, channels)
        self.two = ConvNorm(channels, channels, relu=False)
        nn.init.zeros_(self.two.norm.weight)

    def forward(self, x: Any) -> Any:
        """[N,C,H,W] to [N,C,H,W]."""
        return functional.relu(x + self.two(self.one(x)))


class DetectorNet(nn.Module):
    """The network without decoding: float [N,3,H,W] in 0…255 to float [N,M,15] (score logit, box 4, points 10)."""

    def __init__(self, config: NetConfig | None = None) -> None:
        super().__init__()
        config = config or NetConfig()
        self.config = config
        first, second = config.stem
        self.stem = nn.Sequential(ConvNorm(3, first, 3, 2), ConvNorm(first, second, 3, 2))
        self.stages = nn.ModuleList()
        inputs = second
        for channels, blocks in zip(config.stages, config.blocks, strict=True):
            self.stages.append(
                nn.Sequential(ConvNorm(inputs, channels, 3, 2), *(Block(channels) for _ in range(blocks)))
            )
            inputs = channels
        self.lateral = nn.ModuleList(ConvNorm(c, config.head, 1, relu=False) for c in config.stages[1:])
        self.head = nn.Sequential(ConvNorm(config.head, config.head), ConvNorm(config.head, config.head))
        self.out = nn.Conv2d(config.head, OUTPUTS, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)
        nn.init.constant_(self.out.bias[:1], -4.0)

    def forward(self, image: Any) -> Any:
        """float [N,3,H,W] (0…255, H and W multiples of 32) to float32 [N,M,15], cells as in `cell_centres`."""
        x = self.stem(image * (1 / 128) - 1)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        fine, middle, coarse = (
            lateral(level) for lateral, level in zip(self.lateral, levels[1:], strict=True)
        )
        fine = fine + functional.interpolate(middle, scale_factor=2.0, mode="nearest")
        outputs = []
        for level in (fine, middle, coarse):
            y = self.out(self.head(functional.relu(level)))
            outputs.append(y.permute(0, 2, 3, 1).flatten(1, 2))
        return torch.cat(outputs, 1).float()


def decode(raw: Any, centres: Any, strides: Any) -> tuple[Any, Any]:
    """Raw outputs [...,M,15] to boxes [...,M,4] (x0, y0, x1, y1) and points [...,M,5,2] in pixels.

    Centre = cell centre + offset·stride; sides = exp(raw)·4·stride; points = cell centre + raw·4·stride.
    """
    middle = centres + raw[..., 1:3] * strides[:, None]
    half = torch.exp(raw[..., 3:5].clamp(-LOG_LIMIT, LOG_LIMIT)) * (strides[:, None] * (BOX_UNIT / 2))
    points = raw[..., 5:].unflatten(-1, (5, 2)) * (strides * BOX_UNIT)[:, None, None] + centres[:, None, :]
    return torch.cat([middle - half, middle + half], -1), points


def overlaps(boxes: Any, others: Any) -> tuple[Any, Any]:
    """IoU and GIoU [K] of `boxes` [K,4] with `others` [K,4], pair by pair."""
    low, high = torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (others[:, 2:] - others[:, :2]).prod(1) - common
    iou = common / union.clamp(min=1e-6)
    hull = (torch.maximum(boxes[:, 2:], others[:, 2:]) - torch.minimum(boxes[:, :2], others[:, :2])).prod(1)
    return iou, iou - (hull - union) / hull.clamp(min=1e-6)


def losses(raw: Any, batch: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Score, box and point loss (scalars) of raw outputs [N,M,15] for a batch of `batches`."""
    kinds, boxes, points = batch["kinds"], batch["boxes"], batch["points"]
    positive = kinds == POSITIVE
    count = max(1, int(positive.sum()))
    target = torch.zeros_like(raw[..., 0])
    box_loss = point_loss = raw.sum() * 0
    if bool(positive.any()):
        predicted, spots = decode(raw, batch["centres"], batch["strides"])
        iou, giou = overlaps(predicted[positive], boxes[positive])
        target[positive] = 0.25 + 0.75 * iou.detach().clamp(0, 1)
        box_loss = (1 - giou).sum() / count
        truth = points[positive]
        size = (boxes[positive][:, 2:] - boxes[positive][:, :2]).prod(1).sqrt()[:, None, None]
        seen = batch["seen"][positive][..., None].float()
        difference = functional.smooth_l1_loss(
            spots[positive] / size, truth / size, reduction="none", beta=0.05
        )
        point_loss = (difference * seen).sum() / (seen.sum() * 2).clamp(min=1)
    logit = raw[..., 0]
    entropy = functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
    # Three of four cells belong to the finest stride and so do nearly all false finds, while large faces are few cells
    # each: without this balance one threshold would not suit all sizes.
    coarse = batch["strides"] > STRIDES[0]
    balance = torch.where(positive & coarse, 2.0, torch.where(positive | coarse, 1.0, 1.5))
    weight = (torch.sigmoid(logit) - target).abs().pow(2) * balance * (kinds != IGNORED)
    return (entropy * weight).sum() / count, box_loss, point_loss


# --- batches -----------------------------------------------------------------------------------------------------


def make_batch(painter: Painter, config: TrainConfig, step: int) -> dict[str, Any]:
    """The batch of `step`: uint8 image [N,H,W,3] and per cell the kind, box, points and which points count."""
    large = config.large_every > 0 and step % config.large_every == config.large_every - 1
    side = config.side * 2 if large else config.side
    count = max(1, config.batch // 4) if large else config.batch
    centres, strides = cell_centres(side, side)
    images, kinds, boxes, points = [], [], [], []
    for index in range(count):
        rng = np.random.default_rng([config.seed, step, index])
        sample = painter.draw(rng, side, side)
        kind, owner = assign(sample.boxes, sample.ignored, side, side)
        images.append(sample.image)
        kinds.append(kind)
        none = len(sample.boxes) == 0
        boxes.append(np.zeros((len(kind), 4), np.float32) if none else sample.boxes[owner])
        points.append(np.zeros((len(kind), 5, 2), np.float32) if none else sample.points[owner])
    spots = np.stack(points)
    seen = ((spots > -8) & (spots < side + 8)).all(-1)
    arrays = {"image": np.stack(images), "kinds": np.stack(kinds), "boxes": np.stack(boxes), "points": spots,
              "seen": seen, "centres": centres, "strides": strides}  # fmt: skip
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


class _Batches(torch.utils.data.IterableDataset):
    def __init__(self, corpus: Corpus, config: TrainConfig, first: int) -> None:
        self.corpus, self.config, self.first = corpus, config, first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        cv2.setNumThreads(1)
        painter = Painter(self.corpus, self.config.seed)
        info = torch.utils.data.get_worker_info()
        start, stride = (0, 1) if info is None else (info.id, info.num_workers)
        for step in range(self.first + start, self.config.steps, stride):
            yield make_batch(painter, self.config, step)


def batches(corpus: Corpus, config: TrainConfig, first: int) -> Iterator[dict[str, Any]]:
    """Batches of the steps `first` … `config.steps` - 1, drawn in `config.workers` processes (0: in this one)."""
    loader = torch.utils.data.DataLoader(
        _Batches(corpus, config, first),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
    )
    return iter(loader)


# --- measuring ---------------------------------------------------------------------------------------------------


def box_ious(boxes: F32, others: F32) -> F32:
    """IoU float32 [A,B] of every box of `boxes` [A,4] with every one of `others` [B,4]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    area, other = (boxes[:, 2:] - boxes[:, :2]).prod(1), (others[:, 2:] - others[:, :2]).prod(1)
    return np.asarray(common / np.maximum(area[:, None] + other[None] - common, 1e-6), np.float32)


def suppress(boxes: F32, scores: F32, limit: float = 0.45) -> npt.NDArray[np.int64]:
    """Indices, best first, of the boxes that remain after greedy non-maximum suppression at IoU `limit`."""
    order = np.argsort(-scores, kind="stable")
    kept = []
    while len(order):
        kept.append(order[0])
        order = order[1:][box_ious(boxes[order[:1]], boxes[order[1:]])[0] <= limit]
    return np.array(kept, np.int64)


def letterboxed(image: npt.NDArray[np.uint8], side: int = 640) -> tuple[npt.NDArray[np.uint8], float]:
    """`image` shrunk (never enlarged) to at most `side` and zero-padded at right and bottom to `side` by `side`."""
    ratio = min(1.0, side / max(image.shape[:2]))
    if ratio < 1:
        size = (round(image.shape[1] * ratio), round(image.shape[0] * ratio))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas, ratio


def detect(net: Any, image: npt.NDArray[np.uint8], floor: float = 0.05) -> tuple[F32, F32, F32]:
    """Boxes [K,4], scores [K] and points [K,5,2] in pixels of `image` by the torch network, after suppression."""
    canvas, ratio = letterboxed(image)
    centres, strides = (torch.from_numpy(a) for a in cell_centres(*canvas.shape[:2]))
    with torch.no_grad():
        raw = net(torch.from_numpy(canvas).permute(2, 0, 1)[None].float())[0]
        boxes, points = decode(raw, centres, strides)
        scores = torch.sigmoid(raw[:, 0])
    keep = (scores > floor).numpy()
    found, sure, spots = boxes.numpy()[keep], scores.numpy()[keep], points.numpy()[keep]
    kept = suppress(found, sure)
    return found[kept] / ratio, sure[kept], spots[kept] / ratio


def evaluate(net: Any, data: Path, split: str = "val") -> dict[str, Any]:
    """Recall at IoU 0.5 and false positives per 100 frames over score thresholds, on the frames of `split`."""
    frames = [entry for entry in load_labels(data)[0] if entry["split"] == split]
    thresholds = [0.2, 0.3, 0.4, 0.5, 0.6]
    hits, false = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    faces, quality, error = 0, [], []
    for entry in frames:
        boxes, scores, points = detect(net, read_rgb(data / entry["file"]))
        truth = np.array([f["box"] for f in entry["faces"]], np.float32).reshape(-1, 4)
        spots = np.array([f["points"] for f in entry["faces"]], np.float32).reshape(-1, 5, 2)
        faces += len(truth)
        pairs = box_ious(boxes, truth)
        for row, threshold in enumerate(thresholds):
            taken: set[int] = set()
            for index in np.flatnonzero(scores >= threshold):
                free = [t for t in range(len(truth)) if t not in taken and pairs[index, t] >= 0.5]
                if not free:
                    false[row] += 1
                    continue
                best = max(free, key=lambda t: float(pairs[index, t]))
                taken.add(best)
                if row == 0:
                    quality.append(float(pairs[index, best]))
                    apart = float(np.linalg.norm(spots[best, 0] - spots[best, 1]))
                    error.append(float(np.linalg.norm(points[index] - spots[best], axis=1).mean()) / apart)
            hits[row] += len(taken)
    return {
        "frames": len(frames),
        "faces": faces,
        "thresholds": thresholds,
        "recall": [round(float(h) / max(1, faces), 4) for h in hits],
        "false_per_100": [round(100 * float(f) / max(1, len(frames)), 2) for f in false],
        "mean_iou": round(float(np.mean(quality)) if quality else 0.0, 4),
        "point_error_pct": round(100 * float(np.mean(error)) if error else math.nan, 2),
    }


# --- export ------------------------------------------------------------------------------------------------------


class _Graph:
    """Collects nodes and constants of the ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, list(inputs), [name], name=f"n{len(self.nodes)}", **attributes)
        )
        return name

    def constant(self, value: Any, name: str | None = None) -> str:
        array = np.asarray(value)
        name = name or f"c_{array.dtype.name}_{'_'.join(str(v) for v in array.ravel().tolist())}_{array.ndim}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, weight: F32, bias: F32, stride: int, label: str) -> str:
        pad = weight.shape[2] // 2
        if f"{label}.weight" not in self.constants:
            self.constant(np.ascontiguousarray(weight), f"{label}.weight")
            self.constant(np.ascontiguousarray(bias), f"{label}.bias")
        return self.node("Conv", x, f"{label}.weight", f"{label}.bias", kernel_shape=list(weight.shape[2:]),
                         strides=[stride, stride], pads=[pad] * 4)  # fmt: skip

    def module(self, x: str, module: Any, label: str) -> str:
        """The nodes of a ConvNorm, a Block or a sequence of them."""
        if isinstance(module, ConvNorm):
            y = self.conv(x, *module.folded(), int(module.conv.stride[0]), label)
            return self.node("Relu", y) if module.relu else y
        if isinstance(module, Block):
            y = self.module(self.module(x, module.one, f"{label}.one"), module.two, f"{label}.two")
            return self.node("Relu", self.node("Add", x, y))
        for index, part in enumerate(module):
            x = self.module(x, part, f"{label}.{index}")
        return x

    def grid(self, level: str, stride: int) -> str:
        """Cell centres float32 [1,h·w,2] in pixels of a feature map [N,C,h,w], from its run-time shape."""
        shape = self.node("Shape", level)
        axes = []
        for axis in (3, 2):
            length = self.node("Gather", shape, self.constant(np.int64(axis)), axis=0)
            steps = self.node("Range", self.constant(np.int64(0)), length, self.constant(np.int64(1)))
            line = self.node("Cast", steps, to=TensorProto.FLOAT)
            line = self.node("Mul", line, self.constant(np.float32(stride)))
            line = self.node("Add", line, self.constant(np.float32(stride / 2)))
            form = self.constant(np.array([1, -1, 1] if axis == 3 else [-1, 1, 1], np.int64))
            axes.append(self.node("Reshape", line, form))
        zero = self.constant(np.float32(0))
        xs = self.node("Add", axes[0], self.node("Mul", axes[1], zero))
        ys = self.node("Add", axes[1], self.node("Mul", axes[0], zero))
        both = self.node("Concat", xs, ys, axis=2)
        return self.node("Reshape", both, self.constant(np.array([1, -1, 2], np.int64)))


def _part(graph: _Graph, x: str, start: int, end: int) -> str:
    """Channels `start` … `end` of the last axis of [N,M,15]."""
    return graph.node("Slice", x, *(graph.constant(np.array([v], np.int64)) for v in (start, end, 2)))


def to_onnx(net: DetectorNet) -> Any:
    """The ONNX model of `net`: opset 17, batch normalisation folded, decoding included.

    `image` uint8 [N,H,W,3] RGB, H and W multiples of 32, to `boxes` float32 [N,M,4] (x0, y0, x1, y1), `scores` float32
    [N,M] (probability) and `points` float32 [N,M,5,2], both in pixels of `image`; M is `CELLS`.
    """
    graph = _Graph()
    x = graph.node("Cast", "image", to=TensorProto.FLOAT)
    x = graph.node("Transpose", x, perm=[0, 3, 1, 2])
    x = graph.node(
        "Sub", graph.node("Mul", x, graph.constant(np.float32(1 / 128))), graph.constant(np.float32(1))
    )
    x = graph.module(x, net.stem, "stem")
    levels = []
    for index, stage in enumerate(net.stages):
        x = graph.module(x, stage, f"stage{index}")
        levels.append(x)
    fine, middle, coarse = (
        graph.module(level, lateral, f"lateral{index}")
        for index, (lateral, level) in enumerate(zip(net.lateral, levels[1:], strict=True))
    )
    scales = graph.constant(np.array([1, 1, 2, 2], np.float32), "twice")
    wide = graph.node("Resize", middle, "", scales, mode="nearest", nearest_mode="floor",
                      coordinate_transformation_mode="asymmetric")  # fmt: skip
    fine = graph.node("Add", fine, wide)
    weight, bias = net.out.weight.detach().float().numpy(), net.out.bias.detach().float().numpy()
    scores, boxes, points = [], [], []
    for level, stride in zip((fine, middle, coarse), STRIDES, strict=True):
        y = graph.module(graph.node("Relu", level), net.head, "head")
        y = graph.conv(y, weight, bias, 1, "out")
        centres = graph.grid(y, stride)
        y = graph.node("Transpose", y, perm=[0, 2, 3, 1])
        y = graph.node("Reshape", y, graph.constant(np.array([0, -1, OUTPUTS], np.int64), "rows"))
        scores.append(_part(graph, y, 0, 1))
        shift = graph.node("Mul", _part(graph, y, 1, 3), graph.constant(np.float32(stride)))
        centre = graph.node("Add", shift, centres)
        limits = graph.constant(np.float32(-LOG_LIMIT)), graph.constant(np.float32(LOG_LIMIT))
        half = graph.node("Exp", graph.node("Clip", _part(graph, y, 3, 5), *limits))
        half = graph.node("Mul", half, graph.constant(np.float32(stride * BOX_UNIT / 2)))
        boxes.append(
            graph.node("Concat", graph.node("Sub", centre, half), graph.node("Add", centre, half), axis=2)
        )
        spots = graph.node("Mul", _part(graph, y, 5, OUTPUTS), graph.constant(np.float32(stride * BOX_UNIT)))
        points.append(graph.node("Add", spots, graph.node("Concat", *[centres] * 5, axis=2)))
    graph.node("Concat", *boxes, output="boxes", axis=1)
    logits = graph.node("Reshape", graph.node("Concat", *scores, axis=1),
                        graph.constant(np.array([0, -1], np.int64), "flat"))  # fmt: skip
    graph.node("Sigmoid", logits, output="scores")
    graph.node("Reshape", graph.node("Concat", *points, axis=1),
               graph.constant(np.array([0, -1, 5, 2], np.int64), "pairs"), output="points")  # fmt: skip
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "face_detector",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()],
            list(graph.constants.values()),
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="lp_edge",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def write_whole(path: Path, write: Callable[[Any], None]) -> None:
    """Writes `path` through `write` (given a binary file) beside it, syncs and renames: never a half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def export(net: DetectorNet, path: Path) -> None:
    """Writes the ONNX model of `net` (in evaluation mode or not, running statistics are used) to `path`."""
    packed = to_onnx(net).SerializeToString()
    write_whole(path, lambda file: file.write(packed))


# --- training ----------------------------------------------------------------------------------------------------


def fix_statistics(net: Any) -> None:
    """From now on the batch normalisations of `net` use, and keep, their running statistics."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def frozen_from(config: TrainConfig) -> int:
    """First step with fixed normalisation."""
    return int(config.steps * config.freeze)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of `step`: linear warm-up, a cosine to 1 % of `rate` at `frozen_from`, then a smaller one."""
    first = frozen_from(config)
    if step < min(config.warmup, first):
        return config.rate * (step + 1) / config.warmup
    if step < first:
        high, part = config.rate, (step - config.warmup) / max(1, first - config.warmup)
    else:
        high, part = config.rate * config.frozen_rate, (step - first) / max(1, config.steps - first)
    low = config.rate * 0.01
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def train(data: Path, out: Path, config: TrainConfig, *, resume: bool = False, net_config: NetConfig | None = None,
          limit: int | None = None, say: Callable[[str], None] = print) -> Path:  # fmt: skip
    """Trains on the face data under `data`, writes checkpoints, log and `face_detector.onnx` to `out`, returns the path.

    `limit` bounds the pictures read (tests). Raises ConfigError when data is missing, when `resume` finds no checkpoint
    or one of another network.
    """
    corpus = load_corpus(data, "train", limit)
    torch.manual_seed(config.seed)
    net = DetectorNet(net_config).to(memory_format=torch.channels_last).train()
    mean = DetectorNet(net_config).eval()
    mean.load_state_dict(net.state_dict())
    plain = [p for p in net.parameters() if p.ndim > 1]
    other = [p for p in net.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": plain, "weight_decay": config.decay}, {"params": other, "weight_decay": 0.0}],
        lr=config.rate,
    )
    checkpoint, first, spent, frozen = out / "checkpoint.pt", 0, 0.0, False
    if resume:
        if not checkpoint.is_file():
            raise ConfigError(
                f"{checkpoint} does not exist", "expected a checkpoint to resume", "run without --resume"
            )
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["net_config"] != json.dumps(asdict(net.config)):
            raise ConfigError(
                f"{checkpoint} is of another network ({state['net_config']})",
                f"expected {json.dumps(asdict(net.config))}",
                "use another --out",
            )
        net.load_state_dict(state["net"])
        mean.load_state_dict(state["mean"])
        optimiser.load_state_dict(state["optimiser"])
        first, spent, frozen = int(state["step"]), float(state["seconds"]), bool(state.get("frozen", False))
        if frozen:
            fix_statistics(net)
    begin = time.monotonic() - spent
    last_saved = last_measured = time.monotonic()

    def save(step: int) -> None:
        state = {"net": net.state_dict(), "mean": mean.state_dict(), "optimiser": optimiser.state_dict(),
                 "step": step, "frozen": frozen, "seconds": time.monotonic() - begin, "net_config": json.dumps(asdict(net.config)),
                 "train_config": json.dumps(asdict(config))}  # fmt: skip
        write_whole(checkpoint, lambda file: torch.save(state, file))
        export(mean, out / "face_detector.onnx")

    def log(entry: dict[str, Any]) -> None:
        line = json.dumps(entry)
        say(line)
        with open(out / "log.jsonl", "a") as file:
            file.write(line + "\n")

    out.mkdir(parents=True, exist_ok=True)
    total = np.zeros(3)
    for step, batch in zip(range(first, config.steps), batches(corpus, config, first), strict=True):
        if not frozen and step >= frozen_from(config):
            net.load_state_dict(mean.state_dict())
            fix_statistics(net)
            frozen = True
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        image = batch["image"].permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            raw = net(image)
        score, box, point = losses(raw, batch)
        loss = score + 2.0 * box + 6.0 * point
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimiser.step()
        with torch.no_grad():
            keep = min(config.average, (step + 1) / (step + 20))
            current = net.state_dict()
            for name, value in mean.state_dict().items():
                new = current[name]
                if value.dtype.is_floating_point:
                    value.lerp_(new, 1 - keep)
                else:
                    value.copy_(new)
        total += [float(score.detach()), float(box.detach()), float(point.detach())]
        now = time.monotonic()
        if (step + 1) % 100 == 0:
            parts = dict(zip(("score", "box", "points"), (total / 100).round(4).tolist(), strict=True))
            log({"step": step + 1, "seconds": round(now - begin), **parts})
            total[:] = 0
        if now - last_saved > config.checkpoint_s:
            save(step + 1)
            last_saved = now
        if now - last_measured > config.evaluate_s:
            log({"step": step + 1, "seconds": round(now - begin), **evaluate(mean, data)})
            last_measured = time.monotonic()
    save(config.steps)
    if limit is None:
        log({"step": config.steps, "seconds": round(time.monotonic() - begin), **evaluate(mean, data)})
    return out / "face_detector.onnx"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train the built-in face detector and write its ONNX graph.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with detect.json, mesh.json and pictures"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint, log and face_detector.onnx"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--batch", type=int, default=TrainConfig.batch)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument(
        "--workers", type=int, default=TrainConfig.workers, help="processes that draw pictures"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    config = replace(
        TrainConfig(), steps=chosen.steps, batch=chosen.batch, seed=chosen.seed, workers=chosen.workers
    )
    try:
        train(chosen.data, chosen.out, config, resume=chosen.resume)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
