"""Downloads from a stand-in hub on this machine: what is fetched, resumed, verified, refused, and what stays behind."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lp_edge.errors import ConfigError, ExportError, OutputError
from lp_edge.export.inventory import FILES, HUB_REPOSITORY, HUB_REVISION, OfficialFile

pytest.importorskip("huggingface_hub", reason="the export extra (huggingface-hub) is not installed")

from lp_edge.export import hub

PREFIX = f"/{HUB_REPOSITORY}/resolve/{HUB_REVISION}/"


class StandIn:
    """Serves files as the hub does; ``cut`` closes the connection after so many bytes, once per entry."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.status = 0
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        name = request.path.removeprefix(PREFIX)
        self.requests.append((name, wanted))
        self.headers.append(dict(request.headers))
        if self.status or name not in self.files:
            code = self.status or 404
            request.send_response(code)
            if code == 404:
                request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = self.files[name]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(data):
            request.send_error(416)
            return
        request.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("ETag", '"etag"')
        request.send_header("X-Repo-Commit", HUB_REVISION)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        body = data[start:]
        if self.cut:
            body = body[: self.cut.pop(0)]
        request.wfile.write(body)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def content(name: str, size: int) -> bytes:
    seed = hashlib.sha256(name.encode()).digest()
    return (seed * (size // 32 + 1))[:size]


@pytest.fixture
def files() -> dict[str, OfficialFile]:
    """A small inventory; the second file has no known size, as the animal set."""
    made = {}
    for role, path, size in (
        ("motion", "liveportrait/base_models/m.pth", 70_000),
        ("generator", "lp/g.pth", 500),
    ):
        digest = hashlib.sha256(content(path, size)).hexdigest()
        made[role] = OfficialFile(path, digest, size if role == "motion" else None)
    return made


@pytest.fixture
def server(files: dict[str, OfficialFile], monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # not 10 MB
    stand_in = StandIn()
    stand_in.files = {f.path: content(f.path, f.size or 500) for f in files.values()}
    yield stand_in
    stand_in.close()


def visible(folder: Path) -> list[str]:
    """What lies there, without locks."""
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"
    )


def test_all_files_arrive_once_and_stay(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int | None]] = []
    lines: list[str] = []
    args = {"cache": tmp_path, "endpoint": server.endpoint + "/", "files": files, "report": lines.append}
    root = hub.fetch("human", progress=lambda *told: seen.append(told), **args)
    assert root == tmp_path / HUB_REVISION
    assert visible(root) == sorted(f.path for f in files.values())
    for file in files.values():
        assert (root / file.path).read_bytes() == server.files[file.path]
    assert ("liveportrait/base_models/m.pth", 70_000, 70_000) in seen
    assert seen[-1] == ("lp/g.pth", 500, None)
    assert "MIT" in lines[0] and HUB_REVISION[:12] in lines[0]
    assert [name for name, _ in server.requests] == [f.path for f in files.values()]
    hub.fetch("human", **args)
    assert len(server.requests) == 2, "a verified file is not fetched again"


def test_no_token_is_sent(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)
    assert server.headers and not any("authorization" in {k.lower() for k in h} for h in server.headers)


def test_the_endpoint_comes_from_the_environment(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    hub.fetch("human", cache=tmp_path, files=files)
    assert len(server.requests) == 2


def test_a_lost_connection_is_continued_within_the_download(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    server.cut = [20_000, 30_000]
    root = hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)
    assert [r for _, r in server.requests[:3]] == [None, "bytes=20000-", "bytes=50000-"]
    assert visible(root) == sorted(f.path for f in files.values())


def test_an_interrupted_run_is_continued_by_the_next(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    def stop(_name: str, done: int, _whole: int | None) -> None:
        raise KeyboardInterrupt

    server.cut = [30_000]
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files, progress=stop)
    kept = (tmp_path / HUB_REVISION / "liveportrait/base_models/.m.pth.part").stat().st_size
    assert 0 < kept <= 30_000
    server.cut, server.requests = [], []
    root = hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)
    assert server.requests[0] == ("liveportrait/base_models/m.pth", f"bytes={kept}-")
    assert (root / "liveportrait/base_models/m.pth").read_bytes() == server.files[
        "liveportrait/base_models/m.pth"
    ]


def test_a_server_without_ranges_starts_over(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    part = tmp_path / HUB_REVISION / "liveportrait/base_models/.m.pth.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    server.ranges = False
    root = hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)
    assert server.requests[0][1] == "bytes=1000-"
    assert visible(root) == sorted(f.path for f in files.values())


@pytest.mark.parametrize("role", ["motion", "generator"])
def test_a_whole_part_is_taken_without_the_network(
    role: str, server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    """A kill between the last byte and the renaming."""
    file = files[role]
    place = tmp_path / HUB_REVISION / file.path
    place.parent.mkdir(parents=True)
    place.with_name(f".{place.name}.part").write_bytes(server.files[file.path])
    hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files={role: file})
    assert server.requests == []
    assert visible(tmp_path / HUB_REVISION) == [file.path]


@pytest.mark.parametrize("change", ["flip", "shorter", "longer"])
def test_a_wrong_file_is_refused_and_removed(
    change: str, server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    path = files["motion"].path
    good = server.files[path]
    server.files[path] = {"flip": b"?" + good[1:], "shorter": good[:-7], "longer": good + b"?"}[change]
    with pytest.raises(ExportError, match="is not the official file") as raised:
        hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)
    assert path in raised.value.got and files["motion"].sha256 in raised.value.expected
    assert "--allow-unverified" in raised.value.remedy
    assert visible(tmp_path) == []
    server.files[path] = good
    hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)


def test_a_wrong_file_is_kept_where_allowed_and_replaced_where_not(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    path = files["motion"].path
    good = server.files[path]
    server.files[path] = b"other weights"
    args = {"cache": tmp_path, "endpoint": server.endpoint, "files": files}
    root = hub.fetch("human", allow_unverified=True, **args)
    assert (root / path).read_bytes() == b"other weights"
    server.files[path] = good
    lines: list[str] = []
    hub.fetch("human", report=lines.append, **args)
    assert (root / path).read_bytes() == good
    assert any("is not the official file" in line for line in lines)


@pytest.mark.parametrize(
    ("status", "words"), [(404, "HTTP 404"), (403, "HTTP 403"), (503, "HTTP 503")], ids=["404", "403", "503"]
)
def test_an_answer_that_is_no_file_is_named(
    status: int, words: str, server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    server.status = status
    with pytest.raises(ExportError, match=words) as raised:
        hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)
    assert files["motion"].path in raised.value.got
    assert "--endpoint" in raised.value.remedy and "--weights" in raised.value.remedy


def test_no_network_is_an_error_with_a_remedy(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path
) -> None:
    server.close()
    with pytest.raises(ExportError, match="could not be downloaded") as raised:
        hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)
    assert "network" in raised.value.remedy


@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_asks_nobody(
    how: str,
    server: StandIn,
    files: dict[str, OfficialFile],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = {"cache": tmp_path, "endpoint": server.endpoint, "files": files}
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ExportError, match=r"m\.pth is not on this machine") as raised:
        hub.fetch("human", offline=how == "option", **args)
    assert "--weights" in raised.value.remedy
    assert server.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub.fetch("human", **args)
    before = len(server.requests)
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.fetch("human", offline=how == "option", **args)
    assert len(server.requests) == before


def test_the_cache_of_the_hub_library_is_used(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared_cache = tmp_path / "hf"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(shared_cache))
    file = files["generator"]
    place = shared_cache / "models--KwaiVGI--LivePortrait" / "snapshots" / HUB_REVISION / file.path
    place.parent.mkdir(parents=True)
    place.write_bytes(server.files[file.path])
    root = hub.fetch("human", cache=tmp_path / "own", offline=True, files={"generator": file})
    assert (root / file.path).read_bytes() == server.files[file.path]
    # somebody empties that cache: the link leads nowhere, and the file is downloaded
    place.unlink()
    hub.fetch("human", cache=tmp_path / "own", endpoint=server.endpoint, files={"generator": file})
    assert (root / file.path).read_bytes() == server.files[file.path]
    assert len(server.requests) == 1


def test_a_full_disk_is_told(
    server: StandIn, files: dict[str, OfficialFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub._Counted, "write", full)
    with pytest.raises(OutputError, match="No space left") as raised:
        hub.fetch("human", cache=tmp_path, endpoint=server.endpoint, files=files)
    assert "free space" in raised.value.remedy


def test_a_cache_that_is_no_folder_is_told(files: dict[str, OfficialFile], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        hub.fetch("human", cache=tmp_path / "file", files=files)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://somewhere", "http://"])
def test_an_endpoint_must_be_an_address(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        hub.fetch("human", cache=tmp_path, endpoint=endpoint)


def test_the_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.default_cache() == tmp_path / "lp-edge" / "hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.default_cache() == tmp_path / ".cache" / "lp-edge" / "hub"


def test_the_inventory_is_consistent() -> None:
    paths = [f.path for files in FILES.values() for f in files.values()]
    assert len(set(paths)) == 9, "eight base networks and one stitching module that both variants share"
    for files in FILES.values():
        for file in files.values():
            assert len(file.sha256) == 64 and int(file.sha256, 16) >= 0
            assert file.licence == "MIT" and file.path.endswith(".pth")
