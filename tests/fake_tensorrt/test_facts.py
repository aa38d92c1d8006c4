"""The fake TensorRT against what NVIDIA's bindings export."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytest.importorskip("onnx")

from lp_edge.tests.fake_tensorrt.dump import FACTS as FILE
from lp_edge.tests.fake_tensorrt.dump import dump, encode
from lp_edge.tests.fake_tensorrt.module import FACTS, VERSIONS, World, implemented, make_tensorrt


def test_the_three_generations_are_there() -> None:
    assert list(VERSIONS) == ["8.5", "8.6", "10.3", "11.4"]
    assert encode(FACTS) == FILE.read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_exports_what_the_bindings_export_and_no_more(version: str) -> None:
    trt, facts = make_tensorrt(version, World()), FACTS[VERSIONS[version]]
    for name, members in facts["classes"].items():
        kind = getattr(trt, name)
        if isinstance(members, list):
            assert [member.name for member in kind] == members
        else:
            public = {member for member in dir(kind) if not member.startswith("_")}
            assert public == set(members) | ({"Severity"} if name == "ILogger" else set()), name
    for name in {n for f in FACTS.values() for n in f["classes"]} - set(facts["classes"]):
        with pytest.raises(AttributeError):
            getattr(trt, name)


def test_the_fake_invents_nothing() -> None:
    for name, members in implemented().items():
        known = {m for facts in FACTS.values() for m in facts["classes"].get(name, {})}
        assert members <= known, name


def test_generations_differ_where_the_builder_asks() -> None:
    """The differences that the code relies on, so that a wrong dump does not go unnoticed."""
    old, older, ten, new = (make_tensorrt(version, World()) for version in ("8.6", "8.5", "10.3", "11.4"))

    def has(trt: Any, enumeration: str, member: str) -> bool:
        return hasattr(getattr(trt, enumeration, None), member)

    flags = "NetworkDefinitionCreationFlag"
    assert [has(t, flags, "EXPLICIT_BATCH") for t in (older, old, ten, new)] == [True, True, True, False]
    assert [has(t, flags, "STRONGLY_TYPED") for t in (older, old, ten, new)] == [False, False, True, True]
    assert [has(t, "BuilderFlag", "FP16") for t in (older, old, ten, new)] == [True, True, True, False]
    assert [has(t, "IBuilderConfig", "builder_optimization_level") for t in (older, old, ten, new)] == [
        False, True, True, True,
    ]  # fmt: skip
    assert [hasattr(t, "IProgressMonitor") for t in (older, old, ten, new)] == [False, False, True, True]
    assert [has(t, "ILayer", "precision") for t in (older, old, ten, new)] == [True, True, True, False]
    assert [has(t, "LayerType", "CAST") for t in (older, old, ten, new)] == [False, True, True, True]
    assert all(has(t, "IExecutionContext", "execute_async_v3") for t in (older, old, ten, new))


def test_unknown_members_cannot_be_set() -> None:
    trt = make_tensorrt("8.5", World())

    class Quiet(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            pass

    config = trt.Builder(Quiet()).create_builder_config()
    with pytest.raises(AttributeError, match="builder_optimization_level"):
        config.builder_optimization_level = 3
    config.avg_timing_iterations = 2
    assert config.avg_timing_iterations == 2


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_bindings"])
def test_the_bindings_installed_here(module: str) -> None:
    """Where NVIDIA's bindings of one of the versions can be loaded, they export what was written down."""
    try:
        real = importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"no {module} here: {error}")
    if real.__version__ not in FACTS:
        pytest.skip(f"{module} is {real.__version__}; facts are there for {', '.join(FACTS)}")
    assert dump(real) == FACTS[real.__version__]
