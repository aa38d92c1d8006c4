"""Q/DQ nodes in a finished graph: which convolutions get them, and how they are written for each version of TensorRT.

A convolution is quantised by a pair of QuantizeLinear and DequantizeLinear before its input and one before its weight; its bias
and its result stay as they are. That is the pattern which TensorRT fuses into a convolution of 8 bits (developer guide, "Q/DQ
Placement Recommendations"): Q stands after the activation, so that the kernel before can write 8 bits; what is added to a
residual stays in floating point, since it goes into a normalisation, which wants it so.

=========================  ==================================  =============================================
                           opset up to 18                      opset 19
=========================  ==================================  =============================================
types                      int8                                int8, fp8 (E4M3FN)
scales, values around      float32                             float32, or float16 where the graph has that
weights in the file        float32, through Q and DQ           8 bits, through DQ
reads it                   TensorRT 8.5 (whose weights must    TensorRT 10 and newer
                           come in float32) and newer
=========================  ==================================  =============================================
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253
from onnx import helper, numpy_helper  # noqa: TID253

from lp_edge.engines import names
from lp_edge.errors import ConfigError, ExportError
from lp_edge.export.opset import DEFAULT_DOMAINS, opset_of
from lp_edge.export.quantize.scales import FP8, Kind, encode, weight_scales

__all__ = ["OPSET", "SAMPLES", "convolutions", "inputs_of", "observed", "quantised"]

OPSET: Final = 19
"""The first opset with fp8, and with scales in half precision; GridSample keeps its names up to it."""

SAMPLES: Final = 16384
"""About how many numbers of a tensor one frame gives to its calibration."""

_T = onnx.TensorProto
_ISLANDS: Final = (names.DEFORMATION, names.OCCLUSION_MAP)
_REDUCTIONS: Final = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
)  # fmt: skip


def convolutions(model: onnx.ModelProto, *, ends: bool = False) -> list[str]:
    """Names of the 2-D convolutions that may be quantised, in the order of the graph.

    Never: 3-D ones; what the positions of a GridSample, the deformation or the occlusion map depend on, because an error there
    moves pixels; groups. Unless ``ends``: those with none of the others before them or none behind, which read the features
    and draw the pixels.

    Raises:
        ExportError: a convolution has no name or shares one.
    """
    graph = model.graph
    weights = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    roots = [name for node in graph.node if node.op_type == "GridSample" for name in node.input]
    island = _ancestors(producer, [*roots, *_ISLANDS])
    found = [
        node
        for node in graph.node
        if node.op_type == "Conv"
        and weights.get(node.input[1]) == 4
        and not island.intersection(node.output)
        and all(a.i == 1 for a in node.attribute if a.name == "group")
    ]
    labels = [node.name for node in found]
    if "" in labels or len(set(labels)) != len(labels):
        raise ExportError(
            "convolutions without names of their own", "expected one each", "export the graph again"
        )
    if ends:
        return labels
    made = {node.output[0] for node in found}
    followed: set[str] = set()
    leading: set[str] = set()
    for node in found:
        before = _ancestors(producer, [node.input[0]]) & made
        followed |= before
        if not before:
            leading.add(node.output[0])
    return [node.name for node in found if node.output[0] in followed - leading]


def _ancestors(producer: Mapping[str, onnx.NodeProto], tensors: Iterable[str]) -> set[str]:
    """The tensors and all that they are computed from."""
    seen: set[str] = set()
    todo = list(tensors)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            if name in producer:
                todo.extend(producer[name].input)
    return seen


def inputs_of(model: onnx.ModelProto, chosen: Collection[str]) -> list[str]:
    """The activations that these convolutions read, each once, in the order of the graph."""
    return list(dict.fromkeys(node.input[0] for node in model.graph.node if node.name in chosen))


def observed(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The graph with two more outputs per tensor: ``peak:NAME``, its largest magnitude, and ``samples:NAME``, about
    :data:`SAMPLES` magnitudes of it at even steps. Steps are odd, so that they meet every column of a picture."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph

    def const(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), f"observed_{name}"))
        return f"observed_{name}"

    flat, zero, end = const("flat", [-1]), const("zero", [0]), const("end", [2**62])
    many, one, two = const("many", [SAMPLES]), const("one", [1]), const("two", [2])
    for i, tensor in enumerate(tensors):

        def step(operator: str, *inputs: str, output: str = "", i: int = i, **attributes: Any) -> str:
            name = output or f"observed_{i}_{len(graph.node)}"
            graph.node.append(helper.make_node(operator, list(inputs), [name], **attributes))
            return name

        line = step("Abs", step("Reshape", step("Cast", tensor, to=_T.FLOAT), flat))
        step("ReduceMax", line, output=f"peak:{tensor}", keepdims=1)
        half = step("Div", step("Div", step("Shape", line), many), two)
        step(
            "Slice",
            line,
            zero,
            end,
            zero,
            step("Add", step("Mul", half, two), one),
            output=f"samples:{tensor}",
        )
        for kind in ("peak", "samples"):
            graph.output.append(helper.make_tensor_value_info(f"{kind}:{tensor}", _T.FLOAT, [f"{kind}_{i}"]))
    return result


def quantised(
    model: onnx.ModelProto,
    thresholds: Mapping[str, float],
    chosen: Collection[str],
    kind: Kind,
    *,
    opset: int | None = None,
    folder: Path | None = None,
) -> onnx.ModelProto:
    """A copy of a graph with these convolutions in 8 bits.

    Args:
        model: as exported, in float32 or float16.
        thresholds: tensor -> magnitude that gets the largest level, for all of :func:`inputs_of`.
        chosen: names of convolutions, of :func:`convolutions`.
        kind: the type.
        opset: of the result; None = that of the model, or :data:`OPSET` where the type or half precision needs it.
        folder: where the weights lie that the model does not hold.

    Returns:
        The copy. Convolutions that are not chosen, and everything else, are as in ``model``.

    Raises:
        ConfigError: the opset has no such type.
        ExportError: a convolution is not there, or a threshold is no positive number.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    nodes = {node.name: node for node in graph.node if node.op_type == "Conv"}
    if lost := [name for name in chosen if name not in nodes]:
        raise ExportError(
            f"the graph has no convolution {lost[0]}", "expected it", "calibrate this graph again"
        )
    weights = {tensor.name: tensor for tensor in graph.initializer}
    half = any(weights[nodes[name].input[1]].data_type == _T.FLOAT16 for name in chosen)
    needed = OPSET if half or kind is FP8 else 13
    opset = max(opset_of(model), needed) if opset is None else opset
    if opset < needed:
        raise ConfigError(
            f"{kind.name} around {'half' if half else 'single'} precision at opset {opset}",
            f"expected opset {needed}",
            "take int8 and float32 for TensorRT 8, or the flavour main",
        )
    _raise_opset(result, opset)
    if kind is FP8:
        _keep_relu(graph, inputs_of(result, chosen))
    writer = _Writer(result, kind, opset >= OPSET, folder)
    before: dict[int, list[onnx.NodeProto]] = {}
    for index, node in enumerate(graph.node):
        if node.op_type != "Conv" or node.name not in chosen:
            continue
        dtype = np.dtype(np.float16 if weights[node.input[1]].data_type == _T.FLOAT16 else np.float32)
        new: list[onnx.NodeProto] = []
        node.input[0] = writer.activation(node.input[0], thresholds.get(node.input[0], 0.0), dtype, new)
        node.input[1] = writer.weight(weights[node.input[1]], dtype, new)
        before[index] = new
    ordered = [n for i, node in enumerate(graph.node) for n in (*before.get(i, ()), node)]
    used = {name for node in ordered for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    # Copied before the lists that hold them are emptied.
    ordered, kept = [_copy(n) for n in ordered], [_copy(t) for t in kept]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(ordered)
    graph.initializer.extend(kept)
    return result


def _keep_relu(graph: onnx.GraphProto, tensors: Collection[str]) -> None:
    """Write a Relu before a Q as a LeakyRelu of slope 0, the same numbers.

    ONNX Runtime (1.31: ReluQuantFusion) drops a Relu before QuantizeLinear unless the zero point is known not to be the least
    level, which it looks up for integers alone; before fp8 the Relu is gone without a word.
    """
    for node in graph.node:
        if node.op_type == "Relu" and node.output[0] in tensors:
            node.op_type = "LeakyRelu"
            node.attribute.append(helper.make_attribute("alpha", 0.0))


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


class _Writer:
    """Makes pairs of Q and DQ, one for each tensor however many convolutions read it."""

    def __init__(self, model: onnx.ModelProto, kind: Kind, stored: bool, folder: Path | None) -> None:
        self._graph, self._kind, self._stored, self._folder = model.graph, kind, stored, folder
        self._done: dict[str, str] = {}
        self._zeros: dict[tuple[int, ...], str] = {}

    def activation(
        self, tensor: str, threshold: float, dtype: np.dtype[Any], new: list[onnx.NodeProto]
    ) -> str:
        if tensor not in self._done:
            if not (np.isfinite(threshold) and threshold > 0):
                raise ExportError(
                    f"{tensor} has the threshold {threshold}",
                    "expected a positive number",
                    "calibrate with frames that show a face",
                )
            scale, _ = self._scale(tensor, np.asarray(threshold / self._kind.limit), dtype)
            new.append(
                helper.make_node(
                    "QuantizeLinear",
                    [tensor, scale, self._zero(())],
                    [f"{tensor}_quantised"],
                    f"{tensor}_quantise",
                )
            )
            self._dequantise(tensor, f"{tensor}_quantised", scale, (), new)
        return self._done[tensor]

    def weight(self, tensor: onnx.TensorProto, dtype: np.dtype[Any], new: list[onnx.NodeProto]) -> str:
        name = tensor.name
        if name not in self._done:
            values = numpy_helper.to_array(tensor, str(self._folder or "")).astype(np.float32)
            scales = weight_scales(values, self._kind)
            scale, real = self._scale(name, scales, dtype)
            stored = f"{name}_quantised"
            if self._stored:
                data = encode(values, real.reshape(real.shape + (1,) * 3 if real.ndim else ()), self._kind)
                self._graph.initializer.append(
                    _T(name=stored, data_type=self._kind.dtype, dims=values.shape, raw_data=data.tobytes())
                )
            else:
                axis = {"axis": 0} if scales.ndim else {}
                zero = self._zero(scales.shape)
                new.append(
                    helper.make_node(
                        "QuantizeLinear", [name, scale, zero], [stored], f"{name}_quantise", **axis
                    )
                )
            self._dequantise(name, stored, scale, scales.shape, new)
        return self._done[name]

    def _dequantise(
        self, tensor: str, stored: str, scale: str, shape: tuple[int, ...], new: list[onnx.NodeProto]
    ) -> None:
        self._done[tensor] = f"{tensor}_dequantised"
        axis = {"axis": 0} if shape else {}
        inputs = [stored, scale, self._zero(shape)]
        new.append(
            helper.make_node("DequantizeLinear", inputs, [self._done[tensor]], f"{tensor}_dequantise", **axis)
        )

    def _scale(
        self, tensor: str, scale: npt.NDArray[np.float64], dtype: np.dtype[Any]
    ) -> tuple[str, npt.NDArray[np.float64]]:
        """A scale in the graph's precision, rounded up so that the largest number is not cut off; its name and value."""
        rounded = scale.astype(dtype)
        rounded = np.where(rounded < scale, np.nextafter(rounded, dtype.type(np.inf)), rounded).astype(dtype)
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(rounded, dtype), f"{tensor}_scale"))
        return f"{tensor}_scale", rounded.astype(np.float64)

    def _zero(self, shape: tuple[int, ...]) -> str:
        """The zero point, which also says the type."""
        if shape not in self._zeros:
            name = self._zeros[shape] = "_".join(["zero", self._kind.name, *map(str, shape)])
            size = int(np.prod(shape, dtype=np.int64))
            self._graph.initializer.insert(
                0, _T(name=name, data_type=self._kind.dtype, dims=shape, raw_data=bytes(size))
            )
        return self._zeros[shape]


def _raise_opset(model: onnx.ModelProto, opset: int) -> None:
    """Say a newer opset, up to 19, and write what changed since 17 in the new way: axes of reductions, counts of splits."""
    old = opset_of(model)
    if opset == old:
        return
    graph = model.graph
    if old < 18 <= opset:
        for i, node in enumerate(graph.node):
            if node.op_type in _REDUCTIONS:
                axes = [a for a in node.attribute if a.name == "axes"]
                if axes:
                    name = f"axes_of_reduction_{i}"
                    graph.initializer.append(
                        numpy_helper.from_array(np.asarray(axes[0].ints, np.int64), name)
                    )
                    node.attribute.remove(axes[0])
                    node.input.append(name)
            elif node.op_type == "Split" and (len(node.input) < 2 or not node.input[1]):
                node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
    for entry in model.opset_import:
        if entry.domain in DEFAULT_DOMAINS:
            entry.version = opset
    model.ir_version = max(model.ir_version, 9) if opset >= OPSET else model.ir_version
