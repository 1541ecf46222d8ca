"""A problem for the GPU kernels, and a described GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxinterp.kernels import mosaic_gpu

TOO_OLD = mosaic_gpu.available()
needs = pytest.mark.skipif(TOO_OLD is not None, reason=str(TOO_OLD))
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


def on(kind):
    """A mesh of one GPU that is not here."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 132, "gpu")))
