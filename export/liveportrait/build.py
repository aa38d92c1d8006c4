"""Builds, verifies and compares bundles of the ``liveportrait`` family: weights in, checked graphs out.

One network after another is exported, linted, compared with PyTorch and staged; the bundle appears when all of them passed.
The face networks, the canonical face and the map from it to LivePortrait's keypoints come from the built-in bundle.
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy.typing as npt
import onnx  # noqa: TID253

from lp_edge.engines import names, trt_build
from lp_edge.engines.bundle import Bundle, BundleWriter, CheckpointEntry, open_bundle
from lp_edge.errors import BackendUnavailable, BundleError, ConfigError, ExportError
from lp_edge.export import hub
from lp_edge.export.checkpoints import load_networks, verified
from lp_edge.export.inventory import UNVERIFIED, VARIANTS, Variant
from lp_edge.export.lint import check
from lp_edge.export.liveportrait import graphs
from lp_edge.export.liveportrait.parity import (
    NETWORKS,
    TABLE,
    TOLERANCES,
    Inferring,
    Yardstick,
    broken,
    features_of,
    measure,
    shapes_of,
)
from lp_edge.export.networks import LivePortraitNetworks
from lp_edge.export.onnx_export import node_count, serialise, split_weights
from lp_edge.export.opset import opset_of

__all__ = [
    "FLAVORS",
    "LARGE",
    "PRECISIONS",
    "BuildReport",
    "NetworkReport",
    "build",
    "compare",
    "default_output",
    "verify",
]

Flavor = Literal["main", "tensorrt8"]
Precision = Literal["fp32", "fp16"]
FLAVORS: Final[tuple[Flavor, ...]] = get_args(Flavor)
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)

GraphBuilder = Callable[..., onnx.ModelProto]
"""``(name, networks, *, flavor, precision) -> model``."""

Report = Callable[[str], None]

_FACES: Final = (names.FACE_DETECTOR, names.FACE_MESH)
_TABLES: Final = ("canonical", "liveportrait_map")
_CARDS: Final = ("face_detector_card", "face_mesh_card")
_KEYPOINTS: Final = 21
LARGE: Final = 64 << 20
"""Bytes of a graph from which its weights go into a file beside it."""
# Precision -> what Polygraphy tells a TensorRT that has no typed networks.
_WEAK: Final[Mapping[str, dict[str, Any]]] = {
    "fp16": {"fp16": True, "precision_constraints": "obey"},
    "int8": {"int8": True},
}
# Indices of the keypoints that the reference moves alone in its 'lip' and 'eyes' modes (live_portrait_pipeline.py).
_LIP: Final = (6, 12, 14, 17, 19, 20)
_EYES: Final = (11, 13, 15, 16, 18)
_REGIONS: Final = {
    "lip": _LIP,
    "eyes": _EYES,
    "rest": tuple(i for i in range(_KEYPOINTS) if i not in _LIP + _EYES),
}


@dataclass(frozen=True)
class NetworkReport:
    """One row of the export's table: name, operators, bytes, opset, precision, parity figures, seconds it took."""

    name: str
    nodes: int
    size: int
    opset: int
    precision: str
    parity: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class BuildReport:
    """What an export made (or a verification found): the bundle's folder, its networks, seconds, what to know.

    Attributes:
        checkpoints: what the weights came from.
        licence: of the bundle.
        warnings: remarks of the linter and on the weights.
    """

    output: Path
    variant: str
    networks: tuple[NetworkReport, ...]
    checkpoints: tuple[CheckpointEntry, ...]
    licence: str
    warnings: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Plain containers for JSON."""
        return {**asdict(self), "output": str(self.output)}


def default_output(variant: str, precision: str, flavor: str = "main") -> Path:
    """The folder that an export writes by default: ``liveportrait-human-fp32`` in the current one, for example."""
    return Path("-".join(["liveportrait", variant, precision, *([flavor] if flavor != "main" else [])]))


def build(
    output: Path,
    *,
    weights: Path | None = None,
    variant: Variant = "human",
    precision: Precision = "fp32",
    flavor: Flavor = "main",
    allow_unverified: bool = False,
    offline: bool = False,
    endpoint: str | None = None,
    report: Report = lambda _: None,
    progress: hub.Progress | None = None,
    load: Callable[..., tuple[LivePortraitNetworks, tuple[CheckpointEntry, ...]]] = load_networks,
    build_graph: GraphBuilder = graphs.build_graph,
    reference: Callable[[LivePortraitNetworks], Yardstick] = Yardstick.of,
) -> BuildReport:
    """Write a bundle of the ``liveportrait`` family.

    Args:
        output: folder to write; an older bundle there is replaced when everything is ready, not before.
        weights: folder of the checkpoints, see :func:`~lp_edge.export.checkpoints.load_networks`; None downloads them.
        variant: ``human`` or ``animal``.
        precision: ``fp32``, or ``fp16`` with fp32 where half precision is not enough (M entirely).
        flavor: ``main``, or ``tensorrt8`` for TensorRT 8.5 (JetPack 5).
        allow_unverified: take weights that are not the official files; the manifest records it.
        offline, endpoint: for the download, see :func:`lp_edge.export.hub.fetch`.
        report: gets one line of text per step.
        progress: of the download.
        load, build_graph, reference: what loads the networks, makes a graph of one of them, and says what they compute.

    Raises:
        ConfigError: an unknown variant, precision or flavour, or options that contradict each other.
        ExportError: the weights are refused, a graph fails the linter or breaks a tolerance.
        BundleError: the output cannot be written; nothing is left behind.
        OutputError: a download cannot be stored.

    Example:
        >>> build(Path("human"), weights=Path("pretrained_weights"))  # doctest: +SKIP
    """
    start = time.perf_counter()
    _known("variant", variant, VARIANTS)
    _known("precision", precision, PRECISIONS)
    _known("flavor", flavor, FLAVORS)
    if weights is not None and (offline or endpoint is not None):
        raise ConfigError(
            "weights are given together with a download option", "expected one of them", "leave one out"
        )
    builtin = open_bundle()
    # A place that cannot be written is told now, not after a download.
    BundleWriter(
        output,
        family="liveportrait",
        variant=variant,
        licence="",
        created_by="",
        keypoints=0,
        normalisation="",
    ).abort()
    if weights is None:
        weights = hub.fetch(
            variant,
            endpoint=endpoint,
            offline=offline,
            allow_unverified=allow_unverified,
            report=report,
            progress=progress,
        )
    report(f"loading the weights from {weights}")
    networks, entries = load(weights, variant=variant, allow_unverified=allow_unverified)
    licence = " AND ".join(
        dict.fromkeys([*sorted({e.licence for e in entries}, reverse=True), builtin.manifest.licence])
    )
    report(f"licence of the bundle: {licence}")
    warnings = [
        f"{e.name} is not the official file: its licence and its quality are unknown"
        for e in entries
        if e.licence == UNVERIFIED
    ]
    with BundleWriter(
        output,
        family="liveportrait",
        variant=variant,
        licence=licence,
        created_by=f"lp-edge {metadata.version('lp-edge')}",
        keypoints=_KEYPOINTS,
        normalisation="uint8 RGB in and out; scaling is in the graphs",
        checkpoints=entries,
        regions=_REGIONS,
        sizes={"input": 256, "crop": 512},
    ) as writer:
        report("running PyTorch as the yardstick")
        yardstick = reference(networks)
        rows = []
        for name in NETWORKS:
            begin = time.perf_counter()
            report(f"exporting {name}")
            model = build_graph(name, networks, flavor=flavor, precision=precision)
            if name == NETWORKS[-1]:
                del networks  # half a gigabyte less for the last and largest comparison
            warnings += [f"{name}: {finding}" for finding in check(model, flavor, name)]
            graph, nodes, opset, kind = (
                serialise(model),
                node_count(model),
                opset_of(model),
                _precision(model),
            )
            inside = model if name == names.WARP_DECODE else None
            report(f"checking {name} against PyTorch")
            data = None
            if len(graph) > LARGE:
                stored, data = split_weights(model, f"{name}.onnx.data")
            figures = _checked(name, graph, kind, yardstick, inside=inside)
            del model, inside
            stored = graph if data is None else stored
            del graph
            entry = writer.add_network(name, stored, precision=kind, opset=opset, parity=figures, data=data)
            del stored, data
            gc.collect()
            rows.append(
                NetworkReport(
                    name, nodes, entry.total_size, opset, kind, figures, time.perf_counter() - begin
                )
            )
        rows += _copy(builtin, writer)
        writer.add_table(TABLE, yardstick.table())
        result = BuildReport(
            output, variant, tuple(rows), entries, licence, tuple(warnings), time.perf_counter() - start
        )
        writer.add_file("report", _document(result, precision, flavor), file="report.json")
    report(f"wrote {output}")
    return result


def _known(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"the {what} {value!r}", f"expected one of {', '.join(choices)}", "correct it")


def _precision(model: onnx.ModelProto) -> Precision:
    """fp16 as soon as any weight is stored in half precision."""
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return "fp16" if half else "fp32"


def _checked(
    name: str, graph: Path | bytes, precision: str, yardstick: Yardstick, **options: Any
) -> dict[str, float]:
    """The parity figures of a graph; ExportError when one is beyond its limit."""
    figures, scales = measure(name, graph, yardstick, **options)
    if wrong := broken(name, precision, figures, scales):
        raise ExportError(
            f"{name} ({precision}) differs from PyTorch: "
            + ", ".join(f"{figure} {got:.3g}" for figure, (got, _) in wrong.items()),
            "expected " + ", ".join(f"{figure} {limit:.3g}" for figure, (_, limit) in wrong.items()),
            "report this with the versions that lp-doctor prints",
        )
    return figures


def _copy(builtin: Bundle, writer: BundleWriter) -> Iterator[NetworkReport]:
    for name in _FACES:
        begin = time.perf_counter()
        entry, path = builtin.network(name), builtin.path_of(name)
        writer.add_network(name, path, precision=entry.precision, opset=entry.opset, parity=entry.parity)
        nodes = node_count(onnx.load(path, load_external_data=False))
        yield NetworkReport(
            name,
            nodes,
            entry.total_size,
            entry.opset,
            entry.precision,
            dict(entry.parity),
            time.perf_counter() - begin,
        )
    for table in _TABLES:
        writer.add_table(table, builtin.load_table(table))
    for card in _CARDS:
        path = builtin.path_of_file(card)
        writer.add_file(card, path, file=path.name)


def _document(result: BuildReport, precision: str, flavor: str) -> bytes:
    versions = {name: metadata.version(name) for name in ("lp-edge", "torch", "onnx", "onnxruntime", "numpy")}
    content = {
        "family": "liveportrait",
        "variant": result.variant,
        "precision": precision,
        "flavor": flavor,
        "licence": result.licence,
        "versions": versions,
        "checkpoints": [asdict(entry) for entry in result.checkpoints],
        "networks": [asdict(row) for row in result.networks],
        "tolerances": {
            row.name: dict(TOLERANCES[row.precision][row.name])
            for row in result.networks
            if row.name in NETWORKS
        },
        "warnings": list(result.warnings),
        "seconds": result.seconds,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# -- a finished bundle --------------------------------------------------------------------------------


def _open(path: Path) -> Bundle:
    bundle = open_bundle(path)
    manifest = bundle.manifest
    if manifest.family != "liveportrait":
        raise BundleError(
            f"{path} is a bundle of the family {manifest.family}",
            "expected the family liveportrait",
            "give a bundle that lp-export --family liveportrait wrote",
        )
    for name in NETWORKS:
        bundle.network(name)
    return bundle


def verify(
    path: Path,
    *,
    weights: Path | None = None,
    report: Report = lambda _: None,
    load: Callable[..., tuple[LivePortraitNetworks, tuple[CheckpointEntry, ...]]] = load_networks,
) -> BuildReport:
    """Repeat parity on a finished bundle.

    Args:
        path: folder of the bundle.
        weights: folder of the checkpoints it came from: everything is computed again by PyTorch. None compares with the
            thinned yardstick that the export left in the bundle; F's own output is then the warp's input.
        report: gets one line of text per step.
        load: what loads the networks.

    Raises:
        BundleError: no bundle, altered, or of another family.
        ExportError: a tolerance is broken, or the weights are not those the bundle came from.
    """
    start = time.perf_counter()
    bundle = _open(path)
    manifest = bundle.manifest
    features: Mapping[str, npt.NDArray[Any]] | None = None
    if weights is None:
        yardstick = Yardstick.from_table(bundle.load_table(TABLE))
        report("comparing with the results that PyTorch gave at export")
        features = features_of(bundle.path_of(names.APPEARANCE), yardstick)
    else:
        networks, entries = load(
            weights, variant=manifest.variant, allow_unverified=not verified(manifest.checkpoints)
        )
        told = {(e.name, e.sha256) for e in manifest.checkpoints}
        if other := [e for e in entries if (e.name, e.sha256) not in told]:
            raise ExportError(
                f"{weights} has another {other[0].name} than the bundle came from (SHA-256 {other[0].sha256[:16]}…)",
                f"expected {', '.join(s[:16] + '…' for n, s in sorted(told) if n == other[0].name) or 'no such file'}",
                "give the weights of this bundle, or leave --weights out",
            )
        report("running PyTorch as the yardstick")
        yardstick = Yardstick.of(networks)
        del networks
    rows = []
    for name in NETWORKS:
        begin = time.perf_counter()
        report(f"checking {name}")
        entry, file = bundle.network(name), bundle.path_of(name)
        model = onnx.load(file)
        nodes = node_count(model)
        if name == names.WARP_DECODE:
            figures = _checked(name, file, entry.precision, yardstick, features=features, inside=model)
        else:
            figures = _checked(name, file, entry.precision, yardstick)
        rows.append(
            NetworkReport(
                name,
                nodes,
                entry.total_size,
                entry.opset,
                entry.precision,
                figures,
                time.perf_counter() - begin,
            )
        )
    return BuildReport(
        path,
        manifest.variant,
        tuple(rows),
        manifest.checkpoints,
        manifest.licence,
        (),
        time.perf_counter() - start,
    )


def compare(path: Path, *, report: Report = lambda _: None) -> BuildReport:
    """Build every network with TensorRT, through Polygraphy, and compare what it computes with PyTorch's results.

    The limits are those of fp16, or of 8 bits: TensorRT multiplies in TF32 where it may. Engines live in memory only.

    Args:
        path: folder of the bundle.
        report: gets one line of text per step.

    Raises:
        BackendUnavailable: TensorRT or Polygraphy is not installed.
        BundleError: no bundle, altered, or of another family.
        ExportError: TensorRT cannot build a network, or a tolerance is broken.
    """
    start = time.perf_counter()
    bundle = _open(path)
    manifest = bundle.manifest
    trt, backend = _polygraphy()
    yardstick = Yardstick.from_table(bundle.load_table(TABLE))
    features = features_of(bundle.path_of(names.APPEARANCE), yardstick)
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    rows, broken_ones = [], []
    for name in NETWORKS:
        begin = time.perf_counter()
        entry, file = bundle.network(name), bundle.path_of(name)
        report(f"building {name} with TensorRT {trt.__version__}")
        profile = backend.Profile()
        for tensor, shapes in shapes_of(name, yardstick, features).items():
            profile.add(tensor, min(shapes), shapes[0], max(shapes))
        # Where networks are typed, the graph says the precision; older versions need to be let and held.
        flags: dict[str, Any] = {} if typed else _WEAK.get(entry.precision, {})

        def engine(
            graph: Path | bytes, _name: str, profile: Any = profile, flags: dict[str, Any] = flags
        ) -> contextlib.AbstractContextManager[Inferring]:
            network = backend.NetworkFromOnnxPath(str(graph), **({"strongly_typed": True} if typed else {}))
            config = backend.CreateConfig(profiles=[profile], **flags)
            return backend.TrtRunner(backend.EngineFromNetwork(network, config))

        try:
            figures, scales = measure(name, file, yardstick, features=features, run=engine)
        except ExportError:
            raise
        except Exception as error:  # Polygraphy's and TensorRT's errors have no common root
            raise ExportError(
                f"TensorRT {trt.__version__} cannot run {name} ({type(error).__name__}: {error})",
                "expected an engine",
                "export with --flavor tensorrt8 for TensorRT 8.5, or report this",
            ) from error
        rows.append(
            NetworkReport(
                name,
                node_count(onnx.load(file, load_external_data=False)),
                entry.total_size,
                entry.opset,
                entry.precision,
                figures,
                time.perf_counter() - begin,
            )
        )
        limits = entry.precision if entry.precision in ("int8", "fp8") else "fp16"
        broken_ones += [
            f"{name} {k} {got:.3g}" for k, (got, _) in broken(name, limits, figures, scales).items()
        ]
    if broken_ones:
        raise ExportError(
            f"TensorRT {trt.__version__} differs from PyTorch: {', '.join(broken_ones)}",
            "expected the tolerances of fp16",
            "report this with the versions that lp-doctor prints",
        )
    return BuildReport(
        path,
        manifest.variant,
        tuple(rows),
        manifest.checkpoints,
        manifest.licence,
        (),
        time.perf_counter() - start,
    )


def _polygraphy() -> tuple[Any, Any]:
    try:
        import tensorrt
        from polygraphy.backend import trt  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        package = "tensorrt" if error.name == "tensorrt" else "polygraphy"
        raise BackendUnavailable(
            f"comparing needs {package}, which is not installed",
            "expected TensorRT and Polygraphy",
            f"{trt_build.remedy().partition(';')[0]}, then pip install 'lp-edge[tensorrt]'",
        ) from error
    return tensorrt, trt
