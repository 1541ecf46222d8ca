"""Pruning: the nodes and edges that carry most of the influence.

    nodes   sorted by influence, kept until their cumulative share reaches `node_threshold`; ties with the last stay
    edges   A'[t, s] (influence[t] + w[t]) among the kept nodes, kept in the same way until `edge_threshold`
    then    a feature or error without an edge onwards goes, and a feature without an edge that comes in, until nothing
            changes; tokens and targets stay

Source: Ameisen et al. 2025, "Circuit Tracing"; thresholds 0.8 and 0.98 as in circuit-tracer.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.influence import SMALLEST, node_influence, shares, total_influence
from jaxinterp.core.errors import UserError


class Pruned(NamedTuple):
    """What stays, and every node's cumulative share: the threshold from which on it is kept."""

    nodes: Bool[np.ndarray, " nodes"]
    edges: Bool[np.ndarray, "nodes nodes"]
    cumulative: Float[np.ndarray, " nodes"]


def prune(graph: Graph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
    """Prune as the module says.

    Raises:
      UserError: a threshold is not between 0 and 1.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value} must be between 0 and 1.")
    influence, weight = node_influence(graph), graph.weights()
    nodes = influence >= smallest_kept(influence, node_threshold)
    fixed = graph.token_nodes.start
    nodes[fixed:] = True

    scores = edge_scores(np.where(nodes[:, None] & nodes[None, :], graph.adjacency, 0), weight)
    edges = (scores >= smallest_kept(scores.ravel(), edge_threshold)) & (scores > 0)
    return Pruned(*_without_dead_ends(nodes, edges, len(graph.features), fixed), cumulative_shares(influence))


def edge_scores(
    adjacency: Float[np.ndarray, "nodes nodes"], weight: Float[np.ndarray, " nodes"]
) -> Float[np.ndarray, "nodes nodes"]:
    """A'[t, s] (influence[t] + w[t])."""
    share = shares(adjacency)
    return share * (total_influence(share, weight) + weight)[:, None]


def smallest_kept(scores: Float[np.ndarray, " n"], threshold: float) -> float:
    """The smallest score that is kept, where the largest ones are kept until they make up `threshold` of the sum."""
    falling = np.sort(scores)[::-1]
    cumulative = np.cumsum(falling) / max(float(falling.sum()), SMALLEST)
    return float(falling[min(int(np.searchsorted(cumulative, threshold)), falling.size - 1)])


def cumulative_shares(influence: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """For every score, which share of the sum it and the larger ones make up."""
    order = np.argsort(-influence, kind="stable")
    result = np.zeros_like(influence)
    result[order] = np.cumsum(influence[order]) / max(float(influence.sum()), SMALLEST)
    return result


def _without_dead_ends(
    nodes: Bool[np.ndarray, " nodes"], edges: Bool[np.ndarray, "nodes nodes"], features: int, fixed: int
) -> tuple[Bool[np.ndarray, " nodes"], Bool[np.ndarray, "nodes nodes"]]:
    nodes, edges = nodes.copy(), edges.copy()
    while True:
        before = nodes.sum()
        edges &= nodes[:, None] & nodes[None, :]
        nodes[:fixed] &= edges[:, :fixed].any(axis=0)
        nodes[:features] &= edges[:features].any(axis=1)
        if nodes.sum() == before:
            return nodes, edges & nodes[:, None] & nodes[None, :]
