"""NVDEC and NVENC through NVIDIA's PyNvVideoCodec (extra ``nvcodec``), for a PyAV that was built without them.

Files are read and written by PyAV here too: only packets go to the decoder and only packets come from the encoder, so
that times, rotation, sound and containers are those of the software path. Frames pass through host memory (NV12),
because faces are found and pictures are composed there.

Names and arguments are those that version 2.2 exports (tests/fake_nvcodec holds the list).
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any, Final

import av
import numpy as np

from lp_edge.errors import BackendUnavailable
from lp_edge.runtime.hardware_video_packets import (
    AccessUnits,
    Clip,
    Stamp,
    annex_b,
    is_8_bit_420,
    like,
    open_stream,
)
from lp_edge.runtime.media_read import repacked

__all__ = ["NvCodecEncoder", "nvcodec_frames"]

_CODECS: Final = {
    "h264": "H264",
    "hevc": "HEVC",
    "vp8": "VP8",
    "libvpx": "VP8",
    "vp9": "VP9",
    "libvpx-vp9": "VP9",
    "av1": "AV1",
    "libdav1d": "AV1",
}


def _module() -> Any:
    """PyNvVideoCodec; its import fails where the driver lacks its video libraries."""
    module = importlib.import_module("PyNvVideoCodec")
    version = str(getattr(module, "__version__", "0"))
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (
        2,
        2,
    ):  # its encoder gave bare bytes before
        raise BackendUnavailable(f"PyNvVideoCodec {version} is older than 2.2")
    return module


def nvcodec_frames(clip: Clip, device: int) -> Generator[av.VideoFrame, None, None]:
    """Frames of a clip that PyNvVideoCodec's core decoder gives, with the clip's own time stamps.

    Raises:
        ImportError, RuntimeError: PyNvVideoCodec or the driver's libraries are not there, or NVDEC refuses the clip.
        BackendUnavailable: a codec or format that this path does not carry.
    """
    nvc = _module()
    with open_stream(clip) as (container, stream):
        name = stream.codec_context.name
        if name not in _CODECS or not is_8_bit_420(clip):
            raise BackendUnavailable(f"{name} in {clip.first.format.name} is not carried this way")
        codec = getattr(nvc.cudaVideoCodec, _CODECS[name])
        decoder = nvc.CreateDecoder(gpuid=device, codec=codec, usedevicememory=False)
        base = stream.time_base or Fraction(1, 1000)
        # The number of the packet travels as its time stamp: a clip's own may be missing.
        stamps: list[Stamp] = []
        for data, stamp in annex_b(container, stream):
            stamps.append(stamp)
            yield from _decoded(nvc, decoder, data, len(stamps) - 1, stamps, clip, base)
        yield from _decoded(nvc, decoder, b"", len(stamps), stamps, clip, base)


def _decoded(
    nvc: Any,
    decoder: Any,
    data: bytes,
    number: int,
    stamps: list[Stamp],
    clip: Clip,
    base: Fraction,
) -> Iterator[av.VideoFrame]:
    """Frames that are ready after one packet; no data ends the stream."""
    packet = nvc.PacketData()
    buffer = np.frombuffer(data, np.uint8)
    packet.bsl, packet.bsl_data = len(data), buffer.ctypes.data if data else 0
    packet.pts = number
    for frame in decoder.Decode(packet):
        rows, width = (int(n) for n in tuple(frame.shape)[:2])
        if frame.format != nvc.Pixel_Format.NV12 or rows * width != frame.framesize():
            raise BackendUnavailable(f"NVDEC gave {frame.format} of {rows}x{width}, expected NV12")
        stamp = stamps[frame.timestamp]
        # The decoder writes over it in its next call.
        pixels = np.frombuffer(ctypes.string_at(frame.GetPtrToPlane(0), rows * width), np.uint8)
        if stamp.shown:
            yield like(pixels.reshape(rows, width), clip, stamp, base)


class NvCodecEncoder(AccessUnits):
    """PyNvVideoCodec's H.264 encoder, fed from host memory.

    ``crf`` becomes the target quality (``cq``) of the variable bit rate, 1 to 51, as in
    :func:`lp_edge.runtime.hardware_video.nvenc_options`. Without B pictures, so that order and times stay plain.

    Raises:
        ImportError, RuntimeError: PyNvVideoCodec, the driver's libraries or NVENC itself are not there.
    """

    def __init__(self, size: tuple[int, int], fps: Fraction, crf: int, device: int) -> None:
        width, height = size
        self._encoder: Any = _module().CreateEncoder(
            width,
            height,
            "NV12",
            True,
            gpu_id=device,
            codec="h264",
            preset="P4",
            tuning_info="high_quality",
            rc="vbr",
            cq=max(1, crf),
            bf=0,
            gop=250,
            idrperiod=250,
            fps=max(1, round(fps)),
        )

    def encode(self, frame: av.VideoFrame) -> list[bytes]:
        pixels = np.ascontiguousarray(repacked(frame, "nv12").to_ndarray())
        return self._units(self._encoder.Encode(pixels))

    def finish(self) -> list[bytes]:
        return self._units(self._encoder.EndEncode())

    @staticmethod
    def _units(packets: list[dict[str, Any]]) -> list[bytes]:
        return [bytes(packet["data"]) for packet in packets]

    def close(self) -> None:
        self._encoder = None  # it has no call of its own for this: the session ends with the object
