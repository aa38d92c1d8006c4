"""The yardstick of the LivePortrait export: seeded inputs, what PyTorch makes of them, and how far a graph may be off.

The inputs are smooth random pictures and random keypoints: still, moved a little, moved far beyond the picture (the zero
padding of the warp), with one source for all frames and with one per frame, in batches of 1, 2 and 3. A thinned copy of
yardstick goes into the bundle, so that parity can be repeated where neither the weights nor PyTorch's result are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253
import torch  # noqa: TID253

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.errors import BundleError, ExportError
from lp_edge.export.networks import LivePortraitNetworks
from lp_edge.export.onnx_export import serialise
from lp_edge.export.quantize.quality import psnr_db

__all__ = [
    "NETWORKS",
    "TABLE",
    "TOLERANCES",
    "Inferring",
    "Yardstick",
    "broken",
    "features_of",
    "measure",
    "on_cpu",
    "shapes_of",
]

Array = npt.NDArray[Any]


class Inferring(Protocol):
    """What is compared: tensors in, tensors out, by name."""

    def infer(self, inputs: dict[str, Array], /) -> Mapping[str, Any]:
        """Run the network."""
        ...


NETWORKS: Final = (
    names.STITCHING,
    names.RETARGET_EYE,
    names.RETARGET_LIP,
    names.APPEARANCE,
    names.MOTION,
    names.WARP_DECODE,
)
"""The graphs of the family, in the order of their export: the largest one comes last, when memory is free."""

TABLE: Final = "parity"
"""Name of the thinned yardstick among the bundle's files."""

_INSIDE: Final = (names.DEFORMATION, names.OCCLUSION_MAP, names.WARPED)
_POSE: Final = (names.PITCH, names.YAW, names.ROLL)
_PSNR: Final = "image_psnr_db"

# What is never quantised, around which the rest may be in half precision; the picture has a report of its own (quality.json).
_EIGHT_BITS: Final = {names.WARP_DECODE: {"deformation_max": 1e-3, "occlusion_map_max": 1e-2}}

TOLERANCES: Final[Mapping[str, Mapping[str, Mapping[str, float]]]] = MappingProxyType(
    {
        "fp32": {
            names.STITCHING: {"delta_max": 1e-5},
            names.RETARGET_EYE: {"delta_max": 1e-5},
            names.RETARGET_LIP: {"delta_max": 1e-5},
            names.APPEARANCE: {"feature_3d_max": 1e-4, "feature_compressed_max": 1e-4},
            names.MOTION: {
                "degrees_max": 1e-4,
                "t_max": 1e-4,
                "exp_max": 1e-4,
                "scale_max": 1e-4,
                "kp_max": 1e-4,
            },
            names.WARP_DECODE: {
                "deformation_max": 1e-4,
                "occlusion_map_max": 1e-4,
                "warped_max": 5e-4,
                "image_max": 3.0,
                "image_off": 1e-3,
                _PSNR: 55.0,
            },
        },
        "fp16": {
            names.STITCHING: {"delta_max": 1e-3},
            names.RETARGET_EYE: {"delta_max": 1e-3},
            names.RETARGET_LIP: {"delta_max": 1e-3},
            names.APPEARANCE: {"feature_3d_max": 1e-2, "feature_compressed_max": 1e-2},
            names.MOTION: {
                "degrees_max": 5e-2,
                "t_max": 1e-3,
                "exp_max": 1e-3,
                "scale_max": 1e-3,
                "kp_max": 1e-3,
            },
            names.WARP_DECODE: {
                "deformation_max": 1e-3,
                "occlusion_map_max": 1e-2,
                "warped_max": 2e-2,
                _PSNR: 45.0,
            },
        },
        "int8": _EIGHT_BITS,
        "fp8": _EIGHT_BITS,
    }
)
"""Precision of a graph -> network -> figure -> limit.

``…_max`` is the largest absolute difference from PyTorch in fp32 (image: grey levels, degrees: of pose); where the
reference exceeds 1, the limit grows with its largest value, since rounding does. ``image_off`` is the share of values that
differ by more than one level. ``image_psnr_db`` is a lower bound, all others are upper bounds.
"""


@dataclass(frozen=True)
class Yardstick:
    """Inputs and what PyTorch makes of them, whole or thinned.

    ``arrays`` holds, for P = 3 pictures and K = 4 frames: ``crops`` u8 ``[P,256,256,3]``; the outputs of F and M for them under
    their names; ``frame_source`` int ``[K]``, the picture of each frame; ``kp_source``, ``kp_driving`` float32 ``[K,21,3]``;
    ``image``, ``deformation``, ``occlusion_map``, ``warped`` per frame; ``<network>_features``, ``<network>_delta`` of the three
    small networks. Thinned, the large ones are sampled as :data:`_STRIDES` says.
    """

    arrays: Mapping[str, Array]
    thinned: bool = False

    @classmethod
    def of(cls, networks: LivePortraitNetworks) -> Yardstick:
        """Run the networks in PyTorch; about a dozen seconds a frame on two cores."""
        arrays = _inputs()
        with torch.no_grad():
            for name in NETWORKS[:3]:
                x = torch.from_numpy(arrays[f"{name}_{names.FEATURES}"])
                arrays[f"{name}_{names.DELTA}"] = getattr(networks, name)(x).numpy()
            crops = torch.from_numpy(arrays["crops"]).permute(0, 3, 1, 2).float() / 255
            features = networks.appearance(crops)
            dense = networks.warping.dense_motion_network
            arrays[names.FEATURE_3D] = features.numpy()
            arrays[names.FEATURE_COMPRESSED] = torch.relu(dense.norm(dense.compress(features))).numpy()
            arrays.update(_motion(networks.motion(crops)))
            frames: dict[str, list[Array]] = {name: [] for name in (names.IMAGE, *_INSIDE)}
            # One frame at a time: the networks do not mix frames, and a batch would take its memory.
            for i, source in enumerate(arrays["frame_source"]):
                points = (
                    torch.from_numpy(arrays[key][i : i + 1]) for key in (names.KP_SOURCE, names.KP_DRIVING)
                )
                warp = networks.warping(features[source : source + 1], *points)
                image = networks.generator(warp[names.WARPED])
                frames[names.IMAGE].append(_levels(image))
                for name in _INSIDE:
                    frames[name].append(warp[name].numpy())
            arrays.update({name: np.concatenate(values) for name, values in frames.items()})
        return cls(arrays)

    @classmethod
    def from_table(cls, table: Mapping[str, Array]) -> Yardstick:
        """The thinned yardstick of a bundle.

        Raises:
            BundleError: something is missing in the table, or has the wrong type.
        """
        expected = {name: value.dtype for name, value in _inputs().items()}
        expected.update(dict.fromkeys(_OUTPUTS, np.dtype(np.float32)))
        expected[names.IMAGE] = np.dtype(np.uint8)
        for name, dtype in expected.items():
            if name not in table or table[name].dtype != dtype:
                raise BundleError(
                    f"the table {TABLE} has {'no ' + name if name not in table else f'{name} as {table[name].dtype}'}",
                    f"expected {name} as {dtype}",
                    "export the bundle again with lp-export",
                )
        return cls(dict(table), thinned=True)

    def table(self) -> dict[str, Array]:
        """The thinned yardstick for a bundle, about 1.1 MB."""
        return {name: _thin(name, value) for name, value in self.arrays.items()}


_STRIDES: Final[Mapping[str, tuple[int, ...]]] = {
    names.FEATURE_3D: (1, 1, 4, 8, 8),
    names.FEATURE_COMPRESSED: (1, 1, 4, 8, 8),
    names.IMAGE: (1, 4, 4, 1),
    names.DEFORMATION: (1, 4, 4, 4, 1),
    names.OCCLUSION_MAP: (1, 1, 2, 2),
    names.WARPED: (1, 8, 4, 4),
}
"""Tensor -> step along each axis in a thinned yardstick."""

_OUTPUTS: Final = (
    *(f"{name}_{names.DELTA}" for name in NETWORKS[:3]),
    names.FEATURE_3D, names.FEATURE_COMPRESSED, *_POSE, names.T, names.EXP, names.SCALE, names.KP, *_INSIDE,
)  # fmt: skip


def _thin(name: str, value: Array) -> Array:
    return np.ascontiguousarray(value[tuple(slice(None, None, step) for step in _STRIDES.get(name, ()))])


def _inputs() -> dict[str, Array]:
    rng = np.random.default_rng(20240703)
    coarse = rng.uniform(0, 255, (3, 12, 12, 3))
    crops = np.stack([cv2.resize(c, (256, 256), interpolation=cv2.INTER_CUBIC) for c in coarse])
    crops = np.clip(crops + rng.normal(0, 4, crops.shape), 0, 255).astype(np.uint8)
    spread = np.array([0.5, 0.5, 0.25])
    source = np.repeat(rng.uniform(-1, 1, (2, 21, 3)) * spread, [3, 1], axis=0)
    # still; an expression; a turn that takes many points out of the picture; another source
    moved = rng.normal(0, 1, source.shape) * np.array([0.0, 0.04, 0.9, 0.1])[:, None, None]
    arrays: dict[str, Array] = {
        "crops": crops,
        "frame_source": np.array([0, 0, 0, 1]),
        names.KP_SOURCE: source.astype(np.float32),
        names.KP_DRIVING: (source + moved).astype(np.float32),
    }
    for name, width in zip(NETWORKS[:3], (126, 66, 65), strict=True):
        arrays[f"{name}_{names.FEATURES}"] = rng.normal(0, 0.4, (3, width)).astype(np.float32)
    return arrays


def _motion(heads: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """The raw heads of M as its graph gives them out: degrees by the expectation over 66 bins of 3 degrees."""
    bins = torch.arange(66, dtype=torch.float64)
    result = {
        name: ((heads[name].double().softmax(1) * bins).sum(1, keepdim=True) * 3 - 97.5).float().numpy()
        for name in _POSE
    }
    result[names.T], result[names.SCALE] = heads[names.T].numpy(), heads[names.SCALE].numpy()
    for name in (names.EXP, names.KP):
        result[name] = heads[name].reshape(-1, 21, 3).numpy()
    return result


def _levels(image: torch.Tensor) -> Array:
    """``[N,3,H,W]`` in 0..1 -> u8 ``[N,H,W,3]``, cut off as the reference does."""
    return (image.permute(0, 2, 3, 1) * 255).clamp(0, 255).to(torch.uint8).numpy()


# -- measuring a graph --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """Inputs of one call, and which rows of the yardstick its outputs are to equal."""

    inputs: dict[str, Array]
    rows: tuple[int, ...]


def _cases(network: str, arrays: Mapping[str, Array], features: Mapping[str, Array]) -> Iterator[_Case]:
    if network == names.WARP_DECODE:
        for frames, shared in (((3,), True), ((0, 1, 2), True), ((3, 1), False)):
            sources = [int(arrays["frame_source"][i]) for i in (frames[:1] if shared else frames)]
            picked = list(frames)
            yield _Case(
                {
                    **{
                        name: features[name][sources] for name in (names.FEATURE_3D, names.FEATURE_COMPRESSED)
                    },
                    **{name: arrays[name][picked] for name in (names.KP_SOURCE, names.KP_DRIVING)},
                },
                frames,
            )
        return
    name, key = (
        (names.FEATURES, f"{network}_{names.FEATURES}") if network in NETWORKS[:3] else (names.IMAGE, "crops")
    )
    for rows in ((0, 1, 2), (1,)):
        yield _Case({name: arrays[key][list(rows)]}, rows)


def on_cpu(graph: Path | bytes, name: str) -> AbstractContextManager[Inferring]:
    """A graph on ONNX Runtime's CPU provider."""
    return open_runner(graph, BackendConfig("cpu"), name=name)


def shapes_of(
    network: str, yardstick: Yardstick, features: Mapping[str, Array]
) -> dict[str, list[tuple[int, ...]]]:
    """Shapes that :func:`measure` will feed: input -> one per call."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for case in _cases(network, yardstick.arrays, features):
        for name, value in case.inputs.items():
            shapes.setdefault(name, []).append(value.shape)
    return shapes


def features_of(graph: Path | bytes, yardstick: Yardstick) -> dict[str, Array]:
    """What a graph of F makes of the yardstick's pictures: input for :func:`measure` of the warp."""
    with on_cpu(graph, names.APPEARANCE) as runner:
        return {k: np.array(v) for k, v in runner.infer({names.IMAGE: yardstick.arrays["crops"]}).items()}


def measure(
    network: str,
    graph: Path | bytes,
    yardstick: Yardstick,
    *,
    features: Mapping[str, Array] | None = None,
    inside: onnx.ModelProto | None = None,
    run: Callable[[Path | bytes, str], AbstractContextManager[Inferring]] = on_cpu,
) -> tuple[dict[str, float], dict[str, float]]:
    """Run a graph and compare it with the yardstick.

    Args:
        network: one of :data:`NETWORKS`.
        graph: the ONNX file or its bytes.
        yardstick: what to equal.
        features: outputs of F for the warp; None = those of the yardstick, which must then not be thinned.
        inside: the warp's model, which is cut at the tensors inside; it is altered. None leaves these figures out.
        run: what runs the graph.

    Returns:
        The figures of :data:`TOLERANCES`, and the largest value of the reference for each ``…_max``.
    """
    figures: dict[str, float] = {}
    scales: dict[str, float] = {}
    features = yardstick.arrays if features is None else features
    cases = list(_cases(network, yardstick.arrays, features))

    def compare(name: str, got: Array, rows: tuple[int, ...]) -> None:
        key = f"{network}_{name}" if name == names.DELTA else name
        want = yardstick.arrays[key][list(rows)]
        if yardstick.thinned:
            got = _thin(key, got)
        if got.shape != want.shape:
            raise ExportError(
                f"{network} gives {name} of {got.shape}", f"expected {want.shape}", "report this"
            )
        for figure, value in _figures(name, got, want).items():
            worst = min if figure == _PSNR else max
            figures[figure] = worst(figures.get(figure, value), value)
            scales[figure] = max(scales.get(figure, 1.0), float(np.abs(want).max()))

    with run(graph, network) as runner:
        for case in cases:
            for name, value in runner.infer(case.inputs).items():
                compare(name, np.asarray(value), case.rows)
    if inside is not None:
        with on_cpu(_cut(inside, _INSIDE), f"{network}, inside") as runner:
            for case in cases[1:]:
                for name, value in runner.infer(case.inputs).items():
                    compare(name, np.asarray(value), case.rows)
    return figures, scales


def _figures(name: str, got: Array, want: Array) -> dict[str, float]:
    # fp64, so that the comparison adds nothing; not a number is as far as it gets
    gap = np.abs(got.astype(np.float64) - want.astype(np.float64))
    gap = np.nan_to_num(gap, nan=np.finfo(np.float32).max, posinf=np.finfo(np.float32).max)
    if name != names.IMAGE:
        return {"degrees_max" if name in _POSE else f"{name}_max": float(gap.max())}
    mse = float(np.square(gap).mean(axis=(1, 2, 3)).max())  # of the worst picture
    return {"image_max": float(gap.max()), "image_off": float((gap > 1).mean()), _PSNR: psnr_db(mse)}


def _cut(model: onnx.ModelProto, tensors: tuple[str, ...]) -> bytes:
    """The part of a graph that these tensors need, with them as its outputs."""
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    if lost := [name for name in tensors if name not in made]:
        raise ExportError(
            f"the graph has no tensor {', '.join(lost)}",
            f"expected {', '.join(tensors)} inside",
            "report this",
        )
    needed = set(tensors)
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in needed]
    cut = onnx.GraphProto(name=graph.name, node=reversed(nodes), initializer=kept, input=graph.input)
    del graph.initializer[:], graph.node[:]
    # Without a type: ONNX Runtime infers it, and it differs between precisions.
    cut.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=cut)
    return serialise(part)


def broken(
    network: str, precision: str, figures: Mapping[str, float], scales: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Figures beyond their limit: figure -> (got, limit)."""
    result = {}
    for figure, limit in TOLERANCES[precision][network].items():
        if figure not in figures:
            continue
        got = figures[figure]
        limit = limit * scales[figure] if figure.endswith("_max") and figure != "image_max" else limit
        good = got >= limit if figure == _PSNR else got <= limit
        if not good:
            result[figure] = (got, limit)
    return result
