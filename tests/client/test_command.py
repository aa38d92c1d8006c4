"""``lp-client`` against a real server: results, messages, exit codes, and that nothing half-written stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

pytest.importorskip("grpc")

from lp_edge.client import Client, command
from lp_edge.client.sources import open_source
from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_read import probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.templates import load_template

Call = Callable[..., tuple[int, str, str]]


def face(x: int = 100) -> np.ndarray:
    out = np.zeros((200, 240, 3), np.uint8)
    out[60:140, x - 40 : x + 40] = 255
    return out


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], target: str) -> Call:
    """Runs lp-client in this process: exit code, standard output, standard error."""

    def run(*args: object, at: str | None = target) -> tuple[int, str, str]:
        words = [str(a) for a in args] + (["--target", at] if at else [])
        with pytest.raises(SystemExit) as ended:
            command.client.main(words, prog_name="lp-client")
        out = capfd.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return run


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with inputs to run in."""
    folder = tmp_path / "work"
    (folder / "in").mkdir(parents=True)
    write_image(folder / "in" / "face.png", face())
    with open_writer(folder / "in" / "drive.mp4", (240, 200), Fraction(25)) as writer:
        for i in range(12):
            writer.write(face(90 + 2 * i))
    with open_writer(folder / "in" / "still.mp4", (240, 200), Fraction(25)) as writer:
        for _ in range(5):
            writer.write(np.zeros_like(face()))
    monkeypatch.chdir(folder)
    monkeypatch.delenv(command.TOKEN_VARIABLE, raising=False)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_info(call: Call, target: str) -> None:
    code, out, err = call("info")
    assert code == 0 and target in out and "mesh toy" in out and "templates: nod" in out and err == ""
    code, out, _ = call("info", "--json")
    found = json.loads(out)
    assert (
        code == 0 and found["ok"] and found["limits"]["max_streams"] > 0 and "neutral" not in found["motion"]
    )
    assert call("info", "--quiet")[:2] == (0, "")


def test_portraits(call: Call, work: Path) -> None:
    code, out, _ = call("portrait", "register", "in/face.png", "--size", 256, "--ttl", 60)
    name = out.strip()
    assert code == 0 and len(name) == 22
    assert name in call("portrait", "list")[1]
    found = json.loads(call("portrait", "list", "--json")[1])["portraits"]
    assert [p["width"] for p in found if p["id"] == name] == [240]
    code, _, _ = call("animate", "-p", name, "-d", "in/drive.mp4", "-o", "out.mp4", "--quiet")
    assert code == 0 and probe("out.mp4").frames == 12
    assert name in call("portrait", "list")[1], "one that was registered before stays"
    assert call("portrait", "delete", name)[:2] == (0, "")
    code, _, err = call("portrait", "delete", name)
    assert code == 11 and "no portrait" in err and "to fix it" in err
    code, out, _ = call("portrait", "register", "in/face.png", "--json")
    assert json.loads(out)["faces"][0]["score"] > 0
    call("portrait", "delete", json.loads(out)["id"])


@pytest.mark.parametrize(
    "name", ["-3IL0hgdNrJLbQAI-yafvw", "--vq0hgdNrJLbQAI-yafvw", "3IL0hgdNrJLbQAI-yafvw-"]
)
def test_ids_that_look_like_options(call: Call, work: Path, name: str) -> None:
    for args in (("portrait", "delete", name), ("animate", "-p", name, "-d", "nod", "-o", "a.mp4")):
        code, _, err = call(*args)
        assert code == 11 and "no portrait" in err and name[:6] in err


def test_animate_a_clip(call: Call, work: Path, target: str) -> None:
    code, out, err = call("animate", "-p", "in/face.png", "-d", "in/drive.mp4", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["output"] == "face--drive.mp4"
    assert (found["frames"], found["answers"], found["dropped"], found["width"]) == (12, 12, 0, 240)
    assert (
        found["mode"] == "lossless"
        and found["transport"] == "shared memory"
        and found["faces"] == {"tracked": 12}
    )
    assert found["round_trip_ms"]["count"] == 12 and "warp" in found["stages_ms"]
    assert probe("face--drive.mp4").fps == 25 and probe("face--drive.mp4").frames == 12
    with Client(target) as client:
        assert client.portraits() == (), "the command's own portrait is gone"
    code, out, _ = call(
        *(
            "animate",
            "-p",
            "in/face.png",
            "-d",
            "in/drive.mp4",
            "-o",
            "frames",
            "--shared-memory",
            "off",
            "--frames",
            3,
        )
    )
    assert code == 0 and "3 frames" in out and "messages (shared_memory=False)" in out
    assert names(work / "frames") == ["000000.png", "000001.png", "000002.png"]


def test_animate_live(call: Call, work: Path) -> None:
    start = time.monotonic()
    code, out, _ = call(
        "animate", "-p", "in/face.png", "-d", "in/drive.mp4", "--live", "-o", "out.mp4", "--json"
    )
    found = json.loads(out)
    assert code == 0 and found["mode"] == "live" and time.monotonic() - start > 11 / 25
    assert found["answers"] + found["dropped"] == 12
    assert probe("out.mp4").frames == 12, "a frame that was dropped is filled by the one before"


def test_animate_with_motion_and_pictures(call: Call, work: Path) -> None:
    code, out, _ = call("animate", "-p", "in/face.png", "-d", "nod", "-o", "nod.mp4", "--frames", 5, "--json")
    assert code == 0 and json.loads(out)["faces"] == {"motion": 5} and probe("nod.mp4").frames == 5
    code, _, _ = call("animate", "-p", "in/face.png", "-d", "in/face.png", "-o", "one.png", "--edit", "yaw=5")
    assert code == 0 and (work / "one.png").exists()


def test_animate_to_standard_output(server: Any, work: Path) -> None:
    args = ("animate", "-p", "in/face.png", "-d", "in/drive.mp4", "-o", "-", "--target", server.ready["grpc"])
    code = "from lp_edge.client.command import client; client(prog_name='lp-client')"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, check=True)
    (work / "out.mjpeg").write_bytes(done.stdout)
    assert done.stdout.count(b"\xff\xd8\xff") == 12 and b"12 frames" in done.stderr
    with av.open(str(work / "out.mjpeg"), format="mjpeg") as container:
        assert len(list(container.decode(video=0))) == 12


def test_motion(call: Call, work: Path) -> None:
    code, out, _ = call("motion", "in/drive.mp4", "-o", "drive.npz", "--neutral", 2)
    assert code == 0 and "drive.npz" in out
    template = load_template("drive.npz")
    assert len(template) == 12 and template.neutral == 2
    code, out, _ = call("motion", "in/drive.mp4", "-o", "-")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 12 and rows[0]["face_state"] == "tracked"
    assert rows[-1]["translation"][0] > rows[0]["translation"][0]
    assert json.loads(call("motion", "in/drive.mp4", "-o", "a.npz", "--json")[1]) == {
        "ok": True,
        "output": "a.npz",
    }
    assert call("motion", "in/drive.mp4", "-o", "a.txt")[0] == 2


def test_render(call: Call, work: Path) -> None:
    code, out, _ = call("render", "-p", "in/face.png", "-d", "in/drive.mp4", "--json")
    found = json.loads(out)
    assert code == 0 and found["frames"] == 12 and found["frame_rate"] == [25, 1]
    assert probe("face--drive.mp4").frames == 12
    code, out, _ = call("render", "-p", "in/face.png", "-d", "blink", "-o", "b.mp4", "--multiplier", 0.5)
    assert code == 0 and "b.mp4" in out


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("info", "--no-such-option"), 2, "No such option"),
        (("animate", "-p", "none.png", "-d", "in/drive.mp4"), 3, "does not exist"),
        (("animate", "-p", "in/face.png", "-d", "none.mp4"), 3, "none.mp4"),
        (("animate", "-p", "in/face.png", "-d", "camera:97"), 3, "camera 97"),
        (("animate", "-p", "A" * 22, "-d", "in/drive.mp4"), 11, "no portrait"),
        (("animate", "-p", "in/face.png", "-d", "nod", "-o", "a.txt"), 8, "suffix"),
        (("animate", "-p", "in/face.png", "-d", "nod", "-o", "none/a.mp4"), 8, "folder"),
        (("animate", "-p", "in/face.png", "-d", "nod", "-o", "-", "--json"), 2, "standard output"),
        (("animate", "-p", "in/face.png", "-d", "nod", "--multiplier", "9"), 2, "multiplier"),
        (("animate", "-p", "in/face.png", "-d", "nod", "--eye-retargeting"), 2, "liveportrait"),
        (("render", "-p", "in/face.png", "-d", "sneeze"), 3, "sneeze"),
        (("info", "--token-file", "none"), 2, "none"),
        (("info", "--tls-cert", "in/face.png"), 2, "key"),
        (("info", "--reconnect", "-1"), 2, "reconnect"),
        (("animate", "-p", "in/face.png", "-d", "in/still.mp4"), 4, "no face in any of the 5 frames"),
        (("animate", "-p", "in/face.png", "-d", "camera:x"), 2, "camera:x"),
        (("animate", "-p", "in/face.png", "-d", "nod", "--crf", "99"), 2, "crf"),
        (("animate", "-p", "in/face.png", "-d", "nod", "--fps", "nan"), 2, "fps"),
        (("render", "-p", "in/face.png", "-d", "nod", "-o", "a.webm"), 2, ".mp4"),
    ],
)
def test_wrong_input(call: Call, work: Path, args: tuple[str, ...], code: int, text: str) -> None:
    before = names(work)
    got, out, err = call(*args)
    assert got == code and text in (err or out) and "Traceback" not in err
    assert names(work) == before


@pytest.mark.parametrize(
    "target", ["localhost", "127.0.0.1:99999", "http://127.0.0.1:50051", "::1:50051", ""]
)
def test_targets_that_are_none(call: Call, target: str) -> None:
    code, _, err = call("info", f"--target={target}", at=None)
    assert code == 2 and "expected host:port" in err


def test_a_full_device(server: Any, work: Path) -> None:
    args = ("animate", "-p", "in/face.png", "-d", "in/drive.mp4", "-o", "-", "--target", server.ready["grpc"])
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from lp_edge.client.command import client; client()", *args],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 8 and "standard output cannot be written" in done.stderr


def test_nobody_listens(call: Call) -> None:
    code, _, err = call("info", "--target", "127.0.0.1:1", "--reconnect", 0, at=None)
    assert code == 13 and "127.0.0.1:1" in err and "lp-serve" in err
    code, out, _ = call("info", "--target", "127.0.0.1:1", "--reconnect", 0, "--json", at=None)
    assert code == 13 and json.loads(out)["error"]["type"] == "ServerUnavailable"


def test_tokens(
    call: Call, lp_serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "a-token-of-some-length"
    server = lp_serve(environment={"LP_EDGE_TOKENS": token})
    at = server.ready["grpc"]
    (tmp_path / "token").write_text(f"# the server's\n\n{token}\n")
    assert call("info", at=at)[0] == 12
    assert call("info", "--token-file", tmp_path / "token", at=at)[0] == 0
    monkeypatch.setenv(command.TOKEN_VARIABLE, token)
    assert call("info", at=at)[0] == 0
    (tmp_path / "empty").write_text("# nothing\n")
    assert call("info", "--token-file", tmp_path / "empty", at=at)[0] == 2
    assert call("info", at="10.1.2.3:50051")[0] == 2, "not in the clear to another machine"


def test_stopping_leaves_nothing_behind(server: Any, work: Path) -> None:
    code = "from lp_edge.client.command import client; client(prog_name='lp-client')"
    with open_writer(work / "long.mp4", (240, 200), Fraction(25)) as writer:
        for i in range(250):
            writer.write(face(90 + i % 40))
    args = ("animate", "-p", "in/face.png", "-d", "long.mp4", "--live", "-o", "out.mp4")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args, "--target", server.ready["grpc"]],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not list(work.glob(".out*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "stopped" in err
    assert names(work) == ["in", "long.mp4"]


def test_help_costs_nothing() -> None:
    for words in (
        (),
        ("animate",),
        ("render",),
        ("motion",),
        ("info",),
        ("portrait",),
        ("portrait", "register"),
    ):
        code = "from lp_edge.client.command import client; client(prog_name='lp-client')"
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code, *words, "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0 and "Exit codes" in done.stdout) or words == ("portrait",)
        assert not [
            line
            for line in done.stderr.splitlines()
            if line.split("|")[-1].strip() in ("grpc", "cv2", "numpy")
        ]


# -- sources ------------------------------------------------------------------------------------------------


def test_sources(work: Path) -> None:
    clip = open_source("in/drive.mp4")
    assert (clip.name, clip.rate, clip.expected, clip.size, clip.audio) == ("drive", 25, 12, (240, 200), None)
    assert [round(t, 2) for t, _ in clip.frames()][:3] == [0.0, 0.04, 0.08]
    assert len(list(clip.frames())) == 12, "it can be begun again"
    paced = open_source("in/drive.mp4", paced=True)
    start = time.monotonic()
    assert len(list(paced.frames())) == 12 and time.monotonic() - start >= 11 / 25
    template = open_source("nod")
    assert template.size == (0, 0) and all(isinstance(m, Motion) for _, m in template.frames())
    assert template.expected == len(list(template.frames()))
    assert open_source("in/face.png").expected == 1
    (work / "liveportrait.npz").write_bytes(b"PK not a template")
    with pytest.raises((MediaError, ConfigError)):
        open_source("liveportrait.npz")
    assert os.listdir(work)


def test_frames_find_their_places(work: Path) -> None:
    source = open_source("in/drive.mp4")
    placed = command._Placed("out", source, None)
    for seconds, value in ((0.0, 1), (0.08, 3), (0.081, 4), (0.2, 6)):
        placed.write(seconds, np.full((16, 16, 3), value, np.uint8))
    placed.close()
    from lp_edge.runtime.image import read_image

    values = [int(read_image(p)[0, 0, 0]) for p in sorted((work / "out").iterdir())]
    assert values == [1, 1, 3, 4, 4, 6, 6, 6, 6, 6, 6, 6]
