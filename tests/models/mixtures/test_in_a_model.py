"""Every kind of MLP in a language model: forward, sites, training with its auxiliary losses, files, placement."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import Sites
from jaxinterp.core.trees import named_leaves
from jaxinterp.methods.mixture_language_model import MixtureLanguageModel, set_training
from jaxinterp.models.files.subject import Subject, save_subject
from jaxinterp.models.layers import cut_axes
from jaxinterp.models.load import load
from jaxinterp.models.mixtures.config import KindOfMLP, MixtureConfig
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites
from tests.models.mixtures.in_a_model import TOKENS, model_of
from tests.models.mixtures.kinds import KINDS


def batch():
    windows = {"tokens": TOKENS, "document": jnp.zeros((4, 8), jnp.int32), "weight": jnp.ones((4, 8))}
    return make_batch({}, jnp.ones(0), Sites((), ()), windows=windows)


def test_no_kind_is_left_out():
    assert set(KINDS) == set(get_args(KindOfMLP))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_written_and_read_back(kind, tmp_path):
    model = model_of(kind)
    save_subject(Subject(model, None, "small"), tmp_path / "model")
    again = load(tmp_path / "model").model
    assert again.config == model.config and jax.tree.structure(again) == jax.tree.structure(model)
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, named_leaves(again)[name], err_msg=name)
    assert set(cut_axes(model)) >= {name for name, leaf in named_leaves(model).items() if leaf.ndim > 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe_x", "monet_horizontal", "monet_vertical", "peer"])
def test_it_trains_with_its_auxiliary_losses(kind):
    recipe = MixtureLanguageModel(learning_rate=1e-2).recipe(30)
    state = recipe.init(jax.random.key(1), batch(), model_of(kind))

    @jax.jit
    def some(state):
        body = lambda state, _: recipe.step(state, batch(), jax.random.key(2), None)
        state, metrics = jax.lax.scan(body, state, None, length=15)
        return state, {name: ratio.total / ratio.count for name, ratio in metrics.items()}

    state, history = some(state)
    assert history["loss"][-1] < history["loss"][0] - 0.3
    assert {"moe_x": "balance", "peer": "ce"}.get(kind, "uniformity") in history
    if kind.startswith("monet"):
        trained = recipe.finish(state)
        mlp = trained.blocks[0].mlp
        assert not mlp.training and float(jnp.abs(mlp.mean).max()) > 1e-3
        apart = run(set_training(trained, True), TOKENS).logits - run(trained, TOKENS).logits
        assert float(jnp.abs(apart).max()) > 1e-4


def test_experts_are_sites_and_edits():
    model = model_of("moe_x")
    assert {"blocks/0/mlp/router", "blocks/0/mlp/experts/index", "blocks/0/mlp/experts/weight"} <= set(sites(model))
    trace = run(model, TOKENS)
    off = lambda weight: jnp.where(trace["blocks/0/mlp/experts/index"] == 2, 0, weight)
    edited = run(model, TOKENS, edits={"blocks/0/mlp/experts/weight": off})
    mlp = model.blocks[0].mlp
    hidden = trace["blocks/0/mlp/hidden"].reshape(4, 8, 4, 6).at[:, :, 2].set(0).reshape(4, 8, 24)
    np.testing.assert_allclose(edited["blocks/0/mlp/out"], mlp.write(hidden), atol=1e-6)
    assert "blocks/0/mlp/experts/pairs" in sites(model_of("monet_horizontal"))


def test_sizes_that_contradict_each_other():
    with pytest.raises(UserError, match="active=9 must be at most experts=4"):
        MixtureConfig("moe_x", experts=4, active=9)
    with pytest.raises(UserError, match="hidden=5 must be even"):
        MixtureConfig("monet_vertical", hidden=5)
