"""S, R_eye and R_lip: the stitching and retargeting networks of LivePortrait (arXiv 2407.03168, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn  # noqa: TID253

__all__ = ["StitchingNetwork"]


class StitchingNetwork(nn.Module):
    """A multilayer perceptron with ReLU.

    Args:
        inputs, outputs: numbers of features.
        hidden: widths in between.

    Example:
        >>> StitchingNetwork(126, 65, (128, 128, 64))(torch.zeros(1, 126)).shape
        torch.Size([1, 65])
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.mlp = nn.Sequential(*layers, nn.Linear(inputs, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """float32 ``[N, inputs]`` → ``[N, outputs]``: what is added to the keypoints."""
        return self.mlp(features)
