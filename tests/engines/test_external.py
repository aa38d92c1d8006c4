"""Graphs whose weights lie in a file beside: read, verified, and refused by name where something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from lp_edge.engines import BackendConfig, ort
from lp_edge.engines.bundle import Bundle, BundleWriter, load_manifest, open_bundle, save_manifest
from lp_edge.engines.external import external_files, is_beside
from lp_edge.errors import BundleError, EngineError

CPU = BackendConfig("cpu", threads=1)
WEIGHTS = np.arange(512, dtype=np.float32)
FILE = "net.onnx.data"
META: dict[str, Any] = {
    "family": "toy",
    "variant": "toy",
    "licence": "MIT",
    "created_by": "tests",
    "keypoints": 0,
    "normalisation": "",
}


def graph(location: str = FILE, where: str = "initializer") -> bytes:
    """y = x + weights, the weights in another file."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[512], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "2048")):
        tensor.external_data.add(key=key, value=value)
    nodes = [onnx.helper.make_node("Add", ["x", "w"], ["y"])]
    initializer = [tensor]
    if where == "constant":
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
        initializer = []
    spec = [onnx.helper.make_tensor_value_info(name, 1, ["N", 512]) for name in "xy"]
    body = onnx.helper.make_graph(nodes, "g", spec[:1], spec[1:], initializer)
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def write(folder: Path) -> Bundle:
    with BundleWriter(folder, **META) as writer:
        writer.add_network("net", graph(), precision="fp32", opset=17, data=WEIGHTS.tobytes())
    return open_bundle(folder)


@pytest.mark.parametrize("where", ["initializer", "constant"])
def test_files_are_found_wherever_the_graph_names_them(where: str, tmp_path: Path) -> None:
    data = graph("w.bin", where)
    (tmp_path / "m.onnx").write_bytes(data)
    assert external_files(data) == external_files(tmp_path / "m.onnx") == ("w.bin",)


def test_what_is_no_model_names_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert external_files(tmp_path / "empty") == ()
    data = graph()
    assert all(external_files(data[:n]) in ((), (FILE,)) for n in range(len(data)))
    rng = np.random.default_rng(0)
    for _ in range(200):
        external_files(rng.bytes(100))
    assert external_files(b"\x3a\x7e" * 5000) == ()


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("w.data", True),
        ("", False),
        ("../w", False),
        ("/w", False),
        ("a/w", False),
        (".w", False),
        ("a\\w", False),
    ],
)
def test_only_plain_names_are_beside(name: str, good: bool) -> None:
    assert is_beside(name) == good


def test_a_bundle_keeps_hashes_and_runs_them(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    entry = bundle.network("net")
    assert entry.data is not None and entry.data.file == FILE
    assert entry.total_size == entry.size + 2048
    assert set(bundle.hashes()) == {"net.onnx", FILE}
    x = np.ones((2, 512), np.float32)
    with bundle.runner("net", CPU) as runner:
        np.testing.assert_array_equal(np.asarray(runner.infer({"x": x})["y"]), x + WEIGHTS)
    with BundleWriter(tmp_path / "copy", **META) as writer:  # a path brings its weights along
        writer.add_network("net", bundle.path_of("net"), precision="fp32", opset=17)
    assert open_bundle(tmp_path / "copy").hashes() == bundle.hashes()


@pytest.mark.parametrize("change", ["missing", "truncated", "altered"])
def test_damaged_weights_are_named(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "b").directory / FILE
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if change == "truncated" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BundleError, match=rf"{FILE} .weights of net. .*{change}"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/w", "other.data"])
def test_a_graph_cannot_take_weights_that_the_manifest_does_not_name(tmp_path: Path, location: str) -> None:
    """A bundle with correct hashes, whose graph points elsewhere."""
    folder = write(tmp_path / "b").directory
    (folder / "other.data").write_bytes(WEIGHTS.tobytes())
    data = graph(location)
    (folder / "net.onnx").write_bytes(data)
    text = (folder / "manifest.json").read_text()
    manifest = load_manifest(folder / "manifest.json")
    entry = manifest.networks["net"]
    import hashlib

    text = text.replace(entry.sha256, hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_text(text.replace(f'"size": {entry.size},', f'"size": {len(data)},'))
    with pytest.raises(BundleError, match="takes weights from") as caught:
        open_bundle(folder).runner("net", CPU)
    assert location in caught.value.got and FILE in caught.value.expected


def test_a_manifest_keeps_weights_beside_their_graph(tmp_path: Path) -> None:
    folder = write(tmp_path / "b").directory
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(FILE, f"sub/{FILE}"))
    with pytest.raises(BundleError, match="another folder"):
        open_bundle(folder)


def test_a_manifest_without_the_key_is_read_as_before(toy_bundle: Path, tmp_path: Path) -> None:
    assert '"data"' not in (toy_bundle / "manifest.json").read_text()
    manifest = open_bundle(toy_bundle).manifest
    assert all(entry.data is None for entry in manifest.networks.values())
    assert manifest.schema_version == 1
    again = write(tmp_path / "b").manifest
    save_manifest(tmp_path / "m.json", again)
    assert load_manifest(tmp_path / "m.json") == again


@pytest.mark.parametrize(
    ("location", "data", "words"),
    [
        ("../w", b"", "'../w'"),
        (FILE, None, "takes weights from net.onnx.data"),
        ("", b"w", "no file, but one is given"),
    ],
)
def test_writing_refuses_what_would_not_open(
    tmp_path: Path, location: str, data: bytes | None, words: str
) -> None:
    model = graph(location)
    if not location:
        model = onnx.helper.make_model(onnx.load_from_string(graph()).graph).SerializeToString()
        inside = onnx.load_from_string(model)
        inside.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(WEIGHTS, "w"))
        model = inside.SerializeToString()
    with pytest.raises(BundleError, match=words), BundleWriter(tmp_path / "b", **META) as writer:
        writer.add_network("net", model, precision="fp32", opset=17, data=data)
    assert list(tmp_path.iterdir()) == []


def test_a_runner_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(graph())
    with pytest.raises(EngineError, match=rf"no file .*{FILE} with the weights"):
        ort.OrtRunner(path)
    with pytest.raises(EngineError, match="given as bytes"):
        ort.OrtRunner(graph())
    (tmp_path / FILE).write_bytes(WEIGHTS.tobytes()[:-4])
    with pytest.raises(EngineError, match="cannot load the model"):
        ort.OrtRunner(path)
    path.write_bytes(graph("../w"))
    (tmp_path.parent / "w").write_bytes(WEIGHTS.tobytes())
    with pytest.raises(EngineError, match=r"takes its weights from '\.\./w'"):
        ort.OrtRunner(path)
