"""Certificates and real server processes for the server's tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lp_edge.tests.runtime.server.process import SECONDS, ServeProcess


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Pki:
    """Makes certificates with openssl."""

    def __init__(self, folder: Path, openssl: str) -> None:
        self._folder, self._openssl = folder, openssl
        self._made = 0

    def authority(self, name: str = "ca") -> Pair:
        """A self-signed CA."""
        return self._make(name, "-addext", "basicConstraints=critical,CA:TRUE")

    def issue(self, name: str, by: Pair) -> Pair:
        """A certificate for localhost and 127.0.0.1, signed by a CA."""
        return self._make(
            name,
            *("-CA", str(by.certificate), "-CAkey", str(by.key)),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        )

    def expire(self, pair: Pair) -> None:
        """Replace a certificate by a self-signed one that ended yesterday."""
        request = pair.key.with_suffix(".csr")
        self._run("req", "-new", "-key", str(pair.key), "-out", str(request), "-subj", "/CN=late")
        files = ("-in", str(request), "-signkey", str(pair.key), "-out", str(pair.certificate))
        self._run("x509", "-req", *files, "-days", "-1")

    def _run(self, *args: str) -> None:
        subprocess.run([self._openssl, *args], check=True, capture_output=True, timeout=SECONDS)

    def _make(self, name: str, *extensions: str) -> Pair:
        self._made += 1
        folder = self._folder / str(self._made)
        folder.mkdir()
        pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        self._run(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"),
            *("-keyout", str(pair.key), "-out", str(pair.certificate), "-days", "2", "-subj", f"/CN={name}"),
            *extensions,
        )
        pair.key.chmod(0o600)
        return pair


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """Makes certificates."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: no certificates to test with")
    folder = tmp_path / "pki"
    folder.mkdir()
    return Pki(folder, openssl)


@pytest.fixture
def lp_serve(tmp_path: Path, toy_bundle: Path) -> Iterator[Callable[..., ServeProcess]]:
    """Starts servers of the toy bundle, on a free port unless told otherwise; ends them after the test.

    ``lp_serve(*options, ready=True, environment={...})`` waits for the line that says that it listens.
    """
    pytest.importorskip("grpc")
    started: list[ServeProcess] = []

    def start(
        *options: object, ready: bool = True, environment: dict[str, str] | None = None
    ) -> ServeProcess:
        args = [str(option) for option in options]
        if "--listen" not in args:
            args += ["--listen", "127.0.0.1:0"]
        args += ["--bundle", str(toy_bundle), "--backend", "cpu", "--threads", "1", "--json"]
        server = ServeProcess(args, environment or {}, tmp_path / f"serve{len(started)}.log")
        started.append(server)
        if ready:
            server.wait_ready()
        return server

    yield start
    for server in started:
        server.end()


@pytest.fixture
def serve(toy_bundle: Path) -> Callable[..., Any]:
    """``serve(**settings of ServerConfig)``: a server of the toy bundle in this event loop; see serving.py."""
    pytest.importorskip("grpc")
    from lp_edge.tests.runtime.server.serving import serving

    return partial(serving, toy_bundle)
