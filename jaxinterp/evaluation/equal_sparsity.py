"""Methods at equal sparsity: their numbers at one L0 by interpolation, their order, and how two metrics agree."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from scipy.stats import spearmanr

from jaxinterp.core.json_value import Json
from jaxinterp.evaluation.effects import Row

METRICS = ("fvu", "ce_replaced", "ce_recovered_zero", "ce_recovered_mean", "kl", "top1_agreement", "dead_fraction")
"""What is read off at equal L0."""

NEAR = 0.1
"""L0 within this fraction of the one asked for counts as equal."""


def at_l0(rows: Sequence[Row], l0: float | int) -> Row:
    """A method's numbers where so many features are active: measured, or between two measured settings.

    Between two settings every metric is linear in log L0; what else the two have in common is kept, intervals are not.
    `how` says which: "measured" (within a tenth), "between", or "nearest" where no two settings enclose the L0, and the
    numbers belong to the `l0` that the row has.
    """
    near = min(rows, key=lambda row: abs(math.log(max(row["l0"], 1e-9) / l0)))
    if equal_l0(near["l0"], l0):
        return near | {"how": "measured"}
    for low, high in pairwise(sorted((row for row in rows if row["l0"] > 0), key=lambda row: row["l0"])):
        if low["l0"] < l0 < high["l0"]:
            share = math.log(l0 / low["l0"]) / math.log(high["l0"] / low["l0"])
            between = {name: (1 - share) * low[name] + share * high[name] for name in METRICS}
            same = {name: value for name, value in low.items() if value == high.get(name)}
            return same | between | {"l0": float(l0), "how": "between"}
    return near | {"how": "nearest"}


def equal_l0(one: float | int, other: float | int) -> bool:
    """Whether two L0 count as equal."""
    return abs(one - other) <= NEAR * other


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows whose L0 is that which was asked for, and whose numbers are finite."""
    return [row for row in rows if row["how"] != "nearest" and math.isfinite(row["fvu"] + row["ce_replaced"])]


def ahead(rows: Sequence[Row], key: str) -> list[Row]:
    """All rows, the lowest first, NaN last."""
    return sorted(rows, key=lambda row: (math.isnan(row[key]), row[key]))


def order(one: Mapping[str, Json], other: Mapping[str, Json], key: str = "ce_replaced") -> str:
    """Whether `one` is "lower" or "higher" than `other`, or "level": their 95 % intervals overlap."""
    (low, high), (other_low, other_high) = one[f"{key}_interval"], other[f"{key}_interval"]
    return "lower" if high < other_low else "higher" if low > other_high else "level"


def agreement(rows: Sequence[Row], key: str, other: str) -> float | None:
    """Spearman's rank correlation of two metrics over the rows; None for fewer than four, or where all are equal."""
    columns = [[row[name] for row in rows] for name in (key, other)]
    if len(rows) < 4 or any(len(set(column)) == 1 for column in columns):
        return None
    return float(spearmanr(*columns).statistic)
