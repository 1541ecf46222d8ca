"""Gated sparse autoencoder: planted recovery and what breaks it, the mesh, files, the leaf's place. Invariants 5, 7.

Reference values of an independent implementation at the planted setting (λ = 0.8 in units of squared error, means of
three seeds): mean matched cosine 0.996, 3.3 features active. Threshold: 0.97.
"""

from dataclasses import replace as change

import jax
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.gates import Gated
from jaxinterp.methods.sparse.gated import GatedSparseAutoencoder
from jaxinterp.methods.sparse.transcoder import Transcoder
from jaxinterp.models.sites import replace
from jaxinterp.objectives import reconstruction, scale, total
from jaxinterp.objectives.gates import gate_auxiliary, gate_l1
from tests.methods.laboratory import (
    recovery,
    subject,
    train,
)

VARIANCE = 3.2  # of the planted samples, about: the reference's coefficient is in units of squared error
PLANTED = GatedSparseAutoencoder(features=96, l1=0.8 / VARIANCE, learning_rate=5e-3, normalise=False)
THRESHOLD = 0.97


@pytest.mark.slow
def test_the_plant_is_recovered():
    score, active, _ = recovery(PLANTED, (0, 1, 2))
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
    assert recovery(broken, (0,), steps=1000)[0] < THRESHOLD - 0.04


def test_a_gated_transcoder_is_an_activation_and_an_objective():
    mlp = subject().model.blocks[1].mlp

    def draw(key, size):
        x = jax.random.normal(key, (size, 64))
        return {"blocks/1/mlp/in": x, "blocks/1/mlp/out": mlp(x)}

    objective = total(reconstruction(), scale(gate_l1(), 0.002), gate_auxiliary())
    method = Transcoder(features=128, activation=Gated.start(128), objective=objective, learning_rate=1e-2)
    sites = Sites("blocks/1/mlp/in", "blocks/1/mlp/out")
    learned, metrics = train(method, draw, sites, steps=500, batch_size=128, seed=0)
    assert metrics["fvu"] < 0.5
    assert float(abs(learned.activation.gate_bias).max()) > 0.1
    x = draw(jax.random.key(1), 16)["blocks/1/mlp/in"]
    np.testing.assert_array_equal(replace(subject().model, {"blocks/1/mlp": learned}).blocks[1].mlp(x), learned(x))
