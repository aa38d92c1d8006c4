"""Does a batch read its driver once? Prints one JSON object.

    python benchmarks/batch.py [--source S ...] [--driving CLIP] [--sources 8] [--frames 100] [--repeat 3]

In turn, in this process: the driver's motion alone (`motion`), every source alone with that motion at hand (`render`, encoding
included), and the batch of all of them, networks' loading included (`batch`). `ratio` is batch / (sum of render + motion), the
median over the repeats; 1 would be a batch that costs nothing of its own. `cpu_ratio` is the same in seconds of processor time,
which a machine with other work on it disturbs less. `apart` is what the runs cost when each reads the driver again, with open
networks.
Without arguments the demo picture, in as many sizes as there are sources, follows itself talking.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2

from lp_edge.errors import LpEdgeError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.batch import run_batch
from lp_edge.runtime.image import read_image, write_image
from lp_edge.runtime.job import RunConfig, demo_picture, run_job
from lp_edge.runtime.job_list import jobs_of_sources
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.provenance import provenance


def make_sources(folder: Path, count: int) -> list[Path]:
    """The demo picture in several sizes."""
    picture = read_image(demo_picture())
    paths = []
    for i in range(count):
        share = 1.0 - 0.05 * (i % 8)
        size = (round(picture.shape[1] * share), round(picture.shape[0] * share))
        paths.append(folder / f"source_{i}.png")
        write_image(paths[-1], cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
    return paths


def make_driver(path: Path, clip: Path | None, frames: int) -> None:
    """A clip of exactly `frames` frames: `clip` again and again, or the demo picture talking."""
    if clip is None:
        clip = path.with_name("talk.mp4")
        with (
            Animator() as animator,
            closing(animator.animate(demo_picture(), "talk")) as animation,
            open_writer(clip, animation.size, animation.fps) as writer,
        ):
            for frame in animation:
                writer.write(frame.rgb)
    info = probe(clip)
    with open_writer(path, (info.width, info.height), info.fps or 25) as writer:
        while writer.frames < frames:
            with VideoReader(clip) as reader:
                for picture in reader:
                    if writer.frames < frames:
                        writer.write(picture.rgb)


def measure(sources: list[Path], driver: Path, bundle: str | None, folder: Path) -> dict[str, Any]:
    """One round of everything."""
    with Animator(bundle) as animator:
        configs = [
            RunConfig(source, driver, folder / f"{i}.mp4", bundle=bundle) for i, source in enumerate(sources)
        ]
        started, busy = time.perf_counter(), time.process_time()
        motion = animator.open_driver(driver).recorded()
        motion_s = time.perf_counter() - started
        render = [run_job(c, animator=animator, drivers=[motion]).seconds for c in configs]
        parts_busy = time.process_time() - busy
        apart = [run_job(c, animator=animator).seconds for c in configs]
    base = RunConfig("", driver, bundle=bundle)
    busy = time.process_time()
    result = run_batch(jobs_of_sources(sources, base, folder / "batch"), folder / "batch", resume=False)
    batch_busy = time.process_time() - busy
    if result.exit_code:
        raise next(o.error for o in result.outcomes if o.error is not None)
    return {
        "motion_s": round(motion_s, 3),
        "render_s": [round(s, 3) for s in render],
        "apart_s": round(sum(apart), 3),
        "batch_s": result.seconds,
        "batch_motion_s": result.motion_seconds,
        "motions": result.motions,
        "frames": [o.result.frames for o in result.outcomes if o.result is not None],
        "ratio": round(result.seconds / (sum(render) + motion_s), 4),
        "cpu_ratio": round(batch_busy / parts_busy, 4),
    }


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, action="append", help="picture or clip; give several")
    parser.add_argument("--sources", type=int, default=8, help="how many, where none is given")
    parser.add_argument("--driving", type=Path, help="clip that is repeated")
    parser.add_argument("--frames", type=int, default=100, help="frames of the driver")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--bundle", help="bundle instead of the built-in one")
    args = parser.parse_args()
    if min(args.sources, args.frames, args.repeat) < 1:
        parser.error("expected --sources, --frames and --repeat of 1 or more")
    try:
        with tempfile.TemporaryDirectory(prefix="batch-") as name:
            folder = Path(name)
            sources = args.source or make_sources(folder, args.sources)
            driver = folder / "driver.mp4"
            make_driver(driver, args.driving, args.frames)
            rounds = [measure(sources, driver, args.bundle, folder) for _ in range(args.repeat)]
    except LpEdgeError as error:
        print(f"batch: {error}", file=sys.stderr)
        return error.exit_code
    report = {
        "benchmark": "batch",
        "sources": [source.name for source in sources],
        "driving": args.driving.name if args.driving else "demo picture, talk",
        "frames": args.frames,
        "rounds": rounds,
        "ratio": statistics.median(r["ratio"] for r in rounds),
        "cpu_ratio": statistics.median(r["cpu_ratio"] for r in rounds),
        "batch_over_apart": round(statistics.median(r["batch_s"] / r["apart_s"] for r in rounds), 4),
        "provenance": provenance(),
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
