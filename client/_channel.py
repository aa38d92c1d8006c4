"""What both clients share of gRPC: the channel's options and credentials, errors, and when to try again.

The clients get ``grpc`` from here, so that its absence is told in one place.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lp_edge.client.types import TlsFiles
from lp_edge.errors import (
    AccessError,
    BackendUnavailable,
    ConfigError,
    LimitError,
    LpEdgeError,
    ServerUnavailable,
)
from lp_edge.runtime.checks import within

try:
    import grpc

    from lp_edge.proto.v1 import (
        animation_pb2_grpc,
        portraits_pb2_grpc,
        server_pb2_grpc,
    )
except ImportError as missing:
    raise BackendUnavailable(
        f"the client needs gRPC and protobuf ({missing})",
        "expected the packages of the extra 'client'",
        "pip install 'lp-edge[client]'",
    ) from missing

__all__ = ["CHUNK_BYTES", "Backoff", "Settings", "Stubs", "grpc", "is_local", "rpc_error"]

CHUNK_BYTES = 256 * 1024
"""Bytes of a file that travel in one message."""

_LOG = logging.getLogger("lp_edge")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0

_SCHEMES = ("unix", "unix-abstract", "dns", "ipv4", "ipv6", "vsock", "xds")

# What gRPC's C library says of a failed handshake → what was expected, and what to do. It has no codes for them.
_CERTIFICATE_SIGNS = (
    (
        "certificate has expired",
        "expected a server's certificate that is valid now",
        "renew it, or correct the clock",
    ),
    (
        "Hostname Verification",
        "expected the target's name in the server's certificate",
        "name the target as the certificate does, or say which name it has (server_name, --tls-name)",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "expected a server's certificate that the given authority signed",
        "give the authority that signed it (ca, --tls-ca)",
    ),
)
_OTHER_SIGNS = (
    (
        "WRONG_VERSION_NUMBER",
        "expected a server with TLS there",
        "leave TLS out (tls, --tls, --tls-ca), or name a server that has it",
    ),
    (
        "Failed parsing HTTP/2",
        "expected gRPC there, not HTTP",
        "name the port of --listen, not of --http or --metrics-port",
    ),
    (
        ": Socket closed",
        "expected a server without TLS, or one that takes this client's certificate",
        "give its certificate authority (tls, --tls-ca) where it uses TLS, and a certificate (--tls-cert) where it asks for one",
    ),
)
_NOBODY = (
    "expected lp-serve to listen there",
    "start it (lp-serve), or name the right target and, where it uses TLS, its certificate authority",
)


@dataclass(frozen=True)
class Settings:
    """How a client reaches its server; see :class:`lp_edge.client.Client` for the fields.

    Raises:
        ConfigError: a value is out of range, or a token would travel in the clear.
    """

    target: str
    token: str | None = field(repr=False)
    tls: TlsFiles | None
    insecure: bool
    timeout_s: float
    reconnect: bool
    reconnect_timeout_s: float
    keepalive_s: float
    max_message_bytes: int

    def __post_init__(self) -> None:
        _check_target(self.target)
        within("timeout_s", self.timeout_s, 1e-3, 1e6)
        within("reconnect_timeout_s", self.reconnect_timeout_s, 1e-3, 1e6)
        within("keepalive_s", self.keepalive_s, 5.0, 1e6)
        within("max_message_bytes", self.max_message_bytes, 1 << 16, (1 << 31) - 1)
        if self.token is not None:
            if not self.token or not self.token.isascii() or not self.token.isprintable():
                raise ConfigError(
                    "a token that is empty or holds other than printable ASCII", "", "give the server's token"
                )
            if self.tls is None and not self.insecure and not is_local(self.target):
                raise ConfigError(
                    f"a token for {self.target} without TLS",
                    "expected an encrypted connection: anybody on the way could read the token",
                    "give the server's certificate authority (tls, --tls-ca), or allow it (insecure, --insecure) where the network is your own",
                )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    @property
    def options(self) -> list[tuple[str, Any]]:
        """The channel's options."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", round(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # A server that was started again is to be found at once; gRPC's own pauses grow to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # Otherwise all clients of one target in a process share one connection and its pauses.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For TLS; None = none is wanted.

        Raises:
            ConfigError: a file cannot be read.
        """
        if self.tls is None:
            return None
        tls = self.tls
        return grpc.ssl_channel_credentials(_pem(tls.ca), _pem(tls.key), _pem(tls.certificate))


def _check_target(target: str) -> None:
    """ConfigError for what gRPC would take for something else: no port (443), one that wraps around, a URL."""
    scheme = target.partition(":")[0]
    if scheme in _SCHEMES and not target.startswith(f"{scheme}://"):
        return  # gRPC's own forms
    read = re.fullmatch(r"(?:dns:///)?(\[[0-9A-Fa-f:.%a-z]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", target)
    if read is None or not 0 < int(read[2]) < 65536:
        raise ConfigError(
            f"the target is {target[:200]!r}",
            "expected host:port, [IPv6]:port or unix:/path, ports from 1 to 65535",
            "for example 127.0.0.1:50051",
        )


def _pem(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror})", "expected a PEM file", "check path and permissions"
        ) from error
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{path} is no PEM file", "expected -----BEGIN … in it", "convert it to PEM")
    return data


def is_local(target: str) -> bool:
    """Whether a target is on this machine: loopback, or a Unix socket.

    Example:
        >>> is_local("127.0.0.1:50051"), is_local("unix:/run/lp.sock"), is_local("[::1]:7"), is_local("10.0.0.2:50051")
        (True, True, True, False)
    """
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    name = target.removeprefix("dns:///").removeprefix("ipv4:").removeprefix("ipv6:")
    host = name[1 : name.find("]")] if name.startswith("[") else name.rpartition(":")[0] or name
    octets = host.split(".")
    return host in ("localhost", "::1") or (octets[0] == "127" and len(octets) == 4)


class Stubs:
    """The services over one channel, sync or asyncio."""

    def __init__(self, channel: Any) -> None:
        self.server: Any = server_pb2_grpc.ServerServiceStub(channel)
        self.portraits: Any = portraits_pb2_grpc.PortraitServiceStub(channel)
        self.animation: Any = animation_pb2_grpc.AnimationServiceStub(channel)


def closed_error() -> ConfigError:
    """The error for a call of a client that was closed."""
    return ConfigError("a call of a client that was closed", "expected an open one", "open another one")


def rpc_error(error: Any, target: str) -> LpEdgeError:
    """The error of lp-edge that a failed call stands for.

    Args:
        error: a ``grpc.RpcError`` of either API.
        target: named where the server could not be reached.
    """
    from lp_edge.runtime.server.wire import error_from_metadata

    metadata: Sequence[tuple[str, str | bytes]] = tuple(error.trailing_metadata() or ())
    details = error.details() or ""
    rebuilt = error_from_metadata(error.code().name, details, metadata)
    if isinstance(rebuilt, ServerUnavailable) and not any(key == "lp-edge-error-bin" for key, _ in metadata):
        # From the transport, not from the server: say whom we tried to reach.
        got = f"no answer from {target}: {details or 'the connection was lost'}"
        for sign, expected, remedy in _CERTIFICATE_SIGNS:
            if sign in details:  # no waiting cures it
                return AccessError(got, expected, remedy)
        for sign, expected, remedy in (*_OTHER_SIGNS, ("", *_NOBODY)):
            if sign in details:
                return ServerUnavailable(got, expected, remedy, retry_after_s=rebuilt.retry_after_s)
    return rebuilt


class Backoff:
    """Pauses between tries: exponential with jitter, and at least what the server asked for.

    Args:
        seconds: how long tries are repeated, counted from now.

    Example:
        >>> backoff = Backoff(60.0)
        >>> 0.05 <= backoff.pause(ServerUnavailable("gone")) <= 0.1
        True
    """

    def __init__(self, seconds: float) -> None:
        self._end, self._next, self._told = time.monotonic() + seconds, _FIRST_PAUSE, False

    def pause(self, error: ServerUnavailable | LimitError) -> float:
        """Seconds to wait before the next try; raises ``error`` when there is no time left for one."""
        pause = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, _LONGEST_PAUSE)
        pause = max(pause, error.retry_after_s)
        left = self._end - time.monotonic()
        if pause > left:
            raise error
        if not self._told:
            _LOG.warning("%s; trying again for %.0f s", error.got, left)
            self._told = True
        return pause
