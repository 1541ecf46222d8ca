"""Influence of every node on the prediction, and two scores of a graph.

    A' = |A|, every row divided by its sum (by 1e-10 where that is smaller)
    influence = w (A' + A'^2 + A'^3 + ...),   w = probabilities of the targets
    replacement = influence of tokens / (of tokens + of errors)
    completeness = sum_n (1 - share of errors among the inputs of n) (influence_n + w_n) / sum_n (influence_n + w_n)

The graph has no circles, so that the series ends. Constants (`bias`) take no part, as in circuit-tracer.

Source: Ameisen et al. 2025, "Circuit Tracing"; the scores as in circuit-tracer.
"""

import numpy as np
from jaxtyping import Float

from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.core.errors import UserError

SMALLEST = 1e-10


def shares(adjacency: Float[np.ndarray, "nodes nodes"]) -> Float[np.ndarray, "nodes nodes"]:
    """A' of the module's equation: which share of its inputs each node owes to each other."""
    size = np.abs(adjacency)
    return size / np.maximum(size.sum(axis=1, keepdims=True), SMALLEST)


def total_influence(
    share: Float[np.ndarray, "nodes nodes"], weight: Float[np.ndarray, " nodes"]
) -> Float[np.ndarray, " nodes"]:
    """w (A' + A'^2 + ...), given A' and w.

    Raises:
      UserError: the graph has a circle.
    """
    total, current = np.zeros_like(weight), weight
    for _ in range(share.shape[0] + 1):
        current = current @ share
        if not current.any():
            return total
        total = total + current
    raise UserError("the graph has a circle: a node may have an effect on later ones only.")


def node_influence(graph: Graph) -> Float[np.ndarray, " nodes"]:
    """The influence of every node on the targets."""
    return total_influence(shares(graph.adjacency), graph.weights())


def replacement_score(graph: Graph) -> float:
    """How much of the influence comes from tokens, through features, and not from errors: 1 is a full explanation."""
    influence = node_influence(graph)
    tokens, errors = float(influence[graph.token_nodes].sum()), float(influence[graph.errors].sum())
    return tokens / max(tokens + errors, SMALLEST)


def completeness_score(graph: Graph) -> float:
    """How much of all nodes' inputs is not error, nodes counted by their influence."""
    share, weight = shares(graph.adjacency), graph.weights()
    importance = total_influence(share, weight) + weight
    known = 1 - share[:, graph.errors].sum(axis=1)
    return float((known * importance).sum() / max(float(importance.sum()), SMALLEST))
