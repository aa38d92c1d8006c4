"""Spans of streams: a parent from the call's headers, attributes, errors by class, and nothing where the API is missing."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from lp_edge.errors import NotFoundError
from lp_edge.runtime.server import tracing

trace = pytest.importorskip("opentelemetry.trace")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Span(trace.NonRecordingSpan):
    def __init__(self, name: str, parent: Any, kind: Any) -> None:
        super().__init__(trace.INVALID_SPAN_CONTEXT)
        self.name, self.parent, self.kind = name, trace.get_current_span(parent).get_span_context(), kind
        self.attributes: dict[str, Any] = {}
        self.status: Any = None
        self.ended = 0

    def set_attribute(self, key: str, value: Any) -> None:
        self.attributes[key] = value

    def set_attributes(self, attributes: Any) -> None:
        self.attributes.update(attributes)

    def set_status(self, status: Any, description: str | None = None) -> None:
        self.status = (status, description)

    def end(self, end_time: int | None = None) -> None:
        self.ended += 1


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    made: list[Span] = []

    class Tracer:
        def start_span(self, name: str, context: Any, kind: Any) -> Span:
            made.append(Span(name, context, kind))
            return made[-1]

    monkeypatch.setattr(trace, "get_tracer", lambda name: Tracer())
    return made


def test_a_stream_is_a_span_below_its_clients(spans: list[Span]) -> None:
    with tracing.stream_span("animate", "ab12", {"traceparent": PARENT}) as tell:
        assert not spans[0].ended
        tell({"frames": 3, "status": "OK"})
    [span] = spans
    assert (span.name, span.kind, span.ended, span.status) == (
        "lp_edge.animate",
        trace.SpanKind.SERVER,
        1,
        None,
    )
    assert f"{span.parent.trace_id:032x}" == PARENT.split("-")[1]
    assert span.attributes == {"lp_edge.stream_id": "ab12", "lp_edge.frames": 3, "lp_edge.status": "OK"}


def test_an_error_is_the_spans_status_without_its_text(spans: list[Span]) -> None:
    with pytest.raises(NotFoundError), tracing.stream_span("render", "x", {}):
        raise NotFoundError("no portrait secret")
    assert (spans[0].status, spans[0].ended) == ((trace.StatusCode.ERROR, "NotFoundError"), 1)
    assert not spans[0].parent.is_valid


def test_without_the_api_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with tracing.stream_span("animate", "x", {}) as tell:
        tell({"frames": 1})
