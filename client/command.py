"""The command ``lp-client``: what a server can do, from the command line.

Messages, exit codes and ``--json`` are those of :mod:`lp_edge.cli`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lp_edge.cli import (
    LIVEPORTRAIT_OPTIONS,
    MOTION_OPTIONS,
    PICTURE_OPTIONS,
    GuardedGroup,
    common_options,
    logging_to_console,
    progress_bar,
)
from lp_edge.errors import ConfigError, MediaError, NoFaceError, OutputError
from lp_edge.runtime.checks import within

if TYPE_CHECKING:
    from lp_edge.client.sources import Source
    from lp_edge.client.sync import AnimateStream, Client
    from lp_edge.client.types import Frame, Portrait, ServerInfo
    from lp_edge.client.types import Progress as CallProgress
    from lp_edge.runtime.job import Progress
    from lp_edge.runtime.options import AnimateOptions

__all__ = ["TOKEN_VARIABLE", "client"]

TOKEN_VARIABLE = "LP_EDGE_TOKEN"
"""Environment variable with the token."""

_EXIT_CODES = """\b
Exit codes:
    0  done                           9  export failed (server)
    1  unexpected error              10  a limit of the server is reached
    2  wrong option or combination   11  no such portrait
    3  input cannot be read          12  token or certificate refused
    4  no usable face                13  the server is not there
    5  bundle incomplete or altered  14  no answer in time
    6  a network failed              15  the protocol was broken
    7  backend, device, gRPC missing 130 stopped (Ctrl-C)
    8  result cannot be written
"""

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_PORTRAIT_SETTINGS = ("faces", "size", "crop-scale", "crop-vx", "crop-vy", "crop-rotate")
_ANIMATE_SETTINGS = (
    *("region", "multiplier", "relative", "smooth", "edit", "paste-back"),
    *("driving-option", "stitching", "eye-retargeting", "lip-retargeting", "normalize-lip"),
    *("lip-normalize-threshold", "keep-pose-with-retargeting"),
    *("driving-crop", "driving-crop-scale", "driving-crop-vx", "driving-crop-vy"),
)


def _settings(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of lp-run with these names."""

    def all_of_them() -> None: ...

    collect: Any = all_of_them
    for option in reversed((*MOTION_OPTIONS, *PICTURE_OPTIONS, *LIVEPORTRAIT_OPTIONS)):
        collect = option(collect)
    wanted = {name.replace("-", "_") for name in names}
    params = [p for p in collect.__click_params__ if p.name in wanted]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        vars(command).setdefault("__click_params__", []).extend(params)
        return command

    return add


def _options(settings: Mapping[str, Any]) -> AnimateOptions:
    """What lp-run's options say; takes None for those that were not given."""
    from lp_edge.runtime.job import RunConfig
    from lp_edge.runtime.settings import read_setting, with_settings

    values = {name.replace("_", "-"): value for name, value in settings.items()}
    edit = values.pop("edit", None)
    if edit is not None:
        values["edit"] = read_setting("edit", edit)
    return with_settings(RunConfig(source=""), values).options


_PATH = click.Path(path_type=Path)
_CONNECTION = (
    click.option(
        "--target",
        default="127.0.0.1:50051",
        show_default=True,
        metavar="HOST:PORT",
        help="Where lp-serve listens; also unix:/path.sock.",
    ),
    click.option(
        "--token-file",
        type=_PATH,
        metavar="FILE",
        help=f"File whose first line is the token.  [default: ${TOKEN_VARIABLE}, or none]",
    ),
    click.option("--tls", is_flag=True, help="Encrypt, and trust the usual certificate authorities."),
    click.option(
        "--tls-ca", type=_PATH, metavar="FILE", help="Encrypt, and trust this certificate authority (PEM)."
    ),
    click.option(
        "--tls-cert", type=_PATH, metavar="FILE", help="The client's own certificate (PEM), for mutual TLS."
    ),
    click.option("--tls-key", type=_PATH, metavar="FILE", help="Its key (PEM)."),
    click.option("--tls-name", metavar="NAME", help="Name in the server's certificate, if not the target's."),
    click.option("--insecure", is_flag=True, help="Send the token without encryption to another machine."),
    click.option(
        "--timeout",
        type=float,
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="Deadline of a single call.",
    ),
    click.option(
        "--reconnect",
        type=float,
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to try again while the server is not there; 0 = not at all.",
    ),
)


@dataclass(frozen=True)
class _Connection:
    """Values of the options above."""

    target: str
    token_file: Path | None
    tls: bool
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    tls_name: str | None
    insecure: bool
    timeout: float
    reconnect: float
    as_json: bool
    quiet: bool
    verbose: bool
    rest: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(values: dict[str, Any]) -> _Connection:
        names = [name for name in _Connection.__dataclass_fields__ if name != "rest"]
        return _Connection(**{name: values.pop(name) for name in names}, rest=values)

    @property
    def silent(self) -> bool:
        return self.quiet or self.as_json

    def client(self) -> Client:
        """The client that they ask for."""
        # gRPC's C library writes lines of its own to standard error; it reads this when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR" if self.verbose else "NONE")
        from lp_edge.client.sync import Client
        from lp_edge.client.types import TlsFiles

        files = (self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)
        tls = TlsFiles(*files) if self.tls or any(f is not None for f in files) else None
        return Client(
            self.target,
            token=_token(self.token_file),
            tls=tls,
            insecure=self.insecure,
            timeout_s=self.timeout,
            reconnect=self.reconnect != 0,
            reconnect_timeout_s=self.reconnect or 1.0,
        )


def _token(path: Path | None) -> str | None:
    """The token of a file or the environment; it has no business in argv, which every user of the machine can read."""
    if path is None:
        return os.environ.get(TOKEN_VARIABLE)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(
            f"{path} cannot be read ({why})", "expected a file with a token", "check path and permissions"
        ) from error
    tokens = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not tokens:
        raise ConfigError(
            f"{path} holds no token", "expected one in a line of its own", "write the server's token into it"
        )
    return tokens[0]


@contextlib.contextmanager
def _connected(connection: _Connection) -> Iterator[Client]:
    with logging_to_console(connection.silent, connection.verbose), connection.client() as client:
        yield client


class _TakesIds(click.Command):
    """A command whose arguments may be ids: one in 64 begins with a dash, and is no option for that."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        ids = [a for a in args if a.startswith("-") and _ID.fullmatch(a) and a not in options]
        before = [a for a in args if a not in ids]
        return super().parse_args(ctx, [*before, "--", *ids] if ids else args)


def _command(
    group: click.Group, name: str, *examples: str, cls: type[click.Command] = click.Command
) -> Callable[[Callable[..., Any]], click.Command]:
    """A command of a group with the options of a connection; it gets them as its first argument."""

    def make(function: Callable[..., Any]) -> click.Command:
        def run(**values: Any) -> int | None:
            connection = _Connection.of(values)
            code: int | None = function(connection, **connection.rest)
            return code

        run.__doc__ = function.__doc__
        command = common_options(run)
        for option in reversed(_CONNECTION):
            command = option(command)
        vars(command)["__click_params__"] += vars(function).get(
            "__click_params__", []
        )  # help lists the last ones first
        epilog = "\b\nExamples:\n" + "".join(f"    {e}\n" for e in examples) + "\n" + _EXIT_CODES
        return group.command(name, cls=cls, epilog=epilog)(command)

    return make


@click.group(
    cls=GuardedGroup,
    name="lp-client",
    epilog="""\b
Examples:
    lp-client info
    lp-client animate -p portrait.jpg -d driver.mp4 -o result.mp4
    lp-client animate -p portrait.jpg -d camera:0 -o - | ffplay -f mjpeg -
    lp-client render -p portrait.jpg -d talk -o result.mp4
    lp-client motion driver.mp4 -o driver.npz
    lp-client portrait register portrait.jpg

"""
    + _EXIT_CODES,
)
@click.version_option(package_name="lp-edge", message="lp-edge %(version)s")
def client() -> None:
    """Use a running lp-serve: animate portraits, extract motion, render clips."""


# -- info ---------------------------------------------------------------------------------------------------


@_command(client, "info", "lp-client info", "lp-client info --json | jq .limits")
def info(connection: _Connection) -> None:
    """Tell what the server is, what it allows and what it does at the moment."""
    with _connected(connection) as server:
        found = server.info()
    if connection.as_json:
        values = asdict(found)
        del values["motion"]["neutral"]
        click.echo(json.dumps({"ok": True, "target": connection.target, **values}))
    elif not connection.quiet:
        _print_info(connection.target, found)


def _print_info(target: str, found: ServerInfo) -> None:
    limits, load = found.limits, found.load
    click.echo(
        f"{target}: lp-edge {found.version}, up for {found.uptime:.0f} s{', draining' if load.draining else ''}"
    )
    click.echo(f"bundle: {found.family} {found.variant}, licence {found.licence}")
    for device in found.devices:
        click.echo(f"device: {device.name}, backend {device.backend}")
    click.echo(
        f"load: {load.streams} of {limits.max_streams} streams, {load.portraits} of {limits.max_portraits} portraits "
        f"({load.portrait_bytes / 1e6:.0f} MB), {load.waiting_calls} engine calls waiting"
    )
    click.echo(
        f"limits: {limits.max_pixels / 1e6:.1f} megapixels a picture, {limits.max_message_bytes >> 20} MiB a message, "
        f"{limits.max_upload_bytes >> 20} MiB a clip, {limits.max_shared_memory_bytes >> 20} MiB shared memory a stream"
    )
    click.echo(f"templates: {', '.join(found.templates)}")
    click.echo(f"edits: {', '.join(found.edits)}")


# -- portrait -----------------------------------------------------------------------------------------------


@client.group("portrait")
def portrait() -> None:
    """Register, list and delete portraits."""


def _portrait_json(p: Portrait) -> dict[str, Any]:
    return {
        "id": p.id,
        "width": p.width,
        "height": p.height,
        "faces": [{"box": list(f.box), "score": f.score} for f in p.faces],
        "memory_bytes": p.memory_bytes,
        "active_streams": p.active_streams,
        "created_at": p.created_at.isoformat(),
        "expires_at": p.expires_at.isoformat(),
    }


@_command(
    portrait,
    "register",
    "lp-client portrait register portrait.jpg",
    "lp-client portrait register couple.jpg --faces all",
)
@click.argument("file", type=_PATH)
@click.option(
    "--ttl",
    type=float,
    metavar="SECONDS",
    help="How long it is kept without being used.  [default: the server's]",
)
@_settings(*_PORTRAIT_SETTINGS)
def portrait_register(connection: _Connection, file: Path, ttl: float | None, **settings: Any) -> None:
    """Register the picture FILE and print its id."""
    options = _options(settings)
    with _connected(connection) as server:
        made = server.register(
            file, faces=options.faces, size=options.size, crop=options.crop, time_to_live=ttl
        )
    if connection.as_json:
        click.echo(json.dumps({"ok": True, **_portrait_json(made)}))
    else:
        click.echo(made.id)


@_command(portrait, "list", "lp-client portrait list")
def portrait_list(connection: _Connection) -> None:
    """List the server's portraits, the one used last first."""
    with _connected(connection) as server:
        found = server.portraits()
    if connection.as_json:
        click.echo(json.dumps({"ok": True, "portraits": [_portrait_json(p) for p in found]}))
        return
    for p in found:
        faces = "1 face" if len(p.faces) == 1 else f"{len(p.faces)} faces"
        click.echo(
            f"{p.id}  {p.width}x{p.height}  {faces}  {p.memory_bytes / 1e6:.1f} MB  "
            f"{p.active_streams} streams  until {p.expires_at:%Y-%m-%d %H:%M:%S} UTC"
        )


@_command(portrait, "delete", "lp-client portrait delete ID", cls=_TakesIds)
@click.argument("id")
def portrait_delete(connection: _Connection, id: str) -> None:
    """Let the server forget the portrait ID."""
    with _connected(connection) as server:
        server.delete(id)
    if connection.as_json:
        click.echo(json.dumps({"ok": True, "id": id}))


@contextlib.contextmanager
def _portrait(server: Client, given: str, options: AnimateOptions) -> Iterator[str | Portrait]:
    """A portrait by its id, or registered for as long as the command runs."""
    if not os.path.exists(given) and _ID.fullmatch(given):
        yield given
        return
    made = server.register(given, faces=options.faces, size=options.size, crop=options.crop)
    try:
        yield made
    finally:
        # It would go by itself in time; an error here must not hide that of the command.
        with contextlib.suppress(Exception):
            server.delete(made)


def _split(options: AnimateOptions) -> tuple[AnimateOptions, AnimateOptions]:
    """Options of the registration, and those of a stream."""
    from dataclasses import replace

    usual = type(options)()
    fixed = {name: getattr(usual.crop, name) for name in ("scale", "vx", "vy", "rotate")}
    return options, replace(options, faces=usual.faces, size=usual.size, crop=replace(options.crop, **fixed))


# -- animate ------------------------------------------------------------------------------------------------


class _Placed:
    """Puts frames into an output at their times: where one is missing, the last one stays."""

    def __init__(self, output: str, source: Source, crf: int | None) -> None:
        self._output, self._source, self._crf = output, source, crf
        self._writer: Any = None
        self._last: Any = None
        self.size = (0, 0)

    @property
    def frames(self) -> int:
        return 0 if self._writer is None else int(self._writer.frames)

    def write(self, seconds: float, rgb: Any) -> None:
        """The frame of a time; one that falls on an earlier frame's place is left out."""
        if self._writer is None:
            from lp_edge.runtime.media_write import open_writer

            self.size = (rgb.shape[1], rgb.shape[0])
            video = Path(self._output).suffix.lower() in (".mp4", ".m4v", ".mov", ".mkv", ".webm")
            audio = self._source.audio if video else None
            self._writer = open_writer(
                self._output, self.size, self._source.rate, audio_from=audio, crf=self._crf
            )
            self._last = rgb
        self._hold(round(seconds * self._source.rate))
        if round(seconds * self._source.rate) >= self.frames:
            self._writer.write(rgb)
        self._last = rgb

    def _hold(self, until: int) -> None:
        while self.frames < until:
            self._writer.write(self._last)

    def close(self) -> None:
        """Finish the output, as long as the driver is."""
        if self._writer is None:
            raise MediaError("no frame came back", "expected at least one", "use another driver")
        if self._source.expected is not None:
            self._hold(self._source.expected)
        self._writer.close()

    def abort(self) -> None:
        """Remove what was written."""
        if self._writer is not None:
            self._writer.abort()


class _Standard:
    """JPEG files, one after the other, on standard output."""

    def __init__(self) -> None:
        self.frames, self.size = 0, (0, 0)

    def put(self, frame: Frame) -> None:
        picture = frame.pictures[0]
        try:
            sys.stdout.buffer.write(picture.data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # who reads has enough
            raise
        except OSError as error:
            sys.stdout = None  # flushing at exit would raise again
            raise OutputError(
                f"standard output cannot be written ({error.strerror})",
                "expected a reader",
                "check where it goes",
            ) from error
        self.frames, self.size = self.frames + 1, (picture.width, picture.height)


@_command(
    client,
    "animate",
    "lp-client animate -p portrait.jpg -d driver.mp4 -o result.mp4",
    "lp-client animate -p portrait.jpg -d driver.mp4 --live --json | jq .round_trip_ms",
    "lp-client animate -p portrait.jpg -d talk -o result.mp4    (motion alone is sent)",
    "lp-client animate -p portrait.jpg -d camera:0 -o - | ffplay -f mjpeg -",
    "lp-client animate -p ID -d camera:0 -o result.mp4          (Ctrl-C ends it)",
)
@click.option(
    "-p",
    "--portrait",
    "given",
    required=True,
    metavar="FILE|ID",
    help="Picture, or the id of a registered portrait.",
)
@click.option(
    "-d",
    "--driving",
    required=True,
    metavar="FILE|NAME|camera:N",
    help="Clip, picture, motion template, built-in template, or a camera.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR|-",
    help="As for lp-run; - writes JPEG files to standard output.  [default: PORTRAIT--DRIVING.mp4 in this folder]",
)
@click.option(
    "--live/--lossless",
    default=None,
    help="Newest frame wins, at the driver's own pace; or every frame, as fast as it goes.  [default: live for cameras]",
)
@click.option(
    "--shared-memory",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Whether pictures travel through shared memory.",
)
@click.option(
    "--send-as",
    type=click.Choice(["jpeg", "png", "webp", "raw"]),
    default="jpeg",
    show_default=True,
    help="How driving frames travel without it.",
)
@click.option("--frames", type=click.IntRange(min=1), help="Stop after so many driving frames.")
@click.option("--fps", type=float, default=25.0, show_default=True, help="Rate that is asked of a camera.")
@click.option("--crf", type=int, help="Quality of H.264 and VP9, 0 (best) to 51.  [default: 18, 30]")
@_settings(*_ANIMATE_SETTINGS, *_PORTRAIT_SETTINGS)
def animate(
    connection: _Connection,
    given: str,
    driving: str,
    output: str | None,
    live: bool | None,
    shared_memory: str,
    send_as: str,
    frames: int | None,
    fps: float,
    crf: int | None,
    **settings: Any,
) -> None:
    """Let a portrait follow a driver, frame by frame through a stream."""
    from itertools import islice

    from lp_edge.client.sources import open_source
    from lp_edge.client.types import Output

    if output == "-" and connection.as_json:
        raise click.UsageError("--json together with -o -: both are standard output")
    registered, options = _split(_options(settings))
    within("fps", fps, 0.1, 1000)
    if crf is not None:
        within("crf", crf, 0, 51)
    camera = driving.startswith("camera:")
    live = camera if live is None else live
    stdout = output == "-"
    place = output or f"{Path(given).stem}--{Path(driving).stem.replace(':', '-')}.mp4"
    if not stdout:
        from lp_edge.runtime.media_write import check_output

        check_output(place)
    with _connected(connection) as server:
        family = server.info().family
        source = open_source(
            driving, family=family, fps=Fraction(fps).limit_denominator(1000), paced=live and not camera
        )
        if frames is not None:
            begin = source.frames
            expected = frames if source.expected is None else min(frames, source.expected)
            source = _with(source, frames=lambda: islice(begin(), frames), expected=expected)
        with (
            _portrait(server, given, registered) as target,
            server.animate(
                target,
                options=options,
                mode="live" if live else "lossless",
                output=Output("jpeg") if stdout else None,
                shared_memory={"auto": "auto", "on": True, "off": False}[shared_memory],  # type: ignore[arg-type]
                driving_size=source.size,
                send_as=send_as,
            ) as stream,
            progress_bar(connection.silent, "lp-client") as progress,
        ):
            sink: _Placed | _Standard = _Standard() if stdout else _Placed(place, source, crf)
            result = _drive(stream, source, sink, progress)
    result = {"output": place, "mode": "live" if live else "lossless", **result}
    if connection.as_json:
        click.echo(json.dumps({"ok": True, **result}))
    elif not connection.quiet:
        _print_animated(result, stdout)


def _with(source: Source, **changes: Any) -> Source:
    from dataclasses import replace

    return replace(source, **changes)


def _drive(
    stream: AnimateStream,
    source: Source,
    sink: _Placed | _Standard,
    progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    """Send all, write all; what came of it."""
    from lp_edge.runtime.job import Progress

    states: Counter[str] = Counter()
    trips: list[float] = []
    stages: dict[str, list[float]] = {}
    start = time.perf_counter()
    try:
        try:
            for frame in stream.drive(source.frames()):
                if isinstance(sink, _Placed):
                    sink.write(frame.timestamp, frame.rgb)
                else:
                    sink.put(frame)
                states[frame.face_state] += 1
                if frame.round_trip is not None:
                    trips.append(frame.round_trip)
                for stage in frame.timings.stages:
                    stages.setdefault(stage.name, []).append(stage.duration)
                if progress is not None:
                    progress(Progress(states.total(), source.expected, time.perf_counter() - start))
        except KeyboardInterrupt:
            if not (source.camera and states):  # Ctrl-C is how a camera ends
                raise
        if set(states) == {"none"} and not source.camera:
            raise NoFaceError(
                f"no face in any of the {states.total()} frames of {source.name}",
                "expected a driver that shows one",
                "use another driver, or crop it around the face",
            )
        if isinstance(sink, _Placed):
            sink.close()
    except BaseException:
        if isinstance(sink, _Placed):
            sink.abort()
        raise
    seconds = time.perf_counter() - start
    return {
        "frames": sink.frames,
        "answers": states.total(),
        "dropped": stream.dropped,
        "width": sink.size[0],
        "height": sink.size[1],
        "frame_rate": [source.rate.numerator, source.rate.denominator],
        "seconds": round(seconds, 3),
        "fps": round(states.total() / seconds, 2),
        "transport": stream.transport,
        "transport_reason": stream.transport_reason,
        "reconnects": stream.reconnects,
        "faces": dict(states),
        "round_trip_ms": _times(trips),
        "stages_ms": {name: _times(times) for name, times in stages.items()},
    }


def _times(seconds: list[float]) -> dict[str, float]:
    from lp_edge.runtime.job import percentiles

    return asdict(percentiles(seconds)) if seconds else {}


def _print_animated(result: Mapping[str, Any], to_stderr: bool) -> None:
    why = f" ({result['transport_reason']})" if result["transport_reason"] else ""
    dropped = f", {result['dropped']} dropped" if result["dropped"] else ""
    trip = f", round trip {result['round_trip_ms']['p50']:.0f} ms" if result["round_trip_ms"] else ""
    click.echo(
        f"{result['output']}: {result['frames']} frames, {result['width']}x{result['height']}, {result['answers']} answers"
        f"{dropped} in {result['seconds']:.1f} s ({result['fps']:.1f} frames/s{trip}, {result['mode']}, {result['transport']}{why})",
        err=to_stderr,
    )


# -- long calls ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _call_progress(silent: bool) -> Iterator[Callable[[CallProgress], None] | None]:
    """The progress of a call of the server, shown as that of a run."""
    from lp_edge.runtime.job import Progress

    with progress_bar(silent, "lp-client") as show:
        start = time.perf_counter()

        def tell(now: CallProgress) -> None:
            if show is not None:
                show(Progress(now.frames, now.expected, time.perf_counter() - start))

        yield None if show is None else tell


@_command(
    client,
    "motion",
    "lp-client motion driver.mp4 -o driver.npz",
    "lp-client motion driver.mp4 -o - | jq .pitch",
)
@click.argument("clip", type=_PATH)
@click.option(
    "-o", "--output", required=True, metavar="FILE.npz|-", help="Template; - prints one JSON object a frame."
)
@_settings("smooth", "neutral", "driving-crop", "driving-crop-scale", "driving-crop-vx", "driving-crop-vy")
def motion(connection: _Connection, clip: Path, output: str, **settings: Any) -> None:
    """Read the motion of the face in CLIP."""
    if output == "-" and connection.as_json:
        raise click.UsageError("--json together with -o -: both are standard output")
    options = _options(settings)
    with _connected(connection) as server:
        if output == "-":
            for found in server.extract_motion(clip, options=options):
                click.echo(json.dumps(_motion_json(found)))
            return
        with _call_progress(connection.silent) as progress:
            path = server.extract_template(
                clip, output, options=options, neutral=options.neutral, progress=progress
            )
    if connection.as_json:
        click.echo(json.dumps({"ok": True, "output": str(path)}))
    elif not connection.quiet:
        click.echo(f"{path}: motion of {clip.name}")


def _motion_json(found: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "sequence": found.sequence,
        "seconds": found.timestamp,
        "face_state": found.face_state,
    }
    if found.motion is not None:
        pitch, yaw, roll = (round(float(angle), 4) for angle in found.motion.angles)
        values.update(pitch=pitch, yaw=yaw, roll=roll)
        values["translation"] = [round(float(v), 4) for v in found.motion.translation]
        values["scale"] = round(float(found.motion.scale), 4)
        values["eye_ratio"] = [round(float(v), 4) for v in found.motion.eye_ratio]
        values["lip_ratio"] = round(float(found.motion.lip_ratio), 4)
    return values


@_command(
    client,
    "render",
    "lp-client render -p portrait.jpg -d talk -o result.mp4",
    "lp-client render -p ID -d driver.mp4 -o result.mp4 --multiplier 1.2",
)
@click.option(
    "-p",
    "--portrait",
    "given",
    required=True,
    metavar="FILE|ID",
    help="Picture, or the id of a registered portrait.",
)
@click.option(
    "-d",
    "--driving",
    required=True,
    metavar="FILE|NAME",
    help="Clip, picture, motion template, or a template of the server.",
)
@click.option(
    "-o", "--output", metavar="FILE.mp4", help="Result.  [default: PORTRAIT--DRIVING.mp4 in this folder]"
)
@click.option("--crf", type=int, default=23, show_default=True, help="Quality of H.264, 1 (best) to 51.")
@_settings(*_ANIMATE_SETTINGS, *_PORTRAIT_SETTINGS, "neutral")
def render(
    connection: _Connection, given: str, driving: str, output: str | None, crf: int, **settings: Any
) -> None:
    """Let the server animate a portrait with a whole clip or template into one MP4 (with the clip's sound)."""
    registered, options = _split(_options(settings))
    place = Path(output or f"{Path(given).stem}--{Path(driving).stem}.mp4")
    start = time.perf_counter()
    with (
        _connected(connection) as server,
        _portrait(server, given, registered) as target,
        _call_progress(connection.silent) as progress,
    ):
        clip = server.render(target, driving, place, options=options, crf=crf, progress=progress)
    seconds = time.perf_counter() - start
    if connection.as_json:
        rate = [clip.frame_rate.numerator, clip.frame_rate.denominator]
        values = {"frames": clip.frames, "width": clip.width, "height": clip.height, "frame_rate": rate}
        result = {
            "ok": True,
            "output": str(place),
            **values,
            "seconds": round(seconds, 3),
            "warnings": clip.warnings,
        }
        click.echo(json.dumps(result))
        return
    for warning in clip.warnings:
        click.echo(f"lp-client: note: {warning}", err=True)
    if not connection.quiet:
        click.echo(f"{place}: {clip.frames} frames, {clip.width}x{clip.height}, made in {seconds:.1f} s")
