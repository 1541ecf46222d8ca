"""What the features of an attention dictionary are made of: heads and source positions, over many tokens.

Every code is split exactly by head and by source position (`attention_attribution`); here the parts are gathered per
feature, over the tokens where it fires. Shares are of the parts' sizes:

    itself, token before, far, window start    of the token itself, the one before, those more than FAR back, the first
    distance                                   the mean distance of the parts, in tokens

Source: Kissane et al. 2024, arXiv 2406.17759 (direct feature attribution); the summaries are ours.
"""

from collections.abc import Mapping

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.data.activations import READ, on_device
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.codes import OneLayer
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.evaluation.attention.attribution import (
    by_head,
    by_source,
    head_shares,
    mean_distance,
    reading,
    share_at,
    share_beyond,
)
from jaxinterp.models.attention import Attention
from jaxinterp.models.run import run

FAR = 16
"""Tokens back: beyond this a feature reads far."""

MOSTLY = 0.5
"""The share from which a feature counts as one of a head, or of a distance."""

SHARES = ("itself", "token before", "far", "window start")


def attribute(
    dictionary: Dictionary,
    attention: Attention,
    model: PyTree,
    heldout: grain.MapDataset,
    site: str,
    *,
    k: int,
    tokens: int,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Per feature, over the tokens where it fires: how often, shares of heads and distances, and the largest error.

    The error is that of both sums against the pre-activation, in units of the codes.

    Args:
      dictionary: one that reads `<site>/z`.
      k: how many codes a token are split, the largest first.
      tokens: of held-out text.
    """
    k = min(k, dictionary.features)
    totals: dict[str, np.ndarray] = {}
    worst = 0.0
    for batch in take(heldout, tokens, seed=seed, rows=2):
        inputs = on_device(batch, READ)
        part, error = _attributed(dictionary, attention, model, inputs, site, k)
        worst = max(worst, float(error))
        totals = {name: totals.get(name, 0) + np.asarray(value, np.float64) for name, value in part.items()}
    fired = np.maximum(totals["fired"], 1)
    means = {name: (value.T / fired).T for name, value in totals.items() if name != "fired"}
    return means | {"fired": totals["fired"], "error": np.array(worst)}


@eqx.filter_jit
def _attributed(
    dictionary: Dictionary, attention: Attention, model: PyTree, inputs: Mapping[str, Array], site: str, k: int
) -> tuple[dict[str, Array], Array]:
    trace = run(model, inputs["tokens"])
    z = trace[f"{site}/z"]
    flat = z.reshape(*z.shape[:2], -1)
    every = dictionary.encode(flat)
    assert isinstance(every, OneLayer)
    codes = every.sparse(k)
    read = reading(dictionary, attention)
    heads = by_head(read, z, codes.indices)
    sources = by_source(read, attention, trace[f"{site}/in"], trace[f"{site}/pattern"], codes.indices)
    fires = (codes.values > 0) & (inputs["weight"][..., None] > 0)
    constant = read.constant[codes.indices]
    gaps = [jnp.abs(jnp.sum(parts, axis=-1) + constant - codes.values) for parts in (heads, sources)]
    sizes = jnp.abs(heads)
    columns = {
        "fired": jnp.ones(fires.shape, jnp.float32),
        "distance": mean_distance(sources),
        "itself": share_at(sources, 0),
        "token before": share_at(sources, 1),
        "far": share_beyond(sources, FAR),
        "window start": jnp.abs(sources[..., 0]) / jnp.maximum(jnp.sum(jnp.abs(sources), axis=-1), 1e-30),
        "heads": sizes / jnp.sum(sizes, axis=-1, keepdims=True),
    }

    def by_feature(values: Array) -> Array:
        kept = jnp.where(fires.reshape(*fires.shape, *(1,) * (values.ndim - 3)), values, 0.0)
        return jax.ops.segment_sum(
            kept.reshape(-1, *values.shape[3:]), codes.indices.reshape(-1), num_segments=dictionary.features
        )

    error = jnp.max(jnp.where(fires, jnp.maximum(*gaps), 0.0))
    return {name: by_feature(values) for name, values in columns.items()}, error


def chance_shares(dictionary: Dictionary, heads: int, seed: int) -> np.ndarray:
    """Head shares of random rows as many and as long as the dictionary's: what it starts from."""
    return np.asarray(
        head_shares(jax.random.normal(jax.random.key(seed), dictionary.decoder.shape, dtype=jnp.float32), heads)
    )


def summarise(table: Mapping[str, np.ndarray], shares: np.ndarray, chance: np.ndarray) -> dict[str, Json]:
    """Counts and means over the features that fire on the attributed tokens.

    Args:
      table: what `attribute` gives.
      shares: of the heads in every feature's write vector, `[features, heads]`; `chance`: those of random rows.
    Raises:
      UserError: no feature fires.
    """
    live = table["fired"] > 0
    if not live.any():
        raise UserError("no feature fires on the attributed tokens: train on more tokens or take a larger k.")
    dominant, largest = shares[live].argmax(axis=1), shares[live].max(axis=1)
    return {
        "live": int(live.sum()),
        "largest_error": float(table["error"]),
        "features_by_dominant_head": np.bincount(dominant, minlength=shares.shape[1]).tolist(),
        "dominant_share": float(largest.mean()),
        "dominant_share_chance": float(chance.max(axis=1).mean()),
        "of_one_head": float((largest > MOSTLY).mean()),
        "heads_agree": float((table["heads"][live].argmax(axis=1) == dominant).mean()),
        "mean_distance": float(table["distance"][live].mean()),
        "distances": table["distance"][live].tolist(),
        "mostly": {name: float((table[name][live] > MOSTLY).mean()) for name in SHARES},
        "heads": [
            {"head": head}
            | {"features": int((dominant == head).sum())}
            | {
                name: float(table[name][live][dominant == head].mean()) if (dominant == head).any() else None
                for name in ("distance", *SHARES)
            }
            for head in range(shares.shape[1])
        ],
    }
