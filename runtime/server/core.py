"""What all front ends of the server share: devices, portraits, admission, threads.

The event loop carries messages; it never touches pixels. Each stream's frame code (decode, track, compose, paste) runs in
threads of a pool, and every network call in it goes through the device's worker, which merges the calls of concurrent
streams (:mod:`lp_edge.engines.batching`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from types import MappingProxyType
from typing import Any, TypeVar

from lp_edge.engines.backends import resolve_backend
from lp_edge.engines.batching import BatchConfig, CallScope, DeviceWorker
from lp_edge.engines.bundle import MANIFEST, open_bundle, sha256_file
from lp_edge.errors import ConfigError, DeadlineError, Interrupted, LimitError, NoFaceError, ServerUnavailable
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.image import read_image
from lp_edge.runtime.job import demo_picture
from lp_edge.runtime.server.config import ServerConfig
from lp_edge.runtime.server.log import StreamLog
from lp_edge.runtime.server.metrics import Metrics
from lp_edge.runtime.server.portraits import PortraitStore
from lp_edge.runtime.server.tracing import stream_span
from lp_edge.runtime.server.wire import MotionSpace
from lp_edge.runtime.shared_frames import sweep

__all__ = ["Core", "Device", "Stream", "count_frame", "idle_error", "stopping"]

_LOG = logging.getLogger("lp_edge")

T = TypeVar("T")

_RETRY_S = 1.0
_GPU_WAIT_S = 0.002
_WARM_FRAMES = 4  # the launch of a shape is recorded when it comes the second time, and replayed from then on
_LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-gpu", "opencv-python-headless", "av", "grpcio", "protobuf")


class Device:
    """A device: the networks of the bundle on it, and the worker that owns them.

    Attributes:
        index: its place in ``ServerConfig.devices``.
        animator: its networks; every call goes through the worker.
        worker: merges the calls of concurrent streams.
        threads: how many threads execute networks.
        streams: open streams on it.
        live: those of them whose clients wait for single frames (Animate).
        max_batch: most frames of one engine call.
    """

    def __init__(self, config: ServerConfig, index: int, metrics: Metrics) -> None:
        backend = resolve_backend(replace(config.backend, device=config.devices[index]))
        on_cpu = backend.backend == "cpu"
        if on_cpu and config.devices != (0,):
            raise ConfigError(
                f"devices {', '.join(map(str, config.devices))}, and no GPU works here",
                "expected device 0: a CPU is one device",
                "leave --device out, or name the GPUs' backend to see what is missing",
            )
        bundle = open_bundle(config.bundle)
        # One call at a time with all cores: two at a time with half of them each slow each other down (2 cores, mesh, one lossless
        # stream: 1.12 times the frames through shared memory, 1.13 as JPEG).
        self.threads = 1
        if on_cpu and not backend.threads:
            backend = replace(backend, threads=os.cpu_count() or 1)
        wait = config.max_batch_wait_s
        batch = BatchConfig(
            max_batch=config.max_batch,
            max_wait_s=(0.0 if on_cpu else _GPU_WAIT_S) if wait is None else wait,
            threads=self.threads,
        )
        self.index, self.streams, self.live = index, 0, 0
        self.max_batch, self.max_wait_s = batch.max_batch, batch.max_wait_s
        with ExitStack() as stack:
            self.worker = stack.enter_context(DeviceWorker(batch, name=f"device {index}", observer=metrics))
            self.animator = stack.enter_context(
                Animator(bundle, backend=backend, face_models=config.face_models, wrap=self.worker.wrap)
            )
            self._name = self.animator.finder.mesh.runner.device
            if self.animator.family.accelerated:
                self._warm_up()
            self._stack = stack.pop_all()

    def _warm_up(self) -> None:
        """Draw some frames so that no caller waits for engines, measured kernels and recorded launches."""
        started = time.monotonic()
        picture = read_image(demo_picture())
        try:
            live = self.animator.live(picture)
            for number in range(_WARM_FRAMES):
                live.step(picture, number / 25)
        except NoFaceError as error:
            _LOG.info("device %d: not warmed up: %s", self.index, error.got)
        else:
            _LOG.info("device %d: warmed up in %.1f s", self.index, time.monotonic() - started)

    @property
    def name(self) -> str:
        """The device in words."""
        return self._name

    @property
    def backend(self) -> str:
        """Name of the backend that draws."""
        return self.animator.backend

    def close(self) -> None:
        """Free the networks and end the worker's threads; calling it twice is harmless."""
        self._stack.close()


class Stream:
    """An open call of a client that takes a place among ``max_streams``.

    Attributes:
        id: names it in logs and messages.
        kind: ``animate``, ``extract_motion``, ``render``, ``http`` or ``register``.
        peer: the client's address.
        device: where its networks run.
        scope: its network calls; cancelled when the stream ends.
        log: what will be said of it.
        draining: set when the server is about to stop.
        ended: set when it does and the stream is still open.
    """

    def __init__(self, kind: str, peer: str, device: Device) -> None:
        self.id = secrets.token_hex(6)
        self.kind, self.peer, self.device = kind, peer, device
        self.scope = CallScope(self.id)
        self.log = StreamLog(id=self.id, kind=kind, peer=peer)
        self.draining, self.ended = asyncio.Event(), asyncio.Event()
        self.opened = time.monotonic()

    def cancel(self) -> None:
        """Stop its work within one batch; from any thread."""
        self.scope.cancel()


class Core:
    """Devices, portraits, admission and threads of a server; use :meth:`open` and :meth:`close`.

    All methods but :meth:`open` belong to the event loop's thread.

    Args:
        config: the server's configuration.
        metrics: counts.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.store = PortraitStore(config.limits, config.portrait_ttl_s)
        self.devices: list[Device] = []
        self.manifest_sha256 = ""
        self.started = time.monotonic()
        self.streams: dict[str, Stream] = {}
        self.drain_deadline: float | None = None
        cores = os.cpu_count() or 1
        # A lossless stream decodes, reads, draws and encodes in up to four threads, most of which wait for the device.
        self._steps = ThreadPoolExecutor(4 * config.limits.max_streams + 4, thread_name_prefix="step")
        self._codecs = ThreadPoolExecutor(max(2, cores), thread_name_prefix="codec")
        metrics.bind(
            queue_depth=lambda: sum(d.worker.pending for d in self.devices),
            portraits=lambda: len(self.store),
            portrait_bytes=lambda: self.store.memory_bytes,
            streams=lambda: len(self.streams),
        )

    def open(self) -> None:
        """Load the networks on every device; blocks for seconds.

        Raises:
            BundleError, BackendUnavailable, EngineError, ConfigError: a device cannot be used.
        """
        if self.config.limits.max_shared_memory_bytes and (left := sweep()):
            _LOG.warning("removed %d shared memory segments of servers that were killed", left)
        try:
            for index in range(len(self.config.devices)):
                self.devices.append(Device(self.config, index, self.metrics))
            self.manifest_sha256 = sha256_file(self.devices[0].animator.bundle.directory / MANIFEST)
        except BaseException:
            self._close_devices()
            raise

    @property
    def ready(self) -> bool:
        """Networks are loaded and the server is not about to stop."""
        return len(self.devices) == len(self.config.devices) and self.drain_deadline is None

    @property
    def space(self) -> MotionSpace:
        """What motion messages carry."""
        animator = self.devices[0].animator
        manifest = animator.bundle.manifest
        return MotionSpace(manifest.family, manifest.keypoints, animator.canonical)

    def versions(self) -> dict[str, str]:
        """Versions of Python and of the libraries that matter."""
        found = {"python": platform.python_version()}
        for name in _LIBRARIES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        return found

    # -- admission -------------------------------------------------------------------------------------

    def check_ready(self) -> None:
        """ServerUnavailable while networks load, or when the server is about to stop."""
        if self.ready:
            return
        self.metrics.refused("loading" if self.drain_deadline is None else "draining")
        if self.drain_deadline is not None:
            raise ServerUnavailable(
                "the server is about to stop",
                "it takes no new work",
                "try again later",
                retry_after_s=_RETRY_S,
            )
        raise ServerUnavailable(
            "the server is loading its networks", "", "try again in a moment", retry_after_s=_RETRY_S
        )

    @contextmanager
    def open_stream(
        self, kind: str, peer: str, headers: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[Stream]:
        """Admit a stream for the time of the ``with`` block; what it still computes is cancelled at the end.

        Args:
            kind, peer: as in :class:`Stream`.
            headers: of the call, for tracing.

        Raises:
            LimitError: ``max_streams`` are open.
            ServerUnavailable: the server is loading or about to stop.
        """
        self.check_ready()
        limit = self.config.limits.max_streams
        # A portrait can be registered while all places are taken: it is short work, with as many places of its own.
        alike = sum((s.kind == "register") == (kind == "register") for s in self.streams.values())
        if alike >= limit:
            self.metrics.refused("streams")
            raise LimitError(
                f"{limit} {'portraits are being registered' if kind == 'register' else 'streams are open'}",
                "no more are admitted at a time (max_streams)",
                "try again when one has ended",
                retry_after_s=_RETRY_S,
            )
        device = min(self.devices, key=lambda d: d.streams)
        stream = Stream(kind, peer, device)
        self.streams[stream.id] = stream
        device.streams += 1
        device.live += kind == "animate"
        self.metrics.stream_opened(kind)
        error: BaseException | None = None
        with stream_span(kind, stream.id, headers) as tell:
            try:
                try:
                    yield stream
                except Interrupted as caught:
                    if not stream.ended.is_set():
                        raise
                    raise stopping() from caught  # the drain's deadline has cut its work short
            except BaseException as caught:
                error = caught
                raise
            finally:
                stream.cancel()
                device.streams -= 1
                device.live -= kind == "animate"
                del self.streams[stream.id]
                status = stream.log.end(error)
                tell({"frames": stream.log.frames, "dropped": stream.log.dropped, "status": status})
                self.metrics.stream_closed(kind, status, time.monotonic() - stream.opened)

    async def next_message(self, stream: Stream, requests: AsyncIterator[T]) -> T | None:
        """The client's next message; None when it has finished.

        Raises:
            DeadlineError: none came within ``idle_timeout_s``.
            ServerUnavailable: the server stops.
        """
        limit = self.config.idle_timeout_s
        message: asyncio.Future[T | None] = asyncio.ensure_future(anext(requests, None))
        # nobody may be there to ask for its error
        message.add_done_callback(lambda done: done.cancelled() or done.exception())
        ended = asyncio.ensure_future(stream.ended.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {message, ended}
            await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                return message.result()
            raise stopping() if ended.done() else idle_error(limit)
        finally:
            message.cancel()
            ended.cancel()

    # -- work --------------------------------------------------------------------------------------------

    async def compute(self, stream: Stream, fn: Callable[..., T], *args: object) -> T:
        """Run frame code in a thread; its network calls belong to the stream.

        Cancelling this cancels the stream's work and waits for the thread, which ends within a batch: what the code uses
        may be freed afterwards.
        """

        def run() -> T:
            with stream.device.worker.scope(stream.scope):
                return fn(*args)

        return await _joined(self._steps.submit(run), stream.cancel)

    async def step(self, fn: Callable[..., T], *args: object) -> T:
        """Run a frame's work without networks in a thread, where it keeps no batch waiting; cancelling this waits for it."""
        return await _joined(self._steps.submit(fn, *args))

    async def codec(self, fn: Callable[..., T], *args: object) -> T:
        """Run work without networks that no frame waits for (pictures to register, files) in one of a few threads.

        Cancelling this waits for it.
        """
        return await _joined(self._codecs.submit(fn, *args))

    async def iterate(
        self, stream: Stream, make: Callable[[], Generator[T, None, None]]
    ) -> AsyncGenerator[T, None]:
        """Items of a generator that runs in threads, one step at a time: it is never ahead of whoever asks.

        Closing this closes the generator, in a thread too; its errors are raised here.
        """
        items = make()
        done = object()
        try:
            while (item := await self.compute(stream, next, items, done)) is not done:
                yield item
        finally:
            await asyncio.shield(asyncio.wrap_future(self._steps.submit(items.close)))

    # -- end ---------------------------------------------------------------------------------------------

    def drain(self, seconds: float) -> None:
        """Take no new streams and tell the open ones that they have ``seconds`` left."""
        if self.drain_deadline is None:
            self.drain_deadline = time.monotonic() + seconds
            for stream in self.streams.values():
                stream.draining.set()

    async def drained(self) -> bool:
        """Wait until all streams have ended or the drain's deadline has passed; then the rest is cancelled.

        Returns:
            Whether all ended by themselves.
        """
        while self.streams and self.drain_deadline is not None and time.monotonic() < self.drain_deadline:
            await asyncio.sleep(0.02)
        left = list(self.streams.values())
        for stream in left:
            stream.ended.set()
            stream.cancel()
        return not left

    def time_left(self) -> float:
        """Seconds until the drain's deadline; 0 or more."""
        return max(0.0, (self.drain_deadline or time.monotonic()) - time.monotonic())

    def close(self) -> None:
        """End all threads and free the networks; calling it twice is harmless. Blocks until running work has ended."""
        for stream in self.streams.values():
            stream.cancel()
        self._steps.shutdown(wait=True, cancel_futures=True)
        self._codecs.shutdown(wait=True, cancel_futures=True)
        self._close_devices()

    def _close_devices(self) -> None:
        for device in self.devices:
            device.close()
        self.devices = []


async def _joined(future: Future[T], stop: Callable[[], None] = lambda: None) -> T:
    """The result of a thread's work. Cancelled, it calls ``stop`` and waits for the thread unless it has not begun."""
    waiting = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        stop()
        if not future.cancel():
            while not waiting.done():
                with contextlib.suppress(
                    asyncio.CancelledError
                ):  # a second one is no reason to free what is in use
                    await asyncio.wait([waiting])
            if not waiting.cancelled():
                waiting.exception()  # nobody else will ask for it
        raise


def count_frame(core: Core, stream: Stream, stages: Mapping[str, float], seconds: float) -> None:
    """Count an answered frame in the stream's log and the metrics; see :meth:`Metrics.frame`."""
    stream.log.frames += 1
    core.metrics.frame(stream.kind, stages, seconds)


def stopping() -> ServerUnavailable:
    """The error that ends a stream at the drain's deadline."""
    return ServerUnavailable("the server stops", "", "connect again", retry_after_s=_RETRY_S)


def idle_error(limit_s: float) -> DeadlineError:
    """The error that ends a stream whose client neither sends nor takes anything."""
    return DeadlineError(
        f"the stream was silent for more than {limit_s:g} s",
        "expected a message, or results to be taken, in time (idle_timeout)",
        "open the stream when it is needed",
    )
