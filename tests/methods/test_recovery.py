"""Planted ground truth, means over three seeds.

48 unit rows in 32 dimensions, 3 active, 96 learned rows, 6000 steps of 256. Thresholds: reference values measured with
an independent implementation, less a margin.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.data.batch import Sites
from jaxinterp.evaluation.recovery import cosines, frr, match, mcc
from jaxinterp.methods import SkipTranscoder, SparseAutoencoder, Transcoder
from jaxinterp.models.tiny import planted_mlp, unit_rows
from tests.methods.laboratory import planted_dictionary, train, train_on_samples

SEEDS = (0, 1, 2)
TOPK = SparseAutoencoder(features=96, k=3, learning_rate=3e-3, auxk=0.0)
VARIANCE = 3.2  # of the planted samples: the reference's L1 coefficient, 0.2, is in units of squared error


def recovery(method):
    scores, fvus = [], []
    for seed in SEEDS:
        rows, samples = planted_dictionary(seed)
        dictionary, metrics = train_on_samples(method, samples, seed)
        scores.append(mcc(rows, dictionary.decoder))
        fvus.append(metrics["fvu"])
    return np.mean(scores), np.mean(fvus)


@pytest.fixture(scope="module")
def topk():
    return recovery(TOPK)


@pytest.mark.slow
def test_topk_recovers_the_plant(topk):
    assert topk[0] >= 0.99


@pytest.mark.slow
def test_relu_with_l1_recovers_the_plant():
    method = SparseAutoencoder(
        features=96, activation="relu", l1=0.2 / VARIANCE, learning_rate=1e-3, auxk=0.0, normalise=False
    )
    assert recovery(method)[0] >= 0.97


@pytest.mark.slow
def test_batch_topk_recovers_the_plant_and_its_threshold_stands_in_for_the_batch():
    method = SparseAutoencoder(features=96, k=3, activation="batch_topk", learning_rate=3e-3, auxk=0.0)
    assert recovery(method)[0] >= 0.94
    _, samples = planted_dictionary(0)
    dictionary, _ = train_on_samples(method, samples, 0)
    assert 2.7 < float(dictionary.encode(samples[:4096]).active().mean()) < 3.3


@pytest.mark.slow
def test_a_k_three_times_too_large_is_a_worse_dictionary_with_no_worse_loss(topk):
    """The negative control: recovery is judged by MCC, never by the loss."""
    score, fvu = recovery(SparseAutoencoder(features=96, k=9, learning_rate=3e-3, auxk=0.0))
    assert score < 0.93
    assert fvu <= topk[1] * 1.02


def test_a_random_dictionary_is_the_floor():
    rows, _ = planted_dictionary(0)
    assert 0.35 < mcc(rows, unit_rows(jax.random.key(9), 96, 32)) < 0.5


def planted_transcoder_data(seed, linear=None):
    mlp = planted_mlp(jax.random.key(seed), 48, 32, 32)

    def draw(key, size):
        x = jax.random.normal(key, (size, 32))
        y = mlp(x)
        return {"m/in": x, "m/out": y if linear is None else y + x @ linear}

    return mlp, draw


@pytest.mark.slow
def test_a_transcoder_finds_both_sides_of_a_planted_mlp():
    decoder_scores, encoder_scores = [], []
    for seed in SEEDS:
        mlp, draw = planted_transcoder_data(seed)
        method = Transcoder(features=96, activation="relu", l1=0.004, learning_rate=3e-3, normalise=False, auxk=0.0)
        learned, metrics = train(method, draw, Sites("m/in", "m/out"), steps=8000, batch_size=512, seed=seed)
        pairs = match(mlp.down.weight, learned.decoder)
        decoder_scores.append(pairs.cosine.mean())
        read = cosines(mlp.up.weight.T, learned.encoder)
        encoder_scores.append(read[pairs.planted, pairs.learned].mean())  # under the decoder's matching
        assert metrics["fvu"] < 0.01
    assert np.mean(decoder_scores) >= 0.95
    assert np.mean(encoder_scores) >= 0.98


@pytest.mark.slow
def test_the_skip_path_takes_the_linear_part():
    low_rank = unit_rows(jax.random.key(7), 32, 4) @ unit_rows(jax.random.key(8), 4, 32)
    mlp, draw = planted_transcoder_data(0, linear=low_rank)
    method = SkipTranscoder(features=96, activation="relu", l1=0.004, learning_rate=3e-3, normalise=False, auxk=0.0)
    learned, _ = train(method, draw, Sites("m/in", "m/out"), steps=8000, batch_size=512, seed=0)
    assert float(jnp.linalg.norm(learned.skip - low_rank) / jnp.linalg.norm(low_rank)) < 0.05
    assert mcc(mlp.down.weight, learned.decoder) > 0.95


def test_matching_undoes_a_permutation_and_sees_a_flipped_sign():
    rows = np.asarray(unit_rows(jax.random.key(0), 20, 12))
    order = np.random.default_rng(0).permutation(20)
    pairs = match(rows, 3 * rows[order])
    np.testing.assert_array_equal(order[pairs.learned], pairs.planted)
    assert mcc(rows, rows[order]) == pytest.approx(1) and frr(rows, rows) == 1
    flipped = rows.copy()
    flipped[0] *= -1
    assert mcc(rows, flipped) < 0.99
