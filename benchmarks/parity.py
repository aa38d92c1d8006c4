"""Parity with the reference implementation: a golden file against what this project computes. One JSON line per item.

    python benchmarks/parity.py networks FILE.npz --bundle BUNDLE
    python benchmarks/parity.py motion FILE.npz --weights DIR

`networks` runs the ONNX graphs of a bundle on the inputs of the file; the outputs in the file are those of the reference
networks with the weights that the bundle was made from, whole or sub-sampled by regular strides, which are read
off the shapes. What W hands on inside `warp_decode` (deformation, occlusion map, warped features) is read by cutting the graph there.
`motion` runs the composition between motion extractor and warp on the cases of the file, with the stitching and retargeting
networks of a bundle or of checkpoints.

Exit code: 0 when every item holds its tolerance, 1 when one does not, another one (with a message) when the input is unusable.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.bundle import Bundle, open_bundle
from lp_edge.engines.runner import Runner, to_host
from lp_edge.errors import BackendUnavailable, BundleError, ConfigError, LpEdgeError
from lp_edge.runtime.liveportrait_motion import degrees_from_logits

Arrays = dict[str, npt.NDArray[Any]]
Item = dict[str, Any]

# Largest absolute differences where the manifest calls the graph fp32; fp16 has the limits that exports must keep.
FP32 = {
    "motion": 1e-4,
    "feature_3d": 1e-4,
    "deformation": 1e-4,
    "occlusion_map": 1e-4,
    "warped": 1e-4,
    "delta": 1e-5,
}
FOLDED_WARP = 5e-4  # of `warped` where the last warp is a pair of rank-4 GridSamples over folded rows
LEVELS, MANY, FEW = 3.0, 1.0, 1e-3  # grey levels anywhere; levels that all but this share of the pixels keep
PSNR_DB = 45.0  # of the picture where the decoder is fp16

ANGLES = (names.PITCH, names.YAW, names.ROLL)
# Item -> graph, and the arrays that are its input.
PERCEPTRONS = {
    "stitching": (names.STITCHING, "kp_driving"),
    "eye": (names.RETARGET_EYE, "eye_ratio"),
    "lip": (names.RETARGET_LIP, "lip_ratio"),
}
INSIDE_WARP = (names.DEFORMATION, names.OCCLUSION_MAP, names.WARPED)


# -- the golden file ---------------------------------------------------------------------------------


def read_golden(path: Path) -> Arrays:
    """All arrays of an ``.npz``; nothing is unpickled.

    Raises:
        ConfigError: not such a file, or the arrays disagree about the number of inputs.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            golden = {name: np.asarray(archive[name]) for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error})", "expected an .npz of plain arrays", "check the file"
        ) from error
    missing = [name for name in ("crops", names.KP_SOURCE, names.KP_DRIVING) if name not in golden]
    if missing:
        raise ConfigError(
            f"{path} has no {', '.join(missing)}; it has {', '.join(golden)}",
            "expected the inputs crops, kp_source and kp_driving",
            "name a file of network outputs",
        )
    for name in ("eye_ratio", "lip_ratio"):  # one for all inputs, or one each
        if name in golden and golden[name].ndim == 1:
            golden[name] = np.tile(golden[name], (len(golden["crops"]), 1))
    counts = {name: len(array) if array.ndim else 0 for name, array in golden.items()}
    if len(set(counts.values())) != 1 or not counts["crops"]:
        raise ConfigError(
            f"{path} has arrays for {counts} inputs",
            "expected one number above 0 on axis 0",
            "check the file",
        )
    return golden


def stride_of(full: int, stored: int) -> int:
    """The stride by which ``stored`` of ``full`` elements were taken, starting with the first.

    Raises:
        ConfigError: no stride gives that number, or several do and none divides evenly.
    """
    fits = [step for step in range(1, full + 1) if -(-full // step) == stored]
    if stored and full % stored == 0:
        return full // stored
    if len(fits) != 1:
        raise ConfigError(
            f"{stored} of {full} elements", f"strides that fit: {fits or 'none'}", "sub-sample by a divisor"
        )
    return fits[0]


def sampled(name: str, full: npt.NDArray[Any], stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``full`` as the file's array was taken from it; axes of length 1 may be missing there.

    Raises:
        ConfigError: the shapes do not belong together.
    """
    if full.ndim != stored.ndim:
        if math.prod(full.shape[1:]) == math.prod(stored.shape[1:]):  # [N, 63] and [N, 21, 3]
            return full.reshape(stored.shape)
        full = full.reshape(len(full), *(size for size in full.shape[1:] if size != 1))
    try:
        pairs = zip(full.shape[1:], stored.shape[1:], strict=True)
        steps = [slice(None, None, stride_of(a, b)) for a, b in pairs]
    except ValueError as error:
        raise ConfigError(
            f"{name} has the shape {stored.shape}", f"the graph gives {full.shape}", "check file and bundle"
        ) from error
    except ConfigError as error:
        raise ConfigError(
            f"{name} {stored.shape} in the file is no regular part of {full.shape} ({error})",
            "expected every n-th element of each axis",
            "check file and bundle",
        ) from error
    return full[(slice(None), *steps)]


def difference(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    worst = float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())
    return math.inf if math.isnan(worst) else worst


def item(name: str, error: float, tolerance: float, **more: Any) -> Item:
    """One line of the report."""
    return {"item": name, "max_abs_error": error, "tolerance": tolerance, "ok": error <= tolerance, **more}


# -- networks ----------------------------------------------------------------------------------------


def limit(network: str, precision: str, tensor: str) -> float:
    """Tolerance of an output."""
    if precision == "fp32":
        return FP32["motion" if network == names.MOTION else tensor]
    from lp_edge.export.liveportrait.parity import TOLERANCES

    return TOLERANCES["fp16"][network]["degrees_max" if tensor in ANGLES else f"{tensor}_max"]


def parts(golden: Arrays, batch: int) -> Iterator[slice]:
    """Inputs that go through a graph together."""
    for start in range(0, len(golden["crops"]), batch):
        yield slice(start, start + batch)


def run(runner: Runner, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Outputs on the host; float16 becomes float32."""
    out = {name: to_host(array) for name, array in runner.infer(feeds).items()}
    return {name: a.astype(np.float32) if a.dtype == np.float16 else a for name, a in out.items()}


def check_motion(bundle: Bundle, golden: Arrays, config: BackendConfig, batch: int) -> Iterator[Item]:
    """M: angles in degrees (the file has logits), everything else as it is."""
    outputs = (*ANGLES, names.T, names.EXP, names.SCALE, names.KP)
    wanted = [name for name in outputs if f"motion_{name}" in golden]
    if not wanted:
        return
    precision = bundle.network(names.MOTION).precision
    worst = dict.fromkeys(wanted, 0.0)
    with bundle.runner(names.MOTION, config) as runner:
        for part in parts(golden, batch):
            got = run(runner, {names.IMAGE: golden["crops"][part]})
            for name in wanted:
                want = golden[f"motion_{name}"][part]
                want = degrees_from_logits(want)[:, None] if name in ANGLES else want
                worst[name] = max(worst[name], difference(sampled(f"motion_{name}", got[name], want), want))
    for name in wanted:
        unit = {"unit": "degrees"} if name in ANGLES else {}
        yield item(
            f"motion_{name}", worst[name], limit(names.MOTION, precision, name), precision=precision, **unit
        )


def check_perceptrons(bundle: Bundle, golden: Arrays, config: BackendConfig) -> Iterator[Item]:
    """S, R_eye and R_lip."""
    flat = golden[names.KP_SOURCE].reshape(len(golden["crops"]), -1)
    for name, (network, beside) in PERCEPTRONS.items():
        if name not in golden or beside not in golden:
            continue
        extra = golden[beside].reshape(len(flat), -1)
        features = np.concatenate((flat, extra), axis=1).astype(np.float32)
        with bundle.runner(network, config) as runner:
            got = run(runner, {names.FEATURES: features})[names.DELTA]
        error = difference(sampled(name, got, golden[name]), golden[name])
        precision = bundle.network(network).precision
        yield item(name, error, limit(network, precision, names.DELTA), precision=precision)


def cut(graph: Path, tensors: Iterable[str]) -> tuple[bytes, set[str]]:
    """The part of a graph that makes the named tensors, as a model that returns them; and the operators in it.

    Raises:
        BundleError: the graph has no tensor of that name.
    """
    import onnx

    model = onnx.load(graph)
    body = model.graph
    wanted = list(tensors)
    made = {name for node in body.node for name in node.output}
    if missing := [name for name in wanted if name not in made]:
        raise BundleError(
            f"{graph} has no tensor {', '.join(missing)}",
            f"expected the intermediates {', '.join(wanted)} by these names",
            "export the bundle again with this version of lp-export",
        )
    needed, kept = set(wanted), []
    for node in reversed(body.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    weights = [tensor for tensor in body.initializer if tensor.name in needed]
    inputs = [value for value in body.input if value.name in needed]
    for field, values in (
        (body.node, kept[::-1]),
        (body.initializer, weights),
        (body.input, inputs),
        (body.output, [onnx.ValueInfoProto(name=name) for name in wanted]),
    ):
        values = [value.__class__.FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(values)
    return model.SerializeToString(), {node.op_type for node in body.node}


def features_of(bundle: Bundle, golden: Arrays, config: BackendConfig, batch: int) -> list[Arrays]:
    """What F makes of the crops, part by part."""
    with bundle.runner(names.APPEARANCE, config) as runner:
        return [run(runner, {names.IMAGE: golden["crops"][part]}) for part in parts(golden, batch)]


def check_features(bundle: Bundle, golden: Arrays, features: list[Arrays], batch: int) -> Iterator[Item]:
    """F."""
    precision = bundle.network(names.APPEARANCE).precision
    worst = 0.0
    for part, made in zip(parts(golden, batch), features, strict=True):
        want = golden[names.FEATURE_3D][part]
        worst = max(worst, difference(sampled(names.FEATURE_3D, made[names.FEATURE_3D], want), want))
    yield item(
        names.FEATURE_3D, worst, limit(names.APPEARANCE, precision, names.FEATURE_3D), precision=precision
    )


def warp_feeds(runner: Runner, golden: Arrays, part: slice, made: Arrays) -> Arrays:
    """Inputs of ``warp_decode`` or of a part of it."""
    points = {name: golden[name][part].astype(np.float32) for name in (names.KP_SOURCE, names.KP_DRIVING)}
    return {name: array for name, array in {**made, **points}.items() if name in runner.inputs}


def check_warp(
    bundle: Bundle, golden: Arrays, config: BackendConfig, features: list[Arrays], batch: int
) -> Iterator[Item]:
    """W, inside the fused graph."""
    wanted = [name for name in INSIDE_WARP if name in golden]
    if not wanted:
        return
    entry = bundle.network(names.WARP_DECODE)
    model, operators = cut(bundle.path_of(names.WARP_DECODE), wanted)
    worst = dict.fromkeys(wanted, 0.0)
    with open_runner(model, config, name=f"W in {entry.file}") as runner:
        del model
        for part, made in zip(parts(golden, batch), features, strict=True):
            got = run(runner, warp_feeds(runner, golden, part, made))
            for name in wanted:
                want = golden[name][part]
                worst[name] = max(worst[name], difference(sampled(name, got[name], want), want))
    for name in wanted:
        tolerance, more = limit(names.WARP_DECODE, entry.precision, name), {}
        if name == names.WARPED:
            # The dense-motion network samples by matrix products, so a GridSample is that of the last warp.
            more = {"warp": "folded" if "GridSample" in operators else "exact"}
            tolerance = max(tolerance, FOLDED_WARP) if more["warp"] == "folded" else tolerance
        yield item(name, worst[name], tolerance, precision=entry.precision, **more)


def check_image(
    bundle: Bundle, golden: Arrays, config: BackendConfig, features: list[Arrays], batch: int
) -> Iterator[Item]:
    """The picture: the file may have it as uint8, as floats, or both; floats are truncated as the graph does it."""
    wanted = [name for name in ("image_u8", "image") if name in golden]
    if not wanted:
        return
    precision = bundle.network(names.WARP_DECODE).precision
    worst, far, pixels, squares = ({name: 0.0 for name in wanted} for _ in range(4))
    with bundle.runner(names.WARP_DECODE, config) as runner:
        for part, made in zip(parts(golden, batch), features, strict=True):
            got = run(runner, warp_feeds(runner, golden, part, made))[names.IMAGE]
            for name in wanted:
                want, mine, colour = golden[name][part], got, -1
                if name == "image":
                    want, mine, colour = (
                        np.clip(want * 255.0, 0, 255).astype(np.uint8),
                        got.transpose(0, 3, 1, 2),
                        1,
                    )
                apart = np.abs(sampled(name, mine, want).astype(np.int32) - want.astype(np.int32))
                spots = apart.max(axis=colour)  # a pixel is as far off as its worst colour
                worst[name] = max(worst[name], float(spots.max()))
                far[name] += int((spots > MANY).sum())
                pixels[name] += spots.size
                squares[name] += float((apart**2).mean(axis=colour).sum())
    for name in wanted:
        if precision != "fp32":
            root = math.sqrt(squares[name] / pixels[name])
            psnr = 20 * math.log10(255 / root) if root else math.inf
            more = {"unit": f"levels of 255, root mean square; {PSNR_DB:g} dB", "psnr_db": psnr}
            yield item(f"{name}_psnr", root, 255 / 10 ** (PSNR_DB / 20), precision=precision, **more)
        else:
            yield item(f"{name}_max", worst[name], LEVELS, precision=precision, unit="levels of 255")
            share = far[name] / pixels[name]
            unit = f"share of pixels more than {MANY:g} level off"
            yield item(f"{name}_share", share, FEW, precision=precision, unit=unit)


def network_items(path: Path, bundle: Bundle, config: BackendConfig, batch: int) -> Iterator[Item]:
    """All items of a golden file of network outputs.

    Raises:
        ConfigError: the file is unusable, or has no output that is known here.
    """
    golden = read_golden(path)
    count = 0
    for found in (
        check_motion(bundle, golden, config, batch),
        check_perceptrons(bundle, golden, config),
        check_graphs(bundle, golden, config, batch),
    ):
        for line in found:
            count += 1
            yield {**line, "inputs": len(golden["crops"])}
    if not count:
        raise ConfigError(
            f"{path} has no output to compare; it has {', '.join(golden)}",
            "expected such as feature_3d, warped, image_u8, motion_pitch, stitching",
            "name a file of network outputs",
        )


def check_graphs(bundle: Bundle, golden: Arrays, config: BackendConfig, batch: int) -> Iterator[Item]:
    """F, W and G: one after another, so that only one of the large graphs is in memory."""
    outputs = {names.FEATURE_3D, *INSIDE_WARP, "image", "image_u8"}
    if not outputs & golden.keys():
        return
    features = features_of(bundle, golden, config, batch)
    if names.FEATURE_3D in golden:
        yield from check_features(bundle, golden, features, batch)
    yield from check_warp(bundle, golden, config, features, batch)
    yield from check_image(bundle, golden, config, features, batch)


# -- commands ----------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def report(lines: Iterable[Item]) -> int:
    """Print the lines as they come; 1 when one is not ok."""
    failed, count = [], 0
    for line in lines:
        count += 1
        print(json.dumps({key: plain(value) for key, value in line.items()}), flush=True)
        if not line.get("ok", "skipped" in line):
            failed.append(str(line["item"]))
    print(
        f"parity: {count - len(failed)} of {count} within tolerance"
        + (f"; above it: {', '.join(failed)}" if failed else ""),
        file=sys.stderr,
    )
    return 1 if failed or not count else 0


@contextlib.contextmanager
def said() -> Iterator[None]:
    """Errors of lp-edge as one line on stderr and their exit code."""
    try:
        yield
    except LpEdgeError as error:
        print(f"parity: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except ImportError as error:
        print(f"parity: {error}; install lp-edge[export]", file=sys.stderr)
        raise SystemExit(BackendUnavailable.exit_code) from error


FILE = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(help=__doc__)
def main() -> None:
    """Parse, compare, print."""


@main.command("networks")
@FILE
@click.option("--bundle", type=FOLDER, required=True, help="Bundle of the family liveportrait.")
@click.option("--backend", default="cpu", show_default=True, help="Where the graphs run.")
@click.option("--threads", default=0, show_default=True, help="Threads on the CPU; 0 = one per core.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Inputs per call.")
def networks_command(file: Path, bundle: Path, backend: str, threads: int, batch: int) -> None:
    """Graphs of a bundle against the outputs in FILE."""
    with said():
        opened = open_bundle(bundle)
        if opened.manifest.family != "liveportrait":
            raise BundleError(
                f"{bundle} is of the family {opened.manifest.family}",
                "expected liveportrait",
                "export one with lp-export --family liveportrait",
            )
        sys.exit(report(network_items(file, opened, BackendConfig(backend, threads=threads), batch)))


@main.command("motion")
@FILE
@click.option("--weights", type=FOLDER, help="Checkpoints that S and R are taken from.")
@click.option("--bundle", type=FOLDER, help="Bundle that S and R are taken from.")
def motion_command(file: Path, weights: Path | None, bundle: Path | None) -> None:
    """Composition of motion against the keypoints in FILE.

    The checkpoints need not be the official ones: what they compute is compared with the file.
    """
    if (weights is None) == (bundle is None):
        raise click.UsageError("give either --weights or --bundle")
    from _parity_motion import motion_items

    with said():
        sys.exit(report(motion_items(file, weights=weights, bundle=bundle, allow_unverified=True)))


if __name__ == "__main__":
    main()
