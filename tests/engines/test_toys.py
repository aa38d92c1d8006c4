"""The toy networks are what their generator writes, and compute what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lp_edge.engines import BackendConfig, backends, names, open_bundle, open_runner
from lp_edge.runtime import topology

CPU = BackendConfig("cpu", threads=1)


@pytest.fixture(scope="module")
def make_toys(toys: Path) -> ModuleType:
    pytest.importorskip("onnx", reason="the generator of the toy networks needs onnx")
    spec = importlib.util.spec_from_file_location("make_toys", toys / "make_toys.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def square(rgb: tuple[int, int, int], x0: int, y0: int, side: int, h: int = 64, w: int = 64) -> np.ndarray:
    image = np.zeros((h, w, 3), np.uint8)
    image[y0 : y0 + side, x0 : x0 + side] = rgb
    return image


def test_committed_files_are_what_the_generator_writes(make_toys: ModuleType, toys: Path) -> None:
    for name, make in make_toys.TOYS.items():
        assert make() == (toys / f"{name}.onnx").read_bytes(), f"{name}: run tests/toys/make_toys.py"
    with np.load(toys / "canonical.npz", allow_pickle=False) as table:
        made = make_toys.canonical()
        assert sorted(table.files) == sorted(made)
        for name in table.files:
            np.testing.assert_allclose(table[name], made[name], atol=1e-6)


def test_embedded_probe_is_what_the_generator_writes(make_toys: ModuleType) -> None:
    assert make_toys.probe() == backends._PROBE


def test_detector(toys: Path) -> None:
    image = np.stack([square((200, 0, 0), 10, 20, 16), np.zeros((64, 64, 3), np.uint8)])
    image[0, 40:48, 30:38, 1] = 255  # a second, green face
    with open_runner(toys / "face_detector.onnx", CPU) as runner:
        out = {k: np.asarray(v) for k, v in runner.infer({names.IMAGE: image}).items()}
    # pixels 10..25 have their centroid at 17.5
    np.testing.assert_allclose(out[names.BOXES][0, 0], [9.5, 19.5, 25.5, 35.5])
    np.testing.assert_allclose(out[names.BOXES][0, 1], [29.5, 39.5, 37.5, 47.5])
    np.testing.assert_allclose(out[names.SCORES][0], [200 / 255, 0.9, 0.0], atol=1e-6)
    np.testing.assert_allclose(out[names.POINTS][0, 0, 2], [9.5 + 8, 19.5 + 9.6], rtol=1e-6)
    assert not out[names.SCORES][1].any()


@pytest.mark.parametrize(
    ("rgb", "opening"), [((255, 255, 255), 0.0), ((240, 240, 0), 1.0), ((200, 0, 100), 0.5)]
)
def test_mesh(make_toys: ModuleType, toys: Path, rgb: tuple[int, int, int], opening: float) -> None:
    with open_runner(toys / "face_mesh.onnx", CPU) as runner:
        out = {k: np.asarray(v) for k, v in runner.infer({names.IMAGE: square(rgb, 8, 12, 40)[None]}).items()}
    wanted = (make_toys.template() + opening * make_toys.jaw()) * 40 + np.array([27.5, 31.5, 0])
    np.testing.assert_allclose(out[names.POINTS][0], wanted, atol=1e-4)
    np.testing.assert_allclose(out[names.SCORE], [[max(rgb) / 255]], atol=1e-6)


def test_template_is_a_face(make_toys: ModuleType) -> None:
    points = make_toys.template()
    assert len(np.unique(points[:, :2], axis=0)) > 470
    np.testing.assert_allclose(np.ptp(points[:, :2], axis=0), [0.76, 1.0], atol=1e-5)
    assert topology.eye_roll(points) == pytest.approx(0, abs=1e-6)
    assert np.all(topology.eye_ratio(points) > 0.2)
    assert topology.lip_ratio(points) < 0.05
    assert topology.lip_ratio(points + make_toys.jaw()) > 0.2


def test_warp(toys: Path) -> None:
    image = np.full((1, 6, 8, 3), 100, np.uint8)
    source = np.zeros((2, 478, 3), np.float32)
    driving = source.copy()
    driving[0, :] = [10, -20, 200]
    driving[1, :239] = [4, 0, 0]  # half of the points: the mean is 2
    with open_runner(toys / "warp_decode.onnx", CPU) as runner:
        feeds = {names.SOURCE_IMAGE: image, names.KP_SOURCE: source, names.KP_DRIVING: driving}
        out = {k: np.asarray(v) for k, v in runner.infer(feeds).items()}
    assert out[names.IMAGE].shape == (2, 6, 8, 3)
    assert np.all(out[names.IMAGE][0] == [110, 80, 255])
    assert np.all(out[names.IMAGE][1] == [102, 100, 100])
    assert np.all(out[names.DEFORMATION][0] == [10, -20])


def test_toy_bundle_opens_and_runs(toy_bundle: Path) -> None:
    bundle = open_bundle(toy_bundle)
    assert bundle.load_table("canonical")["points"].shape == (478, 3)
    for name in bundle.manifest.networks:
        with bundle.runner(name, CPU) as runner:
            assert runner.name == name
