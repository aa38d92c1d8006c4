"""Decoders and encoders of graphics hardware: which are tried, in which order, and what came of it.

=============  ========================================  =================================================
``software``   FFmpeg's decoders, libx264, libvpx-vp9    everywhere, the measure of all others
``nvidia``     NVDEC, NVENC                              through PyAV, else through PyNvVideoCodec
``gstreamer``  nvv4l2decoder, nvv4l2h264enc              Jetson, through ``gst-launch-1.0``
=============  ========================================  =================================================

Nothing counts as working that was not tried on the very clip or size: a decoder has to give the clip's first frame as
software gives it (within 2 levels, same time), an encoder a frame of the output's size that software can decode.
``auto`` takes the first that does, and software otherwise, with the reason kept; a choice by name
that does not work is an error. Once the first frame is out nothing is switched any more: a failure is an error with
the number of the frame.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import av
import av.codec
import av.error
import av.logging
import numpy as np

from lp_edge.engines.trt_build import is_jetson
from lp_edge.errors import BackendUnavailable, ConfigError, LpEdgeError, MediaError
from lp_edge.runtime.hardware_video_gstreamer import GStreamerEncoder, gstreamer_frames
from lp_edge.runtime.hardware_video_nvcodec import NvCodecEncoder, nvcodec_frames
from lp_edge.runtime.hardware_video_packets import DEFAULT_CRF, AccessUnits, Clip, open_stream
from lp_edge.runtime.media_read import MOST_APART, VideoReader

__all__ = [
    "DECODERS",
    "ENCODERS",
    "VIDEO_CHOICES",
    "Clip",
    "Decoder",
    "Encoder",
    "Video",
    "VideoConfig",
    "frames_by",
    "nvenc_options",
    "try_decoder",
    "try_encoder",
]

VIDEO_CHOICES: Final = ("auto", "software", "nvidia", "gstreamer")
"""What may decode or encode."""

_MOST_CLIPS: Final = 64  # a server decodes without end


@dataclass(frozen=True)
class VideoConfig:
    """What decodes clips and encodes the result.

    Attributes:
        decoder, encoder: ``auto`` (hardware where there is some, the networks run on it and it is seen to work,
            otherwise software), ``software``, ``nvidia`` or ``gstreamer``.
        device: index of the NVIDIA GPU; None = that of the networks.

    Raises:
        ConfigError: an unknown choice, or a negative device.
    """

    decoder: str = "auto"
    encoder: str = "auto"
    device: int | None = None

    def __post_init__(self) -> None:
        for field in ("decoder", "encoder"):
            value = getattr(self, field)
            if value not in VIDEO_CHOICES:
                raise ConfigError(
                    f"{field} is {value!r}",
                    f"expected one of {', '.join(VIDEO_CHOICES)}",
                    "choose one of these",
                )
        if self.device is not None and self.device < 0:
            raise ConfigError(f"device is {self.device}", "expected 0 or more", "use the index of a GPU")


class OpenFrames(Protocol):
    """``(clip, device) -> frames`` of a decoder, in the order in which they are shown, with the clip's time stamps."""

    def __call__(self, clip: Clip, device: int) -> Generator[av.VideoFrame, None, None]: ...


class OpenUnits(Protocol):
    """``(size, fps, crf, device) -> session`` of an encoder that gives H.264 access units."""

    def __call__(self, size: tuple[int, int], fps: Fraction, crf: int, device: int) -> AccessUnits: ...


@dataclass(frozen=True)
class Decoder:
    """One way to decode in hardware.

    Attributes:
        name: what people read, e.g. ``NVDEC through PyAV``.
        kind: the choice that means it.
        frames: opens a clip.
    """

    name: str
    kind: Literal["nvidia", "gstreamer"]
    frames: OpenFrames


@dataclass(frozen=True)
class Encoder:
    """One way to encode H.264 in hardware: an encoder of PyAV, or a session that gives access units.

    Attributes:
        name: what people read.
        kind: the choice that means it.
        codec: PyAV's name of the encoder, or "".
        units: opens a session where ``codec`` is "".
    """

    name: str
    kind: Literal["nvidia", "gstreamer"]
    codec: str = ""
    units: OpenUnits | None = None


# -- NVDEC and NVENC through PyAV -------------------------------------------------------------------------------


def pyav_frames(clip: Clip, device: int) -> Generator[av.VideoFrame, None, None]:
    """Frames that FFmpeg's NVDEC acceleration decodes: its own parser, reference lists and time stamps.

    Raises:
        OSError, RuntimeError, NotImplementedError: no driver, no CUDA in this build of PyAV, or a codec or profile
            that the GPU does not decode.
    """
    from av.codec.hwaccel import HWAccel

    accelerated = HWAccel("cuda", str(device), allow_software_fallback=False)
    with open_stream(clip, hwaccel=accelerated) as (container, stream):
        context: Any = stream.codec_context
        if not context.is_hwaccel:
            raise NotImplementedError(f"FFmpeg's {context.name} decoder has no NVDEC")
        context.options = {**context.options, **clip.options}
        context.thread_count = 1  # more threads would each hold surfaces of the GPU, and gain nothing
        for packet in container.demux(stream):
            yield from packet.decode()


def nvenc_options(crf: int, device: int) -> dict[str, str]:
    """Options of FFmpeg's ``h264_nvenc`` for a quality of libx264's scale.

    ``crf`` becomes ``cq``, the target quality of its variable bit rate without a limit. Both count in H.264's
    quantiser (0 to 51, less is better), but 0 leaves ``cq`` to the encoder, so that 1 is the best.
    """
    return {"rc": "vbr", "cq": str(max(1, crf)), "preset": "p4", "tune": "hq", "gpu": str(device)}


DECODERS: Final = (
    Decoder("NVDEC through PyAV", "nvidia", pyav_frames),
    Decoder("NVDEC through PyNvVideoCodec", "nvidia", nvcodec_frames),
    Decoder("nvv4l2decoder through GStreamer", "gstreamer", gstreamer_frames),
)
"""All decoders of hardware, in the order in which they are tried."""

ENCODERS: Final = (
    Encoder("NVENC through PyAV", "nvidia", codec="h264_nvenc"),
    Encoder("NVENC through PyNvVideoCodec", "nvidia", units=NvCodecEncoder),
    Encoder("nvv4l2h264enc through GStreamer", "gstreamer", units=GStreamerEncoder),
)
"""All H.264 encoders of hardware, in the order in which they are tried."""


# -- trying ----------------------------------------------------------------------------------------------------


def _pyav() -> int:
    return int(av.__version__.split(".")[0])


def _kinds(choice: str) -> tuple[str, ...]:
    if choice == "auto":
        return ("gstreamer", "nvidia") if is_jetson() else ("nvidia",)
    return (choice,)


@contextmanager
def _reasons(library: str, *, explain: bool) -> Iterator[None]:
    """Turn whatever goes wrong into a BackendUnavailable of one line.

    Args:
        library: the one of NVIDIA's driver that FFmpeg loads.
        explain: FFmpeg's errors are bare numbers ("Operation not permitted"); take what it logged before.
    """
    logs: list[tuple[int, str, str]] = []
    try:
        with _ffmpeg_log() if explain else nullcontext(logs) as logs:
            yield
    except BackendUnavailable:
        raise
    except Exception as error:
        raise BackendUnavailable(_why(error, logs, library)) from error


@contextmanager
def _ffmpeg_log() -> Iterator[list[tuple[int, str, str]]]:
    """FFmpeg's errors in words: level, part, message. It has one log for the process.

    Only where nothing else decodes. PyAV frees a decoder without letting go of the interpreter; where a thread of that decoder
    waits for the interpreter to log a damaged frame, the whole process stands still for good.
    """
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # the second clip fails for the same reason as the first one
    try:
        with av.logging.Capture(local=False) as logs:
            yield logs
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)


def _why(error: Exception, logs: list[tuple[int, str, str]], library: str) -> str:
    if isinstance(error, LpEdgeError):
        return error.got
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    if isinstance(error, av.error.FFmpegError):
        if logs:
            return logs[0][2].strip()
        for name in ("libcuda.so.1", library) if sys.platform == "linux" else ():
            try:
                ctypes.CDLL(name)
            except OSError:
                return f"cannot load {name}"
        return f"{error.strerror} (lp-doctor tells more)"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def frames_by(
    decoder: Decoder,
    clip: Clip,
    device: int,
    accept: Callable[[av.VideoFrame], str],
    *,
    explain: bool = False,
) -> Generator[av.VideoFrame, None, None]:
    """Frames of a decoder whose first one was looked at.

    Args:
        accept: gives "" for a first frame that is as it should be, otherwise what is wrong with it.
        explain: see :func:`try_encoder`.

    Raises:
        BackendUnavailable: the decoder does not work, or its first frame was not accepted.
    """
    frames = decoder.frames(clip, device)
    try:
        with _reasons("libnvcuvid.so.1", explain=explain):
            first = next(frames, None)
            problem = "it gives no frame" if first is None else accept(first)
        if first is None or problem:
            raise BackendUnavailable(problem)
    except BaseException:
        frames.close()
        raise
    return _with_first(first, frames)


def _with_first(
    first: av.VideoFrame, rest: Generator[av.VideoFrame, None, None]
) -> Generator[av.VideoFrame, None, None]:
    with closing(rest):
        yield first
        yield from rest


def try_encoder(
    encoder: Encoder, size: tuple[int, int], fps: Fraction, crf: int, device: int, *, explain: bool = False
) -> bytes:
    """Encode one grey frame and decode it in software.

    Args:
        size: even width and height in pixels.
        explain: tell a reason in FFmpeg's own words. Only where nothing else decodes in this process: the way in which PyAV
            hands over FFmpeg's log can lock up threads that decode.

    Returns:
        The access unit, H.264 of Annex B with its parameter sets.

    Raises:
        BackendUnavailable: the encoder does not work, or not at this size.
    """
    width, height = size
    rgb = np.full((height, width, 3), 128, np.uint8)
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
    frame.pts, frame.time_base = 0, 1 / fps
    with _reasons("libnvidia-encode.so.1", explain=explain):
        if encoder.units is None:
            context: Any = av.codec.CodecContext.create(encoder.codec, "w")
            context.width, context.height, context.pix_fmt = width, height, "yuv420p"
            context.time_base, context.framerate, context.bit_rate = 1 / fps, fps, 0
            context.options = nvenc_options(crf, device)
            units = [bytes(packet) for packet in [*context.encode(frame), *context.encode(None)]]
        else:
            if _pyav() < 15:
                raise BackendUnavailable(f"PyAV {av.__version__} cannot write its packets, 15 and later can")
            with closing(encoder.units(size, fps, crf, device)) as session:
                units = [*session.encode(frame), *session.finish()]
        check: Any = av.codec.CodecContext.create("h264", "r")
        shown = [*check.decode(av.Packet(b"".join(units))), *check.decode(None)]
    if len(shown) != 1 or (shown[0].width, shown[0].height) != size:
        what = [f"{picture.width}x{picture.height}" for picture in shown]
        raise BackendUnavailable(f"a frame of {width}x{height} came out as {what}")
    if np.abs(shown[0].to_ndarray(format="rgb24").astype(int) - 128).mean() > 8:
        raise BackendUnavailable("a grey frame came out in another colour")
    return b"".join(units)


# -- the choice -------------------------------------------------------------------------------------------------


class Video:
    """Chooses what decodes a clip and what encodes an output; serves any number of runs, from several threads.

    Args:
        config: what is asked for.
        accelerated: whether frames stay on a GPU from the networks on; without it ``auto`` is software and tries nothing.
        device: index of the GPU where ``config`` names none.

    Attributes:
        config: what is asked for.
        device: index of the GPU.
    """

    def __init__(
        self, config: VideoConfig | None = None, *, accelerated: bool = False, device: int = 0
    ) -> None:
        self.config = config or VideoConfig()
        self.device = device if self.config.device is None else self.config.device
        self._accelerated = accelerated
        self._lock = threading.Lock()
        self._decoders: OrderedDict[Path, str] = OrderedDict()  # by clip, the one used last at the end

    def decoder_of(self, clips: Iterable[str | Path]) -> str:
        """What decoded clips, in words, each but once; with the reason where hardware was tried in vain.

        Args:
            clips: as they were given to :class:`VideoReader`; a clip whose last use lies 64 others back is forgotten.

        Returns:
            "" where none of them was decoded here.

        Example:
            >>> Video().decoder_of(["driver.mp4"])
            ''
        """
        words: dict[str, None] = {}
        with self._lock:
            for path in map(Path, clips):
                if path in self._decoders:
                    self._decoders.move_to_end(path)
                    words[self._decoders[path]] = None
        return "; ".join(words)

    @staticmethod
    def named(choice: str) -> bool:
        """Whether a choice is hardware by name, which nothing may replace."""
        return choice not in ("auto", "software")

    def check(self, *, decodes: bool, encodes: bool) -> None:
        """Try hardware that is asked for by name on a clip of its own: whether it works here at all, told before the work.

        Args:
            decodes, encodes: what there will be to do.

        Raises:
            BackendUnavailable: it does not work.
        """
        from lp_edge.runtime.media_write import open_writer  # it imports this module

        trial = Video(self.config, device=self.device)  # what it decodes is no clip of a run
        side, name = 256, "a test clip.mp4"  # NVENC takes no pictures below about 145x49
        if encodes and self.named(self.config.encoder):
            trial.encode(Path(name), (side, side), Fraction(25), None, software="libx264")
        if decodes and self.named(self.config.decoder):
            with tempfile.TemporaryDirectory(prefix="lp-edge-") as folder:
                path = Path(folder) / name
                with open_writer(path, (side, side), 25) as writer:
                    for level in range(0, 240, 20):
                        writer.write(np.full((side, side, 3), level, np.uint8))
                with VideoReader(path, video=trial) as reader:
                    next(iter(reader))

    def _untried(self, choice: str) -> bool:
        return choice == "software" or (choice == "auto" and not self._accelerated)

    def decode(
        self, clip: Clip, accept: Callable[[av.VideoFrame], str]
    ) -> tuple[str, Generator[av.VideoFrame, None, None]] | None:
        """The first decoder that works for a clip: its name and all frames; None for software.

        Args, Raises: see :func:`frames_by`; BackendUnavailable only for a decoder asked for by name.
        """
        choice, reasons = self.config.decoder, list[str]()
        if not self._untried(choice):
            for decoder in (d for kind in _kinds(choice) for d in DECODERS if d.kind == kind):
                try:
                    frames = frames_by(decoder, clip, self.device, accept)
                except BackendUnavailable as error:
                    reasons.append(f"{decoder.name}: {error.got}")
                    continue
                self._note(clip.path, decoder.name)
                return decoder.name, frames
            if choice != "auto":
                raise _nothing_works("decode", clip.path.name, choice, reasons)
        self._note(clip.path, _software(reasons))
        return None

    def _note(self, path: Path, words: str) -> None:
        with self._lock:
            self._decoders[path] = words
            self._decoders.move_to_end(path)
            if len(self._decoders) > _MOST_CLIPS:
                self._decoders.popitem(last=False)

    def encode(
        self, path: Path, size: tuple[int, int], fps: Fraction, crf: int | None, *, software: str
    ) -> tuple[str, Encoder | None, bytes]:
        """The first encoder that works for an output.

        Args:
            path: the output.
            size: even width and height in pixels.
            crf: quality on libx264's scale; None = 18.
            software: name of the software encoder; only libx264 has counterparts in hardware.

        Returns:
            What encodes, in words, with the reason where hardware was tried in vain; the encoder of hardware and its first
            access unit, or None and nothing.

        Raises:
            BackendUnavailable: the encoder asked for by name does not work.
            ConfigError: one was asked for by name, but the output is no H.264.
        """
        choice, reasons = self.config.encoder, list[str]()
        if software != "libx264":
            self.refuse_hardware(path)
        if not self._untried(choice) and software == "libx264":
            for encoder in (e for kind in _kinds(choice) for e in ENCODERS if e.kind == kind):
                try:
                    if encoder.units is not None and path.suffix.lower() == ".mkv" and _pyav() < 18:
                        raise BackendUnavailable(
                            f"PyAV {av.__version__} writes no frame rate into .mkv this way"
                        )
                    unit = try_encoder(encoder, size, fps, DEFAULT_CRF if crf is None else crf, self.device)
                except BackendUnavailable as error:
                    reasons.append(f"{encoder.name}: {error.got}")
                    continue
                return encoder.name, encoder, unit
            if choice != "auto":
                raise _nothing_works("encode", path.name, choice, reasons)
        return _software(reasons, software), None, b""

    def refuse_hardware(self, path: Path) -> None:
        """Raise ConfigError where an encoder of hardware is asked for by name, for an output that is no H.264."""
        if self.named(self.config.encoder):
            raise ConfigError(
                f"the encoder {self.config.encoder} for {path.name}",
                "expected H.264 (.mp4, .m4v, .mov, .mkv), which is all that hardware encodes here",
                "choose another suffix, or --encoder software",
            )


class _One(Video):
    """One decoder, and the reason why it does not work as the error."""

    def __init__(self, decoder: Decoder, device: int) -> None:
        super().__init__(VideoConfig(decoder=decoder.kind, device=device))
        self._only = decoder

    def decode(
        self, clip: Clip, accept: Callable[[av.VideoFrame], str]
    ) -> tuple[str, Generator[av.VideoFrame, None, None]]:
        return self._only.name, frames_by(self._only, clip, self.device, accept, explain=True)


def try_decoder(decoder: Decoder, path: Path, device: int = 0) -> int:
    """Decode a clip and hold every frame against software's; only where nothing else decodes, see :func:`try_encoder`.

    Returns:
        The number of frames.

    Raises:
        BackendUnavailable: the decoder does not work, or it gives other frames.
        MediaError: software cannot read the clip.
    """
    count = 0
    with VideoReader(path) as software, VideoReader(path, video=_One(decoder, device)) as hardware:
        try:
            for wanted, got in zip(software, hardware, strict=True):
                apart = int(np.abs(wanted.rgb.astype(np.int16) - got.rgb).max())
                if apart > MOST_APART or wanted.time != got.time:
                    raise BackendUnavailable(
                        f"frame {count} differs by {apart} levels, at {float(got.time):.3f} s"
                    )
                count += 1
        except ValueError as error:  # of zip
            raise BackendUnavailable(f"it gives another number of frames than software's {count}") from error
        except MediaError as error:
            raise BackendUnavailable(error.got) from error
    return count


def _software(reasons: list[str], name: str = "") -> str:
    words = f"software ({name})" if name else "software"
    return f"{words}, because {'; '.join(reasons)}" if reasons else words


def _nothing_works(verb: str, name: str, choice: str, reasons: list[str]) -> BackendUnavailable:
    return BackendUnavailable(
        f"{choice} does not {verb} {name} here ({'; '.join(reasons)})",
        f"expected something of {choice} that works",
        f"lp-doctor tells what is missing; or use --{verb}r software",
    )
