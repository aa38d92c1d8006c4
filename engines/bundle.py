"""A bundle: a folder of graphs, tables and engines with one manifest, read strictly and written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from lp_edge.engines.backends import BackendConfig, open_runner
from lp_edge.engines.external import external_files, is_beside
from lp_edge.engines.ort import describe
from lp_edge.engines.runner import Runner, TensorSpec
from lp_edge.errors import BundleError

if TYPE_CHECKING:
    from typing_extensions import Self

_E = TypeVar("_E")

__all__ = [
    "MANIFEST",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleWriter",
    "CheckpointEntry",
    "EngineEntry",
    "EngineKey",
    "FileEntry",
    "Manifest",
    "NetworkEntry",
    "builtin_directory",
    "key_json",
    "load_manifest",
    "open_bundle",
    "save_manifest",
    "sha256_file",
    "sync_directory",
    "write_bundle",
    "write_synced",
]

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
PRECISIONS: Final = ("fp32", "fp16", "mixed", "int8", "fp8")

_MAX_MANIFEST: Final = 8 << 20
_CHUNK: Final = 1 << 20
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_DTYPES: Final = (
    "float16", "float32", "float64", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "bool",
)  # fmt: skip

_REINSTALL: Final = "reinstall lp-edge (pip install --force-reinstall lp-edge)"
_EXPORT: Final = "export the bundle again with lp-export"
_CALLER: Final = "correct the entry before writing the bundle"


# -- what a manifest holds --------------------------------------------------------------------------


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: ``file`` relative to its folder with ``/``, SHA-256 in lower-case hex, ``size`` in bytes."""

    file: str
    sha256: str
    size: int


@dataclass(frozen=True)
class NetworkEntry:
    """A network of the bundle.

    Attributes:
        file, sha256, size: as in :class:`FileEntry`.
        precision: one of :data:`PRECISIONS`.
        opset: ONNX opset of the default domain.
        inputs, outputs: every tensor of the graph, in its order.
        parity: figures reached at export against the original, name -> finite number.
        data: the file beside the graph that holds its weights; None when they are in the graph.
    """

    file: str
    sha256: str
    size: int
    precision: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Mapping[str, float] = field(default_factory=dict, hash=False)
    data: FileEntry | None = None

    @property
    def total_size(self) -> int:
        """Bytes of the graph and its weights."""
        return self.size + (self.data.size if self.data else 0)


@dataclass(frozen=True)
class CheckpointEntry:
    """Weights that the bundle came from."""

    name: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class EngineKey:
    """What an engine was built for; it runs only where all of this is the same.

    Attributes:
        onnx_sha256: digest of the graph.
        tensorrt: version of TensorRT, for example ``10.3.0``.
        gpu: name of the GPU.
        compute_capability: for example ``8.7``.
        precision: one of :data:`PRECISIONS`.
        profile: input -> (smallest, usual, largest) shape.
        flags: names of the builder flags; order does not matter.
    """

    onnx_sha256: str
    tensorrt: str
    gpu: str
    compute_capability: str
    precision: str
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(hash=False)
    flags: tuple[str, ...] = ()

    def key(self) -> str:
        """SHA-256 over all fields, the same on every machine and in every run."""
        text = json.dumps(key_json(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class EngineEntry:
    """A compiled engine of one network."""

    network: str
    file: str
    sha256: str
    size: int
    built_for: EngineKey

    def key(self) -> str:
        """See :meth:`EngineKey.key`."""
        return self.built_for.key()


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself.

    Attributes:
        family, variant: model family and variant of it.
        licence: SPDX expression, or the licence's name, of the bundle as a whole.
        created_by: program and version that wrote it.
        keypoints: number of keypoints.
        normalisation: how pixels become numbers inside the graphs, in words.
        networks: name -> network.
        files: name -> table (``.npz``) or document.
        checkpoints: what the weights came from.
        regions: region -> keypoint indices.
        sizes: name -> pixels.
        engines: compiled engines.
        schema_version: version of this layout.
    """

    family: str
    variant: str
    licence: str
    created_by: str
    keypoints: int
    normalisation: str
    networks: Mapping[str, NetworkEntry] = field(hash=False)
    files: Mapping[str, FileEntry] = field(default_factory=dict, hash=False)
    checkpoints: tuple[CheckpointEntry, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    engines: tuple[EngineEntry, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def contents(self) -> Iterator[tuple[str, FileEntry]]:
        """Every file that the manifest names, with a word for what it is."""
        for name, network in self.networks.items():
            yield f"network {name}", FileEntry(network.file, network.sha256, network.size)
            if network.data:
                yield f"weights of {name}", network.data
        for name, entry in self.files.items():
            yield f"file {name}", entry
        for engine in self.engines:
            yield f"engine of {engine.network}", FileEntry(engine.file, engine.sha256, engine.size)


# -- JSON -------------------------------------------------------------------------------------------


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype.name, "shape": list(spec.shape)}


def _file_json(entry: FileEntry | NetworkEntry | EngineEntry) -> dict[str, Any]:
    return {"file": entry.file, "sha256": entry.sha256, "size": entry.size}


def key_json(key: EngineKey) -> dict[str, Any]:
    """An engine's key as the manifest writes it."""
    return {
        "onnx_sha256": key.onnx_sha256,
        "tensorrt": key.tensorrt,
        "gpu": key.gpu,
        "compute_capability": key.compute_capability,
        "precision": key.precision,
        "profile": {name: [list(shape) for shape in shapes] for name, shapes in key.profile.items()},
        "flags": sorted(key.flags),
    }


def _manifest_json(m: Manifest) -> dict[str, Any]:
    return {
        "schema_version": m.schema_version,
        "family": m.family,
        "variant": m.variant,
        "licence": m.licence,
        "created_by": m.created_by,
        "keypoints": m.keypoints,
        "normalisation": m.normalisation,
        "sizes": dict(m.sizes),
        "networks": {
            name: {
                **_file_json(n),
                "precision": n.precision,
                "opset": n.opset,
                "inputs": [_spec_json(s) for s in n.inputs],
                "outputs": [_spec_json(s) for s in n.outputs],
                "parity": dict(n.parity),
                **({"data": _file_json(n.data)} if n.data else {}),
            }
            for name, n in m.networks.items()
        },
        "files": {name: _file_json(entry) for name, entry in m.files.items()},
        "checkpoints": [{"name": c.name, "sha256": c.sha256, "licence": c.licence} for c in m.checkpoints],
        "regions": {name: list(indices) for name, indices in m.regions.items()},
        "engines": [{"network": e.network, **_file_json(e), "key": key_json(e.built_for)} for e in m.engines],
    }


class _Reader:
    """A cursor in parsed JSON that takes values of the right kind and names the place of a wrong one."""

    def __init__(self, value: Any, where: str, origin: str, remedy: str) -> None:
        self.value, self.where, self.origin, self.remedy = value, where, origin, remedy

    def fail(self, got: str, expected: str) -> NoReturn:
        raise BundleError(
            f"{self.origin}: {self.where or 'the manifest'} {got}", f"expected {expected}", self.remedy
        )

    def _at(self, value: Any, step: str) -> _Reader:
        where = f"{self.where}{step}" if step.startswith("[") or not self.where else f"{self.where}.{step}"
        return _Reader(value, where, self.origin, self.remedy)

    def _kind(self, kind: type, words: str) -> Any:
        # bool is an int in Python, not in a manifest
        if not isinstance(self.value, kind) or (kind is int and isinstance(self.value, bool)):
            self.fail(f"is {_short(self.value)}", words)
        return self.value

    def record(self, *keys: str, optional: tuple[str, ...] = ()) -> dict[str, _Reader]:
        """An object with exactly these keys, and perhaps optional ones."""
        value = self._kind(dict, "an object")
        for key in value:
            if key not in keys + optional:
                self.fail(f"has the unknown key {key!r}", f"only {', '.join(keys + optional)}")
        for key in keys:
            if key not in value:
                self.fail(f"lacks the key {key!r}", f"all of {', '.join(keys)}")
        return {key: self._at(value[key], key) for key in value}

    def mapping(self) -> dict[str, _Reader]:
        """An object with free names as keys."""
        for name in self._kind(dict, "an object"):
            if not _PART.fullmatch(name):
                self.fail(f"has the name {name!r}", "a name of letters, digits, '_', '.', '+' and '-'")
        return {name: self._at(value, name) for name, value in self.value.items()}

    def items(self) -> list[_Reader]:
        return [self._at(value, f"[{i}]") for i, value in enumerate(self._kind(list, "a list"))]

    def text(self, empty: bool = False) -> str:
        value: str = self._kind(str, "a text")
        if not value and not empty:
            self.fail("is empty", "a text")
        return value

    def integer(self, low: int, high: int = 2**62) -> int:
        value: int = self._kind(int, "an integer")
        if not low <= value <= high:
            self.fail(f"is {value}", f"an integer from {low} to {high}")
        return value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.fail(f"is {_short(self.value)}", "a number")
        try:
            value = float(self.value)
        except OverflowError:
            value = float("inf")
        if not np.isfinite(value):
            self.fail(f"is {_short(self.value)}", "a finite number")
        return value

    def choice(self, choices: Sequence[str]) -> str:
        value = self.text()
        if value not in choices:
            self.fail(f"is {value!r}", f"one of {', '.join(choices)}")
        return value

    def digest(self) -> str:
        value = self.text()
        if not _SHA256.fullmatch(value):
            self.fail(f"is {_short(value)}", "64 lower-case hexadecimal digits")
        return value

    def file(self) -> str:
        """A path that stays inside the bundle."""
        value = self.text()
        if not all(_PART.fullmatch(part) for part in value.split("/")) or value == MANIFEST:
            self.fail(f"is {_short(value)}", "a file name inside the bundle, such as face_mesh.onnx")
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_spec(at: _Reader) -> TensorSpec:
    r = at.record("name", "dtype", "shape")
    shape = tuple(a.integer(0) if isinstance(a.value, int) else a.text() for a in r["shape"].items())
    return TensorSpec(r["name"].text(), np.dtype(r["dtype"].choice(_DTYPES)), shape)


def _read_specs(at: _Reader) -> tuple[TensorSpec, ...]:
    specs = tuple(_read_spec(item) for item in at.items())
    if len({s.name for s in specs}) != len(specs):
        at.fail("names a tensor twice", "every tensor once")
    return specs


def _read_network(at: _Reader) -> NetworkEntry:
    r = at.record(
        "file", "sha256", "size", "precision", "opset", "inputs", "outputs", "parity", optional=("data",)
    )
    file, data = r["file"].file(), _read_file(r["data"]) if "data" in r else None
    if data and data.file.rpartition("/")[0] != file.rpartition("/")[0]:
        r["data"].fail(f"is in another folder than {file}", "weights beside their graph")
    return NetworkEntry(
        file,
        r["sha256"].digest(),
        r["size"].integer(0),
        r["precision"].choice(PRECISIONS),
        r["opset"].integer(1, 1000),
        _read_specs(r["inputs"]),
        _read_specs(r["outputs"]),
        {name: value.number() for name, value in r["parity"].mapping().items()},
        data,
    )


def _read_file(at: _Reader) -> FileEntry:
    r = at.record("file", "sha256", "size")
    return FileEntry(r["file"].file(), r["sha256"].digest(), r["size"].integer(0))


def _read_checkpoint(at: _Reader) -> CheckpointEntry:
    r = at.record("name", "sha256", "licence")
    return CheckpointEntry(r["name"].text(), r["sha256"].digest(), r["licence"].text())


def _read_key(at: _Reader) -> EngineKey:
    r = at.record("onnx_sha256", "tensorrt", "gpu", "compute_capability", "precision", "profile", "flags")
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for name, shapes in r["profile"].mapping().items():
        three = [tuple(size.integer(0) for size in shape.items()) for shape in shapes.items()]
        if len(three) != 3 or len({len(shape) for shape in three}) != 1:
            shapes.fail(f"is {_short(shapes.value)}", "three shapes of equal rank: smallest, usual, largest")
        if not all(a <= b <= c for a, b, c in zip(*three, strict=True)):
            shapes.fail(f"is {_short(shapes.value)}", "shapes that do not shrink from smallest to largest")
        profile[name] = (three[0], three[1], three[2])
    return EngineKey(
        r["onnx_sha256"].digest(),
        r["tensorrt"].text(),
        r["gpu"].text(),
        r["compute_capability"].text(),
        r["precision"].choice(PRECISIONS),
        profile,
        tuple(sorted(flag.text() for flag in r["flags"].items())),
    )


def read_key(value: object, origin: str) -> EngineKey:
    """An engine's key from what :func:`key_json` wrote; BundleError, which names ``origin``, when it is none."""
    return _read_key(_Reader(value, "key", origin, "build the engine again"))


def _read_engine(at: _Reader, networks: Mapping[str, NetworkEntry]) -> EngineEntry:
    r = at.record("network", "file", "sha256", "size", "key")
    return EngineEntry(
        r["network"].choice(tuple(networks)),
        r["file"].file(),
        r["sha256"].digest(),
        r["size"].integer(0),
        _read_key(r["key"]),
    )


def _read_manifest(value: Any, origin: str, remedy: str) -> Manifest:
    at = _Reader(value, "", origin, remedy)
    version = value.get("schema_version") if isinstance(value, dict) else None
    # First of all: a later layout may differ in every key.
    if isinstance(version, int) and not isinstance(version, bool) and version != SCHEMA_VERSION:
        raise BundleError(
            f"{origin}: manifest schema version {version}",
            f"expected {SCHEMA_VERSION}, the one this lp-edge reads",
            "update lp-edge" if version > SCHEMA_VERSION else _EXPORT,
        )
    r = at.record(
        "schema_version", "family", "variant", "licence", "created_by", "keypoints", "normalisation", "sizes",
        "networks", "files", "checkpoints", "regions", "engines",
    )  # fmt: skip
    keypoints = r["keypoints"].integer(0, 10**6)
    networks = {name: _read_network(n) for name, n in r["networks"].mapping().items()}
    if not networks:
        r["networks"].fail("is empty", "at least one network")
    manifest = Manifest(
        family=r["family"].text(),
        variant=r["variant"].text(),
        licence=r["licence"].text(),
        created_by=r["created_by"].text(),
        keypoints=keypoints,
        normalisation=r["normalisation"].text(empty=True),
        networks=networks,
        files={name: _read_file(f) for name, f in r["files"].mapping().items()},
        checkpoints=tuple(_read_checkpoint(c) for c in r["checkpoints"].items()),
        regions={
            name: tuple(i.integer(0, keypoints - 1) for i in region.items())
            for name, region in r["regions"].mapping().items()
        },
        sizes={name: size.integer(1) for name, size in r["sizes"].mapping().items()},
        engines=tuple(_read_engine(e, networks) for e in r["engines"].items()),
        schema_version=r["schema_version"].integer(SCHEMA_VERSION, SCHEMA_VERSION),
    )
    seen: dict[str, str] = {}
    for what, entry in manifest.contents():
        if (other := seen.setdefault(entry.file, what)) != what:
            at.fail(f"names the file {entry.file} for {other} and for {what}", "one entry per file")
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def load_manifest(path: Path, *, remedy: str = _EXPORT) -> Manifest:
    """Read and check a manifest file.

    Raises:
        BundleError: it is missing, not JSON, of another schema, or has an unknown, missing or wrong key.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_MANIFEST:
            raise BundleError(f"{path} has {size} bytes", f"expected at most {_MAX_MANIFEST}", remedy)
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read ({error.strerror})", "expected a manifest", remedy
        ) from error
    except UnicodeDecodeError as error:
        raise BundleError(
            f"{path} is not UTF-8 text ({error})", "expected a JSON manifest", remedy
        ) from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is not valid JSON ({error})", "expected a JSON manifest", remedy
        ) from error
    return _read_manifest(value, str(path), remedy)


def _encode(manifest: Manifest, origin: str) -> bytes:
    """The manifest as the bytes of its file, after the same checks as on reading."""
    try:
        text = json.dumps(_manifest_json(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"{origin}: the manifest cannot be written ({error})", "expected plain values", _CALLER
        ) from error
    _read_manifest(json.loads(text), origin, _CALLER)
    return f"{text}\n".encode()


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest whole or not at all; BundleError when it would not be read back."""
    data = _encode(manifest, str(path))
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write_synced(beside, data)
        os.replace(beside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise BundleError(
            f"{path} cannot be written ({error})", "", "free space or choose another folder"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


# -- reading a bundle -------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in lower-case hex, read in pieces; OSError as it comes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def builtin_directory() -> Path:
    """Folder of the bundle that ships with the package."""
    return Path(__file__).resolve().parent / "data" / "mesh"


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle; see :func:`open_bundle`.

    Attributes:
        directory: its folder.
        manifest: what it says about itself.
        remedy: what messages advise when something in it is wrong.
    """

    directory: Path
    manifest: Manifest
    remedy: str = _EXPORT

    def network(self, name: str) -> NetworkEntry:
        """Entry of a network; BundleError when the bundle has none of that name."""
        return self._entry(self.manifest.networks, "network", name)

    def path_of(self, network: str) -> Path:
        """Path of a network's ONNX file; BundleError when the bundle has none of that name."""
        return self.directory / self.network(network).file

    def path_of_file(self, name: str) -> Path:
        """Path of an entry of ``manifest.files``; BundleError when there is none of that name."""
        return self.directory / self._entry(self.manifest.files, "file", name).file

    def load_table(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """Arrays of an ``.npz`` entry of ``manifest.files``; nothing is ever unpickled.

        Raises:
            BundleError: no such entry, or not an archive of plain arrays.
        """
        path = self.path_of_file(name)
        try:
            # a single .npy would load too: the archive is what was promised
            with np.load(path, allow_pickle=False) as archive:
                return {key: np.array(archive[key]) for key in archive.files}
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, TypeError) as error:
            raise BundleError(
                f"{path} (file {name}) is not a table ({error})",
                "expected an .npz of plain arrays",
                self.remedy,
            ) from error

    def runner(self, name: str, config: BackendConfig | None = None) -> Runner:
        """A runner for a network whose real inputs and outputs are those of the manifest.

        Raises:
            BundleError: no such network, its tensors differ from the manifest's, or it takes weights from another file than
                the manifest says.
            BackendUnavailable: the backend asked for cannot run here.
            EngineError: the graph cannot be loaded.
        """
        entry = self.network(name)
        path = self.directory / entry.file
        verified = entry.data.file.rpartition("/")[2] if entry.data else ""
        # A file that the manifest does not name was not verified.
        if other := [file for file in external_files(path) if file != verified]:
            raise BundleError(
                f"{path} takes weights from {other[0]!r}",
                f"expected {verified}, the file of its manifest" if verified else "weights in the graph",
                self.remedy,
            )
        runner = open_runner(path, config, name=name)
        try:
            for kind, real, told in (
                ("input", runner.inputs, entry.inputs),
                ("output", runner.outputs, entry.outputs),
            ):
                self._compare(f"{kind} of {name} in {entry.file}", real, told)
        except BaseException:
            runner.close()
            raise
        return runner

    def hashes(self) -> dict[str, str]:
        """File -> SHA-256 of everything in the bundle, for provenance."""
        return {entry.file: entry.sha256 for _, entry in self.manifest.contents()}

    def _entry(self, entries: Mapping[str, _E], kind: str, name: str) -> _E:
        if name not in entries:
            raise BundleError(
                f"{self.directory}: the bundle ({self.manifest.family}, {self.manifest.variant}) has no {kind} {name!r}",
                f"it has {', '.join(entries) or 'none'}",
                self.remedy,
            )
        return entries[name]

    def _compare(self, what: str, real: Mapping[str, TensorSpec], told: Sequence[TensorSpec]) -> None:
        promised = {spec.name: spec for spec in told}
        for name in [*promised, *(n for n in real if n not in promised)]:
            a, b = real.get(name), promised.get(name)
            if a is None or b is None or not _same(a, b):
                raise BundleError(
                    f"{self.directory}: {what}: the graph has {a or 'no ' + name}",
                    f"the manifest says {b or 'nothing of it'}",
                    self.remedy,
                )


def _same(a: TensorSpec, b: TensorSpec) -> bool:
    """Equal dtype and axes; an anonymous axis equals any dynamic one, because some backends drop the names."""
    if a.dtype != b.dtype or len(a.shape) != len(b.shape):
        return False
    for x, y in zip(a.shape, b.shape, strict=True):
        loose = isinstance(x, str) and isinstance(y, str) and (x.startswith("?") or y.startswith("?"))
        if x != y and not loose:
            return False
    return True


def _verify(directory: Path, manifest: Manifest, remedy: str) -> None:
    for what, entry in manifest.contents():
        path = directory / entry.file
        try:
            if not path.is_file():
                raise BundleError(f"{path} ({what}) is missing", f"expected {entry.size} bytes", remedy)
            size = path.stat().st_size
            if size != entry.size:
                word = "truncated" if size < entry.size else "too long"
                raise BundleError(
                    f"{path} ({what}) is {word}: {size} bytes", f"expected {entry.size}", remedy
                )
            digest = sha256_file(path)
        except OSError as error:
            raise BundleError(f"{path} ({what}) cannot be read ({error})", "", remedy) from error
        if digest != entry.sha256:
            raise BundleError(
                f"{path} ({what}) was altered: SHA-256 {digest[:16]}…",
                f"expected {entry.sha256[:16]}…",
                remedy,
            )


def _no_bundle(directory: Path) -> str:
    """Why a folder cannot be a bundle, or ""."""
    try:
        if (directory / MANIFEST).is_file():
            return ""
        if directory.is_dir():
            return f"{directory} has no {MANIFEST}"
        return f"{directory} is not a folder" if directory.exists() else f"there is no folder {directory}"
    except OSError as error:
        return f"{directory} cannot be read ({error.strerror})"


def open_bundle(path: Path | None = None) -> Bundle:
    """Open a bundle and verify its manifest and the size and SHA-256 of every file.

    Args:
        path: folder of the bundle; None = the one that ships with the package.

    Raises:
        BundleError: no bundle there, unknown schema, or a file that is missing, truncated or altered, by name.
    """
    builtin = builtin_directory()
    directory = builtin if path is None else path
    remedy = _REINSTALL if path is None or directory.resolve() == builtin else _EXPORT
    if problem := _no_bundle(directory):
        hint = remedy if path is None else f"give the folder that lp-export wrote, or {remedy}"
        raise BundleError(problem, "expected the folder of a bundle", hint)
    manifest = load_manifest(directory / MANIFEST, remedy=remedy)
    _verify(directory, manifest, remedy)
    return Bundle(directory, manifest, remedy)


# -- writing a bundle -------------------------------------------------------------------------------


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it. Raises OSError, also where there is a file of that name."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has a folder's new names. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; it goes with the process, so a killed one leaves none."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _in_use(directory: Path) -> bool:
    """Whether another writer holds the lock on its staging folder."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


class BundleWriter:
    """Builds a bundle beside its final place and swaps it in when complete; a context manager.

    Leaving the ``with`` block normally commits; an exception, Ctrl-C or a kill leaves the old bundle (or, if the
    kill falls between the two renames of the swap, none until the next writer puts the old one back).

    Example::

        with BundleWriter(path, family="mesh", variant="default", licence="Apache-2.0", created_by="lp-edge 0.1.0",
                          keypoints=478, normalisation="in the graphs") as writer:
            writer.add_network("face_mesh", onnx_path, precision="fp32", opset=17, parity={"max_abs_px": 2e-4})
            writer.add_table("canonical", {"points": points})

    Args:
        directory: final place; an existing bundle or empty folder there is replaced, anything else is refused.
        family ... sizes: as in :class:`Manifest`.

    Raises:
        BundleError: the place is not writable or holds something else, or an entry is wrong.
    """

    def __init__(
        self,
        directory: Path,
        *,
        family: str,
        variant: str,
        licence: str,
        created_by: str,
        keypoints: int,
        normalisation: str,
        checkpoints: Sequence[CheckpointEntry] = (),
        regions: Mapping[str, Sequence[int]] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._target = Path(os.path.abspath(directory))
        self._meta: dict[str, Any] = {
            "family": family,
            "variant": variant,
            "licence": licence,
            "created_by": created_by,
            "keypoints": keypoints,
            "normalisation": normalisation,
            "checkpoints": tuple(checkpoints),
            "regions": {name: tuple(int(i) for i in indices) for name, indices in (regions or {}).items()},
            "sizes": dict(sizes or {}),
        }
        self._networks: dict[str, NetworkEntry] = {}
        self._files: dict[str, FileEntry] = {}
        self._engines: list[EngineEntry] = []
        self._stage = _Stage(self._target)

    def add_network(
        self,
        name: str,
        model: Path | bytes,
        *,
        precision: str,
        opset: int,
        parity: Mapping[str, float] | None = None,
        file: str = "",
        data: bytes | None = None,
    ) -> NetworkEntry:
        """Add a graph; its tensors are read from it.

        Args:
            file: its name in the bundle; default ``<name>.onnx``.
            data: content of the file beside it that the graph takes its weights from. For a path it is found there.
        """
        file = file or f"{name}.onnx"
        weights = self._weights(name, model, data)
        inputs, outputs = ((), ()) if weights else describe(model)
        entry = self._stage.put(file, model)
        beside = None
        if weights:
            beside = self._stage.put(f"{file.rpartition('/')[0]}/{weights[0]}".lstrip("/"), weights[1])
            inputs, outputs = describe(self._stage.path / file)
        network = NetworkEntry(
            entry.file,
            entry.sha256,
            entry.size,
            precision,
            opset,
            inputs,
            outputs,
            dict(parity or {}),
            beside,
        )
        self._networks[name] = network
        return network

    @staticmethod
    def _weights(name: str, model: Path | bytes, data: bytes | None) -> tuple[str, Path | bytes] | None:
        """Name and content of the one file beside a graph, or None."""
        try:
            files = external_files(model)
        except OSError as error:
            raise BundleError(
                f"{model!s} cannot be read ({error})", "expected an ONNX file", _CALLER
            ) from error
        if not files and data is None:
            return None
        if len(files) != 1 or not is_beside(files[0]):
            raise BundleError(
                f"network {name} takes weights from {', '.join(map(repr, files)) or 'no file, but one is given'}",
                "expected one plain file name",
                _CALLER,
            )
        if data is None and isinstance(model, bytes):
            raise BundleError(
                f"network {name} takes weights from {files[0]}", "expected them with its graph", _CALLER
            )
        return files[0], model.parent / files[0] if data is None and isinstance(model, Path) else data or b""

    def add_file(self, name: str, content: Path | bytes, *, file: str) -> FileEntry:
        """Add a document or a table under ``name``, stored as ``file``."""
        self._files[name] = entry = self._stage.put(file, content)
        return entry

    def add_table(self, name: str, arrays: Mapping[str, npt.ArrayLike], *, file: str = "") -> FileEntry:
        """Add plain arrays as ``.npz``; equal arrays give equal bytes. ``file`` defaults to ``<name>.npz``."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for key in sorted(arrays):
                member = io.BytesIO()
                try:
                    np.save(member, np.asarray(arrays[key]), allow_pickle=False)
                except ValueError as error:
                    raise BundleError(
                        f"table {name}: {key} is not a plain array ({error})", "", _CALLER
                    ) from error
                archive.writestr(zipfile.ZipInfo(f"{key}.npy"), member.getvalue())
        return self.add_file(name, buffer.getvalue(), file=file or f"{name}.npz")

    def add_engine(
        self, network: str, content: Path | bytes, key: EngineKey, *, file: str = ""
    ) -> EngineEntry:
        """Add a compiled engine; ``file`` defaults to a name made of network and key."""
        entry = self._stage.put(file or f"{network}.{key.key()[:16]}.engine", content)
        engine = EngineEntry(network, entry.file, entry.sha256, entry.size, key)
        self._engines.append(engine)
        return engine

    def commit(self) -> Bundle:
        """Write the manifest, verify everything and swap the bundle in; called by the ``with`` block."""
        manifest = Manifest(
            **self._meta, networks=self._networks, files=self._files, engines=tuple(self._engines)
        )
        return self._stage.commit(manifest)

    def abort(self) -> None:
        """Drop what was staged; the old bundle stays. Harmless after a commit."""
        self._stage.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._stage.committed:
                self.commit()
        finally:
            self.abort()


def write_bundle(directory: Path, manifest: Manifest, files: Mapping[str, Path | bytes]) -> Bundle:
    """Write a bundle of a ready manifest and the files it names, whole or not at all.

    Args:
        directory: final place; an existing bundle or empty folder there is replaced.
        manifest: must name exactly the files given, with their sizes and digests.
        files: file name inside the bundle -> path or content.

    Raises:
        BundleError: manifest and files do not agree, or the place cannot be written.
    """
    stage = _Stage(Path(os.path.abspath(directory)))
    try:
        for name, content in files.items():
            stage.put(name, content)
        return stage.commit(manifest)
    finally:
        stage.abort()


class _Stage:
    """The folder beside the target in which a bundle is built, locked against other writers' cleaning."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.committed = False
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            with _locked(target.parent):
                self._clean()
                self.path = target.with_name(f".{target.name}.staging-{secrets.token_hex(6)}")
                self.path.mkdir()
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise self._failed(error) from error
        self._closed = False

    def _failed(self, error: OSError) -> BundleError:
        return BundleError(
            f"the bundle {self._target} cannot be written ({error})",
            "expected a writable folder with space",
            "free space or choose another folder",
        )

    def _refuse_foreign(self) -> None:
        if self._target.is_dir():
            # the package's own folder holds the trained networks before it becomes a bundle for the first time
            if (self._target / MANIFEST).is_file() or self._target.resolve() == builtin_directory():
                return
            if not any(self._target.iterdir()):
                return
            got = f"the folder {self._target} holds something that is not a bundle"
        elif self._target.exists() or self._target.is_symlink():
            got = f"{self._target} is not a folder"
        else:
            return
        raise BundleError(
            got, "expected a bundle to replace, an empty folder or a new one", "choose another folder"
        )

    def _clean(self) -> None:
        """Remove what killed writers left; put back an old bundle that one of them had moved away."""
        for old in sorted(self._target.parent.glob(f".{_glob(self._target.name)}.old-*")):
            if not self._target.exists():
                os.rename(old, self._target)
            else:
                shutil.rmtree(old)
        for left in self._target.parent.glob(f".{_glob(self._target.name)}.staging-*"):
            if not _in_use(left):
                shutil.rmtree(left)

    def put(self, name: str, content: Path | bytes) -> FileEntry:
        """Copy a file into the stage."""
        _Reader(name, "file name", str(self._target), _CALLER).file()
        place = self.path / name
        digest = hashlib.sha256()
        size = 0
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                source = (
                    io.BytesIO(content)
                    if isinstance(content, bytes)
                    else stack.enter_context(content.open("rb"))
                )
                sink = stack.enter_context(place.open("xb"))
                while piece := source.read(_CHUNK):
                    digest.update(piece)
                    sink.write(piece)
                    size += len(piece)
        except FileExistsError as error:
            raise BundleError(
                f"the file {name} is added twice", "expected every file once", _CALLER
            ) from error
        except OSError as error:
            raise self._failed(error) from error
        return FileEntry(name, digest.hexdigest(), size)

    def commit(self, manifest: Manifest) -> Bundle:
        data = _encode(manifest, str(self._target))
        named = {entry.file for _, entry in manifest.contents()}
        found = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()}
        if extra := sorted(found - named):
            raise BundleError(
                f"the manifest of {self._target} does not name {', '.join(extra)}",
                "expected an entry each",
                _CALLER,
            )
        _verify(self.path, manifest, _CALLER)
        away = self._target.with_name(f".{self._target.name}.old-{secrets.token_hex(6)}")
        try:
            write_synced(self.path / MANIFEST, data)
            _sync_tree(self.path)
            with _locked(self._target.parent):
                self._refuse_foreign()
                self._swap(away)
                sync_directory(self._target.parent)
                shutil.rmtree(away, ignore_errors=True)
        except OSError as error:
            raise self._failed(error) from error
        self.committed = True
        self.abort()
        return Bundle(self._target, manifest, _EXPORT)

    def _swap(self, away: Path) -> None:
        try:
            if self._target.exists():
                os.rename(self._target, away)
            os.rename(self.path, self._target)
        except BaseException:
            if away.exists() and not self._target.exists():
                os.rename(away, self._target)
            raise

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._lock)
            if not self.committed:
                shutil.rmtree(self.path, ignore_errors=True)


def _glob(name: str) -> str:
    """A name as a glob pattern that matches only itself."""
    return re.sub(r"([*?\[])", r"[\1]", name)
