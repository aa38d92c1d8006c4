"""Clips and pictures out: frames uint8 RGB ``[H, W, 3]`` become a file that appears whole or not at all.

========================  =======================================================================
``.mp4 .m4v .mov .mkv``   H.264 (libx264 or hardware, yuv420p, BT.709, limited range); MP4 with its index in front
``.webm``                 VP9
``.gif``                  256 colours, one palette until the colours leave it, bounded memory
``.png .jpg .webp .bmp``  one picture, of exactly one frame
a folder                  (no suffix, or ``/`` at the end) ``000000.png``, ``000001.png``, …
========================  =======================================================================

Sound is carried over from another clip while the frames are written: packets are copied where the container
takes the codec, otherwise decoded and encoded again (AAC, in WebM Opus). It is laid on the clip's own time
line and ends with the last frame, so it neither drifts nor overhangs. GIF, pictures and folders have no sound.

Everything is written to a temporary name beside the output, synced and renamed by ``close``; ``abort`` and
any exception remove it.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import av
import av.codec
import av.container
import av.error
import av.filter
import av.video.reformatter
import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, LpEdgeError, MediaError, OutputError
from lp_edge.runtime.hardware_video import Video, nvenc_options
from lp_edge.runtime.hardware_video_packets import DEFAULT_CRF, UnitStream
from lp_edge.runtime.image import (
    cannot_write,
    check_folder,
    check_input_file,
    create_beside,
    create_part,
    encode_image,
    fsync_path,
    publish,
)
from lp_edge.runtime.media_read import no_clip, open_container

__all__ = ["H264_SUFFIXES", "OUTPUT_SUFFIXES", "FrameWriter", "OutputKind", "check_output", "open_writer"]

U8 = npt.NDArray[np.uint8]
OutputKind = Literal["video", "gif", "picture", "folder"]
T = TypeVar("T")

_VIDEO = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
_PICTURE = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

OUTPUT_SUFFIXES = (*_VIDEO, ".gif", *_PICTURE)
"""Suffixes that can be written; no suffix means a folder of PNG frames."""

H264_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")
"""Those of H.264, which hardware encodes."""

_COPIED_AUDIO = {
    "mp4": {"aac", "mp3", "ac3", "eac3", "alac"},
    "mov": {"aac", "mp3", "ac3", "eac3", "alac"},
    "webm": {"opus", "vorbis"},
    "matroska": {"aac", "mp3", "ac3", "eac3", "alac", "opus", "vorbis", "flac"},
}
_AAC_RATES = (32000, 44100, 48000)  # few players take higher ones; low ones make packets longer than a frame
_LEAST_FREE_BYTES = 1 << 20
_FRAME_NAME = re.compile(r"\d{6,}\.png")

_log = logging.getLogger("lp_edge")


def check_output(path: str | Path, *, overwrite: bool = True) -> OutputKind:
    """Whether an output can be written, before any work is done for it; leaves nothing behind.

    Args:
        path: file or folder to be written; its suffix chooses the format.
        overwrite: whether an existing file (or folder of frames) may be replaced.

    Returns:
        ``video``, ``gif``, ``picture`` or ``folder``.

    Raises:
        OutputError: unknown suffix, missing or unwritable folder, no space, or something there that must stay.
    """
    kind = _kind_of(path)
    path = Path(path)
    check_folder(path)
    if kind == "folder":
        _check_frames_folder(path, overwrite)
    elif os.path.exists(path) and not overwrite:
        raise OutputError(
            f"{path} exists", "expected a new name", "choose another output or allow overwriting"
        )
    _check_space(path)
    create_part(path).unlink()  # proves that the folder takes new files; access rights alone do not
    return kind


def _kind_of(path: str | Path) -> OutputKind:
    suffix = Path(path).suffix.lower()
    # os.path, unlike Path, does not raise for a name that is too long; creating the file then tells so
    if str(path).endswith(("/", os.sep)) or not suffix or os.path.isdir(path):
        return "folder"
    if suffix in _VIDEO:
        return "video"
    if suffix == ".gif":
        return "gif"
    if suffix in _PICTURE:
        return "picture"
    raise OutputError(
        f"{Path(path).name} has the unknown suffix {suffix}",
        f"expected {', '.join(OUTPUT_SUFFIXES)}, or a folder (no suffix) for single frames",
        "choose one of these",
    )


def _check_frames_folder(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"{path} is a file", "expected a folder for the frames", "choose another output")
    names = os.listdir(path)
    if names and not (overwrite and all(_FRAME_NAME.fullmatch(name) for name in names)):
        raise OutputError(
            f"{path} is a folder that is not empty",
            "expected a new or empty folder, or one that holds nothing but frames to be replaced",
            "choose another folder",
        )


def _check_space(path: Path) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise cannot_write(path, error) from error
    if free < _LEAST_FREE_BYTES:
        raise OutputError(
            f"{path} cannot be written: {free // 1024} KiB are free in {path.parent}",
            f"expected at least {_LEAST_FREE_BYTES // 1024} KiB",
            "free some space or choose another output",
        )


class FrameWriter(ABC):
    """Takes frames and makes the output of them; a context manager.

    Leaving the ``with`` block calls :meth:`close`; leaving it with an exception (Ctrl-C too) calls
    :meth:`abort`. One thread at a time.

    Attributes:
        path: the output.
        size: (width, height) in pixels of the frames it takes.
        fps: frames per second.
        frames: number of frames written so far.
        encoder: what encodes, in words, with the reason where hardware was tried in vain; "" for GIF, pictures and folders.
    """

    encoder: str = ""

    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction) -> None:
        self.path, self.size, self.fps, self.frames = path, size, fps, 0
        self._open = True

    @property
    def duration(self) -> Fraction:
        """Seconds written so far: frames / fps."""
        return self.frames / self.fps

    def write(self, rgb: U8) -> None:
        """Append a frame.

        Args:
            rgb: uint8 ``[H, W, 3]`` of the writer's size; may be changed by the caller afterwards.

        Raises:
            OutputError: a wrong array, a closed writer, or the frame cannot be written; everything written so
                far is removed then.
        """
        width, height = self.size
        if not self._open:
            raise OutputError(f"a frame for {self.path.name}, which is closed", "expected an open writer")
        if rgb.shape != (height, width, 3) or rgb.dtype != np.uint8:
            raise OutputError(
                f"a frame {rgb.dtype}{list(rgb.shape)}",
                f"expected uint8[{height}, {width}, 3]",
                "scale it first",
            )
        self._guard(lambda: self._write(np.ascontiguousarray(rgb)))
        self.frames += 1

    def close(self) -> None:
        """Finish the output and give it its name. Does nothing when closed or aborted before.

        Raises:
            OutputError: nothing was written, or it cannot be finished; nothing stays behind then.
        """
        if not self._open:
            return
        if self.frames == 0:
            self.abort()
            raise OutputError(f"no frame for {self.path.name}", "expected at least one frame")
        self._guard(self._finish)
        self._open = False

    def abort(self) -> None:
        """Remove what was written. Does nothing when closed or aborted before."""
        if self._open:
            self._open = False
            self._discard()

    def _guard(self, work: Callable[[], T]) -> T:
        """Run ``work``; whatever goes wrong, remove the traces and say it in an error of ours."""
        try:
            with _output_errors(self.path):
                return work()
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> FrameWriter:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    @abstractmethod
    def _write(self, rgb: U8) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _discard(self) -> None: ...


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except LpEdgeError:
        raise
    except av.error.EncoderNotFoundError as error:
        raise OutputError(
            f"this build of PyAV has no encoder for {path.suffix}",
            "expected libx264 (mp4, mkv), libvpx-vp9 and libopus (webm)",
            "install the av wheel from PyPI (pip install --force-reinstall av) or choose another suffix",
        ) from error
    except av.error.FFmpegError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error})",
            "expected a size the encoder takes and a folder with enough space",
            "check free space, choose a smaller picture or another suffix",
        ) from error
    except OSError as error:
        raise cannot_write(path, error) from error


def open_writer(
    output: str | Path,
    size: tuple[int, int],
    fps: Fraction | int,
    *,
    audio_from: str | Path | None = None,
    audio_start: Fraction | int = 0,
    audio_duration: Fraction | int | None = None,
    crf: int | None = None,
    preset: str = "veryfast",
    threads: int = 0,
    overwrite: bool = True,
    video: Video | None = None,
) -> FrameWriter:
    """Open an output for frames; its suffix chooses the format.

    Args:
        output: file or folder, see the table at the top of the module.
        size: (width, height) in pixels of the frames. Odd sizes get one more column or row, a copy of the
            last, in formats that need even ones.
        fps: frames per second, kept as an exact fraction (GIF: to 1/100 s per frame, without drift, 50 at most).
        audio_from: clip whose first sound track is carried over; a clip without sound gives none.
        audio_start: second of that clip, counted from its first picture, that belongs to the first frame.
        audio_duration: seconds of sound at most; None takes as much as there are frames.
        crf: quality, 0 (best) to 51 (H.264) or 63 (VP9); None takes 18 and 30. Ignored by other formats.
        preset: libx264's speed, ``ultrafast`` … ``slow``.
        threads: encoder threads; 0 takes one per core.
        overwrite: whether an existing output may be replaced.
        video: what may encode H.264 (:mod:`lp_edge.runtime.hardware_video`); None = libx264. ``preset`` and ``threads``
            mean nothing to hardware.

    Raises:
        OutputError: it cannot be written (see :func:`check_output`), or there is no encoder for it.
        MediaError: ``audio_from`` cannot be read.
        ConfigError: a size or rate that is not above 0, an unknown preset, or hardware by name for another format.
        BackendUnavailable: the encoder that ``video`` names does not work.
    """
    if size[0] < 1 or size[1] < 1 or fps <= 0:
        raise ConfigError(f"size {size[0]}x{size[1]} at {fps} frames a second", "expected values above 0")
    if audio_start < 0 or (audio_duration is not None and audio_duration < 0):
        raise ConfigError(f"sound from {audio_start} s for {audio_duration} s", "expected 0 or more")
    if preset not in _PRESETS:
        raise ConfigError(f"preset {preset}", f"expected one of {', '.join(_PRESETS)}")
    kind = check_output(output, overwrite=overwrite)
    path, rate = Path(output), Fraction(fps)
    if video is not None and kind != "video":
        video.refuse_hardware(path)
    if kind == "folder":
        return _FolderWriter(path, size, rate)
    if kind == "picture":
        return _PictureWriter(path, size, rate)
    if kind == "gif":
        return _GifWriter(path, size, rate)
    limit = None if audio_duration is None else Fraction(audio_duration)
    return _VideoWriter(
        path,
        size,
        rate,
        None if audio_from is None else Path(audio_from),
        Fraction(audio_start),
        limit,
        crf,
        preset,
        threads,
        video,
    )


_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


# -- pictures and folders ----------------------------------------------------------------------------------


class _PictureWriter(FrameWriter):
    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction) -> None:
        super().__init__(path, size, fps)
        self._part = create_beside(path)

    def _write(self, rgb: U8) -> None:
        if self.frames:
            raise OutputError(
                f"more than one frame for the picture {self.path.name}",
                "expected exactly one",
                "write a clip (.mp4, .webm, .gif) or a folder of frames",
            )
        self._part.write_bytes(encode_image(rgb, self.path.suffix))

    def _finish(self) -> None:
        publish(self._part, self.path)

    def _discard(self) -> None:
        self._part.unlink(missing_ok=True)


class _FolderWriter(FrameWriter):
    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction) -> None:
        super().__init__(path, size, fps)
        self._part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            self._part.mkdir()
        except OSError as error:
            raise cannot_write(path, error) from error

    def _write(self, rgb: U8) -> None:
        file = self._part / f"{self.frames:06d}.png"
        file.write_bytes(encode_image(rgb, ".png"))
        fsync_path(file)

    def _finish(self) -> None:
        _check_frames_folder(self.path, overwrite=True)  # again: it may have been filled meanwhile
        old: Path | None = None
        if self.path.exists():
            old = self._part.with_suffix(".old")
            self.path.replace(old)
        fsync_path(self._part)
        try:
            self._part.replace(self.path)
        except OSError:
            if old is not None:
                old.replace(self.path)
            raise
        fsync_path(self.path.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _discard(self) -> None:
        shutil.rmtree(self._part, ignore_errors=True)


# -- clips ---------------------------------------------------------------------------------------------------


class _ContainerWriter(FrameWriter):
    """What MP4, WebM and GIF have in common: a container under a temporary name."""

    def __init__(
        self, path: Path, size: tuple[int, int], fps: Fraction, form: str, options: dict[str, str]
    ) -> None:
        super().__init__(path, size, fps)
        self._part = create_beside(path)
        self._container: av.container.OutputContainer | None = None
        self._container = self._guard(
            lambda: av.open(f"file:{self._part.absolute()}", "w", form, options=options)
        )

    def _out(self) -> av.container.OutputContainer:
        if self._container is None:
            raise OutputError(f"{self.path.name} is closed", "expected an open writer")
        return self._container

    def _end_container(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def _publish(self) -> None:
        self._end_container()
        publish(self._part, self.path)

    def _discard(self) -> None:
        # The name goes first: closing writes a trailer, and would move the index of a long MP4 to its front.
        self._part.unlink(missing_ok=True)
        with suppress(av.error.FFmpegError, OSError, ValueError):
            self._end_container()


class _VideoWriter(_ContainerWriter):
    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        fps: Fraction,
        audio_from: Path | None,
        audio_start: Fraction,
        audio_limit: Fraction | None,
        crf: int | None,
        preset: str,
        threads: int,
        video: Video | None,
    ) -> None:
        form = _VIDEO[path.suffix.lower()]
        options: dict[str, str] = {}
        if form in ("mp4", "mov"):
            # Durations in the headers count in this time scale; a multiple of the rate keeps them exact.
            scale = fps.numerator * max(1, 10_000 // fps.numerator)
            options = {"movflags": "faststart", "movie_timescale": str(scale)}
        self._audio: _Audio | None = None
        self._session: UnitStream | None = None
        super().__init__(path, size, fps, form, options)
        self._limit = audio_limit
        self._reformatter: Any = av.video.reformatter.VideoReformatter()
        self._hardware = False  # encodes instead of software
        self._guard(
            lambda: self._start(form, audio_from, audio_start, crf, preset, threads, video or Video())
        )

    def _start(
        self,
        form: str,
        audio_from: Path | None,
        audio_start: Fraction,
        crf: int | None,
        preset: str,
        threads: int,
        video: Video,
    ) -> None:
        container = self._out()
        software = "libvpx-vp9" if form == "webm" else "libx264"
        width, height = self.size
        even = (width + width % 2, height + height % 2)
        self.encoder, hardware, header = video.encode(self.path, even, self.fps, crf, software=software)
        self._hardware = hardware is not None
        quality = DEFAULT_CRF if crf is None else crf
        if hardware is None:
            self._stream: Any = self._coded(software, even, _options(software, crf, preset), threads)
        elif hardware.units is None:
            self._stream = self._coded(hardware.codec, even, nvenc_options(quality, video.device), 1)
        else:
            session = hardware.units(even, self.fps, quality, video.device)
            self._stream = self._session = UnitStream(container, session, header, self.fps)
        if audio_from is not None:
            self._audio = _open_audio(audio_from, audio_start, container, form)
        container.start_encoding()  # opens the encoders and writes the header: what fails, fails now

    def _coded(self, codec: str, size: tuple[int, int], options: dict[str, str], threads: int) -> Any:
        """A stream that an encoder of PyAV fills."""
        if codec not in av.codec.codecs_available:
            raise OutputError(
                f"this build of PyAV has no {codec} encoder",
                f"expected one, to write {self.path.suffix}",
                "install the av wheel from PyPI (pip install --force-reinstall av) or choose another suffix",
            )
        stream: Any = self._out().add_stream(codec, rate=self.fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = options
        if codec != "libx264":
            stream.bit_rate = 0  # with a quality: as many bits as it takes
        context = stream.codec_context
        context.time_base = 1 / self.fps
        context.thread_count = threads or os.cpu_count() or 1
        context.thread_type = "AUTO"
        context.color_range = 1  # limited; the other tags: BT.709 (ITU-T H.273: 1)
        context.color_primaries = context.color_trc = context.colorspace = 1
        return stream

    def _encode(self, frame: av.VideoFrame | None) -> list[Any]:
        try:
            return list(self._stream.encode(frame))
        except Exception as error:
            if not self._hardware:
                raise
            raise OutputError(
                f"{self.encoder} failed at frame {self.frames} of {self.path.name} ({error})",
                "expected an encoder that works to the end",
                "encode in software (--encoder software)",
            ) from error

    def _write(self, rgb: U8) -> None:
        self._mux_video(self._encode(self._to_yuv(rgb)))
        if self._audio is not None:
            self._audio.advance(self._sound_end(self.frames + 1))

    def _sound_end(self, frames: int) -> Fraction:
        end = frames / self.fps
        return end if self._limit is None else min(end, self._limit)

    def _to_yuv(self, rgb: U8) -> av.VideoFrame:
        height, width = rgb.shape[:2]
        if width % 2 or height % 2:
            rgb = np.asarray(
                cv2.copyMakeBorder(rgb, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE), dtype=np.uint8
            )
        frame: av.VideoFrame = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(rgb, format="rgb24"),
            format="yuv420p",
            src_colorspace="ITU709",
            dst_colorspace="ITU709",
            src_color_range="JPEG",
            dst_color_range="MPEG",
        )
        frame.pts, frame.time_base = self.frames, 1 / self.fps
        return frame

    def _mux_video(self, packets: list[Any]) -> None:
        for packet in packets:
            if not packet.duration:  # otherwise the last frame would have none
                packet.duration = round(1 / self.fps / packet.time_base)
            self._out().mux(packet)

    def _finish(self) -> None:
        self._mux_video(self._encode(None))
        if self._session is not None:
            self._session.close()
        if self._audio is not None:
            self._audio.finish(self._sound_end(self.frames))
            self._audio.close()
        self._publish()

    def _discard(self) -> None:
        if self._session is not None:
            self._session.close()
        if self._audio is not None:
            self._audio.close()
        super()._discard()


def _options(codec: str, crf: int | None, preset: str) -> dict[str, str]:
    """Options of a software encoder."""
    if codec == "libx264":
        return {"crf": str(DEFAULT_CRF if crf is None else crf), "preset": preset}
    return {
        "crf": str(30 if crf is None else crf),
        "deadline": "realtime",
        "cpu-used": "7",
        "row-mt": "1",
        "tile-columns": "2",
    }


# -- sound -----------------------------------------------------------------------------------------------------


def _open_audio(path: Path, start: Fraction, out: av.container.OutputContainer, form: str) -> _Audio | None:
    """Sound of a clip for an output container; None where the clip has none."""
    check_input_file(path)
    try:
        source = open_container(path)
    except av.error.FFmpegError as error:
        raise no_clip(path, error) from error
    try:
        if not source.streams.audio:
            source.close()
            _log.debug("%s has no sound", path.name)
            return None
        name = source.streams.audio[0].codec_context.name
        # FFmpeg names decoders and encoders here; mp3float and such decode the codec named first.
        codec = re.sub(r"(float|_fixed|_at)$", "", name.removeprefix("lib"))
        if codec in _COPIED_AUDIO[form]:
            # Only MP4 can hide sound before time 0 (edit list); Opus states its own lead-in everywhere.
            hidden = form in ("mp4", "mov")
            early = hidden or (codec == "opus" and start == 0)
            return _CopiedAudio(
                path, source, start, out, preroll=hidden and codec in ("aac", "mp3"), early=early
            )
        return _EncodedAudio(path, source, start, out, "libopus" if form == "webm" else "aac")
    except BaseException:
        source.close()
        raise


class _Audio(ABC):
    """Sound of a clip on the output's time line, delivered as far as the frames have got."""

    def __init__(self, path: Path, source: av.container.InputContainer, start: Fraction) -> None:
        self._path, self._source = path, source
        self._in: Any = source.streams.audio[0]
        self._base: Fraction = self._in.time_base or Fraction(1, 48000)
        # Times count from the first picture, as VideoReader counts them.
        origin = Fraction(0)
        if source.streams.video:
            video = source.streams.video[0]
            origin = (video.start_time or 0) * (video.time_base or Fraction(0))
        elif self._in.start_time:
            origin = self._in.start_time * self._base
        self._zero = origin + start

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except av.error.FFmpegError as error:
            raise MediaError(
                f"the sound of {self._path.name} cannot be read ({error.strerror or error})",
                "expected a whole sound track",
                "copy or export the clip again, or leave out the sound",
            ) from error

    @abstractmethod
    def advance(self, until: Fraction) -> None:
        """Write what is certain to lie before ``until`` seconds."""

    @abstractmethod
    def finish(self, end: Fraction) -> None:
        """Write the rest up to exactly ``end`` seconds."""

    def close(self) -> None:
        self._source.close()


class _CopiedAudio(_Audio):
    """Packets as they are, with new times; the last one's duration is cut to the end."""

    def __init__(
        self,
        path: Path,
        source: av.container.InputContainer,
        start: Fraction,
        out: av.container.OutputContainer,
        *,
        preroll: bool,
        early: bool,
    ) -> None:
        super().__init__(path, source, start)
        self._out = out
        self._stream: Any = out.add_stream_from_template(self._in)
        self._shift = round(self._zero / self._base)
        # MDCT codecs need the packet before the first one that is heard.
        self._preroll, self._early = preroll, early
        self._packets = self._read()
        self._next: Any = next(self._packets, None)

    def _read(self) -> Iterator[Any]:
        previous: Any = None
        with self._reading():
            for packet in self._source.demux(self._in):
                if packet.pts is None or not packet.size:
                    continue
                packet.pts -= self._shift
                packet.dts = packet.pts
                if packet.pts + (packet.duration or 0) <= 0:
                    previous = packet
                    continue
                if packet.pts < 0 and not self._early:
                    continue
                if previous is not None and self._preroll:
                    yield previous
                previous = None
                yield packet

    def advance(self, until: Fraction) -> None:
        while self._next is not None and (self._next.pts + (self._next.duration or 0)) * self._base <= until:
            self._mux()

    def finish(self, end: Fraction) -> None:
        self.advance(end)
        if self._next is not None and self._next.pts * self._base < end:
            self._next.duration = max(1, round(end / self._base) - self._next.pts)
            self._mux()

    def _mux(self) -> None:
        packet = self._next
        packet.stream = self._stream
        self._out.mux(packet)
        self._next = next(self._packets, None)


class _EncodedAudio(_Audio):
    """Decoded, brought to one rate and layout, laid on the sample grid of the output, and encoded."""

    _CHUNK = 1024

    def __init__(
        self,
        path: Path,
        source: av.container.InputContainer,
        start: Fraction,
        out: av.container.OutputContainer,
        codec: str,
    ) -> None:
        super().__init__(path, source, start)
        if codec not in av.codec.codecs_available:
            raise OutputError(
                f"this build of PyAV has no {codec} encoder",
                f"expected one, to carry over the {self._in.codec_context.name} sound of {path.name}",
                "install the av wheel from PyPI, or write without sound",
            )
        rate = int(self._in.codec_context.sample_rate or 48000)
        self._rate = 48000 if codec == "libopus" or rate not in _AAC_RATES else rate
        self._layout = "mono" if self._in.codec_context.channels == 1 else "stereo"
        self._format = "flt" if codec == "libopus" else "fltp"
        self._out = out
        self._stream: Any = out.add_stream(codec, rate=self._rate)
        context: Any = self._stream.codec_context
        context.layout, context.format = self._layout, self._format
        context.bit_rate = 128_000 if self._layout == "stereo" else 80_000
        self._resampler = av.AudioResampler(format="fltp", layout=self._layout, rate=self._rate)
        self._channels = 1 if self._layout == "mono" else 2
        self._held: npt.NDArray[np.float32] = np.zeros((self._channels, 0), np.float32)
        self._sent = 0
        self._ended = False
        self._blocks = self._read()

    def _read(self) -> Iterator[npt.NDArray[np.float32]]:
        """Samples [channels, n] without a gap, the first at time 0 of the output."""
        total = 0
        with self._reading():
            for frame in self._source.decode(self._in):
                if frame.pts is not None:
                    due = round((frame.pts * (frame.time_base or self._base) - self._zero) * self._rate)
                    gap = due - total
                    if gap + self._frame_samples(frame) <= 0:
                        continue  # before the start
                    # Time stamps may be as coarse as a millisecond, so only real gaps count.
                    if total == 0 or abs(gap) > self._rate // 20:
                        while gap > 0:
                            n = min(gap, self._rate)
                            yield np.zeros((self._channels, n), np.float32)
                            total, gap = total + n, gap - n
                    else:
                        gap = 0
                else:
                    gap = 0
                for part in self._samples(frame):
                    if gap < 0:
                        cut = min(-gap, part.shape[1])
                        part, gap = part[:, cut:], gap + cut
                    total += part.shape[1]
                    yield part
            for part in self._samples(None):
                yield part

    def _frame_samples(self, frame: Any) -> int:
        return round(Fraction(int(frame.samples) * self._rate, int(frame.sample_rate)))

    def _samples(self, frame: Any) -> Iterator[npt.NDArray[np.float32]]:
        if frame is not None:
            frame.pts = None  # the grid is kept here
        for part in self._resampler.resample(frame):
            yield np.asarray(part.to_ndarray(), np.float32).reshape(self._channels, -1)

    def _hold(self, samples: int) -> None:
        while self._held.shape[1] < samples and not self._ended:
            block = next(self._blocks, None)
            if block is None:
                self._ended = True
            else:
                self._held = np.concatenate([self._held, block], axis=1)

    def advance(self, until: Fraction) -> None:
        while not self._ended and (self._sent + self._CHUNK) <= until * self._rate:
            self._hold(self._CHUNK)
            if self._held.shape[1] < self._CHUNK:
                return
            self._send(self._CHUNK)

    def finish(self, end: Fraction) -> None:
        self.advance(end)
        last = int(end * self._rate)
        while self._sent < last:
            self._hold(self._CHUNK)
            n = min(self._CHUNK, self._held.shape[1], last - self._sent)
            if n == 0:
                break
            self._send(n)
        self._mux(self._stream.encode(None), end)

    def _send(self, n: int) -> None:
        block, self._held = self._held[:, :n], self._held[:, n:]
        if self._format == "flt":
            block = block.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(block), format=self._format, layout=self._layout
        )
        frame.sample_rate = self._rate
        frame.pts, frame.time_base = self._sent, Fraction(1, self._rate)
        self._sent += n
        self._mux(self._stream.encode(frame))

    def _mux(self, packets: list[Any], end: Fraction | None = None) -> None:
        for packet in packets:
            if end is not None:  # the encoder pads the last packet
                rest = round(end / packet.time_base) - packet.pts
                if rest <= 0:
                    continue
                packet.duration = min(packet.duration or rest, rest)
            self._out.mux(packet)


# -- GIF ---------------------------------------------------------------------------------------------------------


class _GifWriter(_ContainerWriter):
    """GIF in one pass: the palette is made of the first frames (as many as fit 64 MiB, at most 32) and kept, so
    that still areas stay still; when later frames no longer fit it, the next ones make a new palette."""

    _MOST_HELD = 32
    _MOST_BYTES = 64 << 20

    def __init__(self, path: Path, size: tuple[int, int], fps: Fraction) -> None:
        super().__init__(path, size, fps, "gif", {"loop": "0"})
        self._room = max(1, min(self._MOST_HELD, self._MOST_BYTES // (size[0] * size[1] * 3)))
        self._held: list[tuple[int, U8]] = []
        self._palette: _Palette | None = None
        self._packet: Any = None  # the newest one waits until it is known how long it is shown
        self._last = -2
        self._guard(self._start)

    def _start(self) -> None:
        stream: Any = self._out().add_stream("gif", rate=100)
        stream.width, stream.height = self.size
        stream.pix_fmt = "pal8"
        stream.codec_context.time_base = Fraction(1, 100)
        self._stream = stream
        self._out().start_encoding()

    def _write(self, rgb: U8) -> None:
        at = round(self.frames * 100 / self.fps)  # of the whole time, so that rounding does not add up
        if at - self._last < 2:
            return  # players show frames that last less than 1/50 s far too long
        self._last = at
        if self._palette is not None:
            if self._palette.fits(rgb):
                self._encode(self._palette.apply(rgb, at))
                return
            self._encode(self._palette.drain())
            self._palette = None
        self._held.append((at, rgb.copy()))
        if len(self._held) >= self._room:
            self._settle()

    def _settle(self) -> None:
        """Make a palette of the frames held back and let them go."""
        self._palette = _Palette([rgb for _, rgb in self._held])
        for at, rgb in self._held:
            self._encode(self._palette.apply(rgb, at))
        self._held.clear()

    def _encode(self, frames: list[av.VideoFrame]) -> None:
        for frame in frames:
            frame.time_base = Fraction(1, 100)
            for packet in self._stream.encode(frame):
                self._mux(packet.pts)
                self._packet = packet

    def _mux(self, until: int) -> None:
        """Write the waiting packet, shown until the given 1/100 s."""
        if self._packet is not None:
            self._packet.duration = until - self._packet.pts
            self._out().mux(self._packet)
            self._packet = None

    def _finish(self) -> None:
        if self._held:
            self._settle()
        if self._palette is not None:
            self._encode(self._palette.drain())
        self._mux(max(self._last + 2, round(self.frames * 100 / self.fps)))
        self._publish()


class _Palette:
    """255 colours for some frames, and frames drawn with them (FFmpeg's palettegen and paletteuse)."""

    def __init__(self, frames: list[U8]) -> None:
        height, width = frames[0].shape[:2]
        base = Fraction(1, 100)
        graph: Any = av.filter.Graph()
        source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=base)
        make, sink = graph.add("palettegen", "stats_mode=full"), graph.add("buffersink")
        source.link_to(make)
        make.link_to(sink)
        graph.configure()
        for index, rgb in enumerate(frames):
            source.push(self._frame(rgb, index))
        source.push(None)
        palette = sink.pull()
        colours = palette.to_ndarray(format="rgba").reshape(-1, 4)
        self._distance = _distances(colours[colours[:, 3] == 255][:, :3])
        self._usual = max(self._misfit(rgb) for rgb in frames)

        graph = av.filter.Graph()
        self._in = graph.add_buffer(width=width, height=height, format="rgb24", time_base=base)
        colour_in = graph.add_buffer(
            width=palette.width, height=palette.height, format=palette.format.name, time_base=base
        )
        use = graph.add("paletteuse", "dither=bayer:bayer_scale=3:diff_mode=rectangle")
        self._sink = graph.add("buffersink")
        self._in.link_to(use, 0, 0)
        colour_in.link_to(use, 0, 1)
        use.link_to(self._sink)
        graph.configure()
        self._graph = graph  # its ends do not keep it alive
        palette.pts = 0
        palette.time_base = base
        colour_in.push(palette)
        colour_in.push(None)

    @staticmethod
    def _frame(rgb: U8, at: int) -> av.VideoFrame:
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        frame.pts, frame.time_base = at, Fraction(1, 100)
        return frame

    def _misfit(self, rgb: U8) -> float:
        """Mean distance of every eighth pixel to its nearest colour, in levels."""
        sample = rgb[::8, ::8].astype(np.intp) >> 3
        return float(self._distance[sample[..., 0], sample[..., 1], sample[..., 2]].mean())

    def fits(self, rgb: U8) -> bool:
        """Whether a frame is served by this palette about as well as those it was made of."""
        return self._misfit(rgb) <= 1.5 * self._usual + 2.0

    def apply(self, rgb: U8, at: int) -> list[av.VideoFrame]:
        """Push a frame; returns those that are ready."""
        self._in.push(self._frame(rgb, at))
        return self._ready()

    def drain(self) -> list[av.VideoFrame]:
        """The frames still in the filter; ends it."""
        self._in.push(None)
        return self._ready()

    def _ready(self) -> list[av.VideoFrame]:
        frames: list[av.VideoFrame] = []
        with suppress(av.error.BlockingIOError, av.error.EOFError):
            while True:
                frame = self._sink.pull()
                if isinstance(frame, av.VideoFrame):
                    frames.append(frame)
        return frames


def _distances(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[32, 32, 32]: distance from the middle of each cell of the RGB cube to the nearest of ``colours`` [n, 3]."""
    axis = np.arange(32, dtype=np.float32) * 8 + 3.5
    table = colours.astype(np.float32)
    out = np.empty((32, 32, 32), np.float32)
    for red in range(32):
        cells = np.stack(np.meshgrid(axis[red], axis, axis, indexing="ij"), axis=-1).reshape(-1, 1, 3)
        out[red] = np.sqrt(((cells - table) ** 2).sum(-1).min(1)).reshape(32, 32)
    return out
