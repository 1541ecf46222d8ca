"""Held-out tokens that many decompositions of one MLP are scored on, one after another.

    held = hold(subject, heldout, "blocks/1/mlp", mean, tokens=16_384, ce_tokens=4_096)
    row = score_held("semi-NMF", decomposition, held)          the row that `scoreboard` gives

`scoreboard` scores all its decompositions at once. Here the model's arrays, its answers as it is, with the output at
zero and at its mean are computed once and kept, so that a decomposition costs one forward pass of the model whenever
it comes. Memory: the logits of `ce_tokens` tokens (50,000 ids: .2 MB a token).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import Rows, harvest_jit
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.base import Decomposition
from jaxinterp.evaluation.effects import NEXT_TOKEN, Columns, Effect, Row, Table, answer_with, check_effect, compared
from jaxinterp.evaluation.scoreboard import (
    check_counts,
    heldout_means,
    item_documents,
    of_kinds,
    reconstruct,
    row_of,
)


@dataclass(frozen=True)
class Part:
    """A batch of windows: what was harvested, and the model's answers where the effect is measured on it."""

    windows: Mapping[str, Array]
    rows: Rows
    clean: Array | None
    ablated: Columns


@dataclass(frozen=True)
class Held:
    """Held-out text with everything that does not depend on a decomposition."""

    model: Any
    site: str
    center: Float[Array, " d_out"]
    parts: tuple[Part, ...]
    effect: Effect

    def counted_rows(self, name: str, tokens: int) -> Float[Array, "tokens d"]:
        """Rows of an array at tokens that have weight, the first `tokens` of them."""
        flat = [part.rows.flat() for part in self.parts]
        kept = [np.asarray(rows.arrays[name])[np.asarray(rows.weight) > 0] for rows in flat]
        return jnp.asarray(np.concatenate(kept)[:tokens])

    @property
    def variance(self) -> float:
        """Of the MLP's output about its held-out mean, summed over dimensions."""
        y = self.counted_rows(f"{self.site}/out", 2**62)
        return float(jnp.mean(jnp.sum((y - self.center) ** 2, axis=-1)))


@ordinary()
def hold(
    subject: Any,
    heldout: grain.MapDataset,
    site: str,
    mean: Float[Array, " d_out"],
    *,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    effect: Effect = NEXT_TOKEN,
    seed: int = 0,
) -> Held:
    """Harvest a sample of held-out text once.

    Args:
      site: the leaf of an MLP; decompositions may read its `in` or `out` and must write its `out`.
      mean: training mean of the output, for mean ablation.
      tokens, ce_tokens, effect, seed: as for `scoreboard`, which takes the same windows for the same numbers.
    Raises:
      UserError: a number of tokens is below 1, or the model has no such answer as the effect reads.
    """
    check_counts(tokens=tokens, ce_tokens=ce_tokens)
    check_effect(subject.model, effect)
    names = (f"{site}/in", f"{site}/out")
    batches = take(heldout, tokens, seed=seed)
    center = heldout_means(subject.model, batches, names)[names[1]]
    parts, seen = [], 0
    for batch in batches:
        windows = {name: jnp.asarray(batch[name]) for name in ("tokens", "weight", "document")}
        rows = harvest_jit(subject.model, {name: windows[name] for name in ("tokens", "weight")}, names)
        clean, ablated = None, {}
        if seen < ce_tokens:
            y, counts = rows.arrays[names[1]], rows.weight[..., None] > 0
            values = y, jnp.where(counts, 0.0, y), jnp.where(counts, mean, y)
            answers = [answer_with(effect, subject.model, windows["tokens"], names[1], value) for value in values]
            clean, ablated = answers[0], of_kinds(effect, answers, windows)
        parts.append(Part(windows, rows, clean, ablated))
        seen += batch["tokens"].size
    return Held(subject.model, site, center, tuple(parts), effect)


@ordinary()
def score_held(name: str, decomposition: Decomposition, held: Held) -> Row:
    """The decomposition's row of the scoreboard, under `name`.

    Raises:
      UserError: it reads or writes other arrays than those that are held.
    """
    output = f"{held.site}/out"
    if decomposition.sites.writes != output or decomposition.sites.reads not in (f"{held.site}/in", output):
        raise UserError(
            f"decomposition {name!r} maps {decomposition.sites.reads!r} to {decomposition.sites.writes!r}: it must "
            f"read {held.site}/in or {output} and write {output} (see decompositions.at_output)."
        )
    table = Table()
    for part in held.parts:
        value, columns = reconstruct(decomposition, part.rows, held.center)
        table.add(document=part.windows["document"], weight=part.windows["weight"], **columns)
        if part.clean is not None:
            answer = answer_with(held.effect, held.model, part.windows["tokens"], output, value)
            effects = part.ablated | compared(held.effect, answer, part.clean, part.windows)
            table.add(item_document=item_documents(part.windows, effects), **effects)
    return row_of(name, decomposition, table, held.effect)
