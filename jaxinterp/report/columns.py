"""The columns of the scoreboard, and how a page speaks of the model's answer: cross-entropy, or embeddings.

Which of the two it is, the keys of the rows say: `ce_replaced` or `similarity_replaced`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinterp.report.text import Number, count, fixed, percent

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its key in a row, what it means, how it is shown, which way is better (+1 up, -1 down, 0 neither)."""

    key: str
    name: str
    group: str
    meaning: str
    show: Callable[[Number | None], str]
    better: int = 0
    interval: str | None = None


def _three(value: Number | None) -> str:
    return fixed(value, 3)


@dataclass(frozen=True)
class Answer:
    """The words for one kind of answer.

    key: what its keys in a row begin with; better: +1 up, -1 down; the rest are words of the page.
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


CROSS_ENTROPY = Answer(
    key="ce",
    better=-1,
    name="Cross-entropy",
    title="Cross-entropy with the MLP replaced",
    note="nats per token, lower is better",
    unit="nats",
    change="Cross-entropy added",
    best="the lowest cross-entropy when it stands in for the MLP",
    unchanged="unchanged, the model has {}",
)
SIMILARITY = Answer(
    key="similarity",
    better=+1,
    name="Similarity",
    title="Similarity of embeddings with the MLP replaced",
    note="cosine with the unchanged model's, higher is better",
    unit="cosine",
    change="Change of similarity",
    best="the embeddings most similar to the unchanged model's when it stands in for the MLP",
    unchanged="at {} nothing would have changed",
)

RECONSTRUCTION = (
    Column(
        "fvu",
        "FVU",
        "Reconstruction",
        "Fraction of the variance of the MLP's output that is left unexplained on held-out text; 0 is perfect, "
        "1: no better than the mean.",
        _three,
        -1,
        "fvu_interval",
    ),
    Column("l0", "L0", "Reconstruction", "Mean number of components in use per token.", lambda value: fixed(value, 1)),
    Column(
        "dead_fraction",
        "Dead",
        "Reconstruction",
        "Fraction of the components that never fired on the held-out tokens.",
        percent,
        -1,
    ),
)

OF_CROSS_ENTROPY = (
    Column(
        "ce_replaced",
        "Replaced",
        "Cross-entropy, nats per token",
        "The model's cross-entropy on held-out text with the MLP replaced by this row.",
        _three,
        -1,
        "ce_replaced_interval",
    ),
    Column(
        "ce_clean",
        "Clean",
        "Cross-entropy, nats per token",
        "The unchanged model's cross-entropy: what a perfect replacement would reach.",
        _three,
    ),
    Column(
        "ce_mean",
        "Mean",
        "Cross-entropy, nats per token",
        "Cross-entropy with the MLP's output replaced by its training mean.",
        _three,
    ),
    Column(
        "ce_zero",
        "Zero",
        "Cross-entropy, nats per token",
        "Cross-entropy with the MLP's output replaced by zero.",
        _three,
    ),
    Column(
        "ce_recovered_zero",
        "vs zero",
        "Recovered",
        "Share of the damage of zeroing the MLP that the replacement undoes: (zero − replaced) / (zero − clean).",
        percent,
        +1,
    ),
    Column(
        "ce_recovered_mean",
        "vs mean",
        "Recovered",
        "Share of the damage of replacing the MLP by its mean output that the replacement undoes: "
        "(mean − replaced) / (mean − clean).",
        percent,
        +1,
    ),
    Column(
        "kl",
        "KL",
        "Predictions",
        "Mean Kullback–Leibler divergence, in nats per token, of the replaced model's next-token distribution from "
        "the clean model's.",
        _three,
        -1,
    ),
    Column(
        "top1_agreement",
        "Top-1",
        "Predictions",
        "Fraction of tokens on which the clean and the replaced model predict the same next token.",
        percent,
        +1,
    ),
)

OF_SIMILARITY = (
    Column(
        "similarity_replaced",
        "Replaced",
        "Similarity of embeddings",
        "Mean cosine of a text's embedding with that of the unchanged model, with the MLP replaced by this row.",
        _three,
        +1,
        "similarity_replaced_interval",
    ),
    Column(
        "similarity_mean",
        "Mean",
        "Similarity of embeddings",
        "The same with the MLP's output replaced by its training mean.",
        _three,
    ),
    Column(
        "similarity_zero",
        "Zero",
        "Similarity of embeddings",
        "The same with the MLP's output replaced by zero.",
        _three,
    ),
    Column(
        "similarity_recovered_zero",
        "vs zero",
        "Recovered",
        "Share of the damage of zeroing the MLP that the replacement undoes: (replaced − zero) / (1 − zero).",
        percent,
        +1,
    ),
    Column(
        "similarity_recovered_mean",
        "vs mean",
        "Recovered",
        "Share of the damage of replacing the MLP by its mean output that the replacement undoes: "
        "(replaced − mean) / (1 − mean).",
        percent,
        +1,
    ),
    Column("compared", "Texts", "Recovered", "Number of windows of text whose embeddings were compared.", count),
)

COST = (
    Column("tokens", "Tokens", "Cost", "Number of held-out tokens that the row was measured on.", count),
    Column(
        "seconds",
        "Seconds",
        "Cost",
        "Wall-clock seconds of training; the baselines are solved together and share one number.",
        lambda value: fixed(value, 1),
    ),
)

COLUMNS = (*RECONSTRUCTION, *OF_CROSS_ENTROPY, *COST)
"""Of a model that predicts tokens."""


def answer_of(rows: Sequence[Row]) -> Answer:
    """What the rows measure of the model's answer; cross-entropy where they say nothing."""
    return SIMILARITY if any("similarity_replaced" in row for row in rows) else CROSS_ENTROPY


def columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The columns of the table of these rows."""
    return (*RECONSTRUCTION, *OF_SIMILARITY, *COST) if answer_of(rows) is SIMILARITY else COLUMNS
