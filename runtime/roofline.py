"""What a card can do at most: peaks measured through a backend, data of boards, and the least time that work takes.

The peaks are measured by small ONNX graphs that are written here, byte by byte, so that nothing but the backend is needed:
chains of equal matrix products or 3x3 convolutions, and one element-wise operation on much memory. Values are random: zeros
run faster on some cards than data does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.errors import ConfigError, LpEdgeError
from lp_edge.runtime.bench_calls import time_calls

__all__ = ["BOARDS", "Board", "Peaks", "Probe", "Work", "measure_peaks", "probes"]

# -- graphs without the package onnx -----------------------------------------------------------------------
# Field numbers and the numbers of types: onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto

_TYPES: Final[Mapping[str, int]] = {"float32": 1, "float16": 10}
_OPSET, _IR = 13, 8


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | str | bytes) -> bytes:
    """A field of a message: an integer as varint, anything else with its length before it."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _node(op: str, inputs: Sequence[str], output: str, **ints: Sequence[int]) -> bytes:
    attributes = [
        _field(5, _field(1, name) + b"".join(_field(8, v) for v in values) + _field(20, 7))
        for name, values in ints.items()
    ]
    return b"".join([*(_field(1, name) for name in inputs), _field(2, output), _field(4, op), *attributes])


def _value(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, _TYPES[dtype]) + _field(2, dims)))


def _tensor(name: str, array: npt.NDArray[Any]) -> bytes:
    dims = b"".join(_field(1, size) for size in array.shape)
    return dims + _field(2, _TYPES[array.dtype.name]) + _field(8, name) + _field(9, array.tobytes())


def _model(nodes: Iterable[bytes], weights: Iterable[bytes], given: bytes, result: bytes) -> bytes:
    graph = b"".join(
        [
            *(_field(1, node) for node in nodes),
            _field(2, "roofline"),
            *(_field(5, weight) for weight in weights),
            _field(11, given),
            _field(12, result),
        ]
    )
    return _field(1, _IR) + _field(2, "lp_edge") + _field(7, graph) + _field(8, _field(2, _OPSET))


@dataclass(frozen=True)
class Probe:
    """A graph that keeps a card busy with one thing.

    Attributes:
        kind: ``matmul``, ``conv`` or ``copy``.
        dtype: ``float16`` or ``float32``.
        shape: size of the input ``x``; the output ``y`` has the same.
        layers: operations that follow each other, with the same weights.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    layers: int = 1

    @property
    def flops(self) -> int:
        """Operations of a call, a multiplication and an addition counted as two."""
        values = math.prod(self.shape)
        terms = {"matmul": self.shape[-1], "conv": 9 * self.shape[1], "copy": 0}[self.kind]
        return 2 * values * terms * self.layers

    @property
    def nbytes(self) -> int:
        """Bytes of input and output."""
        return 2 * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def model(self) -> bytes:
        """The ONNX graph."""
        nodes, weights, last = [], [], "x"
        if self.kind != "copy":
            width = self.shape[-1] if self.kind == "matmul" else self.shape[1]
            size = (width, width) if self.kind == "matmul" else (width, width, 3, 3)
            # of a variance that keeps that of the values, however many layers
            scale = 1 / math.sqrt(math.prod(size[1:]))
            noise = np.random.default_rng(1).standard_normal(size, np.float32) * np.float32(scale)
            weights.append(_tensor("w", noise.astype(self.dtype)))
        for layer in range(self.layers):
            out = "y" if layer == self.layers - 1 else f"x{layer + 1}"
            if self.kind == "matmul":
                nodes.append(_node("MatMul", [last, "w"], out))
            elif self.kind == "conv":
                nodes.append(_node("Conv", [last, "w"], out, kernel_shape=(3, 3), pads=(1, 1, 1, 1)))
            else:
                nodes.append(_node("Relu", [last], out))
            last = out
        ends = (_value(name, self.dtype, self.shape) for name in ("x", "y"))
        return _model(nodes, weights, *ends)

    def feed(self) -> npt.NDArray[Any]:
        """Normal values for ``x``."""
        return np.random.default_rng(2).standard_normal(self.shape, np.float32).astype(self.dtype)


def probes(kind: str, dtype: str) -> tuple[Probe, ...]:
    """Probes from small to large: the fastest tells the peak of products, the largest the bandwidth."""
    sizes: Mapping[str, tuple[tuple[tuple[int, ...], int], ...]] = {
        "matmul": (((512, 512), 4), ((8192, 4096), 4)),
        "conv": (((1, 64, 64, 64), 4), ((4, 512, 64, 64), 8)),
        "copy": (((1, 32, 1024, 1024), 1), ((1, 128, 1024, 1024), 1)),  # 0.25 and 1 GiB: beyond any cache
    }
    if kind not in sizes or dtype not in _TYPES:
        raise ConfigError(
            f"a probe {kind} of {dtype}",
            f"expected one of {', '.join(sizes)} of {', '.join(_TYPES)}",
            "choose one",
        )
    return tuple(Probe(kind, dtype, shape, layers) for shape, layers in sizes[kind])


# -- peaks ---------------------------------------------------------------------------------------------------


class Work(Protocol):
    """Counted work of one call, such as a :class:`lp_edge.export.cost.Cost`."""

    @property
    def products(self) -> Mapping[str, int]:
        """Type of the factors → operations of convolutions and matrix products."""

    @property
    def flops(self) -> int:
        """All operations."""

    @property
    def fused_bytes(self) -> int:
        """Bytes that are moved where neighbouring operations are one kernel."""


@dataclass(frozen=True)
class Peaks:
    """What a card does at most.

    Attributes:
        flops: type → products' operations a second.
        bytes_per_second: bytes read and written.
        measured: one record per probe: ``kind``, ``type``, ``shape``, ``ms``, ``tflops`` or ``gbs``, or ``failed``.
    """

    flops: Mapping[str, float]
    bytes_per_second: float | None
    measured: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    def compute_seconds(self, work: Work) -> float | None:
        """Least time of the products; None where the peak of one of their types is not known."""
        if any(kind not in self.flops for kind in work.products):
            return None
        return sum(work.products[kind] / self.flops[kind] for kind in work.products)

    def move_seconds(self, work: Work) -> float | None:
        """Least time to move the bytes; None where the bandwidth is not known."""
        return work.fused_bytes / self.bytes_per_second if self.bytes_per_second else None

    def seconds(self, work: Work) -> float | None:
        """The roofline: the longer of both, None where one is not known."""
        parts = self.compute_seconds(work), self.move_seconds(work)
        return None if None in parts else max(part for part in parts if part is not None)


def measure_peaks(
    config: BackendConfig,
    dtypes: Iterable[str] = ("float16", "float32"),
    *,
    seconds: float = 0.5,
    enough: float = 4e-3,
    choose: Callable[[str, str], Sequence[Probe]] = probes,
) -> Peaks:
    """Measure what the backend's card does at most.

    Products: from small to large probes, up to the first that takes ``enough`` seconds a call, and the fastest counts; a small
    one on a fast card measures launches. Bandwidth: the largest for which there is memory, since a small one measures
    caches. Types that no probe has are left out.

    Args:
        config: where; the same backend as the networks'.
        dtypes: types whose products are wanted.
        seconds: time for each probe.
        enough: see above.
        choose: gives the probes of a kind and a type.
    """
    records: list[Mapping[str, Any]] = []
    flops: dict[str, float] = {}
    moved: float | None = None
    for dtype in dict.fromkeys(kind for kind in dtypes if kind in _TYPES):
        for kind in ("matmul", "conv"):
            for record, speed in _climb(choose(kind, dtype), config, seconds, enough):
                records.append(record)
                flops[dtype] = max(speed, flops.get(dtype, 0.0))
    for record, speed in _climb(choose("copy", "float32"), config, seconds, math.inf):
        records.append(record)
        moved = speed or moved
    return Peaks({kind: speed for kind, speed in flops.items() if speed}, moved, tuple(records))


def _climb(
    climbed: Sequence[Probe], config: BackendConfig, seconds: float, enough: float
) -> Iterator[tuple[Mapping[str, Any], float]]:
    for probe in climbed:
        told: dict[str, Any] = {"kind": probe.kind, "type": probe.dtype, "shape": list(probe.shape)}
        try:
            with open_runner(probe.model(), config, name=f"roofline_{probe.kind}_{probe.dtype}") as runner:
                took = time_calls(runner, {"x": runner.upload(probe.feed())}, seconds=seconds).best_seconds
        except LpEdgeError as error:  # a type that the backend does not have, or no memory
            yield {**told, "failed": error.got}, 0.0
            return
        speed = (probe.flops or probe.nbytes) / took
        unit = {"tflops": round(speed / 1e12, 4)} if probe.flops else {"gbs": round(speed / 1e9, 2)}
        yield {**told, "layers": probe.layers, "ms": round(took * 1e3, 4), **unit}, speed
        if took >= enough:
            return


# -- boards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Board:
    """Published peaks of a Jetson module, lowest and highest (its power modes and clocks). Not measured here.

    Attributes:
        name: as NVIDIA calls it.
        float16: dense products a second of the tensor cores; int8 is twice that.
        float32: operations a second of the CUDA cores.
        bandwidth: bytes a second.
    """

    name: str
    float16: tuple[float, float]
    float32: float
    bandwidth: tuple[float, float]

    def peaks(self, end: int) -> Peaks:
        """Of the lowest (0) or highest (1) values; float32 products at the highest are TensorRT's TF32, half of float16."""
        half = self.float16[end]
        single = half / 2 if end else self.float32
        return Peaks({"float16": half, "float32": single, "int8": 2 * half}, self.bandwidth[end])


# Dense tensor-core peaks from the modules' data sheets (which give them sparse, DLA apart).
BOARDS: Final = (
    Board("Jetson AGX Orin 64 GB", (43e12, 43e12), 5.3e12, (205e9, 205e9)),
    Board("Jetson Orin NX 16 GB", (15e12, 19e12), 1.9e12, (102e9, 102e9)),
    Board("Jetson Orin Nano 8 GB", (10e12, 17e12), 1.3e12, (68e9, 102e9)),
)
