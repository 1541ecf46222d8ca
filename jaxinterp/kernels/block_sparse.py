"""A matrix of which only some blocks are stored, and its product with rows, in XLA and as a Pallas TPU kernel.

    y[:, J] = sum over stored blocks (I, J) of x[:, I] W_IJ

Blocks are `b0` inputs by `b1` outputs. Block columns without a block give zeros, block rows without one are not read.
The number of stored blocks is static; which ones they are is not, so that a mask can change without a new program.
Gradients reach the stored blocks and x, nothing else.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.kernels import platforms

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_tpu:interpret")
LANES = 128


class BlockSparse(eqx.Module):
    """The stored blocks of a `(d_in, d_out)` matrix, and where they lie; `x @ W` is `matrix(x)`."""

    blocks: Float[Array, "stored b0 b1"]
    rows: Int[Array, " stored"]
    columns: Int[Array, " stored"]
    shape: tuple[int, int] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        _, b0, b1 = self.blocks.shape
        cut = x.reshape(-1, self.shape[0] // b0, b0)
        parts = jnp.einsum("tsb,sbc->stc", cut[:, self.rows], self.blocks)
        y = jax.ops.segment_sum(parts, self.columns, num_segments=self.shape[1] // b1)
        return jnp.moveaxis(y, 0, 1).reshape(*x.shape[:-1], self.shape[1])

    def dense(self) -> Float[Array, "d_in d_out"]:
        """The whole matrix, zeros where nothing is stored."""
        _, b0, b1 = self.blocks.shape
        grid = jnp.zeros((self.shape[0] // b0, self.shape[1] // b1, b0, b1), self.blocks.dtype)
        grid = grid.at[self.rows, self.columns].add(self.blocks)
        return jnp.swapaxes(grid, 1, 2).reshape(self.shape)


def block_sparse(
    weight: Float[Array | np.ndarray, "d_in d_out"], mask: Bool[Array | np.ndarray, "block_rows block_columns"]
) -> BlockSparse:
    """The blocks of a matrix where the mask of blocks is True; the mask must have values (not be traced).

    Raises:
      UserError: the mask's sides do not divide the matrix.
    """
    mask, weight = np.asarray(mask), jnp.asarray(weight)
    if weight.shape[0] % mask.shape[0] or weight.shape[1] % mask.shape[1]:
        raise UserError(f"mask has {mask.shape} blocks, which do not divide a matrix of shape {weight.shape}.")
    b0, b1 = weight.shape[0] // mask.shape[0], weight.shape[1] // mask.shape[1]
    rows, columns = np.nonzero(mask)
    grid = jnp.swapaxes(weight.reshape(mask.shape[0], b0, mask.shape[1], b1), 1, 2)
    return BlockSparse(
        grid[rows, columns],
        jnp.asarray(rows, jnp.int32),
        jnp.asarray(columns, jnp.int32),
        (int(weight.shape[0]), int(weight.shape[1])),
    )


def multiply(
    matrix: BlockSparse, x: Float[Array, "*axes d_in"], *, implementation: str = "xla"
) -> Float[Array, "*axes d_out"]:
    """x W by the implementation named; all have the same derivative, that of `matrix(x)`.

    Args:
      implementation: "xla"; "pallas_tpu", on a TPU, for blocks whose sides are multiples of 128; or
        "pallas_tpu:interpret", anywhere, slowly: for tests.
    Raises:
      UserError: the implementation is unknown, or cannot run on this platform or with these blocks.
    """
    if implementation not in IMPLEMENTATIONS:
        hint = suggest(implementation, IMPLEMENTATIONS)
        raise UserError(f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}.{hint}")
    if implementation == "xla":
        return matrix(x)
    interpret = implementation.endswith(":interpret")
    if not interpret and platforms.current() != "tpu":
        raise UserError(f"implementation={implementation!r} needs a TPU; here it runs as 'pallas_tpu:interpret'.")
    if not interpret and any(side % LANES for side in matrix.blocks.shape[1:]):
        raise UserError(
            f"implementation={implementation!r} needs blocks with sides that are multiples of {LANES}, not "
            f"{matrix.blocks.shape[1:]}: take 'xla'."
        )
    return _fused(interpret, matrix.shape, x, matrix.blocks, matrix.rows, matrix.columns)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(interpret: bool, shape: tuple[int, int], x: Array, blocks: Array, rows: Array, columns: Array) -> Array:
    from jaxinterp.kernels.pallas_tpu.block_sparse import block_sparse_product  # imports Mosaic, which few need

    flat = x.reshape(-1, x.shape[-1])
    y = block_sparse_product(flat, blocks, rows, columns, d_out=shape[1], interpret=interpret)
    return y.astype(jnp.promote_types(x.dtype, blocks.dtype)).reshape(*x.shape[:-1], shape[1])


def _forward(
    interpret: bool, shape: tuple[int, int], x: Array, blocks: Array, rows: Array, columns: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _fused(interpret, shape, x, blocks, rows, columns), (x, blocks, rows, columns)


def _backward(
    interpret: bool, shape: tuple[int, int], kept: tuple[Array, ...], slope: Array
) -> tuple[Array | None, ...]:
    x, blocks, rows, columns = kept
    _, pull = jax.vjp(lambda x, blocks: BlockSparse(blocks, rows, columns, shape)(x), x, blocks)
    return (*pull(slope), None, None)


_fused.defvjp(_forward, _backward)
