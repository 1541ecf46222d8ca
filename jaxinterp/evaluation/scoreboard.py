"""The scoreboard: one definition of every number, the same held-out tokens for every decomposition.

With target y (the array named `sites.writes`), output ŷ, token weights w (0 at attention sinks and special tokens):

    fvu                 sum w |y - ŷ|^2 / sum w |y - mean(y)|^2, over all held-out tokens, held-out mean, raw units
    l0                  active components per token
    dead_fraction       components that are active on no held-out token
    ce_clean            cross-entropy of the next token, in nats; ce_replaced: with ŷ in place of y wherever w > 0;
                        ce_zero, ce_mean: with 0, and with the training mean of y, in its place
    ce_recovered_zero   (ce_zero - ce_replaced) / (ce_zero - ce_clean); ce_recovered_mean likewise
                        (NaN where the ablation changes nothing: there is nothing to recover)
    kl                  KL(clean || replaced) of the next token's distribution, in nats
    top1_agreement      how often both find the same token most likely

Where w = 0 the model keeps its own y: no method is trained there, and an attention sink would drown the rest.

What is said of the next token is the default effect. Another one, such as the similarity of an encoder's embeddings,
is passed by value: see `jaxinterp.evaluation.effects`.

Intervals are 95 percent, by resampling documents. A next token counts where it and the token before it have weight and
belong to one document.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import Rows, harvest_jit
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.base import Decomposition
from jaxinterp.evaluation.effects import (
    KINDS,
    NEXT_TOKEN,
    Columns,
    Effect,
    Row,
    Table,
    answer_with,
    check_effect,
    compared,
)
from jaxinterp.evaluation.intervals import ratio_interval


@ordinary()
def score(decomposition: Decomposition, subject: Any, heldout: grain.MapDataset, **options: Any) -> Row:
    """The decomposition's row of the scoreboard; options as `scoreboard` has them."""
    return scoreboard({type(decomposition).__name__: decomposition}, subject, heldout, **options)[0]


@ordinary()
def scoreboard(
    decompositions: Mapping[str, Decomposition],
    subject: Any,
    heldout: grain.MapDataset,
    *,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    means: Mapping[str, Array] | None = None,
    effect: Effect = NEXT_TOKEN,
    seed: int = 0,
) -> list[Row]:
    """Score decompositions of one model side by side.

    Args:
      decompositions: by the name that their row shall have.
      heldout: windows of held-out text, {"tokens", "weight", "document"}, each `[seq]`.
      tokens: how much of it to use: a shuffled sample of windows.
      ce_tokens: on how many of these the effect is measured; each decomposition costs a forward pass.
      means: training means by array name, for mean ablation; default: the `target_mean` of the first decomposition that
        writes the array.
      effect: what is asked of the model with the reconstruction in place.
      seed: of the sample.
    Returns:
      A row of plain numbers for each, in the order given; `method` is its name; `tokens` and `ce_tokens`: how many were
      measured, which is less than was asked for where the text is short.
    Raises:
      UserError: `tokens` or `ce_tokens` is below 1, a decomposition is one of several layers, or the model has no such
        answer as the effect reads.
    """
    check_counts(tokens=tokens, ce_tokens=ce_tokens)
    writes = {name: _one_array(name, decomposition) for name, decomposition in decompositions.items()}
    check_effect(subject.model, effect)
    sites = tuple(dict.fromkeys(name for d in decompositions.values() for name in d.sites.names()))
    batches = take(heldout, tokens, seed=seed)
    centers = heldout_means(subject.model, batches, sites)
    ablations = {writes[name]: d.target_mean for name, d in reversed(list(decompositions.items()))} | dict(means or {})
    tables = {name: Table() for name in decompositions}
    seen = 0
    for batch in batches:
        windows = {name: jnp.asarray(batch[name]) for name in ("tokens", "weight", "document")}
        rows = harvest_jit(subject.model, {name: windows[name] for name in ("tokens", "weight")}, sites)
        outputs = {}
        for name, decomposition in decompositions.items():
            outputs[name], columns = _reconstruct(decomposition, rows, centers[writes[name]])
            tables[name].add(document=batch["document"], weight=batch["weight"], **columns)
        if seen < ce_tokens:
            for name, columns in _effects(decompositions, outputs, ablations, subject.model, rows, windows, effect):
                tables[name].add(item_document=item_documents(batch, columns), **columns)
        seen += batch["tokens"].size
    return [row_of(name, decompositions[name], table, effect) for name, table in tables.items()]


def _one_array(name: str, decomposition: Decomposition) -> str:
    if isinstance(decomposition.sites.writes, str):
        return decomposition.sites.writes
    raise UserError(
        f"decomposition {name!r} is one of several layers: score it with jaxinterp.evaluation.several.score_layers."
    )


def check_counts(**counts: int) -> None:
    """Raises UserError if a number of tokens is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count} must be at least 1.")


def heldout_means(model: Any, batches: Iterable[Mapping[str, Any]], sites: tuple[str, ...]) -> dict[str, Array]:
    """The mean of every array over the tokens that have weight."""
    sums, count = dict.fromkeys(sites, np.zeros(())), 0.0
    for batch in batches:
        rows = harvest_jit(model, {name: jnp.asarray(batch[name]) for name in ("tokens", "weight")}, sites).flat()
        sums = {name: sums[name] + np.asarray(rows.weight @ rows.arrays[name], np.float64) for name in sites}
        count += float(rows.weight.sum())
    if not count:
        raise UserError("no token of the held-out text has weight: give longer documents.")
    return {name: jnp.asarray(total / count, jnp.float32) for name, total in sums.items()}


@eqx.filter_jit
def _reconstruct(decomposition: Any, rows: Rows, center: Array) -> tuple[Array, dict[str, Array]]:
    """ŷ where there is weight and y elsewhere; per token: squared error, squared distance from the mean, active."""
    x, y, weight = rows.at(decomposition.sites.reads), rows.at(decomposition.sites.writes), rows.weight
    codes = decomposition.encode(x)
    output = decomposition.decode(codes, x)
    return jnp.where(weight[..., None] > 0, output, y), {
        "squares": weight * jnp.sum((y - output) ** 2, axis=-1),
        "spread": weight * jnp.sum((y - center) ** 2, axis=-1),
        "size": weight * jnp.sum(y**2, axis=-1),
        "active": weight * codes.active(),
        "fired": codes.fired(weight),
    }


def _effects(
    decompositions: Mapping[str, Any],
    outputs: Mapping[str, Array],
    ablations: Mapping[str, Array],
    model: Any,
    rows: Rows,
    windows: Mapping[str, Array],
    effect: Effect,
) -> Iterable[tuple[str, Columns]]:
    """Per decomposition: what the model answers with the target as it is, replaced, zero, and at its training mean."""
    by_site: dict[str, tuple[Array, Columns]] = {}
    for name, decomposition in decompositions.items():
        site = decomposition.sites.writes
        if site not in by_site:
            y, counts = rows.arrays[site], rows.weight[..., None] > 0
            values = y, jnp.where(counts, 0.0, y), jnp.where(counts, ablations[site], y)
            answers = [answer_with(effect, model, windows["tokens"], site, value) for value in values]
            by_site[site] = answers[0], of_kinds(effect, answers, windows)
        clean, columns = by_site[site]
        answer = answer_with(effect, model, windows["tokens"], site, outputs[name])
        yield name, columns | compared(effect, answer, clean, windows)


def of_kinds(effect: Effect, answers: Sequence[Array], windows: Mapping[str, Array]) -> Columns:
    """Columns of the unchanged model and of the ablations, `nll_clean` and so on; `answers` in the order of KINDS."""
    columns: Columns = {}
    for kind, answer in zip(KINDS, answers, strict=True):
        each = compared(effect, answer, answers[0], windows)
        columns |= {f"{name}_{kind}": column for name, column in each.items() if name != "counted"}
    return columns


def item_documents(batch: Mapping[str, Any], columns: Columns) -> np.ndarray:
    """The document of each item: item i of a window begins at its token i."""
    return np.asarray(batch["document"])[:, : columns["counted"].shape[1]]


def row_of(name: str, decomposition: Any, table: Table, effect: Effect = NEXT_TOKEN) -> Row:
    """The row of the scoreboard that a table of columns adds up to."""
    weight, document = table["weight"], table["document"].astype(np.int64)
    count, spread, fvu = weight.sum(), table["spread"], table.fvu()
    numbers = effect.numbers(table)
    last: Row = {key: numbers.pop(key) for key in ("ce_tokens", "compared") if key in numbers}
    return {
        "method": name,
        "fvu": fvu,
        "fvu_interval": ratio_interval(table["squares"], spread if np.isfinite(fvu) else 0 * spread, document),
        "l0": float(table["active"].sum() / count),
        "dead_fraction": float(np.mean(table.total("fired") == 0)),
        **numbers,
        "tokens": int(count),
        **last,
        "reads": decomposition.sites.reads,
        "writes": decomposition.sites.writes,
    }
