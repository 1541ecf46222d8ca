"""Stacked layers give the numbers of the whole model."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.attribute import attribute, summed
from jaxinterp.causal.layerwise import (
    layer_arrays,
    layer_attributions,
    layer_patch_effects,
    layer_set_metric,
    stack_layers,
)
from jaxinterp.causal.measure import LogitDifference
from jaxinterp.causal.patch import patch_effects
from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import SetTo
from jaxinterp.models.rules import RELEVANCE
from jaxinterp.models.run import run
from tests.causal.toys import small_transformer

KINDS = ("mlp/out", "resid/post")


CLEAN, CORRUPTED = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]]), jnp.asarray([[1, 2, 9, 4], [5, 6, 7, 3]])
METRIC = LogitDifference(jnp.asarray([10, 11]), jnp.asarray([12, 13]))


@pytest.fixture(scope="module")
def given():
    """(model, its layers stacked, their arrays on the clean prompts, the same of the whole model by name)."""
    model = small_transformer()
    layers, trace = stack_layers(model), run(model, CLEAN)
    named = {f"blocks/{layer}/{kind}": trace[f"blocks/{layer}/{kind}"] for kind in KINDS for layer in range(2)}
    return model, layers, layer_arrays(layers, CLEAN, KINDS), named


@pytest.fixture(scope="module")
def effects(given):
    _, layers, fills, _ = given
    return layer_patch_effects(layers, CORRUPTED, METRIC, fills, jnp.arange(1, 4))


def test_stacked_layers_give_the_numbers_of_the_whole_model(given, effects):
    model, _, fills, named = given
    truth = patch_effects(model, CORRUPTED, METRIC, named, chunk=16)
    for kind in KINDS:
        for layer in range(2):
            name = f"blocks/{layer}/{kind}"
            np.testing.assert_allclose(fills[kind][layer], named[name], atol=1e-5)
            np.testing.assert_allclose(effects[kind][layer], truth[name][:, 1:], atol=2e-5)
    assert float(jnp.abs(effects["mlp/out"]).max()) > 0.05


def test_their_attributions_are_those_of_the_whole_model(given, effects):
    model, layers, fills, named = given
    estimate = summed(attribute(model, CORRUPTED, METRIC, named, method="gradient", rules=RELEVANCE, guard=False))
    relevance = layer_attributions(layers, CORRUPTED, METRIC, fills, RELEVANCE)
    for kind in KINDS:
        for layer in range(2):
            np.testing.assert_allclose(relevance[kind][layer], estimate[f"blocks/{layer}/{kind}"], atol=2e-5)
    assert float(jnp.abs(effects["mlp/out"] - relevance["mlp/out"][..., 1:]).max()) > 1e-3, (
        "an estimate, not the effect"
    )


def test_heads_of_stacked_layers_add_up_to_what_attention_writes(given):
    _, layers, _, _ = given
    heads = layer_attributions(layers, CORRUPTED, METRIC, layer_arrays(layers, CLEAN, ("attn/z", "attn/out")))
    assert heads["attn/z"].shape == (2, 2, 4, 4)
    np.testing.assert_allclose(heads["attn/z"].sum(axis=-1), heads["attn/out"], atol=2e-5)


def test_one_array_of_one_layer_is_set():
    model, tokens = small_transformer(), jnp.asarray([[1, 2, 3]])
    layers, metric = stack_layers(model), LogitDifference(jnp.asarray([10]), jnp.asarray([12]))
    value = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 24)), jnp.float32)
    for layer in range(2):
        found = layer_set_metric(layers, tokens, metric, "mlp/hidden", jnp.asarray(layer), value)
        there = metric(run(model, tokens, edits={f"blocks/{layer}/mlp/hidden": SetTo(value)}))
        np.testing.assert_allclose(found, there, atol=1e-5)
        assert abs(float(found[0] - metric(run(model, tokens))[0])) > 1e-3


def test_blocks_that_differ_are_refused():
    model = small_transformer()
    windowed = eqx.tree_at(
        lambda model: model.blocks[1].attn, model, dataclasses.replace(model.blocks[1].attn, window=2)
    )
    with pytest.raises(UserError, match="blocks/1 differs from blocks/0"):
        stack_layers(windowed)
    with pytest.raises(UserError, match="no array 'mlp/nothing'"):
        layer_arrays(stack_layers(model), jnp.asarray([[1, 2]]), ("mlp/nothing",))
    assert jax.tree.leaves(stack_layers(model).arrays)[0].shape[0] == 2
