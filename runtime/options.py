"""Frozen configuration of an animation; the command line and the server only fill these in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lp_edge.errors import ConfigError

__all__ = ["LENGTHS", "REGIONS", "AnimateOptions"]

REGIONS = ("all", "exp", "pose", "lip", "eyes")
LENGTHS = ("shortest", "source", "driving")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{name} is {value!r}", f"expected one of {', '.join(choices)}", f"choose {choices[0]}"
        )


def _within(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value}", f"expected {low} to {high}", "choose a value in that range")


@dataclass(frozen=True)
class AnimateOptions:
    """How the driver's motion is put on the source.

    Attributes:
        relative: apply the driver's change against its neutral frame (True) or its absolute pose and
            expression (False).
        region: which part of the motion is taken from the driver: ``all``, ``exp`` (expression without pose), ``pose``,
            ``lip``, ``eyes``. The rest stays as in the source.
        multiplier: strength of the motion, 0 to 3; 1 = as in the driver.
        neutral: index of the driver's frame that stands for "no motion" when ``relative``.
        smooth: one-euro filter on tracked points of clips and live drivers.
        face: which face of the source is animated: ``largest``, ``all``, or an index from left to right.
        size: longer side of the animated crop in pixels, at most; smaller crops are not enlarged.
        length: for a source clip: ``shortest``, ``source`` or ``driving``; what is too short holds its last frame.
        face_timeout: seconds of a driving clip that may pass until the first face appears.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    relative: bool = True
    region: str = "all"
    multiplier: float = 1.0
    neutral: int = 0
    smooth: bool = True
    face: str = "largest"
    size: int = 640
    length: str = "shortest"
    face_timeout: float = 10.0

    def __post_init__(self) -> None:
        _one_of("region", self.region, REGIONS)
        _one_of("length", self.length, LENGTHS)
        _within("multiplier", self.multiplier, 0.0, 3.0)
        _within("neutral", self.neutral, 0, 10**7)
        _within("size", self.size, 128, 2048)
        _within("face_timeout", self.face_timeout, 0.0, 1e6)
        if self.face not in ("largest", "all") and not self.face.isdigit():
            raise ConfigError(
                f"face is {self.face!r}",
                "expected largest, all or an index from left to right",
                "use --face largest",
            )
