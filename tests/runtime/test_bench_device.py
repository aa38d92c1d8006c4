"""The measurements of lp-bench and the steps of benchmarks/gpu/run.py on a fake TensorRT over a fake CUDA device.

Times mean nothing there; what is kept on the device, what is uploaded and what is freed is held to account by the fakes.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the fake TensorRT computes with ONNX")

import lp_edge
from lp_edge.engines.backends import BackendConfig
from lp_edge.runtime import bench_soak as soak_module
from lp_edge.runtime.bench_compare import bench_compare, runner_side
from lp_edge.runtime.bench_networks import bench_networks, networks_table
from lp_edge.runtime.bench_pipeline import bench_pipeline
from lp_edge.runtime.bench_soak import bench_soak
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.roofline import Probe, measure_peaks
from lp_edge.tests.fake_cuda.device import H200, ORIN
from lp_edge.tests.fake_tensorrt.install import install
from lp_edge.tests.fake_tensorrt.module import World

CPU, TENSORRT = BackendConfig("cpu", threads=1), BackendConfig("tensorrt")
RUN = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "gpu" / "run.py"


@pytest.fixture(params=[("10.3", H200), ("8.5", ORIN)], ids=["10.3", "8.5-jetson"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        world = install(patch, tmp_path / "cache", *request.param)
        yield world
        gc.collect()
        world.verify()


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """A picture and a clip of "faces" for the toys."""

    def face(x: int) -> np.ndarray:
        out = np.zeros((200, 240, 3), np.uint8)
        out[60:140, x - 40 : x + 40] = 255
        return out

    write_image(tmp_path / "face.png", face(100))
    with open_writer(tmp_path / "drive.mp4", (240, 200), Fraction(25)) as writer:
        for i in range(24):
            writer.write(face(100 + i % 6))
    return {"source": tmp_path / "face.png", "driving": tmp_path / "drive.mp4"}


def test_networks_stay_on_the_device_up_to_the_largest_batch(
    machine: World, liveportrait_bundle: Path
) -> None:
    records = list(
        bench_networks(
            liveportrait_bundle,
            TENSORRT,
            batches=(1, 4, 64),
            networks=["stitching", "warp_decode"],
            seconds=0.01,
        )
    )
    assert [(r["network"], r["batch"], "skipped" in r) for r in records] == [
        (name, batch, batch == 64) for name in ("stitching", "warp_decode") for batch in (1, 4, 64)
    ]
    for record in (r for r in records if "skipped" not in r):
        assert record["resident"] is True and record["queued_ms"] > 0
        assert record["provenance"]["tensorrt"] is not None
        assert record["provenance"]["runners"][record["network"]]["backend"] == "tensorrt"
    assert len([note for note in networks_table(records).notes if "skipped" in note]) == 2


def test_peaks_are_measured_by_graphs_that_tensorrt_takes(machine: World) -> None:
    def choose(kind: str, dtype: str) -> tuple[Probe, ...]:
        shapes = {"matmul": (8, 8), "conv": (1, 4, 8, 8), "copy": (1, 2, 16, 16)}
        return (Probe(kind, dtype, shapes[kind], 1 if kind == "copy" else 2),)

    peaks = measure_peaks(TENSORRT, ("float16", "float32"), seconds=0.01, choose=choose)
    assert set(peaks.flops) == {"float16", "float32"} and peaks.bytes_per_second
    assert not any("failed" in record for record in peaks.measured)


def test_a_pipeline_with_pixels_on_both_sides(
    machine: World, liveportrait_bundle: Path, inputs: dict[str, Path]
) -> None:
    records = list(
        bench_pipeline(
            **inputs,
            bundle=liveportrait_bundle,
            backend=TENSORRT,
            pixels=("host", "device"),
            batch_sizes=(2,),
            warmup=4,
            limit=16,
        )
    )
    wholes = [r for r in records if r["bench"] == "pipeline"]
    assert [(r["pixels"], r["resident"], r["engine_busy"]) for r in wholes] == [
        ("host", True, None),
        ("device", True, None),
    ]
    assert all(r["networks_ms"] > 0 and 0 < r["device_busy"] <= 1 for r in wholes)
    assert any(r["bench"] == "network" and r["network"] == "warp_decode" and r["rows"] == 2 for r in records)


def test_backends_are_compared(machine: World, toy_bundle: Path) -> None:
    ours, cpu = runner_side(toy_bundle, TENSORRT), runner_side(toy_bundle, CPU)
    (record,) = bench_compare(ours, [cpu], networks=["face_mesh"], rounds=2, warmup=1)
    assert record["low"] <= record["ratio"] <= record["high"]


def test_a_soak_sees_the_device_s_memory(
    machine: World, toy_bundle: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    *samples, last = bench_soak(**inputs, bundle=toy_bundle, backend=TENSORRT, frames=40, samples=10)
    assert all(sample["device_mib"] > 0 for sample in samples)
    assert last["level"]["device_mib"] is True and last["growth"]["device_mib"] is not None

    leaked: list[Any] = []
    state = soak_module._state

    def leaking(cuda: Any) -> dict[str, Any]:
        leaked.append(cuda.alloc(64 << 20))
        return state(cuda)

    monkeypatch.setattr(soak_module, "_state", leaking)
    *_, last = bench_soak(**inputs, bundle=toy_bundle, backend=TENSORRT, frames=20, samples=10)
    assert last["passed"] is False and last["growth"]["device_mib"] > 300
    for buffer in leaked:
        buffer.close()


@pytest.mark.skipif(not RUN.is_file(), reason="no source tree: benchmarks are not installed")
def test_the_gpu_command_judges(
    machine: World,
    liveportrait_bundle: Path,
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = importlib.util.spec_from_file_location("gpu_run_device", RUN)
    assert spec is not None and spec.loader is not None
    run: ModuleType = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, run)
    spec.loader.exec_module(run)
    settings = run.Settings(
        "tensorrt",
        bundle=str(liveportrait_bundle),
        batches=(1, 2),
        **{key: str(path) for key, path in inputs.items()},
    )
    for name in ("engines", "parity"):
        run.run_step(name, settings, tmp_path)
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told["done"], told["failed"]
        assert [check["passed"] for check in told["checks"]] == [True], told
