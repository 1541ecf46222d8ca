"""Weight decay lowers the rank of a bilinear layer on digits; a folder without digits is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.factor_digits import first_vectors, fooled, ranks, read_digits, train
from jaxinterp.core.errors import UserError
from jaxinterp.methods.factor.bilinear import interaction_matrix
from tests.methods.factor.small_digits import digits

SIZES = {"d": 24, "hidden": 32, "steps": 500, "batch_size": 128, "learning_rate": 5e-3}


def test_weight_decay_lowers_the_rank_and_keeps_the_accuracy():
    x, y = digits()
    layers = jax.jit(jax.vmap(lambda decay: train(jax.random.key(0), x[:1000], y[:1000], decay, 0.0, **SIZES)))(
        jnp.asarray([0.0, 1.0])
    )
    found = [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in (0, 1)]
    accuracy = [float(jnp.mean(jnp.argmax(layer(x[1000:]), axis=1) == y[1000:])) for layer in found]
    rank = [float(jnp.mean(ranks(layer))) for layer in found]
    assert min(accuracy) > 0.8 and accuracy[1] > accuracy[0] - 0.03, accuracy
    assert rank[1] < 0.75 * rank[0], rank


def test_ranks_are_those_of_the_whole_matrices_of_pixels():
    x, y = digits()
    layer = train(jax.random.key(1), x[:100], y[:100], 0.0, 0.0, **SIZES | {"steps": 1})
    for digit in (0, 7):
        inner = interaction_matrix(layer.left, layer.right, layer.down, layer.head[:, digit])
        values = np.linalg.eigvalsh(np.asarray(layer.embed @ inner @ layer.embed.T, np.float64))
        wanted = (np.abs(values).sum() / np.sqrt((values**2).sum())) ** 2
        assert float(ranks(layer)[digit]) == pytest.approx(wanted, rel=1e-3)


def test_eigenvectors_fool_the_classifier_where_random_directions_do_not():
    """At half the length of an image; and they are unit eigenvectors of the matrices of pixels."""
    x, y = digits()
    layer = jax.jit(lambda key: train(key, x[:1000], y[:1000], 0.5, 0.0, **SIZES | {"steps": 300}))(jax.random.key(0))
    inner = interaction_matrix(layer.left, layer.right, layer.down, layer.head[:, 3])
    whole, vector = layer.embed @ inner @ layer.embed.T, first_vectors(layer)[3]
    np.testing.assert_allclose(whole @ vector, (vector @ whole @ vector) * vector, atol=1e-3 * jnp.abs(whole).max())
    length = float(jnp.mean(jnp.linalg.norm(x, axis=1))) / 2
    found = fooled(layer, x[1000:], y[1000:], length, jax.random.key(7))
    assert found["eigenvector"] > found["random"] + 0.1 and found["clean"] < 0.05, found


def test_folders_without_digits_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no 0\.json"):
        read_digits(tmp_path)
    for digit in range(10):
        (tmp_path / f"{digit}.json").write_text(json.dumps({"data": [0.5] * 784 * 2}))
    images, labels = read_digits(tmp_path)
    assert images.shape == (20, 784) and sorted(labels.tolist()) == sorted([*range(10)] * 2)
    (tmp_path / "3.json").write_text(json.dumps({"data": [0.5] * 100}))
    with pytest.raises(UserError, match="holds 100 numbers"):
        read_digits(tmp_path)
