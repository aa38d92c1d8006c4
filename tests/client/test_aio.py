"""The asyncio client against a server that does what the test tells it; what it shares with the other one is tested there."""

# ruff: noqa: SIM117 - a client and its stream in two lines read better than in one of two hundred columns
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")

from lp_edge.client import Output
from lp_edge.client.aio import Client
from lp_edge.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineError,
    LimitError,
    MediaError,
    NoFaceError,
    NotFoundError,
    ServerUnavailable,
)
from lp_edge.runtime.options import AnimateOptions
from lp_edge.tests.client.fake import SECONDS, WAITS, Fake, fake_server, picture

GONE = ServerUnavailable("the server restarts", "", "", retry_after_s=0.01)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as (made, target):
        made.target = target  # type: ignore[attr-defined]
        yield made


def connect(fake: Fake, **settings: Any) -> Client:
    return Client(fake.target, **{"timeout_s": SECONDS, **settings})  # type: ignore[attr-defined]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; one that hangs, or leaves a task behind, fails."""

    async def guarded() -> None:
        await asyncio.wait_for(scenario, 2 * SECONDS)
        for _ in range(200):
            left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            if not left:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"left behind: {left}")

    asyncio.run(guarded())


def test_calls(fake: Fake) -> None:
    async def scenario() -> None:
        async with connect(fake) as client:
            assert (await client.info()).version == "1.2.3"
            made = await client.register(picture(), time_to_live=5)
            assert [p.id for p in await client.portraits()] == [made.id]
            await client.delete(made)
            with pytest.raises(NotFoundError):
                await client.delete(made)
            fake.errors = [NoFaceError("no face")]
            with pytest.raises(NoFaceError):
                await client.info()
            fake.errors = [GONE, GONE]
            assert (await client.info()).version == "1.2.3"
        with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
            async with Client("127.0.0.1:1", reconnect=False) as nobody:
                await nobody.info()
        fake.hold_calls.clear()
        async with connect(fake, timeout_s=0.2) as client:
            with pytest.raises(DeadlineError):
                await client.info()

    run(scenario())


@pytest.mark.parametrize("shared_memory", [True, False])
def test_every_frame_comes_back_in_order(fake: Fake, shared_memory: bool) -> None:
    async def frames() -> AsyncIterator[Any]:
        for i in range(60):
            yield i / 25, picture(i)
            await asyncio.sleep(0)

    async def scenario() -> None:
        async with connect(fake) as client:
            portrait = await client.register(picture())
            async with await client.animate(
                portrait,
                mode="lossless",
                shared_memory=shared_memory,
                driving_size=(64, 48),
                send_as="png",
                window=3,
            ) as stream:
                assert stream.transport == ("shared memory" if shared_memory else "messages")
                found = [f async for f in stream.drive(frames())]
        assert [f.sequence for f in found] == list(range(1, 61))
        assert all(np.array_equal(f.rgb, picture(i)) for i, f in enumerate(found))

    run(scenario())


def test_window_and_deadlines(fake: Fake) -> None:
    async def scenario() -> None:
        async with connect(fake) as client:
            async with await client.animate(
                await client.register(picture()), mode="lossless", window=2, shared_memory=False
            ) as stream:
                with pytest.raises(DeadlineError, match="no frame within"):
                    await stream.receive(0.05)
                fake.gate.clear()
                await stream.send(picture(1))
                await stream.send(picture(2))
                with pytest.raises(DeadlineError, match="2 are on the way"):
                    await stream.send(picture(3), timeout=0.05)
                asyncio.get_running_loop().call_later(0.1, fake.gate.set)
                await stream.send(picture(3))
                stream.finish()
                assert [f.sequence async for f in stream] == [1, 2, 3]
                with pytest.raises(ConfigError):
                    await stream.send(picture())

    run(scenario())


def test_live(fake: Fake) -> None:
    async def scenario() -> None:
        async with connect(fake) as client:
            async with await client.animate(
                await client.register(picture()), shared_memory=True, driving_size=(64, 48)
            ) as stream:
                fake.reading.clear()
                fake.gate.clear()
                for i in range(40):
                    await stream.send(picture(i))
                assert stream.dropped >= 36
                fake.reading.set()
                fake.gate.set()
                stream.finish()
                frames = [f async for f in stream]
                assert frames[-1].sequence == 40 and np.array_equal(frames[-1].rgb, picture(39))
                assert len(frames) + stream.dropped == 40

    run(scenario())


def test_options_neutral_drain(fake: Fake) -> None:
    told: list[float] = []
    fake.drain_after = 1

    async def scenario() -> None:
        async with connect(fake) as client:
            async with await client.animate(
                await client.register(picture()),
                mode="lossless",
                shared_memory=False,
                output=Output("png"),
                on_draining=told.append,
            ) as stream:
                await stream.send(picture())
                stream.set_options(AnimateOptions(multiplier=2.0))
                stream.set_neutral()
                await stream.send(picture())
                stream.finish()
                assert len([f async for f in stream]) == 2 and stream.draining == 1.5

    run(scenario())
    assert fake.options == [1.0, 2.0] and fake.neutral == [False, True] and told == [1.5]


def test_shared_memory_that_cannot_be_had(fake: Fake) -> None:
    async def scenario() -> None:
        fake.shares = BackendUnavailable("no /dev/shm here")
        async with connect(fake) as client:
            portrait = await client.register(picture())
            async with await client.animate(portrait, mode="lossless") as stream:
                assert stream.transport_reason == "no /dev/shm here"
                assert len([f async for f in stream.drive([picture()])]) == 1
            with pytest.raises(BackendUnavailable):
                await client.animate(portrait, shared_memory=True)

    run(scenario())


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_lossless_stream_loses_nothing(fake: Fake, shared_memory: bool) -> None:
    async def scenario() -> None:
        fake.break_after = (5, GONE)
        async with connect(fake) as client:
            portrait = await client.register(picture())
            async with await client.animate(
                portrait, mode="lossless", shared_memory=shared_memory, driving_size=(64, 48), send_as="png"
            ) as stream:

                def frames() -> Iterator[np.ndarray]:
                    for i in range(20):
                        if i == 5:
                            fake.registered.clear()
                        yield picture(i)

                found = [f async for f in stream.drive(frames())]
                assert stream.reconnects == 1
            assert [f.sequence for f in found] == list(range(1, 21))
            assert all(np.array_equal(f.rgb, picture(i)) for i, f in enumerate(found))
            assert len(fake.registered) == 1 and portrait.id not in fake.registered

    run(scenario())


def test_errors_end_the_stream(fake: Fake) -> None:
    async def broken() -> AsyncIterator[Any]:
        yield picture()
        raise ZeroDivisionError("the camera broke")

    async def scenario() -> None:
        async with connect(fake) as client:
            portrait = await client.register(picture())
            fake.break_after = (1, LimitError("too much"))
            async with await client.animate(portrait, mode="lossless", shared_memory=False) as stream:
                with pytest.raises(LimitError, match="too much"):
                    async for _ in stream.drive([picture(), picture()]):
                        pass
            async with await client.animate(portrait, mode="lossless", shared_memory=False) as stream:
                with pytest.raises(ZeroDivisionError):
                    async for _ in stream.drive(broken()):
                        pass
            fake.break_after = (0, GONE)
        async with connect(fake, reconnect=False) as client:
            async with await client.animate(portrait.id, mode="lossless", shared_memory=False) as stream:
                await stream.send(picture())
                with pytest.raises(ServerUnavailable):
                    await stream.receive(SECONDS)
        fake.break_after = (0, GONE)
        async with connect(fake, reconnect_timeout_s=0.3) as client:
            async with await client.animate(portrait.id, mode="lossless", shared_memory=False) as stream:
                fake.errors = [GONE] * 1000
                await stream.send(picture())
                with pytest.raises(ServerUnavailable):
                    await stream.receive(SECONDS)

    run(scenario())


@pytest.mark.parametrize("when", WAITS)
def test_an_error_of_the_frames_while_it_reconnects(fake: Fake, when: str) -> None:
    """The consumer learns of it at once, not when a stream ends to which nobody sends any more."""

    async def scenario() -> None:
        async with connect(fake, reconnect_timeout_s=5000) as client:
            portrait = await client.register(picture())
            stream = await client.animate(portrait, mode="lossless", shared_memory=False)
            there = fake.breaks(stream, when)

            async def frames() -> AsyncIterator[Any]:
                yield picture()
                while not there():
                    await asyncio.sleep(0.01)
                raise ZeroDivisionError("the camera broke")

            async def consume() -> None:
                async for _ in stream.drive(frames()):
                    pass

            with pytest.raises(ZeroDivisionError, match="the camera broke"):
                await asyncio.wait_for(consume(), SECONDS / 3)
            assert stream.reconnects == 0

    run(scenario())


@pytest.mark.parametrize("when", WAITS)
def test_closing_while_it_reconnects(fake: Fake, when: str) -> None:
    async def scenario() -> None:
        async with connect(fake, reconnect_timeout_s=5000) as client:
            portrait = await client.register(picture())
            streams = [await client.animate(portrait, mode="lossless", shared_memory=False) for _ in range(2)]
            there = fake.breaks(streams[0], when)
            await streams[0].send(picture())
            while not there():
                await asyncio.sleep(0.01)
            start = time.monotonic()
            await client.close()
            assert time.monotonic() - start < 3
            assert [await s.receive(SECONDS) for s in streams] == [None, None]

    run(scenario())


def test_close_wakes_everybody(fake: Fake) -> None:
    async def scenario() -> None:
        client = connect(fake)
        stream = await client.animate(
            await client.register(picture()), mode="lossless", window=1, shared_memory=False
        )
        fake.gate.clear()
        await stream.send(picture())
        waiting = [asyncio.ensure_future(stream.send(picture())), asyncio.ensure_future(stream.receive())]
        await asyncio.sleep(0.05)
        start = time.monotonic()
        await client.close()
        await client.close()
        send, receive = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(send, ConfigError) and receive is None and time.monotonic() - start < 5

    run(scenario())


def test_a_consumer_may_stop_or_be_cancelled(fake: Fake) -> None:
    async def scenario() -> None:
        async with connect(fake) as client:
            portrait = await client.register(picture())
            async with await client.animate(portrait, mode="lossless", shared_memory=False) as stream:
                driven = stream.drive(picture(i % 256) for i in range(10**6))
                async for frame in driven:
                    if frame.sequence == 5:
                        break
                await driven.aclose()
            async with await client.animate(portrait, mode="lossless", shared_memory=False) as stream:
                task = asyncio.ensure_future(stream.receive())
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await stream.send(picture())
                assert await stream.receive(SECONDS) is not None, "a cancelled receiver harms nobody"

    run(scenario())


def test_long_calls_tell_errors(fake: Fake, tmp_path: Any) -> None:
    async def scenario() -> None:
        async with connect(fake) as client:
            with pytest.raises(Exception, match="UNIMPLEMENTED"):
                async for _ in client.extract_motion([picture()]):
                    pass
            with pytest.raises(MediaError, match="does not exist"):
                await client.extract_template(tmp_path / "none.mp4", tmp_path / "a.npz")
            with pytest.raises(Exception, match="UNIMPLEMENTED"):
                await client.render("portrait", "nod", tmp_path / "a.mp4")
        assert list(tmp_path.iterdir()) == []

    run(scenario())
