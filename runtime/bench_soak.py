"""``lp-bench soak``: many frames, and whether memory, threads and descriptors stay level."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.cuda import Cuda, shared_cuda
from lp_edge.errors import BackendUnavailable, ConfigError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.bench import default_inputs
from lp_edge.runtime.bench_calls import origin_of
from lp_edge.runtime.bench_report import Table
from lp_edge.runtime.options import AnimateOptions

__all__ = ["bench_soak", "growth", "growth_words", "soak_table"]

_MIB = 2**20
_SETTLING = 0.2  # share of the samples at the beginning in which pools, caches and arenas fill
# What may come and go without being a leak: allocators keep what they get, and another program may use the GPU.
_ALLOWED = {"host_mib": 16.0, "device_mib": 32.0}
_ALLOWED_SHARE = 0.02
_LEVEL = ("threads", "descriptors")
_WORDS = {
    "host_mib": ("memory of the process", " MiB"),
    "device_mib": ("memory of the GPU", " MiB"),
    "threads": ("threads", ""),
    "descriptors": ("open files", ""),
}


def growth(at: Sequence[float], values: Sequence[float]) -> float:
    """How much a value grew from the first to the last place, by the line of least squares through all of them.

    Example:
        >>> round(growth([0, 1, 2], [5.0, 6.0, 7.0]), 6)
        2.0
    """
    if len(at) < 2:
        return 0.0
    x, y = np.asarray(at, np.float64), np.asarray(values, np.float64)
    x = x - x.mean()
    spread = float(x @ x)
    return float((x @ (y - y.mean())) / spread * (x[-1] - x[0])) if spread else 0.0


def bench_soak(
    source: str | Path | None = None,
    driving: str | Path | None = None,
    *,
    options: AnimateOptions | None = None,
    bundle: Path | None = None,
    backend: BackendConfig | None = None,
    frames: int = 10_000,
    samples: int = 50,
) -> Iterator[dict[str, Any]]:
    """Animate one clip after the other until so many frames are drawn, with one set of open networks.

    Args:
        source, driving: as :func:`lp_edge.runtime.bench.bench_animation`.
        frames: how many, 20 or more.
        samples: how often memory is looked at, 10 or more.

    Yields:
        Records ``sample``: ``frames``, ``seconds``, ``host_mib`` (resident), ``device_mib`` (used by everybody on the GPU; None
        without one), ``threads``, ``descriptors`` (None where the system does not tell). Last a record ``soak``: the
        ``growth`` of each over the samples after the first fifth (line of least squares, whole run), ``level``: whether it
        stays below 2 % of the median or 16 MiB on the host, 32 MiB on the device, and whether threads and descriptors end no
        higher than the highest of the first fifth; ``passed``.

    Raises:
        ConfigError: a number is out of range, or the driver is a still picture.
        LpEdgeError: as :meth:`lp_edge.runtime.animator.Animator.animate`.
    """
    if frames < 20:
        raise ConfigError(f"--frames {frames}", "expected 20 or more", "raise --frames")
    if not 10 <= samples <= frames:
        raise ConfigError(
            f"--samples {samples}", f"expected 10 to {frames}, the number of --frames", "correct --samples"
        )
    config, options = backend or BackendConfig(), options or AnimateOptions()
    taken: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lp-bench-")))
        source, driving = default_inputs(folder, source, driving)
        cuda = _cuda(config.device, stack)
        animator = stack.enter_context(Animator(bundle, backend=config))
        origin = origin_of(animator.bundle, None, config)
        every, done, started = frames / samples, 0, time.perf_counter()
        while done < frames:
            before = done
            with closing(animator.animate(source, driving, options)) as animation:
                if animation.still:
                    raise ConfigError(
                        "the driver is a still picture",
                        "expected a clip or a template",
                        "give another --driving",
                    )
                for _ in animation:
                    done += 1
                    if done >= every * (len(taken) + 1):
                        taken.append(
                            {"frames": done, "seconds": time.perf_counter() - started, **_state(cuda)}
                        )
                        yield {"bench": "sample", **taken[-1], "provenance": origin}
                    if done >= frames:
                        break
            if done == before:
                raise ConfigError("the driver has no frames", "expected some", "give another --driving")
        yield {
            "bench": "soak",
            "frames": done,
            "seconds": round(taken[-1]["seconds"], 3),
            "fps": round(done / taken[-1]["seconds"], 2),
            **_verdict(taken),
            "provenance": origin,
        }


def _cuda(device: int, stack: ExitStack) -> Cuda | None:
    try:
        return stack.enter_context(shared_cuda(device)).cuda
    except BackendUnavailable:
        return None


def _state(cuda: Cuda | None) -> dict[str, Any]:
    free, total = (0, 0) if cuda is None else cuda.memory()
    return {
        "host_mib": _resident_mib(),
        "device_mib": None if cuda is None else round((total - free) / _MIB, 1),
        "threads": threading.active_count(),
        "descriptors": _descriptors(),
    }


def _resident_mib() -> float | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / _MIB, 2)


def _descriptors() -> int | None:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return None


def _verdict(taken: Sequence[dict[str, Any]]) -> dict[str, Any]:
    settling = max(1, round(_SETTLING * len(taken)))
    counted = taken[settling:]
    grown: dict[str, float | None] = {}
    level: dict[str, bool | None] = {}
    for name, allowed in _ALLOWED.items():
        values = [sample[name] for sample in counted]
        if None in values:
            grown[name] = level[name] = None
            continue
        more = growth([sample["frames"] for sample in counted], values)
        grown[name] = round(more, 2)
        level[name] = more <= max(allowed, _ALLOWED_SHARE * float(np.median(values)))
    for name in _LEVEL:
        values = [sample[name] for sample in taken]
        if None in values:
            grown[name] = level[name] = None
            continue
        more = min(values[settling:][-3:]) - max(values[:settling])
        grown[name], level[name] = more, more <= 0
    return {"growth": grown, "level": level, "passed": all(known is not False for known in level.values())}


def growth_words(record: dict[str, Any]) -> str:
    """``growth`` of a record ``soak`` for people."""
    return ", ".join(
        f"{_WORDS[name][0]} {'not known' if grown is None else f'{grown:+.4g}{_WORDS[name][1]}'}"
        for name, grown in record["growth"].items()
    )


def soak_table(records: Sequence[dict[str, Any]]) -> Table:
    """First, middle and last sample and the verdict, for people."""
    taken = [r for r in records if r["bench"] == "sample"]
    keys = ["frames", "host_mib", "device_mib", "threads", "descriptors"]
    table = Table("Soak", ["frames", "host MiB", "device MiB", "threads", "descriptors"])
    shown = sorted({0, len(taken) // 4, len(taken) // 2, 3 * len(taken) // 4, len(taken) - 1})
    table.rows += [[taken[index][key] for key in keys] for index in shown if 0 <= index < len(taken)]
    for record in (r for r in records if r["bench"] == "soak"):
        table.notes.append(
            f"{record['frames']} frames at {record['fps']} frames/s; growth after the first fifth: {growth_words(record)}. "
            + ("Level." if record["passed"] else "NOT level.")
        )
    return table
