"""Scaled normal draws are those of the expression that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.models.normals import normal

KEY = jax.random.key(7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_the_draw_of_jax(dtype):
    with jax.enable_x64(dtype == "float64"):
        ours, theirs = normal(KEY, (7, 5), dtype), jax.random.normal(KEY, (7, 5), dtype)
        assert ours.dtype == theirs.dtype == dtype
        np.testing.assert_array_equal(ours, theirs)


def test_factors_are_those_of_the_expression():
    drawn = jax.random.normal(KEY, (16, 24))
    ours = normal(KEY, (16, 24), jnp.float32, times=0.3, over=5**0.5)
    np.testing.assert_array_equal(ours, 0.3 * drawn / 5**0.5)
    assert not np.allclose(ours, drawn / 5**0.5) and not np.allclose(ours, 0.3 * drawn)
