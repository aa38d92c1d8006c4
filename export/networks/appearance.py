"""F: the appearance feature extractor of LivePortrait (arXiv 2407.03168, section 3.1; architecture of face-vid2vid, arXiv 2011.15126)."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from lp_edge.export.networks.layers import ConvBlock

__all__ = ["AppearanceFeatureExtractor"]

_CHANNELS, _DEPTH = 32, 16


class _ResBlock3d(nn.Module):
    """Residual block with normalisation before each convolution; keeps the shape ``[N, C, D, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm3d(channels)
        self.norm2 = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(inner)))


class AppearanceFeatureExtractor(nn.Module):
    """F: a 2-D encoder whose last channels are read as depth, then residual blocks in 3-D.

    Example:
        >>> AppearanceFeatureExtractor().eval()(torch.zeros(1, 3, 256, 256)).shape
        torch.Size([1, 32, 16, 64, 64])
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvBlock(2, 3, 64)
        self.down_blocks = nn.ModuleList(
            [ConvBlock(2, 64, 128, resize="down"), ConvBlock(2, 128, 256, resize="down")]
        )
        self.second = nn.Conv2d(256, _CHANNELS * _DEPTH, 1)
        self.resblocks_3d = nn.Sequential()
        for index in range(6):
            self.resblocks_3d.add_module(f"3dr{index}", _ResBlock3d(_CHANNELS))

    def forward(self, image: Tensor) -> Tensor:
        """The feature volume of a source picture.

        Args:
            image: float32 ``[N, 3, H, W]`` RGB, 0..1; 256x256, other multiples of 4 work.

        Returns:
            float32 ``[N, 32, 16, H/4, W/4]``.
        """
        x = self.first(image)
        for block in self.down_blocks:
            x = block(x)
        x = self.second(x)
        return self.resblocks_3d(x.reshape(x.shape[0], _CHANNELS, _DEPTH, x.shape[2], x.shape[3]))
