"""Experts off and on: the two meanings of off differ, and each is what it says."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.experts import switch_experts
from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import Linear
from jaxinterp.models.mixtures.config import MixtureConfig
from jaxinterp.models.run import run
from jaxinterp.models.transformer import initialise
from tests.causal.toys import SMALL

LEAF = "blocks/0/mlp"
LOGITS = np.log([0.01, 0.372, 0.156, 0.02, 0.03, 0.472, 0.001, 0.9])


@pytest.fixture(scope="module")
def model():
    """Eight experts, three chosen: 7, 5, 1 with these logits."""
    config = dataclasses.replace(SMALL, mixture=MixtureConfig("moe_x", experts=8, hidden=4, active=3))
    model = initialise(config, jax.random.key(0))
    router = Linear(jnp.zeros((16, 8)), jnp.asarray(LOGITS, jnp.float32))
    return eqx.tree_at(lambda m: m.blocks[0].mlp.router, model, router, is_leaf=lambda x: x is None)


def chosen(model):
    trace = run(model, jnp.asarray([[1, 2]]))
    return trace[f"{LEAF}/experts/index"][0, 0], trace[f"{LEAF}/experts/weight"][0, 0], trace[f"{LEAF}/out"]


def test_renormalising_and_replacing_are_different_interventions(model):
    index, weight, out = chosen(switch_experts(model, LEAF, off=(7,)))
    assert index.tolist() == [7, 5, 1]
    np.testing.assert_allclose(weight, [0, 0.559, 0.441], atol=5e-4)
    index, weight, other = chosen(switch_experts(model, LEAF, off=(7,), mode="replace"))
    assert index.tolist() == [5, 1, 2]
    np.testing.assert_allclose(weight, [0.472, 0.372, 0.156], atol=5e-4)
    assert float(jnp.abs(out - other).max()) > 1e-4
    same = chosen(switch_experts(model, LEAF))
    for one, own in zip(same, chosen(model), strict=True):
        np.testing.assert_array_equal(one, own)


def test_what_is_written_is_the_sum_over_the_experts_that_are_left(model):
    mixture, x = model.blocks[0].mlp, run(model, jnp.asarray([[1, 2]]))[f"{LEAF}/in"][0, 0]
    part = lambda m: jnp.maximum(x @ mixture.up[m], 0) @ mixture.down[m]
    _, _, out = chosen(switch_experts(model, LEAF, off=(7,)))
    by_hand = (0.472 * part(5) + 0.372 * part(1)) / 0.844
    np.testing.assert_allclose(out[0, 0], by_hand, atol=1e-5)
    _, _, nothing = chosen(switch_experts(model, LEAF, off=(7, 5, 1)))
    assert not nothing.any()


def test_an_expert_that_is_on_is_chosen_first(model):
    index, weight, _ = chosen(switch_experts(model, LEAF, on=(6,), off=(5,), mode="replace"))
    assert index.tolist() == [6, 7, 1]
    np.testing.assert_allclose(weight[0] / weight[1], np.e, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"off": (8,)}, "expert 8 does not exist"),
        ({"off": (1,), "on": (1,)}, "expert 1 is both off and on"),
        ({"off": (0, 1, 2, 3, 4, 5), "mode": "replace"}, "fewer than k=3"),
        ({"mode": "replac"}, "Did you mean 'replace'"),
    ],
)
def test_bad_switches_are_refused(model, change, words):
    with pytest.raises(UserError, match=words):
        switch_experts(model, LEAF, **change)


def test_a_dense_mlp_has_no_experts():
    with pytest.raises(UserError, match="is a MLP: experts are switched"):
        switch_experts(initialise(SMALL, jax.random.key(0)), LEAF, off=(0,))
