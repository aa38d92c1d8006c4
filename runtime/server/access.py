"""Who may come in: tokens, certificates and the sockets that the server opens.

Tokens are compared in constant time, by SHA-256, with every token there is. Token file, certificate, key and client CA are
looked at for every call or handshake and read again when they have changed; what is broken then is logged and the old
content stays in use, so a half-finished rotation locks nobody out. Replace such files by renaming.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import logging
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import grpc
import grpc.aio

from lp_edge.errors import AccessError, ConfigError
from lp_edge.runtime.server.config import Address, ServerConfig, TlsConfig, check_token

__all__ = ["Certificates", "TokenInterceptor", "Tokens", "open_socket", "server_credentials"]

_LOG = logging.getLogger("lp_edge")
_T = TypeVar("_T")

_LARGEST: Final = 1 << 20  # bytes; no certificate chain or token file is as large
_OPEN: Final = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch")  # supervisors have no token


# -- files that may change while the server runs ----------------------------------------------------------


def _read(path: Path, what: str, *, secret: bool) -> bytes:
    """A small file's content; ConfigError when it cannot be read, or is a secret that every user can read."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the {what} {path}: {error.strerror}", "", "correct the path or its permissions"
        ) from error
    if secret and info.st_mode & (stat.S_IRWXO):
        raise ConfigError(
            f"the {what} {path} has mode {stat.S_IMODE(info.st_mode):o}: every user can get at it",
            "expected no rights for others",
            f"chmod 600 {path}",
        )
    if len(data) > _LARGEST:
        raise ConfigError(f"the {what} {path} is larger than 1 MiB", "", f"give a {what}")
    return data


class _Watched(Generic[_T]):
    """What ``load`` makes of files; made anew when one of them changes, kept when that fails."""

    def __init__(self, what: str, paths: Iterable[Path], load: Callable[[], _T]) -> None:
        self._what, self._paths, self._load = what, tuple(paths), load
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._value = load()

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        def one(path: Path) -> tuple[int, int, int] | None:
            try:
                info = path.stat()
            except OSError:
                return None
            return info.st_mtime_ns, info.st_size, info.st_ino

        return tuple(one(path) for path in self._paths)

    def get(self) -> _T:
        """The newest content that is in order."""
        signature = self._signature()
        with self._lock:
            if signature != self._seen:
                try:
                    self._value = self._load()
                except ConfigError as error:
                    _LOG.error(
                        "the %s changed and cannot be used, the old one stays in use: %s", self._what, error
                    )
                else:
                    _LOG.warning("the %s changed and was read again", self._what)
                # Taken before reading: what changed meanwhile is noticed at the next look.
                self._seen = signature
            return self._value


# -- tokens --------------------------------------------------------------------------------------------------


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class Tokens:
    """The tokens that give access.

    Args:
        fixed: tokens that stay.
        file: one token a line, ``#`` begins a comment; read again when it changes.

    Raises:
        ConfigError: the file cannot be read, every user can read it, it holds no token, or a token is short.

    Example:
        >>> Tokens(["correct horse battery".replace(" ", "-")]).check("Bearer correct-horse-battery")
    """

    def __init__(self, fixed: Iterable[str] = (), file: Path | None = None) -> None:
        self._fixed = [_digest(check_token(token, "the configuration")) for token in fixed]
        self._file = None
        if file is not None:
            self._file = _Watched("token file", [file], lambda: _token_file(file))

    @classmethod
    def of(cls, config: ServerConfig) -> Tokens:
        """Those of a configuration."""
        return cls(config.tokens, config.token_file)

    @property
    def required(self) -> bool:
        """Whether a token is asked for at all."""
        return bool(self._fixed) or self._file is not None

    def check(self, header: str | None) -> None:
        """Let a request in or refuse it; from any thread.

        Args:
            header: its ``Authorization``: ``Bearer TOKEN``; None = it has none.

        Raises:
            AccessError: a token is required, and there is none or a wrong one.
        """
        if not self.required:
            return
        scheme, _, token = (header or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AccessError(
                "the request has no token",
                "expected 'authorization: Bearer TOKEN'",
                "give the client the server's token",
            )
        known = self._fixed if self._file is None else [*self._fixed, *self._file.get()]
        given = _digest(token.strip())
        right = False
        for digest in known:  # all of them: the time tells nothing about which one was right
            right |= hmac.compare_digest(digest, given)
        if not right:
            raise AccessError(
                "the request's token is wrong",
                "expected one that the server knows",
                "ask who runs the server",
            )


def _token_file(path: Path) -> list[bytes]:
    try:
        text = _read(path, "token file", secret=True).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the token file {path} is not text", "expected one token a line", "openssl rand -hex 32"
        ) from error
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    tokens = [_digest(check_token(line, str(path))) for line in lines if line]
    if not tokens:
        raise ConfigError(
            f"the token file {path} holds no token",
            "expected one a line",
            f"add one: openssl rand -hex 32 >> {path}",
        )
    return tokens


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without a right token before their first message is read; health checks need none.

    Args:
        tokens: what is accepted.
        refused: called for every call that is refused.
    """

    def __init__(self, tokens: Tokens, refused: Callable[[], None] = lambda: None) -> None:
        self._tokens, self._refused = tokens, refused

    async def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """Hand the call on, or answer it with UNAUTHENTICATED."""
        if details.method not in _OPEN:
            headers = [value for key, value in details.invocation_metadata if key == "authorization"]
            try:
                self._tokens.check(headers[0] if len(headers) == 1 else None)
            except AccessError as error:
                self._refused()
                return _refusal(error)
        return await continuation(details)


def _refusal(error: AccessError) -> Any:
    """A handler that ends every call with the error, whatever its kind: as a stream it waits for no message."""
    from lp_edge.runtime.server.wire import error_metadata

    status, message, metadata = error_metadata(error)

    async def refuse(_requests: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode[status], message, metadata)

    return grpc.stream_stream_rpc_method_handler(refuse)


# -- TLS -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class Certificates:
    """The server's certificate, key and client CA, as they are on the disk.

    Raises:
        ConfigError: a file cannot be read or is not PEM, every user can read the key, it is encrypted, or it is not the
            certificate's.
    """

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        paths = [config.certificate, config.key, *([config.client_ca] if config.client_ca else [])]
        self._files = _Watched("certificate", paths, lambda: _load(config))

    @property
    def mutual(self) -> bool:
        """Whether clients must present a certificate."""
        return self._config.client_ca is not None

    def grpc_configuration(self) -> Any:
        """What gRPC presents and accepts at the next handshake."""
        now = self._files.get()
        return grpc.ssl_server_certificate_configuration([(now.key, now.certificate)], now.client_ca)

    def ssl_context(self) -> ssl.SSLContext:
        """The same for the HTTP front and the metrics; it follows changes of the files too."""
        outer = _context(self._config)

        def newest(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: object) -> None:
            connection.context = self._files.get().context

        outer.sni_callback = newest  # called at every handshake, with or without a name
        return outer

    def valid_until(self) -> str:
        """The end of the certificate's life, as in ``Nov 21 12:00:00 2027 GMT``.

        Raises:
            ConfigError: it has ended, or not yet begun.
        """
        return _valid_until(self._config)


def server_credentials(certificates: Certificates) -> Any:
    """gRPC's credentials that look at the files at every handshake; with a client CA clients must present a certificate."""
    last = certificates.grpc_configuration()

    def fetch() -> Any:
        return certificates.grpc_configuration()

    return grpc.dynamic_ssl_server_credentials(last, fetch, certificates.mutual)


def _load(config: TlsConfig) -> _Loaded:
    certificate = _read(config.certificate, "certificate", secret=False)
    key = _read(config.key, "private key", secret=True)
    client_ca = None if config.client_ca is None else _read(config.client_ca, "client CA", secret=False)
    loaded = _Loaded(certificate, key, client_ca, _context(config))
    if (certificate, key) != (config.certificate.read_bytes(), config.key.read_bytes()):
        raise ConfigError("the certificate changed while it was read", "", "replace files by renaming")
    return loaded


def _context(config: TlsConfig, *, mutual: bool = True) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A resumed session would outlive the certificates that it was made with.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    try:
        # An encrypted key would be asked for on the terminal; an empty password makes that an error.
        context.load_cert_chain(config.certificate, config.key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"certificate {config.certificate} and key {config.key} cannot be used: {error}",
            "expected PEM files that belong together, the key not encrypted",
            "openssl x509 -in CERT and openssl pkey -in KEY show them",
        ) from error
    if config.client_ca is not None and mutual:
        try:
            context.load_verify_locations(config.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"the client CA {config.client_ca} cannot be used: {error}",
                "expected PEM certificates",
                "give the certificates that sign the clients' ones",
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _valid_until(config: TlsConfig) -> str:
    """Python tells a certificate's dates only after a handshake, so the server's one is shaken hands with in memory."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.load_verify_locations(config.certificate)
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is the anchor
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server)
    server = _context(config, mutual=False).wrap_bio(to_server, to_client, server_side=True)
    try:
        for _ in range(8):  # more flights than any handshake has
            for side in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"the certificate {config.certificate} is not valid: {error.verify_message}",
            "expected one that is valid now",
            "renew it, or correct the clock",
        ) from error
    details = client.getpeercert() or {}
    return str(details.get("notAfter", ""))


# -- sockets -------------------------------------------------------------------------------------------------


def open_socket(address: Address, option: str) -> socket.socket:
    """A socket that listens.

    Args:
        address: where; port 0 = any free one. A socket file that nobody listens at is replaced.
        option: what the address is called in messages.

    Raises:
        ConfigError: it cannot be bound, for example because it is in use.
    """
    opened: socket.socket | None = None
    try:
        if address.path is not None:
            free_socket_file(address.path)
            opened = socket.socket(socket.AF_UNIX)
            opened.bind(str(address.path))
        else:
            found = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, _, _, _, where = found[0]
            opened = socket.socket(family, socket.SOCK_STREAM)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.host != "::")
            opened.bind(where)
        opened.listen(128)
    except OSError as error:
        if opened is not None:
            opened.close()
        raise ConfigError(
            f"{option} {address} cannot be used: {error.strerror or error}",
            *(_OTHER_FILE if address.path is not None else _REMEDIES.get(error.errno or 0, _OTHER)),
        ) from error
    return opened


_OTHER: Final = ("expected an address of this machine", "lp-serve --help shows the forms of an address")
_OTHER_FILE: Final = (
    "expected an existing folder that can be written, and a name that is free or a socket that no server uses",
    "create the folder, stop the other server, or choose another path",
)
_REMEDIES: Final = {
    errno.EADDRINUSE: (
        "expected a free port",
        "stop the program that listens there, or choose another port (0 = any free one)",
    ),
    errno.EACCES: (
        "expected an address that this user may bind",
        "choose a port from 1024 on, or a folder that can be written",
    ),
}


def free_socket_file(path: Path) -> None:
    """Remove a socket file that a dead server left; OSError (in use) when somebody listens at it."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EADDRINUSE, "there is a file of that name")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
