"""The frozen linear map of a forward pass, and exact direct effects by vector-Jacobian products in batches.

With attention patterns and norm scales held at their values on one prompt, and every MLP replaced by

    y^l = w^l + x^l S_l,      w^l [seq, d] given from outside, S_l the skip path of a transcoder (or none)

what every MLP reads (x^l) and what the unembedding reads (the output of the final norm) are affine in: the token
vectors, the w^l, and the additive constants of the model (biases of norms and attention, learned positions). For a
target with read vector r at x^l[p],  G = ∂(r . x^l[p]) / ∂(all of these),  and

    effect of feature s (layer k, position q, activation z, write vectors D_t)    z * sum_t G^{w}[k + t, q] . D_t
    effect of the error e [d] at (k, q)                                           G^{w}[k, q] . e
    effect of the token at q                                                      G^{token}[q] . vector
    effect of all constants (the `bias` node)                                     sum G . constant

The map comes from `run` with rules that hold patterns and scales, so it is right for every model family that `run` is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.causal.graphs.transcoders import Transcoders
from jaxinterp.core.trees import path_name
from jaxinterp.models.edits import Edit
from jaxinterp.models.rules import Rules
from jaxinterp.models.run import Trace, run
from jaxinterp.models.transformer import Transformer

HELD = Rules(norm=True, attention=True)
"""Norm scales and attention patterns are constants for the derivative."""


class Written(eqx.Module):
    """In place of an MLP: what is given, plus the skip path of what the MLP reads."""

    out: Float[Array, "seq d"]
    skip: Float[Array, "d d"] | None

    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq d"]:
        linear = jnp.zeros_like(x) if self.skip is None else x @ self.skip
        return self.out + linear


class Sources(eqx.Module):
    """What the frozen map is linear in."""

    tokens: Float[Array, "seq embedding_size"]
    """Rows of the embedding table."""
    written: Float[Array, "layers seq d"]
    """What every MLP writes, without its skip path."""
    constants: PyTree
    """The model with nothing but its additive constants."""


class Reads(eqx.Module):
    """What every MLP and the unembedding read."""

    mlp: Float[Array, "layers seq d"]
    final: Float[Array, "seq d"]


class Frozen(eqx.Module):
    """The map of the module's equation: `Sources` to `Reads`; its derivative is the frozen one."""

    model: PyTree
    """The model without its MLPs, its additive constants and its token table."""
    skips: tuple[Float[Array, "d d"] | None, ...]

    def __call__(self, sources: Sources, rules: Rules = HELD) -> Reads:
        return self.reads(self.trace(sources, rules))

    def reads(self, trace: Trace) -> Reads:
        """What a trace says that every MLP and the unembedding read."""
        layers = range(len(self.skips))
        return Reads(jnp.stack([trace[f"blocks/{layer}/mlp/in"][0] for layer in layers]), trace["final"][0])

    def trace(self, sources: Sources, rules: Rules = HELD, edits: Mapping[str, Edit] | None = None) -> Trace:
        """The forward pass with the sources in it."""
        model = eqx.combine(self.model, sources.constants)
        layers = range(len(self.skips))
        leaves = [Written(sources.written[layer], self.skips[layer]) for layer in layers]
        model = eqx.tree_at(
            lambda m: [m.embedding.token, *(block.mlp for block in m.blocks)], model, [sources.tokens, *leaves]
        )
        return run(model, jnp.arange(sources.tokens.shape[0])[None], edits=edits, rules=rules)

    def change(self, at: Sources, change: Sources) -> Reads:
        """How the reads change with the sources, patterns and scales frozen at `at`."""
        return jax.jvp(self, (at,), (change,))[1]


class Writes(eqx.Module):
    """What the nodes write: active features of each (transcoded layer, position), padded with value 0."""

    index: Int[Array, "readers seq most"]
    value: Float[Array, "readers seq most"]
    errors: Float[Array, "layers seq d"]
    constant: Float[Array, "layers seq d"]
    """Decoder biases; at the first positions, all that the MLP writes without its skip path."""


class Effects(eqx.Module):
    """Direct effects of every node on each of several targets."""

    features: Float[Array, "targets readers seq most"]
    errors: Float[Array, "targets layers seq"]
    tokens: Float[Array, "targets seq"]
    bias: Float[Array, " targets"]


def freeze(
    model: Transformer, tokens: Int[Array, " seq"], written: Float[Array, "layers seq d"], skips: Any
) -> tuple[Frozen, Sources]:
    """The frozen map of a prompt, and its sources there.

    Args:
      model: weights in the precision of the result.
      written: per layer what the MLP writes on this prompt, without its skip path.
      skips: per layer [d, d] or None.
    """
    # The map runs on the numbers of the positions in place of ids: none of them is padding.
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, padding=None))
    nothing = [jnp.zeros(()) for _ in model.blocks]
    empty = eqx.tree_at(lambda m: [block.mlp for block in m.blocks], model, nothing)
    if model.embedding.position is not None:
        rows = model.embedding.position[: tokens.shape[0]]
        empty = eqx.tree_at(lambda m: m.embedding.position, empty, rows)
    rest = eqx.tree_at(lambda m: m.embedding.token, empty, jnp.zeros(()))
    constants, rest = eqx.partition(rest, _additive(rest))
    # An unembedding is not part of the map; one that is tied to the table has no place in it.
    return Frozen(rest, tuple(skips)), Sources(model.embedding.token[tokens], written, constants)


def _additive(model: PyTree) -> PyTree:
    """True at what is added and not multiplied: biases (not the unembedding's) and learned positions."""

    def mark(path: tuple[PyTree, ...], leaf: PyTree) -> bool:
        name = path_name(path)
        added = name.endswith("/bias") or name in ("embedding/position", "embedding/token_type")
        return added and not name.startswith("unembedding/")

    return jax.tree_util.tree_map_with_path(mark, model)


@eqx.filter_jit
def direct_effects(
    frozen: Frozen,
    sources: Sources,
    transcoders: Transcoders,
    writes: Writes,
    layer: Int[Array, " targets"],
    position: Int[Array, " targets"],
    read: Float[Array, "targets d"],
) -> Effects:
    """The module's equation for a batch of targets.

    Args:
      layer: which MLP's input each target reads; the number of layers: the output of the final norm.
      position: where it reads.
      read: its read vector.
    """
    with jax.default_matmul_precision("highest"):
        reads, pullback = jax.vjp(frozen, sources)

        def pull(layer: Array, position: Array, read: Array) -> Sources:
            # One row more than there are layers: for each target, all rows but one are zero.
            where = jnp.zeros((len(frozen.skips) + 1, *reads.final.shape), read.dtype)
            where = where.at[layer, position].set(read)
            return pullback(Reads(where[:-1], where[-1]))[0]

        gradient = jax.vmap(pull)(layer, position, read)
        return contract(gradient, sources, transcoders, writes)


def contract(gradient: Sources, sources: Sources, transcoders: Transcoders, writes: Writes) -> Effects:
    """Effects of all nodes, given the gradients of some targets by the sources ([targets, ...] each)."""
    features = []
    for number, reader in enumerate(transcoders.readers):
        felt: PyTree = 0.0
        for step in range(reader.decoder.shape[1]):
            vectors = reader.decoder[writes.index[number], step]  # [seq, most, d]
            target = transcoders.layers[number + step]
            felt = felt + jnp.einsum("tpd,pmd->tpm", gradient.written[:, target], vectors)
        features.append(felt * writes.value[number])
    added = jax.tree.map(
        lambda g, value: jnp.sum(g * value, axis=tuple(range(1, g.ndim))), gradient.constants, sources.constants
    )
    bias = jnp.einsum("tlpd,lpd->t", gradient.written, writes.constant)
    return Effects(
        jnp.stack(features, axis=1),
        jnp.einsum("tlpd,lpd->tlp", gradient.written, writes.errors),
        jnp.einsum("tpd,pd->tp", gradient.tokens, sources.tokens),
        sum(jax.tree.leaves(added), bias),
    )
