"""What a GPU backend needs here: driver, CUDA, cuDNN, TensorRT and Python that fit together, memory, disk and permissions.

Nothing is imported for it: libraries are found as their users would find them and asked for their versions in a process of
their own, packages are looked up by their metadata, and a Jetson's files tell its JetPack. Every check says what was got,
what was expected and what to do. The versions are those of NVIDIA's release notes; docs/jetson.md has them as a table.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from lp_edge.engines.trt_cache import user_folder

if TYPE_CHECKING:
    from lp_edge.runtime.doctor import Machine

__all__ = [
    "JETPACKS",
    "Host",
    "JetPack",
    "Requirement",
    "ask_libraries",
    "examine_requirements",
    "jetpack_of",
]

Version = tuple[int, ...]
Severity = Literal["ok", "note", "warning", "error"]

_GIB: Final = 1 << 30
_TOOLKIT: Final = ("usr/local/cuda*/lib64", "usr/local/cuda*/targets/*/lib")
_ASK_S: Final = 30.0
_MARK: Final = "lp-edge: "  # libraries may print, too


@dataclass(frozen=True)
class Requirement:
    """A requirement of a GPU backend that was checked.

    Attributes:
        name: what it is about.
        got: what was found.
        expected: what would be right; "" when anything is.
        remedy: what to do, or "" when there is nothing to do.
        severity: ``ok``; ``note``, worth knowing; ``warning``, slower or one backend less; ``error``, no GPU backend can
            work, or what there is cannot work together.
    """

    name: str
    got: str
    expected: str = ""
    remedy: str = ""
    severity: Severity = "ok"

    def __str__(self) -> str:
        """``got; expected …; remedy`` without what is empty."""
        parts = (self.got, self.expected and f"expected {self.expected}", self.remedy)
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class JetPack:
    """What a JetPack brings.

    Attributes:
        name: its number.
        l4t: first Jetson Linux (L4T) that carries it.
        python: version of its Python, for which it has TensorRT's bindings.
        cuda: version.
        tensorrt: version.
        wheels: where ONNX Runtime with kernels for its GPUs comes from, or "".
    """

    name: str
    l4t: Version
    python: Version
    cuda: Version
    tensorrt: Version
    wheels: str


_INDEX: Final = "https://pypi.jetson-ai-lab.io/"
JETPACKS: Final = (
    JetPack("4 or older", (0,), (3, 6), (10, 2), (8, 2), ""),
    JetPack("5.0", (34,), (3, 8), (11, 4), (8, 4), ""),
    JetPack("5.1", (35, 2), (3, 8), (11, 4), (8, 5), ""),
    JetPack("6.0", (36,), (3, 10), (12, 2), (8, 6), ""),
    JetPack("6.1 or 6.2", (36, 4), (3, 10), (12, 6), (10, 3), f"{_INDEX}jp6/cu126"),
    JetPack("7.0 or 7.1", (38,), (3, 12), (13, 0), (10, 13), f"{_INDEX}sbsa/cu130"),
    JetPack("7.2", (39,), (3, 12), (13, 2), (10, 16), ""),
)

# Driver that a major version of CUDA needs at least, on x86-64 and server ARM (NVIDIA's table of minor version compatibility).
_DRIVERS: Final[Mapping[int, Version]] = {11: (450, 80), 12: (525,), 13: (580,)}
_WHEEL_GPUS: Final = {"Orin": "8.7", "Xavier": "7.2", "Thor": "11.0"}


def jetpack_of(l4t: Version) -> JetPack:
    """The JetPack of a release of Jetson Linux.

    Example:
        >>> jetpack_of((36, 4, 3)).name
        '6.1 or 6.2'
    """
    return next(entry for entry in reversed(JETPACKS) if entry.l4t <= l4t)


# -- libraries --------------------------------------------------------------------------------------

# Loading runs foreign code: in a process of its own it can neither fail here nor decide what is loaded later.
_PROBE: Final = """
import ctypes, json, sys
mark = sys.argv[2]
for path, call in json.loads(sys.argv[1]):
    try:
        library = ctypes.CDLL(path)
        if call in ("cudaRuntimeGetVersion", "cuDriverGetVersion"):  # they write it
            box = ctypes.c_int()
            answer = 0 if getattr(library, call)(ctypes.byref(box)) else box.value
        else:
            answer = getattr(library, call)()
    except Exception as error:
        answer = str(error)
    print("\\n" + mark + json.dumps(answer), flush=True)
"""


def ask_libraries(calls: Sequence[tuple[str, str]]) -> list[int | str]:
    """Load shared libraries in another process and make one call of each that tells its version.

    Args:
        calls: path or name of a library, and the name of a C function: without parameters and returning an ``int``, or, for
            those of CUDA, writing it where its parameter points.

    Returns:
        For each the number, 0 when the call fails (CUDA 11 tells no version without a driver), or why it does not load.
    """
    answers: list[int | str] = []
    while len(answers) < len(calls):  # one that ends the process does not take the others along
        rest = calls[len(answers) :]
        said, why = _ask(rest)
        answers += said[: len(rest)]
        if len(said) < len(rest):
            answers.append(why)
    return answers


def _ask(calls: Sequence[tuple[str, str]]) -> tuple[list[int | str], str]:
    """Answers until the process ended, and how it did."""
    command = [sys.executable, "-I", "-c", _PROBE, json.dumps(list(calls)), _MARK]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
        said, why = done.stdout, f"the process that loaded it ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        said, why = out if isinstance(out, str) else out.decode(), f"loading took more than {_ASK_S:.0f} s"
    lines = [line.removeprefix(_MARK) for line in said.splitlines() if line.startswith(_MARK)]
    return [json.loads(line) for line in lines], why


@dataclass(frozen=True)
class Host:
    """What :func:`examine_requirements` looks at; the defaults are this machine.

    Attributes:
        root: where ``proc``, ``etc``, ``usr``, ``dev``, … are.
        python: major and minor version.
        packages: folders with Python's packages.
        folders: folders that the dynamic loader searches first (``LD_LIBRARY_PATH``).
        cache: where engines go when they cannot stand beside their bundle.
        ask: see :func:`ask_libraries`.
        accessible: whether a device can be read and written.
    """

    root: Path = Path("/")
    python: Version = sys.version_info[:2]
    packages: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))
    folders: tuple[Path, ...] = field(
        default_factory=lambda: tuple(Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f)
    )
    cache: Path = field(default_factory=user_folder)
    ask: Callable[[Sequence[tuple[str, str]]], list[int | str]] = ask_libraries
    accessible: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)

    def text(self, name: str) -> str:
        """Content of a file, NUL as blank; "" when it cannot be read."""
        try:
            return (self.root / name).read_bytes().decode("utf-8", "replace").replace("\0", " ").strip()
        except OSError:
            return ""

    def distribution(self, name: str) -> metadata.Distribution | None:
        """An installed distribution, or None."""
        return next(iter(metadata.distributions(name=name, path=list(self.packages))), None)

    def module(self, name: str) -> Path | None:
        """Folder of a package that could be imported, or None; nothing is imported."""
        spec = PathFinder.find_spec(name, list(self.packages))
        return Path(spec.origin).parent if spec and spec.origin else None


@dataclass(frozen=True)
class _Library:
    """A shared library that was found. ``problem``: why it does not load, or ""."""

    path: Path
    version: Version
    problem: str = ""

    def __str__(self) -> str:
        return f"{_dotted(self.version)}{f' that does not load ({self.problem})' if self.problem else ''}"


# Where a library lies, besides the loader's usual folders: in NVIDIA's wheels or in the system; the call that tells its version.
_LIBRARIES: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "libcuda.so.1": (("usr/lib/*/nvidia", "usr/lib/*/tegra", "usr/lib/wsl/lib"), "cuDriverGetVersion"),
    "libcudart.so": (("nvidia/cu*/lib", *_TOOLKIT), "cudaRuntimeGetVersion"),
    "libcudnn.so": (("nvidia/cudnn/lib", *_TOOLKIT), "cudnnGetVersion"),
    "libnvinfer.so": (("tensorrt_libs", "tensorrt", "usr/local/tensorrt/lib"), "getInferLibVersion"),
}


def _find(host: Host, name: str, places: Sequence[str]) -> Path | None:
    """A library by its name, or the newest of its versions in the first folder that has one."""
    pattern = name if name[-1].isdigit() else f"{name}.[0-9]*"
    roots = [Path(folder) for folder in host.packages if folder]
    folders = [folder for root in roots for place in places for folder in root.glob(place)] + list(
        host.folders
    )
    for place in (*places, "usr/lib/*-linux-gnu", "usr/lib64"):
        folders += sorted(host.root.glob(place), reverse=True)
    found = next((files for folder in folders if (files := list(folder.glob(pattern)))), [])
    return max(found, key=lambda path: _named(path.name.partition(".so")[2]), default=None)


def _number(value: int) -> Version:
    """``8502``, ``100300``, ``12060`` -> version: thousands were majors before TensorRT 10 and cuDNN 9, and are CUDA's."""
    if value >= 90000:
        return value // 10000, value // 100 % 100, value % 100
    return (
        (value // 1000, value // 100 % 10, value % 100)
        if value < 10000
        else (value // 1000, value // 10 % 100)
    )


def _named(text: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version)) or "of unknown version"


def _libraries(host: Host) -> dict[str, _Library]:
    paths = {name: _find(host, name, places) for name, (places, _) in _LIBRARIES.items()}
    found = {name: path for name, path in paths.items() if path is not None}
    if not found:
        return {}
    answers = host.ask([(str(path), _LIBRARIES[name][1]) for name, path in found.items()])
    libraries = {}
    for (name, path), answer in zip(found.items(), answers, strict=True):
        problem = answer if isinstance(answer, str) else ""
        named = _named(path.resolve().name.partition(".so")[2])  # libnvinfer.so.8.5.2 tells it too
        libraries[name] = _Library(
            path, _number(answer) if isinstance(answer, int) and answer else named, problem
        )
    return libraries


# -- checks -----------------------------------------------------------------------------------------


def examine_requirements(machine: Machine, host: Host | None = None) -> tuple[Requirement, ...]:
    """Check what GPU backends need; on a machine without an NVIDIA GPU that is one note.

    Args:
        machine: what :func:`lp_edge.runtime.doctor.examine_machine` found.
        host: where to look; None = this machine.
    """
    host = host or Host()
    l4t = _l4t(host)
    nodes = sorted(path for pattern in _NODES for path in host.root.glob(pattern))
    libraries = _libraries(host)
    if not (machine.gpus or l4t or nodes or "libcuda.so.1" in libraries):
        remedy = (
            "use --backend cpu; a container gets the GPU with --gpus all, on a Jetson with --runtime nvidia"
        )
        return (Requirement("GPU", "no NVIDIA GPU", "", remedy, "note"),)
    jetpack = jetpack_of(l4t) if l4t else None
    return (
        _driver(machine, host, l4t, libraries),
        *_permissions(host, nodes),
        *_jetpack(l4t),
        _cuda(host, machine, libraries, jetpack),
        _tensorrt(host, libraries, jetpack, _capability(machine)),
        *_flavor(libraries),
        _onnxruntime(host, machine, libraries, jetpack),
        *_cards(machine),
        *_memory(host, l4t),
        *_power(host),
        _disk(host),
    )


def _l4t(host: Host) -> Version:
    """``# R36 (release), REVISION: 4.3, …`` -> (36, 4, 3); () elsewhere."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", host.text("etc/nv_tegra_release"))
    if match:
        return _named(f"{match[1]}.{match[2]}")
    # its package, where the file is not there
    match = re.search(
        r"(?m)^Package: nvidia-l4t-core\n(?:.+\n)*?Version: ([\d.]+)", host.text("var/lib/dpkg/status")
    )
    return _named(match[1]) if match else ()


# A desktop's nodes, then a Jetson's: nvmap holds memory, the others are its GPU.
_NODES: Final = (
    *("dev/nvidia[0-9]*", "dev/nvidiactl", "dev/nvidia-uvm"),
    *("dev/nvmap", "dev/nvhost-gpu", "dev/nvhost-ctrl-gpu", "dev/nvhost-as-gpu"),
    *("dev/nvgpu/igpu0/ctrl", "dev/nvgpu/igpu0/channel", "dev/nvgpu/igpu0/as"),
)


def _contained(host: Host) -> bool:
    return any((host.root / name).exists() for name in (".dockerenv", "run/.containerenv"))


def _driver(machine: Machine, host: Host, l4t: Version, libraries: Mapping[str, _Library]) -> Requirement:
    driver = libraries.get("libcuda.so.1")
    if driver is None or driver.problem:
        got = f"libcuda.so.1 does not load ({driver.problem})" if driver else "no libcuda.so.1"
        if _contained(host):
            flag = "--runtime nvidia" if l4t else "--gpus all"
            remedy = f"start the container with {flag} (NVIDIA Container Toolkit), which mounts the driver's libraries"
        elif l4t:
            remedy = "flash the Jetson with JetPack: the driver is part of Jetson Linux (nvidia-l4t-cuda)"
        else:
            remedy = "install the NVIDIA driver (its user space libraries too) and restart"
        return Requirement("driver", got, "the driver's library", remedy, "error")
    version = machine.driver or (f"Jetson Linux {_dotted(l4t)}" if l4t else "of unknown version")
    return Requirement("driver", f"{version}, for CUDA up to {_dotted(driver.version)}")


def _permissions(host: Host, nodes: Sequence[Path]) -> Iterator[Requirement]:
    closed = [f"/{node.relative_to(host.root)}" for node in nodes if not host.accessible(node)]
    if closed:
        remedy = "sudo usermod -aG video,render $USER and log in again"
        if _contained(host):
            remedy = "start the container with --group-add video, or with the host's number of that group"
        yield Requirement(
            "permissions",
            f"{', '.join(closed)} cannot be opened",
            "devices of the GPU that this user may open",
            remedy,
            "error",
        )


def _jetpack(l4t: Version) -> Iterator[Requirement]:
    if not l4t:
        return
    jetpack = jetpack_of(l4t)
    got = f"JetPack {jetpack.name} (Jetson Linux {_dotted(l4t)})"
    if jetpack.tensorrt < (8, 5):
        remedy = "flash JetPack 5.1 or newer"
        yield Requirement("JetPack", got, "JetPack 5.1 (TensorRT 8.5) or newer", remedy, "error")
    else:
        yield Requirement("JetPack", got)


def _capability(machine: Machine) -> Version:
    """Compute capability of the first GPU; () when unknown."""
    stated = machine.gpus[0].compute_capability if machine.gpus else ""
    if not _named(stated):
        stated = next((cc for name, cc in _WHEEL_GPUS.items() if name in machine.jetson), "")
    return _named(stated)


def _cuda(
    host: Host, machine: Machine, libraries: Mapping[str, _Library], jetpack: JetPack | None
) -> Requirement:
    """Whether one of what may make CUDA's calls (a package with its own runtime, or the library) suits the driver."""
    found: dict[str, Version] = {}
    if package := host.distribution("cuda-bindings") or host.distribution("cuda-python"):
        found[f"{package.name} {package.version}"] = _named(package.version)
    cudart, driver = libraries.get("libcudart.so"), libraries.get("libcuda.so.1")
    if cudart and not cudart.problem:
        found[f"libcudart {_dotted(cudart.version)}"] = cudart.version
    most = driver.version[0] if driver and driver.version and not driver.problem else None
    got = ", ".join(found) or (f"libcudart {cudart}" if cudart else "no libcudart.so and no cuda-bindings")
    if any(most is None or version[0] <= most for version in found.values()):
        return Requirement("CUDA", got)
    expected = f"CUDA {most} or older for this driver" if found else "the CUDA runtime, or cuda-bindings"
    if jetpack:
        remedy = f"sudo apt install nvidia-jetpack (or cuda-cudart-{'-'.join(map(str, jetpack.cuda))} alone)"
    else:
        remedy = f"pip install 'cuda-bindings=={most}.*'" if most else "pip install 'lp-edge[gpu]'"
        remedy += ", or update the NVIDIA driver" if found else ""
    return Requirement("CUDA", got, expected, remedy, "error" if found or jetpack else "warning")


def _tensorrt(
    host: Host, libraries: Mapping[str, _Library], jetpack: JetPack | None, capability: Version
) -> Requirement:
    """Libraries, then bindings for this Python, then whether it knows the GPU."""
    infer, name = libraries.get("libnvinfer.so"), "TensorRT"
    driver = libraries.get("libcuda.so.1")
    cuda = driver.version[0] if driver and driver.version and not driver.problem else 13
    wheel = (
        "tensorrt==8.5.3.1 (Python 3.10, flavour tensorrt8)" if cuda < 12 else f"tensorrt-cu{min(cuda, 13)}"
    )
    if infer is None or infer.problem:
        got = f"libnvinfer {infer}" if infer else "no libnvinfer.so"
        if jetpack:
            wanted = f"TensorRT {_dotted(jetpack.tensorrt)} or newer, as JetPack {jetpack.name} has"
            remedy = "sudo apt install nvidia-jetpack (or tensorrt alone)"
            return Requirement(name, got, wanted, remedy, "error")
        remedy = f"for --backend tensorrt: pip install {wheel}"
        return Requirement(name, got, "TensorRT 8.5 or newer", remedy, "warning" if infer else "note")
    if cuda < 13 and host.distribution("tensorrt-cu13-bindings"):
        got, expected = f"{_dotted(infer.version)} for CUDA 13", f"one for CUDA {cuda}, as the driver"
        remedy = f"pip uninstall -y tensorrt-cu13; pip install {wheel}, or update the NVIDIA driver"
        return Requirement(name, got, expected, remedy, "error")
    got = _dotted(infer.version)
    if infer.version < (8, 5):
        remedy = "flash JetPack 5.1 or newer" if jetpack else "pip install --upgrade tensorrt"
        return Requirement(name, got, "TensorRT 8.5 or newer", remedy, "error" if jetpack else "warning")
    if host.module("tensorrt") is None:
        return _bindings(host, got, jetpack)
    least, most = _range(infer.version)
    if capability and not least <= capability <= most:
        expected = (
            f"a GPU of compute capability {_dotted(least)} to {_dotted(most)}, not {_dotted(capability)}"
        )
        remedy = "install TensorRT 10.8 or newer" if capability > most else "use --backend cuda or cpu"
        return Requirement(name, got, expected, remedy, "error")
    return Requirement(name, f"{got} with its Python bindings")


def _range(version: Version) -> tuple[Version, Version]:
    """Smallest and largest compute capability that a TensorRT knows (NVIDIA's support matrices)."""
    least = (6, 0) if version < (10,) else (7, 0) if version < (10, 5) else (7, 5)
    return least, (9, 0) if version < (10, 8) else (99,)


def _bindings(host: Host, got: str, jetpack: JetPack | None) -> Requirement:
    """The library is there, its Python package is not to be seen."""
    python = _dotted(host.python)
    expected = f"its Python package for Python {python}"
    got += f" without a Python package for Python {python}"
    if jetpack is None:
        return Requirement("TensorRT", got, expected, f"pip install tensorrt=={got.split()[0]}", "warning")
    if host.python != jetpack.python:
        own = _dotted(jetpack.python)
        if jetpack.python < (3, 10):
            remedy = (
                f"JetPack {jetpack.name} has it for Python {own} only: build NVIDIA's bindings for {python}, or update to "
                "JetPack 6 (docs/jetson.md)"
            )
        else:
            remedy = f"make the virtual environment with python{own} and --system-site-packages"
        return Requirement("TensorRT", got, expected, remedy, "error")
    remedy = "sudo apt install python3-libnvinfer"
    if any(host.root.glob("usr/lib/python3*/dist-packages/tensorrt")):
        remedy = "make the virtual environment with --system-site-packages"
    return Requirement("TensorRT", got, expected, remedy, "error")


def _flavor(libraries: Mapping[str, _Library]) -> Iterator[Requirement]:
    infer = libraries.get("libnvinfer.so")
    if infer and (8, 5) <= infer.version < (10,):
        got, expected = f"TensorRT {_dotted(infer.version)}", "a bundle of flavour tensorrt8"
        remedy = "lp-export --family liveportrait --flavor tensorrt8, where PyTorch is"
        yield Requirement("bundle", got, expected, remedy, "note")


def _onnxruntime(
    host: Host, machine: Machine, libraries: Mapping[str, _Library], jetpack: JetPack | None
) -> Requirement:
    """Whether onnxruntime-gpu has kernels for this GPU, and the driver and the cuDNN that it was built for are here."""
    name, wheel = "onnxruntime-gpu", host.distribution("onnxruntime-gpu")
    install = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu"
    if jetpack:
        install = f"{install} --index-url {jetpack.wheels}" if jetpack.wheels else ""
    if wheel is None:
        remedy = f"for --backend cuda: {install}" if install else "use --backend tensorrt"
        return Requirement(name, "not installed", "", remedy, "note")
    tags = re.findall(r"(?m)^Tag: (\S+)", wheel.read_text("WHEEL") or "")
    if jetpack and any("manylinux" in tag for tag in tags) and "Thor" not in machine.jetson:
        got = f"{wheel.version}, the generic ARM wheel"
        remedy = install or "use --backend tensorrt: no wheel with them is known for this JetPack"
        return Requirement(name, got, "kernels for the Jetson's GPU (sm_87)", remedy, "warning")
    cuda, wanted = _needs(host)
    got = wheel.version + (f" for CUDA {cuda}" if cuda else "")
    least = None if jetpack else _DRIVERS.get(cuda)
    if least and machine.driver and _named(machine.driver) < least:
        expected = f"driver {_dotted(least)} or newer, not {machine.driver}"
        older = "1.27" if cuda == 13 else "1.19"
        remedy = f"update the NVIDIA driver, or pip install 'onnxruntime-gpu<{older}'"
        return Requirement(name, got, expected, remedy, "error")
    cudnn = libraries.get("libcudnn.so")
    if wanted and (cudnn is None or cudnn.problem or cudnn.version[:1] != (wanted,)):
        got += f", cuDNN {cudnn}" if cudnn else ", no libcudnn.so"
        remedy = "sudo apt install nvidia-jetpack" if jetpack else f"pip install nvidia-cudnn-cu{cuda}"
        return Requirement(name, got, f"cuDNN {wanted}", remedy, "warning")
    return Requirement(name, got)


def _needs(host: Host) -> tuple[int, int]:
    """Major versions of CUDA and cuDNN that ONNX Runtime's CUDA provider is made for; 0 where it does not show."""
    folder = host.module("onnxruntime")
    if folder is None:
        return 0, 0
    try:
        path = folder / "capi" / "libonnxruntime_providers_cuda.so"
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = [re.search(rb"%s\.so\.(\d+)\0" % name, data) for name in (b"libcublasLt", b"libcudnn")]
            cuda, cudnn = (int(match[1]) if match else 0 for match in found)
    except (OSError, ValueError):  # not there, or empty
        return 0, 0
    return cuda, cudnn or (9 if cuda >= 13 else 0)  # since 1.31 it is loaded at run time instead


def _cards(machine: Machine) -> Iterator[Requirement]:
    for gpu in machine.gpus:
        if re.search(r"GTX 16\d\d", gpu.name):
            expected = "another card for fp16, which gives black faces on this one"
            yield Requirement("precision", gpu.name, expected, "use a bundle in fp32", "note")


def _memory(host: Host, l4t: Version) -> Iterator[Requirement]:
    """On a Jetson memory is the GPU's too; elsewhere the card has its own."""
    if not l4t:
        return
    kib = {key: int(value) for key, value in re.findall(r"(?m)^(\w+):\s+(\d+) kB", host.text("proc/meminfo"))}
    if "MemAvailable" in kib:
        free, swap = kib["MemAvailable"] / 2**20, kib.get("SwapFree", 0) / 2**20
        got = f"{free:.1f} GiB of {kib.get('MemTotal', 0) / 2**20:.1f} are free, swap {swap:.1f} GiB"
        if free < 4:
            remedy = "end the desktop (sudo systemctl isolate multi-user.target) and other programs, fp16 bundle, batch 1 (docs/jetson.md)"
            yield Requirement(
                "memory", got, "about 4 GiB while engines are built (estimate)", remedy, "warning"
            )
        else:
            yield Requirement("memory", got)
    zram = re.findall(r"(?m)^(/dev/zram\d+)", host.text("proc/swaps"))
    if zram:
        remedy = "sudo systemctl disable --now nvzramconfig and restart"
        yield Requirement(
            "swap", f"{len(zram)} zram devices", "none while engines are built or measured", remedy, "note"
        )


def _power(host: Host) -> Iterator[Requirement]:
    """The mode that nvpmodel wrote down, and whether its list has a faster one."""
    status = re.search(r"pmode:(\d+)", host.text("var/lib/nvpmodel/status"))
    if status is None:
        return
    modes = {
        int(number): name
        for number, name in re.findall(r"POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", host.text("etc/nvpmodel.conf"))
    }
    mode = int(status[1])
    got = f"mode {mode}" + (f" ({modes[mode]})" if mode in modes else "")
    # MAXN_SUPER where there is one, MAXN else; its number differs from board to board
    best = max((key for key, name in modes.items() if name.startswith("MAXN")), default=mode,
               key=lambda key: len(modes[key]))  # fmt: skip
    if mode == best:
        yield Requirement("power", got)
    else:
        remedy = f"to measure: sudo nvpmodel -m {best} && sudo jetson_clocks"
        yield Requirement("power", got, f"mode {best} ({modes[best]}) for full speed", remedy, "note")


def _disk(host: Host) -> Requirement:
    folder = next(folder for folder in (host.cache, *host.cache.parents) if folder.exists())
    free = shutil.disk_usage(folder).free / _GIB
    if free < 2:
        remedy = "free some, or set XDG_CACHE_HOME to a folder on another disk"
        got = f"{free:.1f} GiB are free at {host.cache}"
        return Requirement("disk", got, "2 GiB for engines", remedy, "warning")
    return Requirement("disk", f"{free:.0f} GiB for engines at {host.cache}")
