"""Mixer and permuted Kronecker MLPs against their explicit wide matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jaxinterp.models import mixer as m

S, C = 3, 4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def gelu(v):
    return v * 0.5 * (1 + erf(v / np.sqrt(2)))


def test_the_mixer_is_a_wide_mlp_with_kronecker_matrices():
    layer = m.MixerMLP(normal(0, 5, S), normal(1, S, 5), normal(2, C, 6), normal(3, 6, C))
    x = np.asarray(normal(4, 7, S * C))
    up, down = m.token_matrix(layer.token_up, C), m.token_matrix(layer.token_down, C)
    middle = x + gelu(x @ up.T) @ down.T
    up2, down2 = m.channel_matrix(layer.channel_up, S), m.channel_matrix(layer.channel_down, S)
    wanted = middle + gelu(middle @ up2.T) @ down2.T - x
    np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, rtol=0, atol=1e-12)
    assert np.count_nonzero(up) * C == up.size and np.count_nonzero(up2) * S == up2.size
    # Broken variant: vec by columns.
    other = jnp.kron(jnp.eye(C), layer.token_up)
    assert np.abs(x + gelu(x @ other.T) @ down.T - middle).max() > 0.1


def test_the_permuted_mlp_is_one_with_explicit_permutation_matrices():
    layer = m.random_permuted(jax.random.key(0), S, expansion=2)
    before, between, after = m.orders(0, S * C, 2 * S * C)
    x = normal(5, 7, S * C)
    eye = np.eye(S * C)
    blocks = lambda weight: np.kron(np.eye(C), np.asarray(weight).T)
    first = np.eye(2 * S * C)[between] @ blocks(layer.up) @ eye[before]
    back = np.eye(2 * S * C)[np.argsort(between)]
    second = eye[after] @ blocks(layer.down) @ back
    np.testing.assert_allclose(layer(x), gelu(np.asarray(x) @ first.T) @ second.T, rtol=0, atol=1e-12)
    unmoved = eye[after] @ blocks(layer.down)  # broken variant: the order between is not undone
    assert np.abs(gelu(np.asarray(x) @ first.T) @ unmoved.T - layer(x)).max() > 0.1
