"""The example programs run, against a real server of the toy networks, and do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("grpc_health")
pytest.importorskip("prometheus_client")

import lp_edge
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.tests.client.conftest import server, target

__all__ = ["server", "target"]

EXAMPLES = Path(lp_edge.__file__).resolve().parent / "examples"
pytestmark = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason="no source tree: lp_edge is installed from a wheel"
)
Run = Callable[..., subprocess.CompletedProcess[str]]


def face(x: int = 100) -> np.ndarray:
    out = np.zeros((200, 240, 3), np.uint8)
    out[60:140, x - 40 : x + 40] = 255
    return out


@pytest.fixture
def run(tmp_path: Path, target: str) -> Run:
    """Runs an example in a folder with a portrait and a clip of 12 frames."""
    write_image(tmp_path / "face.png", face())
    write_image(tmp_path / "other.png", face(110))
    with open_writer(tmp_path / "drive.mp4", (240, 200), Fraction(25)) as writer:
        for i in range(12):
            writer.write(face(90 + 2 * i))

    def call(name: str, *args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / name), *map(str, args), "--target", target]
        environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    return call


def test_stream_clip(run: Run, tmp_path: Path) -> None:
    done = run("stream_clip.py", "face.png", "drive.mp4", "-o", "out.mp4", "--frames", 10)
    assert done.returncode == 0, done.stderr
    assert "lossless, shared memory" in done.stdout and "10 frames, 0 dropped" in done.stdout
    assert probe(tmp_path / "out.mp4").frames == 10
    done = run("stream_clip.py", "face.png", "drive.mp4")
    assert done.returncode == 2 and "-o FILE" in done.stderr


def test_motion_driver(run: Run, tmp_path: Path, _toy_bundle_once: Path) -> None:
    canonical = _toy_bundle_once / "canonical.npz"
    done = run("motion_driver.py", "face.png", "out.mp4", "--seconds", 1, "--canonical", canonical)
    assert done.returncode == 0, done.stderr
    assert "25 frames from 11 numbers each" in done.stdout  # the toy's basis has one direction
    with VideoReader(tmp_path / "out.mp4") as reader:
        frames = [f.rgb.astype(int) for f in reader]
    assert len(frames) == 25 and max(np.abs(f - frames[0]).max() for f in frames) > 3, "it moves"


def test_asyncio_many(run: Run, tmp_path: Path) -> None:
    done = run("asyncio_many.py", "drive.mp4", "results", "face.png", "other.png")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"face.mp4", "other.mp4"}
    assert probe(tmp_path / "results" / "face.mp4").frames == 12 and done.stdout.count("12 frames") == 2


def test_they_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path.name
