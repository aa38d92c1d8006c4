"""The fake PyNvVideoCodec against what NVIDIA's module exports."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lp_edge.tests.fake_nvcodec.module import FACTS, World, make_nvcodec


def own(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")} - set(dir(object))


@pytest.mark.parametrize("generation", ["121", "130"])
def test_the_fake_exports_nothing_that_the_module_lacks(generation: str) -> None:
    real = FACTS[generation]
    module: Any = make_nvcodec(World())
    names = {name for name in vars(module) if not name.startswith("_")} - {
        "CreateEncoder"
    }  # this one is Python
    assert names <= set(real["classes"]) | set(real["functions"])
    for name in ("PacketData", "PyNvDecoder", "PyNvEncoder"):
        assert own(getattr(module, name)) <= set(real["classes"][name])
    frame = {"shape", "format", "framesize", "timestamp", "GetPtrToPlane"}
    assert frame <= set(real["classes"]["DecodedFrame"])


@pytest.mark.parametrize("generation", ["121", "130"])
def test_the_decoders_arguments_exist(generation: str) -> None:
    signature = FACTS[generation]["functions"]["CreateDecoder"][0]
    module: Any = make_nvcodec(World())
    for name in inspect.signature(module.CreateDecoder).parameters:
        assert f"{name}: " in signature
