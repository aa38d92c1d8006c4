"""Where a figure comes from: versions, machine, backend and model digests, as one JSON-able dictionary."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lp_edge.engines.bundle import Bundle
from lp_edge.engines.runner import Runner
from lp_edge.runtime.doctor import examine_components, examine_machine

__all__ = ["provenance"]


def provenance(bundle: Bundle | None = None, runners: Mapping[str, Runner] | None = None) -> dict[str, Any]:
    """What must be known to compare a figure with another one.

    Args:
        bundle: the bundle that was measured.
        runners: name -> runner that took part; backend and device are taken from them.

    Returns:
        ``time`` (UTC, ISO 8601), ``versions`` (component -> version), ``machine`` (see
        :class:`lp_edge.runtime.doctor.Machine`), ``load`` (1-minute load average at this moment, None where unknown),
        ``environment`` (thread limits that are set), and with the arguments ``bundle`` (family, variant, file -> SHA-256)
        and ``runners`` (name -> backend, device).
    """
    result: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {c.name: c.version for c in examine_components() if c.version is not None},
        "machine": asdict(examine_machine()),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "environment": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
            if name in os.environ
        },
    }
    if bundle is not None:
        manifest = bundle.manifest
        result["bundle"] = {"family": manifest.family, "variant": manifest.variant, "files": bundle.hashes()}
    if runners is not None:
        result["runners"] = {name: {"backend": r.backend, "device": r.device} for name, r in runners.items()}
    return result
