"""PyTorch modules to ONNX graphs: one exporter for all families, with what is known of the result checked.

The TorchScript exporter is asked for on purpose: it keeps opsets 16 and 17 and dynamic sizes, whereas the newer one
starts from opset 18 and does not always come back down. What it leaves behind is tidied: constants and what is computed
from them alone become initialisers, aliases and nodes that feed nothing go, inferred shapes of intermediates are dropped
(every consumer infers its own).
The same module with the same weights gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx  # noqa: TID253
import onnxruntime
import torch  # noqa: TID253
from torch.overrides import TorchFunctionMode  # noqa: TID253

from lp_edge.errors import ExportError
from lp_edge.export.opset import opset_of
from lp_edge.runtime.image import cannot_write, create_beside

__all__ = [
    "Shape",
    "export_onnx",
    "node_count",
    "save",
    "serialise",
    "split_weights",
    "state_shapes",
]

Shape = tuple[int | str, ...]
"""Sizes of a tensor; a text is the name of a dynamic axis."""

_RANKS = {torch.conv2d: 2, torch.conv3d: 3}
_OUTSIDE = 1024  # bytes from which a tensor goes into the file of weights
_PAGE = 4096  # files are mapped by pages
_REPORT = "report this with the versions that lp-doctor prints"


class _Convolution(torch.autograd.Function):
    """A convolution that computes one input channel only, in float32, and becomes a whole Conv in the graph."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        x, weight, bias, *layout, groups = args
        inputs = [x, weight] if groups > 1 else [x.narrow(1, 0, 1), weight.narrow(1, 0, 1)]
        inputs += [] if bias is None else [bias]
        x_, weight_, bias_ = (*(t.float() for t in inputs), None)[:3]
        return torch.convolution(x_, weight_, bias_, *layout, False, [0] * len(layout[0]), groups).to(x.dtype)

    @staticmethod
    def symbolic(g: Any, *args: Any) -> Any:
        x, weight, bias, stride, padding, dilation, groups = args
        return g.op(
            "Conv",
            *((x, weight) if bias is None or bias.node().mustBeNone() else (x, weight, bias)),
            dilations_i=dilation,
            group_i=groups,
            kernel_shape_i=weight.type().sizes()[2:],
            pads_i=padding * 2,
            strides_i=stride,
        )


class _CheapConvolutions(TorchFunctionMode):
    """Makes convolutions cheap while a module is traced.

    A trace asks for operators and sizes, not for values. PyTorch convolves float16 on a CPU a hundred times slower than
    float32, so that tracing a decoder in half precision would take hours.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func not in _RANKS
            or isinstance(kwargs.get("padding"), str)
            or any(isinstance(a, str) for a in args)
        ):
            return func(*args, **kwargs)

        def whole(x: Any, weight: Any, bias: Any = None, *layout: Any, **more: Any) -> Any:
            options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            options |= dict(zip(options, layout, strict=False)) | more
            groups = options.pop("groups")
            sizes = ([v] * _RANKS[func] if isinstance(v, int) else list(v) for v in options.values())
            return _Convolution.apply(x, weight, bias, *sizes, groups)

        return whole(*args, **{"x" if k == "input" else k: v for k, v in kwargs.items()})


def export_onnx(
    module: torch.nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, Shape],
    dynamic: Mapping[str, Mapping[int, str]],
    opset: int,
    keep: Sequence[str] = (),
) -> onnx.ModelProto:
    """Trace a module into a checked ONNX graph.

    Args:
        module: takes ``inputs`` in their order and returns a tensor, or a tuple of ``outputs`` followed by ``keep``. It is
            put into evaluation mode and stays there.
        inputs: name -> example. Use different sizes on different axes, so that none is mistaken for another.
        outputs: name -> shape; a text names a dynamic axis. Shapes are stated in the graph as given here.
        dynamic: name of an input -> axis -> name of the axis; all other axes are fixed.
        opset: version of the operator set.
        keep: names for tensors that the module returns after its outputs. Under these names they stay in the graph,
            as intermediates: cut there to look inside.

    Returns:
        The model, complete in memory (below 2 GB).

    Raises:
        ExportError: the module returns another number of tensors; the opset was not honoured; the graph has control flow,
            contradicts a stated shape, has an example's size baked in where an axis is dynamic, lost a kept tensor,
            or fails ONNX's checker.

    Example:
        >>> model = export_onnx(
        ...     torch.nn.Linear(4, 2), {"x": torch.zeros(3, 4)}, {"y": ("batch", 2)}, {"x": {0: "batch"}}, opset=17
        ... )
        >>> [node.op_type for node in model.graph.node]
        ['Gemm']
    """
    returned = [*outputs, *keep]
    names = [*inputs, *returned]
    if len(set(names)) != len(names) or not dynamic.keys() <= inputs.keys():
        raise ExportError(
            f"tensors {names} with dynamic axes for {sorted(dynamic)}",
            "expected unique names, and axes of inputs only",
            "correct the names",
        )
    module.eval()
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), _CheapConvolutions():
        # That the TorchScript exporter is deprecated is known; a warning of the tracer stays one.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        # What it cannot fold is folded here.
        warnings.filterwarnings("ignore", message="Constant folding")
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            buffer,  # type: ignore[arg-type,unused-ignore]
            input_names=list(inputs),
            output_names=returned,
            dynamic_axes={name: dict(axes) for name, axes in dynamic.items()},
            opset_version=opset,
            do_constant_folding=True,
            dynamo=False,
        )
    data = buffer.getvalue()
    buffer.close()
    model = onnx.load_from_string(data)
    del data
    graph = model.graph
    found = [value.name for value in graph.output]
    if found != returned:
        raise ExportError(f"the module returns {found}", f"expected {returned}", "correct the names")
    if opset_of(model) != opset:
        raise ExportError(f"the graph came out at opset {opset_of(model)}", f"expected {opset}", _REPORT)
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        raise ExportError(
            "the graph has control flow", "expected straight-line operators", "rewrite the module"
        )
    del graph.output[len(outputs) :]
    _tidy(model, frozenset(returned))
    made = {name for node in graph.node for name in node.output}
    lost = [name for name in keep if name not in made]
    if lost:
        raise ExportError(
            f"the graph has no tensor {', '.join(lost)}",
            "expected each kept tensor to feed an output",
            "keep another tensor",
        )
    state_shapes(model, outputs)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"ONNX's checker refuses the graph: {error}", "", _REPORT) from error
    return model


def _tidy(model: onnx.ModelProto, fixed: frozenset[str]) -> None:
    """Bring a fresh graph into its shortest form; tensors named in ``fixed`` keep their names.

    What depends on constants alone becomes an initialiser, equal ones are merged; Identity nodes, nodes and initialisers
    that feed no output are removed, as are notes about intermediates.
    """
    graph = model.graph
    alias: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    constant = {tensor.name for tensor in graph.initializer}
    folded: list[onnx.NodeProto] = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = alias.get(name, name)
        node.doc_string = ""
        keeps_name = bool(fixed.intersection(node.output))
        if keeps_name or node.op_type.startswith("Random"):
            nodes.append(node)
        elif node.op_type == "Identity":
            alias[node.output[0]] = node.input[0]
        elif constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
            folded.append(node)
        else:
            nodes.append(node)
    needed = {value.name for value in graph.output}
    alive = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            alive.append(node)
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    same: dict[str, str] = {}
    kept = []
    for tensor in (*graph.initializer, *_fold(model, folded, needed)):
        if tensor.name not in needed:
            continue
        digest = hashlib.sha256(onnx.numpy_helper.to_array(tensor).tobytes()).digest()
        content = (tensor.data_type, tuple(tensor.dims), digest)
        same[tensor.name] = first.setdefault(content, tensor.name)
        if same[tensor.name] == tensor.name:
            kept.append(tensor)
    for node in alive:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(alive))
    graph.initializer.extend(kept)


def _fold(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], needed: set[str]
) -> list[onnx.TensorProto]:
    """Run the nodes, which depend on initialisers alone; returns those results that are needed elsewhere."""
    results = sorted(needed.intersection(name for node in nodes for name in node.output))
    if not results:
        return []
    read = {name for node in nodes for name in node.input}
    part = onnx.helper.make_graph(
        nodes,
        "constants",
        [],
        [onnx.ValueInfoProto(name=name) for name in results],
        [tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    whole = onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    return [
        onnx.numpy_helper.from_array(np.asarray(value), name)
        for name, value in zip(results, session.run(results, {}), strict=True)
    ]


def state_shapes(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> None:
    """Write the outputs' shapes into the graph, unless shape inference contradicts them.

    Args:
        shapes: name of every output -> shape, as for :func:`export_onnx`.

    Raises:
        ExportError: the outputs are others; an inferred size differs, or is a number where a dynamic axis is stated.
    """
    found = [value.name for value in model.graph.output]
    if set(found) != set(shapes):
        raise ExportError(f"the graph returns {found}", f"expected {list(shapes)}", "take the right graph")
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.output
    for value, guess in zip(model.graph.output, inferred, strict=True):
        stated = shapes[value.name]
        tensor = guess.type.tensor_type
        known = tensor.shape.dim if tensor.HasField("shape") else None
        if known is not None and (
            len(known) != len(stated)
            or any(d.HasField("dim_value") and d.dim_value != s for d, s in zip(known, stated, strict=True))
        ):
            sizes = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in known)
            raise ExportError(
                f"{value.name} has the shape {sizes}", f"expected {stated}", "correct the shape or the module"
            )
        shape = value.type.tensor_type.shape
        shape.SetInParent()
        for size in stated:
            dim = shape.dim.add()
            if isinstance(size, int):
                dim.dim_value = size
            else:
                dim.dim_param = size


def node_count(model: onnx.ModelProto) -> int:
    """Number of operators in the graph."""
    return len(model.graph.node)


def serialise(model: onnx.ModelProto) -> bytes:
    """The model as bytes; equal models give equal bytes."""
    return model.SerializeToString(deterministic=True)


def split_weights(model: onnx.ModelProto, location: str) -> tuple[bytes, bytes]:
    """The model in two parts, graph and weights; the model itself stays as it is.

    ONNX Runtime maps a file of weights, but keeps a second copy of weights that came inside a model. The graph holds the
    weights' digest, so that the same graph with other weights has other bytes.

    Args:
        location: name of the weights' file, in the folder of the graph's.

    Returns:
        The graph as bytes and the content of the file beside it. Equal models give equal bytes.

    Example:
        >>> graph, data = split_weights(model, "warp_decode.onnx.data")  # doctest: +SKIP
    """
    light = onnx.ModelProto()
    light.CopyFrom(model)
    outside = [tensor for tensor in light.graph.initializer if len(tensor.raw_data) >= _OUTSIDE]
    pieces, size = [], 0
    for tensor in outside:
        pieces += [bytes(-size % _PAGE), tensor.raw_data]
        size += len(pieces[-2])
        for key, value in (("location", location), ("offset", size), ("length", len(tensor.raw_data))):
            tensor.external_data.add(key=key, value=str(value))
        size += len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
    data = b"".join(pieces)
    digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()  # the one that ONNX defines
    for tensor in outside:
        tensor.external_data.add(key="checksum", value=digest)
    return serialise(light), data


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the model: beside, flushed to disk, renamed; a failure leaves what was there before.

    Raises:
        OutputError: the file cannot be written.
    """
    data = serialise(model)
    part = create_beside(path)
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)
