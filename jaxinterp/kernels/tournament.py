"""The k largest of every row, round by round for all rows at once: what a CPU runs where it is faster than `lax.top_k`.

Features lie in groups of 32. A round takes the greatest of all groups' maxima (the first group of equal ones), then the
first entry of that value in the group, and puts the greatest of what is left in the place of the group's maximum.
A round is a few loops over the tokens, where `lax.top_k` keeps a heap for each token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SIZE = 32  # features of a group: groups of 16 and of 64 take longer (benchmarks/selection.py)
NOTHING = -(2**31)  # before the key of every number, -inf too


def pays(tokens: int, features: int, k: int) -> bool:
    """Whether rounds are faster than heaps: tokens share a round, and each of the k costs one.

    Of more features than that `lax.top_k` in two stages is as fast.
    """
    return tokens >= 128 and 2048 <= features <= 8192 and features % SIZE == 0 and k <= 64


def tournament(pre: Float[Array, "tokens features"], k: int) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """`lax.top_k` of float32 with NaN first and -0 equal to 0; `features` is a multiple of `SIZE`.

    Returns:
      Values, greatest first, and their places; of equal values the first places.
    """
    tokens, features = pre.shape
    grouped = pre.reshape(tokens, features // SIZE, SIZE)
    # Kept apart from what follows: else the keys of all features are written to memory.
    best = jax.lax.optimization_barrier(jnp.max(keys(grouped), axis=-1).T)
    groups, place, token = jnp.arange(len(best))[:, None], jnp.arange(SIZE), jnp.arange(tokens)

    def one(rank: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        """`best` [groups, tokens]: the key of what is left; `after`: the last place taken that had this key, or -1."""
        best, after, values, indices = state
        most = jnp.max(best, axis=0)
        group = jnp.min(jnp.where(best == most, groups, len(best)), axis=0)
        found = jnp.take_along_axis(grouped, group[:, None, None], axis=1, mode="promise_in_bounds")
        own, top = keys(found[:, 0]), most[:, None]
        taken = after.at[group, token].get(mode="promise_in_bounds")[:, None]
        here = jnp.min(jnp.where((own == top) & (place > taken), place, SIZE), axis=1)
        behind = (own < top) | ((own == top) & (place > here[:, None]))
        left = jnp.max(jnp.where(behind, own, NOTHING), axis=1)
        best = best.at[group, token].set(left, mode="promise_in_bounds", unique_indices=True)
        again = jnp.where(left == most, here, -1)
        after = after.at[group, token].set(again, mode="promise_in_bounds", unique_indices=True)
        return best, after, values.at[rank].set(most), indices.at[rank].set(group * SIZE + here)

    nothing = jnp.zeros((k, tokens), jnp.int32)
    _, _, values, indices = jax.lax.fori_loop(0, k, one, (best, jnp.full_like(best, -1), nothing, nothing))
    return jax.lax.bitcast_convert_type(ordered(values), jnp.float32).T, indices.T


def keys(numbers: Float[Array, "..."]) -> Int[Array, "..."]:
    """Integers in the order of float32 numbers: NaN after all others, 0 for both zeros."""
    # The NaN of x86 has its sign bit set: by its bits it would come before -inf.
    clean = jnp.where(jnp.isnan(numbers), jnp.nan, jnp.where(numbers == 0, 0.0, numbers))
    return ordered(jax.lax.bitcast_convert_type(clean, jnp.int32))


def ordered(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """Bit patterns of floats as integers of the same order; and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
