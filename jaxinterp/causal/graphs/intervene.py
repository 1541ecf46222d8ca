"""Interventions on features, and what a graph predicts of them.

    direct   patterns, norm scales and all other features as they were: every pre-activation moves by
             adjacency[t, s] * delta / activation_s, exactly
    frozen   patterns and scales as they were; features behind the intervention are computed anew
    free     everything behind the intervention is computed anew but the errors, which stay in all modes

While no feature switches on or off, `frozen` is linear too:  Δz = M Δz + δ,  M[t, s] = adjacency[t, s] / activation_s,
δ the intervention, so that  Δ = (I - M)^-1 δ  predicts it (`total_effects`).
"""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.causal.graphs.capture import Captured
from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.linear import Frozen, Reads, Sources
from jaxinterp.causal.graphs.transcoders import Reader
from jaxinterp.core.errors import UserError
from jaxinterp.models.rules import EXACT

MODES = ("direct", "frozen", "free")
Feature = tuple[int, int, int]
"""(layer, position, index)."""


class Outcome(eqx.Module):
    """What an intervention does. `pre` and `codes` per transcoded layer; `final` is what the unembedding reads."""

    pre: tuple[Float[Array, "seq _"], ...]
    codes: tuple[Float[Array, "seq _"], ...]
    final: Float[Array, "seq d"]
    logits: Float[Array, "seq vocab"]


def intervene(captured: Captured, values: Mapping[Feature, float], *, mode: str = "frozen") -> Outcome:
    """Set features to values and go on as `mode` says.

    Args:
      captured: a prompt (`capture`).
      values: by (layer, position, index) the new activation; 0 removes a feature, and one that was silent may speak.
      mode: see the module.
    Raises:
      UserError: a layer has no transcoder, or a position or index does not exist or is before `first`.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r} must be one of {', '.join(MODES)}.")
    _check(captured, values)
    readers, layers, first = captured.transcoders.readers, captured.transcoders.layers, captured.first
    written = captured.sources.written
    pre, codes = list(captured.seen.pre), list(captured.seen.codes)
    for number, reader in enumerate(readers):
        own = codes[number]
        if mode != "direct":
            reads = _reads(captured.frozen, captured.sources, written, captured.seen.mlp_in, captured.seen.final, mode)
            pre[number], fresh = _encoded(reader, reads.mlp[layers[number]])
            own = own.at[first:].set(fresh[first:])
        for (layer, position, index), value in values.items():
            if layer == layers[number]:
                own = own.at[position, index].set(value)
        for step in range(reader.decoder.shape[1]):
            change = _matmul(own - codes[number], reader.decoder[:, step])
            written = written.at[layers[number + step]].add(change)
        codes[number] = own
    reads = _reads(captured.frozen, captured.sources, written, captured.seen.mlp_in, captured.seen.final, mode)
    if mode == "direct":
        pre = [_encoded(reader, reads.mlp[layer])[0] for reader, layer in zip(readers, layers, strict=True)]
    with jax.default_matmul_precision("highest"):
        logits = captured.model.unembed(reads.final)
    return Outcome(tuple(pre), tuple(codes), reads.final, logits)


@eqx.filter_jit
def _reads(
    frozen: Frozen,
    at: Sources,
    written: Float[Array, "layers seq d"],
    mlp_in: Float[Array, "layers seq d"],
    final: Float[Array, "seq d"],
    mode: str,
) -> Reads:
    with jax.default_matmul_precision("highest"):
        if mode == "free":
            return frozen(eqx.tree_at(lambda s: s.written, at, written), EXACT)
        nothing = jax.tree.map(jnp.zeros_like, at)
        change = frozen.change(at, eqx.tree_at(lambda s: s.written, nothing, written - at.written))
        return Reads(mlp_in + change.mlp, final + change.final)


@eqx.filter_jit
def _encoded(
    reader: Reader, x: Float[Array, "seq d"]
) -> tuple[Float[Array, "seq features"], Float[Array, "seq features"]]:
    with jax.default_matmul_precision("highest"):
        pre = reader.pre(x)
        return pre, reader.activate(pre)


def _matmul(codes: Float[Array, "seq features"], rows: Float[Array, "features d"]) -> Float[Array, "seq d"]:
    with jax.default_matmul_precision("highest"):
        return codes @ rows


def _check(captured: Captured, values: Mapping[Feature, float]) -> None:
    layers, seq = captured.transcoders.layers, captured.tokens.shape[0]
    for layer, position, index in values:
        if layer not in layers:
            raise UserError(f"layer {layer} has no transcoder: features are in layers {layers}.")
        features = captured.transcoders.readers[layers.index(layer)].encoder.shape[0]
        if not captured.first <= position < seq or not 0 <= index < features:
            raise UserError(
                f"feature {index} of layer {layer} at position {position}: give a position from {captured.first} to "
                f"{seq - 1} and an index below {features}."
            )


def total_effects(graph: Graph, changes: Mapping[Feature, float]) -> Float[np.ndarray, " nodes"]:
    """What the graph predicts for mode `frozen`: by how much every feature and target moves, (I - M)^-1 δ.

    Args:
      changes: by feature, by how much its activation is moved (minus its activation: it is removed).
    Raises:
      UserError: a feature is not a node of the graph.
    """
    own = np.zeros(graph.size, graph.adjacency.dtype)
    fixed = np.zeros(graph.size, bool)  # a change of 0 holds a feature where it is
    for feature, change in changes.items():
        own[graph.find(*feature)], fixed[graph.find(*feature)] = change, True
    scale = np.zeros(graph.size, graph.adjacency.dtype)
    scale[: len(graph.features)] = 1 / graph.activation
    total, current = own.copy(), own
    for _ in range(graph.size + 1):
        current = graph.adjacency @ (scale * current)
        current[fixed] = 0  # an intervention sets the value, whatever comes in
        if not current.any():
            break
        total += current
    return total
