"""A server's life: start, readiness, health, access, drain, signals, end; most of it against real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

grpc = pytest.importorskip("grpc")
pytest.importorskip("prometheus_client")
pytest.importorskip("grpc_reflection")
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError
from lp_edge.proto.v1 import (
    animation_pb2,
    animation_pb2_grpc,
    common_pb2,
    portraits_pb2,
    portraits_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from lp_edge.runtime.server import main
from lp_edge.runtime.server.config import Limits, ServerConfig
from lp_edge.runtime.server.core import Core

SECONDS = 60.0
SERVICES = tuple(f"lp_edge.v1.{name}Service" for name in ("Portrait", "Animation", "Server"))
TOKEN, OTHER = "first-token-0123456789", "other-token-0123456789"
SERVING, NOT_SERVING = 1, 2

Serve = Callable[..., Any]


def picture() -> common_pb2.Image:
    """A "face" for the toy networks: a bright square on black."""
    rgb = np.zeros((200, 240, 3), np.uint8)
    rgb[60:140, 60:140] = 255
    return common_pb2.Image(raw=common_pb2.RawImage(width=240, height=200, data=rgb.tobytes()))


@contextlib.contextmanager
def connected(server: Any, credentials: Any = None) -> Iterator[Any]:
    """A channel to a server process."""
    target = server.ready["grpc"]
    if credentials is None:
        channel = grpc.insecure_channel(target)
    else:
        channel = grpc.secure_channel(target, credentials, [("grpc.ssl_target_name_override", "localhost")])
    with channel:
        yield channel


def info(channel: Any, *metadata: tuple[str, str]) -> Any:
    return server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(
        server_pb2.GetServerInfoRequest(), timeout=SECONDS, metadata=metadata
    )


def health(channel: Any, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=SECONDS).status)


def refusal(call: Callable[[], object]) -> str:
    """Name of the status that a call ends with."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    return str(error.value.code().name)


class Animation:
    """An open Animate stream; the client never closes its side unless it is told to."""

    def __init__(self, channel: Any) -> None:
        portraits = portraits_pb2_grpc.PortraitServiceStub(channel)
        request = portraits_pb2.RegisterPortraitRequest(image=picture())
        portrait = portraits.RegisterPortrait(request, timeout=SECONDS).portrait
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers = animation_pb2_grpc.AnimationServiceStub(channel).Animate(
            iter(self._outgoing.get, None)
        )
        config = animation_pb2.AnimateConfig(
            portrait_ids=[portrait.id], mode=animation_pb2.STREAM_MODE_LOSSLESS
        )
        self.send(config=config)
        assert next(self.answers).HasField("started")

    def send(self, **message: Any) -> None:
        self._outgoing.put(animation_pb2.AnimateRequest(**message))

    def frame(self, number: int) -> Any:
        """Send a frame and wait for its answer."""
        self.send(
            frame=animation_pb2.DrivingFrame(sequence=number, timestamp_us=number * 40_000, image=picture())
        )
        return next(self.answers)

    def close(self) -> None:
        """Close the client's side."""
        self._outgoing.put(None)


# -- start ---------------------------------------------------------------------------------------------------


def test_it_says_where_it_listens_and_answers_there(lp_serve: Serve) -> None:
    server = lp_serve("--metrics-port", 0)
    assert server.ready["ok"] is True
    assert server.ready["pid"] == server.process.pid
    assert server.ready["tls"] is False and server.ready["http"] is None
    with connected(server) as channel:
        answer = info(channel)
        assert answer.bundle.family == "mesh"
        assert not answer.load.draining
        for service in ("", *SERVICES, "grpc.health.v1.Health"):
            assert health(channel, service) == SERVING
        assert refusal(lambda: health(channel, "lp_edge.v1.Other")) == "NOT_FOUND"
        animation = Animation(channel)
        assert animation.frame(1).frame.face_state == common_pb2.FACE_STATE_TRACKED
        with urllib.request.urlopen(f"http://{server.ready['metrics']}/metrics", timeout=SECONDS) as got:
            values = got.read().decode()
        assert 'lp_edge_open_streams{kind="animate"} 1.0' in values
        assert 'lp_edge_frames_total{kind="animate"} 1.0' in values
        assert "lp_edge_serving 1.0" in values
        animation.close()
        assert list(animation.answers) == []
    server.send(signal.SIGTERM)
    assert server.wait() == 0
    (line,) = [x for x in server.log.splitlines() if " kind=animate " in x]
    assert " frames=1 " in line and line.endswith("status=OK")


def test_reflection_names_all_services_and_can_be_left_out(lp_serve: Serve) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    def listed(server: Any) -> set[str]:
        with connected(server) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=SECONDS)
            return {service.name for service in answer.list_services_response.service}

    assert listed(lp_serve()) == {
        *(*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
    }
    without = lp_serve("--no-reflection")
    assert refusal(lambda: listed(without)) == "UNIMPLEMENTED"


def test_a_port_in_use_is_told_before_anything_is_loaded(lp_serve: Serve) -> None:
    first = lp_serve("--metrics-port", 0)
    for options in (
        ("--listen", first.ready["grpc"]),
        ("--metrics-listen", first.ready["metrics"]),
        ("--listen", first.ready["metrics"]),
    ):
        second = lp_serve(*options, ready=False)
        assert second.wait() == 2
        error = json.loads(second.process.stdout.read())["error"]
        assert error["type"] == "ConfigError"
        assert f"{options[0][2:].replace('-', '_')} {options[1]}" in error["got"] and "in use" in error["got"]
        assert "choose another port" in error["remedy"]
        assert "serving" not in second.log
    with connected(first) as channel:
        assert health(channel) == SERVING


def test_a_bundle_that_is_not_there_ends_it(lp_serve: Serve, toy_bundle: Path) -> None:
    (toy_bundle / "face_mesh.onnx").unlink()
    server = lp_serve("--metrics-port", 0, ready=False)
    assert server.wait() == 5
    assert json.loads(server.process.stdout.read())["error"]["type"] == "BundleError"


def test_a_socket_file(lp_serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "lp.sock"
    server = lp_serve("--listen", f"unix:{path}")
    assert server.ready["grpc"] == f"unix:{path}"
    with connected(server) as channel:
        assert health(channel) == SERVING
        second = lp_serve("--listen", f"unix:{path}", ready=False)
        assert second.wait() == 2
        assert "in use" in second.process.stdout.read().decode()
        assert health(channel) == SERVING
    server.send(signal.SIGKILL)
    server.wait()
    assert path.is_socket()
    server = lp_serve("--listen", f"unix:{path}")  # takes the place of the dead one
    server.send(signal.SIGTERM)
    assert server.wait() == 0
    assert not path.exists()


# -- drain and signals -------------------------------------------------------------------------------------------


def test_a_drain_tells_everybody_and_lets_streams_finish(lp_serve: Serve) -> None:
    server = lp_serve("--drain-timeout", 50)
    with connected(server) as channel:
        animation = Animation(channel)
        states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(states).status == SERVING
        server.send(signal.SIGTERM)
        assert next(states).status == NOT_SERVING
        told = next(animation.answers)
        assert told.HasField("draining") and 0 < told.draining.deadline_ms <= 50_000
        assert animation.frame(1).HasField("frame"), "a running stream goes on"
        with pytest.raises(grpc.RpcError) as refused:
            Animation(channel)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert {k: v for k, v in refused.value.trailing_metadata() or ()}["grpc-retry-pushback-ms"]
        assert info(channel).load.draining
        animation.close()
        assert list(animation.answers) == []
    assert server.wait(30) == 0, "it ends when the last stream has ended, not at the deadline"
    assert "draining streams=1" in server.log


def test_a_drain_ends_at_its_deadline_even_when_no_client_closes(lp_serve: Serve) -> None:
    server = lp_serve("--drain-timeout", 1)
    with connected(server) as channel:
        animations = [Animation(channel) for _ in range(2)]
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        began = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.wait(30) == 0
        assert time.monotonic() - began < 15
        for animation in animations:
            assert next(animation.answers).HasField("draining")
            assert refusal(lambda stream=animation: next(stream.answers)) == "UNAVAILABLE"
    assert "Traceback" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_ends_an_idle_server_well(lp_serve: Serve, number: signal.Signals) -> None:
    server = lp_serve()
    server.send(number)
    assert server.wait() == 0
    assert server.log.rstrip().endswith("stopped")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(lp_serve: Serve, number: signal.Signals, code: int) -> None:
    server = lp_serve("--drain-timeout", 3600)
    with connected(server) as channel:
        animation = Animation(channel)
        server.send(signal.SIGTERM)
        server.wait_log("draining")
        server.send(number)
        assert server.wait(20) == code
        assert refusal(lambda: list(animation.answers)) == "UNAVAILABLE"


def test_networks_that_never_load_do_not_keep_a_stopping_process(tmp_path: Path, toy_bundle: Path) -> None:
    code = """
import threading
from lp_edge.runtime.server import core, command
core.Core.open = lambda self: threading.Event().wait()
command.serve()
"""
    options = (
        "--listen",
        "127.0.0.1:0",
        "--bundle",
        str(toy_bundle),
        "--drain-timeout",
        "0",
        "--log-format",
        "json",
    )
    errors = tmp_path / "errors"
    with errors.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", code, *options], stderr=out)
    try:
        until = time.monotonic() + SECONDS
        while "loading" not in errors.read_text():
            assert process.poll() is None and time.monotonic() < until, errors.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(lp_serve: Serve, tmp_path: Path, abstract: bool) -> None:
    name = f"@lp-edge-test-{tmp_path.name}-{time.time_ns()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(SECONDS)
        server = lp_serve(environment={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000"})
        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"WATCHDOG=1"
        assert manager.recv(100) == b"WATCHDOG=1", "the loop tells again and again that it runs"
        server.send(signal.SIGTERM)
        while (state := manager.recv(100)) == b"WATCHDOG=1":
            pass
        assert state == b"STOPPING=1"
    assert server.wait() == 0


def test_a_service_manager_that_is_gone_is_no_reason_to_fail(lp_serve: Serve, tmp_path: Path) -> None:
    server = lp_serve(environment={"NOTIFY_SOCKET": str(tmp_path / "none")})
    with connected(server) as channel:
        assert health(channel) == SERVING
    assert "cannot be told READY=1" in server.log


# -- access, against a real process ------------------------------------------------------------------------------


def test_tokens_of_file_and_environment_and_their_rotation(lp_serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(TOKEN)
    file.chmod(0o600)
    fixed = "token-of-the-environment"
    server = lp_serve("--token-file", file, environment={"LP_EDGE_TOKENS": f" {fixed}, "})
    with connected(server) as channel:

        def status(token: str | None) -> str:
            metadata = () if token is None else (("authorization", f"Bearer {token}"),)
            try:
                info(channel, *metadata)
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

        assert [status(t) for t in (None, OTHER, TOKEN, fixed)] == ["UNAUTHENTICATED"] * 2 + ["OK"] * 2
        assert health(channel) == SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        assert (
            refusal(lambda: list(stub.ServerReflectionInfo(iter([request]), timeout=SECONDS)))
            == "UNAUTHENTICATED"
        )
        animate = animation_pb2_grpc.AnimationServiceStub(channel).Animate
        assert (
            refusal(lambda: list(animate(iter(threading.Event().wait, None), timeout=SECONDS)))
            == "UNAUTHENTICATED"
        )

        beside = tmp_path / "new"
        beside.write_text(OTHER)
        beside.chmod(0o600)
        beside.replace(file)
        assert [status(t) for t in (TOKEN, OTHER, fixed)] == ["UNAUTHENTICATED", "OK", "OK"]
        file.chmod(0o644)  # no reason to lock anybody out, but one to complain
        beside.write_text(TOKEN)
        beside.replace(file)
        assert [status(t) for t in (TOKEN, OTHER)] == ["UNAUTHENTICATED", "OK"]
    server.send(signal.SIGTERM)
    assert server.wait() == 0
    assert "chmod 600" in server.log
    for token in (TOKEN, OTHER, fixed):
        assert token not in server.log


def test_tls_is_asked_for_and_certificates_are_exchanged_while_it_runs(lp_serve: Serve, pki: Any) -> None:
    ca, next_ca = pki.authority("ca"), pki.authority("next")
    pair, later = pki.issue("server", ca), pki.issue("server", next_ca)
    server = lp_serve("--tls-cert", pair.certificate, "--tls-key", pair.key, "--listen", "0.0.0.0:0")
    server.ready["grpc"] = server.ready["grpc"].replace("0.0.0.0", "127.0.0.1")
    assert server.ready["tls"] is True
    trusting, trusting_next = (
        grpc.ssl_channel_credentials(a.certificate.read_bytes()) for a in (ca, next_ca)
    )
    with connected(server, trusting) as channel:
        assert info(channel).version
        with connected(server) as plain:
            assert refusal(lambda: info(plain)) == "UNAVAILABLE"
        with connected(server, trusting_next) as wrong:
            assert refusal(lambda: info(wrong)) == "UNAVAILABLE"
        for target, source in ((pair.key, later.key), (pair.certificate, later.certificate)):
            source.replace(target)
        with connected(server, trusting_next) as fresh:
            assert info(fresh).version
        assert info(channel).version, "a connection that is open stays"
    assert "whoever reaches the address can use the server" in server.log


def test_mutual_tls_and_tokens_together(lp_serve: Serve, pki: Any) -> None:
    ca, strangers = pki.authority("ca"), pki.authority("strangers")
    pair, client, stranger = (
        pki.issue("server", ca),
        pki.issue("client", ca),
        pki.issue("stranger", strangers),
    )
    server = lp_serve(
        *("--tls-cert", pair.certificate, "--tls-key", pair.key, "--tls-client-ca", ca.certificate),
        environment={"LP_EDGE_TOKENS": TOKEN},
    )
    root = ca.certificate.read_bytes()

    def credentials(of: Any) -> Any:
        return grpc.ssl_channel_credentials(root, of.key.read_bytes(), of.certificate.read_bytes())

    token = ("authorization", f"Bearer {TOKEN}")
    for credential, metadata, expected in (
        (credentials(client), (token,), "OK"),
        (credentials(client), (), "UNAUTHENTICATED"),
        (credentials(stranger), (token,), "UNAVAILABLE"),
        (grpc.ssl_channel_credentials(root), (token,), "UNAVAILABLE"),
    ):
        with connected(server, credential) as channel:
            if expected == "OK":
                assert info(channel, *metadata).version
            else:
                assert refusal(lambda c=channel, m=metadata: info(c, *m)) == expected


def test_the_http_front_has_the_same_tokens_and_certificates_and_drains_too(
    lp_serve: Serve, pki: Any
) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    ca = pki.authority()
    pair = pki.issue("server", ca)
    server = lp_serve(
        *("--http", "127.0.0.1:0", "--tls-cert", pair.certificate, "--tls-key", pair.key),
        environment={"LP_EDGE_TOKENS": TOKEN},
    )
    trusting = ssl.create_default_context(cafile=str(ca.certificate))

    def status(path: str, token: str | None, scheme: str = "https") -> int:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{scheme}://{server.ready['http']}{path}", headers=headers)
        context = trusting if scheme == "https" else None
        try:
            with urllib.request.urlopen(request, timeout=SECONDS, context=context) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert status("/healthz", None) == 200
    assert [status("/metrics", token) for token in (None, OTHER, TOKEN)] == [401, 401, 200]
    with pytest.raises(OSError):
        status("/healthz", None, "http")
    second = lp_serve("--http", server.ready["http"], ready=False)
    assert second.wait() == 2
    assert "http_listen" in second.process.stdout.read().decode()
    server.send(signal.SIGTERM)
    assert server.wait(30) == 0
    assert "Traceback" not in server.log


def test_the_http_front_on_a_socket_file(lp_serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    path = tmp_path / "http.sock"
    server = lp_serve("--http", f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SECONDS)
        connection.connect(str(path))
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    server.send(signal.SIGTERM)
    assert server.wait(30) == 0
    assert not path.exists()


def test_the_health_check_of_the_image(lp_serve: Serve, pki: Any) -> None:
    import lp_edge

    program = Path(lp_edge.__file__).resolve().parent / "deploy" / "health.py"
    if not program.is_file():
        pytest.skip("no source tree: lp_edge is installed from a wheel")
    ca = pki.authority()
    pair, client = pki.issue("server", ca), pki.issue("client", ca)

    def probe(target: str, **environment: object) -> tuple[int, str]:
        variables = {f"LP_SERVE_HEALTH{name}": str(value) for name, value in environment.items()}
        done = subprocess.run(
            [sys.executable, str(program)],
            env={**os.environ, "GRPC_VERBOSITY": "NONE", "LP_SERVE_HEALTH": target, **variables},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.returncode, done.stdout.rpartition(" ")[2].strip()

    plain = lp_serve(environment={"LP_EDGE_TOKENS": TOKEN})
    assert probe(plain.ready["grpc"]) == (0, "serving")
    plain.send(signal.SIGTERM)
    plain.wait()
    assert probe(plain.ready["grpc"]) == (1, "UNAVAILABLE")
    mutual = lp_serve(
        *("--tls-cert", pair.certificate, "--tls-key", pair.key, "--tls-client-ca", ca.certificate)
    )
    target = mutual.ready["grpc"]
    known = {"_CERT": client.certificate, "_KEY": client.key}
    assert probe(target, _CA=ca.certificate, **known) == (0, "serving")
    assert probe(target, _CA=ca.certificate) == (1, "UNAVAILABLE")
    assert probe(target) == (1, "UNAVAILABLE")


def test_it_lives_without_memory_that_is_writable_and_executable(toy_bundle: Path, tmp_path: Path) -> None:
    """What MemoryDenyWriteExecute= of the unit asks for, by prctl(PR_SET_MDWE), Linux 6.3 and newer."""
    code = """
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    sys.exit(77)
from lp_edge.runtime.server.command import serve
serve()
"""
    options = ("--listen", "127.0.0.1:0", "--bundle", str(toy_bundle), "--json")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line and process.wait(SECONDS) == 77:
            pytest.skip("this kernel has no PR_SET_MDWE")
        with grpc.insecure_channel(json.loads(line)["grpc"]) as channel:
            animation = Animation(channel)
            assert animation.frame(1).frame.face_state == common_pb2.FACE_STATE_TRACKED
            animation.close()
            assert list(animation.answers) == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.communicate()


# -- limits of the transport -----------------------------------------------------------------------------------


def test_messages_are_bounded_before_and_after_unpacking(lp_serve: Serve) -> None:
    server = lp_serve("--max-message", "64K")
    with connected(server) as channel:
        register = portraits_pb2_grpc.PortraitServiceStub(channel).RegisterPortrait

        def send(size: int, compression: Any) -> str:
            image = common_pb2.Image(encoded=common_pb2.EncodedImage(data=bytes(size)))
            request = portraits_pb2.RegisterPortraitRequest(image=image)
            return refusal(lambda: register(request, timeout=SECONDS, compression=compression))

        plain = grpc.Compression.NoCompression
        assert send(60_000, plain) == "INVALID_ARGUMENT"  # came through: it is no picture
        assert send(70_000, plain) == "RESOURCE_EXHAUSTED"
        assert send(50_000_000, grpc.Compression.Gzip) == "UNIMPLEMENTED"  # 50 KB on the wire
        assert health(channel) == SERVING


def test_watchers_of_the_health_are_bounded_and_delay_nobody(lp_serve: Serve) -> None:
    server = lp_serve("--max-streams", 1)
    with connected(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS) for _ in range(40)]
        states = []
        for watch in watches:
            try:
                states.append(next(watch).status)
            except grpc.RpcError as error:
                states.append(error.code().name)
        assert sorted(map(str, states)) == ["1"] * 32 + ["RESOURCE_EXHAUSTED"] * 8
        assert info(channel).version
        server.send(signal.SIGTERM)
        assert server.wait(20) == 0


# -- in this process -----------------------------------------------------------------------------------------------


def config(toy_bundle: Path, **changes: Any) -> ServerConfig:
    return ServerConfig(
        listen="127.0.0.1:0", bundle=toy_bundle, backend=BackendConfig("cpu", threads=1), **changes
    )


def test_while_networks_load_it_answers_that_it_does(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    opened = Core.open

    def slowly(self: Core) -> None:
        assert go_on.wait(SECONDS)
        opened(self)

    bound: list[Any] = []
    bind = main._bind

    def binding(*args: Any) -> Any:
        bound.append(bind(*args))
        return bound[0]

    monkeypatch.setattr(Core, "open", slowly)
    monkeypatch.setattr(main, "_bind", binding)

    async def work() -> None:
        ready = asyncio.Event()
        task = asyncio.ensure_future(main.run_server(config(toy_bundle), ready=lambda _: ready.set()))
        try:
            while not bound:
                await asyncio.sleep(0.01)
            async with grpc.aio.insecure_channel(str(bound[0])) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                states = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
                assert (await states.read()).status == NOT_SERVING
                portraits = portraits_pb2_grpc.PortraitServiceStub(channel)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await portraits.ListPortraits(portraits_pb2.ListPortraitsRequest(), timeout=SECONDS)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
                assert not ready.is_set()
                go_on.set()
                assert (await states.read()).status == SERVING
                await ready.wait()
                await portraits.ListPortraits(portraits_pb2.ListPortraitsRequest(), timeout=SECONDS)
                states.cancel()
        finally:
            go_on.set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(asyncio.wait_for(work(), 2 * SECONDS))


def test_a_cancelled_server_leaves_nothing_behind(toy_bundle: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}, sys.getswitchinterval()
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def once() -> main.Endpoints:
        where: asyncio.Future[main.Endpoints] = asyncio.get_running_loop().create_future()
        settings = config(toy_bundle, metrics_listen="127.0.0.1:0")
        task = asyncio.ensure_future(main.run_server(settings, ready=where.set_result))
        await asyncio.wait({task, where}, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await where

    for _ in range(2):
        endpoints = asyncio.run(asyncio.wait_for(once(), SECONDS))
        for text in (endpoints.grpc, endpoints.metrics):
            assert text is not None
            host, _, port = text.rpartition(":")
            with pytest.raises(OSError):
                socket.create_connection((host, int(port)), SECONDS)
    left = {thread.name for thread in threading.enumerate()} - before[0]
    assert not {name for name in left if name.startswith(("lp-", "step", "codec", "device"))}
    assert sys.getswitchinterval() == before[1]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_check_config_tells_what_is_remarkable_without_binding(pki: Any, tmp_path: Path) -> None:
    from lp_edge.runtime.server.config import TlsConfig

    assert main.check_config(ServerConfig()) == []
    (note,) = main.check_config(ServerConfig(listen="0.0.0.0:0", insecure=True, tokens=(TOKEN,)))
    assert "without TLS: pictures and tokens" in note
    pair = pki.issue("server", pki.authority())
    tls = TlsConfig(pair.certificate, pair.key)
    notes = main.check_config(ServerConfig(listen="0.0.0.0:1", tls=tls, limits=Limits()))
    assert "valid until" in notes[0] and "no tokens and no client CA" in notes[1]
    pki.expire(pair)
    with pytest.raises(ConfigError, match="expired"):
        main.check_config(ServerConfig(tls=tls))
    with pytest.raises(ConfigError, match="No such file"):
        main.check_config(ServerConfig(token_file=tmp_path / "none"))
