"""Building TensorRT engines: one code for TensorRT 8.5, 8.6, 10.x and 11.x.

What a version can do is asked of its module (an attribute, a member of an enumeration), never of a version number:

=========================  =======================  =================================  ======================
                           8.5, 8.6                 10.x                               11.x
=========================  =======================  =================================  ======================
network flag               ``EXPLICIT_BATCH``       ``STRONGLY_TYPED``                 ``STRONGLY_TYPED``
half precision             flag ``FP16``, types of  the graph's own types (or as 8.x   the graph's own types
                           every layer copied       with ``strongly_typed=False``)
progress, cancel           log, between the steps   ``IProgressMonitor``               ``IProgressMonitor``
=========================  =======================  =================================  ======================

The ONNX parser calls a layer as the node it comes from (``node_of_<first output>`` for a node without a name), with
``_<number>`` behind when a node makes several, and a node's result as the graph does; helper layers may keep a name of
TensorRT's own. So layers are matched by the names of their results, then by their own, and helpers follow their inputs.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from lp_edge.engines.external import external_files
from lp_edge.engines.runner import TensorSpec
from lp_edge.engines.trt_graph import FLOATS, Graph, Node
from lp_edge.errors import BackendUnavailable, ConfigError, EngineError, Interrupted

__all__ = [
    "BATCH_AXES",
    "BuildProgress",
    "Built",
    "Cancelled",
    "Errors",
    "Profile",
    "Progress",
    "TensorRtConfig",
    "build_engine",
    "check_precision",
    "copy_precisions",
    "flags_of",
    "import_tensorrt",
    "is_jetson",
    "logger_of",
    "profile_of",
    "remedy",
    "stoppable",
    "unavailable",
]

_LOG = logging.getLogger("lp_edge")

_TEGRA: Final = Path("/etc/nv_tegra_release")


def is_jetson() -> bool:
    """Whether this machine is a Jetson."""
    return _TEGRA.exists()


def remedy() -> str:
    """How to get TensorRT on this machine."""
    if is_jetson():
        how = "sudo apt install nvidia-jetpack, and a virtual environment of JetPack's Python with --system-site-packages"
    else:
        how = "pip install tensorrt-cu13 (driver 580 or newer) or tensorrt-cu12 (525 or newer)"
    return f"{how}; lp-doctor tells what fits here; or use --backend cuda or cpu"


Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input -> smallest, usual and largest shape."""

Cancelled = Callable[[], bool]

_NO_MEMORY: Final = re.compile(r"out ?of ?memory|could not be allocated", re.IGNORECASE)
BATCH_AXES: Final = ("N", "batch")
"""Names of axes of frames that are computed at once."""
# A source serves all frames of a call, or each frame has its own; the first is the rule.
_SOURCES: Final = ("S", "sources")
# Sides of pictures in the graphs whose pictures may have any size.
_SIDES: Final[Mapping[str, tuple[int, int, int]]] = dict.fromkeys(
    ("H", "W", "height", "width"), (16, 512, 2048)
)


@dataclass(frozen=True)
class TensorRtConfig:
    """How engines are built and run.

    Attributes:
        max_batch: largest batch an engine takes; 0 = chosen for the card (4 below 12 GiB of memory, else 8).
        usual_batch: the batch it is tuned for; 0 = ``max_batch``.
        axes: dynamic axis of the graph by name -> (smallest, usual, largest) size, over the defaults: batches from 1 to
            ``max_batch``, sides of pictures from 16 to 2048 tuned for 512.
        workspace_mib: memory that tactics may take while building and running, in MiB; 0 = what TensorRT allows, on a Jetson
            half of the free memory.
        optimization_level: 0 to 5, from a quick build to a thorough search (TensorRT 8.6 and newer); None = TensorRT's own.
        timing_cache: keep measured kernels beside the engines, so that the next build is shorter.
        hardware_compatibility: an engine for Ampere and newer instead of this GPU only; slower (TensorRT 8.6 and newer, no
            Jetson).
        tf32: let fp32 layers round their factors to 10 bits. Off: sampling positions come from fp32 products.
        strongly_typed: take all types from the graph where the version can; off: per-layer precisions as on 8.x.
        cuda_graphs: replay a recorded launch per batch size instead of launching kernel by kernel.
        slots: calls in flight from several threads, each with buffers of its own, so that copies overlap with computing.

    Raises:
        ConfigError: a number out of range, or ranges of an axis in the wrong order.
    """

    max_batch: int = 0
    usual_batch: int = 0
    axes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict, hash=False)
    workspace_mib: int = 0
    optimization_level: int | None = None
    timing_cache: bool = True
    hardware_compatibility: bool = False
    tf32: bool = False
    strongly_typed: bool = True
    cuda_graphs: bool = True
    slots: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_batch", 0, 4096),
            ("usual_batch", 0, 4096),
            ("workspace_mib", 0, 1 << 20),
            ("optimization_level", 0, 5),
            ("slots", 1, 16),
        ):
            value = getattr(self, name)
            if value is None and name == "optimization_level":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(
                    f"{name} is {value!r}", f"expected an integer from {low} to {high}", f"correct {name}"
                )
        if self.max_batch and self.usual_batch > self.max_batch:
            raise ConfigError(
                f"usual_batch is {self.usual_batch}",
                f"expected at most max_batch, {self.max_batch}",
                "lower usual_batch or raise max_batch",
            )
        for axis, sizes in self.axes.items():
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise ConfigError(
                    f"axis {axis} has the sizes {':'.join(map(str, sizes))}",
                    "expected smallest:usual:largest, each at least 1 and as the one before",
                    f"for example {axis}=1:4:8",
                )

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> TensorRtConfig:
        """A configuration from texts, as ``BackendConfig.provider_options`` has them.

        Example:
            >>> TensorRtConfig.from_options({"max_batch": "4", "axes": "height=64:256:640,width=64:256:640"}).max_batch
            4

        Raises:
            ConfigError: an unknown name or a value that cannot be read.
        """
        known = {f.name: f.default for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in options.items():
            if name not in known:
                raise ConfigError(
                    f"unknown option {name!r} of backend tensorrt",
                    f"expected some of {', '.join(known)}",
                    "correct the name",
                )
            try:
                if name == "axes":
                    pairs = (item.split("=") for item in text.split(",") if item)
                    values[name] = {axis.strip(): _three(sizes) for axis, sizes in pairs}
                elif isinstance(known[name], bool):
                    values[name] = {"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]
                else:
                    values[name] = int(text)
            except (KeyError, ValueError) as error:
                wanted = "true or false" if isinstance(known[name], bool) else "whole numbers"
                if name == "axes":
                    wanted = "AXIS=SMALLEST:USUAL:LARGEST,…"
                raise ConfigError(f"{name} is {text!r}", f"expected {wanted}", f"correct {name}") from error
        return cls(**values)


def _three(text: str) -> tuple[int, int, int]:
    low, usual, high = (int(size) for size in text.split(":"))
    return low, usual, high


@dataclass(frozen=True)
class BuildProgress:
    """Where a build stands.

    Attributes:
        network: its name.
        stage: what is done, in words.
        fraction: share of the stage that is done, from 0 to 1; None where TensorRT does not tell (8.x).
    """

    network: str
    stage: str
    fraction: float | None = None


Progress = Callable[[BuildProgress], None]


@dataclass(frozen=True)
class Built:
    """Result of a build: the engine and the timing cache (empty when there is none), as TensorRT serialises them."""

    plan: bytes
    timing_cache: bytes


# -- the module, its log and its errors -------------------------------------------------------------


def import_tensorrt() -> Any:
    """The module ``tensorrt``; BackendUnavailable when it is not there or does not load."""
    try:
        import tensorrt
    except Exception as error:  # a broken native library raises more than ImportError
        raise BackendUnavailable(
            f"backend tensorrt is not there: tensorrt cannot be imported ({error})",
            "expected TensorRT 8.5 or newer",
            remedy(),
        ) from error
    lacking = [name for name in ("Builder", "OnnxParser", "IExecutionContext") if not hasattr(tensorrt, name)]
    if lacking or not hasattr(tensorrt.IExecutionContext, "execute_async_v3"):
        raise BackendUnavailable(
            f"backend tensorrt is not there: TensorRT {tensorrt.__version__} lacks {', '.join(lacking) or 'execute_async_v3'}",
            "expected the full TensorRT 8.5 or newer",
            remedy(),
        )
    return tensorrt


def unavailable(trt: Any, what: str, said: str) -> BackendUnavailable:
    """The error for a TensorRT that does not start here."""
    return BackendUnavailable(
        f"backend tensorrt does not start: TensorRT {trt.__version__} makes no {what} ({said})",
        "expected an NVIDIA GPU and a driver that this TensorRT supports",
        remedy(),
    )


class _Log:
    """The errors that TensorRT logged last, by thread; safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[tuple[int, object, str]] = deque(maxlen=64)  # number, mark of the thread, text
        self._count = 0
        self._here = threading.local()
        self.listener: Callable[[str], None] | None = None

    def add(self, line: str) -> None:
        with self._lock:
            self._count += 1
            self._lines.append((self._count, self._thread(), " ".join(line.split())))

    def _thread(self) -> object:
        """This thread and no other; the numbers of threads are given out again."""
        return self._here.__dict__.setdefault("mark", object())

    def mark(self) -> int:
        with self._lock:
            return self._count

    def since(self, mark: int) -> list[str]:
        """What this thread caused after ``mark``; where that is nothing, what any did: TensorRT builds with many."""
        with self._lock:
            lines = [entry for entry in self._lines if entry[0] > mark]
        mine = [line for _, thread, line in lines if thread is self._thread()]
        return list(dict.fromkeys(mine or [line for _, _, line in lines]))


@lru_cache(maxsize=8)
def logger_of(trt: Any) -> tuple[Any, _Log]:
    """TensorRT's logger, bridged to logging ``lp_edge``, and what it heard.

    One per module for the life of the process, because TensorRT itself keeps the first logger it is given and calls it to the
    end. Warnings of TensorRT go to the level INFO: every build has a page of them.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.INFO,
        severity.INFO: logging.DEBUG,
    }
    heard = _Log()

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level is None:  # VERBOSE: thousands of lines a second
                return
            if level == logging.ERROR:
                heard.add(msg)
            elif heard.listener is not None:
                heard.listener(msg)
            _LOG.log(level, "TensorRT: %s", msg)

    return Logger(), heard


class Errors:
    """What TensorRT logged as errors since this was made, or since the last :meth:`take`.

    Its error recorders are not used: with the bindings of 11.4 a builder that was given one crashes when it is freed.
    """

    def __init__(self, trt: Any) -> None:
        self._heard = logger_of(trt)[1]
        self._mark = self._heard.mark()

    @property
    def out_of_memory(self) -> bool:
        """Whether one of them is that memory could not be had."""
        return any(_NO_MEMORY.search(line) for line in self._heard.since(self._mark))

    def take(self, also: BaseException | None = None) -> str:
        """What was said, on one line, and forget it; ``also``: an exception that came with it."""
        lines = self._heard.since(self._mark)
        self._mark = self._heard.mark()
        if also is not None:
            lines.append(f"{type(also).__name__}: {also}")
        return "; ".join(lines) or "TensorRT gave no reason"


# -- what is built ----------------------------------------------------------------------------------


def profile_of(name: str, inputs: Sequence[TensorSpec], config: TensorRtConfig, max_batch: int) -> Profile:
    """Smallest, usual and largest shape of every input that has a dynamic axis.

    Args:
        name: of the network, for messages.
        inputs: of the graph.
        config: names of axes and batches.
        max_batch: what ``config.max_batch`` comes to on this card.

    Raises:
        ConfigError: an axis has no range.
    """
    usual = min(config.usual_batch or max_batch, max_batch)
    known: dict[str, tuple[int, int, int]] = {
        **_SIDES,
        **dict.fromkeys(BATCH_AXES, (1, usual, max_batch)),
        **dict.fromkeys(_SOURCES, (1, 1, max_batch)),
        **config.axes,
    }
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for spec in inputs:
        if all(isinstance(axis, int) for axis in spec.shape):
            continue
        sizes: list[tuple[int, int, int]] = []
        for axis in spec.shape:
            if isinstance(axis, str) and axis not in known:
                raise ConfigError(
                    f"{name}: no sizes for the dynamic axis {axis} of {spec}",
                    "expected a range for every dynamic axis",
                    f"give the option axes, for example {axis.lstrip('?')}=1:4:8",
                )
            sizes.append(known[axis] if isinstance(axis, str) else (axis, axis, axis))
        low, mid, high = (tuple(size[i] for size in sizes) for i in range(3))
        profile[spec.name] = (low, mid, high)
    return profile


def _has(enumeration: Any, member: str) -> bool:
    return hasattr(enumeration, member)


def _typed(trt: Any, config: TensorRtConfig) -> bool:
    """Whether the network takes its types from the graph: as asked, and always where there are no weak ones."""
    strong = _has(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    return strong and (config.strongly_typed or not _has(trt.BuilderFlag, "FP16"))


def flags_of(trt: Any, graph: Graph, config: TensorRtConfig) -> tuple[str, ...]:
    """Everything beside shapes and types that makes one engine differ from another, as names for its key, sorted.

    Names of members are TensorRT's own; the rest is ``name=value``.

    Raises:
        ConfigError: this TensorRT has no such option.
    """
    flags = []
    if _typed(trt, config):
        flags.append("STRONGLY_TYPED")
        if not config.strongly_typed:
            raise ConfigError(
                f"strongly_typed is false, and TensorRT {trt.__version__} has only strongly typed networks",
                "expected an older TensorRT for it",
                "leave the option out",
            )
    else:
        if "float16" in graph.types.values():
            flags += ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
        if graph.quantised:
            flags += _quantised(trt, graph)
    if config.tf32:
        flags.append("TF32")
    for option, member in (
        ("optimization_level", "builder_optimization_level"),
        ("hardware_compatibility", "hardware_compatibility_level"),
    ):
        value = getattr(config, option)
        if value is None or value is False:
            continue
        if not hasattr(trt.IBuilderConfig, member):
            raise ConfigError(
                f"{option} is {value}, and TensorRT {trt.__version__} has no such option",
                "expected TensorRT 8.6 or newer for it",
                "leave the option out",
            )
        flags.append(f"{option}={int(value)}")
    if config.workspace_mib:
        flags.append(f"workspace_mib={config.workspace_mib}")
    return tuple(sorted(flags))


def check_precision(trt: Any, graph: Graph, compute_capability: tuple[int, int], name: str) -> None:
    """ConfigError for a graph in 8-bit floating point where this GPU or TensorRT does not compute in that."""
    if graph.precision != "fp8":
        return
    if compute_capability < (8, 9):
        got = f"compute capability {'.'.join(map(str, compute_capability))}"
    elif not _has(trt.DataType, "FP8"):
        got = f"TensorRT {trt.__version__}"
    else:
        return
    raise ConfigError(
        f"{name}: the graph is quantised to fp8, which {got} does not know",
        "expected a GPU of compute capability 8.9 (Ada, Hopper) or newer, and TensorRT 8.6 or newer",
        "export it in fp16, or with --precision int8",
    )


def _quantised(trt: Any, graph: Graph) -> list[str]:
    """Builder flags for the types that the graph quantises to."""
    flags = sorted({"FP8" if kind.startswith("float8") else "INT8" for kind in graph.quantised})
    for flag in flags:
        if not _has(trt.BuilderFlag, flag):
            raise ConfigError(
                f"the graph is quantised to {flag}, which TensorRT {trt.__version__} does not know",
                "expected a graph for this TensorRT",
                "export it in fp16",
            )
    return flags


# -- building ---------------------------------------------------------------------------------------


@dataclass
class _Job:
    """A build on its way: whom to tell, whom to ask, and what was said when."""

    name: str
    progress: Progress | None
    cancelled: Cancelled | None
    failure: BaseException | None = None

    def tell(self, stage: str, fraction: float | None = None) -> None:
        if self.progress is not None:
            self.progress(BuildProgress(self.name, stage, fraction))

    def step(self, stage: str) -> None:
        """Begin a stage; Interrupted when the build is to stop."""
        if self.to_stop:
            self.stopped()
        self.tell(stage)

    def hear(self, line: str) -> None:
        """Pass a line of TensorRT's log on; raises nothing into TensorRT."""
        if self.failure is None:
            try:
                self.tell(f"building: {line}")
            except BaseException as error:  # noqa: BLE001 - of the caller's function; raised after the build
                self.failure = error

    @property
    def to_stop(self) -> bool:
        """Whether the caller wants the build to end."""
        return self.cancelled is not None and self.cancelled()

    def stopped(self) -> NoReturn:
        raise Interrupted(f"{self.name}: the build of its engine was stopped", "", "start it again to finish")


_Result = TypeVar("_Result")
_POLL_S: Final = 0.1
_GRACE_S: Final = 2.0  # how long Ctrl-C waits for a build to stop


def stoppable(work: Callable[[Cancelled], _Result], *, waiting: Callable[[], None] | None = None) -> _Result:
    """Do work that may build engines so that Ctrl-C ends it.

    Python hears Ctrl-C only between two steps of its own, and a build is one call into TensorRT. So it runs in a thread.
    TensorRT 10 and newer stop at the next step; an older one is left to itself after two seconds, and what it makes is
    dropped: engines are only kept by who was not told to stop.

    Args:
        work: called with a function that says whether to stop.
        waiting: called ten times a second meanwhile, from this thread.

    Raises:
        KeyboardInterrupt: it was stopped; and what ``work`` raises.
    """
    stop = threading.Event()
    results: list[_Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work(stop.is_set))
        except BaseException as error:  # noqa: BLE001 - carried across and raised below
            failures.append(error)

    thread = threading.Thread(target=run, name="engines", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
            if waiting is not None:
                waiting()
    except BaseException:
        stop.set()
        thread.join(_GRACE_S)
        raise
    if failures:
        raise failures[0]
    return results[0]


# TensorRT's log is one for the process, and two builds at once only time each other's kernels wrong.
_ONE_BUILD: Final = threading.Lock()


def build_engine(
    trt: Any,
    model: Path | bytes,
    graph: Graph,
    config: TensorRtConfig,
    profile: Profile,
    *,
    name: str,
    workspace: int = 0,
    timing_cache: bytes = b"",
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> Built:
    """Compile a network for the GPU of this thread.

    Args:
        trt: the module.
        model: path of an ONNX file or its bytes.
        graph: the same, read by :func:`lp_edge.engines.trt_graph.read_graph`.
        profile: see :func:`profile_of`.
        name: of the network, in messages.
        workspace: bytes that tactics may take; 0 = TensorRT's own limit.
        timing_cache: content of an earlier one.
        progress: called with every step, from any thread.
        cancelled: asked often; True stops the build (before TensorRT 10 only between its steps).

    Raises:
        BackendUnavailable: TensorRT makes no builder here.
        EngineError: the graph does not parse or no engine comes of it, with what TensorRT said.
        Interrupted: ``cancelled`` returned True.
    """
    job = _Job(name, progress, cancelled)
    job.step("waiting for another build" if _ONE_BUILD.locked() else "preparing")
    while not _ONE_BUILD.acquire(timeout=0.2):
        if job.to_stop:
            job.stopped()
    try:
        return _build(trt, model, graph, config, profile, job, workspace, timing_cache)
    finally:
        _ONE_BUILD.release()


def _build(
    trt: Any,
    model: Path | bytes,
    graph: Graph,
    config: TensorRtConfig,
    profile: Profile,
    job: _Job,
    workspace: int,
    timing_cache: bytes,
) -> Built:
    logger, heard = logger_of(trt)
    errors = Errors(trt)
    try:
        builder = trt.Builder(logger)
    except Exception as error:  # pybind11 turns the null pointer of a machine without a GPU into a TypeError
        raise unavailable(trt, "builder", errors.take(error)) from error
    with _failing(job, trt, errors, "prepare the build"):
        network = builder.create_network(_creation_flags(trt, config))
        parser = trt.OnnxParser(network, logger)
        if _has(trt, "OnnxParserFlag") and _has(trt.OnnxParserFlag, "NATIVE_INSTANCENORM"):
            parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    job.step("parsing")
    with _failing(job, trt, errors, "parse the graph"):
        _parse(trt, parser, model, job, errors)
        _check_surface(network, graph, job)
    with _failing(job, trt, errors, "configure the build"):
        if not _typed(trt, config) and "float16" in graph.types.values():
            copy_precisions(trt, network, graph)
        settings = _settings(trt, builder, graph, config, profile, workspace, job, errors)
        if config.timing_cache:
            _use_timing_cache(settings, timing_cache)
        monitored = _monitor(trt, settings, job)
    job.step("building")
    with _failing(job, trt, errors, "build the engine"):
        if not monitored:
            heard.listener = job.hear
        try:
            plan = builder.build_serialized_network(network, settings)
        finally:
            heard.listener = None
        if job.failure is not None:
            raise job.failure
        if job.to_stop:
            job.stopped()
        if plan is None:
            raise EngineError(
                f"{job.name}: TensorRT {trt.__version__} built no engine ({errors.take()})",
                "expected an engine",
                "free GPU memory or lower max_batch when memory ran out; else export with --flavor tensorrt8 for TensorRT "
                "8.5, or use --backend cuda",
            )
        cache = b""
        if config.timing_cache and (kept := settings.get_timing_cache()) is not None:
            cache = bytes(kept.serialize())
        return Built(bytes(plan), cache)


@contextlib.contextmanager
def _failing(job: _Job, trt: Any, errors: Errors, doing: str) -> Iterator[None]:
    """Turn what the bindings raise into an EngineError with TensorRT's own words."""
    try:
        yield
    except (BackendUnavailable, ConfigError, EngineError, Interrupted):
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, MemoryError) as error:
        if error is job.failure:
            raise
        raise EngineError(
            f"{job.name}: TensorRT {trt.__version__} could not {doing} ({errors.take(error)})",
            "expected an engine",
            "report this with the versions that lp-doctor prints, or use --backend cuda",
        ) from error


def _creation_flags(trt: Any, config: TensorRtConfig) -> int:
    """Bits for ``create_network``: a typed network, or an explicit batch where that is still a choice."""
    flags = trt.NetworkDefinitionCreationFlag
    if _typed(trt, config):
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH) if _has(flags, "EXPLICIT_BATCH") else 0


def _parse(trt: Any, parser: Any, model: Path | bytes, job: _Job, errors: Errors) -> None:
    if isinstance(model, bytes) and (files := external_files(model)):
        raise EngineError(
            f"{job.name}: the model is given as bytes, but its weights are in the file {files[0]!r}",
            "expected its path",
            "give the path of the ONNX file, with its weights beside it",
        )
    done = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    if done:
        return
    said = [_parser_words(parser.get_error(i)) for i in range(parser.num_errors)]
    raise EngineError(
        f"{job.name}: TensorRT {trt.__version__} does not take the graph ({'; '.join(said) or errors.take()})",
        "expected a graph of operators that it knows",
        "export with --flavor tensorrt8 for TensorRT 8.5 (JetPack 5), or use --backend cuda",
    )


def _parser_words(error: Any) -> str:
    """A parser error: its text, the check that failed (the text may be just "false") and the node it is about."""
    place = f"node {error.node()}"
    if hasattr(error, "node_name"):
        place = f"{error.node_operator()} {error.node_name()}".strip() or place
    return f"{place}: {' '.join(str(error.desc()).split())} (in {error.func()})"


def _check_surface(network: Any, graph: Graph, job: _Job) -> None:
    """The parsed network has the graph's inputs and outputs; tensors are bound by name later."""
    for kind, count, get, specs in (
        ("input", network.num_inputs, network.get_input, graph.inputs),
        ("output", network.num_outputs, network.get_output, graph.outputs),
    ):
        got, wanted = {get(i).name for i in range(count)}, {spec.name for spec in specs}
        if got != wanted:
            raise EngineError(
                f"{job.name}: the parsed network has the {kind}s {', '.join(sorted(got)) or 'none'}",
                f"expected {', '.join(sorted(wanted))}",
                "export the network without unused inputs",
            )


def _settings(
    trt: Any,
    builder: Any,
    graph: Graph,
    config: TensorRtConfig,
    profile: Profile,
    workspace: int,
    job: _Job,
    errors: Errors,
) -> Any:
    settings = builder.create_builder_config()
    flag = trt.BuilderFlag
    for name in flags_of(trt, graph, config):
        if _has(flag, name):  # the rest are no builder flags
            settings.set_flag(getattr(flag, name))
    if not config.tf32:
        settings.clear_flag(flag.TF32)  # TensorRT sets it by itself
    if workspace:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if config.optimization_level is not None:
        settings.builder_optimization_level = config.optimization_level
    if config.hardware_compatibility:
        settings.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    # Several contexts share the one profile: always so from 10, not to be had on 8.5 (the runner then keeps one context).
    # Kernels of cuBLAS and cuDNN, which only 8.x uses, are libraries more to install and load; 8.6 leaves them out by itself.
    for name in ("PROFILE_SHARING_0806", "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"):
        feature = getattr(trt.PreviewFeature, name, None)
        if feature is not None and not settings.get_preview_feature(feature):
            settings.set_preview_feature(feature, True)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, (low, usual, high) in profile.items():
            shapes.set_shape(name, low, usual, high)
        if settings.add_optimization_profile(shapes) < 0:
            raise EngineError(
                f"{job.name}: TensorRT {trt.__version__} refuses the sizes "
                f"{', '.join(f'{n} {list(a)} to {list(c)}' for n, (a, _, c) in profile.items())} ({errors.take()})",
                "expected sizes that the network can take",
                "correct the options axes and max_batch",
            )
    return settings


def _use_timing_cache(settings: Any, content: bytes) -> None:
    """Give the build a timing cache: the old one, or an empty one where that is of another GPU or version."""
    for data in dict.fromkeys((content, b"")):
        cache = settings.create_timing_cache(data)
        if cache is not None and settings.set_timing_cache(cache, False):
            return
        _LOG.info("TensorRT takes no timing cache of %d bytes; its kernels are measured again", len(data))


class _Phases:
    """A share of all work from TensorRT's nested phases: each phase is a step of the one above."""

    def __init__(self) -> None:
        self._open: dict[str, list[Any]] = {}  # name -> [parent, steps, done]
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._open[name] = [parent, max(int(steps), 1), 0]

    def done(self, name: str, step: int) -> float:
        if name in self._open:
            phase = self._open[name]
            phase[2] = max(phase[2], min(int(step) + 1, phase[1]))
        return self.share()

    def finish(self, name: str) -> None:
        self._open.pop(name, None)

    def share(self) -> float:
        roots = [name for name, (parent, _, _) in self._open.items() if parent not in self._open]
        self._share = max([self._share, *(self._of(name) for name in roots)])
        return self._share

    def _of(self, name: str) -> float:
        _, steps, done = self._open[name]
        inner = [self._of(child) for child, (parent, _, _) in self._open.items() if parent == name]
        return float(min(1.0, (done + max(inner, default=0.0)) / steps))


def _monitor(trt: Any, settings: Any, job: _Job) -> bool:
    """Have TensorRT tell how far it is and ask whether to go on, where it can; whether it can."""
    if not hasattr(settings, "progress_monitor"):
        return False
    phases = _Phases()
    lock = threading.Lock()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            # Nothing may be raised into TensorRT: the build is stopped, then it is raised here.
            try:
                if job.failure is not None or job.to_stop:
                    return False
                with lock:
                    share = phases.done(phase_name, step)
                job.tell(f"building: {phase_name}", share)
            except BaseException as error:  # noqa: BLE001 - of the caller's function; kept and raised after the build
                job.failure = error
                return False
            return True

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                phases.finish(phase_name)

    settings.progress_monitor = Monitor()
    return True


# -- weakly typed networks --------------------------------------------------------------------------


def copy_precisions(trt: Any, network: Any, graph: Graph) -> int:
    """Fix what every floating-point layer computes in and stores, as the graph's casts have it; how many were fixed.

    Constants, casts and layers of integers and sizes are left to TensorRT, which has no choice there.
    """
    types = {"float16": trt.DataType.HALF, "float32": trt.DataType.FLOAT}
    names = {value: name for name, value in types.items()}
    kinds = trt.LayerType
    skipped = [
        getattr(kinds, kind) for kind in ("SHAPE", "CAST", "QUANTIZE", "DEQUANTIZE") if _has(kinds, kind)
    ]
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    labels = {node.label: node for node in graph.nodes}
    made: dict[str, str] = {}  # what helper layers make, by the name of the tensor
    fixed = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in skipped:
            continue
        results = [layer.get_output(i) for i in range(layer.num_outputs)]
        if layer.type == kinds.CONSTANT:  # is what it holds; the helper that spreads it must not round it
            made[results[0].name] = graph.types.get(layer.name) or names.get(results[0].dtype, "")
            continue
        node = next((makers[tensor.name] for tensor in results if tensor.name in makers), None)
        node = node or _owner(layer.name, labels)
        if node is not None:
            compute = graph.compute_type(node)
        else:
            sources = (layer.get_input(i) for i in range(layer.num_inputs))
            known = (made.get(t.name) or graph.types.get(t.name, "") for t in sources if t is not None)
            compute = next((kind for kind in known if kind in FLOATS), "")
        if compute not in types:
            continue
        if not any(t.dtype in types.values() for t in results) and not _compares(layer, types):
            continue
        layer.precision = types[compute]
        fixed += 1
        for i, tensor in enumerate(results):
            kind = graph.types.get(tensor.name) or compute
            if kind in types and tensor.dtype in types.values():
                layer.set_output_type(i, types[kind])
                made[tensor.name] = kind
    return fixed


def _compares(layer: Any, types: Mapping[str, Any]) -> bool:
    """Whether the layer reads floating-point numbers, whatever it makes of them (a comparison makes booleans)."""
    sources = (layer.get_input(i) for i in range(layer.num_inputs))
    return any(tensor is not None and tensor.dtype in types.values() for tensor in sources)


def _owner(name: str, labels: Mapping[str, Node]) -> Node | None:
    """The node that a layer's name comes from: the same, or with a number behind."""
    if name in labels:
        return labels[name]
    base, _, number = name.rpartition("_")
    return labels.get(base) if number.isdigit() else None
