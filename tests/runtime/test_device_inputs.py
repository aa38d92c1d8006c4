"""Geometry and weights for the device graphs; what the graphs make of them is tested in tests/export/test_device_graphs.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_edge.errors import ConfigError
from lp_edge.runtime.device_inputs import paste_matrix, resize_weights, sampling_matrix
from lp_edge.runtime.resample import resize_crop


@settings(max_examples=60, deadline=None)
@given(side=st.integers(1, 80), wanted=st.integers(1, 160))
def test_two_products_with_the_weights_are_the_resize(side: int, wanted: int) -> None:
    crop = np.random.default_rng([side, wanted]).integers(0, 256, (side, side, 3), dtype=np.uint8)
    weights = resize_weights(side, wanted)
    assert weights.shape == (wanted, side) and weights.dtype == np.float32 and not weights.flags.writeable
    np.testing.assert_allclose(weights.sum(1), 1, atol=1 / 512)
    made = np.einsum("ay,bx,yxc->abc", weights, weights, crop.astype(np.float64), optimize=True)
    made = np.clip(np.floor(made + 0.5), 0, 255)
    assert np.abs(made - resize_crop(crop, wanted)).max() <= 1


def test_weights_are_made_once() -> None:
    assert resize_weights(40, 30) is resize_weights(40, 30)


@pytest.mark.parametrize(("given", "wanted"), [(0, 4), (4, 0), (-1, 4)])
def test_sizes_below_a_pixel_are_refused(given: int, wanted: int) -> None:
    with pytest.raises(ConfigError, match="1 px and more"):
        resize_weights(given, wanted)


@settings(max_examples=40, deadline=None)
@given(
    degrees=st.floats(-180, 180),
    scale=st.floats(0.05, 20),
    x=st.floats(-4000, 4000),
    y=st.floats(-4000, 4000),
    origin=st.tuples(st.integers(0, 3840), st.integers(0, 2160)),
)
def test_matrices_are_inverses(
    degrees: float, scale: float, x: float, y: float, origin: tuple[int, int]
) -> None:
    c, s = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
    to_frame = np.array([[c, -s, x], [s, c, y], [0, 0, 1.0]])
    corner = np.array([10.0, 500.0])
    inverse = sampling_matrix(to_frame)[0].astype(np.float64)
    there = to_frame[:2, :2] @ corner + to_frame[:2, 2]
    error = 1e-6 * (1 + np.abs(there).sum() + abs(x) + abs(y)) / scale
    np.testing.assert_allclose(inverse[:, :2] @ there + inverse[:, 2], corner, atol=error)
    patch = paste_matrix(to_frame, origin)[0].astype(np.float64)
    np.testing.assert_allclose(
        patch[:, :2] @ (there - origin) + patch[:, 2], corner, atol=2 * error + 1e-2 / scale
    )
