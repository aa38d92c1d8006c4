"""A server from its start to its end: bind, load, serve, drain.

::

    tokens, certificates ─ metrics ─ gRPC (and HTTP) bound, NOT_SERVING ─ networks loaded ─ SERVING, ready
        ─ SIGTERM: NOT_SERVING ─ core drains ─ calls end, or are ended at the deadline ─ return

Wrong configurations and addresses in use are found before the networks are loaded. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lp_edge.errors import BackendUnavailable, ConfigError, LimitError
from lp_edge.runtime.server.access import (
    Certificates,
    TokenInterceptor,
    Tokens,
    free_socket_file,
    open_socket,
    server_credentials,
)
from lp_edge.runtime.server.config import Address, ServerConfig, parse_address
from lp_edge.runtime.server.core import Core
from lp_edge.runtime.server.metrics import Metrics
from lp_edge.runtime.server.service import add_services
from lp_edge.runtime.server.unary import Guarded
from lp_edge.runtime.server.wire import error_metadata

__all__ = ["Endpoints", "Health", "check_config", "run_server"]

_LOG = logging.getLogger("lp_edge")

_SWITCH_S: Final = 0.0005
"""The loop's thread must not wait the usual 5 ms for a thread that runs Python code between two NumPy calls."""
_PROBE_S: Final = 10.0
"""How long a health check's message, or the head of a connection's first HTTP request, may take: they ask for no token."""
_GRACE_S: Final = 2.0
"""How long calls may take to end after they were cancelled, and threads after that."""
_EXPIRE_S: Final = 5.0
"""Portraits that nobody uses are looked for so often."""
_UNARY: Final = 64
"""Calls that are no streams, health's watchers among them, that may be open at a time."""


@dataclass(frozen=True)
class Endpoints:
    """Where a server really listens; see :class:`~lp_edge.runtime.server.config.Address` for the form.

    Attributes:
        grpc: gRPC.
        http: the HTTP front; None = there is none.
        metrics: Prometheus' metrics; None = there is none.
        tls: whether gRPC (and HTTP) ask for TLS.
    """

    grpc: str
    http: str | None = None
    metrics: str | None = None
    tls: bool = False

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health service: one state for all services and for the server as a whole ("").

    It asks for no token, so it is bounded: at most half of the calls that are no streams may watch, and one that does not
    read its messages delays nobody.

    Args:
        names: full names of the services.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = frozenset(("", *names))
        self._serving = False
        self._changed = asyncio.Event()
        self._watchers = 0

    def set_serving(self, serving: bool) -> None:
        """Change the state and tell whoever watches; only in the loop's thread."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: Any, context: Any) -> Any:
        """The state of a service; NOT_FOUND when there is none of that name."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no service of that name")
        return self._state(request.service)

    async def Watch(self, request: Any, context: Any) -> None:
        """The state of a service now, and again whenever it changes."""
        if self._watchers >= _UNARY // 2:
            status, message, metadata = error_metadata(
                LimitError(f"{self._watchers} calls watch the health", "", "use Check", retry_after_s=1.0)
            )
            await context.abort(grpc.StatusCode[status], message, metadata)
        self._watchers += 1
        last = None
        try:
            while True:
                changed, state = self._changed, self._state(request.service)
                if state != last:
                    await context.write(state)
                    last = state
                await changed.wait()
        finally:
            self._watchers -= 1

    def _state(self, service: str) -> Any:
        states = health_pb2.HealthCheckResponse
        if service not in self._names:
            return states(status=states.SERVICE_UNKNOWN)
        return states(status=states.SERVING if self._serving else states.NOT_SERVING)


def check_config(config: ServerConfig) -> list[str]:
    """Look at what can be wrong without loading networks or binding an address: tokens, certificates, extras.

    Returns:
        What is allowed but worth knowing, for people.

    Raises:
        ConfigError: tokens or certificates cannot be used, or a certificate is not valid now.
        BackendUnavailable: the HTTP front is asked for and its packages are not installed.
    """
    tokens = Tokens.of(config)
    if config.http_listen is not None:
        _http_app()
    notes = []
    if config.tls is not None:
        notes.append(f"the certificate is valid until {Certificates(config.tls).valid_until()}")
    return notes + _warnings(config, tokens)


def _warnings(config: ServerConfig, tokens: Tokens) -> list[str]:
    listens = [text for text in (config.listen, config.http_listen) if text is not None]
    if all(parse_address(text).is_local for text in listens):
        return []
    found = []
    if config.tls is None:
        found.append(
            "other machines reach the server without TLS: pictures"
            + (" and tokens" if tokens.required else "")
            + " travel as plain text"
        )
    if not tokens.required and (config.tls is None or config.tls.client_ca is None):
        found.append("there are no tokens and no client CA: whoever reaches the address can use the server")
    return found


async def run_server(config: ServerConfig, *, ready: Callable[[Endpoints], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT (in the main thread), or until the task is cancelled.

    A signal drains: health says NOT_SERVING, new streams are refused, open ones are told and may go on for
    ``drain_timeout_s``, then they are ended. It returns within a few seconds of that. A second signal ends the process at
    once, with code 143 or 130. A cancelled task does not drain.

    Args:
        config: addresses, limits, access, devices.
        ready: called once new streams are taken, with the addresses that were bound.

    Raises:
        ConfigError: tokens, certificates or an address cannot be used.
        BackendUnavailable, BundleError, EngineError: the networks cannot be loaded.

    Example:
        >>> asyncio.run(run_server(ServerConfig(), ready=print))                     # doctest: +SKIP
    """
    tokens = Tokens.of(config)
    certificates = None if config.tls is None else Certificates(config.tls)
    if certificates is not None:
        try:
            certificates.valid_until()
        except ConfigError as error:
            # Not a reason to stay down: machines without a battery start with a wrong clock.
            _LOG.error("%s", error)
    for warning in _warnings(config, tokens):
        _LOG.warning("%s", warning)
    stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        stack.enter_context(_switching(_SWITCH_S))
        stack.enter_context(_signals(stop))
        metrics = Metrics()
        core = Core(config, metrics)
        loading = _Loading(core)
        stack.push_async_callback(loading.close)
        server, health, address = _grpc_server(config, core, metrics, tokens, certificates)
        await server.start()
        stack.push_async_callback(server.stop, _GRACE_S)
        http = None
        if config.http_listen is not None:
            front = _Http(config, core, certificates)
            stack.push_async_callback(front.close)
            http = front.address
        scrape = None
        if config.metrics_listen is not None:
            endpoint = _metrics_endpoint(config, metrics, tokens, certificates)
            stack.callback(endpoint.close)
            scrape = str(endpoint.address)
        _LOG.info("loading the networks", extra={"fields": {"grpc": str(address)}})
        if await _first(loading.begin(), stop):
            endpoints = Endpoints(
                str(address), None if http is None else str(http), scrape, config.tls is not None
            )
            health.set_serving(True)
            metrics.serving(True)
            _LOG.info("serving", extra={"fields": endpoints.as_dict()})
            if ready is not None:
                ready(endpoints)
            _notify("READY=1")
            await _serve(core, stop)
        _notify("STOPPING=1")
        _LOG.info(
            "draining", extra={"fields": {"streams": len(core.streams), "seconds": config.drain_timeout_s}}
        )
        health.set_serving(False)
        metrics.serving(False)
        core.drain(config.drain_timeout_s)
        if not await core.drained():
            _LOG.warning("streams were ended at the end of the drain's time")
    _LOG.info("stopped")


async def _serve(core: Core, stop: asyncio.Event) -> None:
    """Keep house until the signal to stop: expired portraits go, systemd's watchdog is told that the loop runs."""
    watchdog = int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6
    interval = min(_EXPIRE_S, watchdog / 2) if watchdog else _EXPIRE_S
    while not stop.is_set():
        core.store.expire()
        if watchdog:
            _notify("WATCHDOG=1")
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), interval)


async def _first(done: asyncio.Future[None], stop: asyncio.Event) -> bool:
    """Wait for the networks or for the signal to stop; True = the networks are there. Raises what loading raised."""
    signalled = asyncio.ensure_future(stop.wait())
    either: set[asyncio.Future[Any]] = {done, signalled}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    finally:
        signalled.cancel()
    if stop.is_set():
        return False
    done.result()
    return True


class _Loading:
    """Opens the core in a thread of its own and closes it at the end, within a bound in both cases."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._done: asyncio.Future[None] | None = None

    def begin(self) -> asyncio.Future[None]:
        """Start to load; the future tells when that has ended, and how."""
        self._done = self._in_thread(self._core.open, "lp-load")
        return self._done

    def _in_thread(self, work: Callable[[], None], name: str) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish(error: BaseException | None) -> None:
            if not done.cancelled():
                done.set_result(None) if error is None else done.set_exception(error)

        def run() -> None:
            error: BaseException | None = None
            try:
                work()
            except BaseException as caught:  # noqa: BLE001 - raised where the future is awaited
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits
                loop.call_soon_threadsafe(finish, error)

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()
        return done

    async def close(self) -> None:
        """End the core. What does not end in time (an engine is being compiled, a network hangs) goes with the process."""
        if self._done is not None:
            await asyncio.wait({self._done}, timeout=self._core.config.drain_timeout_s + _GRACE_S)
        if self._done is None or self._done.done():
            if self._done is not None:
                self._done.exception()  # has been raised, or nobody wants it any more
            closed = self._in_thread(self._core.close, "lp-close")
            await asyncio.wait({closed}, timeout=2 * _GRACE_S)
            if closed.done():
                self._thread.join()  # it has said so and ends
                closed.result()
                return
        _LOG.error("threads do not end; the process leaves without them")
        _leave(0)


# -- gRPC ----------------------------------------------------------------------------------------------------


def _grpc_server(
    config: ServerConfig, core: Core, metrics: Metrics, tokens: Tokens, certificates: Certificates | None
) -> tuple[Any, Health, Address]:
    """The server with all services, bound to its address, not started."""
    limits = config.limits
    options = [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        # Only what is sent plain: pictures do not shrink, and unpacking is work that a few bytes could ask for.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_metadata_size", 16 << 10),
        # Of one connection; admission answers what goes beyond max_streams, this only bounds it.
        ("grpc.max_concurrent_streams", limits.max_streams + _UNARY),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not half of the calls
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ]
    interceptors = []
    if tokens.required:
        interceptors.append(TokenInterceptor(tokens, lambda: metrics.refused("token")))
    server = grpc.aio.server(
        interceptors=interceptors, options=options, maximum_concurrent_rpcs=limits.max_streams + 2 * _UNARY
    )
    names = (*add_services(server, core), health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    health = Health(names)
    health_pb2_grpc.add_HealthServicer_to_server(health, Guarded(server, _PROBE_S, most=_UNARY // 2))
    if config.reflection:
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    return server, health, _bind(server, parse_address(config.listen), certificates)


def _bind(server: Any, address: Address, certificates: Certificates | None) -> Address:
    try:
        if address.path is not None:
            free_socket_file(address.path)
        if certificates is None or address.path is not None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), server_credentials(certificates))
    except (RuntimeError, OSError):
        port = 0
    if not port:
        open_socket(address, "listen").close()  # raises with the reason
        raise ConfigError(f"listen {address} cannot be used", "", "choose another address")
    return address if address.path is not None else address.with_port(port)


# -- metrics and HTTP ----------------------------------------------------------------------------------------


def _metrics_endpoint(
    config: ServerConfig, metrics: Metrics, tokens: Tokens, certificates: Certificates | None
) -> Any:
    """On this machine it is plain and open, as collectors expect; elsewhere it asks for TLS and a token like the rest."""
    listen = config.metrics_listen or ""
    if parse_address(listen).is_local:
        return metrics.serve(listen)
    tls = None if certificates is None else certificates.ssl_context()
    return metrics.serve(listen, tls=tls, check=tokens.check if tokens.required else None)


def _http_app() -> tuple[Any, Any]:
    """``uvicorn`` and ``create_app``; BackendUnavailable without the extra."""
    try:
        import uvicorn

        from lp_edge.runtime.server.http import create_app
    except ImportError as error:
        if error.name is None or error.name.startswith("lp_edge"):
            raise
        raise BackendUnavailable(
            f"the HTTP front needs the package {error.name}, which is not installed",
            "expected the extra 'http'",
            "pip install 'lp-edge[http]'",
        ) from error
    return uvicorn, create_app


def _impatient() -> type:
    """uvicorn's protocol, closing connections whose first request does not come: it waits without bound, and they fill its places."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._patience = self.loop.call_later(_PROBE_S, self._give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._patience.cancel()
            super().connection_lost(exc)

        def _give_up(self) -> None:
            if self.cycle is None:
                self.transport.close()

    return Impatient


class _Http:
    """The HTTP front in the loop of gRPC, without uvicorn's signal handlers and process handling."""

    def __init__(self, config: ServerConfig, core: Core, certificates: Certificates | None) -> None:
        uvicorn, create_app = _http_app()
        address = parse_address(config.http_listen or "", "http_listen")
        settings = uvicorn.Config(
            create_app(core, config),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http=_impatient(),
            server_header=False,
            proxy_headers=False,
            limit_concurrency=config.limits.max_streams + 2 * _UNARY,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=round(_GRACE_S),
        )
        settings.load()
        if certificates is not None and address.path is None:
            settings.ssl = certificates.ssl_context()
        logging.getLogger("uvicorn.error").setLevel(
            logging.ERROR
        )  # a line for every refused request, without a token
        self._server = uvicorn.Server(settings)
        self._server.capture_signals = contextlib.nullcontext  # ours drain
        self._path = address.path
        self._socket = open_socket(address, "http_listen")
        self.address = (
            address if address.path is not None else address.with_port(self._socket.getsockname()[1])
        )
        self._task = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))

    async def close(self) -> None:
        """Stop listening, let answers end within the grace period, and end the rest."""
        self._server.should_exit = True
        try:
            await asyncio.wait_for(self._task, 2 * _GRACE_S)
        except asyncio.TimeoutError:
            _LOG.error("the HTTP front did not end in time")
        finally:
            self._socket.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)


# -- the process ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _switching(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT sets ``stop``, the second ends the process. Elsewhere than in the main thread: nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def received(number: int) -> None:
        if stop.is_set():
            _LOG.warning("a second signal: the process ends at once")
            _leave(128 + number)
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, received, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def _leave(code: int) -> NoReturn:
    """End the process now, whatever its threads do."""
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _notify(state: str) -> None:
    """Tell the service manager, as sd_notify(3) describes; does nothing where there is none."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            out.setblocking(False)
            out.sendto(state.encode(), "\0" + where[1:] if where.startswith("@") else where)
    except OSError as error:
        _LOG.warning("the service manager cannot be told %s: %s", state, error)
