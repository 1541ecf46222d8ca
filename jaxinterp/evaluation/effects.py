"""What a reconstruction in an array's place does to the model's answer: an effect is plain functions, passed by value.

    read(trace)                        the answer: logits, an embedding, any array that the trace has
    compare(answer, clean, windows)    numbers per item (a next token, a window), one array [batch, items] a column;
                                       `counted` among them says which items count (1) and which do not (0)
    numbers(table)                     the entries of the row; default: `summary` of every column
    columns, answer                    how these entries are shown, in tables and in words

`compare` is called with the answer of the model as it is (clean), with the array at zero, at its training mean, and
with the reconstruction in its place. A mean m over the items that count then is

    m_clean, m_zero, m_mean, m_replaced
    m_recovered_zero    (m_zero - m_replaced) / (m_zero - m_clean); m_recovered_mean likewise
                        (NaN where the ablation changes nothing: there is nothing to recover)

The interval of m_replaced is 95 percent, by resampling documents: m_clean plus the interval of the change. Every
decomposition sees the same items, so what differs between documents cancels.

One effect, one file: `next_token` for models that predict tokens, `pooled` for encoders. One of your own needs no file
of the package: pass it to `scoreboard`, to `Report` and to `print_scoreboard`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from jaxinterp.data.activations import CONSTANT
from jaxinterp.evaluation.columns import Answer, Column
from jaxinterp.evaluation.intervals import ratio_interval
from jaxinterp.models.edits import SetTo
from jaxinterp.models.run import Trace, run

Row = dict[str, Any]
Columns = dict[str, Array]

Windows = Mapping[str, np.ndarray]
"""A batch of windows on the host: "tokens", "weight" and "document", each `[batch, seq]`."""

KINDS = ("clean", "zero", "mean")
"""What stands in the array's place beside a reconstruction."""


class Table:
    """Columns of numbers, in parts; `fired` is summed."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(self, **columns: PyTree) -> None:
        for name, column in columns.items():
            self.parts.setdefault(name, []).append(np.asarray(column, np.float64).reshape(-1))

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate(self.parts[name])

    def total(self, name: str) -> np.ndarray:
        return np.sum(self.parts[name], axis=0)

    def mean(self, name: str) -> float:
        """The mean of a column over the items that count; NaN where none does."""
        weight = self["counted"]
        return float(self[name] @ weight / weight.sum()) if weight.sum() else math.nan

    def fvu(self) -> float:
        """sum of squares / sum of spread; NaN where the target is constant: its spread is below what float32 tells."""
        spread = float(self["spread"].sum())
        size = float(self["size"].sum()) if "size" in self.parts else 0.0
        return float(self["squares"].sum() / spread) if spread > CONSTANT * size else math.nan


def summary(table: Table, column: str, name: str) -> Row:
    """What the module's equations say of one column, under `name`."""
    clean, zero, mean, replaced = (table.mean(each) for each in (*(f"{column}_{kind}" for kind in KINDS), column))
    weight, document = table["counted"], table["item_document"].astype(np.int64)
    change = ratio_interval((table[column] - table[f"{column}_clean"]) * weight, weight, document)

    def recovered(ablated: float) -> float:
        lost = ablated - clean
        return (ablated - replaced) / lost if lost else math.nan

    return {
        f"{name}_clean": clean,
        f"{name}_replaced": replaced,
        f"{name}_replaced_interval": tuple(clean + bound for bound in change),
        f"{name}_zero": zero,
        f"{name}_mean": mean,
        f"{name}_recovered_zero": recovered(zero),
        f"{name}_recovered_mean": recovered(mean),
    }


def every_column(table: Table) -> Row:
    """`summary` of every column that was compared, and how many items count."""
    columns = [name.removesuffix("_clean") for name in table.parts if name.endswith("_clean")]
    rows = [summary(table, column, column) for column in columns]
    return {key: value for row in rows for key, value in row.items()} | {"compared": int(table["counted"].sum())}


@dataclass(frozen=True)
class Effect:
    """How the model's answer is read, compared and shown; see the module's docstring.

    Attributes:
      read: (trace) -> the answer, traced.
      compare: (answer, clean answer, windows) -> numbers per item `[batch, items]`, `counted` among them; traced.
      numbers: (table) -> the entries of the row, on the host.
      columns: of these entries, in the order of a page; those with a `short` title are printed on a terminal, too.
      answer: the words for what is read; None: those of cross-entropy.
      of_codes: (decomposition, codes) -> numbers per token, each with the leading axes of the codes; traced. They are
        in the table of rows of one array, all held-out tokens long, beside "weight". None: there are none.
    """

    read: Callable[[Trace], Array]
    compare: Callable[[Array, Array, Mapping[str, Array]], Columns]
    numbers: Callable[[Table], Row] = every_column
    columns: tuple[Column, ...] = ()
    answer: Answer | None = None
    of_codes: Callable[[PyTree, PyTree], Columns] | None = None


def check_effect(model: PyTree, effect: Effect) -> None:
    """Raises UserError, before compute, where the model does not give the answer that the effect reads."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    eqx.filter_eval_shape(lambda model, tokens: effect.read(run(model, tokens)), model, tokens)


@eqx.filter_jit
def answer_with(effect: Effect, model: PyTree, tokens: Int[Array, "batch seq"], site: str, value: Array) -> Array:
    """One program for every decomposition: what the model answers with `value` at `site`."""
    return effect.read(run(model, tokens, edits={site: SetTo(value)}))


@partial(jax.jit, static_argnums=0)
def compared(effect: Effect, answer: Array, clean: Array, windows: Mapping[str, Array]) -> Columns:
    """The columns of `effect.compare`, as one program."""
    return effect.compare(answer, clean, windows)
