"""Head loadings: which attention heads carry an effect.

The effect of a source on a target is a sum over paths through the frozen map. A path goes through heads or around
them, along the residual stream and skip paths:

    last    the path's last head is (l, h):  effect = rest + sum_{l, h} last[l, h],  rest = paths through no head
    all     the path goes through (l, h), whatever else it goes through; a path through two heads counts twice

With z [seq, heads, head_dim] = what a head adds up from its values, and g = ∂target / ∂z[l, :, h] (`last`: with no
attention behind it),  loading(s -> t; l, h) = g . (change of z[l, :, h] by s). `all` is what the effect loses where the
head's pattern is set to 0.

It answers "which heads moved this here"; why a head looked there (its pattern) is not part of a graph with frozen
patterns.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.causal.graphs.build import Places
from jaxinterp.causal.graphs.capture import Captured
from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.linear import Effects, Frozen, Sources, Writes, contract
from jaxinterp.causal.graphs.transcoders import Transcoders
from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import Add, Edit


class HeadLoadings(NamedTuple):
    """Loadings on one target, sources in the order of the graph's nodes (features, errors, tokens)."""

    heads: Float[np.ndarray, "layers heads sources"]
    rest: Float[np.ndarray, " sources"]
    """Effects through no head."""


def head_loadings(captured: Captured, graph: Graph, target: int, *, paths: str = "last") -> HeadLoadings:
    """Which heads carry the effects of all sources on one node.

    Args:
      captured, graph: a prompt and its graph.
      target: the number of a feature or target among the graph's nodes.
      paths: "last" or "all", see the module.
    Raises:
      UserError: the node is an error or a token, which have no inputs; or `paths` is another word.
    """
    if paths not in ("last", "all"):
        raise UserError(f"paths={paths!r} must be 'last' or 'all'.")
    place = Places(captured)
    if 0 <= target < len(graph.features):
        layer, position, index = (int(each) for each in graph.features[target])
        reader = captured.transcoders.readers[captured.transcoders.layers.index(layer)]
        read = reader.encoder[index]
    elif graph.targets.start <= target < graph.size:
        layer, position, matrix = graph.layers, len(graph.tokens) - 1, captured.unembedding
        token = int(graph.target_tokens[target - graph.targets.start])
        if token < 0:
            raise UserError(f"target={target} is a custom vector, which the graph does not keep: take a token.")
        read = matrix[:, token] - matrix.mean(axis=1)
    else:
        raise UserError(f"target={target} is not a feature or a target of this graph, which has {graph.size} nodes.")
    heads, rest = _loadings(
        captured.frozen,
        captured.sources,
        captured.transcoders,
        captured.writes,
        jnp.asarray(layer, jnp.int32),
        jnp.asarray(position, jnp.int32),
        read,
        paths == "last",
    )
    slots = place.slots_of(graph.features)
    shape = (graph.layers, -1)

    def in_order(effects: Effects) -> np.ndarray:
        count = effects.features.shape[0]
        parts = (np.asarray(effects.features).reshape(count, -1)[:, slots], np.asarray(effects.errors), effects.tokens)
        return np.concatenate([np.asarray(part).reshape(count, -1) for part in parts], axis=1)

    loads = in_order(heads)
    return HeadLoadings(loads.reshape(*shape, loads.shape[1]), in_order(rest)[0])


@eqx.filter_jit
def _loadings(
    frozen: Frozen,
    sources: Sources,
    transcoders: Transcoders,
    writes: Writes,
    layer: Int[Array, ""],
    position: Int[Array, ""],
    read: Float[Array, " d"],
    last: bool,
) -> tuple[Effects, Effects]:
    """Effects of the sources through every head, layer after layer, and through none."""
    layers = range(len(frozen.skips))
    stopped: dict[str, Edit] = {f"blocks/{each}/attn/in": jax.lax.stop_gradient for each in layers}

    def target(sources: Sources, offsets: Float[Array, "layers seq heads d"], stop: bool) -> Float[Array, ""]:
        moved: dict[str, Edit] = {f"blocks/{each}/attn/z": Add(offsets[each][None]) for each in layers}
        reads = frozen.reads(frozen.trace(sources, edits=moved | (stopped if stop else {})))
        every = jnp.concatenate([reads.mlp, reads.final[None]])
        return every[layer, position] @ read

    def moved_by(sources: Sources) -> Float[Array, "layers seq heads d"]:
        trace = frozen.trace(sources)
        return jnp.stack([trace[f"blocks/{each}/attn/z"][0] for each in layers])

    with jax.default_matmul_precision("highest"):
        z, pull = jax.vjp(moved_by, sources)
        gradient = jax.grad(target, argnums=1)(sources, jnp.zeros_like(z), last)
        count, heads = z.shape[0], z.shape[2]
        which = jnp.eye(count * heads, dtype=z.dtype).reshape(-1, count, 1, heads, 1)
        through = jax.vmap(lambda own: pull(own * gradient)[0])(which)
        around = jax.grad(target)(sources, jnp.zeros_like(z), True)
        alone = jax.tree.map(lambda array: array[None], around)
        return contract(through, sources, transcoders, writes), contract(alone, sources, transcoders, writes)
