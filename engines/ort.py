"""ONNX Runtime as a backend: one class for all of its execution providers.

ONNX Runtime itself replaces a provider that it cannot start by the CPU; here that is an error which says what is
missing. ``onnxruntime`` is imported when the first runner is made. What GPUs need is in :mod:`lp_edge.engines.ort_gpu`.
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
import numpy.typing as npt

from lp_edge.engines import ort_gpu
from lp_edge.engines.external import external_files, is_beside
from lp_edge.engines.ort_gpu import CUDA, TENSORRT, TENSORRT_RTX, Placement, Plan, Resident
from lp_edge.engines.runner import Array, Runner, TensorSpec
from lp_edge.errors import (
    BackendUnavailable,
    BundleError,
    ConfigError,
    EngineError,
    LimitError,
    LpEdgeError,
)

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


# What ONNX Runtime says of options that it does not take, and of those that do not suit the network.
_OPTION_FAULT: Final = re.compile(
    r"[Uu]nknown provider option|Invalid TensorRT EP option|Failed to parse (?:value|provider option)"
    r"|The value for the key|must not specify different values|cannot use the graph capture feature"
)
_NO_MEMORY: Final = re.compile(
    r"out of memory|Failed to allocate memory|OUT_OF_MEMORY|ALLOC_FAILED|is smaller than requested bytes",
    re.IGNORECASE,
)

# Both builds are one Python package under two names: the one installed last wins, so the other has to go first.
_GPU_BUILD = (
    "install the GPU build in place of the other (pip uninstall -y onnxruntime onnxruntime-gpu; "
    "pip install onnxruntime-gpu, driver 580 or newer; 'onnxruntime-gpu<1.27' from 525 on)"
)
_ON_JETSON = "on a Jetson add --index-url of your JetPack (lp-doctor names it)"

PROVIDERS: Final[Mapping[str, Provider]] = {
    p.name: p
    for p in (
        Provider(CPU, "cpu", "", "pip install onnxruntime"),
        Provider(
            CUDA,
            "cuda",
            "libonnxruntime_providers_cuda.so",
            f"{_GPU_BUILD}, and CUDA and cuDNN as it needs them; {_ON_JETSON}; or use --backend cpu",
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
            "pip install onnxruntime onnxruntime-ep-nv-tensorrt-rtx-cu13 (GeForce or RTX, Ampere or newer, driver for "
            "CUDA 13); or use --backend cuda or cpu",
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


def _no_memory(got: str) -> LimitError:
    return LimitError(
        got, "expected enough memory", "close other programs on the GPU, or use smaller batches or pictures"
    )


def _surface(session: Any, model: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a session."""
    return (
        [_spec(node, model) for node in session.get_inputs()],
        [_spec(node, model) for node in session.get_outputs()],
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

    On a GPU, and where CUDA can be used from Python, results can stay on the device (:attr:`resident`), and inputs may be
    :class:`~lp_edge.engines.device.DeviceArray`; calls from several threads then compute one after the other.

    Args:
        model: path of an ONNX file, which may keep its weights in a file beside, or its bytes.
        provider: one of the keys of :data:`PROVIDERS`.
        device_id: index of the GPU; 0 for the CPU.
        threads: threads of one operator on the CPU; 0 = one per core.
        provider_options: options handed to the provider, over those that :func:`~lp_edge.engines.ort_gpu.make_plan` chooses.
        name: what the network is called in messages; by default the file's name.

    Raises:
        BackendUnavailable: ONNX Runtime or the provider is not there, does not start or takes no part of the network.
        ConfigError: an option that the provider does not have, or that does not go together with the rest.
        EngineError: the model cannot be loaded.
        LimitError: memory ran out.
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
        self._gpu: Resident | None = None
        self._max_batch: int | None = None
        self._placement: Mapping[str, Placement] | None = None
        name = name or (model.stem if isinstance(model, Path) else "network")
        ort = import_onnxruntime()
        plugin = self._check(ort, model, name)
        extra = dict(provider_options or {})
        if provider == CPU:
            if extra:
                # Its only switches are the session's own, and what is given to it is ignored without a word.
                raise ConfigError(
                    f"backend cpu is given the options {', '.join(sorted(extra))}",
                    "expected none: ONNX Runtime's CPU provider has no options",
                    "leave them out, or name the backend they are meant for; threads are set by --threads",
                )
            session = self._open(ort, model, name, [(CPU, extra)])
            _give_back_freed_memory()
            super().__init__(name, *_surface(session, name))
        else:
            if hasattr(ort, "preload_dlls"):
                # Finds CUDA and cuDNN of the nvidia-* wheels; it reports on stdout, which belongs to the user.
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    ort.preload_dlls()
                if said.getvalue():
                    _LOG.debug("onnxruntime.preload_dlls: %s", said.getvalue().strip())
            gpu, why = ort_gpu.open_resident(device_id, name)
            session = plan = None
            try:
                plan = ort_gpu.make_plan(
                    ort, provider, device_id, extra, model, name, gpu, plugin=plugin is not None
                )
                session = self._open_planned(ort, model, name, plan, plugin)
                self._placed(ort, ort_gpu.placement_of(session, model), name)
                super().__init__(name, *_surface(session, name))
                if gpu is not None:
                    gpu.start(ort, session, plan, self.inputs, self.outputs)
            except BaseException:
                session = None  # before the stream on which it works
                if gpu is not None:
                    gpu.close()
                if plan is not None:
                    plan.clear()
                raise
            if gpu is None:
                _LOG.warning("%s: results come to the host after every call: %s", name, why)
            self._gpu, self._max_batch = gpu, plan.max_batch(self.inputs)
        # A session that works on our stream belongs to what closes that stream.
        self._session: Any = session if self._gpu is None else None

    @property
    def backend(self) -> str:
        return self._provider.backend

    @property
    def device(self) -> str:
        if self._provider.name == CPU:
            return _cpu_words(self._threads)
        return f"NVIDIA GPU {self._device_id}" if self._gpu is None else self._gpu.cuda.name

    @property
    def resident(self) -> bool:
        return self._gpu is not None

    @property
    def max_batch(self) -> int | None:
        return self._max_batch

    @property
    def placement(self) -> Mapping[str, Placement] | None:
        """Provider -> what it runs of the network; None where ONNX Runtime does not tell, and on the CPU alone."""
        return self._placement

    def upload(self, array: npt.NDArray[Any]) -> Array:
        return array if self._gpu is None else self._gpu.upload(array)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        return super().concatenate(arrays) if self._gpu is None else self._gpu.concatenate(arrays)

    # -- opening --------------------------------------------------------------------------------

    def _check(self, ort: Any, model: Path | bytes, name: str) -> Any:
        """Refuse a model or provider that is not there; the device of a provider that is a plugin, else None."""
        provider = self._provider
        if isinstance(model, Path) and not model.is_file():
            raise EngineError(
                f"{name}: no file {model}", "expected an ONNX file", "check the path, or export again"
            )
        self._large = _weights_beside(model, name)
        available = ort.get_available_providers()
        if provider.name in available:
            return None
        expected = f"expected {provider.name} to run the network"
        found = (
            ort_gpu.plugin_device(ort, self._device_id, expected, provider.remedy)
            if provider.name == TENSORRT_RTX
            else None
        )
        if found is None:
            raise _unavailable(ort, provider, f"this build offers {', '.join(available)}")
        return found

    def _open_planned(self, ort: Any, model: Path | bytes, name: str, plan: Plan, plugin: Any) -> Any:
        """A session on the GPU; without those of our options that the provider refuses."""
        while True:
            providers = [(plan.provider, plan.options)]
            if plan.provider == TENSORRT and CUDA in ort.get_available_providers():
                providers.append((CUDA, plan.behind))
            try:
                return self._open(
                    ort, model, name, [*providers, (CPU, {})], plugin, recorded=bool(plan.graphs)
                )
            except LpEdgeError as error:
                if not plan.give_up(error.got):
                    raise

    def _open(
        self,
        ort: Any,
        model: Path | bytes,
        name: str,
        providers: list[tuple[str, dict[str, str]]],
        plugin: Any = None,
        *,
        recorded: bool = False,
    ) -> Any:
        provider = self._provider
        on_gpu = provider.name != CPU
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Waiting threads would spin and take the cores from decoding, encoding and the other networks: two networks in two
        # threads on two busy cores took 1.8 times the processor time and over twice as long with it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The pattern is one block for all intermediates, planned after the first run and kept beside what that run took:
        # 340 MiB more for LivePortrait's warp, for no time. Small networks run 5 % faster with it. It allocates in the second
        # run, in which a CUDA graph is recorded.
        options.enable_mem_pattern = not recorded if on_gpu else not self._large
        if on_gpu:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            ort.set_default_logger_severity(
                _FATAL
            )  # a library that does not load is reported by the logger only
        try:
            if plugin is not None:
                options.add_provider_for_devices([plugin], providers[0][1])
            session = ort.InferenceSession(
                str(model) if isinstance(model, Path) else model,
                options,
                providers=None if plugin is not None else providers,
                enable_fallback=0,
            )
        except Exception as error:
            text = _words(error)
            if on_gpu and _OPTION_FAULT.search(text):
                raise ConfigError(
                    f"{name}: {provider.name} of ONNX Runtime {ort.__version__} refuses its options ({text})",
                    "expected options that it has, and that suit the network",
                    "correct the provider options",
                ) from error
            if on_gpu and _NO_MEMORY.search(text):
                raise _no_memory(f"{name}: {provider.name} cannot load the network ({text})") from error
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
        return session

    def _placed(self, ort: Any, placement: Mapping[str, Placement] | None, name: str) -> None:
        """Refuse a provider that got no node, and report those that are elsewhere."""
        if placement and self._provider.name not in placement:
            elsewhere = ", ".join(sorted(placement))
            raise _unavailable(ort, self._provider, f"it started, but all of {name} would run on {elsewhere}")
        ort_gpu.report_placement(name, self._provider.name, placement, ort.__version__)
        self._placement = placement

    # -- running --------------------------------------------------------------------------------

    def _stage(self, array: Array) -> Array:
        return super()._stage(array) if self._gpu is None else self._gpu.stage(array)

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self._call(feeds, outputs, keep=False)

    def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self._call(feeds, outputs, keep=True)

    def _call(self, feeds: Mapping[str, Array], outputs: tuple[str, ...], *, keep: bool) -> dict[str, Array]:
        try:
            if self._gpu is not None:
                return self._gpu.infer(feeds, outputs, keep=keep)
            session = self._session  # close() in another thread leaves this call its session
            if session is None:
                raise EngineError(
                    f"{self.name}: infer on a closed runner", "expected an open one", "keep it open"
                )
            return dict(zip(outputs, session.run(list(outputs), dict(feeds)), strict=True))
        except LpEdgeError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in feeds.items())
            got = f"{self.name}: {self._provider.name} failed on {shapes} ({_words(error)})"
            if self._provider.name != CPU and _NO_MEMORY.search(got):
                raise _no_memory(got) from error
            raise EngineError(
                got,
                "expected the network to run",
                "free memory or use smaller pictures when memory ran out; else try --backend cpu and lp-doctor",
            ) from error

    def _close(self) -> None:
        self._session = None
        if self._gpu is not None:
            self._gpu.close()


def describe(model: Path | bytes) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX model as ONNX Runtime sees them; BundleError when it cannot be read."""
    try:
        with OrtRunner(model) as runner:
            return tuple(runner.inputs.values()), tuple(runner.outputs.values())
    except EngineError as error:
        raise BundleError(error.got, error.expected, error.remedy) from error
