"""Gated sparse autoencoder: planted recovery and what breaks it, the mesh, files, the leaf's place. Invariants 5, 7.

Reference values of an independent implementation at the planted setting (λ = 0.8 in units of squared error, means of
three seeds): mean matched cosine 0.996, 3.3 features active. Threshold: 0.97.
"""

from dataclasses import replace as change

import grain
import jax
import numpy as np
import pytest

from jaxinterp.data.batch import Sites
from jaxinterp.decompositions.gates import Gated
from jaxinterp.errors import UserError
from jaxinterp.evaluation.recovery import mcc
from jaxinterp.methods.gated import GatedSparseAutoencoder
from jaxinterp.methods.transcoder import Transcoder
from jaxinterp.models.load import load
from jaxinterp.models.sites import replace
from jaxinterp.objectives import reconstruction, scale, total
from jaxinterp.objectives.gates import gate_auxiliary, gate_l1
from tests.methods.laboratory import (
    is_kept_on_disk,
    is_the_same_on_a_mesh,
    planted_dictionary,
    stands_in_and_scores,
    train,
    train_on_samples,
)

VARIANCE = 3.2  # of the planted samples, about: the reference's coefficient is in units of squared error
PLANTED = GatedSparseAutoencoder(features=96, l1=0.8 / VARIANCE, learning_rate=1e-3, normalise=False)
THRESHOLD = 0.97


def recovery(method, seeds):
    scores, actives = [], []
    for seed in seeds:
        rows, samples = planted_dictionary(seed)
        dictionary, metrics = train_on_samples(method, samples, seed)
        scores.append(mcc(rows, dictionary.decoder))
        actives.append(metrics["l0"])
    return np.mean(scores), np.mean(actives)


@pytest.mark.slow
def test_the_plant_is_recovered():
    score, active = recovery(PLANTED, (0, 1, 2))
    assert score > THRESHOLD
    assert 2.7 < active < 4.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "terms",
    [
        (scale(gate_l1(), 0.8 / VARIANCE),),  # nothing holds a gate open: all close
        (gate_auxiliary(),),  # nothing closes one
    ],
    ids=["no auxiliary loss", "no penalty"],
)
def test_a_gate_that_lacks_a_term_does_not_recover_it(terms):
    broken = change(PLANTED, objective=total(reconstruction(), *terms))
    assert recovery(broken, (0,))[0] < THRESHOLD - 0.04


@pytest.fixture(scope="module")
def subject():
    return load("tiny")


@pytest.fixture(scope="module")
def text():
    """256 windows of 32 random tokens."""
    tokens = np.random.default_rng(0).integers(0, 256, (256, 32), np.int32)
    weight = np.ones(32, np.float32)
    weight[0] = 0
    return grain.MapDataset.source(
        [{"tokens": row, "weight": weight, "document": np.full(32, i, np.int32)} for i, row in enumerate(tokens)]
    )


def test_mesh_files_and_leaf(tmp_path):
    learned = is_the_same_on_a_mesh(GatedSparseAutoencoder(features=64, learning_rate=3e-3, penalty_warmup=10))
    gated = learned.activation
    assert gated.gate_bias.any() and gated.log_scale.any() and gated.size_bias.any()
    assert not learned.encoder_bias.any(), "the paper's encoder has no bias of its own"
    is_kept_on_disk(learned, tmp_path / "d", Gated)
    stands_in_and_scores(learned)


def test_a_gated_transcoder_is_an_activation_and_an_objective(subject):
    mlp = subject.model.blocks[1].mlp

    def draw(key, size):
        x = jax.random.normal(key, (size, 64))
        return {"blocks/1/mlp/in": x, "blocks/1/mlp/out": mlp(x)}

    objective = total(reconstruction(), scale(gate_l1(), 0.002), gate_auxiliary())
    method = Transcoder(features=128, activation=Gated.start(128), objective=objective, learning_rate=3e-3)
    sites = Sites("blocks/1/mlp/in", "blocks/1/mlp/out")
    learned, metrics = train(method, draw, sites, steps=1500, batch_size=256, seed=0)
    assert metrics["fvu"] < 0.5
    assert float(abs(learned.activation.gate_bias).max()) > 0.1
    x = draw(jax.random.key(1), 16)["blocks/1/mlp/in"]
    np.testing.assert_array_equal(replace(subject.model, {"blocks/1/mlp": learned}).blocks[1].mlp(x), learned(x))


def test_another_activation_is_refused():
    with pytest.raises((UserError, TypeError), match="gated"):
        GatedSparseAutoencoder(activation="relu")
