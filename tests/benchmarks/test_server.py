"""The instrument for the server's figures: its arithmetic, and a short run of each command on the toy networks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import lp_edge
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_write import open_writer

for package in ("grpc", "grpc_health", "grpc_reflection", "prometheus_client"):
    pytest.importorskip(package)

FOLDER = Path(lp_edge.__file__).resolve().parent / "benchmarks"

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="no source tree: benchmarks are not installed"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import _server_figures

    return _server_figures


# -- arithmetic --------------------------------------------------------------------------------------------


def test_everybody_has_every_turn_equally_often(figures: ModuleType) -> None:
    names = ["a", "b", "c"]
    rounds = [figures.order(names, turn) for turn in range(6)]
    for place in range(3):
        assert sorted(r[place] for r in rounds) == ["a", "a", "b", "b", "c", "c"]
    assert rounds[1] == rounds[0][::-1]


def test_ratios_are_taken_within_a_round(figures: ModuleType) -> None:
    """A machine that turns slow in the middle does not change the ratio."""
    found = figures.paired([10.0, 1.0, 12.0], [20.0, 2.0, 20.0])
    assert found == {"ratio": 0.5, "ratio_min": 0.5, "ratio_max": 0.6}
    with pytest.raises(ValueError):
        figures.paired([1.0], [1.0, 2.0])


def test_rate_leaves_the_warm_up_out(figures: ModuleType) -> None:
    assert figures.rate([5.0, 6.0, 6.5, 7.0], 2) == 2.0
    for warmup in (0, 4):
        with pytest.raises(ValueError, match="to warm up"):
            figures.rate([5.0, 6.0, 6.5, 7.0], warmup)


def test_times_are_milliseconds(figures: ModuleType) -> None:
    found = figures.times([i / 1000 for i in range(1, 102)])
    assert (found["count"], found["p50_ms"], found["p99_ms"], found["max_ms"]) == (101, 51.0, 100.0, 101.0)


def trip() -> dict[str, Any]:
    """30 ms on the wire; in the server 1 ms until `decode`, 2 ms before `encode`, 1 ms after it."""
    stages = [
        ("queue", 0.0, 0.001),
        ("decode", 0.002, 0.002),
        ("track", 0.004, 0.005),
        ("warp", 0.009, 0.010),
        ("paste_back", 0.019, 0.001),
        ("encode", 0.022, 0.003),
    ]
    return {"client_encode": 0.004, "wire": 0.030, "client_decode": 0.002, "total": 0.026, "stages": stages}


def test_the_parts_of_a_trip_add_up(figures: ModuleType) -> None:
    parts = figures.parts_of(trip())
    expected = {
        "client_encode": 4, "transport": 4, "queue": 1, "decode": 2, "encode": 3, "rest": 4, "client_decode": 2,
        "compute": 16, "added": 20, "round_trip": 36,
    }  # fmt: skip
    assert {key: round(1e3 * value, 6) for key, value in parts.items()} == expected
    assert math.isclose(sum(parts[part] for part in figures.PARTS), parts["added"])
    gaps = {key: round(1e3 * value, 6) for key, value in figures.gaps_of(trip()).items()}
    assert gaps == {"queue": 0, "decode": 1, "track": 0, "warp": 0, "paste_back": 0, "encode": 2, "end": 1}
    assert sum(gaps.values()) == expected["rest"]


def test_slope_is_not_turned_by_an_outlier(figures: ModuleType) -> None:
    at = [float(i) for i in range(1000)]
    values = [100 + 0.5 * x for x in at]
    values[500] = 1e6
    assert figures.slope(at, values) == pytest.approx(0.5)
    assert figures.slope([1.0, 1.0], [3.0, 4.0]) == figures.slope([], []) == 0.0


def level(figures: ModuleType, at: float = 0.0, rss: float = 100.0, **more: Any) -> Any:
    return figures.Level(
        **{"at": at, "rss_mib": rss, "threads": 9, "fds": 20, "shm": 0, "shm_open": 0, "cpu_s": 0.0, **more}
    )


def test_a_warm_up_is_no_leak_and_a_leak_is_one(figures: ModuleType) -> None:
    flat = [level(figures, at, 100 + min(at, 3.0)) for at in range(100)]
    found = figures.growth(level(figures), level(figures, rss=103.0), flat)
    assert found["rss_growth"] == 0.03
    assert found["rss_slope_kib"] == 0.0
    assert found["rss_peak_mib"] == 103.0
    assert all(c["pass"] for c in figures.returned("x", found, 0.05))
    leak = [level(figures, at, 100 + 0.25 * at) for at in range(100)]
    found = figures.growth(level(figures), level(figures, rss=125.0), leak)
    assert found["rss_slope_kib"] == 256.0
    failed = [c["figure"] for c in figures.returned("x", found, 0.05) if not c["pass"]]
    assert failed == ["x: growth of resident memory"]


@pytest.mark.parametrize("what", ["threads", "fds", "shm_open", "shm"])
def test_one_more_of_anything_is_a_leak(figures: ModuleType, what: str) -> None:
    after = level(figures, **{what: getattr(level(figures), what) + 1})
    found = figures.growth(level(figures), after, [level(figures)])
    assert sum(not c["pass"] for c in figures.returned("x", found, 0.05)) == 1


def test_middle_takes_each_median(figures: ModuleType) -> None:
    three = [level(figures, rss=r, fds=f) for r, f in ((1.0, 30), (2.0, 20), (9.0, 22))]
    assert (figures.middle(three).rss_mib, figures.middle(three).fds) == (2.0, 22)


def test_verdicts_include_their_limit(figures: ModuleType) -> None:
    assert figures.check("x", 0.9, ">=", 0.9)["pass"] is True
    assert figures.check("x", 0.8999, ">=", 0.9)["pass"] is False
    assert figures.check("x", 5.0, "<=", 5.0) == {
        "record": "check", "figure": "x", "value": 5.0, "limit": "<= 5", "pass": True,
    }  # fmt: skip
    for value in (float("nan"), float("inf")):
        found = figures.check("x", value, "<=", 1.0)
        assert found["pass"] is False
        assert found["value"] is None


def test_a_stream_that_starves_is_infinitely_unfair(figures: ModuleType) -> None:
    assert figures.fairness([10, 13]) == 1.3
    assert figures.fairness([10, 0]) == math.inf


@pytest.mark.parametrize(
    ("sequences", "last", "lost"),
    [([1, 2, 3], 3, 0), ([1, 3], 3, 1), ([1, 2, 2, 3], 3, 1), ([2, 1, 3], 3, 1), ([], 2, 2), ([1, 2], 3, 1)],
)
def test_missing_counts_gaps_doubles_and_disorder(
    figures: ModuleType, sequences: list[int], last: int, lost: int
) -> None:
    assert figures.missing(sequences, last) == lost


def test_usage_tells_us_from_others(figures: ModuleType) -> None:
    import _server_process

    usage = _server_process.Usage({})
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    spent = usage.take()
    assert spent["instrument"] >= 0.08
    assert spent["wall"] >= 0.1
    assert spent["others"] >= 0.0
    assert usage.take()["instrument"] < 0.08  # only what came since


# -- the commands ------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(toy_bundle: Path, tmp_path: Path) -> list[str]:
    """A toy face and a clip of it that moves."""

    def picture(x: int) -> np.ndarray:
        rgb = np.zeros((200, 200, 3), np.uint8)
        rgb[60:140, x - 40 : x + 40] = 255
        return rgb

    write_image(tmp_path / "face.png", picture(100))
    with open_writer(tmp_path / "d.mp4", (200, 200), Fraction(25)) as writer:
        for i in range(8):
            writer.write(picture(96 + i))
    return [
        "--source", str(tmp_path / "face.png"), "--driving", str(tmp_path / "d.mp4"), "--bundle", str(toy_bundle),
        "--size", "160", "--via", "raw",
    ]  # fmt: skip


def run(command: str, *args: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Records and, by their names, checks. Whether figures are kept is not for toy networks to say."""
    line = [sys.executable, str(FOLDER / "server.py"), command, "--quick", *args]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    records = [json.loads(text) for text in done.stdout.splitlines()]
    checks = {r["figure"]: r for r in records if r["record"] == "check"}
    assert done.returncode == int(not all(c["pass"] for c in checks.values()))
    assert len(done.stderr.splitlines()) >= len(checks) > 0
    for record in records:
        assert record["benchmark"] == "server"
        assert record["provenance"]["bundle"]["variant"] == "toy"
        assert record["inputs"]["source"] == "face.png"
    return records, checks


def test_single_compares_the_same_work(inputs: list[str]) -> None:
    records, checks = run("single", *inputs)
    rates = {r["side"]: r for r in records if r["record"] == "throughput"}
    assert list(rates) == ["in process, JPEG", "in process, arrays", "raw, jpeg", "raw, shm"]
    assert all(r["fps"] > 0 and len(r["rounds"]) == 1 for r in rates.values())
    for ratio in (r for r in records if r["record"] == "ratio"):
        expected = rates[ratio["side"]]["fps"] / rates[ratio["to"]]["fps"]
        assert ratio["ratio"] == pytest.approx(expected, rel=0.01)
        assert ratio["max_abs_difference"] in (
            None,
            0,
        )  # pixels through shared memory equal those drawn in process
    trips = {r["side"]: r for r in records if r["record"] == "latency"}
    assert list(trips) == ["raw, shm", "raw, jpeg"]
    for found in trips.values():
        parts = sum(part["mean_ms"] for part in found["parts"].values())
        assert found["added"]["count"] == 20
        assert parts == pytest.approx(found["added"]["mean_ms"], abs=0.02)
        assert found["added"]["mean_ms"] + found["compute"]["mean_ms"] == pytest.approx(
            found["round_trip"]["mean_ms"], abs=0.02
        )
        assert set(found["stages"]) == {
            "queue",
            "decode",
            "track",
            "motion",
            "compose",
            "warp",
            "paste_back",
            "encode",
        }
    assert (
        trips["raw, jpeg"]["parts"]["client_encode"]["p50_ms"]
        > trips["raw, shm"]["parts"]["client_encode"]["p50_ms"]
    )
    assert checks["added latency p99 in ms, raw, shm"]["limit"] == "<= 5"


def test_concurrent_counts_every_stream(inputs: list[str]) -> None:
    records, checks = run("concurrent", *inputs, "--rate", "20", "--driver", "motion")
    rows = {(r["load"], r["streams"]): r for r in records if r["record"] == "concurrent"}
    assert [streams for _, streams in rows] == [1, 2, 1, 2]
    for (load, streams), row in rows.items():
        (found,) = row["rounds"]
        assert len(found["frames"]) == streams
        assert min(found["frames"]) > 0
        assert found["fps"] == pytest.approx(sum(found["frames"]))
        assert found["latency"]["count"] == sum(found["frames"])
        assert set(found["batches"]) == {"warp_decode"}  # motion needs no other network
        assert found["batches"]["warp_decode"]["rows_mean"] >= 1
        if load.startswith("camera"):
            assert 0 < found["sent"] <= 28 * streams  # those of the warm-up may be late
    assert "most / fewest frames of 2 streams, motion, two on the way" in checks


def test_soak_looks_at_the_server_before_during_and_after(inputs: list[str]) -> None:
    records, checks = run("soak", *inputs)
    works = {r["work"]: r for r in records if r["record"] == "soak"}
    assert list(works) == ["40 frames, jpeg", "40 frames, shm", "4 cycles"]
    for name, found in works.items():
        assert found["before"]["rss_mib"] > 30
        assert found["after"]["cpu_s"] > found["before"]["cpu_s"]
        assert checks[f"{name}: names in /dev/shm"]["pass"]
        assert checks[f"{name}: more segments open than before"]["pass"]
    assert checks["40 frames, shm: answers missing"]["value"] == 0


def test_kill_counts_what_the_others_lose(inputs: list[str]) -> None:
    records, checks = run("kill", *inputs)
    (clients,) = (r for r in records if r["record"] == "kill_client")
    assert set(clients["noticed"]) == {"jpeg", "shm", "jpeg lossless", "unmapped"}
    assert clients["other"]["sent"] == clients["other"]["answers"] > 0
    assert checks["4 clients killed: frames that another stream lost"]["pass"]
    assert checks["4 clients killed: names in /dev/shm"]["pass"]
    (server,) = (r for r in records if r["record"] == "kill_server")
    assert server["without_reconnect"] == "UNAVAILABLE"
    assert server["reconnects"] >= 1
    assert server["answers"] == server["sent"]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    def refused(*args: object) -> str:
        line = [sys.executable, str(FOLDER / "server.py"), *map(str, args)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode != 0
        assert not done.stdout
        return done.stderr

    assert "--rounds" in refused("single", "--rounds", 0)
    assert "--levels" in refused("concurrent", "--levels", "1,1")
    assert "--levels" in refused("concurrent", "--levels", "1,17")
    assert "no.mp4" in refused("single", "--driving", tmp_path / "no.mp4")
