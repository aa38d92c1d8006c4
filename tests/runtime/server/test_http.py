"""The HTTP front on the core with the toy networks: through ASGI, and over TCP where the connection matters."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from fractions import Fraction
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("prometheus_client")
pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import NotFoundError
from lp_edge.runtime.cast import Cast, Shot
from lp_edge.runtime.image import encode_image
from lp_edge.runtime.media_read import VideoReader, probe
from lp_edge.runtime.media_write import open_writer
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.server import http
from lp_edge.runtime.server.config import Limits, ServerConfig
from lp_edge.runtime.server.core import Core
from lp_edge.runtime.server.metrics import Metrics
from lp_edge.runtime.settings import SETTINGS
from lp_edge.runtime.templates import save_template

TOKEN = "a-token-of-some-length"
NDJSON = {"accept": "application/x-ndjson"}


def frame(x: int | None = 100) -> np.ndarray:
    out = np.zeros((200, 240, 3), np.uint8)
    if x is not None:
        out[60:140, x - 40 : x + 40] = 255
    return out


def png(x: int | None = 100) -> bytes:
    return encode_image(frame(x), ".png")


def clip(path: Path, xs: list[int | None], fps: Fraction = Fraction(25)) -> bytes:
    with open_writer(path, (240, 200), fps) as writer:
        for x in xs:
            writer.write(frame(x))
    return path.read_bytes()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files; empty again after every test."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    assert list(path.iterdir()) == []


@pytest.fixture
def make_core(toy_bundle: Path) -> Iterator[Callable[..., Core]]:
    cores = []

    def make(*, opened: bool = True, tokens: tuple[str, ...] = (), idle: float = 20.0, **limits: int) -> Core:
        config = ServerConfig(
            bundle=toy_bundle,
            backend=BackendConfig("cpu", threads=1),
            limits=Limits(**limits),
            tokens=tokens,
            idle_timeout_s=idle,
        )
        core = Core(config, Metrics())
        cores.append(core)
        if opened:
            core.open()
        return core

    yield make
    for core in cores:
        assert not core.streams
        core.close()


@pytest.fixture
def core(make_core: Callable[..., Core]) -> Core:
    return make_core()


def ask(core: Core, work: Callable[[Any], Awaitable[Any]], **headers: str) -> Any:
    """What ``work`` gives for a client of the application."""

    async def run() -> Any:
        transport = httpx.ASGITransport(http.create_app(core, core.config))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return await work(client)

    return asyncio.run(run())


def animate(core: Core, fields: dict[str, str] | None = None, **parts: Any) -> Any:
    headers = parts.pop("headers", {})
    files = {name: (name, content) for name, content in parts.items()}
    return ask(core, lambda c: c.post("/v1/animate", data=fields or {}, files=files, headers=headers))


def error_of(response: Any) -> dict[str, str]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "got", "expected", "remedy"}
    return dict(body["error"])


def saved(response: Any, tmp_path: Path) -> Path:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "video/mp4"
    assert int(response.headers["content-length"]) == len(response.content)
    path = tmp_path / "r.mp4"
    path.write_bytes(response.content)
    return path


# -- animating -------------------------------------------------------------------------------------------------


def test_a_picture_and_a_clip_become_an_mp4(core: Core, tmp_path: Path) -> None:
    rate = Fraction(30000, 1001)
    driving = clip(tmp_path / "d.mp4", [100 + i for i in range(20)], rate)
    path = saved(animate(core, picture=png(), driving=driving), tmp_path)
    info = probe(path)
    assert (info.width, info.height, info.fps, info.frames) == (240, 200, rate, 20)
    with VideoReader(path) as reader:
        got = [f.rgb for f in reader]
    animation = core.devices[0].animator.animate(frame(), tmp_path / "d.mp4", AnimateOptions())
    expected = [f.rgb for f in animation]
    off = np.abs(np.stack(got).astype(int) - np.stack(expected)).mean(axis=(1, 2, 3))
    assert off.max() < 4, "but for H.264 the frames are those of the Python interface"
    assert np.abs(expected[-1].astype(int) - expected[0]).max() > 8
    assert not core.streams


def test_a_built_in_template_drives(core: Core, tmp_path: Path) -> None:
    path = saved(animate(core, {"template": "blink", "width": "120", "crf": "30"}, picture=png()), tmp_path)
    info = probe(path)
    assert (info.width, info.height, info.frames) == (120, 100, 70)


def test_an_uploaded_template_drives(core: Core, tmp_path: Path) -> None:
    from lp_edge.runtime.gestures import builtin_template

    template = builtin_template("nod", canonical=core.devices[0].animator.canonical)
    save_template(template, tmp_path / "t.npz")
    path = saved(animate(core, picture=png(), driving=(tmp_path / "t.npz").read_bytes()), tmp_path)
    assert probe(path).frames == 75


def test_a_picture_drives_one_frame(core: Core, tmp_path: Path) -> None:
    path = saved(animate(core, picture=png(), driving=png(120)), tmp_path)
    with VideoReader(path) as reader:
        assert sum(1 for _ in reader) == 1


def test_options_have_their_long_names(core: Core, tmp_path: Path) -> None:
    def middle(**fields: str) -> float:
        path = saved(animate(core, fields, picture=png(), driving=png(100)), tmp_path)
        with VideoReader(path) as reader:
            return float(next(reader).rgb[70, 50].mean())

    assert middle() == pytest.approx(middle(multiplier="0.5"), abs=2)
    assert middle(edit="smile=1.0,yaw=10") != pytest.approx(middle(), abs=2)


def test_every_option_of_lp_run_is_there_or_left_out_on_purpose() -> None:
    assert set(http.OPTIONS) - {"width", "height"} < set(SETTINGS)
    assert set(SETTINGS) - set(http.OPTIONS) == set(http._ABSENT)


def test_progress_comes_as_lines_and_the_result_once(core: Core, tmp_path: Path) -> None:
    driving = clip(tmp_path / "d.mp4", [100 + i for i in range(20)])

    async def work(client: Any) -> None:
        files = {"picture": ("p", png()), "driving": ("d", driving)}
        response = await client.post("/v1/animate", files=files, headers=NDJSON)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in response.text.splitlines()]
        told = [line["progress"]["frames_done"] for line in lines[:-1]]
        assert told[0] == 1 and told[-1] == 20 and told == sorted(told)
        assert lines[-2]["progress"]["frames_total"] == 20
        result = lines[-1]["result"]
        assert (result["frames"], result["frame_rate"]) == (20, 25.0)
        assert (result["width"], result["height"]) == (240, 200)
        fetched = await client.get(result["url"])
        assert len(fetched.content) == result["bytes"]
        assert probe(saved(fetched, tmp_path)).frames == 20
        again = await client.get(result["url"])
        assert again.status_code == 404
        assert error_of(again)["type"] == "NotFoundError"

    ask(core, work)


def test_an_error_before_the_first_frame_has_its_status_and_a_later_one_a_line(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = animate(core, picture=png(None), driving=png(), headers=NDJSON)
    assert (refused.status_code, error_of(refused)["type"]) == (422, "NoFaceError")
    begin = Cast.begin

    def breaking(self: Cast, shots: Sequence[Shot], *args: Any) -> Any:
        if shots[0].index == 5:
            raise RuntimeError("secret of the server")
        return begin(self, shots, *args)

    monkeypatch.setattr(Cast, "begin", breaking)
    response = animate(core, {"template": "nod"}, picture=png(), headers=NDJSON)
    assert response.status_code == 200
    error = json.loads(response.text.splitlines()[-1])["error"]
    assert error["type"] == "LpEdgeError" and "internal error" in error["got"]
    assert "secret" not in response.text
    response = animate(core, {"template": "nod"}, picture=png())
    assert (response.status_code, error_of(response)["type"]) == (500, "LpEdgeError")
    assert "secret" not in response.text


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "parts", "status", "kind", "match"),
    [
        ({}, {"picture": png()}, 400, "ProtocolError", "either driving or template"),
        ({"template": "nod"}, {"driving": png()}, 400, "ProtocolError", "expected picture"),
        ({"template": "nod"}, {"picture": png(), "driving": png()}, 400, "ProtocolError", "either"),
        ({"template": "/etc/passwd"}, {"picture": png()}, 400, "ConfigError", "no built-in template"),
        ({"template": "nod"}, {"picture": b"no picture"}, 400, "MediaError", "expected a JPEG"),
        ({"template": "nod"}, {"picture": b""}, 400, "MediaError", "0 bytes"),
        ({}, {"picture": png(), "driving": b""}, 400, "MediaError", "0 bytes"),
        ({}, {"picture": png(), "driving": b"neither"}, 400, "MediaError", "neither a picture"),
        (
            {},
            {"picture": png(), "driving": b"PK\3\4" + bytes(99)},
            400,
            "MediaError",
            "the upload is damaged",
        ),
        ({"template": "nod"}, {"picture": png(None)}, 422, "NoFaceError", "no face"),
        ({}, {"picture": png(), "driving": png(None)}, 422, "NoFaceError", "no face"),
        ({"template": "nod", "edit-file": "/etc/passwd"}, {"picture": png()}, 400, "ConfigError", "no paths"),
        (
            {"template": "nod", "output": "/tmp/x"},
            {"picture": png()},
            400,
            "ConfigError",
            "no field is called",
        ),
        ({"template": "nod", "multiplier": "4"}, {"picture": png()}, 400, "ConfigError", "multiplier"),
        ({"template": "nod", "multiplier": "nan"}, {"picture": png()}, 400, "ConfigError", "multiplier"),
        ({"template": "nod", "relative": "maybe"}, {"picture": png()}, 400, "ConfigError", "yes or no"),
        ({"template": "nod", "edit": "smile=9"}, {"picture": png()}, 400, "ConfigError", "smile"),
        ({"template": "nod", "audio": "source"}, {"picture": png()}, 400, "ConfigError", "audio"),
        ({"template": "nod", "width": "-5"}, {"picture": png()}, 400, "ConfigError", "width"),
        ({"template": "nod", "width": "9000"}, {"picture": png()}, 400, "ConfigError", "width"),
        ({"template": "nod", "crf": "60"}, {"picture": png()}, 400, "ConfigError", "crf"),
        ({"template": "nod", "stitching": "no"}, {"picture": png()}, 400, "ConfigError", "stitching"),
        ({"template": "nod", "edit": "x" * 70_000}, {"picture": png()}, 413, "LimitError", "fields of more"),
    ],
)
def test_wrong_forms_are_told(
    core: Core, folder: Path, fields: Any, parts: Any, status: int, kind: str, match: str
) -> None:
    response = animate(core, fields, **parts)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (status, kind)
    text = " ".join(error.values())
    assert match in text
    assert str(folder) not in text


BODY = (
    b'--B\r\ncontent-disposition: form-data; name="picture"; filename="p"\r\ncontent-type: image/png\r\n\r\n'
    + png()
    + b'\r\n--B\r\ncontent-disposition: form-data; name="driving"; filename="d"\r\n\r\n'
    + png(120)
    + b'\r\n--B\r\ncontent-disposition: form-data; name="multiplier"\r\n\r\n1.5\r\n--B--\r\n'
)
FORM = {"content-type": "multipart/form-data; boundary=B"}


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (BODY, "application/json"),
        (BODY, "multipart/form-data"),
        (BODY, "multipart/form-data; boundary=" + "B" * 71),
        (BODY, "multipart/form-data; boundary=other"),
        (BODY[:-10], FORM["content-type"]),
        (BODY[:200], FORM["content-type"]),
        (b"", FORM["content-type"]),
        (b"\xff" * 1000, FORM["content-type"]),
        (BODY.replace(b'name="driving"', b'name="picture"'), FORM["content-type"]),
        (BODY.replace(b"form-data; name", b"form-data; nam"), FORM["content-type"]),
        (BODY.replace(b'name="driving"', b"x" * 5000), FORM["content-type"]),
        (BODY.replace(b"content-type", b"x" * 5000), FORM["content-type"]),
    ],
)
def test_bodies_that_are_no_form_are_refused(core: Core, body: bytes, content_type: str) -> None:
    headers = {"content-type": content_type}
    response = ask(core, lambda c: c.post("/v1/animate", content=body, headers=headers))
    assert response.status_code == 400
    error_of(response)


def test_the_form_may_come_in_pieces_of_any_size(core: Core, tmp_path: Path) -> None:
    async def pieces(size: int) -> AsyncIterator[bytes]:
        for i in range(0, len(BODY), size):
            yield BODY[i : i + size]

    for size in (7, 64, 4096):
        response = ask(core, lambda c, n=size: c.post("/v1/animate", content=pieces(n), headers=FORM))
        saved(response, tmp_path)


def test_mutated_forms_never_break_the_server(core: Core) -> None:
    rng = np.random.default_rng(7)
    bodies = []
    for _ in range(120):
        body = bytearray(BODY)
        for _ in range(int(rng.integers(1, 6))):
            at, kind = int(rng.integers(len(body))), int(rng.integers(4))
            if kind == 0:
                body[at] = int(rng.integers(256))
            elif kind == 1:
                del body[at : at + int(rng.integers(1, 40))]
            elif kind == 2:
                body[at:at] = bytes(rng.integers(0, 256, 10, np.uint8))
            else:
                body[at:at] = BODY[:90]
        bodies.append(bytes(body))

    async def work(client: Any) -> list[int]:
        return [(await client.post("/v1/animate", content=b, headers=FORM)).status_code for b in bodies]

    statuses = ask(core, work)
    assert set(statuses) <= {200, 400, 413, 422}
    assert 400 in statuses


def test_uploads_are_bounded(make_core: Callable[..., Core]) -> None:
    core = make_core(max_upload_bytes=4096, max_message_bytes=1 << 16)
    response = animate(core, picture=png(), driving=bytes(5000))
    assert (response.status_code, error_of(response)["expected"]) == (
        413,
        "expected at most max_upload_bytes",
    )
    response = animate(core, picture=bytes(70_000), driving=png())
    assert (response.status_code, error_of(response)["expected"]) == (
        413,
        "expected at most max_message_bytes",
    )


def test_a_body_that_is_too_large_is_refused_before_it_is_read(make_core: Callable[..., Core]) -> None:
    core = make_core(max_upload_bytes=4096, max_message_bytes=1 << 16)
    read = []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield b"x"

    async def work(client: Any) -> Any:
        headers = {**FORM, "content-length": str(1 << 30)}
        return await client.post("/v1/animate", content=body(), headers=headers)

    response = ask(core, work)
    assert (response.status_code, error_of(response)["type"], read) == (413, "LimitError", [])


def test_a_body_without_a_length_is_bounded_too(make_core: Callable[..., Core]) -> None:
    core = make_core(max_upload_bytes=4096, max_message_bytes=1 << 16)
    read = []

    async def body() -> AsyncIterator[bytes]:
        while True:
            read.append(1)
            yield b"\r\n" * 32768  # before the first boundary

    response = ask(core, lambda c: c.post("/v1/animate", content=body(), headers=FORM))
    assert response.status_code in (400, 413)
    assert len(read) < 40


def test_admission_is_that_of_grpc(make_core: Callable[..., Core]) -> None:
    core = make_core(max_streams=1)

    async def work(client: Any) -> Any:
        with core.open_stream("animate", "another"):
            files = {"picture": ("p", png()), "driving": ("d", png())}
            return await client.post("/v1/animate", files=files)

    response = ask(core, work)
    assert (response.status_code, error_of(response)["type"]) == (429, "LimitError")
    assert int(response.headers["retry-after"]) >= 1


def test_pictures_are_bounded_in_pixels(make_core: Callable[..., Core]) -> None:
    core = make_core(max_pixels=4096)
    response = animate(core, {"template": "nod"}, picture=png())
    assert (response.status_code, error_of(response)["type"]) == (413, "LimitError")


def test_nothing_else_is_answered(core: Core) -> None:
    response = ask(core, lambda c: c.get("/etc/passwd"))
    assert (response.status_code, error_of(response)["type"]) == (404, "NotFoundError")
    response = ask(core, lambda c: c.get("/v1/animate"))
    assert response.status_code == 405
    error_of(response)
    response = animate(core, {"template": "nod"}, picture=png(), headers={"accept": "text/html"})
    assert (response.status_code, error_of(response)["type"]) == (400, "ConfigError")
    for path in ("/docs", "/redoc"):
        assert ask(core, lambda c, p=path: c.get(p)).status_code == 404


# -- tokens, health, metrics, OpenAPI --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/v1/results/x", "/nothing", "/healthz/"])
def test_a_token_is_asked_for(make_core: Callable[..., Core], path: str) -> None:
    core = make_core(opened=False, tokens=(TOKEN,))
    for headers in ({}, {"authorization": "Bearer wrong-token-wrong"}, {"authorization": TOKEN}):
        response = ask(core, lambda c: c.get(path), **headers)
        assert (response.status_code, error_of(response)["type"]) == (401, "AccessError")
        assert response.headers["www-authenticate"] == "Bearer"
    assert ask(core, lambda c: c.get(path), authorization=f"Bearer {TOKEN}").status_code in (200, 307, 404)
    assert b'lp_edge_refused_total{reason="token"} 3.0' in core.metrics.render()[0]


def test_two_tokens_are_no_token(make_core: Callable[..., Core]) -> None:
    core = make_core(opened=False, tokens=(TOKEN,))
    headers = [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer other")]
    assert ask(core, lambda c: c.get("/metrics", headers=headers)).status_code == 401


def test_animating_needs_the_token(make_core: Callable[..., Core]) -> None:
    core = make_core(tokens=(TOKEN,))
    assert animate(core, picture=png(), driving=png()).status_code == 401
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert animate(core, picture=png(), driving=png(), headers=headers).status_code == 200


def test_health_follows_the_core(make_core: Callable[..., Core]) -> None:
    core = make_core(opened=False, tokens=(TOKEN,))
    loading = ask(core, lambda c: c.get("/healthz"))
    assert (loading.status_code, error_of(loading)["type"]) == (503, "ServerUnavailable")
    assert int(loading.headers["retry-after"]) >= 1
    core.open()
    serving = ask(core, lambda c: c.get("/healthz"))
    assert (serving.status_code, serving.json()) == (200, {"status": "serving"})
    core.drain(5.0)
    assert ask(core, lambda c: c.get("/healthz")).status_code == 503
    headers = {"authorization": f"Bearer {TOKEN}"}
    refused = animate(core, picture=png(), driving=png(), headers=headers)
    assert (refused.status_code, error_of(refused)["type"]) == (503, "ServerUnavailable")


def test_metrics_are_those_of_the_core(core: Core) -> None:
    animate(core, picture=png(), driving=png())
    response = ask(core, lambda c: c.get("/metrics"))
    assert response.status_code == 200
    assert response.headers["content-type"] == core.metrics.render()[1]
    assert "lp_edge_frames_total" in response.text


@pytest.mark.parametrize("tokens", [(), (TOKEN,)])
def test_the_interface_describes_itself(make_core: Callable[..., Core], tokens: tuple[str, ...]) -> None:
    core = make_core(opened=False, tokens=tokens)
    headers = {"authorization": f"Bearer {TOKEN}"} if tokens else {}
    document = ask(core, lambda c: c.get("/openapi.json"), **headers).json()
    assert set(document["paths"]) == {"/v1/animate", "/v1/results/{id}", "/healthz", "/metrics"}
    post = document["paths"]["/v1/animate"]["post"]
    form = post["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"picture", "driving", "template", *http.OPTIONS}
    assert form["properties"]["multiplier"]["type"] == "number"
    assert form["properties"]["region"]["enum"][0] == "all"
    assert set(post["responses"]["200"]["content"]) == {"video/mp4", "application/x-ndjson"}
    for status in ("400", "401", "413", "422", "429", "503", "504"):
        schema = post["responses"][status]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith("/ErrorBody")
    assert document["components"]["schemas"]["ErrorDetail"]["required"] == [
        "type",
        "got",
        "expected",
        "remedy",
    ]
    assert bool(post.get("security")) == bool(tokens)


def test_every_status_of_an_error_has_one_of_http() -> None:
    from lp_edge import errors

    statuses = {vars(errors)[name].grpc_status for name in errors.__all__}
    assert statuses == set(http.HTTP_STATUS)


@pytest.mark.parametrize("accept", ["video/mp4", "application/x-ndjson"])
def test_a_drain_ends_what_does_not_finish(core: Core, tmp_path: Path, accept: str) -> None:
    driving = clip(tmp_path / "d.mp4", [100 + i % 20 for i in range(400)])

    async def work(client: Any) -> Any:
        files = {"picture": ("p", png()), "driving": ("d", driving)}
        posting = asyncio.ensure_future(client.post("/v1/animate", files=files, headers={"accept": accept}))
        await until(lambda: any(s.log.frames > 2 for s in core.streams.values()))
        core.drain(0.05)
        assert not await core.drained()
        return await posting

    response = ask(core, work)
    if accept == "video/mp4":
        assert (response.status_code, error_of(response)["type"]) == (503, "ServerUnavailable")
    else:
        assert json.loads(response.text.splitlines()[-1])["error"]["type"] == "ServerUnavailable"


# -- results ---------------------------------------------------------------------------------------------------


def result_file(path: Path, size: int) -> http._File:
    path.write_bytes(bytes(size))
    file = http._File(FileIO(path), size)
    path.unlink()
    return file


def test_results_are_bounded_and_expire(tmp_path: Path) -> None:
    async def run() -> None:
        results = http._Results(2, 1000, seconds=0.05)
        files = [result_file(tmp_path / str(i), 400) for i in range(4)]
        ids = [results.add(file) for file in files[:3]]
        assert len(set(ids)) == 3 and all(len(id) == 22 for id in ids)
        assert [f.io.closed for f in files] == [True, False, False, False]
        with pytest.raises(NotFoundError):
            results.take(ids[0])
        assert results.take(ids[1]) is files[1]
        large = result_file(tmp_path / "large", 900)
        results.add(large)
        assert files[2].io.closed, "both are more than 1000 bytes"
        await asyncio.sleep(0.1)
        assert large.io.closed and not files[1].io.closed
        results.add(files[3])
        del results
        files[1].io.close()
        await asyncio.sleep(0.1)
        assert files[3].io.closed

    asyncio.run(run())


# -- real connections ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def served(core: Core) -> AsyncIterator[tuple[str, int]]:
    """The application behind a real server on a free port of this machine."""
    config = uvicorn.Config(
        http.create_app(core, core.config), log_config=None, lifespan="off", ws="none", timeout_keep_alive=1
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.ensure_future(server.serve(sockets=[listening]))
        try:
            while not server.started:
                assert not task.done()
                await asyncio.sleep(0.01)
            yield listening.getsockname()
        finally:
            server.should_exit = True
            await asyncio.wait_for(task, 20)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end
        await asyncio.sleep(0.01)


def test_over_tcp(core: Core, tmp_path: Path) -> None:
    driving = clip(tmp_path / "d.mp4", [100 + i for i in range(10)])

    async def run() -> None:
        async with (
            served(core) as (host, port),
            httpx.AsyncClient(base_url=f"http://{host}:{port}") as client,
        ):
            assert (await client.get("/healthz")).json() == {"status": "serving"}
            files = {"picture": ("p", png()), "driving": ("d", driving)}
            assert probe(saved(await client.post("/v1/animate", files=files), tmp_path)).frames == 10
            lines = []
            async with client.stream("POST", "/v1/animate", files=files, headers=NDJSON) as response:
                async for line in response.aiter_lines():
                    lines.append(json.loads(line))
            fetched = await client.get(lines[-1]["result"]["url"])
            assert probe(saved(fetched, tmp_path)).frames == 10
            files["driving"] = ("d", b"nothing that drives")
            assert (await client.post("/v1/animate", files=files)).status_code == 400

    asyncio.run(run())


@pytest.mark.parametrize("accept", ["video/mp4", "application/x-ndjson"])
def test_a_client_that_goes_away_ends_its_work(
    core: Core, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, accept: str
) -> None:
    driving = clip(tmp_path / "d.mp4", [100 + i % 20 for i in range(300)])
    drawn: list[int] = []
    begin = Cast.begin

    def counting(self: Cast, shots: Sequence[Shot], *args: Any) -> Any:
        drawn.extend(shot.index for shot in shots)
        return begin(self, shots, *args)

    monkeypatch.setattr(Cast, "begin", counting)

    async def run() -> None:
        async with served(core) as (host, port):
            async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
                files = {"picture": ("p", png()), "driving": ("d", driving)}
                posting = asyncio.ensure_future(
                    client.post("/v1/animate", files=files, headers={"accept": accept})
                )
                await until(lambda: len(drawn) >= 3)
                posting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await posting
            await until(lambda: not core.streams)
            count = len(drawn)
            assert count < 290
            await asyncio.sleep(0.1)
            assert len(drawn) == count
            assert list(folder.iterdir()) == []

    asyncio.run(run())


async def _raw(host: str, port: int, sent: bytes, end: bool) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(sent)
    await writer.drain()
    try:
        if end:
            return b""
        return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
    finally:
        writer.close()
        await writer.wait_closed()


def test_an_upload_that_breaks_off_leaves_nothing(core: Core, folder: Path) -> None:
    head = b"POST /v1/animate HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=B\r\n"

    async def run() -> None:
        async with served(core) as (host, port):
            body = head + b"content-length: %d\r\n\r\n" % len(BODY) + BODY[:300]
            await _raw(host, port, body, end=True)
            await until(lambda: not core.streams and not list(folder.iterdir()))

    asyncio.run(run())


def test_a_silent_client_is_ended(make_core: Callable[..., Core], folder: Path) -> None:
    core = make_core(idle=1.0)
    head = b"POST /v1/animate HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=B\r\n"

    async def run() -> bytes:
        async with served(core) as (host, port):
            body = head + b"content-length: %d\r\n\r\n" % len(BODY) + BODY[:300]
            return await _raw(host, port, body, end=False)

    assert asyncio.run(run()).startswith(b"HTTP/1.1 504")


def test_a_client_that_takes_nothing_is_left() -> None:
    ended = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 20)

    async def end() -> None:
        ended.append(True)

    async def run() -> None:
        answer = http._Streamed(endless(), "video/mp4", end, 0.1)
        config = uvicorn.Config(answer, log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext
        with socket.create_server(("127.0.0.1", 0)) as listening:
            task = asyncio.ensure_future(server.serve(sockets=[listening]))
            await until(lambda: server.started)
            _, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await until(lambda: bool(ended))
            writer.close()
            server.should_exit = True
            await asyncio.wait_for(task, 20)

    asyncio.run(run())


def test_calls_leave_no_threads_or_files_behind(core: Core) -> None:
    def count() -> tuple[int, int]:
        threads = [t for t in threading.enumerate() if t.name.startswith("lp-edge ")]
        return len(threads), len(os.listdir("/proc/self/fd"))

    animate(core, picture=png(), driving=png())
    first = count()
    for _ in range(10):
        assert animate(core, picture=png(), driving=png()).status_code == 200
        assert animate(core, picture=png(), driving=b"x").status_code == 400
    assert count() == first
