"""The face detector's data, assignment, decoding, export and a few steps of its training."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra: export)")
onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra: export)")

from lp_edge.errors import ConfigError
from lp_edge.export.lint import lint
from lp_edge.export.training import detector_data as data
from lp_edge.export.training import face_detector as training

SHARED = Path(os.environ.get("LP_EDGE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "faces"
needs_faces = pytest.mark.skipif(not (SHARED / "detect.json").is_file(), reason=f"no face data at {SHARED}")

TINY = training.NetConfig(stem=(4, 4), stages=(8, 8, 8, 8), blocks=(1, 1, 1, 1), head=8)


def ellipse(centre: tuple[float, float], half: tuple[float, float], count: int = 720) -> np.ndarray:
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return (np.stack([np.cos(angle) * half[0], np.sin(angle) * half[1]], 1) + centre).astype(np.float32)


def turn(degrees: float, about: tuple[float, float]) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    linear = np.array([[c, -s], [s, c]])
    return np.concatenate([linear, (np.array(about) - linear @ np.array(about))[:, None]], 1).astype(
        np.float32
    )


@pytest.mark.parametrize("degrees", [0, 17, -45, 90])
def test_rotated_box_is_the_extent_of_the_rotated_ellipse(degrees: float) -> None:
    outline = ellipse((100, 80), (30, 45))
    matrix = turn(degrees, (60, 90))
    moved = data.Face(outline, np.zeros((5, 2), np.float32)).transformed(matrix)
    assert data.ellipse_box((70, 35, 130, 125), matrix) == pytest.approx(moved.box, abs=0.01)


def test_rotated_box_is_smaller_than_the_box_of_the_rotated_box() -> None:
    box = data.ellipse_box((70, 35, 130, 125), turn(45, (100, 80)))
    loose = (60 + 90) * math.sqrt(0.5)
    assert box[2] - box[0] < 0.8 * loose


def test_matched_outline_fills_the_box_and_turns_with_the_face() -> None:
    rng = np.random.default_rng(0)
    outlines = np.stack([ellipse((0, 0), (30, h)) for h in (34, 38, 42, 46)])
    five = np.array([[-12, -8], [12, -8], [0, 4], [-9, 20], [9, 20]], np.float32)[None].repeat(4, 0)
    five = five + rng.normal(0, 0.2, five.shape).astype(np.float32)
    matrix = turn(25, (0, 0))
    matrix[:, :2] *= 2
    matrix[:, 2] = (150, 120)
    truth = data.Face(outlines[2], five[2]).transformed(matrix)
    found = data.match_outline(truth.box, truth.points, outlines, five)
    assert np.concatenate([found.min(0), found.max(0)]) == pytest.approx(truth.box, abs=0.01)
    back = turn(-40, (150, 120))
    assert data.Face(found, truth.points).transformed(back).box == pytest.approx(
        truth.transformed(back).box, abs=0.5
    )


def test_mirror_swaps_left_and_right_points() -> None:
    points = np.array([[10, 20], [30, 21], [20, 30], [12, 40], [29, 41]], np.float32)
    face = data.Face(ellipse((20, 30), (15, 20)), points)
    mirrored = face.transformed(np.array([[-1, 0, 100], [0, 1, 0]], np.float32))
    assert mirrored.points.tolist() == [[70, 21], [90, 20], [80, 30], [71, 41], [88, 40]]
    assert mirrored.points[0, 0] < mirrored.points[1, 0] and mirrored.points[3, 0] < mirrored.points[4, 0]
    turned = face.transformed(turn(30, (20, 30)))
    assert np.linalg.norm(turned.points - (20, 30), axis=1) == pytest.approx(
        np.linalg.norm(points - (20, 30), axis=1), abs=1e-4
    )


def test_cells_are_numbered_stride_by_stride_row_by_row() -> None:
    centres, strides = data.cell_centres(64, 96)
    assert len(centres) == 4 * 6 + 2 * 3 + 1 * 2
    assert centres[0].tolist() == [8, 8] and centres[1].tolist() == [24, 8] and centres[6].tolist() == [8, 24]
    assert centres[24].tolist() == [16, 16] and strides[24] == 32
    assert centres[-1].tolist() == [96, 32] and strides[-1] == 64


def test_assignment_by_size_and_place() -> None:
    boxes = np.array([[40, 40, 80, 80], [100, 100, 300, 300]], np.float32)
    kinds, owner = data.assign(boxes, np.zeros(2, bool), 320, 320)
    centres, strides = data.cell_centres(320, 320)
    small, large = (kinds == 1) & (owner == 0), (kinds == 1) & (owner == 1)
    assert set(strides[small]) == {16.0}
    assert set(strides[large]) == {64.0}
    assert (np.abs(centres[small] - 60).max(1) <= 16).all() and small.sum() >= 4
    assert (np.abs(centres[large] - 200).max(1) <= 64).all() and large.sum() >= 4
    outside = ((centres < boxes[0, :2] - 17) | (centres > boxes[0, 2:] + 17)).any(1) & (strides == 16)
    assert (kinds[outside] == 0).all()


def test_ignored_faces_count_neither_way() -> None:
    boxes = np.array([[40, 40, 80, 80]], np.float32)
    kinds, _ = data.assign(boxes, np.ones(1, bool), 128, 128)
    centres, _ = data.cell_centres(128, 128)
    inside = ((centres > 40) & (centres < 80)).all(1)
    assert (kinds[inside] == -1).all() and not (kinds == 1).any()
    assert (kinds[np.abs(centres - 60).max(1) > 64] == 0).all()
    none, _ = data.assign(np.zeros((0, 4), np.float32), np.zeros(0, bool), 128, 128)
    assert not none.any()


def test_every_face_size_has_a_cell() -> None:
    for size in np.geomspace(18, 900, 60):
        for shift in (0.0, 5.3, 11.9):
            low = 480 + shift - size / 2
            kinds, _ = data.assign(
                np.array([[low, low, low + size, low + size]], np.float32), np.zeros(1, bool), 960, 960
            )
            assert (kinds == 1).any(), size


def test_decoding_of_hand_made_outputs() -> None:
    centres, strides = (torch.from_numpy(a) for a in data.cell_centres(64, 64))
    raw = torch.zeros(1, len(centres), 15)
    raw[0, 5, 1:5] = torch.tensor([0.5, -0.25, 0.0, math.log(1.5)])
    raw[0, 5, 5:] = torch.tensor([-0.25, 0, 0.25, 0, 0, 0.125, -0.25, 0.25, 0.25, 0.25])
    boxes, points = training.decode(raw, centres, strides)
    # Cell 5 of stride 16: column 1, row 1, centre (24, 24); unit 64.
    assert boxes[0, 5].tolist() == pytest.approx([32 - 32, 20 - 48, 32 + 32, 20 + 48])
    assert points[0, 5].tolist() == [[8, 24], [40, 24], [24, 32], [8, 40], [40, 40]]


def test_suppression_keeps_the_best_of_each_heap() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 1, 10, 11]], np.float32)
    assert training.suppress(boxes, np.array([0.5, 0.9, 0.3, 0.6], np.float32)).tolist() == [1, 2]
    assert training.box_ious(boxes[:1], boxes)[0].tolist() == pytest.approx([1, 9 / 11, 0, 9 / 11])


def test_losses_vanish_for_right_outputs_and_grow_for_wrong_ones() -> None:
    boxes = np.array([[30, 30, 90, 100]], np.float32)
    spots = np.array([[[45, 55], [75, 55], [60, 65], [48, 82], [72, 82]]], np.float32)
    kinds, owner = data.assign(boxes, np.zeros(1, bool), 128, 128)
    centres, strides = data.cell_centres(128, 128)
    batch = {
        "kinds": torch.from_numpy(kinds)[None], "boxes": torch.from_numpy(boxes[owner])[None],
        "points": torch.from_numpy(spots[owner])[None], "centres": torch.from_numpy(centres),
        "strides": torch.from_numpy(strides), "seen": torch.ones(1, len(kinds), 5, dtype=torch.bool),
    }  # fmt: skip
    raw = torch.zeros(1, len(kinds), 15)
    raw[0, :, 0] = torch.where(torch.from_numpy(kinds) == 1, 12.0, -12.0)
    raw[0, :, 1:3] = torch.from_numpy((np.array([60, 65]) - centres) / strides[:, None])
    raw[0, :, 3:5] = torch.from_numpy(np.log(np.array([60, 70]) / (strides[:, None] * 4)))
    raw[0, :, 5:] = torch.from_numpy(
        ((spots - centres[:, None]) / (strides[:, None, None] * 4)).reshape(-1, 10)
    )
    assert all(float(part) < 1e-4 for part in training.losses(raw, batch))
    raw[0, :, 0] *= -1
    raw[0, :, 1:] += 0.3
    assert all(float(part) > 0.01 for part in training.losses(raw, batch))


def randomised(config: training.NetConfig) -> Any:
    torch.manual_seed(3)
    net = training.DetectorNet(config).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


@pytest.mark.parametrize("size", [(96, 160), (64, 64), (320, 224)])
def test_graph_equals_the_torch_network(tmp_path: Path, size: tuple[int, int]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net = randomised(TINY)
    training.export(net, tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    boxes, scores, points = session.run(["boxes", "scores", "points"], {"image": image})
    cells = eval(training.CELLS, {"H": size[0], "W": size[1]})
    assert [a.shape for a in (boxes, scores, points)] == [(2, cells, 4), (2, cells), (2, cells, 5, 2)]
    with torch.no_grad():
        raw = net(torch.from_numpy(image).permute(0, 3, 1, 2).float())
        want, spots = training.decode(raw, *(torch.from_numpy(a) for a in data.cell_centres(*size)))
    assert boxes == pytest.approx(want.numpy(), abs=2e-3)
    assert points == pytest.approx(spots.numpy(), abs=2e-3)
    assert scores == pytest.approx(torch.sigmoid(raw[..., 0]).numpy(), abs=1e-5)


def test_graph_contract(tmp_path: Path) -> None:
    training.export(training.DetectorNet().eval(), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").stat().st_size <= 2_500_000
    model = onnx.load(str(tmp_path / "net.onnx"))
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [o.name for o in model.graph.output] == ["boxes", "scores", "points"]
    assert lint(model, "main") == lint(model, "tensorrt8") == []
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


SHIPPED = Path(training.__file__).resolve().parents[2] / "engines" / "data" / "mesh" / "face_detector.onnx"


def test_shipped_graph_is_the_one_this_module_writes(tmp_path: Path) -> None:
    training.export(training.DetectorNet().eval(), tmp_path / "net.onnx")
    ours, shipped = onnx.load(str(tmp_path / "net.onnx")), onnx.load(str(SHIPPED))
    assert ours.graph.node == shipped.graph.node
    assert list(ours.graph.input) == list(shipped.graph.input)
    assert list(ours.graph.output) == list(shipped.graph.output)
    assert [(c.name, list(c.dims)) for c in ours.graph.initializer] == [
        (c.name, list(c.dims)) for c in shipped.graph.initializer
    ]


@needs_faces
def test_shipped_detector_finds_the_validation_faces() -> None:
    pytest.importorskip("onnxruntime")
    from lp_edge.engines.ort import OrtRunner
    from lp_edge.runtime.faces import FaceDetector, iou_matrix

    frames = [e for e in json.loads((SHARED / "detect.json").read_text()) if e["split"] == "val"]
    faces = hits = false = 0
    with OrtRunner(SHIPPED, threads=1) as runner:
        detector = FaceDetector(runner)
        for entry in frames:
            found = detector.detect(data.read_rgb(SHARED / entry["file"]))
            truth = [face["box"] for face in entry["faces"]]
            right = iou_matrix([f.box for f in found], truth) >= 0.5
            faces, hits, false = faces + len(truth), hits + right.any(0).sum(), false + (~right.any(1)).sum()
    assert hits >= 0.98 * faces
    assert false <= 0.05 * len(frames)


def test_learning_rate_rises_and_falls_in_both_phases() -> None:
    config = training.TrainConfig(steps=1000, warmup=100, freeze=0.8)
    rates = [training.learning_rate(config, step) for step in range(1000)]
    assert max(rates) == rates[100] == pytest.approx(config.rate) and rates[0] == config.rate / 100
    assert all(a >= b for a, b in pairwise(rates[100:800]))
    assert rates[799] == pytest.approx(config.rate / 100, rel=0.01)
    assert rates[800] == pytest.approx(config.rate * config.frozen_rate)
    assert all(a >= b for a, b in pairwise(rates[800:]))
    assert rates[-1] == pytest.approx(config.rate / 100, rel=0.01)


def test_missing_data_and_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"detect\.json"):
        training.train(tmp_path, tmp_path / "out", training.TrainConfig(steps=1))
    assert training.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2


@needs_faces
def test_samples_are_repeatable_and_labelled() -> None:
    corpus = data.load_corpus(SHARED, limit=24)
    painter = data.Painter(corpus, 5)
    seen = 0
    for index in range(60):
        first, second = (painter.draw(np.random.default_rng([5, index]), 192, 256) for _ in range(2))
        assert first.image.shape == (192, 256, 3) and first.image.dtype == np.uint8
        assert np.array_equal(first.image, second.image) and np.array_equal(first.boxes, second.boxes)
        assert len(first.boxes) == len(first.points) == len(first.ignored)
        boxes = first.boxes[~first.ignored]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (256, 192)).all()
        assert ((boxes[:, 2:] - boxes[:, :2]).prod(1) >= data.SMALLEST**2 - 1).all()
        seen += len(boxes)
    assert seen > 40


@needs_faces
def test_outlines_of_frames_agree_with_their_labels() -> None:
    corpus = data.load_corpus(SHARED, limit=24)
    labels = [e for e in json.loads((SHARED / "detect.json").read_text()) if e["split"] == "train"]
    rows = np.linspace(0, len(labels) - 1, 24).astype(int)
    for picture, row in zip(corpus.frames, rows, strict=True):
        for face, label in zip(picture.faces, labels[row]["faces"], strict=True):
            assert face.box == pytest.approx(np.array(label["box"]), abs=0.1)
            assert np.array_equal(face.points, np.array(label["points"], np.float32))


@needs_faces
def test_training_writes_resumes_and_exports(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    config = training.TrainConfig(steps=3, batch=2, side=96, large_every=3, warmup=1, workers=0)
    path = training.train(SHARED, tmp_path, config, net_config=TINY, limit=6, say=lambda _: None)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3 and not list(tmp_path.glob("*.part"))
    longer = training.TrainConfig(**{**vars(config), "steps": 5})
    training.train(SHARED, tmp_path, longer, resume=True, net_config=TINY, limit=6, say=lambda _: None)
    later = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert later["step"] == 5
    changed = [name for name, value in later["net"].items() if not torch.equal(value, state["net"][name])]
    assert len(changed) > len(later["net"]) // 3
    # The last steps are trained with fixed normalisation statistics.
    assert state["frozen"] and later["frozen"]
    assert not [name for name in changed if "running" in name or "tracked" in name]
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    out = session.run(None, {"image": np.zeros((2, 64, 96, 3), np.uint8)})
    cells = len(data.cell_centres(64, 96)[0])
    assert [o.shape for o in out] == [(2, cells, 4), (2, cells), (2, cells, 5, 2)]
    assert all(o.dtype == np.float32 and np.isfinite(o).all() for o in out)
    with pytest.raises(ConfigError, match="another network"):
        training.train(SHARED, tmp_path, longer, resume=True, limit=6, say=lambda _: None)
