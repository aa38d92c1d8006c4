"""Arrays on the fake device (tests/fake_cuda)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.cuda import Cuda, CudaStream, open_cuda
from lp_edge.engines.device import DeviceArray, concatenate, device_array, rows, upload
from lp_edge.engines.runner import Array, fetch, to_host
from lp_edge.errors import EngineError, LimitError, TensorError
from lp_edge.tests.fake_cuda.arrays import to_device
from lp_edge.tests.fake_cuda.device import H200, ORIN, FakeCuda


def twice(fake: FakeCuda, stream: CudaStream, array: DeviceArray) -> None:
    """Queue what a library would: the array's numbers, doubled in place."""
    place = (array.pointer, array.nbytes)

    def run() -> None:
        fake.view(*place).view(np.float32)[:] *= 2

    assert fake.enqueue(stream.handle, "twice", run, reads=[place], writes=[place]) == 0
    array.use(stream)


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


DATA = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


@pytest.mark.parametrize(
    "data",
    [
        DATA,
        DATA.astype(np.float16),
        DATA.astype(np.uint8),
        DATA[:, ::-1].transpose(2, 0, 1),
        np.float32(3)[...],
        DATA[:0],
    ],
    ids=["float32", "float16", "uint8", "strided", "scalar", "empty"],
)
def test_up_and_down(cuda: Cuda, stream: CudaStream, data: np.ndarray):
    array = to_device(cuda, data, stream)
    assert isinstance(array, Array)
    assert (array.shape, array.dtype, array.nbytes) == (data.shape, data.dtype, data.nbytes)
    for host in (to_host(array), np.asarray(array), np.array(array, copy=True)):
        assert host.flags.c_contiguous and host.flags.writeable and host.dtype == data.dtype
        np.testing.assert_array_equal(host, data)


def test_a_download_may_convert_but_never_is_a_view(cuda: Cuda, stream: CudaStream):
    array = to_device(cuda, DATA, stream)
    assert np.asarray(array, np.float64).dtype == np.float64
    assert array.__array__(np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="without a copy"):
        array.__array__(copy=False)


def test_a_download_waits_for_its_stream(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    array = to_device(cuda, DATA, stream)
    twice(fake, stream, array)
    np.testing.assert_array_equal(to_host(array), DATA * 2)


def test_rows_and_reshape_share_memory(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    array = to_device(cuda, DATA, stream)
    rows = array.rows(1, 3)
    np.testing.assert_array_equal(to_host(rows), DATA[1:3])
    np.testing.assert_array_equal(to_host(rows.rows(1, 2).reshape(3, 2)), DATA[2].reshape(3, 2))
    twice(fake, stream, rows.rows(0, 1))
    np.testing.assert_array_equal(to_host(array)[1], DATA[1] * 2)
    assert array.rows(4, 4).shape == (0, 2, 3) and array.rows(2, 2).rows(0, 0).nbytes == 0
    assert rows.buffer is array.buffer and rows.stream is stream


def test_views_keep_memory_and_the_last_gives_it_back(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    array = to_device(cuda, DATA, stream)
    stream.synchronize()
    pointer = array.pointer
    rows = array.rows(0, 2)
    del array
    gc.collect()
    other = device_array(cuda, DATA.shape, DATA.dtype, stream)
    assert other.pointer != pointer
    del rows
    gc.collect()
    assert device_array(cuda, DATA.shape, DATA.dtype, stream).pointer == pointer
    assert fake.count("cudaMalloc") == 2


def test_memory_dropped_under_work_is_not_given_to_another_stream(
    cuda: Cuda, fake: FakeCuda, stream: CudaStream
):
    other = cuda.stream()
    array = to_device(cuda, DATA, stream)
    pointer = array.pointer
    other.wait(array.stream.record())
    array.use(other)
    copy = device_array(cuda, DATA.shape, DATA.dtype, other)
    cuda.copy_on_device(array.buffer, copy.buffer, DATA.nbytes, other)
    del array
    gc.collect()
    fresh = to_device(cuda, DATA + 1, stream)  # the fake tells of a race if this were the same memory
    assert fresh.pointer != pointer
    np.testing.assert_array_equal(to_host(copy), DATA)
    np.testing.assert_array_equal(to_host(fresh), DATA + 1)


def test_copy_to_pinned_memory(cuda: Cuda, stream: CudaStream):
    array = to_device(cuda, DATA, stream)
    image = cuda.pinned(DATA.nbytes)
    out = image.array(np.float32, DATA.shape)
    array.copy_to(out)
    assert not np.array_equal(out, DATA)
    stream.synchronize()
    np.testing.assert_array_equal(out, DATA)
    for wrong in (image.array(np.float32), image.array(np.int32, DATA.shape)):
        with pytest.raises(TensorError, match=r"download of float32 \[4, 2, 3\] into"):
            array.copy_to(wrong)


@pytest.mark.parametrize("data", [DATA, np.zeros((3, 80, 80, 2), np.uint8), np.float32(3)[...], DATA[:0]])
def test_fetch(cuda: Cuda, stream: CudaStream, data: np.ndarray):
    for array in (to_device(cuda, data, stream), upload(cuda, data)):
        wait = fetch(array)
        del array
        host = wait()
        assert host is wait() and host.dtype == data.dtype and host.flags.c_contiguous
        np.testing.assert_array_equal(host, data)
    assert fetch(data)() is data


def test_fetch_does_not_wait_and_later_work_does_not_hold_it_up(
    cuda: Cuda, fake: FakeCuda, stream: CudaStream
):
    array = to_device(cuda, DATA, stream)
    once = DeviceArray(array.buffer, array.shape, array.dtype, stream, ready=stream.record())
    again = device_array(cuda, (8,), np.float32, stream)
    cuda.fill(again.buffer, 0, stream)
    waits = [name for name in fake.names if name.endswith("Synchronize")]
    wait = once.fetch()
    assert [name for name in fake.names if name.endswith("Synchronize")] == waits
    np.testing.assert_array_equal(wait(), DATA)
    once.synchronize()
    assert [work.label for work in fake._pending()] == [
        "fill"
    ]  # what the stream was given later was not waited for
    array.synchronize()
    assert not fake._pending()


def test_fetched_memory_stays_until_its_view_is_dropped(cuda: Cuda, fake: FakeCuda):
    data = np.arange(200_000, dtype=np.uint8)
    array = upload(cuda, data)
    array.synchronize()
    wait = array.fetch()
    first = wait()
    del wait
    gc.collect()
    second = upload(cuda, data + 1).fetch()()
    np.testing.assert_array_equal(first, data)
    np.testing.assert_array_equal(second, data + 1)
    made = fake.count("cudaHostAlloc")
    del first
    gc.collect()
    np.testing.assert_array_equal(array.fetch()(), data)  # in memory that came back
    assert fake.count("cudaHostAlloc") == made
    small = upload(cuda, DATA).fetch()()
    assert small.base is None  # or thousands of small results would hold a page of pinned memory each


def test_fetched_memory_outlives_the_device(fake: FakeCuda):
    data = np.arange(200_000, dtype=np.uint8)
    with open_cuda(runtime=fake) as cuda:
        wait, late = upload(cuda, data).fetch(), upload(cuda, data).fetch()
        host = wait()
    np.testing.assert_array_equal(host, data)
    with pytest.raises(EngineError, match="closed"):
        late()
    del wait, late, host
    gc.collect()


def test_downloads_that_nobody_waits_for(cuda: Cuda):
    """Their pinned memory must not be filled when somebody else has it."""
    array = upload(cuda, np.full(200_000, 5, np.uint8))
    array.fetch()
    gc.collect()
    image = cuda.pinned(200_000).array(np.uint8)
    image[:] = 9
    np.testing.assert_array_equal(upload(cuda, image).fetch()(), image)
    assert (image == 9).all()


def test_upload_takes_a_copy(cuda: Cuda, fake: FakeCuda):
    data = DATA.copy()
    array = upload(cuda, data)
    start = next(call.inputs[1] for call in fake.calls if call.name == "cudaMemcpyAsync")
    assert any(memory.host <= start < memory.host + memory.size for memory in fake._memory)  # it is pinned
    data[:] = 0
    np.testing.assert_array_equal(to_host(array), DATA)
    strided = upload(cuda, DATA[:, ::-1].transpose(2, 0, 1))
    np.testing.assert_array_equal(to_host(strided), DATA[:, ::-1].transpose(2, 0, 1))
    for call in ("cudaMalloc", "cudaHostAlloc"):
        cuda.trim()
        fake.fail(call, 2, times=2)
        with pytest.raises(LimitError, match=call):
            upload(cuda, np.zeros(100_000, np.uint8))
        fake.fail(call, 0)


def test_reading_on_another_stream(cuda: Cuda, stream: CudaStream):
    """What was read there may be dropped at once."""
    other = cuda.stream()
    for array in (to_device(cuda, DATA, stream), upload(cuda, DATA)):
        array.read_on(other)
        copy = device_array(cuda, DATA.shape, DATA.dtype, other)
        cuda._call("cudaMemcpyAsync", copy.pointer, array.pointer, DATA.nbytes, 3, other.handle)
        del array
        gc.collect()
        fresh = to_device(cuda, DATA + 1, stream)
        np.testing.assert_array_equal(to_host(copy), DATA)
        np.testing.assert_array_equal(to_host(fresh), DATA + 1)


def test_the_stream_of_an_array_that_is_written_once(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    """What a library is told that asks ``__cuda_array_interface__``: work behind what is queued there may read it."""
    for _ in range(6):  # whatever stream it is
        array, copy = upload(cuda, DATA), device_array(cuda, DATA.shape, DATA.dtype, stream)
        handle = array.__cuda_array_interface__["stream"]
        assert handle != 0
        cuda._call("cudaMemcpyAsync", copy.pointer, array.pointer, DATA.nbytes, 3, handle)
        fake("cudaStreamSynchronize", handle)
        np.testing.assert_array_equal(to_host(copy), DATA)
        array.buffer.close()


def test_concatenate(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    one, two = to_device(cuda, DATA, cuda.stream()), upload(cuda, DATA + 1)
    parts: list[Array] = [one.rows(1, 3), DATA[:, ::-1], two, one.rows(0, 0), two.rows(3, 4)]
    wanted = np.concatenate([np.asarray(part) for part in parts])
    joined = concatenate(cuda, parts, stream)
    del one, two, parts
    gc.collect()
    others = [to_device(cuda, DATA * 0, cuda.stream()) for _ in range(3)]
    np.testing.assert_array_equal(to_host(joined), wanted)
    assert concatenate(cuda, [joined], stream) is joined
    alone = concatenate(cuda, [DATA], stream)
    assert isinstance(alone, DeviceArray)
    np.testing.assert_array_equal(to_host(alone), DATA)
    assert len(others) == 3


@pytest.mark.parametrize("other", [DATA.astype(np.uint8), DATA[:, 0], np.float32(1)[...]])
def test_arrays_that_cannot_be_laid_together(cuda: Cuda, stream: CudaStream, other: np.ndarray):
    for arrays in ([DATA, other], [other, upload(cuda, DATA)]):
        with pytest.raises(TensorError, match="to lay together: "):
            concatenate(cuda, arrays, stream)


def test_rows_of_any_array(cuda: Cuda, stream: CudaStream):
    for array in (DATA, to_device(cuda, DATA, stream)):
        part = rows(array, 1, 3)
        assert type(part) is type(array)
        np.testing.assert_array_equal(to_host(part), DATA[1:3])
        for start, stop in ((-1, 1), (1, 0), (0, 5)):
            with pytest.raises(TensorError, match="rows"):
                rows(array, start, stop)
    assert np.shares_memory(rows(DATA, 1, 3), DATA)
    with pytest.raises(TensorError, match=r"of shape \[\]"):
        rows(np.float32(1)[...], 0, 1)


def test_a_copy_of_rows_lets_go_of_the_rest(cuda: Cuda, stream: CudaStream):
    array = to_device(cuda, DATA, stream)
    pointer, copy = array.pointer, array.rows(1, 2).copy()
    assert copy.shape == (1, 2, 3) and copy.buffer.nbytes == DATA[1:2].nbytes and copy.pointer % 256 == 0
    copy.synchronize()
    stream.synchronize()
    del array
    gc.collect()
    assert device_array(cuda, DATA.shape, DATA.dtype, stream).pointer == pointer
    np.testing.assert_array_equal(to_host(copy), DATA[1:2])


def test_cuda_array_interface(cuda: Cuda, stream: CudaStream):
    array = to_device(cuda, DATA, stream)
    assert array.rows(1, 2).__cuda_array_interface__ == {
        "shape": (1, 2, 3),
        "typestr": "<f4",
        "data": (array.pointer + 24, False),
        "version": 3,
        "strides": None,
        "stream": stream.handle,
    }
    assert array.rows(4, 4).__cuda_array_interface__["data"] == (0, False)  # as the protocol asks for


def test_arrays_that_do_not_fit(cuda: Cuda, stream: CudaStream):
    buffer = cuda.alloc(16)
    for shape, dtype, offset in (
        ((5,), "f4", 0),
        ((4,), "f4", 4),
        ((1,), "f4", 2),
        ((-1,), "f4", 0),
        ((1,), "f4", -4),
    ):
        with pytest.raises(TensorError, match="a device array of"):
            DeviceArray(buffer, shape, dtype, stream, offset=offset)
    array = DeviceArray(buffer, (2, 2), np.float32, stream)
    for start, stop in ((-1, 1), (1, 0), (0, 3)):
        with pytest.raises(TensorError, match="rows"):
            array.rows(start, stop)
    with pytest.raises(TensorError, match=r"rows 0 to 1 of a device array of shape \[\]"):
        DeviceArray(buffer, (), np.float32, stream).rows(0, 1)
    with pytest.raises(TensorError, match=r"reshape of \[2, 2\] to \[3\]"):
        array.reshape(3)
    assert repr(array) == f"DeviceArray(float32 [2, 2] on {cuda.name})"


def test_a_closed_array(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    array = to_device(cuda, DATA, stream)
    rows = array.rows(0, 1)
    array.close()
    array.close()
    for use in (lambda: array.pointer, lambda: to_host(rows), lambda: rows.use(stream)):
        with pytest.raises(EngineError, match="closed DeviceBuffer"):
            use()


def test_errors_of_the_device_come_through(cuda: Cuda, fake: FakeCuda, stream: CudaStream):
    fake.fail("cudaMalloc", 2)
    with pytest.raises(LimitError, match="for 512 bytes"):
        to_device(cuda, DATA, stream)
    array = to_device(cuda, DATA, stream)
    fake.fail("cudaMemcpyAsync", 1)
    with pytest.raises(EngineError, match="cudaMemcpyAsync"):
        to_host(array)


def test_a_host_runner_takes_device_arrays(cuda: Cuda, stream: CudaStream, toys: Path):
    """Handing an array from one backend to another needs no call in between."""
    with open_runner(toys / "face_mesh.onnx", BackendConfig("cpu")) as runner:
        (spec,) = runner.inputs.values()
        data = np.full([1 if isinstance(axis, str) else axis for axis in spec.shape], 0.25, spec.dtype)
        wanted = runner.infer({spec.name: data})
        got = runner.infer({spec.name: to_device(cuda, data, stream)})
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])
