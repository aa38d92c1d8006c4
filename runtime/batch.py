"""Many runs in one: one set of networks, each driver's motion read once, results that survive a stop.

::

    jobs ─ journal: finished before? ─ yes ─ skip
                        └─ no ─ run_job ─ result, journal ─ next job

A driver that several jobs use is tracked once; its motion (never its pixels) is kept until the last of them has
run. A job that fails does not stop the others. Every finished result is noted in a journal in the output folder with a
digest of all it was made from, so the same command goes on where it was stopped. Jobs come from
:mod:`lp_edge.runtime.job_list`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lp_edge.engines.bundle import Bundle, open_bundle
from lp_edge.errors import ConfigError, Interrupted, LpEdgeError, OutputError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.driver import Driver
from lp_edge.runtime.image import cannot_write, check_folder, fsync_path
from lp_edge.runtime.job import DriverInput, Progress, RunConfig, RunResult, run_job
from lp_edge.runtime.job_list import BatchJob
from lp_edge.runtime.media_read import sniff_kind
from lp_edge.runtime.media_write import H264_SUFFIXES, OUTPUT_SUFFIXES
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.runtime.templates import MotionTemplate

__all__ = ["JOURNAL", "BatchProgress", "BatchResult", "JobOutcome", "run_batch"]

log = logging.getLogger("lp_edge")

JOURNAL = "lp-run-journal.jsonl"
"""Name of the journal in the output folder: one JSON object a line, one line a finished job."""

# What the motion read from a driver depends on; all other options only say how it is applied.
_READING = ("smooth", "neutral", "face_timeout", "crop", "driving_crop")


@dataclass(frozen=True)
class JobOutcome:
    """How one job ended.

    Attributes:
        job: the job.
        result: what it made; None where it failed or was finished before.
        error: why it failed, or None.
        frames: frames of a result that was finished before.
    """

    job: BatchJob
    result: RunResult | None = None
    error: LpEdgeError | None = None
    frames: int = 0

    @property
    def state(self) -> Literal["done", "failed", "finished before"]:
        """How it ended, in words."""
        if self.error is not None:
            return "failed"
        return "finished before" if self.result is None else "done"


@dataclass(frozen=True)
class BatchProgress:
    """Where a batch stands.

    Attributes:
        number: number of the job, from 1.
        jobs: number of all jobs.
        job: the job.
        run: where its run stands; None before its first frame and when it has ended.
        outcome: how it ended; None while it runs.
    """

    number: int
    jobs: int
    job: BatchJob
    run: Progress | None = None
    outcome: JobOutcome | None = None


@dataclass(frozen=True)
class BatchResult:
    """What a batch made.

    Attributes:
        folder: the output folder.
        outcomes: one per job, in order.
        seconds: wall time of everything, networks' loading included.
        motion_seconds: part of it that went into reading the motion of drivers that several jobs share.
        motions: how many drivers were read that way.
    """

    folder: Path
    outcomes: tuple[JobOutcome, ...]
    seconds: float
    motion_seconds: float
    motions: int

    def count(self, state: str) -> int:
        """Number of jobs that ended in ``state``, see :attr:`JobOutcome.state`."""
        return sum(outcome.state == state for outcome in self.outcomes)

    @property
    def exit_code(self) -> int:
        """0, or the code of the first failure."""
        return next((o.error.exit_code for o in self.outcomes if o.error is not None), 0)


def run_batch(
    jobs: Sequence[BatchJob],
    folder: str | Path,
    *,
    resume: bool = True,
    progress: Callable[[BatchProgress], None] | None = None,
) -> BatchResult:
    """Run all jobs with the networks of the first one's bundle.

    Args:
        jobs: at least one; bundle, backend, video and face models are the first one's.
        folder: the output folder, which also gets the journal; made if its parent is there.
        resume: leave out jobs whose result is there and was made from the same inputs and options.
        progress: called before each job, after every frame and when a job has ended, in this thread.

    Raises:
        ConfigError: no job, or options that do not go with a batch.
        OutputError: the folder cannot be made or written.
        BundleError, BackendUnavailable, EngineError: the networks cannot be opened, or a decoder or encoder that is named does
            not work here at all.
        Interrupted: Ctrl-C; finished results stay, the unfinished one leaves nothing.
    """
    started = time.perf_counter()
    if not jobs:
        raise ConfigError("a batch without jobs", "expected at least one", "name a source")
    if any(job.config.save_motion is not None for job in jobs):
        raise ConfigError(
            "--save-motion in a batch",
            "expected it in a run with one source",
            "save the motion first; the file can drive the batch",
        )
    first = jobs[0].config
    bundle = open_bundle(None if first.bundle is None else Path(first.bundle))
    outcomes: list[JobOutcome] = []
    with _output_folder(Path(folder)) as place, ExitStack() as stack:
        journal = _Journal(place, _Keys(bundle, first), read=resume)
        entries = [journal.entry(job) for job in jobs]
        try:
            motions: _Motions | None = None
            if None in entries:
                animator = stack.enter_context(
                    Animator(bundle, backend=first.backend, video=first.video, face_models=first.face_models)
                )
                waiting = [job for job, entry in zip(jobs, entries, strict=True) if entry is None]
                if len(waiting) > 1:  # one job tells it itself
                    animator.video.check(
                        decodes=any(map(_has_clip, waiting)),
                        encodes=any(job.output.suffix.lower() in H264_SUFFIXES for job in waiting),
                    )
                motions = _Motions(animator, [job.config for job in waiting])
            for number, (job, entry) in enumerate(zip(jobs, entries, strict=True), 1):
                outcome = JobOutcome(job, frames=entry["frames"] if entry is not None else 0)
                if entry is None and motions is not None:
                    outcome = _run_one(BatchProgress(number, len(jobs), job), motions, progress)
                    if outcome.result is not None:
                        journal.add(job, outcome.result)
                outcomes.append(outcome)
                if progress is not None:
                    progress(BatchProgress(number, len(jobs), job, outcome=outcome))
        except (KeyboardInterrupt, Interrupted) as stop:
            whole = sum(outcome.error is None for outcome in outcomes)
            raise Interrupted(
                f"the batch was stopped in job {min(len(outcomes) + 1, len(jobs))} of {len(jobs)}",
                f"{whole} finished results are kept in {folder}",
                "run the same command again to go on",
            ) from stop
    return BatchResult(
        Path(folder),
        tuple(outcomes),
        round(time.perf_counter() - started, 3),
        0.0 if motions is None else round(motions.seconds, 3),
        0 if motions is None else motions.count,
    )


def _run_one(
    at: BatchProgress, motions: _Motions, progress: Callable[[BatchProgress], None] | None
) -> JobOutcome:
    def update(now: Progress | None) -> None:
        if progress is not None:
            progress(replace(at, run=now))

    job = at.job
    update(None)
    try:
        drivers = motions.of(job.config)
        return JobOutcome(job, run_job(job.config, update, animator=motions.animator, drivers=drivers))
    except Interrupted:
        raise
    except LpEdgeError as error:
        return JobOutcome(job, error=error)
    except Exception as error:  # a night's work must not end with one broken file
        log.debug("%s", job.name, exc_info=error)
        message = f"unexpected {type(error).__name__}: {error}"
        return JobOutcome(job, error=LpEdgeError(message, "", "run this job alone with --verbose"))
    finally:
        motions.done(job.config)


def _has_clip(job: BatchJob) -> bool:
    """Whether a job decodes; what cannot be read is told when its turn comes."""
    for what in (job.config.source, *job.config.drivers):
        with suppress(LpEdgeError):
            if not isinstance(what, MotionTemplate) and sniff_kind(what) == "video":
                return True
    return False


class _Motions:
    """Opens drivers for jobs; those that several jobs share are read once and dropped after the last of them."""

    def __init__(self, animator: Animator, configs: Sequence[RunConfig]) -> None:
        self.animator = animator
        self.seconds, self.count = 0.0, 0
        self._uses = Counter(key for config in configs for key in set(self._of(config)))
        self._pictures = {key for config in configs if config.side_by_side for key in self._of(config)}
        self._kept: dict[str, Driver | LpEdgeError] = {}

    def _of(self, config: RunConfig) -> list[str]:
        reading = repr([getattr(config.options, name) for name in _READING])
        return [f"{_identity(d)} {reading}" for d in config.drivers]

    def of(self, config: RunConfig) -> list[Driver] | None:
        """The drivers of a job; None where edits act alone.

        Raises:
            LpEdgeError: a driver cannot drive; jobs that share it get the same error without another try.
        """
        drivers = []
        for key, driving in zip(self._of(config), config.drivers, strict=True):
            if key in self._kept:
                kept = self._kept[key]
            elif self._uses[key] < 2:
                kept = self.animator.open_driver(driving, config.options)
            else:
                kept = self._kept[key] = self._read(driving, config.options, key in self._pictures)
            if isinstance(kept, LpEdgeError):
                raise kept
            drivers.append(kept)
        return drivers or None

    def _read(self, driving: DriverInput, options: AnimateOptions, pictures: bool) -> Driver | LpEdgeError:
        started = time.perf_counter()
        try:
            driver = self.animator.open_driver(driving, options, Stopwatch()).recorded(pixels=pictures)
            self.count += 1
            return driver
        except LpEdgeError as error:
            return error
        finally:
            self.seconds += time.perf_counter() - started

    def done(self, config: RunConfig) -> None:
        """A job that was counted has ended."""
        for key in set(self._of(config)):
            self._uses[key] -= 1
            if self._uses[key] == 0:
                self._kept.pop(key, None)


# -- journal -------------------------------------------------------------------------------------------


class _Keys:
    """Digests of what a result is made from: inputs, options, networks and the version of lp-edge."""

    def __init__(self, bundle: Bundle, first: RunConfig) -> None:
        from lp_edge import __version__

        self._common = [
            __version__,
            sorted(bundle.hashes().items()),
            first.face_models and _identity(first.face_models),
            first.video.encoder,  # decoders give the same frames
        ]

    def of(self, job: BatchJob) -> str:
        """The digest of a job; the same again only if nothing it depends on has changed."""
        config = job.config
        parts = [
            self._common,
            _identity(config.source),
            [_identity(d) for d in config.drivers],
            repr(config.options),
            [config.audio, config.side_by_side, config.crf],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _identity(what: DriverInput) -> str:
    """A file by its place, size and time of change; a template by its content; anything else by its name."""
    if isinstance(what, MotionTemplate):
        digest = hashlib.sha256(f"{what.fps} {what.family} {what.neutral}".encode())
        for array in vars(what.motion).values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
    path = Path(what)
    try:
        state = path.stat()
    except OSError:
        return str(what)
    return f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"


class _Journal:
    """The journal of an output folder; a line that a crash cut off does no harm.

    Args:
        folder: the output folder.
        keys: digests of jobs.
        read: take notice of what was finished before.
    """

    def __init__(self, folder: Path, keys: _Keys, *, read: bool) -> None:
        self._folder, self._path, self._keys = folder, folder / JOURNAL, keys
        self._entries = self._read() if read else {}

    def entry(self, job: BatchJob) -> dict[str, Any] | None:
        """The entry of a job that was finished before, if its result is still there and would be the same again."""
        entry = self._entries.get(self._place(job))
        if entry and entry["key"] == self._keys.of(job) and entry["bytes"] == _bytes(job.output):
            return entry
        return None

    def add(self, job: BatchJob, result: RunResult) -> None:
        """Append the entry of a finished job and sync it.

        Raises:
            OutputError: it cannot be written.
        """
        config = job.config
        entry = {
            "output": self._place(job),
            "source": str(config.source),
            "driving": ["template" if isinstance(d, MotionTemplate) else str(d) for d in config.drivers],
            "frames": result.frames,
            "bytes": _bytes(job.output),
            "seconds": result.seconds,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "key": self._keys.of(job),
        }
        try:
            with self._path.open("a+b") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    cut = file.read(1) != b"\n"
                else:
                    cut = False
                file.write((b"\n" if cut else b"") + json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def _place(self, job: BatchJob) -> str:
        """The output as seen from the folder, so that the same command holds from anywhere."""
        return os.path.relpath(job.output.absolute(), self._folder.absolute())

    def _read(self) -> dict[str, dict[str, Any]]:
        """The last entry of every output."""
        entries: dict[str, dict[str, Any]] = {}
        try:
            lines = self._path.read_bytes().decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return entries
        except OSError as error:
            raise OutputError(
                f"{self._path} cannot be read ({error.strerror or error})",
                "expected the journal of an earlier batch",
                "correct its permissions, or use --no-resume",
            ) from error
        kinds = {"output": str, "key": str, "bytes": int, "frames": int}
        for number, line in enumerate(lines, 1):
            entry = None
            with suppress(ValueError):
                entry = json.loads(line)
            if isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in kinds.items()):
                entries[entry["output"]] = entry
            else:
                log.warning("%s, line %d is damaged; its job runs again", self._path, number)
        return entries


def _bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder of frames; -1 where there is nothing."""
    try:
        return sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return -1


@contextmanager
def _output_folder(folder: Path) -> Iterator[Path]:
    """Makes the output folder, and removes it again if nothing came of it."""
    if folder.suffix.lower() in OUTPUT_SUFFIXES or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"{folder} is no folder",
            "a batch writes one result for each source",
            "name a folder as --output",
        )
    made = not folder.exists()
    if made:
        check_folder(folder.absolute())
        try:
            folder.mkdir()
            fsync_path(folder.absolute().parent)
        except OSError as error:
            raise cannot_write(folder, error) from error
    try:
        yield folder
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()  # refused while anything is in it
