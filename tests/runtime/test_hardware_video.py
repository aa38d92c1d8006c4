"""Hardware decoders and encoders, with software underneath: the same frames, whole files, and no silent switch."""

from __future__ import annotations

import ctypes
import stat
import struct
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import av.logging
import numpy as np
import numpy.typing as npt
import pytest

from lp_edge.errors import BackendUnavailable, ConfigError, MediaError, OutputError
from lp_edge.runtime import hardware_video, hardware_video_gstreamer
from lp_edge.runtime.hardware_video import (
    Clip,
    Decoder,
    Encoder,
    Video,
    VideoConfig,
    try_decoder,
    try_encoder,
)
from lp_edge.runtime.hardware_video_packets import AccessUnits, UnitStream, open_stream, split_units
from lp_edge.runtime.media_read import VideoReader, repacked
from lp_edge.runtime.media_write import open_writer
from lp_edge.tests import fake_gstreamer
from lp_edge.tests.fake_nvcodec.module import World, make_nvcodec

pytestmark = pytest.mark.skipif(
    int(av.__version__.split(".")[0]) < 15, reason="PyAV 14 has no NVDEC and cannot write foreign packets"
)

U8 = npt.NDArray[np.uint8]
NTSC = Fraction(30000, 1001)
NVCODEC = "NVDEC through PyNvVideoCodec"
GSTREAMER = "nvv4l2decoder through GStreamer"


def picture(index: int, width: int = 98, height: int = 66) -> U8:
    """Smooth colours that move; every frame is another one, its first pixels tell which."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin((x + 3 * index) / 9), np.cos((y - 2 * index) / 7), np.sin((x + y) / 11 + index)]
    return (np.stack(waves, axis=-1) * 100 + 128).astype(np.uint8)


def write_clip(
    path: Path,
    count: int = 12,
    fps: Fraction | int = 25,
    *,
    size: tuple[int, int] = (98, 66),
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    tags: tuple[int, int] = (2, 0),  # colour space and range as in ITU-T H.273 and FFmpeg; 2 and 0: not told
    options: dict[str, str] | None = None,
) -> Path:
    base = time_base or 1 / Fraction(fps)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = base
        stream.codec_context.colorspace, stream.codec_context.color_range = tags
        stream.options = (
            {"bf": "3", "b-adapt": "0", "crf": "8", **(options or {})} if codec == "libx264" else {}
        )
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = pts[index] if pts else index, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read(path: Path, video: Video | None = None) -> list[tuple[Fraction, Fraction, U8]]:
    with VideoReader(path, video=video) as reader:
        return [(frame.time, frame.duration, frame.rgb) for frame in reader]


def equal(path: Path, video: Video) -> int:
    """Check that hardware gives what software gives; the number of frames."""
    wanted, got = read(path), read(path, video)
    assert [frame[:2] for frame in got] == [frame[:2] for frame in wanted]
    for (_, _, a), (_, _, b) in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert np.abs(a.astype(int) - b).max() <= 2
    return len(got)


def surfaces(clip: Clip, device: int) -> Generator[av.VideoFrame, None, None]:
    """What PyAV's hardware acceleration gives: FFmpeg's frames in the layout of a surface."""
    with open_stream(clip) as (container, stream):
        for packet in container.demux(stream):
            for frame in packet.decode():
                deep = frame.format.components[0].bits > 8
                if frame.format.name == "yuvj420p":
                    surface = av.VideoFrame.from_ndarray(fake_gstreamer.nv12(frame), format="nv12")
                else:
                    surface = repacked(frame, "p010le" if deep else "nv12")
                surface.pts, surface.duration = frame.pts, frame.duration
                surface.colorspace = frame.colorspace
                surface.color_range = 2 if frame.format.name.startswith("yuvj") else frame.color_range
                yield surface


@pytest.fixture
def nvcodec(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", make_nvcodec(world))
    return world


@pytest.fixture
def gstreamer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "gst-launch-1.0"
    program.write_text(f"#!{sys.executable}\n{Path(fake_gstreamer.__file__).read_text()}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = (Decoder("NVDEC through PyAV", "nvidia", surfaces), *hardware_video.DECODERS[1:])
    monkeypatch.setattr(hardware_video, "DECODERS", decoders)


def nvidia() -> Video:
    return Video(VideoConfig(decoder="nvidia", encoder="nvidia"))


# -- the choice ------------------------------------------------------------------------------------------------


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match="decoder is 'cuda'"):
        VideoConfig(decoder="cuda")
    with pytest.raises(ConfigError, match="encoder is 'x264'"):
        VideoConfig(encoder="x264")
    with pytest.raises(ConfigError, match="device is -1"):
        VideoConfig(device=-1)


def test_auto_tries_nothing_without_a_gpu_in_use(nvcodec: World, tmp_path: Path) -> None:
    video = Video(VideoConfig())
    path = write_clip(tmp_path / "a.mp4", 2)
    read(path, video)
    with open_writer(tmp_path / "b.mp4", (160, 64), 25, video=video) as writer:
        writer.write(picture(0, 160, 64))
    assert (video.decoder_of([path]), writer.encoder) == ("software", "software (libx264)")
    assert nvcodec.asked == []


def test_auto_takes_what_works(nvcodec: World, tmp_path: Path) -> None:
    video = Video(VideoConfig(device=1), accelerated=True)
    path = write_clip(tmp_path / "a.mp4")
    equal(path, video)
    with open_writer(tmp_path / "b.mp4", (160, 64), 25, video=video) as writer:
        writer.write(picture(0, 160, 64))
    assert (video.decoder_of([path]), writer.encoder) == (NVCODEC, "NVENC through PyNvVideoCodec")
    assert {a[1] for a in nvcodec.asked if a[0] == "decoder"} == {1}
    assert {a[3]["gpu_id"] for a in nvcodec.asked if a[0] == "encoder"} == {1}


def test_auto_falls_back_and_says_why(nvcodec: World, tmp_path: Path) -> None:
    nvcodec.fails_at_packet, nvcodec.encodes = 0, False
    video = Video(VideoConfig(), accelerated=True)
    path = write_clip(tmp_path / "a.mp4")
    assert equal(path, video) == 12
    with open_writer(tmp_path / "b.mp4", (160, 64), 25, video=video) as writer:
        writer.write(picture(0, 160, 64))
    decoder = video.decoder_of([path])
    assert decoder.startswith("software, because NVDEC through PyAV: ")
    assert "NVDEC through PyNvVideoCodec: HandlePictureDecode : cuvidDecodePicture" in decoder
    assert writer.encoder.startswith("software (libx264), because NVENC through PyAV: ")
    assert "returned unsupported device" in writer.encoder


def test_clips_are_told_apart_and_forgotten(nvcodec: World, tmp_path: Path) -> None:
    """One choice serves many runs: each asks for its own clips, and a server may decode without end."""
    video = Video(accelerated=True)
    hard, soft = write_clip(tmp_path / "a.mp4", 2), write_clip(tmp_path / "b.mp4", 2)
    read(hard, video)
    nvcodec.fails_at_packet = 0
    read(soft, video)
    assert video.decoder_of([hard]) == NVCODEC
    assert video.decoder_of([str(soft)]).startswith("software, because ")
    assert video.decoder_of([soft, hard, soft]) == f"{video.decoder_of([soft])}; {NVCODEC}"
    assert video.decoder_of([tmp_path / "c.mp4", "nod"]) == ""
    names = [soft.rename(tmp_path / "0.mp4")]
    read(names[0], video)
    for index in range(1, 64):
        names.append(names[-1].rename(tmp_path / f"{index}.mp4"))
        read(names[-1], video)
        assert video.decoder_of([hard]) == NVCODEC  # asked for, it stays
    assert video.decoder_of(names[:1]) == ""
    assert all(video.decoder_of([name]) for name in names[1:])
    names.append(names[-1].rename(tmp_path / "64.mp4"))
    read(names[-1], video)
    assert video.decoder_of([hard]) == ""


def test_the_gpu_is_the_networks_where_none_is_named() -> None:
    assert Video(device=2).device == 2
    assert Video(VideoConfig(device=0), device=2).device == 0


def test_writers_of_one_choice_keep_their_own_words(nvcodec: World, tmp_path: Path) -> None:
    video = Video(accelerated=True)
    with open_writer(tmp_path / "a.mp4", (160, 64), 25, video=video) as first:
        with (
            open_writer(tmp_path / "b.webm", (160, 64), 25, video=video) as second,
            open_writer(tmp_path / "c.gif", (160, 64), 25, video=video) as third,
        ):
            for writer in (first, second, third):
                writer.write(picture(0, 160, 64))
        assert (first.encoder, second.encoder, third.encoder) == (
            "NVENC through PyNvVideoCodec", "software (libvpx-vp9)", "",
        )  # fmt: skip


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="an NVIDIA driver is there")
def test_the_reason_is_ffmpegs_own_words(tmp_path: Path) -> None:
    if "h264_nvenc" not in av.codecs_available:
        pytest.skip("this build of PyAV has no NVENC")
    level = av.logging.get_level()
    with pytest.raises(BackendUnavailable, match="Cannot load libcuda"):
        try_encoder(hardware_video.ENCODERS[0], (256, 256), Fraction(25), 18, 0, explain=True)
    with pytest.raises(BackendUnavailable, match="Cannot load libcuda"):
        try_decoder(hardware_video.DECODERS[0], write_clip(tmp_path / "a.mp4", 2))
    assert av.logging.get_level() == level


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="an NVIDIA driver is there")
def test_runs_leave_the_log_of_ffmpeg_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV's way to hand it over stops the process for good when a damaged clip is decoded elsewhere."""
    if "h264_nvenc" not in av.codecs_available:
        pytest.skip("this build of PyAV has no NVENC")

    def forbidden(*_: Any) -> None:
        raise AssertionError("the log was asked for")

    monkeypatch.setattr(av.logging, "set_level", forbidden)
    video, path = Video(accelerated=True), write_clip(tmp_path / "a.mp4", 2)
    read(path, video)
    with open_writer(tmp_path / "b.mp4", (160, 64), 25, video=video) as writer:
        writer.write(picture(0, 160, 64))
    for words, there in (
        (video.decoder_of([path]), "NVDEC through PyAV: cannot load libcuda.so.1"),
        (writer.encoder, "NVENC through PyAV: cannot load libcuda.so.1"),
    ):
        assert there in words
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)  # the driver is there, and something else is wrong
    with pytest.raises(BackendUnavailable, match=r"\(lp-doctor tells more\)"):
        try_encoder(hardware_video.ENCODERS[0], (256, 256), Fraction(25), 18, 0)


def test_the_most_pixels_reach_ffmpegs_nvdec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that a stream that grows is refused before the GPU makes room for it."""
    context = SimpleNamespace(is_hwaccel=True, options={"x": "1"}, name="h264", thread_count=0)
    stream = SimpleNamespace(codec_context=context)

    @contextmanager
    def opened(clip: Clip, *, hwaccel: Any) -> Iterator[Any]:
        yield SimpleNamespace(demux=lambda _: iter(())), stream

    monkeypatch.setattr(hardware_video, "open_stream", opened)
    path = write_clip(tmp_path / "a.mp4", 2)
    with pytest.raises(BackendUnavailable, match="it gives no frame"):
        VideoReader(path, max_pixels=7000, video=nvidia())
    assert context.options == {"x": "1", "max_pixels": str(7000 + (1 << 20))}


def test_a_named_one_that_does_not_work_is_an_error(nvcodec: World, tmp_path: Path) -> None:
    nvcodec.fails_at_packet, nvcodec.encodes = 0, False
    path = write_clip(tmp_path / "a.mp4", 2)
    with pytest.raises(BackendUnavailable, match=r"nvidia does not decode a\.mp4 here .*lp-doctor"):
        VideoReader(path, video=nvidia())
    with pytest.raises(BackendUnavailable, match=r"nvidia does not encode b\.mp4 here"):
        open_writer(tmp_path / "b.mp4", (160, 64), 25, video=nvidia())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4"]


@pytest.mark.parametrize("name", ["b.webm", "b.gif", "b.png", "folder"])
def test_a_named_encoder_for_another_format_is_an_error(name: str, nvcodec: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected H\.264"):
        open_writer(tmp_path / name, (160, 64), 25, video=nvidia())
    assert list(tmp_path.iterdir()) == []
    with open_writer(tmp_path / name, (160, 64), 25, video=Video(accelerated=True)) as writer:
        writer.write(picture(0, 160, 64))


def test_an_old_nvcodec_is_told_apart(
    nvcodec: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", make_nvcodec(World(version="2.1.0")))
    with pytest.raises(BackendUnavailable, match=r"PyNvVideoCodec 2\.1\.0 is older than 2\.2"):
        VideoReader(write_clip(tmp_path / "a.mp4", 2), video=nvidia())


def test_nothing_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_clip(tmp_path / "a.mp4", 2)
    with pytest.raises(BackendUnavailable, match=r"gst-launch-1\.0 is not installed"):
        VideoReader(path, video=Video(VideoConfig(decoder="gstreamer")))
    with pytest.raises(BackendUnavailable, match="PyNvVideoCodec"):
        VideoReader(path, video=nvidia())


def test_a_jetson_prefers_gstreamer(
    gstreamer: None, nvcodec: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware_video, "is_jetson", lambda: True)
    monkeypatch.setenv("FAKE_GST", "no-encoder")
    nvcodec.encodes = False
    video = Video(accelerated=True)
    path = write_clip(tmp_path / "a.mp4")
    equal(path, video)
    with open_writer(tmp_path / "b.mp4", (160, 64), 25, video=video) as writer:
        writer.write(picture(0, 160, 64))
    assert video.decoder_of([path]) == GSTREAMER
    assert writer.encoder.startswith(
        "software (libx264), because nvv4l2h264enc through GStreamer: gst-launch-1.0: "
    )
    assert 'no element "nvv4l2h264enc"' in writer.encoder


# -- decoding: the same frames -----------------------------------------------------------------------------------

CLIPS: dict[str, dict[str, Any]] = {
    "b-frames": {"count": 30},
    "ntsc": {"fps": NTSC},
    "variable rate": {
        "pts": [0, 40, 200, 240, 700, 720, 1100, 1140],
        "count": 8,
        "time_base": Fraction(1, 1000),
    },
    "late start": {"pts": [500 + 40 * i for i in range(12)], "time_base": Fraction(1, 1000)},
    "bt709 limited": {"tags": (1, 1)},
    "bt601 limited": {"tags": (6, 1)},
    "bt601 full": {"tags": (6, 2), "pix_fmt": "yuvj420p"},
    "bt709 full": {"tags": (1, 2)},
    "high untagged": {"size": (64, 720), "count": 3},
    "one frame": {"count": 1},
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.usefixtures("pyav")
def test_pyav_gives_the_frames_of_software(name: str, suffix: str, tmp_path: Path) -> None:
    video = nvidia()
    path = write_clip(tmp_path / f"a{suffix}", **CLIPS[name])
    assert equal(path, video) == CLIPS[name].get("count", 12)
    assert video.decoder_of([path]) == "NVDEC through PyAV"


@pytest.mark.parametrize("name", CLIPS)
def test_nvcodec_gives_the_frames_of_software(name: str, nvcodec: World, tmp_path: Path) -> None:
    video = nvidia()
    path = write_clip(tmp_path / "a.mp4", **CLIPS[name])
    assert equal(path, video) == CLIPS[name].get("count", 12)
    assert video.decoder_of([path]) == NVCODEC


@pytest.mark.parametrize("name", ["b-frames", "variable rate", "bt601 full"])
@pytest.mark.usefixtures("gstreamer")
def test_gstreamer_gives_the_frames_of_software(name: str, tmp_path: Path) -> None:
    video = Video(VideoConfig(decoder="gstreamer"))
    path = write_clip(tmp_path / "a.mp4", **CLIPS[name])
    assert equal(path, video) == CLIPS[name].get("count", 12)
    assert video.decoder_of([path]) == GSTREAMER


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx", "libx265"])
def test_other_codecs_go_through_nvcodec(codec: str, nvcodec: World, tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} in this build of PyAV")
    assert equal(write_clip(tmp_path / "a.mkv", 6, codec=codec), nvidia()) == 6


def test_surfaces_of_ten_bits_are_repacked_the_same_every_time() -> None:
    """FFmpeg's threads spoil some pixels of one conversion in twenty."""
    deep = av.VideoFrame.from_ndarray(picture(0, 98, 66), format="rgb24").reformat(format="p010le")

    def values() -> bytes:
        planes = repacked(deep, "yuv420p10le").planes
        lines = (
            np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : 2 * p.width] for p in planes
        )
        return b"".join(line.tobytes() for line in lines)

    assert len({values() for _ in range(300)}) == 1


@pytest.mark.usefixtures("pyav")
def test_ten_bits_go_through_pyav_alone(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 4, pix_fmt="yuv420p10le")
    assert equal(path, nvidia()) == 4
    for choice in ("nvidia", "gstreamer"):
        decoders = [d for d in hardware_video.DECODERS if d.kind == choice][-1:]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hardware_video, "DECODERS", decoders)
            patch.setitem(sys.modules, "PyNvVideoCodec", make_nvcodec(World()))
            with pytest.raises(BackendUnavailable, match=r"yuv420p10le.* is not carried this way"):
                VideoReader(path, video=Video(VideoConfig(decoder=choice)))


@pytest.mark.parametrize("choice", ["nvidia", "gstreamer"])
@pytest.mark.usefixtures("gstreamer")
def test_rotation_and_mirror_hold(choice: str, nvcodec: World, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x00\x01\x00\x00" + bytes(12) + b"\x00\x01\x00\x00", data.index(b"tkhd"))
    one = 1 << 16
    data[at : at + 36] = struct.pack(
        ">9i", 0, one, 0, one, 0, 0, 0, 0, 1 << 30
    )  # a quarter turn and a mirror
    path.write_bytes(data)
    video = Video(VideoConfig(decoder=choice))
    with VideoReader(path, video=video) as reader:
        assert (reader.info.width, reader.info.height) == (66, 98)
    assert equal(path, video) == 3


@pytest.mark.parametrize("choice", ["nvidia", "gstreamer"])
@pytest.mark.usefixtures("gstreamer")
def test_hidden_frames_of_an_edit_list_stay_hidden(choice: str, nvcodec: World, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 12, time_base=Fraction(1, 12800), pts=[512 * i for i in range(12)])
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4
    flags, entries, duration, start = struct.unpack(">IIIi", data[at : at + 16])
    assert (flags, entries) == (0, 1)
    data[at + 8 : at + 16] = struct.pack(">Ii", duration * 2 // 3, start + 4 * 512)
    path.write_bytes(data)
    hidden = [p.is_discard for p in av.open(str(path)).demux(video=0) if p.size]
    assert any(hidden)
    assert 0 < equal(path, Video(VideoConfig(decoder=choice))) < 12


@pytest.mark.parametrize("choice", ["pyav", "nvidia", "gstreamer"])
@pytest.mark.usefixtures("gstreamer")
def test_a_change_of_size_is_scaled_to_the_first_one(
    choice: str, nvcodec: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if choice == "pyav":
        request.getfixturevalue("pyav")
    small = write_clip(tmp_path / "small.h264", 4, options={"bf": "0"})
    large = write_clip(tmp_path / "large.h264", 4, size=(196, 132), options={"bf": "0"})
    path = tmp_path / "both.h264"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    video = Video(VideoConfig(decoder="gstreamer" if choice == "gstreamer" else "nvidia"))
    wanted, got = read(path), read(path, video)
    assert [f[2].shape for f in got] == [f[2].shape for f in wanted] == [(66, 98, 3)] * 8
    # GStreamer scales with a filter of its own.
    most = 2 if choice != "gstreamer" else 12
    assert all(np.abs(a[2].astype(int) - b[2]).mean() <= most for a, b in zip(got, wanted, strict=True))


def test_frames_that_grow_beyond_the_limit_are_refused(nvcodec: World, tmp_path: Path) -> None:
    small = write_clip(tmp_path / "small.h264", 3, options={"bf": "0"})
    large = write_clip(tmp_path / "large.h264", 3, size=(196, 132), options={"bf": "0"})
    path = tmp_path / "both.h264"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with VideoReader(path, video=nvidia()) as reader:
        reader._max_pixels = (
            10_000  # the header promises the large size, so that the constructor would refuse it
        )
        with pytest.raises(MediaError, match="196x132"):
            list(reader)
        assert reader._hardware == NVCODEC


@pytest.mark.usefixtures("pyav")
def test_odd_sizes(tmp_path: Path) -> None:
    if "libvpx-vp9" not in av.codecs_available:
        pytest.skip("no libvpx-vp9 in this build of PyAV")
    path = write_clip(tmp_path / "a.webm", 3, size=(97, 65), codec="libvpx-vp9")
    assert equal(path, nvidia()) == 3


def test_another_first_frame_is_refused(nvcodec: World, tmp_path: Path) -> None:
    nvcodec.tint = 6
    path = write_clip(tmp_path / "a.mp4", 3)
    video = Video(accelerated=True)
    assert equal(path, video) == 3
    assert "its first frame differs by" in video.decoder_of([path])
    with pytest.raises(BackendUnavailable, match="its first frame differs by"):
        VideoReader(path, video=nvidia())


def test_transparency_stays_in_software(nvcodec: World, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mov", 2, codec="qtrle", pix_fmt="argb")
    video = Video(accelerated=True)
    assert equal(path, video) == 2
    assert video.decoder_of([path]).startswith("software, because ")


# -- decoding: what goes wrong -------------------------------------------------------------------------------------


def test_a_failure_in_the_middle_is_an_error(nvcodec: World, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 30, options={"bf": "0"})
    nvcodec.fails_at_packet = 20
    video = Video(accelerated=True)
    with VideoReader(path, video=video, allow_truncated=True) as reader:
        given = 0
        with pytest.raises(
            MediaError, match=rf"{NVCODEC} failed at frame \d+ of a\.mp4 .*--decoder software"
        ) as error:
            for _ in reader:
                given += 1
    assert f"frame {given} " in str(error.value)
    assert 0 < given <= 20


@pytest.mark.usefixtures("gstreamer")
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("fail:9", r"failed at frame \d of a\.mp4 .*Failed to process frame"),
        ("lose:7", "gave 29 frames for 30 packets"),
    ],
)
def test_gstreamer_that_fails_is_an_error(
    mode: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_GST", mode)
    path = write_clip(tmp_path / "a.mp4", 30)
    with pytest.raises(MediaError, match=words):
        read(path, Video(VideoConfig(decoder="gstreamer")))


@pytest.mark.usefixtures("gstreamer")
def test_gstreamer_that_is_stuck_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_GST", "stick")
    monkeypatch.setattr(hardware_video_gstreamer, "_SILENCE", 0.3)
    path = write_clip(tmp_path / "a.mp4", 2)
    with pytest.raises(BackendUnavailable, match=r"nothing has moved for|does not end"):
        read(path, Video(VideoConfig(decoder="gstreamer")))


@pytest.mark.usefixtures("gstreamer")
def test_a_reader_that_is_left_early_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []

    class Watched(hardware_video_gstreamer._Pipeline):
        def __init__(self, elements: str, block: int) -> None:
            super().__init__(elements, block)
            started.append(self._process)

    monkeypatch.setattr(hardware_video_gstreamer, "_Pipeline", Watched)
    path = write_clip(tmp_path / "a.mp4", 60)
    with VideoReader(path, video=Video(VideoConfig(decoder="gstreamer"))) as reader:
        next(reader)
    assert [p.returncode is not None for p in started] == [True]


@pytest.mark.parametrize("choice", ["software", "nvidia"])
def test_a_clip_cut_off_is_refused_either_way(choice: str, nvcodec: World, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", 40)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(MediaError, match="cut off"):
        VideoReader(path, video=Video(VideoConfig(decoder=choice)))


# -- encoding ------------------------------------------------------------------------------------------------------


class X264(AccessUnits):
    """libx264 that gives byte-stream access units."""

    def __init__(self, size: tuple[int, int], fps: Fraction, crf: int, device: int) -> None:
        self._context: Any = av.codec.CodecContext.create("libx264", "w")
        self._context.width, self._context.height = size
        self._context.pix_fmt, self._context.time_base = "yuv420p", 1 / fps
        self._context.gop_size = 10
        self._context.options = {
            "crf": str(crf), "bf": "0", "preset": "ultrafast", "x264-params": "aud=1:repeat-headers=1",
        }  # fmt: skip
        self.count, self.given = 0, [b""][:0]

    def _keep(self, packets: list[Any]) -> list[bytes]:
        units = [bytes(packet) for packet in packets]
        self.given += units
        return units

    def encode(self, frame: av.VideoFrame) -> list[bytes]:
        frame.pts, self.count = self.count, self.count + 1
        return self._keep(self._context.encode(frame))

    def finish(self) -> list[bytes]:
        return self._keep(self._context.encode(None))

    def close(self) -> None:
        pass


def decoded(units: list[bytes]) -> list[U8]:
    context: Any = av.codec.CodecContext.create("h264", "r")
    frames = [f for unit in units for f in context.decode(av.Packet(unit))] + context.decode(None)
    return [frame.to_ndarray() for frame in frames]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("fps", [Fraction(25), NTSC, Fraction(12)], ids=str)
def test_access_units_become_a_file_frame_by_frame(
    suffix: str, fps: Fraction, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if suffix == ".mkv" and int(av.__version__.split(".")[0]) < 18:
        pytest.skip("this version of PyAV writes no frame rate into .mkv")
    sessions: list[X264] = []

    def open_session(*arguments: Any) -> X264:
        sessions.append(X264(*arguments))
        return sessions[-1]

    monkeypatch.setattr(hardware_video, "ENCODERS", (Encoder("x264 outside", "nvidia", units=open_session),))
    path = tmp_path / f"a{suffix}"
    with open_writer(path, (98, 66), fps, crf=12, video=nvidia()) as writer:
        for index in range(25):
            writer.write(picture(index))
    assert writer.encoder == "x264 outside"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context: Any = stream.codec_context
        frames = list(container.decode(stream))
        assert context.extradata[:1] == b"\1"  # avcC, as players want it
        assert stream.average_rate == fps
        if suffix != ".mkv":
            assert [f.pts * stream.time_base for f in frames] == [i / fps for i in range(25)]
            assert stream.duration * stream.time_base == 25 / fps
    times = [frame.pts * frame.time_base for frame in frames]
    assert all(abs(time - i / fps) <= Fraction(1, 2000) for i, time in enumerate(times))
    for got, wanted in zip(frames, decoded(sessions[-1].given), strict=True):
        assert np.array_equal(got.to_ndarray(), wanted)
    assert {(int(f.colorspace), int(f.color_range)) for f in frames} == {(1, 1)}
    assert [f.key_frame for f in frames] == [i % 10 == 0 for i in range(25)]
    for index, (_, _, rgb) in enumerate(read(path)):
        assert np.abs(rgb.astype(int) - picture(index)).mean() < 8


@pytest.mark.parametrize("choice", ["nvidia", "gstreamer"])
@pytest.mark.parametrize("size", [(160, 64), (161, 65), (162, 66)], ids=str)
@pytest.mark.usefixtures("gstreamer")
def test_hardware_writes_what_software_writes(
    choice: str, size: tuple[int, int], nvcodec: World, tmp_path: Path
) -> None:
    video = Video(VideoConfig(encoder=choice))
    encoders = []
    for name, used in (("hard.mp4", video), ("soft.mp4", None)):
        with open_writer(tmp_path / name, size, NTSC, crf=10, video=used) as writer:
            for index in range(15):
                writer.write(picture(index, *size))
        encoders.append(writer.encoder)
    hard, soft = read(tmp_path / "hard.mp4"), read(tmp_path / "soft.mp4")
    assert "through" in encoders[0]
    assert encoders[1] == "software (libx264)"
    assert [f[:2] for f in hard] == [f[:2] for f in soft]
    for a, b in zip(hard, soft, strict=True):
        assert a[2].shape == b[2].shape
        assert np.abs(a[2].astype(int) - b[2]).mean() < 4


def test_sound_is_copied_beside_hardware(nvcodec: World, tmp_path: Path) -> None:
    source = tmp_path / "sound.mp4"
    with av.open(str(source), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound: Any = container.add_stream("aac", rate=48000)
        for index in range(25):
            frame = av.VideoFrame.from_ndarray(picture(index, 64, 48), format="rgb24").reformat(
                format="yuv420p"
            )
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for at in range(0, 48000, 1024):
            wave = np.sin(np.arange(at, at + 1024, dtype=np.float32) / 9)[None].repeat(2, 0)
            block = av.AudioFrame.from_ndarray(wave.astype(np.float32), format="fltp", layout="stereo")
            block.sample_rate, block.pts = 48000, at
            container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    for name, video in (("hard.mp4", nvidia()), ("soft.mp4", None)):
        with open_writer(tmp_path / name, (160, 64), 25, audio_from=source, video=video) as writer:
            for index in range(25):
                writer.write(picture(index, 160, 64))

    def packets(name: str) -> list[tuple[int | None, bytes]]:
        with av.open(str(tmp_path / name)) as container:
            return [(p.pts, bytes(p)) for p in container.demux(audio=0) if p.size]

    assert packets("hard.mp4") == packets("soft.mp4") != []


def test_quality_reaches_the_encoder(nvcodec: World, tmp_path: Path) -> None:
    for crf in (None, 0, 30):
        with open_writer(tmp_path / "a.mp4", (160, 64), 25, crf=crf, video=nvidia()) as writer:
            writer.write(picture(0, 160, 64))
    assert [a[3]["cq"] for a in nvcodec.asked if a[0] == "encoder"][1::2] == [18, 1, 30]


def test_ffmpegs_nvenc_knows_the_options() -> None:
    if "h264_nvenc" not in av.codecs_available:
        pytest.skip("this build of PyAV has no NVENC")
    context: Any = av.codec.CodecContext.create("h264_nvenc", "w")
    if not hasattr(context, "supported_options"):
        pytest.skip("this version of PyAV does not list options")
    known = {option.name: option for option in context.supported_options.private}
    for crf in (0, 18, 51):
        for name, value in hardware_video.nvenc_options(crf, 0).items():
            choices = {choice.name for choice in known[name].choices}
            assert value in choices or known[name].min <= float(value) <= known[name].max
    assert hardware_video.nvenc_options(0, 2) | {} == {
        "rc": "vbr", "cq": "1", "preset": "p4", "tune": "hq", "gpu": "2",
    }  # fmt: skip


def test_an_encoder_of_pyav_writes_as_libx264_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    encoder = Encoder("NVENC through PyAV", "nvidia", codec="libx264")
    monkeypatch.setattr(hardware_video, "ENCODERS", (encoder,))
    monkeypatch.setattr(
        hardware_video, "nvenc_options", lambda crf, device: {"crf": str(crf), "preset": "veryfast"}
    )
    monkeypatch.setattr(
        "lp_edge.runtime.media_write.nvenc_options",
        lambda crf, device: {"crf": str(crf), "preset": "veryfast"},
    )
    encoders = []
    for name, used in (("hard.mp4", nvidia()), ("soft.mp4", None)):
        with open_writer(tmp_path / name, (160, 64), 25, video=used) as writer:
            for index in range(15):
                writer.write(picture(index, 160, 64))
        encoders.append(writer.encoder)
    assert encoders == ["NVENC through PyAV", "software (libx264)"]
    hard, soft = read(tmp_path / "hard.mp4"), read(tmp_path / "soft.mp4")
    assert [f[:2] for f in hard] == [f[:2] for f in soft]
    for index, frames in enumerate(
        zip(hard, soft, strict=True)
    ):  # libx264 with threads is not the same twice
        far = [np.abs(rgb.astype(int) - picture(index, 160, 64)).mean() for _, _, rgb in frames]
        assert max(far) < 8
        assert abs(far[0] - far[1]) < 1


# -- encoding: what goes wrong -----------------------------------------------------------------------------------


def test_an_encoder_that_fails_leaves_nothing(nvcodec: World, tmp_path: Path) -> None:
    nvcodec.fails_at_frame = 5
    words = (
        r"NVENC through PyNvVideoCodec failed at frame 5 of a\.mp4 .*NV_ENC_ERR_GENERIC.*--encoder software"
    )
    with (
        pytest.raises(OutputError, match=words),
        open_writer(tmp_path / "a.mp4", (160, 64), 25, video=nvidia()) as writer,
    ):
        for index in range(10):
            writer.write(picture(index, 160, 64))
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_changes_its_parameters_is_an_error(nvcodec: World, tmp_path: Path) -> None:
    nvcodec.changes_parameters = True
    with (
        pytest.raises(OutputError, match=r"changed its parameters at frame \d"),
        open_writer(tmp_path / "a.mp4", (160, 64), 25, video=nvidia()) as writer,
    ):
        for index in range(60):
            writer.write(picture(index, 160, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("gstreamer")
def test_a_pipeline_that_dies_while_encoding_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    video = Video(VideoConfig(encoder="gstreamer"))
    monkeypatch.setenv("FAKE_GST", "fail:4")  # the trial has one frame
    out = tmp_path / "out"
    out.mkdir()
    with (
        pytest.raises(OutputError, match=r"nvv4l2h264enc through GStreamer failed at frame \d+ of a\.mp4"),
        open_writer(out / "a.mp4", (160, 64), 25, video=video) as writer,
    ):
        for index in range(50):
            writer.write(picture(index, 160, 64))
    assert list(out.iterdir()) == []


def test_too_few_access_units_are_an_error(tmp_path: Path) -> None:
    class Lossy(X264):
        def finish(self) -> list[bytes]:
            return super().finish()[:-1]

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        session = Lossy((160, 64), Fraction(25), 18, 0)
        header = try_encoder(Encoder("x", "nvidia", units=X264), (160, 64), Fraction(25), 18, 0)
        stream = UnitStream(container, session, header, Fraction(25))
        container.start_encoding()
        for index in range(8):
            frame = av.VideoFrame.from_ndarray(picture(index, 160, 64), format="rgb24").reformat(
                format="yuv420p"
            )
            for packet in stream.encode(frame):
                container.mux(packet)
        with pytest.raises(OutputError, match="gave 7 access units for 8 frames"):
            stream.encode(None)


def test_an_encoder_that_gives_something_else_is_not_used() -> None:
    class Wrong(X264):
        def __init__(self, size: tuple[int, int], *rest: Any) -> None:
            super().__init__((64, 64), *rest)

        def encode(self, frame: av.VideoFrame) -> list[bytes]:
            return super().encode(frame.reformat(64, 64))

    class Green(X264):
        def encode(self, frame: av.VideoFrame) -> list[bytes]:
            return super().encode(av.VideoFrame.from_ndarray(np.zeros((96, 160), np.uint8), format="yuv420p"))

    for kind, words in ((Wrong, "came out as"), (Green, "another colour")):
        with pytest.raises(BackendUnavailable, match=words):
            try_encoder(Encoder("x", "nvidia", units=kind), (160, 64), Fraction(25), 18, 0)


def test_old_versions_of_pyav_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "__version__", "14.4.0")
    with pytest.raises(BackendUnavailable, match=r"PyAV 14\.4\.0 cannot write its packets"):
        try_encoder(Encoder("x", "nvidia", units=X264), (160, 64), Fraction(25), 18, 0)


def test_access_units_are_split_at_their_delimiters() -> None:
    session = X264((160, 64), Fraction(25), 30, 0)
    units: list[bytes] = []
    for index in range(12):
        frame = av.VideoFrame.from_ndarray(picture(index, 160, 64), format="rgb24").reformat(format="yuv420p")
        units += session.encode(frame)
    units += session.finish()
    stream, got, rest = b"".join(units), [b""][:0], b""
    for at in range(0, len(stream), 97):
        more, rest = split_units(rest + stream[at : at + 97])
        got += more
    assert [*got, rest] == units
    assert split_units(b"\0\0\1\x65abc") == ([], b"\0\0\1\x65abc")


def test_a_header_without_parameter_sets_is_an_error(tmp_path: Path) -> None:
    session = X264((160, 64), Fraction(25), 30, 0)
    with (
        av.open(str(tmp_path / "a.mp4"), "w") as container,
        pytest.raises(OutputError, match="lacks its parameter sets"),
    ):
        UnitStream(container, session, b"\0\0\1\x65abc", Fraction(25))
