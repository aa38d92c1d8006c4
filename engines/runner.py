"""The runner contract: what every backend promises to the code above it.

A runner holds one network. Tensors go in and come out by name; names, dtypes and shapes are checked here, once
for all backends, so a backend only fills in :meth:`Runner._infer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lp_edge.errors import EngineError, TensorError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Array", "Runner", "TensorSpec", "WrappedRunner", "fetch", "to_host"]


@runtime_checkable
class Array(Protocol):
    """A dense tensor, on the host (``numpy.ndarray``) or on a device (:class:`lp_edge.engines.device.DeviceArray`).

    Whoever needs the numbers on the host calls :func:`to_host` (or ``numpy.asarray``), which is free for NumPy
    arrays and a transfer for device arrays. Handing an array from one runner to the next needs no such call.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes."""

    @property
    def dtype(self) -> Any:
        """Something ``numpy.dtype`` understands."""

    def __array__(self, *args: Any, **kwargs: Any) -> npt.NDArray[Any]:
        """The same numbers on the host."""


def to_host(array: Array) -> npt.NDArray[Any]:
    """The array as a C-contiguous ``numpy.ndarray``; the same object where it already is one."""
    # asarray with order="C" keeps zero axes as they are; ascontiguousarray would make them one.
    return np.asarray(array, order="C")


def fetch(array: Array) -> Callable[[], npt.NDArray[Any]]:
    """Begin to bring an array to the host; the function that comes back waits and returns it.

    The result is C-contiguous and read-only by convention: it may be memory that the device copied into. Begin first, do
    something else, then wait: the copy runs meanwhile.

    Example:
        >>> wait = fetch(np.arange(3))
        >>> wait()
        array([0, 1, 2])
    """
    begin = getattr(array, "fetch", None)
    if begin is None:
        return lambda: to_host(array)
    waiting: Callable[[], npt.NDArray[Any]] = begin()
    return waiting


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of an input or output.

    Attributes:
        name: the tensor's name in the graph.
        dtype: NumPy dtype, native byte order.
        shape: one entry per axis: an int is a fixed size; a string names a dynamic axis. Within one call
            equal names have equal sizes. A name that begins with ``?`` is anonymous: its size is not compared
            with any other.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name} [{', '.join(str(a) for a in self.shape)}]"


class Runner(ABC):
    """One network on one backend; a context manager.

    ``infer`` may be called from several threads at once.

    Args:
        name: what the network is called in messages.
        inputs, outputs: specifications of all tensors, in graph order.
    """

    def __init__(self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._name = name
        self._inputs = MappingProxyType({spec.name: spec for spec in inputs})
        self._outputs = MappingProxyType({spec.name: spec for spec in outputs})
        self._closed = False

    @property
    def name(self) -> str:
        """What the network is called in messages."""
        return self._name

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Specification of every input by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Specification of every output by name."""
        return self._outputs

    @property
    @abstractmethod
    def backend(self) -> str:
        """Name of the backend, as in ``BackendConfig.backend``; never ``auto``."""

    @property
    @abstractmethod
    def device(self) -> str:
        """The device in words."""

    @property
    def loans(self) -> bool:
        """Whether results are loans.

        False: every array that ``infer`` returns is a copy that belongs to the caller. True: it is a view of the
        runner's own memory, valid until the next ``infer`` or ``close`` of this runner; copy it to keep it, and do not
        share the runner between threads. Host backends never lend.
        """
        return False

    @property
    def resident(self) -> bool:
        """Whether results can stay on a device, and arrays be brought there for longer than a call."""
        return False

    @property
    def max_batch(self) -> int | None:
        """Largest size of the batch axis; None = no bound but memory."""
        return None

    def upload(self, array: npt.NDArray[Any]) -> Array:
        """A copy of a host array where this runner reads it fastest; the array itself where that is the host.

        For what many calls read: the features of a portrait, the pixels of a still picture.

        Raises:
            LimitError: there is no memory for it.
        """
        return array

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        """Arrays laid together along the first axis, where this runner reads them fastest.

        Args:
            arrays: one or more, of the same dtype and alike in all axes but the first; one alone comes back as it is.
        """
        return arrays[0] if len(arrays) == 1 else np.concatenate([to_host(array) for array in arrays])

    def infer(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None, *, keep: bool = False
    ) -> dict[str, Array]:
        """Run the network once.

        Args:
            feeds: exactly the inputs of the graph by name, with the dtype and shape of their specification.
                Arrays that are not contiguous are copied. They are only read.
            outputs: names of the outputs wanted; None = all. A backend may skip what is not wanted.
            keep: leave the results where the network computes them. A :attr:`resident` runner returns before they are
                written, as arrays on its device that know what to wait for; any other ignores it.

        Returns:
            The outputs by name: copies owned by the caller, or loans (see :attr:`loans`).

        Raises:
            TensorError: a name, dtype or shape does not fit.
            EngineError: the runner is closed, or the backend failed.
        """
        if self._closed:
            raise EngineError(
                f"{self._name}: infer on a closed runner",
                "expected an open one",
                "call infer inside the runner's with block",
            )
        wanted = self._wanted(outputs)
        staged = self._checked(feeds)
        results = self._infer_kept(staged, wanted) if keep and self.resident else self._infer(staged, wanted)
        if missing := [name for name in wanted if name not in results]:
            raise EngineError(
                f"{self._name}: backend {self.backend} did not return {', '.join(missing)}",
                f"expected {', '.join(wanted)}",
                "use another backend and report this",
            )
        return results

    def close(self) -> None:
        """Release the network; may be called more than once."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for backends ---------------------------------------------------------------------------

    @abstractmethod
    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        """Run with validated, staged feeds and return at least ``outputs``; EngineError on failure."""

    def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        """As :meth:`_infer`, with results on the device; for backends that are :attr:`resident`."""
        return self._infer(feeds, outputs)

    @abstractmethod
    def _close(self) -> None:
        """Release what the backend holds; called once."""

    def _stage(self, array: Array) -> Array:
        """Bring a validated input to where the backend reads it; here: a contiguous host array."""
        return to_host(array)

    # -- validation -----------------------------------------------------------------------------

    def _wanted(self, outputs: Sequence[str] | None) -> tuple[str, ...]:
        if outputs is None:
            return tuple(self._outputs)
        if isinstance(outputs, str) or not outputs:
            raise TensorError(
                f"{self._name}: outputs is {outputs!r}",
                f"expected a list with some of {', '.join(self._outputs)}",
                "name at least one output, or pass None for all",
            )
        for name in outputs:
            if name not in self._outputs:
                raise TensorError(
                    f"{self._name}: there is no output {name!r}",
                    f"expected some of {', '.join(self._outputs)}",
                    "correct the name; lp_edge.engines.names holds them all",
                )
        return tuple(dict.fromkeys(outputs))

    def _checked(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        expected = f"expected exactly {', '.join(self._inputs) or 'none'}"
        for name in feeds:
            if name not in self._inputs:
                raise TensorError(
                    f"{self._name}: there is no input {name!r}", expected, "leave it out or correct the name"
                )
        axes: dict[str, tuple[int, str]] = {}
        staged: dict[str, Array] = {}
        for name, spec in self._inputs.items():
            if name not in feeds:
                raise TensorError(f"{self._name}: input {name} is missing", expected, f"pass {spec}")
            array = feeds[name]
            self._check_one(spec, array, axes)
            staged[name] = self._stage(array)
        return staged

    def _check_one(self, spec: TensorSpec, array: Array, axes: dict[str, tuple[int, str]]) -> None:
        """Raise TensorError unless ``array`` fits ``spec``; ``axes`` collects size and origin of the named axes."""
        if not isinstance(array, Array):
            raise TensorError(
                f"{self._name}: input {spec.name} is a {type(array).__name__}",
                f"expected an array {spec}",
                f"pass numpy.asarray(..., numpy.{spec.dtype.name})",
            )
        dtype = np.dtype(array.dtype)
        if dtype != spec.dtype:
            raise TensorError(
                f"{self._name}: input {spec.name} has dtype {dtype}",
                f"expected {spec.dtype.name}",
                f"convert it on purpose, for example with .astype(numpy.{spec.dtype.name})",
            )
        shape = tuple(array.shape)
        got = f"{self._name}: input {spec.name} has shape {list(shape)}"
        layout = f"[{', '.join(str(a) for a in spec.shape)}]"
        if len(shape) != len(spec.shape):
            raise TensorError(
                got, f"expected {len(spec.shape)} axes {layout}", "add or remove axes; N is the batch"
            )
        for position, (size, axis) in enumerate(zip(shape, spec.shape, strict=True)):
            if size == 0:
                raise TensorError(
                    got,
                    f"expected {layout} without empty axes",
                    "skip the call when there is nothing to compute",
                )
            if isinstance(axis, int):
                if size != axis:
                    raise TensorError(
                        got, f"expected {layout}: axis {position} is {axis}", "resize or reshape the array"
                    )
            elif not axis.startswith("?"):
                known, origin = axes.setdefault(axis, (size, spec.name))
                if size != known:
                    raise TensorError(
                        got,
                        f"expected {layout} with {axis} = {known}, as in {origin}",
                        f"give both the same size along {axis}",
                    )


class WrappedRunner(Runner):
    """A runner that passes everything on to another one, for subclasses that watch or change a part of it.

    Args:
        inner: the other one; closed with this one.
    """

    def __init__(self, inner: Runner) -> None:
        super().__init__(inner.name, tuple(inner.inputs.values()), tuple(inner.outputs.values()))
        self.inner = inner

    @property
    def backend(self) -> str:
        return self.inner.backend

    @property
    def device(self) -> str:
        return self.inner.device

    @property
    def loans(self) -> bool:
        return self.inner.loans

    @property
    def resident(self) -> bool:
        return self.inner.resident

    @property
    def max_batch(self) -> int | None:
        return self.inner.max_batch

    def upload(self, array: npt.NDArray[Any]) -> Array:
        return self.inner.upload(array)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        return self.inner.concatenate(arrays)

    def _stage(self, array: Array) -> Array:
        # What is on a device stays there; the inner runner stages what it gets.
        return to_host(array) if isinstance(array, np.ndarray) else array

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self.inner.infer(feeds, outputs)

    def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self.inner.infer(feeds, outputs, keep=True)

    def _close(self) -> None:
        self.inner.close()
