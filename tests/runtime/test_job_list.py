"""Which jobs a batch has, and what is refused before any of them runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lp_edge.errors import ConfigError, LpEdgeError, MediaError
from lp_edge.runtime.edit import Edits
from lp_edge.runtime.image import write_image
from lp_edge.runtime.job import RunConfig
from lp_edge.runtime.job_list import jobs_of_list, jobs_of_sources, sources_in

BASE = RunConfig("", "nod")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.png", "a.jpg", ".hidden.png"):
        write_image(folder / name, np.zeros((64, 64, 3), np.uint8))
    (folder / "notes.txt").write_text("no source")
    (folder / "sub.png").mkdir()
    return folder


def test_a_folder_gives_its_pictures_and_clips_in_order(pictures: Path) -> None:
    (pictures / "c.MP4").write_bytes(b"x")
    assert [p.name for p in sources_in(pictures)] == ["a.jpg", "b.png", "c.MP4"]
    (pictures.parent / "none").mkdir()
    with pytest.raises(MediaError, match="holds no source"):
        sources_in(pictures.parent / "none")
    with pytest.raises(MediaError, match="nowhere"):
        sources_in(pictures.parent / "nowhere")


def test_sources_and_folders_become_jobs_with_results_of_their_own(pictures: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "z.png", np.zeros((64, 64, 3), np.uint8))
    jobs = jobs_of_sources([tmp_path / "z.png", pictures], BASE, tmp_path / "out")
    assert [Path(j.config.source).name for j in jobs] == ["z.png", "a.jpg", "b.png"]
    assert [j.output for j in jobs] == [tmp_path / "out" / f"{n}--nod.mp4" for n in "zab"]
    assert all(j.config.driving == "nod" for j in jobs)


def test_a_source_that_cannot_be_read_is_left_to_its_own_job(pictures: Path, tmp_path: Path) -> None:
    jobs = jobs_of_sources([tmp_path / "gone.jpg", pictures / "a.jpg"], BASE, tmp_path / "out")
    assert [j.output.name for j in jobs] == ["gone--nod.mp4", "a--nod.mp4"]


def listed(tmp_path: Path, text: str, name: str = "jobs.csv") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_list_says_everything_by_row(pictures: Path, tmp_path: Path) -> None:
    path = listed(
        pictures,
        "source,driving,output,region,multiplier,edit,side-by-side\n"
        "a.jpg,,,lip,,,\n"
        "\n"
        'b.png,talk,second.webm,,1.5,"smile=0.4,yaw=10",yes\n'
        "a.jpg,nod|shake,frames/,,,,\n",
    )
    first, second, third = jobs_of_list(path, BASE, tmp_path / "out")
    assert (first.name, first.config.source, first.output) == (
        "jobs.csv, row 2",
        pictures / "a.jpg",
        tmp_path / "out" / "a--nod.mp4",
    )
    assert (first.config.driving, first.config.options.region, first.config.options.multiplier) == (
        "nod",
        "lip",
        1,
    )
    assert second.name == "jobs.csv, row 4"
    assert second.config.drivers == ("talk",)
    assert second.output == tmp_path / "out" / "second.webm"
    assert second.config.options.edits == Edits(smile=0.4, yaw=10)
    assert second.config.side_by_side is True
    assert third.config.drivers == ("nod", "shake")
    assert str(third.config.output).endswith("frames/")


def test_a_list_may_come_from_a_spreadsheet(pictures: Path, tmp_path: Path) -> None:
    path = pictures / "jobs.csv"
    path.write_bytes("\ufeffSource;Face_Timeout;--edit\r\na.jpg;2,5;\r\n".replace("2,5", "2.5").encode())
    (job,) = jobs_of_list(path, BASE, tmp_path)
    assert job.config.options.face_timeout == 2.5


def test_drivers_are_files_beside_the_list_or_built_in(pictures: Path, tmp_path: Path) -> None:
    path = listed(
        pictures, "source,driving,output\na.jpg,b.png,1.mp4\na.jpg,blink,2.mp4\na.jpg,gone.mp4,3.mp4\n"
    )
    drivers = [j.config.drivers[0] for j in jobs_of_list(path, BASE, tmp_path)]
    assert drivers == [pictures / "b.png", "blink", pictures / "gone.mp4"]


def test_edits_alone_need_no_driver(pictures: Path, tmp_path: Path) -> None:
    path = listed(pictures, "source,edit\na.jpg,smile=0.4\n")
    (job,) = jobs_of_list(path, RunConfig(""), tmp_path)
    assert (job.config.drivers, job.output.name) == ((), "a--edit.png")


WRONG = {
    "unknown_column": ("source,mouth\na.jpg,1\n", ConfigError, "row 1: no column is called 'mouth'"),
    "whole_batch_column": ("source,bundle\na.jpg,x\n", ConfigError, "bundle"),
    "column_twice": ("source,region,region\na.jpg,lip,exp\n", ConfigError, "row 1: the column region"),
    "no_source_column": ("driving\nnod\n", ConfigError, "no column source"),
    "no_source": ("source,region\na.jpg,lip\n,exp\n", ConfigError, "row 3: no source"),
    "option_out_of_range": ("source,multiplier\na.jpg,1\nb.png,9\n", ConfigError, "row 3: multiplier is 9"),
    "option_no_number": ("source,multiplier\na.jpg,much\n", ConfigError, "row 2: multiplier is 'much'"),
    "unknown_edit": ("source,edit\na.jpg,grimace=1\n", ConfigError, "row 2: no edit is called 'grimace'"),
    "unknown_face": ("source,faces\na.jpg,left\n", ConfigError, "row 2: faces is 'left'"),
    "too_many_cells": ("source,edit\na.jpg,smile=0.4,yaw=10\n", ConfigError, "row 2: 3 cells for 2 columns"),
    "open_quote": ('source,edit\na.jpg,"smile=0.4\n', MediaError, "row 2"),
    "empty": ("", ConfigError, "lists no job"),
    "columns_only": ("source,driving\n", ConfigError, "lists no job"),
    "same_output": ("source,output\na.jpg,x.mp4\nb.png,x.mp4\n", ConfigError, "row 3 and jobs.csv, row 2 both write"),
    "output_is_an_input": ("source,output\na.jpg,x.mp4\nb.png,{in}/a.jpg\n", ConfigError, "an input of the batch"),
    "nothing_to_do": ("source,driving\na.jpg,\n", ConfigError, "row 2: neither a driver nor an edit"),
    "keyframes_missing": ("source,edit-file\na.jpg,gone.csv\n", MediaError, "row 2: cannot read"),
    "driver_left_out": ("source,driving\na.jpg,nod|\n", ConfigError, "row 2: driving is 'nod|'"),
    "edits_twice": ("source,edit,edit-file\na.jpg,smile=0.4,keys.csv\n", ConfigError, "row 2: edits and keyframes"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_list_is_refused_with_its_row(pictures: Path, tmp_path: Path, name: str) -> None:
    text, kind, words = WRONG[name]
    (pictures / "keys.csv").write_text("time,smile\n0,1\n")
    path = listed(pictures, text.replace("{in}", str(pictures)))
    base = RunConfig("") if name == "nothing_to_do" else BASE
    with pytest.raises(kind) as caught:
        jobs_of_list(path, base, tmp_path / "out")
    assert words in caught.value.got
    assert "jobs.csv" in caught.value.got or name in ("same_output", "output_is_an_input")


@pytest.mark.parametrize(
    "data", [b"\xff\xfe\x00bad", b"source\0\nx\n", None], ids=["encoding", "zeros", "missing"]
)
def test_an_unreadable_list_is_refused(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "jobs.csv"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(MediaError, match=r"jobs\.csv"):
        jobs_of_list(path, BASE, tmp_path)


def test_results_that_collide_are_refused(pictures: Path, tmp_path: Path) -> None:
    write_image(pictures / "a.png", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"a\.png and .*a\.jpg both write"):
        jobs_of_sources([pictures], BASE, tmp_path / "out")
    with pytest.raises(ConfigError, match="both the folder of the sources and of the results"):
        jobs_of_sources([pictures], BASE, pictures)
    with pytest.raises(ConfigError, match="both write"):
        jobs_of_sources([pictures / "b.png"] * 2, BASE, tmp_path)


def test_every_refusal_says_what_to_do(pictures: Path, tmp_path: Path) -> None:
    for text, _, _ in WRONG.values():
        try:
            jobs_of_list(listed(pictures, text), BASE, tmp_path / "out")
        except LpEdgeError as error:
            assert error.expected
            assert error.remedy
