"""Does memory grow with the length of a clip? Prints one JSON object.

    python benchmarks/memory.py [--source S] [--driving CLIP] [--frames 100 --frames 3000] [--repeat 3]

Makes drivers of the given numbers of frames by repeating CLIP (default: the demo picture talking), runs `lp-run` on each
in a process of its own and reads the peak resident memory the kernel saw. `ratio` is the largest over the smallest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from lp_edge.errors import LpEdgeError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.job import demo_picture
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.provenance import provenance


def make_driver(path: Path, clip: Path, frames: int) -> None:
    """A clip of exactly `frames` frames: CLIP forwards, again and again."""
    info = probe(clip)
    with open_writer(path, (info.width, info.height), info.fps or 25, preset="ultrafast") as writer:
        while writer.frames < frames:
            with VideoReader(clip) as reader:
                for frame in reader:
                    if writer.frames == frames:
                        break
                    writer.write(frame.rgb)


def peak_memory(arguments: list[str]) -> tuple[float, dict[str, object]]:
    """Peak resident memory in MiB of `lp-run`, and what it printed."""
    code = "import sys; from lp_edge.cli import run; run(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # the usage of this very child, not of all children
    process.returncode = os.waitstatus_to_exitcode(status)
    result = json.loads(printed)
    if process.returncode != 0:
        raise RuntimeError(f"lp-run ended with {process.returncode}: {result}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), result


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=demo_picture())
    parser.add_argument("--driving", type=Path, help="clip that is repeated")
    parser.add_argument("--frames", type=int, action="append", help="default: 100 and 3000")
    parser.add_argument("--repeat", type=int, default=3, help="runs per length; the median counts")
    parser.add_argument("--bundle", help="bundle instead of the built-in one")
    args = parser.parse_args()
    runs = []
    try:
        with tempfile.TemporaryDirectory(prefix="memory-") as name:
            folder = Path(name)
            clip = args.driving
            if clip is None:
                clip = folder / "talk.mp4"
                with (
                    Animator(args.bundle) as animator,
                    closing(animator.animate(demo_picture(), "talk")) as animation,
                    open_writer(clip, animation.size, animation.fps) as writer,
                ):
                    for frame in animation:
                        writer.write(frame.rgb)
            for frames in args.frames or [100, 3000]:
                driver = folder / f"driver_{frames}.mp4"
                make_driver(driver, clip, frames)
                command = ["-s", str(args.source), "-d", str(driver), "-o", str(folder / "out.mp4"), "--json"]
                if args.bundle:
                    command += ["--bundle", args.bundle]
                peaks, fps = [], []
                for _ in range(args.repeat):
                    peak, result = peak_memory(command)
                    peaks.append(round(peak, 1))
                    fps.append(result["fps"])
                runs.append(
                    {
                        "frames": frames,
                        "peak_mib": round(statistics.median(peaks), 1),
                        "all_mib": peaks,
                        "fps": fps,
                    }
                )
    except LpEdgeError as error:
        print(f"memory: {error}", file=sys.stderr)
        return error.exit_code
    medians = [run["peak_mib"] for run in runs]
    report = {
        "benchmark": "memory",
        "source": args.source.name,
        "driving": args.driving.name if args.driving else "demo picture, talk",
        "runs": runs,
        "ratio": round(max(medians) / min(medians), 4),
        "provenance": provenance(),
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
