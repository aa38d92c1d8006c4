"""The errors of lp-edge: one small tree, one exit code and one gRPC status each.

::

    LpEdgeError                    1   INTERNAL
    ├── ConfigError                2   INVALID_ARGUMENT      an option, a key or a combination is wrong
    ├── MediaError                 3   INVALID_ARGUMENT      a picture, clip or template cannot be read
    ├── NoFaceError                4   FAILED_PRECONDITION   nothing to animate, or nothing to drive with
    ├── BundleError                5   FAILED_PRECONDITION   a bundle is incomplete, altered or unknown
    ├── EngineError                6   INTERNAL              a network failed, or got wrong tensors
    │   └── TensorError            6   INVALID_ARGUMENT      a name, dtype or shape does not fit
    ├── BackendUnavailable         7   UNAVAILABLE           a backend, provider or device is not there
    ├── OutputError                8   RESOURCE_EXHAUSTED    the result cannot be written
    ├── ExportError                9   INTERNAL              an export or its parity check failed
    ├── LimitError                10   RESOURCE_EXHAUSTED    a limit of the server is reached
    ├── NotFoundError             11   NOT_FOUND             the server has no portrait of that id
    ├── AccessError               12   UNAUTHENTICATED       a token or certificate is missing or wrong
    ├── ServerUnavailable         13   UNAVAILABLE           the server cannot be reached, or is about to stop
    ├── DeadlineError             14   DEADLINE_EXCEEDED     a call took, or a stream was silent, for too long
    ├── ProtocolError             15   INVALID_ARGUMENT      a message came at the wrong time or with wrong content
    └── Interrupted              130   CANCELLED             the user stopped the run

Every message has three parts: what was got, what was expected, what to do. The parts are kept apart
so that a front end may lay them out; ``str(error)`` joins them.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AccessError",
    "BackendUnavailable",
    "BundleError",
    "ConfigError",
    "DeadlineError",
    "EngineError",
    "ExportError",
    "Interrupted",
    "LimitError",
    "LpEdgeError",
    "MediaError",
    "NoFaceError",
    "NotFoundError",
    "OutputError",
    "ProtocolError",
    "ServerUnavailable",
    "TensorError",
]


class LpEdgeError(Exception):
    """Root of everything lp-edge raises on purpose.

    Args:
        got: what was found, with the offending value or path in it.
        expected: what would have been right; may be empty when ``got`` says it all.
        remedy: what the user can do about it; may be empty.

    Example:
        >>> str(LpEdgeError("got 3 channels", "expected 4", "add an alpha channel"))
        'got 3 channels; expected 4. To fix it: add an alpha channel'
    """

    exit_code: ClassVar[int] = 1
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, got: str, expected: str = "", remedy: str = "") -> None:
        self.got, self.expected, self.remedy = got, expected, remedy
        text = f"{got}; {expected}" if expected else got
        super().__init__(f"{text}. To fix it: {remedy}" if remedy else text)


class ConfigError(LpEdgeError):
    """An option, a configuration key or a combination of them is wrong."""

    exit_code = 2
    grpc_status = "INVALID_ARGUMENT"


class MediaError(LpEdgeError):
    """A picture, a clip or a motion template is missing, broken or out of bounds."""

    exit_code = 3
    grpc_status = "INVALID_ARGUMENT"


class NoFaceError(LpEdgeError):
    """There is no usable face where one is needed."""

    exit_code = 4
    grpc_status = "FAILED_PRECONDITION"


class BundleError(LpEdgeError):
    """A bundle lacks a file, fails its hash or has an unknown schema."""

    exit_code = 5
    grpc_status = "FAILED_PRECONDITION"


class EngineError(LpEdgeError):
    """A network could not be loaded or run."""

    exit_code = 6


class TensorError(EngineError):
    """A tensor handed to a runner has the wrong name, dtype or shape."""

    grpc_status = "INVALID_ARGUMENT"


class BackendUnavailable(LpEdgeError):
    """A backend, an execution provider or a device was asked for and is not there."""

    exit_code = 7
    grpc_status = "UNAVAILABLE"


class OutputError(LpEdgeError):
    """The result cannot be written: no folder, no permission, no space, no encoder."""

    exit_code = 8
    grpc_status = "RESOURCE_EXHAUSTED"


class ExportError(LpEdgeError):
    """Building a bundle failed, or a parity check broke its tolerance."""

    exit_code = 9


class _Passing(LpEdgeError):
    """What may be over after a while.

    Args:
        retry_after_s: seconds after which another try makes sense; 0 = unknown.
    """

    def __init__(self, got: str, expected: str = "", remedy: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(got, expected, remedy)
        self.retry_after_s = retry_after_s


class LimitError(_Passing):
    """A limit of the server is reached: streams, portraits, memory, sizes."""

    exit_code = 10
    grpc_status = "RESOURCE_EXHAUSTED"


class NotFoundError(LpEdgeError):
    """The server has no portrait of that id (any more)."""

    exit_code = 11
    grpc_status = "NOT_FOUND"


class AccessError(LpEdgeError):
    """A token or a certificate is missing, wrong or expired."""

    exit_code = 12
    grpc_status = "UNAUTHENTICATED"


class ServerUnavailable(_Passing):
    """The server cannot be reached, went away, or is about to stop."""

    exit_code = 13
    grpc_status = "UNAVAILABLE"


class DeadlineError(LpEdgeError):
    """A call took longer than its deadline, or a stream was silent for too long."""

    exit_code = 14
    grpc_status = "DEADLINE_EXCEEDED"


class ProtocolError(LpEdgeError):
    """A message of a stream came at the wrong time or holds what no message may hold."""

    exit_code = 15
    grpc_status = "INVALID_ARGUMENT"


class Interrupted(LpEdgeError):
    """The run was stopped from outside (Ctrl-C, SIGTERM, cancellation)."""

    exit_code = 130
    grpc_status = "CANCELLED"
