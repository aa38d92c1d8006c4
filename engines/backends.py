"""The backends by name, the configuration that picks one, and probes that tell which really work."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from lp_edge.engines import ort, trt_build
from lp_edge.engines.runner import Runner, to_host
from lp_edge.errors import BackendUnavailable, ConfigError, LpEdgeError

__all__ = [
    "AUTO",
    "BACKENDS",
    "PIXELS",
    "Backend",
    "BackendConfig",
    "BackendStatus",
    "available_backends",
    "open_runner",
    "probe_backend",
    "resolve_backend",
]

_LOG = logging.getLogger("lp_edge")

AUTO: Final = "auto"
PIXELS: Final = (AUTO, "host", "device")

# A 3x3 convolution with ones on x [N, 1, 4, 4] -> y, written by tests/toys/make_toys.py (which compares it).
_PROBE: Final = base64.b64decode(
    "CAgSB2xwX2VkZ2U6nAEKIgoBeAoBdxIBeSIEQ29udioRCgRwYWRzQAFAAUABQAGgAQcSBXByb2JlKjMIAQgBCAMIAxABQgF3SiQAAIA/AACA"
    "PwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPwAAgD9aHAoBeBIXChUIARIRCgMSAU4KAggBCgIIBAoCCARiHAoBeRIXChUIARIRCgMSAU4KAggB"
    "CgIIBAoCCARCBAoAEBE="
)
# What it makes of ones: the number of cells under the kernel.
_PROBE_SUMS: Final = ((4, 6, 6, 4), (6, 9, 9, 6), (6, 9, 9, 6), (4, 6, 6, 4))


@dataclass(frozen=True)
class BackendConfig:
    """Where networks run.

    Attributes:
        backend: ``auto`` or one of :data:`BACKENDS`. A backend that is named is used or the call fails.
        device: index of the GPU; ignored on the CPU.
        threads: threads of one operator on the CPU; 0 = one per core.
        provider_options: options handed to the backend as they are; not allowed with ``auto``.
        pixels: where crops are cut, resized and pasted: ``host``, ``device`` (as graphs on the backend) or ``auto``: on the
            device where the backend keeps frames there.

    Raises:
        ConfigError: unknown backend or place for pixels, negative number, or options for ``auto``.
    """

    backend: str = AUTO
    device: int = 0
    threads: int = 0
    provider_options: Mapping[str, str] = field(default_factory=dict, hash=False)
    pixels: str = AUTO

    def __post_init__(self) -> None:
        if self.backend != AUTO and self.backend not in BACKENDS:
            raise ConfigError(
                f"unknown backend {self.backend!r}",
                f"expected one of {', '.join((AUTO, *BACKENDS))}",
                "choose one; lp-doctor tells which work here",
            )
        if self.pixels not in PIXELS:
            raise ConfigError(
                f"unknown place for pixels {self.pixels!r}",
                f"expected one of {', '.join(PIXELS)}",
                "leave it at auto",
            )
        for key, value in (("device", self.device), ("threads", self.threads)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 4096:
                raise ConfigError(
                    f"{key} is {value!r}", "expected an integer from 0 to 4096", f"correct {key}"
                )
        if self.backend == AUTO and self.provider_options:
            raise ConfigError(
                f"provider options {sorted(self.provider_options)} with backend auto",
                "expected them with a named backend only",
                "name the backend they are meant for",
            )


Factory = Callable[["Path | bytes", BackendConfig, str], Runner]


@dataclass(frozen=True)
class Backend:
    """An entry of the registry.

    Attributes:
        name: as in ``BackendConfig.backend``.
        title: one line for people.
        rank: order in which ``auto`` tries, smallest first; None = only when asked for by name.
        how_to_get: what to do to have it; asked when it is needed, because it may depend on the machine.
        open: makes a runner of (path or bytes of an ONNX model, configuration, name in messages).
    """

    name: str
    title: str
    rank: int | None
    how_to_get: Callable[[], str]
    open: Factory

    @property
    def remedy(self) -> str:
        """How to get it on this machine."""
        return self.how_to_get()


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works here: it ran a small network and the numbers were right."""

    name: str
    works: bool
    detail: str
    remedy: str


def _ort_backend(provider: str, title: str, rank: int | None) -> Backend:
    def make(model: Path | bytes, config: BackendConfig, name: str) -> Runner:
        device = 0 if provider == ort.CPU else config.device
        return ort.OrtRunner(model, provider, device, config.threads, config.provider_options, name=name)

    entry = ort.PROVIDERS[provider]
    return Backend(entry.backend, title, rank, lambda: entry.remedy, make)


def _tensorrt(model: Path | bytes, config: BackendConfig, name: str) -> Runner:
    from lp_edge.engines.tensorrt import open_backend  # it reads bundles, whose module imports this one

    return open_backend(model, config, name)


# Filled at import; a further backend adds an entry here and nothing above this module changes.
# TensorRT compiles every network for minutes before its first frame, so auto never picks it unasked.
BACKENDS: Final[dict[str, Backend]] = {
    backend.name: backend
    for backend in (
        _ort_backend(ort.CPU, "ONNX Runtime on the CPU", 100),
        _ort_backend(ort.CUDA, "ONNX Runtime with CUDA and cuDNN", 10),
        Backend("tensorrt", "TensorRT", None, trt_build.remedy, _tensorrt),
        _ort_backend(ort.TENSORRT, "ONNX Runtime with TensorRT", None),
        _ort_backend(ort.TENSORRT_RTX, "ONNX Runtime with TensorRT-RTX", None),
    )
}


def probe_backend(config: BackendConfig) -> str:
    """Run a small network on ``config.backend`` (not ``auto``) and return the device in words.

    Raises:
        BackendUnavailable: it is not there, does not start, fails, or computes wrong numbers.
    """
    backend = BACKENDS[config.backend]
    try:
        with backend.open(_PROBE, config, "probe") as runner:
            result = to_host(runner.infer({"x": np.ones((2, 1, 4, 4), np.float32)})["y"])
            device = runner.device
    except BackendUnavailable:
        raise
    except LpEdgeError as error:
        raise BackendUnavailable(
            f"backend {backend.name} starts but fails on a small network: {error.got}", "", backend.remedy
        ) from error
    wanted = np.broadcast_to(np.array(_PROBE_SUMS, np.float32), (2, 1, 4, 4))
    if not np.allclose(
        result, wanted, atol=1e-2
    ):  # loose enough for fp16 and TF32, too tight for a wrong kernel
        raise BackendUnavailable(
            f"backend {backend.name} computes wrong numbers on {device}",
            "expected a sum of ones",
            backend.remedy,
        )
    return device


def resolve_backend(config: BackendConfig) -> BackendConfig:
    """Replace ``auto`` by the best backend that works here and log which and why; a named backend stays.

    Raises:
        BackendUnavailable: not even the last choice works.
    """
    if config.backend != AUTO:
        return config
    ranked = sorted((b for b in BACKENDS.values() if b.rank is not None), key=lambda b: b.rank or 0)
    passed: list[str] = []
    for backend in ranked:
        chosen = replace(config, backend=backend.name)
        try:
            device = probe_backend(chosen)
        except BackendUnavailable as error:
            passed.append(error.got)
            continue
        why = f"; passed over: {'; '.join(passed)}" if passed else ""
        _LOG.info("backend auto picked %s on %s%s", backend.name, device, why)
        return chosen
    raise BackendUnavailable(
        f"no backend works here: {'; '.join(passed)}",
        "expected at least cpu",
        "pip install --force-reinstall onnxruntime",
    )


def open_runner(model: Path | bytes, config: BackendConfig | None = None, *, name: str = "") -> Runner:
    """A runner for an ONNX file (or its bytes).

    Args:
        model: path or content.
        config: backend and device; default ``BackendConfig()``.
        name: what the network is called in messages; by default the file's name.

    Raises:
        BackendUnavailable: the backend asked for cannot run here.
        EngineError: the model cannot be loaded.
    """
    config = resolve_backend(config or BackendConfig())
    return BACKENDS[config.backend].open(model, config, name)


def available_backends() -> list[BackendStatus]:
    """Try every backend with a small network; one entry each, in the order of the registry."""
    statuses = []
    for backend in BACKENDS.values():
        try:
            device = probe_backend(BackendConfig(backend.name))
        except BackendUnavailable as error:
            statuses.append(BackendStatus(backend.name, False, error.got, error.remedy))
        else:
            statuses.append(BackendStatus(backend.name, True, f"{backend.title}: {device}", ""))
    return statuses
