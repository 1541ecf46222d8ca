"""The block-sparse product as a Pallas TPU kernel: only stored blocks are read and multiplied.

    y[:, J] = sum over stored blocks (I, J) of x[:, I] W_IJ

A grid step multiplies one stored block with one tile of tokens. Steps of a block column lie side by side, so that its
sum stays in VMEM; the first step of every column writes zeros, which is all that an empty column gets, and a row of
blocks that nobody stores is never read. Where the blocks lie is data (scalar prefetch): a new mask needs no new
program, the number of blocks is static. Sums are float32.

Sides of blocks are multiples of 128 on a TPU; any size runs in the interpreter. The derivative is that of the XLA
product. Not run on a TPU: compiled for one (`python -m benchmarks.tpu_compile --only block_sparse`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxinterp.kernels.platforms import precision

TILE = 256
"""Tokens of a grid step."""


def order_of_steps(
    rows: Int[Array, " stored"], columns: Int[Array, " stored"], count: int
) -> tuple[Int[Array, " steps"], Int[Array, " steps"], Int[Array, " steps"], Int[Array, " steps"]]:
    """Of every grid step: the block column, the block row, which stored block, and 1 where the column begins.

    Column J begins at step J + (blocks in columns before J); its blocks follow. A beginning names the block that comes
    next, so that it causes no copy of its own. steps = stored + count.
    """
    stored = rows.shape[0]
    order = jnp.argsort(columns, stable=True).astype(jnp.int32)
    in_order = columns[order]
    begins = jnp.arange(count, dtype=jnp.int32)
    begins = begins + jnp.searchsorted(in_order, begins).astype(jnp.int32)
    places = jnp.arange(stored, dtype=jnp.int32) + in_order.astype(jnp.int32) + 1
    steps = stored + count
    begin = jnp.zeros(steps, jnp.int32).at[begins].set(1)
    column = jnp.cumsum(begin) - 1
    next_block = jnp.clip(jnp.arange(steps, dtype=jnp.int32) - column, 0, stored - 1)
    block = order[next_block].at[places].set(order)
    return column.astype(jnp.int32), rows[block].astype(jnp.int32), block, begin


def _kernel(column: Any, row: Any, block: Any, begin: Any, x_ref: Any, w_ref: Any, o_ref: Any) -> None:
    del column, row, block
    step = pl.program_id(1)

    @pl.when(begin[step] == 1)
    def _() -> None:
        o_ref[...] = jnp.zeros_like(o_ref)

    @pl.when(begin[step] == 0)
    def _() -> None:
        x, w = x_ref[...], w_ref[0]
        o_ref[...] += jnp.dot(x, w, preferred_element_type=jnp.float32, precision=precision(x, w))


@partial(jax.jit, static_argnames=("d_out", "interpret"))
def block_sparse_product(
    x: Float[Array, "tokens d_in"],
    blocks: Float[Array, "stored b0 b1"],
    rows: Int[Array, " stored"],
    columns: Int[Array, " stored"],
    *,
    d_out: int,
    interpret: Any = False,
) -> Float[Array, "tokens d_out"]:
    """x W in float32; without a stored block, zeros. Forward only: `kernels.block_sparse.multiply` has a derivative."""
    stored, b0, b1 = blocks.shape
    tokens = x.shape[0]
    if not stored or not tokens:
        return jnp.zeros((tokens, d_out), jnp.float32)
    dtype = jnp.promote_types(x.dtype, blocks.dtype)
    x, blocks = x.astype(dtype), blocks.astype(dtype)
    tile = min(TILE, -(-tokens // 8) * 8)
    tiles = -(-tokens // tile)
    x = jnp.pad(x, ((0, tiles * tile - tokens), (0, 0)))
    steps = stored + d_out // b1
    y = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(tiles, steps),
            in_specs=[
                pl.BlockSpec((tile, b0), lambda t, s, column, row, block, begin: (t, row[s])),
                pl.BlockSpec((1, b0, b1), lambda t, s, column, row, block, begin: (block[s], 0, 0)),
            ],
            out_specs=pl.BlockSpec((tile, b1), lambda t, s, column, row, block, begin: (t, column[s])),
        ),
        out_shape=jax.ShapeDtypeStruct((tiles * tile, d_out), jnp.float32),
        interpret=interpret,
    )(*order_of_steps(rows, columns, d_out // b1), x, blocks)
    return y[:tokens]
