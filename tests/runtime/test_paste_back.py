from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_edge.errors import ConfigError
from lp_edge.runtime.paste_back import (
    PastePlan,
    crop_mask,
    paste_back,
    paste_back_affine,
    resized_to_frame,
    soft_mask,
)
from lp_edge.runtime.resample import resize_crop

RNG = np.random.default_rng(0)


def test_a_crop_of_the_same_size_is_copied_and_the_frame_is_left_alone() -> None:
    frame = RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    before = frame.copy()
    crop = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = paste_back(frame, crop, (10, 5, 40, 25))
    assert (out[5:25, 10:40] == crop).all()
    outside = np.ones((60, 80), bool)
    outside[5:25, 10:40] = False
    assert (out[outside] == frame[outside]).all()
    assert (frame == before).all()


def test_a_smaller_crop_is_enlarged_without_a_seam() -> None:
    frame = np.full((200, 200, 3), 100, np.uint8)
    crop = np.full((50, 50, 3), 200, np.uint8)
    out = paste_back(frame, crop, (50, 50, 150, 150)).astype(int)
    assert out[100, 100, 0] == 200
    steps = np.abs(np.diff(out[100, :, 0]))
    assert steps.max() <= 25  # a hard edge would be a step of 100
    assert (out[:50] == 100).all()


def test_a_still_crop_changes_nothing_but_sharpness() -> None:
    y, x = np.mgrid[:120, :120]
    frame = np.repeat(np.round(127 + 60 * np.sin(x / 9) * np.cos(y / 11))[..., None], 3, 2).astype(np.uint8)
    crop = cv2.resize(frame[20:100, 20:100], (60, 60), interpolation=cv2.INTER_AREA)
    out = paste_back(frame, crop, (20, 20, 100, 100))
    assert np.abs(out.astype(int) - frame.astype(int)).max() <= 4


def test_several_faces_share_one_frame() -> None:
    frame = np.zeros((40, 80, 3), np.uint8)
    first = paste_back(frame, np.full((10, 10, 3), 50, np.uint8), (0, 0, 10, 10))
    second = paste_back(frame, np.full((10, 10, 3), 90, np.uint8), (40, 0, 50, 10), out=first)
    assert second is first
    assert first[0, 0, 0] == 50
    assert first[0, 40, 0] == 90


def test_soft_mask_runs_from_zero_to_full() -> None:
    mask = soft_mask(100, 60)
    assert mask[50, 30, 0] == 255
    assert mask[0, 0, 0] == 0
    assert (np.diff(mask[50, :30, 0].astype(int)) >= 0).all()


# -- crops that an affine map places -------------------------------------------------------------------


def placed(scale: float, degrees: float, centre: tuple[float, float], size: int) -> np.ndarray:
    """A map that puts the middle of a crop at `centre`, turned and scaled."""
    along, across = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
    matrix = np.array([[along, -across, 0], [across, along, 0], [0, 0, 1.0]])
    matrix[:2, 2] = np.asarray(centre) - matrix[:2, :2] @ [size / 2, size / 2]
    return matrix


def whole_frame(frame: np.ndarray, crop: np.ndarray, matrix: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The formula this must equal: everything over the whole frame, in float32, truncated."""
    size = (frame.shape[1], frame.shape[0])
    weight = cv2.warpAffine(np.dstack([mask] * 3), matrix[:2], size).astype(np.float32) / np.float32(255)
    warped = cv2.warpAffine(crop, matrix[:2], size)
    return np.clip(weight * warped + (1 - weight) * frame, 0, 255).astype(np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [256, 512, 1024])
@pytest.mark.parametrize(
    ("degrees", "centre", "share"),
    [
        (0.0, (320, 180), 0.8),
        (17.0, (320, 180), 0.8),
        (-33.3, (300.3, 170.7), 0.5),
        (180.0, (320, 180), 0.7),
        (12.0, (20, 30), 1.1),  # leaves the picture above and to the left
        (-5.0, (630, 350), 0.9),  # … below and to the right
        (8.0, (320, 180), 3.0),  # larger than the picture
        (40.0, (10, 100), 0.05),  # a face of a few pixels
    ],
)
def test_an_affine_crop_equals_the_whole_frame_formula_to_one_level(
    size: int, degrees: float, centre: tuple[float, float], share: float
) -> None:
    frame, crop = noise(360, 640), noise(size, size)
    matrix = placed(share * 360 / size, degrees, centre, size)
    before = frame.copy()
    out = paste_back_affine(frame, crop, matrix)
    wanted = whole_frame(frame, crop, matrix, crop_mask(size))
    assert np.abs(out.astype(int) - wanted).max() <= 1
    assert (wanted != frame).any(), "the case must change something"
    assert (frame == before).all()


@settings(max_examples=40, deadline=None)
@given(
    degrees=st.floats(-180, 180),
    scale=st.floats(0.05, 4.0),
    x=st.floats(-60, 260),
    y=st.floats(-60, 220),
    seed=st.integers(0, 2**16),
)
def test_it_holds_for_any_placement(degrees: float, scale: float, x: float, y: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frame, crop = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((161, 203, 3), (64, 64, 3)))
    matrix = placed(scale, degrees, (x, y), 64)
    out = paste_back_affine(frame, crop, matrix)
    assert np.abs(out.astype(int) - whole_frame(frame, crop, matrix, crop_mask(64))).max() <= 1


@pytest.mark.parametrize(
    "mask",
    [
        np.full((128, 128), 255, np.uint8),
        np.zeros((128, 128), np.uint8),
        RNG.integers(0, 256, (128, 128), dtype=np.uint8),
        np.where(np.hypot(*np.mgrid[-64:64, -64:64]) % 40 < 20, 255, 0).astype(np.uint8),  # rings: not convex
    ],
    ids=["full", "empty", "noise", "rings"],
)
def test_any_mask_will_do(mask: np.ndarray) -> None:
    frame, crop = noise(150, 220), noise(128, 128)
    matrix = placed(0.7, 25, (110, 75), 128)
    out = paste_back_affine(frame, crop, matrix, mask=mask)
    assert np.abs(out.astype(int) - whole_frame(frame, crop, matrix, mask)).max() <= 1


def test_a_crop_outside_the_picture_changes_nothing() -> None:
    frame = noise(90, 120)
    plan = PastePlan.prepare(placed(1.0, 10, (-500, 40), 64), (120, 90), 64)
    assert plan.rect == (0, 0, 0, 0)
    out = plan.paste(frame, noise(64, 64))
    assert out is not frame
    assert (out == frame).all()


def test_pixels_without_weight_are_not_touched_and_full_ones_are_copied() -> None:
    frame, crop = noise(200, 200), noise(64, 64)
    matrix = np.array([[1.0, 0, 70], [0, 1.0, 60], [0, 0, 1]])
    out = paste_back_affine(frame, crop, matrix)
    mask = np.zeros((200, 200), np.uint8)
    mask[60:124, 70:134] = crop_mask(64)
    assert (out[mask == 0] == frame[mask == 0]).all()
    inside = np.argwhere(mask == 255)
    assert len(inside) > 2000
    assert (out[mask == 255] == crop[crop_mask(64) == 255]).all()


def test_one_plan_serves_every_frame_of_a_source() -> None:
    frame = noise(120, 160)
    matrix = placed(0.9, 20, (80, 60), 96)
    plan = PastePlan.prepare(matrix, (160, 120), 96)
    for _ in range(3):
        crop = noise(96, 96)
        assert (plan.paste(frame, crop) == paste_back_affine(frame, crop, matrix)).all()


def test_several_turned_faces_share_one_frame() -> None:
    frame, first, second = noise(120, 300), noise(64, 64), noise(64, 64)
    left, right = placed(0.8, 10, (70, 60), 64), placed(0.8, -10, (100, 60), 64)  # they overlap
    out = paste_back_affine(frame, first, left)
    assert paste_back_affine(frame, second, right, out=out) is out
    wanted = whole_frame(whole_frame(frame, first, left, crop_mask(64)), second, right, crop_mask(64))
    assert np.abs(out.astype(int) - wanted).max() <= 2  # one level from each
    assert (out != paste_back_affine(frame, second, right)).any()


def test_the_crops_mask_is_soft_round_and_symmetric() -> None:
    for size in (256, 512, 1024):
        mask = crop_mask(size)
        assert mask.shape == (size, size)
        assert not mask[0].any()
        assert not mask[:, -1].any()
        assert (mask == mask[::-1]).all()
        assert (mask == mask.T).all()
        middle = mask[size // 2].astype(int)
        rise = middle[: size // 2]
        assert (np.diff(rise) >= 0).all()
        assert np.diff(rise).max() <= 1.6 * 255 / (0.045 * size) + 1  # no hard edge
        assert 0.03 < np.argmax(rise == 255) / size < 0.07
        assert (mask == 255).mean() > 0.8
        corner = round(0.025 * size)  # on the diagonal the mask starts later than on the sides
        assert mask[corner, corner] == 0 < mask[corner, size // 2]


def test_a_resized_crop_lands_on_the_same_place() -> None:
    y, x = np.mgrid[:128, :128]
    crop = np.repeat((127 + 100 * np.sin(x / 13) * np.cos(y / 17))[..., None], 3, 2).astype(np.uint8)
    frame, matrix = np.zeros((200, 240, 3), np.uint8), placed(1.1, 15, (120, 100), 128)
    usual = paste_back_affine(frame, crop, matrix).astype(int)
    for size in (64, 256):
        resized = paste_back_affine(frame, resize_crop(crop, size), resized_to_frame(matrix, 128, size))
        distance = np.abs(resized.astype(int) - usual)[60:140, 80:160]  # where both masks are full
        assert usual[60:140, 80:160].std() > 30
        assert distance.max() <= 3
    corners = np.array([[-0.5, -0.5, 1], [63.5, 63.5, 1]]).T
    np.testing.assert_allclose(
        resized_to_frame(matrix, 128, 64) @ corners, matrix @ [[-0.5, 127.5], [-0.5, 127.5], [1, 1]]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop": noise(65, 64)}, "crop"),
        ({"crop": noise(64, 64).astype(np.float32)}, "float32"),
        ({"frame": noise(90, 120)[..., :1]}, "frame"),
        ({"out": noise(90, 121)}, "out"),
        ({"out": noise(90, 240)[:, ::2]}, "gaps"),
        ({"mask": np.zeros((32, 64), np.uint8)}, "mask"),
        ({"to_frame": np.zeros((3, 3))}, "invertible"),
        ({"to_frame": np.full((2, 3), np.nan)}, "invertible"),
        ({"to_frame": np.eye(4)}, "invertible"),
        ({"to_frame": [[1, 0, 0], [0, 1, 0], [0.1, 0, 1]]}, "affine"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], words: str) -> None:
    usual = {"frame": noise(90, 120), "crop": noise(64, 64), "to_frame": np.eye(3)}
    with pytest.raises(ConfigError, match=words):
        paste_back_affine(**{**usual, **change})  # type: ignore[arg-type]
