"""The gRPC services of lp_edge.v1 over the core."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, TypeVar

import av
import cv2
import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

import lp_edge
from lp_edge.errors import ConfigError, Interrupted, LpEdgeError
from lp_edge.proto.v1 import (
    animation_pb2,
    animation_pb2_grpc,
    common_pb2,
    portraits_pb2,
    portraits_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from lp_edge.runtime.faces import Face, left_to_right, select_faces
from lp_edge.runtime.family import Portrait
from lp_edge.runtime.gestures import GESTURES
from lp_edge.runtime.image import encode_image
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.server import jobs
from lp_edge.runtime.server.codec import decode_image
from lp_edge.runtime.server.core import Core, Device, Stream, idle_error
from lp_edge.runtime.server.portraits import StoredPortrait
from lp_edge.runtime.server.stream import AnimateCall
from lp_edge.runtime.server.unary import Guarded, unparsable
from lp_edge.runtime.server.wire import (
    animate_options,
    edit_infos,
    error_metadata,
    portrait_options_message,
)

__all__ = ["add_services"]

_LOG = logging.getLogger("lp_edge")

U8 = npt.NDArray[np.uint8]
T = TypeVar("T")
Context = Any  # grpc.aio.ServicerContext has no types

_THUMBNAIL, _THUMBNAIL_SIDES = 128, (16, 512)
_QUESTIONS = 32
"""Calls of the server's service that may wait for their message at a time."""
_SETTLE_S = 10.0
"""How long the status of an ended stream waits for a client that does not read; then the stream is reset without one."""


def add_services(server: Any, core: Core) -> tuple[str, ...]:
    """Put the services on a ``grpc.aio`` server.

    Returns:
        Their full names, for health and reflection.
    """
    config = core.config
    # Each service has a count of its own: slow uploads of portraits keep nobody from asking for the server's state.
    uploads, questions = (
        Guarded(server, config.idle_timeout_s, most=most) for most in (config.limits.max_streams, _QUESTIONS)
    )
    portraits_pb2_grpc.add_PortraitServiceServicer_to_server(_Portraits(core), uploads)
    animation_pb2_grpc.add_AnimationServiceServicer_to_server(_Animation(core), questions)
    server_pb2_grpc.add_ServerServiceServicer_to_server(_Server(core), questions)
    files = (portraits_pb2, animation_pb2, server_pb2)
    return tuple(s.full_name for f in files for s in f.DESCRIPTOR.services_by_name.values())


async def _abort(context: Context, error: Exception, stream_id: str = "") -> None:
    """End the call with the status of an error."""
    if not isinstance(error, LpEdgeError) and not stream_id:  # a stream's log has it
        _LOG.error("unexpected error in a call", exc_info=error)
    status, message, metadata = error_metadata(error, stream_id)
    await context.abort(grpc.StatusCode[status], message, metadata)


async def _unary(
    core: Core,
    context: Context,
    work: Callable[[], Coroutine[Any, Any, T]],
    stream_ids: Sequence[str] = (),
) -> T:
    """Answer a unary call, or end it with an error's status; ``work`` may put the id of its stream into ``stream_ids``."""
    try:
        core.check_ready()
        return await work()
    except Exception as error:
        await _abort(context, error, *stream_ids)
        raise  # abort has raised already


def _headers(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


class _Answers:
    """Sends a stream's answers. gRPC takes no status while a message is being sent, and cancelling that does not end it: the client
    has to read. So a message that is on its way stays there, and the status waits for it.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sending: asyncio.Future[None] | None = None
        self.gone = False

    async def write(self, message: Any) -> None:
        """Send a message; returns when the transport has taken it. Interrupted: the client has left."""
        self._sending = asyncio.ensure_future(self._context.write(message))
        # whoever waits tells of its error; nobody may be waiting any more
        self._sending.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.shield(self._sending)
        except Exception as error:  # gRPC has no public name for it
            self.gone = True
            raise Interrupted("the client has left the call") from error

    async def settle(self) -> bool:
        """Whether a status can be sent: nothing is on its way any more, if need be after a while."""
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=_SETTLE_S)
        return not self.gone and (self._sending is None or self._sending.done())


async def _streaming(
    core: Core, context: Context, kind: str, work: Callable[[Stream, _Answers], Coroutine[Any, Any, None]]
) -> None:
    """Admit a stream, run it, and end it with its error's status."""
    stream_id, answers = "", _Answers(context)
    try:
        with core.open_stream(kind, context.peer(), _headers(context)) as stream:
            stream_id = stream.id
            try:
                await work(stream, answers)
            except DecodeError as error:
                raise unparsable() from error
        await answers.settle()  # a notice may be on its way
    except Exception as error:  # CancelledError is none
        if await answers.settle():  # its place is free already
            await _abort(context, error, stream_id)
        # Nobody is there to be told: as if gRPC had cancelled the call.
        raise asyncio.CancelledError from error


class _Portraits(portraits_pb2_grpc.PortraitServiceServicer):
    def __init__(self, core: Core) -> None:
        self._core = core

    async def RegisterPortrait(
        self, request: portraits_pb2.RegisterPortraitRequest, context: Context
    ) -> portraits_pb2.RegisterPortraitResponse:
        stream_ids: list[str] = []

        async def work() -> portraits_pb2.RegisterPortraitResponse:
            with self._core.open_stream("register", context.peer(), _headers(context)) as stream:
                stream_ids.append(stream.id)
                return await register(self._core, stream, request)

        return await _unary(self._core, context, work, stream_ids)

    async def ListPortraits(
        self, request: portraits_pb2.ListPortraitsRequest, context: Context
    ) -> portraits_pb2.ListPortraitsResponse:
        async def work() -> portraits_pb2.ListPortraitsResponse:
            store = self._core.store
            return portraits_pb2.ListPortraitsResponse(
                portraits=[_portrait_message(p, landmarks=False) for p in store.list()],
                memory_bytes=store.memory_bytes,
                memory_limit_bytes=self._core.config.limits.max_portrait_bytes,
            )

        return await _unary(self._core, context, work)

    async def DeletePortrait(
        self, request: portraits_pb2.DeletePortraitRequest, context: Context
    ) -> portraits_pb2.DeletePortraitResponse:
        async def work() -> portraits_pb2.DeletePortraitResponse:
            self._core.store.delete(request.id)
            return portraits_pb2.DeletePortraitResponse()

        return await _unary(self._core, context, work)


async def register(
    core: Core, stream: Stream, request: portraits_pb2.RegisterPortraitRequest
) -> portraits_pb2.RegisterPortraitResponse:
    """Find, prepare and keep the faces of a picture."""
    side = request.thumbnail_side or _THUMBNAIL
    low, high = _THUMBNAIL_SIDES
    if not low <= side <= high:
        raise ConfigError(f"thumbnail_side {side}", f"expected {low} to {high}", "choose one, or 0 for 128")
    asked = request.time_to_live
    ttl = core.store.time_to_live(
        asked.seconds + asked.nanos / 1e9 if request.HasField("time_to_live") else None
    )
    animator = stream.device.animator
    options = animate_options(request.options, common_pb2.AnimationOptions(), animator.family.name)
    rgb = await core.codec(decode_image, request.image, core.config.limits, None)

    found: list[Face] = []

    def prepare() -> tuple[list[Face], list[Portrait]]:
        found.extend(animator.finder.find(rgb, "all"))
        faces = select_faces(found, options.faces)
        return faces, _prepare(stream.device, rgb, faces, options)

    def prepare_on(device: int) -> list[Portrait]:
        return _prepare(core.devices[device], rgb, faces, options)

    faces, prepared = await core.compute(stream, prepare)
    portrait = core.store.add(rgb, options, faces, {stream.device.index: prepared}, ttl, prepare=prepare_on)
    message = _portrait_message(portrait, landmarks=True)
    message.detected_faces.extend(_box(face) for face in left_to_right(found))
    message.thumbnail = await core.codec(_thumbnail, rgb, side)
    return portraits_pb2.RegisterPortraitResponse(portrait=message)


def _prepare(device: Device, rgb: U8, faces: list[Face], options: AnimateOptions) -> list[Portrait]:
    return [device.animator.family.prepare(rgb, face.points, options) for face in faces]


def _thumbnail(rgb: U8, side: int) -> bytes:
    height, width = rgb.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return encode_image(
        np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8), ".jpg", quality=85
    )


def _portrait_message(portrait: StoredPortrait, *, landmarks: bool) -> portraits_pb2.Portrait:
    def stamp(seconds: float) -> Timestamp:
        return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))

    height, width = portrait.rgb.shape[:2]
    faces = []
    for face in portrait.faces:
        message = portraits_pb2.Face(box=_box(face), score=face.score)
        if landmarks:
            message.landmarks.extend(face.points[:, :2].ravel().tolist())
        faces.append(message)
    return portraits_pb2.Portrait(
        id=portrait.id,
        width=width,
        height=height,
        faces=faces,
        memory_bytes=portrait.memory_bytes,
        active_streams=portrait.active,
        created_at=stamp(portrait.created_at),
        expires_at=stamp(portrait.expires_at),
        options=portrait_options_message(portrait.options),
    )


def _box(face: Face) -> portraits_pb2.Box:
    left, top, right, bottom = (float(v) for v in face.box)
    return portraits_pb2.Box(left=left, top=top, right=right, bottom=bottom)


class _Animation(animation_pb2_grpc.AnimationServiceServicer):
    def __init__(self, core: Core) -> None:
        self._core = core

    async def Animate(self, requests: AsyncIterator[animation_pb2.AnimateRequest], context: Context) -> None:
        async def work(stream: Stream, answers: _Answers) -> None:
            await AnimateCall(self._core, stream, requests, answers.write).run()

        await _streaming(self._core, context, "animate", work)

    async def ExtractMotion(
        self, requests: AsyncIterator[animation_pb2.ExtractMotionRequest], context: Context
    ) -> None:
        async def work(stream: Stream, answers: _Answers) -> None:
            await self._forward(jobs.extract_motion(self._core, stream, requests), answers)

        await _streaming(self._core, context, "extract_motion", work)

    async def Render(self, requests: AsyncIterator[animation_pb2.RenderRequest], context: Context) -> None:
        async def work(stream: Stream, answers: _Answers) -> None:
            await self._forward(jobs.render(self._core, stream, requests), answers)

        await _streaming(self._core, context, "render", work)

    async def _forward(self, responses: AsyncGenerator[Any, None], answers: _Answers) -> None:
        """Send what a job answers; a client that takes nothing for long does not hold its place."""
        limit = self._core.config.idle_timeout_s
        async with aclosing(responses):
            async for response in responses:
                try:
                    await asyncio.wait_for(answers.write(response), limit)
                except asyncio.TimeoutError as error:
                    raise idle_error(limit) from error


class _Server(server_pb2_grpc.ServerServiceServicer):
    def __init__(self, core: Core) -> None:
        self._core = core
        self._versions = core.versions()
        missing = {common_pb2.OUTPUT_ENCODING_UNSPECIFIED}
        if "libx264" not in av.codec.codecs_available:
            missing.add(common_pb2.OUTPUT_ENCODING_H264)
        if not core.config.limits.max_shared_memory_bytes:
            missing.add(common_pb2.OUTPUT_ENCODING_SHARED_MEMORY)
        self._encodings = [e for e in common_pb2.OutputEncoding.values() if e not in missing]

    async def GetServerInfo(
        self, request: server_pb2.GetServerInfoRequest, context: Context
    ) -> server_pb2.GetServerInfoResponse:
        """Answers while the server loads or drains, too."""
        core = self._core
        response = server_pb2.GetServerInfoResponse(
            version=lp_edge.__version__, templates=list(GESTURES), versions=self._versions
        )
        response.uptime.FromNanoseconds(int((time.monotonic() - core.started) * 1e9))
        response.load.CopyFrom(
            server_pb2.Load(
                streams=len(core.streams),
                portraits=len(core.store),
                portrait_bytes=core.store.memory_bytes,
                waiting_calls=sum(d.worker.pending for d in core.devices),
                draining=core.drain_deadline is not None,
            )
        )
        response.edits.extend(edit_infos())
        response.output_encodings.extend(self._encodings)
        _describe(core, response)
        return response


def _describe(core: Core, response: server_pb2.GetServerInfoResponse) -> None:
    """Bundle, devices, motion and limits."""
    limits, config = core.config.limits, core.config
    for device in core.devices:
        response.devices.add(name=device.name, backend=device.backend, threads=device.threads)
    message = server_pb2.Limits(**asdict(limits), max_batch=config.max_batch)
    message.portrait_time_to_live.FromNanoseconds(int(config.portrait_ttl_s * 1e9))
    message.idle_timeout.FromNanoseconds(int(config.idle_timeout_s * 1e9))
    response.limits.CopyFrom(message)
    if not core.devices:
        return
    response.limits.max_batch_wait.FromNanoseconds(int(core.devices[0].max_wait_s * 1e9))
    bundle = core.devices[0].animator.bundle
    manifest = bundle.manifest
    response.motion.CopyFrom(core.space.info)
    response.bundle.CopyFrom(
        server_pb2.BundleInfo(
            family=manifest.family,
            variant=manifest.variant,
            licence=manifest.licence,
            manifest_sha256=core.manifest_sha256,
            networks=[
                server_pb2.NetworkInfo(name=name, sha256=entry.sha256, precision=entry.precision)
                for name, entry in manifest.networks.items()
            ],
        )
    )
