"""Edits over time: keys, the curves between them, and the files they come in (CSV, JSON)."""

from __future__ import annotations

import csv
import io
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime.edit import Edits, read_number, slider_name

__all__ = ["INTERPOLATIONS", "Keyframe", "Keyframes", "load_keyframes"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

INTERPOLATIONS = ("linear", "smooth", "hold")
"""Ways from one key to the next: a straight line, a monotone cubic (no overshoot), a jump at the next key."""
MAX_KEYFRAME_BYTES = 16 * 2**20
MAX_SECONDS = 86_400.0


@dataclass(frozen=True)
class Keyframe:
    """Sliders at one moment.

    Attributes:
        time: seconds, 0 to one day.
        values: the sliders that this key sets; the others run on from their keys before to their keys after.
        interpolation: one of :data:`INTERPOLATIONS`, for the way from here to the next key.

    Raises:
        ConfigError: unknown slider or interpolation, a value or a time out of range.
    """

    time: float
    values: Mapping[str, float]
    interpolation: str = "linear"

    def __post_init__(self) -> None:
        if not 0.0 <= self.time <= MAX_SECONDS:
            raise ConfigError(
                f"the time of a key is {self.time:g}", f"expected 0 to {MAX_SECONDS:g} seconds", "correct it"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"interpolation is {self.interpolation!r}",
                f"expected one of {', '.join(INTERPOLATIONS)}",
                "choose linear",
            )
        values: dict[str, float] = {}
        for name, value in self.values.items():
            slider = slider_name(name)
            if slider in values:
                raise ConfigError(
                    f"a key sets {slider} twice", "expected every name once", "drop one of them"
                )
            values[slider] = value
        Edits(**values)
        object.__setattr__(self, "values", values)


def _check_rising(keys: Sequence[Keyframe]) -> None:
    for before, after in pairwise(keys):
        if not before.time < after.time:
            raise ConfigError(
                f"a key at {after.time:g} s follows one at {before.time:g} s",
                "expected rising times",
                "sort the keys; for a jump use the interpolation hold",
            )


@dataclass(frozen=True)
class _Curve:
    """One slider over time: ``T`` keys with values, slopes (per second) and the way that leaves each key."""

    times: tuple[float, ...]
    values: tuple[float, ...]
    slopes: tuple[float, ...]
    ways: tuple[str, ...]

    @staticmethod
    def through(times: list[float], values: list[float], ways: list[str]) -> _Curve:
        rise = [(b - a) / (t - s) for a, b, s, t in zip(values, values[1:], times, times[1:], strict=False)]
        slopes = [0.0] * len(times)
        for i in range(1, len(times) - 1):
            before, after = rise[i - 1], rise[i]
            # Harmonic mean of both rises (Fritsch and Butland 1984): the cubic stays between its keys.
            if before * after > 0 and ways[i - 1] == ways[i] == "smooth":
                slopes[i] = 2.0 * before * after / (before + after)
        return _Curve(tuple(times), tuple(values), tuple(slopes), tuple(ways))

    def at(self, time: float) -> float:
        i = bisect_right(self.times, time) - 1
        if i < 0:
            return self.values[0]
        if i == len(self.times) - 1 or self.ways[i] == "hold":
            return self.values[i]
        a, b, length = self.values[i], self.values[i + 1], self.times[i + 1] - self.times[i]
        u = (time - self.times[i]) / length
        if self.ways[i] == "linear":
            out = a + u * (b - a)
        else:
            rest = 1.0 - u
            out = (1.0 + 2.0 * u) * rest * rest * a + u * u * (3.0 - 2.0 * u) * b
            out += u * rest * length * (rest * self.slopes[i] - u * self.slopes[i + 1])
        return min(max(out, min(a, b)), max(a, b))  # rounding must not leave the slider's range


@dataclass(frozen=True)
class Keyframes:
    """Sliders over time.

    Every slider has a curve of its own through the keys that set it; before its first and after its last key it keeps their
    value, and a slider that no key sets stays at rest.

    Attributes:
        keys: at least one, times rising.
        length: seconds that the edit lasts; 0 = until the last key.

    Raises:
        ConfigError: no keys, times that do not rise, or a length that ends before the last key.

    Example:
        >>> way = Keyframes((Keyframe(0, {"yaw": 0}), Keyframe(2, {"yaw": 10})))
        >>> way.at(0.5).yaw, way.at(9).yaw, way.duration
        (2.5, 10.0, 2)
    """

    keys: tuple[Keyframe, ...]
    length: float = 0.0
    _curves: Mapping[str, _Curve] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not any(key.values for key in self.keys):
            raise ConfigError(
                "the keyframes set no slider", "expected at least one key with a value", "add one"
            )
        _check_rising(self.keys)
        if self.length and not self.keys[-1].time <= self.length <= MAX_SECONDS:
            raise ConfigError(
                f"the duration of the keyframes is {self.length:g} s",
                f"expected {self.keys[-1].time:g} (the last key) to {MAX_SECONDS:g} s",
                "correct it or leave it out",
            )
        rows: dict[str, tuple[list[float], list[float], list[str]]] = {}
        for key in self.keys:
            for name, value in key.values.items():
                times, values, ways = rows.setdefault(name, ([], [], []))
                times.append(key.time)
                values.append(float(value))
                ways.append(key.interpolation)
        curves = {name: _Curve.through(*columns) for name, columns in rows.items()}
        object.__setattr__(self, "_curves", curves)

    @property
    def duration(self) -> float:
        """Seconds from 0 to the end."""
        return self.length or self.keys[-1].time

    def at(self, time: float) -> Edits:
        """The sliders at ``time`` seconds, any number."""
        return Edits(**{name: curve.at(float(time)) for name, curve in self._curves.items()})


def load_keyframes(path: str | Path, *, fps: Fraction | None = None) -> Keyframes:
    """Read keyframes from a ``.csv`` or ``.json`` file.

    CSV: a header line, then one key a line. The first column is ``time`` (seconds), ``frame``, or ``frame@RATE`` (say
    ``frame@25`` or ``frame@30000/1001``); the others are sliders, and optionally ``interpolation``. An empty cell sets
    nothing. Empty lines and lines that begin with ``#`` are skipped.

    JSON: ``{"fps": 25, "interpolation": "linear", "duration": 4, "keys": [{"time": 0, "smile": 0.4}, {"frame": 50, …}]}``;
    all but ``keys`` may be left out, a key may have its own ``interpolation``, ``null`` sets nothing.

    Args:
        path: UTF-8 text of at most 16 MiB.
        fps: what a frame is where the file does not say it.

    Raises:
        MediaError: the file cannot be read.
        ConfigError: its content is wrong; the message has file and line (JSON: number of the key, from 1).
    """
    path = Path(path)
    readers: dict[str, Callable[[Path, str, Fraction | None], Keyframes]] = {
        ".csv": _read_csv,
        ".json": _read_json,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path} is no keyframe file", "expected a name that ends in .csv or .json", "rename it"
        )
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_KEYFRAME_BYTES + 1)
    except OSError as error:
        raise MediaError(
            f"cannot read {path}: {error.strerror}", "expected a readable file", "check the path"
        ) from error
    if len(data) > MAX_KEYFRAME_BYTES:
        raise MediaError(f"{path} is too large", f"expected at most {MAX_KEYFRAME_BYTES} bytes", "cut it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MediaError(
            f"{path} is no text: {error.reason}", "expected UTF-8", "save it as UTF-8"
        ) from error
    return reader(path, text, fps)


def _at(place: str, error: ConfigError) -> ConfigError:
    return ConfigError(f"{place}: {error.got}", error.expected, error.remedy)


def _rate(text: str) -> Fraction:
    # Fraction alone would compute the digits of 1e999999999
    good = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}|/[0-9]{1,9})?", text)
    try:
        rate = Fraction(text if good else 0)
    except ZeroDivisionError:
        rate = Fraction(0)
    if not Fraction(1, 10) <= rate <= 1000:
        raise ConfigError(
            f"the frame rate is {text!r}", "expected 0.1 to 1000", "write, say, 25 or 30000/1001"
        )
    return rate


def _seconds(frame: float, rate: Fraction | None) -> float:
    if rate is None:
        raise ConfigError(
            "the keys count frames, but of which rate is not said",
            'expected frame@RATE in the header (CSV) or "fps" (JSON)',
            "write, say, frame@25, or use time in seconds",
        )
    return float(Fraction(frame) / rate)


def _read_csv(path: Path, text: str, fps: Fraction | None) -> Keyframes:
    header: list[str] | None = None
    by_frame, rate = False, fps
    keys: list[Keyframe] = []
    for line, cells in _csv_rows(path, text):
        try:
            if header is None:
                clock, _, stated = cells[0].lower().partition("@")
                by_frame = clock == "frame"
                if clock not in ("time", "frame") or (stated and not by_frame):
                    raise ConfigError(
                        f"the first column is {cells[0]!r}", "expected time, frame or frame@RATE", "rename it"
                    )
                rate = _rate(stated) if stated else fps
                header = ["", *(c if c.lower() == "interpolation" else slider_name(c) for c in cells[1:])]
                twice = {name for name in header if header.count(name) > 1}
                if twice:
                    raise ConfigError(
                        f"the column {twice.pop()} is there twice", "expected every name once", "drop one"
                    )
                continue
            if len(cells) != len(header):
                raise ConfigError(
                    f"{len(cells)} cells", f"expected {len(header)} as in the header", "correct the line"
                )
            row = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            moment = read_number("frame" if by_frame else "time", row.pop("", ""))
            way = row.pop("interpolation", "linear").lower()
            values = {name: read_number(f"edit {name}", cell) for name, cell in row.items()}
            keys.append(Keyframe(_seconds(moment, rate) if by_frame else moment, values, way))
            _check_rising(keys[-2:])
        except ConfigError as error:
            raise _at(f"{path}, line {line}", error) from error
    try:
        return Keyframes(tuple(keys))
    except ConfigError as error:
        raise _at(str(path), error) from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Numbered rows of a CSV text without empty ones and comments, cells stripped."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped) and not stripped[0].startswith("#"):
                yield reader.line_num, stripped
    except csv.Error as error:
        raise ConfigError(
            f"{path}, line {reader.line_num}: {error}", "expected plain CSV", "correct it"
        ) from error


def _json_number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise ConfigError(f"{what} is {str(value)[:80]!r}", "expected a number", "correct it")
    return float(value)


def _json_rate(value: object) -> Fraction:
    return _rate(value if isinstance(value, str) else str(_json_number("fps", value)))


def _read_json(path: Path, text: str, fps: Fraction | None) -> Keyframes:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: {error.msg}", "expected JSON", "correct the file"
        ) from error
    except RecursionError as error:
        raise ConfigError(
            f"{path} is nested too deeply", "expected an object with keys", "correct it"
        ) from error
    known = ("fps", "interpolation", "duration", "keys")
    if not isinstance(content, dict) or not isinstance(content.get("keys"), list):
        raise ConfigError(
            f"{path} has no list of keys", f"expected an object with {', '.join(known)}", "correct it"
        )
    place, keys = str(path), list[Keyframe]()
    try:
        if unknown := sorted(set(content) - set(known)):
            raise ConfigError(f"no entry is called {unknown[0]!r}", f"expected {', '.join(known)}", "drop it")
        rate = fps if content.get("fps") is None else _json_rate(content["fps"])
        way = content.get("interpolation", "linear")
        for number, item in enumerate(content["keys"], 1):
            place = f"{path}, key {number}"
            keys.append(_json_key(item, rate, way))
            _check_rising(keys[-2:])
        place = str(path)
        return Keyframes(tuple(keys), _json_number("duration", content.get("duration", 0.0)))
    except ConfigError as error:
        raise _at(place, error) from error


def _json_key(item: object, rate: Fraction | None, way: str) -> Keyframe:
    values = {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else {}
    if ("time" in values) == ("frame" in values):
        raise ConfigError(
            "the key has no moment", "expected an object with either time or frame", "correct it"
        )
    way = values.pop("interpolation", way)
    if "time" in values:
        moment = _json_number("time", values.pop("time"))
    else:
        moment = _seconds(_json_number("frame", values.pop("frame")), rate)
    return Keyframe(
        moment, {name: _json_number(f"edit {name}", value) for name, value in values.items()}, way
    )
