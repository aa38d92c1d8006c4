"""``lp-bench jetson``: how many frames a second the Orin modules can reach at most, ESTIMATED from counted work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from lp_edge.engines import names
from lp_edge.engines.bundle import open_bundle
from lp_edge.errors import ConfigError
from lp_edge.runtime.bench_calls import shapes_of
from lp_edge.runtime.bench_networks import Counter
from lp_edge.runtime.bench_report import Table
from lp_edge.runtime.provenance import provenance
from lp_edge.runtime.roofline import BOARDS, Board, Work

__all__ = ["estimate_jetson", "jetson_table"]

_DRAW: Final = (names.WARP_DECODE, names.STITCHING)
_READ: Final = (names.MOTION, names.FACE_MESH)
"""What runs for every frame of a still picture: drawing, and with a clip as driver reading the driver's face, which is
searched by the detector in few frames only. The appearance network runs once per picture."""


@dataclass(frozen=True)
class _Quantised:
    """Work with its float16 products in int8, and where it has any, with half the bytes if ``halved``."""

    work: Work
    halved: bool

    @property
    def products(self) -> Mapping[str, int]:
        kinds = dict(self.work.products)
        kinds["int8"] = kinds.pop("float16", 0) + kinds.get("int8", 0)
        return MappingProxyType(kinds)

    @property
    def flops(self) -> int:
        return self.work.flops

    @property
    def fused_bytes(self) -> int:
        halved = self.halved and "float16" in self.work.products
        return self.work.fused_bytes // 2 if halved else self.work.fused_bytes


def estimate_jetson(
    counter: Counter, bundle: Path | None = None, *, boards: Sequence[Board] = BOARDS
) -> Iterator[dict[str, Any]]:
    """The roofline's bound for every board, at both ends of its published figures.

    Per network the longer of its products over the peak of their types and its bytes over the bandwidth; the networks of a frame
    one after the other; nothing for pixels around them, launches, or what a kernel does not reach of the peak: real
    figures are lower.

    Args:
        counter: counts the work of a file.
        bundle: the bundle; its precision counts as it is. Where it has float16 products, and none in int8, there is an
            estimate for int8 too: all of them in int8, and at the higher end half the bytes of the networks that have any.

    Yields:
        Records ``jetson``: ``board``, ``precision``, ``networks`` (name → [ms at the highest, ms at the lowest peaks]),
        ``picture_fps`` and ``clip_fps`` [low, high]: frames a second at most with a template or a clip as driver.
        ``estimate`` is True in all of them.

    Raises:
        ConfigError: products of a type that the boards do not multiply (fp8).
    """
    opened = open_bundle(bundle)
    entries = opened.manifest.networks
    there = [name for name in (*_DRAW, *_READ) if name in entries]
    work = {name: counter(opened.path_of(name), shapes_of(entries[name].inputs, 1)) for name in there}
    origin = provenance(opened)
    types = {kind for counted in work.values() for kind in counted.products}
    if unknown := sorted(types - boards[0].peaks(0).flops.keys()):
        raise ConfigError(
            f"{opened.directory} has products of {', '.join(unknown)}",
            f"expected {', '.join(boards[0].peaks(0).flops)}, which these boards multiply",
            "give another bundle",
        )
    own = "int8" if "int8" in types else "fp16" if "float16" in types else "fp32"
    kinds = tuple(dict.fromkeys((own, "int8") if "float16" in types else (own,)))
    for board in boards:
        for precision in kinds:
            spans = {}
            for name, counted in work.items():
                ends = []
                for end in (1, 0):
                    done = counted if precision == own else _Quantised(counted, bool(end))
                    ends.append(round(1e3 * (board.peaks(end).seconds(done) or 0.0), 4))
                spans[name] = ends

            def fps(parts: Sequence[str], spans: Mapping[str, list[float]] = spans) -> list[float]:
                return [
                    round(1e3 / sum(spans[name][end] for name in parts if name in spans), 2) for end in (1, 0)
                ]

            yield {
                "bench": "jetson",
                "estimate": True,
                "board": board.name,
                "precision": precision,
                "networks": spans,
                "gflop": {name: round(counted.flops / 1e9, 3) for name, counted in work.items()},
                "mb": {name: round(counted.fused_bytes / 1e6, 2) for name, counted in work.items()},
                "picture_fps": fps(_DRAW),
                "clip_fps": fps((*_DRAW, *_READ)),
                "provenance": origin,
            }


def _plain(value: float) -> str:
    """Three digits or all before the point, thousands apart; never an exponent."""
    return f"{value:,.0f}".replace(",", " ") if value >= 99.95 else f"{value:.3g}"


def jetson_table(records: Sequence[dict[str, Any]]) -> Table:
    """The records for people; says in title and columns that these are estimates."""
    columns = ["board", "precision"]
    parts = list(records[0]["networks"])
    columns += [f"{name} ms (estimate)" for name in parts]
    columns += ["frames/s at most, template (estimate)", "frames/s at most, clip (estimate)"]
    table = Table("Jetson: roofline ESTIMATE, not measured", columns)

    def span(low: float, high: float) -> str:
        a, b = _plain(low), _plain(high)
        return a if a == b else f"{a} to {b}"

    def amount(value: float, unit: str) -> str:
        return f"{_plain(value)} {unit}" if value >= 1 else f"below 1 {unit}"

    for r in records:
        cells = [r["board"], r["precision"], *(span(*r["networks"][name]) for name in parts)]
        table.rows.append([*cells, span(*r["picture_fps"]), span(*r["clip_fps"])])
    work = ", ".join(
        f"{name} {amount(records[0]['gflop'][name], 'GFLOP')}, {amount(records[0]['mb'][name], 'MB')}"
        for name in parts
    )
    table.notes += [
        "**Estimates from counted work and published peaks; nothing here was measured.** Bounds: real figures are lower.",
        f"Counted per frame at batch 1: {work}.",
    ]
    return table
