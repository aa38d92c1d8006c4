"""What decoders and encoders of hardware have in common: packets of H.264 and H.265 in byte-stream format.

Byte stream: ITU-T H.264 and H.265, Annex B: every NAL unit follows the start code 00 00 01. Containers keep lengths
and parameter sets elsewhere; FFmpeg's bitstream filters translate both ways.
"""

from __future__ import annotations

import io
import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import av.bitstream
import av.container
import av.error
import numpy as np
import numpy.typing as npt

from lp_edge.errors import OutputError
from lp_edge.runtime.media_read import open_container

__all__ = [
    "DEFAULT_CRF",
    "AccessUnits",
    "Clip",
    "Stamp",
    "UnitStream",
    "annex_b",
    "is_8_bit_420",
    "like",
    "open_stream",
    "split_units",
]

U8 = npt.NDArray[np.uint8]

DEFAULT_CRF: Final = 18
"""Quality of H.264 where none is asked for."""

_START: Final = re.compile(b"\0\0\1")
_IDR, _SPS, _PPS, _DELIMITER = 5, 7, 8, 9  # H.264 table 7-1


@dataclass(frozen=True)
class Clip:
    """A clip as software sees it.

    Attributes:
        path: the file.
        stream: index of its video stream.
        first: its first frame, decoded in software: format, size, colours and display matrix are this frame's.
        options: of FFmpeg's decoder: the most pixels that it may make room for.
    """

    path: Path
    stream: int
    first: av.VideoFrame
    options: Mapping[str, str]


@contextmanager
def open_stream(
    clip: Clip, *, hwaccel: Any = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a clip once more, for a decoder of its own."""
    with open_container(clip.path, hwaccel=hwaccel) as container:
        stream: Any = container.streams[clip.stream]
        yield container, stream


def is_8_bit_420(clip: Clip) -> bool:
    """Whether the frames are what all hardware decodes: 8 bits, 4:2:0."""
    return clip.first.format.name in ("yuv420p", "yuvj420p")


@dataclass(frozen=True)
class Stamp:
    """What a packet says of its picture, in the stream's time base.

    Attributes:
        pts: time; None where the container tells none.
        duration: how long it is shown, 0 where unknown.
        shown: whether it is shown at all; edit lists hide pictures that others refer to.
    """

    pts: int | None
    duration: int
    shown: bool


def like(pixels: U8, clip: Clip, stamp: Stamp, time_base: Fraction) -> av.VideoFrame:
    """A frame of the clip of bare pixels, with its time and all that the clip's first frame tells (colours, chroma's place).

    Args:
        pixels: NV12, uint8 ``[H * 3 / 2, W]``: rows of luma, then rows of interleaved chroma.
        clip, stamp, time_base: whose frame it is, and when it is shown.
    """
    height, width = pixels.shape[0] * 2 // 3, pixels.shape[1]
    frame = clip.first.reformat(
        width, height, "nv12"
    )  # PyAV makes no frame of pixels that says where chroma sits
    for plane, rows in zip(frame.planes, (pixels[:height], pixels[height:]), strict=True):
        memory: Any = plane
        np.frombuffer(memory, np.uint8).reshape(-1, plane.line_size)[: len(rows), :width] = rows
    frame.pts, frame.time_base = stamp.pts, time_base
    with suppress(AttributeError):  # PyAV 14 knows no durations of frames; the reader does without them there
        frame.duration = stamp.duration
    full = clip.first.format.name.startswith("yuvj")  # what the format's name said
    frame.colorspace = clip.first.colorspace
    frame.color_range = 2 if full else clip.first.color_range
    return frame


def annex_b(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[tuple[bytes, Stamp]]:
    """Packets of a clip as a decoder of hardware takes them: H.264 and H.265 as byte stream, others as they are."""
    name = stream.codec_context.name
    kept = name in ("h264", "hevc") and bytes(stream.codec_context.extradata or b"")[:1] == b"\1"
    filters = av.bitstream.BitStreamFilterContext(f"{name}_mp4toannexb" if kept else "null", stream)
    for packet in container.demux(stream):
        for part in filters.filter(packet if packet.size else None):
            yield bytes(part), Stamp(part.pts, part.duration or 0, not part.is_discard)


def _nal_units(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, NAL unit without start code) of an H.264 byte stream."""
    starts = [match.end() for match in _START.finditer(stream)]
    for start, after in zip(starts, [*(s - 3 for s in starts[1:]), len(stream)], strict=True):
        unit = stream[start:after].rstrip(
            b"\0"
        )  # trailing_zero_8bits, or the first byte of a longer start code
        if unit:
            yield unit[0] & 31, unit


def split_units(stream: bytes) -> tuple[list[bytes], bytes]:
    """Cut a byte stream at its access unit delimiters.

    Returns:
        Access units that are whole because another delimiter follows, and the rest.
    """
    starts = [m.start() for m in _START.finditer(stream) if stream[m.end() : m.end() + 1][:1] in _DELIMITERS]
    # The zero of a start code of four bytes belongs to the unit that it starts.
    starts = [s - 1 if s and stream[s - 1] == 0 else s for s in starts]
    if not starts:
        return [], stream
    bounds = [0, *starts[1:]]
    return [stream[a:b] for a, b in itertools.pairwise(bounds)], stream[bounds[-1] :]


_DELIMITERS: Final = tuple(bytes([_DELIMITER | ref << 5]) for ref in range(4))


class AccessUnits(ABC):
    """An encoder that takes frames and gives H.264 access units in the same order (no B pictures), Annex B."""

    @abstractmethod
    def encode(self, frame: av.VideoFrame) -> list[bytes]:
        """Take a frame (yuv420p of the session's size); give the access units that are ready."""

    @abstractmethod
    def finish(self) -> list[bytes]:
        """Give the access units that are left."""

    @abstractmethod
    def close(self) -> None:
        """Free the encoder. May be called more than once."""


class UnitStream:
    """A stream of an output container that is fed by an encoder outside of PyAV; stands in for a PyAV stream.

    The parameter sets go into the container's header, with the colours and the rate that the writer promises, and out
    of the packets. Time stamps count frames, for presentation and decoding alike.

    Args:
        container: the output, before its header is written.
        session: gives the access units.
        header: an access unit of the same encoder and settings, with its parameter sets.
        fps: frames per second.
    """

    def __init__(
        self,
        container: av.container.OutputContainer,
        session: AccessUnits,
        header: bytes,
        fps: Fraction,
    ) -> None:
        self._session, self._base = session, 1 / fps
        self._count = self._given = 0
        try:
            self._open(container, header, fps)
        except BaseException:
            session.close()
            raise

    def _open(self, container: av.container.OutputContainer, header: bytes, fps: Fraction) -> None:
        self._sets = _parameter_sets(header)
        with av.open(io.BytesIO(header), "r", format="h264") as sample:
            template = sample.streams.video[0]
            self._stream: Any = container.add_stream_from_template(template, opaque=True)
            self._stream.time_base = self._base
            self._stream.codec_context.framerate = fps
            # Limited range, BT.709 (ITU-T H.273: 1); a frame is two ticks (H.264 E.2.1).
            self._filter = av.bitstream.BitStreamFilterContext(
                "h264_metadata=aud=remove:video_full_range_flag=0:colour_primaries=1:transfer_characteristics=1:"
                f"matrix_coefficients=1:tick_rate={2 * fps.numerator}/{fps.denominator},"
                f"filter_units=remove_types={_SPS}|{_PPS}",
                template,
                self._stream,
            )

    def encode(self, frame: av.VideoFrame | None) -> list[Any]:
        """Packets that are ready; ``None`` gives the rest.

        Raises:
            OutputError: the encoder changed its parameters, or did not give one access unit for each frame.
        """
        if frame is not None:
            self._count += 1
            return [p for unit in self._session.encode(frame) for p in self._packets(unit)]
        packets = [p for unit in self._session.finish() for p in self._packets(unit)]
        packets += self._timed(self._filter.filter(None))
        if self._given != self._count:
            raise OutputError(
                f"the encoder gave {self._given} access units for {self._count} frames",
                "expected one for each",
                "choose --encoder software",
            )
        return packets

    def _packets(self, unit: bytes) -> list[Any]:
        kinds = dict(_nal_units(unit))
        for kind in (_SPS, _PPS):
            if kind in kinds and kinds[kind] != self._sets.get(kind):
                raise OutputError(
                    f"the encoder changed its parameters at frame {self._given}",
                    "expected those of its first frame",
                    "choose --encoder software",
                )
        packet = av.Packet(unit)
        packet.pts = packet.dts = self._given
        packet.time_base, packet.duration = self._base, 1
        packet.is_keyframe = _IDR in kinds
        self._given += 1
        return self._timed(self._filter.filter(packet))

    def _timed(self, packets: list[Any]) -> list[Any]:
        for packet in packets:
            packet.stream, packet.time_base = self._stream, self._base
        return packets

    def close(self) -> None:
        """Free the encoder."""
        self._session.close()


def _parameter_sets(unit: bytes) -> dict[int, bytes]:
    found = dict(_nal_units(unit))
    if _SPS not in found or _PPS not in found:
        raise OutputError(
            "the encoder's first access unit lacks its parameter sets",
            "expected SPS and PPS before the first picture",
            "choose --encoder software",
        )
    return {kind: found[kind] for kind in (_SPS, _PPS)}
