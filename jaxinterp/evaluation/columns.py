"""Columns of a scoreboard as data: a key of the rows, what it means, how it is shown. An effect brings its own.

Nothing here formats a number: the page (`report.columns`) and the command line render what they get.
"""

from dataclasses import dataclass
from typing import Literal

Form = Literal["three", "one", "percent", "count"]
"""How a number is shown on a page: three decimals, one, a percentage, or thousands with commas."""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
      key: of the rows.
      name: the title; group: the title above several columns.
      meaning: one sentence, without abbreviations.
      form: how a page shows the number.
      better: +1 up, -1 down, 0 neither.
      interval: the key of the column's interval.
      short: the title on a terminal of 80 columns; "": not shown there.
      printed: how a terminal shows the number.
    """

    key: str
    name: str
    group: str
    meaning: str
    form: Form = "three"
    better: int = 0
    interval: str | None = None
    short: str = ""
    printed: str = "{:.3f}"


@dataclass(frozen=True)
class Answer:
    """The words for what an effect reads of the model.

    Attributes:
      key: what its keys in a row begin with: `{key}_clean`, `{key}_replaced` and so on.
      better: +1 up, -1 down.
      name, title, note, unit, change, best, unchanged: words of the page; `unchanged` has a place for a number.
      about: what a terminal calls it, with its abbreviation; counted: on how many of what it was measured, with a place
        for the number under `counted_key`.
    """

    key: str
    better: int
    name: str
    title: str
    note: str
    unit: str
    change: str
    best: str
    unchanged: str
    about: str
    counted: str
    counted_key: str = "compared"


RECONSTRUCTION = (
    Column(
        "fvu",
        "FVU",
        "Reconstruction",
        "Fraction of the variance of the MLP's output that is left unexplained on held-out text; 0 is perfect, "
        "1: no better than the mean.",
        "three",
        -1,
        "fvu_interval",
        short="FVU",
    ),
    Column(
        "l0", "L0", "Reconstruction", "Mean number of components in use per token.", "one", short="L0", printed="{:.0f}"
    ),
    Column(
        "dead_fraction",
        "Dead",
        "Reconstruction",
        "Fraction of the components that never fired on the held-out tokens.",
        "percent",
        -1,
        short="dead",
        printed="{:.1%}",
    ),
)
"""What every row has: how well the array is rebuilt."""

COST = (
    Column("tokens", "Tokens", "Cost", "Number of held-out tokens that the row was measured on.", "count"),
    Column(
        "seconds",
        "Seconds",
        "Cost",
        "Wall-clock seconds of training; the baselines are solved together and share one number.",
        "one",
    ),
)
"""What every row has, at the end."""
