"""Pixels in and out of messages, for server and client: pictures are bounded before anything is decoded or allocated.

A driving picture is a JPEG, PNG or WebP file, plain pixels, or a slot of shared memory (:func:`decode_image`); a result leaves
as one of these or as an H.264 access unit (:class:`PictureEncoder`, :class:`PictureDecoder`). Files must hold one picture: an
animated PNG or WebP is a clip, and which of its pictures is meant is not for the server to guess. A JPEG may have 64 scans: its
decoder goes over the whole picture for each, and a scan may be a few bytes long (progressive encoders make about ten).

512x512 pixels of a photograph, one core of a server CPU, milliseconds: decode JPEG 0.8; encode raw 0.1, JPEG (q 90) 0.6, H.264
(crf 23) 1.6, PNG 11, WebP (q 90) 17. OpenCV and FFmpeg release the GIL meanwhile.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import av
import av.codec
import av.error
import av.video.reformatter
import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, LimitError, MediaError, OutputError, ProtocolError
from lp_edge.proto.v1 import common_pb2
from lp_edge.runtime.checks import one_of, within
from lp_edge.runtime.image import (
    MAX_PIXELS,
    MIN_SIDE,
    TooLargeError,
    check_size,
    encode_image,
    picture_header,
    read_image,
)
from lp_edge.runtime.server.wire import choice

if TYPE_CHECKING:
    from lp_edge.runtime.server.config import Limits

__all__ = [
    "ENCODINGS",
    "PIXEL_FORMATS",
    "OutputSettings",
    "PictureDecoder",
    "PictureEncoder",
    "SharedReader",
    "decode_image",
    "decode_picture",
    "encode_frame",
    "limiting_pixels",
    "output_settings",
]

U8 = npt.NDArray[np.uint8]

SharedReader = Callable[[int, int, int], U8]
"""``(slot, width, height)`` → a private copy uint8 ``[height, width, 3]`` of the slot, bytes in the order in which they lie there."""

ENCODINGS: Mapping[int, str] = MappingProxyType(
    {
        common_pb2.OUTPUT_ENCODING_UNSPECIFIED: "jpeg",
        common_pb2.OUTPUT_ENCODING_JPEG: "jpeg",
        common_pb2.OUTPUT_ENCODING_PNG: "png",
        common_pb2.OUTPUT_ENCODING_WEBP: "webp",
        common_pb2.OUTPUT_ENCODING_RAW: "raw",
        common_pb2.OUTPUT_ENCODING_H264: "h264",
        common_pb2.OUTPUT_ENCODING_SHARED_MEMORY: "shared_memory",
        common_pb2.OUTPUT_ENCODING_NONE: "none",
    }
)
"""Number of an OutputEncoding → its name."""
PIXEL_FORMATS: Mapping[int, str] = MappingProxyType(
    {
        common_pb2.PIXEL_FORMAT_UNSPECIFIED: "rgb24",
        common_pb2.PIXEL_FORMAT_RGB24: "rgb24",
        common_pb2.PIXEL_FORMAT_BGR24: "bgr24",
    }
)
"""Number of a PixelFormat → its name."""
# Not the unspecified ones, where two numbers have one name.
_ENCODING_NUMBERS: Mapping[str, Any] = {name: number for number, name in ENCODINGS.items()}
_PIXEL_FORMAT_NUMBERS: Mapping[str, Any] = {name: number for number, name in PIXEL_FORMATS.items()}

_FILES = ("jpeg", "png", "webp")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
_MAX_SCANS = 64
_ANSWER_REST = 64 << 10  # what an answer has beside its pictures: times, and motion of 1434 numbers
_MAX_OUTPUT_SIDE = 8192


# -- pictures that come in ------------------------------------------------------------------------------


@contextmanager
def limiting_pixels() -> Iterator[None]:
    """Tell too many pixels as a limit of the server."""
    try:
        yield
    except TooLargeError as error:
        raise LimitError(error.got, f"{error.expected} (max_pixels)", error.remedy) from error


@limiting_pixels()
def decode_image(
    image: common_pb2.Image, limits: Limits, shared: SharedReader | None = None, *, min_side: int = MIN_SIDE
) -> U8:
    """Pixels of a picture that a client sent.

    Args:
        image: a JPEG, PNG or WebP file, plain pixels, or a slot of shared memory.
        limits: of them ``max_pixels`` counts.
        shared: reads the stream's driving slots; None = the stream has none.
        min_side: least pixels of each side.

    Returns:
        uint8 ``[H, W, 3]`` RGB, C-contiguous, owned by the caller. EXIF orientation is applied, transparency laid over white.

    Raises:
        MediaError: no picture, another format, animated, cut off or broken, or too small.
        LimitError: it has too many pixels.
        ProtocolError: nothing is set, an unknown pixel format, a wrong number of bytes, or shared memory that the stream
            does not have.
        ConfigError: what ``shared`` raises for a slot that does not exist.
    """
    kind = image.WhichOneof("kind")
    if kind == "encoded":
        return _decode_file(image.encoded.data, limits.max_pixels, min_side)
    if kind == "raw":
        raw = image.raw
        check_size("a raw picture", raw.width, raw.height, max_pixels=limits.max_pixels, min_side=min_side)
        pixels = _plain(raw.data, raw.width, raw.height)
        return _ordered(pixels, _pixel_format(raw.format))
    if kind == "shared":
        slot = image.shared
        if shared is None:
            raise ProtocolError(
                f"a picture in slot {slot.slot} of shared memory",
                "expected one in the message: this stream has no shared memory for driving pictures",
                "ask for it in AnimateConfig.shared_memory and answer with shared_memory_mapped",
            )
        check_size(
            "a shared picture", slot.width, slot.height, max_pixels=limits.max_pixels, min_side=min_side
        )
        order = _pixel_format(slot.format)
        return _ordered(shared(slot.slot, slot.width, slot.height), order)
    raise ProtocolError("a picture that holds nothing", "expected encoded, raw or shared", "set one of them")


def _pixel_format(number: int) -> str:
    try:
        return choice("the pixel format", number, PIXEL_FORMATS)
    except ConfigError as error:
        raise ProtocolError(error.got, error.expected, error.remedy) from error


def _plain(data: bytes, width: int, height: int) -> U8:
    """Bytes as a read-only uint8 ``[height, width, 3]``."""
    if len(data) != width * height * 3:
        raise ProtocolError(
            f"{len(data)} bytes for {width}x{height} pixels",
            f"expected {width * height * 3}",
            "send width * height * 3 bytes, rows without padding",
        )
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _ordered(pixels: U8, pixel_format: str) -> U8:
    """RGB of pixels in ``pixel_format``: an array of the caller's own."""
    if pixel_format == "bgr24":
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
    return pixels if pixels.flags.writeable else pixels.copy()  # what is writable is a copy already


def _decode_file(data: bytes, max_pixels: int, min_side: int) -> U8:
    name = f"a picture of {len(data)} bytes"
    header = picture_header(data) if data.startswith(_MAGIC) else None
    if header is None:
        raise MediaError(
            f"{name} that begins with {data[:8]!r}",
            "expected a JPEG, PNG or WebP",
            "convert it, or send plain pixels (raw)",
        )
    if _animated(data, header.format):
        raise MediaError(
            f"{name} is an animated {header.format.upper()}",
            "expected one picture",
            "send its frames one by one",
        )
    if header.format != "jpeg":
        return read_image(data, max_pixels=max_pixels, min_side=min_side)
    scans = data.count(b"\xff\xda")
    if scans > _MAX_SCANS:
        raise MediaError(
            f"{name} has {scans} scans", f"expected {_MAX_SCANS} at most", "send a baseline JPEG"
        )
    if header.orientation != 1 or not header.complete:
        return read_image(data, max_pixels=max_pixels, min_side=min_side)
    # The common case, without read_image's way through any number of channels and bits, which takes longer than decoding.
    check_size(name, header.width, header.height, max_pixels=max_pixels, min_side=min_side)
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        bgr = None
    if bgr is None or bgr.shape != (header.height, header.width, 3) or bgr.dtype != np.uint8:
        raise MediaError(
            f"{name} is damaged: its JPEG header is fine, its pixels cannot be decoded",
            "expected a whole picture",
            "send it again",
        )
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)


def _animated(data: bytes, form: str) -> bool:
    """Whether a file whose header was read holds several pictures: APNG (W3C PNG, third edition, 11.3.6.1) or WebP's ANIM flag."""
    if form == "webp":
        return data[12:16] == b"VP8X" and bool(data[20] & 0x02)
    at = 8
    while form == "png" and at + 8 <= len(data):
        kind = data[at + 4 : at + 8]
        if kind in (b"acTL", b"IDAT", b"IEND"):
            return kind == b"acTL"
        at += 12 + int(struct.unpack_from(">I", data, at)[0])
    return False


# -- pictures that go out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputSettings:
    """How pictures are sent back.

    Attributes:
        encoding: ``jpeg``, ``png``, ``webp``, ``raw``, ``h264``, ``shared_memory`` or ``none``.
        width, height: pixels, 16 to 8192; 0 = as drawn, or after the other one where that is given.
        quality: of JPEG and WebP, 1 to 100.
        pixel_format: ``rgb24`` or ``bgr24``; counts for ``raw`` and ``shared_memory``.
        crf: H.264's constant rate factor, 1 (best) to 51.
        keyframe_interval: H.264, frames from one key frame to the next, 1 to 1000.
        max_pixels: most pixels of a picture, 256 or more.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    encoding: str = "jpeg"
    width: int = 0
    height: int = 0
    quality: int = 90
    pixel_format: str = "rgb24"
    crf: int = 23
    keyframe_interval: int = 60
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        one_of("the output's encoding", self.encoding, tuple(_ENCODING_NUMBERS))
        one_of("the output's pixel format", self.pixel_format, tuple(_PIXEL_FORMAT_NUMBERS))
        for name in ("width", "height"):
            if getattr(self, name) != 0:
                within(f"the output's {name}", getattr(self, name), MIN_SIDE, _MAX_OUTPUT_SIDE)
        within("the output's quality", self.quality, 1, 100)
        within("the output's crf", self.crf, 1, 51)
        within("the output's keyframe interval", self.keyframe_interval, 1, 1000)
        if self.width and self.height:
            self.size(self.width, self.height)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels of the answer to a picture drawn with ``width`` x ``height``.

        A side that is not given follows the other one; with both given the picture is stretched to them.

        Raises:
            ConfigError: that is more than 8192 on a side, or more than ``max_pixels``.

        Example:
            >>> OutputSettings(width=320).size(640, 360)
            (320, 180)
        """
        if not (self.width or self.height):
            return width, height
        out = (
            self.width or max(1, round(self.height * width / height)),
            self.height or max(1, round(self.width * height / width)),
        )
        if max(out) > _MAX_OUTPUT_SIDE or out[0] * out[1] > self.max_pixels:
            raise ConfigError(
                f"the output is {out[0]}x{out[1]} pixels",
                f"expected at most {_MAX_OUTPUT_SIDE} on a side and {self.max_pixels / 1e6:g} megapixels",
                "ask for a smaller width or height",
            )
        return out


def output_settings(options: common_pb2.OutputOptions, *, max_pixels: int = MAX_PIXELS) -> OutputSettings:
    """The settings that a message asks for; what is 0 gets its default.

    Raises:
        ConfigError: a value is out of range, or an enum's number is unknown (the message names the choices).
    """
    default = OutputSettings()
    return OutputSettings(
        encoding=choice("the output's encoding", options.encoding, ENCODINGS),
        width=options.width,
        height=options.height,
        quality=options.quality or default.quality,
        pixel_format=choice("the output's pixel format", options.pixel_format, PIXEL_FORMATS),
        crf=options.crf or default.crf,
        keyframe_interval=options.keyframe_interval or default.keyframe_interval,
        max_pixels=max_pixels,
    )


class PictureEncoder:
    """Makes the messages of one portrait's pictures; not for use by several threads at once.

    H.264 refers to earlier pictures, so every portrait of every stream has its own encoder. One whose size changes in
    mid-stream begins anew with a key frame.

    Args:
        output: how.

    Raises:
        OutputError: H.264 is asked for and this build of PyAV has no libx264.

    Example:
        >>> encoder = PictureEncoder(OutputSettings("raw", width=32))
        >>> picture = encoder.encode(np.zeros((64, 64, 3), np.uint8))
        >>> picture.width, picture.height, len(picture.data)
        (32, 32, 3072)
    """

    def __init__(self, output: OutputSettings) -> None:
        self.output = output
        self._h264: _H264Encoder | None = None
        if output.encoding == "h264" and "libx264" not in av.codec.codecs_available:
            raise OutputError(
                "this build of PyAV has no libx264 encoder",
                "expected one, to send H.264",
                "install the av wheel from PyPI (pip install --force-reinstall av), or ask for JPEG",
            )

    def pixels(self, rgb: U8) -> U8:
        """The picture in the size and with the order of bytes that the client asked for: uint8 ``[h, w, 3]``, C-contiguous.

        Smaller: every pixel is the mean of the area it covers. Larger: bicubic, a twelfth of the time that Lanczos takes.

        Raises:
            ConfigError: see :meth:`OutputSettings.size`.
        """
        resized = self._resized(rgb)
        if self.output.pixel_format == "bgr24":
            return np.asarray(cv2.cvtColor(resized, cv2.COLOR_RGB2BGR), np.uint8)
        return np.ascontiguousarray(resized)

    def _resized(self, rgb: U8) -> U8:
        height, width = rgb.shape[:2]
        size = self.output.size(width, height)
        if size == (width, height):
            return rgb
        way = cv2.INTER_AREA if size[0] * size[1] < width * height else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(rgb, size, interpolation=way), np.uint8)

    def encode(self, rgb: U8, *, slot: int | None = None) -> common_pb2.Picture:
        """A picture's message.

        Args:
            rgb: uint8 ``[H, W, 3]``, as drawn.
            slot: ``shared_memory`` alone, and needed there: where the caller has written :meth:`pixels`.

        Returns:
            ``width`` and ``height`` are those of the picture. H.264 codes even sizes: an odd one gets one more column or row, a
            copy of the last, which the receiver cuts off.

        Raises:
            ConfigError: the size is out of bounds, ``none`` (such answers carry no picture), or ``shared_memory`` without a slot.
            OutputError: the encoder refuses the picture.
        """
        output, encoding = self.output, self.output.encoding
        if encoding == "none" or (encoding == "shared_memory") != (slot is not None):
            raise ConfigError(
                f"a picture to encode as {encoding} with slot {slot}",
                "expected a slot with shared_memory alone, and no picture with none",
                "write the pixels into a slot first, or leave the picture out",
            )
        width, height = output.size(rgb.shape[1], rgb.shape[0])
        message = common_pb2.Picture(encoding=_ENCODING_NUMBERS[encoding], width=width, height=height)
        if encoding in ("raw", "shared_memory"):
            message.pixel_format = _PIXEL_FORMAT_NUMBERS[output.pixel_format]
        if slot is not None:
            message.slot = slot
        elif encoding == "raw":
            message.data = self.pixels(rgb).tobytes()
        elif encoding == "h264":
            if self._h264 is None or self._h264.size != (width, height):
                self._h264 = _H264Encoder((width, height), output.crf, output.keyframe_interval)
            message.data, message.keyframe = self._h264.encode(self._resized(rgb))
        else:
            suffix = ".jpg" if encoding == "jpeg" else f".{encoding}"
            message.data = encode_image(self._resized(rgb), suffix, quality=output.quality)
        return message

    def close(self) -> None:
        """Let go of the H.264 encoder; it holds nothing back, so nothing is lost."""
        self._h264 = None


def encode_frame(
    encoders: Sequence[PictureEncoder], drawn: Sequence[U8], max_message_bytes: int
) -> list[common_pb2.Picture]:
    """The pictures of one answer, which has to fit a message.

    Args:
        encoders: one for each picture; not for shared memory.
        drawn: uint8 ``[H, W, 3]`` each.
        max_message_bytes: what a message may have.

    Raises:
        LimitError: together they are larger; plain pixels are not copied first.
    """
    room = max_message_bytes - _ANSWER_REST
    plain = [
        3 * math.prod(e.output.size(rgb.shape[1], rgb.shape[0]))
        for e, rgb in zip(encoders, drawn, strict=True)
        if e.output.encoding == "raw"
    ]
    if sum(plain) <= room:
        pictures = [e.encode(rgb) for e, rgb in zip(encoders, drawn, strict=True)]
        if sum(len(p.data) for p in pictures) <= room:
            return pictures
    raise LimitError(
        f"{len(drawn)} pictures of together more than {room} bytes",
        "expected them to fit one message (max_message_bytes)",
        "ask for a smaller width and height, for JPEG, or for fewer portraits in a stream",
    )


class _H264Encoder:
    """libx264 without delay: one access unit for each picture, Annex B, SPS and PPS before every key frame, BT.709 limited."""

    def __init__(self, size: tuple[int, int], crf: int, interval: int) -> None:
        self.size, self._count, self._interval = size, 0, interval
        width, height = size
        context: Any = av.CodecContext.create("libx264", "w")
        context.width, context.height = width + width % 2, height + height % 2
        context.pix_fmt = "yuv420p"
        context.time_base, context.framerate = Fraction(1, 25), Fraction(25)
        context.thread_count = 1  # streams run side by side; slices for threads cost bits
        context.gop_size, context.max_b_frames = interval, 0
        context.color_range = 1  # as in media_write: limited; BT.709 (ITU-T H.273: 1)
        context.color_primaries = context.color_trc = context.colorspace = 1
        context.options = {
            "preset": "ultrafast",
            "tune": "zerolatency",
            "crf": str(crf),
            "x264-params": f"keyint={interval}:min-keyint={interval}:scenecut=0:repeat-headers=1:annexb=1",
        }
        self._context = context
        self._reformatter: Any = av.video.reformatter.VideoReformatter()

    def encode(self, rgb: U8) -> tuple[bytes, bool]:
        """The access unit, and whether decoding may begin with it."""
        width, height = self.size
        if width % 2 or height % 2:
            rgb = np.asarray(
                cv2.copyMakeBorder(rgb, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE), np.uint8
            )
        try:
            frame: Any = self._reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"),
                format="yuv420p",
                src_colorspace="ITU709",
                dst_colorspace="ITU709",
                src_color_range="JPEG",
                dst_color_range="MPEG",
            )
            frame.pts, frame.time_base = self._count, Fraction(1, 25)
            packets = self._context.encode(frame)
        except av.error.FFmpegError as error:
            raise OutputError(
                f"{width}x{height} pixels cannot be encoded as H.264 ({error.strerror or error})",
                "expected a size that libx264 takes",
                "ask for another size, or for JPEG",
            ) from error
        self._count += 1
        return b"".join(bytes(p) for p in packets), any(p.is_keyframe for p in packets)


# -- the client's side ----------------------------------------------------------------------------------


def decode_picture(picture: common_pb2.Picture, *, max_pixels: int = MAX_PIXELS) -> U8:
    """Pixels of a result that stands for itself: JPEG, PNG, WebP or RAW.

    Returns:
        uint8 ``[H, W, 3]`` RGB, owned by the caller.

    Raises:
        MediaError: it cannot be decoded, or is too large.
        ProtocolError: it needs a :class:`PictureDecoder`, or holds another number of bytes than it says.
    """
    encoding = _encoding(picture)
    if encoding in _FILES:
        return _decode_file(picture.data, max_pixels, 1)
    if encoding == "raw":
        check_size("a raw picture", picture.width, picture.height, max_pixels=max_pixels, min_side=1)
        pixels = _plain(picture.data, picture.width, picture.height)
        return _ordered(pixels, _pixel_format(picture.pixel_format))
    raise ProtocolError(
        f"a picture with the encoding {encoding}",
        f"expected {', '.join(_FILES)} or raw",
        "decode h264 and shared_memory with a PictureDecoder",
    )


def _encoding(picture: common_pb2.Picture) -> str:
    if picture.encoding not in ENCODINGS or not picture.encoding:
        raise ProtocolError(
            f"a picture with the encoding {picture.encoding}",
            f"expected 1 to {max(ENCODINGS)}",
            "use a client of the server's version",
        )
    return ENCODINGS[picture.encoding]


class PictureDecoder:
    """Reads the pictures of one portrait of one stream, in their order; not for use by several threads at once.

    Args:
        shared: reads the stream's result slots; None = there are none.
        max_pixels: most pixels of a picture.
    """

    def __init__(self, shared: SharedReader | None = None, *, max_pixels: int = MAX_PIXELS) -> None:
        self._shared, self._max_pixels = shared, max_pixels
        self._h264: Any = None
        self._reformatter: Any = av.video.reformatter.VideoReformatter()

    def decode(self, picture: common_pb2.Picture) -> U8:
        """Pixels of a result: uint8 ``[H, W, 3]`` RGB. Every H.264 access unit must be given, in order.

        Raises:
            MediaError: it cannot be decoded (H.264: or is the first one and no key frame), or is too large.
            ProtocolError: a slot of shared memory that is not there, an unknown encoding, a wrong number of bytes.
        """
        encoding = _encoding(picture)
        if encoding == "h264":
            return self._access_unit(picture)
        if encoding != "shared_memory":
            return decode_picture(picture, max_pixels=self._max_pixels)
        if self._shared is None:
            raise ProtocolError(
                f"a picture in slot {picture.slot} of shared memory", "expected one in the message"
            )
        check_size("a shared picture", picture.width, picture.height, max_pixels=self._max_pixels, min_side=1)
        return _ordered(
            self._shared(picture.slot, picture.width, picture.height), _pixel_format(picture.pixel_format)
        )

    def _access_unit(self, picture: common_pb2.Picture) -> U8:
        check_size("an H.264 picture", picture.width, picture.height, max_pixels=self._max_pixels, min_side=1)
        if self._h264 is None:
            if not picture.keyframe:
                raise MediaError("an H.264 stream that begins without a key frame", "expected one first")
            self._h264 = av.CodecContext.create("h264", "r")
            self._h264.thread_count = 1  # threads hold pictures back
            self._h264.flags |= av.codec.context.Flags.low_delay
        try:
            frames = self._h264.decode(av.Packet(picture.data)) if picture.data else []
            if len(frames) != 1:
                raise MediaError(f"an H.264 access unit that holds {len(frames)} pictures", "expected one")
            rgb = self._reformatter.reformat(
                frames[0],
                format="rgb24",
                src_colorspace="ITU709",
                dst_colorspace="ITU709",
                src_color_range="MPEG",
                dst_color_range="JPEG",
            ).to_ndarray()
        except av.error.FFmpegError as error:
            raise MediaError(
                f"an H.264 access unit cannot be decoded ({error.strerror or error})", "expected a whole one"
            ) from error
        if rgb.shape[0] < picture.height or rgb.shape[1] < picture.width:
            raise MediaError(
                f"an H.264 picture of {rgb.shape[1]}x{rgb.shape[0]} pixels",
                f"expected {picture.width}x{picture.height}",
            )
        return np.ascontiguousarray(rgb[: picture.height, : picture.width], np.uint8)

    def close(self) -> None:
        """Let go of the H.264 decoder."""
        self._h264 = None
