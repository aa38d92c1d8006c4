"""The server's configuration: what is accepted, what is refused, and that a refusal says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError
from lp_edge.runtime.server.config import Limits, ServerConfig, TlsConfig, check_token, parse_address

TLS = TlsConfig(Path("server.pem"), Path("server.key"))


@pytest.mark.parametrize(
    ("text", "host", "port", "local"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051, True),
        ("127.8.9.1:1", "127.8.9.1", 1, True),
        ("[::1]:0", "::1", 0, True),
        ("localhost:65535", "localhost", 65535, True),
        ("0.0.0.0:50051", "0.0.0.0", 50051, False),
        ("[::]:50051", "::", 50051, False),
        ("192.168.0.7:80", "192.168.0.7", 80, False),
        ("localhost.example.com:80", "localhost.example.com", 80, False),
    ],
)
def test_tcp_addresses(text: str, host: str, port: int, local: bool) -> None:
    address = parse_address(text)
    assert (address.host, address.port, address.path, address.is_local) == (host, port, None, local)
    assert str(address) == text
    assert parse_address(str(address.with_port(7))).port == 7


def test_a_socket_file_is_local() -> None:
    address = parse_address("unix:/run/lp.sock")
    assert address.path == Path("/run/lp.sock")
    assert address.is_local
    assert str(address) == "unix:/run/lp.sock"


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "127.0.0.1", "127.0.0.1:", ":50051", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1: 80"),
        *("127.0.0.1:5e4", "::1:50051", "[::1]", "[127.0.0.1]:80", "[]:80", "http://127.0.0.1:80", "a b:80"),
        *(
            "unix:lp.sock",
            "unix:",
            "unix:/",
            "unix-abstract:lp",
            "unix:/" + "x" * 107,
            "127.0.0.1:\N{ARABIC-INDIC DIGIT FOUR}",
        ),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_address(text, "http_listen")
    assert refused.value.got == f"http_listen is {text!r}"
    assert refused.value.remedy


@pytest.mark.parametrize("name", ["listen", "http_listen", "metrics_listen"])
def test_other_machines_reach_the_server_only_with_tls_or_when_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match="--insecure") as refused:
        ServerConfig(**{name: "0.0.0.0:0"})
    assert "0.0.0.0:0" in refused.value.got
    ServerConfig(**{name: "0.0.0.0:0"}, insecure=True)
    ServerConfig(**{name: "0.0.0.0:0"}, tls=TLS)


def test_metrics_need_tcp() -> None:
    with pytest.raises(ConfigError, match="TCP"):
        ServerConfig(metrics_listen="unix:/run/metrics.sock")


@pytest.mark.parametrize(
    "change",
    [
        *({"max_batch": 0}, {"max_batch": 65}, {"max_batch": True}, {"max_batch_wait_s": -0.1}),
        *({"max_batch_wait_s": 1.5}, {"max_batch_wait_s": float("nan")}, {"portrait_ttl_s": 0}),
        *(
            {"idle_timeout_s": float("inf")},
            {"drain_timeout_s": -1},
            {"drain_timeout_s": 3601},
            {"devices": ()},
        ),
        *({"devices": (0, 0)}, {"devices": (-1,)}, {"tokens": ("short",)}, {"tokens": ("x" * 15 + " ",)}),
        {"devices": (0, 1), "backend": BackendConfig("cpu")},
    ],
    ids=str,
)
def test_what_is_out_of_range(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(**change)  # type: ignore[arg-type]
    assert refused.value.expected and refused.value.remedy


@pytest.mark.parametrize("name", Limits.__dataclass_fields__)
@pytest.mark.parametrize("value", [-1, 1 << 50, 1.5, "8", True])
def test_limits_have_ranges(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_tokens_are_not_printed() -> None:
    secret = "s3cret-s3cret-s3cret"
    assert secret not in repr(ServerConfig(tokens=(secret,)))
    with pytest.raises(ConfigError) as refused:
        check_token("kurz", "here")
    assert "kurz" not in str(refused.value) and "here" in str(refused.value)
