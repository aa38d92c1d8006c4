"""The networks of LivePortrait, written for this project; ``state_dict`` keys and shapes are those of the official checkpoints.

They are the yardstick that exported graphs are compared with, so they follow the published definition and leave every
shortcut to the graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from lp_edge.export.networks.appearance import AppearanceFeatureExtractor
from lp_edge.export.networks.generator import SpadeGenerator
from lp_edge.export.networks.motion import MotionExtractor
from lp_edge.export.networks.stitching import StitchingNetwork
from lp_edge.export.networks.warping import WarpingNetwork

__all__ = [
    "AppearanceFeatureExtractor",
    "LivePortraitNetworks",
    "MotionExtractor",
    "SpadeGenerator",
    "StitchingNetwork",
    "WarpingNetwork",
    "create",
]


@dataclass(frozen=True)
class LivePortraitNetworks:
    """All networks of the family; whatever is put in is switched to evaluation and asks for no gradients.

    Attributes:
        appearance: F.
        motion: M.
        warping: W.
        generator: G.
        stitching: S, 126 → 65 (both sets of keypoints → their correction and a shift in x and y).
        retarget_eye: R_eye, 66 → 63 (source keypoints, its two eye ratios, the wanted one → correction).
        retarget_lip: R_lip, 65 → 63 (source keypoints, its lip ratio, the wanted one → correction).
    """

    appearance: AppearanceFeatureExtractor
    motion: MotionExtractor
    warping: WarpingNetwork
    generator: SpadeGenerator
    stitching: StitchingNetwork
    retarget_eye: StitchingNetwork
    retarget_lip: StitchingNetwork

    def __post_init__(self) -> None:
        for field in fields(self):
            getattr(self, field.name).eval().requires_grad_(False)


def create() -> LivePortraitNetworks:
    """All networks with random weights from PyTorch's global generator (about 130 million, 0.5 GB).

    Example:
        >>> networks = create()
        >>> networks.stitching.load_state_dict(torch.load(path, weights_only=True)["retarget_shoulder"])
        <All keys matched successfully>
    """
    return LivePortraitNetworks(
        appearance=AppearanceFeatureExtractor(),
        motion=MotionExtractor(),
        warping=WarpingNetwork(),
        generator=SpadeGenerator(),
        stitching=StitchingNetwork(126, 65, (128, 128, 64)),
        retarget_eye=StitchingNetwork(66, 63, (256, 256, 128, 128, 64)),
        retarget_lip=StitchingNetwork(65, 63, (128, 128, 64)),
    )
