"""Exact selection by a threshold: the k-th largest number of a whole array, without sorting it.

Non-negative float32 numbers are ordered as their bit patterns are, so 31 rounds of bisection over the bits, one
counting pass each, give the exact k-th largest value. Counts add over shards: nothing is gathered.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

INFINITE, NOT_A_NUMBER = 0x7F800000, 0x7FC00000  # as bit patterns


def kth_largest(values: Float[Array, "..."], k: int | Int[Array, ""]) -> Float[Array, ""]:
    """The k-th largest of non-negative `values` (0 where fewer than k are positive).

    Equation: the greatest t with #{v >= t} >= k. Values below zero count as zero, NaN as the greatest number. At most
    2^31 - 1 values; k is at least 1.
    """
    return jax.lax.bitcast_convert_type(_kth(_bits(values), k), jnp.float32)


def keep_largest(
    values: Float[Array, "*axes k"], budget: int | Int[Array, ""]
) -> tuple[Float[Array, "*axes k"], Float[Array, ""]]:
    """The `budget` largest positive values of a batch; all others become 0. And the smallest one kept.

    Exactly `budget` are kept where as many are positive: among values equal to the smallest, the first ones. NaN is
    the greatest number, and stays. With a budget below 1 nothing is kept, and the smallest is infinite.
    """
    bits = _bits(values.reshape(-1, values.shape[-1]))
    least = jnp.where(budget > 0, _kth(bits, budget), INFINITE)
    above, tied = (bits > least) & (budget > 0), bits == least
    # Counted by token first: the running sum over a batch that is spread over devices is one of single numbers.
    of_token = jnp.sum(tied, axis=-1)
    before = jnp.cumsum(of_token) - of_token
    place = before[:, None] + jnp.cumsum(tied, axis=-1)
    kept = above | (tied & (place <= budget - jnp.sum(above)))
    flat = jax.lax.bitcast_convert_type(jnp.where(kept, bits, 0), jnp.float32)
    return flat.reshape(values.shape), jax.lax.bitcast_convert_type(least, jnp.float32)


def _kth(bits: Int[Array, "..."], k: int | Int[Array, ""]) -> Int[Array, ""]:
    def narrow(step: Array, low: Array) -> Array:
        middle = low | (jnp.int32(1) << (30 - step))
        return jnp.where(jnp.sum(bits >= middle) >= k, middle, low)

    return jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))


def _bits(values: Array) -> Array:
    """The bit patterns of values as non-negative float32 numbers, NaN as one that is above infinity."""
    values = values.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(values > 0, values, 0.0), jnp.int32)
    return jnp.where(jnp.isnan(values), NOT_A_NUMBER, bits)
