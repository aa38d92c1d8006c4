"""The arithmetic of benchmarks/server.py: pairs of rounds, parts of a round trip, levels before and after, verdicts."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from lp_edge.runtime.job import percentiles

COMPUTE = ("track", "motion", "compose", "warp", "paste_back")
"""Stages that the same work has without a server."""
PARTS = ("client_encode", "transport", "queue", "decode", "encode", "rest", "client_decode")
"""What a round trip has beyond them."""


def order(names: Sequence[str], turn: int) -> list[str]:
    """Who goes when in a round: everybody is first, second, … equally often in ``2 * len(names)`` rounds.

    Rounds come in pairs, one the other's mirror image, so that what grows steadily falls on all alike.
    """
    start = turn // 2 % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if turn % 2 else turned


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Ratio a / b of each round: median, smallest and largest."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
    }


def rate(done: Sequence[float], warmup: int) -> float:
    """Frames a second from the end of frame ``warmup`` (counted from 1) to that of the last one; ``done`` are seconds."""
    if not 1 <= warmup < len(done):
        raise ValueError(f"{len(done)} frames with {warmup} to warm up")
    return (len(done) - warmup) / (done[-1] - done[warmup - 1])


def times(seconds: Sequence[float]) -> dict[str, float]:
    """Count, mean, percentiles and maximum in milliseconds."""
    found = asdict(percentiles(list(seconds)))
    return {
        **{key if key == "count" else f"{key}_ms": value for key, value in found.items()},
        "max_ms": round(1e3 * max(seconds), 3),
    }


def parts_of(trip: Mapping[str, Any]) -> dict[str, float]:
    """What a round trip consists of, in seconds; the parts add up to ``added``, with ``compute`` to ``round_trip``.

    Args:
        trip: ``client_encode``, ``wire`` (from sending to having the answer) and ``client_decode`` by the client's clock;
            ``total`` and ``stages`` (name, start, seconds) by the server's.
    """
    stages: dict[str, float] = defaultdict(float)
    for stage, _, seconds in trip["stages"]:
        stages[stage] += seconds
    compute = sum(stages.get(stage, 0.0) for stage in COMPUTE)
    parts = {
        "client_encode": trip["client_encode"],
        "transport": trip["wire"] - trip["total"],
        "queue": stages.get("queue", 0.0),
        "decode": stages.get("decode", 0.0),
        "encode": stages.get("encode", 0.0) + stages.get("resize", 0.0),
        "rest": trip["total"] - sum(stages.values()),
        "client_decode": trip["client_decode"],
    }
    added = sum(parts.values())
    return {**parts, "compute": compute, "added": added, "round_trip": added + compute}


def gaps_of(trip: Mapping[str, Any]) -> dict[str, float]:
    """Where the part ``rest`` of :func:`parts_of` lies, in seconds: before each stage, and after the last one (``end``).

    For stages one after the other, as in live mode.
    """
    gaps, ended = {}, 0.0
    for stage, start, seconds in trip["stages"]:
        gaps[stage] = start - ended
        ended = start + seconds
    return {**gaps, "end": trip["total"] - ended}


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Growth of ``values`` per unit of ``at``: the median of the slopes between all pairs (Theil and Sen).

    Single outliers do not turn it; 0 with fewer than two different places.
    """
    step = max(1, len(at) // 200)  # all pairs of 200 samples are enough
    pairs = combinations(list(zip(at, values, strict=True))[::step], 2)
    slopes = [(v - u) / (b - a) for (a, u), (b, v) in pairs if b != a]
    return statistics.median(slopes) if slopes else 0.0


@dataclass(frozen=True)
class Level:
    """What a process holds at one moment.

    Attributes:
        at: how far the work had come (frames, cycles).
        rss_mib: resident memory.
        threads, fds: threads and open descriptors.
        shm: names of segments of it in /dev/shm.
        shm_open: descriptors of segments, with a name or without.
        cpu_s: processor time used so far.
    """

    at: float
    rss_mib: float
    threads: int
    fds: int
    shm: int
    shm_open: int
    cpu_s: float


def middle(levels: Sequence[Level]) -> Level:
    """Each field's median."""
    fields = [asdict(level) for level in levels]
    whole = {"threads", "fds", "shm", "shm_open"}
    medians = {name: statistics.median(f[name] for f in fields) for name in fields[0]}
    return Level(**{n: math.ceil(v) if n in whole else v for n, v in medians.items()})


def growth(before: Level, after: Level, samples: Sequence[Level]) -> dict[str, Any]:
    """What has grown, and how steadily.

    Args:
        before: at rest, after everything has been used once.
        after: at rest again.
        samples: in between.

    Returns:
        Both levels, ``rss_growth`` (share of ``before``), and ``rss_slope_kib``: per unit of ``at`` in the second half, when
        caches are full; a leak keeps its slope, a warm-up does not.
    """
    half = samples[len(samples) // 2 :]
    return {
        "before": asdict(before),
        "after": asdict(after),
        "rss_growth": round(after.rss_mib / before.rss_mib - 1, 4),
        "rss_slope_kib": round(1024 * slope([s.at for s in half], [s.rss_mib for s in half]), 4),
        "rss_peak_mib": round(max(s.rss_mib for s in (before, after, *samples)), 1),
    }


# -- verdicts ----------------------------------------------------------------------------------------------


def check(figure: str, value: float, sense: str, limit: float) -> dict[str, Any]:
    """A record that says whether ``value`` keeps a limit: ``sense`` is ``<=`` or ``>=``. NaN keeps none."""
    passed = value <= limit if sense == "<=" else value >= limit
    return {
        "record": "check",
        "figure": figure,
        "value": round(value, 4) if math.isfinite(value) else None,
        "limit": f"{sense} {limit:g}",
        "pass": bool(passed),
    }


def returned(figure: str, grown: Mapping[str, Any], rss_limit: float) -> list[dict[str, Any]]:
    """Verdicts on :func:`growth`: memory within ``rss_limit`` of its level, nothing else above it."""
    before, after = grown["before"], grown["after"]
    return [
        check(f"{figure}: growth of resident memory", grown["rss_growth"], "<=", rss_limit),
        *(
            check(f"{figure}: more {what} than before", after[key] - before[key], "<=", 0)
            for key, what in (("threads", "threads"), ("fds", "descriptors"), ("shm_open", "segments open"))
        ),
        check(f"{figure}: names in /dev/shm", after["shm"], "<=", 0),
    ]


def fairness(frames: Sequence[int]) -> float:
    """Most frames of a stream over fewest; infinite where one got none."""
    return max(frames) / min(frames) if min(frames) else math.inf


def missing(sequences: Sequence[int], last: int) -> int:
    """How many of the numbers 1 to ``last`` are not there, came twice or out of order."""
    in_order = sum(b > a for a, b in zip([0, *sequences], sequences, strict=False))
    return (last - len(set(sequences))) + (len(sequences) - in_order)
