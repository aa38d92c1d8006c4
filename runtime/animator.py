"""The animator: sources and drivers in, animated frames out.

::

    driving ─ decode ─ track ─ motion ─┐
                                       compose ─ warp ─ paste-back ─ frames
    source ── decode ─ track ─ crop ───┘

Every arrow between two stages is a bounded queue with a thread behind it, so decoding, motion and rendering overlap and
memory does not grow with the length of a clip.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, resolve_backend
from lp_edge.engines.bundle import Bundle, open_bundle
from lp_edge.errors import ConfigError, MediaError, NoFaceError
from lp_edge.runtime.face_motion import Canonical
from lp_edge.runtime.faces import (
    DetectorConfig,
    Face,
    FaceDetector,
    FaceMeshNet,
    locate_faces,
    no_face_error,
    select_faces,
)
from lp_edge.runtime.image import read_image
from lp_edge.runtime.media_read import MediaInfo, VideoReader, probe, resample, sniff_kind
from lp_edge.runtime.mesh_family import MeshFamily, Portrait
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.paste_back import paste_back
from lp_edge.runtime.pipeline import Prefetch, prefetch
from lp_edge.runtime.templates import MotionTemplate, load_template
from lp_edge.runtime.tracking import FaceTracker, TrackerConfig

__all__ = ["AnimatedFrame", "Animation", "Animator", "DriverFrame", "Stopwatch"]

U8 = npt.NDArray[np.uint8]

_QUEUE = 4
_SAMPLES = 1 << 16
_PICTURE_FPS = Fraction(25)


class Stopwatch:
    """Collects how long each stage took, per frame; safe to use from several threads.

    Only the newest 65 536 samples of a stage are kept, so that memory does not grow with a stream.

    Example:
        >>> watch = Stopwatch()
        >>> with watch("warp"):
        ...     pass
        >>> len(watch.seconds["warp"])
        1
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.seconds: dict[str, deque[float]] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body as one sample of ``stage``, in seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Add one sample."""
        with self._lock:
            self.seconds.setdefault(stage, deque(maxlen=_SAMPLES)).append(seconds)


@dataclass(frozen=True)
class DriverFrame:
    """One step of a driver.

    Attributes:
        time: seconds from the driver's start.
        motion: motion of the face, held while the face is lost, ``None`` before the first face appears.
        state: ``tracked``, ``reacquired``, ``lost`` or ``none`` (no face yet); ``template`` for a template.
        rgb: the driving picture uint8 ``[H, W, 3]``; ``None`` for a template.
    """

    time: Fraction
    motion: Motion | None
    state: str
    rgb: U8 | None = None


@dataclass(frozen=True)
class AnimatedFrame:
    """One frame of the result.

    Attributes:
        index: 0, 1, 2, …
        rgb: uint8 ``[H, W, 3]``, the animated source frame.
        source: uint8 ``[H, W, 3]``, the source frame it was made from.
        driver: the driving step it shows.
    """

    index: int
    rgb: U8
    source: U8
    driver: DriverFrame


@dataclass
class Animation:
    """An animation in the making: iterate it once to get its frames.

    Attributes:
        fps: exact frame rate of the result.
        size: width, height of the result in pixels.
        expected: estimated number of frames, ``None`` when unknown.
        still: the result is one picture (picture source, picture driver).
        watch: time spent per stage.
        counts: frames by the driver's face state.
    """

    fps: Fraction
    size: tuple[int, int]
    expected: int | None
    still: bool
    frames: Prefetch[AnimatedFrame]
    watch: Stopwatch
    counts: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[AnimatedFrame]:
        for frame in self.frames:
            self.counts[frame.driver.state] = self.counts.get(frame.driver.state, 0) + 1
            yield frame

    def close(self) -> None:
        """Stop all threads behind the frames; harmless when they have ended."""
        self.frames.close()


@dataclass(frozen=True)
class _Driver:
    """A driver that is ready to run: its rate, length, neutral motion and a way to start it."""

    fps: Fraction
    expected: int | None
    neutral: Motion | None
    still: bool
    start: Callable[[], Generator[DriverFrame, None, None]]


class Animator:
    """Animates portraits with the networks of one bundle.

    Args:
        bundle: folder of a bundle, an open bundle, or ``None`` for the built-in one.
        backend: which engine runs the networks; see :class:`lp_edge.engines.backends.BackendConfig`.

    Raises:
        BundleError: the bundle is incomplete or altered.
        BackendUnavailable: the backend asked for is not there.

    Example:
        >>> from lp_edge import Animator
        >>> with Animator() as animator:                                  # doctest: +SKIP
        ...     for frame in animator.animate("portrait.jpg", "driver.mp4"):
        ...         show(frame.rgb)
    """

    def __init__(
        self, bundle: str | Path | Bundle | None = None, *, backend: BackendConfig | None = None
    ) -> None:
        self.bundle = (
            bundle if isinstance(bundle, Bundle) else open_bundle(None if bundle is None else Path(bundle))
        )
        if self.bundle.manifest.family != MeshFamily.name:
            raise ConfigError(
                f"the bundle holds the family {self.bundle.manifest.family!r}",
                f"this version animates the family {MeshFamily.name!r}",
                "use the built-in bundle, or export one with lp-export --family mesh",
            )
        config = resolve_backend(backend or BackendConfig())
        if config.threads == 0:
            # Tracking and rendering run side by side; each network on all cores would make them wait for each other.
            config = replace(config, threads=max(1, (os.cpu_count() or 1) // 2))
        with ExitStack() as stack:
            detector = stack.enter_context(self.bundle.runner(names.FACE_DETECTOR, config))
            mesh = stack.enter_context(self.bundle.runner(names.FACE_MESH, config))
            warp = stack.enter_context(self.bundle.runner(names.WARP_DECODE, config))
            self._runners = stack.pop_all()
        # The mesh network confirms every face, so the detector may be lenient.
        self.detector = FaceDetector(detector, DetectorConfig(score=0.4))
        self.mesh = FaceMeshNet(mesh)
        self.canonical = Canonical.from_table(self.bundle.load_table("canonical"))
        self.family = MeshFamily(warp, self.canonical)
        self.backend = warp.backend

    def __enter__(self) -> Animator:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the networks; calling it twice is harmless."""
        self._runners.close()

    # -- single frames ----------------------------------------------------------------------------

    def tracker(self, *, smooth: bool, max_faces: int = 1) -> FaceTracker:
        """A face tracker of its own for one stream."""
        return FaceTracker(self.detector, self.mesh, TrackerConfig(smooth=smooth, max_faces=max_faces))

    def find_faces(self, rgb: U8, options: AnimateOptions | None = None) -> list[Face]:
        """Faces of one picture that ``options.face`` selects.

        Args:
            rgb: uint8 ``[H, W, 3]``.

        Raises:
            NoFaceError: there is no face, or none with that index.
        """
        options = options or AnimateOptions()
        faces = locate_faces(rgb, self.detector, self.mesh, stages=None)
        if not faces:
            raise no_face_error(rgb)
        return select_faces(faces, options.face)

    def prepare_source(self, frame: U8 | str | Path, options: AnimateOptions | None = None) -> list[Portrait]:
        """Find, cut and measure the faces to animate in a picture (array uint8 ``[H, W, 3]`` RGB or a path).

        Raises:
            MediaError: the file cannot be read.
            NoFaceError: no face was found.
        """
        options = options or AnimateOptions()
        rgb = frame if isinstance(frame, np.ndarray) else read_image(frame)
        return [self.family.prepare(rgb, face.points, options) for face in self.find_faces(rgb, options)]

    def render(
        self,
        portraits: list[Portrait],
        driving: Motion,
        neutral: Motion,
        options: AnimateOptions | None = None,
        watch: Stopwatch | None = None,
    ) -> U8:
        """One animated frame uint8 ``[H, W, 3]``: all ``portraits`` of one source frame follow ``driving``."""
        options, watch = options or AnimateOptions(), watch or Stopwatch()
        out: U8 | None = None
        for portrait in portraits:
            with watch("compose"):
                kp = self.family.keypoints(portrait, driving, neutral, options)
            with watch("warp"):
                crop = self.family.render(portrait, [kp])[0]
            with watch("paste_back"):
                out = paste_back(portrait.frame, crop, portrait.rect, out=out)
        if out is None:
            raise NoFaceError(
                "no portrait to render", "expected at least one face", "prepare the source first"
            )
        return out

    def _frame(
        self,
        index: int,
        rgb: U8,
        portraits: list[Portrait],
        step: DriverFrame,
        neutral: Motion | None,
        options: AnimateOptions,
        watch: Stopwatch,
    ) -> AnimatedFrame:
        """One frame of an animation; the source stays as it is while either side shows no face."""
        out = rgb
        if portraits and step.motion is not None and neutral is not None:
            out = self.render(portraits, step.motion, neutral, options, watch)
        return AnimatedFrame(index, out, rgb, step)

    # -- drivers ------------------------------------------------------------------------------------

    def open_driver(
        self, driving: str | Path | MotionTemplate, options: AnimateOptions, watch: Stopwatch
    ) -> _Driver:
        """Look at a driver (clip, picture, template file, template name or template) and make it ready to run."""
        if isinstance(driving, MotionTemplate):
            return self._template_driver(driving, options)
        kind = "template" if not Path(driving).exists() else sniff_kind(Path(driving))
        if kind == "template":
            return self._template_driver(load_template(driving, self.canonical), options)
        if kind == "image":
            return self._picture_driver(Path(driving), options, watch)
        return self._clip_driver(Path(driving), options, watch)

    def _template_driver(self, template: MotionTemplate, options: AnimateOptions) -> _Driver:
        index = options.neutral or template.neutral
        if index >= len(template.motion):
            raise _neutral_beyond(index, len(template.motion))

        def start() -> Generator[DriverFrame, None, None]:
            for i in range(len(template.motion)):
                yield DriverFrame(Fraction(i) / template.fps, template.motion[i], "template")

        return _Driver(template.fps, len(template.motion), template.motion[index], False, start)

    def _picture_driver(self, path: Path, options: AnimateOptions, watch: Stopwatch) -> _Driver:
        rgb = read_image(path)
        with watch("motion"):
            motion = self.family.motion_of(self.find_faces(rgb)[0].points)

        def start() -> Generator[DriverFrame, None, None]:
            yield DriverFrame(Fraction(0), motion, "tracked", rgb)

        return _Driver(_PICTURE_FPS, 1, self.family.picture_neutral(motion), True, start)

    def _clip_driver(self, path: Path, options: AnimateOptions, watch: Stopwatch) -> _Driver:
        info = probe(path)
        fps = _rate(info)

        def start() -> Generator[DriverFrame, None, None]:
            return self._track_clip(path, fps, options, watch)

        neutral = None
        if options.neutral:
            with prefetch(self._track_clip(path, fps, options, Stopwatch()), 1, "neutral") as steps:
                step = next(itertools.islice(steps, options.neutral, None), None)
            if step is None:
                raise _neutral_beyond(options.neutral, info.frames or 0)
            if step.state not in ("tracked", "reacquired"):
                raise NoFaceError(
                    f"frame {options.neutral} of {path.name} shows no face",
                    "expected a face in the neutral frame",
                    "choose another --neutral",
                )
            neutral = step.motion
        return _Driver(fps, info.frames, neutral, False, start)

    def _track_clip(
        self, path: Path, fps: Fraction, options: AnimateOptions, watch: Stopwatch
    ) -> Generator[DriverFrame, None, None]:
        """Motion of a driving clip, step by step at a constant rate."""
        tracker = self.tracker(smooth=options.smooth)
        motion: Motion | None = None
        seen = 0
        with prefetch(self._decode(path, fps, watch), _QUEUE, "decode driving") as frames:
            for when, rgb in frames:
                with watch("motion"):
                    face = next(iter(tracker.update(rgb, float(when))), None)
                    state = "none" if face is None else face.state
                    if face is not None and state != "lost":
                        motion = self.family.motion_of(face.points)
                    elif motion is not None:
                        state = "lost"
                seen += 1
                if motion is None and when > options.face_timeout:
                    raise NoFaceError(
                        f"no face in the first {float(when):.1f} s of {path.name}",
                        f"expected one within {options.face_timeout:g} s",
                        "trim the clip or raise --face-timeout",
                    )
                yield DriverFrame(when, motion, state, rgb)
        if motion is None:
            raise NoFaceError(
                f"no face in any of the {seen} frames of {path.name}",
                "expected a face of 40 pixels or more",
                "use a clip that shows the face larger or more upright",
            )

    @staticmethod
    def _decode(path: Path, fps: Fraction, watch: Stopwatch) -> Iterator[tuple[Fraction, U8]]:
        """Frames of a clip at a constant rate, with their times."""
        with VideoReader(path) as reader:
            start = time.perf_counter()
            for frame in resample(reader, fps):
                watch.add("decode", time.perf_counter() - start)
                yield frame.time, frame.rgb
                start = time.perf_counter()

    # -- whole animations -----------------------------------------------------------------------------

    def animate(
        self,
        source: str | Path | U8,
        driving: str | Path | MotionTemplate,
        options: AnimateOptions | None = None,
        *,
        watch: Stopwatch | None = None,
    ) -> Animation:
        """Animate a source with a driver.

        Args:
            source: path of a picture or clip, or a picture uint8 ``[H, W, 3]`` RGB.
            driving: path of a clip, picture or template (``.npz``, LivePortrait ``.pkl``), the name of a built-in
                template (``nod``, ``shake``, ``blink``, ``smile``, ``talk``), or a template.
            options: see :class:`AnimateOptions`.
            watch: collects the time of each stage.

        Returns:
            An :class:`Animation`; its frames are made while it is iterated.

        Raises:
            MediaError, NoFaceError, ConfigError: before the first frame where that can be known, otherwise from the iteration.
        """
        options, watch = options or AnimateOptions(), watch or Stopwatch()
        if not isinstance(source, np.ndarray) and sniff_kind(Path(source)) == "video":
            return self._animate_clip(Path(source), driving, options, watch)
        rgb = source if isinstance(source, np.ndarray) else read_image(source)
        portraits = self.prepare_source(rgb, options)
        driver = self.open_driver(driving, options, watch)

        def rendered() -> Iterator[AnimatedFrame]:
            neutral = driver.neutral
            with prefetch(driver.start(), _QUEUE, "motion") as steps:
                for index, step in enumerate(steps):
                    neutral = step.motion if neutral is None else neutral
                    yield self._frame(index, rgb, portraits, step, neutral, options, watch)

        size = (rgb.shape[1], rgb.shape[0])
        frames = prefetch(rendered(), _QUEUE, "render")
        return Animation(driver.fps, size, driver.expected, driver.still, frames, watch)

    def _animate_clip(
        self, path: Path, driving: str | Path | MotionTemplate, options: AnimateOptions, watch: Stopwatch
    ) -> Animation:
        """A clip as source: every frame is a source of its own, the driver's steps are laid on its times."""
        info = probe(path)
        fps = _rate(info)
        driver = self.open_driver(driving, options, watch)

        def sources() -> Iterator[tuple[Fraction, U8, list[Portrait]]]:
            tracker = self.tracker(smooth=options.smooth, max_faces=1 if options.face == "largest" else 8)
            with prefetch(self._decode(path, fps, watch), _QUEUE, "decode source") as frames:
                for when, rgb in frames:
                    with watch("source"):
                        faces = [f for f in tracker.update(rgb, float(when)) if f.visible]
                        portraits = [
                            self.family.prepare(rgb, f.points, options) for f in _present(faces, options.face)
                        ]
                    yield when, rgb, portraits

        def rendered() -> Iterator[AnimatedFrame]:
            neutral, index, any_face = driver.neutral, 0, False
            with (
                prefetch(sources(), _QUEUE, "source") as frames,
                prefetch(_at_rate(driver, fps), _QUEUE, "motion") as steps,
            ):
                for (when, rgb, portraits), step in _paired(frames, steps, options.length):
                    neutral = step.motion if neutral is None else neutral
                    any_face = any_face or bool(portraits)
                    if not any_face and when > options.face_timeout:
                        raise _no_source_face(path)
                    yield self._frame(index, rgb, portraits, step, neutral, options, watch)
                    index += 1
            if not any_face:
                raise _no_source_face(path)

        n_driver = None if driver.expected is None else round(driver.expected * fps / driver.fps)
        expected = _expected(info.frames, None if driver.still else n_driver, options.length)
        frames = prefetch(rendered(), _QUEUE, "render")
        return Animation(fps, (info.width, info.height), expected, False, frames, watch)


def _present(faces: list[Face], which: str) -> list[Face]:
    """The faces to animate in one frame of a clip: an index that is out of sight for a while is no error."""
    return [] if which.isdecimal() and int(which) >= len(faces) else select_faces(faces, which)


def _at_rate(driver: _Driver, fps: Fraction) -> Generator[DriverFrame, None, None]:
    """The driver's steps at another constant rate: for each output time the newest step that is due.

    A picture driver never ends: it holds its one motion for as long as the source lasts.
    """
    with closing(driver.start()) as steps:
        index = 0
        current = next(steps, None)
        while current is not None:
            following = next(steps, None)
            end = following.time if following is not None else current.time + 1 / driver.fps
            while Fraction(index) / fps < end or (driver.still and following is None):
                yield current
                index += 1
            current = following


def _paired(
    frames: Iterator[tuple[Fraction, U8, list[Portrait]]], steps: Iterator[DriverFrame], length: str
) -> Iterator[tuple[tuple[Fraction, U8, list[Portrait]], DriverFrame]]:
    """Source frames beside driver steps; the one that ends first holds its last item where ``length`` says so."""
    frame, step = next(frames, None), next(steps, None)
    while frame is not None and step is not None:
        yield frame, step
        next_frame, next_step = next(frames, None), next(steps, None)
        if length == "shortest" and (next_frame is None or next_step is None):
            return
        if (length == "source" and next_frame is None) or (length == "driving" and next_step is None):
            return
        frame, step = next_frame or frame, next_step or step


def _expected(source: int | None, driving: int | None, length: str) -> int | None:
    known = {"source": source, "driving": driving}
    if length in known and known[length] is not None:
        return known[length]
    counts = [n for n in (source, driving) if n is not None]
    return min(counts) if counts else None


def _rate(info: MediaInfo) -> Fraction:
    if info.fps is None or info.fps <= 0:
        raise MediaError(
            "the clip states no frame rate",
            "expected a rate above 0",
            "convert it with a constant frame rate",
        )
    return info.fps


def _neutral_beyond(index: int, frames: int) -> ConfigError:
    return ConfigError(
        f"neutral frame {index}", f"the driver has {frames} frames", "choose a smaller --neutral"
    )


def _no_source_face(path: Path) -> NoFaceError:
    return NoFaceError(
        f"no face was found in the source clip {path.name}",
        "expected a face of 40 pixels or more",
        "use a clip that shows the face larger or more upright",
    )
