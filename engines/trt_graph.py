"""What TensorRT's builder must be told of an ONNX graph, read without the ``onnx`` package and without the weights.

TensorRT up to 10 builds weakly typed networks, in which it may compute any layer in half precision once it is allowed to.
This project decides precision in the graph, by casts, so the types of all tensors are read here and copied onto the layers
(:mod:`lp_edge.engines.trt_build`). Graphs carry no types of their inner tensors; they follow from the casts, because every
ONNX operator says which input or attribute its outputs take their type from (https://onnx.ai/onnx/operators/).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from lp_edge.engines.external import varint
from lp_edge.engines.runner import TensorSpec
from lp_edge.errors import EngineError

__all__ = ["FLOATS", "Graph", "Node", "read_graph"]

FLOATS: Final = ("float16", "float32")
"""Types that a layer can compute in by our choice."""

_Bytes = bytes | mmap.mmap

# onnx.proto, TensorProto.DataType
_DTYPES: Final[Mapping[int, str]] = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 17: "float8e4m3fn", 18: "float8e4m3fnuz",
    19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4",
}  # fmt: skip
_INT64: Final = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
_BOOL: Final = frozenset(
    {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"}
)
# Operator -> the input that its first output takes its type from, where that is not the first.
_LIKE: Final[Mapping[str, int]] = {
    "CastLike": 1, "DequantizeLinear": 1, "OneHot": 2, "QuantizeLinear": 2, "Where": 1,
}  # fmt: skip
# Operator -> type of its second output.
_SECOND: Final[Mapping[str, str]] = {"TopK": "int64", "MaxPool": "int64", "Dropout": "bool"}
# onnx.proto, AttributeProto: the field that holds the value -> the type of a Constant made of it
_CONSTANTS: Final[Mapping[str, str]] = {
    "value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64",
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A node of the graph.

    Attributes:
        name: its own; often empty.
        op: operator.
        inputs, outputs: names of tensors; an empty one stands for none.
        dtype: type that an attribute names (of Cast: ``to``; of constants: the value's), or "".
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtype: str = ""

    @property
    def label(self) -> str:
        """What TensorRT's parser calls the node's first layer."""
        return self.name or f"node_of_{self.outputs[0] if self.outputs else ''}"


@dataclass(frozen=True)
class Graph:
    """A graph's surface and the types inside it.

    Attributes:
        inputs, outputs: as the file declares them; an axis without a size is anonymous (``?2``).
        nodes: in the file's order, which ONNX wants topological.
        types: type of every tensor by name, as NumPy calls it; a tensor of unknown type is left out.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    types: Mapping[str, str] = field(hash=False)

    @property
    def precision(self) -> str:
        """``fp8`` or ``int8`` with quantised tensors, ``fp16`` with any in half precision, else ``fp32``."""
        if kinds := self.quantised:
            return "fp8" if any(kind.startswith("float8") for kind in kinds) else "int8"
        return "fp16" if "float16" in self.types.values() else "fp32"

    @property
    def quantised(self) -> frozenset[str]:
        """Types that tensors are quantised to."""
        return frozenset(
            self.types[name]
            for node in self.nodes
            if node.op == "QuantizeLinear"
            for name in node.outputs
            if name in self.types
        )

    def compute_type(self, node: Node) -> str:
        """What the node computes in: the type of its first floating-point input, else of its output, or "".

        Casts and quantisation compute nothing: "".
        """
        if node.op in ("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "Constant", "Shape", "Size"):
            return ""
        kinds = (self.types.get(name, "") for name in (*node.inputs, *node.outputs))
        return next((kind for kind in kinds if kind in FLOATS), "")


def read_graph(model: Path | bytes) -> Graph:
    """Read a graph.

    Args:
        model: path of an ONNX file, or its bytes.

    Raises:
        EngineError: it is no ONNX model, or has inputs that are no plain tensors.
    """
    name = str(model) if isinstance(model, Path) else "the model"
    try:
        with contextlib.ExitStack() as stack:
            data: _Bytes
            if isinstance(model, Path):
                file = stack.enter_context(model.open("rb"))
                data = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            else:
                data = model
            parts = dict(_fields(data, 0, len(data)))
            graph = _graph(data, *parts[7]) if 7 in parts else None
            # TensorRT's parser ends the whole process on a model without these.
            if graph is None or not graph.outputs or 8 not in parts:
                raise ValueError("it has no graph, no outputs or no operator set")
            return graph
    except OSError as error:
        raise EngineError(
            f"{name} cannot be read ({error})", "expected an ONNX file", "check the path, or export again"
        ) from error
    except (IndexError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise EngineError(
            f"{name} is not an ONNX model that can be read ({error})",
            "expected an intact ONNX file",
            "export the bundle again",
        ) from error


# -- protobuf ---------------------------------------------------------------------------------------


def _fields(data: _Bytes, at: int, end: int) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a message: an int, or (begin, end) of what has a length; IndexError when cut off."""
    while at < end:
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = varint(data, at)
            yield tag >> 3, value
        elif kind == 2:
            size, at = varint(data, at)
            if at + size > end:
                raise IndexError(f"cut off at byte {at}")
            yield tag >> 3, (at, at + size)
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"no protobuf at byte {at}")


def _text(data: _Bytes, span: tuple[int, int]) -> str:
    return data[slice(*span)].decode("utf-8")


def _graph(data: _Bytes, at: int, end: int) -> Graph:
    nodes: list[Node] = []
    types: dict[str, str] = {}
    values: dict[int, list[TensorSpec]] = {11: [], 12: [], 13: []}  # inputs, outputs, inner tensors
    for number, value in _fields(data, at, end):
        if number == 1:
            nodes.append(_node(data, *value))
        elif number == 5:
            name, dtype = _tensor(data, *value)
            types[name] = dtype
        elif number in values:
            values[number].append(_value(data, *value, strict=number != 13))
    inputs = tuple(spec for spec in values[11] if spec.name not in types)
    types.update({spec.name: spec.dtype.name for spec in (*inputs, *values[12], *values[13])})
    for node in nodes:
        _derive(node, types)
    return Graph(inputs, tuple(values[12]), tuple(nodes), types)


def _node(data: _Bytes, at: int, end: int) -> Node:
    name, op, dtype = "", "", ""
    inputs: list[str] = []
    outputs: list[str] = []
    for number, value in _fields(data, at, end):
        if number == 1:
            inputs.append(_text(data, value))
        elif number == 2:
            outputs.append(_text(data, value))
        elif number == 3:
            name = _text(data, value)
        elif number == 4:
            op = _text(data, value)
        elif number == 5:
            dtype = _attribute_type(data, *value) or dtype
    return Node(name, op, tuple(inputs), tuple(outputs), dtype)


def _attribute_type(data: _Bytes, at: int, end: int) -> str:
    """The type that an attribute gives to the node's output, or ""."""
    name, integer, tensor = "", 0, ""
    for number, value in _fields(data, at, end):
        if number == 1:
            name = _text(data, value)
        elif number == 3:
            integer = value
        elif number == 5:
            tensor = _tensor(data, *value)[1]
    if name in ("to", "dtype", "output_dtype"):
        return _DTYPES.get(integer, "")
    return tensor if name == "value" else _CONSTANTS.get(name, "")


def _tensor(data: _Bytes, at: int, end: int) -> tuple[str, str]:
    name, dtype = "", ""
    for number, value in _fields(data, at, end):
        if number == 2:
            dtype = _DTYPES.get(value, "")
        elif number == 8:
            name = _text(data, value)
    return name, dtype


def _value(data: _Bytes, at: int, end: int, *, strict: bool) -> TensorSpec:
    """A ValueInfoProto; ``strict`` refuses what is no tensor of plain numbers."""
    name, dtype = "", ""
    shape: list[int | str] = []
    for number, value in _fields(data, at, end):
        if number == 1:
            name = _text(data, value)
        elif number == 2:
            for kind, tensor in _fields(data, *value):
                if kind != 1:
                    continue
                for inner, span in _fields(data, *tensor):
                    if inner == 1:
                        dtype = _DTYPES.get(span, "")
                    elif inner == 2:
                        shape = [
                            _axis(data, dim, position)
                            for position, (_, dim) in enumerate(f for f in _fields(data, *span) if f[0] == 1)
                        ]
    try:
        return TensorSpec(name, np.dtype(dtype), tuple(shape))
    except TypeError:
        if strict:
            raise ValueError(f"tensor {name} has type {dtype or 'unknown'}") from None
        return TensorSpec(name, np.dtype("void"), ())  # an inner tensor of a type NumPy has not


def _axis(data: _Bytes, span: tuple[int, int], position: int) -> int | str:
    for number, value in _fields(data, *span):
        if number == 1:
            return int(value)
        if number == 2 and (name := _text(data, value)):
            return name
    return f"?{position}"


# -- types ------------------------------------------------------------------------------------------


def _derive(node: Node, types: dict[str, str]) -> None:
    """Enter the types of a node's outputs."""
    if node.op in _BOOL:
        first = "bool"
    elif node.op in _INT64:
        first = "int64"
    elif node.dtype:
        first = node.dtype
    elif node.op == "ConstantOfShape":
        first = "float32"
    else:
        like = _LIKE.get(node.op, 0)
        first = types.get(node.inputs[like], "") if like < len(node.inputs) else ""
        if not first and node.op == "QuantizeLinear":
            first = "uint8"
    for index, name in enumerate(node.outputs):
        dtype = _SECOND.get(node.op, first) if index == 1 else first
        if name and dtype:
            types.setdefault(name, dtype)
