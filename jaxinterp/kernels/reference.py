"""The sparse passes written as the dense formulas that they compute: the oracle, in the precision of its arguments.

It builds whole tokens x features arrays. Nothing chooses it by itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def encode(
    x: Float[Array, "tokens d"], rows: Float[Array, "features d"], bias: Float[Array, " features"], k: int
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """The k largest of x W^T + b per token, greatest first, ties to the lowest index."""
    pre = _product(x, rows.T) + bias
    values, indices = jax.lax.top_k(jnp.where(jnp.isnan(pre), jnp.nan, pre), k)
    return values, indices


def gather_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], rows: Float[Array, "features d"]
) -> Float[Array, "tokens d"]:
    """z W with dense codes z."""
    return _product(_codes(values, indices, rows.shape[0]), rows)


def sampled_dot(
    g: Float[Array, "tokens d"], rows: Float[Array, "features d"], indices: Int[Array, "tokens k"]
) -> Float[Array, "tokens k"]:
    """g W^T at the indices."""
    products = jnp.pad(_product(g, rows.T), ((0, 0), (0, 1)))
    return jnp.take_along_axis(products, indices, axis=1)


def outer_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], g: Float[Array, "tokens d"], features: int
) -> Float[Array, "features d"]:
    """z^T g with dense codes z."""
    return _product(_codes(values, indices, features).T, g)


def _codes(values: Array, indices: Array, features: int) -> Array:
    tokens = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], features), values.dtype).at[tokens, indices].add(values, mode="drop")


def _product(a: Array, b: Array) -> Array:
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    return jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
