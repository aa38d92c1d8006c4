"""The map from LivePortrait's motion to mesh motion: a known map is found again, and the shipped one is sane."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lp_edge.export.mesh import fit_liveportrait as fl
from lp_edge.export.training.face_topology import mirror_permutation
from lp_edge.runtime import liveportrait_template, topology
from lp_edge.runtime.face_motion import Canonical, load_canonical
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.liveportrait_template import load_map
from lp_edge.runtime.motion import Motion

SHIPPED = (
    Path(liveportrait_template.__file__).resolve().parent.parent
    / "engines"
    / "data"
    / "mesh"
    / "liveportrait_map.npz"
)
UNIT, PIVOT, PITCH = 0.29, np.array([0.0, -0.06, 0.12]), -5.0


@pytest.fixture(scope="module")
def canonical() -> Canonical:
    return load_canonical()


def _order() -> np.ndarray:
    order = np.arange(21)
    for a, b in fl.MIRRORED_KEYPOINTS:
        order[[a, b]] = b, a
    return order


def _known_field(canonical: Canonical) -> np.ndarray:
    """A mirror-symmetric linear map ``[63, 478 x 3]`` whose eye keypoints move the upper part of the face alone, and
    whose other keypoints, brows apart, the lower one."""
    rng = np.random.default_rng(1)
    k = len(canonical.basis)
    field = (rng.normal(0, 1, (63, k)) @ canonical.basis.reshape(k, -1)).reshape(21, 3, 478, 3)
    upper = canonical.points[:, 1] < fl._BORDER
    for keypoint in range(21):
        if keypoint in (11, 13, 15, 16, 18):
            field[keypoint][:, ~upper] = 0.0
        elif keypoint not in (1, 2):
            field[keypoint][:, upper] = 0.0
    flip = np.array([-1.0, 1.0, 1.0])
    twin = field[_order()][:, :, mirror_permutation()] * flip[:, None, None] * flip
    return 0.5 * (field + twin).reshape(63, -1)


def _pair(name: str, canonical: Canonical, field: np.ndarray, seed: int, noise: float = 0.0) -> fl.Pair:
    rng = np.random.default_rng(seed)
    frames = 120
    exp = rng.normal(0, 0.01, (frames, 21, 3))
    turn = rotation_from_euler(*rng.uniform(-15, 15, (3, frames)))
    scale, t = rng.uniform(1.5, 1.7, frames), rng.normal(0, 0.05, (frames, 3))
    ratios = 0.3 + np.stack([exp[:, 11, 1] - exp[:, 13, 1], exp[:, 15, 1] - exp[:, 16, 1]], 1)
    lips = 0.2 + exp[:, 19, 1]
    template = Motion(turn, t, scale, exp, ratios, lips)
    expression = (exp.reshape(frames, 63) @ field).reshape(frames, 478, 3)
    mesh = Motion(
        turn @ rotation_from_euler(PITCH, 0, 0),
        t + scale[:, None] * (turn @ PIVOT),
        UNIT * scale,
        expression + noise * rng.normal(0, 1, expression.shape) + 0.1 * rng.normal(0, 1, (478, 3)),
        0.8 * ratios,
        0.9 * lips,
    )
    return fl.Pair(name, mesh, template)


def test_a_known_map_is_found(canonical: Canonical, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fl, "_BLEND", 0.003)  # a sharp border keeps the parts of the known map apart
    field = _known_field(canonical)
    pairs = [_pair(str(i), canonical, field, i) for i in range(3)]
    arrays, figures = fl.fit(pairs, canonical)
    k = len(canonical.basis)
    guess = np.tensordot(arrays["weights"][:, :k], canonical.basis, axes=1).reshape(63, -1)
    basis = canonical.basis.reshape(k, -1).astype(np.float64)
    within = field @ basis.T @ basis  # what the basis can say of it
    assert ((guess - within) ** 2).sum() / (within**2).sum() < 1e-3
    assert float(arrays["unit"]) == pytest.approx(UNIT, rel=1e-4)
    assert arrays["pivot"] == pytest.approx(PIVOT, abs=1e-4)
    assert arrays["rotation"] == pytest.approx(rotation_from_euler(PITCH, 0, 0), abs=1e-4)
    rest = float(topology.eye_ratio(canonical.points).mean())
    assert arrays["own_ratio"] == pytest.approx([rest / 0.3, 0.9], rel=0.02)
    assert figures["own_ratios"]["eyes"]["regression"] == pytest.approx([0.8, 0.0], abs=1e-4)
    eye = arrays["weights"][:, k].reshape(21, 3)
    assert eye[11, 1] == pytest.approx(1.0, abs=0.01) and eye[13, 1] == pytest.approx(-1.0, abs=0.01)
    assert np.abs(np.delete(eye, [11, 13], axis=0)).max() < 0.01
    for score in figures["left_out"].values():
        assert (
            score["r2"] > ((within**2).sum() / (field**2).sum()) - 0.1
            and score["eye_ratio_r2"] > 0.99
            and score["lip_ratio_r2"] > 0.99
        )
    for name in "012":
        assert figures["pose"][name]["yaw"]["mean_abs_degrees"] < 0.01
        assert figures["pose"][name]["translation"]["rms_error_iod"] < 1e-3


def test_noise_is_not_explained_in_left_out_clips(canonical: Canonical) -> None:
    pairs = [_pair(str(i), canonical, 0 * _known_field(canonical), i, noise=0.02) for i in range(3)]
    _arrays, figures = fl.fit(pairs, canonical)
    assert all(score["r2"] < 0.02 for score in figures["left_out"].values())


def test_pairs_that_do_not_match_are_refused(canonical: Canonical) -> None:
    a, b = (_pair(str(i), canonical, _known_field(canonical), i) for i in range(2))
    with pytest.raises(ValueError, match="needs two"):
        fl.fit([a], canonical)
    with pytest.raises(ValueError, match="119 frames in the clip, 120 in the template"):
        fl.fit([a, replace(b, mesh=b.mesh[1:])], canonical)


def test_the_shipped_map_has_no_preferred_side(canonical: Canonical) -> None:
    mapping = load_map()
    assert SHIPPED.stat().st_size <= 40_000
    k = len(canonical.basis)
    flip = np.array([-1.0, 1.0, 1.0])
    field = np.tensordot(mapping.weights[:, :k], canonical.basis, axes=1).reshape(21, 3, 478, 3)
    twin = field[_order()][:, :, mirror_permutation()] * flip[:, None, None] * flip
    assert np.linalg.norm(field - twin) < 0.1 * np.linalg.norm(field)
    assert 0.25 < mapping.unit < 0.33
    assert np.all((mapping.own_ratio > 0.5) & (mapping.own_ratio < 2))
    assert np.abs(mapping.rotation @ mapping.rotation.T - np.eye(3)).max() < 1e-5
