"""Training towards sparsity: the printed values of schedules and penalties, and a run that gets sparser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.methods.sparse_language_model import SparseLanguageModel, density_penalty, staged
from jaxinterp.models.leave_out import FATReLU
from jaxinterp.models.load import Subject
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.fit import fit
from tests.methods.counting_text import counting_text

SEVEN_B = ((5e-3, 6000), (5e-2, 10000), (5e-2, 12000), (2e-1, 16000), (2e-1, 16500))


def test_prosparse_has_the_printed_values():
    weight = jax.jit(staged(5000, SEVEN_B))
    for step, value in ((4999, 0), (5500, 0.005), (8000, 0.0275), (10000, 0.05), (11000, 0.05), (14000, 0.125)):
        assert float(weight(step)) == pytest.approx(value, abs=1e-6)
    assert float(weight(16000)) == float(weight(99999)) == pytest.approx(0.2)
    steps = np.asarray(jax.vmap(weight)(jnp.arange(5000, 16600, 5)))
    assert (np.diff(steps) >= -1e-7).all()
    joint = np.diff(steps)[(9900 - 5000) // 5 : (10100 - 5000) // 5]
    assert np.abs(np.diff(joint)).max() < 2e-6  # no kink at a joint
    assert float(weight(7000)) != pytest.approx(0.005 + 0.045 / 4, rel=1e-2)  # broken: a straight line
    with pytest.raises(UserError, match="must hold rising steps"):
        staged(10, ((0.1, 5),))


def test_deft_has_the_printed_values():
    a = jnp.asarray([0.0, 0.0, 0.5, -2.0, 1e-4, 1e-3])
    np.testing.assert_allclose(density_penalty(a), [0, 0, 1, 1, 0.0909, 0.9091], atol=1e-4)
    assert float(density_penalty(a.astype(jnp.bfloat16))[4]) == pytest.approx(0.0909, abs=2e-3)
    gradient = jax.grad(lambda a: density_penalty(a).sum())(jnp.asarray([1.0, 3e-4]))
    assert gradient[0] < 1e-6 and gradient[1] > 1e3  # no slope far above the knee
    scaled = jax.grad(lambda a: density_penalty(a, 0.1, relative=True).sum())(jnp.asarray([1.0, 0.3]))
    assert float(scaled[1]) > 0.5
    linear = jnp.abs(a) / (jnp.abs(a) + 1e-7)  # broken: not squared
    assert float(linear[4]) > 0.9


def test_fatrelu_keeps_what_equals_the_threshold():
    x = jnp.asarray([[-1.0, 0.005, 0.01, 2.0]])
    np.testing.assert_allclose(FATReLU(0.01)(x), [[0, 0, 0.01, 2.0]])


@pytest.fixture(scope="module")
def text():
    return counting_text()


def test_a_penalty_makes_activations_sparser_at_about_the_same_loss(text):
    config = TransformerConfig(16, 16, 1, 2, 2, 8, 64, context=16, activation="silu", rotary_dimensions=8)
    subject = Subject(initialise(config, jax.random.key(0)), None, "x")

    def trained(**fields):
        method = SparseLanguageModel(activation="relu", learning_rate=2e-2, **fields)
        return fit(method, subject, text, steps=60, batch_size=96, seed=0, log_every=20)

    plain, sparse = trained(weight=0.0), trained(start=10, stages=((0.0, 15), (0.02, 40), (0.02, 60)))
    assert plain.decomposition.config.activation == "relu"
    before, after = plain.history[-1], sparse.history[-1]
    assert before["ce"] < 0.5 and after["ce"] < before["ce"] + 0.3
    assert after["density"] < 0.6 * before["density"]
    assert after["weight"] == pytest.approx(0.02)
    assert before["weight"] == 0.0  # broken: without a weight nothing changes
