"""Head loadings: they add up to the edges, and equal what edges lose where a head is cut out."""

import jax
import numpy as np
import pytest

from jaxinterp.causal.graphs.build import choose_targets, graph_of
from jaxinterp.causal.graphs.capture import capture
from jaxinterp.causal.graphs.heads import head_loadings
from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.core.errors import UserError
from jaxinterp.models.transformer import initialise
from tests.causal import dense
from tests.causal.small_models import GPT2, PROMPT, weights, with_random_biases


@pytest.fixture(scope="module")
def case():
    """A prompt of a two-layer model with skip transcoders, its graph, and the same in NumPy; float64."""
    with jax.enable_x64(True):
        model = with_random_biases(initialise(GPT2, jax.random.key(1)))
        given = weights(GPT2, skip=True)
        captured = capture(model, PROMPT, from_arrays(**given))
        graph = graph_of(captured, choose_targets(captured))
        independent = dense.Dense(model, PROMPT, **given, thresholds=[np.zeros(5)] * 2)
        target = graph.targets.start
        loads = {paths: head_loadings(captured, graph, target, paths=paths) for paths in ("last", "all")}
        return captured, graph, independent, loads


def test_last_heads_and_the_rest_add_up_to_every_edge(case):
    _, graph, _, loads = case
    row = graph.adjacency[graph.targets.start, : graph.targets.start]
    np.testing.assert_allclose(loads["last"].heads.sum(axis=(0, 1)) + loads["last"].rest, row, atol=1e-10)
    assert loads["last"].heads.shape == (2, 2, graph.targets.start)
    # Broken: paths through several heads are counted more than once in `all`, which does not add up.
    assert np.abs(loads["all"].heads.sum(axis=(0, 1)) + loads["all"].rest - row).max() > 0.01


def test_all_paths_through_a_head_are_what_is_lost_without_it(case):
    _, graph, independent, loads = case
    whole, _, _, _ = independent.graph()
    for layer, head in [(0, 1), (1, 0)]:
        kept = independent.patterns[layer][head].copy()
        independent.patterns[layer][head] = 0
        without, _, _, _ = independent.graph()
        independent.patterns[layer][head] = kept
        start = graph.targets.start
        np.testing.assert_allclose(loads["all"].heads[layer, head], (whole - without)[start, :start], atol=2e-6)
        assert np.abs(loads["all"].heads[layer, head]).max() > 1e-3


def test_only_heads_move_things_between_positions(case):
    _, graph, _, loads = case
    elsewhere = graph.features[:, 1] != len(PROMPT) - 1
    assert np.abs(loads["last"].rest[: len(graph.features)][elsewhere]).max() == 0


def test_refusals(case):
    captured, graph, _, _ = case
    with pytest.raises(UserError, match="is not a feature or a target"):
        head_loadings(captured, graph, graph.errors.start)
    with pytest.raises(UserError, match="paths='first'"):
        head_loadings(captured, graph, 0, paths="first")
