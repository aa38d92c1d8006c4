"""``lp-bench networks``: every network alone, inputs and results on its device, against what the card can do at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lp_edge.engines.backends import BackendConfig, resolve_backend
from lp_edge.engines.bundle import Bundle, open_bundle
from lp_edge.errors import ConfigError
from lp_edge.runtime.bench_calls import (
    GpuSampler,
    feeds_of,
    origin_of,
    shapes_of,
    time_calls,
    time_record,
)
from lp_edge.runtime.bench_report import Table
from lp_edge.runtime.roofline import Peaks, Work, measure_peaks

__all__ = ["Counter", "bench_networks", "chosen_networks", "networks_table"]

Counter = Callable[[Path, Mapping[str, Sequence[int]]], Work]
"""Counts the work of an ONNX file at given sizes: :func:`lp_edge.export.cost.file_cost`."""


def chosen_networks(bundle: Bundle, wanted: Sequence[str]) -> tuple[str, ...]:
    """The networks of a bundle that are asked for, all for none; ConfigError for one that it does not have."""
    there = tuple(bundle.manifest.networks)
    if unknown := [name for name in wanted if name not in there]:
        raise ConfigError(
            f"no network {', '.join(unknown)} in {bundle.directory}",
            f"expected of {', '.join(there)}",
            "correct --network, or give another --bundle",
        )
    return tuple(dict.fromkeys(wanted)) or there


def bench_networks(
    bundle: Path | None = None,
    backend: BackendConfig | None = None,
    *,
    batches: Sequence[int] = (1, 2, 4, 8),
    networks: Sequence[str] = (),
    seconds: float = 1.0,
    counter: Counter | None = None,
    peaks: Peaks | None = None,
) -> Iterator[dict[str, Any]]:
    """Time the networks of a bundle one by one.

    Where the backend keeps arrays on its device, inputs are uploaded once and results stay there: no copy is counted.

    Args:
        batches: rows per call, 1 to 256 each; what a network's engine does not take is reported as skipped.
        networks: names; none = all.
        seconds: for each measurement.
        counter: counts the work of a file; without it the columns that need it are None.
        peaks: of the card; None = measured here, through the same backend, where there is a counter.

    Yields:
        One record ``peaks`` (with a counter), then one record ``networks`` per network and batch: percentiles of a call that
        is waited for, ``queued_ms`` per call of a busy device (None on hosts), ``row_ms`` per row of the batch, ``gflop`` and
        ``mb`` per call, ``tflops``, ``gbs`` and the shares ``compute``, ``bandwidth`` and ``roofline`` of the peaks (the last
        is the larger of them), ``gpu`` (clocks, load) where nvidia-smi tells.

    Raises:
        ConfigError: a batch, a time or a network is not there.
        LpEdgeError: as :meth:`lp_edge.engines.bundle.Bundle.runner`, and what the counter raises.
    """
    if not batches or min(batches) < 1 or max(batches) > 256:
        given = ",".join(map(str, batches)) or "empty"
        raise ConfigError(f"--batch {given}", "expected 1 to 256 each", "correct --batch")
    if not 0 < seconds <= 600:
        raise ConfigError(f"--seconds {seconds:g}", "expected more than 0, up to 600", "correct --seconds")
    opened = open_bundle(bundle)
    chosen = chosen_networks(opened, networks)
    config = resolve_backend(backend or BackendConfig())
    work: dict[tuple[str, int], Work] = {}
    if counter is not None:
        for name in chosen:
            for batch in batches:
                inputs = opened.network(name).inputs
                work[name, batch] = counter(opened.path_of(name), shapes_of(inputs, batch))
        if peaks is None:
            kinds = {kind for counted in work.values() for kind in counted.products}
            peaks = measure_peaks(config, sorted(kinds), seconds=min(seconds, 0.5))
        yield {
            "bench": "peaks",
            "tflops": {kind: round(speed / 1e12, 4) for kind, speed in peaks.flops.items()},
            "gbs": round(peaks.bytes_per_second / 1e9, 2) if peaks.bytes_per_second else None,
            "probes": [dict(probe) for probe in peaks.measured],
            "provenance": origin_of(None, None, config),
        }
    for name in chosen:
        with opened.runner(name, config) as runner:
            origin = origin_of(opened, {name: runner}, config)
            entry = opened.network(name)
            for batch in batches:
                told: dict[str, Any] = {
                    "bench": "networks",
                    "network": name,
                    "precision": entry.precision,
                    "batch": batch,
                    "resident": runner.resident,
                }
                if runner.max_batch is not None and batch > runner.max_batch:
                    yield {
                        **told,
                        "skipped": f"its engine takes up to {runner.max_batch}",
                        "provenance": origin,
                    }
                    continue
                feeds = {
                    key: runner.upload(array)
                    for key, array in feeds_of(opened, runner.inputs.values(), batch).items()
                }
                with GpuSampler(config.device) as gpu:
                    times = time_calls(runner, feeds, seconds=seconds)
                took = times.best_seconds
                yield {
                    **told,
                    **time_record(times.latency),
                    "queued_ms": None if times.queued is None else round(times.queued * 1e3, 4),
                    "row_ms": round(took * 1e3 / batch, 4),
                    **_against(work.get((name, batch)), peaks, took),
                    "gpu": gpu.summary(),
                    "provenance": origin,
                }


def _against(work: Work | None, peaks: Peaks | None, took: float) -> dict[str, Any]:
    """Work done in ``took`` seconds, and its shares of the peaks."""
    if work is None:
        return dict.fromkeys(("gflop", "mb", "tflops", "gbs", "compute", "bandwidth", "roofline"))
    compute = peaks.compute_seconds(work) if peaks else None
    moving = peaks.move_seconds(work) if peaks else None
    whole = peaks.seconds(work) if peaks else None

    def share(least: float | None) -> float | None:
        return None if least is None else round(least / took, 4)

    return {
        "gflop": round(work.flops / 1e9, 4),
        "mb": round(work.fused_bytes / 1e6, 3),
        "tflops": round(work.flops / took / 1e12, 4),
        "gbs": round(work.fused_bytes / took / 1e9, 2),
        "compute": share(compute),
        "bandwidth": share(moving),
        "roofline": share(whole),
    }


def networks_table(records: Sequence[dict[str, Any]]) -> Table:
    """The records for people; columns of counted work only where it was counted."""
    rows = [r for r in records if r["bench"] == "networks"]
    counted = any(r.get("gflop") is not None for r in rows)
    names = ["network", "batch", "p50 ms", "p90 ms", "p99 ms", "busy ms/row"]
    keys = ["network", "batch", "p50_ms", "p90_ms", "p99_ms", "row_ms"]
    if counted:
        names += ["GFLOP", "MB", "TFLOP/s", "GB/s", "of peak FLOP/s %", "of bandwidth %", "of roofline %"]
        keys += ["gflop", "mb", "tflops", "gbs", "compute", "bandwidth", "roofline"]
    table = Table("Networks", names)
    for record in rows:
        cells = [record.get(key) for key in keys]
        if counted:
            cells[-3:] = [None if cell is None else round(100 * cell, 1) for cell in cells[-3:]]
        table.rows.append(cells)
        if "skipped" in record:
            table.notes.append(f"{record['network']}, batch {record['batch']}: skipped, {record['skipped']}.")
    for peak in (r for r in records if r["bench"] == "peaks"):
        speeds = [f"{kind} products {tflops:.3g} TFLOP/s" for kind, tflops in peak["tflops"].items()]
        speeds += [f"element-wise {peak['gbs']:.4g} GB/s"] if peak["gbs"] else []
        table.notes.append(f"Peaks, measured in the same run: {', '.join(speeds) or 'none'}.")
    if not counted:
        table.notes.append(
            "FLOPs, bytes and shares of the roofline are left out: counting them needs ONNX "
            "(pip install 'lp-edge[export]')."
        )
    if rows:
        runner = next(iter(rows[0]["provenance"]["runners"].values()))
        table.notes.append(f"Backend {runner['backend']}, {runner['device']}.")
    return table
