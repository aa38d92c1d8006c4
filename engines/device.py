"""Arrays on a CUDA device: what runners hand on to each other without a copy to the host and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lp_edge.engines.cuda import Cuda, CudaEvent, CudaStream, DeviceBuffer
from lp_edge.engines.runner import Array, to_host
from lp_edge.errors import TensorError

__all__ = ["DeviceArray", "concatenate", "device_array", "rows", "staged", "upload"]

_SMALL: Final = 64 << 10  # bytes of a download that is copied out of pinned memory, which comes in pages


class DeviceArray:
    """A C-contiguous array in device memory; an :class:`~lp_edge.engines.runner.Array`.

    ``numpy.asarray(array)`` (and :func:`~lp_edge.engines.runner.to_host`) waits for the work that makes it and downloads it.
    Libraries that know ``__cuda_array_interface__`` (CuPy, Numba, PyTorch) read it where it is; they wait for its stream.

    It keeps its memory alive; when the last array on a buffer is dropped, the buffer goes back to its pool. Work that reads it
    on another stream than its own calls :meth:`read_on` before.

    Args:
        buffer: the memory.
        shape: sizes of all axes.
        dtype: type of the elements.
        stream: on which it is written: whoever reads it waits for all that was queued there.
        offset: bytes from the beginning of ``buffer`` to the first element, a multiple of the element's size.
        ready: for an array that is written once, the event behind that: only this is waited for, in place of ``stream``.

    Raises:
        TensorError: a size is negative, or the array does not fit into the buffer.

    Example:
        >>> frame = upload(cuda, np.zeros((1, 512, 512, 3), np.uint8))  # doctest: +SKIP
        >>> np.asarray(frame).shape  # doctest: +SKIP
        (1, 512, 512, 3)
    """

    def __init__(
        self,
        buffer: DeviceBuffer,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        stream: CudaStream,
        *,
        offset: int = 0,
        ready: CudaEvent | None = None,
    ) -> None:
        self._buffer = buffer
        self._shape = tuple(int(size) for size in shape)
        self._dtype = np.dtype(dtype)
        self._stream, self._ready = stream, ready
        self._offset = offset
        if min(self._shape, default=0) < 0 or offset < 0 or offset % self._dtype.itemsize:
            raise TensorError(
                f"a device array of shape {list(self._shape)} at byte {offset}",
                f"expected sizes and an offset from 0, a multiple of {self._dtype.itemsize}",
                "correct the shape or the offset",
            )
        if offset + self.nbytes > buffer.nbytes:
            raise TensorError(
                f"a device array of {self.nbytes} bytes at byte {offset} of a buffer of {buffer.nbytes}",
                "expected it inside",
                "allocate more, or correct shape, dtype and offset",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize

    @property
    def buffer(self) -> DeviceBuffer:
        """The memory that it is a part of."""
        return self._buffer

    @property
    def stream(self) -> CudaStream:
        """A stream on which it is written when all is done that is queued there now."""
        stream = self._copying()
        if self._ready is not None:
            stream.wait(self._ready)
        return stream

    @property
    def pointer(self) -> int:
        """Address of the first element on the device; EngineError when its buffer is closed."""
        return self._buffer.pointer + self._offset

    def use(self, stream: CudaStream) -> None:
        """Say that work queued on ``stream`` uses this memory; see :meth:`~lp_edge.engines.cuda.DeviceBuffer.use`."""
        self._buffer.use(stream)

    def read_on(self, stream: CudaStream) -> None:
        """Let work that is queued on ``stream`` from now on read it: that begins when it is written, and keeps the memory."""
        if self._ready is not None:
            stream.wait(self._ready)
        elif stream is not self._stream:
            stream.wait(self._stream.record())
        self._buffer.use(stream)

    def synchronize(self) -> None:
        """Wait until it is written; EngineError with what failed on the device."""
        (self._ready or self._stream).synchronize()

    def fetch(self) -> Callable[[], npt.NDArray[Any]]:
        """Begin the download; the function that comes back waits and returns the numbers, each time the same array.

        That is a view of pinned memory, which goes back to its pool when the last view of it is dropped (or, up to 64 KiB, a
        copy): what is kept for long is better copied.

        Raises:
            LimitError: there is no memory for it.
            EngineError: the array is closed; from the function that waits: what failed on the device.
        """
        cuda = self._buffer.cuda
        host = cuda.pinned(max(1, self.nbytes)).array(self._dtype, self._shape)
        stream = self._copying()
        self.copy_to(host, stream)
        done = stream.record(cuda.event(patient=True))  # several streams may wait here at a time

        def wait() -> npt.NDArray[Any]:
            nonlocal host
            done.synchronize()
            if host.base is not None and host.nbytes <= _SMALL:
                host = host.copy()
            return host

        return wait

    def copy(self) -> DeviceArray:
        """The same numbers in memory of their own, as ``numpy.ndarray.copy``: rows that are kept let go of the others."""
        cuda = self._buffer.cuda
        return _joined(cuda, [self], self._shape, cuda.transfer_stream())

    def rows(self, start: int, stop: int) -> DeviceArray:
        """A view of the rows ``start`` to ``stop`` (exclusive) of the first axis; shares the memory.

        Raises:
            TensorError: there are no such rows, or no first axis.
        """
        if not self._shape or not 0 <= start <= stop <= self._shape[0]:
            raise TensorError(
                f"rows {start} to {stop} of a device array of shape {list(self._shape)}",
                "expected 0 <= start <= stop <= the size of its first axis",
                "correct the rows",
            )
        row = self.nbytes // self._shape[0] if self._shape[0] else 0
        shape = (stop - start, *self._shape[1:])
        return self._view(shape, start * row)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory with another shape of the same size; TensorError when the size differs."""
        view = self._view(shape, 0)
        if view.nbytes != self.nbytes:
            raise TensorError(
                f"reshape of {list(self._shape)} to {list(shape)}",
                "expected as many elements",
                "correct the shape",
            )
        return view

    def _copying(self) -> CudaStream:
        """Where it is copied from: its own stream, or any where only ``ready`` is waited for."""
        return self._stream if self._ready is None else self._buffer.cuda.transfer_stream()

    def _view(self, shape: tuple[int, ...], start: int) -> DeviceArray:
        offset = self._offset + start
        return DeviceArray(self._buffer, shape, self._dtype, self._stream, offset=offset, ready=self._ready)

    def copy_to(self, out: npt.NDArray[Any], stream: CudaStream | None = None) -> None:
        """Queue the download into ``out`` on a stream, by default its own: read ``out`` after ``stream.synchronize()``.

        Fast, and alone at work while the host goes on, only where ``out`` is a view of a
        :class:`~lp_edge.engines.cuda.PinnedBuffer`.

        Raises:
            TensorError: shape or dtype differ, or ``out`` cannot be written as it is.
        """
        if out.shape != self._shape or out.dtype != self._dtype:
            raise TensorError(
                f"download of {self._dtype.name} {list(self._shape)} into {out.dtype.name} {list(out.shape)}",
                "expected the same dtype and shape",
                "pass numpy.empty(array.shape, array.dtype)",
            )
        stream = stream or self._copying()
        self.read_on(stream)
        self._buffer.cuda.copy_to_host(self._buffer, out, stream, offset=self._offset)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The numbers on the host, always a copy: ValueError when ``copy`` is False, as NumPy asks for."""
        if copy is False:
            raise ValueError("an array on a device cannot be had on the host without a copy")
        out = np.empty(self._shape, self._dtype)
        stream = self._copying()
        self.copy_to(out, stream)
        stream.synchronize()
        return out if dtype is None else out.astype(dtype, copy=False)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""
        return {
            "shape": self._shape,
            "typestr": self._dtype.str,
            "data": (self.pointer if self.nbytes else 0, False),
            "version": 3,
            "strides": None,
            "stream": self.stream.handle,
        }

    def close(self) -> None:
        """Give its memory back, also from under its views; may be called more than once."""
        self._buffer.close()

    def __repr__(self) -> str:
        return f"DeviceArray({self._dtype.name} {list(self._shape)} on {self._buffer.cuda.name})"


def device_array(cuda: Cuda, shape: tuple[int, ...], dtype: npt.DTypeLike, stream: CudaStream) -> DeviceArray:
    """An array with undefined content in memory of its own, to be written on ``stream``; errors as of ``Cuda.alloc``."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return DeviceArray(cuda.alloc(max(1, nbytes), stream=stream), shape, dtype, stream)


def upload(cuda: Cuda, array: npt.NDArray[Any]) -> DeviceArray:
    """A copy of ``array`` on the device, through pinned memory: queued when this returns, and ``array`` may be changed.

    Raises:
        LimitError: there is no memory for it, on the device or pinned on the host.
    """
    return _joined(cuda, [array], array.shape, cuda.transfer_stream())


def concatenate(cuda: Cuda, arrays: Sequence[Array], stream: CudaStream) -> DeviceArray:
    """Arrays laid together along the first axis on the device; queued on ``stream`` when this returns.

    Args:
        cuda: the device.
        arrays: one or more, on this device or the host, of the same dtype and alike in all axes but the first. One alone, on the
            device, comes back as it is.
        stream: where the copies run. Not one that another thread may be capturing.

    Raises:
        TensorError: they do not fit together.
        LimitError: there is no memory for them.
    """
    first = arrays[0]
    if len(arrays) == 1 and isinstance(first, DeviceArray):
        return first
    kinds = {(np.dtype(array.dtype), tuple(array.shape[1:])) for array in arrays}
    if len(kinds) > 1 or not first.shape:
        told = ", ".join(f"{np.dtype(array.dtype).name} {list(array.shape)}" for array in arrays)
        raise TensorError(
            f"device arrays to lay together: {told}",
            "expected one dtype, and sizes that differ in the first axis alone",
            "correct the arrays",
        )
    return _joined(cuda, arrays, (sum(array.shape[0] for array in arrays), *first.shape[1:]), stream)


def staged(array: Array, cuda: Cuda, network: str) -> Array:
    """An input of a network on ``cuda`` as it can be read: as it is on that device, else on the host.

    Raises:
        TensorError: it lies on another device.
    """
    if not isinstance(array, DeviceArray):
        return to_host(array)
    if (other := array.buffer.cuda.device) != cuda.device:
        raise TensorError(
            f"{network}: an input lies on device {other}",
            f"expected it on device {cuda.device}, where the network runs, or on the host",
            "pass numpy.asarray(array), or open both on one device",
        )
    return array


def rows(array: Array, start: int, stop: int) -> Array:
    """The rows ``start`` to ``stop`` (exclusive) of an array's first axis, as a view where it is; TensorError when there are none.

    Example:
        >>> rows(np.arange(4), 1, 3)
        array([1, 2])
    """
    if isinstance(array, DeviceArray):
        return array.rows(start, stop)
    host = to_host(array)
    if not host.shape or not 0 <= start <= stop <= host.shape[0]:
        raise TensorError(
            f"rows {start} to {stop} of an array of shape {list(host.shape)}",
            "expected 0 <= start <= stop <= the size of its first axis",
            "correct the rows",
        )
    view: npt.NDArray[Any] = host[start:stop]
    return view


def _joined(cuda: Cuda, arrays: Sequence[Array], shape: tuple[int, ...], stream: CudaStream) -> DeviceArray:
    """The arrays one behind the other in new memory, seen with another shape of the same size."""
    dtype = np.dtype(arrays[0].dtype)
    buffer = cuda.alloc(max(1, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize), stream=stream)
    start = 0
    for array in arrays:
        if isinstance(array, DeviceArray):
            array.read_on(stream)
            offset, size = array.pointer - array.buffer.pointer, array.nbytes
            if size:
                cuda.copy_on_device(
                    array.buffer, buffer, size, stream, source_offset=offset, target_offset=start
                )
        elif size := (host := np.asarray(array)).nbytes:
            staged = cuda.pinned(size).array(dtype, host.shape)
            np.copyto(staged, host)
            cuda.copy_to_device(staged, buffer, stream, offset=start)
        start += size
    return DeviceArray(buffer, shape, dtype, stream, ready=stream.record(cuda.event(patient=True)))
