"""How many frames are drawn at once: the search, and results that do not depend on it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.runner import Array, Runner, WrappedRunner
from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.batch_size import MAX_BATCH_SIZE, BatchTuner, candidates
from lp_edge.runtime.cast import AnimatedFrame, Cast, DrawnFrame, Shot
from lp_edge.runtime.driver import Driver, DriverFrame
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.runtime.templates import MotionTemplate
from lp_edge.tests.runtime.test_liveportrait_family import clip, frame, template


def found(seconds: Mapping[int, float]) -> tuple[int, int]:
    """What the tuner chooses for these times of whole batches, and how many frames it took."""
    tuner, frames = BatchTuner(tuple(seconds)), 0
    while tuner.chosen is None:
        size = tuner.size
        tuner.tell(size, seconds[size])
        frames += size
    return tuner.chosen, frames


def test_the_smallest_size_that_is_about_as_fast_is_chosen() -> None:
    assert found({1: 10, 2: 12, 4: 23.9, 8: 48})[0] == 2  # 10, 6, 5.98, 6 a frame
    assert found({1: 10, 2: 16, 4: 28, 8: 48, 16: 90})[0] == 16
    assert found({1: 10, 2: 22, 4: 24, 8: 48, 16: 99}) == (4, 5 * 31), (
        "one size that is slower does not end the search"
    )
    assert found({1: 10, 2: 21, 4: 44, 8: 8}) == (1, 5 * 7), "two in a row do"
    assert BatchTuner((4,)).chosen == 4


def test_warm_up_and_partial_batches_are_not_counted() -> None:
    tuner = BatchTuner((1, 2))
    for seconds in (0.1, 100.0, 9.0, 1.0, 9.0):
        tuner.tell(1, seconds)
    assert (tuner.size, tuner.per_frame) == (2, {1: 1.0})
    tuner.tell(1, 0.001)  # the end of a clip
    for _ in range(4):
        tuner.tell(2, 1.0)
    assert tuner.chosen is None
    tuner.tell(2, 1.0)
    assert (tuner.chosen, tuner.per_frame) == (2, {1: 1.0, 2: 0.5})


def test_while_others_wait_frames_are_drawn_one_by_one_and_nothing_is_learned() -> None:
    hurried = False
    tuner = BatchTuner((1, 2), hurried=lambda: hurried)
    for _ in range(5):
        tuner.tell(tuner.size, 1.0)
    assert tuner.size == 2
    hurried = True
    assert tuner.size == 1
    for size in (1, 2) * 5:
        tuner.tell(size, 0.001)
    assert tuner.per_frame == {1: 1.0}
    hurried = False
    for _ in range(5):
        tuner.tell(tuner.size, 1.0)
    assert (tuner.chosen, tuner.per_frame) == (2, {1: 1.0, 2: 0.5})
    hurried = True
    assert (tuner.size, tuner.chosen) == (1, 2)


def test_what_an_earlier_animation_found_keeps_within_the_bounds(toy_bundle: Path) -> None:
    with Animator(toy_bundle, backend=BackendConfig("cpu", threads=1)) as animator:
        assert animator.tuner().size == 1
        animator._batch_size = 16
        assert (animator.tuner().size, animator.tuner(most=8).size, animator.tuner(3).size) == (16, 8, 3)
        with pytest.raises(ConfigError, match="batch size 65"):
            animator.tuner(65)


def test_candidates() -> None:
    assert candidates(None, False, None) == (1,)
    assert candidates(None, True, None) == (1, 2, 4, 8, 16)
    assert candidates(None, True, 6) == (1, 2, 4)
    assert candidates(3, False, None) == (3,)
    for size, bound, words in (
        (0, None, "1 to 64"),
        (65, None, "1 to 64"),
        (5, 4, "1 to 4, as its engine"),
        (True, 8, "1 to 8"),
    ):
        with pytest.raises(ConfigError, match=words):
            candidates(size, True, bound)
    assert candidates(MAX_BATCH_SIZE, True, 100) == (MAX_BATCH_SIZE,)


class Counting(WrappedRunner):
    """A runner that notes the rows of each call; ``bound`` rows at most, results kept where asked for."""

    def __init__(self, inner: Runner, calls: list[int], bound: int | None, resident: bool) -> None:
        super().__init__(inner)
        self.calls, self.bound, self._resident = calls, bound, resident

    @property
    def resident(self) -> bool:
        return self._resident

    @property
    def max_batch(self) -> int | None:
        return self.bound

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        rows = feeds[names.KP_DRIVING].shape[0]
        assert self.bound is None or rows <= self.bound
        self.calls.append(rows)
        return self.inner.infer(feeds, outputs)

    _infer_kept = _infer


def open_counting(
    bundle: Path, calls: list[int], bound: int | None = None, *, resident: bool = False, pixels: str = "host"
) -> Animator:
    def wrap(runner: Runner) -> Runner:
        return Counting(runner, calls, bound, resident) if runner.name == names.WARP_DECODE else runner

    return Animator(bundle, backend=BackendConfig("cpu", threads=1, pixels=pixels), wrap=wrap)


def shifts(count: int, family: str) -> MotionTemplate:
    return template([(0.01 * i, 0.004 * i) for i in range(count)], family)


FAMILIES = [("toy_bundle", "mesh"), ("liveportrait_bundle", "liveportrait")]


@pytest.mark.parametrize(("bundle", "family"), FAMILIES)
@pytest.mark.parametrize("paste_back", [True, False])
@pytest.mark.parametrize("pixels", ["host", "device"])
def test_results_do_not_depend_on_the_batch(
    bundle: str, family: str, paste_back: bool, pixels: str, request: pytest.FixtureRequest
) -> None:
    options = AnimateOptions(paste_back=paste_back)
    shown: list[list[np.ndarray]] = []
    for size, want in ((1, [1] * 7), (3, [3, 3, 1]), (7, [4, 3])):
        calls: list[int] = []
        with open_counting(request.getfixturevalue(bundle), calls, 4, pixels=pixels) as animator:
            if size > 4:
                with pytest.raises(ConfigError, match="1 to 4, as its engine"):
                    animator.animate(frame(), shifts(7, family), options, batch_size=size)
                continue
            animation = animator.animate(frame(), shifts(7, family), options, batch_size=size)
            shown.append([f.rgb for f in animation])
        assert calls == want
    assert len(shown[0]) == 7
    assert all((a == b).all() for a, b in zip(*shown, strict=True))
    assert any((a != shown[0][0]).any() for a in shown[0]), "the face moves"


@pytest.mark.parametrize(("bundle", "family"), FAMILIES)
def test_faces_that_overlap_are_drawn_one_onto_the_other(
    bundle: str, family: str, request: pytest.FixtureRequest
) -> None:
    if family == "liveportrait" and int(cv2.__version__.partition(".")[0]) < 5:
        pytest.skip("OpenCV 4 rounds positions to 1/32 pixel")
    options, rgb = AnimateOptions(faces="left-right"), frame(100)
    shown = []
    for pixels, size in (("host", 1), ("host", 4), ("device", 1), ("device", 4)):
        calls: list[int] = []
        with open_counting(request.getfixturevalue(bundle), calls, pixels=pixels) as animator:
            points = animator.find_faces(rgb)[0].points
            both = [animator.family.prepare(rgb, points + np.float32([x, 0, 0]), options) for x in (0, 45)]
            animation = animator.animate(rgb, shifts(4, family), options, portraits=both, batch_size=size)
            shown.append([f.rgb for f in animation])
        assert calls == ([1] * 8 if size == 1 else [4, 4]), "a call for each portrait"
    alone = both[1].place.rect
    assert alone[0] < both[0].place.rect[2], "they overlap"
    for frames in shown[1:]:
        for got, want in zip(frames, shown[0], strict=True):
            assert np.abs(got.astype(int) - want).max() <= 1


def test_frames_of_a_source_clip_are_laid_together_where_a_device_draws(
    liveportrait_bundle: Path, tmp_path: Path
) -> None:
    source = clip(tmp_path / "s.mkv", [frame(100 + 2 * i) for i in range(6)])
    shown = []
    for resident, want in ((False, [1] * 6), (True, [4, 2])):
        calls: list[int] = []
        with open_counting(liveportrait_bundle, calls, resident=resident) as animator:
            animation = animator.animate(source, shifts(6, "liveportrait"), AnimateOptions(), batch_size=4)
            shown.append([f.rgb for f in animation])
        assert calls == want
    assert all((a == b).all() for a, b in zip(*shown, strict=True))


def test_a_device_finds_its_batch_and_keeps_to_it(
    liveportrait_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    with open_counting(liveportrait_bundle, calls, 4, resident=True, pixels="device") as animator:
        ticks = iter(range(1000))
        monkeypatch.setattr("lp_edge.runtime.animator.time.perf_counter", lambda: float(next(ticks)))
        animation = animator.animate(frame(), shifts(40, "liveportrait"))
        assert [f.index for f in animation] == list(range(40))
        # every call takes one tick, so the largest is the fastest a frame: 5 calls of each size, then the rest
        assert calls == [1] * 5 + [2] * 5 + [4] * 6 + [1]
        assert animation.batches.chosen == 4
        calls.clear()
        list(animator.animate(frame(), shifts(8, "liveportrait")))
        assert calls == [4, 4], "what was found holds for the next animation"


def test_at_most_two_batches_are_under_way_while_one_is_put_together(
    liveportrait_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds a device's memory, and page-locked memory of the host."""
    under_way, most, lock = [0], [0], threading.Lock()
    begin, finish = Cast.begin, DrawnFrame.finish

    def counted(cast: Cast, shots: Sequence[Shot], watch: Stopwatch) -> list[DrawnFrame]:
        frames = begin(cast, shots, watch)
        with lock:
            under_way[0] += len(frames)
            most[0] = max(most[0], under_way[0])
        return frames

    def slow(drawn: DrawnFrame) -> AnimatedFrame:
        time.sleep(0.02)
        with lock:
            under_way[0] -= 1
        return finish(drawn)

    monkeypatch.setattr(Cast, "begin", counted)
    monkeypatch.setattr(DrawnFrame, "finish", slow)
    with open_counting(liveportrait_bundle, [], 4, resident=True, pixels="device") as animator:
        assert len(list(animator.animate(frame(), shifts(20, "liveportrait"), batch_size=2))) == 20
    assert most[0] <= 3 * 2


def test_a_frame_counts_as_many_times_as_it_has_faces(
    liveportrait_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a clip some frames show fewer: these are no sign of a better size."""
    with open_counting(liveportrait_bundle, [], 4, resident=True, pixels="device") as animator:
        clock = SimpleNamespace(perf_counter=itertools.count().__next__)
        monkeypatch.setattr("lp_edge.runtime.animator.time", clock)
        options = AnimateOptions(faces="left-right")
        points = animator.find_faces(frame())[0].points
        both = [animator.family.prepare(frame(), points + np.float32([x, 0, 0]), options) for x in (0, 45)]
        animation = animator.animate(frame(), shifts(5, "liveportrait"), options, portraits=both)
        assert len(list(animation)) == 5
    assert animation.batches.per_frame == {1: 0.5}, "one tick for two faces"


def test_what_was_found_stays_while_another_animation_still_searches(liveportrait_bundle: Path) -> None:
    calls: list[int] = []
    with open_counting(liveportrait_bundle, calls, 4, resident=True, pixels="device") as animator:
        searching = animator.animate(frame(), shifts(6, "liveportrait"))
        animator._batch_size = 2  # found by one at the same time
        assert len(list(searching)) == 6
        assert searching.batches.chosen is None
        calls.clear()
        list(animator.animate(frame(), shifts(4, "liveportrait")))
    assert calls == [2, 2]


def test_frames_before_an_error_are_drawn(liveportrait_bundle: Path) -> None:
    motion = shifts(5, "liveportrait").motion

    def failing() -> Iterator[DriverFrame]:
        for i in range(5):
            yield DriverFrame(Fraction(i, 25), motion[i], "template")
        raise MediaError("the clip ends in the middle", "", "")

    def start() -> Iterator[DriverFrame]:
        return failing()

    driver = Driver("broken", "video", Fraction(25), None, None, False, start)
    calls: list[int] = []
    with open_counting(liveportrait_bundle, calls) as animator:
        seen = []
        with pytest.raises(MediaError, match="middle"):
            for shown in animator.animate(frame(), driver, batch_size=4):
                seen.append(shown.index)
    assert seen == list(range(5))
    assert calls == [4, 1]
