"""A short run, and the comparison of two."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.core.trees import named_leaves
from jaxinterp.methods import SkipTranscoder

METHOD = SkipTranscoder(features=64, k=4, learning_rate=3e-3)
SIZES = {"site": "blocks/1/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 5}


def same(first, second):
    """Every leaf equal to the last bit."""
    one, two = named_leaves(first), named_leaves(second)
    assert one.keys() == two.keys()
    for name in one:
        leaves = (
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (one[name], two[name])
        )
        np.testing.assert_array_equal(*(np.asarray(leaf) for leaf in leaves), err_msg=name)


NUMBERS = "of 0.5/numbers"


def numbers(seed):
    return {NUMBERS: jax.random.normal(jax.random.key(seed), (4096,)), "flags": jnp.array([True, False, True])}
