"""ExtractMotion and Render without their transport: the messages out, and what the messages in amount to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lp_edge.client._channel import CHUNK_BYTES
from lp_edge.client._messages import (
    MotionCodec,
    PictureReader,
    animation_options,
    check_sending,
    extracted_motion,
    frame_from,
    image_message,
    microseconds,
    output_options,
    progress_from,
    rendered_clip,
)
from lp_edge.client.types import ExtractedMotion, Frame, Output, Progress, RenderedClip
from lp_edge.errors import ConfigError, MediaError
from lp_edge.proto.v1 import animation_pb2
from lp_edge.runtime.checks import within

if TYPE_CHECKING:
    from lp_edge.runtime.options import AnimateOptions

__all__ = [
    "Download",
    "Extraction",
    "Rendering",
    "check_clip_path",
    "check_template_path",
    "chunks",
    "is_clip",
    "timed",
]

U8 = npt.NDArray[np.uint8]
OnProgress = Callable[[Progress], None]


def is_clip(source: object) -> bool:
    """Whether the source is a file, not frames; MediaError for a file that cannot be read."""
    if not isinstance(source, (str, Path)):
        return False
    from lp_edge.runtime.image import check_input_file

    check_input_file(Path(source))
    return True


def timed(item: Any) -> tuple[float | None, Any]:
    """Time and frame of an item that is either ``(seconds, frame)`` or a frame alone."""
    if isinstance(item, tuple):
        return item[0], item[1]
    return None, item


def chunks(path: Path) -> Iterator[bytes]:
    """A file in pieces; MediaError when it cannot be read."""
    try:
        with path.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                yield piece
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror})", "expected a file", "check it"
        ) from error


class Download:
    """A file that comes in pieces and appears whole or not at all; a context manager.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        from lp_edge.runtime.image import create_beside

        self.path = Path(path)
        self._part = create_beside(self.path)
        self._file: IO[bytes] = self._part.open("wb")

    def write(self, piece: bytes) -> None:
        """Append a piece."""
        from lp_edge.runtime.image import cannot_write

        try:
            self._file.write(piece)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def publish(self) -> Path:
        """All has come: give the file its name."""
        from lp_edge.runtime.image import cannot_write, publish

        try:
            self._file.close()
            publish(self._part, self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        return self.path

    def __enter__(self) -> Download:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Extraction:
    """An ExtractMotion call.

    Args:
        clip: whether a file is sent, not frames.
        template: whether a template is wanted, not motions.
        options: how motion is read.
        frame_rate: of frames that carry no time, and of a template made of frames.
        neutral: frame that stands for "no motion" in a template.
        send_as, quality: how arrays travel.

    Raises:
        ConfigError: an option is not for this call, or out of range.
    """

    clip: bool
    template: bool
    options: AnimateOptions | None
    frame_rate: Fraction
    neutral: int
    send_as: str
    quality: int

    def __post_init__(self) -> None:
        check_sending(self.send_as, self.quality)
        within("frame_rate", float(self.frame_rate), 0.1, 1000)
        within("neutral", self.neutral, 0, 10**7)
        animation_options(self.options, neutral=True)

    def config(self) -> animation_pb2.ExtractMotionRequest:
        """The first message."""
        config = animation_pb2.ExtractMotionConfig(
            input=animation_pb2.MOTION_INPUT_CLIP if self.clip else animation_pb2.MOTION_INPUT_FRAMES,
            output=animation_pb2.MOTION_OUTPUT_TEMPLATE
            if self.template
            else animation_pb2.MOTION_OUTPUT_MOTIONS,
            options=animation_options(self.options, neutral=True),
            neutral_frame=self.neutral,
            layout="EXPRESSION_LAYOUT_KEYPOINTS",
        )
        if not self.clip:
            config.frame_rate.numerator = self.frame_rate.numerator
            config.frame_rate.denominator = self.frame_rate.denominator
        return animation_pb2.ExtractMotionRequest(config=config)

    def frame(
        self, index: int, item: U8 | bytes | tuple[float, U8 | bytes]
    ) -> animation_pb2.ExtractMotionRequest:
        """A frame's message; its time is as given, or follows from the frame rate."""
        seconds, picture = timed(item)
        frame = animation_pb2.DrivingFrame(
            sequence=index + 1,
            timestamp_us=microseconds(float(index / self.frame_rate) if seconds is None else seconds),
            image=image_message(picture, self.send_as, self.quality),
        )
        return animation_pb2.ExtractMotionRequest(frame=frame)

    def requests(
        self, source: str | Path | Iterable[U8 | bytes | tuple[float, U8 | bytes]]
    ) -> Iterator[animation_pb2.ExtractMotionRequest]:
        """All messages."""
        yield self.config()
        if isinstance(source, (str, Path)):
            for piece in chunks(Path(source)):
                yield animation_pb2.ExtractMotionRequest(clip_chunk=piece)
        else:
            for index, item in enumerate(source):
                yield self.frame(index, item)

    @staticmethod
    def motion(response: animation_pb2.ExtractMotionResponse, codec: MotionCodec) -> ExtractedMotion | None:
        """What an answer holds, where it is a motion."""
        return (
            extracted_motion(response.motion, codec) if response.WhichOneof("message") == "motion" else None
        )

    @staticmethod
    def tell(response: animation_pb2.ExtractMotionResponse, progress: OnProgress | None) -> None:
        """Tell progress, where an answer holds it."""
        if progress is not None and response.WhichOneof("message") == "progress":
            progress(progress_from(response.progress))


class Rendering:
    """A Render call.

    Args:
        driving: name of one of the server's templates, or a file: template, clip or picture.
        templates: the server's.
        options: how; ``neutral`` counts for clips.
        output: how frames come back, or of the MP4 size and crf.
        mp4: whether one file is wanted, not frames.

    Raises:
        ConfigError: an option is not for this call.
        MediaError: there is no such file or template.
    """

    def __init__(
        self,
        driving: str | Path,
        templates: Sequence[str],
        options: AnimateOptions | None,
        output: Output,
        *,
        mp4: bool,
    ) -> None:
        self._path: Path | None = Path(driving)
        self._config = animation_pb2.RenderConfig(
            options=animation_options(options, neutral=True),
            result=animation_pb2.RENDER_OUTPUT_MP4 if mp4 else animation_pb2.RENDER_OUTPUT_FRAMES,
            output=output_options(output, "jpeg" if output.encoding == "auto" else output.encoding),
            neutral_frame=0 if options is None else options.neutral,
        )
        exists = os.path.exists(driving)  # never raises, however long a name is
        if not exists and str(driving) in templates:
            self._config.built_in, self._path = str(driving), None
        else:
            from lp_edge.runtime.media_read import sniff_kind

            if not exists:
                raise MediaError(
                    f"no such file or template: {driving}",
                    f"expected a file, or one of {', '.join(templates)}",
                    "check it",
                )
            template = sniff_kind(self._path) == "template"
            self._config.upload = (
                animation_pb2.UPLOAD_KIND_TEMPLATE if template else animation_pb2.UPLOAD_KIND_CLIP
            )
        self._reader = PictureReader()
        self.finished: RenderedClip | None = None

    def requests(self, portrait_id: str) -> Iterator[animation_pb2.RenderRequest]:
        """All messages."""
        self._config.portrait_id = portrait_id
        yield animation_pb2.RenderRequest(config=self._config)
        if self._path is not None:
            for piece in chunks(self._path):
                yield animation_pb2.RenderRequest(upload_chunk=piece)

    def take(
        self, response: animation_pb2.RenderResponse, download: Download | None, progress: OnProgress | None
    ) -> Frame | None:
        """What an answer holds: a frame, a piece of the MP4 (for ``download``), progress, or the end."""
        kind = response.WhichOneof("message")
        if kind == "progress" and progress is not None:
            progress(progress_from(response.progress))
        elif kind == "file_chunk" and download is not None:
            download.write(response.file_chunk)
        elif kind == "finished":
            self.finished = rendered_clip(response.finished, None if download is None else download.path)
        elif kind == "frame":
            message = response.frame
            return frame_from(message, tuple(self._reader.picture(p) for p in message.pictures), None, 0)
        return None

    def end(self) -> RenderedClip:
        """What was rendered; MediaError when the server ended without saying so."""
        if self.finished is None:
            raise MediaError("the server ended the call without a result", "expected one", "try again")
        return self.finished


def check_template_path(path: str | Path) -> Path:
    """ConfigError unless a template may have that name."""
    return _named(Path(path), "a motion template", ".npz")


def check_clip_path(path: str | Path) -> Path:
    """ConfigError unless the server's MP4 may have that name."""
    return _named(Path(path), "an MP4", ".mp4", ".m4v")


def _named(path: Path, what: str, *suffixes: str) -> Path:
    if path.suffix.lower() not in suffixes and not path.is_dir():
        raise ConfigError(
            f"{what} named {path.name[:64]}",
            f"expected a name that ends in {' or '.join(suffixes)}",
            "rename it",
        )
    return path
