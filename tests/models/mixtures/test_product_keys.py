"""Product keys: the best pairs against all n^2 sums; neurons against a loop; gradients against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.models.mixtures import product_keys as pk

D, D_OUT, N, CHANNELS, KNN, D_KEY = 6, 5, 7, 3, 2, 4
X = np.random.default_rng(0).normal(size=(2, 4, D)).astype(np.float32)


def by_hand(layer, x):
    """Every score of every pair, one neuron at a time."""
    scores = np.asarray(layer.scores(jnp.asarray(x)))
    read, write = np.asarray(layer.read, np.float64), np.asarray(layer.write, np.float64)
    y = np.zeros((*x.shape[:-1], D_OUT))
    for place in np.ndindex(*x.shape[:-1]):
        for c in range(CHANNELS):
            sums = (scores[place][0, c, :, None] + scores[place][1, c, None, :]).ravel()
            best = np.argsort(-sums, kind="stable")[:KNN]
            weight = np.exp(sums[best]) / np.exp(sums[best]).sum() if layer.kind == "peer" else sums[best]
            for w, neuron in zip(weight, best, strict=True):
                row = neuron + (0 if layer.kind == "peer" else c * N * N)
                inner = x[place] @ read[row]
                gelu = float(jax.nn.gelu(jnp.float32(inner)))
                y[place] += w * (gelu if layer.kind == "peer" else inner) * write[row]
    return y


@pytest.mark.parametrize("kind", ["linear", "peer"])
def test_the_layer_is_the_sum_over_the_best_of_all_neurons(kind):
    layer = pk.random_product_keys(jax.random.key(1), D, D_OUT, N, CHANNELS, KNN, D_KEY, kind)
    wanted = by_hand(layer, X)
    np.testing.assert_allclose(layer(jnp.asarray(X)), wanted, rtol=0, atol=1e-5)
    other = pk.ProductKeyMLP(layer.scores, layer.read, jnp.roll(layer.write, 1, axis=0), KNN, kind)
    assert np.abs(other(jnp.asarray(X)) - wanted).max() > 0.01


def test_the_best_pairs_are_among_the_best_of_each_side():
    scores = jnp.asarray(np.random.default_rng(2).normal(size=(50, 2, 2, 9)).astype(np.float32))
    found = pk.choose(scores, 4)
    every = (scores[:, 0, :, :, None] + scores[:, 1, :, None, :]).reshape(50, 2, 81)
    values, index = jax.lax.top_k(every, 4)
    np.testing.assert_allclose(found.scores, values)
    np.testing.assert_array_equal(found.neurons, index)


def test_gradients_are_those_of_gathered_rows():
    layer = pk.random_product_keys(jax.random.key(3), D, D_OUT, N, CHANNELS, KNN, D_KEY)
    x, index = jnp.asarray(X), jnp.asarray(np.random.default_rng(4).integers(0, 147, (2, 4, 6)))
    plain = lambda x, rows: jnp.sum(jnp.sin(jnp.einsum("bsd,bskd->bsk", x, rows[index])))
    ours = lambda x, rows: jnp.sum(jnp.sin(pk.selected_dot(x, rows, index)))
    for mine, theirs in zip(
        jax.grad(ours, argnums=(0, 1))(x, layer.read), jax.grad(plain, argnums=(0, 1))(x, layer.read), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
