"""M: the motion extractor of LivePortrait, a ConvNeXt V2 tiny (arXiv 2301.00808) with seven heads."""

from __future__ import annotations

from itertools import pairwise

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

__all__ = ["HEADS", "MotionExtractor"]

HEADS = {"pitch": 66, "yaw": 66, "roll": 66, "t": 3, "exp": 63, "scale": 1, "kp": 63}
"""Outputs of M and their sizes. The angles are logits over 66 bins of 3 degrees, the first one at -97.5 degrees."""

_DEPTHS = (3, 3, 9, 3)
_WIDTHS = (96, 192, 384, 768)
_EPS = 1e-6


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of ``[N, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Scales every channel by its energy relative to the mean over channels (ConvNeXt V2, section 3.2).

    ``[N, H, W, C]`` → the same. Sums squares over the whole picture, which overflows in half precision.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        energy = x.square().sum((1, 2), keepdim=True).sqrt()
        relative = energy / (energy.mean(-1, keepdim=True) + _EPS)
        return self.gamma * (x * relative) + self.beta + x


class _Block(nn.Module):
    """ConvNeXt V2 block; keeps the shape ``[N, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=_EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = GlobalResponseNorm(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        inner = self.pwconv2(self.grn(F.gelu(self.pwconv1(inner))))
        return x + inner.permute(0, 3, 1, 2)


class _ConvNeXtV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, _WIDTHS[0], 4, stride=4), _ChannelNorm(_WIDTHS[0], eps=_EPS))
        self.downsample_layers = nn.ModuleList([stem])
        for narrow, wide in pairwise(_WIDTHS):
            self.downsample_layers.append(
                nn.Sequential(_ChannelNorm(narrow, eps=_EPS), nn.Conv2d(narrow, wide, 2, stride=2))
            )
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Block(width) for _ in range(depth)))
            for width, depth in zip(_WIDTHS, _DEPTHS, strict=True)
        )
        self.norm = nn.LayerNorm(_WIDTHS[-1], eps=_EPS)
        for name, size in HEADS.items():
            self.add_module(f"fc_{name}", nn.Linear(_WIDTHS[-1], size))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        pooled = self.norm(x.mean((2, 3)))
        return {name: self.get_submodule(f"fc_{name}")(pooled) for name in HEADS}


class MotionExtractor(nn.Module):
    """M: pose, expression and canonical keypoints of one picture.

    Example:
        >>> MotionExtractor().eval()(torch.zeros(1, 3, 256, 256))["kp"].shape
        torch.Size([1, 63])
    """

    def __init__(self) -> None:
        super().__init__()
        self.detector = _ConvNeXtV2()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """The raw heads.

        Args:
            image: float32 ``[N, 3, 256, 256]`` RGB, 0..1 (other multiples of 32 work).

        Returns:
            float32 ``[N, size]`` for every name of :data:`HEADS`: ``pitch``, ``yaw``, ``roll`` as logits, translation ``t``,
            ``exp`` (21 keypoints x 3), ``scale``, ``kp`` (21 keypoints x 3).
        """
        return self.detector(image)
