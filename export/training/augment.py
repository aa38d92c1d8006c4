"""Augmentation of face crops with mesh labels: geometry that moves picture and labels exactly, and colour.

Everything is NumPy and OpenCV; nothing here needs torch. Coordinates follow OpenCV: the centre of pixel (i, j) is
the coordinate (i, j), and a point p of the source picture lies in the crop at ``M @ [p, 1]`` for the 2x3 matrix
of :func:`crop_matrix`, the same matrix that ``cv2.warpAffine`` takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from lp_edge.export.training.face_topology import (
    LEFT_EYE_CORNERS,
    LEFT_IRIS,
    MOUTH_CORNERS,
    POINTS,
    RIGHT_EYE_CORNERS,
    RIGHT_IRIS,
    mirror_permutation,
)

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

SIDE_FACTOR = 1.5
"""Side of a crop over the larger side of the bounding box of all mesh points (in the levelled frame)."""


@dataclass(frozen=True)
class AugmentConfig:
    """How far the training crops stray from the ideal crop, and how often each change is applied.

    ``label_origin``: how much larger a label's coordinates are than those of the pixel's centre it marks, in source
    pixels. The teacher's normalised points count from the corner of the corner pixel, hence one half; only mirroring
    must know it, or mirrored and plain samples disagree by twice as much.
    """

    roll_sigma: float = 9.0
    roll_uniform: float = 45.0
    roll_uniform_share: float = 0.35
    scale_low: float = 0.85
    scale_high: float = 1.28
    shift: float = 0.10
    shear: float = 0.06
    mirror: float = 0.5
    elastic: float = 0.6
    elastic_amplitude: float = 0.045
    turn: float = 0.6
    yaw_sigma: float = 12.0
    pitch_sigma: float = 6.0
    eyes: float = 0.35
    mouth: float = 0.25
    gaze: float = 0.45
    occlusion: float = 0.28
    label_origin: float = 0.5


def face_frame(points: F32) -> tuple[float, F32, float]:
    """Roll, centre and side of the ideal crop of a face.

    ``points`` is [478, >=2] in pixels. The roll (radians) is the angle of the line through the middles of the eye
    corners; centre [2] and side belong to the bounding box of all points in the frame that this roll levels, the
    side multiplied by :data:`SIDE_FACTOR`.
    """
    xy = points[:, :2].astype(np.float64)
    right = xy[list(RIGHT_EYE_CORNERS)].mean(0)
    left = xy[list(LEFT_EYE_CORNERS)].mean(0)
    roll = math.atan2(left[1] - right[1], left[0] - right[0])
    c, s = math.cos(roll), math.sin(roll)
    level = xy @ np.array([[c, -s], [s, c]])
    low, high = level.min(0), level.max(0)
    centre = (low + high) / 2 @ np.array([[c, s], [-s, c]])
    return roll, centre.astype(np.float32), float(SIDE_FACTOR * (high - low).max())


def crop_matrix(centre: F32, side: float, roll: float, size: int) -> F32:
    """The 2x3 matrix from picture to crop: ``centre`` goes to (size/2, size/2), ``side`` pixels become ``size``."""
    k = size / side
    c, s = math.cos(roll) * k, math.sin(roll) * k
    m = np.array([[c, s, 0.0], [-s, c, 0.0]])
    m[:, 2] = size / 2 - m[:, :2] @ np.asarray(centre, np.float64)
    return m.astype(np.float32)


def _at(field: F32, xy: F32) -> F32:
    """Bilinear samples [n, 2] of a displacement field [h, w, 2]; outside, the border value."""
    h, w = field.shape[:2]
    x = np.clip(xy[:, 0], 0, w - 1.001)
    y = np.clip(xy[:, 1], 0, h - 1.001)
    i, j = x.astype(np.intp), y.astype(np.intp)
    fx, fy = (x - i)[:, None], (y - j)[:, None]
    flat, k = field.reshape(-1, 2), j * w + i
    top = flat.take(k, 0)
    top += (flat.take(k + 1, 0) - top) * fx
    k += w
    low = flat.take(k, 0)
    low += (flat.take(k + 1, 0) - low) * fx
    out: F32 = top + (low - top) * fy
    return out


def warp_points(xy: F32, field: F32, rounds: int = 8) -> F32:
    """Where points [n, 2] of an undeformed crop lie after its picture was read at ``q + field(q)``.

    Solves q + field(q) = xy by fixed-point iteration; it converges when the field's slope stays below one.
    """
    q = xy.astype(np.float32)
    for _ in range(rounds):
        q = xy - _at(field, q)
    return q


def _patch(
    field: F32, centre: npt.NDArray[np.floating], reach: float
) -> tuple[tuple[slice, slice], npt.NDArray[np.floating], npt.NDArray[np.floating]] | None:
    """The part of ``field`` within ``reach`` of ``centre``, with its x and y offsets; None when it lies outside."""
    size = field.shape[0]
    x0, x1 = max(0, int(centre[0] - reach)), min(size, int(centre[0] + reach) + 1)
    y0, y1 = max(0, int(centre[1] - reach)), min(size, int(centre[1] + reach) + 1)
    if x1 <= x0 or y1 <= y0:
        return None
    dx = np.arange(x0, x1, dtype=np.float32)[None, :] - centre[0]
    dy = np.arange(y0, y1, dtype=np.float32)[:, None] - centre[1]
    return (slice(y0, y1), slice(x0, x1)), dx, dy


def _bulge(
    field: F32,
    centre: npt.NDArray[np.floating],
    radius: tuple[float, float],
    gain: tuple[float, float],
    roll: float,
) -> None:
    """Add to ``field`` a local stretch about ``centre`` (gain < 0 widens, > 0 narrows), in place."""
    patch = _patch(field, centre, 2.6 * max(radius))
    if patch is None:
        return
    here, dx, dy = patch
    c, s = math.cos(roll), math.sin(roll)
    u, v = c * dx + s * dy, -s * dx + c * dy
    w = np.exp(-0.5 * ((u / radius[0]) ** 2 + (v / radius[1]) ** 2))
    du, dv = gain[0] * u * w, gain[1] * v * w
    field[here][..., 0] += c * du - s * dv
    field[here][..., 1] += s * du + c * dv


def _push(
    field: F32,
    centre: npt.NDArray[np.floating],
    radius: tuple[float, float],
    shift: npt.NDArray[np.floating],
    roll: float,
) -> None:
    """Add to ``field`` a local move of the picture by ``shift`` [2] about ``centre``, in place."""
    patch = _patch(field, centre, 3.0 * max(radius))
    if patch is None:
        return
    here, dx, dy = patch
    c, s = math.cos(roll), math.sin(roll)
    u, v = (c * dx + s * dy) / radius[0], (c * dy - s * dx) / radius[1]
    field[here] -= np.exp(-0.5 * (u * u + v * v))[..., None] * shift


def _turn_field(points: F32, size: int, yaw: float, pitch: float, cells: int) -> tuple[F32, F32]:
    """A head turn by a smooth depth surface: displacement grid [cells, cells, 2] and turned points' z [478].

    A quadratic surface is fitted to the points' depth; the picture moves as that surface would, turned about its
    mean depth (weak perspective). Beyond the face the depth is held at that of the face's rim.
    """
    xy, z = points[:, :2], points[:, 2]
    scale = float(np.ptp(xy, axis=0).max()) / 2
    mid = xy.mean(0)
    p = (xy - mid) / scale

    def basis(q: F32) -> F32:
        a, b = q[..., 0], q[..., 1]
        out: F32 = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], -1).astype(np.float32)
        return out

    phi = basis(p)
    coefficient = np.linalg.solve(phi.T @ phi + 1e-3 * np.eye(6, dtype=np.float32), phi.T @ z)
    grid = np.linspace(0, size - 1, cells, dtype=np.float32)
    g = np.stack(np.meshgrid(grid, grid), -1)
    q = (g - mid) / scale
    radius = np.linalg.norm(q, axis=-1, keepdims=True)
    inside = q / np.maximum(radius, 1.0)
    depth = basis(inside) @ coefficient - z.mean()
    fade = 1.0 / np.maximum(radius[..., 0], 1.0)
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    offset = inside * scale
    # New position of a surface point minus its old one; the field reads backwards, hence the minus sign.
    x1 = cy * offset[..., 0] + sy * depth
    z1 = -sy * offset[..., 0] + cy * depth
    y1 = cp * offset[..., 1] - sp * z1
    field = -np.stack([x1 - offset[..., 0], y1 - offset[..., 1]], -1) * fade[..., None]
    rel = (xy - mid).astype(np.float32)
    zr = z - z.mean()
    z1p = -sy * rel[:, 0] + cy * zr
    z2p = sp * rel[:, 1] + cp * z1p
    return field.astype(np.float32), (z2p + z.mean()).astype(np.float32)


_BORDERS = (cv2.BORDER_CONSTANT, cv2.BORDER_REPLICATE, cv2.BORDER_REFLECT_101)


def random_geometry(
    rng: np.random.Generator, image: U8, points: F32, size: int, config: AugmentConfig
) -> tuple[U8, F32]:
    """One random crop of a labelled picture.

    ``image`` is uint8 [h, w, 3], ``points`` float32 [478, 3] in its pixels. Returns the crop uint8 [size, size, 3]
    and the points in its pixels (z in the same unit). Picture and labels pass through one map.
    """
    roll, centre, side = face_frame(points)
    mirrored = rng.random() < config.mirror
    if rng.random() < config.roll_uniform_share:
        extra = math.radians(rng.uniform(-config.roll_uniform, config.roll_uniform))
    else:
        extra = math.radians(rng.normal(0.0, config.roll_sigma))
    scale = math.exp(rng.uniform(math.log(config.scale_low), math.log(config.scale_high)))
    shift = rng.uniform(-config.shift, config.shift, 2) * side * scale
    matrix = crop_matrix(centre + shift.astype(np.float32), side * scale, roll + extra, size).astype(
        np.float64
    )
    if config.shear > 0:
        a = rng.normal(0.0, config.shear / 2, (2, 2)).clip(-config.shear, config.shear)
        a -= np.eye(2) * np.trace(a) / 2
        about = np.eye(2) + a
        matrix = about @ matrix
        matrix[:, 2] += size / 2 - about @ np.array([size / 2, size / 2])
    unit = math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))
    if mirrored:
        flip = np.array([[-1.0, 0.0, size - 1.0], [0.0, 1.0, 0.0]])
        matrix = np.vstack([matrix, [0, 0, 1]])
        matrix = flip @ matrix
    crop = np.empty((POINTS, 3), np.float32)
    crop[:, :2] = points[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    crop[:, 2] = points[:, 2] * unit
    if mirrored:
        crop = crop[mirror_permutation()]
        crop[:, 0] += 2 * config.label_origin * unit

    face = float(np.ptp(crop[:, :2], axis=0).max())
    cells = 7
    coarse = np.zeros((cells, cells, 2), np.float32)
    z = crop[:, 2]
    if rng.random() < config.turn:
        yaw = math.radians(rng.normal(0.0, config.yaw_sigma))
        pitch = math.radians(rng.normal(0.0, config.pitch_sigma))
        turned, z = _turn_field(crop, size, yaw, pitch, cells)
        coarse += turned
    if rng.random() < config.elastic:
        amplitude = config.elastic_amplitude * face * rng.random()
        noise = rng.normal(0.0, 1.0, (cells, cells, 2)).astype(np.float32)
        coarse += amplitude * cv2.GaussianBlur(noise, (3, 3), 0.8)
    field = np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), np.float32)
    eyes = rng.random() < config.eyes
    mouth = rng.random() < config.mouth
    if eyes:
        gain = rng.uniform(-0.4, 0.45)
        for corners in (RIGHT_EYE_CORNERS, LEFT_EYE_CORNERS):
            a, b = crop[corners[0], :2], crop[corners[1], :2]
            d = b - a
            width = max(float(np.hypot(d[0], d[1])), 2.0)
            angle = math.atan2(d[1], d[0])
            own = gain + rng.normal(0.0, 0.05)
            _bulge(field, (a + b) / 2, (0.6 * width, 0.4 * width), (0.0, own), angle)
    if mouth:
        a, b = crop[MOUTH_CORNERS[0], :2], crop[MOUTH_CORNERS[1], :2]
        d = b - a
        width = max(float(np.hypot(d[0], d[1])), 4.0)
        gains = (rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25))
        _bulge(field, (a + b) / 2, (0.6 * width, 0.45 * width), gains, math.atan2(d[1], d[0]))
    if rng.random() < config.gaze:
        # The iris slides in the eye; the lids follow a little, as the labels do.
        along, across = rng.uniform(-0.17, 0.17), rng.normal(0.0, 0.025)
        for corners, iris in ((RIGHT_EYE_CORNERS, RIGHT_IRIS[0]), (LEFT_EYE_CORNERS, LEFT_IRIS[0])):
            d = crop[corners[1], :2] - crop[corners[0], :2]
            width = max(float(np.hypot(d[0], d[1])), 2.0)
            own = along + rng.normal(0.0, 0.02)
            shift = (d * own + np.array([-d[1], d[0]], np.float32) * across).astype(np.float32)
            _push(field, crop[iris, :2], (0.27 * width, 0.25 * width), shift, math.atan2(d[1], d[0]))
    crop = np.concatenate([warp_points(crop[:, :2], field), z[:, None]], 1).astype(np.float32)

    inverse = cv2.invertAffineTransform(matrix)
    grid = _grid(size) + field
    source = grid @ inverse[:, :2].T.astype(np.float32) + inverse[:, 2].astype(np.float32)
    border = _BORDERS[int(rng.integers(3))]
    colour = [0, 0, 0] if rng.random() < 0.6 else [int(v) for v in rng.integers(0, 256, 3)]
    mode = cv2.INTER_LINEAR if rng.random() < 0.8 else cv2.INTER_CUBIC
    # OpenCV's stubs do not know that the second map is None when the first holds both coordinates.
    picture = cv2.remap(image, source, None, mode, borderMode=border, borderValue=colour)  # type: ignore[call-overload]
    return picture.astype(np.uint8, copy=False), crop


_GRIDS: dict[int, F32] = {}


def _grid(size: int) -> F32:
    if size not in _GRIDS:
        line = np.arange(size, dtype=np.float32)
        _GRIDS[size] = np.stack(np.meshgrid(line, line), -1)
    return _GRIDS[size]


def _tone(rng: np.random.Generator, x: U8) -> U8:
    """Brightness, contrast, gamma and colour temperature as one look-up table per channel."""
    ramp = np.arange(256, dtype=np.float32) / 255
    gamma = math.exp(rng.normal(0.0, 0.25))
    contrast = math.exp(rng.normal(0.0, 0.22))
    bright = rng.normal(0.0, 0.09)
    warm = rng.normal(0.0, 0.06, 3) if rng.random() < 0.6 else np.zeros(3)
    base = np.clip(ramp, 0, 1) ** gamma
    tables = [np.clip(((base - 0.5) * contrast + 0.5 + bright) * (1 + w), 0, 1) for w in warm]
    lut = (np.stack(tables, -1) * 255 + 0.5).astype(np.uint8)[None]
    return np.asarray(cv2.LUT(x, lut), np.uint8)


def _saturation(rng: np.random.Generator, x: U8) -> U8:
    grey = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)
    k = 0.0 if rng.random() < 0.3 else rng.uniform(0.2, 1.8)
    return np.asarray(cv2.addWeighted(x, k, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 1 - k, 0), np.uint8)


def _hue(rng: np.random.Generator, x: U8) -> U8:
    if rng.random() < 0.15:
        return np.ascontiguousarray(x[..., rng.permutation(3)])
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + int(rng.integers(-14, 15))) % 180
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def _blur(rng: np.random.Generator, x: U8) -> U8:
    if rng.random() < 0.35:
        n = int(rng.integers(3, 9))
        kernel = np.zeros((n, n), np.float32)
        angle = rng.uniform(0, math.pi)
        c = (n - 1) / 2
        d = (math.cos(angle) * c, math.sin(angle) * c)
        ends = [(round(c + k * d[0]), round(c + k * d[1])) for k in (-1, 1)]
        cv2.line(kernel, ends[0], ends[1], (1.0,), 1)
        return np.asarray(cv2.filter2D(x, -1, kernel / max(float(kernel.sum()), 1.0)), np.uint8)
    return np.asarray(cv2.GaussianBlur(x, (0, 0), rng.uniform(0.4, 1.8)), np.uint8)


def _noise(rng: np.random.Generator, x: U8) -> U8:
    h, w = x.shape[:2]
    n = np.empty((h, w, 3), np.int16)
    cv2.setRNGSeed(int(rng.integers(1 << 31)))
    cv2.randn(n, np.zeros(3), np.full(3, rng.uniform(2, 16)))
    return np.asarray(cv2.add(x, n, dtype=cv2.CV_8U), np.uint8)


def _jpeg(rng: np.random.Generator, x: U8) -> U8:
    data = cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(15, 75))])[1]
    out = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if out is None:  # cannot happen for bytes just encoded
        return x
    return np.asarray(out, np.uint8)


def _rescale(rng: np.random.Generator, x: U8) -> U8:
    n = x.shape[0]
    k = int(n * rng.uniform(0.25, 0.7))
    small = cv2.resize(x, (k, k), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (n, n), interpolation=cv2.INTER_LINEAR), np.uint8)


def _painted(rng: np.random.Generator, x: U8) -> U8:
    kind = int(rng.integers(4))
    if kind == 0:
        x = np.asarray(cv2.bilateralFilter(x, 7, 60, 5), np.uint8)
    elif kind == 1:
        x = np.asarray(cv2.medianBlur(x, 5), np.uint8)
    elif kind == 2:
        edges = cv2.Laplacian(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.CV_8U, ksize=3)
        dark = cv2.cvtColor(cv2.convertScaleAbs(edges, alpha=rng.uniform(1, 4)), cv2.COLOR_GRAY2RGB)
        x = np.asarray(cv2.subtract(cv2.medianBlur(x, 3), dark), np.uint8)
    if kind != 1 or rng.random() < 0.5:
        levels = int(rng.integers(4, 14))
        lut = (np.round(np.arange(256) / 255 * levels) / levels * 255).astype(np.uint8)
        x = np.asarray(cv2.LUT(x, lut), np.uint8)
    return x


def _light(rng: np.random.Generator, x: U8) -> U8:
    corner = rng.uniform(0.45, 1.4, (2, 2)).astype(np.float32)
    n = x.shape[0]
    gain = cv2.resize(corner, (n, n), interpolation=cv2.INTER_LINEAR)
    return np.asarray(np.clip(x * gain[..., None], 0, 255), np.uint8)


def _equalise(rng: np.random.Generator, x: U8) -> U8:
    lab = cv2.cvtColor(x, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(rng.uniform(1, 4), (4, 4)).apply(np.ascontiguousarray(lab[..., 0]))
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), np.uint8)


def _sharpen(rng: np.random.Generator, x: U8) -> U8:
    k = rng.uniform(0.3, 1.2)
    return np.asarray(cv2.addWeighted(x, 1 + k, cv2.GaussianBlur(x, (0, 0), 1.2), -k, 0), np.uint8)


_STEPS: tuple[tuple[float, Callable[[np.random.Generator, U8], U8]], ...] = (
    (0.08, _painted),
    (0.85, _tone),
    (0.35, _saturation),
    (0.20, _hue),
    (0.15, _light),
    (0.04, _equalise),
    (0.06, _sharpen),
    (0.22, _blur),
    (0.15, _rescale),
    (0.22, _noise),
    (0.18, _jpeg),
)


def random_colour(rng: np.random.Generator, image: U8) -> U8:
    """Random colour, light, sharpness and compression; uint8 [h, w, 3] in and out, geometry unchanged."""
    for share, step in _STEPS:
        if rng.random() < share:
            image = step(rng, image)
    return image


def random_occlusion(rng: np.random.Generator, image: U8, points: F32 | None) -> U8:
    """Cover a part of the crop: a rectangle, an ellipse, a bar, glasses, or a patch of the picture itself."""
    size = image.shape[0]
    out: U8 = np.array(image, np.uint8, order="C")
    colour = [int(v) for v in rng.integers(0, 256, 3)]
    kind = int(rng.integers(7))
    if kind >= 4 and points is not None:
        thick = int(rng.integers(1, 4))
        dark = [int(v) for v in rng.integers(0, 90, 3)]
        middles = []
        lens = (rng.uniform(0.65, 0.95), rng.uniform(0.4, 0.75))
        tint = rng.uniform(0.2, 0.75) if rng.random() < 0.3 else 0.0
        for corners in (RIGHT_EYE_CORNERS, LEFT_EYE_CORNERS):
            a, b = points[corners[0], :2], points[corners[1], :2]
            width = float(np.hypot(*(b - a)))
            mid = (a + b) / 2
            angle = math.degrees(math.atan2(*(b - a)[::-1]))
            axes = (max(2, round(width * lens[0])), max(2, round(width * lens[1])))
            middles.append((int(mid[0]), int(mid[1])))
            if tint > 0:
                layer = out.copy()
                cv2.ellipse(layer, middles[-1], axes, angle, 0, 360, dark, -1)
                out[:] = cv2.addWeighted(out, 1 - tint, layer, tint, 0)
            cv2.ellipse(out, middles[-1], axes, angle, 0, 360, dark, thick, cv2.LINE_AA)
            rim = points[127 if corners is RIGHT_EYE_CORNERS else 356, :2]  # the side of the head, by the eye
            away = (rim - mid) / max(float(np.hypot(*(rim - mid))), 1.0)
            start = mid + away * min(axes[0], float(np.hypot(*(rim - mid))))
            ends = [(int(p[0]), int(p[1])) for p in (start, rim)]
            cv2.line(out, ends[0], ends[1], dark, thick, cv2.LINE_AA)
            nose = points[168, :2]
            inward = (nose - mid) / max(float(np.hypot(*(nose - mid))), 1.0)
            start = mid + inward * min(axes[0], float(np.hypot(*(nose - mid))))
            cv2.line(
                out, (int(start[0]), int(start[1])), (int(nose[0]), int(nose[1])), dark, thick, cv2.LINE_AA
            )
        return out
    w, h = (int(v) for v in rng.uniform(0.08, 0.38, 2) * size)
    x, y = int(rng.integers(0, size - w)), int(rng.integers(0, size - h))
    if kind == 0:
        out[y : y + h, x : x + w] = colour
    elif kind == 1:
        cv2.ellipse(
            out, (x + w // 2, y + h // 2), (w // 2, h // 2), float(rng.uniform(0, 180)), 0, 360, colour, -1
        )
    elif kind == 2:
        at = rng.integers(0, size, 4)
        tip, tail = (int(at[0]), int(at[1])), (int(at[2]), int(at[3]))
        cv2.line(out, tip, tail, colour, int(rng.integers(3, 16)), cv2.LINE_AA)
    else:
        x2, y2 = int(rng.integers(0, size - w)), int(rng.integers(0, size - h))
        out[y : y + h, x : x + w] = image[y2 : y2 + h, x2 : x2 + w]
    return out
