"""The client for threads: :class:`Client` and :class:`AnimateStream`."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

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
from lp_edge.client._session import Plan, Request, Response, Session, Transport
from lp_edge.client.types import (
    ExtractedMotion,
    Frame,
    Output,
    Portrait,
    Progress,
    RenderedClip,
    ServerInfo,
)
from lp_edge.errors import (
    BackendUnavailable,
    ConfigError,
    DeadlineError,
    LimitError,
    MediaError,
    NotFoundError,
    ServerUnavailable,
)
from lp_edge.proto.v1 import portraits_pb2, server_pb2
from lp_edge.runtime.motion import Motion

if TYPE_CHECKING:
    from lp_edge.runtime.crop import CropOptions
    from lp_edge.runtime.options import AnimateOptions

__all__ = ["AnimateStream", "Client", "RenderedFrames"]

U8 = npt.NDArray[np.uint8]
T = TypeVar("T")
Pixels: TypeAlias = "U8 | bytes"
"""A picture: uint8 ``[H, W, 3]`` RGB, or the bytes of a JPEG, PNG or WebP file."""

_JOIN_S = 5.0  # a thread that is not back by then hangs in the user's own code
_END = object()


class Client(ClientBase):
    """A connection to ``lp-serve``. A context manager; safe to use from several threads.

    Args, Raises: see :class:`lp_edge.client._base.ClientBase`; ``docs/client.md`` lists them.

    All calls raise, besides what they name: ServerUnavailable, DeadlineError (no answer in time), AccessError (token or certificate),
    LimitError (a limit of the server, with ``retry_after_s``).

    Example:
        >>> with Client("127.0.0.1:50051") as client:                              # doctest: +SKIP
        ...     print(client.info().version)
    """

    _grpc = grpc

    def _start(self) -> None:
        self._closed = threading.Event()
        self._restoring = threading.Lock()
        self._streams: weakref.WeakSet[AnimateStream] = weakref.WeakSet()

    # -- the server -------------------------------------------------------------------------------------

    def info(self) -> ServerInfo:
        """Bundle, devices, limits, versions and load of the server."""
        return info_from(self._call(self._stubs.server.GetServerInfo, server_pb2.GetServerInfoRequest()))

    def neutral_motion(self) -> Motion:
        """A frontal face at rest, in the units of the server's family: change it and send it."""
        return self._codec(self.info()).neutral()

    # -- portraits --------------------------------------------------------------------------------------

    def register(
        self,
        picture: str | Path | Pixels,
        *,
        faces: str = "largest",
        size: int | None = None,
        crop: CropOptions | None = None,
        time_to_live: float | None = None,
        thumbnail_side: int = 128,
    ) -> Portrait:
        """Let the server find the faces of a picture and keep it ready.

        Args:
            picture: path or bytes of a JPEG, PNG or WebP file (sent as they are), or uint8 ``[H, W, 3]`` RGB (sent as PNG).
            faces: which are animated: ``largest``, ``all``, or indices from left to right such as ``2,0``.
            size: longer side of the animated crop in pixels, 128 to 2048; None = 640 (mesh) or 512 (liveportrait).
            crop: how it is cut; liveportrait only.
            time_to_live: seconds for which it is kept without being used; None = the server's default.
            thumbnail_side: longer side of the thumbnail in pixels, 16 to 512.

        Raises:
            MediaError: the picture cannot be read.
            NoFaceError: it shows none.
        """
        kept = registration(picture, faces, size, crop, time_to_live, thumbnail_side)
        answer = self._call(self._stubs.portraits.RegisterPortrait, kept.request)
        portrait = portrait_from(answer.portrait)
        self._book.add(portrait, kept)
        return portrait

    def portraits(self) -> tuple[Portrait, ...]:
        """All portraits of the server, the one used last first."""
        answer = self._call(self._stubs.portraits.ListPortraits, portraits_pb2.ListPortraitsRequest())
        return tuple(portrait_from(p, self._book.known_as(p.id)) for p in answer.portraits)

    def delete(self, portrait: str | Portrait) -> None:
        """Let the server, and this client, forget a portrait; streams that use it go on.

        Raises:
            NotFoundError: there is none of that id.
        """
        (known_as,) = ids_of(portrait)
        request = portraits_pb2.DeletePortraitRequest(id=self._book.current(known_as))
        try:
            self._call(self._stubs.portraits.DeletePortrait, request)
        finally:
            self._book.forget(known_as)

    # -- streams ----------------------------------------------------------------------------------------

    def animate(
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
        """Open a stream of frames; waits until the server has started it.

        Args:
            portraits: one or up to eight, as such or by their ids; every answer has one picture for each, in this order.
            options: how the motion is put on them. ``faces``, ``size`` and ``crop`` are :meth:`register`'s; those of clips and templates
                (``length``, ``keyframes`` …) are refused.
            mode: ``live`` (the newest frame wins, older ones that wait are dropped and counted) or ``lossless`` (every frame is answered
                in order; sending waits).
            output: how pictures come back; None = ``Output()``.
            shared_memory: ``auto`` = where server and client are on one machine and it can be had; the stream's ``transport`` tells.
                True = required. False = never.
            driving_size: width and height of the largest driving frame in pixels, for shared memory; None = 1280 x 720, ``(0, 0)``
                = no driving pictures. Larger ones travel in messages.
            send_as: how arrays travel in messages: ``jpeg``, ``png``, ``webp`` or ``raw``.
            quality: of JPEG and WebP, 1 to 100.
            neutral: the motion that stands for "no motion"; None = that of the first frame that shows a face.
            with_motion: answer with the driver's motion as well.
            motion_layout: how expressions of sent motion travel: ``keypoints`` (exact; mesh: 1434 numbers) or ``coefficients`` (mesh: 32
                numbers, what the bundle's basis can express).
            window: lossless: most frames that are on the way; None = 8. Both: slots of shared memory each way (live: None = 3).
            zero_copy: pictures in shared memory are lent, not copied: read-only, valid until the next frame is received.
            on_draining: called with the seconds left when the server is about to stop, in the thread that reads.

        Raises:
            ConfigError: an option is out of range, unknown, or not for a stream.
            NotFoundError: the server has no such portrait, and this client cannot register it again.
            LimitError: too many streams, or no shared memory although it is required.
            BackendUnavailable: shared memory is required and cannot be had.
        """
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
        info = self.info()
        listed = self.portraits() if plan.shared_memory is not False and self._unknown(ids) else ()
        session = self._session(
            plan, info, self._sizes(ids, listed) if plan.shared_memory is not False else []
        )
        stream = AnimateStream(self, session, on_draining)
        self._streams.add(stream)
        return stream

    # -- long calls -------------------------------------------------------------------------------------

    def extract_motion(
        self,
        source: str | Path | Iterable[Pixels | tuple[float, Pixels]],
        *,
        options: AnimateOptions | None = None,
        frame_rate: Fraction | int = 25,
        send_as: str = "jpeg",
        quality: int = 95,
    ) -> Iterator[ExtractedMotion]:
        """The driver's motion, frame by frame, without animating anything.

        Args:
            source: a clip's file; or frames (arrays, or bytes of files), each alone or as ``(seconds, frame)``.
            options: how motion is read: ``smooth``, and the driving crop of the family liveportrait.
            frame_rate: of frames that come without time.
            send_as, quality: how arrays travel, as for :meth:`animate`.

        Raises:
            MediaError: the clip cannot be read.
        """
        call = Extraction(is_clip(source), False, options, Fraction(frame_rate), 0, send_as, quality)
        codec = self._codec(self.info())

        def motions() -> Iterator[ExtractedMotion]:
            for response in self._stream(self._stubs.animation.ExtractMotion, call.requests(source)):
                motion = call.motion(response, codec)
                if motion is not None:
                    yield motion

        return self._until_first(motions) if call.clip else motions()

    def extract_template(
        self,
        source: str | Path | Iterable[Pixels | tuple[float, Pixels]],
        output: str | Path,
        *,
        options: AnimateOptions | None = None,
        frame_rate: Fraction | int = 25,
        neutral: int = 0,
        send_as: str = "jpeg",
        quality: int = 95,
        progress: Callable[[Progress], None] | None = None,
    ) -> Path:
        """The driver's motion as a template (.npz); the file appears whole or not at all.

        Args:
            source, options, frame_rate, send_as, quality: as for :meth:`extract_motion`.
            output: the template's path; an existing file is replaced.
            neutral: frame that stands for "no motion", counted from 0.
            progress: called while it goes on.

        Raises:
            MediaError: the clip cannot be read.
            NoFaceError: no frame shows one.
            OutputError: the template cannot be written.
        """
        path = check_template_path(output)
        call = Extraction(is_clip(source), True, options, Fraction(frame_rate), neutral, send_as, quality)

        def once() -> Path:
            with Download(path) as download:
                for response in self._stream(self._stubs.animation.ExtractMotion, call.requests(source)):
                    download.write(response.template_chunk)
                    call.tell(response, progress)
                return download.publish()

        return self._retry(once) if call.clip else once()

    def render(
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
        """Animate a portrait with a whole clip or template into an MP4; the file appears whole or not at all.

        Args:
            portrait: as such or its id.
            driving: name of one of the server's templates, or a file: template, clip or picture.
            output: path of the MP4; an existing file is replaced.
            options: how; ``neutral`` counts for clips.
            size: width and height in pixels; 0 = as drawn.
            crf: quality, 1 (best) to 51.
            progress: called while it goes on.

        Raises:
            MediaError: the driver cannot be read.
            NoFaceError: no frame of it shows a face.
            NotFoundError: as for :meth:`animate`.
            OutputError: the MP4 cannot be written.
        """
        (known_as,), path = ids_of(portrait), check_clip_path(output)
        wanted = Output(width=size[0], height=size[1], crf=crf)
        call = Rendering(driving, self.info().templates, options, wanted, mp4=True)

        def once() -> RenderedClip:
            with Download(path) as download:
                requests = call.requests(self._book.current(known_as))
                for response in self._stream(self._stubs.animation.Render, requests):
                    call.take(response, download, progress)
                clip = call.end()
                download.publish()
                return clip

        return self._retry(once, (known_as,))

    def render_frames(
        self,
        portrait: str | Portrait,
        driving: str | Path,
        *,
        options: AnimateOptions | None = None,
        output: Output | None = None,
    ) -> RenderedFrames:
        """The same, frame by frame.

        Args:
            portrait, driving, options: as for :meth:`render`.
            output: how pictures come back; ``auto`` = JPEG.

        Raises:
            MediaError, NoFaceError, NotFoundError: as for :meth:`render`, most of them at the first frame.
        """
        (known_as,) = ids_of(portrait)
        call = Rendering(driving, self.info().templates, options, output or Output(), mp4=False)

        def frames() -> Iterator[Frame]:
            requests = call.requests(self._book.current(known_as))
            for response in self._stream(self._stubs.animation.Render, requests):
                frame = call.take(response, None, None)
                if frame is not None:
                    yield frame

        return RenderedFrames(self._until_first(frames, (known_as,)), call)

    # -- life -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all streams and the connection; calling it twice is harmless."""
        self._closed.set()
        for stream in list(self._streams):
            stream.close()
        self._channel.close()

    def __enter__(self) -> Client:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- calls ------------------------------------------------------------------------------------------

    def _call(self, method: Any, request: Any) -> Any:
        """A single call with its deadline, tried again while the server is not there."""
        return self._retry(lambda: self._once(method, request))

    def _once(self, method: Any, request: Any) -> Any:
        """A single call with its deadline."""
        if self._closed.is_set():
            raise closed_error()
        try:
            return method(request, timeout=self.settings.timeout_s, metadata=self.settings.metadata)
        except grpc.RpcError as error:
            raise rpc_error(error, self.settings.target) from error

    def _stream(self, method: Any, requests: Iterator[Any]) -> Iterator[Any]:
        """The answers of a call that sends ``requests``; an error of theirs is raised here."""
        if self._closed.is_set():
            raise closed_error()
        fault: list[BaseException] = []
        begun: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def carried() -> Iterator[Any]:  # runs in a thread of gRPC, which may begin before there is a call
            try:
                yield from requests
            except Exception as error:  # noqa: BLE001 - it is raised below, in the caller's thread
                fault.append(error)
                begun.get().cancel()

        call = method(carried(), metadata=self.settings.metadata)
        begun.put(call)
        try:
            yield from call
        except grpc.RpcError as error:
            raise (fault[0] if fault else rpc_error(error, self.settings.target)) from error
        finally:
            call.cancel()

    def _retry(self, call: Callable[[], T], ids: tuple[str, ...] = ()) -> T:
        """Call until it works or fails for another reason than an absent server; ``ids`` are registered again where needed."""
        backoff, restored = Backoff(self.settings.reconnect_timeout_s), False
        while True:
            try:
                try:
                    return call()
                except NotFoundError:
                    if restored or not ids or not self.restore(ids):
                        raise
                    restored = True
            except ServerUnavailable as error:
                if not self.settings.reconnect or self._closed.is_set():
                    raise
                self.pause(backoff.pause(error))

    def _until_first(self, begin: Callable[[], Iterator[T]], ids: tuple[str, ...] = ()) -> Iterator[T]:
        """Items of an iterator that is begun again as long as nothing has come."""

        def attempt() -> tuple[Iterator[T], object]:
            items = begin()
            return items, next(items, _END)

        items, item = self._retry(attempt, ids)
        try:
            while item is not _END:
                yield item  # type: ignore[misc]
                item = next(items, _END)
        finally:
            with contextlib.suppress(AttributeError):
                items.close()  # type: ignore[attr-defined]

    def pause(self, seconds: float) -> None:
        """Wait between two tries; ServerUnavailable when the client is closed meanwhile."""
        if self._closed.wait(seconds):
            raise ServerUnavailable("the client was closed", "expected an open one", "open another one")

    def restore(self, ids: Iterable[str]) -> bool:
        """Register portraits again that the server has forgotten.

        Returns:
            Whether it makes sense to try again: reconnecting is on, and all of them are there now.

        Raises:
            ServerUnavailable: the server is away; the caller waits, for it knows what ends its waiting.
        """
        if not self.settings.reconnect:
            return False
        known = tuple(ids)
        with self._restoring:  # several streams that break at once need each portrait once
            answer = self._once(self._stubs.portraits.ListPortraits, portraits_pb2.ListPortraitsRequest())
            on_server = {p.id for p in answer.portraits}
            for known_as, kept in self._book.missing(known, on_server):
                again = self._once(self._stubs.portraits.RegisterPortrait, kept.request).portrait
                self._book.moved(known_as, again.id)
                on_server.add(again.id)
        return all(self._book.current(known_as) in on_server for known_as in known)


class RenderedFrames(Iterator[Frame]):
    """Frames of :meth:`Client.render_frames`.

    Attributes:
        clip: what was rendered, once all frames have come.
    """

    def __init__(self, frames: Iterator[Frame], call: Rendering) -> None:
        self._frames, self._call = frames, call

    @property
    def clip(self) -> RenderedClip | None:
        return self._call.finished

    def __next__(self) -> Frame:
        return next(self._frames)

    def close(self) -> None:
        """Stop the server's work."""
        self._frames.close()  # type: ignore[attr-defined]


class _Requests(Iterator[Request]):
    """The messages of one connection, taken by gRPC one after the other as fast as HTTP/2 lets it."""

    def __init__(self, changed: threading.Condition, session: Session, first: Request) -> None:
        self._changed, self._session = changed, session
        self._first: Request | None = first
        self.over = False
        self.fault: BaseException | None = None
        self.cancel: Callable[[], object] = lambda: None

    def __next__(self) -> Request:
        try:
            with self._changed:
                first, self._first = self._first, None
                if first is not None:
                    return first
                while not self.over:
                    request = self._session.next_request()
                    if request is not None:
                        return request
                    if self._session.exhausted:
                        break
                    self._changed.wait()  # whoever ends the connection sets `over` and notifies
        except Exception as error:  # noqa: BLE001 - gRPC would swallow it; the reader raises it
            self.fault = error
            self.cancel()
        raise StopIteration

    def end(self) -> None:
        """The connection is over."""
        with self._changed:
            self.over = True
            self._changed.notify_all()


class AnimateStream(Iterator[Frame]):
    """An open stream, made by :meth:`Client.animate`. A context manager and an iterator of :class:`Frame`.

    One thread may send while another receives; one thread alone sends and receives in turn. A thread of its own reads what comes in.
    Without a receiver a lossless stream takes ``2 * window`` frames and then lets :meth:`send` wait; a live one keeps the newest answers.

    When the connection breaks (UNAVAILABLE) and the client reconnects, the stream continues by itself: see ``docs/client.md``.

    Attributes:
        reconnects: how often it has been continued.

    Example:
        >>> with client.animate(portrait, mode="lossless") as stream:               # doctest: +SKIP
        ...     stream.send(picture)
        ...     frame = stream.receive(timeout=1.0)
    """

    def __init__(self, client: Client, session: Session, on_draining: Callable[[float], None] | None) -> None:
        self._client, self._session, self._on_draining = client, session, on_draining
        self._changed = threading.Condition()
        self._inbox: deque[Frame] = deque()
        self._error: BaseException | None = None
        self._closed = self._ended = self._broken = False
        self._lent = 0
        self.reconnects = 0
        self._requests: _Requests | None = None
        self._call: Any = None
        client._retry(self._connect, session.plan.portrait_ids)
        self._reader = threading.Thread(target=self._read, name="lp-edge-stream", daemon=True)
        self._reader.start()

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
        with self._changed:
            return self._session.dropped

    @property
    def draining(self) -> float | None:
        """Seconds that the server had left when it said that it is about to stop; None = it has not said so."""
        return self._session.draining

    # -- sending ----------------------------------------------------------------------------------------

    def send(
        self,
        frame: Pixels | Motion,
        *,
        timestamp: float | None = None,
        sequence: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Send a driving frame; lossless: waits while ``window`` frames are on the way.

        Args:
            frame: uint8 ``[H, W, 3]`` RGB, the bytes of a JPEG, PNG or WebP file, or the motion of one frame. The array may be drawn
                into again at once.
            timestamp: its time in seconds, 0 or more, growing; None = the time since the stream was opened.
            sequence: its number, 1 or more, growing; None = the next.
            timeout: seconds to wait for room; None = the client's ``timeout_s``. Reconnecting takes as long as it may.

        Returns:
            The frame's number.

        Raises:
            DeadlineError: there was no room in time.
            MediaError: the frame is no picture, or too large for required shared memory.
            ConfigError: time or number do not grow, or the stream has ended.
            LpEdgeError: what has ended the stream.
        """
        prepared = self._session.prepare(frame)
        limit = self._client.settings.timeout_s if timeout is None else timeout
        with self._changed:
            while not self._changed.wait_for(lambda: self._ended or self._session.room(), limit):
                if not self._broken:
                    raise no_room(self._session.window, limit)
            if self._ended:
                raise self._error or ended_error()
            number = self._session.submit(prepared, timestamp, sequence)
            self._changed.notify_all()
            return number

    def set_options(self, options: AnimateOptions) -> None:
        """Other options from the next frame on; they replace all of the old ones.

        Raises:
            ConfigError: one of them is not for a stream.
        """
        with self._changed:
            self._session.set_options(options)

    def set_neutral(self, motion: Motion | None = None) -> None:
        """Choose what counts as "no motion" from the next frame on; None = the motion of the next frame that shows a face."""
        with self._changed:
            self._session.set_neutral(motion)

    def finish(self) -> None:
        """Nothing more will be sent; what is on the way is still answered, then iteration ends."""
        with self._changed:
            self._session.finished = True
            self._changed.notify_all()

    def drive(self, frames: Iterable[Pixels | Motion | tuple[float, Pixels | Motion]]) -> Iterator[Frame]:
        """Send frames from another thread and yield the answers; closes the stream at the end.

        Args:
            frames: each alone or as ``(seconds, frame)``; iterated in the other thread, which should not wait for long in there
                once the consumer has stopped.
        """

        def feed() -> None:
            try:
                for item in frames:
                    seconds, frame = timed(item)
                    self.send(frame, timestamp=seconds, timeout=threading.TIMEOUT_MAX)
                self.finish()
            except BaseException as error:  # noqa: BLE001 - raised by the consumer's next()
                self._fail(error)

        feeder = threading.Thread(target=feed, name="lp-edge-feed", daemon=True)
        feeder.start()
        try:
            yield from self
        finally:
            self.close()
            feeder.join(_JOIN_S)

    # -- receiving --------------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> Frame | None:
        """The next answer; None when the stream has ended.

        Args:
            timeout: seconds to wait; None = until one comes or the stream ends.

        Raises:
            DeadlineError: none came in time.
            LpEdgeError: what has ended the stream.
        """
        with self._changed:
            self._session.release(self._lent)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._inbox or self._ended, timeout):
                raise late_answer(timeout)
            if self._inbox:
                frame = self._inbox.popleft()
                self._lent = frame.sequence
                return frame
            if self._error is not None:
                raise self._error
            return None

    def __next__(self) -> Frame:
        frame = self.receive()
        if frame is None:
            raise StopIteration
        return frame

    # -- life -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the stream at once; answers that are on the way are lost. Never fails, calling it twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            call = self._call  # a connection that is just being made, too
        call.cancel()
        if threading.current_thread() is not self._reader:  # a callback may close its own stream
            self._reader.join(_JOIN_S)

    def __enter__(self) -> AnimateStream:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fail(self, error: BaseException) -> None:
        """End the stream with an error that did not come from the server."""
        with self._changed:
            if not self._ended:
                self._error = error
            self._changed.notify_all()
            call = self._call
        call.cancel()

    @property
    def _over(self) -> bool:
        """Whether no connection is of use any more."""
        return self._closed or self._error is not None or self._client._closed.is_set()

    # -- the connection ---------------------------------------------------------------------------------

    def _connect(self) -> None:
        """One try to begin the stream, without shared memory where it is not to be had and not required."""
        try:
            self._handshake()
        except (BackendUnavailable, LimitError, MediaError) as error:
            session = self._session
            if not session.asks_shared or session.plan.shared_memory is True:
                raise
            if getattr(error, "retry_after_s", 0.0):
                raise  # what a later try may cure is not about shared memory
            with session.without_shared(error.got):
                self._handshake()

    def _handshake(self) -> None:
        limit = self._client.settings.timeout_s
        with self._changed:
            first = self._session.begin(self._client._current_ids(self._session.plan.portrait_ids))
        requests = _Requests(self._changed, self._session, first)
        call = self._client._stubs.animation.Animate(requests, metadata=self._client.settings.metadata)
        requests.cancel = call.cancel
        with self._changed:
            self._requests, self._call = requests, call
            over = self._over
        if over:  # who ended the stream before could not know this call
            call.cancel()
        if not call.add_callback(requests.end):
            requests.end()
        timer = threading.Timer(limit, call.cancel)
        timer.daemon = True
        timer.start()
        try:
            response = next(call)
            with self._changed:
                self._session.started(response)
                self._changed.notify_all()
        except StopIteration:
            raise MediaError(
                "the server ended the stream at its start", "expected an answer", "update it"
            ) from None
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED and not timer.is_alive():
                raise no_start(limit) from error
            raise rpc_error(error, self._client.settings.target) from error
        except BaseException:
            call.cancel()
            raise
        finally:
            timer.cancel()

    def _read(self) -> None:
        """Take answers until the stream has ended; the reader's thread."""
        try:
            while not self._over:
                failure = self._read_connection()
                if failure is None:
                    break
                self._reconnect(failure)
        except BaseException as error:  # noqa: BLE001 - raised by receive() and send()
            with self._changed:
                if not self._over:
                    self._error = error
        finally:
            self._call.cancel()
            with self._changed:
                self._ended = True
                self._session.close()
                self._changed.notify_all()

    def _read_connection(self) -> ServerUnavailable | None:
        """Take answers until the connection ends; why, where it is worth another one."""
        try:
            for response in self._call:
                self._take(response)
            return None
        except grpc.RpcError as error:
            requests = self._requests
            if self._over:
                return None
            if requests is not None and requests.fault is not None:
                raise requests.fault from error
            failure = rpc_error(error, self._client.settings.target)
            if not isinstance(failure, ServerUnavailable) or not self._client.settings.reconnect:
                raise failure from error
            return None if self._session.over else failure

    def _take(self, response: Response) -> None:
        with self._changed:
            frame = self._session.answer(response)
            self._changed.notify_all()  # there may be room, or a slot, even if this frame has to wait below
            if frame is not None:
                live, window = not self._session.plan.lossless, self._session.window
                if live and len(self._inbox) >= window:
                    self._session.skipped(self._inbox.popleft())
                elif not live:
                    self._changed.wait_for(lambda: len(self._inbox) < window or self._closed)
                self._inbox.append(frame)
                self._changed.notify_all()
        if response.WhichOneof("message") == "draining" and self._on_draining is not None:
            self._on_draining(response.draining.deadline_ms / 1000)

    def _reconnect(self, failure: ServerUnavailable | LimitError) -> None:
        """Continue on a new connection, or raise ``failure``."""
        settings = self._client.settings
        backoff = Backoff(settings.reconnect_timeout_s)
        self._broken = True
        try:
            while True:
                pause = backoff.pause(failure)
                with self._changed:
                    if self._changed.wait_for(lambda: self._over, pause):
                        return
                try:
                    try:
                        self._connect()
                    except NotFoundError:
                        if not self._client.restore(self._session.plan.portrait_ids):
                            raise
                    else:
                        self.reconnects += 1
                        return
                except (ServerUnavailable, LimitError) as error:
                    # The server may not have noticed yet that our old stream is gone.
                    failure = error
        finally:
            self._broken = False


# Errors that both clients raise.


def no_room(window: int, seconds: float) -> DeadlineError:
    """A lossless stream takes no more."""
    return DeadlineError(
        f"no room for a frame within {seconds:g} s: {window} are on the way",
        "expected the server to answer, and answers to be received",
        "receive while sending (in another thread or task, or with drive()), or give a longer timeout",
    )


def late_answer(seconds: float | None) -> DeadlineError:
    """``receive`` has waited long enough."""
    return DeadlineError(f"no frame within {seconds:g} s", "expected an answer", "wait for longer")


def no_start(seconds: float) -> DeadlineError:
    """The server does not begin a stream."""
    return DeadlineError(
        f"no answer to the configuration within {seconds:g} s", "expected one", "give a longer timeout_s"
    )


def ended_error() -> ConfigError:
    """A frame comes too late."""
    return ConfigError("a frame for a stream that has ended", "expected an open one", "open another stream")
