"""Solved methods against NumPy in float64: batches with weights, then the solution, wherever the stream is cut."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import as_needs
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.methods.recipes import one_pass
from jaxinterp.methods.solved.exact_transcoder import ExactTranscoder
from jaxinterp.methods.solved.linear_map import LinearMapMethod
from jaxinterp.methods.solved.moments import least_squares
from jaxinterp.methods.solved.neurons import NeuronsMethod
from jaxinterp.methods.solved.principal_components import PrincipalComponentsMethod
from jaxinterp.methods.solved.random_features import RandomFeatures, outer_of_codes
from tests.goldens.trainings import subject

LEAF, TOKENS, CUT = "blocks/1/mlp", 96, 40
RNG = np.random.default_rng(0)


def rows(width_in, width_out):
    x = RNG.normal(size=(TOKENS, width_in)) + 1
    y = np.tanh(x @ RNG.normal(size=(width_in, width_out)) / 4) + 0.3 * RNG.normal(size=(TOKENS, width_out)) + 2
    return x, y, (RNG.random(TOKENS) > 0.3).astype(np.float64)


def found(method, x, y, weight, cuts=(CUT,)):
    """The decomposition, of batches that are cut there."""
    sites, recipe = as_needs(method.needs(LEAF)).sites, one_pass(method, 1)
    arrays = {sites.reads: x, sites.writes: y}
    state = None
    for begin, end in zip((0, *cuts), (*cuts, len(x)), strict=True):
        part = {name: array[begin:end] for name, array in arrays.items()}
        batch = make_batch({n: np.float32(a) for n, a in part.items()}, weight[begin:end], sites)
        if state is None:
            state = recipe.init(jax.random.key(0), batch, subject().model)
        state, _ = recipe.step(state, batch, jax.random.key(1), subject().model)
    return recipe.finish(state)


def centred(x, weight):
    return x - (weight @ x) / weight.sum()


def test_the_linear_map():
    x, y, w = rows(6, 5)
    got = found(LinearMapMethod(ridge=1e-4), x, y, w)
    a, b = np.sqrt(w)[:, None] * centred(x, w), np.sqrt(w)[:, None] * centred(y, w)
    gram = a.T @ a / w.sum()
    ridge = np.sqrt(1e-4 * np.trace(gram) / 6 * w.sum())
    wanted = np.linalg.lstsq(np.r_[a, ridge * np.eye(6)], np.r_[b, np.zeros((6, 5))], rcond=None)[0]
    np.testing.assert_allclose(got.matrix, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.target_mean, (w @ y) / w.sum(), rtol=1e-5)
    unweighted = found(LinearMapMethod(), x, y, np.ones(TOKENS))  # broken: weights are not looked at
    assert np.abs(unweighted.matrix - wanted).max() > 1e-2
    cut_elsewhere = found(LinearMapMethod(), x, y, w, (10, 11, 80))
    np.testing.assert_allclose(cut_elsewhere.matrix, got.matrix, rtol=1e-4, atol=1e-5)


def test_principal_components():
    _, y, w = rows(4, 6)
    got = found(PrincipalComponentsMethod(k=3), y, y, w)
    _, _, wanted = np.linalg.svd(np.sqrt(w)[:, None] * centred(y, w), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.sum(got.directions * wanted[:3], axis=1)), 1, rtol=1e-5)
    assert got.directions.shape == (3, 6) and found(PrincipalComponentsMethod(k=9), y, y, w).directions.shape == (6, 6)
    _, _, about_zero = np.linalg.svd(np.sqrt(w)[:, None] * y, full_matrices=False)  # broken: not centred
    assert np.abs(np.sum(got.directions[0] * about_zero[0])) < 0.9


def test_neurons_have_the_weighted_means():
    mlp = subject().model.blocks[1].mlp
    x, y, w = rows(mlp.down_proj.weight.shape[0], mlp.down_proj.weight.shape[1])
    got = found(NeuronsMethod(k=2), x, y, w)
    np.testing.assert_allclose(got.hidden_mean, (w @ x) / w.sum(), rtol=1e-5)
    np.testing.assert_allclose(got.target_mean, (w @ y) / w.sum(), rtol=1e-5)
    assert got.sites.reads == f"{LEAF}/in" and got.k == 2 and eqx.tree_equal(got.mlp, mlp)
    assert np.abs(got.hidden_mean - x.mean(0)).max() > 1e-2  # broken: weights are not looked at


def test_the_decoder_of_random_features_is_that_of_least_squares():
    x, y, w = rows(6, 5)
    method = RandomFeatures(features=8, k=3, ridge=1e-3)
    got = found(method, x, y, w)
    c = np.asarray(got.encode(jnp.asarray(x, jnp.float32)).dense(), np.float64)
    a, b = np.sqrt(w)[:, None] * centred(c, w), np.sqrt(w)[:, None] * centred(y, w)
    ridge = np.sqrt(1e-3 * np.trace(a.T @ a) / 8)
    wanted = np.linalg.lstsq(np.r_[a, ridge * np.eye(8)], np.r_[b, np.zeros((8, 5))], rcond=None)[0]
    np.testing.assert_allclose(got.decoder, wanted, rtol=1e-3, atol=1e-4)
    mean_c, mean_y = (w @ c) / w.sum(), (w @ y) / w.sum()
    np.testing.assert_allclose(got.decode(got.encode(jnp.asarray(x, jnp.float32)), jnp.asarray(x)),
                               mean_y + (c - mean_c) @ wanted, rtol=1e-3, atol=1e-3)  # fmt: skip
    without_bias = c @ wanted  # broken
    assert np.abs(without_bias - mean_y - (c - mean_c) @ wanted).max() > 0.1


def test_the_outer_product_of_sparse_codes_is_that_of_dense_ones():
    values = jnp.asarray(RNG.normal(size=(20, 3)), jnp.float32)
    codes = SparseCodes(values, jnp.asarray([RNG.permutation(7)[:3] for _ in range(20)]), 7)
    w = RNG.random(20).astype(np.float32)
    dense = np.asarray(codes.dense())
    outer = outer_of_codes(values * w[:, None], codes)
    np.testing.assert_allclose(outer, (w[:, None] * dense).T @ dense, rtol=1e-5, atol=1e-5)
    assert np.abs(outer - dense.T @ dense).max() > 0.1  # broken: weights are left out


def test_the_exact_transcoder_is_the_mlp_with_the_weighted_mean():
    mlp = subject().model.blocks[1].mlp
    x, _, w = rows(mlp.up_proj.weight.shape[0], 3)
    y = np.asarray(mlp(jnp.asarray(x, jnp.float32)), np.float64)
    got = found(ExactTranscoder(), x, y, w, ())
    np.testing.assert_allclose(got(jnp.asarray(x, jnp.float32)), y, atol=1e-4)
    np.testing.assert_allclose(got.target_mean, (w @ y) / w.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("field", "method"), [("ridge", LinearMapMethod), ("k", NeuronsMethod), ("k", RandomFeatures)])
def test_what_is_not_positive_is_refused(field, method):
    with pytest.raises(UserError, match=f"{field}=0"):
        method(**{field: 0.0 if field == "ridge" else 0})


def test_a_ridge_makes_a_singular_system_solvable():
    gram = np.zeros((3, 3))
    gram[0, 0] = 3
    assert np.isfinite(least_squares(gram, np.eye(3), 1e-4)).all()
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.inv(gram)  # broken: without it
