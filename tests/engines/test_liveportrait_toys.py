"""The toy networks of the LivePortrait family are what their generator writes, and compute what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lp_edge.engines import BackendConfig, names, open_bundle, open_runner
from lp_edge.runtime.face_motion import load_canonical
from lp_edge.runtime.liveportrait_template import load_map

CPU = BackendConfig("cpu", threads=1)


@pytest.fixture(scope="module")
def make_toys(toys: Path) -> ModuleType:
    pytest.importorskip("onnx", reason="the generator of the toy networks needs onnx")
    spec = importlib.util.spec_from_file_location(
        "make_liveportrait_toys", toys / "make_liveportrait_toys.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def infer(toys: Path, name: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    with open_runner(toys / "liveportrait" / f"{name}.onnx", CPU) as runner:
        return {k: np.asarray(v) for k, v in runner.infer(feeds).items()}


def test_committed_files_are_what_the_generator_writes(make_toys: ModuleType, toys: Path) -> None:
    folder = toys / "liveportrait"
    assert {f.stem for f in folder.glob("*.onnx")} == set(make_toys.TOYS)
    for name, make in make_toys.TOYS.items():
        data = (folder / f"{name}.onnx").read_bytes()
        assert make() == data, f"{name}: run tests/toys/make_liveportrait_toys.py"
        assert len(data) < 10_000
    with np.load(folder / "liveportrait_map.npz", allow_pickle=False) as table:
        made = make_toys.liveportrait_map()
        assert sorted(table.files) == sorted(made)
        for name in table.files:
            np.testing.assert_array_equal(table[name], made[name])


def test_appearance(toys: Path) -> None:
    image = np.zeros((2, 256, 256, 3), np.uint8)
    image[0, 4:8, 8:10] = (40, 80, 120)  # half of the block in row 1, column 2
    out = infer(toys, names.APPEARANCE, image=image)
    assert out[names.FEATURE_3D].shape == (2, 3, 1, 64, 64)
    np.testing.assert_allclose(out[names.FEATURE_3D][0, :, 0, 1, 2], [20, 40, 60])
    assert np.count_nonzero(out[names.FEATURE_3D]) == 3
    np.testing.assert_allclose(out[names.FEATURE_COMPRESSED][0, 0, 0, 1, 2], 40)


def test_motion(make_toys: ModuleType, toys: Path) -> None:
    image = np.zeros((3, 256, 256, 3), np.uint8)
    image[0] = (255, 0, 51)
    image[1, 128:192, 192:] = 255  # a sixteenth of the crop, centred on (0.75, 0.25)
    out = infer(toys, names.MOTION, image=image)
    assert [out[n].shape for n in (names.PITCH, names.YAW, names.ROLL, names.SCALE)] == [(3, 1)] * 4
    angles = np.concatenate([out[n] for n in (names.PITCH, names.YAW, names.ROLL)], 1)
    np.testing.assert_allclose(angles, [[15, -15, -9], [-13.125] * 3, [-15] * 3], atol=1e-4)
    np.testing.assert_allclose(out[names.SCALE][:, 0], [1.2 - 0.02, 1.2 - 0.0875, 1.1], atol=1e-6)
    np.testing.assert_allclose(out[names.T], [[0, 0, 0.1], [0.75, 0.25, 0.1], [0, 0, 0.1]], atol=1e-5)
    np.testing.assert_allclose(out[names.EXP][0, 20], [0.05, -0.05, -0.03], atol=1e-6)
    np.testing.assert_allclose(out[names.EXP][0, 0], np.array([0.05, -0.05, -0.03]) / 21, atol=1e-6)
    np.testing.assert_allclose(out[names.KP], np.broadcast_to(make_toys.keypoints(), (3, 21, 3)))


def test_warp(toys: Path) -> None:
    feature = np.zeros((1, 3, 1, 64, 64), np.float32)
    feature[0, :, 0, 10, 20] = (100, 150, 200)
    mean = feature.mean(1, keepdims=True)
    source = np.zeros((2, 21, 3), np.float32)
    driving = source.copy()
    driving[1, :, :2] = [5 / 32, -2 / 32]  # 5 cells to the right, 2 up
    driving[1, :7, 2] = 0.3  # a third of the keypoints: 0.1 on average
    feeds = {names.KP_SOURCE: source, names.KP_DRIVING: driving}
    out = infer(toys, names.WARP_DECODE, feature_3d=feature, feature_compressed=mean, **feeds)[names.IMAGE]
    assert out.shape == (2, 512, 512, 3) and out.dtype == np.uint8
    wanted = np.zeros_like(out)
    wanted[0, 80:88, 160:168] = (100, 150, 200)
    wanted[1] = 10
    wanted[1, 64:72, 200:208] = (110, 160, 210)
    np.testing.assert_array_equal(out, wanted)
    # one volume a frame, and a compressed volume of another source shows
    feature = np.repeat(feature, 2, axis=0)
    wrong = np.concatenate([mean, mean + 7])
    out = infer(toys, names.WARP_DECODE, feature_3d=feature, feature_compressed=wrong, **feeds)[names.IMAGE]
    wanted[1] += 7
    np.testing.assert_array_equal(out, wanted)


def test_stitching(toys: Path) -> None:
    source = np.arange(63, dtype=np.float32).reshape(1, 63)
    driving = source - np.tile([1.0, 2, 3], 21).astype(np.float32)
    delta = infer(toys, names.STITCHING, features=np.concatenate([source, driving], 1))[names.DELTA]
    np.testing.assert_allclose(delta, [[*[0.1, 0.2, 0.3] * 21, 1, 2]], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "ratios", "moving"),
    [(names.RETARGET_EYE, [0.2, 0.4, 0.5], "EYES"), (names.RETARGET_LIP, [0.1, 0.3], "LIPS")],
)
def test_retargeting(make_toys: ModuleType, toys: Path, name: str, ratios: list[float], moving: str) -> None:
    features = np.concatenate([np.full(63, 9.0), ratios]).astype(np.float32)
    delta = infer(toys, name, features=features[None])[names.DELTA].reshape(21, 3)
    wanted = np.zeros((21, 3))
    wanted[list(getattr(make_toys, moving)), 1] = 0.02
    np.testing.assert_allclose(delta, wanted, atol=1e-7)


def test_toy_bundle_opens_and_runs(liveportrait_bundle: Path) -> None:
    bundle = open_bundle(liveportrait_bundle)
    assert (bundle.manifest.family, bundle.manifest.keypoints) == ("liveportrait", 21)
    for name in bundle.manifest.networks:
        with bundle.runner(name, CPU) as runner:
            assert runner.name == name
    canonical = load_canonical(bundle.path_of_file("canonical"))
    mapping = load_map(bundle.path_of_file("liveportrait_map"))
    assert mapping.weights.shape == (63, len(canonical.basis) + 3)
