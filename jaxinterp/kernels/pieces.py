"""The four sparse passes on one device, forward only.

With N tokens, M features, rows `(M, d)` of a read or write matrix W, and per token k values v and indices i:

    select      v, i   = top-k over features of x W^T + b, greatest first, ties to the lowest index
    gather_sum  y_n    = sum_j v_nj W[i_nj]
    sampled_dot p_nj   = g_n . W[i_nj]
    outer_sum   dW[m]  = sum over (n, j) with i_nj = m of v_nj g_n

An index equal to M stands for no row at all: it reads zeros and writes nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SELECT_CHUNK = 512  # tokens whose pre-activations stand in memory (and in the CPU's cache) at a time
GATHER_CHUNK = 16  # tokens whose k rows are gathered at a time


def select(
    x: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    allowed: Bool[Array, " features"] | None,
    k: int,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """The k largest of x W^T + b per token, in float32; features that are not allowed count as -inf."""

    def chunk(x: Array) -> tuple[Array, Array]:
        pre = jnp.matmul(x, rows.T, preferred_element_type=jnp.float32) + bias
        values, indices = jax.lax.top_k(pre if allowed is None else jnp.where(allowed, pre, -jnp.inf), k)
        return values, indices

    return _in_chunks(chunk, (x,), SELECT_CHUNK)


def gather_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], rows: Float[Array, "features d"]
) -> Float[Array, "tokens d"]:
    """Per token, the sum of the rows at its indices, weighted by its values; float32."""

    def chunk(values: Array, indices: Array) -> Array:
        return jnp.einsum("nk,nkd->nd", values, _take(rows, indices), preferred_element_type=jnp.float32)

    return _in_chunks(chunk, (values, indices), GATHER_CHUNK)


def sampled_dot(
    g: Float[Array, "tokens d"], rows: Float[Array, "features d"], indices: Int[Array, "tokens k"]
) -> Float[Array, "tokens k"]:
    """Per token, the inner products of g with the rows at its indices; float32."""

    def chunk(g: Array, indices: Array) -> Array:
        return jnp.einsum("nd,nkd->nk", g, _take(rows, indices), preferred_element_type=jnp.float32)

    return _in_chunks(chunk, (g, indices), GATHER_CHUNK)


def outer_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], g: Float[Array, "tokens d"], features: int
) -> Float[Array, "features d"]:
    """The gradient of `gather_sum` in its rows; float32."""

    def by_token(values: Array, indices: Array, g: Array) -> Array:
        def add(n: Array, total: Array) -> Array:
            return total.at[indices[n]].add(values[n][:, None] * g[n].astype(jnp.float32), mode="drop")

        return jax.lax.fori_loop(0, values.shape[0], add, jnp.zeros((features, g.shape[1]), jnp.float32))

    def by_matmul(values: Array, indices: Array, g: Array) -> Array:
        def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
            values, indices, g = chunk
            tokens = jnp.arange(values.shape[0])[:, None]
            codes = jnp.zeros((values.shape[0], features), jnp.float32).at[tokens, indices].add(values, mode="drop")
            return total + jnp.matmul(codes.T, g, preferred_element_type=jnp.float32), None

        chunks = _chunks((values, indices, g), SELECT_CHUNK)
        return jax.lax.scan(add, jnp.zeros((features, g.shape[1]), jnp.float32), chunks)[0]

    # A scatter that runs token by token is the fastest on a CPU and a catastrophe on an accelerator.
    return jax.lax.platform_dependent(values, indices, g, cpu=by_token, default=by_matmul)


def _take(rows: Array, indices: Array) -> Array:
    return rows.at[indices].get(mode="fill", fill_value=0)


def _chunks(arrays: tuple[Array, ...], size: int) -> tuple[Array, ...]:
    """Every array as [chunks, size, ...]; the last chunk is filled up with zeros."""
    tokens = arrays[0].shape[0]
    padding = -tokens % size
    padded = [jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) for array in arrays]
    return tuple(array.reshape(-1, size, *array.shape[1:]) for array in padded)


def _in_chunks(function: Callable[..., Any], arrays: tuple[Array, ...], size: int) -> Any:
    """function(*arrays), computed for `size` tokens at a time."""
    tokens = arrays[0].shape[0]
    if tokens <= size:
        return function(*arrays)
    chunked = jax.lax.map(lambda chunk: function(*chunk), _chunks(arrays, size))
    return jax.tree.map(lambda result: result.reshape(-1, *result.shape[2:])[:tokens], chunked)
