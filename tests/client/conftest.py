"""A real server process for all tests of a run, and what makes certificates and servers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc")
pytest.importorskip("grpc_health")
pytest.importorskip("prometheus_client")

from lp_edge.tests.runtime.server.conftest import ServeProcess, lp_serve, pki

__all__ = ["lp_serve", "pki", "server", "target"]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, _toy_bundle_once: Path) -> Iterator[ServeProcess]:
    """A running ``lp-serve`` of the toy bundle."""
    args = [
        "--listen",
        "127.0.0.1:0",
        "--bundle",
        str(_toy_bundle_once),
        "--backend",
        "cpu",
        "--threads",
        "1",
    ]
    process = ServeProcess([*args, "--json"], {}, tmp_path_factory.mktemp("server") / "log")
    process.wait_ready()
    yield process
    process.end()


@pytest.fixture
def target(server: ServeProcess) -> str:
    """Where it listens."""
    return str(server.ready["grpc"])
