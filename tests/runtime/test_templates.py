"""Motion templates: the own format, LivePortrait's pickles, and everything that must be refused."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import struct
import zipfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lp_edge.errors import BundleError, ConfigError, MediaError, OutputError
from lp_edge.runtime import liveportrait_template, templates
from lp_edge.runtime.face_motion import Canonical, load_canonical
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.liveportrait_template import LivePortraitMap, load_liveportrait, load_map, to_mesh
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.templates import MotionTemplate, load_template, save_template

FRAMES = 7


@pytest.fixture(scope="module")
def canonical() -> Canonical:
    return load_canonical()


def _motion(frames: int = FRAMES, keypoints: int = 478, seed: int = 0) -> Motion:
    rng = np.random.default_rng(seed)
    return Motion(
        rotation=rotation_from_euler(*rng.uniform(-20, 20, (3, frames))).astype(np.float32),
        translation=rng.normal(0, 50, (frames, 3)).astype(np.float32),
        scale=rng.uniform(50, 90, frames).astype(np.float32),
        expression=rng.uniform(-0.5, 0.5, (frames, keypoints, 3)).astype(np.float32),
        eye_ratio=rng.uniform(0, 0.4, (frames, 2)).astype(np.float32),
        lip_ratio=rng.uniform(0, 0.6, frames).astype(np.float32),
    )


def _template(**changes: object) -> MotionTemplate:
    fields: dict[str, object] = {
        "fps": Fraction(30000, 1001),
        "family": "mesh",
        "motion": _motion(),
        "neutral": 3,
        "source": "a clip, näher beschrieben",
        "meta": {"who": "nobody"},
    }
    return MotionTemplate(**{**fields, **changes})  # type: ignore[arg-type]


def _raw(template: MotionTemplate, folder: Path) -> dict[str, np.ndarray]:
    save_template(template, folder / "raw.npz")
    with np.load(folder / "raw.npz") as table:
        return {name: table[name] for name in table.files}


def _write(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)
    return path


# --- own format ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "keypoints"), [("mesh", 478), ("liveportrait", 21)])
def test_what_is_saved_is_loaded(tmp_path: Path, family: str, keypoints: int) -> None:
    saved = _template(family=family, motion=_motion(keypoints=keypoints))
    save_template(saved, tmp_path / "a.npz")
    loaded = load_template(tmp_path / "a.npz")
    assert (loaded.fps, loaded.family, loaded.neutral) == (saved.fps, family, 3)
    assert (loaded.source, loaded.meta) == (saved.source, {"who": "nobody"})
    for name in ("rotation", "translation", "scale", "eye_ratio", "lip_ratio"):
        assert np.array_equal(getattr(loaded.motion, name), getattr(saved.motion, name)), name
    # the stated error of float16, and no better by accident
    off = np.abs(loaded.motion.expression - saved.motion.expression).max()
    assert 0 < off <= 0.00013
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_template_counts_its_frames() -> None:
    assert len(_template()) == FRAMES


def test_float64_is_read(tmp_path: Path) -> None:
    arrays = {
        k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in _raw(_template(), tmp_path).items()
    }
    assert load_template(_write(tmp_path / "b.npz", arrays)).motion.rotation.dtype == np.float32


def test_rounding_errors_of_rotations_are_repaired(tmp_path: Path) -> None:
    arrays = _raw(_template(), tmp_path)
    exact = arrays["rotation"].copy()
    arrays["rotation"] = (exact + np.random.default_rng(0).normal(0, 1e-3, exact.shape)).astype(np.float32)
    rotation = load_template(_write(tmp_path / "b.npz", arrays)).motion.rotation
    assert np.abs(np.swapaxes(rotation, 1, 2) @ rotation - np.eye(3)).max() < 1e-5
    assert np.abs(rotation - exact).max() < 1e-2


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["rotation", "translation", "scale", "expression", "eye_ratio", "lip_ratio"])
def test_numbers_that_are_none_are_named_with_their_frame(tmp_path: Path, name: str, value: float) -> None:
    arrays = _raw(_template(), tmp_path)
    arrays[name] = arrays[name].copy()
    arrays[name].reshape(FRAMES, -1)[4, 0] = value
    with pytest.raises(MediaError, match=rf"b\.npz: {name} .*frame 4"):
        load_template(_write(tmp_path / "b.npz", arrays))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("lip_ratio"), "no array lip_ratio"),
        (lambda a: a.update(expression=a["expression"][:, :68]), r"expected \(7, 478, 3\)"),
        (lambda a: a.update(scale=a["scale"][:3]), r"expected \(3, 3, 3\)"),
        (lambda a: a.update(scale=a["scale"][:, None]), "one number a frame"),
        (lambda a: a.update(scale=-a["scale"]), "at least 1e-06"),
        (lambda a: a.update(eye_ratio=a["eye_ratio"] - 1), "negative"),
        (lambda a: a.update(rotation=a["rotation"] * [[[-1, 1, 1]]]), "no rotation in frame 0"),
        (lambda a: a.update(rotation=a["rotation"] * 1.5), "no rotation in frame 0"),
        (lambda a: a.update(rotation=a["rotation"].astype(np.complex64)), "complex64"),
        (lambda a: a.update(rotation=a["rotation"].astype(str)), "expected floating point"),
        (lambda a: a.update(header=np.arange(3)), "the header is int64"),
        (lambda a: a.update(header=np.asarray("[1")), "no JSON"),
        (lambda a: a.update({k: v[:0] for k, v in a.items() if v.ndim}), "no frames"),
    ],
)
def test_broken_arrays_are_refused(tmp_path: Path, change: object, message: str) -> None:
    arrays = _raw(_template(), tmp_path)
    change(arrays)  # type: ignore[operator]
    with pytest.raises(MediaError, match=message) as caught:
        load_template(_write(tmp_path / "b.npz", arrays))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 2, "schema 2"),
        ("family", "puppet", "puppet"),
        ("family", 3, "no text"),
        ("fps", [25], "frame rate"),
        ("fps", [25, 0], "frame rate"),
        ("fps", [25.0, 1], "frame rate"),
        ("fps", [5000, 1], "frame rate is 5000"),
        ("neutral", 7, "neutral frame is 7"),
        ("neutral", -1, "neutral frame is -1"),
        ("neutral", 0.5, "neutral frame"),
        ("meta", {"a": 1}, "meta"),
    ],
)
def test_broken_headers_are_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    arrays = _raw(_template(), tmp_path)
    arrays["header"] = np.asarray(json.dumps({**json.loads(str(arrays["header"])), key: value}))
    with pytest.raises(MediaError, match=message):
        load_template(_write(tmp_path / "b.npz", arrays))


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    save_template(_template(), tmp_path / "a.npz")
    data = (tmp_path / "a.npz").read_bytes()
    for size in [1, 3, 10, 200, *range(1000, len(data), len(data) // 15), len(data) - 1]:
        (tmp_path / "b.npz").write_bytes(data[:size])
        with pytest.raises(MediaError):
            load_template(tmp_path / "b.npz")


def test_a_flipped_byte_is_an_error(tmp_path: Path) -> None:
    save_template(_template(), tmp_path / "a.npz")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 0x55
    (tmp_path / "b.npz").write_bytes(data)
    with pytest.raises(MediaError):
        load_template(tmp_path / "b.npz")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    for name, content in (("empty.npz", b""), ("text.npz", b"not a template"), ("text.pkl", b"(lp0\n.")):
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("a.txt", "nothing")
    with pytest.raises(MediaError, match="is empty"):
        load_template(tmp_path / "empty.npz")
    for name in ("text.npz", "text.pkl"):
        with pytest.raises(MediaError, match="no motion template"):
            load_template(tmp_path / name)
    with pytest.raises(MediaError, match="no array header"):
        load_template(tmp_path / "other.npz")
    with pytest.raises(MediaError, match="not a file"):
        load_template(tmp_path)
    with pytest.raises(MediaError, match=r"no such file or template.*nod"):
        load_template(tmp_path / "none.npz")


def test_pickled_arrays_are_refused_unread(tmp_path: Path) -> None:
    arrays = _raw(_template(), tmp_path)
    arrays["lip_ratio"] = np.asarray([_Evil(tmp_path / "ran")] * FRAMES, dtype=object)
    with pytest.raises(MediaError, match="pickled objects"):
        load_template(_write(tmp_path / "b.npz", arrays))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shape", [(2**40, 478, 3), (2**62, 2**62, 3), (FRAMES, 478, 2)])
def test_declared_sizes_are_checked_before_memory_is_taken(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = _raw(_template(), tmp_path)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            if name == "expression":
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                member.write(array.tobytes())
            else:
                np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    with pytest.raises(MediaError, match="bytes"):
        load_template(tmp_path / "b.npz")


def test_long_templates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_FRAMES", FRAMES - 1)
    with pytest.raises(MediaError, match="at most 6"):
        _template()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_template(_template(), tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()

    def full(stream: io.BytesIO, **arrays: np.ndarray) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OutputError, match="No space left"):
        save_template(_template(neutral=0), tmp_path / "a.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == before


def test_places_where_nothing_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder"):
        save_template(_template(), tmp_path / "no" / "a.npz")
    with pytest.raises(OutputError, match=r"ends in \.npz"):
        save_template(_template(), tmp_path / "a.pkl")
    assert not list(tmp_path.iterdir())


# --- LivePortrait's pickles -----------------------------------------------------------------------------


class _Evil:
    """Runs code when it is unpickled in the ordinary way: creates the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def _liveportrait(layout: str = "R", frames: int = FRAMES, seed: int = 0) -> dict[str, object]:
    m = _motion(frames, 21, seed)
    old = layout == "R_d"
    content: dict[str, object] = {
        "n_frames": frames,
        "output_fps": 25,
        "motion": [
            {
                "scale": m.scale[i].reshape(1, 1) / 50,
                layout: m.rotation[i].T[None].copy(),
                "exp": m.expression[i][None] / 20,
                "t": m.translation[i][None] / 500,
            }
            for i in range(frames)
        ],
    }
    if old:
        content["c_d_eyes_lst"] = [m.eye_ratio[i][None] for i in range(frames)]
        content["c_d_lip_lst"] = [m.lip_ratio[i].reshape(1, 1) for i in range(frames)]
    return content


def _pickled(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("layout", ["R", "R_d"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_both_layouts_in_every_binary_protocol(tmp_path: Path, layout: str, protocol: int) -> None:
    content = _liveportrait(layout)
    template = load_template(_pickled(tmp_path / "a.pkl", content, protocol))
    made = _motion(FRAMES, 21)
    assert (template.family, template.fps, len(template)) == ("liveportrait", 25, FRAMES)
    # LivePortrait multiplies rows by R, we multiply them by the transpose of ours
    assert np.allclose(template.motion.rotation, made.rotation, atol=1e-6)
    assert np.array_equal(template.motion.expression, made.expression / 20)
    assert np.array_equal(template.motion.translation, made.translation / 500)
    assert np.array_equal(template.motion.scale, made.scale / 50)
    assert template.meta == {"layout": layout, "ratios": "eyes lip" if layout == "R_d" else "none"}
    if layout == "R_d":
        assert np.array_equal(template.motion.eye_ratio, made.eye_ratio)
        assert np.array_equal(template.motion.lip_ratio, made.lip_ratio)
    else:  # something plausible, and meta says that it is not the file's
        assert np.array_equal(template.motion.eye_ratio, np.tile(np.float32([0.3, 0.32]), (FRAMES, 1)))
        assert np.array_equal(template.motion.lip_ratio, np.full(FRAMES, np.float32(0.1)))


def test_ratios_of_which_only_some_are_there(tmp_path: Path) -> None:
    content = _liveportrait("R_d")
    del content["c_d_lip_lst"]
    template = load_template(_pickled(tmp_path / "a.pkl", content))
    assert template.meta["ratios"] == "eyes"
    assert np.array_equal(template.motion.eye_ratio, _motion(FRAMES, 21).eye_ratio)
    assert np.array_equal(template.motion.lip_ratio, np.full(FRAMES, np.float32(0.1)))


def test_pickles_of_numpy_1_and_other_dtypes(tmp_path: Path) -> None:
    content = _liveportrait()
    frame = content["motion"][2]  # type: ignore[index]
    frame["exp"] = np.asfortranarray(frame["exp"].astype(">f8"))
    frame["scale"] = np.float64(1.25)
    frame["t"] = frame["t"].astype(np.float16)
    data = pickle.dumps(content, protocol=2)
    (tmp_path / "a.pkl").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    motion = load_liveportrait(tmp_path / "a.pkl").motion
    assert motion.scale[2] == np.float32(1.25)
    assert np.allclose(motion.expression[2], _motion(FRAMES, 21).expression[2] / 20)


def test_television_frame_rates(tmp_path: Path) -> None:
    for rate, expected in (
        (29.97, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (12.5, Fraction(25, 2)),
    ):
        template = load_liveportrait(_pickled(tmp_path / "a.pkl", {**_liveportrait(), "output_fps": rate}))
        assert template.fps == expected


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for protocol in (2, 3, 4, 5):
        for content in (_Evil(marker), {**_liveportrait(), "extra": _Evil(marker)}):
            with pytest.raises(MediaError, match=r"names '\w+\.mkdir'.*nothing was executed"):
                load_template(_pickled(tmp_path / "a.pkl", content, protocol))
    assert not marker.exists()
    # the same file does run code when it is opened carelessly, so the test above means something
    pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert marker.is_dir()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.", "builtins.eval"),
        (b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(tR.", r"torch.*\.cpu\(\)\.numpy\(\)"),
        (b"\x80\x04cnumpy\nndarray\n(tR.", "a call of what is no function"),
        (b"\x80\x04cnumpy\nload\n(tR.", "numpy.load"),
        (b"\x80\x04cnumpy\ndtype\n(X\x01\x00\x00\x00OtR.", "dtype"),
        (b"\x80\x04cnumpy\ndtype\n(X\x0b\x00\x00\x00S9999999999tR.", "dtype"),
        (b"\x80\x04]r\xff\xff\xff\x7f.", "no LivePortrait template"),  # a memo index of 2^31
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.", "cannot be read"),  # a terabyte of bytes
        (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.", "no LivePortrait template"),  # a frame as long
        (b"\x80\x04(((((.", "no LivePortrait template"),
        (b"\x80\x04t.", "cannot be read"),
        (b"\x80\x040.", "cannot be read"),
        (b"\x80\x04}}K\x01s.", "cannot be read"),
        (b"\x80\x04}h\x07.", "cannot be read"),
        (b"\x80\x04}\x8f.", "instruction EMPTY_SET"),
        (b"\x80\x04P1\n.", "instruction PERSID"),
        (b"\x80\x04}", "cannot be read"),
        (
            b"\x80\x04" + b"\x85" * 0 + b")" + b"\x85" * 100_000 + b".",
            "no LivePortrait template",
        ),  # deep nesting
    ],
)
def test_hostile_pickles_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(MediaError, match=message):
        load_template(tmp_path / "a.pkl")


def test_the_number_of_instructions_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _pickled(tmp_path / "a.pkl", _liveportrait())
    monkeypatch.setattr(liveportrait_template, "MAX_PICKLE_OPS", 500)
    with pytest.raises(MediaError, match="more than 500 instructions"):
        load_template(path)
    monkeypatch.setattr(liveportrait_template, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(MediaError, match="at most 1000"):
        load_template(path)


def test_every_truncated_pickle_is_an_error(tmp_path: Path) -> None:
    data = pickle.dumps(_liveportrait("R_d"), protocol=4)
    for size in range(2, len(data) - 1, 37):
        (tmp_path / "a.pkl").write_bytes(data[:size])
        with pytest.raises(MediaError):
            load_template(tmp_path / "a.pkl")


@pytest.mark.parametrize("kind", ["pkl", "npz"])
def test_altered_bytes_never_crash_the_reader(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "pkl":
        good = pickle.dumps(_liveportrait("R_d", frames=2), protocol=4)
    else:
        arrays = _raw(_template(motion=_motion(2), neutral=0), tmp_path)
        arrays["expression"] = arrays["expression"][:, :1]  # short, so that most changes hit structure
        good = _write(tmp_path / "good.npz", arrays).read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for position in rng.integers(2, len(data), rng.integers(1, 6)):
            data[position] = rng.integers(256)
        (tmp_path / "a.bin").write_bytes(data)
        try:
            load_template(tmp_path / "a.bin")
        except MediaError as error:
            refused += 1
            assert error.expected and "a.bin" in str(error)
    assert refused > 100


def _spoil(content: dict[str, object], frame: int, key: str, value: object) -> dict[str, object]:
    content["motion"][frame][key] = value  # type: ignore[index]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no LivePortrait template"),
        ({"motion": []}, "0 frames"),
        ({"motion": [3]}, "frame 0 is int"),
        ({**_liveportrait(), "n_frames": 9}, "says 9 frames and holds 7"),
        ({**_liveportrait(), "output_fps": float("nan")}, "output_fps"),
        ({**_liveportrait(), "output_fps": None}, "output_fps"),
        ({**_liveportrait("R_d"), "c_d_lip_lst": [0.1]}, "1 lip ratios for 7 frames"),
        (_spoil(_liveportrait(), 5, "exp", np.zeros((1, 20, 3))), "exp of frame 5"),
        (_spoil(_liveportrait(), 5, "exp", np.full((1, 21, 3), np.nan)), "frame 5"),
        (_spoil(_liveportrait(), 5, "R", np.ones((1, 3, 3))), "no rotation in frame 5"),
        (_spoil(_liveportrait(), 5, "R", "text"), "R of frame 5 is str"),
        (_spoil(_liveportrait(), 5, "scale", np.zeros((1, 1))), "at least 1e-06"),
        (_spoil(_liveportrait(), 5, "t", np.asarray([None] * 3)), "dtype"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_template(_pickled(tmp_path / "a.pkl", content))


# --- LivePortrait's motion on the mesh -------------------------------------------------------------------


def test_pose_maps_exactly(tmp_path: Path, canonical: Canonical) -> None:
    """A rigid face placed by LivePortrait's formula and by ours lies in the same place."""
    template = load_template(_pickled(tmp_path / "a.pkl", _liveportrait()))
    turn = rotation_from_euler(-6.0, 0.0, 0.0)
    mapping = LivePortraitMap(
        np.zeros((63, len(canonical.basis) + 3), np.float32),
        np.ones(2, np.float32),
        turn.astype(np.float32),
        0.29,
        np.asarray([0, -0.05, 0.11], np.float32),
    )
    mesh = to_mesh(template, canonical, mapping)
    theirs = (
        mapping.unit * canonical.points @ turn.T + mapping.pivot
    )  # our face in LivePortrait's canonical space
    content = _liveportrait()
    for i, frame in enumerate(content["motion"]):  # type: ignore[arg-type]
        crop = frame["scale"].item() * theirs @ frame["R"][0] + frame["t"][0]
        ours = (
            mesh.motion.scale[i] * canonical.points @ mesh.motion.rotation[i].T + mesh.motion.translation[i]
        )
        assert np.abs(128 * (crop + 1) - ours).max() < 0.01
    assert (mesh.family, mesh.fps, len(mesh)) == ("mesh", 25, FRAMES)
    assert np.abs(mesh.motion.expression).max() == 0


def test_expression_is_linear_in_the_change_against_neutral(tmp_path: Path, canonical: Canonical) -> None:
    template = replace(load_template(_pickled(tmp_path / "a.pkl", _liveportrait())), neutral=2)
    weights = np.random.default_rng(0).normal(0, 1, (63, len(canonical.basis) + 3)).astype(np.float32)
    mapping = replace(load_map(), weights=weights)
    one = to_mesh(template, canonical, mapping).motion.expression
    two = to_mesh(template, canonical, replace(mapping, weights=2 * weights)).motion.expression
    assert np.abs(one[2]).max() == 0
    assert np.abs(one[4]).max() > 0.01
    assert np.allclose(two, 2 * one, atol=1e-5)


def test_a_mesh_template_needs_no_map(canonical: Canonical) -> None:
    template = _template()
    assert to_mesh(template, canonical) is template


def test_maps_that_do_not_fit_are_refused(tmp_path: Path, canonical: Canonical) -> None:
    template = load_template(_pickled(tmp_path / "a.pkl", _liveportrait()))
    with pytest.raises(BundleError, match="coefficients"):
        to_mesh(template, canonical, replace(load_map(), weights=np.zeros((63, 5), np.float32)))
    for name in ("none.npz", "a.pkl"):
        with pytest.raises(BundleError, match="cannot read"):
            load_map(tmp_path / name)
    np.savez(tmp_path / "b.npz", weights=np.zeros((3, 3)), own_ratio=0, rotation=0, unit=1, pivot=0)
    with pytest.raises(BundleError, match="finite"):
        load_map(tmp_path / "b.npz")


# --- one template, two families ---------------------------------------------------------------------------


def test_a_template_of_its_own_family_is_not_touched(tmp_path: Path) -> None:
    path = _pickled(tmp_path / "a.pkl", _liveportrait("R_d"))
    wanted, as_it_is = load_template(path, family="liveportrait"), load_template(path)
    assert wanted.family == "liveportrait"
    assert np.array_equal(wanted.motion.expression, as_it_is.motion.expression)
    save_template(wanted, tmp_path / "a.npz")
    assert load_template(tmp_path / "a.npz", family="liveportrait").meta == wanted.meta


def test_liveportrait_motion_becomes_mesh_motion(tmp_path: Path, canonical: Canonical) -> None:
    pkl = _pickled(tmp_path / "a.pkl", _liveportrait("R_d"))
    save_template(load_template(pkl), tmp_path / "a.npz")
    for path in (pkl, tmp_path / "a.npz"):
        usual = load_template(path, canonical)
        assert usual.family == "mesh"
        assert np.array_equal(usual.motion.expression, load_template(path, family="mesh").motion.expression)


def test_the_bundles_own_map_is_used(tmp_path: Path, canonical: Canonical) -> None:
    path = _pickled(tmp_path / "a.pkl", _liveportrait("R_d"))
    known = load_map()
    table = {
        name: np.asarray(getattr(known, name))
        for name in ("weights", "own_ratio", "rotation", "unit", "pivot")
    }
    same = load_template(path, canonical, template_map=table).motion
    other = load_template(path, canonical, template_map={**table, "weights": 2 * table["weights"]}).motion
    assert np.array_equal(same.expression, load_template(path, canonical).motion.expression)
    assert np.allclose(other.expression, 2 * same.expression, atol=1e-5)
    assert np.abs(same.expression).max() > 0.01
    for broken in ({**table, "unit": np.float32(0)}, {**table, "pivot": np.zeros(2)}, {}):
        with pytest.raises(BundleError, match="the map of LivePortrait's motion"):
            load_template(path, canonical, template_map=broken)


def test_mesh_motion_cannot_become_liveportraits(tmp_path: Path) -> None:
    save_template(_template(), tmp_path / "a.npz")
    with pytest.raises(
        ConfigError, match=r"a\.npz holds motion of the family mesh; expected liveportrait"
    ) as caught:
        load_template(tmp_path / "a.npz", family="liveportrait")
    assert "bundle of the family mesh" in caught.value.remedy
    with pytest.raises(ConfigError, match="family is 'puppet'"):
        load_template(tmp_path / "a.npz", family="puppet")


def test_built_in_names_in_both_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [load_template("nod", family=f).family for f in (None, "mesh", "liveportrait")] == [
        "mesh",
        "mesh",
        "liveportrait",
    ]


@pytest.fixture(scope="module")
def driving(shared: Path) -> Path:
    folder = shared / "samples" / "driving"
    if not (folder / "laugh.pkl").is_file():
        pytest.skip(f"no sample templates at {folder}")
    return folder


def test_real_templates_of_both_layouts(driving: Path) -> None:
    for name in ("d1", "d5", "d8", "laugh", "open_lip", "shake_face", "talking", "wink"):
        template = load_template(driving / f"{name}.pkl")
        content = pickle.loads((driving / f"{name}.pkl").read_bytes())
        expected = np.concatenate([frame["exp"] for frame in content["motion"]])
        assert np.array_equal(template.motion.expression, expected), name
        assert template.fps == content["output_fps"], name


def test_real_templates_move_what_they_are_named_after(driving: Path, canonical: Canonical) -> None:
    def motion(name: str) -> Motion:
        return load_template(driving / f"{name}.pkl", canonical).motion

    laugh, wink, lips, shake, talk = (
        motion(n) for n in ("laugh", "wink", "open_lip", "shake_face", "talking")
    )
    assert laugh.lip_ratio.max() > laugh.lip_ratio[0] + 0.15
    shut = wink.eye_ratio[0] - wink.eye_ratio
    frame, side = np.unravel_index(shut.argmax(), shut.shape)
    assert shut[frame, side] > 0.1
    assert shut[frame, side] > 1.5 * shut[frame, 1 - side]
    assert wink.lip_ratio.max() < 0.05
    assert lips.lip_ratio.max() > lips.lip_ratio[0] + 0.05
    assert np.ptp(shake.angles[1]) > 25
    assert np.ptp(talk.lip_ratio) > 0.1
    gap = talk.expression[:, 14, 1] - talk.expression[:, 13, 1]
    assert np.corrcoef(gap, talk.lip_ratio)[0, 1] > 0.8


@pytest.mark.parametrize("name", ["translation", "scale", "expression", "eye_ratio", "lip_ratio"])
def test_numbers_that_no_face_has_are_refused(name: str) -> None:
    """float32 maths with them would overflow."""
    motion = _motion(3)
    array = np.array(getattr(motion, name))
    array.reshape(3, -1)[1] = 1e30
    with pytest.raises(MediaError, match=rf"{name} of the template reaches 1e\+30 in frame 1"):
        MotionTemplate(Fraction(25), "mesh", replace(motion, **{name: array}))
