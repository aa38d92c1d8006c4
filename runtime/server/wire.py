"""Messages ↔ what the runtime works with: options, motion, states, times, errors. Pure functions, for server and client.

Everything a message may say is checked here, once: numbers are finite and in their ranges, enum numbers are known, lists have
the length they must have. Whatever a message holds, the answer is a value or one of :mod:`lp_edge.errors`.

Numbers of options are float32 on the wire and stand for the shortest decimal that gives them: 0.8 arrives as 0.8, not as
0.800000012, which a slider that ends at 0.8 would refuse.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, Message

from lp_edge import errors
from lp_edge.errors import (
    AccessError,
    ConfigError,
    DeadlineError,
    Interrupted,
    LimitError,
    LpEdgeError,
    NotFoundError,
    ProtocolError,
    ServerUnavailable,
)
from lp_edge.proto.v1 import animation_pb2, common_pb2, portraits_pb2, server_pb2
from lp_edge.runtime.crop import CropOptions
from lp_edge.runtime.edit import OPEN_EYE, SLIDERS, Edits, slider_name
from lp_edge.runtime.face_motion import Canonical, motion_from_points
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.liveportrait_options import LivePortraitOptions
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.templates import KEYPOINTS, MAGNITUDES, MIN_SCALE

__all__ = [
    "ERROR_METADATA",
    "RETRY_METADATA",
    "FrameOrder",
    "MotionSpace",
    "animate_options",
    "choice",
    "edit_infos",
    "error_from_metadata",
    "error_metadata",
    "face_state",
    "frame_timings",
    "motion_from_message",
    "motion_to_message",
    "portrait_options_message",
]

F32 = npt.NDArray[np.float32]
_T = TypeVar("_T")

ERROR_METADATA: Final = "lp-edge-error-bin"
"""Key of the trailing metadata that carries an ErrorDetail."""
RETRY_METADATA: Final = "grpc-retry-pushback-ms"
"""Key of the trailing metadata that tells gRPC's own retries how long to wait (gRFC A6)."""

_REGIONS: Mapping[int, str] = {
    common_pb2.REGION_UNSPECIFIED: "all",
    common_pb2.REGION_ALL: "all",
    common_pb2.REGION_EXPRESSION: "exp",
    common_pb2.REGION_POSE: "pose",
    common_pb2.REGION_LIP: "lip",
    common_pb2.REGION_EYES: "eyes",
}
_DRIVING_CROPS: Mapping[int, str] = {
    common_pb2.DRIVING_CROP_UNSPECIFIED: "auto",
    common_pb2.DRIVING_CROP_AUTO: "auto",
    common_pb2.DRIVING_CROP_ON: "on",
    common_pb2.DRIVING_CROP_OFF: "off",
}
_DRIVING_OPTIONS: Mapping[int, str] = {
    common_pb2.DRIVING_OPTION_UNSPECIFIED: "expression-friendly",
    common_pb2.DRIVING_OPTION_EXPRESSION_FRIENDLY: "expression-friendly",
    common_pb2.DRIVING_OPTION_POSE_FRIENDLY: "pose-friendly",
}
_FACE_STATES: Mapping[str, int] = {
    "none": common_pb2.FACE_STATE_NONE,
    "tracked": common_pb2.FACE_STATE_TRACKED,
    "reacquired": common_pb2.FACE_STATE_REACQUIRED,
    "lost": common_pb2.FACE_STATE_LOST,
    "template": common_pb2.FACE_STATE_MOTION,
}


# -- enums ----------------------------------------------------------------------------------------------


def choice(name: str, number: int, choices: Mapping[int, _T]) -> _T:
    """What an enum's number stands for; proto3 lets any number through.

    Raises:
        ConfigError: it is unknown; the message lists the choices.

    Example:
        >>> choice("the pixel format", 2, {1: "RGB24", 2: "BGR24"})
        'BGR24'
    """
    if number not in choices:
        known = ", ".join(f"{key} ({value})" for key, value in choices.items())
        raise ConfigError(
            f"{name} is {number}",
            f"expected one of {known}",
            "build the client from this server's .proto files",
        )
    return choices[number]


def face_state(state: str) -> int:
    """FaceState of a driving step's state: ``none``, ``tracked``, ``reacquired``, ``lost``, ``template`` (the driver was motion).

    Others, such as ``edit``, are UNSPECIFIED: nothing is known about a face.
    """
    return _FACE_STATES.get(state, common_pb2.FACE_STATE_UNSPECIFIED)


# -- options --------------------------------------------------------------------------------------------


def animate_options(
    portrait: portraits_pb2.PortraitOptions, animation: common_pb2.AnimationOptions, family: str
) -> AnimateOptions:
    """The options that two messages make together; what they leave out has lp-run's default.

    Args:
        portrait: faces, size and crop.
        animation: how motion is put on them.
        family: of the server's bundle, ``mesh`` or ``liveportrait``.

    Raises:
        ConfigError: a value is out of range or not finite, an enum's number or a slider's name is unknown, or an option of the
            family liveportrait is set, be it to its default, while the server has another one.

    Example:
        >>> message = common_pb2.AnimationOptions(multiplier=1.5, edits={"smile": 0.4})
        >>> animate_options(portraits_pb2.PortraitOptions(), message, "mesh").edits.smile
        0.4
    """
    own = animation.liveportrait
    if family != "liveportrait" and (foreign := [*_leaves(portrait.crop), *_leaves(own)]):
        raise ConfigError(
            f"{', '.join(foreign)} set for the family {family}",
            "expected these only with the family liveportrait",
            "leave them out, or use a server with a bundle of that family",
        )
    if len(portrait.faces) > 64:  # more than the largest number of faces takes
        raise ConfigError(
            f"faces is {len(portrait.faces)} characters long", "expected 64 at most", "use largest"
        )
    crop = {
        **_given(portrait.crop, "scale", "vx", "vy", "rotate"),
        **{f"driving_{key}": value for key, value in _given(own.driving_crop, "scale", "vx", "vy").items()},
    }
    switches = (
        "stitching", "eye_retargeting", "lip_retargeting", "normalize_lip", "lip_normalize_threshold",
        "keep_pose_with_retargeting",
    )  # fmt: skip
    return AnimateOptions(
        **_given(animation, "relative", "multiplier", "smooth", "paste_back"),
        region=choice("region", animation.region, _REGIONS),
        faces=portrait.faces or "largest",
        size=portrait.size or None,
        edits=_edits(animation.edits),
        crop=CropOptions(**crop),
        driving_crop=choice("driving_crop", own.driving_crop.crop, _DRIVING_CROPS),
        liveportrait=LivePortraitOptions(
            driving_option=choice("driving_option", own.driving_option, _DRIVING_OPTIONS),
            **_given(own, *switches),
        ),
    )


def _leaves(message: Message) -> Iterator[str]:
    """Names of the fields that are set, those of messages inside included."""
    for field, value in message.ListFields():
        if isinstance(value, Message):
            yield from (f"{field.name}.{name}" for name in _leaves(value))
        else:
            yield field.name


def _given(message: Any, *names: str) -> dict[str, Any]:
    """The optional fields that are set, by name."""
    values = {name: getattr(message, name) for name in names if message.HasField(name)}
    return {name: _decimal(value) if isinstance(value, float) else value for name, value in values.items()}


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32."""
    return float(str(np.float32(value)))


def _edits(values: Mapping[str, float]) -> Edits:
    sliders: dict[str, float] = {}
    for text, value in values.items():
        if len(text) > 64:
            raise ConfigError(
                f"an edit's name of {len(text)} characters", f"expected one of {', '.join(SLIDERS)}", ""
            )
        name = slider_name(text)
        if name in sliders:
            raise ConfigError(f"edit {name} is given twice", "expected every name once", "drop one of them")
        sliders[name] = _decimal(value)
    return Edits(**sliders)


def portrait_options_message(options: AnimateOptions) -> portraits_pb2.PortraitOptions:
    """Faces, size and crop as a message that :func:`animate_options` reads back; defaults of the crop are left out."""
    message = portraits_pb2.PortraitOptions(faces=options.faces, size=options.size or 0)
    default = CropOptions()
    for name in ("scale", "vx", "vy", "rotate"):
        if (value := getattr(options.crop, name)) != getattr(default, name):
            setattr(message.crop, name, value)
    return message


def edit_infos() -> list[server_pb2.EditInfo]:
    """Name, range and meaning of every slider, for ServerInfo."""
    return [
        server_pb2.EditInfo(
            name=name, minimum=s.low, maximum=s.high, neutral=s.default, unit=s.unit, description=s.text
        )
        for name, s in SLIDERS.items()
    ]


class FrameOrder:
    """The order of a stream's frames: numbers from 1 on and times from 0 on, both growing.

    Attributes:
        sequence, timestamp_us: of the newest frame; 0 and -1 before the first.
    """

    def __init__(self) -> None:
        self.sequence, self.timestamp_us = 0, -1

    def follow(self, frame: animation_pb2.DrivingFrame) -> None:
        """Take the next frame. ProtocolError: it does not come after the last one."""
        if not self.sequence < frame.sequence < 1 << 63 or frame.timestamp_us <= self.timestamp_us:
            raise ProtocolError(
                f"frame {frame.sequence} at {frame.timestamp_us} us after frame {self.sequence} at {self.timestamp_us} us",
                "expected a larger number, from 1 to 2^63 - 1, and a later time, from 0 on",
                "send the frames in order",
            )
        self.sequence, self.timestamp_us = frame.sequence, frame.timestamp_us


# -- motion ---------------------------------------------------------------------------------------------

_MAX_ANGLE, _MAX_COEFFICIENT = 360.0, 1e5
_RATIOS = ("left_eye_ratio", "right_eye_ratio", "lip_ratio")


@dataclass(frozen=True)
class MotionSpace:
    """What the expression of a family's motion is made of.

    The family mesh sends an expression ``e [478, 3]`` as its coefficients ``c = B e`` in the K = 32 orthonormal directions ``B
    [K, 478, 3]`` of the canonical face, and reads it back as ``Bᵀ c``. What lies outside of them is lost: nearly all of the shape
    of the driver's face, which relative composition (``e - e_neutral``) takes out anyway, and the finest of its expression.

    Measured on four clips that drive two pictures, 280 frames: against the keypoints' layout, which is exact to 0.0001 pixels,
    the composed mesh points are off by 0.5 % of the distance between the eyes (mean; 99 % of them by less than 2.2 %, the
    motion itself moves them by 26 %), and the rendered crops by 0.7 levels of 255 (the motion: 16). Absolute composition
    looks at the basis alone: 0.02 %.

    Attributes:
        family: ``mesh`` or ``liveportrait``.
        keypoints: K, 478 or 21.
        canonical: the bundle's canonical face; needed by mesh, of no use to liveportrait.

    Raises:
        ConfigError: an unknown family, another number of keypoints than it has, or a mesh without canonical face.
    """

    family: str
    keypoints: int
    canonical: Canonical | None = None

    def __post_init__(self) -> None:
        if KEYPOINTS.get(self.family) != self.keypoints or (self.family == "mesh" and self.canonical is None):
            raise ConfigError(
                f"motion of the family {self.family!r} with {self.keypoints} keypoints and "
                f"{'no' if self.canonical is None else 'a'} canonical face",
                f"expected {dict(KEYPOINTS)}, and a canonical face for mesh",
                "take them from one bundle",
            )

    @property
    def basis(self) -> F32 | None:
        """Float32 ``[K, 478, 3]``, what coefficients count in; None for families without."""
        return self.canonical.basis if self.canonical is not None and self.family == "mesh" else None

    @property
    def rest(self) -> Motion:
        """A frontal face at rest, in the middle of 512x512 pixels with 100 between its eyes (mesh), or of the crop (liveportrait)."""
        if self.family == "mesh" and self.canonical is not None:
            return motion_from_points(self.canonical.points * 100.0 + (256.0, 256.0, 0.0), self.canonical)
        still = np.zeros((self.keypoints, 3), np.float32)
        eyes = np.full(2, OPEN_EYE, np.float32)
        return Motion(np.eye(3, dtype=np.float32), still[0], np.float32(1), still, eyes, np.float32(0))

    @property
    def info(self) -> server_pb2.MotionInfo:
        """What ServerInfo says about it."""
        return server_pb2.MotionInfo(
            family=self.family,
            layout=self.layout,  # type: ignore[arg-type]
            expression_size=self.expression_size(),
            keypoints=self.keypoints,
            neutral=motion_to_message(self.rest, self),
        )

    @property
    def layout(self) -> int:
        """The family's own ExpressionLayout: coefficients (mesh) or keypoints (liveportrait)."""
        if self.basis is not None:
            return common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS
        return common_pb2.EXPRESSION_LAYOUT_KEYPOINTS

    def resolve(self, layout: int) -> int:
        """The layout that a message's number means; unspecified = the family's own.

        Raises:
            ConfigError: an unknown number, or coefficients for a family without a basis.
        """
        known = {0: "the family's own", common_pb2.EXPRESSION_LAYOUT_KEYPOINTS: "keypoints"}
        if self.basis is not None:
            known[common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS] = "coefficients"
        choice(f"the expression layout for the family {self.family}", layout, known)
        return layout or self.layout

    def expression_size(self, layout: int = 0) -> int:
        """Numbers that ``Motion.expression`` has in a layout."""
        if self.resolve(layout) == common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS and self.basis is not None:
            return int(self.basis.shape[0])
        return self.keypoints * 3


def motion_from_message(message: common_pb2.Motion, space: MotionSpace) -> Motion:
    """Motion of one frame, float32.

    Args:
        message: angles within ±360 degrees, translation within ±1e6, scale 1e-6 to 1e6, ratios 0 to 1e6, keypoints' displacements
            within ±1000, coefficients within ±1e5: far beyond any face, and near enough for float32 to stay finite.
        space: what its expression is.

    Raises:
        ProtocolError: a number is NaN, infinite or out of bounds, or a list has another length.
        ConfigError: a layout that the family does not have.
    """
    layout = space.resolve(message.layout)
    coefficients = layout == common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS
    missing = [name for name in _RATIOS if not message.HasField(name)]
    if missing:
        raise ProtocolError(
            f"a motion without {', '.join(missing)}",
            "expected all three ratios",
            "send those of ServerInfo.motion.neutral where they are not known",
        )
    angles = _numbers("angles", (message.pitch, message.yaw, message.roll), 3, -_MAX_ANGLE, _MAX_ANGLE)
    most = MAGNITUDES
    translation = _numbers("translation", message.translation, 3, -most["translation"], most["translation"])
    (scale,) = _numbers("scale", (message.scale,), 1, MIN_SCALE, most["scale"])
    given = (getattr(message, name) for name in _RATIOS)
    ratios = _numbers("eye and lip ratios", given, 3, 0.0, most["lip_ratio"])
    bound = _MAX_COEFFICIENT if coefficients else most["expression"]
    expression = _numbers("expression", message.expression, space.expression_size(layout), -bound, bound)
    if coefficients and space.basis is not None:
        expression = np.tensordot(expression, space.basis, axes=(0, 0))
    return Motion(
        rotation=rotation_from_euler(*angles).astype(np.float32),
        translation=translation,
        scale=scale,
        expression=np.ascontiguousarray(expression.reshape(space.keypoints, 3), np.float32),
        eye_ratio=ratios[:2].copy(),
        lip_ratio=ratios[2],
    )


def _numbers(name: str, values: Iterable[float], count: int, low: float, high: float) -> F32:
    """Float32 ``[count]`` of a message's numbers."""
    array = np.array(list(values), np.float32)
    if array.shape != (count,):
        raise ProtocolError(
            f"{name} of the motion: {array.size} numbers",
            f"expected {count}",
            "send what ServerInfo.motion describes",
        )
    good = (array >= low) & (array <= high)  # NaN fails as well
    if not good.all():
        raise ProtocolError(
            f"{name} of the motion: number {int(good.argmin())} is {array[good.argmin()]}",
            f"expected {low:g} to {high:g}",
            "leave the frame out, or correct it",
        )
    return array


def motion_to_message(motion: Motion, space: MotionSpace, layout: int = 0) -> common_pb2.Motion:
    """One frame of motion as a message.

    Args:
        motion: one frame, without leading axis.
        space: what its expression is.
        layout: ExpressionLayout of the answer; unspecified = the family's own.

    Raises:
        ConfigError: a layout that the family does not have.
    """
    layout = space.resolve(layout)
    expression = motion.expression
    if layout == common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS and space.basis is not None:
        expression = np.tensordot(space.basis, expression, axes=([1, 2], [0, 1]))
    pitch, yaw, roll = (float(angle) for angle in motion.angles)
    left, right = (float(ratio) for ratio in motion.eye_ratio)
    return common_pb2.Motion(
        pitch=pitch,
        yaw=yaw,
        roll=roll,
        translation=motion.translation.tolist(),
        scale=float(motion.scale),
        expression=expression.ravel().tolist(),
        layout=layout,  # type: ignore[arg-type]
        left_eye_ratio=left,
        right_eye_ratio=right,
        lip_ratio=float(motion.lip_ratio),
    )


# -- times ----------------------------------------------------------------------------------------------


def frame_timings(
    received_ns: int, stages: Iterable[tuple[str, float, float]], total_s: float
) -> common_pb2.FrameTimings:
    """What was done with a frame when.

    Args:
        received_ns: ``time.time_ns()`` when the frame's message was read.
        stages: name, start in seconds after that, duration in seconds; in any order.
        total_s: seconds from then until the answer goes out.

    Returns:
        The message, stages in the order of their beginning; what is negative counts as 0.
    """

    def micros(seconds: float) -> int:
        return min(max(round(seconds * 1e6), 0), 2**32 - 1)

    return common_pb2.FrameTimings(
        received_us=received_ns // 1000,
        stages=[
            common_pb2.StageTiming(stage=name, start_us=micros(start), duration_us=micros(duration))
            for name, start, duration in sorted(stages, key=lambda stage: stage[1])
        ],
        total_us=micros(total_s),
    )


# -- errors ---------------------------------------------------------------------------------------------

_CLASSES: Mapping[str, type[LpEdgeError]] = {name: vars(errors)[name] for name in errors.__all__}
# For errors that do not come from lp-edge: gRPC's own, a proxy's, a newer server's.
_BY_STATUS: Mapping[str, type[LpEdgeError]] = {
    "CANCELLED": Interrupted,
    "INVALID_ARGUMENT": ProtocolError,
    "OUT_OF_RANGE": ProtocolError,
    "DEADLINE_EXCEEDED": DeadlineError,
    "NOT_FOUND": NotFoundError,
    "PERMISSION_DENIED": AccessError,
    "UNAUTHENTICATED": AccessError,
    "RESOURCE_EXHAUSTED": LimitError,
    "UNAVAILABLE": ServerUnavailable,
}
# Metadata are 8 KiB at most by default (gRPC's soft limit), base64 and percent-encoding included.
_MAX_MESSAGE, _MAX_GOT, _MAX_PART = 800, 1000, 500


def error_metadata(
    error: BaseException, stream_id: str = ""
) -> tuple[str, str, tuple[tuple[str, str | bytes], ...]]:
    """What a failed call ends with.

    Errors of lp-edge are told as they are, cut to a few hundred bytes; of all others the client learns only that there
    was one, because their texts are about the server's inside. (Log those before.) Cancellation is CANCELLED, lack of memory
    a LimitError.

    Args:
        error: why.
        stream_id: what the server's log calls the call.

    Returns:
        Name of the gRPC status, its message, and the trailing metadata: ``lp-edge-error-bin`` with an ErrorDetail, and
        ``grpc-retry-pushback-ms`` where the error says when another try makes sense.

    Example:
        >>> error_metadata(NotFoundError("no portrait x"))[:2]
        ('NOT_FOUND', 'no portrait x')
    """
    if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, GeneratorExit)):
        error = Interrupted("the call was cancelled")
    elif isinstance(error, MemoryError):
        error = LimitError(
            "the server is out of memory",
            "expected less at a time",
            "send smaller pictures, or try again later",
        )
    elif not isinstance(error, LpEdgeError):
        where = f", stream {stream_id}" if stream_id else ""
        error = LpEdgeError(f"internal error; see the server's log{where}")
    known = next(name for cls in type(error).__mro__ if (name := cls.__name__) in _CLASSES)
    retry_s = getattr(error, "retry_after_s", 0.0)
    retry_ms = math.ceil(min(retry_s, 86_400.0) * 1000) if retry_s > 0 else 0
    detail = common_pb2.ErrorDetail(
        type=known,
        got=_cut(error.got, _MAX_GOT),
        expected=_cut(error.expected, _MAX_PART),
        remedy=_cut(error.remedy, _MAX_PART),
        retry_after_ms=retry_ms,
        stream_id=_cut(stream_id, 100),
    )
    metadata: list[tuple[str, str | bytes]] = [(ERROR_METADATA, detail.SerializeToString())]
    if retry_ms:
        metadata.append((RETRY_METADATA, str(retry_ms)))
    return error.grpc_status, _cut(str(error), _MAX_MESSAGE), tuple(metadata)


def _cut(text: str, limit: int) -> str:
    """At most ``limit`` bytes of UTF-8, without lone surrogates (which file names may hold)."""
    data = text.encode("utf-8", "replace")
    return data.decode() if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"


def error_from_metadata(
    code_name: str, details: str | None, metadata: Iterable[tuple[str, str | bytes]] | None
) -> LpEdgeError:
    """The error that :func:`error_metadata` told, for clients.

    Args:
        code_name: name of the gRPC status, for instance ``NOT_FOUND``.
        details: its message.
        metadata: trailing metadata.

    Returns:
        An error of the class that the server named, where it is one of :mod:`lp_edge.errors`; else of the class that fits the
        status, LpEdgeError where none does.

    Example:
        >>> error = error_from_metadata(*error_metadata(LimitError("16 streams", retry_after_s=1.5)))
        >>> type(error).__name__, error.retry_after_s
        ('LimitError', 1.5)
    """
    values = {str(key): value for key, value in metadata or ()}
    detail = common_pb2.ErrorDetail()
    raw = values.get(ERROR_METADATA)
    if isinstance(raw, bytes):
        try:
            detail.ParseFromString(raw)
        except DecodeError:
            detail.Clear()
    fallback = _BY_STATUS.get(code_name, LpEdgeError)
    cls = _CLASSES.get(detail.type, fallback)
    parts = (detail.got, detail.expected, detail.remedy)
    if not detail.got:
        parts = (details or f"the call ended with {code_name}", "", "")
        if cls is LpEdgeError:
            parts = (f"{code_name}: {parts[0]}", "", "")
    if not issubclass(cls, (LimitError, ServerUnavailable)):
        return cls(*parts)
    retry_ms = detail.retry_after_ms
    pushback = values.get(RETRY_METADATA, "")
    if not retry_ms and isinstance(pushback, str) and pushback.isascii() and pushback.isdigit():
        retry_ms = int(pushback[:9])
    return cls(*parts, retry_after_s=retry_ms / 1000)
