"""Runs a graph on a handful of frames: to see what its activations are, and what single convolutions cost in 8 bits.

Graphs run in ONNX Runtime on the CPU with Q/DQ nodes as they stand, not fused into kernels of 8 bits: products are then exact
in float32, as int32 sums are, and do not depend on what the CPU's 8-bit kernels saturate at.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253
import onnxruntime

from lp_edge.engines import names
from lp_edge.engines.external import external_files
from lp_edge.errors import ExportError
from lp_edge.export.onnx_export import serialise
from lp_edge.export.quantize.graph import inputs_of, observed, quantised
from lp_edge.export.quantize.quality import compare
from lp_edge.export.quantize.scales import Kind, Method, threshold

__all__ = ["Activations", "Laboratory", "Tick", "by_cost", "least_float", "no_tick"]

_WHOLE_FRAMES: Final = 64  # whose samples are all kept: 9 MB a frame for LivePortrait
Feeds = Mapping[str, npt.NDArray[Any]]
Tick = Callable[[str, int, int], None]
"""Told what is going on, how much of it is done, and how much there is."""


def no_tick(stage: str, done: int, whole: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Activations:
    """Largest magnitude of each tensor, and magnitudes sampled from it, over all frames."""

    peaks: Mapping[str, float]
    samples: Mapping[str, npt.NDArray[np.float32]]

    def thresholds(self, method: Method, kind: Kind) -> dict[str, float]:
        """Tensor -> magnitude that gets the largest level; see :func:`~lp_edge.export.quantize.scales.threshold`."""
        return {name: threshold(self.samples[name], peak, method, kind) for name, peak in self.peaks.items()}


class Laboratory:
    """A graph without its weights in memory, and a folder in which variants of it run; a context manager.

    Args:
        path: the ONNX file; weights beside it are copied into the folder (onnx and ONNX Runtime refuse links).
        place: where the folder is made; None = where temporary files go.
    """

    def __init__(self, path: Path, place: Path | None = None) -> None:
        self.source = path
        self.model = onnx.load(path, load_external_data=False)
        self.folder = Path(tempfile.mkdtemp(prefix=".quantise-", dir=place))
        try:
            for file in external_files(path):
                shutil.copyfile(path.parent / file, self.folder / file)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Laboratory:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def session(self, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
        """A session of a variant, with Q/DQ nodes as they stand."""
        path = self.folder / "variant.onnx"
        path.write_bytes(serialise(model))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def images(self, model: onnx.ModelProto, feeds: Iterable[Feeds]) -> list[npt.NDArray[np.uint8]]:
        """What a variant draws: uint8 ``[512, 512, 3]`` per frame."""
        session = self.session(model)
        return [session.run([names.IMAGE], dict(f))[0][0] for f in feeds]

    def activations(self, tensors: Sequence[str], feeds: Sequence[Feeds], tick: Tick) -> Activations:
        """Look at tensors over all frames, in one run each."""
        session = self.session(observed(self.model, tensors))
        peaks = dict.fromkeys(tensors, 0.0)
        samples: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in tensors}
        # Memory stays bounded however many frames there are; odd, as the steps of the samples themselves.
        step = -(-len(feeds) // _WHOLE_FRAMES) | 1
        outputs = [f"{kind}:{name}" for name in tensors for kind in ("peak", "samples")]
        for done, feed in enumerate(feeds):
            tick("calibrating", done, len(feeds))
            results = session.run(outputs, dict(feed))
            for name, peak, some in zip(tensors, results[::2], results[1::2], strict=True):
                if not np.isfinite(peak[0]):
                    raise ExportError(
                        f"{name} is infinite or undefined in calibration frame {done}",
                        "expected numbers",
                        "verify the bundle (lp-export --verify), or calibrate the fp32 one",
                    )
                peaks[name] = max(peaks[name], float(peak[0]))
                samples[name].append(some[::step].copy() if step > 1 else some)
        tick("calibrating", len(feeds), len(feeds))
        return Activations(peaks, {name: np.concatenate(parts) for name, parts in samples.items()})

    def variant(
        self, thresholds: Mapping[str, float], chosen: Collection[str], kind: Kind, opset: int | None = None
    ) -> onnx.ModelProto:
        """The graph with these convolutions in 8 bits."""
        return quantised(self.model, thresholds, chosen, kind, opset=opset, folder=self.source.parent)

    def worst_psnr(
        self,
        thresholds: Mapping[str, float],
        chosen: Collection[str],
        kind: Kind,
        feeds: Sequence[Feeds],
        wanted: Sequence[npt.NDArray[np.uint8]],
    ) -> float:
        """PSNR in dB of the worst frame with these convolutions in 8 bits."""
        got = self.images(self.variant(thresholds, chosen, kind), feeds)
        return min(compare(a, b).psnr_db for a, b in zip(got, wanted, strict=True))

    def tensors(self, chosen: Collection[str]) -> list[str]:
        """What these convolutions read."""
        return inputs_of(self.model, chosen)


_Psnr = Callable[[Collection[str]], float]
"""PSNR with these convolutions in 8 bits."""


def by_cost(candidates: Sequence[str], psnr: _Psnr, tick: Tick) -> list[tuple[str, float]]:
    """The convolutions in the order of what they cost alone: name and PSNR with this one in 8 bits, the worst first."""
    costs = []
    for done, name in enumerate(candidates):
        tick("sensitivity", done, len(candidates))
        costs.append((name, psnr([name])))
    tick("sensitivity", len(candidates), len(candidates))
    return sorted(costs, key=lambda cost: cost[1])


def least_float(ranked: Sequence[str], wanted: float, psnr: _Psnr) -> list[str]:
    """The fewest of the worst convolutions that must stay in floating point for a PSNR, by bisection.

    Args:
        ranked: all candidates, the worst first.
        wanted: dB.
        psnr: measures a choice.

    Raises:
        ExportError: not even the best convolution alone can be quantised.
    """
    low, high = (
        0,
        len(ranked),
    )  # with `low` of them in float the PSNR is too low; with all, there is nothing to measure
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if psnr(ranked[middle:]) >= wanted else (middle, high)
    if high == len(ranked):
        raise ExportError(
            f"no choice of convolutions in 8 bits reaches {wanted:g} dB",
            "expected at least one",
            "lower --min-psnr, or stay with fp16",
        )
    return list(ranked[:high])
