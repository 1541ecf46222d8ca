"""Group-rational activations: the three denominators, start values that are what they say, finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.models import rational as r

X = np.linspace(-3, 3, 101)


def swish(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("form", ["kernel", "fitting", "fallback"])
def test_each_denominator_is_its_formula(form):
    a, b = np.array([0.1, 1.0, -0.2, 0.3, 0.05, -0.01]), np.array([[-0.5, 0.3, -0.2, 0.1], [0.2, -0.1, 0.4, 0.3]])
    x = np.random.default_rng(0).uniform(0.2, 2, size=(4, 2, 3)) * np.array([1, -1])[:, None]
    above = sum(a[i] * x**i for i in range(6))
    below = {
        "kernel": 1 + sum(np.abs(b[:, i, None]) * np.abs(x) ** (i + 1) for i in range(4)),
        "fitting": 1 + np.abs(sum(b[:, i, None] * x ** (i + 1) for i in range(4))),
        "fallback": 1 + sum(np.abs(b[:, i, None]) * x ** (i + 1) for i in range(4)),
    }
    with jax.enable_x64(True):
        layer = r.GroupRational(jnp.asarray(a), jnp.asarray(b), form)
        found = layer(jnp.asarray(x.reshape(4, 6)))
    np.testing.assert_allclose(found, (above / below[form]).reshape(4, 6), rtol=1e-12)
    other = below["fitting" if form == "kernel" else "kernel"]
    assert np.abs(found - (above / other).reshape(4, 6)).max() > 0.01


def test_swish_is_fitted_with_the_denominator_that_is_used():
    above, below, error = r.fit_rational(swish)
    assert error < 1e-3
    phi = r.GroupRational(jnp.asarray(above, jnp.float32), jnp.asarray(below[None], jnp.float32))
    assert np.abs(phi(jnp.asarray(X, jnp.float32)) - swish(X)).max() < 1e-3
    # Broken variant: a fit with the other denominator, used in the kernel.
    above, below, fitted = r.fit_rational(swish, "fitting")
    wrong = r.rational(
        jnp.asarray(X[None], jnp.float32), jnp.asarray(above, jnp.float32), jnp.asarray(below[None], jnp.float32)
    )
    assert np.abs(wrong[0] - swish(X)).max() > 10 * max(fitted, 1e-3)


def test_a_kat_starts_as_a_swish_mlp_and_has_finite_gradients():
    layer = r.random_kat(jax.random.key(0), 16, 32, groups=8)
    x = jax.random.normal(jax.random.key(1), (64, 16))
    wanted = layer.down(jax.nn.silu(layer.up(x)))
    np.testing.assert_allclose(layer(x), wanted, atol=5e-2)
    gradient = jax.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient.second.denominator).max() > 0
