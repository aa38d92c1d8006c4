"""ONNX Runtime on an NVIDIA GPU: results that stay on the device, options of its providers, and where its nodes run.

A network is run through IO binding: ONNX Runtime is told the addresses of our memory, queues its work on a stream of ours
(``user_compute_stream``) and returns without waiting (``disable_synchronize_execution_providers``). So a
:class:`~lp_edge.engines.device.DeviceArray` goes from one network to the next without the host.

**What is read on the host.** IO binding copies an input that the CPU reads (the sizes of a Resize, say) at the time it is
bound, on a stream that does not wait for ours. Such inputs are therefore given as host arrays; where ONNX Runtime (before
1.23) does not tell which they are, everything queued is waited for before binding.

**CUDA graphs** (option ``enable_cuda_graph``, of TensorRT ``trt_cuda_graph_enable``; off unless asked for). A recorded launch
reads and writes the addresses it was recorded with, whatever is bound later, and ONNX Runtime does not check that. So every
set of shapes has an id of its own (``gpu_graph_id``) and memory of its own, into and out of which each call copies. The
TensorRT provider knows no ids: it gets one set of shapes, and others are refused. The CUDA provider keeps its records per
thread, so one thread makes all such calls. It records in CUDA's *global* mode, in which threads of the default mode may not
allocate memory; a thread that used :class:`~lp_edge.engines.cuda.Cuda` once is of another mode and may, whatever it calls.
Threads of other libraries that use the GPU without ever coming here spoil a recording: run every shape once before they begin.

What is said here of ONNX Runtime was read in its sources and in the libraries of onnxruntime-gpu 1.31.1 and
onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0; it did not run on a GPU.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib
import logging
import operator
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from lp_edge.engines import device
from lp_edge.engines.cuda import SharedCuda, shared_cuda
from lp_edge.engines.device import DeviceArray, device_array
from lp_edge.engines.runner import Array, TensorSpec, fetch, to_host
from lp_edge.engines.trt_build import Profile, TensorRtConfig, profile_of
from lp_edge.engines.trt_graph import Graph, read_graph
from lp_edge.errors import BackendUnavailable, ConfigError, EngineError, LpEdgeError, OutputError, TensorError

__all__ = [
    "CUDA",
    "TENSORRT",
    "TENSORRT_RTX",
    "Placement",
    "Plan",
    "Resident",
    "make_plan",
    "open_resident",
    "placement_of",
    "plugin_device",
    "report_placement",
    "result_shape",
]

_LOG = logging.getLogger("lp_edge")

CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"
TENSORRT_RTX: Final = "NvTensorRTRTXExecutionProvider"

_FATAL: Final = 4  # log severity
_ALIGNMENT: Final = 256  # of ONNX Runtime's own device memory, for which its kernels were written
_GRAPHS: Final = 8  # sets of shapes that are recorded; further ones run without a record
_NO_GRAPH: Final = -1  # the gpu_graph_id of a call that is neither recorded nor replayed
_RTX_PACKAGE: Final = "onnxruntime_ep_nv_tensorrt_rtx"
_GIB: Final = 1 << 30

# Options that this module sets itself; another value would be ignored or give wrong numbers.
_OURS: Final = ("user_compute_stream", "has_user_compute_stream")
_UNKNOWN: Final = re.compile(r"(?:[Uu]nknown provider option|Invalid TensorRT EP option)\W+(\w+)")
_GRAPH_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    CUDA: ("enable_cuda_graph",),
    TENSORRT: ("trt_cuda_graph_enable",),
    TENSORRT_RTX: ("enable_cuda_graph", "nv_cuda_graph_enable"),  # the second one up to ONNX Runtime 1.22
}
_PREFIX: Final[Mapping[str, str]] = {TENSORRT: "trt", TENSORRT_RTX: "nv"}

_CUDA_DEFAULTS: Final[Mapping[str, str]] = {
    # Few shapes run very often, so cuDNN measures its algorithms once for each: slow first calls, fast others.
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    # Every network has an arena of its own; doubling each would waste up to half of a small GPU.
    "arena_extend_strategy": "kSameAsRequested",
    # TF32 rounds factors to 10 bits, and sampling positions come from fp32 products: half a pixel of 1024.
    "use_tf32": "0",
}


# -- what a session is opened with --------------------------------------------------------------------


@dataclass
class Plan:
    """How a session is opened; :meth:`give_up` takes out what a provider refused.

    Attributes:
        provider: ONNX Runtime's name of it.
        options: of the provider.
        behind: of the CUDA provider that takes what TensorRT does not.
        given: names of the options that are the user's.
        graphs: how many sets of shapes may be recorded as CUDA graphs; 0 = the option is off.
        ordered: the provider works on our stream.
        own_profile: the shapes of the profile are ours, not the user's.
        engines: folder of this network's engines.
    """

    provider: str
    options: dict[str, str]
    behind: dict[str, str]
    given: frozenset[str] = frozenset()
    graphs: int = 0
    ordered: bool = False
    own_profile: bool = False
    engines: Path | None = None

    def give_up(self, words: str) -> bool:
        """Leave out an option of ours that ONNX Runtime named as the reason of a failure; False when there is none."""
        found = _UNKNOWN.search(words)
        if found and (option := found[1]) not in self.given and not (self.graphs and option in _OURS):
            names = _OURS if option in _OURS else (option,)
            had = [options.pop(name, None) for options in (self.options, self.behind) for name in names]
            if option in _OURS:
                self.ordered = False
            _LOG.info(
                "%s runs without the option %s, which it does not have%s",
                self.provider,
                option,
                "; calls wait for the GPU" if option in _OURS else "",
            )
            return any(had)
        if self.own_profile and "profile" in words:
            self.own_profile = False
            for which in ("min", "opt", "max"):
                self.options.pop(f"{_PREFIX[self.provider]}_profile_{which}_shapes")
            _LOG.warning(
                "%s takes parts of this network only, for which no shapes are known (%s); it builds again for every new shape",
                self.provider,
                words,
            )
            return True
        return False

    def clear(self) -> None:
        """Remove the folder of engines when the session did not open, and left none there."""
        if self.engines is not None:
            with contextlib.suppress(OSError):
                self.engines.rmdir()

    def max_batch(self, inputs: Mapping[str, TensorSpec]) -> int | None:
        """Largest batch that the profile allows; None = there is no profile."""
        text = self.options.get(f"{_PREFIX.get(self.provider, '')}_profile_max_shapes", "")
        sizes: dict[str, int] = {}
        for name, first in re.findall(r"([^,;]+):(\d+)(?:x\d+)*", text):
            if name in inputs and inputs[name].shape and isinstance(inputs[name].shape[0], str):
                sizes[name] = max(sizes.get(name, 0), int(first))
        return min(sizes.values(), default=None)


def make_plan(
    ort: Any,
    provider: str,
    device_id: int,
    extra: Mapping[str, str],
    model: Path | bytes,
    name: str,
    resident: Resident | None,
    *,
    plugin: bool = False,
) -> Plan:
    """Options for a provider: ours, with the user's over them.

    Of the user's, ``max_batch``, ``usual_batch`` and ``axes`` (as in :class:`~lp_edge.engines.trt_build.TensorRtConfig`) give the
    shapes of the profile of both TensorRT providers, and ``cache_dir`` the folder of their engines. All others are handed on.

    Args:
        ort: the module ``onnxruntime``.
        provider: ONNX Runtime's name of it.
        device_id: index of the GPU.
        extra: the user's options.
        model: path or content, for the profile and the cache.
        name: of the network.
        resident: streams and memory; None = there is no CUDA to be had.
        plugin: the provider is a library of its own (TensorRT-RTX).

    Raises:
        ConfigError: an option is the runner's own, or does not go together with the rest.
    """
    given = {str(key): str(value) for key, value in extra.items()}
    for key in _OURS:
        if key in given:
            raise ConfigError(f"option {key} is given", "expected the runner's own stream", "leave it out")
    if given.pop("device_id", str(device_id)) != str(device_id):
        raise ConfigError(
            f"option device_id is {extra['device_id']} and the device is {device_id}",
            "expected one of them",
            "leave the option out, and choose the device by BackendConfig.device or --device",
        )
    shaped = provider in _PREFIX
    folder = given.pop("cache_dir", "") if shaped else ""
    config = TensorRtConfig.from_options(
        {key: given.pop(key) for key in ("max_batch", "usual_batch", "axes") if shaped and key in given}
    )
    plan = Plan(provider, {"device_id": str(device_id)}, {"device_id": str(device_id), **_CUDA_DEFAULTS})
    if provider == CUDA:
        plan.options.update(_CUDA_DEFAULTS)
    if shaped:
        graph = read_graph(model)
        profile = _profile(provider, graph, config, given, resident, name)
        plan.own_profile = bool(profile)
        for which, index in (("min", 0), ("opt", 1), ("max", 2)):
            if profile:
                plan.options[f"{_PREFIX[provider]}_profile_{which}_shapes"] = ",".join(
                    f"{tensor}:{'x'.join(map(str, sizes[index]))}" for tensor, sizes in profile.items()
                )
        place = Path(folder) if folder else None
        plan.engines = _engines(ort, provider, model, name, graph, profile, given, resident, place)
        if plan.engines is not None:
            plan.options.update(_cache_options(provider, plan.engines))
    plan.options.update(given)
    plan.given = frozenset(given)
    if _asked(given, _GRAPH_OPTIONS[provider]):
        if resident is None:
            raise ConfigError(
                f"{name}: CUDA graphs are asked for, and CUDA cannot be used here",
                "expected memory at fixed addresses, which a recorded launch needs",
                "pip install 'lp-edge[gpu]', or leave the option out",
            )
        # TensorRT's provider ignores the id of a graph, and so may an older TensorRT-RTX inside ONNX Runtime.
        plan.graphs = _GRAPHS if provider == CUDA or plugin else 1
    if resident is not None:
        plan.ordered = True
        ours = {"user_compute_stream": str(resident.compute.handle)}
        if provider == TENSORRT_RTX:
            ours["has_user_compute_stream"] = "1"  # the others infer it
        plan.options.update(ours)
        plan.behind.update(ours)
    return plan


def _asked(options: Mapping[str, str], names: Sequence[str]) -> bool:
    return any(options.get(key, "").strip().lower() in ("1", "true") for key in names)


def _profile(
    provider: str,
    graph: Graph,
    config: TensorRtConfig,
    given: Mapping[str, str],
    resident: Resident | None,
    name: str,
) -> Profile:
    """Shapes to build for, so that no batch up to the largest builds the engine again; none where an axis has no range."""
    if any(f"{_PREFIX[provider]}_profile_{which}_shapes" in given for which in ("min", "opt", "max")):
        return {}
    small = resident is not None and resident.cuda.total_memory < 12 * _GIB
    batch = config.max_batch or max(4 if small else 8, config.usual_batch)  # as the native backend
    try:
        return profile_of(name, graph.inputs, config, batch)
    except ConfigError as error:
        if config != TensorRtConfig():
            raise
        _LOG.info("%s: %s builds for the shapes that come: %s", name, provider, error.got)
        return {}


def _engines(
    ort: Any,
    provider: str,
    model: Path | bytes,
    name: str,
    graph: Graph,
    profile: Profile,
    given: Mapping[str, str],
    resident: Resident | None,
    folder: Path | None,
) -> Path | None:
    """Where engines are kept; None, with a word in the log, where nothing can be written.

    ONNX Runtime names engines by names of tensors, not by weights, and takes any that it finds. So there is a folder for each
    model (by its digest), version, GPU and set of options, in the place where the native backend keeps its engines.
    """
    from lp_edge.engines.bundle import EngineKey  # which imports the backends
    from lp_edge.engines.trt_cache import EngineCache, cache_folders, digest_of

    cuda = None if resident is None else resident.cuda
    key = EngineKey(
        onnx_sha256=digest_of(model),
        tensorrt=f"{_library_version(ort, provider)} in ONNX Runtime {ort.__version__}",
        gpu="" if cuda is None else cuda.name,
        compute_capability="" if cuda is None else ".".join(map(str, cuda.compute_capability)),
        precision=graph.precision,
        profile=profile,
        flags=tuple(sorted(f"{option}={value}" for option, value in given.items())),
    )
    try:
        root = EngineCache((folder,) if folder else cache_folders(model), name, key).folder() / "onnxruntime"
        place = root / key.key()[:16]
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, OutputError) as error:
        _LOG.warning("%s: engines of %s are not kept: %s", name, provider, error)
        return None
    return place


def _cache_options(provider: str, place: Path) -> dict[str, str]:
    if provider == TENSORRT_RTX:
        return {"nv_runtime_cache_path": str(place)}
    # trt_fp16_enable and its like stay off: then TensorRT 10 takes all types from the graph, where precision is decided.
    return {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(place),
        "trt_timing_cache_enable": "True",
        # One file for all networks, with the GPU's architecture in its name.
        "trt_timing_cache_path": str(place.parent),
    }


def _library_version(ort: Any, provider: str) -> str:
    """Version of the TensorRT that a provider loads; its name alone where that cannot be found out."""
    if provider == TENSORRT_RTX:
        with contextlib.suppress(Exception):
            return f"TensorRT-RTX plugin {importlib.import_module(_RTX_PACKAGE).__version__}"
        return "TensorRT-RTX"
    # The one that the provider's library names: another that is installed must not be loaded beside it.
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    with contextlib.suppress(OSError, AttributeError):
        if named := re.search(rb"libnvinfer\.so\.\d+", library.read_bytes()):
            return f"TensorRT {ctypes.CDLL(named.group().decode()).getInferLibVersion()}"
    return "TensorRT"


def plugin_device(ort: Any, device_id: int, expected: str, remedy: str) -> Any:
    """The GPU as the plugin of TensorRT-RTX offers it; None when there is no such package.

    Raises:
        BackendUnavailable: the plugin does not load, or offers no such GPU.
    """
    if not hasattr(ort, "register_execution_provider_library"):
        return None
    try:
        package = importlib.import_module(_RTX_PACKAGE)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # it loads libraries when it is imported
        raise BackendUnavailable(f"{_RTX_PACKAGE} cannot be imported ({error})", expected, remedy) from error

    def offered() -> list[Any]:
        return [entry for entry in ort.get_ep_devices() if entry.ep_name == TENSORRT_RTX]

    if not offered():
        try:
            ort.register_execution_provider_library(TENSORRT_RTX, package.get_library_path())
        except Exception as error:
            # A process registers a library once, and it may have found no GPU then.
            if "already registered" not in str(error):
                raise BackendUnavailable(
                    f"the plugin of TensorRT-RTX {package.__version__} does not load ({' '.join(str(error).split())})",
                    expected,
                    remedy,
                ) from error
    devices = offered()
    if device_id >= len(devices):
        raise BackendUnavailable(
            f"the plugin of TensorRT-RTX {package.__version__} offers {len(devices)} GPUs, and GPU {device_id} is asked for",
            expected,
            remedy,
        )
    return devices[device_id]


# -- where nodes run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Nodes of a network that one provider runs.

    Attributes:
        nodes: how many, without ``shape_nodes``.
        shape_nodes: those that compute shapes only, from the shapes of inputs; the CPU is their place.
        operators: operator -> how many of ``nodes``.
    """

    nodes: int
    shape_nodes: int
    operators: Mapping[str, int] = field(hash=False)


def placement_of(session: Any, model: Path | bytes) -> Mapping[str, Placement] | None:
    """Provider -> what it runs; None where ONNX Runtime does not tell (before 1.24).

    The session must have been opened with ``session.record_ep_graph_assignment_info``.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    try:
        parts = [(part.ep_name, part.get_nodes()) for part in session.get_provider_graph_assignment_info()]
    except Exception as error:  # noqa: BLE001 - a diagnosis must not end the run
        _LOG.debug("no assignment of nodes to providers: %s", error)
        return None
    names, kinds = _shape_nodes(model)
    nodes: dict[str, Counter[str]] = {}
    shapes: Counter[str] = Counter()
    for provider, part in parts:
        count = nodes.setdefault(provider, Counter())
        for node in part:
            if node.name in names or (not node.name and node.op_type in kinds):
                shapes[provider] += 1
            else:
                count[node.op_type] += 1
    return MappingProxyType(
        {name: Placement(count.total(), shapes[name], dict(count)) for name, count in nodes.items()}
    )


def _shape_nodes(model: Path | bytes) -> tuple[set[str], set[str]]:
    """Nodes of the graph that no number of an input reaches, only shapes: their names, and operators that are always such.

    Nodes that ONNX Runtime makes by itself are in no file, and so count as work.
    """
    try:
        graph = read_graph(model)
    except LpEdgeError:
        return set(), set()
    data = {spec.name for spec in graph.inputs}
    names: set[str] = set()
    free: set[str] = set()
    busy: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("Shape", "Size") and not data.isdisjoint(node.inputs):
            data.update(node.outputs)
            busy.add(node.op)
        else:
            names.add(node.name)
            free.add(node.op)
    return names - {""}, free - busy


def report_placement(
    name: str, provider: str, placement: Mapping[str, Placement] | None, version: str
) -> None:
    """Say in the log what runs elsewhere than asked for, or that this is not known."""
    if placement is None:
        _LOG.info(
            "%s: ONNX Runtime %s does not tell which nodes run on the GPU (1.24 and newer do)", name, version
        )
        return
    elsewhere = {key: value for key, value in placement.items() if key != provider and value.nodes}
    if elsewhere:
        told = "; ".join(
            f"{part.nodes} on {key} ({', '.join(f'{n} {op}' for op, n in Counter(part.operators).most_common())})"
            for key, part in elsewhere.items()
        )
        here = placement[provider].nodes if provider in placement else 0
        _LOG.warning("%s: %d nodes run on %s, but %s; that costs time and copies", name, here, provider, told)


# -- shapes of results --------------------------------------------------------------------------------

_OPERATIONS: Final[Mapping[type[ast.AST], Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Final[Mapping[str, Callable[..., int]]] = {"max": max, "min": min, "Max": max, "Min": min}


def result_shape(shape: Sequence[int | str], axes: Mapping[str, int]) -> tuple[int, ...] | None:
    """Sizes of a result whose axes are numbers, names or formulas of names; None when one is not known.

    Args:
        shape: as in :class:`~lp_edge.engines.runner.TensorSpec`; exporters write formulas such as ``5*H*W//1024``.
        axes: sizes of the named axes of the inputs.

    Example:
        >>> result_shape(("N", "5*H*W//1024+(H+32)//64", 4), {"N": 2, "H": 64, "W": 32})
        (2, 11, 4)
    """
    sizes = []
    for axis in shape:
        if isinstance(axis, int):
            sizes.append(axis)
        elif axis in axes:
            sizes.append(axes[axis])
        else:
            try:
                sizes.append(_value(_formula(axis), axes))
            except (SyntaxError, KeyError, ValueError, ZeroDivisionError, TypeError):
                return None
    return tuple(sizes) if min(sizes, default=1) > 0 else None


@lru_cache(maxsize=256)
def _formula(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _value(node: ast.expr, axes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return axes[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, axes)
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left, axes), _value(node.right, axes))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _FUNCTIONS[node.func.id](*(_value(part, axes) for part in node.args))
    raise ValueError(ast.dump(node))


# -- running ------------------------------------------------------------------------------------------


def open_resident(device_id: int, name: str) -> tuple[Resident | None, str]:
    """Memory and streams of a device; None, and why, where CUDA cannot be used from Python."""
    try:
        share = shared_cuda(device_id)
    except BackendUnavailable as error:
        return None, str(error)
    try:
        return Resident(name, share), ""
    except BaseException:
        share.close()
        raise


class Placed(Protocol):
    """Memory that ONNX Runtime is told of by its address."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""

    @property
    def pointer(self) -> int:
        """Address of the first element."""


def bind(
    binding: Any,
    place: tuple[str, int],
    inputs: Mapping[str, Placed | npt.NDArray[Any]],
    outputs: Mapping[str, Placed | None],
) -> None:
    """Tell an IO binding what to read and write.

    Args:
        binding: of the session.
        place: kind and index of the device that the addresses are on.
        inputs: what is read; NumPy arrays are read on the host.
        outputs: what is written; None = ONNX Runtime makes an array on the host.
    """
    for name, source in inputs.items():
        if isinstance(source, np.ndarray):
            binding.bind_cpu_input(name, source)
        else:
            binding.bind_input(name, *place, source.dtype.type, list(source.shape), source.pointer)
    for name, target in outputs.items():
        if target is None:
            binding.bind_output(name, "cpu")
        else:
            binding.bind_output(name, *place, target.dtype.type, list(target.shape), target.pointer)


@dataclass(frozen=True)
class _Record:
    """A recorded launch: its id, and the memory it reads and writes."""

    number: int
    inputs: Mapping[str, DeviceArray]
    outputs: Mapping[str, DeviceArray]


class Resident:
    """Runs a session on memory of a device that belongs to us.

    Args:
        name: of the network, in messages.
        share: in the device; closed with this.

    Attributes:
        cuda: the device.
        compute: the stream on which the network runs.
    """

    def __init__(self, name: str, share: SharedCuda) -> None:
        self._name, self._share = name, share
        self.cuda: Final = share.cuda
        self.compute: Final = share.cuda.stream()
        self._lock = threading.Lock()  # of the stream and the session
        self._session: Any = None
        self._records: dict[tuple[tuple[int, ...], ...], _Record] = {}
        self._thread: ThreadPoolExecutor | None = None

    def start(
        self,
        ort: Any,
        session: Any,
        plan: Plan,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
    ) -> None:
        """Take an open session, which nobody else may keep: it is let go of in :meth:`close`, before its stream.

        Raises:
            ConfigError: CUDA graphs are asked for, and would give wrong results with this network.
        """
        self._ort, self._plan, self._inputs, self._outputs = ort, plan, inputs, outputs
        self._session = session
        reads, writes = _on_host(session, "input"), _on_host(session, "output")
        del session  # an error would keep it
        self._informed = reads is not None
        self._host_inputs, self._host_outputs = reads or frozenset(), writes or frozenset()
        if plan.graphs:
            if not self._informed or self._host_inputs or self._host_outputs:
                which = ", ".join(sorted(self._host_inputs | self._host_outputs))
                raise ConfigError(
                    f"{self._name}: CUDA graphs are asked for, and "
                    + (f"the CPU reads or writes {which}" if which else "it is not known what the CPU reads"),
                    "expected a network whose inputs and outputs are on the GPU alone: a replay does not repeat the CPU's part",
                    "leave the option out"
                    if which
                    else "update onnxruntime to 1.23 or newer, or leave the option out",
                )
            # The CUDA provider keeps graphs and handles of cuBLAS and cuDNN for each thread that ever ran one.
            self._thread = ThreadPoolExecutor(1, f"lp-edge {self._name}")

    # -- arrays ---------------------------------------------------------------------------------

    def stage(self, array: Array) -> Array:
        """An input as it can be read; TensorError when it is on another device."""
        return device.staged(array, self.cuda, self._name)

    def upload(self, array: npt.NDArray[Any]) -> DeviceArray:
        """See :meth:`lp_edge.engines.runner.Runner.upload`."""
        return device.upload(self.cuda, array)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        """See :meth:`lp_edge.engines.runner.Runner.concatenate`."""
        return device.concatenate(self.cuda, arrays, self.cuda.transfer_stream())

    # -- calls ----------------------------------------------------------------------------------

    def infer(self, feeds: Mapping[str, Array], outputs: Sequence[str], *, keep: bool) -> dict[str, Array]:
        """Run the network; ``keep``: results as device arrays that are still being written, else on the host.

        Raises what ONNX Runtime raises, and EngineError when closed.
        """
        with self._lock:
            if self._session is None:
                raise EngineError(
                    f"{self._name}: infer on a closed runner", "expected an open one", "keep it open"
                )
            if self._thread is None:
                results = self._run(feeds, outputs)
            else:
                results = self._thread.submit(self._run_recorded, feeds, outputs).result()
        if keep:
            return {
                name: array if isinstance(array, DeviceArray) else self.upload(to_host(array))
                for name, array in results.items()
            }
        waiting = {name: fetch(array) for name, array in results.items()}
        return {
            name: np.array(wait()) if isinstance(results[name], DeviceArray) else wait()
            for name, wait in waiting.items()
        }

    def _run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], number: int = _NO_GRAPH
    ) -> dict[str, Array]:
        """Run on memory that is made for the call."""
        sources: dict[str, DeviceArray | npt.NDArray[Any]] = {
            name: to_host(array) if name in self._host_inputs else self._readable(array)
            for name, array in feeds.items()
        }
        shapes = self._result_shapes(feeds)
        targets = {name: self._target(name, shapes[name]) for name in outputs}
        host = self._launch(sources, targets, number)
        return {
            name: host[name] if target is None else self._written(target) for name, target in targets.items()
        }

    def _run_recorded(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run by replaying the record of these shapes, which is made at the first call."""
        key = tuple(tuple(feeds[name].shape) for name in self._inputs)
        record = self._records.get(key)
        if record is None and len(self._records) >= self._plan.graphs:
            if self._plan.graphs > 1:
                return self._run(feeds, outputs)
            known = "; ".join(map(str, self._records))
            raise TensorError(
                f"{self._name}: shapes {key} with CUDA graphs of {self._plan.provider}",
                f"expected those that it recorded, {known}: it keeps one graph",
                "call it with one set of shapes, or leave the option for CUDA graphs out",
            )
        if record is None:
            number = len(self._records) + 1  # 0 is ONNX Runtime's own
            # Kept before it is known to work: ONNX Runtime may have recorded its addresses when the first call fails.
            record = self._records[key] = self._new_record(feeds, number)
        for name, array in feeds.items():
            source = array if isinstance(array, DeviceArray) else self.upload(to_host(array))
            self._copy(source, record.inputs[name])
        self._launch(record.inputs, record.outputs, record.number)
        results: dict[str, Array] = {}
        for name in outputs:
            kept = record.outputs[name]
            result = device_array(self.cuda, kept.shape, kept.dtype, self.compute)
            self._copy(kept, result)
            results[name] = self._written(result)
        return results

    def _new_record(self, feeds: Mapping[str, Array], number: int) -> _Record:
        shapes = self._result_shapes(feeds)
        if unknown := [name for name, shape in shapes.items() if shape is None]:
            raise ConfigError(
                f"{self._name}: CUDA graphs are asked for, and the shape of {', '.join(unknown)} is not known before the run",
                "expected outputs whose axes follow from those of the inputs",
                "leave the option out",
            )
        make = self._memory
        return _Record(
            number,
            {name: make(spec, tuple(feeds[name].shape)) for name, spec in self._inputs.items()},
            {name: make(spec, shapes[name] or ()) for name, spec in self._outputs.items()},
        )

    def _launch(
        self,
        sources: Mapping[str, DeviceArray | npt.NDArray[Any]],
        targets: Mapping[str, DeviceArray | None],
        number: int,
    ) -> dict[str, npt.NDArray[Any]]:
        """Queue the network; the results that ONNX Runtime made on the host."""
        session, run = self._session, self._ort.RunOptions()
        run.log_severity_level = _FATAL
        if self._plan.graphs:
            run.add_run_config_entry("gpu_graph_id", str(number))
            run.add_run_config_entry("cuda_graph_annotation_id", str(number))  # the plugin's name of it
        if self._plan.ordered and None not in targets.values():
            run.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if not (self._informed and self._plan.ordered):
            self.compute.synchronize()  # what binding copies, or another stream reads, must be there
        binding = session.io_binding()
        for array in (*sources.values(), *targets.values()):
            if isinstance(array, DeviceArray):
                array.use(self.compute)
        bind(binding, ("cuda", self.cuda.device), sources, targets)
        apart = self.cuda.captured_elsewhere(self.compute) if self._plan.graphs else contextlib.nullcontext()
        with apart:
            session.run_with_iobinding(binding, run)
        made = zip(targets.items(), binding.get_outputs(), strict=True) if None in targets.values() else ()
        return {name: value.numpy() for (name, target), value in made if target is None}

    # -- memory ---------------------------------------------------------------------------------

    def _readable(self, array: Array) -> DeviceArray:
        """The array on the device and aligned; later work on the stream may read it."""
        source = array if isinstance(array, DeviceArray) else self.upload(to_host(array))
        if source.pointer % _ALIGNMENT:
            copy = device_array(self.cuda, source.shape, source.dtype, self.compute)
            self._copy(source, copy)
            return copy
        source.read_on(self.compute)
        return source

    def _copy(self, source: DeviceArray, target: DeviceArray) -> None:
        source.read_on(self.compute)
        offset = source.pointer - source.buffer.pointer
        self.cuda.copy_on_device(
            source.buffer, target.buffer, source.nbytes, self.compute, source_offset=offset
        )

    def _target(self, name: str, shape: tuple[int, ...] | None) -> DeviceArray | None:
        """Memory for a result; None where its shape is not known, or the CPU makes it."""
        if shape is None or name in self._host_outputs:
            return None
        return self._memory(self._outputs[name], shape)

    def _memory(self, spec: TensorSpec, shape: tuple[int, ...]) -> DeviceArray:
        return device_array(self.cuda, shape, spec.dtype, self.compute)

    def _written(self, array: DeviceArray) -> DeviceArray:
        """The same, for others: it is written when all that is queued now is done."""
        return DeviceArray(
            array.buffer,
            array.shape,
            array.dtype,
            self.compute,
            ready=self.compute.record(self.cuda.event(patient=True)),
        )

    def _result_shapes(self, feeds: Mapping[str, Array]) -> dict[str, tuple[int, ...] | None]:
        axes = {
            axis: size
            for name, spec in self._inputs.items()
            for axis, size in zip(spec.shape, feeds[name].shape, strict=True)
            if isinstance(axis, str) and not axis.startswith("?")
        }
        return {name: result_shape(spec.shape, axes) for name, spec in self._outputs.items()}

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what runs, and free everything, the session before the stream on which it works."""
        try:
            with self._lock:
                failures = [self._attempt(self.compute.synchronize)]
                self._session = None
            if self._thread is not None:
                self._thread.shutdown()
            self._records.clear()
            failures.append(self._attempt(self.compute.close))
            if told := next(filter(None, failures), ""):
                _LOG.warning("%s: closing: %s", self._name, told)
        finally:
            self._share.close()

    @staticmethod
    def _attempt(call: Callable[[], None]) -> str:
        """Make a call; what went wrong, or "": the device is lost, which somebody else is told."""
        try:
            call()
        except LpEdgeError as error:
            return error.got
        return ""


def _on_host(session: Any, side: str) -> frozenset[str] | None:
    """Inputs or outputs that are on the host; None when ONNX Runtime does not tell (before 1.23)."""
    try:
        infos = getattr(session, f"get_{side}_memory_infos")()
        nodes = getattr(session, f"get_{side}s")()
        return frozenset(
            node.name
            for node, info in zip(nodes, infos, strict=True)
            # Memory of the CPU, and that of a device which the host reads as well.
            if info.name == "Cpu" or str(info.device_mem_type).endswith("HOST_ACCESSIBLE")
        )
    except Exception as error:  # noqa: BLE001 - not there, or not for this network: told apart by the caller
        _LOG.debug("no memory of the %ss: %s", side, error)
        return None
