"""The client for asyncio: the same methods as :class:`lp_edge.client.Client`, as coroutines and asynchronous iterators.

>>> from lp_edge.client import aio
>>> async def main() -> None:
...     async with aio.Client("127.0.0.1:50051") as client:
...         portrait = await client.register("portrait.jpg")
...         async with await client.animate(portrait) as stream:
...             async for frame in stream.drive(camera()):
...                 show(frame.rgb)

A client belongs to one event loop. Encoding and reading of files happen in threads; decoding happens where ``.rgb`` is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lp_edge.client._base import ClientBase
from lp_edge.client._book import ids_of
from lp_edge.client._channel import Backoff, closed_error, grpc, rpc_error
from lp_edge.client._jobs import (
    Download,
    Extraction,
    Rendering,
    check_clip_path,
    check_template_path,
    is_clip,
    timed,
)
from lp_edge.client._messages import info_from, portrait_from, registration
from lp_edge.client._session import Plan, Response, Session, Transport
from lp_edge.client.sync import Pixels, ended_error, late_answer, no_room, no_start
from lp_edge.client.types import ExtractedMotion, Frame, Output, Portrait, Progress, RenderedClip, ServerInfo
from lp_edge.errors import (
    BackendUnavailable,
    LimitError,
    LpEdgeError,
    MediaError,
    NotFoundError,
    ServerUnavailable,
)
from lp_edge.proto.v1 import animation_pb2, portraits_pb2, server_pb2
from lp_edge.runtime.motion import Motion

if TYPE_CHECKING:
    from lp_edge.runtime.crop import CropOptions
    from lp_edge.runtime.options import AnimateOptions

__all__ = ["AnimateStream", "Client", "RenderedFrames"]

T = TypeVar("T")
_END = object()
_FOREVER = 1e9


class Client(ClientBase):
    """A connection to ``lp-serve`` for one event loop. An asynchronous context manager.

    Args, Raises: as for :class:`lp_edge.client.Client`, whose methods say what arguments and errors mean.
    """

    _grpc = grpc.aio

    def _start(self) -> None:
        self._closed = asyncio.Event()
        self._restoring = asyncio.Lock()
        self._streams: weakref.WeakSet[AnimateStream] = weakref.WeakSet()

    # -- server and portraits ---------------------------------------------------------------------------

    async def info(self) -> ServerInfo:
        """Bundle, devices, limits, versions and load of the server."""
        return info_from(
            await self._call(self._stubs.server.GetServerInfo, server_pb2.GetServerInfoRequest())
        )

    async def neutral_motion(self) -> Motion:
        """A frontal face at rest, in the units of the server's family."""
        return self._codec(await self.info()).neutral()

    async def register(
        self,
        picture: str | Path | Pixels,
        *,
        faces: str = "largest",
        size: int | None = None,
        crop: CropOptions | None = None,
        time_to_live: float | None = None,
        thumbnail_side: int = 128,
    ) -> Portrait:
        """Let the server find the faces of a picture and keep it ready."""
        kept = await asyncio.to_thread(registration, picture, faces, size, crop, time_to_live, thumbnail_side)
        answer = await self._call(self._stubs.portraits.RegisterPortrait, kept.request)
        portrait = portrait_from(answer.portrait)
        self._book.add(portrait, kept)
        return portrait

    async def portraits(self) -> tuple[Portrait, ...]:
        """All portraits of the server, the one used last first."""
        answer = await self._call(self._stubs.portraits.ListPortraits, portraits_pb2.ListPortraitsRequest())
        return tuple(portrait_from(p, self._book.known_as(p.id)) for p in answer.portraits)

    async def delete(self, portrait: str | Portrait) -> None:
        """Let the server, and this client, forget a portrait."""
        (known_as,) = ids_of(portrait)
        request = portraits_pb2.DeletePortraitRequest(id=self._book.current(known_as))
        try:
            await self._call(self._stubs.portraits.DeletePortrait, request)
        finally:
            self._book.forget(known_as)

    # -- streams ----------------------------------------------------------------------------------------

    async def animate(
        self,
        portraits: str | Portrait | Iterable[str | Portrait],
        *,
        options: AnimateOptions | None = None,
        mode: Literal["live", "lossless"] = "live",
        output: Output | None = None,
        shared_memory: bool | Literal["auto"] = "auto",
        driving_size: tuple[int, int] | None = None,
        send_as: str = "jpeg",
        quality: int = 95,
        neutral: Motion | None = None,
        with_motion: bool = False,
        motion_layout: Literal["keypoints", "coefficients"] = "keypoints",
        window: int | None = None,
        zero_copy: bool = False,
        on_draining: Callable[[float], None] | None = None,
    ) -> AnimateStream:
        """Open a stream of frames; waits until the server has started it."""
        ids = ids_of(portraits)
        plan = Plan(
            ids,
            options,
            mode,
            output or Output(),
            shared_memory,
            driving_size,
            send_as,
            quality,
            neutral,
            with_motion,
            motion_layout,
            window,
            zero_copy,
        )
        info = await self.info()
        listed = await self.portraits() if plan.shared_memory is not False and self._unknown(ids) else ()
        session = self._session(
            plan, info, self._sizes(ids, listed) if plan.shared_memory is not False else []
        )
        stream = AnimateStream(self, session, on_draining)
        await stream._open()
        self._streams.add(stream)
        return stream

    # -- long calls -------------------------------------------------------------------------------------

    async def extract_motion(
        self,
        source: str | Path | Iterable[Any] | AsyncIterable[Any],
        *,
        options: AnimateOptions | None = None,
        frame_rate: Fraction | int = 25,
        send_as: str = "jpeg",
        quality: int = 95,
    ) -> AsyncGenerator[ExtractedMotion, None]:
        """The driver's motion, frame by frame; frames may come from an asynchronous iterable as well."""
        clip = is_clip(source)
        call = Extraction(clip, False, options, Fraction(frame_rate), 0, send_as, quality)
        codec = self._codec(await self.info())

        async def motions() -> AsyncGenerator[ExtractedMotion, None]:
            method = self._stubs.animation.ExtractMotion
            async with contextlib.aclosing(self._stream(method, _extraction(call, source))) as responses:
                async for response in responses:
                    motion = call.motion(response, codec)
                    if motion is not None:
                        yield motion

        async with contextlib.aclosing(self._until_first(motions) if clip else motions()) as items:
            async for item in items:
                yield item

    async def extract_template(
        self,
        source: str | Path | Iterable[Any] | AsyncIterable[Any],
        output: str | Path,
        *,
        options: AnimateOptions | None = None,
        frame_rate: Fraction | int = 25,
        neutral: int = 0,
        send_as: str = "jpeg",
        quality: int = 95,
        progress: Callable[[Progress], None] | None = None,
    ) -> Path:
        """The driver's motion as a template (.npz); the file appears whole or not at all."""
        path, clip = check_template_path(output), is_clip(source)
        call = Extraction(clip, True, options, Fraction(frame_rate), neutral, send_as, quality)

        async def once() -> Path:
            method = self._stubs.animation.ExtractMotion
            with Download(path) as download:
                async with contextlib.aclosing(self._stream(method, _extraction(call, source))) as responses:
                    async for response in responses:
                        download.write(response.template_chunk)
                        call.tell(response, progress)
                return await asyncio.to_thread(download.publish)

        return await (self._retry(once) if clip else once())

    async def render(
        self,
        portrait: str | Portrait,
        driving: str | Path,
        output: str | Path,
        *,
        options: AnimateOptions | None = None,
        size: tuple[int, int] = (0, 0),
        crf: int = 23,
        progress: Callable[[Progress], None] | None = None,
    ) -> RenderedClip:
        """Animate a portrait with a whole clip or template into an MP4; the file appears whole or not at all."""
        (known_as,), path = ids_of(portrait), check_clip_path(output)
        wanted = Output(width=size[0], height=size[1], crf=crf)
        call = Rendering(driving, (await self.info()).templates, options, wanted, mp4=True)

        async def once() -> RenderedClip:
            requests = _each(call.requests(self._book.current(known_as)))
            with Download(path) as download:
                async with contextlib.aclosing(
                    self._stream(self._stubs.animation.Render, requests)
                ) as responses:
                    async for response in responses:
                        call.take(response, download, progress)
                clip = call.end()
                await asyncio.to_thread(download.publish)
                return clip

        return await self._retry(once, (known_as,))

    async def render_frames(
        self,
        portrait: str | Portrait,
        driving: str | Path,
        *,
        options: AnimateOptions | None = None,
        output: Output | None = None,
    ) -> RenderedFrames:
        """The same, frame by frame."""
        (known_as,) = ids_of(portrait)
        call = Rendering(driving, (await self.info()).templates, options, output or Output(), mp4=False)

        async def frames() -> AsyncGenerator[Frame, None]:
            requests = _each(call.requests(self._book.current(known_as)))
            async with contextlib.aclosing(self._stream(self._stubs.animation.Render, requests)) as responses:
                async for response in responses:
                    frame = call.take(response, None, None)
                    if frame is not None:
                        yield frame

        return RenderedFrames(self._until_first(frames, (known_as,)), call)

    # -- life -------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End all streams and the connection; calling it twice is harmless."""
        self._closed.set()
        for stream in list(self._streams):
            await stream.close()
        await self._channel.close()

    async def __aenter__(self) -> Client:  # noqa: PYI034 - Self needs Python 3.11
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- calls ------------------------------------------------------------------------------------------

    async def _call(self, method: Any, request: Any) -> Any:
        """A single call with its deadline, tried again while the server is not there."""
        return await self._retry(lambda: self._once(method, request))

    async def _once(self, method: Any, request: Any) -> Any:
        """A single call with its deadline."""
        if self._closed.is_set():
            raise closed_error()
        try:
            return await method(request, timeout=self.settings.timeout_s, metadata=self.settings.metadata)
        except grpc.RpcError as error:
            raise rpc_error(error, self.settings.target) from error

    async def _stream(self, method: Any, requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """The answers of a call that sends ``requests``; an error of theirs is raised here."""
        if self._closed.is_set():
            raise closed_error()
        fault: list[BaseException] = []
        calls: list[Any] = []

        async def carried() -> AsyncIterator[Any]:
            try:
                async for request in requests:
                    yield request
            except Exception as error:  # noqa: BLE001 - it is raised below, in the caller's task
                fault.append(error)
                calls[0].cancel()

        calls.append(method(carried(), metadata=self.settings.metadata))
        ending = _Ending(calls[0])
        try:
            async for response in calls[0]:
                yield response
        except grpc.RpcError as error:
            raise (fault[0] if fault else await ending.error(error, self.settings.target)) from error
        except asyncio.CancelledError:
            if fault:  # we have cancelled the call, nobody has cancelled us
                raise fault[0] from None
            raise
        finally:
            calls[0].cancel()

    async def _retry(self, call: Callable[[], Awaitable[T]], ids: tuple[str, ...] = ()) -> T:
        """Call until it works or fails for another reason than an absent server; ``ids`` are registered again where needed."""
        backoff, restored = Backoff(self.settings.reconnect_timeout_s), False
        while True:
            try:
                try:
                    return await call()
                except NotFoundError:
                    if restored or not ids or not await self._restore(ids):
                        raise
                    restored = True
            except ServerUnavailable as error:
                if not self.settings.reconnect or self._closed.is_set():
                    raise
                await self._pause(backoff.pause(error))

    async def _until_first(
        self, begin: Callable[[], AsyncGenerator[T, None]], ids: tuple[str, ...] = ()
    ) -> AsyncGenerator[T, None]:
        """Items of an iterator that is begun again as long as nothing has come."""

        async def attempt() -> tuple[AsyncGenerator[T, None], object]:
            items = begin()
            return items, await anext(items, _END)

        items, item = await self._retry(attempt, ids)
        async with contextlib.aclosing(items):
            while item is not _END:
                yield item  # type: ignore[misc]
                item = await anext(items, _END)

    async def _pause(self, seconds: float) -> None:
        """Wait between two tries; ServerUnavailable when the client is closed meanwhile."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)
            raise ServerUnavailable("the client was closed", "expected an open one", "open another one")

    async def _restore(self, ids: Iterable[str]) -> bool:
        """Register portraits again that the server has forgotten; whether it makes sense to try again."""
        if not self.settings.reconnect:
            return False
        known = tuple(ids)
        async with self._restoring:  # several streams that break at once need each portrait once
            answer = await self._once(
                self._stubs.portraits.ListPortraits, portraits_pb2.ListPortraitsRequest()
            )
            on_server = {p.id for p in answer.portraits}
            for known_as, kept in self._book.missing(known, on_server):
                again = await self._once(self._stubs.portraits.RegisterPortrait, kept.request)
                self._book.moved(known_as, again.portrait.id)
                on_server.add(again.portrait.id)
        return all(self._book.current(known_as) in on_server for known_as in known)


class _Ending:
    """Why a call with many messages ended.

    Where a message is on its way out when the server ends the call, grpc.aio replaces the server's status by "Internal error from
    Core" (set_internal_error in grpc/aio/_call.py), sooner or later than that comes. So each status is noted when it is set.
    """

    def __init__(self, call: Any) -> None:
        self._status: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        # Coroutines by name, but a call that has ended answers at once.
        asked = (call.code(), call.initial_metadata(), call.trailing_metadata(), call.details())
        code, first, trailing, details = (_result(each) for each in asked)
        if not self._status.done() and not _from_core(code, details):
            self._status.set_result(grpc.aio.AioRpcError(code, first, trailing, details))

    async def error(self, error: Any, target: str) -> LpEdgeError:
        """The error of lp-edge; ``error`` is what the call has raised."""
        if _from_core(error.code(), error.details()):
            await asyncio.wait([self._status], timeout=1.0)
            error = self._status.result() if self._status.done() else error
        return rpc_error(error, target)


def _from_core(code: Any, details: str | None) -> bool:
    return code is grpc.StatusCode.INTERNAL and details == "Internal error from Core"


def _result(coroutine: Any) -> Any:
    """What a coroutine returns that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    return None


async def _each(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    """Items of either kind of iterable; an ordinary one is stepped in threads."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
        return
    iterator = iter(items)
    while (got := await asyncio.to_thread(next, iterator, _END)) is not _END:
        yield got  # type: ignore[misc]


async def _extraction(
    call: Extraction, source: str | Path | Iterable[Any] | AsyncIterable[Any]
) -> AsyncIterator[animation_pb2.ExtractMotionRequest]:
    """All messages of an ExtractMotion call."""
    if isinstance(source, (str, Path)):
        async for request in _each(call.requests(source)):
            yield request
        return
    yield call.config()
    index = 0
    async for item in _each(source):
        yield await asyncio.to_thread(call.frame, index, item)
        index += 1


class RenderedFrames(AsyncIterator[Frame]):
    """Frames of :meth:`Client.render_frames`."""

    def __init__(self, frames: AsyncGenerator[Frame, None], call: Rendering) -> None:
        self._frames, self._call = frames, call

    @property
    def clip(self) -> RenderedClip | None:
        """What was rendered, once all frames have come."""
        return self._call.finished

    async def __anext__(self) -> Frame:
        return await anext(self._frames)

    async def close(self) -> None:
        """Stop the server's work."""
        await self._frames.aclose()


class _Changed:
    """Wakes all that wait for a condition; the one event loop is the lock."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Let everybody look again."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait_for(self, condition: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait until ``condition()``; False when it does not hold within ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while not condition():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            await self.wait_once(left)
        return True

    async def wait_once(self, timeout: float | None = None) -> None:
        """Wait for the next :meth:`notify`, or ``timeout`` seconds."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait([future], timeout=timeout)
        finally:
            self._waiting.discard(future)


class AnimateStream(AsyncIterator[Frame]):
    """An open stream, made by :meth:`Client.animate`; see :class:`lp_edge.client.AnimateStream`.

    An asynchronous context manager and iterator. One task may send while another receives.

    Attributes:
        reconnects: how often it has been continued.
    """

    def __init__(self, client: Client, session: Session, on_draining: Callable[[float], None] | None) -> None:
        self._client, self._session, self._on_draining = client, session, on_draining
        self._changed = _Changed()
        self._inbox: deque[Frame] = deque()
        self._error: BaseException | None = None
        self._closed = self._ended = self._broken = False
        self._lent = 0
        self.reconnects = 0
        self._call: Any = None
        self._ending: _Ending
        self._writer: asyncio.Future[None] | None = None
        self._reader: asyncio.Future[None] | None = None

    async def _open(self) -> None:
        await self._client._retry(self._connect, self._session.plan.portrait_ids)
        self._reader = asyncio.ensure_future(self._read())

    # -- what it is -------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Names the stream in the server's log; another one after a reconnect."""
        return self._session.stream_id

    @property
    def transport(self) -> Transport:
        """How pixels travel: ``shared memory`` or ``messages``."""
        return self._session.transport

    @property
    def transport_reason(self) -> str:
        """Why they travel in messages; empty with shared memory."""
        return self._session.transport_reason

    @property
    def dropped(self) -> int:
        """Frames dropped since the stream began because newer ones had come, here and in the server (live mode)."""
        return self._session.dropped

    @property
    def draining(self) -> float | None:
        """Seconds that the server had left when it said that it is about to stop; None = it has not said so."""
        return self._session.draining

    # -- sending ----------------------------------------------------------------------------------------

    async def send(
        self,
        frame: Pixels | Motion,
        *,
        timestamp: float | None = None,
        sequence: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send a driving frame; lossless: waits while ``window`` frames are on the way. Not for several tasks at once."""
        prepared = await asyncio.to_thread(self._session.prepare, frame)
        limit = self._client.settings.timeout_s if timeout is None else timeout
        while not await self._changed.wait_for(lambda: self._ended or self._session.room(), limit):
            if not self._broken:
                raise no_room(self._session.window, limit)
        if self._ended:
            raise self._error or ended_error()
        number = self._session.submit(prepared, timestamp, sequence)
        self._changed.notify()
        return number

    def set_options(self, options: AnimateOptions) -> None:
        """Other options from the next frame on; they replace all of the old ones."""
        self._session.set_options(options)

    def set_neutral(self, motion: Motion | None = None) -> None:
        """Choose what counts as "no motion" from the next frame on; None = the motion of the next frame that shows a face."""
        self._session.set_neutral(motion)

    def finish(self) -> None:
        """Nothing more will be sent; what is on the way is still answered, then iteration ends."""
        self._session.finished = True
        self._changed.notify()

    async def drive(self, frames: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Frame, None]:
        """Send frames from another task and yield the answers; closes the stream at the end.

        Args:
            frames: each alone or as ``(seconds, frame)``; an ordinary iterable is stepped in threads.
        """

        async def feed() -> None:
            try:
                async for item in _each(frames):
                    seconds, frame = timed(item)
                    await self.send(frame, timestamp=seconds, timeout=_FOREVER)
                self.finish()
            except Exception as error:  # noqa: BLE001 - raised by the consumer
                self._fail(error)

        feeder = asyncio.ensure_future(feed())
        try:
            async for frame in self:
                yield frame
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            await self.close()

    # -- receiving --------------------------------------------------------------------------------------

    async def receive(self, timeout: float | None = None) -> Frame | None:
        """The next answer; None when the stream has ended."""
        self._session.release(self._lent)
        self._changed.notify()
        if not await self._changed.wait_for(lambda: self._inbox or self._ended, timeout):
            raise late_answer(timeout)
        if self._inbox:
            frame = self._inbox.popleft()
            self._lent = frame.sequence
            self._changed.notify()
            return frame
        if self._error is not None:
            raise self._error
        return None

    async def __anext__(self) -> Frame:
        frame = await self.receive()
        if frame is None:
            raise StopAsyncIteration
        return frame

    # -- life -------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the stream at once; answers that are on the way are lost. Calling it twice is harmless."""
        self._closed = True
        self._changed.notify()
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None and asyncio.current_task() is not self._reader:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def __aenter__(self) -> AnimateStream:  # noqa: PYI034 - Self needs Python 3.11
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _fail(self, error: BaseException) -> None:
        """End the stream with an error that did not come from the server."""
        if not self._ended:
            self._error = error
        self._call.cancel()
        if self._broken and self._reader is not None:
            self._reader.cancel()  # that call is dead already, and the reader is after another one

    @property
    def _over(self) -> bool:
        """Whether no connection is of use any more."""
        return self._closed or self._error is not None or self._client._closed.is_set()

    # -- the connection ---------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """One try to begin the stream, without shared memory where it is not to be had and not required."""
        try:
            await self._handshake()
        except (BackendUnavailable, LimitError, MediaError) as error:
            session = self._session
            if not session.asks_shared or session.plan.shared_memory is True:
                raise
            if getattr(error, "retry_after_s", 0.0):
                raise  # what a later try may cure is not about shared memory
            with session.without_shared(error.got):
                await self._handshake()

    async def _handshake(self) -> None:
        settings = self._client.settings
        await self._end_writer()
        first = self._session.begin(self._client._current_ids(self._session.plan.portrait_ids))
        call = self._client._stubs.animation.Animate(metadata=settings.metadata)
        ending = _Ending(call)

        async def exchange() -> Any:
            with contextlib.suppress(asyncio.InvalidStateError):  # it has failed already: reading tells why
                await call.write(first)
            return await call.read()

        try:
            response = await asyncio.wait_for(exchange(), settings.timeout_s)
            if response is grpc.aio.EOF:
                raise MediaError(
                    "the server ended the stream at its start", "expected an answer", "update it"
                )
            self._session.started(response)
        except grpc.RpcError as error:
            raise await ending.error(error, settings.target) from error
        except asyncio.TimeoutError as error:
            raise no_start(settings.timeout_s) from error
        except BaseException:
            call.cancel()
            raise
        self._call, self._ending = call, ending
        self._writer = asyncio.ensure_future(self._write(call))
        self._changed.notify()

    async def _write(self, call: Any) -> None:
        """Write messages as fast as HTTP/2 lets it; the writer's task, one for each connection."""
        session = self._session
        try:
            while True:
                request = session.next_request()
                if request is not None:
                    await call.write(request)
                elif session.exhausted:
                    await call.done_writing()
                    return
                else:
                    await self._changed.wait_once()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader learns why
        except Exception as error:  # noqa: BLE001 - raised by receive() and send()
            self._fail(error)

    async def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)

    async def _read(self) -> None:
        """Take answers until the stream has ended; the reader's task."""
        try:
            while not self._over:
                failure = await self._read_connection()
                if failure is None:
                    break
                await self._reconnect(failure)
        except asyncio.CancelledError:
            if not self._over:
                raise
        except BaseException as error:  # noqa: BLE001 - raised by receive() and send()
            if not self._over:
                self._error = error
        finally:
            self._call.cancel()
            self._ended = True
            self._session.close()
            self._changed.notify()
            await self._end_writer()

    async def _read_connection(self) -> ServerUnavailable | None:
        """Take answers until the connection ends; why, where it is worth another one."""
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                await self._take(response)
            return None
        except grpc.RpcError as error:
            if self._over:
                return None
            failure = await self._ending.error(error, self._client.settings.target)
            if not isinstance(failure, ServerUnavailable) or not self._client.settings.reconnect:
                raise failure from error
            return None if self._session.over else failure

    async def _take(self, response: Response) -> None:
        frame = self._session.answer(response)
        self._changed.notify()
        if frame is not None:
            window = self._session.window
            if self._session.plan.lossless:
                await self._changed.wait_for(lambda: len(self._inbox) < window or self._closed)
            elif len(self._inbox) >= window:
                self._session.skipped(self._inbox.popleft())
            self._inbox.append(frame)
            self._changed.notify()
        if response.WhichOneof("message") == "draining" and self._on_draining is not None:
            self._on_draining(response.draining.deadline_ms / 1000)

    async def _reconnect(self, failure: ServerUnavailable | LimitError) -> None:
        """Continue on a new connection, or raise ``failure``."""
        backoff = Backoff(self._client.settings.reconnect_timeout_s)
        self._broken = True
        try:
            while not await self._changed.wait_for(lambda: self._over, backoff.pause(failure)):
                try:
                    try:
                        await self._connect()
                    except NotFoundError:
                        if not await self._client._restore(self._session.plan.portrait_ids):
                            raise
                    else:
                        self.reconnects += 1
                        return
                except (ServerUnavailable, LimitError) as error:
                    # The server may not have noticed yet that our old stream is gone.
                    failure = error
        finally:
            self._broken = False
