"""Checks that configurations share."""

from __future__ import annotations

import math

from lp_edge.errors import ConfigError

__all__ = ["one_of", "within"]


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ConfigError unless ``value`` is one of ``choices``; the first one is the advice."""
    if value not in choices:
        raise ConfigError(
            f"{name} is {value!r}", f"expected one of {', '.join(choices)}", f"choose {choices[0]}"
        )


def within(name: str, value: float, low: float, high: float) -> None:
    """ConfigError unless ``value`` is finite and from ``low`` to ``high``."""
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value}", f"expected {low} to {high}", "choose a value in that range")
