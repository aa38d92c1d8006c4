"""benchmarks/graphs.py: what can be tried without the full-size networks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import lp_edge
from lp_edge.errors import EngineError

SCRIPT = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "graphs.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source tree: benchmarks are not installed")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("graphs_under_test", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ratio_pairs_neighbours(graphs: ModuleType) -> None:
    """A machine that turns slow in the middle does not change the ratio of neighbours."""
    assert graphs.ratio([1.0, 1.0, 9.0], [2.0, 2.0, 18.0]) == 0.5
    assert graphs.ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == 2.0


def test_inputs_are_a_crop_and_two_sets_of_keypoints(graphs: ModuleType) -> None:
    first, second = graphs.inputs(), graphs.inputs()
    assert {name: (a.dtype.name, a.shape) for name, a in first.items()} == {
        "image": ("uint8", (1, 256, 256, 3)),
        "kp_source": ("float32", (1, 21, 3)),
        "kp_driving": ("float32", (1, 21, 3)),
    }
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert 0 < np.abs(first["kp_source"] - first["kp_driving"]).max() < 0.2


def test_a_process_that_ends_without_an_answer_is_an_error(graphs: ModuleType) -> None:
    with graphs.process(print) as ask, pytest.raises(EngineError, match="process of print ended with code 0"):
        ask()


def test_frame_names_what_is_wrong_with_the_bundle(toy_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "frame", "--bundle", toy_bundle, "--weights", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == EngineError.exit_code
    assert "has no network 'appearance_feature_extractor'" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_unknown_reductions_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the export extra (torch) is not installed")
    command = [sys.executable, str(SCRIPT), "reductions", "--weights", tmp_path, "--only", "magic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "magic" in done.stderr and "gather" in done.stderr
