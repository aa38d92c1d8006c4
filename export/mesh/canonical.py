"""Build the canonical face and its expression basis from mesh labels.

Generalised Procrustes analysis (Gower 1975) on the rigid points of all training samples gives one frame of
reference; the canonical face is the mean of the samples with closed lips and open eyes in it, made symmetric. The
expression basis is the principal components of what the samples of a clip do about that clip's mean. Every picture
and every clip counts alike, however many frames it has; validation samples are not touched.

    python -m lp_edge.export.mesh.canonical --data ../shared/faces --out engines/data/mesh/canonical.npz
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lp_edge.export.training.face_topology import mirror_permutation
from lp_edge.runtime import topology
from lp_edge.runtime.geometry import euler_from_rotation, rotation_from_euler, similarity_fit

__all__ = ["CanonicalConfig", "build_canonical", "load_samples", "main"]

F64 = npt.NDArray[np.float64]

# point (one of a mirror pair) -> weight in the pose fit: stiff and well localised points count most
RIGID: dict[int, float] = {
    33: 1.5, 133: 1.5, 168: 1.0, 6: 1.0, 197: 1.0, 195: 0.7, 10: 0.7, 151: 0.7, 9: 0.7,
    127: 1.0, 21: 1.0, 54: 0.8, 162: 1.0, 103: 0.6, 67: 0.6, 122: 0.7, 193: 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class CanonicalConfig:
    """How the canonical face is made.

    Attributes:
        components: size of the expression basis.
        pivot_depth: how far behind the eye corners the head's rotation centre lies, in inter-ocular distances.
        max_yaw: degrees; samples turned further are left out, since their far side is guessed by the teacher.
        closed_lips, open_eyes: ratios that make a sample neutral.
        min_frames: clips with fewer samples say nothing about expression.
    """

    components: int = 32
    pivot_depth: float = 0.9
    max_yaw: float = 30.0
    closed_lips: float = 0.05
    open_eyes: float = 0.2
    min_frames: int = 15


def load_samples(folder: Path) -> tuple[F64, npt.NDArray[np.intp]]:
    """Training samples of a folder as ``faces/README.md`` describes it.

    Returns:
        ``(points [N, 478, 3], clip [N])``: labels of the train split, and the number of the picture or clip.
    """
    entries = json.loads((folder / "mesh.json").read_text())
    points = np.load(folder / "mesh_landmarks.npy", allow_pickle=False).astype(np.float64)
    if len(entries) != len(points):
        raise ValueError(f"{folder}: {len(entries)} entries but {len(points)} rows of landmarks")
    keep = [i for i, e in enumerate(entries) if e["split"] == "train"]
    ids: dict[tuple[str, str], int] = {}
    clip = [ids.setdefault((entries[i]["origin"], entries[i]["path"]), len(ids)) for i in keep]
    return points[keep], np.asarray(clip, np.intp)


def _per_clip_weight(clip: npt.NDArray[np.intp]) -> F64:
    """One over the number of samples that share the clip, so that every clip sums to 1."""
    _, inverse, counts = np.unique(clip, return_inverse=True, return_counts=True)
    return np.asarray(1.0 / counts[inverse])


def _symmetric(shape: F64) -> F64:
    """The mean of a shape ``[..., 478, 3]`` and its mirror image about x = 0."""
    return np.asarray(0.5 * (shape + shape[..., mirror_permutation(), :] * np.array([-1.0, 1.0, 1.0])))


def _align(points: F64, model: F64, rigid: npt.NDArray[np.intp], weight: F64) -> tuple[F64, F64]:
    """Bring samples into the model's frame; returns ``(aligned [N, 478, 3], rotation [N, 3, 3])``."""
    rotation, t, scale = similarity_fit(model[rigid], points[:, rigid], weight)
    return (points - t[:, None]) @ rotation / scale[:, None, None], rotation


def _rigid_points() -> tuple[npt.NDArray[np.intp], F64]:
    mirror = mirror_permutation()
    table = {**RIGID, **{int(mirror[i]): w for i, w in RIGID.items()}}
    index = np.asarray(sorted(table), np.intp)
    return index, np.asarray([table[int(i)] for i in index])


def build_canonical(
    points: F64, clip: npt.NDArray[np.intp], config: CanonicalConfig | None = None
) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, float]]:
    """Canonical face and expression basis.

    Args:
        points: ``[N, 478, 3]`` samples in any scale and position, y down, z away from the camera.
        clip: ``[N]``, samples with one number come from one picture or clip.

    Returns:
        The arrays of :class:`lp_edge.runtime.face_motion.Canonical`, and figures about the data.
    """
    config = config or CanonicalConfig()
    rigid, rigid_weight = _rigid_points()
    lips, eyes = np.asarray(topology.lip_ratio(points)), np.asarray(topology.eye_ratio(points))
    neutral = (lips < config.closed_lips) & (eyes > config.open_eyes).all(-1)

    model = points[int(np.flatnonzero(neutral)[0])]
    model = (model - model[rigid].mean(0)) / np.linalg.norm(model[468] - model[473])
    weight = _per_clip_weight(clip)
    frontal = np.ones(len(points), bool)
    for _ in range(12):
        aligned, rotation = _align(points, model, rigid, rigid_weight)
        pitch, yaw, _roll = euler_from_rotation(rotation)
        frontal = (np.abs(yaw) < config.max_yaw) & (np.abs(pitch) < config.max_yaw)
        use = frontal & neutral
        w = _per_clip_weight(clip[use])
        mean = np.tensordot(w / w.sum(), aligned[use], axes=(0, 0))
        mean = _face_forward(mean)
        # zero pitch is the mean pitch of the people in the data who do not look aside
        near = frontal & (np.abs(yaw) < 15.0)
        mean = mean @ rotation_from_euler(float(np.average(pitch[near], weights=weight[near])), 0.0, 0.0).T
        mean = _symmetric(mean)
        mean[:, 1] -= mean[[33, 133, 362, 263], 1].mean()
        mean[:, 2] -= mean[[33, 133, 362, 263], 2].mean() + config.pivot_depth
        model = mean / np.linalg.norm(mean[468] - mean[473])
    model[:, 2] -= model[[33, 133, 362, 263], 2].mean() + config.pivot_depth

    aligned, rotation = _align(points, model, rigid, rigid_weight)
    rows, used = [], 0
    for number in np.unique(clip):
        member = (clip == number) & frontal
        if member.sum() >= config.min_frames:
            change = aligned[member] - aligned[member].mean(0)
            rows.append(change / np.sqrt(len(change)))
            used += 1
    change = np.concatenate(rows)
    # faces have no preferred side: mirrored samples count as much as the samples
    change = np.concatenate([change, change[:, mirror_permutation()] * np.array([-1.0, 1.0, 1.0])])
    _, singular, vt = np.linalg.svd(change.reshape(len(change), -1), full_matrices=False)
    k = config.components
    basis = vt[:k].reshape(k, -1, 3)
    figures = {
        "samples": float(len(points)),
        "pictures_and_clips": float(len(np.unique(clip))),
        "neutral_samples": float((frontal & neutral).sum()),
        "expression_clips": float(used),
        "variance_kept": float((singular[:k] ** 2).sum() / (singular**2).sum()),
        "rigid_residual": float(np.sqrt(((aligned[frontal][:, rigid] - model[rigid]) ** 2).sum(-1).mean())),
    }
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "points": model.astype(np.float32),
        "basis": basis.astype(np.float16),
        "basis_std": (singular[:k] / np.sqrt(2 * used)).astype(np.float32),
        "rigid": rigid.astype(np.int32),
        "rigid_weight": rigid_weight.astype(np.float32),
    }
    return arrays, figures


def _face_forward(shape: F64) -> F64:
    """Turn a nearly symmetric shape until its mirror plane is x = 0 and centre it there."""
    mirror = mirror_permutation()
    for _ in range(3):
        reflected = shape[mirror] * np.array([-1.0, 1.0, 1.0])
        rotation, _t, _s = similarity_fit(shape - shape.mean(0), reflected - reflected.mean(0))
        # half of the way to the mirror image is the symmetric pose
        pitch, yaw, roll = euler_from_rotation(rotation)
        shape = (shape - shape.mean(0)) @ rotation_from_euler(pitch / 2, yaw / 2, roll / 2).T
    out: F64 = shape.copy()
    out[:, 0] -= 0.5 * (shape[:, 0] + shape[mirror, 0]).mean()
    return out


def write_npz(path: Path, arrays: dict[str, npt.NDArray[np.generic]]) -> None:
    """Write arrays beside ``path``, fsync, rename; the bytes depend on the arrays alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: build ``canonical.npz`` and print what it is made of as JSON."""
    parser = argparse.ArgumentParser(
        description="Build the canonical face of the mesh family from mesh labels."
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with mesh.json and mesh_landmarks.npy"
    )
    parser.add_argument("--out", type=Path, required=True, help="canonical.npz to write")
    args = parser.parse_args(argv)
    arrays, figures = build_canonical(*load_samples(args.data))
    write_npz(args.out, arrays)
    print(json.dumps({"out": str(args.out), "bytes": args.out.stat().st_size, **figures}))


if __name__ == "__main__":
    main()
