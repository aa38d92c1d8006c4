from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_edge.runtime import topology
from lp_edge.runtime.compose import Limits, compose, set_gaps, soft_limit
from lp_edge.runtime.face_motion import load_canonical, motion_from_points, points_from_motion
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import REGIONS, AnimateOptions

FACE = load_canonical()
POINTS = FACE.points.astype(np.float64)


def head(
    pitch: float = 0,
    yaw: float = 0,
    roll: float = 0,
    *,
    scale: float = 100,
    shift: float = 0,
    shape: np.ndarray | None = None,
) -> Motion:
    shape = POINTS if shape is None else shape
    return motion_from_points(
        scale * shape @ rotation_from_euler(pitch, yaw, roll).T + [300 + shift, 300, 0], FACE
    )


def with_gap(pairs: tuple[tuple[int, int], ...], factor: float) -> np.ndarray:
    """The canonical face with the gaps of lids or lips scaled (lips: opened by ``factor`` units)."""
    shape = POINTS.copy()
    for upper, lower in pairs:
        if pairs is topology.INNER_LIP_PAIRS:
            shape[lower, 1] += factor
        else:
            shape[upper] = shape[lower] + factor * (shape[upper] - shape[lower])
    return shape


PLAIN = Limits(gain=(1.0, 1.0, 1.0), lip_gain=1.0, eye_gain=1.0)


def run(
    source: Motion, driving: Motion, neutral: Motion, limits: Limits = PLAIN, **options: object
) -> Motion:
    basis = FACE.basis.astype(np.float64)
    return compose(source, driving, neutral, POINTS, AnimateOptions(**options), basis=basis, limits=limits)


@given(st.floats(-200, 200), st.floats(0, 50), st.floats(1, 50))
def test_soft_limit_is_odd_bounded_and_keeps_small_values(value: float, knee: float, room: float) -> None:
    limited = float(soft_limit(value, knee, knee + room))
    assert limited == pytest.approx(-float(soft_limit(-value, knee, knee + room)))
    assert abs(limited) <= min(abs(value), knee + room) + 1e-9
    if abs(value) <= knee:
        assert limited == value


def test_soft_limit_never_falls() -> None:
    values = soft_limit(np.linspace(-90, 90, 400), 20, 30)
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize("region", REGIONS)
def test_no_change_of_the_driver_leaves_the_source_as_it_is(region: str) -> None:
    source, driver = head(3, -8, 2), head(-5, 12, 1, scale=180, shape=with_gap(topology.INNER_LIP_PAIRS, 0.1))
    out = points_from_motion(run(source, driver, driver, region=region), FACE)
    np.testing.assert_allclose(out, points_from_motion(source, FACE), atol=0.02)


def test_relative_pose_is_the_change_of_the_driver() -> None:
    out = run(head(0, 5, 0), head(0, 20, 0), head(0, 8, 0))
    assert out.angles[1] == pytest.approx(17, abs=0.1)


def test_the_gain_makes_up_for_what_a_warp_shows_too_little_of() -> None:
    pitch, yaw, roll = run(head(), head(4, 10, 5), head(), Limits(gain=(1.5, 1.2, 1.0))).angles
    assert (float(pitch), float(yaw), float(roll)) == pytest.approx((6, 12, 5), abs=0.2)


def test_absolute_pose_is_that_of_the_driver() -> None:
    out = run(head(0, 5, 0), head(0, 20, 0), head(0, 8, 0), relative=False)
    assert out.angles[1] == pytest.approx(20, abs=0.1)


def test_large_turns_stop_at_the_limit() -> None:
    out = run(head(), head(0, 80, 0), head())
    assert Limits().yaw[0] < float(out.angles[1]) <= Limits().yaw[1]


def test_translation_and_scale_follow_in_the_sources_measure() -> None:
    out = run(head(scale=50), head(scale=220, shift=44), head(scale=200))
    assert out.scale == pytest.approx(55, rel=1e-3)
    # 44 px at 200 px per unit = 0.22 units = 11 px at the source's 50
    assert float(out.translation[0] - head(scale=50).translation[0]) == pytest.approx(11, abs=0.05)


def test_multiplier_scales_the_change() -> None:
    assert run(head(), head(0, 10, 0), head(), multiplier=1.5).angles[1] == pytest.approx(15, abs=0.1)
    assert run(head(), head(0, 10, 0), head(), multiplier=0.0).angles[1] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("openness", [0.5, 1.0, 1.3])
def test_a_closing_driver_closes_eyes_of_any_width(openness: float) -> None:
    lids = topology.LID_PAIRS_IMAGE_LEFT + topology.LID_PAIRS_IMAGE_RIGHT
    source = head(shape=with_gap(lids, openness))
    shut = points_from_motion(run(source, head(shape=with_gap(lids, 0.0)), head()), FACE)
    assert (topology.eye_ratio(shut) < 0.01).all()
    half = points_from_motion(run(source, head(shape=with_gap(lids, 0.6)), head()), FACE)
    assert (topology.eye_ratio(half) > 0.3 * source.eye_ratio).all()
    assert (topology.eye_ratio(half) < 0.8 * source.eye_ratio).all()


def test_a_widening_eye_gains_what_the_drivers_gains() -> None:
    lids = topology.LID_PAIRS_IMAGE_LEFT + topology.LID_PAIRS_IMAGE_RIGHT
    narrow, wider = head(shape=with_gap(lids, 0.5)), head(shape=with_gap(lids, 0.7))
    out = points_from_motion(run(head(), wider, narrow), FACE)
    gained = topology.eye_ratio(out) - head().eye_ratio
    np.testing.assert_allclose(gained, wider.eye_ratio - narrow.eye_ratio, rtol=0.25)


def test_one_eye_closes_alone() -> None:
    wink = head(shape=with_gap(topology.LID_PAIRS_IMAGE_LEFT, 0.0))
    left, right = topology.eye_ratio(points_from_motion(run(head(), wink, head()), FACE))
    assert left < 0.01
    assert right == pytest.approx(float(head().eye_ratio[1]), rel=0.05)


def test_lips_open_with_the_driver_and_never_cross() -> None:
    opened = head(shape=with_gap(topology.INNER_LIP_PAIRS, 0.2))
    assert topology.lip_ratio(points_from_motion(run(head(), opened, head()), FACE)) > 0.1
    closing = points_from_motion(run(head(), head(), opened), FACE)
    for upper, lower in topology.INNER_LIP_PAIRS:
        assert closing[lower, 1] >= closing[upper, 1] - 1e-3


@pytest.mark.parametrize(
    ("region", "moves", "turns"),
    [
        ("all", {"eyes", "lip"}, True),
        ("exp", {"eyes", "lip"}, False),
        ("pose", set(), True),
        ("lip", {"lip"}, False),
        ("eyes", {"eyes"}, False),
    ],
)
def test_regions_take_only_their_part(region: str, moves: set[str], turns: bool) -> None:
    lids = topology.LID_PAIRS_IMAGE_LEFT + topology.LID_PAIRS_IMAGE_RIGHT
    shape = with_gap(topology.INNER_LIP_PAIRS, 0.2) + with_gap(lids, 0.3) - POINTS
    out = run(head(), head(0, 12, 0, shape=shape), head(), region=region)
    assert (abs(float(out.angles[1])) > 6) is turns
    points = points_from_motion(replace(out, rotation=np.eye(3, dtype=np.float32)), FACE)
    assert (float(topology.lip_ratio(points)) > 0.1) is ("lip" in moves)
    assert bool((topology.eye_ratio(points) < 0.6 * head().eye_ratio).all()) is ("eyes" in moves)


def test_absolute_expression_needs_the_basis() -> None:
    with pytest.raises(ValueError, match="basis"):
        compose(head(), head(), head(), POINTS, AnimateOptions(relative=False))


def test_a_pair_that_all_but_touches_opens_without_being_thrown_sideways() -> None:
    points = np.array([[0.0, 0.0, 0.0], [0.03, 0.00016, 0.01]])
    set_gaps(points, np.array([[0, 1]]), np.array([0.0029]), upper_share=0.85)
    upper, lower = points
    assert lower[1] - upper[1] == pytest.approx(0.0029, abs=1e-9)
    # the gap grows by a factor of 18; so did the way sideways: 0.5 units, half of the distance between the eyes
    assert abs(lower[0] - upper[0]) <= 0.061
    assert np.abs(points[:, 0] - [0.0, 0.03]).max() < 0.03


def test_a_pair_that_opens_to_less_than_twice_keeps_its_direction() -> None:
    points = np.array([[0.0, 0.0, 0.0], [0.01, 0.02, 0.0]])
    set_gaps(points, np.array([[0, 1]]), np.array([0.03]), upper_share=0.5)
    np.testing.assert_allclose(points[1] - points[0], [0.015, 0.03, 0.0])
