"""The device graphs (lp_edge.export.device_graphs) against their OpenCV/NumPy twins. Prints one JSON object a line.

    python benchmarks/device_graphs.py [parity] [time] [cost] [--cases 200] [--repeat 15] [--only NAME] [--threads 2]

`parity` runs every graph on ONNX Runtime's CPU provider over random pictures (noise, black and white, smooth) and maps (scale 0.1 to
4, any turn, partly or wholly outside, frames from 1 px on): `max` and `mean` difference in grey levels, and `differ`, the share of
values that are not equal. It fails (exit 1) beyond one level. With OpenCV 4, whose warps round positions to 1/32 pixel, the
operations that warp are measured, marked `"stepped": true`, and not held to that limit.
`time` compares and times graph and twin in turns at the sizes of real frames; `ratio` is the median of the pairs' ratios (graph / twin). A CPU is
not where the graphs are meant to run; the figures show that nothing is absurd.
`cost` counts FLOPs and bytes per frame size, for the roofline table of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.runner import to_host
from lp_edge.errors import LpEdgeError
from lp_edge.export import device_graphs as graphs
from lp_edge.export.cost import cost
from lp_edge.export.onnx_export import node_count, serialise
from lp_edge.runtime.crop import cut
from lp_edge.runtime.device_inputs import paste_matrix, resize_weights, sampling_matrix
from lp_edge.runtime.paste_back import PastePlan, crop_mask, paste_back, soft_mask
from lp_edge.runtime.provenance import provenance
from lp_edge.runtime.resample import resize_crop

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]
Feeds = dict[str, npt.NDArray[Any]]
Rng = np.random.Generator

STEPPED = int(cv2.__version__.partition(".")[0]) < 5
FRAMES = {"720p": (1280, 720), "1080p": (1920, 1080), "4K": (3840, 2160)}
LIMIT = 1


@dataclass(frozen=True)
class Case:
    """One call: what the graph is given, and what the twin makes of the same."""

    feeds: Feeds
    twin: Callable[[], U8]


@dataclass(frozen=True)
class Operation:
    """A graph with its twin.

    Attributes:
        graph: builds it; takes the flavour.
        draw: a random case.
        real: a case at the size of a frame (width, height).
        warps: whether OpenCV's warpAffine is part of the twin.
        cases: share of the number of cases that is asked for.
    """

    graph: Callable[..., Any]
    draw: Callable[[Rng], Case]
    real: Callable[[Rng, tuple[int, int]], Case]
    warps: bool = True
    cases: float = 1.0


# -- pictures and maps -----------------------------------------------------------------------------------


def picture(rng: Rng, width: int, height: int) -> U8:
    """Noise, black and white noise, or a smooth picture."""
    kind = rng.integers(3)
    noise: U8 = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == 0:
        return noise
    if kind == 1:
        return np.where(noise > 127, 255, 0).astype(np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 3.0), np.uint8)


def frame_size(rng: Rng) -> tuple[int, int]:
    """Width, height: every third one tiny."""
    low, high = (1, 12) if rng.random() < 1 / 3 else (13, 400)
    return int(rng.integers(low, high)), int(rng.integers(low, high))


def similarity(rng: Rng, size: tuple[int, int], side: int, scale: tuple[float, float] = (0.1, 4.0)) -> F64:
    """Frame px → crop px: any turn, a point in or around the frame in the crop's middle; some are whole numbers."""
    if rng.random() < 0.1:
        return np.array([[1, 0, rng.integers(-9, 9)], [0, 1, rng.integers(-9, 9)], [0, 0, 1]], np.float64)
    factor = math.exp(rng.uniform(*np.log(scale)))
    turn = rng.choice([0.0, math.pi / 2, rng.uniform(0, 2 * math.pi)])
    c, s = factor * math.cos(turn), factor * math.sin(turn)
    x, y = rng.uniform(-0.4, 1.4, 2) * size
    return np.array([[c, s, side / 2 - c * x - s * y], [-s, c, side / 2 + s * x - c * y], [0, 0, 1]])


def stacked(crops: Sequence[U8]) -> U8:
    """Pictures of one size as a batch."""
    return np.stack(crops)


def matrices(maps: Sequence[F64]) -> npt.NDArray[np.float32]:
    """Input `matrix` of several crops."""
    return np.concatenate([sampling_matrix(m) for m in maps])


# -- crops ------------------------------------------------------------------------------------------------


def crop_case(frame: U8, maps: Sequence[F64], size: int, reduce: int) -> Case:
    """N crops of one frame."""

    def twin() -> U8:
        return stacked([cut(frame, m, size=size).network_input(size // reduce) for m in maps])

    return Case({names.FRAME: frame[None], names.MATRIX: matrices(maps)}, twin)


def cropping(size: int, reduce: int) -> Operation:
    def draw(rng: Rng) -> Case:
        at = frame_size(rng)
        maps = [similarity(rng, at, size) for _ in range(int(rng.integers(1, 4)))]
        return crop_case(picture(rng, *at), maps, size, reduce)

    def real(rng: Rng, at: tuple[int, int]) -> Case:
        return crop_case(picture(rng, *at), [placed(at, size)], size, reduce)

    return Operation(lambda flavor="main": graphs.crop_graph(size, reduce=reduce, flavor=flavor), draw, real)


def placed(at: tuple[int, int], size: int, share: float = 0.75, degrees: float = 12.0) -> F64:
    """Frame px → px of a turned crop in the middle of the frame, its side `share` of the frame's height."""
    along, across = (size / (share * at[1]) * turn(math.radians(degrees)) for turn in (math.cos, math.sin))
    x, y = at[0] / 2, at[1] / 2
    return np.array(
        [
            [along, across, size / 2 - along * x - across * y],
            [-across, along, size / 2 + across * x - along * y],
            [0.0, 0.0, 1.0],
        ]
    )


# -- resizing ---------------------------------------------------------------------------------------------


def resizing(given: int, wanted: int) -> Operation:
    def case(rng: Rng, count: int) -> Case:
        crops = [picture(rng, given, given) for _ in range(count)]
        feeds: Feeds = {names.CROP: stacked(crops), names.WEIGHTS: resize_weights(given, wanted)}
        return Case(feeds, lambda: stacked([resize_crop(c, wanted) for c in crops]))

    return Operation(
        lambda flavor="main": graphs.resize_graph(flavor=flavor),
        lambda rng: case(rng, int(rng.integers(1, 3))),
        lambda rng, at: case(rng, 1),
        warps=False,
        cases=0.1,
    )


# -- pasting ----------------------------------------------------------------------------------------------


def paste_case(frame: U8, crops: Sequence[U8], to_frame: F64, warp_mask: bool) -> Case | None:
    """Several crops into one frame; None where nothing would change."""
    height, width = frame.shape[:2]
    side = crops[0].shape[0]
    plan = PastePlan.prepare(to_frame, (width, height), side)
    x0, y0, x1, y1 = plan.rect
    if x0 == x1:
        return None
    region = np.s_[y0:y1, x0:x1]
    feeds: Feeds = {
        names.PATCH: np.ascontiguousarray(frame[region])[None],
        names.CROP: stacked(crops),
        names.MATRIX: paste_matrix(to_frame, (x0, y0)),
    }
    if warp_mask:
        feeds[names.MASK] = crop_mask(side)[None, ..., None]
    else:
        feeds[names.WEIGHT] = plan.weight[None, ..., None]

    def twin() -> U8:
        return stacked([plan.paste(frame, crop)[region] for crop in crops])

    return Case(feeds, twin)


def pasting(size: int, warp_mask: bool) -> Operation:
    def draw(rng: Rng) -> Case:
        while True:
            at = frame_size(rng)
            to_frame = np.linalg.inv(similarity(rng, at, size, (0.25, 8.0)))
            crops = [picture(rng, size, size) for _ in range(int(rng.integers(1, 3)))]
            case = paste_case(picture(rng, *at), crops, to_frame, warp_mask)
            if case is not None:
                return case

    def real(rng: Rng, at: tuple[int, int]) -> Case:
        case = paste_case(
            picture(rng, *at), [picture(rng, size, size)], np.linalg.inv(placed(at, size)), warp_mask
        )
        if case is None:
            raise ValueError("a crop outside of the frame")
        return case

    return Operation(lambda flavor="main": graphs.paste_graph(warp_mask=warp_mask, flavor=flavor), draw, real)


def rect_case(frame: U8, crops: Sequence[U8], rect: tuple[int, int, int, int]) -> Case:
    """Several crops into one rectangle."""
    x0, y0, x1, y1 = rect
    region = np.s_[y0:y1, x0:x1]
    feeds: Feeds = {
        names.PATCH: np.ascontiguousarray(frame[region])[None],
        names.CROP: stacked(crops),
        names.WEIGHT: soft_mask(y1 - y0, x1 - x0)[None],
    }
    return Case(feeds, lambda: stacked([paste_back(frame, crop, rect)[region] for crop in crops]))


def rect_pasting() -> Operation:
    def draw(rng: Rng) -> Case:
        width, height = (int(v) for v in rng.integers(24, 400, 2))
        x0, y0 = int(rng.integers(0, width - 16)), int(rng.integers(0, height - 16))
        x1, y1 = int(rng.integers(x0 + 12, width + 1)), int(rng.integers(y0 + 12, height + 1))
        ratio = rng.uniform(1.05, 4)
        size = [max(1, int(side / ratio)) for side in (x1 - x0, y1 - y0)]
        crops = [picture(rng, *size) for _ in range(2)]
        return rect_case(picture(rng, width, height), crops, (x0, y0, x1, y1))

    def real(rng: Rng, at: tuple[int, int]) -> Case:
        side = int(0.75 * at[1])
        x0, y0 = (at[0] - side) // 2, (at[1] - side) // 2
        small = picture(rng, 512, 512)
        return rect_case(picture(rng, *at), [small], (x0, y0, x0 + side, y0 + side))

    return Operation(lambda flavor="main": graphs.rect_paste_graph(flavor=flavor), draw, real, warps=False)


def cut_case(frame: U8, x0: int, x1: int) -> Case:
    """Columns of all lines."""
    feeds: Feeds = {names.FRAME: frame[None], names.COLUMNS: np.arange(x0, x1, dtype=np.float32)}
    return Case(feeds, lambda: np.ascontiguousarray(frame[None, :, x0:x1]))


def cutting() -> Operation:
    def draw(rng: Rng) -> Case:
        width, height = frame_size(rng)
        x0 = int(rng.integers(0, width))
        return cut_case(picture(rng, width, height), x0, int(rng.integers(x0, width)) + 1)

    def real(rng: Rng, at: tuple[int, int]) -> Case:
        side = int(0.75 * at[1])
        return cut_case(picture(rng, at[0], side), (at[0] - side) // 2, (at[0] + side) // 2)

    return Operation(lambda flavor="main": graphs.cut_graph(flavor=flavor), draw, real, warps=False)


def operations(crop: int = 512) -> dict[str, Operation]:
    """All graphs by name, for crops of this side."""
    return {
        "crop": cropping(crop, 1),
        "crop_halved": cropping(crop, 2),
        "resize_512_to_256": resizing(512, 256),
        "resize_512_to_128": resizing(512, 128),
        "resize_512_to_300": resizing(512, 300),
        "resize_512_to_1024": resizing(512, 1024),
        "cut": cutting(),
        "paste": pasting(crop, False),
        "paste_mask": pasting(crop, True),
        "rect_paste": rect_pasting(),
    }


OPERATIONS = operations()


# -- measurements -----------------------------------------------------------------------------------------


@dataclass
class Difference:
    """Differences between graph and twin over many cases.

    Attributes:
        worst: largest one in grey levels.
        total: sum of all.
        unequal: number of values that differ.
        values: number of values.
    """

    worst: int = 0
    total: int = 0
    unequal: int = 0
    values: int = 0

    def add(self, one: U8, other: U8) -> None:
        """Compare two pictures of one shape."""
        if one.shape != other.shape or one.dtype != other.dtype:
            raise ValueError(f"{one.dtype}{one.shape} beside {other.dtype}{other.shape}")
        apart = np.abs(one.astype(np.int16) - other)
        self.worst = max(self.worst, int(apart.max(initial=0)))
        self.total += int(apart.sum(dtype=np.int64))
        self.unequal += int(np.count_nonzero(apart))
        self.values += apart.size


def parity(operation: Operation, model: Any, cases: int, *, seed: int = 0, threads: int = 1) -> Difference:
    """Run random cases through graph and twin."""
    rng, found = np.random.default_rng(seed), Difference()
    data = serialise(model)
    with open_runner(data, BackendConfig("cpu", threads=threads), name="device") as runner:
        for _ in range(max(1, math.ceil(cases * operation.cases))):
            case = operation.draw(rng)
            found.add(to_host(runner.infer(case.feeds)[names.IMAGE]), case.twin())
    return found


def paired(
    first: Callable[[], object], second: Callable[[], object], repeat: int
) -> tuple[float, float, float]:
    """Median milliseconds of both and the median of second / first; who begins alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeat + 1):
        order = ((0, first), (1, second)) if turn % 2 else ((1, second), (0, first))
        for index, call in order:
            start = time.perf_counter()
            call()
            if turn:  # the first round warms up
                times[index].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3, ratio


def parity_rows(name: str, cases: int, threads: int) -> Iterator[dict[str, Any]]:
    """One record per flavour."""
    operation = OPERATIONS[name]
    for flavor in graphs.OPSETS:
        found = parity(operation, operation.graph(flavor=flavor), cases, threads=threads)
        yield {
            "benchmark": "parity",
            "graph": name,
            "flavor": flavor,
            "cases": max(1, math.ceil(cases * operation.cases)),
            "values": found.values,
            "max": found.worst,
            "mean": round(found.total / found.values, 8),
            "differ": round(found.unequal / found.values, 8),
            "stepped": STEPPED and operation.warps,
        }


def time_rows(name: str, repeat: int, threads: int, sizes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record per frame size."""
    data = serialise(OPERATIONS[name].graph())
    with open_runner(data, BackendConfig("cpu", threads=threads), name="device") as runner:
        for label in sizes:
            case = OPERATIONS[name].real(np.random.default_rng(0), FRAMES[label])
            found = Difference()
            found.add(to_host(runner.infer(case.feeds)[names.IMAGE]), case.twin())
            twin_ms, graph_ms, ratio = paired(case.twin, lambda: runner.infer(case.feeds), repeat)  # noqa: B023
            yield {
                "benchmark": "time",
                "graph": name,
                "frame": label,
                "threads": threads,
                "twin_ms": round(twin_ms, 3),
                "graph_ms": round(graph_ms, 3),
                "ratio": round(ratio, 3),
                "max": found.worst,
                "stepped": STEPPED and OPERATIONS[name].warps,
            }


def cost_rows(name: str, sizes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One record per frame size; none of it depends on the machine."""
    model = OPERATIONS[name].graph()
    for label in sizes:
        case = OPERATIONS[name].real(np.random.default_rng(0), FRAMES[label])
        counted = cost(model, {key: array.shape for key, array in case.feeds.items()})
        yield {
            "benchmark": "cost",
            "graph": name,
            "frame": label,
            "nodes": node_count(model),
            "mflop": round(counted.flops / 1e6, 3),
            "boundary_mb": round(counted.boundary_bytes / 1e6, 3),
            "fused_mb": round(counted.fused_bytes / 1e6, 3),
            "node_mb": round(counted.node_bytes / 1e6, 3),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; 1 if a pixel is off by more than one level."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ("parity", "time", "cost")
    parser.add_argument("what", nargs="*", metavar="WHAT", help="parity, time, cost; default: all")
    parser.add_argument("--only", choices=list(OPERATIONS), action="append", help="default: all graphs")
    parser.add_argument("--frame", choices=list(FRAMES), action="append", help="time and cost; default: all")
    parser.add_argument("--cases", type=int, default=200, help="random cases a graph")
    parser.add_argument("--repeat", type=int, default=15, help="timed pairs")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime and of OpenCV")
    args = parser.parse_args(arguments)
    if args.cases < 1 or args.repeat < 1 or args.threads < 1 or not set(args.what) <= set(kinds):
        parser.error(f"expected of {', '.join(kinds)}, and --cases, --repeat, --threads of 1 or more")
    cv2.setNumThreads(args.threads)
    origin, sizes, within = provenance(), args.frame or list(FRAMES), True
    try:
        for what in args.what or kinds:
            for name in args.only or list(OPERATIONS):
                rows = {
                    "parity": lambda name=name: parity_rows(name, args.cases, args.threads),
                    "time": lambda name=name: time_rows(name, args.repeat, args.threads, sizes),
                    "cost": lambda name=name: cost_rows(name, sizes),
                }[what]
                for row in rows():
                    print(json.dumps({**row, "provenance": origin}), flush=True)
                    within &= row.get("stepped", False) or row.get("max", 0) <= LIMIT
    except LpEdgeError as error:
        print(f"device_graphs: {error}", file=sys.stderr)
        return error.exit_code
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
