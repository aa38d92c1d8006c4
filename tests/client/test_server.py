"""Both clients against real server processes: pictures, motion, clips, access, and servers that die."""

# ruff: noqa: SIM117 - a client and its stream in two lines read better than in one of two hundred columns
from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")

from lp_edge.client import Client, Output, TlsFiles, aio
from lp_edge.errors import (
    AccessError,
    ConfigError,
    MediaError,
    NoFaceError,
    NotFoundError,
    ProtocolError,
    ServerUnavailable,
)
from lp_edge.runtime.crop import CropOptions
from lp_edge.runtime.face_motion import load_canonical
from lp_edge.runtime.image import encode_image
from lp_edge.runtime.liveportrait_options import LivePortraitOptions
from lp_edge.runtime.media_read import probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.templates import load_template
from lp_edge.tests.runtime.server.conftest import ServeProcess

SECONDS = 60.0


def face(x: int | None = 100) -> np.ndarray:
    """A "face" for the toy networks: a bright square around (x, 100); None = no face."""
    out = np.zeros((200, 240, 3), np.uint8)
    if x is not None:
        out[60:140, x - 40 : x + 40] = 255
    return out


def clip(path: Path, xs: list[int | None]) -> Path:
    with open_writer(path, (240, 200), Fraction(25)) as writer:
        for x in xs:
            writer.write(face(x))
    return path


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, timeout_s=SECONDS) as made:
        yield made


def segments(pid: int) -> list[str]:
    """Shared memory that a server has announced and not removed."""
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"lp-edge-{pid}-")]


def red(rgb: np.ndarray) -> float:
    """How red a result is: the toy networks add the driver's way to the right to the colours of the portrait's crop."""
    return float(rgb[:, :, 0].mean() - rgb[:, :, 2].mean())


# -- what comes back ----------------------------------------------------------------------------------------


def test_info_and_portraits(client: Client) -> None:
    info = client.info()
    assert info.family == "mesh" and info.motion.keypoints == 478 and "nod" in info.templates
    assert info.limits.max_streams > 0 and info.edits["yaw"].unit == "degrees"
    portrait = client.register(face())
    assert len(portrait.faces) == 1 and portrait.faces[0].points is not None
    left, top, right, bottom = portrait.faces[0].box
    assert 50 < left < 100 < right < 150 and 50 < top < 100 < bottom < 150
    assert portrait.thumbnail[:2] == b"\xff\xd8" and portrait.expires_at > portrait.created_at
    assert portrait.id in [p.id for p in client.portraits()]
    client.delete(portrait)
    with pytest.raises(NotFoundError):
        client.delete(portrait)
    with pytest.raises(NoFaceError):
        client.register(face(None))


@pytest.mark.parametrize("encoding", ["auto", "jpeg", "png", "webp", "raw", "h264"])
def test_every_encoding_gives_the_same_picture(client: Client, encoding: str) -> None:
    portrait = client.register(face())
    frames = {}
    for shared_memory in (False, True):
        output = Output(encoding, quality=95, crf=10)
        with client.animate(
            portrait,
            mode="lossless",
            output=output,
            shared_memory=shared_memory,
            driving_size=(240, 200),
            send_as="png",
        ) as stream:
            frames[shared_memory] = list(stream.drive((i / 25, face(60 + 20 * i)) for i in range(6)))
        assert [f.face_state for f in frames[shared_memory]] == ["tracked"] * 6
    with client.animate(
        portrait, mode="lossless", output=Output("raw"), shared_memory=False, send_as="png"
    ) as stream:
        exact = [f.rgb for f in stream.drive((i / 25, face(60 + 20 * i)) for i in range(6))]
    assert red(exact[-1]) - red(exact[0]) > 2, "the portrait follows"
    tolerance = 0.0 if encoding in ("png", "raw") else 6.0
    for found in frames.values():
        for frame, expected in zip(found, exact, strict=True):
            assert frame.rgb.shape == expected.shape
            assert np.abs(frame.rgb.astype(float) - expected).mean() <= tolerance
    if encoding == "auto":
        assert frames[True][0].pictures[0].encoding == "shared memory"
        assert all(np.array_equal(f.rgb, e) for f, e in zip(frames[True], exact, strict=True))


def test_h264_is_decoded_when_somebody_looks(client: Client) -> None:
    portrait = client.register(face())
    output = Output("h264", keyframe_interval=4, crf=1)
    with client.animate(
        portrait, mode="lossless", output=output, shared_memory=False, send_as="png"
    ) as stream:
        frames = list(stream.drive((i / 25, face(80 + 4 * i)) for i in range(10)))
    assert [f.pictures[0].keyframe for f in frames] == [i % 4 == 0 for i in range(10)]
    later = frames[6].rgb  # decodes 4 and 5 as well
    assert red(frames[5].rgb) < red(later)
    assert frames[4].rgb is frames[4].rgb
    with pytest.raises(MediaError, match="later one"):
        _ = frames[2].rgb
    assert red(frames[9].rgb) > red(later)


def test_sizes_and_options(client: Client) -> None:
    portrait = client.register(face(), size=128)
    with client.animate(
        portrait, mode="lossless", output=Output(width=120), shared_memory=True, driving_size=(240, 200)
    ) as stream:
        stream.send(face())
        first = stream.receive(SECONDS)
        stream.set_options(AnimateOptions(paste_back=False))
        stream.send(face())
        second = stream.receive(SECONDS)
        assert first is not None and second is not None
        assert first.rgb.shape == (100, 120, 3) and second.rgb.shape[1] == 120
        with pytest.raises(ProtocolError):  # only the server knows what it has seen before
            stream.send(client.neutral_motion())
            stream.receive(SECONDS)


def test_motion(target: str, _toy_bundle_once: Path) -> None:
    canonical = load_canonical(_toy_bundle_once / "canonical.npz")
    with Client(target, timeout_s=SECONDS, canonical=canonical) as client:
        portrait = client.register(face())
        rest = client.neutral_motion()
        assert rest.expression.shape == (478, 3) and abs(float(rest.angles[1])) < 1e-3
        for layout in ("keypoints", "coefficients"):
            with client.animate(
                portrait,
                mode="lossless",
                driving_size=(0, 0),
                motion_layout=layout,  # type: ignore[arg-type]
                with_motion=True,
            ) as stream:
                stream.send(rest)
                frame = stream.receive(SECONDS)
                assert frame is not None and frame.face_state == "motion" and frame.motion is not None
                assert np.allclose(frame.motion.translation, rest.translation, atol=1e-3)
        with client.animate(portrait, mode="lossless", driving_size=(240, 200), with_motion=True) as stream:
            stream.send(face(110))
            frame = stream.receive(SECONDS)
            assert frame is not None and frame.motion is not None and frame.motion.translation[0] > 100
    with Client(target, timeout_s=SECONDS) as stranger:
        with stranger.animate(portrait.id, motion_layout="coefficients") as stream:
            with pytest.raises(ConfigError, match="coefficients"):
                stream.send(rest)


def test_live_at_the_pace_of_a_camera(client: Client) -> None:
    portrait = client.register(face())
    with client.animate(portrait, driving_size=(240, 200)) as stream:
        answers = 0
        for i in range(20):
            stream.send(face(100 + i))
            frame = stream.receive(SECONDS)
            assert frame is not None and frame.sequence == i + 1
            answers += 1
        assert answers == 20 and stream.dropped == 0


def test_a_unix_socket(lp_serve: Callable[..., Any], tmp_path: Path) -> None:
    server = lp_serve("--listen", f"unix:{tmp_path}/s")
    with Client(f"unix:{tmp_path}/s", timeout_s=SECONDS) as client:
        with client.animate(client.register(face()), mode="lossless", driving_size=(240, 200)) as stream:
            assert stream.transport == "shared memory"
            assert len(list(stream.drive([face(), face()]))) == 2
    assert segments(server.process.pid) == []


@pytest.fixture
def liveportrait(liveportrait_bundle: Path, tmp_path: Path) -> Iterator[str]:
    """Where a server of the other family listens."""
    args = [
        "--listen",
        "127.0.0.1:0",
        "--bundle",
        str(liveportrait_bundle),
        "--backend",
        "cpu",
        "--threads",
        "1",
    ]
    server = ServeProcess([*args, "--json"], {}, tmp_path / "log")
    try:
        server.wait_ready()
        yield server.ready["grpc"]
    finally:
        server.end()


def test_the_other_family(liveportrait: str) -> None:
    with Client(liveportrait, timeout_s=SECONDS) as client:
        assert client.info().family == "liveportrait"
        portrait = client.register(face(), crop=CropOptions(scale=2.0))
        options = AnimateOptions(
            liveportrait=LivePortraitOptions(
                driving_option="pose-friendly", stitching=False, normalize_lip=True
            ),
            driving_crop="on",
            crop=CropOptions(driving_scale=2.5),
        )
        with client.animate(portrait, mode="lossless", options=options, with_motion=True) as stream:
            (frame,) = stream.drive([face()])
            assert frame.motion is not None and frame.motion.expression.shape == (21, 3)
        with client.animate(portrait, mode="lossless", driving_size=(0, 0)) as stream:
            (frame,) = stream.drive([client.neutral_motion()])
            assert frame.face_state == "motion"
        with pytest.raises(ConfigError, match="only a mesh"):
            client.animate(portrait, motion_layout="coefficients")


def test_nothing_is_left_of_many_streams(target: str) -> None:
    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with Client(target, timeout_s=SECONDS) as client:
        portrait = client.register(face())

        def cycle(**how: Any) -> None:
            with client.animate(portrait, driving_size=(240, 200), **how) as stream:
                stream.send(face())
                assert stream.receive(SECONDS) is not None

        cycle()
        before = held()
        for _ in range(20):
            cycle(shared_memory=True)
            cycle(shared_memory=False)
            cycle(zero_copy=True)
        gc.collect()
        end = time.monotonic() + SECONDS
        while (now := held()) > before and time.monotonic() < end:  # gRPC's own threads end a moment later
            time.sleep(0.05)
        assert now <= before
        assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if "lp-edge-" in line]


# -- clips --------------------------------------------------------------------------------------------------


def test_extraction(client: Client, tmp_path: Path) -> None:
    path = clip(tmp_path / "drive.mp4", [90, 92, None, 96])
    found = list(client.extract_motion(path))
    assert [f.face_state for f in found][:2] == ["tracked", "tracked"] and found[2].face_state == "lost"
    assert [round(f.timestamp, 3) for f in found] == [0, 0.04, 0.08, 0.12]
    assert found[0].motion is not None and found[1].motion is not None
    assert found[1].motion.translation[0] > found[0].motion.translation[0]
    told: list[Any] = []
    template = load_template(
        client.extract_template(path, tmp_path / "a.npz", neutral=1, progress=told.append)
    )
    assert len(template) == 4 and template.neutral == 1 and told[-1].frames == 4
    frames = [(i / 50, face(90 + i)) for i in range(6)]
    assert len(list(client.extract_motion(frames))) == 6
    template = load_template(client.extract_template(frames, tmp_path / "b.npz", frame_rate=50))
    assert len(template) == 6 and template.fps == 50
    with pytest.raises(MediaError, match="does not exist"):
        client.extract_motion(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no clip")
    with pytest.raises(MediaError):
        list(client.extract_motion(tmp_path / "text.mp4"))
    with pytest.raises(NoFaceError):
        client.extract_template([face(None)] * 3, tmp_path / "c.npz")
    assert not (tmp_path / "c.npz").exists() and not list(tmp_path.glob(".*"))


def test_rendering(client: Client, tmp_path: Path) -> None:
    path = clip(tmp_path / "drive.mp4", [90, 92, 94, 96])
    portrait = client.register(face())
    told: list[Any] = []
    made = client.render(portrait, path, tmp_path / "out.mp4", progress=told.append)
    assert (made.frames, made.width, made.height, made.frame_rate) == (4, 240, 200, 25)
    assert probe(tmp_path / "out.mp4").frames == 4 and made.path == tmp_path / "out.mp4" and told
    frames = client.render_frames(portrait, path, output=Output("png"))
    assert frames.clip is None
    assert len([f.rgb for f in frames]) == 4 and frames.clip is not None and frames.clip.frames == 4
    built_in = client.render_frames(portrait, "nod")
    assert next(built_in).sequence == 1
    built_in.close()
    with pytest.raises(MediaError):
        client.render(portrait, __file__, tmp_path / "never.mp4")
    with pytest.raises(NotFoundError):
        client.render("A" * 22, "nod", tmp_path / "never.mp4")
    assert not (tmp_path / "never.mp4").exists() and not list(tmp_path.glob(".*"))


def test_asyncio(target: str, tmp_path: Path) -> None:
    path = clip(tmp_path / "drive.mp4", [90, 92, 94, 96])

    async def frames() -> AsyncIterator[np.ndarray]:
        for i in range(10):
            yield face(100 + i)

    async def scenario() -> None:
        async with aio.Client(target, timeout_s=SECONDS) as client:
            portrait = await client.register(face())

            async def one(**how: Any) -> int:
                async with await client.animate(
                    portrait, mode="lossless", driving_size=(240, 200), **how
                ) as stream:
                    return len([f.rgb async for f in stream.drive(frames())])

            counts = await asyncio.gather(
                one(), one(shared_memory=False), one(zero_copy=True), one(output=Output("h264"))
            )
            assert counts == [10] * 4
            assert len([m async for m in client.extract_motion(path)]) == 4
            template = await client.extract_template(frames(), tmp_path / "a.npz")
            assert len(load_template(template)) == 10
            assert (await client.render(portrait, template, tmp_path / "a.mp4")).frames == 10
            rendered = await client.render_frames(portrait, path)
            assert len([f async for f in rendered]) == 4 and rendered.clip is not None
            with pytest.raises(NotFoundError):  # a refusal while the clip is still on its way
                await client.render("A" * 22, path, tmp_path / "b.mp4")
            assert (await client.neutral_motion()).scale > 0

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


# -- access -------------------------------------------------------------------------------------------------


def test_tokens(lp_serve: Callable[..., Any]) -> None:
    token = "a-token-of-some-length"
    server = lp_serve(environment={"LP_EDGE_TOKENS": token})
    with Client(server.ready["grpc"], token=token, timeout_s=SECONDS) as client:
        portrait = client.register(face())
        with client.animate(portrait, mode="lossless") as stream:
            assert len(list(stream.drive([face()]))) == 1
    for wrong in (None, "another-token-of-length"):
        with (
            Client(server.ready["grpc"], token=wrong, timeout_s=SECONDS) as client,
            pytest.raises(AccessError),
        ):
            client.info()


def test_tls(lp_serve: Callable[..., Any], pki: Any) -> None:
    authority, stranger = pki.authority(), pki.authority("stranger")
    own, mine = pki.issue("server", authority), pki.issue("client", authority)
    server = lp_serve(
        *("--tls-cert", own.certificate, "--tls-key", own.key, "--tls-client-ca", authority.certificate)
    )
    target = server.ready["grpc"]
    good = TlsFiles(authority.certificate, mine.certificate, mine.key)
    with Client(target, tls=good, timeout_s=SECONDS) as client:
        assert client.info().family == "mesh"
    with Client(
        target, tls=TlsFiles(authority.certificate, mine.certificate, mine.key, "localhost")
    ) as client:
        assert client.info().family == "mesh"
    wrong = (
        (target, TlsFiles(authority.certificate), ServerUnavailable, ""),
        (target, None, ServerUnavailable, "certificate authority"),
        (
            target,
            TlsFiles(stranger.certificate, mine.certificate, mine.key),
            AccessError,
            "authority that signed",
        ),
        (
            target,
            TlsFiles(authority.certificate, mine.certificate, mine.key, "other.name"),
            AccessError,
            "--tls-name",
        ),
        (lp_serve().ready["grpc"], good, ServerUnavailable, "leave TLS out"),
    )
    for where, tls, kind, remedy in wrong:
        with Client(where, tls=tls, reconnect=kind is AccessError, timeout_s=SECONDS) as client:
            with pytest.raises(kind) as error:
                client.info()
        assert remedy in error.value.remedy
    with pytest.raises(ConfigError, match="cannot be read"):
        Client(target, tls=TlsFiles(own.certificate.with_suffix(".none")))
    with pytest.raises(ConfigError, match="no PEM file"):
        Client(target, tls=TlsFiles(Path(__file__).with_name("conftest.py")))
    with pytest.raises(ConfigError, match="without key"):
        TlsFiles(certificate=own.certificate)


# -- servers that die ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_killed_server_loses_no_frame(lp_serve: Callable[..., Any], shared_memory: bool) -> None:
    first = lp_serve()
    target = first.ready["grpc"]
    with Client(target, timeout_s=SECONDS, reconnect_timeout_s=SECONDS) as client:
        portrait = client.register(face())
        with client.animate(
            portrait,
            mode="lossless",
            shared_memory=shared_memory,
            driving_size=(240, 200),
            options=AnimateOptions(paste_back=False),
        ) as stream:
            numbers: list[int] = []
            for frame in stream.drive(face(100 + i % 20) for i in range(60)):
                numbers.append(frame.sequence)
                assert frame.rgb.shape[1] == 640, "the options hold on: the crop alone"
                if frame.sequence == 20:
                    first.send(signal.SIGKILL)
                    first.wait()
                    second = lp_serve("--listen", target)
            assert numbers == list(range(1, 61)) and stream.reconnects == 1
        assert client.info().load.streams == 0
        assert [p.id for p in client.portraits()] == [portrait.id]
        assert segments(second.process.pid) == []


def test_a_killed_server_and_a_live_stream(lp_serve: Callable[..., Any]) -> None:
    first = lp_serve()
    target = first.ready["grpc"]
    with Client(target, timeout_s=SECONDS, reconnect_timeout_s=SECONDS) as client:
        with client.animate(client.register(face()), driving_size=(240, 200)) as stream:
            stop = threading.Event()

            def camera() -> Iterator[np.ndarray]:
                while not stop.wait(0.02):
                    yield face()

            before = after = 0
            end = time.monotonic() + SECONDS
            for frame in stream.drive(camera()):
                assert time.monotonic() < end
                if stream.reconnects == 0:
                    before = frame.sequence
                    if before == 10:
                        first.send(signal.SIGKILL)
                        first.wait()
                        lp_serve("--listen", target)
                else:
                    after += 1
                    assert frame.sequence > before
                    if after == 10:
                        stop.set()
            assert after >= 10 and stream.dropped > 0


def test_a_killed_server_and_asyncio(lp_serve: Callable[..., Any]) -> None:
    first = lp_serve()
    target = first.ready["grpc"]

    async def scenario() -> None:
        async with aio.Client(target, timeout_s=SECONDS, reconnect_timeout_s=SECONDS) as client:
            portrait = await client.register(face())

            async def one() -> list[int]:
                async with await client.animate(portrait, mode="lossless", driving_size=(240, 200)) as stream:
                    found = []
                    async for frame in stream.drive(face(100 + i % 20) for i in range(40)):
                        found.append(frame.sequence)
                        if frame.sequence == 10 and first.process.poll() is None:
                            first.send(signal.SIGKILL)
                            first.wait()
                            await asyncio.to_thread(lp_serve, "--listen", target)
                    assert stream.reconnects == 1
                    return found

            assert await asyncio.gather(*(one() for _ in range(3))) == [list(range(1, 41))] * 3
            assert len(await client.portraits()) == 1, "registered again once"

    asyncio.run(asyncio.wait_for(scenario(), 2 * SECONDS))


def test_a_server_that_is_told_to_stop(lp_serve: Callable[..., Any]) -> None:
    server = lp_serve("--drain-timeout", "3")
    told: list[float] = []
    with Client(server.ready["grpc"], timeout_s=SECONDS, reconnect=False) as client:
        portrait = client.register(face())
        with client.animate(
            portrait, mode="lossless", on_draining=told.append, shared_memory=False
        ) as stream:
            stream.send(encode_image(face(), ".jpg"))
            assert stream.receive(SECONDS) is not None
            server.send(signal.SIGTERM)
            end = time.monotonic() + SECONDS
            while stream.draining is None and time.monotonic() < end:
                time.sleep(0.01)
            assert told and 0 < told[0] <= 3
            stream.send(encode_image(face(), ".jpg"))
            assert stream.receive(SECONDS) is not None, "it goes on until the deadline"
            stream.finish()
            assert stream.receive(SECONDS) is None
    assert server.wait() == 0
