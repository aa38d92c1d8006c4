"""OpenTelemetry: one span a stream, where ``opentelemetry-api`` is installed.

The API without an SDK does nothing, so nothing has to be switched on or off here: run the server with
``opentelemetry-instrument lp-serve`` (packages ``opentelemetry-distro`` and an exporter), and its spans go where that says. A
client's ``traceparent`` header (W3C Trace Context) makes its span the parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

__all__ = ["stream_span"]

Tell = Callable[[Mapping[str, str | int]], None]


def _api() -> tuple[ModuleType, ModuleType] | None:
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        return None
    return trace, propagate


@contextmanager
def stream_span(kind: str, stream_id: str, headers: Mapping[str, str]) -> Iterator[Tell]:
    """A span for the length of a ``with`` block; an error that leaves it is its status.

    Args:
        kind: of the stream; the span is called ``lp_edge.<kind>``.
        stream_id: as in the logs.
        headers: of the call, in lower case.

    Yields:
        Adds attributes, for instance ``{"frames": 120}``, which the span carries as ``lp_edge.frames``.
    """
    if (api := _api()) is None:
        yield lambda _: None
        return
    trace, propagate = api
    # Not the current span: a stream's block may be left in another context than it was entered in.
    span = trace.get_tracer("lp_edge").start_span(
        f"lp_edge.{kind}", context=propagate.extract(headers), kind=trace.SpanKind.SERVER
    )
    span.set_attribute("lp_edge.stream_id", stream_id)
    try:
        yield lambda attributes: span.set_attributes({f"lp_edge.{k}": v for k, v in attributes.items()})
    except Exception as error:
        span.set_status(trace.StatusCode.ERROR, type(error).__name__)  # its text may quote the client
        raise
    finally:
        span.end()
