"""The metrics: what they count, that labels cannot grow, and the endpoint that gives them out."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("grpc")
pytest.importorskip("prometheus_client")
from lp_edge.errors import ConfigError
from lp_edge.runtime.server import metrics as server_metrics
from lp_edge.runtime.server.access import Certificates, Tokens
from lp_edge.runtime.server.config import TlsConfig
from lp_edge.runtime.server.metrics import Metrics

SECONDS = 20.0


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, f"there is no {name}{labels}"
    return found


def test_frames_and_their_stages() -> None:
    metrics = Metrics()
    metrics.frame("animate", {"decode": 0.002, "warp": 0.03}, 0.035)
    metrics.frame("animate", {"decode": 0.004}, 12.0)
    assert value(metrics, "lp_edge_frames_total", kind="animate") == 2
    assert value(metrics, "lp_edge_frame_seconds_count", stage="decode") == 2
    assert value(metrics, "lp_edge_frame_seconds_sum", stage="decode") == pytest.approx(0.006)
    assert value(metrics, "lp_edge_frame_seconds_bucket", stage="decode", le="0.0025") == 1
    assert value(metrics, "lp_edge_frame_total_seconds_bucket", le="10.0") == 1
    assert value(metrics, "lp_edge_frame_total_seconds_bucket", le="+Inf") == 2


def test_streams_drops_batches_refusals() -> None:
    metrics = Metrics()
    metrics.stream_opened("animate")
    metrics.stream_opened("animate")
    metrics.stream_closed("animate", "OK", 3.0)
    metrics.dropped(3, "newer")
    metrics.dropped(1, "undecodable")
    metrics.batch("warp_decode", 2, 5, 0.0003, 0.02)
    metrics.refused("streams")
    assert value(metrics, "lp_edge_open_streams", kind="animate") == 1
    assert value(metrics, "lp_edge_streams_total", kind="animate", status="OK") == 1
    assert value(metrics, "lp_edge_stream_seconds_sum", kind="animate") == 3.0
    assert value(metrics, "lp_edge_dropped_frames_total", reason="newer") == 3
    assert value(metrics, "lp_edge_dropped_frames_total", reason="undecodable") == 1
    assert value(metrics, "lp_edge_batch_size_sum", network="warp_decode") == 5
    assert value(metrics, "lp_edge_batched_calls_total", network="warp_decode") == 2
    assert value(metrics, "lp_edge_batch_wait_seconds_bucket", le="0.0005") == 1
    assert value(metrics, "lp_edge_engine_seconds_sum", network="warp_decode") == 0.02
    assert value(metrics, "lp_edge_refused_total", reason="streams") == 1


def test_labels_take_values_of_fixed_sets_only() -> None:
    metrics = Metrics()

    def series() -> int:
        return sum(len(family.samples) for family in metrics.registry.collect())

    def everything(word: str) -> None:
        metrics.stream_opened(word)
        metrics.stream_closed(word, word, 1.0)
        metrics.frame(word, {word: 1.0}, 1.0)
        metrics.dropped(1, word)
        metrics.refused(word)

    everything("a")
    before = series()
    for i in range(50):
        everything(f"word {i}")
    assert series() == before
    assert value(metrics, "lp_edge_frames_total", kind="other") == 51
    assert value(metrics, "lp_edge_frame_seconds_count", stage="other") == 51
    assert value(metrics, "lp_edge_streams_total", kind="other", status="UNKNOWN") == 51


def test_gauges_read_the_servers_own_counts() -> None:
    metrics, counts = Metrics(), {"queue": 3}
    metrics.bind(
        queue_depth=lambda: counts["queue"],
        portraits=lambda: 2,
        portrait_bytes=lambda: 1 << 40,
        streams=lambda: 1,
    )
    assert value(metrics, "lp_edge_queue_depth") == 3
    counts["queue"] = 0
    assert value(metrics, "lp_edge_queue_depth") == 0
    assert value(metrics, "lp_edge_portraits") == 2
    assert value(metrics, "lp_edge_portrait_bytes") == 1 << 40
    assert value(metrics, "lp_edge_admitted_streams") == 1
    metrics.serving(True)
    assert value(metrics, "lp_edge_serving") == 1
    assert value(metrics, "process_resident_memory_bytes") > 1 << 20
    assert value(metrics, "lp_edge_threads") >= 1


def test_two_servers_of_one_process_do_not_meet() -> None:
    first, second = Metrics(), Metrics()
    first.refused("token")
    assert value(second, "lp_edge_refused_total", reason="token") == 0


def test_many_threads_lose_nothing() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.frame("animate", {"warp": 0.01}, 0.02)
            metrics.batch("net", 1, 1, 0.0, 0.01)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result(SECONDS)
    assert value(metrics, "lp_edge_frames_total", kind="animate") == 2000
    assert value(metrics, "lp_edge_engine_seconds_count", network="net") == 2000


# -- the endpoint ---------------------------------------------------------------------------------------------


def get(url: str, token: str | None = None, context: ssl.SSLContext | None = None) -> tuple[int, str, str]:
    """Status, content type and body."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=SECONDS, context=context) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def test_the_endpoint_gives_what_render_gives_and_ends_with_its_threads() -> None:
    metrics = Metrics()
    metrics.refused("streams")
    before = set(threading.enumerate())
    with metrics.serve("127.0.0.1:0") as endpoint:
        status, kind, body = get(f"http://{endpoint.address}/metrics")
        assert (status, kind) == (200, metrics.render()[1])
        assert 'lp_edge_refused_total{reason="streams"} 1.0' in body
        assert get(f"http://{endpoint.address}/metrics?name=x")[0] == 200
        for path in ("/", "/other", "/metrics/../etc/passwd"):
            assert get(f"http://{endpoint.address}{path}")[0] == 404
        request = urllib.request.Request(f"http://{endpoint.address}/metrics", data=b"x", method="POST")
        with pytest.raises(urllib.error.HTTPError, match="501") as refused:
            urllib.request.urlopen(request, timeout=SECONDS)
        refused.value.close()
        with pytest.raises(ConfigError, match="in use"):
            metrics.serve(str(endpoint.address))
        port = endpoint.address.port
    assert port
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), SECONDS)
    assert not [t for t in set(threading.enumerate()) - before if t.name == "lp-metrics"]


def test_it_works_over_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with Metrics().serve("[::1]:0") as endpoint:
        assert get(f"http://{endpoint.address}/metrics")[0] == 200


def test_connections_that_say_nothing_take_a_bounded_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_metrics._Handler, "timeout", 0.5)
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(Metrics().serve("127.0.0.1:0"))
        before = threading.active_count()
        where = ("127.0.0.1", endpoint.address.port)
        silent = [stack.enter_context(socket.create_connection(where, SECONDS)) for _ in range(40)]
        closed = 0
        for connection in silent:  # those beyond eight are closed at once, the others after a while
            closed += connection.recv(1) == b""
            assert threading.active_count() - before <= 8
        assert closed == 40
        assert get(f"http://{endpoint.address}/metrics")[0] == 200


def test_token_and_tls_where_they_are_asked_for(pki: Any) -> None:
    ca = pki.authority()
    pair = pki.issue("server", ca)
    certificates = Certificates(TlsConfig(pair.certificate, pair.key))
    tokens = Tokens(["a-token-of-some-length"])
    trusting = ssl.create_default_context(cafile=str(ca.certificate))
    with Metrics().serve("127.0.0.1:0", tls=certificates.ssl_context(), check=tokens.check) as endpoint:
        url = f"https://{endpoint.address}/metrics"
        assert get(url, "a-token-of-some-length", trusting)[0] == 200
        status, _, body = get(url, None, trusting)
        assert status == 401 and "Bearer TOKEN" in body
        assert get(url, "wrong-token-of-some-length", trusting)[0] == 401
        with pytest.raises(OSError):
            get(f"http://{endpoint.address}/metrics", "a-token-of-some-length")
