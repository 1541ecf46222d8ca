"""Scaled normal draws: start values of models and dictionaries."""

import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray


def normal(
    key: PRNGKeyArray,
    shape: tuple[int, ...] = (),
    dtype: DTypeLike | None = None,
    *,
    times: float = 1.0,
    over: float = 1.0,
) -> Float[Array, "..."]:
    """times * jax.random.normal(key, shape, dtype) / over.

    Args:
      key: one key.
      dtype: by default that of `jax.random.normal`.
    """
    drawn = jax.random.normal(key, shape, float if dtype is None else dtype)
    drawn = drawn if times == 1.0 else times * drawn
    return drawn if over == 1.0 else drawn / over
