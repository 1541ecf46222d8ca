"""A problem for the GPU kernels, and a described GPU."""

import jax
import jax.numpy as jnp
import numpy as np

LARGE = (509, 768, 4099, 31)


def problem(shape, dtype=jnp.float32, seed=0):
    """Values, indices (some twice in a token, some that name no row), g and rows."""
    tokens, width, features, k = shape
    rng = np.random.default_rng(seed)
    values = jnp.asarray(rng.normal(size=(tokens, k)), jnp.float32)
    indices = jnp.asarray(rng.integers(0, features + 1, (tokens, k)), jnp.int32)
    g, rows = (jnp.asarray(rng.normal(size=(n, width)), dtype) for n in (tokens, features))
    return values, indices, g, rows


def described(dtype, shape=LARGE):
    tokens, width, features, k = shape
    sizes = ((tokens, k), jnp.float32), ((tokens, k), jnp.int32), ((tokens, width), dtype), ((features, width), dtype)
    return tuple(jax.ShapeDtypeStruct(*size) for size in sizes)
