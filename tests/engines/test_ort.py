"""ONNX Runtime: results, threads, and refusing what is not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lp_edge.engines import BackendConfig, backends, names, open_runner, ort, ort_gpu
from lp_edge.errors import BackendUnavailable, BundleError, ConfigError, EngineError, TensorError

WARP = "warp_decode.onnx"


@pytest.fixture
def warp(toys: Path) -> Iterator[ort.OrtRunner]:
    with ort.OrtRunner(toys / WARP, threads=1) as runner:
        yield runner


def feeds(dx: float, n: int = 1, side: int = 8) -> dict[str, np.ndarray]:
    driving = np.zeros((n, 478, 3), np.float32)
    driving[..., 0] = dx
    return {
        names.SOURCE_IMAGE: np.zeros((1, side, side, 3), np.uint8),
        names.KP_SOURCE: np.zeros((n, 478, 3), np.float32),
        names.KP_DRIVING: driving,
    }


def test_specs(warp: ort.OrtRunner) -> None:
    assert [str(s) for s in warp.inputs.values()] == [
        "source_image uint8 [S, H, W, 3]",
        "kp_source float32 [N, 478, 3]",
        "kp_driving float32 [N, 478, 3]",
    ]
    assert list(warp.outputs) == [names.IMAGE, names.DEFORMATION]
    assert (warp.backend, warp.device[:3], warp.name) == ("cpu", "CPU", "warp_decode")


def test_results_belong_to_the_caller(warp: ort.OrtRunner) -> None:
    first = np.asarray(warp.infer(feeds(5), [names.IMAGE])[names.IMAGE])
    assert first.flags.writeable and first[..., 0].min() == 5
    warp.infer(feeds(9))
    assert first[..., 0].max() == 5


@pytest.mark.parametrize("option", ["foo", "use_arena", "device_id"])
def test_the_cpu_has_no_options(toys: Path, option: str) -> None:
    config = BackendConfig("cpu", provider_options={option: "1"})
    with pytest.raises(
        ConfigError, match=f"backend cpu is given the options {option}; expected none"
    ) as caught:
        open_runner(toys / WARP, config)
    assert "--threads" in caught.value.remedy


def test_bytes_and_path_agree(toys: Path, warp: ort.OrtRunner) -> None:
    with ort.OrtRunner((toys / WARP).read_bytes()) as other:
        assert dict(other.inputs) == dict(warp.inputs)


def test_many_threads_get_their_own_results(warp: ort.OrtRunner) -> None:
    wrong: list[int] = []

    def work(value: int) -> None:
        for _ in range(20):
            image = np.asarray(warp.infer(feeds(value, n=2, side=32))[names.IMAGE])
            if not np.all(image[..., 0] == value):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(10 * k,)) for k in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_runtime_failure_is_wrapped(warp: ort.OrtRunner, capfd: pytest.CaptureFixture[str]) -> None:
    # S = 3 against N = 2 passes the names but cannot be broadcast inside the graph
    bad = feeds(1, n=2) | {names.SOURCE_IMAGE: np.zeros((3, 8, 8, 3), np.uint8)}
    with pytest.raises(
        EngineError, match=r"CPUExecutionProvider failed on .*source_image \[3, 8, 8, 3\]"
    ) as caught:
        warp.infer(bad)
    assert not isinstance(caught.value, TensorError)
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", ""), "ONNX Runtime's own log stays off the terminal"


def test_closed(warp: ort.OrtRunner) -> None:
    warp.close()
    with pytest.raises(EngineError, match="closed"):
        warp.infer(feeds(1))


@pytest.mark.parametrize(
    "content", [b"", b"junk", b"\x08\x08\x12\x07lp_edge"], ids=["empty", "junk", "no graph"]
)
def test_broken_model(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"net: ONNX Runtime .* cannot load"):
        ort.OrtRunner(path)
    assert capfd.readouterr() == ("", "")


def test_truncated_model(tmp_path: Path, toys: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes((toys / "face_mesh.onnx").read_bytes()[:-4000])
    with pytest.raises(EngineError, match="cannot load"):
        ort.OrtRunner(path)
    with pytest.raises(BundleError, match="cannot load"):
        ort.describe(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no file .*gone\.onnx"):
        ort.OrtRunner(tmp_path / "gone.onnx")


def test_unknown_provider(toys: Path) -> None:
    with pytest.raises(BackendUnavailable, match="NopeExecutionProvider"):
        ort.OrtRunner(toys / WARP, "NopeExecutionProvider")


# -- providers that are not there: what ONNX Runtime does is played by a stand-in; test_ort_gpu.py has those that are -----


class Session:
    """Plays an InferenceSession of a build with CUDA."""

    got: tuple[str, ...] = (ort.CUDA, ort.CPU)
    assigned: tuple[str, ...] = (ort.CUDA,)
    error: Exception | None = None
    asked: Any = None

    def __init__(self, model: Any, options: Any, providers: Any, enable_fallback: int) -> None:
        type(self).asked = providers
        assert enable_fallback == 0
        if self.error is not None:
            raise self.error

    def get_providers(self) -> list[str]:
        return list(self.got)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [SimpleNamespace(ep_name=name, get_nodes=list) for name in self.assigned]

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name="x", type="tensor(float)", shape=["N", None])]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name="y", type="tensor(bool)", shape=[2])]


def fake_onnxruntime(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> type[Session]:
    session = type("Session", (Session,), changes)
    module = SimpleNamespace(
        __version__="9.9",
        __file__="/nonexistent/onnxruntime/__init__.py",
        get_available_providers=lambda: [ort.TENSORRT, ort.CUDA, ort.CPU],
        SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda key, value: None),
        InferenceSession=session,
        preload_dlls=lambda: print("Failed to load libcudnn.so.9"),
        set_default_logger_severity=lambda level: None,
    )
    monkeypatch.setattr(ort, "import_onnxruntime", lambda: module)
    monkeypatch.setattr(ort_gpu, "open_resident", lambda device_id, name: (None, "no driver"))
    return session


def test_cuda_when_it_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    session = fake_onnxruntime(monkeypatch)
    with ort.OrtRunner(b"model", ort.CUDA, 1, provider_options={"arena": "x"}) as runner:
        assert (runner.backend, runner.device, runner.resident) == ("cuda", "NVIDIA GPU 1", False)
        assert runner.inputs["x"].shape == ("N", "?1")
        assert runner.outputs["y"].dtype == np.bool_
    chosen = {"device_id": "1", **ort_gpu._CUDA_DEFAULTS, "arena": "x"}
    assert session.asked == [(ort.CUDA, chosen), (ort.CPU, {})]
    assert capsys.readouterr().out == "", "what ONNX Runtime prints is not the user's output"


def test_provider_replaced_by_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(monkeypatch, got=(ort.CPU,))
    with pytest.raises(
        BackendUnavailable,
        match=r"backend cuda .* is not there.*providers.*\.so.*pip install onnxruntime-gpu",
    ):
        ort.OrtRunner(b"model", ort.CUDA)


def test_provider_that_raises_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(monkeypatch, error=RuntimeError("CUDA failure 35: driver\n version is insufficient"))
    with pytest.raises(BackendUnavailable, match="failure 35: driver version is insufficient") as caught:
        ort.OrtRunner(b"model", ort.CUDA)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_place_in_foreign_source_is_left_out() -> None:
    error = RuntimeError(
        "/src/onnxruntime/state.cc:729 void f(A&, const B&) Please install\nTensorRT (see .cc)."
    )
    assert ort._words(error) == "Please install TensorRT (see .cc)."
    assert ort._words(RuntimeError("CUDA failure 35")) == "CUDA failure 35"


def test_broken_model_is_not_blamed_on_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    error = type("InvalidProtobuf", (Exception,), {})("parsing failed")
    fake_onnxruntime(monkeypatch, error=error)
    with pytest.raises(EngineError, match="parsing failed"):
        ort.OrtRunner(b"model", ort.CUDA)


def test_provider_that_takes_no_node_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(monkeypatch, assigned=(ort.CPU,))
    with pytest.raises(BackendUnavailable, match="would run on CPUExecutionProvider"):
        ort.OrtRunner(b"model", ort.CUDA)


def test_missing_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match="pip install onnxruntime"):
        open_runner(backends._PROBE, BackendConfig("cpu"))


def test_assignment_is_reported_by_this_onnxruntime() -> None:
    """The real calls behind the check above, as far as a CPU can show them."""
    module = ort.import_onnxruntime()
    options = module.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = module.InferenceSession(backends._PROBE, options, providers=[ort.CPU])
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime does not report it")
    assert {part.ep_name for part in session.get_provider_graph_assignment_info()} == {ort.CPU}
