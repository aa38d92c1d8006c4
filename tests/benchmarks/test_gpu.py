"""benchmarks/gpu: packing, unpacking and the dry run, from an unpacked tree, on the CPU and the toy networks."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import lp_edge
from lp_edge.engines.backends import BackendConfig
from lp_edge.runtime.bench import default_inputs
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_read import probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.roofline import Peaks

FOLDER = Path(lp_edge.__file__).resolve().parent / "benchmarks" / "gpu"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no source tree: benchmarks are not installed")


def face(x: int) -> np.ndarray:
    """A "face" for the toys."""
    out = np.zeros((200, 240, 3), np.uint8)
    out[60:140, x - 40 : x + 40] = 255
    return out


@pytest.fixture
def source(tmp_path: Path) -> Path:
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


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("run", monkeypatch)


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("pack", monkeypatch)


def dry(out: Path, bundle: Path, source: Path, driving: Path, *more: str) -> list[str]:
    return [
        *("--out", str(out), "--backend", "cpu", "--bundle", str(bundle), "--source", str(source)),
        *("--driving", str(driving), "--frames", "24", "--clip", "10", "--warmup", "3", "--seconds", "0.01"),
        *("--rounds", "2", "--batches", "1,2", *more),
    ]


# -- run.py -----------------------------------------------------------------------------------------------------


def test_a_dry_run_runs_every_step_and_judges_nothing(
    run: ModuleType,
    liveportrait_bundle: Path,
    source: Path,
    driving: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "counter", lambda: None)  # so that no peaks are measured, which takes seconds
    out = tmp_path / "out"
    out.mkdir()
    given = run.parse(dry(out, liveportrait_bundle, source, driving))
    settings = run.Settings(
        "cpu", bundle=given.bundle, source=given.source, driving=given.driving, batches=(1, 2), frames=24, clip=10,
        warmup=3, seconds=0.01, rounds=2,
    )  # fmt: skip
    for name in run.STEPS:
        run.run_step(name, settings, out)
    assert run.summary(out) is True, (out / "summary.md").read_text()
    text = (out / "summary.md").read_text()
    for name in run.STEPS:
        told = json.loads((out / f"{name}.json").read_text())
        assert told["done"] and told["checks"], name
        assert all(check["passed"] is None for check in told["checks"])
        assert f"## {name}" in text
        if name != "compare":  # without weights there is nothing to measure
            assert (out / f"{name}.jsonl").read_text().count("\n") >= 1, name
    assert "not judged" in text and "Not run" not in text
    parity = [json.loads(line) for line in (out / "parity.jsonl").read_text().splitlines()]
    assert all(record["relative"] == 0 for record in parity) and len(parity) > 8


def test_the_command_resumes_and_ends_steps_in_time(
    liveportrait_bundle: Path, source: Path, driving: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def command(*more: str) -> subprocess.CompletedProcess[str]:
        arguments = dry(out, liveportrait_bundle, source, driving, "--only", "engines", *more)
        return subprocess.run(
            [sys.executable, str(FOLDER / "run.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    first = command("--limit", "0.05")
    assert first.returncode == 1 and "not done after 0 s" in first.stderr
    assert "FAILED" in (out / "summary.md").read_text()
    second = command()
    assert second.returncode == 0, second.stderr
    assert second.stdout.strip() == str(out / "summary.md")
    written = (out / "engines.json").stat().st_mtime_ns
    assert "done before" in command().stderr
    assert (out / "engines.json").stat().st_mtime_ns == written
    assert "done before" not in command("--again").stderr
    assert "done before" not in command("--batches", "1").stderr


def test_missed_goals_and_failures_are_judged_on_gpus(run: ModuleType, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    step = run.Step(run.Settings("tensorrt"), seen.append)
    step.check("speed", "1", "2", False)
    step.check("unknown", "-", "2", None)
    assert [c["passed"] for c in step.result.checks] == [False, None]
    told = {
        "step": "engines",
        "done": True,
        "failed": "",
        "settings": {},
        "seconds": 1,
        "checks": step.result.checks,
    }
    run.save(tmp_path, told)
    assert run.summary(tmp_path) is False
    assert "**MISSED**" in (tmp_path / "summary.md").read_text()
    run.save(tmp_path, {**told, "checks": []})
    assert run.summary(tmp_path) is True
    run.save(tmp_path, {"step": "soak", "done": False, "failed": "no memory", "settings": {}, "seconds": 1})
    assert run.summary(tmp_path) is False


def test_a_backend_that_is_not_there_fails_with_its_words(
    run: ModuleType, toy_bundle: Path, tmp_path: Path
) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("TensorRT is installed")
    run.run_step("engines", run.Settings("tensorrt", bundle=str(toy_bundle)), tmp_path)
    told = json.loads((tmp_path / "engines.json").read_text())
    assert told["checks"][0]["passed"] is False and told["checks"][0]["got"] == "0 of 3"
    run.run_step("roofline", run.Settings("tensorrt", bundle=str(toy_bundle)), tmp_path)
    told = json.loads((tmp_path / "roofline.json").read_text())
    assert told["done"] is False and told["failed"]


def test_differences_are_psnr_and_relative(run: ModuleType) -> None:
    one = np.zeros((2, 2), np.uint8)
    two = one.copy()
    assert run.difference(one, two) == (None, 0.0)
    psnr, worst = run.difference(one + 100, one + 101)
    assert psnr == pytest.approx(48.13, abs=0.01) and worst == pytest.approx(0.01)
    psnr, worst = run.difference(np.array([0.0, 2.0]), np.array([0.0, 1.0]))
    assert psnr == pytest.approx(10 * np.log10(4 / 0.5), abs=0.01) and worst == 0.5


def judged(run: ModuleType, step: str, **settings: Any) -> list[tuple[str, bool | None]]:
    """What the checks of a step got on a pretended GPU, and whether that is enough."""
    made = run.Step(run.Settings("tensorrt", **settings), lambda record: None)
    run.STEPS[step].body(made)
    return [(check["got"], check["passed"]) for check in made.result.checks]


def test_parity_is_judged_against_fp32_alone(
    run: ModuleType, liveportrait_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.Settings, "config", BackendConfig("cpu", threads=1))
    assert judged(run, "parity", bundle=str(liveportrait_bundle)) == [("equal", True)]
    manifest = liveportrait_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fp32"', '"fp16"'))
    ((got, passed),) = judged(run, "parity", bundle=str(liveportrait_bundle))
    assert "a reference in fp16" in got and passed is None


def test_results_that_are_no_numbers_fail(run: ModuleType) -> None:
    assert list(run.finite("net", {"y": np.ones(2, np.float16)})) == ["y"]
    with pytest.raises(run.EngineError, match="net: y has values that are not finite"):
        run.finite("net", {"y": np.array([1.0, np.nan])})


def test_the_share_of_the_peak_needs_neither_batch_1_nor_onnx(
    run: ModuleType, liveportrait_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"bench": "networks", "network": "warp_decode", "row_ms": 2.0, "batch": 4, "provenance": {}}
    table = run.Table("Networks", [])
    monkeypatch.setattr(run, "bench_networks", lambda *_, **__: iter([record]))
    monkeypatch.setattr(run, "networks_table", lambda records: table)
    monkeypatch.setattr(run, "counter", lambda: None)
    monkeypatch.setattr(run, "measure_peaks", lambda *_, **__: Peaks({"float16": 1e15}, None))
    # 1234 GFLOP in 2 ms are 617 TFLOP/s of 1000.
    assert judged(run, "roofline", bundle=str(liveportrait_bundle)) == [("61.7% at batch 4", True)]


def test_a_bundle_of_another_family_is_not_set_against_pytorch(run: ModuleType, toy_bundle: Path) -> None:
    ((got, passed),) = judged(run, "compare", bundle=str(toy_bundle), weights="W")
    assert "the bundle is of the family mesh" in got and passed is None


def test_the_default_clip_reaches_the_frames_of_the_pipeline(run: ModuleType, tmp_path: Path) -> None:
    _, driver = default_inputs(tmp_path, "x.png", None)
    settings = run.Settings("cpu")
    assert settings.warmup < settings.clip <= (probe(Path(driver)).frames or 0)
    assert settings.clip % max(settings.batches) == settings.warmup % max(settings.batches) == 0


def test_the_pipeline_is_judged_at_the_batch_that_it_found(
    run: ModuleType, liveportrait_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    shares = {None: 0.5, 1: 0.4, 4: 0.1}  # a run that tunes draws most frames in other sizes

    def bench(**given: Any) -> Any:
        for place in given["pixels"]:
            for batch in given["batch_sizes"]:
                asked.append((place, batch))
                outside = shares[batch]
                yield {
                    "bench": "pipeline", "pixels": place, "batch": batch or "auto", "batch_size": batch or found,
                    "outside": outside, "device_busy": 1 - outside, "gpu": seen,
                }  # fmt: skip

    monkeypatch.setattr(run, "bench_pipeline", bench)
    monkeypatch.setattr(run, "pipeline_table", lambda records: [])
    found: int | None = 4
    seen: dict[str, float] | None = None
    assert judged(run, "pipeline") == [("10.0%", True), ("90.0%", True)]
    assert asked[-1] == ("auto", 4) and len(asked) == 5
    seen = {"utilization.gpu": 95.0}
    assert judged(run, "pipeline")[1] == ("95.0% (networks 90.0%, nvidia-smi 95.0%)", True)
    seen, asked[:] = None, []
    found = 1
    assert [passed for _, passed in judged(run, "pipeline")] == [False, False]
    assert len(asked) == 4
    found = None
    assert [passed for _, passed in judged(run, "pipeline")] == [None, None]


def test_memory_that_was_not_seen_is_not_level(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    level = {"host_mib": True, "device_mib": None}
    last = {"frames": 100, "growth": {"device_mib": None}, "level": level, "passed": True}
    monkeypatch.setattr(run, "bench_soak", lambda **_: iter([last]))
    monkeypatch.setattr(run, "soak_table", lambda records: run.Table("Soak", []))
    assert [passed for _, passed in judged(run, "soak")] == [None]
    last["passed"] = False
    assert [passed for _, passed in judged(run, "soak")] == [False]
    last["passed"] = level["device_mib"] = True
    assert [passed for _, passed in judged(run, "soak")] == [True]


def test_a_bundle_that_changed_is_measured_again(
    run: ModuleType, liveportrait_bundle: Path, tmp_path: Path
) -> None:
    settings = run.Settings("cpu", bundle=str(liveportrait_bundle))
    before = run.plain(settings)
    assert run.plain(settings) == before
    run.save(tmp_path, {"step": "soak", "done": True, "failed": "", "settings": before, "seconds": 1})
    manifest = json.loads((liveportrait_bundle / "manifest.json").read_text())
    manifest["networks"]["warp_decode"]["sha256"] = "0" * 64
    (liveportrait_bundle / "manifest.json").write_text(json.dumps(manifest))
    after = run.plain(settings)
    assert after != before
    run.summary(tmp_path)
    assert "same settings" not in (tmp_path / "summary.md").read_text()
    run.save(tmp_path, {"step": "engines", "done": True, "failed": "", "settings": after, "seconds": 1})
    run.summary(tmp_path)
    assert "not all run with the same settings or bundles" in (tmp_path / "summary.md").read_text()


def test_another_interpreter_is_a_side(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch_side.py").write_text(
        "import sys\nassert sys.argv[1:] == ['W', 'eager', 'n', '2', '0', 'cpu'], sys.argv\n"
        "print(0.0, flush=True)\nfor _ in sys.stdin: print(0.25, flush=True)\n"
    )
    monkeypatch.setattr(run, "HERE", tmp_path)
    settings = run.Settings("cpu", weights="W", torch_python=sys.executable)
    with run.in_process(settings, "eager", "n", 2) as call:
        assert [call(), call()] == [0.25, 0.25]
    (tmp_path / "torch_side.py").write_text("raise SystemExit(3)")
    with (
        pytest.raises(run.BackendUnavailable, match="without an answer"),
        run.in_process(settings, "eager", "n", 2),
    ):
        pass


def test_steps_are_listed(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(run.STEPS)
    assert sum(1 for task in run.STEPS.values() if not 0 < task.limit < 600) == 0
    assert run.main(["--out", "x", "--batches", "one"]) == 2


# -- pack.py and unpack.sh ----------------------------------------------------------------------------------------

needs_xz = pytest.mark.skipif(
    os.name != "posix" or not all(map(shutil.which, ("xz", "git", "sha256sum", "tar"))),
    reason="xz, git or sha256sum is missing",
)


def unpack(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(FOLDER / "unpack.sh"), str(target), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def pieces(pack: ModuleType, tmp_path: Path) -> Path:
    root, out = tmp_path / "root", tmp_path / "out" / "name"
    (root / "project" / "lp_edge").mkdir(parents=True)
    (root / "project" / "lp_edge" / "noise").write_bytes(np.random.default_rng(0).bytes(25_000))
    (root / "project" / "lp_edge" / "run").write_text("#!/bin/sh\n")
    (root / "project" / "lp_edge" / "run").chmod(0o755)
    sums = pack.pieces_of(root, out, "name", 10_000, 1)
    assert [size for _, size, _ in sums][:2] == [10_000, 10_000] and len(sums) == 3
    assert all(path.stat().st_size <= 10_000 for path in out.glob("name.tar.xz.*"))
    return out


@needs_xz
def test_pieces_are_joined_again(pack: ModuleType, tmp_path: Path) -> None:
    out, target = pieces(pack, tmp_path), tmp_path / "target"
    done = unpack(out, target)
    assert done.returncode == 0, done.stderr
    noise = (target / "project" / "lp_edge" / "noise").read_bytes()
    assert noise == np.random.default_rng(0).bytes(25_000)
    assert os.access(target / "project" / "lp_edge" / "run", os.X_OK)
    shown = subprocess.run(
        ["sh", "-c", f". {target}/env-tensorrt85.sh; echo $PYTHON $LD_LIBRARY_PATH"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert str(target / "tensorrt85" / "python") in shown and shown.rstrip().endswith("stand_ins")


@needs_xz
@pytest.mark.parametrize("how", ["altered", "missing"])
def test_damaged_pieces_are_refused(pack: ModuleType, tmp_path: Path, how: str) -> None:
    out, target = pieces(pack, tmp_path), tmp_path / "target"
    piece = out / "name.tar.xz.001"
    if how == "missing":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[:-1] + b"!")
    done = unpack(out, target)
    assert done.returncode == 5 and "copy it again" in done.stderr
    assert not (target / "project").exists()


def test_unpacking_says_how_it_is_called() -> None:
    done = subprocess.run(["sh", str(FOLDER / "unpack.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected TARGET" in done.stderr


@pytest.mark.parametrize("option", ["--bundle", "--include"])
def test_what_is_not_there_cannot_be_packed(
    pack: ModuleType, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        pack.main(["--out", str(tmp_path / "packs"), option, str(tmp_path / "nosuch"), "project"])
    assert stop.value.code == 2
    assert f"{option} {tmp_path / 'nosuch'}: there is no such" in capsys.readouterr().err
    assert not (tmp_path / "packs").exists()


@needs_xz
def test_the_project_runs_from_where_it_was_unpacked(
    pack: ModuleType, liveportrait_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (FOLDER.parent.parent / ".git").exists():
        pytest.skip("no repository")
    write_image(tmp_path / "extra.png", face(100))
    pack.main(
        ["--out", str(tmp_path / "packs"), "--bundle", str(liveportrait_bundle), "--include", str(tmp_path / "extra.png"), "--preset", "0", "project"]
    )  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["set"] == "project" and told["bytes"] > 1e6
    target = tmp_path / "there"
    assert unpack(Path(told["folder"]), target).returncode == 0
    assert (target / "files" / "extra.png").is_file()
    script = f". {target}/env.sh; PYTHON={sys.executable}; cd /; $PYTHON $LP_EDGE/benchmarks/gpu/run.py --out {tmp_path}/figures --backend cpu --bundle {target}/bundles/{liveportrait_bundle.name} --batches 1 --only engines"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    engines = json.loads((tmp_path / "figures" / "engines.json").read_text())
    assert engines["checks"][0]["got"] == "8 of 8"


@pytest.mark.skipif(not all(map(shutil.which, ("gcc", "nm"))), reason="gcc or nm is missing")
def test_stand_ins_have_the_functions_that_a_library_wants(pack: ModuleType, tmp_path: Path) -> None:
    """A library that wants two versions of foreign functions loads with the stand-ins, and not without."""
    (tmp_path / "libs").mkdir()
    for name, function in (("libcublas.so.11", "cublasCreate_v2"), ("libcudnn.so.8", "cudnnCreate")):
        (tmp_path / "code.c").write_text(f"int {function}(void) {{ return 0; }}")
        (tmp_path / "v").write_text(f"{name} {{ global: {function}; local: *; }};")
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", f"-Wl,--version-script={tmp_path}/v", tmp_path / "code.c", "-o", tmp_path / "libs" / name],
            check=True,
        )  # fmt: skip
    (tmp_path / "code.c").write_text(
        "int cublasCreate_v2(void); int cudnnCreate(void); int both(void) { return 10 * cublasCreate_v2() + cudnnCreate(); }"
    )
    plugin = tmp_path / "libplugin.so"
    subprocess.run(
        [
            "gcc",
            "-shared",
            "-fPIC",
            "-Wl,-z,now",
            tmp_path / "code.c",
            "-o",
            plugin,
            *(tmp_path / "libs").iterdir(),
        ],
        check=True,
    )
    pack.stand_ins(plugin, tmp_path / "stand_ins")
    call = [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(plugin)!r}).both())"]
    without = subprocess.run(
        call, capture_output=True, text=True, check=False, env={**os.environ, "LD_LIBRARY_PATH": ""}
    )
    assert without.returncode != 0
    found = subprocess.run(
        call,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path / "stand_ins")},
    )
    assert found.stdout.strip() == "11", found.stderr


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("python/lib/python3.10/test/x.py", True),
        ("python/lib/libpython3.10.a", True),
        ("site/numpy/core/tests/a.py", True),
        ("site/numpy/testing/__init__.py", False),
        ("site/tensorrt/libnvinfer.so.8", False),
        ("python/lib/python3.10/lib-dynload/_ctypes.so", False),
        ("python/lib/python3.10/config-3.10-x86_64-linux-gnu/config.c", True),
        ("site/cv2/config-3.py", False),
    ],
)
def test_what_is_left_out(pack: ModuleType, path: str, out: bool) -> None:
    assert bool(pack.LEFT_OUT.search(path)) is out
