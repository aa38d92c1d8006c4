"""TensorRT without a GPU: a module with what a version exports, and no more, that computes with ONNX Runtime.

``make_tensorrt(version, world)`` gives a module for one of the versions in facts.json, which was read off NVIDIA's bindings
(dump.py). A name or member that a version does not export raises AttributeError here too, and only settable properties can be
set. Enumerations have other numbers than in TensorRT, so that nobody counts on them.

The fake holds its caller to account: types, shapes against the profile, addresses before a launch and the memory behind them,
contexts that are changed after their launch was captured, two threads in one context, builders without a base class's
``__init__``. What TensorRT would refuse returns None or False with words in the log, as there; what it would
punish later is noted in ``World.problems``. ``World`` also fails on demand.
"""

from __future__ import annotations

import copy
import enum
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lp_edge.export.lint import _TENSORRT_8_5, _TENSORRT_8_6, _TENSORRT_10
from lp_edge.tests.fake_cuda.device import H200, FakeCuda

FACTS: dict[str, Any] = json.loads(Path(__file__).with_name("facts.json").read_text())
VERSIONS = {".".join(version.split(".")[:2]): version for version in FACTS}

_FLOATS = ("float16", "float32")
_MAGIC = b"FAKE PLAN "
_NAMES = {
    "float32": "FLOAT", "float16": "HALF", "int8": "INT8", "uint8": "UINT8", "int32": "INT32", "int64": "INT64", "bool": "BOOL",
}  # fmt: skip
_LAYERS = {
    "Conv": "CONVOLUTION", "MatMul": "MATRIX_MULTIPLY", "Shape": "SHAPE", "Softmax": "SOFTMAX", "GridSample": "GRID_SAMPLE",
    "Resize": "RESIZE", "Gather": "GATHER", "Slice": "SLICE", "Concat": "CONCATENATION", "Transpose": "SHUFFLE",
    "Reshape": "SHUFFLE", "Unsqueeze": "SHUFFLE", "Relu": "ACTIVATION", "Sigmoid": "ACTIVATION", "Where": "SELECT",
    "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Range": "FILL",
}  # fmt: skip


@dataclass
class Build:
    """What a build was asked for.

    Attributes:
        typed: whether the network was strongly typed.
        flags: names of builder flags.
        profile: input -> (smallest, usual, largest).
        timed: kernels that were measured, being in no timing cache.
        loose: floating-point layers whose precision was left to TensorRT while half precision was allowed.
        settings: properties of the builder configuration that were set, the pools' limits, and preview features.
        layers: name -> (precision, types of its outputs) of all layers that were given one.
    """

    typed: bool
    flags: set[str]
    profile: dict[str, Any]
    timed: int
    loose: list[str]
    settings: dict[str, Any]
    layers: dict[str, tuple[str, tuple[str, ...]]]


@dataclass
class World:
    """The machine around a fake TensorRT, and what goes wrong on it.

    Attributes:
        cuda: the device.
        gpu: False: there is none that TensorRT can use.
        parse_errors: what the next parser says in place of parsing, one after the other.
        build_error: what the builder says and builds nothing; (code, words).
        load_error: the same for the runtime and the next plans, so many times.
        enqueue_errors: words for the next launches, which return False.
        uncapturable: launches fail while they are captured.
        context_error: contexts are not made.
        unknown_shapes: output shapes are not known before the run.
        during_build: called at every step of a build.
        parsed: called with the network once it is parsed.
        builds: what was built. loads: plans read. launches: launches in streams, captured: those recorded.
        problems: what was done wrong so far.
    """

    cuda: FakeCuda = field(default_factory=lambda: FakeCuda(H200))
    gpu: bool = True
    parse_errors: list[str] = field(default_factory=list)
    build_error: tuple[str, str] | None = None
    load_error: tuple[str, str, int] | None = None
    enqueue_errors: list[tuple[str, str]] = field(default_factory=list)
    uncapturable: bool = False
    context_error: str = ""
    unknown_shapes: bool = False
    during_build: Callable[[], None] | None = None
    parsed: Callable[[Any], None] | None = None
    builds: list[Build] = field(default_factory=list)
    loads: int = 0
    launches: int = 0
    captured: int = 0
    contexts: int = 0
    problems: list[str] = field(default_factory=list)

    def verify(self) -> None:
        """AssertionError with everything that was done wrong, here and on the device."""
        assert not self.problems, "\n".join(self.problems)
        self.cuda.verify()


def make_tensorrt(version: str, world: World) -> ModuleType:
    """A module ``tensorrt`` of a version, for example "10.3"."""
    full = VERSIONS[version]
    facts = FACTS[full]
    trt = ModuleType("tensorrt")
    trt.__version__ = full
    trt._world = world
    trt._major = int(full.split(".")[0])
    for name, members in facts["classes"].items():
        if isinstance(members, list):
            # Numbers of our own, that fit into a mask.
            setattr(trt, name, enum.Enum(name, {m: 2 + i for i, m in enumerate(members)}, type=_Member))
    for name, members in facts["classes"].items():
        if isinstance(members, dict):
            setattr(trt, name, _class(name, members, trt))
    severity = enum.Enum("Severity", {m: 40 + i for i, m in enumerate(_SEVERITIES)}, type=_Member)
    trt.ILogger.Severity = severity
    for member in severity:
        setattr(trt.ILogger, member.name, member)
    unknown = [name for name in vars(trt) if not name.startswith("_") and name not in facts["names"]]
    assert not unknown, f"TensorRT {full} does not export {unknown}"
    return trt


_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class _Member:
    """Members of enumerations turn into integers, as pybind11's do."""

    value: int

    def __int__(self) -> int:
        return self.value


def _class(name: str, members: dict[str, str], trt: ModuleType) -> type:
    """A class with exactly the members of a version, made of our own implementation where there is one."""
    base = _IMPLEMENTATIONS.get(name)
    body = {k: v for k, v in vars(base).items() if k.startswith("_") or k in members} if base else {}
    body = {k: v for k, v in body.items() if k not in ("__dict__", "__weakref__")}
    for member, kind in members.items():
        if member not in body:
            body[member] = _value(member, kind) if kind in "pr" else _missing(name, member)
    body.update(
        {"_trt": trt, "_settable": {m for m, kind in members.items() if kind == "p"}, "_free": base in _BASES}
    )
    return type(name, (_Strict,), body)


def _value(name: str, kind: str) -> property:
    def get(self: Any) -> Any:
        return self._values.get(name)

    def put(self: Any, value: Any) -> None:
        self._values[name] = value

    return property(get, put if kind == "p" else None)


def _missing(owner: str, name: str) -> Callable[..., Any]:
    def method(self: Any, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"the fake does not know how to do {owner}.{name}")

    return method


class _Strict:
    """No attributes but the class's own; those of a subclass of ours (loggers) are its own affair."""

    _trt: Any
    _settable: set[str]
    _free = False

    def __new__(cls, *_: Any, **__: Any) -> Any:
        self = object.__new__(cls)
        object.__setattr__(self, "_values", {})
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._free and not name.startswith("_") and name not in self._settable:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}, or it is read-only"
            )
        object.__setattr__(self, name, value)


# -- what callers derive from -----------------------------------------------------------------------


class _ILogger:
    def __init__(self) -> None:
        self._ready = True

    def log(self, severity: Any, msg: str) -> None:
        raise AssertionError("a logger must have a method log")


class _IProgressMonitor:
    def __init__(self) -> None:
        self._ready = True


_BASES = (_ILogger, _IProgressMonitor)


def _derived(trt: Any, thing: Any, name: str, methods: str) -> None:
    """TypeError unless ``thing`` derives from a class of TensorRT and called its ``__init__``, as pybind11 has it."""
    if not isinstance(thing, getattr(trt, name)):
        raise TypeError(f"incompatible constructor arguments: {thing!r} is no {name}")
    if not getattr(thing, "_ready", False):
        raise TypeError(f"tensorrt.{name}.__init__() must be called when overriding __init__")
    for method in methods.split():
        assert getattr(type(thing), method, None) is not None, f"{name} without {method}"


class _Voice:
    """Where an object's errors go: the log."""

    def __init__(self, trt: Any, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def say(self, severity: str, words: str) -> None:
        self.logger.log(getattr(self.trt.ILogger.Severity, severity), words)

    def error(self, code: str, words: str) -> None:
        self.say("ERROR", f"{int(getattr(self.trt.ErrorCodeTRT, code))}: {words}")


def _start(trt: Any, logger: Any) -> _Voice:
    _derived(trt, logger, "ILogger", "log")
    voice = _Voice(trt, logger)
    if not trt._world.gpu:
        voice.say("WARNING", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    voice.say("INFO", "[MemUsageChange] Init CUDA: CPU +1, GPU +0, now: CPU 11, GPU 400 (MiB)")
    voice.say("VERBOSE", "Registered plugin creator - ::GridAnchor_TRT version 1")
    return voice


# -- building ---------------------------------------------------------------------------------------


class _Tensor:
    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], typed: bool) -> None:
        self._kind, self._values = dtype, {"name": name, "shape": shape}
        # A weakly typed network does not know its own half precision before it is built.
        self._told = dtype if typed or dtype not in _FLOATS else "float32"

    @property
    def name(self) -> str:
        return self._values["name"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values["shape"]

    @property
    def dtype(self) -> Any:
        return getattr(self._trt.DataType, _NAMES[self._told], None)


class _Layer:
    def __init__(self, network: Any, name: str, kind: str, sources: list[Any], results: list[Any]) -> None:
        self._network, self._sources, self._results = network, sources, results
        self._values = {"name": name, "type": getattr(self._trt.LayerType, kind)}
        self._kinds: dict[int, str] = {}
        self._compute = ""

    num_inputs = property(lambda self: len(self._sources))
    num_outputs = property(lambda self: len(self._results))

    def get_input(self, index: int) -> Any:
        return self._sources[index]

    def get_output(self, index: int) -> Any:
        return self._results[index]

    def _set_precision(self, value: Any) -> None:
        if self._network._typed:
            raise RuntimeError(f"layer {self.name}: precision of a strongly typed network")
        if self.type.name in ("CONSTANT", "SHAPE", "CAST"):
            self._trt._world.problems.append(f"precision of a {self.type.name} layer")
        self._compute = value.name

    precision = property(lambda self: getattr(self._trt.DataType, self._compute or "FLOAT"), _set_precision)
    precision_is_set = property(lambda self: bool(self._compute))

    def set_output_type(self, index: int, dtype: Any) -> None:
        if self._network._typed:
            raise RuntimeError(f"layer {self.name}: output type of a strongly typed network")
        if self._results[index]._kind not in _FLOATS:
            self._trt._world.problems.append(f"a floating-point type for {self._results[index].name}")
        self._kinds[index] = dtype.name

    def output_type_is_set(self, index: int) -> bool:
        return index in self._kinds


class _Network:
    def __init__(self, voice: _Voice, flags: int) -> None:
        self._voice, self._inputs, self._outputs, self._layers = voice, [], [], []
        self._model = b""
        members = self._trt.NetworkDefinitionCreationFlag.__members__
        known = {1 << int(flag): name for name, flag in members.items()}
        asked = {name for bit, name in known.items() if flags & bit}
        if flags & ~sum(known):
            raise TypeError(f"unknown bits in the flags of a network: {flags:#x}")
        self._explicit = "EXPLICIT_BATCH" in asked or "STRONGLY_TYPED" in members
        self._typed = "STRONGLY_TYPED" in asked or not hasattr(self._trt.BuilderFlag, "FP16")

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def get_layer(self, index: int) -> Any:
        return self._layers[index]


class _ParserError:
    def __init__(self, words: str, node: int, name: str = "", op: str = "") -> None:
        self._words, self._node, self._name, self._op = words, node, name, op

    def desc(self) -> str:
        return self._words

    def func(self) -> str:
        return "importModel"

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._op


class _OnnxParser:
    def __init__(self, network: Any, logger: Any) -> None:
        _derived(self._trt, logger, "ILogger", "log")
        assert isinstance(network, self._trt.INetworkDefinition)
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def set_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._trt.OnnxParserFlag)

    def parse_from_file(self, model: str) -> bool:
        import onnx

        assert isinstance(model, str)
        return self._parse(lambda: onnx.load(model))

    def parse(self, model: bytes, path: str | None = None) -> bool:
        import onnx

        assert isinstance(model, bytes)
        return self._parse(lambda: onnx.load_model_from_string(model))

    def _fail(self, words: str, node: int = -1, name: str = "", op: str = "") -> None:
        self._errors.append(self._trt.ParserError(words, node, name, op))

    def _parse(self, load: Callable[[], Any]) -> bool:
        import onnx

        world = self._trt._world
        if world.parse_errors:
            for words in world.parse_errors:
                self._fail(words, 3, "/Conv_3", "Conv")
            world.parse_errors = []
            return False
        if not self._network._explicit:
            self._fail("Assertion failed: !_importer_ctx.network()->hasImplicitBatchDimension()")
            return False
        try:
            model = load()
        except Exception as error:  # noqa: BLE001 - protobuf's and the checker's own, whatever they are
            self._fail(f"Failed to parse ONNX model: {error}")
            return False
        known = {8: _TENSORRT_8_5 if not hasattr(self._trt, "OnnxParserFlag") else _TENSORRT_8_6}
        for index, node in enumerate(model.graph.node):
            if node.op_type not in known.get(self._trt._major, _TENSORRT_10):
                self._fail(f"No importer registered for op: {node.op_type}", index, node.name, node.op_type)
                return False
        self._network._model = model.SerializeToString()
        self._add(onnx.shape_inference.infer_shapes(model, data_prop=True))
        if world.parsed is not None:
            world.parsed(self._network)
        return True

    def _add(self, model: Any) -> None:
        """Layers as TensorRT's parser makes them: one per node and a few more, named after it or not at all."""
        import onnx

        graph, network = model.graph, self._network
        tensors: dict[str, Any] = {}

        def tensor(value: Any) -> Any:
            kind = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
            dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
            return self._trt.ITensor(value.name, dtype, dims, network._typed)

        values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
        weights = {w.name for w in graph.initializer}
        for value in graph.input:
            if value.name not in weights:
                tensors[value.name] = tensor(value)
                network._inputs.append(tensors[value.name])
        taken: dict[str, int] = {}

        def named(name: str) -> str:
            number = taken[name] = taken.get(name, -1) + 1
            return f"{name}_{number}" if number else name

        def layer(name: str, kind: str, sources: list[Any], results: list[Any]) -> None:
            network._layers.append(self._trt.ILayer(network, name, kind, sources, results))

        stored = {w.name: w for w in graph.initializer}

        def spread(name: str) -> Any:
            """A weight that is read by a node: a constant, and a helper that gives it the other operand's rank."""
            if (
                name not in stored
                or (dtype := onnx.helper.tensor_dtype_to_np_dtype(stored[name].data_type).name) not in _FLOATS
            ):
                return None
            dims = tuple(stored[name].dims)
            held = self._trt.ITensor(f"{name}_output", dtype, dims, True)
            layer(named(name), "CONSTANT", [], [held])
            helper = named("ONNXTRT_Broadcast")
            wide = self._trt.ITensor(f"{helper}_output", dtype, dims, network._typed)
            layer(helper, "SHUFFLE", [held], [wide])
            return wide

        for node in graph.node:
            results = [tensor(values[name]) for name in node.output if name in values]
            tensors.update({result.name: result for result in results})
            if node.op_type == "Constant":
                continue
            label = node.name or f"node_of_{node.output[0]}"
            sources = [tensors.get(name) or spread(name) for name in node.input]
            kind = _LAYERS.get(node.op_type, "ELEMENTWISE")
            if node.op_type == "Cast":
                kind = "CAST" if hasattr(self._trt.LayerType, "CAST") else "IDENTITY"
            if node.op_type == "Gemm":  # a product, a helper and a sum
                inner = []
                for step in ("product", "helper"):
                    name = f"(Unnamed Layer* {len(network._layers)}) [{step}]_output"
                    inner.append(self._trt.ITensor(name, results[0]._kind, results[0].shape, network._typed))
                layer(named(label), "MATRIX_MULTIPLY", sources[:1], inner[:1])
                layer(f"(Unnamed Layer* {len(network._layers)}) [Shuffle]", "SHUFFLE", inner[:1], inner[1:])
                sources = inner[1:]
            layer(named(label), kind, sources, results)
        network._outputs.extend(tensors[value.name] for value in graph.output)


class _Profile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        shapes = tuple(tuple(int(size) for size in shape) for shape in (min, opt, max))
        if len({len(shape) for shape in shapes}) != 1 or not all(
            0 < a <= b <= c for a, b, c in zip(*shapes, strict=True)
        ):
            raise ValueError("Shapes provided for min, opt, max are inconsistent")
        self._shapes[input] = shapes


class _HostMemory(bytes):
    """The bindings' IHostMemory has the buffer protocol, which only bytes have here."""

    @property
    def nbytes(self) -> int:
        return len(self)


class _TimingCache:
    def __init__(self, owner: str, kernels: set[str]) -> None:
        self._owner, self._kernels = owner, kernels

    def serialize(self) -> Any:
        return _HostMemory(json.dumps([self._owner, sorted(self._kernels)]).encode())


class _Config:
    def __init__(self, voice: _Voice) -> None:
        self._voice, self._flags, self._profiles, self._pools = voice, {"TF32"}, [], {}
        self._cache: Any = None
        self._preview: dict[str, bool] = {}

    def set_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        assert isinstance(flag, self._trt.BuilderFlag)
        self._flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert isinstance(pool, self._trt.MemoryPoolType)
        self._pools[pool.name] = int(pool_size)

    def get_preview_feature(self, feature: Any) -> bool:
        return self._preview.get(feature.name, self._trt._major >= 10)

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self._preview[feature.name] = enable

    def add_optimization_profile(self, profile: Any) -> int:
        if not profile._shapes:
            self._voice.error("INVALID_ARGUMENT", "an optimization profile without shapes")
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        if not serialized_timing_cache:
            return self._trt.ITimingCache(_owner(self._trt), set())
        try:
            owner, kernels = json.loads(serialized_timing_cache)
        except ValueError:
            self._voice.error("INVALID_ARGUMENT", "the timing cache is corrupted")
            return None
        return self._trt.ITimingCache(owner, set(kernels))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache._owner != _owner(self._trt) and not ignore_mismatch:
            self._voice.say("WARNING", "The timing cache will not be used: its device or version differ")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


def _owner(trt: Any) -> str:
    return f"{trt.__version__} {trt._world.cuda.personality.name}"


class _Builder:
    def __init__(self, logger: Any) -> None:
        self._voice = _start(self._trt, logger)

    def create_network(self, flags: int = 0) -> Any:
        assert type(flags) is int
        return self._trt.INetworkDefinition(self._voice, flags)

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig(self._voice)

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        world, trt = self._trt._world, self._trt
        fault = _build_fault(network, config)
        if fault:
            self._voice.error("INVALID_CONFIG", fault)
            return None
        kernels = {
            hashlib.sha256(f"{layer.name}{layer.type.name}".encode()).hexdigest()[:12]
            for layer in network._layers
        }
        cached = config._cache._kernels if config._cache is not None else set()
        monitor = config._values.get("progress_monitor")
        if monitor is not None:
            _derived(trt, monitor, "IProgressMonitor", "phase_start step_complete phase_finish")
        if not _work(monitor, world, self._voice):
            self._voice.say("INFO", "Build is cancelled.")
            return None
        if world.build_error is not None:
            self._voice.error(*world.build_error)
            return None
        profile = config._profiles[0]._shapes if config._profiles else {}
        world.builds.append(
            Build(
                network._typed,
                set(config._flags),
                dict(profile),
                len(kernels - cached),
                _loose(network, config),
                {**config._values, **config._pools, **config._preview},
                {
                    layer.name: (layer._compute, tuple(kind for _, kind in sorted(layer._kinds.items())))
                    for layer in network._layers
                    if layer._compute or layer._kinds
                },
            )
        )
        if config._cache is not None:
            config._cache._kernels |= kernels
        personality = world.cuda.personality
        head = {
            "version": trt.__version__,
            "gpu": personality.name,
            "capability": list(personality.compute_capability),
            "profile": profile,
            "shared": trt._major >= 10 or config._preview.get("PROFILE_SHARING_0806", False),
        }
        text = json.dumps(head).encode()
        body = len(text).to_bytes(4, "little") + text + network._model
        self._voice.say("INFO", "Engine generation completed in 0.1 seconds.")
        return _HostMemory(_MAGIC + hashlib.sha256(body).digest() + body)


def _build_fault(network: Any, config: Any) -> str:
    """Why TensorRT would not even begin, or ""."""
    if network._typed and config._flags & {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}:
        return "Precision flags are not allowed in a strongly typed network"
    shapes = config._profiles[0]._shapes if config._profiles else {}
    for tensor in network._inputs:
        if -1 in tensor.shape and tensor.name not in shapes:
            return f"{tensor.name}: dynamic input is missing dimensions in profile 0"
        for shape in shapes.get(tensor.name, ()):
            if len(shape) != len(tensor.shape) or any(
                a not in (-1, b) for a, b in zip(tensor.shape, shape, strict=True)
            ):
                return f"{tensor.name}: profile {shape} does not suit {tensor.shape}"
    if unknown := set(shapes) - {tensor.name for tensor in network._inputs}:
        return f"profile for {unknown}, which are no inputs"
    half = any("HALF" in layer._kinds.values() for layer in network._layers)
    if half and not {"FP16", "OBEY_PRECISION_CONSTRAINTS"} <= config._flags:
        return "layers in half precision without the flags for it"
    return ""


def _loose(network: Any, config: Any) -> list[str]:
    """Layers that TensorRT could compute in another precision than the graph has."""
    if network._typed or "FP16" not in config._flags:
        return []
    loose = []
    for layer in network._layers:
        kinds = [t._kind for t in (*layer._sources, *layer._results) if t is not None]
        free = layer.type.name in ("CAST", "IDENTITY", "SHAPE", "CONSTANT", "QUANTIZE", "DEQUANTIZE")
        if not free and any(kind in _FLOATS for kind in kinds) and not layer._compute:
            loose.append(layer.name)
    return loose


def _work(monitor: Any, world: World, voice: _Voice) -> bool:
    """A build's phases; False when it was told to stop."""
    if monitor is None:
        for step in range(3):
            voice.say("INFO", f"[GraphReduction] step {step}")
            if world.during_build is not None:
                world.during_build()
        return True
    going = True
    monitor.phase_start("Building Engine", None, 2)
    for outer in range(2):
        monitor.phase_start(f"Tactics {outer}", "Building Engine", 4)
        for step in range(4):
            if world.during_build is not None:
                world.during_build()
            if not monitor.step_complete(f"Tactics {outer}", step):
                going = False
                break
        monitor.phase_finish(f"Tactics {outer}")
        if not going or not monitor.step_complete("Building Engine", outer):
            going = False
            break
    monitor.phase_finish("Building Engine")
    return going


# -- running ----------------------------------------------------------------------------------------


class _Runtime:
    def __init__(self, logger: Any) -> None:
        self._voice = _start(self._trt, logger)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        world, data = self._trt._world, bytes(serialized_engine)
        world.loads += 1
        if world.load_error is not None and world.load_error[2] > 0:
            code, words, times = world.load_error
            world.load_error = (code, words, times - 1)
            self._voice.error(code, words)
            return None
        body = data[len(_MAGIC) + 32 :]
        if (
            not data.startswith(_MAGIC)
            or hashlib.sha256(body).digest() != data[len(_MAGIC) : len(_MAGIC) + 32]
        ):
            self._voice.error("INTERNAL_ERROR", "Serialization assertion magicTagRead == kMAGIC_TAG failed")
            return None
        size = int.from_bytes(body[:4], "little")
        head, model = json.loads(body[4 : 4 + size]), body[4 + size :]
        if head["version"] != self._trt.__version__:
            self._voice.error(
                "INTERNAL_ERROR",
                f"The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{self._trt.__version__} got {head['version']}, please rebuild.",
            )
            return None
        if head["capability"] != list(world.cuda.personality.compute_capability):
            self._voice.error("INVALID_CONFIG", "The engine plan file is generated on an incompatible device")
            return None
        return self._trt.ICudaEngine(self._voice, head, model)


@lru_cache(maxsize=32)
def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=256)
def _output_shapes(
    model: bytes, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs, by running the network on zeros."""
    session = _session(model)
    kinds = {node.name: _numpy(node.type) for node in session.get_inputs()}
    results = session.run(None, {name: np.zeros(shape, kinds[name]) for name, shape in shapes})
    return {node.name: r.shape for node, r in zip(session.get_outputs(), results, strict=True)}


def _numpy(text: str) -> np.dtype:
    kind = text[len("tensor(") : -1]
    return np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))


class _Engine:
    def __init__(self, voice: _Voice, head: dict[str, Any], model: bytes) -> None:
        self._voice, self._head, self._model = voice, head, model
        session = _session(model)
        self._inputs = {node.name: node for node in session.get_inputs()}
        self._outputs = {node.name: node for node in session.get_outputs()}
        self._all = {**self._inputs, **self._outputs}
        self._owners: set[int] = set()

    num_io_tensors = property(lambda self: len(self._all))
    device_memory_size = property(lambda self: 4096)
    device_memory_size_v2 = property(lambda self: 4096)
    num_optimization_profiles = property(lambda self: 1)

    def get_tensor_name(self, index: int) -> str:
        return list(self._all)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if name in self._inputs else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._trt.DataType, _NAMES[_numpy(self._all[name].type).name])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else -1 for axis in self._all[name].shape)

    def create_execution_context(self, strategy: Any = None) -> Any:
        return self._context(strategy is None or strategy.name != "USER_MANAGED")

    def create_execution_context_without_device_memory(self) -> Any:
        return self._context(False)

    def _context(self, with_memory: bool) -> Any:
        world = self._trt._world
        if world.context_error:
            self._voice.error("FAILED_ALLOCATION", world.context_error)
            return None
        world.contexts += 1
        return self._trt.IExecutionContext(self, with_memory)


class _Context:
    def __init__(self, engine: Any, with_memory: bool) -> None:
        self._engine, self._voice = engine, engine._voice
        self._scratch: tuple[int, int] | None = (0, 0) if with_memory else None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._version = 0
        self._warm = -1
        self._busy = threading.Lock()
        self._profile = (
            0 if engine._head["shared"] or not engine._head["profile"] or not engine._owners else -1
        )
        engine._owners.add(id(self))

    active_optimization_profile = property(lambda self: self._profile)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not self._engine._head["shared"]:
            self._voice.error("INVALID_STATE", f"Profile {profile_index} has been chosen by another context")
            return False
        self._profile = profile_index
        return True

    def _memory(self, value: int) -> None:
        self._change()
        self._scratch = (
            value,
            self._engine.device_memory_size if hasattr(self._engine, "device_memory_size") else 4096,
        )

    device_memory = property(lambda self: self._scratch, _memory)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= 4096, "less memory than the engine needs"
        self._memory(memory)

    def _change(self) -> None:
        self._version += 1

    def set_input_shape(self, name: str, shape: Any) -> bool:
        engine, shape = self._engine, tuple(int(size) for size in shape)
        if name not in engine._inputs:
            self._voice.error("INVALID_ARGUMENT", f"given invalid tensor name: {name}")
            return False
        low, _, high = engine._head["profile"].get(name) or [engine.get_tensor_shape(name)] * 3
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self._voice.error(
                "INVALID_ARGUMENT", f"{name}: dimensions {shape} do not satisfy any optimization profiles"
            )
            return False
        if self._shapes.get(name) != shape:
            self._change()
            self._shapes[name] = shape
        return True

    def _known(self) -> dict[str, tuple[int, ...]]:
        fixed = {n: self._engine.get_tensor_shape(n) for n in self._engine._inputs}
        return {n: s for n, s in {**fixed, **self._shapes}.items() if -1 not in s}

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._known()]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        known = self._known()
        if name in self._engine._inputs:
            return known.get(name, self._engine.get_tensor_shape(name))
        if self._trt._world.unknown_shapes:
            return tuple(-1 for _ in self._engine.get_tensor_shape(name))
        assert not self.infer_shapes(), "shape of an output before those of the inputs"
        return _output_shapes(self._engine._model, tuple(sorted(known.items())))[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert type(memory) is int
        if name not in self._engine._all or memory % 256:
            self._voice.error("INVALID_ARGUMENT", f"{name}: no tensor, or {memory:#x} is not aligned to 256")
            return False
        self._change()
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        world = self._trt._world
        if not self._busy.acquire(blocking=False):
            world.problems.append("two threads in one context")
            return False
        try:
            return self._enqueue(world, stream_handle)
        finally:
            self._busy.release()

    def _enqueue(self, world: World, stream: int) -> bool:
        engine, capturing = self._engine, world.cuda.capturing_here
        if world.enqueue_errors:
            self._voice.error(*world.enqueue_errors.pop(0))
            return False
        faults = [
            (self._profile < 0, "no optimization profile"),
            (self._scratch is None, "no device memory for activations"),
            (bool(self.infer_shapes()), f"input shapes of {self.infer_shapes()} are not set"),
            (set(engine._all) != set(self._addresses), "addresses of some tensors are not set"),
            (capturing and world.uncapturable, "operation not permitted when stream is capturing"),
            (capturing and self._warm != self._shape_key(), "capture before a first run with these shapes"),
        ]
        for wrong, words in faults:
            if wrong:
                self._voice.error("INVALID_STATE", words)
                return False
        shapes = self._known()
        shapes.update({name: self.get_tensor_shape(name) for name in engine._outputs})
        kinds = {name: _numpy(node.type) for name, node in engine._all.items()}
        places = {
            name: (self._addresses[name], int(np.prod(shapes[name])) * kinds[name].itemsize)
            for name in engine._all
        }
        version = self._version
        outputs = list(engine._outputs)

        def run() -> None:
            if capturing and self._version != version:
                world.problems.append("a context was changed after its launch had been captured")
            feeds = {
                n: world.cuda.view(*places[n]).view(kinds[n]).reshape(shapes[n]).copy()
                for n in engine._inputs
            }
            results = _session(engine._model).run(outputs, feeds)
            for name, result in zip(outputs, results, strict=True):
                world.cuda.view(*places[name])[:] = np.ascontiguousarray(result).reshape(-1).view(np.uint8)

        reads = [places[name] for name in engine._inputs]
        writes = [places[name] for name in outputs]
        if self._scratch and self._scratch[0]:
            writes.append(self._scratch)
        status = world.cuda.enqueue(stream, "TensorRT", run, reads=reads, writes=writes)
        if status:
            self._voice.error("FAILED_EXECUTION", f"CUDA error {status}")
            return False
        self._warm = self._shape_key()
        if capturing:
            world.captured += 1
        else:
            world.launches += 1
        return True

    def _shape_key(self) -> int:
        return hash(tuple(sorted(self._known().items())))


_IMPLEMENTATIONS: dict[str, type] = {
    "Builder": _Builder,
    "IBuilderConfig": _Config,
    "ICudaEngine": _Engine,
    "IExecutionContext": _Context,
    "ILayer": _Layer,
    "ILogger": _ILogger,
    "INetworkDefinition": _Network,
    "IOptimizationProfile": _Profile,
    "IProgressMonitor": _IProgressMonitor,
    "ITensor": _Tensor,
    "ITimingCache": _TimingCache,
    "OnnxParser": _OnnxParser,
    "ParserError": _ParserError,
    "Runtime": _Runtime,
}


def implemented() -> dict[str, set[str]]:
    """Class -> public members that the fake implements, whatever the version."""
    return {
        name: {member for member in vars(kind) if not member.startswith("_")}
        for name, kind in copy.copy(_IMPLEMENTATIONS).items()
    }
