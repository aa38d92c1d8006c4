"""Importing the client loads nothing heavy, and says clearly what is missing where gRPC is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc")

import lp_edge

ROOT = Path(lp_edge.__file__).resolve().parent / "client"
HEAVY = ("torch", "onnx", "tensorrt", "onnxruntime", "av", "cv2", "fastapi", "prometheus_client")
CODE = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
print(",".join(m for m in sys.argv[1].split(",") if m in sys.modules))
"""
NO_GRPC = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


def loaded(names: tuple[str, ...], *modules: str) -> str:
    done = run(CODE, ",".join(names), *modules)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_module_loads_decoders_or_networks() -> None:
    modules = [f"lp_edge.client.{p.stem}" for p in sorted(ROOT.glob("*.py")) if p.stem != "__init__"]
    assert {"lp_edge.client.sync", "lp_edge.client.aio", "lp_edge.client.command"} <= set(modules)
    assert loaded(HEAVY, "lp_edge.client", *modules) == ""


def test_the_package_and_the_command_load_no_grpc() -> None:
    assert loaded((*HEAVY, "grpc", "google.protobuf"), "lp_edge.client", "lp_edge.client.command") == ""
    assert loaded(("grpc",), "lp_edge.client.types") == ""


def test_the_check_can_fail() -> None:
    assert loaded(HEAVY, "cv2") == "cv2"


@pytest.mark.parametrize("blocked", ["grpc", "google"])
@pytest.mark.parametrize(
    "statement",
    ["from lp_edge.client import Client", "import lp_edge.client.aio", "import lp_edge.client.sync"],
)
def test_without_grpc(blocked: str, statement: str) -> None:
    code = NO_GRPC.replace("BLOCKED", repr(blocked)) + statement
    done = run(code)
    assert done.returncode == 1
    assert "BackendUnavailable" in done.stderr and "pip install 'lp-edge[client]'" in done.stderr


def test_the_command_without_grpc() -> None:
    code = NO_GRPC.replace("BLOCKED", "'grpc'")
    code += "from lp_edge.client.command import client; client(['info', '--json'], prog_name='lp-client')"
    done = run(code)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 7 and error["remedy"] == "pip install 'lp-edge[client]'"


def test_exported_names() -> None:
    from lp_edge import client

    assert all(getattr(client, name) is not None for name in client.__all__)
    assert set(client.__all__) <= set(dir(client))
    with pytest.raises(AttributeError):
        _ = client.nothing
