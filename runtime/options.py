"""Frozen configuration of an animation; the command line and the server only fill these in."""

from __future__ import annotations

from dataclasses import dataclass, field

from lp_edge.errors import ConfigError
from lp_edge.runtime.checks import one_of, within
from lp_edge.runtime.crop import CropOptions
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.faces import faces_policy
from lp_edge.runtime.keyframes import Keyframes
from lp_edge.runtime.liveportrait_options import LivePortraitOptions

__all__ = ["DRIVING_CROPS", "LENGTHS", "REGIONS", "AnimateOptions"]

REGIONS = ("all", "exp", "pose", "lip", "eyes")
LENGTHS = ("shortest", "source", "driving")
DRIVING_CROPS = ("auto", "on", "off")


@dataclass(frozen=True)
class AnimateOptions:
    """How the driver's motion is put on the source.

    Attributes:
        relative: apply the driver's change against its neutral frame (True) or its absolute pose and
            expression (False).
        region: which part of the motion is taken from the driver: ``all``, ``exp`` (expression without pose), ``pose``,
            ``lip``, ``eyes``. The rest stays as in the source.
        multiplier: strength of the motion, 0 to 3; 1 = as in the driver.
        neutral: index of the driver's frame that stands for "no motion" when ``relative``.
        smooth: one-euro filter on tracked points of clips and live drivers.
        faces: which faces of the source are animated: ``largest``, ``all`` (the same as ``left-right``), or indices from left to
            right such as ``0`` or ``2,0``; several drivers are given to them in this order.
        size: side of the animated crop in pixels, 128 to 2048. Family mesh: the longer side at most, smaller crops are
            not enlarged where they are pasted back; None = 640. Family liveportrait: its networks draw 512, other sizes are resampled; None = 512.
        paste_back: put the animated crop back into the source frame; False gives the crop alone.
        length: for a source clip or several drivers: ``shortest``, ``source`` or ``driving``; what is too short holds its last
            frame.
        face_timeout: seconds of a driving clip that may pass until the first face appears.
        edits: constant changes on top of the driver's motion.
        keyframes: changes over time, instead of ``edits``.
        crop: where the crops of the liveportrait family lie.
        driving_crop: cut driving pictures and clips around the face (liveportrait): ``auto`` = when they are not square.
        liveportrait: what only that family can do.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    relative: bool = True
    region: str = "all"
    multiplier: float = 1.0
    neutral: int = 0
    smooth: bool = True
    faces: str = "largest"
    size: int | None = None
    paste_back: bool = True
    length: str = "shortest"
    face_timeout: float = 10.0
    edits: Edits = field(default_factory=Edits)
    keyframes: Keyframes | None = None
    crop: CropOptions = field(default_factory=CropOptions)
    driving_crop: str = "auto"
    liveportrait: LivePortraitOptions = field(default_factory=LivePortraitOptions)

    def __post_init__(self) -> None:
        one_of("region", self.region, REGIONS)
        one_of("length", self.length, LENGTHS)
        one_of("driving_crop", self.driving_crop, DRIVING_CROPS)
        within("multiplier", self.multiplier, 0.0, 3.0)
        within("neutral", self.neutral, 0, 10**7)
        if self.size is not None:
            within("size", self.size, 128, 2048)
        within("face_timeout", self.face_timeout, 0.0, 1e6)
        faces_policy(self.faces)
        if self.keyframes is not None and self.edits:
            raise ConfigError(
                "edits and keyframes together", "expected one of them", "put the edits into the keyframes"
            )

    def edits_at(self, seconds: float) -> Edits:
        """The edits that hold at a time of the result."""
        return self.edits if self.keyframes is None else self.keyframes.at(seconds)
