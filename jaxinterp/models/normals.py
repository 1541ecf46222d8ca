"""Normal draws of small arrays, all of one compiled program.

Outside `jax.jit` every new shape of `jax.random.normal` is a program of its own, 0.15 CPU seconds on a cold start, and
a model has a dozen shapes. Threefry makes the n-th number of an array from the key and n alone, so a small array is
the head of a longer one, to the last bit.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

LENGTHS = (2**12, 2**16)
"""Numbers of the arrays that small ones are the heads of; what is longer is drawn as it is."""


def normal(
    key: PRNGKeyArray,
    shape: tuple[int, ...] = (),
    dtype: DTypeLike | None = None,
    *,
    times: float = 1.0,
    over: float = 1.0,
) -> Float[Array, "..."]:
    """times * jax.random.normal(key, shape, dtype) / over, bit by bit.

    Args:
      key: one key.
      dtype: by default that of `jax.random.normal`.
    """

    def scaled(drawn: Array) -> Array:
        drawn = drawn if times == 1.0 else times * drawn
        return drawn if over == 1.0 else drawn / over

    count = math.prod(shape)
    length = next((length for length in LENGTHS if count <= length), None)
    wanted = jnp.result_type(float if dtype is None else dtype)
    if length is None or not _counted(key) or wanted not in (np.float32, np.float64):
        return scaled(jax.random.normal(key, shape, wanted))
    drawn = jax.random.normal(key, (length,), wanted)
    if isinstance(drawn, jax.core.Tracer):  # a constant key inside a function that is being traced
        return scaled(jax.random.normal(key, shape, wanted))
    return jnp.asarray(np.asarray(scaled(drawn))[:count].reshape(shape))


def _counted(key: PRNGKeyArray) -> bool:
    """Whether it is a known key, on no device in particular, whose n-th number depends on n alone."""
    if isinstance(key, jax.core.Tracer) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.committed:
        return False
    return str(jax.random.key_impl(key)) == "threefry2x32" and bool(jax.threefry_partitionable.value)
