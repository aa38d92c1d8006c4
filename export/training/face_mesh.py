"""Train and export the built-in face-mesh network: 478 points in three dimensions and a face score from one crop.

    python -m lp_edge.export.training.face_mesh --data ../shared/faces --out DIR [--resume] [--steps N]

Run time: about 90 minutes on two busy cores (one for the network, a third of one for the samples), bfloat16
autocast. A run is seeded; a run stopped and resumed gives the weights of one that was not stopped.
``--export-only`` writes the ONNX file from the last checkpoint, ``--measure`` measures an exported one.

The network: a small residual encoder, a top-down path to an eighth of the crop's side, where ``ANCHORS`` get
one spatial-softmax map each; their expected positions (a linear shape fit, started from ridge regression on the
training shapes) plus a correction from pooled local and global features through a basis of principal components
give all points. Only convolutions, ReLU, softmax and matrix products remain in the exported graph.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from lp_edge.engines import names
from lp_edge.export.onnx_export import Shape, save, state_shapes
from lp_edge.export.training import face_topology as topo
from lp_edge.export.training.augment import F32, U8, AugmentConfig, crop_matrix, face_frame, random_geometry
from lp_edge.export.training.face_mesh_data import (
    Batch,
    FaceSet,
    SampleConfig,
    back_to_picture,
    batches,
    level_crop,
    load_faces,
    load_scenes,
    negative_crop,
    read_rgb,
)

SHAPES: dict[str, Shape] = {names.POINTS: ("N", topo.POINTS, 3), names.SCORE: ("N", 1)}
"""Outputs of the graph."""

# fmt: off
ANCHORS: tuple[int, ...] = (
    33, 133, 159, 145, 158, 153, 160, 144, 157, 154, 161, 163,
    362, 263, 386, 374, 385, 380, 387, 373, 384, 381, 388, 390,
    468, 469, 470, 471, 472, 473, 474, 475, 476, 477,
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,
    168, 6, 4, 1, 2, 98, 327, 48, 278,
    61, 291, 0, 17, 37, 267, 84, 314, 40, 270, 91, 321,
    13, 14, 78, 308, 82, 312, 87, 317, 81, 311, 178, 402,
    10, 152, 234, 454, 132, 361, 58, 288, 172, 397, 150, 379, 54, 284, 67, 297, 50, 280,
    9,
)
POOLED: tuple[int, ...] = (33, 133, 468, 159, 145, 362, 263, 473, 386, 374, 61, 291, 13, 14, 105, 334)
# fmt: on


@dataclass(frozen=True)
class NetConfig:
    """Sizes of the network: crop side in pixels, channels of the stages, of the top-down path and of the head.

    ``prior_draws``: random shapes that the shape prior is fitted to.
    """

    size: int = 160
    stem: int = 16
    channels: tuple[int, int, int, int] = (24, 48, 72, 96)
    path: int = 48
    squeeze: int = 24
    hidden: int = 128
    basis: int = 96
    prior_draws: int = 6000


@dataclass(frozen=True)
class TrainConfig:
    """Schedule and loss weights of a run (``steps`` fixes the end of the cosine)."""

    steps: int = 10000
    warmup: int = 400
    rate: float = 2e-3
    decay: float = 0.03
    ema: float = 0.9985
    depth: float = 0.5
    gaps: float = 1.0
    drives: float = 1.0
    anchors: float = 0.35
    score: float = 3.0
    checkpoint_s: float = 180.0
    report: int = 500


def _conv(i: int, o: int, stride: int = 1, kernel: int = 3, relu: bool = True) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*parts, nn.ReLU(inplace=True)) if relu else nn.Sequential(*parts)


class _Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(i, o, stride)
        self.second = _conv(o, o, relu=False)
        self.skip = _conv(i, o, stride, 1, False) if stride > 1 or i != o else nn.Identity()
        nn.init.zeros_(cast(nn.BatchNorm2d, self.second[1]).weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.skip(x))


@dataclass(frozen=True)
class ShapePrior:
    """Where the head starts, in units of half a crop about its middle.

    ``fit`` [1434, 2A] and ``mean`` [1434]: all points from anchor positions; ``basis`` [1434, K]: principal
    components scaled by their standard deviations.
    """

    fit: F32
    mean: F32
    basis: F32


def shape_prior(points: F32, basis: int, seed: int = 0, draws: int = 6000) -> ShapePrior:
    """Ridge regression and principal components from training shapes [n, 478, 3], levelled and centred, then
    turned, scaled and shifted at random as crops are; the ridge is that of 1 % noise on every anchor."""
    rng = np.random.default_rng(seed)
    shapes = []
    for k in range(draws):
        p = points[int(rng.integers(len(points)))]
        roll, centre, side = face_frame(p)
        side *= math.exp(rng.uniform(-0.16, 0.25))
        m = crop_matrix(
            (centre + rng.uniform(-0.1, 0.1, 2) * side).astype(np.float32),
            side,
            roll + rng.normal(0, 0.25),
            2,
        )
        q = np.concatenate([p[:, :2] @ m[:, :2].T + m[:, 2] - 1, p[:, 2:] * (2 / side)], 1)
        if k % 2:
            q = q[topo.mirror_permutation()] * np.array([-1, 1, 1])
        shapes.append(q)
    y = np.stack(shapes).reshape(len(shapes), -1)
    x = np.stack(shapes)[:, list(ANCHORS), :2].reshape(len(shapes), -1)
    mean, at = y.mean(0), x.mean(0)
    gram = (x - at).T @ (x - at) + len(x) * 0.01**2 * np.eye(x.shape[1])
    fit = np.linalg.solve(gram, (x - at).T @ (y - mean)).T
    _, s, v = np.linalg.svd(y[: draws // 2] - mean, full_matrices=False)
    components = v[:basis].T * (s[:basis] / math.sqrt(draws // 2))
    return ShapePrior(
        fit.astype(np.float32), (mean - fit @ at).astype(np.float32), components.astype(np.float32)
    )


class FaceMeshNet(nn.Module):
    """uint8 [n, S, S, 3] RGB to points [n, 478, 3] in crop pixels, score logit [n, 1], anchors [n, A, 2] px."""

    centre: Tensor
    places: Tensor

    def __init__(self, config: NetConfig, prior: ShapePrior | None = None) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        self.stem = _conv(3, config.stem, 2)
        self.stages = nn.ModuleList()
        last = config.stem
        for width in c:
            self.stages.append(nn.Sequential(_Block(last, width, 2), _Block(width, width, 1)))
            last = width
        f = config.path
        self.lateral = nn.ModuleList([nn.Conv2d(w, f, 1) for w in c[1:]])
        self.smooth = nn.ModuleList([_conv(f, f) for _ in range(2)])
        self.maps = nn.Conv2d(f, len(ANCHORS), 1)
        self.squeeze = _conv(c[3], config.squeeze, 1, 1)
        cells = (config.size // 32) ** 2
        self.hidden = nn.Linear(config.squeeze * cells + len(POOLED) * f + 2 * len(ANCHORS), config.hidden)
        self.coefficients = nn.Linear(config.hidden, config.basis)
        self.basis = nn.Linear(config.basis, topo.POINTS * 3, bias=False)
        self.fit = nn.Linear(2 * len(ANCHORS), topo.POINTS * 3)
        self.face = nn.Sequential(nn.Linear(c[3], 32), nn.ReLU(), nn.Linear(32, 1))
        n = config.size // 8
        line = (torch.arange(n, dtype=torch.float32) + 0.5) / n * 2 - 1
        grid = torch.stack([line.repeat(n), line.repeat_interleave(n)], 1)
        self.register_buffer("places", grid, persistent=False)
        self.register_buffer("centre", torch.tensor([1.0, 1.0, 0.0]), persistent=False)
        self.pooled = [ANCHORS.index(p) for p in POOLED]
        with torch.no_grad():
            self.coefficients.weight.mul_(0.1)
            self.coefficients.bias.zero_()
            if prior is not None:
                self.fit.weight.copy_(torch.from_numpy(prior.fit))
                self.fit.bias.copy_(torch.from_numpy(prior.mean))
                self.basis.weight.copy_(torch.from_numpy(prior.basis))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised planes [n, 3, S, S] to the last map and the top-down map at an eighth of the crop."""
        x = self.stem(x)
        kept = []
        for stage in self.stages:
            x = stage(x)
            kept.append(x)
        y = self.lateral[2](kept[3])
        for k, level in ((0, 2), (1, 1)):
            y = nn.functional.interpolate(y, scale_factor=2.0, mode="nearest")
            y = self.smooth[k](y + self.lateral[level - 1](kept[level]))
        return x, y

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (image.float() / 127.5 - 1.0).permute(0, 3, 1, 2)
        if self.training:
            x = x.contiguous(memory_format=torch.channels_last)
        deep, top = self.features(x)
        weight = self.maps(top).float().flatten(2).softmax(-1)
        squeezed = self.squeeze(deep).float().flatten(1)
        with torch.autocast("cpu", enabled=False):
            anchors = torch.matmul(weight, self.places)
            local = torch.matmul(weight[:, self.pooled], top.float().flatten(2).transpose(1, 2))
            flat = anchors.flatten(1)
            hidden = torch.relu(self.hidden(torch.cat([squeezed, local.flatten(1), flat], 1)))
            out = self.fit(flat) + self.basis(self.coefficients(hidden))
            half = self.config.size / 2
            points = (out.reshape(-1, topo.POINTS, 3) + self.centre) * half
            logit = self.face(deep.float().mean((2, 3)))
        return points, logit, (anchors + 1.0) * half


class ExportNet(nn.Module):
    """The graph that ships: points and the score as a probability."""

    def __init__(self, net: FaceMeshNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        points, logit, _ = self.net(image)
        return points, torch.sigmoid(logit)


def point_weights() -> F32:
    """[478] weights of the point loss, mean 1: eyes and irises 3, lips 2.2, brows 1.5, else 1."""
    w = np.ones(topo.POINTS, np.float32)
    w[list(topo.RIGHT_BROW + topo.LEFT_BROW)] = 1.5
    w[list(topo.OUTER_LIPS + topo.INNER_LIPS)] = 2.2
    w[list(topo.RIGHT_EYE + topo.LEFT_EYE + topo.RIGHT_IRIS + topo.LEFT_IRIS)] = 3.0
    out: F32 = w / w.mean()
    return out


# Pairs whose difference vectors are trained besides the points: lids, lips, mouth and eye widths, gaze.
_GAPS: tuple[tuple[int, int], ...] = (
    *topo.RIGHT_LIDS, *topo.LEFT_LIDS, *topo.LIP_GAPS, (61, 291), (33, 133), (362, 263), (468, 33), (468, 133),
    (473, 362), (473, 263), (468, 159), (468, 145), (473, 386), (473, 374), (66, 159), (296, 386), (105, 159),
    (334, 386),
)  # fmt: skip


def drive_matrix() -> F32:
    """[D, 478] weights whose products with the points are the quantities that drive an animation.

    Per eye the iris centre from the middle of the eye corners and the mean gap of the lids, then the mean gap of
    the lips and the width of the mouth.
    """
    rows = np.zeros((6, topo.POINTS), np.float32)
    sides = (
        (topo.RIGHT_EYE_CORNERS, topo.RIGHT_IRIS, topo.RIGHT_LIDS),
        (topo.LEFT_EYE_CORNERS, topo.LEFT_IRIS, topo.LEFT_LIDS),
    )
    for k, (corners, iris, lids) in enumerate(sides):
        rows[k, iris[0]] = 1.0
        rows[k, list(corners)] -= 0.5
        for a, b in lids[:3]:
            rows[2 + k, a] += 1 / 3
            rows[2 + k, b] -= 1 / 3
    for a, b in topo.LIP_GAPS[:3]:
        rows[4, a] += 1 / 3
        rows[4, b] -= 1 / 3
    rows[5, topo.MOUTH_CORNERS[0]], rows[5, topo.MOUTH_CORNERS[1]] = -1.0, 1.0
    return rows


def _wing(x: Tensor, width: float = 10.0, bend: float = 2.0) -> Tensor:
    """Wing loss (Feng et al., CVPR 2018) of errors in percent: logarithmic below ``width``, linear above."""
    a = x.abs()
    offset = width - width * math.log1p(width / bend)
    return torch.where(a < width, width * torch.log1p(a / bend), a - offset) / width


class MeshLoss(nn.Module):
    """Loss in percent of the eye distance (taken as 0.383 of the larger side of the face's box, which a turned
    head does not shrink): points, depth, gaps, anchors, score."""

    weight: Tensor
    first: Tensor
    second: Tensor
    drives: Tensor
    anchors: Tensor
    anchor_weight: Tensor

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        w = torch.from_numpy(point_weights())
        self.register_buffer("weight", w)
        self.register_buffer("first", torch.tensor([a for a, _ in _GAPS]))
        self.register_buffer("second", torch.tensor([b for _, b in _GAPS]))
        self.register_buffer("drives", torch.from_numpy(drive_matrix()))
        self.register_buffer("anchors", torch.tensor(ANCHORS))
        self.register_buffer("anchor_weight", w[list(ANCHORS)] / w[list(ANCHORS)].mean())

    def forward(
        self, out: tuple[Tensor, Tensor, Tensor], points: Tensor, face: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss and, for the log, the mean 2-D point error in percent."""
        predicted, logit, anchors = out
        c = self.config
        score = nn.functional.binary_cross_entropy_with_logits(logit[:, 0], face)
        keep = face > 0.5
        truth, predicted, anchors = points[keep], predicted[keep], anchors[keep]
        span = (truth[..., :2].amax(1) - truth[..., :2].amin(1)).amax(1)
        unit = (100.0 / (0.383 * span))[:, None, None]
        error = (predicted - truth) * unit
        w = self.weight[None, :, None]
        flat = (_wing(error[..., :2]) * w).mean() * 2
        depth = (_wing(error[..., 2:]) * w).mean()
        gap = _wing((error[:, self.first] - error[:, self.second])[..., :2], bend=1.0).mean() * 2
        drive = _wing(torch.matmul(self.drives, error[..., :2]), bend=0.5).mean() * 2
        at = (anchors - truth[:, self.anchors, :2]) * unit
        anchor = (_wing(at) * self.anchor_weight[None, :, None]).mean() * 2
        loss = flat + c.depth * depth + c.gaps * gap + c.drives * drive + c.anchors * anchor + c.score * score
        with torch.no_grad():
            shown = error[..., :2].norm(dim=-1).mean()
        return loss, shown


@dataclass(frozen=True)
class Measured:
    """Errors on one labelled set after two passes (centred crop, re-crop), in percent of the eye distance.

    ``opening``: absolute error of lid gap over eye width; ``gaze``: of the iris' place along the eye over eye width;
    ``mouth``: of the lip gap; ``rotation``: degrees; ``score_min``: lowest score.
    """

    mean: float
    median: float
    p95: float
    first_pass: float
    eyes: float
    irises: float
    lips: float
    brows: float
    contour: float
    opening: float
    gaze: float
    mouth: float
    rotation: float
    score_min: float


def _rotation(a: F32, b: F32) -> float:
    """Degrees between two point sets' orientations (Kabsch)."""
    x, y = a - a.mean(0), b - b.mean(0)
    u, _, v = np.linalg.svd(x.T @ y)
    d = np.sign(np.linalg.det(u @ v))
    r = u @ np.diag([1, 1, d]) @ v
    return math.degrees(math.acos(float(np.clip((np.trace(r) - 1) / 2, -1, 1))))


def measure(run: Any, images: list[U8], points: F32, size: int, passes: int = 2) -> Measured:
    """Measure as the product runs: ``run`` maps uint8 [1, S, S, 3] to (points [1, 478, 3], score [1, 1])."""
    if passes < 1:
        raise ValueError(f"passes is {passes}, it must be at least 1")
    errors, first, turned, opening, gaze, mouth, scores = [], [], [], [], [], [], []
    for image, truth in zip(images, points, strict=True):
        found: F32 = truth
        unit = 100.0 / float(np.linalg.norm(truth[468, :2] - truth[473, :2]))
        for k in range(passes):
            crop, matrix = level_crop(image, found if k else None, size)
            p, s = run(crop[None])
            found = back_to_picture(np.asarray(p)[0], matrix)
            if k == 0:
                first.append(float(np.linalg.norm((found - truth)[:, :2], axis=1).mean() * unit))
        errors.append(np.linalg.norm((found - truth)[:, :2], axis=1) * unit)
        turned.append(_rotation(found, truth))
        scores.append(float(np.asarray(s).ravel()[0]))
        for iris, pairs, corners in (
            (468, topo.RIGHT_LIDS[:3], topo.RIGHT_EYE_CORNERS),
            (473, topo.LEFT_LIDS[:3], topo.LEFT_EYE_CORNERS),
        ):
            ratio = [
                np.mean([np.linalg.norm(q[a, :2] - q[b, :2]) for a, b in pairs])
                / np.linalg.norm(q[corners[0], :2] - q[corners[1], :2])
                for q in (found, truth)
            ]
            opening.append(abs(float(ratio[0] - ratio[1])))
            look = []
            for q in (found, truth):
                axis = q[corners[1], :2] - q[corners[0], :2]
                look.append(
                    (q[iris, :2] - (q[corners[0], :2] + q[corners[1], :2]) / 2) @ axis / (axis @ axis)
                )
            gaze.append(abs(float(look[0] - look[1])))
        gap = [float(np.linalg.norm(q[13, :2] - q[14, :2])) * unit for q in (found, truth)]
        mouth.append(abs(gap[0] - gap[1]))
    e = np.stack(errors)
    face = e.mean(1)

    def part(*groups: tuple[int, ...]) -> float:
        return float(e[:, [i for g in groups for i in g]].mean())

    return Measured(
        mean=float(face.mean()),
        median=float(np.median(face)),
        p95=float(np.percentile(face, 95)),
        first_pass=float(np.mean(first)),
        eyes=part(topo.RIGHT_EYE, topo.LEFT_EYE),
        irises=part(topo.RIGHT_IRIS, topo.LEFT_IRIS),
        lips=part(topo.OUTER_LIPS, topo.INNER_LIPS),
        brows=part(topo.RIGHT_BROW, topo.LEFT_BROW),
        contour=part(topo.CONTOUR),
        opening=float(np.mean(opening)),
        gaze=float(np.mean(gaze)),
        mouth=float(np.mean(mouth)),
        rotation=float(np.mean(turned)),
        score_min=float(np.min(scores)),
    )


def measure_steadiness(
    run: Any, images: list[U8], points: F32, size: int, seed: int = 0, crops: int = 6
) -> float:
    """How far the points of one picture scatter over slightly different crops of it, in percent of the eye distance.

    Each picture is cropped ``crops`` times, moved by up to 2 % of the side, turned by up to 2 degrees and scaled by
    up to 2 %; the result is the mean over points of the distance (root mean square) from the mean of the crops.
    """
    rng = np.random.default_rng(seed)
    scatter = []
    for image, truth in zip(images, points, strict=True):
        roll, centre, side = face_frame(truth)
        found = []
        for _ in range(crops):
            k = math.exp(rng.uniform(-0.02, 0.02)) * side
            middle = (centre + rng.uniform(-0.02, 0.02, 2) * side).astype(np.float32)
            matrix = crop_matrix(middle, k, roll + math.radians(rng.uniform(-2, 2)), size)
            crop = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)
            found.append(back_to_picture(np.asarray(run(crop[None])[0])[0], matrix)[:, :2])
        stack = np.stack(found)
        unit = 100.0 / float(np.linalg.norm(truth[468, :2] - truth[473, :2]))
        scatter.append(float(np.sqrt(((stack - stack.mean(0)) ** 2).sum(-1).mean(0)).mean() * unit))
    return float(np.mean(scatter))


def measure_score(
    run: Any, data: Path, split: str, size: int, seed: int = 0, count: int = 400
) -> dict[str, float]:
    """Shares of wrong scores at 0.5: ``missed`` over augmented crops of faces, ``false`` over crops without one."""
    rng = np.random.default_rng(seed)
    faces, scenes = load_faces(data, split), load_scenes(data, split)
    wide = AugmentConfig(occlusion=0.0)
    missed = false = 0
    for _ in range(count):
        i = int(rng.integers(len(faces.images)))
        crop, _ = random_geometry(rng, faces.images[i], faces.points[i], size, wide)
        missed += float(np.asarray(run(crop[None])[1]).ravel()[0]) < 0.5
        false += float(np.asarray(run(negative_crop(rng, scenes, size)[None])[1]).ravel()[0]) >= 0.5
    return {"missed": missed / count, "false": false / count}


def load_labelled(data: Path, name: str) -> tuple[list[U8], F32]:
    """Whole crops (with their bars) and labels of ``val`` or ``eval``, for :func:`measure`."""
    if name == "eval":
        labels = np.load(data / "eval_landmarks.npy").astype(np.float32)
        return [read_rgb(data / "eval" / f"{i:03d}.jpg") for i in range(len(labels))], labels
    entries = json.loads((data / "mesh.json").read_text())
    chosen = [i for i, e in enumerate(entries) if e["split"] == name]
    labels = np.load(data / "mesh_landmarks.npy").astype(np.float32)[chosen]
    return [read_rgb(data / entries[i]["file"]) for i in chosen], labels


def _torch_runner(net: FaceMeshNet) -> Any:
    export = ExportNet(net).eval()

    def run(image: U8) -> tuple[F32, F32]:
        with torch.no_grad():
            p, s = export(torch.from_numpy(image))
        return p.numpy(), s.numpy()

    return run


class Trainer:
    """One training run in a folder: ``checkpoint.pt``, ``log.jsonl``, ``face_mesh.onnx``."""

    def __init__(
        self, out: Path, faces: FaceSet, net: NetConfig, train: TrainConfig, samples: SampleConfig
    ) -> None:
        self.out, self.config, self.samples = out, train, samples
        torch.manual_seed(samples.seed)
        self.net = FaceMeshNet(net, shape_prior(faces.points, net.basis, draws=net.prior_draws)).to(
            memory_format=torch.channels_last
        )
        self.mean = FaceMeshNet(net)
        self.mean.load_state_dict(self.net.state_dict())
        self.mean.eval()
        self.loss = MeshLoss(train)
        plain, decayed, slow = [], [], []
        for name, p in self.net.named_parameters():
            if name.startswith(("basis", "fit")):
                slow.append(p)
            elif p.ndim < 2:
                plain.append(p)
            else:
                decayed.append(p)
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": train.decay, "factor": 1.0},
                {"params": plain, "weight_decay": 0.0, "factor": 1.0},
                # The shape prior is a good start: it only moves slowly.
                {"params": slow, "weight_decay": 0.0, "factor": 0.1},
            ],
            lr=train.rate,
            betas=(0.9, 0.99),
        )
        self.step = 0
        self.seconds = 0.0
        self.interrupted = False

    def save(self) -> None:
        """Write the checkpoint beside itself and rename it."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "net": self.net.state_dict(),
            "mean": self.mean.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "config": {
                "net": asdict(self.net.config),
                "train": asdict(self.config),
                "samples": asdict(self.samples),
            },
        }
        target = self.out / "checkpoint.pt"
        part = target.with_suffix(".part")
        with part.open("wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, target)

    def load(self) -> None:
        """Continue from the checkpoint of the folder."""
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.net.load_state_dict(state["net"])
        self.mean.load_state_dict(state["mean"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def rate_at(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine to zero at the last step."""
        c = self.config
        if step < c.warmup:
            return c.rate * (step + 1) / c.warmup
        done = (step - c.warmup) / max(1, c.steps - c.warmup)
        return c.rate * (0.5 * (1 + math.cos(math.pi * min(1.0, done))) * 0.998 + 0.002)

    def update(self, batch: Batch) -> tuple[float, float]:
        """One step; returns the loss and the mean point error of the batch in percent."""
        self.net.train()
        rate = self.rate_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        with torch.autocast("cpu", torch.bfloat16):
            out = self.net(torch.from_numpy(batch.images))
        loss, shown = self.loss(out, torch.from_numpy(batch.points), torch.from_numpy(batch.face))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 20.0)
        self.optimiser.step()
        self.step += 1
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            new = self.net.state_dict()
            for name, value in self.mean.state_dict().items():
                if value.dtype.is_floating_point:
                    value.lerp_(new[name], 1 - keep)
                else:
                    value.copy_(new[name])
        if not math.isfinite(float(loss.detach())):
            raise RuntimeError(f"the loss is {float(loss)} at step {self.step}; lower --rate and resume")
        return float(loss.detach()), float(shown)

    def run(self, source: Iterator[Batch], stop: int, checks: dict[str, tuple[list[U8], F32]]) -> None:
        """Train up to step ``stop``, with checkpoints and a log line with the errors on ``checks`` now and then."""
        started = saved = time.monotonic()
        before = self.seconds
        losses: list[tuple[float, float]] = []
        while self.step < stop and not self.interrupted:
            losses.append(self.update(next(source)))
            now = time.monotonic()
            self.seconds = before + now - started
            if self.step % 50 == 0 or self.step == stop:
                a = np.mean(losses[-50:], 0)
                print(f"step {self.step} {self.seconds:.0f} s loss {a[0]:.3f} error {a[1]:.2f} %", flush=True)
            if self.step % self.config.report == 0 or self.step == stop:
                self.report(checks, losses)
                losses = []
            if now - saved > self.config.checkpoint_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def report(self, checks: dict[str, tuple[list[U8], F32]], losses: list[tuple[float, float]]) -> None:
        """Append one line to ``log.jsonl``."""
        line: dict[str, Any] = {
            "step": self.step,
            "seconds": round(self.seconds),
            "loss": np.mean(losses, 0).tolist(),
        }
        for name, (images, points) in checks.items():
            line[name] = asdict(measure(_torch_runner(self.mean), images, points, self.samples.size))
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def export_onnx(net: FaceMeshNet, target: Path) -> float:
    """Write the ONNX file (opset 17) and return the largest difference from torch in pixels.

    Raises ``RuntimeError`` when the exported graph differs by more than 1e-3 px.
    """
    import onnx
    import onnxruntime

    module = ExportNet(net).eval()
    size = net.config.size
    generator = np.random.default_rng(0)
    sample = torch.from_numpy(generator.integers(0, 256, (2, size, size, 3), dtype=np.uint8))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with torch.no_grad(), warnings.catch_warnings():
        # The tracing exporter writes the plain opset-17 graph wanted here; torch calls it legacy.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            module,
            (sample,),
            str(part),
            input_names=["image"],
            output_names=["points", "score"],
            dynamic_axes={"image": {0: "N"}, "points": {0: "N"}, "score": {0: "N"}},
            opset_version=17,
            dynamo=False,
        )
    model = onnx.load(str(part))
    state_shapes(model, SHAPES)
    save(model, part)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
    worst = 0.0
    for n in (1, 2, 3):
        x = generator.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        with torch.no_grad():
            wanted = module(torch.from_numpy(x))
        got = session.run(None, {"image": x})
        worst = max(worst, *(float(np.abs(a - b.numpy()).max()) for a, b in zip(got, wanted, strict=True)))
    if worst > 1e-3:
        part.unlink()
        raise RuntimeError(f"the exported graph differs from torch by {worst:.2e} px, more than 1e-3")
    with part.open("rb+") as f:
        os.fsync(f.fileno())
    os.replace(part, target)
    return worst


def _measure_file(file: Path, data: Path) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    size = int(session.get_inputs()[0].shape[1])

    def run(image: U8) -> Any:
        return session.run(None, {"image": image})

    result: dict[str, Any] = {"bytes": file.stat().st_size}
    for name in ("val", "eval"):
        images, points = load_labelled(data, name)
        result[name] = {
            **asdict(measure(run, images, points, size)),
            "steadiness": measure_steadiness(run, images[::3], points[::3], size),
        }
    result["score"] = measure_score(run, data, "val", size)
    blank = np.zeros((1, size, size, 3), np.uint8)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        run(blank)
        times.append(time.perf_counter() - started)
    result["ms"] = {"median": float(np.median(times) * 1e3), "min": min(times) * 1e3}
    return result


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mesh.json, detect.json, eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, log and ONNX file")
    parser.add_argument(
        "--steps", type=int, default=TrainConfig.steps, help="length of the run (cosine schedule)"
    )
    parser.add_argument("--stop", type=int, default=None, help="stop earlier, at this step of the schedule")
    parser.add_argument("--batch", type=int, default=SampleConfig.batch)
    parser.add_argument(
        "--size", type=int, default=NetConfig.size, help="crop side in pixels, a multiple of 32"
    )
    parser.add_argument("--rate", type=float, default=TrainConfig.rate)
    parser.add_argument("--seed", type=int, default=SampleConfig.seed)
    parser.add_argument(
        "--workers", type=int, choices=(0, 1), default=1, help="processes that prepare samples"
    )
    parser.add_argument("--report", type=int, default=TrainConfig.report, help="steps between measurements")
    parser.add_argument("--measure", type=Path, metavar="ONNX", help="only measure an exported file")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument(
        "--export-only", action="store_true", help="only write the ONNX file of the checkpoint"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    a = _arguments(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    out: Path = a.out
    if a.measure is not None:
        print(json.dumps(_measure_file(a.measure, a.data), indent=1))
        return 0
    samples = SampleConfig(size=a.size, batch=a.batch, seed=a.seed)
    train = TrainConfig(steps=a.steps, rate=a.rate, report=a.report, warmup=min(400, max(1, a.steps // 10)))
    trainer = Trainer(out, load_faces(a.data, "train"), NetConfig(size=a.size), train, samples)
    if a.resume or a.export_only:
        trainer.load()
    elif (out / "checkpoint.pt").exists():
        print(
            f"{out / 'checkpoint.pt'} exists; pass --resume to continue it or name another --out",
            file=sys.stderr,
        )
        return 2
    if not a.export_only:
        # A polite end (kill, Ctrl-C) finishes the step and writes the checkpoint that --resume continues.
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, lambda *_: setattr(trainer, "interrupted", True))
        checks = {name: load_labelled(a.data, name) for name in ("val", "eval")}
        stop = min(a.stop or a.steps, a.steps)
        trainer.run(batches(a.data, samples, trainer.step, stop, a.workers), stop, checks)
    worst = export_onnx(trainer.mean, out / "face_mesh.onnx")
    print(f"{out / 'face_mesh.onnx'}: step {trainer.step}, {worst:.1e} px from torch")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
