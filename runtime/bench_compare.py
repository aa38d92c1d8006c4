"""``lp-bench compare``: the same networks on two sides, in turns, in one process; ratios with their uncertainty."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, resolve_backend
from lp_edge.engines.bundle import open_bundle
from lp_edge.errors import ConfigError
from lp_edge.runtime.bench_calls import feeds_of, origin_of, settle, time_record
from lp_edge.runtime.bench_report import Table

__all__ = ["Call", "Side", "bench_compare", "compare_table", "ratio_interval", "runner_side"]

Call = Callable[[], "float | None"]
"""One call of a network that returns when its result is there: the seconds that it took, or None to have them taken here."""

_DRAWS = 2000
_OF_ANY_FAMILY = (names.FACE_DETECTOR, names.FACE_MESH)
"""Networks that are the same whatever the family; any other shares a name and nothing else with that of another family."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        label: what it is called.
        networks: names of the networks that it has.
        open: network and batch → a context with a call, whose inputs are where the side reads them fastest.
        origin: what belongs to its provenance.
        family: of its networks, as in the manifest; empty = not told, taken for that of the other side.
    """

    label: str
    networks: tuple[str, ...]
    open: Callable[[str, int], AbstractContextManager[Call]]
    origin: Mapping[str, Any]
    family: str = ""


def runner_side(bundle: Path | None, backend: BackendConfig, label: str = "") -> Side:
    """A bundle's networks on a backend; LpEdgeError as :func:`open_bundle` and :func:`resolve_backend`."""
    opened, config = open_bundle(bundle), resolve_backend(backend)

    @contextmanager
    def opener(network: str, batch: int) -> Iterator[Call]:
        with opened.runner(network, config) as runner:
            feeds = {
                name: runner.upload(array)
                for name, array in feeds_of(opened, runner.inputs.values(), batch).items()
            }

            def call() -> None:
                settle(runner.infer(feeds, keep=True).values())

            yield call

    return Side(
        label or f"{config.backend} {opened.directory.name}",
        tuple(opened.manifest.networks),
        opener,
        origin_of(opened, None, config),
        opened.manifest.family,
    )


def ratio_interval(
    ours: Sequence[float], theirs: Sequence[float], *, share: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Median over rounds of theirs / ours, and its bootstrap interval.

    Args:
        ours, theirs: seconds of the same rounds, one or more.
        share: how much of the bootstrap distribution lies within (percentile bootstrap, 2000 draws of whole rounds).

    Example:
        >>> ratio_interval([1.0, 2.0], [2.0, 4.0])
        (2.0, 2.0, 2.0)
    """
    ratios: npt.NDArray[np.float64] = np.asarray(theirs, np.float64) / np.asarray(ours, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(ratios), (_DRAWS, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    low, high = np.quantile(medians, [(1 - share) / 2, (1 + share) / 2])
    return float(np.median(ratios)), float(low), float(high)


def bench_compare(
    ours: Side,
    others: Sequence[Side],
    *,
    networks: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    rounds: int = 20,
    warmup: int = 3,
) -> Iterator[dict[str, Any]]:
    """Time one side against others, network by network.

    A round is A B B A, so that what drifts (clocks, temperature, other programs) weighs on both sides alike; its times are the
    sums of both calls. Both sides are open at the same time.

    Args:
        ours: A.
        others: each is a B of its own.
        networks: names; none = all that both sides have.
        batches: rows per call.
        rounds: that are counted, 2 or more.
        warmup: rounds that are not.

    Yields:
        One record per other side, network and batch: percentiles of both, ``ratio`` = B / A (above 1: A is faster), the
        median over rounds, with ``low`` and ``high`` of its 95 % bootstrap interval.

    Raises:
        ConfigError: a number is out of range, or two sides do not share a network that is asked for (two families share those
            alone that find faces); told of all sides before the first call.
        LpEdgeError: as the sides.
    """
    if rounds < 2 or warmup < 0 or not batches or not 1 <= min(batches) <= max(batches) <= 256:
        raise ConfigError(
            f"rounds {rounds}, warmup {warmup}, batches {tuple(batches)}",
            "expected 2 or more, 0 or more, 1 to 256 each",
            "choose values in that range",
        )
    chosen = [(other, _chosen(ours, other, networks)) for other in others]
    for other, shared in chosen:
        for name in shared:
            for batch in batches:
                yield _compare(ours, other, name, batch, rounds, warmup)


def _chosen(ours: Side, other: Side, networks: Sequence[str]) -> list[str]:
    """The networks to compare: those asked for, or all that both sides have."""
    both = [name for name in ours.networks if name in other.networks]
    families = {side.family for side in (ours, other) if side.family}
    shared = both if len(families) < 2 else [name for name in both if name in _OF_ANY_FAMILY]
    missing = [name for name in networks if name not in shared]
    if shared and not missing:
        return [name for name in shared if not networks or name in networks]
    if len(families) > 1:
        raise ConfigError(
            f"{ours.label} is of the family {ours.family}, {other.label} of the family {other.family}: "
            f"{', '.join(missing) or 'their networks'} cannot be compared",
            f"expected one family, or networks that both have: {', '.join(shared) or 'these have none'}",
            f"give both sides of the family {other.family}, say --bundle with one of it (lp-export --family {other.family})",
        )
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} is not on both sides",
            f"{ours.label} and {other.label} share {', '.join(shared) or 'no network'}",
            "correct --network, or compare other sides",
        )
    raise ConfigError(
        f"{ours.label} and {other.label} share no network",
        "expected bundles of one family",
        "compare other sides",
    )


def _compare(ours: Side, other: Side, name: str, batch: int, rounds: int, warmup: int) -> dict[str, Any]:
    with ExitStack() as stack:
        a, b = (stack.enter_context(side.open(name, batch)) for side in (ours, other))
        times: dict[Call, list[float]] = {a: [], b: []}
        for turn in range(warmup + rounds):
            for call in (a, b, b, a):
                start = time.perf_counter()
                own = call()
                took = time.perf_counter() - start if own is None else own
                if turn >= warmup:
                    times[call].append(took)
    pairs = {call: np.reshape(laps, (rounds, 2)).sum(1) for call, laps in times.items()}
    ratio, low, high = ratio_interval(list(pairs[a]), list(pairs[b]))
    return {
        "bench": "compare",
        "network": name,
        "batch": batch,
        "a": {"label": ours.label, **time_record(times[a])},
        "b": {"label": other.label, **time_record(times[b])},
        "ratio": round(ratio, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "rounds": rounds,
        "warmup": warmup,
        "provenance": {"a": dict(ours.origin), "b": dict(other.origin)},
    }


def compare_table(records: Sequence[dict[str, Any]]) -> Table:
    """The records for people."""
    table = Table(
        "Comparison, in turns (ABBA)",
        ["network", "batch", "A", "A p50 ms", "B", "B p50 ms", "B / A", "95 % interval"],
    )
    for r in records:
        a, b = r["a"], r["b"]
        cells = [r["network"], r["batch"], a["label"], a["p50_ms"], b["label"], b["p50_ms"]]
        table.rows.append([*cells, r["ratio"], f"{r['low']:.3g} to {r['high']:.3g}"])
    table.notes.append("B / A above 1: A is faster. Median over rounds and its bootstrap interval.")
    return table
