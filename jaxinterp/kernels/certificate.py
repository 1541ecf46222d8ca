"""What fused encoders do after their kernel: tokens that it cannot vouch for, and places that nothing fills."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def again(
    x: Float[Array, "tokens d"],
    failed: Bool[Array, " tokens"],
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    select: Callable[[Array], tuple[Array, Array]],
    at_once: int,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """Values and indices, those of failed tokens from `select`, which is given `at_once` rows of x at a time."""
    tokens = values.shape[0]
    failing = jnp.nonzero(failed, size=-(-tokens // at_once) * at_once, fill_value=tokens)[0]
    count = jnp.sum(failed)

    def block(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        start, values, indices = state
        some = jax.lax.dynamic_slice(failing, (start,), (at_once,))
        new_values, new_indices = select(x.at[some].get(mode="fill", fill_value=0))
        return (
            start + at_once,
            values.at[some].set(new_values, mode="drop"),
            indices.at[some].set(new_indices, mode="drop"),
        )

    _, values, indices = jax.lax.while_loop(lambda state: state[0] < count, block, (jnp.int32(0), values, indices))
    return values, indices


def filled(values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"]) -> Int[Array, "tokens k"]:
    """The indices; where the value is -inf, the lowest features that are not chosen."""
    features = jnp.arange(values.shape[1])
    finite = values > -jnp.inf
    free = ~jnp.any(jnp.where(finite, indices, -1)[:, :, None] == features, axis=1)
    rank = jnp.sum(free[:, None, :] & (features < features[:, None]), axis=2) + jnp.sum(finite, axis=1, keepdims=True)
    lowest = placed(jnp.broadcast_to(features, indices.shape), jnp.where(free, rank, -1))
    return jnp.where(finite, indices, lowest)


def placed(numbers: Int[Array, "tokens k"], places: Int[Array, "tokens k"]) -> Int[Array, "tokens k"]:
    """Per token, each number at its place; by counting, as a sort takes long to compile."""
    at = places[:, None, :] == jnp.arange(places.shape[1])[:, None]
    return jnp.sum(jnp.where(at, numbers[:, None, :], 0), axis=2)
