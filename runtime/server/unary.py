"""Unary calls that wait for their one message no longer than they should, and survive what is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from lp_edge.errors import DeadlineError, LpEdgeError, ProtocolError
from lp_edge.runtime.server.wire import error_metadata

__all__ = ["Guarded", "unparsable"]


class Guarded:
    """Stands for a ``grpc.aio`` server while services are added to it: their unary calls become streams of one message.

    Left alone, gRPC waits for the message without bound before any code of ours runs, and each call that waits takes a place of
    ``maximum_concurrent_rpcs``; bytes that are no message it answers with UNKNOWN and a traceback in the log. On the wire there
    is no difference.

    Args:
        server: the server.
        seconds: how long a message may take to arrive.
    """

    def __init__(self, server: Any, seconds: float) -> None:
        self._server, self._seconds = server, seconds

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """What generated code calls."""
        self._server.add_generic_rpc_handlers([_Handler(handler, self._seconds) for handler in handlers])

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """What newer generated code calls beside it, to look methods up faster; it would go past the guard."""


class _Handler:
    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds

    def service(self, handler_call_details: Any) -> Any:
        handler = self._inner.service(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        method = _waiting(handler.unary_stream or handler.unary_unary, self._seconds)
        return make(method, handler.request_deserializer, handler.response_serializer)


def _waiting(
    method: Callable[[Any, Any], Awaitable[Any]], seconds: float
) -> Callable[[AsyncIterator[Any], Any], Awaitable[Any]]:
    async def answer(requests: AsyncIterator[Any], context: Any) -> Any:
        error: LpEdgeError
        try:
            request = await asyncio.wait_for(anext(requests, None), seconds)
            if request is not None:
                return await method(request, context)
            error = ProtocolError("a call without a message", "expected one", "send the request")
        except DecodeError:
            error = unparsable()
        except asyncio.TimeoutError:
            error = DeadlineError(
                f"no message within {seconds:g} s", "expected the request", "send it with the call"
            )
        status, message, metadata = error_metadata(error)
        await context.abort(grpc.StatusCode[status], message, metadata)
        return None

    return answer


def unparsable() -> ProtocolError:
    """The error for bytes that are no message."""
    return ProtocolError(
        "a message that cannot be parsed",
        "expected one of the service's messages",
        "build the client from this server's .proto files",
    )
