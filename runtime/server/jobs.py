"""Calls that work through a whole driver: ExtractMotion, Render, and what they share with the HTTP front.

::

    upload ─ private file ─ driver ─ motion ─────────────── ExtractedMotion, or a template's bytes
                               └──── motion ─ draw ─ encode ─ AnimatedFrame, or an MP4's bytes

What a client uploads goes to a file of its own in a private folder, bounded while it arrives; only lp-edge's own readers open it,
and it is gone with the call. Pictures are never collected: a frame is made when the one before has been taken, and a client that
reads slowly slows its own call alone. Of a whole clip nothing but motion is kept, and that is bounded too.

All network calls belong to the stream's scope, also those of the thread that reads the driver's motion ahead, so that ending
the call (an error, a cancelled RPC, a closed iterator) stops it within one frame, or one batch of frames where a device draws
(:meth:`~lp_edge.runtime.animator.Animator.draw`): there two batches are under way at most.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from io import FileIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from lp_edge.errors import (
    ConfigError,
    LimitError,
    MediaError,
    NoFaceError,
    OutputError,
    ProtocolError,
)
from lp_edge.proto.v1 import animation_pb2, common_pb2, portraits_pb2
from lp_edge.runtime.cast import Cast, Shot
from lp_edge.runtime.driver import Driver, DriverFrame
from lp_edge.runtime.family import Portrait
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.image import cannot_write, check_size, picture_header, read_bytes
from lp_edge.runtime.live import LiveReader
from lp_edge.runtime.media_read import VideoReader, sniff_kind
from lp_edge.runtime.media_write import FrameWriter, open_writer
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.pipeline import prefetch
from lp_edge.runtime.server.codec import (
    OutputSettings,
    PictureEncoder,
    decode_image,
    encode_frame,
    limiting_pixels,
    output_settings,
)
from lp_edge.runtime.server.config import Limits
from lp_edge.runtime.server.core import Core, Stream, count_frame
from lp_edge.runtime.server.portraits import memory_of
from lp_edge.runtime.server.stream import FrameWatch
from lp_edge.runtime.server.wire import (
    FrameOrder,
    animate_options,
    choice,
    face_state,
    frame_timings,
    motion_to_message,
    portrait_options_message,
)
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.runtime.templates import BROKEN_ARCHIVE, MAX_FRAMES, MotionTemplate, save_template

__all__ = [
    "CHUNK_BYTES",
    "Pace",
    "RenderedFrame",
    "Source",
    "Upload",
    "builtin",
    "check_clip",
    "extract_motion",
    "file_chunks",
    "load_upload",
    "open_upload",
    "render",
    "render_frames",
    "render_mp4",
]

T = TypeVar("T")
U8 = npt.NDArray[np.uint8]

CHUNK_BYTES = 256 << 10
"""Bytes of a file that one message carries."""

_CLOSED_S = 0.02
_PROGRESS_S = 0.2
_ENCODER_THREADS = 2  # the cores belong to all streams
_PICTURES = ("jpeg", "png", "webp")
_ARCHIVE_END, _ARCHIVE_TAIL, _ARCHIVE_LIST = b"PK\5\6", (1 << 16) + 42, 1 << 16
_SEEN = ("tracked", "reacquired")


# -- files ---------------------------------------------------------------------------------------------------


class Upload:
    """A client's file while its call lasts: in a private folder, bounded, removed by the end of the ``with`` block.

    Args:
        limit: most bytes that are taken.
        name: what the limit is called.

    Attributes:
        path: the file; its name tells nothing about the content.
        size: bytes so far.

    Example:
        >>> with Upload(1 << 20) as upload:
        ...     upload.write(b"bytes")
        ...     upload.finish().read_bytes()
        b'bytes'
    """

    def __init__(self, limit: int, name: str = "max_upload_bytes") -> None:
        self._limit, self._name, self.size = limit, name, 0
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="lp-edge-"))  # mode 0700
        except OSError as error:
            raise self._failed(error) from error
        self.path = self._folder / "upload"
        self._file: Any = None

    def write(self, data: bytes) -> None:
        """Append bytes; blocks.

        Raises:
            LimitError: there are more than the limit.
            OutputError: the disk takes no more.
        """
        if self.size + len(data) > self._limit:
            raise LimitError(
                f"an upload of more than {self._limit} bytes",
                f"expected at most {self._name}",
                "send a smaller file",
            )
        try:
            if self._file is None:
                self._file = self.path.open("xb")
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error
        self.size += len(data)

    def finish(self) -> Path:
        """The path of the whole file; blocks.

        Raises:
            MediaError: nothing came.
            OutputError: the disk takes no more.
        """
        if self._file is None or not self.size:
            raise MediaError("an upload of 0 bytes", "expected a file", "send its bytes before closing")
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error
        return self.path

    def beside(self, name: str) -> Path:
        """Where another file of the call may be made; removed with the upload."""
        return self._folder / name

    @contextmanager
    def anonymous(self) -> Iterator[None]:
        """Errors of the block name the upload, not where the server keeps it."""
        try:
            yield
        except (ConfigError, MediaError, NoFaceError, OutputError) as error:
            parts = (error.got, error.expected, error.remedy)
            raise type(error)(*(part.replace(f"{self._folder}/", "the ") for part in parts)) from error

    def __enter__(self) -> Upload:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk; the file goes anyway
                self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _failed(error: OSError) -> OutputError:
        told = cannot_write(Path("the upload"), error)
        return OutputError(told.got, told.expected, "free space in the server's folder for temporary files")


async def file_chunks(core: Core, path: Path) -> AsyncGenerator[bytes, None]:
    """The bytes of a file in pieces of :data:`CHUNK_BYTES`."""
    with await core.codec(FileIO, path) as file:
        while data := await core.codec(file.read, CHUNK_BYTES):
            yield data


@limiting_pixels()
def check_clip(path: Path, limits: Limits) -> Literal["image", "video"]:
    """Refuse an uploaded driver before it is decoded.

    Raises:
        MediaError: it is neither a clip nor a JPEG, PNG or WebP, or it is broken.
        LimitError: a frame has more than ``max_pixels``, or a picture's file is larger than a message may be.
    """
    kind = sniff_kind(path)
    if kind == "template":
        raise MediaError(
            "the upload is a motion template", "expected a clip or a picture", "send it as a template"
        )
    if kind == "video":
        with VideoReader(path, max_pixels=limits.max_pixels):
            return kind
    if (size := path.stat().st_size) > limits.max_message_bytes:
        raise LimitError(
            f"a picture of {size} bytes",
            f"expected at most {limits.max_message_bytes} (max_message_bytes)",
            "scale it down first",
        )
    header = picture_header(read_bytes(path))
    if header is None or header.format not in _PICTURES:
        raise MediaError(
            f"a picture in the format {header.format if header else 'unknown'}",
            f"expected one of {', '.join(_PICTURES)}",
            "convert it to PNG",
        )
    check_size("the upload", header.width, header.height, max_pixels=limits.max_pixels)
    return "image"


def load_upload(stream: Stream, upload: Upload, limits: Limits) -> MotionTemplate:
    """An uploaded template as motion of the bundle's family; blocks.

    Raises:
        MediaError: it is none, or broken.
        ConfigError: it is of another family and cannot be converted.
        LimitError: it is larger than an upload may be when unpacked.
    """
    with upload.anonymous():
        _check_archive(upload.path, limits.max_upload_bytes)
        return stream.device.animator.family.load_template(upload.path)


def _check_archive(path: Path, limit: int) -> None:
    """Refuse an archive whose list of contents, or whose contents unpacked, take more memory than a template needs.

    The list's size stands in the last record of a file (APPNOTE.TXT 4.3.16), where :mod:`zipfile` looks for it too.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return  # a pickle; its reader counts what it builds
        file.seek(max(0, path.stat().st_size - _ARCHIVE_TAIL))
        tail = file.read()
    at = len(tail) - 22
    if not (tail[at : at + 4] == _ARCHIVE_END and tail[-2:] == b"\0\0"):
        at = tail.rfind(_ARCHIVE_END)
    listed = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if listed > _ARCHIVE_LIST or tail[max(at - 20, 0) : at][:4] == b"PK\6\7":
        raise MediaError(
            f"an archive whose list of contents takes {listed} bytes",
            "expected a motion template, which holds seven arrays",
            "make the template again with lp-edge",
        )
    with suppress(*BROKEN_ARCHIVE), zipfile.ZipFile(path) as archive:  # what is broken, its reader tells
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > limit:
            raise LimitError(
                f"a template of {unpacked} bytes unpacked",
                f"expected at most {limit} (max_upload_bytes)",
                "cut it into parts",
            )


def open_upload(stream: Stream, upload: Upload, limits: Limits, kind: str) -> Path | MotionTemplate:
    """An uploaded driver as :func:`render_frames` takes it; blocks.

    Args:
        kind: ``template``, ``clip`` (or picture), or ``any`` of them: then the content tells.

    Raises:
        as :func:`check_clip` and :func:`load_upload`.
    """
    with upload.anonymous():
        if kind == "template" or (kind == "any" and sniff_kind(upload.path) == "template"):
            return load_upload(stream, upload, limits)
        check_clip(upload.path, limits)
        return upload.path


def builtin(stream: Stream, name: str) -> MotionTemplate:
    """The built-in template of that name for the bundle's family; never a file.

    Raises:
        ConfigError: there is none of that name.
    """
    animator = stream.device.animator
    family = animator.family.name
    # Names are short; a longer text is not repeated in the message.
    return builtin_template(
        name[:64], family=family, canonical=animator.canonical if family == "mesh" else None
    )


# -- drivers -------------------------------------------------------------------------------------------------


def _scoped(stream: Stream, items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items; network calls on the way belong to the stream, whatever thread asks for them."""
    with closing(items):
        while True:
            # For each step anew: a scope that is held while nobody computes would let batches wait for it.
            with stream.device.worker.scope(stream.scope):
                item = next(items, None)
            if item is None:
                return
            yield item


def _open(stream: Stream, driving: Path | MotionTemplate, options: AnimateOptions) -> Driver:
    """A driver with its neutral motion; in a thread that belongs to the stream's scope."""
    animator = stream.device.animator
    if isinstance(driving, MotionTemplate):
        return animator.open_driver(driving, options)
    # Drivers look for a clip's neutral frame in a thread outside of the scope, which nothing could cancel; here it is in it.
    driver = animator.open_driver(driving, replace(options, neutral=0))
    if not options.neutral or driver.still:
        return driver
    with closing(driver.start()) as steps:
        step = next(islice(steps, options.neutral, None), None)
    if step is None:
        raise _beyond(options.neutral, driver.expected)
    if step.state not in _SEEN:
        raise _hidden(options.neutral)
    return replace(driver, neutral=step.motion)


def _beyond(index: int, frames: int | None) -> ConfigError:
    return ConfigError(
        f"neutral frame {index}",
        "expected a frame of the driver" + (f", which has {frames}" if frames else ""),
        "choose a smaller neutral_frame, counted from 0",
    )


def _hidden(index: int) -> NoFaceError:
    return NoFaceError(
        f"frame {index} of the driver shows no face",
        "expected a face in the neutral frame",
        "choose another neutral_frame",
    )


# -- rendering -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What is animated.

    Attributes:
        rgb: uint8 ``[H, W, 3]``.
        prepare: gives its faces, ready for the stream's device; called in a thread that belongs to the stream.
    """

    rgb: U8
    prepare: Callable[[], Sequence[Portrait]]


@dataclass(frozen=True)
class RenderedFrame:
    """A frame of a rendering.

    Attributes:
        index: 0, 1, 2, …
        rgb: uint8 ``[H, W, 3]``.
        step: the driver's step that it shows, without picture.
        watch: its stages from drawing on.
        fps: frames a second of the rendering, exact.
        expected: estimated number of frames, None when unknown.
    """

    index: int
    rgb: U8
    step: DriverFrame
    watch: FrameWatch
    fps: Fraction
    expected: int | None


def _frames(
    stream: Stream, source: Source, driving: Path | MotionTemplate, options: AnimateOptions
) -> Generator[RenderedFrame, None, None]:
    """Frames of a rendering; the motion of the next ones is read in a thread of its own meanwhile.

    Where a device draws, it draws several at once, but while somebody animates live: every frame of theirs would wait for all of
    these.
    """
    device, animator = stream.device, stream.device.animator
    portraits = list(enumerate(source.prepare()))
    if not options.paste_back and len(portraits) > 1:
        raise ConfigError(
            f"{len(portraits)} faces and no paste-back",
            "expected one face where the crop alone is the result",
            "paste back, or register the portrait with one face",
        )
    driver = _open(stream, driving, options)
    cast = Cast(animator.family, [driver], options, source_clip=False)
    tuner = animator.tuner(most=device.max_batch, hurried=lambda: device.live > 0)
    watches: deque[FrameWatch] = deque()  # of the frames that are being drawn

    def shots() -> Generator[Shot, None, None]:
        with prefetch(_scoped(stream, driver.start()), 2, f"motion {stream.id}") as steps:
            for index, step in enumerate(steps):
                watches.append(FrameWatch())
                plain = replace(step, rgb=None)
                yield Shot(index, source.rgb, step.time, portraits, [plain], watches[-1])
                if driver.still:
                    return

    drawn = animator.draw(cast, shots(), tuner, Stopwatch(), lambda batches: _scoped(stream, batches))
    with closing(drawn):
        for frame in drawn:
            yield RenderedFrame(
                frame.index, frame.rgb, frame.driver, watches.popleft(), driver.fps, driver.expected
            )


def render_frames(
    core: Core, stream: Stream, source: Source, driving: Path | MotionTemplate, options: AnimateOptions
) -> AsyncGenerator[RenderedFrame, None]:
    """Animate a picture with a whole driver; a frame is drawn when it is asked for, on a device one or two batches before.

    Args:
        core: threads.
        stream: whose work it is; closing the iterator cancels it.
        source: what is animated.
        driving: a clip or picture that :func:`check_clip` has passed, or a template.
        options: ``neutral`` counts frames of the driver.

    Raises:
        MediaError, NoFaceError, ConfigError: the driver cannot drive.
        Interrupted: the stream was cancelled.
    """
    return core.iterate(stream, lambda: _frames(stream, source, driving, options))


def render_mp4(
    core: Core,
    stream: Stream,
    source: Source,
    driving: Path | MotionTemplate,
    options: AnimateOptions,
    output: OutputSettings,
    path: Path,
    *,
    sound: bool = True,
) -> AsyncGenerator[RenderedFrame, None]:
    """As :func:`render_frames`, into an MP4 with the driving clip's sound; the file is whole when the last frame is given.

    Args:
        core, stream, source, driving, options: as there.
        output: ``width``, ``height`` and ``crf`` count; the frames that are given have that size.
        path: new file whose name ends in ``.mp4``, in a folder that is the call's own.
        sound: whether the clip's sound is wanted.

    Raises:
        as :func:`render_frames`, and
        LimitError: the file grows beyond ``max_upload_bytes``.
        OutputError: it cannot be written.
    """
    limit = core.config.limits.max_upload_bytes
    plain = replace(output, encoding="raw", pixel_format="rgb24")

    def written() -> Generator[RenderedFrame, None, None]:
        heard = sound and isinstance(driving, Path) and sniff_kind(driving) == "video"
        with ExitStack() as stack:
            frames = stack.enter_context(closing(_frames(stream, source, driving, options)))
            encoder = stack.enter_context(closing(PictureEncoder(plain)))
            writer: FrameWriter | None = None
            last: RenderedFrame | None = None
            for frame in frames:
                if last is not None:
                    yield last
                with frame.watch("resize"):
                    rgb = encoder.pixels(frame.rgb)
                if writer is None:
                    writer = stack.enter_context(
                        open_writer(
                            path,
                            (rgb.shape[1], rgb.shape[0]),
                            frame.fps,
                            audio_from=driving if isinstance(driving, Path) and heard else None,
                            crf=output.crf,
                            threads=_ENCODER_THREADS,
                        )
                    )
                with frame.watch("encode"):
                    writer.write(rgb)
                _check_growth(path, limit)
                last = replace(frame, rgb=rgb)
            if writer is None or last is None:
                raise MediaError(
                    "there is no frame to write", "expected a driver with at least one", "use another"
                )
            writer.close()
            _check_growth(path, limit)
            yield last

    return core.iterate(stream, written)


def _check_growth(path: Path, limit: int) -> None:
    """Bound the file, which the writer fills under a temporary name of the same suffix."""
    if sum(part.stat().st_size for part in path.parent.glob(f"*{path.suffix}")) > limit:
        raise LimitError(
            f"a result of more than {limit} bytes",
            "expected at most max_upload_bytes",
            "render a shorter driver, a smaller size, or single frames",
        )


class Pace:
    """Says when progress is told: at once, then five times a second at most."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self) -> bool:
        """Whether it is time to tell; the next time then comes 0.2 s later."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _PROGRESS_S
        return True


# -- messages ------------------------------------------------------------------------------------------------


async def _messages(core: Core, stream: Stream, requests: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The client's messages; one that does not come in time ends the call."""
    while (message := await core.next_message(stream, requests)) is not None:
        yield message


async def _first(messages: AsyncIterator[Any], call: str) -> Any:
    """The configuration, which comes first."""
    async for message in messages:
        if (found := message.WhichOneof("message")) == "config":
            return message.config
        raise _not_first(f"begins with {found or 'an empty message'}", call)
    raise _not_first("ended without a message", call)


def _not_first(what: str, call: str) -> ProtocolError:
    return ProtocolError(
        f"the stream {what}", "expected its configuration first", f"send a message with {call}Config first"
    )


def _only(message: Any, wanted: str) -> Any:
    """What a later message holds, which must be ``wanted``."""
    if (found := message.WhichOneof("message")) != wanted:
        raise ProtocolError(
            "a second configuration" if found == "config" else f"a message with {found or 'nothing'}",
            f"expected {wanted}, as the configuration says",
            "send the configuration once, and then only what it announces",
        )
    return getattr(message, wanted)


async def _receive(core: Core, upload: Upload, messages: AsyncIterator[Any], field: str) -> None:
    """Fill an upload until the client closes its sending side."""
    async for message in messages:
        await core.codec(upload.write, _only(message, field))
    # A client that was killed looks for a moment as if it had closed its side: the cancellation comes just after.
    await asyncio.sleep(_CLOSED_S)
    await core.codec(upload.finish)


def _progress(done: int, expected: int | None) -> common_pb2.Progress:
    return common_pb2.Progress(frames_done=done, frames_total=max(expected or 0, done if expected else 0))


def _microseconds(when: Fraction) -> int:
    return round(when * 1_000_000)


# -- ExtractMotion -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A step of a driver as it is answered; of a clip or picture with its driver."""

    sequence: int
    timestamp_us: int
    step: DriverFrame
    driver: Driver | None = None


async def extract_motion(
    core: Core, stream: Stream, requests: AsyncIterator[animation_pb2.ExtractMotionRequest]
) -> AsyncGenerator[animation_pb2.ExtractMotionResponse, None]:
    """Answer ExtractMotion; ``animation.proto`` says what is read and answered.

    Raises:
        LpEdgeError: what ends the call: ProtocolError, ConfigError, MediaError, NoFaceError, LimitError, DeadlineError, Interrupted.
    """
    messages = _messages(core, stream, requests)
    config = await _first(messages, "ExtractMotion")
    from_clip = choice("input", config.input, _INPUTS) == "clip"
    to_template = choice("output", config.output, _OUTPUTS) == "template"
    options = animate_options(
        portraits_pb2.PortraitOptions(), config.options, stream.device.animator.family.name
    )
    space = core.space
    layout = space.resolve(config.layout)
    with Upload(core.config.limits.max_upload_bytes) as upload:
        reads = (
            _clip_motion(core, stream, messages, upload, options)
            if from_clip
            else _frame_motion(core, stream, messages, options)
        )
        async with aclosing(reads):
            if not to_template:
                async for read in reads:
                    message = animation_pb2.ExtractedMotion(
                        sequence=read.sequence,
                        timestamp_us=read.timestamp_us,
                        face_state=face_state(read.step.state),  # type: ignore[arg-type]
                    )
                    if read.step.motion is not None:
                        message.motion.CopyFrom(motion_to_message(read.step.motion, space, layout))
                    yield animation_pb2.ExtractMotionResponse(motion=message)
                return
            recorder = _Recorder(stream, config, core.config.limits.max_upload_bytes)
            pace = Pace()
            expected = None
            async for read in reads:
                recorder.add(read)
                expected = read.driver.expected if read.driver is not None else None
                if pace.due():
                    yield animation_pb2.ExtractMotionResponse(progress=_progress(recorder.frames, expected))
        path = upload.beside("motion.npz")
        with upload.anonymous():
            await core.codec(recorder.save, path)
        yield animation_pb2.ExtractMotionResponse(
            progress=common_pb2.Progress(frames_done=recorder.frames, frames_total=recorder.frames)
        )
        async with aclosing(file_chunks(core, path)) as chunks:
            async for chunk in chunks:
                yield animation_pb2.ExtractMotionResponse(template_chunk=chunk)


_INPUTS: Mapping[int, str] = {
    animation_pb2.MOTION_INPUT_UNSPECIFIED: "frames",
    animation_pb2.MOTION_INPUT_FRAMES: "frames",
    animation_pb2.MOTION_INPUT_CLIP: "clip",
}
_OUTPUTS: Mapping[int, str] = {
    animation_pb2.MOTION_OUTPUT_UNSPECIFIED: "motions",
    animation_pb2.MOTION_OUTPUT_MOTIONS: "motions",
    animation_pb2.MOTION_OUTPUT_TEMPLATE: "template",
}


async def _frame_motion(
    core: Core,
    stream: Stream,
    messages: AsyncIterator[animation_pb2.ExtractMotionRequest],
    options: AnimateOptions,
) -> AsyncGenerator[_Read, None]:
    """Motion of single frames; the next message is read when a frame has been answered."""
    animator = stream.device.animator
    reader = LiveReader(animator.family, animator.finder, options)
    order = FrameOrder()
    async for message in messages:
        frame: animation_pb2.DrivingFrame = _only(message, "frame")
        order.follow(frame)
        if frame.WhichOneof("driver") != "image":
            raise ProtocolError(
                f"frame {frame.sequence} has no picture", "expected one: its motion is asked for", "send it"
            )
        watch = FrameWatch()
        with watch("decode"):
            rgb = await core.codec(decode_image, frame.image, core.config.limits, None)
        step = await core.compute(stream, reader.read, rgb, frame.timestamp_us / 1e6, watch)
        yield _Read(frame.sequence, frame.timestamp_us, replace(step, rgb=None))
        count_frame(core, stream, watch.by_stage(), watch.elapsed)


async def _clip_motion(
    core: Core,
    stream: Stream,
    messages: AsyncIterator[animation_pb2.ExtractMotionRequest],
    upload: Upload,
    options: AnimateOptions,
) -> AsyncGenerator[_Read, None]:
    """Motion of an uploaded clip or picture."""
    await _receive(core, upload, messages, "clip_chunk")

    def read() -> Generator[_Read, None, None]:
        with upload.anonymous():
            check_clip(upload.path, core.config.limits)
            driver = _open(stream, upload.path, options)
            with closing(driver.start()) as steps:
                for index, step in enumerate(steps):
                    yield _Read(index + 1, _microseconds(step.time), replace(step, rgb=None), driver)

    began = time.perf_counter()
    async with aclosing(core.iterate(stream, read)) as reads:
        async for item in reads:
            took = time.perf_counter() - began
            yield item
            count_frame(core, stream, {}, took)
            began = time.perf_counter()


class _Recorder:
    """Collects motion and makes a template of it.

    Frames before the first face get the first motion known; a picture becomes two frames: its neutral face, and itself.
    """

    def __init__(self, stream: Stream, config: animation_pb2.ExtractMotionConfig, limit: int) -> None:
        self._family, self._limit, self._neutral = stream.device.animator.family, limit, config.neutral_frame
        self._fps = Fraction(25)
        if config.HasField("frame_rate"):
            rate = config.frame_rate
            if (
                rate.denominator == 0
                or not Fraction(1, 10) <= Fraction(rate.numerator, rate.denominator) <= 1000
            ):
                raise ConfigError(
                    f"frame_rate is {rate.numerator}/{rate.denominator}",
                    "expected 1/10 to 1000",
                    "correct it",
                )
            self._fps = Fraction(rate.numerator, rate.denominator)
        self._motions: list[Motion] = []
        self._waiting = self._bytes = 0
        self._driver: Driver | None = None
        self._neutral_state = ""

    @property
    def frames(self) -> int:
        """Frames so far."""
        return len(self._motions) + self._waiting

    def add(self, read: _Read) -> None:
        """Take the motion of the next frame.

        Raises:
            LimitError: there is more than a template holds, or an upload may be.
        """
        if self.frames == self._neutral:
            self._neutral_state = read.step.state
        self._driver = read.driver
        motion = read.step.motion
        if motion is None:
            self._waiting += 1
        else:
            self._motions += [motion] * (self._waiting + 1)
            self._bytes += memory_of(motion)  # one that is held counts again: stacked, it takes its own room
            self._waiting = 0
        if self.frames > MAX_FRAMES or self._bytes > self._limit:
            raise LimitError(
                f"motion of more than {self.frames - 1} frames",
                f"expected at most {MAX_FRAMES}, or {self._limit} bytes (max_upload_bytes)",
                "cut the driver into parts",
            )

    def save(self, path: Path) -> None:
        """Write the template; blocks.

        Raises:
            NoFaceError: no frame showed a face, or not the neutral one.
            ConfigError: there is no such neutral frame.
            OutputError: it cannot be written.
        """
        if not self._motions:
            raise NoFaceError(
                f"no face in any of {self.frames} frames", "expected a face of 40 pixels or more", "show one"
            )
        if self._neutral >= self.frames:
            raise _beyond(self._neutral, self.frames)
        if self._neutral and self._neutral_state not in _SEEN:
            raise _hidden(self._neutral)
        motions, fps = self._motions, self._fps
        if self._driver is not None:
            fps = self._driver.fps
            if self._driver.still:
                motions = [self._family.picture_neutral(motions[0]), motions[0]]
        save_template(
            MotionTemplate(fps, self._family.name, Motion.stack(motions), self._neutral, "lp-edge server"),
            path,
        )


# -- Render --------------------------------------------------------------------------------------------------


async def render(
    core: Core, stream: Stream, requests: AsyncIterator[animation_pb2.RenderRequest]
) -> AsyncGenerator[animation_pb2.RenderResponse, None]:
    """Answer Render; ``animation.proto`` says what is read and answered.

    Raises:
        LpEdgeError: what ends the call: NotFoundError, ProtocolError, ConfigError, MediaError, NoFaceError, LimitError,
            DeadlineError, OutputError, Interrupted.
    """
    messages = _messages(core, stream, requests)
    config = await _first(messages, "Render")
    limits, device = core.config.limits, stream.device
    output = output_settings(config.output, max_pixels=limits.max_pixels)
    to_mp4 = choice("result", config.result, _RESULTS) == "mp4"
    if output.encoding == "shared_memory":
        raise ConfigError(
            "frames of Render in shared memory",
            "expected an encoding that travels in messages",
            "choose another encoding, or use Animate",
        )
    with core.store.pinned(config.portrait_id) as portrait, Upload(limits.max_upload_bytes) as upload:
        stream.log.portraits = 1
        options = replace(
            animate_options(
                portrait_options_message(portrait.options), config.options, device.animator.family.name
            ),
            neutral=config.neutral_frame,
        )
        driving = await _driving(core, stream, config, messages, upload)
        source = Source(portrait.rgb, lambda: portrait.prepared(device.index))
        with upload.anonymous():
            answers = (
                _answer_mp4(core, stream, source, driving, options, output, upload.beside("result.mp4"))
                if to_mp4
                else _answer_frames(core, stream, source, driving, options, output)
            )
            async with aclosing(answers):
                async for answer in answers:
                    yield answer


async def _driving(
    core: Core,
    stream: Stream,
    config: animation_pb2.RenderConfig,
    messages: AsyncIterator[animation_pb2.RenderRequest],
    upload: Upload,
) -> Path | MotionTemplate:
    """The driver that the configuration names, or that the following messages carry."""
    if config.WhichOneof("driving") == "built_in":
        return await core.codec(builtin, stream, config.built_in)
    kind = choice("upload", config.upload, _UPLOADS)
    if kind == "nothing":
        raise ProtocolError(
            "a rendering without a driver",
            "expected built_in, or upload and then upload_chunk messages",
            "name a built-in template, or send a template or a clip",
        )
    await _receive(core, upload, messages, "upload_chunk")
    return await core.codec(open_upload, stream, upload, core.config.limits, kind)


_RESULTS: Mapping[int, str] = {
    animation_pb2.RENDER_OUTPUT_UNSPECIFIED: "frames",
    animation_pb2.RENDER_OUTPUT_FRAMES: "frames",
    animation_pb2.RENDER_OUTPUT_MP4: "mp4",
}
_UPLOADS: Mapping[int, str] = {
    animation_pb2.UPLOAD_KIND_UNSPECIFIED: "nothing",
    animation_pb2.UPLOAD_KIND_TEMPLATE: "template",
    animation_pb2.UPLOAD_KIND_CLIP: "clip",
}


async def _answer_frames(
    core: Core,
    stream: Stream,
    source: Source,
    driving: Path | MotionTemplate,
    options: AnimateOptions,
    output: OutputSettings,
) -> AsyncGenerator[animation_pb2.RenderResponse, None]:
    finished: animation_pb2.RenderFinished | None = None
    with closing(PictureEncoder(output)) as encoder:
        async with aclosing(_ahead(render_frames(core, stream, source, driving, options))) as frames:
            async for frame in frames:
                message = animation_pb2.AnimatedFrame(
                    sequence=frame.index + 1,
                    timestamp_us=_microseconds(frame.step.time),
                    face_state=face_state(frame.step.state),  # type: ignore[arg-type]
                )
                if output.encoding != "none":
                    with frame.watch("encode"):
                        limit = core.config.limits.max_message_bytes
                        pictures = await core.compute(stream, encode_frame, [encoder], [frame.rgb], limit)
                    message.pictures.extend(pictures)
                message.timings.CopyFrom(
                    frame_timings(frame.watch.received_ns, frame.watch.stages, frame.watch.elapsed)
                )
                yield animation_pb2.RenderResponse(frame=message)
                finished = _finished(frame, *output.size(frame.rgb.shape[1], frame.rgb.shape[0]))
                count_frame(core, stream, frame.watch.by_stage(), frame.watch.elapsed)
    yield animation_pb2.RenderResponse(finished=finished)


async def _ahead(items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same items; the next one is made while the one before is encoded and taken."""
    making = asyncio.ensure_future(items.__anext__())
    try:
        while True:
            try:
                item = await making
            except StopAsyncIteration:
                return
            making = asyncio.ensure_future(items.__anext__())
            yield item
    finally:
        making.cancel()
        await asyncio.wait([making])
        if not making.cancelled():
            making.exception()  # seen
        await items.aclose()


async def _answer_mp4(
    core: Core,
    stream: Stream,
    source: Source,
    driving: Path | MotionTemplate,
    options: AnimateOptions,
    output: OutputSettings,
    path: Path,
) -> AsyncGenerator[animation_pb2.RenderResponse, None]:
    finished = animation_pb2.RenderFinished()
    pace = Pace()
    async with aclosing(render_mp4(core, stream, source, driving, options, output, path)) as frames:
        async for frame in frames:
            finished = _finished(frame, frame.rgb.shape[1], frame.rgb.shape[0])
            count_frame(core, stream, frame.watch.by_stage(), frame.watch.elapsed)
            if pace.due():
                yield animation_pb2.RenderResponse(progress=_progress(finished.frames, frame.expected))
    yield animation_pb2.RenderResponse(
        progress=common_pb2.Progress(frames_done=finished.frames, frames_total=finished.frames)
    )
    async with aclosing(file_chunks(core, path)) as chunks:
        async for chunk in chunks:
            yield animation_pb2.RenderResponse(file_chunk=chunk)
    yield animation_pb2.RenderResponse(finished=finished)


def _finished(frame: RenderedFrame, width: int, height: int) -> animation_pb2.RenderFinished:
    """What is said at the end when ``frame`` was the last one."""
    rate = common_pb2.FrameRate(numerator=frame.fps.numerator, denominator=frame.fps.denominator)
    return animation_pb2.RenderFinished(frames=frame.index + 1, frame_rate=rate, width=width, height=height)
