"""Interventions: the graph's predictions are exact in direct mode, and in frozen mode while nothing switches."""

import jax
import numpy as np
import pytest

from jaxinterp.causal.graphs.build import choose_targets, graph_of
from jaxinterp.causal.graphs.capture import capture
from jaxinterp.causal.graphs.intervene import intervene, total_effects
from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import SetTo
from jaxinterp.models.run import run
from jaxinterp.models.transformer import initialise
from tests.causal.small_models import LLAMA, PROMPT, weights, wide, with_random_biases


@pytest.fixture(scope="module")
def both():
    """A captured prompt and its graph: cross-layer, JumpReLU, with skip paths; float64."""
    with jax.enable_x64(True):
        model = with_random_biases(wide(initialise(LLAMA, jax.random.key(1))))
        given = weights(LLAMA, cross=True, skip=True)
        captured = capture(model, PROMPT, from_arrays(**given, thresholds=[np.full(5, 0.4)] * 3))
        return captured, graph_of(captured, choose_targets(captured))


def moved(captured, graph, outcome):
    """By how much the pre-activation of every feature node and the centred logit of every target moved."""
    layers = list(captured.transcoders.layers)
    features = [
        float(outcome.pre[layers.index(layer)][p, i] - captured.seen.pre[layers.index(layer)][p, i])
        for layer, p, i in graph.features
    ]
    change = np.asarray(outcome.logits - captured.seen.logits)[-1]
    return np.array(features), change[graph.target_tokens] - change.mean()


def test_direct_mode_is_exactly_the_adjacency(both):
    captured, graph = both
    with jax.enable_x64(True):
        for node, feature in enumerate(graph.features.tolist()):
            outcome = intervene(captured, {tuple(feature): graph.activation[node] + 0.7}, mode="direct")
            features, targets = moved(captured, graph, outcome)
            column = graph.adjacency[:, node] * 0.7 / graph.activation[node]
            np.testing.assert_allclose(features, column[: len(features)], atol=1e-10)
            np.testing.assert_allclose(targets, column[graph.targets], atol=1e-10)


def test_frozen_mode_is_predicted_while_nothing_switches(both):
    """Δ = (I - M)^-1 δ for a small step; a step that switches features is not predicted."""
    captured, graph = both
    first = tuple(graph.features[0].tolist())
    with jax.enable_x64(True):

        def missed(step):
            outcome = intervene(captured, {first: graph.activation[0] + step}, mode="frozen")
            features, targets = moved(captured, graph, outcome)
            predicted = total_effects(graph, {first: step})
            return max(
                np.abs(features[1:] - predicted[1 : len(features)]).max(),
                np.abs(targets - predicted[graph.targets]).max(),
            )

        assert missed(1e-3) < 1e-10
        assert missed(50.0) > 0.5
        # Broken: direct effects alone do not predict it.
        outcome = intervene(captured, {first: graph.activation[0] + 1e-3}, mode="frozen")
        direct = graph.adjacency[graph.targets, 0] * 1e-3 / graph.activation[0]
        assert np.abs(moved(captured, graph, outcome)[1] - direct).max() > 1e-6


def test_free_mode_is_the_model_with_its_mlp_outputs_set(both):
    """A feature of the last layer: only its own MLP's output changes, which is an edit of `run`."""
    captured, graph = both
    with jax.enable_x64(True):
        node = int(np.flatnonzero(graph.features[:, 0] == 2)[0])
        feature = tuple(graph.features[node].tolist())
        outcome = intervene(captured, {feature: 0.0}, mode="free")
        reader = captured.transcoders.readers[2]
        out = run(captured.model, captured.tokens[None])["blocks/2/mlp/out"]
        out = out.at[0, feature[1]].add(-graph.activation[node] * reader.decoder[feature[2], 0])
        expected = run(captured.model, captured.tokens[None], edits={"blocks/2/mlp/out": SetTo(out)}).logits[0]
        np.testing.assert_allclose(outcome.logits, expected, atol=1e-10)
        frozen = intervene(captured, {feature: 0.0}, mode="frozen")
        assert np.abs(frozen.logits - expected).max() > 1e-4


def test_nothing_changes_without_an_intervention(both):
    captured, _ = both
    with jax.enable_x64(True):
        for mode in ("direct", "frozen", "free"):
            outcome = intervene(captured, {}, mode=mode)
            np.testing.assert_allclose(outcome.logits, captured.seen.logits, atol=1e-10)
            for codes, own in zip(outcome.codes, captured.seen.codes, strict=True):
                np.testing.assert_allclose(codes, own, atol=1e-10)


def test_refusals(both):
    captured, _ = both
    for feature, message in [((7, 1, 0), "layer 7"), ((0, 0, 0), "from 1 to 3"), ((0, 1, 5), "below 5")]:
        with pytest.raises(UserError, match=message):
            intervene(captured, {feature: 1.0})
    with pytest.raises(UserError, match="mode='soft'"):
        intervene(captured, {}, mode="soft")
