"""The face-mesh training: topology, augmentation that moves labels exactly, resuming, the exported contract."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from lp_edge.export.training import augment, face_mesh_data, face_topology

SHARED = Path(os.environ.get("LP_EDGE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FACES = SHARED / "faces"
needs_faces = pytest.mark.skipif(
    not (FACES / "mesh.json").is_file(), reason=f"{FACES} with mesh.json is not here (set LP_EDGE_SHARED)"
)


def _dots() -> np.ndarray:
    """478 points on a 24 x 20 lattice inside a 240 px picture, eyes level, mildly curved in depth."""
    i = np.arange(478)
    xy = np.stack([40 + (i % 24) * 7.0, 45 + (i // 24) * 7.5], 1)
    z = ((xy[:, :1] - 120) ** 2 + (xy[:, 1:] - 120) ** 2) / 400 - 10
    return np.concatenate([xy, z], 1).astype(np.float32)


def _faces(count: int) -> face_mesh_data.FaceSet:
    rng = np.random.default_rng(5)
    shapes = np.stack([_dots() + rng.normal(0, 1.0, (478, 3)) for _ in range(count)]).astype(np.float32)
    images = [rng.integers(0, 256, (240, 240, 3), dtype=np.uint8) for _ in range(count)]
    return face_mesh_data.FaceSet(images, shapes, np.full(count, 1 / count))


def test_mirror_is_an_involution_without_strays() -> None:
    perm = face_topology.mirror_permutation()
    assert perm.shape == (478,)
    assert np.array_equal(perm[perm], np.arange(478))
    assert np.count_nonzero(perm == np.arange(478)) == 28  # the points of the middle line


@pytest.mark.parametrize(
    ("right", "left"),
    [(33, 263), (133, 362), (159, 386), (145, 374), (61, 291), (234, 454), (70, 300), (468, 473)],
)
def test_mirror_pairs_named_points(right: int, left: int) -> None:
    perm = face_topology.mirror_permutation()
    assert perm[right] == left
    assert perm[left] == right


def test_mirror_keeps_groups_together() -> None:
    perm = face_topology.mirror_permutation()
    for a, b in (
        (face_topology.RIGHT_EYE, face_topology.LEFT_EYE),
        (face_topology.RIGHT_BROW, face_topology.LEFT_BROW),
        (face_topology.RIGHT_IRIS, face_topology.LEFT_IRIS),
        (face_topology.INNER_LIPS, face_topology.INNER_LIPS),
        (face_topology.OUTER_LIPS, face_topology.OUTER_LIPS),
        (face_topology.CONTOUR, face_topology.CONTOUR),
    ):
        assert {int(perm[i]) for i in a} == set(b)
    # In an iris, mirroring swaps the points at larger and smaller x; top and bottom stay.
    assert [int(perm[i]) for i in face_topology.RIGHT_IRIS] == [473, 476, 475, 474, 477]


@needs_faces
def test_mirror_follows_from_the_labels() -> None:
    labels = np.load(FACES / "mesh_landmarks.npy").astype(np.float64)
    yaw = np.abs(labels[:, 473, 2] - labels[:, 468, 2])
    frontal = labels[np.argsort(yaw)[:300]]
    shapes = frontal - frontal.mean(1, keepdims=True)
    assert np.array_equal(face_topology.derive_mirror(shapes.mean(0)), face_topology.mirror_permutation())


def test_an_asymmetric_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="no symmetric pairing"):
        face_topology.derive_mirror(np.random.default_rng(0).normal(size=(478, 3)))


def test_crop_frame_levels_centres_and_sizes() -> None:
    points = _dots()
    c, s = np.cos(0.5), np.sin(0.5)
    turned = points.copy()
    turned[:, :2] = points[:, :2] @ np.array([[c, s], [-s, c]], np.float32) * 1.7 + [31, -12]
    roll, centre, side = augment.face_frame(turned)
    matrix = augment.crop_matrix(centre, side, roll, 160)
    crop = turned[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    base_roll, *_ = augment.face_frame(points)
    assert roll - base_roll == pytest.approx(0.5, abs=1e-5)
    low, high = crop.min(0), crop.max(0)
    assert (low + high) / 2 == pytest.approx([80, 80], abs=1e-3)
    assert float((high - low).max()) == pytest.approx(160 / 1.5, abs=1e-3)


def _marked(points: np.ndarray, chosen: list[int]) -> np.ndarray:
    """A picture that is bright in a small Gaussian spot at every chosen point."""
    y, x = np.mgrid[:240, :240].astype(np.float32)
    out = np.zeros((240, 240), np.float32)
    for i in chosen:
        out = np.maximum(out, np.exp(-((x - points[i, 0]) ** 2 + (y - points[i, 1]) ** 2) / (2 * 1.8**2)))
    return np.repeat((out * 255).astype(np.uint8)[..., None], 3, 2)


def test_geometry_moves_labels_with_the_picture() -> None:
    points = _dots()
    # Spots far apart; the mirror renames points, so spots are compared as a set.
    chosen = [r * 24 + k for r in (2, 7, 12, 17) for k in (3, 9, 15, 20)]
    image = _marked(points, chosen)
    config = augment.AugmentConfig(
        mirror=0.5,
        elastic=1.0,
        turn=1.0,
        eyes=0.0,
        mouth=0.0,
        gaze=0.0,
        shift=0.02,
        scale_low=1.0,
        label_origin=0.0,
    )
    perm = face_topology.mirror_permutation()
    worst, moved = [], []
    for seed in range(30):
        crop, labels = augment.random_geometry(np.random.default_rng(seed), image, points, 200, config)
        plain, _ = augment.random_geometry(
            np.random.default_rng(seed),
            image,
            points,
            200,
            augment.AugmentConfig(elastic=0, turn=0, eyes=0, mouth=0, gaze=0),
        )
        moved.append(float(np.abs(crop.astype(int) - plain).mean()))
        mask = crop[..., 0].astype(np.float32)
        candidates = labels[[*chosen, *perm[chosen]], :2]
        found = []
        for label in candidates:
            if not (12 < label[0] < 188 and 12 < label[1] < 188):
                continue
            x, y = np.round(label).astype(int)
            window = mask[y - 4 : y + 5, x - 4 : x + 5]
            if window.max() < 180:
                continue
            yy, xx = np.mgrid[y - 4 : y + 5, x - 4 : x + 5]
            w = np.where(window > 30, window, 0)
            found.append(np.hypot((xx * w).sum() / w.sum() - label[0], (yy * w).sum() / w.sum() - label[1]))
        assert len(found) >= 8
        worst.append(float(np.median(found)))
    assert max(moved) > 0.5  # the pictures were deformed at all
    assert max(worst) < 0.35


def test_mirroring_keeps_the_origin_of_the_labels() -> None:
    """Labels half a pixel right of the marked spots stay half a (source) pixel right of them in mirrored crops."""
    points = _dots()
    points[[33, 133, 362, 263], :2] = [[70, 90], [100, 90], [140, 90], [170, 90]]  # level eyes
    image = _marked(points, [7 * 24 + 9])
    still = augment.AugmentConfig(
        elastic=0, turn=0, eyes=0, mouth=0, gaze=0, shear=0, shift=0, roll_sigma=0, roll_uniform=0
    )
    shifted = points + np.array([0.5, 0, 0], np.float32)
    for mirror in (0.0, 1.0):
        config = dataclasses.replace(still, mirror=mirror, scale_low=1.0, scale_high=1.0)
        crop, labels = augment.random_geometry(np.random.default_rng(1), image, shifted, 200, config)
        weight = crop[..., 0].astype(float)
        spot = (weight.sum(0) @ np.arange(200)) / weight.sum()
        perm = face_topology.mirror_permutation()
        index = int(perm[7 * 24 + 9]) if mirror else 7 * 24 + 9
        unit = 200 / augment.face_frame(shifted)[2]
        assert labels[index, 0] - spot == pytest.approx(0.5 * unit, abs=0.12)


def test_pushing_the_iris_moves_labels_and_spares_the_rest() -> None:
    field = np.zeros((160, 160, 2), np.float32)
    centre, shift = np.array([80, 70], np.float32), np.array([3, -1], np.float32)
    augment._push(field, centre, (7.0, 6.0), shift, 0.3)
    moved = augment.warp_points(np.stack([centre, np.array([20, 120], np.float32)]), field)
    # The field is read at the new place, so the move is a little short of the shift.
    assert moved[0] - centre == pytest.approx(shift, abs=0.5)
    assert np.array_equal(moved[1], [20, 120])


def test_fixed_point_inverts_the_field() -> None:
    rng = np.random.default_rng(3)
    coarse = rng.normal(0, 2.0, (7, 7, 2)).astype(np.float32)
    field = cv2.resize(coarse, (160, 160), interpolation=cv2.INTER_CUBIC)
    augment._bulge(field, np.array([60, 60], np.float32), (14.0, 8.0), (0.0, 0.4), 0.2)
    xy = rng.uniform(20, 140, (500, 2)).astype(np.float32)
    q = augment.warp_points(xy, field, 20)
    assert np.abs(q + augment._at(field, q) - xy).max() < 1e-2
    quick = augment.warp_points(xy, field)
    assert np.abs(quick - q).max() < 0.1
    assert np.abs(q - xy).max() > 1.0


def test_turning_a_head_turns_its_depth() -> None:
    points = _dots()
    flat, z = augment._turn_field(points, 240, 0.0, 0.0, 7)
    assert np.abs(flat).max() < 1e-3
    assert np.abs(z - points[:, 2]).max() < 1e-3
    yaw = 0.3
    _, z = augment._turn_field(points, 240, yaw, 0.0, 7)
    x = points[:, 0] - points[:, 0].mean()
    assert np.polyfit(x, z, 1)[0] == pytest.approx(-np.sin(yaw), abs=0.02)


def test_colour_and_occlusion_keep_shape_and_type() -> None:
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    points = _dots() * 0.4
    changed = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        out = augment.random_occlusion(rng, augment.random_colour(rng, image), points)
        assert out.shape == image.shape
        assert out.dtype == np.uint8
        changed += not np.array_equal(out, image)
    assert changed > 100
    for _, step in augment._STEPS:
        for seed in range(6):
            assert step(np.random.default_rng(seed), image).shape == image.shape


def test_batches_depend_on_seed_and_step_only() -> None:
    faces = _faces(3)
    config = face_mesh_data.SampleConfig(size=64, batch=6, seed=4, negatives=0.4)
    a = face_mesh_data.make_batch(7, config, faces, [])
    face_mesh_data.make_batch(8, config, faces, [])
    b = face_mesh_data.make_batch(7, config, faces, [])
    other = face_mesh_data.make_batch(8, config, faces, [])
    assert np.array_equal(a.images, b.images)
    assert np.array_equal(a.points, b.points)
    assert not np.array_equal(a.images, other.images)
    assert not a.points[a.face == 0].any()


def test_negatives_stay_off_the_faces() -> None:
    image = np.zeros((200, 200, 3), np.uint8)
    image[60:140, 60:140] = 255
    scene = face_mesh_data.Scene(image, np.array([[60, 60, 140, 140]], np.float32))
    for seed in range(60):
        crop = face_mesh_data.negative_crop(np.random.default_rng(seed), [scene], 48)
        assert crop.shape == (48, 48, 3)
        # A well placed crop of this face would be dark at its rim and white in its middle, edge to edge.
        inner = crop[10:38, 10:38].mean()
        outer = np.concatenate(
            [crop[:6].ravel(), crop[-6:].ravel(), crop[:, :6].ravel(), crop[:, -6:].ravel()]
        ).mean()
        assert not (inner > 250 and outer < 5)


def test_level_crop_and_back_are_inverse() -> None:
    image = np.zeros((240, 240, 3), np.uint8)
    points = _dots()
    _, matrix = face_mesh_data.level_crop(image, points, 160)
    crop = np.concatenate([points[:, :2] @ matrix[:, :2].T + matrix[:, 2], points[:, 2:]], 1).astype(
        np.float32
    )
    crop[:, 2] *= np.sqrt(np.linalg.det(matrix[:, :2]))
    assert np.abs(face_mesh_data.back_to_picture(crop, matrix) - points).max() < 1e-2


def _trainer(folder: Path, faces: face_mesh_data.FaceSet) -> tuple[object, face_mesh_data.SampleConfig]:
    from lp_edge.export.training import face_mesh

    samples = face_mesh_data.SampleConfig(size=64, batch=4, seed=2)
    net = face_mesh.NetConfig(
        size=64, stem=4, channels=(4, 6, 8, 8), path=8, squeeze=4, hidden=8, basis=6, prior_draws=400
    )
    train = face_mesh.TrainConfig(steps=6, warmup=2, report=100)
    return face_mesh.Trainer(folder, faces, net, train, samples), samples


def test_training_resumes_exactly_and_exports_the_contract(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from lp_edge.export.lint import lint
    from lp_edge.export.training import face_mesh

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        faces = _faces(4)

        def source(samples: face_mesh_data.SampleConfig, first: int):
            return (face_mesh_data.make_batch(i, samples, faces, []) for i in itertools.count(first))

        whole, samples = _trainer(tmp_path / "whole", faces)
        whole.run(source(samples, 0), 4, {})
        part, _ = _trainer(tmp_path / "part", faces)
        part.run(source(samples, 0), 2, {})
        assert (tmp_path / "part" / "checkpoint.pt").is_file()
        again, _ = _trainer(tmp_path / "part", faces)
        again.load()
        assert again.step == 2
        again.run(source(samples, 2), 4, {})
        for a, b in ((whole.net, again.net), (whole.mean, again.mean)):
            for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
                assert torch.equal(x, y), name
        fresh, _ = _trainer(tmp_path / "fresh", faces)
        assert not torch.equal(whole.net.maps.weight, fresh.net.maps.weight)
        assert [
            json.loads(x)["step"] for x in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
        ] == [4]

        target = tmp_path / "face_mesh.onnx"
        assert face_mesh.export_onnx(whole.mean, target) <= 1e-3
    finally:
        torch.set_num_threads(threads)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    assert lint(onnx.load(str(target)), "main") == []
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape[1:]) == ("image", "tensor(uint8)", [64, 64, 3])
    assert [o.name for o in session.get_outputs()] == ["points", "score"]
    points, score = session.run(None, {"image": np.zeros((3, 64, 64, 3), np.uint8)})
    assert points.shape == (3, 478, 3)
    assert points.dtype == np.float32
    assert score.shape == (3, 1)
    assert 0 <= score.min() <= score.max() <= 1


def test_the_schedule_ends_near_zero(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    trainer, _ = _trainer(tmp_path, _faces(2))
    rates = [trainer.rate_at(i) for i in range(7)]
    assert max(rates) == pytest.approx(trainer.config.rate)
    assert rates[6] < 0.01 * trainer.config.rate


def test_shape_prior_reproduces_training_shapes() -> None:
    pytest.importorskip("torch")
    from lp_edge.export.training import face_mesh

    faces = _faces(12)
    prior = face_mesh.shape_prior(faces.points, 20)
    p = faces.points[3]
    roll, centre, side = augment.face_frame(p)
    m = augment.crop_matrix(centre, side, roll, 2)
    q = np.concatenate([p[:, :2] @ m[:, :2].T + m[:, 2] - 1, p[:, 2:] * (2 / side)], 1)
    fitted = prior.fit @ q[list(face_mesh.ANCHORS), :2].ravel() + prior.mean
    assert np.abs(fitted.reshape(478, 3)[:, :2] - q[:, :2]).mean() < 0.02


def test_drives_ignore_translation_and_measure_gaps() -> None:
    pytest.importorskip("torch")
    from lp_edge.export.training import face_mesh

    rows = face_mesh.drive_matrix()
    assert np.abs(rows.sum(1)).max() < 1e-6
    shape = np.zeros((478, 2), np.float32)
    shape[[145, 153, 144], 1] = 4.0  # lower lids of the right eye
    shape[291, 0] = 30.0
    shape[473, 0] = 2.0
    drives = rows @ shape
    assert abs(drives[2, 1]) == pytest.approx(4.0, abs=1e-5)
    assert drives[5, 0] == pytest.approx(30.0)
    assert drives[1, 0] == pytest.approx(2.0)
    assert not drives[[0, 3, 4]].any()


def test_a_stopped_run_saves_and_says_where(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    faces = _faces(2)
    trainer, samples = _trainer(tmp_path, faces)

    def source():
        for i in itertools.count():
            if i == 2:
                trainer.interrupted = True
            yield face_mesh_data.make_batch(i, samples, faces, [])

    trainer.run(source(), 6, {})
    assert trainer.step == 3
    again, _ = _trainer(tmp_path, faces)
    again.load()
    assert again.step == 3


def test_measure_is_zero_for_a_perfect_network_and_sees_errors() -> None:
    pytest.importorskip("torch")
    from lp_edge.export.training import face_mesh

    faces = _faces(2)
    state = {"k": 0}

    def perfect(offset: float):
        def run(crop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            i, second = divmod(state["k"], 2)
            state["k"] += 1
            truth = faces.points[i]
            image = faces.images[i]
            previous = truth + np.float32(offset) * np.array([1, 0, 0], np.float32) if second else None
            _, matrix = face_mesh_data.level_crop(image, previous, 64)
            xy = truth[:, :2] @ matrix[:, :2].T + matrix[:, 2]
            unit = np.sqrt(np.linalg.det(matrix[:, :2]))
            out = np.concatenate([xy, truth[:, 2:] * unit], 1)
            out[:, 0] += offset * unit
            return out[None].astype(np.float32), np.ones((1, 1), np.float32)

        return run

    result = face_mesh.measure(perfect(0.0), list(faces.images), faces.points, 64)
    assert result.mean < 0.5
    assert result.rotation < 0.1
    state["k"] = 0
    eye = np.linalg.norm(faces.points[:, 468, :2] - faces.points[:, 473, :2], axis=1).mean()
    worse = face_mesh.measure(perfect(3.0), list(faces.images), faces.points, 64)
    assert worse.mean > 0.5 * 300 / eye


@needs_faces
def test_the_sets_of_the_shared_data_are_apart() -> None:
    entries = json.loads((FACES / "mesh.json").read_text())
    clips = {s: {(e["origin"], e["path"]) for e in entries if e["split"] == s} for s in ("train", "val")}
    assert clips["train"] and clips["val"]
    assert not clips["train"] & clips["val"]


def test_steadiness_sees_points_that_stick_to_the_crop() -> None:
    pytest.importorskip("torch")
    from lp_edge.export.training import face_mesh

    faces = _faces(3)

    def stuck(_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full((1, 478, 3), 32, np.float32), np.ones((1, 1), np.float32)

    # The middle of the crop moves by up to 2 % of the side on each axis, uniformly: 2 / sqrt(3) * sqrt(2) rms.
    side = augment.face_frame(faces.points[0])[2]
    eye = np.linalg.norm(faces.points[0][468, :2] - faces.points[0][473, :2])
    found = face_mesh.measure_steadiness(stuck, faces.images, faces.points, 64, crops=40)
    assert found == pytest.approx(2 / np.sqrt(3) * np.sqrt(2) * side / eye, rel=0.2)


@needs_faces
def test_score_measure_counts_both_kinds_of_mistakes() -> None:
    pytest.importorskip("torch")
    from lp_edge.export.training import face_mesh

    def always(value: float):
        return lambda _: (np.zeros((1, 478, 3), np.float32), np.full((1, 1), value, np.float32))

    assert face_mesh.measure_score(always(1.0), FACES, "val", 32, count=12) == {"missed": 0.0, "false": 1.0}
    assert face_mesh.measure_score(always(0.0), FACES, "val", 32, count=12) == {"missed": 1.0, "false": 0.0}
