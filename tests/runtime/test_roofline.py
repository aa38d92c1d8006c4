"""The graphs that measure peaks, what is made of their times, and the boards' data."""

from __future__ import annotations

import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.runner import to_host
from lp_edge.errors import ConfigError
from lp_edge.runtime.roofline import BOARDS, Peaks, Probe, measure_peaks, probes

CPU = BackendConfig("cpu", threads=1)


class Work:
    """Hand-made work."""

    def __init__(self, products: dict[str, int], nbytes: int) -> None:
        self.products, self.flops, self.fused_bytes = products, sum(products.values()), nbytes


def small(kind: str, dtype: str) -> tuple[Probe, ...]:
    shapes = {"matmul": (8, 16), "conv": (1, 4, 6, 5), "copy": (1, 2, 32, 32)}
    return (Probe(kind, dtype, shapes[kind], 1 if kind == "copy" else 3),)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["matmul", "conv", "copy"])
def test_a_probe_is_a_valid_graph_that_computes_what_it_says(kind: str, dtype: str) -> None:
    onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")
    (probe,) = small(kind, dtype)
    model = onnx.load_from_string(probe.model())
    onnx.checker.check_model(model, full_check=True)
    weights = [onnx.numpy_helper.to_array(w).astype(np.float64) for w in model.graph.initializer]
    x = probe.feed()
    assert x.dtype == dtype and x.shape == probe.shape
    with open_runner(probe.model(), CPU) as runner:
        y = to_host(runner.infer({"x": x})["y"])
    assert y.dtype == dtype and y.shape == probe.shape
    wanted = x.astype(np.float64)
    for _ in range(probe.layers):
        if kind == "matmul":
            wanted = wanted @ weights[0]
        elif kind == "conv":
            padded = np.pad(wanted, ((0, 0), (0, 0), (1, 1), (1, 1)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
            wanted = np.einsum("nchwij,ocij->nohw", windows, weights[0])
        else:
            wanted = np.maximum(wanted, 0)
    assert np.allclose(y, wanted, atol=2e-2 if dtype == "float16" else 1e-4)


@pytest.mark.parametrize(
    ("probe", "flops"),
    [
        (Probe("matmul", "float32", (8, 16), 3), 3 * 2 * 8 * 16 * 16),
        (Probe("conv", "float16", (2, 4, 6, 5), 2), 2 * 2 * (2 * 4 * 6 * 5) * 4 * 9),
        (Probe("copy", "float32", (1, 2, 32, 32)), 0),
    ],
)
def test_the_work_of_a_probe_is_what_the_counter_counts(probe: Probe, flops: int) -> None:
    onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")
    from lp_edge.export.cost import cost

    counted = cost(onnx.load_from_string(probe.model()), {"x": probe.shape})
    assert probe.flops == sum(counted.products.values()) == flops
    assert probe.nbytes == counted.boundary_bytes


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_values_stay_in_range_through_all_layers_of_a_real_probe(dtype: str) -> None:
    for kind in ("matmul", "conv"):
        probe = probes(kind, dtype)[0]
        with open_runner(probe.model(), CPU) as runner:
            y = to_host(runner.infer({"x": probe.feed()})["y"]).astype(np.float64)
        assert 0.3 < y.std() < 3 and np.isfinite(y).all()


def test_probes_grow() -> None:
    for kind in ("matmul", "conv", "copy"):
        sizes = [(p.flops, p.nbytes) for p in probes(kind, "float32")]
        assert sizes == sorted(sizes) and len(sizes) > 1
    assert probes("copy", "float32")[0].nbytes > 200e6, "smaller ones would measure caches"
    with pytest.raises(ConfigError, match="float8"):
        probes("conv", "float8")


def test_peaks_are_measured_through_a_backend() -> None:
    peaks = measure_peaks(CPU, ("float32", "int8"), seconds=0.01, choose=small)
    assert set(peaks.flops) == {"float32"}
    kinds = [(record["kind"], record["type"]) for record in peaks.measured]
    assert kinds == [("matmul", "float32"), ("conv", "float32"), ("copy", "float32")]
    for record in peaks.measured:
        (probe,) = small(record["kind"], record["type"])
        speed = record["gbs"] * 1e9 if record["kind"] == "copy" else record["tflops"] * 1e12
        assert speed == pytest.approx((probe.flops or probe.nbytes) / (record["ms"] / 1e3), rel=0.5, abs=1e8)
    assert peaks.bytes_per_second is not None and peaks.bytes_per_second > 1e6


def test_a_probe_that_fails_is_told_and_leaves_the_peak_unknown() -> None:
    class Broken(Probe):
        def model(self) -> bytes:
            return b"no model"

    def choose(kind: str, dtype: str) -> tuple[Probe, ...]:
        return (Broken(kind, dtype, (1, 4, 4, 4)),) if kind != "copy" else small(kind, dtype)

    peaks = measure_peaks(CPU, ("float32",), seconds=0.01, choose=choose)
    assert not peaks.flops
    assert [("failed" in record) for record in peaks.measured] == [True, True, False]
    assert peaks.compute_seconds(Work({"float32": 1}, 1)) is None
    assert peaks.seconds(Work({"float32": 1}, 1)) is None


def test_small_probes_of_a_slow_machine_end_the_climb() -> None:
    tried: list[Probe] = []

    class Seen(Probe):
        def model(self) -> bytes:
            tried.append(self)
            return super().model()

    def choose(kind: str, dtype: str) -> tuple[Probe, ...]:
        return tuple(Seen(kind, dtype, p.shape, p.layers) for p in small(kind, dtype) * 2)

    measure_peaks(CPU, ("float32",), seconds=0.01, enough=0.0, choose=choose)
    assert [p.kind for p in tried] == ["matmul", "conv", "copy", "copy"]


def test_the_roofline_is_the_longer_of_computing_and_moving() -> None:
    peaks = Peaks({"float16": 100.0, "float32": 10.0}, 1000.0)
    work = Work({"float16": 200, "float32": 30}, 1000)
    assert peaks.compute_seconds(work) == pytest.approx(2 + 3)
    assert peaks.move_seconds(work) == 1.0
    assert peaks.seconds(work) == pytest.approx(5)
    assert peaks.seconds(Work({"float16": 10}, 5000)) == 5.0
    assert peaks.seconds(Work({}, 500)) == 0.5
    assert peaks.compute_seconds(Work({"int8": 1}, 1)) is None
    assert Peaks({}, None).move_seconds(work) is None


def test_boards_have_ends_in_order() -> None:
    for board in BOARDS:
        low, high = board.peaks(0), board.peaks(1)
        for kind in ("float16", "float32", "int8"):
            assert 0 < low.flops[kind] <= high.flops[kind]
        assert low.flops["int8"] == 2 * low.flops["float16"]
        assert low.bytes_per_second is not None and high.bytes_per_second is not None
        assert low.bytes_per_second <= high.bytes_per_second
    assert [b.float16[1] for b in BOARDS] == sorted((b.float16[1] for b in BOARDS), reverse=True)
