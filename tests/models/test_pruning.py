"""Pruning: what is taken out equals what is masked; exact counts; each with a variant that must fail."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import SetTo
from jaxinterp.models.mixtures.config import MixtureConfig
from jaxinterp.models.pruning import keep_experts, keep_heads, keep_neurons, mask_weights, weight_mask
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise

SIZES = {"vocab_size": 20, "d_model": 8, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "d_mlp": 12}
CONFIG = TransformerConfig(**SIZES, context=8, rotary_dimensions=4, mlp_bias=True, qkv_bias=True)
TOKENS = jnp.asarray([[1, 2, 3, 9], [4, 4, 0, 5]])


@pytest.fixture(scope="module")
def model():
    model = initialise(CONFIG, jax.random.key(0))
    noise = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape)  # biases, too
    return jax.tree.map(noise, model)


def logits(model, edits=None):
    return np.asarray(eqx.filter_jit(run)(model, TOKENS, edits=edits).logits)


def test_taking_neurons_out_is_masking_them(model):
    kept = [0, 2, 3, 7, 11]
    small = keep_neurons(model, {f"blocks/{layer}/mlp": kept for layer in range(2)})
    assert small.config.d_mlp == 5 and small.blocks[0].mlp.up_proj.weight.shape == (8, 5)
    mask = jnp.isin(jnp.arange(12), jnp.asarray(kept))
    edits = {f"blocks/{layer}/mlp/hidden": lambda a: jnp.where(mask, a, 0) for layer in range(2)}
    np.testing.assert_allclose(logits(small), logits(model, edits), atol=1e-5)
    other = keep_neurons(model, {f"blocks/{layer}/mlp": [1, 2, 3, 7, 11] for layer in range(2)})
    assert np.abs(logits(other) - logits(small)).max() > 1e-3  # broken: another neuron
    order = keep_neurons(model, {f"blocks/{layer}/mlp": kept[::-1] for layer in range(2)})
    np.testing.assert_allclose(logits(order), logits(small), atol=1e-5)
    assert keep_neurons(model, {"blocks/0/mlp": kept}).config.d_mlp == 12


def test_taking_heads_out_is_zeroing_what_they_write(model):
    small = keep_heads(model, {f"blocks/{layer}/attn": [1] for layer in range(2)})
    assert (small.config.heads, small.config.kv_heads) == (2, 1)

    def second_group(z):  # [batch, seq, heads, head_dim]: query heads 2 and 3 read key head 1
        return jnp.where((jnp.arange(4) >= 2)[:, None], z, 0)

    edits = {f"blocks/{layer}/attn/z": second_group for layer in range(2)}
    np.testing.assert_allclose(logits(small), logits(model, edits), atol=1e-5)
    first = keep_heads(model, {f"blocks/{layer}/attn": [0] for layer in range(2)})
    assert np.abs(logits(first) - logits(small)).max() > 1e-3  # broken: the other group


def test_taking_experts_out_is_never_choosing_them():
    mixture = MixtureConfig(kind="switch", experts=4, hidden=6, active=1)
    model = initialise(dataclasses.replace(CONFIG, mixture=mixture), jax.random.key(0))
    small = keep_experts(model, {f"blocks/{layer}/mlp": [0, 3] for layer in range(2)})
    assert small.config.mixture.experts == 2
    never = lambda router: jnp.where(jnp.isin(jnp.arange(4), jnp.asarray([0, 3])), router, -1e9)
    edits = {f"blocks/{layer}/mlp/router": never for layer in range(2)}
    np.testing.assert_allclose(logits(small), logits(model, edits), atol=1e-5)
    assert np.abs(logits(model) - logits(small)).max() > 1e-3  # broken: nothing taken out


def test_masks_have_exact_counts_in_every_group():
    score = np.random.default_rng(0).normal(size=(8, 12))
    whole = np.asarray(weight_mask(score, 0.25, within="layer"))
    assert whole.sum() == 72 and score[whole].min() > score[~whole].max()
    output, inputs = (np.asarray(weight_mask(score, 0.5, within=within)) for within in ("output", "input"))
    assert (output.sum(0) == 4).all() and (inputs.sum(1) == 6).all()
    assert (output.sum(1) != 6).any()  # broken: the other axis
    two_four = np.asarray(weight_mask(score, (2, 4), within="output"))
    assert (two_four.reshape(2, 4, 12).sum(1) == 2).all()
    assert (np.asarray(weight_mask(score, (2, 4), within="input")).reshape(8, 3, 4).sum(2) == 2).all()


def test_masked_weights_are_zero_and_the_rest_is_unchanged(model):
    name = "blocks/1/mlp/down_proj"
    weight = model.blocks[1].mlp.down_proj.weight
    mask = weight_mask(jnp.abs(weight), 0.5, within="layer")
    pruned = mask_weights(model, {name: mask})
    np.testing.assert_array_equal(pruned.blocks[1].mlp.down_proj.weight, np.where(mask, weight, 0))
    hidden = run(model, TOKENS)["blocks/1/mlp/hidden"]
    out = hidden @ np.where(mask, weight, 0) + model.blocks[1].mlp.down_proj.bias
    np.testing.assert_allclose(logits(pruned), logits(model, {"blocks/1/mlp/out": SetTo(out)}), atol=1e-5)
    assert np.abs(logits(pruned) - logits(model)).max() > 1e-3  # broken: no mask


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: keep_neurons(model, {"blocks/0/mlp": [12]}), "neuron 12, but there are 12"),
        (lambda model: keep_neurons(model, {"blocks/0/mlp": [1, 1]}), "names a neuron twice"),
        (lambda model: keep_neurons(model, {"blocks/0/mlp": []}), "at least one neuron"),
        (lambda model: keep_neurons(model, {"blocks/0/attn": [0]}), "is a Attention"),
        (lambda model: keep_heads(model, {"blocks/0/attn": [2]}), "key/value head 2, but there are 2"),
        (lambda model: keep_experts(model, {"blocks/0/mlp": [0]}), "is a MLP"),
        (lambda model: mask_weights(model, {"blocks/0/mlp/up_proj": np.ones((2, 2), bool)}), "has shape"),
        (lambda model: mask_weights(model, {"blocks/0/mlp": np.ones((2, 2), bool)}), "not a projection"),
        (lambda model: weight_mask(np.ones((4, 4)), (2, 4), within="layer"), "needs within="),
        (lambda model: weight_mask(np.ones((4, 4)), 1.5, within="input"), "must lie in 0 to 1"),
    ],
)
def test_bad_input_is_refused(model, call, says):
    with pytest.raises(UserError, match=says):
        call(model)
