"""What the clients take and give: frozen dataclasses, without a trace of protobuf.

Times are seconds unless a name says otherwise; pictures are uint8 ``[H, W, 3]`` RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError
from lp_edge.runtime.checks import one_of, within
from lp_edge.runtime.motion import Motion

__all__ = [
    "ENCODINGS",
    "SEND_AS",
    "Device",
    "Edit",
    "ExtractedMotion",
    "Face",
    "FaceState",
    "Frame",
    "Limits",
    "Load",
    "MotionInfo",
    "Network",
    "Output",
    "Picture",
    "Portrait",
    "Progress",
    "RenderedClip",
    "ServerInfo",
    "Stage",
    "Timings",
    "TlsFiles",
]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

FaceState = Literal["unknown", "none", "tracked", "reacquired", "lost", "motion"]
"""Whether the driving face was seen: ``none`` = not yet, ``lost`` = the last motion is held, ``motion`` = the driver was motion."""

ENCODINGS = ("auto", "jpeg", "png", "webp", "raw", "h264", "none")
"""Values of :attr:`Output.encoding`."""
SEND_AS = ("jpeg", "png", "webp", "raw")
"""How arrays travel to the server where there is no shared memory."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files for TLS.

    Attributes:
        ca: certificates that may sign the server's; None = those that gRPC ships with.
        certificate, key: the client's own, for servers that ask for one (mutual TLS); both or none.
        server_name: name that the server's certificate must carry, where the target is called otherwise.

    Raises:
        ConfigError: a certificate without key, or a key without certificate.
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError(
                "a client certificate without key, or a key without certificate",
                "expected both or none",
                "give certificate and key",
            )


@dataclass(frozen=True)
class Output:
    """How pictures come back.

    Attributes:
        encoding: ``auto`` (shared memory where the stream has it, else JPEG), ``jpeg``, ``png``, ``webp``, ``raw``, ``h264`` or ``none``
            (face state, motion and timings only).
        width, height: pixels, 16 to 8192; 0 = as drawn; one of them alone keeps the aspect ratio.
        quality: JPEG and WebP, 1 to 100.
        crf: H.264, 1 (best) to 51.
        keyframe_interval: H.264, frames from one key frame to the next, 1 to 1000.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    encoding: str = "auto"
    width: int = 0
    height: int = 0
    quality: int = 90
    crf: int = 23
    keyframe_interval: int = 60

    def __post_init__(self) -> None:
        one_of("encoding", self.encoding, ENCODINGS)
        for name in ("width", "height"):
            if getattr(self, name) != 0:
                within(name, getattr(self, name), 16, 8192)
        within("quality", self.quality, 1, 100)
        within("crf", self.crf, 1, 51)
        within("keyframe_interval", self.keyframe_interval, 1, 1000)


# -- the server -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network of the server's bundle.

    Attributes:
        name: its name.
        sha256: of its graph, hexadecimal.
        precision: ``fp32`` or ``fp16``.
    """

    name: str
    sha256: str
    precision: str


@dataclass(frozen=True)
class Device:
    """A device of the server.

    Attributes:
        name: the device in words.
        backend: ``cpu``, ``cuda``, ``tensorrt`` …
        threads: threads that execute networks.
    """

    name: str
    backend: str
    threads: int


@dataclass(frozen=True)
class Edit:
    """A slider of the animation options.

    Attributes:
        minimum, maximum: its range.
        neutral: value that changes nothing; None = it is a target, and changes nothing only while it is not set.
        unit: in words.
        description: what it does.
    """

    minimum: float
    maximum: float
    neutral: float | None
    unit: str
    description: str


@dataclass(frozen=True)
class MotionInfo:
    """What motion messages carry.

    Attributes:
        family: ``mesh`` or ``liveportrait``.
        layout: ``coefficients`` or ``keypoints``, the server's own.
        expression_size: numbers of an expression in that layout.
        keypoints: ``K`` of :attr:`lp_edge.runtime.motion.Motion.expression`.
        neutral: message of a frontal face at rest; :meth:`Client.neutral_motion` reads it.
    """

    family: str
    layout: Literal["keypoints", "coefficients"]
    expression_size: int
    keypoints: int
    neutral: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Limits:
    """What the server refuses beyond; 0 where it states none.

    Attributes:
        max_streams: streams at a time.
        max_portraits, max_portrait_bytes: portraits, and their memory together.
        max_queue: frames of a lossless stream that wait in the server.
        max_message_bytes: bytes of a message.
        max_pixels: pixels of a picture.
        max_upload_bytes: bytes of a clip or template.
        max_shared_memory_bytes: bytes of a stream's shared memory; 0 = none is given.
        max_batch, max_batch_wait: frames that one engine call takes, and how long it waits for them.
        portrait_time_to_live: longest time to live of a portrait, and the default.
        idle_timeout: a stream that is silent for longer is ended.
    """

    max_streams: int
    max_portraits: int
    max_portrait_bytes: int
    max_queue: int
    max_message_bytes: int
    max_pixels: int
    max_upload_bytes: int
    max_shared_memory_bytes: int
    max_batch: int
    max_batch_wait: float
    portrait_time_to_live: float
    idle_timeout: float


@dataclass(frozen=True)
class Load:
    """What the server does at the moment.

    Attributes:
        streams, portraits: how many are open, and held.
        portrait_bytes: memory of the portraits.
        waiting_calls: engine calls that wait.
        draining: it stops soon.
    """

    streams: int
    portraits: int
    portrait_bytes: int
    waiting_calls: int
    draining: bool


@dataclass(frozen=True)
class ServerInfo:
    """What the server is.

    Attributes:
        version: of lp-edge.
        family, variant, licence: the bundle's.
        manifest_sha256: of the bundle's manifest, hexadecimal.
        networks, devices: see there.
        motion: what motion messages carry.
        edits: slider → what it is, for :class:`lp_edge.Edits`.
        templates: names that :meth:`Client.render` takes as a driver.
        limits, load: see there.
        versions: package → version.
        uptime: how long it has been running.
    """

    version: str
    family: str
    variant: str
    licence: str
    manifest_sha256: str
    networks: tuple[Network, ...]
    devices: tuple[Device, ...]
    motion: MotionInfo
    edits: Mapping[str, Edit]
    templates: tuple[str, ...]
    limits: Limits
    load: Load
    versions: Mapping[str, str]
    uptime: float


# -- portraits --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    """A face of a portrait.

    Attributes:
        box: left, top, right, bottom in pixels of the picture.
        points: float32 ``[478, 2]``, mesh points in pixels; None in a list of portraits.
        score: how sure the mesh network is, 0 to 1.
    """

    box: tuple[float, float, float, float]
    points: F32 | None
    score: float


@dataclass(frozen=True)
class Portrait:
    """A portrait that the server holds.

    Attributes:
        id: names it; unguessable. Stays valid in a client that reconnects, see ``docs/client.md``.
        width, height: of the picture in pixels.
        faces: those that are animated, in order.
        detected_faces: boxes of all faces from left to right, which indices count; empty in a list of portraits.
        thumbnail: a small JPEG; empty in a list of portraits.
        memory_bytes: memory that it takes on the server.
        active_streams: streams that use it.
        created_at, expires_at: in UTC; it goes unless it is used before.
        size: longer side of the animated crop in pixels.
    """

    id: str
    width: int
    height: int
    faces: tuple[Face, ...]
    detected_faces: tuple[tuple[float, float, float, float], ...]
    thumbnail: bytes
    memory_bytes: int
    active_streams: int
    created_at: datetime
    expires_at: datetime
    size: int


# -- frames -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """When one stage of the work on a frame ran.

    Attributes:
        name: ``decode``, ``queue``, ``track``, ``motion``, ``compose``, ``warp``, ``paste_back``, ``resize``, ``encode``; more may come.
        start, duration: seconds, the start counted from :attr:`Timings.received`.
    """

    name: str
    start: float
    duration: float


@dataclass(frozen=True)
class Timings:
    """What the server did with a frame, by its own clock.

    Attributes:
        received: seconds since the Unix epoch when the frame's message was read.
        stages: in the order in which they began.
        total: seconds from then until the answer was handed to the transport.
    """

    received: float
    stages: tuple[Stage, ...]
    total: float


@dataclass(frozen=True)
class Picture:
    """A picture that came back.

    Attributes:
        encoding: ``jpeg``, ``png``, ``webp``, ``raw``, ``h264`` or ``shared memory``.
        width, height: pixels.
        data: the file, the pixels or the H.264 access unit (Annex B) as it came; empty with shared memory.
        keyframe: H.264: decoding may begin here.
    """

    encoding: str
    width: int
    height: int
    data: bytes = field(repr=False)
    keyframe: bool
    _decode: Callable[[], U8] = field(repr=False, compare=False)

    @cached_property
    def rgb(self) -> U8:
        """uint8 ``[H, W, 3]`` RGB; decoded at the first use.

        H.264 pictures build on each other: the first use decodes all earlier ones since the last key frame, too. One from before
        a key frame that was decoded already cannot be had any more.

        Raises:
            MediaError: the picture is broken, or an H.264 one is asked for too late.
            ProtocolError: it holds another number of bytes than it says.
        """
        return self._decode()


@dataclass(frozen=True)
class Frame:
    """The answer to one driving frame.

    Attributes:
        sequence: the frame's number.
        timestamp: its time in seconds, as sent (to the microsecond).
        pictures: one for each portrait; none with ``Output("none")``.
        face_state: whether the driving face was seen.
        motion: the driver's motion, where it was asked for and there is one.
        timings: when the server did what.
        dropped: frames dropped since the stream began because newer ones had come (live mode), here or in the server.
        undecodable: frames dropped since then because their picture could not be decoded (live mode).
        round_trip: seconds from sending to receiving, by this client's clock; None where the frame was not sent by it.
    """

    sequence: int
    timestamp: float
    pictures: tuple[Picture, ...]
    face_state: FaceState
    motion: Motion | None
    timings: Timings
    dropped: int
    undecodable: int
    round_trip: float | None

    @property
    def rgb(self) -> U8:
        """The first portrait's picture, uint8 ``[H, W, 3]`` RGB, decoded at the first use; see :attr:`Picture.rgb`.

        Raises:
            MediaError: it is broken.
            ConfigError: the stream sends no pictures.
        """
        if not self.pictures:
            raise ConfigError(
                "a frame without pictures",
                "expected an output with pictures",
                "choose another encoding than none",
            )
        return self.pictures[0].rgb


# -- long calls -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a long call has come.

    Attributes:
        frames: finished.
        expected: in all; None = not known.
    """

    frames: int
    expected: int | None


@dataclass(frozen=True)
class ExtractedMotion:
    """The motion of one frame.

    Attributes:
        sequence: number of the frame, as sent, or counted from 0 in a clip.
        timestamp: seconds, as sent, or from the clip's start.
        face_state: whether the face was seen.
        motion: held while the face is lost; None before the first face.
    """

    sequence: int
    timestamp: float
    face_state: FaceState
    motion: Motion | None


@dataclass(frozen=True)
class RenderedClip:
    """What :meth:`Client.render` has made.

    Attributes:
        path: the MP4; None where frames were asked for.
        frames: how many.
        frame_rate: frames a second.
        width, height: pixels.
        warnings: what the user should know.
    """

    path: Path | None
    frames: int
    frame_rate: Fraction
    width: int
    height: int
    warnings: tuple[str, ...]
