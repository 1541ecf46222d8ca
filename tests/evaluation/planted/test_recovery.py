"""Recovery: signs, codes, and dictionaries that are not finite."""

import jax
import numpy as np
import pytest

from jaxinterp.evaluation.planted.recovery import code_correlation, frr, match, mcc, sign_errors
from jaxinterp.evaluation.stability import compare_seeds
from jaxinterp.models.tiny import unit_rows

ROWS = np.asarray(unit_rows(jax.random.key(0), 20, 32))


def test_a_row_that_was_found_with_the_wrong_sign_is_an_error_of_sign_and_not_of_recovery_alone():
    flipped = ROWS * np.where(np.arange(20) < 3, -1, 1)[:, None]
    assert sign_errors(ROWS, flipped) == pytest.approx(3 / 20)
    assert frr(ROWS, flipped) == pytest.approx(17 / 20)
    both = np.concatenate([flipped, ROWS[:3]])
    assert sign_errors(ROWS, both) == 0, "found upright beside it"
    assert sign_errors(ROWS, np.asarray(unit_rows(jax.random.key(1), 20, 32))) == 0, "not found at all"
    assert sign_errors(ROWS, ROWS) == 0


def test_codes_correlate_in_the_order_of_the_matching():
    rng = np.random.default_rng(0)
    h, order = rng.uniform(0, 1, (500, 20)), rng.permutation(20)
    pairs = match(ROWS, ROWS[order])
    assert code_correlation(h, 3 * h[:, order] + 1, pairs) == pytest.approx(1), "sizes and constants do not matter"
    assert code_correlation(h, -h[:, order], pairs) == pytest.approx(-1)
    assert abs(code_correlation(h, rng.uniform(0, 1, (500, 20)), pairs)) < 0.05
    half = h[:, order] * (np.arange(20) < 10)
    assert code_correlation(h, half, pairs) == pytest.approx(0.5), "a dead feature counts as 0"
    noisy = h + rng.normal(0, h.std(), h.shape)
    assert code_correlation(h, noisy[:, order], pairs) == pytest.approx(np.sqrt(0.5), abs=0.03)


def test_a_dictionary_that_is_not_finite_reaches_no_threshold():
    broken = ROWS.copy()
    broken[0, 0] = np.nan
    for score in (mcc(ROWS, broken), frr(ROWS, broken), sign_errors(ROWS, broken), *compare_seeds([ROWS, broken])):
        assert not score >= -1
    assert not compare_seeds([ROWS, ROWS[:0]]).cosine >= -1, "nothing is live"
