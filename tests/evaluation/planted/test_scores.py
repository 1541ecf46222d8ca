"""Scores on a plant: exact for the planted dictionary itself, NaN for a broken one; what random rows score."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.decompositions.activations import ReLU
from jaxinterp.evaluation.planted.laboratory import Plant
from jaxinterp.evaluation.planted.scores import chance_scores, planted_scores, read_cosine
from jaxinterp.methods import SparseAutoencoder

PLANT = Plant(features=12, width=16, active=2)


@pytest.fixture(scope="module")
def rows():
    """Orthonormal, so that the planted codes can be read exactly."""
    return jnp.linalg.qr(jax.random.normal(jax.random.key(0), (16, 16)))[0][:12]


@pytest.fixture(scope="module")
def samples(rows):
    return PLANT.draw(rows, jax.random.key(1), 2000)


def dictionary(samples, encoder, decoder):
    method = SparseAutoencoder(features=len(decoder), activation=ReLU(), l1=0.1, auxk=0.0, normalise=False)
    batch = make_batch({"x": samples["x"]}, jnp.ones(2000), Sites("x", "x"))
    found = method.recipe(10).init(jax.random.key(2), batch, None).decomposition
    # A threshold: rounding makes silent features no exact zeros.
    places = lambda d: (d.encoder, d.decoder, d.encoder_bias, d.decoder_bias, d.input_mean, d.output_mean)
    zeros = jnp.zeros(16)
    return eqx.tree_at(places, found, (encoder, decoder, jnp.full(len(decoder), -1e-5), zeros, zeros, zeros))


def test_samples_are_made_of_the_planted_codes(rows, samples):
    np.testing.assert_allclose(samples["x"], samples["h"] @ rows, atol=1e-5)
    assert (np.asarray(samples["h"] > 0).sum(1) == 2).all()


def test_the_planted_dictionary_has_every_score(rows, samples):
    order = jnp.array([3, 1, 0, 2, *range(4, 12)])
    score = planted_scores(dictionary(samples, rows[order], rows[order]), rows, samples)
    ones = dict.fromkeys(("mcc", "frr_8", "frr_9", "code_correlation"), 1)
    nothing = dict.fromkeys(("sign_errors", "fvu", "dead_fraction"), 0)
    assert score.numbers == pytest.approx(ones | nothing | {"l0": 2}, abs=1e-4)
    np.testing.assert_allclose(score.frequency, np.asarray(samples["h"] > 0).mean(0)[order])
    assert score.live.all() and read_cosine(rows, rows, dictionary(samples, rows, rows)) == pytest.approx(1)


def test_flipped_and_dead_features_and_codes_are_told_apart(rows, samples):
    flipped = rows.at[:3].multiply(-1)
    score = planted_scores(dictionary(samples, rows, flipped), rows, samples)
    assert score.numbers["sign_errors"] == 0.25 and score.numbers["frr_9"] == 0.75 and score.numbers["fvu"] > 0.1
    silent = dictionary(samples, rows.at[:3].set(0), rows)
    score = planted_scores(silent, rows, samples)
    assert score.numbers["mcc"] == pytest.approx(1, abs=1e-4) and score.numbers["dead_fraction"] == 0.25
    assert score.numbers["code_correlation"] == pytest.approx(0.75, abs=1e-3) and score.live.sum() == 9
    assert read_cosine(rows, rows, silent) == pytest.approx(0.75, abs=1e-4), "write vectors match, read vectors do not"


def test_a_dictionary_that_is_not_finite_has_no_score(rows, samples):
    broken = dictionary(samples, rows, rows.at[0, 0].set(jnp.nan))
    assert all(np.isnan(value) for value in planted_scores(broken, rows, samples).numbers.values())
    assert np.isnan(read_cosine(rows, rows, broken))


def test_random_rows_score_more_than_nothing():
    planted = Plant().rows(jax.random.key(0))
    found = chance_scores(planted, 96, jax.random.key(1))
    assert 0.35 < found["mcc"] < 0.5 and found["frr_9"] == 0 and 0.3 < found["stability"] < 0.6
