"""Options of the LivePortrait family's motion; what both families share is in :class:`lp_edge.runtime.options.AnimateOptions`.

The names say what the reference's flags do; the defaults are those of its command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from lp_edge.runtime.checks import one_of, within

__all__ = ["DRIVING_OPTIONS", "LivePortraitOptions"]

DRIVING_OPTIONS = ("expression-friendly", "pose-friendly")


@dataclass(frozen=True)
class LivePortraitOptions:
    """How the LivePortrait family composes a source's motion with a driver's.

    Attributes:
        driving_option: matters for a picture source that moving frames drive relatively. ``expression-friendly`` takes the
            change against the neutral frame in the picture and scales it by the ratio of both faces' sizes (volumes
            of their keypoints' convex hulls); ``pose-friendly`` takes the motion as it is.
        stitching: let the network S fit the moved face to the still shoulders.
        eye_retargeting: put the driver's eye opening on the source by the network R_eye.
        lip_retargeting: put the driver's lip opening on the source by the network R_lip.
        normalize_lip: shut the source's lips (R_lip with target 0) under a relative motion, where their ratio is
            ``lip_normalize_threshold`` or more; not together with eye or lip retargeting.
        lip_normalize_threshold: lip gap / mouth width, 0 to 1000.
        source_video_eye_retargeting: hold the eyes of a source clip as open as in its first frame (R_eye); not together
            with eye or lip retargeting.
        source_video_eye_threshold: mean eye ratio, 0 to 1000; a first frame below it counts as a blink, and the eyes are
            held at 0.39.
        smooth_variance: observation variance of the smoother that a source clip's motion goes through when moving
            frames drive it, 1e-12 to 1000; larger is smoother and less exact.
        keep_pose_with_retargeting: with ``eye_retargeting`` or ``lip_retargeting``, the reference adds the networks' change
            to the source's own keypoints when the motion is relative, which drops head pose and expression. True
            adds it to the moved keypoints, as the absolute mode does anyway.
        animal: compose as the reference does for animals: the driver's own pose and expression on the source's keypoints,
            its change against the neutral frame scaled by the hulls' ratio; then ``stitching`` and the multiplier.
            Everything else (relative, region, retargeting, normalisation) is not used there.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    driving_option: str = "expression-friendly"
    stitching: bool = True
    eye_retargeting: bool = False
    lip_retargeting: bool = False
    normalize_lip: bool = False
    lip_normalize_threshold: float = 0.03
    source_video_eye_retargeting: bool = False
    source_video_eye_threshold: float = 0.18
    smooth_variance: float = 3e-7
    keep_pose_with_retargeting: bool = False
    animal: bool = False

    def __post_init__(self) -> None:
        one_of("driving_option", self.driving_option, DRIVING_OPTIONS)
        within("lip_normalize_threshold", self.lip_normalize_threshold, 0.0, 1e3)
        within("source_video_eye_threshold", self.source_video_eye_threshold, 0.0, 1e3)
        within("smooth_variance", self.smooth_variance, 1e-12, 1e3)
