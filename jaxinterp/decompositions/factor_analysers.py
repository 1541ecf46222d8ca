"""A mixture of factor analysers: activations as a few regions, each a Gaussian along some directions of its own.

    p(x) = sum_k pi_k N(x; mu_k, W_k W_k^T + Psi)

    M_k = I + W_k^T Psi^-1 W_k,   v = W_k^T Psi^-1 (x - mu_k),   E[z | x, k] = M_k^-1 v
    log N = -1/2 (d log 2 pi + log|Psi| + log|M_k| + (x - mu_k)^T Psi^-1 (x - mu_k) - v . E[z])
    x̂ = sum_k r_k(x) (mu_k + W_k E[z | x, k]),   r = softmax(log pi + log N)

mu [regions, d], W [regions, d, rank] = unit directions times positive scales, Psi diagonal [d], shared. Nothing of
size tokens x regions x d is built for the likelihood.

Codes are r_k (1, E[z]): `regions * (1 + rank)` of them, region by region, with write vectors mu_k and the columns of
W_k. Source: Shafran et al. 2026 (arXiv 2602.02464); the equations, not the repository's file, which does not run.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinterp.core.batch import Sites
from jaxinterp.core.decomposition import Codes
from jaxinterp.core.fields import PARAMETER, PARAMETER_ROWS, STATE
from jaxinterp.decompositions.codes import DenseCodes

FLOOR = 1e-5
"""The least variance of Psi, and the least length a direction is divided by."""


class FactorAnalysers(eqx.Module):
    """The mixture of the module's equation, as a decomposition of an array into itself."""

    means: Float[Array, "regions d"] = eqx.field(metadata=PARAMETER_ROWS)
    directions: Float[Array, "regions d rank"] = eqx.field(metadata=PARAMETER_ROWS)
    raw_scales: Float[Array, "regions rank"] = eqx.field(metadata=PARAMETER_ROWS)
    raw_variance: Float[Array, " d"] = eqx.field(metadata=PARAMETER)
    logits: Float[Array, " regions"] = eqx.field(metadata=PARAMETER_ROWS)
    target_mean: Float[Array, " d"] = eqx.field(metadata=STATE)
    target_variance: Float[Array, ""] = eqx.field(metadata=STATE)
    sites: Sites = eqx.field(static=True)

    @property
    def loadings(self) -> Float[Array, "regions d rank"]:
        """W: unit directions times softplus(raw_scales)."""
        lengths = jnp.maximum(jnp.linalg.norm(self.directions, axis=1, keepdims=True), FLOOR)
        return self.directions / lengths * jax.nn.softplus(self.raw_scales)[:, None, :]

    @property
    def variance(self) -> Float[Array, " d"]:
        """Psi: softplus(raw_variance) + 1e-5."""
        return jax.nn.softplus(self.raw_variance) + FLOOR

    @property
    def features(self) -> int:
        """regions * (1 + rank)."""
        return self.means.shape[0] * (1 + self.directions.shape[2])

    @property
    def decoder(self) -> Float[Array, "features d"]:
        """Per region its mean and the columns of W."""
        rows = jnp.concatenate([self.means[:, None], self.loadings.transpose(0, 2, 1)], axis=1)
        return rows.reshape(self.features, -1)

    def log_likelihood(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes"]:
        """log p(x), in nats."""
        fitted, _ = self._regions(x)
        return jax.nn.logsumexp(fitted + jax.nn.log_softmax(self.logits), axis=-1)

    def posterior(
        self, x: Float[Array, "*axes d"]
    ) -> tuple[Float[Array, "*axes regions"], Float[Array, "*axes regions rank"]]:
        """(r, E[z | x, k]): how probable each region is, and where in it x lies."""
        fitted, expected = self._regions(x)
        return jax.nn.softmax(fitted + jax.nn.log_softmax(self.logits), axis=-1), expected

    def encode(
        self, x: Float[Array, "*axes d"], *, k: Array | None = None, weight: Array | None = None, training: bool = False
    ) -> DenseCodes:
        """r_k (1, E[z | x, k]), region by region."""
        share, expected = self.posterior(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        both = jnp.concatenate([jnp.ones_like(share)[..., None], expected], axis=-1) * share[..., None]
        return DenseCodes(both.reshape(*x.shape[:-1], self.features))

    def combine(self, codes: Codes) -> Float[Array, "*axes d"]:
        """Codes times write vectors."""
        return codes.dense() @ self.decoder

    def decode(self, codes: Codes, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        """x̂ of the module's equation."""
        return self.combine(codes)

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        return self.decode(self.encode(x), x).astype(x.dtype)

    def _regions(self, x: Array) -> tuple[Array, Array]:
        """(log N(x; region), E[z | x, region])."""
        precision, loadings = 1 / self.variance, self.loadings
        weighted = loadings * precision[:, None]  # Psi^-1 W
        inner = jnp.eye(loadings.shape[2], dtype=loadings.dtype) + jnp.einsum("kdi,kdj->kij", loadings, weighted)
        root = jnp.linalg.cholesky(inner)
        v = jnp.einsum("...d,kdq->...kq", x, weighted) - jnp.einsum("kd,kdq->kq", self.means, weighted)
        inverse = jax.vmap(lambda low: jax.scipy.linalg.cho_solve((low, True), jnp.eye(low.shape[0], dtype=low.dtype)))(
            root
        )
        expected = jnp.einsum("kij,...kj->...ki", inverse, v)
        distance = ((x**2) @ precision)[..., None] - 2 * x @ (self.means * precision).T
        distance = distance + (self.means**2) @ precision - jnp.sum(v * expected, axis=-1)
        half = jnp.sum(jnp.log(jnp.diagonal(root, axis1=1, axis2=2)), axis=-1)
        constant = x.shape[-1] * math.log(2 * math.pi) + jnp.sum(jnp.log(self.variance))
        return -0.5 * (constant + 2 * half + distance), expected


def inverse_softplus(y: float) -> float:
    """x with softplus(x) = y; y must be positive."""
    return math.log(math.expm1(y))
