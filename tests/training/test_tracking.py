"""Rows on disk survive a kill; the bar shows the latest numbers."""

import os
import resource
import warnings
from pathlib import Path

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.training.progress import ProgressBar
from jaxinterp.training.tracking import JsonLines, read_rows


def test_rows_are_appended_and_a_resumed_run_replaces_what_it_repeats(tmp_path):
    path = tmp_path / "runs" / "log.jsonl"
    log = JsonLines(path)
    for step in (10, 20, 30):
        log({"step": step, "loss": 1.0})
    again = JsonLines(path, resume=True)
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30]
    again({"step": 20, "loss": 2.0})
    again({"step": 30, "loss": 2.0})
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(10, 1.0), (20, 2.0), (30, 2.0)]
    JsonLines(path)
    assert read_rows(path) == [] and read_rows(tmp_path / "absent") == []


def test_a_file_of_other_rows_is_refused_and_stays(tmp_path):
    path = tmp_path / "others.jsonl"
    for other in ('{"text": "of mine"}', "[1]", '{"step": "one"}'):
        content = f'{{"step": 1}}\n{other}\n'
        path.write_text(content)
        with pytest.raises(UserError, match=r"others\.jsonl, line 2: no row of a run"):
            JsonLines(path, resume=True)
        assert path.read_text() == content


def test_a_resumed_log_is_replaced_in_one_step(tmp_path, monkeypatch):
    """Killed while it writes the rows that stay: the file is as it was."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    before, killed = path.read_text(), KeyboardInterrupt()
    real = Path.write_text

    def half(file, text):
        real(file, text[: len(text) // 2])
        raise killed

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, resume=True)({"step": 3})
    assert path.read_text() == before


def test_a_full_disk_is_told_once_and_ends_no_run(tmp_path):
    path = tmp_path / "log.jsonl"
    path.symlink_to("/dev/full")
    log = JsonLines(path)
    with pytest.warns(UserWarning, match=r"log\.jsonl could not be written \(.*No space left"):
        log({"step": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log({"step": 2})
        path.unlink()
        log({"step": 3})
    assert read_rows(path) == [{"step": 3}]


def test_half_a_row_is_not_left_behind(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        with pytest.warns(UserWarning, match="could not be written"):
            log({"step": 2, "words": "x" * 40})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log({"step": 3})
    assert read_rows(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 3}]
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_the_bar_shows_tokens_rate_fvu_l0_and_dead_features():
    with ProgressBar(100) as bar:
        bar({"step": 50, "tokens": 102_400, "tokens_per_second": 7000.0, "fvu": 0.25, "l0": 32.0, "dead_fraction": 0.1})
        task = bar._progress.tasks[0]
        column = bar._progress.columns[3]
        assert str(column.render(task)) == "102k tokens  7,000/s  FVU 0.250  L0 32.0  dead 10.0%"
        assert task.percentage == 50
    with ProgressBar(100) as idle:
        assert str(idle._progress.columns[3].render(idle._progress.tasks[0])) == "compiling"
    assert idle._progress.tasks[0].description == "already trained"
