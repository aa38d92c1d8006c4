"""Frames through shared memory: between real processes, with peers that lie, and with sides that die."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lp_edge.errors import BackendUnavailable, ConfigError, LimitError, MediaError, ProtocolError
from lp_edge.runtime import shared_frames
from lp_edge.runtime.shared_frames import MAX_SLOT_BYTES, FrameLayout, SharedFrames, SlotRing, sweep

SHM = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="this machine has no /dev/shm")

SIDE = 48
LAYOUT = FrameLayout(3, SIDE * SIDE * 3, 2, SIDE * SIDE * 4)

PRELUDE = """
import os, sys
import numpy as np
from lp_edge.runtime import shared_frames
from lp_edge.runtime.shared_frames import FrameLayout, SharedFrames
shared_frames._FOLDER = sys.argv[1]
layout = FrameLayout(3, 48 * 48 * 3, 2, 48 * 48 * 4)
def say(text):
    print(text, flush=True)
def hear():
    return sys.stdin.readline().strip()
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A corner of the real /dev/shm, where no sweep of another process comes by."""
    with tempfile.TemporaryDirectory(dir=SHM, prefix="lp-edge-tests-") as name:
        monkeypatch.setattr(shared_frames, "_FOLDER", name)
        yield Path(name)


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts Python programs; those that still run in the end are killed."""
    running: list[subprocess.Popen[str]] = []

    def run(program: str) -> subprocess.Popen[str]:
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", PRELUDE + program, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate(timeout=30)


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0], "the other process says nothing"
    line = process.stdout.readline().strip()
    assert line, "the other process died"
    return line


def say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


def picture(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, channels), np.uint8)


def mappings(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(name)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# Layout


def test_slots_lie_behind_one_another_on_pages() -> None:
    layout = FrameLayout(2, 4097, 3, 1)
    places = [layout.offset("driving", i) for i in range(2)] + [layout.offset("result", i) for i in range(3)]
    assert places == [0, 8192, 16384, 20480, 24576]
    assert layout.size == 28672


@pytest.mark.parametrize(
    "numbers", [(0, 1, 0, 1), (65, 1, 1, 1), (1, 0, 1, 1), (1, 1, -1, 1), (1, 1, 1, MAX_SLOT_BYTES + 1)]
)
def test_layouts_are_bounded(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises((ConfigError, ProtocolError), match=r"expected [01] to"):
        FrameLayout(*numbers)


def test_the_whole_segment_is_bounded() -> None:
    with pytest.raises(LimitError, match=str(4 * MAX_SLOT_BYTES)):
        FrameLayout(2, MAX_SLOT_BYTES, 2, MAX_SLOT_BYTES)
    assert FrameLayout(2, MAX_SLOT_BYTES, 2, MAX_SLOT_BYTES, limit=1 << 30).size == 1 << 30
    with pytest.raises(LimitError):
        FrameLayout(1, 1, 1, 1, limit=8191)


# Frames


def test_what_is_written_is_read_in_every_slot() -> None:
    with SharedFrames.create(LAYOUT) as server, SharedFrames.attach(server.name, LAYOUT) as client:
        for slot in range(3):
            client.write("driving", slot, picture(slot))
        for slot in range(2):
            server.write("result", slot, picture(10 + slot, 4))
        for slot in range(3):
            np.testing.assert_array_equal(server.read("driving", slot, SIDE, SIDE), picture(slot))
        for slot in range(2):
            np.testing.assert_array_equal(client.read("result", slot, SIDE, SIDE, 4), picture(10 + slot, 4))
        flipped = picture(20)[:, ::-1, ::-1]
        client.write("driving", 1, flipped)
        copy = server.read("driving", 1, SIDE, SIDE)
        client.write("driving", 1, picture(21))
        np.testing.assert_array_equal(copy, flipped)
        wide = picture(22)[: SIDE // 2]
        client.write("driving", 0, wide)
        np.testing.assert_array_equal(server.read("driving", 0, SIDE // 2, SIDE), wide)


def test_a_view_is_the_slot_itself_and_outlives_the_segment() -> None:
    server = SharedFrames.create(LAYOUT)
    client = SharedFrames.attach(server.name, LAYOUT)
    view = client.view("driving", 2, SIDE, SIDE)
    view[:] = picture(1)
    np.testing.assert_array_equal(server.read("driving", 2, SIDE, SIDE), picture(1))
    server.write("result", 1, picture(2))
    np.testing.assert_array_equal(client.view("result", 1, SIDE, SIDE), picture(2))
    assert mappings(server.name) == 1, "one mapping for all views, none on the side that copies"
    client.close()
    server.close()
    np.testing.assert_array_equal(view, picture(1))
    del view
    assert mappings(server.name) == 0


@pytest.mark.parametrize("side, slot", [("driving", 3), ("driving", -1), ("result", 2), ("result", 1 << 40)])
def test_slots_that_do_not_exist(side: shared_frames.Side, slot: int) -> None:
    with SharedFrames.create(LAYOUT) as frames:
        for action in (
            lambda: frames.read(side, slot, 1, 1),
            lambda: frames.view(side, slot, 1, 1),
            lambda: frames.write(side, slot, picture(0)),
        ):
            with pytest.raises((ConfigError, ProtocolError), match=rf"{side} slot {slot}; expected 0 to"):
                action()


def test_a_side_that_does_not_exist() -> None:
    with (
        SharedFrames.create(LAYOUT) as frames,
        pytest.raises((ConfigError, ProtocolError), match="expected one of driving"),
    ):
        frames.read("results", 0, 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape",
    [
        (SIDE + 1, SIDE, 3),
        (SIDE, SIDE, 4),
        (1 << 31, 1 << 31, 3),
        (0, SIDE, 3),
        (-SIDE, -SIDE, 3),
        (8, 8, 1),
    ],
)
def test_frames_that_do_not_fit(shape: tuple[int, int, int]) -> None:
    with SharedFrames.create(LAYOUT) as frames:
        for action in (frames.read, frames.view):
            with pytest.raises(MediaError, match="driving slot 0; expected at least one pixel"):
                action("driving", 0, *shape)
        if 0 < shape[0] < 100:
            with pytest.raises(MediaError, match="driving slot 0"):
                frames.write("driving", 0, np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "frame", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_arrays_that_are_no_frames(frame: np.ndarray) -> None:
    with SharedFrames.create(LAYOUT) as frames, pytest.raises(MediaError):
        frames.write("driving", 0, frame)


# Names and files


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lp-edge-1-" + "0" * 31,
        "lp-edge-1-" + "0" * 32 + "\n",
        "lp-edge-1-" + "A" * 32,
        "lp-edge-0-" + "0" * 32,
        "/lp-edge-1-" + "0" * 32,
        "../lp-edge-1-" + "0" * 32,
        "lp-edge-1-" + "../../etc/" + "0" * 22,
        "lp-edge-1-" + "0" * 32 + "\0",
        "lp-edge-\u0661-" + "0" * 32,
    ],
)
def test_names_that_no_server_makes(name: str) -> None:
    with pytest.raises(MediaError, match="expected lp-edge-<pid>"):
        SharedFrames.attach(name, LAYOUT)


def test_segments_lie_where_shm_open_puts_them(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.undo()
    with SharedFrames.create(LAYOUT) as frames:
        assert (SHM / frames.name).is_file()
        SharedFrames.attach(frames.name, LAYOUT).close()
    assert not (SHM / frames.name).exists()


def test_names_do_not_repeat_and_files_are_private(folder: Path) -> None:
    with SharedFrames.create(LAYOUT) as one, SharedFrames.create(LAYOUT) as other:
        assert one.name[:-32] == other.name[:-32] == f"lp-edge-{os.getpid()}-"
        assert one.name != other.name
        status = (folder / one.name).stat()
        assert status.st_mode & 0o7777 == 0o600
        assert status.st_size == LAYOUT.size
        assert status.st_blocks * 512 >= LAYOUT.size, "all memory is reserved"


def plant(folder: Path) -> Path:
    return folder / f"lp-edge-{os.getpid()}-{'5' * 32}"


def test_attach_refuses_what_is_no_segment(folder: Path) -> None:
    path = plant(folder)
    with pytest.raises(MediaError, match="No such file"):
        SharedFrames.attach(path.name, LAYOUT)
    with SharedFrames.create(LAYOUT) as frames:
        path.symlink_to(frames.name)
        with pytest.raises(MediaError, match="one machine"):
            SharedFrames.attach(path.name, LAYOUT)
        path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(MediaError, match="mode prw"):
        SharedFrames.attach(path.name, LAYOUT)
    path.unlink()
    path.mkdir()
    with pytest.raises(MediaError):
        SharedFrames.attach(path.name, LAYOUT)
    path.rmdir()
    path.write_bytes(bytes(LAYOUT.size))
    path.chmod(0o666)
    with pytest.raises(MediaError, match="mode -rw-rw-rw-"):
        SharedFrames.attach(path.name, LAYOUT)
    path.chmod(0o600)
    SharedFrames.attach(path.name, LAYOUT).close()


def test_attach_refuses_other_sizes_and_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedFrames.create(LAYOUT) as frames:
        with pytest.raises(MediaError, match=f"{LAYOUT.size} bytes"):
            SharedFrames.attach(frames.name, FrameLayout(3, SIDE * SIDE * 3, 3, SIDE * SIDE * 4))
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(MediaError, match=f"owner {os.getuid()}; expected .* owner {os.getuid() + 1}"):
            SharedFrames.attach(frames.name, LAYOUT)


def test_refusals_leave_no_descriptor(folder: Path) -> None:
    plant(folder).write_bytes(b"x")
    before = descriptors()
    for _ in range(5):
        with pytest.raises(MediaError):
            SharedFrames.attach(plant(folder).name, LAYOUT)
    assert descriptors() == before


# A peer that truncates


def test_a_truncated_segment_is_an_error_and_no_signal(folder: Path) -> None:
    with SharedFrames.create(LAYOUT) as frames:
        frames.write("driving", 0, picture(0))
        os.truncate(folder / frames.name, 100)
        for action in (
            lambda: frames.read("driving", 0, SIDE, SIDE),
            lambda: frames.view("driving", 0, SIDE, SIDE),
            lambda: frames.write("driving", 0, picture(1)),
        ):
            with pytest.raises(MediaError, match="ends at byte 100"):
                action()
        os.truncate(folder / frames.name, LAYOUT.size + 1)
        with pytest.raises(MediaError, match="resized"):
            frames.read("driving", 0, SIDE, SIDE)


def test_truncated_between_check_and_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = os.fstat
    with SharedFrames.create(LAYOUT) as frames:

        def race(fd: int) -> os.stat_result:
            status = check(fd)
            os.truncate(folder / frames.name, LAYOUT.offset("result", 1) + 100)
            return status

        monkeypatch.setattr(os, "fstat", race)
        with pytest.raises(MediaError, match=f"ends at byte {LAYOUT.offset('result', 1) + 100}"):
            frames.read("result", 1, SIDE, SIDE)
        os.truncate(folder / frames.name, LAYOUT.size)
        with pytest.raises(MediaError, match="resized"):
            frames.view("result", 1, SIDE, SIDE)
        os.truncate(folder / frames.name, LAYOUT.size)
        frames.write("result", 1, picture(3))
        monkeypatch.undo()
        with pytest.raises(MediaError, match="resized"):
            frames.read("result", 1, SIDE, SIDE)


# No room, no shared memory


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM, errno.EFBIG])
def test_a_full_dev_shm_is_an_error_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(code, os.strerror(code))

    before = descriptors()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(LimitError, match=rf"{LAYOUT.size} bytes: {os.strerror(code)}.*--shm-size"):
        SharedFrames.create(LAYOUT)
    assert os.listdir(folder) == []
    assert descriptors() == before


def test_an_interrupt_while_memory_is_reserved_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(fd: int, offset: int, size: int) -> None:
        raise KeyboardInterrupt

    before = descriptors()
    monkeypatch.setattr(os, "posix_fallocate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SharedFrames.create(LAYOUT)
    assert os.listdir(folder) == []
    assert descriptors() == before


def test_the_processs_own_limits(start: Callable[[str], subprocess.Popen[str]], folder: Path) -> None:
    process = start(
        """
import resource
from lp_edge.errors import LimitError
resource.setrlimit(resource.RLIMIT_FSIZE, (layout.size - 1, layout.size - 1))
try:
    SharedFrames.create(layout)
except LimitError as error:
    say(f"{error}")
"""
    )
    assert os.strerror(errno.EFBIG) in hear(process)
    assert process.wait(60) == 0
    assert os.listdir(folder) == []


def test_no_descriptor_left() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1, hard))
    holes = []
    try:
        with pytest.raises(LimitError, match=os.strerror(errno.EMFILE)):
            while True:
                holes.append(SharedFrames.create(LAYOUT))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for frames in holes:
            frames.close()


def test_without_dev_shm(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(shared_frames, "_FOLDER", str(folder / "none"))
    with pytest.raises(BackendUnavailable, match="none: No such file"):
        SharedFrames.create(LAYOUT)
    with pytest.raises(BackendUnavailable, match="none: No such file"):
        SharedFrames.attach(plant(folder).name, LAYOUT)
    assert sweep() == 0


# Two processes, and their ends


ANSWER = """
with SharedFrames.attach(hear(), layout) as frames:
    say("attached")
    while line := hear():
        slot = int(line)
        rgb = frames.read("driving", slot, 48, 48)
        frames.view("result", 1, 48, 48)[:] = 255 - rgb
        say("done")
say("closed")
"""


def test_frames_between_two_processes(start: Callable[[str], subprocess.Popen[str]], folder: Path) -> None:
    with SharedFrames.create(LAYOUT) as server:
        process = start(ANSWER)
        say(process, server.name)
        assert hear(process) == "attached"
        server.unlink()
        assert os.listdir(folder) == []
        for seed in range(20):
            server.write("driving", seed % 3, picture(seed))
            say(process, str(seed % 3))
            assert hear(process) == "done"
            np.testing.assert_array_equal(server.read("result", 1, SIDE, SIDE), 255 - picture(seed))
        say(process, "")
        assert hear(process) == "closed"
        assert process.wait(60) == 0, "no complaint of a resource tracker or of exported views"


def test_the_client_killed_in_the_middle_harms_nobody(
    start: Callable[[str], subprocess.Popen[str]], folder: Path
) -> None:
    with SharedFrames.create(LAYOUT) as server:
        process = start(ANSWER)
        say(process, server.name)
        assert hear(process) == "attached"
        server.unlink()
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        server.write("result", 0, picture(1))
        np.testing.assert_array_equal(server.read("result", 0, SIDE, SIDE), picture(1))
    assert os.listdir(folder) == []


CREATE = """
frames = SharedFrames.create(layout)
frames.write("result", 0, np.full((48, 48, 3), 9, np.uint8))
say(frames.name)
hear()
frames.unlink()
say("unlinked")
hear()
"""


def test_a_server_killed_before_unlinking_is_swept(
    start: Callable[[str], subprocess.Popen[str]], folder: Path
) -> None:
    process = start(CREATE)
    name = hear(process)
    with SharedFrames.attach(name, LAYOUT) as client:
        assert sweep() == 0, "its owner lives"
        process.kill()
        process.wait(60)
        assert os.listdir(folder) == [name]
        assert sweep() == 1, "a client that still holds it does not matter"
        assert os.listdir(folder) == []
        assert sweep() == 0
        assert client.read("result", 0, SIDE, SIDE).min() == 9


def test_a_server_killed_after_unlinking_leaves_nothing(
    start: Callable[[str], subprocess.Popen[str]], folder: Path
) -> None:
    process = start(CREATE)
    with SharedFrames.attach(hear(process), LAYOUT) as client:
        say(process, "")
        assert hear(process) == "unlinked"
        process.kill()
        process.wait(60)
        assert os.listdir(folder) == []
        assert client.read("result", 0, SIDE, SIDE).min() == 9


def test_sweep_touches_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedFrames.create(LAYOUT) as living:
        orphan = plant(folder)  # of a living process's number, but nobody holds its lock
        orphan.write_bytes(b"x")
        others = [
            folder / "lp-edge-notes",
            folder / f"{orphan.name}0",
            folder / f"lp-edge-2-{'a' * 32}",
            folder / f"lp-edge-2-{'b' * 32}",
            folder / f"lp-edge-2-{'c' * 32}",
        ]
        others[0].write_bytes(b"")
        others[1].write_bytes(b"")
        others[2].symlink_to(orphan)
        others[3].mkdir()
        os.mkfifo(others[4])
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert sweep() == 0, "another user's"
        monkeypatch.setattr(os, "geteuid", os.getuid)
        assert sweep() == 1
        assert sorted(os.listdir(folder)) == sorted([living.name, *(path.name for path in others)])


def test_a_sweep_between_open_and_lock_costs_one_more_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, swept = shared_frames._locked, []

    def late(fd: int) -> bool:
        if not swept:
            monkeypatch.setattr(shared_frames, "_locked", lock)
            swept.append(sweep())
        return lock(fd)

    monkeypatch.setattr(shared_frames, "_locked", late)
    with SharedFrames.create(LAYOUT) as frames:
        assert swept == [1]
        assert os.listdir(folder) == [frames.name]
        SharedFrames.attach(frames.name, LAYOUT).close()


def test_a_forked_child_does_not_take_the_name_away(
    start: Callable[[str], subprocess.Popen[str]], folder: Path
) -> None:
    process = start(
        """
frames = SharedFrames.create(layout)
child = os.fork()
if child == 0:
    frames.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
say(frames.name)
hear()
frames.close()
"""
    )
    name = hear(process)
    assert os.listdir(folder) == [name]
    assert sweep() == 0
    say(process, "")
    assert process.wait(60) == 0
    assert os.listdir(folder) == []


def test_closing_and_unlinking_twice(folder: Path) -> None:
    frames = SharedFrames.create(LAYOUT)
    with SharedFrames.attach(frames.name, LAYOUT) as client:
        client.unlink()
        assert os.listdir(folder) == [frames.name], "the name is its creator's"
    frames.unlink()
    frames.unlink()
    frames.close()
    frames.close()
    for action in (
        lambda: frames.read("driving", 0, 1, 1),
        lambda: frames.view("driving", 0, 1, 1),
        lambda: frames.write("driving", 0, picture(0)),
    ):
        with pytest.raises((ConfigError, ProtocolError), match="is closed"):
            action()


def test_closing_while_another_thread_copies() -> None:
    for _ in range(20):
        frames = SharedFrames.create(LAYOUT)
        frames.write("driving", 0, picture(0))
        outcome: list[object] = []
        copied = threading.Event()

        def copy(frames: SharedFrames, outcome: list[object], copied: threading.Event) -> None:
            try:
                while np.array_equal(frames.read("driving", 0, SIDE, SIDE), picture(0)):
                    copied.set()
                outcome.append("bytes of another file")
            except ConfigError as error:
                outcome.append(error)
            finally:
                copied.set()

        thread = threading.Thread(target=copy, args=(frames, outcome, copied))
        thread.start()
        assert copied.wait(60)
        frames.close()
        with tempfile.TemporaryFile() as other:  # takes the number of the closed descriptor
            other.write(bytes(LAYOUT.size))
            thread.join(60)
        assert not thread.is_alive()
        assert [str(item) for item in outcome] == [
            f"shared memory {frames.name} is closed; expected an open one. To fix it: keep it open"
        ]


def test_many_streams_leave_nothing(folder: Path) -> None:
    descriptors_before, threads = descriptors(), threading.active_count()
    for turn in range(500):
        with SharedFrames.create(LAYOUT) as server, SharedFrames.attach(server.name, LAYOUT) as client:
            if turn % 2:
                server.unlink()
            client.view("driving", 0, SIDE, SIDE)[:] = turn % 256
            assert server.read("driving", 0, SIDE, SIDE)[-1, -1, -1] == turn % 256
    assert descriptors() == descriptors_before
    assert threading.active_count() == threads
    assert mappings(str(folder)) == 0
    assert os.listdir(folder) == []


# Which slots are free


def test_slots_come_back_with_acknowledgements() -> None:
    ring = SlotRing("result", 3)
    assert [ring.take(n) for n in (0, 4, 5, 6)] == [0, 1, 2, None]
    assert ring.free == 0
    assert ring.acknowledge(4) == 2
    assert ring.acknowledge(4) == 0
    assert ring.take(6) == 0, "a sequence that got no slot is not used up"
    assert ring.free == 1
    ring.skip(7)
    assert ring.acknowledge(7) == 2
    assert ring.free == 3


@pytest.mark.parametrize("sequence", [-1, 1, 2])
def test_sequences_grow(sequence: int) -> None:
    ring = SlotRing("driving", 4)
    ring.take(3)
    for action in (ring.take, ring.skip, lambda n: ring.claim(2, n)):
        with pytest.raises((ConfigError, ProtocolError), match=f"driving sequence {sequence} after 3"):
            action(sequence)
    assert ring.free == 3
    assert ring.take(3) == 1, "one frame may have several pictures"
    assert ring.take(4) == 2


def test_what_a_receiver_refuses() -> None:
    ring = SlotRing("driving", 2)
    ring.claim(1, 8)
    with pytest.raises(
        (ConfigError, ProtocolError), match=r"sequence 9 in driving slot 1; .* holds sequence 8"
    ):
        ring.claim(1, 9)
    for slot in (-1, 2, 1 << 63):
        with pytest.raises((ConfigError, ProtocolError), match=f"driving slot {slot}"):
            ring.claim(slot, 9)
    with pytest.raises((ConfigError, ProtocolError), match="sequence 9 is acknowledged; expected -1 to 8"):
        ring.acknowledge(9)
    assert ring.acknowledge(8) == 1
    with pytest.raises((ConfigError, ProtocolError), match="sequence 7 is acknowledged; expected 8 to 8"):
        ring.acknowledge(7)
    ring.claim(1, 9)
    with pytest.raises(ConfigError):
        SlotRing("driving", 0)
