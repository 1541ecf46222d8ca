"""What is computed a few tokens at a time, or kept for a second reading, is what the whole computation gives."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.evaluation import next_token
from jaxinterp.evaluation.features.peaks import columns_of

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("numbers", [2**19, 4 * 11])  # all tokens at once; 4 at a time, the last chunk filled up
def test_comparing_a_few_tokens_at_a_time_changes_nothing(monkeypatch, numbers):
    monkeypatch.setitem(next_token.AT_A_TIME, "cpu", numbers)
    logits, clean = (RNG.normal(size=(2, 5, 11)).astype(np.float32) for _ in range(2))
    logits[0, 0], clean[0, 0] = 1.0, np.r_[2.0, np.ones(10)]  # tied: the first is the most likely
    tokens = RNG.integers(0, 11, (2, 5)).astype(np.int32)
    found = next_token.compare.__wrapped__(*map(jnp.asarray, (logits, clean, tokens)))
    log_p, log_clean = (log_softmax(each.astype(np.float64), axis=-1)[:, :-1] for each in (logits, clean))
    nll = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(found["kl"], (np.exp(log_clean) * (log_clean - log_p)).sum(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found["agrees"], logits.argmax(-1)[:, :-1] == clean.argmax(-1)[:, :-1])
    assert found["agrees"][0, 0]
    late = -np.take_along_axis(log_p, tokens[:, :-1, None], axis=-1)[..., 0]  # broken: the token itself, not the next
    assert np.abs(late - found["nll"]).max() > 0.1


def test_columns_of_kept_codes_are_those_of_the_dense_ones():
    values = RNG.normal(size=(2, 6, 3)).astype(np.float32)
    values[0, 0] = 0  # a token without weight
    indices = np.stack([RNG.permutation(7)[:3] for _ in range(12)]).reshape(2, 6, 3).astype(np.int32)
    chosen = np.array([6, 0, 3])
    dense = np.zeros((2, 6, 7), np.float32)
    np.put_along_axis(dense, indices, values, axis=-1)
    np.testing.assert_array_equal(
        columns_of(SparseCodes(jnp.asarray(values), jnp.asarray(indices), 7), chosen), dense[..., chosen]
    )
    assert (dense[..., chosen] != dense[..., np.sort(chosen)]).any()  # broken: in the order of their index


def test_padded_slots_may_name_the_feature_behind_the_last():
    codes = SparseCodes(jnp.asarray([[[2.0, 0.0]]], jnp.float32), jnp.asarray([[[1, 4]]], jnp.int32), 4)
    np.testing.assert_array_equal(columns_of(codes, np.array([1, 3])), [[[2.0, 0.0]]])
