"""The block-sparse product equals the masked dense one, at every pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.kernels.block_sparse import block_sparse, multiply
from jaxinterp.kernels.pallas_tpu.block_sparse import order_of_steps
from jaxinterp.models.selection import spread_blocks


def test_every_pattern_of_blocks_equals_the_masked_matrix():
    """2 x 2 blocks of 2 x 3, all 16 patterns: empty rows, empty columns, nothing at all."""
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(4, 6)).astype(np.float32), jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    product = jax.jit(lambda sparse, x: sparse(x))
    for pattern in range(16):
        mask = np.asarray([pattern >> bit & 1 for bit in range(4)], bool).reshape(2, 2)
        sparse = block_sparse(weight, mask)
        dense = np.where(np.asarray(spread_blocks(mask, (2, 3))), weight, 0)
        np.testing.assert_allclose(product(sparse, x), x @ dense, atol=1e-5)
        np.testing.assert_array_equal(sparse.dense(), dense)
    turned = np.where(np.asarray(spread_blocks(np.eye(2, dtype=bool)[::-1], (2, 3))), weight, 0)
    assert np.abs(np.asarray(block_sparse(weight, np.eye(2, dtype=bool))(x)) - x @ turned).max() > 0.1  # broken: places


def test_gradients_are_those_of_the_stored_blocks():
    rng = np.random.default_rng(0)
    weight, x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    mask = np.asarray([[True, False], [False, True]])
    sparse = block_sparse(weight, mask)
    own = jax.grad(lambda matrix: jnp.sum(jnp.sin(matrix(x))), allow_int=True)(sparse).blocks
    keep = spread_blocks(mask, (2, 3))
    whole = jax.grad(lambda weight: jnp.sum(jnp.sin(x @ jnp.where(keep, weight, 0))))(weight)
    np.testing.assert_allclose(own[0], whole[:2, :3], atol=1e-5)
    np.testing.assert_allclose(own[1], whole[2:, 3:], atol=1e-5)
    with pytest.raises(UserError, match="do not divide"):
        block_sparse(weight, np.ones((3, 2), bool))


def test_steps_of_the_kernel_visit_every_column_and_every_block_once():
    rng = np.random.default_rng(0)
    for stored in (1, 3, 12):
        places = rng.permutation(12)[:stored]
        rows, columns = places // 4, places % 4
        column, row, block, begin = (
            np.asarray(part) for part in order_of_steps(jnp.asarray(rows), jnp.asarray(columns), 4)
        )
        assert (np.diff(column) >= 0).all() and column.tolist().count(3) == 1 + (columns == 3).sum()
        assert sorted(block[begin == 0]) == list(range(stored)) and begin.sum() == 4
        np.testing.assert_array_equal(columns[block[begin == 0]], column[begin == 0])
        np.testing.assert_array_equal(rows[block], row)
        assert (begin[np.searchsorted(column, np.arange(4))] == 1).all()  # a column begins with its zeros


def test_the_kernel_equals_the_masked_matrix_in_the_interpreter():
    """3 x 3 blocks; a pattern with an empty row and an empty column, all, one and none; 13 tokens, in bfloat16 too."""
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(24, 12)).astype(np.float32), jnp.asarray(rng.normal(size=(13, 24)), jnp.float32)
    product = jax.jit(lambda sparse, x: multiply(sparse, x, implementation="pallas_tpu:interpret"))
    gap = np.asarray([[True, False, True], [False, False, False], [True, False, False]])
    corner = np.zeros((3, 3), bool)
    corner[2, 1] = True
    for mask in (gap, np.ones((3, 3), bool), corner, np.zeros((3, 3), bool)):
        sparse = block_sparse(weight, mask)
        dense = np.where(np.asarray(spread_blocks(mask, (8, 4))), weight, 0)
        np.testing.assert_allclose(product(sparse, x), x @ dense, atol=1e-4)
        np.testing.assert_allclose(product(sparse, x), multiply(sparse, x), atol=1e-4)
    half = product(block_sparse(weight, gap), x.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32 and np.abs(np.asarray(half) - product(block_sparse(weight, gap), x)).max() < 0.2
    turned = np.where(np.asarray(spread_blocks(gap.T[::-1], (8, 4))), weight, 0)
    assert np.abs(np.asarray(product(block_sparse(weight, gap), x)) - x @ turned).max() > 0.1  # broken: other places


def test_the_kernel_has_the_derivative_of_the_product():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(16, 12)).astype(np.float32), jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    sparse = block_sparse(weight, np.asarray([[True, False, True], [False, False, True]]))

    def slopes(implementation):
        loss = lambda both: jnp.sum(jnp.sin(multiply(both[0], both[1], implementation=implementation)))
        matrix, rows = jax.grad(loss, allow_int=True)((sparse, x))
        return matrix.blocks, rows

    for one, other in zip(slopes("pallas_tpu:interpret"), slopes("xla"), strict=True):
        assert np.abs(np.asarray(other)).max() > 0.1
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_an_implementation_that_cannot_run_is_refused():
    sparse = block_sparse(np.ones((4, 4), np.float32), np.ones((2, 2), bool))
    with pytest.raises(UserError, match="implementation='pallas' must be one of xla"):
        multiply(sparse, jnp.ones((1, 4)), implementation="pallas")
    with pytest.raises(UserError, match="needs a TPU"):
        multiply(sparse, jnp.ones((1, 4)), implementation="pallas_tpu")
