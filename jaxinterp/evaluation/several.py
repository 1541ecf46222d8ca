"""The scoreboard of a decomposition of several layers: all of them replaced together, and each alone.

Every number is that of `jaxinterp.evaluation.scoreboard`. Where all are replaced at once, later layers read what the
earlier replacements made of the model; `ce_zero` and `ce_mean` ablate all layers; `fvu` is the mean of the layers' own,
on the unchanged model's activations; `l0` and `dead_fraction` are over the features of all layers. Where one layer is
replaced, its output is decoded from the unchanged model's inputs; `l0` and `dead_fraction` are those of the features
that read that layer.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import Rows, harvest_jit
from jaxinterp.data.text.load_text import take
from jaxinterp.evaluation.effects import NEXT_TOKEN, Columns, Row, Table, answer_with, check_effect, compared
from jaxinterp.evaluation.scoreboard import check_counts, heldout_means, item_documents, of_kinds, row_of
from jaxinterp.models.sites import run
from jaxinterp.objectives.end_to_end import spliced


@ordinary()
def score_layers(
    decomposition: Any,
    subject: Any,
    heldout: grain.MapDataset,
    *,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    means: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Score a decomposition of several layers.

    Args:
      decomposition: a `CrossLayer`, a `PerLayer`, or another that encodes and decodes by layer.
      heldout, tokens, ce_tokens, means, seed: as `scoreboard` has them.
    Returns:
      A row for all layers together (`method` "all"), then one for each layer alone (`method`: the array it writes).
    Raises:
      UserError: the decomposition is one of a single layer, the model has no logits, or `tokens` or `ce_tokens` is
        below 1.
    """
    check_counts(tokens=tokens, ce_tokens=ce_tokens)
    check_effect(subject.model, NEXT_TOKEN)
    if isinstance(decomposition.sites.writes, str):
        raise UserError(f"{decomposition.sites.writes!r} is one layer: score it with jaxinterp.score.")
    writes, names = decomposition.sites.writes, decomposition.sites.names()
    ablations = dict(zip(writes, decomposition.target_mean, strict=True)) | dict(means or {})
    batches = take(heldout, tokens, seed=seed)
    centers = heldout_means(subject.model, batches, names)
    layers, together = [Table() for _ in writes], Table()
    seen = 0
    for batch in batches:
        windows = {name: jnp.asarray(batch[name]) for name in ("tokens", "weight", "document")}
        rows = harvest_jit(subject.model, {name: windows[name] for name in ("tokens", "weight")}, names)
        outputs, columns = _reconstruct(decomposition, rows, centers)
        for table, own in zip(layers, columns, strict=True):
            table.add(document=batch["document"], weight=batch["weight"], **own)
        together.add(document=batch["document"], weight=batch["weight"], active=sum(own["active"] for own in columns))
        if seen < ce_tokens:
            effects = _effects(decomposition, outputs, ablations, subject.model, rows, windows)
            for table, own in zip([together, *layers], effects, strict=True):
                table.add(item_document=item_documents(batch, own), **own)
        seen += batch["tokens"].size
    # Every layer counts alike: squares and spreads in units of the layer's own spread. Constant layers have none.
    spreads = [table["spread"].sum() if np.isfinite(table.fvu()) else np.inf for table in layers]
    for name in ("squares", "spread"):
        together.add(**{name: sum(table[name] / spread for table, spread in zip(layers, spreads, strict=True))})
    together.add(fired=np.concatenate([table.total("fired") for table in layers]))
    rows_alone = [
        row_of(name, SimpleNamespace(sites=Sites(decomposition.sites.reads, name)), table)
        for name, table in zip(writes, layers, strict=True)
    ]
    return [row_of("all", decomposition, together), *rows_alone]


class _Where(eqx.Module):
    """The edit that puts `value` where `mask` says so."""

    mask: Float[Array, "batch seq"]
    value: Float[Array, "..."]

    def __call__(self, x: Array) -> Array:
        return jnp.where(self.mask[..., None] > 0, self.value, x).astype(x.dtype)


@eqx.filter_jit
def _reconstruct(
    decomposition: Any, rows: Rows, centers: dict[str, Array]
) -> tuple[list[Array], list[dict[str, Array]]]:
    """For every layer: ŷ where there is weight and y elsewhere; per token squared error, spread, active features."""
    reads, writes, weight = decomposition.sites.reads, decomposition.sites.writes, rows.weight
    x = tuple(rows.arrays[name] for name in reads)
    codes = decomposition.encode(x)
    outputs, columns = [], []
    for name, guess, own in zip(writes, decomposition.decode(codes, x), codes.layers, strict=True):
        y = rows.arrays[name]
        outputs.append(jnp.where(weight[..., None] > 0, guess, y))
        columns.append(
            {
                "squares": weight * jnp.sum((y - guess) ** 2, axis=-1),
                "spread": weight * jnp.sum((y - centers[name]) ** 2, axis=-1),
                "size": weight * jnp.sum(y**2, axis=-1),
                "active": weight * own.active(),
                "fired": own.fired(weight),
            }
        )
    return outputs, columns


def _effects(
    decomposition: Any,
    outputs: list[Array],
    ablations: Mapping[str, Array],
    model: Any,
    rows: Rows,
    windows: dict[str, Array],
) -> list[Columns]:
    """What the model predicts with all layers replaced, then with each alone."""
    tokens, weight, writes = windows["tokens"], rows.weight, decomposition.sites.writes
    zeros = {name: jnp.zeros((), jnp.float32) for name in writes}
    means = {name: ablations[name] for name in writes}
    clean = _ablated(model, tokens, weight, {})
    every = compared(NEXT_TOKEN, _spliced(decomposition, model, tokens, weight), clean, windows)
    ablated = [_ablated(model, tokens, weight, by) for by in (zeros, means)]
    effects = [every | of_kinds(NEXT_TOKEN, [clean, *ablated], windows)]
    for name, output in zip(writes, outputs, strict=True):
        ablated = [_ablated(model, tokens, weight, {name: by[name]}) for by in (zeros, means)]
        alone = compared(NEXT_TOKEN, answer_with(NEXT_TOKEN, model, tokens, name, output), clean, windows)
        effects.append(alone | of_kinds(NEXT_TOKEN, [clean, *ablated], windows))
    return effects


@eqx.filter_jit
def _spliced(decomposition: Any, model: Any, tokens: Int[Array, "batch seq"], weight: Array) -> Array:
    return spliced(decomposition, model, tokens, weight)


@eqx.filter_jit
def _ablated(model: Any, tokens: Int[Array, "batch seq"], weight: Array, values: dict[str, Array]) -> Array:
    """The model with values in place of the named arrays wherever there is weight."""
    return run(model, tokens, edits={name: _Where(weight, value) for name, value in values.items()}).logits
