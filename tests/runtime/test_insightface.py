"""The user's own face models, on toy networks with the inputs and outputs of the real ones."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.bundle import builtin_directory
from lp_edge.errors import ConfigError, EngineError, NoFaceError
from lp_edge.runtime.crop import CropOptions, source_matrix, transform_points
from lp_edge.runtime.face_motion import load_canonical
from lp_edge.runtime.insightface import (
    FILES,
    InsightFaceLandmarks,
    Landmarks106,
    RefinedLandmarks,
    Refiner,
    ScrfdDetector,
    open_face_models,
)
from lp_edge.runtime.landmarks203 import mesh_to_203

CPU = BackendConfig("cpu", threads=1)
STRIDES = (8, 16, 32)


def template(count: int) -> np.ndarray:
    """Points of an upright oval face in -0.5 to 0.5, such that the axis of 106 and 203 landmarks is vertical."""
    angle = np.arange(count) * 2 * np.pi / count
    points = np.round(np.stack([0.45 * np.sin(angle), 0.5 * np.cos(angle)], 1), 4)
    eyes = {106: (33, 35, 40, 39, 87, 89, 94, 93), 203: (0, 6, 12, 18, 24, 30, 36, 42)}[count]
    for i, index in enumerate(eyes):
        points[index] = [-0.2, -0.2] if i < 4 else [0.2, -0.2]
    for index, x in zip({106: (52, 61), 203: (48, 66)}[count], (-0.15, 0.15), strict=True):
        points[index] = [x, 0.2]
    return points.astype(np.float32)


@pytest.fixture(scope="module")
def graphs(toys: Path) -> dict[str, bytes]:
    """The three files' contents. What they compute:

    det_10g: channel R at an anchor's pixel is the score of stride 8 there (anchor 0; half of it for anchor 1), G that of stride 16,
    B of stride 32; every box reaches 1, 2, 3, 4 strides to the left, up, right, down. The outputs are in no order.
    2d106det: ``template(106)`` moved right by the mean of R / 255. landmark: ``template(203)`` + 0.5 moved right by the mean of R
    / 10, among two outputs of other sizes.
    """
    pytest.importorskip("onnx", reason="the toy networks are made with onnx")
    from onnx import TensorProto, helper

    spec = importlib.util.spec_from_file_location("make_toys", toys / "make_toys.py")
    assert spec is not None and spec.loader is not None
    toys_module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toys_module)

    def value(name: str, *shape: int | str) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    g = toys_module.Graph()
    outputs = []
    level = g("Div", g("Add", g("Mul", "input.1", g.const(128.0)), g.const(127.5)), g.const(255.0))
    for channel, stride in enumerate(STRIDES):
        one = g("Gather", level, g.const([channel], np.int64), axis=1)
        ends = (g.const(v, np.int64) for v in ([0, 0], [9999, 9999], [2, 3], [stride, stride]))
        flat = g("Reshape", g("Slice", one, *ends), g.const([-1, 1], np.int64))
        both = g("Concat", flat, g("Mul", flat, g.const(0.5)), axis=1)
        score = g("Reshape", both, g.const([-1, 1], np.int64), output=f"score_{stride}")
        none = g("Mul", score, g.const(0.0))
        g("Add", none, g.const([[1.0, 2.0, 3.0, 4.0]]), output=f"box_{stride}")
        g("Add", none, g.const(np.zeros((1, 10))), output=f"five_{stride}")
        rows = 2 * (640 // stride) ** 2  # as declared in the real file, whatever the input's size
        outputs += [(f"box_{stride}", rows, 4), (f"five_{stride}", rows, 10), (f"score_{stride}", rows, 1)]
    shuffled = [outputs[i] for i in (5, 0, 7, 3, 8, 1, 4, 2, 6)]
    detector = helper.make_graph(
        g.nodes,
        "det",
        [value("input.1", 1, 3, "?", "?")],
        [value(name, rows, columns) for name, rows, columns in shuffled],
        g.constants,
    )

    def points(
        name: str, side: int, count: int, shift: float, offset: float, more: tuple[int, ...]
    ) -> object:
        g = toys_module.Graph()
        red = g("Gather", name, g.const(0, np.int64), axis=1)
        x = g(
            "Mul", g("Reshape", g("ReduceMean", red, axes=[1, 2]), g.const([1, 1], np.int64)), g.const(shift)
        )
        along = np.tile(np.array([[1.0, 0.0]], np.float32), (1, count))
        base = template(count).reshape(1, -1) + offset
        g("Add", g("Mul", x, g.const(along)), g.const(base), output="points")
        for size in more:
            g("Mul", x, g.const(np.ones((1, size))), output=f"o{size}")
        declared = [value(f"o{size}", 1, size) for size in more[:1]] + [value("points", 1, 2 * count)]
        declared += [value(f"o{size}", 1, size) for size in more[1:]]
        return helper.make_graph(g.nodes, "points", [value(name, 1, 3, side, side)], declared, g.constants)

    made = {
        "det_10g.onnx": detector,
        "2d106det.onnx": points("data", 192, 106, 1 / 255, 0.0, ()),
        "landmark.onnx": points("input", 224, 203, 0.1, 0.5, (214, 262)),
    }
    return {
        name: helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
        ).SerializeToString()
        for name, graph in made.items()
    }


@pytest.fixture
def folder(graphs: dict[str, bytes], tmp_path: Path) -> Path:
    for name, data in graphs.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def mesh_in(box: tuple[float, float, float, float]) -> np.ndarray:
    """The canonical face, upright, filling a box."""
    points = load_canonical(builtin_directory() / "canonical.npz").points[:, :2].astype(np.float64)
    low, high = points.min(0), points.max(0)
    unit = (points - low) / (high - low)
    return (unit * [box[2] - box[0], box[3] - box[1]] + box[:2]).astype(np.float32)


# --- detector --------------------------------------------------------------------------------------------------------


def test_scrfd_decodes_every_stride(graphs: dict[str, bytes]) -> None:
    frame = black(512, 512)
    frame[160, 64] = (255, 0, 0)  # stride 8, reaches 8 left, 16 up, 24 right, 32 down
    frame[320, 256] = (0, 204, 0)
    frame[96, 384] = (0, 0, 102)
    with open_runner(graphs["det_10g.onnx"], CPU, name="det_10g.onnx") as runner:
        boxes, scores = ScrfdDetector(runner).detect(frame)
    np.testing.assert_allclose(scores, [1.0, 0.8, 0.4], atol=1e-5)
    wanted = [
        [64 - 8, 160 - 16, 64 + 24, 160 + 32],
        [256 - 16, 320 - 32, 256 + 48, 320 + 64],
        [384 - 32, 96 - 64, 384 + 96, 96 + 128],
    ]
    np.testing.assert_allclose(boxes, wanted)  # the second anchors' equal boxes are suppressed


def test_scrfd_threshold_and_suppression(graphs: dict[str, bytes]) -> None:
    frame = black(512, 512)
    frame[160, 64, 0] = 24  # 0.094: below 0.1
    frame[160, 240, 0] = 27
    frame[320, 256, 0] = 200
    frame[320, 264, 0] = 210  # IoU with its neighbour (33 x 49, 8 px to the side): 25 / 41 > 0.4
    frame[320, 400, 0] = 200
    frame[320, 416, 0] = 210  # 16 px to the side: 17 / 49 < 0.4
    with open_runner(graphs["det_10g.onnx"], CPU, name="det_10g.onnx") as runner:
        boxes, scores = ScrfdDetector(runner).detect(frame)
    np.testing.assert_allclose(sorted(scores * 255), [27, 200, 210, 210], atol=1e-3)
    assert sorted(boxes[:, 0].tolist()) == [232, 256, 392, 408]


@pytest.mark.parametrize(("height", "width", "scale"), [(256, 128, 2.0), (128, 256, 2.0), (1024, 768, 0.5)])
def test_scrfd_boxes_are_in_frame_pixels(
    graphs: dict[str, bytes], height: int, width: int, scale: float
) -> None:
    frame = black(height, width)
    y, x = height // 2, width // 2
    frame[y - 8 : y + 9, x - 8 : x + 9, 2] = 255  # some anchors of stride 32 lie in it
    with open_runner(graphs["det_10g.onnx"], CPU, name="det_10g.onnx") as runner:
        boxes, scores = ScrfdDetector(runner).detect(frame)
    assert scores[0] == pytest.approx(1, abs=1e-5)
    size = boxes[:, 2:] - boxes[:, :2]
    np.testing.assert_allclose(size, [[128 / scale, 192 / scale]] * len(boxes), rtol=1e-6)
    anchors = boxes[:, :2] + np.array([32, 64]) / scale
    assert np.abs(anchors - [x, y]).max() <= 10


def test_scrfd_finds_nothing_in_black(graphs: dict[str, bytes]) -> None:
    with open_runner(graphs["det_10g.onnx"], CPU, name="det_10g.onnx") as runner:
        boxes, scores = ScrfdDetector(runner).detect(black(60, 80))
    assert boxes.shape == (0, 4) and scores.shape == (0,)


# --- points ----------------------------------------------------------------------------------------------------------


def test_106_points(graphs: dict[str, bytes]) -> None:
    frame = black(300, 400)
    frame[:, :, 0] = 51
    with open_runner(graphs["2d106det.onnx"], CPU, name="2d106det.onnx") as runner:
        found = Landmarks106(runner).points(frame, [150, 100, 230, 200])
    # a crop of 1.5 * 100 px around (190, 150), which lies in the frame: its mean R is 51
    wanted = np.array([190, 150]) + (template(106) + np.array([0.2, 0])) * 75
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_203_points_in_a_turned_crop(graphs: dict[str, bytes]) -> None:
    frame = black(400, 400)
    frame[:, :, 0] = 255
    a = np.radians(30)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    start = template(106) @ turn * 100 + [200, 210]
    with open_runner(graphs["landmark.onnx"], CPU, name="landmark.onnx") as runner:
        found = Refiner(runner).points(frame, start)
    # the start spans 0.9 x 1 of 100 px: the crop's side is 150 px, its middle 15 px above the middle of the span
    centre = np.array([200, 210]) + np.array([0, -15]) @ turn
    wanted = centre + (template(203) + np.array([0.1, 0])) @ turn * 150
    np.testing.assert_allclose(found, wanted, atol=0.05)


def test_points_that_are_no_face(graphs: dict[str, bytes]) -> None:
    with (
        open_runner(graphs["landmark.onnx"], CPU, name="landmark.onnx") as runner,
        pytest.raises(NoFaceError),
    ):
        Refiner(runner).points(black(40, 40), np.ones((106, 2)))


@pytest.mark.parametrize(
    ("make", "file", "message"),
    [
        (Landmarks106, "landmark.onnx", "192"),
        (Refiner, "2d106det.onnx", "224"),
    ],
)
def test_wrong_inputs(graphs: dict[str, bytes], make: type, file: str, message: str) -> None:
    with open_runner(graphs[file], CPU, name=file) as runner, pytest.raises(EngineError, match=message):
        make(runner)


def test_wrong_outputs(graphs: dict[str, bytes], toys: Path) -> None:
    from onnx import TensorProto, helper

    def echo(side: int) -> bytes:
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, side, side]) for n in ("x", "y"))
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "echo", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        return bytes(model.SerializeToString())

    frame = black(50, 50)
    with open_runner(echo(512), CPU, name="det") as runner, pytest.raises(EngineError, match="8192"):
        ScrfdDetector(runner).detect(frame)
    with open_runner(echo(192), CPU, name="106") as runner, pytest.raises(EngineError, match="212"):
        Landmarks106(runner).points(frame, [0, 0, 20, 20])
    with open_runner(echo(224), CPU, name="203") as runner, pytest.raises(EngineError, match="406"):
        Refiner(runner).points(frame, template(106) * 20 + 25)
    with open_runner(toys / "face_mesh.onnx", CPU) as runner, pytest.raises(EngineError, match="image uint8"):
        ScrfdDetector(runner)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_whole_path(folder: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    """Two faces; each mesh gets the landmarks of its own."""
    with caplog.at_level(logging.WARNING, "lp_edge"):
        source = open_face_models(folder, CPU, stack)
    assert isinstance(source, InsightFaceLandmarks)
    assert "non-commercial" in caplog.text and "det_10g.onnx" in caplog.text
    frame = black(512, 512)
    frame[160, 64, 0] = 255  # a box from (56, 144) to (88, 192)
    frame[320, 256, 1] = 255  # from (240, 288) to (304, 384)
    for box in ((56.0, 144.0, 88.0, 192.0), (240.0, 288.0, 304.0, 384.0)):
        mesh = mesh_in(box)
        middle, longer = np.array([box[0] + box[2], box[1] + box[3]]) / 2, box[3] - box[1]
        start = middle + template(106) * 0.75 * longer
        np.testing.assert_allclose(source.picture_points(frame, mesh), start, atol=0.2)
        to_crop = source_matrix(start, CropOptions(scale=1.5, vy=-0.1), size=224)
        wanted = transform_points((template(203) + 0.5) * 224, np.linalg.inv(to_crop))
        np.testing.assert_allclose(source.landmarks(frame, mesh), wanted, atol=0.5)


def test_a_face_that_the_detector_misses(
    folder: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_face_models(folder, CPU, stack)
    assert isinstance(source, InsightFaceLandmarks)
    mesh = mesh_in((300, 300, 400, 420))
    for frame in (black(512, 512), black(512, 512)):
        frame[32, 32, 0] = 255  # elsewhere
        caplog.clear()
        np.testing.assert_array_equal(source.picture_points(frame, mesh), mesh_to_203(mesh))
    assert not caplog.text  # said once, not for every frame
    assert np.isfinite(source.landmarks(black(512, 512), mesh)).all()


def test_landmark_alone_starts_from_the_mesh(
    folder: Path, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "det_10g.onnx").unlink()
    (folder / "2d106det.onnx").unlink()
    with caplog.at_level(logging.WARNING, "lp_edge"):
        source = open_face_models(folder, CPU, stack)
    assert isinstance(source, RefinedLandmarks) and not caplog.text
    mesh = mesh_in((100, 100, 200, 230))
    to_crop = source_matrix(mesh_to_203(mesh), CropOptions(scale=1.5, vy=-0.1), size=224)
    wanted = transform_points((template(203) + 0.5) * 224, np.linalg.inv(to_crop))
    np.testing.assert_allclose(source.landmarks(black(400, 400), mesh), wanted, atol=1e-3)
    np.testing.assert_array_equal(source.picture_points(black(400, 400), mesh), mesh_to_203(mesh))


def test_layout_of_pretrained_weights(folder: Path, stack: ExitStack) -> None:
    for file, place in zip(
        FILES, ("insightface/models/buffalo_l", "insightface/models/buffalo_l", "liveportrait"), strict=True
    ):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / file).rename(folder / place / file)
    assert isinstance(open_face_models(folder, CPU, stack), InsightFaceLandmarks)


@pytest.mark.parametrize("missing", [["landmark.onnx"], ["det_10g.onnx"], ["2d106det.onnx"], list(FILES)])
def test_missing_files_are_named(folder: Path, stack: ExitStack, missing: list[str]) -> None:
    for file in missing:
        (folder / file).unlink()
    with pytest.raises(ConfigError) as caught:
        open_face_models(folder, CPU, stack)
    assert caught.value.got == f"the face models in {folder} lack {' and '.join(missing)}"


def test_missing_folder(tmp_path: Path, stack: ExitStack) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        open_face_models(tmp_path / "nowhere", CPU, stack)
