"""The logs: one line an event that machines can read, whatever is in it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from typing import Any

import pytest

from lp_edge.errors import LimitError, MediaError, NoFaceError
from lp_edge.runtime.server.log import StreamLog, logging_to, status_of

LOG = logging.getLogger("lp_edge")


def lines(format: str, level: str, *records: Any) -> list[str]:
    """What these calls write."""
    out = io.StringIO()
    with logging_to(out, format, level):
        for record in records:
            record()
    return out.getvalue().splitlines()


def test_a_stream_is_one_line() -> None:
    stream = StreamLog(id="0a1b", kind="animate", peer="ipv4:127.0.0.1:4711", portraits=1)
    stream.frames, stream.dropped = 250, 3
    (line,) = lines("json", "info", stream.end)
    entry = json.loads(line)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert 0 <= entry.pop("seconds") < 60
    assert entry == {
        "level": "info",
        "message": "stream",
        "id": "0a1b",
        "kind": "animate",
        "peer": "ipv4:127.0.0.1:4711",
        "portraits": 1,
        "frames": 250,
        "dropped": 3,
        "undecodable": 0,
        "status": "OK",
    }
    (line,) = lines("text", "info", stream.end)
    assert re.match(
        r"\S+Z INFO stream id=0a1b kind=animate peer=ipv4:127.0.0.1:4711 portraits=1 frames=250 ", line
    )
    assert line.endswith(" status=OK")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "OK"),
        (NoFaceError("x"), "FAILED_PRECONDITION"),
        (LimitError("x", retry_after_s=1), "RESOURCE_EXHAUSTED"),
        (MediaError("x"), "INVALID_ARGUMENT"),
        (asyncio.CancelledError(), "CANCELLED"),
        (GeneratorExit(), "CANCELLED"),
        (ZeroDivisionError("x"), "INTERNAL"),
    ],
)
def test_how_streams_end(error: BaseException | None, status: str) -> None:
    assert status_of(error) == status
    (line,) = lines("json", "info", lambda: StreamLog(id="1", kind="render", peer="p").end(error))
    entry = json.loads(line)
    assert entry["status"] == status
    assert entry.get("error") == (None if status in ("OK", "CANCELLED") else type(error).__name__)
    assert entry["level"] == ("error" if status == "INTERNAL" else "info")


def test_what_a_client_sent_is_not_in_the_line() -> None:
    error = MediaError("picture b'\\xff\\xd8secret'", "expected JPEG", "send one")
    (line,) = lines("text", "debug", lambda: StreamLog(id="1", kind="animate", peer="p").end(error))
    assert "secret" not in line and "error=MediaError" in line


@pytest.mark.parametrize("format", ["json", "text"])
def test_an_unexpected_error_has_its_traceback_in_the_same_line(format: str) -> None:
    def fail() -> None:
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError as error:
            StreamLog(id="1", kind="animate", peer="p").end(error)

    (line,) = lines(format, "error", fail)
    assert "ZeroDivisionError: division by zero" in line and "test_log.py" in line


@pytest.mark.parametrize("format", ["json", "text"])
def test_nothing_forges_a_line(format: str) -> None:
    evil = 'x\n2026-01-01T00:00:00.000Z INFO stream status="OK"\x1b[2J\u2028'
    (line,) = lines(
        format,
        "info",
        lambda: LOG.info("got %s", evil, extra={"fields": {"peer": evil, "empty": "", "n": 3}}),
    )
    assert line.isprintable()
    if format == "json":
        assert json.loads(line)["peer"] == evil
    else:
        assert line.endswith(' empty="" n=3')


def test_levels_and_other_libraries() -> None:
    other = logging.getLogger("uvicorn.error")
    records = (
        lambda: LOG.debug("a"),
        lambda: LOG.info("b"),
        lambda: LOG.warning("c"),
        lambda: other.info("d"),
        lambda: other.warning("e"),
    )
    found = {
        level: [x["message"] for x in map(json.loads, lines("json", level, *records))]
        for level in ("debug", "error")
    }
    assert found == {"debug": ["a", "b", "c", "e"], "error": ["e"]}
    assert json.loads(lines("json", "info", records[-1])[0])["logger"] == "uvicorn.error"
    assert LOG.level == logging.NOTSET
