"""The foreign layer of CUDA: which calls of the runtime and the driver are used, who makes them, and what they said.

Nothing here keeps state of the device; :mod:`lp_edge.engines.cuda` builds on it.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

from lp_edge.errors import BackendUnavailable, EngineError, LimitError

__all__ = [
    "INSTALL",
    "NOT_READY",
    "PROTOTYPES",
    "CudaLibraries",
    "CudaPython",
    "CudaRuntime",
    "Prototype",
    "check",
    "load_driver",
    "runtimes",
]

_LOG = logging.getLogger("lp_edge")

# -- the foreign calls --------------------------------------------------------------------------

# Library, name and C parameters after NVIDIA's headers of CUDA 11.4 to 13: ">" marks what the call writes, "*" an
# enumeration that it reads and writes, "=" a result in place of a status. ptr is any handle or address; a name of an
# enumeration is an int in C and a class in cuda-python.
# Structures are avoided on purpose: cudaDeviceProp has another layout in CUDA 11, 12 and 13.
_TABLE: Final = """
cudart  cudaGetDeviceCount             >int
cudart  cudaSetDevice                  int
cudart  cudaDeviceGetAttribute         >int cudaDeviceAttr int
cudart  cudaDriverGetVersion           >int
cudart  cudaRuntimeGetVersion          >int
cudart  cudaDeviceSynchronize
cudart  cudaGetLastError
cudart  cudaGetErrorName               cudaError_t =text
cudart  cudaGetErrorString             cudaError_t =text
cudart  cudaMemGetInfo                 >size >size
cudart  cudaMalloc                     >ptr size
cudart  cudaFree                       ptr
cudart  cudaHostAlloc                  >ptr size uint
cudart  cudaFreeHost                   ptr
cudart  cudaHostGetDevicePointer       >ptr ptr uint
cudart  cudaMemcpyAsync                ptr ptr size cudaMemcpyKind ptr
cudart  cudaMemsetAsync                ptr int size ptr
cudart  cudaStreamCreateWithFlags      >ptr uint
cudart  cudaStreamDestroy              ptr
cudart  cudaStreamSynchronize          ptr
cudart  cudaStreamQuery                ptr
cudart  cudaStreamWaitEvent            ptr ptr uint
cudart  cudaEventCreateWithFlags       >ptr uint
cudart  cudaEventDestroy               ptr
cudart  cudaEventRecord                ptr ptr
cudart  cudaEventQuery                 ptr
cudart  cudaEventSynchronize           ptr
cudart  cudaEventElapsedTime           >float ptr ptr
cudart  cudaThreadExchangeStreamCaptureMode  *cudaStreamCaptureMode
cudart  cudaStreamBeginCapture         ptr cudaStreamCaptureMode
cudart  cudaStreamEndCapture           ptr >ptr
cudart  cudaGraphInstantiateWithFlags  >ptr ptr ulong
cudart  cudaGraphDestroy               ptr
cudart  cudaGraphExecDestroy           ptr
cudart  cudaGraphLaunch                ptr ptr
cuda    cuDeviceGetName                >name int int
cuda    cuCtxGetCurrent                >ptr
cuda    cuCtxSetCurrent                ptr
"""


@dataclass(frozen=True)
class Prototype:
    """A foreign call.

    Attributes:
        library: ``cudart`` or ``cuda`` (the driver).
        name: the call.
        parameters: kinds of its C parameters in order; see the table above.
    """

    library: str
    name: str
    parameters: tuple[str, ...]


PROTOTYPES: Final[Mapping[str, Prototype]] = MappingProxyType(
    {
        name: Prototype(library, name, tuple(parameters))
        for library, name, *parameters in (line.split() for line in _TABLE.strip().splitlines())
    }
)


class CudaRuntime(Protocol):
    """The thin foreign layer: makes the calls of :data:`PROTOTYPES` and interprets nothing.

    Calling it with the name of a call and its inputs (handles, addresses and enumerations as ``int``) returns the status as
    ``int``, followed, when the status is 0, by what the call writes (``int``, ``float`` or ``bytes``). It raises where the
    library or the function itself is missing.
    """

    @property
    def words(self) -> str:
        """What this is, for messages: package or library with its version."""

    def __call__(self, name: str, *inputs: Any) -> tuple[Any, ...]:
        """Status and, when it is 0, the values of a call."""


class CudaPython:
    """The calls through NVIDIA's package ``cuda-python`` (or ``cuda-bindings`` alone), 11.8 to 13.

    Raises:
        BackendUnavailable: the package is not installed or cannot be loaded.
    """

    def __init__(self) -> None:
        self._calls: dict[str, tuple[Any, tuple[Any, ...], tuple[Callable[[Any], Any], ...]]] = {}
        try:
            try:
                names, top = ("runtime", "driver"), "cuda.bindings"
                found = [importlib.import_module(f"{top}.{name}") for name in names]
            except ModuleNotFoundError:  # in older packages the modules stand in the top one
                names, top = ("cudart", "cuda"), "cuda"
                found = [importlib.import_module(f"{top}.{name}") for name in names]
        except Exception as error:  # extension modules raise more than ImportError when a library is missing
            raise BackendUnavailable(
                f"cuda-python cannot be imported ({error})",
                "expected NVIDIA's package with the major version of the driver's CUDA",
                "pip install 'lp-edge[gpu]'",
            ) from error
        self._modules: dict[str, Any] = dict(zip(("cudart", "cuda"), found, strict=True))
        version = getattr(importlib.import_module(top), "__version__", "")
        self.words: Final = f"cuda-python {version}".strip()

    def __call__(self, name: str, *inputs: Any) -> tuple[Any, ...]:
        """See :class:`CudaRuntime`."""
        function, classes, plain = self._calls.get(name) or self._prepare(name)
        if classes:
            inputs = tuple(cls(value) if cls else value for cls, value in zip(classes, inputs, strict=True))
        status, *values = function(*inputs)
        if status:
            return (int(status),)
        return (0, *[make(value) for make, value in zip(plain, values, strict=True)])

    def _prepare(self, name: str) -> tuple[Any, tuple[Any, ...], tuple[Callable[[Any], Any], ...]]:
        """The function, classes for its inputs (none where all are plain), and what makes its results plain."""
        prototype = PROTOTYPES[name]
        module = self._modules[prototype.library]
        kinds = [kind for kind in prototype.parameters if kind[0] not in ">="]
        classes: tuple[Any, ...] = tuple(
            None if kind in _BASIC else getattr(module, kind.lstrip("*")) for kind in kinds
        )
        plain = tuple(_PLAIN.get(kind[1:], int) for kind in prototype.parameters if kind[0] in ">=*")
        self._calls[name] = call = (getattr(module, name), classes if any(classes) else (), plain)
        return call


# What cuda-python's classes of handles become.
_PLAIN: Final[Mapping[str, Callable[[Any], Any]]] = {
    "int": int,
    "size": int,
    "ptr": int,
    "float": float,
    "name": lambda value: bytes(value).rstrip(b"\0"),
    "text": bytes,
}

_BASIC: Final = frozenset({"int", "uint", "ulong", "size", "ptr"})

_C_TYPES: Final[Mapping[str, Any]] = {
    "int": ctypes.c_int,
    "uint": ctypes.c_uint,
    "ulong": ctypes.c_ulonglong,
    "size": ctypes.c_size_t,
    "ptr": ctypes.c_void_p,
    "float": ctypes.c_float,
}


class CudaLibraries:
    """The calls through the shared libraries themselves, by ``ctypes``; CUDA 11.4 and newer.

    Args:
        cudart: path or name of the runtime library, e.g. ``libcudart.so.12``.

    Raises:
        BackendUnavailable: it cannot be loaded.
    """

    def __init__(self, cudart: str) -> None:
        self._functions: dict[str, tuple[Any, bool]] = {}
        self._libraries = {"cudart": _load(cudart)}
        self.words: Final = Path(cudart).name

    def __call__(self, name: str, *inputs: Any) -> tuple[Any, ...]:
        """See :class:`CudaRuntime`."""
        function, plain = self._functions.get(name) or self._function(name)
        if plain:
            return (function(*inputs),)
        given = iter(inputs)
        written: list[Any] = []
        arguments: list[Any] = []
        for kind in PROTOTYPES[name].parameters:
            if kind == "=text":
                return (0, function(*arguments) or b"")
            if kind[0] == ">":
                box = ctypes.create_string_buffer(256) if kind == ">name" else _C_TYPES[kind[1:]]()
                written.append(box)
                arguments.append(ctypes.byref(box))
            elif kind[0] == "*":
                written.append(ctypes.c_int(next(given)))
                arguments.append(ctypes.byref(written[-1]))
            else:
                arguments.append(next(given))
        status = function(*arguments)
        if status:
            return (status,)
        return (0, *(box.value or 0 if isinstance(box, ctypes.c_void_p) else box.value for box in written))

    def _function(self, name: str) -> tuple[Any, bool]:
        """The function, and whether it takes plain numbers only and writes nothing."""
        prototype = PROTOTYPES[name]
        if (library := self._libraries.get(prototype.library)) is None:
            self._libraries[prototype.library] = library = load_driver()
        function = getattr(library, name)
        # Without argtypes ctypes passes an int as 32 bits, which cuts handles off.
        function.argtypes = [_c_type(kind) for kind in prototype.parameters if kind[0] != "="]
        function.restype = ctypes.c_char_p if prototype.parameters[-1:] == ("=text",) else ctypes.c_int
        plain = all(kind[0] not in ">=*" for kind in prototype.parameters)
        self._functions[name] = function, plain
        return function, plain


def _c_type(kind: str) -> Any:
    if kind[0] in ">*":
        return ctypes.c_void_p
    return _C_TYPES.get(kind, ctypes.c_int)  # an enumeration is an int


# -- finding the libraries ----------------------------------------------------------------------

INSTALL: Final = "install the NVIDIA driver and pip install 'lp-edge[gpu]'; on a Jetson CUDA comes with JetPack; or use --backend cpu"
# CUDA 13, 12, 11.
_CUDART: Final = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")


def _folders() -> Iterator[Path]:
    """Where CUDA's libraries lie besides the loader's own places: NVIDIA's wheels, then toolkits."""
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(root).glob("*/lib"), reverse=True)
    homes = [Path(os.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    for home in (*homes, Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)):
        yield from (folder for folder in (home / "lib64", *home.glob("targets/*/lib")) if folder.is_dir())


def _places(names: Sequence[str]) -> Iterator[str]:
    """The libraries of these names, each first as the loader finds it, then by path; newest CUDA first."""
    folders = list(dict.fromkeys(folder.resolve() for folder in _folders()))
    for name in names:
        yield name
        yield from (str(path) for folder in folders if (path := folder / name).is_file())


def _load(path: str) -> Any:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise BackendUnavailable(str(error), f"expected {Path(path).name}", INSTALL) from error


def load_driver() -> Any:
    """The driver's library; BackendUnavailable when there is none."""
    try:
        return _load("libcuda.so.1")
    except BackendUnavailable as error:
        raise BackendUnavailable(
            f"there is no NVIDIA driver ({error.got})", error.expected, INSTALL
        ) from error


def runtimes() -> Iterator[tuple[str, Callable[[], CudaRuntime]]]:
    """What may make the calls here, best first: (name, what makes it or raises BackendUnavailable)."""
    yield "cuda-python", CudaPython
    for path in _places(_CUDART):
        yield path, partial(CudaLibraries, path)


# -- statuses -----------------------------------------------------------------------------------

# Numbers of cudaError_t; CUresult has the same ones for the same faults since CUDA 10.1.
_MEMORY: Final = 2
NOT_READY: Final = 600
_GONE: Final[Mapping[int, str]] = {
    3: "",
    34: "install the NVIDIA driver: only its stub is here",
    35: "update the NVIDIA driver, or pip install 'cuda-bindings==N.*' with the CUDA that nvidia-smi shows",
    36: "update the NVIDIA driver",
    46: "another process holds the GPU exclusively: end it, or set the compute mode to default",
    100: "",
    101: "name a device that nvidia-smi -L lists and CUDA_VISIBLE_DEVICES shows",
    209: "update lp-edge's CUDA libraries to a version that knows this GPU",
    222: "update the NVIDIA driver: a library's code is newer than it can load",
    803: "restart after the driver's update: its library and kernel module differ",
    804: "update the NVIDIA driver: forward compatibility is not for this GPU",
    999: "restart the driver (nvidia-smi tells whether it works), then try again",
}
# After these the context is lost, and every later call of the process fails with the same status.
_LOST: Final = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721})


def check(runtime: CudaRuntime, status: int, call: str, about: str = "") -> None:
    """Turn the status of a call into an error; nothing when it is 0. The one check for all calls.

    Args:
        runtime: whom to ask for the words of a status.
        status: what the call returned.
        call: its name.
        about: what it was doing, with figures.

    Raises:
        LimitError: memory ran out.
        BackendUnavailable: there is no usable driver or device.
        EngineError: anything else.
    """
    if not status:
        return
    got = f"{call} failed with {_status_words(runtime, status)}{f' {about}' if about else ''}"
    if call.startswith("cuda"):
        runtime("cudaGetLastError")  # else the next library that asks for the last error is told of ours
    if status == _MEMORY:
        raise LimitError(
            got,
            "expected enough memory",
            "close other programs on the GPU, or use smaller batches or pictures",
        )
    if status in _GONE:
        raise BackendUnavailable(got, "expected a working NVIDIA GPU and driver", _GONE[status] or INSTALL)
    if status in _LOST:
        raise EngineError(
            got,
            "expected the work on the GPU to run",
            "start the process again: the GPU's context is lost; report it when it comes back",
        )
    raise EngineError(got, "expected success", "try again with lp-doctor; report it when it comes back")


def _status_words(runtime: CudaRuntime, status: int) -> str:
    """``cudaErrorMemoryAllocation (2): out of memory``; the number alone where nobody knows more."""
    parts = []
    for ask in ("cudaGetErrorName", "cudaGetErrorString"):
        try:
            parts.append(runtime(ask, status)[1].decode())
        except Exception as error:  # noqa: BLE001 - a status that the package is too old to know
            _LOG.debug("%s(%d): %s", ask, status, error)
    name = parts[0] if parts else "an unknown status"
    return f"{name} ({status})" + (f": {parts[1]}" if parts[1:] else "")
