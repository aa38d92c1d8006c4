"""The generated code against the image of what clients use (proto/image.binpb), without any tool: nothing gone, nothing changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

import lp_edge

pytest.importorskip("google.protobuf")

from google.protobuf import descriptor_pb2

IMAGE = Path(lp_edge.__file__).resolve().parent / "proto" / "image.binpb"
MODULES = ("common", "portraits", "animation", "server")


def facts(files: Iterable[descriptor_pb2.FileDescriptorProto]) -> dict[str, str]:
    """What clients depend on: name → number, type, cardinality of every field, and so on."""

    def of_message(prefix: str, message: descriptor_pb2.DescriptorProto) -> Iterator[tuple[str, str]]:
        name = f"{prefix}.{message.name}"
        yield name, "message"
        for field in message.field:
            oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            kind = f"{field.number} {field.label} {field.type} {field.type_name} {oneof}"
            yield f"{name}.{field.name}", kind
        for nested in message.nested_type:
            yield from of_message(name, nested)

    def of_file(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, str]]:
        for message in file.message_type:
            yield from of_message(file.package, message)
        for enum in file.enum_type:
            for value in enum.value:
                yield f"{file.package}.{enum.name}.{value.name}", str(value.number)
        for service in file.service:
            for method in service.method:
                kind = f"{method.input_type} {method.client_streaming} {method.output_type} {method.server_streaming}"
                yield f"{file.package}.{service.name}.{method.name}", kind

    return {name: kind for file in files for name, kind in of_file(file)}


def generated() -> list[descriptor_pb2.FileDescriptorProto]:
    """The files as the generated code holds them."""
    files = []
    for name in MODULES:
        file = descriptor_pb2.FileDescriptorProto()
        import_module(f"lp_edge.proto.v1.{name}_pb2").DESCRIPTOR.CopyToProto(file)
        files.append(file)
    return files


def released() -> list[descriptor_pb2.FileDescriptorProto]:
    """The files as the image holds them."""
    if not IMAGE.is_file():
        pytest.skip("no source tree: lp_edge is installed from a wheel")
    files = descriptor_pb2.FileDescriptorSet.FromString(IMAGE.read_bytes()).file
    return [file for file in files if file.package == "lp_edge.v1"]


def breaks(
    old: Iterable[descriptor_pb2.FileDescriptorProto], new: Iterable[descriptor_pb2.FileDescriptorProto]
) -> list[str]:
    """Names that are gone or changed."""
    present = facts(new)
    return [name for name, kind in facts(old).items() if present.get(name) != kind]


def test_nothing_is_gone_or_changed() -> None:
    assert breaks(released(), generated()) == []


def test_a_break_is_seen() -> None:
    files = generated()
    message = files[0].message_type[0]
    name = f"lp_edge.v1.{message.name}.{message.field[0].name}"
    message.field[0].number = 77
    assert breaks(generated(), files) == [name]
    del message.field[0]
    assert breaks(generated(), files) == [name]
    assert breaks(files, generated()) == []  # an addition is none
