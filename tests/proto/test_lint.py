"""The .proto files under buf: style, comments, and what would break clients that are in use. Needs npm once, to fetch buf."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import lp_edge
from lp_edge.tests.npm import lock_faults, npm_ci

PROTO = Path(lp_edge.__file__).resolve().parent / "proto"
ANIMATION = "lp_edge/v1/animation.proto"

pytestmark = pytest.mark.skipif(
    not (PROTO / "buf.yaml").is_file(), reason="no source tree: lp_edge is installed from a wheel"
)

Buf = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def buf(tmp_path_factory: pytest.TempPathFactory) -> Buf:
    """Runs buf in a folder."""
    folder = tmp_path_factory.mktemp("buf")
    machine = {"x86_64": "x64", "aarch64": "aarch64"}.get(platform.machine())
    if platform.system() != "Linux" or machine is None:
        pytest.skip(
            f"buf is pinned for Linux on x86_64 and aarch64, not for {platform.system()} {platform.machine()}"
        )
    program = npm_ci(PROTO / "tools", folder / "tools", f"@bufbuild/buf-linux-{machine}/bin/buf")

    def run(*arguments: str, cwd: Path = PROTO) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "BUF_CACHE_DIR": str(folder / "cache")}
        command = [str(program), *arguments]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    return run


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The .proto files with their image, to be damaged."""
    folder = tmp_path / "proto"
    shutil.copytree(
        PROTO, folder, ignore=shutil.ignore_patterns("*.py", "v1/*.pyi", "node_modules", "__pycache__")
    )
    return folder


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_buf_is_pinned_and_comes_from_the_public_registry() -> None:
    assert lock_faults(PROTO / "tools") == []


def test_the_files_are_clean(buf: Buf) -> None:
    for arguments in (["lint"], ["format", "--diff", "--exit-code"]):
        done = buf(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_break_no_client_of_the_image(buf: Buf) -> None:
    done = buf("breaking", "--against", "image.binpb")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_field_without_comment_is_seen(buf: Buf, copy: Path) -> None:
    change(copy / ANIMATION, "  // Names the stream in the server's logs.\n", "")
    done = buf("lint", cwd=copy)
    assert done.returncode == 100
    assert "stream_id" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("int64 timestamp_us = 2;", "int32 timestamp_us = 2;", "timestamp_us"),
        ("string stream_id = 1;", "string stream_name = 1;", "stream_name"),
        ("string stream_id = 1;", "string stream_id = 3;", "StreamStarted"),
        ("STREAM_MODE_LOSSLESS = 2;", "STREAM_MODE_LOSSLESS = 3;", "StreamMode"),
        ("returns (stream AnimateResponse)", "returns (AnimateResponse)", "Animate"),
    ],
)
def test_a_break_is_seen(buf: Buf, copy: Path, old: str, new: str, says: str) -> None:
    change(copy / ANIMATION, old, new)
    done = buf("breaking", "--against", "image.binpb", cwd=copy)
    assert done.returncode == 100, done.stdout + done.stderr
    assert says in done.stdout


def test_an_addition_is_no_break(buf: Buf, copy: Path) -> None:
    change(
        copy / ANIMATION,
        "  string stream_id = 1;\n",
        "  string stream_id = 1;\n  // New.\n  string added = 100;\n",
    )
    assert buf("breaking", "--against", "image.binpb", cwd=copy).returncode == 0
    assert buf("lint", cwd=copy).returncode == 0
