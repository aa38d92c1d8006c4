"""The foreign layer of CUDA against functions of ours, and against whatever real headers, libraries and packages are found."""

from __future__ import annotations

import ctypes
import enum
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lp_edge.engines import cuda_calls
from lp_edge.engines.cuda_calls import (
    PROTOTYPES,
    CudaLibraries,
    CudaPython,
    CudaRuntime,
    load_driver,
    runtimes,
)
from lp_edge.errors import BackendUnavailable
from lp_edge.tests.fake_cuda.device import FakeCuda

HANDLE = 0x7F12_3456_789A  # needs more than 32 bits

BASIC = {"int", "uint", "ulong", "size", "ptr", "float", "name", "text"}
ENUMERATIONS = {
    (prototype.library, kind.lstrip("*"))
    for prototype in PROTOTYPES.values()
    for kind in prototype.parameters
    if kind.lstrip(">=*") not in BASIC
}


def test_only_known_kinds_and_libraries():
    assert {name for _, name in ENUMERATIONS} == {
        "cudaDeviceAttr",
        "cudaError_t",
        "cudaMemcpyKind",
        "cudaStreamCaptureMode",
    }
    assert {prototype.library for prototype in PROTOTYPES.values()} == {"cudart", "cuda"}


def test_the_fake_is_a_runtime():
    runtime: CudaRuntime = FakeCuda()
    assert runtime("cudaDriverGetVersion") == (0, 12040)


# -- real headers -------------------------------------------------------------------------------


def headers() -> Iterator[Path]:
    for folder in cuda_calls._folders():
        yield from (
            path for place in ("include", "../../include") if (path := folder.parent / place).is_dir()
        )


def header(name: str) -> str:
    for folder in headers():
        if (path := folder / name).is_file():
            return path.read_text(errors="replace")
    pytest.skip(f"no {name} here")


_HANDLES = r"(?:cudaStream_t|cudaEvent_t|cudaGraph_t|cudaGraphExec_t|CUcontext)"
_C_KINDS = {
    r"void ?\*\*": {">ptr", "ptr"},
    rf"{_HANDLES} ?\*": {">ptr"},
    rf"(?:const )?void ?\*|{_HANDLES}": {"ptr"},
    r"char ?\*": {">name"},
    r"int ?\*": {">int"},
    r"cudaStreamCaptureMode ?\*": {"*cudaStreamCaptureMode"},
    r"size_t ?\*": {">size"},
    r"float ?\*": {">float"},
    r"unsigned long long": {"ulong"},
    r"unsigned int": {"uint"},
    r"int|CUdevice": {"int"},
    r"size_t": {"size"},
}


def kinds_of(declared: str) -> set[str]:
    """What a C parameter may be called in our table."""
    words = re.sub(r"\b__dv\(.*?\)|\benum\b|\bstruct\b", "", declared).strip()
    plain = " ".join(re.sub(r"\b(\w+)$", "", words).split()) if re.search(r"[\s*]\w+$", words) else words
    for pattern, kinds in _C_KINDS.items():
        if re.fullmatch(pattern, plain):
            return kinds
    return {plain}


@pytest.mark.parametrize(("library", "name"), [("cudart", "cuda_runtime_api.h"), ("cuda", "cuda.h")])
def test_prototypes_are_those_of_nvidias_headers(library: str, name: str):
    text = re.sub(r"/\*.*?\*/", "", header(name), flags=re.DOTALL)
    for prototype in (p for p in PROTOTYPES.values() if p.library == library):
        declared = re.search(rf"^[\w\s*]+[ *]{prototype.name}\(([^;{{]*)\)\s*;", text, re.MULTILINE)
        assert declared, f"{prototype.name} is not declared"
        given = [part.strip() for part in declared[1].replace("__dv(0)", "").split(",")]
        given = [part for part in given if part not in ("", "void")]
        ours = [kind for kind in prototype.parameters if kind[0] != "="]
        assert len(given) == len(ours), f"{prototype.name}: {given} {ours}"
        for declared_one, kind in zip(given, ours, strict=True):
            assert kind in kinds_of(declared_one), f"{prototype.name}: {declared_one!r} is not {kind}"
        # A macro would make C programs call another symbol than the one that ctypes finds.
        assert not re.search(rf"^\s*#define\s+{prototype.name}\s+\w+_v\d", text, re.MULTILINE), prototype.name


# -- real libraries -----------------------------------------------------------------------------


def real_libraries() -> list[str]:
    found = []
    for path in cuda_calls._places(cuda_calls._CUDART):
        try:
            CudaLibraries(path)
        except BackendUnavailable:
            continue
        found.append(path)
    return found


@pytest.fixture(params=real_libraries() or [None])
def libraries(request: pytest.FixtureRequest) -> CudaLibraries:
    if request.param is None:
        pytest.skip("no libcudart here")
    return CudaLibraries(request.param)


def cuda_python() -> CudaPython:
    try:
        return CudaPython()
    except BackendUnavailable as error:
        pytest.skip(f"cuda-python: {error.got}")


def test_the_runtime_library_has_every_call(libraries: CudaLibraries):
    for prototype in PROTOTYPES.values():
        if prototype.library == "cudart":
            assert libraries._function(prototype.name)[0]


def check_runtime(runtime: CudaRuntime) -> None:
    assert runtime("cudaGetErrorName", 2) == (0, b"cudaErrorMemoryAllocation")
    status, words = runtime("cudaGetErrorString", 35)
    assert status == 0 and b"driver" in words.lower()
    status, *version = runtime("cudaRuntimeGetVersion")
    assert status or version[0] >= 11000


def test_real_libraries_answer(libraries: CudaLibraries):
    check_runtime(libraries)


def test_real_cuda_python_answers():
    runtime = cuda_python()
    try:
        check_runtime(runtime)
    except RuntimeError as error:  # older packages cannot even tell an error's name without a driver
        assert "not found" in str(error) or "dlopen" in str(error)


def test_real_cuda_python_has_every_call_with_our_inputs():
    modules = cuda_python()._modules
    for prototype in PROTOTYPES.values():
        function = getattr(modules[prototype.library], prototype.name, None)
        assert function, f"{modules[prototype.library].__name__} has no {prototype.name}"
        signature = re.match(r"\w+\((.*?)\)(?: ->.*)?$", (function.__doc__ or "").splitlines()[0])
        assert signature, function.__doc__
        bare = re.sub(r"\[[^\]]*\]|\|[^,]*", "", signature[1])  # Optional[tuple[bytes] | list[bytes]] is one
        taken = [part for part in bare.split(",") if part.strip()]
        given = [kind for kind in prototype.parameters if kind[0] not in ">="]
        assert len(taken) == len(given), f"{signature[0]} {given}"
    for library, kind in ENUMERATIONS:
        assert hasattr(modules[library], kind), kind


def test_real_cuda_pythons_enumerations_have_our_numbers():
    runtime = cuda_python()._modules["cudart"]
    for name, number in {
        "cudaDevAttrClockRate": 13,
        "cudaDevAttrMultiProcessorCount": 16,
        "cudaDevAttrIntegrated": 18,
        "cudaDevAttrMemoryClockRate": 36,
        "cudaDevAttrGlobalMemoryBusWidth": 37,
        "cudaDevAttrL2CacheSize": 38,
        "cudaDevAttrComputeCapabilityMajor": 75,
        "cudaDevAttrComputeCapabilityMinor": 76,
    }.items():
        assert runtime.cudaDeviceAttr(number).name == name
    assert runtime.cudaMemcpyKind(1).name == "cudaMemcpyHostToDevice"
    assert runtime.cudaMemcpyKind(2).name == "cudaMemcpyDeviceToHost"
    assert runtime.cudaMemcpyKind(3).name == "cudaMemcpyDeviceToDevice"
    assert runtime.cudaStreamCaptureMode(1).name == "cudaStreamCaptureModeThreadLocal"
    for number, name in {
        2: "MemoryAllocation",
        35: "InsufficientDriver",
        100: "NoDevice",
        600: "NotReady",
    }.items():
        assert runtime.cudaError_t(number).name == f"cudaError{name}"
    assert (runtime.cudaStreamNonBlocking, runtime.cudaEventDisableTiming) == (1, 2)
    assert (runtime.cudaHostAllocPortable, runtime.cudaHostAllocMapped) == (1, 2)


# -- libraries of ours --------------------------------------------------------------------------

_INT, _SIZE, _PTR = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
_CDLL = ctypes.CDLL  # tests put another in its place


def c_function(result: Any, *parameters: Any) -> Any:
    """Make a C function of a Python one."""
    return lambda function: ctypes.CFUNCTYPE(result, *parameters)(function)


def our_cudart(seen: list[Any]) -> SimpleNamespace:
    @c_function(_INT, ctypes.POINTER(_PTR), _SIZE)
    def cuda_malloc(out, size):
        seen.append(size)
        out[0] = HANDLE
        return 0 if size < 1 << 40 else 2

    @c_function(_INT, _PTR, _PTR, _SIZE, _INT, _PTR)
    def copy(to, start, size, kind, stream):
        seen.append((to, start, size, kind, stream))
        return 0

    @c_function(_INT, ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE))
    def info(free, total):
        free[0], total[0] = 1 << 33, 1 << 34
        return 0

    @c_function(_INT, ctypes.POINTER(ctypes.c_float), _PTR, _PTR)
    def elapsed(out, start, end):
        out[0] = 1.5
        return 0

    @c_function(_INT, _PTR, ctypes.POINTER(_PTR))
    def end_capture(stream, out):
        out[0] = None
        return 0

    @c_function(_INT, ctypes.POINTER(_INT))
    def exchange(mode):
        seen.append(mode[0])
        mode[0] = 0
        return 0

    words = ctypes.create_string_buffer(b"cudaErrorOurs")

    @c_function(_PTR, _INT)
    def error_name(status):
        return ctypes.addressof(words)

    return SimpleNamespace(
        cudaMalloc=cuda_malloc,
        cudaMemcpyAsync=copy,
        cudaMemGetInfo=info,
        cudaEventElapsedTime=elapsed,
        cudaStreamEndCapture=end_capture,
        cudaGetErrorName=error_name,
        cudaThreadExchangeStreamCaptureMode=exchange,
    )


def our_driver(seen: list[Any]) -> SimpleNamespace:
    @c_function(_INT, ctypes.POINTER(ctypes.c_char), _INT, _INT)
    def name(out, size, device):
        text = b"Orin\0"
        assert size >= len(text)
        ctypes.memmove(out, text, len(text))
        return 0

    return SimpleNamespace(cuDeviceGetName=name)


@pytest.fixture
def seen() -> list[Any]:
    return []


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> CudaLibraries:
    made = {"libcudart.so.12": our_cudart, "libcuda.so.1": our_driver}

    def load(path: str) -> SimpleNamespace:
        if Path(path).name not in made:
            raise OSError(f"{path}: cannot open shared object file")
        return made[Path(path).name](seen)

    monkeypatch.setattr(cuda_calls.ctypes, "CDLL", load)
    return CudaLibraries("libcudart.so.12")


def test_handles_and_sizes_keep_all_their_bits(ours: CudaLibraries, seen: list[Any]):
    assert ours.words == "libcudart.so.12"
    assert ours("cudaMalloc", 1 << 35) == (0, HANDLE)
    assert ours("cudaMalloc", 1 << 40) == (2,)
    assert ours("cudaMemcpyAsync", HANDLE, HANDLE + 1, 1 << 33, 2, HANDLE + 2) == (0,)
    assert seen == [1 << 35, 1 << 40, (HANDLE, HANDLE + 1, 1 << 33, 2, HANDLE + 2)]
    assert ours("cudaMemGetInfo") == (0, 1 << 33, 1 << 34)
    assert ours("cudaEventElapsedTime", 1, 2) == (0, 1.5)
    assert ours("cudaStreamEndCapture", HANDLE) == (0, 0)
    assert ours("cudaGetErrorName", 2) == (0, b"cudaErrorOurs")


def test_every_function_gets_its_c_types(ours: CudaLibraries):
    program = _CDLL(None)  # functions of C, about which ctypes knows nothing as yet
    ours._libraries["cudart"] = SimpleNamespace(
        cudaMemcpyAsync=program["memcpy"],
        cudaGraphInstantiateWithFlags=program["malloc"],
        cudaGetErrorName=program["strerror"],
    )
    copy, graph, words = (ours._function(name)[0] for name in vars(ours._libraries["cudart"]))
    assert list(copy.argtypes) == [_PTR, _PTR, _SIZE, _INT, _PTR] and copy.restype is _INT
    assert list(graph.argtypes) == [_PTR, _PTR, ctypes.c_ulonglong]
    assert list(words.argtypes) == [_INT] and words.restype is ctypes.c_char_p


def test_texts_and_what_is_read_and_written_cross(ours: CudaLibraries, seen: list[Any]):
    assert ours("cuDeviceGetName", 256, 0) == (0, b"Orin")
    assert ours("cudaThreadExchangeStreamCaptureMode", 1) == (0, 0) and seen == [1]


def test_a_function_that_is_missing_raises(ours: CudaLibraries):
    with pytest.raises(AttributeError, match="cudaFree"):
        ours("cudaFree", 0)


def test_libraries_that_are_missing(monkeypatch: pytest.MonkeyPatch):
    def none(path: str) -> None:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(cuda_calls.ctypes, "CDLL", none)
    with pytest.raises(BackendUnavailable, match=r"libcudart.so.12: cannot open.*JetPack"):
        CudaLibraries("libcudart.so.12")
    with pytest.raises(BackendUnavailable, match=r"there is no NVIDIA driver \(libcuda.so.1: cannot open"):
        load_driver()


def test_where_libraries_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    wheels, home = tmp_path / "nvidia", tmp_path / "toolkit"
    for folder in (
        wheels / "cuda_runtime/lib",
        wheels / "cu13/lib",
        home / "lib64",
        home / "targets/aarch64-linux/lib",
    ):
        folder.mkdir(parents=True)
    for path in (
        wheels / "cuda_runtime/lib/libcudart.so.12",
        wheels / "cu13/lib/libcudart.so.13",
        home / "targets/aarch64-linux/lib/libcudart.so.11.0",
    ):
        path.touch()
    spec = SimpleNamespace(submodule_search_locations=[str(wheels)])
    monkeypatch.setattr(cuda_calls, "find_spec", lambda name: spec if name == "nvidia" else None)
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = [path for path in cuda_calls._places(cuda_calls._CUDART) if not path.startswith("/usr/")]
    assert found == [
        "libcudart.so.13",
        str(wheels / "cu13/lib/libcudart.so.13"),
        "libcudart.so.12",
        str(wheels / "cuda_runtime/lib/libcudart.so.12"),
        "libcudart.so.11.0",
        str(home / "targets/aarch64-linux/lib/libcudart.so.11.0"),
    ]
    names = [name for name, _ in runtimes()]
    assert names[0] == "cuda-python" and [n for n in names[1:] if not n.startswith("/usr/")] == found
    monkeypatch.setattr(cuda_calls, "find_spec", lambda name: None)
    assert str(wheels / "cu13/lib/libcudart.so.13") not in list(cuda_calls._places(cuda_calls._CUDART))


# -- a cuda-python of ours ----------------------------------------------------------------------


class Status(enum.IntEnum):
    """Stands for cudaError_t and CUresult."""

    OK = 0
    MEMORY = 2


class Kind(enum.Enum):
    """Not an int, as in cuda-python, whose calls refuse numbers."""

    UP = 1
    DOWN = 2


class Mode(enum.IntEnum):
    GLOBAL = 0
    LOCAL = 1


class Handle:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value


def our_modules(seen: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    def copy(to: int, start: int, size: int, kind: Kind, stream: int) -> tuple[Any]:
        assert isinstance(kind, Kind)
        seen.append(kind)
        return (Status.OK,)

    def exchange(mode: Mode) -> tuple[Any, Mode]:
        assert mode is Mode.LOCAL
        return Status.OK, Mode.GLOBAL

    runtime = {
        "cudaMemcpyKind": Kind,
        "cudaStreamCaptureMode": Mode,
        "cudaThreadExchangeStreamCaptureMode": exchange,
        "cudaError_t": Status,
        "cudaMemcpyAsync": copy,
        "cudaMalloc": lambda size: (Status.OK, HANDLE) if size < 1 << 40 else (Status.MEMORY, None),
        "cudaMemGetInfo": lambda: (Status.OK, 1, 2),
        "cudaGetErrorName": lambda status: (Status.OK, b"cudaError" + status.name.encode()),
        "cudaStreamCreateWithFlags": lambda flags: (Status.OK, Handle(HANDLE)),
        "cudaEventElapsedTime": lambda start, end: (Status.OK, 1.5),
    }
    driver = {"cuDeviceGetName": lambda size, device: (Status.OK, b"Orin\0\0")}
    return runtime, driver


@pytest.mark.parametrize(
    "names",
    [
        ("cuda.bindings.runtime", "cuda.bindings.driver"),
        ("cuda.cudart", "cuda.cuda"),
    ],
    ids=["bindings", "older"],
)
def test_both_layouts_of_cuda_python(
    monkeypatch: pytest.MonkeyPatch, seen: list[Any], names: tuple[str, ...]
):
    for name in [name for name in sys.modules if name == "cuda" or name.startswith("cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    for name, content in zip(names, our_modules(seen), strict=True):
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    top = ModuleType("cuda")
    top.__path__ = []
    monkeypatch.setitem(sys.modules, "cuda", top)
    if "bindings" in names[0]:
        top = ModuleType("cuda.bindings")
        top.__path__ = []
        monkeypatch.setitem(sys.modules, "cuda.bindings", top)
    top.__version__ = "12.9"
    runtime = CudaPython()
    assert runtime.words == "cuda-python 12.9"
    assert runtime("cudaMemcpyAsync", 1, 2, 3, 2, 0) == (0,)
    assert runtime("cudaMalloc", 4) == (0, HANDLE) and runtime("cudaMalloc", 1 << 40) == (2,)
    assert runtime("cudaMemGetInfo") == (0, 1, 2)
    assert runtime("cudaGetErrorName", 2) == (0, b"cudaErrorMEMORY")
    assert runtime("cudaStreamCreateWithFlags", 1) == (0, HANDLE)
    assert runtime("cudaEventElapsedTime", 1, 2) == (0, 1.5)
    assert runtime("cuDeviceGetName", 256, 0) == (0, b"Orin")
    assert runtime("cudaThreadExchangeStreamCaptureMode", 1) == (0, 0)
    assert seen == [Kind.DOWN]
    with pytest.raises(TypeError, match="size"):
        runtime("cudaMalloc")
    with pytest.raises(ValueError, match="zip"):
        runtime("cudaMemcpyAsync", 1, 2, 3)
    with pytest.raises(AttributeError, match="cudaFree"):
        runtime("cudaFree", 0)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'cuda'"), RuntimeError("broken library")]
)
def test_cuda_python_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fails(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(cuda_calls.importlib, "import_module", fails)
    with pytest.raises(BackendUnavailable, match=r"cuda-python cannot be imported \(.*lp-edge\[gpu\]"):
        CudaPython()
    assert importlib.import_module is fails
