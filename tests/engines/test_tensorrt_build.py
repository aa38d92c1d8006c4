"""Building TensorRT engines, on a fake TensorRT of every generation."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: TID253

from lp_edge.engines import trt_build
from lp_edge.engines.trt_build import (
    BuildProgress,
    Built,
    TensorRtConfig,
    build_engine,
    flags_of,
    import_tensorrt,
    profile_of,
)
from lp_edge.engines.trt_graph import read_graph
from lp_edge.errors import BackendUnavailable, ConfigError, EngineError, Interrupted
from lp_edge.tests.fake_tensorrt.module import VERSIONS, World, make_tensorrt

WEAK = ("8.5", "8.6")
CONFIG = TensorRtConfig(max_batch=4, axes={"K": (1, 2, 3)})


def half_model() -> bytes:
    """x u8 [batch, 4] -> y f32 [batch, K, 4], picks u8: a product in half precision between islands of fp32.

    Nodes without names, nodes that become several layers, comparisons and weights of either type.
    """
    rng = np.random.default_rng(3)
    weights = {
        "w": rng.normal(size=(4, 4)).astype(np.float16),
        "b": rng.normal(size=4).astype(np.float16),
        "eps": np.float32(1e-5),
        "mid": np.float32(0.1),
        "axes": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["xh"], "/in", to=TensorProto.FLOAT16),
        helper.make_node("Gemm", ["xh", "w", "b"], ["p"], "/fc"),
        helper.make_node("Relu", ["p"], ["r"]),
        helper.make_node("Cast", ["r"], ["r32"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["r32"], ["s"], "/soft"),
        helper.make_node("Add", ["s", "eps"], ["t"]),
        helper.make_node("Greater", ["t", "mid"], ["big"], "/big"),
        helper.make_node("Where", ["big", "t", "s"], ["chosen"]),
        helper.make_node("Unsqueeze", ["chosen", "axes"], ["one"]),
        helper.make_node("Mul", ["one", "z"], ["y"]),
        helper.make_node("Cast", ["y"], ["y16"], to=TensorProto.FLOAT16),
        helper.make_node("Neg", ["y16"], ["n16"], "/neg"),
        helper.make_node("Cast", ["n16"], ["picks"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "half",
        [
            helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 4]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", "K", 4]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "K", 4]),
            helper.make_tensor_value_info("picks", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8
    ).SerializeToString()


def quantised_model(zero: int = TensorProto.INT8) -> bytes:
    if zero == TensorProto.INT8:
        point = numpy_helper.from_array(np.zeros((), np.int8), "zero")
    else:
        point = helper.make_tensor("zero", zero, [], [0.0])
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "quantised",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(np.float32(0.1), "scale"), point],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9
    ).SerializeToString()


def build(version: str, world: World, model: bytes | Path = b"", **options: Any) -> Built:
    model = model or half_model()
    config = options.pop("config", CONFIG)
    graph = read_graph(model)
    return build_engine(
        make_tensorrt(version, world),
        model,
        graph,
        config,
        profile_of("half", graph.inputs, config, config.max_batch or 4),
        name="half",
        **options,
    )


# -- reading graphs ---------------------------------------------------------------------------------


def test_types_follow_from_the_casts() -> None:
    graph = read_graph(half_model())
    assert [str(spec) for spec in graph.inputs] == ["x uint8 [batch, 4]", "z float32 [batch, K, 4]"]
    assert [spec.name for spec in graph.outputs] == ["y", "picks"]
    halves = {name for name, kind in graph.types.items() if kind == "float16"}
    assert halves == {"xh", "w", "b", "p", "r", "y16", "n16"}
    assert (graph.types["big"], graph.types["one"], graph.precision) == ("bool", "float32", "fp16")
    assert {node.op: graph.compute_type(node) for node in graph.nodes if node.op != "Cast"} == {
        "Gemm": "float16", "Relu": "float16", "Softmax": "float32", "Add": "float32", "Greater": "float32",
        "Where": "float32", "Unsqueeze": "float32", "Mul": "float32", "Neg": "float16",
    }  # fmt: skip


def test_types_agree_with_onnx_on_real_graphs(toys: Path) -> None:
    from lp_edge.engines.bundle import builtin_directory

    for path in (*toys.rglob("*.onnx"), *builtin_directory().glob("*.onnx")):
        inferred = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
        types = read_graph(path).types
        assert len(inferred.value_info) > 3
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            wanted = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
            assert types[value.name] == wanted, f"{path.name}: {value.name}"


@pytest.mark.parametrize(
    "content", [b"", b"no model", half_model()[:100], b"\x0a\xff\xff", b"\x3a\x02\x0a\x00"]
)
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    for model in (content, path):
        with pytest.raises(EngineError, match=r"(?s)expected .*ONNX"):
            read_graph(model)


def test_inputs_that_are_no_plain_tensors_are_refused() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "text",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    with pytest.raises(EngineError, match="tensor x has type string"):
        read_graph(helper.make_model(graph).SerializeToString())


# -- configuration ----------------------------------------------------------------------------------


def test_options_as_text() -> None:
    config = TensorRtConfig.from_options(
        {
            "max_batch": "6",
            "usual_batch": "2",
            "axes": "H=64:256:640, W=64:256:640",
            "tf32": "true",
            "slots": "3",
        }
    )
    assert config == TensorRtConfig(6, 2, {"H": (64, 256, 640), "W": (64, 256, 640)}, tf32=True, slots=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_bacth": "1"}, "unknown option 'max_bacth'"),
        ({"max_batch": "many"}, "expected whole numbers"),
        ({"max_batch": "-1"}, "max_batch is -1"),
        ({"usual_batch": "9", "max_batch": "8"}, "expected at most max_batch"),
        ({"tf32": "maybe"}, "expected true or false"),
        ({"axes": "H=1:2"}, "AXIS=SMALLEST:USUAL:LARGEST"),
        ({"axes": "H=4:2:8"}, "smallest:usual:largest"),
        ({"optimization_level": "6"}, "from 0 to 5"),
    ],
)
def test_wrong_options(options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TensorRtConfig.from_options(options)


def test_profile_of_every_dynamic_axis(toys: Path) -> None:
    inputs = read_graph(toys / "warp_decode.onnx").inputs
    profile = profile_of("warp", inputs, TensorRtConfig(usual_batch=2, axes={"H": (8, 64, 128)}), 6)
    assert profile == {
        "source_image": ((1, 8, 16, 3), (1, 64, 512, 3), (6, 128, 2048, 3)),
        "kp_source": ((1, 478, 3), (2, 478, 3), (6, 478, 3)),
        "kp_driving": ((1, 478, 3), (2, 478, 3), (6, 478, 3)),
    }


def test_an_axis_without_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no sizes for the dynamic axis K of z float32 \[batch, K, 4\]"):
        profile_of("half", read_graph(half_model()).inputs, TensorRtConfig(), 4)


# -- building ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_every_layer_computes_as_the_graph_says(version: str) -> None:
    world = World()
    built = build(version, world)
    (record,) = world.builds
    world.verify()
    assert built.plan and record.profile == {
        "x": ((1, 4), (4, 4), (4, 4)), "z": ((1, 1, 4), (4, 2, 4), (4, 3, 4))
    }  # fmt: skip
    assert record.typed == (version not in WEAK)
    if record.typed:
        assert not record.layers and "FP16" not in record.flags
        return
    assert record.loose == [] and {"FP16", "OBEY_PRECISION_CONSTRAINTS"} <= record.flags
    half, single = ("HALF", ("HALF",)), ("FLOAT", ("FLOAT",))
    layers = {
        name.split("*")[0].split("ONNXTRT")[0] + name[-4:]: given for name, given in record.layers.items()
    }
    named = {name: given for name, given in record.layers.items() if not name.startswith(("(", "ONNXTRT"))}
    assert named == {
        "/fc": half, "/fc_1": half, "node_of_r": half, "/neg": half,
        "/soft": single, "node_of_t": single, "/big": ("FLOAT", ()), "node_of_chosen": single, "node_of_one": single,
        "node_of_y": single,
    }  # fmt: skip
    helpers = {name: given for name, given in record.layers.items() if name.startswith(("(", "ONNXTRT"))}
    # The shuffle of the product, and weights: two in half precision, two in fp32.
    assert sorted(helpers.values()) == [single, single, half, half, half] and len(layers) >= len(named)


@pytest.mark.parametrize("version", ["10.3"])
def test_weak_typing_on_request(version: str) -> None:
    world = World()
    build(version, world, config=TensorRtConfig(max_batch=4, axes=CONFIG.axes, strongly_typed=False))
    (record,) = world.builds
    assert not record.typed and record.loose == [] and record.layers
    assert {"FP16", "OBEY_PRECISION_CONSTRAINTS"} <= record.flags


def test_weak_typing_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"TensorRT 11\.4\.0\.106 has only strongly typed networks"):
        build("11.4", World(), config=TensorRtConfig(max_batch=4, axes=CONFIG.axes, strongly_typed=False))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_graph_of_single_precision_needs_no_flags(version: str, toys: Path) -> None:
    world = World()
    build(version, world, toys / "face_mesh.onnx", config=TensorRtConfig(max_batch=2))
    (record,) = world.builds
    assert record.flags == set() and not record.layers  # TF32, which TensorRT sets by itself, is off
    build(version, world, toys / "face_mesh.onnx", config=TensorRtConfig(max_batch=2, tf32=True))
    assert world.builds[1].flags == {"TF32"}


def test_precision_of_quantised_graphs() -> None:
    kinds = {TensorProto.INT8: "int8", TensorProto.UINT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8",
             TensorProto.FLOAT8E5M2: "fp8"}  # fmt: skip
    assert {zero: read_graph(quantised_model(zero)).precision for zero in kinds} == kinds


@pytest.mark.parametrize("version", VERSIONS)
def test_quantised_graphs(version: str) -> None:
    trt, graph = make_tensorrt(version, World()), read_graph(quantised_model())
    assert graph.precision == "int8"
    assert flags_of(trt, graph, TensorRtConfig()) == (("INT8",) if version in WEAK else ("STRONGLY_TYPED",))


def test_a_type_that_a_version_does_not_know() -> None:
    graph = read_graph(quantised_model(TensorProto.FLOAT8E4M3FN))
    with pytest.raises(ConfigError, match=r"quantised to FP8, which TensorRT 8\.5\.3\.1 does not know"):
        flags_of(make_tensorrt("8.5", World()), graph, TensorRtConfig())
    assert flags_of(make_tensorrt("8.6", World()), graph, TensorRtConfig()) == ("FP8",)


@pytest.mark.parametrize("version", VERSIONS)
def test_settings_reach_the_builder(version: str) -> None:
    world = World()
    old = version == "8.5"
    config = TensorRtConfig(
        max_batch=4,
        axes=CONFIG.axes,
        optimization_level=None if old else 5,
        hardware_compatibility=not old,
    )
    build(version, world, config=config, workspace=123 << 20)
    (record,) = world.builds
    assert record.settings["WORKSPACE"] == 123 << 20
    assert record.settings.get("builder_optimization_level") == (None if old else 5)
    external = record.settings.get("DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805", False)
    assert external is version.startswith("8."), "cuBLAS and cuDNN need not be there"
    level = record.settings.get("hardware_compatibility_level")
    assert level is None if old else level.name == "AMPERE_PLUS"
    trt, graph = make_tensorrt(version, world), read_graph(half_model())
    flags = flags_of(trt, graph, config)
    assert old or {"optimization_level=5", "hardware_compatibility=1"} <= set(flags)


@pytest.mark.parametrize("option", [{"optimization_level": 2}, {"hardware_compatibility": True}])
def test_options_that_8_5_has_not(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"TensorRT 8\.5\.3\.1 has no such option"):
        build("8.5", World(), config=TensorRtConfig(max_batch=4, axes=CONFIG.axes, **option))


@pytest.mark.parametrize("version", VERSIONS)
def test_contexts_may_share_the_profile_where_they_can(version: str) -> None:
    world = World()
    plan = build(version, world).plan
    assert (b'"shared": true' in plan) == (version != "8.5")


# -- what goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_no_gpu(version: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"makes no builder .*nullptr") as caught:
        build(version, World(gpu=False))
    assert "tensorrt-cu12 (525 or newer)" in caught.value.remedy and "--backend" in caught.value.remedy


@pytest.mark.parametrize("version", VERSIONS)
def test_every_parser_error_is_told(version: str) -> None:
    world = World(parse_errors=["Unsupported ONNX data type: UINT64", "Invalid Node - Conv_3\nkernel is odd"])
    with pytest.raises(EngineError) as caught:
        build(version, world)
    place = "node 3" if version in WEAK else "Conv /Conv_3"
    assert f"{place}: Unsupported ONNX data type: UINT64 (in importModel)" in caught.value.got
    assert f"{place}: Invalid Node - Conv_3 kernel is odd" in caught.value.got
    assert "tensorrt8" in caught.value.remedy


def test_an_operator_that_a_version_does_not_know() -> None:
    graph = helper.make_graph(
        [helper.make_node("Gelu", ["x"], ["y"], "/gelu")],
        "gelu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    ).SerializeToString()
    with pytest.raises(EngineError, match="No importer registered for op: Gelu"):
        build("8.5", World(), model)
    assert build("10.3", World(), model).plan


@pytest.mark.parametrize("version", VERSIONS)
def test_a_build_without_result_says_why(version: str) -> None:
    world = World(build_error=("INTERNAL_ERROR", "Could not find any implementation for node {/fc}."))
    with pytest.raises(EngineError, match=r"built no engine \(.*Could not find any implementation for node"):
        build(version, world)


def test_exceptions_of_the_bindings_are_told_with_the_log() -> None:
    world = World()

    def burst(network: Any) -> None:
        raise ValueError("Weights have wrong size")

    world.parsed = burst
    with pytest.raises(EngineError, match=r"could not parse the graph .*ValueError: Weights have wrong size"):
        build("10.3", world)


def test_weights_beside_need_a_path(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(half_model())
    path = tmp_path / "half.onnx"
    onnx.save(model, path, save_as_external_data=True, location="half.data", size_threshold=0)
    assert build("10.3", World(), path).plan
    with pytest.raises(EngineError, match=r"its weights are in the file 'half\.data'"):
        build("10.3", World(), path.read_bytes())


def test_a_module_without_a_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    trt = make_tensorrt("10.3", World())
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    assert import_tensorrt() is trt
    del trt.OnnxParser
    with pytest.raises(BackendUnavailable, match=r"TensorRT 10\.3\.0 lacks OnnxParser"):
        import_tensorrt()


# -- progress, cancelling, timing -------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_progress(version: str) -> None:
    seen: list[BuildProgress] = []
    build(version, World(), progress=seen.append)
    assert [p.stage for p in seen][:2] == ["preparing", "parsing"] and {p.network for p in seen} == {"half"}
    shares = [p.fraction for p in seen if p.fraction is not None]
    if version in WEAK:
        assert not shares and any("GraphReduction" in p.stage for p in seen)
    else:
        assert shares == sorted(shares) and shares[-1] == 1.0 and len(set(shares)) == 8


@pytest.mark.parametrize("version", VERSIONS)
def test_cancelled_during_the_build(version: str) -> None:
    world, stop = World(), threading.Event()
    world.during_build = stop.set
    with pytest.raises(Interrupted, match="half: the build of its engine was stopped"):
        build(version, world, cancelled=stop.is_set)
    assert version in WEAK or not world.builds  # before 10 it ends first
    world.during_build = None
    assert build(version, world).plan  # nothing is left locked


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_caller_raises_arrives(version: str) -> None:
    def fail(now: BuildProgress) -> None:
        if "building:" in now.stage:
            raise ZeroDivisionError("the caller's own")

    with pytest.raises(ZeroDivisionError, match="the caller's own"):
        build(version, World(), progress=fail)
    assert build(version, World()).plan


def test_one_build_at_a_time() -> None:
    world, inside, go = World(), threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go.wait(10)

    world.during_build = hold
    first = threading.Thread(target=build, args=("10.3", world))
    first.start()
    try:
        assert inside.wait(10)
        seen: list[str] = []
        with pytest.raises(Interrupted):
            build(
                "10.3", World(), progress=lambda now: seen.append(now.stage), cancelled=lambda: len(seen) > 0
            )
        assert seen == ["waiting for another build"]
    finally:
        go.set()
        first.join(10)
    assert len(world.builds) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_timing_cache_is_used_again(version: str) -> None:
    world = World()
    first = build(version, world)
    again = build(version, world, timing_cache=first.timing_cache)
    assert world.builds[0].timed > 5 and world.builds[1].timed == 0
    assert again.timing_cache == first.timing_cache


@pytest.mark.parametrize("content", [b"rubbish", b'["8.6.1 Orin", ["abc"]]'])
def test_a_timing_cache_that_does_not_fit_is_replaced(content: bytes) -> None:
    world = World()
    built = build("10.3", world, timing_cache=content)
    assert world.builds[0].timed > 5 and b"H200" in built.timing_cache


def test_no_timing_cache_on_request() -> None:
    world = World()
    config = TensorRtConfig(max_batch=4, axes=CONFIG.axes, timing_cache=False)
    assert build("10.3", world, config=config, timing_cache=b"x").timing_cache == b""


# -- the log ----------------------------------------------------------------------------------------


def test_log_levels(caplog: pytest.LogCaptureFixture) -> None:
    world = World(build_error=("INTERNAL_ERROR", "assertion failed"))
    with caplog.at_level(logging.DEBUG, "lp_edge"), pytest.raises(EngineError):
        build("8.6", world)
    told = {record.levelno for record in caplog.records}
    assert logging.ERROR in told and logging.DEBUG in told
    assert all(record.getMessage().startswith("TensorRT: ") for record in caplog.records)
    assert not any("Registered plugin" in record.getMessage() for record in caplog.records)


def test_one_logger_for_a_module() -> None:
    trt = make_tensorrt("10.3", World())
    logger = trt_build.logger_of(trt)[0]
    gc.collect()
    assert trt_build.logger_of(trt)[0] is logger


def test_errors_of_another_thread_do_not_mix_in() -> None:
    trt = make_tensorrt("10.3", World())
    logger, errors = trt_build.logger_of(trt)[0], trt_build.Errors(trt)
    other = threading.Thread(target=logger.log, args=(trt.ILogger.Severity.ERROR, "theirs"))
    other.start()
    other.join()
    logger.log(trt.ILogger.Severity.ERROR, "2: OutOfMemory (no further information)")
    assert errors.out_of_memory
    assert errors.take() == "2: OutOfMemory (no further information)"
    assert errors.take() == "TensorRT gave no reason" and not errors.out_of_memory
