"""W: the warping network of LivePortrait, i.e. the dense-motion network of face-vid2vid (arXiv 2011.15126, appendix A) and a warp.

Written with 5-D ``grid_sample`` as the definition has it: what the exported graphs, which may not use that, are compared with.
"""

from __future__ import annotations

from itertools import pairwise

import torch  # noqa: TID253
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from lp_edge.export.networks.layers import ConvBlock, identity_grid, keypoint_heatmaps

__all__ = ["DenseMotionNetwork", "WarpingNetwork"]

_KEYPOINTS = 21
_COMPRESSED = 4


class _Encoder(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(ConvBlock(3, i, o, resize="down") for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [x]
        for block in self.down_blocks:
            levels.append(block(levels[-1]))
        return levels


class _Decoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], narrowest: int) -> None:
        super().__init__()
        # From the deepest level up; all but the first block see the encoder's level beside what came from below.
        deep = widths[:0:-1]
        self.up_blocks = nn.ModuleList(
            ConvBlock(3, i if level == 0 else 2 * i, o, resize="up")
            for level, (i, o) in enumerate(zip(deep, (*deep[1:], narrowest), strict=True))
        )
        width = widths[0] + narrowest
        self.conv = nn.Conv3d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm3d(width)

    def forward(self, levels: list[Tensor]) -> Tensor:
        *skips, x = levels
        for block, skip in zip(self.up_blocks, reversed(skips), strict=True):
            x = torch.cat((block(x), skip), dim=1)
        return F.relu(self.norm(self.conv(x)))


class _Hourglass(nn.Module):
    """3-D U-Net that halves height and width five times and leaves the depth alone."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        widths = (inputs, 64, 128, 256, 512, 1024)
        self.encoder = _Encoder(widths)
        self.decoder = _Decoder(widths, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class DenseMotionNetwork(nn.Module):
    """Where every cell of the driving volume is to be sampled in the source volume, and what is hidden there.

    Every keypoint proposes a shift of the whole volume (a *sparse motion*), index 0 proposes none; a mask combines the proposals.
    """

    def __init__(self, channels: int = 32, depth: int = 16) -> None:
        super().__init__()
        motions = _KEYPOINTS + 1
        inputs = motions * (_COMPRESSED + 1)
        width = inputs + 32
        self.hourglass = _Hourglass(inputs)
        self.mask = nn.Conv3d(width, motions, 7, padding=3)
        self.compress = nn.Conv3d(channels, _COMPRESSED, 1)
        self.norm = nn.BatchNorm3d(_COMPRESSED)
        self.occlusion = nn.Conv2d(width * depth, 1, 7, padding=3)

    def forward(self, feature_3d: Tensor, kp_source: Tensor, kp_driving: Tensor) -> dict[str, Tensor]:
        """Returns ``deformation`` ``[N, D, H, W, 3]`` and ``occlusion_map`` ``[N, 1, H, W]``; see :class:`WarpingNetwork`."""
        count, _, depth, height, width = feature_3d.shape
        compressed = F.relu(self.norm(self.compress(feature_3d)))
        grid = identity_grid(depth, height, width, kp_source)
        shift = (kp_source - kp_driving)[:, :, None, None, None]
        still = grid.expand(count, 1, *grid.shape)
        sparse_motions = torch.cat((still, grid + shift), dim=1)  # [N, 22, D, H, W, 3]
        motions = sparse_motions.shape[1]
        repeated = compressed[:, None].expand(-1, motions, -1, -1, -1, -1)
        deformed = F.grid_sample(
            repeated.reshape(count * motions, *compressed.shape[1:]),
            sparse_motions.flatten(0, 1),
            align_corners=False,
        ).reshape(repeated.shape)
        heat = keypoint_heatmaps(kp_driving, grid) - keypoint_heatmaps(kp_source, grid)
        heat = torch.cat((torch.zeros_like(heat[:, :1]), heat), dim=1)
        prediction = self.hourglass(torch.cat((heat[:, :, None], deformed), dim=2).flatten(1, 2))
        mask = self.mask(prediction).softmax(dim=1)
        return {
            "deformation": (sparse_motions * mask[..., None]).sum(dim=1),
            "occlusion_map": torch.sigmoid(self.occlusion(prediction.flatten(1, 2))),
        }


class WarpingNetwork(nn.Module):
    """W: the source's feature volume, warped to the driving keypoints and flattened for the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_motion_network = DenseMotionNetwork()
        self.third = ConvBlock(2, 512, 256, slope=0.01)
        self.fourth = nn.Conv2d(256, 256, 1)

    def forward(self, feature_3d: Tensor, kp_source: Tensor, kp_driving: Tensor) -> dict[str, Tensor]:
        """Warp.

        Args:
            feature_3d: float32 ``[N, 32, 16, H, W]`` of F; H = W = 64, other multiples of 32 work.
            kp_source, kp_driving: float32 ``[N, 21, 3]`` as (x, y, z); -1..1 spans the volume.

        Returns:
            ``warped`` float32 ``[N, 256, H, W]``, already multiplied by the occlusion map; ``deformation`` float32
            ``[N, 16, H, W, 3]``, the (x, y, z) at which the source volume is sampled; ``occlusion_map`` float32
            ``[N, 1, H, W]``, 0 (hidden) to 1 (visible).
        """
        motion = self.dense_motion_network(feature_3d, kp_source, kp_driving)
        volume = F.grid_sample(feature_3d, motion["deformation"], align_corners=False)
        warped = self.fourth(self.third(volume.flatten(1, 2)))
        return {"warped": warped * motion["occlusion_map"], **motion}
