"""Choosing a backend: what is asked for or an error, and auto says why."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lp_edge.engines import (
    BACKENDS,
    Backend,
    BackendConfig,
    TensorSpec,
    available_backends,
    backends,
    open_runner,
    ort,
    resolve_backend,
)
from lp_edge.engines.runner import Array, Runner
from lp_edge.errors import BackendUnavailable, ConfigError, EngineError


class Constant(Runner):
    """A backend that answers with one number."""

    backend = "constant"
    device = "thin air"

    def __init__(self, value: float) -> None:
        x, y = (TensorSpec(n, np.dtype("float32"), ("N", 1, 4, 4)) for n in "xy")
        super().__init__("probe", (x,), (y,))
        self.value = value

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        if np.isnan(self.value):
            raise EngineError("no kernel image")
        return {"y": np.full(feeds["x"].shape, self.value, np.float32)}

    def _close(self) -> None:
        pass


def registry(monkeypatch: pytest.MonkeyPatch, *without: str, constant: float | None = None) -> None:
    """Work on a copy of the registry, without some entries and with a constant as the best backend."""
    entries = {name: entry for name, entry in BACKENDS.items() if name not in without}
    if constant is not None:
        value = constant
        entries["constant"] = Backend(
            "constant", "a constant", 1, lambda: "get a better one", lambda *_: Constant(value)
        )
    monkeypatch.setattr(backends, "BACKENDS", entries)


def test_probe_sums_are_those_of_a_convolution_with_ones() -> None:
    padded = np.pad(np.ones((4, 4)), 1)
    sums = sum(padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3))
    np.testing.assert_array_equal(sums, backends._PROBE_SUMS)


def test_cpu_works_here() -> None:
    status = {s.name: s for s in available_backends()}
    assert list(status) == list(BACKENDS) == ["cpu", "cuda", "tensorrt", "ort-tensorrt", "tensorrt-rtx"]
    assert status["cpu"].works and not status["cpu"].remedy
    for name, entry in status.items():
        assert entry.detail
        if not entry.works:
            assert name in entry.detail and entry.remedy


@pytest.mark.parametrize("provider", [ort.CUDA, ort.TENSORRT, ort.TENSORRT_RTX])
def test_named_backend_is_never_replaced(toys: Path, provider: str) -> None:
    if provider in ort.import_onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    name = ort.PROVIDERS[provider].backend
    with pytest.raises(BackendUnavailable, match=f"backend {name} .*CPUExecutionProvider.*To fix it"):
        open_runner(toys / "face_mesh.onnx", BackendConfig(name))


def test_auto_logs_what_and_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, "cuda", constant=float("nan"))
    with caplog.at_level(logging.INFO, "lp_edge"):
        chosen = resolve_backend(BackendConfig(threads=3))
    assert chosen == BackendConfig("cpu", threads=3)
    (record,) = caplog.records
    assert "picked cpu" in record.message and "constant starts but fails" in record.message
    assert "no kernel image" in record.message


def test_auto_prefers_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, constant=1.0)
    monkeypatch.setattr(backends, "_PROBE_SUMS", np.ones((4, 4)))
    assert resolve_backend(BackendConfig()).backend == "constant"


def test_auto_does_not_take_an_unranked_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, "cpu", "cuda")
    with pytest.raises(BackendUnavailable, match="no backend works here"):
        resolve_backend(BackendConfig())


def test_wrong_numbers_are_not_working(monkeypatch: pytest.MonkeyPatch) -> None:
    registry(monkeypatch, constant=9.0)
    with pytest.raises(BackendUnavailable, match="wrong numbers on thin air"):
        backends.probe_backend(BackendConfig("constant"))


def test_auto_does_not_hide_a_broken_model() -> None:
    with pytest.raises(EngineError, match="cannot load"):
        open_runner(b"junk", name="net")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backend": "gpu"}, "expected one of auto, cpu"),
        ({"device": -1}, "device is -1"),
        ({"threads": True}, "threads is True"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"provider_options": {"a": "b"}}, "with backend auto"),
    ],
)
def test_wrong_configuration(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BackendConfig(**values)


def test_configuration_is_a_value() -> None:
    config = BackendConfig("cpu", provider_options={"a": "b"})
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threads = 2  # type: ignore[misc]
