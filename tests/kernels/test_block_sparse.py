"""The block-sparse product equals the masked dense one, at every pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.kernels.block_sparse import block_sparse
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
