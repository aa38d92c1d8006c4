"""Fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from lp_edge.engines.bundle import BundleWriter
from lp_edge.runtime import topology

TOYS = Path(__file__).resolve().parent / "toys"

# A shell starts what runs in the background with Ctrl-C ignored, and processes inherit that: those that tests interrupt must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data (samples, labels): ``../shared`` of the project, or ``$LP_EDGE_SHARED``."""
    default = Path(__file__).resolve().parent.parent.parent / "shared"
    folder = Path(os.environ.get("LP_EDGE_SHARED") or default)
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set LP_EDGE_SHARED")
    return folder


@pytest.fixture(scope="session")
def toys() -> Path:
    """Folder of the toy networks; tests/toys/make_toys.py says what they compute."""
    return TOYS


@pytest.fixture(scope="session")
def _toy_bundle_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "bundle"
    with BundleWriter(
        folder,
        family="mesh",
        variant="toy",
        licence="Apache-2.0",
        created_by="lp-edge tests",
        keypoints=topology.NUM_POINTS,
        normalisation="none",
        regions=topology.REGIONS,
    ) as writer:
        for name in ("face_detector", "face_mesh", "warp_decode"):
            writer.add_network(name, TOYS / f"{name}.onnx", precision="fp32", opset=17)
        with np.load(TOYS / "canonical.npz", allow_pickle=False) as table:
            writer.add_table("canonical", dict(table))
    return folder


@pytest.fixture
def toy_bundle(_toy_bundle_once: Path, tmp_path: Path) -> Path:
    """Folder of a bundle of the toy networks; every test has a copy that it may damage."""
    folder = tmp_path / "toy_bundle"
    shutil.copytree(_toy_bundle_once, folder)
    return folder


@pytest.fixture(scope="session")
def _liveportrait_bundle_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toys") / "liveportrait"
    with BundleWriter(
        folder,
        family="liveportrait",
        variant="toy",
        licence="Apache-2.0",
        created_by="lp-edge tests",
        keypoints=21,
        normalisation="none",
        sizes={"crop": 512, "input": 256},
    ) as writer:
        for name in ("face_detector", "face_mesh"):
            writer.add_network(name, TOYS / f"{name}.onnx", precision="fp32", opset=17)
        for graph in sorted((TOYS / "liveportrait").glob("*.onnx")):
            writer.add_network(graph.stem, graph, precision="fp32", opset=17)
        for table, path in (
            ("canonical", TOYS / "canonical.npz"),
            ("liveportrait_map", TOYS / "liveportrait" / "liveportrait_map.npz"),
        ):
            with np.load(path, allow_pickle=False) as arrays:
                writer.add_table(table, dict(arrays))
    return folder


@pytest.fixture
def liveportrait_bundle(_liveportrait_bundle_once: Path, tmp_path: Path) -> Path:
    """Folder of a toy bundle of the family liveportrait (tests/toys/make_liveportrait_toys.py); a copy for every test."""
    folder = tmp_path / "liveportrait_bundle"
    shutil.copytree(_liveportrait_bundle_once, folder)
    return folder
