"""The animator on the toy networks: a "face" is a white square (mouth closed) or a yellow one (open), see make_toys.py.

The toy warp adds the mean displacement of the keypoints to the colours, so motion can be read off as colour.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError, MediaError, NoFaceError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.face_motion import motion_from_points
from lp_edge.runtime.image import write_image
from lp_edge.runtime.liveportrait_options import LivePortraitOptions
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.templates import MotionTemplate

WHITE = (255, 255, 255)


@pytest.fixture
def animator(toy_bundle: Path) -> Iterator[Animator]:
    with Animator(toy_bundle, backend=BackendConfig("cpu", threads=1)) as it:
        yield it


def frame(
    x: int | None = 100, y: int = 100, side: int = 80, width: int = 240, colour: tuple[int, int, int] = WHITE
) -> np.ndarray:
    out = np.zeros((200, width, 3), np.uint8)
    if x is not None:
        out[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = colour
    return out


def clip(path: Path, frames: list[np.ndarray], fps: Fraction = Fraction(25)) -> Path:
    with open_writer(path, (frames[0].shape[1], frames[0].shape[0]), fps) as writer:
        for rgb in frames:
            writer.write(rgb)
    return path


def moving(count: int, start: int = 90, step: int = 1) -> list[np.ndarray]:
    return [frame(start + step * i) for i in range(count)]


def test_a_moving_driver_moves_the_source(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", moving(12))
    frames = list(animator.animate(frame(), driver, AnimateOptions(smooth=False)))
    assert [f.index for f in frames] == list(range(12))
    inside = [int(f.rgb[100, 100, 0]) for f in frames]
    background = [int(f.rgb[70, 50, 0]) for f in frames]
    assert background[0] == 0
    # to the right by up to 11 px, the toy warp paints it red
    assert background[-1] >= 8
    assert background == sorted(background)
    assert inside[-1] == 255


def test_the_animation_describes_itself(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mp4", moving(6), Fraction(30000, 1001))
    animation = animator.animate(frame(), driver)
    assert animation.fps == Fraction(30000, 1001)
    assert animation.size == (240, 200)
    assert animation.expected == 6
    frames = list(animation)
    assert animation.counts == {"tracked": 6}
    assert {"decode", "motion", "compose", "warp", "paste_back"} <= set(animation.watch.seconds)
    assert frames[0].driver.rgb is not None
    assert (frames[0].source == frame()).all()


def test_pixels_outside_the_crop_stay(animator: Animator, tmp_path: Path) -> None:
    source = frame(width=1200)
    source[:, -1] = 77
    driver = clip(tmp_path / "d.mkv", moving(5, step=4))
    for animated in animator.animate(source, driver):
        assert (animated.rgb[:, -1] == 77).all()


def test_a_face_that_comes_late_leaves_the_source_still_until_then(
    animator: Animator, tmp_path: Path
) -> None:
    driver = clip(tmp_path / "d.mkv", [frame(None)] * 4 + moving(4, step=4))
    animation = animator.animate(frame(), driver, AnimateOptions(smooth=False))
    frames = list(animation)
    assert all((f.rgb == frame()).all() for f in frames[:4])
    assert (frames[-1].rgb != frame()).any()
    assert animation.counts["none"] == 4


def test_a_face_that_vanishes_holds_its_last_motion(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", moving(4, step=4) + [frame(None)] * 3)
    animation = animator.animate(frame(), driver, AnimateOptions(smooth=False))
    frames = list(animation)
    assert animation.counts["lost"] == 3
    assert (frames[-1].rgb == frames[3].rgb).all()


def test_a_driver_without_a_face_is_an_error(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", [frame(None)] * 5)
    with pytest.raises(NoFaceError, match=r"no face in any of the 5 frames of d\.mkv"):
        list(animator.animate(frame(), driver))


def test_a_driver_without_a_face_is_not_searched_to_its_end(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", [frame(None)] * 40)
    animation = animator.animate(frame(), driver, AnimateOptions(face_timeout=0.4))
    with pytest.raises(NoFaceError, match=r"within 0\.4 s"):
        list(animation)


def test_a_source_without_a_face_is_an_error_at_once(animator: Animator, tmp_path: Path) -> None:
    with pytest.raises(NoFaceError):
        animator.animate(frame(None), "nod")


def test_neutral_chooses_the_frame_that_means_no_motion(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", moving(6, step=3))
    options = AnimateOptions(smooth=False, neutral=5)
    frames = list(animator.animate(frame(), driver, options))
    assert (frames[5].rgb == frame()).all()
    assert (frames[0].rgb != frame()).any()
    with pytest.raises(ConfigError, match="neutral"):
        animator.animate(frame(), driver, AnimateOptions(neutral=99))


def test_a_picture_drives_one_frame(animator: Animator, tmp_path: Path) -> None:
    write_image(tmp_path / "d.png", frame())
    animation = animator.animate(frame(), tmp_path / "d.png")
    assert animation.still
    assert len(list(animation)) == 1


def test_a_built_in_template_drives(animator: Animator) -> None:
    animation = animator.animate(frame(), "nod")
    frames = list(animation)
    assert len(frames) == animation.expected
    assert any((f.rgb != frame()).any() for f in frames)
    assert all(f.driver.rgb is None for f in frames)


def test_a_template_object_drives(animator: Animator) -> None:
    still = motion_from_points(animator.canonical.points * 100, animator.canonical)
    from lp_edge.runtime.motion import Motion

    template = MotionTemplate(fps=Fraction(10), family="mesh", motion=Motion.stack([still] * 3))
    frames = list(animator.animate(frame(), template))
    assert len(frames) == 3
    assert all((f.rgb == frame()).all() for f in frames)


@pytest.mark.parametrize(("length", "count"), [("shortest", 4), ("source", 8), ("driving", 4)])
def test_a_source_clip_and_a_shorter_driver(
    animator: Animator, tmp_path: Path, length: str, count: int
) -> None:
    source = clip(tmp_path / "s.mkv", [frame(100 + i) for i in range(8)])
    driver = clip(tmp_path / "d.mkv", moving(4))
    frames = list(animator.animate(source, driver, AnimateOptions(length=length, smooth=False)))
    assert len(frames) == count
    assert frames[2].source[100, 140].min() > 200  # the third source frame, not the first


def test_a_source_clip_keeps_its_own_rate_and_takes_the_driver_by_time(
    animator: Animator, tmp_path: Path
) -> None:
    source = clip(tmp_path / "s.mkv", [frame()] * 12, Fraction(24))
    driver = clip(tmp_path / "d.mkv", moving(6, step=4), Fraction(12))
    animation = animator.animate(source, driver, AnimateOptions(smooth=False))
    assert animation.fps == 24
    times = [f.driver.time for f in animation]
    assert times == [Fraction(i // 2, 12) for i in range(12)]


def test_a_picture_drives_a_whole_source_clip(animator: Animator, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mkv", [frame()] * 5)
    write_image(tmp_path / "d.png", frame())
    assert len(list(animator.animate(source, tmp_path / "d.png"))) == 5


def test_a_source_clip_without_a_face_is_an_error(animator: Animator, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mkv", [frame(None)] * 4)
    with pytest.raises(NoFaceError, match="source clip"):
        list(animator.animate(source, "nod"))


def two_faces() -> np.ndarray:
    out = frame(80, width=500, colour=(255, 0, 0))
    out[60:140, 340:420] = (0, 230, 0)
    return out


@pytest.mark.parametrize(("face", "centres"), [("all", [80, 380]), ("0", [80]), ("1", [380])])
def test_faces_are_chosen_from_left_to_right(animator: Animator, face: str, centres: list[int]) -> None:
    portraits = animator.prepare_source(two_faces(), AnimateOptions(faces=face))
    found = [round(float(p.kp_source[:468, 0].mean() + p.rect[0]), -1) for p in portraits]
    assert found == centres


def test_an_index_beyond_the_faces_is_an_error(animator: Animator) -> None:
    with pytest.raises(NoFaceError, match="2 found"):
        animator.prepare_source(two_faces(), AnimateOptions(faces="2"))


def test_a_missing_driver_is_an_error_at_once(animator: Animator, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file or template"):
        animator.animate(frame(), tmp_path / "none.mp4")


def test_stopping_early_ends_all_threads(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", moving(60))
    before = threading.active_count()
    animation = animator.animate(frame(), driver)
    list(itertools.islice(animation, 3))
    animation.close()
    animation.close()
    assert threading.active_count() == before


def test_an_animator_of_another_family_is_refused(toy_bundle: Path) -> None:
    import json

    manifest = json.loads((toy_bundle / "manifest.json").read_text())
    manifest["family"] = "other"
    (toy_bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="other"):
        Animator(toy_bundle)


def test_closing_twice_is_harmless(toy_bundle: Path) -> None:
    animator = Animator(toy_bundle)
    animator.close()
    animator.close()


# -- several faces and drivers ------------------------------------------------------------------------


def left_and_right(rgb: np.ndarray) -> tuple[int, int]:
    """How far the toy warp has painted the background beside each of the two faces red."""
    return int(rgb[70, 30, 0]), int(rgb[70, 450, 0])


def test_every_face_has_its_own_driver(animator: Animator, tmp_path: Path) -> None:
    moves = clip(tmp_path / "moves.mkv", moving(6, step=3))
    rests = clip(tmp_path / "rests.mkv", [frame()] * 6)
    options = AnimateOptions(faces="left-right", smooth=False)
    both = list(animator.animate(two_faces(), moves, options))[-1]
    left = list(animator.animate(two_faces(), [moves, rests], options))[-1]
    right = list(animator.animate(two_faces(), [rests, moves], options))[-1]
    swapped = list(animator.animate(two_faces(), [moves, rests], AnimateOptions(faces="1,0", smooth=False)))[
        -1
    ]
    shows = [tuple(bool(x) for x in left_and_right(f.rgb)) for f in (both, left, right, swapped)]
    assert shows == [(True, True), (True, False), (False, True), (False, True)]
    assert left_and_right(left.rgb)[0] == left_and_right(both.rgb)[0]


def test_more_drivers_than_faces_are_refused(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", moving(3))
    with pytest.raises(ConfigError, match="2 drivers for 1 face"):
        animator.animate(frame(), [driver, driver], AnimateOptions(faces="left-right"))
    source = clip(tmp_path / "s.mkv", [frame()] * 3)
    with pytest.raises(ConfigError, match="2 drivers for 1 face"):
        list(animator.animate(source, [driver, driver], AnimateOptions(faces="left-right")))


def test_two_drivers_of_different_rate_and_length(animator: Animator, tmp_path: Path) -> None:
    slow = clip(tmp_path / "slow.mkv", moving(4, step=4), Fraction(10))
    fast = clip(tmp_path / "fast.mkv", moving(20), Fraction(20))
    options = AnimateOptions(faces="left-right", smooth=False)
    short = animator.animate(two_faces(), [fast, slow], options)
    assert (short.fps, len(list(short))) == (20, 8)  # 0.4 s at 20 frames a second
    long = AnimateOptions(faces="left-right", smooth=False, length="driving")
    assert len(list(animator.animate(two_faces(), [fast, slow], long))) == 20
    assert len(list(animator.animate(two_faces(), [slow, fast], long))) == 4


@pytest.mark.parametrize("length", ["shortest", "source", "driving"])
def test_a_picture_and_a_clip_drive_for_as_long_as_the_clip(
    animator: Animator, tmp_path: Path, length: str
) -> None:
    write_image(tmp_path / "d.png", frame())
    driver = clip(tmp_path / "d.mkv", moving(5))
    options = AnimateOptions(faces="left-right", smooth=False, length=length)
    for drivers in ([tmp_path / "d.png", driver], [driver, tmp_path / "d.png"]):
        assert len(list(itertools.islice(animator.animate(two_faces(), drivers, options), 9))) == 5


def test_a_face_of_a_clip_keeps_its_driver_when_the_other_leaves(animator: Animator, tmp_path: Path) -> None:
    gone = np.concatenate([np.zeros((200, 250, 3), np.uint8), two_faces()[:, 250:]], axis=1)
    source = clip(tmp_path / "s.mkv", [two_faces()] * 3 + [gone] * 3)
    moves = clip(tmp_path / "moves.mkv", moving(6, step=3))
    rests = clip(tmp_path / "rests.mkv", [frame()] * 6)
    options = AnimateOptions(faces="left-right", smooth=False)
    frames = list(animator.animate(source, [rests, moves], options))
    assert left_and_right(frames[-1].rgb)[1] > 10
    assert (frames[-1].rgb[:, :200] == frames[-1].source[:, :200]).all()


def test_a_recorded_driver_drives_without_being_read_again(
    animator: Animator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(tmp_path / "d.mkv", moving(6, step=2))
    options = AnimateOptions(smooth=False)
    direct = [f.rgb for f in animator.animate(frame(), path, options)]
    recorded = animator.open_driver(path, options).recorded()
    seen = animator.open_driver(path, options).recorded(pixels=True)
    monkeypatch.setattr("lp_edge.runtime.tracking.FaceTracker.update", None)
    for driver, pictures in ((recorded, False), (recorded, False), (seen, True)):
        frames = list(animator.animate(frame(), driver, options))
        assert all((f.rgb == want).all() for f, want in zip(frames, direct, strict=True))
        assert all((f.driver.rgb is not None) is pictures for f in frames)


# -- edits and crops ----------------------------------------------------------------------------------


def test_edits_alone_change_a_picture(animator: Animator) -> None:
    still = animator.animate(frame(), None)
    assert still.still
    assert [(f.rgb == frame()).all() for f in still] == [True]
    turned = list(animator.animate(frame(), None, AnimateOptions(edits=Edits(move_x=0.19))))
    assert len(turned) == 1
    assert (turned[0].rgb != frame()).any()


def test_edits_of_a_clip_last_as_long_as_it_does(animator: Animator, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mkv", [frame(100 + i) for i in range(7)])
    for length in ("shortest", "source", "driving"):
        options = AnimateOptions(edits=Edits(move_x=0.19), length=length, smooth=False)
        frames = list(animator.animate(source, None, options))
        assert len(frames) == 7
        assert all((f.rgb != f.source).any() for f in frames)


def test_the_crop_alone_is_square_and_of_the_size_asked_for(animator: Animator, tmp_path: Path) -> None:
    driver = clip(tmp_path / "d.mkv", [frame(None), *moving(3, step=4)])
    for source in (frame(), clip(tmp_path / "s.mkv", [frame()] * 4)):
        animation = animator.animate(source, driver, AnimateOptions(paste_back=False, size=256))
        assert animation.size == (256, 256)
        frames = list(animation)
        assert {f.rgb.shape for f in frames} == {(256, 256, 3)}
        assert (frames[-1].rgb != frames[0].rgb).any()
    with pytest.raises(ConfigError, match="several faces"):
        animator.animate(frame(), driver, AnimateOptions(paste_back=False, faces="all"))
    with pytest.raises(ConfigError, match="several faces"):
        animator.animate(two_faces(), driver, AnimateOptions(paste_back=False, faces="0,1"))


def test_options_of_the_other_family_are_refused(animator: Animator) -> None:
    options = AnimateOptions(liveportrait=LivePortraitOptions(stitching=False), driving_crop="on")
    with pytest.raises(ConfigError, match="driving_crop, stitching set for the family mesh"):
        animator.animate(frame(), "nod", options)


# -- step by step -------------------------------------------------------------------------------------


def test_a_live_driver_gives_what_a_clip_gives(animator: Animator) -> None:
    frames = [frame(None), *moving(5, step=3), frame(None)]
    live = animator.live(frame(), AnimateOptions(smooth=False))
    shown = [live.step(rgb, i / 25) for i, rgb in enumerate(frames)]
    assert [s.driver.state for s in shown] == ["none", *["tracked"] * 5, "lost"]
    assert (shown[0].rgb == frame()).all()
    assert (shown[6].rgb == shown[5].rgb).all()
    assert int(shown[5].rgb[70, 50, 0]) >= 8
    motions = [s.driver.motion for s in shown[1:6]]
    again = animator.live(frame())
    for i, motion in enumerate(motions):
        assert motion is not None
        assert (again.step_motion(motion, i / 25).rgb == shown[i + 1].rgb).all()


@pytest.mark.parametrize("faces", ["2", "0,5"])
def test_an_index_that_a_source_clip_does_not_show(animator: Animator, tmp_path: Path, faces: str) -> None:
    source = clip(tmp_path / "s.mkv", [two_faces()] * 3)
    with pytest.raises(NoFaceError, match="first frame with faces shows 2"):
        list(animator.animate(source, "nod", AnimateOptions(faces=faces)))


def test_more_drivers_than_chosen_faces_of_a_clip(animator: Animator, tmp_path: Path) -> None:
    source = clip(tmp_path / "s.mkv", [two_faces()] * 3)
    with pytest.raises(ConfigError, match="2 drivers for 1 face"):
        list(animator.animate(source, ["nod", "shake"], AnimateOptions(faces="0")))
