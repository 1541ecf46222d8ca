"""A small normal draw is jax.random.normal's, bit by bit, and costs no program of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.models.normals import LENGTHS, normal

KEY = jax.random.key(7)
SHAPES = ((), (1,), (0, 3), (7, 5), (2, 3, 4), (100, 50))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_the_draw_of_jax_bit_by_bit(dtype):
    with jax.enable_x64(dtype == "float64"):
        for shape in SHAPES[3:] if dtype == "float64" else SHAPES:
            ours, theirs = normal(KEY, shape, dtype), jax.random.normal(KEY, shape, dtype)
            assert ours.dtype == theirs.dtype == dtype and ours.shape == shape
            np.testing.assert_array_equal(ours, theirs)
            assert shape in ((), (0, 3)) or not np.array_equal(ours, jax.random.normal(jax.random.key(8), shape, dtype))


@pytest.mark.parametrize("shape", [(7, 5), (16, 24), (3,)])
def test_factors_are_those_of_the_expression(shape):
    ours = normal(KEY, shape, jnp.float32, times=0.3, over=5**0.5)
    np.testing.assert_array_equal(ours, 0.3 * jax.random.normal(KEY, shape) / 5**0.5)


def test_other_keys_types_and_traces_are_drawn_as_they_are():
    np.testing.assert_array_equal(normal(KEY, (3,), jnp.bfloat16), jax.random.normal(KEY, (3,), jnp.bfloat16))
    other = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(normal(other, (3, 5)), jax.random.normal(other, (3, 5)))
    wanted = jax.random.normal(KEY, (7, 5))
    for traced in (jax.jit(lambda key: normal(key, (7, 5))), jax.jit(lambda _: normal(KEY, (7, 5)))):
        np.testing.assert_allclose(traced(KEY), wanted, rtol=1e-6)
    several = jax.vmap(lambda key: normal(key, (7, 5)))(jax.random.split(KEY, 2))
    np.testing.assert_allclose(several[1], jax.random.normal(jax.random.split(KEY, 2)[1], (7, 5)), rtol=1e-6)
    assert jax.eval_shape(lambda: normal(KEY, (LENGTHS[-1] + 1,))).shape == (LENGTHS[-1] + 1,)
