"""Firings against dense arrays: sums, correlations, matches, quantiles. Invariant: an index says what the codes say."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.features.ablation import ablation, ablation_effect
from jaxinterp.evaluation.features.firings import (
    Found,
    at_quantile,
    correlations,
    find_firings,
    matches,
    sort_firings,
    sums_of,
)
from jaxinterp.evaluation.features.peaks import batches, token_codes
from jaxinterp.evaluation.features.vectors import direct_logits
from jaxinterp.models.run import run

TOKENS, FEATURES = 60, 7


@pytest.fixture(scope="module")
def dense():
    random = np.random.default_rng(0)
    codes = np.abs(random.normal(size=(TOKENS, FEATURES))) * (random.random((TOKENS, FEATURES)) < 0.3)
    codes[:, 2] = 0  # a dead feature
    codes[:, 4] = 2 * codes[:, 1]
    return codes.astype(np.float32)


@pytest.fixture(scope="module")
def firings(dense):
    token, feature = np.nonzero(dense)
    mixed = np.random.default_rng(1).permutation(len(token))
    parts = np.array_split(mixed, 3)
    found = [Found(feature[p].astype(np.int32), token[p], dense[token[p], feature[p]]) for p in parts]
    return sort_firings(found, FEATURES, TOKENS)


def test_both_orders_hold_every_firing_and_no_other(dense, firings):
    for j in range(FEATURES):
        where, values = firings.of(j)
        np.testing.assert_array_equal(where, np.flatnonzero(dense[:, j]))
        np.testing.assert_array_equal(values, dense[where, j])
    asked = np.array([3, 59, 0, 17])
    row, features, values = firings.at(asked)
    again = np.zeros((4, FEATURES), np.float32)
    again[row, features] = values
    np.testing.assert_array_equal(again, dense[asked])


def test_sums_and_correlations_are_those_of_the_dense_codes(dense, firings):
    sums = sums_of(firings)
    wide = dense.astype(np.float64)
    np.testing.assert_allclose(sums.total, wide.sum(0), atol=1e-12)
    np.testing.assert_allclose(sums.square, (wide**2).sum(0), atol=1e-12)
    np.testing.assert_array_equal(sums.fired, (dense != 0).sum(0))
    np.testing.assert_allclose(sums.largest, [column[np.abs(column).argmax()] for column in dense.T])
    live = [0, 1, 3, 4, 5, 6]
    with np.errstate(invalid="ignore"):
        expected = np.corrcoef(wide.T)
    for j in live:
        found = correlations(firings, sums, j, TOKENS)
        np.testing.assert_allclose(found[live], expected[j, live], atol=1e-6)
        assert found[2] == 0
        uncentred = wide.T @ wide[:, j] / np.sqrt(np.maximum(sums.square * sums.square[j], 1e-9))
        assert np.abs(uncentred[live] - expected[j, live]).max() > 0.05, "the broken variant would not be seen"
    assert correlations(firings, sums, 1, TOKENS)[4] == pytest.approx(1)


def test_matches_are_precision_and_recall_by_hand(dense, firings):
    chosen = np.flatnonzero(dense[:, 3])  # the text on which feature 3 fires, and 3 alone everywhere
    found = matches(firings, sums_of(firings), chosen)
    for j in range(FEATURES):
        size = np.abs(dense[:, j]).sum()
        p = np.abs(dense[chosen, j]).sum() / size if size else 0
        r = (dense[chosen, j] != 0).mean()
        assert found[j] == pytest.approx(2 * p * r / (p + r) if p + r else 0, abs=1e-6)
    assert found.argmax() == 3 and found[3] == pytest.approx(1)
    assert matches(firings, sums_of(firings), np.zeros(0, np.int64)).max() == 0


def test_quantiles_are_met_and_windows_are_not_used_twice():
    values = np.arange(1, 101, dtype=np.float32)
    where, used = np.arange(100) * 10, set()
    top = at_quantile(where, values, 1.0, 3, 10, used)
    assert values[top].tolist() == [100, 99, 98]
    middle = at_quantile(where, values, 0.5, 3, 10, used)
    assert sorted(values[middle]) == [49, 50, 51] or sorted(values[middle]) == [50, 51, 52]
    assert len(used) == 6 and at_quantile(where // 1000, values, 1.0, 3, 10, set()) == [99]  # one window, one context
    assert at_quantile(where[:0], values[:0], 0.5, 3, 10, set()) == []


@pytest.mark.parametrize("start", [0, 1])
def test_firings_of_a_model_are_the_codes_of_its_tokens(subject, dictionary, dataset, start):
    ((_, batch),) = batches(dataset, dictionary.features)
    dense = np.asarray(token_codes(dictionary, subject.model, batch)).reshape(-1, dictionary.features)
    parts = list(find_firings(dictionary, subject.model, dataset, skip=start * len(dataset)))
    if start:
        assert parts == []  # all of it was read before
        return
    ((done, found),) = parts
    again = np.zeros_like(dense)
    again[found.where, found.features] = found.values
    np.testing.assert_allclose(again, dense, atol=1e-5)
    assert done == len(dataset) and not dense[::32].any(), "tokens of weight 0 are silent"


def test_ablation_is_the_loss_with_the_feature_s_part_taken_away(subject, dictionary, dataset):
    tokens = jnp.asarray(np.stack([window["tokens"] for window in dataset[:2]]))
    trace = run(subject.model, tokens)
    codes = dictionary.encode(trace["blocks/1/mlp/in"]).dense()
    feature = int(jnp.argmax(jnp.sum(jnp.abs(codes), (0, 1))))

    def loss(logits):
        log_p = np.asarray(logits - np.log(np.exp(np.asarray(logits, np.float64)).sum(-1, keepdims=True)))[:, :-1]
        return -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1)[..., 0]

    part = codes[..., feature, None] * dictionary.decoder[feature] * dictionary.output_scale
    without = run(subject.model, tokens, edits={"blocks/1/mlp/out": lambda y: y - part}).logits
    expected = loss(without) - loss(trace.logits)
    found = np.asarray(ablation_effect(dictionary, subject.model, tokens, feature))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected).max() > 1e-2
    fires = codes[..., feature] != 0
    raises = np.asarray(ablation(dictionary, subject.model, tokens, feature, fires).raises)
    log_p = [np.asarray(x, np.float64) for x in (trace.logits, without)]
    log_p = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in log_p]
    np.testing.assert_allclose(raises, (log_p[0] - log_p[1])[np.asarray(fires)].mean(0), atol=2e-5)
    assert np.abs(raises - (log_p[0] - log_p[1]).mean((0, 1))).max() > 1e-3, "broken: over all tokens"
    direct = np.asarray(
        direct_logits(subject.model, "blocks/1/mlp/out", np.asarray(dictionary.decoder[feature])[None])[0]
    )
    assert np.corrcoef(direct, raises)[0, 1] > 0.5, "of the last layer, the direct path is most of it"
    silent = int(jnp.argmin(jnp.sum(codes != 0, (0, 1))))
    assert np.abs(ablation_effect(dictionary, subject.model, tokens, silent)).max() < 1e-6
    with pytest.raises(UserError, match="feature=999 is not an index"):
        ablation_effect(dictionary, subject.model, tokens, 999)
