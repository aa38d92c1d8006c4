"""Builds the bundle of the ``mesh`` family: exports the warp, checks it against PyTorch, gathers the trained networks.

The detector and the face mesh are trained (:mod:`lp_edge.export.training`) and exported there, with their own
parity check; the warp has no weights and is exported here. Takes about ten seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253
import torch  # noqa: TID253

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.bundle import Bundle, BundleWriter, builtin_directory, open_bundle
from lp_edge.errors import ExportError
from lp_edge.export.lint import TARGETS, check
from lp_edge.export.mesh.warp import MeshWarp
from lp_edge.export.onnx_export import Shape, export_onnx, node_count, serialise, state_shapes
from lp_edge.export.opset import opset_of
from lp_edge.export.training import face_detector, face_mesh
from lp_edge.runtime import topology
from lp_edge.runtime.face_motion import Canonical
from lp_edge.runtime.geometry import rotation_from_euler

__all__ = ["TOLERANCES", "BuildReport", "NetworkReport", "build", "export_warp", "verify"]

_OPSET = 17
_NETWORKS = (names.FACE_DETECTOR, names.FACE_MESH, names.WARP_DECODE)
_SHAPES = {names.FACE_DETECTOR: face_detector.SHAPES, names.FACE_MESH: face_mesh.SHAPES}
_CARDS = ("face_detector.md", "face_mesh.md")
_TABLES = ("canonical", "liveportrait_map")

TOLERANCES = {"image_max": 2.0, "image_mean": 0.02, "deformation_max": 0.02}
"""Largest differences from PyTorch that are let through: grey levels (max, mean) and pixels of the sampling position."""


@dataclass(frozen=True)
class NetworkReport:
    """One row of the export's table: name, nodes, bytes, opset, parity figures, seconds it took."""

    name: str
    nodes: int
    size: int
    opset: int
    parity: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class BuildReport:
    """What an export made: the bundle's folder, its networks and how long it took in seconds."""

    output: Path
    networks: tuple[NetworkReport, ...]
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Plain containers for JSON."""
        return {**asdict(self), "output": str(self.output)}


def export_warp(canonical: npt.NDArray[np.float32]) -> tuple[MeshWarp, bytes]:
    """The warp as a PyTorch module and as ONNX bytes.

    Args:
        canonical: float32 ``[478, 3]`` canonical face.

    Raises:
        ExportError: as :func:`~lp_edge.export.onnx_export.export_onnx`.
    """
    module = MeshWarp(canonical).eval()
    # two faces in a picture that is not square: no axis may be mistaken for another
    source, driving = next(_cases(canonical, 2, 160, 128))[1:]
    image = torch.zeros(1, 160, 128, 3, dtype=torch.uint8)
    grid = module.config.grid
    model = export_onnx(
        module,
        {
            names.SOURCE_IMAGE: image,
            names.KP_SOURCE: torch.from_numpy(source),
            names.KP_DRIVING: torch.from_numpy(driving),
        },
        {
            names.IMAGE: ("batch", "height", "width", 3),
            names.DEFORMATION: ("batch", grid, grid, 2),
        },
        {
            names.SOURCE_IMAGE: {0: "sources", 1: "height", 2: "width"},
            names.KP_SOURCE: {0: "batch"},
            names.KP_DRIVING: {0: "batch"},
        },
        _OPSET,
    )
    return module, serialise(model)


def _trained(path: Path, shapes: Mapping[str, Shape]) -> bytes:
    """A trained network with the shapes of its outputs stated; nodes and weights stay as they are."""
    model = onnx.load(path)
    state_shapes(model, shapes)
    return serialise(model)


def _cases(
    canonical: npt.NDArray[np.float32], batch: int, height: int, width: int
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Reproducible inputs of the warp: still, turned, with a changed expression, and both."""
    rng = np.random.default_rng(7)
    face = canonical / float(np.ptp(canonical[:, :2], axis=0).max())
    face = face - face.mean(0)
    side = 0.45 * min(height, width)
    for angle, noise in ((0.0, 0.0), (25.0, 0.0), (0.0, 0.01), (15.0, 0.02)):
        image = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        centre = np.array([width / 2, height / 2, 0.0])
        source = np.stack([face * side + centre] * batch)
        turn = rotation_from_euler(0.3 * angle, angle, 0.2 * angle)
        shape = face + rng.normal(0.0, noise, (batch, *face.shape))
        yield image, source.astype(np.float32), (shape @ turn.T * side + centre).astype(np.float32)


def verify(module: MeshWarp, graph: bytes) -> dict[str, float]:
    """Compare the ONNX warp with PyTorch on sizes, batches and motions; returns the figures of :data:`TOLERANCES`.

    Raises:
        ExportError: a tolerance is broken; the message holds the figures.
    """
    canonical = np.asarray(module.canonical, np.float32)
    worst = dict.fromkeys(TOLERANCES, 0.0)
    with open_runner(graph, BackendConfig("cpu"), name=names.WARP_DECODE) as runner:
        for batch, height, width in ((1, 256, 256), (3, 192, 320), (1, 640, 512)):
            for image, source, driving in _cases(canonical, batch, height, width):
                got = runner.infer(
                    {names.SOURCE_IMAGE: image, names.KP_SOURCE: source, names.KP_DRIVING: driving}
                )
                with torch.no_grad():
                    want = module(*(torch.from_numpy(x) for x in (image, source, driving)))
                gap = np.abs(np.asarray(got[names.IMAGE], np.int16) - want[0].numpy().astype(np.int16))
                far = np.abs(np.asarray(got[names.DEFORMATION]) - want[1].numpy())
                figures = {
                    "image_max": float(gap.max()),
                    "image_mean": float(gap.mean()),
                    "deformation_max": float(far.max()),
                }
                worst = {name: max(worst[name], figures[name]) for name in worst}
    broken = {name: value for name, value in worst.items() if not value <= TOLERANCES[name]}
    if broken:
        raise ExportError(
            f"the warp differs from PyTorch: {broken}", f"expected at most {TOLERANCES}", "report this"
        )
    return worst


def build(
    output: Path, *, weights: Path | None = None, report: Callable[[str], None] = lambda _: None
) -> BuildReport:
    """Write the bundle of the ``mesh`` family.

    Args:
        output: folder to write; an older bundle there is replaced when everything is ready, not before.
        weights: folder with ``face_detector.onnx``, ``face_mesh.onnx``, their cards and the tables; ``None`` takes those
            of the built-in bundle.
        report: gets one line of text per step.

    Raises:
        ExportError: parity is broken, a graph fails the linter, or a file of ``weights`` is missing.
        BundleError: the output cannot be written.
    """
    start = time.perf_counter()
    origin = builtin_directory() if weights is None else weights
    needed = [f"{n}.onnx" for n in _NETWORKS[:2]] + [f"{t}.npz" for t in _TABLES] + list(_CARDS)
    missing = [name for name in needed if not (origin / name).is_file()]
    if missing:
        raise ExportError(
            f"{origin} lacks {', '.join(missing)}",
            "expected the trained networks and tables",
            "train them or reinstall",
        )
    tables = {name: dict(np.load(origin / f"{name}.npz", allow_pickle=False)) for name in _TABLES}
    canonical = Canonical.from_table(tables["canonical"])
    rows: list[NetworkReport] = []
    with BundleWriter(
        output,
        family="mesh",
        variant="default",
        licence="Apache-2.0",
        created_by=f"lp-edge {metadata.version('lp-edge')}",
        keypoints=topology.NUM_POINTS,
        normalisation="uint8 RGB in and out; scaling is in the graphs",
        regions={name: tuple(indices) for name, indices in topology.REGIONS.items()},
    ) as writer:
        for name in _NETWORKS:
            begin = time.perf_counter()
            parity: dict[str, float] = {}
            if name == names.WARP_DECODE:
                report(f"exporting {name}")
                module, graph = export_warp(canonical.points)
                report(f"checking {name} against PyTorch")
                parity = verify(module, graph)
            else:
                report(f"adding {name}")
                graph = _trained(origin / f"{name}.onnx", _SHAPES[name])
            model = onnx.load_from_string(graph)
            # The family has no flavours: its graphs go everywhere.
            for target in TARGETS:
                for warning in check(model, target, name):
                    report(f"{name}: {target}: {warning}")
            entry = writer.add_network(name, graph, precision="fp32", opset=opset_of(model), parity=parity)
            seconds = time.perf_counter() - begin
            rows.append(NetworkReport(name, node_count(model), entry.size, entry.opset, parity, seconds))
        for name, table in tables.items():
            writer.add_table(name, table)
        for card in _CARDS:
            writer.add_file(f"{Path(card).stem}_card", origin / card, file=card)
    bundle: Bundle = open_bundle(output)
    report(f"wrote {bundle.directory}")
    return BuildReport(output, tuple(rows), time.perf_counter() - start)
