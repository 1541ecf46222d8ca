"""The fused TPU encoder beyond the base of tests: its certificate, the tokens that it selects again, its limits."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinterp.errors import UserError
from jaxinterp.kernels.pallas_tpu.encode import BUCKETS, LARGEST_K, encode_counted, encode_plan
from tests.kernels import oracle

TOKENS, WIDTH = 24, 16


def problem(features, seed=0):
    rng = np.random.default_rng(seed)
    x, rows = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(features, WIDTH))
    return jnp.asarray(x, jnp.float32), jnp.asarray(rows, jnp.float32), jnp.zeros(features, jnp.float32)


@pytest.mark.parametrize("interpret", [True, pltpu.InterpretParams()], ids=["jax", "tpu"])
def test_winners_of_one_bucket_are_selected_again(interpret):
    """Half of the tokens have all of their winners in one bucket, which keeps two or three: they fail and are mended."""
    features, k = 6 * BUCKETS, 6
    x, rows, bias = problem(features)
    x = x.at[:, 0].set(jnp.where(jnp.arange(TOKENS) % 2 == 0, 100.0, 0.0))
    rows = rows.at[:, 0].set(jnp.where(jnp.arange(features) % BUCKETS == 37, 1.0, 0.0))
    values, indices, redone = encode_counted(x, rows, bias, k, interpret=interpret)
    assert TOKENS // 2 <= redone < TOKENS
    assert (np.asarray(indices)[::2] % BUCKETS == 37).all()
    oracle.check_selection(values, indices, x, rows, bias)


def test_random_tokens_hardly_ever_are():
    x, rows, bias = problem(4 * BUCKETS + 100)
    values, indices, redone = encode_counted(x, rows, bias, 16, interpret=True)
    assert redone <= 1
    oracle.check_selection(values, indices, x, rows, bias)


def test_what_the_kernel_cannot_do_is_refused():
    with pytest.raises(UserError, match=f"k={LARGEST_K + 1} is more than {LARGEST_K}.* take 'xla'"):
        encode_plan(tokens=256, features=4096, k=LARGEST_K + 1, width=768)
    with pytest.raises(UserError, match="do not fit the memory of a core"):
        encode_plan(tokens=256, features=4096, k=32, width=100_000)
