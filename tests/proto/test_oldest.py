"""The whole server, and the Python client, on the oldest gRPC and protobuf that the extras allow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lp_edge

pytest.importorskip("grpc")
pytest.importorskip("grpc_health")
pytest.importorskip("grpc_reflection")
pytest.importorskip("prometheus_client")

from lp_edge.tests.proto.test_generate import unavailable
from lp_edge.tests.runtime.server.conftest import ServeProcess

ROOT = Path(lp_edge.__file__).resolve().parent
OLDEST = {"grpcio": "1.62", "grpcio-health-checking": "1.62", "grpcio-reflection": "1.62", "protobuf": "4.25"}

# Registers a picture and sends two frames through a lossless stream.
SCRIPT = """
import sys
import grpc
import numpy as np
from lp_edge.client import Client

picture = np.zeros((200, 240, 3), np.uint8)
picture[60:140, 60:140] = 240
with Client(sys.argv[1]) as client:
    portrait = client.register(picture)
    with client.animate(portrait, mode="lossless") as stream:
        shapes = [frame.rgb.shape for frame in stream.drive([picture, picture])]
    versions = client.info().versions
print(shapes, grpc.__version__, versions["grpcio"], versions["protobuf"])
"""


def test_the_oldest_versions_are_those_of_the_extras() -> None:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("no source tree: lp_edge is installed from a wheel")
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in ("server", "client"):
        pins = dict(
            pin.split(">=") for pin in project["optional-dependencies"][extra] if pin.split(">=")[0] in OLDEST
        )
        assert pins.items() <= OLDEST.items()
        assert {"grpcio", "protobuf"} <= pins.keys()


def test_server_and_client_run_on_the_oldest_versions(toy_bundle: Path, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary=:all:",
    ]
    wanted = [f"{name}=={version}.*" for name, version in OLDEST.items()]
    try:
        # What is installed beside them (NumPy, ONNX Runtime) comes from this environment.
        command = [*pip, "--no-deps", "--target", str(packages), *wanted]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        unavailable(error)
    first = {"PYTHONPATH": str(packages)}
    networks = ["--bundle", str(toy_bundle), "--backend", "cpu", "--threads", "1"]
    server = ServeProcess(["--listen", "127.0.0.1:0", "--json", *networks], first, tmp_path / "serve.log")
    try:
        server.wait_ready()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, server.ready["grpc"]],
            env={**os.environ, **first},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        server.end()
    assert done.returncode == 0, done.stderr
    shapes, _, versions = done.stdout.strip().rpartition("]")
    assert shapes == "[(200, 240, 3), (200, 240, 3)"
    client, on_server, protobuf = versions.split()
    assert client.startswith("1.62.") and on_server.startswith("1.62.") and protobuf.startswith("4.25.")
