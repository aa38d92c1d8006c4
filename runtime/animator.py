"""The animator: sources and drivers in, animated frames out.

::

    driving ─ decode ─ track ─ motion ─┐
                                       compose ─ warp ─ paste-back ─ frames
    source ── decode ─ track ─ crop ───┘

Every arrow between two stages is a bounded queue with a thread behind it, so decoding, motion, rendering and putting frames
together overlap and memory does not grow with the length of a clip. Where a device draws, batches of frames are queued there while
the ones before them are brought back. A family that has to see the whole of a source clip's motion first
(:meth:`Family.measures_whole_clip`) gets two passes, between which only motion is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, resolve_backend
from lp_edge.engines.bundle import Bundle, open_bundle
from lp_edge.errors import ConfigError, NoFaceError
from lp_edge.runtime.batch_size import MAX_BATCH_SIZE, BatchTuner, candidates
from lp_edge.runtime.cast import AnimatedFrame, Cast, DrawnFrame, Shot, Slots, too_many_drivers
from lp_edge.runtime.driver import Driver, DriverFrame, Drivers, at_rate, decode, frame_rate
from lp_edge.runtime.face_motion import Canonical
from lp_edge.runtime.faces import DetectorConfig, Face, FaceDetector, FaceMeshNet, faces_policy
from lp_edge.runtime.families import Wrap, half_the_cores, open_family, unwrapped
from lp_edge.runtime.family import Family, Portrait
from lp_edge.runtime.hardware_video import Video, VideoConfig
from lp_edge.runtime.image import read_image
from lp_edge.runtime.live import LiveAnimation, LivePuppet, LiveReader
from lp_edge.runtime.media_read import probe, sniff_kind
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.pipeline import Prefetch, prefetch
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.runtime.templates import MotionTemplate
from lp_edge.runtime.tracking import FaceFinder, FaceTracker

__all__ = ["AnimatedFrame", "Animation", "Animator", "DriverFrame", "Driving", "Stopwatch"]

U8 = npt.NDArray[np.uint8]

Driving = str | Path | MotionTemplate | Driver | None
"""Anything that can drive: clip, picture, template (file, name or object), an open driver, or None for edits alone."""

Batches = Generator[list[DrawnFrame], None, None]

_QUEUE = 4
# Batches that wait on the device's side while one is put together. One more is begun meanwhile, so the device has two to work on.
_BATCHES = 1


@dataclass
class Animation:
    """An animation in the making: iterate it once to get its frames.

    Attributes:
        fps: exact frame rate of the result.
        size: width, height of the result in pixels.
        expected: estimated number of frames, ``None`` when unknown.
        still: the result is one picture (picture source, picture driver).
        watch: time spent per stage.
        batches: how many frames are drawn at once.
        counts: frames by the driver's face state.
    """

    fps: Fraction
    size: tuple[int, int]
    expected: int | None
    still: bool
    frames: Prefetch[AnimatedFrame]
    watch: Stopwatch
    batches: BatchTuner
    counts: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[AnimatedFrame]:
        for frame in self.frames:
            self.counts[frame.driver.state] = self.counts.get(frame.driver.state, 0) + 1
            yield frame

    def close(self) -> None:
        """Stop all threads behind the frames; harmless when they have ended."""
        self.frames.close()


class Animator:
    """Animates portraits with the networks of one bundle.

    Args:
        bundle: folder of a bundle, an open bundle, or ``None`` for the built-in one.
        backend: which engine runs the networks; see :class:`lp_edge.engines.backends.BackendConfig`.
        video: what decodes clips, on the GPU of the networks where it names none; None = ``auto``.
        face_models: folder with ``landmark.onnx`` and, if wanted, InsightFace's ``det_10g.onnx`` and ``2d106det.onnx``; the
            liveportrait family then cuts its crops as the reference does.
        wrap: takes every network as it is opened and gives what is called in its place
            (:meth:`lp_edge.engines.batching.DeviceWorker.wrap`).

    Attributes:
        video: decodes the clips of all animations, and may encode their results (:func:`lp_edge.runtime.media_write.open_writer`).

    Raises:
        BundleError: the bundle is incomplete or altered.
        BackendUnavailable: the backend asked for is not there.
        ConfigError: the bundle's family is unknown, or it does not use ``face_models``.

    Example:
        >>> from lp_edge import Animator
        >>> with Animator() as animator:                                  # doctest: +SKIP
        ...     for frame in animator.animate("portrait.jpg", "driver.mp4"):
        ...         show(frame.rgb)
    """

    def __init__(
        self,
        bundle: str | Path | Bundle | None = None,
        *,
        backend: BackendConfig | None = None,
        video: VideoConfig | None = None,
        face_models: str | Path | None = None,
        wrap: Wrap = unwrapped,
    ) -> None:
        self.bundle = (
            bundle if isinstance(bundle, Bundle) else open_bundle(None if bundle is None else Path(bundle))
        )
        config = resolve_backend(backend or BackendConfig())
        half = half_the_cores(config)
        with ExitStack() as stack:
            self.family: Family[Any] = open_family(
                self.bundle, config, stack, None if face_models is None else Path(face_models), wrap
            )
            detector = stack.enter_context(wrap(self.bundle.runner(names.FACE_DETECTOR, half)))
            mesh = stack.enter_context(wrap(self.bundle.runner(names.FACE_MESH, half)))
            self._runners = stack.pop_all()
        # The mesh network confirms every face, so the detector may be lenient.
        self.finder = FaceFinder(FaceDetector(detector, DetectorConfig(score=0.4)), FaceMeshNet(mesh))
        self.canonical = Canonical.from_table(self.bundle.load_table("canonical"))
        self.backend = self.family.backend
        on_gpu = self.family.resident and self.family.accelerated
        self.video = Video(video, accelerated=on_gpu, device=config.device)
        self._drivers = Drivers(self.family, self.finder, self.video)
        self._batch_size: int | None = None  # the one that an earlier animation found

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
        return self.finder.tracker(smooth=smooth, max_faces=max_faces)

    def find_faces(self, rgb: U8, options: AnimateOptions | None = None) -> list[Face]:
        """Faces of one picture that ``options.faces`` selects.

        Args:
            rgb: uint8 ``[H, W, 3]``.

        Raises:
            NoFaceError: there is no face, or none with that index.
        """
        return self.finder.find(rgb, (options or AnimateOptions()).faces)

    def prepare_source(self, frame: U8 | str | Path, options: AnimateOptions | None = None) -> list[Portrait]:
        """Find, cut and measure the faces to animate in a picture (array uint8 ``[H, W, 3]`` RGB or a path).

        Raises:
            MediaError: the file cannot be read.
            NoFaceError: no face was found.
        """
        options = options or AnimateOptions()
        rgb = frame if isinstance(frame, np.ndarray) else read_image(frame)
        return [self.family.prepare(rgb, face.points, options) for face in self.find_faces(rgb, options)]

    def live(
        self,
        source: str | Path | U8,
        options: AnimateOptions | None = None,
        *,
        portraits: Sequence[Portrait] | None = None,
        watch: Stopwatch | None = None,
    ) -> LiveAnimation:
        """A picture to be driven step by step, by frames of a camera or by motion.

        ``portraits`` are its faces where :meth:`prepare_source` has been called already.

        Example:
            >>> live = animator.live("portrait.jpg")                        # doctest: +SKIP
            >>> for seconds, rgb in camera:                                  # doctest: +SKIP
            ...     show(live.step(rgb, seconds).rgb)

        Raises:
            MediaError: the file cannot be read.
            NoFaceError: no face was found.
            ConfigError: an option does not fit the family.
        """
        options = options or AnimateOptions()
        rgb = source if isinstance(source, np.ndarray) else read_image(source)
        if portraits is None:
            portraits = self.prepare_source(rgb, options)
        reader = LiveReader(self.family, self.finder, options)
        return LiveAnimation(reader, LivePuppet(self.family, rgb, portraits, options), watch or Stopwatch())

    # -- drivers ------------------------------------------------------------------------------------

    def open_driver(
        self, driving: Driving, options: AnimateOptions | None = None, watch: Stopwatch | None = None
    ) -> Driver:
        """Look at a driver (clip, picture, template file, template name or template) and make it ready to run.

        ``open_driver(…).recorded()`` reads its motion once; the result drives any number of sources.

        Raises:
            MediaError, NoFaceError, ConfigError: it cannot drive.
        """
        return self._drivers.open(driving, options or AnimateOptions(), watch or Stopwatch())

    def tuner(
        self,
        size: int | None = None,
        *,
        most: int = MAX_BATCH_SIZE,
        hurried: Callable[[], bool] = lambda: False,
    ) -> BatchTuner:
        """How many frames are drawn at once, for :meth:`draw`.

        Args:
            size: frames, 1 to 64 or what the network takes; None = 1 on a CPU, where more are no faster, and on a device what
                proves fastest over the first frames.
            most: bound of what is found.
            hurried: see :class:`BatchTuner`.

        Raises:
            ConfigError: ``size`` is out of range.
        """
        family = self.family
        bound = min(most, family.max_batch or most)
        if size is not None:
            sizes = candidates(size, family.resident, family.max_batch)
        elif self._batch_size is not None:
            sizes = (min(self._batch_size, bound),)
        else:
            sizes = candidates(None, family.resident, bound)
        return BatchTuner(sizes, hurried=hurried)

    # -- whole animations -----------------------------------------------------------------------------

    def animate(
        self,
        source: str | Path | U8,
        driving: Driving | Sequence[Driving],
        options: AnimateOptions | None = None,
        *,
        portraits: Sequence[Portrait] | None = None,
        watch: Stopwatch | None = None,
        pixels: bool = True,
        batch_size: int | None = None,
    ) -> Animation:
        """Animate a source with a driver.

        Args:
            source: path of a picture or clip, or a picture uint8 ``[H, W, 3]`` RGB.
            driving: path of a clip, picture or template (``.npz``, LivePortrait ``.pkl``), the name of a built-in
                template (:data:`lp_edge.runtime.gestures.GESTURES`), a template, an open driver, or None to let only
                ``options.edits`` and ``options.keyframes`` act. A sequence of them: one for each face that
                ``options.faces`` selects, in that order.
            options: see :class:`AnimateOptions`.
            portraits: faces of a picture source where :meth:`prepare_source` has been called already.
            watch: collects the time of each stage.
            pixels: frames carry the driver's pictures. Without them a family that reads a driver as a whole first need not
                decode it twice.

            batch_size: frames that the network draws at once, see :meth:`tuner`.

        Returns:
            An :class:`Animation`; its frames are made while it is iterated.

        Raises:
            MediaError, NoFaceError, ConfigError: before the first frame where that can be known, otherwise from the iteration.
        """
        options, watch = options or AnimateOptions(), watch or Stopwatch()
        tuner = self.tuner(batch_size)
        several: list[Driving] = list(driving) if isinstance(driving, (list, tuple)) else [driving]  # type: ignore[list-item]
        if not several:
            raise ConfigError("no driver", "expected one or more", "pass None to let edits alone act")
        policy = faces_policy(options.faces)
        if not options.paste_back and (policy == "left-right" or (policy != "largest" and len(policy) > 1)):
            raise ConfigError(
                "several faces and no paste-back",
                "expected one face where the crop alone is the result",
                "choose one face, or paste back",
            )
        drivers = [self.open_driver(d, options, watch) for d in several]
        if not isinstance(source, np.ndarray) and sniff_kind(Path(source)) == "video":
            return self._animate_clip(Path(source), drivers, options, watch, pixels, tuner)
        rgb = source if isinstance(source, np.ndarray) else read_image(source)
        faces = list(enumerate(self.prepare_source(rgb, options) if portraits is None else portraits))
        if len(faces) < len(drivers):
            raise too_many_drivers(len(drivers), len(faces))
        cast = Cast(self.family, drivers, options, source_clip=False)
        still = all(d.still for d in drivers)
        fps = next((d.fps for d in drivers if not d.still), drivers[0].fps)

        def shots() -> Generator[Shot, None, None]:
            with closing(_together(drivers, fps, options.length)) as steps:
                for index, (when, together) in enumerate(steps):
                    yield Shot(index, rgb, when, faces, together)
                    if still:
                        return

        size = (rgb.shape[1], rgb.shape[0]) if options.paste_back else (self.family.crop_size(options),) * 2
        counts = [
            None if d.expected is None else round(d.expected * fps / d.fps) for d in drivers if not d.still
        ]
        known = [c for c in counts if c is not None]
        expected = 1 if still else min(known) if known and options.length != "driving" else counts[0]
        return Animation(fps, size, expected, still, self._drawn(cast, shots(), tuner, watch), watch, tuner)

    def _animate_clip(
        self,
        path: Path,
        drivers: list[Driver],
        options: AnimateOptions,
        watch: Stopwatch,
        pixels: bool,
        tuner: BatchTuner,
    ) -> Animation:
        """A clip as source: every frame is a source of its own, the drivers' steps are laid on its times."""
        info = probe(path)
        fps = frame_rate(info)
        still = all(d.still for d in drivers)
        # What holds for as long as it is asked has no length of its own.
        length = "source" if still else options.length
        cast = Cast(self.family, drivers, options, source_clip=True)
        whole = any(self.family.measures_whole_clip(d.kind) for d in drivers)

        def shots() -> Generator[Shot, None, None]:
            index, any_face = 0, False
            shown: Sequence[Driver] = drivers
            if whole:
                cast.record()
                shown = [d.with_pictures() for d in cast.drivers] if pixels else cast.drivers
                frames = self._planned(path, fps, cast, options, length, watch)
            else:
                frames = self._sources(path, fps, options, len(drivers), watch)
            with (
                prefetch(frames, _QUEUE, "source") as sources,
                closing(_together(shown, fps, length)) as steps,
            ):
                for (when, rgb, portraits), (_, together) in _paired(sources, steps, length):
                    any_face = any_face or bool(portraits)
                    if not any_face and when > options.face_timeout:
                        raise _no_source_face(path)
                    yield Shot(index, rgb, Fraction(index) / fps, portraits, together)
                    index += 1
            if not any_face:
                raise _no_source_face(path)

        lengths = [round(d.expected * fps / d.fps) for d in drivers if d.expected is not None and not d.still]
        expected = _expected(info.frames, min(lengths, default=None), length)
        size = (info.width, info.height) if options.paste_back else (self.family.crop_size(options),) * 2
        return Animation(fps, size, expected, False, self._drawn(cast, shots(), tuner, watch), watch, tuner)

    def draw(
        self,
        cast: Cast,
        shots: Generator[Shot, None, None],
        tuner: BatchTuner,
        watch: Stopwatch,
        within: Callable[[Batches], Batches] = lambda batches: batches,
    ) -> Generator[AnimatedFrame, None, None]:
        """Draw shots; where a device draws, batches are begun in a thread of their own and put together in the caller's.

        Args:
            cast: who follows whom.
            shots: what frames are made from; closed at the end.
            tuner: how many are drawn at once, of :meth:`tuner`.
            watch: see :meth:`Cast.begin`.
            within: goes around that thread's work, which gives batches.
        """

        def begun() -> Generator[list[DrawnFrame], None, None]:
            with closing(shots):
                for batch in _batches(shots, tuner):
                    started = time.perf_counter()
                    frames = cast.begin(batch, watch)
                    if tuner.chosen is None and all(frame.faces for frame in frames):
                        for frame in frames:
                            frame.finish()
                        faces = sum(frame.faces for frame in frames) / len(frames)
                        tuner.tell(len(frames), (time.perf_counter() - started) / faces)
                        self._batch_size = tuner.chosen or self._batch_size  # of another one at the same time
                    batch.clear()  # what is under way needs its faces' features no longer
                    yield frames

        # What the host draws is finished when it is begun: a second thread would only take turns with the first.
        batches = prefetch(within(begun()), _BATCHES, "draw") if self.family.resident else begun()
        with closing(batches):
            for frames in batches:
                while frames:  # those that were handed on need not stay until the last of their batch is
                    yield frames.pop(0).finish()

    def _drawn(
        self, cast: Cast, shots: Generator[Shot, None, None], tuner: BatchTuner, watch: Stopwatch
    ) -> Prefetch[AnimatedFrame]:
        return prefetch(self.draw(cast, shots, tuner, watch), _QUEUE, "render")

    def _measures(
        self, path: Path, fps: Fraction, options: AnimateOptions, drivers: int, watch: Stopwatch
    ) -> Generator[tuple[Fraction, U8, list[tuple[int, Any]]], None, None]:
        """Time, picture and measured faces of every frame of a source clip."""
        slots = Slots(options.faces, drivers)
        tracker = self.tracker(smooth=options.smooth, max_faces=slots.max_faces)
        with prefetch(decode(path, fps, watch, self.video), _QUEUE, "decode source") as frames:
            for when, rgb in frames:
                with watch("source"):
                    faces = slots.assign(tracker.update(rgb, float(when)))
                    measures = [
                        (slot, self.family.measure(rgb, f.points, options, clip=True)) for slot, f in faces
                    ]
                yield when, rgb, measures

    def _sources(
        self, path: Path, fps: Fraction, options: AnimateOptions, drivers: int, watch: Stopwatch
    ) -> Generator[tuple[Fraction, U8, list[tuple[int, Portrait]]], None, None]:
        """A source clip in one pass: time, picture and prepared faces."""
        with closing(self._measures(path, fps, options, drivers, watch)) as measured:
            for when, rgb, measures in measured:
                with watch("prepare"):
                    portraits = [
                        (slot, self.family.portrait(rgb, m, options, clip=True)) for slot, m in measures
                    ]
                yield when, rgb, portraits

    def _planned(
        self,
        path: Path,
        fps: Fraction,
        cast: Cast,
        options: AnimateOptions,
        length: str,
        watch: Stopwatch,
    ) -> Generator[tuple[Fraction, U8, list[tuple[int, Portrait]]], None, None]:
        """A source clip in two passes: its motion and the drivers' as a whole, then its frames again."""
        with closing(self._measures(path, fps, options, len(cast.drivers), watch)) as measured:
            measures = [found for _, _, found in measured]
        slots = sorted({slot for found in measures for slot, _ in found})
        for slot in (s for s in slots if cast.driver_of(s) is not None):
            self._plan(slot, measures, fps, cast, length)
        with prefetch(decode(path, fps, watch, self.video), _QUEUE, "decode source again") as frames:
            for (when, rgb), found in zip(frames, measures, strict=True):
                with watch("prepare"):
                    portraits = [
                        (slot, self.family.portrait(rgb, m, options, clip=True)) for slot, m in found
                    ]
                yield when, rgb, portraits

    def _plan(
        self, slot: int, measures: list[list[tuple[int, Any]]], fps: Fraction, cast: Cast, length: str
    ) -> None:
        """Show one follower the motion of its face and of its driver, both held where they are not seen."""
        own = [
            next((self.family.motion_of_measure(m) for s, m in found if s == slot), None)
            for found in measures
        ]
        known = next(m for m in own if m is not None)
        neutral = cast.neutral_of(slot)
        held = neutral = known if neutral is None else neutral
        sources: list[Motion] = []
        driving: list[Motion] = []
        with closing(_together(cast.drivers, fps, length)) as steps:
            for motion, (_, together) in _paired(iter(own), steps, length):
                known = known if motion is None else motion
                moves = cast.motions(slot, together, known)
                held = held if moves is None else moves[0]
                sources.append(known)
                driving.append(held)
        cast.follower(slot).plan(sources, driving, neutral)


def _batches(shots: Iterator[Shot], tuner: BatchTuner) -> Iterator[list[Shot]]:
    """Shots in batches of the tuner's size; what came before an error is drawn before it is raised."""
    error: Exception | None = None
    more = True
    while more:
        batch: list[Shot] = []
        try:
            for shot in islice(shots, tuner.size):
                batch.append(shot)  # noqa: PERF402 - what came before an error counts
            more = bool(batch)
        except Exception as caught:  # noqa: BLE001 - raised below
            error, more = caught, False
        if batch:
            yield batch
    if error is not None:
        raise error


def _together(
    drivers: Sequence[Driver], fps: Fraction, length: str
) -> Generator[tuple[Fraction, list[DriverFrame]], None, None]:
    """Steps of all drivers side by side at one rate; with ``length`` "driving" the first one's length counts.

    Drivers that are still hold their step; when all are, this never ends.
    """
    alone = len(drivers) == 1 and not drivers[0].still and drivers[0].fps == fps
    hold = length == "driving" and not drivers[0].still
    with ExitStack() as stack:
        runs = [
            stack.enter_context(
                prefetch(d.start() if alone else at_rate(d, fps), _QUEUE, f"motion of {d.name}")
            )
            for d in drivers
        ]
        current: list[DriverFrame] = []
        for index, first in enumerate(runs[0]):
            steps = [first]
            for i, run in enumerate(runs[1:], 1):
                step = next(run, None)
                if step is None:
                    if not hold or not current:
                        return
                    step = current[i]
                steps.append(step)
            current = steps
            yield Fraction(index) / fps, steps


def _paired(frames: Iterator[Any], steps: Iterator[Any], length: str) -> Iterator[tuple[Any, Any]]:
    """Source frames beside driver steps; the one that ends first holds its last item where ``length`` says so."""
    missing = object()
    frame, step = next(frames, missing), next(steps, missing)
    while frame is not missing and step is not missing:
        yield frame, step
        next_frame, next_step = next(frames, missing), next(steps, missing)
        ended = {"source": next_frame is missing, "driving": next_step is missing}
        if ended.get(length, ended["source"] or ended["driving"]):
            return
        frame = frame if next_frame is missing else next_frame
        step = step if next_step is missing else next_step


def _expected(source: int | None, driving: int | None, length: str) -> int | None:
    known = {"source": source, "driving": driving}
    if length in known and known[length] is not None:
        return known[length]
    counts = [n for n in (source, driving) if n is not None]
    return min(counts) if counts else None


def _no_source_face(path: Path) -> NoFaceError:
    return NoFaceError(
        f"no face was found in the source clip {path.name}",
        "expected a face of 40 pixels or more",
        "use a clip that shows the face larger or more upright",
    )
