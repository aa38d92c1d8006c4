"""Quantising a bundle from the command line: a toy decoder with real sampling, calibrated on clips of toy faces."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch", reason="the export extra (torch) is not installed")
onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")

import lp_edge
from lp_edge import cli
from lp_edge.engines import cuda, names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import BundleWriter, CheckpointEntry, open_bundle, save_manifest
from lp_edge.engines.cuda import open_cuda
from lp_edge.errors import ConfigError, ExportError, MediaError, NoFaceError
from lp_edge.export.inventory import UNVERIFIED
from lp_edge.export.liveportrait import parity
from lp_edge.export.onnx_export import export_onnx, serialise
from lp_edge.export.quantize import build as quantize
from lp_edge.export.quantize import calibrate, frames, quality
from lp_edge.export.quantize.build import QuantizeConfig, export_quantised, quantise
from lp_edge.export.quantize.calibrate import Laboratory, by_cost, least_float, no_tick
from lp_edge.export.quantize.graph import convolutions, inputs_of
from lp_edge.export.quantize.scales import INT8
from lp_edge.runtime.image import read_image, write_image
from lp_edge.runtime.media_write import open_writer
from lp_edge.tests.fake_cuda.device import H200, FakeCuda
from lp_edge.tests.fake_tensorrt.module import World, make_tensorrt

nn, F = torch.nn, torch.nn.functional


class Decoder(nn.Module):
    """Moves the toy feature by sampling it, masks it, and draws it with five convolutions."""

    def __init__(self, half: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.mask = nn.Conv2d(1, 1, 3, padding=1)
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(16, 3, 3, padding=1)
        self.dtype = torch.float16 if half else torch.float32
        if half:
            for conv in (self.first, *self.middle, self.last):
                conv.half()

    def forward(self, feature: Any, compressed: Any, source: Any, driving: Any) -> tuple[Any, ...]:
        shift = (driving - source).mean(1)
        line = (torch.arange(64, dtype=torch.float32) + 0.5) / 32 - 1
        x = line.reshape(1, 1, 64) + shift[:, 0, None, None]
        y = line.reshape(1, 64, 1) + shift[:, 1, None, None]
        deformation = torch.stack((x + y * 0, y + x * 0), -1)
        occlusion = torch.sigmoid(self.mask(compressed[:, :, 0] / 255) + shift[:, 2, None, None, None])
        feature = feature[:, :, 0] / 255 + 0 * shift[:, 0, None, None, None]
        warped = F.grid_sample(feature, deformation, align_corners=False) * occlusion
        a = F.relu(self.first(warped.to(self.dtype)))
        for conv in self.middle:
            a = a + F.relu(conv(a))
        image = torch.sigmoid(self.last(a).float() * 4)
        image = F.interpolate(image, scale_factor=8.0).permute(0, 2, 3, 1)
        return torch.floor(image * 255).to(torch.uint8), deformation, occlusion


def decoder(half: bool = False, opset: int = 17) -> Any:
    one, batch = {0: "sources"}, {0: "batch"}
    return export_onnx(
        Decoder(half),
        {
            names.FEATURE_3D: torch.zeros(1, 3, 1, 64, 64),
            names.FEATURE_COMPRESSED: torch.zeros(1, 1, 1, 64, 64),
            names.KP_SOURCE: torch.zeros(2, 21, 3),
            names.KP_DRIVING: torch.zeros(2, 21, 3),
        },
        {names.IMAGE: ("batch", 512, 512, 3)},
        {
            names.FEATURE_3D: one,
            names.FEATURE_COMPRESSED: one,
            names.KP_SOURCE: batch,
            names.KP_DRIVING: batch,
        },
        opset,
        keep=(names.DEFORMATION, names.OCCLUSION_MAP),
    )


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    return {"fp32": decoder(), "fp16": decoder(half=True), "tensorrt8": decoder(opset=16)}


@pytest.fixture
def bundles(liveportrait_bundle: Path, tmp_path: Path, graphs: dict[str, Any]) -> dict[str, Path]:
    """Toy bundles whose decoder has convolutions: fp32, fp16, and fp32 of the flavour tensorrt8."""
    toy = open_bundle(liveportrait_bundle)
    made = {}
    for name, graph in graphs.items():
        made[name] = tmp_path / name
        m = toy.manifest
        with BundleWriter(
            made[name], family=m.family, variant=m.variant, licence=m.licence, created_by="tests",
            keypoints=m.keypoints, normalisation=m.normalisation, sizes=m.sizes,
            checkpoints=[CheckpointEntry("x.pth", "0" * 64, UNVERIFIED)],
        ) as writer:  # fmt: skip
            for network, entry in m.networks.items():
                same = network != names.WARP_DECODE
                writer.add_network(
                    network, toy.path_of(network) if same else serialise(graph),
                    precision=entry.precision if same or name == "tensorrt8" else name,
                    opset=entry.opset if same else graph.opset_import[0].version, parity=entry.parity,
                )  # fmt: skip
            for table in m.files:
                writer.add_table(table, toy.load_table(table))
    return made


def picture(x: int | None = 100, brightness: int = 255) -> np.ndarray:
    """A "face" for the toys: a bright square around (x, 100); None = no face."""
    out = np.zeros((200, 240, 3), np.uint8)
    if x is not None:
        out[60:140, x - 40 : x + 40] = (brightness, 210, 230)
    return out


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Two source pictures, a clip of 24 frames, and a file that is neither."""
    folder = tmp_path / "faces"
    folder.mkdir()
    write_image(folder / "a.png", picture(110))
    write_image(folder / "b.png", picture(130, 250))
    clip(folder / "c.mp4", [90 + 2 * i for i in range(24)])
    (folder / "notes.txt").write_text("not a picture")
    return folder


def clip(path: Path, xs: list[int | None]) -> Path:
    with open_writer(path, (240, 200), Fraction(25)) as writer:
        for x in xs:
            writer.write(picture(x))
    return path


QUICK: dict[str, Any] = {"calibration_frames": 3, "held_out_frames": 2}


def export(*args: object) -> Result:
    return CliRunner().invoke(cli.export, [str(arg) for arg in args])


# -- from the command line ------------------------------------------------------------------------------


def test_an_int8_bundle_with_its_report(bundles: dict[str, Path], faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "eight"
    result = export(
        "--quantize", bundles["fp32"], "--precision", "int8", "--calibration", faces, "-o", out,
        "--calibration-frames", 4, "--held-out-frames", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith(
        f"{out}: bundle of the family liveportrait, quantised in"
    )
    assert "the weights are not the official ones" in result.stderr
    bundle = open_bundle(out)
    entry = bundle.network(names.WARP_DECODE)
    assert (entry.precision, entry.opset) == ("int8", 17)
    report = json.loads(bundle.path_of_file("quality").read_text())
    assert report["good"] and report["weights_official"] is False and report["rest"] == "fp32"
    assert report["convolutions"]["quantised"] == ["/middle.0/Conv", "/middle.1/Conv", "/middle.2/Conv"]
    assert set(report["convolutions"]["float"]) == {"/first/Conv", "/last/Conv"}, "the mask's is no candidate"
    for part in ("network", "end_to_end"):
        assert 35 <= report[part]["psnr_db_worst"] <= report[part]["psnr_db_mean"] < 100
        assert len(report[part]["frames"]) == 3 and 0 < report[part]["ssim_worst"] <= 1
        assert report[part]["frames"][report[part]["worst_frame"]]["psnr_db"] == report[part]["psnr_db_worst"]
    assert entry.parity["image_psnr_db"] == report["network"]["psnr_db_worst"]
    held = {frame["where"] for frame in report["network"]["frames"]}
    assert not held & set(report["calibration_frames"]) and len(report["calibration_frames"]) == 4
    pair = [read_image(bundle.path_of_file(f"worst_{name}")) for name in ("quantised", "reference")]
    got = quality.compare(pair[0], pair[1])
    assert got.psnr_db == pytest.approx(report["network"]["psnr_db_worst"])
    page = bundle.path_of_file("quality_page").read_text()
    assert f"{got.psnr_db:.2f} dB" in page and "not the official ones" in page
    base = open_bundle(bundles["fp32"])
    for name, other in base.manifest.networks.items():
        if name != names.WARP_DECODE:
            assert bundle.network(name) == other
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_the_same_files_give_the_same_bundle(bundles: dict[str, Path], faces: Path, tmp_path: Path) -> None:
    manifests = []
    for name in ("one", "two"):
        quantise(bundles["fp32"], tmp_path / name, config=QuantizeConfig(**QUICK), calibration=[faces])
        manifests.append((tmp_path / name / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(
    ("base", "precision", "opset"),
    [("tensorrt8", "int8", 16), ("fp16", "int8", 19), ("fp32", "fp8", 19), ("fp16", "fp8", 19)],
)
def test_flavours_and_types(
    bundles: dict[str, Path], faces: Path, tmp_path: Path, base: str, precision: str, opset: int
) -> None:
    reference = ("--reference", bundles["fp32"]) if base == "fp16" else ()
    result = export(
        "--quantize", bundles[base], "--precision", precision, "--calibration", faces, "-o", tmp_path / "out",
        "--calibration-frames", 3, "--held-out-frames", 2, "--min-psnr", 20, "--json", *reference,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    row = next(row for row in told["networks"] if row["name"] == names.WARP_DECODE)
    assert (row["precision"], row["opset"]) == (precision, opset)
    bundle = open_bundle(tmp_path / "out")
    assert bundle.network(names.WARP_DECODE).precision == precision
    stored = {
        t.data_type
        for t in onnx.load(bundle.path_of(names.WARP_DECODE)).graph.initializer
        if len(t.dims) == 4
    }
    eight = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[precision]
    assert (eight in stored) == (opset == 19), "TensorRT 8 wants its weights in float32"


@pytest.mark.parametrize(("base", "version"), [("tensorrt8", "8.5"), ("fp32", "8.6"), ("fp32", "10.3")])
def test_engines_of_what_was_quantised(
    bundles: dict[str, Path],
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    version: str,
) -> None:
    """The graph passes the builder of its TensorRT, weakly and strongly typed, and computes there what it computes here."""
    world = World(FakeCuda(H200))
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(version, world))
    monkeypatch.setattr(cuda, "open_cuda", lambda index=0: open_cuda(index, runtime=world.cuda))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    args = ("--quantize", bundles[base], "--calibration", faces, "-o", tmp_path / "out", "--calibration-frames", 3,
            "--held-out-frames", 2, "--engines", "--max-batch", 2)  # fmt: skip
    result = export(*args)
    assert result.exit_code == 0, result.output
    bundle = open_bundle(tmp_path / "out")
    engine = next(e for e in bundle.manifest.engines if e.network == names.WARP_DECODE)
    assert engine.built_for.precision == "int8"
    built = next(b for b in world.builds if names.KP_DRIVING in b.profile)
    assert built.typed == (version == "10.3") and ("INT8" in built.flags) == (not built.typed)
    rng = np.random.default_rng(2)
    feeds = {
        spec.name: rng.normal(
            0, 0.2, [2 if a == "batch" else 1 if a == "sources" else int(a) for a in spec.shape]
        )
        for spec in bundle.network(names.WARP_DECODE).inputs
    }
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    images = []
    for backend in (
        BackendConfig("tensorrt", provider_options={"max_batch": "2"}), BackendConfig("cpu")
    ):  # fmt: skip
        with bundle.runner(names.WARP_DECODE, backend) as runner:
            images.append(np.asarray(runner.infer(feeds)[names.IMAGE]).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
    world.verify()


def test_without_a_gpu_nothing_is_begun(
    bundles: dict[str, Path], faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = export(
        "--quantize", bundles["fp32"], "--calibration", faces, "-o", tmp_path / "out", "--engines"
    )
    assert result.exit_code == 7 and not (tmp_path / "out").exists()


def test_below_the_bound_nothing_is_written_but_the_report(
    bundles: dict[str, Path], faces: Path, tmp_path: Path
) -> None:
    args = ("--quantize", bundles["fp32"], "--calibration", faces, "-o", tmp_path / "out", "--keep-float", 0,
            "--calibration-frames", 3, "--held-out-frames", 2, "--min-psnr", 90)  # fmt: skip
    result = export(*args)
    assert result.exit_code == 9 and not (tmp_path / "out").exists()
    assert "expected 90 dB" in result.stderr and "--accept-quality" in result.stderr
    report = json.loads((tmp_path / "out.quality" / "quality.json").read_text())
    assert report["good"] is False and report["verdict"] == "NOT reached"
    assert (tmp_path / "out.quality" / "worst_quantised.png").is_file()
    accepted = export(*args, "--accept-quality")
    assert accepted.exit_code == 0 and "below 90" in accepted.stderr
    verdict = json.loads(open_bundle(tmp_path / "out").path_of_file("quality").read_text())["verdict"]
    assert verdict == "NOT reached, accepted all the same"


def test_a_fixed_number_stays_in_floating_point(
    bundles: dict[str, Path], faces: Path, tmp_path: Path
) -> None:
    psnr = []
    for number in (0, 2):
        config = QuantizeConfig(**QUICK, keep_float=number, min_psnr=0.0)
        quantise(bundles["fp32"], tmp_path / str(number), config=config, calibration=[faces])
        report = json.loads((tmp_path / str(number) / "quality.json").read_text())
        assert len(report["convolutions"]["quantised"]) == 3 - number
        assert len(report["convolutions"]["float"]) == 2 + number
        psnr.append(report["network"]["psnr_db_mean"])
    assert psnr[1] > psnr[0]
    reasons = [
        why for why in report["convolutions"]["float"].values() if why.startswith("alone it costs most")
    ]
    assert len(reasons) == 2


def test_too_many_in_floating_point_are_refused_before_the_calibration(
    bundles: dict[str, Path], faces: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = QuantizeConfig(**QUICK, keep_float=3)
    with pytest.raises(ConfigError, match="keep_float is 3 of 3") as refused:
        quantise(bundles["fp32"], tmp_path / "x", config=config, calibration=[faces], report=lines.append)
    assert lines == [] and "--keep-float 2" in refused.value.remedy
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".quantise-*"))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("fp16", "is the bundle of --quantize"),
        ("link", "is the bundle of --quantize"),
        ("fp32", "is the bundle of --reference"),
        ("fp32/deeper", "lies in the bundle of --reference"),
        (".", "holds the bundle of --quantize"),
    ],
)
def test_a_bundle_that_is_read_is_never_written_over(
    output: str,
    words: str,
    bundles: dict[str, Path],
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "link").symlink_to(bundles["fp16"])
    monkeypatch.setattr(quantize, "plan", None)  # no work is begun
    before = {name: (folder / "manifest.json").read_bytes() for name, folder in bundles.items()}
    args = ("--quantize", bundles["fp16"], "--reference", bundles["fp32"], "--calibration", faces)
    refused = export(*args, "-o", tmp_path / output)
    assert refused.exit_code == 2 and words in refused.stderr and "--output" in refused.stderr
    assert {name: (folder / "manifest.json").read_bytes() for name, folder in bundles.items()} == before


def test_as_few_as_the_bound_needs(bundles: dict[str, Path], faces: Path, tmp_path: Path) -> None:
    all_eight = QuantizeConfig(**QUICK, keep_float=0, accept_quality=True)
    quantise(bundles["fp32"], tmp_path / "all", config=all_eight, calibration=[faces])
    reached = json.loads((tmp_path / "all" / "quality.json").read_text())["network"]["psnr_db_worst"]
    lines: list[str] = []
    config = QuantizeConfig(**QUICK, min_psnr=reached + 1.5)
    quantise(bundles["fp32"], tmp_path / "some", config=config, calibration=[faces], report=lines.append)
    report = json.loads((tmp_path / "some" / "quality.json").read_text())
    assert report["good"] and 1 <= len(report["convolutions"]["quantised"]) <= 2
    assert any("stay in floating point" in line for line in lines)


def test_an_interrupted_run_leaves_the_older_bundle(
    bundles: dict[str, Path], faces: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles["fp32"], tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    left = sorted(p.name for p in tmp_path.iterdir())

    def stop(stage: str, done: int, whole: int) -> None:
        if stage == "end to end":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(
            bundles["fp32"], tmp_path / "out", config=QuantizeConfig(**QUICK), calibration=[faces], tick=stop
        )
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == left


# -- from weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_an_export_makes_what_it_needs_and_leaves_the_result_alone(
    bundles: dict[str, Path], faces: Path, tmp_path: Path, half: bool
) -> None:
    made: list[str] = []

    def build_bundle(output: Path, *, precision: str, variant: str, report: Any) -> None:
        made.append(precision)
        assert variant == "human"
        shutil.copytree(bundles[precision], output)

    result = export_quantised(
        tmp_path / "new" / "out", config=QuantizeConfig(**QUICK, min_psnr=20), calibration=[faces], half=half,
        build_bundle=build_bundle, variant="human",
    )  # fmt: skip
    assert made == (["fp32", "fp16"] if half else ["fp32"])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]
    report = json.loads((tmp_path / "new" / "out" / "quality.json").read_text())
    assert (report["rest"], result.networks[0].name) == (
        "fp16" if half else "fp32",
        next(iter(open_bundle(bundles["fp32"]).manifest.networks)),
    )


def test_the_command_hands_everything_on(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Path, dict[str, Any]]] = []

    def exported(output: Path, **options: Any) -> Any:
        calls.append((output, options))
        return SimpleNamespace(as_dict=lambda: {"networks": [], "seconds": 1.0})

    monkeypatch.setattr(quantize, "export_quantised", exported)
    monkeypatch.chdir(tmp_path)
    result = export(
        "--family", "liveportrait", "--weights", "w", "--precision", "int8", "--fp16", "--calibration", faces,
        "--calibration", faces / "a.png", "--calibration-method", "max", "--calibration-frames", 5,
        "--held-out-frames", 6, "--keep-float", 7, "--min-psnr", 40, "--accept-quality", "--variant", "animal",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((output, options),) = calls
    assert output == Path("liveportrait-animal-int8-fp16")
    assert options["config"] == QuantizeConfig("int8", "max", 5, 6, 7, 40.0, True)
    assert options["calibration"] == (faces, faces / "a.png") and options["half"] is True
    assert (options["weights"], options["variant"], options["flavor"]) == (Path("w"), "animal", "main")
    assert export("--family", "liveportrait", "--precision", "fp8", "--calibration", faces).exit_code == 0
    assert calls[1][0] == Path("liveportrait-human-fp8") and calls[1][1]["config"].precision == "fp8"


# -- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--family", "liveportrait", "--precision", "int8"), "int8 without --calibration"),
        (("--quantize", "b"), "int8 without --calibration"),
        (("--quantize", "b", "--precision", "fp16", "--calibration", "."), "--quantize with --precision fp16"),
        (("--quantize", "b", "--fp16", "--calibration", "."), "fp32 one of the same weights as --reference"),
        (("--quantize", "b", "--verify", "b"), "--verify together with --quantize"),
        (("--family", "liveportrait", "--precision", "fp32", "--fp16"), "--precision fp32 together with --fp16"),
        (("--family", "liveportrait", "--keep-float", 2), "--keep-float without 8 bits"),
        (("--family", "liveportrait", "--calibration", "."), "--calibration without 8 bits"),
        (("--family", "mesh", "--precision", "int8"), "--precision means nothing with --family mesh"),
        (("--quantize", "b", "--calibration", ".", "--held-out-frames", 0), "'--held-out-frames': 0 is not"),
        (("--quantize", "b", "--calibration", ".", "--min-psnr", 200), "'--min-psnr': 200.0 is not"),
        (("--quantize", "b", "--calibration", ".", "--keep-float", -1), "'--keep-float': -1 is not"),
        (("--quantize", "b", "--calibration", ".", "--precision", "fp8", "--calibration-method", "entropy"), "entropy with fp8"),
        (("--family", "liveportrait", "--precision", "fp8", "--flavor", "tensorrt8", "--calibration", "."), "or take int8 with fp32"),
        (("--family", "liveportrait", "--precision", "int8", "--fp16", "--flavor", "tensorrt8", "--calibration", "."), "int8 with fp16 in the flavour"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    args: tuple[object, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and "to fix it" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bundles_that_cannot_be_quantised(
    bundles: dict[str, Path], toy_bundle: Path, faces: Path, tmp_path: Path
) -> None:
    def code(*args: object) -> tuple[int, str]:
        result = export(*args, "--calibration", faces, "-o", tmp_path / "out")
        return result.exit_code, result.stderr

    assert code("--quantize", toy_bundle)[0] == 5
    assert "no fp32 bundle to compare with" in code("--quantize", bundles["fp16"])[1]
    assert "fp8 in the flavour tensorrt8" in code("--quantize", bundles["tensorrt8"], "--precision", "fp8")[1]
    other = open_bundle(bundles["fp32"])
    changed = dataclasses.replace(
        other.manifest, checkpoints=(CheckpointEntry("x.pth", "1" * 64, UNVERIFIED),)
    )
    save_manifest(bundles["fp32"] / "manifest.json", changed)
    assert "come from other weights" in code("--quantize", bundles["fp16"], "--reference", bundles["fp32"])[1]
    assert not (tmp_path / "out").exists()


# -- frames ---------------------------------------------------------------------------------------------


def test_the_plan_parts_clips_and_pairs_every_source(faces: Path) -> None:
    pairs = frames.plan([faces], 8, 4)
    assert [(p.source.name, p.clip.name) for p in pairs] == [("a.png", "c.mp4"), ("b.png", "c.mp4")]
    for pair in pairs:
        assert len(pair.calibration) == 4 and len(pair.held_out) == 2
        assert max(pair.calibration) < 18 <= min(pair.held_out) and max(pair.held_out) < 24
    assert pairs == frames.plan([faces], 8, 4)
    alone = frames.plan([faces / "c.mp4"], 1, 1)
    assert [(p.source.name, p.calibration, p.held_out) for p in alone] == [("c.mp4", (9,), (21,))]


@pytest.mark.parametrize("length", [2, 3, 5, 7, 24, 198])
def test_no_frame_is_judged_that_was_calibrated_on(
    length: int, faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "_length", lambda clip: length)
    for calibration, held_out in ((1, 1), (16, 8), (1000, 1000)):
        for pair in frames.plan([faces / "c.mp4"], calibration, held_out):
            assert pair.calibration and pair.held_out
            assert max(pair.calibration) < min(pair.held_out) and max(pair.held_out) < length


def test_a_clip_of_one_frame_cannot_be_both(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one frame"):
        frames.plan([faces / "a.png", clip(tmp_path / "one.mp4", [None])], 1, 1)


def test_files_that_cannot_calibrate(faces: Path, tmp_path: Path, bundles: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="no driving clip"):
        frames.plan([faces / "a.png"], 1, 1)
    with pytest.raises(MediaError):
        frames.plan([faces / "notes.txt"], 1, 1)
    with pytest.raises(ConfigError, match="0 calibration frames"):
        frames.plan([faces], 0, 1)
    empty = clip(tmp_path / "empty.mp4", [None] * 12)
    bundle = open_bundle(bundles["fp32"])
    with pytest.raises(NoFaceError, match="no face in any calibration frame"):
        list(frames.shots(bundle, frames.plan([faces / "a.png", empty], 2, 1), "calibration", draw=False))


def test_shots_are_what_the_decoder_is_fed(faces: Path, bundles: dict[str, Path]) -> None:
    bundle = open_bundle(bundles["fp32"])
    pairs = frames.plan([faces], 4, 2)
    fed = list(frames.shots(bundle, pairs, "held-out", draw=False))
    drawn = list(frames.shots(bundle, pairs, "held-out", draw=True))
    assert [s.where for s in fed] == [s.where for s in drawn] and len(fed) == 2
    for a, b in zip(fed, drawn, strict=True):
        assert all(np.array_equal(a.feeds[name], b.feeds[name]) for name in a.feeds)
        assert not a.image.any() and b.image.any() and b.frame.shape == (200, 240, 3)
        assert not np.array_equal(a.feeds[names.KP_SOURCE], a.feeds[names.KP_DRIVING]), "the face moved"
        with Laboratory(bundle.path_of(names.WARP_DECODE)) as laboratory:
            (image,) = laboratory.images(laboratory.model, [b.feeds])
        assert np.array_equal(image, b.image)


def test_activations_are_the_largest_over_all_frames(faces: Path, bundles: dict[str, Path]) -> None:
    bundle = open_bundle(bundles["fp32"])
    feeds = [s.feeds for s in frames.shots(bundle, frames.plan([faces], 3, 1), "calibration", draw=False)]
    with Laboratory(bundle.path_of(names.WARP_DECODE)) as laboratory:
        tensors = inputs_of(laboratory.model, convolutions(laboratory.model))
        both = laboratory.activations(tensors, feeds, no_tick)
        each = [laboratory.activations(tensors, [feed], no_tick) for feed in feeds]
        folder = laboratory.folder
    assert len(tensors) == 3 and not folder.exists()
    for name in tensors:
        assert both.peaks[name] == max(a.peaks[name] for a in each) > 0
        assert np.array_equal(both.samples[name], np.concatenate([a.samples[name] for a in each]))
        assert both.samples[name].max() <= both.peaks[name]
    assert both.thresholds("max", INT8) == dict(both.peaks)


def test_many_frames_give_fewer_samples_each(
    faces: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_WHOLE_FRAMES", 1)
    bundle = open_bundle(bundles["fp32"])
    feeds = [s.feeds for s in frames.shots(bundle, frames.plan([faces], 4, 1), "calibration", draw=False)]
    with Laboratory(bundle.path_of(names.WARP_DECODE)) as laboratory:
        tensors = inputs_of(laboratory.model, convolutions(laboratory.model))
        few = laboratory.activations(tensors, feeds, no_tick)
        each = [laboratory.activations(tensors, [feed], no_tick) for feed in feeds]
    assert len(feeds) > 1
    step = len(feeds) | 1
    for name in tensors:
        assert few.peaks[name] == max(a.peaks[name] for a in each)
        assert np.array_equal(few.samples[name], np.concatenate([a.samples[name][::step] for a in each]))


# -- choosing -------------------------------------------------------------------------------------------


def test_the_worst_stay_in_floating_point() -> None:
    """Costs add up as noise does: 10^(-dB/10) each."""
    noise = {"a": 1e-4, "b": 3e-3, "c": 1e-5, "d": 1e-3}

    def psnr(chosen: Any) -> float:
        return float(-10 * np.log10(sum(noise[name] for name in chosen) + 1e-12))

    ranked = [name for name, _ in by_cost(list(noise), psnr, no_tick)]
    assert ranked == ["b", "d", "a", "c"]
    assert least_float(ranked, 29.0, psnr) == ["b"]
    assert least_float(ranked, 35.0, psnr) == ["b", "d"]
    assert least_float(ranked, 45.0, psnr) == ["b", "d", "a"]
    with pytest.raises(ExportError, match="no choice of convolutions"):
        least_float(ranked, 80.0, psnr)


def test_verify_holds_the_islands_to_their_limits_and_leaves_the_picture_to_its_report() -> None:
    figures = {"deformation_max": 1e-5, "occlusion_map_max": 1e-4, "warped_max": 3.0, "image_psnr_db": 21.0}
    for precision in ("int8", "fp8"):
        assert parity.broken(names.WARP_DECODE, precision, figures, dict.fromkeys(figures, 1.0)) == {}
        moved = {**figures, "deformation_max": 1e-2}
        wrong = parity.broken(names.WARP_DECODE, precision, moved, dict.fromkeys(figures, 1.0))
        assert wrong == {"deformation_max": (1e-2, 1e-3)}


# -- figures --------------------------------------------------------------------------------------------


def test_figures_against_numbers_by_hand() -> None:
    black, grey = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 51, np.uint8)
    got = quality.compare(grey, black, "here")
    assert got.psnr_db == pytest.approx(20 * np.log10(5)) and (got.max_abs, got.where) == (51, "here")
    # without structure, SSIM is its luminance term alone
    assert got.ssim == pytest.approx((0.01 * 255) ** 2 / (51**2 + (0.01 * 255) ** 2), rel=1e-6)
    same = quality.compare(grey, grey)
    assert (same.psnr_db, same.ssim, same.max_abs) == (100.0, 1.0, 0)
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert quality.compare(255 - noise, noise).ssim < -0.5
    told = quality.summary([same, got, same])
    assert (told["worst_frame"], told["worst_where"], told["max_abs"]) == (1, "here", 51)


# -- the benchmark --------------------------------------------------------------------------------------


def test_the_benchmark_compares_methods(bundles: dict[str, Path], faces: Path) -> None:
    script = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "quantize.py"
    if not script.is_file():
        pytest.skip("no source tree: benchmarks are not installed")
    command = [sys.executable, str(script), "--bundle", str(bundles["fp32"]), "--calibration", str(faces)]
    command += ["--frames", "3", "--held-out", "2", "--sensitivity"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    rows = {(row["type"], row["method"]): row for row in told["results"]}
    assert len(rows) == 7 and ("fp8", "entropy") not in rows
    assert all(20 < row["psnr_db_worst"] < 100 and len(row["frames"]) == 2 for row in rows.values())
    assert rows["int8", "max"]["mean_threshold_of_peak"] == pytest.approx(1.0)
    assert rows["int8", "percentile"]["mean_threshold_of_peak"] < 1.0
    assert len(told["int8_alone_db"]) == told["convolutions"] == 3
    assert min(told["int8_alone_db"].values()) > rows["int8", "mse"]["psnr_db_worst"] - 3
    refused = subprocess.run(
        [*command, "--frames", "0"], capture_output=True, text=True, check=False, timeout=60
    )
    assert refused.returncode == 2 and "0 calibration frames" in refused.stderr
