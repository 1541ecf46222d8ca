"""Mixture of factor analysers: the density of an array as regions with directions of their own.

    loss = - mean over tokens of log p(x),   p(x) = sum_k pi_k N(x; mu_k, W_k W_k^T + Psi)

Start: mu = k-means centres of the first rows (Lloyd iterations from random rows), W directions N(0, 1/d) with scale 1,
Psi = 1, pi uniform. Adam on everything. Likelihood and reconstruction: `jaxinterp.decompositions.factor_analysers`.

Source: Shafran et al. 2026 (arXiv 2602.02464).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.decompositions.factor_analysers import FactorAnalysers


def negative_log_likelihood(
    mixture: FactorAnalysers, x: Float[Array, "tokens d"], weight: Float[Array, " tokens"]
) -> Float[Array, ""]:
    """The weighted mean of -log p(x), in nats per token."""
    return -jnp.sum(mixture.log_likelihood(x) * weight) / jnp.maximum(jnp.sum(weight), 1)
