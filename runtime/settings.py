"""Options of a run by their long names, as the command line and job lists give them.

One table says where each option goes in :class:`lp_edge.runtime.job.RunConfig` and how its text is read, so that
``lp-run --crop-scale 2.5`` and the column ``crop-scale`` of a job list mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lp_edge.errors import ConfigError
from lp_edge.runtime.edit import parse_edits
from lp_edge.runtime.job import RunConfig
from lp_edge.runtime.keyframes import load_keyframes

__all__ = ["SETTINGS", "Setting", "read_setting", "with_settings"]


@dataclass(frozen=True)
class Setting:
    """One option of a run.

    Attributes:
        path: fields from :class:`RunConfig` down to the value.
        read: text → value; raises ValueError or ConfigError.
        kind: what the text has to be, in words.
    """

    path: tuple[str, ...]
    read: Callable[[str], object]
    kind: str


_WORDS = {
    "yes": True,
    "true": True,
    "on": True,
    "1": True,
    "no": False,
    "false": False,
    "off": False,
    "0": False,
}


def _flag(text: str) -> bool:
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def _settings() -> dict[str, Setting]:
    def text(*path: str) -> Setting:
        return Setting(path, str, "one of its choices")

    def whole(*path: str) -> Setting:
        return Setting(path, int, "a whole number")

    def number(*path: str) -> Setting:
        return Setting(path, float, "a number")

    def flag(*path: str) -> Setting:
        return Setting(path, _flag, "yes or no")

    own, crop = ("options", "liveportrait"), ("options", "crop")
    return {
        "region": text("options", "region"),
        "multiplier": number("options", "multiplier"),
        "relative": flag("options", "relative"),
        "neutral": whole("options", "neutral"),
        "faces": text("options", "faces"),
        "smooth": flag("options", "smooth"),
        "size": whole("options", "size"),
        "paste-back": flag("options", "paste_back"),
        "length": text("options", "length"),
        "face-timeout": number("options", "face_timeout"),
        "edit": Setting(("options", "edits"), parse_edits, "name=value pairs"),
        "edit-file": Setting(("options", "keyframes"), load_keyframes, "a keyframe file"),
        "audio": text("audio"),
        "crf": whole("crf"),
        "side-by-side": flag("side_by_side"),
        "driving-option": text(*own, "driving_option"),
        "stitching": flag(*own, "stitching"),
        "eye-retargeting": flag(*own, "eye_retargeting"),
        "lip-retargeting": flag(*own, "lip_retargeting"),
        "normalize-lip": flag(*own, "normalize_lip"),
        "lip-normalize-threshold": number(*own, "lip_normalize_threshold"),
        "source-eye-retargeting": flag(*own, "source_video_eye_retargeting"),
        "source-eye-threshold": number(*own, "source_video_eye_threshold"),
        "smooth-variance": number(*own, "smooth_variance"),
        "keep-pose-with-retargeting": flag(*own, "keep_pose_with_retargeting"),
        "crop-scale": number(*crop, "scale"),
        "crop-vx": number(*crop, "vx"),
        "crop-vy": number(*crop, "vy"),
        "crop-rotate": flag(*crop, "rotate"),
        "driving-crop": text("options", "driving_crop"),
        "driving-crop-scale": number(*crop, "driving_scale"),
        "driving-crop-vx": number(*crop, "driving_vx"),
        "driving-crop-vy": number(*crop, "driving_vy"),
    }


SETTINGS: Mapping[str, Setting] = MappingProxyType(_settings())
"""Long name of an option → what it is. Options that concern a whole batch (networks, files, messages) are not among them."""


def read_setting(name: str, text: str, *, folder: Path | None = None) -> object:
    """The value that ``text`` stands for.

    Args:
        name: one of :data:`SETTINGS`.
        text: as a user writes it.
        folder: where a file that it names lies, if not in the current folder.

    Raises:
        ConfigError: unknown name, or a text that is no such value.
        MediaError: a file that it names cannot be read.

    Example:
        >>> read_setting("crop-scale", "2.5"), read_setting("stitching", "no")
        (2.5, False)
    """
    if name not in SETTINGS:
        raise ConfigError(
            f"no option is called {name!r}", f"expected one of {', '.join(SETTINGS)}", "rename it"
        )
    setting = SETTINGS[name]
    if name == "edit-file" and folder is not None:
        text = str(folder / text)
    try:
        return setting.read(text)
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}", f"expected {setting.kind}", "correct it") from error


def with_settings(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """The run with some of its options replaced.

    Args:
        config: the run.
        values: names of :data:`SETTINGS` → values (not texts).

    Raises:
        ConfigError: a value is out of range, or values exclude each other.
    """
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, field = SETTINGS[name].path
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[field] = value
    replaced: RunConfig = _replaced(config, tree)
    return replaced


def _replaced(config: Any, tree: Mapping[str, Any]) -> Any:
    """A frozen dataclass with fields replaced, nested ones too."""
    return replace(
        config,
        **{k: _replaced(getattr(config, k), v) if isinstance(v, dict) else v for k, v in tree.items()},
    )
