"""The instruments for batches and long clips, on the toy networks."""

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
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_write import open_writer

FOLDER = Path(lp_edge.__file__).resolve().parent / "benchmarks"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no source tree: benchmarks are not installed")


def run(script: str, *args: object, code: int = 0) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return (json.loads(done.stdout) if done.stdout else {}), done.stderr


def frame(x: int | None = 100) -> np.ndarray:
    out = np.zeros((200, 240, 3), np.uint8)
    if x is not None:
        out[60:140, x - 40 : x + 40] = 255
    return out


def clip(path: Path, xs: list[int | None]) -> Path:
    with open_writer(path, (240, 200), Fraction(25)) as writer:
        for x in xs:
            writer.write(frame(x))
    return path


def test_a_batch_is_compared_with_its_parts(toy_bundle: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_image(tmp_path / f"{name}.png", frame())
    driver = clip(tmp_path / "d.mp4", [100 + i for i in range(6)])
    sources = ("--source", tmp_path / "a.png", "--source", tmp_path / "b.png")
    report, _ = run(
        "batch", *sources, "--driving", driver, "--frames", 15, "--repeat", 2, "--bundle", toy_bundle
    )
    assert report["sources"] == ["a.png", "b.png"]
    assert len(report["rounds"]) == 2
    for one in report["rounds"]:
        assert one["motions"] == 1
        assert one["frames"] == [15, 15]
        assert len(one["render_s"]) == 2
        whole = one["batch_s"] / (sum(one["render_s"]) + one["motion_s"])
        assert one["ratio"] == pytest.approx(whole, rel=0.02)
        assert 0 < one["batch_motion_s"] < one["batch_s"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "d.mp4", "toy_bundle"]


def test_a_batch_that_fails_says_why(toy_bundle: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "dark.png", frame(None))
    driver = clip(tmp_path / "d.mp4", [100] * 3)
    args = ("--source", tmp_path / "dark.png", "--driving", driver, "--frames", 3, "--bundle", toy_bundle)
    assert "no face" in run("batch", *args, code=4)[1]
    assert "--repeat" in run("batch", "--repeat", 0, code=2)[1]


def test_a_long_clip_comes_out_as_long_as_it_was(toy_bundle: Path, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mp4", [100 + i for i in range(7)])
    driver = clip(tmp_path / "d.mp4", [100, 104, 108])
    report, _ = run(
        "v2v", "--source", source, "--driving", driver, "--frames", 10, "--frames", 40, "--bundle", toy_bundle
    )
    assert [one["frames"] for one in report["runs"]] == [10, 40]
    for one in report["runs"]:
        assert one["frames_off"] == 0
        assert abs(one["audio_off"]) <= 1
        assert one["result"]["frames"] == one["source"]["frames"] == one["frames"]
        assert one["result"]["audio_seconds"] == pytest.approx(one["frames"] * 1001 / 30000, abs=0.04)
        assert one["peak_mib"] > 30
    assert report["ratio"] >= 1.0
    assert "--rate" in run("v2v", "--rate", "0", code=2)[1]
