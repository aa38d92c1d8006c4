"""Engines: the runner contract, its backends and the bundle.

>>> from lp_edge.engines import BackendConfig, open_bundle
>>> with open_bundle().runner("face_mesh", BackendConfig("cpu")) as runner:  # doctest: +SKIP
...     runner.inputs
"""

from __future__ import annotations

from lp_edge.engines.backends import (
    BACKENDS,
    Backend,
    BackendConfig,
    BackendStatus,
    available_backends,
    open_runner,
    resolve_backend,
)
from lp_edge.engines.bundle import (
    Bundle,
    BundleWriter,
    Manifest,
    load_manifest,
    open_bundle,
    save_manifest,
    write_bundle,
)
from lp_edge.engines.runner import Array, Runner, TensorSpec, to_host

__all__ = [
    "BACKENDS",
    "Array",
    "Backend",
    "BackendConfig",
    "BackendStatus",
    "Bundle",
    "BundleWriter",
    "Manifest",
    "Runner",
    "TensorSpec",
    "available_backends",
    "load_manifest",
    "open_bundle",
    "open_runner",
    "resolve_backend",
    "save_manifest",
    "to_host",
    "write_bundle",
]
