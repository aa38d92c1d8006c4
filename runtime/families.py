"""The families by name: which adapter runs a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import Bundle
from lp_edge.engines.runner import Runner
from lp_edge.errors import ConfigError
from lp_edge.runtime.face_motion import Canonical
from lp_edge.runtime.family import Family
from lp_edge.runtime.mesh_family import MeshFamily
from lp_edge.runtime.pixels import DevicePixels, HostPixels, Pixels, open_device_graph

__all__ = ["FAMILIES", "Wrap", "half_the_cores", "open_family", "unwrapped"]

Wrap = Callable[[Runner], Runner]
"""What is called in a network's place."""

FAMILIES = ("mesh", "liveportrait")
"""Families that this version animates."""


def unwrapped(runner: Runner) -> Runner:
    """The network itself."""
    return runner


def half_the_cores(config: BackendConfig) -> BackendConfig:
    """For networks of like weight that run side by side: each on all cores would make them wait for each other."""
    if config.threads:
        return config
    return replace(config, threads=max(1, (os.cpu_count() or 1) // 2))


def open_family(
    bundle: Bundle,
    config: BackendConfig,
    stack: ExitStack,
    face_models: Path | None = None,
    wrap: Wrap = unwrapped,
) -> Family[Any]:
    """The adapter of a bundle's family, with its networks open.

    Args:
        bundle: an open bundle.
        config: where its networks run; threads 0 = as many as suit the family.
        stack: closes them.
        face_models: folder with ``landmark.onnx`` (and InsightFace's models) for the crops of the liveportrait family.
        wrap: takes every network as it is opened and gives what is called in its place. Not the device graphs of the
            pixels: they take microseconds, and what they read differs from face to face, so that calls laid together would
            only copy more.

    Raises:
        ConfigError: the family is unknown, or has no use for ``face_models``.
        BundleError, BackendUnavailable, EngineError: a network cannot be opened.
    """

    def open_pixels(drawing: Runner) -> Pixels:
        """On the device where the network that draws keeps its results, else on the host."""
        if config.pixels == "host" or (config.pixels == "auto" and not drawing.resident):
            return HostPixels()
        pixels = DevicePixels(lambda name: open_device_graph(name, config))
        stack.callback(pixels.close)
        return pixels

    family = bundle.manifest.family
    if family == "liveportrait":
        # Only the adapter that is needed is imported.
        from lp_edge.runtime.liveportrait_family import open_liveportrait

        return open_liveportrait(bundle, config, stack, face_models, wrap, open_pixels)
    if family != MeshFamily.name:
        raise ConfigError(
            f"the bundle holds the family {family!r}",
            f"this version animates {' and '.join(FAMILIES)}",
            "use the built-in bundle, or export one with lp-export",
        )
    if face_models is not None:
        raise ConfigError(
            f"face models {face_models} with the family mesh",
            "expected them with the family liveportrait only",
            "leave them out: the mesh family uses its own face networks",
        )
    warp = stack.enter_context(wrap(bundle.runner(names.WARP_DECODE, half_the_cores(config))))
    tables = bundle.manifest.files
    template_map = bundle.load_table("liveportrait_map") if "liveportrait_map" in tables else None
    canonical = Canonical.from_table(bundle.load_table("canonical"))
    return MeshFamily(warp, canonical, open_pixels(warp), template_map)
