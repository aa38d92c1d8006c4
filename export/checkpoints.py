"""Loads the LivePortrait networks from their checkpoints, strictly, and refuses everything that is not exactly one.

Nothing in a file is ever executed: ``torch.load(weights_only=True)`` builds tensors and plain containers only. Files that
are not the official ones (by SHA-256) are not even parsed unless the caller allows it.

Accepted besides the official layout, because it can be read in one way only: DDP and ``torch.compile`` prefixes
(``module.``, ``_orig_mod.``), a state dict nested in a training checkpoint, fp16, bf16 and fp64 tensors (converted to
fp32), and sharded files ``name-00001-of-00002.pth``.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import torch  # noqa: TID253

from lp_edge.engines.bundle import CheckpointEntry, sha256_file
from lp_edge.errors import ExportError
from lp_edge.export import networks as _networks
from lp_edge.export.inventory import (
    BASE_NETWORKS,
    FILES,
    HUB_REPOSITORY,
    STITCHING_FILE,
    STITCHING_PARTS,
    UNVERIFIED,
    OfficialFile,
    Variant,
    official_with,
)
from lp_edge.export.networks import LivePortraitNetworks

__all__ = ["load_networks", "load_state", "verified"]

_log = logging.getLogger(__name__)

State = dict[str, torch.Tensor]
Table = Mapping[str, torch.Tensor]

_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WRAPPERS: Final = frozenset({"module", "_orig_mod"})  # DistributedDataParallel, torch.compile
_SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.pth")
_DEPTH: Final = 4  # how deep a state dict may be nested
_ALLOW: Final = "give the official files, or --allow-unverified if you trust these"
_OFFICIAL: Final = f"download the file of {HUB_REPOSITORY} again (lp-export does so without --weights)"


def load_networks(
    folder: Path,
    *,
    variant: Variant = "human",
    allow_unverified: bool = False,
    files: Mapping[str, OfficialFile] | None = None,
    create: Callable[[], LivePortraitNetworks] = _networks.create,
) -> tuple[LivePortraitNetworks, tuple[CheckpointEntry, ...]]:
    """Load all networks of a variant.

    Args:
        folder: what contains ``liveportrait/`` (and ``liveportrait_animals/``), or that folder itself, or a folder with
            all files directly in it.
        variant: ``human``, or ``animal``: its base networks with the human stitching module, as the reference has it.
        allow_unverified: take files whose SHA-256 is not the official one.
        files: role -> official file; None = those of the variant.
        create: makes the networks that are filled.

    Returns:
        The networks (fp32, evaluation mode, no gradients) and one entry per file for the manifest; the licence of a
        file that is not official is :data:`~lp_edge.export.inventory.UNVERIFIED`.

    Raises:
        ExportError: a file is missing, not official (and not allowed), truncated, no checkpoint, contains code, belongs
            to another network or variant, or lacks, adds or misshapes a tensor, or holds NaN or infinity.

    Example:
        >>> networks, entries = load_networks(Path("pretrained_weights"))  # doctest: +SKIP
    """
    files = FILES[variant] if files is None else files
    # Everything that needs no parsing comes first: a wrong folder is told at once, not after half a gigabyte.
    found = {role: _locate(folder, file) for role, file in files.items()}
    entries = {
        role: tuple(_identify(found[role], file, variant, allow_unverified=allow_unverified))
        for role, file in files.items()
    }
    networks = create()
    tables = {name: getattr(networks, name).state_dict() for name in (*BASE_NETWORKS, *STITCHING_PARTS)}
    for role, paths in found.items():
        parts = STITCHING_PARTS if role == STITCHING_FILE else None
        states = load_state(paths, role, tables, parts=parts, spare=verified(entries[role]))
        for name, state in states.items():
            getattr(networks, name).load_state_dict(state, strict=True)
    return networks, tuple(entry for group in entries.values() for entry in group)


def verified(entries: Sequence[CheckpointEntry]) -> bool:
    """Whether all checkpoints are official files."""
    return all(entry.licence != UNVERIFIED for entry in entries)


# -- which files ------------------------------------------------------------------------------------


def _locate(folder: Path, file: OfficialFile) -> tuple[Path, ...]:
    """Path of an official file below ``folder``, or the paths of its shards in order."""
    inner = file.path.split("/", 1)[1]
    places = dict.fromkeys((folder / file.path, folder / inner, folder / file.name))
    if file.path.startswith("liveportrait/") and folder.name == "liveportrait_animals":
        places[folder.parent / file.path] = None  # the human stitching module lies beside the animal set
    found = [paths for place in places if (paths := _at(place))]
    if len(found) > 1:
        raise ExportError(
            f"{folder} holds {file.name} {len(found)} times: {', '.join(str(p[0]) for p in found)}",
            "expected it once",
            "give the folder of one set of weights",
        )
    if not found:
        words = "is not a folder" if not folder.is_dir() else f"has no {file.name}"
        raise ExportError(
            f"{folder} {words}",
            f"expected {folder / file.path}",
            "give the folder that contains liveportrait/, or leave --weights out to download",
        )
    return found[0]


def _at(place: Path) -> tuple[Path, ...]:
    shards: dict[str, dict[int, Path]] = {}
    for path in sorted(place.parent.glob("*.pth")) if place.parent.is_dir() else []:
        if (match := _SHARD.fullmatch(path.name)) and match["stem"] == place.stem:
            shards.setdefault(match["count"], {})[int(match["index"])] = path
    if place.exists() and not place.is_file():
        raise ExportError(f"{place} is not a file", "expected a checkpoint", "give the folder of the weights")
    if len(shards) + place.is_file() > 1:
        names = [p.name for group in shards.values() for p in group.values()]
        raise ExportError(
            f"{place.parent} holds {place.stem} in several forms: {', '.join([place.name] * place.is_file() + names)}",
            "expected one file, or one complete set of shards",
            "keep one of them",
        )
    for count, group in shards.items():
        if missing := sorted(set(range(1, int(count) + 1)) - set(group)):
            raise ExportError(
                f"{place.parent} lacks shard {missing[0]} of {int(count)} of {place.stem}",
                f"expected {place.stem}-{missing[0]:05}-of-{count}.pth",
                "give all shards",
            )
        if len(group) != int(count):
            raise ExportError(
                f"{place.parent} holds {len(group)} shards of {place.stem}, numbered {sorted(group)}",
                f"expected 1 to {int(count)}",
                "keep the shards of one checkpoint only",
            )
        return tuple(group[i] for i in sorted(group))
    return (place,) if place.is_file() else ()


def _identify(
    paths: Sequence[Path], file: OfficialFile, variant: Variant, *, allow_unverified: bool
) -> Iterator[CheckpointEntry]:
    """One entry per file, by its SHA-256; nothing is parsed."""
    for path in paths:
        try:
            digest, size = sha256_file(path), path.stat().st_size
        except OSError as error:
            raise ExportError(
                f"{path} cannot be read ({error.strerror})", "expected a checkpoint", "check its permissions"
            ) from error
        name = file.path if len(paths) == 1 else file.path.replace(file.name, path.name)
        if digest == file.sha256:
            yield CheckpointEntry(name, digest, file.licence)
            continue
        # A file known to be another one is a mix-up, whatever is allowed.
        if other := official_with(digest):
            raise ExportError(
                f"{path} is the official {other.path}",
                f"expected {file.path} for the variant {variant}",
                "put every file in its own place",
            )
        if not allow_unverified:
            short = file.size is not None and size < file.size and len(paths) == 1
            word = "shorter than the official file" if short else "not the official file"
            told = "" if file.size is None else f" ({file.size} bytes)"
            raise ExportError(
                f"{path} is {word}: {size} bytes, SHA-256 {digest[:16]}…",
                f"expected {file.sha256[:16]}…{told}",
                f"{_OFFICIAL}, or pass --allow-unverified if you trust it",
            )
        _log.info("%s is not the official file (SHA-256 %s); it is taken as allowed", path, digest)
        yield CheckpointEntry(name, digest, UNVERIFIED)


# -- what is in them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """Tensors found in a file: at which place, under which plain names."""

    place: str
    state: State


def load_state(
    paths: Sequence[Path],
    role: str,
    tables: Mapping[str, Table],
    *,
    parts: Mapping[str, str] | None = None,
    spare: bool = False,
) -> dict[str, State]:
    """The state dicts in one checkpoint (or its shards), equal in names and shapes to what is expected, in fp32.

    Args:
        paths: the file, or its shards.
        role: network that the file should hold; only for messages when ``parts`` is given.
        tables: network -> expected state dict, of all networks, so that a mixed-up file can be named.
        parts: network -> part of the file; None = the file holds the network ``role`` alone.
        spare: let the file hold further parts (the official stitching file does).

    Raises:
        ExportError: see :func:`load_networks`.
    """
    candidates = _merge([list(_states(_read(path), path)) for path in paths], paths)
    label = paths[0] if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} shards of {role})"
    if parts is None:
        return {role: _pick(candidates, role, tables, f"{label}")}
    split = list(_split(candidates, tuple(parts.values())))
    result = {}
    for name, part in parts.items():
        named = [c for c in split if c.place.rsplit(".", 1)[-1] == part]
        if not named:
            _refuse_other(candidates, role, tables, f"{label}", set(parts))
            raise ExportError(
                f"{label} has no part {part!r}",
                f"expected {', '.join(parts.values())}",
                _OFFICIAL,
            )
        result[name] = _pick(named, name, tables, f"{label}, part {part}")
    # What lies beside the parts: groups of tensors are networks nobody asked for, anything deeper is a training record.
    beside = [(c.place.rpartition("."), c) for c in split]
    owners = {owner for (owner, _, last), _ in beside if last in parts.values()}
    extra = sorted(
        last or min(c.state)
        for (owner, _, last), c in beside
        if owner in owners and last not in parts.values()
    )
    if extra and not spare:
        raise ExportError(
            f"{label} has the extra part {extra[0]!r}", f"expected only {', '.join(parts.values())}", _ALLOW
        )
    return result


def _read(path: Path) -> Any:
    """What a checkpoint holds: tensors on the CPU and plain containers."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror})", "", "check its permissions") from error
    if not head:
        raise ExportError(f"{path} is empty", "expected a checkpoint", _OFFICIAL)
    if head.startswith(b"version https://git-lfs"):
        raise ExportError(f"{path} is a Git LFS pointer", "expected the file itself", "run git lfs pull")
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise ExportError(
            f"{path} is not a checkpoint (it starts with {head[:12]!r})", "expected a PyTorch file", _OFFICIAL
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old formats warn about their storage class
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    # torch raises RuntimeError, EOFError, UnpicklingError, ValueError, KeyError … for what is one thing here
    except Exception as error:  # noqa: BLE001
        _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> NoReturn:
    text = str(error)
    if match := re.search(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)", text):
        raise ExportError(
            f"{path} holds code or objects ({match[1]}), which were not run",
            "expected tensors only",
            f"do not use this file; {_OFFICIAL}",
        ) from error
    if "weights_only" in text.lower() or "weights only" in text.lower():
        raise ExportError(
            f"{path} holds more than tensors and plain containers; nothing of it was run",
            "expected tensors only",
            f"do not use this file; {_OFFICIAL}",
        ) from error
    line = text.strip().splitlines()[0][:160] if text.strip() else type(error).__name__
    raise ExportError(
        f"{path} is truncated or damaged ({line})", "expected a whole PyTorch checkpoint", _OFFICIAL
    ) from error


def _states(value: Any, path: Path, place: str = "", depth: int = 0) -> Iterator[_Candidate]:
    """Every group of named tensors in what was read; numbers and texts beside them are training records."""
    if isinstance(value, torch.Tensor) or not isinstance(value, Mapping):
        if depth == 0:
            raise ExportError(f"{path} holds a {type(value).__name__}", "expected a state dict", _OFFICIAL)
        return
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if tensors or depth == 0:
        yield _Candidate(place, _plain(tensors, path))
    if depth < _DEPTH:
        for key, inner in value.items():
            if isinstance(key, str) and isinstance(inner, Mapping):
                yield from _states(inner, path, f"{place}.{key}" if place else key, depth + 1)


def _plain(state: Mapping[str, torch.Tensor], path: Path) -> State:
    """Names without the prefixes of wrappers."""
    result: State = {}
    for key, tensor in state.items():
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in result and not torch.equal(result[name], tensor):
            raise ExportError(
                f"{path} holds {name} twice with different values (with and without a prefix)",
                "expected every tensor once",
                _OFFICIAL,
            )
        result[name] = tensor
    return result


def _merge(groups: Sequence[Sequence[_Candidate]], paths: Sequence[Path]) -> list[_Candidate]:
    """Shards put together, place by place; a tensor in two shards is refused."""
    merged: dict[str, State] = {}
    for group, path in zip(groups, paths, strict=True):
        for candidate in group:
            state = merged.setdefault(candidate.place, {})
            if both := sorted(state.keys() & candidate.state.keys()):
                raise ExportError(
                    f"{path} holds {both[0]}, which another shard holds too",
                    "expected every tensor in one shard",
                    "give the shards of one checkpoint",
                )
            state.update(candidate.state)
    return [_Candidate(place, state) for place, state in merged.items()]


def _split(candidates: Sequence[_Candidate], parts: Sequence[str]) -> Iterator[_Candidate]:
    """Turns names that begin with a part (``retarget_eye.mlp.0.weight``) into a group of that part."""
    for candidate in candidates:
        groups: dict[str, State] = {}
        for key, tensor in candidate.state.items():
            part, _, rest = key.partition(".")
            flat = part in parts and bool(rest)
            groups.setdefault(part if flat else "", {})[rest if flat else key] = tensor
        for part, state in groups.items():
            yield _Candidate(".".join(p for p in (candidate.place, part) if p), state)


def _fits(state: State, table: Table) -> bool:
    return state.keys() == table.keys() and all(state[k].shape == table[k].shape for k in table)


def _refuse_other(
    candidates: Sequence[_Candidate], role: str, tables: Mapping[str, Table], label: str, own: set[str]
) -> None:
    for name, table in tables.items():
        if name not in own and any(_fits(c.state, table) for c in candidates):
            raise ExportError(
                f"{label} holds the {name} network",
                f"expected the {role} network",
                "put every file in its own place",
            )


def _pick(candidates: Sequence[_Candidate], role: str, tables: Mapping[str, Table], label: str) -> State:
    """The one candidate that is the network, as fp32; anything else is refused with the first differences."""
    table = tables[role]
    fitting = [c for c in candidates if _fits(c.state, table)]
    if len(fitting) > 1:
        raise ExportError(
            f"{label} holds the {role} network {len(fitting)} times, at {', '.join(repr(c.place) for c in fitting)}",
            "expected it once",
            "save the state dict that is meant in a file of its own",
        )
    if fitting:
        return {key: _tensor(fitting[0].state[key], like, f"{label}: {key}") for key, like in table.items()}
    _refuse_other(candidates, role, tables, label, {role})
    # The best guess of what was meant, for the message.
    closest = max(candidates, key=lambda c: len(c.state.keys() & table.keys()))
    _differences(closest.state, table, role, label)


def _differences(state: State, table: Table, role: str, label: str) -> NoReturn:
    missing, extra = sorted(table.keys() - state.keys()), sorted(state.keys() - table.keys())
    wrong = [k for k in table if k in state and state[k].shape != table[k].shape]
    told = []
    if missing:
        told.append(f"lacks {_some(missing)}")
    if extra:
        told.append(f"has the extra {_some(extra)}")
    if wrong:
        key = wrong[0]
        more = f" and {len(wrong) - 1} more wrong shapes" if len(wrong) > 1 else ""
        told.append(f"{key} has the shape {list(state[key].shape)} instead of {list(table[key].shape)}{more}")
    raise ExportError(
        f"{label}: {'; '.join(told)}", f"expected the {len(table)} tensors of the {role} network", _OFFICIAL
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _tensor(tensor: torch.Tensor, like: torch.Tensor, label: str) -> torch.Tensor:
    """A checked tensor in the type of ``like`` (fp32, or int64 for counters)."""
    kinds = _FLOATS if like.is_floating_point() else (torch.int64, torch.int32)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in kinds:
        raise ExportError(
            f"{label} is {tensor.dtype}, {tensor.layout}",
            f"expected a dense tensor of {', '.join(str(k).removeprefix('torch.') for k in kinds)}",
            _OFFICIAL,
        )
    value = tensor.detach().to(like.dtype)
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ExportError(
            f"{label} holds {bad} values that are NaN or infinite", "expected finite weights", _OFFICIAL
        )
    return value
