"""Q/DQ nodes: where they stand, what they hold, and that a graph with them computes what can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")
import onnxruntime

from lp_edge.engines import names
from lp_edge.errors import ConfigError, ExportError
from lp_edge.export.lint import lint
from lp_edge.export.quantize.graph import SAMPLES, convolutions, inputs_of, observed, quantised
from lp_edge.export.quantize.scales import FP8, INT8, fake

helper, numpy_helper = onnx.helper, onnx.numpy_helper
SHAPE = ["batch", 2, 8, 8]


def run(
    model: Any, feeds: dict[str, Any], outputs: list[str] | None = None, fused: bool = False
) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "0" if fused else "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(outputs, feeds)


def small(half: bool = False, opset: int = 16) -> Any:
    """Two convolutions on one input, whose results are added: ``y = (x * w0) + (relu(x * w0) * w1)``, 1x1 kernels."""
    kind = np.float16 if half else np.float32
    w0 = np.array([[1.0, 0.51], [-0.25, 2.0]], kind).reshape(2, 2, 1, 1)
    w1 = np.array([[0.5, 0.5], [4.0, 0.0]], kind).reshape(2, 2, 1, 1)
    to = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=to),
        helper.make_node("Conv", ["h", "w0", "b"], ["a"], "conv_0"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w1"], ["c"], "conv_1"),
        helper.make_node("Conv", ["r", "w0"], ["d"], "conv_2"),
        helper.make_node("Add", ["c", "d"], ["s"]),
        helper.make_node("Conv", ["s", "w1"], ["e"], "conv_3"),
        helper.make_node("Cast", ["e"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    weights = {"w0": w0, "w1": w1, "b": np.array([0.5, -0.5], kind)}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", 1, SHAPE)],
        [helper.make_tensor_value_info("y", 1, SHAPE)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


THRESHOLDS = {"h": 12.7, "r": 25.4, "s": 127.0}
ALL = ["conv_0", "conv_1", "conv_2", "conv_3"]


def by_name(model: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def test_a_convolution_with_known_scales() -> None:
    """x = 1.24 at a scale of 0.1 is level 12; w = 1 and 0.51 at 1/127 are levels 127 and 65: 1.2 + 1.2 · 65 / 127 + 0.5."""
    model = quantised(small(), THRESHOLDS, ["conv_0"], INT8)
    x = np.full((1, 2, 8, 8), 1.24, np.float32)
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("a", 1, SHAPE))
    for fused in (False, True):  # ONNX Runtime's own kernel of 8 bits agrees
        (a,) = run(model, {"x": x}, ["a"], fused)
        assert a[0, 0, 0, 0] == pytest.approx(1.2 + 1.2 * 65 / 127 + 0.5, abs=1e-5)
        # the other channel has a scale of its own: -0.25 and 2 at 2/127 are levels -16 and 127
        assert a[0, 1, 0, 0] == pytest.approx(1.2 * (-16 + 127) * 2 / 127 - 0.5, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "half", "opset"),
    [(INT8, False, 16), (INT8, False, 19), (INT8, True, 19), (FP8, False, 19), (FP8, True, 19)],
)
def test_every_form_computes_what_the_levels_say(kind: Any, half: bool, opset: int) -> None:
    model = small(half)
    if half or kind is FP8:
        assert quantised(model, THRESHOLDS, ALL, kind).opset_import[0].version == 19
    got = quantised(model, THRESHOLDS, ALL, kind, opset=opset)
    onnx.checker.check_model(got, full_check=True)
    x = np.random.default_rng(3).normal(0, 3, (2, 2, 8, 8)).astype(np.float32)
    (y,) = run(got, {"x": x})

    def scale(value: float) -> float:
        return float(np.float16(value / kind.limit)) if half else value / kind.limit

    def conv(value: Any, key: str, tensor: str) -> Any:
        weight = numpy_helper.to_array(by_name(model)[key]).astype(np.float32)
        peaks = np.abs(weight).max((1, 2, 3), keepdims=True) if kind is INT8 else np.abs(weight).max()
        inside = fake(value, scale(THRESHOLDS[tensor]), kind)
        return np.einsum("nihw,oi->nohw", inside, fake(weight, peaks / kind.limit, kind)[:, :, 0, 0])

    a = conv(x, "w0", "h") + np.array([0.5, -0.5]).reshape(1, 2, 1, 1)
    r = np.maximum(a, 0)
    want = conv(conv(r, "w1", "r") + conv(r, "w0", "r"), "w1", "s")
    # What lies on the edge between two levels may fall to either side: 1/16 of a number apart in fp8.
    gap = np.abs(y - want) / np.abs(want).max()
    assert half or np.median(gap) < 1e-7
    assert gap.max() < 0.12 and np.sqrt(np.square(gap).mean()) < 0.02


def test_pairs_are_shared_and_the_rest_stays() -> None:
    model = small()
    got = quantised(model, THRESHOLDS, ["conv_1", "conv_2"], INT8)
    kinds = [node.op_type for node in got.graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 3, (
        "one activation, two weights"
    )
    before = {node.name or node.output[0]: node for node in model.graph.node}
    for node in got.graph.node:
        old = before.get(node.name or node.output[0])
        if old is None:
            assert node.op_type in ("QuantizeLinear", "DequantizeLinear")
        elif node.name in ("conv_1", "conv_2"):
            assert node.input[0] == "r_dequantised" and list(node.output) == list(old.output)
        else:
            assert node == old
    assert by_name(got)["w0"] == by_name(model)["w0"], "conv_0 still reads it"
    assert [n.name for n in model.graph.node if n.op_type == "Conv"] == ALL and len(model.graph.node) == 8


def test_scales_and_zero_points() -> None:
    got = by_name(quantised(small(), THRESHOLDS, ALL, INT8))
    np.testing.assert_allclose(numpy_helper.to_array(got["w0_scale"]), [1 / 127, 2 / 127], rtol=1e-6)
    np.testing.assert_allclose(numpy_helper.to_array(got["w1_scale"]), [0.5 / 127, 4 / 127], rtol=1e-6)
    assert numpy_helper.to_array(got["h_scale"]) == pytest.approx(0.1) and not got["h_scale"].dims
    assert not numpy_helper.to_array(got["zero_int8_2"]).any() and got["zero_int8_2"].data_type == INT8.dtype
    assert got["w0"].data_type == onnx.TensorProto.FLOAT, "TensorRT 8 quantises the weights itself"
    stored = by_name(quantised(small(), THRESHOLDS, ALL, INT8, opset=19))
    assert numpy_helper.to_array(stored["w0_quantised"]).ravel().tolist() == [127, 65, -16, 127]
    assert "w0" not in stored and stored["w0_quantised"].data_type == INT8.dtype
    eight = by_name(quantised(small(), THRESHOLDS, ALL, FP8))
    assert eight["w0_quantised"].data_type == FP8.dtype and not eight["w0_scale"].dims


def test_half_precision_scales_cut_nothing_off() -> None:
    got = by_name(quantised(small(half=True), {"h": 1e-4, "r": 3.3, "s": 5.5}, ALL, INT8))
    for tensor, threshold in (("h", 1e-4), ("r", 3.3), ("s", 5.5)):
        scale = numpy_helper.to_array(got[f"{tensor}_scale"])
        assert scale.dtype == np.float16 and float(scale) * 127 >= threshold


@pytest.mark.parametrize("target", ["main", "tensorrt8", "tensorrt11"])
def test_the_linter_takes_what_is_written(target: str) -> None:
    opset = 19 if target == "tensorrt11" else 16
    assert lint(quantised(small(), THRESHOLDS, ALL, INT8, opset=opset), target) == []
    if opset == 19:
        for half in (False, True):
            assert lint(quantised(small(half), THRESHOLDS, ALL, FP8), target) == []


def island() -> Any:
    """A convolution makes a grid, one the deformation, one the occlusion map; three draw; one is 3-D, one has groups."""
    rng = np.random.default_rng(1)

    def weight(*shape: int) -> Any:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    weights = {
        "wg": weight(2, 2, 1, 1), "wd": weight(2, 2, 1, 1), "wo": weight(2, 2, 1, 1), "w3": weight(2, 2, 1, 1, 1),
        "wp": weight(2, 1, 1, 1), "w": weight(2, 2, 3, 3), "five": np.array([0, 2, 1, 8, 8]), "four": np.array([0, 2, 8, 8]),
    }  # fmt: skip
    same = {"pads": [1] * 4}
    nodes = [
        helper.make_node("Conv", ["x", "wg"], ["g"], "grid"),
        helper.make_node("Transpose", ["g"], ["where"], perm=[0, 2, 3, 1]),
        helper.make_node("GridSample", ["x", "where"], ["p"]),
        helper.make_node("Conv", ["x", "wd"], [names.DEFORMATION], "deformation_conv"),
        helper.make_node("Conv", ["x", "wo"], [names.OCCLUSION_MAP], "occlusion_conv"),
        helper.make_node("Mul", [names.DEFORMATION, names.OCCLUSION_MAP], ["m"]),
        helper.make_node("Add", ["p", "m"], ["warped"]),
        helper.make_node("Conv", ["warped", "w"], ["c1"], "first", **same),
        helper.make_node("Reshape", ["c1", "five"], ["v"]),
        helper.make_node("Conv", ["v", "w3"], ["v3"], "volume"),
        helper.make_node("Reshape", ["v3", "four"], ["f"]),
        helper.make_node("Conv", ["f", "wp"], ["c2"], "groups", group=2),
        helper.make_node("Conv", ["c2", "w"], ["c3"], "middle", **same),
        helper.make_node("Conv", ["c3", "w"], ["y"], "last", **same),
    ]
    graph = helper.make_graph(
        nodes,
        "island",
        [helper.make_tensor_value_info("x", 1, SHAPE)],
        [helper.make_tensor_value_info("y", 1, SHAPE)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)


def test_what_moves_pixels_is_never_quantised() -> None:
    model = island()
    assert convolutions(model, ends=True) == ["first", "middle", "last"]
    assert convolutions(model) == ["middle"], "the first reads the features, the last draws"
    got = quantised(model, {"warped": 1.0, "c2": 1.0, "c3": 1.0}, convolutions(model, ends=True), INT8)
    x = {"x": np.random.default_rng(2).normal(0, 1, (1, 2, 8, 8)).astype(np.float32)}
    inside = [names.DEFORMATION, names.OCCLUSION_MAP, "p"]
    for m in (model, got):
        m.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in inside)
    for a, b in zip(run(model, x), run(got, x), strict=True):
        equal = np.array_equal(a, b)
        assert equal == (a is not b and equal)
    results = zip(["y", *inside], run(model, x), run(got, x), strict=True)
    assert {name: np.array_equal(a, b) for name, a, b in results} == {
        "y": False,
        **dict.fromkeys(inside, True),
    }


def test_convolutions_need_names_of_their_own() -> None:
    model = small()
    model.graph.node[1].name = "conv_1"
    with pytest.raises(ExportError, match="names of their own"):
        convolutions(model)


def test_observed_peaks_and_samples() -> None:
    model = small()
    tensors = inputs_of(model, ALL)
    assert tensors == ["h", "r", "s"]
    seen = observed(model, tensors)
    x = np.random.default_rng(4).normal(0, 1, (1, 2, 8, 8)).astype(np.float32)
    x[0, 1, 3, 5] = -9.0
    peak, samples = run(seen, {"x": x}, ["peak:h", "samples:h"])
    assert peak.tolist() == [9.0]
    assert np.array_equal(samples, np.abs(x).ravel()), "small tensors are taken whole"
    wide = np.random.default_rng(5).normal(0, 1, (1, 2, 256, 256)).astype(np.float32)
    for value in (*seen.graph.input, seen.graph.output[0]):
        for axis in (2, 3):
            value.type.tensor_type.shape.dim[axis].dim_value = 256
    peak, samples = run(seen, {"x": wide}, ["peak:h", "samples:h"])
    step = 2 * (wide.size // SAMPLES // 2) + 1
    assert step % 2 == 1 and np.array_equal(samples, np.abs(wide).ravel()[::step])
    assert peak[0] == np.abs(wide).max()
    assert len(model.graph.output) == 1


def test_a_newer_opset_keeps_the_meaning() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=1),
        helper.make_node("Split", ["x"], ["l", "r"], axis=1),
        helper.make_node("Concat", ["r", "l"], ["t"], axis=1),
        helper.make_node("Add", ["t", "m"], ["z"]),
        helper.make_node("Conv", ["z", "w"], ["y"], "conv"),
    ]
    weight = numpy_helper.from_array(np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1), "w")
    graph = helper.make_graph(
        nodes,
        "reductions",
        [helper.make_tensor_value_info("x", 1, SHAPE)],
        [helper.make_tensor_value_info("y", 1, SHAPE)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.random.default_rng(6).integers(0, 9, (1, 2, 8, 8)).astype(np.float32)
    got = quantised(model, {"z": 127.0}, ["conv"], INT8, opset=19)
    onnx.checker.check_model(got, full_check=True)
    assert (got.opset_import[0].version, got.ir_version) == (19, 9)
    assert lint(got, "tensorrt11") == []
    assert np.abs(run(got, {"x": x})[0] - run(model, {"x": x})[0]).max() <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("kind", "half", "opset", "words"),
    [
        (FP8, False, 17, "fp8 around single precision at opset 17"),
        (INT8, True, 16, "half precision at opset 16"),
    ],
)
def test_what_an_opset_has_not_is_refused(kind: Any, half: bool, opset: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        quantised(small(half), THRESHOLDS, ALL, kind, opset=opset)


def test_a_threshold_must_be_positive_and_the_convolution_there() -> None:
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(ExportError, match="h has the threshold"):
            quantised(small(), {**THRESHOLDS, "h": value}, ALL, INT8)
    with pytest.raises(ExportError, match="no convolution conv_9"):
        quantised(small(), THRESHOLDS, ["conv_9"], INT8)
