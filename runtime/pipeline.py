"""Threads between the stages of a stream: bounded, ordered, and gone when the work is.

Decoding, motion, rendering and encoding spend their time in native code that releases the interpreter
lock, so threads overlap them. Everything here is built from one piece, :func:`prefetch`, which runs an
iterable in a thread of its own and hands its items over through a queue of fixed length::

    source ──queue──> stage ──queue──> stage ──queue──> sink (the caller's thread)

What is promised:

* memory: at most ``size`` finished items wait between two stages, plus one in every thread;
* order: items leave in the order in which they came;
* errors: an exception of any thread is raised in the caller, the same object with its own traceback, after
  the items that were finished before it; everything upstream is told to stop at once;
* ends: when the consumer stops early (``close``, an exception, Ctrl-C), every thread ends after the item
  it is working on, also one that consumes another queue and gives nothing for long, generators are closed in the thread that ran them, and no thread is left behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from lp_edge.errors import ConfigError

__all__ = ["Prefetch", "prefetch"]

T = TypeVar("T")

DEFAULT_QUEUE_SIZE = 4

_running = threading.local()  # .channel: the one that this thread fills


class _Channel(Generic[T]):
    """A bounded queue with one producer and one consumer that either side may close.

    ``queue.Queue`` cannot wake a producer that waits for room when the consumer leaves; this can, so that
    nothing here ever polls.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._error: BaseException | None = None
        self._closed = False
        # Of the thread that waits for these items: when nobody wants its work, nobody wants this either.
        self._outer: _Channel[Any] | None = getattr(_running, "channel", None)

    def put(self, item: T) -> bool:
        """Wait for room and append; False when the consumer has left."""
        with self._changed:
            while len(self._items) >= self._size and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def finish(self, error: BaseException | None = None) -> None:
        """The producer is done, or failed with ``error``."""
        with self._changed:
            self._finished, self._error = True, error
            self._changed.notify_all()

    def get(self) -> T:
        """Next item; raises the producer's error once the items before it are used up, or StopIteration."""
        with self._changed:
            while not self._items and not self._finished and not self._closed:
                self._changed.wait()
            if self._closed:
                raise StopIteration
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            error, self._error = self._error, None  # raised once; afterwards the iterator is simply over
            if error is not None:
                raise error
            raise StopIteration

    @property
    def closed(self) -> bool:
        return self._closed or (self._outer is not None and self._outer.closed)

    def close(self) -> None:
        """The consumer leaves: waiting items are dropped and the producer is woken."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _produce(iterable: Iterable[T], channel: _Channel[T]) -> None:
    """Body of the thread: never refers to the Prefetch, so that a forgotten one can be collected."""
    error: BaseException | None = None
    iterator: Iterator[T] | None = None
    _running.channel = channel
    try:
        iterator = iter(iterable)
        for item in iterator:
            if not channel.put(item):
                break
    except BaseException as caught:  # noqa: BLE001 - carried to the consumer
        error = caught
    try:
        _close(iterator if iterator is not None else iterable)
    except BaseException as caught:  # noqa: BLE001 - carried to the consumer
        error = error or caught
    finally:
        channel.finish(error)


def _close(iterable: object) -> None:
    """Close a generator or anything else with a ``close``, unless it is a container the caller owns."""
    close = getattr(iterable, "close", None)
    if close is not None and isinstance(iterable, Iterator):
        close()


class Prefetch(Iterator[T]):
    """Iterator over an iterable that runs in a thread of its own; see :func:`prefetch`.

    The thread starts with the first ``next``, so an unused one costs nothing.
    """

    def __init__(self, iterable: Iterable[T], size: int = DEFAULT_QUEUE_SIZE, name: str = "prefetch") -> None:
        if size < 1:
            raise ConfigError(f"queue size {size}", "expected 1 or more", "choose a larger queue")
        self._channel: _Channel[T] = _Channel(size)
        self._iterable: Iterable[T] | None = iterable
        self._name = name
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        # A pass that consumes for long before it gives anything (the motion of a whole clip) would not notice otherwise
        # that its own consumer has left.
        wanted: _Channel[Any] | None = getattr(_running, "channel", None)
        if wanted is not None and wanted.closed:
            self._channel.close()
            raise GeneratorExit
        if self._thread is None:
            if self._iterable is None:
                raise StopIteration
            self._thread = threading.Thread(
                target=_produce,
                args=(self._iterable, self._channel),
                name=f"lp-edge {self._name}",
                daemon=True,
            )
            self._iterable = None
            self._thread.start()
        try:
            return self._channel.get()
        except BaseException:
            # End, error or Ctrl-C: nothing more is wanted from the thread.
            self._channel.close()
            raise

    def stop(self) -> None:
        """Ask the thread to end after the item it is working on; does not wait."""
        self._channel.close()

    def close(self) -> None:
        """Stop the thread, wait for its end and close what it iterated. May be called more than once."""
        self.stop()
        if self._thread is not None:
            if self._thread is not threading.current_thread():
                self._thread.join()
        elif self._iterable is not None:
            iterable, self._iterable = self._iterable, None
            _close(iterable)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        channel = getattr(self, "_channel", None)
        if channel is not None:
            channel.close()


def prefetch(iterable: Iterable[T], size: int = DEFAULT_QUEUE_SIZE, name: str = "prefetch") -> Prefetch[T]:
    """Run ``iterable`` in its own thread, at most ``size`` finished items ahead of the consumer.

    Args:
        iterable: what to iterate; a generator is closed in the thread that ran it.
        size: items that may wait, 1 or more.
        name: name of the thread, for debuggers and logs.

    Returns:
        An iterator and context manager with ``close()``. An exception of the iterable is raised by ``next``
        with its original traceback, after the items before it.

    Raises:
        ConfigError: ``size`` is below 1.

    Example:
        >>> with prefetch(range(3)) as numbers:
        ...     list(numbers)
        [0, 1, 2]
    """
    return Prefetch(iterable, size, name)
