"""The server's figures: what it adds, how many it serves, what it loses. Prints JSON lines, and a table on standard error.

    python benchmarks/server.py single     [--rounds 8] [--frames 120] [--trips 320]
    python benchmarks/server.py concurrent [--driver jpeg|motion] [--rate 30] [--seconds 15] [--turns 2] [--mixed]
    python benchmarks/server.py soak       [--soak-frames 10000] [--cycles 500]
    python benchmarks/server.py kill       [--clients 50] [--servers 4]
    python benchmarks/server.py all        (any of these options; --quick: a few seconds each, which shows nothing but that it works)

The server is `lp-serve` in a process of its own, clients are other processes on the same machine and share its cores. Without arguments
the demo picture (512x512) follows a clip of 512x512 of itself, talking, with the built-in networks on the CPU. Records of kind
`check` hold a figure, its limit and whether it is kept; exits with 1 if one is not. docs/measuring.md explains the records.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from _server_clients import (
    DRAWN_QUALITY,
    SENT_QUALITY,
    Client,
    Crowd,
    Cycles,
    InProcess,
    Material,
    Survivor,
    Victim,
    Witness,
    pack,
)
from _server_figures import (
    PARTS,
    check,
    fairness,
    gaps_of,
    growth,
    missing,
    order,
    paired,
    parts_of,
    rate,
    returned,
    times,
)
from _server_process import Helper, Sampler, Server, Usage, level_of, names_in_shm

from lp_edge.engines.bundle import open_bundle
from lp_edge.errors import LpEdgeError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.image import encode_image, read_image
from lp_edge.runtime.job import demo_picture
from lp_edge.runtime.media_read import VideoReader
from lp_edge.runtime.provenance import provenance

Record = dict[str, Any]
Args = argparse.Namespace

MIN_RATIO, MAX_ADDED_MS = 0.9, {"shm": 5.0, "jpeg": 15.0}
MIN_AGGREGATE, MAX_FAIRNESS = 0.9, 1.3
# Where the goal is a word: "bounded" (latency in the second half over the first), "its level" (share of memory), "resume" (seconds).
MAX_LATER, MAX_RSS_GROWTH, MAX_RESUME_S = 1.5, 0.05, 5.0

_SOAKED, _CYCLED = 400, 24  # frames and cycles that warm up
_DISTURBED = 0.1  # cores of other programs from which figures are not to be trusted
_FILL = 4  # streams at once that make the server's pools as large as they get here
# option -> value for figures, value with --quick
_VALUES: dict[str, tuple[Any, Any]] = {
    "rounds": (8, 1),
    "frames": (120, 24),
    "trips": (320, 20),
    "levels": ((1, 2, 4, 8, 16), (1, 2)),
    "turns": (2, 1),
    "seconds": (15.0, 1.0),
    "warmup": (3.0, 0.3),
    "soak_frames": (10_000, 40),
    "cycles": (500, 4),
    "filling": (60, 8),
    "interval": (2.0, 0.1),
    "clients": (50, 4),
    "servers": (4, 1),
    "driver_frames": (100, 24),
}


# -- material ----------------------------------------------------------------------------------------------


def square(rgb: np.ndarray, side: int) -> np.ndarray:
    """The middle of a picture as a square of that side."""
    height, width = rgb.shape[:2]
    least = min(height, width)
    top, left = (height - least) // 2, (width - least) // 2
    cut = rgb[top : top + least, left : left + least]
    return np.asarray(cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def pictures_of(driving: Path | None) -> Generator[np.ndarray, None, None]:
    """Frames of a clip, or of the demo picture talking."""
    if driving is not None:
        with VideoReader(driving) as reader:
            for picture in reader:
                yield picture.rgb
        return
    with Animator() as animator:
        for frame in animator.animate(demo_picture(), "talk"):
            yield frame.rgb


def prepare(args: Args) -> Material:
    """Portrait and driving frames of the size asked for."""
    with closing(pictures_of(args.driving)) as pictures:
        frames = tuple(
            pack(square(rgb, args.size), SENT_QUALITY) for rgb in islice(pictures, args.driver_frames)
        )
    portrait = square(read_image(args.source or demo_picture()), args.size)
    return Material(encode_image(portrait, ".png"), frames, args.bundle, args.backend)


def describe(args: Args, material: Material) -> Record:
    """What a record must say of its inputs."""
    return {
        "source": args.source.name if args.source else "demo picture",
        "driving": args.driving.name if args.driving else "demo picture, talk",
        "side": args.size,
        "driving_frames": len(material.frames),
        "driving_jpeg_bytes": round(statistics.mean(map(len, material.frames))),
        "jpeg_quality": {"driving": SENT_QUALITY, "drawn": DRAWN_QUALITY},
    }


def server_of(args: Args, listen: str = "127.0.0.1:0") -> Server:
    """A server as the arguments want it."""
    options = ["--backend", args.backend]
    if args.bundle is not None:
        options += ["--bundle", str(args.bundle)]
    return Server(listen, (*options, *args.serve))


# -- one stream --------------------------------------------------------------------------------------------


def single(args: Args, material: Material) -> Iterator[Record]:
    """Frames a second beside the same work in process, and what a round trip has beyond the compute."""
    with server_of(args) as server, ExitStack() as stack:
        inside = stack.enter_context(Helper(InProcess, material))
        outside = stack.enter_context(Helper(Client, server.address, material))
        yield {"record": "server", **outside.call("info")}
        yield from _throughput(args, server, inside, outside)
        yield from _latency(args, server, inside, outside)


def _throughput(args: Args, server: Server, inside: Helper, outside: Helper) -> Iterator[Record]:
    sides: dict[str, Callable[[], Record]] = {
        "in process, JPEG": lambda: inside.call("throughput", "jpeg", args.frames),
        "in process, arrays": lambda: inside.call("throughput", "arrays", args.frames),
    }
    for via in args.via:
        for kind in ("jpeg", "shm"):
            sides[f"{via}, {kind}"] = lambda v=via, k=kind: outside.call("throughput", v, k, args.frames)
    warmup = max(1, args.frames // 6)
    rates: dict[str, list[float]] = defaultdict(list)
    busy: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    last: dict[str, Any] = {}
    usage = Usage({"in process": inside.pid, "client": outside.pid, "server": server.pid})
    for turn in range(args.rounds):
        for name in order(list(sides), turn):
            usage.take()
            found = sides[name]()
            for who, seconds in usage.take().items():
                busy[name][who] += seconds
            rates[name].append(rate(found["done"], warmup))
            last[name] = found["last"]
    for name, values in rates.items():
        yield {
            "record": "throughput",
            "side": name,
            "fps": round(statistics.median(values), 2),
            "rounds": [round(v, 2) for v in values],
            "frames": args.frames,
            "warmup": warmup,
            # processor time of each process, which other work on the machine disturbs less
            "cpu_ms_per_frame": {
                who: round(1e3 * busy[name][who] / (args.rounds * args.frames), 2)
                for who in ("in process", "client", "server")
            },
            "others_cores": round(busy[name]["others"] / busy[name]["wall"], 3),
        }
    for via in args.via:
        for kind, base in (("jpeg", "in process, JPEG"), ("shm", "in process, arrays")):
            side = f"{via}, {kind}"
            difference = None
            if kind == "shm":  # the same frames, drawn alike
                difference = int(np.abs(last[side].astype(np.int16) - last[base]).max())
            yield {
                "record": "ratio",
                "side": side,
                "to": base,
                **paired(rates[side], rates[base]),
                "max_abs_difference": difference,
            }
            ratio = paired(rates[side], rates[base])["ratio"]
            yield check(f"frames a second, {side} / {base}", ratio, ">=", MIN_RATIO)


def _latency(args: Args, server: Server, inside: Helper, outside: Helper) -> Iterator[Record]:
    sides = [(via, kind) for via in args.via for kind in ("shm", "jpeg")]
    warmup, block = 10, max(10, args.trips // args.rounds)
    trips: dict[tuple[str, str], list[Record]] = defaultdict(list)
    alone: list[float] = []
    names = {f"{via}, {kind}": (via, kind) for via, kind in sides}
    usage = Usage({"in process": inside.pid, "client": outside.pid, "server": server.pid})
    for turn in range(args.rounds):
        for name in order([*names, "in process"], turn):
            if name in names:
                via, kind = names[name]
                trips[via, kind] += outside.call("latency", via, kind, warmup + block)[warmup:]
            else:
                alone += inside.call("latency", warmup + block)[warmup:]
    spent = usage.take()
    others = {"others_cores": round(spent["others"] / spent["wall"], 3)}
    yield {"record": "compute", "side": "in process, arrays", **times(alone), **others}
    for (via, kind), found in trips.items():
        parts = [parts_of(trip) for trip in found]
        stages: dict[str, list[float]] = defaultdict(list)
        gaps: dict[str, list[float]] = defaultdict(list)
        for trip in found:
            for stage, _, seconds in trip["stages"]:
                stages[stage].append(seconds)
            for stage, seconds in gaps_of(trip).items():
                gaps[stage].append(seconds)
        added = times([p["added"] for p in parts])
        yield {
            "record": "latency",
            "side": f"{via}, {kind}",
            **others,
            "added": added,
            "round_trip": times([p["round_trip"] for p in parts]),
            "compute": times([p["compute"] for p in parts]),
            # what standing in line for the device costs is part of the server's compute stages
            "compute_over_in_process_ms": round(
                times([p["compute"] for p in parts])["p50_ms"] - times(alone)["p50_ms"], 3
            ),
            "parts": {part: times([p[part] for p in parts]) for part in PARTS},
            "gaps_before": {stage: times(seconds) for stage, seconds in gaps.items()},
            "stages": {stage: times(seconds) for stage, seconds in stages.items()},
        }
        yield check(f"added latency p99 in ms, {via}, {kind}", added["p99_ms"], "<=", MAX_ADDED_MS[kind])


# -- many streams ------------------------------------------------------------------------------------------


def crowd_portraits(material: Material, count: int, mixed: bool) -> list[bytes]:
    """One picture for each stream: mirrored or not; ``mixed``: of three sizes, whose calls do not fit into one batch."""
    rgb = cv2.cvtColor(cv2.imdecode(np.frombuffer(material.portrait, np.uint8), 1), cv2.COLOR_BGR2RGB)
    found = []
    for i in range(count):
        picture = rgb[:, ::-1] if i % 2 else rgb
        if mixed:
            side = rgb.shape[0] * (4 + i % 3) // 4
            picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_CUBIC)
        found.append(encode_image(np.ascontiguousarray(picture), ".png"))
    return found


def concurrent(args: Args, material: Material) -> Iterator[Record]:
    """1 to 16 live streams: frames a second of all, latency, drops, fairness, batches; two kinds of load."""
    levels = list(args.levels)
    portraits = crowd_portraits(material, max(levels), args.mixed)
    loads = {f"camera, {args.rate:g} frames/s": args.rate, "two on the way": 0.0}
    with server_of(args) as server, Helper(Crowd, server.address, material, portraits, args.driver) as crowd:
        for load, pace in loads.items():
            runs: dict[int, list[Record]] = defaultdict(list)
            for turn in range(args.turns):
                for streams in levels[::-1] if turn % 2 else levels:
                    runs[streams].append(_crowded(server, crowd, streams, pace, args))
            for streams in levels:
                yield {
                    "record": "concurrent",
                    "driver": args.driver,
                    "load": load,
                    "mixed_sizes": args.mixed,
                    "streams": streams,
                    "fps": round(statistics.median(r["fps"] for r in runs[streams]), 2),
                    "others_cores": max(r["others_cores"] for r in runs[streams]),
                    "rounds": runs[streams],
                }
            yield from _judged(f"{args.driver}, {load}", levels, runs)


def _crowded(server: Server, crowd: Helper, streams: int, pace: float, args: Args) -> Record:
    before, usage = server.metrics(), Usage({"server": server.pid, "clients": crowd.pid})
    found = crowd.call("run", streams, pace, args.warmup, args.seconds)["streams"]
    after, spent = server.metrics(), usage.take()
    server.wait_for_streams(0)

    def change(name: str, label: str = "") -> float:
        return after.get((name, label), 0.0) - before.get((name, label), 0.0)

    frames = [len(stream["latency"]) for stream in found]
    latency = [seconds for stream in found for seconds in stream["latency"]]
    halves: tuple[list[float], list[float]] = ([], [])
    for stream in found:
        for at, seconds in zip(stream["at"], stream["latency"], strict=True):
            halves[at >= args.seconds / 2].append(seconds)
    networks = sorted({label for name, label in after if name == "lp_edge_batch_size_count"})
    batches = {}
    for network in networks:
        calls = change("lp_edge_batch_size_count", network)
        if calls:
            batches[network] = {
                "rows_mean": round(change("lp_edge_batch_size_sum", network) / calls, 3),
                "engine_ms": round(1e3 * change("lp_edge_engine_seconds_sum", network) / calls, 3),
            }
    fps = sum(frames) / args.seconds
    return {
        "fps": round(fps, 2),
        "frames": frames,
        "fairness": round(fairness(frames), 4) if min(frames) else None,
        "latency": times(latency) if latency else None,
        # how long each stream would wait for its turn if all were served in turn
        "cycle_ms": round(1e3 * streams / fps, 2) if fps else None,
        "later": round(statistics.median(halves[1]) / statistics.median(halves[0]), 4)
        if all(halves)
        else None,
        "sent": sum(stream["sent"] for stream in found),
        "dropped": sum(stream["dropped"] for stream in found),
        "batches": batches,
        "batch_wait_ms": round(
            1e3
            * change("lp_edge_batch_wait_seconds_sum")
            / max(1.0, change("lp_edge_batch_wait_seconds_count")),
            3,
        ),
        "cpu_cores": {who: round(spent[who] / spent["wall"], 3) for who in ("server", "clients")},
        "others_cores": round(spent["others"] / spent["wall"], 3),
    }


def _judged(what: str, levels: list[int], runs: dict[int, list[Record]]) -> Iterator[Record]:
    alone = [run["fps"] for run in runs[levels[0]]]
    nan = float("nan")
    for streams in levels:
        if streams != levels[0]:
            found = paired([run["fps"] for run in runs[streams]], alone) if min(alone) else {"ratio": nan}
            name = f"frames a second of {streams} streams / of {levels[0]}, {what}"
            yield check(name, found["ratio"], ">=", MIN_AGGREGATE)
            worst = max(run["fairness"] or float("inf") for run in runs[streams])
            yield check(f"most / fewest frames of {streams} streams, {what}", worst, "<=", MAX_FAIRNESS)
        later = statistics.median(run["later"] or nan for run in runs[streams])
        yield check(f"latency p50, second half / first, {streams} streams, {what}", later, "<=", MAX_LATER)


# -- long use ----------------------------------------------------------------------------------------------


def soak(args: Args, material: Material) -> Iterator[Record]:
    """Frames on one stream, and short streams one after the other: does everything return to its level?"""
    with server_of(args) as server:
        for kind in ("jpeg", "shm"):
            with Helper(Client, server.address, material) as client:
                via = args.via[0]
                client.call("fill", _FILL, args.filling)
                client.call("throughput", via, kind, min(_SOAKED, args.soak_frames))
                before, own = server.rest(args.interval / 2), level_of(client.pid)
                start = server.metrics()[("lp_edge_frames_total", "animate")]

                def frames_so_far(start: float = start) -> float:
                    return server.metrics()[("lp_edge_frames_total", "animate")] - start

                with Sampler(server.pid, frames_so_far, args.interval) as sampler:
                    done = client.call("throughput", via, kind, args.soak_frames)["done"]
                found = growth(before, server.rest(args.interval / 2), sampler.levels)
                name = f"{args.soak_frames} frames, {kind}"
                yield {
                    "record": "soak",
                    "work": name,
                    "fps": round(rate(done, 1), 2),
                    **found,
                    "client_rss_growth": round(level_of(client.pid).rss_mib / own.rss_mib - 1, 4),
                    "samples": _series(sampler),
                }
                yield check(f"{name}: answers missing", args.soak_frames - len(done), "<=", 0)
                yield from returned(name, found, MAX_RSS_GROWTH)
        with Helper(Cycles, server.address, material) as cycles:
            cycles.call("run", 0, min(_CYCLED, args.cycles))
            before, own = server.rest(args.interval / 2), level_of(cycles.pid)
            progress = [0.0]
            with Sampler(server.pid, lambda: progress[0], args.interval) as sampler:
                for first in range(0, args.cycles, 10):
                    cycles.call("run", first, min(10, args.cycles - first))
                    progress[0] = float(min(first + 10, args.cycles))
            found = growth(before, server.rest(args.interval / 2), sampler.levels)
            clients = growth(own, level_of(cycles.pid), [own])
            name = f"{args.cycles} cycles"
            yield {
                "record": "soak",
                "work": name,
                **found,
                "clients": {key: clients[key] for key in ("before", "after", "rss_growth")},
                "samples": _series(sampler),
            }
            yield from returned(name, found, MAX_RSS_GROWTH)
        said = server.said()
    yield {"record": "log", "work": "soak", "warnings": said.splitlines()[:20]}


def _series(sampler: Sampler, most: int = 100) -> Record:
    levels = sampler.levels[:: max(1, -(-len(sampler.levels) // most))]
    return {
        key: [getattr(one, key) for one in levels] for key in ("at", "rss_mib", "threads", "fds", "shm_open")
    }


# -- kill --------------------------------------------------------------------------------------------------


def kill(args: Args, material: Material) -> Iterator[Record]:
    """Clients that die, a server that dies."""
    yield from _kill_clients(args, material)
    yield from _kill_server(args, material)


def _kill_clients(args: Args, material: Material) -> Iterator[Record]:
    kinds = ("jpeg", "shm", "jpeg lossless", "unmapped")
    chance = random.Random(7)
    with server_of(args) as server, Helper(Client, server.address, material) as other:
        portrait = other.call("portrait")
        other.call("fill", _FILL, args.filling)
        for kind in kinds[: args.clients // 4]:  # everything is used once before the level is taken
            _kill_one(server, material, portrait, kind, 0.0, 0)
        before = server.rest(args.interval / 2)
        noticed: dict[str, list[float]] = defaultdict(list)
        with Helper(Witness, server.address, material, args.witness_rate) as witness:
            witness.call("start")
            killed = []
            progress = [0.0]
            with Sampler(server.pid, lambda: progress[0], args.interval) as sampler:
                for number in range(args.clients):
                    kind = kinds[number % len(kinds)]
                    killed.append(time.perf_counter())
                    noticed[kind].append(
                        _kill_one(server, material, portrait, kind, chance.uniform(0, 0.15), 1)
                    )
                    progress[0] = number + 1.0
            saw = witness.call("stop")
        found = growth(before, server.rest(args.interval / 2), sampler.levels)
        said = server.said()
    gaps = [b - a for a, b in zip(saw["at"], saw["at"][1:], strict=False)]
    yield {
        "record": "kill_client",
        "clients": args.clients,
        "noticed": {kind: times(seconds) for kind, seconds in noticed.items()},
        "other": {
            "sent": saw["sent"],
            "answers": len(saw["sequences"]),
            "error": saw["error"],
            "gap": times(gaps) if gaps else None,
        },
        **found,
        "samples": _series(sampler),
        "warnings": said.splitlines()[:20],
    }
    name = f"{args.clients} clients killed"
    lost = missing(saw["sequences"], saw["sent"])
    yield check(f"{name}: frames that another stream lost", lost, "<=", 0)
    yield check(f"{name}: errors of the other stream", int(saw["error"] is not None), "<=", 0)
    yield from returned(name, found, MAX_RSS_GROWTH)


def _kill_one(
    server: Server, material: Material, portrait: str, kind: str, delay_s: float, others: int
) -> float:
    """Seconds until the server has noticed."""
    victim = Helper(Victim, server.address, material, portrait, kind)
    try:
        victim.call("start")
        time.sleep(delay_s)
    finally:
        victim.kill()
    return server.wait_for_streams(others)


def _kill_server(args: Args, material: Material) -> Iterator[Record]:
    for number in range(args.servers):
        kind = ("jpeg", "shm")[number % 2]
        with ExitStack() as stack:
            server = stack.enter_context(server_of(args))
            survivor = stack.enter_context(
                Helper(Survivor, server.address, material, args.witness_rate, kind)
            )
            witness = stack.enter_context(Helper(Witness, server.address, material, args.witness_rate))
            survivor.call("start")
            witness.call("start")
            time.sleep(0.5)
            killed = time.perf_counter()
            server.kill()
            again = stack.enter_context(server_of(args, server.address))
            ready = time.perf_counter()
            plain = witness.call("stop")
            answers, begun = survivor.call("count"), time.perf_counter()
            while survivor.call("count") < answers + 10 and time.perf_counter() - begun < 60:
                time.sleep(0.05)
            saw = survivor.call("stop")
            names = again.level().shm + len(names_in_shm(server.pid))
        after = [at for at in saw["at"] if at > ready]
        yield {
            "record": "kill_server",
            "transport": kind,
            "without_reconnect": plain["error"],
            "noticed_ms": round(1e3 * (plain["failed_at"] - killed), 1) if plain["failed_at"] else None,
            "server_start_s": round(ready - killed, 3),
            "flowing_after_kill_s": round(after[0] - killed, 3) if after else None,
            "flowing_after_ready_s": round(after[0] - ready, 3) if after else None,
            "reconnects": saw["reconnects"],
            "sent": saw["sent"],
            "answers": len(saw["sequences"]),
            "errors": saw["errors"],
        }
        name = f"server killed, {kind}"
        unavailable = int(plain["error"] != "UNAVAILABLE")
        yield check(
            f"{name}: client without reconnect got another status than UNAVAILABLE", unavailable, "<=", 0
        )
        flowing = after[0] - ready if after else float("nan")
        yield check(f"{name}: seconds from the new server to the first frame", flowing, "<=", MAX_RESUME_S)
        lost = missing(saw["sequences"], saw["sent"])
        yield check(f"{name}: frames of the lossless stream lost", lost, "<=", 0)
        yield check(f"{name}: names left in /dev/shm", names, "<=", 0)


# -- command -----------------------------------------------------------------------------------------------

COMMANDS: dict[str, Callable[[Args, Material], Iterator[Record]]] = {
    "single": single,
    "concurrent": concurrent,
    "soak": soak,
    "kill": kill,
}


def arguments(argv: list[str] | None = None) -> Args:
    """The command line; what is not given gets its value from ``_VALUES``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*COMMANDS, "all"])
    parser.add_argument("--quick", action="store_true", help="a few seconds each, to see that it works")
    parser.add_argument("--output", type=Path, help="file for the JSON lines instead of standard output")
    parser.add_argument("--source", type=Path, help="picture of the portrait; its middle is used")
    parser.add_argument("--driving", type=Path, help="driving clip; the middle of its frames is used")
    parser.add_argument("--size", type=int, default=512, help="side of portrait and driving frames in pixels")
    parser.add_argument("--bundle", type=Path, help="bundle instead of the built-in one")
    parser.add_argument("--backend", default="cpu", help="of both sides")
    parser.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="OPTION",
        help="more for lp-serve: --serve=--max-batch=1",
    )
    parser.add_argument(
        "--via",
        action="append",
        choices=["client", "raw"],
        help="lp_edge.client, or bare stubs; default: both, in soak the first",
    )
    parser.add_argument("--rounds", type=int, help="single: rounds in which all sides take turns")
    parser.add_argument("--frames", type=int, help="single: frames of each side in a round")
    parser.add_argument("--trips", type=int, help="single: round trips of each side in all")
    parser.add_argument(
        "--levels",
        type=_levels,
        help="concurrent: numbers of streams, the first is compared with; 1,2,4,8,16",
    )
    parser.add_argument("--turns", type=int, help="concurrent: how often each level is measured")
    parser.add_argument(
        "--driver", choices=["jpeg", "motion"], default="jpeg", help="concurrent: what is sent"
    )
    parser.add_argument("--rate", type=float, default=30.0, help="concurrent: frames a second of each camera")
    parser.add_argument("--seconds", type=float, help="concurrent: measured time of a level")
    parser.add_argument("--warmup", type=float, help="concurrent: seconds before that")
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="concurrent: portraits of three sizes, which do not share a batch",
    )
    parser.add_argument(
        "--soak-frames", type=int, help="soak: frames of one stream as JPEG, and of one through shared memory"
    )
    parser.add_argument("--cycles", type=int, help="soak: connections one after the other")
    parser.add_argument(
        "--filling", type=int, help="soak, kill: frames of each of four streams that warm the server up"
    )
    parser.add_argument("--interval", type=float, help="soak, kill: seconds between two looks at the server")
    parser.add_argument("--clients", type=int, help="kill: clients that are killed")
    parser.add_argument("--servers", type=int, help="kill: servers that are killed")
    parser.add_argument(
        "--witness-rate",
        type=float,
        default=8.0,
        help="kill: frames a second of the streams that are to survive",
    )
    parser.add_argument("--driver-frames", type=int, help="frames of the driver, which goes forth and back")
    args = parser.parse_args(argv)
    for name, values in _VALUES.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.quick])
    args.via = args.via or ["client", "raw"]
    low = {"frames": 12, "driver_frames": 2, "soak_frames": 8, "size": 64, "rate": 1, "witness_rate": 1}
    for name in (*_VALUES, "size", "rate", "witness_rate"):
        value = getattr(args, name)
        if name != "levels" and (value < low.get(name, 1) if isinstance(value, int) else value <= 0):
            parser.error(f"--{name.replace('_', '-')} is {value}; expected {low.get(name, 1)} or more")
    return args


def _levels(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(","))
    if not found or min(found) < 1 or max(found) > 16 or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected different numbers from 1 to 16, the server's own limit"
        )
    return found


def table(records: list[Record], out: TextIO) -> None:
    """All checks, one a line, and how much other programs disturbed them."""
    for record in records:
        if record["record"] == "check":
            verdict = "PASS" if record["pass"] else "FAIL"
            value = "none" if record["value"] is None else f"{record['value']:g}"
            print(f"{verdict}  {value:>10} {record['limit']:>8}  {record['figure']}", file=out)
    others = max((record.get("others_cores", 0.0) for record in records), default=0.0)
    if others > _DISTURBED:
        print(
            f"note: other programs used up to {others:g} cores meanwhile; repeat on a quiet machine", file=out
        )


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print; 1 if a figure is missed."""
    args = arguments(argv)
    records: list[Record] = []
    with ExitStack() as stack:
        out = stack.enter_context(args.output.open("w")) if args.output else sys.stdout
        try:
            bundle, material = open_bundle(args.bundle), prepare(args)
            inputs = describe(args, material)
            for command in COMMANDS if args.command == "all" else [args.command]:
                for record in COMMANDS[command](args, material):
                    records.append({"benchmark": "server", "command": command, "quick": args.quick, **record})
                    line = {**records[-1], "inputs": inputs, "provenance": provenance(bundle)}
                    print(json.dumps(line), file=out, flush=True)
        except LpEdgeError as error:
            print(f"server: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            table(records, sys.stderr)
    return int(any(not record.get("pass", True) for record in records))


if __name__ == "__main__":
    sys.exit(main())
