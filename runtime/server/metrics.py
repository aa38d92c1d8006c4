"""Numbers for Prometheus: frames, latencies, batches, drops, refusals, streams, memory.

Labels take values of fixed sets only (what is not in them counts as ``other``), so no peer can make them grow, and none holds
an id or an address. docs/server.md explains each metric.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from socket import socket
from socketserver import ThreadingTCPServer
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

import lp_edge
from lp_edge.errors import AccessError
from lp_edge.runtime.server.access import open_socket
from lp_edge.runtime.server.config import Address, parse_address

__all__ = ["Metrics", "MetricsEndpoint"]

_LOG = logging.getLogger("lp_edge")

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0)
_WAITS: Final = (0.0001, 0.00025, 0.0005, *_SECONDS)
_ROWS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

KINDS: Final = ("animate", "extract_motion", "render", "register", "http", "other")
STAGES: Final = (
    "decode",
    "queue",
    "track",
    "motion",
    "compose",
    "warp",
    "paste_back",
    "resize",
    "encode",
    "other",
)
DROPS: Final = ("newer", "undecodable", "other")
REFUSALS: Final = (
    "streams",
    "loading",
    "draining",
    "token",
    "other",
)
STATUSES: Final = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)


def _known(value: str, values: tuple[str, ...]) -> str:
    return value if value in values else "UNKNOWN" if values is STATUSES else "other"


class Metrics:
    """All metrics of one server, in a registry of their own. Every method may be called from any thread.

    Example:
        >>> metrics = Metrics()
        >>> metrics.stream_opened("animate")
        >>> metrics.frame("animate", {"decode": 0.002, "warp": 0.03}, 0.035)
        >>> b'lp_edge_frames_total{kind="animate"} 1.0' in metrics.render()[0]
        True
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=registry)
        Info("lp_edge_build", "Version of lp-edge.", registry=registry).info({"version": lp_edge.__version__})
        Gauge("lp_edge_threads", "Python threads.", registry=registry).set_function(threading.active_count)
        self._serving = Gauge("lp_edge_serving", "1 = new streams are taken.", registry=registry)
        self._streams = Gauge("lp_edge_open_streams", "Open streams.", ["kind"], registry=registry)
        self._ended = Counter(
            "lp_edge_streams_total", "Streams that ended.", ["kind", "status"], registry=registry
        )
        self._life = Histogram(
            "lp_edge_stream_seconds",
            "How long streams were open.",
            ["kind"],
            buckets=(0.1, 1, 10, 60, 600, 3600, 86400),
            registry=registry,
        )
        self._frames = Counter(
            "lp_edge_frames_total", "Frames that were answered.", ["kind"], registry=registry
        )
        self._stage = Histogram(
            "lp_edge_frame_seconds", "Stages of frames.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._total = Histogram(
            "lp_edge_frame_total_seconds",
            "From a frame's message to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._drops = Counter(
            "lp_edge_dropped_frames_total", "Frames that were not answered.", ["reason"], registry=registry
        )
        self._rows = Histogram(
            "lp_edge_batch_size", "Rows of engine calls.", ["network"], buckets=_ROWS, registry=registry
        )
        self._calls = Counter(
            "lp_edge_batched_calls_total",
            "Calls of streams that engine calls were made of.",
            ["network"],
            registry=registry,
        )
        self._wait = Histogram(
            "lp_edge_batch_wait_seconds",
            "How long the oldest call of an engine call waited for its start.",
            buckets=_WAITS,
            registry=registry,
        )
        self._engine = Histogram(
            "lp_edge_engine_seconds", "Engine calls.", ["network"], buckets=_SECONDS, registry=registry
        )
        self._refusals = Counter("lp_edge_refused_total", "Requests refused.", ["reason"], registry=registry)
        # Labels that are known appear from the start, so that a rate over them has a first value.
        self._stage_of = {stage: self._stage.labels(stage) for stage in STAGES}
        self._frames_of = {kind: self._frames.labels(kind) for kind in KINDS}
        self._drops_of = {reason: self._drops.labels(reason) for reason in DROPS}
        self._refusals_of = {reason: self._refusals.labels(reason) for reason in REFUSALS}
        for kind in KINDS:
            self._streams.labels(kind)

    def bind(
        self,
        *,
        queue_depth: Callable[[], float],
        portraits: Callable[[], float],
        portrait_bytes: Callable[[], float],
        streams: Callable[[], float],
    ) -> None:
        """Read gauges from the server's own counts whenever metrics are asked for; call once.

        Args:
            queue_depth: engine calls that wait.
            portraits: portraits held.
            portrait_bytes: their memory in bytes.
            streams: streams as the admission counts them.
        """
        for name, text, read in (
            ("lp_edge_queue_depth", "Engine calls that wait.", queue_depth),
            ("lp_edge_portraits", "Portraits held.", portraits),
            ("lp_edge_portrait_bytes", "Memory of the portraits in bytes.", portrait_bytes),
            ("lp_edge_admitted_streams", "Streams that count against max_streams.", streams),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def serving(self, value: bool) -> None:
        """Tell whether new streams are taken."""
        self._serving.set(value)

    def stream_opened(self, kind: str) -> None:
        """A stream began: ``animate``, ``extract_motion``, ``render``, ``register`` or ``http``."""
        self._streams.labels(_known(kind, KINDS)).inc()

    def stream_closed(self, kind: str, status: str, seconds: float) -> None:
        """It ended after so many seconds, with the name of a gRPC status."""
        kind = _known(kind, KINDS)
        self._streams.labels(kind).dec()
        self._ended.labels(kind, _known(status, STATUSES)).inc()
        self._life.labels(kind).observe(seconds)

    def frame(self, kind: str, stages: Mapping[str, float], total_s: float) -> None:
        """A frame was answered.

        Args:
            kind: of its stream.
            stages: how long each stage took, in seconds, by the names of ``StageTiming.stage``.
            total_s: seconds from its message to its answer.
        """
        self._frames_of[_known(kind, KINDS)].inc()
        for stage, seconds in stages.items():
            self._stage_of[_known(stage, STAGES)].observe(seconds)
        self._total.observe(total_s)

    def dropped(self, n: int, reason: str) -> None:
        """``n`` frames were not answered: ``newer`` (a newer one had come) or ``undecodable``."""
        self._drops_of[_known(reason, DROPS)].inc(n)

    def batch(self, network: str, size: int, rows: int, waited_s: float, ran_s: float) -> None:
        """An engine call ended; see :class:`lp_edge.engines.batching.BatchObserver`."""
        self._rows.labels(network).observe(rows)
        self._calls.labels(network).inc(size)
        self._wait.observe(waited_s)
        self._engine.labels(network).observe(ran_s)

    def refused(self, reason: str) -> None:
        """A request was refused: the name of a limit without ``max_``, ``loading``, ``draining`` or ``token``."""
        self._refusals_of[_known(reason, REFUSALS)].inc()

    def render(self) -> tuple[bytes, str]:
        """All values in Prometheus' text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def serve(
        self,
        listen: str,
        *,
        tls: ssl.SSLContext | None = None,
        check: Callable[[str | None], None] | None = None,
    ) -> MetricsEndpoint:
        """Answer ``GET /metrics`` in threads of its own until it is closed.

        Args:
            listen: ``host:port``; port 0 = any free one.
            tls: the server's side of TLS; None = plain text.
            check: raises :class:`~lp_edge.errors.AccessError` for a wrong ``Authorization`` header (None = there is none).

        Raises:
            ConfigError: the address cannot be bound.
        """
        return MetricsEndpoint(self, parse_address(listen, "metrics_listen"), tls, check)


class MetricsEndpoint:
    """The address at which :meth:`Metrics.serve` answers, until :meth:`close`."""

    def __init__(
        self,
        metrics: Metrics,
        address: Address,
        tls: ssl.SSLContext | None,
        check: Callable[[str | None], None] | None,
    ) -> None:
        bound = open_socket(address, "metrics_listen")
        self.address = address.with_port(bound.getsockname()[1])
        self._server = _Server(bound, metrics, tls, check)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="lp-metrics")
        self._thread.start()

    def close(self) -> None:
        """Stop listening; requests that are being answered end within seconds. May be called again."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> MetricsEndpoint:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingTCPServer):
    """At most eight requests at a time, each with a time limit: the endpoint cannot be used to exhaust threads."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        bound: socket,
        metrics: Metrics,
        tls: ssl.SSLContext | None,
        check: Callable[[str | None], None] | None,
    ) -> None:
        super().__init__(bound.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()  # the one that the base class made and did not bind
        self.socket = bound
        self.metrics, self.tls, self.check = metrics, tls, check
        self._slots = threading.BoundedSemaphore(8)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.debug("a metrics request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = 5.0  # seconds for every read and write
    server_version = "lp-edge"
    sys_version = ""
    server: _Server

    def setup(self) -> None:
        if self.server.tls is not None:
            self.request.settimeout(self.timeout)
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()

    def do_GET(self) -> None:
        body, content_type = b"the metrics are at /metrics\n", "text/plain"
        if self.path.partition("?")[0] != "/metrics":
            self._answer(404, body, content_type)
            return
        if self.server.check is not None:
            try:
                self.server.check(self.headers.get("authorization"))
            except AccessError as error:
                self._answer(401, f"{error}\n".encode(), content_type)
                return
        self._answer(200, *self.server.metrics.render())

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        _LOG.debug("metrics: " + format, *args)
