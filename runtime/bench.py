"""``lp-bench run`` and ``warp``: stages and whole runs, and the warp alone. Every record carries its provenance."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import open_bundle, sha256_file
from lp_edge.engines.runner import Runner
from lp_edge.errors import ConfigError
from lp_edge.runtime.animator import Animator, Stopwatch
from lp_edge.runtime.bench_calls import time_record, warp_points
from lp_edge.runtime.face_motion import Canonical
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.image import read_image, write_image
from lp_edge.runtime.job import demo_picture
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.provenance import provenance

__all__ = ["Observer", "bench_animation", "bench_warp", "default_inputs", "peak_memory_mib"]

U8 = npt.NDArray[np.uint8]

_CANVAS = (1280, 720)
_DRIVER_SECONDS = 8.0


def peak_memory_mib() -> float:
    """Largest resident memory this process ever had, in MiB."""
    import resource  # not on Windows, and nothing else here needs it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class Observer:
    """Looks on while an animation is timed; does nothing by itself."""

    def wrap(self, runner: Runner) -> Runner:
        """Takes every network as it is opened and gives what is called in its place."""
        return runner

    def begin(self) -> None:
        """From the next frame on frames are counted."""

    def stop(self) -> None:
        """The last frame that is counted was written: what still runs ahead of it is not."""

    def end(self, frames: int, seconds: float) -> None:
        """So many frames were counted, in so many seconds; the networks are still open."""


def bench_animation(
    source: str | Path | None = None,
    driving: str | Path | None = None,
    *,
    options: AnimateOptions | None = None,
    bundle: Path | None = None,
    backend: BackendConfig | None = None,
    batch_size: int | None = None,
    warmup: int = 10,
    limit: int | None = None,
    observer: Observer | None = None,
) -> Iterator[dict[str, Any]]:
    """Animate into a temporary MP4 and time it.

    Args:
        source: picture or clip; None = the demo picture on a canvas of 1280x720.
        driving: driver; None = a clip of 512x512 in which the demo picture talks (made first, not counted).
        batch_size: as :meth:`Animator.animate`.
        warmup: frames at the beginning that are not counted.
        limit: stop after so many frames, those of the warm-up included; None = where the driver ends.
        observer: looks on.

    Yields:
        One record per stage (``p50``, ``p90``, ``p99``, ``mean`` in milliseconds per frame), then one for ``end_to_end``: the same
        for the time between two finished frames, and ``fps``, ``frames``, ``seconds``, ``peak_memory_mib``.

    Raises:
        ConfigError: ``warmup`` or ``limit`` leaves nothing to count, or the run has fewer frames than ``limit`` (told before it
            begins where the files tell their length).
        LpEdgeError: as :meth:`lp_edge.runtime.animator.Animator.animate`.
    """
    if warmup < 0 or (limit is not None and limit <= warmup):
        raise ConfigError(
            f"warmup {warmup}, frames {limit}",
            "expected 0 or more, and more frames than that",
            "raise --frames",
        )
    options, observer = options or AnimateOptions(), observer or Observer()
    with (
        tempfile.TemporaryDirectory(prefix="lp-bench-") as name,
        Animator(bundle, backend=backend, wrap=observer.wrap) as animator,
    ):
        folder = Path(name)
        source, driving = default_inputs(folder, source, driving)
        inputs = {
            "source": _describe(source, folder),
            "driving": _describe(driving, folder),
            "options": asdict(options),
            "warmup": warmup,
        }
        watch, done = Stopwatch(), []
        started = time.perf_counter()
        with (
            closing(
                animator.animate(source, driving, options, watch=watch, batch_size=batch_size)
            ) as animation,
            open_writer(folder / "result.mp4", animation.size, animation.fps) as writer,
        ):
            if animation.expected is not None:
                _check_length(animation.expected, warmup, limit)
            if not warmup:
                observer.begin()
            for frame in animation:
                with watch("encode"):
                    writer.write(frame.rgb)
                done.append(time.perf_counter())
                if len(done) == warmup:
                    observer.begin()
                if limit is not None and len(done) >= limit:
                    break
            observer.stop()
            with watch("finish"):
                writer.close()
        ended = time.perf_counter()
        _check_length(len(done), warmup, limit)
        first = done[warmup - 1] if warmup else started
        counted_frames = len(done) - warmup
        observer.end(counted_frames, done[-1] - first)
        origin = provenance(animator.bundle)
        origin["backend"] = animator.backend
        for stage, kept in watch.seconds.items():
            seconds = list(kept)
            # what happens once (finishing the file, a picture's crop) has no warm-up
            counted = seconds[warmup:] if len(seconds) > warmup else seconds
            yield {
                "bench": "run",
                "stage": stage,
                **time_record(counted),
                "inputs": inputs,
                "provenance": origin,
            }
        yield {
            "bench": "run",
            "stage": "end_to_end",
            **time_record([b - a for a, b in zip([first, *done[warmup:]], done[warmup:], strict=False)]),
            "frames": counted_frames,
            "seconds": round(ended - first, 3),
            "fps": round(counted_frames / (ended - first), 2),
            "size": list(animation.size),
            "batch_size": animation.batches.chosen,
            "peak_memory_mib": peak_memory_mib(),
            "inputs": inputs,
            "provenance": origin,
        }


def bench_warp(
    size: int = 512,
    batches: Sequence[int] = (1, 4),
    *,
    seconds: float = 3.0,
    bundle: Path | None = None,
    backend: BackendConfig | None = None,
) -> Iterator[dict[str, Any]]:
    """Run the graph ``warp_decode`` alone on a crop of ``size`` x ``size`` with the motion of the template ``nod``.

    Yields:
        One record per batch size: milliseconds per call, and ``fps`` (frames, not calls, a second).

    Raises:
        ConfigError: a size, batch or time is out of range.
    """
    if (
        not 64 <= size <= 4096
        or not batches
        or min(batches) < 1
        or max(batches) > 256
        or not 0 < seconds <= 600
    ):
        raise ConfigError(
            f"size {size}, batches {tuple(batches)}, seconds {seconds}",
            "expected 64 to 4096, 1 to 256 each, up to 600",
            "choose values in that range",
        )
    opened = open_bundle(bundle)
    if opened.manifest.family != "mesh":
        raise ConfigError(
            f"the warp alone of a bundle of the family {opened.manifest.family}",
            "expected the family mesh, whose warp takes crops of any size",
            "use lp-bench run, or benchmarks/graphs.py for the graphs of the family liveportrait",
        )
    canonical = Canonical.from_table(opened.load_table("canonical"))
    image = cv2.resize(read_image(demo_picture()), (size, size), interpolation=cv2.INTER_AREA)[None]
    kp_source, kp_driving = warp_points(canonical, size)
    with opened.runner(names.WARP_DECODE, backend or BackendConfig()) as runner:
        origin = provenance(opened, {names.WARP_DECODE: runner})
        for batch in batches:
            steps = [np.arange(i, i + batch) % len(kp_driving) for i in range(0, len(kp_driving), batch)]
            times: list[float] = []
            begun = time.perf_counter()
            calls = 0
            while time.perf_counter() - begun < seconds + 0.5 or calls < 8:
                index = steps[calls % len(steps)]
                feeds = {
                    names.SOURCE_IMAGE: image,
                    names.KP_SOURCE: np.repeat(kp_source[None], batch, axis=0),
                    names.KP_DRIVING: kp_driving[index],
                }
                start = time.perf_counter()
                runner.infer(feeds, [names.IMAGE])
                calls += 1
                if start - begun > 0.5 or calls > 4:  # the first half second warms up
                    times.append(time.perf_counter() - start)
            yield {
                "bench": "warp",
                "size": size,
                "batch": batch,
                **time_record(times),
                "fps": round(batch * len(times) / sum(times), 1),
                "peak_memory_mib": peak_memory_mib(),
                "provenance": origin,
            }


def _check_length(frames: int, warmup: int, limit: int | None) -> None:
    """ConfigError where a run of so many frames has too few: less would be measured than what was asked for."""
    if frames <= warmup + 1:
        raise ConfigError(
            f"the run has {frames} frames",
            f"expected more than {warmup + 1}",
            "lower --warmup or use a longer clip",
        )
    if limit is not None and frames < limit:
        raise ConfigError(
            f"the run has {frames} frames",
            f"expected {limit}, as asked for (the warm-up included)",
            f"ask for {frames} at most, or give a longer --driving",
        )


def default_inputs(
    folder: Path, source: str | Path | None, driving: str | Path | None
) -> tuple[str | Path, str | Path]:
    """Source and driver, those that are None made in ``folder``: the demo picture at 1280x720, and a clip in which it talks."""
    return (
        _default_source(folder) if source is None else source,
        _default_driver(folder) if driving is None else driving,
    )


def _default_source(folder: Path) -> Path:
    """The demo picture in the middle of a 720p canvas, its border continued to both sides."""
    width, height = _CANVAS
    picture = cv2.resize(read_image(demo_picture()), (height, height), interpolation=cv2.INTER_CUBIC)
    left = (width - height) // 2
    canvas: U8 = np.asarray(
        cv2.copyMakeBorder(picture, 0, 0, left, width - height - left, cv2.BORDER_REPLICATE), np.uint8
    )
    path = folder / f"demo_{width}x{height}.png"
    write_image(path, canvas)
    return path


def _default_driver(folder: Path) -> Path:
    """A clip made by the built-in bundle, whatever bundle is measured."""
    path = folder / "demo_talks_512x512.mp4"
    with (
        Animator() as animator,
        closing(
            animator.animate(
                demo_picture(),
                builtin_template("talk", duration=_DRIVER_SECONDS, canonical=animator.canonical),
            )
        ) as animation,
        open_writer(path, animation.size, Fraction(25)) as writer,
    ):
        for frame in animation:
            writer.write(frame.rgb)
    return path


def _describe(what: str | Path, folder: Path) -> dict[str, str]:
    """Name and digest of an input; what was made here is known by its name."""
    path = Path(what)
    if not path.is_file():
        return {"template": str(what)}
    if path.parent == folder:
        return {"made": path.name}
    return {"file": path.name, "sha256": sha256_file(path)}
