"""The commands of lp-bench that print tables, on the toy networks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lp_edge import cli
from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import EngineError
from lp_edge.runtime import doctor, roofline
from lp_edge.runtime.bench_compare import runner_side
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_write import open_writer

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs lp-bench in a folder of its own: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.bench.main([str(a) for a in args], prog_name="lp-bench")
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return run


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, ...]:
    """Options with a picture and a clip of "faces" for the toys."""

    def face(x: int) -> np.ndarray:
        out = np.zeros((200, 240, 3), np.uint8)
        out[60:140, x - 40 : x + 40] = 255
        return out

    write_image(tmp_path / "face.png", face(100))
    with open_writer(tmp_path / "drive.mp4", (240, 200), Fraction(25)) as writer:
        for x in range(100, 112):
            writer.write(face(x))
    return ("-s", "face.png", "-d", "drive.mp4")


def toy(folder: Path) -> tuple[str, ...]:
    return ("--bundle", str(folder), "--backend", "cpu", "--threads", "1")


def records(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_networks_in_a_table_a_file_and_markdown(
    bench: Call, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")
    small = roofline.Probe("copy", "float32", (1, 1, 64, 64))
    monkeypatch.setattr(roofline.measure_peaks, "__kwdefaults__", {"seconds": 0.01, "enough": 0.0, "choose": lambda k, d: (small,) if k == "copy" else (roofline.Probe(k, d, (8, 8) if k == "matmul" else (1, 4, 8, 8)),)})  # fmt: skip
    code, out, err = bench(
        *("networks", *toy(toy_bundle), "--network", "face_mesh", "--batch", "1,3", "--seconds", 0.02),
        *("--json", "n.jsonl", "--markdown", "n.md"),
    )
    assert (code, err) == (0, "")
    assert "face_mesh" in out and "of roofline %" in out and "Peaks, measured" in out
    rows = records("n.jsonl")
    assert [r.get("batch") for r in rows] == [None, 1, 3]
    assert rows[1]["gflop"] > 0 and rows[0]["gbs"] > 0
    assert rows[1]["provenance"]["config"]["threads"] == 1
    assert Path("n.md").read_text().startswith("### Networks\n\n| network | batch |")


def test_without_onnx_the_columns_are_left_out(
    bench: Call, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "lp_edge.export.cost", raising=False)
    code, out, _ = bench(
        "networks", *toy(toy_bundle), "--network", "face_mesh", "--batch", 1, "--seconds", 0.01
    )
    assert code == 0
    assert "GFLOP" not in out and "lp-edge[export]" in out
    code, out, err = bench("jetson", "--bundle", toy_bundle)
    assert (code, out) == (7, "")
    assert (
        "counting FLOPs and bytes: lp-bench needs the package onnx" in err
        and 'pip install "lp-edge[export]"' in err
    )


def test_lines_may_go_to_standard_output(bench: Call, toy_bundle: Path) -> None:
    code, out, _ = bench(
        *("compare", *toy(toy_bundle), "--b", "cpu", "--network", "face_mesh", "--rounds", 2, "--warmup", 0),
        *("--json", "-"),
    )
    assert code == 0
    (record,) = [json.loads(line) for line in out.splitlines()]
    assert record["bench"] == "compare" and record["low"] <= record["ratio"] <= record["high"]


def test_pipeline_with_both_places_and_batches(
    bench: Call, toy_bundle: Path, inputs: tuple[str, ...]
) -> None:
    code, out, err = bench(
        *("pipeline", *inputs, *toy(toy_bundle), "--warmup", 3, "--batch", "auto,2", "--pixels", "host"),
        *("--json", "p.jsonl"),
    )
    assert (code, err) == (0, "")
    assert "Stages" in out and "frames/s" in out
    wholes = [r for r in records("p.jsonl") if r["bench"] == "pipeline"]
    assert [(r["pixels"], r["batch"], r["frames"]) for r in wholes] == [("host", "auto", 9), ("host", 2, 9)]


def test_compare_names_its_sides(bench: Call, toy_bundle: Path, liveportrait_bundle: Path) -> None:
    code, out, _ = bench(
        *(
            "compare",
            "--a",
            f"cpu:{toy_bundle}",
            "--b",
            f"cpu:{liveportrait_bundle}",
            "--network",
            "face_mesh",
        ),
        *("--rounds", 2, "--warmup", 0, "--threads", 1),
    )
    assert code == 0 and "cpu toy_bundle" in out and "cpu liveportrait_bundle" in out


def test_a_bundle_of_another_family_is_not_compared_with_pytorch(
    bench: Call, toy_bundle: Path, liveportrait_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runner_side(liveportrait_bundle, BackendConfig("cpu", threads=1), "torch eager")
    side = replace(whole, networks=("warp_decode", "stitching"))
    exporter = SimpleNamespace(open_torch_side=lambda *_, **__: side)
    monkeypatch.setattr(cli, "_exporter", lambda *_: exporter)
    words = ("--b", "torch-eager", "--weights", tmp_path, "--rounds", 2, "--warmup", 0)
    code, out, err = bench("compare", *toy(toy_bundle), *words)
    assert (code, out) == (2, ""), err
    assert "of the family mesh, torch eager of the family liveportrait" in err
    assert "lp-export --family liveportrait" in err
    code, out, err = bench("compare", *toy(liveportrait_bundle), *words, "--network", "stitching")
    assert (code, err) == (0, "") and "torch eager" in out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--network", "nosuch"), 2),
        (("--network", "face_mesh", "--batch", "0"), 2),
        (("--markdown", "no/such.md"), 8),
    ],
    ids=str,
)
def test_a_run_that_is_refused_leaves_the_files(
    bench: Call, toy_bundle: Path, args: tuple[str, ...], code: int
) -> None:
    Path("keep.jsonl").write_text("old\n")
    got, _, err = bench("networks", *toy(toy_bundle), "--json", "keep.jsonl", *args)
    assert got == code and "until then" not in err
    assert Path("keep.jsonl").read_text() == "old\n" and not Path("keep.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("end", "code"), [(KeyboardInterrupt(), 130), (EngineError("broken", "", ""), 6)], ids=["stop", "failure"]
)
def test_a_run_that_ends_early_says_where_its_records_are(
    end: BaseException, code: int, bench: Call, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[dict[str, Any]] = []

    def measured(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield from before
        raise end

    monkeypatch.setattr("lp_edge.runtime.bench_networks.bench_networks", measured)
    Path("n.jsonl").write_text("old\n")
    got, _, err = bench("networks", *toy(toy_bundle), "--json", "n.jsonl", "--markdown", "n.md")
    assert got == code and "until then" not in err
    assert sorted(f.name for f in Path().iterdir() if f.is_file()) == ["n.jsonl"]
    before += [{"a": 1}, {"a": 2}]
    got, _, err = bench("networks", *toy(toy_bundle), "--json", "n.jsonl", "--markdown", "n.md")
    assert got == code and "nothing was written" not in err
    assert f"2 records measured until then: in {Path('n.jsonl.partial').resolve()}" in err
    assert Path("n.jsonl").read_text() == "old\n" and records("n.jsonl.partial") == before
    got, out, err = bench("networks", *toy(toy_bundle), "--json", "-")
    assert got == code and "2 records measured until then: on standard output" in err
    assert out.count("\n") == 2 and "nothing was written" not in err


def test_soak_passes_or_exits_with_1(
    bench: Call, toy_bundle: Path, inputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lp_edge.runtime import bench_soak

    states = iter(range(1000))
    monkeypatch.setattr(
        bench_soak,
        "_state",
        lambda cuda: {
            "host_mib": 100.0,
            "device_mib": None,
            "threads": 2,
            "descriptors": 9 + next(states) // 10,
        },
    )
    given = ("soak", *inputs, *toy(toy_bundle), "--frames", 20, "--samples", 10)
    code, out, _ = bench(*given)
    assert code == 0 and "Level." in out
    assert "memory of the process +0 MiB, memory of the GPU not known, threads +0, open files" in out
    code, out, _ = bench(*given[:-1], 20)
    assert code == 1 and "NOT level" in out


def test_jetson_is_an_estimate_and_says_so(bench: Call, toy_bundle: Path) -> None:
    pytest.importorskip("onnx", reason="the export extra (onnx) is not installed")
    code, out, _ = bench("jetson", "--bundle", toy_bundle, "--estimate", "--json", "j.jsonl")
    assert code == 0
    assert "ESTIMATE" in out and "Orin Nano" in out
    assert all(r["estimate"] is True for r in records("j.jsonl"))


def test_on_a_jetson_it_is_measured(bench: Call, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.examine_machine()
    board = type(real)(**{**vars(real), "jetson": "Orin, R36"})
    monkeypatch.setattr(doctor, "examine_machine", lambda: board)
    monkeypatch.setattr(cli, "_counter", lambda needed: None)
    code, out, _ = bench("jetson", *toy(toy_bundle), "--seconds", 0.01)
    assert code == 0 and "ESTIMATE" not in out and "warp_decode" in out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("networks", "--batch", "1,x"), 2, "no list of whole numbers"),
        (("networks", "--batch", "0,2"), 2, "--batch 0,2; expected 1 to 256"),
        (("networks", "--seconds", "0"), 2, "--seconds 0; expected more than 0"),
        (("networks", "--markdown", "-"), 2, "'--markdown': a file is expected"),
        (("networks", "--network", "magic"), 2, "no network magic"),
        (("pipeline", "--batch", "fast"), 2, "whole numbers or auto"),
        (("compare", "--b", "torch-eager"), 2, "without --weights"),
        (("compare", "--b", "magic"), 2, "unknown backend"),
        (("soak", "--frames", "3"), 2, "--frames 3; expected 20"),
        (("soak", "--samples", "1"), 2, "--samples 1; expected 10 to 10000"),
        (("networks", "--json", "no/such/file"), 8, "does not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(
    bench: Call, toy_bundle: Path, args: tuple[str, ...], code: int, words: str
) -> None:
    got, out, err = bench(*args, *toy(toy_bundle))
    assert (got, out) == (code, "")
    assert words in err
