"""The commands, on the toy networks: results, messages, exit codes, and that nothing half-written stays behind."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import wave
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import click
import numpy as np
import pytest

import lp_edge
from lp_edge import cli
from lp_edge.runtime.image import read_image, write_image
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.templates import load_template, save_template

Call = Callable[..., tuple[int, str, str]]

SECONDS = 20.0
"""A wrong input has to be refused within seconds; this leaves room for a busy machine."""


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process: exit code, standard output, standard error."""

    def run(command: click.Command, *args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            command.main([str(a) for a in args], prog_name=command.name)
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return run


def frame(x: int | None = 100, colour: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """A "face" for the toys: a bright square around (x, 100); None = no face."""
    out = np.zeros((200, 240, 3), np.uint8)
    if x is not None:
        out[60:140, x - 40 : x + 40] = colour
    return out


def clip(path: Path, xs: list[int | None], fps: Fraction = Fraction(25)) -> Path:
    with open_writer(path, (240, 200), fps) as writer:
        for x in xs:
            writer.write(frame(x))
    return path


@pytest.fixture
def work(tmp_path: Path, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with inputs (`in/`), to run in; the toy bundle is `../toy_bundle`."""
    folder = tmp_path / "work"
    (folder / "in").mkdir(parents=True)
    write_image(folder / "in" / "face.png", frame())
    clip(folder / "in" / "drive.mp4", [100 + i for i in range(12)])
    monkeypatch.chdir(folder)
    return folder


def toys(*args: object) -> tuple[object, ...]:
    return (*args, "--bundle", "../toy_bundle", "--backend", "cpu", "--threads", 1)


def everything(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*"))


# -- what works ---------------------------------------------------------------------------------------


def test_a_picture_and_a_clip_make_a_clip_with_the_default_name(call: Call, work: Path) -> None:
    code, out, err = call(cli.run, *toys("-s", "in/face.png", "-d", "in/drive.mp4"))
    assert (code, err) == (0, "")
    assert out.startswith("face--drive.mp4: 12 frames, 240x200")
    info = probe(work / "face--drive.mp4")
    assert (info.width, info.height, info.fps, info.frames) == (240, 200, 25, 12)


def test_json_is_one_object_with_all_there_is_to_know(call: Call, work: Path) -> None:
    code, out, err = call(
        cli.run,
        *toys("-s", "in/face.png", "-d", "in/drive.mp4", "-o", "r.mp4", "--save-motion", "m.npz", "--json"),
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["ok"] is True
    assert (result["output"], result["motion"], result["frames"]) == ("r.mp4", "m.npz", 12)
    assert (result["width"], result["height"], result["frame_rate"]) == (240, 200, [25, 1])
    assert result["faces"] == {"tracked": 12}
    assert {"decode", "motion", "warp", "encode"} <= set(result["stages_ms"])
    assert result["stages_ms"]["warp"]["count"] == 12
    assert result["warnings"] == []
    assert len(load_template(work / "m.npz")) == 12


def test_quiet_prints_nothing(call: Call, work: Path) -> None:
    assert call(cli.run, *toys("-s", "in/face.png", "-d", "nod", "-o", "r.gif", "--quiet")) == (0, "", "")
    assert probe(work / "r.gif").kind == "video"


def test_verbose_says_what_was_done_once(call: Call, work: Path) -> None:
    args = ("-s", "in/face.png", "-d", "in/face.png", "-o", "r.png", "--bundle", "../toy_bundle", "--verbose")
    for _ in range(2):  # a second run in the same process must not print everything twice
        code, _, err = call(cli.run, *args)
        assert code == 0
        assert err.count("backend auto picked") == 1


def test_a_picture_drives_a_picture(call: Call, work: Path) -> None:
    write_image(work / "in" / "other.png", frame(110))
    code, out, _ = call(cli.run, *toys("-s", "in/face.png", "-d", "in/other.png"))
    assert code == 0
    assert out.startswith("face--other.png: 1 frame,")
    assert read_image(work / "face--other.png").shape == (200, 240, 3)


def test_side_by_side_shows_driver_source_and_result(call: Call, work: Path) -> None:
    code, _, _ = call(
        cli.run, *toys("-s", "in/face.png", "-d", "in/drive.mp4", "-o", "r.mkv", "--side-by-side")
    )
    assert code == 0
    with VideoReader(work / "r.mkv") as reader:
        first = next(iter(reader)).rgb
    assert first.shape == (200, 3 * 240, 3)
    for panel in range(3):
        assert first[100, 240 * panel + 100].min() > 200, f"panel {panel} shows no face"


def test_the_region_option_reaches_the_result(call: Call, work: Path) -> None:
    reds = {}
    for region in ("all", "exp"):
        call(
            cli.run,
            *toys("-s", "in/face.png", "-d", "in/drive.mp4", "-o", f"{region}.mkv", "--region", region),
        )
        with VideoReader(work / f"{region}.mkv") as reader:
            reds[region] = [int(f.rgb[70, 50, 0]) for f in reader][-1]
    # the toy warp paints a face that moves to the right red; without pose it does not move
    assert reds["all"] > reds["exp"] + 4


def test_a_face_that_comes_late_or_vanishes_is_noted(call: Call, work: Path) -> None:
    clip(work / "in" / "late.mp4", [None] * 5 + [100 + i for i in range(10)] + [None] * 4)
    code, out, err = call(cli.run, *toys("-s", "in/face.png", "-d", "in/late.mp4", "-o", "r.mp4"))
    assert code == 0
    assert out.startswith("r.mp4: 19 frames")
    assert "no face in its first 5 of 19 frames" in err
    assert "lost in 4 of 19 frames" in err


def test_no_overwrite_keeps_what_is_there(call: Call, work: Path) -> None:
    args = toys("-s", "in/face.png", "-d", "nod", "-o", "r.mp4")
    assert call(cli.run, *args)[0] == 0
    before = (work / "r.mp4").read_bytes()
    code, _, err = call(cli.run, *args, "--no-overwrite")
    assert code == 8
    assert "exists" in err
    assert (work / "r.mp4").read_bytes() == before


# -- edits and batches ----------------------------------------------------------------------------------


def test_edits_alone_make_a_picture(call: Call, work: Path) -> None:
    code, out, err = call(cli.run, *toys("-s", "in/face.png", "--edit", "yaw=20,smile=0.4"))
    assert (code, err) == (0, "")
    assert out.startswith("face--edit.png: 1 frame, 240x200")
    assert (read_image(work / "face--edit.png") != read_image(work / "in" / "face.png")).any()


def test_keyframes_alone_make_a_clip_as_long_as_they_are(call: Call, work: Path) -> None:
    args = _keyframes()(work)
    code, out, _ = call(cli.run, *toys(*args))
    assert code == 0
    assert out.startswith("face--edit.mp4: 10 frames")
    assert probe(work / "face--edit.mp4").fps == 25


def test_edits_go_on_top_of_a_driver(call: Call, work: Path) -> None:
    for name, extra in (("plain", ()), ("edited", ("--edit", "yaw=20"))):
        assert (
            call(cli.run, *toys("-s", "in/face.png", "-d", "in/drive.mp4", "-o", f"{name}.mkv", *extra))[0]
            == 0
        )
    frames = []
    for name in ("plain", "edited"):
        with VideoReader(work / f"{name}.mkv") as reader:
            frames.append([f.rgb.astype(int) for f in reader])
    assert len(frames[0]) == len(frames[1]) == 12
    assert min(np.abs(a - b).max() for a, b in zip(*frames, strict=True)) > 5


def test_a_driver_for_each_face(call: Call, work: Path) -> None:
    both = np.zeros((200, 480, 3), np.uint8)
    both[60:140, 60:140, 0] = 255  # a red and a green face, see make_toys.py
    both[60:140, 340:420, 1] = 255
    write_image(work / "in" / "both.png", both)
    clip(work / "in" / "fast.mp4", [90 + 3 * i for i in range(12)])
    pair = (
        "-s",
        "in/both.png",
        "-d",
        "in/drive.mp4",
        "-d",
        "in/fast.mp4",
        "--faces",
        "left-right",
        "--no-smooth",
    )
    code, out, err = call(cli.run, *toys(*pair, "-o", "r.mkv"))
    assert code == 0, err
    assert out.startswith("r.mkv: 12 frames, 480x200")
    alone = ("-s", "in/both.png", "-d", "in/drive.mp4", "--faces", "0", "--no-smooth")
    assert call(cli.run, *toys(*alone, "-o", "left.mkv"))[0] == 0
    with VideoReader(work / "r.mkv") as reader:
        last = [f.rgb.astype(int) for f in reader][-1]
    with VideoReader(work / "left.mkv") as reader:
        left = [f.rgb.astype(int) for f in reader][-1]
    assert np.abs(last[:, :40] - left[:, :40]).max() <= 6  # the left face follows the first driver …
    assert np.abs(last[:, 340:420] - left[:, 340:420]).max() > 4  # … the right one the second
    code, out, _ = call(cli.run, *toys(*pair))
    assert out.startswith("both--drive+fast.mp4")


def test_crops_alone_have_the_size_asked_for(call: Call, work: Path) -> None:
    code, out, err = call(
        cli.run,
        *toys("-s", "in/face.png", "-d", "in/drive.mp4", "-o", "r.mp4", "--no-paste-back", "--size", 256),
    )
    assert code == 0, err
    assert out.startswith("r.mp4: 12 frames, 256x256")


def coloured(path: Path, count: int = 6) -> Path:
    """A driver for the toys of the liveportrait family: their motion is the mean colour."""
    with open_writer(path, (240, 240), Fraction(25), crf=1) as writer:
        for i in range(count):
            rgb = np.zeros((240, 240, 3), np.uint8)
            rgb[60:180, 60:180] = (255, 255 - 20 * i, 200)
            writer.write(rgb)
    return path


def test_the_options_of_liveportrait_reach_its_results(
    call: Call, work: Path, liveportrait_bundle: Path
) -> None:
    driver = coloured(work / "in" / "colours.mp4")
    usual = (
        "-s",
        "in/face.png",
        "-d",
        driver,
        "--bundle",
        liveportrait_bundle,
        "--backend",
        "cpu",
        "--no-smooth",
    )
    results = {}
    for number, extra in enumerate(
        (
            "",
            "--absolute",
            "--no-stitching",
            "--eye-retargeting",
            "--eye-retargeting --keep-pose-with-retargeting",
            "--crop-scale 1.5",
            "--edit yaw=20",
            "--driving-crop on --driving-crop-scale 1.2",
        )
    ):
        code, _, err = call(cli.run, *usual, *extra.split(), "-o", f"{number}.mkv", "--crf", 1)
        assert code == 0, err
        with VideoReader(work / f"{number}.mkv") as reader:
            frames = [f.rgb.astype(int) for f in reader]
        assert len(frames) == 6
        results[extra] = frames[-1]
    # the toys' eyes do not move, so retargeting them only drops the head motion, or keeps it
    kept = results.pop("--eye-retargeting --keep-pose-with-retargeting")
    assert np.abs(kept - results[""]).max() <= 2
    plain = results.pop("")
    for extra, last in results.items():
        assert np.abs(last - plain).max() > 2, extra


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_crops_of_liveportrait_have_the_size_asked_for(
    call: Call, work: Path, liveportrait_bundle: Path, size: int
) -> None:
    usual = ("-s", "in/face.png", "-d", "in/face.png", "--bundle", liveportrait_bundle, "--backend", "cpu")
    assert call(cli.run, *usual, "--size", size, "--no-paste-back", "-o", "crop.png")[0] == 0
    assert read_image(work / "crop.png").shape == (size, size, 3)
    assert call(cli.run, *usual, "--size", size, "-o", "whole.png")[0] == 0
    assert read_image(work / "whole.png").shape == (200, 240, 3)


def test_a_batch_of_liveportrait_reads_its_driver_once(
    call: Call, work: Path, liveportrait_bundle: Path
) -> None:
    driver = coloured(work / "in" / "colours.mp4")
    write_image(work / "in" / "other.png", frame(120))
    sources = ("-s", "in/face.png", "-s", "in/other.png", "-s", "in/drive.mp4")
    usual = (
        *sources,
        "-d",
        driver,
        "--bundle",
        liveportrait_bundle,
        "--backend",
        "cpu",
        "-o",
        "out",
        "--json",
    )
    code, out, _ = call(cli.run, *usual)
    assert code == 0, out
    report = json.loads(out)
    assert (report["done"], report["motions"]) == (3, 1)
    assert [job["frames"] for job in report["jobs"]] == [6, 6, 6]


def test_the_older_name_of_faces_still_works(call: Call, work: Path) -> None:
    args = toys("-s", "in/face.png", "-d", "in/drive.mp4", "-o", "r.mp4")
    assert call(cli.run, *args, "--face", "0")[0] == 0
    assert call(cli.run, *args, "--face", "5")[0] == 4
    assert "--face " not in call(cli.run, "--help")[1]


def test_a_batch_says_what_came_of_every_source(call: Call, work: Path) -> None:
    write_image(work / "in" / "dark.png", frame(None))
    args = toys("-s", "in/face.png", "-s", "in/dark.png", "-s", "in/drive.mp4", "-d", "nod", "-o", "out")
    code, out, err = call(cli.run, *args)
    assert code == 4
    lines = out.splitlines()
    assert lines[0].startswith("out/face--nod.mp4: 75 frames, 240x200, made in")
    assert lines[1].startswith("out/drive--nod.mp4: 12 frames")
    assert lines[2].startswith("out: 3 jobs, 2 done, 1 failed, in ")
    assert "lp-run: [2/3] in/dark.png: failed" in err
    assert "lp-run: in/dark.png: no face" in err
    assert "lp-run: in/dark.png: to fix it: " in err

    code, out, err = call(cli.run, *args, "--json")
    assert (code, err) == (4, "")
    result = json.loads(out)
    assert (result["ok"], result["done"], result["finished_before"], result["failed"]) == (False, 0, 2, 1)
    assert result["error"] == result["jobs"][1]["error"]
    assert [j["state"] for j in result["jobs"]] == ["finished before", "failed", "finished before"]
    assert [j["frames"] for j in result["jobs"]] == [75, 0, 12]

    code, out, err = call(cli.run, *args, "--no-resume", "--quiet")
    assert (code, out) == (4, "")
    assert err.startswith("lp-run: in/dark.png: no face")


def test_a_folder_or_a_list_is_a_batch(call: Call, work: Path) -> None:
    code, out, _ = call(cli.run, *toys("--batch", "in", "-d", "nod", "-o", "first"))
    assert code == 0
    assert sorted(p.name for p in (work / "first").iterdir()) == [
        "drive--nod.mp4",
        "face--nod.mp4",
        "lp-run-journal.jsonl",
    ]
    (work / "pictures").mkdir()
    for i in range(2):
        write_image(work / "pictures" / f"{i}.png", frame(100 + 10 * i))
    code, out, _ = call(cli.run, *toys("-s", "pictures", "-d", "in/drive.mp4", "-o", "out", "--json"))
    assert code == 0
    result = json.loads(out)
    assert (result["done"], result["motions"], result["output"]) == (2, 1, "out")
    assert [j["output"] for j in result["jobs"]] == ["out/0--drive.mp4", "out/1--drive.mp4"]
    (work / "jobs.csv").write_text("source,output,region\npictures/0.png,a.mp4,lip\npictures/1.png,b.gif,\n")
    code, out, _ = call(cli.run, *toys("--batch", "jobs.csv", "-d", "in/drive.mp4", "-o", "listed"))
    assert code == 0
    assert sorted(p.name for p in (work / "listed").iterdir()) == ["a.mp4", "b.gif", "lp-run-journal.jsonl"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_batch_that_is_stopped_goes_on_later(call: Call, work: Path, stop: signal.Signals) -> None:
    save_template(lp_edge.builtin_template("nod", duration=160.0), work / "in" / "long.npz")
    (work / "in" / "jobs.csv").write_text("source,driving\nface.png,nod\nface.png,long.npz\n")
    args = toys("--batch", "in/jobs.csv", "-o", "out")
    process = in_process(*args, cwd=work)
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not list((work / "out").glob(".face--long.*.part.mp4")):
        time.sleep(0.02)  # until it is writing the second
    process.send_signal(stop)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, ""), err
    assert "stopped in job 2 of 2; 1 finished results are kept in out" in err
    assert sorted(p.name for p in (work / "out").iterdir()) == ["face--nod.mp4", "lp-run-journal.jsonl"]
    (work / "in" / "jobs.csv").write_text("source,driving\nface.png,nod\nface.png,blink\n")
    code, out, _ = call(cli.run, *args)
    assert code == 0
    assert out.splitlines()[0] == "out/face--nod.mp4: finished before"
    assert out.splitlines()[-1].startswith("out: 2 jobs, 1 done, 1 finished before, in ")


@pytest.mark.parametrize("command", [cli.run, cli.export, cli.doctor, cli.bench], ids=lambda c: c.name)
def test_help_has_examples_and_exit_codes(call: Call, command: click.Command) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Examples:" in out
    assert f"    {command.name} " in out
    assert "Exit codes:" in out
    assert call(command, "--version")[1].strip() == f"lp-edge {lp_edge.__version__}"


def test_the_help_names_every_option_of_the_readme_and_the_other_way_round() -> None:
    readme = Path(lp_edge.__file__).resolve().parent / "README.md"
    if not readme.is_file():
        pytest.skip("no source tree")
    table = readme.read_text().split("## Options of lp-run")[1].split("##")[0]
    for option in cli.run.params:
        if option.name != "version" and not getattr(option, "hidden", False):
            assert any(name in table for name in option.opts if name.startswith("--")), option.opts


def test_plain_progress_is_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lp_edge.runtime.job import Progress

    now = 0.0
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    with cli.progress_bar(False) as progress:
        assert progress is not None
        for i in range(1, 121):
            now = i / 10
            progress(Progress(i, 240, now))
    assert capsys.readouterr().err.splitlines() == [
        "lp-run: 50 of 240 frames, 10.0 frames/s, 19 s left",
        "lp-run: 100 of 240 frames, 10.0 frames/s, 14 s left",
    ]


def test_a_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lp_edge.runtime.job import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with cli.progress_bar(False) as progress:
        assert progress is not None
        progress(Progress(30, 120, 1.0))
        progress(Progress(60, 120, 2.0))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "60/120 frames" in shown.err
    assert "30.0 frames/s" in shown.err


def test_every_job_of_a_batch_has_a_bar_of_its_own(
    call: Call, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(work / "in" / "dark.png", frame(None))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    sources = ("-s", "in/face.png", "-s", "in/dark.png", "-s", "in/drive.mp4")
    code, out, err = call(cli.run, *toys(*sources, "-d", "nod", "-o", "out"))
    assert code == 4
    assert "75/75 frames" in err
    assert "12/12 frames" in err
    assert "[2/3] in/dark.png: failed" in err
    assert "out/drive--nod.mp4: 12 frames" in out


# -- what is refused ------------------------------------------------------------------------------------


def _truncated(name: str) -> Callable[[Path], tuple[object, ...]]:
    def make(folder: Path) -> tuple[object, ...]:
        whole = clip(folder / "in" / "whole.mp4", [100 + i for i in range(50)]).read_bytes()
        (folder / "in" / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
        return (
            ("-s", "in/cut.mp4", "-d", "nod")
            if name == "source"
            else ("-s", "in/face.png", "-d", "in/cut.mp4")
        )

    return make


def _file(name: str, data: bytes, side: str) -> Callable[[Path], tuple[object, ...]]:
    def make(folder: Path) -> tuple[object, ...]:
        (folder / "in" / name).write_bytes(data)
        if side == "source":
            return ("-s", f"in/{name}", "-d", "in/drive.mp4")
        return ("-s", "in/face.png", "-d", f"in/{name}")

    return make


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((3 * min(width, 8) + 1) * min(height, 8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _no_face(folder: Path) -> tuple[object, ...]:
    write_image(folder / "in" / "dark.png", frame(None))
    return "-s", "in/dark.png", "-d", "in/drive.mp4"


def _faceless_driver(folder: Path) -> tuple[object, ...]:
    clip(folder / "in" / "dark.mp4", [None] * 20)
    return "-s", "in/face.png", "-d", "in/dark.mp4"


def _too_late(folder: Path) -> tuple[object, ...]:
    clip(folder / "in" / "late.mp4", [None] * 40 + [100] * 5)
    return "-s", "in/face.png", "-d", "in/late.mp4", "--face-timeout", "1"


def _faceless_picture(folder: Path) -> tuple[object, ...]:
    write_image(folder / "in" / "dark.png", frame(None))
    return "-s", "in/face.png", "-d", "in/dark.png"


def _zero_frames(folder: Path) -> tuple[object, ...]:
    with av.open(str(folder / "in" / "none.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return "-s", "in/face.png", "-d", "in/none.mp4"


def _sound_only(folder: Path) -> tuple[object, ...]:
    with wave.open(str(folder / "in" / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    return "-s", "in/face.png", "-d", "in/sound.wav"


def _npz(folder: Path) -> Path:
    path = folder / "in" / "motion.npz"
    save_template(lp_edge.builtin_template("nod"), path)
    return path


def _corrupt_npz(folder: Path) -> tuple[object, ...]:
    path = _npz(folder)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return "-s", "in/face.png", "-d", path


def _nan_npz(folder: Path) -> tuple[object, ...]:
    path = _npz(folder)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["translation"][3, 1] = np.nan
    np.savez(path, **arrays)
    return "-s", "in/face.png", "-d", path


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def _evil_pkl(folder: Path) -> tuple[object, ...]:
    (folder / "in" / "evil.pkl").write_bytes(pickle.dumps({"n_frames": _Evil()}))
    return "-s", "in/face.png", "-d", "in/evil.pkl"


def _plain(*args: object) -> Callable[[Path], tuple[object, ...]]:
    return lambda folder: args


def _usual(*args: object) -> Callable[[Path], tuple[object, ...]]:
    return lambda folder: ("-s", "in/face.png", "-d", "in/drive.mp4", *args)


def _empty_folder(folder: Path) -> tuple[object, ...]:
    (folder / "empty").mkdir()
    return "-s", "empty", "-d", "nod"


def _keyframes(*args: object) -> Callable[[Path], tuple[object, ...]]:
    def make(folder: Path) -> tuple[object, ...]:
        (folder / "in" / "keys.csv").write_text("time,smile\n0,0\n0.4,1\n")
        return "-s", "in/face.png", "--edit-file", "in/keys.csv", *args

    return make


def _list(data: bytes, *args: object) -> Callable[[Path], tuple[object, ...]]:
    def make(folder: Path) -> tuple[object, ...]:
        (folder / "in" / "jobs.csv").write_bytes(data)
        return "--batch", "in/jobs.csv", "-o", "out", *args

    return make


def _frames_folder(folder: Path) -> tuple[object, ...]:
    (folder / "in" / "notes").mkdir()
    (folder / "in" / "notes" / "diary.txt").write_text("dear diary")
    return "-s", "in/face.png", "-d", "in/drive.mp4", "-o", "in/notes"


BAD: dict[str, tuple[Callable[[Path], tuple[object, ...]], int, str]] = {
    # name: (inputs and arguments, exit code, what the message must contain)
    "no_such_source": (_plain("-s", "in/nobody.jpg", "-d", "nod"), 3, "nobody.jpg"),
    "no_such_driver": (_plain("-s", "in/face.png", "-d", "in/nothing.mp4"), 3, "nothing.mp4"),
    "source_is_an_empty_folder": (_empty_folder, 3, "holds no source"),
    "driver_is_a_folder": (_plain("-s", "in/face.png", "-d", "in"), 3, "folder"),
    "empty_source": (_file("empty.jpg", b"", "source"), 3, "empty"),
    "empty_driver": (_file("empty.mp4", b"", "driving"), 3, "empty"),
    "empty_template": (_file("empty.npz", b"", "driving"), 3, "empty"),
    "truncated_source": (_truncated("source"), 3, "cut.mp4"),
    "truncated_driver": (_truncated("driving"), 3, "cut.mp4"),
    "text_named_jpg": (_file("letter.jpg", b"Dear Sir or Madam,\n" * 9, "source"), 3, "letter.jpg"),
    "text_named_mp4": (_file("letter.mp4", b"Dear Sir or Madam,\n" * 9, "driving"), 3, "letter.mp4"),
    "one_pixel": (_file("dot.png", _png(1, 1), "source"), 3, "1x1"),
    "far_too_large": (_file("wall.png", _png(20000, 20000), "source"), 3, "20000x20000"),
    "template_as_source": (_plain("-s", "nod", "-d", "nod"), 3, "nod"),
    "no_face": (_no_face, 4, "no face"),
    "faceless_driver": (_faceless_driver, 4, "no face in any of the 20 frames"),
    "faceless_picture_driver": (_faceless_picture, 4, "no face"),
    "face_after_the_timeout": (_too_late, 4, "--face-timeout"),
    "zero_frames": (_zero_frames, 3, "none.mp4"),
    "sound_only": (_sound_only, 3, "sound.wav"),
    "corrupt_npz": (_corrupt_npz, 3, "motion.npz"),
    "random_npz": (_file("noise.npz", bytes(range(256)) * 4, "driving"), 3, "noise.npz"),
    "nan_in_npz": (_nan_npz, 3, "frame 3"),
    "pickle_with_code": (_evil_pkl, 3, "evil.pkl"),
    "output_folder_missing": (_usual("-o", "nowhere/r.mp4"), 8, "nowhere"),
    "output_is_a_foreign_folder": (_frames_folder, 8, "not empty"),
    "output_suffix": (_usual("-o", "r.txt"), 8, ".txt"),
    "motion_folder_missing": (_usual("--save-motion", "nowhere/m.npz"), 8, "nowhere"),
    "motion_suffix": (_usual("--save-motion", "m.pkl"), 2, ".npz"),
    "clip_into_a_picture": (_usual("-o", "r.png"), 2, "r.png"),
    "output_is_an_input": (_usual("-o", "in/drive.mp4"), 2, "input and output"),
    "no_source": (_plain("-d", "nod"), 2, "--source"),
    "no_driver": (_plain("-s", "in/face.png"), 2, "--demo"),
    "unknown_option": (_usual("--mouth"), 2, "--mouth"),
    "unknown_region": (_usual("--region", "mouth"), 2, "mouth"),
    "unknown_length": (_usual("--length", "both"), 2, "both"),
    "unknown_audio": (_usual("--audio", "loud"), 2, "loud"),
    "unknown_backend": (_usual("--backend", "abacus"), 2, "abacus"),
    "multiplier_too_large": (_usual("--multiplier", "9"), 2, "0.0 to 3.0"),
    "multiplier_nan": (_usual("--multiplier", "nan"), 2, "multiplier"),
    "multiplier_text": (_usual("--multiplier", "much"), 2, "much"),
    "size_too_small": (_usual("--size", "5"), 2, "128 to 2048"),
    "negative_neutral": (_usual("--neutral", "-1"), 2, "neutral"),
    "neutral_beyond_the_end": (_usual("--neutral", "5000"), 2, "5000"),
    "unknown_face": (_usual("--faces", "left"), 2, "left"),
    "face_that_is_not_there": (_usual("--faces", "7"), 4, "7"),
    "face_among_others_that_is_not_there": (_usual("--faces", "0,3"), 4, "face 3"),
    "face_twice": (_usual("--faces", "0,0"), 2, "each once"),
    "both_names_of_an_option": (_usual("--face", "0", "--faces", "all"), 2, "--face"),
    "more_drivers_than_faces": (_usual("-d", "nod", "--faces", "all"), 2, "2 drivers for 1 face"),
    "motion_of_two_drivers": (_usual("-d", "nod", "--save-motion", "m.npz"), 2, "2 drivers"),
    "unknown_edit": (_usual("--edit", "grimace=1"), 2, "grimace"),
    "edit_without_value": (_usual("--edit", "smile"), 2, "smile"),
    "edit_out_of_range": (_usual("--edit", "smile=9"), 2, "smile"),
    "empty_edit_alone": (_plain("-s", "in/face.png", "--edit", ""), 2, "neither a driver nor an edit"),
    "edit_file_missing": (_usual("--edit-file", "keys.json"), 3, "keys.json"),
    "edit_and_edit_file": (_keyframes("--edit", "smile=1"), 2, "keyframes"),
    "option_of_the_other_family": (_usual("--no-stitching"), 2, "liveportrait"),
    "face_models_of_the_other_family": (_usual("--face-models", "in"), 2, "liveportrait"),
    "face_models_missing": (_usual("--face-models", "nowhere"), 2, "nowhere"),
    "crops_of_several_faces": (_usual("--faces", "all", "--no-paste-back"), 2, "paste-back"),
    "list_missing": (_plain("--batch", "jobs.csv"), 3, "jobs.csv"),
    "list_is_no_text": (_list(b"\xff\xfe\x00"), 3, "jobs.csv"),
    "list_with_unknown_column": (_list(b"source,mouth\nface.png,1\n"), 2, "row 1: no column is called 'mouth'"),
    "list_with_wrong_row": (_list(b"source,driving,size\nface.png,nod,64\n"), 2, "jobs.csv, row 2: size is 64"),
    "list_without_a_driver": (_list(b"source\nface.png\n"), 2, "jobs.csv, row 2: neither a driver"),
    "list_and_source": (_list(b"source\nface.png\n", "-s", "in/face.png"), 2, "--source"),
    "batch_into_a_file": (_usual("-s", "in/drive.mp4", "-o", "r.mp4"), 2, "r.mp4 is no folder"),
    "batch_into_nowhere": (_usual("-s", "in/drive.mp4", "-o", "no/where"), 8, "does not exist"),
    "batch_into_its_sources": (_plain("-s", "in", "-d", "nod", "-o", "in"), 2, "both the folder of the sources"),
    "two_results_of_one_name": (_usual("-s", "in/face.png", "-o", "out"), 2, "both write"),
    "motion_of_a_batch": (_usual("-s", "in/drive.mp4", "--save-motion", "m.npz"), 2, "--save-motion"),
    "every_job_fails": (_plain("-s", "in/gone.png", "-s", "in/away.png", "-d", "nod", "-o", "out"), 3, "gone.png"),
    "crf": (_usual("--crf", "99"), 2, "99"),
    "negative_threads": (_usual("--threads", "-2"), 2, "threads"),
    "bundle_missing": (_usual("--bundle", "../no_bundle"), 5, "no_bundle"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_clearly_at_once_and_leaves_nothing(call: Call, work: Path, name: str) -> None:
    make, wanted, words = BAD[name]
    args = toys() + make(work)  # later options win, so a case may name another bundle or backend
    before = everything(work)
    started = time.monotonic()
    code, out, err = call(cli.run, *args)
    assert time.monotonic() - started < SECONDS
    assert code == wanted, err
    assert out == "" or (name == "every_job_fails" and out.startswith("out: 2 jobs, 2 failed"))
    assert words in err, err
    assert "Traceback" not in err
    assert everything(work) == before

    code, out, err = call(cli.run, *args, "--json")
    assert (code, err) == (wanted, "")
    error = json.loads(out)["error"]
    assert error["exit_code"] == wanted
    assert words in " ".join(map(str, error.values()))
    assert everything(work) == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that takes no files even from root")
def test_an_unwritable_folder(call: Call, work: Path) -> None:
    code, _, err = call(cli.run, *toys("-s", "in/face.png", "-d", "nod", "-o", "/proc/r.mp4"))
    assert code == 8
    assert "/proc/r.mp4 cannot be written" in err


def test_a_full_disk_is_noticed_before_the_work(
    call: Call, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lp_edge.runtime import media_write

    usage = media_write.shutil.disk_usage(work)._replace(free=4096)
    monkeypatch.setattr(media_write.shutil, "disk_usage", lambda _: usage)
    before = everything(work)
    code, _, err = call(cli.run, *toys("-s", "in/face.png", "-d", "nod", "-o", "r.mp4"))
    assert code == 8
    assert "4 KiB are free" in err
    assert everything(work) == before


def in_process(*args: object, setup: str = "", **options: object) -> subprocess.Popen[str]:
    """lp-run in a process of its own, through the entry point."""
    code = f"{setup}\nimport sys; from lp_edge.cli import run; run(sys.argv[1:], prog_name='lp-run')"
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_disk_that_fills_up_during_the_run_leaves_nothing(work: Path) -> None:
    rng = np.random.default_rng(0)
    noise = frame()
    noise[:50] = rng.integers(0, 120, (50, 240, 3))  # below the toys' threshold, and hard to compress
    write_image(work / "in" / "noisy.png", noise)
    before = everything(work)
    setup = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    process = in_process(
        *toys("-s", "in/noisy.png", "-d", "nod", "-o", "r.mp4", "--crf", 1), setup=setup, cwd=work
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 8, err
    assert out == ""
    assert "r.mp4 cannot be written" in err
    assert "Traceback" not in err
    assert everything(work) == before


def _lose(folder: Path) -> None:
    (folder / "face_mesh.onnx").unlink()


def _cut(folder: Path) -> None:
    path = folder / "warp_decode.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def _alter(folder: Path) -> None:
    path = folder / "face_detector.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _garble(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [(_lose, "face_mesh"), (_cut, "warp_decode"), (_alter, "face_detector"), (_garble, "manifest.json")],
)
def test_a_damaged_bundle_is_refused_by_name(
    call: Call, work: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(work.parent / "toy_bundle")
    before = everything(work)
    code, out, err = call(cli.run, *toys("-s", "in/face.png", "-d", "nod"))
    assert (code, out) == (5, "")
    assert words in err
    assert everything(work) == before


def test_a_provider_that_is_not_there_is_an_error_not_a_replacement(call: Call, work: Path) -> None:
    from lp_edge.engines.backends import available_backends

    gone = [status.name for status in available_backends() if not status.works]
    if not gone:
        pytest.skip("every backend works here")
    before = everything(work)
    code, out, err = call(
        cli.run, "-s", "in/face.png", "-d", "nod", "--bundle", "../toy_bundle", "--backend", gone[0]
    )
    assert (code, out) == (7, "")
    assert gone[0] in err
    assert "to fix it" in err
    assert everything(work) == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_half_file_and_says_so(work: Path, stop: signal.Signals) -> None:
    save_template(lp_edge.builtin_template("nod", duration=160.0), work / "in" / "long.npz")
    before = everything(work)
    process = in_process(*toys("-s", "in/face.png", "-d", "in/long.npz", "-o", "r.mp4"), cwd=work)
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not list(work.glob(".r.*.part.mp4")):
        time.sleep(0.02)  # until it is writing
    time.sleep(0.3)
    process.send_signal(stop)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert err.strip().splitlines()[-1] == "lp-run: the run was stopped; nothing was written"
    assert everything(work) == before


def test_an_unexpected_error_is_one_line_and_a_traceback_only_on_demand(
    call: Call, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lp_edge.runtime import job

    def broken(*_: object) -> None:
        raise ZeroDivisionError("over the edge")

    monkeypatch.setattr(job, "run_job", broken)
    args = toys("-s", "in/face.png", "-d", "nod")
    code, _, err = call(cli.run, *args)
    assert code == 1
    assert "unexpected ZeroDivisionError: over the edge" in err
    assert "Traceback" not in err
    assert "Traceback" in call(cli.run, *args, "--verbose")[2]


# -- the other commands -----------------------------------------------------------------------------------


def test_doctor_reports_what_works(call: Call, work: Path) -> None:
    code, out, err = call(cli.doctor, "--bundle", "../toy_bundle", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["ok"] is True
    assert {b["name"]: b["works"] for b in report["backends"]}["cpu"] is True
    code, out, _ = call(cli.doctor, "--bundle", "../toy_bundle")
    assert code == 0
    for words in ("Backends", "Encoders", "Bundle", "onnx", "libx264", "lp-run works here."):
        assert words.lower() in out.lower()


def test_doctor_fails_where_the_main_job_does(call: Call, work: Path) -> None:
    _cut(work.parent / "toy_bundle")
    code, out, _ = call(cli.doctor, "--bundle", "../toy_bundle")
    assert code == 1
    assert "does not work here" in out
    assert "warp_decode" in out


@pytest.mark.parametrize("family", ["mesh", "liveportrait"])
def test_export_without_torch_names_the_extra(
    family: str, call: Call, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("lp_edge.export.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import of a missing module looks like
    before = everything(work)
    code, _, err = call(cli.export, "--family", family, "--output", "b")
    assert code == 7
    assert "torch" in err
    assert 'pip install "lp-edge[export]"' in err
    assert everything(work) == before


def test_export_writes_a_bundle_and_reports_its_networks(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the export extra (torch) is not installed")
    code, out, err = call(cli.export, "--family", "mesh", "--output", str(tmp_path / "b"), "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["ok"] is True
    assert {row["name"] for row in report["networks"]} == {"face_detector", "face_mesh", "warp_decode"}
    warp = next(row for row in report["networks"] if row["name"] == "warp_decode")
    assert warp["parity"]["deformation_max"] < 0.02
    assert (tmp_path / "b" / "manifest.json").is_file()


def test_export_needs_a_known_family(call: Call) -> None:
    code, _, err = call(cli.export, "--family", "marble")
    assert code == 2
    assert "marble" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "neither a family nor a bundle"),
        (("--family", "mesh", "--verify", "b"), "--family together with --verify"),
        (("--verify", "b", "--compare", "b"), "--verify together with --compare"),
        (("--family", "mesh", "--fp16"), "--fp16 means nothing with --family mesh"),
        (("--family", "mesh", "--variant", "human"), "--variant means nothing"),
        (("--family", "mesh", "--weights", "w"), "--weights means nothing"),
        (("--family", "mesh", "--allow-unverified"), "--allow-unverified means nothing"),
        (("--verify", "b", "--output", "c"), "--output means nothing with --verify"),
        (("--compare", "b", "--weights", "w"), "--weights means nothing with --compare"),
        (("--family", "liveportrait", "--weights", "w", "--offline"), "--offline together with --weights"),
        (
            ("--family", "liveportrait", "--weights", "w", "--endpoint", "u"),
            "--endpoint together with --weights",
        ),
        (("--family", "liveportrait", "--offline", "--endpoint", "u"), "--offline together with --endpoint"),
        (("--family", "liveportrait", "--variant", "robot"), "robot"),
        (("--family", "liveportrait", "--flavor", "vanilla"), "vanilla"),
        (("--quantize", "b", "--fp16"), "and the fp32 one of the same weights as --reference"),
        (("--quantize", "b", "--flavor", "tensorrt8"), "flavour and fp16 are those of the bundle"),
        (("--quantize", "b", "--calibration-frames", "0"), "'--calibration-frames': 0 is not"),
    ],
)
def test_export_refuses_options_that_do_not_go_together(
    args: tuple[str, ...], words: str, call: Call, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # before any work: nothing heavy is even imported
    before = everything(work)
    code, out, err = call(cli.export, *args)
    assert (code, out) == (2, "")
    assert words in err
    assert everything(work) == before


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, dict[str, object]]]:
    """The LivePortrait export without its work: notes how it was called."""
    pytest.importorskip("torch", reason="the export extra (torch) is not installed")
    from lp_edge.engines.bundle import CheckpointEntry
    from lp_edge.export.liveportrait import build as driver

    calls: list[tuple[Path, dict[str, object]]] = []

    def build(output: Path, **options: object) -> driver.BuildReport:
        calls.append((output, options))
        options["report"]("exporting stitching")  # type: ignore[operator]
        row = driver.NetworkReport("stitching", 7, 181_000, 17, "fp32", {"delta_max": 2.5e-7}, 1.25)
        entry = CheckpointEntry("liveportrait/x.pth", "0" * 64, "MIT")
        return driver.BuildReport(
            output, "human", (row,), (entry,), "MIT AND Apache-2.0", ("stitching: mind the gap",), 3.5
        )

    monkeypatch.setattr(driver, "build", build)
    return calls


def test_export_of_liveportrait_prints_a_table(
    call: Call, work: Path, fake_build: list[tuple[Path, dict[str, object]]]
) -> None:
    code, out, err = call(cli.export, "--family", "liveportrait")
    assert code == 0
    table, licence, end = out.splitlines()
    assert table.split()[:7] == ["stitching", "7", "nodes", "0.18", "MB", "opset", "17"]
    assert "delta_max 2.5e-07" in table and "fp32" in table
    assert licence == "licence: MIT AND Apache-2.0"
    assert end == "liveportrait-human-fp32: bundle of the family liveportrait, made in 3.5 s"
    assert "exporting stitching" in err and "mind the gap" in err
    ((output, options),) = fake_build
    assert output == Path("liveportrait-human-fp32")
    assert (options["weights"], options["variant"], options["precision"]) == (None, "human", "fp32")
    assert (options["flavor"], options["offline"], options["endpoint"]) == ("main", False, None)
    assert options["allow_unverified"] is False


def test_export_of_liveportrait_hands_every_option_on(
    call: Call, work: Path, fake_build: list[tuple[Path, dict[str, object]]]
) -> None:
    args = (
        "--family",
        "liveportrait",
        "--variant",
        "animal",
        "--weights",
        "w",
        "--fp16",
        "--flavor",
        "tensorrt8",
    )
    code, out, err = call(cli.export, *args, "--allow-unverified", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["ok"], report["family"]) == (True, "liveportrait")
    assert report["bundle"] == "liveportrait-animal-fp16-tensorrt8"
    assert report["networks"][0]["parity"] == {"delta_max": 2.5e-7}
    assert report["checkpoints"][0]["licence"] == "MIT"
    assert report["warnings"] == ["stitching: mind the gap"]
    call(cli.export, "--family", "liveportrait", "--offline", "-o", "mine", "--quiet")
    call(cli.export, "--family", "liveportrait", "--endpoint", "http://mirror")
    first, second, third = (options for _, options in fake_build)
    assert (first["weights"], first["variant"], first["precision"]) == (Path("w"), "animal", "fp16")
    assert (first["flavor"], first["allow_unverified"]) == ("tensorrt8", True)
    assert (second["offline"], fake_build[1][0]) == (True, Path("mine"))
    assert third["endpoint"] == "http://mirror"


def test_export_without_the_weights_names_the_first_file(call: Call, work: Path) -> None:
    pytest.importorskip("torch", reason="the export extra (torch) is not installed")
    before = everything(work)
    code, out, err = call(cli.export, "--family", "liveportrait", "--weights", "in")
    assert (code, out) == (9, "")
    assert "appearance_feature_extractor.pth" in err
    assert everything(work) == before


def test_verify_of_a_damaged_bundle_names_the_file(call: Call, work: Path) -> None:
    pytest.importorskip("torch", reason="the export extra (torch) is not installed")
    _cut(work.parent / "toy_bundle")
    code, _, err = call(cli.export, "--verify", "../toy_bundle")
    assert code == 5
    assert "warp_decode.onnx" in err


def test_verify_tells_the_family_and_its_parity(
    call: Call, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the export extra (torch) is not installed")
    from lp_edge.export import verify

    row = {
        "name": "warp_decode",
        "nodes": 3,
        "size": 9,
        "opset": 17,
        "parity": {"image_max": 1.0},
        "seconds": 0.5,
    }
    seen: list[object] = []

    def check(path: Path, *, weights: Path | None, report: object) -> dict[str, object]:
        seen.append((path, weights))
        return {"family": "mesh", "networks": [row], "seconds": 2.0}

    monkeypatch.setattr(verify, "verify_bundle", check)
    code, out, _ = call(cli.export, "--verify", "b")
    assert code == 0
    assert "image_max 1" in out
    assert out.splitlines()[-1] == "b: bundle of the family mesh, verified in 2.0 s"
    assert json.loads(call(cli.export, "--verify", "b", "--weights", "w", "--json")[1])["family"] == "mesh"
    assert seen == [(Path("b"), None), (Path("b"), Path("w"))]


def test_compare_needs_a_bundle_of_the_family(call: Call, work: Path) -> None:
    pytest.importorskip("torch", reason="the export extra (torch) is not installed")
    code, _, err = call(cli.export, "--compare", "../toy_bundle")
    assert code == 5
    assert "family mesh" in err


def test_downloads_report_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    with cli._download_progress(False) as progress:
        assert progress is not None
        for i in range(1, 13):
            now = float(i)
            progress("liveportrait/m.pth", i * 1_000_000, None if i < 8 else 112_500_000)
    assert capsys.readouterr().err.splitlines() == [
        "lp-export: liveportrait/m.pth: 5.0 MB",
        "lp-export: liveportrait/m.pth: 10.0 of 112.5 MB",
    ]


def test_downloads_show_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with cli._download_progress(False) as progress:
        assert progress is not None
        progress("liveportrait/m.pth", 30_000_000, 60_000_000)
        progress("liveportrait/m.pth", 60_000_000, 60_000_000)
        progress("liveportrait/g.pth", 10_000_000, None)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "m.pth" in shown.err and "g.pth" in shown.err and "60.0/60.0 MB" in shown.err


def test_bench_run_prints_json_lines(call: Call, work: Path) -> None:
    code, out, err = call(cli.bench, "run", *toys("-s", "in/face.png", "-d", "in/drive.mp4", "--warmup", 3))
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    stages = {record["stage"]: record for record in records}
    assert {"decode", "motion", "compose", "warp", "paste_back", "encode", "end_to_end"} <= set(stages)
    for record in records:
        assert record["p50_ms"] <= record["p90_ms"] <= record["p99_ms"]
        assert record["provenance"]["bundle"]["variant"] == "toy"
        assert record["provenance"]["versions"]["lp-edge"] == lp_edge.__version__
    assert stages["warp"]["count"] == 9
    whole = stages["end_to_end"]
    assert (whole["frames"], whole["count"]) == (9, 9)
    assert whole["fps"] > 0
    assert whole["peak_memory_mib"] > 20
    assert records[-1] is not None and records[-1]["stage"] == "end_to_end"


def test_bench_warp_measures_every_batch(call: Call, work: Path) -> None:
    code, out, _ = call(cli.bench, "warp", *toys("--size", 96, "--seconds", 0.2, "--batch", 1, "--batch", 3))
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [(r["size"], r["batch"]) for r in records] == [(96, 1), (96, 3)]
    for record in records:
        assert record["fps"] == pytest.approx(record["batch"] * 1000 / record["mean_ms"], rel=0.05)
        assert record["provenance"]["runners"]["warp_decode"]["backend"] == "cpu"


@pytest.mark.parametrize(
    "args", [("warp", "--size", 3), ("warp", "--batch", 0), ("run", "--frames", 5, "--warmup", 9)]
)
def test_bench_refuses_what_cannot_be_measured(call: Call, work: Path, args: tuple[object, ...]) -> None:
    code, out, err = call(cli.bench, args[0], *toys(*args[1:]))
    assert (code, out) == (2, "")
    assert "to fix it" in err


def test_the_demo_writes_a_playable_clip(call: Call, work: Path) -> None:
    """The real networks, as on a fresh machine."""
    if not (Path(lp_edge.__file__).parent / "engines" / "data" / "mesh" / "manifest.json").is_file():
        pytest.skip("the built-in bundle is not there yet")
    code, out, _ = call(cli.run, "--demo", "--json", "--region", "exp")
    assert code == 0
    result = json.loads(out)
    assert result["output"] == "demo--talk.mp4"
    with VideoReader(work / "demo--talk.mp4") as reader:
        frames = [f.rgb for f in reader]
    assert len(frames) == result["frames"] == len(lp_edge.builtin_template("talk"))
    source = read_image(Path(lp_edge.__file__).parent / "runtime" / "data" / "demo.jpg")
    assert frames[0].shape == source.shape
    change = [np.abs(f.astype(int) - source).mean(2) for f in frames]
    assert max(c.max() for c in change) > 60, "the mouth must open"
    assert max(c[:40].mean() for c in change) < 6, "the background must stay"


def test_commands_share_two_arenas_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: library)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    cli._share_arenas()
    assert asked == []
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    cli._share_arenas()
    assert asked == [(-8, 2)]
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: object())  # a C library without mallopt
    cli._share_arenas()
