"""Frames of one stream through POSIX shared memory, for a server and a client on the same Linux machine.

A segment is one file in ``/dev/shm`` with slots for frames in either direction; messages then carry only slot, size
and sequence number. The life of a segment:

1. The server makes it (:meth:`SharedFrames.create`) and announces name and layout in its first answer.
2. The client attaches (:meth:`SharedFrames.attach`) and says so.
3. The server removes the name (:meth:`SharedFrames.unlink`). From then on the kernel frees the memory when both sides
   have let go of it, however they die.
4. A server killed between 1 and 3 leaves a name behind; the next one that starts removes it (:func:`sweep`). The owner
   holds a ``flock`` on its segment, which dies with it, so that sweeping needs no guess from process ids: these are
   reused, and mean something else in another container.

Nothing but the standard library and NumPy is needed; ``multiprocessing`` and its resource tracker have no part in it.

**Trust.** Mode 0600 keeps other users out. Both sides run as the same user, and either may write, truncate or punch
holes into the segment at any time; seals against that exist only for ``memfd`` files, which have no name to announce.
So :meth:`SharedFrames.read` and :meth:`~SharedFrames.write` never touch mapped memory: they copy with ``preadv`` and
``pwritev``, to which a truncated segment is a short read, where a mapping would end the process with SIGBUS. What
remains possible is a torn picture, when the peer writes into a slot while it is copied; the copy is private, so what was
checked is what is used. :meth:`SharedFrames.view` maps the segment and is for a side that trusts its peer: the client.

**Containers.** Both sides must see the same ``/dev/shm``: ``--ipc=host``, ``--ipc=container:NAME``, or a
shared volume at that path, and the same user id. Docker's own ``/dev/shm`` has 64 MiB (``--shm-size``).

**Fork.** A forked child shares descriptor and lock, so that a segment counts as alive until both have let go of it;
only the process that created a segment removes its name. Programs that are started (exec) inherit nothing.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import InitVar, dataclass
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from lp_edge.errors import BackendUnavailable, ConfigError, LimitError, MediaError, ProtocolError
from lp_edge.runtime.checks import one_of, within

__all__ = [
    "MAX_SLOTS",
    "MAX_SLOT_BYTES",
    "MAX_TOTAL",
    "FrameLayout",
    "SharedFrames",
    "Side",
    "SlotRing",
    "sweep",
]

U8 = npt.NDArray[np.uint8]
Side = Literal["driving", "result"]
"""Which way a frame goes: ``driving`` from client to server, ``result`` back."""

MAX_SLOTS = 64
"""Most slots of one side."""
MAX_SLOT_BYTES = 1 << 28
"""Most bytes of one slot (256 MiB)."""
MAX_TOTAL = 1 << 29
"""Most bytes of one segment (512 MiB) unless the caller says otherwise."""

_FOLDER = "/dev/shm"  # where shm_open(3) of glibc and musl puts its files
_NAME = re.compile(r"lp-edge-[1-9][0-9]{0,9}-[0-9a-f]{32}")
_PAGE = 4096  # a constant, not the machine's page: clients in any language compute the same offsets
_CHANNELS = (3, 4)


@dataclass(frozen=True)
class FrameLayout:
    """Slots of one segment: the driving ones first, then the results; every slot begins on a multiple of 4096 bytes.

    Args:
        driving_slots, result_slots: number of slots, 0 to 64, and at least one in all.
        driving_bytes, result_bytes: usable bytes of each slot, 1 to 256 MiB (0 where there are no slots); an RGB frame needs
            ``H * W * 3``.
        limit: most bytes the segment may have.

    Raises:
        ConfigError: a number is out of its range.
        LimitError: the segment would be larger than ``limit``.

    Example:
        >>> FrameLayout(4, 512 * 512 * 3, 4, 512 * 512 * 3).size
        6291456
    """

    driving_slots: int
    driving_bytes: int
    result_slots: int
    result_bytes: int
    limit: InitVar[int] = MAX_TOTAL

    def __post_init__(self, limit: int) -> None:
        within("driving_slots", self.driving_slots, 0, MAX_SLOTS)
        within("driving_bytes", self.driving_bytes, min(1, self.driving_slots), MAX_SLOT_BYTES)
        within("result_slots", self.result_slots, 0 if self.driving_slots else 1, MAX_SLOTS)
        within("result_bytes", self.result_bytes, min(1, self.result_slots), MAX_SLOT_BYTES)
        if self.size > limit:
            raise LimitError(
                f"shared memory of {self.size} bytes",
                f"expected {limit} at most",
                "ask for fewer slots or smaller frames",
            )

    @property
    def size(self) -> int:
        """Bytes of the whole segment."""
        return self.start("result") + self.result_slots * self.stride("result")

    def capacity(self, side: Side) -> int:
        """Usable bytes of a slot of that side."""
        one_of("side", side, ("driving", "result"))
        return self.driving_bytes if side == "driving" else self.result_bytes

    def stride(self, side: Side) -> int:
        """Bytes from one slot of that side to the next."""
        return _padded(self.capacity(side))

    def start(self, side: Side) -> int:
        """First byte of the side."""
        return 0 if side == "driving" else self.driving_slots * self.stride("driving")

    def offset(self, side: Side, slot: int) -> int:
        """First byte of a slot.

        Raises:
            ProtocolError: there is no such slot.
        """
        _check_slot(side, slot, self.driving_slots if side == "driving" else self.result_slots)
        return self.start(side) + slot * self.stride(side)


class SharedFrames:
    """One segment, seen from one of its two sides. A context manager; safe to use from several threads.

    Made by :meth:`create` (server) or :meth:`attach` (client), not by the constructor.

    Attributes:
        name: what the client attaches to, ``lp-edge-<pid of the creator>-<32 hexadecimal digits>``.
        layout: the slots.

    Example:
        >>> layout = FrameLayout(2, 64 * 64 * 3, 2, 64 * 64 * 3)
        >>> with SharedFrames.create(layout) as server, SharedFrames.attach(server.name, layout) as client:
        ...     server.unlink()
        ...     client.write("driving", 1, np.full((64, 64, 3), 7, np.uint8))
        ...     int(server.read("driving", 1, 64, 64).max())
        7
    """

    def __init__(self, name: str, layout: FrameLayout, fd: int, *, created: bool) -> None:
        self.name, self.layout = name, layout
        self._fd = fd
        self._named_by = os.getpid() if created else None
        self._map: mmap.mmap | None = None
        # A copy must not meet a descriptor that another thread has closed: its number may be a new file's by then.
        self._lock = threading.Lock()

    @classmethod
    def create(cls, layout: FrameLayout) -> SharedFrames:
        """Make a segment under a random name (128 bits) with all its memory reserved, so that it cannot run out later.

        Raises:
            BackendUnavailable: this machine has no usable ``/dev/shm``.
            LimitError: there is not enough of it, or no descriptor left.
        """
        while True:
            name = f"lp-edge-{os.getpid()}-{secrets.token_hex(16)}"
            try:
                fd = _open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            except OSError as error:
                raise _unusable(error, layout.size) from error
            frames = cls(name, layout, fd, created=True)
            try:
                # A sweep that comes between open and lock takes the file away, so another name is due.
                if _locked(fd) and os.fstat(fd).st_nlink:
                    os.posix_fallocate(fd, 0, layout.size)
                    return frames
            except OSError as error:
                frames.close()
                raise _unusable(error, layout.size) from error
            except BaseException:
                frames.close()
                raise
            frames.close()

    @classmethod
    def attach(cls, name: str, layout: FrameLayout) -> SharedFrames:
        """Open the segment a server has announced.

        Args:
            name: as announced.
            layout: as announced.

        Raises:
            BackendUnavailable: this machine has no ``/dev/shm``.
            MediaError: the name is none that a server makes, there is no such segment, or it is not a regular file of
                the announced size that belongs to this user alone.
        """
        if not _NAME.fullmatch(name):
            raise MediaError(
                f"shared memory named {name!r}",
                "expected lp-edge-<pid>-<32 hexadecimal digits>",
                "use the name that the server announced",
            )
        if not os.path.isdir(_FOLDER):
            raise _unusable(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), _FOLDER), layout.size)
        try:
            fd = _open(name, os.O_RDWR)
        except OSError as error:
            raise MediaError(
                f"shared memory {name}: {error.strerror}",
                f"expected a segment in {_FOLDER} of this machine and this user",
                "run client and server on one machine, as one user and with one /dev/shm (containers: --ipc=host), "
                "or send frames in messages",
            ) from error
        status = os.fstat(fd)
        if (
            not stat.S_ISREG(status.st_mode)
            or stat.S_IMODE(status.st_mode) != 0o600
            or status.st_uid != os.geteuid()
            or status.st_size != layout.size
        ):
            os.close(fd)
            raise MediaError(
                f"shared memory {name} has {status.st_size} bytes, mode {stat.filemode(status.st_mode)}, "
                f"owner {status.st_uid}",
                f"expected {layout.size} bytes, -rw-------, owner {os.geteuid()}",
                "use the name and the layout that the server announced, as the same user",
            )
        return cls(name, layout, fd, created=False)

    def unlink(self) -> None:
        """Remove the name, once the client has attached; the memory lives on with those who hold it.

        Does nothing the second time, on the attached side and in a forked child: the name is its creator's.
        """
        if self._named_by == os.getpid():
            self._named_by = None
            with suppress(FileNotFoundError):
                os.unlink(_path(self.name))

    def close(self) -> None:
        """Let go of the segment, and of its name when this process made it and has not removed it yet.

        Waits for a copy that another thread is in; never fails. Views stay valid until they are dropped.
        """
        with self._lock:
            self._map = None  # not mmap.close(): that raises while views exist; the last of them unmaps
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        self.unlink()

    def read(self, side: Side, slot: int, height: int, width: int, channels: int = 3) -> U8:
        """A private copy of the frame in a slot.

        Args:
            side, slot: where.
            height, width: size of the frame in pixels, at least 1.
            channels: 3 or 4 bytes a pixel.

        Returns:
            uint8 ``[height, width, channels]``.

        Raises:
            ConfigError: there is no such slot, or the segment is closed.
            MediaError: such a frame does not fit the slot, or the peer has truncated the segment.
        """
        size, offset = self._place(side, slot, (height, width, channels))
        with self._open() as fd:
            frame = np.empty(
                (height, width, channels), np.uint8
            )  # not before the checks: sizes come from a peer
            rest = frame.data.cast("B")
            while rest:
                count = os.preadv(fd, [rest], offset)
                if count == 0:
                    raise self._truncated(offset, size)
                rest, offset = rest[count:], offset + count
        return frame

    def write(self, side: Side, slot: int, rgb: U8) -> None:
        """Copy a frame into a slot.

        Args:
            side, slot: where.
            rgb: uint8 ``[H, W, 3]`` or ``[H, W, 4]``; one that is not contiguous is copied once more.

        Raises:
            ConfigError: there is no such slot, or the segment is closed.
            MediaError: the frame is of another kind or does not fit the slot, or the peer has truncated the segment.
            LimitError: the peer has given the slot's memory back and there is none left.
        """
        if rgb.dtype != np.uint8 or rgb.ndim != 3:
            raise MediaError(
                f"a frame {rgb.dtype} {list(rgb.shape)}", "expected uint8 [H, W, 3 or 4]", "convert it"
            )
        size, offset = self._place(side, slot, (rgb.shape[0], rgb.shape[1], rgb.shape[2]))
        with self._open() as fd:
            rest = np.ascontiguousarray(rgb).data.cast("B")
            while rest:
                try:
                    count = os.pwritev(fd, [rest], offset)
                except OSError as error:
                    raise _unusable(error, size) from error
                rest, offset = rest[count:], offset + count

    def view(self, side: Side, slot: int, height: int, width: int, channels: int = 3) -> U8:
        """The slot itself as a writable array: render into it, or show it, without a copy.

        For the client, which trusts its server: a peer that truncates the segment ends this process with SIGBUS at the
        next access. The content is the peer's once the slot was sent, and anything at all before it was received. The
        view keeps the mapping alive, also after :meth:`close`; drop it to give the memory back.

        Args:
            side, slot, height, width, channels: as for :meth:`read`.

        Returns:
            uint8 ``[height, width, channels]``, shared with the peer.

        Raises:
            ConfigError, MediaError: as for :meth:`read`.
            LimitError: the segment cannot be mapped.
        """
        size, offset = self._place(side, slot, (height, width, channels))
        with self._open() as fd:
            if self._map is None:
                try:
                    self._map = mmap.mmap(fd, self.layout.size)
                except OSError as error:
                    raise _unusable(error, self.layout.size) from error
                except ValueError as error:  # truncated just now
                    raise self._truncated(os.fstat(fd).st_size, self.layout.size) from error
            return np.frombuffer(self._map, np.uint8, size, offset).reshape(height, width, channels)

    def __enter__(self) -> SharedFrames:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place(self, side: Side, slot: int, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Bytes of such a frame and where they begin."""
        offset, capacity = self.layout.offset(side, slot), self.layout.capacity(side)
        height, width, channels = shape
        size = height * width * channels
        if min(shape) < 1 or channels not in _CHANNELS or size > capacity:
            raise MediaError(
                f"a frame of {width} x {height} pixels with {channels} channels in {side} slot {slot}",
                f"expected at least one pixel, 3 or 4 channels, and {capacity} bytes at most",
                "negotiate slots for the largest frame",
            )
        return size, offset

    @contextmanager
    def _open(self) -> Iterator[int]:
        """The descriptor of a segment that is neither closed nor truncated; nobody closes it meanwhile."""
        with self._lock:
            if self._fd < 0:
                raise ConfigError(
                    f"shared memory {self.name} is closed", "expected an open one", "keep it open"
                )
            size = os.fstat(self._fd).st_size
            if size != self.layout.size:
                raise self._truncated(size, self.layout.size)
            yield self._fd

    def _truncated(self, got: int, expected: int) -> MediaError:
        return MediaError(
            f"shared memory {self.name} ends at byte {got}",
            f"expected {expected} bytes",
            "the other side has resized it: open a new stream",
        )


class SlotRing:
    """Which slots of one side hold frames that the peer has not yet acknowledged. Not for use by several threads.

    The sender asks for slots (:meth:`take`), the receiver checks those it is told (:meth:`claim`); both free them by the
    same cumulative acknowledgements. Sequence numbers start at 0 or later and grow; those that use no slot (motion
    only, encoded frames) are passed to :meth:`skip`, so that they can be acknowledged as well.

    Args:
        side: named in errors.
        slots: number of slots.

    Example:
        >>> ring = SlotRing("driving", 2)
        >>> ring.take(0), ring.take(1), ring.take(2)
        (0, 1, None)
        >>> ring.acknowledge(0)
        1
        >>> ring.take(2)
        0
    """

    def __init__(self, side: Side, slots: int) -> None:
        within(f"slots of the {side} side", slots, 1, MAX_SLOTS)
        self._side = side
        self._held: list[int | None] = [None] * slots
        self._last = self._acknowledged = -1

    @property
    def free(self) -> int:
        """Number of slots that :meth:`take` can give."""
        return self._held.count(None)

    def take(self, sequence: int) -> int | None:
        """A free slot for frame ``sequence``; None when all are held, and then the sequence is not used up.

        Raises:
            ProtocolError: the sequence is below the last one.
        """
        slot = next((i for i, held in enumerate(self._held) if held is None), None)
        if slot is not None:
            self.claim(slot, sequence)
        return slot

    def claim(self, slot: int, sequence: int) -> None:
        """Note that frame ``sequence`` lies in ``slot``.

        Raises:
            ProtocolError: there is no such slot, it holds a frame that was not acknowledged, or the sequence is below the
                last one.
        """
        _check_slot(self._side, slot, len(self._held))
        held = self._held[slot]
        if held is not None:
            raise ProtocolError(
                f"sequence {sequence} in {self._side} slot {slot}",
                f"expected a free slot; this one holds sequence {held}, which is not acknowledged",
                "use another slot, or wait",
            )
        self.skip(sequence)
        self._held[slot] = sequence

    def skip(self, sequence: int) -> None:
        """Note a sequence that uses no slot.

        Raises:
            ProtocolError: it is below the last one.
        """
        if sequence < self._last:
            raise ProtocolError(
                f"{self._side} sequence {sequence} after {self._last}",
                "expected growing ones; the slots of one frame share its number",
                "count upwards",
            )
        self._last = sequence

    def acknowledge(self, sequence: int) -> int:
        """Free the slots of all frames up to ``sequence``, which may be repeated.

        Returns:
            How many were freed.

        Raises:
            ProtocolError: it was not sent yet, or is below an earlier acknowledgement.
        """
        if not self._acknowledged <= sequence <= self._last:
            raise ProtocolError(
                f"{self._side} sequence {sequence} is acknowledged",
                f"expected {self._acknowledged} to {self._last}: acknowledged before, and sent last",
                "acknowledge what was received, in order",
            )
        self._acknowledged = sequence
        before = self.free
        self._held = [None if held is None or held <= sequence else held for held in self._held]
        return self.free - before


def sweep() -> int:
    """Remove the segments that dead processes of this user left; for the start of a server.

    Segments of living processes stay, whatever container these are in; so does everything else in ``/dev/shm``.

    Returns:
        How many were removed; 0 where there is no ``/dev/shm``.
    """
    removed = 0
    try:
        names = os.listdir(_FOLDER)
    except OSError:
        return 0
    for name in filter(_NAME.fullmatch, names):
        with suppress(OSError):  # gone meanwhile, another user's, or a link
            fd = _open(name, os.O_RDONLY)
            try:
                status = os.fstat(fd)
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and _locked(fd):
                    os.unlink(_path(name))
                    removed += 1
            finally:
                os.close(fd)
    return removed


def _padded(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _check_slot(side: Side, slot: int, slots: int) -> None:
    if not 0 <= slot < slots:
        raise ProtocolError(
            f"{side} slot {slot}", f"expected 0 to {slots - 1}", "use the slots that were negotiated"
        )


def _path(name: str) -> str:
    return f"{_FOLDER}/{name}"


def _open(name: str, flags: int) -> int:
    # Nonblocking, so that a FIFO in the segment's place does not hold us up; os.open adds O_CLOEXEC.
    return os.open(_path(name), flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


def _locked(fd: int) -> bool:
    """Take the lock that says that a segment's owner lives; False when somebody has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unusable(error: OSError, size: int) -> BackendUnavailable | LimitError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS):
        return BackendUnavailable(
            f"shared memory: {_FOLDER}: {error.strerror}",
            "expected a tmpfs that this user can write to (Linux)",
            "mount it, or send frames in messages",
        )
    return LimitError(
        f"no shared memory of {size} bytes: {error.strerror}",
        f"expected enough room in {_FOLDER} and under the process's limits",
        "enlarge it (containers: --shm-size), or use fewer streams, fewer slots or smaller frames",
    )
