"""Interleaved timing: wall and CPU seconds of several things, taken in turns, so that noise falls on all of them.

A round measures everything once or more, in a fixed order; ratios are taken inside a round and then summarised over
rounds. A machine that is busy for a while makes whole rounds slow and leaves most of a ratio alone. How busy others
were is kept with every round: wall seconds of many threads suffer more from company than those of one.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUIET = 0.15  # cores that others may keep busy before a sample counts as disturbed


class Sample(NamedTuple):
    """Seconds of one run: by the clock, and of all threads of the process."""

    wall: float
    cpu: float


class Spread(NamedTuple):
    """Median, least and greatest of a few numbers."""

    median: float
    least: float
    greatest: float


class Round(NamedTuple):
    """What one round measured.

    Attributes:
      samples: by name, one sample for every time that the name stands in the schedule.
      company: how many cores everything else on the machine kept busy meanwhile, on average; 0 where that cannot be
        known.
    """

    samples: dict[str, list[Sample]]
    company: float

    def middle(self, name: str, clock: str = "wall") -> float:
        """The seconds that something took, the median where it ran several times; `clock` is "wall" or "cpu"."""
        return statistics.median(getattr(sample, clock) for sample in self.samples[name])


def timed(function: Callable[[], Any]) -> tuple[Sample, Any]:
    """The seconds that function() takes in this process, and its result; it must not return before the work is done."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu), result


def interleaved(
    schedule: Sequence[tuple[str, Callable[[], Sample]]],
    repeats: int,
    *,
    warmups: int = 2,
    rest: float = 0.02,
    patience: float = 0.0,
) -> list[Round]:
    """`repeats` rounds of the schedule, after `warmups` rounds that do not count.

    Args:
      schedule: names and functions that measure themselves; a name may stand several times.
      rest: seconds between two measurements, in which the threads of the one before it go to sleep.
      patience: how many seconds a round may spend on taking samples again that others disturbed.
    """
    for _ in range(warmups):
        for _, measure in schedule:
            measure()
    rounds = []
    for _ in range(repeats):
        end = time.perf_counter() + patience
        samples: dict[str, list[Sample]] = {}
        companies = []
        for name, measure in schedule:
            sample, company = _undisturbed(measure, rest, end)
            samples.setdefault(name, []).append(sample)
            companies.append((company * sample.wall, sample.wall))
        work, wall = map(sum, zip(*companies, strict=True))
        rounds.append(Round(samples, work / wall))
    return rounds


def _undisturbed(measure: Callable[[], Sample], rest: float, end: float) -> tuple[Sample, float]:
    """A sample, and the cores that others kept busy meanwhile; until `end`, again where these were more than QUIET."""
    while True:
        time.sleep(rest)
        since, busy = time.perf_counter(), busy_seconds()
        sample = measure()
        now = time.perf_counter()
        company = max(0.0, (busy_seconds() - busy - sample.cpu) / (now - since))
        if not company > QUIET or now > end:
            return sample, company


def busy_seconds() -> float:
    """Seconds that all cores of the machine together have worked since it started (Linux; elsewhere 0)."""
    try:
        user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    except OSError:
        return 0.0
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def spread(numbers: Iterable[float]) -> Spread:
    """Median, least and greatest."""
    numbers = list(numbers)
    return Spread(statistics.median(numbers), min(numbers), max(numbers))


def seconds(rounds: Sequence[Round], name: str, clock: str = "wall") -> Spread:
    """The seconds that something took, over all samples."""
    return spread(getattr(sample, clock) for found in rounds for sample in found.samples[name])


def ratio(rounds: Sequence[Round], name: str, unit: str, clock: str = "wall") -> Spread:
    """How many times as long as `unit` something took, round by round."""
    return spread(found.middle(name, clock) / found.middle(unit, clock) for found in rounds)


def load() -> float:
    """The machine's load average over the last minute; NaN where the system gives none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
