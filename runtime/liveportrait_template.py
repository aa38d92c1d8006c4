"""LivePortrait's motion templates (``.pkl``): reading them without executing them, and driving a mesh with them.

A template is a pickle of ``{n_frames, output_fps, motion: [{scale, R, exp, t}], c_eyes_lst, c_lip_lst}``; older
files call the rotation ``R_d`` and the ratios ``c_d_eyes_lst`` and ``c_d_lip_lst``. The pickle is interpreted by a
small machine of our own that knows lists, dictionaries, tuples, numbers, texts and NumPy arrays and nothing else: no
class is imported, no callable is called, and what it builds is bounded.

LivePortrait computes keypoints as ``scale · (kp @ R + exp) + t`` in a crop that spans -1 … 1, with x right, y down and z
away from the camera. Rows times ``R`` is ``p @ Mᵀ`` with ``M = Rᵀ``, so transposing gives the rotation of
:class:`~lp_edge.runtime.motion.Motion`; expression, translation and scale are kept as they are.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.errors import BundleError, MediaError
from lp_edge.runtime.face_motion import Canonical, motion_from_points
from lp_edge.runtime.motion import Motion
from lp_edge.runtime.templates import MAX_FRAMES, MotionTemplate

__all__ = ["USUAL_RATIOS", "LivePortraitMap", "load_liveportrait", "load_map", "read_pickle", "to_mesh"]

F64 = npt.NDArray[np.float64]

MAX_PICKLE_BYTES = 256 * 2**20
# Every opcode makes at most one small object, so this bounds memory whatever the file says (about 130 a frame are usual).
MAX_PICKLE_OPS = 8_000_000

USUAL_RATIOS: Mapping[str, tuple[float, ...]] = MappingProxyType({"eyes": (0.3, 0.32), "lip": (0.1,)})
"""Ratios that stand in where a template has none, so that retargeting has something plausible to aim at."""

_UNSAFE = "use a template made by LivePortrait itself; do not open this file with other programs"


class _Mark:
    """Separator on the machine's stack."""


_MARK = _Mark()


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names; never looked up, never called."""

    text: str


@dataclass
class _DType:
    code: str
    order: str = "<"

    def build(self) -> np.dtype[Any]:
        return np.dtype(self.code if self.code[1:] == "1" else self.order + self.code)


@dataclass
class _Array:
    """An ndarray under construction; ``value`` is there once its state has been read."""

    value: npt.NDArray[Any] | None = None


def _array_from(data: object, dtype: object, shape: object, fortran: bool) -> npt.NDArray[Any]:
    if (
        not isinstance(dtype, _DType)
        or not isinstance(data, (bytes, bytearray))
        or not isinstance(shape, tuple)
    ):
        raise TypeError("an array's state is not (shape, dtype, order, bytes)")
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError(f"array shape {str(shape)[:80]}")
    kind = dtype.build()
    count = 1
    for n in shape:
        count *= n
    if count * kind.itemsize != len(data):
        raise ValueError(f"array of shape {shape} with {len(data)} bytes")
    return np.frombuffer(bytes(data), kind).reshape(shape, order="F" if fortran else "C")


def _make_dtype(args: tuple[Any, ...]) -> _DType:
    code = args[0] if args else None
    if not isinstance(code, str) or code.lstrip("<>=|") not in (
        "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1",
    ):  # fmt: skip
        raise ValueError(f"dtype {str(code)[:40]!r} (an array of objects?)")
    return _DType(code.lstrip("<>=|"), ">" if code.startswith(">") else "<")


def _make_empty(args: tuple[Any, ...]) -> _Array:
    return _Array()


def _make_scalar(args: tuple[Any, ...]) -> Any:
    return _array_from(args[1], args[0], (), False)[()].item()


def _make_from_buffer(args: tuple[Any, ...]) -> _Array:
    return _Array(_array_from(args[0], args[1], args[2], args[3] == "F"))


def _make_bytes(args: tuple[Any, ...]) -> bytes:
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        raise ValueError("bytes in an unknown encoding")
    return args[0].encode("latin-1")


# What a pickle of NumPy arrays calls (protocols 2 to 5, NumPy 1 and 2), and what is done instead of calling it.
_CALLS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "numpy.core.multiarray._reconstruct": _make_empty,
    "numpy._core.multiarray._reconstruct": _make_empty,
    "numpy.core.multiarray.scalar": _make_scalar,
    "numpy._core.multiarray.scalar": _make_scalar,
    "numpy.core.numeric._frombuffer": _make_from_buffer,
    "numpy._core.numeric._frombuffer": _make_from_buffer,
    "numpy.dtype": _make_dtype,
    "_codecs.encode": _make_bytes,
}
_NAMES = frozenset({*_CALLS, "numpy.ndarray"})


class _Machine:
    """Interprets the opcodes of one pickle; see the module text for what it knows."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for ops, (op, arg, _position) in enumerate(pickletools.genops(io.BytesIO(data))):
            if ops >= MAX_PICKLE_OPS:
                raise ValueError(f"more than {MAX_PICKLE_OPS} instructions")
            name = op.name
            if name in _CONSTANT:
                self.stack.append(arg)
            elif name == "STOP":
                return self.stack.pop()
            elif (step := _STEPS.get(name)) is not None:
                step(self, arg)
            else:
                raise ValueError(f"instruction {name}")
        raise ValueError("no end")

    def pop_to_mark(self) -> list[Any]:
        """What lies above the last mark, which is taken away, too."""
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ValueError("a mark is missing")
        out = self.stack[position + 1 :]
        del self.stack[position:]
        return out

    def pop(self, count: int) -> list[Any]:
        out = self.stack[-count:]
        if len(out) < count or any(item is _MARK for item in out):
            raise ValueError("the stack is empty")
        del self.stack[-count:]
        return out

    def name(self, module: object, attribute: object) -> None:
        text = f"{module}.{attribute}"
        if text not in _NAMES:
            torch = text.startswith("torch")
            raise _Refused(
                f"the template names {text[:120]!r}",
                "only NumPy arrays, lists, dictionaries and numbers are read; nothing was executed",
                "convert its tensors with .cpu().numpy() and write it again" if torch else _UNSAFE,
            )
        self.stack.append(_Name(text))

    def store(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("items for what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):  # hashing anything deeper could be made costly
                raise TypeError("a dictionary key that is neither text nor number")
            target[key] = value

    def extend(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, list):
            raise TypeError("elements for what is no list")
        target.extend(items)

    def reduce(self) -> None:
        call, args = self.pop(2)
        if not isinstance(call, _Name) or call.text not in _CALLS or not isinstance(args, tuple):
            raise ValueError("a call of what is no function")
        self.stack.append(_CALLS[call.text](args))

    def build(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, _DType) and isinstance(state, tuple) and len(state) >= 2:
            if state[1] not in ("<", ">", "|", "="):
                raise ValueError("an unknown byte order")
            target.order = ">" if state[1] == ">" else "<"
        elif isinstance(target, _Array) and isinstance(state, tuple) and len(state) == 5:
            target.value = _array_from(state[4], state[2], state[1], bool(state[3]))
        else:
            raise ValueError("a state for what has none")


class _Refused(MediaError):
    """Something that a template has no business with."""


def _wrap(m: _Machine, count: int) -> None:
    m.stack.append(tuple(m.pop(count)))


def _append(m: _Machine) -> None:
    (item,) = m.pop(1)
    m.extend(m.stack[-1], [item])


def _appends(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.extend(m.stack[-1], items)


def _setitem(m: _Machine) -> None:
    items = m.pop(2)
    m.store(m.stack[-1], items)


def _setitems(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.store(m.stack[-1], items)


def _dict(m: _Machine) -> None:
    items = m.pop_to_mark()
    m.stack.append({})
    m.store(m.stack[-1], items)


_CONSTANT = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    }
)  # fmt: skip
_STEPS: Mapping[str, Callable[[_Machine, Any], object]] = {
    "PROTO": lambda m, arg: None,
    "FRAME": lambda m, arg: None,
    "MARK": lambda m, arg: m.stack.append(_MARK),
    "POP": lambda m, arg: m.stack.pop(),
    "POP_MARK": lambda m, arg: m.pop_to_mark(),
    "DUP": lambda m, arg: m.stack.append(m.stack[-1]),
    "NONE": lambda m, arg: m.stack.append(None),
    "NEWTRUE": lambda m, arg: m.stack.append(True),
    "NEWFALSE": lambda m, arg: m.stack.append(False),
    "EMPTY_LIST": lambda m, arg: m.stack.append([]),
    "EMPTY_DICT": lambda m, arg: m.stack.append({}),
    "EMPTY_TUPLE": lambda m, arg: m.stack.append(()),
    "LIST": lambda m, arg: m.stack.append(m.pop_to_mark()),
    "TUPLE": lambda m, arg: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, arg: _wrap(m, 1),
    "TUPLE2": lambda m, arg: _wrap(m, 2),
    "TUPLE3": lambda m, arg: _wrap(m, 3),
    "DICT": lambda m, arg: _dict(m),
    "APPEND": lambda m, arg: _append(m),
    "APPENDS": lambda m, arg: _appends(m),
    "SETITEM": lambda m, arg: _setitem(m),
    "SETITEMS": lambda m, arg: _setitems(m),
    "BINPUT": lambda m, arg: m.memo.__setitem__(arg, m.stack[-1]),
    "LONG_BINPUT": lambda m, arg: m.memo.__setitem__(arg, m.stack[-1]),
    "MEMOIZE": lambda m, arg: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "BINGET": lambda m, arg: m.stack.append(m.memo[arg]),
    "LONG_BINGET": lambda m, arg: m.stack.append(m.memo[arg]),
    "GLOBAL": lambda m, arg: m.name(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, arg: m.name(*m.pop(2)),
    "REDUCE": lambda m, arg: m.reduce(),
    "BUILD": lambda m, arg: m.build(),
}


def read_pickle(path: str | Path) -> Any:
    """The content of a pickle of plain containers and NumPy arrays; nothing in it is executed.

    Arrays stand in the result as objects with a ``value``; :func:`load_liveportrait` unpacks them.

    Raises:
        MediaError: the file is too large, damaged, or names anything but NumPy arrays.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_PICKLE_BYTES:
            raise MediaError(
                f"{path} has {size} bytes", f"expected at most {MAX_PICKLE_BYTES}", "cut the template"
            )
        data = path.read_bytes()
    except OSError as error:
        raise MediaError(
            f"cannot read {path}: {error.strerror}", "expected a readable file", "check the path"
        ) from error
    try:
        return _Machine().run(data)
    except _Refused as error:
        raise MediaError(f"{path}: {error.got}", error.expected, error.remedy) from error
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RecursionError,
        Warning,
    ) as error:
        raise MediaError(
            f"{path} cannot be read as a LivePortrait template: {error}",
            "a complete pickle of NumPy arrays",
            _UNSAFE,
        ) from error


def _numbers(path: Path, what: str, item: Any, size: int) -> F64:
    """``item`` as ``size`` floats, or a MediaError that names ``what``."""
    value = item.value if isinstance(item, _Array) else item
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or value.size != size:
        got = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(item).__name__
        raise MediaError(
            f"{path}: {what} is {got}",
            f"expected {size} numbers",
            "make the template again with LivePortrait",
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is found later, with its frame
        return value.astype(np.float64).reshape(size)


def _fps(path: Path, value: Any) -> Fraction:
    number = float(_numbers(path, "output_fps", value, 1)[0])
    if not 0.1 <= number <= 1000:  # NaN fails as well
        raise MediaError(f"{path}: output_fps is {number}", "expected 0.1 to 1000", "make the template again")
    # rates of television are rounded in these files: 29.97 stands for 30000/1001
    television = Fraction(round(number * 1.001) * 1000, 1001)
    if not number.is_integer() and abs(float(television) - number) < 0.006:
        return television
    return Fraction(number).limit_denominator(10_000)


def _first_of(table: Mapping[Any, Any], *names: str) -> Any:
    return next((table[name] for name in names if name in table), None)


def load_liveportrait(path: str | Path) -> MotionTemplate:
    """Read a LivePortrait motion template of either layout.

    Returns:
        A template of the family ``liveportrait``: rotation ``Rᵀ`` of the file (see the module text), translation and scale in its
        unit (half a crop), expression ``[T, 21, 3]``, the ratios of its 203 landmarks. ``meta["ratios"]`` names those
        that the file has (``eyes lip``, ``eyes``, ``lip`` or ``none``); for others :data:`USUAL_RATIOS` stand in.

    Raises:
        MediaError: not such a template, damaged, or it would run code.
    """
    path = Path(path)
    remedy = "make the template again with LivePortrait"
    content = read_pickle(path)
    frames = content.get("motion") if isinstance(content, dict) else None
    if not isinstance(frames, list):
        got = (
            f"keys {', '.join(map(str, list(content)[:8]))}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise MediaError(
            f"{path}: no LivePortrait template ({got[:200]})", "a dictionary with 'motion'", remedy
        )
    if not 0 < len(frames) <= MAX_FRAMES:
        raise MediaError(f"{path} has {len(frames)} frames", f"expected 1 to {MAX_FRAMES}", remedy)
    columns: dict[str, list[F64]] = {"scale": [], "R": [], "exp": [], "t": []}
    sizes = {"scale": 1, "R": 9, "exp": 63, "t": 3}
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict):
            raise MediaError(f"{path}: frame {index} is {type(frame).__name__}", "a dictionary", remedy)
        for name, values in columns.items():
            item = _first_of(frame, "R", "R_d") if name == "R" else frame.get(name)
            values.append(_numbers(path, f"{name} of frame {index}", item, sizes[name]))
    count = len(frames)
    stated = content.get("n_frames")
    if isinstance(stated, int) and stated != count:
        raise MediaError(f"{path} says {stated} frames and holds {count}", "equal numbers", remedy)

    ratios: dict[str, F64] = {}
    own = []
    for name, usual in USUAL_RATIOS.items():
        rows = _first_of(content, f"c_{name}_lst", f"c_d_{name}_lst")
        if rows is None:
            ratios[name] = np.tile(usual, (count, 1))
            continue
        own.append(name)
        if not isinstance(rows, list) or len(rows) != count:
            got = str(len(rows)) if isinstance(rows, list) else type(rows).__name__
            raise MediaError(f"{path}: {got} {name} ratios for {count} frames", "one a frame", remedy)
        ratios[name] = np.stack(
            [_numbers(path, f"{name} ratio of frame {i}", r, len(usual)) for i, r in enumerate(rows)]
        )
    with np.errstate(over="ignore", invalid="ignore"):
        motion = Motion(
            rotation=np.swapaxes(np.stack(columns["R"]).reshape(count, 3, 3), 1, 2).astype(np.float32),
            translation=np.stack(columns["t"]).astype(np.float32),
            scale=np.concatenate(columns["scale"]).astype(np.float32),
            expression=np.stack(columns["exp"]).reshape(count, 21, 3).astype(np.float32),
            eye_ratio=ratios["eyes"].astype(np.float32),
            lip_ratio=ratios["lip"][:, 0].astype(np.float32),
        )
    meta = {"layout": "R_d" if "R_d" in frames[0] else "R", "ratios": " ".join(own) or "none"}
    try:
        return MotionTemplate(
            _fps(path, content.get("output_fps")), "liveportrait", motion, 0, path.name, meta
        )
    except MediaError as error:
        raise MediaError(f"{path}: {error.got}", error.expected, remedy) from error


@dataclass(frozen=True)
class LivePortraitMap:
    """What turns LivePortrait's motion into mesh motion; fitted by :mod:`lp_edge.export.mesh.fit_liveportrait`.

    Attributes:
        weights: float32 ``[63, K + 3]``: change of the 21 x 3 expression offsets → change of the K basis coefficients,
            and of LivePortrait's own eye ratios and lip ratio.
        own_ratio: float32 ``[2]``: factors that turn the ratios of 203 landmarks into those of the mesh; eyes, lips.
        rotation: float32 ``[3, 3]``, canonical face → LivePortrait's canonical axes.
        unit: inter-ocular distance in LivePortrait's canonical unit.
        pivot: float32 ``[3]``, the canonical face's origin in LivePortrait's canonical space.
    """

    weights: npt.NDArray[np.float32]
    own_ratio: npt.NDArray[np.float32]
    rotation: npt.NDArray[np.float32]
    unit: float
    pivot: npt.NDArray[np.float32]

    @staticmethod
    def from_table(table: Mapping[str, npt.NDArray[np.generic]]) -> LivePortraitMap:
        """Build from the arrays of ``liveportrait_map.npz``, a bundle's table ``liveportrait_map``.

        Raises:
            BundleError: an array is missing, has a wrong shape or holds NaN.
        """
        remedy = "export the bundle again, or reinstall lp-edge"
        try:
            arrays = {f.name: np.asarray(table[f.name]).astype(np.float32) for f in fields(LivePortraitMap)}
        except (KeyError, ValueError, TypeError) as error:
            raise BundleError(
                f"the map of LivePortrait's motion is broken: {error!r}",
                f"expected arrays {', '.join(f.name for f in fields(LivePortraitMap))}; got {sorted(table)}",
                remedy,
            ) from error
        shapes = {name: array.shape for name, array in arrays.items()}
        k = shapes["weights"][-1] if arrays["weights"].ndim == 2 else -1
        expected = {"weights": (63, k), "own_ratio": (2,), "rotation": (3, 3), "unit": (), "pivot": (3,)}
        finite = all(bool(np.isfinite(array).all()) for array in arrays.values())
        if shapes != expected or k < 3 or not finite or not arrays["unit"] > 0:
            raise BundleError(
                f"the map of LivePortrait's motion holds {shapes}",
                "expected (63, K + 3), (2,), (3, 3), (), (3,), finite, unit > 0",
                remedy,
            )
        return LivePortraitMap(**{**arrays, "unit": float(arrays["unit"])})  # type: ignore[arg-type]


def load_map(path: Path | None = None) -> LivePortraitMap:
    """Read ``liveportrait_map.npz``; ``None`` reads the one that ships with the package.

    Raises:
        BundleError: the file is missing or broken.
    """
    path = (
        path or Path(__file__).resolve().parent.parent / "engines" / "data" / "mesh" / "liveportrait_map.npz"
    )
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as table:
            return LivePortraitMap.from_table({name: table[name] for name in table.files})
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(
            f"cannot read {path}: {error}", "the map of LivePortrait's motion", "reinstall lp-edge"
        ) from error


def to_mesh(
    template: MotionTemplate, canonical: Canonical, mapping: LivePortraitMap | None = None
) -> MotionTemplate:
    """Drive a mesh with a LivePortrait template.

    Pose is exact up to the offset between both canonical faces: ``R = M · C``, ``translation = t + s · M · o``,
    ``scale = s · unit``, given in pixels of a crop of 256. Expression is linear in the change of LivePortrait's offsets
    against the neutral frame, which becomes the canonical face itself. Ratios come from the template where it has
    them, else from its offsets.

    Args:
        template: of the family ``liveportrait``; a ``mesh`` template is returned as it is.
        canonical: the canonical face of the mesh.
        mapping: ``None`` = the one that ships with the package.

    Raises:
        BundleError: ``mapping`` does not belong to ``canonical``.
    """
    if template.family == "mesh":
        return template
    mapping = mapping or load_map()
    k = len(canonical.basis)
    if mapping.weights.shape != (63, k + 3):
        raise BundleError(
            f"the map has {mapping.weights.shape[1] - 3} coefficients",
            f"the canonical face has {k}",
            "rebuild both",
        )
    m, frames = template.motion, len(template)
    turn, scale = m.rotation.astype(np.float64), m.scale.astype(np.float64)
    half = 128.0
    place = half * (1.0 + m.translation + scale[:, None] * (turn @ mapping.pivot))
    change = (m.expression - m.expression[template.neutral]).reshape(frames, 63) @ mapping.weights
    expression = np.tensordot(change[:, :k], canonical.basis, axes=1)
    rest = motion_from_points(canonical.points, canonical)
    eyes = rest.eye_ratio + mapping.own_ratio[0] * change[:, k : k + 2]
    lips = rest.lip_ratio + mapping.own_ratio[1] * change[:, k + 2]
    own = template.meta.get("ratios", "").split()
    if "eyes" in own:
        eyes = mapping.own_ratio[0] * m.eye_ratio
    if "lip" in own:
        lips = mapping.own_ratio[1] * m.lip_ratio
    return MotionTemplate(
        fps=template.fps,
        family="mesh",
        motion=Motion(
            rotation=(turn @ mapping.rotation).astype(np.float32),
            translation=place.astype(np.float32),
            scale=(half * scale * mapping.unit).astype(np.float32),
            expression=expression.astype(np.float32),
            eye_ratio=np.maximum(eyes, 0.0).astype(np.float32),
            lip_ratio=np.maximum(lips, 0.0).astype(np.float32),
        ),
        neutral=template.neutral,
        source=template.source,
        meta={**template.meta, "converted": "liveportrait to mesh"},
    )
