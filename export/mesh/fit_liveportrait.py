"""Fit the linear map that lets LivePortrait's motion templates drive the mesh.

Clips that exist together with the template LivePortrait's own networks made of them are tracked with the mesh networks; then

* pose: one constant rotation, one unit and one pivot relate both canonical faces (least squares over all frames; the templates
  were made of whole frames, so both place the face in the same picture);
* expression: ridge regression from the change of 21 x 3 offsets to the coefficients of the expression basis, separately
  for the upper and the lower part of the face;
* eye and lip openings: ridge regression from the offsets of LivePortrait's eye and lip regions to the ratios of 203
  landmarks that these templates hold (newer ones hold none), and a factor from those to the ratios of the mesh.

Mirrored copies of all samples are added, so that the map has no preferred side; every clip weighs alike; every ridge is the one
that predicts left-out clips best.

    python -m lp_edge.export.mesh.fit_liveportrait --samples ../shared/samples/driving --out engines/data/mesh/liveportrait_map.npz
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.export.mesh.canonical import write_npz
from lp_edge.export.training.face_topology import mirror_permutation
from lp_edge.runtime import topology
from lp_edge.runtime.face_motion import Canonical, load_canonical, motion_from_points
from lp_edge.runtime.faces import FaceDetector, FaceMeshNet, crop_from_points, locate_faces
from lp_edge.runtime.geometry import euler_from_rotation, rotation_from_euler
from lp_edge.runtime.liveportrait_template import load_liveportrait
from lp_edge.runtime.motion import Motion

__all__ = ["Pair", "fit", "main", "track_clip"]

F64 = npt.NDArray[np.float64]

# LivePortrait's keypoints that trade places in a mirrored face, found as mutual best partners by the correlation of
# their mirrored offsets over all sample templates; the others lie in the mid-plane or do not move.
MIRRORED_KEYPOINTS = ((0, 5), (1, 2), (3, 4), (7, 14), (11, 15), (13, 16))
RIDGES = tuple(float(10.0**e) for e in np.arange(-5.0, 1.51, 0.5))
# Where the upper part of the canonical face ends, between eyes and nose tip, and how softly; inter-ocular distances.
_BORDER, _BLEND = 0.45, 0.08
_FLIP = np.array([-1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Pair:
    """A clip seen by both models, ``T`` frames: ours in units of half a (square) frame with the origin in its middle."""

    name: str
    mesh: Motion
    template: Motion


def track_clip(path: Path, detector: FaceDetector, mesh: FaceMeshNet) -> tuple[npt.NDArray[np.float32], int]:
    """Mesh points ``[T, 478, 3]`` of the largest face of every frame, unsmoothed, and the width of the frames.

    Every frame is measured twice, the second time in the crop that the first result asks for.

    Raises:
        ValueError: the first frame shows no face, or the frames are not square.
    """
    found: list[npt.NDArray[np.float32]] = []
    crop, width = None, 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            rgb, width = frame.to_ndarray(format="rgb24"), frame.width
            if frame.height != width:
                raise ValueError(f"{path}: {width} x {frame.height}; expected square frames")
            if crop is None:
                faces = locate_faces(rgb, detector, mesh, stages=None)
                if not faces:
                    raise ValueError(f"{path}: no face in the first frame")
                crop = crop_from_points(faces[0].points, mesh.size)
            for _ in range(2):
                points, _score = mesh.run(rgb, [crop])
                crop = crop_from_points(points[0], mesh.size)
            found.append(points[0])
    return np.stack(found), width


def _mirrored(change: F64, order: npt.NDArray[np.intp]) -> F64:
    return np.asarray(change[:, order] * _FLIP)


@dataclass(frozen=True)
class _Samples:
    """A clip and its mirror image, against the clip's mean.

    Attributes:
        offsets: ``[2T, 63]``.
        upper, lower: ``[2T, K]``, basis coefficients of the upper and of the lower part of the face.
        ratios: ``[2T, 3]``, the template's own.
    """

    offsets: F64
    upper: F64
    lower: F64
    ratios: F64


def _samples(pair: Pair, canonical: Canonical) -> _Samples:
    order = np.arange(21)
    for a, b in MIRRORED_KEYPOINTS:
        order[[a, b]] = b, a
    basis = canonical.basis.reshape(len(canonical.basis), -1).astype(np.float64)
    x = pair.template.expression.astype(np.float64)
    y = pair.mesh.expression.astype(np.float64)
    ratios = _ratios(pair.template)
    x, y, ratios = x - x.mean(0), y - y.mean(0), ratios - ratios.mean(0)
    y = np.concatenate([y, _mirrored(y, mirror_permutation())])
    upper = 1.0 / (1.0 + np.exp((canonical.points[:, 1:2].astype(np.float64) - _BORDER) / _BLEND))
    frames = len(y)
    return _Samples(
        np.concatenate([x, _mirrored(x, order)]).reshape(frames, 63),
        (y * upper).reshape(frames, -1) @ basis.T,
        (y * (1.0 - upper)).reshape(frames, -1) @ basis.T,
        np.concatenate([ratios, ratios[:, [1, 0, 2]]]),
    )


def _ratios(motion: Motion) -> F64:
    """Left eye, right eye, lips: ``[T, 3]``."""
    return np.concatenate([motion.eye_ratio, motion.lip_ratio[:, None]], axis=1).astype(np.float64)


@dataclass(frozen=True)
class _Head:
    """One regression: which keypoints it sees and what it predicts from a clip."""

    name: str
    keypoints: tuple[int, ...]
    target: Callable[[_Samples], F64]

    def fit(self, samples: Sequence[_Samples], ridge: float) -> F64:
        """Weights ``[63, targets]``, zero for other keypoints; every clip weighs alike."""
        seen = np.concatenate([np.arange(3 * k, 3 * k + 3) for k in self.keypoints])
        gram = np.mean([s.offsets[:, seen].T @ s.offsets[:, seen] / len(s.offsets) for s in samples], axis=0)
        cross = np.mean([s.offsets[:, seen].T @ self.target(s) / len(s.offsets) for s in samples], axis=0)
        # relative to the mean variance of a feature, so that the unit of the offsets does not matter
        loaded = gram + ridge * np.trace(gram) / len(seen) * np.eye(len(seen))
        out = np.zeros((63, cross.shape[1]))
        out[seen] = np.linalg.solve(loaded, cross)
        return out

    def left_out(self, samples: Sequence[_Samples], ridge: float) -> tuple[float, list[F64]]:
        """R² over all clips when each is predicted from the others, and the weights that did so."""
        weights, error, total = [], 0.0, 0.0
        for i, sample in enumerate(samples):
            w = self.fit([*samples[:i], *samples[i + 1 :]], ridge)
            true = self.target(sample)
            error += float(((true - sample.offsets @ w) ** 2).mean())
            total += float((true**2).mean())
            weights.append(w)
        return 1.0 - error / total, weights

    def best(self, samples: Sequence[_Samples]) -> tuple[float, F64, list[F64]]:
        """The ridge that predicts left-out clips best, the weights from all clips and those without each."""
        ridge = max(RIDGES, key=lambda r: self.left_out(samples, r)[0])
        return ridge, self.fit(samples, ridge), self.left_out(samples, ridge)[1]


# LivePortrait's eye and lip regions; 7 is the mirror partner of 14, 1 and 2 move with the brows. Lids and brows are
# read from the keypoints beside them alone, so that a mouth that opens does not shut the eyes.
_HEADS = (
    _Head("upper", (1, 2, 11, 13, 15, 16, 18), lambda s: s.upper),
    _Head("lower", tuple(k for k in range(21) if k not in (11, 13, 15, 16, 18)), lambda s: s.lower),
    _Head("eyes", (11, 13, 15, 16, 18), lambda s: s.ratios[:, :2]),
    _Head("lips", (6, 7, 12, 14, 17, 19, 20), lambda s: s.ratios[:, 2:]),
)


def _joined(parts: Sequence[F64]) -> F64:
    """Weights of the heads → one matrix ``[63, K + 3]``: both parts of the face add up."""
    upper, lower, eyes, lips = parts
    return np.concatenate([upper + lower, eyes, lips], axis=1)


def _r2(true: F64, guess: F64) -> float:
    return float(1.0 - ((true - guess) ** 2).sum() / (true**2).sum())


def _scores(pair: Pair, weights: F64, canonical: Canonical) -> dict[str, float]:
    """How well a map predicts a clip against its frame 0: R² of the points, by regions, and of the template's ratios.

    The correlations compare with the mesh's ratios, which the map has not been fitted to.
    """
    k = len(canonical.basis)
    change = (pair.template.expression - pair.template.expression[0]).reshape(-1, 63) @ weights
    true = pair.mesh.expression.astype(np.float64) - pair.mesh.expression[0]
    guess = np.tensordot(change[:, :k], canonical.basis.astype(np.float64), axes=1)
    ratios = _ratios(pair.template) - _ratios(pair.template)[0]
    lips = list(topology.REGIONS["lip"])
    eyes = [i for i in topology.REGIONS["eyes"] if i < 468]
    return {
        "r2": _r2(true, guess),
        "r2_lip": _r2(true[:, lips], guess[:, lips]),
        "r2_eyes": _r2(true[:, eyes], guess[:, eyes]),
        "rms_iod": _rms(true),
        "rms_error_iod": _rms(true - guess),
        "eye_ratio_r2": _r2(ratios[:, :2], change[:, k : k + 2]),
        "lip_ratio_r2": _r2(ratios[:, 2], change[:, k + 2]),
        "eye_left_correlation": _correlation(change[:, k], pair.mesh.eye_ratio[:, 0]),
        "eye_right_correlation": _correlation(change[:, k + 1], pair.mesh.eye_ratio[:, 1]),
        "lip_correlation": _correlation(change[:, k + 2], pair.mesh.lip_ratio),
    }


def _rms(difference: F64) -> float:
    """Root mean square distance of points, in inter-ocular distances."""
    return float(np.sqrt((difference**2).sum(-1).mean()))


def _correlation(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    return float(np.corrcoef(np.asarray(a, np.float64), np.asarray(b, np.float64))[0, 1])


def _fit_pose(pairs: Sequence[Pair]) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Any]]:
    """Constant rotation, unit and pivot between both canonical faces, and how well they do."""
    units, rows, sides, pitches = [], [], [], []
    for pair in pairs:
        m, t = pair.mesh, pair.template
        scale, turn = t.scale.astype(np.float64), t.rotation.astype(np.float64)
        units.append(float((m.scale / scale).mean()))
        pitches.append(float(np.mean(m.angles[0] - t.angles[0])))
        # (our place - t) / s = (M o)_xy with o = (0, o_y, o_z)
        weight = 1.0 / np.sqrt(len(scale))
        rows.append(weight * turn[:, :2, 1:].reshape(-1, 2))
        sides.append(weight * ((m.translation[:, :2] - t.translation[:, :2]) / scale[:, None]).reshape(-1))
    pivot = np.concatenate(
        [[0.0], np.linalg.lstsq(np.concatenate(rows), np.concatenate(sides), rcond=None)[0]]
    )
    unit, pitch = float(np.mean(units)), float(np.mean(pitches))
    figures: dict[str, Any] = {"unit": unit, "units": units, "pivot": pivot.tolist(), "pitch_offset": pitch}
    constant = rotation_from_euler(pitch, 0.0, 0.0)
    for pair in pairs:
        m, t = pair.mesh, pair.template
        change = {}
        for name, a, b in zip(
            ("pitch", "yaw", "roll"), m.angles, euler_from_rotation(t.rotation @ constant), strict=True
        ):
            change[name] = {
                "mean_abs_degrees": float(np.abs((a - a[0]) - (b - b[0])).mean()),
                "correlation": _correlation(a, b),
            }
        place = t.translation + t.scale[:, None] * (t.rotation @ pivot)
        ours = (m.translation - m.translation[0])[:, :2] / m.scale[0]
        theirs = (place - place[0])[:, :2] / (unit * t.scale[0])
        change["translation"] = {"rms_iod": _rms(ours), "rms_error_iod": _rms(ours - theirs)}
        change["scale"] = {
            "largest_change": float(np.abs(np.log(m.scale / m.scale[0])).max()),
            "mean_abs_error": float(
                np.abs(np.log(m.scale / m.scale[0]) - np.log(t.scale / t.scale[0])).mean()
            ),
        }
        figures[pair.name] = change
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "rotation": constant.astype(np.float32),
        "unit": np.asarray(unit, np.float32),
        "pivot": pivot.astype(np.float32),
    }
    return arrays, figures


def _fit_own_ratios(
    pairs: Sequence[Pair], canonical: Canonical
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Factors ``[2]`` from the templates' own ratios to ours: eyes, lips.

    Both measure a gap over a width, so shut is 0 in either. Eyes: an open eye of the pairs is one of the canonical face
    (mesh networks read shut eyes as slightly open, which a regression would hand on). Lips: least squares.
    """
    factors, figures = [], {}
    for name, field in (("eyes", "eye_ratio"), ("lip", "lip_ratio")):
        theirs = [np.asarray(getattr(p.template, field), np.float64).reshape(-1) for p in pairs]
        ours = [np.asarray(getattr(p.mesh, field), np.float64).reshape(-1) for p in pairs]
        weight = np.concatenate([np.full(len(a), 1.0 / np.sqrt(len(a))) for a in theirs])
        x, y = np.concatenate(theirs), np.concatenate(ours)
        slope, intercept = np.polyfit(x, y, 1, w=weight)
        if name == "eyes":
            usual = np.mean([np.median(a[a > 0.5 * a.max()]) for a in theirs])
            factor = float(np.mean(topology.eye_ratio(canonical.points)) / usual)
        else:
            factor = float((weight**2 * x * y).sum() / (weight**2 * x * x).sum())
        factors.append(factor)
        figures[name] = {
            "factor": factor,
            "regression": [float(slope), float(intercept)],
            "correlation": {p.name: _correlation(a, b) for p, a, b in zip(pairs, theirs, ours, strict=True)},
        }
    return np.asarray(factors, np.float32), figures


def fit(
    pairs: Sequence[Pair], canonical: Canonical
) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Any]]:
    """The arrays of :class:`lp_edge.runtime.liveportrait_template.LivePortraitMap`, and figures on the fit.

    Args:
        pairs: two clips or more.
        canonical: the canonical face, whose basis the map speaks.

    Raises:
        ValueError: fewer than two clips, or frame counts that differ.
    """
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pair(s); leaving one out needs two")
    for pair in pairs:
        if len(pair.mesh) != len(pair.template):
            raise ValueError(
                f"{pair.name}: {len(pair.mesh)} frames in the clip, {len(pair.template)} in the template"
            )
    samples = [_samples(pair, canonical) for pair in pairs]
    ridges: dict[str, float] = {}
    parts: list[F64] = []
    without: list[list[F64]] = [[] for _ in pairs]
    for head in _HEADS:
        ridges[head.name], weight, others = head.best(samples)
        parts.append(weight)
        for held, other in zip(without, others, strict=True):
            held.append(other)
    weights, held_out = _joined(parts), [_joined(held) for held in without]
    pose, pose_figures = _fit_pose(pairs)
    ratios, ratio_figures = _fit_own_ratios(pairs, canonical)
    figures = {
        "frames": {pair.name: len(pair.mesh) for pair in pairs},
        "ridge": ridges,
        "left_out": {p.name: _scores(p, w, canonical) for p, w in zip(pairs, held_out, strict=True)},
        "fitted": {pair.name: _scores(pair, weights, canonical) for pair in pairs},
        "pose": pose_figures,
        "own_ratios": ratio_figures,
    }
    return {"weights": weights.astype(np.float32), "own_ratio": ratios, **pose}, figures


def load_pairs(
    folder: Path, names: Sequence[str], detector: Path, mesh: Path, canonical: Canonical
) -> list[Pair]:
    """Track the clips ``NAME.mp4`` of a folder and read their templates ``NAME.pkl``."""
    config = BackendConfig("cpu", threads=1)
    pairs = []
    with open_runner(detector, config) as first, open_runner(mesh, config) as second:
        for name in names:
            points, width = track_clip(folder / f"{name}.mp4", FaceDetector(first), FaceMeshNet(second))
            half = width / 2
            placed = (points - [half - 0.5, half - 0.5, 0.0]) / half
            pairs.append(
                Pair(
                    name,
                    motion_from_points(placed, canonical),
                    load_liveportrait(folder / f"{name}.pkl").motion,
                )
            )
    return pairs


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write ``liveportrait_map.npz`` and print the figures of the fit as JSON."""
    data = Path(__file__).resolve().parents[2] / "engines" / "data" / "mesh"
    parser = argparse.ArgumentParser(description="Fit the map from LivePortrait's motion to mesh motion.")
    parser.add_argument("--samples", type=Path, required=True, help="folder with NAME.mp4 and NAME.pkl")
    parser.add_argument(
        "--names", nargs="+", default=["d1", "d5", "d8"], help="clips that exist in both forms"
    )
    parser.add_argument("--detector", type=Path, default=data / "face_detector.onnx")
    parser.add_argument("--mesh", type=Path, default=data / "face_mesh.onnx")
    parser.add_argument("--canonical", type=Path, default=data / "canonical.npz")
    parser.add_argument("--out", type=Path, required=True, help="liveportrait_map.npz to write")
    args = parser.parse_args(argv)
    canonical = load_canonical(args.canonical)
    pairs = load_pairs(args.samples, args.names, args.detector, args.mesh, canonical)
    arrays, figures = fit(pairs, canonical)
    write_npz(args.out, arrays)
    print(json.dumps({"out": str(args.out), "bytes": args.out.stat().st_size, **figures}, indent=1))


if __name__ == "__main__":
    main()
