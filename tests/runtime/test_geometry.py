from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_edge.runtime.geometry import euler_from_rotation, orthonormal, rotation_from_euler, similarity_fit

angle = st.floats(-85, 85)


@given(angle, angle, angle)
def test_angles_survive_the_round_trip(pitch: float, yaw: float, roll: float) -> None:
    rotation = rotation_from_euler(pitch, yaw, roll)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(euler_from_rotation(rotation), (pitch, yaw, roll), atol=1e-6)


@pytest.mark.parametrize(
    ("angles", "point", "axis"),
    [((20, 0, 0), (0, 0, -1), 1), ((0, 20, 0), (0, 0, -1), 0), ((0, 0, 20), (0, -1, 0), 0)],
    ids=["pitch looks down", "yaw turns the nose right", "roll tilts the crown right"],
)
def test_signs(angles: tuple[float, ...], point: tuple[float, ...], axis: int) -> None:
    assert (rotation_from_euler(*angles) @ np.array(point))[axis] == pytest.approx(np.sin(np.deg2rad(20)))


def test_similarity_is_recovered_for_a_stack_and_ignores_weightless_points() -> None:
    rng = np.random.default_rng(0)
    model = rng.normal(size=(20, 3))
    rotation = rotation_from_euler(10, -30, 5)
    target = 2.5 * model @ rotation.T + [3, -4, 5]
    spoiled = target.copy()
    spoiled[0] += 100
    weights = np.ones(20)
    weights[0] = 0
    r, t, s = similarity_fit(model, np.stack([target, spoiled]), weights)
    np.testing.assert_allclose(r, np.stack([rotation] * 2), atol=1e-9)
    np.testing.assert_allclose(t, [[3, -4, 5]] * 2, atol=1e-9)
    np.testing.assert_allclose(s, [2.5, 2.5], atol=1e-9)


def test_a_mirrored_target_does_not_give_a_reflection() -> None:
    model = np.random.default_rng(1).normal(size=(20, 3))
    rotation, _, _ = similarity_fit(model, model * [-1, 1, 1])
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_orthonormal_gives_the_nearest_rotation() -> None:
    rotation = rotation_from_euler(10, 20, 30)
    np.testing.assert_allclose(orthonormal(rotation * 1.01 + 1e-4), rotation, atol=1e-3)
    assert np.linalg.det(orthonormal(np.diag([1.0, 1.0, -1.0]))) == pytest.approx(1)
