"""The work of an ONNX graph at given sizes: operations and bytes, counted, not measured.

Needs the package ``onnx`` (extra ``export``), not PyTorch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253
import onnxruntime

from lp_edge.errors import ExportError

__all__ = ["Cost", "cost", "file_cost"]


@dataclass(frozen=True)
class Cost:
    """Work of a graph at given sizes.

    Attributes:
        products: type of the factors (``float16``, ``float32``, ``int8`` …) → operations of convolutions and matrix
            products, a multiplication and an addition counted as two; their biases are not counted. Factors that come out of
            DequantizeLinear have the type that is stored.
        flops: ``products`` and all other operations on numbers: a bilinear sample eight per value in a plane, sixteen in a
            volume; reductions and normalisations one per value read; anything else one per value of the result; conversions
            and copies none. Arithmetic of addresses is counted alike.
        boundary_bytes: inputs and outputs, each once.
        weight_bytes: constants, each once.
        fused_bytes: what is moved when element-wise operations that follow each other are one kernel, together with the
            convolution or product before them whose result nothing else reads, as TensorRT makes them: every tensor that
            two such kernels hand on, once written and once per kernel that reads it, and constants.
        node_bytes: what is moved when every node is a kernel of its own.
        nodes: number of nodes, views not counted.
    """

    products: Mapping[str, int]
    flops: int
    boundary_bytes: int
    weight_bytes: int
    fused_bytes: int
    node_bytes: int
    nodes: int

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline's estimate: the longer of computing and of moving ``fused_bytes``."""
        return max(self.flops / flops_per_second, self.fused_bytes / bytes_per_second)


_FREE: Final = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "Dropout"})  # views
_MOVES: Final = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Expand",
        "Gather",
        "GatherElements",
        "GatherND",
        "Pad",
        "ScatterElements",
        "ScatterND",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Tile",
        "Transpose",
    }
)
_READS_WHAT_IT_RETURNS: Final = frozenset({"Gather", "GatherElements", "GatherND"})
_PRODUCTS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NORMS: Final = frozenset(
    {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax", "Softmax"}
)
_POOLS: Final = frozenset({"AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "TopK"})
_CONVERSIONS: Final = frozenset({"Cast", "CastLike", "DequantizeLinear", "QuantizeLinear"})


def file_cost(path: Path, shapes: Mapping[str, Sequence[int]]) -> Cost:
    """:func:`cost` of an ONNX file, whose weights may lie beside it.

    Raises:
        ExportError: the file is none, or as in :func:`cost`.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own exceptions are several
        raise ExportError(
            f"{path} cannot be read ({error})", "expected an ONNX file", "check the path"
        ) from error
    return cost(model, shapes, folder=path.parent)


def cost(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], *, folder: Path | None = None) -> Cost:
    """Count the work of a graph.

    What does not depend on values at these sizes, such as the coordinates of pixels, is computed first, by ONNX Runtime, and
    counts as a constant that is read; dequantised weights stay as they are stored. A gather reads as much as it returns, and
    its indices.

    Args:
        model: a graph without control flow.
        shapes: name of every input → its size.
        folder: where weights that are not in the graph lie.

    Raises:
        ExportError: a size is missing or does not fit, a size inside the graph depends on values, or it has an Einsum.

    Example:
        >>> model = onnx.parser.parse_model('''
        ...   <ir_version: 8, opset_import: ["": 17]>
        ...   g (float[N, 4] x, float[4, 3] w) => (float[N, 3] y) { y = MatMul(x, w) }''')
        >>> cost(model, {"x": (2, 4), "w": (4, 3)}).flops
        48
    """
    return _Counter(_sized(model, shapes, folder)).count()


class _Counter:
    """One pass over a graph whose sizes are known."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = graph = model.graph
        self.constants = {t.name for t in graph.initializer}
        self.sizes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
        self.types: dict[str, int] = {t.name: t.data_type for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self._constant(node)
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            self.sizes[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
            self.types[value.name] = kind.elem_type
        unknown = [n for node in graph.node for n in node.output if n and 0 in self.sizes.get(n, (0,))]
        if unknown:
            raise ExportError(
                f"the size of {', '.join(unknown[:5])} depends on values",
                "expected sizes that follow from those of the inputs",
                "count a graph whose sizes do",
            )
        self.elements = {name: math.prod(size) for name, size in self.sizes.items()}
        self.nbytes = {name: _bytes(self.elements[name], self.types[name]) for name in self.sizes}
        self.maker = {name: node for node in graph.node for name in node.output}

    def _constant(self, node: onnx.NodeProto) -> None:
        name = node.output[0]
        value = onnx.helper.get_attribute_value(node.attribute[0])
        if not isinstance(value, onnx.TensorProto):
            return  # numbers and lists: arguments, of no weight; their sizes are inferred
        self.constants.add(name)
        self.sizes[name], self.types[name] = tuple(value.dims), value.data_type

    def count(self) -> Cost:
        graph, nbytes = self.graph, self.nbytes
        origin: dict[str, str] = {}  # of a view: the tensor that it shows
        edge = {value.name for value in (*graph.input, *graph.output)}
        products: dict[str, int] = defaultdict(int)
        by_kernel: dict[str, int] = defaultdict(
            int
        )  # tensor -> bytes that all kernels but element-wise ones read
        by_fused: dict[str, int] = defaultdict(int)  # tensor -> number of element-wise nodes that read it
        made: dict[str, str] = {}  # tensor -> "point", "product" or "kernel"
        others = alone = nodes = 0
        for node in graph.node:
            op = node.op_type
            if op == "Constant" or not node.output:
                continue
            if op == "Einsum":
                raise ExportError(
                    f"{node.name or node.output[0]} is an Einsum, whose products are not counted",
                    "expected MatMul, Gemm and convolutions",
                    "export the graph with MatMul",
                )
            read, out = [origin.get(name, name) for name in node.input if name], node.output[0]
            if op in _FREE:
                origin[out] = read[0]
                if out in edge:
                    edge.add(read[0])
                continue
            nodes += 1
            kind = self._kind(op)
            if kind == "product":
                products[self._factor_type(node)] += self._product(node)
            else:
                others += self._operations(op, node, out)
            taken = {name: nbytes.get(name, 0) for name in read}
            if op in _READS_WHAT_IT_RETURNS:
                taken[read[0]] = nbytes[out]
            results = [name for name in node.output if name]
            alone += sum(taken.values()) + sum(nbytes[name] for name in results)
            made.update(dict.fromkeys(results, kind))
            for name, amount in taken.items():
                if kind == "point":
                    by_fused[name] += 1
                else:
                    by_kernel[name] += amount

        def hidden(name: str) -> bool:
            if name in edge or name in by_kernel:
                return False
            maker = made.get(name)
            return maker == "point" or (maker == "product" and by_fused[name] == 1)

        fused = sum(by_kernel.values())
        fused += sum(nbytes[name] for name in (*made, *by_fused) if not hidden(name))
        weights = sum(nbytes[name] for name in self.constants if name in by_kernel or name in by_fused)
        boundary = sum(nbytes[value.name] for value in (*graph.input, *graph.output))
        flops = sum(products.values()) + others
        return Cost(MappingProxyType(dict(products)), flops, boundary, weights, fused, alone, nodes)

    def _kind(self, op: str) -> str:
        if op in _PRODUCTS:
            return "product"
        apart = op in _MOVES or op in _NORMS or op in _POOLS or op == "GridSample" or op.startswith("Reduce")
        return "kernel" if apart else "point"

    def _operations(self, op: str, node: onnx.NodeProto, out: str) -> int:
        if op in _MOVES or op in _CONVERSIONS or op == "Shape":
            return 0
        if op == "GridSample":
            return self.elements[out] * 4 * 2 ** (len(self.sizes[out]) - 2) // 2
        if op in _NORMS or op in _POOLS or op.startswith("Reduce"):
            return max(self.elements[node.input[0]], self.elements[out])
        return self.elements[out]

    def _product(self, node: onnx.NodeProto) -> int:
        """Two operations per term of every sum."""
        left, right = (self.sizes[name] for name in node.input[:2])
        out = self.elements[node.output[0]]
        if node.op_type == "Conv":  # weights [outputs, inputs / groups, kernel …]
            return 2 * out * math.prod(right[1:])
        if node.op_type == "ConvTranspose":  # weights [inputs, outputs / groups, kernel …]
            return 2 * math.prod(left) * math.prod(right[1:])
        turned = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
        return 2 * out * left[0 if turned else -1]

    def _factor_type(self, node: onnx.NodeProto) -> str:
        stored = set()
        for name in node.input[:2]:
            maker = self.maker.get(name)
            quantised = maker is not None and maker.op_type == "DequantizeLinear"
            stored.add(self.types[maker.input[0] if quantised and maker is not None else name])
        widest = max(stored, key=_bits)
        name = str(onnx.TensorProto.DataType.Name(widest)).lower()
        return "float32" if name == "float" else name


def _bits(kind: int) -> int:
    """Bits of one value; types of four bits are packed."""
    name = str(onnx.TensorProto.DataType.Name(kind))
    if name.endswith("INT4") or name.startswith("FLOAT4"):
        return 4
    return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _bytes(elements: int, kind: int) -> int:
    return (elements * _bits(kind) + 7) // 8


# -- sizes ------------------------------------------------------------------------------------------------

_STAYS: Final = frozenset(
    {"DequantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike", "Bernoulli"}
)
_ROUNDS: Final = 20


def _sized(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]], folder: Path | None
) -> onnx.ModelProto:
    """The model at fixed sizes, all of them inferred, what depends on sizes and constants alone as constants."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    graph = fixed.graph
    constants = {t.name for t in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if {value.name for value in inputs} != shapes.keys():
        raise ExportError(
            f"sizes of {sorted(shapes)}",
            f"expected those of {sorted(value.name for value in inputs)}",
            "name all inputs",
        )
    named: dict[str, int] = {}
    for value in inputs:
        dims, given = value.type.tensor_type.shape.dim, shapes[value.name]
        fits = len(dims) == len(given)
        for dim, size in zip(dims, given, strict=False):
            fits &= size == (dim.dim_value or size) == named.setdefault(dim.dim_param or str(size), size)
            dim.dim_value = size
        if not fits:
            raise ExportError(
                f"size {tuple(given)} for {value.name}", "expected one that fits it", "correct it"
            )
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    for _ in range(_ROUNDS):  # each folding may give sizes to what comes behind it
        del graph.value_info[:]
        fixed = _inferred(fixed)
        graph = fixed.graph
        if not _fold(fixed, folder):
            break
    return fixed


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(
            f"sizes inside the graph cannot be inferred ({error})", "expected a graph that fits", "check it"
        ) from error


def _fold(model: onnx.ModelProto, folder: Path | None) -> bool:
    """Replace what depends on sizes and constants alone; whether there was any."""
    graph = model.graph
    known = {t.name for t in graph.initializer}
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }
    sizes.update({t.name: list(t.dims) for t in graph.initializer})
    folded: list[onnx.NodeProto] = []
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        whole = node.op_type in ("Shape", "Size") and node.input[0] in sizes and 0 not in sizes[node.input[0]]
        plain = node.op_type not in _STAYS and all(not name or name in known for name in node.input)
        if plain or whole:
            folded.append(node)
            known.update(node.output)
        else:
            kept.append(node)
    if all(node.op_type == "Constant" for node in folded):
        return False
    read = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    wanted = [name for node in folded for name in node.output if name in read]
    values = _run(model, folded, wanted, sizes, folder)
    graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in values.items())
    del graph.node[:]
    graph.node.extend(kept)
    return True


def _run(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    wanted: Sequence[str],
    sizes: Mapping[str, Sequence[int]],
    folder: Path | None,
) -> dict[str, npt.NDArray[Any]]:
    """What nodes without inputs compute."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    graph = part.graph
    for field in ("node", "input", "output", "value_info", "initializer"):
        graph.ClearField(field)
    made = {name for node in nodes for name in node.output}
    weights = {t.name: t for t in model.graph.initializer}
    outer = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
    for name in outer:
        if name in weights:
            graph.initializer.add().CopyFrom(weights[name])
        else:  # only asked for its size: a value of that size that takes no memory to speak of
            shape = onnx.numpy_helper.from_array(np.array(sizes[name], np.int64), f"{name}/size")
            graph.initializer.append(shape)
            graph.node.append(onnx.helper.make_node("ConstantOfShape", [shape.name], [name]))
    graph.node.extend(nodes)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    if folder is not None:
        onnx.external_data_helper.load_external_data_for_model(part, str(folder))
    if not wanted:
        return {}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            _inferred(part).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = session.run(list(wanted), {})
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        raise ExportError(
            f"the constants of the graph cannot be computed ({error})", "expected a valid graph", "check it"
        ) from error
    return dict(zip(wanted, results, strict=True))
