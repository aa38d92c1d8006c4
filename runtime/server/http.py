"""A small HTTP front over the core, for those who have no gRPC: one picture and one driver in, one MP4 out.

===========================  ==================================================================================
``POST /v1/animate``         multipart form: ``picture``, and ``driving`` (a file) or ``template`` (a name), and options
``GET /v1/results/{id}``     the MP4 that such a call has announced, once
``GET /healthz``             200 while new calls are taken, else 503
``GET /metrics``             Prometheus
``GET /openapi.json``        this interface as OpenAPI
===========================  ==================================================================================

Admission, limits, tokens and scheduling are those of the gRPC services. Parts of a form go to bounded files while they arrive,
nothing is spooled elsewhere, and a client that goes away ends its work. Every error answers with a body
``{"error": {"type", "got", "expected", "remedy"}}``; its status follows from the gRPC status of the error's class.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.responses import JSONResponse

import lp_edge
from lp_edge.errors import (
    ConfigError,
    Interrupted,
    LimitError,
    LpEdgeError,
    NotFoundError,
    ProtocolError,
)
from lp_edge.proto.v1 import common_pb2
from lp_edge.runtime.gestures import GESTURES
from lp_edge.runtime.job import RunConfig
from lp_edge.runtime.options import DRIVING_CROPS, REGIONS, AnimateOptions
from lp_edge.runtime.server import jobs
from lp_edge.runtime.server.access import Tokens
from lp_edge.runtime.server.codec import OutputSettings, decode_image
from lp_edge.runtime.server.config import ServerConfig
from lp_edge.runtime.server.core import Core, Stream, count_frame, idle_error
from lp_edge.runtime.server.jobs import RenderedFrame, Upload
from lp_edge.runtime.server.wire import error_metadata
from lp_edge.runtime.settings import SETTINGS, read_setting, with_settings
from lp_edge.runtime.templates import MotionTemplate

__all__ = ["HTTP_STATUS", "OPTIONS", "create_app"]

_LOG = logging.getLogger("lp_edge")
T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

HTTP_STATUS: Final[Mapping[str, int]] = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 422,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,  # nginx's number for a client that has gone; nobody sees it but a log
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""gRPC status of an error's class → HTTP status. Of those that no waiting cures, a LimitError (a size) is 413 and an OutputError 507."""

# What a server cannot do for a picture as source, or not without a path.
_ABSENT = (
    "edit-file", "length", "side-by-side", "source-eye-retargeting", "source-eye-threshold", "smooth-variance",
)  # fmt: skip
OPTIONS: Final = (*(name for name in SETTINGS if name not in _ABSENT), "width", "height")
"""Fields of the form besides picture, driving and template: lp-run's long names, and the size of the result."""

_FILES = ("picture", "driving")
_MAX_FIELD_BYTES = 64 << 10  # of all fields together
_MAX_HEADER_BYTES = 4096
_RESULT_S = 600.0


# -- the interface in words ------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    """Why a call failed."""

    type: str
    got: str
    expected: str
    remedy: str


class ErrorBody(BaseModel):
    """Body of every answer that is an error."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether new calls are taken."""

    status: str


def _schema(name: str) -> dict[str, Any]:
    """JSON schema of an option."""
    choices = {"region": REGIONS, "driving-crop": DRIVING_CROPS, "audio": ("driving", "none")}
    if name in choices:
        return {"type": "string", "enum": list(choices[name])}
    if name in ("width", "height"):
        return {"type": "integer", "minimum": 16, "maximum": 8192}
    kinds = {"a whole number": "integer", "a number": "number", "yes or no": "boolean"}
    return {"type": kinds.get(SETTINGS[name].kind, "string")}


_FORM: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["picture"],
                    "oneOf": [{"required": ["driving"]}, {"required": ["template"]}],
                    "additionalProperties": False,
                    "properties": {
                        "picture": {
                            "type": "string",
                            "format": "binary",
                            "description": "JPEG, PNG or WebP with a face",
                        },
                        "driving": {
                            "type": "string",
                            "format": "binary",
                            "description": "clip, picture or motion template (.npz, .pkl) that drives it",
                        },
                        "template": {
                            "type": "string",
                            "enum": list(GESTURES),
                            "description": "built-in template that drives it",
                        },
                        **{name: _schema(name) for name in OPTIONS},
                    },
                }
            }
        },
    }
}


def _answers(*statuses: int, **contents: Any) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's ``responses`` of a route."""
    answers: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in statuses}
    if contents:
        answers[200] = contents
    return answers


_MP4: Final = {"schema": {"type": "string", "format": "binary"}}


# -- errors ----------------------------------------------------------------------------------------------------


def _error_body(error: BaseException, where: str = "") -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error; one that is not lp-edge's is logged, and told without its text."""
    if not isinstance(error, LpEdgeError):
        _LOG.error("unexpected error in %s", where or "an HTTP call", exc_info=error)
    status, _, metadata = error_metadata(error, where)
    detail = common_pb2.ErrorDetail.FromString(bytes(metadata[0][1]))  # type: ignore[arg-type]
    code = HTTP_STATUS[status]
    headers: dict[str, str] = {}
    if detail.retry_after_ms or code == 503:
        headers["retry-after"] = str(max(1, math.ceil(detail.retry_after_ms / 1000)))
    elif code == 429:
        code = 413 if detail.type == "LimitError" else 507
    if code == 401:
        headers["www-authenticate"] = "Bearer"
    body = {"type": detail.type, "got": detail.got, "expected": detail.expected, "remedy": detail.remedy}
    return code, {"error": body}, headers


def _error_answer(error: BaseException, where: str = "") -> JSONResponse:
    code, body, headers = _error_body(error, where)
    return JSONResponse(body, code, headers)


# -- connections -----------------------------------------------------------------------------------------------


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do work; Interrupted, and the work cancelled, when the client goes away. Its body must have been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Interrupted("the client has gone")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class _Streamed(Response):
    """An answer in pieces that are made while it is sent; ends, and ends their making, when the client goes away.

    Args:
        pieces: the body.
        media_type: what it is.
        end: called when all is sent or nobody wants it any more, even where ``pieces`` was never begun.
        patience_s: a client that takes nothing for longer has gone.
        size: bytes of all pieces, where known.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str,
        end: Callable[[], Awaitable[None]],
        patience_s: float,
        size: int | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        if size is not None:
            self.headers["content-length"] = str(size)
        self._pieces, self._end, self._patience_s = pieces, end, patience_s

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        async def give(**message: Any) -> None:
            await asyncio.wait_for(send(message), self._patience_s)

        async def body() -> None:
            await give(type="http.response.start", status=self.status_code, headers=self.raw_headers)
            async for piece in self._pieces:
                await give(type="http.response.body", body=piece, more_body=True)
            await give(type="http.response.body", body=b"")

        try:
            async with aclosing(self._pieces):
                await _while_connected(receive, body())
        except (Interrupted, OSError, asyncio.TimeoutError):  # the client has gone
            return
        finally:
            await self._end()


class _Access:
    """ASGI middleware: nothing but ``/healthz`` without a token, where the server asks for one."""

    def __init__(self, app: Any, core: Core, tokens: Tokens) -> None:
        self._app, self._core, self._tokens = app, core, tokens

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/healthz":
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            try:
                self._tokens.check(given[0].decode("latin-1") if len(given) == 1 else None)
            except LpEdgeError as error:
                self._core.metrics.refused("token")
                await _error_answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


# -- forms -----------------------------------------------------------------------------------------------------


class _Form:
    """A multipart form (RFC 7578) while it arrives: files go to uploads, fields are kept; all is bounded.

    Args:
        boundary: from the request's Content-Type.
        files: name → where its content goes.
    """

    def __init__(self, boundary: bytes, files: Mapping[str, Upload]) -> None:
        self.fields: dict[str, str] = {}
        self.seen: set[str] = set()
        self.complete = False
        self._files = files
        self._room = _MAX_FIELD_BYTES
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._name = ""
        self._value = bytearray()
        self._pending: list[tuple[Upload, bytes]] = []
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header_part(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._header_part(1, data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._complete,
            },
        )

    def write(self, data: bytes) -> None:
        """Take the next bytes of the body; blocks.

        Raises:
            ProtocolError: they are no form, or hold a part twice.
            ConfigError: a part has an unknown name.
            LimitError: a part is too large.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise ProtocolError(
                f"a body that is no form ({error})"[:300], "expected multipart/form-data", "send a form"
            ) from error
        pending, self._pending = self._pending, []
        for upload, piece in pending:
            upload.write(piece)

    def _begin(self) -> None:
        self._name, self._value = "", bytearray()

    def _header_part(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)
        if len(self._header[which]) > _MAX_HEADER_BYTES:
            raise ProtocolError(
                f"a part's header of more than {_MAX_HEADER_BYTES} bytes",
                "expected less",
                "send a plain form",
            )

    def _header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() == b"content-disposition":
            self._name = parse_options_header(value)[1].get(b"name", b"").decode("utf-8", "replace")

    def _headers_finished(self) -> None:
        name = self._name
        if name == "edit-file":
            raise ConfigError("the field edit-file", "expected no paths", "send the edits themselves as edit")
        if name not in (*_FILES, "template", *OPTIONS):
            raise ConfigError(
                f"no field is called {name[:64]!r}",
                f"expected some of {', '.join((*_FILES, 'template', *OPTIONS))}",
                "rename it, or leave it out",
            )
        if name in self.seen:
            raise ProtocolError(f"the field {name} is there twice", "expected it once", "drop one of them")
        self.seen.add(name)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name in self._files:
            self._pending.append((self._files[self._name], data[start:end]))
            return
        self._room -= end - start
        if self._room < 0:
            raise LimitError(
                f"fields of more than {_MAX_FIELD_BYTES} bytes", "expected fewer", "send files as files"
            )
        self._value += data[start:end]

    def _end(self) -> None:
        if self._name not in self._files:
            self.fields[self._name] = self._value.decode("utf-8", "replace").strip()

    def _complete(self) -> None:
        self.complete = True


async def _read_form(core: Core, request: Request, files: Mapping[str, Upload]) -> _Form:
    """The request's form, written to ``files`` and checked for what must be there.

    Raises:
        ProtocolError: it is no form, incomplete, or neither one driver nor one template is there.
        ConfigError, LimitError: see :class:`_Form`.
        DeadlineError: nothing came for long.
        Interrupted: the client went away.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    boundary = parameters.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
        raise ProtocolError(
            f"a body of the type {kind.decode('latin-1')[:64]!r}",
            "expected multipart/form-data with a boundary of 1 to 70 characters",
            "send a form",
        )
    limits = core.config.limits
    most = limits.max_message_bytes + limits.max_upload_bytes + (1 << 20)  # and the parts' headers
    size = request.headers.get("content-length", "0")
    if not size.isdecimal() or int(size[:20]) > most:
        raise LimitError(
            f"a body of {size[:20]} bytes",
            f"expected at most {limits.max_message_bytes} for the picture and {limits.max_upload_bytes} for the driver",
            "send a shorter or smaller clip",
        )
    form, read = _Form(boundary, files), 0
    idle = core.config.idle_timeout_s
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), idle)
        except asyncio.TimeoutError as error:
            raise idle_error(idle) from error
        if message["type"] != "http.request":
            raise Interrupted("the client has gone")
        if body := message.get("body", b""):
            read += len(body)
            if read > most:  # parts' headers alone, or what stands around the parts
                raise LimitError(f"a body of more than {most} bytes", "expected less", "send a smaller clip")
            await core.codec(form.write, body)
        if not message.get("more_body", False):
            break
    if not form.complete:
        raise ProtocolError("a form that ends early", "expected its closing boundary", "send it whole")
    drivers = form.seen & {"driving", "template"}
    if "picture" not in form.seen or len(drivers) != 1:
        raise ProtocolError(
            f"a form with {', '.join(sorted(form.seen)) or 'nothing'}",
            "expected picture, and either driving or template",
            "send a picture and one driver",
        )
    return form


def _settings(fields: Mapping[str, str], max_pixels: int) -> tuple[AnimateOptions, OutputSettings, bool]:
    """Options, size and quality of the result, and whether it has sound.

    Raises:
        ConfigError: a text is no such value, or out of range.
    """
    given = {name: text for name, text in fields.items() if name in OPTIONS and name in SETTINGS}
    values = {name: read_setting(name, text) for name, text in given.items()}
    audio, crf = values.pop("audio", "driving"), values.pop("crf", OutputSettings().crf)
    if audio not in ("driving", "none"):
        raise ConfigError(f"audio is {audio!r}", "expected driving or none", "a picture has no sound")
    sides = {}
    for name in ("width", "height"):
        if name in fields:
            if not fields[name].isdecimal() or len(fields[name]) > 5:
                raise ConfigError(f"{name} is {fields[name][:32]!r}", "expected 16 to 8192", "correct it")
            sides[name] = int(fields[name])
    output = OutputSettings(encoding="raw", crf=crf, max_pixels=max_pixels, **sides)  # type: ignore[arg-type]
    return with_settings(RunConfig("picture"), values).options, output, audio == "driving"


# -- results ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """An open file that has no name any more, so that whatever ends the process frees its bytes."""

    io: FileIO
    size: int

    async def pieces(self, core: Core) -> AsyncGenerator[bytes, None]:
        """Its content, read in threads."""
        while data := await core.codec(self.io.read, jobs.CHUNK_BYTES):
            yield data

    async def close(self) -> None:
        """Free it."""
        self.io.close()

    def answer(self, core: Core) -> _Streamed:
        """It as an MP4, once."""
        return _Streamed(self.pieces(core), "video/mp4", self.close, core.config.idle_timeout_s, self.size)


def _close_all(files: OrderedDict[str, _File]) -> None:
    for file in files.values():
        file.io.close()
    files.clear()


class _Results:
    """Finished files until they are fetched, once. Belongs to the event loop's thread.

    Args:
        most: files that may wait; the oldest goes for a new one.
        most_bytes: their bytes together; no less than one file may have.
        seconds: how long one waits.
    """

    def __init__(self, most: int, most_bytes: int, seconds: float = _RESULT_S) -> None:
        self._most, self._most_bytes, self.seconds = most, most_bytes, seconds
        self._files: OrderedDict[str, _File] = OrderedDict()
        weakref.finalize(self, _close_all, self._files)

    def add(self, file: _File) -> str:
        """Keep a file; returns the id to fetch it by."""
        id = secrets.token_urlsafe(16)
        self._files[id] = file
        while len(self._files) > self._most or sum(f.size for f in self._files.values()) > self._most_bytes:
            self._drop(next(iter(self._files)))
        asyncio.get_running_loop().call_later(self.seconds, self._drop, id)
        return id

    def take(self, id: str) -> _File:
        """The file, which is the caller's now.

        Raises:
            NotFoundError: there is none of that id, or it was fetched or has expired.
        """
        file = self._files.pop(id, None)
        if file is None:
            raise NotFoundError(
                "no result of that id",
                f"expected one that was made in the last {self.seconds:g} s and not fetched yet",
                "animate again",
            )
        return file

    def _drop(self, id: str) -> None:
        file = self._files.pop(id, None)
        if file is not None:
            file.io.close()


# -- the application -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finished:
    """The result of an animation, and its last frame."""

    file: _File
    last: RenderedFrame

    @property
    def summary(self) -> dict[str, Any]:
        """What is told of it beside where it is."""
        return {
            "frames": self.last.index + 1,
            "frame_rate": float(self.last.fps),
            "width": self.last.rgb.shape[1],
            "height": self.last.rgb.shape[0],
            "bytes": self.file.size,
        }


_Event = RenderedFrame | _Finished | None


async def _animate(core: Core, request: Request) -> AsyncGenerator[_Event, None]:
    """Admit, receive and render a call: None when all is received, then its frames, then the result."""
    limits = core.config.limits
    host = request.client
    with ExitStack() as stack:
        peer = f"http:{host.host}:{host.port}" if host else "http:"
        stream = stack.enter_context(core.open_stream("http", peer, request.headers))
        picture = stack.enter_context(Upload(limits.max_message_bytes, "max_message_bytes"))
        driving = stack.enter_context(Upload(limits.max_upload_bytes))
        form = await _read_form(core, request, {"picture": picture, "driving": driving})
        yield None
        options, output, sound = _settings(form.fields, limits.max_pixels)
        source = await _source(core, stream, picture, options)
        driver: Path | MotionTemplate
        if "template" in form.fields:
            driver = await core.codec(jobs.builtin, stream, form.fields["template"])
        else:
            await core.codec(driving.finish)
            driver = await core.codec(jobs.open_upload, stream, driving, limits, "any")
        path = driving.beside("result.mp4")
        last: RenderedFrame | None = None
        with driving.anonymous():
            frames = jobs.render_mp4(core, stream, source, driver, options, output, path, sound=sound)
            async with aclosing(frames):
                async for frame in frames:
                    count_frame(core, stream, frame.watch.by_stage(), frame.watch.elapsed)
                    last = frame
                    yield frame
        if last is not None:
            yield _Finished(_File(FileIO(path), path.stat().st_size), last)


async def _source(core: Core, stream: Stream, picture: Upload, options: AnimateOptions) -> jobs.Source:
    """The picture, whose faces are found when rendering begins."""

    def read() -> Any:
        with picture.anonymous():
            data = picture.finish().read_bytes()
        image = common_pb2.Image(encoded=common_pb2.EncodedImage(data=data))
        return decode_image(image, core.config.limits, None)

    rgb = await core.codec(read)
    return jobs.Source(rgb, lambda: stream.device.animator.prepare_source(rgb, options))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


async def _lines(
    results: _Results, first: _Event, rest: AsyncGenerator[_Event, None]
) -> AsyncGenerator[bytes, None]:
    """What is told of a rendering while it runs, and where its result is; an error as a line."""
    pace = jobs.Pace()
    event = first
    try:
        while True:
            if isinstance(event, _Finished):
                done = event.last.index + 1
                id = results.add(event.file)
                yield _line({"progress": {"frames_done": done, "frames_total": done}})
                url = {"url": f"/v1/results/{id}", "expires_in_s": results.seconds}
                yield _line({"result": {**url, **event.summary}})
            elif event is not None and pace.due():
                total = None if event.expected is None else max(event.expected, event.index + 1)
                yield _line({"progress": {"frames_done": event.index + 1, "frames_total": total}})
            event = await rest.__anext__()
    except StopAsyncIteration:
        return
    except Exception as error:  # noqa: BLE001 - the answer has begun: told in it
        yield _line(_error_body(error)[1])


async def _next(events: AsyncIterator[T]) -> T:
    return await events.__anext__()


async def _last(events: AsyncIterator[_Event]) -> _Finished:
    """Render to the end."""
    finished: _Finished | None = None
    try:
        async for event in events:
            if isinstance(event, _Finished):
                finished = event
    except BaseException:
        if finished is not None:
            await finished.file.close()
        raise
    if finished is None:
        raise LpEdgeError("a rendering without a result")
    return finished


def create_app(core: Core, config: ServerConfig) -> FastAPI:
    """The HTTP front as an ASGI application; it needs no lifespan.

    Args:
        core: devices, admission, threads; may still be loading.
        config: limits and tokens.

    Example:
        >>> uvicorn.run(create_app(core, config), port=8080)            # doctest: +SKIP
    """
    tokens = Tokens.of(config)
    limits = config.limits
    results = _Results(limits.max_streams, 4 * limits.max_upload_bytes)
    app = FastAPI(
        title="lp-edge",
        version=lp_edge.__version__,
        description="Animates a portrait with a driving clip, picture or motion template.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(_Access, core=core, tokens=tokens)
    # for OpenAPI; _Access checks
    guarded = [Depends(HTTPBearer(auto_error=False))] if tokens.required else []

    @app.exception_handler(LpEdgeError)
    async def told(request: Request, error: LpEdgeError) -> JSONResponse:
        return _error_answer(error)

    @app.exception_handler(AnyHTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        expected = (
            "expected another method" if error.status_code == 405 else "expected a path of this interface"
        )
        answer = _error_answer(
            NotFoundError(f"{request.method} {request.url.path[:200]}", expected, "see /openapi.json")
        )
        answer.status_code = error.status_code
        answer.headers.update(error.headers or {})  # 405 has Allow
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error_answer(ProtocolError("a request that does not fit", "", "see /openapi.json"))

    @app.get("/healthz", responses=_answers(503), summary="Whether new calls are taken")
    async def healthz() -> Health:
        core.check_ready()
        return Health(status="serving")

    @app.get("/metrics", dependencies=guarded, responses=_answers(401), summary="Numbers for Prometheus")
    async def metrics() -> Response:
        body, content_type = core.metrics.render()
        return Response(body, headers={"content-type": content_type})

    @app.get(
        "/v1/results/{id}",
        dependencies=guarded,
        response_class=Response,
        responses=_answers(401, 404, 422, content={"video/mp4": _MP4}, description="The MP4; only once."),
        summary="The result of a finished animation",
    )
    async def result(id: str) -> Response:
        return results.take(id).answer(core)

    @app.post(
        "/v1/animate",
        dependencies=guarded,
        response_class=Response,
        openapi_extra=_FORM,
        responses=_answers(
            400, 401, 404, 413, 422, 429, 500, 503, 504,
            description="The MP4, or by Accept: application/x-ndjson lines of progress and the URL of the MP4.",
            content={"video/mp4": _MP4, "application/x-ndjson": {"schema": {"type": "string"}}},
        ),
        summary="Animate a picture with a driver",
    )  # fmt: skip
    async def animate(request: Request) -> Response:
        accept = request.headers.get("accept", "*/*").lower()
        events = _animate(core, request)
        try:
            await (
                events.__anext__()
            )  # all is received: from now on the connection says nothing but that it ends
            if "application/x-ndjson" in accept:
                first = await _while_connected(request.receive, _next(events))
                lines = _lines(results, first, events)
                return _Streamed(lines, "application/x-ndjson", events.aclose, config.idle_timeout_s)
            if not any(kind in accept for kind in ("video/mp4", "video/*", "*/*")):
                raise ConfigError(
                    f"Accept is {accept[:64]!r}",
                    "expected video/mp4 or application/x-ndjson",
                    "ask for one of them",
                )
            finished = await _while_connected(request.receive, _last(events))
            return finished.file.answer(core)
        except BaseException as error:
            await events.aclose()
            if isinstance(error, LpEdgeError) or not isinstance(error, Exception):
                raise
            return _error_answer(error, "POST /v1/animate")

    return app
