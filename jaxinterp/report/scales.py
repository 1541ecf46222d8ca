"""Axes: from a value to a pixel, and the values at which an axis is labelled.

pixel = start + (stop - start) * (t(value) - t(low)) / (t(high) - t(low)),    t = log10 on a log axis, else identity
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxinterp.report.text import Number, finite, number

_LARGEST = 1e200  # larger values are drawn at this one, so that margins and ticks do not overflow


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high` (values, low < high) drawn from `start` to `stop` (pixels)."""

    low: Number
    high: Number
    start: Number
    stop: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        """The pixel of a value; on a log axis values at or below zero stand at the low end."""
        if self.log:
            value, low, high = math.log10(max(value, self.low)), math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return self.start + (self.stop - self.start) * (value - low) / (high - low)

    def holds(self, value: Number) -> bool:
        """Whether the value lies on the axis."""
        return self.low <= value <= self.high

    def ticks(self, target: int = 5) -> tuple[float, ...]:
        """About `target` round values on the axis, at least two: 1, 2 or 5 times a power of ten apart, or decades."""
        found: tuple[float, ...] = ()
        for finer in (target, 2 * target, 4 * target):
            found = self._log_ticks(finer) if self.log else self._linear_ticks(finer)
            if len(found) > 1:  # from one value alone no distance can be read
                break
        return found

    def _linear_ticks(self, target: int) -> tuple[float, ...]:
        raw = (self.high - self.low) / max(target, 1)
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda one: abs(math.log(one / raw)))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1))

    def _log_ticks(self, target: int) -> tuple[float, ...]:
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = [power for power in range(low, high + 1) if self.holds(10.0**power)]
        if len(decades) >= 3:
            every = math.ceil(len(decades) / (target + 1))
            return tuple(10.0**power for power in decades if power % every == 0)
        finer = (factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5))
        found = tuple(value for value in finer if self.holds(value))
        return found if len(found) > 1 else self._linear_ticks(target)


def fit_scale(
    values: Iterable[Number | None],
    start: Number,
    stop: Number,
    *,
    log: bool = False,
    include: Sequence[Number] = (),
    margin: Number = 0.04,
) -> Scale:
    """The scale that holds every finite value (positive ones on a log axis) and `include`, with a margin at both ends.

    One value, or equal ones, get a range around them; no value at all gives 0 to 1 (1 to 10 on a log axis).
    """
    usable = [
        max(-_LARGEST, min(float(value), _LARGEST))
        for value in (*values, *include)
        if finite(value) and (not log or value > 1 / _LARGEST)
    ]
    if not usable:
        return Scale(1.0, 10.0, start, stop, True) if log else Scale(0.0, 1.0, start, stop)
    low, high = min(usable), max(usable)
    if log:
        if high / low < 1 + 1e-9:
            return Scale(low / 2, high * 2, start, stop, True)
        room = (high / low) ** margin
        return Scale(low / room, high * room, start, stop, True)
    spread = high - low
    if spread <= 1e-9 * max(abs(low), abs(high), 1e-300):
        room = 0.1 * abs(low) or 1.0
        return Scale(low - room, high + room, start, stop)
    # An end that was asked for (zero, most often) is the end of the axis: no margin beyond it.
    return Scale(
        low if low in include else low - margin * spread,
        high if high in include else high + margin * spread,
        start,
        stop,
    )


def tick_labels(ticks: Sequence[Number]) -> tuple[str, ...]:
    """Labels with as many decimals as the distance between the ticks asks for."""
    distances = [abs(after - before) for before, after in pairwise(ticks) if after != before]
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if not distances or largest >= 1e5 or min(distances) < 1e-4:
        return tuple(number(tick, 2) if tick else "0" for tick in ticks)
    decimals = max(0, -math.floor(math.log10(min(distances)) + 1e-9))
    return tuple(f"{tick:,.{decimals}f}".replace("-", "−") for tick in ticks)


def log_labels(ticks: Sequence[Number]) -> tuple[str, ...]:
    """Labels of a log axis: the number itself near one, a power of ten far from it."""
    return tuple(f"{tick:g}" if 1e-3 <= tick < 1e5 else number(tick, 1).replace("1×", "") for tick in ticks)
