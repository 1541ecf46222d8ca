"""Quasi-orthogonality: exact cases, ratios of random atoms, bounds with the measured coherence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.decompositions.activations import ReLU, TopK
from jaxinterp.decompositions.codes import DenseCodes
from jaxinterp.evaluation.quasi_orthogonality import (
    CODE_LENGTHS,
    afa_norm,
    code_lengths,
    code_norm,
    coherence,
    epsilon_lbo,
    norm_bounds,
    zf_points,
)
from jaxinterp.models.tiny import unit_rows
from tests.evaluation.planted_codes import exact, orthonormal, planted_pairs, planted_twelve, sparse_codes
from tests.helpers import random_dictionary


def test_orthonormal_atoms_are_exact():
    rows = jnp.eye(24)[jax.random.permutation(jax.random.key(0), 24)]
    f = sparse_codes(24, 4, 100)
    z, norm = afa_norm(f @ rows), code_norm(DenseCodes(f), rows)
    np.testing.assert_allclose(z, norm, rtol=1e-6)
    np.testing.assert_allclose(epsilon_lbo(norm, norm, 24), 0)
    np.testing.assert_allclose(epsilon_lbo(z, norm, 24), 0, atol=1e-7)
    found = coherence(rows)
    assert float(found.eps_max) == 0 and float(found.eps_mean) == 0
    turned = coherence(jnp.linalg.qr(jax.random.normal(jax.random.key(1), (24, 24)))[0])
    assert float(turned.eps_max) < 1e-6


@pytest.mark.parametrize(
    ("features", "d", "active", "mean", "spread"),
    [(48, 32, 3, 1.03, 0.11), (4096, 768, 16, 1.001, 0.023)],
)
def test_random_unit_atoms_have_codes_as_long_as_their_input(features, d, active, mean, spread):
    """Ratios measured with an independent implementation: what real dictionaries miss is not an effect of finite d."""
    rows = unit_rows(jax.random.key(0), features, d)
    f = sparse_codes(features, active, 1000)
    ratio = np.asarray(code_norm(DenseCodes(f), rows) / afa_norm(f @ rows))
    assert ratio.mean() == pytest.approx(mean, abs=0.3 * spread)
    assert ratio.std() == pytest.approx(spread, rel=0.3)


def test_correlated_atoms_are_longer_than_their_codes():
    """The control: atoms that share a direction make inputs longer than their codes."""
    shared = unit_rows(jax.random.key(0), 48, 32) + 0.7 * unit_rows(jax.random.key(1), 1, 32)
    rows = shared / jnp.linalg.norm(shared, axis=1, keepdims=True)
    f = sparse_codes(48, 3, 500)
    assert float(jnp.mean(code_norm(DenseCodes(f), rows) / afa_norm(f @ rows))) < 0.9


def test_bounds_hold_with_the_measured_coherence_and_only_just():
    rows = unit_rows(jax.random.key(0), 64, 512)
    f = sparse_codes(64, 4, 2000)
    z, norm = afa_norm(f @ rows), code_norm(DenseCodes(f), rows)
    epsilon = coherence(rows).eps_max
    low, high = norm_bounds(z, epsilon, 4)
    assert bool(((low <= norm) & (norm <= high)).all())
    lbo = epsilon_lbo(z, norm, 4)
    assert bool((lbo <= epsilon).all()), "a lower bound of what the dictionary has"
    low, high = norm_bounds(z, 0.1 * epsilon, 4)
    assert not bool(((low <= norm) & (norm <= high)).all())
    assert bool(jnp.isinf(norm_bounds(z, 0.5, 4)[1]).all())


def test_two_parallel_atoms_reach_the_lower_bound():
    """|z|^2 = |f|^2 (1 + ε (h - 1)) for equal codes of atoms at one angle."""
    angle = 0.3
    rows = jnp.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    f = jnp.ones((1, 2))
    z, norm = afa_norm(f @ rows), code_norm(DenseCodes(f), rows)
    epsilon = float(coherence(rows).eps_max)
    assert epsilon == pytest.approx(np.cos(angle), rel=1e-5)
    assert float(epsilon_lbo(z, norm, 2)[0]) == pytest.approx(epsilon, rel=1e-5)
    assert float(norm_bounds(z, epsilon, 2)[0][0]) == pytest.approx(float(norm[0]), rel=1e-5)


def test_edges_of_epsilon():
    f, z = jnp.array([0.0, 0.0, 1.0, 2.0]), jnp.array([0.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(epsilon_lbo(z, f, 5)[:3], [0, np.inf, 0])
    assert float(epsilon_lbo(z, f, 5)[3]) == pytest.approx(3 / (4 * 4))
    np.testing.assert_array_equal(epsilon_lbo(z, f, 1), [0, np.inf, 0, np.inf])


@pytest.mark.parametrize("features", [7, 300])
def test_coherence_is_that_of_the_whole_matrix(features):
    rows = 3 * jax.random.normal(jax.random.key(2), (features, 10)) + 0.5
    unit = np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    sizes = np.abs(unit @ unit.T)[~np.eye(features, dtype=bool)]
    found = coherence(rows)
    assert float(found.eps_max) == pytest.approx(sizes.max(), rel=1e-5)
    assert float(found.eps_mean) == pytest.approx(sizes.mean(), rel=1e-5)


@pytest.mark.parametrize("activation", [TopK(4), ReLU()])
def test_the_points_of_the_plot(activation):
    """Atoms of any length, sparse codes and dense."""
    dictionary = random_dictionary(activation, d_out=8, skip=False)
    x = jax.random.normal(jax.random.key(1), (5, 6, 8))
    points = zf_points(dictionary, x)
    z = (np.asarray(x) - dictionary.input_mean) / dictionary.input_scale - dictionary.decoder_bias
    lengths = np.linalg.norm(dictionary.decoder, axis=1)
    np.testing.assert_allclose(points.inputs, np.linalg.norm(z, axis=-1), rtol=1e-5)
    expected = np.linalg.norm(np.asarray(dictionary.encode(x).dense()) * lengths, axis=-1)
    np.testing.assert_allclose(points.codes, expected, rtol=1e-4)
    np.testing.assert_array_equal(points.active, dictionary.encode(x).active())
    np.testing.assert_allclose(points.ratio(), expected / np.linalg.norm(z, axis=-1), rtol=1e-4)


def test_lengths_of_orthonormal_atoms_are_exact():
    found = code_lengths(*planted_pairs(related=False), jax.random.key(0))
    assert len(found.inputs) == len(found.codes) == 400
    for name in ("|f|/|z| median", "|f|/|fD| median", "|fD|/|z| median", "|f|/|fD| shuffled"):
        assert found.numbers[name] == pytest.approx(1, abs=1e-4), name
    assert found.numbers["(h-1) eps_LBO"] == pytest.approx(0, abs=1e-3) and found.numbers["eps_max"] < 1e-3


def test_related_atoms_that_are_active_together_are_under_active_but_for_the_shuffled():
    """|z|^2 = 2 (1 + 0.8) where |f|^2 = 2."""
    found = code_lengths(*planted_pairs(related=True), jax.random.key(0)).numbers
    expected = 1 / np.sqrt(1.8)
    assert found["|f|/|z| median"] == pytest.approx(expected, rel=1e-3)
    assert found["|f|/|fD| median"] == pytest.approx(expected, rel=1e-3)
    assert found["|fD|/|z| median"] == pytest.approx(1, rel=1e-3)
    assert found["|f|/|fD| shuffled"] == pytest.approx(1, abs=1e-3)
    assert found["(h-1) eps_LBO"] == pytest.approx(0.8, rel=1e-2)
    assert found["eps_max"] == pytest.approx(0.8, abs=1e-3) and found["under-active"] == 1


def test_what_is_not_reconstructed_is_the_second_factor():
    found = code_lengths(*planted_twelve(), jax.random.key(0)).numbers
    assert found["|f|/|z| median"] < 0.8 and found["|f|/|fD| median"] == pytest.approx(1, abs=1e-4)
    assert found["|fD|/|z| median"] == pytest.approx(found["|f|/|z| median"], abs=1e-4)


def test_where_no_token_has_two_active_features_there_is_no_length():
    atoms = orthonormal()
    codes = np.zeros((50, 32), np.float32)
    codes[:, 3] = 1
    found = code_lengths(*exact(codes, atoms, 1), jax.random.key(0)).numbers
    assert all(found[name] is None for name in CODE_LENGTHS)
    assert found["no code"] == 0 and found["eps_max"] < 1e-3
