"""The command ``lp-serve``: read options and tokens, check them, run the server until a signal.

The packages of the extra ``server`` are imported when the command runs, so ``--help`` works without them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import click

from lp_edge.cli import BACKEND_OPTION, PIXELS_OPTION, Guarded, common_options, name_and_value
from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import BackendUnavailable, ConfigError
from lp_edge.runtime.server import log
from lp_edge.runtime.server.config import Limits, ServerConfig, TlsConfig, check_token

if TYPE_CHECKING:
    from lp_edge.runtime.server.main import Endpoints

__all__ = ["TOKENS_VARIABLE", "serve", "tokens_of_environment"]

TOKENS_VARIABLE: Final = "LP_EDGE_TOKENS"
"""Environment variable with tokens, separated by commas."""


def _bytes(text: str) -> int:
    """A number of bytes: 1000000, 512K, 64M, 2G, 1T (powers of 1024)."""
    read = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if read is None:
        raise click.BadParameter(f"{text[:40]!r} is not a number of bytes; expected for example 512M or 2G")
    return int(read[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[read[2].upper()]


class _Option(click.Option):
    """An option that help lists under a heading."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class _Grouped(Guarded):
    """A guarded command whose help has a heading for each group of options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, "group", "General"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _group(title: str) -> Callable[..., _Decorator]:
    return partial(click.option, cls=_Option, group=title)


def _size(name: str, default: int, help: str, metavar: str = "BYTES") -> _Decorator:
    """An option for a size of :class:`Limits`, which is in whole mebi."""
    return _limit(name, type=_bytes, metavar=metavar, default=f"{default >> 20}M", help=help)


def _count(name: str, default: int, help: str) -> _Decorator:
    return _limit(name, type=int, metavar="N", default=default, help=help)


def _seconds(name: str, default: float, help: str) -> _Decorator:
    return _time(name, type=float, metavar="S", default=f"{default:g}", help=help)


_address, _access, _networks = _group("Addresses"), _group("Access"), _group("Networks")
_limit, _time, _batch = (
    _group("Limits (K, M, G = powers of 1024)"),
    _group("Times, in seconds"),
    _group("Batches of concurrent streams"),
)
_logs = _group("Logs, on standard error")
_PATH = click.Path(path_type=Path)


@click.command(
    cls=_Grouped,
    name="lp-serve",
    context_settings={"show_default": True},
    epilog="""\b
Examples:
    lp-serve                                              (this machine only: 127.0.0.1:50051)
    lp-serve --listen unix:/run/lp-serve/lp.sock          (a socket file)
    lp-serve --http 127.0.0.1:8080 --metrics-port 9464
    openssl rand -hex 32 > tokens && chmod 600 tokens
    lp-serve --listen 0.0.0.0:50051 --tls-cert server.pem --tls-key server.key --token-file tokens
    lp-serve --bundle liveportrait-human-fp32 --backend cuda --device 0 --device 1
    lp-serve --bundle liveportrait-human-fp16 --backend tensorrt --backend-option max_batch=16 --max-batch 16
    lp-serve --check --tls-cert server.pem --tls-key server.key --token-file tokens

\b
It prints one line when it takes calls. SIGTERM or Ctrl-C drains: open streams may finish for --drain-timeout seconds,
then it exits with 0; a second signal ends it at once. Tokens never belong on the command line, where every user sees
them: --token-file, or the variable LP_EDGE_TOKENS (separated by commas).

\b
Exit codes:
    0  stopped by a signal              6  a network failed
    1  unexpected error                 7  backend, device or package not there
    2  wrong option, address in use,  130  second Ctrl-C
       certificate or token file      143  second SIGTERM
    5  bundle incomplete or altered
""",
)
@_address(
    "--listen",
    default=ServerConfig.listen,
    metavar="ADDRESS",
    help="gRPC: HOST:PORT, [IPv6]:PORT (port 0 = any free one) or unix:/PATH.",
)
@_address("--http", "http_listen", metavar="ADDRESS", help="HTTP front.  [default: none]")
@_address(
    "--metrics-port",
    type=int,
    metavar="PORT",
    help="Prometheus metrics on 127.0.0.1 at this port, plain and without a token.  [default: none]",
)
@_address(
    "--metrics-listen",
    metavar="ADDRESS",
    help="The same on another address; where other machines reach it, with the server's TLS and tokens.",
)
@_access(
    "--tls-cert",
    type=_PATH,
    metavar="FILE",
    help="Server's certificate with its chain, PEM; read again when it changes.",
)
@_access(
    "--tls-key",
    type=_PATH,
    metavar="FILE",
    help="Its private key, PEM, not encrypted, closed to other users.",
)
@_access(
    "--tls-client-ca",
    type=_PATH,
    metavar="FILE",
    help="Mutual TLS: clients must show a certificate signed by one of these.",
)
@_access(
    "--token-file",
    type=_PATH,
    metavar="FILE",
    help="Bearer tokens, one a line (16 characters or more), # for comments; mode 600; read again when it changes. "
    f"More may come from ${TOKENS_VARIABLE}.  [default: no token is asked for]",
)
@_access(
    "--insecure",
    is_flag=True,
    help="Allow addresses that other machines reach without TLS.",
)
@_access(
    "--reflection/--no-reflection",
    default=True,
    help="Tell clients services and messages on request (grpcurl).",
)
@_networks("--bundle", type=_PATH, metavar="DIR", help="Networks to use instead of the built-in ones.")
@_networks(
    "--face-models",
    type=_PATH,
    metavar="DIR",
    help="liveportrait: your own landmark.onnx, det_10g.onnx, 2d106det.onnx.",
)
@_networks(
    "--backend",
    default="auto",
    help="auto, cpu, cuda, tensorrt, …; never replaced silently. lp-doctor tells which work.",
)
@_networks(
    "--device",
    "devices",
    type=int,
    metavar="N",
    multiple=True,
    default=(0,),
    help="Index of a GPU; may be given several times, streams are spread over them.",
)
@_networks("--threads", type=int, metavar="N", default=0, help="CPU threads; 0 = one per core.")
@_networks("--backend-option", "backend_options", **BACKEND_OPTION)
@_networks("--pixels", **PIXELS_OPTION)
@_batch(
    "--max-batch",
    type=int,
    metavar="N",
    default=ServerConfig.max_batch,
    help="Most frames of one engine call, 1 to 64; 1 = one by one.",
)
@_batch(
    "--max-batch-wait",
    type=float,
    metavar="SECONDS",
    help="How long a call waits for others to join, 0 to 1.  [default: 0 on a CPU, 0.002 on a GPU]",
)
@_count("--max-streams", Limits.max_streams, "Open streams.")
@_count("--max-portraits", Limits.max_portraits, "Portraits held.")
@_size("--max-portrait-memory", Limits.max_portrait_bytes, "Memory of all portraits.")
@_count("--max-queue", Limits.max_queue, "Frames of a lossless stream that wait.")
@_size("--max-message", Limits.max_message_bytes, "Size of one message.")
@_size("--max-pixels", Limits.max_pixels, "Pixels of one picture.", "PIXELS")
@_size("--max-upload", Limits.max_upload_bytes, "Size of an uploaded clip or template.")
@_size(
    "--max-shared-memory", Limits.max_shared_memory_bytes, "Shared memory of one stream; 0 = none is given."
)
@_seconds("--portrait-ttl", ServerConfig.portrait_ttl_s, "Portraits that nobody uses go after this.")
@_seconds("--idle-timeout", ServerConfig.idle_timeout_s, "Silent streams are ended after this.")
@_seconds("--drain-timeout", ServerConfig.drain_timeout_s, "Open streams may go on for this after SIGTERM.")
@_logs("--log-format", type=click.Choice(log.FORMATS), default="text", help="Form of the lines.")
@_logs(
    "--log-level", type=click.Choice(log.LEVELS), default="info", help="What is logged; --verbose = debug."
)
@click.option(
    "--check",
    is_flag=True,
    help="Check options, tokens and certificates (not networks), say what is remarkable, and exit.",
)
@common_options
def serve(
    listen: str,
    http_listen: str | None,
    metrics_port: int | None,
    metrics_listen: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    token_file: Path | None,
    insecure: bool,
    reflection: bool,
    bundle: Path | None,
    face_models: Path | None,
    backend: str,
    devices: tuple[int, ...],
    threads: int,
    backend_options: tuple[str, ...],
    pixels: str,
    max_batch: int,
    max_batch_wait: float | None,
    max_streams: int,
    max_portraits: int,
    max_portrait_memory: int,
    max_queue: int,
    max_message: int,
    max_pixels: int,
    max_upload: int,
    max_shared_memory: int,
    portrait_ttl: float,
    idle_timeout: float,
    drain_timeout: float,
    log_format: str,
    log_level: str,
    check: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Serve portrait animation over gRPC: many streams, one set of networks.

    Without options it listens on this machine only. Clients: lp-client, lp_edge.client, or any gRPC client made from
    proto/lp_edge/v1. Needs the extra: pip install 'lp-edge[server]'; for --http: 'lp-edge[http]'.
    """
    if metrics_port is not None and metrics_listen is not None:
        raise ConfigError(
            "--metrics-port together with --metrics-listen", "expected one of them", "leave one out"
        )
    config = ServerConfig(
        listen=listen,
        http_listen=http_listen,
        metrics_listen=metrics_listen if metrics_port is None else f"127.0.0.1:{metrics_port}",
        bundle=bundle,
        face_models=face_models,
        backend=BackendConfig(
            backend, 0, threads, dict(name_and_value(text) for text in backend_options), pixels
        ),
        devices=devices,
        insecure=insecure,
        tls=_tls(tls_cert, tls_key, tls_client_ca),
        tokens=tokens_of_environment(),
        token_file=token_file,
        limits=Limits(
            max_streams=max_streams,
            max_portraits=max_portraits,
            max_portrait_bytes=max_portrait_memory,
            max_queue=max_queue,
            max_message_bytes=max_message,
            max_pixels=max_pixels,
            max_upload_bytes=max_upload,
            max_shared_memory_bytes=max_shared_memory,
        ),
        max_batch=max_batch,
        max_batch_wait_s=max_batch_wait,
        portrait_ttl_s=portrait_ttl,
        idle_timeout_s=idle_timeout,
        drain_timeout_s=drain_timeout,
        reflection=reflection,
    )
    # gRPC's C library writes lines of its own to standard error, one for each failed handshake of a stranger.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR" if verbose else "NONE")
    main = _main()
    if check:
        notes = main.check_config(config)
        for note in notes if not (quiet or as_json) else ():
            click.echo(f"lp-serve: note: {note}")
        if as_json:
            click.echo(json.dumps({"ok": True, "notes": notes}))
        elif not quiet:
            click.echo("lp-serve: the configuration is in order")
        return
    import asyncio

    level = "debug" if verbose else "error" if quiet else log_level
    with log.logging_to(sys.stderr, log_format, level):
        asyncio.run(main.run_server(config, ready=lambda where: _say_ready(where, as_json, quiet)))


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsConfig | None:
    if certificate is not None and key is not None:
        return TlsConfig(certificate, key, client_ca)
    given = [
        option
        for option, value in (("--tls-cert", certificate), ("--tls-key", key), ("--tls-client-ca", client_ca))
        if value is not None
    ]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} alone", "expected --tls-cert and --tls-key together", "give both"
        )
    return None


def tokens_of_environment() -> tuple[str, ...]:
    """The tokens of :data:`TOKENS_VARIABLE`; none when it is not set.

    Raises:
        ConfigError: it is set and holds no token, or one that is short: access must not be open by mistake.
    """
    text = os.environ.get(TOKENS_VARIABLE)
    if text is None:
        return ()
    tokens = tuple(token.strip() for token in text.split(",") if token.strip())
    if not tokens:
        raise ConfigError(
            f"${TOKENS_VARIABLE} is set and holds no token",
            "expected tokens separated by commas",
            "unset it, or fill it",
        )
    return tuple(check_token(token, f"${TOKENS_VARIABLE}") for token in tokens)


def _main() -> ModuleType:
    """The server's modules; BackendUnavailable when a package of the extra is missing."""
    try:
        from lp_edge.runtime.server import main
    except ImportError as error:
        if error.name is None or error.name.startswith("lp_edge"):
            raise
        raise BackendUnavailable(
            f"lp-serve needs the package of {error.name}, which is not installed",
            "expected the extra 'server'",
            "pip install 'lp-edge[server]'",
        ) from error
    return main


def _say_ready(where: Endpoints, as_json: bool, quiet: bool) -> None:
    with contextlib.suppress(OSError):  # whoever started it may have gone; that is no reason to stop
        if as_json:
            click.echo(json.dumps({"ok": True, "pid": os.getpid(), **where.as_dict()}))
        elif not quiet:
            scheme = "https" if where.tls else "http"
            more = f", HTTP on {scheme}://{where.http}" if where.http else ""
            more += f", metrics on {where.metrics}/metrics" if where.metrics else ""
            click.echo(f"lp-serve: gRPC on {where.grpc}{' (TLS)' if where.tls else ''}{more}")
