"""Motion templates by formula: nod, shake, tilt, look, blink, smile, talk; and the bending of the canonical face.

Nothing here comes from a recording. A gesture is a handful of *controls* over time (angles of the head, lids, jaw, smile,
rounding of the lips, gaze), and :func:`face_shape` bends the canonical face by them: lids slide over the eyeball onto
their lower edge, the jaw turns about its hinge before the ears, mouth corners and cheeks follow smooth fields that are
interpolated between a few hand-set points. Every gesture starts and ends at rest, so it can be looped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError
from lp_edge.runtime import topology
from lp_edge.runtime.face_motion import Canonical, load_canonical
from lp_edge.runtime.geometry import rotation_from_euler
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.templates import KEYPOINTS, MotionTemplate

__all__ = ["GESTURES", "NECK", "Controls", "builtin_template", "face_shape"]

F64 = npt.NDArray[np.float64]

FPS = Fraction(25)
_SCALE = 100.0  # pixels per inter-ocular distance; composition is relative, so any value will do
NECK = np.array([0.0, 1.1, 0.3])
"""Pivot of nods and turns, seen from the head's rotation centre in canonical units: the top of the spine, below and behind it."""
_JAW_OPEN = 15.0  # degrees at jaw = 1
_EYEBALL = 0.19  # radius in inter-ocular distances: 12 mm of 63 mm


@dataclass(frozen=True)
class Controls:
    """What a face does at ``T`` moments; every field is float ``[T]``, 0 is rest.

    Attributes:
        pitch, yaw, roll: degrees, signs as in :mod:`lp_edge.runtime.geometry`.
        blink: 0 open … 1 both eyes shut.
        jaw: 0 shut … 1 wide open.
        smile: 0 … 1, lips shut.
        rounding: -1 wide … 1 pursed.
        brow: 0 … 1 raised.
        gaze_x, gaze_y: -1 … 1, to the right and down in the picture.
        frown: 0 … 1 brows together and down.
        bare: 0 … 1 upper lip up, as for showing the teeth.
        aside: -1 … 1, mouth to the left or right of the picture.
    """

    pitch: F64
    yaw: F64
    roll: F64
    blink: F64
    jaw: F64
    smile: F64
    rounding: F64
    brow: F64
    gaze_x: F64
    gaze_y: F64
    frown: F64
    bare: F64
    aside: F64

    @staticmethod
    def rest(frames: int) -> Controls:
        """``frames`` moments of doing nothing."""
        return Controls(*(np.zeros(frames) for _ in fields(Controls)))


def _mirrored(table: dict[int, tuple[float, float, float]], points: F64) -> tuple[npt.NDArray[np.intp], F64]:
    """Points and displacements of a table of one face half, completed by the nearest mirrored points."""
    index, value = [], []
    for i, d in table.items():
        twin = int(np.linalg.norm(points[:468] - points[i] * [-1.0, 1.0, 1.0], axis=1).argmin())
        index += [i] if twin == i else [i, twin]
        value += [d] if twin == i else [d, (-d[0], d[1], d[2])]
    return np.asarray(index, np.intp), np.asarray(value, np.float64)


def _interpolate(points: F64, index: npt.NDArray[np.intp], value: F64) -> F64:
    """Field on all points that takes ``value [P, D]`` at the points ``index [P]``: radial functions |r| plus a constant."""
    centre = points[index]
    n = len(index)
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = np.linalg.norm(centre[:, None] - centre[None], axis=-1)
    system[n, n] = 0.0
    coefficients = np.linalg.solve(system, np.concatenate([value, np.zeros((1, value.shape[1]))]))
    basis = np.linalg.norm(points[:, None] - centre[None], axis=-1)
    out: F64 = basis @ coefficients[:n] + coefficients[n]
    return out


@dataclass(frozen=True)
class _Fields:
    """Everything about the canonical face that gestures need and that does not depend on time."""

    points: F64
    jaw: F64  # [478] share of the jaw's rotation
    hinge: F64
    smile: F64  # [478, 3] displacement at 1, as the next two
    purse: F64
    brow: F64
    frown: F64
    bare: F64
    aside: F64
    lids: tuple[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]], ...]  # upper, lower of each eye
    lid_skin: tuple[F64, ...]  # [478, pairs] how much of each upper lid point's way the skin goes


def _lip_bands(p: F64) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Points of the upper and of the lower lip, corners left out."""
    lines = [
        p[list(line)]
        for line in (topology.OUTER_LIP_UPPER, topology.INNER_LIP_LOWER, topology.OUTER_LIP_LOWER)
    ]
    top, middle, bottom = (np.interp(p[:468, 0], line[:, 0], line[:, 1]) for line in lines)
    x, y, z = p[:468].T
    corner = abs(p[61, 0])
    near = (np.abs(x) < 0.97 * corner) & (z < p[61, 2] + 0.1)
    upper = near & (y > top - 0.01) & (y < middle - 1e-4)
    lower = near & (y < bottom + 0.01) & (y >= middle - 1e-4)
    inner_upper, inner_lower = list(topology.INNER_LIP_UPPER[1:-1]), list(topology.INNER_LIP_LOWER[1:-1])
    upper[inner_upper], lower[inner_upper] = True, False
    upper[inner_lower], lower[inner_lower] = False, True
    return np.flatnonzero(upper), np.flatnonzero(lower)


_STILL = (
    *topology.RIGID, *topology.LEFT_EYE, *topology.RIGHT_EYE, *topology.LEFT_BROW, *topology.RIGHT_BROW, 234, 454,
)  # fmt: skip
_NOSE_STILL = (1, 2, 4, 19, 94, 97, 326)


def _jaw_share(p: F64, upper: npt.NDArray[np.intp], lower: npt.NDArray[np.intp]) -> F64:
    corner = abs(float(p[61, 0]))
    along = np.abs(p[:, 0]) / corner
    shares: dict[int, float] = dict.fromkeys((*_STILL, *_NOSE_STILL), 0.0)
    shares.update({int(i): 0.22 * float(along[i]) ** 4 for i in upper})
    shares.update({int(i): 1.0 - 0.62 * float(along[i]) ** 4 for i in lower})
    shares.update(dict.fromkeys((61, 291, 78, 308, 76, 306, 62, 292), 0.3))
    for share, points in (
        (1.0, (152, 148, 377, 176, 400, 175, 199, 200, 201, 421, 18, 83, 313)),
        (0.97, (149, 378, 208, 428)),
        (0.9, (150, 379)),
        (0.78, (136, 365)),
        (0.6, (172, 397)),
        (0.36, (58, 288)),
        (0.14, (132, 361)),
        (0.03, (93, 323)),
        (0.0, (50, 280, 205, 425, 117, 346, 98, 327, 64, 294)),
        (0.14, (207, 427, 187, 411)),
    ):
        shares.update(dict.fromkeys(points, share))
    index = np.asarray(sorted(shares), np.intp)
    value = np.asarray([[shares[int(i)]] for i in index])
    return np.clip(_interpolate(p, index, value)[:, 0], 0.0, 1.0)


def _vector_field(p: F64, moving: dict[int, tuple[float, float, float]], still: tuple[int, ...]) -> F64:
    index, value = _mirrored(moving, p)
    both, _ = _mirrored(dict.fromkeys(still, (0.0, 0.0, 0.0)), p)
    rest = np.asarray(sorted(set(both.tolist()) - set(index.tolist())), np.intp)
    field = _interpolate(p, np.concatenate([index, rest]), np.concatenate([value, np.zeros((len(rest), 3))]))
    field[468:] = 0.0
    return field


def _mouth_fields(p: F64, upper: npt.NDArray[np.intp], lower: npt.NDArray[np.intp]) -> tuple[F64, F64]:
    """Displacements of a full smile and of fully pursed lips."""
    corner = abs(float(p[61, 0]))
    still = (*_STILL, *_NOSE_STILL, 93, 132, 58, 172)
    smile: dict[int, tuple[float, float, float]] = {}
    purse: dict[int, tuple[float, float, float]] = {}
    for band, lift in ((upper, -0.022), (lower, -0.006), (np.asarray((61, 78, 76, 62)), 0.0)):
        for i in band:
            x = float(p[i, 0]) / corner
            if x > 1e-4:  # the tables hold the image-left half
                continue
            bend = abs(x) ** 2
            middle = 1.0 - bend
            smile[int(i)] = (0.11 * x, -0.115 * bend + lift * middle, 0.10 * bend + 0.02)
            purse[int(i)] = (-0.15 * x * (1.15 - 0.35 * bend), 0.0, -0.07 * middle - 0.02 * bend)
    smile.update(
        {
            207: (-0.060, -0.075, 0.020), 205: (-0.035, -0.065, -0.022), 50: (-0.020, -0.050, -0.025),
            187: (-0.055, -0.065, 0.010), 117: (-0.008, -0.025, -0.012), 98: (-0.018, -0.012, 0.0),
            212: (-0.070, -0.050, 0.035), 202: (-0.050, -0.025, 0.035), 152: (0.0, -0.008, 0.0),
            18: (0.0, -0.004, 0.012), 145: (0.0, -0.020, 0.0), 153: (0.0, -0.016, 0.0),
            144: (0.0, -0.016, 0.0), 159: (0.0, 0.008, 0.0),
        }
    )  # fmt: skip
    purse.update(
        {207: (0.025, 0.0, -0.01), 212: (0.045, 0.0, -0.02), 152: (0.0, -0.012, 0.0), 18: (0.0, -0.01, -0.02)}
    )
    return _vector_field(p, smile, still), _vector_field(p, purse, still)


def _side_fields(p: F64, upper: npt.NDArray[np.intp], lower: npt.NDArray[np.intp]) -> tuple[F64, F64]:
    """Displacements of a raised upper lip and of a mouth that goes to the right of the picture."""
    still = (*_STILL, *_NOSE_STILL, 93, 132, 58, 172, 152)
    corner = abs(float(p[61, 0]))
    lips = {int(i) for i in (*upper, *lower, 61, 78, 76, 62) if p[i, 0] < 1e-4}
    raised = {int(i): (0.0, -0.05 * (1.0 - abs(p[i, 0] / corner) ** 4), 0.0) for i in upper if p[i, 0] < 1e-4}
    dropped = {int(i): (0.0, 0.03 * (1.0 - abs(p[i, 0] / corner) ** 4), 0.0) for i in lower if p[i, 0] < 1e-4}
    # a mirrored table keeps y, so the share of the way aside is made as a y and turned
    share = _vector_field(p, {i: (0.0, 1.0, 0.0) for i in lips}, still)
    aside = np.zeros_like(p)
    aside[:, 0] = 0.16 * share[:, 1]
    return _vector_field(p, raised | dropped | {61: (0.0, 0.0, 0.0)}, still), aside


@lru_cache(maxsize=4)
def _fields(data: bytes) -> _Fields:
    p = np.frombuffer(data, np.float32).reshape(topology.NUM_POINTS, 3).astype(np.float64)
    upper, lower = _lip_bands(p)
    smile, purse = _mouth_fields(p, upper, lower)
    raised = {i: (0.0, -0.10, 0.0) for i in (105, 63, 66, 52, 65, 53)}
    raised |= {i: (0.0, -0.07, 0.0) for i in (70, 46, 107, 55)} | {
        9: (0.0, -0.03, 0.0),
        151: (0.0, -0.02, 0.0),
    }
    lowered = {i: (0.04, 0.07, 0.0) for i in (105, 66, 65, 52)} | {i: (0.06, 0.09, 0.0) for i in (107, 55)}
    lowered |= {i: (0.015, 0.04, 0.0) for i in (70, 63, 46, 53)} | {9: (0.0, 0.05, 0.0)}
    brow_still = (
        *topology.LEFT_EYE,
        *topology.RIGHT_EYE,
        10,
        109,
        338,
        67,
        297,
        54,
        284,
        168,
        6,
        127,
        356,
        1,
        61,
        291,
    )
    lids, skin = [], []
    for pairs in (topology.LID_PAIRS_IMAGE_LEFT, topology.LID_PAIRS_IMAGE_RIGHT):
        index = np.asarray(pairs, np.intp)
        lids.append((index[:, 0], index[:, 1]))
        # skin above the lid follows it, less with distance; brow, corners, irises and lower lid do not
        distance = np.linalg.norm(p[:, None, :2] - p[None, index[:, 0], :2], axis=-1)
        weight = np.exp(-0.5 * (distance / 0.065) ** 2)
        share = weight / (weight.sum(1, keepdims=True) + 0.9)
        pinned = [
            *topology.LEFT_EYE,
            *topology.RIGHT_EYE,
            *topology.LEFT_BROW,
            *topology.RIGHT_BROW,
            *range(468, 478),
        ]
        share[pinned] = 0.0
        line = np.interp(
            p[:, 0], np.sort(p[index[:, 0], 0]), p[index[:, 0], 1][np.argsort(p[index[:, 0], 0])]
        )
        share[p[:, 1] > line + 0.02] = 0.0
        skin.append(share)
    # The joint lies before the ears, but its head slides forward as the mouth opens, so that the jaw turns about a
    # point below and behind it.
    hinge = 0.5 * (p[234] + p[454]) + [0.0, 0.4, 0.2]
    brow = _vector_field(p, raised, brow_still)
    frown = _vector_field(p, lowered, brow_still)
    bare, aside = _side_fields(p, upper, lower)
    return _Fields(
        p,
        _jaw_share(p, upper, lower),
        hinge,
        smile,
        purse,
        brow,
        frown,
        bare,
        aside,
        tuple(lids),
        tuple(skin),
    )


def face_shape(controls: Controls, canonical: Canonical) -> F64:
    """The canonical face bent by controls, without pose.

    Args:
        controls: ``T`` moments; the angles are ignored.
        canonical: the face that is bent.

    Returns:
        float64 ``[T, 478, 3]`` in canonical units.
    """
    f = _fields(np.ascontiguousarray(canonical.points, np.float32).tobytes())

    def column(values: F64) -> F64:
        return np.asarray(values, np.float64)[:, None, None]

    purse = column(controls.rounding)
    shape = (
        f.points[None]
        + column(controls.smile) * f.smile
        + np.where(purse > 0, purse, 0.55 * purse) * f.purse
        + column(controls.brow) * f.brow
        + column(controls.frown) * f.frown
        + column(controls.bare) * f.bare
        + column(controls.aside) * f.aside
    )
    # jaw: turn about the hinge, every point by its share of the angle
    angle = np.deg2rad(_JAW_OPEN) * np.asarray(controls.jaw)[:, None] * f.jaw
    rel = shape - f.hinge
    cos, sin = np.cos(angle), np.sin(angle)
    shape[..., 1] = f.hinge[1] + cos * rel[..., 1] - sin * rel[..., 2]
    shape[..., 2] = f.hinge[2] + sin * rel[..., 1] + cos * rel[..., 2]
    _move_eyes(shape, controls, f)
    return shape


def _move_eyes(shape: F64, controls: Controls, f: _Fields) -> None:
    """Gaze and lids, in place: irises turn, upper lids slide over the eyeball down to the (slightly raised) lower ones."""
    gaze = np.stack([0.075 * controls.gaze_x, 0.045 * controls.gaze_y], axis=-1)
    shape[:, 468:, :2] += gaze[:, None]
    # the upper lid follows a gaze that goes up or down
    follow = np.asarray(0.26 * controls.gaze_y)[:, None]
    shut = np.clip(np.asarray(controls.blink), 0.0, 1.0)[:, None]
    for (upper, lower), skin in zip(f.lids, f.lid_skin, strict=True):
        open_upper, open_lower = shape[:, upper].copy(), shape[:, lower].copy()
        open_upper[..., 1] += follow * (1.0 - shut) * (open_lower - open_upper)[..., 1]
        gap = open_lower - open_upper
        meet = open_lower - 0.12 * gap
        moved = open_upper + shut[..., None] * (meet - open_upper)
        # the chord between two points of a sphere lies inside it; the lid has to pass outside
        sagitta = (gap[..., :2] ** 2).sum(-1) / (8.0 * _EYEBALL)
        moved[..., 2] -= 4.0 * shut * (1.0 - shut) * sagitta
        way = moved - shape[:, upper]
        shape += skin @ way
        shape[:, upper] = moved
        shape[:, lower] = open_lower + shut[..., None] * (meet - open_lower)


def _bump(t: F64, start: float, length: float) -> F64:
    """Raised cosine: 0 outside ``start … start + length``, 1 in its middle."""
    phase = np.clip((t - start) / length, 0.0, 1.0)
    return 0.5 - 0.5 * np.cos(2 * np.pi * phase)


def _plateau(t: F64, start: float, rise: float, hold: float, fall: float) -> F64:
    """0, up in ``rise`` seconds, 1 for ``hold``, down in ``fall``; cosine ramps."""
    up = np.clip((t - start) / rise, 0.0, 1.0)
    down = np.clip((t - start - rise - hold) / fall, 0.0, 1.0)
    return (0.5 - 0.5 * np.cos(np.pi * up)) * (0.5 + 0.5 * np.cos(np.pi * down))


def _blink_at(t: F64, start: float) -> F64:
    """One blink: down in 100 ms, shut for 40 ms, up in 200 ms."""
    return _plateau(t, start, 0.10, 0.04, 0.20)


def _swing(t: F64, duration: float, hertz: float) -> F64:
    """A sine under a raised-cosine envelope, whole cycles, at rest at both ends."""
    cycles = max(1.0, np.round(hertz * duration))
    envelope = _plateau(t, 0.0, 0.3 * duration, 0.4 * duration, 0.3 * duration)
    return np.asarray(np.sin(2 * np.pi * cycles * t / duration) * envelope)


def _nod(t: F64, duration: float, seed: int) -> Controls:
    wave = _swing(t, duration, 1.0)
    return replace(
        Controls.rest(len(t)), pitch=11.0 * wave, gaze_y=-0.5 * wave, blink=_blink_at(t, 0.55 * duration)
    )


def _shake(t: F64, duration: float, seed: int) -> Controls:
    wave = _swing(t, duration, 1.0)
    return replace(Controls.rest(len(t)), yaw=16.0 * wave, roll=1.5 * wave, gaze_x=-0.6 * wave)


def _tilt(t: F64, duration: float, seed: int) -> Controls:
    wave = np.sin(2 * np.pi * t / duration) * _plateau(t, 0.0, 0.2 * duration, 0.6 * duration, 0.2 * duration)
    return replace(Controls.rest(len(t)), roll=14.0 * wave, yaw=3.0 * wave, smile=0.3 * np.abs(wave) ** 2)


def _look(t: F64, duration: float, seed: int) -> Controls:
    part = duration / 4
    ramp = min(0.16, part / 3)

    def dwell(k: int) -> F64:
        return _plateau(t, k * part + 0.1 * part, ramp, 0.8 * part - 2 * ramp, ramp)

    x, y = dwell(1) - dwell(0), dwell(3) - dwell(2)
    slow_x, slow_y = (
        np.convolve(np.pad(v, 8, mode="edge"), np.hanning(17) / np.hanning(17).sum(), "valid") for v in (x, y)
    )
    ends = _plateau(t, 0.0, 0.1 * duration, 0.8 * duration, 0.1 * duration)
    return replace(
        Controls.rest(len(t)),
        gaze_x=0.9 * x,
        gaze_y=0.9 * y,
        yaw=7.0 * slow_x * ends,
        pitch=5.0 * slow_y * ends,
    )


def _blink(t: F64, duration: float, seed: int) -> Controls:
    starts = (0.18, 0.55, 0.55 + 0.5 / duration) if duration >= 1.6 else (0.25,)
    lids = np.max([_blink_at(t, s * duration) for s in starts], axis=0)
    return replace(Controls.rest(len(t)), blink=lids, pitch=1.2 * lids, brow=-0.08 * lids)


def _smile(t: F64, duration: float, seed: int) -> Controls:
    wide = _plateau(t, 0.1 * duration, 0.22 * duration, 0.33 * duration, 0.25 * duration)
    parted = _plateau(t, 0.2 * duration, 0.2 * duration, 0.18 * duration, 0.25 * duration)
    return replace(
        Controls.rest(len(t)), smile=wide, jaw=0.06 * parted, rounding=-0.25 * wide, brow=0.2 * parted,
        roll=3.0 * wide,
    )  # fmt: skip


def _talk(t: F64, duration: float, seed: int) -> Controls:
    rng = np.random.default_rng(seed)
    c = Controls.rest(len(t))
    jaw, rounding = c.jaw, c.rounding
    syllable, wide = 0.12, True
    while syllable < duration - 0.40:
        if rng.random() < 0.16:  # a breath between phrases
            syllable += rng.uniform(0.18, 0.32)
            continue
        length = rng.uniform(0.27, 0.37)
        jaw = jaw + rng.uniform(0.35, 0.65) * _bump(t, syllable, length)
        shape = rng.uniform(0.25, 0.6) if wide else -rng.uniform(0.35, 0.8)
        rounding = rounding - shape * _bump(t, syllable - 0.04, length + 0.10)
        wide = not wide if rng.random() < 0.75 else wide
        syllable += length * rng.uniform(0.78, 0.95)
    ends = _plateau(t, 0.0, 0.12 * duration, 0.76 * duration, 0.12 * duration)
    phase = 2 * np.pi * t / duration
    sway = rng.uniform(0.0, 2 * np.pi, 3)
    lids = np.max([_blink_at(t, s * duration) for s in (0.16, 0.47, 0.78)], axis=0)
    return replace(
        c, jaw=np.clip(jaw, 0.0, 1.0), rounding=np.clip(rounding, -1.0, 1.0), blink=lids,
        pitch=ends * 4.0 * np.sin(2 * phase + sway[0]), yaw=ends * 5.0 * np.sin(phase + sway[1]),
        roll=ends * 2.0 * np.sin(2 * phase + sway[2]), brow=ends * 0.15 * (1 + np.sin(3 * phase + sway[1])),
        smile=0.12 * ends,
    )  # fmt: skip


@dataclass(frozen=True)
class _Gesture:
    text: str
    seconds: float
    controls: Callable[[F64, float, int], Controls]


_MADE: dict[str, _Gesture] = {
    "nod": _Gesture("nods three times", 3.0, _nod),
    "shake": _Gesture("shakes the head", 3.0, _shake),
    "tilt": _Gesture("tilts the head to both sides", 3.2, _tilt),
    "look": _Gesture("looks to the sides, up and down", 4.0, _look),
    "blink": _Gesture("blinks three times", 2.8, _blink),
    "smile": _Gesture("smiles and relaxes", 3.2, _smile),
    "talk": _Gesture("talks silently", 6.0, _talk),
}
GESTURES: Mapping[str, str] = MappingProxyType({name: gesture.text for name, gesture in _MADE.items()})
"""Name → what it shows, in words."""


def builtin_template(
    name: str,
    *,
    duration: float | None = None,
    strength: float = 1.0,
    fps: Fraction = FPS,
    seed: int = 0,
    canonical: Canonical | None = None,
    family: str = "mesh",
) -> MotionTemplate:
    """A motion template by formula.

    Args:
        name: one of :data:`GESTURES`.
        duration: seconds, 0.5 to 600; ``None`` = the gesture's own. Swings keep their pace, other
            gestures are stretched.
        strength: 0 to 2 times the usual size; lids and jaw stop at shut and wide open.
        fps: frames a second, 5 to 240.
        seed: chooses the syllables of ``talk``.
        canonical: the face that is bent; ``None`` = the one that ships with the package. Only the mesh family has one.
        family: ``mesh`` or ``liveportrait``.

    Returns:
        A template whose first and last frame are at rest; frame 0 is neutral.

    Raises:
        ConfigError: unknown name, or a number out of range.

    Example:
        >>> template = builtin_template("nod")
        >>> len(template), template.family
        (75, 'mesh')
    """
    if name not in _MADE:
        raise ConfigError(
            f"no built-in template {name!r}", f"expected one of {', '.join(_MADE)}", "choose one of them"
        )
    seconds = _MADE[name].seconds if duration is None else float(duration)
    for what, value, low, high in (
        ("duration", seconds, 0.5, 600.0),
        ("strength", float(strength), 0.0, 2.0),
        ("fps", float(fps), 5.0, 240.0),
    ):
        if not low <= value <= high:
            raise ConfigError(
                f"{what} is {value:g}", f"expected {low:g} to {high:g}", "choose a value in that range"
            )
    if family not in KEYPOINTS:
        raise ConfigError(f"family is {family!r}", f"expected one of {', '.join(KEYPOINTS)}", "choose mesh")
    frames = max(2, round(seconds * fps))
    # the last frame is where the loop closes, one frame before the first one comes again
    t = np.arange(frames) / float(fps)
    controls = _MADE[name].controls(t, (frames - 1) / float(fps), seed)
    controls = _scaled(controls, float(strength))
    return MotionTemplate(
        fps=Fraction(fps),
        family=family,
        motion=_motion(controls, canonical or load_canonical())
        if family == "mesh"
        else _liveportrait_motion(controls),
        neutral=0,
        source=f"lp-edge gesture {name}",
        meta={"gesture": name, "strength": f"{strength:g}", "seed": str(seed)},
    )


def _scaled(c: Controls, strength: float) -> Controls:
    return replace(
        c,
        pitch=strength * c.pitch, yaw=strength * c.yaw, roll=strength * c.roll,
        blink=np.clip(strength * c.blink, 0.0, 1.0), jaw=np.clip(strength * c.jaw, 0.0, 1.2),
        smile=np.clip(strength * c.smile, 0.0, 1.4), rounding=np.clip(strength * c.rounding, -1.4, 1.2),
        brow=strength * c.brow, gaze_x=np.clip(strength * c.gaze_x, -1.2, 1.2), gaze_y=np.clip(strength * c.gaze_y, -1.2, 1.2),
    )  # fmt: skip


def _motion(controls: Controls, canonical: Canonical) -> Motion:
    """Controls → Motion in a frame where the inter-ocular distance is 100 pixels and the face stands at (256, 256)."""
    shape = face_shape(controls, canonical)
    rotation = rotation_from_euler(controls.pitch, controls.yaw, controls.roll)
    translation = _SCALE * (NECK - rotation @ NECK) + [256.0, 256.0, 0.0]
    points = _SCALE * shape @ np.swapaxes(rotation, 1, 2) + translation[:, None]
    frames = len(shape)
    return Motion(
        rotation=rotation.astype(np.float32),
        translation=translation.astype(np.float32),
        scale=np.full(frames, _SCALE, np.float32),
        expression=(shape - canonical.points).astype(np.float32),
        eye_ratio=np.asarray(topology.eye_ratio(points), np.float32),
        lip_ratio=np.asarray(topology.lip_ratio(points), np.float32),
    )


# NECK in LivePortrait's canonical space, by the unit and the pivot of engines/data/mesh/liveportrait_map.npz.
_LP_NECK = np.array([0.0, 0.255, 0.245])
# Measured in LivePortrait's own templates: a blink moves the upper lids (keypoints 11, 15) by 0.0125 to 0.0176 and the
# lower ones (13, 16) by about -0.3 of that, as the reference's wink slider does; 203-landmark ratios of open eyes are
# about 0.35; the lip ratio grows by 5 per unit of keypoint 19's y, a wide open mouth (jaw = 1) has 0.35.
_LP_LID_POINTS, _LP_LIDS = (11, 15, 13, 16), 0.015 * np.array([1.0, 1.0, -0.3, -0.3])
_LP_JAW, _LP_LIPS = 70.0, 0.35


def _liveportrait_motion(controls: Controls) -> Motion:
    """Controls → Motion of LivePortrait's 21 keypoints, by way of the edit sliders; frame 0 is the neutral one."""
    from lp_edge.runtime.edit import OPEN_EYE, Edits, liveportrait_delta  # builds on face_shape

    frames = len(controls.jaw)
    expression = np.zeros((frames, 21, 3))
    for i in range(frames):
        c = {f.name: float(getattr(controls, f.name)[i]) for f in fields(Controls)}
        edits = Edits.clipped(
            smile=c["smile"], lip_open=_LP_JAW * c["jaw"], eyebrow=15.0 * c["brow"],
            purse=(15.0 if c["rounding"] > 0 else 20.0) * c["rounding"],
            gaze_x=30.0 * c["gaze_x"], gaze_y=-20.0 * c["gaze_y"],
        )  # fmt: skip
        expression[i] = liveportrait_delta(edits).expression
    shut = np.clip(controls.blink, 0.0, 1.0)
    expression[:, _LP_LID_POINTS, 1] += shut[:, None] * _LP_LIDS
    rotation = rotation_from_euler(controls.pitch, controls.yaw, controls.roll)
    translation = _LP_NECK - rotation @ _LP_NECK
    translation[:, 2] = 0.0
    return Motion(
        rotation=rotation.astype(np.float32),
        translation=translation.astype(np.float32),
        scale=np.ones(frames, np.float32),
        expression=expression.astype(np.float32),
        eye_ratio=np.repeat(OPEN_EYE * (1.0 - shut)[:, None], 2, axis=1).astype(np.float32),
        lip_ratio=(_LP_LIPS * np.clip(controls.jaw, 0.0, None)).astype(np.float32),
    )
