"""An attribution graph as one HTML file: no network, no assets beside it.

The page draws the same JSON that other tools open; what they do not take (what features fire on, shares of links,
effects of constants) lies beside it in the page. The light or dark theme is the reader's; on a phone the panel stands
below the graph.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from markupsafe import Markup

from jaxinterp.causal.graphs.contexts import About
from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.influence import completeness_score, replacement_score
from jaxinterp.causal.graphs.prune import Pruned, cumulative_shares, edge_scores
from jaxinterp.causal.graphs.schema import check_graph_json, node_id
from jaxinterp.core.json_value import Json
from jaxinterp.report.style import asset
from jaxinterp.report.templates import render
from jaxinterp.storage.files import write_text


def write_graph_page(
    graph: Graph,
    kept: Pruned,
    document: Mapping[str, Json],
    path: str | Path,
    *,
    token_text: Callable[[int], str],
    about: Mapping[tuple[int, int], About] | None = None,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write the page of a graph and return its path; a file of that name is replaced in one step.

    Args:
      graph, kept: what `attribution_graph` and `prune` return; document: what `graph_json` made of them.
      token_text: the text of a token id.
      about: by (layer, index), what `about_features` found.
      facts: what is known of the run, by name.
    Raises:
      UserError: the document breaks the schema, or belongs to another graph.
    """
    check_graph_json(dict(document))
    extra = {
        "shares": link_shares(graph, kept, document),
        "bias": _bias(graph, kept),
        "features": {f"{layer}_{index}": _about(own, token_text) for (layer, index), own in (about or {}).items()},
    }
    return write_text(path, _page(document, extra, _scores(graph), facts or {}))


def link_shares(graph: Graph, kept: Pruned, document: Mapping[str, Json]) -> list[float]:
    """For every link of the document: which share of all kept edges' scores it and the larger ones make up."""
    scores = edge_scores(np.where(kept.edges, graph.adjacency, 0), graph.weights())
    targets, sources = np.nonzero(kept.edges)
    shares = cumulative_shares(scores[targets, sources])
    first = graph.targets.start
    names = [node_id(node, number - first) for number, node in enumerate(graph.nodes())]
    known = {(names[s], names[t]): float(share) for t, s, share in zip(targets, sources, shares, strict=True)}
    return [known.get((link["source"], link["target"]), 0.0) for link in document["links"]]


def _bias(graph: Graph, kept: Pruned) -> dict[str, float]:
    first = graph.targets.start
    return {
        node_id(node, number - first): float(graph.bias[number] + graph.left_out[number])
        for number, node in enumerate(graph.nodes())
        if kept.nodes[number] and node.kind in ("feature", "target")
    }


def _about(own: About, token_text: Callable[[int], str]) -> dict[str, Json]:
    return {
        "density": own.density,
        "raised": [[token_text(id), round(value, 4)] for id, value in own.raised],
        "lowered": [[token_text(id), round(value, 4)] for id, value in own.lowered],
        "contexts": [
            {
                "tokens": [token_text(id) for id in context.tokens],
                "acts": [round(value, 4) for value in context.activations],
                "peak": context.peak,
            }
            for context in own.contexts
        ],
    }


def _scores(graph: Graph) -> str:
    return (
        f"replacement score {replacement_score(graph):.2f}, completeness {completeness_score(graph):.2f}; "
        f"{len(graph.features):,} active features before pruning"
    )


def _page(document: Mapping[str, Json], extra: Mapping[str, Json], scores: str, facts: Mapping[str, str]) -> str:
    metadata = document["metadata"]
    # "</" would end the element that holds the data.
    data = json.dumps({"graph": document, "extra": extra}, allow_nan=False).replace("</", "<\\/")
    return render(
        "graph.html",
        metadata=metadata,
        most=f"{float(metadata.get('node_threshold') or 1):g}",
        scores=scores,
        facts=facts,
        data=Markup(data),
        graph_style=Markup(asset("graph.css")),
        graph_script=Markup(asset("graph.js")),
    )
