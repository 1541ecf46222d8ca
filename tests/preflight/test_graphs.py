"""The memory of a graph, said before it is built, is that of the graph that is built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.graphs.build import attribution_graph
from jaxinterp.causal.graphs.capture import capture
from jaxinterp.causal.graphs.linear import direct_effects
from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.core.errors import UserError
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.preflight.graphs import graph_memory, transcoder_shapes

CONFIG = TransformerConfig(
    vocab_size=12, d_model=8, layers=2, heads=2, kv_heads=2, head_dim=4, d_mlp=10, context=16, rotary_dimensions=4
)
PROMPT = np.array([3, 7, 1, 0])


def test_the_memory_of_a_graph_is_known_before_it_is_built():
    """Every feature is active (large biases, k of them): the bound is then exact."""
    rng = np.random.default_rng(0)
    given = {
        "encoders": [rng.normal(size=(6, 8)) for _ in range(2)],
        "encoder_biases": [np.full(6, 50.0) for _ in range(2)],
        "decoders": [rng.normal(size=(6, 1, 8)) / 50 for _ in range(2)],
        "decoder_biases": [rng.normal(size=8) for _ in range(2)],
    }
    model = initialise(CONFIG, jax.random.key(0))
    transcoders = from_arrays(**given, k=3, dtype=jnp.float32)
    graph = attribution_graph(model, PROMPT, transcoders, targets=[1, 2], batch=8)
    shapes = transcoder_shapes(model, 6, k=3)
    assert jax.tree.structure(shapes) == jax.tree.structure(transcoders)
    found = graph_memory(model, shapes, len(PROMPT), targets=2, batch=8)
    assert (found.features, found.nodes) == (len(graph.features), len(graph.adjacency))
    assert found.host["adjacency"] == graph.adjacency.nbytes
    captured = capture(model, PROMPT, transcoders)
    at = jnp.zeros(8, jnp.int32)
    done = direct_effects.lower(
        captured.frozen, captured.sources, captured.transcoders, captured.writes, at, at, jnp.zeros((8, 8))
    ).compile()
    assert found.device["temporary"] == done.compiled.memory_analysis().temp_size_in_bytes > 0
    assert found.device["transcoders"] == sum(leaf.nbytes for leaf in jax.tree.leaves(transcoders))
    larger = graph_memory(model, shapes, 2 * len(PROMPT), targets=2, batch=8)
    assert larger.host["adjacency"] > 3 * found.host["adjacency"], "not a constant"
    assert "adjacency" in larger.lines()[1] and "model weights" in larger.lines()[0]
    with pytest.raises(UserError, match="batch=0 must be positive"):
        graph_memory(model, shapes, 4, batch=0)
