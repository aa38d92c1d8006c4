"""The official LivePortrait files: where they are, how large, their SHA-256 and their licence.

The hub repository is pinned to one revision, so a file either is the one that parity was shown for or is told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

__all__ = [
    "BASE_NETWORKS",
    "FILES",
    "HUB_REPOSITORY",
    "HUB_REVISION",
    "LANDMARK",
    "STITCHING_FILE",
    "STITCHING_PARTS",
    "UNVERIFIED",
    "VARIANTS",
    "OfficialFile",
    "Variant",
    "official_with",
]

Variant = Literal["human", "animal"]
VARIANTS: Final[tuple[Variant, ...]] = ("human", "animal")

HUB_REPOSITORY: Final = "KwaiVGI/LivePortrait"
HUB_REVISION: Final = "82a4fa6735ca58432b6ce39301b4b9ee066dea47"

UNVERIFIED: Final = "LicenseRef-unverified"
"""Licence entry of a checkpoint that is not the official file: nobody knows which licence applies (SPDX form)."""

BASE_NETWORKS: Final = ("appearance", "motion", "warping", "generator")
"""Networks with a file each, by the field names of ``LivePortraitNetworks``."""

STITCHING_FILE: Final = "stitching"
"""Role of the file that holds three networks."""

STITCHING_PARTS: Final[Mapping[str, str]] = MappingProxyType(
    {"stitching": "retarget_shoulder", "retarget_eye": "retarget_eye", "retarget_lip": "retarget_mouth"}
)
"""Network -> name of its part in that file."""


@dataclass(frozen=True)
class OfficialFile:
    """A file of the hub repository.

    Attributes:
        path: its place there, with ``/``.
        sha256: in lower-case hex.
        size: in bytes; None where it is not known (the SHA-256 decides).
        licence: SPDX identifier.
    """

    path: str
    sha256: str
    size: int | None
    licence: str = "MIT"

    @property
    def name(self) -> str:
        """File name without folders."""
        return self.path.rsplit("/", 1)[-1]


_HUMAN = "liveportrait/base_models"
_ANIMAL = "liveportrait_animals/base_models_v1.1"
_STITCHING = OfficialFile(
    "liveportrait/retargeting_models/stitching_retargeting_module.pth",
    "3652d5a3f95099141a56986aaddec92fadf0a73c87a20fac9a2c07c32b28b611",
    2393098,
)

FILES: Final[Mapping[Variant, Mapping[str, OfficialFile]]] = MappingProxyType(
    {
        "human": MappingProxyType(
            {
                "appearance": OfficialFile(
                    f"{_HUMAN}/appearance_feature_extractor.pth",
                    "5279bb8654293dbdf327030b397f107237dd9212fb11dd75b83dfb635211ceb5",
                    3387959,
                ),
                "motion": OfficialFile(
                    f"{_HUMAN}/motion_extractor.pth",
                    "251e6a94ad667a1d0c69526d292677165110ef7f0cf0f6d199f0e414e8aa0ca5",
                    112545506,
                ),
                "warping": OfficialFile(
                    f"{_HUMAN}/warping_module.pth",
                    "2f61a6f265fe344f14132364859a78bdbbc2068577170693da57fb96d636e282",
                    182180086,
                ),
                "generator": OfficialFile(
                    f"{_HUMAN}/spade_generator.pth",
                    "4780afc7909a9f84e24c01d73b31a555ef651521a1fe3b2429bd04534d992aee",
                    221813590,
                ),
                STITCHING_FILE: _STITCHING,
            }
        ),
        # The animal set has no stitching module of its own; the reference takes the human one.
        "animal": MappingProxyType(
            {
                "appearance": OfficialFile(
                    f"{_ANIMAL}/appearance_feature_extractor.pth",
                    "7e320d545579caa83c7b094cef8b7b43fe92a2e410c219ffa97b08be549f45bf",
                    None,
                ),
                "motion": OfficialFile(
                    f"{_ANIMAL}/motion_extractor.pth",
                    "827d0ea4c56ff252dba50feece3bc62ced365ecae5edb86db07eb71b2f39a696",
                    None,
                ),
                "warping": OfficialFile(
                    f"{_ANIMAL}/warping_module.pth",
                    "7dfd251dc6b3a1baefebfc658f5bb2a2c565649cdb9aa75032591e824a0bfcee",
                    None,
                ),
                "generator": OfficialFile(
                    f"{_ANIMAL}/spade_generator.pth",
                    "6ac31a9b608f3920ec41a402b1c4e29d22007dafd79a855f204aae9307039445",
                    None,
                ),
                STITCHING_FILE: _STITCHING,
            }
        ),
    }
)
"""Variant -> role (:data:`BASE_NETWORKS` and :data:`STITCHING_FILE`) -> file."""

LANDMARK: Final = OfficialFile(
    "liveportrait/landmark.onnx",
    "31d22a5041326c31f19b78886939a634a5aedcaa5ab8b9b951a1167595d147db",
    114666491,
)
"""The 203-point landmark network; not part of an export, used by the runtime when the user supplies it."""


def official_with(sha256: str) -> OfficialFile | None:
    """The official file with this SHA-256 (lower-case hex), or None."""
    known = [LANDMARK, *(file for files in FILES.values() for file in files.values())]
    return next((file for file in known if file.sha256 == sha256), None)
