"""The runtime imports neither torch nor a model library, and loads ONNX Runtime only when a network is opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lp_edge

ROOT = Path(lp_edge.__file__).resolve().parent
CODE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(",".join(m for m in ("torch", "onnx", "onnxscript", "tensorrt", "onnxruntime") if m in sys.modules))
"""


def heavy(modules: list[str]) -> str:
    done = subprocess.run([sys.executable, "-c", CODE, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules_of(package: str) -> list[str]:
    names = [f"lp_edge.{package}"]
    for path in sorted((ROOT / package).glob("*.py")):
        if path.stem != "__init__" and not path.stem.startswith("_"):
            names.append(f"lp_edge.{package}.{path.stem}")
    return names


@pytest.mark.parametrize("package", ["engines", "runtime"])
def test_package(package: str) -> None:
    names = modules_of(package)
    assert len(names) > 3
    assert heavy(names) == ""


def test_command_line() -> None:
    if not (ROOT / "cli.py").is_file():
        pytest.skip("no cli.py yet")
    assert heavy(["lp_edge.cli"]) == ""


def test_the_check_can_fail() -> None:
    assert heavy(["onnxruntime"]) == "onnxruntime"


def test_onnxruntime_reports_nothing(tmp_path: Path) -> None:
    """It would leave a device's id and a database in the cache, and send what is in there."""
    program = "from lp_edge.engines.ort import import_onnxruntime; import_onnxruntime()"
    plain = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment = {**plain, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=environment)
    assert not list(tmp_path.iterdir())
