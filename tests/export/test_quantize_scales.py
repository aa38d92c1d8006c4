"""Levels, scales and thresholds against numbers worked out by hand, and against the types' own definitions."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")

from lp_edge.errors import ConfigError
from lp_edge.export.quantize.scales import FP8, INT8, METHODS, encode, fake, threshold, weight_scales


def test_int8_rounds_ties_to_even_and_saturates() -> None:
    x = np.array([0.0, 0.25, 0.75, 1.25, -0.25, 63.4, 99.0, -99.0])
    assert fake(x, 0.5, INT8).tolist() == [0.0, 0.0, 1.0, 1.0, 0.0, 63.5, 63.5, -63.5]
    assert encode(x, 0.5, INT8).view(np.int8).tolist() == [0, 0, 2, 2, 0, 127, 127, -127]


def test_fp8_is_onnx_s_e4m3fn() -> None:
    """Every code through ONNX's own decoder and back; ties go to the even mantissa."""
    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    tensor = onnx.TensorProto(data_type=FP8.dtype, dims=codes.shape, raw_data=codes.tobytes())
    values = onnx.numpy_helper.to_array(tensor).astype(np.float64)
    assert np.array_equal(fake(values, 1.0, FP8), values.astype(np.float32))
    assert np.array_equal(encode(values, 1.0, FP8), codes)
    positive = values[:127]
    between = (positive[:-1] + positive[1:]) / 2
    even = np.where(np.arange(126) % 2 == 0, positive[:-1], positive[1:])
    assert np.array_equal(fake(between, 1.0, FP8), even.astype(np.float32))
    assert fake(np.array([1e6, -1e6]), 1.0, FP8).tolist() == [448.0, -448.0]
    assert np.array_equal(fake(positive * 3, 3.0, FP8), (positive * 3).astype(np.float32))


def test_weights_have_a_scale_per_output_channel_in_int8_and_one_in_fp8() -> None:
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[0, :, 0, 0], weight[1, :, 0, 0] = (1.27, -0.5), (-2.54, 0.1)
    np.testing.assert_allclose(weight_scales(weight, INT8), [0.01, 0.02, 1.0], rtol=1e-7)
    assert weight_scales(weight, FP8) == pytest.approx(2.54 / 448)
    assert weight_scales(weight, FP8).shape == ()


def test_max_keeps_everything_and_percentile_cuts_the_tail() -> None:
    samples = np.arange(1, 10002, dtype=np.float32)
    assert threshold(samples, 20000.0, "max", INT8) == 20000.0
    assert threshold(samples, 20000.0, "percentile", INT8) == pytest.approx(10000.0)
    assert threshold(np.zeros(9, np.float32), 3.0, "percentile", INT8) == 3.0


def test_mse_finds_the_least_error_by_itself() -> None:
    rng = np.random.default_rng(7)
    samples = np.abs(rng.laplace(0, 1, 20000)).astype(np.float32)
    peak = float(samples.max())
    chosen = threshold(samples, peak, "mse", INT8)

    def error(cut: float) -> float:
        return float(np.square(samples - fake(samples, cut / 127, INT8)).sum())

    assert 0.2 * peak <= chosen < peak
    assert all(error(chosen) <= error(cut * peak) for cut in np.linspace(0.2, 1.0, 81))


def test_entropy_cuts_a_lonely_outlier_and_keeps_an_even_spread() -> None:
    rng = np.random.default_rng(8)
    heap = np.abs(rng.normal(0, 1, 50000)).astype(np.float32)
    assert threshold(np.append(heap, np.float32(40)), 40.0, "entropy", INT8) < 10
    even = np.linspace(0, 1, 50000, dtype=np.float32)
    assert threshold(even, 1.0, "entropy", INT8) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_the_same_samples_give_the_same_threshold_in_any_order(method: str) -> None:
    samples = np.abs(np.random.default_rng(9).normal(0, 1, 4000)).astype(np.float32)
    peak = float(samples.max())
    assert threshold(samples, peak, method, INT8) == threshold(samples[::-1].copy(), peak, method, INT8)  # type: ignore[arg-type]


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="'entropy' for fp8"):
        threshold(np.ones(3, np.float32), 1.0, "entropy", FP8)
    with pytest.raises(ConfigError, match="'median'"):
        threshold(np.ones(3, np.float32), 1.0, "median", INT8)  # type: ignore[arg-type]
