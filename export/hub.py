"""Downloads the official checkpoints: one pinned revision, resumed where it stopped, verified before it is used.

Files lie under ``<cache>/<revision>/`` as in the hub repository, so the folder can be given to ``--weights`` as well. A
file that the cache of huggingface-hub already holds is taken from there. A download writes ``.<name>.part`` beside its
place and continues it the next time, also after a kill; the file gets its name only when size and SHA-256 are right.

The transfer is huggingface-hub's ``http_get`` and not its ``hf_hub_download``: that one starts over after an interruption
(it writes to a name of its own each time), which hurts with files of 200 MB. No token is ever sent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from lp_edge.engines.bundle import sha256_file
from lp_edge.errors import BackendUnavailable, ConfigError, ExportError, OutputError
from lp_edge.export.inventory import FILES, HUB_REPOSITORY, HUB_REVISION, OfficialFile, Variant

__all__ = ["Progress", "default_cache", "fetch"]

Progress = Callable[[str, int, "int | None"], None]
"""Called with the file's path in the hub, the bytes that are there, and the whole size if it is known."""

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_BAR: Final = "huggingface_hub.http_get"
_YES: Final = frozenset({"1", "on", "yes", "true"})
_OR_WEIGHTS: Final = "or get the files elsewhere and give their folder with --weights"


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/lp-edge/hub``, or ``~/.cache/lp-edge/hub``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lp-edge" / "hub"


def fetch(
    variant: Variant,
    *,
    cache: Path | None = None,
    endpoint: str | None = None,
    offline: bool = False,
    allow_unverified: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda _: None,
    files: Mapping[str, OfficialFile] | None = None,
) -> Path:
    """Make sure that all files of a variant are on this machine.

    Args:
        variant: ``human`` or ``animal``.
        cache: folder for the files; None = :func:`default_cache`.
        endpoint: address of the hub or of a mirror; None = ``$HF_ENDPOINT``, else huggingface.co.
        offline: use only what is here; also set by ``$HF_HUB_OFFLINE``.
        allow_unverified: keep files whose size or SHA-256 is not the official one (a mirror with other weights).
        progress: called while bytes arrive.
        report: gets one line of text per step.
        files: role -> file; None = those of the variant.

    Returns:
        The folder to give to :func:`lp_edge.export.checkpoints.load_networks`.

    Raises:
        BackendUnavailable: huggingface-hub is not installed.
        ConfigError: the endpoint is no http(s) address.
        ExportError: offline and a file is missing, no connection, no such file, or a wrong size or SHA-256 (the file is
            then removed).
        OutputError: the cache cannot be written: no space, no permission.

    Example:
        >>> fetch("human")  # doctest: +SKIP
        PosixPath('/home/me/.cache/lp-edge/hub/82a4fa6735ca58432b6ce39301b4b9ee066dea47')
    """
    wanted = list((FILES[variant] if files is None else files).values())
    root = (default_cache() if cache is None else cache) / HUB_REVISION
    address = _address(endpoint)
    hub = _huggingface()
    offline = offline or _env_offline(hub)
    licences = sorted({file.licence for file in wanted})
    report(f"weights of {HUB_REPOSITORY} at {HUB_REVISION[:12]}, licence {', '.join(licences)}")
    for file in wanted:
        try:
            _obtain(root, file, hub, address, offline, allow_unverified, progress, report)
        except OSError as error:
            raise _unwritable(root, error) from error
    return root


def _huggingface() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.file_download
    except ImportError as error:
        raise BackendUnavailable(
            "downloading needs the package huggingface-hub, which is not installed",
            "expected the extra 'export'",
            f'pip install "lp-edge[export]", {_OR_WEIGHTS}',
        ) from error
    return huggingface_hub


def _address(endpoint: str | None) -> str:
    address = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"the endpoint is {address!r}",
            "expected an address such as https://huggingface.co",
            "correct --endpoint or HF_ENDPOINT",
        )
    return address


def _env_offline(hub: Any) -> bool:
    # The library reads its variable once, at import; whoever sets it later means it as well.
    return bool(hub.constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE", "").lower() in _YES


def _unwritable(root: Path, error: OSError) -> OutputError:
    remedy = "free space or choose another folder" if error.errno in _NO_SPACE else "choose another folder"
    return OutputError(
        f"the downloads cannot be written to {root} ({error.strerror or error})",
        "expected a writable folder with space",
        f"{remedy} with XDG_CACHE_HOME, {_OR_WEIGHTS}",
    )


def _obtain(
    root: Path,
    file: OfficialFile,
    hub: Any,
    address: str,
    offline: bool,
    allow_unverified: bool,
    progress: Progress | None,
    report: Callable[[str], None],
) -> None:
    place = root / file.path
    part = place.with_name(f".{place.name}.part")
    place.parent.mkdir(parents=True, exist_ok=True)
    with _alone(place, report):
        if place.is_file():
            if allow_unverified or not (wrong := _wrong(place, file)):
                return
            report(f"{place} is not the official file ({wrong}); it is removed")
        place.unlink(missing_ok=True)  # a wrong file, or a link to what is no longer there
        cached = hub.try_to_load_from_cache(HUB_REPOSITORY, file.path, revision=HUB_REVISION)
        if isinstance(cached, str) and not _wrong(Path(cached), file):
            report(f"{file.path}: taken from the cache of huggingface-hub")
            place.symlink_to(Path(cached).resolve())
            return
        if offline:
            raise ExportError(
                f"{file.path} is not on this machine, and downloads are switched off",
                f"expected it at {place}",
                f"run it once without --offline (and without HF_HUB_OFFLINE), {_OR_WEIGHTS}",
            )
        url = hub.hf_hub_url(HUB_REPOSITORY, file.path, revision=HUB_REVISION, endpoint=address)
        if not part.is_file() or (wrong := _wrong(part, file)):
            if part.is_file() and file.size is not None and part.stat().st_size >= file.size:
                report(f"the interrupted download of {file.path} is of no use ({wrong}); it starts over")
                part.unlink()
            report(f"downloading {file.path} from {urlsplit(address).netloc}")
            _transfer(hub, url, part, file, progress)
            if not allow_unverified and (wrong := _wrong(part, file)):
                part.unlink()
                raise ExportError(
                    f"{url} is not the official file: {wrong}",
                    f"expected SHA-256 {file.sha256}",
                    "try again, use another --endpoint, or pass --allow-unverified if you trust it; the file was removed",
                )
        os.replace(part, place)


def _wrong(path: Path, file: OfficialFile) -> str:
    """What differs from the official file, or ""."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size} bytes instead of {file.size}"
    digest = sha256_file(path)
    return "" if digest == file.sha256 else f"SHA-256 {digest}"


@contextlib.contextmanager
def _alone(place: Path, report: Callable[[str], None]) -> Iterator[None]:
    """One process at a time per file; the lock goes with the process."""
    lock = os.open(place.with_name(f".{place.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another download of {place.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


class _Counted(io.FileIO):
    """A file that tells how much of it is there whenever something is written."""

    def __init__(self, path: Path, told: Callable[[int], None]) -> None:
        super().__init__(path, "ab")
        self._told = told

    def write(self, data: Any) -> int:
        whole = memoryview(data)
        done = 0
        while done < len(
            whole
        ):  # FileIO may write a part only, and signals a full disk by an error on the rest
            done += super().write(whole[done:]) or 0
        self._told(self.tell())
        return done


def _transfer(hub: Any, url: str, part: Path, file: OfficialFile, progress: Progress | None) -> None:
    def told(done: int) -> None:
        if progress is not None:
            progress(file.path, done, file.size)

    with _Counted(part, told) as sink, _quiet_bar(hub):
        try:
            # The size is checked together with the digest, so that a wrong one gets the same message.
            hub.file_download.http_get(
                url, sink, resume_size=part.stat().st_size, displayed_filename=file.name
            )
        except Exception as error:  # the HTTP library differs between versions of huggingface-hub
            if isinstance(error, OSError) and error.errno in (*_NO_SPACE, *_REFUSED):
                raise
            raise _failed(url, part, file, error) from error
        os.fsync(sink.fileno())


@contextlib.contextmanager
def _quiet_bar(hub: Any) -> Iterator[None]:
    """Switch the library's own bar off: progress has one way to the user."""
    before = hub.utils.are_progress_bars_disabled(_BAR)
    if not before:
        hub.utils.disable_progress_bars(_BAR)
    try:
        yield
    finally:
        if not before:
            hub.utils.enable_progress_bars(_BAR)


def _failed(url: str, part: Path, file: OfficialFile, error: Exception) -> ExportError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    line = next(iter(str(error).strip().splitlines()), "")[:200]
    told = f"HTTP {status}" if status else f"{type(error).__name__}: {line}".rstrip(": ")
    kept = part.stat().st_size if part.exists() else 0
    if status == 416 or status in (401, 403, 404, 410):
        part.unlink(missing_ok=True)
        remedy = "check --endpoint (HF_ENDPOINT)" if status != 416 else "run it again: it starts over"
    else:
        remedy = "check the network, the proxy and --endpoint, then run it again"
        remedy += f": it goes on after {kept} bytes" if kept else ""
    return ExportError(
        f"{url} could not be downloaded ({told})",
        f"expected {file.size} bytes" if file.size is not None else "expected the file",
        f"{remedy}, {_OR_WEIGHTS}",
    )
