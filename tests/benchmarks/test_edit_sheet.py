"""The contact sheet of edits, made as its users make it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lp_edge
from lp_edge.runtime.edit import SLIDERS
from lp_edge.runtime.image import read_image

SCRIPT = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "edit_sheet.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source tree: benchmarks are not installed")


def test_every_slider_is_drawn_and_shows_in_the_figures(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--side", "60", "--columns", "5", "--output", str(sheet)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {(row["slider"], row["value"]): row for row in json.loads(done.stdout)["rows"]}
    assert {name for name, _ in rows} == set(SLIDERS)

    def between(name: str, signal: str) -> float:
        """The signal at the slider's high end minus that at its low end (or at rest)."""
        slider = SLIDERS[name]
        low = rows.get((name, slider.low), {}).get(signal, 0.0)
        return float(rows[name, slider.high][signal] - low)

    # read back from pixels by the face mesh, so every slider does visibly what its name says
    for name, signal, least in (
        ("pitch", "pitch", 15), ("yaw", "yaw", 20), ("roll", "roll", 25), ("mouth_open", "mouth", 0.25),
        ("eyes_open", "eye_left", 0.15), ("blink", "eye_left", -0.12), ("blink", "eye_right", -0.12),
        ("wink", "eye_left", -0.08), ("eyebrow", "brows_up", 0.05), ("gaze_x", "gaze_right", 0.05),
        ("gaze_y", "gaze_up", 0.015), ("smile", "corners_up", 0.1), ("smile", "mouth_width", 0.2),
        ("pout", "lips_right", 0.15), ("purse", "mouth_width", -0.15), ("grin", "mouth_width", 0.1),
        ("lip_open", "mouth", 0.2), ("move_x", "move_right", 0.8), ("move_y", "move_up", 0.8), ("zoom", "size", 0.25),
    ):  # fmt: skip
        assert np.sign(least) * between(name, signal) > abs(least), (name, signal)
    assert abs(rows["wink", 39]["eye_left"]) > 2 * abs(rows["wink", 39]["eye_right"])

    picture = read_image(sheet)
    assert picture.shape[1] == 5 * 60
    first = picture[:44, :60].astype(int)
    for column in range(1, 5):
        assert np.abs(picture[:44, 60 * column : 60 * column + 60] - first).mean() > 2


def test_a_missing_picture_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--source", str(tmp_path / "no.jpg")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert "no.jpg" in done.stderr
    assert "Traceback" not in done.stderr
