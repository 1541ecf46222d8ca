"""The graph as the JSON that circuit-tracer's frontend and Neuronpedia open, and a check of such files.

Schema version 1: `feature` of a feature is the Cantor pairing of (layer, index). Differences from what circuit-tracer
writes: an error's id is `error_{layer}_{position}` (theirs, `0_{layer}_{position}`, is also the id of a feature of
layer 0), and a `bias` node is written only where it is asked for.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jaxinterp.causal.graphs.graph import Graph, Node
from jaxinterp.causal.graphs.influence import completeness_score, replacement_score
from jaxinterp.causal.graphs.prune import Pruned
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json

FEATURE, ERROR, TOKEN, LOGIT, BIAS = (
    "cross layer transcoder",
    "mlp reconstruction error",
    "embedding",
    "logit",
    "bias",
)
"""`feature_type`; features of per-layer transcoders are also called the first."""

FEATURE_TYPES = (FEATURE, ERROR, TOKEN, LOGIT, BIAS, "lorsa", "lorsa error")
NAME = re.compile(r"[A-Za-z0-9_.-]+")
LARGEST = 100 * 2**20
"""Bytes that Neuronpedia takes."""


def cantor(layer: int, index: int) -> int:
    """(l + i)(l + i + 1) / 2 + i: one number for a feature and its layer."""
    return (layer + index) * (layer + index + 1) // 2 + index


def uncantor(number: int) -> tuple[int, int]:
    """The layer and index that a Cantor number pairs."""
    total = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - total * (total + 1) // 2
    return total - index, index


def node_id(node: Node, place: int = 0) -> str:
    """The id of a node; `place` tells targets without a token apart."""
    if node.kind == "feature":
        return f"{node.layer}_{node.index}_{node.position}"
    if node.kind == "error":
        return f"error_{node.layer}_{node.position}"
    if node.kind == "token":
        return f"E_{node.index}_{node.position}"
    return f"{node.layer + 1}_{node.index if node.index >= 0 else f'vector{place}'}_{node.position}"


def graph_json(
    graph: Graph,
    kept: Pruned,
    *,
    slug: str,
    scan: str,
    prompt: str,
    token_text: Callable[[int], str],
    labels: Mapping[tuple[int, int], str] | None = None,
    node_threshold: float = 0.8,
    with_bias: bool = False,
    transcoders: Sequence[str] = (),
    pinned: Sequence[str] = (),
    supernodes: Sequence[Sequence[str]] = (),
) -> dict[str, Json]:
    """The kept part of a graph as JSON.

    Args:
      kept: what `prune` keeps.
      slug: a name of this graph; scan: a name of model and transcoders (both letters, digits, `_`, `.`, `-`).
      prompt: the text; `token_text` gives that of a token id.
      labels: what a feature (layer, index) is called (`clerp`).
      node_threshold: where the pruning slider starts.
      with_bias: write the effects of constants as a node (other tools leave it out).
      transcoders: names of the transcoders, one a layer, or none.
      pinned: ids of nodes; supernodes: lists of a name and the ids of its members.
    Raises:
      UserError: slug or scan has other letters.
    """
    labels = labels or {}
    nodes, ids = [], {}
    first_target = graph.targets.start
    for number, node in enumerate(graph.nodes()):
        if not kept.nodes[number]:
            continue
        ids[number] = node_id(node, number - first_target)
        entry = _entry(node, ids[number], labels, token_text)
        entry["influence"] = None if node.kind == "target" else float(kept.cumulative[number])
        if node.kind == "feature":
            entry["activation"] = float(graph.activation[number])
        if node.kind == "target":
            _add_probability(entry, node, float(graph.weight[number - first_target]), token_text)
            entry["is_target_logit"] = number == first_target
        nodes.append(entry)
    links = [
        {"source": ids[int(s)], "target": ids[int(t)], "weight": float(graph.adjacency[t, s])}
        for t, s in zip(*np.nonzero(kept.edges), strict=True)
    ]
    if with_bias:
        nodes.append(_bias_node())
        weights = ((id, float(graph.bias[number])) for number, id in ids.items())
        links += [{"source": "bias", "target": id, "weight": weight} for id, weight in weights if weight != 0]
    document = {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": list(transcoders),
            "prompt_tokens": [token_text(int(token)) for token in graph.tokens],
            "prompt": prompt,
            "node_threshold": node_threshold,
            "schema_version": 1,
            "info": {
                "generator": {"name": "jaxinterp", "version": "0.1"},
                "replacement_score": replacement_score(graph),
                "completeness_score": completeness_score(graph),
            },
        },
        "qParams": {
            "pinnedIds": list(pinned),
            "supernodes": [list(group) for group in supernodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }
    check_graph_json(document)
    return document


def _entry(
    node: Node, id: str, labels: Mapping[tuple[int, int], str], token_text: Callable[[int], str]
) -> dict[str, Json]:
    common = {"node_id": id, "ctx_idx": node.position, "run_idx": 0, "reverse_ctx_idx": 0, "token_prob": 0.0}
    common["is_target_logit"] = False
    if node.kind == "feature":
        own = {
            "feature": cantor(node.layer, node.index),
            "layer": str(node.layer),
            "feature_type": FEATURE,
            "jsNodeId": f"{node.layer}_{node.index}-0",
            "clerp": labels.get((node.layer, node.index), ""),
        }
    elif node.kind == "error":
        own = {"feature": -1, "layer": str(node.layer), "feature_type": ERROR, "jsNodeId": f"{id}-0", "clerp": ""}
    elif node.kind == "token":
        own = {
            "feature": node.position,
            "layer": "E",
            "feature_type": TOKEN,
            "jsNodeId": f"E_{node.index}-{node.position}",
            "clerp": f'Emb: "{token_text(node.index)}"',
        }
    else:
        own = {
            "feature": max(node.index, 0),
            "layer": str(node.layer + 1),
            "feature_type": LOGIT,
            "jsNodeId": f"L_{node.index}-{node.position}",
            "clerp": "",
        }
    return common | own


def _add_probability(entry: dict[str, Json], node: Node, probability: float, token_text: Callable[[int], str]) -> None:
    """Frontends read the probability from the label."""
    text = token_text(node.index) if node.index >= 0 else "vector"
    entry["token_prob"] = probability
    entry["clerp"] = f'Output "{text}" (p={probability:.3f})'


def _bias_node() -> dict[str, Json]:
    return {
        "node_id": "bias",
        "feature": None,
        "layer": "E",
        "ctx_idx": 0,
        "feature_type": BIAS,
        "jsNodeId": "bias-0",
        "clerp": "constants: biases, positions, and the MLPs at the first position",
        "influence": None,
    }


def check_graph_json(document: Any) -> None:
    """Check a graph's JSON against the schema that frontends rely on.

    Raises:
      UserError: with the field, its value and what belongs there.
    """
    where = "graph JSON"
    if not isinstance(document, dict):
        raise UserError(f"{where} is a {type(document).__name__}: an object is needed.")
    for name in ("metadata", "qParams"):
        _need(document, name, dict, where)
    for name in ("nodes", "links"):
        _need(document, name, list, where)
    _check_metadata(document["metadata"])
    for name in ("pinnedIds", "supernodes"):
        _need(document["qParams"], name, list, "qParams")
    for name in ("linkType", "clickedId"):
        _need(document["qParams"], name, str, "qParams")
    ids: set[str] = set()
    for number, node in enumerate(document["nodes"]):
        _check_node(node, f"nodes[{number}]", len(document["metadata"]["prompt_tokens"]))
        if node["node_id"] in ids:
            raise UserError(f"nodes[{number}].node_id={node['node_id']!r} is the id of two nodes: make it unique.")
        ids.add(node["node_id"])
    for number, link in enumerate(document["links"]):
        for end in ("source", "target"):
            if _need(link, end, str, f"links[{number}]") not in ids:
                raise UserError(f"links[{number}].{end}={link[end]!r} is not the id of a node.")
        weight = _need(link, "weight", (int, float), f"links[{number}]")
        if not math.isfinite(weight):
            raise UserError(f"links[{number}].weight={weight} must be finite.")


def _check_metadata(metadata: dict[str, Json]) -> None:
    for name in ("slug", "scan", "prompt"):
        _need(metadata, name, str, "metadata")
    for name in ("slug", "scan"):
        if not NAME.fullmatch(metadata[name]):
            raise UserError(f"metadata.{name}={metadata[name]!r} may have letters, digits, '_', '.' and '-' only.")
    tokens = _need(metadata, "prompt_tokens", list, "metadata")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError("metadata.prompt_tokens must be a list of strings, one a position.")


def _check_node(node: Any, where: str, seq: int) -> None:
    if not isinstance(node, dict):
        raise UserError(f"{where} is a {type(node).__name__}: an object is needed.")
    for name in ("node_id", "feature_type", "jsNodeId", "clerp"):
        _need(node, name, str, where)
    kind = node["feature_type"]
    if kind not in FEATURE_TYPES:
        raise UserError(f"{where}.feature_type={kind!r} must be one of {', '.join(FEATURE_TYPES)}.")
    if "feature" not in node or not isinstance(node["feature"], int | None) or isinstance(node["feature"], bool):
        raise UserError(f"{where}.feature={node.get('feature')!r} must be a whole number or null.")
    layer = str(_need(node, "layer", (str, int), where))
    if layer != "E" and not layer.isdigit():
        raise UserError(f"{where}.layer={layer!r} must be a number or 'E'.")
    position = _need(node, "ctx_idx", int, where)
    if not 0 <= position < seq:
        raise UserError(f"{where}.ctx_idx={position} is not a position of the {seq} prompt tokens.")
    if kind == LOGIT and not re.search(r"\(p=[0-9.e+-]+\)", node["clerp"]):
        raise UserError(f"{where}.clerp={node['clerp']!r}: a logit's must hold its probability as (p=0.123).")
    if kind == FEATURE and node["node_id"].count("_") == 2:
        own_layer, index, _ = node["node_id"].split("_")
        if node["feature"] != cantor(int(own_layer), int(index)):
            raise UserError(f"{where}.feature={node['feature']} is not the Cantor number of its node_id.")
    if node.get("influence") is not None and not math.isfinite(node["influence"]):
        raise UserError(f"{where}.influence={node['influence']} must be finite or null.")


def _need(holder: Any, name: str, kind: Any, where: str) -> PyTree:
    if not isinstance(holder, dict) or name not in holder:
        raise UserError(f"{where} has no {name!r}.")
    value = holder[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise UserError(f"{where}.{name}={value!r} must be {' or '.join(each.__name__ for each in kinds)}.")
    return value


def write_graph_json(document: dict[str, Json], path: str | Path) -> Path:
    """Write a checked graph, and `graph-metadata.json` beside it, which circuit-tracer's local server lists.

    Raises:
      UserError: it breaks the schema, or is larger than Neuronpedia takes.
    """
    check_graph_json(document)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    if len(text) > LARGEST:
        raise UserError(f"{path} would have {len(text) >> 20} MiB, and 100 MiB is the limit: prune more.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    listed = path.parent / "graph-metadata.json"
    known = json.loads(listed.read_text()).get("graphs", []) if listed.exists() else []
    slug = document["metadata"]["slug"]
    graphs = [*(each for each in known if each.get("slug") != slug), document["metadata"]]
    listed.write_text(json.dumps({"graphs": graphs}, indent=1) + "\n", encoding="utf-8")
    return path
