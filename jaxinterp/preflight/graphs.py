"""What an attribution graph takes, before anything is trained or run: bytes by what they are, from shapes alone.

    on the device   model weights, transcoders, and the program that gives the effects on a batch of targets
                    (temporary arrays and result, by the compiler's own count)
    on the host     rows      [targets + features, all sources]      filled batch after batch
                    adjacency [nodes, nodes]                          the graph

    nodes = features + layers * seq errors + seq tokens + targets

How many features are active is not known before the prompt is run: at most k for each token and layer with TopK, at
most all of them else; `active` gives a better guess.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxinterp.causal.graphs.linear import Writes, direct_effects, freeze
from jaxinterp.causal.graphs.transcoders import Reader, Transcoders
from jaxinterp.core.errors import UserError
from jaxinterp.models.transformer import Transformer
from jaxinterp.preflight.estimate import in_bytes


@dataclass(frozen=True)
class GraphMemory:
    """Bytes by what they are, and how many features and nodes the graph has at most."""

    device: dict[str, int]
    host: dict[str, int]
    features: int
    nodes: int

    def lines(self) -> list[str]:
        """One line for the device and one for the host, in words."""
        return [
            f"{where}: {in_bytes(sum(parts.values()))} = "
            + " + ".join(f"{name} {in_bytes(size)}" for name, size in parts.items())
            for where, parts in (
                ("device", self.device),
                (f"host, at most {self.features:,} features and {self.nodes:,} nodes", self.host),
            )
        ]


def graph_memory(
    model: Transformer,
    transcoders: Transcoders,
    seq: int,
    *,
    active: int | None = None,
    targets: int = 10,
    max_features: int | None = None,
    batch: int = 64,
) -> GraphMemory:
    """The memory of `attribution_graph(model, prompt, transcoders, ...)` on one device; nothing is run.

    Args:
      model, transcoders: arrays or their shapes (`transcoder_shapes`).
      seq: tokens of the prompt, the special token included.
      active: active features per token and layer at most; default: k, or all features where there is no k.
      targets, max_features, batch: as for `attribution_graph`.
    Raises:
      UserError: a size is not positive.
    """
    for name, value in (
        ("seq", seq),
        ("targets", targets),
        ("batch", batch),
        ("active", 1 if active is None else active),
    ):
        if value < 1:
            raise UserError(f"{name}={value} must be positive.")
    shape = jax.ShapeDtypeStruct
    dtype = transcoders.readers[0].encoder.dtype
    d, layers, readers = model.config.d_model, len(model.blocks), transcoders.readers
    most = [min(active or reader.k or width, width) for reader in readers for width in (reader.encoder.shape[0],)]
    width = max(8, -(-max(most) // 8) * 8)
    skips: list[Any] = [None] * layers
    for layer, skip in zip(transcoders.layers, transcoders.skip, strict=True):
        skips[layer] = skip
    as_graph = jax.tree.map(
        lambda leaf: shape(leaf.shape, dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, _shapes(model)
    )

    def prepared(model: Transformer, skips: Any) -> Any:
        zero = lambda *sizes: jnp.zeros(sizes, dtype)
        frozen, sources = freeze(model, jnp.zeros(seq, jnp.int32), zero(layers, seq, d), skips)
        places = (len(readers), seq, width)
        writes = Writes(jnp.zeros(places, jnp.int32), zero(*places), zero(layers, seq, d), zero(layers, seq, d))
        return frozen, sources, writes

    frozen, sources, writes = eqx.filter_eval_shape(prepared, as_graph, tuple(_shapes(skips)))
    features = sum(most) * (seq - 1)
    kept = features if max_features is None else min(features, max_features)
    batch = min(batch, -(-(features + targets) // 8) * 8)
    at = shape((batch,), jnp.int32)
    given = (frozen, sources, _shapes(transcoders), writes, at, at, shape((batch, d), dtype))
    arrays, rest = eqx.partition(given, lambda leaf: isinstance(leaf, shape))
    program = jax.jit(lambda arrays: direct_effects(*eqx.combine(arrays, rest)))
    analysis: Any = program.lower(arrays).compile().memory_analysis()
    nodes = kept + (layers + 1) * seq + targets
    rows = (kept + targets) * (features + (layers + 1) * seq)
    return GraphMemory(
        {
            "model weights": _bytes(as_graph),
            "transcoders": _bytes(transcoders),
            "temporary": int(analysis.temp_size_in_bytes),
            "effects of a batch": int(analysis.output_size_in_bytes),
        },
        {"rows": rows * dtype.itemsize, "adjacency": nodes * nodes * dtype.itemsize},
        kept,
        nodes,
    )


def transcoder_shapes(
    model: Transformer, features: int, *, k: int | None, skip: bool = False, cross_layer: bool = False
) -> Transcoders:
    """The shapes of float32 transcoders of all MLPs of a model, before they are trained."""
    d, layers = model.config.d_model, len(model.blocks)

    def made() -> Transcoders:
        zero = lambda *sizes: jnp.zeros(sizes, jnp.float32)
        readers = [
            Reader(
                zero(features, d), zero(features), zero(features),
                zero(features, layers - layer if cross_layer else 1, d), k,
            )
            for layer in range(layers)
        ]  # fmt: skip
        skips = tuple(zero(d, d) if skip else None for _ in readers)
        return Transcoders(tuple(readers), tuple(zero(d) for _ in readers), skips, tuple(range(layers)))

    return eqx.filter_eval_shape(made)


def _shapes(tree: PyTree) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _bytes(tree: PyTree) -> int:
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
