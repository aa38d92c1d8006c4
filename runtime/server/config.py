"""What the server is told before it starts: addresses, limits, access, devices. Everything is checked here, once."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError

__all__ = ["MIN_TOKEN", "Address", "Limits", "ServerConfig", "TlsConfig", "check_token", "parse_address"]

MIN_TOKEN: Final = 16
"""Characters that a token has at least."""

_SHOWN: Final = 200  # characters of a wrong address that a message repeats
_TOKEN: Final = re.compile(r"[!-~]+")  # what a header carries unchanged: printable ASCII without blanks


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: name or IP address without brackets; empty for a socket file.
        port: 0 to 65535; 0 = any free one.
        path: the socket file; None for TCP.
    """

    host: str
    port: int = 0
    path: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect: a loopback address, ``localhost``, or a socket file."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name may resolve to anything

    def with_port(self, port: int) -> Address:
        """The same host with the port that was bound."""
        return Address(self.host, port, self.path)

    def __str__(self) -> str:
        """As :func:`parse_address` reads it; gRPC understands it too."""
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, option: str = "listen") -> Address:
    """Read ``host:port``, ``[IPv6]:port`` or ``unix:/path``.

    Args:
        text: for example ``127.0.0.1:50051``, ``[::1]:0``, ``unix:/run/lp-serve/lp.sock``.
        option: what it is called in messages.

    Raises:
        ConfigError: it is none of them.
    """
    if text.startswith("unix:"):
        path = Path(text[5:])
        # sockaddr_un has 108 bytes with the final zero.
        if not path.is_absolute() or path.name == "" or len(str(path).encode()) > 107:
            raise ConfigError(
                f"{option} is {text[:_SHOWN]!r}",
                "expected unix: and an absolute path of at most 107 bytes",
                "for example unix:/run/lp-serve/lp.sock",
            )
        return Address("", 0, path)
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if bracketed:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            bare = ""
    elif not re.fullmatch(r"[A-Za-z0-9._-]+", host):
        bare = ""
    if not colon or not bare or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(
            f"{option} is {text[:_SHOWN]!r}",
            "expected host:port, [IPv6]:port or unix:/path, ports from 0 to 65535",
            "for example 127.0.0.1:50051, or 0.0.0.0:50051 for all IPv4 addresses",
        )
    return Address(bare, int(port))


def check_token(token: str, where: str) -> str:
    """The token itself.

    Args:
        token: what a client sends after ``Bearer``.
        where: where it was found, for the message, which does not repeat the token.

    Raises:
        ConfigError: it is short, or holds characters that a header cannot carry.
    """
    if len(token) < MIN_TOKEN or not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"a token in {where} has {len(token)} characters"
            + ("" if _TOKEN.fullmatch(token) else ", and not all of them are printable ASCII without blanks"),
            f"expected {MIN_TOKEN} or more of printable ASCII",
            "make one with: openssl rand -hex 32",
        )
    return token


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"{name} is {value!r}",
            f"expected an integer from {low} to {high}",
            "choose a value in that range",
        )


def _seconds(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(
            f"{name} is {value!r}", f"expected {low:g} to {high:g} seconds", "choose a value in that range"
        )
    if not low <= value <= high:
        raise ConfigError(
            f"{name} is {value:g}", f"expected {low:g} to {high:g} seconds", "choose a value in that range"
        )


_RANGES: Final = {
    "max_streams": (1, 1024),
    "max_portraits": (1, 100_000),
    "max_portrait_bytes": (1 << 20, 1 << 44),
    "max_queue": (1, 256),
    "max_message_bytes": (1 << 16, (1 << 31) - 1),  # gRPC counts in 32 bits
    "max_pixels": (1 << 12, 1 << 28),
    "max_upload_bytes": (1 << 10, 1 << 40),
    "max_shared_memory_bytes": (0, 1 << 40),
}


@dataclass(frozen=True)
class Limits:
    """What the server refuses beyond.

    Attributes:
        max_streams: open streams (Animate, ExtractMotion, Render), 1 to 1024.
        max_portraits: portraits, 1 to 100 000.
        max_portrait_bytes: memory of all portraits together, 1 MiB to 16 TiB.
        max_queue: frames of one lossless stream that wait in the server, 1 to 256.
        max_message_bytes: bytes of one message, 64 KiB to 2 GiB - 1.
        max_pixels: pixels of one picture, 4096 to 2^28.
        max_upload_bytes: bytes of an uploaded clip or template, 1 KiB to 1 TiB.
        max_shared_memory_bytes: bytes of one stream's shared memory, 0 to 1 TiB; 0 = none is given.

    Raises:
        ConfigError: a value is out of range.
    """

    max_streams: int = 16
    max_portraits: int = 64
    max_portrait_bytes: int = 1 << 30
    max_queue: int = 4
    max_message_bytes: int = 64 << 20
    max_pixels: int = 16 << 20
    max_upload_bytes: int = 512 << 20
    max_shared_memory_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            _integer(name, getattr(self, name), low, high)


@dataclass(frozen=True)
class TlsConfig:
    """PEM files; they are read when the server starts and again whenever one of them changes.

    Attributes:
        certificate: the server's certificate, followed by its intermediates.
        key: its private key, not encrypted; no other user may read it.
        client_ca: certificates that sign clients' ones; given = every client must present one (mutual TLS).
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class ServerConfig:
    """All that :func:`lp_edge.runtime.server.main.run_server` needs.

    Attributes:
        listen: gRPC's address: ``host:port``, ``[IPv6]:port`` (port 0 = any free one) or ``unix:/path``.
        http_listen: address of the HTTP front; None = there is none.
        metrics_listen: address of Prometheus' metrics, not a socket file; None = there is none.
        bundle: networks; None = the built-in ones.
        face_models: the user's own face networks (see docs/landmarks.md); None = the bundle's.
        backend: where networks run; its ``device`` is replaced by each of ``devices``.
        devices: indices of the GPUs, one worker each; just one on a CPU.
        insecure: allow addresses that other machines reach without TLS.
        tls: certificate and key for all addresses but socket files; None = plain text.
        tokens: any of them gives access; none here and in ``token_file`` = no token is asked for. Never printed.
        token_file: more tokens, one a line, read again when it changes.
        limits: what is refused beyond.
        max_batch: most rows of one engine call, 1 to 64; 1 = calls of streams are never merged.
        max_batch_wait_s: seconds, 0 to 1, that a call waits for others; None = 0 on a CPU, 0.002 on a GPU.
        portrait_ttl_s: longest time to live of a portrait, and the default, 1 s to 365 days.
        idle_timeout_s: a stream that is silent for longer is ended, 1 s to 1 day.
        drain_timeout_s: how long running streams may go on after SIGTERM, 0 to 1 hour.
        reflection: tell clients the services and messages on request.

    Raises:
        ConfigError: a value is out of range, or an address that other machines reach has neither TLS nor ``insecure``.
    """

    listen: str = "127.0.0.1:50051"
    http_listen: str | None = None
    metrics_listen: str | None = None
    bundle: Path | None = None
    face_models: Path | None = None
    backend: BackendConfig = BackendConfig()  # noqa: RUF009 - frozen
    devices: tuple[int, ...] = (0,)
    insecure: bool = False
    tls: TlsConfig | None = None
    tokens: tuple[str, ...] = field(default=(), repr=False)
    token_file: Path | None = None
    limits: Limits = Limits()
    max_batch: int = 8
    max_batch_wait_s: float | None = None
    portrait_ttl_s: float = 3600.0
    idle_timeout_s: float = 60.0
    drain_timeout_s: float = 20.0
    reflection: bool = True

    def __post_init__(self) -> None:
        self._check_addresses()
        _integer("max_batch", self.max_batch, 1, 64)
        if self.max_batch_wait_s is not None:
            _seconds("max_batch_wait_s", self.max_batch_wait_s, 0.0, 1.0)
        _seconds("portrait_ttl_s", self.portrait_ttl_s, 1.0, 365 * 86400.0)
        _seconds("idle_timeout_s", self.idle_timeout_s, 1.0, 86400.0)
        _seconds("drain_timeout_s", self.drain_timeout_s, 0.0, 3600.0)
        for device in self.devices:
            _integer("device", device, 0, 4096)
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise ConfigError(
                f"devices are {list(self.devices)}", "expected one or more, each once", "name each once"
            )
        if self.backend.backend == "cpu" and len(self.devices) > 1:
            raise ConfigError(
                f"{len(self.devices)} devices with the backend cpu",
                "expected one: a CPU is one device",
                "leave --device out, or name the GPUs' backend",
            )
        for token in self.tokens:
            check_token(token, "the configuration")

    def _check_addresses(self) -> None:
        for name in ("listen", "http_listen", "metrics_listen"):
            text = getattr(self, name)
            if text is None:
                continue
            address = parse_address(text, name)
            if name == "metrics_listen" and address.path is not None:
                raise ConfigError(
                    f"{name} is {text!r}",
                    "expected host:port: Prometheus reads over TCP",
                    "for example 127.0.0.1:9464",
                )
            if not (address.is_local or self.tls is not None or self.insecure):
                raise ConfigError(
                    f"{name} is {text!r}, which other machines can reach, without TLS",
                    "expected TLS there: pictures of faces and tokens would travel as plain text",
                    "give --tls-cert and --tls-key, listen on 127.0.0.1, or allow it with --insecure",
                )
