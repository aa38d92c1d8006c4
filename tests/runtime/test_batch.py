"""Many runs in one: what is read once, what a failure leaves, and how it goes on after a stop."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError, Interrupted, MediaError, NoFaceError, OutputError
from lp_edge.runtime import batch, driver
from lp_edge.runtime.batch import JOURNAL, BatchProgress, BatchResult, run_batch
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.hardware_video import VideoConfig
from lp_edge.runtime.image import write_image
from lp_edge.runtime.job import RunConfig, run_job
from lp_edge.runtime.job_list import BatchJob, jobs_of_list, jobs_of_sources
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.options import AnimateOptions

CPU = BackendConfig("cpu", threads=1)


def frame(x: int | None = 100) -> np.ndarray:
    out = np.zeros((200, 240, 3), np.uint8)
    if x is not None:
        out[60:140, x - 40 : x + 40] = 255
    return out


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate("abc"):
        write_image(folder / f"{name}.png", frame(90 + 10 * i))
    with open_writer(tmp_path / "d.mp4", (240, 200), Fraction(25)) as writer:
        for i in range(12):
            writer.write(frame(100 + i))
    return folder


@pytest.fixture
def base(toy_bundle: Path, tmp_path: Path) -> RunConfig:
    return RunConfig("", tmp_path / "d.mp4", bundle=toy_bundle, backend=CPU)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the driving clips that were decoded."""
    seen: list[str] = []
    real = driver.decode

    def spy(path: Path, *rest: object) -> object:
        seen.append(path.name)
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(driver, "decode", spy)
    yield seen


def states(result: BatchResult) -> list[str]:
    return [outcome.state for outcome in result.outcomes]


def pixels(path: Path) -> np.ndarray:
    with VideoReader(path) as reader:
        return np.stack([f.rgb for f in reader])


def entries(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]


# -- the motion, once -------------------------------------------------------------------------------------


def test_the_driver_is_read_once_and_every_result_is_as_if_made_alone(
    inputs: Path, base: RunConfig, tmp_path: Path, decoded: list[str]
) -> None:
    result = run_batch(jobs_of_sources([inputs], base, tmp_path / "out"), tmp_path / "out")
    assert states(result) == ["done"] * 3
    assert decoded == ["d.mp4"]
    assert (result.motions, result.exit_code) == (1, 0)
    assert 0 < result.motion_seconds < result.seconds
    for name in "abc":
        alone = run_job(replace(base, source=inputs / f"{name}.png", output=tmp_path / f"{name}.mp4"))
        together = tmp_path / "out" / f"{name}--d.mp4"
        assert (pixels(together) == pixels(alone.output)).all()
        assert probe(together).frames == 12


def test_a_driver_of_one_job_is_not_kept(inputs: Path, base: RunConfig, tmp_path: Path) -> None:
    result = run_batch(jobs_of_sources([inputs / "a.png"], base, tmp_path), tmp_path)
    assert (states(result), result.motions, result.motion_seconds) == (["done"], 0, 0.0)


def test_options_that_do_not_change_the_reading_share_it(
    inputs: Path, base: RunConfig, tmp_path: Path, decoded: list[str]
) -> None:
    (inputs / "jobs.csv").write_text(
        "source,region,multiplier,smooth,neutral,output\n"
        "a.png,lip,1,,,1.mp4\nb.png,all,0.5,,,2.mp4\n"
        "a.png,,,no,,3.mp4\nb.png,,,no,,4.mp4\n"
        "a.png,,,,4,5.mp4\n"
    )
    result = run_batch(jobs_of_list(inputs / "jobs.csv", base, tmp_path), tmp_path)
    assert states(result) == ["done"] * 5
    assert result.motions == 2
    # 1 + 1 for the shared ones, 2 for the last: its neutral frame is looked for first
    assert decoded == ["d.mp4"] * 4


def test_a_motion_is_dropped_after_its_last_job(
    inputs: Path, base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    real = batch._Motions.done

    def spy(self: batch._Motions, config: RunConfig) -> None:
        real(self, config)
        kept.append(len(self._kept))

    monkeypatch.setattr(batch._Motions, "done", spy)
    (inputs / "jobs.csv").write_text(
        "source,driving,output\na.png,,1.mp4\na.png,nod,2.mp4\nb.png,,3.mp4\nb.png,nod,4.mp4\n"
    )
    run_batch(jobs_of_list(inputs / "jobs.csv", base, tmp_path), tmp_path)
    assert kept == [1, 2, 1, 0]


def test_side_by_side_still_shows_the_driver(
    inputs: Path, base: RunConfig, tmp_path: Path, decoded: list[str]
) -> None:
    wide = replace(base, side_by_side=True)
    result = run_batch(jobs_of_sources([inputs / "a.png", inputs / "b.png"], wide, tmp_path), tmp_path)
    for outcome in result.outcomes:
        assert outcome.result is not None
        assert outcome.result.size == (720, 200)
        assert outcome.result.faces == {"tracked": 12}
    last = pixels(tmp_path / "b--d.mp4")[-1]
    assert last[100, 71 + 5].min() > 200  # the driver has moved to 111
    assert last[100, 66].max() < 60


def test_the_sound_comes_from_the_driver(
    inputs: Path, base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wave

    with wave.open(str(tmp_path / "t.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((8000 * np.sin(np.arange(16000) / 6)).astype("<i2").tobytes())
    with open_writer(
        tmp_path / "loud.mp4", (240, 200), Fraction(25), audio_from=tmp_path / "t.wav"
    ) as writer:
        for i in range(12):
            writer.write(frame(100 + i))
    loud = replace(base, driving=tmp_path / "loud.mp4")
    run_batch(jobs_of_sources([inputs / "a.png", inputs / "b.png"], loud, tmp_path), tmp_path)
    assert probe(tmp_path / "a--loud.mp4").has_audio
    assert probe(tmp_path / "b--loud.mp4").has_audio


def test_templates_pictures_and_edits_drive_a_batch(inputs: Path, base: RunConfig, tmp_path: Path) -> None:
    short = builtin_template("nod", duration=0.5)
    for driving, options, name in (
        (short, AnimateOptions(), "a--template.mp4"),
        (inputs / "c.png", AnimateOptions(), "a--c.png"),
        ((short, short), AnimateOptions(faces="all"), None),
    ):
        config = replace(base, driving=driving, options=options)
        out = tmp_path / f"out{name}".replace(".", "_")
        result = run_batch(jobs_of_sources([inputs / "a.png", inputs / "b.png"], config, out), out)
        if name is None:  # two drivers, one face
            assert [type(o.error) for o in result.outcomes] == [ConfigError] * 2
            assert not out.exists()
        else:
            assert states(result) == ["done"] * 2
            assert (out / name).is_file()


# -- failures ----------------------------------------------------------------------------------------------


def test_a_job_that_fails_does_not_stop_the_others(inputs: Path, base: RunConfig, tmp_path: Path) -> None:
    write_image(inputs / "b.png", frame(None))
    sources = [inputs / "a.png", inputs / "b.png", inputs / "gone.png", inputs / "c.png"]
    out = tmp_path / "out"
    result = run_batch(jobs_of_sources(sources, base, out), out)
    assert states(result) == ["done", "failed", "failed", "done"]
    assert [type(o.error) for o in result.outcomes[1:3]] == [NoFaceError, MediaError]
    assert result.exit_code == 4  # of the first failure
    assert sorted(p.name for p in out.iterdir()) == ["a--d.mp4", "c--d.mp4", JOURNAL]


def test_an_error_that_nobody_thought_of_fails_one_job(
    inputs: Path, base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batch.run_job

    def broken(config: RunConfig, *args: object, **options: object) -> object:
        if Path(config.source).name == "a.png":
            raise ZeroDivisionError("over the edge")
        return real(config, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "run_job", broken)
    result = run_batch(jobs_of_sources([inputs], base, tmp_path), tmp_path)
    assert states(result) == ["failed", "done", "done"]
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: over the edge" in str(result.outcomes[0].error)


def test_a_driver_that_cannot_drive_is_tried_once(
    inputs: Path, base: RunConfig, tmp_path: Path, decoded: list[str]
) -> None:
    with open_writer(tmp_path / "dark.mp4", (240, 200), Fraction(25)) as writer:
        for _ in range(5):
            writer.write(frame(None))
    config = replace(base, driving=tmp_path / "dark.mp4")
    result = run_batch(jobs_of_sources([inputs], config, tmp_path / "out"), tmp_path / "out")
    assert states(result) == ["failed"] * 3
    assert result.exit_code == 4
    assert decoded == ["dark.mp4"]
    assert not (tmp_path / "out").exists()  # it was made for nothing


def test_what_concerns_the_whole_batch_is_refused(inputs: Path, base: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without jobs"):
        run_batch([], tmp_path)
    jobs = jobs_of_sources([inputs], replace(base, save_motion="m.npz"), tmp_path / "out")
    with pytest.raises(ConfigError, match="--save-motion"):
        run_batch(jobs, tmp_path / "out")
    jobs = jobs_of_sources([inputs], base, tmp_path / "out")
    for folder, kind in (
        (tmp_path / "out.mp4", ConfigError),
        (inputs / "a.png", ConfigError),
        (tmp_path / "no" / "where", OutputError),
    ):
        with pytest.raises(kind, match=folder.name):
            run_batch(jobs, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.mp4", "in", "toy_bundle"]


# -- going on ------------------------------------------------------------------------------------------------


def test_finished_results_are_left_alone(
    inputs: Path, base: RunConfig, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_batch(jobs_of_sources([inputs], base, out), out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    decoded.clear()
    again = run_batch(jobs_of_sources([inputs], base, out), out)
    assert states(again) == ["finished before"] * 3
    assert [o.frames for o in again.outcomes] == [12] * 3
    assert decoded == []
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    monkeypatch.chdir(out.parent)  # the same batch as seen from elsewhere
    jobs = jobs_of_sources([Path("in")], replace(base, driving=Path("d.mp4")), Path("out"))
    assert states(run_batch(jobs, Path("out"))) == ["finished before"] * 3
    fresh = run_batch(jobs_of_sources([inputs], base, out), out, resume=False)
    assert states(fresh) == ["done"] * 3


def test_only_what_changed_is_done_again(inputs: Path, base: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def again(config: RunConfig = base) -> list[str]:
        return states(run_batch(jobs_of_sources([inputs], config, out), out))

    assert again() == ["done"] * 3
    write_image(inputs / "b.png", frame(120))  # another source
    assert again() == ["finished before", "done", "finished before"]
    (out / "c--d.mp4").unlink()  # a result that is gone
    assert again() == ["finished before", "finished before", "done"]
    with (out / "a--d.mp4").open("ab") as file:  # or altered
        file.write(b"x")
    assert again() == ["done", "finished before", "finished before"]
    other = replace(base, options=AnimateOptions(multiplier=0.5))  # other options
    assert again(other) == ["done"] * 3
    assert again(replace(other, crf=30)) == ["done"] * 3
    os.utime(tmp_path / "d.mp4", (1, 1))  # another driver
    assert again(replace(other, crf=30)) == ["done"] * 3
    assert again(replace(other, crf=30)) == ["finished before"] * 3
    other = replace(other, crf=30, video=VideoConfig(encoder="software"))  # another encoder
    assert again(other) == ["done"] * 3
    other = replace(other, video=VideoConfig("software", "software"))  # decoders give the same frames
    assert again(other) == ["finished before"] * 3


def test_a_folder_of_frames_counts_as_finished(inputs: Path, base: RunConfig, tmp_path: Path) -> None:
    (inputs / "jobs.csv").write_text("source,output\na.png,frames/\n")

    def again() -> list[str]:
        return states(run_batch(jobs_of_list(inputs / "jobs.csv", base, tmp_path), tmp_path))

    assert again() == ["done"]
    assert len(list((tmp_path / "frames").iterdir())) == 12
    assert again() == ["finished before"]
    (tmp_path / "frames" / "000003.png").unlink()
    assert again() == ["done"]


def test_a_damaged_journal_costs_time_not_results(
    inputs: Path, base: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    jobs = jobs_of_sources([inputs], base, out)
    run_batch(jobs, out)
    lines = (out / JOURNAL).read_text().splitlines()
    (out / JOURNAL).write_text(f'{lines[0]}\n["no entry"]\n{lines[2][:40]}')  # as a crash cuts it off
    with caplog.at_level(logging.WARNING, "lp_edge"):
        assert states(run_batch(jobs, out)) == ["finished before", "done", "done"]
    assert caplog.text.count("is damaged") == 2
    assert states(run_batch(jobs, out)) == ["finished before"] * 3


@pytest.mark.parametrize("moment", ["frame", "motion"])
def test_ctrl_c_keeps_what_is_finished_and_nothing_half(
    inputs: Path, base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "out"

    def stop(now: BatchProgress) -> None:
        if now.number == 2 and now.run is not None and now.run.frames == 5:
            raise KeyboardInterrupt

    jobs = jobs_of_sources([inputs], base, out)
    if moment == "frame":
        with pytest.raises(Interrupted, match="job 2 of 3; 1 finished results are kept"):
            run_batch(jobs, out, progress=stop)
        assert sorted(p.name for p in out.iterdir()) == ["a--d.mp4", JOURNAL]
        assert [e["output"] for e in entries(out)] == ["a--d.mp4"]
    else:

        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(driver.Driver, "recorded", interrupted)
        with pytest.raises(Interrupted, match="job 1 of 3"):
            run_batch(jobs, out)
        assert not out.exists()
        monkeypatch.undo()
    done = ["finished before"] if moment == "frame" else ["done"]
    assert states(run_batch(jobs, out)) == [*done, "done", "done"]


def test_progress_goes_from_job_to_job(inputs: Path, base: RunConfig, tmp_path: Path) -> None:
    seen: list[BatchProgress] = []
    run_batch(jobs_of_sources([inputs], base, tmp_path / "out"), tmp_path / "out", progress=seen.append)
    assert {now.jobs for now in seen} == {3}
    for number in (1, 2, 3):
        mine = [now for now in seen if now.number == number]
        assert mine[0].run is None
        assert mine[0].outcome is None
        assert [now.run.frames for now in mine if now.run is not None] == list(range(1, 13))
        assert mine[-1].outcome is not None
        assert mine[-1].outcome.state == "done"


def test_a_job_needs_an_output() -> None:
    with pytest.raises(ConfigError, match="no output"):
        _ = BatchJob("a", RunConfig("a.png", "nod")).output
