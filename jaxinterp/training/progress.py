"""How far a run is: a bar on a terminal or in a notebook; elsewhere (a pipe, a file) a line every ten seconds.

with progress_of(steps) as shown:     shown(row) after every logged step
with counting(40, "scoring", "forward passes") as done:     done() after every part of other work
with waiting("loading"):              for work that says nothing by itself
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from jaxtyping import PyTree
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from jaxinterp.core.json_value import Json

EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


@runtime_checkable
class Shown(Protocol):
    """Shows a run while it is open; called with a row of plain numbers at every logged step."""

    def __enter__(self) -> PyTree: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __call__(self, row: Mapping[str, Json]) -> None: ...


class Clock:
    """The time, and waiting for an event: what a test puts its own in place of."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def wait(self, over: threading.Event, seconds: float) -> bool:
        """Wait until the event is set or so many seconds are over; True where it is set."""
        return over.wait(seconds)


CLOCK = Clock()


def progress_of(
    steps: int,
    description: str = "training",
    *,
    shown: bool = True,
    every: float = EVERY,
    unit: str = "",
    clock: Clock | None = None,
) -> Shown:
    """What shows a run of so many steps: a bar, or lines if standard output is not a terminal; nothing unless shown.

    unit: what is counted, where it is not steps of training.
    """
    if not shown:
        return _Silent()
    console = Console()
    if console.is_terminal or console.is_jupyter:
        return ProgressBar(steps, description)
    return ProgressLines(steps, description, every=every, unit=unit, clock=clock or CLOCK)


@contextmanager
def waiting(what: str, *, every: float = EVERY, clock: Clock = CLOCK) -> Iterator[None]:
    """Say what is being done, and where there is no terminal that it still is, every ten seconds."""
    start = clock.now()
    print(f"{what} ...", flush=True)
    line = lambda: f"{what}: {clock.now() - start:.0f} s so far"
    with nullcontext() if Console().is_terminal else _Beat(every, line, clock):
        yield


def silent() -> None:
    """The `done` of work that is not shown."""


@contextmanager
def counting(
    total: int, what: str, unit: str, *, shown: bool = True, every: float = EVERY, clock: Clock = CLOCK
) -> Iterator[Callable[[], None]]:
    """Show work of `total` equal parts, as training is shown: a bar on a terminal, elsewhere a line every ten seconds.

    Yields:
      what is to be called whenever a part begins.

    Example:
      >>> with counting(2, "scoring", "batches", shown=False) as done:
      ...     for _ in range(2):
      ...         done()
    """
    if not shown:
        yield silent
        return
    print(f"{what} ...", flush=True)
    with progress_of(total, what, unit=unit, every=every, clock=clock) as told:
        begun = 0

        def done() -> None:
            nonlocal begun
            told({"step": begun})  # this part begins, so that those before it are over
            begun += 1

        yield done
        told({"step": total})


class _Silent:
    def __enter__(self) -> "_Silent":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, row: Mapping[str, Json]) -> None: ...


class ProgressLines:
    """A line of plain text every few seconds; none for a run that is over before the first is due."""

    def __init__(
        self, steps: int, description: str = "training", *, every: float = EVERY, unit: str = "", clock: Clock = CLOCK
    ):
        self._steps, self._description, self._unit, self._clock = steps, description, unit, clock
        self._row: Mapping[str, Json] | None = None
        self._start = clock.now()
        self._beat = _Beat(every, self._line, clock)
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> "ProgressLines":
        self._start = self._clock.now()
        self._beat.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beat.__exit__(kind, error, trace)
        if self._beat.beats and error is None and self._row is not None:
            print(self._line(), flush=True)

    def __call__(self, row: Mapping[str, Json]) -> None:
        self._row = dict(row)
        self._first = self._first or (self._clock.now(), int(row["step"]))

    def _line(self) -> str:
        if self._row is None or self._first is None:
            begins = "compiling" if self._unit else "harvesting and compiling"
            return f"{self._description}: {begins}, {self._clock.now() - self._start:.0f} s so far"
        since, first = self._first
        done = int(self._row["step"])
        rate = (self._clock.now() - since) / (done - first) if done > first else None
        left = "" if rate is None or done >= self._steps else f", about {rate * (self._steps - done):.0f} s left"
        if self._unit:
            return f"{self._description}: {done:,} of {self._steps:,} {self._unit}{left}"
        return f"{self._description}: step {done:,} of {self._steps:,}, {in_words(self._row)}{left}"


class ProgressBar:
    """A bar with tokens, tokens per second, FVU, L0, dead features and the time left."""

    def __init__(self, steps: int, description: str = "training"):
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Numbers(), TimeRemainingColumn()
        )
        self._task = self._progress.add_task(description, total=steps)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task = self._progress.tasks[0]
        if error is None and not task.fields.get("row"):  # a finished run was resumed
            self._progress.update(self._task, completed=task.total, row={}, description="already trained")
        self._progress.stop()

    def __call__(self, row: Mapping[str, Json]) -> None:
        self._progress.update(self._task, completed=row["step"], row=dict(row))


class _Numbers(ProgressColumn):
    """The latest row, in words."""

    def render(self, task: Any) -> Text:
        row = task.fields.get("row")
        if not row:
            return Text("compiling" if row is None else "")
        return Text(in_words(row))


def in_words(row: Mapping[str, Json]) -> str:
    """`410k tokens  2,512/s  FVU 0.181  L0 32.0  dead 0.2%`: of the numbers of a row, those that it has."""
    if "tokens" not in row:  # other work than training
        return ""
    parts = [f"{row['tokens'] / 1e3:,.0f}k tokens", f"{row['tokens_per_second']:,.0f}/s"]
    parts += [f"{label} {row[name]:.3f}" for label, name in (("FVU", "fvu"), ("loss", "loss")) if name in row][:1]
    parts += [f"L0 {row['l0']:.1f}"] if "l0" in row else []
    parts += [f"dead {row['dead_fraction']:.1%}"] if "dead_fraction" in row else []
    return "  ".join(parts)


class _Beat:
    """Prints a line every few seconds, from a thread of its own, while it is open."""

    def __init__(self, every: float, line: Callable[[], str], clock: Clock):
        self._every, self._line, self._clock, self.beats = every, line, clock, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._clock.wait(self._over, self._every):
            self.beats += 1
            print(self._line(), flush=True)

    def __enter__(self) -> "_Beat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
