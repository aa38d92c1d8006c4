"""G: the decoder of LivePortrait, made of SPADE blocks (arXiv 1903.07291) with spectral normalisation and a pixel shuffle."""

from __future__ import annotations

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from lp_edge.export.networks.layers import SpectralConv2d

__all__ = ["MIDDLE_BLOCKS", "Spade", "SpadeBlock", "SpadeGenerator"]

MIDDLE_BLOCKS = 6
"""Blocks of G that work at the resolution of its input."""

_CONDITION = 256
_HIDDEN = 128
_SLOPE = 0.2


class Spade(nn.Module):
    """Instance norm whose scale and offset are convolutions of a condition map (SPADE, section 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.Conv2d(_CONDITION, _HIDDEN, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(_HIDDEN, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(_HIDDEN, channels, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x [N, C, H, W]``, ``condition [N, 256, h, w]`` (enlarged to H x W by nearest neighbour) → ``[N, C, H, W]``."""
        hidden = self.mlp_shared(F.interpolate(condition, size=x.shape[2:], mode="nearest"))
        return F.instance_norm(x) * (1.0 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class SpadeBlock(nn.Module):
    """Residual block of two SPADE-normalised convolutions; the shortcut is learned where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        middle = min(inputs, outputs)
        self.conv_0 = SpectralConv2d(inputs, middle, 3)
        self.conv_1 = SpectralConv2d(middle, outputs, 3)
        self.norm_0 = Spade(inputs)
        self.norm_1 = Spade(middle)
        self.learned_shortcut = inputs != outputs
        if self.learned_shortcut:
            self.conv_s = SpectralConv2d(inputs, outputs, 1, bias=False)
            self.norm_s = Spade(inputs)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x [N, inputs, H, W]`` → ``[N, outputs, H, W]``; ``condition`` as in :class:`Spade`."""
        inner = self.conv_0(F.leaky_relu(self.norm_0(x, condition), _SLOPE))
        inner = self.conv_1(F.leaky_relu(self.norm_1(inner, condition), _SLOPE))
        return inner + (self.conv_s(self.norm_s(x, condition)) if self.learned_shortcut else x)


class SpadeGenerator(nn.Module):
    """G: paints the picture from the warped features, which are also the condition of every block."""

    def __init__(self) -> None:
        super().__init__()
        width = 2 * _CONDITION
        self.fc = nn.Conv2d(_CONDITION, width, 3, padding=1)
        for index in range(MIDDLE_BLOCKS):
            self.add_module(f"G_middle_{index}", SpadeBlock(width, width))
        self.up_0 = SpadeBlock(width, 256)
        self.up_1 = SpadeBlock(256, 64)
        self.conv_img = nn.Sequential(nn.Conv2d(64, 3 * 2 * 2, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, feature: Tensor) -> Tensor:
        """Decode.

        Args:
            feature: float32 ``[N, 256, H, W]``, the ``warped`` of W; H = W = 64, other sizes work.

        Returns:
            float32 ``[N, 3, 8H, 8W]`` RGB, 0..1.
        """
        x = self.fc(feature)
        for index in range(MIDDLE_BLOCKS):
            x = self.get_submodule(f"G_middle_{index}")(x, feature)
        for block in (self.up_0, self.up_1):
            x = block(F.interpolate(x, scale_factor=2.0, mode="nearest"), feature)
        return torch.sigmoid(self.conv_img(F.leaky_relu(x, _SLOPE)))
