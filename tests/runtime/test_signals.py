"""Signals over time: what they measure, and that the comparison tells following from not following."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import MediaError, NoFaceError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.image import write_image
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.signals import FLAT, SIGNALS, compare, signals_of, signals_of_clip, signals_of_motion


def moving(frames: int = 50) -> np.ndarray:
    t = np.linspace(0, 4 * np.pi, frames)
    return np.stack([0.3 + 0.2 * np.sin(t), 0.25 + 0.1 * np.cos(t), 0.25 + 0.1 * np.cos(t), 20 * np.sin(t), 8 * np.cos(t), 0 * t], 1)  # fmt: skip


def test_signals_of_motion_are_its_ratios_and_angles() -> None:
    motion = Motion(
        rotation=rotation_from_euler([0.0, 10.0], [0.0, 20.0], [0.0, 30.0]).astype(np.float32),
        translation=np.zeros((2, 3), np.float32),
        scale=np.ones(2, np.float32),
        expression=np.zeros((2, 478, 3), np.float32),
        eye_ratio=np.array([[0.2, 0.3], [0.1, 0.4]], np.float32),
        lip_ratio=np.array([0.0, 0.5], np.float32),
    )
    table = signals_of_motion(motion)
    assert table.shape == (2, len(SIGNALS))
    np.testing.assert_allclose(table[1], [0.5, 0.1, 0.4, 20, 10, 30], atol=1e-4)


def test_a_perfect_follower_and_one_with_half_the_motion() -> None:
    driver = moving()
    same = compare(driver, driver + 5.0)["signals"]
    for name in SIGNALS[:5]:
        assert same[name]["correlation"] == 1.0
        assert same[name]["gain"] == 1.0
    half = compare(driver, 0.5 * driver)["signals"]
    assert half["yaw"]["correlation"] == 1.0
    assert half["yaw"]["gain"] == 0.5
    assert half["yaw"]["mean_abs_difference"] == pytest.approx(
        0.5 * np.abs(driver[:, 3] - driver[0, 3]).mean(), abs=1e-3
    )


def test_opposite_and_still_results_do_not_pass() -> None:
    driver = moving()
    assert compare(driver, -driver)["signals"]["mouth"]["correlation"] == -1.0
    still = compare(driver, np.tile(driver[:1], (50, 1)))["signals"]["mouth"]
    assert still["correlation"] is None
    assert not still["flat"], "the driver moves, the result does not"


def test_a_signal_that_hardly_varies_is_flat() -> None:
    driver = moving()
    entry = compare(driver, driver)["signals"]["roll"]
    assert entry["flat"] is True
    assert entry["correlation"] is None
    driver[:, 5] = 2 * FLAT["roll"] * driver[:, 3] / driver[:, 3].std()
    assert compare(driver, driver)["signals"]["roll"]["correlation"] == 1.0


def test_frames_without_a_face_are_left_out_and_counted() -> None:
    driver, result = moving(), moving(60)[:60]
    result[:50] = driver
    result[7] = np.nan
    report = compare(driver, result)
    assert (report["frames"], report["frames_without_face"]) == (49, 1)
    assert report["signals"]["yaw"]["correlation"] == 1.0
    with pytest.raises(NoFaceError):
        compare(driver, np.full((50, 6), np.nan))


@pytest.fixture
def animator(toy_bundle: Path) -> Iterator[Animator]:
    with Animator(toy_bundle, backend=BackendConfig("cpu", threads=1)) as it:
        yield it


def mouths(path: Path, blues: list[int | None], fps: int = 25) -> Path:
    """A clip of toy faces; the toy mesh opens the mouth by 1 - blue / red; None = no face."""
    with open_writer(path, (240, 200), Fraction(fps), crf=0) as writer:
        for blue in blues:
            rgb = np.zeros((200, 240, 3), np.uint8)
            if blue is not None:
                rgb[60:140, 60:140] = (255, 255, blue)
            writer.write(rgb)
    return path


def test_a_clips_mouth_is_read_frame_by_frame(animator: Animator, tmp_path: Path) -> None:
    path = mouths(tmp_path / "c.mkv", [255, 200, 150, 100, None, 100])
    table, fps = signals_of_clip(animator, path, smooth=False)
    assert fps == 25
    assert table.shape == (6, len(SIGNALS))
    assert (np.diff(table[:4, 0]) > 0.03).all()
    assert np.isnan(table[4]).all()
    assert table[5, 0] == pytest.approx(table[3, 0], abs=0.02)
    assert len(signals_of_clip(animator, path, fps=Fraction(50))[0]) == 12


def test_every_kind_of_driver(animator: Animator, tmp_path: Path) -> None:
    assert len(signals_of(animator, mouths(tmp_path / "c.mkv", [255, 100]))[0]) == 2
    table, fps = signals_of(animator, "nod")
    assert fps == 25
    assert table[:, 4].std() > 2, "a nod is pitch"
    assert table[:, 3].std() < 1
    write_image(tmp_path / "p.png", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(MediaError, match="picture"):
        signals_of(animator, tmp_path / "p.png")
    with pytest.raises(NoFaceError):
        signals_of(animator, mouths(tmp_path / "dark.mkv", [None, None]))
