"""Where compiled engines are kept: beside the bundle, or in the user's cache where that cannot be written.

An engine is two files: ``<network>.<key>.engine``, TensorRT's plan as it is, and a ``.json`` beside it with its size, its
SHA-256, the whole key it was built for, and whether somebody asked for its batches (``asked``) or they were the default. The ``.json`` is written last, so a plan without one is an unfinished one. Both are
written beside, synced and renamed. Plans can carry code: only files of one's own bundle and cache are read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lp_edge.engines.bundle import (
    MANIFEST,
    EngineEntry,
    EngineKey,
    builtin_directory,
    key_json,
    load_manifest,
    read_key,
    sha256_file,
    sync_directory,
    write_synced,
)
from lp_edge.engines.external import external_files, is_beside
from lp_edge.errors import BundleError, EngineError, Interrupted, OutputError

__all__ = ["EngineCache", "Kept", "cache_folders", "digest_of", "user_folder"]

_LOG = logging.getLogger("lp_edge")

_SCHEMA: Final = 1
_POLL_S: Final = 0.2


def user_folder() -> Path:
    """``$XDG_CACHE_HOME/lp-edge/engines``, or ``~/.cache/lp-edge/engines``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lp-edge" / "engines"


def cache_folders(model: Path | bytes) -> tuple[Path, ...]:
    """Folders in which engines of a model are looked for; new ones go to the first that can be written.

    ``engines`` beside a model that lies in a bundle, except in the one that ships with the package; then the user's.
    """
    folder = model.resolve().parent if isinstance(model, Path) else None
    if folder is None or folder == builtin_directory() or not (folder / MANIFEST).is_file():
        return (user_folder(),)
    return (folder / "engines", user_folder())


def digest_of(model: Path | bytes) -> str:
    """SHA-256 in hex of a model: of the file, or, where weights lie beside, of the digests of graph and weights in one text.

    OSError as it comes; EngineError for weights that do not lie beside their graph.
    """
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()
    digests = [sha256_file(model)]
    for file in external_files(model):
        if not is_beside(file):
            raise EngineError(
                f"{model} takes its weights from {file!r}",
                "expected a file beside it",
                "use a model from a source you trust",
            )
        digests.append(sha256_file(model.parent / file))
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """An engine that is kept, as its entry tells; the file itself was not looked at.

    Attributes:
        path: of the plan.
        sha256: of the plan, in hex.
        key: what it was built for.
        asked: its batches were asked for, not the default of a card.
    """

    path: Path
    sha256: str
    key: EngineKey
    asked: bool


class EngineCache:
    """The engines of one network for one key.

    Args:
        folders: where to look, in this order; a new engine goes to the first that can be written.
        network: name, the beginning of the files' names.
        key: what the engine must have been built for.
    """

    def __init__(self, folders: Sequence[Path], network: str, key: EngineKey) -> None:
        self._folders = tuple(folders)
        self._network = re.sub(r"[^A-Za-z0-9_.-]", "_", network) or "network"
        self._key = key
        self._stem = f"{self._network}.{key.key()[:16]}"

    def read(self) -> tuple[bytes, Path] | None:
        """The engine, verified, and its file; None when there is none, or it was altered or cut off (which is logged)."""
        for folder in self._folders:
            for path, sha256 in (
                *self._own(folder),
                *(
                    (folder.parent / entry.file, entry.sha256)
                    for entry in _engines_of(folder.parent)
                    if entry.key() == self._key.key()
                ),
            ):
                if (plan := _verified(path, sha256)) is not None:
                    return plan, path
        return None

    def kept(self) -> list[Kept]:
        """All engines of this network, whatever they were built for, the newest first."""
        found: dict[Path, Kept] = {}
        for folder in self._folders:
            # Those that only the manifest tells of were built into the bundle by somebody who asked for it.
            for entry in _engines_of(folder.parent):
                if entry.network == self._network:
                    path = folder.parent / entry.file
                    found[path] = Kept(path, entry.sha256, entry.built_for, True)
            for path in folder.glob(f"{self._network}.*.json"):
                said = _load(path) or {}
                with contextlib.suppress(BundleError):
                    key = read_key(said.get("key"), str(path))
                    path = path.with_suffix(".engine")
                    found[path] = Kept(path, str(said.get("sha256")), key, said.get("asked") is True)
        there = [kept for kept in found.values() if kept.path.is_file()]
        return sorted(there, key=lambda kept: -kept.path.stat().st_mtime_ns)

    @staticmethod
    def plan_of(kept: Kept) -> bytes | None:
        """The content of an engine; None when it was altered or cut off, or is not there (which is logged)."""
        return _verified(kept.path, kept.sha256)

    def _own(self, folder: Path) -> Iterator[tuple[Path, object]]:
        path = folder / f"{self._stem}.engine"
        entry = _load(path.with_suffix(".json"))
        if entry is not None and entry.get("key") == key_json(self._key):
            yield path, entry.get("sha256")

    def write(self, plan: bytes, *, asked: bool = False) -> Path:
        """Keep an engine; its path.

        Args:
            plan: the engine.
            asked: see :class:`Kept`.

        Raises:
            OutputError: no folder can be written.
        """
        folder = self.folder()
        path = folder / f"{self._stem}.engine"
        entry = {
            "schema_version": _SCHEMA,
            "network": self._network,
            "sha256": hashlib.sha256(plan).hexdigest(),
            "size": len(plan),
            "asked": asked,
            "key": key_json(self._key),
        }
        try:
            # A reader must never find the new entry with the old plan.
            path.with_suffix(".json").unlink(missing_ok=True)
            _replace(path, plan)
            _replace(path.with_suffix(".json"), json.dumps(entry, indent=2).encode())
        except OSError as error:
            raise OutputError(
                f"the engine {path} cannot be written ({error})",
                f"expected a folder with {len(plan)} bytes of space",
                "free space, or set XDG_CACHE_HOME to a place with more",
            ) from error
        return path

    def folder(self) -> Path:
        """The folder that engines are written to; made when it is not there. OutputError when none can be."""
        said = []
        for folder in self._folders:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                said.append(str(error))
                continue
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
            said.append(f"{folder} cannot be written")
        raise OutputError(
            f"there is no place for engines: {'; '.join(said)}",
            "expected a writable folder",
            "give write permission to the bundle's folder, or set XDG_CACHE_HOME to a writable place",
        )

    def differences(self) -> str:
        """How the nearest engine of this network differs from the one that is wanted, or "" when there is none at all."""
        wanted = key_json(self._key)
        nearest: list[str] = []
        for kept in self.kept():
            key = key_json(kept.key)
            found = [
                f"{field.replace('_', ' ')} {_short(key[field])} in place of {_short(value)}"
                for field, value in wanted.items()
                if key[field] != value
            ]
            if found and (not nearest or len(found) < len(nearest)):
                nearest = found
        return ", ".join(nearest)

    @contextlib.contextmanager
    def lock(self, cancelled: Any = None) -> Iterator[None]:
        """Hold the right to build this engine; waits while another process builds it.

        The lock goes with the process that holds it. Interrupted when ``cancelled()`` becomes true meanwhile.
        """
        with (self.folder() / f"{self._stem}.lock").open("ab") as file:
            told = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        _LOG.warning(
                            "%s: another process is building this engine; waiting for it", self._network
                        )
                        told = True
                    if cancelled is not None and cancelled():
                        raise Interrupted(
                            f"{self._network}: stopped while another process builds its engine",
                            "",
                            "start again",
                        ) from None
                    time.sleep(_POLL_S)
            yield

    # -- the timing cache -----------------------------------------------------------------------

    def _timing(self) -> str:
        """Measured kernels serve all networks of one GPU and TensorRT."""
        place = f"{self._key.gpu}.{self._key.compute_capability}.{self._key.tensorrt}"
        return f"timing.{re.sub(r'[^A-Za-z0-9.-]+', '_', place)}.cache"

    def read_timing(self) -> bytes:
        """The timing cache of this GPU and TensorRT; empty when there is none."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                return (folder / self._timing()).read_bytes()
        return b""

    def write_timing(self, content: bytes) -> None:
        """Keep a timing cache. It only saves time, so what goes wrong is logged."""
        if content:
            try:
                _replace(self.folder() / self._timing(), content)
            except (OSError, OutputError) as error:
                _LOG.warning("the timing cache was not kept: %s", error)


def _engines_of(folder: Path) -> tuple[EngineEntry, ...]:
    """The engines that the manifest of a bundle names; none where there is no bundle."""
    if not (folder / MANIFEST).is_file():
        return ()
    try:
        return load_manifest(folder / MANIFEST).engines
    except BundleError as error:
        _LOG.debug("no engines of %s: %s", folder, error)
        return ()


def _load(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get("schema_version") == _SCHEMA else None


def _verified(path: Path, sha256: object) -> bytes | None:
    try:
        plan = path.read_bytes()
    except OSError as error:
        _LOG.warning("%s: the engine cannot be read (%s) and is not taken", path, error)
        return None
    if hashlib.sha256(plan).hexdigest() != sha256:
        _LOG.warning("%s: the engine was altered or cut off, and is not taken", path)
        return None
    return plan


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:8]}…" if re.fullmatch("[0-9a-f]{64}", text) else text


def _replace(path: Path, data: bytes) -> None:
    """Write a file beside, sync it and rename it; OSError as it comes."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write_synced(beside, data)
        os.replace(beside, path)
        sync_directory(path.parent)
    finally:
        beside.unlink(missing_ok=True)
