"""Rank-one edits: equal to edited weights, exact on their key, gentle on others; the targets raise what they should."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.editing import Update, balanced, edited_metric, key_readers, solve_target
from jaxinterp.causal.layerwise import layer_arrays, stack_layers
from jaxinterp.causal.measure import LogProbability
from jaxinterp.core.errors import UserError
from jaxinterp.models.run import run
from jaxinterp.models.transformer import initialise
from tests.causal.small_models import LLAMA

TOKENS = jnp.asarray([[3, 7, 1, 0], [2, 5, 9, 4]])
METRIC = LogProbability(jnp.asarray([8, 6]))


@pytest.fixture(scope="module")
def model():
    return initialise(LLAMA, jax.random.key(1))


def test_an_edit_is_exact_on_its_key_and_gentle_on_what_the_text_has():
    rng = np.random.default_rng(0)
    scales = np.array([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    text = rng.normal(size=(4000, 6)) * scales
    keys = rng.normal(size=(3, 6)).astype(np.float32)
    covariance = jnp.asarray(text.T @ text / len(text), jnp.float32)
    read = np.asarray(key_readers(jnp.asarray(keys), covariance, 0.0))
    np.testing.assert_allclose((read * keys).sum(1), 1, rtol=1e-4)
    plain = keys / (keys**2).sum(1, keepdims=True)
    spread = lambda u: ((text @ u.T) ** 2).mean(0)
    assert (spread(read) < 0.2 * spread(plain)).all(), "k / |k|^2 is the broken variant"
    # The least mean square of all readers with u . k = 1: moving along the constraint only adds.
    for _ in range(5):
        move = rng.normal(size=6) * 0.05
        move -= keys[0] * (move @ keys[0]) / (keys[0] @ keys[0])
        assert spread((read[0] + move)[None])[0] > spread(read[:1])[0]
    with pytest.raises(UserError, match="ridge=-1"):
        key_readers(jnp.asarray(keys), covariance, -1.0)


@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_the_numbers_are_those_of_a_model_with_edited_weights(model, part):
    layers, rng = stack_layers(model), np.random.default_rng(1)
    width = 10 if part == "mlp" else 16
    update = Update(*(jnp.asarray(rng.normal(size=(2, n)), jnp.float32) for n in (width, 8)))
    given = {"mlp" if part == "mlp" else "attention": update}
    found = edited_metric(layers, TOKENS, METRIC, jnp.asarray(1), **given)
    place = lambda m: m.blocks[1].mlp.down_proj.weight if part == "mlp" else m.blocks[1].attn.o_proj.weight
    for row in range(2):
        weight = place(model) + jnp.outer(update.read[row], update.write[row])
        expected = METRIC(run(eqx.tree_at(place, model, weight), TOKENS))[row]
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-4)
    assert np.abs(np.asarray(found - METRIC(run(model, TOKENS)))).max() > 0.01


def test_a_target_is_written_by_either_sublayer_and_by_both(model):
    layers = stack_layers(model)
    before = METRIC(run(model, TOKENS))
    position, layer = 2, jnp.asarray(1)
    delta = solve_target(layers, TOKENS, METRIC, layer, position, steps=30)
    arrays = layer_arrays(layers, TOKENS, ("mlp/hidden", "attn/z"))
    keys = {name: array[1, :, position].reshape(2, -1) for name, array in arrays.items()}
    # What must not move: the keys of all positions of the two prompts.
    text = {name: array[1].reshape(8, -1) for name, array in arrays.items()}
    read = {name: key_readers(key, text[name].T @ text[name] / 8, 1e-4) for name, key in keys.items()}
    halves = balanced(delta, jnp.asarray([3.0, 0.0]), jnp.asarray([-1.0, 0.0]))
    np.testing.assert_allclose(halves[0], np.array([[0.75], [0.5]]) * delta, rtol=1e-5)
    np.testing.assert_allclose(halves[0] + halves[1], delta, rtol=1e-5)
    edits = {
        "MLP": {"mlp": Update(read["mlp/hidden"], delta)},
        "attention": {"attention": Update(read["attn/z"], delta)},
        "both": {"mlp": Update(read["mlp/hidden"], halves[0]), "attention": Update(read["attn/z"], halves[1])},
    }
    for name, edit in edits.items():
        assert (edited_metric(layers, TOKENS, METRIC, layer, **edit) > before + 0.3).all(), name
    wrong = {"mlp": Update(read["mlp/hidden"], -delta)}
    assert (edited_metric(layers, TOKENS, METRIC, layer, **wrong) < before).any()
