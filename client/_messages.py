"""Messages of the protocol from and to what the clients take and give; needs protobuf, and decoders only when a picture is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timezone
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lp_edge.client.types import (
    SEND_AS,
    Device,
    Edit,
    ExtractedMotion,
    Face,
    FaceState,
    Frame,
    Limits,
    Load,
    MotionInfo,
    Network,
    Output,
    Picture,
    Portrait,
    Progress,
    RenderedClip,
    ServerInfo,
    Stage,
    Timings,
)
from lp_edge.errors import ConfigError, MediaError
from lp_edge.proto.v1 import animation_pb2, common_pb2, portraits_pb2, server_pb2
from lp_edge.runtime.checks import one_of, within
from lp_edge.runtime.motion import Motion

if TYPE_CHECKING:
    from lp_edge.runtime.crop import CropOptions
    from lp_edge.runtime.face_motion import Canonical
    from lp_edge.runtime.options import AnimateOptions
    from lp_edge.runtime.server.wire import MotionSpace

__all__ = [
    "MotionCodec",
    "PictureReader",
    "Registration",
    "animation_options",
    "check_pixels",
    "extracted_motion",
    "frame_from",
    "image_message",
    "info_from",
    "microseconds",
    "output_options",
    "portrait_from",
    "progress_from",
    "registration",
    "rendered_clip",
]

U8 = npt.NDArray[np.uint8]

# -- to the server ------------------------------------------------------------------------------------------

_REGIONS = {"all": "ALL", "exp": "EXPRESSION", "pose": "POSE", "lip": "LIP", "eyes": "EYES"}
# Fields of AnimateOptions that no message carries, and where they belong.
_ELSEWHERE = {
    "faces": "give it to register()",
    "size": "give it to register()",
    "length": "the server animates pictures with one driver",
    "face_timeout": "a stream waits for its first face",
    "keyframes": "send the edits of each moment with set_options()",
}
_SOURCE_CLIPS = ("source_video_eye_retargeting", "source_video_eye_threshold", "smooth_variance", "animal")
_CROP = ("scale", "vx", "vy", "rotate")


def animation_options(
    options: AnimateOptions | None, *, neutral: bool = False
) -> common_pb2.AnimationOptions:
    """How the driver's motion is put on a portrait; only what differs from the defaults is sent.

    Args:
        options: None = the defaults.
        neutral: whether the call has a place for ``options.neutral``.

    Raises:
        ConfigError: an option is set that the protocol does not carry.
    """
    message = common_pb2.AnimationOptions()
    if options is None:
        return message
    default = type(options)()
    elsewhere = dict(_ELSEWHERE) if neutral else {**_ELSEWHERE, "neutral": "use set_neutral() or neutral="}
    for name, remedy in elsewhere.items():
        if getattr(options, name) != getattr(default, name):
            raise ConfigError(f"the option {name} for a server", "expected it to be left out here", remedy)
    if any(getattr(options.crop, name) != getattr(default.crop, name) for name in _CROP):
        raise ConfigError(
            "the source's crop for a server", "expected it to be left out here", "give it to register()"
        )
    message.region = common_pb2.Region.Value(f"REGION_{_REGIONS[options.region]}")
    for name in ("multiplier", "relative", "smooth", "paste_back"):
        setattr(message, name, getattr(options, name))
    message.edits.update(options.edits.changes())
    _liveportrait(message, options, default)
    return message


def _liveportrait(
    message: common_pb2.AnimationOptions, options: AnimateOptions, default: AnimateOptions
) -> None:
    """A mesh server refuses these even with their default values: only changes are sent."""
    for name in _SOURCE_CLIPS:
        if getattr(options.liveportrait, name) != getattr(default.liveportrait, name):
            raise ConfigError(
                f"the option {name} for a server",
                "expected it to be left out: the server animates pictures",
                "use lp-run",
            )
    own, usual = options.liveportrait, default.liveportrait
    if own.driving_option != usual.driving_option:
        name = own.driving_option.upper().replace("-", "_")
        message.liveportrait.driving_option = common_pb2.DrivingOption.Value(f"DRIVING_OPTION_{name}")
    for name in (
        "stitching",
        "eye_retargeting",
        "lip_retargeting",
        "normalize_lip",
        "lip_normalize_threshold",
        "keep_pose_with_retargeting",
    ):
        if getattr(own, name) != getattr(usual, name):
            setattr(message.liveportrait, name, getattr(own, name))
    if options.driving_crop != default.driving_crop:
        crop = common_pb2.DrivingCrop.Value(f"DRIVING_CROP_{options.driving_crop.upper()}")
        message.liveportrait.driving_crop.crop = crop
    for name in ("scale", "vx", "vy"):
        value = getattr(options.crop, f"driving_{name}")
        if value != getattr(default.crop, f"driving_{name}"):
            setattr(message.liveportrait.driving_crop, name, value)


def output_options(output: Output, encoding: str) -> common_pb2.OutputOptions:
    """How pictures come back; ``encoding`` takes the place of ``auto``."""
    return common_pb2.OutputOptions(
        encoding=common_pb2.OutputEncoding.Value(f"OUTPUT_ENCODING_{encoding.upper()}"),
        width=output.width,
        height=output.height,
        quality=output.quality,
        crf=output.crf,
        keyframe_interval=output.keyframe_interval,
    )


def check_pixels(rgb: U8) -> U8:
    """The array, where it is a picture.

    Raises:
        MediaError: it is not uint8 ``[H, W, 3]``.
    """
    if not isinstance(rgb, np.ndarray) or rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        found = f"{rgb.dtype}{list(rgb.shape)}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
        raise MediaError(
            f"a picture {found}", "expected uint8 [H, W, 3] RGB, or the bytes of a file", "convert it"
        )
    return rgb


def image_message(picture: str | Path | bytes | U8, send_as: str, quality: int) -> common_pb2.Image:
    """A picture to send.

    Args:
        picture: path or bytes of a JPEG, PNG or WebP file, sent as they are, or uint8 ``[H, W, 3]`` RGB.
        send_as: how an array travels, see :data:`lp_edge.client.types.SEND_AS`.
        quality: 1 to 100, for JPEG and WebP.

    Raises:
        MediaError: the file cannot be read, or the array is no picture.
    """
    if isinstance(picture, (str, Path)):
        from lp_edge.runtime.image import read_bytes

        picture = read_bytes(Path(picture))
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return common_pb2.Image(encoded=common_pb2.EncodedImage(data=bytes(picture)))
    check_pixels(picture)
    if send_as == "raw":
        height, width = picture.shape[:2]
        return common_pb2.Image(raw=common_pb2.RawImage(width=width, height=height, data=picture.tobytes()))
    from lp_edge.runtime.image import encode_image

    data = encode_image(picture, f".{send_as}", quality=quality)
    return common_pb2.Image(encoded=common_pb2.EncodedImage(data=data))


@dataclass(frozen=True)
class Registration:
    """What was registered, kept to be registered again with a server that has forgotten it."""

    request: portraits_pb2.RegisterPortraitRequest = field(repr=False)


def registration(
    picture: str | Path | bytes | U8,
    faces: str,
    size: int | None,
    crop: CropOptions | None,
    time_to_live: float | None,
    thumbnail_side: int,
) -> Registration:
    """RegisterPortrait's request; an array travels as PNG, without loss.

    Raises:
        MediaError: the picture cannot be read.
        ConfigError: a number is out of range.
    """
    if size is not None:
        within("size", size, 128, 2048)
    within("thumbnail_side", thumbnail_side, 16, 512)
    request = portraits_pb2.RegisterPortraitRequest(
        image=image_message(picture, "png", 100),
        options=portraits_pb2.PortraitOptions(faces=faces, size=size or 0),
        thumbnail_side=thumbnail_side,
    )
    if crop is not None:
        for name in _CROP:
            if getattr(crop, name) != getattr(type(crop)(), name):
                setattr(request.options.crop, name, getattr(crop, name))
    if time_to_live is not None:
        within("time_to_live", time_to_live, 1e-3, 1e9)
        request.time_to_live.FromNanoseconds(round(time_to_live * 1e9))
    return Registration(request)


def microseconds(seconds: float) -> int:
    """A frame's time as the protocol has it.

    Raises:
        ConfigError: negative, or no number.
    """
    within("timestamp", seconds, 0.0, 9e12)
    return round(seconds * 1e6)


# -- from the server ----------------------------------------------------------------------------------------


def info_from(m: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """The server's description."""
    limits = m.limits
    return ServerInfo(
        version=m.version,
        family=m.bundle.family,
        variant=m.bundle.variant,
        licence=m.bundle.licence,
        manifest_sha256=m.bundle.manifest_sha256,
        networks=tuple(Network(n.name, n.sha256, n.precision) for n in m.bundle.networks),
        devices=tuple(Device(d.name, d.backend, d.threads) for d in m.devices),
        motion=MotionInfo(
            m.motion.family,
            "coefficients" if m.motion.layout == common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS else "keypoints",
            m.motion.expression_size,
            m.motion.keypoints,
            m.motion.neutral if m.motion.HasField("neutral") else None,
        ),
        edits={
            e.name: Edit(
                e.minimum, e.maximum, e.neutral if e.HasField("neutral") else None, e.unit, e.description
            )
            for e in m.edits
        },
        templates=tuple(m.templates),
        limits=Limits(
            max_streams=limits.max_streams,
            max_portraits=limits.max_portraits,
            max_portrait_bytes=limits.max_portrait_bytes,
            max_queue=limits.max_queue,
            max_message_bytes=limits.max_message_bytes,
            max_pixels=limits.max_pixels,
            max_upload_bytes=limits.max_upload_bytes,
            max_shared_memory_bytes=limits.max_shared_memory_bytes,
            max_batch=limits.max_batch,
            max_batch_wait=limits.max_batch_wait.ToNanoseconds() / 1e9,
            portrait_time_to_live=limits.portrait_time_to_live.ToNanoseconds() / 1e9,
            idle_timeout=limits.idle_timeout.ToNanoseconds() / 1e9,
        ),
        load=Load(
            m.load.streams, m.load.portraits, m.load.portrait_bytes, m.load.waiting_calls, m.load.draining
        ),
        versions=dict(m.versions),
        uptime=m.uptime.ToNanoseconds() / 1e9,
    )


def portrait_from(m: portraits_pb2.Portrait, known_as: str | None = None) -> Portrait:
    """A portrait; ``known_as`` = the id under which this client's user knows it."""
    return Portrait(
        id=known_as or m.id,
        width=m.width,
        height=m.height,
        faces=tuple(_face(f) for f in m.faces),
        detected_faces=tuple(_box(b) for b in m.detected_faces),
        thumbnail=m.thumbnail,
        memory_bytes=m.memory_bytes,
        active_streams=m.active_streams,
        created_at=m.created_at.ToDatetime(tzinfo=timezone.utc),
        expires_at=m.expires_at.ToDatetime(tzinfo=timezone.utc),
        size=m.options.size,
    )


def _face(m: portraits_pb2.Face) -> Face:
    points = np.asarray(m.landmarks, np.float32).reshape(-1, 2) if m.landmarks else None
    return Face(_box(m.box), points, m.score)


def _box(m: portraits_pb2.Box) -> tuple[float, float, float, float]:
    return m.left, m.top, m.right, m.bottom


def _name(enum: Any, number: int, prefix: str) -> str:
    """An enum's value as a word; a number that this client does not know yet is ``unknown``."""
    names: Sequence[str] = [name for name, value in enum.items() if value == number]
    word = names[0].removeprefix(prefix).lower() if names else "unspecified"
    return "unknown" if word == "unspecified" else word


def face_state_from(number: int) -> FaceState:
    """Whether the face was seen."""
    state: FaceState = _name(common_pb2.FaceState, number, "FACE_STATE_")  # type: ignore[assignment]
    return state


def frame_from(
    m: animation_pb2.AnimatedFrame,
    pictures: tuple[Picture, ...],
    motion: Motion | None,
    dropped: int,
    round_trip: float | None = None,
) -> Frame:
    """A frame's answer."""
    t = m.timings
    return Frame(
        sequence=m.sequence,
        timestamp=m.timestamp_us / 1e6,
        pictures=pictures,
        face_state=face_state_from(m.face_state),
        motion=motion,
        timings=Timings(
            received=t.received_us / 1e6,
            stages=tuple(Stage(s.stage, s.start_us / 1e6, s.duration_us / 1e6) for s in t.stages),
            total=t.total_us / 1e6,
        ),
        dropped=dropped,
        undecodable=m.undecodable,
        round_trip=round_trip,
    )


def extracted_motion(m: animation_pb2.ExtractedMotion, codec: MotionCodec) -> ExtractedMotion:
    """The motion of one frame."""
    motion = codec.decode(m.motion) if m.HasField("motion") else None
    return ExtractedMotion(m.sequence, m.timestamp_us / 1e6, face_state_from(m.face_state), motion)


def progress_from(m: common_pb2.Progress) -> Progress:
    """How far a long call has come."""
    return Progress(m.frames_done, m.frames_total or None)


def rendered_clip(m: animation_pb2.RenderFinished, path: Path | None) -> RenderedClip:
    """What was rendered."""
    rate = Fraction(max(m.frame_rate.numerator, 1), max(m.frame_rate.denominator, 1))
    return RenderedClip(path, m.frames, rate, m.width, m.height, tuple(m.warnings))


# -- pictures -----------------------------------------------------------------------------------------------


class _Unit:
    """An H.264 access unit, the one before it, and its pixels once they are decoded."""

    __slots__ = ("index", "message", "previous", "rgb")

    def __init__(self, index: int, message: common_pb2.Picture, previous: _Unit | None) -> None:
        self.index, self.message, self.previous = index, message, previous
        self.rgb: U8 | None = None


class PictureReader:
    """Makes :class:`Picture` of the messages of one portrait of one stream; safe to use from several threads.

    What stands for itself is decoded by whoever asks. H.264 units hold on to those before them, back to the last key frame, until
    they are decoded, so that decoding can wait until somebody wants to see one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._decoder: Any = None
        self._newest: _Unit | None = None
        self._decoded = -1

    def picture(self, m: common_pb2.Picture, pixels: U8 | None = None) -> Picture:
        """A picture; ``pixels`` = those that came through shared memory."""
        encoding = _name(common_pb2.OutputEncoding, m.encoding, "OUTPUT_ENCODING_").replace("_", " ")
        decode: Callable[[], U8]
        if pixels is not None:
            shared = pixels

            def decode() -> U8:
                return shared

        elif m.encoding == common_pb2.OUTPUT_ENCODING_H264:
            unit = self._follow(m)

            def decode() -> U8:
                return self._decode_unit(unit)

        else:

            def decode() -> U8:
                from lp_edge.runtime.server.codec import decode_picture

                return decode_picture(m)

        return Picture(encoding, m.width, m.height, m.data, m.keyframe, decode)

    def _follow(self, m: common_pb2.Picture) -> _Unit:
        with self._lock:
            newest = self._newest
            index = 0 if newest is None else newest.index + 1
            self._newest = _Unit(index, m, None if m.keyframe else newest)
            return self._newest

    def _decode_unit(self, unit: _Unit) -> U8:
        with self._lock:
            if unit.rgb is not None:
                return unit.rgb
            chain, each = [], unit
            while each.rgb is None:
                chain.append(each)
                if each.previous is None:
                    break
                each = each.previous
            if chain[-1].index <= self._decoded:
                raise MediaError(
                    f"H.264 picture {unit.index} of the stream, after a later one was decoded",
                    "expected them in order",
                    "read .rgb of each frame before that of the next",
                )
            if self._decoder is None:
                from lp_edge.runtime.server.codec import PictureDecoder

                self._decoder = PictureDecoder()
            for each in reversed(chain):
                pixels: U8 = self._decoder.decode(each.message)
                each.rgb, each.previous, self._decoded = pixels, None, each.index
            return pixels


# -- motion -------------------------------------------------------------------------------------------------


class MotionCodec:
    """Motion to and from messages of one server.

    Args:
        info: what the server's motion is.
        canonical: the mesh's canonical face, whose basis coefficients refer to; None = the one that ships with lp-edge.
    """

    def __init__(self, info: MotionInfo, canonical: Canonical | None) -> None:
        self._info, self._canonical = info, canonical
        self._made: MotionSpace | None = None

    @property
    def _space(self) -> MotionSpace:
        if self._made is None:
            from lp_edge.runtime.face_motion import load_canonical
            from lp_edge.runtime.server.wire import MotionSpace

            canonical = self._canonical
            if canonical is None and self._info.family == "mesh":
                canonical = load_canonical()
            self._made = MotionSpace(self._info.family, self._info.keypoints, canonical)
        return self._made

    def neutral(self) -> Motion:
        """A frontal face at rest; MediaError where the server names none."""
        if self._info.neutral is None:
            raise MediaError(
                "the server names no neutral motion", "expected one", "update it, or extract motion"
            )
        message = common_pb2.Motion()
        message.CopyFrom(self._info.neutral)
        if all(
            abs(value) < 1e-4 for value in message.expression
        ):  # none, which is the same in any layout and basis
            message.layout = common_pb2.EXPRESSION_LAYOUT_KEYPOINTS
            message.expression[:] = [0.0] * (3 * self._info.keypoints)
        return self.decode(message)

    def encode(self, motion: Motion, layout: str = "keypoints") -> common_pb2.Motion:
        """A message of one frame's motion.

        Args:
            motion: one frame, without leading axis.
            layout: ``keypoints`` (exact) or ``coefficients`` (family mesh: 32 numbers, what the basis can express).

        Raises:
            MediaError, ConfigError: the motion is of another family, or no motion.
        """
        from lp_edge.runtime.server.wire import motion_to_message

        if np.ndim(motion.scale) != 0:
            raise MediaError(
                f"motion of {np.size(motion.scale)} frames", "expected that of one frame", "send motion[i]"
            )
        number = common_pb2.ExpressionLayout.Value(f"EXPRESSION_LAYOUT_{layout.upper()}")
        self._check_basis(number)
        return motion_to_message(motion, self._space, number)

    def decode(self, message: common_pb2.Motion) -> Motion:
        """The motion of a message."""
        from lp_edge.runtime.server.wire import motion_from_message

        self._check_basis(message.layout)
        return motion_from_message(message, self._space)

    def _check_basis(self, layout: int) -> None:
        """ConfigError where coefficients would be read with another basis than the server's."""
        canonical = self._space.canonical
        if canonical is None or layout == common_pb2.EXPRESSION_LAYOUT_KEYPOINTS:
            return
        size = canonical.basis.shape[0]
        if self._info.layout == "coefficients" and size != self._info.expression_size:
            raise ConfigError(
                f"the server's expressions have {self._info.expression_size} coefficients, this client's basis {size}",
                "expected both to have the canonical face of one bundle",
                "give the client canonical=load_canonical(BUNDLE/canonical.npz), or use motion_layout='keypoints'",
            )


def check_sending(send_as: str, quality: int) -> None:
    """ConfigError unless arrays can be sent so."""
    one_of("send_as", send_as, SEND_AS)
    within("quality", quality, 1, 100)
