"""Detection, crops and mesh inference, with painted faces and toy networks."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lp_edge.engines.runner import Array
from lp_edge.errors import ConfigError, EngineError, NoFaceError, TensorError
from lp_edge.runtime import topology
from lp_edge.runtime.faces import (
    CROP_FACTOR,
    CropTransform,
    DetectorConfig,
    Face,
    FaceBox,
    FaceDetector,
    FaceMeshNet,
    box_of_points,
    confirm_faces,
    crop_from_box,
    crop_from_points,
    iou_matrix,
    largest,
    left_to_right,
    locate_faces,
    mesh_of_boxes,
    no_face_error,
    non_maximum_suppression,
    select_faces,
)
from lp_edge.tests.runtime.face_toys import EYES, ToyDetector, ToyMesh, picture, posed

coordinate = st.floats(-3000, 3000)
transforms = st.builds(
    CropTransform,
    st.tuples(coordinate, coordinate),
    st.floats(8, 4000),
    st.floats(-math.pi, math.pi),
    st.integers(16, 512),
)


def face_box(points: npt.NDArray[np.float32], score: float = 0.9) -> FaceBox:
    return FaceBox(box_of_points(points), score, topology.five_points(points))


# --- boxes -------------------------------------------------------------------------------------------------------


def test_iou() -> None:
    boxes = [[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 9]]
    found = iou_matrix(boxes, boxes)
    assert found.shape == (4, 4)
    np.testing.assert_allclose(np.diag(found), [1, 1, 1, 0], atol=1e-6)
    assert found[0, 1] == pytest.approx(1 / 3) and found[0, 2] == 0
    assert iou_matrix(np.zeros((0, 4)), boxes).shape == (0, 4)


box = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30), st.integers(1, 30)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@settings(deadline=None)
@given(st.lists(st.tuples(box, st.integers(0, 1000)), max_size=25), st.floats(0.05, 0.95))
def test_suppression_keeps_best_and_covers_the_rest(
    found: list[tuple[tuple[int, ...], int]], iou: float
) -> None:
    boxes = np.array([b for b, _ in found], np.float32).reshape(-1, 4)
    scores = np.array([s for _, s in found], np.float32)
    kept = non_maximum_suppression(boxes, scores, iou)
    overlap = iou_matrix(boxes, boxes)
    assert list(scores[kept]) == sorted(scores[kept], reverse=True)
    for position, i in enumerate(kept):
        assert all(overlap[i, j] <= iou for j in kept[:position])
    for i in set(range(len(boxes))) - set(kept):
        assert any(overlap[i, j] > iou and scores[j] >= scores[i] for j in kept)


# --- crops -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(transforms, st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=1, max_size=9))
def test_points_go_to_the_crop_and_back(
    transform: CropTransform, points: list[tuple[float, float, float]]
) -> None:
    p = np.array(points, np.float32)
    there = transform.to_crop(p)
    assert there.dtype == np.float32 and there.shape == p.shape
    np.testing.assert_allclose(transform.to_frame(there), p, atol=max(0.02, 2e-3 * 4000 * 1e-3))
    np.testing.assert_allclose(
        there[:, :2], p[:, :2] @ transform.matrix[:, :2].T + transform.matrix[:, 2], rtol=1e-3, atol=0.05
    )
    np.testing.assert_allclose(there[:, 2], p[:, 2] * transform.scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(transform.to_crop(p[:, :2]), there[:, :2])
    np.testing.assert_allclose(transform.to_crop(transform.centre), transform.size / 2, atol=0.05)


@pytest.mark.parametrize("side", [40.0, 128.0, 200.0, 260.0, 419.0, 700.0, 1500.0])
@pytest.mark.parametrize("roll", [0.0, 0.5, -2.0])
def test_pixels_go_where_points_go(side: float, roll: float) -> None:
    """A soft blob in the frame lies in the crop where ``to_crop`` says, at every reduction."""
    transform = CropTransform((401.3, 298.7), side, roll, 128)
    spot = np.array([transform.centre]) + np.array([[0.21, -0.13]]) * side
    y, x = np.mgrid[0:600, 0:800]
    sigma = min(side / 14, 40)
    blob = 250 * np.exp(-((x - spot[0, 0]) ** 2 + (y - spot[0, 1]) ** 2) / (2 * sigma**2))
    crop = transform.apply(np.repeat(blob[..., None], 3, 2).astype(np.uint8))
    assert crop.shape == (128, 128, 3) and crop.dtype == np.uint8
    weight = np.clip(crop[..., 0].astype(float) - 60, 0, None)
    v, u = np.mgrid[0:128, 0:128]
    found = np.array([(u * weight).sum(), (v * weight).sum()]) / weight.sum()
    np.testing.assert_allclose(found, transform.to_crop(spot)[0], atol=0.15)


def test_strong_reduction_does_not_alias() -> None:
    y, x = np.mgrid[0:1024, 0:1024]
    board = np.repeat((((x + y) % 2) * 255).astype(np.uint8)[..., None], 3, 2)
    crop = CropTransform((512.0, 512.0), 980.0, 0.3, 128).apply(board)[20:-20, 20:-20]
    plain = cv2.warpAffine(board, CropTransform((512.0, 512.0), 980.0, 0.3, 128).matrix, (128, 128))[
        20:-20, 20:-20
    ]
    assert crop.std() < 3 and plain.std() > 40
    assert abs(crop.mean() - 127.5) < 3


@settings(deadline=None, max_examples=40)
@given(st.floats(-300, 700), st.floats(-300, 700), st.floats(20, 3000), st.floats(-3, 3))
def test_crops_over_the_border_are_black_there(x: float, y: float, side: float, roll: float) -> None:
    transform = CropTransform((x, y), side, roll, 64)
    white = np.full((401, 399, 3), 255, np.uint8)
    crop = transform.apply(white)[..., 0]
    v, u = np.mgrid[0:64, 0:64]
    at = transform.to_frame(np.stack([u, v], -1).reshape(-1, 2)).reshape(64, 64, 2)
    margin = 3 * max(1.0, side / 64)
    size = np.array([399, 401])
    inside = ((at > margin) & (at < size - margin)).all(-1)
    outside = ((at < -margin) | (at > size + margin)).any(-1)
    assert (crop[inside] == 255).all() and (crop[outside] == 0).all()


@settings(deadline=None)
@given(st.floats(-500, 500), st.floats(-500, 500), st.floats(5, 900), st.floats(-3.1, 3.1))
def test_crop_from_points_is_level_centred_and_half_again_as_large(
    x: float, y: float, size: float, roll: float
) -> None:
    points = posed(x, y, size, roll)
    transform = crop_from_points(points, 160)
    inside = transform.to_crop(points)
    assert float(topology.eye_roll(inside)) == pytest.approx(0, abs=1e-3)
    low, high = inside[:, :2].min(0), inside[:, :2].max(0)
    np.testing.assert_allclose((low + high) / 2, 80, atol=0.05)
    assert float((high - low).max()) == pytest.approx(160 / CROP_FACTOR, rel=1e-3)
    assert math.remainder(transform.roll - roll, 2 * math.pi) == pytest.approx(0, abs=1e-3)


@settings(deadline=None)
@given(st.floats(40, 900), st.floats(-math.pi, math.pi))
def test_crop_from_box_is_near_crop_from_points(size: float, roll: float) -> None:
    points = posed(400, 300, size, roll)
    right, guess = crop_from_points(points, 128), crop_from_box(face_box(points), 128)
    assert math.remainder(guess.roll - right.roll, 2 * math.pi) == pytest.approx(0, abs=0.02)
    assert guess.side == pytest.approx(right.side, rel=0.12)
    assert math.dist(guess.centre, right.centre) < 0.12 * size


def test_crop_from_box_needs_no_more_than_a_box_of_the_right_shape() -> None:
    points = posed(100, 100, 80)
    upright = crop_from_box(face_box(points), 128)
    assert upright.side == pytest.approx(CROP_FACTOR * 80, rel=1e-3)
    assert upright.centre == pytest.approx((100, 100), abs=0.01)


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(ConfigError, match="side above 0"):
        crop_from_points(np.zeros((478, 3)), 128)
    with pytest.raises(ConfigError, match="finite"):
        crop_from_points(np.full((478, 3), np.nan), 128)
    with pytest.raises(ConfigError, match="finite"):
        CropTransform((0, 0), -3, 0, 128)


# --- detection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height"), [(640, 480), (333, 517), (1280, 720), (1999, 1501), (90, 120), (64, 64)]
)
def test_detections_come_back_in_frame_pixels(width: int, height: int) -> None:
    face = posed(0.55 * width, 0.48 * height, 0.6 * min(width, height), 0.3)
    runner = ToyDetector()
    found = FaceDetector(runner).detect(picture(width, height, face))
    assert len(found) == 1 and runner.calls == 1
    assert found[0].score == pytest.approx(0.9)
    tolerance = 0.02 * min(width, height)
    np.testing.assert_allclose(found[0].box, box_of_points(face), atol=tolerance)
    np.testing.assert_allclose(found[0].points, topology.five_points(face), atol=tolerance)
    assert iou_matrix(found[0].box, box_of_points(face))[0, 0] > 0.9


def test_detections_are_thresholded_and_sorted() -> None:
    frame = picture(640, 480, posed(150, 200, 120), posed(430, 220, 200))
    assert len(FaceDetector(ToyDetector()).detect(frame)) == 2
    assert FaceDetector(ToyDetector(), DetectorConfig(score=0.95)).detect(frame) == []
    big = FaceDetector(ToyDetector(), DetectorConfig(smallest=150)).detect(frame)
    assert len(big) == 1 and big[0].box[0] > 300
    loose = FaceDetector(ToyDetector(), DetectorConfig(iou=1.0)).detect(frame)
    assert [round(f.score, 3) for f in loose] == [0.9, 0.9, 0.6, 0.6]


def first_stage(frame: npt.NDArray[np.uint8], runner: ToyDetector) -> tuple[int, list[FaceBox]]:
    for number, found in enumerate(FaceDetector(runner).stages(frame)):
        if found:
            return number, found
    return -1, []


def test_stages_find_faces_that_exceed_the_frame() -> None:
    runner = ToyDetector()
    runner.inside = True
    face = posed(150, 140, 340)
    number, found = first_stage(picture(300, 280, face), runner)
    assert number == 1 and runner.calls == 2
    np.testing.assert_allclose(found[0].box, box_of_points(face), atol=5)
    large = posed(1500, 1400, 3400)
    number, found = first_stage(picture(3000, 2800, large), runner)
    assert number == 1
    np.testing.assert_allclose(found[0].box, box_of_points(large), atol=60)


@pytest.mark.parametrize("roll", [math.pi / 2, -math.pi / 2, math.pi])
def test_stages_find_turned_faces(roll: float) -> None:
    runner = ToyDetector()
    face = posed(260, 220, 150, roll)
    number, found = first_stage(picture(500, 400, face), runner)
    assert number == 2 and runner.calls == 5 and len(found) == 1
    np.testing.assert_allclose(found[0].box, box_of_points(face), atol=3)
    np.testing.assert_allclose(found[0].points, topology.five_points(face), atol=3)


def test_stages_find_small_faces_in_large_frames() -> None:
    runner = ToyDetector()
    face = posed(2200, 700, 60)
    number, found = first_stage(picture(2500, 1400, face), runner)
    assert number >= 2 and len(found) == 1
    np.testing.assert_allclose(found[0].box, box_of_points(face), atol=4)


def test_tiles_are_limited() -> None:
    runner = ToyDetector()
    frame = np.zeros((3000, 4000, 3), np.uint8)
    assert first_stage(frame, runner) == (-1, [])
    assert runner.calls <= 5 + DetectorConfig().max_tiles
    assert len(set(runner.shapes)) <= 8


def test_detector_refuses_what_is_no_frame() -> None:
    detector = FaceDetector(ToyDetector())
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(TensorError, match=r"uint8 \[H, W, 3\]"):
            detector.detect(wrong)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="boxes"):
        FaceDetector(ToyMesh())
    for bad in ({"longest": 100}, {"score": 0.0}, {"iou": 2.0}, {"enlarged": 10_000}):
        with pytest.raises(ConfigError):
            DetectorConfig(**bad)  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_are_no_detections() -> None:
    class Broken(ToyDetector):
        def answer(self, image: npt.NDArray[np.uint8]) -> dict[str, Array]:
            out = super().answer(image)
            np.asarray(out["boxes"])[:, 1:] = np.nan
            return out

    assert FaceDetector(Broken()).detect(picture(320, 320, posed(160, 160, 150))) == []


# --- mesh ------------------------------------------------------------------------------------------------------------


def test_mesh_points_come_back_in_frame_pixels() -> None:
    faces = [posed(150, 200, 120, 0.4), posed(430, 220, 200, -0.3), posed(330, 80, 70)]
    net = FaceMeshNet(ToyMesh(), max_batch=2)
    crops = [crop_from_points(f, net.size) for f in faces]
    points, scores = net.run(picture(640, 480, *faces), crops)
    assert points.shape == (3, 478, 3) and points.dtype == np.float32 and scores.shape == (3,)
    np.testing.assert_allclose(points, np.stack(faces), atol=2.0)
    assert (scores > 0.9).all()
    assert net.runner.calls == 2 and net.runner.crops == 3  # type: ignore[attr-defined]


def test_no_more_crops_are_given_at_once_than_an_engine_was_built_for() -> None:
    class Engine(ToyMesh):
        max_batch = 2

    faces = [posed(150 + 130 * i, 200, 100) for i in range(3)]
    net = FaceMeshNet(Engine())
    net.run(picture(640, 480, *faces), [crop_from_points(f, net.size) for f in faces])
    assert [shape[0] for shape in net.runner.shapes] == [2, 1]  # type: ignore[attr-defined]


def test_networks_with_a_fixed_batch_are_filled_up() -> None:
    face = posed(150, 150, 120)
    net = FaceMeshNet(ToyMesh(batch=2))
    points, scores = net.run(picture(300, 300, face), [crop_from_points(face, net.size)] * 3)
    np.testing.assert_allclose(points, np.stack([face] * 3), atol=2.0)
    assert len(scores) == 3 and net.runner.crops == 4  # type: ignore[attr-defined]
    assert net.run(picture(300, 300, face), [])[0].shape == (0, 478, 3)


def test_mesh_refuses_what_does_not_fit() -> None:
    net, frame = FaceMeshNet(ToyMesh()), picture(64, 64)
    with pytest.raises(TensorError, match="128 px"):
        net.run(frame, [CropTransform((0, 0), 10, 0, 64)])
    with pytest.raises(TensorError, match="uint8"):
        net.run(frame[..., 0], [])
    with pytest.raises(EngineError, match="score"):
        FaceMeshNet(ToyDetector())

    class Broken(ToyMesh):
        def answer(self, image: npt.NDArray[np.uint8]) -> dict[str, Array]:
            out = super().answer(image)
            np.asarray(out["points"])[0, 7] = np.nan
            return out

    with pytest.raises(EngineError, match="not finite"):
        FaceMeshNet(Broken()).run(frame, [CropTransform((32, 32), 64, 0, 128)])


def test_second_pass_repairs_a_rough_box() -> None:
    face = posed(300, 250, 160, 0.5)
    rough = face_box(posed(320, 240, 190, 0.3))
    net = FaceMeshNet(ToyMesh())
    points, scores = mesh_of_boxes(picture(600, 500, face), [rough], net)
    np.testing.assert_allclose(points[0], face, atol=2.0)
    assert scores[0] > 0.9
    nothing, low = mesh_of_boxes(picture(600, 500), [rough], net)
    assert low[0] == 0 and nothing.shape == (1, 478, 3)


def test_locate_faces_numbers_the_largest_first_and_drops_doubles() -> None:
    faces = [posed(150, 200, 120, 0.4), posed(430, 220, 200, -0.3)]
    frame = picture(640, 480, *faces)
    detector = FaceDetector(ToyDetector(), DetectorConfig(iou=0.99))  # doubles survive in the detector
    found = locate_faces(frame, detector, FaceMeshNet(ToyMesh()))
    assert [f.id for f in found] == [0, 1] and found[0].size > found[1].size
    np.testing.assert_allclose(found[0].points, faces[1], atol=2.0)
    np.testing.assert_allclose(found[0].box, box_of_points(found[0].points))
    assert len(locate_faces(frame, detector, FaceMeshNet(ToyMesh()), limit=1)) == 1


def test_what_the_mesh_network_rejects_is_no_face() -> None:
    mesh = ToyMesh()
    mesh.score = 0.7
    frame = picture(640, 480, posed(150, 200, 120))
    assert locate_faces(frame, FaceDetector(ToyDetector()), FaceMeshNet(mesh), stages=None) == []
    assert len(locate_faces(frame, FaceDetector(ToyDetector()), FaceMeshNet(mesh), score=0.6)) == 1


def test_error_without_a_face_says_what_to_do() -> None:
    error = no_face_error(np.zeros((720, 1280, 3), np.uint8))
    assert isinstance(error, NoFaceError)
    assert "1280 x 720" in str(error) and "40 px" in str(error) and "larger" in error.remedy


# --- choosing --------------------------------------------------------------------------------------------------------


def made(x: float, size: float) -> Face:
    p = posed(x, 100, size)
    return Face(int(x), p, 0.9, box_of_points(p))


def test_policies() -> None:
    faces = [made(300, 50), made(100, 80), made(200, 60)]
    assert [f.id for f in largest(faces)] == [100, 200, 300]
    assert [f.id for f in left_to_right(faces)] == [100, 200, 300]
    assert [f.id for f in select_faces(faces, "all")] == [100, 200, 300]
    assert [f.id for f in select_faces(faces[::2], "largest")] == [200]
    assert [f.id for f in select_faces(faces, "2")] == [300]
    assert select_faces([], "largest") == [] == select_faces([], "4")
    with pytest.raises(NoFaceError, match="0 to 2"):
        select_faces(faces, "3")
    for unknown in ("smallest", "-1", "1.5", ""):
        with pytest.raises(ConfigError, match="largest, all, left-right"):
            select_faces(faces, unknown)


def test_painted_eyes_are_apart_as_the_template_says() -> None:
    p = posed(0, 0, 100)
    assert np.linalg.norm(p[473, :2] - p[468, :2]) == pytest.approx(100 * EYES)
    assert float(np.ptp(p[:, :2], axis=0).max()) == pytest.approx(100, rel=1e-3)


def test_of_doubtful_faces_only_the_best_counts() -> None:
    frame = picture(640, 480, posed(150, 200, 120), posed(430, 220, 200))
    doubtful = FaceDetector(ToyDetector(), DetectorConfig(score=0.95, weak=0.5))
    assert len(locate_faces(frame, doubtful, FaceMeshNet(ToyMesh()))) == 1


def test_a_mesh_within_another_is_dropped() -> None:
    face = posed(300, 240, 200)

    class Nested(ToyMesh):
        def answer(self, image: npt.NDArray[np.uint8]) -> dict[str, Array]:
            out = super().answer(image)
            if len(image) > 1:  # the second box gives a small mesh inside the first one
                points = np.asarray(out["points"])
                points[1] = points[1].mean(0) + (points[1] - points[1].mean(0)) * 0.3
            return out

    boxes = [face_box(face, 0.9), face_box(posed(300, 240, 190), 0.8)]
    found = confirm_faces(picture(600, 480, face), boxes, FaceMeshNet(Nested()))
    assert len(found) == 1 and found[0][1] == pytest.approx(0.9 * 0.95**8)
    np.testing.assert_allclose(found[0][0].points, face, atol=2.0)
    assert confirm_faces(picture(600, 480, face), [], FaceMeshNet(ToyMesh())) == []
