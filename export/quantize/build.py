"""A bundle with convolutions of 8 bits, made of a finished one: calibrated, judged on other frames, and written only when good.

No default anywhere takes such a bundle: whoever wants it gives its folder. What random weights tell about 8 bits does not hold
for trained ones, and the official ones were not at hand (docs/precision.md).
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253

from lp_edge.engines import names
from lp_edge.engines.bundle import Bundle, BundleWriter, open_bundle
from lp_edge.errors import BundleError, ConfigError, ExportError
from lp_edge.export.checkpoints import verified
from lp_edge.export.lint import check
from lp_edge.export.liveportrait.build import LARGE, BuildReport, NetworkReport, Report, build
from lp_edge.export.onnx_export import node_count, serialise, split_weights
from lp_edge.export.quantize.calibrate import Laboratory, Tick, by_cost, least_float, no_tick
from lp_edge.export.quantize.frames import Shot, plan, shots
from lp_edge.export.quantize.graph import OPSET, convolutions
from lp_edge.export.quantize.quality import Figures, compare, markdown, summary
from lp_edge.export.quantize.scales import FP8, KINDS, METHODS, Kind, Method
from lp_edge.runtime.image import encode_image

__all__ = ["MIN_PSNR", "QuantizeConfig", "export_quantised", "quantise"]

U8 = npt.NDArray[np.uint8]

MIN_PSNR: Final = 35.0
"""Default bound in dB for every held-out crop: fp16's is 45 (docs/exporting.md); differences at 35 dB begin to be seen."""

_MARGIN: Final = 1.0  # dB that the choice of convolutions aims above the bound: other frames are judged
_FILES: Final = {
    "quality.json": "quality",
    "quality.md": "quality_page",
    "worst_reference.png": "worst_reference",
    "worst_quantised.png": "worst_quantised",
}
"""File of the report -> what the manifest calls it."""


@dataclass(frozen=True)
class QuantizeConfig:
    """How a bundle is quantised.

    Attributes:
        precision: ``int8`` or ``fp8``.
        method: how activations get their scales, see :func:`~lp_edge.export.quantize.scales.threshold`.
        calibration_frames, held_out_frames: how many frames set the scales, and how many judge them.
        keep_float: how many of the convolutions that cost most stay in floating point; None = as few as the bound needs.
        min_psnr: dB that every held-out crop must reach against fp32.
        accept_quality: write the bundle below the bound, too.

    Raises:
        ConfigError: a value is unknown or out of range.
    """

    precision: Literal["int8", "fp8"] = "int8"
    method: Method = "mse"
    calibration_frames: int = 16
    held_out_frames: int = 8
    keep_float: int | None = None
    min_psnr: float = MIN_PSNR
    accept_quality: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, tuple(KINDS)),
            ("calibration method", self.method, METHODS),
        ):
            if value not in known:
                raise ConfigError(
                    f"{name} {value!r}", f"expected one of {', '.join(known)}", "choose one of them"
                )
        if self.method == "entropy" and self.precision == "fp8":
            raise ConfigError(
                "calibration method entropy with fp8",
                "expected max, percentile or mse: entropy counts evenly spaced levels",
                "choose one of them",
            )
        for name, number, high in (
            ("calibration_frames", self.calibration_frames, 1000),
            ("held_out_frames", self.held_out_frames, 1000),
        ):
            if not 1 <= number <= high:
                raise ConfigError(f"{name} is {number}", f"expected 1 to {high}", f"correct {name}")
        if self.keep_float is not None and self.keep_float < 0:
            raise ConfigError(f"keep_float is {self.keep_float}", "expected 0 or more", "correct keep_float")
        if not 0 <= self.min_psnr <= 100:
            raise ConfigError(f"min_psnr is {self.min_psnr}", "expected 0 to 100 dB", "correct min_psnr")


def export_quantised(
    output: Path,
    *,
    config: QuantizeConfig,
    calibration: Sequence[Path],
    half: bool = False,
    report: Report = lambda _: None,
    tick: Tick = no_tick,
    build_bundle: Any = build,
    **options: Any,
) -> BuildReport:
    """Export fp32 (and fp16) as :func:`lp_edge.export.liveportrait.build.build` does, and quantise that.

    Args:
        output: folder to write.
        config, calibration, report, tick: as for :func:`quantise`.
        half: everything outside of the 8-bit convolutions as in an fp16 bundle.
        build_bundle: exports a bundle.
        options: of the export, without ``precision``.

    Raises:
        what the export and :func:`quantise` raise.
    """
    _check_target(config, options.get("flavor", "main"), half)
    plan(
        calibration, config.calibration_frames, config.held_out_frames
    )  # what is wrong with them is told now
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        bundles = {}
        for precision in ("fp32", "fp16") if half else ("fp32",):
            bundles[precision] = Path(folder) / precision
            build_bundle(bundles[precision], precision=precision, report=report, **options)
        base = bundles["fp16" if half else "fp32"]
        return quantise(
            base,
            output,
            config=config,
            calibration=calibration,
            reference=bundles["fp32"],
            report=report,
            tick=tick,
        )


def _check_target(config: QuantizeConfig, flavor: str, half: bool) -> None:
    if flavor == "tensorrt8" and (config.precision == "fp8" or half):
        raise ConfigError(
            f"{config.precision}{' with fp16' if half else ''} in the flavour tensorrt8",
            "expected int8 with fp32: fp8, and Q/DQ nodes in half precision, need opset 19, which TensorRT 8 does not read",
            "export the flavour main for TensorRT 10 and newer, or take int8 with fp32",
        )


def _check_apart(output: Path, role: str, read: Path) -> None:
    """Refuse to write over what is read: the fp32 weights would be gone for good."""
    here, there = output.resolve(), read.resolve()
    if here == there or here in there.parents or there in here.parents:
        where = "is" if here == there else "lies in" if there in here.parents else "holds"
        raise ConfigError(
            f"the output {output} {where} the bundle of {role}, {read}",
            "expected another folder: that bundle is read and kept",
            "give another --output",
        )


@dataclass
class _Choice:
    """Which convolutions are quantised, and why others are not."""

    chosen: list[str]
    floating: dict[str, str] = field(default_factory=dict)


def quantise(
    base: Path,
    output: Path,
    *,
    config: QuantizeConfig,
    calibration: Sequence[Path],
    reference: Path | None = None,
    report: Report = lambda _: None,
    tick: Tick = no_tick,
) -> BuildReport:
    """Write a copy of a bundle whose ``warp_decode`` has 8-bit convolutions.

    Args:
        base: the bundle, in fp32 or fp16.
        output: folder to write; an older bundle there is replaced when everything is ready, not before.
        config: how.
        calibration: pictures and clips, see :func:`lp_edge.export.quantize.frames.plan`.
        reference: the fp32 bundle of the same weights that it is compared with; None = ``base``.
        report: gets one line of text per step.
        tick: gets what is going on, how much of it is done and how much there is.

    Returns:
        As an export does. The bundle's files ``quality.json``, ``quality.md`` and the pair of pictures have the comparison.

    Raises:
        ConfigError: options or files that do not go together, or ``output`` is, holds or lies in a bundle that is read.
        BundleError: a bundle is not intact, or of the wrong kind.
        NoFaceError: no face in the frames.
        ExportError: the quality is below the bound. The report is then in the folder ``OUTPUT.quality``, and no bundle is
            written.
    """
    start = time.perf_counter()
    for role, read in (("--quantize", base), ("--reference", reference)):
        if read is not None:
            _check_apart(output, role, read)
    bundle = _bundle(base, ("fp32", "fp16"))
    truth = bundle if reference is None else _bundle(reference, ("fp32",))
    entry = bundle.network(names.WARP_DECODE)
    half = entry.precision == "fp16"
    if truth.network(names.WARP_DECODE).precision != "fp32":
        raise ConfigError(
            f"{base} is fp16, and no fp32 bundle to compare with is given",
            "expected both",
            "give --reference, the fp32 bundle of the same weights",
        )
    if truth.manifest.checkpoints != bundle.manifest.checkpoints:
        raise ConfigError(
            f"{base} and {truth.directory} come from other weights",
            "expected the same",
            "give a pair of one export",
        )
    flavor = "tensorrt8" if entry.opset < 17 else "main"
    _check_target(config, flavor, half)
    kind = KINDS[config.precision]
    pairs = plan(calibration, config.calibration_frames, config.held_out_frames)
    # A place that cannot be written is told now.
    _writer(bundle, output).abort()

    with Laboratory(bundle.path_of(names.WARP_DECODE), output.absolute().parent) as laboratory:
        candidates = convolutions(laboratory.model)
        choice = _Choice(candidates)
        for name in convolutions(laboratory.model, ends=True):
            if name not in candidates:
                choice.floating[name] = "reads the features or draws the pixels"
        if not candidates:
            raise ExportError("the graph has no convolution to quantise", "expected some", "report this")
        if config.keep_float is not None and config.keep_float >= len(candidates):
            raise ConfigError(
                f"keep_float is {config.keep_float} of {len(candidates)} convolutions",
                "expected to quantise at least one",
                f"give --keep-float {len(candidates) - 1} at most",
            )
        report("looking for faces in the calibration frames")
        seen = list(shots(bundle, pairs, "calibration", draw=False))
        report(f"measuring activations of {len(candidates)} convolutions on {len(seen)} frames")
        activations = laboratory.activations(
            laboratory.tensors(candidates), [shot.feeds for shot in seen], tick
        )
        thresholds = activations.thresholds(config.method, kind)
        _choose(laboratory, choice, thresholds, kind, config, seen, report, tick)
        measured_on = [shot.where for shot in seen]
        thresholds = {name: thresholds[name] for name in laboratory.tensors(choice.chosen)}
        del seen, activations
        opset = OPSET if half or kind is FP8 else entry.opset
        model = laboratory.variant(thresholds, choice.chosen, kind, opset)
        target = "tensorrt11" if opset >= OPSET else flavor
        warnings = [f"{names.WARP_DECODE}: {finding}" for finding in check(model, target, names.WARP_DECODE)]
        report("drawing the held-out frames in fp32")
        wanted = _ticked(shots(truth, pairs, "held-out", draw=True), tick, "fp32", config.held_out_frames)
        report(f"drawing them in {kind.name}")
        session_images = laboratory.images(model, _ticked_feeds(wanted, tick, kind.name))
        network = [
            compare(image, shot.image, shot.where) for image, shot in zip(session_images, wanted, strict=True)
        ]
        report("and through the whole bundle")
        path = laboratory.folder / f"{names.WARP_DECODE}.onnx"
        path.write_bytes(serialise(model))
        whole = _whole_frames(bundle, pairs, path, wanted, tick)
        onnx.load_external_data_for_model(model, str(laboratory.source.parent))
        graph = serialise(model)
        stored, data = (
            split_weights(model, f"{names.WARP_DECODE}.onnx.data") if len(graph) > LARGE else (graph, None)
        )
        del model, graph

    document = {
        "precision": config.precision,
        "rest": entry.precision,
        "flavor": flavor,
        "opset": opset,
        "method": config.method,
        **_weights(bundle),
        "calibration_frames": measured_on,
        "convolutions": {
            "total": len(choice.chosen) + len(choice.floating),
            "quantised": choice.chosen,
            "float": choice.floating,
        },
        "thresholds": thresholds,
        **_verdict(network, config),
        "runtime": f"ONNX Runtime {metadata.version('onnxruntime')} on a CPU ({platform.machine()})",
        "other_networks": {
            n: other.precision for n, other in bundle.manifest.networks.items() if n != names.WARP_DECODE
        },
        "network": summary(network),
        "end_to_end": summary(whole),
        "versions": {name: metadata.version(name) for name in ("lp-edge", "onnx", "onnxruntime", "numpy")},
    }
    worst = document["network"]["worst_frame"]
    files = _report_files(document, wanted[worst].image, session_images[worst])
    if not document["good"]:
        if not config.accept_quality:
            raise _refused(output, document, files)
        warnings.append(
            f"the worst frame has {document['network']['psnr_db_worst']:.1f} dB, below {config.min_psnr:g}"
        )
    if not document["weights_official"]:
        warnings.append("the weights are not the official ones: the quality says nothing about those")
    figures = {
        "image_psnr_db": document["network"]["psnr_db_worst"],
        "image_ssim": document["network"]["ssim_worst"],
        "image_max": float(document["network"]["max_abs"]),
    }
    rows = _write(bundle, output, stored, data, config.precision, opset, figures, files)
    report(f"wrote {output}")
    manifest, seconds = bundle.manifest, time.perf_counter() - start
    return BuildReport(
        output, manifest.variant, rows, manifest.checkpoints, manifest.licence, tuple(warnings), seconds
    )


def _write(
    bundle: Bundle,
    output: Path,
    graph: bytes,
    data: bytes | None,
    precision: str,
    opset: int,
    figures: Mapping[str, float],
    files: Mapping[str, bytes],
) -> tuple[NetworkReport, ...]:
    """A copy of the bundle with this ``warp_decode`` and these files."""
    rows = []
    with _writer(bundle, output) as writer:
        for name, entry in bundle.manifest.networks.items():
            start, content, light = time.perf_counter(), bundle.path_of(name), None
            if name == names.WARP_DECODE:
                light = onnx.load_from_string(graph)
                entry = writer.add_network(
                    name, graph, precision=precision, opset=opset, parity=figures, data=data
                )
            else:
                writer.add_network(
                    name, content, precision=entry.precision, opset=entry.opset, parity=entry.parity
                )
            nodes = node_count(light or onnx.load(content, load_external_data=False))
            parity, seconds = dict(entry.parity), time.perf_counter() - start
            rows.append(
                NetworkReport(name, nodes, entry.total_size, entry.opset, entry.precision, parity, seconds)
            )
        for name, kept in bundle.manifest.files.items():
            writer.add_file(name, bundle.path_of_file(name), file=kept.file)
        for file, bytes_ in files.items():
            writer.add_file(_FILES[file], bytes_, file=file)
    return tuple(rows)


def _bundle(path: Path, precisions: Sequence[str]) -> Bundle:
    bundle = open_bundle(path)
    if bundle.manifest.family != "liveportrait":
        raise BundleError(
            f"{path} is a bundle of the family {bundle.manifest.family}",
            "expected the family liveportrait: other families have no convolution worth it",
            "give a bundle that lp-export --family liveportrait wrote",
        )
    precision = bundle.network(names.WARP_DECODE).precision
    if precision not in precisions:
        raise ConfigError(
            f"{path} is {precision}",
            f"expected {' or '.join(precisions)}",
            "give the bundle as it was exported",
        )
    return bundle


def _writer(bundle: Bundle, output: Path) -> BundleWriter:
    m = bundle.manifest
    return BundleWriter(
        output,
        family=m.family,
        variant=m.variant,
        licence=m.licence,
        created_by=f"lp-edge {metadata.version('lp-edge')}",
        keypoints=m.keypoints,
        normalisation=m.normalisation,
        checkpoints=m.checkpoints,
        regions=m.regions,
        sizes=m.sizes,
    )


def _choose(
    laboratory: Laboratory,
    choice: _Choice,
    thresholds: Mapping[str, float],
    kind: Kind,
    config: QuantizeConfig,
    seen: Sequence[Shot],
    report: Report,
    tick: Tick,
) -> None:
    """Take convolutions out of the choice: a fixed number, or as few as the bound needs; judged on a calibration frame."""
    if config.keep_float == 0:
        return
    feeds = [seen[len(seen) // 2].feeds]
    wanted = laboratory.images(laboratory.model, feeds)

    def psnr(chosen: Any) -> float:
        return laboratory.worst_psnr(thresholds, chosen, kind, feeds, wanted)

    aim = config.min_psnr + _MARGIN
    if config.keep_float is None and (config.accept_quality or psnr(choice.chosen) >= aim):
        return
    report(f"looking for the convolutions that cost most, {len(choice.chosen)} runs")
    costs = by_cost(choice.chosen, psnr, tick)
    ranked = [name for name, _ in costs]
    kept = least_float(ranked, aim, psnr) if config.keep_float is None else ranked[: config.keep_float]
    alone = dict(costs)
    choice.floating.update({name: f"alone it costs most: {alone[name]:.1f} dB" for name in kept})
    choice.chosen = [name for name in choice.chosen if name not in kept]
    report(f"{len(kept)} convolutions stay in floating point")


def _weights(bundle: Bundle) -> dict[str, Any]:
    """What the report says of the weights."""
    official = verified(bundle.manifest.checkpoints)
    words = "not the official ones: what is measured here holds for these weights only, and says nothing if they are random"
    return {
        "weights": "the official ones, by their SHA-256" if official else words,
        "weights_official": official,
        "checkpoints": [asdict(entry) for entry in bundle.manifest.checkpoints],
    }


def _verdict(frames: Sequence[Figures], config: QuantizeConfig) -> dict[str, Any]:
    good = min(f.psnr_db for f in frames) >= config.min_psnr
    missed = "NOT reached, accepted all the same" if config.accept_quality else "NOT reached"
    return {"bound_psnr_db": config.min_psnr, "good": good, "verdict": "reached" if good else missed}


def _ticked(found: Any, tick: Tick, stage: str, whole: int) -> list[Shot]:
    result: list[Shot] = []
    tick(stage, 0, whole)
    for shot in found:
        result.append(shot)
        tick(stage, len(result), max(whole, len(result)))
    return result


def _ticked_feeds(found: Sequence[Shot], tick: Tick, stage: str) -> Any:
    for done, shot in enumerate(found):
        tick(stage, done, len(found))
        yield shot.feeds


def _whole_frames(
    bundle: Bundle, pairs: Any, graph: Path, wanted: Sequence[Shot], tick: Tick
) -> list[Figures]:
    got = _ticked(shots(bundle, pairs, "held-out", draw=True, graph=graph), tick, "end to end", len(wanted))
    if [shot.where for shot in got] != [shot.where for shot in wanted]:
        raise ExportError(
            "faces were found in other frames than in fp32",
            "expected the same: detector and mesh are the same networks",
            "report this",
        )
    return [compare(a.frame, b.frame, a.where) for a, b in zip(got, wanted, strict=True)]


def _report_files(document: Mapping[str, Any], want: U8, got: U8) -> dict[str, bytes]:
    return {
        "quality.json": (json.dumps(document, indent=2, allow_nan=False) + "\n").encode(),
        "quality.md": markdown(document).encode(),
        "worst_reference.png": encode_image(want, ".png"),
        "worst_quantised.png": encode_image(got, ".png"),
    }


def _refused(output: Path, document: Mapping[str, Any], files: Mapping[str, bytes]) -> ExportError:
    folder = output.with_name(f"{output.name}.quality")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    f = document["network"]
    return ExportError(
        f"{document['precision']} reaches {f['psnr_db_worst']:.1f} dB on {f['worst_where']} (SSIM {f['ssim_worst']:.3f}); "
        f"no bundle is written, the report is in {folder}",
        f"expected {document['bound_psnr_db']:g} dB on every held-out frame",
        "look at the pictures there; --keep-float N leaves more in floating point, --accept-quality takes it as it is",
    )
