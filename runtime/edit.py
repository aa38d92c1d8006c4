"""Editing a face: the sliders, and what they mean for LivePortrait's motion.

The sliders are those of LivePortrait's picture and video retargeting, with its ranges and units (``app.py`` and
``src/gradio_pipeline.py`` of the reference, ``update_delta_new_*``), so that values carry over; ``blink`` is an addition.
Directions are those of the picture: angles as everywhere in lp-edge (see :mod:`lp_edge.runtime.geometry`), ``gaze_x`` and
``move_x`` > 0 to the right, ``gaze_y`` and ``move_y`` > 0 up.

Families read the same sliders differently: :func:`liveportrait_delta` turns them into offsets of the 21 keypoints and
targets for the retargeting networks, :func:`lp_edge.runtime.mesh_edit.edit_mesh` bends the 478 points of a mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError

__all__ = [
    "ALIASES",
    "OPEN_EYE",
    "SLIDERS",
    "EditDelta",
    "Edits",
    "Slider",
    "liveportrait_delta",
    "parse_edits",
    "read_number",
    "slider_name",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

OPEN_EYE = 0.35
"""Eye ratio of open eyes in the convention of 203 landmarks, from which ``blink`` closes when the source's is not given."""


@dataclass(frozen=True)
class Slider:
    """What one slider is.

    Attributes:
        low, high: range, both ends included.
        default: the value that changes nothing; None for a target, which changes nothing only while it is not set.
        unit: of the value, in words.
        text: what it does, both directions.
        reference: its name in LivePortrait, accepted as an alias; empty where LivePortrait has none.
    """

    low: float
    high: float
    default: float | None
    unit: str
    text: str
    reference: str = ""


def _slider(
    low: float, high: float, unit: str, text: str, reference: str = "", default: float | None = 0.0
) -> Slider:
    return Slider(low, high, default, unit, text, reference)


SLIDERS: Mapping[str, Slider] = MappingProxyType(
    {
        "pitch": _slider(-15, 15, "degrees", "head looks down (-: up)"),
        "yaw": _slider(-25, 25, "degrees", "head turns to the right of the picture (-: left)"),
        "roll": _slider(-15, 15, "degrees", "head tilts clockwise as seen (-: anticlockwise)"),
        "mouth_open": _slider(0, 0.8, "lip ratio", "target opening of the mouth; 0 shuts it", "lip_ratio", None),
        "eyes_open": _slider(0, 0.8, "eye ratio", "target opening of both eyes; 0 shuts them", "eye_ratio", None),
        "blink": _slider(0, 1, "share", "closes both eyes by this share of their opening"),
        "wink": _slider(0, 39, "reference", "closes the image-left eye, cheek and mouth corner follow", "wink"),
        "eyebrow": _slider(-30, 30, "reference", "raises the brows (-: frowns)", "eyebrow"),
        "gaze_x": _slider(-30, 30, "reference", "looks to the right of the picture (-: left)", "eyeball_direction_x"),
        "gaze_y": _slider(-63, 63, "reference", "looks up (-: down)", "eyeball_direction_y"),
        "smile": _slider(-0.3, 1.3, "reference", "smiles (-: mouth corners down)", "smile"),
        "pout": _slider(-0.09, 0.09, "reference", "pouts to the right of the picture (-: left)", "lip_variation_zero"),
        "purse": _slider(-20, 15, "reference", "purses the lips (-: stretches them)", "lip_variation_one"),
        "grin": _slider(0, 15, "reference", "grins, lips apart", "lip_variation_two"),
        "lip_open": _slider(-90, 120, "reference", "lower lip down (-: up, closes)", "lip_variation_three"),
        "move_x": _slider(-0.19, 0.19, "half crop", "head moves to the right (-: left)", "mov_x"),
        "move_y": _slider(-0.19, 0.19, "half crop", "head moves up (-: down)", "mov_y"),
        "zoom": _slider(0.9, 1.2, "factor", "head grows (< 1: shrinks)", "mov_z", 1.0),
    }
)  # fmt: skip
"""Name → range, unit and meaning of every slider."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        **{s.reference: name for name, s in SLIDERS.items() if s.reference not in ("", name)},
        "input_lip_ratio": "mouth_open",
        "input_eye_ratio": "eyes_open",
        "mouth": "mouth_open",
        "eyes": "eyes_open",
        "brow": "eyebrow",
        "scale": "zoom",
    }
)
"""Other names that are understood → name of the slider. ``-`` counts as ``_``."""


@dataclass(frozen=True)
class Edits:
    """One setting of all sliders; the defaults change nothing. Ranges and meaning: :data:`SLIDERS`.

    Attributes:
        pitch, yaw, roll: degrees, added to the head's.
        mouth_open, eyes_open: target ratios of lips and lids (gap / width), None = leave them.
        blink: 0 … 1, share of the eyes' opening that is closed.
        wink, eyebrow, gaze_x, gaze_y, smile, pout, purse, grin, lip_open, move_x, move_y: in the reference's own scale.
        zoom: factor on the head's size.

    Raises:
        ConfigError: a value is no number or out of its range.

    Example:
        >>> Edits(smile=0.4, yaw=10).changes()
        {'yaw': 10.0, 'smile': 0.4}
    """

    pitch: float = 0.0
    yaw: float = 0.0
    roll: float = 0.0
    mouth_open: float | None = None
    eyes_open: float | None = None
    blink: float = 0.0
    wink: float = 0.0
    eyebrow: float = 0.0
    gaze_x: float = 0.0
    gaze_y: float = 0.0
    smile: float = 0.0
    pout: float = 0.0
    purse: float = 0.0
    grin: float = 0.0
    lip_open: float = 0.0
    move_x: float = 0.0
    move_y: float = 0.0
    zoom: float = 1.0

    def __post_init__(self) -> None:
        for name, slider in SLIDERS.items():
            value = getattr(self, name)
            if value is None and slider.default is None:
                continue
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not good or not slider.low <= value <= slider.high:  # NaN fails as well
                raise ConfigError(
                    f"edit {name} is {value!r}",
                    f"expected {slider.low:g} to {slider.high:g} ({slider.unit}: {slider.text})",
                    "choose a value in that range",
                )
            object.__setattr__(self, name, float(value))

    @staticmethod
    def clipped(**values: float) -> Edits:
        """Sliders from ``values``, each brought into its range."""
        ranges = {name: SLIDERS[name] for name in values}
        return Edits(**{name: min(max(values[name], s.low), s.high) for name, s in ranges.items()})

    def changes(self) -> dict[str, float]:
        """The sliders that are not at rest, in the order of :data:`SLIDERS`."""
        return {name: value for name, s in SLIDERS.items() if (value := getattr(self, name)) != s.default}

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.changes())

    def __str__(self) -> str:
        """The text that :func:`parse_edits` reads back as the same edits."""
        return ",".join(f"{name}={value!r}" for name, value in self.changes().items())


def slider_name(text: str) -> str:
    """The slider that ``text`` names, an alias included.

    Raises:
        ConfigError: there is none; the message lists all.
    """
    name = text.strip().lower().replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in SLIDERS:
        raise ConfigError(
            f"no edit is called {text.strip()!r}",
            f"expected one of {', '.join(SLIDERS)}",
            "choose one of them",
        )
    return name


def parse_edits(text: str) -> Edits:
    """``name=value`` pairs, separated by commas → sliders.

    Raises:
        ConfigError: unknown name, a name given twice, no number, or a value out of range.

    Example:
        >>> parse_edits("smile=0.4,blink=0.2,yaw=10").yaw
        10.0
    """
    values: dict[str, float] = {}
    for part in text.split(","):
        if not part.strip():
            continue
        name, equals, number = part.partition("=")
        name = slider_name(name) if equals else ""
        if not equals:
            raise ConfigError(
                f"edit {part.strip()!r} has no value", "expected name=value", "write, say, smile=0.4"
            )
        if name in values:
            raise ConfigError(f"edit {name} is given twice", "expected every name once", "drop one of them")
        values[name] = read_number(f"edit {name}", number)
    return Edits(**values)


def read_number(what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{what} is {text.strip()!r}", "expected a number", "write, say, smile=0.4")
    return value


@dataclass(frozen=True)
class EditDelta:
    """Edits in the terms of LivePortrait's networks; what is added on top of a composed motion, before stitching.

    ``x_d = zoom · s · (x_c · R' + δ + expression) + t + translation``, where ``R'`` has ``angles`` added to the
    reference's (pitch, yaw, roll); then what ``R_eye`` and ``R_lip`` answer to the target ratios is added.

    Attributes:
        expression: float32 ``[21, 3]``, added to the expression.
        angles: (pitch, yaw, roll) in degrees with the REFERENCE'S signs (yaw > 0 turns the nose to the left of the picture).
        zoom: factor on scale.
        translation: float32 ``[3]``, added to t.
        eye_ratio: target for ``R_eye``, None = leave the eyes.
        lip_ratio: target for ``R_lip``, None = leave the lips.
    """

    expression: F32 = field(default_factory=lambda: np.zeros((21, 3), np.float32))
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: float = 1.0
    translation: F32 = field(default_factory=lambda: np.zeros(3, np.float32))
    eye_ratio: float | None = None
    lip_ratio: float | None = None


# Offsets of (keypoint, axis) per unit of a slider; update_delta_new_* in the reference's src/gradio_pipeline.py. The mover
# of the x axis enters with the opposite sign there.
_OFFSETS: Mapping[str, tuple[tuple[int, int, float], ...]] = MappingProxyType(
    {
        "smile": (
            (20, 1, -0.01), (14, 1, -0.02), (17, 1, 0.0065), (17, 2, 0.003), (13, 1, -0.00275), (16, 1, -0.00275),
            (3, 1, -0.0035), (7, 1, -0.0035),
        ),
        "wink": ((11, 1, 0.001), (13, 1, -0.0003), (17, 0, 0.0003), (17, 1, 0.0003), (3, 1, -0.0003)),
        "pout": ((19, 0, 1.0),),
        "purse": ((14, 1, 0.001), (3, 1, -0.0005), (7, 1, -0.0005), (17, 2, -0.0005)),
        "grin": ((20, 2, -0.001), (20, 1, -0.001), (14, 1, -0.001)),
        "lip_open": ((19, 1, 0.001), (19, 2, 0.0001), (17, 1, -0.0001)),
        "move_x": ((5, 0, -1.0),),
        "move_y": ((5, 1, 1.0),),
        # the lids follow by half of the way: -0.001 + 0.0005
        "gaze_y": ((11, 1, -0.0005), (15, 1, -0.0005), (13, 1, -0.00015), (16, 1, -0.00015)),
    }
)  # fmt: skip
# The same for sliders whose two directions differ: (positive, negative).
_SIGNED_OFFSETS: Mapping[
    str, tuple[tuple[tuple[int, int, float], ...], tuple[tuple[int, int, float], ...]]
] = MappingProxyType(
    {
        "gaze_x": (((11, 0, 0.0007), (15, 0, 0.001)), ((11, 0, 0.001), (15, 0, 0.0007))),
        "eyebrow": (
            ((1, 1, 0.001), (2, 1, -0.001)),
            ((1, 0, -0.001), (2, 0, 0.001), (1, 1, 0.0003), (2, 1, -0.0003)),
        ),
    }
)


def liveportrait_delta(edits: Edits, eye_ratio: float = OPEN_EYE) -> EditDelta:
    """What the sliders add to a LivePortrait motion; the coefficients are the reference's.

    Args:
        edits: the sliders.
        eye_ratio: how far the source's eyes are open (mean of both, 203 landmarks); ``blink`` closes from there, or from
            ``eyes_open`` where that is set.

    Example:
        >>> round(float(liveportrait_delta(Edits(smile=1.0)).expression[14, 1]), 4)
        -0.02
    """
    expression = np.zeros((21, 3))
    for name, offsets in _OFFSETS.items():
        for kp, axis, share in offsets:
            expression[kp, axis] += share * getattr(edits, name)
    for name, (positive, negative) in _SIGNED_OFFSETS.items():
        value = getattr(edits, name)
        for kp, axis, share in positive if value > 0 else negative:
            expression[kp, axis] += share * value
    eyes = edits.eyes_open
    if edits.blink:
        eyes = (1.0 - edits.blink) * (eye_ratio if eyes is None else eyes)
    return EditDelta(
        expression=expression.astype(np.float32),
        angles=(edits.pitch, -edits.yaw, edits.roll),
        zoom=edits.zoom,
        eye_ratio=eyes,
        lip_ratio=edits.mouth_open,
    )
