"""ONNX Runtime as a backend: one class for all of its execution providers.

ONNX Runtime itself replaces a provider that it cannot start by the CPU; here that is an error which says what is
missing. ``onnxruntime`` is imported when the first runner is made.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lp_edge.engines.external import external_files, is_beside
from lp_edge.engines.runner import Array, Runner, TensorSpec
from lp_edge.errors import BackendUnavailable, BundleError, EngineError

__all__ = [
    "CPU",
    "CUDA",
    "PROVIDERS",
    "TENSORRT",
    "TENSORRT_RTX",
    "OrtRunner",
    "Provider",
    "describe",
    "import_onnxruntime",
]

_LOG = logging.getLogger("lp_edge")

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
TENSORRT_RTX: Final = "NvTensorRTRTXExecutionProvider"

_FATAL: Final = 4  # ONNX Runtime's log severity; its errors arrive as exceptions

_DTYPES: Final[Mapping[str, str]] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(uint16)": "uint16",
    "tensor(int16)": "int16",
    "tensor(uint32)": "uint32",
    "tensor(int32)": "int32",
    "tensor(uint64)": "uint64",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}

# Exceptions of ONNX Runtime that are about the model, whatever the provider.
_MODEL_FAULTS: Final = (
    "InvalidProtobuf",
    "InvalidGraph",
    "NoSuchFile",
    "NoModel",
    "ModelLoaded",
    "NotImplemented",
)


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: ONNX Runtime's name of it.
        backend: the name lp-edge gives it.
        library: shared library beside ONNX Runtime's own that must load, or "".
        remedy: how to get it.
    """

    name: str
    backend: str
    library: str
    remedy: str


# Both builds are one Python package under two names: the one installed last wins, so the other has to go first.
_GPU_BUILD = "install the GPU build in place of the other (pip uninstall -y onnxruntime onnxruntime-gpu; pip install onnxruntime-gpu)"
_ON_JETSON = "on a Jetson take onnxruntime-gpu from NVIDIA's wheel index for your JetPack"

PROVIDERS: Final[Mapping[str, Provider]] = {
    p.name: p
    for p in (
        Provider(CPU, "cpu", "", "pip install onnxruntime"),
        Provider(
            CUDA,
            "cuda",
            "libonnxruntime_providers_cuda.so",
            f"{_GPU_BUILD}, and an NVIDIA driver, CUDA and cuDNN as it needs them; {_ON_JETSON}; or use --backend cpu",
        ),
        Provider(
            TENSORRT,
            "ort-tensorrt",
            "libonnxruntime_providers_tensorrt.so",
            f"{_GPU_BUILD}, and the CUDA and TensorRT libraries that it was built for; {_ON_JETSON}; or use --backend "
            "tensorrt, cuda or cpu",
        ),
        Provider(
            TENSORRT_RTX,
            "tensorrt-rtx",
            "libonnxruntime_providers_nv_tensorrt_rtx.so",
            "install an ONNX Runtime with the TensorRT-RTX provider (GeForce or RTX, Ampere or newer); "
            "or use --backend cuda or cpu",
        ),
    )
}


def import_onnxruntime() -> Any:
    """The module ``onnxruntime``; BackendUnavailable when it cannot be imported."""
    try:
        import onnxruntime
    except Exception as error:  # a broken native library raises more than ImportError
        raise BackendUnavailable(
            f"onnxruntime cannot be imported ({error})",
            "expected ONNX Runtime 1.18 or newer",
            "pip install onnxruntime (for NVIDIA GPUs: onnxruntime-gpu)",
        ) from error
    return onnxruntime


def _missing_library(ort: Any, provider: Provider) -> str:
    """What the loader says about the provider's library, or "" when it loads."""
    if not provider.library:
        return ""
    folder = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / provider.library))
    except OSError as error:
        return str(error)
    return ""


def _words(error: Exception) -> str:
    """An exception of ONNX Runtime on one line, without the place in its source that it may begin with."""
    return re.sub(r"^\S+\.(?:cc|h):\d+ .*?\)\s+(?=[A-Z])", "", " ".join(str(error).split()))


def _unavailable(ort: Any, provider: Provider, why: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"backend {provider.backend} ({provider.name} of ONNX Runtime {ort.__version__}) is not there: {why}",
        f"expected {provider.name} to run the network",
        provider.remedy,
    )


def _spec(node: Any, model: str) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise EngineError(
            f"{model}: tensor {node.name} has type {node.type}",
            f"expected one of {', '.join(_DTYPES)}",
            "export the network with plain tensors",
        )
    shape = tuple(
        axis if isinstance(axis, (int, str)) and axis != "" else f"?{position}"
        for position, axis in enumerate(node.shape)
    )
    return TensorSpec(node.name, np.dtype(dtype), shape)


def _weights_beside(model: Path | bytes, name: str) -> bool:
    """Whether weights are in a file of their own; refuses a model whose file is not there, or not beside it."""
    try:
        files = external_files(model)
    except OSError as error:
        raise EngineError(
            f"{name}: {model!s} cannot be read ({error})", "expected an ONNX file", ""
        ) from error
    for file in files:
        if isinstance(model, bytes):
            raise EngineError(
                f"{name}: the model is given as bytes, but its weights are in the file {file!r}",
                "expected its path",
                "give the path of the ONNX file, with its weights beside it",
            )
        if not is_beside(file):
            raise EngineError(
                f"{name}: {model} takes its weights from {file!r}",
                "expected a file beside it",
                "use a model from a source you trust",
            )
        if not (model.parent / file).is_file():
            raise EngineError(
                f"{name}: no file {model.parent / file} with the weights of {model.name}",
                "expected it beside the model",
                "keep both files together, or export again",
            )
    return bool(files)


def _give_back_freed_memory() -> None:
    """Let the C library return what loading freed: 50 MiB after LivePortrait's warp, which stay beside its first run."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _cpu_words(threads: int) -> str:
    words = f"CPU ({platform.machine()}"
    return f"{words}, {threads} threads)" if threads else f"{words})"


class OrtRunner(Runner):
    """A network on one execution provider of ONNX Runtime.

    Args:
        model: path of an ONNX file, which may keep its weights in a file beside, or its bytes.
        provider: one of the keys of :data:`PROVIDERS`.
        device_id: index of the GPU; 0 for the CPU.
        threads: threads of one operator on the CPU; 0 = one per core.
        provider_options: options handed to the provider as they are.
        name: what the network is called in messages; by default the file's name.

    Raises:
        BackendUnavailable: ONNX Runtime or the provider is not there, does not start or takes no part of the network.
        EngineError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: Path | bytes,
        provider: str = CPU,
        device_id: int = 0,
        threads: int = 0,
        provider_options: Mapping[str, str] | None = None,
        *,
        name: str = "",
    ) -> None:
        if provider not in PROVIDERS:
            raise BackendUnavailable(
                f"unknown execution provider {provider!r}",
                f"expected one of {', '.join(PROVIDERS)}",
                "choose one",
            )
        self._provider = PROVIDERS[provider]
        self._device_id, self._threads = device_id, threads
        name = name or (model.stem if isinstance(model, Path) else "network")
        ort = import_onnxruntime()
        self._session: Any = self._open(ort, model, name, dict(provider_options or {}))
        super().__init__(
            name,
            [_spec(node, name) for node in self._session.get_inputs()],
            [_spec(node, name) for node in self._session.get_outputs()],
        )

    @property
    def backend(self) -> str:
        return self._provider.backend

    @property
    def device(self) -> str:
        if self._provider.name == CPU:
            return _cpu_words(self._threads)
        return f"NVIDIA GPU {self._device_id}"

    # -- opening --------------------------------------------------------------------------------

    def _open(self, ort: Any, model: Path | bytes, name: str, extra: dict[str, str]) -> Any:
        provider = self._provider
        if isinstance(model, Path) and not model.is_file():
            raise EngineError(
                f"{name}: no file {model}", "expected an ONNX file", "check the path, or export again"
            )
        large = _weights_beside(model, name)
        available = ort.get_available_providers()
        if provider.name not in available:
            raise _unavailable(ort, provider, f"this build offers {', '.join(available)}")
        on_gpu = provider.name != CPU
        if on_gpu and hasattr(ort, "preload_dlls"):
            # Finds CUDA and cuDNN of the nvidia-* wheels; it reports on stdout, which belongs to the user.
            with contextlib.redirect_stdout(io.StringIO()) as said:
                ort.preload_dlls()
            if said.getvalue():
                _LOG.debug("onnxruntime.preload_dlls: %s", said.getvalue().strip())
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Waiting threads would spin and take the cores from decoding, encoding and the other networks: two networks in two
        # threads on two busy cores took 1.8 times the processor time and over twice as long with it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The pattern is one block for all intermediates, planned after the first run and kept beside what that run took:
        # 340 MiB more for LivePortrait's warp, for no time. Small networks run 5 % faster with it.
        options.enable_mem_pattern = on_gpu or not large
        if on_gpu:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            ort.set_default_logger_severity(
                _FATAL
            )  # a library that does not load is reported by the logger only
        try:
            session = ort.InferenceSession(
                str(model) if isinstance(model, Path) else model,
                options,
                providers=self._providers(available, extra),
                enable_fallback=0,
            )
        except Exception as error:
            text = _words(error)
            if on_gpu and type(error).__name__ not in _MODEL_FAULTS:
                why = _missing_library(ort, provider)
                raise _unavailable(ort, provider, f"{text}; {why}" if why else text) from error
            raise EngineError(
                f"{name}: ONNX Runtime {ort.__version__} cannot load the model ({text})",
                "expected an intact ONNX file with operators it knows",
                "export the bundle again, or update onnxruntime",
            ) from error
        if (got := session.get_providers())[0] != provider.name:
            why = _missing_library(ort, provider) or "ONNX Runtime could not start it"
            raise _unavailable(ort, provider, f"{why}; it offers {got[0]} in its place")
        if on_gpu and (elsewhere := self._all_elsewhere(session)):
            raise _unavailable(ort, provider, f"it started, but all of {name} would run on {elsewhere}")
        if not on_gpu:
            _give_back_freed_memory()
        return session

    def _providers(self, available: Sequence[str], extra: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
        """The provider asked for, then what ONNX Runtime needs for single operators that it does not know."""
        name = self._provider.name
        if name == CPU:
            return [(CPU, extra)]
        device = {"device_id": str(self._device_id)}
        chosen = [(name, {**device, **extra})]
        if name == TENSORRT and CUDA in available:
            chosen.append((CUDA, device))
        return [*chosen, (CPU, {})]

    def _all_elsewhere(self, session: Any) -> str:
        """Where everything went when the provider got no part of the graph, else "" (also when not known)."""
        # Newer ONNX Runtime only; without it the order of the providers is all that can be checked.
        if not hasattr(session, "get_provider_graph_assignment_info"):
            return ""
        try:
            used = {part.ep_name for part in session.get_provider_graph_assignment_info()}
        except Exception as error:  # noqa: BLE001 - a diagnosis must not end the run
            _LOG.debug("no assignment of nodes to providers: %s", error)
            return ""
        return "" if not used or self._provider.name in used else ", ".join(sorted(used))

    # -- running --------------------------------------------------------------------------------

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        session = self._session  # close() in another thread leaves this call its session
        if session is None:
            raise EngineError(
                f"{self.name}: infer on a closed runner", "expected an open one", "keep it open"
            )
        try:
            results = session.run(list(outputs), dict(feeds))
        except Exception as error:
            shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in feeds.items())
            text = _words(error)
            raise EngineError(
                f"{self.name}: {self._provider.name} failed on {shapes} ({text})",
                "expected the network to run",
                "free memory or use smaller pictures when memory ran out; else try --backend cpu and lp-doctor",
            ) from error
        return dict(zip(outputs, results, strict=True))

    def _close(self) -> None:
        self._session = None


def describe(model: Path | bytes) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX model as ONNX Runtime sees them; BundleError when it cannot be read."""
    try:
        with OrtRunner(model) as runner:
            return tuple(runner.inputs.values()), tuple(runner.outputs.values())
    except EngineError as error:
        raise BundleError(error.got, error.expected, error.remedy) from error
