"""The toy residual MLP: its equation, what its matrices read, and what a part of it is held against."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.factor_toy_parameters import Config, measured
from jaxinterp.evaluation.planted.residual_mlp import (
    IN,
    OUT,
    ResidualMLP,
    draw_signed,
    mechanisms,
    train_residual_mlp,
    wanted,
)
from jaxinterp.methods.factor.parameters import Parts, mean_max_cosine


def random(seed=0):
    draw = np.random.default_rng(seed)
    embed = draw.normal(size=(5, 9))
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    arrays = embed, draw.normal(size=(9, 3)), draw.normal(size=(3, 9))
    return ResidualMLP(*(jnp.asarray(each, jnp.float32) for each in arrays)), arrays


def test_its_equation_and_what_its_matrices_read():
    """Broken: the output read without the stream, or a matrix applied to what the other reads."""
    model, (embed, up, down) = random()
    x = np.random.default_rng(1).normal(size=(7, 5))
    stream = x @ embed
    hidden = np.maximum(stream @ up, 0)
    np.testing.assert_allclose(model(jnp.asarray(x, jnp.float32)), (stream + hidden @ down) @ embed.T, atol=1e-5)
    assert np.abs(np.asarray(model(jnp.asarray(x, jnp.float32))) - hidden @ down @ embed.T).max() > 0.1
    reads = model.reads(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(reads[IN], stream, atol=1e-5)
    np.testing.assert_allclose(reads[OUT], hidden, atol=1e-5)
    seen = {}

    def apply(name, given):
        seen[name] = given
        return given @ model.weights()[name]

    np.testing.assert_array_equal(model(jnp.asarray(x, jnp.float32), apply), model(jnp.asarray(x, jnp.float32)))
    np.testing.assert_array_equal(seen[OUT], reads[OUT])


def test_parts_that_are_the_mechanisms_match_them():
    """Part j reads feature j alone (pseudo-inverse of E) and writes its row of E W_in; broken: without E."""
    model, (embed, up, _) = random()
    parts = Parts(jnp.asarray(np.linalg.pinv(embed).T, jnp.float32), jnp.asarray(embed @ up, jnp.float32))
    cosine, ratio = mean_max_cosine(*mechanisms(model, parts))
    assert float(cosine) == pytest.approx(1, abs=1e-4) and float(ratio) == pytest.approx(1, abs=1e-3)
    without_embedding = mean_max_cosine(model.weight_in, parts)
    assert float(without_embedding[0]) < 0.98


def test_samples_have_both_signs_and_the_target_is_theirs():
    x = draw_signed(jax.random.key(0), 2000, 5, 0.1)
    assert 0.4 < float(jnp.mean(x[x != 0] > 0)) < 0.6 and float(jnp.min(jnp.sum(x != 0, axis=1))) == 1
    np.testing.assert_array_equal(wanted(jnp.asarray([-2.0, 3.0])), [-2.0, 6.0])


def test_training_lowers_its_error():
    x = draw_signed(jax.random.key(5), 500, 6, 0.1)
    error = lambda model: float(jnp.mean((model(x) - wanted(x)) ** 2))
    start, end = (train_residual_mlp(jax.random.key(1), 6, 12, 6, steps=steps) for steps in (1, 800))
    assert error(end) < 0.5 * error(start)


@pytest.mark.slow
def test_an_experiment_has_a_row_for_every_seed(tmp_path):
    config = Config(out=tmp_path, steps=20, target_steps=20, seeds=2)
    for problem in ("tms-5-2", "residual"):
        rows = measured(problem, config)
        assert [row["seed"] for row in rows] == [0, 1] and all(0 <= row["mmcs"] <= 1.0001 for row in rows)
