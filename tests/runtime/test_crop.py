"""LivePortrait's crops: worked by hand, there and back, against a second derivation, and refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lp_edge.errors import ConfigError, NoFaceError, TensorError
from lp_edge.runtime.crop import (
    Crop,
    CropOptions,
    average_box,
    box_matrix,
    cut,
    driving_box,
    driving_crop,
    source_crop,
    source_matrix,
    transform_points,
)

# eyes 20 apart at y 40, mouth corners at y 60, so the axes are upright and the extents 20 x 20
FIVE = np.array([[40.0, 40], [60, 40], [50, 50], [42, 60], [58, 60]])


def turned(points: np.ndarray, degrees: float, about: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Points turned clockwise as seen."""
    a = math.radians(degrees)
    turn = np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
    return (points - about) @ turn + about


def random_points(count: int, seed: int) -> np.ndarray:
    """A cloud with its eyes above its mouth, turned at random."""
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 30, (count, 2))
    if count > 9:
        points[:, 1] *= 1.3
    points[_EYES[count]] += [0, -60]
    points[_MOUTH[count]] += [0, 60]
    return turned(points, rng.uniform(-170, 170)) + rng.uniform(100, 400, 2)


_EYES = {
    203: [0, 6, 12, 18, 24, 30, 36, 42],
    106: [33, 35, 40, 39, 87, 89, 94, 93],
    68: [36, 39, 42, 45],
    9: [0, 1, 2, 3],
    5: [0, 1],
}
_MOUTH = {203: [48, 66], 106: [52, 61], 68: [48, 54], 9: [5, 6], 5: [3, 4]}


def test_source_crop_by_hand() -> None:
    # extents 40..60 in both directions; side 2 * 20 = 40 around (50, 50 - 0.25 * 40)
    matrix = source_matrix(FIVE, CropOptions(scale=2, vy=-0.25), size=400)
    np.testing.assert_allclose(matrix, [[10, 0, -300], [0, 10, -200], [0, 0, 1]], atol=1e-9)
    # vx moves along the face's x axis
    matrix = source_matrix(FIVE, CropOptions(scale=2, vx=0.5, vy=0), size=400)
    np.testing.assert_allclose(transform_points([70, 50], matrix), [200, 200], atol=1e-9)


def test_source_crop_turns_with_the_face() -> None:
    lying = turned(FIVE, 90, (50, 50))  # the forehead points to the right
    options = CropOptions(scale=2, vy=-0.25)
    matrix = source_matrix(lying, options, size=400)
    np.testing.assert_allclose(transform_points(lying, matrix), FIVE * 10 - [300, 200], atol=1e-9)
    np.testing.assert_allclose(transform_points([60, 50], matrix), [200, 200], atol=1e-9)
    upright = source_matrix(lying, CropOptions(scale=2, vy=-0.25, rotate=False), size=400)
    np.testing.assert_allclose(upright, [[10, 0, -400], [0, 10, -300], [0, 0, 1]], atol=1e-9)


def test_driving_box_by_hand() -> None:
    np.testing.assert_allclose(driving_box(FIVE), [28, 23.6, 72, 67.6])  # 2.2 * 20 around (50, 50 - 4.4)
    # the middle follows the face's axes, the box stays upright
    np.testing.assert_allclose(driving_box(turned(FIVE, 90, (50, 50))), [32.4, 28, 76.4, 72])


@pytest.mark.parametrize("count", sorted(_EYES))
@pytest.mark.parametrize("seed", range(4))
def test_against_a_second_derivation(count: int, seed: int) -> None:
    """By angles and inverse rotation, as one would draw it, instead of axes."""
    points = random_points(count, seed)
    scale, vx, vy = 2.3, 0.07, -0.125
    down = points[_MOUTH[count]].mean(0) - points[_EYES[count]].mean(0)
    angle = math.degrees(math.atan2(-down[0], down[1]))
    level = turned(points, -angle)
    low, high = level.min(0), level.max(0)
    side = (high - low).max() * scale
    centre = turned((low + high) / 2 + [vx * side, vy * side], angle)
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2
    matrix = source_matrix(points, CropOptions(scale=scale, vx=vx, vy=vy))
    np.testing.assert_allclose(
        transform_points(centre + turned(square, angle), matrix),
        [[0, 0], [512, 0], [512, 512], [0, 512]],
        atol=1e-8,
    )
    box = driving_box(points, CropOptions(driving_scale=scale, driving_vx=vx, driving_vy=vy))
    np.testing.assert_allclose(box, [*(centre + square[0]), *(centre + square[2])], atol=1e-9)


def test_pixels_and_round_trip() -> None:
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    # one crop pixel per frame pixel: a shifted copy, black beyond the frame
    crop = driving_crop(frame, [-10, 20, 54, 84], size=64)
    assert isinstance(crop, Crop) and crop.image.shape == (64, 64, 3)
    assert not crop.image[:, :10].any()
    np.testing.assert_array_equal(crop.image[:, 10:], frame[20:84, :54])
    # a quarter turn: columns of the frame become rows
    lying = source_crop(frame, turned(FIVE, 90, (50, 50)), CropOptions(scale=2, vy=0), size=40)
    np.testing.assert_array_equal(lying.image, np.rot90(frame[30:70, 31:71]))  # row 0 is column 70
    points = random_points(203, 3)
    crop = source_crop(frame, points)
    np.testing.assert_allclose(crop.to_frame @ crop.to_crop, np.eye(3), atol=1e-9)
    inside = transform_points(points, crop.to_crop)
    np.testing.assert_allclose(transform_points(inside, crop.to_frame), points, atol=1e-9)
    # the landmarks fill 1 / 2.3 of the crop
    assert np.ptp(inside, axis=0).max() == pytest.approx(512 / 2.3)


def test_network_input_averages_areas() -> None:
    image = np.zeros((512, 512, 3), np.uint8)
    image[::2] = 200
    crop = Crop(image, np.eye(3), np.eye(3))
    assert np.all(crop.network_input() == 100)
    assert crop.network_input(512) is image


def test_average_box() -> None:
    np.testing.assert_allclose(average_box([[0, 0, 10, 10], [2, 4, 14, 16]]), [1, 2, 12, 13])
    with pytest.raises(NoFaceError):
        average_box([])


def test_eyes_on_the_mouth_count_as_upright() -> None:
    points = FIVE.copy()
    points[:, 1] = 50
    points[3:, 0] = [45, 55]
    np.testing.assert_allclose(driving_box(points, CropOptions(driving_vy=0)), [28, 28, 72, 72])


@pytest.mark.parametrize("bad", [np.full((203, 2), 7.0), np.full((203, 2), np.nan)])
def test_degenerate_points(bad: np.ndarray) -> None:
    for make in (source_matrix, driving_box):
        with pytest.raises(NoFaceError, match="landmarks"):
            make(bad)


@pytest.mark.parametrize("shape", [(478, 2), (203, 3), (203,), (0, 2)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorError, match="203, 106"):
        source_matrix(np.ones(shape))


@pytest.mark.parametrize(
    "box", [[0, 0, 0, 0], [0, 0, 10, 20], [5, 5, 1, 1], [0, 0, math.inf, 10], [0, 0, 10]]
)
def test_wrong_boxes(box: list[float]) -> None:
    with pytest.raises(TensorError, match="box"):
        box_matrix(box)


def test_wrong_frame() -> None:
    with pytest.raises(TensorError, match="float32"):
        cut(np.zeros((8, 8, 3), np.float32), np.eye(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", [{"scale": 0.5}, {"vx": 2}, {"vy": math.nan}, {"driving_scale": 11}, {"driving_vy": -1.5}]
)
def test_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        CropOptions(**option)  # type: ignore[arg-type]
