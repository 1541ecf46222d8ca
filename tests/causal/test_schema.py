"""The graph's JSON: what frontends read, and refusals of files that would break them."""

import copy
import json

import numpy as np
import pytest

from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.prune import prune
from jaxinterp.causal.graphs.schema import cantor, check_graph_json, graph_json, uncantor, write_graph_json
from jaxinterp.core.errors import UserError


@pytest.fixture(scope="module")
def graph():
    """Two features, two layers, two tokens, two targets."""
    adjacency = np.zeros((10, 10))
    adjacency[0, 7], adjacency[1, [0, 3, 6]] = 1.0, [2.0, 0.5, 1.0]
    adjacency[8, [0, 1, 7]], adjacency[9, [0, 1, 7]] = [-0.4, 0.9, -0.2], [-0.4, -0.5, 0.4]
    return Graph(
        tokens=np.array([4, 5]), layers=2, features=np.array([[0, 1, 3], [1, 1, 7]]),
        activation=np.array([1.0, 2.5]), pre=np.array([1.0, 2.5]), target_tokens=np.array([4, 6]),
        weight=np.array([0.7, 0.2]), adjacency=adjacency, bias=np.full(10, 0.25), left_out=np.zeros(10),
        value=np.zeros(10),
    )  # fmt: skip


def made(graph, **options):
    kept = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    return graph_json(
        graph, kept, slug="a-graph", scan="tiny", prompt="ab", token_text=lambda id: f'<{id}>"', **options
    )


def test_what_frontends_read(graph):
    document = made(graph, labels={(1, 7): "a thing"})
    nodes = {node["node_id"]: node for node in document["nodes"]}
    # The error at (0, 1) has an edge onwards; the three others have none and go.
    assert set(nodes) == {"0_3_1", "1_7_1", "error_0_1", "E_4_0", "E_5_1", "3_4_1", "3_6_1"}
    assert nodes["1_7_1"]["feature"] == cantor(1, 7) == 43 and nodes["1_7_1"]["clerp"] == "a thing"
    assert nodes["1_7_1"]["activation"] == 2.5 and 0 < nodes["1_7_1"]["influence"] <= 1
    assert nodes["3_4_1"]["clerp"].endswith("(p=0.700)") and nodes["3_4_1"]["influence"] is None
    assert nodes["3_4_1"]["is_target_logit"] and not nodes["3_6_1"]["is_target_logit"]
    assert nodes["E_4_0"]["layer"] == "E" and document["metadata"]["schema_version"] == 1
    links = {(link["source"], link["target"]): link["weight"] for link in document["links"]}
    assert len(links) == 10 and links["1_7_1", "3_6_1"] == -0.5 and links["error_0_1", "1_7_1"] == 0.5


def test_the_bias_node_is_written_on_request(graph):
    assert not [node for node in made(graph)["nodes"] if node["feature_type"] == "bias"]
    document = made(graph, with_bias=True)
    assert [node["node_id"] for node in document["nodes"] if node["feature_type"] == "bias"] == ["bias"]
    assert {"source": "bias", "target": "1_7_1", "weight": 0.25} in document["links"]


def test_cantor_numbers_are_pairs():
    pairs = [(layer, index) for layer in range(30) for index in (0, 1, 5, 4607, 100_000)]
    assert [uncantor(cantor(*pair)) for pair in pairs] == pairs
    assert len({cantor(*pair) for pair in pairs}) == len(pairs)


def broken(document, change):
    document = copy.deepcopy(document)
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("links"), "no 'links'"),
        (lambda d: d["metadata"].update(slug="a b"), "metadata.slug='a b'"),
        (lambda d: d["metadata"].update(prompt_tokens=[]), "prompt_tokens"),
        (lambda d: d["nodes"][2].update(node_id="E_4_0"), "two nodes"),
        (lambda d: d["nodes"][0].update(feature=1), "Cantor"),
        (lambda d: d["nodes"][0].update(feature="1"), "whole number or null"),
        (lambda d: d["nodes"][0].update(layer="one"), "layer='one'"),
        (lambda d: d["nodes"][0].update(ctx_idx=2), "not a position"),
        (lambda d: d["nodes"][0].update(feature_type="neuron"), "feature_type='neuron'"),
        (lambda d: d["nodes"][-1].update(clerp="x"), "(p=0.123)"),
        (lambda d: d["links"][0].update(source="nobody"), "is not the id of a node"),
        (lambda d: d["links"][0].update(weight=float("nan")), "must be finite"),
        (lambda d: d["qParams"].update(pinnedIds=3), "pinnedIds=3"),
    ],
)
def test_a_broken_document_is_refused(graph, change, message):
    with pytest.raises(UserError) as refusal:
        check_graph_json(broken(made(graph), change))
    assert message in str(refusal.value)


def test_files_are_listed_for_the_local_server(graph, tmp_path):
    document = made(graph)
    path = write_graph_json(document, tmp_path / "a-graph.json")
    other = write_graph_json(document | {"metadata": document["metadata"] | {"slug": "b"}}, tmp_path / "b.json")
    write_graph_json(document, path)
    assert json.loads(path.read_text()) == document and other.exists()
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [entry["slug"] for entry in listed] == ["b", "a-graph"]
