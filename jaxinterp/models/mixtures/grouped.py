"""Rows in groups, each group times a matrix of its own: what experts compute.

    y[r] = x[r] @ weight[g]   for the rows r of group g;  rows lie sorted by group, sizes[g] of them

The rows are walked through in blocks that belong to one group, and each block reads one matrix. Beside x, y and the
weights no array is made that grows with the number of groups. `jax.lax.ragged_dot` computes the same, but its lowering
on CPU makes an array of groups x rows x d (jax 0.10.2 and 0.12.0; measured in docs/evidence/public-families.md).

    dx = dy @ weight[g]^T in the same way,   dweight[g] = sum over the rows of g of x[r]^T dy[r]
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 64
"""Rows of a block, at most."""


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "rows d_in"], weight: Float[Array, "groups d_in d_out"], sizes: Int[Array, " groups"]
) -> Float[Array, "rows d_out"]:
    """y of the module's equation. Rows behind the last group are undefined; reverse-mode derivatives only."""
    return _forward(x, weight, sizes)


def _blocks(rows: int, groups: int, sizes: Int[Array, " groups"]) -> tuple[int, Array, Array, Array]:
    """Rows of a block; the group, the first row and the number of rows of each block, as many as there can be."""
    block = min(BLOCK, rows)
    of_group = -(-sizes // block)
    ends, last = jnp.cumsum(sizes), jnp.cumsum(of_group)
    number = jnp.arange(rows // block + min(groups, rows))
    group = jnp.minimum(jnp.searchsorted(last, number, side="right"), groups - 1)
    within = number - (last - of_group)[group]
    start = jnp.minimum((ends - sizes)[group] + within * block, rows)
    real = jnp.where(number < last[-1], jnp.minimum(ends[group] - start, block), 0)
    return block, group, jnp.where(real > 0, start, rows), jnp.maximum(real, 0)


def _padded(x: Float[Array, "rows d"], block: int) -> Float[Array, "more d"]:
    return jnp.pad(x, ((0, block), (0, 0)))


def _forward(x: Array, weight: Array, sizes: Array) -> Array:
    rows, groups = x.shape[0], weight.shape[0]
    block, group, start, _ = _blocks(rows, groups, sizes)
    padded = _padded(x, block)

    def step(out: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        # A block's rows beyond its group are written again by the block of the next group.
        mine = jax.lax.dynamic_slice_in_dim(padded, at[1], block)
        matrix = jax.lax.dynamic_index_in_dim(weight, at[0], keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(out, (mine @ matrix).astype(out.dtype), at[1], 0), None

    out = jnp.zeros((rows + block, weight.shape[2]), jnp.result_type(x, weight))
    return jax.lax.scan(step, out, (group, start))[0][:rows]


def _keep(x: Array, weight: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _forward(x, weight, sizes), (x, weight, sizes)


def _backward(kept: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    x, weight, sizes = kept
    block, group, start, real = _blocks(x.shape[0], weight.shape[0], sizes)
    inputs, outputs = _padded(x, block), _padded(cotangent, block)

    def step(total: Array, at: tuple[Array, Array, Array]) -> tuple[Array, None]:
        counts = (jnp.arange(block) < at[2])[:, None]
        mine = jnp.where(counts, jax.lax.dynamic_slice_in_dim(inputs, at[1], block), 0)
        said = jax.lax.dynamic_slice_in_dim(outputs, at[1], block)
        return total.at[at[0]].add((mine.T @ said).astype(total.dtype)), None

    to_weight = jax.lax.scan(step, jnp.zeros_like(weight), (group, start, real))[0]
    to_x = _forward(cotangent, jnp.swapaxes(weight, 1, 2), sizes).astype(x.dtype)
    return to_x, to_weight, None


grouped_matmul.defvjp(_keep, _backward)


@partial(jax.jit, static_argnames="groups")
def sorted_by_group(
    index: Int[Array, " rows"], groups: int
) -> tuple[Int[Array, " rows"], Int[Array, " rows"], Int[Array, " groups"]]:
    """The order that sorts rows by their group (stable), its inverse, and how many rows each group has."""
    order = jnp.argsort(index, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(index.shape[0], dtype=order.dtype))
    return order, inverse, jnp.bincount(index, length=groups).astype(jnp.int32)
