"""MoE-X: the mixture against its wide MLP and against a loop over experts; the router against counted activity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.models.layers import Linear
from jaxinterp.models.mixtures import moe_x as m
from jaxinterp.models.mlp import MLP
from jaxinterp.models.tiny import planted_mlp


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def mixture(routed, k=2, experts=5, d=6, hidden=4, **more):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape))
    router = Linear(normal(d, experts), None) if routed else None
    return m.MoEX(normal(experts, d, hidden), normal(experts, hidden), normal(experts, hidden, d), router, k, **more)


X = np.random.default_rng(1).normal(size=(2, 7, 6))


def by_hand(layer, logits, x):
    """One token at a time, one expert at a time."""
    y = np.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        chosen = np.argsort(-np.asarray(logits[place]))[: layer.k]
        sizes = np.exp(np.asarray(logits[place])[chosen])
        for e, size in zip(chosen, sizes / sizes.sum(), strict=True):
            neurons = np.maximum(x[place] @ np.asarray(layer.up[e]) + np.asarray(layer.up_bias[e]), 0)
            y[place] += size * (neurons @ np.asarray(layer.down[e]))
    return y


@pytest.mark.parametrize("routed", [False, True])
def test_the_mixture_is_its_wide_mlp(routed):
    layer, x = mixture(routed, scale=3.0), jnp.asarray(X)
    logits = layer.logits(x)
    np.testing.assert_allclose(layer(x), by_hand(layer, logits, X), rtol=0, atol=1e-12)
    index, weight = layer.weights(logits)
    wide = np.repeat(np.asarray(m.spread(index, weight, 5)), 4, axis=-1)  # w~
    up = np.concatenate(np.asarray(layer.up), axis=1)
    down = np.concatenate(np.asarray(layer.down), axis=0)
    hidden = wide * np.maximum(X @ up + np.asarray(layer.up_bias).ravel(), 0)
    np.testing.assert_allclose(layer.hidden(x), hidden, rtol=0, atol=1e-12)
    np.testing.assert_allclose(layer(x), hidden @ down, rtol=0, atol=1e-12)
    # Broken variant: weights repeated in the other order belong to other neurons.
    tiled = np.tile(np.asarray(m.spread(index, weight, 5)), 4)
    assert np.abs(tiled * np.maximum(X @ up, 0) @ down - layer(x)).max() > 0.1


def test_expected_activity_is_the_share_of_active_neurons():
    """4096 neurons with normal entries, as the router supposes."""
    draw = np.random.default_rng(2)
    up = jnp.asarray(draw.normal(size=(3, 16, 4096)) + np.array([-0.3, 0.0, 0.3])[:, None, None])
    bias = jnp.asarray(draw.normal(size=(3, 4096)) + 1)
    x = draw.normal(size=(20, 16))
    counted = np.mean(np.einsum("nd,mdh->nmh", x, up) + np.asarray(bias) > 0, axis=-1)
    expected = m.expected_activity(jnp.asarray(x), up, bias)
    assert np.abs(expected - counted).mean() < 0.01
    assert np.abs(m.expected_activity(jnp.asarray(x), up) - counted).mean() > 0.02  # without the biases
    shifted = up.at[0].add(-0.2 * jnp.sign(jnp.asarray(x[0]))[:, None])
    lower = m.expected_activity(jnp.asarray(x[0]), shifted)
    assert lower[0] < m.expected_activity(jnp.asarray(x[0]), up)[0], "an expert that fires less is preferred"


def test_gradients_reach_the_experts_through_the_router():
    layer, x = mixture(False, k=5, activation="identity"), jnp.asarray(X)
    gradient = jax.grad(lambda up: jnp.sum(m.expected_activity(x, up)))(layer.up)
    assert np.abs(gradient).min() > 0


def test_an_upcycled_mlp_is_the_dense_one():
    with jax.enable_x64(False):
        dense = planted_mlp(jax.random.key(0), 16, 6, 6, threshold=0.3)
    layer = m.upcycled(dense, experts=4, k=2)
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(layer(x), dense(x), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="gated"):
        m.upcycled(MLP(dense.up_proj, dense.up_proj, dense.down_proj, "relu"), 4, 2)


def test_load_balance_is_one_where_even_and_experts_where_not():
    even = jnp.zeros((8, 4))
    np.testing.assert_allclose(m.load_balance(even, jnp.arange(8)[:, None] % 4), 1)
    one = jnp.zeros((8, 4)).at[:, 2].set(50.0)
    np.testing.assert_allclose(m.load_balance(one, jnp.full((8, 1), 2)), 4)
    weight = jnp.asarray([1.0, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(m.load_balance(even, jnp.arange(8)[:, None] % 4, weight), 1)


def test_softmax_over_all_experts_is_the_switch_convention():
    layer, x = mixture(True, k=1, softmax_over="all"), jnp.asarray(X)
    index, weight = layer.weights(layer.logits(x))
    probability = jax.nn.softmax(layer.logits(x), axis=-1)
    np.testing.assert_allclose(weight[..., 0], probability.max(-1))
    np.testing.assert_array_equal(index[..., 0], probability.argmax(-1))
