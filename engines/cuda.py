"""CUDA without PyTorch: devices, streams, events, memory and graphs.

The foreign calls are made by a :class:`~lp_edge.engines.cuda_calls.CudaRuntime`: through the package ``cuda-python``, or
through the shared libraries themselves (JetPack 5, whose Python has no such package)::

    with open_cuda() as cuda, cuda.stream() as stream:
        image = cuda.pinned(nbytes)
        buffer = cuda.alloc(nbytes)
        image.array(np.uint8)[:] = picture
        cuda.copy_to_device(image.array(np.uint8), buffer, stream)
        cuda.copy_to_host(buffer, image.array(np.uint8), stream)
        stream.synchronize()  # only now may the host read image, or write into it

**Memory.** Freeing waits for the device, and allocating may, so buffers that are closed or dropped go to a pool and are
handed out again. A buffer knows the streams on which it was used; the pool hands it out when what was queued there until its
return has been done, or at once for use on that same stream (``alloc(..., stream=...)``). Raw pointers given to others
(TensorRT) are not seen: tell it with ``buffer.use(stream)``.

**Threads.** All methods of :class:`Cuda` may be called from any thread; every call makes the device current in its thread
first. A stream, an event or a graph may be used by several threads, but then the order of their work is the order of the
calls. Close an object only when no other thread is using it. Capture
concerns the capturing thread alone: others go on allocating and synchronising their own streams. Threads that came here once
are not disturbed by what other libraries capture, either (``cudaThreadExchangeStreamCaptureMode``).

The primary context of the device, which ONNX Runtime, TensorRT and PyTorch use as well, stays open until the process ends;
``Cuda.close`` frees everything that was allocated through it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from lp_edge.engines.cuda_calls import (
    INSTALL,
    NOT_READY,
    CudaRuntime,
    check,
    load_driver,
    runtimes,
)
from lp_edge.errors import BackendUnavailable, ConfigError, EngineError, LimitError, LpEdgeError, TensorError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Cuda",
    "CudaEvent",
    "CudaGraph",
    "CudaRuntime",
    "CudaStream",
    "DeviceBuffer",
    "PinnedBuffer",
    "SharedCuda",
    "open_cuda",
    "shared_cuda",
]

_LOG = logging.getLogger("lp_edge")


class _Closing:
    """``close`` as a context manager."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Handle(_Closing):
    """A handle of CUDA that is destroyed by ``close``, or some time after the object was dropped."""

    _destroy: str

    def __init__(self, cuda: Cuda, handle: int = 0) -> None:
        self._cuda = cuda
        self._handle = 0
        if handle:
            self._take(handle)

    def _take(self, handle: int) -> None:
        self._handle = handle
        self._cuda._own(self._destroy, handle)

    @property
    def handle(self) -> int:
        """The handle as a number, for TensorRT and others; EngineError when closed."""
        if not self._handle:
            raise EngineError(
                f"use of a closed {type(self).__name__}", "expected an open one", "keep it open"
            )
        return self._handle

    def close(self) -> None:
        """Destroy it; may be called more than once."""
        handle, self._handle = self._handle, 0
        if handle:
            self._cuda._disown(self._destroy, handle)

    def __del__(self) -> None:
        if handle := self.__dict__.get("_handle", 0):
            # No foreign call here: this may run in any thread, also within a capture.
            self._cuda._dropped.append((self._destroy, handle))


class CudaStream(_Handle):
    """A queue of work on the device; does not wait for the default stream. Made by :meth:`Cuda.stream`."""

    _destroy = "cudaStreamDestroy"
    _graph: CudaGraph | None = None  # being captured

    def synchronize(self) -> None:
        """Wait until everything queued so far is done; EngineError with what failed on the device."""
        self._cuda._call("cudaStreamSynchronize", self.handle)

    @property
    def done(self) -> bool:
        """Whether everything queued so far is done."""
        return self._cuda._ready("cudaStreamQuery", self.handle)

    def wait(self, event: CudaEvent) -> None:
        """Let later work on this stream begin after ``event``; the host does not wait."""
        self._cuda._call("cudaStreamWaitEvent", self.handle, event.handle, 0)
        if self._graph is None and event._graph is not None:  # so a capture spreads over streams
            event._graph._join(self)

    def record(self, event: CudaEvent | None = None) -> CudaEvent:
        """Mark this place in the queue with ``event`` (default: a new one) and return it."""
        event = event or self._cuda.event()
        self._cuda._call("cudaEventRecord", event.handle, self.handle)
        event._graph = self._graph
        return event

    def close(self) -> None:
        """Wait for its work and destroy it; may be called more than once."""
        try:
            if self._handle and not self._cuda.closed:
                self.synchronize()
        finally:
            super().close()


class CudaEvent(_Handle):
    """A place in a stream's queue. Made by :meth:`Cuda.event` or :meth:`CudaStream.record`."""

    _destroy = "cudaEventDestroy"
    _graph: CudaGraph | None = None

    def synchronize(self) -> None:
        """Wait until the work before it is done; at once when it was never recorded."""
        self._cuda._call("cudaEventSynchronize", self.handle)

    @property
    def done(self) -> bool:
        """Whether the work before it is done."""
        return self._cuda._ready("cudaEventQuery", self.handle)

    def elapsed_ms(self, since: CudaEvent) -> float:
        """Milliseconds on the device from ``since`` to this one: both with timing, both done."""
        return float(self._cuda._get("cudaEventElapsedTime", since.handle, self.handle))


class CudaGraph(_Handle):
    """Work captured from a stream, launched as one. Made by :meth:`Cuda.capture`.

    It keeps the buffers alive that were used while it was captured; what is known only by its address is the caller's.
    """

    _destroy = "cudaGraphExecDestroy"

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda)
        self._buffers: dict[int, _Buffer] = {}
        self._streams: list[CudaStream] = []

    def launch(self, stream: CudaStream) -> None:
        """Queue the work on ``stream``; it reads and writes the addresses that it was captured with."""
        self._cuda._call("cudaGraphLaunch", self.handle, stream.handle)
        for buffer in self._buffers.values():
            buffer.use(stream)

    def close(self) -> None:
        """Destroy it and let its buffers go; may be called more than once."""
        super().close()
        self._buffers.clear()

    def _join(self, stream: CudaStream) -> None:
        stream._graph = self
        self._streams.append(stream)

    def _leave(self) -> None:
        for stream in self._streams:
            stream._graph = None
        self._streams.clear()


@dataclass(eq=False)
class _Block:
    """Memory of a pool: its address, its size, where it was used, and when it may be used again."""

    pool: _Pool
    pointer: int
    size: int
    streams: set[CudaStream] = field(default_factory=set)
    events: list[tuple[CudaStream, CudaEvent]] = field(default_factory=list)


class _Buffer(_Closing):
    """Memory of a pool; goes back by ``close``, or some time after the object was dropped."""

    def __init__(self, cuda: Cuda, nbytes: int, block: _Block) -> None:
        self._block: _Block | None = block
        self.cuda: Final = cuda
        self.nbytes: Final = nbytes

    @property
    def closed(self) -> bool:
        """Whether the memory was given back, by this or by closing the :class:`Cuda` it came from."""
        return self._block is None or self.cuda.closed

    def use(self, stream: CudaStream) -> None:
        """Say that work queued on ``stream`` uses this memory; copies of this module do so themselves."""
        self._open().streams.add(stream)
        if stream._graph is not None:
            stream._graph._buffers[id(self)] = self

    def close(self) -> None:
        """Give the memory back; may be called more than once. Work that was queued is not disturbed."""
        with self.cuda._lock:
            block, self._block = self._block, None
        if block is not None:
            self.cuda._dropped.append(block)
            self.cuda._tidy()

    def __del__(self) -> None:
        if block := self.__dict__.get("_block"):
            self.cuda._dropped.append(block)

    def _open(self) -> _Block:
        block = self._block
        if block is None or self.cuda.closed:
            raise EngineError(
                f"use of a closed {type(self).__name__} of {self.nbytes} bytes",
                "expected an open one",
                "keep it open until its last use",
            )
        return block


class DeviceBuffer(_Buffer):
    """Memory on the device. Made by :meth:`Cuda.alloc`; ``nbytes`` is what was asked for."""

    @property
    def pointer(self) -> int:
        """Its address on the device, a multiple of 256; EngineError when closed."""
        return self._open().pointer


class PinnedBuffer(_Buffer):
    """Page-locked memory of the host, which the device copies from and to on its own. Made by :meth:`Cuda.pinned`.

    ``mapped``: the device sees the same memory (integrated GPUs), so nothing has to be copied.
    """

    _left = 0  # the address, when it outlives its Cuda

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        super().__init__(cuda, nbytes, cuda._pinned.take(nbytes, None))
        self.mapped: Final = cuda.integrated
        self._mapping = 0

    def __del__(self) -> None:
        super().__del__()
        if left := self.__dict__.get("_left"):
            self.cuda._free_left(left)

    @property
    def address(self) -> int:
        """Its address on the host; EngineError when closed."""
        return self._open().pointer

    @property
    def pointer(self) -> int:
        """Its address on the device; EngineError when closed or not mapped."""
        address = self.address
        if not self.mapped:
            raise EngineError(
                f"pinned memory of {self.cuda.name} has no address on the device",
                "expected an integrated GPU",
                "copy it to a DeviceBuffer where mapped is False",
            )
        if not self._mapping:
            self._mapping = int(self.cuda._get("cudaHostGetDevicePointer", address, 0))
        return self._mapping

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.nbytes,), "typestr": "|u1", "version": 3}

    def array(
        self, dtype: npt.DTypeLike, shape: Sequence[int] | None = None, offset: int = 0
    ) -> npt.NDArray[Any]:
        """A writable view as an array, which keeps the memory from being given back when this object is dropped, and from being
        freed when the :class:`Cuda` is closed.

        Not to be used after ``close``, nor to be read or written while queued work uses it.

        Args:
            dtype: type of the elements.
            shape: default: all that is left after ``offset``, as one axis.
            offset: bytes to leave out at the beginning.

        Raises:
            TensorError: it does not fit.
        """
        kind = np.dtype(dtype)
        count = (
            (self.nbytes - offset) // kind.itemsize if shape is None else int(np.prod(shape, dtype=np.int64))
        )
        _fits(self, offset, count * kind.itemsize)
        with self.cuda._lock:
            self.cuda._viewed.add(self)
        flat: npt.NDArray[Any] = np.asarray(self)[offset : offset + count * kind.itemsize].view(kind)
        return flat if shape is None else flat.reshape(tuple(shape))


class _Pool:
    """Memory of one kind, by size class; what comes back is kept up to a bound. The caller holds the lock."""

    def __init__(self, cuda: Cuda, allocate: Callable[[int], int], free: str, limit: int) -> None:
        self._cuda, self._allocate, self._free, self._limit = cuda, allocate, free, limit
        self._idle: dict[int, _Block] = {}  # by address, the longest idle first
        self.idle_bytes = 0

    def take(self, nbytes: int, stream: CudaStream | None) -> _Block:
        """A block of at least ``nbytes``, which work on ``stream`` may use still."""
        cuda = self._cuda
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise EngineError(f"{nbytes!r} bytes of memory", "expected an integer from 1", "correct the size")
        cuda._outside_capture("memory cannot be allocated")
        cuda._tidy()
        size = size_class(nbytes)
        with cuda._lock:
            # The newest first: the same few addresses come again, for which graphs are recorded, and those are still cached.
            for block in reversed(self._idle.values()):
                if block.size == size and all(user is stream or event.done for user, event in block.events):
                    self._remove(block)
                    return _Block(
                        self, block.pointer, size, {user for user, _ in block.events if user is stream}
                    )
        try:
            pointer = self._allocate(size)
        except LimitError:
            if not cuda.trim():
                raise
            pointer = self._allocate(size)
        cuda._own(self._free, pointer)
        return _Block(self, pointer, size)

    def take_at(self, pointer: int, nbytes: int, stream: CudaStream) -> _Block | None:
        """The idle block at an address, with ``stream`` waiting for its users; None when there is none so large."""
        cuda = self._cuda
        cuda._outside_capture("memory cannot be allocated")
        cuda._tidy()
        with cuda._lock:
            block = self._idle.get(pointer)
            if block is None or block.size < nbytes:
                return None
            for user, event in block.events:
                if user is not stream:
                    stream.wait(event)
            self._remove(block)
            return _Block(self, pointer, block.size, {stream} if block.events else set())

    def put(self, block: _Block) -> None:
        """Take a block back; what is above the bound is freed, the longest idle first."""
        # A stream that is closed, or whose Cuda is, has nothing to do any more.
        users = [user for user in block.streams if user._handle and not user._cuda.closed and not user.done]
        block.events = [(user, user.record()) for user in users]
        block.streams = set()
        self._idle[block.pointer] = block
        self.idle_bytes += block.size
        self.shrink(self._limit)

    def shrink(self, limit: int) -> int:
        """Free idle blocks until no more than ``limit`` bytes are left; returns the bytes freed."""
        before = self.idle_bytes
        while self.idle_bytes > limit:
            block = next(iter(self._idle.values()))
            for _, event in block.events:
                event.synchronize()
            self._remove(block)
            self._cuda._disown(self._free, block.pointer)
        return before - self.idle_bytes

    def forget(self) -> None:
        """Let go of everything; somebody else has freed it."""
        self._idle.clear()
        self.idle_bytes = 0

    def _remove(self, block: _Block) -> None:
        del self._idle[block.pointer]
        self.idle_bytes -= block.size
        for _, event in block.events:
            event.close()


def size_class(nbytes: int) -> int:
    """Bytes that are allocated for a request: a multiple of 512 and of an eighth of the power of two below.

    So at most an eighth (or 511 bytes) is lost, and requests of nearly the same size share blocks.
    """
    step = max(512, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step


def _fits(buffer: _Buffer, offset: int, nbytes: int) -> None:
    if min(offset, nbytes) < 0 or offset + nbytes > buffer.nbytes:
        raise TensorError(
            f"{nbytes} bytes at {offset} in a {type(buffer).__name__} of {buffer.nbytes}",
            "expected them inside",
            "allocate more, or correct shape, dtype and offset",
        )


def _pinned_owner(array: npt.NDArray[Any]) -> PinnedBuffer | None:
    """The pinned memory that ``array`` is a view of."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, PinnedBuffer) else None


# -- the device ---------------------------------------------------------------------------------

_NON_BLOCKING: Final = 1  # cudaStreamNonBlocking
_BLOCKING, _NO_TIMING = 1, 2  # cudaEventBlockingSync, cudaEventDisableTiming
_PORTABLE, _MAPPED = 1, 2  # cudaHostAllocPortable, cudaHostAllocMapped
_UP, _DOWN, _ACROSS = 1, 2, 3  # cudaMemcpyKind
_TRANSFERS: Final = 4  # streams for copies: what waits in one holds up the others of that one
_THREAD_LOCAL: Final = 1  # cudaStreamCaptureModeThreadLocal: other threads are not held up by a capture

# cudaDeviceAttr
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76


class Cuda(_Closing):
    """One device. Made by :func:`open_cuda`; a context manager; see the top of the module for memory and threads.

    Attributes:
        device: its index.
        name: as the driver calls it, e.g. ``Orin``.
        compute_capability: (major, minor).
        total_memory: bytes; on integrated devices shared with the host.
        integrated: whether host and device share their memory (Jetson).
        driver_version, runtime_version: (major, minor) of the CUDA that the driver supports and that is used.
        runtime: what makes the foreign calls.
    """

    def __init__(self, runtime: CudaRuntime, device: int, pool_bytes: int) -> None:
        self.runtime: Final = runtime
        self.device: Final = device
        self._lock = threading.RLock()
        self._here = threading.local()
        self._context = 0
        self._closed = False
        self._tidying = False
        self._live: dict[tuple[str, int], None] = {}  # what must be freed: (call that does it, handle)
        self._dropped: deque[_Block | tuple[str, int]] = deque()  # what may be given back when it suits
        self._transfers: deque[CudaStream] = deque()
        self._viewed: weakref.WeakSet[PinnedBuffer] = (
            weakref.WeakSet()
        )  # pinned memory that arrays may be views of
        self.driver_version: Final = self._version("cudaDriverGetVersion")
        if self.driver_version == (0, 0):
            raise BackendUnavailable(
                "there is no NVIDIA driver", "expected one for CUDA 11.4 or newer", INSTALL
            )
        count = self._get("cudaGetDeviceCount")
        if device >= count:
            raise BackendUnavailable(
                f"there is no CUDA device {device}",
                f"expected one from 0 to {count - 1}" if count else "expected an NVIDIA GPU",
                "correct the index, or CUDA_VISIBLE_DEVICES" if count else INSTALL,
            )
        self._call("cudaSetDevice", device)
        self._call("cudaFree", 0)  # CUDA before 12 makes the primary context at the first such call
        self._context = self._get("cuCtxGetCurrent")
        self.runtime_version: Final = self._version("cudaRuntimeGetVersion")
        self.name: Final = self._get("cuDeviceGetName", 256, device).decode(errors="replace")
        self.compute_capability: Final = (self._attribute(_MAJOR), self._attribute(_MINOR))
        self.integrated: Final = bool(self._attribute(_INTEGRATED))
        self.total_memory: Final = self.memory()[1]
        flags = _PORTABLE | (_MAPPED if self.integrated else 0)
        self._device = _Pool(
            self,
            lambda size: int(self._get("cudaMalloc", size, about=f"for {size} bytes")),
            "cudaFree",
            pool_bytes,
        )
        self._pinned = _Pool(
            self,
            lambda size: int(self._get("cudaHostAlloc", size, flags, about=f"for {size} bytes")),
            "cudaFreeHost",
            pool_bytes,
        )

    def __str__(self) -> str:
        return f"{self.name} (device {self.device}, compute capability {'.'.join(map(str, self.compute_capability))})"

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    # -- what it gives --------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device; what the pool keeps counts as used."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def stream(self) -> CudaStream:
        """A new stream."""
        self._tidy()
        return CudaStream(self, self._get("cudaStreamCreateWithFlags", _NON_BLOCKING))

    def transfer_stream(self) -> CudaStream:
        """A stream for copies that nobody captures, shared by all: an idle one, or one of a few in turn."""
        self._outside_capture("streams cannot be asked")
        with self._lock:
            for _ in range(len(self._transfers)):
                self._transfers.rotate(1)
                if self._transfers[0].done:
                    return self._transfers[0]
            if len(self._transfers) < _TRANSFERS:
                self._transfers.appendleft(self.stream())
            else:
                self._transfers.rotate(1)
            return self._transfers[0]

    def event(self, *, timing: bool = False, patient: bool = False) -> CudaEvent:
        """A new event.

        Args:
            timing: its time can be asked for, which costs a little.
            patient: who waits for it sleeps, and learns of it some ten microseconds later; else it asks again and again, which
                takes a core of the CPU.
        """
        self._tidy()
        flags = (0 if timing else _NO_TIMING) | (_BLOCKING if patient else 0)
        return CudaEvent(self, self._get("cudaEventCreateWithFlags", flags))

    def alloc(self, nbytes: int, *, stream: CudaStream | None = None) -> DeviceBuffer:
        """Memory on the device with undefined content.

        Args:
            nbytes: how much.
            stream: the first use will be on this stream, so that it may be memory that work queued there still uses:
                buffers that come and go on one stream need no waiting and no more memory than at once.

        Raises:
            LimitError: there is not enough, not even after the pool gave back what it kept.
            EngineError: the size is not positive, or this thread is capturing.
        """
        return DeviceBuffer(self, nbytes, self._device.take(nbytes, stream))

    def alloc_at(self, pointer: int, nbytes: int, stream: CudaStream) -> DeviceBuffer | None:
        """The memory at an address that :meth:`alloc` gave before; None when somebody has it, or it was freed.

        For recorded graphs, which write to fixed addresses: what is queued on ``stream`` from now on waits for whatever uses the
        memory still.
        """
        block = self._device.take_at(pointer, nbytes, stream)
        return None if block is None else DeviceBuffer(self, nbytes, block)

    def pinned(self, nbytes: int) -> PinnedBuffer:
        """Page-locked memory of the host with undefined content, mapped on integrated devices; errors as in :meth:`alloc`."""
        return PinnedBuffer(self, nbytes)

    def trim(self) -> int:
        """Free what the pools keep, waiting for work that still uses it; returns the bytes freed. Not within a capture."""
        self._outside_capture("memory cannot be freed")
        self._tidy()
        with self._lock:
            return self._device.shrink(0) + self._pinned.shrink(0)

    # -- copies ---------------------------------------------------------------------------------

    def copy_to_device(
        self, array: npt.NDArray[Any], buffer: DeviceBuffer, stream: CudaStream, *, offset: int = 0
    ) -> None:
        """Queue a copy of ``array`` into ``buffer``, beginning at byte ``offset``.

        From a view of a :class:`PinnedBuffer` the copy goes on alone: do not write there before it is done. From any
        other array it has been read when this returns, but that is slower, and not possible in a capture.

        Raises:
            TensorError: the array is not contiguous or does not fit.
        """
        self._copy(_UP, buffer, offset, array, stream)

    def copy_to_host(
        self, buffer: DeviceBuffer, out: npt.NDArray[Any], stream: CudaStream, *, offset: int = 0
    ) -> None:
        """Queue a copy of ``buffer``, beginning at byte ``offset``, into all of ``out``.

        ``out`` may be read after ``stream.synchronize()`` (or after an event recorded behind the copy).

        Raises:
            TensorError: the array is read-only, not contiguous or larger than what is there.
        """
        self._copy(_DOWN, buffer, offset, out, stream)

    def copy_on_device(
        self,
        source: DeviceBuffer,
        target: DeviceBuffer,
        nbytes: int,
        stream: CudaStream,
        *,
        source_offset: int = 0,
        target_offset: int = 0,
    ) -> None:
        """Queue a copy of ``nbytes`` from one buffer to another; TensorError when they do not fit."""
        _fits(source, source_offset, nbytes)
        _fits(target, target_offset, nbytes)
        to, start = target.pointer + target_offset, source.pointer + source_offset
        self._call("cudaMemcpyAsync", to, start, nbytes, _ACROSS, stream.handle)
        source.use(stream)
        target.use(stream)

    def fill(self, buffer: DeviceBuffer, value: int, stream: CudaStream) -> None:
        """Queue setting every byte of ``buffer`` to ``value``, 0 to 255."""
        self._call("cudaMemsetAsync", buffer.pointer, value, buffer.nbytes, stream.handle)
        buffer.use(stream)

    def _copy(
        self, kind: int, buffer: DeviceBuffer, offset: int, array: npt.NDArray[Any], stream: CudaStream
    ) -> None:
        _fits(buffer, offset, array.nbytes)
        if not array.flags.c_contiguous or (kind == _DOWN and not array.flags.writeable):
            raise TensorError(
                f"an array with shape {list(array.shape)} and strides {list(array.strides)}"
                + ("" if array.flags.writeable else ", read-only"),
                "expected a C-contiguous array, writable to copy into",
                "pass numpy.ascontiguousarray(...), or a fresh array to copy into",
            )
        owner = _pinned_owner(array)
        if owner is None:
            self._outside_capture("only pinned memory can be copied from or to")
        host, device = array.ctypes.data, buffer.pointer + offset
        ends = (device, host) if kind == _UP else (host, device)
        if array.nbytes:
            self._call("cudaMemcpyAsync", *ends, array.nbytes, kind, stream.handle)
            buffer.use(stream)
            if owner is not None:
                owner.use(stream)

    # -- graphs ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def capture(self, stream: CudaStream) -> Iterator[CudaGraph]:
        """Collect the work queued on ``stream`` inside the block as a graph, instead of running it::

            with cuda.capture(stream) as graph:
                context.execute_async_v3(stream.handle)
            graph.launch(stream)

        Inside, this thread may not allocate, synchronise, or copy from and to memory that is not pinned; run
        the work once before, so that everybody has what they need.

        Raises:
            EngineError: something inside cannot be captured, or this thread is capturing already.
        """
        self._outside_capture("a capture cannot begin")
        graph = CudaGraph(self)
        with self._lock:  # so that _tidy of another thread records no event in between
            self._call("cudaStreamBeginCapture", stream.handle, _THREAD_LOCAL)
            graph._join(stream)
        self._here.capturing = True
        try:
            yield graph
        except BaseException:
            status, *graphs = self._make("cudaStreamEndCapture", stream.handle)
            if status:
                self._make("cudaGetLastError")
            else:
                self._make("cudaGraphDestroy", *graphs)
            raise
        else:
            captured = self._get("cudaStreamEndCapture", stream.handle, about="at the end of a capture")
        finally:
            self._here.capturing = False
            graph._leave()
        try:
            graph._take(self._get("cudaGraphInstantiateWithFlags", captured, 0))
        finally:
            self._call("cudaGraphDestroy", captured)

    @contextlib.contextmanager
    def captured_elsewhere(self, stream: CudaStream) -> Iterator[None]:
        """For calls of libraries that may capture ``stream``: until they return, nobody here asks it for its state.

        Its state is asked for when memory that was used on it comes back; such memory then comes back later.
        """
        unknown = CudaGraph(self)
        with self._lock:
            unknown._join(stream)
        try:
            yield
        finally:
            unknown._leave()

    def _outside_capture(self, what: str) -> None:
        if getattr(self._here, "capturing", False):
            raise EngineError(
                f"{what} in a capture", "expected it outside", "do it before the with block of capture"
            )

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the device and free everything that came from here, in whatever hands it is; twice is harmless.

        Pinned memory that an array is still a view of is freed when the last view is dropped.

        Never raises: where the device is lost, that is logged once as a warning.
        """
        with self._lock:
            if self._closed:
                return
            failures = [self._attempt("cudaDeviceSynchronize")]
            for viewed in self._viewed:
                if (block := viewed._block) is not None:
                    viewed._left = block.pointer
                    self._live.pop((self._pinned._free, block.pointer), None)
            live, self._live = list(reversed(self._live)), {}
            failures += [self._attempt(call, handle) for call, handle in live]
            self._closed = True
            self._dropped.clear()
            self._device.forget()
            self._pinned.forget()
            self._transfers.clear()
        if told := [words for words in failures if words]:
            _LOG.warning(
                "closing %s: %d of %d calls failed, first: %s", self, len(told), len(failures), told[0]
            )

    def _free_left(self, pointer: int) -> None:
        """Free pinned memory that was left for its views at the close; at the end of the process nothing may work any more."""
        with contextlib.suppress(Exception):
            self.runtime("cuCtxSetCurrent", self._context)
            self.runtime(self._pinned._free, pointer)

    def _attempt(self, call: str, *inputs: Any) -> str:
        """Make a call; what went wrong, or ""."""
        try:
            self._call(call, *inputs)
        except LpEdgeError as error:
            return error.got
        return ""

    # -- making calls ---------------------------------------------------------------------------

    def _make(self, name: str, *inputs: Any) -> tuple[Any, ...]:
        """Status and values of a call with the device current in this thread."""
        if self._closed:
            raise EngineError(
                f"{name} on a closed Cuda", "expected an open one", "keep it open until the last use"
            )
        try:
            # Other libraries change what is current in a thread, so it is set each time.
            if self._context and (status := self.runtime("cuCtxSetCurrent", self._context)[0]):
                check(self.runtime, status, "cuCtxSetCurrent")
            if self._context and not getattr(self._here, "apart", False):
                # Else this thread could not allocate while a library captures in the global mode, in whatever thread.
                status = self.runtime("cudaThreadExchangeStreamCaptureMode", _THREAD_LOCAL)[0]
                check(self.runtime, status, "cudaThreadExchangeStreamCaptureMode")
                self._here.apart = True
            return self.runtime(name, *inputs)
        except LpEdgeError:
            raise
        except Exception as error:  # cuda-python raises where a library or a function is missing
            raise BackendUnavailable(
                f"{name} cannot be called through {self.runtime.words} ({' '.join(str(error).split())})",
                "expected the libraries of CUDA 11.4 or newer",
                INSTALL,
            ) from error

    def _call(self, name: str, *inputs: Any, about: str = "") -> tuple[Any, ...]:
        """The values of a call; LpEdgeError when its status is not 0."""
        status, *values = self._make(name, *inputs)
        check(self.runtime, status, name, about)
        return tuple(values)

    def _get(self, name: str, *inputs: Any, about: str = "") -> Any:
        """The one value of a call."""
        (value,) = self._call(name, *inputs, about=about)
        return value

    def _ready(self, name: str, *inputs: Any) -> bool:
        status = int(self._make(name, *inputs)[0])
        if status == NOT_READY:
            return False
        check(self.runtime, status, name)
        return True

    def _version(self, name: str) -> tuple[int, int]:
        version = self._get(name)
        return version // 1000, version % 1000 // 10

    def _attribute(self, number: int) -> int:
        return int(self._get("cudaDeviceGetAttribute", number, self.device))

    # -- what is held ---------------------------------------------------------------------------

    def _own(self, call: str, handle: int) -> None:
        with self._lock:
            self._live[call, handle] = None

    def _disown(self, call: str, handle: int) -> None:
        """Free a handle, unless that has been done."""
        with self._lock:
            if (call, handle) in self._live:
                del self._live[call, handle]
                self._call(call, handle)

    def _tidy(self) -> None:
        """Give back what was dropped, where no capture forbids it."""
        if self._closed or getattr(self._here, "capturing", False):
            return
        with self._lock:
            if self._tidying:  # making the events of a block comes here again
                return
            self._tidying = True
            try:
                for _ in range(len(self._dropped)):
                    dropped = self._dropped.popleft()
                    if isinstance(dropped, tuple):
                        self._disown(*dropped)
                    elif any(stream._graph is not None for stream in dropped.streams):
                        self._dropped.append(dropped)  # an event would become part of the graph
                    else:
                        dropped.pool.put(dropped)
            finally:
                self._tidying = False


def open_cuda(device: int = 0, *, runtime: CudaRuntime | None = None, pool_bytes: int = 256 << 20) -> Cuda:
    """Open a device: through ``cuda-python`` where that works, else through the CUDA libraries found here.

    Args:
        device: its index, as CUDA counts (``CUDA_VISIBLE_DEVICES`` applies).
        runtime: what makes the foreign calls; default: the first that works.
        pool_bytes: how much memory that is not in use is kept, on the device and pinned on the host each.

    Raises:
        ConfigError: a number is negative.
        BackendUnavailable: there is no driver, no CUDA library or no such GPU; says which, and what to do.
    """
    for name, value in (("device", device), ("pool_bytes", pool_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{name} is {value!r}", "expected an integer from 0", f"correct {name}")
    if runtime is not None:
        return Cuda(runtime, device, pool_bytes)
    load_driver()  # without it each of them fails in words of its own
    failures: dict[str, BackendUnavailable] = {}
    for name, make in runtimes():
        try:
            cuda = Cuda(make(), device, pool_bytes)
        except BackendUnavailable as error:
            failures.setdefault(error.got, error)
            _LOG.debug("CUDA through %s: %s", name, error.got)
            continue
        _LOG.info("CUDA through %s: %s", cuda.runtime.words, cuda)
        return cuda
    # What a driver said tells more than that a library is not there.
    told = [error for error in failures.values() if error.__cause__ is None]
    raise BackendUnavailable(
        f"CUDA cannot be used: {'; '.join(error.got for error in told or failures.values())}",
        "expected an NVIDIA driver, CUDA libraries and a GPU",
        told[0].remedy if told else INSTALL,
    )


class SharedCuda(_Closing):
    """A share in the one :class:`Cuda` that all who ask have for a device. Made by :func:`shared_cuda`.

    Attributes:
        cuda: open until the last share is closed.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda: Final = cuda
        self._closed = False

    def close(self) -> None:
        """Give the share back; may be called more than once."""
        with _SHARING:
            if self._closed:
                return
            self._closed = True
            _SHARES[self.cuda] -= 1
            if _SHARES[self.cuda]:
                return
            del _SHARES[self.cuda]
        self.cuda.close()


# The networks of a process share pools and streams on a device, and their arrays know whose memory they are. Who opens the
# first network cannot hand a Cuda to who opens the next: both only name a device. So what is open is looked up here. It holds
# nothing that changes what a call does, and is empty when all shares are closed.
_SHARING: Final = threading.Lock()
_SHARES: Final[dict[Cuda, int]] = {}  # what is open, and in how many hands


def shared_cuda(device: int = 0) -> SharedCuda:
    """A share in the :class:`Cuda` of a device, which is opened with the first share; errors as of :func:`open_cuda`.

    Example:
        >>> with shared_cuda() as one, shared_cuda() as two:               # doctest: +SKIP
        ...     assert one.cuda is two.cuda
    """
    with _SHARING:
        cuda = next((cuda for cuda in _SHARES if cuda.device == device and not cuda.closed), None)
        cuda = cuda or open_cuda(device)
        _SHARES[cuda] = _SHARES.get(cuda, 0) + 1
        return SharedCuda(cuda)
