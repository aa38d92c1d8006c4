"""Arrays on a CUDA device: what runners hand on to each other without a copy to the host and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.engines.cuda import Cuda, CudaStream, DeviceBuffer
from lp_edge.errors import TensorError

__all__ = ["DeviceArray", "device_array", "to_device"]


class DeviceArray:
    """A C-contiguous array in device memory; an :class:`~lp_edge.engines.runner.Array`.

    ``numpy.asarray(array)`` (and :func:`~lp_edge.engines.runner.to_host`) waits for the work that makes it and downloads it.
    Libraries that know ``__cuda_array_interface__`` (CuPy, Numba, PyTorch) read it where it is; they wait for its stream.

    It keeps its memory alive; when the last array on a buffer is dropped, the buffer goes back to its pool. Using it on
    another stream than its own needs ``other.wait(array.stream.record())`` and ``array.use(other)``.

    Args:
        buffer: the memory.
        shape: sizes of all axes.
        dtype: type of the elements.
        stream: on which it is written; reading it on the host waits for this stream.
        offset: bytes from the beginning of ``buffer`` to the first element, a multiple of the element's size.

    Raises:
        TensorError: a size is negative, or the array does not fit into the buffer.

    Example:
        >>> frame = to_device(cuda, np.zeros((1, 512, 512, 3), np.uint8), stream)  # doctest: +SKIP
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
    ) -> None:
        self._buffer = buffer
        self._shape = tuple(int(size) for size in shape)
        self._dtype = np.dtype(dtype)
        self._stream = stream
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
        """The stream on which it is written."""
        return self._stream

    @property
    def pointer(self) -> int:
        """Address of the first element on the device; EngineError when its buffer is closed."""
        return self._buffer.pointer + self._offset

    def use(self, stream: CudaStream) -> None:
        """Say that work queued on ``stream`` uses this memory; see :meth:`~lp_edge.engines.cuda.DeviceBuffer.use`."""
        self._buffer.use(stream)

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
        return DeviceArray(self._buffer, shape, self._dtype, self._stream, offset=self._offset + start * row)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same memory with another shape of the same size; TensorError when the size differs."""
        view = DeviceArray(self._buffer, shape, self._dtype, self._stream, offset=self._offset)
        if view.nbytes != self.nbytes:
            raise TensorError(
                f"reshape of {list(self._shape)} to {list(shape)}",
                "expected as many elements",
                "correct the shape",
            )
        return view

    def copy_to(self, out: npt.NDArray[Any]) -> None:
        """Queue the download into ``out`` on its stream: read ``out`` after ``stream.synchronize()``.

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
        self._buffer.cuda.copy_to_host(self._buffer, out, self._stream, offset=self._offset)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The numbers on the host, always a copy: ValueError when ``copy`` is False, as NumPy asks for."""
        if copy is False:
            raise ValueError("an array on a device cannot be had on the host without a copy")
        out = np.empty(self._shape, self._dtype)
        self.copy_to(out)
        self._stream.synchronize()
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
            "stream": self._stream.handle,
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


def to_device(cuda: Cuda, array: npt.NDArray[Any], stream: CudaStream) -> DeviceArray:
    """A copy of ``array`` on the device, queued on ``stream``; errors as of ``Cuda.alloc`` and ``Cuda.copy_to_device``."""
    result = device_array(cuda, array.shape, array.dtype, stream)
    cuda.copy_to_device(np.asarray(array, order="C"), result.buffer, stream)
    return result
