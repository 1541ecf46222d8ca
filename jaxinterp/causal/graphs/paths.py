"""Greedy paths: the few chains of features through which most of a node's value comes.

A path s_n -> ... -> s_1 -> t carries, in the frozen linear map, with M[t, s] = adjacency[t, s] / activation_s,

    effect = M[t, s_1] M[s_1, s_2] ... M[s_(n-1), s_n] activation_(s_n)        (activation 1 for errors and tokens,
                                                                                whose adjacency is the whole effect)

so that the effects of all paths that begin at errors and tokens, and what constants and left-out features add to every
node on the way, add up to the value of t. Search: starting from t, every kept path is extended by every node that acts
on its first one; of all extensions, the `width` with the largest |effect| are kept; and so on, `steps` times.

Greedy: a path whose last part is weak is lost even if what would come before it is strong (two strong parts that
cancel): `width` as large as there are nodes finds all.

Source: Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944, section 4.2 (greedy computational paths), on the exact edges
of an attribution graph.
"""

from typing import NamedTuple

import numpy as np

from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.core.errors import UserError


class Path(NamedTuple):
    """Nodes from the first cause to the explained one, and what comes along them."""

    nodes: tuple[int, ...]
    effect: float


def greedy_paths(graph: Graph, target: int, *, width: int = 10, steps: int = 5) -> list[Path]:
    """The strongest paths to a node, strongest first: paths of all lengths up to `steps` edges that were ever kept.

    Args:
      target: the number of a feature or target node (`graph.find(...)`, `graph.targets.start`).
      width: extensions kept at every step.
    Raises:
      UserError: the node is not a feature or a target, or width or steps is not positive.
    """
    features, goals = len(graph.features), graph.targets
    if not 0 <= target < features and not goals.start <= target < goals.stop:
        raise UserError(f"target={target}: give a feature (below {features}) or a target ({goals.start} and up).")
    if width < 1 or steps < 1:
        raise UserError(f"width={width} and steps={steps} must be positive.")
    scale = np.ones(graph.size)
    scale[:features] = graph.activation
    found: list[Path] = []
    # `carried`: the product of M along the path so far, to be multiplied by an edge into its first node.
    kept: list[tuple[tuple[int, ...], float]] = [((target,), 1.0)]
    for _ in range(steps):
        longer = [
            ((int(source), *nodes), carried * float(graph.adjacency[nodes[0], source]))
            for nodes, carried in kept
            for source in np.flatnonzero(graph.adjacency[nodes[0]])
        ]
        longer.sort(key=lambda path: -abs(path[1]))
        longer = longer[:width]
        found += [Path(nodes, effect) for nodes, effect in longer]
        kept = [(nodes, effect / float(scale[nodes[0]])) for nodes, effect in longer if nodes[0] < features]
        if not kept:
            break
    return sorted(found, key=lambda path: -abs(path.effect))
