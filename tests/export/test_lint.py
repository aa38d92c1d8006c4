"""Every rule of the linter has graphs that break it and one that keeps it."""

from __future__ import annotations

import re
from typing import Any

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")

from lp_edge.errors import ConfigError, ExportError
from lp_edge.export import lint as linter

IN = "float[batch,3,8,8] x"
OUT = "float[batch,3,8,8] y"


def parse(
    body: str, *, inputs: str = IN, outputs: str = OUT, weights: str = "", opset: int = 17, ir: int = 8
) -> onnx.ModelProto:
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}, "other" : 1]>'
    return onnx.parser.parse_model(
        f"{head} graph ({inputs}) => ({outputs}) {f'<{weights}>' if weights else ''} {{ {body} }}"
    )


RELU = parse("y = Relu(x)")
HALF = "h = Cast<to=10>(x) "
BACK = " y = Cast<to=1>(k)"
GRID = IN + ", float[batch,8,8,2] grid"
MIX = "float[3] s = {1,1,1}, float[3] b = {0,0,0}, float[3] m = {0,0,0}, float[3] v = {1,1,1}"
KERNEL = "float[3,3,1,1] w = {1,0,0,0,1,0,0,0,1}"


def external(*locations: str) -> onnx.ModelProto:
    model = parse("z = Add(x, w) y = Add(z, v)", weights="float[1] w = {1}, float[1] v = {2}")
    for tensor, location in zip(model.graph.initializer, locations, strict=True):
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    return model


def stated(*axes: str) -> onnx.ModelProto:
    """A graph whose output has axes with these names, which the parser would not take."""
    model = parse(
        "y = Reshape(x, s)", inputs="float[n,h] x", outputs="float[n,h] y", weights="int64[2] s = {0,-1}"
    )
    for dim, name in zip(model.graph.output[0].type.tensor_type.shape.dim, axes, strict=True):
        dim.dim_param = name
    return model


def with_function() -> onnx.ModelProto:
    model = parse("y = Relu(x)")
    model.functions.append(
        onnx.helper.make_function(
            "other",
            "Twice",
            ["a"],
            ["c"],
            [onnx.helper.make_node("Add", ["a", "a"], ["c"])],
            model.opset_import,
        )
    )
    return model


def control_flow() -> onnx.ModelProto:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        value = onnx.helper.make_tensor_value_info(name, 1, ["batch", 3, 8, 8])
        return onnx.helper.make_graph([onnx.helper.make_node(operator, ["x"], [name])], name, [], [value])

    model = parse("y = Relu(x)", weights="bool c = {1}")
    del model.graph.node[:]
    model.graph.node.append(
        onnx.helper.make_node(
            "If", ["c"], ["y"], then_branch=branch("a", "Relu"), else_branch=branch("b", "Neg")
        )
    )
    return model


QUANTISE = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
WEIGHT = "p = QuantizeLinear<axis=0>(w, t, o) e = DequantizeLinear<axis=0>(p, t, o)"
EIGHT = KERNEL + ", float s = {0.5}, int8 z = {0}, float[3] t = {0.5,1,2}, int8[3] o = {0,0,0}"


def quantised(
    nodes: str = f"{QUANTISE} {WEIGHT} y = Conv(d, e)", changes: tuple[str, str] = ("", ""), **options: Any
) -> onnx.ModelProto:
    weights = EIGHT + options.pop("more", "")
    assert changes[0] in weights
    return parse(nodes, weights=weights.replace(*changes, 1), **options)


def weight_as_input() -> onnx.ModelProto:
    model = parse("y = Add(x, w)", weights="float[1] w = {1}")
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [1]))
    return model


# rule -> target, a graph that keeps the rule, graphs that break it
CASES: dict[str, tuple[str, onnx.ModelProto, list[onnx.ModelProto]]] = {
    "opset": ("main", RELU, [parse("y = Relu(x)", opset=18), parse("y = Relu(x)", opset=15)]),
    "ir-version": ("tensorrt8", RELU, [parse("y = Relu(x)", ir=9)]),
    "domain": ("main", RELU, [parse("y = other.Relu(x)"), with_function()]),
    "external-data": (
        "main",
        external("w.data", "w.data"),
        [
            external("w.data", "v.data"),
            external("../w.data", "../w.data"),
            external("/etc/w", "/etc/w"),
            external("a/w", "a/w"),
        ],
    ),
    "control-flow": ("main", RELU, [control_flow()]),
    "operator": (
        "tensorrt8",
        parse("e = Erf(x) y = Relu(e)"),
        [
            parse("y = LayerNormalization(x, w)", weights="float[8] w = {1,1,1,1,1,1,1,1}"),
            parse("y = Mod<fmod=1>(x, x)"),
            parse("y = InstanceNormalization(x, s, b)", weights=MIX.split(", float[3] m")[0]),
            parse("y = RandomNormalLike(x)"),
        ],
    ),
    "operator-remark": (
        "main",
        RELU,
        [parse("y = InstanceNormalization(x, s, b)", weights=MIX.split(", float[3] m")[0])],
    ),
    "boundary-dtype": (
        "main",
        parse("y = Cast<to=1>(x)", inputs="uint8[batch,3,8,8] x"),
        [
            parse("y = Cast<to=1>(x)", inputs="float16[batch,3,8,8] x"),
            parse("y = Cast<to=7>(x)", outputs="int64[batch,3,8,8] y"),
        ],
    ),
    "dynamic-batch": (
        "main",
        parse("y = Relu(x)", inputs="float[n,h] x", outputs="float[n,h] y"),
        [
            parse("y = Relu(x)", inputs="float[1,3] x", outputs="float[1,3] y"),
            parse("y = Relu(x)", inputs="float[n,3] x", outputs="float[m,3] y"),
            parse("y = Relu(x)", inputs="float[n,?] x", outputs="float[n,3] y"),
            stated("n", "h*k"),
            stated("n", "Mulpoints_dim_1"),
            stated("n", "?"),
            parse("y = ReduceSum<keepdims=0>(x)", outputs="float y"),
        ],
    ),
    "uint8": (
        "main",
        parse(
            "f = Cast<to=1>(x) t = Transpose<perm=[0,3,1,2]>(f) y = Cast<to=2>(t)",
            inputs="uint8[batch,8,8,3] x",
            outputs="uint8[batch,3,8,8] y",
        ),
        [
            parse("t = Transpose<perm=[0,3,1,2]>(x) y = Cast<to=1>(t)", inputs="uint8[batch,8,8,3] x"),
            parse("c = Cast<to=2>(x) y = Cast<to=1>(c)"),
            parse("i = Cast<to=6>(x) y = Cast<to=2>(i)", outputs="uint8[batch,3,8,8] y"),
            parse("i = Cast<to=6>(x) y = Cast<to=1>(i)", inputs="uint8[batch,3,8,8] x"),
            parse(
                "c = Cast<to=2>(x) y = Flatten(c)",
                inputs="float[batch,3] x",
                outputs="uint8[batch,3] y",
            ),
        ],
    ),
    "initialiser-as-input": (
        "main",
        parse("y = Add(x, w)", weights="float[1] w = {1}"),
        [weight_as_input()],
    ),
    "dtype": (
        "main",
        parse("i = Cast<to=6>(x) y = Cast<to=1>(i)"),
        [
            parse("d = Cast<to=11>(x) y = Cast<to=1>(d)"),
            parse("d = Cast<to=3>(x) y = Cast<to=1>(d)"),
            parse("d = Cast<to=11>(x) e = Mul(d, w) y = Cast<to=1>(e)", weights="double[1] w = {2}"),
        ],
    ),
    "int64-range": (
        "main",
        parse(
            "y = Slice(x, a, b, c)",
            weights="int64[1] a = {0}, int64[1] b = {9223372036854775807}, int64[1] c = {1}",
        ),
        [
            parse(
                "i = Cast<to=7>(x) j = Add(i, w) y = Cast<to=1>(j)",
                weights="int64[1] w = {3000000000}",
            )
        ],
    ),
    "not-finite": (
        "main",
        parse("y = Add(x, w)", weights="float[1] w = {1}"),
        [parse("y = Add(x, w)", weights="float[1] w = {-inf}")],
    ),
    "rank": (
        "main",
        parse(
            'y = Resize<mode="linear">(x, , s)',
            weights="float[4] s = {1,1,2,2}",
            outputs="float[batch,3,16,16] y",
        ),
        [
            parse(
                'y = Resize<mode="linear">(x, , s)',
                inputs="float[batch,3,4,8,8] x",
                weights="float[5] s = {1,1,1,2,2}",
                outputs="float[batch,3,4,16,16] y",
            ),
            parse(
                "u = Unsqueeze(x, a) y = Squeeze(u, a)",
                weights="int64[5] a = {4,5,6,7,8}",
            ),
        ],
    ),
    "reduce-axes": (
        "tensorrt8",
        parse("y = ReduceMean<axes=[1]>(x)", outputs="float[batch,1,8,8] y", opset=17),
        [],
    ),
    "constant-operand": (
        "main",
        parse("y = ReduceSum(x, a)", weights="int64[1] a = {1}", outputs="float[batch,1,8,8] y"),
        [
            parse("a = Shape(x) r = ReduceSum(x, a) y = Add(x, r)"),
            parse(
                "a = Shape<start=1,end=2>(x) r = Unsqueeze(x, a) y = Flatten(r)", outputs="float[batch,k] y"
            ),
        ],
    ),
    "grid-sample-rank": (
        "main",
        parse("y = GridSample(x, grid)", inputs=GRID),
        [
            parse(
                "y = GridSample(x, grid)",
                inputs="float[batch,3,4,8,8] x, float[batch,4,8,8,3] grid",
                outputs="float[batch,3,4,8,8] y",
                opset=20,
            )
        ],
    ),
    "grid-sample-opset": (
        "tensorrt11",
        parse("y = GridSample(x, grid)", inputs=GRID),
        [parse('y = GridSample<mode="bilinear">(x, grid)', inputs=GRID, opset=20)],
    ),
    "grid-sample-mode": (
        "tensorrt11",
        parse('y = GridSample<mode="bicubic">(x, grid)', inputs=GRID),
        [
            parse('y = GridSample<mode="linear">(x, grid)', inputs=GRID),
            parse('y = GridSample<mode="cubic">(x, grid)', inputs=GRID, opset=20),
            parse("y = GridSample(x, grid)", inputs=GRID, opset=20),
        ],
    ),
    "grid-sample-dtype": (
        "main",
        parse("y = GridSample(x, grid)", inputs=GRID),
        [
            parse(HALF + "k = GridSample(h, grid)" + BACK, inputs=GRID),
            parse("h = Cast<to=10>(grid) g = Cast<to=1>(h) y = GridSample(x, g)", inputs=GRID),
        ],
    ),
    "fp32-island": (
        "main",
        parse(HALF + "r = Relu(h) f = Cast<to=1>(r) y = Softmax<axis=1>(f)"),
        [
            parse(HALF + "k = Softmax<axis=1>(h)" + BACK),
            parse(HALF + "k = Exp(h)" + BACK),
            parse(HALF + "k = ReduceMean<axes=[2,3]>(h)" + BACK, outputs="float[batch,3,1,1] y"),
            parse(HALF + "k = LayerNormalization(h, w)" + BACK, weights="float16[8] w = {1,1,1,1,1,1,1,1}"),
        ],
    ),
    "training": (
        "main",
        RELU,
        [
            parse("y = Dropout(x)"),
            parse("y, n, p = BatchNormalization<training_mode=1>(x, s, b, m, v)", weights=MIX),
        ],
    ),
    "batchnorm": (
        "main",
        parse("r = Relu(x) y = BatchNormalization(r, s, b, m, v)", weights=MIX),
        [parse("c = Conv(x, w) y = BatchNormalization(c, s, b, m, v)", weights=f"{KERNEL}, {MIX}")],
    ),
    "unfolded": (
        "main",
        parse("y = Conv(x, w)", weights=KERNEL),
        [
            parse("d = Div(w, s) y = Conv(x, d)", weights=f"{KERNEL}, float s = {{2}}"),
            parse("s = Constant<value_float=2.0>() d = Mul(w, s) y = Conv(x, d)", weights=KERNEL),
        ],
    ),
    "unused": (
        "main",
        RELU,
        [parse("y = Relu(x)", weights="float[1] w = {1}"), parse("y = Relu(x) z = Neg(x)")],
    ),
}
STORED = ", int8[3,3,1,1] p = {1,0,0,0,1,0,0,0,1}"
LIGHT = EIGHT.replace(KERNEL + ", ", "")
CASES |= {
    "quantised": (
        "main",
        quantised(),
        [
            quantised("q = QuantizeLinear(x, s, z) y = Cast<to=1>(q)"),
            parse("e = DequantizeLinear<axis=0>(p, t, o) y = Conv(x, e)", weights=LIGHT + STORED),
        ],
    ),
    "quantisation-scale": (
        "main",
        quantised(),
        [
            quantised(changes=("s = {0.5}", "s = {-0.5}")),
            quantised(changes=("t = {0.5,1,2}", "t = {0.5,0,2}")),
            quantised(changes=("z = {0}", "z = {3}")),
            quantised(f"{QUANTISE} {WEIGHT.replace('axis=0', 'axis=1')} y = Conv(d, e)"),
            quantised(f"{QUANTISE.replace('s, z', 't, o')} {WEIGHT} y = Conv(d, e)"),
            quantised("k = Abs(s) q = QuantizeLinear(x, k, z) d = DequantizeLinear(q, k, z) y = Conv(d, w)"),
            quantised("q = QuantizeLinear(x, s) c = Cast<to=1>(q) y = Conv(c, w)"),
        ],
    ),
    "quantisation-pair": (
        "main",
        quantised(),
        [
            quantised(f"{QUANTISE} y = Relu(d)"),
            quantised(
                f"{QUANTISE.replace('(q, s', '(q, r')} {WEIGHT} y = Conv(d, e)", more=", float r = {0.25}"
            ),
        ],
    ),
}
CASES["reduce-axes"][2].extend(
    parse(f"y = {operator}(x, a)", weights="int64[1] a = {1}", outputs="float[batch,1,8,8] y", opset=18)
    for operator in ("ReduceMean", "ReduceL2", "ReduceMax")
)


def broken(model: onnx.ModelProto, target: str) -> set[str]:
    return {finding.rule for finding in linter.lint(model, target)}


def test_weights_in_8_bits_and_fp8_are_for_tensorrt_10() -> None:
    stored = parse(
        f"{QUANTISE} e = DequantizeLinear<axis=0>(p, t, o) y = Conv(d, e)", weights=LIGHT + STORED, opset=19
    )
    assert broken(stored, "tensorrt11") == set()
    fp8 = quantised(opset=19)
    for tensor in fp8.graph.initializer:
        if tensor.name in "zo":
            tensor.CopyFrom(
                onnx.TensorProto(
                    name=tensor.name,
                    data_type=onnx.TensorProto.FLOAT8E4M3FN,
                    dims=tensor.dims,
                    raw_data=bytes(3 if tensor.dims else 1),
                )
            )
    assert broken(fp8, "tensorrt11") == set()
    for target in ("main", "tensorrt8"):
        assert "dtype" in broken(fp8, target)


def test_every_rule_has_cases() -> None:
    assert CASES.keys() == linter.RULES.keys()
    assert all(bad for _, _, bad in CASES.values())


@pytest.mark.parametrize("rule", CASES)
def test_rule(rule: str) -> None:
    target, good, bad = CASES[rule]
    assert broken(good, target) == set(), rule
    for model in bad:
        assert rule in broken(model, target), onnx.printer.to_text(model)


@pytest.mark.parametrize("target", linter.TARGETS)
def test_plain_graph_has_no_findings(target: str) -> None:
    model = parse(
        "f = Cast<to=1>(x) s = Mul(f, k) t = Transpose<perm=[0,3,1,2]>(s) c = Conv(t, w) y = Relu(c)",
        inputs="uint8[batch,8,8,3] x",
        weights=f"float k = {{0.00392}}, {KERNEL}",
    )
    assert linter.lint(model, target) == []


def test_operators_by_target() -> None:
    norm = parse("y = LayerNormalization(x, w)", weights="float[8] w = {1,1,1,1,1,1,1,1}")
    assert broken(norm, "main") == set()
    assert broken(norm, "tensorrt8") == {"operator"}
    gelu = parse("y = Gelu(x)", opset=20)
    assert broken(gelu, "tensorrt11") == set()
    assert broken(gelu, "main") == {"operator", "opset"}


def test_axes_as_input_are_fine_for_newer_targets() -> None:
    assert broken(CASES["reduce-axes"][2][0], "tensorrt11") == set()


def test_wide_integers_are_fine_for_newer_targets() -> None:
    assert broken(CASES["int64-range"][2][0], "tensorrt11") == set()


def test_empty_operand_is_not_a_constant() -> None:
    # The scales of Resize stand behind an empty name.
    assert broken(CASES["rank"][1], "main") == set()


def test_output_axis_may_be_an_expression_of_input_axes() -> None:
    assert not linter.lint(stated("n", "3*h//2 + (n+1)"), "main")


def test_nearest_resize_takes_volumes() -> None:
    volume = parse(
        'y = Resize<mode="nearest">(x, , s)',
        inputs="float[batch,3,4,8,8] x",
        weights="float[5] s = {1,1,1,2,2}",
        outputs="float[batch,3,4,16,16] y",
    )
    assert broken(volume, "tensorrt8") == set()


def test_finding_names_the_node() -> None:
    model = parse("y = Exp(h)", inputs="float16[batch,3] h", outputs="float16[batch,3] y")
    model.graph.node[0].name = "/heat/Exp"
    found = {finding.rule: finding for finding in linter.lint(model, "main")}
    assert found["fp32-island"].node == "Exp /heat/Exp"
    assert str(found["fp32-island"]) == (
        "error [fp32-island] Exp /heat/Exp: half precision; expected float32, by a Cast before and after"
    )


def test_errors_stand_before_warnings() -> None:
    model = parse("i = InstanceNormalization(x, s, b) y = Dropout(i)", weights=MIX.split(", float[3] m")[0])
    assert [f.severity for f in linter.lint(model, "main")] == ["error", "warning"]


def test_check_refuses_errors_and_returns_warnings() -> None:
    warned = linter.check(CASES["operator-remark"][2][0], "main", "warp_decode")
    assert [finding.rule for finding in warned] == ["operator-remark"]
    with pytest.raises(ExportError, match=re.escape("warp_decode does not suit TensorRT 8.5 (JetPack 5)")):
        linter.check(CASES["operator-remark"][2][0], "tensorrt8", "warp_decode")


def test_unknown_target() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown target 'tpu'; expected one of main, tensorrt8, tensorrt11"
    ):
        linter.lint(RELU, "tpu")
