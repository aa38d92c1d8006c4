from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PixelFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PIXEL_FORMAT_UNSPECIFIED: _ClassVar[PixelFormat]
    PIXEL_FORMAT_RGB24: _ClassVar[PixelFormat]
    PIXEL_FORMAT_BGR24: _ClassVar[PixelFormat]

class ExpressionLayout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPRESSION_LAYOUT_UNSPECIFIED: _ClassVar[ExpressionLayout]
    EXPRESSION_LAYOUT_KEYPOINTS: _ClassVar[ExpressionLayout]
    EXPRESSION_LAYOUT_COEFFICIENTS: _ClassVar[ExpressionLayout]

class Region(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REGION_UNSPECIFIED: _ClassVar[Region]
    REGION_ALL: _ClassVar[Region]
    REGION_EXPRESSION: _ClassVar[Region]
    REGION_POSE: _ClassVar[Region]
    REGION_LIP: _ClassVar[Region]
    REGION_EYES: _ClassVar[Region]

class DrivingCrop(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRIVING_CROP_UNSPECIFIED: _ClassVar[DrivingCrop]
    DRIVING_CROP_AUTO: _ClassVar[DrivingCrop]
    DRIVING_CROP_ON: _ClassVar[DrivingCrop]
    DRIVING_CROP_OFF: _ClassVar[DrivingCrop]

class DrivingOption(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRIVING_OPTION_UNSPECIFIED: _ClassVar[DrivingOption]
    DRIVING_OPTION_EXPRESSION_FRIENDLY: _ClassVar[DrivingOption]
    DRIVING_OPTION_POSE_FRIENDLY: _ClassVar[DrivingOption]

class FaceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FACE_STATE_UNSPECIFIED: _ClassVar[FaceState]
    FACE_STATE_NONE: _ClassVar[FaceState]
    FACE_STATE_TRACKED: _ClassVar[FaceState]
    FACE_STATE_REACQUIRED: _ClassVar[FaceState]
    FACE_STATE_LOST: _ClassVar[FaceState]
    FACE_STATE_MOTION: _ClassVar[FaceState]

class OutputEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_ENCODING_UNSPECIFIED: _ClassVar[OutputEncoding]
    OUTPUT_ENCODING_JPEG: _ClassVar[OutputEncoding]
    OUTPUT_ENCODING_PNG: _ClassVar[OutputEncoding]
    OUTPUT_ENCODING_WEBP: _ClassVar[OutputEncoding]
    OUTPUT_ENCODING_RAW: _ClassVar[OutputEncoding]
    OUTPUT_ENCODING_H264: _ClassVar[OutputEncoding]
    OUTPUT_ENCODING_SHARED_MEMORY: _ClassVar[OutputEncoding]
    OUTPUT_ENCODING_NONE: _ClassVar[OutputEncoding]
PIXEL_FORMAT_UNSPECIFIED: PixelFormat
PIXEL_FORMAT_RGB24: PixelFormat
PIXEL_FORMAT_BGR24: PixelFormat
EXPRESSION_LAYOUT_UNSPECIFIED: ExpressionLayout
EXPRESSION_LAYOUT_KEYPOINTS: ExpressionLayout
EXPRESSION_LAYOUT_COEFFICIENTS: ExpressionLayout
REGION_UNSPECIFIED: Region
REGION_ALL: Region
REGION_EXPRESSION: Region
REGION_POSE: Region
REGION_LIP: Region
REGION_EYES: Region
DRIVING_CROP_UNSPECIFIED: DrivingCrop
DRIVING_CROP_AUTO: DrivingCrop
DRIVING_CROP_ON: DrivingCrop
DRIVING_CROP_OFF: DrivingCrop
DRIVING_OPTION_UNSPECIFIED: DrivingOption
DRIVING_OPTION_EXPRESSION_FRIENDLY: DrivingOption
DRIVING_OPTION_POSE_FRIENDLY: DrivingOption
FACE_STATE_UNSPECIFIED: FaceState
FACE_STATE_NONE: FaceState
FACE_STATE_TRACKED: FaceState
FACE_STATE_REACQUIRED: FaceState
FACE_STATE_LOST: FaceState
FACE_STATE_MOTION: FaceState
OUTPUT_ENCODING_UNSPECIFIED: OutputEncoding
OUTPUT_ENCODING_JPEG: OutputEncoding
OUTPUT_ENCODING_PNG: OutputEncoding
OUTPUT_ENCODING_WEBP: OutputEncoding
OUTPUT_ENCODING_RAW: OutputEncoding
OUTPUT_ENCODING_H264: OutputEncoding
OUTPUT_ENCODING_SHARED_MEMORY: OutputEncoding
OUTPUT_ENCODING_NONE: OutputEncoding

class EncodedImage(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class RawImage(_message.Message):
    __slots__ = ("width", "height", "format", "data")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    format: PixelFormat
    data: bytes
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., format: _Optional[_Union[PixelFormat, str]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SharedImage(_message.Message):
    __slots__ = ("slot", "width", "height", "format")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    width: int
    height: int
    format: PixelFormat
    def __init__(self, slot: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., format: _Optional[_Union[PixelFormat, str]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("encoded", "raw", "shared")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    encoded: EncodedImage
    raw: RawImage
    shared: SharedImage
    def __init__(self, encoded: _Optional[_Union[EncodedImage, _Mapping]] = ..., raw: _Optional[_Union[RawImage, _Mapping]] = ..., shared: _Optional[_Union[SharedImage, _Mapping]] = ...) -> None: ...

class Motion(_message.Message):
    __slots__ = ("pitch", "yaw", "roll", "translation", "scale", "expression", "layout", "left_eye_ratio", "right_eye_ratio", "lip_ratio")
    PITCH_FIELD_NUMBER: _ClassVar[int]
    YAW_FIELD_NUMBER: _ClassVar[int]
    ROLL_FIELD_NUMBER: _ClassVar[int]
    TRANSLATION_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    EXPRESSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LEFT_EYE_RATIO_FIELD_NUMBER: _ClassVar[int]
    RIGHT_EYE_RATIO_FIELD_NUMBER: _ClassVar[int]
    LIP_RATIO_FIELD_NUMBER: _ClassVar[int]
    pitch: float
    yaw: float
    roll: float
    translation: _containers.RepeatedScalarFieldContainer[float]
    scale: float
    expression: _containers.RepeatedScalarFieldContainer[float]
    layout: ExpressionLayout
    left_eye_ratio: float
    right_eye_ratio: float
    lip_ratio: float
    def __init__(self, pitch: _Optional[float] = ..., yaw: _Optional[float] = ..., roll: _Optional[float] = ..., translation: _Optional[_Iterable[float]] = ..., scale: _Optional[float] = ..., expression: _Optional[_Iterable[float]] = ..., layout: _Optional[_Union[ExpressionLayout, str]] = ..., left_eye_ratio: _Optional[float] = ..., right_eye_ratio: _Optional[float] = ..., lip_ratio: _Optional[float] = ...) -> None: ...

class FrameRate(_message.Message):
    __slots__ = ("numerator", "denominator")
    NUMERATOR_FIELD_NUMBER: _ClassVar[int]
    DENOMINATOR_FIELD_NUMBER: _ClassVar[int]
    numerator: int
    denominator: int
    def __init__(self, numerator: _Optional[int] = ..., denominator: _Optional[int] = ...) -> None: ...

class CropOptions(_message.Message):
    __slots__ = ("scale", "vx", "vy", "rotate")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    VX_FIELD_NUMBER: _ClassVar[int]
    VY_FIELD_NUMBER: _ClassVar[int]
    ROTATE_FIELD_NUMBER: _ClassVar[int]
    scale: float
    vx: float
    vy: float
    rotate: bool
    def __init__(self, scale: _Optional[float] = ..., vx: _Optional[float] = ..., vy: _Optional[float] = ..., rotate: bool = ...) -> None: ...

class DrivingCropOptions(_message.Message):
    __slots__ = ("crop", "scale", "vx", "vy")
    CROP_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    VX_FIELD_NUMBER: _ClassVar[int]
    VY_FIELD_NUMBER: _ClassVar[int]
    crop: DrivingCrop
    scale: float
    vx: float
    vy: float
    def __init__(self, crop: _Optional[_Union[DrivingCrop, str]] = ..., scale: _Optional[float] = ..., vx: _Optional[float] = ..., vy: _Optional[float] = ...) -> None: ...

class LivePortraitOptions(_message.Message):
    __slots__ = ("driving_option", "stitching", "eye_retargeting", "lip_retargeting", "normalize_lip", "lip_normalize_threshold", "keep_pose_with_retargeting", "driving_crop")
    DRIVING_OPTION_FIELD_NUMBER: _ClassVar[int]
    STITCHING_FIELD_NUMBER: _ClassVar[int]
    EYE_RETARGETING_FIELD_NUMBER: _ClassVar[int]
    LIP_RETARGETING_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_LIP_FIELD_NUMBER: _ClassVar[int]
    LIP_NORMALIZE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    KEEP_POSE_WITH_RETARGETING_FIELD_NUMBER: _ClassVar[int]
    DRIVING_CROP_FIELD_NUMBER: _ClassVar[int]
    driving_option: DrivingOption
    stitching: bool
    eye_retargeting: bool
    lip_retargeting: bool
    normalize_lip: bool
    lip_normalize_threshold: float
    keep_pose_with_retargeting: bool
    driving_crop: DrivingCropOptions
    def __init__(self, driving_option: _Optional[_Union[DrivingOption, str]] = ..., stitching: bool = ..., eye_retargeting: bool = ..., lip_retargeting: bool = ..., normalize_lip: bool = ..., lip_normalize_threshold: _Optional[float] = ..., keep_pose_with_retargeting: bool = ..., driving_crop: _Optional[_Union[DrivingCropOptions, _Mapping]] = ...) -> None: ...

class AnimationOptions(_message.Message):
    __slots__ = ("region", "multiplier", "relative", "smooth", "paste_back", "edits", "liveportrait")
    class EditsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REGION_FIELD_NUMBER: _ClassVar[int]
    MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_FIELD_NUMBER: _ClassVar[int]
    SMOOTH_FIELD_NUMBER: _ClassVar[int]
    PASTE_BACK_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    LIVEPORTRAIT_FIELD_NUMBER: _ClassVar[int]
    region: Region
    multiplier: float
    relative: bool
    smooth: bool
    paste_back: bool
    edits: _containers.ScalarMap[str, float]
    liveportrait: LivePortraitOptions
    def __init__(self, region: _Optional[_Union[Region, str]] = ..., multiplier: _Optional[float] = ..., relative: bool = ..., smooth: bool = ..., paste_back: bool = ..., edits: _Optional[_Mapping[str, float]] = ..., liveportrait: _Optional[_Union[LivePortraitOptions, _Mapping]] = ...) -> None: ...

class OutputOptions(_message.Message):
    __slots__ = ("encoding", "width", "height", "quality", "pixel_format", "crf", "keyframe_interval")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    PIXEL_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CRF_FIELD_NUMBER: _ClassVar[int]
    KEYFRAME_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    encoding: OutputEncoding
    width: int
    height: int
    quality: int
    pixel_format: PixelFormat
    crf: int
    keyframe_interval: int
    def __init__(self, encoding: _Optional[_Union[OutputEncoding, str]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., quality: _Optional[int] = ..., pixel_format: _Optional[_Union[PixelFormat, str]] = ..., crf: _Optional[int] = ..., keyframe_interval: _Optional[int] = ...) -> None: ...

class Picture(_message.Message):
    __slots__ = ("encoding", "width", "height", "pixel_format", "data", "slot", "keyframe")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    PIXEL_FORMAT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    KEYFRAME_FIELD_NUMBER: _ClassVar[int]
    encoding: OutputEncoding
    width: int
    height: int
    pixel_format: PixelFormat
    data: bytes
    slot: int
    keyframe: bool
    def __init__(self, encoding: _Optional[_Union[OutputEncoding, str]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., pixel_format: _Optional[_Union[PixelFormat, str]] = ..., data: _Optional[bytes] = ..., slot: _Optional[int] = ..., keyframe: bool = ...) -> None: ...

class StageTiming(_message.Message):
    __slots__ = ("stage", "start_us", "duration_us")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    START_US_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    stage: str
    start_us: int
    duration_us: int
    def __init__(self, stage: _Optional[str] = ..., start_us: _Optional[int] = ..., duration_us: _Optional[int] = ...) -> None: ...

class FrameTimings(_message.Message):
    __slots__ = ("received_us", "stages", "total_us")
    RECEIVED_US_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    received_us: int
    stages: _containers.RepeatedCompositeFieldContainer[StageTiming]
    total_us: int
    def __init__(self, received_us: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ..., total_us: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("frames_done", "frames_total")
    FRAMES_DONE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    frames_done: int
    frames_total: int
    def __init__(self, frames_done: _Optional[int] = ..., frames_total: _Optional[int] = ...) -> None: ...

class ErrorDetail(_message.Message):
    __slots__ = ("type", "got", "expected", "remedy", "retry_after_ms", "stream_id")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    GOT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    type: str
    got: str
    expected: str
    remedy: str
    retry_after_ms: int
    stream_id: str
    def __init__(self, type: _Optional[str] = ..., got: _Optional[str] = ..., expected: _Optional[str] = ..., remedy: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., stream_id: _Optional[str] = ...) -> None: ...
