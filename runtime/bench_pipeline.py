"""``lp-bench pipeline``: a whole run stage by stage, and how much of it is not the networks' own time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import open_bundle
from lp_edge.engines.runner import Array, Runner, WrappedRunner
from lp_edge.runtime.bench import Observer, bench_animation
from lp_edge.runtime.bench_calls import GpuSampler, origin_of, time_calls
from lp_edge.runtime.bench_report import Table
from lp_edge.runtime.options import AnimateOptions

__all__ = ["CallRecorder", "bench_pipeline", "pipeline_table"]


@dataclass
class _Calls:
    """Calls of one network with inputs of one size."""

    runner: Runner
    rows: int
    feeds: Mapping[str, Array]
    outputs: Sequence[str] | None
    count: int = 0


class _Watched(WrappedRunner):
    """A runner whose calls a recorder sees."""

    def __init__(self, inner: Runner, recorder: CallRecorder) -> None:
        super().__init__(inner)
        self._recorder = recorder

    def infer(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None, *, keep: bool = False
    ) -> dict[str, Array]:
        with self._recorder.call(self.inner, feeds, outputs):
            return self.inner.infer(feeds, outputs, keep=keep)


class CallRecorder(Observer):
    """Counts the calls of all runners in the frames that are counted, and afterwards times each of them alone.

    Attributes:
        busy_seconds: how long at least one call was running. Of runners that queue this is the queueing alone.
        networks: one record per network and size of call: ``network``, ``rows``, ``calls`` per frame, ``ms`` of a call alone
            (of a busy device where calls can be queued), ``frame_ms`` = the product.
        frames, seconds: what was counted.

    Args:
        seconds: time for each of the calls alone.
    """

    def __init__(self, seconds: float = 0.3) -> None:
        self.busy_seconds, self.frames, self.seconds = 0.0, 0, 0.0
        self.networks: list[dict[str, Any]] = []
        self.resident = False
        self._alone = seconds
        self._lock = threading.Lock()
        self._counting, self._active, self._since = False, 0, 0.0
        self._calls: dict[tuple[Any, ...], _Calls] = {}

    def wrap(self, runner: Runner) -> Runner:
        self.resident |= runner.resident
        return _Watched(runner, self)

    def call(self, runner: Runner, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> _Call:
        """A context around a call."""
        return _Call(self, runner, feeds, outputs)

    def begin(self) -> None:
        with self._lock:
            self._counting, self._since = True, time.perf_counter()

    def stop(self) -> None:
        with self._lock:
            if self._counting and self._active:
                self.busy_seconds += time.perf_counter() - self._since
            self._counting = False

    def end(self, frames: int, seconds: float) -> None:
        self.stop()
        self.frames, self.seconds = frames, seconds
        for calls in self._calls.values():
            took = time_calls(calls.runner, calls.feeds, calls.outputs, seconds=self._alone).best_seconds
            per_frame = calls.count / frames
            self.networks.append(
                {
                    "network": calls.runner.name,
                    "rows": calls.rows,
                    "calls": round(per_frame, 4),
                    "ms": round(took * 1e3, 4),
                    "frame_ms": round(took * 1e3 * per_frame, 4),
                }
            )
        self._calls.clear()  # what is on the device goes before the runners do

    def _enter(self, runner: Runner, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> None:
        with self._lock:
            now = time.perf_counter()
            self._active += 1
            if not self._counting:
                return
            if self._active == 1:
                self._since = now
            shapes = tuple((name, tuple(array.shape)) for name, array in sorted(feeds.items()))
            key = (id(runner), shapes, None if outputs is None else tuple(outputs))
            if key not in self._calls:
                rows = max((shape[0] for _, shape in shapes if shape), default=1)
                kept = {n: np.array(a) if isinstance(a, np.ndarray) else a for n, a in feeds.items()}
                self._calls[key] = _Calls(runner, rows, kept, outputs)
            self._calls[key].count += 1

    def _leave(self) -> None:
        with self._lock:
            self._active -= 1
            if self._counting and not self._active:
                self.busy_seconds += time.perf_counter() - self._since


@dataclass(frozen=True)
class _Call:
    recorder: CallRecorder
    runner: Runner
    feeds: Mapping[str, Array]
    outputs: Sequence[str] | None

    def __enter__(self) -> None:
        self.recorder._enter(self.runner, self.feeds, self.outputs)

    def __exit__(self, *_: object) -> None:
        self.recorder._leave()


def bench_pipeline(
    source: str | Path | None = None,
    driving: str | Path | None = None,
    *,
    options: AnimateOptions | None = None,
    bundle: Path | None = None,
    backend: BackendConfig | None = None,
    pixels: Sequence[str] = (),
    batch_sizes: Sequence[int | None] = (None,),
    warmup: int = 10,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Animate as :func:`lp_edge.runtime.bench.bench_animation` does, then time the same calls of networks alone.

    Args:
        source, driving, options, bundle, warmup, limit: as there.
        pixels: places where crops are cut and pasted, one run each (:attr:`BackendConfig.pixels`); none = as ``backend`` says.
        batch_sizes: frames that the network draws at once, one run each; None = as :meth:`Animator.animate` chooses.

    Yields:
        Per run: one record ``stage`` per stage, one ``network`` per network and size of its calls, and one ``pipeline``:
        ``fps``, ``frame_ms`` (time between two finished frames, mean), ``networks_ms`` (calls of the bundle's networks for a
        frame, each timed alone), ``outside`` = frame_ms / networks_ms - 1, what everything else adds to a frame,
        ``engine_busy`` = share of the time in which a call was running, as the host sees it (None where runners queue),
        ``device_busy`` = networks_ms / frame_ms, at most 1, ``gpu`` = what nvidia-smi saw. On a CPU networks and the rest share
        the cores and calls overlap: ``outside`` is at least that much there, and None where it would be below zero; read
        ``engine_busy``.

    Raises:
        ConfigError, LpEdgeError: as there.
    """
    given = backend or BackendConfig()
    known = open_bundle(bundle).manifest.networks
    for place, batch_size in product(pixels or (given.pixels,), batch_sizes):
        config = replace(given, pixels=place)
        recorder = CallRecorder()
        shared = {"pixels": place, "batch": "auto" if batch_size is None else batch_size}
        with GpuSampler(config.device) as gpu:
            *stages, whole = bench_animation(
                source,
                driving,
                options=options,
                bundle=bundle,
                backend=config,
                batch_size=batch_size,
                warmup=warmup,
                limit=limit,
                observer=_Stopping(recorder, gpu),
            )
        for record in stages:
            yield {**record, "bench": "stage", **shared}
        for record in recorder.networks:
            of_bundle = {"of_bundle": record["network"] in known}
            yield {"bench": "network", **shared, **record, **of_bundle, "provenance": whole["provenance"]}
        frame = recorder.seconds / recorder.frames
        # The graphs that cut and paste are not what has to be computed: they count as outside.
        networks = sum(record["frame_ms"] for record in recorder.networks if record["network"] in known) / 1e3
        outside = round(frame / networks - 1, 4) if networks else None
        if not recorder.resident and outside is not None and outside < 0:
            outside = None
        yield {
            **whole,
            "bench": "pipeline",
            **shared,
            "resident": recorder.resident,
            "frame_ms": round(frame * 1e3, 4),
            "networks_ms": round(networks * 1e3, 4),
            "outside": outside,
            "engine_busy": None
            if recorder.resident
            else round(min(1.0, recorder.busy_seconds / recorder.seconds), 4),
            "device_busy": round(min(1.0, networks / frame), 4),
            "gpu": gpu.summary(),
            "config": origin_of(None, None, config)["config"],
        }


class _Stopping(Observer):
    """A recorder, and a sampler that looks at the counted frames only."""

    def __init__(self, recorder: CallRecorder, gpu: GpuSampler) -> None:
        self._recorder, self._gpu = recorder, gpu

    def wrap(self, runner: Runner) -> Runner:
        return self._recorder.wrap(runner)

    def begin(self) -> None:
        self._gpu.restart()
        self._recorder.begin()

    def stop(self) -> None:
        self._recorder.stop()
        self._gpu.stop()

    def end(self, frames: int, seconds: float) -> None:
        self._recorder.end(frames, seconds)


def pipeline_table(records: Sequence[dict[str, Any]]) -> list[Table]:
    """Stages, networks and the whole, for people."""
    stages = Table(
        "Stages (they overlap)", ["pixels", "batch", "stage", "p50 ms", "p90 ms", "p99 ms", "count"]
    )
    networks = Table(
        "Networks of a frame, each alone",
        ["pixels", "batch", "network", "rows", "calls/frame", "ms", "ms/frame"],
    )
    whole = Table(
        "Pipeline",
        [
            "pixels",
            "batch",
            "frames/s",
            "ms/frame",
            "p99 ms",
            "networks ms",
            "outside %",
            "engine busy %",
            "device busy %",
            "nvidia-smi busy %",
            "peak MiB",
        ],
    )

    def percent(share: float | None) -> float | None:
        return None if share is None else round(100 * share, 1)

    for r in records:
        if r["bench"] == "stage":
            stages.rows.append(
                [r["pixels"], r["batch"], r["stage"], r["p50_ms"], r["p90_ms"], r["p99_ms"], r["count"]]
            )
        elif r["bench"] == "network":
            networks.rows.append(
                [r[k] for k in ("pixels", "batch", "network", "rows", "calls", "ms", "frame_ms")]
            )
        elif r["bench"] == "pipeline":
            seen = r["gpu"] and r["gpu"]["utilization.gpu"]
            whole.rows.append(
                [
                    r["pixels"],
                    f"auto: {r['batch_size'] or 'not found yet'}" if r["batch"] == "auto" else r["batch"],
                    r["fps"],
                    r["frame_ms"],
                    r["p99_ms"],
                    r["networks_ms"],
                    percent(r["outside"]),
                    percent(r["engine_busy"]),
                    percent(r["device_busy"]),
                    seen,
                    r["peak_memory_mib"],
                ]
            )
    if any(not r.get("resident", True) for r in records if r["bench"] == "pipeline"):
        whole.notes.append(
            "The backend computes on the host: networks share its cores with everything else, and their calls overlap, so "
            "'outside' says little (a dash: together they are longer than a frame); 'engine busy' is the share of the time in "
            "which a network was running."
        )
    if any(r["batch"] == "auto" and r["batch_size"] is None for r in records if r["bench"] == "pipeline"):
        whole.notes.append(
            "'not found yet': the run ended while sizes of a batch were still tried; its figures are of all of them. Give "
            "more frames, or --batch N."
        )
    return [stages, networks, whole]
