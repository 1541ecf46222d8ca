"""Greedy paths against sums over all paths."""

from itertools import pairwise

import numpy as np
import pytest

from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.paths import greedy_paths
from jaxinterp.core.errors import UserError


def graph():
    """Six features in three layers at one position, errors, a token, one target; random effects, larger to smaller."""
    rng = np.random.default_rng(0)
    features, size = 6, 6 + 3 + 1 + 1
    layer = np.repeat(np.arange(3), 2)
    adjacency = np.zeros((size, size))
    for node in range(features):
        adjacency[node, :features] = rng.normal(size=features) * (layer < layer[node])
        adjacency[node, features : features + 3] = rng.normal(size=3) * (np.arange(3) < layer[node])
        adjacency[node, 9] = rng.normal()
    adjacency[10, :10] = rng.normal(size=10)
    bias = np.zeros(size)
    bias[:features], bias[10] = rng.normal(size=features), rng.normal()
    value = adjacency.sum(axis=1) + bias
    activation = rng.uniform(0.5, 2, features)
    return Graph(
        np.array([3]), 3, np.stack([layer, np.zeros(6, int), np.arange(6)], 1), activation, activation, np.array([1]),
        np.array([1.0]), adjacency, bias, np.zeros(size), value,
    )  # fmt: skip


def test_all_paths_together_are_what_the_linear_map_says():
    """Width large enough for all: paths from errors and tokens sum to the geometric series of M."""
    own = graph()
    scale = np.ones(own.size)
    scale[:6] = own.activation
    m = own.adjacency / scale
    through = np.linalg.inv(np.eye(own.size) - m)  # sums over all paths
    paths = greedy_paths(own, 10, width=10_000, steps=6)
    ends = np.zeros(own.size)
    for path in paths:
        ends[path.nodes[0]] += path.effect
        assert path.nodes[-1] == 10 and len(set(path.nodes)) == len(path.nodes)
    np.testing.assert_allclose(ends[6:10], through[10, 6:10], atol=1e-12)
    np.testing.assert_allclose(ends[:6], (through[10] * scale)[:6], atol=1e-12)
    direct = [path for path in paths if len(path.nodes) == 2]
    np.testing.assert_allclose(sum(path.effect for path in direct) + own.bias[10], own.value[10], atol=1e-12)
    broken = np.linalg.inv(np.eye(own.size) - own.adjacency)  # edges multiplied without dividing by activations
    assert np.abs(broken[10, 9] - ends[9]) > 0.05


def test_a_narrow_search_keeps_the_strongest_of_every_step():
    own = graph()
    everything = greedy_paths(own, 10, width=10_000, steps=1)
    narrow = greedy_paths(own, 10, width=1, steps=4)
    assert narrow[0] in everything or len(narrow[0].nodes) > 2
    first = max(everything, key=lambda path: abs(path.effect))
    assert first in narrow
    assert all(abs(one.effect) >= abs(two.effect) for one, two in pairwise(narrow))
    with pytest.raises(UserError, match="give a feature"):
        greedy_paths(own, 7)
    with pytest.raises(UserError, match="width=0"):
        greedy_paths(own, 10, width=0)
