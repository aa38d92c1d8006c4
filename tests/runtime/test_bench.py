"""The measurements behind lp-bench, on the toy networks and on a simulated device."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.bundle import open_bundle
from lp_edge.engines.cuda import Cuda, open_cuda
from lp_edge.engines.device import DeviceArray, upload
from lp_edge.engines.runner import Array, Runner, TensorSpec, to_host
from lp_edge.errors import ConfigError, OutputError
from lp_edge.runtime import bench as bench_module
from lp_edge.runtime import bench_networks as networks_module
from lp_edge.runtime import bench_pipeline as pipeline_module
from lp_edge.runtime import bench_soak as soak_module
from lp_edge.runtime.bench_calls import GpuSampler, feeds_of, origin_of, shapes_of, time_calls, time_record
from lp_edge.runtime.bench_compare import (
    Call,
    Side,
    bench_compare,
    compare_table,
    ratio_interval,
    runner_side,
)
from lp_edge.runtime.bench_jetson import estimate_jetson, jetson_table
from lp_edge.runtime.bench_networks import bench_networks, networks_table
from lp_edge.runtime.bench_pipeline import CallRecorder, bench_pipeline, pipeline_table
from lp_edge.runtime.bench_report import Table, lines_to, partial_of, write_markdown
from lp_edge.runtime.bench_soak import bench_soak, growth, soak_table
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.roofline import Board, Peaks, Work
from lp_edge.tests.fake_cuda.arrays import to_device
from lp_edge.tests.fake_cuda.device import H200, FakeCuda

CPU = BackendConfig("cpu", threads=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A picture with a "face" for the toys."""
    path = tmp_path / "face.png"
    write_image(path, face(100))
    return path


@pytest.fixture
def driving(tmp_path: Path) -> Path:
    path = tmp_path / "drive.mp4"
    with open_writer(path, (240, 200), Fraction(25)) as writer:
        for x in range(100, 112):
            writer.write(face(x))
    return path


def face(x: int) -> npt.NDArray[np.uint8]:
    out = np.zeros((200, 240, 3), np.uint8)
    out[60:140, x - 40 : x + 40] = 255
    return out


class Resident(Runner):
    """Doubles on the simulated device, or on the host where there is none."""

    def __init__(self, cuda: Cuda | None, max_batch: int | None = None) -> None:
        spec = TensorSpec("x", np.dtype(np.float32), ("batch", 3))
        super().__init__("double", [spec], [TensorSpec("y", spec.dtype, spec.shape)])
        self._cuda, self._max = cuda, max_batch
        self._stream = None if cuda is None else cuda.stream()
        self.calls = 0

    backend = property(lambda self: "fake")  # type: ignore[assignment]
    device = property(lambda self: "simulated")  # type: ignore[assignment]
    resident = property(lambda self: self._cuda is not None)  # type: ignore[assignment]
    max_batch = property(lambda self: self._max)  # type: ignore[assignment]

    def upload(self, array: npt.NDArray[Any]) -> Array:
        return array if self._cuda is None else upload(self._cuda, array)

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        self.calls += 1
        return {"y": to_host(feeds["x"]) * 2}

    def _infer_kept(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        assert self._cuda is not None and self._stream is not None
        return {"y": to_device(self._cuda, to_host(self._infer(feeds, outputs)["y"]), self._stream)}

    def _stage(self, array: Array) -> Array:
        return array

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    device = FakeCuda(H200)
    with open_cuda(runtime=device) as opened:
        yield opened
    device.verify()


# -- calls ------------------------------------------------------------------------------------------------------


def test_host_runners_have_latencies_alone() -> None:
    with Resident(None) as runner:
        times = time_calls(runner, {"x": np.ones((2, 3), np.float32)}, seconds=0.01, warmup=2, least=4)
        assert runner.calls == len(times.latency) + 2
    assert len(times.latency) >= 4 and times.queued is None
    assert times.best_seconds == sorted(times.latency)[len(times.latency) // 2] or len(times.latency) % 2 == 0
    assert min(times.latency) > 0


def test_resident_runners_are_timed_queued_too_with_everything_on_the_device(cuda: Cuda) -> None:
    with Resident(cuda) as runner:
        x = runner.upload(np.ones((2, 3), np.float32))
        assert isinstance(x, DeviceArray)
        times = time_calls(runner, {"x": x}, seconds=0.01, warmup=1, least=4)
        assert runner.calls >= 1 + 4 + 4
    assert times.queued is not None and times.best_seconds == times.queued > 0


def test_percentiles_are_in_order() -> None:
    record = time_record([0.001, 0.002, 0.010])
    assert record == {"count": 3, "mean_ms": 4.333, "p50_ms": 2.0, "p90_ms": 8.4, "p99_ms": 9.84}


def test_feeds_fit_every_network(toy_bundle: Path, liveportrait_bundle: Path) -> None:
    for folder in (toy_bundle, liveportrait_bundle):
        bundle = open_bundle(folder)
        for name in bundle.manifest.networks:
            with bundle.runner(name, CPU) as runner:
                feeds = feeds_of(bundle, runner.inputs.values(), 2)
                assert {k: a.shape for k, a in feeds.items()} == shapes_of(runner.inputs.values(), 2)
                assert all(to_host(a).size for a in runner.infer(feeds).values())
                again = feeds_of(bundle, runner.inputs.values(), 2)
                assert all(np.array_equal(feeds[k], again[k]) for k in feeds)


SMI = """#!/bin/sh
case "$*" in *--loop-ms*) ;; *) echo "H200, 580.1, P0, 700, 3, 1980, 3201, 1980, 90, 40"; exit 0;; esac
echo "80, 1500, 3201, 1980, 300.5, 50"
echo "90, 1700, 3201, 1980, [N/A], 52"
exec sleep 30
"""


def test_a_gpu_is_sampled_while_a_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with GpuSampler() as gpu:
        for _ in range(500):
            if (told := gpu.summary()) and told["samples"] == 2:
                break
            gpu._thread.join(0.02)  # type: ignore[union-attr]
    told = gpu.summary()
    assert told is not None
    now = origin_of(None, None, CPU)["gpu"]
    assert (now["name"], now["driver_version"], now["clocks.sm"]) == ("H200", "580.1", "1980")
    assert (told["samples"], told["utilization.gpu"], told["clocks.sm"]) == (2, 85.0, 1600.0)
    assert told["power.draw"] == 300.5


@pytest.mark.parametrize(
    ("visible", "device", "asked"),
    [("", 1, "1"), ("3,GPU-5f", 0, "3"), ("3, GPU-5f", 1, "GPU-5f"), ("3", 1, "1")],
)
def test_the_gpu_that_cuda_means_is_asked(
    visible: str, device: int, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$1, 580.1, P0, 700, 80, 1980, 2619, 1980, 300, 40"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert origin_of(None, None, BackendConfig("cpu", device))["gpu"]["name"] == f"--id={asked}"


def test_without_the_tool_nothing_is_sampled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with GpuSampler() as gpu:
        pass
    assert gpu.summary() is None and origin_of(None, None, CPU)["gpu"] is None


# -- networks ---------------------------------------------------------------------------------------------------


class Counted:
    """Work as a counter tells it."""

    products: Mapping[str, int] = {"float32": 4_000_000}
    flops = 5_000_000
    fused_bytes = 2_000_000


def counter(path: Path, shapes: Mapping[str, Sequence[int]]) -> Work:
    assert path.is_file() and all(min(size) > 0 for size in shapes.values())
    return Counted()


PEAKS = Peaks({"float32": 1e12}, 1e12)


def test_networks_are_set_against_the_peaks(toy_bundle: Path) -> None:
    records = list(
        bench_networks(
            toy_bundle,
            CPU,
            batches=(1, 2),
            networks=["face_mesh"],
            seconds=0.02,
            counter=counter,
            peaks=PEAKS,
        )
    )
    first, *rows = records
    assert (first["bench"], first["tflops"], first["gbs"]) == ("peaks", {"float32": 1.0}, 1000.0)
    assert [(r["network"], r["batch"]) for r in rows] == [("face_mesh", 1), ("face_mesh", 2)]
    for row in rows:
        took = row["row_ms"] * row["batch"] / 1e3
        assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["tflops"] == pytest.approx(5e6 / took / 1e12, rel=0.02, abs=1e-4)
        assert row["gbs"] == pytest.approx(2e6 / took / 1e9, rel=0.02, abs=0.02)
        assert row["compute"] == pytest.approx(4e-6 / took, rel=0.02, abs=1e-3)
        assert row["roofline"] == max(row["compute"], row["bandwidth"])
        assert row["provenance"]["bundle"]["files"] and row["provenance"]["runners"]["face_mesh"]
    table = networks_table(records)
    assert len(table.rows) == 2 and "of roofline %" in table.columns
    assert "1 TFLOP/s" in table.notes[0]
    json.dumps(records, allow_nan=False)


def test_without_a_counter_the_columns_are_left_out_and_said_to_be(toy_bundle: Path) -> None:
    records = list(bench_networks(toy_bundle, CPU, batches=(1,), networks=["face_mesh"], seconds=0.01))
    assert [r["bench"] for r in records] == ["networks"]
    assert records[0]["gflop"] is None and records[0]["roofline"] is None
    table = networks_table(records)
    assert "GFLOP" not in table.columns
    assert any("lp-edge[export]" in note for note in table.notes)


def test_a_resident_network_gets_its_inputs_on_the_device_once(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, cuda: Cuda
) -> None:
    bundle, runner = open_bundle(toy_bundle), Resident(cuda)
    given: list[Mapping[str, Array]] = []
    infer = runner.infer
    monkeypatch.setattr(
        runner, "infer", lambda feeds, *args, **how: given.append(feeds) or infer(feeds, *args, **how)
    )
    monkeypatch.setattr(networks_module, "open_bundle", lambda path: bundle)
    monkeypatch.setattr(type(bundle), "runner", lambda self, name, config: runner)
    (record,) = bench_networks(None, CPU, batches=(2,), networks=["face_mesh"], seconds=0.01)
    assert record["resident"] is True and record["queued_ms"] > 0
    assert record["row_ms"] == pytest.approx(record["queued_ms"] / 2, abs=1e-4)
    arrays = {id(feeds["x"]) for feeds in given}
    assert len(arrays) == 1 and isinstance(given[0]["x"], DeviceArray)


def test_a_batch_that_an_engine_does_not_take_is_told(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(toy_bundle)
    monkeypatch.setattr(networks_module, "open_bundle", lambda path: bundle)
    monkeypatch.setattr(type(bundle), "runner", lambda self, name, config: Resident(None, max_batch=2))
    records = list(bench_networks(None, CPU, batches=(2, 4), networks=["face_mesh"], seconds=0.01))
    assert [("skipped" in r, r["batch"]) for r in records] == [(False, 2), (True, 4)]
    assert any("up to 2" in note for note in networks_table(records).notes)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batches": ()}, "--batch empty"),
        ({"batches": (0,)}, "--batch 0; expected 1 to 256"),
        ({"seconds": 0}, "--seconds 0"),
        ({"networks": ["magic"]}, "no network magic"),
    ],
)
def test_networks_refuse_what_cannot_be_measured(toy_bundle: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        list(bench_networks(toy_bundle, CPU, **given))


# -- pipeline ---------------------------------------------------------------------------------------------------


def test_a_pipeline_tells_stages_networks_and_the_rest(
    liveportrait_bundle: Path, source: Path, driving: Path
) -> None:
    records = list(
        bench_pipeline(
            source,
            driving,
            bundle=liveportrait_bundle,
            backend=CPU,
            pixels=("host",),
            batch_sizes=(None, 2),
            warmup=4,
        )
    )
    kinds = {r["bench"] for r in records}
    assert kinds == {"stage", "network", "pipeline"}
    assert {(r["pixels"], r["batch"]) for r in records} == {("host", "auto"), ("host", 2)}
    stages = {r["stage"] for r in records if r["bench"] == "stage"}
    assert {"decode", "track", "motion", "compose", "warp", "paste_back", "encode"} <= stages
    for whole in (r for r in records if r["bench"] == "pipeline"):
        calls = [
            r
            for r in records
            if r["bench"] == "network" and (r["pixels"], r["batch"]) == (whole["pixels"], whole["batch"])
        ]
        assert "warp_decode" in {r["network"] for r in calls}
        assert whole["networks_ms"] == pytest.approx(sum(r["frame_ms"] for r in calls), abs=0.01)
        outside = whole["frame_ms"] / whole["networks_ms"] - 1
        if whole["outside"] is None:  # calls overlap on a host
            assert outside < 0.01
        else:
            assert whole["outside"] == pytest.approx(outside, abs=0.01) and whole["outside"] >= 0
        assert 0 < whole["engine_busy"] <= 1 and 0 < whole["device_busy"] <= 1
        assert whole["frames"] == 8 and whole["resident"] is False
        assert whole["config"]["pixels"] == "host"
    drawn = [r for r in records if r.get("network") == "warp_decode" and r["batch"] == 2]
    assert max(r["rows"] for r in drawn) == 2
    tables = pipeline_table(records)
    assert [len(t.rows) > 0 for t in tables] == [True] * 3 and "engine busy" in tables[2].notes[0]


@pytest.mark.parametrize(("resident", "told"), [(False, None), (True, -0.5)])
def test_calls_that_overlap_on_a_host_tell_nothing_of_the_rest(
    resident: bool, told: float | None, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def animation(*_: Any, observer: Any, **__: Any) -> Iterator[dict[str, Any]]:
        recorder: CallRecorder = observer._recorder
        recorder.frames, recorder.seconds, recorder.resident = 10, 0.1, resident
        call = {"network": "face_mesh", "rows": 1, "calls": 1.0, "ms": 20.0, "frame_ms": 20.0}
        recorder.networks.append(call)
        yield {"stage": "end_to_end", "fps": 100.0, "p99_ms": 10.0, "batch_size": None, "peak_memory_mib": 1.0, "provenance": {}}  # fmt: skip

    monkeypatch.setattr(pipeline_module, "bench_animation", animation)
    _, whole = records = list(bench_pipeline(bundle=toy_bundle, backend=CPU))
    assert (whole["frame_ms"], whole["networks_ms"], whole["outside"]) == (10.0, 20.0, told)
    *_, table = pipeline_table(records)
    assert table.cells()[0][1] == "auto: not found yet" and "None" not in table.markdown()
    assert any("--batch N" in note for note in table.notes)


def test_fewer_frames_than_asked_for_are_refused(
    liveportrait_bundle: Path, source: Path, driving: Path
) -> None:
    given = {"bundle": liveportrait_bundle, "backend": CPU, "warmup": 2}
    with pytest.raises(ConfigError, match="the run has 12 frames; expected 20") as refused:
        list(bench_module.bench_animation(source, driving, limit=20, **given))
    assert "12 at most" in refused.value.remedy
    *_, whole = bench_module.bench_animation(source, driving, limit=12, **given)
    assert whole["frames"] == 10


def test_nothing_is_counted_after_the_last_frame(
    liveportrait_bundle: Path, source: Path, driving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Order(bench_module.Observer):
        def begin(self) -> None:
            told.append("begin")

        def stop(self) -> None:
            told.append("stop")

        def end(self, frames: int, seconds: float) -> None:
            told.append(f"end {frames}")

    def opened(*given: Any) -> Any:
        writer = open_writer(*given)
        close = writer.close
        monkeypatch.setattr(writer, "close", lambda: (told.append("finish"), close()))
        return writer

    monkeypatch.setattr(bench_module, "open_writer", opened)
    given = {"bundle": liveportrait_bundle, "backend": CPU, "warmup": 0, "limit": 4, "observer": Order()}
    list(bench_module.bench_animation(source, driving, **given))
    assert told[:3] == ["begin", "stop", "finish"] and told[-1] == "end 4"

    recorder = CallRecorder(seconds=0.01)
    with recorder.wrap(Resident(None)) as runner:
        recorder.begin()
        runner.infer({"x": np.ones((2, 3), np.float32)})
        recorder.stop()
        busy = recorder.busy_seconds
        runner.infer({"x": np.ones((2, 3), np.float32)})
        recorder.end(1, 1.0)
    assert [r["calls"] for r in recorder.networks] == [1.0] and recorder.busy_seconds == busy


def test_a_recorder_counts_only_what_is_counted_and_times_it_alone() -> None:
    recorder = CallRecorder(seconds=0.01)
    with recorder.wrap(Resident(None)) as runner:
        x = np.ones((2, 3), np.float32)
        runner.infer({"x": x})
        recorder.begin()
        for _ in range(6):
            assert np.array_equal(to_host(runner.infer({"x": x})["y"]), 2 * x)
        runner.infer({"x": x[:1]}, ["y"])
        recorder.end(3, 1.0)
        assert [(r["network"], r["rows"], r["calls"]) for r in recorder.networks] == [
            ("double", 2, 2.0),
            ("double", 1, pytest.approx(1 / 3, abs=1e-3)),
        ]
        assert 0 < recorder.busy_seconds < 1.0
        busy = recorder.busy_seconds
        runner.infer({"x": x})
        assert recorder.busy_seconds == busy
    assert recorder.resident is False


def test_a_recorder_leaves_a_resident_runner_as_it_is(cuda: Cuda) -> None:
    recorder = CallRecorder(seconds=0.01)
    with recorder.wrap(Resident(cuda, max_batch=4)) as runner:
        assert (runner.resident, runner.max_batch, runner.backend) == (True, 4, "fake")
        recorder.begin()
        kept = runner.infer({"x": runner.upload(np.ones((1, 3), np.float32))}, keep=True)["y"]
        assert isinstance(kept, DeviceArray)
        recorder.end(1, 1.0)
    assert recorder.resident and recorder.networks[0]["calls"] == 1.0


# -- comparison -------------------------------------------------------------------------------------------------


def timed(label: str, seconds: Sequence[float], log: list[str]) -> Side:
    """A side whose calls take what is told."""
    given = iter(seconds * 100)

    @contextmanager
    def opener(network: str, batch: int) -> Iterator[Call]:
        def call() -> float:
            log.append(label)
            return next(given)

        yield call

    return Side(label, ("n",), opener, {"what": label})


def test_rounds_are_balanced_and_paired() -> None:
    log: list[str] = []
    (record,) = bench_compare(timed("a", [0.1], log), [timed("b", [0.2], log)], rounds=3, warmup=1)
    assert log == ["a", "b", "b", "a"] * 4
    assert (record["ratio"], record["low"], record["high"], record["rounds"]) == (2.0, 2.0, 2.0, 3)
    assert (record["a"]["p50_ms"], record["b"]["p50_ms"], record["a"]["count"]) == (100.0, 200.0, 6)
    assert record["provenance"] == {"a": {"what": "a"}, "b": {"what": "b"}}
    assert compare_table([record]).rows[0][-1] == "2 to 2"


def test_the_interval_holds_the_ratio_and_narrows_with_rounds() -> None:
    rng = np.random.default_rng(3)

    def width(rounds: int) -> float:
        ours = rng.normal(1.0, 0.05, rounds).tolist()
        theirs = rng.normal(1.5, 0.05, rounds).tolist()
        ratio, low, high = ratio_interval(ours, theirs)
        assert low <= ratio <= high and 1.4 < ratio < 1.6
        return high - low

    assert width(400) < 0.5 * width(12)


def test_bundles_on_backends_are_compared(toy_bundle: Path) -> None:
    one, two = (runner_side(toy_bundle, CPU, label) for label in ("one", "two"))
    records = list(bench_compare(one, [two], networks=["face_mesh"], batches=(1, 2), rounds=2, warmup=0))
    assert [(r["network"], r["batch"]) for r in records] == [("face_mesh", 1), ("face_mesh", 2)]
    assert all(r["low"] <= r["ratio"] <= r["high"] for r in records)
    assert records[0]["provenance"]["a"]["bundle"]["variant"] == "toy"


def test_sides_without_a_network_in_common_are_refused() -> None:
    log: list[str] = []
    a, b = timed("a", [1.0], log), timed("b", [1.0], log)
    with pytest.raises(ConfigError, match="not on both sides"):
        list(bench_compare(a, [b], networks=["m"]))
    with pytest.raises(ConfigError, match="share no network"):
        list(bench_compare(a, [Side("c", ("m",), b.open, {})]))
    with pytest.raises(ConfigError, match="rounds 1"):
        list(bench_compare(a, [b], rounds=1))


def test_networks_of_two_families_are_not_compared() -> None:
    log: list[str] = []
    mesh = Side("ours", ("face_mesh", "warp_decode"), timed("a", [1.0], log).open, {}, "mesh")
    torch = Side("torch", ("warp_decode", "stitching"), timed("b", [1.0], log).open, {}, "liveportrait")
    other = Side("other", ("face_mesh", "warp_decode"), timed("b", [1.0], log).open, {}, "liveportrait")
    with pytest.raises(
        ConfigError, match="ours is of the family mesh, torch of the family liveportrait"
    ) as told:
        list(bench_compare(mesh, [other, torch]))
    assert "--bundle" in told.value.remedy and log == [], "told before the first call"
    with pytest.raises(ConfigError, match="warp_decode cannot be compared"):
        list(bench_compare(mesh, [other], networks=["warp_decode"]))
    assert [r["network"] for r in bench_compare(mesh, [other], rounds=2)] == ["face_mesh"]
    assert [r["network"] for r in bench_compare(other, [torch], rounds=2)] == ["warp_decode"]


# -- soak -------------------------------------------------------------------------------------------------------


def test_a_soak_of_level_memory_passes(toy_bundle: Path, source: Path, driving: Path) -> None:
    *samples, last = bench_soak(source, driving, bundle=toy_bundle, backend=CPU, frames=60, samples=20)
    assert len(samples) == 20 and last["frames"] == 60
    assert [s["frames"] for s in samples] == sorted(s["frames"] for s in samples)
    assert all(s["host_mib"] > 20 and s["threads"] >= 1 for s in samples)
    assert last["level"]["descriptors"] is not False, last
    assert set(last["growth"]) == {"host_mib", "device_mib", "threads", "descriptors"}
    assert len(soak_table([*samples, last]).rows) == 5


def test_a_soak_finds_what_grows(
    toy_bundle: Path, source: Path, driving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def leaking(cuda: Cuda | None) -> dict[str, Any]:
        i = next(calls)
        return {"host_mib": 100.0 + 5 * i, "device_mib": 1000.0, "threads": 3, "descriptors": 9 + i // 5}

    monkeypatch.setattr(soak_module, "_state", leaking)
    *_, last = bench_soak(source, driving, bundle=toy_bundle, backend=CPU, frames=20, samples=20)
    assert last["passed"] is False
    assert last["level"] == {"host_mib": False, "device_mib": True, "threads": True, "descriptors": False}
    assert last["growth"]["host_mib"] == pytest.approx(5 * 15)
    assert "NOT level" in soak_table([last]).notes[0]


def test_growth_is_the_line_through_all() -> None:
    assert growth([0, 10, 20], [1, 1, 1]) == 0
    assert growth([0, 10, 20], [0, 5, 10]) == pytest.approx(10)
    assert growth([5], [1]) == 0
    noise = np.random.default_rng(1).normal(0, 1, 200)
    assert abs(growth(range(200), noise)) < 1


def test_a_soak_refuses_too_few_frames(toy_bundle: Path, source: Path) -> None:
    with pytest.raises(ConfigError, match="frames 5"):
        list(bench_soak(source, source, bundle=toy_bundle, frames=5))
    with pytest.raises(ConfigError, match="still"):
        list(bench_soak(source, source, bundle=toy_bundle, backend=CPU, frames=20, samples=10))


# -- Jetson -----------------------------------------------------------------------------------------------------


def test_the_estimate_is_the_roofline_of_the_board(liveportrait_bundle: Path) -> None:
    class Half:
        products: Mapping[str, int] = {"float16": 10**12, "float32": 10**10}
        flops = 2 * 10**12
        fused_bytes = 10**9

    boards = (Board("B", (10e12, 20e12), 1e12, (50e9, 100e9)),)
    records = list(estimate_jetson(lambda path, shapes: Half(), liveportrait_bundle, boards=boards))
    assert [(r["precision"], r["estimate"]) for r in records] == [("fp16", True), ("int8", True)]
    # highest: 1e12/20e12 + 1e10/10e12 = 51 ms; lowest: 1e12/10e12 + 1e10/1e12 = 110 ms; bytes 10 and 20 ms
    assert records[0]["networks"]["warp_decode"] == [51.0, 110.0]
    assert records[0]["picture_fps"] == [round(1000 / 220, 2), round(1000 / 102, 2)]
    assert records[0]["clip_fps"] == [round(1000 / 440, 2), round(1000 / 204, 2)]
    # int8: 1e12/40e12 + 1e10/10e12 = 26; 1e12/20e12 + 1e10/1e12 = 60
    assert records[1]["networks"]["warp_decode"] == [26.0, 60.0]
    table = jetson_table(records)
    assert "ESTIMATE" in table.title and all("estimate" in c for c in table.columns[2:])
    assert "nothing here was measured" in table.notes[0]


def test_figures_of_the_estimate_are_plain(toy_bundle: Path) -> None:
    class Little:
        products: Mapping[str, int] = {"float32": 10**6}
        flops = 10**6
        fused_bytes = 10**7

    board = Board("B", (1e13, 1e13), 1e13, (1e11, 1e11))
    table = jetson_table(list(estimate_jetson(lambda path, shapes: Little(), toy_bundle, boards=(board,))))
    assert table.rows[0][-2] == "10 000" and table.rows[0][-1] == "5 000"
    assert "below 1 GFLOP, 10 MB" in table.notes[1]


@dataclass(frozen=True)
class Products:
    """Work with these products."""

    products: Mapping[str, int]
    flops: int = 10**12
    fused_bytes: int = 10**6


def test_a_bundle_in_8_bits_is_called_what_it_is(liveportrait_bundle: Path) -> None:
    work = Products({"int8": 10**12, "float16": 10**10})
    records = list(estimate_jetson(lambda path, shapes: work, liveportrait_bundle))
    assert [r["precision"] for r in records] == ["int8"] * 3


def test_products_that_no_board_has_are_refused(liveportrait_bundle: Path) -> None:
    work = Products({"float8e4m3fn": 10**12, "float16": 10**10})
    with pytest.raises(ConfigError, match="float8e4m3fn"):
        list(estimate_jetson(lambda path, shapes: work, liveportrait_bundle))


def test_a_bundle_without_half_precision_has_one_row_a_board(toy_bundle: Path) -> None:
    records = list(estimate_jetson(counter, toy_bundle))
    assert [r["precision"] for r in records] == ["fp32"] * 3
    assert set(records[0]["networks"]) == {"warp_decode", "face_mesh"}


# -- reports ----------------------------------------------------------------------------------------------------


def test_tables_in_markdown_and_on_the_console(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = Table("T", ["a", "b [x]"], [["one|two", 0.12345], [None, 1234.5], [True, 7]], ["A note."])
    assert table.markdown() == (
        "### T\n\n| a | b [x] |\n|---|---|\n| one\\|two | 0.123 |\n| - | 1234 |\n| yes | 7 |\n\nA note.\n"
    )
    table.print()
    shown = capsys.readouterr().out
    assert "b [x]" in shown and "0.123" in shown and "A note." in shown
    write_markdown(tmp_path / "t.md", [table, table])
    assert (tmp_path / "t.md").read_text().count("### T") == 2


def test_a_wide_table_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    Table("T", [f"column {i} {'x' * 20}" for i in range(12)], [[str(i) * 20 for i in range(12)]]).print()
    assert "column 11 " + "x" * 20 in capsys.readouterr().out


def test_lines_are_written_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, partial = tmp_path / "r.jsonl", tmp_path / "r.jsonl.partial"
    path.write_text("old\n")
    with lines_to(path) as write:
        write({"a": 1})
        assert (path.read_text(), partial.read_text()) == ("old\n", '{"a": 1}\n')
        write({"b": None})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"b": None}]
    assert not partial.exists()
    with lines_to(Path("-")) as write:
        write({"a": 1})
    with lines_to(None) as write:
        write({"a": 2})
    assert capsys.readouterr().out == '{"a": 1}\n'
    with pytest.raises(OutputError, match="does not exist"), lines_to(tmp_path / "no" / "r.jsonl"):
        pass
    with pytest.raises(OutputError, match="does not exist"):
        write_markdown(tmp_path / "no" / "t.md", [])
    with pytest.raises(OutputError, match="cannot be written"), lines_to(tmp_path):
        pass


def test_a_run_that_fails_leaves_the_file_and_keeps_its_records_beside(tmp_path: Path) -> None:
    path, partial = tmp_path / "r.jsonl", partial_of(tmp_path / "r.jsonl")
    path.write_text("old\n")
    with pytest.raises(BrokenPipeError), lines_to(path):
        raise BrokenPipeError  # no matter of this file: not told as one
    assert path.read_text() == "old\n" and not partial.exists()
    with pytest.raises(KeyboardInterrupt), lines_to(path) as write:
        write({"a": 1})
        raise KeyboardInterrupt
    assert (path.read_text(), partial.read_text()) == ("old\n", '{"a": 1}\n')
    with pytest.raises(ConfigError), lines_to(path):
        raise ConfigError("nothing", "", "")
    assert partial.read_text() == '{"a": 1}\n', "nothing took its place"
    (tmp_path / "link").symlink_to(path)
    with lines_to(tmp_path / "link") as write:
        write({"a": 2})
    assert (tmp_path / "link").is_symlink() and path.read_text() == '{"a": 2}\n' and not partial.exists()


def test_a_pipe_is_written_directly(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    with lines_to(path) as write:
        write({"a": 1})
    reader.join(10)
    assert got == ['{"a": 1}\n'] and sorted(f.name for f in tmp_path.iterdir()) == ["pipe"]


def test_tables_take_the_place_of_a_file_when_they_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.md"
    path.write_text("old")

    def full(self: Path, *given: object, **how: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="No space left"):
        patched.setattr(Path, "write_text", full)
        write_markdown(path, [Table("T", ["a"])])
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["t.md"]
    write_markdown(path, [Table("T", ["a"])])
    assert path.read_text().startswith("### T")
