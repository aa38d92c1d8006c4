"""A whole run in Python: what is written, with which sound and motion, and what stays when it fails."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError, Interrupted, MediaError, OutputError
from lp_edge.runtime import job
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.image import write_image
from lp_edge.runtime.job import Progress, RunConfig, default_output, percentiles, run_job
from lp_edge.runtime.keyframes import Keyframe, Keyframes
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.templates import load_template

CPU = BackendConfig("cpu", threads=1)


def frame(x: int | None = 100, width: int = 240, height: int = 200) -> np.ndarray:
    out = np.zeros((height, width, 3), np.uint8)
    if x is not None:
        out[60:140, x - 40 : x + 40] = 255
    return out


def clip(path: Path, xs: list[int | None], fps: Fraction = Fraction(25), sound: Path | None = None) -> Path:
    with open_writer(path, (240, 200), fps, audio_from=sound) as writer:
        for x in xs:
            writer.write(frame(x))
    return path


def tone(path: Path, seconds: float) -> Path:
    """A sound file as a clip that can be carried over."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        t = np.arange(int(16000 * seconds)) / 16000
        file.writeframes((8000 * np.sin(2 * np.pi * 440 * t)).astype("<i2").tobytes())
    return path


@pytest.fixture
def face(tmp_path: Path) -> Path:
    write_image(tmp_path / "face.png", frame())
    return tmp_path / "face.png"


def sound_seconds(path: Path) -> float:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return 0.0
        return sum(f.samples / f.sample_rate for f in container.decode(audio=0))


# -- frames, rate, sound ----------------------------------------------------------------------------------


def test_the_result_has_the_drivers_frames_rate_and_sound(
    face: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    rate = Fraction(30000, 1001)
    driver = clip(tmp_path / "d.mp4", [100 + i // 3 for i in range(30)], rate, tone(tmp_path / "t.wav", 3.0))
    result = run_job(RunConfig(face, driver, tmp_path / "r.mp4", bundle=toy_bundle, backend=CPU))
    assert (result.frames, result.size, result.frame_rate) == (30, (240, 200), rate)
    assert (result.faces, result.backend, result.warnings, result.motion) == (
        {"tracked": 30},
        "cpu",
        (),
        None,
    )
    assert result.fps > 0
    with VideoReader(result.output) as reader:
        times = [f.time for f in reader]
    assert len(times) == 30
    assert times[-1] == pytest.approx(float(29 / rate), abs=1e-4)
    # as long as the pictures, up to one AAC packet
    assert sound_seconds(result.output) == pytest.approx(float(30 / rate), abs=1024 / 16000 + 0.01)


@pytest.mark.parametrize(("audio", "name", "there"), [("none", "r.mp4", False), ("driving", "r.gif", False)])
def test_no_sound_where_none_is_wanted_or_possible(
    face: Path, toy_bundle: Path, tmp_path: Path, audio: str, name: str, there: bool
) -> None:
    driver = clip(tmp_path / "d.mp4", [100] * 10, sound=tone(tmp_path / "t.wav", 1.0))
    config = RunConfig(face, driver, tmp_path / name, bundle=toy_bundle, backend=CPU, audio=audio)  # type: ignore[arg-type]
    assert probe(run_job(config).output).has_audio is there


def test_the_sources_sound_or_a_note_that_there_is_none(face: Path, toy_bundle: Path, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mp4", [100] * 12, sound=tone(tmp_path / "t.wav", 1.0))
    driver = clip(tmp_path / "d.mp4", [100] * 12)
    loud = run_job(
        RunConfig(source, driver, tmp_path / "a.mp4", bundle=toy_bundle, backend=CPU, audio="source")
    )
    assert probe(loud.output).has_audio
    assert loud.warnings == ()
    silent = run_job(
        RunConfig(face, driver, tmp_path / "b.mp4", bundle=toy_bundle, backend=CPU, audio="source")
    )
    assert not probe(silent.output).has_audio
    assert any("no sound" in w for w in silent.warnings)


def test_edits_alone_keep_the_sources_length_and_sound(face: Path, toy_bundle: Path, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mp4", [100] * 12, sound=tone(tmp_path / "t.wav", 1.0))
    options = AnimateOptions(edits=Edits(yaw=20))
    result = run_job(
        RunConfig(source, None, tmp_path / "r.mp4", options=options, bundle=toy_bundle, backend=CPU)
    )
    assert (result.frames, result.faces, result.warnings) == (12, {"edit": 12}, ())
    assert probe(result.output).has_audio
    with VideoReader(source) as before, VideoReader(result.output) as after:
        changes = [np.abs(a.rgb.astype(int) - b.rgb).max() for a, b in zip(before, after, strict=True)]
    assert min(changes) > 5
    picture = run_job(
        RunConfig(face, None, tmp_path / "r.png", options=options, bundle=toy_bundle, backend=CPU)
    )
    assert (picture.frames, picture.faces) == (1, {"edit": 1})


def test_one_animator_and_one_reading_serve_several_runs(
    face: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    driver = clip(tmp_path / "d.mkv", [100 + i for i in range(8)])
    alone = run_job(RunConfig(face, driver, tmp_path / "alone.mkv", bundle=toy_bundle, backend=CPU))
    with Animator(toy_bundle, backend=CPU) as animator:
        motion = animator.open_driver(driver).recorded()
        for name in ("a", "b"):
            config = RunConfig(face, driver, tmp_path / f"{name}.mkv")
            result = run_job(config, animator=animator, drivers=[motion])
            assert result.faces == alone.faces
            assert "motion" not in result.stages
            with VideoReader(result.output) as ours, VideoReader(alone.output) as theirs:
                assert all((a.rgb == b.rgb).all() for a, b in zip(ours, theirs, strict=True))


def test_nothing_to_do_is_said(face: Path, toy_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a driver nor an edit"):
        run_job(RunConfig(face, None, tmp_path / "r.mp4", bundle=toy_bundle, backend=CPU))
    config = RunConfig(face, ["nod", "blink"], tmp_path / "r.mp4", save_motion=tmp_path / "m.npz")
    with pytest.raises(ConfigError, match="2 drivers"):
        run_job(config)
    with pytest.raises(ConfigError, match="2 drivers for 1 face"):
        run_job(RunConfig(face, ["nod", "blink"], tmp_path / "r.mp4", bundle=toy_bundle, backend=CPU))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["face.png", "toy_bundle"]


def test_progress_counts_every_frame(face: Path, toy_bundle: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    template = builtin_template("nod", duration=1.0)
    run_job(RunConfig(face, template, tmp_path / "r.mp4", bundle=toy_bundle, backend=CPU), seen.append)
    assert [p.frames for p in seen] == list(range(1, len(template) + 1))
    assert {p.expected for p in seen} == {len(template)}
    assert seen[-1].left == 0
    assert Progress(50, 100, 2.0).fps == 25.0
    assert Progress(50, 100, 2.0).left == 2.0
    assert Progress(50, None, 2.0).left is None
    assert Progress(0, 100, 0.0).left is None


def test_a_folder_of_frames(face: Path, toy_bundle: Path, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mp4", [100, 101, 102])
    result = run_job(RunConfig(face, driver, tmp_path / "frames", bundle=toy_bundle, backend=CPU))
    assert sorted(p.name for p in result.output.iterdir()) == ["000000.png", "000001.png", "000002.png"]


# -- beside each other ----------------------------------------------------------------------------------------


def test_panels_have_the_results_height_whatever_the_driver_is(
    face: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    with open_writer(tmp_path / "small.mkv", (120, 100), Fraction(25)) as writer:
        for _ in range(4):
            writer.write(frame()[::2, ::2])
    config = RunConfig(
        face, tmp_path / "small.mkv", tmp_path / "r.mkv", bundle=toy_bundle, backend=CPU, side_by_side=True
    )
    assert run_job(config).size == (720, 200)
    config = RunConfig(face, "nod", tmp_path / "t.mkv", bundle=toy_bundle, backend=CPU, side_by_side=True)
    assert run_job(config).size == (480, 200)  # a template has no picture


def test_panels_that_would_be_too_wide_are_scaled_down(toy_bundle: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "wide.png", frame(width=6000))
    config = RunConfig(
        tmp_path / "wide.png",
        builtin_template("nod", duration=0.5),
        tmp_path / "r.mp4",
        bundle=toy_bundle,
        backend=CPU,
        side_by_side=True,
    )
    width, height = run_job(config).size
    assert width <= 8192
    assert width / height == pytest.approx(2 * 6000 / 200, rel=0.01)


# -- motion ------------------------------------------------------------------------------------------------------


def test_saved_motion_drives_as_the_clip_did(face: Path, toy_bundle: Path, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", [100 + i for i in range(15)])
    first = RunConfig(
        face, driver, tmp_path / "a.mkv", bundle=toy_bundle, backend=CPU, save_motion=tmp_path / "m.npz"
    )
    result = run_job(first)
    assert result.motion == tmp_path / "m.npz"
    template = load_template(tmp_path / "m.npz")
    assert (len(template), template.fps, template.family, template.source) == (15, 25, "mesh", "d.mkv")
    run_job(RunConfig(face, tmp_path / "m.npz", tmp_path / "b.mkv", bundle=toy_bundle, backend=CPU))
    frames = []
    for name in ("a.mkv", "b.mkv"):
        with VideoReader(tmp_path / name) as reader:
            frames.append(np.stack([f.rgb for f in reader]).astype(int))
    assert np.abs(frames[0] - frames[1]).max() <= 2  # float16, and the encoder


def test_frames_before_the_first_face_get_its_motion_and_the_neutral_frame_is_kept(
    face: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    driver = clip(tmp_path / "d.mkv", [None, None, None, 100, 104, 108])
    options = AnimateOptions(neutral=4, smooth=False)
    config = RunConfig(
        face, driver, tmp_path / "r.mkv", options, toy_bundle, CPU, save_motion=tmp_path / "m.npz"
    )
    run_job(config)
    template = load_template(tmp_path / "m.npz")
    x = template.motion.translation[:, 0]
    assert len(x) == 6
    assert template.neutral == 4
    assert x[0] == x[1] == x[2] == x[3] < x[4] < x[5]


def test_a_picture_becomes_two_frames_its_neutral_face_and_itself(
    face: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    config = RunConfig(
        face, face, tmp_path / "r.png", bundle=toy_bundle, backend=CPU, save_motion=tmp_path / "m.npz"
    )
    run_job(config)
    template = load_template(tmp_path / "m.npz")
    assert (len(template), template.neutral) == (2, 0)
    np.testing.assert_allclose(template.motion.rotation[0], np.eye(3), atol=1e-6)


# -- ends ----------------------------------------------------------------------------------------------------------


class Spoilsport(Exception):
    pass


@pytest.mark.parametrize("name", ["r.mp4", "r.gif", "frames"])
def test_whatever_ends_a_run_leaves_nothing(face: Path, toy_bundle: Path, tmp_path: Path, name: str) -> None:
    def spoil(now: Progress) -> None:
        if now.frames == 5:
            raise Spoilsport

    before = sorted(tmp_path.rglob("*"))
    config = RunConfig(
        face, "nod", tmp_path / name, bundle=toy_bundle, backend=CPU, save_motion=tmp_path / "m.npz"
    )
    with pytest.raises(Spoilsport):
        run_job(config, spoil)
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_becomes_interrupted_and_keeps_the_old_result(
    face: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    def stop(now: Progress) -> None:
        if now.frames == 5:
            raise KeyboardInterrupt

    (tmp_path / "r.mp4").write_bytes(b"the old result")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Interrupted, match="nothing was written"):
        run_job(RunConfig(face, "nod", tmp_path / "r.mp4", bundle=toy_bundle, backend=CPU), stop)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "r.mp4").read_bytes() == b"the old result"


def test_motion_that_cannot_be_saved_takes_the_clip_with_it(
    face: Path, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(job, "save_template", full)
    before = sorted(tmp_path.rglob("*"))
    config = RunConfig(
        face, "nod", tmp_path / "r.mp4", bundle=toy_bundle, backend=CPU, save_motion=tmp_path / "m.npz"
    )
    with pytest.raises(OutputError):
        run_job(config)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_clip_that_cannot_be_finished_takes_the_motion_with_it(
    face: Path, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lp_edge.runtime import media_write

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media_write, "publish", full)
    before = sorted(tmp_path.rglob("*"))
    config = RunConfig(
        face, "nod", tmp_path / "r.mp4", bundle=toy_bundle, backend=CPU, save_motion=tmp_path / "m.npz"
    )
    with pytest.raises(OutputError, match="No space left"):
        run_job(config)
    assert sorted(tmp_path.rglob("*")) == before


# -- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"audio": "loud"}, {"crf": -1}, {"crf": 52}, {"batch_size": 0}, {"batch_size": 65}]
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RunConfig("a", "b", **wrong)  # type: ignore[arg-type]


def test_default_names(face: Path, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mp4", [100])
    assert default_output(face, driver) == Path("face--d.mp4")
    assert default_output(driver, face) == Path("d--face.mp4")
    assert default_output(face, face) == Path("face--face.png")
    assert default_output(face, "nod") == Path("face--nod.mp4")
    assert default_output(face, builtin_template("nod")) == Path("face--template.mp4")
    assert default_output(face, [driver, "nod"]) == Path("face--d+nod.mp4")
    assert default_output(face, None) == Path("face--edit.png")
    assert default_output(driver, None) == Path("d--edit.mp4")
    keys = AnimateOptions(keyframes=Keyframes((Keyframe(0, {"yaw": 5}),)))
    assert default_output(face, None, keys) == Path("face--edit.mp4")
    assert default_output(face, face, keys) == Path("face--face.png")  # as long as its driver: one picture
    with pytest.raises(MediaError, match=r"nobody\.png"):
        default_output(tmp_path / "nobody.png", driver)


def test_percentiles() -> None:
    times = percentiles([i / 1000 for i in range(1, 101)])
    assert (times.count, times.mean, times.p50, times.p90, times.p99) == (100, 50.5, 50.5, 90.1, 99.01)
    with pytest.raises(ValueError):
        percentiles([])
