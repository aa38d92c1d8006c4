"""One-euro smoothing on synthetic signals; tracking of painted faces with toy networks."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from lp_edge.errors import ConfigError, TensorError
from lp_edge.runtime import topology
from lp_edge.runtime.faces import FaceDetector, FaceMeshNet
from lp_edge.runtime.tracking import FaceTracker, MeshSmoother, OneEuroConfig, OneEuroFilter, TrackerConfig
from lp_edge.tests.runtime.face_toys import TEMPLATE, ToyDetector, ToyMesh, picture, posed

FPS = 25.0
EYES = [i for pairs in (topology.LID_PAIRS_IMAGE_LEFT, topology.LID_PAIRS_IMAGE_RIGHT) for i in pairs]


def smoothed(frames: npt.NDArray[np.float32], fps: float = FPS) -> npt.NDArray[np.float32]:
    smoother = MeshSmoother()
    return np.stack([smoother(p, i / fps) for i, p in enumerate(frames)])


# --- one-euro ----------------------------------------------------------------------------------------------------


def test_filter_follows_its_formula() -> None:
    config = OneEuroConfig(min_cutoff=1.5, beta=0.7, derivative_cutoff=2.0)
    one = OneEuroFilter(config)
    values = np.random.default_rng(0).normal(size=(20, 1, 1)).astype(np.float32) * 5
    times = np.cumsum(np.random.default_rng(1).uniform(0.01, 0.1, 20))

    def weight(cutoff: float, step: float) -> float:
        return 1 / (1 + 1 / (2 * math.pi * cutoff * step))

    raw = value = float(values[0, 0, 0])
    speed = 0.0
    assert one(values[0], times[0], 2.0)[0, 0] == pytest.approx(value)
    for i in range(1, 20):
        step, x = float(times[i] - times[i - 1]), float(values[i, 0, 0])
        w = weight(2.0, step)
        speed = w * (x - raw) / step + (1 - w) * speed
        w = weight(1.5 + 0.7 * abs(speed) / 2.0, step)
        value, raw = w * x + (1 - w) * value, x
        assert one(values[i], times[i], 2.0)[0, 0] == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_filter_restarts() -> None:
    one = OneEuroFilter()
    assert one([[0.0, 0.0]], 0.0).tolist() == [[0.0, 0.0]]
    assert one([[1.0, 0.0]], 0.04)[0, 0] < 1
    assert one([[7.0, 0.0]], 0.04)[0, 0] == 7  # time stands still
    assert one([[9.0, 0.0]], 0.01)[0, 0] == 9  # time goes back
    one.reset()
    assert one([[3.0, 0.0]], 5.0)[0, 0] == 3
    assert one([[3.0, 0.0], [1.0, 1.0]], 6.0).shape == (2, 2)  # another number of points


def test_filter_keeps_what_it_was_given() -> None:
    one, x = OneEuroFilter(), np.ones((3, 2), np.float32)
    first = one(x, 0.0)
    x[:] = 5
    first[:] = 9
    assert (one(np.ones((3, 2)), 1.0) == 1).all()


def test_jitter_drops_by_half_and_more() -> None:
    size = 200.0
    noise = np.random.default_rng(3).normal(0, 0.0008 * size, (250, 478, 3)).astype(np.float32)
    noise += np.random.default_rng(4).normal(0, 0.0008 * size, (250, 1, 3)).astype(np.float32)
    frames = posed(300, 300, size) + noise
    before, after = frames[25:].std(0).mean(-1), smoothed(frames)[25:].std(0).mean(-1)
    assert (before / after).mean() > 2.0
    for region in topology.REGIONS.values():
        assert before[list(region)].mean() / after[list(region)].mean() > 2.0


@pytest.mark.parametrize("shape", [(0.5, 1.0, 1.0, 0.5), (0.5, 1.0, 0.6, 0.2), (0.35, 0.9, 0.9, 0.35)])
@pytest.mark.parametrize("size", [60.0, 900.0])
def test_blink_of_four_frames_keeps_its_depth(shape: tuple[float, ...], size: float) -> None:
    frames = np.repeat(posed(300, 300, size)[None], 60, 0)
    for k, closed in enumerate(shape):
        for upper, lower in EYES:
            frames[30 + k, upper] += closed * (frames[0, lower] - frames[0, upper])
    raw, out = topology.eye_ratio(frames)[:, 0], topology.eye_ratio(smoothed(frames))[:, 0]
    assert (out[0] - out.min()) / (raw[0] - raw.min()) >= 0.9
    assert abs(int(out.argmin()) - int(raw.argmin())) <= 1
    assert abs(out[45] - raw[45]) < 0.02 * raw[0]


def test_smoothing_does_not_depend_on_resolution() -> None:
    rng = np.random.default_rng(8)
    frames = posed(300, 200, 100) + np.cumsum(rng.normal(0, 1, (40, 478, 3)), 0).astype(np.float32)
    np.testing.assert_allclose(smoothed(frames * 8), smoothed(frames) * 8, rtol=2e-4, atol=0.02)


def test_head_motion_lags_little() -> None:
    t = np.arange(100) / FPS
    frames = np.repeat(posed(300, 200, 100)[None], 100, 0)
    frames[..., 0] += (25 * np.sin(2 * np.pi * t))[:, None]
    assert np.abs(smoothed(frames) - frames).max() < 2.0


def test_filters_refuse_nonsense() -> None:
    for bad in ({"min_cutoff": 0.0}, {"beta": -1.0}, {"derivative_cutoff": math.nan}):
        with pytest.raises(ConfigError, match="one-euro"):
            OneEuroConfig(**bad)


# --- tracking ----------------------------------------------------------------------------------------------------


class Stage:
    """A tracker over toys; ``show`` gives it one frame with these faces."""

    def __init__(self, **config: object) -> None:
        self.detector, self.mesh = ToyDetector(), ToyMesh()
        settings = TrackerConfig(**{"smooth": False, "verify_interval": 0, **config})  # type: ignore[arg-type]
        self.tracker = FaceTracker(FaceDetector(self.detector), FaceMeshNet(self.mesh), settings)
        self.frame = 0

    def show(self, *faces: npt.NDArray[np.float32]):  # type: ignore[no-untyped-def]
        out = self.tracker.update(picture(640, 480, *faces), self.frame / FPS)
        self.frame += 1
        return out


def test_a_moving_face_costs_one_mesh_pass_a_frame() -> None:
    stage = Stage()
    for i in range(50):
        face = posed(200 + 4 * i, 200 + 40 * math.sin(i / 6), 120 + i, 0.4 * math.sin(i / 9))
        found = stage.show(face)
        assert len(found) == 1 and found[0].id == 0 and found[0].state == "tracked" and found[0].visible
        assert found[0].age == i
        np.testing.assert_allclose(found[0].points, face, atol=3.0)
    assert stage.detector.calls == 1
    assert stage.mesh.calls == 2 + 49


def test_smoothed_points_follow() -> None:
    stage = Stage(smooth=True)
    for i in range(50):
        face = posed(200 + 4 * i, 200, 120)
        found = stage.show(face)
        np.testing.assert_allclose(found[0].points, face, atol=4.0)
        np.testing.assert_allclose(found[0].box[:2], found[0].points[:, :2].min(0))
    assert stage.detector.calls == 1


def test_a_jump_is_repaired_in_the_same_frame() -> None:
    stage = Stage()
    for _ in range(5):
        stage.show(posed(200, 200, 120))
    found = stage.show(posed(290, 220, 130))  # three quarters of its size away
    assert [(f.id, f.state, f.age) for f in found] == [(0, "reacquired", 0)]
    np.testing.assert_allclose(found[0].points, posed(290, 220, 130), atol=3.0)
    assert stage.show(posed(292, 220, 130))[0].state == "tracked"
    found = stage.show(posed(292, 220, 220))  # almost twice as large
    assert [(f.id, f.state) for f in found] == [(0, "reacquired")]
    found = stage.show(posed(292, 220, 220, 0.9))  # turned by 52 degrees
    assert [(f.id, f.state) for f in found] == [(0, "reacquired")]


def test_the_filter_restarts_when_a_face_is_found_again() -> None:
    stage = Stage(smooth=True)
    for _ in range(5):
        stage.show(posed(200, 200, 120))
    found = stage.show(posed(290, 220, 130))
    np.testing.assert_allclose(found[0].points, posed(290, 220, 130), atol=3.0)


def test_a_lost_face_keeps_its_place_and_comes_back_under_its_id() -> None:
    stage = Stage()
    for _ in range(5):
        stage.show(posed(200, 200, 120))
    for i in range(20):
        found = stage.show()
        assert [(f.id, f.state, f.visible, f.score) for f in found] == [(0, "lost", False, 0.0)]
        np.testing.assert_allclose(found[0].points, posed(200, 200, 120), atol=3.0)
        assert stage.detector.calls >= 2 + i  # looked for in every frame
    found = stage.show(posed(230, 190, 110))
    assert [(f.id, f.state) for f in found] == [(0, "reacquired")]
    assert stage.show(posed(232, 190, 110))[0].state == "tracked"


def test_a_face_far_away_or_late_is_another_one() -> None:
    stage = Stage()
    stage.show(posed(150, 200, 100))
    found = stage.show(posed(500, 200, 100))
    assert [(f.id, f.state) for f in found] == [(1, "tracked")]
    stage = Stage()
    stage.show(posed(150, 200, 100))
    states = [[f.state for f in stage.show()] for _ in range(60)]
    assert states[48] == ["lost"] and states[51] == []
    assert [f.id for f in stage.show(posed(150, 200, 100))] == [1]


def test_a_cover_of_a_few_frames_needs_no_detector() -> None:
    stage = Stage()
    stage.show(posed(200, 200, 120))
    stage.detector.deaf = True
    assert stage.show()[0].state == "lost"
    assert stage.show()[0].state == "lost"
    assert stage.show(posed(205, 200, 120))[0].state == "reacquired"
    stage.mesh.score = 0.6  # enough to go on, not enough to come back without the detector
    assert stage.show(posed(205, 200, 120))[0].state == "tracked"
    stage.show()
    assert stage.show(posed(205, 200, 120))[0].state == "lost"


def test_several_faces_keep_their_ids() -> None:
    stage = Stage(max_faces=3)
    for i in range(60):
        faces = {
            0: posed(120 + 5 * i, 130, 140, 0.2),
            1: posed(520 - 6 * i, 330, 110, -0.2),
            2: posed(560, 100 + 2 * i, 70),
        }
        order = [list(faces.values())[k] for k in np.random.default_rng(i).permutation(3)]
        found = stage.show(*order)
        assert [f.id for f in found] == [0, 1, 2]
        for face in found:
            np.testing.assert_allclose(face.points, faces[face.id], atol=3.0)
    assert stage.detector.calls == 1


def test_only_the_largest_faces_are_taken() -> None:
    faces = [posed(100, 240, 80), posed(300, 240, 160), posed(520, 240, 120)]
    assert [f.size for f in Stage(max_faces=1).show(*faces)] == pytest.approx([160], rel=0.05)
    assert [f.size for f in Stage(max_faces=2).show(*faces)] == pytest.approx([160, 120], rel=0.05)
    assert Stage().show() == []


def test_a_new_face_is_seen_within_the_interval() -> None:
    stage = Stage(max_faces=2, detect_interval=6)
    for _ in range(4):
        assert len(stage.show(posed(200, 240, 120))) == 1
    calls = stage.detector.calls
    ids = [[f.id for f in stage.show(posed(200, 240, 120), posed(450, 240, 120))] for _ in range(7)]
    assert ids[0] == [0] and ids[-1] == [0, 1]
    assert stage.detector.calls - calls <= 2
    calls = stage.detector.calls
    for _ in range(12):
        stage.show(posed(200, 240, 120), posed(450, 240, 120))
    assert stage.detector.calls == calls  # full: no more searching


def test_two_tracks_do_not_stay_on_one_face() -> None:
    stage = Stage(max_faces=2)
    for x in range(200, 330, 6):  # one walks towards the other and is then hidden
        stage.show(posed(x, 240, 100), posed(450, 240, 100))
    for _ in range(3):
        found = stage.show(posed(450, 240, 100))
        assert [f.id for f in found if f.visible] == [1]


def test_first_frame_is_searched_thoroughly() -> None:
    stage = Stage()
    found = stage.show(posed(300, 240, 150, math.pi / 2))
    assert len(found) == 1
    np.testing.assert_allclose(found[0].points, posed(300, 240, 150, math.pi / 2), atol=3.0)
    assert stage.detector.calls == 5
    assert stage.show(posed(300, 240, 150, math.pi / 2 + 0.1))[0].state == "tracked"


def test_a_face_that_fills_the_frame_later_is_found_by_a_thorough_search() -> None:
    stage = Stage(search_interval=10)
    stage.detector.inside = True
    for _ in range(5):
        assert stage.show() == []
    found = [stage.show(posed(320, 240, 560)) for _ in range(10)]
    assert found[0] == [] and len(found[-1]) == 1


def test_a_drifted_track_is_given_up() -> None:
    stage = Stage(verify_interval=5)
    stage.show(posed(200, 200, 120))
    stage.mesh.score = 0.7
    stage.detector.deaf = True
    states = [stage.show(posed(200, 200, 120))[0].state for _ in range(6)]
    assert states == ["tracked"] * 4 + ["lost"] * 2
    stage = Stage(verify_interval=5)
    stage.show(posed(200, 200, 120))
    stage.detector.deaf = True
    assert {stage.show(posed(200, 200, 120))[0].state for _ in range(12)} == {
        "tracked"
    }  # the mesh network is sure


def test_a_pass_with_nothing_to_follow_does_not_run_the_mesh() -> None:
    stage = Stage()
    stage.show()
    stage.show()
    assert stage.mesh.calls == 0


def test_reset_starts_over() -> None:
    stage = Stage()
    stage.show(posed(200, 200, 120))
    stage.tracker.reset()
    found = stage.show(posed(450, 200, 120))
    assert [(f.id, f.state, f.age) for f in found] == [(0, "tracked", 0)]


def test_wrong_frames_and_settings_are_refused() -> None:
    stage = Stage()
    with pytest.raises(TensorError, match="uint8"):
        stage.tracker.update(np.zeros((4, 4), np.uint8), 0.0)
    for bad in (
        {"max_faces": 0},
        {"score": 0.9, "sure": 0.5},
        {"growth": 1.0},
        {"verify_interval": -1},
        {"turn": 0.0},
    ):
        with pytest.raises(ConfigError):
            TrackerConfig(**bad)  # type: ignore[arg-type]


def test_template_looks_like_a_face() -> None:
    assert TEMPLATE.shape == (478, 3) and np.isfinite(TEMPLATE).all()
