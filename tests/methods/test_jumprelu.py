"""JumpReLU sparse autoencoder: planted recovery and what breaks it, the mesh, files, the leaf's place. Invariants 5, 7.

Reference values of an independent implementation at the planted setting (λ = 0.05 in units of squared error, ε = 0.2,
θ = 0.3 at the start, means of three seeds): mean matched cosine 0.997, 3.0 features active. Threshold: 0.97.
"""

from dataclasses import replace as change

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinterp.data.batch import Sites
from jaxinterp.decompositions.base import StandIn
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.errors import UserError
from jaxinterp.evaluation.recovery import mcc
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods.jumprelu import JumpReLUSparseAutoencoder
from jaxinterp.methods.transcoder import Transcoder
from jaxinterp.models.load import load
from jaxinterp.models.sites import replace, run
from jaxinterp.objectives import reconstruction, scale, total
from jaxinterp.objectives.gates import l0
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from jaxinterp.trees import named_leaves
from tests.methods.laboratory import planted_dictionary, train, train_on_samples

VARIANCE = 3.2  # of the planted samples, about: the reference's coefficient is in units of squared error
PLANTED = JumpReLUSparseAutoencoder(
    features=96, l0=0.05 / VARIANCE, threshold=0.3, bandwidth=0.2, learning_rate=1e-3, normalise=False
)
THRESHOLD = 0.97
SIZES = {"site": "blocks/1/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 1}


def recovery(method, seeds):
    scores, actives = [], []
    for seed in seeds:
        rows, samples = planted_dictionary(seed)
        dictionary, metrics = train_on_samples(method, samples, seed)
        scores.append(mcc(rows, dictionary.decoder))
        actives.append(metrics["l0"])
    return np.mean(scores), np.mean(actives)


def test_the_plant_is_recovered():
    score, active = recovery(PLANTED, (0, 1, 2))
    assert score > THRESHOLD
    assert 2.7 < active < 3.3


def test_thresholds_that_start_too_low_are_trained_up_to_where_the_plant_is_recovered():
    """From θ = 0.3 even thresholds that are never trained recover the plant: from 0.1 they must move."""
    low = change(PLANTED, threshold=0.1)
    assert recovery(low, (0,))[0] > THRESHOLD
    never_trained = change(low, bandwidth=1e-6)
    assert recovery(never_trained, (0,))[0] < THRESHOLD - 0.2


def test_a_flipped_penalty_does_not_recover_it():
    assert recovery(change(PLANTED, l0=-0.05 / VARIANCE), (0,))[0] < THRESHOLD - 0.2


def test_theta_itself_with_a_target_for_l0_recovers_it_too():
    score, active = recovery(change(PLANTED, parametrisation="raw", target_l0=3.0, l0=0.3), (0,))
    assert score > THRESHOLD and 2.7 < active < 3.3


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


def test_a_mesh_changes_nothing_and_the_autoencoder_takes_its_leaf_s_place(subject, text, tmp_path):
    """Invariants 5 and 7."""
    method = JumpReLUSparseAutoencoder(features=64, learning_rate=3e-3, penalty_warmup=10, parametrisation="raw")
    one = fit(method, subject, text, **SIZES)
    many = fit(method, subject, text, **SIZES, mesh=make_mesh(2, 4))
    for name, leaf in named_leaves(one.decomposition).items():
        other = np.asarray(named_leaves(many.decomposition)[name])
        np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-5, err_msg=name)
    learned = one.decomposition
    assert float(abs(learned.activation.threshold_parameter - 1).max()) > 1e-3, "thresholds moved"
    assert many.decomposition.activation.threshold_parameter.sharding.spec == P("feature")
    assert one.history[-1]["fvu"] < 0.8 * one.history[0]["fvu"]

    again = load_dictionary(save_dictionary(learned, tmp_path / "d"), activations=[JumpReLU])
    assert jax.tree.structure(again) == jax.tree.structure(learned)
    jax.tree.map(np.testing.assert_array_equal, again, learned)
    tokens = jnp.arange(64).reshape(2, 32)
    mlp = subject.model.blocks[1].mlp
    spliced = run(replace(subject.model, {"blocks/1/mlp": StandIn(mlp, again)}), tokens)
    clean = run(subject.model, tokens)
    written = again(clean["blocks/1/mlp/out"])
    np.testing.assert_allclose(spliced["blocks/1/mlp/out"], written, rtol=1e-4, atol=1e-4)
    assert float(abs(spliced.logits - clean.logits).max()) > 1e-3
    row = score(learned, subject, text, tokens=2048, ce_tokens=1024)
    assert 0 < row["fvu"] < 1 and 0 < row["l0"] < 64 and np.isfinite(row["ce_replaced"])


def test_a_jumprelu_transcoder_is_an_activation_and_an_objective(subject):
    mlp = subject.model.blocks[1].mlp

    def draw(key, size):
        x = jax.random.normal(key, (size, 64))
        return {"blocks/1/mlp/in": x, "blocks/1/mlp/out": mlp(x)}

    objective = total(reconstruction(), scale(l0(), 0.0005))
    method = Transcoder(
        features=128, activation=JumpReLU.start(128, 0.5, bandwidth=0.5), objective=objective, learning_rate=3e-3
    )
    sites = Sites("blocks/1/mlp/in", "blocks/1/mlp/out")
    learned, metrics = train(method, draw, sites, steps=1500, batch_size=256, seed=0)
    assert metrics["fvu"] < 0.5
    assert float(abs(learned.activation.threshold - 0.5).max()) > 0.1
    x = draw(jax.random.key(1), 16)["blocks/1/mlp/in"]
    np.testing.assert_array_equal(replace(subject.model, {"blocks/1/mlp": learned}).blocks[1].mlp(x), learned(x))


def test_what_cannot_be_is_refused_at_once():
    with pytest.raises((UserError, TypeError), match="jumprelu"):
        JumpReLUSparseAutoencoder(activation="relu")
    for name, value in (("threshold", 0.0), ("bandwidth", 0.0), ("target_l0", -1.0)):
        with pytest.raises(UserError, match=f"{name.removesuffix('_l0')}={value} must be positive"):
            JumpReLUSparseAutoencoder(**{name: value})
