"""Network calls of many streams on one device: laid together where they fit, in fair turns, by few threads.

Every stream runs its own code (decoding, tracking, composing) in threads of its own. Only calls of networks meet here: a
:class:`DeviceWorker` wraps each :class:`~lp_edge.engines.runner.Runner`, and ``infer`` of the wrapped runner hands the call
over, waits and returns the result. Whoever calls runners sees no difference::

    thread of stream 1 ── infer ─┐                               ┌─ its rows
    thread of stream 2 ── infer ─┼─ line ── one batch ── network ┼─ its rows
    thread of stream 3 ── infer ─┘                               └─ its rows

**Which calls become one batch.** Calls of the same runner for the same outputs whose inputs fit by the names that the graph
gives to first axes:

* the axis that all outputs begin with (``batch``, ``N``): concatenated; sizes of all other axes must be equal;
* another named axis (``sources``) is 1 for all rows of a call, or one for each row, as :mod:`lp_edge.export` builds its
  graphs. The same array with one row in all calls is passed as it is, else each is repeated to its rows and they are
  concatenated: so calls for different portraits, whose features stay on the device, are one batch;
* anything else (a fixed size, no axis): the same object in all calls, passed once.

A network with an output that does not begin with that axis, or that has an axis which no input has, takes each call alone.
Arrays on a device are concatenated there by a runner that is ``resident``. Of any other runner a call with such an array runs
alone, unless that array is the same object in all calls and passed once.

**Results that stay on the device** (``keep=True``) are handed out as soon as their work is queued there, so that a stream can
queue what follows. Of a merged call each stream gets a copy of its rows, made on the device: that costs microseconds, while a
view would keep the whole batch alive as long as the longest of the streams keeps its part (the features of a portrait: hours).
A network has at most two such batches on the device, and the second is only begun when it is full or nobody could join:
what is queued early would run as a small batch, when it has to wait for the one before in any case.

**Order.** Calls of different streams are served in the order in which they came. A call of a stream that has had its turn
counts as having come when the stream's previous one ended, so a stream that floods stands in line like one that waits for
each answer. The call whose turn it is picks the network; then fitting calls of the other streams join, one of each, then more
of each while there is room. With several threads a batch takes no more than its thread's share of all calls.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from types import TracebackType
from typing import Final, Protocol

import numpy as np

from lp_edge.engines.device import DeviceArray, rows
from lp_edge.engines.runner import Array, Runner, TensorSpec, WrappedRunner, to_host
from lp_edge.errors import ConfigError, EngineError, Interrupted, LpEdgeError

__all__ = ["BatchConfig", "BatchObserver", "CallScope", "DeviceWorker"]

_LOG = logging.getLogger("lp_edge")

_AHEAD: Final = 2  # batches of one network on the device: one that runs and one behind it


@dataclass(frozen=True)
class BatchConfig:
    """How calls are laid together.

    Attributes:
        max_batch: most rows of one merged call, 1 to 64; 1 = never merge. A call that has more on its own runs alone.
        max_wait_s: seconds, 0 to 1, that the oldest call of a batch that is not full may wait for others while a scope that
            has no call waiting is active; 0 = take what is there.
        threads: batches that may run at once, 1 to 64: 1 for a GPU.

    Raises:
        ConfigError: a value is out of range.
    """

    max_batch: int = 8
    max_wait_s: float = 0.0
    threads: int = 1

    def __post_init__(self) -> None:
        for name, value in (("max_batch", self.max_batch), ("threads", self.threads)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
                raise ConfigError(
                    f"{name} is {value!r}", "expected an integer from 1 to 64", f"correct {name}"
                )
        if isinstance(self.max_wait_s, bool) or not 0.0 <= self.max_wait_s <= 1.0:
            raise ConfigError(
                f"max_wait_s is {self.max_wait_s!r}", "expected 0 to 1 s", "choose a few milliseconds, or 0"
            )


class BatchObserver(Protocol):
    """Hears of every batch, for metrics."""

    def batch(self, network: str, size: int, rows: int, waited_s: float, ran_s: float) -> None:
        """A batch has ended, well or not; called in a thread of the worker after its results were handed out.

        Args:
            network: the runner's name.
            size: number of calls, 1 or more.
            rows: rows of all calls; 1 for a call of a network without a batch axis.
            waited_s: how long the oldest of the calls waited for its start, in seconds.
            ran_s: how long the batch ran, in seconds; with results that stay on the device, until they were written.
        """


class CallScope:
    """Work of one stream that is cancelled as one, for example a frame.

    Args:
        stream: what takes turns; scopes with an equal one share a turn.

    Example:
        >>> scope = CallScope("stream 7")
        >>> with worker.scope(scope):                                     # doctest: +SKIP
        ...     live.step(rgb, seconds)
    """

    def __init__(self, stream: Hashable) -> None:
        self.stream = stream
        self._lock = threading.Lock()
        self._workers: list[DeviceWorker] = []
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Stop the scope's calls, from any thread; may be called more than once.

        Calls that wait fail at once with :class:`~lp_edge.errors.Interrupted`, and so do later ones. A call that runs fails when
        its batch has ended, because the network reads the caller's arrays until then.
        """
        with self._lock:
            self._cancelled = True
            workers = list(self._workers)
        for worker in workers:
            worker._cancel(self)

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"work of stream {self.stream} was cancelled")


@dataclass(eq=False)
class _Call:
    """A call on its way.

    ``key`` is equal for calls that fit together, None for one that runs alone. ``result`` of a merged call are views of
    the batch's arrays (``part``).
    """

    runner: _BatchingRunner
    feeds: Mapping[str, Array]
    outputs: tuple[str, ...]
    keep: bool
    rows: int
    key: Hashable | None
    scope: CallScope | None
    stream: Hashable
    came: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    result: dict[str, Array] | None = None
    part: bool = False
    error: Exception | None = None

    @property
    def cancelled(self) -> bool:
        return self.scope is not None and self.scope.cancelled


@dataclass(frozen=True)
class _Flight:
    """A batch that runs on the device: ``array`` is one of its results, ``note`` what the observer is told but how long it ran."""

    runner: _BatchingRunner
    array: DeviceArray
    note: tuple[int, int, float]
    started: float


@dataclass
class _Stream:
    """Calls of one stream; exists only while there are any."""

    waiting: deque[_Call] = field(default_factory=deque)
    running: int = 0
    ended: float = 0.0  # when its latest batch did

    def turn(self) -> tuple[float, float]:
        """Place in the line: when its oldest call came, or would have, had it waited for the one before."""
        came = self.waiting[0].came
        return (math.inf if self.running else max(came, self.ended), came)


@dataclass(frozen=True)
class _Layout:
    """How a network's inputs are merged: names by the kind of their first axis.

    Attributes:
        batch: concatenated.
        spread: by axis; one row for all rows of a call, or one for each.
        common: the same object for all calls.
    """

    batch: tuple[str, ...]
    spread: tuple[tuple[str, ...], ...]
    common: tuple[str, ...]

    @classmethod
    def of(cls, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> _Layout | None:
        """The layout of a network, None when its calls cannot be merged."""
        inputs, outputs = tuple(inputs), tuple(outputs)
        firsts = {spec.shape[0] if spec.shape else 1 for spec in outputs}
        axis = firsts.pop() if len(firsts) == 1 else 1
        if not isinstance(axis, str) or axis.startswith("?"):
            return None
        kinds: dict[str, list[str]] = {axis: []}
        common = []
        for spec in inputs:
            first = spec.shape[0] if spec.shape else 1
            if isinstance(first, str) and not first.startswith("?"):
                kinds.setdefault(first, []).append(spec.name)
            else:
                common.append(spec.name)
        batch = tuple(kinds.pop(axis))
        sizes = {name for name in _axes(inputs) if not name.startswith("?")}
        made = _axes(outputs)
        # A size that depends on the number of rows would be another one in a batch, and one that no input gives may depend on
        # the content of all rows (as the number of faces found does).
        if not batch or (sizes | made) & {axis, *kinds} or not made <= sizes:
            return None
        return cls(batch, tuple(tuple(names) for names in kinds.values()), tuple(common))

    def key(self, feeds: Mapping[str, Array], rows: int, resident: bool) -> tuple[object, ...] | None:
        """Equal for calls that fit together; None for one that fits none. Valid while the feeds are held.

        ``resident``: arrays on a device can be concatenated.
        """
        parts: list[object] = [id(feeds[name]) for name in self.common]
        for name in self.batch:
            if not resident and not isinstance(feeds[name], np.ndarray):
                return None
            parts.append(feeds[name].shape[1:])
        for names in self.spread:
            arrays = [feeds[name] for name in names]
            size = arrays[0].shape[0]
            if size in (1, rows) and (resident or all(isinstance(array, np.ndarray) for array in arrays)):
                parts.extend(array.shape[1:] for array in arrays)
            elif size == 1:
                parts.extend(id(array) for array in arrays)
            else:
                return None
        return tuple(parts)

    def merge(self, calls: Sequence[_Call], runner: Runner) -> dict[str, Array]:
        """Feeds of calls with equal keys."""
        first = calls[0].feeds
        feeds: dict[str, Array] = {name: first[name] for name in self.common}
        for name in self.batch:
            feeds[name] = _joined([call.feeds[name] for call in calls], runner)
        for names in self.spread:
            if first[names[0]].shape[0] == 1 and all(
                call.feeds[n] is first[n] for call in calls for n in names
            ):
                feeds.update((name, first[name]) for name in names)
                continue
            for name in names:
                repeated = [[call.feeds[name]] * (call.rows // call.feeds[name].shape[0]) for call in calls]
                feeds[name] = _joined([array for arrays in repeated for array in arrays], runner)
        return feeds


def _joined(arrays: Sequence[Array], runner: Runner) -> Array:
    """Arrays laid together where they are; ``runner`` does so on a device."""
    host = [array for array in arrays if isinstance(array, np.ndarray)]
    return np.concatenate(host) if len(host) == len(arrays) else runner.concatenate(arrays)


def _own(array: Array) -> Array:
    """A copy, where the array is."""
    return array.copy() if isinstance(array, DeviceArray) else np.array(array)


def _axes(specs: Iterable[TensorSpec]) -> set[str]:
    """Names in all axes but the first; a size may be a formula, as ``H*W//1024``."""
    return {
        name
        for spec in specs
        for size in spec.shape[1:]
        for name in re.findall(r"\?\w*|[^\W\d]\w*", str(size))
    }


class _BatchingRunner(WrappedRunner):
    """A runner whose calls a worker makes.

    Results are the caller's own, also where the inner runner lends: rows of a merged batch are copied out of it by the
    thread that asked for them, on the host or on the device. Views would save that (0.1 ms on the host for a picture of
    512 px), but the features of one portrait, kept for hours, would keep the features of the whole batch.
    """

    def __init__(self, inner: Runner, worker: DeviceWorker) -> None:
        super().__init__(inner)
        self._worker = worker
        self._layout = _Layout.of(inner.inputs.values(), inner.outputs.values())
        self.running = 0  # batches that threads of the worker run; under its lock, as the next
        self.flying = 0  # those that a device still runs

    @property
    def loans(self) -> bool:
        return False

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self._handed_over(feeds, outputs, False)

    def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self._handed_over(feeds, outputs, True)

    def _handed_over(
        self, feeds: Mapping[str, Array], outputs: tuple[str, ...], keep: bool
    ) -> dict[str, Array]:
        size, key = 1, None
        if self._layout is not None:
            size = feeds[self._layout.batch[0]].shape[0]
            key = self._layout.key(feeds, size, self.resident)
        call = self._worker._submit(
            self, feeds, outputs, keep, size, None if key is None else (self, outputs, keep, *key)
        )
        if call.cancelled and call.scope is not None:
            raise call.scope._interrupted()
        if call.error is not None:
            error, call.error = call.error, None
            try:
                raise error
            finally:
                del error  # else its traceback would hold this frame, and this frame would hold it
        results = call.result or {}
        return {name: _own(array) for name, array in results.items()} if call.part else results

    def _close(self) -> None:
        self._worker._release(self)
        super()._close()

    # -- in a thread of the worker ----------------------------------------------------------------

    def run(self, calls: Sequence[_Call]) -> None:
        """Give each call its result or its error."""
        if len(calls) > 1 and self._layout is not None:
            try:
                self._run_merged(calls, self._layout)
            except BaseException as error:  # noqa: BLE001 - whose fault it is shows below
                _LOG.warning("a batch of %d calls failed, they run one by one: %s", len(calls), error)
            else:
                return
        for call in calls:
            if not call.cancelled:
                self._run_one(call)

    def _run_merged(self, calls: Sequence[_Call], layout: _Layout) -> None:
        results = self.inner.infer(layout.merge(calls, self.inner), calls[0].outputs, keep=calls[0].keep)
        total = sum(call.rows for call in calls)
        for name, array in results.items():
            if array.shape[0] != total:
                raise EngineError(
                    f"{self.name}: output {name} has shape {list(array.shape)} for {total} rows",
                    f"expected {self.outputs[name]}",
                    "export the network again",
                )
        if not calls[0].keep:
            results = {n: np.array(a) if self.inner.loans else to_host(a) for n, a in results.items()}
        start = 0
        for call in calls:
            call.result = {name: rows(array, start, start + call.rows) for name, array in results.items()}
            call.part = True
            start += call.rows

    def _run_one(self, call: _Call) -> None:
        try:
            results = self.inner.infer(call.feeds, call.outputs, keep=call.keep)
            call.result = {n: np.array(a) for n, a in results.items()} if self.inner.loans else results
        except Exception as error:  # noqa: BLE001 - carried to the caller
            call.error = error
        except BaseException as error:  # noqa: BLE001 - would end the thread that serves everybody
            call.error = _died(self.name, error)


class DeviceWorker:
    """The threads that run the networks of one device; a context manager.

    Args:
        config: sizes of batches and number of threads.
        name: names the threads and is in messages.
        observer: hears of every batch.

    Raises:
        EngineError: the threads cannot be started.

    Example:
        >>> with DeviceWorker(BatchConfig(max_batch=4)) as worker:         # doctest: +SKIP
        ...     runner = worker.wrap(open_bundle().runner("face_mesh"))
        ...     with worker.scope(CallScope("stream 1")):
        ...         runner.infer({"image": crops})
    """

    def __init__(
        self, config: BatchConfig, name: str = "device", observer: BatchObserver | None = None
    ) -> None:
        self.config, self.name = config, name
        self._observer = observer
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # threads of the worker wait for calls
        self._ended = threading.Condition(self._lock)  # who closes a runner waits for its batches
        self._streams: dict[Hashable, _Stream] = {}
        self._scopes: dict[CallScope, int] = {}  # active ones, and how often entered
        self._pending = self._running = 0  # calls
        self._closed = False
        self._wrapped: weakref.WeakSet[Runner] = weakref.WeakSet()
        self._here = threading.local()  # .scope: of this thread
        self._threads: list[threading.Thread] = []
        self._flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()  # two of a runner at most
        self._lander: threading.Thread | None = None  # waits for them; there once a runner is resident
        self._alive = config.threads
        try:
            for index in range(config.threads):
                thread = threading.Thread(target=self._serve, name=f"lp-edge {name} {index}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise EngineError(
                f"{name}: {len(self._threads)} of {config.threads} threads could be started ({error})",
                "expected all of them",
                "ask for fewer, or raise the limit of threads",
            ) from error

    @property
    def pending(self) -> int:
        """Calls that wait; those of running batches do not count."""
        return self._pending

    @property
    def closed(self) -> bool:
        """Whether the worker takes no more calls."""
        return self._closed

    def wrap(self, runner: Runner) -> Runner:
        """A runner whose calls this worker makes; closing it closes ``runner`` when its batches have ended.

        Its tensors, backend, device and what it keeps there are those of ``runner``. ``loans`` is always False: what ``runner`` lends is copied, to
        the host, before its next call, and such a runner never runs in two threads at once.

        Raises:
            EngineError: ``runner`` is wrapped already.
        """
        with self._lock:
            if isinstance(runner, _BatchingRunner) or runner in self._wrapped:
                raise EngineError(
                    f"{runner.name}: wrapped already",
                    "expected a runner of a backend",
                    "wrap each runner once",
                )
            if runner.resident and self._lander is None and not self._closed:
                name = f"lp-edge {self.name} landing"
                self._lander = threading.Thread(target=self._land, name=name, daemon=True)
                self._lander.start()
            self._wrapped.add(runner)
        return _BatchingRunner(runner, self)

    @contextlib.contextmanager
    def scope(self, call: CallScope) -> Iterator[CallScope]:
        """Calls that this thread makes inside belong to ``call``; an inner scope takes the place of an outer one.

        A thread outside of any scope is a stream of its own. Threads started inside do not inherit the scope.
        """
        outer = getattr(self._here, "scope", None)
        with call._lock:
            call._workers.append(self)
        with self._lock:
            self._scopes[call] = self._scopes.get(call, 0) + 1
        self._here.scope = call
        try:
            yield call
        finally:
            self._here.scope = outer
            with call._lock:
                call._workers.remove(self)
            with self._lock:
                self._scopes[call] -= 1
                if not self._scopes[call]:
                    del self._scopes[call]
                self._work.notify()  # a batch may have waited for this scope

    def close(self) -> None:
        """Stop: waiting calls fail, running batches end, threads end. May be called more than once."""
        self._stop()
        for thread in (*self._threads, self._lander):
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> DeviceWorker:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- threads that call -------------------------------------------------------------------------

    def _submit(
        self,
        runner: _BatchingRunner,
        feeds: Mapping[str, Array],
        outputs: tuple[str, ...],
        keep: bool,
        size: int,
        key: Hashable | None,
    ) -> _Call:
        """Stand in line and wait until the call has its result, its error or is cancelled."""
        scope: CallScope | None = getattr(self._here, "scope", None)
        # Idents of threads are integers, which streams may be as well.
        stream = ("thread", threading.get_ident()) if scope is None else ("stream", scope.stream)
        call = _Call(runner, feeds, outputs, keep, size, key, scope, stream)
        with self._lock:
            if self._closed:
                raise self._shut()
            if call.cancelled:
                return call
            call.came = time.monotonic()
            self._streams.setdefault(stream, _Stream()).waiting.append(call)
            self._pending += 1
            self._work.notify()
        try:
            call.done.wait()
        except BaseException:  # Ctrl-C in the main thread: nobody wants the result
            self._drop(lambda other: other is call, lambda: Interrupted("interrupted"))
            raise
        return call

    def _cancel(self, scope: CallScope) -> None:
        self._drop(lambda call: call.scope is scope, scope._interrupted)

    def _release(self, runner: _BatchingRunner) -> None:
        """A runner is about to close: its waiting calls fail, its batches end."""
        self._drop(
            lambda call: call.runner is runner,
            lambda: EngineError(f"{runner.name}: closed before its turn", "expected an open runner", ""),
        )
        with self._ended:
            while runner.running or runner.flying:
                self._ended.wait()

    def _stop(self) -> None:
        with self._lock:
            self._closed = True
            self._work.notify_all()
        self._drop(lambda call: True, self._shut)

    def _shut(self) -> EngineError:
        return EngineError(
            f"worker {self.name} is closed",
            "expected a running server",
            "connect again when it has restarted",
        )

    def _drop(self, which: Callable[[_Call], bool], error: Callable[[], LpEdgeError]) -> None:
        """Take calls out of the line and let each fail with an error of its own."""
        with self._lock:
            for key, stream in list(self._streams.items()):
                for call in [c for c in stream.waiting if which(c)]:
                    stream.waiting.remove(call)
                    self._pending -= 1
                    call.error = error()
                    call.done.set()
                self._forget(key)
            self._work.notify()  # a batch may have waited for what is gone

    def _forget(self, key: Hashable) -> None:
        """Under the lock: a stream without calls leaves nothing behind."""
        stream = self._streams.get(key)
        if stream is not None and not stream.waiting and not stream.running:
            del self._streams[key]

    # -- threads of the worker -----------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._serve_one():
                pass
        finally:
            with self._lock:
                self._alive -= 1
                last = not self._alive
            if last:
                self._flights.put(None)  # no more come
                self._stop()  # nobody is left to answer

    def _serve_one(self) -> bool:
        """Wait for a batch and run it; False when the worker is closed. Keeps no call after it has returned."""
        calls = self._take()
        if not calls:
            return False
        runner, size = calls[0].runner, len(calls)
        started = time.monotonic()
        note = (size, sum(call.rows for call in calls), started - min(call.came for call in calls))
        flight = None
        try:
            runner.run(calls)
            unwritten = [
                a for call in calls for a in (call.result or {}).values() if isinstance(a, DeviceArray)
            ]
            flight = _Flight(runner, unwritten[-1], note, started) if unwritten else None
            del unwritten
        finally:
            ended = time.monotonic()
            with self._lock:
                if flight is not None:
                    runner.flying += 1
                    self._flights.put(flight)
                runner.running -= 1
                self._running -= size
                for call in calls:
                    stream = self._streams[call.stream]
                    stream.running -= 1
                    stream.ended = ended
                    self._forget(call.stream)
                self._ended.notify_all()
            for call in calls:
                if call.result is None and call.error is None:
                    call.error = _died(runner.name, None)
                call.done.set()
        if flight is None:
            self._tell(runner, note, ended - started)
        return True

    def _tell(self, runner: _BatchingRunner, note: tuple[int, int, float], ran_s: float) -> None:
        if self._observer is not None:
            try:
                self._observer.batch(runner.name, *note, ran_s)
            except Exception:  # noqa: BLE001 - metrics must not end the work
                _LOG.exception("the observer of worker %s failed", self.name)

    def _land(self) -> None:
        while self._land_one():
            pass

    def _land_one(self) -> bool:
        """Wait until a batch on the device has ended; False when there are no more. Keeps no array after it has returned."""
        flight = self._flights.get()
        if flight is None:
            return False
        try:
            flight.array.synchronize()
        except Exception as error:  # noqa: BLE001 - whoever asks for the numbers is told
            _LOG.debug("%s: on the device: %s", flight.runner.name, error)
        ended = time.monotonic()
        with self._lock:
            flight.runner.flying -= 1
            self._work.notify_all()
            self._ended.notify_all()
        self._tell(flight.runner, flight.note, ended - flight.started)
        return True

    def _take(self) -> list[_Call]:
        """Wait for the next batch and take it out of the line; empty when the worker is closed."""
        with self._work:
            while not self._closed:
                calls, wait = self._next(time.monotonic())
                if not calls:
                    self._work.wait(wait)
                    continue
                for call in calls:
                    stream = self._streams[call.stream]
                    stream.waiting.remove(call)
                    stream.running += 1
                self._pending -= len(calls)
                self._running += len(calls)
                calls[0].runner.running += 1
                if self._pending:
                    self._work.notify()  # there may be another batch for another thread
                return calls
        return []

    def _next(self, now: float) -> tuple[list[_Call], float | None]:
        """The batch whose turn it is, or none and the seconds after which there is one (None = when something changes)."""
        line = sorted((s for s in self._streams.values() if s.waiting), key=_Stream.turn)
        until = math.inf
        seen = set()
        expecting: bool | None = None  # whether others may join
        for head in _in_turn([stream.waiting for stream in line]):
            if (head.runner.inner.loans and head.runner.running) or head.runner.flying >= _AHEAD:
                continue
            if head.key is None:
                return [head], None
            if head.key in seen:
                continue
            seen.add(head.key)
            calls, full = self._gather(head, line)
            if full or not (self.config.max_wait_s or head.runner.flying):
                return calls, None
            if expecting is None:
                waiting = {call.scope for stream in line for call in stream.waiting}
                expecting = any(not s.cancelled and s not in waiting for s in self._scopes)
            due = min(call.came for call in calls) + self.config.max_wait_s
            if not expecting or (due <= now and not head.runner.flying):
                return calls, None
            if due > now:
                until = min(until, due)
        return [], None if until == math.inf else until - now

    def _gather(self, head: _Call, line: Sequence[_Stream]) -> tuple[list[_Call], bool]:
        """The calls that go together with ``head``, and whether there is no room for more."""
        # Several threads share what there is: were one to take nearly all, the calls of the other would come back, and be
        # served, again and again before that batch has ended. Rounded down, so that streams do not settle into groups of
        # different size, of which the smaller is faster.
        threads = 1 if head.runner.inner.loans else self.config.threads
        share = (self._pending + self._running) // threads
        most = min(self.config.max_batch, head.runner.max_batch or self.config.max_batch)
        calls, room, full = [head], most - head.rows, False
        for call in _in_turn([[c for c in stream.waiting if c.key == head.key] for stream in line]):
            if room <= 0:
                break
            if call is head:
                continue
            if call.rows > room or len(calls) >= share:
                full = True
                continue
            calls.append(call)
            room -= call.rows
        return calls, full or room <= 0


def _in_turn(lines: Sequence[Iterable[_Call]]) -> Iterator[_Call]:
    """The first of each line, then the second of each, and so on."""
    return (call for tier in zip_longest(*lines) for call in tier if call is not None)


def _died(name: str, error: BaseException | None) -> EngineError:
    failure = EngineError(
        f"{name}: the call ended without a result" + ("" if error is None else f" ({error!r})"),
        "expected the network to run",
        "restart the server and report this",
    )
    failure.__cause__ = error
    return failure
