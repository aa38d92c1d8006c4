"""Names of graphs and tensors, shared by export and runtime: tensors are bound by name, never by position."""

from __future__ import annotations

from typing import Final

__all__ = [
    "APPEARANCE",
    "BOXES",
    "COLUMNS",
    "CROP",
    "CROP_512_HALVED",
    "CUT_REGION",
    "DEFORMATION",
    "DELTA",
    "EXP",
    "FACE_DETECTOR",
    "FACE_MESH",
    "FEATURES",
    "FEATURE_3D",
    "FEATURE_COMPRESSED",
    "FRAME",
    "IMAGE",
    "KP",
    "KP_DRIVING",
    "KP_SOURCE",
    "MASK",
    "MATRIX",
    "MOTION",
    "OCCLUSION_MAP",
    "PASTE_MOVING",
    "PASTE_RECT",
    "PASTE_STILL",
    "PATCH",
    "PITCH",
    "POINTS",
    "RESIZE_CROPS",
    "RETARGET_EYE",
    "RETARGET_LIP",
    "ROLL",
    "SCALE",
    "SCORE",
    "SCORES",
    "SOURCE_IMAGE",
    "STITCHING",
    "WARPED",
    "WARP_DECODE",
    "WEIGHT",
    "WEIGHTS",
    "YAW",
    "T",
]

# Graphs
FACE_DETECTOR: Final = "face_detector"
FACE_MESH: Final = "face_mesh"
APPEARANCE: Final = "appearance_feature_extractor"
MOTION: Final = "motion_extractor"
WARP_DECODE: Final = "warp_decode"
STITCHING: Final = "stitching"
RETARGET_EYE: Final = "retarget_eye"
RETARGET_LIP: Final = "retarget_lip"

# Graphs around the networks (runtime/device_graphs)
CROP_512_HALVED: Final = "crop_512_halved"
CUT_REGION: Final = "cut_region"
PASTE_MOVING: Final = "paste_moving"
PASTE_RECT: Final = "paste_rect"
PASTE_STILL: Final = "paste_still"
RESIZE_CROPS: Final = "resize_crops"

# Tensors
IMAGE: Final = "image"
SOURCE_IMAGE: Final = "source_image"
BOXES: Final = "boxes"
SCORES: Final = "scores"
POINTS: Final = "points"
SCORE: Final = "score"
FEATURE_3D: Final = "feature_3d"
FEATURE_COMPRESSED: Final = "feature_compressed"
DEFORMATION: Final = "deformation"
OCCLUSION_MAP: Final = "occlusion_map"
WARPED: Final = "warped"
FEATURES: Final = "features"
DELTA: Final = "delta"
KP_SOURCE: Final = "kp_source"
KP_DRIVING: Final = "kp_driving"
PITCH: Final = "pitch"
YAW: Final = "yaw"
ROLL: Final = "roll"
T: Final = "t"
EXP: Final = "exp"
SCALE: Final = "scale"
KP: Final = "kp"

# Tensors of the graphs around the networks
FRAME: Final = "frame"
COLUMNS: Final = "columns"
CROP: Final = "crop"
PATCH: Final = "patch"
MATRIX: Final = "matrix"
WEIGHT: Final = "weight"
WEIGHTS: Final = "weights"
MASK: Final = "mask"
