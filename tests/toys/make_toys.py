"""Writes the toy networks: real names, dtypes and shapes, results that can be worked out by hand.

    python tests/toys/make_toys.py [FOLDER]

A "face" is a bright square: the pixels whose largest channel is above 128. The toys measure it:

``face_detector``  image u8 [N,H,W,3] -> boxes [N,3,4], scores [N,3], points [N,3,5,2]
    One candidate for each of the channels R, G, B: the square with the area and centroid of the pixels above 128 in it. Score =
    their mean / 255 times 1, 0.9, 0.8; 0 when there are none. A red and a green square are two faces, a white one
    gives three equal boxes, black nothing.
``face_mesh``      image u8 [N,64,64,3] -> points [N,478,3], score [N,1]
    ``template() * s + (x, y, 0)`` for the square's centroid x, y and side s (square root of the area); the lower lip and chin go down by
    ``jaw() * s * open`` with open = 1 - (sum of B / sum of R) within 0 to 1: white is a closed mouth, yellow an open
    one. Score = mean of the largest channel over the square / 255.
``warp_decode``    source_image u8 [S,H,W,3] (S = 1 or N), kp_source, kp_driving [N,478,3] -> image u8 [N,H,W,3], deformation [N,4,4,2]
    Adds the keypoints' mean displacement to the colours: x to R, y to G, z to B, rounded, clipped to 0 to 255. The deformation
    is that displacement (x, y) in every cell.
``probe``          x [N,1,4,4] -> y: a 3x3 convolution with ones; its bytes are embedded in lp_edge.engines.backends.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253
from onnx import TensorProto, helper, numpy_helper  # noqa: TID253

from lp_edge.engines import names
from lp_edge.runtime import topology

CROP = 64
THRESHOLD = 128.0
FACTORS = (1.0, 0.9, 0.8)
# eye, eye, nose, mouth corner, mouth corner in the unit square of a box
FIVE = ((0.33, 0.38), (0.67, 0.38), (0.5, 0.6), (0.38, 0.75), (0.62, 0.75))

F32 = npt.NDArray[np.float32]


def template() -> F32:
    """float32 [478, 3]: a face-like mesh, 1 high, centred on 0, mouth closed; z < 0 is nearer."""
    xy = np.empty((478, 2))
    # a sunflower for what has no place of its own
    k = np.arange(478) + 0.5
    r, a = np.sqrt(k / 478) * 0.95, k * math.pi * (3 - math.sqrt(5))
    xy[:, 0], xy[:, 1] = 0.38 * r * np.cos(a), 0.5 * r * np.sin(a)

    def put(indices: tuple[int, ...], x: npt.ArrayLike, y: npt.ArrayLike) -> None:
        xy[list(indices), 0], xy[list(indices), 1] = x, y

    t = np.arange(36) * 2 * math.pi / 36
    put(topology.FACE_OVAL, 0.38 * np.sin(t), -0.5 * np.cos(t))
    put(topology.NOSE_BRIDGE, 0.0, np.linspace(-0.12, 0.1, 6))
    t = np.arange(16) * 2 * math.pi / 16
    for ring, iris, x in (
        (topology.LEFT_EYE, topology.LEFT_IRIS, -0.17),
        (topology.RIGHT_EYE, topology.RIGHT_IRIS, 0.17),
    ):
        put(ring, x - 0.075 * np.cos(t), -0.12 - 0.03 * np.sin(t))
        put(iris, x + np.array([0, 0.025, 0, -0.025, 0]), -0.12 + np.array([0, 0, -0.025, 0, 0.025]))
    for upper, lower, half, thick in (
        (topology.OUTER_LIP_UPPER, topology.OUTER_LIP_LOWER, 0.14, 0.04),
        (topology.INNER_LIP_UPPER, topology.INNER_LIP_LOWER, 0.11, 0.001),
    ):
        along = np.linspace(-1.0, 1.0, len(upper))
        put(upper, half * along, 0.25 - thick * (1 - along**2))
        put(lower, half * along, 0.25 + thick * (1 - along**2))
    z = -0.3 * (1 - (xy[:, 0] / 0.38) ** 2 - (xy[:, 1] / 0.5) ** 2).clip(0, 1)
    return np.round(np.concatenate([xy, z[:, None]], 1), 6).astype(np.float32)


def jaw() -> F32:
    """float32 [478, 3]: how the points move when the mouth opens fully, in face heights."""
    move = np.zeros((478, 3), np.float32)
    for line in (topology.OUTER_LIP_LOWER, topology.INNER_LIP_LOWER):
        along = np.linspace(-1.0, 1.0, len(line))
        move[list(line), 1] = 0.12 * (1 - along**2)
    move[topology.CHIN, 1] = 0.1
    return np.round(move, 6).astype(np.float32)


def canonical() -> dict[str, npt.NDArray[np.generic]]:
    """The table ``canonical`` of the toy bundle: the template in eye distances and one direction of expression."""
    points = template()
    unit = float(np.linalg.norm(points[topology.LEFT_IRIS_CENTRE] - points[topology.RIGHT_IRIS_CENTRE]))
    origin = np.array([0.0, float(points[33, 1]), 0.9 * unit], np.float32)
    move = jaw()
    rigid = np.array(topology.RIGID, np.int64)
    return {
        "points": ((points - origin) / unit).astype(np.float32),
        "basis": (move / np.linalg.norm(move))[None].astype(np.float32),
        "basis_std": np.ones(1, np.float32),
        "rigid": rigid,
        "rigid_weight": np.ones(len(rigid), np.float32),
    }


class Graph:
    """Collects nodes and constants under short made-up names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def const(self, value: npt.ArrayLike, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def sum(self, x: str, axes: list[int]) -> str:
        return self("ReduceSum", x, self.const(axes, np.int64), keepdims=0)

    def axis(self, x: str, index: int) -> str:
        """0, 1, 2, … along an axis of x, as float."""
        size = self("Gather", self("Shape", x), self.const(index, np.int64))
        steps = self("Range", self.const(0, np.int64), size, self.const(1, np.int64))
        return self("Cast", steps, to=TensorProto.FLOAT)

    def model(
        self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> bytes:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="lp_edge"
        )
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)


def _u8(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.UINT8, list(shape))


def _f32(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _square(g: Graph, level: str, image: str) -> tuple[str, str, str, str]:
    """Of brightness [N,H,W]: centroid x, y, side and mean brightness of what is above the threshold, each [N]."""
    mask = g("Cast", g("Greater", level, g.const(THRESHOLD)), to=TensorProto.FLOAT)
    area = g.sum(mask, [1, 2])
    count = g("Max", area, g.const(1.0))
    x = g("Div", g.sum(g("Mul", g.sum(mask, [1]), g.axis(image, 2)), [1]), count)
    y = g("Div", g.sum(g("Mul", g.sum(mask, [2]), g.axis(image, 1)), [1]), count)
    return x, y, g("Sqrt", area), g("Div", g.sum(g("Mul", level, mask), [1, 2]), count)


def face_detector() -> bytes:
    g = Graph()
    pixels = g("Cast", names.IMAGE, to=TensorProto.FLOAT)
    boxes, scores, points = [], [], []
    for channel, factor in enumerate(FACTORS):
        level = g("Gather", pixels, g.const(channel, np.int64), axis=3)
        x, y, side, mean = _square(g, level, names.IMAGE)
        last = g.const([-1], np.int64)
        centre = g("Concat", g("Unsqueeze", x, last), g("Unsqueeze", y, last), axis=1)
        half = g("Mul", g("Unsqueeze", side, last), g.const(0.5))
        low = g("Sub", centre, half)
        middle = g.const([1], np.int64)
        boxes.append(g("Unsqueeze", g("Concat", low, g("Add", centre, half), axis=1), middle))
        scores.append(g("Unsqueeze", g("Mul", mean, g.const(factor / 255)), middle))
        offsets = g("Mul", g("Unsqueeze", g("Unsqueeze", side, last), last), g.const([FIVE]))
        spots = g("Add", g("Unsqueeze", low, middle), offsets)
        points.append(g("Unsqueeze", spots, middle))
    g("Concat", *boxes, output=names.BOXES, axis=1)
    g("Concat", *scores, output=names.SCORES, axis=1)
    g("Concat", *points, output=names.POINTS, axis=1)
    return g.model(
        names.FACE_DETECTOR,
        [_u8(names.IMAGE, "N", "H", "W", 3)],
        [_f32(names.BOXES, "N", 3, 4), _f32(names.SCORES, "N", 3), _f32(names.POINTS, "N", 3, 5, 2)],
    )


def face_mesh() -> bytes:
    g = Graph()
    pixels = g("Cast", names.IMAGE, to=TensorProto.FLOAT)
    x, y, side, mean = _square(g, g("ReduceMax", pixels, axes=[3], keepdims=0), names.IMAGE)
    totals = g.sum(pixels, [1, 2])
    red, blue = (g("Gather", totals, g.const(channel, np.int64), axis=1) for channel in (0, 2))
    ratio = g("Div", blue, g("Max", red, g.const(1.0)))
    opening = g("Clip", g("Sub", g.const(1.0), ratio), g.const(0.0), g.const(1.0))
    last = g.const([-1], np.int64)
    all_axes = g.const([1, 2], np.int64)
    shape = g(
        "Add", g.const(template()[None]), g("Mul", g("Unsqueeze", opening, all_axes), g.const(jaw()[None]))
    )
    depth = g("Mul", g("Unsqueeze", x, last), g.const(0.0))
    centre = g("Concat", g("Unsqueeze", x, last), g("Unsqueeze", y, last), depth, axis=1)
    scaled = g("Mul", shape, g("Unsqueeze", side, all_axes))
    g("Add", scaled, g("Unsqueeze", centre, g.const([1], np.int64)), output=names.POINTS)
    g("Unsqueeze", g("Mul", mean, g.const(1 / 255)), last, output=names.SCORE)
    return g.model(
        names.FACE_MESH,
        [_u8(names.IMAGE, "N", CROP, CROP, 3)],
        [_f32(names.POINTS, "N", 478, 3), _f32(names.SCORE, "N", 1)],
    )


def warp_decode() -> bytes:
    g = Graph()
    moved = g("ReduceMean", g("Sub", names.KP_DRIVING, names.KP_SOURCE), axes=[1], keepdims=0)
    shift = g("Unsqueeze", g("Round", moved), g.const([1, 2], np.int64))
    bright = g("Add", g("Cast", names.SOURCE_IMAGE, to=TensorProto.FLOAT), shift)
    g("Cast", g("Clip", bright, g.const(0.0), g.const(255.0)), output=names.IMAGE, to=TensorProto.UINT8)
    flat = g("Slice", moved, g.const([0], np.int64), g.const([2], np.int64), g.const([1], np.int64))
    cells = g("Unsqueeze", flat, g.const([1, 2], np.int64))
    g("Add", cells, g.const(np.zeros((1, 4, 4, 2))), output=names.DEFORMATION)
    keypoints = [_f32(name, "N", 478, 3) for name in (names.KP_SOURCE, names.KP_DRIVING)]
    return g.model(
        names.WARP_DECODE,
        [_u8(names.SOURCE_IMAGE, "S", "H", "W", 3), *keypoints],
        [_u8(names.IMAGE, "N", "H", "W", 3), _f32(names.DEFORMATION, "N", 4, 4, 2)],
    )


def probe() -> bytes:
    g = Graph()
    g.constants.append(numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w"))
    g("Conv", "x", "w", output="y", pads=[1, 1, 1, 1])
    return g.model("probe", [_f32("x", "N", 1, 4, 4)], [_f32("y", "N", 1, 4, 4)])


TOYS = {
    names.FACE_DETECTOR: face_detector,
    names.FACE_MESH: face_mesh,
    names.WARP_DECODE: warp_decode,
}


def main(folder: Path) -> None:
    """Write every toy as ``<name>.onnx``, and the table ``canonical.npz``, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in TOYS.items():
        (folder / f"{name}.onnx").write_bytes(make())
    np.savez(folder / "canonical.npz", **canonical())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
