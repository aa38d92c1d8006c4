"""Which jobs a batch has: several sources with one driver, folders of sources, or a list in a CSV file.

Nothing is run here, but whatever can be told from names and options alone is refused here, before the first job runs.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lp_edge.errors import ConfigError, MediaError
from lp_edge.runtime.image import PICTURE_SUFFIXES
from lp_edge.runtime.job import RunConfig, check_request, default_output, default_stem
from lp_edge.runtime.media_read import CLIP_SUFFIXES
from lp_edge.runtime.settings import SETTINGS, read_setting, with_settings
from lp_edge.runtime.templates import MotionTemplate

__all__ = ["MAX_JOBS", "BatchJob", "jobs_of_list", "jobs_of_sources", "sources_in"]

MAX_JOBS = 100_000
"""Most jobs of one batch."""

_MAX_LIST_BYTES = 64 * 2**20
_COLUMNS = ("source", "driving", "output")


@dataclass(frozen=True)
class BatchJob:
    """One run of a batch.

    Attributes:
        name: how messages call it: the source, or file and row of a job list.
        config: the run; its ``output`` is set.
    """

    name: str
    config: RunConfig

    @property
    def output(self) -> Path:
        """The file or folder that the job writes."""
        if self.config.output is None:
            raise ConfigError(f"{self.name} has no output", "expected one", "name it")
        return Path(self.config.output)


def sources_in(folder: Path) -> list[Path]:
    """Pictures and clips in a folder by their suffix, sorted by name; hidden ones and folders inside are left out.

    Raises:
        MediaError: it cannot be read, or holds none.
    """
    suffixes = (*PICTURE_SUFFIXES, *CLIP_SUFFIXES)
    try:
        found = sorted(
            p
            for p in folder.iterdir()
            if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()
        )
    except OSError as error:
        raise MediaError(
            f"the folder {folder} cannot be read ({error.strerror or error})",
            "expected a folder of pictures and clips",
            "check the path and its permissions",
        ) from error
    if not found:
        raise MediaError(
            f"the folder {folder} holds no source",
            f"expected files with one of the suffixes {', '.join(suffixes)}",
            "name another folder",
        )
    return found


def jobs_of_sources(
    sources: Sequence[str | Path], base: RunConfig, folder: str | Path
) -> tuple[BatchJob, ...]:
    """One job for each source, all with the drivers and options of ``base``.

    Args:
        sources: pictures, clips, and folders of them.
        base: everything but source and output.
        folder: where the results go, each under the name :func:`lp_edge.runtime.job.default_output` gives it.

    Raises:
        MediaError: a folder of sources cannot be read or is empty.
        ConfigError: the output folder is one of them, two results would have one name, or one would replace an input.
    """
    folder = Path(folder)
    jobs = []
    for source in sources:
        path = Path(source)
        if path.is_dir() and folder.exists() and path.samefile(folder):
            raise ConfigError(
                f"{folder} is both the folder of the sources and of the results",
                "expected two folders, or the results would be sources the next time",
                "choose another --output",
            )
        for one in sources_in(path) if path.is_dir() else [path]:
            config = replace(base, source=one)
            jobs.append(BatchJob(str(one), replace(config, output=folder / _default_name(config))))
    return _checked(jobs)


def jobs_of_list(path: str | Path, base: RunConfig, folder: str | Path) -> tuple[BatchJob, ...]:
    """The jobs of a CSV file.

    The first row names the columns: ``source``; optionally ``driving`` (several, one per face, separated by ``|``), ``output``
    and any of :data:`lp_edge.runtime.settings.SETTINGS`. A cell that is empty takes what ``base`` says. Sources, drivers
    and keyframe files are looked up from the list's own folder, results are placed in ``folder``. Comma or semicolon
    separate; text is UTF-8; rows without any text are skipped.

    Args:
        path: the file, at most 64 MiB and :data:`MAX_JOBS` rows.
        base: what rows do not say.
        folder: the output folder.

    Raises:
        MediaError: the file, or a keyframe file of a row, cannot be read or is no text.
        ConfigError: a column is unknown or missing, or a row is wrong; the message has its number (the columns' is 1).
    """
    path, folder = Path(path), Path(folder)
    jobs = []
    for number, row in _rows(path):
        name = f"{path.name}, row {number}"
        try:
            jobs.append(_row_job(name, row, base, path.parent, folder))
        except (ConfigError, MediaError) as error:
            raise type(error)(f"{name}: {error.got}", error.expected, error.remedy) from error
        if len(jobs) > MAX_JOBS:
            raise ConfigError(f"{path} has more than {MAX_JOBS} jobs", "expected fewer", "split it")
    if not jobs:
        raise ConfigError(f"{path} lists no job", "expected at least one row below the columns", "add one")
    return _checked(jobs)


def _row_job(name: str, row: Mapping[str, str], base: RunConfig, home: Path, folder: Path) -> BatchJob:
    if not row.get("source"):
        raise ConfigError("no source", "expected a picture or clip", "fill in the column source")
    values = {
        key: read_setting(key, text, folder=home) for key, text in row.items() if text and key not in _COLUMNS
    }
    driving = base.driving
    if row.get("driving"):
        parts = [part.strip() for part in row["driving"].split("|")]
        if not all(parts):
            raise ConfigError(
                f"driving is {row['driving']!r}", "expected a driver on both sides of each |", "name it"
            )
        driving = tuple(_driver_path(part, home) for part in parts)
    config = with_settings(replace(base, source=home / row["source"], driving=driving), values)
    check_request(config)
    output = row.get("output") or _default_name(config)
    # a trailing slash means a folder of frames
    kept = f"{folder / output}/" if output.endswith("/") else folder / output
    return BatchJob(name, replace(config, output=kept))


def _driver_path(text: str, home: Path) -> str | Path:
    """A file of the list's folder, else the name of a built-in template (or of nothing, which running it tells)."""
    beside = home / text
    return beside if beside.exists() or Path(text).suffix else text


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Number and cells of every row that holds anything."""
    try:
        if path.stat().st_size > _MAX_LIST_BYTES:
            raise MediaError(
                f"{path} holds {path.stat().st_size >> 20} MiB",
                f"expected a job list of at most {_MAX_LIST_BYTES >> 20} MiB",
                "split it",
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror or error})",
            "expected a folder of sources, or a CSV file that lists jobs",
            "check the path",
        ) from error
    except UnicodeDecodeError as error:
        raise MediaError(f"{path} is no text in UTF-8", "expected a CSV file", "save it as UTF-8") from error
    if "\0" in text:
        raise MediaError(f"{path} is no text", "expected a CSV file", "check that it is the right file")
    header = next((line for line in text.splitlines() if line.strip()), "")
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=";" if ";" in header and "," not in header else ",", strict=True)
    columns: list[str] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not columns:
                columns = _columns(path, cells)
                continue
            if len(cells) > len(columns):
                raise ConfigError(
                    f"{path.name}, row {reader.line_num}: {len(cells)} cells for {len(columns)} columns",
                    "expected one cell for each column",
                    "put text that holds the separator into double quotes",
                )
            yield reader.line_num, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise MediaError(
            f"{path}, row {reader.line_num}: {error}", "expected a CSV file", "correct the row"
        ) from error


def _columns(path: Path, cells: Sequence[str]) -> list[str]:
    columns = [cell.lower().removeprefix("--").replace("_", "-") for cell in cells]
    known = (*_COLUMNS, *SETTINGS)
    for name, count in Counter(columns).items():
        if name not in known:
            raise ConfigError(
                f"{path.name}, row 1: no column is called {name!r}",
                f"expected some of {', '.join(known)}",
                "rename or remove it",
            )
        if count > 1:
            raise ConfigError(
                f"{path.name}, row 1: the column {name} is there {count} times",
                "expected it once",
                "remove one of them",
            )
    if "source" not in columns:
        raise ConfigError(
            f"{path.name}, row 1: no column source",
            "expected columns with their names in the first row",
            "add it",
        )
    return columns


def _default_name(config: RunConfig) -> str:
    try:
        return default_output(config.source, config.driving, config.options).name
    except MediaError:
        return default_stem(config.source, config.driving) + ".mp4"  # running the job tells what is wrong


def _checked(jobs: Sequence[BatchJob]) -> tuple[BatchJob, ...]:
    """Refuse results that would replace each other or an input."""
    inputs: dict[Path, str] = {}
    for job in jobs:
        for what in (job.config.source, *job.config.drivers):
            if not isinstance(what, MotionTemplate):
                inputs[Path(what).resolve()] = str(what)
    taken: dict[Path, str] = {}
    for job in jobs:
        output = job.output.resolve()
        if output in taken:
            raise ConfigError(
                f"{job.name} and {taken[output]} both write {job.output}",
                "expected a result of its own for each",
                "rename a source, or name the outputs in a job list (--batch FILE.csv)",
            )
        if output in inputs:
            raise ConfigError(
                f"{job.name} would write {job.output}, which is an input of the batch",
                "expected two different files",
                "choose another output",
            )
        taken[output] = job.name
    return tuple(jobs)
