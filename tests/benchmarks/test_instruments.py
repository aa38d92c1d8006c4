"""The instruments under benchmarks/, run as their users run them, on the toy networks."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lp_edge
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.templates import save_template

FOLDER = Path(lp_edge.__file__).resolve().parent / "benchmarks"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no source tree: benchmarks are not installed")


def run(script: str, *args: object, code: int = 0) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return (json.loads(done.stdout) if code == 0 else {}), done.stderr


def mouths(path: Path, blues: list[int | None]) -> Path:
    """A clip of toy faces whose mouths open by 1 - blue / 255; None = no face."""
    with open_writer(path, (240, 200), Fraction(25), crf=0) as writer:
        for blue in blues:
            rgb = np.zeros((200, 240, 3), np.uint8)
            if blue is not None:
                rgb[60:140, 60:140] = (255, 255, blue)
            writer.write(rgb)
    return path


@pytest.fixture
def face(tmp_path: Path) -> Path:
    rgb = np.zeros((200, 240, 3), np.uint8)
    rgb[60:140, 60:140] = 255
    write_image(tmp_path / "face.png", rgb)
    return tmp_path / "face.png"


def test_follow_measures_a_given_result(toy_bundle: Path, face: Path, tmp_path: Path) -> None:
    wave = [round(180 + 70 * np.sin(i / 4)) for i in range(40)]
    driver = mouths(tmp_path / "d.mkv", wave)
    args = ("--source", face, "--driving", driver, "--bundle", toy_bundle, "--no-smooth", "--output")
    same, _ = run("follow", *args, mouths(tmp_path / "same.mkv", wave))
    assert same["frames"] == same["frames_driver"] == same["frames_result"] == 40
    assert same["signals"]["mouth"]["correlation"] > 0.99
    assert same["signals"]["yaw"]["flat"] is True
    assert same["signals"]["yaw"]["mean_abs_difference"] < 0.5
    opposite, _ = run("follow", *args, mouths(tmp_path / "other.mkv", [430 - max(b, 175) for b in wave]))
    assert opposite["signals"]["mouth"]["correlation"] < -0.5
    assert opposite["provenance"]["bundle"]["variant"] == "toy"


def test_follow_makes_the_result_itself(toy_bundle: Path, face: Path, tmp_path: Path) -> None:
    driver = mouths(tmp_path / "d.mkv", [255, 220, 180, 140, 180, 220, 255, 200])
    report, _ = run("follow", "--source", face, "--driving", driver, "--bundle", toy_bundle)
    assert report["output"] is None
    assert report["frames_result"] == 8
    assert report["signals"]["mouth"]["driver_std"] > 0.02
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.mkv", "face.png", "toy_bundle"]


def test_follow_says_what_is_wrong(toy_bundle: Path, face: Path, tmp_path: Path) -> None:
    _, err = run("follow", "--source", face, "--driving", tmp_path / "no.mp4", "--bundle", toy_bundle, code=3)
    assert "no.mp4" in err
    dark = mouths(tmp_path / "dark.mkv", [None] * 5)
    _, err = run("follow", "--source", face, "--driving", dark, "--bundle", toy_bundle, code=4)
    assert "no face" in err


def test_rotation_finds_the_difference_that_is_there(toy_bundle: Path, tmp_path: Path) -> None:
    clip = mouths(tmp_path / "still.mkv", [255] * 75)  # a head that does not turn
    save_template(builtin_template("nod"), tmp_path / "nod.npz")
    save_template(builtin_template("blink", duration=3.0), tmp_path / "blink.npz")
    report, _ = run(
        "rotation", "--clip", clip, "--template", tmp_path / "nod.npz", "--clip", clip, "--template", tmp_path / "blink.npz",
        "--bundle", toy_bundle,
    )  # fmt: skip
    nod, blink = report["pairs"]
    assert nod["frames"] == 75
    assert nod["pitch"]["mean_abs_difference"] > 2
    assert nod["pitch"]["liveportrait_std"] > 2 > nod["pitch"]["mesh_std"]
    assert nod["yaw"]["mean_abs_difference"] < 1
    assert blink["pitch"]["mean_abs_difference"] < 1
    assert report["mean_abs_difference"]["pitch"] == pytest.approx(
        (nod["pitch"]["mean_abs_difference"] + blink["pitch"]["mean_abs_difference"]) / 2, abs=2e-3
    )


def test_rotation_wants_pairs(tmp_path: Path) -> None:
    _, err = run("rotation", "--clip", "a.mp4", "--template", "a.pkl", "--clip", "b.mp4", code=2)
    assert "one template for each clip" in err


def test_closed_loop_goes_around(toy_bundle: Path, face: Path) -> None:
    report, _ = run(
        "closed_loop", "--first", face, "--second", face, "--template", "nod", "--bundle", toy_bundle
    )
    [loop] = report["runs"]
    assert loop["template"] == "nod"
    for step in ("after_one", "after_two"):
        assert loop[step]["frames"] == 75
        # the toy warp cannot turn a head, and the report says so
        assert loop[step]["signals"]["pitch"]["driver_std"] > 2
        assert loop[step]["signals"]["pitch"]["result_std"] < 1


def test_memory_runs_every_length_in_a_process_of_its_own(
    toy_bundle: Path, face: Path, tmp_path: Path
) -> None:
    clip = mouths(tmp_path / "d.mkv", [255, 200, 150])
    report, _ = run(
        "memory", "--source", face, "--driving", clip, "--frames", 5, "--frames", 20, "--repeat", 1, "--bundle", toy_bundle
    )  # fmt: skip
    assert [r["frames"] for r in report["runs"]] == [5, 20]
    assert all(r["peak_mib"] > 30 for r in report["runs"])
    assert report["ratio"] >= 1.0
