"""Mutations of calls: of fields, of the order of messages, of bytes, of pictures, templates and clips."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from lp_edge.proto.v1 import animation_pb2, common_pb2
from lp_edge.tests.runtime.server.fuzz.cases import METHODS, Case, chunks, entry, face, media, npy, template

Mutation = Callable[[Case, random.Random, list[Case]], Case]

FLOATS = (
    float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, -0.0, 0.0, 1.0, -1.0, 1e6, 360.0, 1e30, 65504.0,
)  # fmt: skip
INTEGERS = (0, 1, 2, 15, 16, 63, 64, 65, 127, 8192, 8193, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
TEXTS = (
    "", "\0", "a\0b\n\r\t", "../../../../etc/passwd", "/dev/zero", "%s%n%x{0}", "\u202e\U0001f600", "ﷺ" * 50,
    "x" * 1_000_000, "smile", "Smile ", "yaw", "largest", "0,1,2", "-1", "9" * 500, "nod", "concat:/etc/passwd", "\ud7ff\ue000",
)  # fmt: skip


# -- fields --------------------------------------------------------------------------------------------------


def _text(rng: random.Random) -> str:
    return rng.choice(TEXTS)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes that were these."""
    way = rng.randrange(8)
    if way == 0:
        return b""
    if way == 1:
        return data[: rng.randrange(len(data) + 1)]
    if way == 2:
        return rng.randbytes(rng.randrange(300))
    if way == 3:
        return data + rng.randbytes(rng.randrange(1, 50))
    if way == 4:
        return picture(rng)
    return flip(data, rng)


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, mostly near the beginning, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if out:
            reach = len(out) if rng.random() < 0.5 else min(len(out), 64)
            out[rng.randrange(reach)] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))
    return bytes(out)


def _value(field: FieldDescriptor, old: Any, rng: random.Random) -> Any:
    """A hostile value for a field that is no message."""
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.type == field.TYPE_BOOL:
        return not old
    if field.type == field.TYPE_STRING:
        return _text(rng)
    if field.type == field.TYPE_BYTES:
        return _bytes(old or b"", rng)
    if field.type == field.TYPE_ENUM:
        return rng.choice((-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 99, 2**31 - 1, -(2**31)))
    if field.type == field.TYPE_UINT32:
        return rng.choice([n for n in INTEGERS if n < 2**32])
    if field.type == field.TYPE_INT32:
        return rng.choice((-(2**31), -1, 0, 1, 999_999_999, 2**31 - 1))
    if field.type == field.TYPE_UINT64:
        return rng.choice((*INTEGERS, 2**64 - 1))
    return rng.choice((*INTEGERS, -1, -(2**63)))  # int64


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated and field.message_type and field.message_type.GetOptions().map_entry)


def _messages(message: Message) -> list[Message]:
    """The message and all messages inside."""
    out = [message]
    for field, value in message.ListFields():
        if field.message_type is None or _is_map(field):
            continue
        for inner in value if field.is_repeated else (value,):
            out.extend(_messages(inner))
    return out


def _parsed(kind: type[Message], data: bytes) -> Message | None:
    """A message; None where its bytes were changed before."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def _change_field(message: Message, rng: random.Random) -> None:
    fields = message.DESCRIPTOR.fields
    present = [field for field, _ in message.ListFields()]
    if not fields:
        return
    field = rng.choice(present) if present and rng.random() < 0.7 else rng.choice(fields)
    value = getattr(message, field.name)
    if _is_map(field):
        if rng.random() < 0.3:
            for index in range(rng.choice((1, 50, 3000))):
                value[f"{_text(rng)[:40]}{index}"] = rng.choice(FLOATS)
        else:
            value[rng.choice(("smile", "yaw", "blink", "Smile", _text(rng)))] = rng.choice(FLOATS)
    elif field.is_repeated:
        way = rng.randrange(5)
        if way == 0:
            message.ClearField(field.name)
        elif way == 1 and len(value):
            value.extend(list(value) * rng.choice((1, 8, 200)))
        elif way == 2 and len(value):
            del value[rng.randrange(len(value))]
        elif field.message_type is not None:
            value.add()
        elif len(value) and way == 3:
            value[rng.randrange(len(value))] = _value(field, value[0], rng)
        else:
            value.extend([_value(field, None, rng) for _ in range(rng.choice((1, 3, 100)))])
    elif field.message_type is not None:
        if rng.random() < 0.4:
            message.ClearField(field.name)
        else:
            value.SetInParent()
            _change_field(value, rng)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(field, value, rng))


def fields(case: Case, rng: random.Random, seeds: list[Case]) -> Case:
    """Hostile values in one to three fields of one message."""
    if not case.messages:
        return case
    index = rng.randrange(len(case.messages))
    message = _parsed(METHODS[case.method][0], case.messages[index])
    if message is None:
        return case
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_field(rng.choice(_messages(message)), rng)
    changed = list(case.messages)
    changed[index] = message.SerializeToString(deterministic=True)
    return replace(case, messages=tuple(changed))


# -- messages ------------------------------------------------------------------------------------------------


def order(case: Case, rng: random.Random, seeds: list[Case]) -> Case:
    """Messages dropped, doubled, exchanged, or taken from another call."""
    if not METHODS[case.method][1]:
        return fields(case, rng, seeds)
    out = list(case.messages)
    for _ in range(rng.choice((1, 1, 2, 4))):
        way, at = rng.randrange(6), rng.randrange(len(out)) if out else 0
        if way == 0 and out:
            del out[at]
        elif way == 1 and out:
            out.insert(rng.randrange(len(out) + 1), out[at])
        elif way == 2 and len(out) > 1:
            other = rng.randrange(len(out))
            out[at], out[other] = out[other], out[at]
        elif way == 3:
            donor = rng.choice([s for s in seeds if METHODS[s.method][1]])
            out.insert(rng.randrange(len(out) + 1), rng.choice(donor.messages))
        elif way == 4:
            out.insert(rng.randrange(len(out) + 1), b"")
        else:
            out = out[: rng.randrange(len(out) + 1)]
    return replace(case, messages=tuple(out))


def unmapped(case: Case, rng: random.Random, seeds: list[Case]) -> Case:
    """Shared memory that is misused."""
    request = animation_pb2.AnimateRequest
    config = animation_pb2.AnimateConfig(
        portrait_ids=["PORTRAIT-PLACEHOLDER-0"] * rng.choice((1, 1, 2, 8)),
        mode=rng.choice((1, 2)),
        output=common_pb2.OutputOptions(encoding=rng.choice((6, 6, 4, 7)), width=rng.choice((0, 32, 200))),
    )
    if rng.random() < 0.9:
        slots = (0, 1, 2, 8, 64, 65, 2**32 - 1)
        sizes = (0, 1, 4096, 12288, 12289, 1 << 20, 2**40, 2**64 - 1)
        config.shared_memory.driving_slots = rng.choice(slots[:5] if rng.random() < 0.8 else slots)
        config.shared_memory.result_slots = rng.choice(slots[:5] if rng.random() < 0.8 else slots)
        config.shared_memory.driving_slot_bytes = rng.choice(sizes[2:6] if rng.random() < 0.8 else sizes)
        config.shared_memory.result_slot_bytes = rng.choice(sizes[2:6] if rng.random() < 0.8 else sizes)
    messages = [request(config=config)]
    if rng.random() < 0.7:
        messages.append(request(shared_memory_mapped=animation_pb2.SharedMemoryMapped()))
    for sequence in range(1, rng.choice((2, 4, 10, 90))):
        frame = animation_pb2.DrivingFrame(sequence=sequence, timestamp_us=sequence)
        if rng.random() < 0.7:
            side = rng.choice((16, 64, 64, 64, 63, 65, 15, 0, 2**32 - 1))
            frame.image.shared.slot = rng.choice((0, 1, 1, sequence % 8, 64, 2**32 - 1))
            frame.image.shared.width = frame.image.shared.height = side
            frame.image.shared.format = rng.choice((0, 1, 2, 9))
        else:
            frame.image.raw.width = frame.image.raw.height = 64
            frame.image.raw.data = face().tobytes()
        messages.append(request(frame=frame, results_taken=rng.choice((0, 0, 0, 1, sequence, 2**64 - 1))))
    return replace(
        case,
        method="AnimationService/Animate",
        messages=tuple(m.SerializeToString() for m in messages),
    )


# -- bytes ---------------------------------------------------------------------------------------------------


def wire(case: Case, rng: random.Random, seeds: list[Case]) -> Case:
    """A message whose encoding is changed: bits, length, unknown fields, nonsense."""
    out = list(case.messages) or [b""]
    at = rng.randrange(len(out))
    data, way = out[at], rng.randrange(7)
    if way == 0:
        out[at] = rng.randbytes(rng.randrange(200))
    elif way == 1:
        out[at] = data[: rng.randrange(len(data) + 1)]
    elif way == 2:  # fields that this version does not know: 1000, 536870911
        out[at] = data + rng.choice((b"\xc2\x3e\x05hello", b"\xfa\xff\xff\xff\x0f\x01x", b"\xc0\x3e\x07"))
    elif way == 3:  # a varint that never ends; a length beyond the message; an unknown wire type
        out[at] = data + rng.choice(
            (b"\x08" + b"\xff" * 11, b"\x0a\xff\xff\xff\xff\x07ab", b"\x0f\x00", b"\x0c")
        )
    elif way == 4:  # groups and messages in messages, deeper than parsers go
        depth = rng.choice((10, 99, 101, 5000))
        out[at] = data + (b"\x0b" * depth if rng.random() < 0.5 else _nested(depth))
    elif way == 5:  # a text that is no UTF-8
        out[at] = data + b"\x0a\x04\xff\xfe\xc0\x80"
    else:
        out[at] = flip(data, rng)
    return replace(case, messages=tuple(out))


def _nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = b"\x0a" + _varint(len(data)) + data
        if len(data) > 40_000:
            break
    return data


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


# -- pictures ------------------------------------------------------------------------------------------------


@lru_cache
def _png(width: int, height: int, *, kind: int = 2, rows: int | None = None, extra: bytes = b"") -> bytes:
    """A PNG whose header says anything; with ``rows`` of black behind it."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}.get(kind, 1)
    packer = zlib.compressobj(9)
    body = b"".join(
        packer.compress(bytes(1 + min(width, 20_000) * channels)) for _ in range(rows or min(height, 64))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", header)
        + extra
        + part(b"IDAT", body + packer.flush())
        + part(b"IEND", b"")
    )


def _jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG with another size in its frame header."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data if at < 0 else data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def picture(rng: random.Random) -> bytes:
    """A hostile picture."""
    jpeg, png, webp = (rng.choice(media(suffix)) for suffix in (".jpg", ".png", ".webp"))
    side = rng.choice((0, 1, 15, 16, 17, 4096, 65535, 2**31 - 1, 2**32 - 1))
    actl = b"\0\0\0\x08acTL\0\0\0\x02\0\0\0\0" + struct.pack(">I", zlib.crc32(b"acTL\0\0\0\x02\0\0\0\0"))
    makers: list[Callable[[], bytes]] = [
        lambda: _png(side, rng.choice((side, 16))),
        lambda: _png(1900, 1900, rows=1900),  # 3.6 megapixels in 11 kB
        lambda: _png(16, 16, kind=rng.choice((0, 2, 3, 4, 5, 6, 9))),
        lambda: _png(64, 64, extra=actl),
        lambda: _jpeg_size(jpeg, min(side, 65535), rng.choice((1, 64, 65535))),
        lambda: jpeg[:2] + b"\xff\xe1\x00\x40Exif\0\0" + rng.randbytes(58) + jpeg[2:],
        lambda: (
            jpeg[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * rng.choice((3, 70, 2000)) + b"\xff\xd9"
        ),
        lambda: jpeg + jpeg,
        lambda: webp[:20] + rng.randbytes(10) + webp[30:],
        lambda: (
            b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\0\0\0"
            + rng.choice((b"\x02", b"\x10"))
            + b"\0\0\0"
            + b"\xff" * 6
        ),
        lambda: b"BM" + rng.randbytes(52),
        lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + rng.randbytes(30),
        lambda: b"II*\0\x08\0\0\0" + rng.randbytes(60),
        lambda: b"\x76\x2f\x31\x01" + rng.randbytes(60),  # OpenEXR
        lambda: b"P6\n65535 65535\n255\n",
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    ]
    made = rng.choice(makers)() if rng.random() < 0.6 else rng.choice((jpeg, png, webp))
    return (
        made
        if rng.random() < 0.5
        else (flip(made, rng) if rng.random() < 0.7 else made[: rng.randrange(len(made) + 1)])
    )


def pictures(case: Case, rng: random.Random, seeds: list[Case]) -> Case:
    """A hostile picture in place of one that was fine."""
    kind, out = METHODS[case.method][0], list(case.messages)
    for index in rng.sample(range(len(out)), len(out)):
        message = _parsed(kind, out[index])
        holders = (
            [m for m in _messages(message) if isinstance(m, common_pb2.Image)] if message is not None else []
        )
        if message is not None and holders:
            image = rng.choice(holders)
            if rng.random() < 0.8:
                image.encoded.data = picture(rng)
            else:
                image.raw.width, image.raw.height = (rng.choice(INTEGERS[:-1]) for _ in range(2))
                image.raw.data = rng.randbytes(rng.choice((0, 1, 768, 12288)))
            out[index] = message.SerializeToString(deterministic=True)
            return replace(case, messages=tuple(out))
    return fields(case, rng, seeds)


# -- templates and clips -------------------------------------------------------------------------------------


class _Runs:
    """Pickles into a call."""

    def __init__(self, call: str, *args: object) -> None:
        self._call, self._args = call, args

    def __reduce__(self) -> Any:
        module, _, name = self._call.rpartition(".")
        return getattr(__import__(module, fromlist=[name]), name), self._args


MARKER = "LP_EDGE_FUZZ_EXECUTED"
"""Name of a file, in the server's folder for temporary files, that a pickle would make if it were executed."""


def hostile_pickle(rng: random.Random, marker: str = MARKER) -> bytes:
    """A pickle that would run something, or build something huge."""
    command = f"touch ${{TMPDIR:-/tmp}}/{marker}"
    motion = {
        "scale": np.ones((1, 1), np.float32),
        "R": np.eye(3)[None],
        "exp": np.zeros((1, 21, 3)),
        "t": np.zeros((1, 3)),
    }
    body = {
        "n_frames": 2,
        "output_fps": 25,
        "motion": [motion] * 2,
        "c_eyes_lst": [np.ones((1, 2))] * 2,
        "c_lip_lst": [np.ones(1)] * 2,
    }
    depth = rng.choice((50, 900, 100_000))
    laughs: Any = ["ha"] * 10
    for _ in range(12):
        laughs = [laughs] * 10
    makers: list[Callable[[], bytes]] = [
        lambda: pickle.dumps(_Runs("os.system", command)),
        lambda: pickle.dumps({**body, "motion": _Runs("os.system", command)}),
        lambda: pickle.dumps(_Runs("subprocess.getoutput", command)),
        lambda: pickle.dumps(_Runs("builtins.exec", f"import os; os.system({command!r})")),
        lambda: b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        lambda: b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".",
        lambda: pickle.dumps({**body, "motion": laughs}),
        lambda: b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",  # BINBYTES8 of 2^63 bytes
        lambda: b"\x80\x04]" + b"\x94h\x00" * 5000 + b".",
        lambda: b"\x80\x02" + b"(" * 100_000 + b".",
        lambda: b"\x80\x02" + b"J\0\0\0\0" + b"2" * 200_000 + b".",
        lambda: pickle.dumps({**body, "n_frames": rng.choice((-1, 0, 10**30, float("nan")))}),
        lambda: pickle.dumps({**body, "output_fps": rng.choice((0, -1, float("inf"), "25", None))}),
        lambda: pickle.dumps({**body, "motion": [{**motion, "R": np.full((1, 3, 3), np.nan)}] * 2}),
        lambda: pickle.dumps({**body, "motion": [{**motion, "exp": np.full((1, 21, 3), 1e300)}] * 2}),
        lambda: pickle.dumps(body, protocol=rng.randrange(6)),
    ]
    made = rng.choice(makers)()
    return made if rng.random() < 0.7 else flip(made, rng)


@lru_cache
def _bomb(name: str) -> bytes:
    """An archive of 40 kB with 40 MiB in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(entry(f"{name}.npy"), bytes(40 << 20))
    return out.getvalue()


@lru_cache
def _crowd() -> bytes:
    """An archive with very many files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for index in range(3000):
            archive.writestr(entry(f"../../{index}.npy"), b"")
    return out.getvalue()


def hostile_template(rng: random.Random) -> bytes:
    """A template that is none, or would be too much."""
    name = rng.choice(("rotation", "translation", "scale", "expression", "eye_ratio", "lip_ratio"))
    good = {
        "rotation": (3, 3, 3),
        "translation": (3, 3),
        "scale": (3,),
        "expression": (3, 478, 3),
        "eye_ratio": (3, 2),
        "lip_ratio": (3,),
    }
    shape = good[name]

    def claims(claimed: tuple[int, ...], dtype: str = "<f4") -> bytes:
        head = repr({"descr": dtype, "fortran_order": False, "shape": claimed}).encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + b"\n" + bytes(100)

    header = {"schema": 1, "family": "mesh", "fps": [25, 1], "neutral": 0, "source": "", "meta": {}}
    header[rng.choice(list(header))] = rng.choice(
        (
            None,
            -1,
            99,
            [0, 0],
            [1, 0],
            [10**30, 1],
            "x" * 70_000,
            {},
            [],
            "liveportrait",
            {"a": "b" * 9000},
            float("nan"),
        )
    )

    makers: list[Callable[[], bytes]] = [
        lambda: template(**{name: np.full(shape, rng.choice(FLOATS), np.float32)}),
        lambda: template(**{name: np.zeros(shape[:-1], np.float32)}),
        lambda: template(**{name: np.zeros((*shape, 2), np.float32)}),
        lambda: template(**{name: np.zeros((0, *shape[1:]), np.float32)}),
        lambda: template(**{name: np.zeros(shape, rng.choice(("O", "c8", "U3", "M8[s]", "?", "V4")))}),
        lambda: template(**{name: npy(np.array([_Runs("os.system", f"touch ${{TMPDIR:-/tmp}}/{MARKER}")]))}),
        lambda: template(**{name: claims(rng.choice(((2**40,), (2**62, 4), (-1,), (10**30,), (3, 2**31))))}),
        lambda: template(**{name: claims(shape, rng.choice(("|O", "<f999", "<U99999999", "[('a','<f4')]")))}),
        lambda: template(header=np.array(json.dumps(header))),
        lambda: template(header=np.array(rng.choice(("", "{", "[" * 5000, "null", "\0")))),
        lambda: template(header=np.array([json.dumps(header)] * 2)),
        lambda: template(rng.choice(("liveportrait", "mesh")), frames=rng.choice((1, 3, 30))),
        lambda: _bomb(name),
        _crowd,
        lambda: hostile_pickle(rng),
    ]
    made = rng.choice(makers)()
    return (
        made
        if rng.random() < 0.6
        else (flip(made, rng) if rng.random() < 0.7 else made[: rng.randrange(len(made) + 1)])
    )


def hostile_clip(rng: random.Random) -> bytes:
    """A clip that is broken, is none, or names other files."""
    makers: list[Callable[[], bytes]] = [
        lambda: flip(rng.choice(media(".m4v")), rng),
        lambda: flip(flip(rng.choice(media(".m4v")), rng), rng),
        lambda: rng.choice(media(".m4v"))[: rng.randrange(4000)],
        lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        lambda: b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        lambda: (
            b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>file:///etc/</BaseURL></MPD>"
        ),
        lambda: b"\x1aE\xdf\xa3" + rng.randbytes(300),
        lambda: b"RIFF\xff\xff\xff\x7fAVI LIST" + rng.randbytes(300),
        lambda: b"YUV4MPEG2 W100000 H100000 F25:1 Ip C420jpeg\nFRAME\n",
        lambda: b"\0\0\0\x01gB\0\x0a" + rng.randbytes(200),
        lambda: picture(rng),
        lambda: template(),
        lambda: hostile_pickle(rng),
    ]
    return rng.choice(makers)()


def uploads(case: Case, rng: random.Random, seeds: list[Case]) -> Case:
    """A hostile template or clip for Render or ExtractMotion, in pieces."""
    data = rng.choice((hostile_template, hostile_clip, hostile_template))(rng)
    pieces = chunks(data, rng.choice((1, 1, 3, 20)))
    messages: list[Message]
    if rng.random() < 0.25:
        extracting = animation_pb2.ExtractMotionConfig(
            input=animation_pb2.MOTION_INPUT_CLIP,
            output=rng.choice((1, 2)),
            neutral_frame=rng.choice((0, 0, 1, 2**32 - 1)),
        )
        extract = animation_pb2.ExtractMotionRequest
        messages = [extract(config=extracting), *(extract(clip_chunk=c) for c in pieces)]
        method = "AnimationService/ExtractMotion"
    else:
        rendering = animation_pb2.RenderConfig(
            portrait_id="PORTRAIT-PLACEHOLDER-0",
            upload=rng.choice((1, 1, 1, 2, 2, 0, 9)),
            result=rng.choice((0, 1, 2)),
            output=common_pb2.OutputOptions(width=rng.choice((0, 32)), encoding=rng.choice((0, 4, 5, 7))),
            neutral_frame=rng.choice((0, 0, 0, 1, 2**32 - 1)),
        )
        render = animation_pb2.RenderRequest
        messages = [render(config=rendering), *(render(upload_chunk=c) for c in pieces)]
        method = "AnimationService/Render"
    return replace(case, method=method, messages=tuple(m.SerializeToString() for m in messages))


# -- all of them ---------------------------------------------------------------------------------------------

_WEIGHTS: dict[Mutation, int] = {fields: 34, pictures: 18, order: 14, wire: 12, uploads: 14, unmapped: 8}


def mutate(seed: int, index: int, seeds: list[Case]) -> Case:
    """The call of that index in the campaign of that seed; always the same."""
    rng = random.Random(f"{seed}:{index}")
    # by method, so that those with few valid calls get their share
    method = rng.choices(list(METHODS), (4, 1, 2, 1, 10, 4, 5))[0]
    case = rng.choice([s for s in seeds if s.method == method])
    names = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        mutation = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        case = mutation(case, rng, seeds)
        names.append(mutation.__name__)
    end = rng.choices(("close", "hold", "cancel", "vanish"), (875, 5, 80, 40))[0]
    return replace(
        case, end=end if METHODS[case.method][1] else "close", note=f"{seed}:{index} {'+'.join(names)}"
    )
