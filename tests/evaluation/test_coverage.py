"""Coverage and used neurons against closed forms and a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.evaluation.coverage import coverage, f1_of_neurons, used


def test_a_detector_covers_and_a_constant_gives_the_base_rate():
    holds = jnp.arange(100) % 4 == 0
    assert float(coverage(2.0 * holds[:, None], holds[:, None])) == pytest.approx(1)
    constant = float(coverage(jnp.ones((100, 1)), holds[:, None]))
    assert constant == pytest.approx(2 * 0.25 / 1.25)
    both = coverage(jnp.stack([2.0 * holds, jnp.ones(100)], axis=1), jnp.stack([holds, ~holds], axis=1))
    assert float(both) == pytest.approx((1 + 2 * 0.75 / 1.75) / 2), "the best neuron of each property, then the mean"


def test_f1_is_that_of_a_loop():
    a = np.asarray(jax.random.normal(jax.random.key(0), (60, 5)))
    g = np.random.default_rng(0).random((60, 3)) < 0.3
    found = f1_of_neurons(jnp.asarray(a), jnp.asarray(g), 0.2)
    for neuron in range(5):
        for one in range(3):
            fires = a[:, neuron] > 0.2 * a[:, neuron].max()
            precision, recall = (fires & g[:, one]).sum() / fires.sum(), (fires & g[:, one]).sum() / g[:, one].sum()
            wanted = 2 * precision * recall / (precision + recall) if precision + recall else 0
            assert float(found[neuron, one]) == pytest.approx(wanted, abs=1e-6)


def test_equally_active_neurons_are_counted():
    a = jnp.asarray([[1.0, -1, 1, 0], [5, 0, 0, 0], [0, 0, 0, 0], [1, 1e-3, 0, 0]])
    np.testing.assert_allclose(used(a), [3, 1, 0, 1], atol=5e-3)
