"""The scoreboard: one definition of every number, the same held-out tokens for every decomposition.

With target y (the array named `sites.writes`), output ŷ, token weights w (0 at attention sinks and special tokens):

    fvu                 sum w |y - ŷ|^2 / sum w |y - mean(y)|^2, over all held-out tokens, held-out mean, raw units
    l0                  active components per token
    dead_fraction       components that are active on no held-out token
    ce_clean            cross-entropy of the next token, in nats; ce_replaced: with ŷ in place of y;
                        ce_zero, ce_mean: with 0, and with the training mean of y (as the first decomposition that
                        writes y knows it), in its place
    ce_recovered_zero   (ce_zero - ce_replaced) / (ce_zero - ce_clean); ce_recovered_mean likewise
    kl                  KL(clean || replaced) of the next token's distribution, in nats
    top1_agreement      how often both find the same token most likely

Intervals are 95 percent, by resampling documents. That of ce_replaced is ce_clean plus the interval of the increase:
every decomposition sees the same tokens, so what differs between documents cancels. A next token counts where it and
the token before it have weight and belong to one document.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.data.activations import Rows, harvest
from jaxinterp.data.text import take
from jaxinterp.evaluation.intervals import ratio_interval
from jaxinterp.models.sites import SetTo, run

Row = dict[str, Any]


def score(decomposition: Any, subject: Any, heldout: grain.MapDataset, **options: int) -> Row:
    """The decomposition's row of the scoreboard; options as `scoreboard` has them."""
    return scoreboard({type(decomposition).__name__: decomposition}, subject, heldout, **options)[0]


def scoreboard(
    decompositions: Mapping[str, Any],
    subject: Any,
    heldout: grain.MapDataset,
    *,
    tokens: int = 32_768,
    ce_tokens: int = 8_192,
    seed: int = 0,
) -> list[Row]:
    """Score decompositions of one model side by side.

    Args:
      decompositions: by the name that their row shall have.
      heldout: windows of held-out text, {"tokens", "weight", "document"}, each `[seq]`.
      tokens: how much of it to use: a shuffled sample of windows.
      ce_tokens: on how many of these cross-entropies are measured; each decomposition costs a forward pass.
      seed: of the sample.
    Returns:
      A row of plain numbers for each, in the order given; `method` is its name.
    """
    sites = dict.fromkeys(name for d in decompositions.values() for name in (d.sites.reads, d.sites.writes))
    rows_of = eqx.filter_jit(lambda model, batch: harvest(model, batch, tuple(sites)))
    tables = {name: _Table() for name in decompositions}
    seen = 0
    for batch in take(heldout, tokens, seed=seed):
        on_device = {name: jnp.asarray(batch[name]) for name in ("tokens", "weight")}
        rows = rows_of(subject.model, on_device)
        outputs = {}
        for name, decomposition in decompositions.items():
            outputs[name], columns = _reconstruct(decomposition, rows)
            tables[name].add(document=batch["document"], weight=batch["weight"], **columns)
        if seen < ce_tokens:
            for name, columns in _effects(decompositions, outputs, subject.model, rows, on_device["tokens"]):
                tables[name].add(next_document=batch["document"][:, :-1], counted=_counted(batch), **columns)
        seen += batch["tokens"].size
    return [_row(name, decompositions[name], table) for name, table in tables.items()]


class _Table:
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


@eqx.filter_jit
def _reconstruct(decomposition: Any, rows: Rows) -> tuple[Array, dict[str, Array]]:
    """ŷ, and per token: squared error, squared distance from the training mean, active components; sums as named."""
    x, y, weight = rows.arrays[decomposition.sites.reads], rows.arrays[decomposition.sites.writes], rows.weight
    codes = decomposition.encode(x)
    output = decomposition.decode(codes, x)
    about_mean = y - decomposition.output_mean
    return output, {
        "squares": weight * jnp.sum((y - output) ** 2, axis=-1),
        "spread": weight * jnp.sum(about_mean**2, axis=-1),
        "shift": weight @ about_mean,
        "active": weight * codes.active(),
        "fired": codes.fired(weight),
    }


def _effects(
    decompositions: Mapping[str, Any], outputs: Mapping[str, Array], model: Any, rows: Rows, tokens: Array
) -> Iterable[tuple[str, dict[str, Array]]]:
    """Per decomposition: what the model predicts with the target as it is, replaced, zero, and at its training mean."""
    by_site: dict[str, tuple[Array, dict[str, Array]]] = {}
    for name, decomposition in decompositions.items():
        site = decomposition.sites.writes
        shape = (*tokens.shape, rows.arrays[site].shape[-1])

        def logits(value: Array, site: str = site, shape: tuple[int, ...] = shape) -> Array:
            return _logits(model, tokens, site, jnp.broadcast_to(value, shape))

        if site not in by_site:
            clean = logits(rows.arrays[site].reshape(shape))
            zero = _compare(logits(jnp.zeros(())), clean, tokens)["nll"]
            mean = _compare(logits(decomposition.output_mean), clean, tokens)["nll"]
            own = _compare(clean, clean, tokens)["nll"]
            by_site[site] = clean, {"nll_clean": own, "nll_zero": zero, "nll_mean": mean}
        clean, columns = by_site[site]
        yield name, columns | _compare(logits(outputs[name].reshape(shape)), clean, tokens)


@eqx.filter_jit
def _logits(model: Any, tokens: Int[Array, "batch seq"], site: str, value: Array) -> Float[Array, "batch seq vocab"]:
    """One program for every decomposition: the model with `value` at `site`."""
    return run(model, tokens, edits={site: SetTo(value)}).logits


@jax.jit
def _compare(logits: Array, clean: Array, tokens: Array) -> dict[str, Array]:
    """Per next token: its negative log-likelihood, KL(clean || logits), whether the most likely token agrees."""
    log_p, log_clean = jax.nn.log_softmax(logits[:, :-1]), jax.nn.log_softmax(clean[:, :-1])
    return {
        "nll": -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0],
        "kl": jnp.sum(jnp.exp(log_clean) * (log_clean - log_p), axis=-1),
        "agrees": jnp.argmax(log_p, axis=-1) == jnp.argmax(log_clean, axis=-1),
    }


def _counted(batch: Mapping[str, Any]) -> np.ndarray:
    """1 where a next token counts."""
    weight, document = np.asarray(batch["weight"]), np.asarray(batch["document"])
    return weight[:, :-1] * weight[:, 1:] * (document[:, :-1] == document[:, 1:])


def _row(name: str, decomposition: Any, table: _Table) -> Row:
    weight, document = table["weight"], table["document"].astype(np.int64)
    count = weight.sum()
    shift = table.total("shift") / count
    spread = table["spread"] - weight * float(shift @ shift)  # from the training mean to the held-out mean
    counted, next_document = table["counted"], table["next_document"].astype(np.int64)

    def mean(column: str) -> float:
        return float(table[column] @ counted / counted.sum())

    ce = {kind: mean(f"nll_{kind}") for kind in ("clean", "zero", "mean")} | {"replaced": mean("nll")}

    increase = ratio_interval((table["nll"] - table["nll_clean"]) * counted, counted, next_document)

    def recovered(ablated: float) -> float:
        return (ablated - ce["replaced"]) / (ablated - ce["clean"])

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
