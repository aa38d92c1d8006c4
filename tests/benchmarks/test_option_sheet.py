"""The contact sheet of motion options, made as its users make it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lp_edge
from lp_edge.runtime.image import read_image

SCRIPT = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "option_sheet.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source tree: benchmarks are not installed")


def test_every_option_shows_in_the_figures_and_in_the_sheet(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--side", "60", "--output", str(sheet)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["cell"]: row for row in report["rows"]}
    assert len(rows) == 13

    # read back from pixels by the face mesh: what turns, opens and shuts under each region, and what does not
    for region, turns, opens, shuts in (
        ("all", True, True, True), ("exp", False, True, True), ("pose", True, False, False),
        ("lip", False, True, False), ("eyes", False, False, True),
    ):  # fmt: skip
        row = rows[f"region={region}"]
        assert (row["yaw"] > 8) == turns, row
        assert (row["mouth"] > 0.1) == opens, row
        assert (row["eye_left"] < -0.1) == shuts, row
    assert rows["multiplier=1"] == {**rows["region=all"], "cell": "multiplier=1"}
    yaws = [rows[f"multiplier={x}"]["yaw"] for x in ("0.5", "1", "1.5")]
    assert yaws[0] + 2 < yaws[1] < yaws[2] - 2, yaws

    # at rest, relative changes nothing; absolute takes over the driver's level head and closed mouth
    still, taken = rows["relative, at rest"], rows["absolute, at rest"]
    assert max(abs(still[name]) for name in ("pitch", "yaw", "roll")) < 0.5
    for name in ("pitch", "roll"):
        assert abs(report["before"][name] + taken[name]) < 0.6 * abs(report["before"][name]), name
    assert taken["mouth_width"] < -0.1
    assert rows["no-paste-back"]["frame"] == [640, 640]
    assert rows["paste-back"]["frame"] == rows["region=all"]["frame"] != [640, 640]

    picture = read_image(sheet)
    assert picture.shape == (120, 420, 3)
    first = picture[:44, :60].astype(int)
    for row in range(2):
        for column in range(7):
            drawn = picture[60 * row : 60 * row + 44, 60 * column : 60 * column + 60]
            alike = (row, column) in ((0, 0), (1, 3))  # as it is; relative, at rest
            assert (np.abs(drawn - first).mean() > 0.4) != alike, (row, column)


def test_a_missing_picture_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--source", str(tmp_path / "no.jpg")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    assert "no.jpg" in done.stderr
    assert "Traceback" not in done.stderr
