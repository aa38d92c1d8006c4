"""The face-mesh topology: groups, regions, ratios; and, where the shared face data is there, its labels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lp_edge.export.training import face_topology
from lp_edge.runtime import topology
from lp_edge.tests.runtime.face_toys import TEMPLATE, posed

SHARED = Path(os.environ.get("LP_EDGE_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@pytest.fixture(scope="module")
def labels() -> npt.NDArray[np.float32]:
    """Labels of nearly frontal faces [N, 478, 3]."""
    path = SHARED / "faces" / "mesh_landmarks.npy"
    if not path.is_file():
        pytest.skip(f"{path} is absent: the shared face data is not on this machine")
    p = np.load(path, allow_pickle=False).astype(np.float32)[::5]
    eyes = p[:, 473] - p[:, 468]
    return np.asarray(p[np.abs(eyes[:, 2]) < 0.15 * np.linalg.norm(eyes[:, :2], axis=1)])


def test_regions_are_disjoint_and_complete() -> None:
    parts = [set(r) for r in topology.REGIONS.values()]
    assert set(topology.REGIONS) == {"eyes", "lip", "rest"}
    assert sum(map(len, parts)) == topology.NUM_POINTS == sum(map(len, topology.REGIONS.values()))
    assert set().union(*parts) == set(range(topology.NUM_POINTS))
    assert {*topology.LEFT_EYE, *topology.RIGHT_EYE, *topology.LEFT_IRIS, *topology.RIGHT_IRIS} <= parts[0]
    lips = (
        topology.OUTER_LIP_UPPER,
        topology.OUTER_LIP_LOWER,
        topology.INNER_LIP_UPPER,
        topology.INNER_LIP_LOWER,
    )
    assert {i for line in lips for i in line} | {topology.CHIN} <= set(topology.REGIONS["lip"])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (topology.LEFT_EYE, topology.RIGHT_EYE),
        (topology.LEFT_IRIS, topology.RIGHT_IRIS),
        (topology.LEFT_BROW, topology.RIGHT_BROW),
        ([i for pair in topology.LID_PAIRS_IMAGE_LEFT for i in pair], [i for p in topology.LID_PAIRS_IMAGE_RIGHT for i in p]),
        (topology.RIGID, topology.RIGID),
        (topology.FACE_OVAL, topology.FACE_OVAL),
        (topology.NOSE, topology.NOSE),
        (topology.REGIONS["eyes"], topology.REGIONS["eyes"]),
        (topology.REGIONS["lip"], topology.REGIONS["lip"]),
    ],
)  # fmt: skip
def test_groups_mirror_each_other(left: list[int], right: list[int]) -> None:
    mirror = face_topology.mirror_permutation()
    assert {int(mirror[i]) for i in left} == set(right)
    assert len(set(left)) == len(left)


def test_lid_and_lip_pairs_join_the_right_lines() -> None:
    for ring, pairs in (
        (topology.LEFT_EYE, topology.LID_PAIRS_IMAGE_LEFT),
        (topology.RIGHT_EYE, topology.LID_PAIRS_IMAGE_RIGHT),
    ):
        upper, lower = ring[1:8], ring[9:][::-1]
        assert tuple(zip(upper, lower, strict=True)) == pairs
    for a, b in topology.INNER_LIP_PAIRS:
        assert topology.INNER_LIP_UPPER.index(a) == topology.INNER_LIP_LOWER.index(b)


def _area(ring: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    x, y = ring[..., 0], ring[..., 1]
    return np.asarray((x * np.roll(y, -1, -1) - y * np.roll(x, -1, -1)).sum(-1) / 2)


def test_labels_lie_as_the_names_say(labels: npt.NDArray[np.float32]) -> None:
    p = labels
    for ring in (
        topology.FACE_OVAL,
        topology.LEFT_EYE,
        topology.RIGHT_EYE,
        topology.LEFT_BROW,
        topology.RIGHT_BROW,
    ):
        assert (_area(p[:, list(ring)]) > 0).mean() > 0.99  # clockwise as seen, y down
    roll = topology.eye_roll(p)
    c, s = np.cos(roll)[:, None], np.sin(roll)[:, None]
    x, y = p[..., 0] * c + p[..., 1] * s, p[..., 1] * c - p[..., 0] * s
    assert (x[:, topology.LEFT_IRIS_CENTRE] < x[:, topology.RIGHT_IRIS_CENTRE]).all()
    assert (y[:, topology.FOREHEAD_TOP] < y[:, topology.NOSE_TIP]).all()
    assert (y[:, topology.NOSE_TIP] < y[:, topology.CHIN]).all()
    assert (x[:, topology.LEFT_SIDE] < x[:, topology.RIGHT_SIDE]).all()
    for line in (topology.OUTER_LIP_UPPER, topology.INNER_LIP_LOWER):
        assert (np.diff(x[:, list(line)], axis=1) > 0).mean() > 0.97
    for upper, lower in (
        (topology.OUTER_LIP_UPPER, topology.OUTER_LIP_LOWER),
        (topology.LEFT_EYE[1:8], topology.LEFT_EYE[:8:-1]),
    ):
        assert (y[:, list(upper)] < y[:, list(lower)] + 1.0).mean() > 0.97  # fmt: skip
    assert (x[:, 469] > x[:, 471]).all() and (y[:, 470] < y[:, 472]).all()


def test_rigid_points_move_less_than_the_mouth(labels: npt.NDArray[np.float32]) -> None:
    index = json.loads((SHARED / "faces" / "mesh.json").read_text())
    points = np.load(SHARED / "faces" / "mesh_landmarks.npy", allow_pickle=False).astype(np.float64)
    clips: dict[str, list[int]] = {}
    for i, entry in enumerate(index):
        clips.setdefault(entry["origin"] + entry["path"], []).append(i)
    from lp_edge.runtime.geometry import similarity_fit

    rigid, lips = list(topology.RIGID), [*topology.INNER_LIP_UPPER, *topology.INNER_LIP_LOWER]
    ratio = []
    for rows in clips.values():
        p = points[rows][:20]
        if len(p) < 8 or np.ptp(topology.lip_ratio(p)) < 0.15:
            continue
        rotation, t, scale = similarity_fit(p[0, rigid], p[:, rigid])
        left = (p - t[:, None]) @ rotation / scale[:, None, None] - p[0]
        ratio.append(
            np.linalg.norm(left[:, rigid], axis=-1).mean() / np.linalg.norm(left[:, lips], axis=-1).mean()
        )
    assert len(ratio) >= 5
    assert np.median(ratio) < 0.5


def test_ratios_of_labels_are_in_range(labels: npt.NDArray[np.float32]) -> None:
    eyes, lips = topology.eye_ratio(labels), topology.lip_ratio(labels)
    assert eyes.shape == (len(labels), 2) and lips.shape == (len(labels),)
    assert eyes.min() >= 0 and eyes.max() < 0.7 and 0.2 < np.median(eyes) < 0.4
    assert lips.min() >= 0 and lips.max() < 1.5 and np.median(lips) < 0.15
    assert np.corrcoef(eyes.T)[0, 1] > 0.7


def test_ratios_do_not_depend_on_place_size_and_roll() -> None:
    for p in (posed(50, 70, 33), posed(500, 20, 400, 0.7), posed(0, 0, 100, -2.5)):
        np.testing.assert_allclose(topology.eye_ratio(p), topology.eye_ratio(TEMPLATE), atol=1e-4)
        np.testing.assert_allclose(topology.lip_ratio(p), topology.lip_ratio(TEMPLATE), atol=1e-4)
        np.testing.assert_allclose(topology.iris_position(p), 0.5, atol=1e-4)


def test_ratios_measure_the_gap() -> None:
    p = TEMPLATE.copy()
    for upper, lower in topology.LID_PAIRS_IMAGE_LEFT:
        p[upper] = p[lower]
    for upper, lower in topology.INNER_LIP_PAIRS:
        p[lower] = p[upper] + np.array([0.0, 0.12, 0.0], np.float32)
    left, right = topology.eye_ratio(p)
    assert left == 0 and right == pytest.approx(topology.eye_ratio(TEMPLATE)[1])
    assert topology.lip_ratio(p) == pytest.approx(0.12 / 0.3, rel=1e-4)


def test_roll_and_five_points() -> None:
    for roll in (0.0, 0.4, -1.2, 3.0):
        p = posed(10, 20, 90, roll)
        assert float(topology.eye_roll(p)) == pytest.approx(roll, abs=1e-5)
    stack = np.stack([posed(10, 20, 90, r) for r in (0.1, 0.2)])
    np.testing.assert_allclose(topology.eye_roll(stack), [0.1, 0.2], atol=1e-5)
    five = topology.five_points(stack)
    assert (
        five.shape == (2, 5, 2)
        and (five[:, 0, 0] < five[:, 1, 0]).all()
        and (five[:, 3, 0] < five[:, 4, 0]).all()
    )
