"""Exact selection by a threshold: the k-th largest number of a whole array, without sorting it.

Non-negative float32 numbers are ordered as their bit patterns are, so 31 rounds of bisection over the bits, one
counting pass each, give the exact k-th largest value. Counts add over shards: nothing is gathered.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def kth_largest(values: Float[Array, "..."], k: int | Int[Array, ""]) -> Float[Array, ""]:
    """The k-th largest of non-negative `values` (0 where fewer than k are positive).

    Equation: the greatest t with #{v >= t} >= k. Values below zero count as zero. At most 2^31 - 1 values.
    """
    bits = jax.lax.bitcast_convert_type(jnp.maximum(values.astype(jnp.float32), 0.0), jnp.int32)

    def narrow(step: Array, low: Array) -> Array:
        middle = low | (jnp.int32(1) << (30 - step))
        return jnp.where(jnp.sum(bits >= middle) >= k, middle, low)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, narrow, jnp.int32(0)), jnp.float32)


def keep_largest(
    values: Float[Array, "*axes k"], budget: int | Int[Array, ""]
) -> tuple[Float[Array, "*axes k"], Float[Array, ""]]:
    """The `budget` largest positive values of a batch; all others become 0. And the smallest one kept.

    Exactly `budget` are kept where as many are positive: among values equal to the smallest, the first ones.
    """
    smallest = kth_largest(values, budget)
    flat = jnp.maximum(values.reshape(-1, values.shape[-1]), 0)
    above, tied = flat > smallest, flat == smallest
    # Counted by token first: the running sum over a batch that is spread over devices is one of single numbers.
    of_token = jnp.sum(tied, axis=-1)
    before = jnp.cumsum(of_token) - of_token
    place = before[:, None] + jnp.cumsum(tied, axis=-1)
    kept = above | (tied & (place <= budget - jnp.sum(above)))
    return jnp.where(kept, flat, 0).reshape(values.shape), smallest
