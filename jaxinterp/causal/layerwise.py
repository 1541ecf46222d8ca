"""Patching and attribution of every (layer, position) of a deep model at the price of one block's program.

`patch_effects` and `attribute` take any array of any model: their programs are the whole model, unrolled, and every
patched pass starts at the first block. Where all blocks are alike, their weights are stacked, one block is compiled,
and

    patching     only the blocks from the patched one on are run, from the stored residual stream, and only the last
                 position is unembedded
    attribution  one backward pass through a scan over blocks gives the coefficients of the named arrays of all layers

The numbers are those of `patch_effects(..., each=(1,))` and of `summed(attribute(..., method="gradient"))`. Arrays are
named within a block: `mlp/out`, `attn/out`, `resid/post`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.causal.measure import Divergence, LogitDifference, LogProbability, Metric, ProbabilityDifference
from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import normed
from jaxinterp.models.rules import EXACT, Rules
from jaxinterp.models.run import Trace
from jaxinterp.models.transformer import Block, Transformer


class Layers(eqx.Module):
    """A transformer whose blocks are one pytree with a leading axis of layers.

    Attributes:
      arrays: the arrays of all blocks, [layers, ...] each.
      rest: one block without its arrays.
      ends: the model without blocks.
    """

    arrays: PyTree
    rest: PyTree
    ends: Transformer
    count: int = eqx.field(static=True)

    def block(self, layer: Int[Array, ""] | int) -> Block:
        """The block of one layer."""
        return eqx.combine(jax.tree.map(lambda array: array[layer], self.arrays), self.rest)

    def metric(self, metric: Metric, x: Float[Array, "batch seq d_model"], rules: Rules = EXACT) -> Array:
        """The metric, [batch], of what comes out of the last block; the trace has the last position only.

        Raises:
          UserError: the metric reads at positions of its own.
        """
        own = (LogitDifference, LogProbability, ProbabilityDifference, Divergence)
        if isinstance(metric, own) and metric.position is not None:
            raise UserError(
                f"{type(metric).__name__}(position=...): stacked layers unembed the last position only: leave position "
                "out, or take patch_effects and attribute."
            )
        last = normed(self.ends.final_norm, x[:, -1:], rules)
        return metric(Trace(self.ends.unembed(last), {}))


def stack_layers(model: Transformer) -> Layers:
    """Stack the weights of all blocks (a copy).

    Raises:
      UserError: two blocks differ in structure, shapes or settings (windows, replaced leaves).
    """
    parts = [eqx.partition(block, eqx.is_array) for block in model.blocks]
    for index, (arrays, rest) in enumerate(parts):
        shapes = [leaf.shape for leaf in jax.tree.leaves(arrays)]
        if not eqx.tree_equal(rest, parts[0][1]) or shapes != [leaf.shape for leaf in jax.tree.leaves(parts[0][0])]:
            raise UserError(
                f"blocks/{index} differs from blocks/0, so their weights cannot be stacked: take patch_effects and "
                "attribute, which take any model."
            )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(arrays for arrays, _ in parts))
    return Layers(stacked, parts[0][1], dataclasses.replace(model, blocks=()), len(parts))


class Look:
    """The tap of one block: adds to named arrays, puts values, keeps what is asked for."""

    def __init__(self, keep: Sequence[str] = (), add: Mapping[str, Array] | None = None, edit: Any = None):
        self.keep, self.add, self.edit = tuple(keep), dict(add or {}), edit
        self.arrays: dict[str, Array] = {}

    def wants(self, name: str) -> bool:
        return name in self.keep or name in self.add or self.edit is not None

    def __call__(self, name: str, value: Array) -> Array:
        if name in self.add:
            value = value + self.add[name]
        if self.edit is not None:
            value = self.edit(name, value)
        if name in self.keep:
            self.arrays[name] = value
        return value


@eqx.filter_jit
def layer_arrays(
    layers: Layers, tokens: Int[Array, "batch seq"], names: Sequence[str]
) -> dict[str, Float[Array, "layers batch seq ..."]]:
    """The named arrays of all blocks, [layers, batch, seq, ...].

    Raises:
      UserError: a block has no such array.
    """

    def step(x: Array, arrays: PyTree) -> tuple[Array, dict[str, Array]]:
        look = Look(names)
        x = eqx.combine(arrays, layers.rest)(x, tap=look)
        for name in names:
            if name not in look.arrays:
                raise UserError(f"a block has no array {name!r}: give names within a block, such as 'mlp/out'.")
        return x, look.arrays

    return jax.lax.scan(step, layers.ends.embedding(tokens), layers.arrays)[1]


@eqx.filter_jit
def layer_attributions(
    layers: Layers,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    fills: Mapping[str, Float[Array, "layers batch seq ..."]],
    rules: Rules = EXACT,
) -> dict[str, Float[Array, "layers batch seq ..."]]:
    """sum_d (fill - a)_d * dM/da_d for every layer and position of the named arrays, derivatives under `rules`.

    The sum is over the last axis: of `attn/z` there is a number for every head.

    AtP with EXACT, RelP with RELEVANCE. The metric reads the last position.
    """
    start = layers.ends.embedding(tokens)

    def total(deltas: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        def step(x: Array, given: tuple[Any, Mapping[str, Array]]) -> tuple[Array, dict[str, Array]]:
            look = Look(tuple(deltas), given[1])
            x = eqx.combine(given[0], layers.rest)(x, tap=look, rules=rules)
            return x, look.arrays

        x, arrays = jax.lax.scan(step, start, (layers.arrays, deltas))
        return jnp.sum(layers.metric(metric, x, rules)), arrays

    zeros = {name: jnp.zeros_like(fill) for name, fill in fills.items()}
    slopes, arrays = jax.grad(total, has_aux=True)(zeros)
    return {name: jnp.sum((fills[name] - arrays[name]) * slopes[name], axis=-1) for name in fills}


@eqx.filter_jit
def layer_patch_effects(
    layers: Layers,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    fills: Mapping[str, Float[Array, "layers batch seq d"]],
    positions: Int[Array, " places"],
) -> dict[str, Float[Array, "layers batch places"]]:
    """M(run with a[:, p] <- fill[:, p]) - M(run) for every layer and every p of `positions`: the ground truth.

    All positions of a layer are one batch: batch * places rows at once. The metric reads the last position.
    """
    batch, places = tokens.shape[0], positions.shape[0]
    before = layer_arrays(layers, tokens, ("resid/pre", "resid/post"))
    base = layers.metric(metric, before["resid/post"][-1])
    many = lambda x: jnp.broadcast_to(x[None], (places, *x.shape)).reshape(places * batch, *x.shape[1:])
    here = (positions[:, None] == jnp.arange(tokens.shape[1])).repeat(batch, axis=0)[..., None]

    def after(name: str, layer: Array) -> Array:
        fill = many(fills[name][layer])

        def through(index: Array, x: Array) -> Array:
            put = lambda own, value: jnp.where(here & (index == layer), fill, value) if own == name else value
            return layers.block(index)(x, tap=Look(edit=put))

        x = jax.lax.fori_loop(layer, layers.count, through, many(before["resid/pre"][layer]))
        rows = x.reshape(places, batch, *x.shape[1:])
        return jax.lax.map(lambda x: layers.metric(metric, x), rows).T - base[:, None]

    return {name: jax.lax.map(functools.partial(after, name), jnp.arange(layers.count)) for name in fills}


@eqx.filter_jit
def layer_set_metric(
    layers: Layers,
    tokens: Int[Array, "batch seq"],
    metric: Metric,
    name: str,
    layer: Int[Array, ""],
    value: Float[Array, "batch seq ..."],
) -> Float[Array, " batch"]:
    """The metric of the run in which the array `name` of one block is `value`; one program for all layers."""

    def through(index: Array, x: Array) -> Array:
        put = lambda own, found: jnp.where(index == layer, value, found) if own == name else found
        return layers.block(index)(x, tap=Look(edit=put))

    return layers.metric(metric, jax.lax.fori_loop(0, layers.count, through, layers.ends.embedding(tokens)))
