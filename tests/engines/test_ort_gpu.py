"""ONNX Runtime's GPU providers on a fake device: tests/fake_onnxruntime computes with the real CPU provider."""

from __future__ import annotations

import gc
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from lp_edge.engines import cuda as cuda_module
from lp_edge.engines import names, open_bundle, ort, ort_gpu
from lp_edge.engines.cuda import Cuda, open_cuda
from lp_edge.engines.device import DeviceArray, rows
from lp_edge.engines.ort import CPU, CUDA, TENSORRT, TENSORRT_RTX, OrtRunner
from lp_edge.engines.ort_gpu import bind, result_shape
from lp_edge.engines.runner import fetch
from lp_edge.errors import BackendUnavailable, ConfigError, EngineError, LimitError, TensorError
from lp_edge.tests.fake_cuda.arrays import to_device
from lp_edge.tests.fake_cuda.device import H200, ORIN, FakeCuda
from lp_edge.tests.fake_onnxruntime.module import Machine, make_onnxruntime

WARP = "warp_decode.onnx"
GRAPH = {CUDA: "enable_cuda_graph", TENSORRT: "trt_cuda_graph_enable", TENSORRT_RTX: "enable_cuda_graph"}
Place = Callable[..., Machine]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    """Makes machines; at the end nothing may be left on their devices, and nothing may have been done wrong."""
    made: list[Machine] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(device: Any = H200, **changes: Any) -> Machine:
        machine = Machine(FakeCuda(device), **changes)
        module = make_onnxruntime(machine)
        monkeypatch.setattr(ort, "import_onnxruntime", lambda: module)
        monkeypatch.setattr(cuda_module, "open_cuda", lambda index: open_cuda(index, runtime=machine.cuda))
        made.append(machine)
        return machine

    yield make
    gc.collect()
    assert not cuda_module._SHARES
    for machine in made:
        machine.verify()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package of TensorRT-RTX's provider."""
    package = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    vars(package).update(__version__="0.5.0", get_library_path=lambda: "/lib/provider.so")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return package


def feeds(dx: float, n: int = 1, side: int = 8) -> dict[str, Any]:
    driving = np.zeros((n, 478, 3), np.float32)
    driving[..., 0] = dx
    return {
        names.SOURCE_IMAGE: np.zeros((1, side, side, 3), np.uint8),
        names.KP_SOURCE: np.zeros((n, 478, 3), np.float32),
        names.KP_DRIVING: driving,
    }


def red(results: Any) -> int:
    """The red of all pixels, which is the source's plus dx."""
    (value,) = np.unique(np.asarray(results[names.IMAGE])[..., 0]).tolist()
    return int(value)


def written_later(runner: OrtRunner, array: np.ndarray) -> DeviceArray:
    """An array on the device that is still being written."""
    assert runner._gpu is not None
    return to_device(runner._gpu.cuda, array, runner._gpu.cuda.stream())


def reference(path: Path) -> OrtRunner:
    """The real CPU provider, while the module is replaced by the fake."""
    import onnxruntime

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "import_onnxruntime", lambda: onnxruntime)
        return OrtRunner(path, CPU)


# -- results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [H200, ORIN], ids=["discrete", "integrated"])
@pytest.mark.parametrize("provider", [CUDA, TENSORRT, TENSORRT_RTX])
@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "graphs"])
def test_parity_with_the_cpu(
    place: Place, plugin: ModuleType, toys: Path, provider: str, device: Any, graphs: bool
) -> None:
    machine = place(device)
    options = {GRAPH[provider]: "True" if provider == TENSORRT else "1"} if graphs else {}
    batches = (2, 2, 2) if graphs and provider == TENSORRT else (1, 3, 1, 1, 3)
    rng = np.random.default_rng(5)
    for toy in ("face_mesh", "warp_decode", "liveportrait/warp_decode"):
        path = toys / f"{toy}.onnx"
        with OrtRunner(path, provider, provider_options=options) as runner, reference(path) as cpu:
            assert (runner.resident, runner.device) == (True, device.name)
            assert (dict(runner.inputs), dict(runner.outputs)) == (dict(cpu.inputs), dict(cpu.outputs))
            for batch in batches:
                sizes = {"N": batch, "batch": batch, "S": 1, "sources": 1, "H": 16, "W": 24}
                data: dict[str, Any] = {
                    name: rng.integers(0, 256, [sizes.get(str(a), a) for a in spec.shape]).astype(spec.dtype)
                    for name, spec in runner.inputs.items()
                }
                kept = runner.infer(data, keep=True)
                got = runner.infer({name: runner.upload(array) for name, array in data.items()})
                for name, value in cpu.infer(data).items():
                    assert isinstance(kept[name], DeviceArray) and isinstance(got[name], np.ndarray)
                    np.testing.assert_array_equal(np.asarray(kept[name]), np.asarray(value))
                    np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(value))
                    assert np.asarray(got[name]).flags.writeable
    assert bool(machine.recorded and machine.replayed) == graphs


def test_kept_results_are_not_waited_for_and_feed_the_next(place: Place, toys: Path) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA) as first, OrtRunner(toys / WARP, CUDA) as second:
        source = first.upload(np.full((1, 8, 8, 3), 100, np.uint8))
        still = feeds(0) | {names.SOURCE_IMAGE: source}
        kept = [
            first.infer(still | {names.KP_DRIVING: feeds(dx)[names.KP_DRIVING]}, keep=True)
            for dx in (1, 2, 3)
        ]
        after = [second.infer(feeds(10) | {names.SOURCE_IMAGE: k[names.IMAGE]}, keep=True) for k in kept]
        assert not {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"} & set(
            machine.cuda.names
        )
        assert all(run == {"disable_synchronize_execution_providers": "1"} for run in machine.runs)
        waiting = [fetch(results[names.IMAGE]) for results in kept + after]
        assert [int(wait()[0, 4, 4, 0]) for wait in waiting] == [101, 102, 103, 111, 112, 113]


def test_memory_of_dropped_results_is_not_used_again_too_early(place: Place, toys: Path) -> None:
    """The fake tells of a race when it is."""
    place()
    with OrtRunner(toys / WARP, CUDA) as runner:
        source = runner.upload(np.zeros((1, 8, 8, 3), np.uint8))
        for _ in range(3):
            runner.infer(feeds(1) | {names.SOURCE_IMAGE: source}, keep=True)
            others = [runner.upload(np.full(192, 7, np.uint8)) for _ in range(4)]
            assert all((np.asarray(other) == 7).all() for other in others)


def test_fetching_a_result_does_not_wait_for_later_calls(place: Place, toys: Path) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA) as runner:
        first, second = (runner.infer(feeds(dx), [names.IMAGE], keep=True) for dx in (1, 2))
        assert fetch(first[names.IMAGE])()[0, 0, 0, 0] == 1
        queued = [
            stream
            for stream in machine.cuda._streams
            if any(w.label == "ONNX Runtime" for w in works(stream))
        ]
        assert len(queued) == 1 and red(second) == 2


def works(stream: Any) -> list[Any]:
    """Work of a stream of the fake that has not run."""
    return [item for item in stream.queue if hasattr(item, "label")]


def test_arrays_are_laid_together_and_cut(place: Place, toys: Path) -> None:
    place()
    with OrtRunner(toys / WARP, CUDA) as runner:
        parts = [runner.infer(feeds(dx), [names.IMAGE], keep=True)[names.IMAGE] for dx in (3, 5, 7)]
        both = runner.concatenate([*parts, np.full((1, 8, 8, 3), 9, np.uint8)])
        assert isinstance(both, DeviceArray)
        assert np.asarray(both)[:, 0, 0, 0].tolist() == [3, 5, 7, 9]
        # A row of 192 bytes is no place that kernels may read from.
        row = rows(both, 1, 2)
        assert isinstance(row, DeviceArray) and row.pointer % 256
        assert red(runner.infer(feeds(20) | {names.SOURCE_IMAGE: row})) == 25


def test_an_array_of_another_device_is_refused(place: Place, toys: Path) -> None:
    machine = place(replace(H200, devices=2))
    with OrtRunner(toys / WARP, CUDA) as runner, open_cuda(1, runtime=machine.cuda) as other:
        away = to_device(other, np.zeros((1, 8, 8, 3), np.uint8), other.stream())
        with pytest.raises(TensorError, match="an input lies on device 1; expected it on device 0"):
            runner.infer(feeds(1) | {names.SOURCE_IMAGE: away})


def test_the_device_that_is_asked_for_is_bound(place: Place, toys: Path) -> None:
    machine = place(replace(H200, devices=2))
    with OrtRunner(toys / WARP, CUDA, 1) as runner:
        assert red(runner.infer(feeds(4))) == 4
    assert machine.opened[0][0][1]["device_id"] == "1"


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_threads_get_their_own_results(place: Place, toys: Path, graphs: str) -> None:
    place()
    wrong: list[Any] = []
    with OrtRunner(toys / WARP, CUDA, provider_options={GRAPH[CUDA]: graphs}) as runner:

        def work(value: int) -> None:
            try:
                for turn in range(6):
                    results = runner.infer(feeds(value), [names.IMAGE], keep=bool(turn % 2))
                    if (got := red(results)) != value:
                        wrong.append((value, got))
            except Exception as error:  # noqa: BLE001 - shown below
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(10 * k,)) for k in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_result_of_unknown_shape_comes_over_the_host(
    place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = place()
    monkeypatch.setattr(
        ort_gpu, "result_shape", lambda shape, axes: None if 3 in shape else result_shape(shape, axes)
    )
    with OrtRunner(toys / WARP, CUDA) as runner:
        kept = runner.infer(feeds(6, n=2), keep=True)
        assert red(kept) == 6 and np.asarray(kept[names.DEFORMATION])[1, 0, 0, 0] == 6
        assert all(isinstance(array, DeviceArray) for array in kept.values())
        assert red(runner.infer(feeds(7))) == 7
        assert "disable_synchronize_execution_providers" not in {**machine.runs[0], **machine.runs[1]}


# -- what the CPU takes part in ---------------------------------------------------------------------


def test_inputs_and_outputs_of_the_cpu(place: Place, toys: Path) -> None:
    """IO binding copies such an input when it is bound: a device array that is still written would be read too early."""
    machine = place(host_inputs=(names.KP_DRIVING,), host_outputs=(names.DEFORMATION,))
    with OrtRunner(toys / WARP, CUDA) as runner:
        for keep in (False, True):
            moved = written_later(runner, feeds(8)[names.KP_DRIVING])
            results = runner.infer(feeds(0) | {names.KP_DRIVING: moved}, keep=keep)
            assert red(results) == 8 and np.asarray(results[names.DEFORMATION])[0, 0, 0, 0] == 8
        runner.infer(feeds(0), [names.IMAGE])
    waits = ["disable_synchronize_execution_providers" not in run for run in machine.runs]
    assert waits == [True, True, False]


def test_an_older_version_does_not_tell_what_the_cpu_reads(place: Place, toys: Path) -> None:
    place(host_inputs=(names.KP_DRIVING,), tells_memory=False)
    with OrtRunner(toys / WARP, CUDA) as runner:
        moved = written_later(runner, feeds(8)[names.KP_DRIVING])
        assert red(runner.infer(feeds(0) | {names.KP_DRIVING: moved}, keep=True)) == 8


def test_the_fake_catches_an_input_bound_too_early(
    place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = place(host_inputs=(names.KP_DRIVING,))
    monkeypatch.setattr(ort_gpu, "_on_host", lambda session, side: frozenset())
    with OrtRunner(toys / WARP, CUDA) as runner:
        moved = written_later(runner, feeds(8)[names.KP_DRIVING])
        runner.infer(feeds(0) | {names.KP_DRIVING: moved}, keep=True)
    assert machine.problems == [f"{names.KP_DRIVING} is copied to the CPU before it was written"]
    machine.problems.clear()


# -- placement --------------------------------------------------------------------------------------

tells_placement = pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason=f"ONNX Runtime {onnxruntime.__version__} does not tell where nodes run (1.24 does)",
)


@tells_placement
def test_placement_is_known_and_reported(place: Place, toys: Path, caplog: pytest.LogCaptureFixture) -> None:
    place(elsewhere={"Round": CPU, "Unsqueeze": CUDA})
    with OrtRunner(toys / WARP, TENSORRT) as runner:
        assert runner.placement is not None
        assert dict(runner.placement[CPU].operators) == {"Round": 1}
        assert runner.placement[TENSORRT].nodes > 4
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "1 on CPUExecutionProvider (1 Round)" in told.getMessage()
    assert "on CUDAExecutionProvider (" in told.getMessage()


@tells_placement
def test_nodes_that_compute_shapes_are_told_apart(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    helper = pytest.importorskip("onnx").helper
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], "look"),
        helper.make_node("Gather", ["sizes", "first"], ["n"], "pick"),
        helper.make_node("Gather", ["x", "first"], ["row"], "work"),
        helper.make_node("Mul", ["n", "two"], ["m"], "more"),
        helper.make_node("Expand", ["row", "m"], ["y"], "grow"),
    ]
    constants = [helper.make_tensor("first", 7, [1], [0]), helper.make_tensor("two", 7, [1], [2])]
    graph = helper.make_graph(nodes, "g", [value("x", 1, ["N", 4])], [value("y", 1, None)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    place(elsewhere={"Shape": CPU, "Gather": CPU, "Mul": CPU})
    with OrtRunner(model.SerializeToString(), CUDA) as runner:
        assert runner.placement is not None
        assert (runner.placement[CPU].shape_nodes, dict(runner.placement[CPU].operators)) == (
            3,
            {"Gather": 1},
        )
    assert "1 on CPUExecutionProvider (1 Gather)" in caplog.text
    caplog.clear()
    place(elsewhere={"Shape": CPU, "Mul": CPU})
    with OrtRunner(model.SerializeToString(), CUDA) as runner:
        assert runner.placement is not None and runner.placement[CPU].nodes == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_older_version_does_not_tell_where_nodes_run(
    place: Place, toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place(tells_nodes=False, version="1.18.0")
    with caplog.at_level(logging.INFO), OrtRunner(toys / WARP, CUDA) as runner:
        assert runner.placement is None
    assert "ONNX Runtime 1.18.0 does not tell which nodes run on the GPU" in caplog.text


# -- options ----------------------------------------------------------------------------------------


def test_options_of_cuda(place: Place, toys: Path) -> None:
    machine = place()
    with OrtRunner(
        toys / WARP, CUDA, provider_options={"use_tf32": "1", "gpu_mem_limit": "1000000"}
    ) as runner:
        assert runner.max_batch is None
        (options,) = [chosen for name, chosen in machine.opened[0] if name == CUDA]
        assert int(options.pop("user_compute_stream")) in machine.cuda._objects
        assert options == {
            "device_id": "0", "use_tf32": "1", "gpu_mem_limit": "1000000", "cudnn_conv_algo_search": "EXHAUSTIVE",
            "arena_extend_strategy": "kSameAsRequested",
        }  # fmt: skip


def test_options_of_tensorrt(place: Place, toys: Path, toy_bundle: Path, tmp_path: Path) -> None:
    machine = place()
    bundle = open_bundle(toy_bundle)
    with OrtRunner(
        bundle.path_of("warp_decode"), TENSORRT, provider_options={"axes": "H=8:8:64,W=8:8:64"}
    ) as runner:
        assert runner.max_batch == 8
        red(runner.infer(feeds(1)))
    (_, options), (behind, others), (last, _) = machine.opened[0]
    assert (behind, last) == (CUDA, CPU)
    assert others["user_compute_stream"] == options["user_compute_stream"], "both work on one stream"
    assert options["trt_profile_min_shapes"].startswith("source_image:1x8x8x3,kp_source:1x478x3")
    assert options["trt_profile_max_shapes"] == "source_image:8x64x64x3,kp_source:8x478x3,kp_driving:8x478x3"
    place_of_engines = Path(options["trt_engine_cache_path"])
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"
    assert (
        place_of_engines.is_dir()
        and place_of_engines.parent == toy_bundle.resolve() / "engines" / "onnxruntime"
    )
    assert options["trt_timing_cache_path"] == str(place_of_engines.parent)
    assert not any("fp16" in option for option in options)
    assert set(options) <= {"device_id", "user_compute_stream"} | {o for o in options if o.startswith("trt_")}


def test_engines_of_other_weights_options_and_versions_are_kept_apart(
    place: Place, toys: Path, tmp_path: Path
) -> None:
    """ONNX Runtime names an engine by the names of tensors, and would take that of other weights."""
    other = tmp_path / "other.onnx"
    other.write_bytes((toys / WARP).read_bytes() + b"\x12\x01x")  # the producer's name
    folders = []
    for model, options, version in (
        (toys / WARP, {}, "1.31.1"),
        (toys / WARP, {}, "1.31.1"),
        (other, {}, "1.31.1"),
        (toys / WARP, {"max_batch": "2"}, "1.31.1"),
        (toys / WARP, {"trt_builder_optimization_level": "5"}, "1.31.1"),
        (toys / WARP, {}, "1.30.0"),
    ):
        machine = place(version=version)
        given = {"axes": "H=8:8:64,W=8:8:64", "cache_dir": str(tmp_path / "mine"), **options}
        OrtRunner(model, TENSORRT, provider_options=given).close()
        folders.append(machine.opened[0][0][1]["trt_engine_cache_path"])
    assert folders[0] == folders[1] and len(set(folders)) == 5
    assert all(Path(folder).parent == tmp_path / "mine" / "onnxruntime" for folder in folders)


def test_a_place_that_cannot_be_written_costs_only_the_cache(
    place: Place, toys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = place()
    (tmp_path / "file").write_text("")
    OrtRunner(toys / WARP, TENSORRT, provider_options={"cache_dir": str(tmp_path / "file" / "x")}).close()
    assert "trt_engine_cache_path" not in machine.opened[0][0][1] and "are not kept" in caplog.text


def test_a_profile_of_the_user_is_handed_on(place: Place, toys: Path) -> None:
    machine = place()
    shapes = {
        f"trt_profile_{which}_shapes": f"source_image:1x8x8x3,kp_source:{n}x478x3,kp_driving:{n}x478x3,source_image:3x8x8x3"
        for which, n in (("min", 1), ("opt", 2), ("max", 5))
    }
    with OrtRunner(toys / WARP, TENSORRT, provider_options=shapes) as runner:
        assert runner.max_batch == 3, "the sources of the second profile"
    assert {key: value for key, value in machine.opened[0][0][1].items() if "profile" in key} == shapes


def test_without_ranges_there_is_no_profile(place: Place, toys: Path) -> None:
    machine = place()
    model = (toys / WARP).read_bytes().replace(b"\x12\x01H", b"\x12\x01Q")  # no name that has a default
    with OrtRunner(model, TENSORRT) as runner:
        assert runner.max_batch is None and "Q" in runner.inputs[names.SOURCE_IMAGE].shape
    assert not any("profile" in key for key in machine.opened[0][0][1])
    with pytest.raises(ConfigError, match="no sizes for the dynamic axis Q"):
        OrtRunner(model, TENSORRT, provider_options={"max_batch": "4"})


def test_a_graph_in_parts_gets_no_profile(place: Place, toys: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = place(refuses_profile=True)
    with OrtRunner(toys / "face_mesh.onnx", TENSORRT) as runner:
        assert runner.max_batch is None
    assert len(machine.opened) == 2 and "builds again for every new shape" in caplog.text
    with pytest.raises(BackendUnavailable, match="User needs to provide all the dynamic shape inputs"):
        OrtRunner(
            toys / "face_mesh.onnx",
            TENSORRT,
            provider_options={
                "trt_profile_min_shapes": "image:1x64x64x3",
                "trt_profile_max_shapes": "image:1x64x64x3",
            },
        )


def test_a_provider_that_takes_no_stream_is_waited_for(place: Place, toys: Path) -> None:
    machine = place(unknown=("user_compute_stream",))
    with OrtRunner(toys / WARP, CUDA) as runner:
        assert len(machine.opened) == 2 and "user_compute_stream" not in machine.opened[1][0][1]
        source = runner.upload(np.full((1, 8, 8, 3), 50, np.uint8))
        for dx in (1, 2):
            assert red(runner.infer(feeds(dx) | {names.SOURCE_IMAGE: source}, keep=True)) == 50 + dx
    assert machine.runs == [{}, {}]


def test_defaults_that_an_older_version_does_not_know(
    place: Place, toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = place(unknown=("use_tf32",))
    with caplog.at_level(logging.INFO), OrtRunner(toys / "face_mesh.onnx", TENSORRT) as runner:
        assert runner.resident
    assert "without the option use_tf32" in caplog.text and "use_tf32" not in machine.opened[1][1][1]
    with pytest.raises(ConfigError, match='Unknown provider option: "use_tf32"'):
        OrtRunner(toys / WARP, CUDA, provider_options={"use_tf32": "0"})


@pytest.mark.parametrize(
    ("provider", "options", "words"),
    [
        (CUDA, {"nope": "1"}, r'refuses its options \(Unknown provider option: "nope"\.\)'),
        (TENSORRT, {"nope": "1"}, r"refuses its options \(Invalid TensorRT EP option: nope\)"),
        (TENSORRT_RTX, {"nope": "1"}, 'Unknown provider option: "nope"'),
        (CUDA, {"cache_dir": "/x"}, 'Unknown provider option: "cache_dir"'),
        (CUDA, {"user_compute_stream": "1"}, "expected the runner's own stream"),
        (CUDA, {"device_id": "1"}, "option device_id is 1 and the device is 0"),
        (TENSORRT, {"max_batch": "many"}, "max_batch is 'many'"),
    ],
)
def test_options_that_are_refused(
    place: Place, plugin: ModuleType, toys: Path, provider: str, options: dict[str, str], words: str
) -> None:
    place()
    with pytest.raises(ConfigError, match=words):
        OrtRunner(toys / WARP, provider, provider_options=options)


# -- CUDA graphs ------------------------------------------------------------------------------------


def test_every_set_of_shapes_has_a_record(place: Place, toys: Path) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"}) as runner:
        assert machine.session_options[0].enable_mem_pattern is False
        for _ in range(3):
            for n in range(1, 11):
                assert red(runner.infer(feeds(n, n=n))) == n
        assert (machine.recorded, machine.replayed) == (8, 16), "further ones run without a record"
        assert {run["gpu_graph_id"] for run in machine.runs} == {"-1", *map(str, range(1, 9))}
        assert {run["cuda_graph_annotation_id"] for run in machine.runs} == {
            run["gpu_graph_id"] for run in machine.runs
        }


def test_results_of_a_replay_are_not_overwritten_by_the_next(place: Place, toys: Path) -> None:
    place()
    with OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"}) as runner:
        kept = [runner.infer(feeds(dx), [names.IMAGE], keep=True) for dx in range(1, 6)]
        assert [red(results) for results in kept] == [1, 2, 3, 4, 5]


def test_other_threads_go_on_while_a_launch_is_recorded(place: Place, toys: Path) -> None:
    """They allocate, and drop memory that the network's stream used; the fake tells of calls that spoil the recording."""
    machine = place()
    with OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"}) as runner:
        assert runner._gpu is not None
        cuda, done = runner._gpu.cuda, []
        kept = [runner.infer(feeds(1), keep=True)]

        def work() -> None:
            kept.clear()
            with cuda.alloc(1 << 20) as fresh, cuda.alloc(1 << 21):
                stream = cuda.transfer_stream()
                cuda.fill(fresh, 1, stream)
                stream.synchronize()
            done.append(True)

        def meanwhile() -> None:
            machine.during_record = None
            other = threading.Thread(target=work)
            other.start()
            other.join(20)

        machine.during_record = meanwhile
        assert red(runner.infer(feeds(2, n=2))) == 2
        assert done and machine.recorded == 2


def test_who_waits_for_results_sleeps(place: Place, toys: Path) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA) as runner:
        machine.cuda.calls.clear()
        runner.infer(feeds(1), keep=True)
        made = [call.inputs[0] for call in machine.cuda.calls if call.name == "cudaEventCreateWithFlags"]
        assert made.count(3) >= 2, "an event for each result, blocking and without timing"


def test_tensorrt_records_one_set_of_shapes(place: Place, toys: Path) -> None:
    place()
    with OrtRunner(toys / WARP, TENSORRT, provider_options={"trt_cuda_graph_enable": "True"}) as runner:
        assert red(runner.infer(feeds(1, n=2))) == 1
        with pytest.raises(TensorError, match="it keeps one graph"):
            runner.infer(feeds(1, n=3))
        assert red(runner.infer(feeds(4, n=2))) == 4


def test_the_fake_catches_other_addresses(place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = place()
    monkeypatch.setattr(ort_gpu.Resident, "_run_recorded", lambda self, f, o: self._run(f, o, 1))
    with OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"}) as runner:
        runner.infer(feeds(1), keep=True)
        hold = runner.upload(np.zeros(500, np.uint8))
        runner.infer(feeds(2), [names.IMAGE], keep=True)
        assert hold.shape == (500,)
    assert machine.problems == ["graph 1 was recorded with other addresses or shapes"]
    machine.problems.clear()
    machine.cuda.violations.clear()  # the replay reads what was given back


def test_a_first_call_that_fails_keeps_its_memory(place: Place, toys: Path) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"}) as runner:
        machine.run_errors = ["CUDA failure 901: operation failed due to a previous error during capture"]
        with pytest.raises(EngineError, match="during capture"):
            runner.infer(feeds(1))
        assert [red(runner.infer(feeds(dx))) for dx in (2, 3)] == [2, 3]
        assert {run["gpu_graph_id"] for run in machine.runs} == {"1"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host_inputs": (names.KP_DRIVING,)}, "the CPU reads or writes kp_driving"),
        ({"tells_memory": False}, "it is not known what the CPU reads"),
        ({"elsewhere": {"Round": CPU}}, "This session cannot use the graph capture feature"),
        ({"unknown": ("user_compute_stream",)}, 'Unknown provider option: "user_compute_stream"'),
    ],
)
def test_graphs_that_would_give_wrong_results_are_refused(
    place: Place, toys: Path, changes: dict[str, Any], words: str
) -> None:
    place(**changes)
    with pytest.raises(ConfigError, match=words):
        OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"})


def test_graphs_need_known_shapes(place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place()
    monkeypatch.setattr(ort_gpu, "result_shape", lambda shape, axes: None)
    with (
        OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"}) as runner,
        pytest.raises(ConfigError, match="the shape of image, deformation is not known before the run"),
    ):
        runner.infer(feeds(1))


# -- without CUDA in Python -------------------------------------------------------------------------


def test_without_cuda_in_python_results_are_on_the_host(
    place: Place, toys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = place()

    def none(index: int) -> Cuda:
        raise BackendUnavailable("no CUDA library", "expected one", "pip install cuda-python")

    monkeypatch.setattr(cuda_module, "open_cuda", none)
    with OrtRunner(toys / WARP, CUDA) as runner:
        assert (runner.resident, runner.device) == (False, "NVIDIA GPU 0")
        assert all(red(runner.infer(feeds(dx), keep=True)) == dx for dx in (3, 4))
        image = np.zeros((1, 8, 8, 3), np.uint8)
        assert runner.upload(image) is image
        assert isinstance(runner.concatenate([image, image]), np.ndarray)
    assert caplog.text.count("results come to the host after every call: no CUDA library") == 1
    assert "user_compute_stream" not in machine.opened[0][0][1]
    with pytest.raises(ConfigError, match="CUDA graphs are asked for, and CUDA cannot be used here"):
        OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"})


# -- TensorRT-RTX -----------------------------------------------------------------------------------


def test_the_plugin_is_registered_once(place: Place, plugin: ModuleType, toys: Path) -> None:
    machine = place(available=(CPU,))
    for _ in range(2):
        with OrtRunner(toys / "face_mesh.onnx", TENSORRT_RTX) as runner:
            assert (runner.backend, runner.max_batch, runner.resident) == ("tensorrt-rtx", 8, True)
    options = machine.opened[0][0][1]
    assert options["has_user_compute_stream"] == "1"
    assert options["nv_profile_max_shapes"] == "image:8x64x64x3"
    assert Path(options["nv_runtime_cache_path"]).is_dir()


def test_no_plugin_and_no_gpu_for_it(
    place: Place, plugin: ModuleType, toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(gpus=0)
    with pytest.raises(BackendUnavailable, match=r"0\.5\.0 offers 0 GPUs, and GPU 0 is asked for"):
        OrtRunner(toys / WARP, TENSORRT_RTX)
    machine = place()
    library = "libcuda.so.1: cannot open shared object file"

    def fails(name: str, path: str) -> None:
        raise RuntimeError(f"Failed to load library {path} with error: {library}")

    monkeypatch.setattr(ort.import_onnxruntime(), "register_execution_provider_library", fails)
    with pytest.raises(
        BackendUnavailable, match=rf"does not load .*{library}.*onnxruntime-ep-nv-tensorrt-rtx"
    ):
        OrtRunner(toys / WARP, TENSORRT_RTX)
    monkeypatch.setitem(sys.modules, plugin.__name__, None)
    with pytest.raises(BackendUnavailable, match=r"this build offers .*onnxruntime-ep-nv-tensorrt-rtx"):
        OrtRunner(toys / WARP, TENSORRT_RTX)
    assert machine.opened == []


# -- failures and the end ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_a_call_that_fails(place: Place, toys: Path, keep: bool) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA) as runner:
        machine.run_errors = [
            "CUBLAS failure 13",
            "Available memory of 8 is smaller than requested bytes of 90",
        ]
        with pytest.raises(EngineError, match=r"CUDAExecutionProvider failed on .*CUBLAS failure 13"):
            runner.infer(feeds(1), keep=keep)
        with pytest.raises(LimitError, match="smaller than requested"):
            runner.infer(feeds(1), keep=keep)
        assert red(runner.infer(feeds(2), keep=keep)) == 2


def test_no_memory_for_results(place: Place, toys: Path) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA) as runner:
        machine.cuda.fail("cudaMalloc", 2)
        with pytest.raises(LimitError):
            runner.infer(feeds(1))
        assert red(runner.infer(feeds(2))) == 2


def test_a_device_without_memory_for_a_stream(place: Place, toys: Path) -> None:
    machine = place()
    machine.cuda.fail("cudaStreamCreateWithFlags", 2)
    with pytest.raises(LimitError):
        OrtRunner(toys / WARP, CUDA)
    assert machine.opened == []


def test_a_session_that_does_not_open_leaves_nothing(place: Place, toys: Path, tmp_path: Path) -> None:
    for words, kind in (("CUDA failure 35: driver", BackendUnavailable), ("CUDA out of memory", LimitError)):
        machine = place(open_errors=[words])
        with pytest.raises(kind, match=words):
            OrtRunner(toys / WARP, CUDA)
        machine.verify()
    folder = tmp_path / "engines"
    place(open_errors=["Please install TensorRT libraries"])
    with pytest.raises(BackendUnavailable, match="Please install"):
        OrtRunner(toys / WARP, TENSORRT, provider_options={"cache_dir": str(folder)})
    assert list((folder / "onnxruntime").iterdir()) == []


def test_closing(place: Place, toys: Path) -> None:
    machine = place()
    runner = OrtRunner(toys / WARP, CUDA, provider_options={"enable_cuda_graph": "1"})
    runner.infer(feeds(1), keep=True)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("lp-edge warp_decode")]
    runner.close()
    runner.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lp-edge warp_decode")]
    machine.verify()
    with pytest.raises(EngineError, match="closed"):
        runner.infer(feeds(1))


def test_results_outlive_their_runner_while_another_is_open(place: Place, toys: Path) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA) as other:
        with OrtRunner(toys / WARP, CUDA) as runner:
            kept = runner.infer(feeds(5), [names.IMAGE], keep=True)[names.IMAGE]
        assert machine.cuda.count("cudaStreamDestroy") == 1
        assert red(other.infer(feeds(2) | {names.SOURCE_IMAGE: kept})) == 7


def test_a_lost_device_is_said_once_and_closed(
    place: Place, toys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine = place()
    with OrtRunner(toys / WARP, CUDA) as runner:
        runner.infer(feeds(1))
        machine.cuda.break_device()
        with pytest.raises(EngineError, match="700"):
            runner.infer(feeds(1))
    assert "closing" in caplog.text
    machine.cuda.broken = 0
    machine.cuda._objects.clear()  # the driver frees what a lost context held
    machine.cuda._memory.clear()


# -- parts that need no fake ------------------------------------------------------------------------


def test_binding_by_address_on_the_cpu(toys: Path) -> None:
    """The same binding with the real module, where the device is the host."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(toys / WARP), providers=[CPU])
    data = feeds(9, n=2)
    image = np.zeros((2, 8, 8, 3), np.uint8)

    def placed(array: np.ndarray) -> Any:
        return SimpleNamespace(shape=array.shape, dtype=array.dtype, pointer=array.ctypes.data)

    binding = session.io_binding()
    driving = data.pop(names.KP_DRIVING)
    inputs = {name: placed(array) for name, array in data.items()} | {names.KP_DRIVING: driving}
    bind(binding, ("cpu", 0), inputs, {names.IMAGE: placed(image), names.DEFORMATION: None})
    options = onnxruntime.RunOptions()
    for key in ("disable_synchronize_execution_providers", "gpu_graph_id", "cuda_graph_annotation_id"):
        options.add_run_config_entry(key, "1")
    session.run_with_iobinding(binding, options)
    assert image[..., 0].min() == 9
    assert binding.get_outputs()[1].numpy()[1, 0, 0, 0] == 9


@tells_placement  # what the fake has is of such a version
def test_the_fake_has_what_onnx_runtime_has() -> None:
    fake = make_onnxruntime(Machine())
    for name in vars(fake):
        if not name.startswith("__"):
            assert hasattr(onnxruntime, name), name
    session = onnxruntime.InferenceSession(str(Path(__file__).parent.parent / "toys" / WARP), providers=[CPU])
    pairs = [
        (fake.InferenceSession, onnxruntime.InferenceSession),
        (fake.RunOptions, onnxruntime.RunOptions),
        (type(fake.InferenceSession.io_binding(_Bare())), onnxruntime.IOBinding),
    ]
    for mine, theirs in pairs:
        for name in [
            name
            for name in dir(mine)
            if not name.startswith("_") and name not in ("entries", "inputs", "outputs")
        ]:
            assert hasattr(theirs, name), f"{theirs.__name__}.{name}"
    binding = pairs[2]
    for name in ("bind_input", "bind_cpu_input", "bind_output"):
        assert list(inspect.signature(getattr(binding[0], name)).parameters) == list(
            inspect.signature(getattr(binding[1], name)).parameters
        )
    if hasattr(session, "get_input_memory_infos"):
        assert ort_gpu._on_host(session, "input") == set(feeds(0))
        assert ort_gpu._on_host(session, "output") == {names.IMAGE, names.DEFORMATION}


class _Bare:
    _machine = None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("N", 3), (2, 3)),
        (("5*H*W//1024+(H+32)//64*((W+32)//64)",), (5 * 64 * 96 // 1024 + 1 * 2,)),
        (("-N+H", "Max(N, W)", "min(N,W)", "H%5"), (62, 96, 2, 4)),
        (("N-2",), None),
        (("?0",), None),
        (("K",), None),
        (("H//(N-2)",), None),
        (("H/2",), None),
        (("__import__('os')",), None),
        (("N.real",), None),
        ((), ()),
    ],
)  # fmt: skip
def test_shapes_of_results(shape: tuple[Any, ...], expected: tuple[int, ...] | None) -> None:
    assert result_shape(shape, {"N": 2, "H": 64, "W": 96}) == expected


def test_shapes_of_the_shipped_networks_follow_from_their_inputs() -> None:
    bundle = open_bundle()
    for name, entry in bundle.manifest.networks.items():
        axes = {a: 64 for spec in entry.inputs for a in spec.shape if isinstance(a, str)}
        assert all(result_shape(spec.shape, axes) is not None for spec in entry.outputs), name


def test_engines_are_known_by_the_tensorrt_that_the_provider_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version that is installed must be neither taken for it nor loaded beside it."""
    loaded = []

    def load(name: str) -> SimpleNamespace:
        loaded.append(name)
        return SimpleNamespace(getInferLibVersion=lambda: 100300)

    (tmp_path / "capi").mkdir()
    ort = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(ort_gpu.ctypes, "CDLL", load)
    assert ort_gpu._library_version(ort, ort_gpu.TENSORRT) == "TensorRT"
    library = tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so"
    library.write_bytes(b"\x7fELF\0libcudart.so.12\0libnvinfer.so.10\0libnvonnxparser.so.10\0")
    assert ort_gpu._library_version(ort, ort_gpu.TENSORRT) == "TensorRT 100300"
    assert loaded == ["libnvinfer.so.10"]
