"""The exporter: what it states, keeps, folds and refuses, on small modules."""

from __future__ import annotations

import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from lp_edge.errors import ExportError, OutputError
from lp_edge.export import onnx_export
from lp_edge.export.lint import TARGETS, lint
from lp_edge.export.onnx_export import export_onnx, node_count, save, serialise, split_weights
from lp_edge.export.opset import opset_of


class Small(torch.nn.Module):
    """Convolution → norm → ReLU → mean; returns the mean, and what the norm gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, image: Any) -> Any:
        x = image.float().permute(0, 3, 1, 2) / 255.0
        x = self.norm(self.conv(x))
        scale = torch.triu(torch.ones(4, 4)).sum(0)  # a constant that the exporter itself leaves as nodes
        return self.drop(torch.relu(x)).mean((2, 3)) * scale, x


INPUTS = {"image": torch.zeros(2, 8, 6, 3, dtype=torch.uint8)}
OUTPUTS = {"mean": ("batch", 4)}
DYNAMIC = {"image": {0: "batch"}}


def export(module: Any = None, opset: int = 17, **options: Any) -> onnx.ModelProto:
    given = {"inputs": INPUTS, "outputs": OUTPUTS, "dynamic": DYNAMIC, "keep": ("normed",)} | options
    return export_onnx(module or Small(), opset=opset, **given)


def run(model: onnx.ModelProto, **inputs: Any) -> Any:
    session = onnxruntime.InferenceSession(serialise(model), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("opset", [16, 17])
def test_equals_pytorch_at_other_batches(opset: int) -> None:
    module = Small()
    model = export(module, opset)
    for batch in (1, 2, 5):
        image = np.random.default_rng(batch).integers(0, 256, (batch, 8, 6, 3), dtype=np.uint8)
        with torch.no_grad():
            want = module(torch.from_numpy(image))[0]
        np.testing.assert_allclose(run(model, image=image)[0], want, atol=1e-5)
    assert opset_of(model) == opset


def test_names_and_shapes_are_stated() -> None:
    model = export()

    def shape(value: Any) -> tuple[Any, ...]:
        return tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)

    assert {v.name: shape(v) for v in model.graph.input} == {"image": ("batch", 8, 6, 3)}
    assert {v.name: shape(v) for v in model.graph.output} == {"mean": ("batch", 4)}
    assert not model.graph.value_info


def test_evaluation_mode_and_folding() -> None:
    module = Small().train()
    model = export(module)
    assert not module.training
    assert operators(model) == ["Cast", "Transpose", "Div", "Conv", "Relu", "ReduceMean", "Mul"]
    assert node_count(model) == 7
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used


def test_kept_tensor_is_inside_and_no_output() -> None:
    model = export()
    assert [value.name for value in model.graph.output] == ["mean"]
    assert [n.op_type for n in model.graph.node if "normed" in n.output] == ["Conv"]
    model.graph.output.append(onnx.helper.make_tensor_value_info("normed", 1, None))
    image = np.full((1, 8, 6, 3), 200, np.uint8)
    with torch.no_grad():
        want = Small().eval()(torch.from_numpy(image))[1]
    np.testing.assert_allclose(run(model, image=image)[1], want, atol=1e-5)


def test_same_bytes_twice() -> None:
    assert serialise(export()) == serialise(export())


@pytest.mark.parametrize("target", TARGETS)
def test_result_passes_the_linter(target: str) -> None:
    assert lint(export(opset=16), target) == []


def test_half_precision_is_exported_without_being_computed() -> None:
    # 64 channels at 128x128: a minute in float16 on a CPU.
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = torch.nn.Conv2d(64, 64, 3, padding=1, stride=2, dilation=2).half()
            self.deep = torch.nn.Conv3d(4, 8, (1, 3, 3), padding=(0, 1, 1), bias=False).half()
            self.depthwise = torch.nn.Conv2d(64, 64, 3, groups=64).half()

        def forward(self, x: Any) -> Any:
            x = self.flat(x.half())
            deep = self.deep(x.reshape(-1, 4, 16, 63, 63)).float().sum((1, 2))
            return deep + torch.nn.functional.pad(self.depthwise(x).float().mean(1), (1, 1, 1, 1))

    torch.manual_seed(0)
    module = Wide()
    start = time.perf_counter()
    model = export_onnx(
        module,
        {"x": torch.zeros(2, 64, 128, 128)},
        {"y": ("batch", 63, 63)},
        {"x": {0: "batch"}},
        17,
    )
    assert time.perf_counter() - start < 20
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [len(node.input) for node in convolutions] == [3, 2, 3]
    x = torch.randn(1, 64, 128, 128)
    module.float()  # of the rounded weights
    with torch.no_grad():
        flat = module.flat(x)
        deep = module.deep(flat.reshape(-1, 4, 16, 63, 63)).sum((1, 2))
        expected = deep + torch.nn.functional.pad(module.depthwise(flat).mean(1), (1, 1, 1, 1))
    got = run(model, x=x.numpy())[0]
    assert np.abs(got - expected.numpy()).max() < 0.05


def test_baked_size_is_refused() -> None:
    class Baked(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.reshape(2, 12)

    with pytest.raises(ExportError, match=re.escape("y has the shape (2, 12); expected ('batch', 12)")):
        export_onnx(Baked(), {"x": torch.zeros(2, 3, 4)}, {"y": ("batch", 12)}, {"x": {0: "batch"}}, 17)


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(ExportError, match=r"mean has the shape .* expected \('batch', 5\)"):
        export(outputs={"mean": ("batch", 5)})
    with pytest.raises(ExportError, match=r"mean has the shape"):
        export(outputs={"mean": ("batch", 4, 1)})


def test_wrong_number_of_outputs_is_refused() -> None:
    with pytest.raises(ExportError, match=r"the module returns"):
        export(keep=())


@pytest.mark.parametrize(
    "options",
    [{"outputs": {"image": ("batch", 4)}}, {"keep": ("mean",)}, {"dynamic": {"picture": {0: "batch"}}}],
)
def test_clashing_names_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="expected unique names, and axes of inputs only"):
        export(**options)


def test_kept_tensor_that_feeds_nothing_is_refused() -> None:
    class Aside(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1.0, x * 2.0

    with pytest.raises(ExportError, match="the graph has no tensor twice"):
        export_onnx(
            Aside(), {"x": torch.zeros(2, 3)}, {"y": ("batch", 3)}, {"x": {0: "batch"}}, 17, keep=("twice",)
        )


def test_control_flow_is_refused() -> None:
    class Branch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self.inner = torch.jit.script(self.step)

        @staticmethod
        def step(x: torch.Tensor) -> torch.Tensor:
            if bool(x.sum() > 0):
                x = x + 1.0
            return x

        def forward(self, x: Any) -> Any:
            return self.inner(x)

    with pytest.raises(ExportError, match="control flow"):
        export_onnx(Branch(), {"x": torch.zeros(2, 3)}, {"y": ("batch", 3)}, {"x": {0: "batch"}}, 17)


def test_opset_that_was_not_honoured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "opset_of", lambda model: 18)
    with pytest.raises(ExportError, match="came out at opset 18; expected 17"):
        export()


def test_opset_of_needs_one() -> None:
    with pytest.raises(ExportError, match="names no opset"):
        opset_of(onnx.ModelProto())


def test_save(tmp_path: Path) -> None:
    model = export()
    path = tmp_path / "small.onnx"
    path.write_bytes(b"old")
    save(model, path)
    assert path.read_bytes() == serialise(model)
    assert os.listdir(tmp_path) == ["small.onnx"]
    with pytest.raises(OutputError, match="does not exist"):
        save(model, tmp_path / "none" / "small.onnx")


def test_save_on_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.onnx"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save(export(), path)
    assert os.listdir(tmp_path) == ["small.onnx"]
    assert path.read_bytes() == b"old"


def test_weights_beside_the_graph_are_the_same_model(tmp_path: Path) -> None:
    class Wide(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.one, self.two = torch.nn.Linear(4, 300), torch.nn.Linear(300, 5)

        def forward(self, x: Any) -> Any:
            return self.two(torch.relu(self.one(x)))

    def make(seed: int) -> onnx.ModelProto:
        return export_onnx(
            Wide(seed), {"x": torch.zeros(2, 4)}, {"y": ("batch", 5)}, {"x": {0: "batch"}}, opset=17
        )

    model = make(1)
    before = serialise(model)
    graph, data = split_weights(model, "m.onnx.data")
    assert serialise(model) == before and len(graph) < 3000 < len(data)
    (tmp_path / "m.onnx").write_bytes(graph)
    (tmp_path / "m.onnx.data").write_bytes(data)
    light = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    outside = [t for t in light.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert 0 < len(outside) < len(light.graph.initializer)  # small ones stay
    for tensor in outside:
        entry = {e.key: e.value for e in tensor.external_data}
        assert entry["location"] == "m.onnx.data" and int(entry["offset"]) % 4096 == 0
    assert lint(light, "main") == lint(model, "main")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    whole = onnx.load(tmp_path / "m.onnx")
    x = np.ones((3, 4), np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], run(model, x=x)[0])
    np.testing.assert_array_equal(run(whole, x=x)[0], run(model, x=x)[0])
    assert split_weights(make(1), "m.onnx.data") == (graph, data)
    # engines are kept by the graph's digest, which must tell other weights
    assert split_weights(make(2), "m.onnx.data")[0] != graph
