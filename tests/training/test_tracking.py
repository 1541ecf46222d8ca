"""Rows on disk survive a kill; the bar shows the latest numbers."""

from jaxinterp.training.tracking import JsonLines, ProgressBar, read_rows


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
