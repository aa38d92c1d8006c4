"""Motion templates: motion without pixels, in files.

The own format is an ``.npz`` of plain arrays, read with ``allow_pickle=False``:

=============  ==================  =================================================================
array          dtype, shape        meaning
=============  ==================  =================================================================
header         unicode, []         JSON: schema, family, fps (two integers), neutral, source, meta
rotation       float32 [T, 3, 3]   see :class:`lp_edge.runtime.motion.Motion`, as all below
translation    float32 [T, 3]
scale          float32 [T]
expression     float16 [T, K, 3]   K = 478 (``mesh``) or 21 (``liveportrait``); float32 is read, too
eye_ratio      float32 [T, 2]
lip_ratio      float32 [T]
=============  ==================  =================================================================

float16 keeps 11 bits: an expression of up to ±0.5 units is off by at most 0.00013, a fiftieth of a pixel on
a face with 150 pixels between its eyes.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, MediaError, OutputError
from lp_edge.runtime.face_motion import Canonical, load_canonical
from lp_edge.runtime.geometry import orthonormal
from lp_edge.runtime.motion import Motion

__all__ = [
    "BROKEN_ARCHIVE",
    "KEYPOINTS",
    "MAGNITUDES",
    "MAX_BYTES",
    "MAX_FRAMES",
    "MIN_SCALE",
    "MotionTemplate",
    "load_template",
    "save_template",
]

KEYPOINTS: Mapping[str, int] = MappingProxyType({"mesh": 478, "liveportrait": 21})
"""Family → number of keypoints whose expression a template holds."""
MAX_FRAMES = 100_000
"""Longest template, in frames: more than an hour at 25 fps."""
MAX_BYTES = 768 * 2**20
"""Largest template in memory, and largest file."""

MAGNITUDES: Mapping[str, float] = MappingProxyType(
    {"translation": 1e6, "scale": 1e6, "expression": 1e3, "eye_ratio": 1e6, "lip_ratio": 1e6}
)
"""Largest number of each field: far beyond any face, and near enough for float32 to stay finite."""
MIN_SCALE = 1e-6
BROKEN_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError, ValueError, struct.error
)  # fmt: skip
"""What :mod:`zipfile` raises for a damaged archive."""

_SCHEMA = 1
_HEADER_CHARS = 65_536
_TAIL: Mapping[str, tuple[int | str, ...]] = MappingProxyType(
    {
        "rotation": (3, 3),
        "translation": (3,),
        "scale": (),
        "expression": ("K", 3),
        "eye_ratio": (2,),
        "lip_ratio": (),
    }
)
# Largest |RᵀR - 1| that still counts as a rotation with rounding errors, not as something else.
_ROTATION_SLACK = 0.02
_REMAKE = "make the template again with lp-run --save-motion FILE.npz"


@dataclass(frozen=True)
class MotionTemplate:
    """Motion of one face over time.

    Attributes:
        fps: frames a second, 1/10 to 1000.
        family: ``mesh`` or ``liveportrait``; says what the expression's keypoints are.
        motion: ``T`` frames, 1 ≤ T ≤ :data:`MAX_FRAMES`.
        neutral: index of the frame that stands for "no motion".
        source: what it was made from, in words.
        meta: further notes.

    Raises:
        MediaError: a field is out of range, has a wrong shape, holds NaN or a rotation that is none (the
            message names field and frame). Rotations with rounding errors are made orthonormal.
    """

    fps: Fraction
    family: str
    motion: Motion
    neutral: int = 0
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "motion", _checked_motion(self.family, self.motion))
        if not Fraction(1, 10) <= self.fps <= 1000:
            raise MediaError(f"the template's frame rate is {self.fps}", "expected 0.1 to 1000", _REMAKE)
        if not 0 <= self.neutral < len(self.motion):
            raise MediaError(
                f"the template's neutral frame is {self.neutral}",
                f"it has frames 0 to {len(self) - 1}",
                _REMAKE,
            )

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.motion)


def _checked_motion(family: str, motion: Motion) -> Motion:
    if family not in KEYPOINTS:
        raise MediaError(
            f"the template's family is {family!r}",
            f"known are {', '.join(KEYPOINTS)}",
            "convert it or update lp-edge",
        )
    if np.ndim(motion.scale) != 1:
        raise MediaError(
            f"scale of the template is {np.shape(motion.scale)}", "expected one number a frame", _REMAKE
        )
    frames = len(motion.scale)
    if frames == 0:
        raise MediaError("the template has no frames", "at least one", _REMAKE)
    if frames > MAX_FRAMES:
        raise MediaError(f"the template has {frames} frames", f"at most {MAX_FRAMES}", "cut it into parts")
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name, tail in _TAIL.items():
        array = np.asarray(getattr(motion, name))
        shape = (frames, *(KEYPOINTS[family] if n == "K" else int(n) for n in tail))
        if array.shape != shape:
            raise MediaError(
                f"{name} of the template is {array.shape}", f"expected {shape} for {family}", _REMAKE
            )
        if array.dtype.kind not in "fiu":
            raise MediaError(f"{name} of the template is {array.dtype}", "expected floating point", _REMAKE)
        with np.errstate(over="ignore", invalid="ignore"):
            array = array.astype(np.float32)
        bad = ~np.isfinite(array.reshape(frames, -1)).all(axis=1)
        if bad.any():
            raise MediaError(
                f"{name} of the template holds NaN or infinity in frame {int(bad.argmax())}",
                f"finite numbers ({int(bad.sum())} of {frames} frames are broken)",
                _REMAKE,
            )
        largest = np.abs(array.reshape(frames, -1)).max(axis=1)
        if (most := largest.max()) > MAGNITUDES.get(name, math.inf):
            raise MediaError(
                f"{name} of the template reaches {most:g} in frame {int(largest.argmax())}",
                f"at most {MAGNITUDES[name]:g}",
                _REMAKE,
            )
        arrays[name] = array
    if (low := arrays["scale"].min()) < MIN_SCALE:
        raise MediaError(
            f"scale of the template is {low:g} in frame {int(arrays['scale'].argmin())}",
            f"at least {MIN_SCALE:g}",
            _REMAKE,
        )
    for name in ("eye_ratio", "lip_ratio"):
        if arrays[name].min() < 0:
            raise MediaError(
                f"{name} of the template is negative ({arrays[name].min():g})", "at least 0", _REMAKE
            )
    rotation = arrays["rotation"].astype(np.float64)
    off = np.abs(np.swapaxes(rotation, 1, 2) @ rotation - np.eye(3)).max(axis=(1, 2))
    wrong = (off > _ROTATION_SLACK) | (np.linalg.det(rotation) < 0)
    if wrong.any():
        raise MediaError(
            f"rotation of the template is no rotation in frame {int(wrong.argmax())}",
            f"orthonormal within {_ROTATION_SLACK} and not mirrored ({int(wrong.sum())} of {frames} frames are not)",
            _REMAKE,
        )
    if (off > 1e-6).any():
        arrays["rotation"] = orthonormal(rotation).astype(np.float32)
    return Motion(**arrays)


def save_template(template: MotionTemplate, path: str | Path) -> None:
    """Write a template to ``path`` (``.npz``): beside it first, then renamed, so no half file is ever seen.

    Raises:
        OutputError: the folder is missing or cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise OutputError(
            f"cannot save motion as {path.name!r}", "expected a name that ends in .npz", "rename it"
        )
    if not path.parent.is_dir():
        raise OutputError(f"no folder {path.parent}", "an existing folder", "create it or choose another")
    expression = template.motion.expression.astype(np.float16)
    header = {
        "schema": _SCHEMA,
        "family": template.family,
        "fps": [template.fps.numerator, template.fps.denominator],
        "neutral": template.neutral,
        "source": template.source,
        "meta": dict(template.meta),
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        "header": np.asarray(json.dumps(header)),
        **{name: getattr(template.motion, name) for name in _TAIL},
        "expression": expression,
    }
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}",
            "a writable folder with space",
            "choose another --output",
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def load_template(
    path: str | Path,
    canonical: Canonical | None = None,
    *,
    family: str | None = None,
    template_map: Mapping[str, npt.NDArray[np.generic]] | None = None,
) -> MotionTemplate:
    """Read a motion template: an own ``.npz``, a LivePortrait ``.pkl``, or the name of a built-in one.

    The content decides, not the file's name. Nothing in the file is executed, sizes are checked before memory is taken.

    Args:
        path: file, or one of :data:`lp_edge.runtime.gestures.GESTURES` where no such file exists.
        canonical: the mesh's canonical face; None = the one that ships with the package.
        family: what the result shall be of. LivePortrait's motion becomes mesh motion by
            :func:`lp_edge.runtime.liveportrait_template.to_mesh`; the other way there is none. None = ``mesh`` when
            ``canonical`` is given, else whatever the file holds (a built-in one: ``mesh``).
        template_map: the opened bundle's table ``liveportrait_map``, used to convert; None = the one that ships with the package.

    Raises:
        MediaError: there is no such file or template, it is no template, or its content is broken.
        ConfigError: ``family`` is unknown, or the template cannot be converted to it.
        BundleError: ``template_map`` is broken or belongs to another canonical face.
    """
    from lp_edge.runtime import gestures, liveportrait_template  # they build on MotionTemplate

    if family is None and canonical is not None:
        family = "mesh"
    if family is not None and family not in KEYPOINTS:
        raise ConfigError(f"family is {family!r}", f"expected one of {', '.join(KEYPOINTS)}", "choose mesh")
    name = str(path)
    path = Path(path)
    if not path.exists():
        if name in gestures.GESTURES:
            return gestures.builtin_template(name, canonical=canonical, family=family or "mesh")
        raise MediaError(
            f"no such file or template: {name}",
            f"expected a file, or one of {', '.join(gestures.GESTURES)}",
            "check the path",
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise MediaError(f"{path} is not a file", "expected an .npz or .pkl file", "name the template itself")
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise MediaError(
            f"cannot read {path}: {error.strerror}", "expected a readable file", "check its permissions"
        ) from error
    if size == 0:
        raise MediaError(f"{path} is empty", "expected a motion template", _REMAKE)
    if magic[:2] == b"PK":
        template = _load_npz(path, size)
    elif magic[:1] == b"\x80":
        template = liveportrait_template.load_liveportrait(path)
    else:
        raise MediaError(
            f"{path} is no motion template",
            "expected an .npz of lp-edge or a .pkl of LivePortrait (pickle protocol 2 or later)",
            "check that the file is complete and of the right kind",
        )
    if family is None or template.family == family:
        return template
    if family != "mesh":
        raise ConfigError(
            f"{path} holds motion of the family {template.family}",
            f"expected {family}: mesh points cannot be turned into its keypoints",
            "use a template of LivePortrait (.pkl), a built-in one, the clip itself, or a bundle of the family mesh",
        )
    mapping = None if template_map is None else liveportrait_template.LivePortraitMap.from_table(template_map)
    return liveportrait_template.to_mesh(template, canonical or load_canonical(), mapping)


def _load_npz(path: Path, size: int) -> MotionTemplate:
    if size > MAX_BYTES:
        raise MediaError(
            f"{path} has {size} bytes", f"expected at most {MAX_BYTES}", "cut the template into parts"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = ["header", *_TAIL]
            missing = [name for name in wanted if name not in names]
            if missing:
                raise MediaError(
                    f"{path} has no array {', '.join(missing)}",
                    f"expected {', '.join(wanted)}; it holds {', '.join(sorted(names)[:12]) or 'nothing'}",
                    "check that it is a motion template of lp-edge",
                )
            arrays, budget = {}, MAX_BYTES
            for name in wanted:
                arrays[name] = _read_member(path, archive, names[name], budget)
                budget -= arrays[name].nbytes
    except BROKEN_ARCHIVE as error:
        raise MediaError(
            f"{path} is damaged: {error}", "a complete .npz file", "copy it again or remake it"
        ) from error
    header = _header(path, arrays.pop("header"))
    family = header["family"]
    if family not in KEYPOINTS:
        raise MediaError(
            f"{path}: family {family!r}",
            f"known are {', '.join(KEYPOINTS)}",
            "convert the template or update lp-edge",
        )
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise MediaError(f"{path}: {name} is {array.dtype}", "expected floating point", _REMAKE)
    try:
        return MotionTemplate(
            fps=header["fps"],
            family=family,
            motion=Motion(**arrays),
            neutral=header["neutral"],
            source=header["source"],
            meta=header["meta"],
        )
    except MediaError as error:
        raise MediaError(f"{path}: {error.got}", error.expected, error.remedy) from error


# How NumPy writes the header of an array: the keys are sorted. Texts and numbers are let through, '|O' is refused by name.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|](?:f[248]|[iu][1248]|b1|c8|c16|U[0-9]{1,6}|O))', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), *\} *\n"
)


def _npy_header(path: Path, name: str, head: io.BytesIO) -> tuple[str, bool, tuple[int, ...]]:
    """Dtype, order and shape that an .npy member declares; leaves ``head`` at the first byte of data."""
    start = head.read(8)
    size = int.from_bytes(head.read(2 if start[6:7] == b"\x01" else 4), "little")
    match = _NPY_HEADER.fullmatch(head.read(size)) if start[:6] == b"\x93NUMPY" and size < 4096 else None
    if match is None:
        raise MediaError(
            f"{path}: {name} is no array", "an .npy member as NumPy writes it", "remake the template"
        )
    descr, fortran, shape = (part.decode("ascii") for part in match.groups())
    sizes = [part.strip() for part in shape.split(",") if part.strip()]
    if any(not part.isdecimal() or len(part) > 20 for part in sizes):
        raise MediaError(
            f"{path}: {name} has the shape ({shape[:80]})", "whole numbers", "remake the template"
        )
    return descr, fortran == "True", tuple(int(part) for part in sizes)


def _read_member(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, budget: int
) -> npt.NDArray[Any]:
    """One array of an .npz; its declared size is held against ``budget`` bytes before anything is unpacked."""
    name = info.filename
    with archive.open(info) as member:
        head = io.BytesIO(member.read(min(info.file_size, 4096)))
        descr, fortran, shape = _npy_header(path, name, head)
        if "O" in descr:
            raise MediaError(
                f"{path}: {name} holds pickled objects",
                "plain numbers",
                "do not trust this file; make the template again",
            )
        dtype = np.dtype(descr)
        nbytes = dtype.itemsize
        for n in shape:
            nbytes *= int(n)
        if nbytes < 0 or nbytes > budget:
            raise MediaError(
                f"{path}: {name} wants {nbytes} bytes", f"expected at most {budget}", "cut it into parts"
            )
        if nbytes != info.file_size - head.tell():
            raise MediaError(
                f"{path}: {name} says {shape} {dtype} but holds {info.file_size - head.tell()} bytes",
                f"expected {nbytes}",
                "copy the file again or remake it",
            )
        data = head.read() + member.read()
    if len(data) != nbytes:
        raise MediaError(
            f"{path}: {name} ends early", f"expected {nbytes} bytes, got {len(data)}", "copy it again"
        )
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array) if shape else array


def _header(path: Path, array: npt.NDArray[Any]) -> dict[str, Any]:
    def refuse(got: str, expected: str) -> MediaError:
        return MediaError(f"{path}: {got}", expected, "remake the template with this version of lp-edge")

    if array.dtype.kind != "U" or array.ndim or array.dtype.itemsize > 4 * _HEADER_CHARS:
        raise refuse(
            f"the header is {array.dtype} {array.shape}",
            f"expected a text of up to {_HEADER_CHARS} characters",
        )
    try:
        header = json.loads(str(array[()]))
    except (ValueError, RecursionError) as error:
        raise MediaError(f"{path}: the header is no JSON ({error})", "a JSON object", _REMAKE) from error
    if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
        schema = header.get("schema") if isinstance(header, dict) else None
        raise refuse(f"template schema {schema!r}", f"expected {_SCHEMA}")
    fps = header.get("fps")
    if not (isinstance(fps, list) and len(fps) == 2 and all(type(n) is int and 0 < n < 2**31 for n in fps)):
        raise refuse(f"frame rate {fps!r}", "expected two positive integers, numerator and denominator")
    if type(header.get("neutral")) is not int:
        raise refuse(f"neutral frame {header.get('neutral')!r}", "expected an integer")
    meta = header.get("meta", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise refuse("meta is no table of texts", "expected text by name")
    if not isinstance(header.get("family"), str) or not isinstance(header.get("source", ""), str):
        raise refuse("family or source is no text", "expected texts")
    return {
        "fps": Fraction(*fps),
        "neutral": header["neutral"],
        "meta": meta,
        "family": header["family"],
        "source": header.get("source", ""),
    }
