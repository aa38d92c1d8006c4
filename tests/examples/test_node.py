"""The Node.js example against a real server: what a client in another language gets."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

import lp_edge
from lp_edge.tests.npm import lock_faults, npm_ci

grpc = pytest.importorskip("grpc")

from lp_edge.proto.v1 import portraits_pb2, portraits_pb2_grpc
from lp_edge.tests.runtime.server.conftest import Pki, ServeProcess

ROOT = Path(lp_edge.__file__).resolve().parent
EXAMPLE = ROOT / "examples" / "node"
SECONDS = 60.0
TOKEN = "0123456789abcdef-example"

pytestmark = pytest.mark.skipif(
    not EXAMPLE.is_dir(), reason="no source tree: lp_edge is installed from a wheel"
)


@dataclass(frozen=True)
class Ended:
    """How a run of the example ended.

    Attributes:
        code: its exit code.
        out: the line of JSON on standard output; empty = there was none.
        err: standard error.
    """

    code: int
    out: dict[str, Any]
    err: str

    @property
    def error(self) -> dict[str, Any]:
        """What it says about a failed call."""
        assert self.code == 1, self
        found: dict[str, Any] = json.loads(self.err.splitlines()[-1])["error"]
        return found


class Example:
    """The installed example."""

    def __init__(self, node: str, folder: Path) -> None:
        self._command = [node, str(folder / "client.mjs"), "--proto", str(ROOT / "proto")]

    def start(self, *args: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [*self._command, *map(str, args)]
        # No proxy, and none of the developer's variables: the connection stays on this machine.
        clean = {"PATH": "/usr/bin:/bin", **(environment or {})}
        return subprocess.Popen(command, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @staticmethod
    def end(process: subprocess.Popen[str]) -> Ended:
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        return Ended(process.returncode, json.loads(out) if out.startswith("{") else {}, err)

    def run(self, *args: object, environment: dict[str, str] | None = None) -> Ended:
        return self.end(self.start(*args, environment=environment))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (18, 3):
        pytest.skip(f"Node.js is {version.strip()}, the example needs 18.3")
    folder = tmp_path_factory.mktemp("node") / "example"
    npm_ci(EXAMPLE, folder, "@grpc/grpc-js/package.json")
    return Example(node, folder)


def serve(bundle: Path, folder: Path, *options: object, **environment: str) -> ServeProcess:
    networks = ("--bundle", bundle, "--backend", "cpu", "--threads", "1")
    args = ["--listen", "127.0.0.1:0", "--json", *map(str, (*networks, *options))]
    server = ServeProcess(args, environment, folder / "serve.log")
    try:
        server.wait_ready()
    except BaseException:
        server.end()
        raise
    return server


@pytest.fixture(scope="module")
def server(_toy_bundle_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server without token; at the end no portrait and no stream may be left, and it must end well."""
    process = serve(_toy_bundle_once, tmp_path_factory.mktemp("server"))
    try:
        yield str(process.ready["grpc"])
        with grpc.insecure_channel(process.ready["grpc"]) as channel:
            stub = portraits_pb2_grpc.PortraitServiceStub(channel)
            assert not stub.ListPortraits(portraits_pb2.ListPortraitsRequest(), timeout=SECONDS).portraits
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.log
    finally:
        process.end()


def square(x: int) -> npt.NDArray[np.uint8]:
    """A face for the toys (tests/toys/make_toys.py), bright but not so bright that a change upwards is clipped."""
    picture = np.zeros((200, 240, 3), np.uint8)
    picture[60:140, x - 40 : x + 40] = 240
    return picture


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    path = tmp_path / "portrait.png"
    assert cv2.imwrite(str(path), square(100))
    return path


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    for index in range(8):
        assert cv2.imwrite(str(folder / f"{index}.jpg"), square(100 + 4 * index))
    return folder


def pictures(folder: Path) -> dict[int, npt.NDArray[np.uint8]]:
    """The results by number; all of them must be JPEG files."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        assert data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9"), path.name
        found[int(path.stem)] = np.asarray(cv2.imread(str(path)), np.uint8)
    return found


def test_packages_are_pinned_and_come_from_the_public_registry() -> None:
    assert lock_faults(EXAMPLE) == []


def test_motion_alone_drives_a_portrait(
    example: Example, server: str, portrait: Path, tmp_path: Path
) -> None:
    ended = example.run(
        *("--target", server, "--portrait", portrait, "--motion", "--mode", "lossless"),
        *("--count", 30, "--out", tmp_path / "out"),
    )
    assert ended.code == 0, ended
    assert (ended.out["sent"], ended.out["frames"], ended.out["skipped"]) == (30, 30, 0)
    assert ended.out["face_states"] == {"motion": 30}
    assert 0 < ended.out["latency_ms"]["p50"] <= ended.out["latency_ms"]["p99"]
    assert ended.out["cancelled"] is False
    found = pictures(tmp_path / "out")
    assert list(found) == list(range(1, 31))
    assert {picture.shape for picture in found.values()} == {(200, 240, 3)}
    # The toy adds the way of the keypoints to the colours: x to red, y to green. The first motion stands for rest; the nod is down
    # at a quarter of its 1.43 s (frame 10) and up at three quarters (28), while the head turns to the right of the picture.
    rest, down, up = (found[i][70:130, 70:130].mean((0, 1))[::-1] for i in (1, 10, 28))
    assert abs(rest - 240).max() < 2
    assert (down - rest)[1] > 4
    assert (up - rest)[1] < -4
    assert (up - rest)[0] > 4


def test_pictures_drive_a_portrait(
    example: Example, server: str, portrait: Path, frames: Path, tmp_path: Path
) -> None:
    ended = example.run(
        "--target", server, "--portrait", portrait, "--frames", frames, "--out", tmp_path / "out"
    )
    assert ended.code == 0, ended
    assert (ended.out["sent"], ended.out["frames"]) == (8, 8)
    assert ended.out["face_states"] == {"tracked": 8}
    assert list(pictures(tmp_path / "out")) == list(range(1, 9))


def test_a_live_stream_accounts_for_every_frame(
    example: Example, server: str, portrait: Path, tmp_path: Path
) -> None:
    ended = example.run(
        *("--target", server, "--portrait", portrait, "--motion", "--mode", "live"),
        *("--fps", 1000, "--count", 200, "--out", tmp_path / "out"),
    )
    assert ended.code == 0, ended
    assert ended.out["frames"] + ended.out["skipped"] == ended.out["sent"] == 200
    assert ended.out["frames"] == len(pictures(tmp_path / "out")) >= 1
    assert 200 in pictures(tmp_path / "out")  # the newest is always answered


def test_errors_are_told_with_their_detail(
    example: Example, server: str, portrait: Path, tmp_path: Path
) -> None:
    out = ("--motion", "--out", tmp_path / "out")
    lost = example.run("--target", server, "--portrait-id", "there-is-none", *out).error
    assert (lost["status"], lost["detail"]["type"]) == ("NOT_FOUND", "NotFoundError")
    assert "there" in lost["detail"]["got"]

    text = tmp_path / "text.jpg"
    text.write_text("no picture at all")
    broken = example.run("--target", server, "--portrait", text, *out).error
    assert (broken["status"], broken["detail"]["type"]) == ("INVALID_ARGUMENT", "MediaError")
    assert broken["detail"]["remedy"]

    empty = tmp_path / "empty.png"
    cv2.imwrite(str(empty), np.zeros((64, 64, 3), np.uint8))
    faceless = example.run("--target", server, "--portrait", empty, *out).error
    assert (faceless["status"], faceless["detail"]["type"]) == ("FAILED_PRECONDITION", "NoFaceError")

    nobody = example.run("--target", f"unix:{tmp_path}/nobody.sock", "--portrait", portrait, *out).error
    assert nobody["status"] == "UNAVAILABLE"
    assert "detail" not in nobody


def test_a_broken_frame_ends_a_lossless_stream_and_not_a_live_one(
    example: Example, server: str, portrait: Path, frames: Path, tmp_path: Path
) -> None:
    (frames / "3.jpg").write_bytes((frames / "3.jpg").read_bytes()[:200])
    common = ("--target", server, "--portrait", portrait, "--frames", frames)
    error = example.run(*common, "--out", tmp_path / "lossless").error
    assert (error["status"], error["detail"]["type"]) == ("INVALID_ARGUMENT", "MediaError")
    ended = example.run(*common, "--mode", "live", "--fps", 4, "--out", tmp_path / "live")
    assert ended.code == 0, ended
    assert ended.out["undecodable"] == 1
    assert ended.out["frames"] + ended.out["skipped"] == 8


def test_a_deadline_ends_the_stream(example: Example, server: str, portrait: Path, tmp_path: Path) -> None:
    many = ("--motion", "--count", 10**6, "--deadline", 0.7, "--out", tmp_path / "out")
    error = example.run("--target", server, "--portrait", portrait, *many).error
    assert error["status"] == "DEADLINE_EXCEEDED"


def start_long(example: Example, server: str, portrait: Path, out: Path) -> subprocess.Popen[str]:
    """A run that would last for hours, once it has its first answer."""
    process = example.start(
        "--target", server, "--portrait", portrait, "--motion", "--count", 10**6, "--out", out
    )
    until = time.monotonic() + SECONDS
    while not (out / "000001.jpg").exists() and time.monotonic() < until:
        assert process.poll() is None, example.end(process)
        time.sleep(0.02)
    return process


def test_ctrl_c_cancels_the_call(example: Example, server: str, portrait: Path, tmp_path: Path) -> None:
    process = start_long(example, server, portrait, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    ended = example.end(process)
    assert ended.code == 130, ended
    assert ended.out["cancelled"] is True
    assert ended.out["frames"] >= 1


def test_a_server_that_dies_is_told(
    example: Example, _toy_bundle_once: Path, portrait: Path, tmp_path: Path
) -> None:
    server = serve(_toy_bundle_once, tmp_path)
    try:
        process = start_long(example, server.ready["grpc"], portrait, tmp_path / "out")
        server.send(signal.SIGKILL)
        assert example.end(process).error["status"] == "UNAVAILABLE"
    finally:
        server.end()


def test_tls_and_tokens(example: Example, _toy_bundle_once: Path, portrait: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: no certificates to test with")
    (tmp_path / "pki").mkdir()
    pki = Pki(tmp_path / "pki", openssl)
    authority = pki.authority()
    pair = pki.issue("server", authority)
    tls = ("--tls-cert", pair.certificate, "--tls-key", pair.key)
    process = serve(_toy_bundle_once, tmp_path, *tls, LP_EDGE_TOKENS=TOKEN)
    try:
        # By name: Node.js warns where TLS names an address.
        address = process.ready["grpc"].replace("127.0.0.1", "localhost")
        # By name: Node.js warns where TLS names an address.
        address = process.ready["grpc"].replace("127.0.0.1", "localhost")
        common = ("--target", address, "--portrait", portrait, "--motion", "--count", 3, "--mode", "lossless")
        common += ("--out", tmp_path / "out")
        trusted = (*common, "--ca", authority.certificate)
        token = ("--token-env", "TOKEN")

        good = example.run(*trusted, *token, environment={"TOKEN": TOKEN})
        assert good.code == 0, good
        assert good.out["frames"] == 3
        for args, given in ((token, TOKEN[:-1] + "x"), ((), "")):
            refused = example.run(*trusted, *args, environment={"TOKEN": given}).error
            assert (refused["status"], refused["detail"]["type"]) == ("UNAUTHENTICATED", "AccessError")
            assert TOKEN not in json.dumps(refused)
        stranger = example.run(
            *common, "--ca", pki.authority("other").certificate, *token, environment={"TOKEN": TOKEN}
        ).error
        assert stranger["status"] == "UNAVAILABLE"
        assert TOKEN not in process.log
    finally:
        process.end()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--motion"], "--out"),
        (["--motion", "--out", "x"], "--portrait"),
        (["--portrait", "p.jpg", "--out", "x"], "--motion"),
        (["--portrait", "p.jpg", "--out", "x", "--motion", "--fps", "nan"], "--fps"),
        (["--portrait", "p.jpg", "--out", "x", "--motion", "--mode", "fast"], "--mode"),
        (["--portrait", "p.jpg", "--out", "x", "--motion", "--token-env", "NOT_SET"], "NOT_SET"),
        (
            [
                "--portrait",
                "p.jpg",
                "--out",
                "x",
                "--motion",
                "--target",
                "far.test:1",
                "--token-env",
                "TOKEN",
            ],
            "--ca",
        ),
        (["--portrait", "p.jpg", "--out", "x", "--motion"], "p.jpg"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_wrong_arguments_are_refused(example: Example, args: list[str], says: str) -> None:
    ended = example.run(*args, environment={"TOKEN": TOKEN})
    assert ended.code == 2
    assert says in ended.err.splitlines()[0]


def test_help_names_every_option(example: Example) -> None:
    process = example.start("--help")
    out, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    for option in (
        "--portrait",
        "--motion",
        "--frames",
        "--out",
        "--target",
        "--token-env",
        "--ca",
        "--deadline",
    ):
        assert option in out
