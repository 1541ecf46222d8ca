"""A planted successor head is found, alone of all heads; one that moves two on is not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.successor_heads import class_logits, share_right
from jaxinterp.models.transformer import TransformerConfig, initialise

TOKENS, WIDTH = 7, 16


def planted(step):
    """Head 2 of layer 1 reads token t and writes what unembeds to t + step; MLP 0 is off, the rest random."""
    config = TransformerConfig(
        vocab_size=TOKENS, d_model=WIDTH, layers=2, heads=4, kv_heads=4, head_dim=8, d_mlp=8, context=8, tied=False
    )
    model = initialise(config, jax.random.key(0))
    attention = model.blocks[1].attn
    value, out = np.array(attention.v_proj.weight), np.array(attention.o_proj.weight)
    value[:, 16:24], out[16:24] = 0, 0
    for token in range(TOKENS):
        value[token, 16 + token] = 1
        out[16 + token, 8 + (token + step) % TOKENS] = 1
    embedding, unembedding = np.eye(TOKENS, WIDTH), np.zeros((WIDTH, TOKENS))
    unembedding[8 : 8 + TOKENS] = np.eye(TOKENS)
    arrays = (embedding, unembedding, value, out, 0 * np.array(model.blocks[0].mlp.down_proj.weight))
    places = lambda m: [
        m.embedding.token, m.unembedding.weight, m.blocks[1].attn.v_proj.weight, m.blocks[1].attn.o_proj.weight,
        m.blocks[0].mlp.down_proj.weight,
    ]  # fmt: skip
    return eqx.tree_at(places, model, [jnp.asarray(a, jnp.float32) for a in arrays])


@pytest.mark.parametrize(("step", "right"), [(1, 1.0), (2, 0.0)])
def test_the_planted_head_is_found(step, right):
    logits = class_logits(planted(step), jnp.arange(TOKENS))
    score = share_right(logits, np.arange(TOKENS))
    assert logits.shape == (8, TOKENS, TOKENS) and score[6] == right
    assert np.delete(score, 6).max() < 0.7
    # Of another order the same head is wrong: the control is what a search finds by luck.
    draw = np.random.default_rng(0)
    assert np.mean([share_right(logits, draw.permutation(TOKENS))[6] for _ in range(50)]) < 0.4
