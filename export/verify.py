"""Repeats the parity check on a finished bundle of any family."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx  # noqa: TID253

from lp_edge.engines import names
from lp_edge.engines.bundle import open_bundle
from lp_edge.errors import BundleError, ConfigError
from lp_edge.export.liveportrait import build as liveportrait
from lp_edge.export.mesh import build as mesh
from lp_edge.export.mesh.warp import MeshWarp
from lp_edge.export.onnx_export import node_count
from lp_edge.export.opset import opset_of
from lp_edge.runtime.face_motion import Canonical

__all__ = ["verify_bundle"]


def verify_bundle(
    path: Path, *, weights: Path | None = None, report: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Verify a bundle's files and its parity.

    Args:
        path: folder of the bundle.
        weights: folder of the checkpoints it came from (family ``liveportrait`` only); None = compare with what the export
            left in the bundle.
        report: gets one line of text per step.

    Returns:
        Plain containers: at least ``family``, ``networks`` (rows with name, nodes, size, opset, parity, seconds), ``seconds``.

    Raises:
        BundleError: no bundle, altered, or of an unknown family.
        ConfigError: weights for a family that has none.
        ExportError: a tolerance is broken, or the weights are not those the bundle came from.
    """
    bundle = open_bundle(path)
    family = bundle.manifest.family
    if family == "liveportrait":
        return {"family": family, **liveportrait.verify(path, weights=weights, report=report).as_dict()}
    if family != "mesh":
        raise BundleError(
            f"{path} is a bundle of the family {family!r}", "expected mesh or liveportrait", "update lp-edge"
        )
    if weights is not None:
        raise ConfigError(
            "--weights for a bundle of the family mesh",
            "expected none: its warp has no weights",
            "leave it out",
        )
    start = time.perf_counter()
    report(f"checking {names.WARP_DECODE} against PyTorch")
    file = bundle.path_of(names.WARP_DECODE)
    module = MeshWarp(Canonical.from_table(bundle.load_table("canonical")).points).eval()
    parity = mesh.verify(module, file.read_bytes())
    model = onnx.load(file)
    seconds = time.perf_counter() - start
    row = mesh.NetworkReport(
        names.WARP_DECODE, node_count(model), file.stat().st_size, opset_of(model), parity, seconds
    )
    return {"family": family, **mesh.BuildReport(path, (row,), seconds).as_dict()}
