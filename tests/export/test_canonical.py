"""The canonical face: what it promises, that it can be rebuilt, and motion read with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lp_edge.errors import BundleError, TensorError
from lp_edge.export.mesh.canonical import CanonicalConfig, build_canonical, load_samples, main
from lp_edge.export.training.face_topology import mirror_permutation
from lp_edge.runtime import face_motion, topology
from lp_edge.runtime.face_motion import Canonical, load_canonical, motion_from_points, points_from_motion
from lp_edge.runtime.geometry import rotation_from_euler

SHIPPED = Path(face_motion.__file__).resolve().parent.parent / "engines" / "data" / "mesh" / "canonical.npz"


@pytest.fixture(scope="module")
def canonical() -> Canonical:
    return load_canonical()


def _mirrored(shape: np.ndarray) -> np.ndarray:
    return shape[..., mirror_permutation(), :] * [-1.0, 1.0, 1.0]


def test_the_file_is_small() -> None:
    assert SHIPPED.stat().st_size <= 150_000


def test_unit_origin_and_symmetry(canonical: Canonical) -> None:
    p = canonical.points
    assert np.linalg.norm(p[468] - p[473]) == pytest.approx(1.0, abs=1e-5)
    corners = p[[33, 133, 362, 263]]
    assert corners[:, 1].mean() == pytest.approx(0.0, abs=1e-5)
    assert corners[:, 2].mean() == pytest.approx(-CanonicalConfig.pivot_depth, abs=1e-5)
    assert np.abs(p - _mirrored(p)).max() < 1e-5
    assert p[468, 0] < 0 < p[473, 0]  # x to the right in the picture
    assert p[152, 1] > p[1, 1] > p[10, 1]  # y down
    assert p[1, 2] < p[33, 2] < p[234, 2]  # z away from the camera


def test_the_face_is_neutral_and_natural(canonical: Canonical) -> None:
    assert topology.lip_ratio(canonical.points) < 0.02
    assert 0.2 < topology.eye_ratio(canonical.points).min() < 0.35
    index = np.asarray(topology.INNER_LIP_PAIRS)
    assert (canonical.points[index[:, 1], 1] - canonical.points[index[:, 0], 1]).min() > -1e-3
    # proportions of adults: face width over inter-ocular distance, face height over width
    p = canonical.points
    width, height = np.ptp(p[:, 0]), np.ptp(p[:, 1])
    assert 2.0 < width < 2.5
    assert 1.05 < height / width < 1.4


def test_the_basis_is_orthonormal_and_sorted(canonical: Canonical) -> None:
    flat = canonical.basis.reshape(len(canonical.basis), -1)
    assert 24 <= len(flat) <= 32
    assert np.abs(flat @ flat.T - np.eye(len(flat))).max() < 2e-3
    assert np.all(np.diff(canonical.basis_std) <= 0)
    assert canonical.basis_std[-1] > 0


def test_the_basis_holds_no_pose(canonical: Canonical) -> None:
    """Moving the rigid points alone is what pose does; expression leaves them nearly where they are."""
    share = (canonical.basis[:, canonical.rigid] ** 2).sum((1, 2)) / len(canonical.rigid)
    others = (canonical.basis**2).sum((1, 2)) / 478
    assert np.average(share / others, weights=canonical.basis_std**2) < 0.2


@pytest.mark.parametrize("seed", range(4))
def test_motion_and_points_are_inverse(seed: int, canonical: Canonical) -> None:
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-40, 40, 3)
    rotation, scale, place = rotation_from_euler(*angles), rng.uniform(20, 400), rng.uniform(-500, 500, 3)
    points = scale * canonical.points @ rotation.T + place
    motion = motion_from_points(points, canonical)
    assert [float(a) for a in motion.angles] == pytest.approx(angles.tolist(), abs=0.01)
    assert motion.translation == pytest.approx(place, abs=0.01)
    assert float(motion.scale) == pytest.approx(scale, rel=1e-5)
    assert np.abs(motion.expression).max() < 1e-4
    assert np.abs(points_from_motion(motion, canonical) - points).max() < 0.01


def test_expression_does_not_leak_into_pose(canonical: Canonical) -> None:
    rng = np.random.default_rng(0)
    changed = canonical.points + np.tensordot(
        rng.normal(0, 1, len(canonical.basis)) * canonical.basis_std, canonical.basis, axes=1
    )
    motion = motion_from_points(changed * 100, canonical)
    assert max(abs(float(a)) for a in motion.angles) < 1.0
    assert np.abs(motion.expression - (changed - canonical.points)).max() < 0.05


def test_runs_of_frames_keep_their_axes(canonical: Canonical) -> None:
    points = np.stack([canonical.points * 90, canonical.points * 120 + 5])
    run = motion_from_points(points, canonical)
    assert run.expression.shape == (2, 478, 3)
    assert run.eye_ratio.shape == (2, 2)
    one = motion_from_points(points[1], canonical)
    assert np.allclose(run[1].translation, one.translation, atol=1e-4)
    assert points_from_motion(run, canonical).shape == (2, 478, 3)
    assert run.rotation.dtype == run.scale.dtype == run.lip_ratio.dtype == np.float32


def test_points_that_are_no_face_are_refused(canonical: Canonical) -> None:
    with pytest.raises(TensorError, match=r"expected \[\.\.\., 478, 3\]"):
        motion_from_points(np.zeros((468, 3)), canonical)
    with pytest.raises(TensorError, match="NaN"):
        motion_from_points(np.full((478, 3), np.nan), canonical)
    with pytest.raises(TensorError, match="coincide"):
        motion_from_points(np.zeros((478, 3)), canonical)
    with pytest.raises(TensorError, match="to_mesh"):
        motion = motion_from_points(canonical.points, canonical)
        points_from_motion(
            type(motion)(**{**vars(motion), "expression": np.zeros((21, 3), np.float32)}), canonical
        )


def test_broken_tables_are_refused(tmp_path: Path, canonical: Canonical) -> None:
    good = dict(np.load(SHIPPED))
    for change, message in (
        ({"points": None}, "no array 'points'"),
        ({"points": good["points"][:400]}, r"\(400, 3\)"),
        ({"basis": good["basis"][:3]}, "'basis'"),
        ({"basis": np.full_like(good["basis"], np.nan)}, "NaN"),
        ({"rigid": good["rigid"] + 400}, "no list of points"),
    ):
        table = {k: v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(BundleError, match=message):
            Canonical.from_table(table)
    (tmp_path / "a.npz").write_bytes(SHIPPED.read_bytes()[:5000])
    for name in ("a.npz", "none.npz"):
        with pytest.raises(BundleError, match="cannot read"):
            load_canonical(tmp_path / name)


# --- building ----------------------------------------------------------------------------------------------


def _made_samples(
    canonical: Canonical, clips: int = 6, frames: int = 24
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips of faces of several widths that move along one known direction, in random poses."""
    rng = np.random.default_rng(0)
    direction = np.zeros((478, 3))
    lower = [i for i in topology.REGIONS["lip"] if canonical.points[i, 1] > canonical.points[14, 1] + 0.05]
    direction[lower, 1] = 1.0
    points, clip = [], []
    for number in range(clips):
        shape = canonical.points * (1 + 0.06 * rng.uniform(-1, 1, 3))
        for frame in range(frames):
            move = 0.0 if frame % 2 else rng.uniform(0, 0.3)
            pose = rotation_from_euler(*rng.uniform(-12, 12, 3))
            points.append(rng.uniform(60, 90) * (shape + move * direction) @ pose.T + rng.uniform(0, 200, 3))
            clip.append(number)
    return np.stack(points), np.asarray(clip), direction / np.linalg.norm(direction)


def test_a_known_face_and_a_known_expression_are_found(canonical: Canonical) -> None:
    points, clip, direction = _made_samples(canonical)
    arrays, figures = build_canonical(points, clip, CanonicalConfig(components=4, closed_lips=0.2))
    built = arrays["points"].astype(np.float64)
    assert np.linalg.norm(built[468] - built[473]) == pytest.approx(1.0, abs=1e-5)
    assert np.abs(built - _mirrored(built)).max() < 1e-5
    # same face up to the drawn widths and the choice of zero pitch
    motion = motion_from_points(built, canonical)
    assert np.abs(motion.expression[list(range(0, 468, 7))]).max() < 0.12
    assert abs(float(motion.angles[1])) < 0.01 and abs(float(motion.angles[2])) < 0.01
    first = arrays["basis"][0].astype(np.float64)
    assert abs(float((first * direction).sum())) > 0.97
    assert figures["expression_clips"] == 6
    assert figures["pictures_and_clips"] == 6


def test_every_clip_counts_alike(canonical: Canonical) -> None:
    points, clip, _ = _made_samples(canonical, clips=4)
    once, _ = build_canonical(points, clip, CanonicalConfig(components=2, closed_lips=0.2))
    many = np.concatenate([points, *[points[clip == 2]] * 5])
    again, _ = build_canonical(
        many, np.concatenate([clip, np.full(5 * 24, 2)]), CanonicalConfig(components=2, closed_lips=0.2)
    )
    assert np.abs(once["points"].astype(float) - again["points"].astype(float)).max() < 1e-4


@pytest.fixture(scope="module")
def faces(shared: Path) -> Path:
    folder = shared / "faces"
    if not (folder / "mesh_landmarks.npy").is_file():
        pytest.skip(f"no mesh labels at {folder}")
    return folder


def test_the_shipped_file_is_rebuilt_from_the_labels(
    faces: Path, tmp_path: Path, canonical: Canonical, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--data", str(faces), "--out", str(tmp_path / "a.npz")])
    assert '"variance_kept"' in capsys.readouterr().out
    built = load_canonical(tmp_path / "a.npz")
    assert np.abs(built.points - canonical.points).max() < 1e-4
    # the sign of a principal component is free
    cosine = np.abs((built.basis * canonical.basis).sum((1, 2)))
    assert cosine.min() > 0.99
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_only_training_samples_are_read(faces: Path) -> None:
    import json

    points, clip = load_samples(faces)
    entries = json.loads((faces / "mesh.json").read_text())
    train = [e for e in entries if e["split"] == "train"]
    assert len(points) == len(clip) == len(train) < len(entries)
    assert len(np.unique(clip)) == len({(e["origin"], e["path"]) for e in train})
