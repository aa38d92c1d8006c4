"""Portraits and GetServerInfo over a real channel, with the toy networks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("grpc")

import grpc

import lp_edge
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import MANIFEST, sha256_file
from lp_edge.proto.v1 import animation_pb2, common_pb2, portraits_pb2, server_pb2
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.gestures import GESTURES
from lp_edge.runtime.image import encode_image
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.server.config import Limits
from lp_edge.runtime.server.core import Core
from lp_edge.runtime.server.wire import motion_from_message
from lp_edge.tests.runtime.server.serving import LOSSLESS, Served, face, failure_of, raw, run, until

Code = grpc.StatusCode
Serve = Callable[..., Any]


def faces() -> np.ndarray:
    """Two faces of the toy networks: a red square on the left, a smaller green one on the right."""
    out = np.zeros((200, 400, 3), np.uint8)
    out[50:150, 40:140, 0] = 255
    out[60:140, 260:340, 1] = 255
    return out


def register(server: Served, rgb: np.ndarray | None = None, **fields: Any) -> Any:
    """A call that registers a picture."""
    image = fields.pop("image", None) or raw(face() if rgb is None else rgb)
    return server.portraits.RegisterPortrait(portraits_pb2.RegisterPortraitRequest(image=image, **fields))


def listing(server: Served) -> Any:
    """A call that lists all portraits."""
    return server.portraits.ListPortraits(portraits_pb2.ListPortraitsRequest())


def delete(server: Served, id: str) -> Any:
    """A call that deletes a portrait."""
    return server.portraits.DeletePortrait(portraits_pb2.DeletePortraitRequest(id=id))


def options(**fields: Any) -> portraits_pb2.PortraitOptions:
    """A message of options."""
    return portraits_pb2.PortraitOptions(**fields)


# -- portraits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["raw", "bgr", ".jpg", ".png", ".webp"])
def test_a_portrait_is_registered_listed_and_deleted(serve: Serve, toy_bundle: Path, form: str) -> None:
    rgb = face(220, 200, 160, width=480, height=400)
    with Animator(toy_bundle, backend=BackendConfig("cpu", threads=1)) as animator:
        [expected] = animator.find_faces(rgb, AnimateOptions())
    image = raw(rgb)
    if form == "bgr":
        image.raw.format, image.raw.data = common_pb2.PIXEL_FORMAT_BGR24, rgb[:, :, ::-1].tobytes()
    elif form != "raw":
        data = encode_image(rgb, form, quality=100)
        image = common_pb2.Image(encoded=common_pb2.EncodedImage(data=data))

    async def scenario() -> None:
        async with serve() as server:
            before = time.time()
            portrait = (await register(server, image=image)).portrait
            assert len(portrait.id) >= 22
            assert (portrait.width, portrait.height) == (480, 400)
            [found] = portrait.faces
            points = np.array(found.landmarks, np.float32).reshape(478, 2)
            box = (found.box.left, found.box.top, found.box.right, found.box.bottom)
            near = 2.0 if form in (".jpg", ".webp") else 1e-3
            assert np.abs(points - expected.points[:, :2]).max() < near
            assert np.abs(np.array(box) - np.array(expected.box)).max() < near
            assert 0.9 < found.score <= 1.0
            assert list(portrait.detected_faces) == [found.box]
            thumbnail = cv2.imdecode(np.frombuffer(portrait.thumbnail, np.uint8), cv2.IMREAD_COLOR)
            assert thumbnail.shape == (107, 128, 3)
            assert thumbnail[53, 58].min() > 200
            assert thumbnail[5, 5].max() < 50
            assert portrait.memory_bytes >= rgb.nbytes
            created, expires = portrait.created_at.ToNanoseconds(), portrait.expires_at.ToNanoseconds()
            assert before - 1 <= created / 1e9 <= time.time() + 1
            assert abs((expires - created) / 1e9 - 3600) < 5
            listed = await listing(server)
            [again] = listed.portraits
            assert again.id == portrait.id
            assert again.faces[0].box == found.box
            assert not again.faces[0].landmarks
            assert not again.thumbnail
            assert listed.memory_bytes == portrait.memory_bytes <= listed.memory_limit_bytes
            await delete(server, portrait.id)
            assert not (await listing(server)).portraits
            code, detail = await failure_of(delete(server, portrait.id))
            assert (code, detail.type) == (Code.NOT_FOUND, "NotFoundError")
            assert portrait.id not in detail.got

    run(scenario())


def test_faces_are_chosen_from_left_to_right(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:

            async def chosen(which: str) -> list[float]:
                answer = (await register(server, faces(), options=options(faces=which))).portrait
                lefts = [box.left for box in answer.detected_faces]
                assert len(lefts) == 2
                assert lefts == sorted(lefts)
                assert answer.options.faces == which or not which
                return [lefts.index(found.box.left) for found in answer.faces]

            assert await chosen("") == [0]
            assert await chosen("largest") == [0]
            assert await chosen("all") == [0, 1]
            assert await chosen("left-right") == [0, 1]
            assert await chosen("1") == [1]
            assert await chosen("1,0") == [1, 0]
            code, detail = await failure_of(register(server, faces(), options=options(faces="2")))
            assert (code, detail.type) == (Code.FAILED_PRECONDITION, "NoFaceError")

    run(scenario())


PLAIN = encode_image(face(), ".png")


@pytest.mark.parametrize(
    ("fields", "code", "kind"),
    [
        ({"rgb": face(None)}, Code.FAILED_PRECONDITION, "NoFaceError"),
        ({"image": common_pb2.Image()}, Code.INVALID_ARGUMENT, "ProtocolError"),
        ({"image": common_pb2.Image(encoded={"data": b""})}, Code.INVALID_ARGUMENT, "MediaError"),
        ({"image": common_pb2.Image(encoded={"data": PLAIN[:-40]})}, Code.INVALID_ARGUMENT, "MediaError"),
        ({"image": common_pb2.Image(encoded={"data": b"GIF89a" * 9})}, Code.INVALID_ARGUMENT, "MediaError"),
        (
            {"image": common_pb2.Image(raw={"width": 2**32 - 1, "height": 2**32 - 1})},
            Code.RESOURCE_EXHAUSTED,
            "LimitError",
        ),
        ({"image": common_pb2.Image(raw={"width": 15, "height": 15})}, Code.INVALID_ARGUMENT, "MediaError"),
        (
            {"image": common_pb2.Image(raw={"width": 20, "height": 20, "data": b"1"})},
            Code.INVALID_ARGUMENT,
            "ProtocolError",
        ),
        (
            {"image": common_pb2.Image(shared={"width": 20, "height": 20})},
            Code.INVALID_ARGUMENT,
            "ProtocolError",
        ),
        ({"thumbnail_side": 15}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"thumbnail_side": 513}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"options": {"size": 127}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"options": {"size": 2049}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"options": {"faces": "everyone"}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"options": {"faces": "0,0"}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"options": {"faces": "-1"}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"options": {"crop": {"scale": 2.3}}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"time_to_live": {"seconds": 0}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"time_to_live": {"seconds": -1}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"time_to_live": {"seconds": 3601}}, Code.INVALID_ARGUMENT, "ConfigError"),
    ],
)
def test_what_cannot_be_registered_is_refused_and_kept_nowhere(
    serve: Serve, fields: dict[str, Any], code: Code, kind: str
) -> None:
    async def scenario() -> None:
        async with serve() as server:
            got, detail = await failure_of(register(server, **fields))
            assert (got, detail.type) == (code, kind), detail
            assert not (await listing(server)).portraits
            await server.idle()

    run(scenario())


def test_the_smallest_and_the_largest_thumbnail(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            for side, shape in ((16, (13, 16)), (512, (200, 240))):  # never larger than the picture
                answer = await register(server, thumbnail_side=side)
                pixels = cv2.imdecode(np.frombuffer(answer.portrait.thumbnail, np.uint8), cv2.IMREAD_COLOR)
                assert pixels.shape[:2] == shape

    run(scenario())


def test_too_many_pixels_are_refused_before_they_are_decoded(serve: Serve) -> None:
    bomb = encode_image(np.zeros((600, 600, 3), np.uint8), ".png")

    async def scenario() -> None:
        async with serve(limits=Limits(max_pixels=100 * 100)) as server:
            small = face(50, 50, 40, width=100, height=100)
            await register(server, small)
            for image in (raw(face()), common_pb2.Image(encoded=common_pb2.EncodedImage(data=bomb))):
                code, detail = await failure_of(register(server, image=image))
                assert (code, detail.type) == (Code.RESOURCE_EXHAUSTED, "LimitError")

    run(scenario())


def test_portraits_make_room_for_others_unless_they_are_used(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(limits=Limits(max_portraits=2)) as server:
            first, second = await server.register(), await server.register()
            call = await server.animate(first, mode=LOSSLESS)
            third = await server.register()  # second was not used for longest, of those that nobody uses
            listed = {p.id: p.active_streams for p in (await listing(server)).portraits}
            assert listed == {first: 1, third: 0}
            other = await server.animate(third, mode=LOSSLESS)
            code, detail = await failure_of(register(server))
            assert (code, detail.type) == (Code.RESOURCE_EXHAUSTED, "LimitError")
            assert detail.retry_after_ms > 0
            assert (await failure_of(delete(server, second)))[0] == Code.NOT_FOUND
            await call.end()
            await other.end()
            await server.idle()
            await server.register()

    run(scenario())


def test_a_portrait_expires_when_it_is_not_used(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            short = portraits_pb2.RegisterPortraitRequest(image=raw(face()))
            short.time_to_live.FromMilliseconds(300)
            used = (await server.portraits.RegisterPortrait(short)).portrait.id
            call = await server.animate(used, mode=LOSSLESS)
            gone = (await server.portraits.RegisterPortrait(short)).portrait.id
            await asyncio.sleep(0.4)
            assert [p.id for p in (await listing(server)).portraits] == [used]
            assert (await failure_of(delete(server, gone)))[0] == Code.NOT_FOUND
            await call.frame(face())
            await call.answer()
            await call.end()
            await until(lambda: not server.core.store.list(), "it expires after its stream")

    run(scenario())


def test_a_portrait_too_large_for_the_memory_is_refused(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(limits=Limits(max_portrait_bytes=1 << 20)) as server:
            await register(server)
            code, detail = await failure_of(register(server, face(400, 400, 300, width=800, height=800)))
            assert (code, detail.type) == (Code.RESOURCE_EXHAUSTED, "LimitError")
            assert len((await listing(server)).portraits) == 1

    run(scenario())


# -- info ----------------------------------------------------------------------------------------------------


def test_the_server_describes_itself(serve: Serve, toy_bundle: Path) -> None:
    limits = Limits(max_streams=3, max_queue=7)

    async def scenario() -> None:
        async with serve(limits=limits, max_batch=5, idle_timeout_s=12.5) as server:
            call = await server.animate()
            info = await server.info.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert info.version == lp_edge.__version__
            assert (info.bundle.family, info.bundle.variant) == ("mesh", "toy")
            assert info.bundle.licence == "Apache-2.0"
            assert info.bundle.manifest_sha256 == sha256_file(toy_bundle / MANIFEST)
            networks = {n.name: n for n in info.bundle.networks}
            assert set(networks) == {"face_detector", "face_mesh", "warp_decode"}
            for name, network in networks.items():
                assert network.sha256 == sha256_file(toy_bundle / f"{name}.onnx")
                assert network.precision == "fp32"
            [device] = info.devices
            assert device.backend == "cpu"
            assert device.name
            assert device.threads >= 1
            assert info.motion.family == "mesh"
            assert info.motion.layout == common_pb2.EXPRESSION_LAYOUT_COEFFICIENTS
            assert (info.motion.expression_size, info.motion.keypoints) == (1, 478)
            neutral = motion_from_message(info.motion.neutral, server.core.space)
            assert np.isfinite(neutral.expression).all()
            assert {e.name for e in info.edits} >= {"smile", "yaw", "blink"}
            for edit in info.edits:
                assert edit.minimum < edit.maximum
                assert edit.unit
                assert edit.description
                assert not edit.HasField("neutral") or edit.minimum <= edit.neutral <= edit.maximum
            assert list(info.templates) == list(GESTURES)
            told = info.limits
            for name in limits.__dataclass_fields__:
                assert getattr(told, name) == getattr(limits, name)
            assert told.max_batch == 5
            assert told.idle_timeout.ToMilliseconds() == 12500
            assert told.portrait_time_to_live.ToSeconds() == 3600
            assert told.max_batch_wait.ToNanoseconds() == 0
            assert (info.load.streams, info.load.portraits, info.load.draining) == (1, 1, False)
            assert info.load.portrait_bytes == server.core.store.memory_bytes
            assert {"python", "numpy", "onnxruntime", "grpcio"} <= set(info.versions)
            assert info.uptime.ToMilliseconds() >= 0
            assert (
                set(common_pb2.OutputEncoding.values()) - {0}
                >= set(info.output_encodings)
                >= {
                    common_pb2.OUTPUT_ENCODING_JPEG,
                    common_pb2.OUTPUT_ENCODING_RAW,
                    common_pb2.OUTPUT_ENCODING_SHARED_MEMORY,
                    common_pb2.OUTPUT_ENCODING_NONE,
                }
            )
            # every value that it names is one that it takes
            for name in info.templates[:1]:
                job = server.animation.Render()
                await job.write(
                    animation_pb2.RenderRequest(
                        config=animation_pb2.RenderConfig(
                            portrait_id=server.core.store.list()[0].id, built_in=name
                        )
                    )
                )
                assert (await job.read()).WhichOneof("message") == "frame"
                job.cancel()
            await call.motion(info.motion.neutral)
            assert (await call.answer()).pictures
            await call.end()
            await server.idle()

    run(scenario())


def test_without_shared_memory_its_encoding_is_not_offered(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(limits=Limits(max_shared_memory_bytes=0)) as server:
            info = await server.info.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert common_pb2.OUTPUT_ENCODING_SHARED_MEMORY not in info.output_encodings
            call = server.open()
            asked = animation_pb2.SharedMemoryRequest(driving_slots=1, driving_slot_bytes=9)
            config = animation_pb2.AnimateConfig(portrait_ids=[await server.register()], shared_memory=asked)
            await call.write(config=config)
            assert (await call.failure())[0] == Code.INVALID_ARGUMENT

    run(scenario())


def test_info_is_given_while_draining_and_all_else_is_refused(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            server.core.drain(5.0)
            info = await server.info.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert info.load.draining
            for call in (
                register(server),
                listing(server),
                delete(server, "x"),
                server.animation.Render().read(),
            ):
                code, detail = await failure_of(call)
                assert (code, detail.type) == (Code.UNAVAILABLE, "ServerUnavailable")
                assert detail.retry_after_ms > 0

    run(scenario())


def test_while_networks_load_calls_are_refused_and_info_says_little(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Core, "open", lambda self: None)  # never done

    async def scenario() -> None:
        async with serve() as server:
            info = await server.info.GetServerInfo(server_pb2.GetServerInfoRequest())
            assert info.version
            assert not info.devices
            for call in (register(server), listing(server), server.animation.Animate().read()):
                code, detail = await failure_of(call)
                assert (code, detail.type) == (Code.UNAVAILABLE, "ServerUnavailable")

    run(scenario())


def test_an_unexpected_error_tells_nothing_of_the_inside(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serve(tolerate="a secret of the server") as server:

            def fail(*args: Any) -> Any:
                raise RuntimeError("a secret of the server")

            monkeypatch.setattr(type(server.core.devices[0].animator.finder), "find", fail)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await register(server)
            assert caught.value.code() == Code.INTERNAL
            assert "secret" not in str(caught.value)
            _, detail = await failure_of(register(server))
            assert "secret" not in str(detail)
            assert detail.stream_id
            assert any(detail.stream_id in str(vars(record).get("fields")) for record in caplog.records)
            await server.idle()

    run(scenario())
    assert caplog.text.count("RuntimeError: a secret of the server") == 2  # once each, with a traceback
