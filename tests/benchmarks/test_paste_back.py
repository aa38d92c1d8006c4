"""The instrument that compares pasting with the whole-frame formula."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lp_edge

SCRIPT = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "paste_back.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source tree: benchmarks are not installed")


def test_both_kinds_of_source_are_measured_in_pairs() -> None:
    command = [sys.executable, str(SCRIPT), "--frame", "720p", "--repeat", "3", "--crop", "256"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["source"] for row in rows] == ["still", "moving"]
    for row in rows:
        assert row["size"] == [1280, 720]
        assert row["max_abs_difference"] <= 1
        assert 0 < row["ratio"] < 1
        assert min(row["ours_ms"], row["reference_ms"]) > 0
        assert row["provenance"]["versions"]["lp-edge"] == lp_edge.__version__


def test_what_cannot_be_measured_is_refused() -> None:
    command = [sys.executable, str(SCRIPT), "--repeat", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--repeat" in done.stderr
