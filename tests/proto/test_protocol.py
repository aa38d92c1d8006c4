"""What docs/protocol.md promises, checked as its readers would use it: generated code alone, a real server, nothing of lp_edge.client."""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

grpc = pytest.importorskip("grpc")
pytest.importorskip("prometheus_client")

from grpc_health.v1 import health_pb2, health_pb2_grpc

from lp_edge.proto.v1 import (
    animation_pb2,
    animation_pb2_grpc,
    common_pb2,
    portraits_pb2,
    portraits_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from lp_edge.tests.runtime.server.conftest import ServeProcess

SECONDS = 60.0
HEIGHT, WIDTH = 200, 240
BYTES = HEIGHT * WIDTH * 3
Request, Config, Driving = (
    animation_pb2.AnimateRequest,
    animation_pb2.AnimateConfig,
    animation_pb2.DrivingFrame,
)
LOSSLESS, LIVE = animation_pb2.STREAM_MODE_LOSSLESS, animation_pb2.STREAM_MODE_LIVE
RAW = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_RAW)
SHARED = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_SHARED_MEMORY)


def face(x: int = 100) -> npt.NDArray[np.uint8]:
    """A face for the toys (tests/toys/make_toys.py)."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[60:140, x - 40 : x + 40] = 240
    return picture


def png(picture: npt.NDArray[np.uint8]) -> common_pb2.Image:
    return common_pb2.Image(encoded=common_pb2.EncodedImage(data=cv2.imencode(".png", picture)[1].tobytes()))


def frame(number: int, image: common_pb2.Image | None = None) -> Any:
    """Frame ``number`` with its time."""
    return Request(frame=Driving(sequence=number, timestamp_us=number * 40_000, image=image or png(face())))


class Server:
    """Stubs of a server with one portrait."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.portraits = portraits_pb2_grpc.PortraitServiceStub(channel)
        self.animation = animation_pb2_grpc.AnimationServiceStub(channel)
        self.info = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(
            server_pb2.GetServerInfoRequest(), timeout=SECONDS
        )
        self.portrait = self.register().id

    def register(self) -> Any:
        request = portraits_pb2.RegisterPortraitRequest(image=png(face()))
        return self.portraits.RegisterPortrait(request, timeout=SECONDS).portrait

    def config(self, **fields: Any) -> Any:
        return Config(**{"portrait_ids": [self.portrait], "mode": LOSSLESS, "output": RAW, **fields})

    def animate(self, *messages: Any) -> list[Any]:
        """All answers to a stream of these messages."""
        return list(self.animation.Animate(iter(messages), timeout=SECONDS))


class Call:
    """An Animate stream that is written and read step by step."""

    def __init__(self, server: Server, config: Any) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._answers = server.animation.Animate(iter(self._queue.get, None), timeout=SECONDS)
        self.send(Request(config=config))
        self.started = self.next().started

    def send(self, message: Any) -> None:
        self._queue.put(message)

    def next(self) -> Any:
        return next(self._answers)

    def end(self) -> list[Any]:
        """Close the sending side and read the rest."""
        self.send(None)
        return list(self._answers)


@contextmanager
def serving(bundle: Path, folder: Path, *options: str) -> Iterator[Server]:
    networks = ("--bundle", str(bundle), "--backend", "cpu", "--threads", "1")
    process = ServeProcess(
        ["--listen", "127.0.0.1:0", "--json", *networks, *options], {}, folder / "serve.log"
    )
    try:
        process.wait_ready()
        with grpc.insecure_channel(process.ready["grpc"]) as channel:
            yield Server(channel)
    finally:
        process.end()


@pytest.fixture(scope="module")
def server(_toy_bundle_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(_toy_bundle_once, tmp_path_factory.mktemp("server"), "--max-message", "1M") as started:
        yield started


def refusal(server: Server, *messages: Any) -> tuple[str, str]:
    """Status and type of the error that a stream of these messages ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        server.animate(*messages)
    return told(caught.value)


def told(error: Any) -> tuple[str, str]:
    metadata = {k: v for k, v in error.trailing_metadata() or ()}
    detail = common_pb2.ErrorDetail.FromString(metadata.get("lp-edge-error-bin", b""))
    assert bool(detail.got) == bool(detail.type)
    return error.code().name, detail.type


# -- the stream -------------------------------------------------------------------------------------------


def test_every_frame_of_a_lossless_stream_is_answered_in_order(server: Server) -> None:
    numbers = (1, 2, 7, 2**40)  # gaps are allowed
    started, *answers = server.animate(Request(config=server.config()), *(frame(n) for n in numbers))
    assert started.started.stream_id
    assert [answer.frame.sequence for answer in answers] == list(numbers)
    assert [answer.frame.timestamp_us for answer in answers] == [n * 40_000 for n in numbers]
    for answer in answers:
        [picture] = answer.frame.pictures
        assert (picture.width, picture.height, len(picture.data)) == (WIDTH, HEIGHT, BYTES)
        assert answer.frame.face_state == common_pb2.FACE_STATE_TRACKED
        stages = [stage.stage for stage in answer.frame.timings.stages]
        assert {"decode", "queue", "track", "compose", "warp", "encode"} <= set(stages)


def test_every_frame_of_a_live_stream_is_answered_or_told_to_be_skipped(server: Server) -> None:
    broken = common_pb2.Image(encoded=common_pb2.EncodedImage(data=b"\x89PNG\r\n\x1a\n"))
    sent = [frame(n, broken if n % 5 == 0 else None) for n in range(1, 41)]
    _, *answers = server.animate(Request(config=server.config(mode=LIVE)), *sent)
    done = [a.frame.sequence for a in answers if a.WhichOneof("message") == "frame"]
    skipped = {a.skipped.sequence: a.skipped.reason for a in answers if a.WhichOneof("message") == "skipped"}
    assert sorted([*done, *skipped]) == list(range(1, 41))
    assert skipped[40] == animation_pb2.SKIP_REASON_UNDECODABLE  # the newest is always looked at
    assert set(skipped.values()) <= {
        animation_pb2.SKIP_REASON_NEWER,
        animation_pb2.SKIP_REASON_UNDECODABLE,
    }
    assert done == sorted(done)


def test_options_hold_from_the_next_frame_on_and_replace_all_of_the_old_ones(server: Server) -> None:
    def options(**fields: Any) -> Any:
        return Request(options=common_pb2.AnimationOptions(**fields))

    _, *answers = server.animate(
        Request(config=server.config()),
        *(frame(1), options(edits={"yaw": 20}), frame(2), options(multiplier=0.5), frame(3)),
    )
    rest, turned, back = (
        np.frombuffer(answer.frame.pictures[0].data, np.uint8).astype(int) for answer in answers
    )
    assert abs(turned - rest).max() > 3
    assert (back == rest).all()


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("nothing first", "ProtocolError"),
        ("a frame first", "ProtocolError"),
        ("two configurations", "ProtocolError"),
        ("an empty message", "ProtocolError"),
        ("sequence 0", "ProtocolError"),
        ("the same sequence", "ProtocolError"),
        ("the same time", "ProtocolError"),
        ("two kinds of driver", "ProtocolError"),
        ("no driver", "ProtocolError"),
        ("shared memory without asking", "ProtocolError"),
        ("results taken without asking", "ProtocolError"),
        ("an unknown mode", "ConfigError"),
        ("an unknown edit", "ConfigError"),
        ("nine portraits", "ConfigError"),
    ],
)
def test_what_may_not_be_is_refused(server: Server, case: str, kind: str) -> None:
    config = Request(config=server.config())
    motion = Request(frame=Driving(sequence=2, timestamp_us=2, motion=server.info.motion.neutral))
    late = Request(frame=Driving(sequence=2, timestamp_us=40_000, image=png(face())))
    shared = common_pb2.Image(shared=common_pb2.SharedImage(width=WIDTH, height=HEIGHT))
    messages = {
        "nothing first": [],
        "a frame first": [frame(1)],
        "two configurations": [config, config],
        "an empty message": [config, Request()],
        "sequence 0": [config, frame(0)],
        "the same sequence": [config, frame(1), frame(1)],
        "the same time": [config, frame(1), late],
        "two kinds of driver": [config, frame(1), motion],
        "no driver": [config, Request(frame=Driving(sequence=1))],
        "shared memory without asking": [config, frame(1, shared)],
        "results taken without asking": [config, Request(results_taken=1)],
        "an unknown mode": [Request(config=server.config(mode=77))],
        "an unknown edit": [
            Request(config=server.config(options=common_pb2.AnimationOptions(edits={"ears": 1})))
        ],
        "nine portraits": [Request(config=server.config(portrait_ids=[server.portrait] * 9))],
    }[case]
    assert refusal(server, *messages) == ("INVALID_ARGUMENT", kind)


def test_unknown_fields_are_skipped(server: Server) -> None:
    raw = server.config().SerializeToString() + b"\xfa\x7f\x03new"  # field 2047
    assert len(server.animate(Request(config=Config.FromString(raw)), frame(1))) == 2


def test_a_silent_stream_ends(_toy_bundle_once: Path, tmp_path: Path) -> None:
    with serving(_toy_bundle_once, tmp_path, "--idle-timeout", "1") as server:
        call = Call(server, server.config())
        with pytest.raises(grpc.RpcError) as caught:
            call.next()
    assert told(caught.value) == ("DEADLINE_EXCEEDED", "DeadlineError")


# -- the connection ----------------------------------------------------------------------------------------


def test_statuses_without_detail_come_from_the_connection(server: Server) -> None:
    huge = common_pb2.Image(encoded=common_pb2.EncodedImage(data=bytes(1 << 20)))
    assert refusal(server, Request(config=server.config()), frame(1, huge)) == ("RESOURCE_EXHAUSTED", "")
    with pytest.raises(grpc.RpcError) as caught:
        server.portraits.DeletePortrait(
            portraits_pb2.DeletePortraitRequest(id="x" * 1000),
            timeout=SECONDS,
            compression=grpc.Compression.Gzip,
        )
    assert told(caught.value) == ("UNIMPLEMENTED", "")


def test_health_is_told_by_service(server: Server) -> None:
    health = health_pb2_grpc.HealthStub(server.channel)
    for name in ("", "lp_edge.v1.PortraitService", "lp_edge.v1.AnimationService", "lp_edge.v1.ServerService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


# -- motion ------------------------------------------------------------------------------------------------


def test_the_neutral_motion_begins_a_stream_of_motion(server: Server) -> None:
    rest = server.info.motion.neutral
    assert len(rest.translation) == 3
    assert len(rest.expression) == server.info.motion.expression_size
    assert all(rest.HasField(name) for name in ("left_eye_ratio", "right_eye_ratio", "lip_ratio"))
    moved = common_pb2.Motion()
    moved.CopyFrom(rest)
    moved.pitch += 10
    frames = [
        Request(frame=Driving(sequence=i, timestamp_us=i, motion=motion))
        for i, motion in enumerate((rest, moved), 1)
    ]
    _, first, second = server.animate(Request(config=server.config(with_motion=True)), *frames)
    assert first.frame.face_state == common_pb2.FACE_STATE_MOTION
    assert abs(np.frombuffer(first.frame.pictures[0].data, np.uint8).astype(int) - face().ravel()).max() <= 1
    assert first.frame.pictures[0].data != second.frame.pictures[0].data
    assert second.frame.motion.pitch == pytest.approx(moved.pitch, abs=0.01)


@pytest.mark.parametrize("fault", ["nan", "inf", "1e7", "short", "no ratio", "no scale"])
def test_impossible_motion_is_refused(server: Server, fault: str) -> None:
    motion = common_pb2.Motion()
    motion.CopyFrom(server.info.motion.neutral)
    if fault == "short":
        del motion.expression[-1]
    elif fault.startswith("no "):
        motion.ClearField({"no ratio": "lip_ratio", "no scale": "scale"}[fault])
    else:
        motion.translation[1] = float(fault)
    message = Request(frame=Driving(sequence=1, motion=motion))
    assert refusal(server, Request(config=server.config()), message) == ("INVALID_ARGUMENT", "ProtocolError")


# -- shared memory, by the table and the layout of the page -----------------------------------------------


class Segment:
    """The client's side of a segment."""

    def __init__(self, told: Any) -> None:
        assert re.fullmatch(r"lp-edge-[1-9][0-9]*-[0-9a-f]{32}", told.name)
        self.path = Path("/dev/shm") / told.name
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            assert stat.S_ISREG(status.st_mode)
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.geteuid())
            assert status.st_size == told.size
            self._map = mmap.mmap(fd, told.size)
        finally:
            os.close(fd)
        self._told = told

    def write(self, slot: int, picture: npt.NDArray[np.uint8]) -> Any:
        """Put a picture into a driving slot; the message that names it."""
        begin = slot * self._told.driving_stride
        self._map[begin : begin + picture.nbytes] = picture.tobytes()
        height, width = picture.shape[:2]
        return common_pb2.Image(shared=common_pb2.SharedImage(slot=slot, width=width, height=height))

    def read(self, picture: Any) -> npt.NDArray[np.uint8]:
        """The pixels of a result."""
        assert picture.encoding == common_pb2.OUTPUT_ENCODING_SHARED_MEMORY and not picture.data
        begin = self._told.results_offset + picture.slot * self._told.result_stride
        pixels = np.frombuffer(self._map, np.uint8, picture.width * picture.height * 3, begin)
        return pixels.reshape(picture.height, picture.width, 3).copy()


@pytest.fixture
def sharing(server: Server) -> Iterator[tuple[Call, Segment]]:
    """A stream with two driving and two result slots, mapped."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    asked = animation_pb2.SharedMemoryRequest(
        driving_slots=2, driving_slot_bytes=BYTES, result_slots=2, result_slot_bytes=BYTES
    )
    call = Call(server, server.config(shared_memory=asked, output=SHARED))
    segment = Segment(call.started.shared_memory)
    call.send(Request(shared_memory_mapped=animation_pb2.SharedMemoryMapped()))
    yield call, segment
    assert not segment.path.exists()


def test_the_layout_of_shared_memory(sharing: tuple[Call, Segment]) -> None:
    call, _ = sharing
    told, stride = call.started.shared_memory, -(-BYTES // 4096) * 4096
    assert (told.driving_stride, told.result_stride) == (stride, stride)
    assert (told.results_offset, told.size) == (2 * stride, 4 * stride)
    assert call.end() == []


def test_frames_through_shared_memory_are_those_in_messages(
    server: Server, sharing: tuple[Call, Segment]
) -> None:
    call, segment = sharing
    xs = [100, 104, 110, 120, 126]
    _, *plain = server.animate(
        Request(config=server.config()), *(frame(n, png(face(x))) for n, x in zip(count(1), xs))
    )
    taken = 0
    for number, x, same in zip(count(1), xs, plain, strict=False):
        message = frame(number, segment.write(number % 2, face(x)))
        message.results_taken = taken  # rides on the next message
        call.send(message)
        answer = call.next()
        assert answer.driving_taken == number  # the slot is free again
        [picture] = answer.frame.pictures
        assert segment.read(picture).tobytes() == same.frame.pictures[0].data
        taken = answer.frame.sequence
    assert not segment.path.exists()
    assert call.end() == []


@pytest.mark.parametrize("case", ["slot", "busy", "size", "ahead"])
def test_wrong_use_of_shared_memory_ends_the_stream(sharing: tuple[Call, Segment], case: str) -> None:
    call, segment = sharing
    image = segment.write(0, face())
    if case == "slot":
        image.shared.slot = 2
    elif case == "size":
        image.shared.height += 100
    call.send(frame(1, image))
    if case == "busy":
        for number in range(2, 20):  # at least one of them comes before the slot was freed
            call.send(frame(number, image))
    elif case == "ahead":
        call.send(Request(results_taken=5))
    with pytest.raises(grpc.RpcError) as caught:
        call.end()
    assert told(caught.value)[0] == "INVALID_ARGUMENT"


def test_results_that_nobody_takes_stop_the_stream_until_they_are(sharing: tuple[Call, Segment]) -> None:
    call, segment = sharing
    for number in range(1, 5):
        call.send(frame(number, segment.write(0, face()) if number == 1 else png(face())))
    first, second = call.next(), call.next()
    assert {first.frame.pictures[0].slot, second.frame.pictures[0].slot} == {0, 1}
    call.send(Request(results_taken=1))
    third = call.next()
    assert third.frame.pictures[0].slot == first.frame.pictures[0].slot
    call.send(Request(results_taken=3))
    assert [answer.frame.sequence for answer in call.end()] == [4]


def test_fewer_result_slots_than_portraits_are_refused(server: Server) -> None:
    asked = animation_pb2.SharedMemoryRequest(result_slots=1, result_slot_bytes=BYTES)
    config = server.config(portrait_ids=[server.portrait] * 2, shared_memory=asked, output=SHARED)
    assert refusal(server, Request(config=config))[0] == "INVALID_ARGUMENT"


# -- H.264 ---------------------------------------------------------------------------------------------------


def units(data: bytes) -> list[int]:
    """Types of the NAL units of an access unit in Annex B form (ITU-T H.264, 7.4.1)."""
    assert data.startswith((b"\x00\x00\x01", b"\x00\x00\x00\x01"))
    return [data[found.end()] & 31 for found in re.finditer(b"\x00\x00\x01", data)]


def test_h264_begins_with_a_key_frame_and_again_when_the_size_changes(server: Server) -> None:
    output = common_pb2.OutputOptions(
        encoding=common_pb2.OUTPUT_ENCODING_H264, width=119, keyframe_interval=4
    )
    alone = Request(options=common_pb2.AnimationOptions(paste_back=False))  # square, so the height follows
    messages = [*(frame(n) for n in range(1, 7)), alone, *(frame(n) for n in range(7, 10))]
    _, *answers = server.animate(Request(config=server.config(output=output)), *messages)
    pictures = [answer.frame.pictures[0] for answer in answers]
    assert [p.keyframe for p in pictures] == [True, False, False, False, True, False, True, False, False]
    assert [(p.width, p.height) for p in pictures] == [(119, 99)] * 6 + [(119, 119)] * 3
    for picture in pictures:
        sps, pps, idr, plain = (kind in units(picture.data) for kind in (7, 8, 5, 1))
        assert (sps, pps, idr, plain) == (
            (True, True, True, False) if picture.keyframe else (False, False, False, True)
        )
    at = pictures[0].data.index(b"\x00\x00\x01\x67") + 4
    profile, constraints = pictures[0].data[at], pictures[0].data[at + 1]
    assert (profile, constraints & 0x40) == (66, 0x40)  # constrained baseline (A.2.1.1)


# -- whole files -----------------------------------------------------------------------------------------------


def test_a_template_becomes_one_mp4(server: Server) -> None:
    config = animation_pb2.RenderConfig(
        portrait_id=server.portrait, built_in="nod", result=animation_pb2.RENDER_OUTPUT_MP4
    )
    requests = iter([animation_pb2.RenderRequest(config=config)])
    answers = list(server.animation.Render(requests, timeout=SECONDS))
    kinds = [answer.WhichOneof("message") for answer in answers]
    assert kinds[-1] == "finished"
    assert set(kinds) == {"progress", "file_chunk", "finished"}
    assert kinds.index("file_chunk") > kinds.index("progress")
    assert b"".join(answer.file_chunk for answer in answers)[4:8] == b"ftyp"
    finished = answers[-1].finished
    assert finished.frames > 10
    assert (finished.width, finished.height) == (WIDTH, HEIGHT)


def test_frames_become_motion_or_a_template_that_can_be_sent_back(server: Server) -> None:
    def extract(output: int) -> list[Any]:
        config = animation_pb2.ExtractMotionConfig(output=output)
        messages = [
            animation_pb2.ExtractMotionRequest(config=config),
            *(animation_pb2.ExtractMotionRequest(frame=frame(n).frame) for n in (1, 2, 3)),
        ]
        return list(server.animation.ExtractMotion(iter(messages), timeout=SECONDS))

    motions = extract(animation_pb2.MOTION_OUTPUT_MOTIONS)
    assert [answer.motion.sequence for answer in motions] == [1, 2, 3]
    assert len(motions[0].motion.motion.expression) == server.info.motion.expression_size
    chunks = extract(animation_pb2.MOTION_OUTPUT_TEMPLATE)
    template = b"".join(answer.template_chunk for answer in chunks)

    config = animation_pb2.RenderConfig(
        portrait_id=server.portrait, upload=animation_pb2.UPLOAD_KIND_TEMPLATE, output=RAW
    )
    pieces = [template[i : i + 1000] for i in range(0, len(template), 1000)]
    requests = [
        animation_pb2.RenderRequest(config=config),
        *(animation_pb2.RenderRequest(upload_chunk=piece) for piece in pieces),
    ]
    *frames, last = server.animation.Render(iter(requests), timeout=SECONDS)
    assert [answer.frame.sequence for answer in frames] == [1, 2, 3]
    assert last.finished.frames == 3
