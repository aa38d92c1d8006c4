"""Everything that has to be shown on a GPU, in one command: measured, judged against the goals, summed up.

    python benchmarks/gpu/run.py --out DIR --backend tensorrt --bundle BUNDLE --reference BUNDLE32 [--weights DIR]
    python benchmarks/gpu/run.py --list
    python benchmarks/gpu/run.py --out DIR --only pipeline ...

Steps run one after the other, each in a process of its own with a limit of time, and write DIR/STEP.json (result and checks)
and DIR/STEP.jsonl (every record, as it is measured). A step that is done with the same settings is not repeated unless --again
says so, so the command may be stopped and given again. DIR/summary.md sums up all that is there. Exit code 1: a goal is missed
or a step failed. Nothing is downloaded. README.md beside this file says how to bring all of it to a machine without a network.

On the CPU backend it is a dry run: everything runs, no goal is judged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import Bundle, open_bundle
from lp_edge.engines.runner import Array, to_host
from lp_edge.errors import BackendUnavailable, EngineError, LpEdgeError
from lp_edge.runtime.bench_calls import feeds_of, origin_of
from lp_edge.runtime.bench_compare import Call, Side, bench_compare, compare_table, runner_side
from lp_edge.runtime.bench_networks import Counter, bench_networks, networks_table
from lp_edge.runtime.bench_pipeline import bench_pipeline, pipeline_table
from lp_edge.runtime.bench_report import Table
from lp_edge.runtime.bench_soak import bench_soak, growth_words, soak_table
from lp_edge.runtime.doctor import examine
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.roofline import measure_peaks

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]

# The goals.
LEAST_PSNR = 45.0
BEST_BATCH_SHARE = 0.6
OVER_EAGER, OVER_COMPILE = 2.0, 1.3
MOST_OUTSIDE, LEAST_BUSY = 0.15, 0.9
NOMINAL_GFLOP = 1234.0
"""W + G of LivePortrait at batch 1, as published; what an export leaves out of it counts as done."""


@dataclass(frozen=True)
class Settings:
    """What is measured; a step's result holds for these alone."""

    backend: str
    device: int = 0
    options: tuple[str, ...] = ()
    bundle: str = ""
    reference: str = ""
    weights: str = ""
    source: str = ""
    driving: str = ""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    frames: int = 10_000
    # Multiples of all batch sizes: a batch is finished at once, and a part of one counted would be time for nothing.
    clip: int = 192
    warmup: int = 64
    seconds: float = 2.0
    rounds: int = 30
    torch_python: str = ""
    torch_path: str = ""

    @property
    def config(self) -> BackendConfig:
        """Where our networks run."""
        options = dict(option.partition("=")[::2] for option in self.options)
        return BackendConfig(self.backend, self.device, provider_options=options)

    @property
    def judged(self) -> bool:
        """Whether the goals hold here: they are about GPUs."""
        return self.backend != "cpu"


@dataclass
class Result:
    """What a step found.

    Attributes:
        checks: ``goal``, ``got``, ``wanted`` in words, and whether it ``passed`` (None: not judged here, or not known).
        tables: for the summary.
        notes: sentences for the summary.
    """

    checks: list[Record] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Step:
    """A step in the making: keeps records and judges."""

    def __init__(self, settings: Settings, write: Callable[[Record], None]) -> None:
        self.settings, self.write, self.result = settings, write, Result()

    def keep(self, records: Iterable[Record]) -> list[Record]:
        """Write every record as it comes; all of them."""
        kept = []
        for record in records:
            self.write(record)
            kept.append(record)
        return kept

    def check(self, goal: str, got: str, wanted: str, passed: bool | None) -> None:
        """A goal and what came of it."""
        judged = passed if self.settings.judged else None
        self.result.checks.append({"goal": goal, "got": got, "wanted": wanted, "passed": judged})

    def bundle(self) -> Bundle:
        return open_bundle(Path(self.settings.bundle) if self.settings.bundle else None)

    def reference(self) -> Bundle:
        return open_bundle(Path(self.settings.reference)) if self.settings.reference else self.bundle()

    @property
    def inputs(self) -> dict[str, Any]:
        """Source and driver of animations."""
        return {
            "source": self.settings.source or None,
            "driving": self.settings.driving or None,
            "bundle": Path(self.settings.bundle) if self.settings.bundle else None,
            "backend": self.settings.config,
        }


def counter() -> Counter | None:
    """What counts FLOPs, where the package onnx is there."""
    try:
        from lp_edge.export.cost import file_cost
    except ImportError:
        return None
    return file_cost


# -- steps ------------------------------------------------------------------------------------------------------


def environment(step: Step) -> None:
    """What the machine is, and that the backend works."""
    step.write(
        {
            "step": "environment",
            **examine(Path(step.settings.bundle) if step.settings.bundle else None).as_dict(),
        }
    )
    origin = origin_of(step.bundle(), None, step.settings.config)
    step.write({"step": "environment", "provenance": origin})
    gpus = [gpu["name"] for gpu in origin["machine"]["gpus"]]
    step.check("a GPU", ", ".join(gpus) or "none", "one", bool(gpus))
    step.result.notes.append(
        f"{', '.join(gpus) or origin['machine']['cpu']}, driver {origin['machine']['driver'] or 'none'}; "
        + ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    )


def engines(step: Step) -> None:
    """Every network is built and runs, at batch 1 and at the largest batch its engine takes."""
    bundle, table = step.bundle(), Table("Engines", ["network", "ready in s", "batches", "device", "problem"])
    failed, origin = [], origin_of(bundle, None, step.settings.config)
    for name in bundle.manifest.networks:
        started, record = time.perf_counter(), {"step": "engines", "network": name}
        try:
            with bundle.runner(name, step.settings.config) as runner:
                record |= {"ready_s": round(time.perf_counter() - started, 2), "device": runner.device}
                sizes = sorted(
                    {1, min(runner.max_batch or max(step.settings.batches), max(step.settings.batches))}
                )
                for batch in sizes:
                    finite(name, runner.infer(feeds_of(bundle, runner.inputs.values(), batch)))
                record["batches"] = sizes
        except LpEdgeError as error:
            record["problem"] = str(error)
            failed.append(name)
        step.write({**record, "provenance": origin})
        table.rows.append(
            [
                name,
                record.get("ready_s"),
                str(record.get("batches", "")),
                record.get("device", ""),
                record.get("problem", ""),
            ]
        )
    step.result.tables.append(table)
    there = len(bundle.manifest.networks)
    step.check("every network builds and runs", f"{there - len(failed)} of {there}", "all", not failed)


def finite(network: str, results: Mapping[str, Array]) -> dict[str, npt.NDArray[Any]]:
    """Results on the host; EngineError where they are no numbers."""
    told = {name: to_host(array) for name, array in results.items()}
    for name, array in told.items():
        if not np.isfinite(array.astype(np.float64)).all():
            raise EngineError(
                f"{network}: {name} has values that are not finite", "expected numbers", "try fp32"
            )
    return told


def parity(step: Step) -> None:
    """Results against ONNX Runtime on the CPU with the reference bundle (fp32), inputs alike."""
    bundle, reference = step.bundle(), step.reference()
    cpu, origin = BackendConfig("cpu"), origin_of(bundle, None, step.settings.config)
    table = Table(
        "Parity with the reference in ONNX Runtime on the CPU",
        ["network", "output", "PSNR dB", "largest relative difference"],
    )
    made: dict[str, npt.NDArray[Any]] = {}  # features as the reference makes them
    order = [names.APPEARANCE, *bundle.manifest.networks]
    for name in dict.fromkeys(
        n for n in order if n in bundle.manifest.networks and n in reference.manifest.networks
    ):
        with reference.runner(name, cpu) as theirs:
            feeds = feeds_of(reference, theirs.inputs.values(), 1)
            feeds.update({key: array for key, array in made.items() if key in feeds})
            wanted = finite(name, theirs.infer(feeds))
        if name == names.APPEARANCE:
            made = wanted
        with bundle.runner(name, step.settings.config) as ours:
            got = finite(name, ours.infer(feeds))
        for key, array in wanted.items():
            psnr, worst = difference(array, got[key])
            step.write(
                {
                    "step": "parity",
                    "network": name,
                    "output": key,
                    "psnr_db": psnr,
                    "relative": worst,
                    "provenance": origin,
                }
            )
            table.rows.append([name, key, psnr, worst])
            if name == names.WARP_DECODE and key == names.IMAGE:
                told = "equal" if psnr is None else f"{psnr:.1f} dB"
                passed: bool | None = psnr is None or psnr >= LEAST_PSNR
                if (precision := reference.network(name).precision) != "fp32":
                    told, passed = f"{told}, but to a reference in {precision}: give --reference", None
                step.check("image of W + G against fp32", told, f"{LEAST_PSNR:.0f} dB", passed)
    step.result.tables.append(table)


def difference(wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> tuple[float | None, float]:
    """PSNR in dB against the range of the wanted values (255 for uint8; None where equal), largest difference over largest value."""
    apart = np.abs(wanted.astype(np.float64) - got.astype(np.float64))
    span = 255.0 if wanted.dtype == np.uint8 else float(np.ptp(wanted)) or 1.0
    error = float((apart**2).mean())
    psnr = None if error == 0 else round(10 * math.log10(span**2 / error), 2)
    return psnr, float(f"{apart.max() / max(float(np.abs(wanted).max()), 1e-12):.3g}")


def roofline(step: Step) -> None:
    """Every network alone against the card's peaks, measured in the same run."""
    settings, count = step.settings, counter()
    records = step.keep(
        bench_networks(
            Path(settings.bundle) if settings.bundle else None,
            settings.config,
            batches=settings.batches,
            seconds=settings.seconds,
            counter=count,
        )
    )
    step.result.tables.append(networks_table(records))
    half = next((r["tflops"].get("float16") for r in records if r["bench"] == "peaks"), None)
    if count is None and settings.judged:  # the share below needs no counting
        peaks = measure_peaks(settings.config, ["float16"], seconds=min(settings.seconds, 0.5))
        half = peaks.flops.get("float16", 0.0) / 1e12
        step.write({"bench": "peaks", "probes": [dict(probe) for probe in peaks.measured]})
    shares = {
        r["batch"]: NOMINAL_GFLOP / (r["row_ms"] * half)  # GFLOP/ms is TFLOP/s
        for r in records
        if r["bench"] == "networks" and r["network"] == names.WARP_DECODE and "row_ms" in r and half
    }
    family = step.bundle().manifest.family
    if not shares or family != "liveportrait":
        why = "no float16 products were measured" if family == "liveportrait" else f"the family is {family}"
        step.check("W + G, share of the fp16 peak", f"not known: {why}", f"{BEST_BATCH_SHARE:.0%}", None)
        return
    best = max(shares, key=lambda batch: shares[batch])
    if 1 in shares:
        row = next(r for r in records if r.get("network") == names.WARP_DECODE and r.get("batch") == 1)
        step.result.notes.append(
            f"W + G at batch 1: {row['p50_ms']} ms a call, {row['row_ms']} ms of a busy device; {NOMINAL_GFLOP:.0f} GFLOP in "
            f"that time are {shares[1]:.1%} of the measured fp16 peak of {half:.3g} TFLOP/s."
        )
    step.check(
        "W + G at the best batch, share of the fp16 peak",
        f"{shares[best]:.1%} at batch {best}",
        f"{BEST_BATCH_SHARE:.0%}",
        shares[best] >= BEST_BATCH_SHARE,
    )


@contextmanager
def in_process(settings: Settings, mode: str, network: str, batch: int) -> Iterator[Call]:
    """PyTorch in another interpreter, one call at a time; the time is taken there."""
    environ = {**os.environ, "PYTHONPATH": settings.torch_path or os.environ.get("PYTHONPATH", "")}
    command = [
        settings.torch_python,
        str(HERE / "torch_side.py"),
        settings.weights,
        mode,
        network,
        str(batch),
    ]
    command += [str(settings.device), "cpu" if settings.backend == "cpu" else "auto"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    ) as process:
        give, take = process.stdin, process.stdout
        if give is None or take is None:
            raise BackendUnavailable("no pipes to the other interpreter", "", "")

        def call() -> float:
            give.write("\n")
            give.flush()
            return answer()

        def answer() -> float:
            line = take.readline()
            if not line:
                raise BackendUnavailable(
                    f"{settings.torch_python} ended without an answer",
                    "expected PyTorch and the weights",
                    "see its words above",
                )
            return float(line)

        try:
            answer()  # loaded
            yield call
        finally:
            with contextlib.suppress(OSError):
                give.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def compare(step: Step) -> None:
    """Our engines against PyTorch eager in fp16 and torch.compile, in turns."""
    settings = step.settings
    wanted = {"eager": OVER_EAGER, "compile": OVER_COMPILE}
    if not settings.weights:
        step.check("ratio to PyTorch", "not measured: no --weights", "2 and 1.3", None)
        return
    if (family := step.bundle().manifest.family) != "liveportrait":
        told = f"not measured: the bundle is of the family {family}, PyTorch's networks are liveportrait's"
        step.check("ratio to PyTorch", told, "2 and 1.3", None)
        return
    ours = runner_side(Path(settings.bundle) if settings.bundle else None, settings.config, "ours")
    if settings.torch_python:
        networks = (names.WARP_DECODE, names.MOTION, names.APPEARANCE)
        others = [
            Side(
                f"torch {mode}",
                networks,
                partial(in_process, settings, mode),
                {"python": settings.torch_python},
                "liveportrait",
            )
            for mode in wanted
        ]
    else:
        from lp_edge.export.bench_torch import open_torch_side

        gpu = None if settings.judged else False
        others = [
            open_torch_side(Path(settings.weights), mode, device=settings.device, gpu=gpu)
            for mode in ("eager", "compile")
        ]
    records = []
    for (mode, least), other in zip(wanted.items(), others, strict=True):
        for network in (names.WARP_DECODE, names.MOTION, names.APPEARANCE):
            if network not in ours.networks:
                continue
            rows = step.keep(
                bench_compare(ours, [other], networks=[network], rounds=settings.rounds, warmup=5)
            )
            records += rows
            if network == names.WARP_DECODE:
                row = rows[0]
                got = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                step.check(f"W + G, PyTorch {mode} / ours", got, f"{least}", row["ratio"] >= least)
    step.result.tables.append(compare_table(records))


def pipeline(step: Step) -> None:
    """A whole run, frames on the device, batch chosen by itself and batch 1; judged at the size that was chosen."""
    settings = step.settings

    def measure(pixels: Sequence[str], sizes: Sequence[int | None]) -> list[Record]:
        return step.keep(
            bench_pipeline(
                **step.inputs,
                options=AnimateOptions(),
                pixels=pixels,
                batch_sizes=sizes,
                warmup=settings.warmup,
                limit=settings.clip,
            )
        )

    def run_of(batch: int | str) -> Record | None:
        wanted = ("pipeline", "auto", batch)
        return next((r for r in records if (r["bench"], r.get("pixels"), r.get("batch")) == wanted), None)

    records = measure(("auto", "host"), (None, 1))
    found = run_of("auto") or {}
    chosen = found.get("batch_size")
    if chosen is not None and run_of(chosen) is None:
        # The run that finds the size draws most of its frames in others.
        records += measure(("auto",), (chosen,))
    step.result.tables += pipeline_table(records)
    main = None if chosen is None else run_of(chosen)
    if main is None:
        frames = f"not known: no batch size was chosen within {settings.clip} frames; raise --clip"
        step.check("everything outside of the networks adds", frames, f"at most {MOST_OUTSIDE:.0%}", None)
        step.check("GPU busy, offline", frames, f"{LEAST_BUSY:.0%}", None)
        return
    outside, busy = main["outside"], main["device_busy"]
    ways = ""
    if main["gpu"] and main["gpu"]["utilization.gpu"] is not None:
        # Networks alone are less than all that the GPU does, so the larger counts; both are told.
        seen = main["gpu"]["utilization.gpu"] / 100
        ways, busy = f" (networks {busy:.1%}, nvidia-smi {seen:.1%})", max(busy, seen)
    step.check(
        "everything outside of the networks adds",
        "not known" if outside is None else f"{outside:.1%}",
        f"at most {MOST_OUTSIDE:.0%}",
        None if outside is None else outside <= MOST_OUTSIDE,
    )
    step.check("GPU busy, offline", f"{busy:.1%}{ways}", f"{LEAST_BUSY:.0%}", busy >= LEAST_BUSY)


def soak(step: Step) -> None:
    """Many frames; memory stays level."""
    frames = step.settings.frames
    records = step.keep(bench_soak(**step.inputs, frames=frames, samples=max(10, min(50, frames // 4))))
    step.result.tables.append(soak_table(records))
    last = records[-1]
    unknown = [name for name in ("host_mib", "device_mib") if last["level"][name] is None]
    passed = None if unknown and last["passed"] else last["passed"]
    step.check(f"{last['frames']} frames: memory level", growth_words(last), "level", passed)


@dataclass(frozen=True)
class Task:
    """A step: what it does, and seconds after which it is ended."""

    body: Callable[[Step], None]
    limit: float


STEPS = {
    "environment": Task(environment, 120),
    "engines": Task(engines, 580),
    "parity": Task(parity, 400),
    "roofline": Task(roofline, 500),
    "compare": Task(compare, 580),
    "pipeline": Task(pipeline, 400),
    "soak": Task(soak, 580),
}


# -- running steps ----------------------------------------------------------------------------------------------


def run_step(name: str, settings: Settings, out: Path) -> None:
    """Run a step in this process and write what came of it."""
    started = time.perf_counter()
    with (out / f"{name}.jsonl").open("w", encoding="utf-8") as lines:

        def write(record: Record) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        step = Step(settings, write)
        failed = ""
        try:
            STEPS[name].body(step)
        except LpEdgeError as error:
            failed = str(error)
    result = step.result
    told: Record = {
        "step": name,
        "about": STEPS[name].body.__doc__,
        "done": not failed,
        "failed": failed,
        "settings": plain(settings),
        "seconds": round(time.perf_counter() - started, 2),
        "checks": result.checks,
        "notes": result.notes,
        "tables": [table.markdown() for table in result.tables],
    }
    save(out, told)


def plain(settings: Settings) -> Record:
    """Settings as JSON gives them back, with digests of the bundles' networks: at the same place there may be others."""
    told: Record = asdict(settings)
    for kind in ("bundle", "reference"):
        with contextlib.suppress(LpEdgeError):
            networks = open_bundle(Path(told[kind])).manifest.networks if told[kind] else {}
            told[f"{kind}_networks"] = {name: entry.sha256 for name, entry in networks.items()}
    read: Record = json.loads(json.dumps(told))
    return read


def save(out: Path, told: Record) -> None:
    """Write a step's result in one go."""
    part = out / f".{told['step']}.part"
    part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    part.replace(out / f"{told['step']}.json")


def load(out: Path, name: str) -> Record | None:
    """A step's result, if there is one."""
    try:
        told: Record = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told


def in_child(name: str, settings: Settings, out: Path, limit: float) -> None:
    """Run a step in a process of its own, for so many seconds at most."""
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--step", name]
    command += ["--settings", json.dumps(asdict(settings))]
    failed, started = "", time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, timeout=limit, check=False).returncode
            failed = f"its process ended with code {code}, see {name}.log" if code else ""
        except subprocess.TimeoutExpired:
            failed = f"not done after {limit:.0f} s; what it measured is in {name}.jsonl"
    if failed:
        save(
            out,
            {
                "step": name,
                "done": False,
                "failed": failed,
                "settings": plain(settings),
                "seconds": round(time.perf_counter() - started, 2),
            },
        )


def summary(out: Path) -> bool:
    """Write summary.md of all steps; whether none failed and no goal was missed."""
    lines, good = ["# Figures on a GPU", ""], True
    results = [told for name in STEPS if (told := load(out, name))]
    marks = {True: "pass", False: "**MISSED**", None: "not judged"}
    lines += ["| step | goal | got | wanted | |", "|---|---|---|---|---|"]
    for told in results:
        if not told["done"]:
            good = False
            lines.append(f"| {told['step']} | | {told['failed'].replace('|', '/')} | | **FAILED** |")
        for check in told.get("checks", ()):
            good &= check["passed"] is not False
            lines.append(
                f"| {told['step']} | {check['goal']} | {check['got']} | {check['wanted']} | {marks[check['passed']]} |"
            )
    if len({json.dumps(told["settings"], sort_keys=True) for told in results}) > 1:
        lines += [
            "",
            "**These steps were not all run with the same settings or bundles**; STEP.json has each one's.",
        ]
    missing = [name for name in STEPS if load(out, name) is None]
    lines += ["", f"Not run: {', '.join(missing)}."] if missing else []
    for told in results:
        lines += ["", f"## {told['step']}", "", f"{told['seconds']} s. {told.get('about') or ''}".strip()]
        for note in told.get("notes", ()):
            lines += ["", note]
        for table in told.get("tables", ()):
            lines += ["", table.rstrip()]
    (out / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return good


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--only", action="append", choices=list(STEPS), help="may be repeated; default: all")
    parser.add_argument("--again", action="store_true", help="repeat steps that are done")
    parser.add_argument("--limit", type=float, help="seconds for each step; default: see --list")
    parser.add_argument("--backend", default="tensorrt", help="default: tensorrt")
    parser.add_argument(
        "--backend-option", action="append", default=[], metavar="NAME=VALUE", help="may be repeated"
    )
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--bundle", default="", help="bundle to measure; default: the built-in one")
    parser.add_argument("--reference", default="", help="fp32 bundle for parity; default: --bundle itself")
    parser.add_argument(
        "--weights", default="", help="checkpoints for PyTorch; need not be the official ones"
    )
    parser.add_argument(
        "--torch-python", default="", help="another interpreter that has PyTorch; default: this one"
    )
    parser.add_argument("--torch-path", default="", help="its PYTHONPATH; default: that of this one")
    parser.add_argument(
        "--source", default="", help="picture for pipeline and soak; default: the demo picture"
    )
    parser.add_argument("--driving", default="", help="its driver; default: a clip made of the demo picture")
    parser.add_argument("--batches", default="1,2,4,8", help="default: 1,2,4,8")
    for name, about in (
        ("frames", "of soak"),
        ("clip", "of pipeline"),
        ("warmup", "of pipeline, not counted"),
        ("rounds", "of compare"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=getattr(Settings, name), help=f"{about}; default: %(default)s"
        )
    parser.add_argument(
        "--seconds", type=float, default=Settings.seconds, help="per measurement; default: %(default)s"
    )
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.out is None and not given.list:
        parser.error("--out DIR is needed")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run what is not done, sum up."""
    given = parse(arguments)
    if given.list:
        for name, task in STEPS.items():
            print(f"{name:12} {task.limit:5.0f} s  {task.body.__doc__}")
        return 0
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    if given.step:
        kept = json.loads(given.settings)
        kept["options"], kept["batches"] = tuple(kept["options"]), tuple(kept["batches"])
        run_step(given.step, Settings(**kept), out)
        return 0
    try:
        settings = Settings(
            given.backend,
            given.device,
            tuple(given.backend_option),
            *(getattr(given, name) for name in ("bundle", "reference", "weights", "source", "driving")),
            tuple(int(part) for part in given.batches.split(",")),
            *(
                getattr(given, name)
                for name in ("frames", "clip", "warmup", "seconds", "rounds", "torch_python", "torch_path")
            ),
        )
    except ValueError:
        print(f"run: --batches {given.batches!r}: expected whole numbers such as 1,2,4", file=sys.stderr)
        return 2
    for name in given.only or STEPS:
        before = load(out, name)
        if before and before["done"] and before["settings"] == plain(settings) and not given.again:
            print(f"run: {name}: done before", file=sys.stderr)
            continue
        print(f"run: {name} …", file=sys.stderr, flush=True)
        in_child(name, settings, out, given.limit or STEPS[name].limit)
        told = load(out, name) or {"failed": "no result", "seconds": 0, "done": False}
        print(f"run: {name}: {told['failed'] or 'done'} in {told['seconds']} s", file=sys.stderr, flush=True)
    good = summary(out)
    print(out / "summary.md")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
