"""Classes of gated neurons: planted Gram matrices, invariances, chance, and the layers of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.methods.factor import neuron_classes as classes
from jaxinterp.models.tiny import tiny_subject

PLANTS = {  # (cos(in, out), cos(gate, out), cos(gate, in)) for each class
    "strengthening": (0.9, 0.8, 0.85),
    "atypical strengthening": (0.7, 0.7, 0.2),
    "conditional strengthening": (0.9, 0.1, 0.1),
    "atypical conditional strengthening": (0.7, 0.45, 0.7),
    "proportional change": (0.1, -0.8, 0.1),
    "atypical proportional change": (0.4, 0.7, 0.7),
    "orthogonal output": (0.0, 0.1, 0.9),
    "weakening": (-0.9, 0.8, -0.8),
    "atypical weakening": (-0.7, -0.7, 0.2),
    "conditional weakening": (-0.8, 0.1, -0.2),
    "atypical conditional weakening": (-0.7, 0.4, -0.7),
}


def planted(seed=0, d=16):
    """One neuron of every class, with lengths of its own, in a random frame."""
    rng = np.random.default_rng(seed)
    neurons = []
    for read_write, gate_write, gate_read in PLANTS.values():
        gram = np.array([[1, gate_read, gate_write], [gate_read, 1, read_write], [gate_write, read_write, 1]])
        frame = np.linalg.qr(rng.normal(size=(d, 3)))[0]
        neurons.append(np.linalg.cholesky(gram) @ frame.T * rng.uniform(0.2, 5, size=(3, 1)))
    return classes.NeuronVectors(*(jnp.asarray(part) for part in np.stack(neurons, axis=1)))


def names(vectors):
    return [classes.NAMES[tuple(int(part) for part in row)] for row in classes.classify(classes.cosines(vectors))]


def test_planted_neurons_are_of_their_class(float64):
    assert names(planted()) == list(PLANTS)
    found = classes.classify(classes.cosines(planted()))
    assert all(int(number) == 1 for number in classes.counts(found).values()) and len(classes.NAMES) == 11
    assert [int(classes.members(found, name)[0]) for name in PLANTS] == list(range(11))


@pytest.mark.parametrize("change", ["flip", "scale", "rotate"])
def test_invariances(float64, change):
    vectors = planted()
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0])
    changed = {
        "flip": classes.NeuronVectors(vectors.gate, -vectors.read, -vectors.write),
        "scale": classes.NeuronVectors(3 * vectors.gate, 0.1 * vectors.read, 7 * vectors.write),
        "rotate": classes.NeuronVectors(*(part @ turn for part in vectors)),
    }[change]
    assert names(changed) == list(PLANTS)


@pytest.mark.parametrize("broken", ["write flipped alone", "gate and read exchanged", "write not rotated"])
def test_what_is_no_invariance_changes_classes(float64, broken):
    vectors = planted()
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0])
    changed = {
        "write flipped alone": classes.NeuronVectors(vectors.gate, vectors.read, -vectors.write),
        "gate and read exchanged": classes.NeuronVectors(vectors.read, vectors.gate, vectors.write),
        "write not rotated": classes.NeuronVectors(vectors.gate @ turn, vectors.read @ turn, vectors.write),
    }[broken]
    assert names(changed) != list(PLANTS)


def test_a_threshold_is_strict():
    edge = classes.Cosines(jnp.array([0.5, 0.75]), jnp.array([0.0, 0.0]), jnp.array([0.0, 0.0]))
    np.testing.assert_array_equal(classes.classify(edge)[:, 0], [0, 1])
    with pytest.raises(UserError, match=r"threshold=2.0 must lie between"):
        classes.classify(edge, 2.0)


def test_random_neurons_write_orthogonally_and_lie_in_the_region_of_chance():
    parts = jax.random.normal(jax.random.key(0), (3, 500, 256))
    vectors = classes.NeuronVectors(*parts)
    assert set(names(vectors)) == {"orthogonal output"}
    low, high = classes.random_region(256)
    assert high == pytest.approx(1.96 / 16, rel=0.01) and low == pytest.approx(-high)
    inside = np.abs(np.asarray(classes.cosines(vectors).read_write)) < high
    assert 0.92 < inside.mean() < 0.98
    measured = classes.mismatched_region(vectors.read, vectors.write)
    assert measured == pytest.approx((low, high), abs=0.005)
    with pytest.raises(UserError, match=r"p=0.0"):
        classes.random_region(256, 0.0)


def test_dense_neurons_have_three_classes_and_a_model_has_counts_per_layer():
    dense = classes.classify(classes.cosines(classes.NeuronVectors(None, *planted()[1:])))
    wanted = [(1 if cosine > 0.5 else -1 if cosine < -0.5 else 0, 0, 1) for cosine, _, _ in PLANTS.values()]
    np.testing.assert_array_equal(dense, wanted)
    model = tiny_subject().model
    found = classes.model_vectors(model)
    assert list(found) == [f"blocks/{i}/mlp" for i in range(len(model.blocks))]
    stacked = jnp.stack([classes.classify(classes.cosines(vectors)) for vectors in found.values()])
    total = sum(classes.counts(stacked).values())
    np.testing.assert_array_equal(total, [model.blocks[0].mlp.down_proj.weight.shape[0]] * len(model.blocks))


def test_the_scale_of_the_norm_is_taken_into_the_read_vectors():
    rng = np.random.default_rng(0)
    gate, up, down = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 4), (6, 4), (4, 6)))
    scale = jnp.asarray(rng.uniform(0.1, 4, size=6), jnp.float32)
    vectors = classes.folded(gate, up, down, scale)
    x = jnp.asarray(rng.normal(size=6), jnp.float32)
    np.testing.assert_allclose(vectors.gate @ x, (x * scale) @ gate, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vectors.read @ x, (x * scale) @ up, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="class 'strong' does not exist"):
        classes.members(jnp.zeros((1, 3), jnp.int32), "strong")
