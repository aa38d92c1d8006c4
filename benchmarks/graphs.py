"""The exported graphs of the LivePortrait family against PyTorch, in one run. Prints JSON lines.

    python benchmarks/graphs.py frame --bundle BUNDLE --weights DIR
    python benchmarks/graphs.py reductions --weights DIR [--only NAME]

`frame` times one frame of M + W + G, batch 1, crop to picture: the graphs of a bundle on ONNX Runtime and this project's own
networks in PyTorch eager mode, each in a process of its own, so that both have their own peak memory (loading included). The
processes take turns frame by frame; the one that waits does not compute. What depends on the source alone (F) is made beforehand in a third process.

`reductions` times W + G with one rewriting of the export (lp_edge.export.liveportrait.warp_decode.Reductions) turned
over at a time, against the default, also in turns.

Ratios are medians over rounds of the two neighbouring times; a busy machine disturbs both alike.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.bundle import open_bundle
from lp_edge.engines.runner import to_host
from lp_edge.errors import ConfigError, EngineError, LpEdgeError
from lp_edge.runtime.bench import peak_memory_mib
from lp_edge.runtime.job import percentiles
from lp_edge.runtime.provenance import provenance

Arrays = dict[str, npt.NDArray[Any]]
Frame = Callable[[], tuple[float, npt.NDArray[np.uint8]]]
KEYPOINTS = 21


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    bundle: Path
    weights: Path
    threads: int
    arrays: Arrays


def inputs() -> Arrays:
    """A crop of noise and keypoints of a head that moves a little."""
    rng = np.random.default_rng(5)
    source = rng.uniform(-0.35, 0.35, (1, KEYPOINTS, 3))
    return {
        names.IMAGE: rng.integers(0, 256, (1, 256, 256, 3), dtype=np.uint8),
        names.KP_SOURCE: source.astype(np.float32),
        names.KP_DRIVING: (source + rng.normal(0, 0.03, source.shape)).astype(np.float32),
    }


# -- the two sides -----------------------------------------------------------------------------------


def with_graphs(stack: ExitStack, settings: Settings) -> Frame:
    """M and W + G on ONNX Runtime."""
    bundle, config = open_bundle(settings.bundle), BackendConfig("cpu", threads=settings.threads)
    motion, warp = (
        stack.enter_context(bundle.runner(name, config)) for name in (names.MOTION, names.WARP_DECODE)
    )
    feeds = {name: settings.arrays[name] for name in warp.inputs}

    def frame() -> tuple[float, npt.NDArray[np.uint8]]:
        motion.infer({names.IMAGE: settings.arrays[names.IMAGE]})
        between = time.perf_counter()
        return between, to_host(warp.infer(feeds)[names.IMAGE])

    return frame


def with_eager(stack: ExitStack, settings: Settings) -> Frame:
    """M, W and G in PyTorch."""
    import torch

    from lp_edge.export.checkpoints import load_networks

    torch.set_num_threads(settings.threads)
    networks, _ = load_networks(settings.weights, allow_unverified=True)
    stack.enter_context(torch.inference_mode())
    feature, source, driving = (
        torch.from_numpy(settings.arrays[name])
        for name in (names.FEATURE_3D, names.KP_SOURCE, names.KP_DRIVING)
    )
    crop = torch.from_numpy(settings.arrays[names.IMAGE])

    def frame() -> tuple[float, npt.NDArray[np.uint8]]:
        networks.motion(crop.permute(0, 3, 1, 2).float() / 255)
        between = time.perf_counter()
        image = networks.generator(networks.warping(feature, source, driving)[names.WARPED])
        return between, (image.permute(0, 2, 3, 1) * 255).clamp(0, 255).to(torch.uint8).numpy()

    return frame


SIDES = {"graphs": with_graphs, "eager": with_eager}


def serve(pipe: Connection, side: str, settings: Settings) -> None:
    """The body of a side's process: one frame for every message, the account at the end."""
    with ExitStack() as stack:
        try:
            start = time.perf_counter()
            frame = SIDES[side](stack, settings)
            loaded = time.perf_counter() - start
            pipe.send(None)
            image = None
            while pipe.recv():
                start = time.perf_counter()
                between, image = frame()
                pipe.send((between - start, time.perf_counter() - between))
            pipe.send(
                {"load_seconds": round(loaded, 2), "peak_memory_mib": peak_memory_mib(), "image": image}
            )
        except Exception as error:  # noqa: BLE001 - the parent tells
            pipe.send(EngineError(f"{side}: {error}", "expected it to run", "see the message"))


def features(pipe: Connection, bundle: Path, image: npt.NDArray[np.uint8]) -> None:
    """The body of the process that runs F."""
    try:
        with open_bundle(bundle).runner(names.APPEARANCE, BackendConfig("cpu")) as runner:
            pipe.send({name: to_host(array) for name, array in runner.infer({names.IMAGE: image}).items()})
    except Exception as error:  # noqa: BLE001 - the parent tells
        pipe.send(EngineError(f"F: {error}", "expected it to run", "see the message"))


@contextmanager
def process(body: Callable[..., None], *args: Any) -> Iterator[Callable[..., Any]]:
    """Start ``body(pipe, *args)`` in a fresh process; yields a function that sends its argument, if any, and receives."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=body, args=(there, *args), daemon=True)
    child.start()
    there.close()

    def ask(*message: Any) -> Any:
        try:
            for part in message:
                here.send(part)
            answer = here.recv()
        except (EOFError, BrokenPipeError) as error:
            child.join(5)
            raise EngineError(
                f"the process of {body.__name__} ended with code {child.exitcode}",
                "expected an answer",
                "free memory if the system ended it",
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        yield ask
    finally:
        here.close()
        child.join(10)
        if child.is_alive():
            child.kill()


# -- measurements ------------------------------------------------------------------------------------


def ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a / b."""
    return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 4)


def times(seconds: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    return {f"{k}_ms" if k != "count" else k: v for k, v in asdict(percentiles(seconds)).items()}


def bench_frame(
    bundle: Path, weights: Path, threads: int, rounds: int, warmup: int
) -> Iterator[dict[str, Any]]:
    """One record per side and one with the ratios graphs / eager."""
    arrays = inputs()
    with process(features, bundle, arrays[names.IMAGE]) as ask:
        arrays.update(ask())
    settings = Settings(bundle, weights, threads, arrays)
    origin = {**provenance(open_bundle(bundle)), "threads": threads}
    with ExitStack() as stack:
        ask_side = {side: stack.enter_context(process(serve, side, settings)) for side in SIDES}
        for ask in ask_side.values():
            ask()  # loaded
        laps: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
        for turn in range(warmup + rounds):
            for side in SIDES if turn % 2 else reversed(SIDES):  # neither side always comes first
                laps[side].append(ask_side[side](True))
        accounts = {side: ask(False) for side, ask in ask_side.items()}
    images = {side: account.pop("image").astype(np.int16) for side, account in accounts.items()}
    frames = {side: [sum(lap) for lap in laps[side][warmup:]] for side in SIDES}
    for side in SIDES:
        yield {
            "bench": "frame",
            "side": side,
            **times(frames[side]),
            "motion_p50_ms": times([m for m, _ in laps[side][warmup:]])["p50_ms"],
            "warp_decode_p50_ms": times([w for _, w in laps[side][warmup:]])["p50_ms"],
            **accounts[side],
            "warmup": warmup,
            "provenance": origin,
        }

    yield {
        "bench": "frame_ratio",
        "time": ratio(frames["graphs"], frames["eager"]),
        "motion_time": ratio(*([m for m, _ in laps[side][warmup:]] for side in ("graphs", "eager"))),
        "warp_decode_time": ratio(*([w for _, w in laps[side][warmup:]] for side in ("graphs", "eager"))),
        "peak_memory": round(accounts["graphs"]["peak_memory_mib"] / accounts["eager"]["peak_memory_mib"], 4),
        "image_max_difference": int(np.abs(images["graphs"] - images["eager"]).max()),
        "rounds": rounds,
        "provenance": origin,
    }


def bench_reductions(
    weights: Path, threads: int, rounds: int, warmup: int, only: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """One record per reduction: W + G with and without it, all others as by default; last without any."""
    import torch

    from lp_edge.export.checkpoints import load_networks
    from lp_edge.export.liveportrait.warp_decode import Reductions, WarpDecode
    from lp_edge.export.onnx_export import export_onnx, node_count, serialise

    default = Reductions()
    variants = {f.name: replace(default, **{f.name: not getattr(default, f.name)}) for f in fields(default)}
    variants["all"] = Reductions(**{f.name: False for f in fields(default)})
    if unknown := [name for name in only if name not in variants]:
        raise ConfigError(
            f"no reduction {', '.join(unknown)}", f"expected of {', '.join(variants)}", "choose one of them"
        )
    networks, checkpoints = load_networks(weights, allow_unverified=True)
    arrays = inputs()
    crop = torch.from_numpy(arrays[names.IMAGE]).permute(0, 3, 1, 2).float() / 255
    dense = networks.warping.dense_motion_network
    with torch.inference_mode():
        volume = networks.appearance(crop)
        compressed = torch.relu(dense.norm(dense.compress(volume)))
    feeds = {
        names.FEATURE_3D: volume.numpy(),
        names.FEATURE_COMPRESSED: compressed.numpy(),
        **{name: arrays[name] for name in (names.KP_SOURCE, names.KP_DRIVING)},
    }

    def graph(reductions: Reductions) -> tuple[bytes, int]:
        module = WarpDecode(networks.warping, networks.generator, reductions=reductions)
        axes = {name: {0: "sources" if "feature" in name else "batch"} for name in feeds}
        model = export_onnx(
            module,
            {
                name: torch.from_numpy(array if "feature" in name else np.repeat(array, 2, axis=0))
                for name, array in feeds.items()
            },
            {names.IMAGE: ("batch", 512, 512, 3)},
            axes,
            opset=17,
            keep=WarpDecode.KEEP,
        )
        return serialise(model), node_count(model)

    base, base_nodes = graph(default)
    origin = {**provenance(), "threads": threads, "checkpoints": [asdict(c) for c in checkpoints]}
    config = BackendConfig("cpu", threads=threads)
    for name in only or variants:
        data, nodes = graph(variants[name])
        with open_runner(base, config, name="default") as a, open_runner(data, config, name=name) as b:
            del data
            laps: dict[str, list[float]] = {"default": [], name: []}
            images = {}
            for turn in range(warmup + rounds):
                for runner in (a, b) if turn % 2 else (b, a):
                    start = time.perf_counter()
                    images[runner.name] = to_host(runner.infer(feeds)[names.IMAGE]).astype(np.int16)
                    laps[runner.name].append(time.perf_counter() - start)
        mine, other = laps["default"][warmup:], laps[name][warmup:]
        on = name == "all" or getattr(default, name)  # whether the default has it
        with_it, without = (mine, other) if on else (other, mine)
        yield {
            "bench": "reduction",
            "reduction": name,
            "default": on,
            "with_p50_ms": times(with_it)["p50_ms"],
            "without_p50_ms": times(without)["p50_ms"],
            "time_with_over_without": ratio(with_it, without),
            "nodes_with": base_nodes if on else nodes,
            "nodes_without": nodes if on else base_nodes,
            "image_max_difference": int(np.abs(images["default"] - images[name]).max()),
            "rounds": rounds,
            "provenance": origin,
        }


# -- commands ----------------------------------------------------------------------------------------


def report(lines: Iterator[dict[str, Any]]) -> None:
    """Print the records as they come; errors as one line on stderr."""
    try:
        for line in lines:
            print(json.dumps(line), flush=True)
    except LpEdgeError as error:
        print(f"graphs: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
WEIGHTS = click.option(
    "--weights", type=FOLDER, required=True, help="Checkpoints; need not be official ones."
)
THREADS = click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
WARMUP = click.option("--warmup", default=2, show_default=True, type=click.IntRange(0))


@click.group(help=__doc__)
def main() -> None:
    """Parse, measure, print."""


@main.command("frame")
@click.option("--bundle", type=FOLDER, required=True, help="Bundle made from these checkpoints.")
@WEIGHTS
@THREADS
@click.option("--rounds", default=12, show_default=True, type=click.IntRange(1))
@WARMUP
def frame_command(bundle: Path, weights: Path, threads: int, rounds: int, warmup: int) -> None:
    """Time and memory of one frame, graphs against PyTorch."""
    report(bench_frame(bundle, weights, threads, rounds, warmup))


@main.command("reductions")
@WEIGHTS
@THREADS
@click.option("--rounds", default=6, show_default=True, type=click.IntRange(1))
@WARMUP
@click.option("--only", multiple=True, metavar="NAME", help="Field of Reductions, or all; may be repeated.")
def reductions_command(weights: Path, threads: int, rounds: int, warmup: int, only: tuple[str, ...]) -> None:
    """What every rewriting of W + G brings."""
    report(bench_reductions(weights, threads, rounds, warmup, only))


if __name__ == "__main__":
    main()
