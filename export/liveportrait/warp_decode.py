"""The ``warp_decode`` graph of the LivePortrait family: W and G fused, without 5-D sampling, exact and cheaper than both.

The networks (:mod:`lp_edge.export.networks`) say what is computed; this module computes the same from the same weights with
fewer operations and with operators that every target has. Each rewriting is exact in real numbers; what remains is rounding.
:class:`Reductions` switches those that one might want to measure. Always done: batch norm and spectral norm are
folded into the convolutions, and no tensor holds a sampling grid per keypoint:

* A sparse motion shifts the whole volume by a constant, so its position along x depends on x alone, likewise y and z.
  Linear interpolation with zero padding along one axis is a product with the matrix max(0, 1 - |position - index|).
* A Gaussian around a keypoint is the product of three 1-D ones.
* The masks sum to one, so the deformation is the identity plus the masked sum of the shifts.

Coordinates are those of ``torch.nn.functional.grid_sample(align_corners=False)``: a volume of W columns spans -1..1, the
centre of column i lies at (2i + 1) / W - 1, whereas the network's own grid puts column i at 2i / (W - 1) - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from lp_edge.engines import names
from lp_edge.errors import ConfigError

__all__ = ["DepthConv", "Flavor", "ParityConv", "PhaseConv", "PlanarConv", "Reductions", "WarpDecode"]

Flavor = Literal["main", "tensorrt8"]
"""``main``: opset 17 with InstanceNormalization; ``tensorrt8``: opset 16, made of elementary operators."""

State = Mapping[str, Tensor]

_CHANNELS, _DEPTH, _SIDE = 32, 16, 64  # of the feature volume
_KEYPOINTS = 21
_MOTIONS = _KEYPOINTS + 1  # the first one stands still
_COMPRESSED = 4
_HEAT_VARIANCE = 0.01
_NORM_EPS = 1e-5
_SLOPE_THIRD, _SLOPE_SPADE = 0.01, 0.2
_MIDDLE_BLOCKS = 6
_LEVELS = 5
# Convolution kernels of CPUs (16 floats of AVX-512) and of tensor cores (8 halves) want multiples of these.
_BLOCK = 16
_GROUP = 64


@dataclass(frozen=True)
class Reductions:
    """What is rewritten. All combinations compute the same picture; the default is the fastest on a CPU.

    Attributes:
        planar_mask: the 7x7x7 convolution of the masks as a 2-D one over all slices with an output per tap in depth.
        pad_channels: widths of the dense-motion network padded with zeros to a multiple of 16.
        split_occlusion: the 7x7 convolution to one channel as a product per tap, followed by the sum over shifts.
        volume_phases: the hourglass convolves before it enlarges.
        gather: the final warp by eight gathers instead of two 2-D samplings of the unfolded volume.
        merge_shared: convolutions of one block that share the condition map, in one.
        merge_gamma_beta: scale and offset of a SPADE, in one convolution.
        phases_2x, phases_4x: SPADE's first convolution before the condition is enlarged, in the first and second
            upsampling block.
        fold_shortcut: the 1x1 shortcut goes through the offset's convolution.
        normalise_small: instance norm before the enlargement.
        channel_groups: wide maps of the upsampling blocks are made and consumed 64 channels at a time, to save memory.
        keep_blocked: an identity (pooling of one pixel) before SPADE's product, at which ONNX Runtime's CPU kernels
            change to the blocked layout that they then need not leave; costs nothing elsewhere.
        fast_depth: the last convolution of the hourglass by Winograd's F(2, 3) in depth, that of the masks with shared
            products for even and odd slices; in float32 only.
        ordered: ties that make a runtime finish one part before it begins the next. ONNX Runtime walks back from the output
            and would make the scales and offsets of all blocks before the first block runs; each map that then waits
            takes memory.
    """

    planar_mask: bool = True
    pad_channels: bool = True
    split_occlusion: bool = True
    volume_phases: bool = True
    gather: bool = False
    merge_shared: bool = False
    merge_gamma_beta: bool = False
    phases_2x: bool = True
    phases_4x: bool = True
    fold_shortcut: bool = True
    normalise_small: bool = True
    channel_groups: bool = True
    keep_blocked: bool = True
    fast_depth: bool = True
    ordered: bool = True


# -- convolutions ---------------------------------------------------------------------------------------------------


def _conv(weight: Tensor, bias: Tensor | None, padding: int | tuple[int, ...] | None = None) -> nn.Module:
    """A convolution with the given weight ``[O, I, …]``; "same" padding unless stated."""
    make = {2: nn.Conv2d, 3: nn.Conv3d}[weight.dim() - 2]
    kernel = tuple(weight.shape[2:])
    same = tuple(k // 2 for k in kernel)
    with torch.device("meta"):
        conv = make(
            weight.shape[1],
            weight.shape[0],
            kernel,  # type: ignore[arg-type,unused-ignore]
            padding=same if padding is None else padding,  # type: ignore[arg-type,unused-ignore]
            bias=bias is not None,
        )
    conv.weight = nn.Parameter(weight.detach().to(torch.float32).contiguous(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().to(torch.float32).contiguous(), requires_grad=False)
    return conv


def _weights(state: State, key: str) -> tuple[Tensor, Tensor]:
    """Weight and bias (zero where there is none) of a convolution in float64; spectral norm is divided out."""
    if f"{key}.weight_orig" in state:
        weight = state[f"{key}.weight_orig"].double()
        u, v = state[f"{key}.weight_u"].double(), state[f"{key}.weight_v"].double()
        weight = weight / torch.dot(u, torch.mv(weight.flatten(1), v))
    else:
        weight = state[f"{key}.weight"].double()
    bias = state.get(f"{key}.bias")
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias.double()


def _normalised(state: State, key: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``key.conv`` with the batch norm ``key.norm`` folded in, float64."""
    weight, bias = _weights(state, f"{key}.conv")
    gain, offset, mean, variance = (
        state[f"{key}.norm.{n}"].double() for n in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / torch.sqrt(variance + _NORM_EPS)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), (bias - mean) * scale + offset


class PlanarConv(nn.Module):
    """A cubic 3-D convolution as a 2-D one: slices are the batch, every tap in depth is a group of outputs.

    2-D kernels are better served by runtimes. The taps' outputs are summed by a product with a matrix of ones and zeros,
    in which the zero padding in depth is contained.

    Args:
        weight: ``[O, I, K, K, K]``, K odd.
        bias: ``[O]``.
        size: depth, height and width of the volume.
    """

    gather: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, size: tuple[int, int, int]) -> None:
        super().__init__()
        outputs, _, taps = weight.shape[:3]
        depth, height, width = size
        middle = taps // 2
        biases = torch.zeros(taps, outputs, dtype=weight.dtype)
        biases[middle] = bias  # the middle tap is never outside
        self.conv = _conv(weight.transpose(1, 2).transpose(0, 1).flatten(0, 1), biases.flatten())
        gather = torch.zeros(depth, depth, taps)
        for tap in range(taps):
            for z in range(max(0, middle - tap), min(depth, depth + middle - tap)):
                gather[z, z + tap - middle, tap] = 1.0
        self.register_buffer("gather", gather.flatten(1))
        self.depth, self.taps, self.plane = depth, taps, outputs * height * width

    def forward(self, x: Tensor) -> Tensor:
        """Slices ``[N · D, I, H, W]`` → ``[N, D, O · H · W]``."""
        y = self.conv(x)
        return self.gather @ y.reshape(-1, self.depth * self.taps, self.plane)


def _interleave(x: Tensor, factor: int, channels: int, size: tuple[int, int]) -> Tensor:
    """Phases ``[N, f · f · C, h, w]`` (by rows, then columns) to pictures ``[N, C, f · h, f · w]``."""
    h, w = size
    x = x.reshape(-1, factor, factor, channels, h, w)
    # Rows first, columns last: the last step is then a plain matrix transpose.
    x = x.permute(0, 2, 3, 4, 1, 5).reshape(-1, factor, channels * h * factor * w)
    return x.transpose(1, 2).reshape(-1, channels, factor * h, factor * w)


class ParityConv(nn.Module):
    """As :class:`PlanarConv`, with three quarters of the products: even and odd slices share a convolution.

    Let A be the taps that meet slices of the result's own parity, B the others. Even results are A e + B o, odd ones
    A o + B e (shifted), and A e + B o = (A + B)(e + o) - A o - B e: three convolutions of half the slices and half the taps
    instead of four (the fast FIR algorithm of two phases).

    Args:
        weight: ``[O, I, K, K, K]``, K = 3, 7, 11 …, so that the middle tap is odd.
        bias: ``[O]``.
        size: depth (even), height and width of the volume.
    """

    gather: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, size: tuple[int, int, int]) -> None:
        super().__init__()
        outputs, _, taps = weight.shape[:3]
        depth, height, width = size
        pairs, middle = depth // 2, taps // 2
        a, b = list(range(1, taps, 2)), list(range(0, taps, 2))
        slices = weight.unbind(2)
        # (A + B) by offset in pairs: tap 2 k of B stands beside tap 2 k - 1 of A.
        both = [slices[t] + slices[t - 1] if t else slices[t] for t in b]
        zero = torch.zeros_like(bias)

        def conv(kernels: list[Tensor], biased: int, times: int) -> nn.Module:
            return _conv(
                torch.cat(kernels),
                torch.cat([bias * times if i == biased else zero for i in range(len(kernels))]),
            )

        self.odd = conv([slices[t] for t in a], a.index(middle), 1)
        self.even = conv([slices[t] for t in b], -1, 0)
        self.both = conv(both, b.index(middle + 1), 2)  # twice: even results lose it once with A o
        parts = [torch.zeros(depth, pairs, n) for n in (len(a), len(b), len(b))]
        for i in range(pairs):
            for n, t in enumerate(a):
                if 0 <= (j := i + (t - middle) // 2) < pairs:
                    parts[0][2 * i, j, n], parts[0][2 * i + 1, j, n] = -1.0, 1.0
            for n, t in enumerate(b):
                j = i + (t - middle - 1) // 2
                if 0 <= j < pairs:
                    parts[1][2 * i, j, n], parts[2][2 * i, j, n] = -1.0, 1.0
                if 0 <= j + 1 < pairs:
                    parts[1][2 * i + 1, j + 1, n] = 1.0
        self.register_buffer("gather", torch.cat([part.flatten(1) for part in parts], 1))
        self.inputs, self.pairs, self.size = int(weight.shape[1]), pairs, (height, width)
        self.counts, self.plane = [pairs * n for n in (len(a), len(b), len(b))], outputs * height * width

    def forward(self, x: Tensor) -> Tensor:
        """Slices ``[N · D, I, H, W]`` → ``[N, D, O · H · W]``."""
        even, odd = x.reshape(-1, 2 * self.inputs, *self.size).split(self.inputs, 1)
        products = [
            conv(part).reshape(-1, count, self.plane)
            for conv, part, count in zip(
                (self.odd, self.even, self.both), (odd, even, even + odd), self.counts, strict=True
            )
        ]
        return self.gather @ torch.cat(products, 1)


class DepthConv(nn.Module):
    """A 3x3x3 convolution of slices as four 2-D ones per two slices: Winograd's F(2, 3) in depth, 4 products instead of 6.

    With inputs a, b, c, d and taps p, q, r: ap + bq + cr = m0 + m1 + m2 and bp + cq + dr = m1 - m2 + m3 for
    m0 = (a - c) p, m1 = (b + c) (p + q + r) / 2, m2 = (c - b) (p - q + r) / 2, m3 = (d - b) r (Lavin and Gray, 2015, section 4).

    Args:
        weight: ``[O, I, 3, 3, 3]``.
        bias: ``[O]``.
        size: depth (even), height and width.
    """

    def __init__(self, weight: Tensor, bias: Tensor, size: tuple[int, int, int]) -> None:
        super().__init__()
        p, q, r = weight.unbind(2)
        self.outputs, self.inputs, self.size = int(weight.shape[0]), int(weight.shape[1]), size
        self.convs = nn.ModuleList(
            (
                _conv(p, None),
                _conv((p + q + r) / 2, bias),  # part of both results
                _conv((p - q + r) / 2, None),
                _conv(r, None),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Slices ``[N · D, I, H, W]`` → ``[N · D, O, H, W]``."""
        depth, height, width = self.size
        pairs = depth // 2

        def flat(t: Tensor) -> Tensor:
            return t.reshape(-1, self.inputs, height, width)

        even, odd = x.reshape(-1, pairs, 2 * self.inputs, height, width).split(self.inputs, 2)
        before = torch.cat((odd[:, :1] * 0, odd[:, :-1]), 1)
        after = torch.cat((even[:, 1:], even[:, :1] * 0), 1)
        m0, m1, m2, m3 = (
            conv(flat(t))
            for conv, t in zip(self.convs, (before - odd, even + odd, odd - even, after - even), strict=True)
        )
        return torch.cat((m0 + (m1 + m2), m3 + (m1 - m2)), 1).reshape(-1, self.outputs, height, width)


class PhaseConv(nn.Module):
    """Zero-padded 3x3 convolution of a map that is enlarged by nearest neighbour, computed before the enlargement.

    Along one side, the first row of a block sees the row above and the own one, the last row the own and the one below,
    all others the own alone: 5 products with merged taps instead of 3 per row. In two dimensions 16 instead of 36 at
    2x, 25 instead of 144 at 4x. A 3-D kernel is enlarged in height and width only.

    Args:
        weight: ``[O, I, 3, 3]`` or ``[O, I, 3, 3, 3]``.
        bias: ``[O]``.
        factor: 2 or 4.
        size: height and width before the enlargement.
        depth: slices, for a 3-D kernel.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, factor: int, size: tuple[int, int], depth: int = 1
    ) -> None:
        super().__init__()
        self.factor, self.size, self.depth = factor, size, depth
        self.volume = weight.dim() == 5
        self.outputs = int(weight.shape[0])
        deep = (1,) if self.volume else ()

        def merged(w: Tensor, dim: int, wide: bool) -> list[Tensor]:
            a, b, c = w.unbind(dim)
            if wide:
                return [torch.stack((a, b + c), dim), torch.stack((a + b, c), dim)]
            return [(a + b + c).unsqueeze(dim)]

        def conv(wide_y: bool, wide_x: bool) -> nn.Module:
            kernels = [k for rows in merged(weight, -2, wide_y) for k in merged(rows, -1, wide_x)]
            return _conv(torch.cat(kernels), bias.repeat(len(kernels)), (*deep, int(wide_y), int(wide_x)))

        self.corner = conv(True, True)
        if factor > 2:
            self.edge_y, self.edge_x, self.inner = conv(True, False), conv(False, True), conv(False, False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, I, (D,) h, w]`` → ``[N, O, (D,) factor · h, factor · w]``."""
        channels = self.outputs * self.depth
        h, w = self.size

        def phases(y: Tensor, wide_y: bool, wide_x: bool) -> list[Tensor]:
            """Phases by rows and columns; a kernel of two taps with a border of one serves both ends."""
            rows, columns = 1 + wide_y, 1 + wide_x
            parts = y.reshape(-1, rows * columns * channels, h + wide_y, w + wide_x).split(channels, 1)
            starts = [(i, j) for i in range(rows) for j in range(columns)]
            return [part[:, :, i : i + h, j : j + w] for part, (i, j) in zip(parts, starts, strict=True)]

        corners = phases(self.corner(x), True, True)
        if self.factor == 2:
            parts = corners
        else:
            top, bottom = phases(self.edge_y(x), True, False)
            left, right = phases(self.edge_x(x), False, True)
            inner = phases(self.inner(x), False, False)[0]
            middle = self.factor - 2
            row = [left, *[inner] * middle, right]
            parts = [
                corners[0],
                *[top] * middle,
                corners[1],
                *row * middle,
                corners[2],
                *[bottom] * middle,
                corners[3],
            ]
        out = _interleave(torch.cat(parts, 1), self.factor, channels, self.size)
        if not self.volume:
            return out
        return out.reshape(-1, self.outputs, self.depth, self.factor * h, self.factor * w)


class _Enlarged(nn.Module):
    """The plain form of :class:`PhaseConv`: enlarge, then convolve."""

    def __init__(self, weight: Tensor, bias: Tensor, factor: int) -> None:
        super().__init__()
        self.conv = _conv(weight, bias)
        self.factor = (1.0,) * (weight.dim() - 4) + (float(factor),) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    """``x`` with zeros appended along ``dim`` up to ``size``."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _after(x: Tensor, done: Tensor) -> Tensor:
    """``x``, to be used when ``done [N, C, H, W]`` is there: a runtime cannot know that the product is always zero."""
    # The first pixel by pooling, with steps as wide as the largest map: unlike a slice it needs no change of layout.
    return x + 0.0 * F.avg_pool2d(done, 1, 4 * _SIDE)[:, :1]


# -- W --------------------------------------------------------------------------------------------------------------


def _sparse_inputs_order() -> list[int]:
    """Where the hourglass' inputs of this module (all features, then the heat maps) stand in the checkpoint's weights.

    There, five channels belong together: heat map and features of one motion. The first motion's heat map is always zero
    and left out.
    """
    group = _COMPRESSED + 1
    features = [m * group + 1 + c for m in range(_MOTIONS) for c in range(_COMPRESSED)]
    return features + [m * group for m in range(1, _MOTIONS)]


class SparseMotions(nn.Module):
    """Inputs of the hourglass: the volume under every sparse motion, and the heat maps; see the module text."""

    still_first: Tensor
    padding: Tensor
    used: Tensor

    def __init__(self, heat_maps: int, size: tuple[int, int, int]) -> None:
        """``heat_maps``: number of heat maps to return, beyond 21 they are zero."""
        super().__init__()
        self.size, self.heat_maps = size, heat_maps
        # Zero rows before and after keypoints as products: a Pad would do, but exports as a dozen operators.
        self.register_buffer("still_first", torch.eye(_KEYPOINTS + 1)[:, 1:])
        self.register_buffer("padding", torch.eye(heat_maps)[:, :_KEYPOINTS])
        self.register_buffer("used", self.padding.sum(1, keepdim=True))
        for axis, n in zip("zyx", size, strict=True):
            index = torch.arange(n, dtype=torch.float64)
            self.register_buffer(f"index_{axis}", index.float())
            self.register_buffer(f"place_{axis}", (index * n / (n - 1) - 0.5).float())
            self.register_buffer(f"grid_{axis}", (2 * index / (n - 1) - 1).float())

    def _hat(self, axis: str, shift: Tensor) -> Tensor:
        """Interpolation matrices ``[N, 22, to, from]`` of motions shifted by ``shift [N, 22]``."""
        index, place = self.get_buffer(f"index_{axis}"), self.get_buffer(f"place_{axis}")
        position = place + (index.numel() / 2) * shift[..., None]
        return F.relu(1 - (position[..., None] - index).abs())

    def features(self, volume: Tensor, shift: Tensor) -> Tensor:
        """``volume [S, C, D, H, W]`` under the motions ``shift [N, 22, 3]`` → ``[N, 22 · C, D, H, W]``."""
        d, h, w = self.size
        c = _COMPRESSED
        x_hat, y_hat, z_hat = (self._hat(a, shift[..., i]) for i, a in enumerate("xyz"))
        v = volume.reshape(-1, 1, c * d * h, w) @ x_hat.transpose(2, 3)
        v = y_hat[:, :, None] @ v.reshape(-1, _MOTIONS, c * d, h, w)
        v = z_hat[:, :, None] @ v.reshape(-1, _MOTIONS, c, d, h * w)
        return v.reshape(-1, _MOTIONS * c, d, h, w)

    def _bells(self, kp: Tensor) -> tuple[Tensor, Tensor]:
        """Heat maps of ``kp [N, 21, 3]`` as factors ``[N, heat_maps, D · H]`` and ``[N, heat_maps, W]``."""
        kp = self.padding @ kp
        x, y, z = (
            torch.exp((self.get_buffer(f"grid_{a}") - kp[..., i : i + 1]) ** 2 * (-0.5 / _HEAT_VARIANCE))
            for i, a in enumerate("xyz")
        )
        z = z * self.used
        return (z[..., None] * y[:, :, None]).reshape(-1, self.heat_maps, self.size[0] * self.size[1]), x

    def heat(self, kp_source: Tensor, kp_driving: Tensor) -> Tensor:
        """Heat maps of the driving minus those of the source keypoints, ``[N, heat_maps, D, H, W]``."""
        zy_d, x_d = self._bells(kp_driving)
        zy_s, x_s = self._bells(kp_source)
        left = torch.stack((zy_d, -zy_s), 3)
        right = torch.stack((x_d, x_s), 2)
        return (left @ right).reshape(-1, self.heat_maps, *self.size)

    def forward(self, compressed: Tensor, kp_source: Tensor, kp_driving: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs ``[N, 88 + heat_maps, D, H, W]`` and the shifts ``[N, 22, 3]``."""
        shift = self.still_first @ (kp_source - kp_driving)
        heat = self.heat(kp_source, kp_driving)
        return torch.cat((self.features(compressed, shift), heat), 1), shift


class DenseMotion(nn.Module):
    """Deformation and occlusion; see :class:`lp_edge.export.networks.WarpingNetwork`."""

    identity: Tensor

    def __init__(self, state: State, reductions: Reductions, dtype: torch.dtype) -> None:
        """``state``: of the dense-motion network."""
        super().__init__()
        block = _BLOCK if reductions.pad_channels else 1
        order = _sparse_inputs_order()
        inputs = -(-len(order) // block) * block
        narrow = state[f"hourglass.decoder.up_blocks.{_LEVELS - 1}.conv.weight"].shape[0]
        width = narrow + inputs
        self.sparse = SparseMotions(inputs - len(order) + _KEYPOINTS, (_DEPTH, _SIDE, _SIDE))
        self.dtype = dtype

        down, up = [], []
        for level in range(_LEVELS):
            w, b = _normalised(state, f"hourglass.encoder.down_blocks.{level}")
            if level == 0:
                w = _padded(w[:, order], 1, inputs)
            down.append(_conv(w, b))
            w, b = _normalised(state, f"hourglass.decoder.up_blocks.{level}")
            side = _SIDE >> (_LEVELS - level)  # before the enlargement
            # Phases need a border of one: on the smallest maps that eats what they save.
            if reductions.volume_phases and side >= 8:
                up.append(PhaseConv(w, b, 2, (side, side), _DEPTH))
            else:
                up.append(_Enlarged(w, b, 2))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

        w, b = _normalised(state, "hourglass.decoder")
        outputs = [*range(narrow), *(narrow + i for i in order)]
        w = _padded(w[:, outputs], 1, width)
        rows = -(-w.shape[0] // block) * block
        w, b = _padded(w, 0, rows), _padded(b, 0, rows)
        size = (_DEPTH, _SIDE, _SIDE)
        # Differences of products cost accuracy that half precision does not have, and tensor cores do not need it.
        self.fast = reductions.fast_depth and dtype == torch.float32
        self.last = DepthConv(w, b, size) if self.fast else _conv(w, b)
        w, bias = _weights(state, "mask")
        w = _padded(w, 1, rows)
        planar = ParityConv if self.fast else PlanarConv
        self.mask = planar(w, bias, size) if reductions.planar_mask else _conv(w, bias)
        self.planar, self.rows, self.width = reductions.planar_mask, int(rows), int(width)

        w, bias = _weights(state, "occlusion")  # [1, C · D, 7, 7]
        taps = w.shape[-1]
        w = _padded(w.reshape(1, -1, _DEPTH, taps, taps), 1, rows).transpose(1, 2).flatten(1, 2)
        self.occlusion: nn.Module
        if reductions.split_occlusion:
            per_tap = w[0].permute(1, 2, 0).flatten(0, 1)[..., None, None]
            spread = torch.eye(taps * taps).reshape(1, taps * taps, taps, taps)
            self.occlusion = nn.Sequential(_conv(per_tap, None), _conv(spread, bias))
        else:
            self.occlusion = _conv(w, bias)
        axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in (_DEPTH, _SIDE, _SIDE)]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        self.register_buffer("identity", torch.stack((x, y, z), -1).float())

    def forward(self, compressed: Tensor, kp_source: Tensor, kp_driving: Tensor) -> tuple[Tensor, Tensor]:
        """Returns deformation float32 ``[N, 16, 64, 64, 3]`` and occlusion map float32 ``[N, 1, 64, 64]``."""
        x, shift = self.sparse(compressed, kp_source, kp_driving)
        levels = [_to(x, self.dtype)]
        for conv in self.down:
            x, side = F.relu(conv(levels[-1])), _SIDE >> (len(levels) - 1)
            # 2-D pooling of all slices: unlike its 3-D form it knows float16 everywhere
            x = F.avg_pool2d(x.reshape(-1, conv.out_channels * _DEPTH, side, side), 2)
            levels.append(x.reshape(-1, conv.out_channels, _DEPTH, side // 2, side // 2))
        x = levels.pop()
        for conv in self.up:
            x = torch.cat((F.relu(conv(x)), levels.pop()), 1)
        rows, area = self.rows, _SIDE * _SIDE
        if self.fast:
            x = x.transpose(1, 2).reshape(-1, self.width, _SIDE, _SIDE)
            slices = F.relu(self.last(x))
        else:
            slices = F.relu(self.last(x)).transpose(1, 2).reshape(-1, rows, _SIDE, _SIDE)
        if self.planar:
            logits = self.mask(slices)
        else:
            logits = self.mask(slices.reshape(-1, _DEPTH, rows, _SIDE, _SIDE).transpose(1, 2))
        logits = _to(logits, torch.float32)
        if self.planar:
            mask = logits.reshape(-1, _DEPTH, _MOTIONS, area).softmax(2)
            moved = (shift.transpose(1, 2)[:, None] @ mask).transpose(2, 3)
        else:
            mask = logits.reshape(-1, _MOTIONS, _DEPTH * area).softmax(1)
            moved = (shift.transpose(1, 2) @ mask).transpose(1, 2)
        deformation = self.identity + moved.reshape(-1, _DEPTH, _SIDE, _SIDE, 3)
        occlusion = self.occlusion(slices.reshape(-1, _DEPTH * rows, _SIDE, _SIDE))
        return deformation, torch.sigmoid(_to(occlusion, torch.float32))


class VolumeWarp(nn.Module):
    """``grid_sample`` of a volume with linear interpolation and zeros outside, without an operator of rank 5.

    Folded: the slices, each with a row of zeros below, are stacked into one tall picture. Sampling it at the slices next
    to the position, with the row clamped to the zeros on either side, and blending gives the 3-D result. The row
    coordinate spans all slices, which costs accuracy (about 1e-4 of the features' scale).

    Gather: the eight neighbours by index. As accurate as PyTorch.

    Args:
        gather: which of the two.
        size: channels, depth, height and width of the volume.
    """

    def __init__(self, gather: bool, size: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.by_gather, self.size = gather, size

    def forward(self, volume: Tensor, grid: Tensor) -> Tensor:
        """``volume [S, C, D, H, W]`` at ``grid [N, D', H', W', 3]`` (x, y, z; float32) → ``[N, C, D' · H' · W']``."""
        x, y, z = grid.flatten(1, 3).unbind(-1)
        # An Expand of unknown batch exports as six operators on shapes; a product broadcasts everywhere.
        frames = x[:, :1] * 0 + 1
        return (self._gathered if self.by_gather else self._folded)(volume, frames, x, y, z)

    @staticmethod
    def _ends(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Neighbours of a pixel position: index (inside 0..size-1, float) and weight (0 where outside) of each."""
        position = position.clamp(-1.0, float(size))  # further out all weights are 0 as well
        low = torch.floor(position)
        part = position - low
        ends = []
        for index, weight in ((low, 1 - part), (low + 1, part)):
            inside = index.clamp(0.0, size - 1.0)
            # The distance to the inside is a whole number.
            ends.append((inside, weight * (1 - (index - inside).abs()).clamp(0.0, 1.0)))
        return ends

    def _folded(self, volume: Tensor, frames: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        channels, depth, height, width = self.size
        rows = depth * (height + 1)
        picture = torch.cat((volume, volume[:, :, :, :1] * 0), 3).reshape(-1, channels, rows, width)
        picture = picture * frames[:, :, None, None]
        row = (((y + 1) * height - 1) / 2).clamp(-1.0, float(height))
        x = x.clamp(-2.0, 2.0)
        parts = []
        for index, weight in self._ends(((z + 1) * depth - 1) / 2, depth):
            # the centre of pixel r of n lies at (2 r + 1) / n - 1
            unit = (2 * (row + index * (height + 1)) + 1) * (1.0 / rows) - 1
            points = torch.stack((x, unit), -1)[:, None]
            part = F.grid_sample(picture, points, mode="bilinear", padding_mode="zeros", align_corners=False)
            parts.append(part.squeeze(2) * weight[:, None])
        return parts[0] + parts[1]

    def _gathered(self, volume: Tensor, frames: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        channels, depth, height, width = self.size
        cells = depth * height * width
        # channels last: one neighbour of all channels is one run of memory
        table = (volume.reshape(-1, channels, cells).transpose(1, 2) * frames[..., None]).reshape(
            -1, channels
        )
        frame = torch.cumsum(frames, 0) - 1  # number of the frame
        ends = [self._ends(((v + 1) * n - 1) / 2, n) for v, n in ((z, depth), (y, height), (x, width))]
        out = torch.zeros(())
        for zi, zw in ends[0]:
            for yi, yw in ends[1]:
                for xi, xw in ends[2]:
                    index = ((zi * height + yi) * width + xi).to(torch.int32) + frame.to(torch.int32) * cells
                    out = out + table[index] * (zw * yw * xw)[..., None]
        return out.transpose(1, 2)


# -- G --------------------------------------------------------------------------------------------------------------


class _InstanceNormOperator(torch.autograd.Function):
    """Instance norm that exports as one operator, without the exporter's warning that it normalises by the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: int) -> Tensor:
        return torch.instance_norm(x, None, None, None, None, True, 0.0, _NORM_EPS, False)

    @staticmethod
    def symbolic(g: Any, x: Any, channels: int) -> Any:
        one, zero = (g.op("Constant", value_t=torch.full((channels,), v)) for v in (1.0, 0.0))
        return g.op("InstanceNormalization", x, one, zero, epsilon_f=_NORM_EPS).setType(x.type())


class InstanceNorm(nn.Module):
    """Parameter-free instance norm of ``[N, C, H, W]`` in float32; ``decomposed``: of elementary operators."""

    def __init__(self, channels: int, decomposed: bool) -> None:
        super().__init__()
        self.channels, self.decomposed = channels, decomposed

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as ``x``."""
        y = _to(x, torch.float32)
        if self.decomposed:
            y = y - y.mean((2, 3), keepdim=True)
            y = y / torch.sqrt((y * y).mean((2, 3), keepdim=True) + _NORM_EPS)
        else:
            y = _InstanceNormOperator.apply(y, self.channels)
        return _to(y, x.dtype)


class _Modulation(nn.Module):
    """SPADE after its first convolution: normalised x · scale + offset; scale is 1 + gamma with the 1 in its bias."""

    def __init__(self, state: State, key: str, part: slice, merge: bool, offset: bool) -> None:
        """``part``: channels of x to work on. Without ``offset`` only the scale is applied."""
        super().__init__()
        scale, scale_bias = (t[part] for t in _weights(state, f"{key}.mlp_gamma"))
        shift, shift_bias = (t[part] for t in _weights(state, f"{key}.mlp_beta"))
        scale_bias = scale_bias + 1
        self.channels = int(scale.shape[0])
        self.offset, self.merge = offset, merge and offset
        if self.merge:
            self.both = _conv(torch.cat((scale, shift)), torch.cat((scale_bias, shift_bias)))
            return
        self.scale = _conv(scale, scale_bias)
        if offset:
            self.shift = _conv(shift, shift_bias)

    def forward(self, normalised: Tensor, hidden: Tensor) -> Tensor:
        if self.merge:
            scale, shift = self.both(hidden).split(self.channels, 1)
            return normalised * scale + shift
        y = normalised * self.scale(hidden)
        return y + self.shift(hidden) if self.offset else y


class _ModulatedConv(nn.Module):
    """A convolution of SPADE's result, by groups of its input channels, so that few wide maps are alive at a time.

    Args:
        state, key: of the SPADE.
        weight, bias: of the convolution.
        group: channels at a time.
        slope: of the activation between the two, 1 for none.
        enlarge: the normalised maps come at half the size.
        fold: without an activation and for a 1x1 kernel, SPADE's offset and the convolution are one.
    """

    def __init__(
        self,
        state: State,
        key: str,
        weight: Tensor,
        bias: Tensor | None,
        reductions: Reductions,
        *,
        group: int,
        slope: float,
        enlarge: bool,
        fold: bool = False,
    ) -> None:
        super().__init__()
        starts = range(0, int(weight.shape[1]), group)
        self.group, self.slope, self.enlarge, self.fold = group, slope, enlarge, fold
        self.keep_blocked = reductions.keep_blocked
        # Groups in a chain have their scales and offsets made before it, groups at will their partial results.
        self.ordered = reductions.ordered and group * (1 if fold else 2) <= int(weight.shape[0])
        self.modulations = nn.ModuleList(
            _Modulation(state, key, slice(i, i + group), reductions.merge_gamma_beta, not fold)
            for i in starts
        )
        self.convs = nn.ModuleList(_conv(weight[:, i : i + group], None if i else bias) for i in starts)
        if fold:
            self.shift = _conv(
                *(torch.tensordot(weight[:, :, 0, 0], t, 1) for t in _weights(state, f"{key}.mlp_beta"))
            )

    def forward(self, normalised: Tensor, hidden: Tensor) -> Tensor:
        out = self.shift(hidden) if self.fold else None
        parts = normalised.split(self.group, 1) if len(self.convs) > 1 else (normalised,)
        for n, modulation, conv in zip(parts, self.modulations, self.convs, strict=True):
            if self.ordered and out is not None and len(self.convs) > 1:
                n = _after(n, out)
            if self.keep_blocked:
                n = F.avg_pool2d(n, 1)
            if self.enlarge:
                n = F.interpolate(n, scale_factor=2.0, mode="nearest")
            y = modulation(n, hidden)
            y = conv(y if self.slope == 1 else F.leaky_relu(y, self.slope))
            out = y if out is None else out + y
        return out


class _Block(nn.Module):
    """Residual SPADE block whose maps are ``factor`` times as large as the condition; above 1, its input grows by two."""

    def __init__(self, state: State, key: str, factor: int, reductions: Reductions, decomposed: bool) -> None:
        super().__init__()
        self.shortcut = f"{key}.conv_s.weight_orig" in state
        uses = [f"{key}.norm_0", f"{key}.norm_1", *([f"{key}.norm_s"] if self.shortcut else [])]
        firsts = [_weights(state, f"{use}.mlp_shared.0") for use in uses]
        self.hidden = int(firsts[0][0].shape[0])
        self.merge, self.ordered = reductions.merge_shared, reductions.ordered
        if self.merge:
            firsts = [(torch.cat([w for w, _ in firsts]), torch.cat([b for _, b in firsts]))]

        def shared(weight: Tensor, bias: Tensor) -> nn.Module:
            if factor == 1:
                return _conv(weight, bias)
            if reductions.phases_2x if factor == 2 else reductions.phases_4x:
                return PhaseConv(weight, bias, factor, (_SIDE, _SIDE))
            return _Enlarged(weight, bias, factor)

        self.shared = nn.ModuleList(shared(w, b) for w, b in firsts)
        (weight, bias), (weight_1, bias_1) = (_weights(state, f"{key}.conv_{i}") for i in (0, 1))
        inputs, middle = int(weight.shape[1]), int(weight.shape[0])
        self.enlarge_first = factor > 1 and not reductions.normalise_small
        enlarge = factor > 1 and reductions.normalise_small
        group = _GROUP if factor > 1 and reductions.channel_groups else inputs
        self.conv_0 = _ModulatedConv(
            state, uses[0], weight, bias, reductions, group=group, slope=_SLOPE_SPADE, enlarge=enlarge
        )
        self.conv_1 = _ModulatedConv(
            state, uses[1], weight_1, bias_1, reductions, group=middle, slope=_SLOPE_SPADE, enlarge=False
        )
        if self.shortcut:
            fold = reductions.fold_shortcut
            through, _ = _weights(state, f"{key}.conv_s")
            self.conv_s = _ModulatedConv(
                state, uses[2], through, None, reductions, group=group, slope=1, enlarge=enlarge, fold=fold
            )
        self.norm_0, self.norm_1 = (InstanceNorm(c, decomposed) for c in (inputs, middle))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        merged = F.relu(self.shared[0](condition)).split(self.hidden, 1) if self.merge else ()

        def hidden(use: int, done: Tensor) -> Tensor:
            """The SPADE's own view of the condition, made when ``done`` is there."""
            if merged:
                return merged[use]
            return F.relu(self.shared[use](_after(condition, done) if self.ordered else condition))

        if self.enlarge_first:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        n = self.norm_0(x)
        y = self.conv_s(n, hidden(2, x)) if self.shortcut else x
        z = self.conv_0(n, hidden(0, y))
        return y + self.conv_1(self.norm_1(z), hidden(1, z))


# -- the whole ------------------------------------------------------------------------------------------------------


class WarpDecode(nn.Module):
    """W and G as one graph.

    Args:
        warping: :class:`lp_edge.export.networks.WarpingNetwork`, or any module with its state.
        generator: :class:`lp_edge.export.networks.SpadeGenerator`, likewise.
        half: convolutions in float16. Sampling, heat maps, softmax, statistics of the norms and all inputs stay float32.
        flavor: what the graph may be made of.
        reductions: what is rewritten.

    Raises:
        ConfigError: an unknown flavour.

    Example:
        >>> module = WarpDecode(networks.warping, networks.generator)          # doctest: +SKIP
        >>> image, *_ = module(feature_3d, feature_compressed, kp_source, kp_driving)  # doctest: +SKIP
    """

    KEEP = (names.DEFORMATION, names.OCCLUSION_MAP, names.WARPED)
    """What ``forward`` returns after the image, for the exporter to keep as named intermediates."""

    def __init__(
        self,
        warping: nn.Module,
        generator: nn.Module,
        *,
        half: bool = False,
        flavor: Flavor = "main",
        reductions: Reductions | None = None,
    ) -> None:
        super().__init__()
        if flavor not in ("main", "tensorrt8"):
            raise ConfigError(f"flavour {flavor!r}", "expected main or tensorrt8", "choose one of them")
        reductions = reductions or Reductions()
        dtype = torch.float16 if half else torch.float32
        self.dtype = dtype
        w = {k: v.detach() for k, v in warping.state_dict().items()}
        g = {k: v.detach() for k, v in generator.state_dict().items()}
        prefix = "dense_motion_network."
        self.motion = DenseMotion(
            {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}, reductions, dtype
        )
        self.warp = VolumeWarp(reductions.gather, (_CHANNELS, _DEPTH, _SIDE, _SIDE))
        self.third = _conv(*_normalised(w, "third"))
        self.fourth = _conv(*_weights(w, "fourth"))
        self.first = _conv(*_weights(g, "fc"))
        keys = [(f"G_middle_{i}", 1) for i in range(_MIDDLE_BLOCKS)] + [("up_0", 2), ("up_1", 4)]
        self.blocks = nn.ModuleList(
            _Block(g, key, factor, reductions, flavor == "tensorrt8") for key, factor in keys
        )
        self.last = _conv(*_weights(g, "conv_img.0"))
        if half:
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                    module.half()
                elif isinstance(module, PlanarConv):
                    module.gather = module.gather.half()
        self.eval()

    def forward(
        self, feature_3d: Tensor, feature_compressed: Tensor, kp_source: Tensor, kp_driving: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Animate.

        Args:
            feature_3d: float32 ``[S, 32, 16, 64, 64]`` of F; S is 1 (one source for all frames) or N.
            feature_compressed: float32 ``[S, 4, 16, 64, 64]``, the same after W's ``compress``, its norm and ReLU.
            kp_source, kp_driving: float32 ``[N, 21, 3]`` as (x, y, z); -1..1 spans the volume.

        Returns:
            ``image`` uint8 ``[N, 512, 512, 3]`` RGB, truncated from 0..255, then :attr:`KEEP`: deformation float32
            ``[N, 16, 64, 64, 3]``, occlusion map float32 ``[N, 1, 64, 64]`` and the warped features ``[N, 256, 64, 64]``.
        """
        deformation, occlusion = self.motion(feature_compressed, kp_source, kp_driving)
        volume = self.warp(feature_3d, deformation).reshape(-1, _CHANNELS * _DEPTH, _SIDE, _SIDE)
        x = F.leaky_relu(self.third(_to(volume, self.dtype)), _SLOPE_THIRD)
        warped = self.fourth(x) * _to(occlusion, self.dtype)
        x = self.first(warped)
        for block in self.blocks:
            x = block(x, warped)
        x = _to(self.last(F.leaky_relu(x, _SLOPE_SPADE)), torch.float32)
        # The sigmoid keeps 0..255 by itself. Shuffle as numbers: uint8 exists only at the borders of a TensorRT network.
        x = torch.floor(torch.sigmoid(x) * 255.0)
        side = 4 * _SIDE
        x = x.reshape(-1, 3, 2, 2, side, side).permute(0, 4, 2, 5, 3, 1).reshape(-1, 2 * side, 2 * side, 3)
        return x.to(torch.uint8), deformation, occlusion, warped
