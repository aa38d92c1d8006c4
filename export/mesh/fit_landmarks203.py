"""Fit the map from the mesh's eye and lip ratios to those of LivePortrait's 203 landmarks.

LivePortrait's motion templates hold, for every frame, the ratios that the reference computed from its own landmarks. Clips that exist
together with such a template are tracked with the mesh networks; the ratios of the mesh's points
(:func:`lp_edge.runtime.landmarks203.mesh_to_203` without calibration) are then mapped to the template's by least squares, every clip
weighing alike. Both eyes share one map.

    python -m lp_edge.export.mesh.fit_landmarks203 --samples ../shared/samples/driving

prints the constants of ``lp_edge.runtime.landmarks203.CALIBRATION`` and, for every clip, how far the mapped ratios are from the
template's: with these constants (``fitted``), with constants from the other clips (``left_out``) and without a map (``raw``),
over all samples and over those where the template's eye or mouth is shut.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.export.mesh.fit_liveportrait import track_clip
from lp_edge.runtime.faces import FaceDetector, FaceMeshNet
from lp_edge.runtime.landmarks203 import RatioMap, mesh_to_203
from lp_edge.runtime.liveportrait_motion import eye_ratio_203, lip_ratio_203
from lp_edge.runtime.liveportrait_template import load_liveportrait

__all__ = ["Ratios", "fit", "load_ratios", "main", "report"]

F64 = npt.NDArray[np.float64]

EYE_FLOOR = 0.01
"""The smallest eye ratios in the templates; landmark networks never let both lids coincide."""

STEEPEST = 2.0
"""Largest slope of the map of the eyes: it may at most double the mesh network's errors, and must not shut narrow eyes."""
SHUT = 0.1
"""Below this ratio of the template an eye or a mouth counts as shut."""


@dataclass(frozen=True)
class Ratios:
    """One clip of ``T`` frames.

    Attributes:
        eyes: ``[T, 2]``, of the mesh.
        lips: ``[T]``, of the mesh.
        wanted_eyes, wanted_lips: the template's.
    """

    eyes: F64
    lips: F64
    wanted_eyes: F64
    wanted_lips: F64


def _fit_eyes(x: F64, y: F64, weight: F64) -> tuple[float, float]:
    """Where an eye counts as shut and from where on its ratio is left alone: a grid search, then a finer one around its best."""
    shut, wide, reach = 0.1, 0.2, 0.1
    for step in (0.01, 0.001):
        best = (np.inf, shut, wide)
        for low in np.arange(max(shut - reach, 0.0), shut + reach, step):
            for high in np.arange(wide - reach, wide + reach + step, step):
                if high - EYE_FLOOR <= STEEPEST * (high - low):
                    error = float((weight * (_map(low, high).eye(x) - y) ** 2).sum())
                    best = min(best, (error, float(low), float(high)))
        _, shut, wide = best
        reach = step
    return shut, wide


def _map(shut: float, wide: float, limit: float = 1.0, gain: float = 1.0) -> RatioMap:
    return RatioMap(EYE_FLOOR, round(shut, 3), round(wide, 3), round(limit, 3), round(gain, 3))


def _fit_lips(x: F64, y: F64, weight: F64) -> tuple[float, float]:
    """Limit and gain of ``limit * tanh(gain / limit * x)``: the limit is linear, ``gain / limit`` is searched."""
    best = (np.inf, 0.0, 0.0)
    for slope in np.geomspace(0.05, 20.0, 4000):
        bent = np.tanh(slope * x)
        limit = float((weight * bent * y).sum() / (weight * bent * bent).sum())
        error = float((weight * (limit * bent - y) ** 2).sum())
        best = min(best, (error, limit, limit * float(slope)))
    return best[1], best[2]


def fit(clips: Sequence[Ratios]) -> RatioMap:
    """The map that fits the clips best, every clip weighing alike; constants rounded to three decimals.

    Raises:
        ValueError: there is no clip.
    """
    if not clips:
        raise ValueError("no clip to fit to")
    x, y = (np.concatenate([getattr(c, name).reshape(-1) for c in clips]) for name in ("eyes", "wanted_eyes"))
    weight = np.concatenate([np.full(c.eyes.size, 1.0 / c.eyes.size) for c in clips])
    shut, wide = _fit_eyes(x, y, weight)
    x, y = (np.concatenate([getattr(c, name) for c in clips]) for name in ("lips", "wanted_lips"))
    weight = np.concatenate([np.full(c.lips.size, 1.0 / c.lips.size) for c in clips])
    limit, gain = _fit_lips(x, y, weight)
    return _map(shut, wide, limit, gain)


def _errors(guess: F64, wanted: F64) -> dict[str, float]:
    guess, wanted = guess.reshape(-1), wanted.reshape(-1)
    difference = np.abs(guess - wanted)
    shut = difference[wanted < SHUT]
    return {
        "mean_abs": round(float(difference.mean()), 4),
        "p95": round(float(np.quantile(difference, 0.95)), 4),
        "correlation": round(float(np.corrcoef(guess, wanted)[0, 1]), 3),
        "shut_samples": len(shut),
        "shut_mean_abs": round(float(shut.mean()) if len(shut) else 0.0, 4),
    }


def report(clips: Mapping[str, Ratios]) -> dict[str, object]:
    """The constants, and the errors of every clip: fitted, left out (constants from the other clips), raw."""
    made = fit(list(clips.values()))
    figures: dict[str, object] = {}
    for name, clip in clips.items():
        maps: dict[str, RatioMap | None] = {"fitted": made, "raw": None}
        if len(clips) > 1:
            maps["left_out"] = fit([c for other, c in clips.items() if other != name])
        figures[name] = {
            "frames": len(clip.lips),
            "eyes": {
                kind: _errors(clip.eyes if m is None else m.eye(clip.eyes), clip.wanted_eyes)
                for kind, m in maps.items()
            },
            "lips": {
                kind: _errors(clip.lips if m is None else m.lip(clip.lips), clip.wanted_lips)
                for kind, m in maps.items()
            },
        }
    return {"calibration": asdict(made), "clips": figures}


def load_ratios(folder: Path, names: Sequence[str], detector: Path, mesh: Path) -> dict[str, Ratios]:
    """Track the clips ``NAME.mp4`` (square) and read the templates ``NAME.pkl``.

    Raises:
        ValueError: a clip and its template have different numbers of frames.
    """
    config = BackendConfig("cpu", threads=1)
    clips = {}
    with open_runner(detector, config) as first, open_runner(mesh, config) as second:
        for name in names:
            points, _width = track_clip(folder / f"{name}.mp4", FaceDetector(first), FaceMeshNet(second))
            landmarks = np.stack([mesh_to_203(p, None) for p in points])
            motion = load_liveportrait(folder / f"{name}.pkl").motion
            if len(motion) != len(landmarks):
                raise ValueError(
                    f"{name}: {len(landmarks)} frames in the clip, {len(motion)} in the template"
                )
            clips[name] = Ratios(
                eye_ratio_203(landmarks).astype(np.float64),
                lip_ratio_203(landmarks).astype(np.float64),
                motion.eye_ratio.astype(np.float64),
                motion.lip_ratio.astype(np.float64),
            )
    return clips


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: print constants and errors as JSON."""
    data = Path(__file__).resolve().parents[2] / "engines" / "data" / "mesh"
    parser = argparse.ArgumentParser(description="Fit the eye and lip ratios of the 203 landmarks.")
    parser.add_argument("--samples", type=Path, required=True, help="folder with NAME.mp4 and NAME.pkl")
    parser.add_argument(
        "--names", nargs="+", default=["d1", "d5", "d8"], help="clips that exist in both forms"
    )
    parser.add_argument("--detector", type=Path, default=data / "face_detector.onnx")
    parser.add_argument("--mesh", type=Path, default=data / "face_mesh.onnx")
    args = parser.parse_args(argv)
    print(json.dumps(report(load_ratios(args.samples, args.names, args.detector, args.mesh)), indent=1))


if __name__ == "__main__":
    main()
