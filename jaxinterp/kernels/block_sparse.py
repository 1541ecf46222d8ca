"""A matrix of which only some blocks are stored, and its product with rows, in XLA.

    y[:, J] = sum over stored blocks (I, J) of x[:, I] W_IJ

Blocks are `b0` inputs by `b1` outputs. Block columns without a block give zeros, block rows without one are not read.
The number of stored blocks is static; which ones they are is not, so that a mask can change without a new program.
Gradients reach the stored blocks and x, nothing else.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.core.errors import UserError


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
