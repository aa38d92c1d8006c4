"""Tokens, certificates and sockets: who gets in, who does not, and what happens when the files change."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

grpc = pytest.importorskip("grpc")
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lp_edge.errors import AccessError, ConfigError
from lp_edge.proto.v1 import common_pb2
from lp_edge.runtime.server.access import (
    Certificates,
    TokenInterceptor,
    Tokens,
    open_socket,
    server_credentials,
)
from lp_edge.runtime.server.config import ServerConfig, TlsConfig, parse_address

TOKEN, OTHER = "first-token-0123456789", "other-token-0123456789"
SECONDS = 20.0


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """Write a file the way a rotation should: beside, then renamed."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.chmod(mode)
    beside.replace(path)
    return path


# -- tokens ---------------------------------------------------------------------------------------------


def test_without_tokens_everybody_gets_in() -> None:
    tokens = Tokens()
    assert not tokens.required
    tokens.check(None)
    tokens.check("Basic whatever")


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"),
        *(
            f"Bearer {TOKEN.upper()}",
            f"Bearer {TOKEN},{OTHER}",
            f"Bearer {TOKEN} {TOKEN}",
            "Bearer \N{SNOWMAN}",
        ),
    ],
)
def test_wrong_headers_are_refused_without_being_repeated(header: str | None) -> None:
    tokens = Tokens([TOKEN, OTHER])
    with pytest.raises(AccessError) as refused:
        tokens.check(header)
    assert refused.value.grpc_status == "UNAUTHENTICATED"
    assert TOKEN[:-1] not in str(refused.value) and "\N{SNOWMAN}" not in str(refused.value)


@pytest.mark.parametrize("header", [f"Bearer {TOKEN}", f"bearer {OTHER}", f"  BEARER   {TOKEN}  "])
def test_every_token_gives_access(header: str) -> None:
    Tokens([TOKEN, OTHER]).check(header)


def test_a_file_holds_a_token_a_line_with_comments(tmp_path: Path) -> None:
    file = write(tmp_path / "tokens", f"# clients\n\n{TOKEN}  # the camera\n  {OTHER}\n")
    tokens = Tokens.of(ServerConfig(tokens=("fixed-token-0123456789",), token_file=file))
    for token in (TOKEN, OTHER, "fixed-token-0123456789"):
        tokens.check(f"Bearer {token}")


@pytest.mark.parametrize(
    ("content", "mode", "expected"),
    [
        (TOKEN, 0o604, "chmod 600"),
        (TOKEN, 0o602, "chmod 600"),
        ("", 0o600, "holds no token"),
        ("# nothing\n", 0o600, "holds no token"),
        ("short", 0o600, "has 5 characters"),
        ("with blanks in the middle", 0o600, "printable"),
        ("x" * (1 << 20 | 1), 0o600, "larger than 1 MiB"),
    ],
)
def test_a_token_file_that_cannot_be_used(tmp_path: Path, content: str, mode: int, expected: str) -> None:
    file = write(tmp_path / "tokens", content, mode)
    with pytest.raises(ConfigError, match=expected) as refused:
        Tokens(file=file)
    assert TOKEN not in str(refused.value)


def test_a_token_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Tokens(file=tmp_path / "none")
    file = tmp_path / "tokens"
    file.write_bytes(b"\xff" * 20)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="not text"):
        Tokens(file=file)


def test_tokens_rotate_and_a_broken_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "tokens", TOKEN)
    tokens = Tokens(file=file)
    write(file, f"{TOKEN}\n{OTHER}\n")
    tokens.check(f"Bearer {OTHER}")
    write(file, OTHER)
    with pytest.raises(AccessError):
        tokens.check(f"Bearer {TOKEN}")

    for content, mode in (("", 0o600), ("short", 0o600), (TOKEN, 0o644)):
        caplog.clear()
        write(file, content, mode)
        for _ in range(3):
            tokens.check(f"Bearer {OTHER}")
            with pytest.raises(AccessError):
                tokens.check(f"Bearer {TOKEN}")
        assert [r.levelno for r in caplog.records] == [logging.ERROR], "said once, not for every call"
        assert TOKEN not in caplog.text
    file.unlink()
    tokens.check(f"Bearer {OTHER}")
    write(file, TOKEN)
    tokens.check(f"Bearer {TOKEN}")


def test_tokens_are_checked_by_many_threads_while_they_rotate(tmp_path: Path) -> None:
    file = write(tmp_path / "tokens", f"{TOKEN}\n{OTHER}\n")
    tokens = Tokens(file=file)

    def check() -> None:
        for _ in range(300):
            tokens.check(f"Bearer {TOKEN}")

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(check) for _ in range(4)]
        for i in range(20):
            write(file, f"{TOKEN}\nchanging-token-{i:010}\n")
        for check_run in running:
            check_run.result(SECONDS)


# -- the interceptor, over a real connection -------------------------------------------------------------


class _Bytes(grpc.GenericRpcHandler):
    """Four methods of the four kinds that count the bytes they get."""

    def service(self, details: Any) -> Any:
        async def unary(request: bytes, context: Any) -> bytes:
            return request

        async def stream_in(requests: AsyncIterator[bytes], context: Any) -> bytes:
            return b"".join([request async for request in requests])

        async def stream_out(request: bytes, context: Any) -> AsyncIterator[bytes]:
            yield request

        async def stream_both(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                yield request

        return {
            "/t.T/Unary": grpc.unary_unary_rpc_method_handler(unary),
            "/t.T/In": grpc.stream_unary_rpc_method_handler(stream_in),
            "/t.T/Out": grpc.unary_stream_rpc_method_handler(stream_out),
            "/t.T/Both": grpc.stream_stream_rpc_method_handler(stream_both),
        }.get(details.method)


async def _requests() -> AsyncIterator[bytes]:
    yield b"abc"


async def _call(channel: Any, method: str, metadata: tuple[tuple[str, str], ...]) -> bytes:
    """One call of any kind; its answer, or its AioRpcError."""
    options = {"metadata": metadata, "timeout": SECONDS}
    if method == "/t.T/In":
        return bytes(await channel.stream_unary(method)(_requests(), **options))
    if method == "/t.T/Out":
        return b"".join([part async for part in channel.unary_stream(method)(b"abc", **options)])
    if method == "/t.T/Both":
        return b"".join([part async for part in channel.stream_stream(method)(_requests(), **options)])
    return bytes(await channel.unary_unary(method)(b"abc", **options))


def _with_server(
    work: Callable[[str], Awaitable[None]], interceptors: list[Any], credentials: Any = None
) -> None:
    async def main() -> None:
        server = grpc.aio.server(interceptors=interceptors)
        server.add_generic_rpc_handlers((_Bytes(),))
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        try:
            await work(f"localhost:{port}" if credentials else f"127.0.0.1:{port}")
        finally:
            await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 3 * SECONDS))


METHODS = ("/t.T/Unary", "/t.T/In", "/t.T/Out", "/t.T/Both")


def test_all_kinds_of_calls_need_the_token() -> None:
    refused: list[int] = []

    async def work(target: str) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            for method in METHODS:
                assert await _call(channel, method, (("authorization", f"Bearer {TOKEN}"),)) == b"abc"
            assert refused == []
            wrong = (
                (),
                (("authorization", f"Bearer {OTHER}"),),
                (("authorization", f"Bearer {OTHER}"), ("authorization", f"Bearer {TOKEN}")),
            )
            for method in (*METHODS, "/t.T/None"):
                for metadata in wrong:
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await _call(channel, method, metadata)
                    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
                    values = {k: v for k, v in error.value.trailing_metadata() or ()}
                    detail = common_pb2.ErrorDetail.FromString(values["lp-edge-error-bin"])
                    assert detail.type == "AccessError"
                    assert detail.remedy
            assert len(refused) == 15
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await _call(channel, "/t.T/None", (("authorization", f"Bearer {TOKEN}"),))
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED

    _with_server(work, [TokenInterceptor(Tokens([TOKEN]), lambda: refused.append(1))])


def test_a_refusal_does_not_wait_for_messages() -> None:
    """A stranger that opens a call and sends nothing is not kept."""

    async def silent() -> AsyncIterator[bytes]:
        await asyncio.sleep(3600)
        yield b""

    async def work(target: str) -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            for method in METHODS:  # as a client sees it, each may be a stream
                call = channel.stream_stream(method)(silent())
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await asyncio.wait_for(call.read(), SECONDS)
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED

    _with_server(work, [TokenInterceptor(Tokens([TOKEN]))])


def test_health_needs_no_token() -> None:
    async def main() -> None:
        from grpc_health.v1 import health

        server = grpc.aio.server(interceptors=[TokenInterceptor(Tokens([TOKEN]))])
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            assert (await stub.Check(request, timeout=SECONDS)).status == 1
            watch = stub.Watch(request, timeout=SECONDS)
            assert (await watch.read()).status == 1
            watch.cancel()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary("/grpc.health.v1.Health/List")(b"", timeout=SECONDS)
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 3 * SECONDS))


# -- certificates -----------------------------------------------------------------------------------------


def _replace(target: Path, source: Path) -> None:
    write(target, source.read_text())


async def _reaches(target: str, root: Path, client: Any = None) -> str:
    """ "" when a call gets through with these certificates, else the name of its status."""
    credentials = grpc.ssl_channel_credentials(
        root.read_bytes(),
        None if client is None else client.key.read_bytes(),
        None if client is None else client.certificate.read_bytes(),
    )
    async with grpc.aio.secure_channel(target, credentials) as channel:
        try:
            await _call(channel, "/t.T/Unary", ())
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
    return ""


def test_tls_follows_its_files_and_a_broken_pair_changes_nothing(
    pki: Any, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = pki.authority("old"), pki.authority("new")
    server, later = pki.issue("server", old), pki.issue("server", new)
    certificates = Certificates(TlsConfig(server.certificate, server.key))

    async def work(target: str) -> None:
        assert await _reaches(target, old.certificate) == ""
        assert await _reaches(target, new.certificate) == "UNAVAILABLE"

        _replace(server.certificate, later.certificate)  # half of a rotation: the key is still the old one
        assert await _reaches(target, old.certificate) == ""
        assert "cannot be used" in caplog.text and "old one stays in use" in caplog.text

        _replace(server.key, later.key)
        assert await _reaches(target, new.certificate) == ""
        assert await _reaches(target, old.certificate) == "UNAVAILABLE"

        server.certificate.unlink()
        assert await _reaches(target, new.certificate) == ""

    _with_server(work, [], server_credentials(certificates))


def test_mutual_tls_asks_for_a_certificate_of_the_client_ca_and_follows_it(pki: Any) -> None:
    ca, strangers = pki.authority("ca"), pki.authority("strangers")
    server, client, stranger = (
        pki.issue("server", ca),
        pki.issue("client", ca),
        pki.issue("stranger", strangers),
    )
    client_ca = server.key.with_name("client_ca.pem")
    _replace(client_ca, ca.certificate)
    certificates = Certificates(TlsConfig(server.certificate, server.key, client_ca))
    assert certificates.mutual

    async def work(target: str) -> None:
        assert await _reaches(target, ca.certificate, client) == ""
        assert await _reaches(target, ca.certificate) == "UNAVAILABLE"
        assert await _reaches(target, ca.certificate, stranger) == "UNAVAILABLE"
        _replace(client_ca, strangers.certificate)
        assert await _reaches(target, ca.certificate, stranger) == ""
        assert await _reaches(target, ca.certificate, client) == "UNAVAILABLE"

    _with_server(work, [], server_credentials(certificates))


def _shake_hands(context: ssl.SSLContext, root: Path, client: Any = None) -> str:
    """ "" when a TLS connection over a socket pair carries a byte both ways, else what went wrong."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    theirs.settimeout(SECONDS)

    def serve() -> None:
        try:
            with context.wrap_socket(theirs, server_side=True) as server:
                server.sendall(server.recv(1))
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    trusting = ssl.create_default_context(cafile=str(root))
    if client is not None:
        trusting.load_cert_chain(client.certificate, client.key)
    try:
        with trusting.wrap_socket(ours, server_hostname="localhost") as connection:
            connection.sendall(b"x")
            assert connection.recv(1) in (b"x", b"")
            return ""
    except OSError as error:
        return type(error).__name__
    finally:
        ours.close()
        thread.join(SECONDS)


def test_the_http_context_follows_the_files_too(pki: Any) -> None:
    old, new = pki.authority("old"), pki.authority("new")
    server, later = pki.issue("server", old), pki.issue("server", new)
    client_ca = server.key.with_name("client_ca.pem")
    _replace(client_ca, old.certificate)
    client, stranger = pki.issue("client", old), pki.issue("stranger", new)
    context = Certificates(TlsConfig(server.certificate, server.key, client_ca)).ssl_context()
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert _shake_hands(context, old.certificate, client) == ""
    assert _shake_hands(context, old.certificate) != ""
    assert _shake_hands(context, old.certificate, stranger) != ""
    for path, source in (
        (server.key, later.key),
        (server.certificate, later.certificate),
        (client_ca, new.certificate),
    ):
        _replace(path, source)
    assert _shake_hands(context, new.certificate, stranger) == ""
    assert _shake_hands(context, old.certificate, stranger) == "SSLCertVerificationError"
    assert _shake_hands(context, new.certificate, client) != ""


def test_files_that_are_no_pair(pki: Any) -> None:
    ca = pki.authority()
    server, other = pki.issue("server", ca), pki.issue("other", ca)
    with pytest.raises(ConfigError, match="belong together"):
        Certificates(TlsConfig(server.certificate, other.key))
    with pytest.raises(ConfigError, match="belong together"):
        Certificates(TlsConfig(server.key, server.key))
    with pytest.raises(ConfigError, match="client CA"):
        Certificates(TlsConfig(server.certificate, server.key, server.key))
    with pytest.raises(ConfigError, match="No such file"):
        Certificates(TlsConfig(server.certificate, server.key.with_name("none")))
    server.key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Certificates(TlsConfig(server.certificate, server.key))


def test_an_encrypted_key_is_refused_and_nothing_asks_for_its_password(pki: Any, tmp_path: Path) -> None:
    import subprocess

    server = pki.issue("server", pki.authority())
    encrypted = tmp_path / "encrypted.key"
    subprocess.run(
        [
            *("openssl", "pkey", "-in", str(server.key), "-aes256", "-passout", "pass:secret"),
            *("-out", str(encrypted)),
        ],
        check=True,
        timeout=SECONDS,
    )
    encrypted.chmod(0o600)
    with pytest.raises(ConfigError, match="not encrypted"):
        Certificates(TlsConfig(server.certificate, encrypted))


def test_the_end_of_a_certificate_is_told(pki: Any) -> None:
    ca = pki.authority()
    server = pki.issue("server", ca)
    for client_ca in (None, ca.certificate):
        until = Certificates(TlsConfig(server.certificate, server.key, client_ca)).valid_until()
        assert ssl.cert_time_to_seconds(until) == pytest.approx(
            server.certificate.stat().st_mtime + 2 * 86400, abs=120
        )
    pki.expire(server)
    late = Certificates(TlsConfig(server.certificate, server.key))  # loads: the clock may be wrong
    with pytest.raises(ConfigError, match="expired"):
        late.valid_until()


# -- sockets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["127.0.0.1:0", "localhost:0"])
def test_a_port_in_use_is_an_error_with_a_remedy(text: str) -> None:
    with open_socket(parse_address(text), "listen") as first:
        port = first.getsockname()[1]
        assert port
        with pytest.raises(ConfigError, match="in use") as refused:
            open_socket(parse_address(f"127.0.0.1:{port}"), "http_listen")
    assert refused.value.got.startswith(f"http_listen 127.0.0.1:{port}")
    assert "choose another port" in refused.value.remedy
    open_socket(parse_address(f"127.0.0.1:{port}"), "listen").close()


def test_an_address_of_another_machine() -> None:
    with pytest.raises(ConfigError, match="an address of this machine"):
        open_socket(parse_address("192.0.2.1:0"), "listen")  # TEST-NET-1: nobody has it


def test_a_socket_file_of_a_dead_server_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = Path(os.path.relpath(tmp_path)).resolve() / "lp.sock"
    address = parse_address(f"unix:{path}")
    with open_socket(address, "listen"), pytest.raises(ConfigError, match="in use"):
        open_socket(address, "listen")
    assert path.is_socket()  # nobody listens now
    open_socket(address, "listen").close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="a file of that name"):
        open_socket(address, "listen")
    assert path.read_text() == "precious"
