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

Intervals are 95 percent, by resampling documents. That of ce_replaced is ce_clean plus the interval of the increase:
every decomposition sees the same tokens, so what differs between documents cancels. A next token counts where it and
the token before it have weight and belong to one document.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.data.activations import Rows, harvest_jit
from jaxinterp.data.text import take
from jaxinterp.errors import UserError
from jaxinterp.evaluation.intervals import ratio_interval
from jaxinterp.models.sites import SetTo, run

Row = dict[str, Any]


def score(decomposition: Any, subject: Any, heldout: grain.MapDataset, **options: Any) -> Row:
    """The decomposition's row of the scoreboard; options as `scoreboard` has them."""
    return scoreboard({type(decomposition).__name__: decomposition}, subject, heldout, **options)[0]


def scoreboard(
    decompositions: Mapping[str, Any],
    subject: Any,
    heldout: grain.MapDataset,
    *,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    means: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Score decompositions of one model side by side.

    Args:
      decompositions: by the name that their row shall have.
      heldout: windows of held-out text, {"tokens", "weight", "document"}, each `[seq]`.
      tokens: how much of it to use: a shuffled sample of windows.
      ce_tokens: on how many of these cross-entropies are measured; each decomposition costs a forward pass.
      means: training means by array name, for mean ablation; default: the `target_mean` of the first decomposition that
        writes the array.
      seed: of the sample.
    Returns:
      A row of plain numbers for each, in the order given; `method` is its name; `tokens` and `ce_tokens`: how many were
      measured, which is less than was asked for where the text is short.
    Raises:
      UserError: `tokens` or `ce_tokens` is below 1.
    """
    check_counts(tokens=tokens, ce_tokens=ce_tokens)
    sites = tuple(dict.fromkeys(name for d in decompositions.values() for name in d.sites.names()))
    batches = take(heldout, tokens, seed=seed)
    centers = heldout_means(subject.model, batches, sites)
    ablations = {d.sites.writes: d.target_mean for d in reversed(list(decompositions.values()))} | dict(means or {})
    tables = {name: Table() for name in decompositions}
    seen = 0
    for batch in batches:
        on_device = {name: jnp.asarray(batch[name]) for name in ("tokens", "weight")}
        rows = harvest_jit(subject.model, on_device, sites)
        outputs = {}
        for name, decomposition in decompositions.items():
            outputs[name], columns = _reconstruct(decomposition, rows, centers[decomposition.sites.writes])
            tables[name].add(document=batch["document"], weight=batch["weight"], **columns)
        if seen < ce_tokens:
            effects = _effects(decompositions, outputs, ablations, subject.model, rows, on_device["tokens"])
            for name, columns in effects:
                tables[name].add(next_document=batch["document"][:, :-1], counted=next_counts(batch), **columns)
        seen += batch["tokens"].size
    return [row_of(name, decompositions[name], table) for name, table in tables.items()]


def check_counts(**counts: int) -> None:
    """Raises UserError where a number of tokens is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count} must be at least 1.")


class Table:
    """Columns of one number a token, in parts; `fired` is summed."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(self, **columns: Any) -> None:
        for name, column in columns.items():
            self.parts.setdefault(name, []).append(np.asarray(column, np.float64).reshape(-1))

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate(self.parts[name])

    def total(self, name: str) -> np.ndarray:
        return np.sum(self.parts[name], axis=0)


def heldout_means(model: Any, batches: Iterable[Mapping[str, Any]], sites: tuple[str, ...]) -> dict[str, Array]:
    """The mean of every array over the tokens that have weight."""
    sums, count = dict.fromkeys(sites, np.zeros(())), 0.0
    for batch in batches:
        rows = harvest_jit(model, {name: jnp.asarray(batch[name]) for name in ("tokens", "weight")}, sites).flat()
        sums = {name: sums[name] + np.asarray(rows.weight @ rows.arrays[name], np.float64) for name in sites}
        count += float(rows.weight.sum())
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
        "active": weight * codes.active(),
        "fired": codes.fired(weight),
    }


def _effects(
    decompositions: Mapping[str, Any],
    outputs: Mapping[str, Array],
    ablations: Mapping[str, Array],
    model: Any,
    rows: Rows,
    tokens: Array,
) -> Iterable[tuple[str, dict[str, Array]]]:
    """Per decomposition: what the model predicts with the target as it is, replaced, zero, and at its training mean."""
    by_site: dict[str, tuple[Array, dict[str, Array]]] = {}
    for name, decomposition in decompositions.items():
        site = decomposition.sites.writes
        if site not in by_site:
            y, counts = rows.arrays[site], rows.weight[..., None] > 0
            clean = logits_with(model, tokens, site, y)
            zero = logits_with(model, tokens, site, jnp.where(counts, 0.0, y))
            mean = logits_with(model, tokens, site, jnp.where(counts, ablations[site], y))
            by_site[site] = (
                clean,
                {
                    "nll_clean": compare(clean, clean, tokens)["nll"],
                    "nll_zero": compare(zero, clean, tokens)["nll"],
                    "nll_mean": compare(mean, clean, tokens)["nll"],
                },
            )
        clean, columns = by_site[site]
        yield name, columns | compare(logits_with(model, tokens, site, outputs[name]), clean, tokens)


@eqx.filter_jit
def logits_with(
    model: Any, tokens: Int[Array, "batch seq"], site: str, value: Array
) -> Float[Array, "batch seq vocab"]:
    """One program for every decomposition: the model with `value` at `site`."""
    return run(model, tokens, edits={site: SetTo(value)}).logits


@jax.jit
def compare(logits: Array, clean: Array, tokens: Array) -> dict[str, Array]:
    """Per next token: its negative log-likelihood, KL(clean || logits), whether the most likely token agrees."""
    log_p, log_clean = jax.nn.log_softmax(logits[:, :-1]), jax.nn.log_softmax(clean[:, :-1])
    return {
        "nll": -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0],
        "kl": jnp.sum(jnp.exp(log_clean) * (log_clean - log_p), axis=-1),
        "agrees": jnp.argmax(log_p, axis=-1) == jnp.argmax(log_clean, axis=-1),
    }


def next_counts(batch: Mapping[str, Any]) -> np.ndarray:
    """1 where a next token counts."""
    weight, document = np.asarray(batch["weight"]), np.asarray(batch["document"])
    return weight[:, :-1] * weight[:, 1:] * (document[:, :-1] == document[:, 1:])


def row_of(name: str, decomposition: Any, table: Table) -> Row:
    """The row of the scoreboard that a table of columns adds up to."""
    weight, document = table["weight"], table["document"].astype(np.int64)
    count, spread = weight.sum(), table["spread"]
    counted, next_document = table["counted"], table["next_document"].astype(np.int64)

    def mean(column: str) -> float:
        return float(table[column] @ counted / counted.sum())

    ce = {kind: mean(f"nll_{kind}") for kind in ("clean", "zero", "mean")} | {"replaced": mean("nll")}

    increase = ratio_interval((table["nll"] - table["nll_clean"]) * counted, counted, next_document)

    def recovered(ablated: float) -> float:
        lost = ablated - ce["clean"]
        return (ablated - ce["replaced"]) / lost if lost else math.nan

    return {
        "method": name,
        "fvu": float(table["squares"].sum() / spread.sum()),
        "fvu_interval": ratio_interval(table["squares"], spread, document),
        "l0": float(table["active"].sum() / count),
        "dead_fraction": float(np.mean(table.total("fired") == 0)),
        "ce_clean": ce["clean"],
        "ce_replaced": ce["replaced"],
        "ce_replaced_interval": tuple(ce["clean"] + bound for bound in increase),
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "ce_recovered_zero": recovered(ce["zero"]),
        "ce_recovered_mean": recovered(ce["mean"]),
        "kl": mean("kl"),
        "top1_agreement": mean("agrees"),
        "tokens": int(count),
        "ce_tokens": int(counted.sum()),
        "reads": decomposition.sites.reads,
        "writes": decomposition.sites.writes,
    }
