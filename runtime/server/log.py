"""Structured logs: one line an event, as JSON or as key=value text; one line a stream.

What is logged are ids, counts, times, names of errors and addresses: never pixels, bytes of pictures, motion or tokens. An
error's message may quote what a client sent, so a stream's line names its class only; the client has the message.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TextIO

from lp_edge.errors import LpEdgeError

__all__ = ["FORMATS", "LEVELS", "StreamLog", "logging_to", "status_of"]

_LOG = logging.getLogger("lp_edge")

FORMATS: Final = ("json", "text")
LEVELS: Final = ("debug", "info", "warning", "error")

_LONGEST: Final = 16_000  # characters of one message or traceback


def status_of(error: BaseException | None) -> str:
    """Name of the gRPC status that a call ends with."""
    if error is None:
        return "OK"
    if isinstance(error, LpEdgeError):
        return error.grpc_status
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED"  # the client left, or the server cancelled the call
    return "INTERNAL"


@dataclass
class StreamLog:
    """What is said of a stream when it ends.

    Attributes:
        id: names the stream in messages to its client, too.
        kind: ``animate``, ``extract_motion``, ``render``, ``register`` or ``http``.
        peer: the client's address.
        portraits: how many portraits it animated.
        frames: frames answered.
        dropped: frames that gave way to newer ones.
        undecodable: frames whose picture could not be read.
    """

    id: str
    kind: str
    peer: str
    portraits: int = 0
    frames: int = 0
    dropped: int = 0
    undecodable: int = 0
    _began: float = field(default_factory=time.monotonic, repr=False)

    def end(self, error: BaseException | None = None) -> str:
        """Write the line; what is not an error of lp-edge comes with its traceback, as an error.

        Returns:
            Name of the gRPC status.
        """
        status = status_of(error)
        fields = {
            "id": self.id,
            "kind": self.kind,
            "peer": self.peer,
            "portraits": self.portraits,
            "frames": self.frames,
            "dropped": self.dropped,
            "undecodable": self.undecodable,
            "seconds": round(time.monotonic() - self._began, 3),
            "status": status,
        }
        if error is not None and status != "CANCELLED":
            fields["error"] = type(error).__name__
        unexpected = status == "INTERNAL"
        _LOG.log(
            logging.ERROR if unexpected else logging.INFO,
            "stream",
            extra={"fields": fields},
            exc_info=error if unexpected else None,
        )
        return status


def _fields(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, object]:
    """A record as a flat table: time, level, message, its own fields, traceback."""
    # Times as RFC 3339 in UTC: lines of several machines sort together.
    when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
    table: dict[str, object] = {
        "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "message": record.getMessage()[:_LONGEST],
    }
    own = getattr(record, "fields", None)
    if isinstance(own, dict):
        table.update(own)
    if not record.name.startswith("lp_edge"):
        table["logger"] = record.name
    if record.exc_info:
        table["traceback"] = formatter.formatException(record.exc_info)[-_LONGEST:]
    return table


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_fields(record, self), default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        table = _fields(record, self)
        head = f"{table.pop('time')} {str(table.pop('level')).upper()} {_line(str(table.pop('message')))}"
        return " ".join([head, *(f"{key}={_value(value)}" for key, value in table.items())])


def _line(text: str) -> str:
    """Without line breaks and control characters: nothing that is logged can forge a line."""
    return text if text.isprintable() else json.dumps(text)[1:-1]


def _value(value: object) -> str:
    text = str(value)
    return text if text and text.isprintable() and not set(' "=') & set(text) else json.dumps(text)


@contextlib.contextmanager
def logging_to(stream: TextIO, format: str = "text", level: str = "info") -> Iterator[None]:
    """Write all logs of the process to ``stream`` for the time of a ``with`` block.

    Args:
        stream: usually ``sys.stderr``.
        format: one of :data:`FORMATS`.
        level: one of :data:`LEVELS`; of lp-edge. Other libraries are heard from warnings on.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json() if format == "json" else _Text())
    root = logging.getLogger()
    before = _LOG.level
    root.addHandler(handler)
    _LOG.setLevel(level.upper())
    try:
        yield
    finally:
        root.removeHandler(handler)
        _LOG.setLevel(before)
