"""Sliders: ranges, texts, keyframe files, LivePortrait's coefficients, and what they do to a mesh."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime import edit, topology
from lp_edge.runtime.compose import Limits, compose
from lp_edge.runtime.edit import ALIASES, SLIDERS, EditDelta, Edits, liveportrait_delta, parse_edits
from lp_edge.runtime.face_motion import Canonical, load_canonical, motion_from_points, points_from_motion
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.gestures import builtin_template
from lp_edge.runtime.keyframes import INTERPOLATIONS, Keyframe, Keyframes, load_keyframes
from lp_edge.runtime.mesh_edit import edit_mesh
from lp_edge.runtime.motion import Motion

LEFT_HALF = [33, 133, 159, 145, 61, 105, 50]


@pytest.fixture(scope="module")
def canonical() -> Canonical:
    return load_canonical()


@pytest.fixture(scope="module")
def source(canonical: Canonical) -> Motion:
    """A face that is not the canonical one: turned, larger, lips a little apart."""
    face = canonical.points.astype(np.float64) * [1.08, 0.95, 1.0]
    face[list(topology.INNER_LIP_LOWER[1:-1]), 1] += 0.05
    turned = 90.0 * face @ rotation_from_euler(4.0, -8.0, 3.0).T + [200.0, 180.0, 0.0]
    return motion_from_points(turned, canonical)


def _faces() -> st.SearchStrategy[Edits]:
    values = {
        name: st.one_of(st.none(), st.floats(s.low, s.high))
        if s.default is None
        else st.floats(s.low, s.high)
        for name, s in SLIDERS.items()
    }
    return st.fixed_dictionaries({}, optional=values).map(lambda v: Edits(**v))


# --- sliders and texts -----------------------------------------------------------------------------------


def test_every_field_is_a_slider_and_rest_changes_nothing() -> None:
    assert [f.name for f in fields(Edits)] == list(SLIDERS)
    assert {f.name: f.default for f in fields(Edits)} == {n: s.default for n, s in SLIDERS.items()}
    assert not Edits()
    assert str(Edits()) == ""
    assert Edits(zoom=1.0, blink=0) == Edits()


def test_the_ranges_are_the_references() -> None:
    ranges = {name: (s.low, s.high) for name, s in SLIDERS.items() if name != "blink"}
    assert ranges == {
        "pitch": (-15, 15), "yaw": (-25, 25), "roll": (-15, 15), "mouth_open": (0, 0.8), "eyes_open": (0, 0.8),
        "wink": (0, 39), "eyebrow": (-30, 30), "gaze_x": (-30, 30), "gaze_y": (-63, 63), "smile": (-0.3, 1.3),
        "pout": (-0.09, 0.09), "purse": (-20, 15), "grin": (0, 15), "lip_open": (-90, 120), "move_x": (-0.19, 0.19),
        "move_y": (-0.19, 0.19), "zoom": (0.9, 1.2),
    }  # fmt: skip


def test_the_example_of_the_manual() -> None:
    edits = parse_edits("smile=0.4,blink=0.2,yaw=10")
    assert edits == Edits(smile=0.4, blink=0.2, yaw=10.0)
    assert parse_edits(" yaw = 10 , ") == Edits(yaw=10)
    assert parse_edits("") == Edits()


def test_other_names_are_understood() -> None:
    assert parse_edits("eyeball-direction-x=3,mouth=0.5,Lip_Variation_Two=1") == Edits(
        gaze_x=3, mouth_open=0.5, grin=1
    )
    assert set(ALIASES.values()) <= set(SLIDERS)
    assert not set(ALIASES) & set(SLIDERS)


@given(_faces())
def test_a_text_reads_back_as_the_same_edits(edits: Edits) -> None:
    assert parse_edits(str(edits)) == edits
    assert bool(edits) == bool(edits.changes())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smirk=1", "no edit is called 'smirk'; expected one of pitch, yaw"),
        ("smile", "'smile' has no value"),
        ("smile=", "edit smile is ''"),
        ("smile=wide", "edit smile is 'wide'"),
        ("smile=nan", "expected a number"),
        ("smile=1.5", r"edit smile is 1\.5; expected -0\.3 to 1\.3"),
        ("yaw=-25.1", "expected -25 to 25"),
        ("yaw=1,yaw=2", "yaw is given twice"),
        ("mouth=0.1,mouth_open=0.2", "mouth_open is given twice"),
    ],
)
def test_wrong_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_edits(text)
    assert caught.value.remedy


@pytest.mark.parametrize("value", [True, "0.1", None, float("nan"), 2])
def test_values_are_checked_in_python_as_well(value: object) -> None:
    with pytest.raises(ConfigError, match="edit smile is"):
        Edits(smile=value)  # type: ignore[arg-type]


def test_clipped_values_stay_in_range() -> None:
    assert Edits.clipped(smile=9.0, yaw=-99.0, blink=0.5) == Edits(smile=1.3, yaw=-25.0, blink=0.5)


# --- keyframes -------------------------------------------------------------------------------------------


def _way(interpolation: str) -> Keyframes:
    rows = [(1.0, 0.0), (2.0, 10.0), (4.0, 14.0), (5.0, 4.0)]
    return Keyframes(tuple(Keyframe(t, {"yaw": v}, interpolation) for t, v in rows))


def test_linear_keys() -> None:
    way = _way("linear")
    assert [way.at(t).yaw for t in (0.0, 1.0, 1.25, 2.0, 3.0, 4.5, 5.0, 99.0)] == [0, 0, 2.5, 10, 12, 9, 4, 4]
    assert way.duration == 5.0


def test_hold_keys_jump() -> None:
    way = _way("hold")
    assert [way.at(t).yaw for t in (1.0, 1.999, 2.0, 4.999, 5.0)] == [0, 0, 10, 14, 4]


def test_smooth_keys_pass_through_without_overshoot_or_kinks() -> None:
    way = _way("smooth")
    assert [way.at(t).yaw for t in (1.0, 2.0, 4.0, 5.0)] == [0, 10, 14, 4]
    t = np.linspace(1.0, 5.0, 4001)
    v = np.array([way.at(x).yaw for x in t])
    assert np.all(np.diff(v[t <= 4.0]) >= 0)
    assert np.all(np.diff(v[t >= 4.0]) <= 0)
    slope = np.diff(v) / np.diff(t)
    assert np.abs(np.diff(slope)).max() < 0.1  # one step of a kink would be 8
    # harmonic mean of the rises 10 and 2 where they meet, by hand; flat at the ends and at the turn
    assert slope[1000] == pytest.approx(2 * 10 * 2 / 12, abs=0.05)
    assert abs(slope[0]) < 0.1
    assert abs(slope[3000]) < 0.1


def test_each_slider_has_its_own_curve() -> None:
    way = Keyframes(
        (
            Keyframe(0, {"yaw": 0.0, "smile": 0.2}),
            Keyframe(1, {"mouth": 0.3}),
            Keyframe(2, {"yaw": 10.0, "smile": 0.4}),
        )
    )
    assert way.at(1).changes() == pytest.approx({"yaw": 5.0, "smile": 0.3, "mouth_open": 0.3})
    assert way.at(-3).mouth_open == way.at(9).mouth_open == 0.3
    assert way.at(0.5).roll == 0.0


def test_keyframes_can_be_copied_and_sent() -> None:
    way = _way("smooth")
    for other in (copy.deepcopy(way), pickle.loads(pickle.dumps(way))):
        assert other == way
        assert other.at(1.7) == way.at(1.7)


@given(
    st.lists(st.tuples(st.floats(0.01, 5), st.floats(0.9, 1.2), st.sampled_from(INTERPOLATIONS)), min_size=1, max_size=6),
    st.floats(-1, 40),
)  # fmt: skip
def test_values_between_keys_stay_between_them(rows: list[tuple[float, float, str]], time: float) -> None:
    times = np.cumsum([row[0] for row in rows])
    way = Keyframes(
        tuple(Keyframe(float(t), {"zoom": v}, w) for t, (_, v, w) in zip(times, rows, strict=True))
    )
    values = [row[1] for row in rows]
    i = int(np.clip(np.searchsorted(times, time), 1, len(rows)))
    near = values[i - 1 : i + 1]
    assert min(near) <= way.at(time).zoom <= max(near) or way.at(time).zoom == values[0]


@pytest.mark.parametrize(
    ("keys", "length", "message"),
    [
        ((), 0.0, "set no slider"),
        ((Keyframe(1.0, {}),), 0.0, "set no slider"),
        ((Keyframe(1.0, {"yaw": 1}), Keyframe(1.0, {"yaw": 2})), 0.0, "rising times"),
        ((Keyframe(1.0, {"yaw": 1}),), 0.5, "duration of the keyframes is 0.5"),
        ((Keyframe(1.0, {"yaw": 1}),), float("nan"), "duration of the keyframes is nan"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: tuple[Keyframe, ...], length: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Keyframes(keys, length)


CSV = """# eyes first
frame@25,yaw,smile,interpolation

0,-5,0,smooth
50,5,,
75,,"1.0",hold
"""


def test_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV, encoding="utf-8-sig")
    way = load_keyframes(tmp_path / "a.csv", fps=Fraction(50))  # the file's own rate counts
    assert way.keys == (
        Keyframe(0.0, {"yaw": -5.0, "smile": 0.0}, "smooth"),
        Keyframe(2.0, {"yaw": 5.0}, "linear"),
        Keyframe(3.0, {"smile": 1.0}, "hold"),
    )
    assert way.at(1.0).yaw == 0.0
    (tmp_path / "b.csv").write_text("Frame,Gaze-X\n30,3\n")
    assert load_keyframes(tmp_path / "b.csv", fps=Fraction(30)).duration == 1.0
    (tmp_path / "c.csv").write_text("time,yaw\r\n0.5,3\r\n")
    assert load_keyframes(tmp_path / "c.csv").keys[0].time == 0.5
    (tmp_path / "d.csv").write_text("frame@30000/1001,yaw\n30000,3\n")
    assert load_keyframes(tmp_path / "d.csv").duration == 1001.0


def test_a_json_file(tmp_path: Path) -> None:
    content = {
        "fps": 29.97,
        "interpolation": "smooth",
        "duration": 4,
        "keys": [
            {"time": 0, "smile": 0.4, "mouth": None},
            {"frame": 59.94, "mouth_open": 0.2, "interpolation": "hold"},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    way = load_keyframes(tmp_path / "a.json")
    assert way.keys == (Keyframe(0.0, {"smile": 0.4}, "smooth"), Keyframe(2.0, {"mouth_open": 0.2}, "hold"))
    assert way.duration == 4.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "set no slider"),
        ("time,yaw\n", "set no slider"),
        ("when,yaw\n1,2\n", "line 1: the first column is 'when'"),
        ("time@25,yaw\n1,2\n", "line 1: the first column"),
        ("frame,yaw\n1,2\n", "line 2: .*of which rate is not said"),
        ("frame@0,yaw\n1,2\n", "line 1: the frame rate is '0'"),
        ("frame@1/0,yaw\n1,2\n", "line 1: the frame rate"),
        ("frame@1e999999999,yaw\n1,2\n", "line 1: the frame rate"),
        ("time,smirk\n1,2\n", "line 1: no edit is called 'smirk'"),
        ("time,yaw,yaw\n1,2,3\n", "line 1: the column yaw is there twice"),
        ("time,yaw\n1,2,3\n", "line 2: 3 cells; expected 2"),
        ("time,yaw\n,2\n", "line 2: time is ''"),
        ("time,yaw\nnan,2\n", "line 2: time is 'nan'"),
        ("time,yaw\n-1,2\n", "line 2: the time of a key is -1"),
        ("time,yaw\n1e9,2\n", "line 2: the time of a key"),
        ("time,yaw\n1,left\n", "line 2: edit yaw is 'left'"),
        ("time,yaw\n\n# note\n1,26\n", "line 4: edit yaw is 26"),
        ("time,yaw\n1,2\n1,3\n", "line 3: a key at 1 s follows one at 1 s"),
        ("time,yaw,interpolation\n1,2,cubic\n", "line 2: interpolation is 'cubic'"),
        ('time,yaw\n1,"2\n', "expected plain CSV"),
    ],
)
def test_wrong_csv_files_are_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.csv.*{message}"):
        load_keyframes(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"keys": [\n  {"time": 0,, }]}', "line 2"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no list of keys"),
        ('{"keys": {}}', "no list of keys"),
        ('{"keys": []}', "set no slider"),
        ('{"keys": [{"time": 0, "yaw": 1}], "rate": 3}', "no entry is called 'rate'"),
        ('{"keys": [3]}', "key 1: the key has no moment"),
        ('{"keys": [{"yaw": 3}]}', "key 1: the key has no moment"),
        ('{"keys": [{"time": 0, "frame": 0, "yaw": 3}]}', "key 1: the key has no moment"),
        ('{"keys": [{"time": 0, "yaw": 3}, {"frame": 1, "yaw": 3}]}', "key 2: .*which rate"),
        ('{"fps": 0, "keys": [{"frame": 1, "yaw": 3}]}', "frame rate is '0.0'"),
        ('{"fps": true, "keys": [{"frame": 1, "yaw": 3}]}', "fps is 'True'"),
        ('{"keys": [{"time": NaN, "yaw": 3}]}', "key 1: time is 'nan'"),
        ('{"keys": [{"time": 1e999, "yaw": 3}]}', "key 1: time is 'inf'"),
        ('{"keys": [{"time": null, "yaw": 3}]}', "key 1: the key has no moment"),
        ('{"keys": [{"time": 0, "yaw": "3"}]}', "key 1: edit yaw is '3'"),
        ('{"keys": [{"time": 0, "yaw": 1' + "0" * 400 + "}]}", "key 1: edit yaw"),
        ('{"keys": [{"time": 0, "yaw": 3, "interpolation": ["smooth"]}]}', "key 1: interpolation"),
        ('{"keys": [{"time": 0, "mouth": 0.1, "mouth_open": 0.1}]}', "key 1: a key sets mouth_open twice"),
        ('{"keys": [{"time": 2, "yaw": 3}], "duration": 1}', "duration of the keyframes is 1"),
    ],
)
def test_wrong_json_files_are_named_by_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.json.*{message}"):
        load_keyframes(tmp_path / "a.json")


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.csv or \.json"):
        load_keyframes(tmp_path / "a.txt")
    with pytest.raises(MediaError, match="cannot read"):
        load_keyframes(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"time,yaw\n0,\xff\n")
    with pytest.raises(MediaError, match="UTF-8"):
        load_keyframes(tmp_path / "a.csv")
    monkeypatch.setattr("lp_edge.runtime.keyframes.MAX_KEYFRAME_BYTES", 5)
    with pytest.raises(MediaError, match="too large"):
        load_keyframes(tmp_path / "a.csv")


# --- LivePortrait ----------------------------------------------------------------------------------------

# By hand from the reference: slider and value → what (keypoint, axis) gains.
BY_HAND: list[tuple[str, float, dict[tuple[int, int], float]]] = [
    ("smile", 0.5, {(20, 1): -0.005, (14, 1): -0.01, (17, 1): 0.00325, (17, 2): 0.0015, (13, 1): -0.001375,
                    (16, 1): -0.001375, (3, 1): -0.00175, (7, 1): -0.00175}),
    ("wink", 10, {(11, 1): 0.01, (13, 1): -0.003, (17, 0): 0.003, (17, 1): 0.003, (3, 1): -0.003}),
    ("eyebrow", 20, {(1, 1): 0.02, (2, 1): -0.02}),
    ("eyebrow", -20, {(1, 0): 0.02, (2, 0): -0.02, (1, 1): -0.006, (2, 1): 0.006}),
    ("gaze_x", 10, {(11, 0): 0.007, (15, 0): 0.01}),
    ("gaze_x", -10, {(11, 0): -0.01, (15, 0): -0.007}),
    ("gaze_y", 20, {(11, 1): -0.01, (15, 1): -0.01, (13, 1): -0.003, (16, 1): -0.003}),
    ("pout", -0.05, {(19, 0): -0.05}),
    ("purse", 10, {(14, 1): 0.01, (3, 1): -0.005, (7, 1): -0.005, (17, 2): -0.005}),
    ("grin", 10, {(20, 2): -0.01, (20, 1): -0.01, (14, 1): -0.01}),
    ("lip_open", -50, {(19, 1): -0.05, (19, 2): -0.005, (17, 1): 0.005}),
    ("move_x", 0.1, {(5, 0): -0.1}),
    ("move_y", 0.1, {(5, 1): 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), BY_HAND)
def test_coefficients_are_the_references(
    name: str, value: float, expected: dict[tuple[int, int], float]
) -> None:
    delta = liveportrait_delta(Edits(**{name: value}))
    by_hand = np.zeros((21, 3))
    for place, amount in expected.items():
        by_hand[place] = amount
    assert delta.expression.dtype == np.float32
    assert np.allclose(delta.expression, by_hand, atol=1e-8)
    assert (delta.angles, delta.zoom, delta.eye_ratio, delta.lip_ratio) == ((0, 0, 0), 1.0, None, None)


def test_every_offset_is_pinned_by_hand() -> None:
    assert {name for name, _, _ in BY_HAND} == set(edit._OFFSETS) | set(edit._SIGNED_OFFSETS)


def test_pose_zoom_and_targets() -> None:
    delta = liveportrait_delta(Edits(pitch=1, yaw=2, roll=3, zoom=1.1, mouth_open=0.4, eyes_open=0.3))
    assert not delta.expression.any()
    # the reference's yaw grows to the left of the picture
    nose = rotation_from_euler(0.0, 2.0, 0.0) @ [0.0, 0.0, -1.0]
    assert nose[0] > 0
    assert delta.angles == (1.0, -2.0, 3.0)
    assert (delta.zoom, delta.lip_ratio, delta.eye_ratio) == (1.1, 0.4, 0.3)
    assert not delta.translation.any()


def test_a_blink_closes_from_how_far_the_eyes_are_open() -> None:
    assert liveportrait_delta(Edits(blink=0.25), 0.4).eye_ratio == pytest.approx(0.3)
    assert liveportrait_delta(Edits(blink=0.5, eyes_open=0.6), 0.4).eye_ratio == pytest.approx(0.3)
    assert liveportrait_delta(Edits(blink=1.0)).eye_ratio == 0.0


@given(_faces(), _faces())
def test_offsets_add_up(a: Edits, b: Edits) -> None:
    """Sliders do not know of each other: the offset of all is the sum of each one's."""
    merged = Edits(**{**a.changes(), **b.changes()})
    alone = sum(
        (
            liveportrait_delta(Edits(**{n: v})).expression.astype(np.float64)
            for n, v in merged.changes().items()
        ),
        np.zeros((21, 3)),
    )
    assert np.allclose(liveportrait_delta(merged).expression, alone, atol=1e-6)


def test_no_delta_adds_nothing() -> None:
    rest, made = EditDelta(), liveportrait_delta(Edits())
    for f in fields(EditDelta):
        assert np.array_equal(getattr(rest, f.name), getattr(made, f.name)), f.name


# --- mesh ------------------------------------------------------------------------------------------------


def _shape(motion: Motion, canonical: Canonical) -> np.ndarray:
    return canonical.points.astype(np.float64) + motion.expression


def _way_of(source: Motion, canonical: Canonical, **sliders: float) -> np.ndarray:
    """How far every point of the face goes, without pose."""
    edited = edit_mesh(source, Edits(**sliders), canonical)
    return _shape(edited, canonical) - _shape(source, canonical)


def test_nothing_edited_is_the_motion_itself(source: Motion, canonical: Canonical) -> None:
    assert edit_mesh(source, Edits(), canonical) is source


@pytest.mark.parametrize(
    "name", [n for n in SLIDERS if n not in ("pitch", "yaw", "roll", "move_x", "move_y", "zoom")]
)
def test_face_sliders_leave_the_pose(name: str, source: Motion, canonical: Canonical) -> None:
    for value in (SLIDERS[name].low, SLIDERS[name].high):
        edited = edit_mesh(source, Edits(**{name: value}), canonical)
        for a, b in zip(edited.angles, source.angles, strict=True):
            assert a == pytest.approx(b, abs=1e-3)
        assert np.allclose(edited.translation, source.translation, atol=1e-3)
        assert edited.scale == source.scale


@pytest.mark.parametrize("name", ["pitch", "yaw", "roll", "move_x", "move_y", "zoom"])
def test_pose_sliders_leave_the_face(name: str, source: Motion, canonical: Canonical) -> None:
    for value in (SLIDERS[name].low, SLIDERS[name].high):
        edited = edit_mesh(source, Edits(**{name: value}), canonical)
        assert np.abs(edited.expression - source.expression).max() < 1e-6


def test_angles_grow_by_the_slider_and_what_a_warp_loses(source: Motion, canonical: Canonical) -> None:
    gain = Limits().gain
    for axis, name in enumerate(("pitch", "yaw", "roll")):
        for value in (-10.0, 10.0):
            before, after = source.angles, edit_mesh(source, Edits(**{name: value}), canonical).angles
            assert after[axis] - before[axis] == pytest.approx(gain[axis] * value, abs=1e-3)
            for other in {0, 1, 2} - {axis}:
                assert after[other] == pytest.approx(before[other], abs=1e-3)


def test_the_nose_goes_where_the_name_says(source: Motion, canonical: Canonical) -> None:
    def tip(**sliders: float) -> np.ndarray:
        edited = edit_mesh(source, Edits(**sliders), canonical)
        return (points_from_motion(edited, canonical) - points_from_motion(source, canonical))[
            topology.NOSE_TIP
        ]

    assert tip(yaw=10)[0] > 5
    assert tip(yaw=-10)[0] < -5
    assert tip(pitch=10)[1] > 5
    assert tip(pitch=-10)[1] < -5
    assert tip(roll=10)[0] > 5  # about the neck
    assert tip(move_x=0.1)[0] > 10
    assert tip(move_y=0.1)[1] < -10
    assert abs(tip(move_x=0.1)[1]) < 1e-2


def test_edits_on_top_of_a_driver_stay_within_the_limits(source: Motion, canonical: Canonical) -> None:
    nod = builtin_template("shake", canonical=canonical, strength=2.0).motion
    limits = Limits()
    edits = Edits(yaw=25)
    for i in range(0, len(nod), 6):
        driven = compose(source, nod[i], nod[0], canonical.points.astype(np.float64))
        edited = edit_mesh(driven, edits, canonical, source=source)
        way = float(edited.angles[1] - source.angles[1])
        assert abs(way) < limits.yaw[1] + 1e-3
        assert way > float(driven.angles[1] - source.angles[1]) + 0.01
    # where nothing is edited the limited pose stays what it is
    kept = edit_mesh(driven, Edits(smile=0.5), canonical, source=source)
    assert kept.angles[1] == pytest.approx(driven.angles[1], abs=1e-3)


def test_zoom_and_moves_are_exact(source: Motion, canonical: Canonical) -> None:
    edited = edit_mesh(source, Edits(zoom=1.2), canonical)
    assert edited.scale == pytest.approx(1.2 * float(source.scale))
    assert np.allclose(edited.translation, source.translation)
    moved = edit_mesh(source, Edits(move_x=0.1, move_y=-0.05), canonical)
    assert (moved.translation - source.translation)[:2] == pytest.approx(
        [0.27 * float(source.scale), 0.135 * float(source.scale)], rel=1e-4
    )


def test_ratios_are_those_of_the_points(source: Motion, canonical: Canonical) -> None:
    edited = edit_mesh(source, Edits(blink=0.5, mouth_open=0.3, yaw=10), canonical)
    again = motion_from_points(points_from_motion(edited, canonical), canonical)
    assert np.allclose(edited.eye_ratio, again.eye_ratio, atol=1e-4)
    assert edited.lip_ratio == pytest.approx(float(again.lip_ratio), abs=1e-4)
    assert edited.eye_ratio.dtype == edited.expression.dtype == np.float32


def test_eyes_follow_their_sliders(source: Motion, canonical: Canonical) -> None:
    own = source.eye_ratio

    def eyes(**sliders: float) -> np.ndarray:
        return edit_mesh(source, Edits(**sliders), canonical).eye_ratio

    shut = [eyes(blink=b).mean() for b in (0.0, 0.25, 0.5, 1.0)]
    assert np.all(np.diff(shut) < -0.03)
    assert eyes(blink=1.0).max() < 0.01
    assert eyes(eyes_open=0.0).max() < 0.01
    assert eyes(eyes_open=0.2) == pytest.approx([0.2, 0.2], abs=0.03)
    wide = eyes(eyes_open=0.8)
    assert np.all(wide > 1.3 * own)
    assert np.all(wide < 1.6 * own)  # no further than a warp can open it
    left, right = eyes(wink=39.0)
    assert left < 0.05
    assert right == pytest.approx(own[1], rel=0.05)


def test_shut_eyes_of_a_driver_are_opened_by_a_target(source: Motion, canonical: Canonical) -> None:
    driven = edit_mesh(source, Edits(blink=1.0), canonical)
    opened = edit_mesh(driven, Edits(eyes_open=0.3), canonical, source=source)
    assert opened.eye_ratio == pytest.approx([0.33, 0.33], abs=0.05)


def test_a_wink_is_one_sided(source: Motion, canonical: Canonical) -> None:
    way = np.linalg.norm(_way_of(source, canonical, wink=39.0), axis=1)
    assert way[159] > 0.08
    assert way[386] < 0.01
    assert way[61] > 3 * way[291]


def test_the_mouth_goes_to_its_target(source: Motion, canonical: Canonical) -> None:
    gain, own = Limits().lip_gain, float(topology.lip_ratio(_shape(source, canonical)))
    for target in (0.0, 0.1, 0.3, 0.5):
        edited = edit_mesh(source, Edits(mouth_open=target), canonical)
        reached = float(topology.lip_ratio(_shape(edited, canonical)))
        assert reached == pytest.approx(max(own + gain * (target - own), 0.0), abs=0.01)
    way = _way_of(source, canonical, mouth_open=0.5)
    assert way[152, 1] > 0.1  # the chin goes with it
    assert np.abs(way[[168, 33, 263, 159, 386, 105]]).max() < 1e-6


@pytest.mark.parametrize(
    ("sliders", "points", "axis", "sign"),
    [
        ({"smile": 1.0}, [61, 291, 50, 280], 1, -1),
        ({"smile": -0.3}, [61, 291], 1, 1),
        ({"eyebrow": 30.0}, [105, 334, 66, 296], 1, -1),
        ({"eyebrow": -30.0}, [105, 334, 66, 296], 1, 1),
        ({"gaze_x": 30.0}, [468, 473], 0, 1),
        ({"gaze_x": -30.0}, [468, 473], 0, -1),
        ({"gaze_y": 63.0}, [468, 473, 159, 386], 1, -1),
        ({"gaze_y": -63.0}, [468, 473, 159, 386], 1, 1),
        ({"pout": 0.09}, [61, 291, 13, 14], 0, 1),
        ({"pout": -0.09}, [61, 291, 13, 14], 0, -1),
        ({"lip_open": 120.0}, [14, 17, 152], 1, 1),
        ({"lip_open": -90.0}, [14, 17, 152], 1, -1),
        ({"purse": 15.0}, [61], 0, 1),
        ({"purse": 15.0}, [291], 0, -1),
        ({"purse": -20.0}, [61], 0, -1),
        ({"purse": -20.0}, [291], 0, 1),
        ({"grin": 15.0}, [13, 0, 61, 291], 1, -1),
    ],
)
def test_points_move_in_the_direction_of_the_name(
    sliders: dict[str, float], points: list[int], axis: int, sign: int, source: Motion, canonical: Canonical
) -> None:
    way = _way_of(source, canonical, **sliders)
    assert np.all(sign * way[points, axis] > 0.015)
    # nose bridge, temples, eye corners: nothing of this moves the skull
    assert np.abs(way[[168, 6, 197, 127, 356, 33, 133, 362, 263]]).max() < 0.02


def test_mouth_sliders_leave_the_eyes_and_eye_sliders_the_mouth(source: Motion, canonical: Canonical) -> None:
    upper = [*topology.LEFT_EYE, *topology.RIGHT_EYE, *topology.LEFT_BROW, *topology.RIGHT_BROW, 468, 473]
    for name in ("pout", "purse", "lip_open", "mouth_open"):
        assert np.abs(_way_of(source, canonical, **{name: SLIDERS[name].high})[upper]).max() < 0.01, name
    lips = [*topology.OUTER_LIP_UPPER, *topology.OUTER_LIP_LOWER, *topology.INNER_LIP_UPPER, 152]
    for name in ("blink", "eyes_open", "eyebrow", "gaze_x", "gaze_y"):
        assert np.abs(_way_of(source, canonical, **{name: SLIDERS[name].high})[lips]).max() < 0.005, name


def test_symmetric_sliders_are_symmetric(canonical: Canonical) -> None:
    rest = motion_from_points(100.0 * canonical.points, canonical)
    for name in ("smile", "purse", "grin", "lip_open", "mouth_open", "blink", "eyebrow"):
        way = _way_of(rest, canonical, **{name: SLIDERS[name].high})
        for left, right in ((33, 263), (159, 386), (61, 291), (105, 334), (50, 280), (205, 425)):
            assert np.abs(way[left] * [-1, 1, 1] - way[right]).max() < 0.01, name


@given(edits=_faces())
def test_any_edits_give_a_sound_face(edits: Edits) -> None:
    canonical = load_canonical()
    source = motion_from_points(100.0 * canonical.points, canonical)
    edited = edit_mesh(source, edits, canonical)
    shape = _shape(edited, canonical)
    assert np.isfinite(shape).all()
    assert np.abs(shape - canonical.points).max() < 0.9
    assert np.allclose(edited.rotation @ edited.rotation.T, np.eye(3), atol=1e-5)
    for pairs in (topology.INNER_LIP_PAIRS, topology.LID_PAIRS_IMAGE_LEFT, topology.LID_PAIRS_IMAGE_RIGHT):
        upper, lower = np.asarray(pairs).T
        assert (shape[lower, 1] - shape[upper, 1]).min() > -0.012
    assert edited.lip_ratio >= 0
    assert edited.scale > 0


def test_sources_are_not_changed(source: Motion, canonical: Canonical) -> None:
    before = replace(source, expression=source.expression.copy())
    edit_mesh(source, Edits(smile=1.0, blink=1.0, mouth_open=0.4, yaw=9), canonical)
    assert np.array_equal(source.expression, before.expression)


# --- the page in docs/ -----------------------------------------------------------------------------------

PAGE = Path(edit.__file__).resolve().parent.parent / "docs" / "options.md"


@pytest.mark.skipif(not PAGE.is_file(), reason="no source tree: the pages are not installed")
def test_the_page_on_options_is_true(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8").replace("\N{MINUS SIGN}", "-")
    rows = re.findall(r"^\| `(\w+)` \| (\S+) … (\S+) \|", text, re.MULTILINE)
    assert [(n, float(a), float(b)) for n, a, b in rows] == [(n, s.low, s.high) for n, s in SLIDERS.items()]
    for example in re.findall(r"--edit (\S+=\S+)", text):
        assert parse_edits(example)
    ways = []
    for start, kind in (("time,", "csv"), ("{\n", "json")):
        [block] = [
            b
            for b in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
            if b.startswith(start)
        ]
        (tmp_path / f"a.{kind}").write_text(block)
        ways.append(load_keyframes(tmp_path / f"a.{kind}"))
    assert [way.duration for way in ways] == [2.4, 3.0]
    for t in np.linspace(0.0, 3.0, 31):
        assert ways[0].at(t) == ways[1].at(t)  # the page calls them the same
