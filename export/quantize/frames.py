"""Frames that the user supplies, animated by a bundle: what its networks are fed then, and what comes out.

Pictures are the sources, clips the drivers; without a picture, the first frame of each clip is one. Sources and clips are
paired round, and frames are taken evenly: for calibration from the first three quarters of a clip, for the report from the
last, so that no frame is judged that the calibration has seen. The same files give the same frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.bundle import Bundle
from lp_edge.engines.runner import Array, Runner, WrappedRunner, to_host
from lp_edge.errors import ConfigError, LpEdgeError, NoFaceError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.image import read_image
from lp_edge.runtime.media_read import VideoReader, probe, sniff_kind
from lp_edge.runtime.options import AnimateOptions

__all__ = ["Pair", "Part", "Shot", "plan", "shots"]

U8 = npt.NDArray[np.uint8]
Part = Literal["calibration", "held-out"]

_SHARE: Final = 0.75


@dataclass(frozen=True)
class Pair:
    """A source that a clip drives: indices of the clip's frames for either part, in order."""

    source: Path
    clip: Path
    calibration: tuple[int, ...]
    held_out: tuple[int, ...]

    def of(self, part: Part) -> tuple[int, ...]:
        """The frames of a part."""
        return self.calibration if part == "calibration" else self.held_out


@dataclass(frozen=True)
class Shot:
    """One animated frame.

    Attributes:
        where: which, in words.
        feeds: inputs of ``warp_decode`` by name, batch 1.
        image: what it drew, uint8 ``[512, 512, 3]``; black where it was not run.
        frame: the whole frame, uint8 ``[H, W, 3]``.
    """

    where: str
    feeds: Mapping[str, npt.NDArray[Any]]
    image: U8
    frame: U8


def plan(inputs: Sequence[Path], calibration: int, held_out: int) -> tuple[Pair, ...]:
    """Choose frames.

    Args:
        inputs: pictures, clips, and folders of them (files of other kinds in a folder are passed over).
        calibration, held_out: how many frames, of all clips together.

    Raises:
        ConfigError: no clip, a clip of one frame, or a number below 1.
        MediaError: a file cannot be read.
    """
    for name, number in (("calibration", calibration), ("held-out", held_out)):
        if number < 1:
            raise ConfigError(f"{number} {name} frames", "expected at least one", "raise the number")
    pictures, clips = _sorted(inputs)
    if not clips:
        raise ConfigError(
            f"no driving clip among {', '.join(map(str, inputs)) or 'no files'}",
            "expected at least one clip, and best a few source pictures",
            "give clips of faces that talk and turn; activations are measured while they drive",
        )
    sources = pictures or clips
    count = max(len(sources), len(clips))
    lengths = {clip: _length(clip) for clip in clips}
    if short := [clip for clip in clips if lengths[clip] < 2]:
        raise ConfigError(
            f"{short[0]} has one frame",
            "expected two or more: one for calibration, another one to judge it",
            "give a longer clip",
        )
    pairs = []
    for i in range(count):
        source, clip = sources[i % len(sources)], clips[i % len(clips)]
        length = lengths[clip]
        cut = max(1, int(_SHARE * length))  # a whole frame, so that none belongs to both parts
        chosen = []
        for low, high, number in ((0, cut, calibration), (cut, length, held_out)):
            n = number // count + (i < number % count)
            chosen.append(tuple(sorted({int(low + (high - low) * (2 * k + 1) / (2 * n)) for k in range(n)})))
        pairs.append(Pair(source, clip, chosen[0], chosen[1]))
    return tuple(pairs)


def _sorted(inputs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Pictures and clips, each in the order given; what lies in a folder by name."""
    kinds: dict[str, list[Path]] = {"image": [], "video": []}
    for given in inputs:
        for path in sorted(given.iterdir()) if given.is_dir() else [given]:
            try:
                kind = sniff_kind(path)
            except LpEdgeError:
                if path == given:
                    raise
                continue
            if kind in kinds:
                kinds[kind].append(path)
            elif path == given:
                raise ConfigError(
                    f"{path} is a {kind}", "expected a picture or a clip", "give the clip that it was made of"
                )
    return kinds["image"], kinds["video"]


def _length(clip: Path) -> int:
    frames = probe(clip).frames
    if frames is None:
        with VideoReader(clip) as reader:
            frames = sum(1 for _ in reader)
    return frames


class _Recorder(WrappedRunner):
    """A network that notes what it is fed, and what it draws; not run at all unless ``draw``."""

    def __init__(self, inner: Runner, draw: bool) -> None:
        super().__init__(inner)
        self._draw = draw
        self.feeds: dict[str, npt.NDArray[Any]] = {}
        self.image: U8 = np.zeros(0, np.uint8)

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        self.feeds = {name: to_host(array) for name, array in feeds.items()}
        if self._draw:
            results = self.inner.infer(feeds, outputs)
        else:
            batch = feeds[names.KP_DRIVING].shape[0]
            shape = [batch, *self.outputs[names.IMAGE].shape[1:]]
            results = {names.IMAGE: np.zeros([int(size) for size in shape], np.uint8)}
        self.image = np.asarray(to_host(results[names.IMAGE])[0], np.uint8)
        return results


def shots(
    bundle: Bundle, pairs: Sequence[Pair], part: Part, *, draw: bool, graph: Path | None = None
) -> Iterator[Shot]:
    """Animate the planned frames on the CPU, as ``lp-run`` does with a live driver: relative to the clip's first frame.

    Frames in which no face is found are passed over.

    Args:
        bundle: of the family liveportrait.
        pairs, part: which frames.
        draw: run ``warp_decode``, by far the slowest.
        graph: this ONNX file in place of the bundle's ``warp_decode``.

    Raises:
        NoFaceError: no face in a source, or in any of the frames.
    """
    recorders: list[_Recorder] = []

    def wrap(runner: Runner) -> Runner:
        if runner.name != names.WARP_DECODE:
            return runner
        if graph is not None:
            runner.close()
            runner = open_runner(graph, BackendConfig("cpu"), name=names.WARP_DECODE)
        recorders.append(_Recorder(runner, draw))
        return recorders[0]

    options = AnimateOptions(smooth=False)
    found = 0
    with Animator(bundle, backend=BackendConfig("cpu"), wrap=wrap) as animator:
        for pair in pairs:
            wanted = pair.of(part)
            if not wanted:
                continue
            live = animator.live(_picture(pair.source), options)
            with VideoReader(pair.clip) as reader:
                for frame in reader:
                    if frame.index and frame.index not in wanted:
                        continue
                    drawn = live.step(frame.rgb, float(frame.time))
                    if frame.index in wanted and drawn.driver.state in ("tracked", "reacquired"):
                        found += 1
                        where = f"frame {frame.index} of {pair.clip.name} on {pair.source.name}"
                        yield Shot(where, recorders[0].feeds, recorders[0].image, drawn.rgb)
                    if frame.index >= wanted[-1]:
                        break
    if not found:
        raise NoFaceError(
            f"no face in any {part} frame of {', '.join(dict.fromkeys(str(p.clip) for p in pairs))}",
            "expected faces",
            "give clips that show one throughout",
        )


def _picture(path: Path) -> U8:
    if sniff_kind(path) == "image":
        return read_image(path)
    with VideoReader(path) as reader:
        return next(iter(reader)).rgb
