"""Engines of a finished bundle, for the GPU of this machine; needs TensorRT, neither PyTorch nor onnx."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import EngineEntry
from lp_edge.engines.cuda import shared_cuda
from lp_edge.engines.tensorrt import build_bundle_engines, open_engine
from lp_edge.engines.trt_build import Cancelled, Progress, TensorRtConfig, import_tensorrt, stoppable
from lp_edge.errors import BackendUnavailable, Interrupted
from lp_edge.runtime.pixels import graph_file, graph_options

__all__ = ["build", "check_machine", "device_graphs", "engine_json", "options_of"]

_DEVICE_GRAPHS: Final = (
    names.CROP_512_HALVED, names.CUT_REGION, names.RESIZE_CROPS, names.PASTE_STILL, names.PASTE_MOVING,
    names.PASTE_RECT,
)  # fmt: skip


def check_machine(device: int = 0) -> None:
    """Raise BackendUnavailable, with what to do, where no engine can be built: told before an export, not after it.

    What the engine's own remedies say of other backends is left out: they help a run, not a build.
    """
    try:
        import_tensorrt()
        shared_cuda(device).close()
    except BackendUnavailable as error:
        here = re.sub(r"[;,] or use --backend .*", "", error.remedy)
        raise BackendUnavailable(
            f"engines cannot be built here: {error.got}",
            error.expected,
            f"export without --engines, and build them where they run (lp-export --engines BUNDLE there); here: {here}",
        ) from error


def options_of(config: TensorRtConfig) -> dict[str, str]:
    """What differs from the default, as ``BackendConfig.provider_options``: a run with these takes exactly such engines."""
    told = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "axes"}
    return {
        name: str(value).lower() for name, value in told.items() if value != getattr(TensorRtConfig(), name)
    }


def device_graphs(config: TensorRtConfig) -> dict[Path, TensorRtConfig]:
    """The graphs that come with lp-edge for cropping and pasting, and how a run with this configuration builds them."""
    backend = BackendConfig("tensorrt", provider_options=options_of(config))
    return {
        graph_file(name): TensorRtConfig.from_options(graph_options(backend, name).provider_options)
        for name in _DEVICE_GRAPHS
    }


def build(
    folder: Path,
    *,
    config: TensorRtConfig | None = None,
    device: int = 0,
    graphs: Mapping[Path, TensorRtConfig] | None = None,
    progress: Progress | None = None,
) -> tuple[EngineEntry, ...]:
    """Build the engines of a bundle and enter them in its manifest; those that are there and fit are kept.

    What is finished when it is stopped stays in the bundle's folder ``engines`` and is taken the next time.

    Args:
        folder: of the bundle.
        config: how engines are built.
        device: index of the GPU.
        graphs: ONNX files outside of the bundle that get engines too, in the user's cache, and how each is built.
        progress: called with every step, from the other thread.

    Returns:
        The bundle's entries for this GPU.

    Raises:
        Interrupted: by Ctrl-C; see :func:`~lp_edge.engines.trt_build.stoppable`.
        and what :func:`~lp_edge.engines.tensorrt.build_bundle_engines` raises.
    """

    def work(cancelled: Cancelled) -> tuple[EngineEntry, ...]:
        with shared_cuda(device) as share:
            entries = build_bundle_engines(
                folder, cuda=share.cuda, config=config, progress=progress, cancelled=cancelled
            )
            for path, how in (graphs or {}).items():
                open_engine(
                    path, cuda=share.cuda, config=how, progress=progress, cancelled=cancelled, exact=True
                ).close()
            return entries

    try:
        return stoppable(work)
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(
            f"building the engines of {folder} was stopped",
            "the bundle is as it was, and finished engines are kept",
            f"lp-export --engines {folder} builds the rest",
        ) from error


def engine_json(entry: EngineEntry) -> dict[str, Any]:
    """An engine in plain containers."""
    key = entry.built_for
    return {
        "network": entry.network,
        "file": entry.file,
        "size": entry.size,
        "gpu": key.gpu,
        "tensorrt": key.tensorrt,
        "precision": key.precision,
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in key.profile.items()},
    }
