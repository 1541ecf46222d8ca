"""Neurons without order, and merged models; each with a variant that must fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import Linear
from jaxinterp.models.merge import ensemble, task_arithmetic
from jaxinterp.models.permutation import align, balanced, match_neurons
from jaxinterp.models.pruning import keep_neurons
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.models.transformer import TransformerConfig, initialise

CONFIG = TransformerConfig(20, 8, 1, 1, 1, 8, 12, context=8, rotary_dimensions=8)
TOKENS = jnp.asarray([[1, 2, 3, 9], [4, 4, 0, 5]])


def test_permuted_and_rescaled_neurons_are_brought_back():
    model = initialise(CONFIG, jax.random.key(0))
    order = np.random.default_rng(0).permutation(12)
    shuffled = keep_neurons(model, {"blocks/0/mlp": order.tolist()})
    mlp = shuffled.blocks[0].mlp
    c = jnp.asarray(np.random.default_rng(1).lognormal(size=12), jnp.float32)
    rescaled = jax.tree.map(lambda leaf: leaf, mlp)
    rescaled = type(mlp)(
        mlp.gate_proj,
        Linear(mlp.up_proj.weight * c, None, "out"),
        Linear(mlp.down_proj.weight / c[:, None], None, "in"),
        mlp.activation,
    )
    other = replace(shuffled, {"blocks/0/mlp": rescaled})
    np.testing.assert_allclose(run(other, TOKENS).logits, run(model, TOKENS).logits, atol=1e-5)
    back, cosines = align(other, model)
    np.testing.assert_allclose(back.blocks[0].mlp.gate_proj.weight, model.blocks[0].mlp.gate_proj.weight, atol=1e-6)
    assert cosines["blocks/0/mlp"] == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(run(back, TOKENS).logits, run(model, TOKENS).logits, atol=1e-5)
    stays = np.arange(12)
    assert (match_neurons(np.eye(12), np.eye(12)[order])[0] != stays).any()  # broken: no matching
    x = jax.random.normal(jax.random.key(3), (4, 8))
    np.testing.assert_allclose(balanced(rescaled)(x), rescaled(x), atol=1e-5)
    with pytest.raises(UserError, match="match MLPs of one size"):
        match_neurons(np.ones((3, 2)), np.ones((4, 2)))


def test_a_weight_ensemble_is_each_model_where_its_router_says_so():
    base = initialise(CONFIG, jax.random.key(0))
    tuned = [jax.tree.map(lambda leaf, seed=seed: leaf + 0.02 * seed, base) for seed in (1, -2)]
    merged = ensemble(base, tuned, jax.random.key(1))
    start = task_arithmetic(base, tuned, [0.3, 0.3])
    np.testing.assert_allclose(run(merged, TOKENS).logits, run(start, TOKENS).logits, atol=2e-5)
    leaf, x = merged.blocks[0].mlp, jax.random.normal(jax.random.key(2), (2, 3, 8))
    for index, model in enumerate(tuned):
        one = type(leaf)(leaf.base, leaf.tasks, leaf.inner, Linear(leaf.outer.weight, jnp.eye(2)[index]))
        np.testing.assert_allclose(one(x), model.blocks[0].mlp(x), atol=1e-5)
        assert np.abs(np.asarray(one(x) - tuned[1 - index].blocks[0].mlp(x))).max() > 1e-3  # broken: the other one
    routed = type(leaf)(leaf.base, leaf.tasks, leaf.inner, Linear(jnp.ones_like(leaf.outer.weight), leaf.outer.bias))
    assert np.ptp(np.asarray(routed.mixture(x)), axis=0).min() > 1e-3  # each sequence its own
    with pytest.raises(UserError, match="give one for each"):
        task_arithmetic(base, tuned, [0.3])
