"""TensorRT as a backend: engines are built once for this GPU, kept, and run with CUDA graphs.

**Memory of results.** Results that are brought to the host pass through memory of the runner. Results that stay on the device
(``infer(keep=True)``) are written by TensorRT into memory that is the caller's from then on; nothing is copied. A recorded
graph writes to fixed addresses all the same: memory that callers have dropped goes back to the pool, and a graph is replayed
when the memory it was recorded with can be had from there again, which is so in a pipeline that holds a few results at a time.
Else the network is launched plainly.

**Integrated GPUs** (Jetson) read host arrays in pinned memory, and write results for the host there, where nothing has to be
copied. Results that stay are in the device's own memory: the GPU does not cache pinned memory (*CUDA for Tegra*, "Memory
Types"), and other networks read them many times. :meth:`~lp_edge.engines.device.DeviceArray.fetch` copies them, 0.8 MB for a
picture of 512 px.

A first call may take minutes, because TensorRT measures its kernels on the GPU; :func:`build_bundle_engines` does it ahead of
time. Precision is decided in the graph (:mod:`lp_edge.engines.trt_build`); where engines are kept and when they are built
again is in :mod:`lp_edge.engines.trt_cache`.

``tensorrt`` and CUDA are imported when the first engine is opened.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import MANIFEST, EngineEntry, EngineKey, open_bundle, save_manifest, sha256_file
from lp_edge.engines.cuda import (
    Cuda,
    CudaEvent,
    CudaGraph,
    CudaStream,
    DeviceBuffer,
    PinnedBuffer,
    SharedCuda,
    shared_cuda,
)
from lp_edge.engines.device import DeviceArray, concatenate, staged, upload
from lp_edge.engines.runner import Array, Runner, TensorSpec, to_host
from lp_edge.engines.trt_build import (
    BATCH_AXES,
    BuildProgress,
    Cancelled,
    Errors,
    Profile,
    Progress,
    TensorRtConfig,
    build_engine,
    check_precision,
    flags_of,
    import_tensorrt,
    logger_of,
    profile_of,
    stoppable,
    unavailable,
)
from lp_edge.engines.trt_cache import EngineCache, Kept, cache_folders, digest_of
from lp_edge.engines.trt_graph import Graph, read_graph
from lp_edge.errors import EngineError, LimitError, LpEdgeError, TensorError

__all__ = [
    "TensorRtConfig",
    "TensorRtRunner",
    "build_bundle_engines",
    "open_backend",
    "open_engine",
]

_LOG = logging.getLogger("lp_edge")

_GIB: Final = 1 << 30
_TELL_S: Final = 10.0
_Memory = TypeVar("_Memory", DeviceBuffer, PinnedBuffer)

_ALIGNMENT: Final = 256  # of every address, says TensorRT's IExecutionContext
_CONTEXTS: Final = 8  # contexts, and so recorded graphs, per engine: one for each set of shapes and addresses


@dataclass(frozen=True)
class _Engine:
    """An engine ready to run, with all that must live as long."""

    trt: Any
    runtime: Any
    engine: Any
    errors: Errors
    graph: Graph
    key: EngineKey
    path: Path


def default_max_batch(total_memory: int) -> int:
    """Largest batch for a card with so many bytes: 4 below 12 GiB, else 8."""
    return 4 if total_memory < 12 * _GIB else 8


def open_engine(
    model: Path | bytes,
    *,
    cuda: Cuda,
    config: TensorRtConfig | None = None,
    cache_dir: Path | None = None,
    name: str = "",
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    share: SharedCuda | None = None,
    exact: bool = False,
    trt: Any = None,
) -> TensorRtRunner:
    """A runner for a network; its engine is read from the cache, or built and kept there.

    Where no engine was built for exactly this configuration, one is taken that was built with options which this
    configuration leaves at their defaults: batches that somebody asked for, workspace, level, compatibility. Of several, the
    one with the largest batch. Options that are given, axes, TF32 and typing are never replaced.

    Args:
        model: path of an ONNX file or its bytes.
        cuda: the device; it must outlive the runner.
        config: how the engine is built and run.
        cache_dir: folder for engines; None = beside the model's bundle, or the user's cache.
        name: what the network is called in messages; by default the file's name.
        progress: called with every step of a build, from any thread.
        cancelled: asked often during a build; True stops it.
        share: a share in ``cuda``, which is closed with the runner.
        exact: take no other engine than one for exactly this configuration.
        trt: the module ``tensorrt``; by default it is imported.

    Raises:
        BackendUnavailable: TensorRT is not there or does not start.
        ConfigError: an option that this TensorRT or this graph does not have.
        EngineError: the graph cannot be built or loaded; the message has TensorRT's own words.
        LimitError: memory ran out.
        Interrupted: ``cancelled`` returned True.
        OutputError: the engine cannot be kept.
    """
    config = config or TensorRtConfig()
    name = name or (model.stem if isinstance(model, Path) else "network")
    trt = trt or import_tensorrt()
    engine = _ready_engine(trt, model, cuda, config, cache_dir, name, progress, cancelled, exact=exact)
    return TensorRtRunner(name, engine, cuda, config, share=share)


def open_backend(model: Path | bytes, config: BackendConfig, name: str) -> Runner:
    """The runner of backend ``tensorrt`` for the registry in :mod:`lp_edge.engines.backends`.

    ``config.provider_options`` are the fields of :class:`TensorRtConfig` as text, and ``cache_dir``.
    """
    options = dict(config.provider_options)
    folder = options.pop("cache_dir", "")
    settings = TensorRtConfig.from_options(options)
    trt = import_tensorrt()
    share = shared_cuda(config.device)
    try:
        said = [BuildProgress(name, "")]  # where a build stands, once there is one

        def work(cancelled: Cancelled) -> TensorRtRunner:
            return open_engine(
                model,
                cuda=share.cuda,
                config=settings,
                cache_dir=Path(folder) if folder else None,
                name=name,
                progress=said.append,
                cancelled=cancelled,
                share=share,
                trt=trt,
            )

        return stoppable(work, waiting=_told(said))
    except BaseException:
        share.close()
        raise


def _told(said: list[BuildProgress]) -> Callable[[], None]:
    """Tells the log where a build stands, when it begins and then every ten seconds: warnings, as people wait without knowing."""
    begun = told = 0.0

    def tell() -> None:
        nonlocal begun, told
        now = said[-1]
        del said[:-1]
        if not now.stage:
            return
        if not begun:
            begun = told = time.monotonic()
            _LOG.warning("%s: TensorRT builds its engine, once for this GPU; that takes minutes", now.network)
        elif time.monotonic() - told >= _TELL_S:
            told = time.monotonic()
            share = "" if now.fraction is None else f", {now.fraction:.0%}"
            _LOG.warning("%s: %s%s (%d s)", now.network, now.stage, share, told - begun)

    return tell


def build_bundle_engines(
    directory: Path,
    *,
    cuda: Cuda | None = None,
    device: int = 0,
    config: TensorRtConfig | None = None,
    networks: Sequence[str] = (),
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    trt: Any = None,
) -> tuple[EngineEntry, ...]:
    """Build the engines of a bundle for this GPU, into its folder ``engines``, and enter them in its manifest.

    Engines that are there and fit are taken as they are. Entries for other GPUs stay; those of graphs that the bundle no
    longer has go.

    Args:
        directory: folder of the bundle.
        cuda: the device; None = ``device`` is opened for the time of the call.
        networks: names of the networks; all when empty.
        config, progress, cancelled, trt: as in :func:`open_engine`.

    Returns:
        The entries of the engines for this GPU.

    Raises:
        BundleError: the bundle is not intact, has no such network, or its manifest cannot be written.
        and what :func:`open_engine` raises.
    """
    trt = trt or import_tensorrt()
    if cuda is None:
        with shared_cuda(device) as share:
            return build_bundle_engines(
                directory,
                cuda=share.cuda,
                config=config,
                networks=networks,
                progress=progress,
                cancelled=cancelled,
                trt=trt,
            )
    bundle = open_bundle(directory)
    folder = bundle.directory / "engines"
    entries = []
    for name in networks or bundle.manifest.networks:
        built = _ready_engine(
            trt,
            bundle.path_of(name),
            cuda,
            config or TensorRtConfig(),
            folder,
            name,
            progress,
            cancelled,
            exact=True,
        )
        file = built.path.relative_to(bundle.directory).as_posix()
        entries.append(EngineEntry(name, file, sha256_file(built.path), built.path.stat().st_size, built.key))
    graphs = {digest_of(bundle.path_of(name)) for name in bundle.manifest.networks}
    mine = {entry.key() for entry in entries}
    kept = tuple(
        entry
        for entry in bundle.manifest.engines
        if entry.key() not in mine and entry.built_for.onnx_sha256 in graphs
    )
    save_manifest(bundle.directory / MANIFEST, replace(bundle.manifest, engines=(*kept, *entries)))
    return tuple(entries)


# -- from a graph to an engine ----------------------------------------------------------------------


def _ready_engine(
    trt: Any,
    model: Path | bytes,
    cuda: Cuda,
    config: TensorRtConfig,
    cache_dir: Path | None,
    name: str,
    progress: Progress | None,
    cancelled: Cancelled | None,
    *,
    exact: bool,
) -> _Engine:
    """The engine from the cache, or a new one."""
    graph = read_graph(model)
    check_precision(trt, graph, cuda.compute_capability, name)
    batch = config.max_batch or max(default_max_batch(cuda.total_memory), config.usual_batch)
    profile = profile_of(name, graph.inputs, config, batch)
    key = EngineKey(
        onnx_sha256=digest_of(model),
        tensorrt=trt.__version__,
        gpu=cuda.name,
        compute_capability=".".join(map(str, cuda.compute_capability)),
        precision=graph.precision,
        profile=profile,
        flags=flags_of(trt, graph, config),
    )
    cache = EngineCache((cache_dir,) if cache_dir else cache_folders(model), name, key)
    free, _ = cuda.memory()  # which also makes the device current in this thread
    if (found := _load(trt, cache.read(), graph, key, name)) is not None:
        return found
    if not exact and (found := _load_other(trt, cache, graph, key, config, name)) is not None:
        return found
    with cache.lock(cancelled):
        if (found := _load(trt, cache.read(), graph, key, name)) is not None:  # another process was first
            return found
        other = cache.differences()
        _LOG.info(
            "%s: building its engine for %s with TensorRT %s%s; this takes a while, once",
            name,
            cuda.name,
            trt.__version__,
            f" (there is one with {other})" if other else "",
        )
        workspace = config.workspace_mib << 20 or (free // 2 if cuda.integrated else 0)
        built = build_engine(
            trt,
            model,
            graph,
            config,
            profile,
            name=name,
            workspace=workspace,
            timing_cache=cache.read_timing() if config.timing_cache else b"",
            progress=progress,
            cancelled=cancelled,
        )
        cache.write_timing(built.timing_cache)
        path = cache.write(built.plan, asked=bool(config.max_batch or config.usual_batch))
    runtime, engine, errors = _deserialise(trt, built.plan, name)
    if engine is None:
        raise EngineError(
            f"{name}: TensorRT {trt.__version__} does not load the engine that it has just built ({errors.take()})",
            "expected it to",
            "report this with the versions that lp-doctor prints, or use --backend cuda",
        )
    return _Engine(trt, runtime, engine, errors, graph, key, path)


def _load_other(
    trt: Any, cache: EngineCache, graph: Graph, key: EngineKey, config: TensorRtConfig, name: str
) -> _Engine | None:
    """An engine that was built with options which the configuration leaves open; the largest batch first, then the newest."""
    fitting = [kept for kept in cache.kept() if kept.key != key and _fits(kept, key, graph, config, name)]
    for kept in sorted(fitting, key=lambda kept: -_batches(graph.inputs, kept.key.profile)[2]):
        plan = cache.plan_of(kept)
        found = _load(trt, None if plan is None else (plan, kept.path), graph, kept.key, name)
        if found is not None:
            _LOG.info(
                "%s: takes the engine %s, built for batches up to %d%s; give options to have another",
                name,
                kept.path,
                _batches(graph.inputs, kept.key.profile)[2],
                f" with {', '.join(kept.key.flags)}" if kept.key.flags else "",
            )
            return found
    return None


def _fits(kept: Kept, wanted: EngineKey, graph: Graph, config: TensorRtConfig, name: str) -> bool:
    """Whether an engine computes what is wanted, as every option that is given says, in batches that somebody asked for."""
    free = tuple(
        f"{option}="
        for option in ("optimization_level", "hardware_compatibility", "workspace_mib")
        if getattr(config, option) == getattr(TensorRtConfig(), option)
    )
    flags = tuple(flag for flag in kept.key.flags if not flag.startswith(free))
    if replace(kept.key, profile=wanted.profile, flags=flags) != wanted:
        return False
    if kept.key.profile == wanted.profile:
        return True
    _, usual, most = _batches(graph.inputs, kept.key.profile)
    if not kept.asked or config.max_batch not in (0, most) or config.usual_batch not in (0, usual):
        return False
    like = replace(config, max_batch=most, usual_batch=usual)
    return profile_of(name, graph.inputs, like, most) == kept.key.profile


def _batches(inputs: Iterable[TensorSpec], profile: Profile) -> tuple[int, int, int]:
    """Smallest, usual and largest batch of a profile; zeros where nothing is batched."""
    for spec in inputs:
        for axis, name in enumerate(spec.shape):
            if name in BATCH_AXES and len(profile.get(spec.name, ((),))[0]) > axis:
                low, usual, high = (shape[axis] for shape in profile[spec.name])
                return low, usual, high
    return 0, 0, 0


def _load(
    trt: Any, found: tuple[bytes, Path] | None, graph: Graph, key: EngineKey, name: str
) -> _Engine | None:
    """An engine of the cache; None when there is none or TensorRT does not take it."""
    if found is None:
        return None
    plan, path = found
    runtime, engine, errors = _deserialise(trt, plan, name)
    if engine is None:
        _LOG.warning(
            "%s: TensorRT %s does not take the engine %s (%s)",
            name,
            trt.__version__,
            path,
            errors.take(),
        )
        return None
    return _Engine(trt, runtime, engine, errors, graph, key, path)


def _deserialise(trt: Any, plan: bytes, name: str) -> tuple[Any, Any, Errors]:
    """Runtime, engine (None when TensorRT refuses the plan) and what goes wrong with them."""
    errors = Errors(trt)
    try:
        runtime = trt.Runtime(logger_of(trt)[0])
    except Exception as error:  # see build_engine
        raise unavailable(trt, "runtime", errors.take(error)) from error
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None and errors.out_of_memory:
        raise LimitError(
            f"{name}: no memory for its engine ({errors.take()})",
            "expected enough memory on the GPU",
            "close other programs on the GPU, or lower max_batch",
        )
    return runtime, engine, errors


# -- memory of a call -------------------------------------------------------------------------------


class _Port:
    """Memory of one tensor of one slot: on the device, and pinned on the host for what is copied there.

    ``mapped``: the pinned memory is the device's as well (integrated GPUs), and nothing is copied.
    """

    def __init__(self, cuda: Cuda, mapped: bool) -> None:
        self._cuda, self._mapped = cuda, mapped
        self._pinned: PinnedBuffer | None = None
        self._device: DeviceBuffer | None = None

    def fit(self, nbytes: int) -> DeviceBuffer | PinnedBuffer:
        """Memory for the device of at least ``nbytes``; what was there before may go."""
        if self._mapped:
            return self._host(nbytes)
        self._device = _grown(self._device, nbytes, self._cuda.alloc)
        return self._device

    def put(self, array: npt.NDArray[Any], stream: CudaStream) -> DeviceBuffer | PinnedBuffer:
        """Queue the upload of an array; where it will be on the device."""
        buffer = self.fit(array.nbytes)
        host = self._host(array.nbytes).array(array.dtype, array.shape)
        np.copyto(host, array)
        if isinstance(buffer, DeviceBuffer):
            self._cuda.copy_to_device(host, buffer, stream)
        return buffer

    def take(self, array: DeviceArray, stream: CudaStream) -> DeviceBuffer:
        """Queue a copy of what lies on the device where TensorRT does not read it."""
        self._device = _grown(self._device, array.nbytes, self._cuda.alloc)
        array.read_on(stream)
        offset = array.pointer - array.buffer.pointer
        self._cuda.copy_on_device(array.buffer, self._device, array.nbytes, stream, source_offset=offset)
        return self._device

    def get(self, dtype: np.dtype[Any], shape: tuple[int, ...], stream: CudaStream) -> npt.NDArray[Any]:
        """Queue the download; a view of pinned memory, to be read when the stream is done."""
        host = self._host(_nbytes(dtype, shape)).array(dtype, shape)
        if self._device is not None:
            self._cuda.copy_to_host(self._device, host, stream)
        return host

    def close(self) -> None:
        """Give all memory back."""
        for buffer in (self._device, self._pinned):
            if buffer is not None:
                buffer.close()
        self._device = self._pinned = None

    def _host(self, nbytes: int) -> PinnedBuffer:
        self._pinned = _grown(self._pinned, nbytes, self._cuda.pinned)
        return self._pinned


def _nbytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _grown(buffer: _Memory | None, nbytes: int, make: Callable[[int], _Memory]) -> _Memory:
    """The buffer, or a larger one in its place; the old one stays where there is no memory for that."""
    if buffer is not None and buffer.nbytes >= nbytes:
        return buffer
    larger = make(nbytes)
    if buffer is not None:
        buffer.close()
    return larger


class _Slot:
    """Everything that one call uses alone: a stream for its copies, events and memory."""

    def __init__(self, cuda: Cuda, tensors: Iterable[str]):
        self.stream = cuda.stream()
        self.uploaded, self.computed = cuda.event(), cuda.event()
        self.ports = {name: _Port(cuda, cuda.integrated) for name in tensors}

    def parts(self) -> Iterator[_Port | CudaStream | CudaEvent]:
        """What is to be closed: first the stream, which waits for what is queued."""
        yield self.stream
        yield from (self.uploaded, self.computed)
        yield from self.ports.values()


@dataclass(eq=False)
class _Lane:
    """An execution context, what it is set to, and the recorded launch of exactly that.

    A context that a graph was recorded from must not be changed, so each set of shapes and addresses that is recorded has a
    context of its own. ``warm``: it was launched plainly with these shapes, without which TensorRT cannot be recorded.
    """

    context: Any
    shapes: Mapping[str, tuple[int, ...]] | None = None
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    warm: bool = False
    graph: CudaGraph | None = None


class TensorRtRunner(Runner):
    """A network compiled by TensorRT; made by :func:`open_engine`.

    Calls from several threads compute one after the other, while the copies of one overlap with the computing of another.
    Inputs may be host arrays or :class:`~lp_edge.engines.device.DeviceArray`, whose memory is read where it is, without
    waiting for it on the host. Results are the caller's own: host arrays, or, with ``keep``, device arrays that are still being
    written when ``infer`` returns. Calls of both kinds may be mixed.

    Attributes:
        key: what the engine was built for.
    """

    def __init__(
        self,
        name: str,
        ready: _Engine,
        cuda: Cuda,
        config: TensorRtConfig,
        *,
        share: SharedCuda | None = None,
    ) -> None:
        super().__init__(name, *_surface(ready, name))
        self.key: Final = ready.key
        self._ready: _Engine | None = ready
        self._trt, self._errors = ready.trt, ready.errors
        self._cuda, self._share = cuda, share
        self._profile: Profile = ready.key.profile
        self._max_batch = _max_batch(self._profile, self.inputs.values(), self.outputs.values())
        shared = not self._profile or _shares_profile(ready.trt)
        self._lane_limit = _CONTEXTS if shared else 1
        self._graphs = config.cuda_graphs
        self._lock = threading.Lock()  # of the compute stream, the lanes and the graphs
        self._lanes: list[_Lane] = []  # the longest unused first
        # The latest launches, by shapes and addresses: what comes again while it is here is recorded. No more than there are
        # contexts, or a longer round of addresses would be recorded again and again.
        self._seen: deque[tuple[Any, ...]] = deque(maxlen=self._lane_limit)
        self._turn = threading.Condition()  # of the idle slots
        self._idle: deque[_Slot] = deque()
        self._ended = False
        self._slots: list[_Slot] = []
        # Where outputs go that nobody wants. All launches run on one stream, so one place is enough.
        self._unwanted = {name: _Port(cuda, False) for name in self.outputs}
        self._scratch: DeviceBuffer | None = None
        self._compute = cuda.stream()
        try:
            size = _first(ready.engine, "device_memory_size_v2", "device_memory_size")
            self._scratch = cuda.alloc(size) if size else None
            for _ in range(config.slots if shared else 1):
                self._slots.append(_Slot(cuda, (*self.inputs, *self.outputs)))
            self._idle.extend(self._slots)
        except BaseException:
            self._share = None  # the caller still has it
            self._release()
            raise

    @property
    def backend(self) -> str:
        return "tensorrt"

    @property
    def device(self) -> str:
        return str(self._cuda.name)

    @property
    def resident(self) -> bool:
        return True

    @property
    def max_batch(self) -> int | None:
        return self._max_batch

    def upload(self, array: npt.NDArray[Any]) -> DeviceArray:
        return upload(self._cuda, array)

    def concatenate(self, arrays: Sequence[Array]) -> DeviceArray:
        # Not on the compute stream: another thread may be recording that.
        return concatenate(self._cuda, arrays, self._cuda.transfer_stream())

    # -- running --------------------------------------------------------------------------------

    def _stage(self, array: Array) -> Array:
        return staged(array, self._cuda, self.name)

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self._in_slot(feeds, outputs, False)

    def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self._in_slot(feeds, outputs, True)

    def _in_slot(self, feeds: Mapping[str, Array], outputs: tuple[str, ...], keep: bool) -> dict[str, Array]:
        self._within_profile(feeds)
        with self._turn:
            while not self._idle and not self._ended:
                self._turn.wait()
            if self._ended:
                raise EngineError(
                    f"{self.name}: infer on a closed runner", "expected an open one", "keep it open"
                )
            # Who waits for results keeps to one slot and its records; results on the device come from all in turn, or the upload
            # of the next would wait for the network.
            slot = self._idle.popleft() if keep else self._idle.pop()
        try:
            return self._run(slot, feeds, outputs, keep)
        except BaseException:
            # What was queued must not write into the slot's memory when the next call has it.
            self._settle(slot)
            raise
        finally:
            with self._turn:
                self._idle.append(slot)
                self._turn.notify_all()

    def _within_profile(self, feeds: Mapping[str, Array]) -> None:
        for name, (low, _, high) in self._profile.items():
            shape = tuple(feeds[name].shape)
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                raise TensorError(
                    f"{self.name}: input {name} has shape {list(shape)}",
                    f"expected one from {list(low)} to {list(high)}, which its engine was built for",
                    "use smaller batches, or raise the options max_batch or axes, which builds another engine",
                )

    def _run(
        self, slot: _Slot, feeds: Mapping[str, Array], outputs: tuple[str, ...], keep: bool
    ) -> dict[str, Array]:
        compute, ready = self._compute, None
        # The slot's pinned memory may still be read for the call before: by its upload, or by the network itself.
        (slot.computed if self._cuda.integrated else slot.uploaded).synchronize()
        here: dict[str, DeviceArray] = {}
        brought: dict[str, DeviceBuffer | PinnedBuffer] = {}
        for name, array in feeds.items():
            if not isinstance(array, DeviceArray):
                brought[name] = slot.ports[name].put(to_host(array), slot.stream)
            elif array.pointer % _ALIGNMENT:
                brought[name] = slot.ports[name].take(array, slot.stream)
            else:
                here[name] = array
        slot.stream.record(slot.uploaded)
        sources = {**here, **brought}
        shapes = {name: tuple(feeds[name].shape) for name in self.inputs}
        with self._lock:  # nothing may touch the compute stream while another thread records it
            # The slot waits for the network before it touches its own memory again; what is the caller's is dropped any time.
            compute.wait(slot.uploaded)
            for array in here.values():
                array.read_on(compute)
            addresses = {name: sources[name].pointer for name in self.inputs}
            sizes, kept = self._launch(slot, shapes, addresses, outputs, keep)
            compute.record(slot.computed)
            if keep:
                ready = compute.record(self._cuda.event(patient=True))
        slot.stream.wait(slot.computed)
        if keep:
            return {
                name: DeviceArray(buffer, sizes[name], self.outputs[name].dtype, compute, ready=ready)
                for name, buffer in kept.items()
            }
        views = {
            name: slot.ports[name].get(self.outputs[name].dtype, sizes[name], slot.stream) for name in outputs
        }
        slot.stream.synchronize()
        return {name: view.copy() for name, view in views.items()}

    def _settle(self, slot: _Slot) -> None:
        try:
            slot.stream.synchronize()
            with self._lock:  # waiting would spoil what another thread records
                self._compute.synchronize()
        except LpEdgeError as error:
            _LOG.debug("%s: after a failure: %s", self.name, error)

    # -- contexts and graphs --------------------------------------------------------------------

    def _launch(
        self,
        slot: _Slot,
        shapes: Mapping[str, tuple[int, ...]],
        inputs: dict[str, int],
        wanted: tuple[str, ...],
        keep: bool,
    ) -> tuple[Mapping[str, tuple[int, ...]], dict[str, DeviceBuffer]]:
        """Queue the network, and return the shapes of its outputs and the memory of those that stay on the device.

        What was recorded with exactly these addresses is replayed. Anything else is launched plainly, and recorded when it comes
        again soon.
        """
        compute = self._compute
        for lane in reversed(self._lanes):
            if lane.graph is None or lane.shapes != shapes:
                continue
            addresses = inputs | self._ports_of(lane, slot, wanted, keep)
            if any(lane.addresses[name] != address for name, address in addresses.items()):
                continue
            if (kept := self._again(lane, wanted if keep else ())) is not None:
                self._lanes.remove(lane)
                self._lanes.append(lane)
                lane.graph.launch(compute)
                return lane.outputs, kept
        lane = self._free_lane(shapes)
        kept = {
            name: self._cuda.alloc(_nbytes(self.outputs[name].dtype, lane.outputs[name]), stream=compute)
            for name in (wanted if keep else ())
        }
        for buffer in kept.values():
            buffer.use(compute)  # the caller may drop it before it is written
        addresses = inputs | self._ports_of(lane, slot, wanted, keep)
        addresses |= {name: buffer.pointer for name, buffer in kept.items()}
        self._bind(lane, addresses)
        launch = (*shapes.values(), *(addresses[name] for name in (*self.inputs, *self.outputs)))
        again = launch in self._seen
        if again:
            self._seen.remove(launch)
        self._seen.append(launch)
        if again and lane.warm and self._graphs:
            lane.graph = self._recorded(lane, compute)
        if lane.graph is not None:
            lane.graph.launch(compute)
        else:
            self._enqueue(lane, compute)
            lane.warm = True
        return lane.outputs, kept

    def _ports_of(self, lane: _Lane, slot: _Slot, wanted: tuple[str, ...], keep: bool) -> dict[str, int]:
        """Addresses of the outputs that do not stay on the device, in memory large enough."""
        addresses = {}
        for name, shape in lane.outputs.items():
            if not (keep and name in wanted):
                port = slot.ports[name] if name in wanted else self._unwanted[name]
                buffer = port.fit(_nbytes(self.outputs[name].dtype, shape))
                buffer.use(self._compute)  # a larger one may take its place while this one is written
                addresses[name] = buffer.pointer
        return addresses

    def _again(self, lane: _Lane, kept: tuple[str, ...]) -> dict[str, DeviceBuffer] | None:
        """The memory that a graph was recorded with, for the outputs that stay; None where somebody has it."""
        buffers: dict[str, DeviceBuffer] = {}
        for name in kept:
            size = _nbytes(self.outputs[name].dtype, lane.outputs[name])
            buffer = self._cuda.alloc_at(lane.addresses[name], size, self._compute)
            if buffer is None:
                return None
            buffer.use(self._compute)
            buffers[name] = buffer
        return buffers

    def _free_lane(self, shapes: Mapping[str, tuple[int, ...]]) -> _Lane:
        """A lane for these shapes that nothing is recorded in."""
        for lane in self._lanes:
            if lane.graph is None and lane.shapes == shapes:
                break
        else:
            if len(self._lanes) < self._lane_limit:
                lane = _Lane(self._new_context())
                self._lanes.append(lane)
            else:
                lane = self._lanes[0]
                self._compute.synchronize()  # it may be running
                graph, lane.graph = lane.graph, None
                if graph is not None:
                    graph.close()
            if lane.shapes != shapes:
                self._shape(lane, shapes)
        self._lanes.remove(lane)
        self._lanes.append(lane)
        return lane

    def _bind(self, lane: _Lane, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if lane.addresses.get(name) != address:
                lane.addresses.pop(name, None)
                if not lane.context.set_tensor_address(name, address):
                    raise self._failed(f"does not take the memory of {name}")
                lane.addresses[name] = address

    def _new_context(self) -> Any:
        engine: Any = self._ready.engine if self._ready is not None else None
        strategy = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        if strategy is not None:
            context = engine.create_execution_context(strategy.USER_MANAGED)
        else:
            context = engine.create_execution_context_without_device_memory()
        if context is None:
            raise self._failed("makes no execution context")
        if self._scratch is not None:
            # All contexts run on one stream, one after the other, so they share the memory of intermediates.
            if hasattr(context, "set_device_memory"):
                context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)
            else:
                context.device_memory = self._scratch.pointer
        if self._profile and context.active_optimization_profile != 0:
            if not context.set_optimization_profile_async(0, self._compute.handle):
                raise self._failed("does not share its profile between contexts")
            self._compute.synchronize()
        return context

    def _shape(self, lane: _Lane, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Set the shapes of the inputs and learn those of the outputs."""
        context = lane.context
        lane.shapes, lane.warm = None, False
        for name, shape in shapes.items():
            if name in self._profile and not context.set_input_shape(name, shape):
                raise self._failed(f"does not take {name} with shape {list(shape)}")
        if missing := context.infer_shapes():
            raise self._failed(f"wants the shapes of {', '.join(missing)}")
        outputs = {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}
        for name, shape in outputs.items():
            if any(size < 0 for size in shape):
                raise self._failed(f"does not know the shape of output {name} before it runs")
        lane.shapes, lane.outputs = dict(shapes), outputs

    def _enqueue(self, lane: _Lane, stream: CudaStream) -> None:
        if not lane.context.execute_async_v3(stream.handle):
            raise self._failed("did not start the network", lane.shapes)

    def _recorded(self, lane: _Lane, stream: CudaStream) -> CudaGraph | None:
        """The launch as a graph; None where it cannot be recorded, and then no more is tried."""
        try:
            with self._cuda.capture(stream) as graph:
                self._enqueue(lane, stream)
        except LpEdgeError as error:
            self._graphs = False
            _LOG.info("%s: runs without CUDA graphs: %s", self.name, error.got)
            return None
        return graph

    def _failed(self, what: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> LpEdgeError:
        on = f" on {', '.join(f'{n} {list(s)}' for n, s in shapes.items())}" if shapes else ""
        memory = self._errors.out_of_memory
        got = f"{self.name}: TensorRT {self._trt.__version__} {what}{on} ({self._errors.take()})"
        if memory:
            return LimitError(
                got, "expected enough memory", "close other programs on the GPU, or lower max_batch"
            )
        return EngineError(got, "expected the network to run", "try lp-doctor, or use --backend cuda")

    # -- the end --------------------------------------------------------------------------------

    def _close(self) -> None:
        with self._turn:
            self._ended = True
            self._turn.notify_all()
            while len(self._idle) < len(self._slots):  # what other threads are still running ends first
                self._turn.wait()
        self._release()

    def _release(self) -> None:
        """Free everything, contexts before the engine and that before its runtime; what fails there is logged."""
        parts: list[Any] = [
            self._compute,
            *(lane.graph for lane in self._lanes if lane.graph is not None),
            *self._unwanted.values(),
        ]
        parts += [part for slot in self._slots for part in slot.parts()]
        parts += [self._scratch] if self._scratch is not None else []
        failures = []
        for part in parts:
            try:
                part.close()
            except (
                LpEdgeError
            ) as error:  # the device is lost, which somebody else is told; the rest is freed all the same
                failures.append(error.got)
        if failures:
            _LOG.warning(
                "%s: closing: %d of %d calls failed, first: %s",
                self.name,
                len(failures),
                len(parts),
                failures[0],
            )
        for lane in self._lanes:
            lane.context = lane.graph = None
        self._lanes.clear()
        self._ready = None
        if self._share is not None:
            self._share.close()


def _max_batch(profile: Profile, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> int | None:
    """Largest size of the axis that all outputs begin with; None when there is no such axis, or no input has it."""
    axes = {spec.shape[0] if spec.shape else 1 for spec in outputs}
    sizes = [
        profile[spec.name][2][0]
        for spec in inputs
        if spec.name in profile and isinstance(spec.shape[0], str) and {spec.shape[0]} == axes
    ]
    return min(sizes, default=None)


def _shares_profile(trt: Any) -> bool:
    """Whether several contexts may use one profile: asked for when building on 8.6, always so from 10, never on 8.5."""
    return hasattr(trt, "ExecutionContextAllocationStrategy") or hasattr(
        getattr(trt, "PreviewFeature", None), "PROFILE_SHARING_0806"
    )


def _first(thing: Any, *names: str) -> int:
    """The first of several attributes that is there; they are called differently in different versions."""
    return int(next(getattr(thing, name) for name in names if hasattr(thing, name)))


def _surface(ready: _Engine, name: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs in the graph's order: names and named axes from the graph, which the engine must confirm."""
    trt, engine = ready.trt, ready.engine
    kinds = {
        getattr(trt.DataType, member): dtype
        for member, dtype in (
            ("FLOAT", "float32"),
            ("HALF", "float16"),
            ("INT8", "int8"),
            ("UINT8", "uint8"),
            ("INT32", "int32"),
            ("INT64", "int64"),
            ("BOOL", "bool"),
        )
        if hasattr(trt.DataType, member)
    }
    tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for specs, mode in (
        (ready.graph.inputs, trt.TensorIOMode.INPUT),
        (ready.graph.outputs, trt.TensorIOMode.OUTPUT),
    ):
        got = {tensor for tensor in tensors if engine.get_tensor_mode(tensor) == mode}
        if got != {spec.name for spec in specs}:
            raise EngineError(
                f"{name}: its engine has the {mode.name.lower()}s {', '.join(sorted(got))}",
                f"expected {', '.join(spec.name for spec in specs)}",
                "report this",
            )
    return (
        [_confirmed(spec, kinds, engine, name) for spec in ready.graph.inputs],
        [_confirmed(spec, kinds, engine, name) for spec in ready.graph.outputs],
    )


def _confirmed(spec: TensorSpec, kinds: Mapping[Any, str], engine: Any, name: str) -> TensorSpec:
    """A tensor with sizes that only the engine knows; EngineError when graph and engine disagree."""
    dtype = kinds.get(engine.get_tensor_dtype(spec.name), "unknown")
    shape = tuple(engine.get_tensor_shape(spec.name))
    axes = spec.shape or tuple(f"?{i}" for i in range(len(shape)))  # a file may leave a result's shape out
    fits = len(shape) == len(axes) and all(
        size == axis or size < 0 or isinstance(axis, str) for size, axis in zip(shape, axes, strict=True)
    )
    if dtype != spec.dtype.name or not fits:
        raise EngineError(
            f"{name}: {spec.name} is {dtype} {list(shape)} in the engine",
            f"expected {spec}",
            "export the network with float32 or uint8 inputs and outputs",
        )
    merged = tuple(
        size if size >= 0 and isinstance(axis, str) and axis.startswith("?") else axis
        for size, axis in zip(shape, axes, strict=True)
    )
    return TensorSpec(spec.name, spec.dtype, merged)
