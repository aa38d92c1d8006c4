"""The image operations around the networks as ONNX graphs, for frames that stay on a device.

On a CPU, OpenCV and NumPy cut crops, resize them and paste them back (:mod:`lp_edge.runtime.crop`,
:mod:`~lp_edge.runtime.resample`, :mod:`~lp_edge.runtime.paste_back`: the *twins*). The graphs here give the same pixels,
within one grey level, on whatever runs ONNX. All take and return uint8 NHWC RGB and compute in float32; a float32 input
carries the geometry, made on the host in float64 by :mod:`lp_edge.runtime.device_inputs`.

``python -m lp_edge.export.device_graphs [FOLDER]`` writes the graphs that :class:`lp_edge.runtime.pixels.DevicePixels` runs
(:func:`shipped`); they are part of the package, so that it needs no PyTorch.

How they are written:

* **Gathers instead of GridSample.** GridSample wants float planes ``[N, 3, H, W]``: the whole frame transposed, and repeated for
  every crop. A gather of pixels (rows of three floats of ``[H·W, 3]``) reads only what is needed, lets N crops share one frame,
  needs no coordinates normalised to the frame's size (which cost 4e-4 px at 3840), and is not touched by what is reported
  of GridSample in strongly typed networks of TensorRT 10.14 and newer. Border rule and weights are in plain sight.
* **Positions as OpenCV 5 has them**: ``M₀₀·x + (M₀₁·y + M₀₂)`` in float32, four pixels weighed in float32, rounded half to even,
  0 beyond the border. OpenCV 4 rounds positions to 1/32 pixel instead, which differs by up to 8 levels at an edge of black and
  white; the graphs follow the exact positions, not those steps.
* **Resizing as products with matrices** of weights, one for rows and one for columns: exact for any ratio, no gather, what
  GPUs do best. :func:`resize_graph` takes them as an input, so one graph makes any size of any other.
* **Only the changed region** is pasted. Its size is the size of the ``patch`` that comes in and goes out, so that no size depends on
  a value; its place in the frame is part of the matrix. A patch may be whole rows of a frame, which are
  contiguous in memory: then input and output are addresses within frames, and nothing is copied.
* The same goes for what is read: rows ``y0`` and following of a frame are a frame. Passing only the rows around a face keeps the cast
  to float32, which TensorRT wants right behind a uint8 input, from touching the rest.
* At most four axes, no control flow, sizes from shapes and attributes only.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import onnx  # noqa: TID253
import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from lp_edge.engines import names
from lp_edge.engines.names import COLUMNS, CROP, FRAME, IMAGE, MASK, MATRIX, PATCH, WEIGHT, WEIGHTS
from lp_edge.errors import ConfigError
from lp_edge.export.onnx_export import Shape, export_onnx, save
from lp_edge.runtime import pixels
from lp_edge.runtime.crop import CROP_SIZE

__all__ = [
    "OPSETS",
    "crop_graph",
    "cut_graph",
    "paste_graph",
    "rect_paste_graph",
    "resize_graph",
    "shipped",
]

Flavor = Literal["main", "tensorrt8"]

OPSETS: Final[Mapping[str, int]] = {"main": 17, "tensorrt8": 16}
"""Flavour -> opset, as for the networks; the graphs are alike in both."""

_CUBIC = -0.75  # OpenCV's INTER_CUBIC
_FAR = 1e9  # px; whatever is that far away weighs nothing


# -- parts ---------------------------------------------------------------------------------------------


def _axis(length: Tensor | int) -> Tensor:
    """0, 1, … as float32 ``[length]``."""
    return torch.arange(length, dtype=torch.float32)


def _positions(matrix: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where pixels ``x [w]``, ``y [h]`` are read: two tensors ``[N, h, w]`` for ``matrix [N, 2, 3]``."""
    xx, xy, x1, yx, yy, y1 = matrix.reshape(-1, 6, 1, 1).unbind(1)
    row, column = y[None, :, None], x[None, None]
    return xx * column + (xy * row + x1), yx * column + (yy * row + y1)


def _taps(position: Tensor, last: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two pixels (int32) that a position ``[N, h, w]`` lies between, each with its weight.

    A pixel's weight is ``max(0, 1 - distance)``. The pair is moved into 0 … ``last`` as a whole, so beyond the border the weights
    are what is left of the outermost pixel and no mask is needed. In a picture of one pixel the second tap is that pixel
    again, from too far away to count.
    """
    first = torch.minimum(torch.floor(position), last - 1.0).clamp_min(0.0)
    distance = position - first
    step = last.clamp(0.0, 1.0)
    away = 1.0 + (1.0 - step) * _FAR
    index = first.to(torch.int32)
    return (
        (index, (1.0 - distance.abs()).clamp_min(0.0)),
        (index + step.to(torch.int32), (1.0 - (distance - away).abs()).clamp_min(0.0)),
    )


def _whole(length: Tensor | int) -> Tensor:
    """A size as int32."""
    return torch.scalar_tensor(length, dtype=torch.int32)


def _last(length: Tensor | int) -> Tensor:
    return torch.scalar_tensor(length, dtype=torch.float32) - 1.0


def _sample(pictures: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear, 0 beyond the border: ``[B, H, W, C]`` at ``[N, h, w]`` → ``[max(B, N), h, w, C]``; of B and N one is 1 or both
    are equal."""
    height, width = pictures.shape[1:3]
    count, channels = pictures.shape[0], pictures.shape[3]
    first = torch.arange(count, dtype=torch.int32)[:, None, None] * (_whole(height) * _whole(width))
    pixels = pictures.reshape(-1, channels)
    right, bottom = _last(width), _last(height)
    columns = _taps(x, right)
    rows = [(index * _whole(width) + first, weight) for index, weight in _taps(y, bottom)]
    terms = (
        F.embedding(row + column, pixels) * (down * along)[..., None]
        for row, down in rows
        for column, along in columns
    )
    return functools.reduce(torch.add, terms)


def _mean_of_blocks(x: Tensor, side: int, factor: int) -> Tensor:
    """Means of ``factor`` by ``factor`` pixels of ``[N, side, side, 3]``, rounded as OpenCV's INTER_AREA does."""
    rows = x.reshape(-1, factor, side * 3).sum(1)
    total = rows.reshape(-1, factor, 3).sum(1)
    mean = total * (1.0 / factor**2)
    # OpenCV's way for 2 is whole numbers, for any other factor float32.
    mean = torch.floor(mean + 0.5) if factor == 2 else torch.round(mean)
    return mean.reshape(-1, side // factor, side // factor, 3)


def _planes(image: Tensor) -> Tensor:
    return image.to(torch.float32).permute(0, 3, 1, 2)


def _image(planes: Tensor) -> Tensor:
    """Rounded (halves up, as OpenCV's whole numbers are) and clipped: planes → float32 ``[N, H, W, 3]``."""
    return torch.floor(planes + 0.5).clamp(0.0, 255.0).permute(0, 2, 3, 1)


def _cubic(given: Tensor | int, wanted: Tensor | int) -> Tensor:
    """Weights ``[wanted, given]`` of OpenCV's cubic interpolation, the outermost pixels repeated."""
    length = torch.scalar_tensor(given, dtype=torch.float32)
    ratio = length / torch.scalar_tensor(wanted, dtype=torch.float32)
    centre = (_axis(wanted) + 0.5) * ratio - 0.5
    base = torch.floor(centre)
    part = (centre - base)[:, None]

    def near(d: Tensor) -> Tensor:
        return ((_CUBIC + 2.0) * d - (_CUBIC + 3.0)) * d * d + 1.0

    def far(d: Tensor) -> Tensor:
        return ((_CUBIC * d - 5.0 * _CUBIC) * d + 8.0 * _CUBIC) * d - 4.0 * _CUBIC

    taps = far(part + 1.0), near(part), near(1.0 - part), far(2.0 - part)
    into, weights = _axis(given)[None], torch.zeros_like(part)
    for offset, tap in enumerate(taps, start=-1):
        index = torch.minimum((base + float(offset)).clamp_min(0.0), length - 1.0)[:, None]
        weights = weights + (index == into).to(torch.float32) * tap
    return weights


# -- modules -------------------------------------------------------------------------------------------


class _Crop(nn.Module):
    """See :func:`crop_graph`."""

    def __init__(self, size: int, reduce: int) -> None:
        super().__init__()
        self.size, self.reduce = size, reduce

    def forward(self, frame: Tensor, matrix: Tensor) -> Tensor:
        line = _axis(self.size)
        crop = torch.round(_sample(frame.to(torch.float32), *_positions(matrix, line, line)))
        if self.reduce > 1:
            crop = _mean_of_blocks(crop, self.size, self.reduce)
        return crop.to(torch.uint8)


class _Resize(nn.Module):
    """See :func:`resize_graph`."""

    def forward(self, crop: Tensor, weights: Tensor) -> Tensor:
        return _image(weights @ _planes(crop) @ weights.T).to(torch.uint8)


class _Cut(nn.Module):
    """See :func:`cut_graph`."""

    def forward(self, frame: Tensor, columns: Tensor) -> Tensor:
        return frame.to(torch.float32).index_select(2, columns.to(torch.int32)).to(torch.uint8)


class _Paste(nn.Module):
    """See :func:`paste_graph`."""

    def __init__(self, warp_mask: bool) -> None:
        super().__init__()
        self.warp_mask = warp_mask

    def forward(self, patch: Tensor, crop: Tensor, matrix: Tensor, weight: Tensor) -> Tensor:
        x, y = _positions(matrix, _axis(patch.shape[2]), _axis(patch.shape[1]))
        above, weight = torch.round(_sample(crop.to(torch.float32), x, y)), weight.to(torch.float32)
        if self.warp_mask:
            weight = torch.round(_sample(weight, x, y))
        return _blend(above, patch, weight, 0.0).to(torch.uint8)


class _RectPaste(nn.Module):
    """See :func:`rect_paste_graph`."""

    def forward(self, patch: Tensor, crop: Tensor, weight: Tensor) -> Tensor:
        down = _cubic(crop.shape[1], patch.shape[1])
        across = _cubic(crop.shape[2], patch.shape[2])
        large = _image(down @ _planes(crop) @ across.T)
        return _blend(large, patch, weight.to(torch.float32), 127.0).to(torch.uint8)


def _blend(above: Tensor, patch: Tensor, weight: Tensor, add: float) -> Tensor:
    """``(above·weight + patch·(255 - weight) + add) // 255``. Whole numbers up to 2¹⁶ are exact in float32; the half keeps
    a division that is not rounded correctly from falling below a whole number."""
    total = above * weight + patch.to(torch.float32) * (255.0 - weight)
    return torch.floor((total + (add + 0.5)) * (1.0 / 255.0))


# -- graphs --------------------------------------------------------------------------------------------


def _export(
    module: nn.Module, inputs: Mapping[str, tuple[Shape, torch.dtype]], output: Shape, flavor: str
) -> onnx.ModelProto:
    """Trace a module on inputs of these shapes; named axes are dynamic."""
    if flavor not in OPSETS:
        raise ConfigError(
            f"unknown flavor {flavor!r}", f"expected {' or '.join(OPSETS)}", "choose one of these"
        )
    sizes: dict[str, int] = {}
    for shape, _ in inputs.values():
        for axis in shape:
            if isinstance(axis, str):  # batches alike, sides all different
                sizes.setdefault(axis, 2 if axis in _BATCHES else 37 + 6 * len(sizes))
    return export_onnx(
        module,
        {
            name: torch.ones([sizes[a] if isinstance(a, str) else a for a in shape], dtype=dtype)
            for name, (shape, dtype) in inputs.items()
        },
        {IMAGE: output},
        {
            name: {i: axis for i, axis in enumerate(shape) if isinstance(axis, str)}
            for name, (shape, _) in inputs.items()
        },
        opset=OPSETS[flavor],
    )


_BATCHES = ("frames", "crops", "patches", "placements", "masks")
_U8, _F32 = torch.uint8, torch.float32


def _check_sides(**sides: int) -> None:
    for name, side in sides.items():
        if side < 1:
            raise ConfigError(f"{name} is {side}", "expected 1 px or more", "choose a size")


def crop_graph(size: int = CROP_SIZE, *, reduce: int = 1, flavor: Flavor = "main") -> onnx.ModelProto:
    """Square crops of a frame, as :func:`lp_edge.runtime.crop.cut`: bilinear, black beyond the frame.

    There is no filter for scales below 1, since the twin has none. ``reduce`` makes what
    :meth:`lp_edge.runtime.crop.Crop.network_input` makes of the crop, without the crop leaving the graph.

    Tensors of the graph:
        ``frame`` uint8 ``[frames, H, W, 3]``: one frame for all crops, or one for each.
        ``matrix`` float32 ``[crops, 2, 3]``: crop px → frame px, :func:`~lp_edge.runtime.device_inputs.sampling_matrix` of ``Crop.to_crop``.
        ``image`` uint8 ``[crops, size / reduce, size / reduce, 3]``.

    Args:
        size: side of the crops, px.
        reduce: whole factor by which the crops are reduced afterwards, a divisor of ``size``: 2 gives the networks' 256 px.
        flavor: see :data:`OPSETS`.

    Raises:
        ConfigError: ``size`` or ``reduce`` does not fit, or the flavour is unknown.

    Example:
        >>> [value.name for value in crop_graph(256).graph.input]
        ['frame', 'matrix']
    """
    _check_sides(size=size)
    if reduce < 1 or size % reduce:
        raise ConfigError(f"reduce is {reduce}", f"expected a divisor of {size}", "use 1 or 2")
    side = size // reduce
    inputs: dict[str, tuple[Shape, torch.dtype]] = {
        FRAME: (("frames", "H", "W", 3), _U8),
        MATRIX: (("crops", 2, 3), _F32),
    }
    return _export(_Crop(size, reduce), inputs, ("crops", side, side, 3), flavor)


def resize_graph(*, flavor: Flavor = "main") -> onnx.ModelProto:
    """Square crops of another size, as :func:`lp_edge.runtime.resample.resize_crop`: averages of areas, or Lanczos over 8 x 8
    pixels. Which of these, and the sizes, are in the weights.

    Tensors of the graph:
        ``crop`` uint8 ``[crops, given, given, 3]``.
        ``weights`` float32 ``[wanted, given]``: :func:`lp_edge.runtime.device_inputs.resize_weights`.
        ``image`` uint8 ``[crops, wanted, wanted, 3]``.

    Args:
        flavor: see :data:`OPSETS`.

    Raises:
        ConfigError: the flavour is unknown.
    """
    inputs: dict[str, tuple[Shape, torch.dtype]] = {
        CROP: (("crops", "given", "given", 3), _U8),
        WEIGHTS: (("wanted", "given"), _F32),
    }
    return _export(_Resize(), inputs, ("crops", "wanted", "wanted", 3), flavor)


def cut_graph(*, flavor: Flavor = "main") -> onnx.ModelProto:
    """Columns of lines of a frame: with lines that lie together in memory, an upright rectangle, as the graphs that paste take it.

    Tensors of the graph:
        ``frame`` uint8 ``[frames, H, W, 3]``: lines of a frame.
        ``columns`` float32 ``[w]``: numbers of columns, 0 to W - 1.
        ``image`` uint8 ``[frames, H, w, 3]``.

    Args:
        flavor: see :data:`OPSETS`.

    Raises:
        ConfigError: the flavour is unknown.
    """
    inputs: dict[str, tuple[Shape, torch.dtype]] = {
        FRAME: (("frames", "H", "W", 3), _U8),
        COLUMNS: (("w",), _F32),
    }
    return _export(_Cut(), inputs, ("frames", "H", "w", 3), flavor)


def paste_graph(*, warp_mask: bool = False, flavor: Flavor = "main") -> onnx.ModelProto:
    """Animated crops into the changed region of a frame, as :meth:`lp_edge.runtime.paste_back.PastePlan.paste`.

    The region comes in and goes out as ``patch``: a dense copy of ``frame[y0:y1, x0:x1]``, or whole rows ``frame[y0:y1]``
    with weights of 0 beside the region. Nothing outside of it is read or written.

    Tensors of the graph:
        ``patch`` uint8 ``[patches, h, w, 3]``: one for all crops (a still source), or one for each.
        ``crop`` uint8 ``[crops, side, side, 3]``.
        ``matrix`` float32 ``[placements, 2, 3]``: patch px → crop px, ``paste_matrix``; one for all, or one for each.
        ``weight`` uint8 ``[placements, h, w, 1]``: ``PastePlan.weight``; or, with ``warp_mask``,
        ``mask`` uint8 ``[masks, side, side, 1]``: ``crop_mask()``, one for all or one for each crop.
        ``image`` uint8 ``[crops, h, w, 3]``.

    Args:
        warp_mask: warp the mask with the crop, for a source that moves; a still one's weight is made once.
        flavor: see :data:`OPSETS`.

    Raises:
        ConfigError: the flavour is unknown.
    """
    weight: Shape = ("masks", "side", "side", 1) if warp_mask else ("placements", "h", "w", 1)
    inputs: dict[str, tuple[Shape, torch.dtype]] = {
        PATCH: (("patches", "h", "w", 3), _U8),
        CROP: (("crops", "side", "side", 3), _U8),
        MATRIX: (("placements", 2, 3), _F32),
        MASK if warp_mask else WEIGHT: (weight, _U8),
    }
    return _export(_Paste(warp_mask), inputs, ("crops", "h", "w", 3), flavor)


def rect_paste_graph(*, flavor: Flavor = "main") -> onnx.ModelProto:
    """Animated crops into an upright rectangle of a larger size, as :func:`lp_edge.runtime.paste_back.paste_back`: enlarged by
    cubic interpolation, blended by ``soft_mask``. A crop of the rectangle's size needs no graph: it is copied.

    Tensors of the graph:
        ``patch`` uint8 ``[patches, h, w, 3]``: ``frame[y0:y1, x0:x1]``, one for all crops or one for each.
        ``crop`` uint8 ``[crops, crop_h, crop_w, 3]``.
        ``weight`` uint8 ``[placements, h, w, 1]``: ``soft_mask(h, w)``, one for all or one for each.
        ``image`` uint8 ``[crops, h, w, 3]``.

    Args:
        flavor: see :data:`OPSETS`.

    Raises:
        ConfigError: the flavour is unknown.
    """
    inputs: dict[str, tuple[Shape, torch.dtype]] = {
        PATCH: (("patches", "h", "w", 3), _U8),
        CROP: (("crops", "crop_h", "crop_w", 3), _U8),
        WEIGHT: (("placements", "h", "w", 1), _U8),
    }
    return _export(_RectPaste(), inputs, ("crops", "h", "w", 3), flavor)


# -- the graphs of the package --------------------------------------------------------------------------

_SHIPPED: Final[Mapping[str, Callable[..., onnx.ModelProto]]] = {
    names.CROP_512_HALVED: functools.partial(crop_graph, CROP_SIZE, reduce=2),
    names.CUT_REGION: cut_graph,
    names.PASTE_MOVING: functools.partial(paste_graph, warp_mask=True),
    names.PASTE_RECT: rect_paste_graph,
    names.PASTE_STILL: paste_graph,
    names.RESIZE_CROPS: resize_graph,
}


def shipped() -> dict[str, onnx.ModelProto]:
    """The graphs of ``runtime/device_graphs`` by name of the file. Opset 16, which both flavours' targets take; equal
    versions of PyTorch give equal bytes."""
    return {name: make(flavor="tensorrt8") for name, make in _SHIPPED.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write :func:`shipped` to a folder, which must exist.

    Raises:
        OutputError: a file cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m lp_edge.export.device_graphs", description=main.__doc__)
    usual = Path(pixels.__file__).parent / "device_graphs"
    parser.add_argument("folder", type=Path, nargs="?", default=usual, help=f"default: {usual}")
    folder = parser.parse_args(arguments).folder
    for name, model in shipped().items():
        save(model, folder / f"{name}.onnx")
    return 0


if __name__ == "__main__":
    sys.exit(main())
