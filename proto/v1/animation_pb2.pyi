from lp_edge.proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STREAM_MODE_UNSPECIFIED: _ClassVar[StreamMode]
    STREAM_MODE_LIVE: _ClassVar[StreamMode]
    STREAM_MODE_LOSSLESS: _ClassVar[StreamMode]

class SkipReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SKIP_REASON_UNSPECIFIED: _ClassVar[SkipReason]
    SKIP_REASON_NEWER: _ClassVar[SkipReason]
    SKIP_REASON_UNDECODABLE: _ClassVar[SkipReason]

class MotionInput(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MOTION_INPUT_UNSPECIFIED: _ClassVar[MotionInput]
    MOTION_INPUT_FRAMES: _ClassVar[MotionInput]
    MOTION_INPUT_CLIP: _ClassVar[MotionInput]

class MotionOutput(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MOTION_OUTPUT_UNSPECIFIED: _ClassVar[MotionOutput]
    MOTION_OUTPUT_MOTIONS: _ClassVar[MotionOutput]
    MOTION_OUTPUT_TEMPLATE: _ClassVar[MotionOutput]

class UploadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPLOAD_KIND_UNSPECIFIED: _ClassVar[UploadKind]
    UPLOAD_KIND_TEMPLATE: _ClassVar[UploadKind]
    UPLOAD_KIND_CLIP: _ClassVar[UploadKind]

class RenderOutput(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RENDER_OUTPUT_UNSPECIFIED: _ClassVar[RenderOutput]
    RENDER_OUTPUT_FRAMES: _ClassVar[RenderOutput]
    RENDER_OUTPUT_MP4: _ClassVar[RenderOutput]
STREAM_MODE_UNSPECIFIED: StreamMode
STREAM_MODE_LIVE: StreamMode
STREAM_MODE_LOSSLESS: StreamMode
SKIP_REASON_UNSPECIFIED: SkipReason
SKIP_REASON_NEWER: SkipReason
SKIP_REASON_UNDECODABLE: SkipReason
MOTION_INPUT_UNSPECIFIED: MotionInput
MOTION_INPUT_FRAMES: MotionInput
MOTION_INPUT_CLIP: MotionInput
MOTION_OUTPUT_UNSPECIFIED: MotionOutput
MOTION_OUTPUT_MOTIONS: MotionOutput
MOTION_OUTPUT_TEMPLATE: MotionOutput
UPLOAD_KIND_UNSPECIFIED: UploadKind
UPLOAD_KIND_TEMPLATE: UploadKind
UPLOAD_KIND_CLIP: UploadKind
RENDER_OUTPUT_UNSPECIFIED: RenderOutput
RENDER_OUTPUT_FRAMES: RenderOutput
RENDER_OUTPUT_MP4: RenderOutput

class SharedMemoryRequest(_message.Message):
    __slots__ = ("driving_slots", "driving_slot_bytes", "result_slots", "result_slot_bytes")
    DRIVING_SLOTS_FIELD_NUMBER: _ClassVar[int]
    DRIVING_SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESULT_SLOTS_FIELD_NUMBER: _ClassVar[int]
    RESULT_SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    driving_slots: int
    driving_slot_bytes: int
    result_slots: int
    result_slot_bytes: int
    def __init__(self, driving_slots: _Optional[int] = ..., driving_slot_bytes: _Optional[int] = ..., result_slots: _Optional[int] = ..., result_slot_bytes: _Optional[int] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("name", "size", "driving_stride", "results_offset", "result_stride")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DRIVING_STRIDE_FIELD_NUMBER: _ClassVar[int]
    RESULTS_OFFSET_FIELD_NUMBER: _ClassVar[int]
    RESULT_STRIDE_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    driving_stride: int
    results_offset: int
    result_stride: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., driving_stride: _Optional[int] = ..., results_offset: _Optional[int] = ..., result_stride: _Optional[int] = ...) -> None: ...

class AnimateConfig(_message.Message):
    __slots__ = ("portrait_ids", "options", "mode", "output", "shared_memory", "neutral", "with_motion", "motion_layout")
    PORTRAIT_IDS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    NEUTRAL_FIELD_NUMBER: _ClassVar[int]
    WITH_MOTION_FIELD_NUMBER: _ClassVar[int]
    MOTION_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    portrait_ids: _containers.RepeatedScalarFieldContainer[str]
    options: _common_pb2.AnimationOptions
    mode: StreamMode
    output: _common_pb2.OutputOptions
    shared_memory: SharedMemoryRequest
    neutral: _common_pb2.Motion
    with_motion: bool
    motion_layout: _common_pb2.ExpressionLayout
    def __init__(self, portrait_ids: _Optional[_Iterable[str]] = ..., options: _Optional[_Union[_common_pb2.AnimationOptions, _Mapping]] = ..., mode: _Optional[_Union[StreamMode, str]] = ..., output: _Optional[_Union[_common_pb2.OutputOptions, _Mapping]] = ..., shared_memory: _Optional[_Union[SharedMemoryRequest, _Mapping]] = ..., neutral: _Optional[_Union[_common_pb2.Motion, _Mapping]] = ..., with_motion: bool = ..., motion_layout: _Optional[_Union[_common_pb2.ExpressionLayout, str]] = ...) -> None: ...

class DrivingFrame(_message.Message):
    __slots__ = ("sequence", "timestamp_us", "image", "motion")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_US_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MOTION_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    timestamp_us: int
    image: _common_pb2.Image
    motion: _common_pb2.Motion
    def __init__(self, sequence: _Optional[int] = ..., timestamp_us: _Optional[int] = ..., image: _Optional[_Union[_common_pb2.Image, _Mapping]] = ..., motion: _Optional[_Union[_common_pb2.Motion, _Mapping]] = ...) -> None: ...

class SetNeutral(_message.Message):
    __slots__ = ("motion",)
    MOTION_FIELD_NUMBER: _ClassVar[int]
    motion: _common_pb2.Motion
    def __init__(self, motion: _Optional[_Union[_common_pb2.Motion, _Mapping]] = ...) -> None: ...

class SharedMemoryMapped(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AnimateRequest(_message.Message):
    __slots__ = ("config", "frame", "options", "set_neutral", "shared_memory_mapped", "results_taken")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SET_NEUTRAL_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_MAPPED_FIELD_NUMBER: _ClassVar[int]
    RESULTS_TAKEN_FIELD_NUMBER: _ClassVar[int]
    config: AnimateConfig
    frame: DrivingFrame
    options: _common_pb2.AnimationOptions
    set_neutral: SetNeutral
    shared_memory_mapped: SharedMemoryMapped
    results_taken: int
    def __init__(self, config: _Optional[_Union[AnimateConfig, _Mapping]] = ..., frame: _Optional[_Union[DrivingFrame, _Mapping]] = ..., options: _Optional[_Union[_common_pb2.AnimationOptions, _Mapping]] = ..., set_neutral: _Optional[_Union[SetNeutral, _Mapping]] = ..., shared_memory_mapped: _Optional[_Union[SharedMemoryMapped, _Mapping]] = ..., results_taken: _Optional[int] = ...) -> None: ...

class StreamStarted(_message.Message):
    __slots__ = ("stream_id", "shared_memory")
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    stream_id: str
    shared_memory: SharedMemory
    def __init__(self, stream_id: _Optional[str] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ...) -> None: ...

class AnimatedFrame(_message.Message):
    __slots__ = ("sequence", "timestamp_us", "pictures", "face_state", "motion", "timings", "dropped", "undecodable")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_US_FIELD_NUMBER: _ClassVar[int]
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    FACE_STATE_FIELD_NUMBER: _ClassVar[int]
    MOTION_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    UNDECODABLE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    timestamp_us: int
    pictures: _containers.RepeatedCompositeFieldContainer[_common_pb2.Picture]
    face_state: _common_pb2.FaceState
    motion: _common_pb2.Motion
    timings: _common_pb2.FrameTimings
    dropped: int
    undecodable: int
    def __init__(self, sequence: _Optional[int] = ..., timestamp_us: _Optional[int] = ..., pictures: _Optional[_Iterable[_Union[_common_pb2.Picture, _Mapping]]] = ..., face_state: _Optional[_Union[_common_pb2.FaceState, str]] = ..., motion: _Optional[_Union[_common_pb2.Motion, _Mapping]] = ..., timings: _Optional[_Union[_common_pb2.FrameTimings, _Mapping]] = ..., dropped: _Optional[int] = ..., undecodable: _Optional[int] = ...) -> None: ...

class FrameSkipped(_message.Message):
    __slots__ = ("sequence", "reason")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    reason: SkipReason
    def __init__(self, sequence: _Optional[int] = ..., reason: _Optional[_Union[SkipReason, str]] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("deadline_ms",)
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    deadline_ms: int
    def __init__(self, deadline_ms: _Optional[int] = ...) -> None: ...

class AnimateResponse(_message.Message):
    __slots__ = ("started", "frame", "draining", "skipped", "driving_taken")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    DRIVING_TAKEN_FIELD_NUMBER: _ClassVar[int]
    started: StreamStarted
    frame: AnimatedFrame
    draining: Draining
    skipped: FrameSkipped
    driving_taken: int
    def __init__(self, started: _Optional[_Union[StreamStarted, _Mapping]] = ..., frame: _Optional[_Union[AnimatedFrame, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., skipped: _Optional[_Union[FrameSkipped, _Mapping]] = ..., driving_taken: _Optional[int] = ...) -> None: ...

class ExtractMotionConfig(_message.Message):
    __slots__ = ("input", "output", "options", "frame_rate", "neutral_frame", "layout")
    INPUT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    FRAME_RATE_FIELD_NUMBER: _ClassVar[int]
    NEUTRAL_FRAME_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    input: MotionInput
    output: MotionOutput
    options: _common_pb2.AnimationOptions
    frame_rate: _common_pb2.FrameRate
    neutral_frame: int
    layout: _common_pb2.ExpressionLayout
    def __init__(self, input: _Optional[_Union[MotionInput, str]] = ..., output: _Optional[_Union[MotionOutput, str]] = ..., options: _Optional[_Union[_common_pb2.AnimationOptions, _Mapping]] = ..., frame_rate: _Optional[_Union[_common_pb2.FrameRate, _Mapping]] = ..., neutral_frame: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.ExpressionLayout, str]] = ...) -> None: ...

class ExtractMotionRequest(_message.Message):
    __slots__ = ("config", "frame", "clip_chunk")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    CLIP_CHUNK_FIELD_NUMBER: _ClassVar[int]
    config: ExtractMotionConfig
    frame: DrivingFrame
    clip_chunk: bytes
    def __init__(self, config: _Optional[_Union[ExtractMotionConfig, _Mapping]] = ..., frame: _Optional[_Union[DrivingFrame, _Mapping]] = ..., clip_chunk: _Optional[bytes] = ...) -> None: ...

class ExtractedMotion(_message.Message):
    __slots__ = ("sequence", "timestamp_us", "face_state", "motion")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_US_FIELD_NUMBER: _ClassVar[int]
    FACE_STATE_FIELD_NUMBER: _ClassVar[int]
    MOTION_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    timestamp_us: int
    face_state: _common_pb2.FaceState
    motion: _common_pb2.Motion
    def __init__(self, sequence: _Optional[int] = ..., timestamp_us: _Optional[int] = ..., face_state: _Optional[_Union[_common_pb2.FaceState, str]] = ..., motion: _Optional[_Union[_common_pb2.Motion, _Mapping]] = ...) -> None: ...

class ExtractMotionResponse(_message.Message):
    __slots__ = ("motion", "template_chunk", "progress")
    MOTION_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_CHUNK_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    motion: ExtractedMotion
    template_chunk: bytes
    progress: _common_pb2.Progress
    def __init__(self, motion: _Optional[_Union[ExtractedMotion, _Mapping]] = ..., template_chunk: _Optional[bytes] = ..., progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ...) -> None: ...

class RenderConfig(_message.Message):
    __slots__ = ("portrait_id", "options", "built_in", "upload", "result", "output", "neutral_frame")
    PORTRAIT_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    BUILT_IN_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    NEUTRAL_FRAME_FIELD_NUMBER: _ClassVar[int]
    portrait_id: str
    options: _common_pb2.AnimationOptions
    built_in: str
    upload: UploadKind
    result: RenderOutput
    output: _common_pb2.OutputOptions
    neutral_frame: int
    def __init__(self, portrait_id: _Optional[str] = ..., options: _Optional[_Union[_common_pb2.AnimationOptions, _Mapping]] = ..., built_in: _Optional[str] = ..., upload: _Optional[_Union[UploadKind, str]] = ..., result: _Optional[_Union[RenderOutput, str]] = ..., output: _Optional[_Union[_common_pb2.OutputOptions, _Mapping]] = ..., neutral_frame: _Optional[int] = ...) -> None: ...

class RenderRequest(_message.Message):
    __slots__ = ("config", "upload_chunk")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_CHUNK_FIELD_NUMBER: _ClassVar[int]
    config: RenderConfig
    upload_chunk: bytes
    def __init__(self, config: _Optional[_Union[RenderConfig, _Mapping]] = ..., upload_chunk: _Optional[bytes] = ...) -> None: ...

class RenderFinished(_message.Message):
    __slots__ = ("frames", "frame_rate", "width", "height", "warnings")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FRAME_RATE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    frames: int
    frame_rate: _common_pb2.FrameRate
    width: int
    height: int
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, frames: _Optional[int] = ..., frame_rate: _Optional[_Union[_common_pb2.FrameRate, _Mapping]] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class RenderResponse(_message.Message):
    __slots__ = ("progress", "frame", "file_chunk", "finished")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    FILE_CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    progress: _common_pb2.Progress
    frame: AnimatedFrame
    file_chunk: bytes
    finished: RenderFinished
    def __init__(self, progress: _Optional[_Union[_common_pb2.Progress, _Mapping]] = ..., frame: _Optional[_Union[AnimatedFrame, _Mapping]] = ..., file_chunk: _Optional[bytes] = ..., finished: _Optional[_Union[RenderFinished, _Mapping]] = ...) -> None: ...
