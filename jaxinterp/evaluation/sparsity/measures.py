"""How sparse activations are: density, Hoyer's measure, CETT, functional L0.

With neuron outputs n_j = a_j W[j, :], the tail D(ε) = {j : |n_j| <= ε}:

    CETT(ε) = E_tokens |sum over D(ε) of n_j| / |sum of all n_j|      (cumulative errors of tail truncation)

It is 0 at ε = 0 and 1 at the largest |n_j|, and not monotone in between: n that cancel each other leave together.
`cett_threshold` therefore returns *a* crossing, with the value that it achieved, which never exceeds the target.

Sources: CETT, PPL-p: Sparsing Law, arXiv 2411.02335, section 3 (the authors search 65,536 thresholds from the least
|n_j| to the 0.99 quantile of every n-th, n = entries // 65,536, and return the last of these where the first is already
too large; 0 here). Hoyer 2004.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Ratio
from jaxinterp.models.selection import row_norms

GRID = 65_536


def density(a: Float[Array, "*batch d"], threshold: float = 0.0, weight: Float[Array, "*batch"] | None = None) -> Ratio:
    """The share of entries with |a| > threshold, over the tokens with weight."""
    share = jnp.mean(jnp.abs(a) > threshold, axis=-1, dtype=jnp.float32)
    counts = jnp.ones(share.shape, jnp.float32) if weight is None else weight
    return Ratio(jnp.sum(share * counts), jnp.sum(counts))


def hoyer(a: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
    """(sqrt(d) - |a|_1 / |a|_2) / (sqrt(d) - 1): 1 for a single entry, 0 for equal sizes; NaN for a row of zeros."""
    root = jnp.sqrt(a.shape[-1])
    return (root - jnp.sum(jnp.abs(a), axis=-1) / jnp.linalg.norm(a, axis=-1)) / (root - 1)


def cett(
    a: Float[Array, "tokens d"],
    weight: Float[Array, "d d_out"],
    epsilon: float | Float[Array, ""],
    counts: Float[Array, " tokens"] | None = None,
) -> Ratio:
    """CETT(ε) of activations `a` that the matrix `weight` reads; `counts` is 0 for padding. A token whose output is
    zero does not count."""
    return _cett(a, weight, jnp.asarray(epsilon), jnp.ones(a.shape[0], a.dtype) if counts is None else counts)


@jax.jit
def _cett(a: Array, weight: Array, epsilon: Array, counts: Array) -> Ratio:
    tail = jnp.where(jnp.abs(a) * row_norms(weight) <= epsilon, a, 0) @ weight
    whole = jnp.linalg.norm(a @ weight, axis=-1)
    counts = counts * (whole > 0)
    return Ratio(jnp.sum(counts * jnp.linalg.norm(tail, axis=-1) / jnp.where(whole > 0, whole, 1)), jnp.sum(counts))


class Threshold(NamedTuple):
    """A threshold of |n_j|, the CETT it achieves, and the share of neurons above it."""

    epsilon: float
    achieved: float
    ratio: float


def cett_threshold(
    a: Float[Array, "tokens d"],
    weight: Float[Array, "d d_out"],
    target: float,
    *,
    candidates: Float[np.ndarray, " grid"] | None = None,
) -> Threshold:
    """The threshold ε with CETT(ε) <= target, found by bisection among rising candidates; ε = 0 where none is.

    Args:
      candidates: default: 65,536 equally spaced ones from the least |n_j| to the 0.99 quantile, as the authors, and the
        same one of several crossings.
    Raises:
      UserError: the target is negative.
    """
    if not target >= 0:
        raise UserError(f"target={target} must be at least 0: CETT is a share of the output's norm.")
    norms = jnp.abs(a) * row_norms(weight)
    if candidates is None:
        sample = norms.reshape(-1)[:: max(norms.size // GRID, 1)]
        candidates = np.linspace(float(jnp.min(norms)), float(jnp.quantile(sample, 0.99)), GRID)

    def achieved(index: int) -> float:
        return float(cett(a, weight, float(candidates[index])).value())

    low, last = 0, len(candidates) - 1
    high = last
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if achieved(middle) <= target else (low, middle)
    if low == last and achieved(last) <= target:  # the authors stop before the last candidate
        low = last + 1
    if low == 0:
        return Threshold(0.0, 0.0, float(jnp.mean(norms > 0)))
    best = float(candidates[low - 1])
    return Threshold(best, achieved(low - 1), float(jnp.mean(norms > best)))


class FunctionalL0(NamedTuple):
    """How many features a token needs for all but a share of the output; of how many that are not zero."""

    needed: float
    active: float
    achieved: float


def functional_l0(
    codes: Float[Array, "tokens features"], decoder: Float[Array, "features d"], target: float
) -> FunctionalL0:
    """L0 above the threshold with CETT <= target, CETT's formula with a dictionary's decoder rows as W.

    Raises:
      UserError: the target is negative.
    """
    found = cett_threshold(codes, decoder, target)
    return FunctionalL0(
        found.ratio * codes.shape[-1], float(jnp.mean(jnp.sum(codes != 0, axis=-1, dtype=jnp.float32))), found.achieved
    )
