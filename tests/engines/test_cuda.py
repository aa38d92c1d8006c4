"""CUDA on the fake device (tests/fake_cuda), and its foreign calls against whatever real CUDA is found here."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_edge.engines import cuda as cuda_module
from lp_edge.engines.cuda import Cuda, CudaStream, open_cuda, shared_cuda, size_class
from lp_edge.errors import (
    BackendUnavailable,
    ConfigError,
    EngineError,
    LimitError,
    TensorError,
)
from lp_edge.tests.fake_cuda.device import (
    GARBAGE,
    H200,
    NO_DEVICE,
    NO_DRIVER,
    OLD_DRIVER,
    ORIN,
    POISON,
    SMALL,
    FakeCuda,
    Personality,
)


def scale(fake: FakeCuda, stream: CudaStream, x: Any, y: Any, by: float) -> None:
    """Queue what a library would: four numbers of ``x``, times ``by``, into ``y``."""
    start, end = x.pointer, y.pointer

    def run() -> None:
        fake.view(end, 16).view(np.float32)[:] = fake.view(start, 16).view(np.float32) * np.float32(by)

    assert fake.enqueue(stream.handle, "scale", run, reads=[(start, 16)], writes=[(end, 16)]) == 0
    x.use(stream)
    y.use(stream)


@pytest.fixture(params=[H200, ORIN], ids=["discrete", "integrated"])
def fake(request: pytest.FixtureRequest) -> Iterator[FakeCuda]:
    device = FakeCuda(request.param)
    yield device
    device.verify()


@pytest.fixture
def cuda(fake: FakeCuda) -> Iterator[Cuda]:
    with open_cuda(runtime=fake) as opened:
        yield opened


@pytest.fixture
def stream(cuda: Cuda) -> CudaStream:
    return cuda.stream()


def freed(fake: FakeCuda) -> int:
    return fake.count("cudaFree") - 1  # the first makes the context


# -- opening ------------------------------------------------------------------------------------


def test_what_a_device_tells():
    with FakeCuda(H200) as fake, open_cuda(runtime=fake) as cuda:
        assert (cuda.name, cuda.compute_capability) == ("NVIDIA H200", (9, 0))
        assert (cuda.integrated, cuda.driver_version, cuda.runtime_version) == (False, (12, 4), (12, 4))
        free, total = cuda.memory()
        assert total == cuda.total_memory == H200.memory and free == total
        assert str(cuda) == "NVIDIA H200 (device 0, compute capability 9.0)"


def test_a_jetson_shares_its_memory():
    with FakeCuda(ORIN) as fake, open_cuda(runtime=fake) as cuda:
        assert cuda.integrated and cuda.driver_version == (11, 4)


@pytest.mark.parametrize(
    ("personality", "words"),
    [
        (NO_DEVICE, r"cudaErrorNoDevice \(100\).*To fix it: install the NVIDIA driver"),
        (OLD_DRIVER, r"cudaErrorInsufficientDriver \(35\).*To fix it: update the NVIDIA driver"),
        (NO_DRIVER, "there is no NVIDIA driver"),
    ],
)
def test_no_device(personality: Personality, words: str):
    with FakeCuda(personality) as fake, pytest.raises(BackendUnavailable, match=words):
        open_cuda(runtime=fake)


@pytest.mark.parametrize(("count", "words"), [(1, "expected one from 0 to 0"), (0, "expected an NVIDIA GPU")])
def test_a_device_that_is_not_there(count: int, words: str):
    personality = Personality("two", (8, 0), 1 << 20, devices=count)
    with FakeCuda(personality) as fake, pytest.raises(BackendUnavailable, match=f"device 1; {words}"):
        open_cuda(1, runtime=fake)


@pytest.mark.parametrize("options", [{"device": -1}, {"device": True}, {"pool_bytes": -1}, {"device": "0"}])
def test_wrong_options(options: dict):
    with FakeCuda() as fake, pytest.raises(ConfigError, match=next(iter(options))):
        open_cuda(**options, runtime=fake)


def unavailable(words: str, cause: Exception | None = None) -> object:
    error = BackendUnavailable(words, "expected it", f"remedy of {words}")
    error.__cause__ = cause
    raise error


def test_the_first_runtime_that_works_is_taken(monkeypatch: pytest.MonkeyPatch, caplog):
    old, good = FakeCuda(OLD_DRIVER), FakeCuda(H200)
    found = [
        ("none", partial(unavailable, "no package", ImportError())),
        ("old", lambda: old),
        ("good", lambda: good),
    ]
    monkeypatch.setattr(cuda_module, "runtimes", lambda: iter(found))
    monkeypatch.setattr(cuda_module, "load_driver", lambda: None)
    with caplog.at_level(logging.DEBUG, "lp_edge"), open_cuda() as cuda:
        assert cuda.runtime is good
    assert (
        "CUDA through none: no package" in caplog.text and "CUDA through a fake: NVIDIA H200" in caplog.text
    )


def test_what_the_driver_said_is_told_rather_than_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    found = [
        ("none", partial(unavailable, "no package", ImportError())),
        ("old", lambda: FakeCuda(OLD_DRIVER)),
        ("older", lambda: FakeCuda(OLD_DRIVER)),
    ]
    monkeypatch.setattr(cuda_module, "runtimes", lambda: iter(found))
    monkeypatch.setattr(cuda_module, "load_driver", lambda: None)
    with pytest.raises(BackendUnavailable) as raised:
        open_cuda()
    assert raised.value.got.count("(35)") == 1 and "no package" not in raised.value.got
    assert raised.value.remedy.startswith("update the NVIDIA driver")
    del found[1:]
    with pytest.raises(BackendUnavailable, match=r"cannot be used: no package.*install the NVIDIA driver"):
        open_cuda()


def test_without_a_driver_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        cuda_module, "load_driver", partial(unavailable, "there is no NVIDIA driver (libcuda)")
    )
    with pytest.raises(BackendUnavailable, match=r"^there is no NVIDIA driver"):
        open_cuda()


# -- statuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "remedy"),
    [
        (2, LimitError, "smaller batches"),
        (100, BackendUnavailable, "install the NVIDIA driver"),
        (803, BackendUnavailable, "restart after the driver's update"),
        (700, EngineError, "start the process again"),
        (1, EngineError, "lp-doctor"),
    ],
)
def test_one_check_for_all_statuses(status: int, kind: type[Exception], remedy: str):
    with FakeCuda() as fake, open_cuda(runtime=fake) as cuda:
        fake.fail("cudaStreamCreateWithFlags", status)
        with pytest.raises(
            kind, match=rf"cudaStreamCreateWithFlags failed with cuda\w+ \({status}\)"
        ) as raised:
            cuda.stream()
        assert type(raised.value) is kind and remedy in str(raised.value)
        assert fake("cudaGetLastError") == (0,)  # nobody else is told of our failure


def test_a_status_that_nobody_knows():
    with FakeCuda() as fake, open_cuda(runtime=fake) as cuda:
        fake.raise_on("cudaGetErrorName", ValueError("123456 is not a valid cudaError_t"))
        fake.raise_on("cudaGetErrorString", ValueError("no"))
        fake.fail("cudaMemGetInfo", 123456)
        with pytest.raises(EngineError, match=r"failed with an unknown status \(123456\)"):
            cuda.memory()


def test_a_library_without_the_function():
    with FakeCuda() as fake, open_cuda(runtime=fake) as cuda:
        fake.raise_on("cudaMemGetInfo", RuntimeError('Function "x"\nnot found'))
        with pytest.raises(
            BackendUnavailable,
            match=r"cudaMemGetInfo cannot be called through a fake \(Function \"x\" not found\).*lp-edge\[gpu\]",
        ):
            cuda.memory()


def test_a_lost_device_is_logged_once_at_the_end(caplog: pytest.LogCaptureFixture):
    fake = FakeCuda()
    with open_cuda(runtime=fake) as cuda:
        cuda.alloc(4)
        stream = cuda.stream()
        fake.break_device(700)
        with pytest.raises(EngineError, match="context is lost"):
            stream.synchronize()
        with pytest.raises(EngineError, match=r"\(700\)"):
            stream.close()
    assert len(caplog.records) == 1 and "(700)" in caplog.text


def test_the_context_is_made_current_again_and_errors_of_that_are_told(cuda: Cuda, fake: FakeCuda):
    fake.fail("cuCtxSetCurrent", 709)
    with pytest.raises(EngineError, match="cuCtxSetCurrent"):
        cuda.memory()


# -- memory -------------------------------------------------------------------------------------


@given(st.integers(1, 1 << 40))
def test_size_classes(nbytes: int):
    size = size_class(nbytes)
    assert nbytes <= size <= nbytes + max(511, nbytes // 8) and size % 512 == 0
    assert size_class(size) == size


@pytest.mark.parametrize("nbytes", [0, -1, 1.0, True, "4"])
def test_memory_of_no_size(cuda: Cuda, nbytes: object):
    with pytest.raises(EngineError, match="bytes of memory"):
        cuda.alloc(nbytes)


def test_closed_buffers_are_handed_out_again(cuda: Cuda, fake: FakeCuda):
    with cuda.alloc(1000) as buffer:
        pointer = buffer.pointer
        assert not buffer.closed and buffer.nbytes == 1000
    buffer.close()
    assert buffer.closed
    assert cuda.alloc(700).pointer == pointer
    assert cuda.alloc(2000).pointer != pointer
    assert fake.count("cudaMalloc") == 2


def test_dropped_buffers_are_handed_out_again(cuda: Cuda, fake: FakeCuda):
    for _ in range(5):
        cuda.alloc(100)
        cuda.pinned(100).array(np.uint8)
        gc.collect()
    assert fake.count("cudaMalloc") == fake.count("cudaHostAlloc") == 1


def test_dropped_streams_and_events_are_destroyed(cuda: Cuda, fake: FakeCuda):
    for _ in range(3):
        cuda.stream().record()
        gc.collect()
    cuda.event()
    cuda.event()
    assert fake.count("cudaStreamDestroy") == 3 and fake.count("cudaEventDestroy") == 4


def test_a_view_keeps_pinned_memory(cuda: Cuda, fake: FakeCuda):
    view = cuda.pinned(100).array(np.float32, (5, 5))[1:, ::2]
    gc.collect()
    cuda.pinned(100)
    assert fake.count("cudaHostAlloc") == 2 and view.shape == (4, 3)


def test_the_pool_is_bounded_and_frees_the_longest_idle():
    with FakeCuda() as fake, open_cuda(runtime=fake, pool_bytes=1024) as cuda:
        buffers = [cuda.alloc(512) for _ in range(4)]
        pointers = [buffer.pointer for buffer in buffers]
        for buffer in buffers:
            buffer.close()
        assert freed(fake) == 2
        held = [cuda.alloc(512), cuda.alloc(512)]
        assert [buffer.pointer for buffer in held] == [pointers[3], pointers[2]]  # the newest first
        held.clear()
        assert cuda.trim() == 1024 and cuda.trim() == 0


def test_work_in_flight_holds_a_buffer_back(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    first = cuda.alloc(512)
    cuda.fill(first, 1, stream)
    pointer = first.pointer
    first.close()
    second = cuda.alloc(512)
    assert second.pointer != pointer
    stream.synchronize()
    third = cuda.alloc(512)
    assert third.pointer == pointer
    other = cuda.stream()
    cuda.fill(third, 2, other)  # no race: the fake would tell


def test_memory_for_the_stream_that_uses_it_still(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    other, out = cuda.stream(), np.zeros(1, np.uint8)
    for value in range(4):
        with cuda.alloc(512, stream=stream) as buffer:
            cuda.fill(buffer, value, stream)
        if value == 3:  # never used, but what stands in the queue is
            cuda.alloc(512, stream=stream).close()
    assert fake.count("cudaMalloc") == 1
    with cuda.alloc(512, stream=other) as buffer:
        cuda.fill(buffer, 9, other)
        assert fake.count("cudaMalloc") == 2
        cuda.copy_to_host(buffer, out, other)
    assert out.tolist() == [9]


@pytest.mark.parametrize("work", ["up", "down", "from", "to", "fill", "library", "graph"])
def test_everything_that_is_queued_holds_its_buffers_back(
    cuda: Cuda, fake: FakeCuda, stream: CudaStream, work: str
):
    buffer, other, image = cuda.alloc(512), cuda.alloc(512), cuda.pinned(512)
    view = image.array(np.uint8)
    if work == "graph":
        captured = cuda.stream()
        with cuda.capture(captured) as graph:
            cuda.fill(buffer, 1, captured)
    for _ in range(3):  # so that some is left when the stream was asked
        if work == "up":
            cuda.copy_to_device(view, buffer, stream)
        elif work == "down":
            cuda.copy_to_host(buffer, view, stream)
        elif work == "from":
            cuda.copy_on_device(buffer, other, 512, stream)
        elif work == "to":
            cuda.copy_on_device(other, buffer, 512, stream)
        elif work == "fill":
            cuda.fill(buffer, 1, stream)
        elif work == "library":
            scale(fake, stream, buffer, other, 1)
        else:
            graph.launch(stream)
    pointer = buffer.pointer
    buffer.close()
    assert cuda.alloc(512).pointer != pointer


def test_freeing_waits_for_work(fake: FakeCuda):
    with open_cuda(runtime=fake, pool_bytes=0) as cuda:
        stream = cuda.stream()
        with cuda.alloc(512) as buffer:
            for value in range(3):
                cuda.fill(buffer, value, stream)
        assert freed(fake) == 1  # the fake tells when it was freed under queued work


def test_a_stream_that_is_closed_needs_no_event(cuda: Cuda, fake: FakeCuda):
    stream = cuda.stream()
    with cuda.alloc(512) as buffer:
        cuda.fill(buffer, 1, stream)
        stream.close()
    cuda.fill(cuda.alloc(512), 2, cuda.stream())  # the fake tells of a race unless closing waited
    assert fake.count("cudaMalloc") == 1
    assert not fake.count("cudaEventRecord")


def test_an_idle_stream_needs_no_event(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    with cuda.alloc(512) as buffer:
        cuda.fill(buffer, 1, stream)
        stream.synchronize()
    assert cuda.alloc(512).pointer and fake.count("cudaMalloc") == 1
    assert not fake.count("cudaEventRecord")


def test_when_memory_runs_out_the_pool_gives_back():
    with FakeCuda(SMALL) as fake, open_cuda(runtime=fake) as cuda:
        cuda.alloc(800_000).close()
        with cuda.alloc(600_000):
            assert fake.count("cudaMalloc") == 2 and freed(fake) == 1
            with pytest.raises(LimitError, match=r"cudaMalloc failed with .*\(2\).* for 655360 bytes"):
                cuda.alloc(600_000)


def test_a_failing_pinned_allocation(cuda: Cuda, fake: FakeCuda):
    fake.fail("cudaHostAlloc", 2)
    with pytest.raises(LimitError, match="cudaHostAlloc"):
        cuda.pinned(10)


def test_closed_buffers_and_handles_cannot_be_used(cuda: Cuda, stream: CudaStream):
    buffer, image, event = cuda.alloc(8), cuda.pinned(8), cuda.event()
    for thing in (buffer, image, event, stream):
        thing.close()
        thing.close()
    for use in (
        lambda: buffer.pointer,
        lambda: buffer.use(cuda.stream()),
        lambda: image.address,
        lambda: image.array(np.uint8),
        lambda: event.handle,
        lambda: stream.synchronize(),
    ):
        with pytest.raises(EngineError, match="use of a closed"):
            use()


def test_pinned_memory_is_mapped_where_host_and_device_share_it(
    cuda: Cuda, fake: FakeCuda, stream: CudaStream
):
    image = cuda.pinned(16)
    assert image.mapped is fake.personality.integrated
    if not image.mapped:
        with pytest.raises(EngineError, match="no address on the device"):
            _ = image.pointer
        return
    host = image.array(np.float32)
    host[:] = 3
    assert image.pointer == image.pointer != image.address and fake.count("cudaHostGetDevicePointer") == 1
    scale(fake, stream, image, image, 2)
    assert host.tolist() == [3] * 4
    stream.synchronize()
    assert host.tolist() == [6] * 4


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"), [("f4", (5,), 0), ("u1", (16,), 1), ("u1", None, -1), ("u1", None, 17)]
)
def test_views_stay_inside(cuda: Cuda, dtype: str, shape: tuple[int, ...] | None, offset: int):
    with cuda.pinned(16) as image, pytest.raises(TensorError, match="PinnedBuffer of 16"):
        image.array(dtype, shape, offset)


def test_views_share_memory(cuda: Cuda):
    image = cuda.pinned(16)
    image.array(np.uint8)[:] = 0
    image.array(np.uint16, (2, 2), 8)[:] = 257
    assert image.array(np.uint8).tolist() == [0] * 8 + [1] * 8
    assert image.array(np.float32, ()).shape == ()
    assert image.array(np.float32, offset=4).shape == (3,)


# -- copies -------------------------------------------------------------------------------------


def test_pageable_copies_have_read_and_written_when_they_return(cuda: Cuda, stream: CudaStream):
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer, out = cuda.alloc(data.nbytes), np.zeros_like(data)
    cuda.copy_to_device(data, buffer, stream)
    kept = data.copy()
    data[:] = -1
    cuda.copy_to_host(buffer, out, stream)
    stream.synchronize()
    assert (out == kept).all()


def test_pinned_copies_go_on_alone(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    buffer, image, result = cuda.alloc(8), cuda.pinned(8), cuda.pinned(8)
    image.array(np.uint8)[:] = range(8)
    cuda.copy_to_device(image.array(np.uint8), buffer, stream)
    cuda.copy_to_host(buffer, result.array(np.uint8, (4,)), stream, offset=4)
    assert not stream.done
    assert result.array(np.uint8, (4,)).tolist() == [POISON] * 4
    stream.synchronize()
    assert stream.done
    assert result.array(np.uint8).tolist() == [4, 5, 6, 7, *[GARBAGE] * 4]


def test_pinned_memory_that_was_dropped_stays_until_its_copy_is_done(
    cuda: Cuda, fake: FakeCuda, stream: CudaStream
):
    buffer = cuda.alloc(8)
    for value in range(4):
        view = cuda.pinned(8).array(np.uint8)
        view[:] = value  # the fake tells when a copy was still to read it
        cuda.copy_to_device(view, buffer, stream)
        del view
    stream.synchronize()
    assert fake.view(buffer.pointer, 8).tolist() == [3] * 8
    assert fake.count("cudaHostAlloc") > 1


def test_copies_on_the_device_and_parts(cuda: Cuda, stream: CudaStream):
    source, target = cuda.alloc(8), cuda.alloc(8)
    out = np.zeros(8, np.uint8)
    cuda.fill(source, 1, stream)
    cuda.fill(target, 2, stream)
    cuda.copy_to_device(np.array([5, 6], np.uint8), source, stream, offset=6)
    cuda.copy_on_device(source, target, 3, stream, source_offset=5, target_offset=1)
    cuda.copy_to_host(target, out, stream)
    stream.synchronize()
    assert out.tolist() == [2, 1, 5, 6, 2, 2, 2, 2]


def test_copies_that_do_not_fit(cuda: Cuda, stream: CudaStream):
    buffer, data = cuda.alloc(8), np.zeros(9, np.uint8)
    read_only = np.zeros(8, np.uint8)
    read_only.flags.writeable = False
    for copy in (
        lambda: cuda.copy_to_device(data, buffer, stream),
        lambda: cuda.copy_to_device(data[:8], buffer, stream, offset=1),
        lambda: cuda.copy_to_device(data[:4], buffer, stream, offset=-1),
        lambda: cuda.copy_to_host(buffer, data, stream),
        lambda: cuda.copy_to_device(data[::2], buffer, stream),
        lambda: cuda.copy_to_host(buffer, read_only, stream),
        lambda: cuda.copy_on_device(buffer, buffer, 8, stream, target_offset=1),
        lambda: cuda.copy_on_device(buffer, buffer, 8, stream, source_offset=1),
    ):
        with pytest.raises(TensorError):
            copy()
    cuda.copy_to_device(data[:0], buffer, stream)  # nothing to do is nothing wrong
    cuda.copy_to_device(read_only, buffer, stream)


# -- streams and events -------------------------------------------------------------------------


def test_an_event_orders_two_streams(cuda: Cuda, stream: CudaStream):
    other, buffer, out = cuda.stream(), cuda.alloc(4), np.zeros(4, np.uint8)
    cuda.fill(buffer, 7, stream)
    other.wait(stream.record())
    cuda.copy_to_host(buffer, out, other)
    other.synchronize()
    assert out.tolist() == [7] * 4


def test_events_tell_when_and_how_long(cuda: Cuda, stream: CudaStream):
    buffer = cuda.alloc(4)
    before, after = cuda.event(timing=True), cuda.event(timing=True)
    assert stream.record(before) is before
    cuda.fill(buffer, 7, stream)
    stream.record(after)
    assert not after.done
    after.synchronize()
    assert after.done and after.elapsed_ms(before) == 0.25
    with pytest.raises(EngineError, match="cudaEventElapsedTime"):
        after.elapsed_ms(stream.record())


# -- graphs -------------------------------------------------------------------------------------


def test_a_graph_runs_what_was_captured(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    buffer, image = cuda.alloc(16), cuda.pinned(16)
    image.array(np.float32)[:] = 1
    with cuda.capture(stream) as graph:
        cuda.copy_to_device(image.array(np.float32), buffer, stream)
        scale(fake, stream, buffer, buffer, 3)
        cuda.copy_to_host(buffer, image.array(np.float32), stream)
    assert stream.done
    for wanted in (3, 9, 27):
        graph.launch(stream)
        stream.synchronize()
        assert image.array(np.float32).tolist() == [wanted] * 4
    graph.close()
    with pytest.raises(EngineError, match="closed CudaGraph"):
        graph.launch(stream)


def test_a_graph_keeps_its_buffers(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    buffer = cuda.alloc(512)
    pointer = buffer.pointer
    with cuda.capture(stream) as graph:
        cuda.fill(buffer, 5, stream)
    del buffer
    gc.collect()
    assert cuda.alloc(512).pointer != pointer
    graph.launch(stream)
    graph.close()
    gc.collect()
    assert cuda.alloc(512).pointer != pointer  # its work is queued still
    stream.synchronize()
    assert pointer in {buffer.pointer for buffer in [cuda.alloc(512), cuda.alloc(512), cuda.alloc(512)]}


def test_a_capture_spreads_over_streams(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    other, one, two = cuda.stream(), cuda.alloc(512), cuda.alloc(512)
    with cuda.capture(stream) as graph:
        cuda.fill(one, 1, stream)
        other.wait(stream.record())
        cuda.fill(two, 2, other)
        stream.wait(other.record())
    pointer = two.pointer
    del two
    gc.collect()
    assert cuda.alloc(512).pointer != pointer
    graph.launch(stream)
    stream.synchronize()
    assert fake.view(pointer, 1)[0] == 2
    cuda.fill(one, 3, other)  # no longer captured
    other.synchronize()
    assert fake.view(one.pointer, 1)[0] == 3


def test_what_may_not_be_done_in_a_capture(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    buffer = cuda.alloc(4)
    for forbidden in (
        lambda: cuda.alloc(4),
        lambda: cuda.pinned(4),
        lambda: cuda.trim(),
        lambda: cuda.copy_to_device(np.zeros(4, np.uint8), buffer, stream),
        lambda: cuda.copy_to_host(buffer, np.zeros(4, np.uint8), stream),
        lambda: cuda.capture(cuda.stream()).__enter__(),
    ):
        with pytest.raises(EngineError, match="in a capture"), cuda.capture(stream):
            forbidden()
    with pytest.raises(EngineError, match=r"\(900\)"), cuda.capture(stream):
        stream.synchronize()
    cuda.fill(buffer, 3, stream)  # all is as before
    stream.synchronize()
    assert fake.view(buffer.pointer, 4).tolist() == [3] * 4
    assert not fake.count("cudaGraphInstantiateWithFlags")


def test_a_capture_that_was_spoilt_fails_at_its_end(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    with pytest.raises(EngineError, match=r"\(901\).* at the end of a capture"), cuda.capture(stream):
        fake("cudaStreamSynchronize", stream.handle)
    with pytest.raises(EngineError, match="cudaGraphInstantiateWithFlags"), cuda.capture(stream):
        fake.fail("cudaGraphInstantiateWithFlags", 1)
    with pytest.raises(EngineError, match="cudaStreamBeginCapture"):
        fake.fail("cudaStreamBeginCapture", 1)
        cuda.capture(stream).__enter__()
    assert cuda.alloc(4).pointer  # this thread captures no longer


def test_an_error_inside_a_capture_comes_through(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    with pytest.raises(KeyError), cuda.capture(stream):
        raise KeyError
    assert fake.count("cudaGraphDestroy") == 1


def test_buffers_closed_in_a_capture_come_back_after_it(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    mine, used = cuda.alloc(512), cuda.alloc(512)
    pointers = {mine.pointer, used.pointer}
    used.use(stream)
    captured, ended = threading.Event(), threading.Event()

    def elsewhere() -> int:
        assert captured.wait(10)
        first = cuda.alloc(
            512
        )  # another thread may allocate; what the captured stream uses is not given away
        assert first.pointer == mine_pointer
        ended.set()
        return first.pointer

    mine_pointer = mine.pointer
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(elsewhere)
        with cuda.capture(stream):
            mine.close()
            used.close()
            captured.set()
            assert ended.wait(10)
        assert other.result(10) in pointers
    assert {cuda.alloc(512).pointer, cuda.alloc(512).pointer} & pointers
    assert fake.count("cudaMalloc") <= 3


# -- threads and the end ------------------------------------------------------------------------


def test_threads_allocate_copy_and_launch_at_once(cuda: Cuda, fake: FakeCuda):
    def work(value: int) -> bool:
        stream = cuda.stream()
        for _ in range(5):
            with cuda.alloc(16) as x, cuda.alloc(16) as y:
                out = np.empty(4, np.float32)
                cuda.copy_to_device(np.full(4, value, np.float32), x, stream)
                scale(fake, stream, x, y, 2)
                cuda.copy_to_host(y, out, stream)
                stream.synchronize()
                if out.tolist() != [2 * value] * 4:
                    return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))
    threads = {call.thread for call in fake.calls}
    assert len(threads) > 1


def test_close_frees_what_is_in_other_hands(fake: FakeCuda):
    cuda = open_cuda(runtime=fake)
    stream, event, buffer, image = cuda.stream(), cuda.event(), cuda.alloc(8), cuda.pinned(8)
    with cuda.capture(stream) as graph:
        cuda.fill(buffer, 1, stream)
    cuda.alloc(8).close()
    cuda.close()
    cuda.close()
    fake.verify()
    assert cuda.closed and buffer.closed and image.closed
    calls = len(fake.calls)
    for thing in (stream, event, buffer, image, graph):
        thing.close()
    uses: list[Callable[[], object]] = [
        cuda.memory,
        cuda.stream,
        cuda.event,
        lambda: cuda.alloc(8),
        lambda: cuda.pinned(8),
        lambda: buffer.pointer,
        lambda: image.array(np.uint8),
    ]
    for use in uses:
        with pytest.raises(EngineError, match="closed"):
            use()
    assert len(fake.calls) == calls
    fake.verify()


def test_a_view_outlives_the_device(fake: FakeCuda):
    with open_cuda(runtime=fake) as cuda:
        cuda.pinned(16)  # dropped: nobody needs it
        image, other = cuda.pinned(16), cuda.pinned(8)
        view = image.array(np.uint8)
        view[:] = 7
        other.array(np.uint8)  # the view is gone, the buffer is not
        del image
    assert (view == 7).all()
    with pytest.raises(EngineError, match="closed"):
        other.array(np.uint8)
    del view, other
    gc.collect()
    fake.verify()


def test_memory_at_an_address(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    """Whoever gets it waits for who had it, on the device."""
    other, out = cuda.stream(), np.zeros(1, np.uint8)
    first = cuda.alloc(700)
    pointer = first.pointer
    cuda.fill(first, 1, other)
    assert cuda.alloc_at(pointer, 700, stream) is None  # somebody has it
    first.close()
    assert cuda.alloc_at(pointer, 1025, stream) is None and cuda.alloc_at(pointer + 512, 8, stream) is None
    waits = fake.count("cudaStreamSynchronize") + fake.count("cudaEventSynchronize")
    second = cuda.alloc_at(pointer, 1024, stream)
    assert second is not None and second.pointer == pointer and second.nbytes == 1024
    cuda.fill(second, 2, stream)
    assert fake.count("cudaStreamSynchronize") + fake.count("cudaEventSynchronize") == waits
    cuda.copy_to_host(second, out, stream)
    assert out.tolist() == [2]
    second.close()
    third = cuda.alloc_at(pointer, 8, stream)
    assert third is not None
    cuda.fill(third, 3, stream)
    third.close()
    fourth = cuda.alloc_at(pointer, 8, other)
    assert fourth is not None
    fourth.close()  # never used: whoever is next still waits for the third
    cuda.fill(cuda.alloc(1024), 4, cuda.stream())
    with cuda.capture(stream), pytest.raises(EngineError, match="in a capture"):
        cuda.alloc_at(pointer, 8, other)
    cuda.trim()
    assert cuda.alloc_at(pointer, 8, stream) is None


def test_memory_that_was_used_through_a_closed_device(fake: FakeCuda):
    with open_cuda(runtime=fake) as cuda:
        buffer = cuda.alloc(8)
        with open_cuda(runtime=fake) as other:
            stream = other.stream()
            cuda.fill(buffer, 1, stream)
        buffer.close()
        cuda.alloc(8).close()


def test_shares(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    opened: list[int] = []

    def opening(device: int) -> Cuda:
        opened.append(device)
        return open_cuda(runtime=fake)

    monkeypatch.setattr(cuda_module, "open_cuda", opening)
    with shared_cuda() as first:
        with shared_cuda(0) as second:
            assert first.cuda is second.cuda and opened == [0]
            second.close()
            second.close()
            assert not first.cuda.closed
        assert not first.cuda.closed
        first.cuda.close()  # by somebody who had no right to
        with shared_cuda() as third:
            assert not third.cuda.closed
            first.close()
            assert not third.cuda.closed and opened == [0, 0]
        assert third.cuda.closed
    assert not cuda_module._SHARES
    fake.fail("cudaSetDevice", 2)
    with pytest.raises(LimitError):
        shared_cuda()
    assert not cuda_module._SHARES


def test_shares_of_many_threads(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_module, "open_cuda", lambda device: open_cuda(device, runtime=fake))

    def work(_: int) -> bool:
        with shared_cuda() as share:
            share.cuda.alloc(8)
            return not share.cuda.closed

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))
    assert not cuda_module._SHARES


def test_streams_for_copies(cuda: Cuda, fake: FakeCuda):
    first = cuda.transfer_stream()
    assert cuda.transfer_stream() is first  # it has nothing to do
    image, taken = cuda.pinned(8), []
    for _ in range(9):
        taken.append(cuda.transfer_stream())
        buffer = cuda.alloc(8)
        for _ in range(12):  # the fake does a little at each question
            cuda.copy_to_device(image.array(np.uint8), buffer, taken[-1])
    assert len({stream.handle for stream in taken}) == 4 == fake.count("cudaStreamCreateWithFlags")
    with cuda.capture(cuda.stream()), pytest.raises(EngineError, match="in a capture"):
        cuda.transfer_stream()
    cuda.trim()


def test_an_error_in_the_block_closes_too(fake: FakeCuda):
    with pytest.raises(KeyError), open_cuda(runtime=fake) as cuda:
        cuda.alloc(8)
        raise KeyError
    fake.verify()
