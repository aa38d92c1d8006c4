"""The graphs of the LivePortrait family: what goes into each, and how it is made of the networks.

Pixels enter as uint8 NHWC and become 0..1 planes inside. Outputs are float32 in every precision. Batch norms are folded into
convolutions where one precedes, into a scale and a shift elsewhere. The generator with the warp, by far the largest part, is
:mod:`lp_edge.export.liveportrait.warp_decode`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import onnx  # noqa: TID253
import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn.utils.fusion import fuse_conv_bn_eval  # noqa: TID253

from lp_edge.engines import names
from lp_edge.errors import ConfigError
from lp_edge.export.liveportrait.warp_decode import WarpDecode
from lp_edge.export.networks import LivePortraitNetworks
from lp_edge.export.networks.motion import HEADS
from lp_edge.export.onnx_export import Shape, export_onnx

__all__ = ["GRAPHS", "OPSETS", "Appearance", "Motion", "build_graph"]

Flavor = Literal["main", "tensorrt8"]
Precision = Literal["fp32", "fp16"]

OPSETS: Final[Mapping[str, int]] = {"main": 17, "tensorrt8": 16}
"""Flavour -> opset. 17 is the first with LayerNormalization and the last that TensorRT 8.6 reads; at 16 the exporter
writes layer norms as elementary operators, which TensorRT 8.5 needs."""

_SIDE = 256
_VOLUME = (32, 16, 64, 64)
_COMPRESSED = (4, *_VOLUME[1:])
_POINTS = 21
# The head's angle is the expectation over bins of 3 degrees, the first one at -97.5 degrees (headpose_pred_to_degree).
_ANGLES = (names.PITCH, names.YAW, names.ROLL)
_BINS, _BIN, _FIRST_BIN = HEADS[names.PITCH], 3.0, -97.5
_GRN_EPS = 1e-6


def _planes(image: Tensor) -> Tensor:
    """uint8 ``[N, H, W, 3]`` → float32 ``[N, 3, H, W]``, 0..1. Cast first: TensorRT takes uint8 only into a Cast."""
    return image.to(torch.float32).permute(0, 3, 1, 2) / 255.0


class _ConvUnit(nn.Module):
    """Convolution with its batch norm folded in, ReLU, then average pooling where the original has it."""

    def __init__(self, block: Any, pool: int) -> None:
        super().__init__()
        self.conv = fuse_conv_bn_eval(block.conv, block.norm)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return F.avg_pool2d(x, self.pool) if self.pool > 1 else x


class _ResUnit(nn.Module):
    """Residual block in 3-D: the first norm, which nothing precedes, as scale and shift; the second one folded."""

    scale: Tensor
    shift: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        norm = block.norm1
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.double() - norm.running_mean.double() * scale
        self.register_buffer("scale", scale.float().view(-1, 1, 1, 1))
        self.register_buffer("shift", shift.float().view(-1, 1, 1, 1))
        self.conv1 = fuse_conv_bn_eval(block.conv1, block.norm2)
        self.conv2 = copy.deepcopy(block.conv2)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.conv1(F.relu(x * self.scale + self.shift)))
        return x + self.conv2(inner)


class Appearance(nn.Module):
    """F, followed by the part of W that depends on the source alone.

    Args:
        networks: gives F, and W's ``compress`` convolution with its norm.
        half: convolutions in float16, except the compression.
    """

    def __init__(self, networks: LivePortraitNetworks, *, half: bool = False) -> None:
        super().__init__()
        appearance, dense = networks.appearance, networks.warping.dense_motion_network
        self.encoder = nn.Sequential(
            _ConvUnit(appearance.first, 1),
            *(_ConvUnit(block, 2) for block in appearance.down_blocks),
            copy.deepcopy(appearance.second),
        )
        self.blocks = nn.Sequential(*(_ResUnit(block) for block in appearance.resblocks_3d))
        self.compress = fuse_conv_bn_eval(dense.compress, dense.norm)
        self.half_precision = half
        if half:
            self.encoder.half()
            self.blocks.half()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The feature volume of a source.

        Args:
            image: uint8 ``[N, 256, 256, 3]`` RGB.

        Returns:
            ``feature_3d`` float32 ``[N, 32, 16, 64, 64]`` and ``feature_compressed`` float32 ``[N, 4, 16, 64, 64]``.
        """
        x = _planes(image)
        x = self.encoder(x.half() if self.half_precision else x)
        x = self.blocks(x.reshape(-1, *_VOLUME))
        x = x.float() if self.half_precision else x
        return x, F.relu(self.compress(x))


class _MotionUnit(nn.Module):
    """ConvNeXt V2 block in planes: products by position are 1x1 convolutions, so that the response norm sums over
    neighbouring memory; its offset is folded into the convolution after it."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.dwconv, self.norm = block.dwconv, block.norm
        wide, narrow = block.pwconv1, block.pwconv2
        offset = narrow.bias + narrow.weight @ block.grn.beta.flatten()
        self.wide = _pointwise(wide.weight, wide.bias)
        self.narrow = _pointwise(narrow.weight, offset)
        self.register_buffer("gamma", block.grn.gamma.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        inner = F.gelu(self.wide(inner))
        energy = (inner * inner).sum((2, 3), keepdim=True).sqrt()
        inner = inner * (1.0 + self.gamma * (energy / (energy.mean(1, keepdim=True) + _GRN_EPS)))
        return x + self.narrow(inner)


def _pointwise(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """The linear map ``[outputs, inputs]`` as a 1x1 convolution; it shares the memory of the weight."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, device="meta")
    conv.weight = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=False)
    conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return conv


class Motion(nn.Module):
    """M with its angles in degrees. All of it in float32: layer norms and response norms overflow in half precision."""

    degrees: Tensor

    def __init__(self, networks: LivePortraitNetworks) -> None:
        super().__init__()
        detector: Any = networks.motion.detector
        self.downsample_layers, self.norm = detector.downsample_layers, detector.norm
        self.stages = nn.ModuleList(
            nn.Sequential(*(_MotionUnit(block) for block in stage)) for stage in detector.stages
        )
        heads = [detector.get_submodule(f"fc_{name}") for name in HEADS]
        self.heads = nn.Linear(heads[0].in_features, sum(HEADS.values()), device="meta")
        self.heads.weight = nn.Parameter(torch.cat([head.weight for head in heads]), requires_grad=False)
        self.heads.bias = nn.Parameter(torch.cat([head.bias for head in heads]), requires_grad=False)
        self.register_buffer("degrees", torch.arange(_BINS) * _BIN + _FIRST_BIN)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The motion of a picture.

        Args:
            image: uint8 ``[N, 256, 256, 3]`` RGB.

        Returns:
            float32 ``pitch``, ``yaw``, ``roll`` ``[N, 1]`` in degrees, ``t`` ``[N, 3]``, ``exp`` ``[N, 21, 3]``,
            ``scale`` ``[N, 1]``, ``kp`` ``[N, 21, 3]``.
        """
        x = _planes(image)
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        pitch, yaw, roll, t, exp, scale, kp = self.heads(self.norm(x.mean((2, 3)))).split(
            tuple(HEADS.values()), dim=1
        )
        # Not a matrix product: GPUs may round its factors to 10 bits, which is 0.05 degrees here.
        angles = ((logits.softmax(1) * self.degrees).sum(1, keepdim=True) for logits in (pitch, yaw, roll))
        return *angles, t, exp.reshape(-1, _POINTS, 3), scale, kp.reshape(-1, _POINTS, 3)


@dataclass(frozen=True)
class _Graph:
    """How a graph is made: its module, and name -> shape of what goes in (the first axis is dynamic) and comes out."""

    module: Callable[[LivePortraitNetworks, Flavor, bool], nn.Module]
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    keep: tuple[str, ...] = ()


_IMAGE: Final[Mapping[str, Shape]] = {names.IMAGE: ("batch", _SIDE, _SIDE, 3)}
_KEYPOINTS: Final[Shape] = ("batch", _POINTS, 3)


def _mlp(field: str, inputs: int, outputs: int) -> _Graph:
    return _Graph(
        lambda networks, flavor, half: getattr(networks, field),
        {names.FEATURES: ("batch", inputs)},
        {names.DELTA: ("batch", outputs)},
    )


_GRAPHS: Final[Mapping[str, _Graph]] = {
    names.APPEARANCE: _Graph(
        lambda networks, flavor, half: Appearance(networks, half=half),
        _IMAGE,
        {names.FEATURE_3D: ("batch", *_VOLUME), names.FEATURE_COMPRESSED: ("batch", *_COMPRESSED)},
    ),
    names.MOTION: _Graph(
        lambda networks, flavor, half: Motion(networks),
        _IMAGE,
        {
            **dict.fromkeys(_ANGLES, ("batch", 1)),
            names.T: ("batch", 3),
            names.EXP: _KEYPOINTS,
            names.SCALE: ("batch", 1),
            names.KP: _KEYPOINTS,
        },
    ),
    names.WARP_DECODE: _Graph(
        lambda networks, flavor, half: WarpDecode(
            networks.warping, networks.generator, half=half, flavor=flavor
        ),
        {
            names.FEATURE_3D: ("sources", *_VOLUME),
            names.FEATURE_COMPRESSED: ("sources", *_COMPRESSED),
            names.KP_SOURCE: _KEYPOINTS,
            names.KP_DRIVING: _KEYPOINTS,
        },
        {names.IMAGE: ("batch", 2 * _SIDE, 2 * _SIDE, 3)},
        WarpDecode.KEEP,
    ),
    names.STITCHING: _mlp("stitching", 126, 65),
    names.RETARGET_EYE: _mlp("retarget_eye", 66, 63),
    names.RETARGET_LIP: _mlp("retarget_lip", 65, 63),
}
GRAPHS: Final = tuple(_GRAPHS)
"""Names of the graphs of the family."""


def build_graph(
    name: str, networks: LivePortraitNetworks, *, flavor: Flavor = "main", precision: Precision = "fp32"
) -> onnx.ModelProto:
    """One graph of the family.

    Args:
        name: one of :data:`GRAPHS`.
        networks: the networks; they stay as they are.
        flavor: ``main`` or ``tensorrt8``, see :data:`OPSETS`.
        precision: ``fp16`` halves the convolutions of F, W and G; M, S and both R are float32 always.

    Raises:
        ConfigError: an unknown name, flavour or precision.
        ExportError: the exporter's result is not what was asked for.

    Example:
        >>> model = build_graph("stitching", networks)
        >>> [value.name for value in model.graph.output]
        ['delta']
    """
    for what, value, choices in (
        ("graph", name, GRAPHS),
        ("flavour", flavor, tuple(OPSETS)),
        ("precision", precision, ("fp32", "fp16")),
    ):
        if value not in choices:
            raise ConfigError(
                f"unknown {what} {value!r}", f"expected one of {', '.join(choices)}", "choose one of these"
            )
    graph = _GRAPHS[name]
    return export_onnx(
        graph.module(networks, flavor, precision == "fp16"),
        {tensor: _example(shape) for tensor, shape in graph.inputs.items()},
        graph.outputs,
        {tensor: {0: str(shape[0])} for tensor, shape in graph.inputs.items()},
        opset=OPSETS[flavor],
        keep=graph.keep,
    )


def _example(shape: Shape) -> Tensor:
    """A tensor to trace with: two frames of one source; pictures are the shapes that end in channels of RGB."""
    sizes = [{"batch": 2, "sources": 1}.get(size, 1) if isinstance(size, str) else size for size in shape]
    return torch.zeros(sizes, dtype=torch.uint8 if shape == _IMAGE[names.IMAGE] else torch.float32)
