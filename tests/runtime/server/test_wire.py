from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("google.protobuf", reason="needs the extra server or client")

from lp_edge import errors
from lp_edge.errors import (
    AccessError,
    ConfigError,
    DeadlineError,
    Interrupted,
    LimitError,
    LpEdgeError,
    MediaError,
    NoFaceError,
    NotFoundError,
    ProtocolError,
    ServerUnavailable,
)
from lp_edge.proto.v1 import common_pb2, portraits_pb2
from lp_edge.runtime.compose import compose
from lp_edge.runtime.crop import CropOptions
from lp_edge.runtime.edit import SLIDERS, Edits
from lp_edge.runtime.face_motion import load_canonical, motion_from_points, points_from_motion
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.liveportrait_options import LivePortraitOptions
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import REGIONS, AnimateOptions
from lp_edge.runtime.server.wire import (
    ERROR_METADATA,
    RETRY_METADATA,
    MotionSpace,
    animate_options,
    choice,
    edit_infos,
    error_from_metadata,
    error_metadata,
    face_state,
    frame_timings,
    motion_from_message,
    motion_to_message,
    portrait_options_message,
)

FACE = load_canonical()
MESH = MotionSpace("mesh", 478, FACE)
LIVE = MotionSpace("liveportrait", 21)
SPACES = st.sampled_from((MESH, LIVE))

AnimationOptions = common_pb2.AnimationOptions
PortraitOptions = portraits_pb2.PortraitOptions
LivePortrait = common_pb2.LivePortraitOptions


def options(
    animation: AnimationOptions | None = None,
    portrait: PortraitOptions | None = None,
    family: str = "liveportrait",
) -> AnimateOptions:
    return animate_options(portrait or PortraitOptions(), animation or AnimationOptions(), family)


# -- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mesh", "liveportrait"])
def test_empty_messages_are_the_defaults(family: str) -> None:
    assert options(family=family) == AnimateOptions()
    empty = AnimationOptions(liveportrait=LivePortrait(driving_crop=common_pb2.DrivingCropOptions()))
    assert options(empty, PortraitOptions(crop=common_pb2.CropOptions()), family) == AnimateOptions()


def test_every_field_arrives() -> None:
    portrait = PortraitOptions(
        faces="2,0", size=512, crop=common_pb2.CropOptions(scale=2.8, vx=0.1, vy=-0.3, rotate=False)
    )
    animation = AnimationOptions(
        region=common_pb2.REGION_LIP, multiplier=1.3, relative=False, smooth=False, paste_back=False,
        edits={"smile": 1.3, "mouth_open": 0.8, "brow": -4.2},
        liveportrait=LivePortrait(
            driving_option=common_pb2.DRIVING_OPTION_POSE_FRIENDLY, stitching=False, eye_retargeting=True,
            lip_retargeting=True, normalize_lip=True, lip_normalize_threshold=0.05, keep_pose_with_retargeting=True,
            driving_crop=common_pb2.DrivingCropOptions(crop=common_pb2.DRIVING_CROP_OFF, scale=3.1, vx=-0.2, vy=0.4),
        ),
    )  # fmt: skip
    own = animation.liveportrait
    for message in (
        portrait,
        portrait.crop,
        animation,
        own,
        own.driving_crop,
    ):  # a new field must come in here
        assert {field.name for field, _ in message.ListFields()} == set(message.DESCRIPTOR.fields_by_name)
    assert options(animation, portrait) == AnimateOptions(
        faces="2,0", size=512, region="lip", multiplier=1.3, relative=False, smooth=False, paste_back=False,
        edits=Edits(smile=1.3, mouth_open=0.8, eyebrow=-4.2),
        crop=CropOptions(2.8, 0.1, -0.3, False, 3.1, -0.2, 0.4), driving_crop="off",
        liveportrait=LivePortraitOptions("pose-friendly", False, True, True, True, 0.05, keep_pose_with_retargeting=True),
    )  # fmt: skip


def test_enums_are_mapped_in_full() -> None:
    for number in common_pb2.Region.values():
        assert options(AnimationOptions(region=number)).region in REGIONS
    regions = {options(AnimationOptions(region=number)).region for number in common_pb2.Region.values()}
    assert regions == set(REGIONS)
    for number in common_pb2.DrivingOption.values():
        options(AnimationOptions(liveportrait=LivePortrait(driving_option=number)))
    for number in common_pb2.DrivingCrop.values():
        crop = common_pb2.DrivingCropOptions(crop=number)
        options(AnimationOptions(liveportrait=LivePortrait(driving_crop=crop)))


@pytest.mark.parametrize("name", SLIDERS)
def test_both_ends_of_a_slider_survive_float32(name: str) -> None:
    info = {i.name: i for i in edit_infos()}[name]
    for value, exact in ((info.minimum, SLIDERS[name].low), (info.maximum, SLIDERS[name].high)):
        assert getattr(options(AnimationOptions(edits={name: value})).edits, name) == exact


def test_sliders_are_described() -> None:
    infos = edit_infos()
    assert [i.name for i in infos] == list(SLIDERS)
    assert all(i.unit and i.description for i in infos)
    assert {i.name for i in infos if not i.HasField("neutral")} == {"mouth_open", "eyes_open"}
    assert next(i for i in infos if i.name == "zoom").neutral == 1.0


@pytest.mark.parametrize(
    ("animation", "portrait", "words"),
    [
        (AnimationOptions(region=17), None, "exp"),
        (AnimationOptions(multiplier=math.nan), None, "multiplier"),
        (AnimationOptions(multiplier=3.1), None, "0.0 to 3.0"),
        (AnimationOptions(edits={"smirk": 1.0}), None, "no edit is called"),
        (AnimationOptions(edits={"s" * 100_000: 1.0}), None, "100000 characters"),
        (AnimationOptions(edits={"smile": math.inf}), None, "edit smile"),
        (AnimationOptions(edits={"smile": 0.1, "Smile ": 0.2}), None, "twice"),
        (AnimationOptions(liveportrait=LivePortrait(driving_option=5)), None, "pose-friendly"),
        (AnimationOptions(liveportrait=LivePortrait(lip_normalize_threshold=math.nan)), None, "lip_normalize"),
        (None, PortraitOptions(faces="everybody"), "faces"),
        (None, PortraitOptions(faces="1" * 5000), "5000 characters"),
        (None, PortraitOptions(size=127), "128 to 2048"),
        (None, PortraitOptions(size=2**32 - 1), "128 to 2048"),
        (None, PortraitOptions(crop=common_pb2.CropOptions(scale=math.nan)), "scale"),
        (None, PortraitOptions(crop=common_pb2.CropOptions(vx=-1.5)), "vx"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(
    animation: AnimationOptions | None, portrait: PortraitOptions | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        options(animation, portrait)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("animation", "portrait", "name"),
    [
        (AnimationOptions(liveportrait=LivePortrait(stitching=True)), None, "stitching"),  # the default
        (AnimationOptions(liveportrait=LivePortrait(driving_option=2)), None, "driving_option"),
        (
            AnimationOptions(liveportrait=LivePortrait(driving_crop=common_pb2.DrivingCropOptions(vx=0.1))),
            None,
            "driving_crop.vx",
        ),
        (None, PortraitOptions(crop=common_pb2.CropOptions(rotate=False)), "rotate"),
    ],
)
def test_a_mesh_server_refuses_what_only_liveportrait_can_do(
    animation: AnimationOptions | None, portrait: PortraitOptions | None, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"{name} set for the family mesh"):
        options(animation, portrait, "mesh")
    options(animation, portrait)


f32 = st.floats(width=32)
optional = lambda values: st.none() | values
portraits = st.builds(
    PortraitOptions,
    faces=st.sampled_from(("", "largest", "all", "0", "2,0", " 1", "0,0", "-1", "²")) | st.text(max_size=80),
    size=st.integers(0, 2**32 - 1) | st.integers(100, 2100),
    crop=st.builds(
        common_pb2.CropOptions,
        scale=optional(f32),
        vx=optional(f32),
        vy=optional(f32),
        rotate=optional(st.booleans()),
    ),
)
enum = st.integers(-3, 9) | st.integers(-(2**31), 2**31 - 1)
animations = st.builds(
    AnimationOptions,
    region=enum,
    multiplier=optional(f32),
    relative=optional(st.booleans()),
    smooth=optional(st.booleans()),
    paste_back=optional(st.booleans()),
    edits=st.dictionaries(st.sampled_from(sorted(SLIDERS)) | st.text(max_size=70), f32, max_size=4),
    liveportrait=st.builds(
        LivePortrait,
        driving_option=enum,
        stitching=optional(st.booleans()),
        lip_normalize_threshold=optional(f32),
        driving_crop=st.builds(
            common_pb2.DrivingCropOptions,
            crop=enum,
            scale=optional(f32),
            vx=optional(f32),
            vy=optional(f32),
        ),
    ),
)


@settings(deadline=None, max_examples=300)
@given(portraits, animations, st.sampled_from(("mesh", "liveportrait")))
def test_any_message_is_options_or_a_config_error(
    portrait: PortraitOptions, animation: AnimationOptions, family: str
) -> None:
    try:
        result = animate_options(portrait, animation, family)
    except ConfigError as error:
        assert error_metadata(error)[0] == "INVALID_ARGUMENT"
        return
    assert math.isfinite(result.multiplier) and result.region in REGIONS


_DEFAULTS = CropOptions()
crops = st.builds(
    CropOptions,
    scale=st.just(_DEFAULTS.scale) | st.floats(1, 10, width=32),
    vx=st.just(_DEFAULTS.vx) | st.floats(-1, 1, width=32),
    vy=st.just(_DEFAULTS.vy) | st.floats(-1, 1, width=32),
    rotate=st.booleans(),
)


@settings(deadline=None)
@given(crops, st.sampled_from(("largest", "all", "1", "2,0")), st.none() | st.integers(128, 2048))
def test_portrait_options_go_there_and_back(crop: CropOptions, faces: str, size: int | None) -> None:
    original = AnimateOptions(crop=crop, faces=faces, size=size)
    message = portrait_options_message(original)
    back = options(portrait=PortraitOptions.FromString(message.SerializeToString()))
    assert (back.faces, back.size, back.crop.rotate) == (faces, size, crop.rotate)
    for name in ("scale", "vx", "vy"):
        assert np.float32(getattr(back.crop, name)) == np.float32(getattr(crop, name))
    assert options(portrait=portrait_options_message(back)) == back


def test_a_mesh_portrait_can_be_registered_again() -> None:
    message = portrait_options_message(AnimateOptions(faces="all", size=256))
    assert not message.HasField("crop")
    assert options(None, message, "mesh") == AnimateOptions(faces="all", size=256)


def test_unknown_enum_numbers_name_the_choices() -> None:
    assert choice("x", 1, {1: "one"}) == "one"
    with pytest.raises(ConfigError, match=r"x is 3; expected one of 1 \(one\), 2 \(two\)"):
        choice("x", 3, {1: "one", 2: "two"})


# -- motion -----------------------------------------------------------------------------------------------

angle = st.floats(-80, 80, width=32)
small = st.floats(-0.3125, 0.3125, width=32)


@st.composite
def motions(draw: st.DrawFn, space: MotionSpace) -> Motion:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    expression = random.normal(0, 0.1, (space.keypoints, 3))
    return Motion(
        rotation=rotation_from_euler(draw(angle), draw(angle), draw(angle)).astype(np.float32),
        translation=random.normal(0, 300, 3).astype(np.float32),
        scale=np.float32(draw(st.floats(0.125, 1000, width=32))),
        expression=expression.astype(np.float32),
        eye_ratio=random.uniform(0, 0.6, 2).astype(np.float32),
        lip_ratio=np.float32(random.uniform(0, 1)),
    )


def same(a: Motion, b: Motion, *, expression: bool = True) -> None:
    for field in fields(Motion):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert np.shape(x) == np.shape(y) and np.asarray(y).dtype == np.float32
        if field.name == "rotation":
            np.testing.assert_allclose(x, y, atol=2e-6)
        elif field.name != "expression" or expression:
            np.testing.assert_array_equal(x, y)


@settings(deadline=None)
@given(st.data(), SPACES)
def test_keypoints_go_there_and_back(data: st.DataObject, space: MotionSpace) -> None:
    motion = data.draw(motions(space))
    message = motion_to_message(motion, space, common_pb2.EXPRESSION_LAYOUT_KEYPOINTS)
    same(motion, motion_from_message(common_pb2.Motion.FromString(message.SerializeToString()), space))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_coefficients_go_there_and_back(data: st.DataObject) -> None:
    motion = data.draw(motions(MESH))
    message = motion_to_message(motion, MESH)
    assert len(message.expression) == 32 and message.ByteSize() < 250
    back = motion_from_message(message, MESH)
    same(motion, back, expression=False)
    again = motion_to_message(back, MESH)  # what the basis holds is kept
    np.testing.assert_allclose(again.expression, message.expression, atol=1e-4)
    # the rest is orthogonal to it: the nearest expression that coefficients can tell
    rest = (motion.expression - back.expression).ravel().astype(np.float64)
    assert np.abs(FACE.basis.reshape(32, -1).astype(np.float64) @ rest).max() < 1e-4


def test_composition_sees_what_the_basis_holds() -> None:
    """The face's own shape, which 32 coefficients do not hold, cancels out in relative composition."""
    random = np.random.default_rng(3)
    shape = random.normal(0, 0.01, (478, 3))
    source = motion_from_points(150 * FACE.points + 300, FACE)
    basis = FACE.basis.astype(np.float64)

    def head(amounts: np.ndarray, yaw: float) -> Motion:
        face = FACE.points + shape + np.tensordot(amounts, basis, axes=(0, 0))
        return motion_from_points(100 * face @ rotation_from_euler(0, yaw, 0).T + 200, FACE)

    neutral, driving = head(np.zeros(32), 0), head(random.normal(0, 0.3, 32), 12)
    sent = [motion_from_message(motion_to_message(m, MESH), MESH) for m in (driving, neutral)]
    lost = np.abs(sent[1].expression - neutral.expression).max()
    assert lost > 0.02  # the shape
    points = [
        points_from_motion(compose(source, d, n, FACE.points.astype(np.float64)), FACE)
        for d, n in ((driving, neutral), sent)
    ]
    away = np.linalg.norm((points[0] - points[1])[:, :2], axis=1)
    assert away.mean() < 0.01 * 150
    assert np.abs(points[0] - points_from_motion(source, FACE)).max() > 0.05 * 150


def test_spaces() -> None:
    assert (MESH.layout, MESH.expression_size(), MESH.expression_size(1)) == (2, 32, 1434)
    assert (LIVE.layout, LIVE.expression_size(), LIVE.expression_size(1)) == (1, 63, 63)
    assert MotionSpace("liveportrait", 21, FACE).layout == 1
    for space in (MESH, LIVE):
        info = space.info
        assert (info.family, info.keypoints, info.expression_size) == (
            space.family,
            space.keypoints,
            len(info.neutral.expression),
        )
        rest = motion_from_message(info.neutral, space)
        assert np.abs(rest.expression).max() < 1e-5
        np.testing.assert_allclose(rest.rotation, np.eye(3), atol=1e-6)
    for wrong in (("mesh", 478, None), ("mesh", 21, FACE), ("cat", 21, None), ("liveportrait", 478, None)):
        with pytest.raises(ConfigError):
            MotionSpace(*wrong)


def good_motion(space: MotionSpace = LIVE, **changes: object) -> common_pb2.Motion:
    return _changed(space.info.neutral, changes)


def _changed(message: common_pb2.Motion, changes: dict[str, object]) -> common_pb2.Motion:
    for name, value in changes.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        elif value is not None:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"pitch": math.nan}, ProtocolError, "angles"),
        ({"yaw": 361.0}, ProtocolError, "number 1 is 361"),
        ({"roll": -math.inf}, ProtocolError, "angles"),
        ({"translation": []}, ProtocolError, "0 numbers; expected 3"),
        ({"translation": [1.0] * 4}, ProtocolError, "4 numbers; expected 3"),
        ({"translation": [0.0, 0.0, 3e38]}, ProtocolError, "number 2"),
        ({"scale": 0.0}, ProtocolError, "scale"),
        ({"scale": -1.0}, ProtocolError, "scale"),
        ({"scale": math.inf}, ProtocolError, "scale"),
        ({"expression": [0.0] * 62}, ProtocolError, "62 numbers; expected 63"),
        ({"expression": []}, ProtocolError, "expected 63"),
        ({"expression": [0.0] * 62 + [math.nan]}, ProtocolError, "number 62 is nan"),
        ({"expression": [2000.0] * 63}, ProtocolError, "-1000 to 1000"),
        ({"left_eye_ratio": -0.1}, ProtocolError, "ratios"),
        ({"lip_ratio": math.nan}, ProtocolError, "ratios"),
        ({"right_eye_ratio": None}, ProtocolError, "without right_eye_ratio"),
        ({"layout": common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS}, ConfigError, "liveportrait is 2"),
        ({"layout": 77}, ConfigError, "77"),
    ],
)
def test_wrong_motion_is_refused(changes: dict[str, object], error: type[Exception], words: str) -> None:
    motion_from_message(good_motion(), LIVE)
    with pytest.raises(error, match=words):
        motion_from_message(good_motion(**changes), LIVE)


floats = f32 | st.floats(-10, 10, width=32)


@settings(deadline=None, max_examples=200)
@given(st.data(), SPACES)
def test_any_motion_is_finite_or_an_error_of_ours(data: st.DataObject, space: MotionSpace) -> None:
    changes: dict[str, object] = {}
    for name in ("pitch", "yaw", "roll", "scale", "left_eye_ratio", "right_eye_ratio", "lip_ratio"):
        if data.draw(st.integers(0, 3)) == 0:
            changes[name] = data.draw(floats)
    if data.draw(st.booleans()):
        changes["translation"] = data.draw(st.lists(floats, min_size=2, max_size=4))
    if data.draw(st.booleans()):
        changes["layout"] = data.draw(enum)
        size = data.draw(st.sampled_from((0, 32, 63, 1434)))
        values = data.draw(st.lists(floats, min_size=3, max_size=3))
        changes["expression"] = (values * (size // 3 + 1))[:size]
    try:
        motion = motion_from_message(good_motion(space, **changes), space)
    except (ProtocolError, ConfigError):
        return
    for field in fields(Motion):
        value = np.asarray(getattr(motion, field.name))
        assert value.dtype == np.float32 and np.isfinite(value).all()
    assert motion.expression.shape == (space.keypoints, 3) and motion.scale > 0
    if space is MESH:
        assert np.isfinite(points_from_motion(motion, FACE)).all()


# -- states and times --------------------------------------------------------------------------------------


def test_face_states() -> None:
    states = {name: face_state(name) for name in ("none", "tracked", "reacquired", "lost", "template")}
    assert set(states.values()) == set(common_pb2.FaceState.values()) - {0}
    assert states["template"] == common_pb2.FACE_STATE_MOTION and face_state("edit") == 0


def test_timings() -> None:
    message = frame_timings(1_700_000_000_000_000_123, [("b", 0.002, 0.0015), ("a", -1e-9, 0.001)], 0.0045)
    assert message.received_us == 1_700_000_000_000_000
    assert [(s.stage, s.start_us, s.duration_us) for s in message.stages] == [
        ("a", 0, 1000),
        ("b", 2000, 1500),
    ]
    assert message.total_us == 4500
    assert frame_timings(0, [], 1e9).total_us == 2**32 - 1


# -- errors -----------------------------------------------------------------------------------------------

CLASSES = [vars(errors)[name] for name in errors.__all__]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_the_wire(cls: type[LpEdgeError]) -> None:
    status, message, metadata = error_metadata(cls("got ü", "expected b", "do c"), "s1")
    assert status == cls.grpc_status and message == str(cls("got ü", "expected b", "do c"))
    detail = common_pb2.ErrorDetail.FromString(dict(metadata)[ERROR_METADATA])
    assert (detail.type, detail.stream_id) == (cls.__name__, "s1")
    back = error_from_metadata(status, message, metadata)
    assert type(back) is cls and (back.got, back.expected, back.remedy) == ("got ü", "expected b", "do c")
    assert str(back) == message


@pytest.mark.parametrize("cls", [LimitError, ServerUnavailable])
def test_advice_to_try_again(cls: type[LimitError | ServerUnavailable]) -> None:
    status, message, metadata = error_metadata(cls("full", retry_after_s=1.25))
    assert dict(metadata)[RETRY_METADATA] == "1250"
    for known in (metadata, metadata[1:]):  # with our detail, and with gRPC's own advice alone
        back = error_from_metadata(status, message, known)
        assert isinstance(back, cls) and back.retry_after_s == 1.25
    assert RETRY_METADATA not in dict(error_metadata(cls("full"))[2])
    for odd in (math.inf, math.nan, -1.0, 1e300):
        assert error_metadata(cls("full", retry_after_s=odd))[0] == cls.grpc_status


def test_unexpected_errors_tell_nothing_of_the_inside() -> None:
    for error in (KeyError("/srv/secret"), RuntimeError("token 1234"), OSError(13, "no", "/etc/x")):
        status, message, metadata = error_metadata(error, "abc")
        assert status == "INTERNAL" and message == "internal error; see the server's log, stream abc"
        assert (
            b"secret" not in dict(metadata)[ERROR_METADATA] and b"1234" not in dict(metadata)[ERROR_METADATA]
        )
    assert error_metadata(MemoryError())[0] == "RESOURCE_EXHAUSTED"
    for error in (asyncio.CancelledError(), KeyboardInterrupt()):
        assert error_metadata(error)[0] == "CANCELLED"


def test_subclasses_travel_as_what_the_client_knows() -> None:
    class Odd(MediaError):
        pass

    status, message, metadata = error_metadata(Odd("x"))
    assert type(error_from_metadata(status, message, metadata)) is MediaError


@settings(deadline=None)
@given(st.text(max_size=30), st.integers(0, 3000), st.text(max_size=100))
def test_metadata_stay_small(text: str, times: int, stream: str) -> None:
    error = NoFaceError(text * times, "\udcff" + "é" * times, text * times)
    status, message, metadata = error_metadata(error, stream)
    assert status == "FAILED_PRECONDITION"
    raw = dict(metadata)[ERROR_METADATA]
    # gRPC percent-encodes messages (up to three for one) and sends -bin keys as base64
    assert len(message.encode()) * 3 + len(raw) * 4 / 3 < 7 * 1024
    back = error_from_metadata(status, message, metadata)
    assert type(back) is NoFaceError


STATUSES = {
    "UNAVAILABLE": ServerUnavailable, "RESOURCE_EXHAUSTED": LimitError, "UNAUTHENTICATED": AccessError,
    "PERMISSION_DENIED": AccessError, "DEADLINE_EXCEEDED": DeadlineError, "NOT_FOUND": NotFoundError,
    "INVALID_ARGUMENT": ProtocolError, "CANCELLED": Interrupted, "INTERNAL": LpEdgeError, "UNKNOWN": LpEdgeError,
    "UNIMPLEMENTED": LpEdgeError,
}  # fmt: skip


@pytest.mark.parametrize(("code", "cls"), STATUSES.items())
def test_errors_of_others_go_by_their_status(code: str, cls: type[LpEdgeError]) -> None:
    for metadata in (None, (), (("x", "y"),), ((ERROR_METADATA, b"\xff\xff"),), ((ERROR_METADATA, "text"),)):
        error = error_from_metadata(code, "connection refused", metadata)
        assert type(error) is cls and "connection refused" in str(error)
    assert code in str(error_from_metadata(code, None, None))


def test_types_of_a_newer_server_go_by_their_status() -> None:
    for name in ("FlyingSaucerError", "__class__", "annotations", "os"):
        detail = common_pb2.ErrorDetail(type=name, got="a", expected="b", remedy="c", retry_after_ms=7)
        error = error_from_metadata("UNAVAILABLE", "d", ((ERROR_METADATA, detail.SerializeToString()),))
        assert isinstance(error, ServerUnavailable) and error.got == "a" and error.retry_after_s == 0.007


@settings(deadline=None)
@given(
    st.sampled_from(sorted(STATUSES)) | st.text(max_size=20),
    st.none() | st.text(max_size=50),
    st.lists(
        st.tuples(
            st.sampled_from((ERROR_METADATA, RETRY_METADATA, "x")),
            st.binary(max_size=60) | st.text(max_size=60),
        ),
        max_size=4,
    ),
)
def test_any_end_of_a_call_is_an_error_of_ours(
    code: str, details: str | None, metadata: list[tuple[str, str | bytes]]
) -> None:
    error = error_from_metadata(code, details, metadata)
    assert isinstance(error, LpEdgeError) and str(error)


def test_clients_import_neither_grpc_nor_the_server() -> None:
    code = (
        "import sys, lp_edge.runtime.server.codec, lp_edge.runtime.server.wire;"
        "bad = {'grpc', 'fastapi', 'uvicorn', 'prometheus_client', 'torch'} & set(sys.modules);"
        "bad |= {m for m in sys.modules if m.startswith('lp_edge.runtime.server.')} "
        "- {'lp_edge.runtime.server.codec', 'lp_edge.runtime.server.wire'};"
        "sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
