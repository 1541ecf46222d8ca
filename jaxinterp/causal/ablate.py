"""Mean ablation of sets of neurons or heads in any layers at once, and which ones a task leans on.

    score      (mean - a) . dM/da, summed over positions >= first and over what belongs to a unit
    ablated    M with a <- mean at positions >= first, for all units of a mask [layers, units]
    matched    a random set with as many units in every layer as a given one

A unit is a neuron of `mlp/hidden` or a head of `attn/z`. Means leave the first positions out, and so do ablations
(`first=1`): position 0 is an attention sink whose activations can be thousands of times larger, and a mean with it in
writes them to every position.

Selectivity of a set S for task A against B: what it costs A less what it costs B.

Sources: "recall against reasoning" (arXiv 2510.03366, recalled; selective ablation); the estimate is attribution
patching with the mean as the fill.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.causal.layerwise import Layers, Look
from jaxinterp.causal.measure import Metric
from jaxinterp.core.errors import UserError


@eqx.filter_jit
def unit_scores(
    layers: Layers,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    name: str,
    means: Float[Array, "layers units *rest"],
    first: int = 1,
) -> Float[Array, "layers batch units"]:
    """(mean - a) . dM/da of every unit of the array `name` ("mlp/hidden", "attn/z"), positions >= first summed."""
    shape = (layers.count, *tokens.shape, *means.shape[1:])

    def total(deltas: Array) -> tuple[Array, Array]:
        def step(x: Array, given: tuple[PyTree, Array]) -> tuple[Array, Array]:
            look = Look((name,), {name: given[1]})
            x = eqx.combine(given[0], layers.rest)(x, tap=look)
            return x, look.arrays[name]

        x, arrays = jax.lax.scan(step, layers.ends.embedding(tokens), (layers.arrays, deltas))
        return jnp.sum(layers.metric(metric, x)), arrays

    slopes, arrays = jax.grad(total, has_aux=True)(jnp.zeros(shape, means.dtype))
    found = ((means[:, None, None] - arrays) * slopes)[:, :, first:]
    return jnp.sum(found.reshape(*found.shape[:4], -1), axis=(2, 4))


@eqx.filter_jit
def ablated_metric(
    layers: Layers,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    name: str,
    mask: Bool[Array, "layers units"],
    means: Float[Array, "layers units *rest"],
    first: int = 1,
    last: int | None = None,
) -> Float[Array, " batch"]:
    """The metric where the masked units are their means at positions from `first` on (below `last`, if given)."""
    place = jnp.arange(tokens.shape[1])
    here = (place >= first) & (place < (tokens.shape[1] if last is None else last))

    def step(x: Array, given: tuple[PyTree, Array, Array]) -> tuple[Array, None]:
        arrays, chosen, mean = given

        def put(own: str, value: Array) -> Array:
            if own != name:
                return value
            where = (here[:, None] & chosen).reshape(*here.shape, *chosen.shape, *(1,) * (value.ndim - 3))
            return jnp.where(where, mean.astype(value.dtype), value)

        return eqx.combine(arrays, layers.rest)(x, tap=Look(edit=put)), None

    x, _ = jax.lax.scan(step, layers.ends.embedding(tokens), (layers.arrays, mask, means))
    return layers.metric(metric, x)


def unit_means(
    layers: Layers, batches: Sequence[Int[Array, "batch seq"]], name: str, first: int = 1
) -> Float[Array, "layers units *rest"]:
    """Means of the array `name` over batches of prompts, positions below `first` left out.

    Raises:
      UserError: `batches` is empty, or no position is left.
    """
    if not batches or any(batch.shape[1] <= first for batch in batches):
        raise UserError(f"first={first} leaves no position of {len(batches)} batches of prompts: give longer ones.")
    counts = np.asarray([batch.shape[0] * (batch.shape[1] - first) for batch in batches], np.float32)
    found = [_mean(layers, batch, name, first) for batch in batches]
    return sum(float(n) * mean for n, mean in zip(counts / counts.sum(), found, strict=True))  # type: ignore[return-value]


@eqx.filter_jit
def _mean(layers: Layers, tokens: Int[Array, "batch seq"], name: str, first: int) -> Array:
    def step(x: Array, arrays: PyTree) -> tuple[Array, Array]:
        look = Look((name,))
        x = eqx.combine(arrays, layers.rest)(x, tap=look)
        return x, jnp.mean(look.arrays[name][:, first:], axis=(0, 1))

    return jax.lax.scan(step, layers.ends.embedding(tokens), layers.arrays)[1]


def strongest_units(scores: Float[Array, "layers units"], count: int) -> Bool[np.ndarray, "layers units"]:
    """The mask of the `count` units whose ablation costs most: the lowest scores.

    Raises:
      UserError: there are not so many.
    """
    flat = np.asarray(scores).reshape(-1)
    if not 0 < count <= flat.size:
        raise UserError(f"count={count} of {flat.size} units: give a number from 1 to that.")
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(flat, kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def matched(mask: Bool[np.ndarray, "layers units"], seed: int) -> Bool[np.ndarray, "layers units"]:
    """As many random units in every layer as the mask has, none of its own where the layer allows that."""
    draw, found = np.random.default_rng(seed), np.zeros_like(mask)
    for layer, row in enumerate(mask):
        others = np.flatnonzero(~row)
        pool = others if len(others) >= row.sum() else np.arange(len(row))
        found[layer, draw.choice(pool, int(row.sum()), replace=False)] = True
    return found
