"""Writes toy networks of the LivePortrait family: real graph and tensor names, results that can be worked out by hand.

    python tests/toys/make_liveportrait_toys.py [FOLDER]

``appearance_feature_extractor``  image u8 [N,256,256,3] -> feature_3d [N,3,1,64,64], feature_compressed [N,1,1,64,64]
    The crop with blocks of 4 x 4 px averaged, 0 to 255, channels first; their mean over the channels.
``motion_extractor``              image u8 [N,256,256,3] -> pitch, yaw, roll [N,1], t [N,3], exp [N,21,3], scale [N,1], kp [N,21,3]
    Of the mean colour c (R, G, B, each -0.5 to 0.5): angles ``30 c`` degrees, ``exp[k] = 0.1 c (k + 1) / 21``, scale
    ``1.2 + 0.2 mean(c)``. t is (x, y) of the centre of brightness in -1 to 1 across the crop, z = 0.1; a black crop
    has it in the middle. kp is ``keypoints()``.
``warp_decode``                   feature_3d [S,3,1,64,64], feature_compressed (S = 1 or N), kp_source, kp_driving [N,21,3]
    -> image u8 [N,512,512,3]. The feature enlarged 8 times, moved by the mean of ``kp_driving - kp_source``: x and y by 256 px
    a unit (the border is repeated), and brightened by 100 z. What feature_compressed differs from the mean of
    feature_3d over the channels is added: a wrong one shows.
``stitching``                     features [N,126] (kp_source, kp_driving) -> delta [N,65]
    ``0.1 (kp_source - kp_driving)`` for all numbers, then the mean of that difference over the keypoints, x and y.
``retarget_eye``                  features [N,66] (kp_source, left and right eye ratio, target) -> delta [N,63]
    ``0.1 (target - mean of both)`` added to y of the keypoints 11, 13, 15, 16, 18.
``retarget_lip``                  features [N,65] (kp_source, lip ratio, target) -> delta [N,63]
    ``0.1 (target - ratio)`` added to y of the keypoints 6, 12, 14, 17, 19, 20.

``liveportrait_map.npz`` is the table of that name for the toy canonical face: x, y, z as they are, the mean y offset of the
lip keypoints is the coefficient of the jaw, and of the lip ratio.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto  # noqa: TID253

from lp_edge.engines import names

EYES = (11, 13, 15, 16, 18)
LIPS = (6, 12, 14, 17, 19, 20)


def _sibling(name: str) -> ModuleType:
    """A neighbour that is a script, not part of a package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_toys = _sibling("make_toys")
_u8, _f32 = _toys._u8, _toys._f32


def keypoints() -> npt.NDArray[np.float32]:
    """float32 [21, 3]: a sunflower of radius 0.4, bulging towards the viewer."""
    k = np.arange(21) + 0.5
    r, a = 0.4 * np.sqrt(k / 21), k * math.pi * (3 - math.sqrt(5))
    return np.round(np.stack([r * np.cos(a), r * np.sin(a), r * r - 0.16], 1), 6).astype(np.float32)


def appearance() -> bytes:
    g = _toys.Graph()
    pixels = g("Transpose", g("Cast", names.IMAGE, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    small = g("AveragePool", pixels, kernel_shape=[4, 4], strides=[4, 4])
    depth = g.const([2], np.int64)
    g("Unsqueeze", small, depth, output=names.FEATURE_3D)
    g("Unsqueeze", g("ReduceMean", small, axes=[1]), depth, output=names.FEATURE_COMPRESSED)
    return g.model(
        names.APPEARANCE,
        [_u8(names.IMAGE, "batch", 256, 256, 3)],
        [
            _f32(names.FEATURE_3D, "batch", 3, 1, 64, 64),
            _f32(names.FEATURE_COMPRESSED, "batch", 1, 1, 64, 64),
        ],
    )


def motion() -> bytes:
    g = _toys.Graph()
    pixels = g("Cast", names.IMAGE, to=TensorProto.FLOAT)
    level = g("ReduceMean", pixels, axes=[3], keepdims=0)
    total = g("Max", g.sum(level, [1, 2]), g.const(1e-6))
    last = g.const([-1], np.int64)
    place = []
    for axis in (2, 1):  # x from the sum over the rows, y from that over the columns
        steps = g(
            "Sub", g("Div", g("Add", g.axis(names.IMAGE, axis), g.const(0.5)), g.const(128.0)), g.const(1.0)
        )
        moment = g.sum(g("Mul", g.sum(level, [3 - axis]), steps), [1])
        place.append(g("Unsqueeze", g("Div", moment, total), last))
    near = g("Add", g("Mul", place[0], g.const(0.0)), g.const(0.1))
    g("Concat", *place, near, output=names.T, axis=1)

    mean = g("ReduceMean", pixels, axes=[1, 2], keepdims=0)
    colour = g("Sub", g("Div", mean, g.const(255.0)), g.const(0.5))
    degrees = g("Mul", colour, g.const(30.0))
    g("Split", degrees, output=names.PITCH, axis=1)
    g.nodes[-1].output.extend([names.YAW, names.ROLL])
    g("Add", g("Mul", g("ReduceMean", colour, axes=[1]), g.const(0.2)), g.const(1.2), output=names.SCALE)
    share = g.const((0.1 * np.arange(1, 22) / 21).reshape(1, 21, 1))
    exp = g("Mul", g("Unsqueeze", colour, g.const([1], np.int64)), share, output=names.EXP)
    g("Add", g("Mul", exp, g.const(0.0)), g.const(keypoints()[None]), output=names.KP)
    outputs = [_f32(name, "batch", 1) for name in (names.PITCH, names.YAW, names.ROLL)]
    outputs += [_f32(names.T, "batch", 3), _f32(names.EXP, "batch", 21, 3), _f32(names.SCALE, "batch", 1)]
    return g.model(
        names.MOTION, [_u8(names.IMAGE, "batch", 256, 256, 3)], [*outputs, _f32(names.KP, "batch", 21, 3)]
    )


def warp_decode() -> bytes:
    g = _toys.Graph()
    depth = g.const([2], np.int64)
    feature, compressed = (g("Squeeze", x, depth) for x in (names.FEATURE_3D, names.FEATURE_COMPRESSED))
    odd = g("Sub", compressed, g("ReduceMean", feature, axes=[1]))
    moved = g("ReduceMean", g("Sub", names.KP_DRIVING, names.KP_SOURCE), axes=[1], keepdims=0)
    # [N] each, as [N,1,1,1]
    trailing = g.const([1, 2, 3], np.int64)
    x, y, z = (g("Unsqueeze", g("Gather", moved, g.const(i, np.int64), axis=1), trailing) for i in range(3))
    none = g("Mul", z, g.const(0.0))
    cells = g("Range", g.const(0.0), g.const(64.0), g.const(1.0))
    cells = g("Sub", g("Div", g("Add", cells, g.const(0.5)), g.const(32.0)), g.const(1.0))
    columns = g("Sub", g("Reshape", cells, g.const([1, 1, 64, 1], np.int64)), x)
    rows = g("Sub", g("Reshape", cells, g.const([1, 64, 1, 1], np.int64)), y)
    grid = g(
        "Concat",
        g("Add", columns, g("Mul", rows, g.const(0.0))),
        g("Add", rows, g("Mul", columns, g.const(0.0))),
        axis=3,
    )
    shown = g("Add", g("Add", feature, odd), none)  # one source, N frames
    shown = g("GridSample", shown, grid, mode="bilinear", padding_mode="border", align_corners=0)
    shown = g("Add", shown, g("Mul", z, g.const(100.0)))
    large = g(
        "Resize", shown, "", g.const([1.0, 1.0, 8.0, 8.0]), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    level = g("Clip", g("Round", large), g.const(0.0), g.const(255.0))
    g(
        "Cast",
        g("Transpose", level, perm=[0, 2, 3, 1]),
        output=names.IMAGE,
        to=TensorProto.UINT8,
    )
    return g.model(
        names.WARP_DECODE,
        [
            _f32(names.FEATURE_3D, "sources", 3, 1, 64, 64),
            _f32(names.FEATURE_COMPRESSED, "sources", 1, 1, 64, 64),
            _f32(names.KP_SOURCE, "batch", 21, 3),
            _f32(names.KP_DRIVING, "batch", 21, 3),
        ],
        [_u8(names.IMAGE, "batch", 512, 512, 3)],
    )


def _part(g: Any, start: int, stop: int) -> str:
    """Columns of the features."""
    return str(g("Slice", names.FEATURES, *(g.const([value], np.int64) for value in (start, stop, 1))))


def stitching() -> bytes:
    g = _toys.Graph()
    apart = g("Sub", _part(g, 0, 63), _part(g, 63, 126))
    points = g("Reshape", apart, g.const([-1, 21, 3], np.int64))
    bounds = (g.const([value], np.int64) for value in (0, 2, 1))
    shift = g("Slice", g("ReduceMean", points, axes=[1], keepdims=0), *bounds)
    g("Concat", g("Mul", apart, g.const(0.1)), shift, output=names.DELTA, axis=1)
    return g.model(names.STITCHING, [_f32(names.FEATURES, "batch", 126)], [_f32(names.DELTA, "batch", 65)])


def _retarget(name: str, ratios: int, moving: tuple[int, ...]) -> bytes:
    g = _toys.Graph()
    have = g("ReduceMean", _part(g, 63, 63 + ratios), axes=[1])
    missing = g("Sub", _part(g, 63 + ratios, 64 + ratios), have)
    weight = np.zeros((1, 21, 3), np.float32)
    weight[0, list(moving), 1] = 0.1
    g("Mul", missing, g.const(weight.reshape(1, 63)), output=names.DELTA)
    return g.model(name, [_f32(names.FEATURES, "batch", 64 + ratios)], [_f32(names.DELTA, "batch", 63)])


def liveportrait_map() -> dict[str, npt.NDArray[np.float32]]:
    """The table ``liveportrait_map`` of the toy bundle: one coefficient, two eye ratios, one lip ratio."""
    weights = np.zeros((21, 3, 4), np.float32)
    weights[list(LIPS), 1, 0] = weights[list(LIPS), 1, 3] = 1 / len(LIPS)
    weights[list(EYES), 1, 1:3] = 1 / len(EYES)
    return {
        "weights": weights.reshape(63, 4),
        "own_ratio": np.ones(2, np.float32),
        "rotation": np.eye(3, dtype=np.float32),
        "unit": np.asarray(0.25, np.float32),
        "pivot": np.zeros(3, np.float32),
    }


TOYS = {
    names.APPEARANCE: appearance,
    names.MOTION: motion,
    names.WARP_DECODE: warp_decode,
    names.STITCHING: stitching,
    names.RETARGET_EYE: lambda: _retarget(names.RETARGET_EYE, 2, EYES),
    names.RETARGET_LIP: lambda: _retarget(names.RETARGET_LIP, 1, LIPS),
}


def main(folder: Path) -> None:
    """Write every toy as ``<name>.onnx``, and the table ``liveportrait_map.npz``, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in TOYS.items():
        (folder / f"{name}.onnx").write_bytes(make())
    np.savez(folder / "liveportrait_map.npz", **liveportrait_map())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "liveportrait")
