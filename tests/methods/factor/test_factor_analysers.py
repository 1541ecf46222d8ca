"""Mixture of factor analysers: its likelihood against full covariances, and the posterior of its coordinates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.factor_analysers import FactorAnalysers, inverse_softplus
from jaxinterp.methods.factor.factor_analysers import negative_log_likelihood

REGIONS, D, RANK = 3, 6, 2


def mixture(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return FactorAnalysers(
        means=2 * draw(REGIONS, D),
        directions=draw(REGIONS, D, RANK),
        raw_scales=draw(REGIONS, RANK),
        raw_variance=draw(D),
        logits=draw(REGIONS),
        target_mean=jnp.zeros(D),
        target_variance=jnp.ones(()),
        sites=Sites("x", "x"),
    )


def by_covariance(m, x):
    """(log p(x), r, x̂) with the d x d covariance of every region inverted."""
    shares = np.asarray(jax.nn.softmax(m.logits))
    psi, loads = np.diag(np.asarray(m.variance)), np.asarray(m.loadings)
    densities, guesses = [], []
    for share, mean, w in zip(shares, np.asarray(m.means), loads, strict=True):
        covariance = w @ w.T + psi
        densities.append(share * scipy.stats.multivariate_normal(mean, covariance).pdf(x))
        guesses.append(mean + (x - mean) @ np.linalg.inv(covariance) @ w @ w.T)
    densities = np.stack(densities, axis=-1)
    r = densities / densities.sum(axis=-1, keepdims=True)
    return np.log(densities.sum(axis=-1)), r, np.einsum("nk,knd->nd", r, np.stack(guesses))


def test_likelihood_and_reconstruction_are_those_of_the_full_covariances(float64):
    m, x = mixture(), np.random.default_rng(1).normal(size=(20, D)) * 2
    log_p, r, guess = by_covariance(m, x)
    np.testing.assert_allclose(m.log_likelihood(jnp.asarray(x)), log_p, rtol=1e-10)
    np.testing.assert_allclose(m.posterior(jnp.asarray(x))[0], r, atol=1e-10)
    np.testing.assert_allclose(m(jnp.asarray(x)), guess, atol=1e-9)
    loss = negative_log_likelihood(m, jnp.asarray(x), jnp.asarray([1.0] * 5 + [0.0] * 15))
    assert float(loss) == pytest.approx(-log_p[:5].mean())
    codes = m.encode(jnp.asarray(x))
    assert codes.features == m.features == REGIONS * (1 + RANK) == m.decoder.shape[0]
    np.testing.assert_allclose(codes.values @ m.decoder, guess, atol=1e-9)
    np.testing.assert_allclose(codes.values.reshape(20, REGIONS, -1)[..., 0], r, atol=1e-10)


@pytest.mark.parametrize("broken", ["variance", "directions", "logits"])
def test_another_mixture_has_another_likelihood(float64, broken):
    """Psi without its floor's softplus, directions not made unit, pi forgotten."""
    m, x = mixture(), jnp.asarray(np.random.default_rng(1).normal(size=(20, D)))
    other = {
        "variance": eqx.tree_at(lambda m: m.raw_variance, m, jnp.log(m.variance)),
        "directions": eqx.tree_at(lambda m: m.raw_scales, m, m.raw_scales + 0.5),
        "logits": eqx.tree_at(lambda m: m.logits, m, 0 * m.logits),
    }[broken]
    assert float(jnp.abs(other.log_likelihood(x) - m.log_likelihood(x)).max()) > 1e-2
    longer = eqx.tree_at(lambda m: m.directions, m, 3 * m.directions)
    np.testing.assert_allclose(longer.log_likelihood(x), m.log_likelihood(x), rtol=1e-10)


def test_the_start_of_a_scale_is_the_scale():
    assert float(jax.nn.softplus(inverse_softplus(1.0))) == pytest.approx(1)
