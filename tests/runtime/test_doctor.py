"""lp-doctor's findings: what is tried is really tried, and what is missing is named with its remedy."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import onnxruntime
import pytest

from lp_edge.engines import BackendConfig, BackendStatus, open_bundle
from lp_edge.runtime import doctor, hardware_video
from lp_edge.runtime.provenance import provenance
from lp_edge.tests.fake_nvcodec.module import World, make_nvcodec


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi of our own, first on PATH."""
    path = folder / "bin" / "nvidia-smi"
    put(folder, "bin/nvidia-smi", f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


@pytest.fixture
def no_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def components() -> tuple[doctor.Component, ...]:
    return doctor.examine_components()


def test_versions_are_those_of_the_modules(components: tuple[doctor.Component, ...]) -> None:
    found = {c.name: c for c in components}
    assert found["NumPy"].version == np.__version__
    assert found["ONNX Runtime"].version == onnxruntime.__version__
    assert found["Python"].version == ".".join(str(n) for n in sys.version_info[:3])
    assert all(c.version for c in components if c.needed)


def test_module_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    broken = next(c for c in doctor.examine_components() if c.name == "OpenCV")
    assert broken.version is None and broken.needed
    assert "cannot be imported" in broken.problem and "opencv-python-headless" in broken.remedy


@pytest.mark.parametrize(("cuda", "flagged"), [(False, True), (True, False)])
def test_two_builds_of_onnxruntime(monkeypatch: pytest.MonkeyPatch, cuda: bool, flagged: bool) -> None:
    monkeypatch.setattr(doctor, "_distribution", lambda name: "1.0")
    offered = [doctor.CUDA] if cuda else ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    ort = next(c for c in doctor.examine_components() if c.name == "ONNX Runtime")
    assert bool(ort.problem) is flagged
    assert ("pip uninstall" in ort.remedy) is flagged


# -- hardware ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tool")
def test_this_machine() -> None:
    machine = doctor.examine_machine()
    assert machine.cores >= 1 and machine.cpu
    if sys.platform == "linux":
        assert machine.memory_mib is not None and machine.memory_mib > 100


@pytest.mark.usefixtures("no_tool")
def test_empty_machine(tmp_path: Path) -> None:
    machine = doctor.examine_machine(tmp_path)
    assert (machine.gpus, machine.driver, machine.jetson, machine.memory_mib) == ((), "", "", None)


@pytest.mark.usefixtures("no_tool")
def test_jetson(tmp_path: Path) -> None:
    put(tmp_path, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.0, BOARD: generic\nmore\n")
    put(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano\0")
    put(tmp_path, "proc/meminfo", "MemTotal:        7802400 kB\nMemFree: 1 kB\n")
    machine = doctor.examine_machine(tmp_path)
    assert machine.jetson == "NVIDIA Jetson Orin Nano, R36 (release), REVISION: 4.0, BOARD: generic"
    assert machine.cpu == "NVIDIA Jetson Orin Nano"
    assert machine.memory_mib == 7619


@pytest.mark.usefixtures("no_tool")
def test_driver_without_its_tool(tmp_path: Path) -> None:
    put(
        tmp_path,
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\nGCC version: gcc 12.2.0\n",
    )
    put(
        tmp_path,
        "proc/driver/nvidia/gpus/0000:01:00.0/information",
        "Model: \t\t NVIDIA RTX A2000\nIRQ:  1\n",
    )
    machine = doctor.examine_machine(tmp_path)
    assert machine.driver == "550.54.14"
    assert machine.gpus == (doctor.Gpu("NVIDIA RTX A2000", None, "550.54.14"),)


def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, "echo 'NVIDIA H200, 143771, 570.1, 9.0'; echo 'Tesla T4, 15360, 570.1, 7.5'")
    machine = doctor.examine_machine(tmp_path)
    assert machine.gpus == (
        doctor.Gpu("NVIDIA H200", 143771, "570.1", "9.0"),
        doctor.Gpu("Tesla T4", 15360, "570.1", "7.5"),
    )
    assert machine.driver == "570.1"


def test_old_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, 'case "$1" in *compute_cap*) exit 2;; esac; echo "GTX 1080, [N/A], 440.1"')
    assert doctor.examine_machine(tmp_path).gpus == (doctor.Gpu("GTX 1080", None, "440.1", ""),)


@pytest.mark.parametrize("script", ["echo broken >&2; exit 9", "sleep 60"], ids=["fails", "hangs"])
def test_nvidia_smi_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(doctor, "_TIMEOUT", 0.3)
    tool(tmp_path, monkeypatch, f"exec {script}" if script.startswith("sleep") else script)
    assert doctor.examine_machine(tmp_path).gpus == ()


# -- encoders ---------------------------------------------------------------------------------------


def test_encoders_work_here() -> None:
    status = {e.name: e for e in doctor.examine_encoders()}
    assert set(status) == {"libx264", "aac", "libvpx-vp9", "libopus"}
    for entry in status.values():
        assert entry.works, entry
        assert not entry.remedy


def test_unknown_encoder(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_ENCODERS", (("libnope", "nothing", True, doctor._encode_picture),))
    (entry,) = doctor.examine_encoders()
    assert not entry.works and entry.needed and "libnope" in entry.detail
    assert entry.remedy
    assert capfd.readouterr() == ("", "")


def test_encoder_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ENCODERS", (("libx264", "x", True, lambda av, name: 0),))
    assert not doctor.examine_encoders()[0].works


def test_no_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    entries = doctor.examine_encoders()
    assert len(entries) == 4 and not any(e.works for e in entries)
    assert entries[0].remedy == "pip install av"


# -- bundle and report ------------------------------------------------------------------------------


def test_bundle(toy_bundle: Path) -> None:
    status = doctor.examine_bundle(toy_bundle)
    assert status.works and "face_detector, face_mesh, warp_decode" in status.detail
    with (toy_bundle / "face_mesh.onnx").open("ab") as file:
        file.write(b"\0")
    status = doctor.examine_bundle(toy_bundle)
    assert not status.works and "face_mesh.onnx" in status.detail and "lp-export" in status.remedy


def test_bundle_whose_graph_does_not_load(toy_bundle: Path) -> None:
    """Hashes alone are not enough: what was exported broken stays broken."""
    path = toy_bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["networks"]["face_mesh"]["outputs"][0]["name"] = "other"
    path.write_text(json.dumps(manifest))
    status = doctor.examine_bundle(toy_bundle)
    assert not status.works and "other" in status.detail


def report(components: tuple[doctor.Component, ...], **changes: Any) -> doctor.Report:
    good = doctor.Report(
        components,
        doctor.Machine("Linux", "CPU", 2, 1000, (), "", ""),
        (BackendStatus("cpu", True, "fine", ""), BackendStatus("cuda", False, "no CUDA", "get CUDA")),
        (doctor.EncoderStatus("libx264", True, True, "pictures", "fine", ""),),
        doctor.BundleStatus("b", True, "fine", ""),
    )
    return replace(good, **changes)


def test_good_report(components: tuple[doctor.Component, ...]) -> None:
    needed = tuple(c for c in components if c.needed)
    good = report(needed)
    assert good.ok and good.missing() == []
    value = json.loads(json.dumps(good.as_dict()))
    assert value["ok"] is True and value["machine"]["cores"] == 2 and value["missing"] == []


def test_gpu_backend_is_missing_only_where_there_is_a_gpu(components: tuple[doctor.Component, ...]) -> None:
    needed = tuple(c for c in components if c.needed)
    machine = doctor.Machine("Linux", "CPU", 2, 1000, (doctor.Gpu("T4"),), "1", "")
    with_gpu = report(needed, machine=machine)
    assert with_gpu.ok
    assert with_gpu.missing() == [doctor.Missing("no CUDA", "get CUDA", False)]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"backends": (BackendStatus("cpu", False, "no CPU", "r"),)}, "no CPU"),
        ({"encoders": (doctor.EncoderStatus("libx264", False, True, "pictures", "gone", "r"),)}, "libx264"),
        ({"bundle": doctor.BundleStatus("b", False, "altered", "r")}, "altered"),
        (
            {"components": (doctor.Component("NumPy", None, True, "arrays", "", "r"),)},
            "NumPy is not installed",
        ),
    ],
)
def test_bad_report(components: tuple[doctor.Component, ...], changes: dict[str, Any], what: str) -> None:
    bad = report(**{"components": components, **changes})
    assert not bad.ok
    first = bad.missing()[0]
    assert first.needed and what in first.what and first.remedy == "r"


def test_examine_everything(toy_bundle: Path) -> None:
    found = doctor.examine(toy_bundle)
    assert found.ok, found.missing()
    json.dumps(found.as_dict())


# -- video ------------------------------------------------------------------------------------------


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 15, reason="PyAV 14 cannot write foreign packets")
@pytest.mark.usefixtures("no_tool")
def test_video_hardware_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", make_nvcodec(world))
    found = {v.name: v for v in doctor.examine_video(1)}
    assert {name for name, v in found.items() if v.role == "decode"} == {
        d.name for d in hardware_video.DECODERS
    }
    assert {name for name, v in found.items() if v.role == "encode"} == {
        e.name for e in hardware_video.ENCODERS
    }
    decoder, encoder = found["NVDEC through PyNvVideoCodec"], found["NVENC through PyNvVideoCodec"]
    assert (decoder.works, decoder.detail, decoder.remedy) == (True, "decoded 12 frames as software does", "")
    assert encoder.works and encoder.detail.startswith("encoded a frame into ")
    assert {asked[1] for asked in world.asked if asked[0] == "decoder"} == {1}
    absent = found["nvv4l2decoder through GStreamer"]
    assert (absent.works, absent.detail) == (False, "gst-launch-1.0 is not installed")
    assert "gstreamer1.0-tools" in absent.remedy


@pytest.mark.usefixtures("no_tool")
def test_video_hardware_that_gives_other_frames_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(fails_at_packet=9, encodes=False)
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", make_nvcodec(world))
    found = {v.name: v for v in doctor.examine_video()}
    decoder = found["NVDEC through PyNvVideoCodec"]
    assert not decoder.works and "failed at frame" in decoder.detail and "lp-edge[nvcodec]" in decoder.remedy
    assert not found["NVENC through PyNvVideoCodec"].works


def test_video_hardware_is_missing_only_where_none_of_it_works(
    components: tuple[doctor.Component, ...],
) -> None:
    needed = tuple(c for c in components if c.needed)
    gpu = doctor.Machine("Linux", "CPU", 2, 1000, (doctor.Gpu("T4"),), "1", "")
    first = doctor.VideoStatus("A", "decode", "nvidia", False, "no driver", "get it")
    second = doctor.VideoStatus("B", "decode", "nvidia", True, "fine", "")
    works = (BackendStatus("cpu", True, "fine", ""),)
    none = report(needed, machine=gpu, backends=works, video=(first,))
    assert none.ok
    assert none.missing() == [doctor.Missing("no hardware decodes video (A: no driver)", "get it", False)]
    assert none.as_dict()["video"][0]["detail"] == "no driver"
    assert report(needed, machine=gpu, backends=works, video=(first, second)).missing() == []
    assert report(needed, backends=works, video=(first,)).missing() == []


# -- provenance -------------------------------------------------------------------------------------


def test_provenance(toy_bundle: Path) -> None:
    bundle = open_bundle(toy_bundle)
    with bundle.runner("face_mesh", BackendConfig("cpu")) as runner:
        value = json.loads(json.dumps(provenance(bundle, {"face_mesh": runner})))
    assert value["versions"]["NumPy"] == np.__version__
    assert value["runners"]["face_mesh"]["backend"] == "cpu"
    assert value["bundle"]["files"]["face_mesh.onnx"] == bundle.manifest.networks["face_mesh"].sha256
    assert value["machine"]["cores"] >= 1
    assert "bundle" not in provenance()
