"""benchmarks/parity.py on graphs small enough to be computed here by hand, so that every line and exit code can be provoked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lp_edge
from lp_edge.engines.bundle import BundleWriter

onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")

SCRIPT = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "parity.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="no source tree: benchmarks are not installed")

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'
GRAPHS = {
    "appearance_feature_extractor": """
        g (uint8[batch,8,8,3] image) => (float[batch,3,2,8,8] feature_3d, float[batch,1,2,8,8] feature_compressed)
        <int64[1] two = {2}, float white = {255.0}> {
            f = Cast<to=1>(image)
            t = Transpose<perm=[0,3,1,2]>(f)
            x = Div(t, white)
            a = Unsqueeze(x, two)
            b = Neg(a)
            feature_3d = Concat<axis=2>(a, b)
            feature_compressed = ReduceMean<axes=[1]>(feature_3d)
        }""",
    "motion_extractor": """
        g (uint8[batch,8,8,3] image) => (float[batch,1] pitch, float[batch,1] yaw, float[batch,1] roll,
            float[batch,3] t, float[batch,2,3] exp, float[batch,1] scale, float[batch,2,3] kp)
        <float white = {255.0}, float forty = {40.0}, int64[2] flat = {-1,1}, float[2,3] six = {0,1,2,3,4,5}, int64[1] one = {1}> {
            f = Cast<to=1>(image)
            m = ReduceMean<axes=[1,2], keepdims=0>(f)
            t = Div(m, white)
            scale = ReduceMean<axes=[1]>(t)
            pitch = Mul(scale, forty)
            yaw = Neg(pitch)
            roll = Sub(pitch, forty)
            w = Unsqueeze(t, one)
            exp = Mul(w, six)
            kp = Add(w, six)
        }""",
    "warp_decode": """
        g (float[sources,3,2,8,8] feature_3d, float[sources,1,2,8,8] feature_compressed,
           float[batch,2,3] kp_source, float[batch,2,3] kp_driving) => (uint8[batch,8,8,3] image)
        <float white = {255.0}, int64[2] middle = {2,3}> {
            s = Sub(kp_source, kp_driving)
            m = ReduceMean<axes=[1]>(s)
            shift = Unsqueeze(m, middle)
            f = Transpose<perm=[0,2,3,4,1]>(feature_3d)
            deformation = Add(f, shift)
            c = ReduceMean<axes=[2], keepdims=0>(feature_compressed)
            occlusion_map = Sigmoid(c)
            d = ReduceMax<axes=[1], keepdims=0>(deformation)
            e = Transpose<perm=[0,3,1,2]>(d)
            warped = Mul(e, occlusion_map)
            n = Transpose<perm=[0,2,3,1]>(warped)
            w = Mul(n, white)
            zero = Constant<value_float=0.0>()
            l = Clip(w, zero, white)
            image = Cast<to=2>(l)
        }""",
    **{
        name: f"""
        g (float[batch,{size}] features) => (float[batch,2] delta)
        <int64[1] axis = {{1}}, float[2] scale = {{1.0, -2.0}}> {{
            s = ReduceSum(features, axis)
            delta = Mul(s, scale)
        }}"""
        for name, size in (("stitching", 12), ("retarget_eye", 9), ("retarget_lip", 8))
    },
}


def write_bundle(folder: Path, precision: str = "fp32", graphs: dict[str, str] | None = None) -> Path:
    with BundleWriter(
        folder,
        family="liveportrait",
        variant="toy",
        licence="Apache-2.0",
        created_by="lp-edge tests",
        keypoints=2,
        normalisation="none",
    ) as writer:
        for name, text in {**GRAPHS, **(graphs or {})}.items():
            model = onnx.parser.parse_model(HEAD + text)
            writer.add_network(name, model.SerializeToString(), precision=precision, opset=17)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("parity") / "bundle")


def logits(degrees: np.ndarray) -> np.ndarray:
    """Raw heads [N, 66] whose expectation is the angle: its two neighbouring bins, weighted."""
    place = (degrees + 97.5) / 3
    low = np.floor(place).astype(int)
    out = np.full((len(degrees), 66), -40.0)
    for i, (j, f) in enumerate(zip(low, place - low, strict=True)):
        out[i, j], out[i, j + 1] = np.log(1 - f), np.log(f)
    return out.astype(np.float32)


def golden(count: int = 3) -> dict[str, np.ndarray]:
    """What the toy graphs compute, sub-sampled by various strides."""
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    source, driving = (rng.normal(0, 0.1, (count, 2, 3)).astype(np.float32) for _ in range(2))
    eye, lip = rng.random((count, 3), np.float32), rng.random((count, 2), np.float32)
    x = crops.astype(np.float32).transpose(0, 3, 1, 2) / 255
    feature = np.stack((x, -x), axis=2)
    deformation = feature.transpose(0, 2, 3, 4, 1) + (source - driving).mean(1)[:, None, None, None]
    occlusion = 1 / (1 + np.exp(-feature.mean(1).mean(1)))
    warped = deformation.max(1).transpose(0, 3, 1, 2) * occlusion[:, None]
    image = np.clip(warped, 0, 1)
    mean = x.mean((2, 3))
    scale = mean.mean(1, keepdims=True)
    six = np.arange(6, dtype=np.float32).reshape(2, 3)

    def perceptron(extra: np.ndarray) -> np.ndarray:
        total = source.sum((1, 2)) + extra.reshape(count, -1).sum(1)
        return total[:, None] * np.array([1, -2], np.float32)

    return {
        "crops": crops,
        "kp_source": source,
        "kp_driving": driving,
        "eye_ratio": eye,
        "lip_ratio": lip,
        "motion_pitch": logits(40 * scale[:, 0]),
        "motion_yaw": logits(-40 * scale[:, 0]),
        "motion_roll": logits(40 * scale[:, 0] - 40),
        "motion_t": mean,
        "motion_exp": (mean[:, None] * six).reshape(count, 6),
        "motion_scale": scale,
        "motion_kp": (mean[:, None] + six).reshape(count, 6),
        "feature_3d": feature[:, :, :, ::4, ::2],
        "deformation": deformation[:, ::2, ::3, ::4],  # 3 of 8 = every third
        "occlusion_map": occlusion[:, ::2],
        "warped": warped[:, :, ::2, ::2],
        "image": image[:, :, ::4, ::4],
        "image_u8": (image * 255).astype(np.uint8).transpose(0, 2, 3, 1),
        "stitching": perceptron(driving),
        "eye": perceptron(eye),
        "lip": perceptron(lip),
    }


def run(*args: object, code: int = 0) -> tuple[dict[str, dict[str, Any]], str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["item"]: line for line in lines}, done.stderr


def compare(
    folder: Path, bundle: Path, arrays: dict[str, np.ndarray], code: int = 0, *more: object
) -> tuple[dict[str, dict[str, Any]], str]:
    path = folder / "golden.npz"
    np.savez(path, **arrays)
    return run("networks", path, "--bundle", bundle, *more, code=code)


ITEMS = {
    *(f"motion_{n}" for n in ("pitch", "yaw", "roll", "t", "exp", "scale", "kp")),
    *("stitching", "eye", "lip", "feature_3d", "deformation", "occlusion_map", "warped"),
    *("image_max", "image_share", "image_u8_max", "image_u8_share"),
}


def test_all_items_are_compared_and_hold(bundle: Path, tmp_path: Path) -> None:
    lines, said = compare(tmp_path, bundle, golden())
    assert lines.keys() == ITEMS
    assert all(line["ok"] and line["inputs"] == 3 for line in lines.values())
    assert {n: lines[n]["tolerance"] for n in ("stitching", "warped", "image_max", "image_share")} == {
        "stitching": 1e-5,
        "warped": 1e-4,
        "image_max": 3.0,
        "image_share": 1e-3,
    }
    assert lines["warped"]["warp"] == "exact" and lines["motion_yaw"]["unit"] == "degrees"
    assert f"{len(ITEMS)} of {len(ITEMS)}" in said


def test_other_numbers_of_inputs_batches_and_whole_arrays(bundle: Path, tmp_path: Path) -> None:
    arrays = golden(5)
    arrays["occlusion_map"] = golden(5)["occlusion_map"][:, None]  # the graph's own rank
    arrays["motion_exp"] = arrays["motion_exp"].reshape(5, 2, 3)
    whole = arrays["image_u8"]
    arrays["image_u8"] = whole[:, ::2, ::8]
    lines, _ = compare(tmp_path, bundle, arrays, 0, "--batch", 2)
    assert lines.keys() == ITEMS and all(line["inputs"] == 5 for line in lines.values())


def broken(name: str, step: float, where: tuple[int, ...] = ()) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = np.array(arrays[name])
        arrays[name][where or tuple(-1 for _ in arrays[name].shape)] += step

    return change


@pytest.mark.parametrize(
    ("array", "step", "items"),
    [
        ("motion_t", 2e-4, {"motion_t"}),
        ("motion_kp", 2e-4, {"motion_kp"}),
        ("feature_3d", 2e-4, {"feature_3d"}),
        ("deformation", -2e-4, {"deformation"}),
        ("occlusion_map", 2e-4, {"occlusion_map"}),
        ("warped", 2e-4, {"warped"}),
        ("stitching", 2e-5, {"stitching"}),
        ("eye", 2e-5, {"eye"}),
        ("lip", np.nan, {"lip"}),
        ("image", 0.02, {"image_max", "image_share"}),
    ],
)
def test_one_broken_value_in_the_last_input_fails(
    bundle: Path, tmp_path: Path, array: str, step: float, items: set[str]
) -> None:
    arrays = golden()
    broken(array, step)(arrays)
    lines, said = compare(tmp_path, bundle, arrays, 1)
    assert {name for name, line in lines.items() if not line["ok"]} == items
    assert lines.keys() == ITEMS and all(name in said for name in items)


def test_one_broken_logit_shows_in_degrees(bundle: Path, tmp_path: Path) -> None:
    arrays = golden()
    row = arrays["motion_roll"][1]
    row[int(row.argmax())] += 1e-3
    lines, _ = compare(tmp_path, bundle, arrays, 1)
    assert not lines["motion_roll"]["ok"] and lines["motion_pitch"]["ok"]


def test_few_pixels_two_levels_off_are_let_through(bundle: Path, tmp_path: Path) -> None:
    """1 pixel of 1920 may be 2 levels off, 2 may not; none may be 4 levels off."""
    arrays = golden(30)
    levels = arrays["image_u8"]
    spots = [tuple(p) for p in np.argwhere((levels > 10) & (levels < 240))[::50]]
    for changed, step, bad in (
        (1, 2, set()),
        (2, 2, {"image_u8_share"}),
        (1, 4, {"image_u8_max"}),
    ):
        arrays["image_u8"] = levels.copy()
        for spot in spots[:changed]:
            arrays["image_u8"][spot] += step
        lines, _ = compare(tmp_path, bundle, arrays, 1 if bad else 0)
        assert {name for name, line in lines.items() if not line["ok"]} == bad


def test_fp16_pictures_are_judged_by_their_psnr(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the tolerances of fp16 stand beside the export")
    arrays = golden()
    half = write_bundle(tmp_path / "half", "fp16")
    levels = arrays["image_u8"].astype(np.int16)
    for step, code in ((1, 0), (2, 1)):  # 48.1 and 42.1 dB
        arrays["image_u8"] = np.where(levels > 127, levels - step, levels + step).astype(np.uint8)
        lines, _ = compare(tmp_path, half, arrays, code)
        line = lines["image_u8_psnr"]
        assert line["ok"] is (code == 0) and line["max_abs_error"] == pytest.approx(step, abs=0.1)
        assert line["psnr_db"] == pytest.approx(20 * np.log10(255 / step), abs=0.5)
    assert lines["image_psnr"]["ok"] and lines["warped"]["precision"] == "fp16"


def test_folded_warp_has_its_own_tolerance(tmp_path: Path) -> None:
    """A GridSample in the part that makes `warped` says that rows were folded."""
    plain = GRAPHS["warp_decode"]
    sampled = plain.replace(
        "warped = Mul(e, occlusion_map)",
        """
            u = Mul(e, occlusion_map)
            grid = Constant<value=float[1,8,8,2] {%s}>()
            zeros = Mul(s0, grid)
            warped = Add(u, zeros)
            """,
    ).replace(
        "s = Sub(",
        """first = Constant<value=float[1,1,8,8] {%s}>()
            place = Constant<value=float[1,8,8,2] {%s}>()
            h = GridSample<mode="bilinear">(first, place)
            s0 = ReduceMax<keepdims=0>(h)
            s = Sub(""",
    )
    numbers = ",".join(["0.0"] * 64), ",".join(["0.5"] * 128)
    sampled = sampled % (*numbers, ",".join(["0.0"] * 128))
    sampled = sampled.replace("zeros = Mul(s0, grid)", "z = Mul(s0, grid)\n zeros = ReduceMax<keepdims=0>(z)")
    folded = write_bundle(tmp_path / "folded", graphs={"warp_decode": sampled})
    arrays = golden()
    broken("warped", 2e-4)(arrays)
    lines, _ = compare(tmp_path, folded, arrays)
    assert lines["warped"]["warp"] == "folded" and lines["warped"]["tolerance"] == 5e-4
    broken("warped", 5e-4)(arrays)
    assert not compare(tmp_path, folded, arrays, 1)[0]["warped"]["ok"]


def test_items_that_the_file_lacks_are_left_out(bundle: Path, tmp_path: Path) -> None:
    arrays = golden()
    kept = {n: arrays[n] for n in ("crops", "kp_source", "kp_driving", "motion_t", "warped")}
    assert compare(tmp_path, bundle, kept)[0].keys() == {"motion_t", "warped"}
    del kept["motion_t"], kept["warped"]
    _, said = compare(tmp_path, bundle, kept, 2)
    assert "no output to compare" in said


def test_unusable_files_are_told_from_bad_parity(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    assert "cannot be read" in run("networks", tmp_path / "text.npz", "--bundle", bundle, code=2)[1]
    run("networks", tmp_path / "missing.npz", "--bundle", bundle, code=2)
    arrays = golden()
    assert "kp_source" in compare(tmp_path, bundle, {"crops": arrays["crops"]}, 2)[1]
    assert "2" in compare(tmp_path, bundle, {**arrays, "lip": arrays["lip"][:2]}, 2)[1]
    odd = {**arrays, "warped": np.zeros((3, 3, 7, 8), np.float32)}
    assert "warped" in compare(tmp_path, bundle, odd, 2)[1]
    lacking = {**arrays, "feature_3d": arrays["feature_3d"][..., 0]}
    assert "feature_3d" in compare(tmp_path, bundle, lacking, 2)[1]


def test_unusable_bundles_are_named(toy_bundle: Path, bundle: Path, tmp_path: Path) -> None:
    assert "family mesh" in compare(tmp_path, toy_bundle, golden(), 5)[1]
    nameless = GRAPHS["warp_decode"].replace("warped", "something")
    other = write_bundle(tmp_path / "other", graphs={"warp_decode": nameless})
    assert "no tensor warped" in compare(tmp_path, other, golden(), 5)[1]


def test_motion_wants_one_origin_of_its_networks(bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", **golden())
    for origin in ((), ("--bundle", bundle, "--weights", tmp_path)):
        assert "either" in run("motion", tmp_path / "golden.npz", *origin, code=2)[1]


def test_motion_composes_the_cases_of_a_file(shared: Path, tmp_path: Path) -> None:
    """S and R come from checkpoints that are not the official ones; a keypoint that is 1e-3 off is told."""
    torch = pytest.importorskip("torch", reason="the export extra (torch) is not installed")
    folder = shared / "liveportrait"
    spec = importlib.util.spec_from_file_location("make_checkpoints", folder / "make_checkpoints.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    name = "retargeting_models/stitching_retargeting_module.pth"
    path = tmp_path / "weights" / "liveportrait" / name
    path.parent.mkdir(parents=True)
    torch.save({part: maker.fill(f"{name}/{part}", table) for part, table in maker.KEYS[name].items()}, path)
    weights = ("--weights", tmp_path / "weights")
    lines, said = run("motion", folder / "motion_golden.npz", *weights)
    assert len(lines) == 44 and all(line["ok"] for line in lines.values()) and "44 of 44" in said
    with np.load(folder / "motion_golden.npz", allow_pickle=False) as archive:
        arrays = dict(archive)
    arrays["kp_driving_7"][0, 3, 1] += 1e-3
    np.savez(tmp_path / "broken.npz", **arrays)
    lines, said = run("motion", tmp_path / "broken.npz", *weights, code=1)
    bad = [line for line in lines.values() if not line["ok"]]
    assert len(bad) == 1 and bad[0]["max_abs_error"] == pytest.approx(1e-3, abs=1e-4) and "43 of 44" in said
