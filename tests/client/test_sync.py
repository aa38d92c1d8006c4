"""The client for threads against a server that does what the test tells it."""

# ruff: noqa: SIM117 - a client and its stream in two lines read better than in one of two hundred columns
from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")

from lp_edge.client import Client, Output
from lp_edge.errors import (
    AccessError,
    BackendUnavailable,
    ConfigError,
    DeadlineError,
    LimitError,
    MediaError,
    NoFaceError,
    NotFoundError,
    ServerUnavailable,
)
from lp_edge.proto.v1 import animation_pb2
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.image import encode_image, read_image
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.tests.client.fake import SECONDS, WAITS, Fake, fake_server, picture, until

GONE = ServerUnavailable("the server restarts", "", "", retry_after_s=0.01)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as (made, target):
        made.target = target  # type: ignore[attr-defined]
        yield made
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("lp-edge-")], "all threads end")


def connect(fake: Fake, **settings: Any) -> Client:
    return Client(fake.target, **{"timeout_s": SECONDS, **settings})  # type: ignore[attr-defined]


def motion(pitch: float = 0.0) -> Motion:
    return Motion(
        rotation=rotation_from_euler(pitch, 0, 0).astype(np.float32),
        translation=np.array([1, 2, 3], np.float32),
        scale=np.float32(100),
        expression=np.zeros((478, 3), np.float32),
        eye_ratio=np.array([0.3, 0.25], np.float32),
        lip_ratio=np.float32(0.1),
    )


# -- single calls -------------------------------------------------------------------------------------------


def test_info(fake: Fake) -> None:
    with connect(fake) as client:
        info = client.info()
    assert (info.version, info.family, info.uptime) == ("1.2.3", "mesh", 1.5)
    assert info.networks[0].precision == "fp32" and info.devices[0].threads == 2
    assert (info.motion.layout, info.motion.keypoints) == ("coefficients", 478)
    assert info.edits["smile"].neutral == 0 and info.edits["mouth_open"].neutral is None
    assert info.limits.idle_timeout == 60 and info.limits.max_batch_wait == 0
    assert info.templates == ("nod",)


def test_portraits(fake: Fake, tmp_path: Any) -> None:
    png = encode_image(picture(), ".png")
    (tmp_path / "a.png").write_bytes(png)
    with connect(fake) as client:
        made = client.register(tmp_path / "a.png", faces="all", size=256, time_to_live=5, thumbnail_side=32)
        assert (made.width, made.height, made.size) == (64, 48, 256)
        assert made.faces[0].points is not None and made.faces[0].points.shape == (478, 2)
        assert made.faces[0].points[1].tolist() == [2, 3] and made.faces[0].box == (0, 0, 7, 0)
        assert made.detected_faces == ((1, 2, 3, 4),)
        assert (made.expires_at - made.created_at).total_seconds() == 5 and made.created_at.tzinfo is not None
        assert fake.registered[made.id] == png, "files travel as they are"
        by_array = client.register(picture(7))
        assert np.array_equal(read_image(fake.registered[by_array.id]), picture(7)), (
            "arrays travel without loss"
        )
        assert {p.id for p in client.portraits()} == {made.id, by_array.id}
        client.delete(made)
        with pytest.raises(NotFoundError):
            client.delete(made.id)
        for wrong, error in (
            ({"size": 5}, ConfigError),
            ({"thumbnail_side": 1}, ConfigError),
            ({"time_to_live": -1}, ConfigError),
        ):
            with pytest.raises(error):
                client.register(picture(), **wrong)
        with pytest.raises(MediaError, match="does not exist"):
            client.register(tmp_path / "none.png")
        with pytest.raises(MediaError, match="float64"):
            client.register(np.zeros((20, 20, 3)))


@pytest.mark.parametrize(
    "error",
    [
        NoFaceError("no face", "one", "another picture"),
        AccessError("no token"),
        LimitError("full", retry_after_s=2),
    ],
)
def test_errors_are_rebuilt(fake: Fake, error: Any) -> None:
    fake.errors = [error]
    with connect(fake) as client, pytest.raises(type(error)) as raised:
        client.info()
    assert (raised.value.got, raised.value.remedy) == (error.got, error.remedy)
    assert getattr(raised.value, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_calls_are_repeated_while_the_server_is_not_there(fake: Fake) -> None:
    fake.errors = [GONE, ServerUnavailable("loading", retry_after_s=0.3)]
    with connect(fake) as client:
        start = time.monotonic()
        assert client.info().version == "1.2.3"
        assert time.monotonic() - start > 0.3, "the server's advice is followed"
    assert fake.calls == ["info"] * 3


def test_they_are_not_repeated_for_ever(fake: Fake) -> None:
    fake.errors = [GONE] * 1000
    with connect(fake, reconnect_timeout_s=1.5) as client, pytest.raises(ServerUnavailable, match="restarts"):
        client.info()
    before = len(fake.calls)
    assert before > 1
    with connect(fake, reconnect=False) as client, pytest.raises(ServerUnavailable):
        client.info()
    assert len(fake.calls) == before + 1


def test_nobody_listens() -> None:
    with (
        Client("127.0.0.1:1", reconnect=False) as client,
        pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1") as e,
    ):
        client.info()
    assert "lp-serve" in e.value.remedy


def test_deadline(fake: Fake) -> None:
    fake.hold_calls.clear()
    with connect(fake, timeout_s=0.3) as client, pytest.raises(DeadlineError):
        client.info()


def test_closing_ends_waiting(fake: Fake) -> None:
    fake.errors = [ServerUnavailable("later", retry_after_s=1000.0)]
    client = connect(fake, reconnect_timeout_s=5000)
    threading.Timer(0.2, client.close).start()
    with pytest.raises(ServerUnavailable, match="closed"):
        client.info()


def test_token(fake: Fake) -> None:
    with connect(fake, token="secret-token") as client:
        client.info()
        assert "secret" not in repr(client.settings)
    assert fake.metadata["authorization"] == "Bearer secret-token"
    with pytest.raises(ConfigError, match="without TLS"):
        Client("10.1.2.3:50051", token="secret-token")
    Client("10.1.2.3:50051", token="secret-token", insecure=True).close()
    with pytest.raises(ConfigError):
        Client(token="bad\ntoken")


def test_the_server_permits_the_fastest_keepalive(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a ping that comes a little early: after two that are too early the server ends the connection."""
    pytest.importorskip("grpc_health")
    pytest.importorskip("prometheus_client")
    from lp_edge.runtime.server import main
    from lp_edge.runtime.server.access import Tokens
    from lp_edge.runtime.server.config import ServerConfig

    class Seen(Exception):
        pass

    options: dict[str, Any] = {}

    def server(**kinds: Any) -> None:
        options.update(kinds["options"])
        raise Seen

    monkeypatch.setattr(main.grpc.aio, "server", server)
    config = ServerConfig(listen="127.0.0.1:0", bundle=tmp_path)
    with pytest.raises(Seen):
        main._grpc_server(config, None, None, Tokens.of(config), None)  # type: ignore[arg-type]
    with Client(keepalive_s=5.0) as client:
        interval = dict(client.settings.options)["grpc.keepalive_time_ms"]
    assert interval - options["grpc.http2.min_ping_interval_without_data_ms"] >= 500
    with pytest.raises(ConfigError, match="keepalive_s"):
        Client(keepalive_s=4.9)


# -- frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("send_as", ["png", "raw"])
def test_every_frame_comes_back_in_order(fake: Fake, shared_memory: bool, send_as: str) -> None:
    with connect(fake) as client:
        portrait = client.register(picture())
        with client.animate(
            portrait,
            mode="lossless",
            shared_memory=shared_memory,
            driving_size=(64, 48),
            send_as=send_as,
        ) as stream:
            assert stream.transport == ("shared memory" if shared_memory else "messages")
            assert bool(stream.transport_reason) != shared_memory
            assert stream.id == "stream-1"
            frames = list(stream.drive((i / 25, picture(i)) for i in range(60)))
    assert [f.sequence for f in frames] == list(range(1, 61))
    assert [f.timestamp for f in frames] == [i / 25 for i in range(60)]
    assert all(np.array_equal(f.rgb, picture(i)) for i, f in enumerate(frames))
    assert frames[0].rgb is frames[0].rgb, "decoded once"
    assert frames[0].face_state == "tracked" and frames[0].dropped == 0
    assert frames[0].timings.total == 0.002 and frames[0].timings.stages[0].name == "warp"
    assert all(f.round_trip is not None and 0 < f.round_trip < SECONDS for f in frames)
    assert set(fake.sent_as) == {"shared" if shared_memory else "raw" if send_as == "raw" else "encoded"}


def test_several_portraits_and_bytes(fake: Fake) -> None:
    with connect(fake) as client:
        portraits = [client.register(picture()) for _ in range(3)]
        with client.animate(portraits, mode="lossless", driving_size=(64, 48)) as stream:
            stream.send(encode_image(picture(9), ".png"))
            frame = stream.receive(SECONDS)
            assert frame is not None and len(frame.pictures) == 3
            assert all(np.array_equal(p.rgb, picture(9)) for p in frame.pictures)
            assert fake.sent_as == ["encoded"] and frame.pictures[0].encoding == "shared memory"


def test_motion_there_and_back(fake: Fake) -> None:
    with connect(fake) as client:
        portrait = client.register(picture())
        with client.animate(
            portrait,
            mode="lossless",
            driving_size=(0, 0),
            neutral=motion(1),
            with_motion=True,
            output=Output("none"),
        ) as stream:
            stream.send(motion(10))
            frame = stream.receive(SECONDS)
            assert frame is not None and frame.motion is not None and frame.face_state == "motion"
            assert abs(float(frame.motion.angles[0]) - 10) < 1e-3
            assert frame.motion.eye_ratio.tolist() == pytest.approx([0.3, 0.25])
            assert frame.pictures == ()
            with pytest.raises(ConfigError, match="without pictures"):
                _ = frame.rgb
            with pytest.raises(MediaError, match="2 frames"):
                stream.send(Motion.stack([motion(), motion()]))
    config = fake.streams[0]
    assert len(config.neutral.expression) == 1434 and round(config.neutral.pitch) == 1
    assert not config.HasField("shared_memory") or config.shared_memory.driving_slots == 0


def test_a_lossless_stream_takes_no_more_than_its_window(fake: Fake) -> None:
    with connect(fake) as client:
        portrait = client.register(picture())
        with client.animate(portrait, mode="lossless", window=3, driving_size=(64, 48)) as stream:
            fake.gate.clear()
            for i in range(3):
                stream.send(picture(i))
            with pytest.raises(DeadlineError, match="3 are on the way"):
                stream.send(picture(3), timeout=0.1)
            assert len(fake.frames) <= 3
            threading.Timer(0.1, fake.gate.set).start()
            stream.send(picture(3))  # waits until there is room
            stream.finish()
            assert [f.sequence for f in stream] == [1, 2, 3, 4]
            with pytest.raises(ConfigError, match=r"ended|finish"):
                stream.send(picture())


def test_without_a_receiver_sending_stops(fake: Fake) -> None:
    """Answers that nobody takes are bounded: then the reader stops, and with it the sender."""
    with connect(fake) as client:
        with client.animate(
            client.register(picture()), mode="lossless", window=2, shared_memory=False
        ) as stream:
            sent = 0
            with pytest.raises(DeadlineError):
                while sent < 1000:
                    sent += bool(stream.send(picture(sent % 256), timeout=0.5))
            assert 4 <= sent <= 8
            stream.finish()
            assert len(list(stream)) == sent


def test_one_thread_that_sends_ahead_is_woken_when_there_is_room(fake: Fake) -> None:
    """The reader may wait for the inbox, but the sender must learn at once that a frame was answered."""
    with connect(fake) as client:
        with client.animate(
            client.register(picture()), mode="lossless", window=2, shared_memory=False
        ) as stream:
            start = time.monotonic()
            for i in range(4):
                stream.send(picture(i), timeout=SECONDS)
            assert time.monotonic() - start < SECONDS / 2


def test_live_frames_give_way_to_newer_ones(fake: Fake) -> None:
    with connect(fake) as client:
        with client.animate(client.register(picture()), shared_memory=True, driving_size=(64, 48)) as stream:
            fake.reading.clear()
            fake.gate.clear()
            for i in range(40):
                stream.send(picture(i), timestamp=float(i))
            assert stream.dropped >= 36, "three slots, and one frame that waits"
            fake.reading.set()
            fake.gate.set()
            stream.finish()
            frames = list(stream)
            assert frames[-1].sequence == 40 and np.array_equal(frames[-1].rgb, picture(39))
            assert len(frames) + stream.dropped == 40


def test_live_answers_give_way_too(fake: Fake) -> None:
    with connect(fake) as client:
        with client.animate(client.register(picture()), shared_memory=False) as stream:
            for i in range(10):
                stream.send(picture(i))
                until(lambda n=i: len(fake.frames) == n + 1, "the frame is read")
            until(lambda: stream.dropped == 7, "three answers are kept")
            assert [stream.receive(SECONDS).sequence for _ in range(3)] == [8, 9, 10]  # type: ignore[union-attr]


def test_options_and_neutral_belong_to_the_next_frame(fake: Fake) -> None:
    with connect(fake) as client:
        with client.animate(
            client.register(picture()),
            mode="lossless",
            options=AnimateOptions(multiplier=0.5),
            shared_memory=False,
        ) as stream:
            stream.send(picture())
            stream.set_options(AnimateOptions(multiplier=2.0))
            stream.send(picture())
            stream.set_neutral()
            stream.set_neutral(motion())
            stream.send(picture())
            stream.finish()
            assert len(list(stream)) == 3
            with pytest.raises(ConfigError, match="register"):
                stream.set_options(AnimateOptions(size=256))
    assert fake.options == [0.5, 2.0, 2.0] and fake.neutral == [False, False, True]
    assert fake.messages == ["frame", "options", "frame", "set_neutral", "frame"]


@pytest.mark.parametrize("last", ["answered", "undecodable"])
def test_notices_that_got_lost_do_not_keep_a_stream(fake: Fake, last: str) -> None:
    """The server keeps the newest notices of skipped frames only; whatever is told in order covers them."""
    fake.lost = {2, 3}
    fake.undecodable = {4} if last == "undecodable" else set()
    with connect(fake) as client:
        with client.animate(client.register(picture()), shared_memory=True, driving_size=(64, 48)) as stream:
            stream.send(picture())
            assert stream.receive(SECONDS) is not None
            for number in (2, 3, 4):
                stream.send(picture())
                until(lambda n=number: n in fake.frames, "the frame is read")
            stream.finish()
            rest = []
            while (frame := stream.receive(SECONDS / 3)) is not None:
                rest.append(frame.sequence)
            assert rest == ([4] if last == "answered" else [])
            assert not stream._session._sent and not stream._session._departed, "nothing is kept of them"


def test_a_notice_may_come_before_an_older_answer(fake: Fake) -> None:
    """A frame gives way while an older one is drawn, whose result needs a slot, and a side to free it from."""
    fake.gate.clear()
    with connect(fake) as client:
        with client.animate(client.register(picture()), shared_memory=True, driving_size=(64, 48)) as stream:
            for number in (1, 2):
                stream.send(picture())
                until(lambda n=number: len(stream._session._sent) == n, "the frame is sent")
            stream.finish()
            with stream._changed:
                notice = animation_pb2.FrameSkipped(sequence=2, reason=1)
                stream._session.answer(animation_pb2.AnimateResponse(skipped=notice))
                assert [e.frame.sequence for e in stream._session._sent] == [1]
                assert not stream._session.exhausted
            fake.gate.set()
            frame = stream.receive(SECONDS)
            assert frame is not None and frame.sequence == 1 and frame.round_trip is not None


def test_what_a_dropped_frame_asked_for_still_holds(fake: Fake) -> None:
    with connect(fake) as client:
        with client.animate(client.register(picture()), shared_memory=True, driving_size=(64, 48)) as stream:
            fake.reading.clear()
            for _ in range(6):
                stream.send(picture())
            stream.set_options(AnimateOptions(multiplier=2.0))
            stream.send(picture())
            stream.send(picture())
            fake.reading.set()
            stream.finish()
            list(stream)
    assert fake.frames[-1] == 8 and fake.options[-1] == 2.0


def test_numbers_and_times(fake: Fake) -> None:
    with connect(fake) as client:
        with client.animate(client.register(picture()), mode="lossless", shared_memory=False) as stream:
            assert stream.send(picture(), sequence=5, timestamp=1.0) == 5
            assert stream.send(picture()) == 6
            for wrong in (
                {"sequence": 6},
                {"timestamp": 0.5},
                {"timestamp": -1.0},
                {"timestamp": float("nan")},
            ):
                with pytest.raises(ConfigError):
                    stream.send(picture(), **wrong)
            stream.finish()
            first, second = stream
            assert first.timestamp == 1.0 and second.timestamp > 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "fast"},
        {"send_as": "gif"},
        {"shared_memory": "sometimes"},
        {"window": 0},
        {"quality": 0},
        {"motion_layout": "points"},
        {"driving_size": (1, 1)},
        {"options": AnimateOptions(faces="all")},
        {"options": AnimateOptions(neutral=3)},
        {"options": AnimateOptions(length="driving")},
    ],
)
def test_wrong_settings_are_refused_here(fake: Fake, wrong: dict[str, Any]) -> None:
    with connect(fake) as client:
        portrait = client.register(picture())
        with pytest.raises(ConfigError):
            client.animate(portrait, **wrong)
    assert fake.streams == []


def test_drain(fake: Fake) -> None:
    told: list[float] = []
    fake.drain_after = 1
    with connect(fake) as client:
        with client.animate(
            client.register(picture()), mode="lossless", shared_memory=False, on_draining=told.append
        ) as stream:
            assert stream.draining is None
            frames = list(stream.drive(picture(i) for i in range(3)))
            assert len(frames) == 3 and stream.draining == 1.5 and told == [1.5]


# -- shared memory ------------------------------------------------------------------------------------------


def test_slots_are_used_again_and_acknowledged(fake: Fake) -> None:
    with connect(fake) as client:
        with client.animate(
            client.register(picture()), mode="lossless", shared_memory=True, driving_size=(64, 48), window=2
        ) as stream:
            for i in range(50):
                stream.send(picture(i))
                frame = stream.receive(SECONDS)
                assert frame is not None and np.array_equal(frame.rgb, picture(i))
    assert fake.taken >= 48
    asked = fake.streams[0].shared_memory
    assert (asked.driving_slots, asked.result_slots) == (2, 3)


def test_lent_pictures(fake: Fake) -> None:
    with connect(fake) as client:
        with client.animate(
            client.register(picture()),
            mode="lossless",
            shared_memory=True,
            zero_copy=True,
            driving_size=(64, 48),
            window=2,
        ) as stream:
            stream.send(picture(1))
            one = stream.receive(SECONDS)
            assert one is not None and not one.rgb.flags.writeable and one.rgb.base is not None
            stream.send(picture(2))
            stream.send(picture(3))
            until(lambda: fake.frames == [1, 2, 3], "all are read")
            assert fake.taken == 0 and np.array_equal(one.rgb, picture(1)), (
                "lent until the next one is received"
            )
            two = stream.receive(SECONDS)
            assert two is not None and np.array_equal(two.rgb, picture(2))
            stream.send(picture(4))
            until(lambda: fake.taken == 1, "the first one is given back")
            stream.finish()
            assert [int(f.rgb[-1, -1, 0]) for f in stream] == [3, 4]


def test_large_frames_travel_in_messages(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    with connect(fake) as client:
        portrait = client.register(picture())
        with client.animate(portrait, mode="lossless", driving_size=(64, 48), send_as="raw") as stream:
            frames = list(stream.drive([picture(1), picture(2, 128, 96), picture(3)]))
        assert [f.rgb.shape[0] for f in frames] == [48, 96, 48]
        assert fake.sent_as == ["shared", "raw", "shared"]
        assert "128x96" in caplog.text and "64x48" in caplog.text
        with client.animate(portrait, shared_memory=True, driving_size=(64, 48)) as stream:
            with pytest.raises(MediaError, match="128x96") as error:
                stream.send(picture(2, 128, 96))
        assert "driving_size=(128, 96)" in error.value.remedy


def test_where_shared_memory_cannot_be_had(fake: Fake) -> None:
    with connect(fake) as client:
        portrait = client.register(picture())
        fake.shares = BackendUnavailable("no /dev/shm here")
        with client.animate(portrait, mode="lossless") as stream:
            assert (stream.transport, stream.transport_reason) == ("messages", "no /dev/shm here")
            assert [f.pictures[0].encoding for f in stream.drive([picture()])] == ["png"]
        assert [s.HasField("shared_memory") for s in fake.streams] == [True, False]
        with pytest.raises(BackendUnavailable, match="no /dev/shm"):
            client.animate(portrait, shared_memory=True)
        fake.shares, fake.shared_bytes = True, 100
        with client.animate(portrait) as stream:
            assert stream.transport == "messages" and "100 bytes" in stream.transport_reason
        with pytest.raises(LimitError, match="100 bytes"):
            client.animate(portrait, shared_memory=True)
        with pytest.raises(BackendUnavailable, match="neither driving frames nor results"):
            client.animate(portrait, shared_memory=True, driving_size=(0, 0), output=Output("jpeg"))
        fake.shared_bytes = 0
        with pytest.raises(BackendUnavailable, match="gives none"):
            client.animate(portrait, shared_memory=True)


def test_a_segment_that_cannot_be_mapped(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    from lp_edge.client import _session

    def refuse(name: str, layout: Any) -> Any:
        raise MediaError(f"shared memory {name}: another user's")

    class Refusing(_session.SharedFrames):
        attach = staticmethod(refuse)  # type: ignore[assignment]

    monkeypatch.setattr(_session, "SharedFrames", Refusing)
    with connect(fake) as client:
        portrait = client.register(picture())
        with client.animate(portrait, mode="lossless") as stream:
            assert stream.transport == "messages" and "another user's" in stream.transport_reason
            assert len(list(stream.drive([picture()]))) == 1
        with pytest.raises(MediaError):
            client.animate(portrait, shared_memory=True)


# -- reconnecting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_lossless_stream_loses_nothing(fake: Fake, shared_memory: bool) -> None:
    fake.break_after = (5, GONE)
    with connect(fake) as client:
        portrait = client.register(picture())
        with client.animate(
            portrait,
            mode="lossless",
            shared_memory=shared_memory,
            driving_size=(64, 48),
            send_as="png",
            options=AnimateOptions(multiplier=0.5),
        ) as stream:

            def frames() -> Iterator[np.ndarray]:
                for i in range(20):
                    if i == 3:
                        stream.set_options(AnimateOptions(multiplier=2.0))
                    if i == 12:
                        stream.set_options(AnimateOptions(multiplier=3.0))
                    if i == 5:
                        fake.registered.clear()  # the server was started again
                    yield picture(i)

            found = list(stream.drive(frames()))
            assert stream.reconnects == 1 and stream.id == f"stream-{len(fake.streams)}"
        assert [f.sequence for f in found] == list(range(1, 21))
        assert all(np.array_equal(f.rgb, picture(i)) for i, f in enumerate(found))
        multiplier = dict(
            zip(fake.frames, fake.options, strict=True)
        )  # of the last time that a frame was sent
        assert portrait.id not in fake.registered and len(fake.registered) == 1
        with client.animate(
            portrait.id, mode="lossless"
        ) as stream:  # the old id is still good for this client
            assert len(list(stream.drive([picture()]))) == 1
        assert [p.id for p in client.portraits()] == [portrait.id]
        client.delete(portrait)
        assert fake.registered == {}
    assert [multiplier[i] for i in range(1, 21)] == [0.5] * 3 + [2.0] * 9 + [3.0] * 8


def test_a_live_stream_goes_on(fake: Fake) -> None:
    fake.break_after = (2, GONE)
    with connect(fake) as client:
        with client.animate(client.register(picture()), shared_memory=True, driving_size=(64, 48)) as stream:
            stream.set_options(AnimateOptions(multiplier=2.0))
            number, seen = 0, []
            deadline = time.monotonic() + SECONDS
            while len(seen) < 5 and time.monotonic() < deadline:
                number = stream.send(picture(number % 256))
                try:
                    frame = stream.receive(0.2)
                except DeadlineError:
                    continue
                assert frame is not None
                seen.append(frame.sequence)
            assert len(seen) == 5 and seen == sorted(seen) and stream.reconnects == 1
    broken = fake.frames.index(3) + 1
    assert 3 not in fake.frames[broken:], "live frames are not sent again"
    assert fake.streams[1].options.multiplier == 2.0


def test_a_server_that_stays_away(fake: Fake) -> None:
    fake.break_after = (1, GONE)
    with connect(fake, reconnect_timeout_s=0.5) as client:
        with client.animate(client.register(picture()), mode="lossless", shared_memory=False) as stream:
            stream.send(picture())
            assert stream.receive(SECONDS) is not None
            fake.errors = [GONE] * 1000
            stream.send(picture())
            with pytest.raises(ServerUnavailable, match="restarts"):
                stream.receive(SECONDS)
            with pytest.raises(ServerUnavailable):
                stream.send(picture())


def test_without_reconnect_the_error_comes_through(fake: Fake) -> None:
    fake.break_after = (1, GONE)
    with connect(fake, reconnect=False) as client:
        with client.animate(client.register(picture()), mode="lossless", shared_memory=False) as stream:
            with pytest.raises(ServerUnavailable, match="restarts"):
                list(stream.drive(picture(i) for i in range(5)))
        assert len(fake.streams) == 1


def test_other_errors_end_the_stream(fake: Fake) -> None:
    fake.break_after = (1, LimitError("too much"))
    with connect(fake) as client:
        with client.animate(client.register(picture()), mode="lossless", shared_memory=False) as stream:
            with pytest.raises(LimitError, match="too much"):
                list(stream.drive(picture(i) for i in range(5)))
        fake.registered.clear()
        with pytest.raises(NotFoundError):
            client.animate("portrait-unknown", shared_memory=False)


def test_a_full_server_is_waited_for(fake: Fake) -> None:
    """It may take a while to notice that the old stream is gone."""
    fake.break_after = (1, GONE)
    with connect(fake) as client:
        with client.animate(
            client.register(picture()), mode="lossless", shared_memory=True, driving_size=(64, 48)
        ) as stream:
            stream.send(picture())
            assert stream.receive(SECONDS) is not None
            fake.errors = [LimitError("16 streams are open", retry_after_s=0.05)] * 4
            stream.send(picture())
            assert stream.receive(SECONDS) is not None
            assert stream.reconnects == 1 and stream.transport == "shared memory"


@pytest.mark.parametrize("when", WAITS)
def test_an_error_of_the_frames_while_it_reconnects(fake: Fake, when: str) -> None:
    """The consumer learns of it at once, not when a stream ends to which nobody sends any more."""
    with connect(fake, reconnect_timeout_s=5000) as client:
        stream = client.animate(client.register(picture()), mode="lossless", shared_memory=False)
        there = fake.breaks(stream, when)
        ends: list[str] = []

        def frames() -> Iterator[np.ndarray]:
            yield picture()
            until(there, "it reconnects")
            raise ZeroDivisionError("the camera broke")

        def consume() -> None:
            try:
                list(stream.drive(frames()))
            except ZeroDivisionError as error:
                ends.append(str(error))

        consumer = threading.Thread(target=consume)
        consumer.start()
        consumer.join(SECONDS / 3)
        assert ends == ["the camera broke"] and stream.reconnects == 0


@pytest.mark.parametrize("when", WAITS)
def test_closing_while_it_reconnects(fake: Fake, when: str) -> None:
    with connect(fake, reconnect_timeout_s=5000) as client:
        stream = client.animate(client.register(picture()), mode="lossless", shared_memory=False)
        there = fake.breaks(stream, when)
        stream.send(picture())
        until(there, "it reconnects")
        start = time.monotonic()
        stream.close()
        assert time.monotonic() - start < 3 and stream.receive(SECONDS) is None


def test_portraits_that_cannot_be_registered_again_at_once(fake: Fake) -> None:
    """A server that was started again and goes away once more: the stream goes on all the same."""
    with connect(fake) as client:
        with client.animate(client.register(picture()), mode="lossless", shared_memory=False) as stream:
            fake.break_after = (0, GONE)
            fake.errors = [NotFoundError("no portrait"), GONE, NotFoundError("no portrait"), GONE]
            stream.send(picture())
            assert stream.receive(SECONDS) is not None and stream.reconnects == 1
            assert fake.calls[-5:] == ["animate", "list", "animate", "list", "animate"]


def test_several_streams_register_a_portrait_once(fake: Fake) -> None:
    with connect(fake) as client:
        portrait = client.register(picture())
        fake.registered.clear()
        streams: list[Any] = []
        threads = [
            threading.Thread(target=lambda: streams.append(client.animate(portrait, shared_memory=False)))
            for _ in range(4)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join(SECONDS)
        assert len(streams) == 4 and fake.calls.count("register") == 2


# -- ends ---------------------------------------------------------------------------------------------------


def test_close_wakes_everybody(fake: Fake) -> None:
    with connect(fake) as client:
        stream = client.animate(client.register(picture()), mode="lossless", window=1, shared_memory=False)
        fake.gate.clear()
        stream.send(picture())
        ends: list[Any] = []

        def send() -> None:
            try:
                stream.send(picture())
            except ConfigError as error:
                ends.append(error.got)

        def receive() -> None:
            ends.append(stream.receive())

        threads = [threading.Thread(target=send), threading.Thread(target=receive)]
        for t in threads:
            t.start()
        time.sleep(0.1)
        start = time.monotonic()
        stream.close()
        stream.close()
        for t in threads:
            t.join(SECONDS)
        assert time.monotonic() - start < 5 and sorted(map(str, ends)) == [
            "None",
            "a frame for a stream that has ended",
        ]
        assert stream.receive() is None


def test_closing_the_client_closes_its_streams(fake: Fake) -> None:
    client = connect(fake)
    stream = client.animate(client.register(picture()))
    client.close()
    client.close()
    assert stream.receive(SECONDS) is None
    with pytest.raises(ConfigError):
        stream.send(picture())


def test_an_error_of_the_frames_reaches_the_consumer(fake: Fake) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield picture()
        raise ZeroDivisionError("the camera broke")

    with connect(fake) as client:
        with client.animate(client.register(picture()), mode="lossless", shared_memory=False) as stream:
            with pytest.raises(ZeroDivisionError, match="the camera broke"):
                list(stream.drive(frames()))


def test_a_consumer_may_stop(fake: Fake) -> None:
    with connect(fake) as client:
        with client.animate(client.register(picture()), mode="lossless", shared_memory=False) as stream:
            for frame in stream.drive(picture(i % 256) for i in range(10**6)):
                if frame.sequence == 5:
                    break
    assert len(fake.frames) < 100


def test_a_deadline_for_the_start(fake: Fake) -> None:
    with connect(fake, timeout_s=1.0) as client:
        portrait = client.register(picture())
        info = client.info
        fake_info = info()
        client.info = lambda: fake_info  # type: ignore[method-assign]
        fake.hold_calls.clear()
        with pytest.raises(DeadlineError, match="configuration within 1 s"):
            client.animate(portrait)


# -- long calls, as far as the fake goes ----------------------------------------------------------------------


def test_requests_of_an_extraction() -> None:
    from lp_edge.client._jobs import Extraction

    call = Extraction(False, True, AnimateOptions(smooth=False), Fraction(50), 3, "png", 90)
    config, first, second = call.requests([picture(1), (0.5, picture(2))])
    assert config.config.frame_rate.numerator == 50 and config.config.neutral_frame == 3
    assert config.config.options.smooth is False
    assert (first.frame.sequence, first.frame.timestamp_us) == (1, 0)
    assert (second.frame.sequence, second.frame.timestamp_us) == (2, 500_000)
    assert np.array_equal(read_image(second.frame.image.encoded.data), picture(2))
    with pytest.raises(ConfigError):
        Extraction(False, True, None, Fraction(5000), 0, "png", 90)


def test_a_call_that_the_server_lacks(fake: Fake, tmp_path: Any) -> None:
    with connect(fake) as client:
        with pytest.raises(Exception, match="UNIMPLEMENTED"):
            list(client.extract_motion([picture()]))
        with pytest.raises(ConfigError, match="npz"):
            client.extract_template([picture()], tmp_path / "a.txt")
        with pytest.raises(Exception, match="UNIMPLEMENTED"):
            client.render("portrait", "nod", tmp_path / "a.mp4")
        with pytest.raises(MediaError, match="no such file or template"):
            client.render("portrait", "sneeze", tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_protocol_names_are_known() -> None:
    """Every face state and encoding of the protocol has a word of its own here."""
    from lp_edge.client._messages import face_state_from
    from lp_edge.proto.v1 import common_pb2

    words = [face_state_from(n) for n in common_pb2.FaceState.values()]
    assert words == ["unknown", "none", "tracked", "reacquired", "lost", "motion"]
    assert face_state_from(99) == "unknown"
    assert animation_pb2.STREAM_MODE_LIVE == 1


def test_a_closed_client_says_so(fake: Fake) -> None:
    client = connect(fake)
    client.close()
    with pytest.raises(ConfigError, match="a client that was closed"):
        client.info()
