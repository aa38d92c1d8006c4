"""Hardware video in a whole run: the words of the result, the command line, and stages that overlap."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from lp_edge import cli
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.runner import Runner
from lp_edge.errors import BackendUnavailable
from lp_edge.runtime import animator, driver, job
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.batch import run_batch
from lp_edge.runtime.hardware_video import Clip, Video, VideoConfig
from lp_edge.runtime.image import write_image
from lp_edge.runtime.job import RunConfig, RunResult, animate, run_job
from lp_edge.runtime.job_list import jobs_of_sources
from lp_edge.runtime.media_read import VideoReader
from lp_edge.runtime.media_write import FrameWriter, open_writer
from lp_edge.tests.fake_nvcodec.module import World, make_nvcodec

pytestmark = pytest.mark.skipif(
    int(av.__version__.split(".")[0]) < 15, reason="PyAV 14 has no NVDEC and cannot write foreign packets"
)

CPU = BackendConfig("cpu", threads=1)
NVDEC = "NVDEC through PyNvVideoCodec"


def frame(x: int) -> np.ndarray:
    out = np.zeros((200, 240, 3), np.uint8)
    out[60:140, x - 40 : x + 40] = 255
    return out


@pytest.fixture
def face(tmp_path: Path) -> Path:
    write_image(tmp_path / "face.png", frame(100))
    return tmp_path / "face.png"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    with open_writer(tmp_path / "d.mp4", (240, 200), 25) as writer:
        for index in range(20):
            writer.write(frame(100 + index))
    return tmp_path / "d.mp4"


@pytest.fixture
def nvcodec(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", make_nvcodec(world))
    return world


def frames_of(path: Path) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return [shown.rgb for shown in reader]


def test_a_run_says_what_decoded_and_encoded(
    nvcodec: World, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    results = {}
    for name, video in (("soft", VideoConfig()), ("hard", VideoConfig("nvidia", "nvidia"))):
        config = RunConfig(face, clip, tmp_path / f"{name}.mp4", bundle=toy_bundle, backend=CPU, video=video)
        results[name] = run_job(config)
    assert (results["soft"].decoder, results["soft"].encoder) == ("software", "software (libx264)")
    assert results["hard"].decoder == "NVDEC through PyNvVideoCodec"
    assert results["hard"].encoder == "NVENC through PyNvVideoCodec"
    soft, hard = frames_of(tmp_path / "soft.mp4"), frames_of(tmp_path / "hard.mp4")
    assert len(soft) == len(hard) == 20
    assert all(np.abs(a.astype(int) - b).mean() < 2 for a, b in zip(soft, hard, strict=True))


def test_one_call_takes_video_and_batch_size(
    nvcodec: World, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    common = {"bundle": toy_bundle, "backend": CPU}
    result = animate(
        face, clip, tmp_path / "r.mp4", **common, video=VideoConfig("nvidia", "software"), batch_size=3
    )
    assert (result.decoder, result.encoder, result.batch_size) == (NVDEC, "software (libx264)", 3)
    result = animate(face, clip, tmp_path / "r.mp4", **common)
    assert (result.decoder, result.encoder, result.batch_size) == ("software", "software (libx264)", 1)


def test_a_run_without_clips_names_neither(face: Path, toy_bundle: Path, tmp_path: Path) -> None:
    result = run_job(RunConfig(face, face, tmp_path / "r.png", bundle=toy_bundle, backend=CPU))
    assert (result.decoder, result.encoder) == ("", "")


@pytest.mark.parametrize("resident", [True, False])
def test_auto_wants_frames_on_the_device(
    resident: bool, nvcodec: World, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And uses the networks' GPU."""
    real = animator.open_family

    def opened(*arguments: Any) -> Any:
        family = real(*arguments)
        monkeypatch.setattr(family, "resident", resident)
        monkeypatch.setattr(family, "accelerated", True)
        return family

    monkeypatch.setattr(animator, "open_family", opened)
    result = run_job(
        RunConfig(face, clip, tmp_path / "r.mp4", bundle=toy_bundle, backend=replace(CPU, device=3))
    )
    used = {a[0]: a[1] if a[0] == "decoder" else a[3]["gpu_id"] for a in nvcodec.asked}
    if resident:
        assert (result.decoder, result.encoder) == (NVDEC, "NVENC through PyNvVideoCodec")
        assert used == {"decoder": 3, "encoder": 3}
    else:
        assert (result.decoder, result.encoder) == ("software", "software (libx264)")
        assert used == {}


@pytest.mark.parametrize("family", ["toy_bundle", "liveportrait_bundle"])
def test_on_a_cpu_nothing_is_tried_where_pixels_are_graphs_either(
    family: str, nvcodec: World, face: Path, clip: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(family)
    config = RunConfig(face, clip, tmp_path / "r.mp4", bundle=bundle, backend=replace(CPU, pixels="device"))
    result = run_job(config)
    assert (result.pixels, result.decoder, result.encoder) == ("device", "software", "software (libx264)")
    assert nvcodec.asked == []


def test_a_decoder_that_is_named_in_vain_is_told(
    nvcodec: World, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    base = RunConfig(face, face, bundle=toy_bundle, backend=CPU)
    words = "nothing was decoded; --decoder nvidia had no effect"
    for driving, choice, told in ((face, "nvidia", True), (clip, "nvidia", False), (face, "software", False)):
        output = tmp_path / f"r.{'png' if driving == face else 'mp4'}"
        config = replace(base, driving=driving, output=output, video=VideoConfig(choice))
        assert (words in run_job(config).warnings) is told


@pytest.mark.parametrize(
    ("video", "verb"),
    [(VideoConfig(encoder="gstreamer"), "encode"), (VideoConfig(decoder="gstreamer"), "decode")],
)
def test_a_batch_tries_what_is_named_before_its_first_job(
    video: VideoConfig, verb: str, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name in "ab":
        shutil.copy(face, inputs / f"{name}.png")
    base = RunConfig("", clip, bundle=toy_bundle, backend=CPU, video=video)
    begun: list[Any] = []
    with pytest.raises(BackendUnavailable, match=f"gstreamer does not {verb} a test clip.mp4 here"):
        run_batch(jobs_of_sources([inputs], base, tmp_path / "out"), tmp_path / "out", progress=begun.append)
    assert begun == [] and not (tmp_path / "out").exists()
    still = replace(base, driving=face, video=VideoConfig("gstreamer"))  # nothing to decode
    assert run_batch(jobs_of_sources([inputs], still, tmp_path / "out"), tmp_path / "out").exit_code == 0


def test_the_video_of_a_given_animator_counts(
    nvcodec: World, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    config = RunConfig(face, clip, tmp_path / "r.mp4", bundle=toy_bundle, video=VideoConfig("gstreamer"))
    with Animator(toy_bundle, backend=CPU, video=VideoConfig("nvidia", "software")) as it:
        result = run_job(config, animator=it)
    assert (result.decoder, result.encoder) == (NVDEC, "software (libx264)")


def test_every_pass_over_every_clip_is_decoded_so(
    nvcodec: World,
    clip: Path,
    liveportrait_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The family sees motion as a whole first, the driver's after the box that all its frames share; then pictures again."""
    source = Path(shutil.copy(clip, tmp_path / "s.mp4"))
    passes = Counter[str]()
    decode = Video.decode

    def counted(self: Video, clip: Clip, *rest: Any) -> Any:
        passes[clip.path.name] += 1
        return decode(self, clip, *rest)

    monkeypatch.setattr(Video, "decode", counted)
    config = RunConfig(
        source,
        clip,
        tmp_path / "r.mp4",
        bundle=liveportrait_bundle,
        backend=CPU,
        side_by_side=True,
        video=VideoConfig("nvidia", "software"),
    )
    result = run_job(config)
    assert (result.decoder, result.frames) == (NVDEC, 20)
    assert passes == {"s.mp4": 2, "d.mp4": 3}
    assert sum(a[0] == "decoder" for a in nvcodec.asked) == 5


def test_runs_at_the_same_time_keep_apart(
    nvcodec: World, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    """One animator, a run with a clip, and one with a clip that hardware does not decode and an output that it does not encode."""
    other = tmp_path / "other.mp4"
    with open_writer(other, (240, 200), 25) as writer:
        writer.write(frame(100))
    deep = tmp_path / "deep.mkv"
    with av.open(str(other)) as read, av.open(str(deep), "w") as out:
        stream: Any = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 240, 200, "yuv420p10le"
        for picture in read.decode(video=0):
            out.mux(stream.encode(picture.reformat(format="yuv420p10le")))
        out.mux(stream.encode(None))
    together, results = threading.Barrier(2, timeout=30), dict[str, RunResult]()
    with Animator(toy_bundle, backend=CPU) as it:
        it.video = it._drivers._video = Video(accelerated=True)

        def run(driving: Path, output: str) -> None:
            waited = iter([together.wait])
            config = RunConfig(face, driving, tmp_path / output, bundle=toy_bundle)
            results[output] = run_job(config, lambda _: next(waited, lambda: 0)() and None, animator=it)

        threads = [threading.Thread(target=run, args=a) for a in ((clip, "a.mp4"), (deep, "b.webm"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (results["a.mp4"].decoder, results["a.mp4"].encoder) == (NVDEC, "NVENC through PyNvVideoCodec")
    assert results["b.webm"].decoder.startswith("software, because ")
    assert results["b.webm"].encoder == "software (libvpx-vp9)"


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_decodes_and_encodes_as_its_first_job_says(
    shared: bool, nvcodec: World, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name in "ab" if shared else "a":
        shutil.copy(face, inputs / f"{name}.png")
    video = VideoConfig("nvidia", "nvidia", 2)
    base = RunConfig("", clip, bundle=toy_bundle, backend=CPU, video=video)
    done = run_batch(jobs_of_sources([inputs], base, tmp_path), tmp_path)
    results = [outcome.result for outcome in done.outcomes if outcome.result is not None]
    assert done.motions == shared
    assert [(r.decoder, r.encoder) for r in results] == [(NVDEC, "NVENC through PyNvVideoCodec")] * (
        1 + shared
    )
    assert (
        sum(a[0] == "decoder" for a in nvcodec.asked) == 1 + shared
    )  # once before the first of several jobs
    assert {a[1] for a in nvcodec.asked if a[0] == "decoder"} == {2}


def test_a_failure_while_decoding_ends_the_run(
    nvcodec: World, face: Path, clip: Path, toy_bundle: Path, tmp_path: Path
) -> None:
    nvcodec.fails_at_packet = 15
    config = RunConfig(
        face, clip, tmp_path / "r.mp4", bundle=toy_bundle, backend=CPU, video=VideoConfig("nvidia")
    )
    with pytest.raises(Exception, match=r"failed at frame \d+ of d\.mp4"):
        run_job(config)
    assert not (tmp_path / "r.mp4").exists()


def test_the_command_line(
    nvcodec: World,
    face: Path,
    clip: Path,
    toy_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = [
        "-s", str(face), "-d", str(clip), "-o", str(tmp_path / "r.mp4"), "--bundle", str(toy_bundle),
        "--backend", "cpu", "--device", "1",
    ]  # fmt: skip

    def call(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.run.main([*common, *more], prog_name="lp-run")
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    code, out, _ = call("--decoder", "nvidia", "--encoder", "nvidia")
    assert code == 0
    assert "decoded by NVDEC through PyNvVideoCodec, encoded by NVENC through PyNvVideoCodec)" in out
    assert {a[1] for a in nvcodec.asked if a[0] == "decoder"} == {1}
    code, out, _ = call("--json")
    result: dict[str, Any] = json.loads(out)
    assert (code, result["decoder"], result["encoder"]) == (0, "software", "software (libx264)")
    nvcodec.encodes = False
    code, _, err = call("--encoder", "nvidia")
    assert code == BackendUnavailable.exit_code
    assert "unsupported device" in err


def test_a_fall_back_is_told(
    capsys: pytest.CaptureFixture[str], toy_bundle: Path, face: Path, tmp_path: Path
) -> None:
    result = run_job(RunConfig(face, "nod", tmp_path / "r.gif", bundle=toy_bundle, backend=CPU))
    words = "software (libx264), because NVENC through PyAV: Cannot load libcuda.so.1"
    object.__setattr__(result, "encoder", words)
    cli._print_result(result)
    shown = capsys.readouterr()
    assert "encoded by software (libx264))" in shown.out
    assert f"lp-run: note: encoded by {words}" in shown.err


def test_decoding_rendering_and_encoding_run_at_the_same_time(
    face: Path, clip: Path, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve times all three stages must be at work at once to get on: one after the other they would never meet."""
    together, met = threading.Barrier(3, timeout=30), {"decode": 0, "render": 0, "encode": 0}

    def meet(stage: str, index: int, first: int) -> None:
        if first <= index < first + 12:
            together.wait()
            met[stage] += 1

    class Reader(VideoReader):
        count = 0

        def __next__(self) -> Any:
            meet("decode", self.count, 8)
            self.count += 1
            return super().__next__()

    def wrap(runner: Runner) -> Runner:
        if "warp" in runner.name:
            infer, calls = runner.infer, iter(range(1000))

            def slow(*arguments: Any, **more: Any) -> Any:
                meet("render", next(calls), 4)
                return infer(*arguments, **more)

            monkeypatch.setattr(runner, "infer", slow)
        return runner

    def opened(*arguments: Any, **more: Any) -> FrameWriter:
        writer = open_writer(*arguments, **more)
        write, calls = writer.write, iter(range(1000))

        def slow(rgb: Any) -> None:
            meet("encode", next(calls), 0)
            write(rgb)

        monkeypatch.setattr(writer, "write", slow)
        return writer

    monkeypatch.setattr(driver, "VideoReader", Reader)
    monkeypatch.setattr(job, "open_writer", opened)
    with Animator(toy_bundle, backend=CPU, wrap=wrap) as animator:
        result = run_job(RunConfig(face, clip, tmp_path / "r.mp4", bundle=toy_bundle), animator=animator)
    assert result.frames == 20
    assert met == {"decode": 12, "render": 12, "encode": 12}
