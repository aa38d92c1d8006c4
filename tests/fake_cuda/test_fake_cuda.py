"""The fake device notices what a real one would punish later: each check fails when it should."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lp_edge.engines.cuda_calls import PROTOTYPES
from lp_edge.tests.fake_cuda.device import GARBAGE, H200, POISON, FakeCuda


def bound(personality=H200) -> FakeCuda:
    fake = FakeCuda(personality)
    assert fake("cudaSetDevice", 0) == (0,)
    return fake


def get(fake: FakeCuda, name: str, *inputs: object) -> int:
    status, value = fake(name, *inputs)
    assert status == 0
    return value


def stream_of(fake: FakeCuda) -> int:
    return get(fake, "cudaStreamCreateWithFlags", 1)


def pinned(fake: FakeCuda, size: int) -> tuple[int, np.ndarray]:
    address = get(fake, "cudaHostAlloc", size, 3 if fake.personality.integrated else 1)
    return address, np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def up(fake: FakeCuda, to: int, start: int, size: int, stream: int) -> None:
    assert fake("cudaMemcpyAsync", to, start, size, 1, stream) == (0,)


def down(fake: FakeCuda, to: int, start: int, size: int, stream: int) -> None:
    assert fake("cudaMemcpyAsync", to, start, size, 2, stream) == (0,)


def only(fake: FakeCuda, text: str) -> None:
    assert len(fake.violations) == 1 and text in fake.violations[0], fake.violations


def test_it_has_every_call_and_no_other():
    assert {name[1:] for name in dir(FakeCuda) if name.startswith("_cu")} == set(PROTOTYPES)


def test_work_runs_when_it_is_waited_for_and_in_order():
    fake = bound()
    stream, memory = stream_of(fake), get(fake, "cudaMalloc", 8)
    address, host = pinned(fake, 8)
    host[:] = 5
    up(fake, memory, address, 8, stream)
    assert fake.view(memory).tolist() == [GARBAGE] * 8
    fake("cudaMemsetAsync", memory, 7, 4, stream)
    assert fake("cudaStreamSynchronize", stream) == (0,)
    assert fake.view(memory).tolist() == [7] * 4 + [5] * 4
    assert not fake.violations


def test_a_copy_poisons_what_it_will_fill():
    fake = bound()
    stream, memory = stream_of(fake), get(fake, "cudaMalloc", 4)
    address, host = pinned(fake, 4)
    fake("cudaMemsetAsync", memory, 1, 4, stream)
    down(fake, address, memory, 4, stream)
    assert host.tolist() == [POISON] * 4
    fake("cudaStreamSynchronize", stream)
    assert host.tolist() == [1] * 4


def test_writing_where_a_copy_reads_or_fills_is_noticed():
    fake = bound()
    stream, memory = stream_of(fake), get(fake, "cudaMalloc", 4)
    address, host = pinned(fake, 4)
    up(fake, memory, address, 4, stream)
    host[0] = 1
    fake("cudaStreamSynchronize", stream)
    only(fake, "while work was to read it")
    fake.violations.clear()
    down(fake, address, memory, 4, stream)
    host[0] = 1
    fake("cudaStreamSynchronize", stream)
    only(fake, "while work was to fill it")


def test_two_streams_need_an_event():
    fake = bound()
    one, two, memory = stream_of(fake), stream_of(fake), get(fake, "cudaMalloc", 4)
    out = np.zeros(4, np.uint8)
    fake("cudaMemsetAsync", memory, 1, 4, one)
    down(fake, out.ctypes.data, memory, 4, two)
    only(fake, "race")
    fake.violations.clear()
    event = get(fake, "cudaEventCreateWithFlags", 2)
    fake("cudaMemsetAsync", memory, 2, 4, one)
    fake("cudaEventRecord", event, one)
    fake("cudaStreamWaitEvent", two, event, 0)
    down(fake, out.ctypes.data, memory, 4, two)
    assert out.tolist() == [2] * 4 and not fake.violations


def test_parts_of_a_buffer_and_reads_do_not_race():
    fake = bound()
    one, two, memory = stream_of(fake), stream_of(fake), get(fake, "cudaMalloc", 8)
    fake("cudaMemsetAsync", memory, 1, 4, one)
    fake("cudaMemsetAsync", memory + 4, 2, 4, two)
    assert not fake.violations
    fake("cudaMemsetAsync", memory + 3, 2, 4, two)
    only(fake, "race")


def test_what_a_destroyed_stream_was_to_do_is_not_forgotten():
    fake = bound()
    one, two, memory = stream_of(fake), stream_of(fake), get(fake, "cudaMalloc", 4)
    fake("cudaMemsetAsync", memory, 1, 4, one)
    fake("cudaStreamDestroy", one)
    fake("cudaMemsetAsync", memory, 2, 4, two)
    only(fake, "race")
    assert fake("cudaDeviceSynchronize") == (0,) and fake.view(memory)[0] == 1 + 1


def test_a_stream_that_captures_cannot_be_asked():
    fake = bound()
    stream = stream_of(fake)
    fake("cudaStreamBeginCapture", stream, 1)
    with ThreadPoolExecutor(1) as other:
        other.submit(fake, "cudaSetDevice", 0).result()
        assert other.submit(fake, "cudaStreamQuery", stream).result() == (900,)
        assert other.submit(fake, "cudaStreamEndCapture", stream).result() == (908,)
    assert fake("cudaStreamEndCapture", stream) == (901,)


def test_the_host_that_waited_orders_streams():
    fake = bound()
    one, two, memory = stream_of(fake), stream_of(fake), get(fake, "cudaMalloc", 4)
    fake("cudaMemsetAsync", memory, 1, 4, one)
    assert [fake("cudaStreamQuery", one)[0] for _ in range(2)] == [600, 0]
    fake("cudaMemsetAsync", memory, 2, 4, two)
    assert not fake.violations


def test_free_twice_use_after_free_and_free_under_work():
    fake = bound()
    stream, memory = stream_of(fake), get(fake, "cudaMalloc", 4)
    fake("cudaMemsetAsync", memory, 1, 4, stream)
    fake("cudaFree", memory)
    only(fake, "freed under queued work")
    fake.violations.clear()
    assert fake("cudaFree", memory)[0]
    only(fake, "freed twice")
    fake.violations.clear()
    fake("cudaMemsetAsync", memory, 1, 4, stream)
    only(fake, "use after free")


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda fake: fake("cudaMalloc", 4), "leak: 4 bytes"),
        (lambda fake: stream_of(fake), "leak: Stream"),
        (lambda fake: get(fake, "cudaEventCreateWithFlags", 0), "leak: Event"),
        (lambda fake: fake("cudaStreamDestroy", 4096), "destroyed twice"),
        (lambda fake: fake("cudaStreamCreateWithFlags", 0), "default stream"),
    ],
)
def test_leaks_and_misuse_fail_the_end(misuse: Callable[[FakeCuda], object], words: str):
    fake = bound()
    misuse(fake)
    with pytest.raises(AssertionError, match=words):
        fake.verify()


def test_bounds_and_addresses_are_kept():
    fake = bound()
    stream, memory = stream_of(fake), get(fake, "cudaMalloc", 4)
    fake("cudaMemsetAsync", memory, 1, 5, stream)
    only(fake, "out of bounds")
    fake.violations.clear()
    host = np.zeros(4, np.uint8)
    assert fake("cudaMemcpyAsync", host.ctypes.data, memory, 4, 3, stream)[0]
    only(fake, "not on the device")


def test_a_thread_needs_a_context():
    fake = FakeCuda()
    assert fake("cudaMalloc", 4) == (201,)
    only(fake, "without a context")


def test_calls_are_checked_for_number_and_type():
    fake = bound()
    for inputs in ((), (4, 4), ("4",), (4.0,), (-1,), (True,)):
        with pytest.raises(AssertionError):
            fake("cudaMalloc", *inputs)


def test_capture_collects_and_forbids():
    fake = bound()
    stream, memory = stream_of(fake), get(fake, "cudaMalloc", 4)
    host = np.zeros(4, np.uint8)
    for forbidden in (
        ("cudaMalloc", 4),
        ("cudaStreamSynchronize", stream),
        ("cudaMemcpyAsync", memory, host.ctypes.data, 4, 1, stream),
    ):
        assert fake("cudaStreamBeginCapture", stream, 1) == (0,)
        assert fake.capturing_here and fake("cudaStreamBeginCapture", stream, 1) == (401,)
        assert fake(*forbidden) == (900,)
        assert fake("cudaStreamEndCapture", stream) == (901,)
    fake("cudaStreamBeginCapture", stream, 1)
    fake("cudaMemsetAsync", memory, 9, 4, stream)
    graph = get(fake, "cudaStreamEndCapture", stream)
    assert not fake.capturing_here
    launch = get(fake, "cudaGraphInstantiateWithFlags", graph, 0)
    fake("cudaStreamSynchronize", stream)
    assert fake.view(memory)[0] == GARBAGE
    fake("cudaGraphLaunch", launch, stream)
    fake("cudaStreamSynchronize", stream)
    assert fake.view(memory)[0] == 9
    fake("cudaFree", memory)
    fake("cudaGraphLaunch", launch, stream)
    assert "use after free" in fake.violations[0]


def test_a_captured_stream_has_to_join_again():
    fake = bound()
    one, two, memory = stream_of(fake), stream_of(fake), get(fake, "cudaMalloc", 4)
    fork, join = (get(fake, "cudaEventCreateWithFlags", 2) for _ in range(2))
    for joins in (False, True):
        fake("cudaStreamBeginCapture", one, 1)
        fake("cudaEventRecord", fork, one)
        fake("cudaStreamWaitEvent", two, fork, 0)
        fake("cudaMemsetAsync", memory, 9, 4, two)
        if joins:
            fake("cudaEventRecord", join, two)
            fake("cudaStreamWaitEvent", one, join, 0)
        assert fake("cudaStreamEndCapture", one)[0] == (0 if joins else 904)
    assert fake("cudaEventQuery", fork) == (900,)  # it belongs to a graph


def test_an_event_from_outside_spoils_a_capture():
    fake = bound()
    one, two = stream_of(fake), stream_of(fake)
    event = get(fake, "cudaEventCreateWithFlags", 2)
    fake("cudaEventRecord", event, two)
    fake("cudaStreamBeginCapture", one, 1)
    assert fake("cudaStreamWaitEvent", one, event, 0) == (905,)
    assert fake("cudaStreamEndCapture", one) == (901,)


def test_other_libraries_queue_their_work():
    fake = bound()
    stream, x, y = stream_of(fake), get(fake, "cudaMalloc", 4), get(fake, "cudaMalloc", 4)

    def run() -> None:
        fake.view(y)[:] = fake.view(x) + 1

    fake("cudaMemsetAsync", x, 1, 4, stream)
    assert fake.enqueue(stream, "add one", run, reads=[(x, 4)], writes=[(y, 4)]) == 0
    assert fake.view(y)[0] == GARBAGE
    fake("cudaStreamSynchronize", stream)
    assert fake.view(y)[0] == 2
    other = stream_of(fake)
    fake.enqueue(stream, "add one", run, reads=[(x, 4)], writes=[(y, 4)])
    fake.enqueue(other, "add one", run, reads=[(y, 4)])
    only(fake, "race")
    assert fake.enqueue(1, "add one", run) == 400


def test_plans():
    fake = bound()
    fake.fail("cudaMalloc", 2, nth=2)
    assert [fake("cudaMalloc", 4)[0] for _ in range(3)] == [0, 2, 0]
    assert fake("cudaGetLastError") == (2,) and fake("cudaGetLastError") == (0,)
    fake.break_device(719)
    assert fake("cudaMalloc", 4) == (719,)
    assert fake.count("cudaMalloc") == 2
    with pytest.raises(AssertionError):
        fake.fail("cudaMaloc", 2)
