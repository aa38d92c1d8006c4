"""Network calls through a DeviceWorker: what one costs, and how streams share a device. Prints JSON lines.

    python benchmarks/batching.py [--streams 1 --streams 4] [--batch 1 --batch 8] [--threads 1 --threads 2] [--seconds 3] [--rounds 3]

`overhead`: a tiny network called directly and through the worker, in turns, from one thread; microseconds.
`streams`: every stream draws pictures of its own portrait (640 px) as fast as it gets them, all at once. `fairness` is most over
fewest calls of a stream. The settings take turns, `--rounds` times; figures are medians over the rounds. With more threads
than one each operator gets a part of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.engines import backends, names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.batching import BatchConfig, CallScope, DeviceWorker
from lp_edge.engines.bundle import Bundle, open_bundle
from lp_edge.errors import LpEdgeError
from lp_edge.runtime.job import percentiles
from lp_edge.runtime.provenance import provenance

SIZE = (640, 544)


def overhead(calls: int) -> dict[str, Any]:
    """Medians of paired calls in µs."""
    feeds = {"x": np.ones((1, 1, 4, 4), np.float32)}
    direct, through = [], []
    with (
        open_runner(backends._PROBE, BackendConfig("cpu", threads=1), name="probe") as runner,
        DeviceWorker(BatchConfig()) as worker,
        worker.scope(CallScope(0)),
    ):
        wrapped = worker.wrap(runner)
        for _ in range(calls):
            for one, seconds in ((runner, direct), (wrapped, through)):
                start = time.perf_counter()
                one.infer(feeds)
                seconds.append(time.perf_counter() - start)
    added = percentiles([b - a for a, b in zip(direct, through, strict=True)])
    return {
        "direct_us": round(1e6 * statistics.median(direct), 1),
        "worker_us": round(1e6 * statistics.median(through), 1),
        "added_us": {"p50": round(1e3 * added.p50, 1), "p99": round(1e3 * added.p99, 1)},
    }


def portrait(points: npt.NDArray[np.float32], number: int) -> dict[str, npt.NDArray[Any]]:
    """Feeds of the mesh family's warp: a picture of coarse noise, and a face that moved a little."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (1, SIZE[0] // 16, SIZE[1] // 16, 3), dtype=np.uint8)
    face = (points - points.min(0)) / np.ptp(points[:, :2]) * 300 + 120
    source = face[None].astype(np.float32)
    return {
        names.SOURCE_IMAGE: coarse.repeat(16, 1).repeat(16, 2),
        names.KP_SOURCE: source,
        names.KP_DRIVING: source + rng.normal(0, 1, source.shape).astype(np.float32),
    }


class Sizes:
    """Numbers of calls of all batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def batch(self, network: str, size: int, rows: int, waited_s: float, ran_s: float) -> None:
        self.sizes.append(size)


def streams(bundle: Bundle, count: int, config: BatchConfig, seconds: float) -> dict[str, float]:
    """One round of one setting."""
    points = bundle.load_table("canonical")["points"]
    backend = BackendConfig("cpu", threads=max(1, (os.cpu_count() or 1) // config.threads))
    sizes, times = Sizes(), [list[float]() for _ in range(count)]
    with (
        DeviceWorker(config, observer=sizes) as worker,
        worker.wrap(bundle.runner(names.WARP_DECODE, backend)) as runner,
    ):
        ready = threading.Barrier(count + 1)

        def stream(number: int) -> None:
            feeds = portrait(points, number)
            runner.infer(feeds, [names.IMAGE])
            ready.wait()
            end = time.perf_counter() + seconds
            while (start := time.perf_counter()) < end:
                with worker.scope(CallScope(number)):
                    runner.infer(feeds, [names.IMAGE])
                times[number].append(time.perf_counter() - start)

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        ready.wait()
        sizes.sizes.clear()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - start
    counts = [len(t) for t in times]
    latency = percentiles([t for of_stream in times for t in of_stream])
    return {
        "calls_per_s": sum(counts) / took,
        "fairness": max(counts) / min(counts),
        "mean_batch": statistics.fmean(sizes.sizes or [1]),
        "latency_ms_p50": latency.p50,
        "latency_ms_p99": latency.p99,
    }


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, action="append", help="default: 1, 4 and 16")
    parser.add_argument("--batch", type=int, action="append", help="most rows of a call; default: 1 and 8")
    parser.add_argument("--threads", type=int, action="append", help="of the worker; default: 1 and 2")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    try:
        configs = [
            BatchConfig(max_batch=batch, threads=threads)
            for batch, threads in product(args.batch or [1, 8], args.threads or [1, 2])
        ]
        bundle = open_bundle()
        print(json.dumps({"benchmark": "batching", "what": "overhead", **overhead(3000)}), flush=True)
        for count in args.streams or [1, 4, 16]:
            rounds = [[streams(bundle, count, c, args.seconds) for c in configs] for _ in range(args.rounds)]
            for config, results in zip(configs, zip(*rounds, strict=True), strict=True):
                line = {"benchmark": "batching", "what": "streams", "streams": count}
                line |= {"max_batch": config.max_batch, "threads": config.threads}
                line |= {key: round(statistics.median(r[key] for r in results), 3) for key in results[0]}
                print(json.dumps(line), flush=True)
        print(json.dumps({"benchmark": "batching", "provenance": provenance(bundle)}))
    except LpEdgeError as error:
        print(f"batching: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
