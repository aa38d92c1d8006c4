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
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lp_edge.errors import BackendUnavailable, ConfigError, Interrupted, LpEdgeError

if TYPE_CHECKING:
    from types import FrameType

    from lp_edge.engines.backends import BackendConfig
    from lp_edge.runtime.batch import BatchProgress, BatchResult
    from lp_edge.runtime.doctor import Report
    from lp_edge.runtime.job import Progress, RunConfig, RunResult

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


class Guarded(click.Command):
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
            hint = f"{error.ctx.command_path} --help lists all options" if usage else ""  # type: ignore[attr-defined]
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


class GuardedGroup(Guarded, click.Group):
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
def logging_to_console(quiet: bool, verbose: bool) -> Iterator[None]:
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


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
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

MOTION_OPTIONS = (
    click.option(
        "--region",
        type=click.Choice(["all", "exp", "pose", "lip", "eyes"]),
        default="all",
        show_default=True,
        help="Part of the motion that is taken over; the rest stays as in the source.",
    ),
    click.option(
        "--multiplier", type=float, default=1.0, show_default=True, help="Strength of the motion, 0 to 3."
    ),
    click.option(
        "--relative/--absolute",
        default=True,
        show_default=True,
        help="Add the driver's change to the source's own pose and expression, or take over the driver's pose and expression as they are.",
    ),
    click.option(
        "--neutral",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="The driver's frame that counts as 'no motion' (with --relative).",
    ),
    click.option(
        "--smooth/--no-smooth", default=True, show_default=True, help="Filter the tracked points of clips."
    ),
    click.option(
        "--edit",
        metavar="NAME=VALUE,…",
        help="Change the face on top of the motion, or without any driver: smile=0.4,blink=0.2,yaw=10. A wrong name lists all.",
    ),
    click.option(
        "--edit-file",
        metavar="FILE",
        help="Edits over time, keyframes in a .json or .csv file, instead of --edit.",
    ),
)

PICTURE_OPTIONS = (
    click.option(
        "--faces",
        default="largest",
        show_default=True,
        metavar="WHICH",
        help="Faces of the source: largest, all (or left-right: from left to right), or indices from left to right: 0 or 2,0. "
        "Several drivers go to them in this order.",
    ),
    click.option(
        "--size",
        type=int,
        default=None,
        help="Side of the animated crop in pixels, 128 to 2048. mesh: the longer side at most, smaller crops are not "
        "enlarged. liveportrait: 512 is drawn, 256 or 1024 are resampled from it.  [default: 640, liveportrait 512]",
    ),
    click.option(
        "--paste-back/--no-paste-back",
        default=True,
        show_default=True,
        help="Put the animated crop back into the source, or write the crop alone.",
    ),
    click.option(
        "--length",
        type=click.Choice(["shortest", "source", "driving"]),
        default="shortest",
        show_default=True,
        help="For a source clip or several drivers: whose length the result has. What is too short holds its last frame.",
    ),
    click.option(
        "--face-timeout",
        type=float,
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="How late the first face of a clip may appear; until then the source stays still.",
    ),
    click.option(
        "--audio",
        type=click.Choice(["driving", "source", "none"]),
        default="driving",
        show_default=True,
        help="Whose sound the result carries, if there is any: the first driver's (without a driver the source's), or the source's.",
    ),
    click.option(
        "--crf", type=int, default=None, help="Quality of H.264 and VP9, 0 (best) to 51.  [default: 18, 30]"
    ),
    click.option(
        "--side-by-side",
        is_flag=True,
        default=False,
        help="Show driver, source and result beside each other.",
    ),
)

LIVEPORTRAIT_OPTIONS = (
    click.option(
        "--driving-option",
        type=click.Choice(["expression-friendly", "pose-friendly"]),
        default="expression-friendly",
        show_default=True,
        help="liveportrait: scale a clip's motion by the ratio of both faces' sizes, or take it as it is.",
    ),
    click.option(
        "--stitching/--no-stitching",
        default=True,
        show_default=True,
        help="liveportrait: fit the moved face to the still shoulders.",
    ),
    click.option(
        "--eye-retargeting/--no-eye-retargeting",
        default=False,
        help="liveportrait: open the source's eyes as far as the driver's, by the network R_eye.",
    ),
    click.option(
        "--lip-retargeting/--no-lip-retargeting",
        default=False,
        help="liveportrait: open the source's lips as far as the driver's, by the network R_lip.",
    ),
    click.option(
        "--normalize-lip/--no-normalize-lip",
        default=False,
        show_default=True,
        help="liveportrait: close an open mouth of the source before a relative motion is added.",
    ),
    click.option(
        "--lip-normalize-threshold",
        type=float,
        default=0.03,
        show_default=True,
        help="liveportrait: lip ratio from which on a mouth counts as open.",
    ),
    click.option(
        "--source-eye-retargeting/--no-source-eye-retargeting",
        default=False,
        help="liveportrait: hold the eyes of a source clip as open as in its first frame.",
    ),
    click.option(
        "--source-eye-threshold",
        type=float,
        default=0.18,
        show_default=True,
        help="liveportrait: mean eye ratio below which the first frame counts as a blink.",
    ),
    click.option(
        "--smooth-variance",
        type=float,
        default=3e-7,
        show_default=True,
        help="liveportrait: observation variance of the smoother for source clips; more is smoother.",
    ),
    click.option(
        "--keep-pose-with-retargeting/--no-keep-pose-with-retargeting",
        default=False,
        help="liveportrait: keep the relative head motion together with eye or lip retargeting, which the reference drops.",
    ),
    click.option(
        "--crop-scale",
        type=float,
        default=2.3,
        show_default=True,
        help="liveportrait: side of the source crop over the size of the face.",
    ),
    click.option(
        "--crop-vx",
        type=float,
        default=0.0,
        show_default=True,
        help="liveportrait: shift of the crop along the face, in sides.",
    ),
    click.option(
        "--crop-vy",
        type=float,
        default=-0.125,
        show_default=True,
        help="liveportrait: the same, down is > 0.",
    ),
    click.option(
        "--crop-rotate/--no-crop-rotate",
        default=True,
        show_default=True,
        help="liveportrait: turn the source crop with the face.",
    ),
    click.option(
        "--driving-crop",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        show_default=True,
        help="liveportrait: cut drivers around the face; auto = those that are not square.",
    ),
    click.option(
        "--driving-crop-scale",
        type=float,
        default=2.2,
        show_default=True,
        help="liveportrait: side of the driving crop over the size of the face.",
    ),
    click.option(
        "--driving-crop-vx",
        type=float,
        default=0.0,
        show_default=True,
        help="liveportrait: shift of the driving crop to the right, in sides.",
    ),
    click.option(
        "--driving-crop-vy",
        type=float,
        default=-0.1,
        show_default=True,
        help="liveportrait: the same, down is > 0.",
    ),
)


def _settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """All options that one run of a batch may have of its own: those of :mod:`lp_edge.runtime.settings`."""
    for option in reversed((*MOTION_OPTIONS, *PICTURE_OPTIONS, *LIVEPORTRAIT_OPTIONS)):
        command = option(command)
    return command


@click.command(
    cls=Guarded,
    name="lp-run",
    epilog="""\b
Examples:
    lp-run --demo
    lp-run -s portrait.jpg -d driver.mp4 -o result.mp4
    lp-run -s portrait.jpg -d talk                       (a built-in template)
    lp-run -s portrait.jpg -d driver.mp4 --region lip --side-by-side
    lp-run -s clip.mp4 -d driver.mp4 --length source --audio source
    lp-run -s portrait.jpg -d smiling.jpg -o smile.png
    lp-run -s portrait.jpg --edit smile=0.4,blink=0.2,yaw=10
    lp-run -s couple.jpg -d a.mp4 -d b.mp4 --faces left-right
    lp-run -s a.jpg -s b.jpg -d driver.mp4 -o results    (a batch: also a folder, or --batch jobs.csv)
    lp-run -s portrait.jpg -d driver.mp4 --save-motion driver.npz
    lp-run -s portrait.jpg -d talk --json | jq .fps

"""
    + _EXIT_CODES,
)
@click.option(
    "-s",
    "--source",
    "sources",
    multiple=True,
    metavar="FILE|DIR",
    help="Picture or clip to animate. Several, or a folder of them, make a batch.",
)
@click.option(
    "-d",
    "--driving",
    multiple=True,
    metavar="FILE|NAME",
    help="What moves it: clip, picture, motion template (.npz, LivePortrait .pkl), "
    "or a built-in template: nod, shake, tilt, look, blink, smile, talk. Several: one for each face of --faces.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR",
    help="Result: .mp4, .mov, .mkv, .webm, .gif; .png, .jpg, .webp for a single picture; a name "
    "without suffix is a folder of frames. Default: SOURCE--DRIVING.mp4 (or .png) in this folder. For a batch: the folder of "
    "the results, this one by default.",
)
@click.option(
    "--demo", is_flag=True, help="Use the picture and driver that ship with lp-edge where none is given."
)
@click.option(
    "--batch",
    metavar="DIR|FILE.csv",
    help="Many runs: a folder of sources, or a list with the columns source, driving, output and any of the options below by "
    "its long name. Each driver's motion is read once; a run that fails does not stop the others.",
)
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="In a batch, leave out what an earlier one finished from the same inputs and options, or do it again.",
)
@click.option("--face", hidden=True, default=None, help="Older name of --faces.")
@_settings
@click.option("--save-motion", metavar="FILE.npz", help="Also write the driver's motion as a template.")
@click.option(
    "--overwrite/--no-overwrite",
    default=True,
    show_default=True,
    help="Replace an existing result, or refuse to.",
)
@_backend_options
@click.option(
    "--face-models",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="liveportrait: your own landmark.onnx, and det_10g.onnx with 2d106det.onnx (InsightFace, non-commercial), for crops exactly "
    "as LivePortrait cuts them.",
)
@common_options
def run(
    sources: tuple[str, ...],
    driving: tuple[str, ...],
    output: str | None,
    demo: bool,
    batch: str | None,
    resume: bool,
    face: str | None,
    save_motion: str | None,
    overwrite: bool,
    bundle: Path | None,
    backend: str,
    device: int,
    threads: int,
    face_models: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> int:
    """Animate a portrait: SOURCE moves as DRIVING does.

    Everything runs on this machine with the networks that ship with lp-edge; nothing is downloaded.
    """
    edited = settings["edit"] is not None or settings["edit_file"] is not None
    listed = batch is not None and not Path(batch).is_dir()
    if not demo:
        for name, missing in (
            ("--source", not sources and batch is None),
            ("--driving", not driving and not edited and not listed),
        ):
            if missing:
                raise click.UsageError(
                    f"Missing option '{name}'. To see lp-edge at work without one: lp-run --demo"
                )
    if listed and sources:
        raise click.UsageError(f"--source together with the list {batch}: put all sources into the list")
    if face is not None:
        if settings["faces"] != "largest":
            raise click.UsageError("--face is the older name of --faces: give one of them")
        settings["faces"] = face

    from lp_edge.runtime.job import RunConfig, demo_picture, run_job
    from lp_edge.runtime.settings import read_setting, with_settings

    values = {name.replace("_", "-"): value for name, value in settings.items()}
    for name in ("edit", "edit-file"):
        text = values.pop(name)
        if text is not None:
            values[name] = read_setting(name, text)
    if demo and not driving and not edited:
        driving = ("talk",)
    if demo and not sources and batch is None:
        sources = (str(demo_picture()),)
    config = RunConfig(
        source=sources[0] if sources else "",
        driving=driving or None,
        output=output,
        bundle=bundle,
        backend=_backend(backend, device, threads),
        face_models=face_models,
        save_motion=save_motion,
        overwrite=overwrite,
    )
    config = with_settings(config, values)
    silent = quiet or as_json
    if batch is not None or len(sources) > 1 or Path(sources[0]).is_dir():
        everything = (*sources, batch) if batch is not None else sources
        with logging_to_console(silent, verbose):
            return _run_batch(config, listed, everything, output or ".", resume, as_json, quiet)
    with logging_to_console(silent, verbose), progress_bar(silent) as progress:
        result = run_job(config, progress)
    if as_json:
        click.echo(json.dumps({"ok": True, **_result_json(result)}))
    elif not quiet:
        _print_result(result)
    return 0


def _run_batch(
    config: RunConfig,
    listed: bool,
    sources: Sequence[str],
    folder: str,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Plan and run a batch, print what came of it; the exit code of the first failure."""
    from lp_edge.runtime.batch import run_batch
    from lp_edge.runtime.job_list import jobs_of_list, jobs_of_sources

    jobs = jobs_of_list(sources[-1], config, folder) if listed else jobs_of_sources(sources, config, folder)
    with _batch_progress(quiet or as_json) as progress:
        result = run_batch(jobs, folder, resume=resume, progress=progress)
    if as_json:
        click.echo(json.dumps(_batch_json(result)))
        return result.exit_code
    for outcome in result.outcomes:
        if outcome.error is not None:
            error = outcome.error
            _report(f"lp-run: {outcome.job.name}", "", error.got, error.expected, error.remedy, 0, False)
        elif outcome.result is not None and not quiet:
            _print_result(outcome.result)
        elif not quiet:
            click.echo(f"{outcome.job.output}: finished before")
    if not quiet:
        counts = [
            f"{result.count(state)} {state}"
            for state in ("done", "finished before", "failed")
            if result.count(state)
        ]
        jobs_in_words = "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"
        click.echo(f"{result.folder}: {jobs_in_words}, {', '.join(counts)}, in {result.seconds:.1f} s")
    return result.exit_code


def _error_json(error: LpEdgeError) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "exit_code": error.exit_code,
        "got": error.got,
        "expected": error.expected,
        "remedy": error.remedy,
    }


def _batch_json(result: BatchResult) -> dict[str, Any]:
    jobs = []
    for outcome in result.outcomes:
        row = {
            "name": outcome.job.name,
            "source": str(outcome.job.config.source),
            "state": outcome.state,
            "output": str(outcome.job.output),
            "frames": outcome.frames,
        }
        if outcome.result is not None:
            row.update(_result_json(outcome.result))
        if outcome.error is not None:
            row["error"] = _error_json(outcome.error)
        jobs.append(row)
    first = next((o.error for o in result.outcomes if o.error is not None), None)
    return {
        "ok": first is None,
        **({} if first is None else {"error": _error_json(first)}),
        "output": str(result.folder),
        "seconds": result.seconds,
        "motion_seconds": result.motion_seconds,
        "motions": result.motions,
        "done": result.count("done"),
        "finished_before": result.count("finished before"),
        "failed": result.count("failed"),
        "jobs": jobs,
    }


@contextlib.contextmanager
def _batch_progress(silent: bool) -> Iterator[Callable[[BatchProgress], None] | None]:
    """A line for every job, and the progress of the one that runs; on stderr."""
    if silent:
        yield None
        return
    with contextlib.ExitStack() as bar:
        update: Callable[[Progress], None] | None = None

        def tell(now: BatchProgress) -> None:
            nonlocal update
            place = f"lp-run: [{now.number}/{now.jobs}] {now.job.name}"
            if now.run is not None:
                if update is not None:
                    update(now.run)
                return
            bar.close()
            if now.outcome is None:
                click.echo(place, err=True)
                update = bar.enter_context(progress_bar(False))  # a new one: its speed is that of this job
            elif now.outcome.result is None:
                click.echo(f"{place}: {now.outcome.state}", err=True)

        yield tell


def _result_json(result: RunResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {
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
def progress_bar(silent: bool, name: str = "lp-run") -> Iterator[Callable[[Progress], None] | None]:
    """A bar with frames a second and time left on a terminal, a line every few seconds elsewhere; both on stderr."""
    if silent:
        yield None
        return
    if not sys.stderr.isatty():
        yield _plain_progress(name)
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


def _plain_progress(name: str) -> Callable[[Progress], None]:
    last = time.monotonic()

    def update(now: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < _PLAIN_EVERY:
            return
        last = time.monotonic()
        whole = "" if now.expected is None else f" of {now.expected}"
        left = "" if now.left is None else f", {now.left:.0f} s left"
        click.echo(f"{name}: {now.frames}{whole} frames, {now.fps:.1f} frames/s{left}", err=True)

    return update


# -- lp-export --------------------------------------------------------------------------------------------

_EXPORT_OPTIONS = {
    "mesh": {"output"},
    "liveportrait": {
        "output", "variant", "weights", "fp16", "flavor", "allow_unverified", "offline", "endpoint"
    },
    "verify": {"weights", "allow_unverified"},  # the bundle knows which weights it came from
    "compare": set[str](),
}  # fmt: skip
"""Task -> options that mean something for it."""


@click.command(
    cls=Guarded,
    name="lp-export",
    epilog="""\b
Examples:
    lp-export --family liveportrait                      (downloads the official weights, 520 MB)
    lp-export --family liveportrait --weights pretrained_weights --fp16 -o portrait
    lp-export --family liveportrait --variant animal --offline
    lp-export --family liveportrait --flavor tensorrt8   (JetPack 5)
    lp-export --verify liveportrait-human-fp32
    lp-export --compare liveportrait-human-fp32
    lp-export --family mesh -o my_bundle && lp-run --demo --bundle my_bundle

"""
    + _EXIT_CODES,
)
@click.option(
    "--family", type=click.Choice(["mesh", "liveportrait"]), help="Which family of networks to export."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the new bundle.  [default: liveportrait-VARIANT-PRECISION[-tensorrt8] in this folder; mesh: the built-in "
    "bundle is rebuilt in place]",
)
@click.option(
    "--variant",
    type=click.Choice(["human", "animal"]),
    default="human",
    show_default=True,
    help="Weights for people or for animals.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with the official checkpoints (it contains liveportrait/).  [default: download them]",
)
@click.option("--fp16", is_flag=True, help="Half precision where it does no harm; for GPUs.")
@click.option(
    "--flavor",
    type=click.Choice(["main", "tensorrt8"]),
    default="main",
    show_default=True,
    help="Operators to use: main (opset 17), or those of TensorRT 8.5 on JetPack 5 (opset 16).",
)
@click.option(
    "--allow-unverified",
    is_flag=True,
    help="Take weights that are not the official files (by SHA-256); the manifest records it.",
)
@click.option("--offline", is_flag=True, help="Download nothing; use what an earlier run has downloaded.")
@click.option(
    "--endpoint",
    metavar="URL",
    help="Mirror of the hub to download from.  [default: $HF_ENDPOINT, or huggingface.co]",
)
@click.option(
    "--verify",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Export nothing; repeat the parity check on a bundle (with --weights: against PyTorch again).",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Export nothing; run the bundle's networks with TensorRT, through Polygraphy, and compare with PyTorch.",
)
@common_options
@click.pass_context
def export(
    context: click.Context,
    family: str | None,
    output: Path | None,
    variant: str,
    weights: Path | None,
    fp16: bool,
    flavor: str,
    allow_unverified: bool,
    offline: bool,
    endpoint: str | None,
    verify: Path | None,
    compare: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Build a bundle from PyTorch networks and check it against them, or check a finished one.

    Needs PyTorch: pip install "lp-edge[export]". The bundle is written beside its place and renamed when it is whole.
    """
    task = _export_task(context)
    silent = quiet or as_json

    def report(line: str) -> None:
        if not silent:
            click.echo(f"lp-export: {line}", err=True)

    folder: Path | None
    with logging_to_console(silent, verbose):
        if task == "mesh":
            from lp_edge.engines.bundle import builtin_directory

            folder = builtin_directory() if output is None else output
            result = _exporter("mesh.build").build(folder, report=report).as_dict()
        elif task == "liveportrait":
            exporter = _exporter("liveportrait.build")
            precision = "fp16" if fp16 else "fp32"
            folder = exporter.default_output(variant, precision, flavor) if output is None else output
            with _download_progress(silent) as progress:
                result = exporter.build(
                    folder,
                    weights=weights,
                    variant=variant,
                    precision=precision,
                    flavor=flavor,
                    allow_unverified=allow_unverified,
                    offline=offline,
                    endpoint=endpoint,
                    report=report,
                    progress=progress,
                ).as_dict()
        elif task == "verify":
            folder = verify
            result = _exporter("verify").verify_bundle(folder, weights=weights, report=report)
        else:
            folder = compare
            result = _exporter("liveportrait.build").compare(folder, report=report).as_dict()
    family = family or "liveportrait"  # what --compare takes; --verify tells it itself
    _print_export(task, {"family": family, **result, "bundle": str(folder)}, as_json, quiet)


def _export_task(context: click.Context) -> str:
    """What to do: a family, ``verify`` or ``compare``; ConfigError for options that do not go together."""
    given = {
        name
        for name in context.params
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    tasks = [name for name in ("family", "verify", "compare") if name in given]
    if len(tasks) != 1:
        raise ConfigError(
            " together with ".join(f"--{name}" for name in tasks) or "neither a family nor a bundle is given",
            "expected one of --family, --verify and --compare",
            "give the family to export, or the bundle to check",
        )
    task: str = context.params["family"] if tasks == ["family"] else tasks[0]
    options = set[str]().union(*_EXPORT_OPTIONS.values())
    for name in sorted(given & options - _EXPORT_OPTIONS[task]):
        what = f"--family {task}" if tasks == ["family"] else f"--{task}"
        takes = (
            ", ".join(f"--{n.replace('_', '-')}" for n in sorted(_EXPORT_OPTIONS[task])) or "no such option"
        )
        raise ConfigError(
            f"--{name.replace('_', '-')} means nothing with {what}", f"it takes {takes}", "leave it out"
        )
    for name in ("offline", "endpoint"):
        if name in given and context.params["weights"] is not None:
            raise ConfigError(
                f"--{name} together with --weights",
                "expected one: --weights downloads nothing",
                "leave one out",
            )
    if {"offline", "endpoint"} <= given:
        raise ConfigError("--offline together with --endpoint", "expected one of them", "leave one out")
    return task


def _exporter(module: str) -> Any:
    """A module of lp_edge.export; BackendUnavailable when the packages of the extra are missing."""
    import importlib

    try:
        return importlib.import_module(f"lp_edge.export.{module}")
    except ImportError as error:
        if error.name is None or error.name.startswith("lp_edge"):
            raise
        raise BackendUnavailable(
            f"lp-export needs the package {error.name}, which is not installed",
            "expected the extra 'export'",
            'pip install "lp-edge[export]"',
        ) from error


def _print_export(task: str, result: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        click.echo(json.dumps({"ok": True, **result}))
        return
    for warning in result.get("warnings", ()):
        click.echo(f"lp-export: note: {warning}", err=True)
    if quiet:
        return
    for row in result["networks"]:
        parity = (
            ", ".join(f"{name} {value:.2g}" for name, value in row["parity"].items())
            or "checked when trained"
        )
        click.echo(
            f"{row['name']:28} {row['nodes']:5} nodes {row['size'] / 1e6:7.2f} MB  opset {row['opset']} "
            f" {row.get('precision', 'fp32')}  {row['seconds']:6.1f} s  parity: {parity}"
        )
    if "licence" in result:
        click.echo(f"licence: {result['licence']}")
    done = {"verify": "verified", "compare": "compared with TensorRT"}.get(task, "made")
    click.echo(
        f"{result['bundle']}: bundle of the family {result['family']}, {done} in {result['seconds']:.1f} s"
    )


@contextlib.contextmanager
def _download_progress(silent: bool) -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A bar on a terminal, a line every few seconds elsewhere; both on stderr, from the first byte on."""
    if silent:
        yield None
        return
    if not sys.stderr.isatty():
        last = time.monotonic()

        def line(name: str, done: int, whole: int | None) -> None:
            nonlocal last
            if time.monotonic() - last >= _PLAIN_EVERY:
                last = time.monotonic()
                of = "" if whole is None else f" of {whole / 1e6:.1f}"
                click.echo(f"lp-export: {name}: {done / 1e6:.1f}{of} MB", err=True)

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def update(name: str, done: int, whole: int | None) -> None:
        if name not in tasks:
            bar.start()
            for other in tasks.values():
                bar.update(other, visible=False)
            tasks[name] = bar.add_task(name.rsplit("/", 1)[-1], total=whole)
        bar.update(tasks[name], completed=done)
        if done == whole:
            bar.stop()

    try:
        yield update
    finally:
        bar.stop()


# -- lp-doctor ----------------------------------------------------------------------------------------------


@click.command(
    cls=Guarded,
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
@common_options
def doctor(bundle: Path | None, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Tell what is installed, what really works here, what is missing and how to get it."""
    from lp_edge.runtime.doctor import examine

    with logging_to_console(quiet or as_json, verbose):
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
    cls=GuardedGroup,
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
    with logging_to_console(False, verbose):
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
    with logging_to_console(False, verbose):
        for record in records:
            click.echo(json.dumps(record))
