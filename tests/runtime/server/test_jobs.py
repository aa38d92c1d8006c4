"""ExtractMotion, Render and their uploads, on the core with the toy networks (tests/toys/make_toys.py): a "face" is a white square."""

from __future__ import annotations

import asyncio
import io
import struct
import sys
import tempfile
import threading
import wave
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("prometheus_client")

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import (
    ConfigError,
    DeadlineError,
    LimitError,
    LpEdgeError,
    MediaError,
    NoFaceError,
    NotFoundError,
    OutputError,
    ProtocolError,
)
from lp_edge.proto.v1 import animation_pb2, common_pb2
from lp_edge.runtime import animator
from lp_edge.runtime.cast import Cast, Shot
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.image import encode_image
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.server import jobs
from lp_edge.runtime.server.config import Limits, ServerConfig
from lp_edge.runtime.server.core import Core
from lp_edge.runtime.server.metrics import Metrics
from lp_edge.runtime.templates import load_template, save_template
from lp_edge.tests.fake_nvcodec.module import World, make_nvcodec

ExtractRequest, ExtractConfig = animation_pb2.ExtractMotionRequest, animation_pb2.ExtractMotionConfig
RenderRequest, RenderConfig = animation_pb2.RenderRequest, animation_pb2.RenderConfig
RAW = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_RAW)


def frame(x: int | None = 100, width: int = 240) -> np.ndarray:
    out = np.zeros((200, width, 3), np.uint8)
    if x is not None:
        out[60:140, x - 40 : x + 40] = 255
    return out


def clip(path: Path, xs: list[int | None], fps: Fraction = Fraction(25), sound: Path | None = None) -> bytes:
    with open_writer(path, (240, 200), fps, audio_from=sound) as writer:
        for x in xs:
            writer.write(frame(x))
    return path.read_bytes()


def tone(path: Path, seconds: float) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        t = np.arange(int(16000 * seconds)) / 16000
        file.writeframes((8000 * np.sin(2 * np.pi * 440 * t)).astype("<i2").tobytes())
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files; empty again after every test."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    assert list(path.iterdir()) == []


@pytest.fixture
def make_core(toy_bundle: Path) -> Iterator[Callable[..., Core]]:
    cores = []

    def make(bundle: Path = toy_bundle, idle_timeout_s: float = 20.0, **limits: int) -> Core:
        config = ServerConfig(
            bundle=bundle,
            backend=BackendConfig("cpu", threads=1),
            limits=Limits(**limits),
            idle_timeout_s=idle_timeout_s,
        )
        core = Core(config, Metrics())
        cores.append(core)
        core.open()
        return core

    yield make
    for core in cores:
        assert not core.streams
        core.close()


@pytest.fixture
def core(make_core: Callable[..., Core]) -> Core:
    return make_core()


def register(core: Core, rgb: np.ndarray | None = None) -> str:
    rgb = frame() if rgb is None else rgb
    animator = core.devices[0].animator
    prepared = animator.prepare_source(rgb)
    return core.store.add(
        rgb, AnimateOptions(), animator.find_faces(rgb), {0: prepared}, prepare=lambda device: prepared
    ).id


async def sent(items: list[Any]) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0)
        yield item


def call(core: Core, job: Any, messages: list[Any]) -> list[Any]:
    """All answers to a list of messages."""

    async def run() -> list[Any]:
        with core.open_stream("render", "test") as stream:
            async with aclosing(job(core, stream, sent(messages))) as answers:
                return [answer async for answer in answers]

    return asyncio.run(run())


def pieces(data: bytes, size: int = 1000) -> Iterator[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size))


def image(x: int | None) -> common_pb2.Image:
    return common_pb2.Image(encoded=common_pb2.EncodedImage(data=encode_image(frame(x), ".png")))


def driving(sequence: int, x: int | None, timestamp_us: int | None = None) -> Any:
    when = 40_000 * sequence if timestamp_us is None else timestamp_us
    return ExtractRequest(
        frame=animation_pb2.DrivingFrame(sequence=sequence, timestamp_us=when, image=image(x))
    )


def extract_frames(config: Any, xs: list[int | None]) -> list[Any]:
    return [ExtractRequest(config=config), *(driving(i + 1, x) for i, x in enumerate(xs))]


def extract_clip(data: bytes, **config: Any) -> list[Any]:
    first = ExtractRequest(config=ExtractConfig(input=animation_pb2.MOTION_INPUT_CLIP, **config))
    return [first, *(ExtractRequest(clip_chunk=piece) for piece in pieces(data))]


def render_of(core: Core, data: bytes | None = None, **config: Any) -> list[Any]:
    config.setdefault("portrait_id", register(core))
    config.setdefault("output", RAW)
    first = RenderRequest(config=RenderConfig(**config))
    return [first, *(RenderRequest(upload_chunk=piece) for piece in pieces(data or b""))]


TEMPLATE, CLIP = animation_pb2.UPLOAD_KIND_TEMPLATE, animation_pb2.UPLOAD_KIND_CLIP
MP4 = animation_pb2.RENDER_OUTPUT_MP4
TO_TEMPLATE = animation_pb2.MOTION_OUTPUT_TEMPLATE


def written(answers: list[Any], tmp_path: Path, field: str, name: str) -> Path:
    path = tmp_path / name
    chunks = [getattr(a, field) for a in answers if a.WhichOneof("message") == field]
    assert all(0 < len(chunk) <= jobs.CHUNK_BYTES for chunk in chunks)
    path.write_bytes(b"".join(chunks))
    return path


def pixels(answers: list[Any]) -> np.ndarray:
    pictures = [a.frame.pictures[0] for a in answers if a.WhichOneof("message") == "frame"]
    return np.stack([np.frombuffer(p.data, np.uint8).reshape(p.height, p.width, 3) for p in pictures])


# -- uploads -------------------------------------------------------------------------------------------------


def test_an_upload_is_private_whole_and_gone(folder: Path) -> None:
    with jobs.Upload(100) as upload:
        for piece in (b"abc", b"", b"defg"):
            upload.write(piece)
        path = upload.finish()
        assert (path.read_bytes(), upload.size) == (b"abcdefg", 7)
        assert path.parent.stat().st_mode & 0o077 == 0
        assert path.parent.parent == folder
        upload.beside("result.mp4").write_bytes(b"more")


def test_an_upload_is_bounded_while_it_arrives() -> None:
    with jobs.Upload(1000) as upload:
        upload.write(bytes(1000))
        with pytest.raises(LimitError, match="max_upload_bytes"):
            upload.write(b"x")
        assert upload.path.stat().st_size <= 1000


def test_an_empty_upload_is_told() -> None:
    with jobs.Upload(1000) as upload:
        with pytest.raises(MediaError, match="0 bytes"):
            upload.finish()
        upload.write(b"")
        with pytest.raises(MediaError, match="0 bytes"):
            upload.finish()


def test_a_disk_that_takes_nothing_is_told_without_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at-all")
    with pytest.raises(OutputError) as caught:
        jobs.Upload(10)
    assert "/nowhere" not in str(caught.value)


def test_errors_do_not_say_where_an_upload_lies(folder: Path) -> None:
    with jobs.Upload(1000) as upload, pytest.raises(MediaError) as caught, upload.anonymous():
        upload.write(b"this is no template")
        load_template(upload.finish())
    assert str(folder) not in str(caught.value)
    assert "the upload is no motion template" in str(caught.value)


def test_files_are_sent_in_bounded_pieces(core: Core, tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(600_000)
    (tmp_path / "f").write_bytes(data)

    async def run() -> list[bytes]:
        return [chunk async for chunk in jobs.file_chunks(core, tmp_path / "f")]

    chunks = asyncio.run(run())
    assert [len(c) for c in chunks] == [jobs.CHUNK_BYTES, jobs.CHUNK_BYTES, 600_000 - 2 * jobs.CHUNK_BYTES]
    assert b"".join(chunks) == data


def test_a_clip_with_too_large_frames_is_refused_before_decoding(tmp_path: Path) -> None:
    clip(tmp_path / "d.mp4", [100, 101])
    assert jobs.check_clip(tmp_path / "d.mp4", Limits(max_pixels=240 * 200)) == "video"
    with pytest.raises(LimitError, match="megapixels"):
        jobs.check_clip(tmp_path / "d.mp4", Limits(max_pixels=240 * 200 - 1))


def test_pictures_are_bounded_in_pixels_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.write_bytes(encode_image(frame(), ".png"))
    assert jobs.check_clip(path, Limits(max_pixels=240 * 200)) == "image"
    with pytest.raises(LimitError, match="megapixels"):
        jobs.check_clip(path, Limits(max_pixels=240 * 200 - 1))
    path.write_bytes(path.read_bytes() + bytes(1 << 16))
    with pytest.raises(LimitError, match="max_message_bytes"):
        jobs.check_clip(path, Limits(max_message_bytes=1 << 16))


_GIF = (  # one black pixel: header, screen, two colours, picture, its LZW codes, end
    b"GIF89a" + b"\1\0\1\0\x80\0\0" + b"\0\0\0\xff\xff\xff" + b",\0\0\0\0\1\0\1\0\0" + b"\2\2D\1\0" + b";"
)


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".gif"])
def test_other_pictures_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    if suffix == ".gif":  # OpenCV writes them from 4.12 on only
        path.write_bytes(_GIF)
    else:
        assert cv2.imwrite(str(tmp_path / f"p{suffix}"), frame())
        (tmp_path / f"p{suffix}").rename(path)
    with pytest.raises(MediaError, match="expected one of jpeg, png, webp"):
        jobs.check_clip(path, Limits())


def test_a_template_is_no_clip(tmp_path: Path) -> None:
    save_template(builtin_template("nod"), tmp_path / "t.npz")
    with pytest.raises(MediaError, match="is a motion template"):
        jobs.check_clip(tmp_path / "t.npz", Limits())


def test_archives_are_looked_at_before_they_are_opened(core: Core) -> None:
    def load(data: bytes, **limits: int) -> None:
        with core.open_stream("render", "test") as stream, jobs.Upload(1 << 30) as upload:
            upload.write(data)
            upload.finish()
            jobs.load_upload(stream, upload, Limits(**limits))

    async def in_a_loop(data: bytes, **limits: int) -> None:
        load(data, **limits)

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.npy", bytes(3 << 20))
    with pytest.raises(LimitError, match="unpacked"):
        asyncio.run(in_a_loop(bomb.getvalue(), max_upload_bytes=1 << 20))
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        for i in range(2000):
            archive.writestr(f"{i}.npy", b"")
    with pytest.raises(MediaError, match="list of contents"):
        asyncio.run(in_a_loop(many.getvalue()))
    # The same with a comment behind the last record, and with a record that another one hides.
    data = bytearray(many.getvalue())
    data[-2:] = struct.pack("<H", 5)
    with pytest.raises(MediaError, match="list of contents"):
        asyncio.run(in_a_loop(bytes(data) + b"hello"))
    data = bytearray(many.getvalue())
    data[-22:-22] = b"PK\6\7" + bytes(16)
    with pytest.raises(MediaError, match="list of contents"):
        asyncio.run(in_a_loop(bytes(data)))


def test_built_in_templates_are_never_files(core: Core, tmp_path: Path, monkeypatch: Any) -> None:
    save_template(builtin_template("nod"), tmp_path / "mine.npz")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shake").write_bytes((tmp_path / "mine.npz").read_bytes())

    async def run() -> None:
        with core.open_stream("render", "test") as stream:
            assert jobs.builtin(stream, "shake").source == "lp-edge gesture shake"
            for name in ("mine.npz", str(tmp_path / "mine.npz"), "", "x" * 100_000):
                with pytest.raises(ConfigError) as caught:
                    jobs.builtin(stream, name)
                assert len(str(caught.value)) < 400

    asyncio.run(run())


# -- ExtractMotion -------------------------------------------------------------------------------------------


def test_every_frame_is_answered_with_its_motion(core: Core) -> None:
    xs: list[int | None] = [None, 100, 110, None, 120]
    answers = [a.motion for a in call(core, jobs.extract_motion, extract_frames(ExtractConfig(), xs))]
    assert [(a.sequence, a.timestamp_us) for a in answers] == [(i, 40_000 * i) for i in range(1, 6)]
    states = [common_pb2.FaceState.Name(a.face_state)[11:] for a in answers]
    assert states[:4] == ["NONE", "TRACKED", "TRACKED", "LOST"]
    assert states[4] in ("TRACKED", "REACQUIRED")
    assert [a.HasField("motion") for a in answers] == [False, True, True, True, True]
    assert answers[3].motion == answers[2].motion
    assert answers[4].motion.translation[0] > answers[1].motion.translation[0] + 5
    assert len(answers[1].motion.expression) == 1  # the toy's canonical face has one direction


def test_motion_is_that_of_the_python_interface(core: Core, tmp_path: Path) -> None:
    xs: list[int | None] = [100, 103, 106, 109, 112, 115]
    data = clip(tmp_path / "d.mp4", xs, Fraction(30000, 1001))
    keypoints = common_pb2.EXPRESSION_LAYOUT_KEYPOINTS
    answers = [a.motion for a in call(core, jobs.extract_motion, extract_clip(data, layout=keypoints))]
    assert [a.sequence for a in answers] == [1, 2, 3, 4, 5, 6]
    assert [a.timestamp_us for a in answers] == [round(i * 1001 / 0.03) for i in range(6)]
    with_python = list(core.devices[0].animator.open_driver(tmp_path / "d.mp4").start())
    for answer, step in zip(answers, with_python, strict=True):
        assert step.motion is not None
        motion = answer.motion
        assert motion.translation == pytest.approx(step.motion.translation.tolist())
        assert motion.expression == pytest.approx(step.motion.expression.ravel().tolist())
        np.testing.assert_allclose(
            rotation_from_euler(motion.pitch, motion.yaw, motion.roll), step.motion.rotation, atol=1e-5
        )


def test_smoothing_may_be_switched_off(core: Core) -> None:
    def last(smooth: bool) -> float:
        config = ExtractConfig(options=common_pb2.AnimationOptions(smooth=smooth))
        answers = call(core, jobs.extract_motion, extract_frames(config, [100, 110, 110]))
        return float(answers[1].motion.motion.translation[0] - answers[0].motion.motion.translation[0])

    assert last(False) == pytest.approx(10.0, abs=1.0)
    assert last(True) < last(False)


def test_frames_become_a_template(core: Core, tmp_path: Path) -> None:
    config = ExtractConfig(
        output=TO_TEMPLATE,
        neutral_frame=2,
        frame_rate=common_pb2.FrameRate(numerator=30000, denominator=1001),
    )
    answers = call(core, jobs.extract_motion, extract_frames(config, [None, 100, 106, None, 112]))
    kinds = [a.WhichOneof("message") for a in answers]
    assert kinds[0] == "progress" and "template_chunk" in kinds and "motion" not in kinds
    progress = [a.progress for a in answers if a.WhichOneof("message") == "progress"]
    assert (progress[-1].frames_done, progress[-1].frames_total) == (5, 5)
    template = load_template(written(answers, tmp_path, "template_chunk", "t.npz"))
    assert (len(template), template.neutral, template.fps) == (5, 2, Fraction(30000, 1001))
    x = template.motion.translation[:, 0]
    assert x[0] == x[1] < x[2] == x[3] < x[4]  # held before the first face, and while it is lost


def test_a_clip_becomes_a_template_that_drives(core: Core, tmp_path: Path) -> None:
    data = clip(tmp_path / "d.mp4", [100 + 2 * i for i in range(8)])
    answers = call(core, jobs.extract_motion, extract_clip(data, output=TO_TEMPLATE))
    path = written(answers, tmp_path, "template_chunk", "t.npz")
    template = load_template(path)
    assert (len(template), template.fps, template.neutral) == (8, 25, 0)
    from_clip = pixels(call(core, jobs.render, render_of(core, data, upload=CLIP)))
    from_template = pixels(call(core, jobs.render, render_of(core, path.read_bytes(), upload=TEMPLATE)))
    assert np.abs(from_clip.astype(int) - from_template).max() <= 1  # expressions are float16 in a template
    assert (from_clip[-1] != from_clip[0]).any()


def test_a_picture_becomes_a_template_of_two_frames(core: Core, tmp_path: Path) -> None:
    data = encode_image(frame(120), ".png")
    answers = call(core, jobs.extract_motion, extract_clip(data, output=TO_TEMPLATE))
    assert len(load_template(written(answers, tmp_path, "template_chunk", "t.npz"))) == 2
    (one,) = call(core, jobs.extract_motion, extract_clip(data))
    assert (one.motion.sequence, one.motion.face_state) == (1, common_pb2.FACE_STATE_TRACKED)


def test_the_other_family_answers_in_its_own_layout(
    make_core: Callable[..., Core], liveportrait_bundle: Path
) -> None:
    core = make_core(liveportrait_bundle)
    answers = call(core, jobs.extract_motion, extract_frames(ExtractConfig(), [100, 105]))
    assert [len(a.motion.motion.expression) for a in answers] == [63, 63]
    with pytest.raises(ConfigError, match="layout"):
        config = ExtractConfig(layout=common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS)
        call(core, jobs.extract_motion, extract_frames(config, [100]))


@pytest.mark.parametrize(
    ("messages", "error", "match"),
    [
        ([], ProtocolError, "ended without a message"),
        ([ExtractRequest()], ProtocolError, "empty message"),
        ([driving(1, 100)], ProtocolError, "begins with frame"),
        ([ExtractRequest(config=ExtractConfig())] * 2, ProtocolError, "second configuration"),
        ([ExtractRequest(config=ExtractConfig()), ExtractRequest()], ProtocolError, "nothing"),
        (
            [ExtractRequest(config=ExtractConfig()), ExtractRequest(clip_chunk=b"x")],
            ProtocolError,
            "clip_chunk",
        ),
        ([*extract_clip(b"x"), driving(1, 100)], ProtocolError, "a message with frame"),
        (extract_clip(b""), MediaError, "0 bytes"),
        (extract_clip(b"neither clip nor picture"), MediaError, "the upload|upload is neither"),
        ([ExtractRequest(config=ExtractConfig()), driving(0, 100)], ProtocolError, "larger number"),
        ([ExtractRequest(config=ExtractConfig()), driving(1, 100, -1)], ProtocolError, "later time"),
        (
            [ExtractRequest(config=ExtractConfig()), driving(3, 100), driving(3, 100, 10**6)],
            ProtocolError,
            "larger",
        ),
        (
            [ExtractRequest(config=ExtractConfig()), driving(3, 100), driving(4, 100, 1)],
            ProtocolError,
            "later",
        ),
        (
            [
                ExtractRequest(config=ExtractConfig()),
                ExtractRequest(frame=animation_pb2.DrivingFrame(sequence=1, motion=common_pb2.Motion())),
            ],
            ProtocolError,
            "no picture",
        ),
        (
            [
                ExtractRequest(config=ExtractConfig()),
                ExtractRequest(
                    frame=animation_pb2.DrivingFrame(
                        sequence=1, image=common_pb2.Image(shared=common_pb2.SharedImage(width=64, height=64))
                    )
                ),
            ],
            ProtocolError,
            "shared memory",
        ),
        ([ExtractRequest(config=ExtractConfig(input=9))], ConfigError, "input is 9"),  # type: ignore[arg-type]
        ([ExtractRequest(config=ExtractConfig(output=9))], ConfigError, "output is 9"),  # type: ignore[arg-type]
        ([ExtractRequest(config=ExtractConfig(layout=9))], ConfigError, "layout"),  # type: ignore[arg-type]
        (
            [
                ExtractRequest(
                    config=ExtractConfig(options=common_pb2.AnimationOptions(multiplier=float("nan")))
                )
            ],
            ConfigError,
            "multiplier",
        ),
        (
            extract_frames(
                ExtractConfig(output=TO_TEMPLATE, frame_rate=common_pb2.FrameRate(numerator=1)), [100]
            ),
            ConfigError,
            "frame_rate",
        ),
        (extract_frames(ExtractConfig(output=TO_TEMPLATE), []), NoFaceError, "no face"),
        (extract_frames(ExtractConfig(output=TO_TEMPLATE), [None, None]), NoFaceError, "2 frames"),
        (
            extract_frames(ExtractConfig(output=TO_TEMPLATE, neutral_frame=2), [100, 100]),
            ConfigError,
            "neutral",
        ),
        (
            extract_frames(ExtractConfig(output=TO_TEMPLATE, neutral_frame=1), [100, None]),
            NoFaceError,
            "neutral",
        ),
    ],
)
def test_wrong_extractions_are_told(
    core: Core, messages: list[Any], error: type[LpEdgeError], match: str
) -> None:
    with pytest.raises(error, match=match):
        call(core, jobs.extract_motion, messages)


def test_collected_motion_is_bounded(make_core: Callable[..., Core]) -> None:
    core = make_core(max_upload_bytes=20_000)  # three mesh frames of 5.8 kB
    config = ExtractConfig(output=TO_TEMPLATE)
    with pytest.raises(LimitError, match="motion of more than 3 frames"):
        call(core, jobs.extract_motion, extract_frames(config, [100] * 6))


def test_a_silent_client_is_ended(make_core: Callable[..., Core]) -> None:
    core = make_core(idle_timeout_s=1.0)

    async def silent() -> AsyncIterator[Any]:
        yield ExtractRequest(config=ExtractConfig(input=animation_pb2.MOTION_INPUT_CLIP))
        yield ExtractRequest(clip_chunk=b"the rest never comes")
        await asyncio.Event().wait()

    async def run() -> None:
        with core.open_stream("extract_motion", "test") as stream:
            async with aclosing(jobs.extract_motion(core, stream, silent())) as answers:
                await answers.__anext__()

    with pytest.raises(DeadlineError):
        asyncio.run(run())


# -- Render --------------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_python_interface(core: Core, tmp_path: Path) -> None:
    data = clip(tmp_path / "d.mp4", [100 + 2 * i for i in range(7)], Fraction(24))
    options = common_pb2.AnimationOptions(multiplier=1.5, edits={"smile": 0.5})
    answers = call(core, jobs.render, render_of(core, data, upload=CLIP, options=options))
    animation = core.devices[0].animator.animate(
        frame(), tmp_path / "d.mp4", AnimateOptions(multiplier=1.5, edits=answers_edits())
    )
    with_python = [f.rgb for f in animation]
    np.testing.assert_array_equal(pixels(answers), np.stack(with_python))
    frames = [a.frame for a in answers[:-1]]
    assert [f.sequence for f in frames] == [1, 2, 3, 4, 5, 6, 7]
    assert [f.timestamp_us for f in frames] == [round(i * 1e6 / 24) for i in range(7)]
    assert all(f.face_state == common_pb2.FACE_STATE_TRACKED for f in frames)
    assert {"compose", "warp", "paste_back", "encode"} <= {s.stage for s in frames[3].timings.stages}
    finished = answers[-1].finished
    assert (finished.frames, finished.width, finished.height) == (7, 240, 200)
    assert (finished.frame_rate.numerator, finished.frame_rate.denominator) == (24, 1)


def answers_edits() -> Any:
    from lp_edge.runtime.edit import Edits

    return Edits(smile=0.5)


@pytest.mark.parametrize("bundle", ["toy_bundle", "liveportrait_bundle"])
def test_a_built_in_template_drives(
    make_core: Callable[..., Core], bundle: str, request: pytest.FixtureRequest
) -> None:
    core = make_core(request.getfixturevalue(bundle))
    answers = call(core, jobs.render, render_of(core, built_in="blink"))
    assert len(answers) == 71
    assert {a.frame.face_state for a in answers[:-1]} == {common_pb2.FACE_STATE_MOTION}
    assert core.store.list()[0].active == 0


def test_a_picture_drives_one_frame(core: Core) -> None:
    answers = call(core, jobs.render, render_of(core, encode_image(frame(120), ".jpg"), upload=CLIP))
    assert [a.WhichOneof("message") for a in answers] == ["frame", "finished"]


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 15, reason="PyAV 14 cannot decode this way")
def test_hardware_decodes_uploads_within_the_same_limits(
    make_core: Callable[..., Core], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a GPU backend; what software refuses before hardware is asked, stays refused."""
    world = World()
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", make_nvcodec(world))
    data = clip(tmp_path / "d.mp4", [100 + 2 * i for i in range(7)])
    plain = make_core()
    in_software = pixels(call(plain, jobs.render, render_of(plain, data, upload=CLIP)))
    assert world.asked == []
    real = animator.open_family

    def opened(*arguments: Any) -> Any:
        family = real(*arguments)
        monkeypatch.setattr(family, "resident", True)
        monkeypatch.setattr(family, "accelerated", True)
        return family

    monkeypatch.setattr(animator, "open_family", opened)
    core = make_core(max_pixels=240 * 200)
    np.testing.assert_allclose(
        pixels(call(core, jobs.render, render_of(core, data, upload=CLIP))).astype(int), in_software, atol=3
    )
    answers = call(core, jobs.extract_motion, extract_clip(data))
    assert [a.WhichOneof("message") for a in answers] == ["motion"] * 7
    assert [a[0] for a in world.asked] == ["decoder"] * 2
    world.asked.clear()
    for broken, words in ((data[:-300], "cut off"), (data[: len(data) // 2], "cut off|no clip")):
        with pytest.raises(MediaError, match=words):
            call(core, jobs.render, render_of(core, broken, upload=CLIP))
    small = make_core(max_pixels=240 * 200 - 1)
    with pytest.raises(LimitError, match="megapixels"):
        call(small, jobs.render, render_of(small, data, upload=CLIP))
    assert world.asked == []
    world.fails_at_packet = 4
    with pytest.raises(MediaError, match=r"failed at frame \d"):
        call(core, jobs.render, render_of(core, data, upload=CLIP))


def test_the_neutral_frame_may_be_chosen(core: Core, tmp_path: Path) -> None:
    data = clip(tmp_path / "d.mp4", [100, 110, 120, 130, None])
    config = {"upload": CLIP, "options": common_pb2.AnimationOptions(smooth=False)}
    first = pixels(call(core, jobs.render, render_of(core, data, **config)))
    third = pixels(call(core, jobs.render, render_of(core, data, neutral_frame=2, **config)))
    still = frame()
    assert (first[0] == still).all() and (first[2] != still).any()
    assert (third[2] == still).all() and (third[0] != still).any()
    with pytest.raises(NoFaceError, match="frame 4 of the driver"):
        call(core, jobs.render, render_of(core, data, neutral_frame=4, **config))
    with pytest.raises(ConfigError, match="which has 5"):
        call(core, jobs.render, render_of(core, data, neutral_frame=5, **config))


def test_frames_come_in_the_encoding_and_size_asked_for(core: Core) -> None:
    output = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_JPEG, width=120)
    answers = call(core, jobs.render, render_of(core, built_in="nod", output=output))
    picture = answers[0].frame.pictures[0]
    assert cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR).shape == (100, 120, 3)
    assert (answers[-1].finished.width, answers[-1].finished.height) == (120, 100)


def test_h264_frames_decode(core: Core) -> None:
    output = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_H264)
    answers = call(core, jobs.render, render_of(core, built_in="nod", output=output))
    decoder = av.CodecContext.create("h264", "r")
    units = [a.frame.pictures[0].data for a in answers[:-1]]
    decoded = [f for unit in units for f in decoder.decode(av.Packet(unit))] + list(decoder.decode(None))
    assert len(decoded) == len(units) == 75


def test_no_pictures_are_sent_where_none_are_wanted(core: Core) -> None:
    output = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_NONE)
    answers = call(core, jobs.render, render_of(core, built_in="nod", output=output))
    assert len(answers) == 76 and not any(a.frame.pictures for a in answers)


def test_one_mp4_has_the_clips_frames_rate_and_sound(core: Core, tmp_path: Path) -> None:
    rate = Fraction(30000, 1001)
    data = clip(tmp_path / "d.mp4", [100 + i // 2 for i in range(30)], rate, tone(tmp_path / "t.wav", 2.0))
    output = common_pb2.OutputOptions(width=120)
    answers = call(core, jobs.render, render_of(core, data, upload=CLIP, result=MP4, output=output))
    kinds = [a.WhichOneof("message") for a in answers]
    assert kinds[0] == "progress" and kinds[-1] == "finished" and "frame" not in kinds
    told = [a.progress for a in answers if a.WhichOneof("message") == "progress"]
    assert (told[-1].frames_done, told[-1].frames_total) == (30, 30)
    done = [p.frames_done for p in told]
    assert done == sorted(done)
    finished = answers[-1].finished
    assert (finished.frames, finished.width, finished.height) == (30, 120, 100)
    path = written(answers, tmp_path, "file_chunk", "r.mp4")
    info = probe(path)
    assert (info.width, info.height, info.fps, info.frames, info.has_audio) == (120, 100, rate, 30, True)
    with VideoReader(path) as reader:
        assert sum(1 for _ in reader) == 30


def test_an_mp4_of_a_template_is_silent(core: Core, tmp_path: Path) -> None:
    answers = call(core, jobs.render, render_of(core, built_in="nod", result=MP4))
    info = probe(written(answers, tmp_path, "file_chunk", "r.mp4"))
    assert (info.frames, info.has_audio) == (75, False)


def test_a_result_is_bounded(make_core: Callable[..., Core]) -> None:
    core = make_core(max_upload_bytes=1 << 10)
    output = common_pb2.OutputOptions(crf=1, width=1024)
    with pytest.raises(LimitError, match="a result of more than 1024 bytes"):
        call(core, jobs.render, render_of(core, built_in="look", result=MP4, output=output))


def test_options_of_the_other_family_are_refused(core: Core) -> None:
    options = common_pb2.AnimationOptions(liveportrait=common_pb2.LivePortraitOptions(stitching=True))
    with pytest.raises(ConfigError, match="stitching"):
        call(core, jobs.render, render_of(core, built_in="nod", options=options))


def test_several_faces_need_the_whole_picture(core: Core) -> None:
    two = frame(None, width=400)
    two[60:140, 60:140, 0] = 255
    two[60:140, 260:340, 1] = 255
    animator = core.devices[0].animator
    options = AnimateOptions(faces="all")
    prepared = animator.prepare_source(two, options)
    assert len(prepared) == 2
    faces = animator.find_faces(two, options)
    id = core.store.add(two, options, faces, {0: prepared}, prepare=lambda device: prepared).id
    answers = call(core, jobs.render, render_of(core, portrait_id=id, built_in="nod"))
    assert pixels(answers).shape == (75, 200, 400, 3)
    with pytest.raises(ConfigError, match="2 faces and no paste-back"):
        crop = common_pb2.AnimationOptions(paste_back=False)
        call(core, jobs.render, render_of(core, portrait_id=id, built_in="nod", options=crop))


@pytest.mark.parametrize(
    ("config", "data", "error", "match"),
    [
        ({"portrait_id": "unknown", "built_in": "nod"}, b"", NotFoundError, "'unknow…'"),
        ({}, b"", ProtocolError, "without a driver"),
        ({"upload": 0}, b"", ProtocolError, "without a driver"),
        ({"upload": 7}, b"", ConfigError, "upload is 7"),
        ({"built_in": "/etc/passwd"}, b"", ConfigError, "no built-in template"),
        ({"built_in": "nod", "result": 7}, b"", ConfigError, "result is 7"),
        ({"upload": CLIP}, b"", MediaError, "0 bytes"),
        ({"upload": CLIP}, b"\0\0\0\x20ftypisom" + bytes(500), MediaError, "upload"),
        ({"upload": TEMPLATE}, b"PK\3\4" + bytes(500), MediaError, "the upload is damaged"),
        ({"upload": TEMPLATE}, b"\x80\x04cos\nsystem\n(S'true'\ntR.", MediaError, "."),
        (
            {
                "built_in": "nod",
                "output": common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_SHARED_MEMORY),
            },
            b"",
            ConfigError,
            "shared memory",
        ),
        ({"built_in": "nod", "output": common_pb2.OutputOptions(encoding=99)}, b"", ConfigError, "encoding"),
        ({"built_in": "nod", "output": common_pb2.OutputOptions(width=9999)}, b"", ConfigError, "width"),
        ({"built_in": "nod", "neutral_frame": 500}, b"", ConfigError, "neutral"),
    ],
)
def test_wrong_renderings_are_told(
    core: Core, folder: Path, config: dict[str, Any], data: bytes, error: type[LpEdgeError], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        call(core, jobs.render, render_of(core, data, **config))
    assert str(folder) not in str(caught.value)
    assert all(p.active == 0 for p in core.store.list())


def test_a_clip_without_a_face_is_told(core: Core, tmp_path: Path) -> None:
    data = clip(tmp_path / "d.mp4", [None] * 5)
    with pytest.raises(NoFaceError, match="no face in any of the 5 frames"):
        call(core, jobs.render, render_of(core, data, upload=CLIP))


def test_an_upload_beyond_the_limit_is_refused_early(make_core: Callable[..., Core]) -> None:
    core = make_core(max_upload_bytes=4096)
    read = []

    async def endless() -> AsyncIterator[Any]:
        yield render_of(core, upload=CLIP)[0]
        while True:
            read.append(1)
            yield RenderRequest(upload_chunk=bytes(1000))

    async def run() -> None:
        with core.open_stream("render", "test") as stream:
            async with aclosing(jobs.render(core, stream, endless())) as answers:
                await answers.__anext__()

    with pytest.raises(LimitError, match="max_upload_bytes"):
        asyncio.run(run())
    assert len(read) == 5


# -- back-pressure and ends ----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the frames that were drawn."""
    indices: list[int] = []
    begin = Cast.begin

    def counting(self: Cast, shots: Sequence[Shot], *args: Any) -> Any:
        indices.extend(shot.index for shot in shots)
        return begin(self, shots, *args)

    monkeypatch.setattr(Cast, "begin", counting)
    return indices


def own_threads() -> set[str]:
    """Threads of single calls; the pools' stay for the next ones."""
    return {t.name for t in threading.enumerate() if t.name.startswith("lp-edge ")}


@pytest.mark.parametrize("result", ["frames", "mp4"])
@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_a_call_that_ends_early_stops_at_once_and_leaves_nothing(
    core: Core, drawn: list[int], tmp_path: Path, folder: Path, result: str, how: str
) -> None:
    data = clip(tmp_path / "d.mp4", [100 + i % 20 for i in range(120)])
    resting = own_threads()

    async def run() -> None:
        with core.open_stream("render", "test") as stream:
            kind = MP4 if result == "mp4" else animation_pb2.RENDER_OUTPUT_FRAMES
            messages = render_of(core, data, upload=CLIP, result=kind)
            answers = jobs.render(core, stream, sent(messages))
            async with aclosing(answers):
                await answers.__anext__()
                assert list(folder.iterdir()) != []
                assert core.store.list()[0].active == 1
                if how == "cancelled":

                    async def rest() -> None:
                        async for _ in answers:
                            pass

                    task = asyncio.ensure_future(rest())
                    while len(drawn) < 10:
                        await asyncio.sleep(0.001)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
            count = len(drawn)
            assert count < 100
            assert list(folder.iterdir()) == []
            assert core.store.list()[0].active == 0
            assert own_threads() == resting
            await asyncio.sleep(0.05)
            assert len(drawn) == count

    asyncio.run(run())


def test_a_slow_reader_holds_its_own_call_back(core: Core, drawn: list[int]) -> None:
    async def run() -> None:
        with core.open_stream("render", "test") as stream:
            async with aclosing(jobs.render(core, stream, sent(render_of(core, built_in="look")))) as answers:
                for taken in range(1, 6):
                    await answers.__anext__()
                    await asyncio.sleep(0.03)
                    assert taken <= len(drawn) <= taken + 1  # one is drawn ahead

    asyncio.run(run())


def test_an_extraction_that_is_cancelled_leaves_nothing(core: Core, tmp_path: Path, folder: Path) -> None:
    data = clip(tmp_path / "d.mp4", [100 + i % 20 for i in range(200)])
    resting = own_threads()

    async def run() -> None:
        with core.open_stream("extract_motion", "test") as stream:
            answers = jobs.extract_motion(core, stream, sent(extract_clip(data)))
            async with aclosing(answers):
                for _ in range(3):
                    await answers.__anext__()
        assert list(folder.iterdir()) == []
        assert own_threads() == resting

    asyncio.run(run())


def test_frames_and_states_are_counted(core: Core) -> None:
    call(core, jobs.render, render_of(core, built_in="nod"))
    assert b'lp_edge_frames_total{kind="render"} 75.0' in core.metrics.render()[0]
