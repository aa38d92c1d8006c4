from __future__ import annotations

import numpy as np

from lp_edge.runtime.paste_back import paste_back, soft_mask

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
    import cv2

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
