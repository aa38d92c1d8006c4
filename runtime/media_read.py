"""Clips in: what a file is, and its frames as uint8 RGB ``[H, W, 3]``, upright, with exact times.

Decoding is PyAV's. Frames are turned and mirrored as the clip's display matrix says, non-square pixels are
made square, transparency is laid over white, and YUV is converted with the clip's own matrix and range
(untagged: BT.709 from 720 lines on, BT.601 below, as players do). One frame is in memory at a time, besides
the few that the decoder's threads hold.

The first frame is always decoded in software. Hardware may take over from there where it gives the same first frame
(:mod:`lp_edge.runtime.hardware_video`); everything after decoding is the same code.

A clip that was cut off is refused before any work is done where the container tells (MP4, MOV, Matroska,
WebM, AVI), otherwise when decoding meets the cut.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import av
import av.container
import av.error
import av.video.reformatter
import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime.image import (
    MAX_SIDE,
    PICTURE_SUFFIXES,
    check_input_file,
    check_size,
    picture_header,
    read_bytes,
)

if TYPE_CHECKING:
    from lp_edge.runtime.hardware_video import Video

__all__ = [
    "CLIP_SUFFIXES",
    "MOST_APART",
    "TEMPLATE_SUFFIXES",
    "Frame",
    "MediaInfo",
    "VideoReader",
    "probe",
    "repacked",
    "resample",
    "sniff_kind",
]

U8 = npt.NDArray[np.uint8]
Kind = Literal["image", "video", "template"]

CLIP_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".wmv", ".3gp",
)  # fmt: skip
"""Suffixes taken for clips when the content does not tell."""
TEMPLATE_SUFFIXES = (".npz", ".pkl")
"""Suffixes of motion templates."""

MAX_CLIP_PIXELS = 40_000_000
"""Most pixels a frame of a clip may have (8K is 33 million)."""
MOST_APART = 2
"""Levels by which a frame that hardware decoded may differ from software's."""
_MIN_SIDE = 16
_FALLBACK_RATE = Fraction(25)
_MAX_RATE = 1000
_MAX_THREADS = 4
# What NVDEC's surfaces hold, and the planes that software decoders give for the same stream.
_REPACKED = {"nv12": "yuv420p", "p010le": "yuv420p10le", "nv16": "yuv422p", "p210le": "yuv422p10le"}
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC

# Formats that hold pictures and sound only: a play list or a concat script would open other files.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,ogg,flv,mpegts,mpeg,asf,yuv4mpegpipe,ivf,h264,hevc,mjpeg,m4v,"
    "mp3,wav,flac,aac,ac3"
)

_log = logging.getLogger("lp_edge")


@dataclass(frozen=True)
class MediaInfo:
    """What a picture or clip is.

    Attributes:
        kind: ``image`` or ``video``.
        width, height: size of its frames in pixels as they are delivered (upright, square pixels).
        fps: average frame rate; None for a picture.
        frames: number of frames where the file states it, else an estimate from duration and rate, else None.
        duration: seconds; None for a picture or where the file does not state it.
        has_audio: whether the clip has a sound track.
        rotation: degrees counter-clockwise by which stored frames are turned: 0, 90, 180 or 270.
    """

    kind: Literal["image", "video"]
    width: int
    height: int
    fps: Fraction | None = None
    frames: int | None = None
    duration: Fraction | None = None
    has_audio: bool = False
    rotation: int = 0


@dataclass(frozen=True)
class Frame:
    """A frame of a clip.

    Attributes:
        index: 0, 1, 2 …
        time: seconds since the first frame, never decreasing.
        rgb: uint8 ``[H, W, 3]``, C-contiguous, the receiver's own; frames repeated by :func:`resample` share it.
        duration: seconds until the next frame is due, as far as the file tells.
    """

    index: int
    time: Fraction
    rgb: U8
    duration: Fraction = Fraction(0)


def sniff_kind(path: str | Path) -> Kind:
    """Whether a file is a picture, a clip or a motion template: by its content, by its suffix where that is silent.

    A GIF with more than one picture counts as a clip.

    Raises:
        MediaError: no such file, a folder, empty, unreadable, or neither content nor suffix are known.
    """
    path = Path(path)
    check_input_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise MediaError(f"{path} cannot be read ({error.strerror})", "expected a readable file") from error
    if head.startswith(b"GIF8"):
        header = picture_header(read_bytes(path))
        return "video" if header is not None and header.frames > 1 else "image"
    if head[:4] == b"RIFF":
        return "image" if head[8:12] == b"WEBP" else "video"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"):
        return "image"
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return "template"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"moof") or head.startswith(
        _CLIP_MAGIC
    ):
        return "video"
    if head.startswith(_PICTURE_MAGIC):
        return "image"
    suffix = path.suffix.lower()
    if suffix in TEMPLATE_SUFFIXES:
        return "template"
    if suffix in PICTURE_SUFFIXES:
        return "image"
    if suffix in CLIP_SUFFIXES:
        return "video"
    raise MediaError(
        f"{path.name} is neither a picture, a clip nor a motion template (it starts with {head[:8]!r})",
        "expected a picture (JPEG, PNG, WebP, BMP, TIFF), a clip (MP4, WebM, GIF …) or a template (.npz, .pkl)",
        "check that it is the right file",
    )


_PICTURE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_CLIP_MAGIC = (
    b"\x1a\x45\xdf\xa3", b"OggS", b"FLV\x01", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"\x30\x26\xb2\x75",
    b"YUV4MPEG2", b"DKIF", b"ID3", b"fLaC",
)  # fmt: skip


def probe(path: str | Path) -> MediaInfo:
    """Look at a picture or clip; of a clip the first frame is decoded, so what is reported can be read.

    Raises:
        MediaError: as :class:`VideoReader` and :func:`lp_edge.runtime.image.read_image`, or a motion template.
    """
    path = Path(path)
    kind = sniff_kind(path)
    if kind == "template":
        raise MediaError(
            f"{path.name} is a motion template", "expected a picture or clip", "load it as a template"
        )
    if kind == "image":
        header = picture_header(read_bytes(path))
        if header is None:
            raise MediaError(
                f"{path.name} is no picture that can be read",
                "expected JPEG, PNG, WebP, BMP, GIF or TIFF",
                "convert it to PNG or JPEG, or check that it is the right file",
            )
        size = (header.width, header.height)
        width, height = size if header.orientation < 5 else size[::-1]
        return MediaInfo("image", width, height, frames=1)
    with VideoReader(path) as reader:
        return reader.info


class VideoReader(Iterator[Frame]):
    """The frames of a clip, one after the other, at the times the clip gives them.

    Args:
        path: a clip, or an animated GIF.
        max_pixels: most pixels a frame may have; checked before anything is decoded.
        threads: decoder threads; 0 takes one per core, up to four (every thread holds a frame).
        allow_truncated: deliver what can be read of a clip that was cut off, with a warning in the log,
            instead of raising. A decoder of hardware that fails is an error all the same.
        video: what may decode; None = software.

    Attributes:
        info: :class:`MediaInfo`, known as soon as the reader exists: the first frame is decoded by then.

    Raises:
        MediaError: no such file, a folder, empty, unreadable, no clip, sound only, no frame, out of bounds,
            cut off or damaged; from the constructor where that can be known, otherwise from ``next``.
        BackendUnavailable: the decoder that ``video`` names does not work for this clip; from the constructor.

    Use it as a context manager; it is its own iterator and runs once.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_pixels: int = MAX_CLIP_PIXELS,
        threads: int = 0,
        allow_truncated: bool = False,
        video: Video | None = None,
    ) -> None:
        if threads < 0:
            raise ConfigError(f"{threads} decoder threads", "expected 0 (automatic) or more")
        self.path = Path(path)
        self._max_pixels = max_pixels
        self._allow_truncated = allow_truncated
        self._container: av.container.InputContainer | None = None
        self._hardware = ""  # the name of what decodes instead of software
        self._count = 0
        self._last = Fraction(0)
        check_input_file(self.path)
        cut = _cut_off(self.path)
        try:
            self._container = open_container(self.path)
            self._stream = self._video_stream()
            context = self._stream.codec_context
            check_size(
                self.path.name, context.width, context.height,
                max_pixels=max_pixels, max_side=MAX_SIDE, min_side=_MIN_SIDE,
            )  # fmt: skip
            if cut and not allow_truncated:
                raise self._truncated(_readable_frames(self.path), cut)
            if cut:
                _log.warning("%s is cut off: %s", self.path.name, cut)
            context.thread_type = "AUTO"
            # Frames may grow in mid-stream: the decoder refuses them before it allocates (with room for its alignment).
            self._options = {**context.options, "max_pixels": str(max_pixels + (1 << 20))}
            context.options = dict(self._options)  # opening empties it
            context.thread_count = threads or min(os.cpu_count() or 1, _MAX_THREADS)
            self._time_base = self._stream.time_base or Fraction(1, 1000)
            self._rate = _frame_rate(self._stream)
            self._reformatter: Any = av.video.reformatter.VideoReformatter()
            self._packing: Any = av.video.reformatter.VideoReformatter()
            self._frames = self._decode()
            first = next(self._frames, None)
            if first is None:
                raise no_frame(self.path)
            self._start = first.pts or 0
            # The size as decoded: a header may promise another one, and later frames must keep to it.
            check_size(
                self.path.name, first.width, first.height,
                max_pixels=max_pixels, max_side=MAX_SIDE, min_side=_MIN_SIDE,
            )  # fmt: skip
            self._size = _square(first.width, first.height, self._stream.sample_aspect_ratio)
            self._turn = _orientation(first)
            self._alpha = any(component.is_alpha for component in first.format.components)
            self._pending: av.VideoFrame | None = first
            self.info = self._info()
            if video is not None:
                self._offer(video, first)
        except av.error.FFmpegError as error:
            self.close()
            raise no_clip(self.path, error, cut) from error
        except BaseException:
            self.close()
            raise

    def _video_stream(self) -> Any:
        container = self._opened()
        # A cover picture in a sound file is a video stream of one picture; it is no clip.
        for stream in container.streams.video:
            if int(stream.disposition.value) & _ATTACHED_PICTURE:
                continue
            if stream.codec_context is None:  # a damaged header does it
                raise MediaError(
                    f"{self.path.name} does not say how its pictures are coded, or in a way that is not known here",
                    "expected a video such as MP4 (H.264), WebM or GIF",
                    "convert it to MP4",
                )
            return stream
        if container.streams.audio:
            raise MediaError(
                f"{self.path.name} holds sound only ({container.streams.audio[0].codec_context.name})",
                "expected a clip with pictures",
                "choose a video",
            )
        raise MediaError(f"{self.path.name} holds no pictures", "expected a clip", "choose a video")

    def _opened(self) -> av.container.InputContainer:
        if self._container is None:
            raise MediaError(f"{self.path.name} was closed", "expected an open reader", "open it again")
        return self._container

    def _info(self) -> MediaInfo:
        stream, container = self._stream, self._opened()
        duration: Fraction | None = None
        if stream.duration is not None and stream.duration > 0:
            duration = stream.duration * self._time_base
        elif container.duration is not None and container.duration > 0:
            duration = Fraction(container.duration, 1_000_000)
        frames: int | None = stream.frames or None
        if frames and duration and container.format.name == "gif":
            self._rate = frames / duration  # FFmpeg tells the rate of the first frames only
        if frames is None and duration is not None:
            frames = max(1, round(duration * self._rate))
        width, height = self._size if self._turn[0] % 2 == 0 else self._size[::-1]
        return MediaInfo(
            "video",
            width,
            height,
            self._rate,
            frames,
            duration,
            bool(container.streams.audio),
            self._turn[0] * 90,
        )

    def _decode(self) -> Generator[av.VideoFrame, None, None]:
        """Decoded frames; turns FFmpeg's errors into MediaError with the number of frames that were read."""
        container = self._opened()
        decoded = 0
        try:
            for packet in container.demux(self._stream):
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    if decoded == 0 and packet.size:
                        continue  # a clip cut out of a longer one may start between key frames
                    raise
                for frame in frames:
                    decoded += 1
                    yield frame
        except av.error.FFmpegError as error:
            if decoded == 0:
                raise
            if not self._allow_truncated:
                raise self._truncated(decoded, str(error.strerror or error)) from error
            _log.warning("%s is damaged after %d frames: %s", self.path.name, decoded, error.strerror)

    def _offer(self, video: Video, first: av.VideoFrame) -> None:
        """Let hardware decode the clip from its first frame on, where it gives that frame as software does."""
        from lp_edge.runtime.hardware_video import Clip

        wanted = self._to_rgb(first).astype(np.int16)

        def accept(frame: av.VideoFrame) -> str:
            if self._alpha:
                return "hardware decodes no transparency"
            if (frame.width, frame.height) != (first.width, first.height):
                return f"its frames are {frame.width}x{frame.height}, not {first.width}x{first.height}"
            if frame.pts != first.pts:
                return f"its first frame is that of time stamp {frame.pts}, not {first.pts}"
            apart = int(np.abs(self._to_rgb(frame) - wanted).max())
            return f"its first frame differs by {apart} levels" if apart > MOST_APART else ""

        chosen = video.decode(Clip(self.path, self._stream.index, first, self._options), accept)
        if chosen is None:
            return
        self._opened().close()  # the decoder has a file of its own
        self._hardware, frames = chosen
        self._frames = self._from_hardware(frames)
        self._pending = None

    def _from_hardware(
        self, frames: Generator[av.VideoFrame, None, None]
    ) -> Generator[av.VideoFrame, None, None]:
        count = 0
        try:
            with closing(frames):
                for frame in frames:
                    check_size(
                        self.path.name, frame.width, frame.height,
                        max_pixels=self._max_pixels, max_side=MAX_SIDE, min_side=_MIN_SIDE,
                    )  # fmt: skip
                    yield frame
                    count += 1
        except MediaError:
            raise
        except Exception as error:  # the frames so far are out, and software might give others: no way back
            raise MediaError(
                f"{self._hardware} failed at frame {count} of {self.path.name} ({error})",
                "expected a whole clip that the hardware decodes to its end",
                "check the clip, or decode it in software (--decoder software)",
            ) from error

    def _truncated(self, readable: int, why: str) -> MediaError:
        promised = self._stream.frames
        of = f" of {promised}" if promised else ""
        return MediaError(
            f"{self.path.name} is cut off or damaged ({why}): {readable}{of} frames can be read",
            "expected a whole clip",
            "copy or export it again",
        )

    def __iter__(self) -> VideoReader:
        return self

    def __next__(self) -> Frame:
        self._opened()
        frame, self._pending = self._pending, None
        if frame is None:
            frame = next(self._frames, None)
        if frame is None:
            raise StopIteration
        rgb = self._to_rgb(frame)
        nominal = 1 / self._rate
        time = self._last + nominal if self._count else Fraction(0)
        if frame.pts is not None:
            time = (frame.pts - self._start) * self._time_base
        time = max(time, self._last)
        ticks = getattr(frame, "duration", 0) or 0
        duration = ticks * self._time_base if ticks > 0 else nominal
        result = Frame(self._count, time, rgb, duration)
        self._count, self._last = self._count + 1, time
        return result

    def _to_rgb(self, frame: av.VideoFrame) -> U8:
        width, height = self._size
        rgb_source = frame.format.is_rgb or frame.format.name in ("pal8", "gray")
        # By name: PyAV 14 takes nothing else. Keys: matrix coefficients of ITU-T H.273.
        tagged = {1: "ITU709", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020"}
        matrix = tagged.get(int(frame.colorspace), "ITU709" if frame.height >= 720 else "ITU601")
        full = rgb_source or int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
        if frame.format.name in _REPACKED:  # so that one conversion to RGB serves all decoders
            frame = repacked(frame, _REPACKED[frame.format.name], full=full, by=self._packing)
        picture = self._reformatter.reformat(
            frame,
            width,
            height,
            "rgba" if self._alpha else "rgb24",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range="JPEG" if full else "MPEG",
            dst_color_range="JPEG",
        )
        rgb = np.asarray(picture.to_ndarray(), np.uint8)
        if self._alpha:
            alpha = rgb[:, :, 3:].astype(np.uint16)
            rgb = ((rgb[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        turns, mirrored = self._turn
        if mirrored:
            rgb = rgb[:, ::-1]
        if turns:
            rgb = np.rot90(rgb, turns)
        return np.ascontiguousarray(rgb, dtype=np.uint8)

    def close(self) -> None:
        """Release the file. May be called more than once."""
        container, self._container = self._container, None
        if container is not None:
            if self._hardware:
                self._frames.close()
            container.close()

    def __enter__(self) -> VideoReader:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_container(path: Path, *, hwaccel: Any = None) -> av.container.InputContainer:
    """Open a clip for reading.

    Args:
        path: the file.
        hwaccel: PyAV's ``HWAccel`` for its decoders.

    Raises:
        FFmpegError: it is no clip.
    """
    # Old versions of PyAV do not know hwaccel.
    more: dict[str, Any] = {} if hwaccel is None else {"hwaccel": hwaccel}
    # "file:" keeps a name such as "concat:x" from being taken for a protocol.
    # A title that is no UTF-8 is no reason not to read the pictures.
    container: av.container.InputContainer = av.open(
        f"file:{path.absolute()}",
        "r",
        metadata_errors="replace",
        container_options={"format_whitelist": _DEMUXERS},
        **more,
    )
    return container


def repacked(frame: av.VideoFrame, layout: str, *, full: bool = False, by: Any = None) -> av.VideoFrame:
    """The same values in another layout of planes, such as NV12 for yuv420p.

    Args:
        frame: of 4:2:0 or 4:2:2.
        layout: PyAV's name of a format with the same bits and chroma.
        full: whether the values are of full range; both sides are told so, and nothing is converted.
        by: a ``VideoReformatter`` to use again.
    """
    values = "JPEG" if full else "MPEG"
    reformatter: Any = by or av.video.reformatter.VideoReformatter()
    # With several threads FFmpeg's first conversion of P010 has wrong pixels where two slices meet, once in twenty times. Old
    # versions of PyAV have one thread and no such argument.
    one: dict[str, Any] = {"threads": 1} if "threads" in (reformatter.reformat.__doc__ or "") else {}
    moved: av.VideoFrame = reformatter.reformat(
        frame,
        format=layout,
        src_colorspace="ITU709",
        dst_colorspace="ITU709",
        src_color_range=values,
        dst_color_range=values,
        **one,
    )
    return moved


def no_clip(path: Path, error: av.error.FFmpegError, cut: str = "") -> MediaError:
    """The MediaError for a file that FFmpeg cannot open."""
    if cut:
        return MediaError(
            f"{path.name} is cut off: {cut}, and no frame can be read",
            "expected a whole clip",
            "copy or export it again",
        )
    if isinstance(error, av.error.EOFError):
        return no_frame(path)
    return MediaError(
        f"{path.name} is no clip that can be read ({error.strerror or error})",
        "expected a video such as MP4 (H.264), WebM or GIF",
        "check that it is the right file and whole, or convert it to MP4",
    )


def no_frame(path: Path) -> MediaError:
    """The MediaError for a clip that has no frame."""
    return MediaError(
        f"{path.name} holds no frame that can be read",
        "expected a clip with at least one frame",
        "export it again, or check that it is the right file",
    )


def _frame_rate(stream: Any) -> Fraction:
    """Average rate of a stream, else what FFmpeg guesses, else 25."""
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate is not None and 0 < rate <= _MAX_RATE:
            return Fraction(rate)
    return _FALLBACK_RATE


def _square(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Frame size with square pixels: the width is stretched by the sample aspect ratio, the height stays."""
    if aspect is None or aspect <= 0 or not Fraction(1, 8) <= aspect <= 8:
        return width, height
    return min(MAX_SIDE, max(1, round(width * aspect))), height


def _orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """(quarter turns counter-clockwise 0..3, mirror left-right first) from a frame's display matrix.

    The matrix (ISO/IEC 14496-12, track header) maps stored to displayed positions, in 16.16 fixed point:
    x' = a x + c y, y' = b x + d y, with y down. Angles other than quarter turns take the nearest one.
    """
    data: bytes | None = None
    side_data: Any = frame.side_data
    with suppress(KeyError):
        data = bytes(side_data["DISPLAYMATRIX"])
    if data is None or len(data) < 36:
        return 0, False
    a, b, _, c, d = struct.unpack("=5i", data[:20])
    mirrored = a * d - b * c < 0
    if mirrored:  # M = R · mirror, so R is M with its first column negated
        a, b = -a, -b
    if abs(a) >= abs(b):
        return (0 if a >= 0 else 2), mirrored
    # Stored "right" points down on the display (b > 0): a clockwise quarter turn, three counter-clockwise.
    return (3 if b > 0 else 1), mirrored


# -- clips that were cut off -----------------------------------------------------------------------------


def _cut_off(path: Path) -> str:
    """What a container says it should have beyond the file's end; empty when it is whole, or does not tell."""
    missing = _missing_bytes(path)
    if missing:
        return f"{missing} bytes are missing at its end"
    with path.open("rb") as file:
        if file.read(4) == b"GIF8":
            header = picture_header(read_bytes(path))
            if header is not None and not header.complete:
                return "its last picture is not whole"
    return ""


def _missing_bytes(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _missing_in_boxes(file, size)
        if head[:4] == b"RIFF" and len(head) >= 12:
            return max(0, 8 + int.from_bytes(head[4:8], "little") - size)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            file.seek(0)
            return _missing_in_matroska(file, size)
    return 0


def _missing_in_boxes(file: Any, size: int) -> int:
    """ISO base media: top-level boxes of 32-bit size and type, or 64-bit size behind them; 0 = to the end."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            return 0
        if length < 8:
            return 0  # not a box: trailing bytes that players ignore
        at += length
    return max(0, at - size)


def _missing_in_matroska(file: Any, size: int) -> int:
    """EBML header, then one segment whose size is known unless it was written live (RFC 8794, 9559)."""

    def element() -> tuple[int, int | None]:
        first = file.read(1)
        if not first or first[0] == 0:
            return 0, None
        width = 9 - first[0].bit_length()
        name = int.from_bytes(first + file.read(width - 1), "big")
        first = file.read(1)
        if not first or first[0] == 0:
            return name, None
        width = 9 - first[0].bit_length()
        value = int.from_bytes(first + file.read(width - 1), "big") & ((1 << 7 * width) - 1)
        return name, (None if value == (1 << 7 * width) - 1 else value)

    name, length = element()
    if name != 0x1A45DFA3 or length is None:
        return 0
    file.seek(length, os.SEEK_CUR)
    name, length = element()
    if name != 0x18538067 or length is None:
        return 0
    return max(0, int(file.tell()) + length - size)


def _readable_frames(path: Path) -> int:
    """How many frames of a cut clip are there, counted by their packets without decoding."""
    count = 0
    with suppress(av.error.FFmpegError), open_container(path) as container:
        for packet in container.demux(video=0):
            count += bool(packet.size) and not packet.is_corrupt
    return count


def resample(frames: Iterable[Frame], fps: Fraction | int) -> Iterator[Frame]:
    """Lay frames of any timing on a constant rate: output i shows the frame nearest to the time i / fps.

    Frames are repeated or dropped, never mixed; a clip that already has this rate passes unchanged. The
    last frame is shown for its own duration, so the length is kept to within half an output frame.

    Args:
        frames: in order of time, as :class:`VideoReader` gives them.
        fps: frames per second of the output, above 0.

    Returns:
        Frames with ``index`` 0, 1, 2 … and ``time`` = index / fps. Closing it leaves ``frames`` open.

    Raises:
        ConfigError: ``fps`` is not above 0.
    """
    if fps <= 0:
        raise ConfigError(f"a frame rate of {fps}", "expected a rate above 0", "choose another rate")
    return _resample(frames, Fraction(fps))


def _resample(frames: Iterable[Frame], fps: Fraction) -> Iterator[Frame]:
    step = 1 / fps
    index = 0
    held: Frame | None = None
    for frame in frames:
        if held is not None:
            middle = (held.time + frame.time) / 2
            while index * step < middle:
                yield replace(held, index=index, time=index * step, duration=step)
                index += 1
        held = frame
    if held is None:
        return
    end = held.time + held.duration - step / 2
    while index * step < end or index == 0:
        yield replace(held, index=index, time=index * step, duration=step)
        index += 1
