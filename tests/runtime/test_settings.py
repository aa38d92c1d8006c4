"""Options by their long names: one table for the command line and for job lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from lp_edge import cli
from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.job import RunConfig
from lp_edge.runtime.settings import SETTINGS, read_setting, with_settings


def test_the_command_line_has_every_setting_with_the_default_of_the_configuration() -> None:
    options = {o.name.replace("_", "-"): o for o in cli.run.params if o.name}
    assert set(SETTINGS) <= set(options)
    defaults = {name: options[name].default for name in SETTINGS if not name.startswith("edit")}
    assert with_settings(RunConfig("a.jpg", "nod"), defaults) == RunConfig("a.jpg", "nod")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("region", "lip", "lip"), ("multiplier", "1.5", 1.5), ("relative", "no", False), ("relative", "TRUE", True),
        ("neutral", "3", 3), ("size", "512", 512), ("crf", "20", 20), ("side-by-side", "1", True),
        ("edit", "smile=0.4,yaw=10", Edits(smile=0.4, yaw=10)), ("smooth-variance", "1e-6", 1e-6),
    ],
)  # fmt: skip
def test_text_becomes_a_value(name: str, text: str, value: object) -> None:
    assert read_setting(name, text) == value


def test_values_reach_nested_options_and_leave_the_others() -> None:
    config = with_settings(
        RunConfig("a.jpg", "nod"),
        {"crop-scale": 2.5, "stitching": False, "region": "lip", "audio": "none", "crop-rotate": False},
    )
    assert (config.options.crop.scale, config.options.crop.rotate, config.options.crop.vy) == (
        2.5,
        False,
        -0.125,
    )
    assert config.options.liveportrait.stitching is False
    assert config.options.liveportrait.smooth_variance == 3e-7
    assert (config.options.region, config.audio, config.source) == ("lip", "none", "a.jpg")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mouth", "1", "mouth"), ("multiplier", "much", "a number"), ("neutral", "1.5", "whole number"),
        ("relative", "maybe", "yes or no"), ("edit", "grimace=1", "grimace"), ("edit", "smile=9", "smile"),
    ],
)  # fmt: skip
def test_what_is_no_such_value_is_refused(name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_setting(name, text)


def test_ranges_are_checked_where_the_values_arrive() -> None:
    for values in ({"multiplier": 9.0}, {"crop-scale": 0.1}, {"region": "nose"}, {"smooth-variance": -1.0}):
        with pytest.raises(ConfigError):
            with_settings(RunConfig("a.jpg", "nod"), values)


def test_a_keyframe_file_is_looked_up_beside_its_list(tmp_path: Path) -> None:
    (tmp_path / "keys.csv").write_text("time,smile\n0,0\n2,1\n")
    keyframes = read_setting("edit-file", "keys.csv", folder=tmp_path)
    config = with_settings(RunConfig("a.jpg"), {"edit-file": keyframes})
    assert config.options.edits_at(1.0) == Edits(smile=0.5)
    with pytest.raises(MediaError, match="nowhere"):
        read_setting("edit-file", "nowhere.csv", folder=tmp_path)
