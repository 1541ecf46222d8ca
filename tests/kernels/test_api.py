"""The differentiable functions: gradients against dense autodiff in float64, arguments, refusals, choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import (
    encode_topk,
    keep_largest,
    kth_largest,
    sampled_dot,
    select_topk,
    sparse_decode,
    sparse_outer,
    sum_by_feature,
)
from jaxinterp.kernels.dispatch import choose


def problem(tokens=72, d=20, features=48, d_out=12, seed=0, integers=False):
    rng = np.random.default_rng(seed)
    draw = (lambda *shape: rng.integers(-3, 4, shape)) if integers else (lambda *shape: rng.normal(size=shape))
    arrays = draw(tokens, d), draw(features, d), draw(features), draw(features, d_out)
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def sparse_loss(x, encoder, bias, decoder, k):
    values, indices = encode_topk(x, encoder, bias, k=k)
    return jnp.sum(sparse_decode(jax.nn.relu(values), indices, decoder) ** 2)


def dense_loss(x, encoder, bias, decoder, k):
    pre = x @ encoder.T + bias
    _, indices = jax.lax.top_k(pre, k)
    mask = jnp.zeros_like(pre).at[jnp.arange(len(x))[:, None], indices].set(1)
    return jnp.sum((jax.nn.relu(pre) * mask @ decoder) ** 2)


def check_gradients(gradients, arrays, k):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array), jnp.float64) for array in arrays]
        expected = jax.grad(dense_loss, (0, 1, 2, 3))(*wide, k)
        for gradient, right in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(gradient, right, atol=1e-5 * float(np.abs(right).max()))


@pytest.mark.parametrize("k", [1, 5, 48])
def test_gradients_equal_dense_autodiff(k):
    arrays = problem()
    check_gradients(jax.jit(jax.grad(sparse_loss, (0, 1, 2, 3)), static_argnums=4)(*arrays, k), arrays, k)


@pytest.mark.parametrize("tokens", [1, 511, 1030])
def test_chunks_do_not_show(tokens):
    x, encoder, bias, decoder = problem(tokens=tokens)
    values, indices = encode_topk(x, encoder, bias, k=4)
    expected_values, expected_indices = jax.lax.top_k(x @ encoder.T + bias, 4)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(
        sparse_decode(values, indices, decoder),
        jnp.einsum("nk,nkd->nd", values, decoder[indices]),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_masked_feature_is_never_chosen_before_an_allowed_one():
    x, encoder, bias, _ = problem()
    allowed = jnp.arange(48) < 3
    values, indices = encode_topk(x, encoder, bias, k=5, allowed=allowed)
    assert (jnp.sort(indices[:, :3], axis=1) == jnp.arange(3)).all()
    assert jnp.isneginf(values[:, 3:]).all()


def test_dead_rows_get_gradient_and_live_ones_none():
    x, encoder, bias, decoder = problem()
    allowed = jnp.arange(48) >= 40

    def loss(encoder):
        values, indices = encode_topk(x, encoder, bias, k=12, allowed=allowed)
        return jnp.sum(sparse_decode(jax.nn.relu(values), indices, decoder) ** 2)

    gradient = jax.grad(loss)(encoder)
    assert (gradient[:40] == 0).all() and bool(jnp.any(gradient[40:] != 0, axis=1).all())


@pytest.mark.parametrize("k", [0, 49])
def test_k_out_of_range_is_refused(k):
    x, encoder, bias, _ = problem()
    with pytest.raises(UserError, match=f"k={k} must lie between 1 and features=48"):
        encode_topk(x, encoder, bias, k=k)


def test_a_smaller_k_is_a_traced_number():
    """For the batch, or one for each token; one program serves every schedule."""
    x, encoder, bias, _ = problem()
    full, _ = encode_topk(x, encoder, bias, k=8)
    traced = jax.jit(lambda keep: encode_topk(x, encoder, bias, k=8, keep=keep)[0])
    np.testing.assert_allclose(traced(jnp.int32(3))[:, :3], full[:, :3], rtol=1e-5)
    assert jnp.isneginf(traced(jnp.int32(3))[:, 3:]).all()
    each = jnp.arange(72) % 9
    assert (jnp.sum(jnp.isfinite(traced(each)), axis=1) == each).all()


def test_leading_axes_are_kept():
    x, encoder, bias, decoder = problem()
    flat = encode_topk(x, encoder, bias, k=4)
    values, indices = encode_topk(x.reshape(6, 12, 20), encoder, bias, k=4)
    assert values.shape == indices.shape == (6, 12, 4)
    np.testing.assert_array_equal(values.reshape(72, 4), flat[0])
    y = sparse_decode(values, indices, decoder)
    np.testing.assert_array_equal(y.reshape(72, 12), sparse_decode(*flat, decoder))
    outer = sparse_outer(values, indices, y, 48)
    np.testing.assert_allclose(outer, sparse_outer(*flat, y.reshape(72, 12), 48), rtol=1e-6)
    assert sampled_dot(y, decoder, indices).shape == (6, 12, 4)


def test_nan_reaches_the_gradient():
    """It must show: a masked NaN would train on."""
    x, encoder, bias, decoder = problem()

    def loss(encoder):
        values, indices = encode_topk(x, encoder, bias.at[5].set(jnp.nan), k=4)
        return jnp.sum(sparse_decode(values, indices, decoder) ** 2)

    assert jnp.isnan(jax.grad(loss)(encoder)[5]).all()


@pytest.mark.parametrize("name", ["pallas", "xla:interpret", "palas_tpu"])
def test_an_unknown_implementation_is_refused(name):
    x, encoder, bias, _ = problem()
    with pytest.raises(UserError, match=f"implementation='{name}' is not known"):
        encode_topk(x, encoder, bias, k=4, implementation=name)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_an_implementation_of_another_platform_is_refused(name):
    x, encoder, bias, decoder = problem()
    values, indices = encode_topk(x, encoder, bias, k=4)
    with pytest.raises(UserError, match=f"implementation='{name}' cannot run gather_sum: it needs a [TG]PU"):
        sparse_decode(values, indices, decoder, implementation=name)


def test_the_choice_is_said_once(caplog):
    x, encoder, bias, _ = problem(tokens=71)
    with caplog.at_level("INFO", logger="jaxinterp.kernels"):
        encode_topk(x, encoder, bias, k=4)
        encode_topk(x + 1, encoder, bias, k=4)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["encode on cpu (tokens 71, features 48, k 4, width 20, itemsize 4): xla"]


def test_a_large_share_of_features_goes_through_matmuls():
    shape = {"tokens": 512, "width": 768}
    assert choose("outer_sum", "cpu", features=12288, k=384, **shape) == "dense"
    assert choose("outer_sum", "cpu", features=12288, k=32, **shape) == "xla"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.booleans())
def test_kth_largest_is_exact(seed, k, integers):
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 3, (6, 10)) if integers else rng.normal(size=(6, 10)) * 10.0 ** rng.integers(-20, 20)
    values = values.astype(np.float32)
    expected = np.sort(np.maximum(values, 0).ravel())[::-1][k - 1]
    assert float(kth_largest(jnp.asarray(values), k)) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70))
def test_keep_largest_keeps_the_first_of_tied_values(seed, budget):
    values = np.random.default_rng(seed).integers(-2, 4, (6, 10)).astype(np.float32)
    order = np.argsort(-np.maximum(values, 0).ravel(), kind="stable")[:budget]
    expected = np.zeros(60, np.float32)
    expected[order] = np.maximum(values, 0).ravel()[order]
    kept, smallest = keep_largest(jnp.asarray(values), budget)
    np.testing.assert_array_equal(kept, expected.reshape(6, 10))
    assert smallest == (expected[order].min() if budget <= 60 else 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 4))
def test_nan_is_the_greatest_number_for_a_threshold_too(seed, budget, count):
    """Whatever its sign bit: arithmetic of x86 sets it."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(6, 10)).astype(np.float32)
    values.ravel()[rng.choice(60, count, replace=False)] = rng.choice([np.nan, -np.nan], count)
    infinite = np.where(np.isnan(values), np.inf, values)
    kept, smallest = keep_largest(jnp.asarray(values), budget)
    expected, least = keep_largest(jnp.asarray(infinite), budget)
    np.testing.assert_array_equal(np.isnan(kept), np.isinf(expected))
    np.testing.assert_array_equal(np.where(np.isnan(kept), np.inf, kept), expected)
    assert bool(jnp.isnan(smallest)) == bool(jnp.isinf(least)) == (budget <= count)


def test_a_budget_of_nothing_keeps_nothing():
    kept, smallest = keep_largest(jnp.array([[1.0, 2.0, np.nan]]), 0)
    assert not kept.any() and jnp.isinf(smallest)


def test_zeros_of_either_sign_are_tied():
    for values in ([-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]):
        np.testing.assert_array_equal(select_topk(jnp.array([values]), k=2)[1], [[0, 1]])
    wide = jnp.full((1, 10_000), -0.0).at[0, 9_000].set(0.0)  # in two stages
    np.testing.assert_array_equal(select_topk(wide, k=2)[1], [[0, 1]])


def test_an_index_of_no_row_reads_zeros_and_writes_nothing():
    _, _, _, rows = problem()
    values, g = jnp.ones((1, 4)), jnp.ones((1, 12))
    indices = jnp.array([[-1, 48, 1000, 3]])
    np.testing.assert_array_equal(sparse_decode(values, indices, rows)[0], rows[3])
    np.testing.assert_array_equal(sampled_dot(g, rows, indices)[0, :3], 0)
    for sums in (sparse_outer(values, indices, g, 48), sum_by_feature(values, indices, 48)):
        assert (sums[3] == 1).all() and float(jnp.sum(jnp.abs(sums))) == sums[3].size


def test_passes_without_a_derivative_say_so():
    _, _, _, rows = problem()
    indices = jnp.array([[0, 1]])
    losses = {
        "sampled_dot": lambda a: sampled_dot(a * jnp.ones((1, 12)), rows, indices),
        "sparse_outer": lambda a: sparse_outer(a * jnp.ones((1, 2)), indices, jnp.ones((1, 12)), 48),
        "sum_by_feature": lambda a: sum_by_feature(a * jnp.ones((1, 2)), indices, 48),
    }
    for name, loss in losses.items():
        with pytest.raises(UserError, match=f"{name} has no derivative"):
            jax.grad(lambda a, loss=loss: jnp.sum(loss(a)))(1.0)


def test_narrow_rows_are_told_to_the_table():
    """In bfloat16 the fused encoder has room for rows that are too wide in float32."""
    shape = {"tokens": 8192, "features": 24576, "k": 32, "width": 12288}
    assert choose("encode", "tpu", **shape, itemsize=2) == "pallas_tpu"
    assert choose("encode", "tpu", **shape, itemsize=4) == "xla"
