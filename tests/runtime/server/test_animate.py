"""Animate over a real channel, with the toy networks: what is answered, when, and what happens at the edges."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")

import grpc

from lp_edge.engines.backends import BackendConfig
from lp_edge.proto.v1 import animation_pb2, animation_pb2_grpc, common_pb2, portraits_pb2
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.image import encode_image
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.server import stream as stream_module
from lp_edge.runtime.server.codec import PictureDecoder
from lp_edge.runtime.server.config import Limits
from lp_edge.runtime.server.wire import MotionSpace, motion_from_message, motion_to_message
from lp_edge.runtime.shared_frames import FrameLayout, SharedFrames, SlotRing
from lp_edge.tests.runtime.server.serving import (
    LIVE,
    LOSSLESS,
    NONE,
    RAW,
    Call,
    Gate,
    Served,
    alive,
    face,
    failure_of,
    pixels,
    raw,
    run,
    segments,
    until,
)

Code = grpc.StatusCode
Serve = Callable[..., Any]
SIDE = 200 * 240 * 3
SHARED = common_pb2.OutputOptions(encoding=common_pb2.OUTPUT_ENCODING_SHARED_MEMORY)


@contextmanager
def animator(bundle: Path) -> Iterator[Animator]:
    """The same networks without a server."""
    with Animator(bundle, backend=BackendConfig("cpu", threads=1)) as it:
        yield it


def moving(count: int, start: int = 90, step: int = 2) -> list[np.ndarray]:
    """A face that goes to the right and opens its mouth."""
    return [face(start + step * i, blue=255 - 8 * (i % 16)) for i in range(count)]


def seconds(index: int) -> float:
    """Time of the frame of that index, from 0."""
    return index * 40_000 / 1e6


def jpeg(rgb: np.ndarray) -> bytes:
    """A JPEG file."""
    return encode_image(rgb, ".jpg", quality=95)


def options(**fields: Any) -> common_pb2.AnimationOptions:
    """A message of options."""
    return common_pb2.AnimationOptions(**fields)


def kinds(answers: list[Any]) -> list[str]:
    """What answers are."""
    return [answer.WhichOneof("message") for answer in answers]


def warp_of(server: Served) -> Any:
    """The network that draws, as the device's worker has wrapped it."""
    return server.core.devices[0].animator.family._warp


def mesh_of(server: Served) -> Any:
    """The network that reads faces."""
    return server.core.devices[0].animator.finder.mesh.runner


# -- lossless ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paste_back", [True, False])
def test_lossless_answers_every_frame_in_order_with_the_pixels_of_the_python_api(
    serve: Serve, toy_bundle: Path, paste_back: bool
) -> None:
    source = face(220, 200, 160, width=480, height=400)
    frames = [face(None)] * 2 + moving(12) + [face(None)] * 3 + moving(6, 120)
    with animator(toy_bundle) as reference:
        live = reference.live(source, AnimateOptions(paste_back=paste_back))
        expected = [live.step(rgb, seconds(i)) for i, rgb in enumerate(frames)]

    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(
                await server.register(source), mode=LOSSLESS, options=options(paste_back=paste_back)
            )
            sending = asyncio.ensure_future(send(call))
            answers = [await call.answer() for _ in frames]
            await sending
            assert await call.end() == []
        assert [a.sequence for a in answers] == list(range(1, len(frames) + 1))
        assert [a.timestamp_us for a in answers] == [40_000 * i for i in range(len(frames))]
        for answer, want in zip(answers, expected, strict=True):
            assert (pixels(answer.pictures[0]) == want.rgb).all()
        assert {a.dropped for a in answers} == {a.undecodable for a in answers} == {0}
        names = [common_pb2.FaceState.Name(a.face_state).removeprefix("FACE_STATE_") for a in answers]
        assert names == [want.driver.state.upper() for want in expected]
        assert set(names) == {"NONE", "TRACKED", "LOST", "REACQUIRED"}

    async def send(call: Call) -> None:
        for rgb in frames:
            await call.frame(rgb)

    run(scenario())


def test_timings_tell_the_stages_in_their_order(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LOSSLESS)
            before = time.time_ns() // 1000
            await call.frame(face())
            timings = (await call.answer()).timings
            assert before <= timings.received_us <= time.time_ns() // 1000
            stages = {s.stage: s for s in timings.stages}
            assert {"queue", "decode", "track", "motion", "compose", "warp", "paste_back", "encode"} <= set(
                stages
            )
            starts = [s.start_us for s in timings.stages]
            assert starts == sorted(starts)
            # microseconds are rounded
            assert all(s.start_us + s.duration_us <= timings.total_us + 2 for s in timings.stages)
            await call.end()

    run(scenario())


def test_what_a_client_does_not_read_is_not_drawn_ahead(serve: Serve) -> None:
    big = face(512, 512, 400, width=1024, height=1024)
    limit = Limits(max_queue=4)

    async def scenario() -> None:
        async with serve(limits=limit) as server:
            call = await server.animate(await server.register(big), mode=LOSSLESS)
            other = await server.animate(mode=LOSSLESS)
            sent = 0

            async def send() -> None:
                nonlocal sent
                for _ in range(400):
                    await call.frame(big)
                    sent += 1

            sending = asyncio.ensure_future(send())
            last = -1
            while last != (last := sent):
                for _ in range(20):  # another stream is served meanwhile, frame by frame
                    await other.frame(face())
                    await other.answer()
            # Pictures of 3 MiB: HTTP/2 windows take a few of them, the server its queue and one for each stage.
            assert 0 < sent < 60
            assert alive(stream_module._Item) <= limit.max_queue + 2 * 4 + 2
            read = [(await call.answer()).sequence for _ in range(30)]
            assert read == list(range(1, 31))
            await call.cancelled()
            await asyncio.gather(sending, return_exceptions=True)
            await other.end()
            await server.idle()

    run(scenario())


def test_a_full_inbox_stops_the_sender_and_loses_nothing(serve: Serve) -> None:
    big = raw(face(512, 512, 400, width=1024, height=1024))
    limit = Limits(max_queue=2)

    async def scenario() -> None:
        async with serve(limits=limit) as server:
            warp = Gate(warp_of(server))
            call = await server.animate(mode=LOSSLESS)
            warp.shut()
            sent = 0

            async def send() -> None:
                nonlocal sent
                for _ in range(80):
                    await call.frame(big)
                    sent += 1

            sending = asyncio.ensure_future(send())
            await until(lambda: warp.calls == 1, "the first frame is drawn")
            last = -1
            while last != (last := sent):
                await asyncio.sleep(0.5)
            assert 0 < sent < 60
            assert alive(stream_module._Item) <= limit.max_queue + 2 * 4 + 2
            warp.open()
            read = [(await call.answer()).sequence for _ in range(80)]
            assert read == list(range(1, 81))
            await sending
            assert await call.end() == []

    run(scenario())


# -- live ----------------------------------------------------------------------------------------------------


def test_live_drops_what_waits_and_tells_it(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LIVE)
            warp = Gate(warp_of(server))
            warp.shut()
            await call.frame(face())
            await until(lambda: warp.calls == 1, "the first frame is drawn")
            for x in range(2, 11):
                await call.frame(face(100 + x))
            skipped = [await call.read() for _ in range(8)]
            assert [s.skipped.sequence for s in skipped] == list(range(2, 10))
            assert {s.skipped.reason for s in skipped} == {animation_pb2.SKIP_REASON_NEWER}
            warp.open()
            first, second = await call.answer(), await call.answer()
            assert (first.sequence, second.sequence, second.dropped) == (1, 10, 8)
            assert await call.end() == []

    run(scenario())


def test_live_answers_the_newest_frame_last_and_accounts_for_all(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LIVE)
            for rgb in moving(60, step=1):
                await call.frame(rgb)
            answers = await call.end()
        shown = [a.frame.sequence for a in answers if a.WhichOneof("message") == "frame"]
        skipped = [a.skipped.sequence for a in answers if a.WhichOneof("message") == "skipped"]
        assert shown == sorted(shown)
        assert shown[-1] == 60
        assert sorted(shown + skipped) == list(range(1, 61))
        last = next(a.frame for a in reversed(answers) if a.WhichOneof("message") == "frame")
        assert last.dropped == len(skipped)

    run(scenario())


def test_what_was_asked_before_a_dropped_frame_still_holds(serve: Serve, toy_bundle: Path) -> None:
    frames = moving(3, step=10)
    with animator(toy_bundle) as reference:
        live = reference.live(face(), AnimateOptions(smooth=False))
        live.step(frames[0], seconds(0))
        live.set_options(AnimateOptions(smooth=False, multiplier=0.5))
        expected = live.step(frames[2], seconds(2)).rgb

    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LIVE, options=options(smooth=False))
            warp = Gate(warp_of(server))
            warp.shut()
            await call.frame(frames[0])
            await until(lambda: warp.calls == 1, "the first frame is drawn")
            await call.write(options=options(smooth=False, multiplier=0.5))
            await call.frame(frames[1])
            await call.frame(frames[2])
            dropped = await call.read()
            assert dropped.skipped.sequence == 2
            warp.open()
            await call.answer()
            assert (pixels((await call.answer()).pictures[0]) == expected).all()
            await call.end()

    run(scenario())


def test_frames_that_cannot_be_decoded_are_told_in_live_and_end_a_lossless_stream(serve: Serve) -> None:
    good = jpeg(face())

    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            live = await server.animate(ids, mode=LIVE)
            for index, data in enumerate((good, good[:200], b"no picture", good)):
                await live.frame(data)
                answer = await live.read()
                assert answer.WhichOneof("message") == ("frame" if data is good else "skipped")
                if data is not good:
                    assert answer.skipped.sequence == index + 1
                    assert answer.skipped.reason == animation_pb2.SKIP_REASON_UNDECODABLE
            assert (answer.frame.sequence, answer.frame.undecodable, answer.frame.dropped) == (4, 2, 0)
            await live.end()
            lossless = await server.animate(ids, mode=LOSSLESS)
            await lossless.frame(good)
            await lossless.answer()
            await lossless.frame(good[:200])
            code, detail = await lossless.failure()
            assert (code, detail.type) == (Code.INVALID_ARGUMENT, "MediaError")
            assert detail.stream_id == lossless.started.stream_id
            await server.idle()

    run(scenario())


# -- options and neutral in mid-stream -----------------------------------------------------------------------


def test_options_and_neutral_take_effect_at_the_next_frame(serve: Serve, toy_bundle: Path) -> None:
    frames = moving(16, step=4)
    strong = AnimateOptions(smooth=False, multiplier=2.0)
    poses = AnimateOptions(smooth=False, region="pose", paste_back=False)
    with animator(toy_bundle) as reference:
        space = MotionSpace("mesh", 478, reference.canonical)
        live = reference.live(face(), AnimateOptions(smooth=False))
        expected, messages = [], {}
        for i, rgb in enumerate(frames):
            if i == 4:
                live.set_options(strong)
            if i == 7:
                live.set_neutral(None)
            if i == 9:
                live.set_options(poses)
            if i == 12:
                given = motion_to_message(expected[5].driver.motion, space)
                messages[i] = given
                live.set_neutral(motion_from_message(given, space))
            expected.append(live.step(rgb, seconds(i)))

    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LOSSLESS, options=options(smooth=False))
            for i, rgb in enumerate(frames):
                if i == 4:
                    await call.write(options=options(smooth=False, multiplier=2.0))
                if i == 7:
                    await call.write(set_neutral=animation_pb2.SetNeutral())
                if i == 9:
                    asked = options(smooth=False, region=common_pb2.REGION_POSE, paste_back=False)
                    await call.write(options=asked)
                if i == 12:
                    await call.write(set_neutral=animation_pb2.SetNeutral(motion=messages[i]))
                await call.frame(rgb)
            answers = await call.end()
        same = [(pixels(a.frame.pictures[0]), e.rgb) for a, e in zip(answers, expected, strict=True)]
        assert [got.shape == want.shape and (got == want).all() for got, want in same] == [True] * 16

    run(scenario())


def test_options_replace_all_of_the_old_ones(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LOSSLESS, options=options(smooth=False, paste_back=False))
            await call.frame(face())
            crop = (await call.answer()).pictures[0]
            await call.write(options=options(multiplier=1.0))
            await call.frame(face())
            whole = (await call.answer()).pictures[0]
            assert crop.width == crop.height != whole.width
            assert (whole.width, whole.height) == (240, 200)
            await call.end()

    run(scenario())


@pytest.mark.parametrize(
    "wrong",
    [
        {"multiplier": 3.5},
        {"multiplier": float("nan")},
        {"region": 99},
        {"edits": {"smile": float("inf")}},
        {"edits": {"no such slider": 0.1}},
        {"liveportrait": common_pb2.LivePortraitOptions(stitching=True)},
    ],
)
def test_wrong_options_end_the_stream_at_its_start_and_in_the_middle(serve: Serve, wrong: Any) -> None:
    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            call = await server.animate(ids, mode=LOSSLESS)
            await call.frame(face())
            await call.answer()
            await call.write(options=options(**wrong))
            code, detail = await call.failure()
            assert (code, detail.type) == (Code.INVALID_ARGUMENT, "ConfigError")
            start = server.open()
            await start.write(
                config=animation_pb2.AnimateConfig(portrait_ids=[ids], options=options(**wrong))
            )
            assert (await start.failure())[1].type == "ConfigError"
            await server.idle()

    run(scenario())


# -- portraits, motion, encodings ----------------------------------------------------------------------------


def test_several_portraits_follow_one_driver(serve: Serve, toy_bundle: Path) -> None:
    sources = [face(), face(220, 200, 160, width=480, height=400), face(90, 120, 60)]
    frames = moving(8, step=5)
    with animator(toy_bundle) as reference:
        expected = []
        for source in sources:
            live = reference.live(source)
            expected.append([live.step(rgb, seconds(i)).rgb for i, rgb in enumerate(frames)])

    async def scenario() -> None:
        async with serve() as server:
            ids = [await server.register(source) for source in sources]
            call = await server.animate(ids, mode=LOSSLESS)
            for rgb in frames:
                await call.frame(rgb)
            answers = await call.end()
        for i, answer in enumerate(answers):
            assert len(answer.frame.pictures) == 3
            for picture, want in zip(answer.frame.pictures, expected, strict=True):
                assert (pixels(picture) == want[i]).all()

    run(scenario())


def test_motion_alone_drives_as_a_step_of_motion(serve: Serve, toy_bundle: Path) -> None:
    with animator(toy_bundle) as reference:
        space = MotionSpace("mesh", 478, reference.canonical)
        messages = []
        for i in range(10):
            message = motion_to_message(space.rest, space)
            message.yaw, message.pitch, message.translation[0] = 3.0 * i, -2.0 * i, 256.0 + 4 * i
            message.expression[0] = 0.02 * i
            messages.append(message)
        live = reference.live(face())
        expected = [
            live.step_motion(motion_from_message(m, space), seconds(i)).rgb for i, m in enumerate(messages)
        ]
        still = reference.live(face())
        still.set_neutral(motion_from_message(messages[-1], space))
        from_neutral = still.step_motion(motion_from_message(messages[0], space), 0.0).rgb

    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            call = await server.animate(ids, mode=LOSSLESS)
            for message in messages:
                await call.motion(message)
            answers = await call.end()
            for answer, want in zip(answers, expected, strict=True):
                assert answer.frame.face_state == common_pb2.FACE_STATE_MOTION
                assert (pixels(answer.frame.pictures[0]) == want).all()
            assert (expected[0] != expected[-1]).any()
            call = await server.animate(ids, mode=LOSSLESS, neutral=messages[-1])
            await call.motion(messages[0])
            assert (pixels((await call.answer()).pictures[0]) == from_neutral).all()
            await call.end()

    run(scenario())


def test_the_drivers_motion_is_answered_where_it_was_asked_for(serve: Serve, toy_bundle: Path) -> None:
    frames = [face(None), *moving(3, step=6), face(None)]
    with animator(toy_bundle) as reference:
        space = MotionSpace("mesh", 478, reference.canonical)
        live = reference.live(face())
        read = [live.step(rgb, seconds(i)).driver.motion for i, rgb in enumerate(frames)]
        layout = common_pb2.EXPRESSION_LAYOUT_KEYPOINTS
        expected = {
            which: [None if motion is None else motion_to_message(motion, space, which) for motion in read]
            for which in (0, layout)
        }

    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            for which, want in expected.items():
                call = await server.animate(
                    ids, mode=LOSSLESS, output=NONE, with_motion=True, motion_layout=which
                )
                for rgb in frames:
                    await call.frame(rgb)
                answers = [a.frame for a in await call.end()]
                assert [a.motion if a.HasField("motion") else None for a in answers] == want
                assert not any(a.pictures for a in answers)
                assert not want[0]
                assert want[4] == want[3]  # held

    run(scenario())


@pytest.mark.parametrize("size", [(0, 0), (120, 0), (101, 77)])
@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "RAW", "H264", "SHARED_MEMORY"])
def test_every_encoding_carries_the_same_picture(serve: Serve, encoding: str, size: tuple[int, int]) -> None:
    number = common_pb2.OutputEncoding.Value(f"OUTPUT_ENCODING_{encoding}")
    frames = moving(4, step=8)

    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            width, height = size
            plain = await server.animate(
                ids,
                mode=LOSSLESS,
                output=common_pb2.OutputOptions(encoding=RAW.encoding, width=width, height=height),
            )
            asked = common_pb2.OutputOptions(
                encoding=number,
                width=width,
                height=height,
                crf=1,
                quality=100,
                pixel_format=common_pb2.PIXEL_FORMAT_BGR24,
            )
            shared = animation_pb2.SharedMemoryRequest(result_slots=4, result_slot_bytes=SIDE)
            extra = {"shared_memory": shared} if encoding == "SHARED_MEMORY" else {}
            call = await server.animate(ids, mode=LOSSLESS, output=asked, **extra)
            slots = None
            if extra:
                layout = FrameLayout(0, 0, 4, SIDE)
                slots = SharedFrames.attach(call.started.shared_memory.name, layout)
                await call.write(shared_memory_mapped=animation_pb2.SharedMemoryMapped())
            decoder = PictureDecoder(lambda slot, w, h: slots.read("result", slot, h, w))
            for rgb in frames:
                for other in (plain, call):
                    await other.frame(rgb)
                want = pixels((await plain.answer()).pictures[0])
                [picture] = (await call.answer()).pictures
                assert picture.encoding == number
                assert (picture.height, picture.width) == want.shape[:2]
                got = decoder.decode(picture)
                if encoding in ("PNG", "RAW", "SHARED_MEMORY"):
                    assert (got == want).all()
                else:
                    assert np.abs(got.astype(int) - want.astype(int)).mean() < 3.0
                if encoding == "H264":
                    assert picture.keyframe == (other.sent == 1)
            decoder.close()
            if slots is not None:
                slots.close()
            await plain.end()
            await call.end()

    run(scenario())


# -- shared memory -------------------------------------------------------------------------------------------


def asking(driving: int = 0, results: int = 0, size: int = SIDE) -> animation_pb2.SharedMemoryRequest:
    """A request for slots of one size."""
    return animation_pb2.SharedMemoryRequest(
        driving_slots=driving,
        driving_slot_bytes=size if driving else 0,
        result_slots=results,
        result_slot_bytes=size if results else 0,
    )


async def mapped(call: Call, driving: int = 0, results: int = 0, size: int = SIDE) -> SharedFrames:
    """Map what the server has announced, and say so."""
    told = call.started.shared_memory
    layout = FrameLayout(driving, size if driving else 0, results, size if results else 0)
    assert (told.size, told.driving_stride) == (layout.size, layout.stride("driving"))
    assert (told.results_offset, told.result_stride) == (layout.start("result"), layout.stride("result"))
    frames = SharedFrames.attach(told.name, layout)
    await call.write(shared_memory_mapped=animation_pb2.SharedMemoryMapped())
    return frames


def in_slot(slot: int, width: int = 240, height: int = 200, **fields: Any) -> common_pb2.Image:
    """A picture in shared memory."""
    return common_pb2.Image(shared=common_pb2.SharedImage(slot=slot, width=width, height=height, **fields))


def test_frames_travel_through_shared_memory_and_slots_are_used_again(serve: Serve, toy_bundle: Path) -> None:
    frames = moving(20)
    with animator(toy_bundle) as reference:
        live = reference.live(face())
        expected = [live.step(rgb, seconds(i)).rgb for i, rgb in enumerate(frames)]

    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LOSSLESS, output=SHARED, shared_memory=asking(2, 3))
            assert segments() == {call.started.shared_memory.name}
            shared = await mapped(call, 2, 3)
            ring, used, answered = SlotRing("driving", 2), set(), 0

            async def take() -> None:
                nonlocal answered
                answer = await call.read()
                if answer.driving_taken:
                    ring.acknowledge(answer.driving_taken)
                [picture] = answer.frame.pictures
                used.add(picture.slot)
                assert not picture.data
                got = shared.read("result", picture.slot, picture.height, picture.width)
                assert (got == expected[answered]).all()
                answered += 1
                assert answer.frame.sequence == answered
                if answered % 2 == 0:  # both ways: with a message, and on its own
                    await call.write(results_taken=answered)

            for index, rgb in enumerate(frames):
                while (slot := ring.take(index + 1)) is None:
                    await take()
                shared.write("driving", slot, rgb)
                await call.frame(in_slot(slot), results_taken=answered)
            while answered < len(frames):
                await take()
            assert segments() == set()  # the name went when it was mapped
            assert len(used) >= 2
            assert await call.end() == []
            shared.close()

    run(scenario())


def test_two_pictures_of_a_frame_lie_in_two_slots(serve: Serve, toy_bundle: Path) -> None:
    sources, frames = [face(), face(80, 90, 60)], moving(9)
    with animator(toy_bundle) as reference:
        lives = [reference.live(source) for source in sources]
        expected = [[li.step(rgb, seconds(i)).rgb for li in lives] for i, rgb in enumerate(frames)]

    async def scenario() -> None:
        async with serve() as server:
            ids = [await server.register(source) for source in sources]
            for slots in (2, 3):  # 3: a frame holds one while it waits for the other
                call = await server.animate(ids, mode=LOSSLESS, output=SHARED, shared_memory=asking(0, slots))
                shared = await mapped(call, 0, slots)
                for rgb in frames:
                    await call.frame(rgb)
                for want in expected:
                    answer = await call.answer()
                    assert len({p.slot for p in answer.pictures}) == 2
                    for picture, pixel in zip(answer.pictures, want, strict=True):
                        assert (shared.read("result", picture.slot, 200, 240) == pixel).all()
                    await call.write(results_taken=answer.sequence)
                assert await call.end() == []
                shared.close()

    run(scenario())


def test_fewer_result_slots_than_portraits_are_refused(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(idle_timeout_s=1.0) as server:
            ids = [await server.register(), await server.register()]
            call = server.open()
            await call.write(
                config=animation_pb2.AnimateConfig(
                    portrait_ids=ids, output=SHARED, shared_memory=asking(0, 1)
                )
            )
            code, detail = await call.failure()
            assert (code, detail.type) == (Code.INVALID_ARGUMENT, "ConfigError")
            assert segments() == set()

    run(scenario())


def test_live_draws_nothing_without_a_result_slot_and_then_shows_the_newest(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LIVE, output=SHARED, shared_memory=asking(0, 1))
            shared = await mapped(call, 0, 1)
            warp = Gate(warp_of(server))
            await call.frame(face())
            assert (await call.answer()).sequence == 1
            for x in range(2, 9):
                await call.frame(face(100 + x))
            skipped = [await call.read() for _ in range(6)]
            assert [s.skipped.sequence for s in skipped] == list(range(2, 8))
            assert warp.calls == 1
            await call.write(results_taken=1)
            newest = await call.answer()
            assert (newest.sequence, newest.dropped) == (8, 6)
            await call.write(results_taken=8)
            assert await call.end() == []
            shared.close()

    run(scenario())


def test_frames_beyond_the_result_slots_wait_and_too_many_are_refused(serve: Serve) -> None:
    limit = Limits(max_queue=2)

    async def scenario() -> None:
        async with serve(limits=limit) as server:
            ids = await server.register()
            call = await server.animate(ids, mode=LOSSLESS, output=SHARED, shared_memory=asking(0, 2))
            shared = await mapped(call, 0, 2)
            for _ in range(40):  # more than slots and queue, and nothing is acknowledged
                await call.frame(face())
            for sequence in range(1, 41):
                assert (await call.answer()).sequence == sequence
                await call.write(results_taken=sequence)
            assert await call.end() == []
            shared.close()
            flood = Flood(server, ids, LOSSLESS, output=SHARED, shared_memory=asking(0, 2))
            code, detail = await flood.failure()
            assert (code, detail.type) == (Code.RESOURCE_EXHAUSTED, "LimitError")
            assert "results_taken" in detail.expected
            await server.idle()

    run(scenario())


async def _unmapped(call: Call) -> None:
    await call.frame(in_slot(0))


async def _unmapped_result(call: Call) -> None:
    await call.frame(face())


def _after_mapping(*steps: Callable[[Call], Any]) -> Callable[[Call], Any]:
    async def play(call: Call) -> None:
        await call.write(shared_memory_mapped=animation_pb2.SharedMemoryMapped())
        for step in steps:
            await step(call)

    return play


SHM_FAULTS: dict[str, tuple[str, Callable[[Call], Any]]] = {
    "a slot before mapping": ("ProtocolError", _unmapped),
    "a result before mapping": ("ProtocolError", _unmapped_result),
    "a slot that does not exist": ("ProtocolError", _after_mapping(lambda c: c.frame(in_slot(2)))),
    "slot 2^32 - 1": ("ProtocolError", _after_mapping(lambda c: c.frame(in_slot(2**32 - 1)))),
    "mapped twice": ("ProtocolError", _after_mapping(_after_mapping())),
    "a slot that is in use": (
        "ProtocolError",
        _after_mapping(*[lambda c: c.frame(in_slot(0))] * 2),
    ),
    "a picture larger than the slot": (
        "MediaError",
        _after_mapping(lambda c: c.frame(in_slot(0, 241, 200))),
    ),
    "a huge picture": ("LimitError", _after_mapping(lambda c: c.frame(in_slot(0, 2**32 - 1, 2**32 - 1)))),
    "a tiny picture": ("MediaError", _after_mapping(lambda c: c.frame(in_slot(0, 15, 200)))),
    "an unknown pixel format": (
        "ProtocolError",
        _after_mapping(lambda c: c.frame(in_slot(0, format=77))),
    ),
    "results taken before they were sent": (
        "ProtocolError",
        _after_mapping(lambda c: c.write(results_taken=5)),
    ),
}


@pytest.mark.parametrize("fault", SHM_FAULTS)
def test_misuse_of_shared_memory_ends_the_stream(serve: Serve, fault: str) -> None:
    kind, play = SHM_FAULTS[fault]

    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LOSSLESS, output=SHARED, shared_memory=asking(2, 2))
            await play(call)
            code, detail = await call.failure()
            expected = Code.RESOURCE_EXHAUSTED if kind == "LimitError" else Code.INVALID_ARGUMENT
            assert (code, detail.type) == (expected, kind), detail
            assert segments() == set()
            await server.idle()

    run(scenario())


@pytest.mark.parametrize(
    ("request_", "output", "kind"),
    [
        (asking(65, 1), SHARED, "ConfigError"),
        (asking(1, 65), SHARED, "ConfigError"),
        (asking(0, 0), RAW, "ConfigError"),
        (asking(1, 0), SHARED, "ConfigError"),
        (None, SHARED, "ConfigError"),
        (asking(1, 1, 2**63), SHARED, "ConfigError"),
        (asking(64, 64, 1 << 28), SHARED, "LimitError"),
    ],
)
def test_slots_that_cannot_be_given_are_refused(serve: Serve, request_: Any, output: Any, kind: str) -> None:
    async def scenario() -> None:
        async with serve() as server:
            call = server.open()
            config = animation_pb2.AnimateConfig(
                portrait_ids=[await server.register()], output=output, shared_memory=request_
            )
            await call.write(config=config)
            code, detail = await call.failure()
            assert detail.type == kind
            wanted = Code.INVALID_ARGUMENT if kind == "ConfigError" else Code.RESOURCE_EXHAUSTED
            assert code == wanted
            assert segments() == set()

    run(scenario())


def test_result_slots_that_are_too_small_end_the_stream(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            call = await server.animate(mode=LOSSLESS, output=SHARED, shared_memory=asking(0, 2, SIDE - 1))
            shared = await mapped(call, 0, 2, SIDE - 1)
            await call.frame(face())
            code, detail = await call.failure()
            assert (code, detail.type) == (Code.INVALID_ARGUMENT, "MediaError")
            shared.close()

    run(scenario())


def test_a_client_that_never_maps_leaves_nothing_behind(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(idle_timeout_s=1.0) as server:
            ids = await server.register()
            cancelled = await server.animate(ids, output=SHARED, shared_memory=asking(1, 1))
            assert len(segments()) == 1
            await cancelled.cancelled()
            await until(lambda: not segments(), "the segment goes with the call")
            ended = await server.animate(ids, output=SHARED, shared_memory=asking(1, 1))
            assert await ended.end() == []
            await until(lambda: not segments(), "the segment goes with the call")
            silent = await server.animate(ids, output=SHARED, shared_memory=asking(1, 1))
            code, _ = await silent.failure()
            assert code == Code.DEADLINE_EXCEEDED
            assert segments() == set()

    run(scenario())


def test_a_client_that_truncates_the_segment_harms_only_its_own_stream(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            other = await server.animate(ids, mode=LOSSLESS)
            call = await server.animate(ids, mode=LOSSLESS, output=SHARED, shared_memory=asking(2, 2))
            shared = await mapped(call, 2, 2)
            os.ftruncate(shared._fd, 0)
            await call.frame(in_slot(0))
            code, detail = await call.failure()
            assert (code, detail.type) == (Code.INVALID_ARGUMENT, "MediaError")
            shared.close()
            await other.frame(face())
            assert (await other.answer()).sequence == 1
            await other.end()

    run(scenario())


# -- order of messages ---------------------------------------------------------------------------------------


def frame_message(sequence: int, us: int, **driver: Any) -> animation_pb2.DrivingFrame:
    """A frame as a client may number it."""
    return animation_pb2.DrivingFrame(
        sequence=sequence, timestamp_us=us, **(driver or {"image": raw(face())})
    )


WRONG: dict[str, list[dict[str, Any]]] = {
    "a second configuration": [{"config": animation_pb2.AnimateConfig()}],
    "an empty message": [{}],
    "mapped without shared memory": [{"shared_memory_mapped": animation_pb2.SharedMemoryMapped()}],
    "results taken without slots": [{"results_taken": 1}],
    "sequence 0": [{"frame": frame_message(0, 0)}],
    "sequence 2^64 - 1": [{"frame": frame_message(2**64 - 1, 0)}],
    "a negative time": [{"frame": frame_message(1, -1)}],
    "a sequence twice": [{"frame": frame_message(1, 0)}, {"frame": frame_message(1, 40)}],
    "a time twice": [{"frame": frame_message(1, 7)}, {"frame": frame_message(2, 7)}],
    "neither picture nor motion": [{"frame": animation_pb2.DrivingFrame(sequence=1)}],
    "a picture that holds nothing": [{"frame": frame_message(1, 0, image=common_pb2.Image())}],
    "a slot without shared memory": [{"frame": frame_message(1, 0, image=in_slot(0))}],
    "too few bytes": [
        {
            "frame": frame_message(
                1, 0, image=common_pb2.Image(raw=common_pb2.RawImage(width=32, height=32, data=b"x"))
            )
        }
    ],
    "an empty motion": [{"frame": frame_message(1, 0, motion=common_pb2.Motion())}],
    "an empty neutral motion": [{"set_neutral": animation_pb2.SetNeutral(motion=common_pb2.Motion())}],
}


@pytest.mark.parametrize("mode", [LIVE, LOSSLESS])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_message_ends_its_own_stream_alone(serve: Serve, wrong: str, mode: Any) -> None:
    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            other = await server.animate(ids, mode=LOSSLESS)
            call = await server.animate(ids, mode=mode)
            for message in WRONG[wrong]:
                await call.write(**message)
            code, detail = await call.failure()
            assert (code, detail.type) == (Code.INVALID_ARGUMENT, "ProtocolError"), detail
            await other.frame(face())
            await other.answer()
            await other.end()
            await server.idle()

    run(scenario())


def test_pictures_and_motion_do_not_mix(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            ids, rest = await server.register(), motion_to_message(server.core.space.rest, server.core.space)
            for turns in itertools.permutations(("image", "motion")):
                call = await server.animate(ids, mode=LOSSLESS)
                for turn in turns:
                    await (call.frame(face()) if turn == "image" else call.motion(rest))
                assert (await call.failure())[1].type == "ProtocolError"

    run(scenario())


def test_a_stream_begins_with_its_configuration(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            empty = server.open()
            await empty.call.done_writing()
            assert (await empty.failure())[1].type == "ProtocolError"
            for first in ({}, {"frame": frame_message(1, 0)}, {"options": options()}, {"results_taken": 1}):
                call = server.open()
                await call.write(**first)
                code, detail = await call.failure()
                assert (code, detail.type) == (Code.INVALID_ARGUMENT, "ProtocolError")
            await server.idle()

    run(scenario())


@pytest.mark.parametrize(
    ("fields", "code", "kind"),
    [
        ({"portrait_ids": []}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"portrait_ids": ["no such portrait"]}, Code.NOT_FOUND, "NotFoundError"),
        ({"portrait_ids": ["x\0\n" * 100_000]}, Code.NOT_FOUND, "NotFoundError"),
        ({"mode": 9}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"motion_layout": 9}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"output": {"encoding": 99}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"output": {"width": 15}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"output": {"width": 8193}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"output": {"width": 8192, "height": 8192}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"output": {"quality": 101}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"output": {"crf": 52}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"output": {"keyframe_interval": 1001}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"output": {"pixel_format": 3}}, Code.INVALID_ARGUMENT, "ConfigError"),
        ({"neutral": {}}, Code.INVALID_ARGUMENT, "ProtocolError"),
    ],
)
def test_wrong_configurations_are_refused(serve: Serve, fields: Any, code: Code, kind: str) -> None:
    async def scenario() -> None:
        async with serve() as server:
            ids = [await server.register()]
            call = server.open()
            await call.write(config=animation_pb2.AnimateConfig(**{"portrait_ids": ids, **fields}))
            got, detail = await call.failure()
            assert (got, detail.type) == (code, kind)
            too_many = server.open()
            await too_many.write(config=animation_pb2.AnimateConfig(portrait_ids=ids * 9))
            assert (await too_many.failure())[1].type == "ConfigError"
            await server.idle()

    run(scenario())


# -- ends ----------------------------------------------------------------------------------------------------


def test_a_silent_stream_is_ended(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(idle_timeout_s=1.0) as server:
            call = await server.animate(mode=LIVE)
            code, detail = await call.failure()
            assert (code, detail.type) == (Code.DEADLINE_EXCEEDED, "DeadlineError")
            await server.idle()

    run(scenario())


def test_a_stream_that_never_begins_is_ended(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(idle_timeout_s=1.0) as server:
            call = server.open()
            await asyncio.wait_for(call.call.wait_for_connection(), 30)
            code, detail = await asyncio.wait_for(call.failure(), 10)
            assert (code, detail.type) == (Code.DEADLINE_EXCEEDED, "DeadlineError")
            await server.idle()

    run(scenario())


class Flood:
    """A client in threads of its own that sends frames until its call ends, and reads only then.

    Not with grpc.aio, whose client calls it INTERNAL when a write meets the end of a call.
    """

    def __init__(self, server: Served, portrait: str, mode: Any, **config: Any) -> None:
        self._read = threading.Event()
        config.setdefault("output", RAW)
        config = animation_pb2.AnimateConfig(portrait_ids=[portrait], mode=mode, **config)
        self._end = asyncio.get_running_loop().run_in_executor(None, self._run, server.target, config)

    def _run(self, target: str, config: animation_pb2.AnimateConfig) -> tuple[Code, common_pb2.ErrorDetail]:
        def requests() -> Iterator[animation_pb2.AnimateRequest]:
            yield animation_pb2.AnimateRequest(config=config)
            if config.HasField("shared_memory"):
                mapping = animation_pb2.SharedMemoryMapped()
                yield animation_pb2.AnimateRequest(shared_memory_mapped=mapping)
            for sequence in itertools.count(1):
                yield animation_pb2.AnimateRequest(frame=frame_message(sequence, sequence))

        with grpc.insecure_channel(target) as channel:
            call = animation_pb2_grpc.AnimationServiceStub(channel).Animate(requests(), timeout=30)
            assert next(call).HasField("started")
            assert self._read.wait(30)
            with pytest.raises(grpc.RpcError) as caught:
                for _ in call:
                    pass
        metadata = {k: v for k, v in caught.value.trailing_metadata() or ()}
        return caught.value.code(), common_pb2.ErrorDetail.FromString(metadata.get("lp-edge-error-bin", b""))

    async def failure(self) -> tuple[Code, common_pb2.ErrorDetail]:
        """Read to the end: status and detail."""
        self._read.set()
        return await self._end


@pytest.mark.parametrize("mode", [LIVE, LOSSLESS])
def test_a_client_that_does_not_read_is_ended_and_told_so(serve: Serve, mode: Any) -> None:
    big = face(512, 512, 400, width=1024, height=1024)

    async def scenario() -> None:
        async with serve(idle_timeout_s=1.0) as server:
            # The client never stops sending, and takes nothing: that is no sign of life.
            client = Flood(server, await server.register(big), mode)
            await until(lambda: server.core.streams, "the stream begins")
            await until(lambda: not server.core.streams, "the stream ends")
            code, detail = await client.failure()
            assert (code, detail.type) == (Code.DEADLINE_EXCEEDED, "DeadlineError")

    run(scenario())


def test_a_busy_stream_is_not_idle(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(idle_timeout_s=1.0) as server:
            call = await server.animate(mode=LOSSLESS)
            warp = Gate(warp_of(server))
            warp.shut()
            await call.frame(face())
            await asyncio.sleep(2.0)  # the server computes; nobody is silent but itself
            warp.open()
            assert (await call.answer()).sequence == 1
            await call.end()

    run(scenario())


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("mode", [LIVE, LOSSLESS])
def test_a_call_that_ends_early_stops_its_work_and_frees_its_place(serve: Serve, how: str, mode: Any) -> None:
    async def scenario() -> None:
        async with serve(limits=Limits(max_streams=1)) as server:
            ids = await server.register()
            [portrait] = server.core.store.list()
            warp, mesh = Gate(warp_of(server)), Gate(mesh_of(server))
            call = await server.animate(ids, mode=mode, timeout=1.5 if how == "deadline" else None)
            [stream] = server.core.streams.values()
            assert portrait.active == 1
            warp.shut()
            for _ in range(4):
                await call.frame(face())
            await until(lambda: warp.calls == 1, "a frame is drawn")
            if how == "cancel":
                await call.cancelled()
            await until(lambda: stream.scope.cancelled, "the server has heard of it")
            read = mesh.calls
            warp.open()  # the batch that runs ends, and with it the stream
            await server.idle()
            assert portrait.active == 0
            assert (warp.calls, mesh.calls) == (1, read)  # nothing more was read or drawn
            again = await server.animate(ids, mode=LOSSLESS)  # its place is free
            await again.frame(face())
            await again.answer()
            await again.end()
            if how == "deadline":
                assert (await call.failure())[0] == Code.DEADLINE_EXCEEDED

    run(scenario())


def test_streams_beyond_the_limit_are_refused_with_advice(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve(limits=Limits(max_streams=2)) as server:
            ids = await server.register()
            first, second = await server.animate(ids), await server.animate(ids)
            third = server.open()
            await third.write(config=animation_pb2.AnimateConfig(portrait_ids=[ids]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await third._drain()
            assert caught.value.code() == Code.RESOURCE_EXHAUSTED
            metadata = {k: v for k, v in caught.value.trailing_metadata() or ()}
            detail = common_pb2.ErrorDetail.FromString(metadata["lp-edge-error-bin"])
            assert detail.type == "LimitError"
            assert detail.retry_after_ms == int(metadata["grpc-retry-pushback-ms"]) > 0
            # Jobs share the places, a portrait can still be registered.
            job = server.animation.Render()
            assert (await failure_of(job.read()))[0] == Code.RESOURCE_EXHAUSTED
            await server.register()
            await first.end()
            await server.core.codec(lambda: None)
            await until(lambda: len(server.core.streams) == 1, "the first has gone")
            fourth = await server.animate(ids)
            await fourth.end()
            await second.end()

    run(scenario())


def test_draining_is_told_refuses_and_ends(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            call = await server.animate(ids, mode=LOSSLESS)
            ending = await server.animate(ids, mode=LOSSLESS)
            server.core.drain(2.0)
            for stream in (call, ending):
                told = await stream.read()
                assert told.WhichOneof("message") == "draining"
                assert 0 < told.draining.deadline_ms <= 2000
            for stream in (call, ending):  # they may go on
                await stream.frame(face())
                assert (await stream.answer()).sequence == 1
            assert await ending.end() == []
            late = server.open()
            await late.write(config=animation_pb2.AnimateConfig(portrait_ids=[ids]))
            code, detail = await late.failure()
            assert (code, detail.type) == (Code.UNAVAILABLE, "ServerUnavailable")
            assert detail.retry_after_ms > 0
            refused = server.portraits.ListPortraits(portraits_pb2.ListPortraitsRequest())
            assert (await failure_of(refused))[0] == Code.UNAVAILABLE
            code, detail = await call.failure()
            assert (code, detail.type) == (Code.UNAVAILABLE, "ServerUnavailable")
            await server.idle()
            assert await server.core.drained()

    run(scenario())


def test_draining_ends_a_stream_whose_client_does_not_read(serve: Serve) -> None:
    big = face(512, 512, 400, width=1024, height=1024)

    async def scenario() -> None:
        async with serve() as server:
            warp, last = Gate(warp_of(server)), 0
            client = Flood(server, await server.register(big), LOSSLESS)
            await until(lambda: warp.calls > 1, "it draws")
            while last != (last := warp.calls):
                await asyncio.sleep(0.5)
            server.core.drain(0.5)
            await server.core.drained()
            await server.idle()
            code, detail = await client.failure()
            assert (code, detail.type) == (Code.UNAVAILABLE, "ServerUnavailable")

    run(scenario())


def test_a_deleted_portrait_lives_on_in_its_stream(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve() as server:
            ids = await server.register()
            call = await server.animate(ids, mode=LOSSLESS)
            await server.portraits.DeletePortrait(portraits_pb2.DeletePortraitRequest(id=ids))
            assert server.core.store.memory_bytes > 0
            await call.frame(face())
            assert (await call.answer()).pictures
            await call.end()
            await until(lambda: server.core.store.memory_bytes == 0, "its memory is free")
            late = server.open()
            await late.write(config=animation_pb2.AnimateConfig(portrait_ids=[ids]))
            assert (await late.failure())[0] == Code.NOT_FOUND

    run(scenario())


def test_concurrent_streams_all_get_their_own_pixels(serve: Serve, toy_bundle: Path) -> None:
    sources = [face(100 + 5 * i, side=60 + 4 * i) for i in range(6)]
    frames = [moving(15, start=80 + 3 * i, step=1 + i % 3) for i in range(6)]
    with animator(toy_bundle) as reference:
        expected = []
        for source, driving in zip(sources, frames, strict=True):
            live = reference.live(source)
            expected.append([live.step(rgb, seconds(i)).rgb for i, rgb in enumerate(driving)])

    async def scenario() -> None:
        async with serve() as server:

            async def stream(index: int) -> None:
                call = await server.animate(await server.register(sources[index]), mode=LOSSLESS)
                for rgb in frames[index]:
                    await call.frame(rgb)
                answers = await call.end()
                for answer, want in zip(answers, expected[index], strict=True):
                    assert (pixels(answer.frame.pictures[0]) == want).all()

            await asyncio.gather(*(stream(i) for i in range(6)))
            await server.idle()

    run(scenario())
