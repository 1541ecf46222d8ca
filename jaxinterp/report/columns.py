"""How the columns of a scoreboard look on a page. Which columns there are, the effect says that was measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxinterp.evaluation.columns import COST, RECONSTRUCTION, Answer, Column, Form
from jaxinterp.evaluation.effects import Effect
from jaxinterp.evaluation.listed_effects import effect_of
from jaxinterp.evaluation.next_token import CROSS_ENTROPY
from jaxinterp.report.text import Number, count, fixed, percent

Row = Mapping[str, Any]
"""Of a scoreboard or a log: numbers, words and intervals, as they come from the scoreboard or from JSON."""

FORMS: Mapping[Form, Callable[[Number | None], str]] = {
    "three": lambda value: fixed(value, 3),
    "one": lambda value: fixed(value, 1),
    "percent": percent,
    "count": count,
}


def shown(column: Column, value: Number | None) -> str:
    """A value of a column, as a page shows it."""
    return FORMS[column.form](value)


def answer_of(rows: Sequence[Row], effect: Effect | None = None) -> Answer:
    """The words for what was measured; those of cross-entropy where the effect brings none."""
    return (effect or effect_of(rows)).answer or CROSS_ENTROPY


def columns_of(rows: Sequence[Row], effect: Effect | None = None) -> tuple[Column, ...]:
    """The columns of a table of these rows: reconstruction, those of the effect, cost.

    Args:
      effect: with which they were measured; None: the listed one whose keys they have.
    """
    return (*RECONSTRUCTION, *(effect or effect_of(rows)).columns, *COST)
