"""Reading only chosen neurons: the same numbers as the mask, in a model and in generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.gathered import gathered
from jaxinterp.models.generate import generate
from jaxinterp.models.leave_out import BySize, LeaveOut, TopK
from jaxinterp.models.load import Subject
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.models.transformer import TransformerConfig, initialise

SIZES = {"vocab_size": 20, "d_model": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "d_mlp": 32}


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(**SIZES, context=32, rotary_dimensions=8, mlp_bias=True)
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape)
    return jax.tree.map(noise, initialise(config, jax.random.key(0)))


@pytest.mark.parametrize(("block", "scaled"), [(1, False), (1, True), (4, False)])
def test_one_token_equals_the_mask(model, block, scaled):
    mlp = model.blocks[0].mlp
    scale = jnp.linspace(0.1, 3.0, 32) if scaled else jnp.ones(32)
    fast = gathered(mlp, 12, scale=scale, block=block)
    x = jax.random.normal(jax.random.key(2), (5, 8))
    s = jax.nn.silu(np.asarray(x @ mlp.gate_proj.weight + mlp.gate_proj.bias))
    up = np.asarray(x @ mlp.up_proj.weight + mlp.up_proj.bias)
    sizes = np.linalg.norm((np.abs(s) * np.asarray(scale)).reshape(5, -1, block), axis=-1)
    mask = np.zeros((5, 32 // block), bool)
    np.put_along_axis(mask, np.argsort(-sizes, axis=-1)[:, : 12 // block], True, axis=-1)
    hidden = np.where(np.repeat(mask, block, axis=-1), s * up, 0)
    expected = hidden @ np.asarray(mlp.down_proj.weight) + np.asarray(mlp.down_proj.bias)
    np.testing.assert_allclose(fast(x), expected, atol=1e-5)
    one = np.concatenate([np.asarray(fast(row[None])) for row in x])
    np.testing.assert_allclose(one, expected, atol=1e-5)
    fewer = gathered(mlp, 12 - block, scale=scale, block=block)
    assert np.abs(np.asarray(fewer(x[:1])) - expected[:1]).max() > 1e-3  # broken: a neuron less


def test_generation_with_gathered_neurons_is_that_of_the_edit(model):
    fast = replace(model, {"blocks/0/mlp": gathered(model.blocks[0].mlp, 8)})
    edit = {"blocks/0/mlp/pre": LeaveOut(BySize(activation="silu"), TopK(8))}
    tokens = jnp.asarray([[1, 5, 2, 7]])
    np.testing.assert_allclose(run(fast, tokens).logits, run(model, tokens, edits=edit).logits, atol=1e-5)
    out = generate(Subject(fast, None, "fast"), [1, 5, 2, 7], max_tokens=6)
    expected = generate(Subject(model, None, "slow"), [1, 5, 2, 7], max_tokens=6, edits=edit)
    assert out.tokens == expected.tokens
    np.testing.assert_allclose(out.log_probabilities, expected.log_probabilities, atol=1e-4)
    few = run(replace(model, {"blocks/0/mlp": gathered(model.blocks[0].mlp, 7)}), tokens).logits
    assert np.abs(np.asarray(few) - np.asarray(run(fast, tokens).logits)).max() > 1e-3  # broken: a neuron less


def test_bad_sizes_are_refused(model):
    mlp = model.blocks[0].mlp
    for arguments, says in (
        ({"keep": 0}, "keep=0 must"),
        ({"keep": 10, "block": 4}, "block=4 must"),
        ({"keep": 40}, "keep=40 must"),
    ):
        with pytest.raises(UserError, match=says):
            gathered(mlp, **arguments)
    with pytest.raises(UserError, match="without a gate"):
        gathered(model.blocks[0].attn, 4)
