"""The scoreboard on the page: a sentence, key numbers, a table with the best values in bold, and two dot plots.

Every word about which method is ahead is computed from the numbers, and says so as plainly when a baseline is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from jaxinterp.evaluation.columns import Column
from jaxinterp.evaluation.effects import Effect
from jaxinterp.report.columns import Row, answer_of, columns_of, shown
from jaxinterp.report.plots import Dot, Reference, dot_plot
from jaxinterp.report.text import Number, count, finite, fixed, percent, plain, short_count


def best_rows(rows: Sequence[Row], column: Column) -> frozenset[int]:
    """The rows to print in bold: the best value, and every value that reads the same at the digits shown.

    Empty where the column has no better direction, or fewer than two rows to compare.
    """
    values = {index: row[column.key] for index, row in enumerate(rows) if finite(row.get(column.key))}
    if not column.better or len(values) < 2:
        return frozenset()
    best = max(values.values(), key=lambda value: column.better * value)
    return frozenset(index for index, value in values.items() if shown(column, value) == shown(column, best))


def summary(rows: Sequence[Row], effect: Effect | None = None) -> str:
    """One sentence, as HTML: which row is best on FVU and on the model's answer after replacement, whichever it is."""
    if not rows:
        return "No scores were recorded."
    answer = answer_of(rows, effect)
    fvu = _ranking(rows, "fvu")
    kept = _ranking(rows, f"{answer.key}_replaced", answer.better)
    if not fvu and not kept:
        return f"<b>{_name(rows[0])}</b> was trained, but no score could be measured."
    budget = rows[0].get("l0")
    opening = f"With {fixed(budget, 1)} active features per token, " if finite(budget) else ""
    first = _clause(rows, fvu, "fvu", "the lowest share of unexplained variance (FVU)")
    second = _clause(rows, kept, f"{answer.key}_replaced", answer.best)
    if fvu and kept and fvu[0] == kept[0]:
        joined = f"{first[0]} has {first[1]}, and {second[1]}"
    else:
        joined = "; ".join(f"{who} has {what}" for who, what in (first, second) if who)
    clean = rows[0].get(f"{answer.key}_clean")
    ending = f"; {answer.unchanged.format(fixed(clean, 3))}." if kept and finite(clean) else "."
    sentence = opening + joined + ending
    return sentence if opening or sentence.startswith("<") else sentence[0].upper() + sentence[1:]


def _clause(rows: Sequence[Row], ranking: Sequence[int], key: str, words: str) -> tuple[str, str]:
    """Who is best on a column, and in which words: with the trained row's number where that is another row."""
    if not ranking:
        return "", ""
    best = ranking[0]
    said = f"{words}, {fixed(rows[best][key], 3)}"
    if best == 0:
        if len(ranking) > 1:
            other = ranking[1]
            doubt = _overlap(rows, 0, other, key)
            said += f" (next: {_name(rows[other])}, {fixed(rows[other][key], 3)}{doubt and f'; {doubt}'})"
    elif 0 in ranking:
        doubt = _overlap(rows, best, 0, key)
        said += f", ahead of <b>{_name(rows[0])}</b> at {fixed(rows[0][key], 3)}{doubt and f' ({doubt})'}"
    else:
        said += f" (<b>{_name(rows[0])}</b> could not be measured)"
    return (f"<b>{_name(rows[0])}</b>" if best == 0 else f"the baseline <b>{_name(rows[best])}</b>"), said


def _overlap(rows: Sequence[Row], one: int, other: int, key: str) -> str:
    """A warning where the 95 % intervals of two rows overlap."""
    first, second = (_interval(rows[index], f"{key}_interval") for index in (one, other))
    if not first or not second or first[1] < second[0] or second[1] < first[0]:
        return ""
    return "the 95\u202f% intervals overlap"


def tiles(
    rows: Sequence[Row], curves: Sequence[Row], features: int, effect: Effect | None = None
) -> tuple[tuple[str, str, str], ...]:
    """The key numbers of the trained row: name, value, note (HTML)."""
    row: Row = rows[0] if rows else {}
    rivals = [index for index in _ranking(rows, "fvu") if index != 0]
    rival = f"best baseline: {_name(rows[rivals[0]])} {fixed(rows[rivals[0]]['fvu'], 3)}" if rivals else ""
    answer = answer_of(rows, effect)
    clean, replaced, vs_zero, vs_mean = (
        row.get(f"{answer.key}_{kind}") for kind in ("clean", "replaced", "recovered_zero", "recovered_mean")
    )
    change = replaced - clean if finite(clean) and finite(replaced) else None
    sign = "+" if change is not None and change >= 0 else ""
    trained = next((one["tokens"] for one in reversed(curves) if finite(one.get("tokens"))), None)
    speeds = sorted(one["tokens_per_second"] for one in curves if finite(one.get("tokens_per_second")))
    speed = f"{count(speeds[len(speeds) // 2])} tokens per second" if speeds else ""
    return (
        ("Unexplained variance", fixed(row.get("fvu"), 3), rival),
        (
            answer.change,
            sign + fixed(change, 3),
            f"{fixed(replaced, 3)} replaced, {fixed(clean, 3)} clean ({answer.unit})",
        ),
        (f"{answer.name} recovered", percent(vs_zero), f"against zeroing; {percent(vs_mean)} against the mean"),
        ("Active per token (L0)", fixed(row.get("l0"), 1), f"of {features:,} features" if features else ""),
        ("Dead features", percent(row.get("dead_fraction")), "never fired on held-out text"),
        ("Training tokens", short_count(trained), speed),
    )


@dataclass(frozen=True)
class Head:
    """A column's name, what it means, which way is better, and whether a group starts with it."""

    name: str
    meaning: str
    arrow: str
    start: bool


@dataclass(frozen=True)
class Cell:
    """A value as it is shown, in bold where it is the best, and with its interval."""

    text: str
    interval: str
    best: bool
    broken: bool
    classes: str


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    method: str
    cells: tuple[Cell, ...]


def board(
    rows: Sequence[Row], effect: Effect | None = None
) -> tuple[tuple[tuple[str, int], ...], tuple[Head, ...], tuple[Line, ...]]:
    """The scoreboard as a table: groups of columns with their sizes, columns, and a line for every method."""
    columns, answer = columns_of(rows, effect), answer_of(rows, effect)
    starts = {column.key for before, column in pairwise(columns) if before.group != column.group}
    groups = tuple((name, len(tuple(members))) for name, members in groupby(columns, lambda column: column.group))
    arrow = {-1: "↓", 0: "", 1: "↑"}
    heads = tuple(Head(column.name, column.meaning, arrow[column.better], column.key in starts) for column in columns)
    best = {column.key: best_rows(rows, column) for column in columns}

    def cell(index: int, column: Column) -> Cell:
        value = rows[index].get(column.key)
        # The answers clean and ablated belong to the model: said once, they are dimmed where they repeat.
        of_the_model = not column.better and index > 0 and column.key.startswith(f"{answer.key}_")
        same = of_the_model and value == rows[0].get(column.key)
        ends = _interval(rows[index], column.interval) if column.interval else ()
        return Cell(
            text=shown(column, value),
            interval="–".join(shown(column, end) for end in ends),
            best=index in best[column.key],
            broken=value is not None and not finite(value),
            classes=" ".join(["start"] * (column.key in starts) + ["same"] * same),
        )

    lines = tuple(
        Line(str(row.get("method", "?")), tuple(cell(index, column) for column in columns))
        for index, row in enumerate(rows)
    )
    return groups, heads, lines


def dot_plots(rows: Sequence[Row], effect: Effect | None = None) -> tuple[str, str]:
    """FVU and the model's answer after replacement with their 95 % intervals, as two SVG charts."""

    def dots(key: str) -> list[Dot]:
        return [
            Dot(str(row.get("method", "?")), row.get(key), row.get(f"{key}_interval"), emphasis=index == 0)
            for index, row in enumerate(rows)
        ]

    first: Row = rows[0] if rows else {}
    scale = [Reference("perfect", 0.0, bare=True), Reference("mean output", 1.0, bare=True)]
    answer = answer_of(rows, effect)
    lines = [Reference(name, first.get(f"{answer.key}_{name}")) for name in ("clean", "mean", "zero")]
    title = f"{answer.title}, by method"
    return (
        dot_plot(dots("fvu"), title="FVU by method", references=scale, show=_three),
        dot_plot(dots(f"{answer.key}_replaced"), title=title, references=lines, show=_three),
    )


def _three(value: Number | None) -> str:
    return fixed(value, 3)


def _ranking(rows: Sequence[Row], key: str, better: int = -1) -> list[int]:
    """The rows that have a value, the best first; the trained row before a baseline that ties with it."""
    with_value = (index for index, row in enumerate(rows) if finite(row.get(key)))
    return sorted(with_value, key=lambda index: (-better * rows[index][key], index))


def _interval(row: Row, key: str) -> tuple[Number, ...]:
    ends = tuple(row.get(key) or ())
    return ends if len(ends) == 2 and all(map(finite, ends)) else ()


def _name(row: Row) -> str:
    return plain(row.get("method", "?"))
