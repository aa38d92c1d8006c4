"""The composition of LivePortrait's motion: the golden cases, and small cases worked out by hand."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lp_edge
from lp_edge.engines import names
from lp_edge.engines.bundle import BundleWriter
from lp_edge.engines.runner import Array, Runner, TensorSpec
from lp_edge.errors import ConfigError, ExportError, MediaError, TensorError
from lp_edge.runtime.edit import EditDelta
from lp_edge.runtime.liveportrait_motion import (
    LIP_ARRAY,
    ComposeOptions,
    Composer,
    LivePortraitSource,
    RunnerRetargeting,
    degrees_from_logits,
    edit_keypoints,
    eye_ratio_203,
    hull_volume,
    lip_ratio_203,
    motion_from_outputs,
    rotation_from_angles,
    smooth_rts,
)
from lp_edge.runtime.liveportrait_options import LivePortraitOptions
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import REGIONS

RNG = np.random.default_rng(3)
KP = RNG.uniform(-0.4, 0.4, (21, 3)).astype(np.float32)


# -- helpers -------------------------------------------------------------------------------------------


def face(
    angles: tuple[float, float, float] = (0, 0, 0),
    *,
    expression: np.ndarray | float = 0.0,
    scale: float = 1.0,
    t: tuple[float, float, float] = (0, 0, 0),
    eyes: tuple[float, float] = (0.3, 0.3),
    lips: float = 0.0,
) -> Motion:
    return Motion(
        rotation_from_angles(*angles).astype(np.float32),
        np.array(t, np.float32),
        np.float32(scale),
        np.broadcast_to(np.float32(expression), (21, 3)).copy(),
        np.array(eyes, np.float32),
        np.float32(lips),
    )


def random_face(seed: int) -> Motion:
    rng = np.random.default_rng(seed)
    return face(
        tuple(rng.uniform(-30, 30, 3)),
        expression=rng.normal(0, 0.02, (21, 3)),
        scale=rng.uniform(0.8, 1.5),
        t=tuple(rng.uniform(-0.2, 0.2, 3)),
        eyes=tuple(rng.uniform(0.1, 0.5, 2)),
        lips=rng.uniform(0, 0.3),
    )


class Known:
    """Networks whose answers are known; keeps what they were asked."""

    def __init__(self, stitching: float = 0.0, shift: tuple[float, float] = (0, 0)) -> None:
        self._answer = np.float32([[*[stitching] * 63, *shift]])
        self.asked: list[tuple[str, np.ndarray]] = []

    def stitching(self, features: np.ndarray, /) -> np.ndarray:
        assert features.shape == (1, 126) and features.dtype == np.float32
        self.asked.append(("stitching", features[0]))
        return self._answer

    def eye(self, features: np.ndarray, /) -> np.ndarray:
        """Every number is 10 x (target - mean own ratio)."""
        assert features.shape == (1, 66) and features.dtype == np.float32
        self.asked.append(("eye", features[0]))
        return np.full((1, 63), 10 * (features[0, 65] - features[0, 63:65].mean()), np.float32)

    def lip(self, features: np.ndarray, /) -> np.ndarray:
        """Every number is target - own ratio."""
        assert features.shape == (1, 65) and features.dtype == np.float32
        self.asked.append(("lip", features[0]))
        return np.full((1, 63), features[0, 64] - features[0, 63], np.float32)


def options(
    *, relative: bool = True, region: str = "all", multiplier: float = 1.0, **own: Any
) -> ComposeOptions:
    own = {"stitching": False, "normalize_lip": False, "driving_option": "pose-friendly", **own}
    return ComposeOptions(relative, region, multiplier, LivePortraitOptions(**own))


def composed(
    source: Motion | list[Motion],
    driving: list[Motion],
    how: ComposeOptions,
    *,
    kp: np.ndarray = KP,
    kind: str = "video",
    networks: Known | None = None,
    edit: EditDelta | None = None,
) -> np.ndarray:
    """Driving keypoints [T, 21, 3]; a list as source is a clip."""
    clip = isinstance(source, list)
    composer = Composer(networks or Known(), how, source_video=clip, driving=kind)  # type: ignore[arg-type]
    if clip:
        composer.plan(source, driving)
    still = None if clip else LivePortraitSource(source, kp)
    pairs = [
        composer.compose(still or LivePortraitSource(source[i], kp), driving[i], driving[0], edit)
        for i in range(len(driving))
    ]
    assert all(a.dtype == b.dtype == np.float32 for a, b in pairs)
    return np.stack([b for _, b in pairs])


def close(a: object, b: object, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# -- what networks and landmarks say -------------------------------------------------------------------


def test_degrees_are_the_mean_bin() -> None:
    logits = np.zeros((3, 66))
    logits[1, 40] = logits[2, 0] = 500.0
    close(degrees_from_logits(logits), [0.0, 3 * 40 - 97.5, -97.5])


def test_rotations_turn_the_axes_as_the_network_means() -> None:
    x, y, z = np.eye(3)
    close(x @ rotation_from_angles(0, 0, 90).T, y)
    close(y @ rotation_from_angles(90, 0, 0).T, z)
    close(z @ rotation_from_angles(0, 90, 0).T, x)
    # pitch first, then yaw, then roll
    close(
        rotation_from_angles(10, 20, 30),
        rotation_from_angles(0, 0, 30) @ rotation_from_angles(0, 20, 0) @ rotation_from_angles(10, 0, 0),
    )
    assert rotation_from_angles(np.zeros((4, 2)), 1.0, np.zeros((4, 2))).shape == (4, 2, 3, 3)


def test_ratios_of_203_landmarks() -> None:
    lmk = np.zeros((2, 203, 2), np.float32)
    lmk[:, 12, 0], lmk[:, 18, 1] = 10, 3  # image-left: width 10, gap 3
    lmk[:, 36, 0], lmk[:, 42, 1] = 20, 4
    lmk[1, 66, 0], lmk[1, 102, 1] = 50, 5
    close(eye_ratio_203(lmk), [[0.3, 0.2]] * 2, 1e-6)
    close(lip_ratio_203(lmk), [0.0, 0.1], 1e-6)
    assert eye_ratio_203(lmk).dtype == lip_ratio_203(lmk).dtype == np.float32


def test_motion_from_outputs_takes_one_of_the_batch() -> None:
    outputs = {
        names.PITCH: np.float32([[0], [90]]),
        names.YAW: np.zeros((2, 1), np.float32),
        names.ROLL: np.zeros((2, 1), np.float32),
        names.T: np.float32([[1, 2, 3], [4, 5, 6]]),
        names.SCALE: np.float32([[1.5], [2.5]]),
        names.EXP: np.stack([np.zeros((21, 3)), KP]).astype(np.float32),
        names.KP: np.stack([KP, -KP]).astype(np.float32),
    }
    motion, kp = motion_from_outputs(outputs, 1)
    close([0.0, 1.0, 0.0] @ motion.rotation.T, [0, 0, 1])
    close(motion.translation, [4, 5, 6])
    assert motion.scale.shape == () and float(motion.scale) == 2.5
    close(motion.expression, KP)
    close(kp, -KP)
    close(motion_from_outputs(outputs)[1], KP)


def test_keypoints_have_no_depth_of_translation() -> None:
    source = LivePortraitSource(face((0, 0, 90), expression=0.5, scale=2.0, t=(0.1, 0.2, 0.7)), KP)
    x, y, z = KP.T
    close(source.keypoints, 2 * (np.stack([-y, x, z], 1) + 0.5) + [0.1, 0.2, 0.0])


# -- mathematics ---------------------------------------------------------------------------------------


def test_hull_volumes_that_are_known() -> None:
    cube = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
    assert hull_volume(cube) == pytest.approx(1.0)
    assert hull_volume(np.vstack([cube, cube * 0.5 + 0.2, cube])) == pytest.approx(1.0)
    assert hull_volume(cube * 1e-3 + 5) == pytest.approx(1e-9)
    grid = np.array(list(itertools.product(range(4), repeat=3)), float)  # many points in every face's plane
    assert hull_volume(RNG.permutation(grid)) == pytest.approx(27.0)
    assert hull_volume([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]]) == pytest.approx(1.0)
    assert hull_volume(np.c_[RNG.normal(size=(21, 2)), np.zeros(21)]) == 0.0
    assert hull_volume(np.ones((21, 3))) == 0.0
    assert hull_volume(np.outer(np.arange(21), [1, 2, 3])) == 0.0
    assert hull_volume(cube[:3]) == 0.0


def brute_volume(x: np.ndarray) -> float:
    """All triples that have every other point on one side; points in general position."""
    x = x - x.mean(0)
    total = 0.0
    for i, j, k in itertools.combinations(range(len(x)), 3):
        normal = np.cross(x[j] - x[i], x[k] - x[i])
        side = np.delete((x - x[i]) @ normal, [i, j, k])
        if (side < 0).all() or (side > 0).all():
            total += abs(np.linalg.det(x[[i, j, k]])) / 6
    return total


@pytest.mark.parametrize("seed", range(6))
def test_hull_volume_against_all_triples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(21, 3)) * (1, 10.0 ** -(seed % 3), 0.3)
    assert hull_volume(points) == pytest.approx(brute_volume(points), rel=1e-9)


@pytest.mark.parametrize("variance", [3e-7, 1e-5, 1e-2])
def test_smoother_is_the_most_probable_path(variance: float) -> None:
    """The smoothed means minimise a quadratic form, which a linear system solves at once."""
    z = np.cumsum(np.random.default_rng(1).normal(0, 0.01, (30, 2, 3)), axis=0)
    n, q = len(z), 1e-5
    a = np.eye(n) / variance
    a[0, 0] += 1.0  # x_0 ~ N(z_0, 1)
    for t in range(n - 1):
        a[t : t + 2, t : t + 2] += np.array([[1, -1], [-1, 1]]) / q
    b = z.reshape(n, -1) / variance
    b[0] += z[0].reshape(-1)
    close(smooth_rts(z, variance), np.linalg.solve(a, b).reshape(z.shape), 1e-9)


def test_smoother_keeps_what_does_not_move_and_flattens_what_trembles() -> None:
    close(smooth_rts(np.full((9, 4), 0.7), 1e-3), 0.7, 1e-12)
    close(smooth_rts([[3.0, 4.0]], 1e-3), [[3.0, 4.0]], 0)
    tremble = np.resize([1.0, -1.0], 40)[:, None]
    assert np.abs(smooth_rts(tremble, 3e-7)).max() > 0.9  # the default hardly smooths
    assert np.abs(smooth_rts(tremble, 1e-3)[5:-5]).max() < 0.1


# -- which part of the motion --------------------------------------------------------------------------


LIPS, EYES = {6, 12, 14, 17, 19, 20}, {11, 13, 15, 16, 18}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("region", REGIONS)
def test_regions_take_their_keypoints(region: str, relative: bool, clip: bool) -> None:
    """Canonical keypoints are 0, so what comes out is the expression itself."""
    source, first, then = face(), face(), face(expression=1.0)
    out = composed(
        [source] * 2 if clip else source,
        [first, then],
        options(relative=relative, region=region, smooth_variance=1e-12),
        kp=np.zeros((21, 3), np.float32),
    )[1]
    whole = np.zeros((21, 3))
    whole[[1, 2, 6, *range(11, 21)]] = 1
    whole[[3, 4], 1] = whole[[5, 8], 2] = 1
    whole[9, 1:] = 1
    if relative and not clip:
        whole[:] = 1
    wanted = {"all": whole, "exp": whole}.get(region, np.zeros((21, 3)))
    for i in {"lip": LIPS, "eyes": EYES}.get(region, set()):
        wanted[i] = 1
    close(out, wanted, 1e-5)


def test_relative_motion_by_hand() -> None:
    source = face((0, 0, 90), scale=2.0, t=(0.1, 0.2, 0.9), expression=0.1)
    first = face((0, 0, 30), scale=1.5, t=(0.3, 0.3, 0.5), expression=0.2)
    then = face((0, 0, 50), scale=3.0, t=(0.4, 0.1, 0.7), expression=0.5)
    out = composed(source, [first, then], options())
    turn = rotation_from_angles(0, 0, 110)
    close(out[0], LivePortraitSource(source, KP).keypoints)
    close(out[1], 4.0 * (KP @ turn.T + 0.4) + [0.2, 0.0, 0.0])
    # only "all" scales, only "all" and "pose" turn and move
    pose = composed(source, [first, then], options(region="pose"))[1]
    close(pose, 2.0 * (KP @ turn.T + 0.1) + [0.2, 0.0, 0.0])
    exp = composed(source, [first, then], options(region="exp"))[1]
    close(exp, 2.0 * (KP @ rotation_from_angles(0, 0, 90).T + 0.4) + [0.1, 0.2, 0.0])


def test_the_order_of_rotations() -> None:
    """R = R_s R_0ᵀ R_d in our convention: the driver's change acts in the face's own axes."""
    s, a, b = (20.0, -15.0, 5.0), (5.0, 10.0, -20.0), (-12.0, 25.0, 8.0)
    out = composed(face(s), [face(a), face(b)], options(region="pose"))[1]
    r = rotation_from_angles
    close(out, KP @ (r(*s) @ r(*a).T @ r(*b)).T)


def test_absolute_motion_by_hand() -> None:
    source, driver = face((0, 0, 90), scale=2.0, t=(1, 1, 1)), face((0, 0, 30), scale=7.0, t=(0.1, 0.2, 0.3))
    out = composed(source, [driver], options(relative=False))[0]
    close(out, 2.0 * (KP @ rotation_from_angles(0, 0, 30).T) + [0.1, 0.2, 0.0])


def test_a_picture_that_drives_counts_from_the_lip_array() -> None:
    source, driver = face((5, 6, 7), scale=1.2, t=(0.3, 0, 0)), face((20, 20, 20), expression=0.1, scale=3)
    x_s = LivePortraitSource(source, KP).keypoints
    change = 1.2 * (0.1 - LIP_ARRAY)
    for region in ("all", "exp", "lip"):
        rows = sorted(LIPS) if region == "lip" else list(range(21))
        out = composed(source, [driver], options(region=region), kind="image")[0]
        close((out - x_s)[rows], change[rows])
        close(np.delete(out - x_s, rows, axis=0), 0)
    eyes = composed(source, [driver], options(region="eyes"), kind="image")[0]
    close((eyes - x_s)[sorted(EYES)], 1.2 * 0.1)
    # on a clip the array counts for the eyes as well
    clip = composed([source], [driver], options(region="eyes"), kind="image")[0]
    close((clip - x_s)[sorted(EYES)], change[sorted(EYES)])
    close(composed(source, [driver], options(region="pose"), kind="image")[0], x_s)


def test_a_clip_keeps_its_scale_and_place_and_is_smoothed() -> None:
    count, v = 12, 1e-4
    sources = [face((0, i, 0), expression=0.01 * i, t=(0.1 * i, 0, 5)) for i in range(count)]
    drivers = [random_face(i) for i in range(count)]
    out = composed(sources, drivers, options(smooth_variance=v))
    r = [m.rotation.astype(float) for m in drivers]
    turn = smooth_rts([s.rotation.astype(float) @ r[0].T @ d for s, d in zip(sources, r, strict=True)], v)
    shape = smooth_rts(
        [
            s.expression.astype(float) + d.expression - drivers[0].expression
            for s, d in zip(sources, drivers, strict=True)
        ],
        v,
    )
    i, row = 7, 14
    close(out[i, row], KP[row] @ turn[i].T + shape[i, row] + [0.7, 0, 0])
    close(out[i, 0], KP[0] @ turn[i].T + 0.07 + [0.7, 0, 0])  # a keypoint that keeps its own expression
    assert (
        np.abs(out[i, 0] - (KP[0] @ (sources[i].rotation @ r[0].T @ r[i]).T + 0.07 + [0.7, 0, 0])).max()
        > 1e-3
    )


def test_a_clip_needs_a_plan_and_only_then() -> None:
    composer = Composer(Known(), options(), source_video=True, driving="video")
    source, driver = LivePortraitSource(face(), KP), face()
    with pytest.raises(ConfigError, match="0 frames planned"):
        composer.compose(source, driver, driver)
    composer.plan([face()] * 2, [face()] * 5)
    composer.compose(source, driver, driver, index=1)
    with pytest.raises(ConfigError, match="frame 2 of a source clip, 2 frames planned"):
        composer.compose(source, driver, driver)
    with pytest.raises(MediaError, match="no frame"):
        composer.plan([], [face()])
    Composer(Known(), options(), source_video=True, driving="image").compose(source, driver, driver)


def test_plan_takes_another_neutral_frame() -> None:
    drivers, how = [random_face(i) for i in range(3)], options(smooth_variance=1e-12)
    composer = Composer(Known(), how, source_video=True, driving="video")
    composer.plan([face()] * 3, drivers, drivers[1])
    out = composer.compose(LivePortraitSource(face(), KP), drivers[1], drivers[1], index=1)[1]
    close(out, KP, 1e-5)


# -- expression-friendly, animals, multiplier ----------------------------------------------------------


def test_expression_friendly_scales_by_the_hulls() -> None:
    """A neutral rotation that is no rotation (as a broken template may hold) doubles the driver's face: 8 x its volume."""
    grown = replace(face(), rotation=np.float32(np.sqrt(2) * np.eye(3)))
    then = replace(grown, translation=np.float32([0.4, 0, 0]))
    source = face(scale=1.3)
    how = options(driving_option="expression-friendly")
    out = composed(source, [grown, then], how)
    x_s = LivePortraitSource(source, KP).keypoints
    close(out[0], x_s)
    close(out[1] - x_s, np.tile([0.4 / math.sqrt(8), 0, 0], (21, 1)))
    # pose-friendly, absolute, a picture and a clip have no such factor
    plain = options()
    assert np.abs(composed(source, [grown, then], plain)[0] - x_s).max() > 0.1
    for how_other, kind, clip in (
        (options(relative=False, driving_option="expression-friendly"), "video", False),
        (how, "image", False),
        (how, "video", True),
    ):
        same = replace(
            how_other, liveportrait=replace(how_other.liveportrait, driving_option="pose-friendly")
        )
        start: Motion | list[Motion] = [source, source] if clip else source
        frames = [grown] if kind == "image" else [grown, then]
        close(composed(start, frames, how_other, kind=kind), composed(start, frames, same, kind=kind), 0)


def test_expression_friendly_refuses_a_flat_face() -> None:
    flat = KP * np.float32([1, 1, 0])
    with pytest.raises(MediaError, match=r"in a plane.*pose-friendly"):
        composed(face(), [face()], options(driving_option="expression-friendly"), kp=flat)


def test_animals_follow_the_driver_itself_from_its_neutral_frame() -> None:
    source = face((10, 0, 0), scale=1.3, expression=0.3, t=(0.5, 0.5, 0))
    first = face((0, 20, 0), expression=0.05, scale=9, t=(0.1, 0, 3))
    then = face((0, -20, 0), expression=KP, scale=2, t=(0.2, 0, 1))
    out = composed(source, [first, then], options(animal=True, relative=False, multiplier=2.0))
    start, end = (1.3 * (KP @ m.rotation.T + m.expression) + m.translation * [1, 1, 0] for m in (first, then))
    x_s = LivePortraitSource(source, KP).keypoints
    factor = math.sqrt(brute_volume(x_s) / brute_volume(start))
    close(out[0], x_s)
    close(out[1], x_s + 2 * factor * (end - start))
    with pytest.raises(ConfigError, match="animal"):
        Composer(Known(), options(animal=True), source_video=True, driving="video")


@given(st.floats(0, 3))
def test_the_multiplier_acts_on_the_whole_way(multiplier: float) -> None:
    source, driver = random_face(1), [random_face(2), random_face(3)]
    networks = {"networks": Known(0.01, (0.1, 0.2))}
    once = composed(source, driver, options(stitching=True), **networks)
    x_s = LivePortraitSource(source, KP).keypoints
    many = composed(source, driver, options(stitching=True, multiplier=multiplier), **networks)
    close(many, x_s + multiplier * (once - x_s), 1e-5)


# -- S and R -------------------------------------------------------------------------------------------


def test_stitching_gets_both_and_moves_all() -> None:
    networks = Known(0.01, (0.1, 0.2))
    source, driver = face(scale=1.1), [face(), face(expression=0.1)]
    plain = composed(source, driver, options())
    out = composed(source, driver, options(stitching=True), networks=networks)
    close(out, plain + 0.01 + [0.1, 0.2, 0.0])
    close(networks.asked[1][1], np.r_[1.1 * KP.ravel(), plain[1].ravel()])


def test_lips_are_normalised_after_stitching_and_only_then() -> None:
    how = options(normalize_lip=True, stitching=True)
    open_lips, driver = face(lips=0.25), [face(), face()]
    networks = Known(0.01)
    close(composed(open_lips, driver, how, networks=networks), np.stack([KP + 0.01 - 0.25] * 2))
    assert [name for name, _ in networks.asked] == ["lip", "stitching", "stitching"]  # once for a picture
    close(networks.asked[0][1][63:], [0.25, 0.0])
    for case in (
        (face(lips=0.029), how),
        (open_lips, replace(how, relative=False)),
        (open_lips, options(normalize_lip=True, lip_normalize_threshold=0.3)),
        (open_lips, options(normalize_lip=True, animal=True)),
    ):
        networks = Known()
        composed(case[0], driver, case[1], networks=networks)
        assert "lip" not in dict(networks.asked)
    networks = Known()
    composed(face(lips=0.03), driver, how, networks=networks)
    assert "lip" in dict(networks.asked)  # the threshold itself counts
    # every frame of a clip for itself
    clip = [face(lips=0.2), face(lips=0.0), face(lips=0.1)]
    out = composed(clip, driver + driver[:1], options(normalize_lip=True))
    close(out - KP, np.array([-0.2, 0.0, -0.1])[:, None, None] * np.ones((3, 21, 3)))


@pytest.mark.parametrize(("first", "target"), [((0.3, 0.2), 0.25), ((0.1, 0.2), 0.39)])
@pytest.mark.parametrize("relative", [False, True])
def test_eyes_of_a_clip_are_held_as_in_its_first_frame(
    first: tuple[float, float], target: float, relative: bool
) -> None:
    sources = [face(eyes=first), face(eyes=(0.1, 0.1)), face(eyes=(0.4, 0.5))]
    how = options(source_video_eye_retargeting=True, relative=relative)
    out = composed(sources, [face()] * 3, how)
    wanted = [10 * (target - np.mean(m.eye_ratio)) for m in sources]
    close(out - KP, np.array(wanted)[:, None, None] * np.ones((3, 21, 3)), 1e-5)
    close(composed(sources[0], [face()], how)[0], KP)  # a picture has nothing to hold


@pytest.mark.parametrize("threshold", [0.2, 0.3])
def test_the_eye_threshold_is_an_option(threshold: float) -> None:
    how = options(source_video_eye_retargeting=True, source_video_eye_threshold=threshold)
    out = composed([face(eyes=(0.25, 0.25))], [face()], how)[0]
    close(out - KP, 0.0 if threshold == 0.2 else 1.4, 1e-5)


def test_retargeting_puts_the_drivers_openings_on_the_source() -> None:
    source, driver = random_face(1), [random_face(2), random_face(3)]
    own = LivePortraitSource(source, KP).keypoints
    eye = 10 * (driver[1].eye_ratio[0] - source.eye_ratio.mean())
    lip = driver[1].lip_ratio - source.lip_ratio
    both = {"eye_retargeting": True, "lip_retargeting": True}
    networks = Known(0.01)
    # relative: head pose and expression are dropped, as in the reference; lips are not normalised on top
    out = composed(source, driver, options(**both, normalize_lip=True, stitching=True), networks=networks)
    close(out[1], own + eye + lip + 0.01, 1e-5)
    asked = dict(networks.asked[-3:])
    close(asked["eye"], np.r_[own.ravel(), source.eye_ratio, driver[1].eye_ratio[0]])
    close(asked["lip"], np.r_[own.ravel(), source.lip_ratio, driver[1].lip_ratio])
    close(asked["stitching"][63:], (own + eye + lip).ravel(), 1e-5)
    # by name they stay
    kept = composed(source, driver, options(**both, keep_pose_with_retargeting=True))
    moved = composed(source, driver, options())
    close(kept[1], moved[1] + eye + lip, 1e-5)
    assert np.abs(moved[1] - own).max() > 0.01
    # absolute: they stay anyway
    for keep in (False, True):
        out = composed(source, driver, options(relative=False, **both, keep_pose_with_retargeting=keep))
        close(out[1], composed(source, driver, options(relative=False))[1] + eye + lip, 1e-5)
    one = composed(source, driver, options(eye_retargeting=True))
    close(one[1], own + eye, 1e-5)


class Double(Runner):
    """A graph that answers 2 x features, cut to ``outputs``."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        f32 = np.dtype(np.float32)
        super().__init__(
            name,
            [TensorSpec(names.FEATURES, f32, ("batch", inputs))],
            [TensorSpec(names.DELTA, f32, ("batch", outputs))],
        )

    backend = "test"
    device = "test"

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        width = self.outputs[names.DELTA].shape[1]
        return {names.DELTA: 2 * np.asarray(feeds[names.FEATURES])[:, :width]}

    def _close(self) -> None:
        pass


def test_runners_answer_by_their_tensors_names() -> None:
    networks = RunnerRetargeting(
        Double("stitching", 126, 65), Double("retarget_eye", 66, 63), Double("retarget_lip", 65, 63)
    )
    close(networks.eye(np.ones((2, 66), np.float32)), np.full((2, 63), 2))
    close(networks.lip(np.ones((1, 65), np.float32)), np.full((1, 63), 2))
    with pytest.raises(TensorError, match="stitching"):
        networks.stitching(np.ones((1, 66), np.float32))
    source = face(scale=0.5)
    composer = Composer(networks, options(stitching=True), source_video=False, driving="video")
    x_s, x_d = composer.compose(LivePortraitSource(source, KP), face(), face())
    close(
        x_d - x_s, 2 * x_s + np.r_[2 * x_s[0, :2], 0]
    )  # 63 and 64 are x, y of the driving set's first keypoint


# -- edits ---------------------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_changes_nothing() -> None:
    source, driver = random_face(1), [random_face(2), random_face(3)]
    close(composed(source, driver, options(), edit=EditDelta()), composed(source, driver, options()), 0)
    x_s, x_d = edit_keypoints(LivePortraitSource(source, KP), EditDelta(), Known())
    close(x_d, x_s)


def test_edits_add_to_the_sources_own() -> None:
    source = face((10, -20, 5), expression=0.02, scale=1.2, t=(0.1, 0.1, 0.4), eyes=(0.2, 0.4), lips=0.1)
    edit = EditDelta(
        expression=KP * np.float32(0.1),
        angles=(3.0, 15.0, -4.0),
        zoom=1.1,
        translation=np.float32([0.05, -0.05, 9]),
        eye_ratio=0.5,
        lip_ratio=0.3,
    )
    wanted = 1.32 * (KP @ rotation_from_angles(13, -5, 1).T + 0.02 + 0.1 * KP) + [0.15, 0.05, 0.0]
    wanted += 10 * (0.5 - 0.3) + (0.3 - 0.1)
    networks = Known(0.01)
    still = LivePortraitSource(source, KP)
    x_s, x_d = edit_keypoints(still, edit, networks)
    close(x_s, still.keypoints)
    close(x_d, wanted + 0.01, 5e-6)
    close(networks.asked[-1][1][63:], wanted.ravel(), 5e-6)
    assert len(edit_keypoints(still, None, networks, options())) == 2
    close(edit_keypoints(still, edit, networks, options())[1], wanted, 5e-6)
    # a driver that does nothing leaves the edit; targets take the place of normalised lips
    for how in (options(), options(normalize_lip=True), options(driving_option="expression-friendly")):
        close(composed(source, [random_face(9)], how, edit=edit)[0], wanted, 5e-6)
    # retargeting that drops the driver's pose keeps the edit's; its targets come first
    both = options(eye_retargeting=True, lip_retargeting=True)
    close(composed(source, [random_face(8), random_face(9)], both, edit=edit)[1], wanted, 5e-6)
    # held eyes give way as well
    held = options(source_video_eye_retargeting=True)
    close(composed([source], [random_face(9)], held, edit=edit)[0], wanted, 5e-6)


def test_an_edits_turn_goes_on_top_of_the_drivers() -> None:
    s, a, b, angles = (20.0, -15.0, 5.0), (5.0, 10.0, -20.0), (-12.0, 25.0, 8.0), (4.0, -6.0, 3.0)
    r = rotation_from_angles
    out = composed(face(s), [face(a), face(b)], options(), edit=EditDelta(angles=angles))[1]
    turned = r(*(x + d for x, d in zip(s, angles, strict=True)))
    close(out, KP @ (r(*s) @ r(*a).T @ r(*b) @ r(*s).T @ turned).T)


# -- properties ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    region=st.sampled_from(REGIONS),
    friendly=st.sampled_from(["expression-friendly", "pose-friendly"]),
    clip=st.booleans(),
)
def test_a_driver_that_stays_neutral_leaves_the_source(
    seed: int, region: str, friendly: str, clip: bool
) -> None:
    source, driver = random_face(seed), [random_face(seed + 1)] * 3
    start: Motion | list[Motion] = [source] * 3 if clip else source
    out = composed(start, driver, options(region=region, driving_option=friendly))
    close(out, np.stack([LivePortraitSource(source, KP).keypoints] * 3), 5e-6)


def test_memory_of_a_picture_source_does_not_grow() -> None:
    how = options(stitching=True, normalize_lip=True, driving_option="expression-friendly")

    class Silent(Known):
        def stitching(self, features: np.ndarray, /) -> np.ndarray:
            return np.zeros((1, 65), np.float32)

    composer = Composer(Silent(), how, source_video=False, driving="video")
    source, neutral = LivePortraitSource(random_face(1), KP), random_face(2)

    def go(count: int) -> int:
        for i in range(count):
            composer.compose(source, random_face(i), neutral)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        go(50)
        before = go(50)
        assert go(400) - before < 4096
    finally:
        tracemalloc.stop()


# -- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"driving_option": "friendly"}, "expression-friendly, pose-friendly"),
        ({"smooth_variance": 0.0}, "smooth_variance is 0.0"),
        ({"lip_normalize_threshold": float("nan")}, "lip_normalize_threshold is nan"),
        ({"source_video_eye_threshold": -1.0}, "source_video_eye_threshold is -1.0"),
    ],
)
def test_options_out_of_range(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LivePortraitOptions(**bad)


def test_compose_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="region is 'mouth'"):
        ComposeOptions(region="mouth")
    with pytest.raises(ConfigError, match="multiplier is inf"):
        ComposeOptions(multiplier=math.inf)


# -- golden cases --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    path = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "_parity_motion.py"
    if not path.is_file():
        pytest.skip("no source tree: benchmarks are not installed")
    spec = importlib.util.spec_from_file_location("_parity_motion_under_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Mlp:
    """S and R in NumPy, with the weights of the synthetic checkpoints."""

    def __init__(self, shared: Path) -> None:
        path = shared / "liveportrait" / "make_checkpoints.py"
        spec = importlib.util.spec_from_file_location("make_checkpoints_under_test", path)
        assert spec is not None and spec.loader is not None
        make = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(make)
        rel = next(rel for rel in make.KEYS if "stitching" in rel)
        self.state = {part: make.fill(f"{rel}/{part}", table) for part, table in make.KEYS[rel].items()}

    def _run(self, part: str, x: np.ndarray) -> np.ndarray:
        tensors = [tensor.numpy() for tensor in self.state[part].values()]
        for i in range(0, len(tensors), 2):
            x = x @ tensors[i].T + tensors[i + 1]
            if i + 2 < len(tensors):
                x = np.maximum(x, 0)
        return x

    def stitching(self, features: np.ndarray, /) -> np.ndarray:
        return self._run("retarget_shoulder", features)

    def eye(self, features: np.ndarray, /) -> np.ndarray:
        return self._run("retarget_eye", features)

    def lip(self, features: np.ndarray, /) -> np.ndarray:
        return self._run("retarget_mouth", features)


@pytest.fixture(scope="module")
def mlp(shared: Path) -> Mlp:
    pytest.importorskip("torch")  # the generator of the synthetic weights imports it
    if not (shared / "liveportrait" / "motion_golden.npz").is_file():
        pytest.skip("no golden motion in the shared data")
    return Mlp(shared)


@pytest.fixture(scope="module")
def golden(shared: Path, mlp: Mlp) -> dict[str, np.ndarray]:
    with np.load(shared / "liveportrait" / "motion_golden.npz", allow_pickle=False) as table:
        return dict(table)


@pytest.fixture
def with_mlp(parity: ModuleType, mlp: Mlp, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(parity, "open_retargeting", lambda stack, **_: mlp)
    yield parity


def items(parity: ModuleType, file: Path) -> list[dict[str, Any]]:
    return list(parity.motion_items(file, weights=None, bundle=None, allow_unverified=True))


def test_all_golden_cases(with_mlp: ModuleType, shared: Path) -> None:
    found = items(with_mlp, shared / "liveportrait" / "motion_golden.npz")
    assert len(found) == 44
    assert all(item["ok"] and item["max_abs_error"] < 5e-6 for item in found), found


def test_every_option_matters_in_the_golden_cases(
    parity: ModuleType, mlp: Mlp, golden: dict[str, np.ndarray]
) -> None:
    """The same cases with one option turned must miss: the comparison has teeth."""
    cases = json.loads(str(golden["meta"]))
    for i, name, value in (
        (0, "flag_relative_motion", False),
        (0, "animation_region", "exp"),
        (3, "driving_multiplier", 1.0),
        (3, "flag_stitching", True),
        (15, "lip_normalize_threshold", 0.0),
        (16, "flag_eye_retargeting", False),
        (17, "flag_lip_retargeting", False),
        (38, "flag_source_video_eye_retargeting", False),
        (30, "driving_smooth_observation_variance", 1e-4),
    ):
        other = {**cases[i], "options": {**cases[i]["options"], name: value}}
        _, ours = parity.compose_case(golden, other, mlp)
        assert np.abs(ours - golden[f"kp_driving_{i}"]).max() > 1e-3, (i, name)


def test_the_benchmark_tells_what_it_cannot_compare(
    with_mlp: ModuleType, golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    cases = json.loads(str(golden["meta"]))[:6]
    table = {
        k: v for k, v in golden.items() if not k.startswith("kp_") or k[-2:] in {f"_{i}" for i in range(6)}
    }
    cases[0]["options"]["flag_beard"] = True
    cases[1]["official_error"] = "ValueError: no"
    table["kp_driving_2"] = table["kp_driving_2"] + np.float32(2e-4)
    table["kp_driving_3"] = table["kp_driving_3"][:2]
    del table["kp_source_4"]
    cases[5]["driving"] = "hologram"
    file = tmp_path / "cases.npz"
    np.savez(file, **{**table, "meta": np.array(json.dumps(cases))})
    found = items(with_mlp, file)
    assert "unknown option flag_beard" in found[0]["error"]
    assert "ValueError: no" in found[1]["skipped"] and "ok" not in found[1]
    assert found[2]["max_abs_error"] == pytest.approx(2e-4, rel=0.05) and "error" not in found[2]
    assert "expected [[6, 21, 3], [2, 21, 3]]" in found[3]["error"]
    assert "kp_source_4" in found[4]["error"]
    assert "driving is 'hologram'" in found[5]["error"]
    assert [item.get("ok") for item in found] == [False, None, False, False, False, False]
    with pytest.raises(MediaError, match="cannot read"):
        items(with_mlp, Path(__file__))


def test_a_template_of_one_frame_is_a_picture(
    parity: ModuleType, mlp: Mlp, golden: dict[str, np.ndarray]
) -> None:
    table = {k: v[:1] if k.startswith("template_") else v for k, v in golden.items()}
    case = {"source": "video", "driving": "template", "n": 6, "options": {"flag_stitching": False}}
    case["options"]["flag_normalize_lip"] = False  # type: ignore[index]
    kp_source, kp_driving = parity.compose_case(table, case, mlp)
    assert kp_driving.shape == (6, 21, 3)
    close((kp_driving - kp_source)[:, [0, 7, 10]], 0)  # neither pose nor these keypoints move
    scale = table["source_M_scale"][:, :, None]
    close((kp_driving - kp_source)[:, [14]], scale * (table["template_exp"][0, :, 14] - LIP_ARRAY[14]), 5e-6)


def test_the_benchmark_wants_one_place_for_the_weights(parity: ModuleType, tmp_path: Path) -> None:
    for weights, bundle in ((None, None), (tmp_path, tmp_path)):
        with pytest.raises(ConfigError, match="exactly one"):
            parity.open_retargeting(None, weights=weights, bundle=bundle, allow_unverified=True)


def test_the_benchmark_runs_the_networks_of_a_bundle(parity: ModuleType, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    rng, matrices = np.random.default_rng(5), {}
    with BundleWriter(
        tmp_path / "bundle",
        family="liveportrait",
        variant="toy",
        licence="Apache-2.0",
        created_by="lp-edge tests",
        keypoints=21,
        normalisation="none",
        regions={},
    ) as writer:
        for name, i, o in (("stitching", 126, 65), ("retarget_eye", 66, 63), ("retarget_lip", 65, 63)):
            matrices[name] = rng.normal(size=(i, o)).astype(np.float32)
            tensor = onnx.helper.make_tensor_value_info
            graph = onnx.helper.make_graph(
                [onnx.helper.make_node("MatMul", [names.FEATURES, "w"], [names.DELTA])],
                name,
                [tensor(names.FEATURES, onnx.TensorProto.FLOAT, ["batch", i])],
                [tensor(names.DELTA, onnx.TensorProto.FLOAT, ["batch", o])],
                [onnx.numpy_helper.from_array(matrices[name], "w")],
            )
            opset = [onnx.helper.make_opsetid("", 17)]
            onnx.save(
                onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / f"{name}.onnx"
            )
            writer.add_network(name, tmp_path / f"{name}.onnx", precision="fp32", opset=17)
    with ExitStack() as stack:
        networks = parity.open_retargeting(
            stack, weights=None, bundle=tmp_path / "bundle", allow_unverified=False
        )
        for run, name in ((networks.stitching, "stitching"), (networks.eye, "retarget_eye")):
            x = rng.normal(size=(2, len(matrices[name]))).astype(np.float32)
            close(run(x), x @ matrices[name], 1e-4)
        x = rng.normal(size=(1, 65)).astype(np.float32)
        close(networks.lip(x), x @ matrices["retarget_lip"], 1e-4)


def test_the_benchmark_reads_checkpoints(parity: ModuleType, mlp: Mlp, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tmp_path / "liveportrait" / "retargeting_models"
    folder.mkdir(parents=True)
    torch.save(mlp.state, folder / "stitching_retargeting_module.pth")
    with ExitStack() as stack:
        where: dict[str, Any] = {"weights": tmp_path, "bundle": None}
        with pytest.raises(ExportError, match="allow-unverified"):
            parity.open_retargeting(stack, **where, allow_unverified=False)
        networks = parity.open_retargeting(stack, **where, allow_unverified=True)
    for name, width in (("stitching", 126), ("eye", 66), ("lip", 65)):
        x = RNG.normal(size=(1, width)).astype(np.float32)
        close(getattr(networks, name)(x), getattr(mlp, name)(x))
