"""What shows how far a run is where there is no terminal."""

import time

from jaxinterp.training.progress import ProgressBar, ProgressLines, progress_of, waiting

ROW = {"step": 50, "tokens": 102_400, "tokens_per_second": 7000.0, "fvu": 0.25, "l0": 32.0, "dead_fraction": 0.1}


def test_a_pipe_gets_a_line_now_and_then_also_while_nothing_is_logged(capsys):
    with ProgressLines(100, every=0.02) as shown:
        time.sleep(0.05)
        assert "training: harvesting and compiling, 0 s so far" in capsys.readouterr().out
        shown(ROW | {"step": 40})
        time.sleep(0.01)
        shown(ROW)
        time.sleep(0.05)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(
        "training: step 50 of 100, 102k tokens  7,000/s  FVU 0.250  L0 32.0  dead 10.0%, about "
    )


def test_a_short_run_says_nothing_and_one_that_is_not_shown_neither(capsys):
    with progress_of(100) as lines, progress_of(100, shown=False) as silent:
        lines(ROW)
        silent(ROW)
    assert isinstance(lines, ProgressLines) and not isinstance(silent, ProgressLines | ProgressBar)
    assert capsys.readouterr().out == ""


def test_waiting_says_what_for(capsys):
    with waiting("scoring", every=0.02):
        time.sleep(0.05)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "scoring ..." and others and others[0] == "scoring: 0 s so far"
