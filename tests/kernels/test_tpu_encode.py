"""The fused TPU encoder, interpreted, against float64: where its buckets vouch for a token and where they do not."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxinterp.core.errors import UserError
from jaxinterp.kernels.pallas_tpu import merge
from tests.kernels import oracle

pytestmark = pytest.mark.slow

kernel = importlib.import_module("jaxinterp.kernels.pallas_tpu.encode")  # the package has a function of this name

modes = pytest.mark.parametrize("interpret", [True, pltpu.InterpretParams()], ids=["jax", "tpu"])


def problem(tokens, width, features, dtype=jnp.float32, seed=0, integers=False):
    rng = np.random.default_rng(seed)
    draw = (lambda *size: rng.integers(-2, 3, size)) if integers else (lambda *size: rng.normal(size=size))
    x, rows, bias = draw(tokens, width), draw(features, width) / (1 if integers else width**0.5), draw(features)
    return jnp.asarray(x, dtype), jnp.asarray(rows, dtype), jnp.asarray(bias, jnp.float32)


def run(x, rows, bias, k, interpret=True):
    values, indices, redone = kernel.encode_counted(x, rows, bias, k, interpret=interpret)
    assert values.shape == indices.shape == (x.shape[0], k)
    assert values.dtype == jnp.float32 and indices.dtype == jnp.int32
    return values, indices, int(redone)


def check_equal(got, x, rows, bias, k):
    """Bit for bit: for problems in small integers, whose sums float32 has exactly."""
    values, indices = oracle.topk(oracle.pre_activations(x, rows, bias), k)
    np.testing.assert_array_equal(got[1], indices)
    np.testing.assert_array_equal(got[0], values)


@modes
@pytest.mark.parametrize(
    "shape, dtype",
    [((300, 72, 2500, 32), jnp.float32), ((17, 576, 1100, 1), jnp.bfloat16), ((3, 20, 48, 5), jnp.bfloat16)],
    ids=str,
)
def test_selects_what_float64_selects(shape, dtype, interpret):
    """Tokens, width and features that are multiples of nothing; more than one block of tokens and tile of features."""
    tokens, width, features, k = shape
    x, rows, bias = problem(tokens, width, features, dtype)
    values, indices, redone = run(x, rows, bias, k, interpret)
    oracle.check_selection(values, indices, x, rows, bias)
    assert redone <= tokens // 50


@pytest.mark.parametrize("width", [768, 1100, 3100])
def test_every_tiling_selects_alike(width):
    """Tiles of 2048, of 1024 and of 512 features; with the last, a tile fills half of the buckets."""
    features, k = 2100, 24
    plan = kernel.encode_plan(tokens=40, features=features, k=k, width=width, itemsize=4)
    assert plan.features == {768: 1024, 1100: 1024, 3100: 512}[width]
    x, rows, bias = problem(40, width, features)
    values, indices, _ = run(x, rows, bias, k)
    oracle.check_selection(values, indices, x, rows, bias)


@modes
def test_tokens_whose_best_share_one_bucket_are_redone(interpret):
    """Features 7, 7 + 1024, ... win for even tokens: a bucket keeps two or three of ten. Odd tokens are harmless."""
    features, k = 10 * kernel.BUCKETS + 100, 10
    x, rows, bias = problem(70, 24, features, integers=True)
    crowded = np.arange(10) * kernel.BUCKETS + 7
    x = x.at[:, 0].set(jnp.arange(70) % 2 == 0)
    rows = rows.at[:, 0].set(0).at[crowded, 0].set(1000 + jnp.arange(10)[::-1] * 100)
    x = x.at[1::2, 1:].set(0).at[1::2, 0].set(0)
    bias = bias.at[np.arange(k) * 3 + 1].set(50 - jnp.arange(k))  # what odd tokens choose, without a tie
    got = run(x, rows, bias, k, interpret)
    assert got[2] == 35
    assert (np.sort(np.asarray(got[1])[::2], axis=1) == crowded).all()
    check_equal(got, x, rows, bias, k)


def test_redoing_takes_more_than_one_round():
    x, rows, bias = problem(2 * kernel.REDONE + 30, 8, 400, integers=True)
    got = run(x, rows, bias, 9)
    assert got[2] > kernel.REDONE
    check_equal(got, x, rows, bias, 9)


def test_redoing_by_groups_is_redoing():
    """Where there are many features, those of a row are selected in two stages."""
    features, k = 3 * kernel.BUCKETS + 5, 4
    assert features > 4 * kernel.GROUP * k
    x, rows, bias = problem(20, 8, features, integers=True)
    got = run(x, rows, bias, k)
    assert got[2] >= 10, "integers tie, and a tie at the k-th place is redone"
    check_equal(got, x, rows, bias, k)


@modes
def test_ties_above_the_last_place_are_put_in_order_without_redoing(interpret):
    """Twelve equal features in buckets whose order is not theirs, and k = 12: nothing is lost, and nothing redone."""
    features, k = 2 * kernel.BUCKETS, 12
    tied = np.concatenate([np.arange(6) * 50 + 900 - 300, np.arange(6) * 50 + kernel.BUCKETS + 10])
    bias = jnp.zeros(features).at[tied].set(5.0)
    x, rows = jnp.ones((4, 8)), jnp.zeros((features, 8))
    got = run(x, rows, bias, k, interpret)
    assert got[2] == 0
    check_equal(got, x, rows, bias, k)


@modes
@pytest.mark.parametrize("allowed", [0, 5, 40])
def test_forbidden_features_come_last_by_index(allowed, interpret):
    features, k = 1500, 12
    x, rows, bias = problem(9, 16, features)
    chosen = np.random.default_rng(allowed).choice(features, allowed, replace=False)
    bias = jnp.full(features, -jnp.inf).at[chosen].set(bias[chosen])
    values, indices, redone = run(x, rows, bias, k, interpret)
    expected_values, expected_indices = oracle.topk(oracle.pre_activations(x, rows, bias), k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    assert redone == 0


def test_rows_of_negative_values_are_selected_alike():
    x, rows, bias = problem(9, 16, 1500)
    values, indices, redone = run(x, rows, bias - 1000, 12)
    oracle.check_selection(values, indices, x, rows, bias - 1000)
    assert (np.asarray(values) < 0).all() and redone <= 1


@modes
@pytest.mark.parametrize("k", [1, 6])
def test_nan_counts_as_the_greatest_number(k, interpret):
    """In one token, and in the bias of two features."""
    x, rows, bias = problem(12, 16, 1500)
    x = x.at[3].set(jnp.nan)
    bias = bias.at[jnp.array([1200, 77])].set(jnp.nan)
    values, indices, redone = run(x, rows, bias, k, interpret)
    expected_values, expected_indices = oracle.topk(oracle.pre_activations(x, rows, bias), k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    assert redone == 12


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 1200), st.integers(0, 2**31), st.data())
def test_small_integers_of_any_shape(tokens, width, features, seed, data):
    k = data.draw(st.integers(1, min(features, 24)))
    x, rows, bias = problem(tokens, width, features, seed=seed, integers=True)
    forbidden = np.random.default_rng(seed).random(features) < data.draw(st.sampled_from([0.0, 0.5, 0.99]))
    bias = jnp.where(forbidden, -jnp.inf, bias)
    check_equal(run(x, rows, bias, k), x, rows, bias, k)


@pytest.mark.parametrize("buckets, k, depth", [(1024, 32, 2), (128, 32, 4), (8, 32, 13)])
def test_as_many_tokens_fail_as_the_formula_says(buckets, k, depth):
    """Balls in buckets: the share of throws with more than `depth` in one lies below the bound that plans go by."""
    rng = np.random.default_rng(0)
    thrown = np.sort(rng.integers(0, buckets, (40000, k)), axis=1)
    failed = (thrown[:, depth:] == thrown[:, :-depth]).any(1).mean()
    bound = merge.lost(k, buckets, depth)
    assert failed <= 1.3 * bound and bound < 0.005


@pytest.mark.parametrize(
    "asked, said",
    [({"k": 200}, "k=200 is more"), ({"width": 200_000}, "width=200000"), ({"features": 2**25}, "33554432")],
)
def test_what_it_cannot_do_is_refused_before_compute(asked, said):
    with pytest.raises(UserError, match=said):
        kernel.encode_plan(**{"tokens": 512, "features": 4096, "k": 32, "width": 768} | asked)


@pytest.mark.parametrize(
    "k, width, itemsize", [(32, 768, 2), (64, 2304, 2), (64, 4096, 2), (128, 8192, 2), (32, 4096, 4)]
)
def test_plans_fit_and_seldom_fail(k, width, itemsize):
    plan = kernel.encode_plan(tokens=8192, features=131072, k=k, width=width, itemsize=itemsize)
    assert kernel._vmem(plan, width * itemsize, k) <= kernel.VMEM
    assert merge.lost(k, kernel.BUCKETS, plan.depth) < 0.005
    assert jax.tree.all(jax.tree.map(lambda size: size % kernel.LANES == 0, list(plan[:3])))
