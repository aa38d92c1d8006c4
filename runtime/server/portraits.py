"""Portraits that the server keeps ready: found by id, bounded in number and memory, gone when unused.

A portrait leaves the store in four ways: it is deleted, it has not been used for its time to live, it makes room for others
(the one unused for longest goes first), or the server ends. One that a stream uses is *pinned*: it neither expires nor makes
room; deleted, it vanishes from the list at once, and its memory counts until the last stream lets go of it.

There is no thread behind the store: every operation drops what has expired, and the core calls :meth:`PortraitStore.expire`
every few seconds, so that memory is freed on an idle server too.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import numpy as np
import numpy.typing as npt

from lp_edge.engines.cuda import DeviceBuffer
from lp_edge.engines.runner import Array
from lp_edge.errors import ConfigError, LimitError, NotFoundError
from lp_edge.runtime.faces import Face
from lp_edge.runtime.family import Portrait
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.server.config import Limits

__all__ = ["PortraitStore", "StoredPortrait", "memory_of"]

U8 = npt.NDArray[np.uint8]

# Another stream may end, or another portrait expire, at any time; sooner than this a new try hardly makes sense.
_RETRY_S = 5.0


def memory_of(*roots: object) -> int:
    """Bytes of all arrays that can be reached from ``roots`` through dataclasses, mappings and sequences.

    An array that is reached twice counts once; a view counts as the whole array that it keeps alive, on a device as on the host.
    Pools of memory round sizes up by an eighth at most, which is not counted.

    Example:
        >>> frame = np.zeros((4, 4, 3), np.uint8)
        >>> memory_of([frame, frame[1:]], {"again": frame})
        48
    """
    seen: set[int] = set()
    total = 0
    todo: list[object] = list(roots)
    while todo:
        item = todo.pop()
        while isinstance(item, np.ndarray) and isinstance(item.base, np.ndarray):
            item = item.base
        if isinstance(buffer := getattr(item, "buffer", None), DeviceBuffer):  # of a DeviceArray
            item = buffer
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (np.ndarray, DeviceBuffer)):
            total += item.nbytes
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif is_dataclass(item) and not isinstance(item, type):
            todo += (getattr(item, field.name) for field in fields(item))
            todo += getattr(item, "__dict__", {}).values()  # what was made on first use, and no field
        elif isinstance(item, Array):
            total += math.prod(item.shape) * np.dtype(item.dtype).itemsize
    return total


class StoredPortrait:
    """A portrait in a :class:`PortraitStore`; made by :meth:`PortraitStore.add`.

    Attributes:
        id: names it; unguessable.
        rgb: uint8 ``[H, W, 3]``, the picture.
        options: how it was registered: ``faces``, ``size`` and ``crop`` count.
        faces: the faces that are animated, in the order of ``options.faces``.
        ttl_s: seconds without use after which it goes.
        created_at: when it was registered, Unix time in seconds.
        memory_bytes: what it takes on the host and on devices, see :func:`memory_of`; grows when it is prepared for another device,
            and when the first frame lays ready what the following ones need.
        active: streams that use it now.
    """

    def __init__(
        self,
        store: PortraitStore,
        rgb: U8,
        options: AnimateOptions,
        faces: Sequence[Face],
        prepared: Mapping[int, Sequence[Portrait]],
        prepare: Callable[[int], Sequence[Portrait]],
        ttl_s: float,
        now: float,
    ) -> None:
        self.id = _new_id()
        self.rgb, self.options, self.faces, self.ttl_s = rgb, options, list(faces), ttl_s
        self.created_at, self.active = time.time(), 0
        self._store, self._prepare = store, prepare
        self._prepared = {device: list(portraits) for device, portraits in prepared.items()}
        self._preparing = threading.Lock()
        self._added, self.used = now, now
        self.memory_bytes = self.measure()

    def measure(self) -> int:
        """What it takes now, in bytes."""
        return memory_of(self.rgb, self.faces, self._prepared)

    @property
    def expires_at(self) -> float:
        """When it goes unless it is used before, Unix time in seconds; one that is used now begins its time to live now."""
        used = self._store.now() if self.active else self.used
        return self.created_at + (used - self._added) + self.ttl_s

    def prepared(self, device_index: int) -> list[Portrait]:
        """Its faces, ready to be drawn on a device; prepared there on first use, which takes as long as registering did.

        The caller holds it pinned. Two streams that ask at once prepare it once.

        Raises:
            LimitError: there is no room for a second copy.
            EngineError: a network failed.
        """
        with self._preparing:
            if device_index not in self._prepared:
                self._prepared[device_index] = list(self._prepare(device_index))
                try:
                    self._store._resized(self, self.measure())
                except LimitError:
                    del self._prepared[device_index]
                    raise
            return list(self._prepared[device_index])


def _new_id() -> str:
    """128 random bits; a leading dash would make it an option on a command line."""
    while (text := secrets.token_urlsafe(16)).startswith("-"):
        pass
    return text


class PortraitStore:
    """Portraits by id. All methods may be called from any thread and return at once.

    Args:
        limits: ``max_portraits`` and ``max_portrait_bytes`` count.
        default_ttl_s: time to live in seconds of a portrait that asks for none, and the longest one.
        clock: seconds that never go back.

    Example:
        >>> store = PortraitStore(Limits(), 3600.0)
        >>> portrait = store.add(rgb, options, faces, {0: prepared}, prepare=prepare_on)   # doctest: +SKIP
        >>> with store.pinned(portrait.id) as found:                                       # doctest: +SKIP
        ...     animator.live(found.rgb, options, portraits=found.prepared(0))
    """

    def __init__(
        self, limits: Limits, default_ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._ttl_s, self.now = limits, default_ttl_s, clock
        self._lock = threading.Lock()
        self._portraits: OrderedDict[str, StoredPortrait] = OrderedDict()  # the one used last stands last
        self._deleted: set[StoredPortrait] = set()  # and still used by a stream

    def add(
        self,
        rgb: U8,
        options: AnimateOptions,
        faces: Sequence[Face],
        prepared: Mapping[int, Sequence[Portrait]],
        ttl_s: float | None = None,
        *,
        prepare: Callable[[int], Sequence[Portrait]],
    ) -> StoredPortrait:
        """Keep a portrait, and let others go for it where there is no room.

        Args:
            rgb: uint8 ``[H, W, 3]``, the picture.
            options: ``faces``, ``size`` and ``crop`` it was prepared with.
            faces: its faces in the order of ``options.faces``.
            prepared: index of a device → the faces as they were prepared there, in the same order.
            ttl_s: seconds without use after which it goes, above 0 and up to the default; None = the default.
            prepare: prepares the faces on the device of an index that ``prepared`` lacks.

        Raises:
            LimitError: it is too large, or others cannot make room because streams use them.
            ConfigError: ``ttl_s`` is out of range.
        """
        ttl = self.time_to_live(ttl_s)
        portrait = StoredPortrait(self, rgb, options, faces, prepared, prepare, ttl, self.now())
        with self._lock:
            self._expire()
            self._make_room(portrait, portrait.memory_bytes, 1)
            self._portraits[portrait.id] = portrait
        return portrait

    def time_to_live(self, seconds: float | None) -> float:
        """What a portrait gets that asks for so many seconds; None = the default.

        Raises:
            ConfigError: it is 0 or less, or longer than the default.
        """
        ttl = self._ttl_s if seconds is None else float(seconds)
        if not 0 < ttl <= self._ttl_s:
            raise ConfigError(
                f"a portrait's time to live is {ttl:g} s",
                f"expected more than 0 and at most {self._ttl_s:g} s",
                "choose a time in that range, or leave it out",
            )
        return ttl

    def get(self, id: str) -> StoredPortrait:
        """The portrait of that id; its time to live begins anew.

        Raises:
            NotFoundError: there is none (any more).
        """
        with self._lock:
            self._expire()
            return self._touch(id)

    @contextmanager
    def pinned(self, id: str) -> Iterator[StoredPortrait]:
        """The portrait of that id, kept for the length of a ``with`` block whatever happens.

        Raises:
            NotFoundError: there is none (any more).
        """
        with self._lock:
            self._expire()
            portrait = self._touch(id)
            portrait.active += 1
        try:
            yield portrait
        finally:
            with self._lock:
                portrait.active -= 1
                portrait.used = self.now()
                if portrait.id in self._portraits:
                    self._portraits.move_to_end(portrait.id)
                elif not portrait.active:
                    self._deleted.discard(portrait)
            portrait.memory_bytes = portrait.measure()

    def delete(self, id: str) -> None:
        """Forget a portrait; streams that use it go on.

        Raises:
            NotFoundError: there is none (any more).
        """
        with self._lock:
            self._expire()
            portrait = self._touch(id)
            del self._portraits[id]
            if portrait.active:
                self._deleted.add(portrait)

    def list(self) -> tuple[StoredPortrait, ...]:
        """All portraits, the one used last first; does not count as a use."""
        with self._lock:
            self._expire()
            return tuple(reversed(self._portraits.values()))

    def expire(self) -> None:
        """Drop what has not been used for its time to live, and look again at the memory of what is in use."""
        with self._lock:
            self._expire()
            for portrait in (*self._portraits.values(), *self._deleted):
                if portrait.active:
                    portrait.memory_bytes = portrait.measure()

    def __len__(self) -> int:
        """Number of portraits that can be found."""
        with self._lock:
            return len(self._portraits)

    @property
    def memory_bytes(self) -> int:
        """What all portraits take together, with those that were deleted and are still used."""
        with self._lock:
            return self._memory()

    # -- with the lock held ----------------------------------------------------------------------------

    def _memory(self) -> int:
        return sum(p.memory_bytes for held in (self._portraits.values(), self._deleted) for p in held)

    def _touch(self, id: str) -> StoredPortrait:
        if id not in self._portraits:
            shown = id if len(id) <= 6 else f"{id[:6]}…"  # who reads the message or the log cannot use it
            raise NotFoundError(
                f"no portrait {shown!r}",
                "expected the id of a portrait that is registered and has not expired",
                "register the picture again",
            )
        portrait = self._portraits[id]
        portrait.used = self.now()
        self._portraits.move_to_end(id)
        return portrait

    def _expire(self) -> None:
        now = self.now()
        for id, portrait in list(self._portraits.items()):
            if not portrait.active and now - portrait.used >= portrait.ttl_s:
                del self._portraits[id]

    def _make_room(self, wanted: StoredPortrait, memory: int, more: int) -> None:
        """Let portraits go until ``memory`` bytes of ``wanted`` and ``more`` new entries fit; nothing goes when they cannot."""
        limits = self._limits
        if memory > limits.max_portrait_bytes:
            raise LimitError(
                f"a portrait of {memory} bytes",
                f"expected at most {limits.max_portrait_bytes}, the memory for all portraits",
                "register a smaller picture, or fewer of its faces",
            )
        others = sum(p.memory_bytes for p in self._portraits.values() if p is not wanted)
        others += sum(p.memory_bytes for p in self._deleted if p is not wanted)
        count = len(self._portraits) + more
        going: Sequence[str] = ()
        for id, portrait in self._portraits.items():
            if others + memory <= limits.max_portrait_bytes and count <= limits.max_portraits:
                break
            if not portrait.active and portrait is not wanted:
                going = (*going, id)
                others, count = others - portrait.memory_bytes, count - 1
        if others + memory > limits.max_portrait_bytes or count > limits.max_portraits:
            raise LimitError(
                f"no room for a portrait of {memory} bytes: streams use the others ({count - more} portraits, {others} bytes)",
                f"expected at most {limits.max_portraits} portraits and {limits.max_portrait_bytes} bytes together",
                "try again when a stream has ended, or delete a portrait",
                retry_after_s=_RETRY_S,
            )
        for id in going:
            del self._portraits[id]

    # -- for StoredPortrait ----------------------------------------------------------------------------

    def _resized(self, portrait: StoredPortrait, memory: int) -> None:
        with self._lock:
            if portrait.id in self._portraits or portrait in self._deleted:
                self._make_room(portrait, memory, 0)
            portrait.memory_bytes = memory
