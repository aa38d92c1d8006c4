"""Jetson's decoder and encoder through ``gst-launch-1.0``, a program beside this one with pipes between.

A process, not the Python binding: the binding belongs to the system's Python and is missing in a virtual environment,
and a pipeline that crashes takes nothing else along. Media go through pipes of their own, because NVIDIA's elements
print remarks to standard output.

Frames are NV12 as GStreamer lays it out in memory: rows of luma, then rows of interleaved chroma, each row padded to
a multiple of 4 bytes.
"""

from __future__ import annotations

import heapq
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from fractions import Fraction
from typing import IO, Any, Final

import av
import numpy as np
import numpy.typing as npt

from lp_edge.errors import BackendUnavailable
from lp_edge.runtime.hardware_video_packets import (
    AccessUnits,
    Clip,
    Stamp,
    annex_b,
    is_8_bit_420,
    like,
    open_stream,
    split_units,
)
from lp_edge.runtime.media_read import repacked

__all__ = ["GStreamerEncoder", "gstreamer_frames"]

U8 = npt.NDArray[np.uint8]

_PROGRAM: Final = "gst-launch-1.0"
_SILENCE: Final = 30.0  # seconds without a byte in either direction after which a pipeline counts as stuck
_CHUNK: Final = 1 << 20
_QUEUE: Final = "queue max-size-buffers=4 max-size-bytes=0 max-size-time=0"


class _Pipeline:
    """A running pipeline: bytes in, bytes out, without threads of ours.

    Args:
        elements: what stands between source and sink, joined by ``!``.
        block: bytes the source reads at once.

    Raises:
        BackendUnavailable: the program is not installed.
    """

    def __init__(self, elements: str, block: int) -> None:
        program = shutil.which(_PROGRAM)
        if program is None:
            raise BackendUnavailable(f"{_PROGRAM} is not installed")
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        inner_in, self._in = os.pipe()
        self._out, inner_out = os.pipe()
        words = f"fdsrc fd={inner_in} blocksize={block} ! {elements} ! fdsink fd={inner_out} sync=false"
        try:
            self._process = subprocess.Popen(
                [program, "-q", *words.split()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(inner_in, inner_out),
            )
        except OSError as error:
            os.close(self._in)
            os.close(self._out)
            self._log.close()
            raise BackendUnavailable(f"{_PROGRAM} cannot be started ({error.strerror})") from error
        finally:
            os.close(inner_in)
            os.close(inner_out)
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._ended = self._broken = False

    def exchange(self, data: bytes) -> bytes:
        """Write all of ``data``; returns what came out meanwhile.

        When the process ends early, what it gave before comes first, and the error with the next call.
        """
        rest, parts = memoryview(data), list[bytes]()
        while rest and not self._broken:
            ready_out, ready_in = self._wait(True)
            if ready_out:
                parts.append(self._read())
            if ready_in:
                try:
                    rest = rest[os.write(self._in, rest) :]
                except BrokenPipeError:
                    self._broken = True
        if self._broken:
            parts += self._drain()
            if not any(parts):
                raise self._failure("it ended early")
        return b"".join(parts)

    def _drain(self) -> Iterator[bytes]:
        while not self._ended:
            self._wait(False)
            yield self._read()

    def finish(self) -> Iterator[bytes]:
        """Close the input; gives what is still to come out, piece by piece."""
        self._close_input()
        yield from self._drain()
        try:
            code = self._process.wait(_SILENCE)
        except subprocess.TimeoutExpired:
            raise self._failure("it does not end") from None
        if code:
            raise self._failure(f"it ended with status {code}")
        if self._broken:
            raise self._failure("it ended early")

    def _wait(self, write: bool) -> tuple[bool, bool]:
        poll = select.poll()  # takes any descriptor; select() stops at 1024
        if not self._ended:
            poll.register(self._out, select.POLLIN)
        if write:
            poll.register(self._in, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poll.poll(_SILENCE * 1000)}
        if not ready:
            raise self._failure(f"nothing has moved for {_SILENCE:.0f} s")
        return self._out in ready, self._in in ready

    def _read(self) -> bytes:
        try:
            data = os.read(self._out, _CHUNK)
        except BlockingIOError:
            return b""
        self._ended = not data
        return data

    def _failure(self, what: str) -> BackendUnavailable:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # its last words
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        told = [line for line in lines if line.startswith(("ERROR", "WARNING"))] or lines[-1:]
        return BackendUnavailable(f"{_PROGRAM}: {what}" + (f" ({told[0].strip()})" if told else ""))

    def _close_input(self) -> None:
        if self._in >= 0:
            os.close(self._in)
            self._in = -1

    def close(self) -> None:
        """End the process. May be called more than once."""
        if self._log.closed:
            return
        self._close_input()
        os.close(self._out)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()


def _layout(width: int, height: int) -> tuple[int, int]:
    """(bytes of a row, rows) of an NV12 frame in GStreamer's memory."""
    return -(-width // 4) * 4, height * 3 // 2


def _to_bytes(frame: av.VideoFrame) -> bytes:
    pixels: Any = repacked(frame, "nv12").to_ndarray()
    row, rows = _layout(frame.width, frame.height)
    if row == frame.width:
        return bytes(np.ascontiguousarray(pixels).data)
    out = np.zeros((rows, row), np.uint8)
    out[:, : frame.width] = pixels
    return out.tobytes()


# -- decoder -------------------------------------------------------------------------------------------------------


def gstreamer_frames(clip: Clip, device: int) -> Generator[av.VideoFrame, None, None]:
    """Frames that Jetson's ``nvv4l2decoder`` gives, H.264 and H.265 of 8 bits.

    A pipe carries no times. The frames come in the order in which they are shown, so each takes the earliest time of
    the packets that were fed and not yet shown; that there is one frame for each packet is checked at the end.

    Args:
        clip: the clip.
        device: not used; a Jetson has one.

    Raises:
        BackendUnavailable: no GStreamer, no such element, a codec it is not used for, or it failed.
    """
    with open_stream(clip) as (container, stream):
        name = stream.codec_context.name
        width, height = clip.first.width, clip.first.height
        if name not in ("h264", "hevc") or not is_8_bit_420(clip) or width % 2 or height % 2:
            raise BackendUnavailable(
                f"{name} in {clip.first.format.name} of {width}x{height} is not carried this way"
            )
        parser = "h264parse" if name == "h264" else "h265parse"
        # Frames of another size in mid-stream are scaled to that of the first one, as the software path does.
        elements = f"{parser} ! nvv4l2decoder ! nvvidconv ! video/x-raw,format=NV12,width={width},height={height} ! {_QUEUE}"
        row, rows = _layout(width, height)
        base = stream.time_base or Fraction(1, 1000)
        waiting: list[tuple[int, int, Stamp]] = []  # by time, then by order
        ready = bytearray()
        fed = given = 0

        def frames() -> Generator[av.VideoFrame, None, None]:
            nonlocal given
            while len(ready) >= row * rows:
                if not waiting:
                    raise BackendUnavailable(
                        f"{_PROGRAM} gave more frames than packets ({given + 1} of {fed})"
                    )
                pixels = np.frombuffer(bytes(ready[: row * rows]), np.uint8).reshape(rows, row)[:, :width]
                del ready[: row * rows]
                given += 1
                stamp = heapq.heappop(waiting)[2]
                if stamp.shown:
                    yield like(np.ascontiguousarray(pixels), clip, stamp, base)

        with closing(_Pipeline(elements, 1 << 16)) as pipeline:
            for data, stamp in annex_b(container, stream):
                heapq.heappush(waiting, (fed if stamp.pts is None else stamp.pts, fed, stamp))
                fed += 1
                ready += pipeline.exchange(data)
                yield from frames()
            for piece in pipeline.finish():
                ready += piece
                yield from frames()
        if given != fed:
            raise BackendUnavailable(
                f"{_PROGRAM} gave {given} frames for {fed} packets, so that times are unknown"
            )


# -- encoder -------------------------------------------------------------------------------------------------------


class GStreamerEncoder(AccessUnits):
    """Jetson's ``nvv4l2h264enc`` (Orin Nano has none).

    ``crf`` becomes the constant quantiser of all pictures (``quant-i-frames``, ``quant-p-frames``), 0 to 51 on the
    scale of H.264. Without B pictures.

    Raises:
        BackendUnavailable: no GStreamer, no such element, or it failed.
    """

    def __init__(self, size: tuple[int, int], fps: Fraction, crf: int, device: int) -> None:
        width, height = size
        row, rows = _layout(width, height)
        self._pipeline = _Pipeline(
            f"rawvideoparse format=nv12 width={width} height={height} framerate={fps.numerator}/{fps.denominator} ! "
            "nvvidconv ! video/x-raw(memory:NVMM),format=NV12 ! "
            f"nvv4l2h264enc ratecontrol-enable=false quant-i-frames={crf} quant-p-frames={crf} num-B-Frames=0 "
            "profile=4 iframeinterval=250 idrinterval=250 insert-sps-pps=true insert-aud=true maxperf-enable=true ! "
            f"h264parse ! video/x-h264,stream-format=byte-stream,alignment=au ! {_QUEUE}",
            row * rows,
        )
        self._rest = b""

    def encode(self, frame: av.VideoFrame) -> list[bytes]:
        return self._units(self._pipeline.exchange(_to_bytes(frame)))

    def finish(self) -> list[bytes]:
        units = self._units(b"".join(self._pipeline.finish()))
        return [*units, self._rest] if self._rest else units

    def _units(self, data: bytes) -> list[bytes]:
        units, self._rest = split_units(self._rest + data) if data else ([], self._rest)
        return units

    def close(self) -> None:
        self._pipeline.close()
