"""Built-in templates: at rest at both ends, smooth, anatomically sane, readable back from their own points."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lp_edge.errors import ConfigError
from lp_edge.runtime import topology
from lp_edge.runtime.face_motion import Canonical, load_canonical, motion_from_points, points_from_motion
from lp_edge.runtime.gestures import GESTURES, Controls, builtin_template, face_shape
from lp_edge.runtime.liveportrait_template import to_mesh
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.templates import load_template, save_template

NAMES = sorted(GESTURES)
STILL = [168, 6, 197, 10, 151, 127, 356, 21, 251, 33, 133, 362, 263]


@pytest.fixture(scope="module")
def canonical() -> Canonical:
    return load_canonical()


@pytest.fixture(scope="module")
def motions(canonical: Canonical) -> dict[str, Motion]:
    return {name: builtin_template(name, canonical=canonical).motion for name in NAMES}


def _shape(canonical: Canonical, **controls: float) -> np.ndarray:
    rest = Controls.rest(1)
    return face_shape(replace(rest, **{k: np.full(1, v) for k, v in controls.items()}), canonical)[0]


def _gaps(shape: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    index = np.asarray(pairs)
    return shape[..., index[:, 1], 1] - shape[..., index[:, 0], 1]


def test_the_promised_gestures_are_there() -> None:
    assert {"nod", "shake", "blink", "smile", "talk"} <= set(GESTURES)


@pytest.mark.parametrize("name", NAMES)
def test_a_gesture_starts_and_ends_at_rest(
    name: str, motions: dict[str, Motion], canonical: Canonical
) -> None:
    m = motions[name]
    for frame in (0, -1):
        assert np.abs(m.expression[frame]).max() < 0.01
        assert max(abs(float(a[frame])) for a in m.angles) < 0.3
    assert max(np.ptp(a) for a in m.angles) > 3 or np.abs(m.expression).max() > 0.05  # it does something


@pytest.mark.parametrize("name", NAMES)
def test_motion_is_smooth_and_bounded(name: str, motions: dict[str, Motion], canonical: Canonical) -> None:
    m = motions[name]
    points = points_from_motion(m, canonical) / 100
    loop = np.concatenate([points, points[:1]])
    speed = np.linalg.norm(np.diff(loop, axis=0), axis=-1) * 25
    assert speed.max() < 5.0  # inter-ocular distances a second; lids are the fastest
    assert np.abs(m.expression).max() < 0.5
    assert max(float(np.abs(a).max()) for a in m.angles) <= 18.0  # what a warp shows without limiting


@pytest.mark.parametrize("name", NAMES)
def test_a_gesture_can_be_read_back_from_its_points(
    name: str, motions: dict[str, Motion], canonical: Canonical
) -> None:
    m = motions[name]
    again = motion_from_points(points_from_motion(m, canonical), canonical)
    for a, b in zip(m.angles, again.angles, strict=True):
        assert np.abs(a - b).max() < 0.4
    assert np.abs(again.scale / m.scale - 1).max() < 0.01
    assert np.abs(again.eye_ratio - m.eye_ratio).max() < 1e-3
    assert np.abs(again.lip_ratio - m.lip_ratio).max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_lips_and_lids_never_cross(name: str, strength: float, canonical: Canonical) -> None:
    shape = (
        canonical.points + builtin_template(name, strength=strength, canonical=canonical).motion.expression
    )
    assert _gaps(shape, topology.INNER_LIP_PAIRS).min() > -0.012
    for pairs in (topology.LID_PAIRS_IMAGE_LEFT, topology.LID_PAIRS_IMAGE_RIGHT):
        assert _gaps(shape, pairs).min() > -0.01


def test_angles_are_those_of_the_names(motions: dict[str, Motion]) -> None:
    for name, axis, size in (("nod", 0, 8.0), ("shake", 1, 12.0), ("tilt", 2, 10.0)):
        spans = [float(np.ptp(a)) for a in motions[name].angles]
        assert spans[axis] > 2 * size, name
        assert int(np.argmax(spans)) == axis, name
        signed = motions[name].angles[axis]
        assert signed.max() > 0.7 * size and signed.min() < -0.7 * size, name
    # a nod begins downwards: pitch > 0, and the nose goes down in the picture
    pitch = motions["nod"].angles[0]
    first = int(np.flatnonzero(np.abs(pitch) > 2)[0])
    assert pitch[first] > 0


def test_a_turning_head_turns_about_the_neck(canonical: Canonical) -> None:
    nod = builtin_template("nod", canonical=canonical).motion
    down = int(nod.angles[0].argmax())
    neck = canonical.points[152] + [0.0, 0.0, 0.9]
    nose = points_from_motion(nod, canonical)[:, 1] - points_from_motion(nod, canonical)[0, 1]
    moved = nod.scale[down] * nod.rotation[down] @ neck + nod.translation[down]
    rest = nod.scale[0] * nod.rotation[0] @ neck + nod.translation[0]
    assert nose[down, 1] > 10  # pixels of a face with 100 px between its eyes
    assert np.linalg.norm(moved - rest) < np.linalg.norm(nose[down])


def test_a_blink_shuts_both_eyes_fast_and_opens_them_slowly(motions: dict[str, Motion]) -> None:
    eyes = motions["blink"].eye_ratio
    assert eyes.min(axis=0).max() < 0.02
    assert np.abs(eyes[:, 0] - eyes[:, 1]).max() < 1e-4
    first = eyes[: len(eyes) // 2, 0]
    wide, shut = first[0], int(first.argmin())
    down = np.flatnonzero(first[: shut + 1] < 0.9 * wide)[0]
    up = shut + np.flatnonzero(first[shut:] > 0.9 * wide)[0]
    assert 1 <= shut - down + 1 <= 4
    assert up - shut > shut - down
    assert up - down <= 10


def test_a_blink_moves_the_upper_lid_over_the_iris_and_nothing_else(canonical: Canonical) -> None:
    moved = np.linalg.norm(_shape(canonical, blink=1.0) - canonical.points, axis=1)
    assert moved[[468, 473]].max() < 1e-9
    assert moved[[159, 386]].min() > 0.08
    assert moved[[145, 374]].max() < 0.35 * moved[159]
    far = [i for i in range(468) if i not in topology.REGIONS["eyes"]]
    assert moved[far].max() < 0.35 * moved[159]
    assert moved[[*topology.REGIONS["lip"], 1, 33, 133, 263, 362, 105, 334]].max() < 1e-9


def test_a_closing_lid_passes_in_front_of_the_eyeball(canonical: Canonical) -> None:
    half, shut, wide = (_shape(canonical, blink=b)[159, 2] for b in (0.5, 1.0, 0.0))
    assert half < 0.5 * (shut + wide)


def test_the_jaw_turns_about_its_hinge(canonical: Canonical) -> None:
    p, q = canonical.points, _shape(canonical, jaw=1.0)
    way = q - p
    assert way[152, 1] > 0.2  # chin goes down …
    assert way[152, 2] > 0.05  # … and back
    hinge = 0.5 * (p[234] + p[454])
    assert way[152, 2] < 1.6 * way[152, 1]
    before, after = np.linalg.norm(p[152] - hinge), np.linalg.norm(q[152] - hinge)
    assert abs(after / before - 1) < 0.1
    assert np.abs(way[[1, 4, 168, 33, 263, 159, 386, 10, 234, 454]]).max() < 1e-6
    assert np.abs(way[[13, 0]]).max() < 0.03  # the upper lip stays
    assert topology.lip_ratio(q) > 0.4
    openings = [float(topology.lip_ratio(_shape(canonical, jaw=j))) for j in np.linspace(0, 1, 6)]
    assert np.all(np.diff(openings) > 0.03)
    # the jaw line follows the chin in order
    sizes = np.linalg.norm(way, axis=1)[[152, 149, 136, 172, 58, 132]]
    assert np.all(np.diff(sizes) < 0)


def test_a_smile_widens_and_lifts_the_mouth_and_narrows_the_eyes(canonical: Canonical) -> None:
    p, q = canonical.points, _shape(canonical, smile=1.0)
    assert np.linalg.norm(q[61] - q[291]) > 1.2 * np.linalg.norm(p[61] - p[291])
    assert (q - p)[[61, 291], 1].max() < -0.06
    assert (q - p)[[61, 291], 2].min() > 0.03
    assert (q - p)[[50, 280, 205, 425], 1].max() < -0.02
    assert 0.7 < topology.eye_ratio(q)[0] / topology.eye_ratio(p)[0] < 0.97
    assert np.abs(q - p)[STILL].max() < 0.02


def test_pursed_lips_are_narrow_and_stick_out(canonical: Canonical) -> None:
    p = canonical.points
    narrow, wide = _shape(canonical, rounding=1.0), _shape(canonical, rounding=-1.0)
    widths = [np.linalg.norm(s[61] - s[291]) for s in (narrow, p, wide)]
    assert widths[0] < 0.85 * widths[1] < widths[1] < 0.97 * widths[2]
    assert narrow[[0, 17], 2].max() < p[[0, 17], 2].max() - 0.03


@pytest.mark.parametrize("control", ["blink", "jaw", "smile", "rounding", "brow", "frown", "bare"])
def test_symmetric_controls_give_symmetric_faces(control: str, canonical: Canonical) -> None:
    shape = _shape(canonical, **{control: 0.8})
    for left, right in (
        (33, 263),
        (159, 386),
        (145, 374),
        (61, 291),
        (50, 280),
        (105, 334),
        (172, 397),
        (205, 425),
    ):
        assert np.abs(shape[left] * [-1, 1, 1] - shape[right]).max() < 0.004


def test_no_control_means_the_canonical_face(canonical: Canonical) -> None:
    assert np.abs(face_shape(Controls.rest(2), canonical) - canonical.points).max() < 1e-6


def test_gaze_moves_the_irises_inside_their_eyes(canonical: Canonical) -> None:
    for x in (-1.0, 1.0):
        way = _shape(canonical, gaze_x=x) - canonical.points
        assert np.sign(way[[468, 473], 0]).tolist() == [x, x]
        for iris, corners in ((468, topology.LEFT_EYE_CORNERS), (473, topology.RIGHT_EYE_CORNERS)):
            low, high = sorted(float(canonical.points[i, 0]) for i in corners)
            assert low + 0.08 < (canonical.points + way)[iris, 0] < high - 0.08


def test_talking_opens_and_shuts_the_mouth_several_times(motions: dict[str, Motion]) -> None:
    lips = motions["talk"].lip_ratio
    middle = 0.5 * (lips.min() + lips.max())
    assert np.ptp(lips) > 0.15
    assert (np.diff(np.sign(lips - middle)) > 0).sum() >= 6


def test_a_seed_gives_one_speech(canonical: Canonical) -> None:
    a, b, c = (builtin_template("talk", seed=s, canonical=canonical).motion.expression for s in (1, 1, 2))
    assert np.array_equal(a, b)
    assert np.abs(a - c).max() > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_durations_and_frame_rates(name: str, canonical: Canonical) -> None:
    template = builtin_template(name, duration=2.0, fps=Fraction(30000, 1001), canonical=canonical)
    assert len(template) == 60
    assert template.fps == Fraction(30000, 1001)
    assert np.abs(template.motion.expression[[0, -1]]).max() < 0.03
    slow = builtin_template(name, duration=12.0, canonical=canonical)
    assert len(slow) == 300


def test_strength_scales_motion(canonical: Canonical) -> None:
    weak, strong = (
        builtin_template("nod", strength=s, canonical=canonical).motion.angles[0].max() for s in (0.5, 1.5)
    )
    assert strong == pytest.approx(3 * weak, rel=1e-3)
    still = builtin_template("talk", strength=0.0, canonical=canonical).motion
    assert np.abs(still.expression).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dance", {}, "expected one of nod"),
        ("nod", {"duration": 0.1}, "duration is 0.1"),
        ("nod", {"duration": float("nan")}, "duration is nan"),
        ("nod", {"strength": 3.0}, "strength is 3"),
        ("nod", {"fps": Fraction(1)}, "fps is 1"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        builtin_template(name, **options)  # type: ignore[arg-type]


def test_gestures_are_loaded_by_name_and_kept_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canonical: Canonical
) -> None:
    monkeypatch.chdir(tmp_path)
    template = load_template("smile", canonical)
    assert np.array_equal(template.motion.expression, builtin_template("smile").motion.expression)
    save_template(template, tmp_path / "own.npz")
    assert len(load_template("own.npz")) == len(template)


# --- the same gestures for LivePortrait's 21 keypoints ---------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_liveportrait_gestures_start_from_exactly_nothing(name: str) -> None:
    template = builtin_template(name, family="liveportrait")
    m = template.motion
    assert (template.family, template.neutral) == ("liveportrait", 0)
    assert np.array_equal(m.rotation[0], np.eye(3))
    assert not m.expression[0].any()
    assert not m.translation[0].any()
    assert np.all(m.scale == 1.0)
    assert np.all((m.eye_ratio >= 0) & (m.eye_ratio <= 0.5))
    assert np.all((m.lip_ratio >= 0) & (m.lip_ratio <= 0.6))
    assert np.abs(m.expression).max() < 0.1  # as large as in LivePortrait's own templates
    assert np.abs(m.expression[-1]).max() < 0.003


@pytest.mark.parametrize("name", NAMES)
def test_liveportrait_gestures_show_what_the_mesh_shows(
    name: str, motions: dict[str, Motion], canonical: Canonical
) -> None:
    """Read back through the map that was fitted on LivePortrait's own clips, ratios by the keypoints alone."""
    template = replace(builtin_template(name, family="liveportrait"), meta={})
    ours, theirs = motions[name], to_mesh(template, canonical).motion
    for a, b in zip(ours.angles, template.motion.angles, strict=True):
        assert np.abs(a - b).max() < 0.01
    if name in ("blink", "talk"):
        assert np.corrcoef(ours.eye_ratio[:, 0], theirs.eye_ratio[:, 0])[0, 1] > 0.95
        assert np.ptp(theirs.eye_ratio[:, 0]) == pytest.approx(np.ptp(ours.eye_ratio[:, 0]), rel=0.3)
    if name == "talk":
        assert np.corrcoef(ours.lip_ratio, theirs.lip_ratio)[0, 1] > 0.95
        assert np.ptp(theirs.lip_ratio) == pytest.approx(np.ptp(ours.lip_ratio), rel=0.3)
    if name == "smile":
        shape = canonical.points + theirs.expression
        width = np.linalg.norm(shape[:, 61] - shape[:, 291], axis=1)
        assert width.max() > width[0] + 0.06
    if name == "look":
        iris = theirs.expression[:, [468, 473], 0].mean(1)
        gaze = ours.expression[:, [468, 473], 0].mean(1)
        assert np.corrcoef(iris, gaze)[0, 1] > 0.95


def test_ratios_of_liveportrait_gestures_follow_the_keypoints() -> None:
    m = builtin_template("talk", family="liveportrait").motion
    assert np.corrcoef(m.lip_ratio, m.expression[:, 19, 1])[0, 1] > 0.99
    blink = builtin_template("blink", family="liveportrait").motion
    assert np.corrcoef(blink.eye_ratio[:, 0], blink.expression[:, 11, 1])[0, 1] < -0.99
    assert blink.eye_ratio.min() == 0.0


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="family is 'puppet'"):
        builtin_template("nod", family="puppet")


def test_controls_of_the_mouth_and_the_brows(canonical: Canonical) -> None:
    frown, bare, aside = (
        _shape(canonical, **{name: 1.0}) - canonical.points for name in ("frown", "bare", "aside")
    )
    assert frown[[66, 296, 105, 334], 1].min() > 0.04  # down …
    assert frown[66, 0] > 0.02 > -0.02 > frown[296, 0]  # … and together
    assert bare[13, 1] < -0.03 < 0.02 < bare[14, 1]
    assert aside[[61, 291, 13, 14], 0].min() > 0.1
    assert np.abs(np.stack([bare, aside])[:, [*STILL, 152]]).max() < 0.01
