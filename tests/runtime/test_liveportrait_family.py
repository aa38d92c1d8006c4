"""The liveportrait family on toy networks (tests/toys/make_liveportrait_toys.py says what they compute).

The toy face is a white square. The toy generator gives the crop back, moved by the mean way of the keypoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError
from lp_edge.runtime.animator import AnimatedFrame, Animation, Animator
from lp_edge.runtime.crop import CropOptions, cut
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.image import write_image
from lp_edge.runtime.liveportrait_options import LivePortraitOptions
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.templates import MotionTemplate

RAW = LivePortraitOptions(stitching=False, normalize_lip=False)


@pytest.fixture
def animator(liveportrait_bundle: Path) -> Iterator[Animator]:
    with Animator(liveportrait_bundle, backend=BackendConfig("cpu", threads=1)) as it:
        yield it


def frame(
    x: int = 100, y: int = 100, side: int = 80, size: tuple[int, int] = (240, 200), level: int = 255
) -> np.ndarray:
    out = np.zeros((size[1], size[0], 3), np.uint8)
    out[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = level
    return out


def clip(path: Path, frames: list[np.ndarray], fps: Fraction = Fraction(25)) -> Path:
    with open_writer(path, (frames[0].shape[1], frames[0].shape[0]), fps) as writer:
        for rgb in frames:
            writer.write(rgb)
    return path


def whole(animation: Animation) -> list[AnimatedFrame]:
    return list(animation)


def template(ts: list[tuple[float, float]], family: str = "liveportrait") -> MotionTemplate:
    """Motion that only shifts by t (half crops)."""
    count = {"liveportrait": 21, "mesh": 478}[family]
    n = len(ts)
    motion = Motion(
        np.tile(np.eye(3, dtype=np.float32), (n, 1, 1)),
        np.array([(x, y, 0.0) for x, y in ts], np.float32),
        np.ones(n, np.float32),
        np.zeros((n, count, 3), np.float32),
        np.full((n, 2), 0.3, np.float32),
        np.zeros(n, np.float32),
    )
    return MotionTemplate(fps=Fraction(25), family=family, motion=motion)


def centre(rgb: np.ndarray) -> tuple[float, float]:
    """Centre of brightness, px."""
    level = rgb.astype(float).sum(2)
    y, x = np.indices(level.shape)
    return float((level * x).sum() / level.sum()), float((level * y).sum() / level.sum())


def test_a_driver_that_rests_leaves_the_crop_as_it_is(animator: Animator) -> None:
    options = AnimateOptions(liveportrait=RAW, paste_back=False)
    (portrait,) = animator.prepare_source(frame())
    shown = whole(animator.animate(frame(), template([(0, 0)] * 3), options))
    # what the toy generator makes of a crop: blocks of 4 px of the 256 px input, enlarged 8 times
    small = cv2.resize(cut(frame(), portrait.to_crop).image, (64, 64), interpolation=cv2.INTER_AREA)
    want = cv2.resize(small, (512, 512), interpolation=cv2.INTER_NEAREST)
    assert [f.rgb.shape for f in shown] == [(512, 512, 3)] * 3
    assert np.abs(shown[0].rgb.astype(int) - want).max() <= 1
    assert (shown[2].rgb == shown[0].rgb).all()


def test_a_shift_of_the_driver_moves_the_face_by_as_much_of_the_crop(animator: Animator) -> None:
    options = AnimateOptions(liveportrait=RAW)
    source = frame()
    (portrait,) = animator.prepare_source(source)
    scale = 1 / float(portrait.to_crop[0, 0])
    rest, moved = whole(animator.animate(source, template([(0, 0), (0.125, 0)]), options))
    # t counts half crops: 0.125 is 32 px of 512
    way = centre(moved.rgb)[0] - centre(rest.rgb)[0]
    assert way == pytest.approx(32 * scale, abs=0.5)
    assert centre(moved.rgb)[1] == pytest.approx(centre(rest.rgb)[1], abs=0.3)


def test_the_multiplier_and_the_region_reach_the_composition(animator: Animator) -> None:
    def way(**more: object) -> float:
        options = AnimateOptions(liveportrait=RAW, paste_back=False, **more)  # type: ignore[arg-type]
        rest, moved = whole(animator.animate(frame(), template([(0, 0), (0.125, 0)]), options))
        return centre(moved.rgb)[0] - centre(rest.rgb)[0]

    assert way(multiplier=0.5) == pytest.approx(way() / 2, abs=1)
    assert way(region="exp") == pytest.approx(0, abs=0.1)


def test_stitching_is_part_of_the_result(animator: Animator) -> None:
    """The toy S answers 0.1 of the difference, and the mean difference once more: 1.1 of a shift is taken back."""
    options = AnimateOptions(liveportrait=LivePortraitOptions(normalize_lip=False), paste_back=False)
    rest, moved = whole(animator.animate(frame(), template([(0, 0), (0.125, 0)]), options))
    assert centre(moved.rgb)[0] - centre(rest.rgb)[0] == pytest.approx(-0.1 * 32, abs=1.5)


def test_pixels_beyond_the_crop_stay(animator: Animator) -> None:
    source = frame(size=(900, 700), x=450, y=350)
    source[:4, :] = 90
    for shown in animator.animate(source, template([(0, 0), (0.1, 0.1)]), AnimateOptions(liveportrait=RAW)):
        assert (shown.rgb[:4] == 90).all()
        assert shown.rgb.shape == source.shape


def test_a_driving_clip_is_cropped_unless_it_is_square(animator: Animator, tmp_path: Path) -> None:
    """The toy M reads t as the centre of brightness of what it is shown."""

    def read(path: Path, crop: str = "auto") -> list[float]:
        driver = animator.open_driver(path, AnimateOptions(driving_crop=crop, smooth=False))
        return [float(s.motion.translation[0]) for s in driver.start() if s.motion is not None]

    # one box for the whole clip: the face moves in it
    wide = clip(tmp_path / "wide.mkv", [frame(120 + 4 * i, size=(400, 200)) for i in range(5)])
    ts = read(wide)
    assert len(ts) == 5
    assert np.mean(ts) == pytest.approx(0, abs=0.08)
    assert all(b > a for a, b in itertools.pairwise(ts))
    square = clip(tmp_path / "square.mkv", [frame(50, size=(200, 200))] * 3)
    assert read(square) == pytest.approx([-0.5] * 3, abs=0.02)
    assert read(square, "on") == pytest.approx([0.0] * 3, abs=0.1)
    assert read(wide, "off")[0] == pytest.approx(-0.4, abs=0.05)


def test_a_picture_driver_gives_one_picture(animator: Animator, tmp_path: Path) -> None:
    write_image(tmp_path / "d.png", frame())
    animation = animator.animate(frame(), tmp_path / "d.png")
    assert animation.still
    assert len(whole(animation)) == 1


def test_a_clip_drives_a_clip_in_two_passes(animator: Animator, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mkv", [frame(100 + 2 * i) for i in range(6)])
    driver = clip(tmp_path / "d.mkv", [frame(100, size=(200, 200))] * 8)
    options = AnimateOptions(liveportrait=RAW, smooth=False)
    frames = whole(animator.animate(source, driver, options))
    assert len(frames) == 6
    for shown in frames:  # a resting driver: the crop follows the source's face
        assert centre(shown.rgb)[0] == pytest.approx(centre(shown.source)[0], abs=1.5)


def test_a_source_clip_whose_face_is_away_for_a_while(animator: Animator, tmp_path: Path) -> None:
    empty = np.zeros((200, 240, 3), np.uint8)
    source = clip(tmp_path / "s.mkv", [frame(100), frame(102), empty, empty, frame(104), frame(105)])
    frames = whole(
        animator.animate(source, template([(0, 0)] * 6), AnimateOptions(liveportrait=RAW, smooth=False))
    )
    assert len(frames) == 6
    assert (frames[2].rgb == frames[2].source).all()
    assert (frames[5].rgb != frames[5].source).any()


@pytest.mark.parametrize("length", ["shortest", "source", "driving"])
def test_lengths_of_two_passes(animator: Animator, tmp_path: Path, length: str) -> None:
    source = clip(tmp_path / "s.mkv", [frame()] * 7)
    options = AnimateOptions(liveportrait=RAW, length=length)
    count = {"shortest": 4, "source": 7, "driving": 4}[length]
    assert len(whole(animator.animate(source, template([(0, 0)] * 4), options))) == count


def test_edits_move_the_face(animator: Animator) -> None:
    def shown(edits: Edits) -> np.ndarray:
        options = AnimateOptions(liveportrait=RAW, edits=edits, paste_back=False)
        (only,) = whole(animator.animate(frame(), None, options))
        return only.rgb

    rest = shown(Edits())
    # keypoint 5 of 21 moves by -0.19 (its x is that of the head, mirrored): the toy shows the mean way of all
    way = centre(shown(Edits(move_x=0.19)))[0] - centre(rest)[0]
    (portrait,) = animator.prepare_source(frame())
    assert way == pytest.approx(-0.19 / 21 * 256 * float(portrait.motion.scale), abs=0.7)
    assert (shown(Edits(mouth_open=0.8)) != rest).any()
    # edits and a driver together: both ways add up
    options = AnimateOptions(liveportrait=RAW, paste_back=False)
    moved = whole(animator.animate(frame(), template([(0, 0), (0.125, 0)]), options))[-1]
    both = whole(
        animator.animate(
            frame(),
            template([(0, 0), (0.125, 0)]),
            AnimateOptions(liveportrait=RAW, paste_back=False, edits=Edits(move_x=0.19)),
        )
    )[-1]
    assert centre(both.rgb)[0] - centre(moved.rgb)[0] == pytest.approx(way, abs=0.7)


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_sizes_of_the_crop(animator: Animator, size: int) -> None:
    options = AnimateOptions(liveportrait=RAW, size=size, paste_back=False)
    animation = animator.animate(frame(), template([(0, 0)]), options)
    assert animation.size == (size, size)
    (only,) = whole(animation)
    assert only.rgb.shape == (size, size, 3)
    pasted = whole(animator.animate(frame(), template([(0, 0)]), AnimateOptions(liveportrait=RAW, size=size)))
    assert centre(pasted[0].rgb) == pytest.approx(centre(frame()), abs=1.0)


def test_crop_options_decide_where_the_crop_lies(animator: Animator) -> None:
    tight, wide = (
        animator.prepare_source(frame(), AnimateOptions(crop=CropOptions(scale=scale)))[0]
        for scale in (1.5, 3.0)
    )
    ratio = np.linalg.norm(tight.to_crop[:2, 0]) / np.linalg.norm(wide.to_crop[:2, 0])
    assert ratio == pytest.approx(2.0)


def test_a_template_of_the_mesh_family_is_refused(animator: Animator) -> None:
    with pytest.raises(ConfigError, match="family mesh"):
        animator.animate(frame(), template([(0, 0)] * 2, "mesh"))


def test_a_live_driver_is_cropped_around_its_face(animator: Animator) -> None:
    """The crop settles on the mean of the first boxes; the toy M reads t as the centre of brightness in it."""
    live = animator.live(frame(), AnimateOptions(liveportrait=RAW, smooth=False))
    ts = []
    for i in range(4):
        motion = live.step(frame(200 + 4 * i, size=(400, 200)), i / 25).driver.motion
        assert motion is not None
        ts.append(float(motion.translation[0]))
    assert ts[0] == pytest.approx(0, abs=0.03)
    assert all(b > a for a, b in itertools.pairwise(ts))


def test_a_driver_read_as_a_whole_still_shows_its_pictures(animator: Animator, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mkv", [frame()] * 4)
    driver = clip(tmp_path / "d.mkv", [frame(90 + 3 * i, size=(200, 200)) for i in range(4)])
    options = AnimateOptions(liveportrait=RAW, smooth=False)
    shown = whole(animator.animate(source, driver, options))
    assert [centre(f.driver.rgb)[0] for f in shown if f.driver.rgb is not None] == pytest.approx(
        [89.5 + 3 * i for i in range(4)], abs=0.6
    )
    assert all(f.driver.rgb is None for f in animator.animate(source, driver, options, pixels=False))
