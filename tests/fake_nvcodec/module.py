"""A PyNvVideoCodec without NVIDIA: its names and rules, with FFmpeg's software underneath.

Held to account: only names that the real module exports (facts.json), packets by pointer, frames that the next call
overwrites, an encoder that takes nothing but NV12 of its own size and options that exist.
"""

from __future__ import annotations

import ctypes
import enum
import json
from dataclasses import dataclass, field
from fractions import Fraction
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np

from lp_edge.tests.fake_gstreamer import nv12
from lp_edge.tests.fake_nvcodec.dump import FACTS as FILE

FACTS: dict[str, Any] = json.loads(FILE.read_text())


@dataclass
class World:
    """What the fake machine can do, and what was asked of it."""

    version: str = FACTS["version"]
    encodes: bool = True
    fails_at_packet: int | None = None
    fails_at_frame: int | None = None
    changes_parameters: bool = False
    tint: int = 0
    asked: list[Any] = field(default_factory=list)


def make_nvcodec(world: World) -> ModuleType:
    """The fake as a module ``PyNvVideoCodec``."""
    module: Any = ModuleType("PyNvVideoCodec")
    module.__version__ = world.version
    for name in ("cudaVideoCodec", "Pixel_Format"):
        members = [m for m in FACTS["130"]["classes"][name] if m not in ("name", "value")]
        setattr(module, name, enum.Enum(name, members))
    codecs: Any = module.cudaVideoCodec
    formats: Any = module.Pixel_Format
    names = {
        codecs.H264: "h264",
        codecs.HEVC: "hevc",
        codecs.VP8: "vp8",
        codecs.VP9: "vp9",
        codecs.AV1: "libdav1d",
    }

    class PacketData:
        bsl = bsl_data = pts = dts = duration = 0

    class PyNvDecoder:
        def __init__(self, codec: Any) -> None:
            self._context: Any = av.codec.CodecContext.create(names[codec], "r")
            self._context.thread_count = 1
            self._packets = 0
            self._buffers: list[Any] = []

        def Decode(self, packet: Any) -> list[Any]:
            for buffer in self._buffers:
                ctypes.memset(buffer, 0x55, len(buffer))
            self._buffers.clear()
            if self._packets == world.fails_at_packet:
                raise RuntimeError("HandlePictureDecode : cuvidDecodePicture returned CUDA_ERROR_UNKNOWN")
            self._packets += 1
            data = ctypes.string_at(packet.bsl_data, packet.bsl) if packet.bsl else b""
            coded = av.Packet(data) if data else None
            if coded is not None:
                coded.pts = packet.pts
            return [self._frame(frame) for frame in self._context.decode(coded)]

        def _frame(self, frame: Any) -> Any:
            pixels = np.ascontiguousarray(nv12(frame))
            pixels[: frame.height] = np.clip(pixels[: frame.height].astype(int) + world.tint, 0, 255)
            buffer = (ctypes.c_char * pixels.nbytes).from_buffer_copy(pixels.tobytes())
            self._buffers.append(buffer)
            return SimpleNamespace(
                shape=list(pixels.shape),
                format=formats.NV12,
                framesize=lambda: pixels.nbytes,
                timestamp=frame.pts,
                GetPtrToPlane=lambda _plane: ctypes.addressof(buffer),
            )

    class PyNvEncoder:
        def __init__(self, size: tuple[int, int], options: dict[str, Any]) -> None:
            unknown = set(options) - set(FACTS["encoder_options"])
            assert not unknown, unknown
            assert (options["codec"], options["bf"]) == ("h264", 0)
            self._size, self._frames = size, 0
            self._context: Any = None
            self._options = options

        def _open(self, crf: int) -> Any:
            context: Any = av.codec.CodecContext.create("libx264", "w")
            context.width, context.height = self._size
            context.pix_fmt, context.time_base = "yuv420p", Fraction(1, int(self._options["fps"]))
            context.options = {
                "crf": str(crf), "preset": "ultrafast", "bf": "0", "x264-params": "repeat-headers=1:rc-lookahead=2",
            }  # fmt: skip
            return context

        def Encode(self, pixels: Any) -> list[dict[str, Any]]:
            width, height = self._size
            assert pixels.shape == (height * 3 // 2, width)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous
            if self._frames == world.fails_at_frame:
                raise RuntimeError("EncodeFrame : NvEncEncodePicture returned NV_ENC_ERR_GENERIC")
            before = []
            if self._context is None:
                self._context = self._open(int(self._options["cq"]))
            elif world.changes_parameters and self._frames == 3:
                before = self._packets(self._context.encode(None))
                self._context = av.codec.CodecContext.create("libx264", "w")
                self._context.width, self._context.height = width, height
                self._context.pix_fmt, self._context.time_base = "yuv420p", Fraction(1, 25)
                self._context.options = {"profile": "baseline", "x264-params": "repeat-headers=1"}
            frame = av.VideoFrame.from_ndarray(pixels, format="nv12").reformat(format="yuv420p")
            frame.pts = self._frames
            self._frames += 1
            return [*before, *self._packets(self._context.encode(frame))]

        def EndEncode(self) -> list[dict[str, Any]]:
            return self._packets(self._context.encode(None)) if self._context is not None else []

        def _packets(self, packets: list[Any]) -> list[dict[str, Any]]:
            return [{"data": bytes(p), "timestamp": p.pts, "picture_type": 0} for p in packets]

    def CreateDecoder(*, gpuid: int, codec: Any, usedevicememory: bool) -> PyNvDecoder:
        assert not usedevicememory
        world.asked.append(("decoder", gpuid, codec.name))
        return PyNvDecoder(codec)

    def CreateEncoder(
        width: int, height: int, fmt: str, usecpuinputbuffer: bool, **options: Any
    ) -> PyNvEncoder:
        assert (fmt, usecpuinputbuffer) == ("NV12", True)
        world.asked.append(("encoder", width, height, options))
        if not world.encodes:
            raise RuntimeError(
                "CreateDefaultEncoderParams : NvEncOpenEncodeSessionEx returned unsupported device"
            )
        return PyNvEncoder((width, height), options)

    for item in (PacketData, PyNvDecoder, PyNvEncoder, CreateDecoder, CreateEncoder):
        setattr(module, item.__name__, item)
    return module
