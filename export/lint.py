"""A linter for exported ONNX graphs: what a target cannot run, runs wrongly without a word, or runs needlessly slowly.

ONNX's own checker says whether a graph is valid; this one says whether it will work where it is sent. Sources: the operator
tables and importers of onnx-tensorrt at 8.5 GA, 8.6 GA and 10.1, the release notes of ONNX Runtime, and measurements with
the networks of this project (docs/exporting.md).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253

from lp_edge.engines.external import is_beside
from lp_edge.errors import ConfigError, ExportError
from lp_edge.export.opset import DEFAULT_DOMAINS, opset_of

__all__ = ["RULES", "TARGETS", "Finding", "Severity", "Target", "check", "lint"]

Severity = Literal["error", "warning"]

_T = onnx.TensorProto
_HALF: Final = (_T.FLOAT16, _T.BFLOAT16)
_QUANTISED: Final = (_T.INT8, _T.FLOAT8E4M3FN)
_GRID_SAMPLE_OPSETS: Final = range(16, 20)
_AXIS: Final = re.compile(r"[^\W\d]\w*")  # a name in an expression of axes


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators of TensorRT 8.5 that need no plugin, keep sizes independent of values, draw no random numbers, do no control
# flow and are no leftovers of training. What is missing here has either such a flaw or no importer.
_TENSORRT_8_5: Final = _words(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
    Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample
    HardSigmoid Identity LRN LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul Max MaxPool Mean Min Mul Neg
    Not Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign
    Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Where Xor
    """
)
_TENSORRT_8_6: Final = _TENSORRT_8_5 | _words(
    "HardSwish InstanceNormalization IsInf LayerNormalization Mod OneHot"
)
_TENSORRT_10: Final = _TENSORRT_8_6 | _words("CastLike Gelu GroupNormalization Hardmax Mish")

_CONTROL_FLOW: Final = _words("If Loop Scan SequenceMap")
_REDUCTIONS: Final = frozenset(
    f"Reduce{kind}" for kind in _words("L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare")
)
# Sums and exponentials leave the range of half precision (65504), sampling positions its resolution.
_ISLANDS: Final = (_REDUCTIONS - {"ReduceMax", "ReduceMin"}) | _words(
    """
    CumSum Exp GlobalAveragePool GridSample GroupNormalization InstanceNormalization LayerNormalization Log LogSoftmax
    LpNormalization Pow Softmax Sqrt
    """
)
# Operator -> index of the input that TensorRT wants as an initialiser -> what the operator calls it.
_CONSTANT_OPERANDS: Final[Mapping[str, Mapping[int, str]]] = {
    "CumSum": {1: "axis"},
    "InstanceNormalization": {1: "scale", 2: "B"},
    "Pad": {2: "constant_value"},
    "ReduceSum": {1: "axes"},
    "Slice": {3: "axes", 4: "steps"},
    "Squeeze": {1: "axes"},
    "TopK": {1: "K"},
    "Unsqueeze": {1: "axes"},
}
_DTYPES: Final = frozenset({_T.FLOAT, _T.FLOAT16, _T.INT32, _T.INT64, _T.BOOL, _T.UINT8})


@dataclass(frozen=True)
class Target:
    """What a graph may contain to run at a place.

    Attributes:
        name: as given to :func:`lint`.
        about: the place in words.
        opsets: versions of ONNX's operator set.
        ir_version: highest version of the file format.
        operators: operators that run there without a plugin.
        reduce_axes_as_input: whether reductions other than ReduceSum may take their axes as an input (opset 18 form); an
            importer that does not know it reduces over all axes and says nothing.
        wide_integers: whether INT64 is kept; otherwise values are clamped to 32 bits.
        quantised: types of 8 bits, between Q and DQ nodes.
        stored: whether weights may be stored in them; otherwise they come in float32, through a Q node.
        remarks: operator -> a warning that goes with it.
    """

    name: str
    about: str
    opsets: range
    ir_version: int
    operators: frozenset[str]
    reduce_axes_as_input: bool = False
    wide_integers: bool = False
    quantised: frozenset[int] = frozenset({_T.INT8})
    stored: bool = False
    remarks: Mapping[str, str] = field(default_factory=dict, hash=False)


TARGETS: Final[Mapping[str, Target]] = {
    target.name: target
    for target in (
        Target(
            "main",
            "ONNX Runtime 1.18 and newer, TensorRT 8.6 to 11",
            opsets=range(16, 18),
            ir_version=10,
            operators=_TENSORRT_8_6,
            remarks={
                "InstanceNormalization": "TensorRT 8.6 takes its plugin unless the parser flag NATIVE_INSTANCENORM is set"
            },
        ),
        Target(
            "tensorrt8",
            "TensorRT 8.5 (JetPack 5), also ONNX Runtime 1.18 and newer",
            opsets=range(13, 18),
            ir_version=8,
            operators=_TENSORRT_8_5,
        ),
        Target(
            "tensorrt11",
            "TensorRT 10 and 11 only",
            opsets=range(16, 21),
            ir_version=10,
            operators=_TENSORRT_10,
            reduce_axes_as_input=True,
            wide_integers=True,
            quantised=frozenset({_T.INT8, _T.FLOAT8E4M3FN}),
            stored=True,
        ),
    )
}
"""The places that graphs are exported for. A graph without findings for ``main`` may still fail on an older TensorRT."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a graph.

    Attributes:
        rule: a name of :data:`RULES`.
        severity: an ``error`` fails the export, a ``warning`` is reported.
        node: name of the node, tensor or graph it is about.
        got: what is there.
        expected: what the target wants.
    """

    rule: str
    severity: Severity
    node: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"{self.severity} [{self.rule}] {self.node}: {self.got}; expected {self.expected}"


class _View:
    """A graph with what the rules ask for: constants, types, ranks, producers and consumers by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.opset = opset_of(model)
        graph = model.graph
        self.nodes = list(graph.node)
        self.initialisers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = {value.name: value for value in graph.input if value.name not in self.initialisers}
        self.outputs = {value.name: value for value in graph.output}
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.consumers[name].append(node)
        self.constants = set(self.initialisers)
        self.constants.update(
            name for node in self.nodes if node.op_type == "Constant" for name in node.output
        )
        self.types = _types(model)

    def dtype(self, name: str) -> int:
        """Element type; 0 where it is not known."""
        return self.types[name].elem_type if name in self.types else 0

    def rank(self, name: str) -> int | None:
        """Number of axes; ``None`` where it is not known."""
        known = self.types.get(name)
        return len(known.shape.dim) if known is not None and known.HasField("shape") else None

    def tensors(self) -> Iterator[str]:
        """Names of all tensors, in the order of the graph."""
        yield from self.inputs
        yield from self.initialisers
        yield from self.producer

    def only(self, *operators: str) -> Iterator[onnx.NodeProto]:
        """The nodes of these operators."""
        return (node for node in self.nodes if node.op_type in operators)


def _types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Types of all tensors by ONNX's shape inference, without carrying the weights through it."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = light.graph
    graph.name = "light"
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    weights = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in weights)
    for tensor in model.graph.initializer:
        # Small ones are sizes and axes, which the inference needs to read.
        if int(np.prod(tensor.dims)) <= 64:
            graph.initializer.append(tensor)
        else:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    types = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        types[tensor.name] = value.type.tensor_type
    return types


def _type_name(dtype: int) -> str:
    return _T.DataType.Name(dtype).lower() if dtype else "of unknown type"


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or '→ ' + ', '.join(node.output)}"


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    for attribute in node.attribute:
        if attribute.name == name:
            value = onnx.helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default


_Problem = tuple[str, str, str]  # where, got, expected
_Rule = Callable[[_View, Target], Iterator[_Problem]]
_CHECKS: dict[str, tuple[Severity, _Rule]] = {}
RULES: dict[str, str] = {}
"""Every rule by name, with one sentence on what it demands."""


def _rule(name: str, about: str, severity: Severity = "error") -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _CHECKS[name] = (severity, function)
        RULES[name] = about
        return function

    return register


def lint(model: onnx.ModelProto, target: str) -> list[Finding]:
    """Look for what the target cannot run or runs wrongly.

    Args:
        model: a valid ONNX model; the values of weights that it does not hold are not looked at.
        target: a name of :data:`TARGETS`.

    Returns:
        Findings, errors first.

    Raises:
        ConfigError: the target is unknown.
        ExportError: the model names no opset.
    """
    if target not in TARGETS:
        raise ConfigError(
            f"unknown target {target!r}", f"expected one of {', '.join(TARGETS)}", "choose one of these"
        )
    view = _View(model)
    findings = [
        Finding(name, severity, *problem)
        for name, (severity, function) in _CHECKS.items()
        for problem in function(view, TARGETS[target])
    ]
    return sorted(findings, key=lambda finding: finding.severity)


def check(model: onnx.ModelProto, target: str, name: str) -> list[Finding]:
    """As :func:`lint`, but refuse a graph with errors; returns the warnings.

    Args:
        name: of the graph, for the message.

    Raises:
        ExportError: at least one finding is an error; the message lists them.
        ConfigError: the target is unknown.
    """
    findings = lint(model, target)
    errors = [str(finding) for finding in findings if finding.severity == "error"]
    if errors:
        raise ExportError(
            f"{name} does not suit {TARGETS[target].about}: " + "; ".join(errors),
            "expected a graph without errors",
            "report this",
        )
    return findings


# What the file as a whole must be


@_rule("opset", "the operator set is one that the target reads")
def _opset(view: _View, target: Target) -> Iterator[_Problem]:
    if view.opset not in target.opsets:
        yield "graph", f"opset {view.opset}", f"{target.opsets[0]} to {target.opsets[-1]}"


@_rule("ir-version", "the file format is one that the target reads")
def _ir_version(view: _View, target: Target) -> Iterator[_Problem]:
    if view.model.ir_version > target.ir_version:
        yield "graph", f"IR version {view.model.ir_version}", f"at most {target.ir_version}"


@_rule("domain", "only operators of ONNX itself, no custom domains or functions")
def _domain(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.nodes:
        if node.domain not in DEFAULT_DOMAINS:
            yield _label(node), f"domain {node.domain}", "ONNX's own operators"
    for function in view.model.functions:
        yield function.name, "a model-local function", "its operators inlined"


@_rule(
    "external-data", "weights outside the model lie in one file beside it, which a bundle hashes and copies"
)
def _external_data(view: _View, target: Target) -> Iterator[_Problem]:
    tensors = [*view.initialisers.values(), *(a.t for node in view.nodes for a in node.attribute)]
    files = sorted({e.value for tensor in tensors for e in tensor.external_data if e.key == "location"})
    if len(files) > 1:
        yield "graph", f"weights in {len(files)} files", "one file"
    for file in files:
        if not is_beside(file):
            yield "graph", f"weights in {file!r}", "a file name without a folder"


@_rule("control-flow", "no If, Loop or Scan")
def _control_flow(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only(*_CONTROL_FLOW):
        yield _label(node), node.op_type, "straight-line operators"


@_rule(
    "operator", "only operators that the target runs without a plugin and with sizes independent of values"
)
def _operator(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.nodes:
        known = node.op_type in target.operators or node.op_type in _CONTROL_FLOW | {"Dropout"}
        if node.domain in DEFAULT_DOMAINS and not known:
            yield _label(node), node.op_type, f"an operator of {target.about}"


@_rule("operator-remark", "operators that need care at the target", "warning")
def _operator_remark(view: _View, target: Target) -> Iterator[_Problem]:
    for name in {node.op_type for node in view.nodes} & target.remarks.keys():
        yield name, target.remarks[name], "that the engine is built so"


# Boundaries


@_rule("boundary-dtype", "inputs and outputs are float32 or uint8 in every flavour and precision")
def _boundary_dtype(view: _View, target: Target) -> Iterator[_Problem]:
    for name, value in (view.inputs | view.outputs).items():
        dtype = value.type.tensor_type.elem_type
        if dtype not in (_T.FLOAT, _T.UINT8):
            yield name, _type_name(dtype), "float or uint8"


@_rule(
    "dynamic-batch",
    "the first axis of every input and output is dynamic and named, outputs by names of inputs or expressions of them",
)
def _dynamic_batch(view: _View, target: Target) -> Iterator[_Problem]:
    named = {d.dim_param for v in view.inputs.values() for d in v.type.tensor_type.shape.dim}
    for name, value in (view.inputs | view.outputs).items():
        dims = value.type.tensor_type.shape.dim
        if not dims or not dims[0].dim_param:
            size = dims[0].dim_value if dims else "no axis"
            yield name, f"{size} in front", "a dynamic axis with a name"
        for dim in dims:
            used = set(_AXIS.findall(dim.dim_param))
            known = dim.dim_param in named or (used and used <= named)
            if name in view.outputs and dim.dim_param and not known:
                yield name, f"axis {dim.dim_param!r}", "the name of an input's axis or an expression of such"
            if not dim.dim_param and dim.dim_value < 1:
                yield name, "an axis of unknown size", "a size or a name"


@_rule(
    "uint8", "uint8 is cast from or to a float right at the graph's inputs and outputs and is nowhere else"
)
def _uint8(view: _View, target: Target) -> Iterator[_Problem]:
    for name in view.tensors():
        if view.dtype(name) != _T.UINT8:
            continue
        if name not in view.inputs and name not in view.outputs:
            yield name, "a uint8 tensor inside the graph", "uint8 at inputs and outputs only"
        for node in view.consumers[name]:
            cast = node.op_type == "Cast" and _attribute(node, "to", 0) in (_T.FLOAT, _T.FLOAT16)
            if not cast and node.op_type != "Shape":  # which reads no value
                yield _label(node), f"uint8 goes into {node.op_type}", "a Cast to float first"
        made_by = view.producer.get(name)
        if made_by is not None and (
            made_by.op_type != "Cast" or view.dtype(made_by.input[0]) not in (_T.FLOAT, _T.FLOAT16)
        ):
            yield _label(made_by), "makes a uint8 output", "a Cast from float"


@_rule("initialiser-as-input", "weights are no inputs, so that they can be folded")
def _initialiser_as_input(view: _View, target: Target) -> Iterator[_Problem]:
    for value in view.model.graph.input:
        if value.name in view.initialisers:
            yield value.name, "a weight that is also an input", "weights as initialisers only"


# Types and shapes


@_rule(
    "dtype",
    "only float32, float16, int32, int64, bool and uint8; the target's types of 8 bits between Q and DQ",
)
def _dtype(view: _View, target: Target) -> Iterator[_Problem]:
    for name in view.tensors():
        dtype = view.dtype(name)
        node = view.producer.get(name)
        quantised = dtype in target.quantised and (node is None or node.op_type == "QuantizeLinear")
        if dtype and dtype not in _DTYPES and not quantised:
            yield name, _type_name(dtype), "float, float16, int32, int64, bool or uint8"


@_rule("int64-range", "no 64-bit constants beyond 32 bits, except as ends of slices", "warning")
def _int64_range(view: _View, target: Target) -> Iterator[_Problem]:
    if target.wide_integers:
        return
    limit = np.iinfo(np.int32)
    for tensor in view.initialisers.values():
        slices = all(
            n.op_type == "Slice" and tensor.name in n.input[1:3] for n in view.consumers[tensor.name]
        )
        if tensor.data_type == _T.INT64 and not slices:
            values = _values(tensor)
            if values.size and (values.min() < limit.min or values.max() > limit.max):
                yield tensor.name, "values beyond 32 bits, which are clamped", "32 bits"


@_rule("not-finite", "no infinite or undefined weights")
def _not_finite(view: _View, target: Target) -> Iterator[_Problem]:
    for tensor in view.initialisers.values():
        if tensor.data_type in (_T.FLOAT, _T.FLOAT16) and not np.isfinite(_values(tensor)).all():
            yield tensor.name, "infinite or undefined values", "numbers"


def _values(tensor: onnx.TensorProto) -> npt.NDArray[np.generic]:
    external = tensor.data_location == _T.EXTERNAL
    return np.empty(0, np.float32) if external else onnx.numpy_helper.to_array(tensor)


@_rule("rank", "at most 8 axes; Resize, unless by nearest neighbour, at most 4")
def _rank(view: _View, target: Target) -> Iterator[_Problem]:
    for name in view.producer:
        if (view.rank(name) or 0) > 8:
            yield name, f"{view.rank(name)} axes", "at most 8"
    for node in view.only("Resize"):
        rank = view.rank(node.input[0])
        # TensorRT's nearest takes any number of axes, its cubic two; trilinear differs between runtimes.
        if _attribute(node, "mode", "nearest") != "nearest" and (rank is None or rank > 4):
            yield _label(node), "unknown rank" if rank is None else f"{rank} axes", "at most 4"


@_rule("reduce-axes", "reductions have their axes as an attribute where the target would overlook an input")
def _reduce_axes(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only(*_REDUCTIONS - {"ReduceSum"}):
        if not target.reduce_axes_as_input and len(node.input) > 1 and node.input[1]:
            yield _label(node), "axes as an input, taken for all axes", "an attribute (opset 17 and older)"


@_rule("constant-operand", "operands that describe a layout (axes, steps, pads) are initialisers")
def _constant_operand(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only(*_CONSTANT_OPERANDS):
        for index, what in _CONSTANT_OPERANDS[node.op_type].items():
            if index < len(node.input) and node.input[index] and node.input[index] not in view.constants:
                yield _label(node), f"a computed {what}", "an initialiser"


# GridSample


@_rule("grid-sample-rank", "GridSample on pictures only: 5-D needs TensorRT 11.2")
def _grid_sample_rank(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only("GridSample"):
        ranks = tuple(view.rank(name) for name in node.input)
        if ranks != (4, 4):
            yield _label(node), f"ranks {ranks}", "4 and 4"


@_rule("grid-sample-opset", "GridSample in opsets 16 to 19, whose mode names every parser knows")
def _grid_sample_opset(view: _View, target: Target) -> Iterator[_Problem]:
    if view.opset not in _GRID_SAMPLE_OPSETS:
        for node in view.only("GridSample"):
            yield _label(node), f"opset {view.opset}", "16 to 19"


@_rule("grid-sample-mode", "modes bilinear, nearest or bicubic: parsers take an unknown one for nearest")
def _grid_sample_mode(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only("GridSample"):
        mode = _attribute(node, "mode", "bilinear" if view.opset < 20 else "linear")
        if mode not in ("bilinear", "nearest", "bicubic"):
            yield _label(node), f"mode {mode!r}", "bilinear, nearest or bicubic"


@_rule(
    "grid-sample-dtype",
    "GridSample with picture and grid in float32, the grid not rounded to half on its way",
)
def _grid_sample_dtype(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only("GridSample"):
        dtypes = tuple(view.dtype(name) for name in node.input)
        if dtypes != (_T.FLOAT, _T.FLOAT):
            yield _label(node), " and ".join(map(_type_name, dtypes)), "float and float"
        cast = view.producer.get(node.input[1])
        if cast is not None and cast.op_type == "Cast" and view.dtype(cast.input[0]) in _HALF:
            yield _label(node), "a grid computed in half precision", "positions in float32 throughout"


# Quantisation


@_rule(
    "quantised",
    "8 bits come of a QuantizeLinear or, where the target takes that, of weights, and go into DequantizeLinear",
)
def _quantised(view: _View, target: Target) -> Iterator[_Problem]:
    pairs = ("QuantizeLinear", "DequantizeLinear")
    for name in view.tensors():
        if view.dtype(name) not in _QUANTISED:
            continue
        for node in view.consumers[name]:
            if node.op_type not in pairs or (node.op_type == pairs[0] and name not in node.input[2:]):
                yield (
                    _label(node),
                    f"{_type_name(view.dtype(name))} goes into {node.op_type}",
                    "a DequantizeLinear",
                )
            elif name in view.constants and name == node.input[0] and not target.stored:
                yield name, "weights stored in 8 bits", "float32 through QuantizeLinear, for TensorRT 8"


@_rule(
    "quantisation-scale",
    "scales are positive numbers of the graph, zero points are zero, and only weights have one per channel",
)
def _quantisation_scale(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only("QuantizeLinear", "DequantizeLinear"):
        scale = view.initialisers.get(node.input[1])
        if scale is None or scale.data_location == _T.EXTERNAL:
            yield _label(node), "a scale that is no number of the graph", "an initialiser in the graph"
            continue
        values = onnx.numpy_helper.to_array(scale).astype(np.float64)
        if not (np.isfinite(values).all() and (values > 0).all()):
            yield _label(node), "a scale that is not positive", "positive numbers"
        zero = view.initialisers.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or onnx.numpy_helper.to_array(zero).astype(np.float32).any():
            yield _label(node), "a zero point that is missing or not zero", "zeros, which also name the type"
        weight = node.input[0] in view.constants
        made_by = view.producer.get(node.input[0])
        if node.op_type == "DequantizeLinear" and made_by is not None:
            weight = weight or bool(view.constants.intersection(made_by.input[:1]))
        if values.ndim and (not weight or _attribute(node, "axis", 1) != 0):
            yield _label(node), "scales per channel", "one per tensor, or for weights along axis 0"


@_rule(
    "quantisation-pair",
    "every QuantizeLinear feeds DequantizeLinear alone, with the same scale, and that feeds convolutions",
)
def _quantisation_pair(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only("QuantizeLinear"):
        for after in view.consumers[node.output[0]]:
            if after.op_type == "DequantizeLinear" and after.input[1] != node.input[1]:
                yield (
                    _label(after),
                    f"the scale {after.input[1]}",
                    f"that of its QuantizeLinear, {node.input[1]}",
                )
    for node in view.only("DequantizeLinear"):
        for after in view.consumers[node.output[0]]:
            if after.op_type != "Conv":
                yield (
                    _label(after),
                    "reads a DequantizeLinear",
                    "convolutions only: what else is there runs in floating point",
                )


# Precision and leftovers


@_rule("fp32-island", "sums, exponentials, normalisations and sampling stay out of half precision")
def _fp32_island(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only(*_ISLANDS):
        if any(view.dtype(name) in _HALF for name in node.input):
            yield _label(node), "half precision", "float32, by a Cast before and after"


@_rule("training", "no dropout, no batch normalisation in training mode")
def _training(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only("Dropout"):
        yield _label(node), "Dropout", "a graph exported in evaluation mode"
    for node in view.only("BatchNormalization"):
        if _attribute(node, "training_mode", 0) or len(node.output) > 1:
            yield _label(node), "training mode", "a graph exported in evaluation mode"


@_rule("batchnorm", "batch normalisation after a convolution is folded into its weights")
def _batchnorm(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.only("BatchNormalization"):
        made_by = view.producer.get(node.input[0])
        if made_by is not None and made_by.op_type in ("Conv", "ConvTranspose", "Gemm"):
            yield _label(node), f"after {_label(made_by)}", "its scale and shift in the weights"


@_rule(
    "unfolded",
    "nothing is computed from constants alone (spectral norm, scaled weights), but quantised weights",
)
def _unfolded(view: _View, target: Target) -> Iterator[_Problem]:
    for node in view.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.input and view.constants.issuperset(filter(None, node.input)):
            yield _label(node), "computed from constants alone", "its result as an initialiser"


@_rule("unused", "every initialiser and node feeds an output")
def _unused(view: _View, target: Target) -> Iterator[_Problem]:
    for name in view.initialisers:
        if not view.consumers[name] and name not in view.outputs:
            yield name, "used by nothing", "no such initialiser"
    for node in view.nodes:
        if not any(view.consumers[name] or name in view.outputs for name in node.output):
            yield _label(node), "used by nothing", "no such node"
