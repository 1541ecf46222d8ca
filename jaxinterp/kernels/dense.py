"""The sparse passes as dense matmuls over a few hundred tokens at a time: faster where k is a large part of M.

Four sparse passes move 4 N k d e bytes (e bytes a number), four dense matmuls take 8 N d M operations: they break even
at about k / M = (bytes per second) / (operations per second) of the device (`dispatch.BREAK_EVEN`). Temporary memory is
512 x M numbers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinterp.kernels import chunks


def gather_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], rows: Float[Array, "features d"]
) -> Float[Array, "tokens d"]:
    """`xla.gather_sum` as a matmul."""

    def chunk(arrays: tuple[Array, Array]) -> Array:
        codes = _codes(*arrays, rows.shape[0])
        return jnp.matmul(codes.astype(rows.dtype), rows, preferred_element_type=jnp.float32)

    return chunks.mapped(chunk, (values, indices), chunks.PRE_ACTIVATIONS)


def sampled_dot(
    g: Float[Array, "tokens d"], rows: Float[Array, "features d"], indices: Int[Array, "tokens k"]
) -> Float[Array, "tokens k"]:
    """`xla.sampled_dot` as a matmul."""

    def chunk(arrays: tuple[Array, Array]) -> Array:
        g, indices = arrays
        products = jnp.matmul(g, rows.T, preferred_element_type=jnp.float32)
        found = jnp.take_along_axis(products, jnp.minimum(indices, rows.shape[0] - 1), axis=1)
        return jnp.where(indices < rows.shape[0], found, 0.0)

    return chunks.mapped(chunk, (g, indices), chunks.PRE_ACTIVATIONS)


def outer_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], g: Float[Array, "tokens d"], features: int
) -> Float[Array, "features d"]:
    """`xla.outer_sum` as a matmul."""

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        values, indices, g = chunk
        codes = _codes(values, indices, features)
        return total + jnp.matmul(codes.astype(g.dtype).T, g, preferred_element_type=jnp.float32), None

    steps = chunks.split((values, indices, g), chunks.PRE_ACTIVATIONS)
    return jax.lax.scan(add, jnp.zeros((features, g.shape[1]), jnp.float32), steps)[0]


# Inside `jax.jit` it is inlined; outside it is one program, not one for each operation.
@partial(jax.jit, static_argnames="features", inline=True)
def _codes(values: Array, indices: Array, features: int) -> Array:
    tokens = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], features), jnp.float32).at[tokens, indices].add(values, mode="drop")
