"""A short fuzzing campaign against a real server, and the fuzzer's own checks; fuzz/run.py makes longer ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("grpc")

import grpc

from lp_edge.proto.v1 import common_pb2
from lp_edge.tests.runtime.server.fuzz.cases import CORPUS, METHODS, Case, regressions, seeds
from lp_edge.tests.runtime.server.fuzz.mutate import mutate
from lp_edge.tests.runtime.server.fuzz.run import BOUND_S, OPTIONS, Campaign, Outcome, judge
from lp_edge.tests.runtime.server.process import ServeProcess

Code = grpc.StatusCode
COUNT, SEED = 2000, 20261121


@pytest.mark.timeout(300)
def test_mutated_calls_get_a_proper_status_and_harm_nothing(
    lp_serve: Callable[..., ServeProcess], tmp_path: Path
) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    server = lp_serve(*OPTIONS, environment={"TMPDIR": str(folder)})
    campaign = Campaign(server, folder, tmp_path / "failed")
    try:
        report = campaign.run(COUNT, SEED)
    finally:
        campaign.close()
    assert not report.failures, "\n".join(f"{name}: {wrong}" for name, wrong in report.failures[:20])
    assert report.sent == COUNT + len(list(regressions()))
    # it reached all methods, what lies behind the first check, and the limits
    for method in METHODS:
        assert report.statuses[f"{method.partition('/')[2]} OK"] > 0
    for seen in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "CANCELLED"):
        assert any(name.endswith(seen) for name in report.statuses), report.statuses


def test_a_campaign_can_be_repeated() -> None:
    valid = seeds(1)
    once = [mutate(3, i, valid) for i in range(300)]
    assert once == [mutate(3, i, valid) for i in range(300)]
    assert once != [mutate(4, i, valid) for i in range(300)]
    assert {case.method for case in once} == set(METHODS)
    assert len({case.messages for case in once}) > 200


def test_calls_survive_their_file(tmp_path: Path) -> None:
    valid = seeds(1)
    for i in range(100):
        case = mutate(5, i, valid)
        assert Case.load(case.dump()) == case


def test_valid_calls_can_be_parsed_and_the_corpus_is_small() -> None:
    assert all(case.parsed() for case in seeds(1))
    found = list(regressions())
    assert len(found) >= 10
    assert {case.method for _, case in found} <= set(METHODS)
    assert sum(path.stat().st_size for path in CORPUS.iterdir()) < 300_000


STREAM = Case("AnimationService/Animate", (b"",))
BROKEN = Case("ServerService/GetServerInfo", (b"\xff",))
DETAIL = common_pb2.ErrorDetail(type="MediaError", got="a picture")


@pytest.mark.parametrize(
    ("case", "outcome", "fine"),
    [
        (STREAM, Outcome(Code.OK), True),
        (STREAM, Outcome(Code.OK, seconds=BOUND_S + 1), False),
        (STREAM, Outcome(Code.INVALID_ARGUMENT, error=DETAIL), True),
        (STREAM, Outcome(Code.INVALID_ARGUMENT), False),
        (STREAM, Outcome(Code.INVALID_ARGUMENT, "/secret/upload: no", DETAIL), False),
        (STREAM, Outcome(Code.INTERNAL, error=DETAIL), False),
        (STREAM, Outcome(Code.UNKNOWN), False),
        (STREAM, Outcome(Code.UNAVAILABLE), False),
        (STREAM, Outcome(Code.DEADLINE_EXCEEDED), False),
        (STREAM, Outcome(Code.DEADLINE_EXCEEDED, error=common_pb2.ErrorDetail(type="DeadlineError")), True),
        (STREAM, Outcome(Code.CANCELLED), False),
        (Case(STREAM.method, (b"",), "cancel"), Outcome(Code.CANCELLED), True),
        (BROKEN, Outcome(Code.UNKNOWN), False),
        (BROKEN, Outcome(Code.INVALID_ARGUMENT, error=DETAIL), True),
    ],
)
def test_the_judge(case: Case, outcome: Outcome, fine: bool) -> None:
    assert (judge(case, outcome, ("/secret",)) is None) is fine
