from google.protobuf import duration_pb2 as _duration_pb2
from lp_edge.proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BundleInfo(_message.Message):
    __slots__ = ("family", "variant", "licence", "manifest_sha256", "networks")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    family: str
    variant: str
    licence: str
    manifest_sha256: str
    networks: _containers.RepeatedCompositeFieldContainer[NetworkInfo]
    def __init__(self, family: _Optional[str] = ..., variant: _Optional[str] = ..., licence: _Optional[str] = ..., manifest_sha256: _Optional[str] = ..., networks: _Optional[_Iterable[_Union[NetworkInfo, _Mapping]]] = ...) -> None: ...

class NetworkInfo(_message.Message):
    __slots__ = ("name", "sha256", "precision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    precision: str
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., precision: _Optional[str] = ...) -> None: ...

class DeviceInfo(_message.Message):
    __slots__ = ("name", "backend", "threads")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    name: str
    backend: str
    threads: int
    def __init__(self, name: _Optional[str] = ..., backend: _Optional[str] = ..., threads: _Optional[int] = ...) -> None: ...

class MotionInfo(_message.Message):
    __slots__ = ("family", "layout", "expression_size", "keypoints", "neutral")
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    EXPRESSION_SIZE_FIELD_NUMBER: _ClassVar[int]
    KEYPOINTS_FIELD_NUMBER: _ClassVar[int]
    NEUTRAL_FIELD_NUMBER: _ClassVar[int]
    family: str
    layout: _common_pb2.ExpressionLayout
    expression_size: int
    keypoints: int
    neutral: _common_pb2.Motion
    def __init__(self, family: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.ExpressionLayout, str]] = ..., expression_size: _Optional[int] = ..., keypoints: _Optional[int] = ..., neutral: _Optional[_Union[_common_pb2.Motion, _Mapping]] = ...) -> None: ...

class EditInfo(_message.Message):
    __slots__ = ("name", "minimum", "maximum", "neutral", "unit", "description")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_FIELD_NUMBER: _ClassVar[int]
    NEUTRAL_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    name: str
    minimum: float
    maximum: float
    neutral: float
    unit: str
    description: str
    def __init__(self, name: _Optional[str] = ..., minimum: _Optional[float] = ..., maximum: _Optional[float] = ..., neutral: _Optional[float] = ..., unit: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_streams", "max_portraits", "max_portrait_bytes", "max_queue", "max_message_bytes", "max_pixels", "max_upload_bytes", "max_shared_memory_bytes", "max_batch", "max_batch_wait", "portrait_time_to_live", "idle_timeout")
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_PORTRAITS_FIELD_NUMBER: _ClassVar[int]
    MAX_PORTRAIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SHARED_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_WAIT_FIELD_NUMBER: _ClassVar[int]
    PORTRAIT_TIME_TO_LIVE_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    max_streams: int
    max_portraits: int
    max_portrait_bytes: int
    max_queue: int
    max_message_bytes: int
    max_pixels: int
    max_upload_bytes: int
    max_shared_memory_bytes: int
    max_batch: int
    max_batch_wait: _duration_pb2.Duration
    portrait_time_to_live: _duration_pb2.Duration
    idle_timeout: _duration_pb2.Duration
    def __init__(self, max_streams: _Optional[int] = ..., max_portraits: _Optional[int] = ..., max_portrait_bytes: _Optional[int] = ..., max_queue: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_pixels: _Optional[int] = ..., max_upload_bytes: _Optional[int] = ..., max_shared_memory_bytes: _Optional[int] = ..., max_batch: _Optional[int] = ..., max_batch_wait: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., portrait_time_to_live: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., idle_timeout: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("streams", "portraits", "portrait_bytes", "waiting_calls", "draining")
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    PORTRAITS_FIELD_NUMBER: _ClassVar[int]
    PORTRAIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_CALLS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    streams: int
    portraits: int
    portrait_bytes: int
    waiting_calls: int
    draining: bool
    def __init__(self, streams: _Optional[int] = ..., portraits: _Optional[int] = ..., portrait_bytes: _Optional[int] = ..., waiting_calls: _Optional[int] = ..., draining: bool = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "bundle", "devices", "motion", "edits", "templates", "limits", "load", "versions", "uptime", "output_encodings")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    MOTION_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    TEMPLATES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    version: str
    bundle: BundleInfo
    devices: _containers.RepeatedCompositeFieldContainer[DeviceInfo]
    motion: MotionInfo
    edits: _containers.RepeatedCompositeFieldContainer[EditInfo]
    templates: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    load: Load
    versions: _containers.ScalarMap[str, str]
    uptime: _duration_pb2.Duration
    output_encodings: _containers.RepeatedScalarFieldContainer[_common_pb2.OutputEncoding]
    def __init__(self, version: _Optional[str] = ..., bundle: _Optional[_Union[BundleInfo, _Mapping]] = ..., devices: _Optional[_Iterable[_Union[DeviceInfo, _Mapping]]] = ..., motion: _Optional[_Union[MotionInfo, _Mapping]] = ..., edits: _Optional[_Iterable[_Union[EditInfo, _Mapping]]] = ..., templates: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., versions: _Optional[_Mapping[str, str]] = ..., uptime: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., output_encodings: _Optional[_Iterable[_Union[_common_pb2.OutputEncoding, str]]] = ...) -> None: ...
