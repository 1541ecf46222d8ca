"""JumpReLU sparse autoencoder: planted recovery and what breaks it, the mesh, files, the leaf's place. Invariants 5, 7.

Reference values of an independent implementation at the planted setting (λ = 0.05 in units of squared error, ε = 0.2,
θ = 0.3 at the start, means of three seeds): mean matched cosine 0.997, 3.0 features active. Threshold: 0.97.
"""

from dataclasses import replace as change

import jax
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.methods.sparse.jumprelu import JumpReLUSparseAutoencoder
from jaxinterp.methods.sparse.transcoder import Transcoder
from jaxinterp.models.sites import replace
from jaxinterp.objectives import reconstruction, scale, total
from jaxinterp.objectives.gates import l0
from tests.methods.laboratory import (
    recovery,
    subject,
    train,
)

VARIANCE = 3.2  # of the planted samples, about: the reference's coefficient is in units of squared error
PLANTED = JumpReLUSparseAutoencoder(
    features=96, l0=0.05 / VARIANCE, threshold=0.3, bandwidth=0.2, learning_rate=5e-3, normalise=False
)
THRESHOLD = 0.97


@pytest.mark.slow
def test_the_plant_is_recovered():
    score, active, _ = recovery(PLANTED, (0, 1, 2))
    assert score > THRESHOLD
    assert 2.7 < active < 3.3


@pytest.mark.slow
def test_thresholds_that_start_too_low_are_trained_up_to_where_the_plant_is_recovered():
    """From θ = 0.3 even thresholds that are never trained recover the plant: from 0.1 they must move."""
    low = change(PLANTED, threshold=0.1)
    assert recovery(low, (0,))[0] > THRESHOLD
    never_trained = change(low, bandwidth=1e-6)
    assert recovery(never_trained, (0,))[0] < THRESHOLD - 0.2


@pytest.mark.slow
def test_a_flipped_penalty_does_not_recover_it():
    flipped = total(reconstruction(), scale(l0(), -0.05 / VARIANCE))
    assert recovery(change(PLANTED, objective=flipped), (0,), steps=1000)[0] < THRESHOLD - 0.2


@pytest.mark.slow
def test_theta_itself_with_a_target_for_l0_recovers_it_too():
    score, active, _ = recovery(change(PLANTED, parametrisation="raw", target_l0=3.0, l0=0.3), (0,), steps=2500)
    assert score > THRESHOLD and 2.7 < active < 3.3


def test_a_jumprelu_transcoder_is_an_activation_and_an_objective():
    mlp = subject().model.blocks[1].mlp

    def draw(key, size):
        x = jax.random.normal(key, (size, 64))
        return {"blocks/1/mlp/in": x, "blocks/1/mlp/out": mlp(x)}

    objective = total(reconstruction(), scale(l0(), 0.0005))
    method = Transcoder(
        features=128, activation=JumpReLU.start(128, 0.5, bandwidth=0.5), objective=objective, learning_rate=1e-2
    )
    sites = Sites("blocks/1/mlp/in", "blocks/1/mlp/out")
    learned, metrics = train(method, draw, sites, steps=500, batch_size=128, seed=0)
    assert metrics["fvu"] < 0.5
    assert float(abs(learned.activation.threshold - 0.5).max()) > 0.1
    x = draw(jax.random.key(1), 16)["blocks/1/mlp/in"]
    np.testing.assert_array_equal(replace(subject().model, {"blocks/1/mlp": learned}).blocks[1].mlp(x), learned(x))


@pytest.mark.usefixtures("without_annotations")
def test_what_cannot_be_is_refused_at_once():
    for name, value in (("threshold", 0.0), ("bandwidth", 0.0), ("target_l0", -1.0)):
        with pytest.raises(UserError, match=f"{name}={value} must be positive"):
            JumpReLUSparseAutoencoder(**{name: value})
    with pytest.raises(UserError, match=r"l0=-0\.1 must not be negative"):
        JumpReLUSparseAutoencoder(l0=-0.1)
