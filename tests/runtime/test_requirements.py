"""What GPU backends need, on machines that are folders: a Jetson, a desktop, a container, a machine without a GPU."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

import lp_edge
from lp_edge import cli
from lp_edge.engines import BackendStatus
from lp_edge.runtime import doctor, requirements
from lp_edge.runtime.doctor import Gpu, Machine
from lp_edge.runtime.requirements import Host, Requirement, ask_libraries, examine_requirements, jetpack_of

ARM, X86 = "usr/lib/aarch64-linux-gnu", "usr/lib/x86_64-linux-gnu"


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def answers(calls: Sequence[tuple[str, str]]) -> list[int | str]:
    """Libraries that say what is written in them: "call number", or why they do not load."""
    result: list[int | str] = []
    for path, call in calls:
        text = Path(path).read_text()
        known, _, number = text.partition(" ")
        result.append(int(number) if known == call and number.isdigit() else text)
    return result


def machine(gpus: tuple[Gpu, ...] = (), driver: str = "", jetson: str = "") -> Machine:
    return Machine("Linux", "CPU", 8, 1000, gpus, driver, jetson)


def host(root: Path, python: tuple[int, int] = (3, 12), **changes: object) -> Host:
    values: dict[str, object] = {
        "root": root,
        "python": python,
        "packages": (str(root / "venv"),),
        "folders": (),
        "cache": root / "cache",
        "ask": answers,
        "accessible": lambda path: True,
    }
    return Host(**{**values, **changes})  # type: ignore[arg-type]


def checked(found: Sequence[Requirement]) -> dict[str, Requirement]:
    assert len({r.name for r in found}) == len(found), "one entry each"
    for entry in found:
        assert entry.got, entry
        assert entry.severity == "ok" or entry.remedy, entry
        assert entry.severity != "ok" or not entry.remedy, entry
    json.dumps([vars(entry) for entry in found])
    return {entry.name: entry for entry in found}


def severities(found: dict[str, Requirement], *names: str) -> list[str]:
    return [found[name].severity for name in names]


def wheel(root: Path, name: str, version: str, tag: str = "py3-none-any") -> None:
    folder = f"venv/{name.replace('-', '_')}-{version}.dist-info"
    put(root, {f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
               f"{folder}/WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n"})  # fmt: skip


# -- Jetsons ----------------------------------------------------------------------------------------


@pytest.fixture
def orin_jp5(tmp_path: Path) -> Path:
    """AGX Orin with JetPack 5.1.2."""
    put(
        tmp_path,
        {
            "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n",
            f"{ARM}/tegra/libcuda.so.1": "cuDriverGetVersion 11040",
            "usr/local/cuda-11.4/targets/aarch64-linux/lib/libcudart.so.11.0": "cudaRuntimeGetVersion 11040",
            f"{ARM}/libcudnn.so.8.6.0": "cudnnGetVersion 8600",
            f"{ARM}/libnvinfer.so.8.5.2": "getInferLibVersion 8502",
            f"{ARM}/libnvinfer_plugin.so.8.5.2": "getInferLibVersion 1",
            "usr/lib/python3.8/dist-packages/tensorrt/__init__.py": "raise RuntimeError('is never imported')\n",
            "proc/meminfo": "MemTotal:       64349908 kB\nMemAvailable:   58349908 kB\nSwapFree:       32000000 kB\n",
            "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 2010932 0 5\n/dev/zram1 partition 2010932 0 5\n",
            "var/lib/nvpmodel/status": "pmode:0000\n",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=MODE_15W >\n",
            "dev/nvmap": "",
            "dev/nvhost-gpu": "",
        },
    )
    return tmp_path


AGX_ORIN = machine(jetson="Jetson AGX Orin Developer Kit, R35 (release), REVISION: 4.1")


def test_agx_orin_with_jetpack_5(orin_jp5: Path) -> None:
    found = checked(examine_requirements(AGX_ORIN, host(orin_jp5, (3, 10))))
    assert found["JetPack"].got == "JetPack 5.1 (Jetson Linux 35.4.1)"
    assert found["driver"].got == "Jetson Linux 35.4.1, for CUDA up to 11.4"
    assert found["CUDA"] == Requirement("CUDA", "libcudart 11.4")
    # The conflict: TensorRT is here, its Python package is for Python 3.8 only.
    trt = found["TensorRT"]
    assert trt.severity == "error" and trt.got == "8.5.2 without a Python package for Python 3.10"
    assert "Python 3.8 only" in trt.remedy and "docs/jetson.md" in trt.remedy
    assert "tensorrt8" in found["bundle"].remedy
    assert "2 zram" in found["swap"].got and found["swap"].severity == "note"
    assert severities(found, "memory", "power", "disk") == ["ok"] * 3
    assert found["onnxruntime-gpu"].remedy == "use --backend tensorrt"


def test_bindings_that_somebody_built_are_seen(orin_jp5: Path) -> None:
    put(orin_jp5, {"venv/tensorrt/__init__.py": "raise RuntimeError('is never imported')\n"})
    found = checked(examine_requirements(AGX_ORIN, host(orin_jp5, (3, 10))))
    assert found["TensorRT"] == Requirement("TensorRT", "8.5.2 with its Python bindings")


def test_library_that_does_not_load_has_the_version_of_its_name(orin_jp5: Path) -> None:
    put(orin_jp5, {f"{ARM}/libnvinfer.so.8.5.2": "libcudla.so.1: cannot open shared object file"})
    trt = checked(examine_requirements(AGX_ORIN, host(orin_jp5, (3, 10))))["TensorRT"]
    assert trt.severity == "error" and "8.5.2 that does not load (libcudla.so.1" in trt.got
    assert "TensorRT 8.5 or newer, as JetPack 5.1" in trt.expected and "apt install" in trt.remedy


def test_runtime_that_tells_no_version_without_a_driver(nano_jp6: Path) -> None:
    put(
        nano_jp6, {"usr/local/cuda-12.6/targets/aarch64-linux/lib/libcudart.so.12": "cudaRuntimeGetVersion 0"}
    )
    assert checked(examine_requirements(NANO, host(nano_jp6, (3, 10))))["CUDA"].got == "libcudart 12"


def test_user_outside_the_group_video(orin_jp5: Path) -> None:
    closed = host(orin_jp5, (3, 10), accessible=lambda path: path.name != "nvmap")
    entry = checked(examine_requirements(AGX_ORIN, closed))["permissions"]
    assert (
        entry.got == "/dev/nvmap cannot be opened" and entry.severity == "error" and "usermod" in entry.remedy
    )
    put(orin_jp5, {".dockerenv": ""})
    assert "--group-add" in checked(examine_requirements(AGX_ORIN, closed))["permissions"].remedy


def test_old_jetpacks(orin_jp5: Path) -> None:
    put(orin_jp5, {"etc/nv_tegra_release": "# R32 (release), REVISION: 7.1, GCID: 1\n"})
    entry = checked(examine_requirements(AGX_ORIN, host(orin_jp5, (3, 10))))["JetPack"]
    assert entry.severity == "error" and "JetPack 5.1" in entry.expected


def test_release_from_the_package(orin_jp5: Path) -> None:
    (orin_jp5 / "etc/nv_tegra_release").unlink()
    status = "Package: nvidia-l4t-cor\nVersion: 1.0\n\nPackage: nvidia-l4t-core\nStatus: install ok installed\nVersion: 36.4.3-2025\n\n"
    put(orin_jp5, {"var/lib/dpkg/status": status})
    assert checked(examine_requirements(AGX_ORIN, host(orin_jp5)))["JetPack"].got.endswith(
        "(Jetson Linux 36.4.3)"
    )


@pytest.fixture
def nano_jp6(tmp_path: Path) -> Path:
    """Orin Nano 8 GB with JetPack 6.2 and too little free memory."""
    put(
        tmp_path,
        {
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
            f"{ARM}/nvidia/libcuda.so.1": "cuDriverGetVersion 12060",
            "usr/local/cuda-12.6/targets/aarch64-linux/lib/libcudart.so.12": "cudaRuntimeGetVersion 12060",
            f"{ARM}/libcudnn.so.9.3.0": "cudnnGetVersion 90300",
            f"{ARM}/libnvinfer.so.10.3.0": "getInferLibVersion 100300",
            "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": "",
            "proc/meminfo": "MemTotal:        7802400 kB\nMemAvailable:    3002400 kB\n",
            "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet\n",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        },
    )
    return tmp_path


NANO = machine(
    (Gpu("Orin (nvgpu)", None, "540.4.0"),), "540.4.0", "Jetson Orin Nano Developer Kit Super, R36"
)


def test_orin_nano_with_jetpack_6(nano_jp6: Path) -> None:
    system = str(nano_jp6 / "usr/lib/python3.10/dist-packages")
    found = checked(
        examine_requirements(NANO, host(nano_jp6, (3, 10), packages=(str(nano_jp6 / "venv"), system)))
    )
    assert found["TensorRT"] == Requirement("TensorRT", "10.3.0 with its Python bindings")
    assert found["JetPack"].got.startswith("JetPack 6.1 or 6.2")
    assert "bundle" not in found, "10.x takes the main flavour"
    assert found["memory"].severity == "warning" and "2.9 GiB of 7.4" in found["memory"].got
    assert (
        found["power"].got == "mode 1 (25W)"
        and "nvpmodel -m 2 && sudo jetson_clocks" in found["power"].remedy
    )
    assert "jp6/cu126" in found["onnxruntime-gpu"].remedy


def test_environment_without_system_packages(nano_jp6: Path) -> None:
    trt = checked(examine_requirements(NANO, host(nano_jp6, (3, 10))))["TensorRT"]
    assert "--system-site-packages" in trt.remedy and trt.severity == "error"
    assert "python3.10" in checked(examine_requirements(NANO, host(nano_jp6, (3, 12))))["TensorRT"].remedy


@pytest.mark.parametrize(
    ("tag", "severity"),
    [("cp310-cp310-manylinux_2_34_aarch64", "warning"), ("cp310-cp310-linux_aarch64", "ok")],
)
def test_wheels_of_onnxruntime_for_orin(nano_jp6: Path, tag: str, severity: str) -> None:
    wheel(nano_jp6, "onnxruntime-gpu", "1.23.0", tag)
    put(
        nano_jp6,
        {
            "venv/onnxruntime/__init__.py": "",
            "venv/onnxruntime/capi/libonnxruntime_providers_cuda.so": "\0libcublasLt.so.12\0libcudnn.so.9\0",
        },
    )
    entry = checked(examine_requirements(NANO, host(nano_jp6, (3, 10))))["onnxruntime-gpu"]
    assert entry.severity == severity
    assert ("jp6/cu126" in entry.remedy and "sm_87" in entry.expected) is (severity == "warning")
    assert severity == "warning" or entry.got == "1.23.0 for CUDA 12"


def test_thor_with_jetpack_7(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic\n",
            f"{ARM}/nvidia/libcuda.so.1": "cuDriverGetVersion 13000",
            "usr/local/cuda-13.0/targets/sbsa-linux/lib/libcudart.so.13": "cudaRuntimeGetVersion 13000",
            f"{ARM}/libnvinfer.so.10.13.3": "getInferLibVersion 101303",
            "venv/tensorrt/__init__.py": "",
            "dev/nvidia0": "",
        },
    )
    wheel(tmp_path, "onnxruntime-gpu", "1.31.1", "cp312-cp312-manylinux_2_34_aarch64")
    thor = machine((Gpu("NVIDIA Thor", None, "580.00", "11.0"),), "580.00", "NVIDIA Jetson AGX Thor, R38")
    found = checked(examine_requirements(thor, host(tmp_path)))
    assert {entry.severity for entry in found.values()} == {"ok"}
    assert found["TensorRT"].got.startswith("10.13.3") and found["CUDA"].got == "libcudart 13.0"


def test_tensorrt_that_does_not_know_the_gpu(tmp_path: Path) -> None:
    put(
        tmp_path,
        {f"{X86}/libnvinfer.so.10.3.0": "getInferLibVersion 100300", "venv/tensorrt/__init__.py": ""},
    )
    for capability, severity in (("12.0", "error"), ("8.9", "ok"), ("6.1", "error"), ("", "ok")):
        card = machine((Gpu("a card", None, "570.1", capability),), "570.1")
        assert checked(examine_requirements(card, host(tmp_path)))["TensorRT"].severity == severity, (
            capability
        )


def test_releases() -> None:
    names = {jetpack_of(l4t).name for l4t in ((35, 2, 1), (35, 6), (35, 2))}
    assert names == {"5.1"}
    assert [jetpack_of(l4t).name for l4t in ((32, 7), (35, 1), (36, 3), (36, 4, 4), (36, 5), (38, 4), (39, 2))] == [
        "4 or older", "5.0", "6.0", "6.1 or 6.2", "6.1 or 6.2", "7.0 or 7.1", "7.2"
    ]  # fmt: skip


# -- desktops and servers ---------------------------------------------------------------------------


@pytest.fixture
def desktop(tmp_path: Path) -> Path:
    """RTX card with wheels of CUDA 13, cuDNN and TensorRT in the environment."""
    put(
        tmp_path,
        {
            f"{X86}/libcuda.so.1": "cuDriverGetVersion 13000",
            "venv/nvidia/cu13/lib/libcudart.so.13": "cudaRuntimeGetVersion 13000",
            "venv/nvidia/cudnn/lib/libcudnn.so.9": "cudnnGetVersion 92800",
            "venv/tensorrt_libs/libnvinfer.so.10": "getInferLibVersion 101303",
            "venv/tensorrt/__init__.py": "",
            "venv/onnxruntime/__init__.py": "",
            "venv/onnxruntime/capi/libonnxruntime_providers_cuda.so": "\0libcublasLt.so.13\0libcudnn.so.9\0",
            "dev/nvidia0": "",
        },
    )
    wheel(tmp_path, "onnxruntime-gpu", "1.31.1", "cp312-cp312-manylinux_2_28_x86_64")
    wheel(tmp_path, "cuda-bindings", "13.4.4")
    wheel(tmp_path, "tensorrt-cu13-bindings", "10.13.3.9")
    return tmp_path


def rtx(driver: str, name: str = "NVIDIA RTX A2000", capability: str = "8.6") -> Machine:
    return machine((Gpu(name, 12288, driver, capability),), driver)


def test_desktop_with_a_driver_that_fits(desktop: Path) -> None:
    found = checked(examine_requirements(rtx("580.65.06"), host(desktop)))
    assert {entry.severity for entry in found.values()} == {"ok"}
    assert found["CUDA"].got == "cuda-bindings 13.4.4, libcudart 13.0"
    assert found["onnxruntime-gpu"].got == "1.31.1 for CUDA 13"
    assert not {"JetPack", "memory", "power", "bundle"} & set(found)


def test_desktop_with_an_old_driver(desktop: Path) -> None:
    put(desktop, {f"{X86}/libcuda.so.1": "cuDriverGetVersion 12040"})
    found = checked(examine_requirements(rtx("550.54.14"), host(desktop)))
    assert severities(found, "CUDA", "TensorRT", "onnxruntime-gpu") == ["error"] * 3
    assert "tensorrt-cu12" in found["TensorRT"].remedy and found["TensorRT"].got == "10.13.3 for CUDA 13"
    assert found["CUDA"].expected == "CUDA 12 or older for this driver"
    assert "cuda-bindings==12.*" in found["CUDA"].remedy
    assert "driver 580 or newer, not 550.54.14" in found["onnxruntime-gpu"].expected
    assert "onnxruntime-gpu<1.27" in found["onnxruntime-gpu"].remedy


def test_cudnn_is_missing_or_too_old(desktop: Path) -> None:
    library = desktop / "venv/nvidia/cudnn/lib/libcudnn.so.9"
    library.write_text("cudnnGetVersion 8902")
    entry = checked(examine_requirements(rtx("580.1"), host(desktop)))["onnxruntime-gpu"]
    assert entry.severity == "warning" and "cuDNN 8.9.2" in entry.got and entry.expected == "cuDNN 9"
    library.unlink()
    put(
        desktop,
        {"venv/onnxruntime/capi/libonnxruntime_providers_cuda.so": "\0libcublasLt.so.13\0cudnn_frontend"},
    )
    entry = checked(examine_requirements(rtx("580.1"), host(desktop)))["onnxruntime-gpu"]
    assert "no libcudnn.so" in entry.got and "nvidia-cudnn-cu13" in entry.remedy


@pytest.mark.parametrize(
    ("cuda", "wheel_name"), [(13010, "tensorrt-cu13"), (12080, "tensorrt-cu12"), (11060, "tensorrt==8.5.3.1")]
)
def test_driver_alone(tmp_path: Path, cuda: int, wheel_name: str) -> None:
    put(tmp_path, {f"{X86}/libcuda.so.1": f"cuDriverGetVersion {cuda}"})
    found = checked(examine_requirements(rtx(""), host(tmp_path)))
    assert wheel_name in found["TensorRT"].remedy and found["TensorRT"].severity == "note"
    assert f"cuda-bindings=={cuda // 1000}.*" in found["CUDA"].remedy and found["CUDA"].severity == "warning"
    assert found["onnxruntime-gpu"].severity == "note"


def test_tensorrt_library_without_its_package(desktop: Path) -> None:
    (desktop / "venv/tensorrt/__init__.py").unlink()
    (desktop / "venv/tensorrt").rmdir()
    entry = checked(examine_requirements(rtx("580.1"), host(desktop)))["TensorRT"]
    assert entry.severity == "warning" and "pip install tensorrt==10.13.3" in entry.remedy


def test_card_without_usable_half_precision(desktop: Path) -> None:
    found = checked(examine_requirements(rtx("580.1", "NVIDIA GeForce GTX 1660", "7.5"), host(desktop)))
    assert found["precision"].severity == "note" and "fp32" in found["precision"].remedy


def test_container_without_the_drivers_libraries(tmp_path: Path) -> None:
    """/proc shows the host's card, but nothing of it is in the container."""
    put(tmp_path, {".dockerenv": ""})
    entry = checked(examine_requirements(rtx("580.1"), host(tmp_path)))["driver"]
    assert entry.severity == "error" and "--gpus all" in entry.remedy
    put(tmp_path, {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1\n"})
    assert "--runtime nvidia" in checked(examine_requirements(NANO, host(tmp_path)))["driver"].remedy
    (tmp_path / ".dockerenv").unlink()
    assert "flash" in checked(examine_requirements(NANO, host(tmp_path)))["driver"].remedy


def test_no_gpu(tmp_path: Path) -> None:
    (entry,) = examine_requirements(
        machine(), host(tmp_path, ask=lambda calls: pytest.fail("nothing to ask"))
    )
    assert entry.severity == "note" and "--backend cpu" in entry.remedy


def test_full_disk(desktop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = requirements.shutil.disk_usage(desktop)._replace(free=1 << 30)
    monkeypatch.setattr(requirements.shutil, "disk_usage", lambda folder: usage)
    entry = checked(examine_requirements(rtx("580.1"), host(desktop)))["disk"]
    assert entry.severity == "warning" and "1.0 GiB" in entry.got and "XDG_CACHE_HOME" in entry.remedy


# -- asking libraries, and the report -----------------------------------------------------------------


def test_libraries_are_asked_in_another_process() -> None:
    number, missing, no_call = ask_libraries(
        [("libc.so.6", "getpid"), ("libnope.so.9", "getInferLibVersion"), ("libc.so.6", "getInferLibVersion")]
    )
    assert isinstance(number, int) and number > 0
    assert "libnope.so.9" in str(missing) and "getInferLibVersion" in str(no_call)


LIBRARY = """
#include <stddef.h>
#include <stdio.h>
__attribute__((constructor)) static void hello(void) { printf("a library that talks"); fflush(stdout); }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 12060; return STATUS; }
size_t cudnnGetVersion(void) { return 90300; }
int getInferLibVersion(void) { return 100300; }
"""


@pytest.mark.parametrize("status", [0, 35])
def test_calls_as_nvidias_libraries_have_them(tmp_path: Path, status: int) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    put(tmp_path, {"library.c": LIBRARY})
    path = tmp_path / "library.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        f"-DSTATUS={status}",
        "-o",
        str(path),
        str(tmp_path / "library.c"),
    ]
    subprocess.run(command, check=True, timeout=60)
    calls = [(str(path), call) for _, call in requirements._LIBRARIES.values()]
    assert ask_libraries(calls) == [12060, 0 if status else 12060, 90300, 100300]


def test_library_that_crashes_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    pid = ("libc.so.6", "getpid")
    first, second, third = ask_libraries([pid, ("libc.so.6", "abort"), pid])
    assert isinstance(third, int), "the next one is asked all the same"
    assert isinstance(first, int) and "ended with -6" in str(second)
    monkeypatch.setattr(requirements, "_ASK_S", 0.5)
    answer, after = ask_libraries([("libc.so.6", "pause"), pid])
    assert "more than" in str(answer) and isinstance(after, int)


def test_versions_as_libraries_tell_them() -> None:
    numbers = {8502: (8, 5, 2), 100300: (10, 3, 0), 101303: (10, 13, 3), 11040: (11, 4), 13020: (13, 2), 8600: (8, 6, 0), 92800: (9, 28, 0)}  # fmt: skip
    assert {number: requirements._number(number) for number in numbers} == numbers


def test_errors_are_in_the_report(orin_jp5: Path) -> None:
    found = examine_requirements(AGX_ORIN, host(orin_jp5, (3, 10)))
    report = doctor.Report((), AGX_ORIN, (), (), doctor.BundleStatus("b", True, "fine", ""), found)
    assert report.ok, "the CPU works"
    (missing,) = report.missing()
    assert missing.what.startswith("TensorRT: 8.5.2 without") and not missing.needed
    value = json.loads(json.dumps(report.as_dict()))
    assert {entry["name"]: entry["severity"] for entry in value["requirements"]}["TensorRT"] == "error"


def test_console(orin_jp5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine_requirements(AGX_ORIN, host(orin_jp5, (3, 10)))
    report = doctor.Report((), AGX_ORIN, (), (), doctor.BundleStatus("b", True, "fine", ""), found)
    monkeypatch.setattr(doctor, "examine", lambda bundle: report)
    result = CliRunner().invoke(cli.doctor, [], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    lines = {line.split()[1]: line for line in result.output.splitlines() if len(line.split()) > 2}
    assert lines["TensorRT"].split()[0] == "no" and "docs/jetson.md" in lines["TensorRT"]
    assert lines["driver"].split()[0] == "yes" and lines["swap"].split()[0] == "-"


def test_what_an_orin_nano_cannot_have_is_not_missing(
    nano_jp6: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ONNX Runtime comes from the index of its JetPack, which is said once and alone."""
    system = str(nano_jp6 / "usr/lib/python3.10/dist-packages")
    found = examine_requirements(NANO, host(nano_jp6, (3, 10), packages=(str(nano_jp6 / "venv"), system)))
    generic = "pip install onnxruntime-gpu, and CUDA"
    tried = [
        BackendStatus("cpu", True, "fine", ""),
        *(
            BackendStatus(name, False, f"no {name}", generic)
            for name in ("cuda", "ort-tensorrt", "tensorrt-rtx")
        ),
    ]
    encoder = doctor.VideoStatus("nvv4l2h264enc", "encode", "gstreamer", False, "no /dev/v4l2-nvenc", "apt")
    report = doctor.Report(
        (),
        NANO,
        doctor.fitting_backends(tried, NANO, found),
        (),
        doctor.BundleStatus("b", True, "fine", ""),
        found,
        doctor.fitting_video([encoder], NANO),
    )
    missing = {entry.what: entry.remedy for entry in report.missing()}
    assert set(missing) == {"no cuda", "no ort-tensorrt"}
    assert all("jp6/cu126" in remedy and generic not in remedy for remedy in missing.values())
    monkeypatch.setattr(doctor, "examine", lambda bundle: report)
    result = CliRunner().invoke(cli.doctor, [], env={"COLUMNS": "300"})
    lines = {line.split()[1]: line for line in result.output.splitlines() if len(line.split()) > 2}
    assert lines["memory"].split()[0] == "warning"
    assert lines["tensorrt-rtx"].split()[0] == "-" and "GeForce and RTX" in lines["tensorrt-rtx"]
    assert lines["nvv4l2h264enc"].split()[0] == "-" and "Orin Nano has no NVENC" in lines["nvv4l2h264enc"]


@pytest.mark.parametrize(
    ("gpu", "wanted"),
    [
        (Gpu("NVIDIA GeForce RTX 4070", None, "580.1", "8.9"), True),
        (Gpu("NVIDIA RTX A2000", None, "580.1"), True),
        (Gpu("NVIDIA GeForce RTX 2080", None, "580.1", "7.5"), False),
        (Gpu("NVIDIA H200", None, "580.1", "9.0"), False),
    ],
)
def test_tensorrt_rtx_is_for_rtx_cards(gpu: Gpu, wanted: bool) -> None:
    status = BackendStatus("tensorrt-rtx", False, "not there", "pip install it")
    (fitted,) = doctor.fitting_backends([status], machine((gpu,), "580.1"), ())
    assert (fitted.remedy == "pip install it") is wanted


# -- the document -------------------------------------------------------------------------------------

DOCUMENT = Path(lp_edge.__file__).resolve().parent / "docs" / "jetson.md"


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="no source tree: lp_edge is installed from a wheel")
def test_the_document_has_the_same_versions() -> None:
    rows = re.findall(
        r"(?m)^\| (\d[^|]*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|(.*)$", DOCUMENT.read_text()
    )
    known = {entry.name: entry for entry in requirements.JETPACKS[2:]}
    assert {row[0] for row in rows} == set(known)
    for name, *versions, rest in rows:
        entry = known[name]
        numbers = (entry.l4t, entry.python, entry.cuda, entry.tensorrt)
        assert versions == [".".join(map(str, number)) for number in numbers], name
        assert ("`tensorrt8`" in rest) is (entry.tensorrt < (10,))
        assert entry.wheels in rest and ("https://" in rest) is bool(entry.wheels)


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="no source tree: lp_edge is installed from a wheel")
def test_commands_in_the_document_are_real() -> None:
    commands = {"lp-run": cli.run, "lp-export": cli.export, "lp-doctor": cli.doctor}
    found = 0
    for block in re.findall(r"(?s)```sh\n(.*?)```", DOCUMENT.read_text()):
        for line in block.splitlines():
            name, *arguments = shlex.split(line, comments=True)
            if name in commands:
                found += 1
                commands[name].make_context(name, arguments)
    assert found > 8
    assert "jetson" in cli.bench.commands and "networks" in cli.bench.commands
