"""The counter of operations and bytes, on graphs that can be counted by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")

from lp_edge.errors import ExportError
from lp_edge.export.cost import Cost, cost, file_cost


def graph(text: str, weights: Mapping[str, np.ndarray] | None = None) -> Any:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in (weights or {}).items())
    onnx.checker.check_model(model)
    return model


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def count(text: str, shapes: Mapping[str, tuple[int, ...]], **weights: np.ndarray) -> Cost:
    return cost(graph(text, weights), shapes)


def test_a_convolution_counts_two_per_term_and_its_groups() -> None:
    text = "g (float[N, 8, 10, 12] x) => (float[N, 6, 10, 12] y) { y = Conv <pads=[1,1,1,1]> (x, w) }"
    assert count(text, {"x": (2, 8, 10, 12)}, w=zeros(6, 8, 3, 3)).products == {
        "float32": 2 * (2 * 6 * 10 * 12) * 8 * 9
    }
    grouped = text.replace("<pads", "<group=2, pads")
    assert count(grouped, {"x": (2, 8, 10, 12)}, w=zeros(6, 4, 3, 3)).products == {
        "float32": 2 * (2 * 6 * 10 * 12) * 4 * 9
    }


def test_a_convolution_in_a_volume_and_a_transposed_one() -> None:
    text = "g (float[1, 2, 4, 5, 6] x) => (float[1, 3, 4, 5, 6] y) { y = Conv <pads=[1,1,1,1,1,1]> (x, w) }"
    assert count(text, {"x": (1, 2, 4, 5, 6)}, w=zeros(3, 2, 3, 3, 3)).products == {
        "float32": 2 * (3 * 4 * 5 * 6) * 2 * 27
    }
    text = "g (float[1, 4, 5, 5] x) => (float[1, 3, 10, 10] y) { y = ConvTranspose <strides=[2,2]> (x, w) }"
    # every input value is multiplied with every kernel value of 3 outputs
    assert count(text, {"x": (1, 4, 5, 5)}, w=zeros(4, 3, 2, 2)).products == {
        "float32": 2 * (4 * 5 * 5) * 3 * 4
    }


def test_products_of_matrices_count_by_their_inner_size_and_type() -> None:
    text = "g (float16[B, 5, 7] x) => (float16[B, 5, 3] y) { y = MatMul(x, w) }"
    half = count(text, {"x": (4, 5, 7)}, w=zeros(7, 3, dtype=np.float16))
    assert half.products == {"float16": 2 * (4 * 5 * 3) * 7}
    assert half.weight_bytes == 7 * 3 * 2
    text = "g (float[7, 5] x) => (float[5, 3] y) { y = Gemm <transA=1> (x, w) }"
    assert count(text, {"x": (7, 5)}, w=zeros(7, 3)).products == {"float32": 2 * (5 * 3) * 7}


def test_quantised_factors_have_the_type_that_is_stored() -> None:
    text = """g (float[1, 4] x, float s, int8 z) => (float[1, 2] y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        v = DequantizeLinear(w, s, z)
        y = MatMul(d, v) }"""
    counted = count(text, {"x": (1, 4), "s": (), "z": ()}, w=zeros(4, 2, dtype=np.int8))
    assert counted.products == {"int8": 2 * 2 * 4}
    assert counted.weight_bytes == 8


def test_other_operations_count_per_value_and_copies_do_not() -> None:
    text = """g (float[1, 3, 8, 8] x, float[1, 4, 4, 2] at) => (float[1, 3, 4, 4] y) {
        s = GridSample(x, at)
        r = Relu(s)
        t = Transpose <perm=[0,1,3,2]> (r)
        y = Add(t, t) }"""
    counted = count(text, {"x": (1, 3, 8, 8), "at": (1, 4, 4, 2)})
    values = 3 * 4 * 4
    assert (counted.products, counted.flops) == ({}, 8 * values + values + values)


def test_element_wise_operations_that_follow_each_other_are_one_kernel() -> None:
    """x and w in, y out; what is between the product and the last operation is in no memory."""
    text = "g (float[1, 4] x) => (float[1, 3] y) { m = MatMul(x, w) r = Relu(m) y = Exp(r) }"
    counted = count(text, {"x": (1, 4)}, w=zeros(4, 3))
    assert counted.boundary_bytes == 4 * (4 + 3)
    assert counted.weight_bytes == 4 * 12
    assert counted.fused_bytes == counted.boundary_bytes + counted.weight_bytes
    assert counted.node_bytes == 4 * ((4 + 12 + 3) + (3 + 3) + (3 + 3))


def test_what_two_kernels_hand_on_is_written_and_read() -> None:
    text = "g (float[1, 4] x) => (float[1, 4] y) { a = MatMul(x, w) y = MatMul(a, w) }"
    counted = count(text, {"x": (1, 4)}, w=zeros(4, 4))
    assert counted.fused_bytes == counted.node_bytes == 2 * 4 * (4 + 16 + 4)


def test_a_product_that_is_read_twice_is_written() -> None:
    text = "g (float[1, 4] x) => (float[1, 4] y) { a = MatMul(x, w) b = Relu(a) y = Add(a, b) }"
    counted = count(text, {"x": (1, 4)}, w=zeros(4, 4))
    assert counted.fused_bytes == 4 * (4 + 16) + 4 * (4 + 4) + 4 * 4  # product; a out and in; y


def test_the_longer_of_computing_and_of_moving_is_what_a_call_takes() -> None:
    counted = count("g (float[1, 4] x) => (float[1, 3] y) { y = MatMul(x, w) }", {"x": (1, 4)}, w=zeros(4, 3))
    assert (counted.flops, counted.fused_bytes) == (24, 4 * (4 + 12 + 3))
    assert counted.seconds(2.0, 1e9) == 12.0
    assert counted.seconds(1e9, 2.0) == 38.0


def test_what_depends_on_sizes_alone_is_a_constant() -> None:
    text = """g (float[N, 3] x) => (float[N, 3] y) {
        shape = Shape(x)
        zero = Constant <value = int64[1] {0}> ()
        n = Gather <axis=0> (shape, zero)
        more = Expand(w, shape)
        double = Add(more, more)
        y = Add(x, double) }"""
    counted = count(text, {"x": (5, 3)}, w=zeros(1, 3))
    assert (counted.flops, counted.nodes, counted.weight_bytes) == (15, 1, 4 * 15)


def test_weights_beside_the_file_are_found(tmp_path: Path) -> None:
    text = "g (float[1, 64] x) => (float[1, 64] y) { v = Transpose(w) y = MatMul(x, v) }"
    model = graph(text, {"w": np.ones((64, 64), np.float32)})
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    counted = file_cost(path, {"x": (1, 64)})
    assert (counted.flops, counted.nodes, counted.weight_bytes) == (2 * 64 * 64, 1, 4 * 64 * 64)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({}, "sizes of"),
        ({"x": (1, 5)}, "size"),
        ({"x": (1, 4, 1)}, "size"),
        ({"x": (1, 4), "y": (1,)}, "sizes of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        count("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }", shapes)


def test_axes_of_one_name_are_of_one_size() -> None:
    with pytest.raises(ExportError, match="size"):
        count(
            "g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) { y = Add(x, z) }",
            {"x": (1, 4), "z": (2, 4)},
        )


def test_a_size_that_depends_on_values_is_refused() -> None:
    with pytest.raises(ExportError, match="depends on values"):
        count("g (float[4] x) => (int64[1, n] y) { y = NonZero(x) }", {"x": (4,)})


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(ExportError, match="cannot be read"):
        file_cost(tmp_path / "m.onnx", {})


def test_the_built_in_networks_can_be_counted() -> None:
    from lp_edge.engines.bundle import builtin_directory, open_bundle
    from lp_edge.runtime.bench_calls import shapes_of

    if not (builtin_directory() / "manifest.json").is_file():
        pytest.skip("the built-in bundle is not there yet")
    bundle = open_bundle(None)
    for name, entry in bundle.manifest.networks.items():
        one, four = (file_cost(bundle.path_of(name), shapes_of(entry.inputs, n)) for n in (1, 4))
        assert 3.9 < four.flops / one.flops < 4.1
        assert one.weight_bytes <= 1.05 * entry.total_size + 2**20
        assert one.boundary_bytes <= one.fused_bytes <= one.node_bytes


def test_an_einsum_is_not_passed_over() -> None:
    with pytest.raises(ExportError, match="Einsum"):
        count(
            'g (float[2, 3] x, float[3, 4] z) => (float[2, 4] y) { y = Einsum <equation = "ij,jk->ik"> (x, z) }',
            {"x": (2, 3), "z": (3, 4)},
        )
