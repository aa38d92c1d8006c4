"""Building blocks that the LivePortrait networks share. Attribute names are those of the official checkpoints."""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

__all__ = ["ConvBlock", "SpectralConv2d", "identity_grid", "keypoint_heatmaps"]

_CONV: dict[int, type[Any]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[int, type[Any]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ConvBlock(nn.Module):
    """[nearest-neighbour enlargement →] 3x3(x3) convolution → batch norm → (leaky) ReLU [→ average pooling].

    Height and width change by a factor of two; depth never does.

    Args:
        rank: 2 for ``[N, C, H, W]``, 3 for ``[N, C, D, H, W]``.
        inputs, outputs: channels.
        resize: ``"up"``: enlarge before, ``"down"``: pool after, ``""``: neither.
        slope: of the activation below zero.
    """

    def __init__(self, rank: int, inputs: int, outputs: int, *, resize: str = "", slope: float = 0.0) -> None:
        super().__init__()
        self.conv = _CONV[rank](inputs, outputs, 3, padding=1)
        self.norm = _NORM[rank](outputs)
        self.factors = (2.0, 2.0) if rank == 2 else (1.0, 2.0, 2.0)
        self.resize = resize
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, …]`` → ``[N, outputs, …]``."""
        if self.resize == "up":
            x = F.interpolate(x, scale_factor=self.factors, mode="nearest")
        x = self.norm(self.conv(x))
        x = F.leaky_relu(x, self.slope) if self.slope else F.relu(x)
        if self.resize != "down":
            return x
        return F.avg_pool2d(x, 2) if len(self.factors) == 2 else F.avg_pool3d(x, (1, 2, 2))


class SpectralConv2d(nn.Module):
    """Convolution whose weight is divided by its largest singular value (spectral normalisation, Miyato et al. 2018).

    The singular vectors come with the checkpoint as ``weight_u`` and ``weight_v`` and stay as they are: no power
    iteration happens here, as in PyTorch's ``spectral_norm`` in evaluation mode. The effective weight is :attr:`weight`.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__()
        like = nn.Conv2d(inputs, outputs, kernel, bias=bias)
        self.weight_orig = like.weight
        self.bias = like.bias
        self.padding = kernel // 2
        rows = like.weight.detach().flatten(1)
        u = F.normalize(torch.randn(outputs), dim=0)
        for _ in range(3):  # random weights need vectors that roughly fit them
            v = F.normalize(rows.T @ u, dim=0)
            u = F.normalize(rows @ v, dim=0)
        self.register_buffer("weight_u", u)
        self.register_buffer("weight_v", v)

    @property
    def weight(self) -> Tensor:
        """Effective weight ``[outputs, inputs, kernel, kernel]``: ``weight_orig / (u · W v)``."""
        sigma = torch.dot(self.weight_u, torch.mv(self.weight_orig.flatten(1), self.weight_v))
        return self.weight_orig / sigma

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` → ``[N, outputs, H, W]``."""
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


def identity_grid(depth: int, height: int, width: int, like: Tensor) -> Tensor:
    """Positions ``[D, H, W, 3]`` as (x, y, z): first and last cell of an axis lie at -1 and 1.

    That is the ``align_corners=True`` convention, although the volumes are sampled with ``align_corners=False``:
    the networks were trained with this mixture, so the identity grid does not sample a volume at its own cells.

    Args:
        like: gives dtype and device.
    """
    z, y, x = (
        2.0 * (torch.arange(size, dtype=like.dtype, device=like.device) / (size - 1)) - 1.0
        for size in (depth, height, width)
    )
    zz, yy, xx = torch.meshgrid(z, y, x, indexing="ij")
    return torch.stack((xx, yy, zz), dim=-1)


def keypoint_heatmaps(keypoints: Tensor, grid: Tensor, variance: float = 0.01) -> Tensor:
    """Gaussians ``exp(-|p - keypoint|² / (2 variance))``.

    Args:
        keypoints: ``[N, K, 3]`` as (x, y, z).
        grid: positions ``[D, H, W, 3]``.

    Returns:
        ``[N, K, D, H, W]``, 0..1.
    """
    distance = (grid - keypoints[:, :, None, None, None]).square().sum(-1)
    return torch.exp(-0.5 * distance / variance)
