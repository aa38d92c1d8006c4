"""Bundles: read strictly, verified, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lp_edge.engines import BackendConfig, TensorSpec, backends, bundle
from lp_edge.engines.bundle import (
    Bundle,
    BundleWriter,
    CheckpointEntry,
    EngineKey,
    FileEntry,
    Manifest,
    NetworkEntry,
    load_manifest,
    open_bundle,
    save_manifest,
    sha256_file,
    write_bundle,
)
from lp_edge.errors import BundleError

CPU = BackendConfig("cpu", threads=1)
HEX = "0123456789abcdef" * 4
META: dict[str, Any] = {
    "family": "mesh",
    "variant": "toy",
    "licence": "Apache-2.0",
    "created_by": "tests",
    "keypoints": 478,
    "normalisation": "none",
}
KEY = EngineKey(
    HEX, "10.3.0", "Orin", "8.7", "fp16", {"x": ((1, 4), (2, 4), (8, 4))}, ("STRONGLY_TYPED", "TF32")
)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def failure(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert caught.value.remedy
    return str(caught.value)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def write_probe(folder: Path, variant: str = "toy") -> Bundle:
    with BundleWriter(folder, **{**META, "variant": variant}) as writer:
        writer.add_network("probe", backends._PROBE, precision="fp32", opset=17)
    return open_bundle(folder)


# -- opening ----------------------------------------------------------------------------------------


def test_good_bundle(toy_bundle: Path) -> None:
    opened = open_bundle(toy_bundle)
    assert (opened.manifest.family, opened.manifest.keypoints) == ("mesh", 478)
    assert opened.path_of("face_mesh") == toy_bundle / "face_mesh.onnx"
    assert opened.hashes()["face_mesh.onnx"] == sha256_file(toy_bundle / "face_mesh.onnx")
    with opened.runner("warp_decode", CPU) as runner:
        assert runner.outputs["image"].shape == ("N", "H", "W", 3)


@pytest.mark.parametrize(
    "file", ["face_detector.onnx", "face_mesh.onnx", "warp_decode.onnx", "canonical.npz"]
)
def test_missing_truncated_altered(toy_bundle: Path, file: str) -> None:
    path = toy_bundle / file
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"{file} " in failure(toy_bundle) and "truncated" in failure(toy_bundle)
    path.write_bytes(data + b"\0")
    assert "too long" in failure(toy_bundle)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert f"{file} " in failure(toy_bundle) and "altered: SHA-256" in failure(toy_bundle)
    path.unlink()
    assert f"{file} " in failure(toy_bundle) and "is missing" in failure(toy_bundle)
    assert "lp-export" in failure(toy_bundle)


def test_no_bundle(tmp_path: Path) -> None:
    assert "there is no folder" in failure(tmp_path / "gone")
    assert "has no manifest.json" in failure(tmp_path)
    (tmp_path / "file").touch()
    assert "is not a folder" in failure(tmp_path / "file")


def test_builtin_asks_to_reinstall(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "builtin_directory", lambda: toy_bundle)
    assert open_bundle().directory == toy_bundle
    (toy_bundle / "face_mesh.onnx").unlink()
    with pytest.raises(BundleError, match=r"network face_mesh.* reinstall lp-edge"):
        open_bundle()
    assert "reinstall lp-edge" in failure(toy_bundle)
    (toy_bundle / "manifest.json").unlink()
    with pytest.raises(BundleError, match="reinstall lp-edge"):
        open_bundle(None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "the manifest is []"),
        ("{}", "lacks the key 'schema_version'"),
        ('{"schema_version": 1, "schema_version": 1}', "occurs twice"),
        ('{"schema_version": NaN}', "NaN is not a number"),
        ('{"schema_version": 2, "anything": 1}', "schema version 2; expected 1"),
        ('{"schema_version": "1"}', "lacks the key"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_manifest(toy_bundle: Path, text: str, words: str) -> None:
    (toy_bundle / "manifest.json").write_text(text)
    assert words in failure(toy_bundle)


def test_newer_schema_asks_to_update(toy_bundle: Path) -> None:
    edit(toy_bundle, lambda m: m.update(schema_version=7))
    assert failure(toy_bundle).endswith("update lp-edge")
    edit(toy_bundle, lambda m: m.update(schema_version=0))
    assert "lp-export" in failure(toy_bundle)


def test_manifest_that_is_not_text(toy_bundle: Path) -> None:
    (toy_bundle / "manifest.json").write_bytes(b"\xff\xfe{}")
    assert "not UTF-8" in failure(toy_bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(extra=1), "unknown key 'extra'"),
        (lambda m: m.pop("licence"), "lacks the key 'licence'"),
        (lambda m: m.update(family=""), "family is empty"),
        (lambda m: m.update(keypoints=True), "keypoints is True"),
        (lambda m: m.update(keypoints=4.0), "keypoints is 4.0"),
        (lambda m: m.update(networks={}), "networks is empty"),
        (lambda m: m.update(networks=[]), "networks is []"),
        (lambda m: m.update(sizes={"crop": 0}), "sizes.crop is 0"),
        (lambda m: m.update(regions={"lip": [478]}), "regions.lip[0] is 478"),
        (lambda m: m["networks"].update({"../x": 1}), "networks has the name '../x'"),
        (lambda m: m["networks"]["face_mesh"].update(gpu=1), "networks.face_mesh has the unknown key 'gpu'"),
        (lambda m: m["networks"]["face_mesh"].update(sha256="AB"), "networks.face_mesh.sha256"),
        (lambda m: m["networks"]["face_mesh"].update(size=-1), "networks.face_mesh.size is -1"),
        (lambda m: m["networks"]["face_mesh"].update(precision="fp4"), "one of fp32"),
        (lambda m: m["networks"]["face_mesh"].update(parity={"x": "1"}), "parity.x is '1'"),
        (lambda m: m["networks"]["face_mesh"].update(parity={"x": 10**400}), "parity.x is 1000"),
        (lambda m: m["networks"]["face_mesh"]["inputs"][0].update(dtype="U8"), "inputs[0].dtype is 'U8'"),
        (lambda m: m["networks"]["face_mesh"]["inputs"][0].update(shape=[1.5]), "inputs[0].shape[0] is 1.5"),
        (
            lambda m: m["networks"]["face_mesh"]["inputs"].append(m["networks"]["face_mesh"]["inputs"][0]),
            "twice",
        ),
        (
            lambda m: m["files"].update(other=dict(m["files"]["canonical"])),
            "canonical.npz for file canonical and",
        ),
        (lambda m: m.update(checkpoints=[{"name": "x"}]), "checkpoints[0] lacks the key 'sha256'"),
    ],
)
def test_strict_manifest(toy_bundle: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    edit(toy_bundle, change)
    assert words in failure(toy_bundle)
    assert "manifest.json" in failure(toy_bundle)


@pytest.mark.parametrize(
    "name",
    [
        "../face_mesh.onnx",
        "/etc/passwd",
        "a/../../b",
        "",
        ".",
        "..",
        "a//b",
        "a\\b",
        "a\0b",
        "manifest.json",
        ".x",
    ],
)
def test_file_names_stay_inside(toy_bundle: Path, name: str) -> None:
    edit(toy_bundle, lambda m: m["networks"]["face_mesh"].update(file=name))
    assert "networks.face_mesh.file" in failure(toy_bundle)


def test_unknown_names(toy_bundle: Path) -> None:
    opened = open_bundle(toy_bundle)
    with pytest.raises(
        BundleError, match="no network 'stitching'; it has face_detector, face_mesh, warp_decode"
    ):
        opened.path_of("stitching")
    with pytest.raises(BundleError, match="no file 'other'; it has canonical"):
        opened.load_table("other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n["inputs"][0].update(name="picture"), "no picture; the manifest says picture uint8"),
        (lambda n: n["inputs"][0].update(dtype="float32"), "image uint8 .* the manifest says image float32"),
        (lambda n: n["inputs"][0].update(shape=["N", 128, 128, 3]), r"\[N, 64, 64, 3\].*\[N, 128, 128, 3\]"),
        (lambda n: n["inputs"][0].update(shape=["B", 64, 64, 3]), r"\[N, 64, 64, 3\].*\[B, 64, 64, 3\]"),
        (lambda n: n["outputs"].pop(), "score float32 .* the manifest says nothing of it"),
    ],
)
def test_graph_that_is_not_the_manifest_s(toy_bundle: Path, change: Callable[[Any], Any], words: str) -> None:
    edit(toy_bundle, lambda m: change(m["networks"]["face_mesh"]))
    opened = open_bundle(toy_bundle)
    with pytest.raises(BundleError, match=f"of face_mesh in face_mesh.onnx: the graph has .*{words}"):
        opened.runner("face_mesh", CPU)


def test_anonymous_axes_fit_named_ones() -> None:
    def spec(*shape: int | str) -> TensorSpec:
        return TensorSpec("x", np.dtype("float32"), shape)

    assert bundle._same(spec("?0", 4), spec("N", 4))
    assert not bundle._same(spec("?0", 4), spec(2, 4))
    assert not bundle._same(spec("M", 4), spec("N", 4))
    assert not bundle._same(spec("N"), spec("N", 4))


# -- tables -----------------------------------------------------------------------------------------


def test_tables(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b", **META) as writer:
        writer.add_network("probe", backends._PROBE, precision="fp32", opset=17)
        writer.add_table("t", {"b": np.arange(3), "a": np.float32(2.5), "s": np.array(["x", "yz"])})
    table = open_bundle(tmp_path / "b").load_table("t")
    assert sorted(table) == ["a", "b", "s"]
    assert table["a"].shape == () and table["a"] == 2.5
    np.testing.assert_array_equal(table["b"], [0, 1, 2])


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("kind", ["pickle", "object", "npy", "zip of junk", "text"])
def test_what_is_not_a_table(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "t.npz"
    if kind == "pickle":
        import pickle

        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "object":
        np.savez(path, a=np.array([Bomb()], object))
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    elif kind == "zip of junk":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", b"\x93NUMPY junk")
    else:
        path.write_text("hello")
    with BundleWriter(tmp_path / "b", **META) as writer:
        writer.add_network("probe", backends._PROBE, precision="fp32", opset=17)
        writer.add_file("t", path, file="t.npz")
    with pytest.raises(BundleError, match=r"t\.npz \(file t\) is not a table"):
        open_bundle(tmp_path / "b").load_table("t")
    assert not (tmp_path / "exploded").exists()


def test_objects_cannot_be_written_as_table(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match="not a plain array"),
        BundleWriter(tmp_path / "b", **META) as writer,
    ):
        writer.add_table("t", {"a": np.array([object()])})
    assert list(tmp_path.iterdir()) == []


# -- manifest round trip ----------------------------------------------------------------------------

_name = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,9}", fullmatch=True).filter(
    lambda s: s != "manifest.json"
)
_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_digest = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
_specs = st.lists(
    st.builds(
        TensorSpec,
        _text,
        st.sampled_from(["uint8", "float32", "float16", "bool", "int64"]).map(np.dtype),
        st.lists(st.integers(0, 512) | _text, max_size=5).map(tuple),
    ),
    max_size=3,
    unique_by=lambda s: s.name,
).map(tuple)
_network = st.builds(
    NetworkEntry,
    _name,
    _digest,
    st.integers(0, 2**40),
    st.sampled_from(bundle.PRECISIONS),
    st.integers(1, 30),
    _specs,
    _specs,
    st.dictionaries(_name, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)
_manifest = st.builds(
    Manifest,
    family=_text,
    variant=_text,
    licence=_text,
    created_by=_text,
    keypoints=st.just(478),
    normalisation=st.text(max_size=5).filter(lambda s: s.isprintable()),
    networks=st.dictionaries(_name, _network, min_size=1, max_size=3),
    files=st.dictionaries(_name, st.builds(FileEntry, _name, _digest, st.integers(0, 9)), max_size=2),
    checkpoints=st.lists(st.builds(CheckpointEntry, _text, _digest, _text), max_size=2).map(tuple),
    regions=st.dictionaries(_name, st.lists(st.integers(0, 477), max_size=4).map(tuple), max_size=2),
    sizes=st.dictionaries(_name, st.integers(1, 9999), max_size=2),
).filter(lambda m: len({e.file for _, e in m.contents()}) == len(list(m.contents())))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(manifest=_manifest)
def test_manifest_round_trip(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    path = tmp_path_factory.mktemp("m") / "manifest.json"
    save_manifest(path, manifest)
    assert load_manifest(path) == manifest
    assert [p.name for p in path.parent.iterdir()] == ["manifest.json"]


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([HEX, "fp32", "N"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_is_a_bundle_error(_toy_bundle_once: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands at whatever place of a manifest, reading it works or raises BundleError, nothing else."""
    value = json.loads((_toy_bundle_once / "manifest.json").read_text())
    value["checkpoints"] = [{"name": "x", "sha256": HEX, "licence": "MIT"}]
    value["engines"] = [
        {"network": "face_mesh", "file": "e", "sha256": HEX, "size": 1, "key": bundle.key_json(KEY)}
    ]
    node: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(_json)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(value))
    try:
        load_manifest(path)
    except BundleError as error:
        assert error.remedy and str(path) in str(error)


def test_save_refuses_what_load_would_refuse(tmp_path: Path, toy_bundle: Path) -> None:
    manifest = open_bundle(toy_bundle).manifest
    for wrong in (
        dataclasses.replace(manifest, family=""),
        dataclasses.replace(manifest, regions={"lip": (478,)}),
        dataclasses.replace(manifest, sizes={"crop": 0.5}),  # type: ignore[dict-item]
        dataclasses.replace(manifest, schema_version=2),
    ):
        with pytest.raises(BundleError):
            save_manifest(tmp_path / "m.json", wrong)
    network = dataclasses.replace(manifest.networks["face_mesh"], parity={"x": float("nan")})
    with pytest.raises(BundleError, match="cannot be written"):
        save_manifest(tmp_path / "m.json", dataclasses.replace(manifest, networks={"n": network}))
    assert not (tmp_path / "m.json").exists()


# -- engines ----------------------------------------------------------------------------------------


def test_engine_key_is_stable_and_total() -> None:
    # fixed: a key that changes with a release would throw away everybody's engines
    assert KEY.key() == "27b06127bf5199e32431f918cfa1b15decfd2252866bb5c2159592e26c933c6a"
    assert dataclasses.replace(KEY, flags=("TF32", "STRONGLY_TYPED")).key() == KEY.key()
    others = {
        dataclasses.replace(KEY, **{name: value}).key()
        for name, value in {
            "onnx_sha256": HEX[::-1],
            "tensorrt": "10.3.1",
            "gpu": "Orin Nano",
            "compute_capability": "8.6",
            "precision": "fp32",
            "profile": {"x": ((1, 4), (2, 4), (9, 4))},
            "flags": ("TF32",),
        }.items()
    }
    assert len(others | {KEY.key()}) == len(dataclasses.fields(EngineKey)) + 1


def test_engines_are_kept_and_verified(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b", **META) as writer:
        writer.add_network("probe", backends._PROBE, precision="fp32", opset=17)
        writer.add_engine("probe", b"plan", KEY)
    (engine,) = open_bundle(tmp_path / "b").manifest.engines
    assert engine.built_for == KEY and engine.key() == KEY.key()
    (tmp_path / "b" / engine.file).write_bytes(b"plaN")
    assert "engine of probe" in failure(tmp_path / "b")


@pytest.mark.parametrize("shapes", [((1,), (2,)), ((1,), (2,), (2, 2)), ((2,), (1,), (3,))])
def test_profiles_are_checked(tmp_path: Path, shapes: Any) -> None:
    key = dataclasses.replace(KEY, profile={"x": shapes})
    with (
        pytest.raises(BundleError, match=r"engines\[0\]\.key\.profile\.x"),
        BundleWriter(tmp_path / "b", **META) as w,
    ):
        w.add_network("probe", backends._PROBE, precision="fp32", opset=17)
        w.add_engine("probe", b"plan", key)


# -- writing ----------------------------------------------------------------------------------------


def test_writing_replaces_the_old_bundle_only_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "b"
    assert write_probe(folder, "one").manifest.variant == "one"
    with pytest.raises(RuntimeError, match="stop"), BundleWriter(folder, **META) as writer:
        writer.add_network("probe", backends._PROBE, precision="fp32", opset=17)
        raise RuntimeError("stop")
    assert open_bundle(folder).manifest.variant == "one"
    assert write_probe(folder, "two").manifest.variant == "two"
    assert leftovers(folder.parent) == []


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with BundleWriter(tmp_path / name, **META) as writer:
            writer.add_network("probe", backends._PROBE, precision="fp32", opset=17)
            writer.add_table("t", {"x": np.arange(4), "y": np.eye(2)})
    for file in ("manifest.json", "probe.onnx", "t.npz"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with zipfile.ZipFile(tmp_path / "a" / "t.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}, (
            "no clock in the bytes"
        )


def test_write_bundle(toy_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(toy_bundle).manifest
    files: dict[str, Path | bytes] = {entry.file: toy_bundle / entry.file for _, entry in manifest.contents()}
    assert write_bundle(tmp_path / "copy", manifest, files).manifest == manifest
    assert open_bundle(tmp_path / "copy").manifest == manifest
    for wrong, words in (
        ({**files, "more.txt": b"?"}, "does not name more.txt"),
        ({**files, "canonical.npz": b"?"}, r"canonical\.npz .*truncated"),
        ({k: v for k, v in files.items() if k != "canonical.npz"}, r"canonical\.npz .*missing"),
        ({**files, "../x": b"?"}, "file name"),
    ):
        with pytest.raises(BundleError, match=words):
            write_bundle(tmp_path / "other", manifest, wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "toy_bundle"]


def test_file_added_twice(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"a\.txt is added twice"),
        BundleWriter(tmp_path / "b", **META) as writer,
    ):
        writer.add_file("a", b"1", file="a.txt")
        writer.add_file("b", b"2", file="a.txt")


def test_network_that_is_not_a_graph(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot load"), BundleWriter(tmp_path / "b", **META) as writer:
        writer.add_network("probe", b"junk", precision="fp32", opset=17)


def test_foreign_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(BundleError, match="choose another folder"):
            BundleWriter(tmp_path / name, **META)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    write_probe(tmp_path / "empty")
    assert leftovers(tmp_path) == []


def test_failed_swap_puts_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "b"
    write_probe(folder, "one")
    real = os.rename

    def rename(a: Any, b: Any) -> None:
        if ".staging-" in str(a):
            raise OSError(28, "No space left on device")
        real(a, b)

    monkeypatch.setattr(bundle.os, "rename", rename)
    with pytest.raises(BundleError, match="No space left"):
        write_probe(folder, "two")
    assert open_bundle(folder).manifest.variant == "one"
    assert leftovers(tmp_path) == []


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be written"):
        BundleWriter(tmp_path / "file" / "b", **META)


KILLED = """
import os, signal, sys
from pathlib import Path
from lp_edge.engines import backends, bundle

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

target, moment = Path(sys.argv[1]), sys.argv[2]
writer = bundle.BundleWriter(target, family="mesh", variant="two", licence="x", created_by="x", keypoints=0,
                             normalisation="")
writer.add_network("probe", backends._PROBE, precision="fp32", opset=17)
if moment == "staging":
    die()
elif moment == "verify":
    bundle._verify = die
elif moment == "sync":
    bundle._sync_tree = die
else:
    real = os.rename
    def rename(a, b):
        if moment == "before" or ".staging-" in str(a):
            die()
        real(a, b)
    bundle.os.rename = rename
writer.commit()
"""


@pytest.mark.parametrize("moment", ["staging", "verify", "sync", "before", "between"])
def test_killed_export_leaves_the_old_bundle(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "b"
    write_probe(folder, "one")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), moment], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert leftovers(tmp_path), "the kill must leave something to clean up"
    if moment != "between":
        assert open_bundle(folder).manifest.variant == "one"
    else:
        assert "there is no folder" in failure(folder)
    # the next writer cleans up, and puts an old bundle back before anything can go wrong
    with pytest.raises(RuntimeError), BundleWriter(folder, **META):
        raise RuntimeError
    assert open_bundle(folder).manifest.variant == "one"
    assert leftovers(tmp_path) == []


def test_cleaning_spares_a_writer_at_work(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b", **META) as first:
        first.add_network("probe", backends._PROBE, precision="fp32", opset=17)
        write_probe(tmp_path / "b", "second")
        assert len(leftovers(tmp_path)) == 1
    assert open_bundle(tmp_path / "b").manifest.variant == "toy"
    assert leftovers(tmp_path) == []


def test_names_are_not_glob_patterns(tmp_path: Path) -> None:
    shutil.copytree(write_probe(tmp_path / "b", "one").directory, tmp_path / ".bx.old-1")
    write_probe(tmp_path / "b[x]", "two")
    write_probe(tmp_path / "b*", "three")
    assert leftovers(tmp_path) == [".bx.old-1"]


def test_hash_of_a_large_file(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom(1000) * 3000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
