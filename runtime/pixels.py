"""Crops, resizing and paste-back, on the host or on the device where the networks run.

A family's adapter calls a :class:`Pixels` and knows nothing of devices. :class:`HostPixels` is OpenCV and NumPy, as on a CPU.
:class:`DevicePixels` runs the graphs in ``device_graphs/`` (made by :mod:`lp_edge.export.device_graphs`) through runners: a crop
that a network drew stays where it is, and only the changed region comes down. Both agree to one grey level.

::

    source frame ── frame ─┬─ crop ── networks ── crops ─┐
                           └─ place ──────────────── draw ─ Drawn.write → result

Drawing is split in two so that a device works while the host does something else: :meth:`Place.draw` queues the work and begins
the download, :meth:`Drawn.write` waits.
"""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.device import rows
from lp_edge.engines.runner import Array, Runner, fetch, to_host
from lp_edge.errors import ConfigError, EngineError
from lp_edge.runtime.crop import CROP_SIZE, cut
from lp_edge.runtime.device_inputs import paste_matrix, resize_weights, sampling_matrix
from lp_edge.runtime.paste_back import PastePlan, crop_mask, paste_back, placed_rect, soft_mask
from lp_edge.runtime.resample import MAX_CROP, resize_crop

__all__ = [
    "MAX_FRAME_SIDE",
    "MAX_REGION_SIDE",
    "DevicePixels",
    "Download",
    "Drawn",
    "HostPixels",
    "Pixels",
    "Place",
    "Rect",
    "graph_file",
    "graph_options",
    "open_device_graph",
]

_LOG = logging.getLogger("lp_edge")

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]
Rect = tuple[int, int, int, int]
"""x0, y0, x1, y1 in the frame, whole pixels."""

MAX_FRAME_SIDE: Final = 4096
"""Largest side of a source frame that is kept on a device, px; larger ones stay on the host."""
MAX_REGION_SIDE: Final = 2304
"""Largest side of a region that is cut or pasted on a device, px; larger ones are done on the host."""


class Drawn(ABC):
    """One animated face of one frame, perhaps still being computed.

    Attributes:
        rect: the changed region.
    """

    rect: Rect

    @abstractmethod
    def write(self, out: U8) -> None:
        """Wait for the face and put it into a frame.

        Args:
            out: uint8 ``[H, W, 3]``, contiguous: the source frame, or that with other faces in it.

        Raises:
            ConfigError: ``out`` is not like the frame of the place.
        """


class Place(ABC):
    """Where crops of one source face go, prepared once per source picture or frame. A dataclass, what it keeps in fields: so
    that its memory can be added up.

    Attributes:
        rect: the region that drawing changes; empty (x0 = x1) where the crop lies outside the frame.
    """

    rect: Rect

    @abstractmethod
    def draw(self, crops: Array, *, blend_on_host: bool = False) -> list[Drawn]:
        """Begin to put crops into the frame.

        Args:
            crops: uint8 ``[N, S, S, 3]`` of any side, on the host or the device; ``[N, h, w, 3]`` for :meth:`Pixels.rect_place`.
            blend_on_host: the region overlaps another face's, so that the source's pixels are not what will be below this one:
                the crop comes down and is blended with what ``out`` holds.

        Returns:
            N faces, one for each crop.
        """


class Pixels(ABC):
    """The image operations around the networks; a context manager. May be called from several threads.

    Attributes:
        resident: crops and source frames stay on a device.
    """

    resident: bool

    @abstractmethod
    def frame(self, rgb: U8) -> Array:
        """A frame of a source clip, where its crops are cut.

        Args:
            rgb: uint8 ``[H, W, 3]``; must not change as long as it is in use.

        Returns:
            What :meth:`crop`, :meth:`place` and :meth:`rect_place` take: on the host ``rgb`` itself, on a device
            uint8 ``[1, H, W, 3]``. The last few are remembered, so that asking twice uploads once.
        """

    @abstractmethod
    def crop(self, frame: Array, to_crop: F64, *, size: int = CROP_SIZE, reduce: int = 1) -> Array:
        """A square crop, as :func:`lp_edge.runtime.crop.cut` and :meth:`~lp_edge.runtime.crop.Crop.network_input` make it.

        Args:
            frame: uint8 ``[H, W, 3]`` on the host, or of :meth:`frame`.
            to_crop: float64 ``[3, 3]``, frame px → px of a crop of ``size``.
            size: side of that crop, px.
            reduce: whole factor, a divisor of ``size``, by which it is reduced afterwards.

        Returns:
            uint8 ``[1, size / reduce, size / reduce, 3]``, where the frame is.

        Raises:
            ConfigError: ``reduce`` is no divisor of ``size``.
            TensorError: ``frame`` is no such array.
        """

    @abstractmethod
    def place(self, frame: Array, to_frame: F64, crop_size: int) -> Place:
        """Where turned square crops go; blended as by :class:`~lp_edge.runtime.paste_back.PastePlan`.

        Args:
            frame: uint8 ``[H, W, 3]`` on the host: what lies below the face is uploaded once and stays, for a picture that many
                crops go into. Of :meth:`frame`: for a source that moves.
            to_frame: float64 ``[3, 3]``, px of a crop of ``crop_size`` → frame px.
            crop_size: side, px, to which crops of another size are resized first (:meth:`resize`).

        Raises:
            ConfigError: ``to_frame`` is no invertible affine map.
        """

    @abstractmethod
    def rect_place(self, frame: Array, rect: Rect) -> Place:
        """An upright rectangle, as :func:`lp_edge.runtime.paste_back.paste_back` fills it.

        Args:
            frame: as in :meth:`place`.
            rect: x0, y0, x1, y1 within the frame.
        """

    @abstractmethod
    def resize(self, crops: Array, size: int) -> Array:
        """Square crops of another size, as :func:`lp_edge.runtime.resample.resize_crop`.

        Args:
            crops: uint8 ``[N, S, S, 3]``.
            size: 1 to :data:`~lp_edge.runtime.resample.MAX_CROP`.

        Returns:
            uint8 ``[N, size, size, 3]``; ``crops`` itself where it has that size.

        Raises:
            ConfigError: the crops are no square RGB pictures, or the size is out of range.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what is on the device; may be called more than once."""

    def __enter__(self) -> Pixels:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HostPixels(Pixels):
    """OpenCV and NumPy, bit for bit what :mod:`lp_edge.runtime.paste_back`, ``crop`` and ``resample`` make; no copies."""

    resident = False

    def frame(self, rgb: U8) -> U8:
        """``rgb`` itself."""
        return rgb

    def crop(self, frame: Array, to_crop: F64, *, size: int = CROP_SIZE, reduce: int = 1) -> U8:
        """See :meth:`Pixels.crop`."""
        if reduce < 1 or size % reduce:
            raise ConfigError(f"reduce is {reduce}", f"expected a divisor of {size}", "use 1 or 2")
        return cut(np.asarray(frame), to_crop, size=size).network_input(size // reduce)[None]

    def place(self, frame: Array, to_frame: F64, crop_size: int) -> Place:
        """See :meth:`Pixels.place`."""
        height, width = frame.shape[:2]
        return _host_place(PastePlan.prepare(to_frame, (width, height), crop_size))

    def rect_place(self, frame: Array, rect: Rect) -> Place:
        """See :meth:`Pixels.rect_place`."""
        return _HostPlace(rect, lambda crop, out: paste_back(out, crop, rect, out=out))

    def resize(self, crops: Array, size: int) -> Array:
        """See :meth:`Pixels.resize`."""
        if len(crops.shape) == 4 and crops.shape[1] == crops.shape[2] == size:
            return crops
        resized = [resize_crop(crop, size) for crop in to_host(crops)]
        return resized[0][None] if len(resized) == 1 else np.stack(resized)

    def close(self) -> None:
        """There is nothing to free."""


# -- drawing on the host ----------------------------------------------------------------------------------


class Download:
    """Rows of an array on their way to the host, for several to wait for.

    Args:
        array: ``[N, …]``, uint8, on the host or a device.
    """

    def __init__(self, array: Array) -> None:
        self._wait = fetch(array)
        self._shared = array.shape[0] > 1 or not isinstance(array, np.ndarray)
        self._lock = threading.Lock()
        self._rows: npt.NDArray[Any] | None = None

    def row(self, index: int) -> U8:
        """Wait for one; it is not to be changed."""
        with self._lock:
            if self._rows is None:
                self._rows = self._wait()
            return np.asarray(self._rows[index], np.uint8)

    def picture(self, index: int) -> U8:
        """Wait for one, to keep: a row of several keeps them all, perhaps in page-locked memory, and is copied."""
        row = self.row(index)
        return row.copy() if self._shared else row


@dataclass(frozen=True)
class _HostDrawn(Drawn):
    """A crop that is blended into what lies below it."""

    rect: Rect
    download: Download
    row: int
    put: Callable[[U8, U8], object]

    def write(self, out: U8) -> None:
        self.put(self.download.row(self.row), out)


@dataclass(frozen=True)
class _HostPlace(Place):
    """A place for crops on the host; ``put`` blends a crop into a frame, as ``plan`` says where there is one."""

    rect: Rect
    put: Callable[[U8, U8], object]
    plan: PastePlan | None = None

    def draw(self, crops: Array, *, blend_on_host: bool = False) -> list[Drawn]:
        download = Download(crops)
        return [_HostDrawn(self.rect, download, row, self.put) for row in range(crops.shape[0])]


def _host_place(plan: PastePlan) -> _HostPlace:
    """The place of a plan."""
    return _HostPlace(
        plan.rect, lambda crop, out: plan.paste(out, resize_crop(crop, plan.crop_size), out=out), plan
    )


# -- the graphs that are shipped --------------------------------------------------------------------------

_FOLDER: Final = Path(__file__).parent / "device_graphs"
_LARGE: Final = "_large"
_BATCH: Final = 4  # crops at once
# Of regions that several crops are pasted into at once: 1080 lines, as a multiple of the step.
_SMALL_SIDE: Final = 1088
_STEP: Final = 64
_REMEMBERED, _KEPT = 4, 16  # frames, masks and weights that stay on the device

_Range = tuple[int, int, int]
_ONE: Final[_Range] = (1, 1, 1)
_FRAME_RANGES: Final[Mapping[str, _Range]] = {
    "frames": _ONE,
    "H": (1, 1088, MAX_REGION_SIDE),
    "W": (1, 1920, MAX_FRAME_SIDE),
    "w": (1, 768, MAX_REGION_SIDE),
    "crops": (1, 1, _BATCH),
}
_RESIZE_RANGES: Final[Mapping[str, _Range]] = {
    "crops": (1, 1, _BATCH),
    "given": (1, CROP_SIZE, MAX_CROP),
    "wanted": (1, 2 * CROP_SIZE, MAX_CROP),
}


def _paste_ranges(batch: int, region: int, crop: int) -> Mapping[str, _Range]:
    return {
        **dict.fromkeys(("patches", "placements", "masks"), _ONE),
        "crops": (1, 1, batch),
        **dict.fromkeys(("h", "w"), (1, 768, region)),
        **dict.fromkeys(("side", "crop_h", "crop_w"), (1, CROP_SIZE, crop)),
    }


_RANGES: Final[Mapping[str, Mapping[str, _Range]]] = {
    **dict.fromkeys((names.CROP_512_HALVED, names.CUT_REGION), _FRAME_RANGES),
    names.RESIZE_CROPS: _RESIZE_RANGES,
    **{
        name + suffix: ranges
        for name in (names.PASTE_STILL, names.PASTE_MOVING, names.PASTE_RECT)
        for suffix, ranges in (
            ("", _paste_ranges(_BATCH, _SMALL_SIDE, _SMALL_SIDE)),
            (_LARGE, _paste_ranges(1, MAX_REGION_SIDE, MAX_REGION_SIDE)),
        )
    },
}
"""Graph -> named axis -> smallest, usual and largest size. An engine reserves memory for the largest of all its axes at once,
hence few crops into a region of up to 1088 px a side, and one crop into larger ones by an engine of their own, built when there is
a first one."""


# Options of backend tensorrt that are as good for these graphs as for the networks.
_KEPT_OPTIONS: Final = (
    "cache_dir",
    "workspace_mib",
    "optimization_level",
    "timing_cache",
    "hardware_compatibility",
    "slots",
)


def graph_file(name: str) -> Path:
    """The ONNX file of a graph that :class:`DevicePixels` asks for.

    Raises:
        EngineError: there is no such graph, or it was not installed.
    """
    path = _FOLDER / f"{name.removesuffix(_LARGE)}.onnx"
    if name not in _RANGES or not path.is_file():
        raise EngineError(
            f"no device graph {name} ({path})",
            f"expected one of {', '.join(sorted(_RANGES))}",
            "install lp-edge again",
        )
    return path


def graph_options(config: BackendConfig, name: str) -> BackendConfig:
    """How a device graph is run where the networks run with ``config``.

    The graphs need float32 throughout, and one engine for all sizes: frames up to :data:`MAX_FRAME_SIDE`, regions up to
    :data:`MAX_REGION_SIDE`. So the ranges of axes and batches are theirs, options for networks are left out, and those that say where
    things lie and how engines are built stay.

    Args:
        config: of the networks, its backend named.
        name: of the graph, as :class:`DevicePixels` asks for it.

    Raises:
        EngineError: there is no such graph.
    """
    graph_file(name)
    given, ranges = config.provider_options, _RANGES[name]
    if config.backend == "tensorrt":
        options = {key: value for key, value in given.items() if key in _KEPT_OPTIONS}
        # Regions and addresses change from call to call: a recorded launch would be used once.
        options["cuda_graphs"] = "false"
        options["max_batch"] = str(ranges["crops"][2])
        options["usual_batch"] = str(ranges["crops"][1])
        options["axes"] = ",".join(f"{axis}={a}:{b}:{c}" for axis, (a, b, c) in ranges.items())
        return replace(config, provider_options=options)
    if config.backend == "ort-tensorrt":
        # It would build an engine for every new size; the CUDA provider reads the same memory.
        return replace(config, backend="cuda", provider_options={})
    unfit = ("nv_profile_", "enable_cuda_graph")  # for fixed sizes, or for those of the networks
    options = {key: value for key, value in given.items() if not key.startswith(unfit)}
    return replace(config, provider_options=options)


def open_device_graph(name: str, config: BackendConfig) -> Runner:
    """A runner for a device graph on the backend of the networks, for :class:`DevicePixels`.

    Example:
        >>> pixels = DevicePixels(lambda name: open_device_graph(name, config))  # doctest: +SKIP

    Raises:
        BackendUnavailable, EngineError: as :func:`lp_edge.engines.backends.open_runner`.
    """
    return open_runner(graph_file(name), graph_options(config, name), name=name)


# -- drawing on a device ----------------------------------------------------------------------------------


def _lines(frame: Array, start: int, stop: int) -> Array:
    """Lines of a frame ``[1, H, W, 3]``, without a copy: they lie together, and are a frame again."""
    view: Any = frame
    _, height, width, channels = frame.shape
    lines: Any = rows(view.reshape(height, width, channels), start, stop)
    picture: Array = lines.reshape(1, stop - start, width, channels)
    return picture


def _paste_name(name: str, region: Rect, *crop: int) -> str:
    """The graph that pastes crops of these sides into a region: for large ones that with the suffix."""
    largest = max(region[2] - region[0], region[3] - region[1], *crop)
    return name + _LARGE if largest > _SMALL_SIDE else name


def _span(low: float, high: float, limit: int) -> tuple[int, int]:
    """A part of 0 … ``limit`` that holds ``low`` to ``high`` as far as these lie in it, of a size in steps.

    A region that follows a face has another size in every frame; a device prepares for every new shape.
    """
    first = min(max(math.floor(low), 0), limit - 1)
    last = min(max(math.ceil(high), first + 1), limit)
    size = min(-(-(last - first) // _STEP) * _STEP, limit)
    start = min(first, limit - size)
    return start, start + size


@dataclass(frozen=True)
class _PatchDrawn(Drawn):
    """A region whose pixels are finished; ``skip`` lines and columns of it lie before ``rect``."""

    rect: Rect
    frame_size: tuple[int, int]
    skip: tuple[int, int]
    download: Download
    row: int

    def write(self, out: U8) -> None:
        width, height = self.frame_size
        if out.shape != (height, width, 3) or out.dtype != np.uint8:
            raise ConfigError(
                f"out is {out.dtype}{list(out.shape)}",
                f"the place is in a frame uint8{[height, width, 3]}",
                "pass a copy of the source frame",
            )
        (x0, y0, x1, y1), (left, top) = self.rect, self.skip
        patch = self.download.row(self.row)
        out[y0:y1, x0:x1] = patch[top : top + y1 - y0, left : left + x1 - x0]


@dataclass(frozen=True)
class _DevicePlace(Place):
    """A place in a frame of ``frame_size``.

    Attributes:
        region: what is computed, x0, y0, x1, y1; holds ``rect``.
        fixed: inputs of the graph that do not change from crop to crop.
        paint: those and crops → regions uint8 ``[N, h, w, 3]`` on the device.
        host: makes the same place on the host, for crops that are blended there.
    """

    rect: Rect
    region: Rect
    frame_size: tuple[int, int]
    fixed: dict[str, Array]
    paint: Callable[[dict[str, Array], Array], Array]
    host: Callable[[], Place]

    @cached_property
    def _on_host(self) -> Place:
        return self.host()

    def draw(self, crops: Array, *, blend_on_host: bool = False) -> list[Drawn]:
        if blend_on_host:
            return self._on_host.draw(crops)
        download = Download(self.paint(self.fixed, crops))
        skip = (self.rect[0] - self.region[0], self.rect[1] - self.region[1])
        return [_PatchDrawn(self.rect, self.frame_size, skip, download, row) for row in range(crops.shape[0])]


class DevicePixels(Pixels):
    """The shipped graphs on a device; within one grey level of :class:`HostPixels`.

    Sources that are too large (:data:`MAX_FRAME_SIDE`, :data:`MAX_REGION_SIDE`) are done on the host, with a line in the log. Everything that it
    returns may be an array on the device; nothing waits for the device but :meth:`Drawn.write`.

    Args:
        open_graph: opens a graph by name, when it is first needed; see :func:`open_device_graph`. :meth:`close` closes what it opened.

    Example:
        >>> with DevicePixels(lambda name: open_device_graph(name, BackendConfig("cuda"))) as pixels:  # doctest: +SKIP
        ...     place = pixels.place(picture, to_frame, 512)
        ...     for drawn in place.draw(crops):
        ...         drawn.write(out)
    """

    resident = True

    def __init__(self, open_graph: Callable[[str], Runner]) -> None:
        self._open_graph, self._host = open_graph, HostPixels()
        self._lock, self._opening = threading.Lock(), threading.Lock()
        self._runners: dict[str, Runner] = {}
        self._frames: deque[tuple[U8, Array]] = deque(maxlen=_REMEMBERED)
        self._kept: dict[Hashable, Array] = {}  # masks and weights, by what they are for
        self._told: set[tuple[int, int, str]] = set()
        self._closed = False

    # -- the interface ---------------------------------------------------------------------------

    def frame(self, rgb: U8) -> Array:
        """See :meth:`Pixels.frame`; a frame beyond :data:`MAX_FRAME_SIDE` stays on the host."""
        if max(rgb.shape[:2]) > MAX_FRAME_SIDE:
            self._tell(rgb, f"at most {MAX_FRAME_SIDE} px a side")
            return rgb
        with self._lock:
            for known, array in self._frames:
                if known is rgb:
                    return array
        array = self._upload(names.CUT_REGION, rgb[None])
        with self._lock:
            self._frames.append((rgb, array))
        return array

    def crop(self, frame: Array, to_crop: F64, *, size: int = CROP_SIZE, reduce: int = 1) -> Array:
        """See :meth:`Pixels.crop`; the graph is that of what LivePortrait's networks see, other sizes are cut on the host."""
        if len(frame.shape) == 3 or (size, reduce) != (CROP_SIZE, 2):
            return self._host.crop(self._on_host(frame), to_crop, size=size, reduce=reduce)
        # Lines that the crop does not read would be cast to float32 in vain.
        corners = np.array([(x, y, 1.0) for x in (-1, size) for y in (-1, size)])
        ys = corners @ np.linalg.inv(to_crop)[1]
        top, bottom = _span(float(ys.min()) - 1, float(ys.max()) + 2, frame.shape[1])
        if bottom - top > MAX_REGION_SIDE:
            self._tell(frame, f"crops from at most {MAX_REGION_SIDE} lines")
            return self._host.crop(self._on_host(frame), to_crop, size=size, reduce=reduce)
        moved = to_crop @ np.array([[1.0, 0.0, 0.0], [0.0, 1.0, top], [0.0, 0.0, 1.0]])
        feeds = {names.FRAME: _lines(frame, top, bottom), names.MATRIX: sampling_matrix(moved)}
        return self._infer(names.CROP_512_HALVED, feeds)

    def place(self, frame: Array, to_frame: F64, crop_size: int) -> Place:
        """See :meth:`Pixels.place`."""
        height, width = frame.shape[-3:-1]
        size = (width, height)

        def on_host() -> Place:
            return _host_place(PastePlan.prepare(to_frame, size, crop_size))

        def paint(fixed: dict[str, Array], crops: Array) -> Array:
            return self._infer(name, fixed, self.resize(crops, crop_size))

        if len(frame.shape) == 3:
            plan = PastePlan.prepare(to_frame, size, crop_size)
            if not self._fits(frame, plan.rect):
                return _host_place(plan)
            name = _paste_name(names.PASTE_STILL, plan.rect, crop_size)
            weight = self._upload(name, plan.weight[None, ..., None])
            fixed = self._fixed(name, frame, to_frame, plan.rect) | {names.WEIGHT: weight}
            return _DevicePlace(plan.rect, plan.rect, size, fixed, paint, on_host)
        rect = placed_rect(to_frame, size, crop_size)
        (x0, x1), (y0, y1) = (_span(rect[i], rect[i + 2], limit) for i, limit in enumerate(size))
        region = (x0, y0, x1, y1)
        if min(rect[2] - rect[0], rect[3] - rect[1]) == 0 or not self._fits(frame, region):
            return on_host()
        name = _paste_name(names.PASTE_MOVING, region, crop_size)
        mask = self._keep(("mask", crop_size), name, lambda: crop_mask(crop_size)[None, ..., None])
        fixed = self._fixed(name, frame, to_frame, region) | {names.MASK: mask}
        return _DevicePlace(rect, region, size, fixed, paint, on_host)

    def rect_place(self, frame: Array, rect: Rect) -> Place:
        """See :meth:`Pixels.rect_place`; crops of the rectangle's size come down as they are."""
        x0, y0, x1, y1 = rect
        size = (y1 - y0, x1 - x0)
        host = self._host.rect_place(frame, rect)
        if not self._fits(frame, rect):
            return host
        height, width = frame.shape[-3:-1]
        preparing = threading.Lock()

        def paint(fixed: dict[str, Array], crops: Array) -> Array:
            if tuple(crops.shape[1:3]) == size:
                return crops
            name = _paste_name(names.PASTE_RECT, rect, *crops.shape[1:3])
            with preparing:
                if not fixed:
                    weight = self._keep(("soft", *size), name, lambda: soft_mask(*size)[None])
                    fixed.update({names.PATCH: self._patch(name, frame, rect), names.WEIGHT: weight})
            return self._infer(name, fixed, crops)

        return _DevicePlace(rect, rect, (width, height), {}, paint, lambda: host)

    def resize(self, crops: Array, size: int) -> Array:
        """See :meth:`Pixels.resize`."""
        given = crops.shape[1] if len(crops.shape) == 4 else 0
        if given == size:
            return crops
        if not 1 <= size <= MAX_CROP or not 1 <= given <= MAX_CROP or given != crops.shape[2]:
            return self._host.resize(crops, size)  # which says what is wrong
        weights = self._keep((given, size), names.RESIZE_CROPS, lambda: resize_weights(given, size))
        return self._infer(names.RESIZE_CROPS, {names.WEIGHTS: weights}, crops)

    def close(self) -> None:
        """Close the graphs that were opened and let go of what lies on the device."""
        with self._opening, self._lock:
            self._closed = True
            self._frames.clear()
            self._kept.clear()
            while self._runners:
                self._runners.popitem()[1].close()

    # -- parts -----------------------------------------------------------------------------------

    def _runner(self, name: str) -> Runner:
        if (known := self._runners.get(name)) is not None:
            return known
        # TensorRT may build an engine for a minute, and whoever has their graphs goes on meanwhile: hence a lock of its own.
        with self._opening:
            if self._closed:
                raise EngineError(
                    f"device graph {name} after close", "expected open DevicePixels", "keep them open"
                )
            if name not in self._runners:
                self._runners[name] = self._open_graph(name)
            return self._runners[name]

    def _infer(self, name: str, feeds: Mapping[str, Array], crops: Array | None = None) -> Array:
        """The picture that a graph makes, left on the device; ``crops`` in pieces of what the runner takes at once."""
        runner = self._runner(name)
        if crops is None:
            return runner.infer(feeds, keep=True)[names.IMAGE]
        count = crops.shape[0]
        most = runner.max_batch or count
        parts = [
            runner.infer({**feeds, names.CROP: rows(crops, i, min(i + most, count))}, keep=True)[names.IMAGE]
            for i in range(0, count, most)
        ]
        return runner.concatenate(parts)

    def _fixed(self, name: str, frame: Array, to_frame: F64, region: Rect) -> dict[str, Array]:
        """What a graph that pastes takes besides crops and weights; the region's own pixels are laid ready now."""
        return {
            names.PATCH: self._patch(name, frame, region),
            names.MATRIX: paste_matrix(to_frame, region[:2]),
        }

    def _patch(self, name: str, frame: Array, region: Rect) -> Array:
        """A region of a frame, uint8 ``[1, h, w, 3]`` on the device, for the graph ``name``."""
        x0, y0, x1, y1 = region
        if len(frame.shape) == 3:
            return self._upload(name, to_host(frame)[None, y0:y1, x0:x1])
        columns = np.arange(x0, x1, dtype=np.float32)
        return self._infer(names.CUT_REGION, {names.FRAME: _lines(frame, y0, y1), names.COLUMNS: columns})

    def _keep(self, key: Hashable, name: str, make: Callable[[], npt.NDArray[Any]]) -> Array:
        """What ``make`` returns, on the device of the graph ``name``; the most recent are kept."""
        with self._lock:
            known = self._kept.get(key)
        array = self._upload(name, make()) if known is None else known
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = array
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
        return array

    def _fits(self, frame: Array, region: Rect) -> bool:
        """Whether a region is for the device; one that is not is told of. Nothing is done for an empty one."""
        sides = (region[2] - region[0], region[3] - region[1])
        if max(sides) > MAX_REGION_SIDE:
            self._tell(frame, f"regions of at most {MAX_REGION_SIDE} px a side")
            return False
        return min(sides) > 0

    def _upload(self, name: str, array: npt.NDArray[Any]) -> Array:
        """On the device, by any graph that is open, else by the one that will read it."""
        runner = next(iter(tuple(self._runners.values())), None) or self._runner(name)
        return runner.upload(np.asarray(array, order="C"))

    def _on_host(self, frame: Array) -> U8:
        """The pixels ``[H, W, 3]`` of a frame on the device; without a transfer while it is remembered."""
        if len(frame.shape) == 3:
            return to_host(frame)
        with self._lock:
            for rgb, array in self._frames:
                if array is frame:
                    return rgb
        return np.asarray(to_host(frame)[0], np.uint8)

    def _tell(self, frame: Array, bound: str) -> None:
        """Say once for every size of frames that the host has to do what is beyond a bound."""
        height, width = frame.shape[-3:-1]
        with self._lock:
            new = (width, height, bound) not in self._told
            self._told.add((width, height, bound))
        if new:
            _LOG.info(
                "source of %d x %d px: done on the CPU in part; device graphs take %s", width, height, bound
            )
