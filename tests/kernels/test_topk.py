"""The sparse core against the dense formula in float64, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinterp.errors import UserError
from jaxinterp.kernels import encode_topk, kth_largest, sparse_decode


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


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 8), (4, 2)])
def test_a_mesh_gives_the_same_indices_and_gradients(shape):
    """Invariant 5, ties included: the pre-activations are small integers."""
    mesh = jax.make_mesh(shape, ("data", "feature"), axis_types=(AxisType.Auto,) * 2)
    tied, arrays = problem(integers=True), problem()
    expected = encode_topk(*tied[:3], k=7)
    with jax.set_mesh(mesh):

        def place(arrays):
            specs = P("data"), P("feature"), P("feature"), P("feature")
            return [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]

        values, indices = jax.jit(lambda x, e, b: encode_topk(x, e, b, k=7))(*place(tied)[:3])
        gradient = jax.jit(jax.grad(sparse_loss, (0, 1, 2, 3)), static_argnums=4)
        gradients = gradient(*place(arrays), 5)
        text = gradient.lower(*place(arrays), 5).compile().as_text()
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(indices, expected[1])
    check_gradients(gradients, arrays, 5)
    assert "f32[72,48]" not in text, "an array of tokens x features stands in the program"


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


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.booleans())
def test_kth_largest_is_exact(seed, k, integers):
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 3, (6, 10)) if integers else rng.normal(size=(6, 10)) * 10.0 ** rng.integers(-20, 20)
    values = values.astype(np.float32)
    expected = np.sort(np.maximum(values, 0).ravel())[::-1][k - 1]
    assert float(kth_largest(jnp.asarray(values), k)) == expected
