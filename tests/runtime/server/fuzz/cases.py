"""What the fuzzer sends: calls as raw bytes, in memory and in files, and valid ones to begin with."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import Message

from lp_edge.proto.v1 import animation_pb2, common_pb2, portraits_pb2, server_pb2

CORPUS = Path(__file__).resolve().parent / "corpus"
PORTRAIT = "PORTRAIT-PLACEHOLDER-0"
"""Stands for the id of a portrait that the server has; as long as one, so that bytes can be exchanged."""
DOOMED = "PORTRAIT-PLACEHOLDER-1"
"""The same, for one that may be deleted."""

METHODS: dict[str, tuple[type[Message], bool]] = {
    "PortraitService/RegisterPortrait": (portraits_pb2.RegisterPortraitRequest, False),
    "PortraitService/ListPortraits": (portraits_pb2.ListPortraitsRequest, False),
    "PortraitService/DeletePortrait": (portraits_pb2.DeletePortraitRequest, False),
    "ServerService/GetServerInfo": (server_pb2.GetServerInfoRequest, False),
    "AnimationService/Animate": (animation_pb2.AnimateRequest, True),
    "AnimationService/ExtractMotion": (animation_pb2.ExtractMotionRequest, True),
    "AnimationService/Render": (animation_pb2.RenderRequest, True),
}
"""Method → class of its requests, and whether there may be several of them."""


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        method: key of :data:`METHODS`.
        messages: what is sent, as bytes.
        end: ``close`` the sending side and read to the end; ``hold`` it open; ``cancel`` after the first answer; ``vanish``: cancel
            without reading.
        note: how it was made.
    """

    method: str
    messages: tuple[bytes, ...]
    end: str = "close"
    note: str = ""

    def parsed(self) -> bool:
        """Whether all messages can be parsed at all."""
        try:
            for data in self.messages:
                METHODS[self.method][0].FromString(data)
        except Exception:  # noqa: BLE001 - DecodeError, and whatever else a parser throws
            return False
        return True

    def dump(self) -> bytes:
        """As a file: a line of JSON, then each message after its length (4 bytes, big-endian)."""
        head = json.dumps({"method": self.method, "end": self.end, "note": self.note})
        return head.encode() + b"\n" + b"".join(struct.pack(">I", len(m)) + m for m in self.messages)

    @classmethod
    def load(cls, data: bytes) -> Case:
        """What :meth:`dump` has written."""
        head, _, rest = data.partition(b"\n")
        messages = []
        while rest:
            (size,) = struct.unpack_from(">I", rest)
            messages.append(rest[4 : 4 + size])
            rest = rest[4 + size :]
        return cls(messages=tuple(messages), **json.loads(head))


def regressions(folder: Path = CORPUS) -> Iterator[tuple[str, Case]]:
    """Calls in files, by name."""
    for path in sorted(folder.glob("*.case")):
        yield path.name, Case.load(path.read_bytes())


@lru_cache
def media(suffix: str) -> tuple[bytes, ...]:
    """Files of the corpus with a suffix."""
    return tuple(path.read_bytes() for path in sorted(CORPUS.glob(f"*{suffix}")))


def image(data: bytes) -> common_pb2.Image:
    """A picture's file as a message."""
    return common_pb2.Image(encoded=common_pb2.EncodedImage(data=data))


def face(side: int = 64) -> np.ndarray:
    """A picture that shows a face to the toy networks."""
    out = np.zeros((side, side, 3), np.uint8)
    out[side // 4 : side * 3 // 4, side // 4 : side * 3 // 4] = 255
    return out


def raw(rgb: np.ndarray) -> common_pb2.Image:
    """A picture as plain pixels."""
    return common_pb2.Image(
        raw=common_pb2.RawImage(width=rgb.shape[1], height=rgb.shape[0], data=rgb.tobytes())
    )


def motion(size: int) -> common_pb2.Motion:
    """A motion with ``size`` numbers of expression."""
    return common_pb2.Motion(
        yaw=10.0,
        translation=[32.0, 32.0, 0.0],
        scale=20.0,
        expression=[0.1] * size,
        left_eye_ratio=0.3,
        right_eye_ratio=0.3,
        lip_ratio=0.1,
    )


def template(family: str = "mesh", frames: int = 3, **arrays: Any) -> bytes:
    """A motion template's file; ``arrays`` replace its own."""
    keypoints = 478 if family == "mesh" else 21
    header = {"schema": 1, "family": family, "fps": [25, 1], "neutral": 0, "source": "", "meta": {}}
    parts = {
        "header": np.array(json.dumps(header)),
        "rotation": np.tile(np.eye(3, dtype=np.float32), (frames, 1, 1)),
        "translation": np.full((frames, 3), 30.0, np.float32),
        "scale": np.full(frames, 20.0, np.float32),
        "expression": np.zeros((frames, keypoints, 3), np.float16),
        "eye_ratio": np.full((frames, 2), 0.3, np.float32),
        "lip_ratio": np.full(frames, 0.1, np.float32),
        **arrays,
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in parts.items():
            data = value if isinstance(value, bytes) else npy(value)
            archive.writestr(entry(f"{name}.npy"), data)
    return out.getvalue()


def entry(name: str) -> zipfile.ZipInfo:
    """A file in an archive, compressed, always of the same age."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def npy(array: np.ndarray) -> bytes:
    """An array's file."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def chunks(data: bytes, count: int) -> list[bytes]:
    """A file's bytes in pieces."""
    size = max(1, -(-len(data) // count))
    return [data[i : i + size] for i in range(0, len(data), size)] or [b""]


def seeds(expression: int) -> list[Case]:
    """Valid calls, all kinds of each method.

    Args:
        expression: numbers of expression in the server's own layout.
    """
    animate, extract, render = (
        animation_pb2.AnimateRequest,
        animation_pb2.ExtractMotionRequest,
        animation_pb2.RenderRequest,
    )
    pictures = [image(data) for s in (".jpg", ".png", ".webp") for data in media(s)] + [raw(face())]
    found: list[tuple[str, list[Message]]] = []

    def add(method: str, *messages: Message) -> None:
        found.append((method, list(messages)))

    def frames(make: Any, drivers: list[dict[str, Any]]) -> list[Message]:
        return [
            make(frame=animation_pb2.DrivingFrame(sequence=i + 1, timestamp_us=i * 40_000, **driver))
            for i, driver in enumerate(drivers)
        ]

    for picture in pictures:
        request = portraits_pb2.RegisterPortraitRequest(image=picture, thumbnail_side=32)
        request.options.faces, request.options.size = "largest", 256
        request.time_to_live.seconds = 60
        add("PortraitService/RegisterPortrait", request)
    add("PortraitService/ListPortraits", portraits_pb2.ListPortraitsRequest())
    add("PortraitService/DeletePortrait", portraits_pb2.DeletePortraitRequest(id=DOOMED))
    add("ServerService/GetServerInfo", server_pb2.GetServerInfoRequest())

    options = common_pb2.AnimationOptions(
        region=common_pb2.REGION_ALL,
        multiplier=1.2,
        relative=True,
        smooth=True,
        paste_back=True,
        edits={"smile": 0.3, "yaw": 5.0},
    )
    shared = animation_pb2.SharedMemoryRequest(
        driving_slots=2, driving_slot_bytes=12288, result_slots=2, result_slot_bytes=12288
    )
    for encoding in common_pb2.OutputEncoding.values():
        config = animation_pb2.AnimateConfig(
            portrait_ids=[PORTRAIT],
            options=options,
            mode=animation_pb2.STREAM_MODE_LOSSLESS if encoding % 2 else animation_pb2.STREAM_MODE_LIVE,
            output=common_pb2.OutputOptions(encoding=encoding, width=48, quality=80),
            with_motion=True,
        )
        middle: list[Message] = [
            animate(options=options),
            animate(set_neutral=animation_pb2.SetNeutral(motion=motion(expression))),
        ]
        pixels = frames(animate, [{"image": picture} for picture in pictures])
        if encoding == common_pb2.OUTPUT_ENCODING_SHARED_MEMORY:
            config.shared_memory.CopyFrom(shared)
            middle = [animate(shared_memory_mapped=animation_pb2.SharedMemoryMapped())]
            slots = [
                {"image": common_pb2.Image(shared={"slot": i % 2, "width": 64, "height": 64})} for i in (0, 1)
            ]
            pixels = frames(animate, slots)
        add("AnimationService/Animate", animate(config=config), *middle, *pixels)
    moving = animation_pb2.AnimateConfig(portrait_ids=[PORTRAIT, PORTRAIT], neutral=motion(expression))
    add(
        "AnimationService/Animate",
        animate(config=moving),
        *frames(animate, [{"motion": motion(expression)}] * 3),
    )

    for output in animation_pb2.MotionOutput.values():
        extracting = animation_pb2.ExtractMotionConfig(
            output=output, frame_rate=common_pb2.FrameRate(numerator=25, denominator=1)
        )
        add(
            "AnimationService/ExtractMotion",
            extract(config=extracting),
            *frames(extract, [{"image": picture} for picture in pictures]),
        )
        clip = animation_pb2.ExtractMotionConfig(output=output, input=animation_pb2.MOTION_INPUT_CLIP)
        for data in (*media(".m4v"), *media(".png")):
            add(
                "AnimationService/ExtractMotion",
                extract(config=clip),
                *(extract(clip_chunk=c) for c in chunks(data, 3)),
            )
    uploads = [(animation_pb2.UPLOAD_KIND_TEMPLATE, data) for data in (template(), *media(".pkl"))]
    uploads += [(animation_pb2.UPLOAD_KIND_CLIP, data) for data in (*media(".m4v"), *media(".jpg"))]
    for index, (kind, data) in enumerate(uploads):
        config = animation_pb2.RenderConfig(
            portrait_id=PORTRAIT,
            upload=kind,
            result=animation_pb2.RENDER_OUTPUT_MP4 if index % 2 else animation_pb2.RENDER_OUTPUT_FRAMES,
            output=common_pb2.OutputOptions(width=48),
        )
        add(
            "AnimationService/Render",
            render(config=config),
            *(render(upload_chunk=c) for c in chunks(data, 3)),
        )
    add(
        "AnimationService/Render",
        render(config=animation_pb2.RenderConfig(portrait_id=PORTRAIT, built_in="nod")),
    )
    return [
        Case(method, tuple(m.SerializeToString(deterministic=True) for m in messages), note="valid")
        for method, messages in found
    ]


def with_ids(case: Case, portrait: str, doomed: str) -> Case:
    """The call with the ids of portraits that are there."""
    messages = tuple(
        m.replace(PORTRAIT.encode(), portrait.encode()).replace(DOOMED.encode(), doomed.encode())
        for m in case.messages
    )
    return replace(case, messages=messages)
