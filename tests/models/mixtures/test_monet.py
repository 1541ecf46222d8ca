"""Monet: both decompositions against the explicit sum over n^2 experts; router, statistics, masks, auxiliary losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from jaxinterp.models.mixtures import monet as m

N, D, M, HEADS, K = 5, 6, 4, 3, 2
X = np.random.default_rng(1).normal(size=(2, 4, D))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def mixture(kind):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape))
    if kind == "horizontal":
        experts = m.Horizontal(normal(N, D, M), normal(N, M), normal(N, M, D), normal(N, D))
    else:
        experts = m.Vertical(
            normal(2, N, D, M // 2), normal(2, N, M // 2), normal(2, 2, N, M // 2, D // 2), normal(2, N, D // 2)
        )
    return m.Monet(normal(2, D, HEADS, N), normal(2, HEADS), 1 + normal(2, HEADS) ** 2, experts, K)


def expert(experts, i, j, x):
    """E_ij(x) of one token, in NumPy."""
    f = lambda v: np.maximum(v, 0) ** 2
    e = jax.tree.map(np.asarray, experts)
    if isinstance(experts, m.Horizontal):
        return f(x @ e.up[i] + e.up_bias[i]) @ e.down[j] + e.down_bias[j]
    one, two = f(x @ e.up[0, i] + e.up_bias[0, i]), f(x @ e.up[1, j] + e.up_bias[1, j])
    top = one @ e.down[0, 0, i] + two @ e.down[0, 1, i] + e.down_bias[0, i]
    return np.concatenate([top, one @ e.down[1, 0, j] + two @ e.down[1, 1, j] + e.down_bias[1, j]])


def gates_by_hand(layer, x):
    z = np.einsum("...d,sdhn->...shn", x, layer.router)
    normal = (z - np.asarray(layer.mean)[..., None]) / np.sqrt(np.asarray(layer.variance)[..., None] + 1e-5)
    keep = normal >= np.minimum(normal.max(-1, keepdims=True), norm.ppf(1 - K / N))
    sizes = np.where(keep, np.exp(z), 0)
    return sizes / sizes.sum(-1, keepdims=True)


def explicit(layer, x, keep=None):
    gates, y = gates_by_hand(layer, x), np.zeros_like(x)
    for place in np.ndindex(*x.shape[:-1]):
        for h, i, j in np.ndindex(HEADS, N, N):
            count = gates[place][0, h, i] * gates[place][1, h, j] * (1 if keep is None else keep[i, j])
            y[place] += count * expert(layer.experts, i, j, x[place])
    return y


@pytest.mark.parametrize("kind", ["horizontal", "vertical"])
def test_the_factorised_sum_is_the_explicit_one(kind):
    layer, x = mixture(kind), jnp.asarray(X)
    wanted = explicit(layer, X)
    np.testing.assert_allclose(layer(x), wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    gates = jnp.asarray(gates_by_hand(layer, X))
    by_pairs = m.from_pairs(x, m.expert_pairs(gates), layer.experts, "relu_squared")
    np.testing.assert_allclose(by_pairs, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    # Broken variant: the sides exchanged.
    swapped = m.from_gates(x, gates[..., ::-1, :, :], layer.experts, "relu_squared")
    assert np.abs(swapped - wanted).max() > 0.1


@pytest.mark.parametrize("kind", ["horizontal", "vertical"])
def test_masking_an_expert_takes_away_its_own_term(kind):
    layer, x = mixture(kind), jnp.asarray(X)
    keep = np.ones((N, N))
    keep[1, 3] = 0

    def tap(name, value):
        return value * keep if name == "experts/pairs" else value

    masked = layer(x, tap=tap)
    wanted = explicit(layer, X, keep)
    np.testing.assert_allclose(masked, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    pairs = m.expert_pairs(jnp.asarray(gates_by_hand(layer, X)))[..., 1, 3, None]
    term = np.stack([expert(layer.experts, 1, 3, row) for row in X.reshape(-1, D)]).reshape(X.shape)
    np.testing.assert_allclose(layer(x) - masked, pairs * term, rtol=0, atol=1e-11 * np.abs(wanted).max())


def test_the_expected_number_of_sides_is_active():
    z = jnp.asarray(np.random.default_rng(2).normal(size=(400, 2, 2, 64)) * 3 + 1)
    gates = m.choose(z, m.batch_statistics(z), 8)
    assert 7.5 < np.mean(np.sum(gates > 0, -1)) < 8.5
    np.testing.assert_allclose(gates.sum(-1), 1)
    flat = jnp.zeros((1, 2, 2, 64)).at[..., 5].set(0.1)  # none reaches the threshold: the largest is kept
    np.testing.assert_allclose(m.choose(flat, m.Statistics(jnp.zeros((2, 2)), jnp.ones((2, 2))), 8)[..., 5], 1)


def test_statistics_are_those_of_a_batch_norm():
    z = np.random.default_rng(3).normal(size=(7, 3, 2, 2, 5)) + 2
    found = m.batch_statistics(jnp.asarray(z))
    np.testing.assert_allclose(found.mean, z.mean((0, 1, 4)))
    np.testing.assert_allclose(found.variance, z.var((0, 1, 4)))
    after = m.next_statistics(m.Statistics(jnp.zeros((2, 2)), jnp.ones((2, 2))), found, 7 * 3 * 5)
    np.testing.assert_allclose(after.mean, 0.1 * z.mean((0, 1, 4)))
    np.testing.assert_allclose(after.variance, 0.9 + 0.1 * z.var((0, 1, 4), ddof=1))


def test_training_uses_the_batch_and_not_the_running_statistics():
    layer, x = mixture("horizontal"), jnp.asarray(X)
    z = m.router_logits(x, layer.router)
    trained = m.Monet(layer.router, layer.mean, layer.variance, layer.experts, K, training=True)
    gates = m.choose(z, m.batch_statistics(z), K)
    np.testing.assert_allclose(trained(x), m.from_gates(x, gates, layer.experts, "relu_squared"))
    assert np.abs(trained(x) - layer(x)).max() > 0.1


def test_auxiliary_losses():
    even = jnp.full((6, 2, 3, 4), 0.25)
    np.testing.assert_allclose(m.uniformity(even), np.log(4), rtol=1e-8)
    np.testing.assert_allclose(m.ambiguity(even), 0.75)
    sharp = jax.nn.one_hot(jnp.arange(6)[:, None, None] % 4 * jnp.ones((1, 2, 3), int), 4)
    assert m.ambiguity(sharp) == 0 and m.uniformity(sharp) > np.log(4)
    weight = jnp.asarray([1.0, 1, 1, 1, 0, 0])  # the first four choose each expert once
    np.testing.assert_allclose(m.uniformity(sharp, weight), np.log(4), rtol=1e-8)
