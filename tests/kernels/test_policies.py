"""What a selection may go by: size, thresholds with a cap, other scores, groups; forward and backward against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import encode_groups, encode_ranked, encode_topk, keep_largest, rank, select_topk, sparse_decode
from jaxinterp.kernels.xla import largest
from tests.kernels import oracle


def problem(seed=0, tokens=40, d=16, features=60):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=size), jnp.float32) for size in [(tokens, d), (features, d), (features,)])


def by_score(pre, score, k):
    """Values and features of the k best scores; where a score is -inf, the value is."""
    best, order = oracle.topk(score, k)
    return np.where(np.isneginf(best), -np.inf, np.take_along_axis(pre, order, axis=1)), order


def check(got, expected):
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-5)


def test_by_size_takes_either_sign():
    x, rows, bias = problem()
    pre = oracle.pre_activations(x, rows, bias)
    values, indices, count = encode_ranked(x, rows, bias, rank.by_size(), k=6)
    check((values, indices), by_score(pre, np.abs(pre), 6))
    assert (values < 0).any() and (values > 0).any() and (count == 60).all()


def test_a_threshold_with_a_cap_counts_what_it_lost():
    x, rows, bias = problem()
    threshold = jnp.linspace(0.5, 4.0, 60)
    pre = oracle.pre_activations(x, rows, bias)
    values, indices, count = encode_ranked(x, rows, bias, rank.above(threshold), k=12)
    check((values, indices), by_score(pre, np.where(pre > oracle.wide(threshold), pre, -np.inf), 12))
    np.testing.assert_array_equal(count, (pre > oracle.wide(threshold)).sum(1))
    kept = np.isfinite(np.asarray(values)).sum(1)
    np.testing.assert_array_equal(kept, np.minimum(count, 12))
    assert (np.asarray(count) > 12).any() and (np.asarray(count) < 12).any(), "the problem tests only one side"


def test_by_effect_is_activation_times_gradient():
    x, rows, bias = problem()
    gradient, decoder, _ = problem(seed=1)
    pre = oracle.pre_activations(x, rows, bias)
    for own in (0.0, 1.0):
        got = encode_ranked(x, rows, bias, rank.by_effect(gradient, decoder, own), k=5)
        effect = np.abs(oracle.wide(gradient) @ oracle.wide(decoder).T)
        check(got[:2], by_score(pre, np.maximum(pre, 0) * (own + effect), 5))


def test_arrays_of_a_rank_follow_the_axes_of_the_tokens():
    x, rows, bias = problem()
    gradient, decoder, _ = problem(seed=1)
    flat = encode_ranked(x, rows, bias, rank.by_effect(gradient, decoder, 1.0), k=5)
    folded = rank.by_effect(gradient.reshape(4, 10, 16), decoder, 1.0)
    got = encode_ranked(x.reshape(4, 10, 16), rows, bias, folded, k=5)
    assert got[2].shape == (4, 10)
    np.testing.assert_array_equal(got[1].reshape(40, 5), flat[1])


def test_groups_give_their_maxima():
    x, rows, bias = problem()
    grouped = oracle.pre_activations(x, rows, bias).reshape(40, 12, 5)
    values, indices = encode_groups(x, rows, bias, k=12)
    np.testing.assert_allclose(values, grouped.max(2), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(indices, grouped.argmax(2) + np.arange(12) * 5)
    with pytest.raises(UserError, match="k=7 groups cannot share features=60 evenly"):
        encode_groups(x, rows, bias, k=7)


@pytest.mark.parametrize("policy", ["size", "threshold", "scaled", "groups"])
def test_gradients_are_those_of_the_masked_dense_formula(policy):
    x, rows, bias = problem()
    decoder, _, _ = problem(seed=2, tokens=60)
    scale = jnp.linspace(0.5, 2.0, 60)
    ranks = {"size": rank.by_size(), "threshold": rank.above(scale), "scaled": rank.by_size(scale)}

    def select(x, rows, bias):
        if policy == "groups":
            return encode_groups(x, rows, bias, k=12)
        return encode_ranked(x, rows, bias, ranks[policy], k=9)[:2]

    def loss(x, rows, bias, decoder):
        values, indices = select(x, rows, bias)
        return jnp.sum(sparse_decode(jnp.where(values == -jnp.inf, 0, values), indices, decoder) ** 2)

    values, indices = (np.asarray(array) for array in select(x, rows, bias))
    mask = np.zeros((40, 60))
    np.put_along_axis(mask, indices, np.isfinite(values), axis=1)

    def dense(x, rows, bias, decoder):
        return jnp.sum((((x @ rows.T + bias) * mask) @ decoder) ** 2)

    gradients = jax.grad(loss, (0, 1, 2, 3))(x, rows, bias, decoder)
    with jax.enable_x64(True):
        wide = [jnp.asarray(oracle.wide(array)) for array in (x, rows, bias, decoder)]
        for got, expected in zip(gradients, jax.grad(dense, (0, 1, 2, 3))(*wide), strict=True):
            oracle.close(got, np.asarray(expected))


def test_pre_activations_that_are_there_are_selected_alike():
    x, rows, bias = problem()
    pre = x @ rows.T + bias
    check(select_topk(pre, k=6), encode_topk(x, rows, bias, k=6))
    check(select_topk(pre, k=6, rank=rank.by_size()), encode_ranked(x, rows, bias, rank.by_size(), k=6))
    allowed = jnp.arange(60) > 50
    check(select_topk(pre, k=6, allowed=allowed), encode_topk(x, rows, bias, k=6, allowed=allowed))
    gradient = jax.grad(lambda pre: jnp.sum(select_topk(pre, k=6, keep=2)[0][:, :2] ** 2))(pre)
    top = np.sort(np.asarray(pre), axis=1)[:, -2][:, None]
    np.testing.assert_allclose(gradient, np.where(pre >= top, 2 * pre, 0), rtol=1e-6)


def test_a_batch_threshold_over_candidates_is_the_global_one():
    """With a cap that binds nowhere, the k * tokens largest of the batch, whoever they belong to."""
    x, rows, bias = problem()
    pre = np.maximum(oracle.pre_activations(x, rows, bias), 0)
    values, indices = encode_topk(x, rows, bias, k=40)
    kept, smallest = keep_largest(jax.nn.relu(values), 40 * 5)
    expected = np.where(pre >= np.sort(pre.ravel())[-200], pre, 0)
    dense = np.zeros((40, 60))
    np.put_along_axis(dense, np.asarray(indices), np.asarray(kept), axis=1)
    np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-5)
    assert np.isclose(smallest, expected[expected > 0].min(), rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 32), st.integers(0, 40), st.sampled_from(["ties", "nan", "inf", "normal"]))
def test_two_stages_are_top_k(seed, k, extra, kind):
    """Ties, NaN and infinities included, at widths that the groups do not divide."""
    rng = np.random.default_rng(seed)
    pre = (
        rng.integers(-2, 3, (3, 8192 + extra)).astype(np.float32)
        if kind == "ties"
        else rng.normal(size=(3, 8192 + extra))
    )
    if kind in ("nan", "inf"):
        pre[rng.random(pre.shape) < rng.choice([1e-4, 1e-2, 0.9999])] = np.nan if kind == "nan" else -np.inf
    pre = jnp.asarray(pre, jnp.float32)
    for got, expected in zip(largest(pre, k), jax.lax.top_k(pre, k), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("features", [40, 9000])
def test_a_nan_that_arithmetic_makes_comes_first(features):
    """Infinity minus infinity has its sign bit set on x86, and would be sorted last."""
    rows = jnp.ones((features, 2)).at[:, 1].set(jnp.where(jnp.arange(features) == 33, -1.0, 1.0))
    values, indices = encode_topk(jnp.full((3, 2), jnp.inf), rows, jnp.zeros(features), k=4)
    assert (indices[:, 0] == 33).all() and jnp.isnan(values[:, 0]).all() and jnp.isposinf(values[:, 1:]).all()


def test_a_threshold_lets_nan_through():
    x, rows, bias = problem()
    values, indices, count = encode_ranked(x, rows, bias.at[7].set(jnp.nan), rank.above(jnp.full(60, 2.0)), k=4)
    assert jnp.isnan(values[:, 0]).all() and (indices[:, 0] == 7).all() and (count >= 1).all()
