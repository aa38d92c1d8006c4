"""The command lp-serve: options, refusals with their exit codes, --check, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from lp_edge.errors import ConfigError
from lp_edge.runtime.server.command import serve, tokens_of_environment
from lp_edge.runtime.server.config import Limits, ServerConfig

SECONDS = 60.0
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs the command in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")  # what it would set itself, undone afterwards

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            serve.main([str(a) for a in args], prog_name="lp-serve")
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return run


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """The configurations that the command would run a server with."""
    main = pytest.importorskip("lp_edge.runtime.server.main", exc_type=ImportError)
    found: list[ServerConfig] = []

    async def run_server(config: ServerConfig, *, ready: object) -> None:
        found.append(config)

    monkeypatch.setattr(main, "run_server", run_server)
    return found


def test_without_options_the_configuration_has_its_own_defaults(
    call: Call, configured: list[ServerConfig]
) -> None:
    assert call() == (0, "", "")
    assert configured == [ServerConfig()]


def test_every_option_arrives(
    call: Call, configured: list[ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LP_EDGE_TOKENS", "one-token-0123456789,two-token-0123456789")
    code, out, err = call(
        *(
            "--listen",
            "[::1]:7",
            "--http",
            "localhost:8",
            "--metrics-port",
            9,
            "--bundle",
            "b",
            "--face-models",
            "f",
        ),
        *("--backend", "cuda", "--device", 1, "--device", 3, "--threads", 2, "--max-batch", 4),
        *("--backend-option", "a=1", "--backend-option", "b=x=y", "--pixels", "host"),
        *(
            "--max-batch-wait",
            "0.01",
            "--max-streams",
            5,
            "--max-portraits",
            6,
            "--max-portrait-memory",
            "2G",
        ),
        *("--max-queue", 7, "--max-message", "1MiB", "--max-pixels", 5000, "--max-upload", "3kb"),
        *("--max-shared-memory", 0, "--portrait-ttl", 8, "--idle-timeout", 9, "--drain-timeout", 1.5),
        *(
            "--tls-cert",
            "c",
            "--tls-key",
            "k",
            "--tls-client-ca",
            "a",
            "--token-file",
            "t",
            "--no-reflection",
        ),
        "--insecure",
    )
    assert (code, out, err) == (0, "", "")
    (config,) = configured
    assert (config.listen, config.http_listen, config.metrics_listen) == (
        "[::1]:7",
        "localhost:8",
        "127.0.0.1:9",
    )
    assert (config.bundle, config.face_models) == (Path("b"), Path("f"))
    assert (config.backend.backend, config.backend.threads, config.devices) == ("cuda", 2, (1, 3))
    assert (config.backend.provider_options, config.backend.pixels) == ({"a": "1", "b": "x=y"}, "host")
    assert config.limits == Limits(5, 6, 2 << 30, 7, 1 << 20, 5000, 3 << 10, 0)
    assert (config.max_batch, config.max_batch_wait_s) == (4, 0.01)
    assert (config.portrait_ttl_s, config.idle_timeout_s, config.drain_timeout_s) == (8.0, 9.0, 1.5)
    assert config.tls is not None
    assert (config.tls.certificate, config.tls.key, config.tls.client_ca) == (Path("c"), Path("k"), Path("a"))
    assert config.tokens == ("one-token-0123456789", "two-token-0123456789")
    assert (config.token_file, config.insecure, config.reflection) == (Path("t"), True, False)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--listen", "0.0.0.0:50051"), "--insecure"),
        (("--http", "0.0.0.0:80"), "http_listen is '0.0.0.0:80'"),
        (("--metrics-listen", "[::]:80"), "metrics_listen is '[::]:80'"),
        (("--metrics-port", "70000"), "metrics_listen is '127.0.0.1:70000'"),
        (("--metrics-port", "1", "--metrics-listen", "127.0.0.1:2"), "together with"),
        (("--listen", "nonsense"), "listen is 'nonsense'"),
        (("--tls-cert", "c.pem"), "--tls-cert alone"),
        (("--tls-key", "k.pem", "--tls-client-ca", "a.pem"), "--tls-key and --tls-client-ca alone"),
        (("--tls-cert", "c.pem", "--tls-key", "none.key"), "cannot read the certificate c.pem"),
        (("--token-file", "none"), "cannot read the token file none"),
        (("--max-streams", "0"), "max_streams is 0"),
        (("--max-message", "4G"), "max_message_bytes is 4294967296"),
        (("--max-message", "much"), "'much' is not a number of bytes"),
        (("--max-batch", "65"), "max_batch is 65"),
        (("--max-batch-wait", "nan"), "max_batch_wait_s is nan"),
        (("--backend", "abacus"), "unknown backend 'abacus'"),
        (("--backend", "cpu", "--device", "0", "--device", "1"), "a CPU is one device"),
        (("--backend", "cuda", "--backend-option", "fast"), "--backend-option 'fast': expected NAME=VALUE"),
        (("--backend-option", "a=1"), "provider options ['a'] with backend auto"),
        (("--pixels", "moon"), "'moon' is not one of 'auto', 'host', 'device'"),
        (("--token", "0123456789abcdef"), "No such option"),
        (("--log-format", "xml"), "xml"),
        (("0.0.0.0:50051",), "unexpected extra argument"),
    ],
)
def test_wrong_options_are_refused_with_a_reason(
    call: Call, args: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc")
    monkeypatch.chdir(tmp_path)
    code, out, err = call("--check", *args)
    assert (code, out) == (2, "")
    assert expected in err and "to fix it:" in err
    code, out, err = call("--check", "--json", *args)
    assert (code, err) == (2, "")
    assert (
        expected
        in json.loads(out)["error"]["got"]
        + json.loads(out)["error"]["expected"]
        + json.loads(out)["error"]["remedy"]
    )


def test_help_explains_every_option_and_needs_no_extra(call: Call) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for parameter in serve.params:
        assert isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert name in out
        assert parameter.help
    for heading in ("Addresses:", "Access:", "Limits", "Examples:", "Exit codes:"):
        assert heading in out
    modules = "grpc", "google", "prometheus_client", "fastapi", "uvicorn", "onnxruntime", "cv2", "av"
    code_text = f"""
import sys
from lp_edge.runtime.server.command import serve
try:
    serve.main(["--help"])
except SystemExit as end:
    loaded = [name for name in {modules!r} if name in sys.modules]
    sys.exit(str(loaded) if loaded or end.code else 0)
"""
    subprocess.run([sys.executable, "-c", code_text], check=True, capture_output=True, timeout=SECONDS)


@pytest.mark.parametrize(
    ("missing", "args", "extra"),
    [
        ("grpc", (), "server"),
        ("grpc_health", (), "server"),
        ("prometheus_client", ("--check",), "server"),
        ("google", (), "server"),
        ("uvicorn", ("--http", "127.0.0.1:0"), "http"),
        ("fastapi", ("--check", "--http", "127.0.0.1:0"), "http"),
    ],
)
def test_a_missing_extra_is_one_sentence(missing: str, args: tuple[str, ...], extra: str) -> None:
    pytest.importorskip("grpc")
    code = f"""
import sys
sys.modules[{missing!r}] = None
from lp_edge.runtime.server.command import serve
serve(prog_name="lp-serve")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--listen", "127.0.0.1:0", "--quiet", *args],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 7, done.stderr
    said, remedy = done.stderr.splitlines()
    assert missing in said and "not installed" in said and f"expected the extra '{extra}'" in said
    assert remedy == f"lp-serve: to fix it: pip install 'lp-edge[{extra}]'"


# -- tokens of the environment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", " , ", "short", "good-token-0123456789,short", "blanks in the middle of it"]
)
def test_a_variable_that_holds_no_good_token_opens_nothing(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("LP_EDGE_TOKENS", text)
    with pytest.raises(ConfigError, match="LP_EDGE_TOKENS") as refused:
        tokens_of_environment()
    assert "good-token" not in str(refused.value)


def test_no_variable_means_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LP_EDGE_TOKENS", raising=False)
    assert tokens_of_environment() == ()


# -- --check and the lines of a run ---------------------------------------------------------------------------


def test_check_says_what_is_remarkable_and_starts_nothing(call: Call, pki: Any, tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    pair = pki.issue("server", pki.authority())
    tokens = tmp_path / "tokens"
    tokens.write_text("0123456789abcdef")
    tokens.chmod(0o600)
    args = ("--check", "--listen", "0.0.0.0:1", "--tls-cert", pair.certificate, "--tls-key", pair.key)
    code, out, err = call(*args, "--token-file", tokens)
    assert (code, err) == (0, "")
    note, done = out.splitlines()
    assert note.startswith("lp-serve: note: the certificate is valid until ")
    assert done == "lp-serve: the configuration is in order"
    code, out, err = call(*args, "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["notes"]) == 2  # no tokens is worth a word
    assert call(*args, "--quiet") == (0, "", "")
    tokens.chmod(0o644)
    code, _, err = call(*args, "--token-file", tokens)
    assert code == 2 and f"chmod 600 {tokens}" in err
    pki.expire(pair)
    code, _, err = call(*args)
    assert code == 2 and "expired" in err


def test_a_run_prints_one_line_and_logs_json(tmp_path: Path, toy_bundle: Path) -> None:
    pytest.importorskip("grpc")
    code = "from lp_edge.runtime.server.command import serve; serve(prog_name='lp-serve')"
    args = ("--listen", "127.0.0.1:0", "--metrics-port", "0", "--bundle", toy_bundle, "--log-format", "json")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert line.startswith("lp-serve: gRPC on 127.0.0.1:") and line.rstrip().endswith("/metrics")
    assert out == ""
    entries = [json.loads(entry) for entry in err.splitlines()]
    words = [entry["message"] for entry in entries]
    assert [w for w in words if w in ("serving", "draining", "stopped")] == ["serving", "draining", "stopped"]
    assert all(entry["level"] in ("info", "warning") for entry in entries)


def test_nobody_reading_its_line_is_no_reason_to_stop(toy_bundle: Path) -> None:
    pytest.importorskip("grpc")
    code = "from lp_edge.runtime.server.command import serve; serve(prog_name='lp-serve')"
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--listen", "127.0.0.1:0", "--bundle", str(toy_bundle)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if " serving " in line:
                process.send_signal(signal.SIGTERM)
                break
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert "stopped" in err
