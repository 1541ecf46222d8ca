"""Strengths from weights, times what the text adds, are the edges between neighbouring layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.causal.weights_circuits import de_embedding, strengths
from jaxinterp.core.errors import UserError
from jaxinterp.models.transformer import initialise
from tests.causal import dense
from tests.causal.small_models import GPT2, LLAMA, PROMPT, weights, with_random_biases


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_strengths_times_the_text_are_the_edges(config):
    model, given = with_random_biases(initialise(config, jax.random.key(1))), weights(config)
    transcoders = from_arrays(**given, dtype=jnp.float32)
    independent = dense.Dense(model, PROMPT, **given, thresholds=[np.zeros(5)] * config.layers)
    adjacency, _, _, _ = independent.graph()
    late = config.layers - 1
    target, (_, p, j, _) = next((n, f) for n, f in enumerate(independent.features) if f[0] == late and f[1] == 2)
    found = strengths(model, transcoders, late - 1, late, j)
    scale, attention_scale = independent.scales[f"mlp{late}"][p, 0], independent.scales[f"attn{late}"][:, 0]
    checked = 0
    for source, (layer, q, i, z) in enumerate(independent.features):
        if layer != late - 1 or q > p:
            continue
        residual = float(found.residual[i]) if q == p else 0.0
        through = independent.patterns[late][:, p, q] @ np.asarray(found.heads[:, i]) * attention_scale[q]
        assert z * scale * (residual + through) == pytest.approx(adjacency[target, source], abs=2e-5)
        checked += abs(adjacency[target, source]) > 0.01
    assert checked >= 2


def test_de_embedding_of_the_first_layer():
    model, given = initialise(LLAMA, jax.random.key(1)), weights(LLAMA)
    transcoders = from_arrays(**given, dtype=jnp.float32)
    expected = np.asarray(model.embedding.token) @ given["encoders"][0][3]
    np.testing.assert_allclose(de_embedding(model, transcoders, 0, 3), expected, atol=1e-4)
    with pytest.raises(UserError, match="source=1"):
        strengths(model, transcoders, 1, 1, 0)
    with pytest.raises(UserError, match="below 5"):
        de_embedding(model, transcoders, 0, 5)
