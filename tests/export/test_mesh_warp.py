from __future__ import annotations

import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra (torch) is not installed")
onnx = pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.bundle import builtin_directory, open_bundle
from lp_edge.errors import ExportError
from lp_edge.export.lint import TARGETS, check, lint
from lp_edge.export.mesh import build
from lp_edge.export.mesh.warp import MeshWarp
from lp_edge.runtime import topology
from lp_edge.runtime.face_motion import load_canonical
from lp_edge.runtime.geometry import rotation_from_euler

FACE = load_canonical().points.astype(np.float64)
FACE = (FACE - FACE.mean(0)) / np.ptp(FACE[:, :2], axis=0).max()
SIDE = 256


@pytest.fixture(scope="module")
def warp() -> MeshWarp:
    return MeshWarp(load_canonical().points).eval()


def place(shape: np.ndarray, pitch: float = 0, yaw: float = 0, roll: float = 0) -> np.ndarray:
    return (shape @ rotation_from_euler(pitch, yaw, roll).T * 0.45 * SIDE + [SIDE / 2, SIDE / 2, 0]).astype(
        np.float32
    )


def picture() -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    planes = [127 + 90 * np.sin(x / a) * np.cos(y / b) for a, b in ((11, 17), (23, 9), (14, 31))]
    return np.round(np.stack(planes, -1)).astype(np.uint8)


def run(
    warp: MeshWarp, source: np.ndarray, driving: np.ndarray, image: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    image = picture() if image is None else image
    with torch.no_grad():
        out, where = warp(*(torch.from_numpy(x[None]) for x in (image, source, driving)))
    return out[0].numpy(), where[0].numpy()


def corner_jacobians(where: np.ndarray) -> np.ndarray:
    """Determinants at the four corners of every cell; all positive = one-to-one under bilinear interpolation."""
    cell = SIDE / where.shape[0]
    a, b, c, d = where[:-1, :-1], where[:-1, 1:], where[1:, :-1], where[1:, 1:]
    return np.stack(
        [
            (u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]) / cell**2
            for u in (b - a, d - c)
            for v in (c - a, d - b)
        ]
    )


def test_no_motion_gives_the_picture_back(warp: MeshWarp) -> None:
    out, _ = run(warp, place(FACE), place(FACE))
    assert np.abs(out.astype(int) - picture().astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("pitch", "yaw", "roll", "noise"),
    [
        (0, 20, 0, 0),
        (0, -36, 0, 0),
        (0, 80, 0, 0),
        (30, 0, 0, 0),
        (-50, 0, 0, 0),
        (0, 0, 50, 0),
        (30, 36, 50, 0),
        (0, 0, 0, 0.03),
        (10, 30, 10, 0.03),
    ],
)
def test_the_warp_never_folds(warp: MeshWarp, pitch: float, yaw: float, roll: float, noise: float) -> None:
    shape = FACE + np.random.default_rng(3).normal(0, 1, FACE.shape) * noise
    _, where = run(warp, place(FACE), place(shape, pitch, yaw, roll))
    assert corner_jacobians(where).min() > 0


def test_without_the_guard_it_would_fold(warp: MeshWarp) -> None:
    """The test above can fail: the raw field of a strong turn does fold."""
    kp = [torch.from_numpy(place(FACE, yaw=a)[None]) for a in (0, 60)]
    side = torch.tensor(float(SIDE))
    with torch.no_grad():
        raw = warp._displacement(*kp, side, side)[0].permute(1, 2, 0).numpy()
    axis = (np.arange(raw.shape[0]) + 0.5) * SIDE / raw.shape[0] - 0.5
    where = np.stack(np.meshgrid(axis, axis), -1) + raw
    assert corner_jacobians(where).min() < 0


def test_keypoints_arrive_where_they_should(warp: MeshWarp) -> None:
    smile = FACE.copy()
    for corner, side in ((61, -1), (291, 1)):
        near = np.exp(-(np.linalg.norm(FACE[:, :2] - FACE[corner, :2], axis=1) ** 2) / (2 * 0.08**2))
        smile[:, 0] += 0.05 * side * near
        smile[:, 1] -= 0.05 * near
    source, driving = place(FACE), place(smile, 4, 8, 6)
    _, where = run(warp, source, driving)
    cell = SIDE / where.shape[0]
    still = sorted(set(range(468)) - set(topology.REGIONS["eyes"]) - set(topology.REGIONS["lip"]))
    index = np.round((driving[still, :2] + 0.5) / cell - 0.5).astype(int)
    error = np.linalg.norm(where[index[:, 1], index[:, 0]] - source[still, :2], axis=1)
    moved = np.linalg.norm((driving - source)[still, :2], axis=1).mean()
    assert moved > 3
    assert np.median(error) < 0.25 * moved


def test_the_border_stays_put(warp: MeshWarp) -> None:
    out, _ = run(warp, place(FACE), place(FACE, 20, 30, 30))
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        assert np.abs(out[edge].astype(int) - picture()[edge].astype(int)).max() <= 1


def test_an_opening_mouth_is_dark_inside_not_stretched_lip(warp: MeshWarp) -> None:
    skin = np.full((SIDE, SIDE, 3), 200, np.uint8)
    opened = FACE.copy()
    opened[list(topology.INNER_LIP_LOWER[1:-1]), 1] += 0.12
    driving = place(opened)
    out, _ = run(warp, place(FACE), driving, skin)
    x, y = np.round(0.35 * driving[13, :2] + 0.65 * driving[14, :2]).astype(int)
    assert out[y, x].max() < 110
    assert np.abs(out[40, 40].astype(int) - 200).max() <= 1


def test_a_closing_eye_is_covered_by_the_lid(warp: MeshWarp) -> None:
    """Skin is light, the eyeball is painted black; when the lids meet hardly any black may be left."""
    source = place(FACE)
    image = np.full((SIDE, SIDE, 3), 200, np.uint8)
    eye = source[list(topology.LEFT_EYE), :2]
    import cv2

    cv2.fillPoly(image, [np.round(eye).astype(np.int32)], (0, 0, 0))
    shut = FACE.copy()
    for upper, lower in topology.LID_PAIRS_IMAGE_LEFT:
        shut[upper] = shut[lower]
    box = np.s_[
        int(eye[:, 1].min()) - 2 : int(eye[:, 1].max()) + 3, int(eye[:, 0].min()) : int(eye[:, 0].max()) + 1
    ]
    out, _ = run(warp, source, place(shut), image)
    assert (image[box] < 60).mean() > 0.3
    assert (out[box] < 60).mean() < 0.4 * (image[box] < 60).mean()


def test_the_graph_equals_pytorch_and_takes_any_size_and_batch() -> None:
    module, graph = build.export_warp(load_canonical().points)
    figures = build.verify(module, graph)
    assert set(figures) == set(build.TOLERANCES)
    with open_runner(graph, BackendConfig("cpu", threads=1), name=names.WARP_DECODE) as runner:
        kp = np.repeat(place(FACE)[None], 2, 0)
        out = runner.infer(
            {
                names.SOURCE_IMAGE: np.zeros((1, 96, 130, 3), np.uint8),
                names.KP_SOURCE: kp,
                names.KP_DRIVING: kp,
            },
            [names.IMAGE],
        )
    assert np.asarray(out[names.IMAGE]).shape == (2, 96, 130, 3)


def test_broken_parity_is_an_error() -> None:
    _, graph = build.export_warp(load_canonical().points)
    broken = MeshWarp(load_canonical().points).eval()
    broken.sigma.mul_(1.5)
    with pytest.raises(ExportError, match="differs from PyTorch"):
        build.verify(broken, graph)


def test_build_writes_a_bundle_that_opens(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "verify", lambda *_: {"image_max": 0.0})  # checked above
    lines: list[str] = []
    report = build.build(tmp_path / "bundle", report=lines.append)
    bundle = open_bundle(tmp_path / "bundle")
    assert [row.name for row in report.networks] == list(bundle.manifest.networks)
    assert bundle.manifest.keypoints == 478
    assert lines


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [names.FACE_DETECTOR, names.FACE_MESH, names.WARP_DECODE])
def test_built_in_graphs_pass_the_linter(name: str, target: str) -> None:
    model = onnx.load(builtin_directory() / f"{name}.onnx")
    assert lint(model, target) == []


def test_build_refuses_what_the_linter_refuses(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes that the exporter made up for the outputs, as in older files, are stated anew; other faults are not mended."""
    origin = tmp_path / "origin"
    shutil.copytree(builtin_directory(), origin)
    model = onnx.load(origin / "face_mesh.onnx")
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "Mulpoints_dim_1"
    with pytest.raises(ExportError, match="dynamic-batch"):
        check(model, "main", "face_mesh")
    onnx.save(model, origin / "face_mesh.onnx")
    monkeypatch.setattr(build, "verify", lambda *_: {"image_max": 0.0})
    build.build(tmp_path / "bundle", weights=origin)
    mended = onnx.load(tmp_path / "bundle" / "face_mesh.onnx")
    assert mended == onnx.load(builtin_directory() / "face_mesh.onnx")

    model.graph.node.append(onnx.helper.make_node("Relu", ["score"], ["idle"], "idle"))
    onnx.save(model, origin / "face_mesh.onnx")
    with pytest.raises(ExportError, match="idle"):
        build.build(tmp_path / "other", weights=origin)
    assert not (tmp_path / "other").exists()


def test_weights_with_other_outputs_are_refused(tmp_path) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(builtin_directory(), origin)
    shutil.copy(origin / "face_mesh.onnx", origin / "face_detector.onnx")
    with pytest.raises(ExportError, match="boxes"):
        build.build(tmp_path / "out", weights=origin)
    assert not (tmp_path / "out").exists()


def test_build_names_what_is_missing(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"face_mesh\.onnx"):
        build.build(tmp_path / "out", weights=tmp_path)
    assert not (tmp_path / "out").exists()
