"""What a graph predicts of removing features, against what removing them does.

For each of the most influential kept features: its activation is set to 0, and the change of the first target's logit
(minus the mean logit) is measured in the three modes of `intervene`. Direct mode must equal the adjacency; frozen mode
differs from the prediction (I - M)^-1 δ where features switch; free mode differs besides where attention and norms
answer.
"""

from typing import Any

import numpy as np

from jaxinterp.causal.graphs.capture import Captured
from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.influence import node_influence
from jaxinterp.causal.graphs.intervene import MODES, Feature, intervene, total_effects
from jaxinterp.causal.graphs.prune import Pruned
from jaxinterp.core.json_value import Json


def check_interventions(captured: Captured, graph: Graph, kept: Pruned, *, most: int = 12) -> dict[str, Json]:
    """Predicted and measured changes, feature by feature, and how well they agree.

    Returns:
      `rows`: per feature its place, `predicted` and the change in every mode; `direct_missed`: the largest distance
      of direct mode from the adjacency; `frozen_correlation` and `free_correlation`: Pearson, nan below two features.
    """
    influence = node_influence(graph)[: len(graph.features)] * kept.nodes[: len(graph.features)]
    chosen = [int(node) for node in np.argsort(-influence, kind="stable")[:most] if influence[node] > 0]
    rows = []
    first = graph.targets.start
    token = int(graph.target_tokens[0])
    before = _first_target(captured, captured.seen.logits, token)
    for node in chosen:
        layer, position, index = (int(each) for each in graph.features[node])
        feature: Feature = (layer, position, index)
        removed = {feature: -float(graph.activation[node])}
        row: dict[str, Json] = {
            "feature": list(feature),
            "adjacency": -float(graph.adjacency[first, node]),
            "predicted": float(total_effects(graph, removed)[first]),
        }
        for mode in MODES:
            after = intervene(captured, {feature: 0.0}, mode=mode).logits
            row[mode] = _first_target(captured, after, token) - before
        rows.append(row)
    return {
        "features": len(rows),
        "direct_missed": max((abs(row["direct"] - row["adjacency"]) for row in rows), default=0.0),
        "frozen_correlation": _correlation(rows, "frozen"),
        "free_correlation": _correlation(rows, "free"),
        "rows": rows,
    }


def _first_target(captured: Captured, logits: Any, token: int) -> float:
    last = np.asarray(logits, np.float64)[-1]
    return float(last[token] - last.mean())


def _correlation(rows: list[dict[str, Json]], mode: str) -> float:
    if len(rows) < 2:
        return float("nan")
    predicted, measured = (np.array([row[name] for row in rows]) for name in ("predicted", mode))
    if not (predicted.std() and measured.std()):
        return float("nan")
    return float(np.corrcoef(predicted, measured)[0, 1])
