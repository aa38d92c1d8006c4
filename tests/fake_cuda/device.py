"""A CUDA device in NumPy: what :class:`lp_edge.engines.cuda.Cuda` calls in place of NVIDIA's libraries.

It is as awkward as a device may be. Queued work runs at the last moment, when somebody waits for it; fresh memory holds
garbage; host memory that a copy will fill is poisoned until then. So whoever reads too early gets wrong numbers. What a real
device would let pass and punish later is noted as a violation: unordered access from two streams, writing to memory that a
copy is still reading, use after free, freeing twice or under queued work, calls without a context. ``verify`` (at the end of
the with block) fails on violations and on leaks::

    with FakeCuda(ORIN) as fake:
        with open_cuda(runtime=fake) as cuda:
            ...

A fake of a library that works on the device (TensorRT) queues its own work with :meth:`FakeCuda.enqueue`.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from lp_edge.engines.cuda_calls import PROTOTYPES

if TYPE_CHECKING:
    from typing_extensions import Self

GARBAGE, POISON, FREED = 0xCD, 0xDB, 0xDD

NO_CONTEXT, INVALID_HANDLE, INVALID_VALUE = 201, 400, 1
UNSUPPORTED_IN_CAPTURE, CAPTURE_INVALID, UNJOINED, ISOLATION, WRONG_THREAD = 900, 901, 904, 905, 908
ILLEGAL_STATE = 401
NOT_READY = 600


@dataclass(frozen=True)
class Personality:
    """What a device is like."""

    name: str
    compute_capability: tuple[int, int]
    memory: int
    integrated: bool = False
    driver: int = 12040
    runtime: int = 12040
    devices: int = 1
    statuses: tuple[tuple[str, int], ...] = ()  # calls that always fail


H200 = Personality("NVIDIA H200", (9, 0), 150_754_820_096)
ORIN = Personality("Orin", (8, 7), 65_890_271_232, True, 11040, 11040)
SMALL = replace(H200, name="Small", memory=1 << 20)
NO_DEVICE = replace(H200, statuses=(("cudaGetDeviceCount", 100),))
OLD_DRIVER = replace(H200, driver=11040, statuses=(("cudaGetDeviceCount", 35),))
NO_DRIVER = replace(H200, driver=0, statuses=(("cudaGetDeviceCount", 35),))

_NAMES = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    35: "cudaErrorInsufficientDriver",
    100: "cudaErrorNoDevice",
    700: "cudaErrorIllegalAddress",
    900: "cudaErrorStreamCaptureUnsupported",
    901: "cudaErrorStreamCaptureInvalidated",
}

# What needs no context, and is no part of the device's work.
_FREE = re.compile(
    r"cudaGet|cuCtx|cudaDriver|cudaRuntime|cudaSetDevice|cudaDeviceGetAttribute|cuDeviceGetName"
)
# What a thread may not do while it captures.
_UNSAFE = re.compile(
    r"cuda(Malloc|Free|HostAlloc|FreeHost|(Device|Stream|Event)Synchronize|(Stream|Event)Query|StreamDestroy)$"
)


@dataclass(frozen=True)
class Call:
    """A call that was made."""

    name: str
    inputs: tuple[Any, ...]
    status: int
    thread: int


@dataclass(eq=False)
class Memory:
    """An allocation. ``base`` is its address on the device (0: pinned and not mapped), ``host`` on the host."""

    size: int
    data: np.ndarray
    base: int
    host: int
    flags: int = 0
    freed: bool = False
    accesses: list[tuple[int, int, int, int, bool]] = field(
        default_factory=list
    )  # start, stop, stream, tick, writes
    pending_writes: int = 0


@dataclass(eq=False)
class Work:
    """One piece of queued work: ``reads`` and ``writes`` are (memory, start, stop)."""

    label: str
    run: Callable[[], None]
    reads: list[tuple[Memory, int, int]]
    writes: list[tuple[Memory, int, int]]
    fills: bool = False  # overwrites all of what it writes
    sums: list[tuple[Memory, int, int, int]] = field(default_factory=list)
    poisoned: list[tuple[Memory, int, int]] = field(default_factory=list)


@dataclass(eq=False)
class Mark:
    """An event recorded in a queue, or a wait for one."""

    event: Event
    version: int
    stream: Stream  # on which it was recorded
    waits: bool


@dataclass(eq=False)
class Event:
    flags: int
    version: int = 0  # of the newest record
    reached: int = 0  # newest record that was executed
    stream: Stream | None = None
    clock: dict[int, int] = field(default_factory=dict)
    time_ms: float = 0.0
    capture: Capture | None = None


@dataclass(eq=False)
class Capture:
    thread: int
    origin: Stream
    streams: list[Stream]
    work: list[Work] = field(default_factory=list)
    valid: bool = True
    unjoined: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Stream:
    handle: int
    queue: deque[Work | Mark] = field(default_factory=deque)
    tick: int = 0
    clock: dict[int, int] = field(default_factory=dict)
    capture: Capture | None = None


class FakeCuda:
    """A device. It is a :class:`lp_edge.engines.cuda_calls.CudaRuntime`.

    Attributes:
        calls: all calls in order but those that only make the device current.
        violations: what was done wrong so far.
    """

    def __init__(self, personality: Personality = H200) -> None:
        self.personality = personality
        self.words = "a fake"
        self.calls: list[Call] = []
        self.violations: list[str] = []
        self.broken = 0
        self._lock = threading.RLock()
        self._plan: dict[str, deque[int]] = {}
        self._raises: dict[str, Exception] = {}
        self._device: dict[int, int] = {}  # of a thread: index + 1 once a context is current
        self._modes: dict[int, int] = {}  # of threads, how captures of others concern them
        self._recorded: tuple[int, int] | None = None
        self._last = 0
        self._next = 0x7F00_0000_0000
        self._handle = 0x1000
        self._memory: list[Memory] = []
        self._objects: dict[int, Any] = {}
        self._streams: list[Stream] = []  # also destroyed ones: what is queued there runs some time
        self._host: dict[int, int] = {}  # ticks of every stream that the host knows to be done
        self._clock_ms = 0.0

    # -- for tests ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.verify()

    def fail(self, name: str, status: int, *, nth: int = 1, times: int = 1) -> None:
        """Let the ``nth`` call from now of ``name``, and ``times`` in all, return ``status``."""
        assert name in PROTOTYPES, name
        self._plan[name] = deque([0] * (nth - 1) + [status] * times)

    def raise_on(self, name: str, error: Exception) -> None:
        """Let every call of ``name`` raise, as cuda-python does where a library is missing."""
        assert name in PROTOTYPES, name
        self._raises[name] = error

    def break_device(self, status: int = 700) -> None:
        """Let every further call that needs the device fail, as after an illegal access."""
        self.broken = status

    def count(self, name: str) -> int:
        """How often ``name`` was called with success."""
        return sum(call.name == name and not call.status for call in self.calls)

    @property
    def names(self) -> list[str]:
        """Names of all calls in order."""
        return [call.name for call in self.calls]

    @property
    def held(self) -> list[str]:
        """What was made and not freed."""
        alive = [f"{m.size} bytes at {m.base or m.host:#x}" for m in self._memory if not m.freed]
        return alive + [type(thing).__name__ for thing in self._objects.values()]

    @property
    def used(self) -> int:
        """Bytes of device memory in use."""
        return sum(m.size for m in self._memory if not m.freed and (m.base or self.personality.integrated))

    def verify(self) -> None:
        """AssertionError with every violation and leak so far."""
        told = [*self.violations, *(f"leak: {thing}" for thing in self.held)]
        assert not told, "\n".join(told)

    # -- for fakes of other libraries -----------------------------------------------------------

    def view(self, pointer: int, nbytes: int | None = None) -> np.ndarray:
        """The bytes at an address of the device, to the end of the allocation by default."""
        with self._lock:
            memory, start = self._find(pointer, host=False)
            stop = memory.size if nbytes is None else start + nbytes
            assert stop <= memory.size, f"{nbytes} bytes at {pointer:#x} reach beyond the allocation"
            return memory.data[start:stop]

    @property
    def capturing_here(self) -> bool:
        """Whether this thread is capturing."""
        return self._capture_here() is not None

    def enqueue(
        self,
        stream: int,
        label: str,
        run: Callable[[], None],
        *,
        reads: Iterable[tuple[int, int]] = (),
        writes: Iterable[tuple[int, int]] = (),
    ) -> int:
        """Queue work on a stream: ``run`` moves the bytes later; (address, bytes) of what it reads and writes. A status."""
        with self._lock:
            target = self._objects.get(stream)
            if self.broken or not isinstance(target, Stream):
                return self.broken or INVALID_HANDLE
            work = Work(
                label,
                run,
                [self._range(pointer, size, False, label) for pointer, size in reads],
                [self._range(pointer, size, False, label) for pointer, size in writes],
            )
            self._queue(target, work)
            return 0

    # -- the runtime ----------------------------------------------------------------------------

    def __call__(self, name: str, *inputs: Any) -> tuple[Any, ...]:
        prototype = PROTOTYPES[name]
        kinds = [kind for kind in prototype.parameters if kind[0] not in ">="]
        assert len(kinds) == len(inputs), f"{name} takes {kinds}, got {inputs}"
        for kind, value in zip(kinds, inputs, strict=True):
            assert type(value) is int and value >= 0, f"{name}: {kind} got {value!r}"
        with self._lock:
            result = self._make(name, inputs)
            if name != "cuCtxSetCurrent":
                self.calls.append(Call(name, inputs, result[0], threading.get_ident()))
            if result[0] and name.startswith("cuda") and name != "cudaGetLastError":
                self._last = result[0]
            written = [kind for kind in prototype.parameters if kind[0] in ">=*"]
            assert result[0] or len(result) == 1 + len(written), f"{name} gave {result}"
            return result

    def _make(self, name: str, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in self._raises:
            raise self._raises[name]
        planned = self._plan.get(name)
        if planned and (status := planned.popleft()):
            return (status,)
        if (status := dict(self.personality.statuses).get(name, 0)) != 0:
            return (status,)
        if not _FREE.match(name):
            if self.broken:
                return (self.broken,)
            if not self._device.get(threading.get_ident()):
                self.violations.append(f"{name} in a thread without a context")
                return (NO_CONTEXT,)
            self._beside_recording(name, inputs)
            capture = self._capture_here()
            if capture is not None and _UNSAFE.match(name):
                capture.valid = False
                return (UNSUPPORTED_IN_CAPTURE,)
        result = getattr(self, f"_{name}")(*inputs)
        return result if isinstance(result, tuple) else (result,)

    @contextlib.contextmanager
    def recording(self, stream: int) -> Iterator[None]:
        """While a library captures a stream in the global mode, in this thread."""
        with self._lock:
            self._recorded = (threading.get_ident(), stream)
        try:
            yield
        finally:
            with self._lock:
                self._recorded = None

    def _beside_recording(self, name: str, inputs: tuple[Any, ...]) -> None:
        if self._recorded is None or self._recorded[0] == (thread := threading.get_ident()):
            return
        asks = re.match(r"cuda(Stream(Query|Synchronize)|EventRecord|DeviceSynchronize)$", name)
        if asks and (not inputs or inputs[-1] == self._recorded[1]):
            self.violations.append(f"{name} spoils what another thread captures in that stream")
        elif _UNSAFE.match(name) and not self._modes.get(thread):
            self.violations.append(f"{name} while another thread captures in the global mode")

    def _cudaThreadExchangeStreamCaptureMode(self, mode: int) -> Any:
        before = self._modes.get(threading.get_ident(), 0)
        self._modes[threading.get_ident()] = mode
        return 0, before

    # devices

    def _cudaGetDeviceCount(self) -> Any:
        return 0, self.personality.devices

    def _cudaSetDevice(self, device: int) -> int:
        self._device[threading.get_ident()] = device + 1
        return 0

    def _cuCtxGetCurrent(self) -> Any:
        return 0, 0xC0DE00 + self._device.get(threading.get_ident(), 0)

    def _cuCtxSetCurrent(self, context: int) -> int:
        if not 0xC0DE00 < context <= 0xC0DE00 + self.personality.devices:
            return NO_CONTEXT
        self._device[threading.get_ident()] = context - 0xC0DE00
        return 0

    def _cudaDriverGetVersion(self) -> Any:
        return 0, self.personality.driver

    def _cudaRuntimeGetVersion(self) -> Any:
        return 0, self.personality.runtime

    def _cuDeviceGetName(self, length: int, device: int) -> Any:
        return 0, self.personality.name.encode()[: length - 1]

    def _cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:
        mine = self.personality
        known = {18: int(mine.integrated), 75: mine.compute_capability[0]}
        known[76] = mine.compute_capability[1]
        return (0, known[attribute]) if attribute in known else (INVALID_VALUE,)

    def _cudaMemGetInfo(self) -> Any:
        return 0, self.personality.memory - self.used, self.personality.memory

    def _cudaGetLastError(self) -> int:
        last, self._last = self._last, 0
        return last

    def _cudaGetErrorName(self, status: int) -> Any:
        return 0, _NAMES.get(status, f"cudaError{status}").encode()

    def _cudaGetErrorString(self, status: int) -> Any:
        return 0, f"words of {status}".encode()

    # memory

    def _find(self, pointer: int, *, host: bool) -> tuple[Memory, int]:
        for memory in reversed(self._memory):
            base = memory.host if host else memory.base
            if base and base <= pointer < base + memory.size:
                return memory, pointer - base
        raise AssertionError(f"{pointer:#x} is no address of this {'host' if host else 'device'}")

    def _range(self, pointer: int, size: int, host: bool, label: str) -> tuple[Memory, int, int]:
        memory, start = self._find(pointer, host=host)
        if memory.freed:
            self.violations.append(f"use after free: {label} at {pointer:#x}")
        if start + size > memory.size:
            self.violations.append(
                f"out of bounds: {label}, {size} bytes at {pointer:#x} of {memory.size - start}"
            )
        return memory, start, min(start + size, memory.size)

    def _take(self, size: int) -> int:
        address = self._next
        self._next += (-(-size // 4096) + 1) * 4096  # with a gap behind
        return address

    def _cudaMalloc(self, size: int) -> Any:
        if size + self.used > self.personality.memory:
            return (2,)
        memory = Memory(size, np.full(size, GARBAGE, np.uint8), self._take(size), 0)
        self._memory.append(memory)
        return 0, memory.base

    def _cudaHostAlloc(self, size: int, flags: int) -> Any:
        if self.personality.integrated and size + self.used > self.personality.memory:
            return (2,)
        data = np.full(size, GARBAGE, np.uint8)
        mapped = flags & 2
        memory = Memory(size, data, self._take(size) if mapped else 0, data.ctypes.data, flags)
        self._memory.append(memory)
        return 0, memory.host

    def _cudaHostGetDevicePointer(self, address: int, flags: int) -> Any:
        memory, start = self._find(address, host=True)
        return (0, memory.base + start) if memory.base else (INVALID_VALUE,)

    def _cudaFree(self, pointer: int) -> int:
        return self._release(pointer, host=False) if pointer else 0

    def _cudaFreeHost(self, pointer: int) -> int:
        return self._release(pointer, host=True)

    def _release(self, pointer: int, *, host: bool) -> int:
        memory, start = self._find(pointer, host=host)
        if memory.freed or start or bool(memory.host) != host:
            self.violations.append(f"freed twice, or not what was allocated: {pointer:#x}")
            return INVALID_VALUE
        if any(self._touches(work, memory) for work in self._pending()):
            self.violations.append(f"freed under queued work: {memory.size} bytes at {pointer:#x}")
        memory.freed = True
        memory.data[:] = FREED  # kept, so that a view that was left behind reads this and not what comes next
        return 0

    def _pending(self) -> list[Work]:
        return [item for stream in self._streams for item in stream.queue if isinstance(item, Work)]

    @staticmethod
    def _touches(work: Work, memory: Memory) -> bool:
        return any(part[0] is memory for part in (*work.reads, *work.writes))

    # copies

    def _cudaMemcpyAsync(self, to: int, start: int, size: int, kind: int, stream: int) -> int:
        target = self._objects.get(stream)
        if not isinstance(target, Stream):
            return INVALID_HANDLE
        label = f"copy of {size} bytes, kind {kind}"
        on_host = {1: (False, True), 2: (True, False), 3: (False, False)}[kind]
        ends = []
        for pointer, host in zip((to, start), on_host, strict=True):
            try:
                ends.append(self._range(pointer, size, host, label))
            except AssertionError:
                if not host:
                    self.violations.append(f"not on the device: {label} at {pointer:#x}")
                    return INVALID_VALUE
                raw = (ctypes.c_uint8 * size).from_address(pointer)  # pageable memory
                ends.append((Memory(size, np.frombuffer(raw, np.uint8), 0, 0), 0, size))
        pageable = [host and end[0].host == 0 for end, host in zip(ends, on_host, strict=True)]
        if any(pageable) and target.capture is not None:
            target.capture.valid = False
            return UNSUPPORTED_IN_CAPTURE
        if pageable[1]:  # staged before the call returns
            memory, first, last = ends[1]
            ends[1] = (Memory(size, memory.data[first:last].copy(), 0, 0), 0, last - first)

        def run() -> None:
            (sink, sink_start, sink_stop), (source, source_start, source_stop) = ends
            sink.data[sink_start:sink_stop] = source.data[source_start:source_stop]

        self._queue(target, Work(label, run, [ends[1]], [ends[0]], fills=True))
        if pageable[0]:  # returns when it is done
            self._finish(target)
            self._known(target)
        return 0

    def _cudaMemsetAsync(self, pointer: int, value: int, size: int, stream: int) -> int:
        part = self._range(pointer, size, False, "fill")

        def run() -> None:
            part[0].data[part[1] : part[2]] = value

        self._queue(self._objects[stream], Work("fill", run, [], [part], fills=True))
        return 0

    # streams and events

    def _new(self, thing: Any) -> tuple[int, int]:
        self._handle += 16
        self._objects[self._handle] = thing
        return 0, self._handle

    def _drop(self, handle: int, kind: type) -> int:
        if not isinstance(self._objects.get(handle), kind):
            self.violations.append(f"destroyed twice, or never made: {kind.__name__} {handle:#x}")
            return INVALID_HANDLE
        del self._objects[handle]
        return 0

    def _cudaStreamCreateWithFlags(self, flags: int) -> Any:
        if flags != 1:
            self.violations.append("a stream that waits for the default stream")
        stream = Stream(0)
        self._streams.append(stream)
        _, stream.handle = self._new(stream)
        return 0, stream.handle

    def _cudaStreamDestroy(self, handle: int) -> int:
        return self._drop(handle, Stream)

    def _capture_here(self) -> Capture | None:
        for thing in self._objects.values():
            if isinstance(thing, Stream) and thing.capture and thing.capture.thread == threading.get_ident():
                return thing.capture
        return None

    def _queue(self, stream: Stream, work: Work) -> None:
        if stream.capture is not None:
            stream.capture.work.append(work)
            if stream is not stream.capture.origin:
                stream.capture.unjoined.add(stream.handle)
            return
        _merge(stream.clock, self._host)
        stream.tick += 1
        for parts, writes in ((work.reads, False), (work.writes, True)):
            for memory, start, stop in parts:
                self._check_race(stream, work, memory, start, stop, writes)
        for memory, start, stop in work.reads:
            if memory.host and not memory.pending_writes:
                work.sums.append((memory, start, stop, zlib.crc32(memory.data[start:stop])))
        for memory, start, stop in work.writes:
            if memory.host and work.fills:
                if any(self._touches(other, memory) for other in self._pending()):
                    self._finish(stream)
                memory.data[start:stop] = POISON
                work.poisoned.append((memory, start, stop))
            memory.pending_writes += 1
        stream.queue.append(work)

    def _check_race(
        self, stream: Stream, work: Work, memory: Memory, start: int, stop: int, writes: bool
    ) -> None:
        kept = []
        for access in memory.accesses:
            first, last, other, tick, wrote = access
            if tick <= self._host.get(other, 0):
                continue  # long done
            kept.append(access)
            ordered = other == stream.handle or tick <= stream.clock.get(other, 0)
            if not ordered and (writes or wrote) and first < stop and start < last:
                self.violations.append(
                    f"race: {work.label} on stream {stream.handle:#x} {'writes' if writes else 'reads'} bytes {start} to "
                    f"{stop} that unfinished work on stream {other:#x} {'writes' if wrote else 'reads'}"
                )
        memory.accesses = [*kept, (start, stop, stream.handle, stream.tick, writes)]

    def _step(self, stream: Stream) -> None:
        """Run the oldest piece of a stream's work, and before it what it waits for."""
        item = stream.queue.popleft()
        if isinstance(item, Mark):
            if item.waits:
                while item.event.reached < item.version:
                    self._step(item.stream)
            else:
                item.event.reached = max(item.event.reached, item.version)
                item.event.time_ms = self._clock_ms
            return
        for memory, start, stop, total in item.sums:
            if zlib.crc32(memory.data[start:stop]) != total:
                self.violations.append(f"host memory was written while work was to read it: {item.label}")
        for memory, start, stop in item.poisoned:
            if (memory.data[start:stop] != POISON).any():
                self.violations.append(f"host memory was written while work was to fill it: {item.label}")
        for memory, _, _ in (*item.reads, *item.writes):
            if memory.freed:
                self.violations.append(f"use after free: {item.label} ran later")
        for memory, _, _ in item.writes:
            memory.pending_writes -= 1
        self._clock_ms += 0.25
        item.run()

    def _finish(self, stream: Stream) -> None:
        while stream.queue:
            self._step(stream)

    def _known(self, stream: Stream) -> None:
        """The host knows everything queued on the stream to be done."""
        _merge(self._host, stream.clock)
        self._host[stream.handle] = max(self._host.get(stream.handle, 0), stream.tick)

    def _cudaDeviceSynchronize(self) -> int:
        for stream in self._streams:
            self._finish(stream)
            self._known(stream)
        return self.broken

    def _cudaStreamSynchronize(self, handle: int) -> int:
        stream = self._objects.get(handle)
        if not isinstance(stream, Stream):
            return INVALID_HANDLE
        if stream.capture is not None:
            stream.capture.valid = False
            return UNSUPPORTED_IN_CAPTURE
        self._finish(stream)
        self._known(stream)
        return self.broken

    def _cudaStreamQuery(self, handle: int) -> int:
        stream = self._objects.get(handle)
        if not isinstance(stream, Stream):
            return INVALID_HANDLE
        if stream.capture is not None:
            stream.capture.valid = False
            return UNSUPPORTED_IN_CAPTURE
        if stream.queue:
            self._step(stream)  # time passes while it is asked
            return NOT_READY
        self._known(stream)
        return 0

    def _cudaStreamWaitEvent(self, handle: int, event_handle: int, flags: int) -> int:
        stream, event = self._objects.get(handle), self._objects.get(event_handle)
        if not isinstance(stream, Stream) or not isinstance(event, Event):
            return INVALID_HANDLE
        if event.capture is not None:
            if stream.capture is None:
                stream.capture = event.capture
                event.capture.streams.append(stream)
            elif stream is event.capture.origin and event.stream is not None:
                event.capture.unjoined.discard(event.stream.handle)
            return 0
        if stream.capture is not None:
            stream.capture.valid = False
            return ISOLATION
        if event.stream is not None:
            _merge(stream.clock, event.clock)
            stream.queue.append(Mark(event, event.version, event.stream, True))
        return 0

    def _cudaEventCreateWithFlags(self, flags: int) -> Any:
        return self._new(Event(flags))

    def _cudaEventDestroy(self, handle: int) -> int:
        return self._drop(handle, Event)

    def _cudaEventRecord(self, event_handle: int, handle: int) -> int:
        stream, event = self._objects.get(handle), self._objects.get(event_handle)
        if not isinstance(stream, Stream) or not isinstance(event, Event):
            return INVALID_HANDLE
        event.capture, event.stream = stream.capture, stream
        if stream.capture is None:
            event.version += 1
            event.clock = {**_merged(stream.clock, self._host), stream.handle: stream.tick}
            stream.queue.append(Mark(event, event.version, stream, False))
        return 0

    def _cudaEventQuery(self, handle: int) -> int:
        event = self._objects.get(handle)
        if not isinstance(event, Event):
            return INVALID_HANDLE
        if event.capture is not None:
            event.capture.valid = False
            return UNSUPPORTED_IN_CAPTURE
        if event.reached < event.version and event.stream is not None:
            self._step(event.stream)
            return NOT_READY
        _merge(self._host, event.clock)
        return 0

    def _cudaEventSynchronize(self, handle: int) -> int:
        event = self._objects.get(handle)
        if not isinstance(event, Event):
            return INVALID_HANDLE
        if event.capture is not None:
            event.capture.valid = False
            return UNSUPPORTED_IN_CAPTURE
        while event.reached < event.version and event.stream is not None:
            self._step(event.stream)
        _merge(self._host, event.clock)
        return self.broken

    def _cudaEventElapsedTime(self, start: int, end: int) -> Any:
        events = [self._objects.get(start), self._objects.get(end)]
        if not all(isinstance(event, Event) and not event.flags & 2 and event.version for event in events):
            return (INVALID_HANDLE,)
        if any(event.reached < event.version for event in events):
            return (NOT_READY,)
        return 0, events[1].time_ms - events[0].time_ms

    # graphs

    def _cudaStreamBeginCapture(self, handle: int, mode: int) -> int:
        stream = self._objects.get(handle)
        if not isinstance(stream, Stream):
            return INVALID_HANDLE
        if stream.capture is not None:
            return ILLEGAL_STATE
        if mode != 1:
            self.violations.append("a capture that other threads can spoil")
        stream.capture = Capture(threading.get_ident(), stream, [stream])
        return 0

    def _cudaStreamEndCapture(self, handle: int) -> Any:
        stream = self._objects.get(handle)
        if not isinstance(stream, Stream) or stream.capture is None:
            return (ILLEGAL_STATE,)
        capture = stream.capture
        if capture.thread != threading.get_ident():
            return (WRONG_THREAD,)
        for member in capture.streams:
            member.capture = None
        if not capture.valid:
            return (CAPTURE_INVALID,)
        return (UNJOINED,) if capture.unjoined else self._new(capture)

    def _cudaGraphInstantiateWithFlags(self, graph: int, flags: int) -> Any:
        capture = self._objects.get(graph)
        if not isinstance(capture, Capture):
            return (INVALID_HANDLE,)
        return self._new(capture.work)

    def _cudaGraphDestroy(self, handle: int) -> int:
        return self._drop(handle, Capture)

    def _cudaGraphExecDestroy(self, handle: int) -> int:
        return self._drop(handle, list)

    def _cudaGraphLaunch(self, handle: int, stream_handle: int) -> int:
        graph, stream = self._objects.get(handle), self._objects.get(stream_handle)
        if not isinstance(graph, list) or not isinstance(stream, Stream):
            return INVALID_HANDLE
        for work in graph:
            for memory, _, _ in (*work.reads, *work.writes):
                if memory.freed:
                    self.violations.append(f"use after free: graph with {work.label}")
            self._queue(stream, replace(work, sums=[], poisoned=[]))
        return 0


def _merge(into: dict[int, int], other: dict[int, int]) -> None:
    for stream, tick in other.items():
        into[stream] = max(into.get(stream, 0), tick)


def _merged(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    result = dict(one)
    _merge(result, other)
    return result
