"""A long clip driven by a long clip: flat memory, and a result as long as its source. Prints one JSON object.

    python benchmarks/v2v.py [--source CLIP] [--driving CLIP] [--frames 100 --frames 1000] [--rate 30000/1001]

Makes a source (with a tone as sound) and a driver of the given numbers of frames by repeating CLIP (default: the demo picture nodding,
and talking), runs `lp-run --length source --audio source` on each pair in a process of its own, and reads the peak resident memory the
kernel saw. `ratio` is the largest peak over the smallest; `frames_off` and `audio_off` compare result and source, in frames.
Exits with 1 if the result is off by more than one frame.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import wave
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from memory import peak_memory

from lp_edge.errors import LpEdgeError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.job import demo_picture
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.provenance import provenance

SAMPLES = 44100


def make_tone(path: Path, seconds: float) -> None:
    """A sound file that rises slowly."""
    t = np.arange(round(SAMPLES * seconds)) / SAMPLES
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLES)
        file.writeframes((6000 * np.sin(2 * np.pi * (220 * t + 2 * t * t))).astype("<i2").tobytes())


def make_demo(path: Path, template: str) -> Path:
    """The demo picture, moved by a built-in template."""
    with (
        Animator() as animator,
        closing(animator.animate(demo_picture(), template)) as animation,
        open_writer(path, animation.size, animation.fps) as writer,
    ):
        for frame in animation:
            writer.write(frame.rgb)
    return path


def make_clip(path: Path, clip: Path, frames: int, rate: Fraction, sound: Path | None) -> None:
    """A clip of exactly `frames` frames: `clip` again and again."""
    info = probe(clip)
    size = (info.width, info.height)
    with open_writer(path, size, rate, audio_from=sound, preset="ultrafast") as writer:
        while writer.frames < frames:
            with VideoReader(clip) as reader:
                for frame in reader:
                    if writer.frames < frames:
                        writer.write(frame.rgb)


def lengths(path: Path) -> tuple[int, float, float]:
    """Frames, seconds of pictures and seconds of sound, all counted by decoding."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate, count = stream.average_rate or Fraction(1), 0
        for _ in container.decode(stream):
            count += 1
    with av.open(str(path)) as container:
        sound = 0.0
        if container.streams.audio:
            sound = sum(f.samples / f.sample_rate for f in container.decode(container.streams.audio[0]))
    return count, float(count / rate), sound


def measure(
    clips: tuple[Path, Path], frames: int, rate: Fraction, extra: list[str], folder: Path
) -> dict[str, Any]:
    """One length."""
    source, driver, tone = (
        folder / f"{n}_{frames}.{s}" for n, s in (("source", "mp4"), ("driver", "mp4"), ("tone", "wav"))
    )
    make_tone(tone, float(frames / rate) + 1.0)
    make_clip(source, clips[0], frames, rate, tone)
    make_clip(driver, clips[1], frames, rate, None)
    output = folder / f"result_{frames}.mp4"
    command = [
        "-s",
        str(source),
        "-d",
        str(driver),
        "-o",
        str(output),
        "--length",
        "source",
        "--audio",
        "source",
    ]
    peak, result = peak_memory([*command, *extra, "--json"])
    ours, theirs = lengths(output), lengths(source)
    return {
        "frames": frames,
        "peak_mib": round(peak, 1),
        "fps": result["fps"],
        "result": {"frames": ours[0], "seconds": round(ours[1], 4), "audio_seconds": round(ours[2], 4)},
        "source": {"frames": theirs[0], "seconds": round(theirs[1], 4), "audio_seconds": round(theirs[2], 4)},
        "frames_off": ours[0] - theirs[0],
        "audio_off": round((ours[2] - theirs[2]) * float(rate), 3),
    }


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="clip that is repeated as the source")
    parser.add_argument("--driving", type=Path, help="clip that is repeated as the driver")
    parser.add_argument("--frames", type=int, action="append", help="default: 100 and 1000")
    parser.add_argument(
        "--rate", type=Fraction, default=Fraction(30000, 1001), help="frames a second of both"
    )
    parser.add_argument("--bundle", help="bundle instead of the built-in one")
    args = parser.parse_args()
    if args.rate <= 0 or min(args.frames or [1]) < 1:
        parser.error("expected --rate and --frames above 0")
    extra = ["--bundle", args.bundle] if args.bundle else []
    try:
        with tempfile.TemporaryDirectory(prefix="v2v-") as name:
            folder = Path(name)
            clips = (
                args.source or make_demo(folder / "nod.mp4", "nod"),
                args.driving or make_demo(folder / "talk.mp4", "talk"),
            )
            runs = [measure(clips, frames, args.rate, extra, folder) for frames in args.frames or [100, 1000]]
    except LpEdgeError as error:
        print(f"v2v: {error}", file=sys.stderr)
        return error.exit_code
    peaks = [run["peak_mib"] for run in runs]
    report = {
        "benchmark": "v2v",
        "source": args.source.name if args.source else "demo picture, nod",
        "driving": args.driving.name if args.driving else "demo picture, talk",
        "rate": str(args.rate),
        "runs": runs,
        "ratio": round(max(peaks) / min(peaks), 4),
        "provenance": provenance(),
    }
    print(json.dumps(report, indent=2))
    return int(any(abs(run["frames_off"]) > 1 or abs(run["audio_off"]) > 1 for run in runs))


if __name__ == "__main__":
    sys.exit(main())
