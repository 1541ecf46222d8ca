"""Progress lines where there is no terminal, with a fake clock: no test waits."""

import threading

import pytest

from jaxinterp.training.progress import Clock, ProgressBar, ProgressLines, counting, progress_of, waiting

ROW = {"step": 50, "tokens": 102_400, "tokens_per_second": 7000.0, "fvu": 0.25, "l0": 32.0, "dead_fraction": 0.1}


class Fake(Clock):
    """Time passes where a test says so: `pass_time` returns when the line that is due is printed."""

    def __init__(self) -> None:
        self.time, self.until, self.waits = 0.0, 0.0, 0
        self.changed = threading.Condition()

    def now(self) -> float:
        return self.time

    def wait(self, over: threading.Event, seconds: float) -> bool:
        with self.changed:
            self.until, self.waits = self.time + seconds, self.waits + 1
            self.changed.notify_all()
            while not over.is_set() and self.time < self.until:
                self.changed.wait(0.005)  # the end of the work sets `over` without a word to us
            return over.is_set()

    def pass_time(self, seconds: float) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.waits, 30)
            self.time, before = self.time + seconds, self.waits
            self.changed.notify_all()
            if self.time >= self.until:
                assert self.changed.wait_for(lambda: self.waits > before, 30)  # it waits for the next: it has spoken


@pytest.fixture
def clock():
    return Fake()


def test_a_pipe_gets_a_line_every_ten_seconds_also_while_nothing_is_logged(capsys, clock):
    with ProgressLines(100, clock=clock) as shown:
        clock.pass_time(9.9)
        assert capsys.readouterr().out == ""
        clock.pass_time(0.1)
        assert capsys.readouterr().out == "training: harvesting and compiling, 10 s so far\n"
        shown(ROW | {"step": 40})
        clock.pass_time(10)
        shown(ROW)
        clock.pass_time(10)
    lines = capsys.readouterr().out.splitlines()
    numbers = "102k tokens  7,000/s  FVU 0.250  L0 32.0  dead 10.0%"
    assert lines[0] == f"training: step 40 of 100, {numbers}"
    assert lines[1:] == [f"training: step 50 of 100, {numbers}, about 100 s left"] * 2


def test_a_short_run_says_nothing_and_one_that_is_not_shown_neither(capsys):
    with progress_of(100) as lines, progress_of(100, shown=False) as silent:
        lines(ROW)
        silent(ROW)
    assert isinstance(lines, ProgressLines) and not isinstance(silent, ProgressLines | ProgressBar)
    assert capsys.readouterr().out == ""


def test_waiting_says_what_for(capsys, clock):
    with waiting("loading", clock=clock):
        clock.pass_time(10)
        clock.pass_time(10)
    assert capsys.readouterr().out.splitlines() == [
        "loading ...",
        "loading: 10 s so far",
        "loading: 20 s so far",
    ]


def test_counted_work_says_how_much_of_it_is_over_and_what_is_left(capsys, clock):
    with counting(4, "scoring", "forward passes", clock=clock) as done:
        clock.pass_time(10)
        done()  # the first begins
        clock.pass_time(10)
        done()
        clock.pass_time(5)
        done()
        clock.pass_time(5)
    assert capsys.readouterr().out.splitlines() == [
        "scoring ...",
        "scoring: compiling, 10 s so far",
        "scoring: 0 of 4 forward passes",
        "scoring: 2 of 4 forward passes, about 20 s left",
        "scoring: 4 of 4 forward passes",
    ]


def test_counted_work_that_breaks_off_or_is_not_shown_does_not_say_that_it_is_over(capsys, clock):
    with pytest.raises(ZeroDivisionError), counting(4, "scoring", "forward passes", clock=clock) as done:
        done()
        clock.pass_time(10)
        1 / 0  # noqa: B018
    with counting(4, "scoring", "forward passes", shown=False, clock=clock) as done:
        done()
    assert capsys.readouterr().out.splitlines() == ["scoring ...", "scoring: 0 of 4 forward passes"]
