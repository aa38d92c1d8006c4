"""Unary calls that wait for their one message no longer than they should, and survive what is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from lp_edge.errors import DeadlineError, LimitError, LpEdgeError, ProtocolError
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
        most: how many calls may wait for theirs at a time; others are refused at once.
    """

    def __init__(self, server: Any, seconds: float, most: int) -> None:
        self._server, self._wait = server, _Wait(seconds, most)

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """What generated code calls."""
        self._server.add_generic_rpc_handlers([_Handler(handler, self._wait) for handler in handlers])

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """What newer generated code calls beside it, to look methods up faster; it would go past the guard."""


class _Wait:
    """Takes the message of a call, from no more than so many calls at a time."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most, self._waiting = seconds, most, 0

    async def message(self, requests: AsyncIterator[Any]) -> Any:
        """The one message. Raises what is to be told the client."""
        if self._waiting >= self._most:
            raise LimitError(
                f"{self._waiting} calls wait for their message",
                "expected it with the call",
                "try again",
                retry_after_s=1.0,
            )
        self._waiting += 1
        try:
            request = await asyncio.wait_for(anext(requests, None), self._seconds)
        except DecodeError as error:
            raise unparsable() from error
        except asyncio.TimeoutError as error:
            raise DeadlineError(
                f"no message within {self._seconds:g} s", "expected the request", "send it with the call"
            ) from error
        finally:
            self._waiting -= 1
        if request is None:
            raise ProtocolError("a call without a message", "expected one", "send the request")
        return request


class _Handler:
    def __init__(self, inner: Any, wait: _Wait) -> None:
        self._inner, self._wait = inner, wait

    def service(self, handler_call_details: Any) -> Any:
        handler = self._inner.service(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        method = _waiting(handler.unary_stream or handler.unary_unary, self._wait)
        return make(method, handler.request_deserializer, handler.response_serializer)


def _waiting(
    method: Callable[[Any, Any], Awaitable[Any]], wait: _Wait
) -> Callable[[AsyncIterator[Any], Any], Awaitable[Any]]:
    async def answer(requests: AsyncIterator[Any], context: Any) -> Any:
        try:
            request = await wait.message(requests)
        except LpEdgeError as error:
            status, message, metadata = error_metadata(error)
            await context.abort(grpc.StatusCode[status], message, metadata)
        return await method(request, context)

    return answer


def unparsable() -> ProtocolError:
    """The error for bytes that are no message."""
    return ProtocolError(
        "a message that cannot be parsed",
        "expected one of the service's messages",
        "build the client from this server's .proto files",
    )
