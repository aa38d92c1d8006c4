"""The commands ``lp-run``, ``lp-export``, ``lp-doctor`` and ``lp-bench``: parse, build a configuration, call, print.

Nothing heavy is imported until a command runs, so ``--help`` is instant. Results go to standard output, everything else
(progress, warnings, errors) to standard error; with ``--json`` standard output holds exactly one JSON object, for errors too
(``lp-bench``: JSON lines in the file that ``--json`` names).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click

from lp_edge.errors import BackendUnavailable, ConfigError, Interrupted, LpEdgeError

if TYPE_CHECKING:
    from types import FrameType

    from lp_edge.engines.backends import BackendConfig
    from lp_edge.engines.trt_build import BuildProgress, TensorRtConfig
    from lp_edge.runtime.batch import BatchProgress, BatchResult
    from lp_edge.runtime.bench_networks import Counter
    from lp_edge.runtime.bench_report import Table
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

# Of every command that runs networks.
BACKEND_OPTION: dict[str, Any] = {
    "multiple": True,
    "metavar": "NAME=VALUE",
    "help": "Handed to the backend as it is, for example max_batch=4 to tensorrt; may be given several times.",
}
PIXELS_OPTION: dict[str, Any] = {
    "type": click.Choice(["auto", "host", "device"]),
    "default": "auto",
    "help": "Where crops are cut and pasted back: auto = on the device where the backend keeps frames there.",
}
_VIDEO = click.Choice(["auto", "software", "nvidia", "gstreamer"])
_ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h
_PLAIN_EVERY = 5.0  # seconds between two lines of progress where there is no terminal


# -- one frame around every command -------------------------------------------------------------------


class Guarded(click.Command):
    """A command whose every end is an exit code: errors become a message (or JSON) and the code of their class."""

    json_errors = True  # --json is the option without a value that turns all output into JSON

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
        as_json = self.json_errors and "--json" in words
        verbose = "--verbose" in words or "-v" in words
        _share_arenas()
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


def _share_arenas() -> None:
    """Let all threads allocate from two arenas of the C library.

    It would give new threads arenas of their own, up to eight a core, and every clip has new threads: after 50 clips the process
    held twice the memory that it used. Frames are large blocks, for which arenas hardly matter.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc only
            ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)


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
    """The options that say where networks run; the command gets ``bundle`` and ``backend``, a BackendConfig."""

    @functools.wraps(command)
    def configured(**given: Any) -> Any:
        from lp_edge.engines.backends import BackendConfig

        options = dict(name_and_value(text) for text in given.pop("backend_option"))
        fields = {name: given.pop(name) for name in ("backend", "device", "threads", "pixels")}
        return command(**given, backend=BackendConfig(**fields, provider_options=options))

    result: Callable[..., Any] = configured
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
            click.option("--backend-option", **BACKEND_OPTION),
            click.option("--pixels", show_default=True, **PIXELS_OPTION),
        )
    ):
        result = option(result)
    return result


def name_and_value(text: str) -> tuple[str, str]:
    """The halves of what ``--backend-option`` was given; UsageError where there are none."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise click.UsageError(f"--backend-option {text!r}: expected NAME=VALUE")
    return name, value


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
@click.option(
    "--decoder",
    type=_VIDEO,
    default="auto",
    show_default=True,
    help="What decodes clips: auto = hardware that gives the same frames, where the networks keep theirs on the device, otherwise "
    "software; a named one is never replaced. lp-doctor tells which work.",
)
@click.option(
    "--encoder",
    type=_VIDEO,
    default="auto",
    show_default=True,
    help="What encodes H.264 (.mp4, .mov, .mkv), likewise.",
)
@click.option(
    "--batch-size",
    type=int,
    help="Frames that the network draws at once, 1 to 64.  [default: 1 on a CPU; on a GPU what proves fastest]",
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
    backend: BackendConfig,
    face_models: Path | None,
    decoder: str,
    encoder: str,
    batch_size: int | None,
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

    from lp_edge.runtime.hardware_video import VideoConfig
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
        backend=backend,
        face_models=face_models,
        batch_size=batch_size,
        video=VideoConfig(decoder, encoder),
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
        "pixels": result.pixels,
        "batch_size": result.batch_size,
        "decoder": result.decoder,
        "encoder": result.encoder,
        "faces": dict(result.faces),
        "stages_ms": {name: asdict(times) for name, times in result.stages.items()},
        "warnings": list(result.warnings),
    }


def _print_result(result: RunResult) -> None:
    for warning in result.warnings:
        click.echo(f"lp-run: note: {warning}", err=True)
    width, height = result.size
    frames = "1 frame" if result.frames == 1 else f"{result.frames} frames"
    how = [result.backend]
    if result.pixels == "device":
        how.append("pixels on the device")
    if result.batch_size > 1:
        how.append(f"batches of {result.batch_size}")
    for verb, words in (("decoded", result.decoder), ("encoded", result.encoder)):
        by, because, _ = words.partition(", because ")
        if by:
            how.append(f"{verb} by {by}")
        if because:
            click.echo(f"lp-run: note: {verb} by {words}", err=True)
    click.echo(
        f"{result.output}: {frames}, {width}x{height}, made in {result.seconds:.1f} s "
        f"({result.fps:.1f} frames/s, {', '.join(how)})"
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

_ENGINE_OPTIONS = {
    "device", "max_batch", "workspace_mib", "optimization_level", "hardware_compatible", "timing_cache"
}  # fmt: skip
_QUANTIZE_OPTIONS = {
    "calibration", "calibration_method", "calibration_frames", "held_out_frames", "keep_float", "min_psnr",
    "accept_quality",
}  # fmt: skip
_EXPORT_OPTIONS = {
    "mesh": {"output", "engines", *_ENGINE_OPTIONS},
    "liveportrait": {
        "output", "variant", "weights", "precision", "fp16", "flavor", "allow_unverified", "offline", "endpoint",
        "engines", *_ENGINE_OPTIONS, *_QUANTIZE_OPTIONS,
    },
    "quantize": {"output", "precision", "reference", "engines", *_ENGINE_OPTIONS, *_QUANTIZE_OPTIONS},
    "verify": {"weights", "allow_unverified"},  # the bundle knows which weights it came from
    "compare": set[str](),
    "engines": _ENGINE_OPTIONS,
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
    lp-export --family liveportrait --fp16 --engines     (and TensorRT engines for this GPU)
    lp-export --engines liveportrait-human-fp16 --max-batch 4
    lp-export --quantize liveportrait-human-fp32 --precision int8 --calibration faces -o portrait-int8
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
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8", "fp8"]),
    help="Of the networks: fp32; fp16 where it does no harm, for GPUs; int8 or fp8 for the decoder's convolutions, which wants "
    "--calibration (docs/precision.md).  [default: fp32; with --quantize: int8]",
)
@click.option(
    "--fp16",
    is_flag=True,
    help="The same as --precision fp16; with int8 or fp8, for all but the 8-bit convolutions.",
)
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
@click.option(
    "--quantize",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Export nothing; make an int8 or fp8 bundle of a finished one.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="With --quantize of an fp16 bundle: the fp32 one of the same weights, to compare with.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    metavar="PATH",
    help="With int8 or fp8: a source picture, a driving clip or a folder of them; several times. They set the scales and judge "
    "the result.",
)
@click.option(
    "--calibration-method",
    type=click.Choice(["max", "percentile", "entropy", "mse"]),
    default="mse",
    show_default=True,
    help="With int8 or fp8: where activations are cut off.",
)
@click.option(
    "--calibration-frames",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="With int8 or fp8: frames that set the scales.",
)
@click.option(
    "--held-out-frames",
    type=click.IntRange(1, 1000),
    default=8,
    show_default=True,
    help="With int8 or fp8: other frames, that judge.",
)
@click.option(
    "--keep-float",
    type=click.IntRange(0),
    default=None,
    metavar="N",
    help="With int8 or fp8: leave the N convolutions that cost most in floating point.  [default: as few as --min-psnr needs]",
)
@click.option(
    "--min-psnr",
    type=click.FloatRange(0, 100),
    default=35.0,
    show_default=True,
    metavar="DB",
    help="With int8 or fp8: PSNR against fp32 that every held-out frame must reach.",
)
@click.option(
    "--accept-quality", is_flag=True, help="With int8 or fp8: write the bundle below --min-psnr, too."
)
@click.option(
    "--engines",
    is_flag=False,
    flag_value="",
    metavar="[BUNDLE]",
    help="Build TensorRT engines for the GPU of this machine: of what is exported, or of a finished BUNDLE (needs no PyTorch).",
)
@click.option(
    "--device", type=click.IntRange(0), default=0, show_default=True, help="With --engines: index of the GPU."
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 4096),
    help="With --engines: largest batch that they take.  [default: 4 below 12 GiB of memory, else 8]",
)
@click.option(
    "--workspace-mib",
    type=click.IntRange(1, 1 << 20),
    help="With --engines: memory for tactics.  [default: TensorRT's own limit; Jetson: half of what is free]",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="With --engines: 0 (quick build) to 5 (thorough); TensorRT 8.6 and newer.  [default: TensorRT's own]",
)
@click.option(
    "--hardware-compatible",
    is_flag=True,
    help="With --engines: for Ampere and newer instead of this GPU only; slower; TensorRT 8.6 and newer, no Jetson.",
)
@click.option(
    "--timing-cache/--no-timing-cache",
    default=True,
    show_default=True,
    help="With --engines: keep measured kernels for the next build.",
)
@common_options
@click.pass_context
def export(
    context: click.Context,
    family: str | None,
    output: Path | None,
    variant: str,
    weights: Path | None,
    precision: str | None,
    fp16: bool,
    flavor: str,
    allow_unverified: bool,
    offline: bool,
    endpoint: str | None,
    verify: Path | None,
    compare: Path | None,
    quantize: Path | None,
    reference: Path | None,
    calibration: tuple[Path, ...],
    calibration_method: str,
    calibration_frames: int,
    held_out_frames: int,
    keep_float: int | None,
    min_psnr: float,
    accept_quality: bool,
    engines: str | None,
    device: int,
    max_batch: int | None,
    workspace_mib: int | None,
    optimization_level: int | None,
    hardware_compatible: bool,
    timing_cache: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Build a bundle from PyTorch networks and check it against them, or check a finished one.

    Needs PyTorch: pip install "lp-edge[export]". The bundle is written beside its place and renamed when it is whole.
    """
    task = _export_task(context)
    silent = quiet or as_json
    if engines is not None:
        from lp_edge.engines.trt_build import TensorRtConfig
        from lp_edge.export.engines import check_machine

        settings = TensorRtConfig(
            max_batch=max_batch or 0,
            workspace_mib=workspace_mib or 0,
            optimization_level=optimization_level,
            timing_cache=timing_cache,
            hardware_compatibility=hardware_compatible,
        )
        if task == "engines":
            from lp_edge.engines.bundle import open_bundle

            open_bundle(Path(engines))  # what is wrong with the command is told before what the machine lacks
        check_machine(device)

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
            eight = precision in ("int8", "fp8")
            name = f"{precision}-fp16" if eight and fp16 else precision or ("fp16" if fp16 else "fp32")
            folder = exporter.default_output(variant, name, flavor) if output is None else output
            with _download_progress(silent) as download, _build_progress(silent, "") as progress:
                options: dict[str, Any] = {
                    "weights": weights,
                    "variant": variant,
                    "flavor": flavor,
                    "allow_unverified": allow_unverified,
                    "offline": offline,
                    "endpoint": endpoint,
                    "report": report,
                    "progress": download,
                }
                if eight:
                    made = _exporter("quantize.build").export_quantised(
                        folder, half=fp16, tick=_tick(progress), **_quantize(context), **options
                    )
                else:
                    made = exporter.build(folder, precision=name, **options)
            result = made.as_dict()
        elif task == "quantize":
            bits = _exporter("quantize.build")
            folder = output or Path(f"{quantize}-{precision or 'int8'}")
            with _build_progress(silent, "") as progress:
                result = bits.quantise(
                    quantize,
                    folder,
                    reference=reference,
                    report=report,
                    tick=_tick(progress),
                    **_quantize(context),
                ).as_dict()
        elif task == "verify":
            folder = verify
            result = _exporter("verify").verify_bundle(folder, weights=weights, report=report)
        elif task == "compare":
            folder = compare
            result = _exporter("liveportrait.build").compare(folder, report=report).as_dict()
        else:
            folder = Path(engines or "")
            result = {}
        if engines is not None and folder is not None:
            result = {**result, **_engines(folder, settings, device, silent, exported=task != "engines")}
    family = family or "liveportrait"  # what --compare takes; --verify and --engines tell it themselves
    _print_export(task, {"family": family, **result, "bundle": str(folder)}, as_json, quiet)


def _export_task(context: click.Context) -> str:
    """What to do: a family, ``verify`` or ``compare``; ConfigError for options that do not go together."""
    given = {
        name
        for name in context.params
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    bundle_for = {"verify", "compare", "quantize", *(["engines"] if context.params["engines"] else [])}
    tasks = [
        name
        for name in ("family", "verify", "compare", "quantize", "engines")
        if name in given & {"family", *bundle_for}
    ]
    if len(tasks) != 1:
        raise ConfigError(
            " together with ".join(f"--{name}" for name in tasks) or "neither a family nor a bundle is given",
            "expected one of --family, --verify, --compare, --quantize and --engines BUNDLE",
            "give the family to export (and --engines alone, for its engines), or the bundle to work on",
        )
    task: str = context.params["family"] if tasks == ["family"] else tasks[0]
    options = set[str]().union(*_EXPORT_OPTIONS.values())
    for name in sorted(given & {"flavor", "fp16"} if task == "quantize" else ()):
        raise ConfigError(
            f"--{name} with --quantize",
            "flavour and fp16 are those of the bundle that is quantised",
            "give an fp16 bundle, and the fp32 one of the same weights as --reference"
            if name == "fp16"
            else f"export a bundle with --flavor {context.params['flavor']}, and quantise that",
        )
    for name in sorted(given & options - _EXPORT_OPTIONS[task] - {task}):
        what = f"--family {task}" if tasks == ["family"] else f"--{task}"
        takes = (
            ", ".join(f"--{n.replace('_', '-')}" for n in sorted(_EXPORT_OPTIONS[task])) or "no such option"
        )
        raise ConfigError(
            f"--{name.replace('_', '-')} means nothing with {what}", f"it takes {takes}", "leave it out"
        )
    for name in sorted(given & _ENGINE_OPTIONS if "engines" not in given else ()):
        raise ConfigError(
            f"--{name.replace('_', '-')} without --engines", "expected both", "add --engines, or leave it out"
        )
    precision = context.params["precision"] or ("int8" if task == "quantize" else "fp32")
    if task == "quantize" and precision not in ("int8", "fp8"):
        raise ConfigError(
            f"--quantize with --precision {precision}", "expected int8 or fp8", "choose one of them"
        )
    if precision == "fp32" and context.params["precision"] and context.params["fp16"]:
        raise ConfigError("--precision fp32 together with --fp16", "expected one of them", "leave one out")
    for name in sorted(given & _QUANTIZE_OPTIONS if precision not in ("int8", "fp8") else ()):
        raise ConfigError(
            f"--{name.replace('_', '-')} without 8 bits",
            "expected --precision int8 or fp8",
            "add it, or leave this out",
        )
    if precision in ("int8", "fp8") and not context.params["calibration"]:
        raise ConfigError(
            f"{precision} without --calibration",
            "expected pictures and clips of faces: the scales of activations are measured on them",
            "give --calibration, a folder of portraits and driving clips",
        )
    if task == "mesh" and "engines" in given and "output" not in given:
        raise ConfigError(
            "--engines for the bundle that ships with lp-edge, which keeps none",
            "expected --output",
            "give a folder, or let the first run with --backend tensorrt build them in your cache",
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


def _quantize(context: click.Context) -> dict[str, Any]:
    """How to quantise and on what, of the command's options; ConfigError when a number is out of range."""
    p = context.params
    config = _exporter("quantize.build").QuantizeConfig(
        precision=p["precision"] or "int8",
        method=p["calibration_method"],
        calibration_frames=p["calibration_frames"],
        held_out_frames=p["held_out_frames"],
        keep_float=p["keep_float"],
        min_psnr=p["min_psnr"],
        accept_quality=p["accept_quality"],
    )
    return {"config": config, "calibration": p["calibration"]}


def _tick(progress: Callable[[BuildProgress], None] | None) -> Callable[[str, int, int], None]:
    """Progress of quantising, shown as that of a build."""
    from lp_edge.engines.trt_build import BuildProgress

    def tick(stage: str, done: int, whole: int) -> None:
        if progress is not None:
            progress(BuildProgress(stage, f"{done} of {whole}", done / whole if whole else None))

    return tick


def _engines(
    folder: Path, settings: TensorRtConfig, device: int, silent: bool, *, exported: bool
) -> dict[str, Any]:
    """Engines of a bundle, as the result tells them; a failure says that a bundle exported before is whole."""
    from lp_edge.engines.bundle import MANIFEST, load_manifest
    from lp_edge.export.engines import build, device_graphs, engine_json, options_of

    start = time.perf_counter()
    try:
        with _build_progress(silent) as progress:
            graphs = device_graphs(settings)
            entries = build(folder, config=settings, device=device, graphs=graphs, progress=progress)
    except LpEdgeError as error:
        if not exported:
            raise
        remedy = f"; then lp-export --engines {folder}" if not isinstance(error, Interrupted) else ""
        raise type(error)(
            f"{folder} is exported and complete, but without engines: {error.got}",
            error.expected,
            f"{error.remedy}{remedy}",
        ) from error
    told: dict[str, Any] = {
        "engines": [engine_json(entry) for entry in entries],
        "device_graphs": [path.stem for path in graphs],
        "backend_options": {k: v for k, v in options_of(settings).items() if k != "timing_cache"},
    }
    if not exported:
        told.update(
            family=load_manifest(folder / MANIFEST).family, networks=[], seconds=time.perf_counter() - start
        )
    return told


def _exporter(module: str, command: str = "lp-export") -> Any:
    """A module of lp_edge.export; BackendUnavailable when the packages of the extra are missing, which ``command`` needs."""
    import importlib

    try:
        return importlib.import_module(f"lp_edge.export.{module}")
    except ImportError as error:
        if error.name is None or error.name.startswith("lp_edge"):
            raise
        raise BackendUnavailable(
            f"{command} needs the package {error.name}, which is not installed",
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
    for engine in result.get("engines", ()):
        click.echo(
            f"{engine['network']:28} {engine['size'] / 1e6:7.2f} MB  {engine['precision']}  engine for {engine['gpu']}, "
            f"TensorRT {engine['tensorrt']}: {engine['file']}"
        )
    if "device_graphs" in result:
        click.echo(f"engines in the user's cache: {', '.join(result['device_graphs'])}")
        click.echo("run them with: --backend tensorrt")
    if "licence" in result:
        click.echo(f"licence: {result['licence']}")
    done = {
        "verify": "verified",
        "compare": "compared with TensorRT",
        "engines": "engines built",
        "quantize": "quantised",
    }.get(task, "made")
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


@contextlib.contextmanager
def _build_progress(
    silent: bool, what: str = "engine of "
) -> Iterator[Callable[[BuildProgress], None] | None]:
    """A bar per network with stage and share on a terminal, elsewhere a line per network and every few seconds.

    ``what``: before the network's name in a line.
    """
    if silent:
        yield None
        return
    if not sys.stderr.isatty():
        network, last = "", time.monotonic()

        def line(now: BuildProgress) -> None:
            nonlocal network, last
            if now.network != network or time.monotonic() - last >= _PLAIN_EVERY:
                network, last = now.network, time.monotonic()
                share = "" if now.fraction is None else f", {now.fraction:.0%}"
                click.echo(f"lp-export: {what}{now.network}: {now.stage}{share}", err=True)

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[share]:>4}  {task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, Any] = {}

    def update(now: BuildProgress) -> None:
        bar.start()  # not before: the bar of a download may have the terminal
        if now.network not in tasks:
            for done in tasks.values():
                bar.update(done, total=1.0, completed=1.0, share="100%", stage="done")
                bar.stop_task(done)
            tasks[now.network] = bar.add_task(now.network, total=None, share="", stage="")
        task = tasks[now.network]
        if now.fraction is not None:
            bar.update(task, total=1.0, completed=now.fraction, share=f"{now.fraction:.0%}")
        bar.update(task, stage=now.stage[:60])

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

    def section(title: str, rows: Sequence[tuple[bool | str | None, str, str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        for _ in range(3):
            table.add_column(overflow="fold")
        marks = {
            True: "[green]yes[/]",
            False: "[red]no[/]",
            None: "[dim]-[/]",
            "warning": "[yellow]warning[/]",
        }
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
    met = {"ok": True, "note": None, "warning": "warning", "error": False}
    section("Requirements of GPU backends", [(met[r.severity], r.name, str(r)) for r in report.requirements])
    section(
        "Backends", [(b.works or (False if b.remedy else None), b.name, b.detail) for b in report.backends]
    )
    section("Encoders", [(e.works, e.name, f"{e.use}: {e.detail}") for e in report.encoders])
    there = bool(machine.gpus or machine.jetson)
    section(
        "Video",
        [(v.works or (False if there and v.remedy else None), v.name, v.detail) for v in report.video],
    )
    section("Bundle", [(report.bundle.works, report.bundle.path, report.bundle.detail)])
    missing = report.missing()
    if missing:
        console.print("[bold]What is missing[/]")
        for entry in missing:
            need = "needed" if entry.needed else "optional"
            console.print(escape(f"  {entry.what} ({need})\n      to get it: {entry.remedy}"))
    console.print("lp-run works here." if report.ok else "[red]lp-run does not work here.[/]")


# -- lp-bench -----------------------------------------------------------------------------------------------


class _Bench(GuardedGroup):
    """Its ``--json`` names a file."""

    json_errors = False


@click.group(
    cls=_Bench,
    name="lp-bench",
    epilog="""\b
Examples:
    lp-bench run
    lp-bench run -s portrait.jpg -d driver.mp4 --warmup 20 > run.jsonl
    lp-bench warp --size 512 --batch 1 --batch 4
    lp-bench networks --bundle liveportrait-human-fp16 --backend tensorrt --json networks.jsonl
    lp-bench pipeline --bundle liveportrait-human-fp16 --both --batch 1,auto
    lp-bench compare --bundle liveportrait-human-fp16 --b torch-eager --weights pretrained_weights
    lp-bench compare --a cuda:bundle16 --b cpu:bundle32 --network warp_decode
    lp-bench soak --frames 10000
    lp-bench jetson --bundle liveportrait-human-fp16 --markdown jetson.md

"""
    + _EXIT_CODES,
)
@click.version_option(package_name="lp-edge", message="lp-edge %(version)s")
def bench() -> None:
    """Measure lp-edge on this machine; every record carries its provenance.

    run and warp print JSON lines; the others print tables, and JSON lines where --json says.
    """


def _no_dash(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if str(path) == "-":
        raise click.BadParameter("a file is expected, not standard output", ctx=context, param=parameter)
    return path


def _report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option(
                "--json",
                "lines",
                type=click.Path(path_type=Path, allow_dash=True),
                metavar="FILE",
                help="Write the records there, one JSON object a line (in FILE.partial until the run is done); - = to standard output "
                "instead of the table.",
            ),
            click.option(
                "--markdown",
                type=click.Path(path_type=Path),
                callback=_no_dash,
                metavar="FILE",
                help="Write the tables there.",
            ),
            click.option("-v", "--verbose", is_flag=True, help="Print what is done, and tracebacks."),
        )
    ):
        command = option(command)
    return command


def _report_records(
    records: Iterable[dict[str, Any]],
    tables: Callable[[list[dict[str, Any]]], Sequence[Table]],
    lines: Path | None,
    markdown: Path | None,
) -> list[dict[str, Any]]:
    """Write every record as it comes, at the end the tables; a run that ends before says where its records are."""
    from lp_edge.runtime.bench_report import lines_to, partial_of, write_markdown
    from lp_edge.runtime.image import check_folder

    if markdown is not None:
        check_folder(markdown)
    kept: list[dict[str, Any]] = []
    try:
        with lines_to(lines) as write:
            for record in records:
                write(record)
                kept.append(record)
    except BaseException as error:
        if not kept or lines is None or isinstance(error, BrokenPipeError):
            raise
        there = "on standard output" if str(lines) == "-" else f"in {partial_of(lines)}"
        told = f"{len(kept)} record{'s' * (len(kept) > 1)} measured until then: {there}"
        if isinstance(error, (KeyboardInterrupt, click.Abort)):
            raise Interrupted("the run was stopped", told) from error
        click.echo(f"lp-bench: {told}", err=True)
        raise
    made = tables(kept)
    if markdown is not None:
        write_markdown(markdown, made)
    if str(lines) != "-":
        for table in made:
            table.print()
    return kept


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is no list of whole numbers such as 1,2,4", ctx=context, param=parameter
        ) from error


def _words(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(part.strip() for part in text.split(","))


def _counter(needed: bool) -> Counter | None:
    """What counts FLOPs and bytes of ONNX files; None, or an error where it is needed, without the package onnx."""
    try:
        return cast("Counter", _exporter("cost", "lp-bench").file_cost)
    except BackendUnavailable as error:
        if needed:
            raise BackendUnavailable(
                f"counting FLOPs and bytes: {error.got}", error.expected, error.remedy
            ) from error
        return None


_SECONDS = click.option("--seconds", type=float, default=1.0, show_default=True, help="Time per measurement.")
_NETWORKS = click.option(
    "--network",
    "networks",
    multiple=True,
    metavar="NAME",
    help="Network to measure; may be repeated.  [default: all]",
)


@bench.command("networks")
@click.option(
    "--batch",
    "batches",
    default="1,2,4,8",
    show_default=True,
    callback=_numbers,
    metavar="N,N,…",
    help="Rows per call.",
)
@_NETWORKS
@_SECONDS
@_backend_options
@_report_options
def bench_networks_command(
    batches: tuple[int, ...],
    networks: tuple[str, ...],
    seconds: float,
    bundle: Path | None,
    backend: BackendConfig,
    lines: Path | None,
    markdown: Path | None,
    verbose: bool,
) -> None:
    """Time each network alone, inputs and results on its device, against the card's peaks measured in the same run.

    FLOPs and bytes are counted with the package onnx (pip install "lp-edge[export]"); without it those columns are left out.
    """
    from lp_edge.runtime.bench_networks import bench_networks, networks_table

    with logging_to_console(False, verbose):
        records = bench_networks(
            bundle,
            backend,
            batches=batches,
            networks=networks,
            seconds=seconds,
            counter=_counter(needed=False),
        )
        _report_records(records, lambda kept: [networks_table(kept)], lines, markdown)


def _animation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option(
                "-s",
                "--source",
                metavar="FILE",
                help="Picture or clip.  [default: the demo picture at 1280x720]",
            ),
            click.option(
                "-d",
                "--driving",
                metavar="FILE|NAME",
                help="Driver.  [default: the demo picture talking, a clip of 512x512]",
            ),
        )
    ):
        command = option(command)
    return command


@bench.command("pipeline")
@_animation_options
@click.option(
    "--both",
    is_flag=True,
    help="Two runs: crops cut and pasted on the host, then on the device, whatever --pixels says.",
)
@click.option(
    "--batch",
    "batches",
    callback=_words,
    metavar="N|auto,…",
    help="Frames drawn at once; one run each.  [default: auto]",
)
@click.option(
    "--frames", type=int, default=None, help="Stop after so many frames, those of --warmup included."
)
@click.option("--warmup", type=int, default=10, show_default=True, help="Frames that are not counted.")
@_backend_options
@_report_options
def bench_pipeline_command(
    source: str | None,
    driving: str | None,
    both: bool,
    batches: tuple[str, ...],
    frames: int | None,
    warmup: int,
    bundle: Path | None,
    backend: BackendConfig,
    lines: Path | None,
    markdown: Path | None,
    verbose: bool,
) -> None:
    """Time a whole run per stage, and tell how much of a frame is not the networks' own time."""
    from lp_edge.runtime.bench_pipeline import bench_pipeline, pipeline_table

    sizes: list[int | None] = []
    for word in batches or ("auto",):
        if word != "auto" and not word.isdigit():
            raise ConfigError(f"--batch {word}", "expected whole numbers or auto", "write --batch auto,1,4")
        sizes.append(None if word == "auto" else int(word))
    with logging_to_console(False, verbose):
        records = bench_pipeline(
            source,
            driving,
            bundle=bundle,
            backend=backend,
            pixels=("host", "device") if both else (),
            batch_sizes=sizes,
            warmup=warmup,
            limit=frames,
        )
        _report_records(records, pipeline_table, lines, markdown)


@bench.command("compare")
@click.option(
    "--a",
    "ours",
    metavar="BACKEND[:BUNDLE]",
    help="First side.  [default: --backend and --bundle]",
)
@click.option(
    "--b",
    "others",
    multiple=True,
    metavar="BACKEND[:BUNDLE]",
    help="Other side; may be repeated. Also torch-eager and torch-compile: LivePortrait's networks of --weights in PyTorch, in "
    "float16 on a GPU, against bundles of that family.  [default: both of these]",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkpoints for PyTorch; need not be the official ones.",
)
@_NETWORKS
@click.option(
    "--batch",
    "batches",
    default="1",
    show_default=True,
    callback=_numbers,
    metavar="N,N,…",
    help="Rows per call.",
)
@click.option("--rounds", type=int, default=20, show_default=True, help="Rounds A B B A that are counted.")
@click.option("--warmup", type=int, default=3, show_default=True, help="Rounds that are not counted.")
@_backend_options
@_report_options
def bench_compare_command(
    ours: str | None,
    others: tuple[str, ...],
    weights: Path | None,
    networks: tuple[str, ...],
    batches: tuple[int, ...],
    rounds: int,
    warmup: int,
    bundle: Path | None,
    backend: BackendConfig,
    lines: Path | None,
    markdown: Path | None,
    verbose: bool,
) -> None:
    """Time two backends, bundles or PyTorch against each other: the same networks, in turns, in one process."""
    from dataclasses import replace

    from lp_edge.runtime.bench_compare import Side, bench_compare, compare_table, runner_side

    def side(words: str) -> Side:
        name, colon, folder = words.partition(":")
        if not name.startswith("torch-"):
            chosen = Path(folder) if colon else bundle
            options = backend.provider_options if name == backend.backend else {}
            return runner_side(chosen, replace(backend, backend=name, provider_options=options))
        if weights is None:
            raise ConfigError(
                f"--b {words} without --weights", "expected checkpoints for PyTorch", "add --weights DIR"
            )
        torch_side: Side = _exporter("bench_torch", "lp-bench").open_torch_side(
            weights,
            name.removeprefix("torch-"),
            device=backend.device,
            gpu=False if backend.backend == "cpu" else None,
        )
        return torch_side

    with logging_to_console(False, verbose):
        first = runner_side(bundle, backend) if ours is None else side(ours)
        records = bench_compare(
            first,
            [side(words) for words in others or ("torch-eager", "torch-compile")],
            networks=networks,
            batches=batches,
            rounds=rounds,
            warmup=warmup,
        )
        _report_records(records, lambda kept: [compare_table(kept)], lines, markdown)


@bench.command("soak")
@_animation_options
@click.option("--frames", type=int, default=10_000, show_default=True, help="Frames to draw.")
@click.option("--samples", type=int, default=50, show_default=True, help="How often memory is looked at.")
@_backend_options
@_report_options
def bench_soak_command(
    source: str | None,
    driving: str | None,
    frames: int,
    samples: int,
    bundle: Path | None,
    backend: BackendConfig,
    lines: Path | None,
    markdown: Path | None,
    verbose: bool,
) -> int:
    """Draw many frames and tell whether memory, threads and descriptors stay level; exit code 1 if not."""
    from lp_edge.runtime.bench_soak import bench_soak, soak_table

    with logging_to_console(False, verbose):
        records = bench_soak(
            source,
            driving,
            bundle=bundle,
            backend=backend,
            frames=frames,
            samples=samples,
        )
        kept = _report_records(records, lambda kept: [soak_table(kept)], lines, markdown)
    return 0 if kept[-1]["passed"] else 1


@bench.command("jetson")
@click.option("--estimate", is_flag=True, help="The estimate, also on a Jetson.")
@_SECONDS
@_backend_options
@_report_options
def bench_jetson_command(
    estimate: bool,
    seconds: float,
    bundle: Path | None,
    backend: BackendConfig,
    lines: Path | None,
    markdown: Path | None,
    verbose: bool,
) -> None:
    """Frames a second that the Orin modules can reach at most, estimated from counted work; on a Jetson: measured.

    The estimate needs the package onnx (pip install "lp-edge[export]").
    """
    from lp_edge.runtime.bench_jetson import estimate_jetson, jetson_table
    from lp_edge.runtime.bench_networks import bench_networks, networks_table
    from lp_edge.runtime.doctor import examine_machine

    with logging_to_console(False, verbose):
        if examine_machine().jetson and not estimate:
            measured = bench_networks(
                bundle,
                backend,
                batches=(1,),
                seconds=seconds,
                counter=_counter(needed=False),
            )
            _report_records(measured, lambda kept: [networks_table(kept)], lines, markdown)
            return
        records = estimate_jetson(cast("Counter", _counter(needed=True)), bundle)
        _report_records(records, lambda kept: [jetson_table(kept)], lines, markdown)


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
@click.option(
    "--frames", type=int, default=None, help="Stop after so many frames, those of --warmup included."
)
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
    backend: BackendConfig,
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
        backend=backend,
        warmup=warmup,
        limit=frames,
    )
    with logging_to_console(False, verbose):
        _report_records(records, lambda kept: [], Path("-"), None)


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
    backend: BackendConfig,
    verbose: bool,
) -> None:
    """Time the warp alone: frames a second per batch size."""
    from lp_edge.runtime.bench import bench_warp as measure

    records = measure(size, batches, seconds=seconds, bundle=bundle, backend=backend)
    with logging_to_console(False, verbose):
        _report_records(records, lambda kept: [], Path("-"), None)
