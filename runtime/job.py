"""A whole run: source and drivers in, a finished file out. What ``lp-run`` and :func:`lp_edge.animate` call.

::

    check output ─ open bundle ─ Animator.animate ─ (side by side) ─ FrameWriter ─ rename
                                        └─ motion ─ template (--save-motion)

Frames are written as they are made, under a temporary name; whatever ends a run early (an error, Ctrl-C) removes it.
Many runs with one set of networks: :mod:`lp_edge.runtime.batch`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError, Interrupted, MediaError, NoFaceError
from lp_edge.runtime.animator import AnimatedFrame, Animation, Animator
from lp_edge.runtime.batch_size import check_batch_size
from lp_edge.runtime.driver import Driver
from lp_edge.runtime.hardware_video import Video, VideoConfig
from lp_edge.runtime.image import MAX_SIDE, create_beside
from lp_edge.runtime.media_read import probe, sniff_kind
from lp_edge.runtime.media_write import FrameWriter, OutputKind, check_output, open_writer
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.runtime.templates import MAX_FRAMES, MotionTemplate, save_template

__all__ = [
    "AUDIO_SOURCES",
    "DriverInput",
    "Progress",
    "RunConfig",
    "RunResult",
    "StageTime",
    "animate",
    "default_output",
    "default_stem",
    "demo_picture",
    "percentiles",
    "run_job",
]

U8 = npt.NDArray[np.uint8]
log = logging.getLogger("lp_edge")

DriverInput = str | Path | MotionTemplate
"""A driver of a run: clip, picture, template (``.npz``, ``.pkl``), name of a built-in template, or a template."""

AUDIO_SOURCES = ("driving", "source", "none")
"""Where the sound of the result may come from."""

_SOUND_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
# Longest side of a side-by-side frame; what is larger is scaled down as a whole.
_WIDEST = MAX_SIDE // 2


@dataclass(frozen=True)
class RunConfig:
    """One run.

    Attributes:
        source: picture or clip to animate.
        driving: one driver, or a sequence with one for each face that ``options.faces`` selects, or None to let the edits
            of ``options`` act alone.
        output: file or folder to write, its suffix chooses the format; None takes :func:`default_output`.
        options: how the motion is applied.
        bundle: folder of a bundle; None = the built-in one.
        backend: where the networks run.
        audio: whose sound the result carries: ``driving`` (of the first driver; without one the source's), ``source`` or
            ``none``. A template or picture has none.
        side_by_side: put driver, source and result beside each other instead of the result alone.
        save_motion: also write the driver's motion, an ``.npz`` that can be a driver later.
        crf: quality of H.264 and VP9, 0 (best) to 51; None = 18 and 30.
        overwrite: replace what is at ``output`` (and ``save_motion``).
        face_models: folder of the user's own face models, see :class:`lp_edge.runtime.animator.Animator`.
        batch_size: frames that the network draws at once; see :meth:`lp_edge.runtime.animator.Animator.animate`.
        video: what decodes the clips and encodes the result; ``auto`` tries hardware where frames stay on the device.

    Raises:
        ConfigError: ``audio``, ``crf`` or ``batch_size`` is out of range.
    """

    source: str | Path
    driving: DriverInput | Sequence[DriverInput] | None = None
    output: str | Path | None = None
    options: AnimateOptions = field(default_factory=AnimateOptions)
    bundle: str | Path | None = None
    backend: BackendConfig = field(default_factory=BackendConfig)
    audio: Literal["driving", "source", "none"] = "driving"
    side_by_side: bool = False
    save_motion: str | Path | None = None
    crf: int | None = None
    overwrite: bool = True
    face_models: str | Path | None = None
    batch_size: int | None = None
    video: VideoConfig = field(default_factory=VideoConfig)

    def __post_init__(self) -> None:
        if self.audio not in AUDIO_SOURCES:
            raise ConfigError(
                f"audio is {self.audio!r}",
                f"expected one of {', '.join(AUDIO_SOURCES)}",
                "choose one of these",
            )
        if self.batch_size is not None:
            check_batch_size(self.batch_size)
        if self.crf is not None and not 0 <= self.crf <= 51:
            raise ConfigError(f"crf is {self.crf}", "expected 0 (best) to 51", "use the default")

    @property
    def drivers(self) -> tuple[DriverInput, ...]:
        """All drivers, in order; empty where edits act alone."""
        return _drivers(self.driving)


def _drivers(driving: DriverInput | Sequence[DriverInput] | None) -> tuple[DriverInput, ...]:
    if driving is None:
        return ()
    return (driving,) if isinstance(driving, (str, Path, MotionTemplate)) else tuple(driving)


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        frames: frames written so far.
        expected: estimated number of frames, None when unknown.
        seconds: time since the first frame was asked for.
    """

    frames: int
    expected: int | None
    seconds: float

    @property
    def fps(self) -> float:
        """Frames a second so far."""
        return self.frames / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that are left at this speed; None when that cannot be told."""
        if self.expected is None or self.frames == 0 or self.fps == 0:
            return None
        return max(self.expected - self.frames, 0) / self.fps


@dataclass(frozen=True)
class StageTime:
    """Time of one stage per call, in milliseconds (p = percentile)."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        output: the file or folder written.
        motion: the motion template written, or None.
        frames: frames written.
        size: width, height in pixels.
        frame_rate: frames a second of the result, exact.
        seconds: wall time of the whole run, networks' loading included.
        fps: frames a second from the first frame asked for to the finished file.
        faces: frames by the state of the driver's face: ``tracked``, ``reacquired``, ``lost``, ``none``, ``template``,
            ``edit``.
        stages: time per stage; stages run at the same time, so they do not add up to ``seconds``.
        backend: backend that ran the networks.
        pixels: ``device`` where crops were cut and pasted on it, else ``host``.
        batch_size: frames that the network drew at once, at the end.
        decoder: what decoded the clips, in words; software with the reason where hardware was tried in vain; "" without a clip.
        encoder: what encoded the result, likewise; "" where it is no clip.
        warnings: what the user should know.
    """

    output: Path
    motion: Path | None
    frames: int
    size: tuple[int, int]
    frame_rate: Fraction
    seconds: float
    fps: float
    faces: Mapping[str, int]
    stages: Mapping[str, StageTime]
    backend: str
    pixels: Literal["host", "device"]
    batch_size: int
    decoder: str
    encoder: str
    warnings: tuple[str, ...]


def percentiles(seconds: list[float]) -> StageTime:
    """Mean and percentiles of durations.

    Raises:
        ValueError: there are none.

    Example:
        >>> percentiles([0.001, 0.003]).p50
        2.0
    """
    if not seconds:
        raise ValueError("no durations")
    ms = np.asarray(seconds, np.float64) * 1000.0
    p50, p90, p99 = (round(float(p), 3) for p in np.percentile(ms, [50, 90, 99]))
    return StageTime(len(ms), round(float(ms.mean()), 3), p50, p90, p99)


def demo_picture() -> Path:
    """The picture of ``lp-run --demo``, which ships with the package (its licence is beside it)."""
    return Path(__file__).resolve().parent / "data" / "demo.jpg"


def default_output(
    source: str | Path,
    driving: DriverInput | Sequence[DriverInput] | None,
    options: AnimateOptions | None = None,
) -> Path:
    """``<source>--<driving>.mp4`` in the current folder; ``.png`` where picture, driver and edits make one picture.

    Raises:
        MediaError: an input does not exist or is neither picture, clip nor template.
    """
    drivers = _drivers(driving)
    still = sniff_kind(source) == "image" and all(_kind(d) == "image" for d in drivers)
    if not drivers and options is not None and options.keyframes is not None:
        still = False
    return Path(default_stem(source, driving) + (".png" if still else ".mp4"))


def default_stem(source: str | Path, driving: DriverInput | Sequence[DriverInput] | None) -> str:
    """The name of :func:`default_output` without its suffix, whatever the inputs hold."""
    parts = ["template" if isinstance(d, MotionTemplate) else Path(d).stem for d in _drivers(driving)]
    return f"{Path(source).stem}--{'+'.join(parts) or 'edit'}"


def run_job(
    config: RunConfig,
    progress: Callable[[Progress], None] | None = None,
    *,
    animator: Animator | None = None,
    drivers: Sequence[Driver] | None = None,
) -> RunResult:
    """Animate and write the result.

    Args:
        config: the run.
        progress: called after every frame, in this thread.
        animator: networks to use instead of opening those of ``config.bundle``; left open. Its backend and its ``video`` count,
            not those of ``config``.
        drivers: ``config.drivers`` already opened by that animator, in the same order.

    Raises:
        LpEdgeError: of the kind that fits; nothing is left behind.
        Interrupted: Ctrl-C; nothing is left behind.
    """
    started = time.perf_counter()
    try:
        # Everything that can be told from the command alone is told before a network is loaded.
        check_request(config)
        output = Path(
            config.output
            if config.output is not None
            else default_output(config.source, config.driving, config.options)
        )
        target = config.output if config.output is not None else output  # a trailing slash means something
        kind = check_output(target, overwrite=config.overwrite)
        motion_path = _check_motion_path(config)
        _keep_inputs(config, output, motion_path)
        with ExitStack() as stack:
            if animator is None:
                animator = stack.enter_context(
                    Animator(
                        config.bundle,
                        backend=config.backend,
                        video=config.video,
                        face_models=config.face_models,
                    )
                )
            watch = Stopwatch()
            loaded = [_loaded(d, animator) for d in config.drivers]
            if drivers is None:
                wanted: list[DriverInput | None] = [*loaded] or [None]
                drivers = [animator.open_driver(d, config.options, watch) for d in wanted]
            animation = animator.animate(
                config.source,
                list(drivers),
                config.options,
                watch=watch,
                pixels=config.side_by_side,
                batch_size=config.batch_size,
            )
            with closing(animation):
                _check_kind(kind, animation, output)
                recorder = None
                if motion_path is not None:
                    recorder = _Recorder(config, animator, loaded[0], animation, motion_path)
                first = time.perf_counter()
                writer, warnings = _write(
                    config, target, animation, animator.video, recorder, progress, first
                )
                ended = time.perf_counter()
            family, video = animator.family, animator.video
    except KeyboardInterrupt as stop:
        raise Interrupted("the run was stopped", "nothing was written", "") from stop
    counts, decoder = dict(animation.counts), video.decoder_of(_files(config))
    return RunResult(
        output=output,
        motion=motion_path,
        frames=writer.frames,
        size=writer.size,
        frame_rate=animation.fps,
        seconds=round(ended - started, 3),
        fps=round(writer.frames / max(ended - first, 1e-9), 2),
        faces=counts,
        stages={name: percentiles(list(times)) for name, times in watch.seconds.items() if times},
        backend=family.backend,
        pixels="device" if family.resident else "host",
        batch_size=animation.batches.size,
        decoder=decoder,
        encoder=writer.encoder,
        warnings=(*warnings, *_idle_decoder(video, decoder), *_face_warnings(counts)),
    )


def animate(
    source: str | Path,
    driving: DriverInput | Sequence[DriverInput] | None = None,
    output: str | Path | None = None,
    *,
    options: AnimateOptions | None = None,
    bundle: str | Path | None = None,
    backend: BackendConfig | None = None,
    audio: Literal["driving", "source", "none"] = "driving",
    side_by_side: bool = False,
    save_motion: str | Path | None = None,
    face_models: str | Path | None = None,
    batch_size: int | None = None,
    video: VideoConfig | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> RunResult:
    """Animate ``source`` with ``driving`` and write the result: :func:`run_job` in one call.

    Args, Raises: see :class:`RunConfig` and :func:`run_job`.

    Example:
        >>> import lp_edge
        >>> lp_edge.animate("portrait.jpg", "driver.mp4", "result.mp4")  # doctest: +SKIP
    """
    config = RunConfig(
        source,
        driving,
        output,
        options or AnimateOptions(),
        bundle,
        backend or BackendConfig(),
        audio,
        side_by_side,
        save_motion,
        face_models=face_models,
        batch_size=batch_size,
        video=video or VideoConfig(),
    )
    return run_job(config, progress)


# -- checks before any work ---------------------------------------------------------------------------


def check_request(config: RunConfig) -> None:
    """Refuse what cannot be done whatever the inputs hold; no file is looked at.

    Raises:
        ConfigError: nothing to do, or options that exclude each other.
    """
    options, drivers = config.options, config.drivers
    if not drivers and not options.edits and options.keyframes is None:
        raise ConfigError(
            "neither a driver nor an edit", "expected at least one of them", "name a driver, or use --edit"
        )
    if config.save_motion is not None and len(drivers) != 1:
        raise ConfigError(
            f"motion of {len(drivers)} drivers would be saved",
            "expected one driver",
            "leave out --save-motion",
        )


def _loaded(driving: DriverInput, animator: Animator) -> DriverInput:
    """A template as an object, anything else as it is."""
    if isinstance(driving, MotionTemplate) or _kind(driving) != "template":
        return driving
    return animator.family.load_template(driving)


def _kind(driving: DriverInput) -> Literal["image", "video", "template"]:
    if isinstance(driving, MotionTemplate) or not Path(driving).exists():
        return "template"  # the name of a built-in one, or load_template says what is wrong
    return sniff_kind(driving)


def _check_motion_path(config: RunConfig) -> Path | None:
    if config.save_motion is None:
        return None
    path = Path(config.save_motion)
    if path.suffix.lower() != ".npz":
        raise ConfigError(
            f"motion would be saved as {path.name}", "expected a name that ends in .npz", "rename it"
        )
    create_beside(path).unlink()  # proves that the folder is there and takes new files
    if path.exists() and (path.is_dir() or not config.overwrite):
        raise ConfigError(
            f"{path} exists", "expected a new name for the motion", "choose another --save-motion"
        )
    return path


def _files(config: RunConfig) -> list[str | Path]:
    """Source and drivers that are files, or names of built-in templates."""
    return [what for what in (config.source, *config.drivers) if not isinstance(what, MotionTemplate)]


def _keep_inputs(config: RunConfig, output: Path, motion: Path | None) -> None:
    """Refuse to write over an input."""
    for what in _files(config):
        for target in (output, motion):
            if target is not None and Path(what).exists() and target.exists() and target.samefile(what):
                raise ConfigError(
                    f"{target} is both input and output",
                    "expected two different files",
                    "choose another output",
                )


def _check_kind(kind: OutputKind, animation: Animation, output: Path) -> None:
    if kind == "picture" and not animation.still:
        raise ConfigError(
            f"{output.name} can hold one picture, the result is a clip",
            "expected .mp4, .webm, .gif or a folder of frames",
            "choose another output, or drive a picture with a picture",
        )


# -- frames ----------------------------------------------------------------------------------------------


def _write(
    config: RunConfig,
    target: str | Path,
    animation: Animation,
    video: Video,
    recorder: _Recorder | None,
    progress: Callable[[Progress], None] | None,
    started: float,
) -> tuple[FrameWriter, list[str]]:
    """Write all frames; returns the writer, closed, and warnings."""
    sound, warnings = _sound(config, Path(target))
    writer: FrameWriter | None = None
    try:
        for frame in animation:
            rgb = _beside(frame) if config.side_by_side else frame.rgb
            if writer is None:
                size = (rgb.shape[1], rgb.shape[0])
                writer = open_writer(
                    target,
                    size,
                    animation.fps,
                    audio_from=sound,
                    crf=config.crf,
                    overwrite=config.overwrite,
                    video=video,
                )
            with animation.watch("encode"):
                writer.write(rgb)
            if recorder is not None:
                recorder.add(frame.driver.motion)
            if progress is not None:
                progress(Progress(writer.frames, animation.expected, time.perf_counter() - started))
        if writer is None:
            raise MediaError(
                "there is no frame to write",
                "expected a driver with at least one frame",
                "use another driver",
            )
        if not any(state != "none" for state in animation.counts):
            raise NoFaceError(
                "no face was found in the driver",
                "expected a face of 40 pixels or more",
                "use another driver",
            )
        if recorder is not None:
            recorder.save()
        writer.close()
    except BaseException:
        if writer is not None:
            writer.abort()
        if recorder is not None:
            recorder.discard()
        raise
    return writer, warnings


def _sound(config: RunConfig, output: Path) -> tuple[Path | None, list[str]]:
    """The clip whose sound goes into the result, and what to say when there is none although it was asked for."""
    if config.audio == "none" or output.suffix.lower() not in _SOUND_SUFFIXES:
        return None, []
    # An edit has no sound of its own: what is heard is the source.
    what = config.source if config.audio == "source" or not config.drivers else config.drivers[0]
    if isinstance(what, MotionTemplate) or _kind(what) != "video" or not probe(what).has_audio:
        if config.audio == "source":
            return None, ["the source has no sound; the result is silent"]
        return None, []
    return Path(what), []


def _beside(frame: AnimatedFrame) -> U8:
    """Driver (where it has pixels), source and result, left to right, at the result's height."""
    panels = [frame.source, frame.rgb]
    if frame.driver.rgb is not None:
        panels.insert(0, frame.driver.rgb)
    height = frame.rgb.shape[0]
    width = sum(round(p.shape[1] * height / p.shape[0]) for p in panels)
    if width > _WIDEST:
        height = max(2, height * _WIDEST // width)
    return np.concatenate([_to_height(panel, height) for panel in panels], axis=1)


def _to_height(rgb: U8, height: int) -> U8:
    if rgb.shape[0] == height:
        return rgb
    width = max(1, round(rgb.shape[1] * height / rgb.shape[0]))
    way = cv2.INTER_AREA if height < rgb.shape[0] else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(rgb, (width, height), interpolation=way), np.uint8)


class _Recorder:
    """Collects the driver's motion of every frame written and makes a template of it.

    Frames before the first face get the first motion known. A picture driver becomes two frames: its neutral face, and itself.
    """

    def __init__(
        self,
        config: RunConfig,
        animator: Animator,
        driving: DriverInput,
        animation: Animation,
        path: Path,
    ) -> None:
        self._path, self._saved = path, False
        self._family = animator.family
        self._fps = animation.fps
        self._still = not isinstance(driving, MotionTemplate) and _kind(driving) == "image"
        index, rate = config.options.neutral, animation.fps
        if isinstance(driving, MotionTemplate):
            index, rate = index or driving.neutral, driving.fps
        elif index and not self._still:
            rate = probe(driving).fps or animation.fps
        self._neutral = round(index * animation.fps / rate)
        self._source = "template" if isinstance(driving, MotionTemplate) else Path(driving).name
        self._motions: list[Motion] = []
        self._waiting = 0

    def add(self, motion: Motion | None) -> None:
        """Take one frame's motion; None before the first face."""
        if motion is None:
            self._waiting += 1
            return
        if len(self._motions) + self._waiting >= MAX_FRAMES:
            raise MediaError(
                f"the driver has more than {MAX_FRAMES} frames",
                f"a template holds {MAX_FRAMES} at most",
                "cut the driver into parts, or leave out --save-motion",
            )
        if self._waiting:
            self._motions += [motion] * self._waiting
            self._waiting = 0
        self._motions.append(motion)

    def save(self) -> None:
        """Write all motion so far."""
        motions, neutral = self._motions, self._neutral
        if self._still:
            motions, neutral = [self._family.picture_neutral(motions[0]), motions[0]], 0
        template = MotionTemplate(
            fps=self._fps,
            family=self._family.name,
            motion=Motion.stack(motions),
            neutral=min(neutral, len(motions) - 1),
            source=self._source,
        )
        save_template(template, self._path)
        self._saved = True

    def discard(self) -> None:
        """Remove what was saved, because the run failed after it."""
        if self._saved:
            self._path.unlink(missing_ok=True)


def _idle_decoder(video: Video, decoder: str) -> Iterator[str]:
    """A decoder by name, and no clip that it could have decoded."""
    if not decoder and video.named(video.config.decoder):
        yield f"nothing was decoded; --decoder {video.config.decoder} had no effect"


def _face_warnings(counts: Mapping[str, int]) -> Iterator[str]:
    total = sum(counts.values())
    if missing := counts.get("none", 0):
        yield f"the driver shows no face in its first {missing} of {total} frames; the source stays still there"
    if lost := counts.get("lost", 0):
        yield f"the driver's face was lost in {lost} of {total} frames; the last motion is held there"
