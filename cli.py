"""The commands ``lp-run``, ``lp-export``, ``lp-doctor`` and ``lp-bench``: parse, build a configuration, call, print.

Nothing heavy is imported until a command runs, so ``--help`` is instant. Results go to standard output, everything else
(progress, warnings, errors) to standard error; with ``--json`` standard output holds exactly one JSON object
(``lp-bench``: one per line), for errors too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from lp_edge.errors import BackendUnavailable, Interrupted, LpEdgeError

if TYPE_CHECKING:
    from types import FrameType

    from lp_edge.engines.backends import BackendConfig
    from lp_edge.runtime.doctor import Report
    from lp_edge.runtime.job import Progress, RunResult

__all__ = ["bench", "doctor", "export", "run"]

_EXIT_CODES = """\b
Exit codes:
    0  done                          6  a network failed
    1  unexpected error              7  backend or device not there
    2  wrong option or combination   8  result cannot be written
    3  input cannot be read          9  export failed
    4  no usable face              130  stopped (Ctrl-C)
    5  bundle incomplete or altered
"""

_PLAIN_EVERY = 5.0  # seconds between two lines of progress where there is no terminal


# -- one frame around every command -------------------------------------------------------------------


class _Guarded(click.Command):
    """A command whose every end is an exit code: errors become a message (or JSON) and the code of their class."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        words = sys.argv[1:] if args is None else list(args)
        name = prog_name or self.name or "lp-edge"
        as_json, verbose = "--json" in words, "--verbose" in words or "-v" in words
        try:
            with _terminable():
                code = super().main(words, name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            usage = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else ""
            message = error.format_message()
            hint = f"{name} --help lists all options" if usage else ""
            sys.exit(_report(name, type(error).__name__, message, "", hint, error.exit_code, as_json))
        except (click.Abort, KeyboardInterrupt):
            stop = Interrupted("the run was stopped", "nothing was written")
            sys.exit(_report_error(name, stop, as_json, verbose))
        except BrokenPipeError:
            # The reader left (say, | head): there is nobody to tell, and flushing at exit would raise again.
            sys.stdout = None
            sys.exit(1)
        except Exception as error:  # noqa: BLE001 - the last line of defence: one clear line, never a bare traceback
            sys.exit(_report_error(name, error, as_json, verbose))
        sys.exit(code if isinstance(code, int) else 0)


class _GuardedGroup(_Guarded, click.Group):
    """A group of commands with the same frame around it."""


def _report_error(name: str, error: Exception, as_json: bool, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    if isinstance(error, LpEdgeError):
        return _report(
            name, type(error).__name__, error.got, error.expected, error.remedy, error.exit_code, as_json
        )
    kind = type(error).__name__
    remedy = "" if verbose else "run it again with --verbose and report the traceback"
    return _report(name, kind, f"unexpected {kind}: {error}", "", remedy, 1, as_json)


def _report(name: str, kind: str, got: str, expected: str, remedy: str, exit_code: int, as_json: bool) -> int:
    if as_json:
        error = {"type": kind, "exit_code": exit_code, "got": got, "expected": expected, "remedy": remedy}
        click.echo(json.dumps({"ok": False, "error": error}))
        return exit_code
    click.echo(f"{name}: {got}" + (f"; {expected}" if expected else ""), err=True)
    if remedy:
        click.echo(f"{name}: to fix it: {remedy}", err=True)
    return exit_code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command the way Ctrl-C does, so that it cleans up as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _logging(quiet: bool, verbose: bool) -> Iterator[None]:
    logger = logging.getLogger("lp_edge")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


# -- options that several commands share ----------------------------------------------------------------


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."),
            click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
            click.option("-v", "--verbose", is_flag=True, help="Print what is done, and tracebacks."),
            click.version_option(package_name="lp-edge", message="lp-edge %(version)s"),
        )
    ):
        command = option(command)
    return command


def _backend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option(
                "--bundle",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Bundle to use instead of the built-in one.",
            ),
            click.option(
                "--backend",
                default="auto",
                show_default=True,
                help="auto, cpu, cuda, tensorrt, …; never replaced silently. lp-doctor tells which work.",
            ),
            click.option("--device", type=int, default=0, show_default=True, help="Index of the GPU."),
            click.option(
                "--threads", type=int, default=0, show_default=True, help="CPU threads; 0 = one per core."
            ),
        )
    ):
        command = option(command)
    return command


def _backend(backend: str, device: int, threads: int) -> BackendConfig:
    from lp_edge.engines.backends import BackendConfig

    return BackendConfig(backend, device, threads)


# -- lp-run -----------------------------------------------------------------------------------------------


@click.command(
    cls=_Guarded,
    name="lp-run",
    epilog="""\b
Examples:
    lp-run --demo
    lp-run -s portrait.jpg -d driver.mp4 -o result.mp4
    lp-run -s portrait.jpg -d talk                       (a built-in template)
    lp-run -s portrait.jpg -d driver.mp4 --region lip --side-by-side
    lp-run -s clip.mp4 -d driver.mp4 --length source --audio source
    lp-run -s portrait.jpg -d smiling.jpg -o smile.png
    lp-run -s portrait.jpg -d driver.mp4 --save-motion driver.npz
    lp-run -s portrait.jpg -d talk --json | jq .fps

"""
    + _EXIT_CODES,
)
@click.option("-s", "--source", metavar="FILE", help="Picture or clip to animate.")
@click.option(
    "-d",
    "--driving",
    metavar="FILE|NAME",
    help="What moves it: clip, picture, motion template (.npz, LivePortrait .pkl), "
    "or a built-in template: nod, shake, tilt, look, blink, smile, talk.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR",
    help="Result: .mp4, .mov, .mkv, .webm, .gif; .png, .jpg, .webp for a picture driven by a picture; a name "
    "without suffix is a folder of frames. Default: SOURCE--DRIVING.mp4 (or .png) in this folder.",
)
@click.option(
    "--demo", is_flag=True, help="Use the picture and driver that ship with lp-edge where none is given."
)
@click.option(
    "--region",
    type=click.Choice(["all", "exp", "pose", "lip", "eyes"]),
    default="all",
    show_default=True,
    help="Part of the motion that is taken over; the rest stays as in the source.",
)
@click.option(
    "--multiplier", type=float, default=1.0, show_default=True, help="Strength of the motion, 0 to 3."
)
@click.option(
    "--relative/--absolute",
    default=True,
    show_default=True,
    help="Add the driver's change to the source's own pose and expression, or take over the driver's pose and expression as they are.",
)
@click.option(
    "--neutral",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="The driver's frame that counts as 'no motion' (with --relative).",
)
@click.option(
    "--face",
    default="largest",
    show_default=True,
    metavar="WHICH",
    help="Face of the source: largest, all, or an index from left to right (0, 1, …).",
)
@click.option(
    "--smooth/--no-smooth", default=True, show_default=True, help="Filter the tracked points of clips."
)
@click.option(
    "--size",
    type=int,
    default=640,
    show_default=True,
    help="Longest side of the animated crop in pixels, 128 to 2048; smaller crops are not enlarged.",
)
@click.option(
    "--length",
    type=click.Choice(["shortest", "source", "driving"]),
    default="shortest",
    show_default=True,
    help="For a source clip: whose length the result has. What is too short holds its last frame.",
)
@click.option(
    "--audio",
    type=click.Choice(["driving", "source", "none"]),
    default="driving",
    show_default=True,
    help="Whose sound the result carries, if there is any.",
)
@click.option(
    "--crf", type=int, default=None, help="Quality of H.264 and VP9, 0 (best) to 51.  [default: 18, 30]"
)
@click.option("--side-by-side", is_flag=True, help="Show driver, source and result beside each other.")
@click.option("--save-motion", metavar="FILE.npz", help="Also write the driver's motion as a template.")
@click.option(
    "--face-timeout",
    type=float,
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How late the first face of a clip may appear; until then the source stays still.",
)
@click.option(
    "--overwrite/--no-overwrite",
    default=True,
    show_default=True,
    help="Replace an existing result, or refuse to.",
)
@_backend_options
@_common
def run(
    source: str | None,
    driving: str | None,
    output: str | None,
    demo: bool,
    region: str,
    multiplier: float,
    relative: bool,
    neutral: int,
    face: str,
    smooth: bool,
    size: int,
    length: str,
    audio: Literal["driving", "source", "none"],
    crf: int | None,
    side_by_side: bool,
    save_motion: str | None,
    face_timeout: float,
    overwrite: bool,
    bundle: Path | None,
    backend: str,
    device: int,
    threads: int,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Animate a portrait: SOURCE moves as DRIVING does.

    Everything runs on this machine with the networks that ship with lp-edge; nothing is downloaded.
    """
    if not demo:
        for name, value in (("--source", source), ("--driving", driving)):
            if value is None:
                raise click.UsageError(
                    f"Missing option '{name}'. To see lp-edge at work without one: lp-run --demo"
                )

    from lp_edge.runtime.job import RunConfig, demo_picture, run_job
    from lp_edge.runtime.options import AnimateOptions

    options = AnimateOptions(
        relative=relative,
        region=region,
        multiplier=multiplier,
        neutral=neutral,
        smooth=smooth,
        face=face,
        size=size,
        length=length,
        face_timeout=face_timeout,
    )
    config = RunConfig(
        source=source if source is not None else demo_picture(),
        driving=driving if driving is not None else "talk",
        output=output,
        options=options,
        bundle=bundle,
        backend=_backend(backend, device, threads),
        audio=audio,
        side_by_side=side_by_side,
        save_motion=save_motion,
        crf=crf,
        overwrite=overwrite,
    )
    with _logging(quiet or as_json, verbose), _progress(quiet or as_json) as progress:
        result = run_job(config, progress)
    if as_json:
        click.echo(json.dumps(_result_json(result)))
    elif not quiet:
        _print_result(result)


def _result_json(result: RunResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "ok": True,
        "output": str(result.output),
        "motion": None if result.motion is None else str(result.motion),
        "frames": result.frames,
        "width": result.size[0],
        "height": result.size[1],
        "frame_rate": [result.frame_rate.numerator, result.frame_rate.denominator],
        "seconds": result.seconds,
        "fps": result.fps,
        "backend": result.backend,
        "faces": dict(result.faces),
        "stages_ms": {name: asdict(times) for name, times in result.stages.items()},
        "warnings": list(result.warnings),
    }


def _print_result(result: RunResult) -> None:
    for warning in result.warnings:
        click.echo(f"lp-run: note: {warning}", err=True)
    width, height = result.size
    frames = "1 frame" if result.frames == 1 else f"{result.frames} frames"
    click.echo(
        f"{result.output}: {frames}, {width}x{height}, made in {result.seconds:.1f} s "
        f"({result.fps:.1f} frames/s, {result.backend})"
    )
    if result.motion is not None:
        click.echo(f"{result.motion}: motion of the driver")


@contextlib.contextmanager
def _progress(silent: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar with frames a second and time left on a terminal, a line every few seconds elsewhere; both on stderr."""
    if silent:
        yield None
        return
    if not sys.stderr.isatty():
        yield _plain_progress()
        return

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("animating"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.fields[whole]} frames  {task.fields[fps]:.1f} frames/s  left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("animating", total=None, whole="?", fps=0.0)

        def update(now: Progress) -> None:
            whole = "?" if now.expected is None else str(now.expected)
            bar.update(task, completed=now.frames, total=now.expected, whole=whole, fps=now.fps)

        yield update


def _plain_progress() -> Callable[[Progress], None]:
    last = time.monotonic()

    def update(now: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < _PLAIN_EVERY:
            return
        last = time.monotonic()
        whole = "" if now.expected is None else f" of {now.expected}"
        left = "" if now.left is None else f", {now.left:.0f} s left"
        click.echo(f"lp-run: {now.frames}{whole} frames, {now.fps:.1f} frames/s{left}", err=True)

    return update


# -- lp-export --------------------------------------------------------------------------------------------


@click.command(
    cls=_Guarded,
    name="lp-export",
    epilog="""\b
Examples:
    lp-export --family mesh
    lp-export --family mesh --output my_bundle && lp-run --demo --bundle my_bundle

"""
    + _EXIT_CODES,
)
@click.option(
    "--family", type=click.Choice(["mesh"]), required=True, help="Which family of networks to export."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the new bundle.  [default: the built-in bundle is rebuilt in place]",
)
@_common
def export(family: str, output: Path | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Build a bundle from PyTorch networks.

    Needs PyTorch: pip install "lp-edge[export]". The bundle is written beside its place and renamed when it is whole.
    """
    from lp_edge.engines.bundle import builtin_directory

    try:
        from lp_edge.export.mesh.build import build
    except ImportError as error:
        if error.name is None or error.name.startswith("lp_edge"):
            raise
        raise BackendUnavailable(
            f"lp-export needs the package {error.name}, which is not installed",
            "expected the extra 'export'",
            'pip install "lp-edge[export]"',
        ) from error

    folder = builtin_directory() if output is None else output

    def report(line: str) -> None:
        if not quiet and not as_json:
            click.echo(line, err=True)

    with _logging(quiet or as_json, verbose):
        built = build(folder, report=report)
    if as_json:
        click.echo(json.dumps({"ok": True, "family": family, "bundle": str(folder), **built.as_dict()}))
    elif not quiet:
        for row in built.networks:
            parity = (
                ", ".join(f"{name} {value:.2g}" for name, value in row.parity.items())
                or "checked when trained"
            )
            click.echo(
                f"{row.name:15} {row.nodes:5} nodes {row.size / 1e6:6.2f} MB  opset {row.opset}  parity: {parity}"
            )
        click.echo(f"{folder}: bundle of the family {family}, made in {built.seconds:.1f} s")


# -- lp-doctor ----------------------------------------------------------------------------------------------


@click.command(
    cls=_Guarded,
    name="lp-doctor",
    epilog="""\b
Examples:
    lp-doctor
    lp-doctor --json | jq .backends
    lp-doctor --bundle my_bundle

\b
Exit codes: 0 the main job works here, 1 something it needs is missing, 130 stopped.
""",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Bundle to verify instead of the built-in one.",
)
@_common
def doctor(bundle: Path | None, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Tell what is installed, what really works here, what is missing and how to get it."""
    from lp_edge.runtime.doctor import examine

    with _logging(quiet or as_json, verbose):
        report = examine(bundle)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    elif not quiet:
        _print_report(report)
    return 0 if report.ok else 1


def _print_report(report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)

    def section(title: str, rows: Sequence[tuple[bool | None, str, str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        for _ in range(3):
            table.add_column(overflow="fold")
        marks = {True: "[green]yes[/]", False: "[red]no[/]", None: "[dim]-[/]"}
        for works, name, detail in rows:
            table.add_row(marks[works], escape(name), escape(detail))
        console.print(table)

    machine = report.machine
    memory = "" if machine.memory_mib is None else f", {machine.memory_mib / 1024:.1f} GiB memory"
    console.print(escape(f"{machine.system}; {machine.cpu}, {machine.cores} cores{memory}"))
    for gpu in machine.gpus:
        size = "" if gpu.memory_mib is None else f", {gpu.memory_mib / 1024:.1f} GiB"
        console.print(escape(f"{gpu.name}{size}, driver {gpu.driver or 'unknown'}"))
    if machine.jetson:
        console.print(escape(machine.jetson))
    section(
        "Software",
        [
            (
                True if c.version else False if c.needed else None,
                c.name,
                c.version or f"not installed ({c.use})",
            )
            for c in report.components
        ],
    )
    section("Backends", [(b.works, b.name, b.detail) for b in report.backends])
    section("Encoders", [(e.works, e.name, f"{e.use}: {e.detail}") for e in report.encoders])
    section("Bundle", [(report.bundle.works, report.bundle.path, report.bundle.detail)])
    missing = report.missing()
    if missing:
        console.print("[bold]What is missing[/]")
        for entry in missing:
            need = "needed" if entry.needed else "optional"
            console.print(escape(f"  {entry.what} ({need})\n      to get it: {entry.remedy}"))
    console.print("lp-run works here." if report.ok else "[red]lp-run does not work here.[/]")


# -- lp-bench -----------------------------------------------------------------------------------------------


@click.group(
    cls=_GuardedGroup,
    name="lp-bench",
    epilog="""\b
Examples:
    lp-bench run
    lp-bench run -s portrait.jpg -d driver.mp4 --warmup 20 > run.jsonl
    lp-bench warp --size 512 --batch 1 --batch 4

"""
    + _EXIT_CODES,
)
@click.version_option(package_name="lp-edge", message="lp-edge %(version)s")
def bench() -> None:
    """Measure lp-edge on this machine; prints JSON lines, each with its provenance."""


@bench.command("run")
@click.option(
    "-s", "--source", metavar="FILE", help="Picture or clip.  [default: the demo picture at 1280x720]"
)
@click.option(
    "-d",
    "--driving",
    metavar="FILE|NAME",
    help="Driver.  [default: the demo picture talking, a clip of 512x512]",
)
@click.option("--size", type=int, default=640, show_default=True, help="Longest side of the animated crop.")
@click.option("--frames", type=int, default=None, help="Stop after so many frames.")
@click.option("--warmup", type=int, default=10, show_default=True, help="Frames that are not counted.")
@_backend_options
@click.option("-v", "--verbose", is_flag=True, help="Print what is done, and tracebacks.")
def bench_run(
    source: str | None,
    driving: str | None,
    size: int,
    frames: int | None,
    warmup: int,
    bundle: Path | None,
    backend: str,
    device: int,
    threads: int,
    verbose: bool,
) -> None:
    """Time each stage and the whole run, encoding included: percentiles, frames a second, peak memory."""
    from lp_edge.runtime.bench import bench_animation
    from lp_edge.runtime.options import AnimateOptions

    records = bench_animation(
        source,
        driving,
        options=AnimateOptions(size=size),
        bundle=bundle,
        backend=_backend(backend, device, threads),
        warmup=warmup,
        limit=frames,
    )
    with _logging(False, verbose):
        for record in records:
            click.echo(json.dumps(record))


@bench.command("warp")
@click.option("--size", type=int, default=512, show_default=True, help="Side of the crop in pixels.")
@click.option(
    "--batch", "batches", type=int, multiple=True, default=(1, 4), show_default=True, help="Frames per call."
)
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Time per measurement.")
@_backend_options
@click.option("-v", "--verbose", is_flag=True, help="Print what is done, and tracebacks.")
def bench_warp(
    size: int,
    batches: tuple[int, ...],
    seconds: float,
    bundle: Path | None,
    backend: str,
    device: int,
    threads: int,
    verbose: bool,
) -> None:
    """Time the warp alone: frames a second per batch size."""
    from lp_edge.runtime.bench import bench_warp as measure

    records = measure(
        size, batches, seconds=seconds, bundle=bundle, backend=_backend(backend, device, threads)
    )
    with _logging(False, verbose):
        for record in records:
            click.echo(json.dumps(record))
