"""Held-out tokens that many decompositions of one MLP are scored on, one after another.

    held = hold(subject, heldout, "blocks/1/mlp", mean, tokens=16_384, ce_tokens=4_096)
    row = score_held("semi-NMF", decomposition, held)          the row that `scoreboard` gives

`scoreboard` scores all its decompositions at once. Here the model's arrays, its answers as it is, with the output at
zero and at its mean are computed once and kept, so that a decomposition costs one forward pass of the model whenever
it comes. Memory: the logits of `ce_tokens` tokens (50,000 ids: .2 MB a token).
"""

import math
from dataclasses import dataclass

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.decomposition import Decomposition
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import Rows, on_device
from jaxinterp.data.text.load_text import take
from jaxinterp.evaluation.effects import Effect, Row, Windows, check_effect
from jaxinterp.evaluation.heldout import heldout_rows
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.evaluation.scoreboard import Board, Replaced, check_counts
from jaxinterp.models.load import Subject


@dataclass(frozen=True)
class Part:
    """A batch of windows: what was harvested, and the model where the effect is measured on it."""

    batch: Windows
    rows: Rows
    model: Replaced | None


@dataclass(frozen=True)
class Held:
    """Held-out text with everything that does not depend on a decomposition."""

    site: str
    centers: dict[str, Float[Array, " _d"]]
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
        name = f"{self.site}/out"
        rows = [(part.rows.at(name), part.rows.weight) for part in self.parts]
        squares = sum(float(jnp.sum(w * jnp.sum((y - self.centers[name]) ** 2, axis=-1))) for y, w in rows)
        return squares / sum(float(jnp.sum(w)) for _, w in rows)


@ordinary()
def hold(
    subject: Subject,
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
      UserError: a number of tokens is below 1, or the model does not give the answer that the effect reads.
    """
    check_counts(tokens=tokens, ce_tokens=ce_tokens)
    check_effect(subject.model, effect)
    names = (f"{site}/in", f"{site}/out")
    batches = take(heldout, tokens, seed=seed)
    centers, kept = heldout_rows(subject.model, batches, names, most=math.inf)
    parts, seen = [], 0
    for batch, rows in zip(batches, kept, strict=True):
        assert rows is not None
        windows = on_device(batch)
        model = Replaced(effect, subject.model, rows, windows, {names[1]: mean}, {})
        parts.append(Part(batch, rows, model if seen < ce_tokens else None))
        seen += batch["tokens"].size
    return Held(site, centers, tuple(parts), effect)


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
    board = Board(name, decomposition, ("alone",))
    for part in held.parts:
        board.add(part.batch, part.rows, held.centers, part.model)
    return board.rows(held.effect)[0]
