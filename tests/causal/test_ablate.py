"""Ablation of sets of units: equal to edits by hand, and selective where two tasks are planted in two neurons."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.ablate import ablated_metric, matched, strongest_units, unit_means, unit_scores
from jaxinterp.causal.layerwise import stack_layers
from jaxinterp.causal.measure import LogitDifference
from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import Apply
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise
from tests.causal.small_models import LLAMA

TOKENS = jnp.asarray([[3, 7, 1, 0], [2, 5, 9, 4]])
METRIC = LogitDifference(jnp.asarray([1, 2]), jnp.asarray([3, 4]))


@pytest.fixture(scope="module")
def model():
    return initialise(LLAMA, jax.random.key(1))


@pytest.mark.parametrize("name", ["mlp/hidden", "attn/z"])
def test_ablation_is_the_edit_by_hand_and_scores_its_slope(model, name):
    layers = stack_layers(model)
    means = unit_means(layers, [TOKENS], name)
    traced = run(model, TOKENS)
    mine = jnp.stack([traced[f"blocks/{n}/{name}"][:, 1:].mean((0, 1)) for n in range(3)])
    np.testing.assert_allclose(means, mine, atol=1e-5)
    mask = np.zeros(means.shape[:2], bool)
    mask[0, 1] = mask[2, 3] = mask[2, 0] = True

    def edit(layer):
        where = jnp.asarray(mask[layer]).reshape(-1, *(1,) * (means.ndim - 2))
        return Apply(lambda x: x.at[:, 1:].set(jnp.where(where, means[layer], x[:, 1:])))

    expected = METRIC(run(model, TOKENS, edits={f"blocks/{n}/{name}": edit(n) for n in range(3)}))
    found = ablated_metric(layers, TOKENS, METRIC, name, jnp.asarray(mask), means)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(np.asarray(found - METRIC(traced))).max() > 1e-3
    everywhere = ablated_metric(layers, TOKENS, METRIC, name, jnp.asarray(mask), means, first=0)
    assert np.abs(np.asarray(everywhere - found)).max() > 1e-3, "position 0 was ablated too"
    # The score of a unit is the slope of its ablation: halfway means, and again halfway, come to it.
    scores = unit_scores(layers, TOKENS, METRIC, name, means)
    one = np.zeros_like(mask)
    one[2, 1] = True
    z = traced[f"blocks/2/{name}"][:, 1:, 1]

    def moved(share):
        part = z + share * (means[2, 1] - z)
        change = Apply(lambda x: x.at[:, 1:, 1].set(part))
        return METRIC(run(model, TOKENS, edits={f"blocks/2/{name}": change})) - METRIC(traced)

    np.testing.assert_allclose(moved(0.01) / 0.01, scores[2, :, 1], rtol=0.1, atol=3e-3)


def planted():
    """Tokens 1 and 2: neuron 0 answers 3 behind token 1, neuron 1 answers 4 behind token 2. Position 0 is a trap.

    Neuron 2 is 1000 at position 0 (token 0) and 0 elsewhere, and writes to every answer where it is not.
    """
    config = TransformerConfig(
        vocab_size=6, d_model=8, layers=1, heads=1, kv_heads=1, head_dim=8, d_mlp=4, context=4, activation="relu",
        gated=False, tied=False, pre_norms=False, final_norm=False,
    )  # fmt: skip
    model = initialise(config, jax.random.key(0))
    block = model.blocks[0]
    up, down, out = np.zeros((8, 4)), np.zeros((4, 8)), np.zeros((8, 6))
    up[1, 0] = up[2, 1] = 1
    up[0, 2] = 1000
    down[0, 6] = down[1, 7] = 5
    down[2, 5] = 1
    out[6, 3] = out[7, 4] = 1
    out[5, [3, 4]] = -1
    places = lambda m: [
        m.embedding.token, m.unembedding.weight, m.blocks[0].mlp.up_proj.weight, m.blocks[0].mlp.down_proj.weight,
        m.blocks[0].attn.o_proj.weight,
    ]  # fmt: skip
    values = [np.eye(6, 8), out, up, down, 0 * block.attn.o_proj.weight]
    return stack_layers(eqx.tree_at(places, model, [jnp.asarray(v, jnp.float32) for v in values]))


def test_a_set_is_selective_for_its_task_and_position_0_decides():
    layers = planted()
    tasks = {3: jnp.asarray([[0, 5, 1]] * 4), 4: jnp.asarray([[0, 5, 2]] * 4)}
    metric = lambda answer: LogitDifference(jnp.full(4, answer), jnp.full(4, 5))
    for first, selective in ((1, True), (0, False)):
        means = unit_means(layers, list(tasks.values()), "mlp/hidden", first)
        cost = {}
        for own in tasks:
            scores = unit_scores(layers, tasks[own], metric(own), "mlp/hidden", means, first).mean(1)
            mask = strongest_units(scores, 1)
            for other in tasks:
                before = ablated_metric(layers, tasks[other], metric(other), "mlp/hidden", jnp.zeros_like(mask), means)
                after = ablated_metric(
                    layers, tasks[other], metric(other), "mlp/hidden", jnp.asarray(mask), means, first
                )
                cost[own, other] = float((before - after).mean())
            drawn = matched(mask, 0)
            assert drawn.sum() == 1 and not (drawn & mask).any()
        own, other = [cost[a, a] for a in tasks], [cost[a, b] for a in tasks for b in tasks if a != b]
        assert (min(own) > 3 and max(map(abs, other)) < 2) == selective, (first, cost)


def test_refusals():
    with pytest.raises(UserError, match="count=9"):
        strongest_units(jnp.zeros((2, 3)), 9)
    with pytest.raises(UserError, match="first=3"):
        unit_means(planted(), [jnp.zeros((1, 3), jnp.int32)], "mlp/hidden", 3)
