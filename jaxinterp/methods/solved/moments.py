"""What solved methods share: weighted sums over rows, covariances of them, least squares with a small ridge."""

from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float

from jaxinterp.core.batch import Batch
from jaxinterp.core.sites import Sites

Sums = Mapping[str, np.ndarray]
"""What `solve` gets: the sums of the whole stream, in float64."""


class OfSites(eqx.Module):
    """What stays fixed during the stream of a method that needs nothing but its sites."""

    sites: Sites = eqx.field(static=True)


def of_sites(key: Array, sample: Batch, model: object) -> OfSites:
    """The `start` of a streaming method that needs nothing but its sites."""
    return OfSites(sample.sites)


def product(
    weight: Float[Array, " tokens"], a: Float[Array, "tokens m"], b: Float[Array, "tokens n"]
) -> Float[Array, "m n"]:
    """sum_t w_t a_t b_t^T."""
    return (weight[:, None] * a).T @ b


def covariance(
    mean_product: Float[np.ndarray, "m n"], mean_a: Float[np.ndarray, " m"], mean_b: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "m n"]:
    """E a b^T - E a E b^T."""
    return mean_product - np.outer(mean_a, mean_b)


def least_squares(
    gram: Float[np.ndarray, "m m"], right: Float[np.ndarray, "m n"], ridge: float
) -> Float[np.ndarray, "m n"]:
    """(G + ridge mean(diag G) I)^-1 R, for a G without negative eigenvalues; the mean is at least 1e-30."""
    penalty = ridge * max(np.trace(gram) / len(gram), 1e-30)
    return scipy.linalg.solve(gram + penalty * np.eye(len(gram)), right, assume_a="pos")


def narrow(array: np.ndarray) -> Array:
    """An array of the solution in float32."""
    return jnp.asarray(array, jnp.float32)
