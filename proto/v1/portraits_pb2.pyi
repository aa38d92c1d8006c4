from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from lp_edge.proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PortraitOptions(_message.Message):
    __slots__ = ("faces", "size", "crop")
    FACES_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CROP_FIELD_NUMBER: _ClassVar[int]
    faces: str
    size: int
    crop: _common_pb2.CropOptions
    def __init__(self, faces: _Optional[str] = ..., size: _Optional[int] = ..., crop: _Optional[_Union[_common_pb2.CropOptions, _Mapping]] = ...) -> None: ...

class RegisterPortraitRequest(_message.Message):
    __slots__ = ("image", "options", "time_to_live", "thumbnail_side")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_LIVE_FIELD_NUMBER: _ClassVar[int]
    THUMBNAIL_SIDE_FIELD_NUMBER: _ClassVar[int]
    image: _common_pb2.Image
    options: PortraitOptions
    time_to_live: _duration_pb2.Duration
    thumbnail_side: int
    def __init__(self, image: _Optional[_Union[_common_pb2.Image, _Mapping]] = ..., options: _Optional[_Union[PortraitOptions, _Mapping]] = ..., time_to_live: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., thumbnail_side: _Optional[int] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("left", "top", "right", "bottom")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    left: float
    top: float
    right: float
    bottom: float
    def __init__(self, left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ...) -> None: ...

class Face(_message.Message):
    __slots__ = ("box", "landmarks", "score")
    BOX_FIELD_NUMBER: _ClassVar[int]
    LANDMARKS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    box: Box
    landmarks: _containers.RepeatedScalarFieldContainer[float]
    score: float
    def __init__(self, box: _Optional[_Union[Box, _Mapping]] = ..., landmarks: _Optional[_Iterable[float]] = ..., score: _Optional[float] = ...) -> None: ...

class Portrait(_message.Message):
    __slots__ = ("id", "width", "height", "faces", "thumbnail", "memory_bytes", "active_streams", "created_at", "expires_at", "options", "detected_faces")
    ID_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FACES_FIELD_NUMBER: _ClassVar[int]
    THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_STREAMS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DETECTED_FACES_FIELD_NUMBER: _ClassVar[int]
    id: str
    width: int
    height: int
    faces: _containers.RepeatedCompositeFieldContainer[Face]
    thumbnail: bytes
    memory_bytes: int
    active_streams: int
    created_at: _timestamp_pb2.Timestamp
    expires_at: _timestamp_pb2.Timestamp
    options: PortraitOptions
    detected_faces: _containers.RepeatedCompositeFieldContainer[Box]
    def __init__(self, id: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., faces: _Optional[_Iterable[_Union[Face, _Mapping]]] = ..., thumbnail: _Optional[bytes] = ..., memory_bytes: _Optional[int] = ..., active_streams: _Optional[int] = ..., created_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., expires_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., options: _Optional[_Union[PortraitOptions, _Mapping]] = ..., detected_faces: _Optional[_Iterable[_Union[Box, _Mapping]]] = ...) -> None: ...

class RegisterPortraitResponse(_message.Message):
    __slots__ = ("portrait",)
    PORTRAIT_FIELD_NUMBER: _ClassVar[int]
    portrait: Portrait
    def __init__(self, portrait: _Optional[_Union[Portrait, _Mapping]] = ...) -> None: ...

class ListPortraitsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPortraitsResponse(_message.Message):
    __slots__ = ("portraits", "memory_bytes", "memory_limit_bytes")
    PORTRAITS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    portraits: _containers.RepeatedCompositeFieldContainer[Portrait]
    memory_bytes: int
    memory_limit_bytes: int
    def __init__(self, portraits: _Optional[_Iterable[_Union[Portrait, _Mapping]]] = ..., memory_bytes: _Optional[int] = ..., memory_limit_bytes: _Optional[int] = ...) -> None: ...

class DeletePortraitRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class DeletePortraitResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
