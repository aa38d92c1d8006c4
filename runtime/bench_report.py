"""What measurements are given out as: JSON lines, a Markdown table, a table on the console."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lp_edge.runtime.image import cannot_write, check_folder, create_beside, publish

__all__ = ["Table", "lines_to", "partial_of", "write_markdown"]


@dataclass
class Table:
    """A table for people.

    Attributes:
        title: what it shows.
        columns: headings.
        rows: cells; numbers are written with three significant digits, None as a dash.
        notes: sentences below.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Every cell as text."""
        return [[_text(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        """The table in Markdown, with heading and notes."""
        lines = [f"### {self.title}", "", _line(self.columns), "|" + "---|" * len(self.columns)]
        lines += [_line(row) for row in self.cells()]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def print(self) -> None:
        """Show it on standard output."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as Shown

        cells = self.cells()
        widest = [max(map(len, column)) for column in zip(self.columns, *cells, strict=True)]
        console = Console(soft_wrap=True, highlight=False)
        if not console.is_terminal:  # a file or pipe has no width of its own
            console.width = max(console.width, sum(widest) + 2 * len(widest))
        shown = Shown(title=escape(self.title), title_justify="left", title_style="bold", box=None)
        for column in self.columns:
            numbers = all(not isinstance(row[len(shown.columns)], str) for row in self.rows)
            shown.add_column(escape(column), justify="right" if numbers else "left", overflow="fold")
        for row in cells:
            shown.add_row(*map(escape, row))
        console.print(shown)
        for note in self.notes:
            console.print(escape(note))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def partial_of(path: Path) -> Path:
    """Where :func:`lines_to` keeps the records of a run that is not done: ``FILE.partial``."""
    path = path.resolve()
    return path.with_name(f"{path.name}.partial")


@contextmanager
def lines_to(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a record as a line of JSON at once, so that a run that is stopped leaves what it has measured.

    Records go to :func:`partial_of` the file, which takes its place when the block ends well. A block that raises leaves the
    file as it was, and the partial file if there is a record in it. What is no regular file (a pipe, say) is written directly.

    Args:
        path: the file, replaced if there is one; None = nowhere; ``-`` = standard output.

    Raises:
        OutputError: it cannot be written; told before the first record where it can be known.
    """
    if path is None:
        yield lambda record: None
        return
    if str(path) == "-":
        yield lambda record: print(_json(record), flush=True)
        return
    check_folder(path)
    direct = path.exists() and not path.is_file()
    written = path if direct else partial_of(path)
    count = 0
    try:
        # Opened to append: what an earlier run has left stays until there is something in its place.
        file = written.open("w" if direct else "a", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error

    def write(record: dict[str, Any]) -> None:
        nonlocal count
        try:
            if not count and not direct:
                file.truncate(0)
            file.write(_json(record) + "\n")
            file.flush()
        except OSError as error:
            raise cannot_write(path, error) from error
        count += 1

    try:
        with file:
            yield write
    finally:
        if not direct and not count and not os.path.getsize(written):
            written.unlink()
    if not direct and count:
        try:
            publish(written, path.resolve())
        except OSError as error:
            raise cannot_write(path, error) from error


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False)


def write_markdown(path: Path, tables: Iterable[Table]) -> None:
    """Tables one below the other, in place of what was there; OutputError when it cannot be written."""
    text = "\n".join(table.markdown() for table in tables)
    direct = path.exists() and not path.is_file()
    target = path.resolve()
    part = path if direct and not path.is_dir() else create_beside(target)
    try:
        part.write_text(text, encoding="utf-8")
        if not direct:
            publish(part, target)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if not direct:
            part.unlink(missing_ok=True)
