"""Bilinear spectra: identities in float64, against the tensor that is built element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.methods.factor import bilinear as b


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def layer(seed=0, d=7, hidden=11, d_out=5):
    draw = np.random.default_rng(seed)
    return tuple(jnp.asarray(draw.normal(size=shape)) for shape in ((d, hidden), (d, hidden), (hidden, d_out)))


def brute(left, right, down):
    """B[o, i, j], element by element, symmetrised."""
    left, right, down = map(np.asarray, (left, right, down))
    tensor = sum(np.einsum("o,i,j->oij", down[h], left[:, h], right[:, h]) for h in range(left.shape[1]))
    return (tensor + tensor.transpose(0, 2, 1)) / 2


def test_the_layer_is_a_quadratic_form_and_a_sum_of_eigen_terms():
    weights, draw = layer(), np.random.default_rng(1)
    x, u = jnp.asarray(draw.normal(size=(9, 7))), jnp.asarray(draw.normal(size=5))
    wanted = b.bilinear(x, *weights) @ u
    matrix = b.interaction_matrix(*weights, u)
    np.testing.assert_allclose(jnp.einsum("ni,ij,nj->n", x, matrix, x), wanted, rtol=0, atol=1e-12)
    found = b.spectrum(matrix)
    np.testing.assert_allclose(b.eigen_terms(x, found).sum(-1), wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(7), atol=1e-12)
    assert np.all(np.diff(np.abs(found.values)) <= 0)
    np.testing.assert_allclose(b.interaction_tensor(*weights), brute(*weights), atol=1e-12)
    np.testing.assert_allclose(matrix, np.einsum("oij,o->ij", brute(*weights), u), atol=1e-12)
    # Broken variants: eigenvectors in columns, and the matrix of one half only, which has other eigenvalues.
    assert np.abs(b.eigen_terms(x, found._replace(vectors=found.vectors.T)).sum(-1) - wanted).max() > 0.1
    half = (weights[0] * (weights[2] @ u)) @ weights[1].T
    assert np.abs(np.linalg.eigvalsh(half) - np.linalg.eigvalsh(matrix)).max() > 0.1


def test_only_the_symmetric_part_acts():
    left, right, down = layer()
    u = jnp.arange(5.0) - 2
    matrix = b.interaction_matrix(left, right, down, u)
    np.testing.assert_allclose(b.interaction_matrix(right, left, down, u), matrix, atol=1e-12)
    np.testing.assert_allclose(b.interaction_matrix(3 * left, right / 3, down, u), matrix, atol=1e-12)
    assert np.abs(b.interaction_matrix(3 * left, right, down, u) - matrix).max() > 0.1


def test_and_and_xor():
    one, zero = jnp.ones(1), jnp.zeros(1)
    left, right, down = jnp.stack([one, zero]), jnp.stack([zero, one]), jnp.ones((1, 1))
    matrix = b.interaction_matrix(left, right, down, jnp.ones(1))
    np.testing.assert_allclose(matrix, [[0, 0.5], [0.5, 0]])
    np.testing.assert_allclose(np.sort(b.spectrum(matrix).values), [-0.5, 0.5])
    difference = jnp.stack([one, -one])  # (x - y)^2 = XOR of two bits
    matrix = b.interaction_matrix(difference, difference, down, jnp.ones(1))
    np.testing.assert_allclose(matrix, [[1, -1], [-1, 1]])
    np.testing.assert_allclose(b.spectrum(matrix).values, [2, 0], atol=1e-12)


def test_the_higher_order_svd_is_that_of_the_unfolded_tensor():
    weights = layer()
    unfolded = brute(*weights).reshape(5, -1)
    np.testing.assert_allclose(b.output_gram(*weights), unfolded @ unfolded.T, rtol=1e-12)
    found = b.higher_order_svd(*weights, rank=5)
    np.testing.assert_allclose(found.sizes, np.linalg.svd(unfolded, compute_uv=False), rtol=1e-10)
    np.testing.assert_allclose(
        np.einsum("ro,r,rij->oij", found.directions, found.sizes, found.matrices), brute(*weights), atol=1e-12
    )
    np.testing.assert_allclose(np.einsum("rij,sij->rs", found.matrices, found.matrices), np.eye(5), atol=1e-10)
    np.testing.assert_allclose(found.matrices, found.matrices.transpose(0, 2, 1), atol=1e-14)
    # Broken variant: the Gram matrix without the crossed term is that of another tensor.
    left, right, down = weights
    crossless = down.T @ ((left.T @ left) * (right.T @ right)) @ down
    assert np.abs(crossless - unfolded @ unfolded.T).max() > 0.1


def test_inner_products_of_layers_are_those_of_their_tensors():
    first, second = layer(0), layer(1, hidden=4)
    np.testing.assert_allclose(b.inner_product(first, second), np.sum(brute(*first) * brute(*second)), rtol=1e-12)


def test_truncation_keeps_the_largest_eigenvalues():
    matrix = b.interaction_matrix(*layer(), jnp.ones(5))
    found = b.spectrum(matrix)
    np.testing.assert_allclose(b.truncated(found, 7), matrix, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(b.truncated(found, 2) - matrix), np.linalg.norm(found.values[2:]), rtol=1e-10
    )


def test_effective_rank():
    np.testing.assert_allclose(b.effective_rank(jnp.array([1.0, -1, 1, -1])), 4)
    np.testing.assert_allclose(b.effective_rank(jnp.array([[0.0, 5, 0], [3, 4, 0]])), [1, 49 / 25])


def test_biases_are_a_row_of_the_matrix():
    left, right, down = layer()
    draw = np.random.default_rng(2)
    x, c, e = (jnp.asarray(draw.normal(size=shape)) for shape in ((3, 7), (11,), (11,)))
    wanted = ((x @ left + c) * (x @ right + e)) @ down
    one = jnp.concatenate([x, jnp.ones((3, 1))], axis=1)
    np.testing.assert_allclose(
        b.bilinear(one, b.with_bias(left, c), b.with_bias(right, e), down), wanted, rtol=0, atol=1e-11
    )


def test_features_interact_through_their_write_vectors():
    weights, draw = layer(), np.random.default_rng(3)
    rows, codes = jnp.asarray(draw.normal(size=(12, 7))), jnp.asarray(draw.normal(size=12))
    matrix = b.interaction_matrix(*weights, jnp.ones(5))
    between = b.between_features(matrix, rows)
    np.testing.assert_allclose(codes @ between @ codes, b.bilinear(codes @ rows, *weights).sum(), rtol=1e-10)


def test_an_adversarial_direction_moves_its_output_and_not_what_it_avoids():
    draw = np.random.default_rng(4)
    x, v, avoid = (jnp.asarray(draw.normal(size=shape)) for shape in ((2, 7), (7,), (3, 7)))
    mask = jnp.asarray([1.0, 1, 1, 0, 0, 0, 0])
    moved = b.adversarial_input(x, v, 2.0, against=avoid) - x
    np.testing.assert_allclose(moved @ avoid.T, 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 2)
    assert np.all((b.adversarial_input(x, v, 2.0, mask=mask) - x)[:, 3:] == 0)
