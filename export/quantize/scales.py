"""Numbers of 8 bits: their levels, scales of weights, and where activations are cut off.

Everything is symmetric: a number is ``scale`` times a level, and zero is a level. TensorRT wants it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253

from lp_edge.errors import ConfigError

__all__ = [
    "FP8",
    "INT8",
    "KINDS",
    "METHODS",
    "Kind",
    "Method",
    "encode",
    "fake",
    "threshold",
    "weight_scales",
]

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
Method = Literal["max", "percentile", "entropy", "mse"]
METHODS: Final[tuple[Method, ...]] = ("max", "percentile", "entropy", "mse")

_PERCENTILE: Final = 99.99
_CUTS: Final = np.linspace(0.2, 1.0, 81)
_BINS, _LEVELS = 2048, 128


@dataclass(frozen=True)
class Kind:
    """A type of 8 bits.

    Attributes:
        name: as a manifest writes it.
        dtype: ONNX's number for it.
        limit: its largest level.
        per_channel: weights have a scale per output channel. TensorRT has that for int8 since 8.0; its fp8 convolutions take
            one scale per tensor, which costs little, because the levels of fp8 are finer for smaller numbers.
    """

    name: str
    dtype: int
    limit: float
    per_channel: bool


INT8: Final = Kind("int8", onnx.TensorProto.INT8, 127.0, True)
FP8: Final = Kind("fp8", onnx.TensorProto.FLOAT8E4M3FN, 448.0, False)
KINDS: Final = {kind.name: kind for kind in (INT8, FP8)}


def _e4m3(x: Array) -> Array:
    """The nearest E4M3FN number, ties to even: 4 bits of exponent with bias 7, 3 of mantissa, up to 448 (ONNX, float8)."""
    _, exponent = np.frexp(np.abs(x))  # |x| = m · 2^exponent, 0.5 <= m < 1
    step = np.exp2(np.maximum(exponent - 1, -6).astype(np.float64) - 3)
    return np.rint(x / step) * step


def _levels(x: Array, scale: Array | float, kind: Kind) -> Array:
    cut = np.clip(np.asarray(x, np.float64) / scale, -kind.limit, kind.limit)
    return np.rint(cut) if kind is INT8 else _e4m3(cut)


def fake(x: Array, scale: Array | float, kind: Kind) -> F32:
    """What is left of ``x`` after quantising: ``scale`` (which broadcasts against it) times the nearest level."""
    return np.asarray(_levels(x, scale, kind) * scale, np.float32)


def encode(x: Array, scale: Array | float, kind: Kind) -> npt.NDArray[np.uint8]:
    """The same levels as bytes: two's complement for int8; sign, exponent, mantissa for fp8."""
    levels = _levels(x, scale, kind)
    if kind is INT8:
        return levels.astype(np.int8).view(np.uint8)
    codes = np.arange(127)  # 127 is NaN
    exponent, mantissa = codes >> 3, (codes & 7) / 8
    table = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * np.exp2(exponent - 7.0))
    code = np.searchsorted(table, np.abs(levels)).astype(np.uint8)
    return np.asarray(code | (np.signbit(levels).astype(np.uint8) << 7), np.uint8)


def weight_scales(weight: Array, kind: Kind) -> npt.NDArray[np.float64]:
    """Scales ``[O]`` of a weight ``[O, I, …]``, or one ``[]``: the largest magnitude over the largest level; 1 for zeros."""
    axes = tuple(range(1, weight.ndim)) if kind.per_channel else None
    peak = np.abs(weight.astype(np.float64)).max(axis=axes)
    return np.asarray(np.where(peak > 0, peak, kind.limit) / kind.limit)


def threshold(samples: Array, peak: float, method: Method, kind: Kind) -> float:
    """The magnitude that gets the largest level; beyond it activations are cut off.

    Args:
        samples: magnitudes ``[n]`` of the tensor over the calibration frames.
        peak: its largest magnitude over the whole frames.
        method: ``max``: the peak, so that nothing is cut off. ``percentile``: of the samples, 99.99 %. ``mse``: the least square
            error, between a fifth of the peak and the peak. ``entropy``: the least Kullback-Leibler divergence of the histogram
            (Migacz, 8-bit inference with TensorRT, GTC 2017); for int8, whose levels are evenly spaced.
        kind: the levels.

    Returns:
        At least the smallest positive float32; the peak where that is zero, which means that the tensor is zero.
    """
    if method not in METHODS or (method == "entropy" and kind is not INT8):
        raise ConfigError(
            f"calibration method {method!r} for {kind.name}",
            f"expected one of {', '.join(m for m in METHODS if m != 'entropy' or kind is INT8)}",
            "choose one of them",
        )
    if peak <= 0 or method == "max":
        return peak
    if method == "percentile":
        return float(np.percentile(samples, _PERCENTILE)) or peak
    if method == "entropy":
        return _entropy(samples, peak)
    errors = [
        np.square(samples - fake(samples, cut * peak / kind.limit, kind), dtype=np.float64).sum()
        for cut in _CUTS
    ]
    # Of equals the largest: what was not sampled may lie above.
    return float(_CUTS[len(errors) - 1 - int(np.argmin(errors[::-1]))] * peak)


def _entropy(samples: Array, peak: float) -> float:
    counts, edges = np.histogram(samples, _BINS, (0.0, peak))
    counts = counts.astype(np.float64)
    counts[0] = 0.0  # zeros are a level of their own
    best, result = np.inf, peak
    for end in range(_LEVELS, _BINS + 1, _LEVELS // 16):
        inside = counts[:end]
        wanted = inside.copy()
        wanted[-1] += counts[end:].sum()
        group = np.arange(end) * _LEVELS // end
        sums = np.bincount(group, inside, _LEVELS)
        filled = np.bincount(group, inside > 0, _LEVELS)
        got = np.where(inside > 0, (sums / np.maximum(filled, 1))[group], 0.0)
        if not got.any():
            continue
        p, q = wanted / wanted.sum(), got / got.sum()
        where = p > 0
        divergence = float((p[where] * np.log(p[where] / np.maximum(q[where], 1e-12))).sum())
        if divergence < best:
            best, result = divergence, float(edges[end])
    return result
