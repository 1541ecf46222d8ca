"""Node and edge ablation in a basis, against loops written out and a plant whose edges are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.factor_modular import all_pairs, bases, needed, train
from jaxinterp.methods.factor.interaction_ablation import least, strongest, with_edges, with_nodes
from jaxinterp.methods.factor.interaction_basis import Basis, edges


def coordinates(d):
    return Basis(np.eye(d), np.eye(d), np.ones(d))


def rotated(seed, d):
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    sizes = np.linspace(0.5, 2, d)
    return Basis(rotation * sizes, (rotation / sizes).T, np.ones(d))


def test_edges_are_those_of_a_loop(float64):
    """Output direction i of the next basis, computed from the directions that its edges keep, one by one."""
    weight = jax.random.normal(jax.random.key(0), (5, 4))
    function = lambda x: jax.nn.relu(x @ weight)
    x = jax.random.normal(jax.random.key(1), (7, 5))
    basis, following = rotated(0, 5), rotated(1, 4)
    keep = np.random.default_rng(2).random((4, 5)) < 0.5
    wanted = np.zeros((7, 4))
    for token in range(7):
        out = np.zeros(4)
        for i in range(4):
            inner = (np.asarray(x[token]) @ basis.into * keep[i]) @ basis.out_of
            out[i] = np.maximum(inner @ np.asarray(weight), 0) @ following.into[:, i]
        wanted[token] = out @ following.out_of
    np.testing.assert_allclose(with_edges(function, x, basis, following, keep), wanted, atol=1e-12)
    everything = np.ones((4, 5), bool)
    np.testing.assert_allclose(with_edges(function, x, basis, following, everything), function(x), atol=1e-12)
    assert float(np.abs(wanted - np.asarray(function(x))).max()) > 0.1
    transposed = with_edges(function, x, basis, following, np.pad(keep.T[:4], ((0, 0), (0, 1))))
    assert float(np.abs(np.asarray(transposed) - wanted).max()) > 0.1, "edges are [output, input]"


def test_nodes_are_the_first_directions(float64):
    x = jax.random.normal(jax.random.key(1), (7, 5))
    basis = rotated(0, 5)
    kept = with_nodes(x, basis, jnp.asarray([1.0, 1, 1, 0, 0]))
    np.testing.assert_allclose(kept, np.asarray(x) @ basis.into[:, :3] @ basis.out_of[:3], atol=1e-12)


def test_a_plant_needs_exactly_its_edges():
    """Three blocks of 2 x 2: 12 edges of 36 in the coordinates that show them, more in a rotated basis."""
    weight = jnp.asarray(np.kron(np.eye(3), [[1.0, 0.7], [-0.6, 1.2]]))
    function = lambda x: jax.nn.relu(x @ weight)
    x = jax.random.normal(jax.random.key(0), (200, 6))
    clean = function(x)

    def count(basis):
        strength = edges(function, x, basis, coordinates(6))
        enough = lambda m: bool(
            jnp.mean((with_edges(function, x, basis, None, strongest(strength, m)) - clean) ** 2) < 1e-9
        )
        return least(36, enough)

    assert count(coordinates(6)) == 12 and count(rotated(3, 6)) > 24


def test_the_least_number_is_found():
    for wanted in (0, 1, 7, 20):
        assert least(20, lambda m, wanted=wanted: m >= wanted) == wanted
    assert least(20, lambda m: False) is None
    keep = strongest(np.asarray([[3.0, 1.0], [2.0, 5.0]]), 2)
    np.testing.assert_array_equal(keep, [[True, False], [False, True]])


@pytest.mark.slow
def test_modular_addition_needs_no_more_nodes_than_in_pca():
    network, accuracy = jax.jit(lambda key: train(key, 13, 16, 48, 1500, 0.3))(jax.random.key(0))
    e = network.embedded(all_pairs(13))
    assert float(accuracy) > 0.99
    found = {name: needed(network, e, basis) for name, basis in bases(network, e).items()}
    assert found["interaction"]["nodes hidden"] <= found["pca"]["nodes hidden"] + 1
    assert found["interaction"]["edges e to hidden"] is not None
