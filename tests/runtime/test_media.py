"""Clips in and out: exact times, rates and sound, whole or nothing, and clear errors for what is broken."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from lp_edge.errors import ConfigError, MediaError, OutputError
from lp_edge.runtime import media_write
from lp_edge.runtime.image import encode_image, read_image
from lp_edge.runtime.media_read import Frame, MediaInfo, VideoReader, probe, resample, sniff_kind
from lp_edge.runtime.media_write import check_output, open_writer

U8 = npt.NDArray[np.uint8]
NTSC = Fraction(30000, 1001)


def numbered(index: int, width: int = 64, height: int = 48) -> U8:
    """A frame that tells its number: eight broad bars, one per bit, white for 1."""
    out = np.zeros((height, width, 3), np.uint8)
    for bit in range(8):
        if index >> bit & 1:
            out[:, bit * width // 8 : (bit + 1) * width // 8] = 255
    return out


def number_of(rgb: U8) -> int:
    width = rgb.shape[1]
    return sum((int(rgb[:, (2 * bit + 1) * width // 16].mean()) > 127) << bit for bit in range(8))


def quarters(width: int, height: int) -> U8:
    """Red, green / blue, white: every turn and mirror of it is different."""
    out = np.full((height, width, 3), 255, np.uint8)
    out[: height // 2, : width // 2] = (255, 0, 0)
    out[: height // 2, width // 2 :] = (0, 255, 0)
    out[height // 2 :, : width // 2] = (0, 0, 255)
    return out


def write_clip(
    path: Path,
    frames: list[U8],
    fps: Fraction | int = 25,
    *,
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    gop: int = 12,
) -> Path:
    """A clip made with PyAV alone, so that the reader is not tested against the writer."""
    base = time_base or 1 / Fraction(fps)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = base
        stream.codec_context.gop_size = gop
        if codec == "libx264":
            stream.options = {"crf": "10", "preset": "ultrafast"}
        for index, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = pts[index] if pts else index, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# -- sound: bursts of a tone at known times, and a reader that finds them ---------------------------------

BURSTS = [Fraction(1, 2), Fraction(3, 2), Fraction(23, 10), Fraction(31, 10)]


def tone(seconds: float, rate: int, bursts: list[Fraction] = BURSTS) -> npt.NDArray[np.float32]:
    """A tone of 1 kHz that sounds for 60 ms at the times of ``bursts``."""
    t = np.arange(round(seconds * rate)) / rate
    on = np.zeros(len(t), bool)
    for burst in bursts:
        on |= (t >= float(burst)) & (t < float(burst) + 0.06)
    return (0.6 * np.sin(2 * np.pi * 1000 * t) * on).astype(np.float32)


def write_clip_with_sound(
    path: Path,
    seconds: float = 4.0,
    fps: Fraction | int = 25,
    *,
    audio: str = "aac",
    rate: int = 44100,
    video: str = "libx264",
    channels: int = 2,
    sound_seconds: float | None = None,
) -> Path:
    """Frames numbered as time goes, and :func:`tone`."""
    count = round(seconds * fps)
    with av.open(str(path), "w") as container:
        picture = container.add_stream(video, rate=Fraction(fps))
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        layout = "stereo" if channels == 2 else "mono"
        sound = container.add_stream(audio, rate=rate)
        sound.codec_context.layout = layout
        wave = tone(sound_seconds or seconds, rate)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(index % 256), format="rgb24").reformat(
                format="yuv420p"
            )
            frame.pts, frame.time_base = index, 1 / Fraction(fps)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        size = 1024
        for at in range(0, len(wave), size):
            part = np.stack([wave[at : at + size]] * channels)
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="fltp", layout=layout)
            block.sample_rate, block.pts, block.time_base = rate, at, Fraction(1, rate)
            for converted in av.AudioResampler(
                format=sound.codec_context.format.name, layout=layout, rate=rate
            ).resample(block):
                container.mux(sound.encode(converted))
        container.mux(sound.encode(None))
    return path


@dataclass
class Sound:
    codec: str
    rate: int
    start: Fraction
    end: Fraction
    onsets: list[float]


def sound_of(path: Path) -> Sound | None:
    """Codec, extent and the times at which tone bursts begin, on the clip's own time line."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        codec, rate = stream.codec_context.name, stream.codec_context.sample_rate
        end = Fraction(0)
        samples: list[npt.NDArray[np.float32]] = []
        times: list[npt.NDArray[np.float64]] = []
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
        for frame in container.decode(stream):
            assert frame.pts is not None
            at = frame.pts * frame.time_base
            end = max(end, at + Fraction(frame.samples, rate))
            wave = np.concatenate([f.to_ndarray()[0] for f in resampler.resample(frame)])
            samples.append(wave)
            times.append(float(at) + np.arange(len(wave)) / rate)
    wave, when = np.concatenate(samples), np.concatenate(times)
    window = max(1, rate // 500)
    loud = np.convolve(np.abs(wave), np.ones(window) / window, mode="same") > 0.15
    rising = np.flatnonzero(loud[1:] & ~loud[:-1])
    onsets: list[float] = []
    for index in rising:
        if not onsets or when[index] - onsets[-1] > 0.2:
            onsets.append(float(when[index]))
    return Sound(codec, rate, Fraction(float(when[0])), end, onsets)


@dataclass
class Picture:
    frames: int
    start: Fraction
    end: Fraction
    rate: Fraction | None


def picture_of(path: Path) -> Picture:
    """Number of frames and their extent, from the packets."""
    count, starts, end = 0, [], Fraction(0)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.pts is not None and packet.size:
                count += 1
                starts.append(packet.pts * packet.time_base)
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
        return Picture(count, min(starts), end, stream.average_rate)


# -- reading -------------------------------------------------------------------------------------------------


def test_frames_come_with_number_time_and_picture(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", [numbered(i) for i in range(30)], NTSC)
    with VideoReader(path) as reader:
        assert reader.info == MediaInfo("video", 64, 48, NTSC, 30, 30 / NTSC, False, 0)
        frames = list(reader)
        assert list(reader) == []
    assert [f.index for f in frames] == list(range(30))
    assert [f.time for f in frames] == [i / NTSC for i in range(30)]
    assert [number_of(f.rgb) for f in frames] == list(range(30))
    assert all(f.rgb.shape == (48, 64, 3) and f.rgb.flags.c_contiguous for f in frames)
    assert all(f.duration == 1 / NTSC for f in frames)
    assert probe(path) == reader.info


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".mov", ".webm", ".ts"])
def test_containers(suffix: str, tmp_path: Path) -> None:
    codec = "libvpx" if suffix == ".webm" else "libx264"
    path = write_clip(tmp_path / f"a{suffix}", [numbered(i) for i in range(25)], 25, codec=codec)
    assert sniff_kind(path) == "video"
    with VideoReader(path) as reader:
        assert reader.info.fps == 25
        frames = list(reader)
    assert [number_of(f.rgb) for f in frames] == list(range(25))
    assert all(abs(f.time - Fraction(f.index, 25)) <= Fraction(1, 1000) for f in frames)
    assert frames[0].time == 0, "times count from the first frame"


def test_gif_is_a_clip_or_a_picture(tmp_path: Path) -> None:
    moving, still = tmp_path / "moving.gif", tmp_path / "still.gif"
    for path, count in ((moving, 5), (still, 1)):
        with open_writer(path, (64, 48), 10) as writer:
            for i in range(count):
                writer.write(numbered(i))
    assert sniff_kind(moving) == "video" and sniff_kind(still) == "image"
    info = probe(moving)
    assert (info.frames, info.fps, info.duration) == (5, 10, Fraction(1, 2))
    with VideoReader(moving) as reader:
        frames = list(reader)
    assert [number_of(f.rgb) for f in frames] == list(range(5))
    assert [f.time for f in frames] == [Fraction(i, 10) for i in range(5)]
    assert probe(still) == MediaInfo("image", 64, 48, frames=1)
    assert number_of(read_image(still)) == 0


def test_reading_stops_where_the_caller_stops(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", [numbered(i) for i in range(30)])
    reader = VideoReader(path)
    assert number_of(next(reader).rgb) == 0
    reader.close()
    reader.close()
    with pytest.raises(MediaError, match="was closed"):
        next(reader)


def matrix(rotation: int, mirrored: bool) -> bytes:
    """Display matrix of an MP4 track that turns clockwise by ``rotation``, mirroring left-right before."""
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[rotation]
    if mirrored:
        a, b = -a, -b
    return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation_and_mirror_are_applied(rotation: int, mirrored: bool, tmp_path: Path) -> None:
    shown = quarters(64, 48)
    path = write_clip(tmp_path / "turned.mp4", [shown] * 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix stands 40 bytes into the box
    assert data[at : at + 36] == matrix(0, False)
    data[at : at + 36] = matrix(rotation, mirrored)
    path.write_bytes(data)
    expected = np.rot90(shown[:, ::-1] if mirrored else shown, -rotation // 90)
    with VideoReader(path) as reader:
        frame = next(reader)
        assert (reader.info.width, reader.info.height) == (expected.shape[1], expected.shape[0])
        assert reader.info.rotation == -rotation % 360
    assert frame.rgb.shape == expected.shape and frame.rgb.flags.c_contiguous
    # Compare in the middle of the quarters, where 4:2:0 does not blur.
    assert np.abs(frame.rgb[8::16, 8::16].astype(int) - expected[8::16, 8::16]).max() < 40
    assert probe(path).rotation == -rotation % 360


def test_pixels_are_made_square(tmp_path: Path) -> None:
    path = tmp_path / "wide.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        frame = av.VideoFrame.from_ndarray(quarters(64, 48), format="rgb24").reformat(format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with VideoReader(path) as reader:
        assert (reader.info.width, reader.info.height) == (96, 48)
        assert next(reader).rgb.shape == (48, 96, 3)


@pytest.mark.parametrize("space", ["709", "601", "untagged", "full"])
def test_colours_follow_the_tags(space: str, tmp_path: Path) -> None:
    colours = np.array([(200, 30, 40), (30, 190, 60), (40, 50, 210), (120, 120, 120)], np.uint8)
    rgb = np.repeat(np.repeat(colours.reshape(2, 2, 3), 32, 0), 32, 1)
    red, green, blue = (rgb[..., i].astype(float) for i in range(3))
    kr, kb = (0.2126, 0.0722) if space == "709" else (0.299, 0.114)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    if space == "full":
        planes = [luma, cb + 128, cr + 128]
    else:
        planes = [16 + luma * 219 / 255, 128 + cb * 224 / 255, 128 + cr * 224 / 255]
    yuv = (
        np.concatenate([planes[0].ravel(), planes[1][::2, ::2].ravel(), planes[2][::2, ::2].ravel()])
        .round()
        .astype(np.uint8)
    )
    path = tmp_path / "colours.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        context = stream.codec_context
        if space != "untagged":
            context.colorspace = 1 if space == "709" else 6
            context.color_range = 2 if space == "full" else 1
        frame = av.VideoFrame.from_ndarray(yuv.reshape(96, 64), format="yuv420p")
        if space != "untagged":
            frame.colorspace, frame.color_range = context.colorspace, context.color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with VideoReader(path) as reader:
        got = next(reader).rgb
    assert np.abs(got[16::32, 16::32].astype(int) - rgb[16::32, 16::32]).max() <= 4


def test_variable_frame_rate_keeps_the_clip_s_own_times(tmp_path: Path) -> None:
    pts = [0, 40, 80, 200, 240, 500, 520, 1000]
    path = write_clip(
        tmp_path / "vfr.mp4", [numbered(i) for i in range(8)], 25, pts=pts, time_base=Fraction(1, 1000)
    )
    with VideoReader(path) as reader:
        frames = list(reader)
    assert [f.time for f in frames] == [Fraction(p, 1000) for p in pts]
    with VideoReader(path) as reader:
        even = list(resample(reader, 25))
    assert [f.time for f in even] == [Fraction(i, 25) for i in range(len(even))]
    assert [f.index for f in even] == list(range(len(even)))
    for frame in even:
        nearest = min(abs(Fraction(p, 1000) - frame.time) for p in pts)
        assert abs(Fraction(pts[number_of(frame.rgb)], 1000) - frame.time) == nearest


def stills(times: list[Fraction], duration: Fraction) -> list[Frame]:
    return [Frame(i, t, numbered(i), duration) for i, t in enumerate(times)]


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), NTSC, Fraction(12345, 1000)])
def test_resampling_to_the_same_rate_changes_nothing(rate: Fraction) -> None:
    exact = [i / rate for i in range(50)]
    rounded = [Fraction(round(t * 1000), 1000) for t in exact]  # as Matroska stores them
    for times in (exact, rounded):
        got = list(resample(stills(times, 1 / rate), rate))
        assert [number_of(f.rgb) for f in got] == list(range(50))
        assert [f.time for f in got] == exact


@pytest.mark.parametrize(
    ("of", "to", "count"), [(30, 60, 60), (30, 15, 15), (25, 30, 36), (30, 25, 25), (30, 1, 1)]
)
def test_resampling_keeps_the_duration(of: int, to: int, count: int) -> None:
    frames = stills([Fraction(i, of) for i in range(30)], Fraction(1, of))
    got = list(resample(frames, to))
    assert len(got) == count == max(1, round(Fraction(30, of) * to))
    for frame in got:
        # Never further than half a source frame from the time it stands for; at the end the last frame holds.
        assert abs(Fraction(number_of(frame.rgb), of) - frame.time) <= Fraction(1, of)


def test_resampling_of_nothing_and_of_one_frame() -> None:
    assert list(resample([], 25)) == []
    assert len(list(resample(stills([Fraction(0)], Fraction(1, 25)), 25))) == 1
    assert len(list(resample(stills([Fraction(0)], Fraction(0)), 25))) == 1
    with pytest.raises(ConfigError, match="frame rate of 0"):
        resample([], 0)


def test_sniffing_goes_by_content_first(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", [numbered(0)] * 2)
    named_wrong = tmp_path / "clip.jpg"
    named_wrong.write_bytes(clip.read_bytes())
    assert sniff_kind(named_wrong) == "video" and probe(named_wrong).kind == "video"
    picture = tmp_path / "picture.mp4"
    picture.write_bytes(encode_image(quarters(64, 48), ".png"))
    assert sniff_kind(picture) == "image"
    for name, content in {
        "a.npz": b"PK\x03\x04....",
        "b.bin": b"\x80\x04\x95....",
        "c.pkl": b"(dp0\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert sniff_kind(tmp_path / name) == "template"
    (tmp_path / "text.jpg").write_text("no picture")
    assert sniff_kind(tmp_path / "text.jpg") == "image", "the suffix decides where the content is silent"
    (tmp_path / "text.mp4").write_text("no clip")
    assert sniff_kind(tmp_path / "text.mp4") == "video"
    (tmp_path / "what.xyz").write_text("no idea")
    with pytest.raises(MediaError, match=r"what\.xyz is neither"):
        sniff_kind(tmp_path / "what.xyz")
    (tmp_path / "empty.mp4").touch()
    for path, words in (
        (tmp_path / "no.mp4", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "empty.mp4", "is empty"),
    ):
        for reader in (sniff_kind, probe, VideoReader):
            with pytest.raises(MediaError, match=words):
                reader(path)
    with pytest.raises(MediaError, match="motion template"):
        probe(tmp_path / "a.npz")
    with pytest.raises(MediaError, match="no picture that can be read"):
        probe(tmp_path / "text.jpg")


def refused(path: Path, *words: str) -> None:
    start = time.monotonic()
    with pytest.raises(MediaError) as caught, VideoReader(path) as reader:
        list(reader)
    assert time.monotonic() - start < 3
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert caught.value.expected and caught.value.remedy


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    text, noise = tmp_path / "text.mp4", tmp_path / "noise.mp4"
    text.write_text("this is no clip\n" * 100)
    refused(text, "text.mp4 is no clip")
    noise.write_bytes(np.random.default_rng(0).bytes(20_000))
    refused(noise, "noise.mp4 is no clip")
    playlist = tmp_path / "list.m3u8"
    other = write_clip(tmp_path / "other.ts", [numbered(0)] * 3)
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n")
    refused(playlist, "is no clip")  # it would open other files


def test_sound_without_pictures_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        stream.codec_context.layout = "mono"
        for at in range(0, 44100, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, at
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(path, "song.m4a holds sound only (aac)", "choose a video")


def test_a_clip_without_frames_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", [numbered(0)] * 2, codec="libx264")
    data = path.read_bytes()
    # Everything up to the first cluster: a whole header, no frame. Its segment's size is set to "unknown".
    head = bytearray(data[: data.index(b"\x1f\x43\xb6\x75")])
    at = head.index(b"\x18\x53\x80\x67") + 4
    head[at : at + 8] = b"\x01\xff\xff\xff\xff\xff\xff\xff"
    path.write_bytes(head)
    refused(path, "a.mkv holds no frame")


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (96, 128, 3), dtype=np.uint8) for _ in range(40)]
    return {
        "late index": write_clip(folder / "late.mp4", frames),
        "early index": write_clip(folder / "early.mp4", frames, options={"movflags": "faststart"}),
        "fragments": write_clip(
            folder / "fragments.mp4", frames, options={"movflags": "frag_keyframe+empty_moov"}
        ),
        "matroska": write_clip(folder / "clip.mkv", frames),
        "avi": write_clip(folder / "clip.avi", frames, codec="mpeg4"),
        "gif": write_clip_gif(folder / "clip.gif", frames[:6]),
    }


def write_clip_gif(path: Path, frames: list[U8]) -> Path:
    with open_writer(path, (frames[0].shape[1], frames[0].shape[0]), 10) as writer:
        for frame in frames:
            writer.write(frame)
    return path


@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("kind", ["late index", "early index", "fragments", "matroska", "avi"])
def test_truncated_clips_are_refused_before_the_work(
    kind: str, part: float, long_clip: dict[str, Path], tmp_path: Path
) -> None:
    whole = long_clip[kind]
    assert sum(1 for _ in VideoReader(whole)) == 40
    path = tmp_path / f"cut{whole.suffix}"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
    refused(path, f"cut{whole.suffix} is cut off")
    with pytest.raises(MediaError):
        VideoReader(path)


def test_a_truncated_clip_says_how_much_of_it_is_there(long_clip: dict[str, Path], tmp_path: Path) -> None:
    whole = long_clip["early index"]
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.5)])
    with pytest.raises(MediaError, match=r"(\d+) of 40 frames can be read") as caught:
        VideoReader(path)
    said = int(str(caught.value).split(" of 40")[0].split()[-1])
    assert 10 <= said <= 30
    with VideoReader(path, allow_truncated=True) as reader:
        read = sum(1 for _ in reader)
    assert abs(read - said) <= 2


def test_a_truncated_gif_gives_an_error_or_its_whole_frames(
    long_clip: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "cut.gif"
    data = long_clip["gif"].read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(path, "cut.gif is cut off")


def test_frames_out_of_bounds_are_refused_before_decoding(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", [numbered(0)] * 2)
    with pytest.raises(MediaError, match=r"a\.mp4 is 64x48 pixels.*at most"):
        VideoReader(path, max_pixels=1000)
    small = write_clip(tmp_path / "small.mp4", [np.zeros((8, 8, 3), np.uint8)] * 2)
    with pytest.raises(MediaError, match=r"small\.mp4 is 8x8 pixels.*at least 16"):
        VideoReader(small)
    with pytest.raises(ConfigError, match="threads"):
        VideoReader(path, threads=-1)


def test_names_that_look_like_protocols_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "plain.mp4", [numbered(3)] * 2).rename(tmp_path / "concat:a|b.mp4")
    with VideoReader(Path("concat:a|b.mp4")) as reader:
        assert number_of(next(reader).rgb) == 3
    with open_writer("pipe:1.mp4", (64, 48), 25) as writer:
        writer.write(numbered(1))
    assert (tmp_path / "pipe:1.mp4").stat().st_size > 500


# -- writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fps", [Fraction(25), Fraction(30), NTSC, Fraction(24000, 1001), Fraction(12345, 1000)]
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov"])
def test_clips_keep_every_frame_and_the_exact_rate(suffix: str, fps: Fraction, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    with open_writer(path, (64, 48), fps) as writer:
        for i in range(37):
            writer.write(numbered(i))
        assert writer.duration == 37 / fps and writer.frames == 37
    assert os.listdir(tmp_path) == [path.name]
    got = picture_of(path)
    exact = suffix in (".mp4", ".mov")
    assert (got.frames, got.start) == (37, 0)
    assert abs(got.end - 37 / fps) <= (0 if exact else Fraction(1, 1000))
    with VideoReader(path) as reader:
        info, frames = reader.info, list(reader)
    assert info.fps is not None and info.duration is not None
    assert [number_of(f.rgb) for f in frames] == list(range(37))
    if exact:
        assert info.fps == fps and info.duration == 37 / fps and info.frames == 37
        assert [f.time for f in frames] == [i / fps for i in range(37)]
    else:
        assert abs(info.fps / fps - 1) < Fraction(1, 1000)
        assert abs(info.duration - 37 / fps) <= Fraction(10, 1000)


def test_mp4_plays_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    with open_writer(path, (64, 48), 25) as writer:
        for i in range(10):
            writer.write(numbered(i))
    data = path.read_bytes()
    assert data[4:8] == b"ftyp" and data.index(b"moov") < data.index(b"mdat"), "the index stands in front"
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert context.profile in ("High", "Main", "Constrained Baseline")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            1,
            1,
            1,
            1,
        )


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png", ".mkv"])
def test_colours_survive(suffix: str, tmp_path: Path) -> None:
    colours = np.array([(200, 30, 40), (30, 190, 60), (40, 50, 210), (235, 235, 235)], np.uint8)
    rgb = np.repeat(np.repeat(colours.reshape(2, 2, 3), 40, 0), 40, 1)
    path = tmp_path / f"out{suffix}"
    with open_writer(path, (80, 80), 25) as writer:
        writer.write(rgb)
    if suffix in (".png",):
        got = read_image(path)
    else:
        with VideoReader(path) as reader:
            got = next(reader).rgb
    assert np.abs(got[20::40, 20::40].astype(int) - colours.reshape(2, 2, 3)).max() <= 6


@pytest.mark.parametrize("size", [(65, 49), (64, 49), (65, 48)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_get_a_copy_of_the_last_row_or_column(
    suffix: str, size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"odd{suffix}"
    rgb = quarters(*size)
    with open_writer(path, size, 25) as writer:
        writer.write(rgb)
    with VideoReader(path) as reader:
        got = next(reader).rgb
    assert got.shape == (48 + size[1] % 2 * 2, 64 + size[0] % 2 * 2, 3)
    assert np.abs(got[-1, -1].astype(int) - rgb[-1, -1]).max() < 30
    assert np.abs(got[:16, :16].astype(int) - (255, 0, 0)).max() < 40


def test_the_caller_may_change_a_frame_after_writing_it(tmp_path: Path) -> None:
    for name in ("out.mp4", "out.gif"):
        canvas = np.zeros((48, 64, 3), np.uint8)
        with open_writer(tmp_path / name, (64, 48), 25) as writer:
            for i in range(5):
                canvas[:] = numbered(i)
                writer.write(canvas)
        with VideoReader(tmp_path / name) as reader:
            assert [number_of(f.rgb) for f in reader] == list(range(5))


@pytest.mark.parametrize("fps", [Fraction(10), Fraction(30), NTSC, Fraction(60)])
def test_gif_times_do_not_drift(fps: Fraction, tmp_path: Path) -> None:
    path = tmp_path / "out.gif"
    with open_writer(path, (64, 48), fps) as writer:
        for i in range(90):
            writer.write(numbered(i))
    with VideoReader(path) as reader:
        assert reader.info.duration is not None
        assert abs(reader.info.duration - 90 / fps) <= Fraction(2, 100)
        frames = list(reader)
    shown = [number_of(f.rgb) for f in frames]
    assert shown == sorted(set(shown))
    if fps <= 50:
        assert shown == list(range(90))
    for frame, number in zip(frames, shown, strict=True):
        assert abs(frame.time - number / fps) <= Fraction(1, 100)


def test_gif_makes_a_new_palette_when_the_colours_change(tmp_path: Path) -> None:
    path = tmp_path / "out.gif"
    y, x = np.mgrid[0:48, 0:64]
    warm = np.stack([200 + x // 2, 4 * y, 0 * x], -1).astype(np.uint8)
    cold = np.stack([0 * x, x * 3, 130 + 2 * y], -1).astype(np.uint8)
    with open_writer(path, (64, 48), 20) as writer:
        for i in range(80):
            writer.write(warm if i < 50 else cold)
    with VideoReader(path) as reader:
        frames = list(reader)
    with VideoReader(path) as reader:
        even = list(resample(reader, 20))
    assert len(even) == 80 and len(frames) <= 80
    for i in (0, 49, 50, 79):
        expected = warm if i < 50 else cold
        error = np.abs(even[i].rgb.astype(int) - expected).mean()
        assert error < 8, f"frame {i}: {error}"


def test_folder_of_frames(tmp_path: Path) -> None:
    for name in ("frames", "with.dot/"):
        with open_writer(f"{tmp_path}/{name}", (64, 48), 25) as writer:
            for i in range(12):
                writer.write(numbered(i))
        folder = tmp_path / name
        assert sorted(os.listdir(folder)) == [f"{i:06d}.png" for i in range(12)]
        np.testing.assert_array_equal(read_image(folder / "000007.png"), numbered(7))
    with open_writer(tmp_path / "frames", (64, 48), 25) as writer:
        writer.write(numbered(0))
    assert os.listdir(tmp_path / "frames") == ["000000.png"], "old frames are replaced"
    assert sorted(os.listdir(tmp_path)) == ["frames", "with.dot"]
    (tmp_path / "frames" / "holiday.jpg").touch()
    with pytest.raises(OutputError, match="not empty"):
        open_writer(tmp_path / "frames", (64, 48), 25)
    assert len(os.listdir(tmp_path / "frames")) == 2


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_single_picture(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"one{suffix}"
    with open_writer(path, (64, 48), 25) as writer:
        writer.write(quarters(64, 48))
    assert read_image(path).shape == (48, 64, 3)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="more than one frame"), open_writer(path, (64, 48), 25) as writer:
        writer.write(numbered(0))
        writer.write(numbered(1))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


OUTPUTS = ["out.mp4", "out.webm", "out.mkv", "out.gif", "out.png", "out"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_aborted_failed_and_empty_outputs_leave_nothing(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name != "out":
        path.write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))

    writer = open_writer(path, (64, 48), 25)
    writer.write(numbered(0))
    assert len(os.listdir(tmp_path)) == len(before) + 1, "what is being written lies beside the output"
    writer.abort()
    writer.abort()
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(OutputError, match="closed"):
        writer.write(numbered(1))
    writer.close()

    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), open_writer(path, (64, 48), 25) as writer:
            writer.write(numbered(0))
            raise error
        assert sorted(os.listdir(tmp_path)) == before

    with pytest.raises(OutputError, match="no frame"), open_writer(path, (64, 48), 25):
        pass
    with (
        pytest.raises(OutputError, match=r"uint8\[10, 10, 3\].*expected uint8\[48, 64, 3\]"),
        open_writer(path, (64, 48), 25) as writer,
    ):
        writer.write(np.zeros((10, 10, 3), np.uint8))
    assert sorted(os.listdir(tmp_path)) == before
    if name != "out":
        assert path.read_bytes() == b"old", "the old output stays"


def test_outputs_that_cannot_be_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").touch()
    (tmp_path / "old.mp4").touch()
    before = sorted(os.listdir(tmp_path))
    cases = {
        "no/out.mp4": "folder .*no does not exist.*create it",
        "no/frames/": "does not exist",
        "file/out.mp4": "is no folder",
        "file/": "is a file",
        "out.xyz": r"unknown suffix \.xyz; expected \.mp4",
        "full": "not empty",
    }
    for name, words in cases.items():
        start = time.monotonic()
        for use in (check_output, lambda p: open_writer(p, (64, 48), 25)):
            with pytest.raises(OutputError, match=words):
                use(f"{tmp_path}/{name}")
        assert time.monotonic() - start < 1
    with pytest.raises(OutputError, match="exists"):
        check_output(tmp_path / "old.mp4", overwrite=False)
    kinds = {
        "a.mp4": "video",
        "a.WEBM": "video",
        "a.gif": "gif",
        "a.jpeg": "picture",
        "a": "folder",
        "a.b/": "folder",
    }
    for name, kind in kinds.items():
        assert check_output(f"{tmp_path}/{name}") == kind
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(ConfigError, match="size 0x4"):
        open_writer(tmp_path / "a.mp4", (0, 4), 25)
    with pytest.raises(ConfigError, match="0 frames a second"):
        open_writer(tmp_path / "a.mp4", (4, 4), 0)
    with pytest.raises(ConfigError, match="preset warp"):
        open_writer(tmp_path / "a.mp4", (4, 4), 25, preset="warp")


def test_sizes_the_encoder_refuses_are_told_at_open(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out\.mp4 cannot be written.*expected a size the encoder takes"):
        open_writer(tmp_path / "out.mp4", (40_000, 40_000), 25)
    assert os.listdir(tmp_path) == []


def test_a_folder_without_rights_or_space_is_told_at_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    with monkeypatch.context() as patch:
        patch.setattr(media_write.shutil, "disk_usage", lambda _: Usage)
        with pytest.raises(OutputError, match=r"0 KiB are free.*free some space"):
            check_output(tmp_path / "out.mp4")

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", deny)
        for name in OUTPUTS:
            with pytest.raises(OutputError, match=r"Permission denied.*check permissions"):
                check_output(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_unwritable_folder_is_told_at_open(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            open_writer(tmp_path / "out.mp4", (64, 48), 25)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.mkv", "out.gif", "out.png", "out"])
def test_a_disk_that_fills_up_ends_the_output_with_an_error(name: str, tmp_path: Path) -> None:
    # No file may grow beyond 30 kB in the child: every write after that fails as on a full disk.
    program = """
import resource, sys
import numpy as np
from lp_edge.errors import OutputError
from lp_edge.runtime.media_write import open_writer
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
rng = np.random.default_rng(0)
writer = None
try:
    writer = open_writer(sys.argv[1], (160, 120), 25)
    for i in range(1 if sys.argv[1].endswith("png") else 120):
        writer.write(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8))
    writer.close()
except OutputError as error:
    print("OutputError", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / name)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("OutputError") and "cannot be written" in done.stdout, (
        done.stdout + done.stderr
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_missing_encoder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_write.av.codec, "codecs_available", {"gif"})
    with pytest.raises(OutputError, match=r"no libx264 encoder.*install the av wheel"):
        open_writer(tmp_path / "out.mp4", (64, 48), 25)
    assert os.listdir(tmp_path) == []


# -- sound -------------------------------------------------------------------------------------------------------


def animate(source: Path, output: Path, **options: object) -> int:
    """What lp-run does with frames and sound, without the animation."""
    with VideoReader(source) as reader:
        assert reader.info.fps is not None
        with open_writer(output, (64, 48), reader.info.fps, audio_from=source, **options) as writer:  # type: ignore[arg-type]
            for frame in reader:
                writer.write(frame.rgb)
        return writer.frames


SOUNDS = {
    # source, its sound, output -> codec of the result
    ("in.mp4", "aac", 44100, ".mp4"): "aac",
    ("in.mp4", "aac", 48000, ".mov"): "aac",
    ("in.mp4", "aac", 44100, ".mkv"): "aac",
    ("in.mp4", "aac", 44100, ".webm"): "opus",
    ("in.mp4", "libmp3lame", 44100, ".mp4"): "mp3float",
    ("in.webm", "libopus", 48000, ".webm"): "opus",
    ("in.webm", "libopus", 48000, ".mp4"): "aac",
    ("in.webm", "libopus", 48000, ".mkv"): "opus",
    ("in.mkv", "pcm_s16le", 22050, ".mp4"): "aac",
    ("in.mkv", "pcm_s16le", 96000, ".mp4"): "aac",
    ("in.mkv", "flac", 48000, ".webm"): "opus",
    ("in.ts", "aac", 44100, ".mp4"): "aac",
}


@pytest.mark.parametrize(("case", "codec"), SOUNDS.items(), ids=lambda c: "-".join(map(str, c)) if c else "")
def test_sound_is_carried_over_in_step(case: tuple[str, str, int, str], codec: str, tmp_path: Path) -> None:
    name, sound, rate, suffix = case
    fps = Fraction(30000, 1001)
    source = write_clip_with_sound(
        tmp_path / name,
        4.0,
        fps,
        audio=sound,
        rate=rate,
        video="libvpx" if name.endswith("webm") else "libx264",
        sound_seconds=4.5,
    )
    before = sound_of(source)
    origin = picture_of(source).start
    assert before is not None and len(before.onsets) == 4
    output = tmp_path / f"out{suffix}"
    count = animate(source, output)
    after, picture = sound_of(output), picture_of(output)
    assert after is not None and after.codec == codec
    assert picture.frames == count == 120 and picture.start == 0
    # In step with the picture: to a few milliseconds (codecs smear an onset).
    assert len(after.onsets) == 4
    for burst, old, new in zip(BURSTS, before.onsets, after.onsets, strict=True):
        assert abs(new - (old - float(origin))) < 0.004
        assert abs(new - float(burst)) < 0.012
    # As long as the picture: to the frame, and never longer than it.
    assert abs(after.end - picture.end) <= 1 / fps
    if suffix in (".mp4", ".mov"):
        assert picture.end == count / fps
        with av.open(str(output)) as container:
            for stream in container.streams:
                assert stream.duration is not None and stream.time_base is not None
                assert abs(stream.duration * stream.time_base - count / fps) <= 2 * stream.time_base


def test_sound_ends_with_the_picture_and_starts_where_it_is_told(tmp_path: Path) -> None:
    source = write_clip_with_sound(tmp_path / "in.mp4", 4.0, 25)
    for suffix in (".mp4", ".webm", ".mkv"):
        output = tmp_path / f"short{suffix}"
        with open_writer(output, (64, 48), 25, audio_from=source, audio_start=Fraction(1)) as writer:
            for i in range(50):  # two seconds of the four, from the second 1 on
                writer.write(numbered(i))
        sound = sound_of(output)
        assert sound is not None
        assert abs(sound.end - 2) <= Fraction(1, 25)
        assert [round(t, 2) for t in sound.onsets] == pytest.approx([0.5, 1.3], abs=0.013)
        limited = tmp_path / f"limited{suffix}"
        with open_writer(limited, (64, 48), 25, audio_from=source, audio_duration=1) as writer:
            for i in range(50):
                writer.write(numbered(i))
        sound, picture = sound_of(limited), picture_of(limited)
        assert sound is not None and len(sound.onsets) == 1
        assert abs(sound.end - 1) <= Fraction(1, 25) and abs(picture.end - 2) <= Fraction(1, 1000)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_sound_that_is_shorter_than_the_picture_just_ends(suffix: str, tmp_path: Path) -> None:
    source = write_clip_with_sound(tmp_path / "in.mp4", 2.0, 25)
    output = tmp_path / f"out{suffix}"
    with open_writer(output, (64, 48), 25, audio_from=source) as writer:
        for i in range(100):
            writer.write(numbered(i))
    sound, picture = sound_of(output), picture_of(output)
    assert sound is not None and abs(sound.end - 2) <= Fraction(1, 20) and picture.frames == 100
    assert abs(picture.end - 4) <= Fraction(1, 1000)


def test_sound_does_not_drift_over_minutes(tmp_path: Path) -> None:
    bursts = [Fraction(k * 10) + Fraction(1, 2) for k in range(12)]
    source = tmp_path / "long.mkv"
    rate = 44100
    with av.open(str(source), "w") as container:
        picture = container.add_stream("libx264", rate=NTSC, options={"preset": "ultrafast"})
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=rate)
        sound.codec_context.layout = "mono"
        frame = av.VideoFrame(32, 32, "yuv420p")
        frame.pts = 0
        container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        wave = (tone(120, rate, bursts) * 32767).astype(np.int16)
        for at in range(0, len(wave), 4096):
            part = wave[None, at : at + 4096]
            block = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="s16", layout="mono")
            block.sample_rate, block.pts, block.time_base = rate, at, Fraction(1, rate)
            container.mux(sound.encode(block))
    count = int(120 * NTSC)
    still = np.zeros((32, 32, 3), np.uint8)
    for suffix in (".mp4", ".webm"):
        output = tmp_path / f"out{suffix}"
        with open_writer(output, (32, 32), NTSC, audio_from=source, preset="ultrafast") as writer:
            for _ in range(count):
                writer.write(still)
        got = sound_of(output)
        assert got is not None and len(got.onsets) == 12
        offsets = [new - float(burst) for new, burst in zip(got.onsets, bursts, strict=True)]
        assert max(offsets) - min(offsets) < 0.003 and abs(offsets[0]) < 0.01
        assert abs(got.end - count / NTSC) <= 1 / NTSC


def test_clips_without_sound_and_formats_without_sound(tmp_path: Path) -> None:
    silent = write_clip(tmp_path / "silent.mp4", [numbered(i) for i in range(10)])
    animate(silent, tmp_path / "out.mp4")
    assert sound_of(tmp_path / "out.mp4") is None
    loud = write_clip_with_sound(tmp_path / "loud.mp4", 1.0)
    for name in ("out.gif", "frames"):
        animate(loud, tmp_path / name)
    assert len(os.listdir(tmp_path / "frames")) == 25


def test_sound_that_cannot_be_read_is_told_at_open(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no clip")
    for path, words in ((text, "cannot be read|no clip"), (tmp_path / "no.mp4", "does not exist")):
        with pytest.raises(MediaError, match=words):
            open_writer(tmp_path / "out.mp4", (64, 48), 25, audio_from=path)
    with pytest.raises(ConfigError, match="sound from"):
        open_writer(tmp_path / "out.mp4", (64, 48), 25, audio_start=Fraction(-1))
    assert os.listdir(tmp_path) == ["text.mp4"]


# -- memory ------------------------------------------------------------------------------------------------------

_MEMORY = """
import resource, sys
from fractions import Fraction
import numpy as np
from lp_edge.runtime.media_read import VideoReader, resample
from lp_edge.runtime.media_write import open_writer
source, output, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def frames():
    done = 0
    while done < count:
        with VideoReader(source) as reader:
            for frame in resample(reader, 25):
                yield frame.rgb
                done += 1
                if done == count:
                    return
sound = source if not output.endswith("gif") else None
with open_writer(output, (320, 240), 25, audio_from=sound) as writer:
    for rgb in frames():
        writer.write(rgb)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_memory_does_not_grow_with_length(suffix: str, tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    y, x = np.mgrid[0:240, 0:320]
    base = np.stack([x * 255 // 320, y * 255 // 240, (x + y) % 256], -1).astype(np.uint8)
    write_clip(tmp_path / "video.mp4", [np.roll(base, 3 * i, 1) for i in range(100)])
    with (
        open_writer(
            source, (320, 240), 25, audio_from=write_clip_with_sound(tmp_path / "s.mp4", 4.0)
        ) as writer,
        VideoReader(tmp_path / "video.mp4") as reader,
    ):
        for frame in reader:
            writer.write(frame.rgb)
    peak = {}
    for count in (100, 700):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(source), str(tmp_path / f"out{suffix}"), str(count)],
            capture_output=True, text=True, timeout=250, check=True,
        )  # fmt: skip
        peak[count] = int(done.stdout) / 1024
    # 600 frames more of 225 KiB are 132 MiB of pixels; the allocator may keep a few.
    assert peak[700] - peak[100] < 12, peak


# -- sample clips ----------------------------------------------------------------------------------------------------


def test_sample_clips(shared: Path, tmp_path: Path) -> None:
    clips = sorted((shared / "samples" / "driving").glob("*.mp4"))[:4]
    if not clips:
        pytest.skip("no sample clips")
    for clip in clips:
        info = probe(clip)
        assert info.kind == "video" and info.fps is not None and info.frames is not None
        output = tmp_path / f"{clip.stem}.mp4"
        with (
            VideoReader(clip) as reader,
            open_writer(output, (info.width, info.height), info.fps, audio_from=clip) as writer,
        ):
            for frame in resample(reader, info.fps):
                if writer.frames == 40:
                    break
                writer.write(frame.rgb)
        got = probe(output)
        assert (got.width, got.height, got.fps, got.has_audio) == (
            info.width, info.height, info.fps, info.has_audio,
        )  # fmt: skip
        assert got.frames == min(40, info.frames) and got.duration == got.frames / info.fps


def test_frames_that_grow_beyond_the_limit_are_refused_by_the_decoder(tmp_path: Path) -> None:
    """A raw H.264 stream may change its size; what is too large must not be decoded first."""

    def encoded(width: int, height: int, frames: int) -> bytes:
        context = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base = Fraction(1, 25)
        context.options = {
            "preset": "ultrafast",
            "tune": "zerolatency",
            "x264-params": "annexb=1:repeat-headers=1",
        }
        out = b""
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            out += b"".join(bytes(p) for p in context.encode(frame.reformat(format="yuv420p")))
        return out + b"".join(bytes(p) for p in context.encode(None))

    path = tmp_path / "grows.h264"
    path.write_bytes(encoded(320, 240, 60) + encoded(2560, 1440, 2))  # beyond what a look ahead sees
    with VideoReader(path, max_pixels=1_000_000) as reader:
        seen = [next(reader).rgb.shape for _ in range(55)]  # the decoder is a few frames ahead
        with pytest.raises(MediaError, match=r"60 frames|Invalid data|cut off"):
            seen += [frame.rgb.shape for frame in reader]
    assert set(seen) == {(240, 320, 3)}
