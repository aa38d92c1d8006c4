"""Which files beside an ONNX model hold its weights, read without the ``onnx`` package and without loading the model.

Large graphs keep their weights in one file beside (ONNX's *external data*), because ONNX Runtime maps such a file where it
would hold a second copy of weights that came inside the model. The model names the file; a model that names one elsewhere
would make a runtime read it, so names are looked at before.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

__all__ = ["external_files", "is_beside", "varint"]

# Messages of onnx.proto on the way to tensors: message -> field -> message in it.
_MESSAGES: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_BYTES: Final = (
    2  # protobuf's wire types: 0 varint, 1 eight bytes, 2 length and bytes, 3 and 4 groups, 5 four bytes
)
_FIXED: Final[Mapping[int, int]] = {1: 8, 3: 0, 4: 0, 5: 4}


def is_beside(name: str) -> bool:
    """Whether the name is a plain file name, which stays in the model's own folder."""
    return _PLAIN.fullmatch(name) is not None


def external_files(model: Path | bytes) -> tuple[str, ...]:
    """Names under which a model refers to files with its weights, sorted; none when it holds all of them.

    What is not an ONNX model gives none: whoever loads it says so. OSError as it comes.

    Example:
        >>> external_files(b"")
        ()
    """
    found: set[str] = set()
    with contextlib.ExitStack() as stack:
        if isinstance(model, Path):
            file = stack.enter_context(model.open("rb"))
            if model.stat().st_size == 0:
                return ()
            # Only the few pages around the fields are read, not the weights.
            data: bytes | mmap.mmap = stack.enter_context(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )
        else:
            data = model
        with contextlib.suppress(IndexError, RecursionError):  # cut off, or no protobuf at all
            _walk(data, 0, len(data), "model", found)
    return tuple(sorted(found))


def _walk(data: bytes | mmap.mmap, start: int, end: int, message: str, found: set[str]) -> None:
    if message == "entry":
        pair = {field: data[a:b] for field, a, b in _fields(data, start, end)}
        if pair.get(1) == b"location":
            found.add(pair.get(2, b"").decode("utf-8", "replace"))
        return
    inner = _MESSAGES[message]
    for field, a, b in _fields(data, start, end):
        if field in inner:
            _walk(data, a, b, inner[field], found)


def _fields(data: bytes | mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, begin and end of the fields that hold bytes; IndexError when the message is cut off."""
    while at < end:
        tag, at = varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = varint(data, at)
        elif kind == _BYTES:
            size, at = varint(data, at)
            if at + size > end:
                raise IndexError(at)
            yield tag >> 3, at, at + size
            at += size
        elif kind in _FIXED:
            # The fields of a group (an old form, not in onnx.proto) are taken for the message's own: none is overlooked.
            at += _FIXED[kind]
        else:
            raise IndexError(at)


def varint(data: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """A number of Protocol Buffers' variable length at ``at``, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError(at)
