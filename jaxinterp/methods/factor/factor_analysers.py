"""Mixture of factor analysers: the density of an array as regions with directions of their own.

    loss = - mean over tokens of log p(x),   p(x) = sum_k pi_k N(x; mu_k, W_k W_k^T + Psi)

Start: mu = k-means centres (Lloyd iterations from random rows), W = directions N(0, 1/d) made unit; Psi and the squared
scales = the mean variance of a dimension, pi uniform. Adam on everything. Likelihood and reconstruction:
`jaxinterp.decompositions.factor_analysers`.

Source: Shafran et al. 2026 (arXiv 2602.02464).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch, Needs
from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Metrics, ratio
from jaxinterp.core.sites import Site
from jaxinterp.decompositions.factor_analysers import FactorAnalysers
from jaxinterp.methods.checks import check_positive, check_whole, one_leaf
from jaxinterp.methods.recipes import Recipe, gradient_method
from jaxinterp.methods.sparse.dictionary import moments


@dataclass(frozen=True)
class MixtureOfFactorAnalysers:
    """Hyperparameters of the mixture."""

    regions: int = 64
    """How many Gaussians."""
    rank: int = 4
    """Directions of each."""
    port: str = "hidden"
    """The array below the leaf: hidden, out or in."""
    lloyd: int = 15
    """Iterations of k-means for the first means."""
    learning_rate: float = 1e-3
    """Of Adam: a cosine to 0."""

    def __post_init__(self) -> None:
        """Raises UserError if a hyperparameter is out of range."""
        check_whole(self, regions=1, rank=1, lloyd=0)
        check_positive(self, "learning_rate")
        if self.port not in ("in", "hidden", "out"):
            raise UserError(f"port={self.port!r} must be one of in, hidden, out.")

    def needs(self, site: Site) -> Needs:
        """One array of one leaf."""
        name = f"{one_leaf(site)}/{self.port}"
        return Needs(name, name)

    def recipe(self, steps: int) -> Recipe:
        """Adam on the negative log-likelihood."""
        optimizer = optax.adam(optax.cosine_decay_schedule(self.learning_rate, steps))
        return gradient_method(lambda key, sample, model: begin(self, key, sample), likelihood, optimizer)


def likelihood(
    decomposition: FactorAnalysers, batch: Batch, key: PRNGKeyArray, *, model: PyTree = None
) -> tuple[Float[Array, ""], Metrics]:
    """The objective: nats per token and dimension."""
    loss = negative_log_likelihood(decomposition, batch.inputs, batch.weight) / batch.inputs.shape[1]
    error = jnp.sum((batch.inputs - decomposition(batch.inputs)) ** 2, axis=-1) / decomposition.target_variance
    return loss, {"fvu": jax.lax.stop_gradient(ratio(error, batch.weight))}


def negative_log_likelihood(
    mixture: FactorAnalysers, x: Float[Array, "tokens d"], weight: Float[Array, " tokens"]
) -> Float[Array, ""]:
    """The weighted mean of -log p(x), in nats per token."""
    return -jnp.sum(mixture.log_likelihood(x) * weight) / jnp.maximum(jnp.sum(weight), 1)


def centres(
    rows: Float[Array, "tokens d"], first: Float[Array, "regions d"], iterations: int
) -> Float[Array, "regions d"]:
    """k-means centres after Lloyd iterations from given ones; a centre without rows stays where it is."""

    def lloyd(_: Array, now: Array) -> Array:
        nearest = jnp.argmin(jnp.sum(now**2, axis=1) - 2 * rows @ now.T, axis=1)
        member = jax.nn.one_hot(nearest, now.shape[0], dtype=rows.dtype)
        count = jnp.sum(member, axis=0)[:, None]
        return jnp.where(count > 0, member.T @ rows / jnp.maximum(count, 1), now)

    return jax.lax.fori_loop(0, iterations, lloyd, first)


def begin(hyper: MixtureOfFactorAnalysers, key: PRNGKeyArray, sample: Batch) -> FactorAnalysers:
    """The mixture before the first step."""
    row_key, direction_key = jax.random.split(key)
    rows = sample.inputs.astype(jnp.float32)
    tokens, d = rows.shape
    chosen = jax.lax.top_k((sample.weight > 0) * jax.random.uniform(row_key, (tokens,), jnp.float32), hyper.regions)[1]
    mean, variances = moments(rows, sample.weight)
    size = jnp.sqrt(jnp.mean(variances))
    rho = jnp.log(jnp.expm1(size))  # softplus(rho) = the spread of a dimension: scale 1 in units of it
    return FactorAnalysers(
        means=centres(rows, rows[chosen], hyper.lloyd),
        directions=jax.random.normal(direction_key, (hyper.regions, d, hyper.rank), jnp.float32) / jnp.sqrt(d),
        raw_scales=jnp.broadcast_to(rho, (hyper.regions, hyper.rank)),
        raw_variance=jnp.broadcast_to(jnp.log(jnp.expm1(size**2)), (d,)),
        logits=jnp.zeros(hyper.regions, jnp.float32),
        target_mean=mean,
        target_variance=jnp.sum(variances),
        sites=sample.sites,
    )
