"""``lp-export --engines``: on a fake TensorRT and a fake CUDA device, with what can go wrong on the way."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")

from lp_edge import cli
from lp_edge.engines import BackendConfig, open_bundle, tensorrt, trt_build
from lp_edge.engines import cuda as cuda_module
from lp_edge.engines.cuda import open_cuda
from lp_edge.engines.trt_build import TensorRtConfig
from lp_edge.export import engines
from lp_edge.runtime.image import write_image
from lp_edge.runtime.pixels import open_device_graph
from lp_edge.tests.fake_cuda.device import H200, NO_DEVICE, FakeCuda, Personality
from lp_edge.tests.fake_tensorrt.module import VERSIONS, World, make_tensorrt
from lp_edge.tests.test_cli import frame

NETWORKS = ["face_detector", "face_mesh", "warp_decode"]
GRAPHS = 6  # for cropping and pasting


def export(*args: object) -> Result:
    return CliRunner().invoke(cli.export, [str(arg) for arg in args])


Machine = Callable[..., World]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """Gives this process a TensorRT and a GPU; at the end nothing may be left on the device."""
    worlds: list[World] = []

    def make(version: str = "10.3", device: Personality = H200) -> World:
        world = World(FakeCuda(device))
        monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(version, world))
        monkeypatch.setattr(cuda_module, "open_cuda", lambda index=0: open_cuda(index, runtime=world.cuda))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        world.verify()


@pytest.mark.parametrize("version", list(VERSIONS))
def test_engines_of_a_finished_bundle(
    machine: Machine, toy_bundle: Path, tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machine(version)
    monkeypatch.setitem(sys.modules, "torch", None)  # a Jetson has none
    result = export("--engines", toy_bundle, "--max-batch", 2)
    assert result.exit_code == 0, result.output
    entries = open_bundle(toy_bundle).manifest.engines
    assert [entry.network for entry in entries] == NETWORKS
    assert all(f"lp-export: engine of {name}: " in result.stderr for name in NETWORKS)
    assert all(entry.file in result.stdout and "NVIDIA H200" in result.stdout for entry in entries)
    assert result.stdout.splitlines()[-1].startswith(
        f"{toy_bundle}: bundle of the family mesh, engines built in"
    )
    assert "run them with: --backend tensorrt\n" in result.stdout
    kept = {path.name.split(".")[0] for path in (tmp_path / "cache" / "lp-edge" / "engines").glob("*.engine")}
    assert len(kept) == GRAPHS and "paste_still" in kept
    networks = [build.profile for build in world.builds if "image" in build.profile]
    assert max(profile["image"][2][0] for profile in networks) == 2
    again = export("--engines", toy_bundle, "--max-batch", 2, "--json")
    told = json.loads(again.stdout)
    assert (again.exit_code, told["ok"], told["family"]) == (0, True, "mesh")
    assert [engine["file"] for engine in told["engines"]] == [entry.file for entry in entries]
    assert len(world.builds) == 3 + GRAPHS, "what is there is taken as it is"


def test_options_reach_tensorrt(machine: Machine, toy_bundle: Path) -> None:
    world = machine("10.3")
    result = export(
        "--engines", toy_bundle, "--workspace-mib", 64, "--optimization-level", 1, "--hardware-compatible",
        "--no-timing-cache",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for build in world.builds:
        assert build.settings["builder_optimization_level"] == 1
        assert 64 << 20 in build.settings.values()
        assert "hardware_compatibility_level" in build.settings
    assert not list((toy_bundle / "engines").glob("*timing*"))
    assert export("--engines", toy_bundle).exit_code == 0
    assert list((toy_bundle / "engines").glob("*timing*"))


@pytest.mark.parametrize("version", list(VERSIONS))
def test_a_run_without_options_takes_them_all(machine: Machine, toy_bundle: Path, version: str) -> None:
    world = machine(version)
    assert export("--engines", toy_bundle, "--max-batch", 1, "--workspace-mib", 64).exit_code == 0
    config, bundle = BackendConfig("tensorrt"), open_bundle(toy_bundle)
    for name in NETWORKS:
        with bundle.runner(name, config) as runner:
            assert runner.max_batch == 1
    for path in engines.device_graphs(TensorRtConfig()):
        open_device_graph(path.stem, config).close()
    assert len(world.builds) == 3 + GRAPHS
    assert export("--engines", toy_bundle).exit_code == 0
    assert len(world.builds) == 2 * (3 + GRAPHS), "who builds gets exactly what was said"
    with bundle.runner("warp_decode", config) as runner:
        assert runner.max_batch == 8


def test_engines_after_an_export(
    machine: Machine, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machine()
    _exports_a_copy(monkeypatch, toy_bundle)
    result = export("--family", "mesh", "-o", tmp_path / "out", "--engines", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [row["name"] for row in told["networks"]] == ["warp_decode"]
    assert [engine["network"] for engine in told["engines"]] == NETWORKS and len(world.builds) == 3 + GRAPHS
    assert len(open_bundle(tmp_path / "out").manifest.engines) == 3


def _exports_a_copy(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """An export of the mesh family that copies a bundle."""
    import shutil
    from types import SimpleNamespace

    def build(output: Path, *, report: Callable[[str], None]) -> Any:
        shutil.copytree(bundle, output)
        row = {"name": "warp_decode", "nodes": 1, "size": 9, "opset": 17, "parity": {}, "seconds": 0.1}
        return SimpleNamespace(as_dict=lambda: {"networks": [row], "seconds": 0.1})

    monkeypatch.setattr(cli, "_exporter", lambda module: SimpleNamespace(build=build))


def test_a_build_that_fails_leaves_the_exported_bundle(
    machine: Machine, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machine()
    world.build_error = ("INTERNAL_ERROR", "no kernel for it")
    _exports_a_copy(monkeypatch, toy_bundle)
    result = export("--family", "mesh", "-o", tmp_path / "out", "--engines")
    assert result.exit_code == 6
    assert "is exported and complete, but without engines" in result.stderr
    assert "no kernel for it" in result.stderr and f"lp-export --engines {tmp_path / 'out'}" in result.stderr
    assert open_bundle(tmp_path / "out").manifest.engines == ()


@pytest.mark.parametrize("lacking", ["tensorrt", "gpu"])
def test_without_tensorrt_or_a_gpu_nothing_is_begun(
    machine: Machine, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    machine(device=NO_DEVICE if lacking == "gpu" else H200)
    if lacking == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    for args in (("--engines", toy_bundle), ("--family", "mesh", "-o", tmp_path / "out", "--engines")):
        result = export(*args)
        assert (result.exit_code, result.stdout) == (7, "")
        sentence, remedy = result.stderr.splitlines()
        assert "engines cannot be built here" in sentence and "without --engines" in remedy
        assert ("tensorrt cannot be imported" if lacking == "tensorrt" else "NVIDIA") in result.stderr
        assert "cuda or cpu" not in remedy and "--backend" not in remedy, "lp-export has no such option"
    assert not (tmp_path / "out").exists()
    assert open_bundle(toy_bundle).manifest.engines == ()


@pytest.mark.parametrize("version", list(VERSIONS))
def test_ctrl_c_stops_a_build_and_keeps_what_is_finished(
    machine: Machine, toy_bundle: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the main thread, as from a terminal, while the build is busy in its own."""
    world = machine(version)
    manifest = (toy_bundle / "manifest.json").read_bytes()
    stopped = threading.Event()

    def press() -> None:
        if len(world.builds) == 1 and not stopped.is_set():  # the second network is being built
            stopped.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            # What the main thread does on it must have been done before the build goes on.
            assert heard.wait(20)

    heard = threading.Event()
    join = threading.Thread.join

    def noting(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "engines" and timeout == trt_build._GRACE_S:
            heard.set()
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", noting)
    world.during_build = press
    result = export("--engines", toy_bundle)
    assert result.exit_code == 130, result.output
    assert "was stopped" in result.stderr and f"lp-export --engines {toy_bundle}" in result.stderr
    assert (toy_bundle / "manifest.json").read_bytes() == manifest
    assert len(list((toy_bundle / "engines").glob("*.engine"))) == 1
    assert not [path for path in (toy_bundle / "engines").iterdir() if path.name.endswith(".part")]
    world.during_build = None
    assert export("--engines", toy_bundle).exit_code == 0
    assert len(open_bundle(toy_bundle).manifest.engines) == 3
    assert len(world.builds) <= 4 + GRAPHS, "the finished one is not built again"


def run(folder: Path, bundle: Path) -> Result:
    for name, x in (("one.png", 90), ("two.png", 100)):
        write_image(folder / name, frame(x))
    files = [str(folder / name) for name in ("one.png", "two.png", "made.png")]
    options = [
        "-s",
        files[0],
        "-d",
        files[1],
        "-o",
        files[2],
        "--bundle",
        str(bundle),
        "--backend",
        "tensorrt",
    ]
    return CliRunner().invoke(cli.run, options)


@pytest.mark.parametrize("version", list(VERSIONS))
def test_a_run_that_builds_says_so(
    machine: Machine, toy_bundle: Path, tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machine(version)
    monkeypatch.setattr(tensorrt, "_TELL_S", 0.0)
    monkeypatch.setattr(trt_build, "_POLL_S", 0.01)
    world.during_build = lambda: time.sleep(0.05)
    result = run(tmp_path, toy_bundle)
    assert result.exit_code == 0, result.output
    assert "WARNING: face_mesh: TensorRT builds its engine, once for this GPU" in result.stderr
    assert re.search(r"WARNING: face_mesh: building.* \(\d+ s\)", result.stderr)
    assert ("% (" in result.stderr) == (not version.startswith("8"))
    again = run(tmp_path, toy_bundle)
    assert again.exit_code == 0 and "builds its engine" not in again.stderr


@pytest.mark.parametrize("version", list(VERSIONS))
def test_ctrl_c_while_a_run_builds(
    machine: Machine, toy_bundle: Path, tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT 8 cannot be stopped: the run ends all the same, and what comes of the build is dropped."""
    world = machine(version)
    monkeypatch.setattr(trt_build, "_GRACE_S", 0.2)
    pressed, heard, ended = threading.Event(), threading.Event(), threading.Event()
    join = threading.Thread.join

    def press() -> None:
        if len(world.builds) == 1 and not pressed.is_set():  # the second network is being built
            pressed.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert heard.wait(20)
            if version.startswith("8"):
                assert ended.wait(20)

    def noting(self: threading.Thread, timeout: float | None = None) -> None:
        if self.name == "engines" and timeout == trt_build._GRACE_S:
            heard.set()
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", noting)
    world.during_build = press
    try:
        result = run(tmp_path, toy_bundle)
    finally:
        ended.set()
        for thread in threading.enumerate():
            if thread.name == "engines":
                join(thread, 20)
    assert pressed.is_set() and result.exit_code == 130, result.output
    assert "the run was stopped" in result.stderr and not (tmp_path / "made.png").exists()
    kept = list((toy_bundle / "engines").iterdir())
    assert len([path for path in kept if path.suffix == ".engine"]) == 1
    assert not [path for path in kept if path.name.endswith(".part")]
    world.during_build = None
    assert run(tmp_path, toy_bundle).exit_code == 0


def test_graphs_outside_of_the_bundle_get_engines_in_the_cache(
    machine: Machine, toy_bundle: Path, toys: Path, tmp_path: Path
) -> None:
    world = machine()
    graphs = {toys / "liveportrait" / "stitching.onnx": TensorRtConfig(max_batch=2)}
    assert len(engines.build(toy_bundle, graphs=graphs)) == 3
    assert engines.options_of(TensorRtConfig(max_batch=2, timing_cache=False)) == {
        "max_batch": "2", "timing_cache": "false"
    }  # fmt: skip
    (kept,) = (tmp_path / "cache" / "lp-edge" / "engines").glob("stitching.*.engine")
    assert kept.stat().st_size > 0 and len(world.builds) == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--engines",), "neither a family nor a bundle"),
        (("--engines", "b", "--family", "mesh", "-o", "c"), "--family together with --engines"),
        (("--engines", "b", "--verify", "c"), "--verify together with --engines"),
        (("--verify", "b", "--engines"), "--engines means nothing with --verify"),
        (("--engines", "b", "--fp16"), "--fp16 means nothing with --engines"),
        (("--family", "mesh", "-o", "b", "--max-batch", 4), "--max-batch without --engines"),
        (("--family", "mesh", "--engines"), "ships with lp-edge"),
        (("--engines", "b", "--max-batch", 0), "'--max-batch': 0 is not in the range"),
        (("--engines", "b", "--optimization-level", 9), "'--optimization-level': 9 is not in the range"),
        (("--verify", "b", "--device", 1), "--device means nothing with --verify"),
    ],
)
def test_options_that_do_not_go_together(args: tuple[object, ...], words: str, machine: Machine) -> None:
    machine()
    result = export(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr and "to fix it" in result.stderr


def test_an_option_that_this_tensorrt_has_not(machine: Machine, toy_bundle: Path) -> None:
    machine("8.5")
    result = export("--engines", toy_bundle, "--optimization-level", 3)
    assert result.exit_code == 2 and "TensorRT 8.5" in result.stderr


def test_a_folder_that_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told where there is no TensorRT, too: it is not what is wrong with the command."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = export("--engines", tmp_path)
    assert result.exit_code == 5 and "manifest.json" in result.stderr
    result = export("--engines", tmp_path / "nosuch")
    assert result.exit_code == 5 and "nosuch" in result.stderr and "TensorRT" not in result.stderr


def test_progress_is_a_bar_per_network_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lp_edge.engines.trt_build import BuildProgress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with cli._build_progress(False) as update:
        assert update is not None
        update(BuildProgress("face_mesh", "parsing"))
        update(BuildProgress("face_mesh", "building: Tactics", 0.5))
        update(BuildProgress("warp_decode", "building: Tactics", 0.25))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "face_mesh" in shown.err and "warp_decode" in shown.err and "25%" in shown.err
