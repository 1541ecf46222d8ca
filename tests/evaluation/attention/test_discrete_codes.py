"""Scores of discrete codes, by hand; contributions of heads against the sublayer's own output."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.attention.discrete_codes import (
    edge_scores,
    head_contributions,
    node_scores,
    permutation_z,
    presence,
    roc_auc,
)
from jaxinterp.models.load import load
from jaxinterp.models.run import run

# Three positive and three negative examples (rows), three heads (columns): head 0 tells them apart, head 1 mixes, and
# head 2 always takes the same code.
CODES = jnp.array([[0, 0, 2], [1, 1, 2], [0, 1, 2], [2, 0, 2], [2, 2, 2], [3, 1, 2]])
POSITIVE = jnp.array([True, True, True, False, False, False])


def test_node_scores_by_hand():
    np.testing.assert_array_equal(
        presence(CODES, POSITIVE, 4),
        [[True, True, False, False], [True, True, False, False], [False, False, True, False]],
    )
    np.testing.assert_array_equal(node_scores(CODES, POSITIVE, 4), [2, 0, 0])
    np.testing.assert_allclose(node_scores(CODES, POSITIVE, 4, normalised=True), [2 / 4, 0, 0])
    np.testing.assert_array_equal(node_scores(CODES, ~POSITIVE, 4), [2, 1, 0])


def test_edge_scores_by_hand():
    """Heads 0 and 1: pairs 00, 11, 01 in positives; 20, 22, 31 in negatives: 3 of 6 are the positives' own."""
    own = edge_scores(CODES, POSITIVE)
    np.testing.assert_array_equal(own, [[2, 3, 2], [3, 0, 0], [2, 0, 0]])
    np.testing.assert_allclose(
        edge_scores(CODES, POSITIVE, normalised=True), [[2 / 4, 3 / 6, 2 / 4], [3 / 6, 0, 0], [2 / 4, 0, 0]]
    )


def test_edge_scores_are_those_of_a_table_of_all_pairs():
    codes = np.asarray(jax.random.randint(jax.random.key(0), (20, 5), 0, 4))
    positive = np.arange(20) % 3 == 0
    expected, union = np.zeros((2, 5, 5))
    for g in range(5):
        for h in range(5):
            pairs = list(zip(codes[:, g], codes[:, h], strict=True))
            has = {pair for pair, yes in zip(pairs, positive, strict=True) if yes}
            has_not = {pair for pair, yes in zip(pairs, positive, strict=True) if not yes}
            expected[g, h], union[g, h] = len(has - has_not), len(has | has_not)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(edge_scores(jnp.asarray(codes), jnp.asarray(positive)), expected)
    found = edge_scores(jnp.asarray(codes), jnp.asarray(positive), normalised=True)
    np.testing.assert_allclose(found, expected / union, rtol=1e-6)


def test_the_z_score_is_that_of_all_permutations():
    """Head 0: of the 20 ways to call three of six examples positive; head 2 cannot vary."""
    scores = []
    for number in range(2**6):
        labels = np.array([number >> place & 1 for place in range(6)], bool)
        if labels.sum() == 3:
            scores.append(np.asarray(node_scores(CODES, jnp.asarray(labels), 4)))
    assert len(scores) == 20
    mean, std = np.mean(scores, axis=0), np.std(scores, axis=0)
    expected = (np.array([2, 0]) - mean[:2]) / std[:2]
    found = np.asarray(permutation_z(CODES, POSITIVE, 4, jax.random.key(0), permutations=20_000))
    np.testing.assert_allclose(found[:2], expected, atol=0.05)
    assert found[2] == 0 and found[0] > 0 > found[1]


def test_what_cannot_be_scored():
    with pytest.raises(UserError, match="all examples are of one kind"):
        permutation_z(CODES, jnp.ones(6, bool), 4, jax.random.key(0))
    with pytest.raises(UserError, match="permutations=1 must be at least 2"):
        permutation_z(CODES, POSITIVE, 4, jax.random.key(0), permutations=1)


def test_area_under_the_curve_by_hand():
    scores, member = jnp.array([3.0, 1.0, 2.0, 1.0, 0.0]), jnp.array([True, True, False, False, False])
    # 3 beats all three; the 1 ties with one, beats one, loses to one.
    assert float(roc_auc(scores, member)) == pytest.approx((3 + 1.5) / 6)
    assert float(roc_auc(-scores, member)) == pytest.approx(1 - (3 + 1.5) / 6)
    assert np.isnan(float(roc_auc(scores, jnp.zeros(5, bool))))


def test_contributions_of_heads_add_up_to_what_attention_returns():
    model = load("tiny").model
    tokens = jax.random.randint(jax.random.key(0), (3, 8), 0, 256)
    weight = jnp.array([[0.0] + [1.0] * 7] * 3)
    rows = eqx.filter_jit(head_contributions)(model, tokens, weight)
    assert rows.shape == (3, 4 * 4, 64)
    trace = eqx.filter_jit(run)(model, tokens)
    for layer in range(4):
        expected = jnp.mean(trace[f"blocks/{layer}/attn/out"][:, 1:], axis=1)
        np.testing.assert_allclose(jnp.sum(rows[:, 4 * layer : 4 * layer + 4], axis=1), expected, rtol=1e-3, atol=1e-4)
