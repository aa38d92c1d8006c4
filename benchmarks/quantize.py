"""What 8-bit convolutions cost in quality, by calibration method and type, on held-out frames. Prints one JSON object.

    python benchmarks/quantize.py --bundle BUNDLE --calibration PATH... [--frames N] [--held-out N] [--sensitivity]

BUNDLE is an fp32 bundle of the family liveportrait. All of its candidates are quantised, whatever the quality; pictures are
the crops that `warp_decode` draws, compared with fp32 in exact 8-bit arithmetic (lp_edge.export.quantize). `--sensitivity`
quantises one convolution at a time as well and takes a run for each.

With random weights the figures say that the tool works and how methods compare on such activations, nothing of real ones.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from lp_edge.engines import names
from lp_edge.engines.bundle import open_bundle
from lp_edge.errors import LpEdgeError
from lp_edge.export.checkpoints import verified
from lp_edge.export.quantize.calibrate import Laboratory, by_cost, no_tick
from lp_edge.export.quantize.frames import plan, shots
from lp_edge.export.quantize.graph import convolutions
from lp_edge.export.quantize.quality import compare, summary
from lp_edge.export.quantize.scales import FP8, KINDS, METHODS
from lp_edge.runtime.provenance import provenance


def tell(line: str) -> None:
    """To standard error, with the time."""
    click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)


def measure(
    bundle_path: Path, calibration: tuple[Path, ...], frames: int, held_out: int, sensitivity: bool
) -> dict[str, Any]:
    """All types and methods on one bundle."""
    bundle = open_bundle(bundle_path)
    pairs = plan(calibration, frames, held_out)
    feeds = [shot.feeds for shot in shots(bundle, pairs, "calibration", draw=False)]
    tell("fp32")
    wanted = list(shots(bundle, pairs, "held-out", draw=True))
    rows = []
    with Laboratory(bundle.path_of(names.WARP_DECODE)) as laboratory:
        chosen = convolutions(laboratory.model)
        activations = laboratory.activations(laboratory.tensors(chosen), feeds, no_tick)
        for kind in KINDS.values():
            for method in METHODS:
                if method == "entropy" and kind is FP8:
                    continue
                thresholds = activations.thresholds(method, kind)
                model = laboratory.variant(thresholds, chosen, kind)
                images = laboratory.images(model, [shot.feeds for shot in wanted])
                figures = [compare(a, b.image, b.where) for a, b in zip(images, wanted, strict=True)]
                share = [thresholds[name] / peak for name, peak in activations.peaks.items() if peak]
                rows.append(
                    {
                        "type": kind.name,
                        "method": method,
                        "mean_threshold_of_peak": sum(share) / len(share),
                        **summary(figures),
                    }
                )
                tell(f"{kind.name} {method}: {rows[-1]['psnr_db_worst']:.2f} dB")
        costs: list[tuple[str, float]] = []
        if sensitivity:
            kind = KINDS["int8"]
            thresholds = activations.thresholds("mse", kind)
            picture = laboratory.images(laboratory.model, feeds[:1])

            def psnr(some: Any) -> float:
                return laboratory.worst_psnr(thresholds, some, kind, feeds[:1], picture)

            costs = by_cost(chosen, psnr, lambda stage, done, whole: tell(f"{stage} {done} of {whole}"))
    return {
        "benchmark": "quantize",
        "weights_official": verified(bundle.manifest.checkpoints),
        "note": "ONNX Runtime on a CPU, Q/DQ nodes unfused; figures of random weights say nothing of real ones",
        "files": sorted({path.name for pair in pairs for path in (pair.source, pair.clip)}),
        "calibration_frames": len(feeds),
        "held_out_frames": len(wanted),
        "convolutions": len(chosen),
        "results": rows,
        "int8_alone_db": dict(costs),
        "provenance": provenance(bundle),
    }


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--calibration", type=click.Path(path_type=Path, exists=True), multiple=True, required=True)
@click.option("--frames", type=int, default=8, show_default=True, help="Frames that set the scales.")
@click.option("--held-out", type=int, default=4, show_default=True, help="Frames that judge.")
@click.option("--sensitivity", is_flag=True, help="Also every convolution alone.")
def main(bundle: Path, calibration: tuple[Path, ...], frames: int, held_out: int, sensitivity: bool) -> None:
    """Measure and print."""
    try:
        click.echo(json.dumps(measure(bundle, calibration, frames, held_out, sensitivity), indent=2))
    except LpEdgeError as error:
        click.echo(f"quantize: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
