"""Timing calls of runners: what goes in, how long it takes, on what. Host and device runners are timed by the same code."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import Bundle
from lp_edge.engines.device import DeviceArray
from lp_edge.engines.runner import Array, Runner, TensorSpec
from lp_edge.runtime.face_motion import Canonical, points_from_motion
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.job import percentiles
from lp_edge.runtime.provenance import provenance

__all__ = [
    "CallTimes",
    "GpuSampler",
    "feeds_of",
    "origin_of",
    "settle",
    "shapes_of",
    "time_calls",
    "time_record",
    "warp_points",
]

F32 = npt.NDArray[np.float32]

_SIZES: Final[Mapping[str, int]] = {"sources": 1, "height": 512, "width": 512, "H": 384, "W": 640}
"""What dynamic axes are in a measurement: one portrait, a crop of 512, the detector's canvas for 16:9. Others: the batch."""
_QUEUED = 4  # results that may be on their way: more than any runner has slots
_POINTS = 478


def time_record(seconds: Sequence[float]) -> dict[str, Any]:
    """Percentiles as a record has them: ``count`` and ``mean_ms``, ``p50_ms``, ``p90_ms``, ``p99_ms``."""
    times = percentiles(list(seconds))
    return {
        "count": times.count,
        "mean_ms": times.mean,
        "p50_ms": times.p50,
        "p90_ms": times.p90,
        "p99_ms": times.p99,
    }


@dataclass(frozen=True)
class CallTimes:
    """Durations of calls.

    Attributes:
        latency: seconds of each call, waited for one by one.
        queued: seconds per call where many are queued and only the end is waited for; None where the runner does not queue.
    """

    latency: tuple[float, ...]
    queued: float | None

    @property
    def best_seconds(self) -> float:
        """Seconds per call of a busy device: ``queued``, or the median where nothing can be queued."""
        return self.queued if self.queued is not None else statistics.median(self.latency)


def settle(results: Iterable[Array]) -> None:
    """Wait until results that are kept on a device are written."""
    for stream in {array.stream for array in results if isinstance(array, DeviceArray)}:
        stream.synchronize()


def time_calls(
    runner: Runner,
    feeds: Mapping[str, Array],
    outputs: Sequence[str] | None = None,
    *,
    seconds: float = 1.0,
    warmup: int = 3,
    least: int = 5,
) -> CallTimes:
    """Call a runner again and again with the same inputs; results stay on its device where it has one.

    Args:
        feeds: inputs; bring them to the device before (``runner.upload``), unless their way there is to be counted.
        seconds: for how long, and for as long again where calls can be queued.
        warmup: calls that are not counted.
        least: calls that are counted at least.
    """
    for _ in range(max(1, warmup)):
        settle(runner.infer(feeds, outputs, keep=True).values())
    latency: list[float] = []
    ends = time.perf_counter() + seconds
    while len(latency) < least or time.perf_counter() < ends:
        start = time.perf_counter()
        settle(runner.infer(feeds, outputs, keep=True).values())
        latency.append(time.perf_counter() - start)
    if not runner.resident:
        return CallTimes(tuple(latency), None)
    calls = max(least, round(seconds / max(statistics.median(latency), 1e-6)))
    kept: deque[Array] = deque(maxlen=_QUEUED * max(1, len(outputs or runner.outputs)))
    start = time.perf_counter()
    for _ in range(calls):
        kept.extend(runner.infer(feeds, outputs, keep=True).values())
    settle(kept)
    return CallTimes(tuple(latency), (time.perf_counter() - start) / calls)


# -- inputs --------------------------------------------------------------------------------------------------


def shapes_of(inputs: Iterable[TensorSpec], batch: int) -> dict[str, tuple[int, ...]]:
    """Size of every input for a batch; see the axes above."""
    return {
        spec.name: tuple(axis if isinstance(axis, int) else _SIZES.get(axis, batch) for axis in spec.shape)
        for spec in inputs
    }


def feeds_of(bundle: Bundle, inputs: Iterable[TensorSpec], batch: int) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a network for a batch: noise for pictures and features, keypoints of a head that moves a little."""
    specs = list(inputs)
    rng = np.random.default_rng(5)
    feeds: dict[str, npt.NDArray[Any]] = {}
    points: dict[str, F32] = {}
    for spec in specs:
        shape = shapes_of([spec], batch)[spec.name]
        if spec.dtype == np.uint8:
            feeds[spec.name] = rng.integers(0, 256, shape, dtype=np.uint8)
        elif spec.name in (names.KP_SOURCE, names.KP_DRIVING):
            points = points or _keypoints(bundle, shape[1], batch, rng)
            feeds[spec.name] = points[spec.name]
        else:
            feeds[spec.name] = rng.standard_normal(shape, np.float32).astype(spec.dtype)
    return feeds


def _keypoints(bundle: Bundle, count: int, batch: int, rng: np.random.Generator) -> dict[str, F32]:
    if count == _POINTS:  # a mesh in pixels: at random places its triangles would be of any size
        source, driving = warp_points(Canonical.from_table(bundle.load_table("canonical")), _SIZES["width"])
        return {
            names.KP_SOURCE: np.repeat(source[None], batch, axis=0),
            names.KP_DRIVING: driving[np.arange(batch) % len(driving)],
        }
    still = rng.uniform(-0.35, 0.35, (batch, count, 3))
    moved = still + rng.normal(0, 0.03, still.shape)
    return {names.KP_SOURCE: still.astype(np.float32), names.KP_DRIVING: moved.astype(np.float32)}


def warp_points(canonical: Canonical, size: int) -> tuple[F32, F32]:
    """Source keypoints ``[478, 3]`` of a face as it stands in a crop of ``size`` pixels, and driving ones ``[T, 478, 3]``."""
    motion = builtin_template("nod", canonical=canonical).motion
    points = points_from_motion(motion, canonical)
    rest = points[0, :, :2]
    scale = 0.42 * size / float(np.ptp(rest, axis=0).max())  # a crop is about 2.4 faces wide
    middle = 0.5 * (rest.max(0) + rest.min(0))
    points = points * np.float32(scale)
    points[..., :2] += np.asarray(size / 2 - middle * scale, np.float32)
    return points[0].astype(np.float32), points.astype(np.float32)


# -- the machine ---------------------------------------------------------------------------------------------

_TIMEOUT: Final = 10.0
_GPU_FIELDS: Final = (
    "utilization.gpu",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "temperature.gpu",
)


class GpuSampler:
    """Samples ``nvidia-smi`` while a block runs: how busy the GPU is, its clocks, power and temperature.

    Nothing is sampled, and :meth:`summary` is None, where the tool is not there (Jetson, machines without a GPU).

    Args:
        device: index of the GPU.
        every_ms: time between two samples.
    """

    def __init__(self, device: int = 0, every_ms: int = 200) -> None:
        self._device, self._every = device, every_ms
        self._rows: list[tuple[float | None, ...]] = []
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuSampler:  # noqa: PYI034 - Self needs Python 3.11
        self.restart()
        return self

    def restart(self) -> None:
        """Forget what was sampled and sample from now on."""
        self.stop()
        self._rows = []
        if command := _query(self._device, _GPU_FIELDS):
            try:
                self._process = subprocess.Popen(
                    [*command, f"--loop-ms={self._every}"],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            except OSError:
                return
            self._thread = threading.Thread(target=self._read, name="lp-edge nvidia-smi", daemon=True)
            self._thread.start()

    def _read(self) -> None:
        process = self._process
        if process is not None and process.stdout is not None:
            for line in process.stdout:
                cells = [_number(cell) for cell in line.split(",")]
                if len(cells) == len(_GPU_FIELDS):
                    self._rows.append(tuple(cells))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Sample no more; what was sampled stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._thread is not None:
            self._thread.join()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        self._process = self._thread = None

    def summary(self) -> dict[str, Any] | None:
        """Field → mean of its samples, and ``samples``; None without any."""
        if not self._rows:
            return None
        told: dict[str, Any] = {"samples": len(self._rows)}
        for name, column in zip(_GPU_FIELDS, zip(*self._rows, strict=True), strict=True):
            known = [value for value in column if value is not None]
            told[name] = round(statistics.fmean(known), 1) if known else None
        return told


def _query(device: int, fields: Sequence[str]) -> list[str]:
    """The command that asks nvidia-smi about one GPU; empty where there is no such tool.

    CUDA counts the GPUs that CUDA_VISIBLE_DEVICES shows, nvidia-smi all of them; it takes an index or a UUID.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    shown = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    which = shown[device] if shown[0] and device < len(shown) else device
    return [tool, f"--id={which}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _gpu_now(device: int) -> dict[str, str] | None:
    fields = ("name", "driver_version", "pstate", "power.limit", *_GPU_FIELDS)
    command = _query(device, fields)
    if not command:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    return dict(zip(fields, cells, strict=True)) if len(cells) == len(fields) else None


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def origin_of(
    bundle: Bundle | None, runners: Mapping[str, Runner] | None, config: BackendConfig
) -> dict[str, Any]:
    """Provenance of a record: :func:`~lp_edge.runtime.provenance.provenance`, what was asked for, and the GPU's clocks.

    ``gpu``: field of nvidia-smi → value at this moment, None without the tool. ``tensorrt``: its version where it was loaded.
    """
    origin = provenance(bundle, runners)
    origin["gpu"] = _gpu_now(config.device)
    origin["tensorrt"] = getattr(sys.modules.get("tensorrt"), "__version__", None)
    origin["config"] = {
        "backend": config.backend,
        "device": config.device,
        "threads": config.threads,
        "pixels": config.pixels,
        "provider_options": dict(config.provider_options),
    }
    return origin
