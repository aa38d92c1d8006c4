"""Frames that are begun together: each is as if it were drawn alone, and holds no more than it needs."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lp_edge.engines import names
from lp_edge.engines.backends import BackendConfig
from lp_edge.engines.runner import Array, Runner
from lp_edge.errors import LimitError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.cast import Cast, Shot
from lp_edge.runtime.driver import Driver, DriverFrame
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.pixels import open_device_graph
from lp_edge.runtime.stopwatch import Stopwatch
from lp_edge.tests.runtime.test_batch_size import FAMILIES, open_counting, shifts
from lp_edge.tests.runtime.test_liveportrait_family import clip, frame
from lp_edge.tests.runtime.test_pixels import ResidentRunner

each_family = pytest.mark.parametrize(("bundle", "family"), FAMILIES)


def appearing(family: str, hidden: int, count: int) -> Driver:
    """A driver whose face is not there in the first ``hidden`` of its frames."""
    motion = shifts(count, family).motion

    def start() -> Iterator[DriverFrame]:
        for i in range(count):
            there = i >= hidden
            yield DriverFrame(Fraction(i, 25), motion[i] if there else None, "tracked" if there else "none")

    return Driver("appearing", "video", Fraction(25), count, None, False, start)


@each_family
@pytest.mark.parametrize("pixels", ["host", "device"])
def test_the_order_of_faces_does_not_depend_on_when_their_drivers_appear(
    bundle: str, family: str, pixels: str, request: pytest.FixtureRequest
) -> None:
    """In a batch the second face comes first: its driver is there from the beginning. It lies on top nevertheless."""
    options, rgb = AnimateOptions(faces="left-right"), frame(100)
    shown = []
    for size in (1, 4):
        with open_counting(request.getfixturevalue(bundle), [], pixels=pixels) as animator:
            points = animator.find_faces(rgb)[0].points
            both = [animator.family.prepare(rgb, points + np.float32([x, 0, 0]), options) for x in (0, 45)]
            drivers = [appearing(family, 2, 4), appearing(family, 0, 4)]
            animation = animator.animate(rgb, drivers, options, portraits=both, batch_size=size)
            shown.append([f.rgb for f in animation])
    for got, want in zip(*shown, strict=True):
        np.testing.assert_array_equal(got, want)


@each_family
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_crop_alone_stays_until_there_is_a_newer_one(
    bundle: str, family: str, size: int, request: pytest.FixtureRequest
) -> None:
    """Without a face black; then the crop of the first face, at rest, until the driver appears; then held where there is none."""
    options = AnimateOptions(paste_back=False)
    levels = [250, 240, 230, 220, 210, 200, 190]  # tell the frames apart
    with open_counting(request.getfixturevalue(bundle), []) as animator:
        rgbs = [frame(level=level) for level in levels]
        points = animator.find_faces(frame())[0].points
        faces = [[(0, animator.family.prepare(rgb, points, options))] for rgb in rgbs]
        faces[0] = faces[1] = faces[5] = []
        driver = appearing(family, 4, len(levels))
        cast = Cast(animator.family, [driver], options, source_clip=family == "mesh")
        shots = [Shot(i, rgbs[i], step.time, faces[i], [step]) for i, step in enumerate(driver.start())]
        shown = [
            drawn.finish().rgb
            for first in range(0, len(shots), size)
            for drawn in cast.begin(shots[first : first + size], Stopwatch())
        ]
    assert {rgb.shape for rgb in shown} == {(animator.family.crop_size(options),) * 2 + (3,)}
    of_the_face = [float(np.percentile(rgb, 90)) for rgb in shown]  # edges may be sharpened beyond it
    assert of_the_face == pytest.approx([0, 0, 230, 230, 210, 210, 190], abs=2)


def test_faces_are_let_go_when_they_are_begun(liveportrait_bundle: Path) -> None:
    """Features take megabytes on a device; batches wait there to be put together."""
    with Animator(liveportrait_bundle, backend=BackendConfig("cpu", threads=1)) as animator:
        options = AnimateOptions()
        (portrait,) = animator.prepare_source(frame(), options)
        driver = appearing("liveportrait", 0, 1)
        cast = Cast(animator.family, [driver], options, source_clip=False)
        shot = Shot(0, frame(), Fraction(0), [(0, portrait)], list(driver.start()))
        (drawn,) = cast.begin([shot], Stopwatch())
        gone = weakref.ref(portrait)
        del portrait, shot
        gc.collect()
        assert gone() is None
        assert drawn.finish().rgb.any()


@each_family
@pytest.mark.parametrize("paste_back", [True, False])
def test_a_batch_that_does_not_fit_into_memory_is_halved(
    bundle: str,
    family: str,
    paste_back: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = AnimateOptions(paste_back=paste_back)
    shown = []
    for room in (7, 2, 0):
        calls: list[int] = []
        with open_counting(request.getfixturevalue(bundle), calls) as animator:
            render = animator.family.render

            def bounded(portraits: list, *keypoints: list, room: int = room, render=render):  # type: ignore
                if len(portraits) > room:
                    raise LimitError(f"memory for {room}", "", "")
                return render(portraits, *keypoints)

            monkeypatch.setattr(animator.family, "render", bounded)
            animation = animator.animate(frame(), shifts(14, family), options, batch_size=7)
            if not room:
                with pytest.raises(LimitError, match="memory for 0"):
                    list(animation)
                continue
            with caplog.at_level(logging.WARNING, "lp_edge"):
                shown.append([f.rgb for f in animation])
        if room == 2:
            # 7 = 3 + 4, 3 = 1 + 2, 4 = 2 + 2
            assert calls == [1, 2, 2, 2, *[2, 2, 2, 1]]
            assert "7 faces drawn at once: memory for 2; from now on at most 3" in caplog.text
            assert "4 faces drawn at once: memory for 2; from now on at most 2" in caplog.text
    for got, want in zip(*shown, strict=True):
        np.testing.assert_array_equal(got, want)


@each_family
@pytest.mark.parametrize("moving", [False, True])
def test_frames_stay_on_the_device(
    bundle: str,
    family: str,
    moving: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what is drawn nothing comes down but finished regions: one download a batch of one face."""
    folder: Path = request.getfixturevalue(bundle)
    source = clip(tmp_path / "s.mkv", [frame(100 + 2 * i) for i in range(4)]) if moving else frame()
    cpu, log = BackendConfig("cpu", threads=1), list[str]()

    def drawing(runner: Runner) -> Runner:
        there = runner.name in (names.APPEARANCE, names.MOTION, names.WARP_DECODE)
        return Resident(runner, log, None) if there else runner

    with Animator(folder, backend=cpu) as animator:
        want = [f.rgb for f in animator.animate(source, shifts(4, family))]
    monkeypatch.setattr(
        "lp_edge.runtime.families.open_device_graph",
        lambda name, config: Resident(open_device_graph(name, cpu), log, 4),
    )
    with Animator(folder, backend=cpu, wrap=drawing) as animator:
        assert animator.family.resident
        got = [f.rgb for f in animator.animate(source, shifts(4, family), batch_size=2)]
    for one, other in zip(got, want, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1
    assert "download" not in log
    assert log.count("fetch") == log.count("wait") == (4 if moving else 2)


class Resident(ResidentRunner):
    """One whose results may also be asked for on the host."""

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        return self.inner.infer(feeds, outputs)
