"""Prune and grow: exact counts, a planted support recovered, and a training that ends block-sparse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.methods.block_sparse_language_model import (
    BlockSparseLanguageModel,
    cubic_sparsity,
    mlp_matrices,
    prune_and_grow,
)
from jaxinterp.models.load import Subject
from jaxinterp.models.selection import block_norms
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.fit import fit
from tests.methods.counting_text import counting_text


def planted_support(grow, steps=200):
    """Least squares towards a matrix with 4 of 16 blocks; weights begin in 4 wrong blocks and others masked."""
    rng = np.random.default_rng(0)
    truth = np.zeros((4, 4), bool)
    truth.reshape(-1)[rng.permutation(16)[:4]] = True
    spread = np.repeat(np.repeat(truth, 2, 0), 2, 1)
    target, x = jnp.asarray(rng.normal(size=(8, 8)) * spread), jnp.asarray(rng.normal(size=(64, 8)))
    mask = jnp.asarray(~spread) & (jnp.arange(8)[:, None] < 3)

    def slope(weight):
        return x.T @ (x @ (weight - target)) / 64

    weight = jnp.where(mask, 0.1, 0.0)
    for step in range(steps):
        if step % 10 == 0:
            blocks = prune_and_grow(weight, slope(weight), 0.75, grow, (2, 2))
            mask = jnp.repeat(jnp.repeat(blocks, 2, 0), 2, 1)
        weight = jnp.where(mask, weight - 0.3 * slope(weight), 0)
    return np.asarray(blocks), truth


def test_the_support_of_a_planted_matrix_is_found_by_growing():
    found, truth = planted_support(0.25)
    assert found.sum() == 4 and (found & truth).sum() >= 3  # one of four slots always explores
    stuck, truth = planted_support(0.0)
    assert (stuck & truth).sum() < 3  # broken: nothing grows


def test_counts_are_exact_and_the_ramp_is_cubic():
    rng = np.random.default_rng(0)
    weight, gradient = (jnp.asarray(rng.normal(size=(8, 8))) for _ in range(2))
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        assert int(prune_and_grow(weight, gradient, sparsity, 0.2, (2, 2)).sum()) == round(16 * (1 - sparsity))
    assert float(cubic_sparsity(50, 0.8, 100)) == pytest.approx(0.8 * (1 - 0.125))
    assert float(cubic_sparsity(500, 0.8, 100)) == pytest.approx(0.8)
    with pytest.raises(UserError, match=r"sparsity=1\.5 is a share"):
        BlockSparseLanguageModel(sparsity=1.5)


@pytest.mark.slow
def test_a_training_ends_block_sparse():
    config = TransformerConfig(16, 16, 1, 2, 2, 8, 64, context=16, rotary_dimensions=8)
    subject = Subject(initialise(config, jax.random.key(0)), None, "x")
    method = BlockSparseLanguageModel(sparsity=0.5, block=8, every=5, learning_rate=2e-2, weight_decay=0.0)
    trained = fit(method, subject, counting_text(), steps=60, batch_size=96, seed=0, log_every=20)
    shares = [float((block_norms(weight, (8, 8)) == 0).mean()) for weight in mlp_matrices(trained.decomposition)]
    np.testing.assert_allclose(shares, 0.5)
    assert trained.history[-1]["block_sparsity"] == pytest.approx(0.5)
    assert trained.history[-1]["ce"] < 0.6
