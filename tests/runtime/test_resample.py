from __future__ import annotations

import numpy as np
import pytest

from lp_edge.errors import ConfigError
from lp_edge.runtime.resample import resize_crop

RNG = np.random.default_rng(0)


def test_smaller_is_the_mean_of_the_area() -> None:
    crop = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = crop.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(resize_crop(crop, 32) - means).max() <= 0.5


def test_larger_keeps_what_was_there_and_edges_stay_sharp() -> None:
    y, x = np.mgrid[:64, :64]
    crop = np.repeat((127 + 90 * np.sin(x / 5) * np.cos(y / 7))[..., None], 3, 2).round().astype(np.uint8)
    large = resize_crop(crop, 128)
    assert large.shape == (128, 128, 3)
    back = resize_crop(large, 64)
    assert np.abs(back.astype(int) - crop)[4:-4, 4:-4].max() <= 3
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 32:] = 200
    row = resize_crop(edge, 128)[64, :, 0].astype(int)
    assert (row[:56] == 0).all()
    assert np.diff(row).max() > 90  # a bilinear one climbs by 50 a pixel


def test_the_same_size_is_the_crop_itself() -> None:
    crop = np.zeros((32, 32, 3), np.uint8)
    assert resize_crop(crop, 32) is crop


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [((32, 31, 3), np.uint8, 16), ((32, 32), np.uint8, 16), ((32, 32, 3), np.float32, 16),
     ((32, 32, 3), np.uint8, 0), ((32, 32, 3), np.uint8, 4096)],
)  # fmt: skip
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], dtype: type, size: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        resize_crop(np.zeros(shape, dtype), size)
