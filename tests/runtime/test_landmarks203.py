"""The mesh in LivePortrait's 203-point convention: which point is which, calibrated ratios, crops."""

from __future__ import annotations

import numpy as np
import pytest

from lp_edge.engines.bundle import builtin_directory
from lp_edge.errors import TensorError
from lp_edge.runtime import topology
from lp_edge.runtime.crop import driving_box, source_matrix, transform_points
from lp_edge.runtime.face_motion import load_canonical
from lp_edge.runtime.landmarks203 import CALIBRATION, MeshLandmarks, RatioMap, mesh_to_203
from lp_edge.runtime.liveportrait_motion import eye_ratio_203, lip_ratio_203


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    """The canonical face, float64 [478, 2], inter-ocular distance 100."""
    canonical = load_canonical(builtin_directory() / "canonical.npz")
    return canonical.points[:, :2].astype(np.float64) * 100


def opened(face: np.ndarray, eyes: float, mouth: float) -> np.ndarray:
    """The face with its lid gaps times ``eyes`` and its inner and outer lower lip lower by ``mouth``."""
    out = face.copy()
    for pairs in (topology.LID_PAIRS_IMAGE_LEFT, topology.LID_PAIRS_IMAGE_RIGHT):
        a, b = np.array(pairs).T
        middle = (out[a] + out[b]) / 2
        out[a], out[b] = middle + eyes * (out[a] - middle), middle + eyes * (out[b] - middle)
    for line in (topology.INNER_LIP_LOWER, topology.OUTER_LIP_LOWER):
        u = np.linspace(-1, 1, len(line))
        out[list(line), 1] += mouth * (1 - u**2)
    return out


def turned(points: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    a = np.radians(degrees)
    return points @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) * scale + shift


@pytest.mark.parametrize(
    ("landmark", "point"),
    [
        *((0, 33), (6, 159), (12, 133), (18, 145), (24, 362), (30, 386), (36, 263), (42, 374)),
        *((48, 61), (57, 0), (66, 291), (75, 17), (84, 78), (90, 13), (96, 308), (102, 14)),
        *((108, 127), (126, 152), (144, 356), (197, 468), (198, 473), (150, 105), (170, 334)),
    ],
)
def test_named_points(landmark: int, point: int) -> None:
    mesh = np.random.default_rng(1).normal(size=(478, 3))
    np.testing.assert_allclose(mesh_to_203(mesh, None)[landmark], mesh[point, :2], atol=1e-6)


def test_rings_run_clockwise_and_in_order(face: np.ndarray) -> None:
    marks = mesh_to_203(face, None)
    for first, last in ((0, 24), (24, 48), (48, 84), (84, 108), (145, 165), (165, 185)):
        x, y = marks[first:last].T
        area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2
        assert area > 1, (first, area)  # y down: positive = clockwise as seen
        # no jumps: neighbours are closer than a quarter of the ring's width
        steps = np.linalg.norm(np.diff(marks[first:last], axis=0), axis=1)
        assert steps.max() < 0.25 * np.ptp(x), first
    contour = marks[108:145]
    assert np.argmax(contour[:, 1]) == 18 and contour[0, 0] < contour[36, 0]
    assert np.all(np.diff(marks[199:203, 1]) > 0)
    assert marks[197, 0] < marks[198, 0]
    assert marks[185:191, 0].max() < marks[191:197, 0].min()


def test_left_and_right_are_treated_alike(face: np.ndarray) -> None:
    """A mirrored face has mirrored landmarks; the canonical face is its own mirror image but for small differences."""
    marks = mesh_to_203(face, None)
    # index of the mirrored landmark, ring by ring
    order = np.arange(203)
    order[0:24] = 24 + np.roll(np.arange(24)[::-1], 13)
    order[24:48] = np.roll(np.arange(24)[::-1], 13)
    order[108:145] = np.arange(144, 107, -1)
    order[185:197] = np.arange(196, 184, -1)
    order[[197, 198]] = 198, 197
    mirrored = marks[order] * [-1, 1]
    for part in (slice(0, 48), slice(108, 145), slice(185, 203)):
        np.testing.assert_allclose(mirrored[part], marks[part], atol=2.0)  # 2 % of the inter-ocular distance


def test_no_point_on_the_forehead(face: np.ndarray) -> None:
    marks = mesh_to_203(face)
    brows = face[[*topology.LEFT_BROW, *topology.RIGHT_BROW], 1]
    assert marks[:, 1].min() == pytest.approx(brows.min(), abs=3)
    assert marks[:, 1].max() == pytest.approx(face[topology.CHIN, 1])
    assert marks[:, 0].min() == pytest.approx(face[:, 0].min(), abs=3)


@pytest.mark.parametrize("eyes", [0.0, 0.3, 1.0, 1.6])
@pytest.mark.parametrize("mouth", [0.0, 5.0, 40.0])
def test_ratios_are_the_calibrated_ones(face: np.ndarray, eyes: float, mouth: float) -> None:
    mesh = opened(face, eyes, mouth)
    raw = mesh_to_203(mesh, None)
    for placed in (mesh, turned(mesh, 35, 2.5, (300, 200)), turned(mesh, -80, 0.4, (-50, 9))):
        marks = mesh_to_203(placed)
        np.testing.assert_allclose(eye_ratio_203(marks), CALIBRATION.eye(eye_ratio_203(raw)), atol=2e-4)
        np.testing.assert_allclose(lip_ratio_203(marks), CALIBRATION.lip(lip_ratio_203(raw)), atol=2e-4)


def test_only_lids_and_inner_lips_are_moved(face: np.ndarray) -> None:
    mesh = opened(face, 0.5, 30)
    moved = np.flatnonzero(np.abs(mesh_to_203(mesh) - mesh_to_203(mesh, None)).max(1) > 1e-4)
    still = {0, 12, 24, 36, 84, 96}
    assert set(moved.tolist()) <= (set(range(48)) | set(range(84, 108))) - still
    # upper and lower lids do not cross
    marks = mesh_to_203(opened(face, 0.0, 0.0))
    for first in (0, 24, 84):
        upper, lower = marks[first + 1 : first + 12], marks[first + 23 : first + 12 : -1]
        assert np.all(lower[:, 1] - upper[:, 1] >= -1e-4)


def test_a_face_of_no_width_gives_finite_points() -> None:
    assert np.isfinite(mesh_to_203(np.zeros((478, 2)))).all()


def test_maps_rise_from_closed() -> None:
    x = np.linspace(0, 2, 200)
    assert np.all(np.diff(CALIBRATION.eye(x)) >= 0) and np.all(np.diff(CALIBRATION.lip(x)) > 0)
    assert CALIBRATION.lip(0) == 0 and CALIBRATION.eye(0) == CALIBRATION.eye_floor
    made = RatioMap(0.02, 0.1, 0.2, 0.5, 0.8)
    np.testing.assert_allclose(made.eye([0.0, 0.1, 0.15, 0.2, 0.3]), [0.02, 0.02, 0.11, 0.2, 0.3])
    np.testing.assert_allclose(made.lip([1e-4, 100]), [8e-5, 0.5], rtol=1e-5)


def test_crops_follow_the_face(face: np.ndarray) -> None:
    """A turned, moved, enlarged face fills its source crop in the same way."""
    source = MeshLandmarks()
    frame = np.zeros((4, 4, 3), np.uint8)
    level = source.landmarks(frame, face.astype(np.float32))
    placed = turned(face, 25, 1.7, (400, 300))
    marks = source.landmarks(frame, placed.astype(np.float32))
    np.testing.assert_allclose(
        transform_points(placed, source_matrix(marks)),
        transform_points(face, source_matrix(level)),
        atol=0.05,
    )
    # the whole mesh, forehead included, lies in the crop: chin near the bottom, some room above
    inside = transform_points(placed, source_matrix(marks))
    assert inside.min() > 60 and 400 < inside[topology.CHIN, 1] < 450
    width = driving_box(level)[2] - driving_box(level)[0]
    assert width == pytest.approx(2.2 * np.ptp(level, axis=0).max(), rel=1e-3)


@pytest.mark.parametrize("shape", [(203, 2), (478,), (478, 1), (1, 478, 2)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorError, match="478"):
        mesh_to_203(np.zeros(shape))
