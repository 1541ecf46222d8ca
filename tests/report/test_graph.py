"""The page of a graph: what the script reads is the document that other tools open, and nothing breaks out of it."""

import json
import re

import numpy as np
import pytest

from jaxinterp.causal.graphs.contexts import About, Context
from jaxinterp.causal.graphs.graph import Graph
from jaxinterp.causal.graphs.prune import prune
from jaxinterp.causal.graphs.schema import graph_json
from jaxinterp.core.errors import UserError
from jaxinterp.report.graph import link_shares, write_graph_page


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


def text(id):
    return f"</script>{id}"


@pytest.fixture
def parts(graph):
    kept = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    return kept, graph_json(graph, kept, slug="g", scan="s", prompt="<b>ab</b>", token_text=text)


def test_the_page_holds_the_document_and_loads_nothing(graph, parts, tmp_path):
    kept, document = parts
    about = {(1, 7): About(0.25, (Context((4, 5), (0.0, 2.0), 1),), ((4, 1.5),), ((5, -0.5),))}
    path = write_graph_page(graph, kept, document, tmp_path / "g.html", token_text=text, about=about)
    page = path.read_text()
    data = re.search(r'<script type="application/json" id="graph-data">(.*?)</script>', page, re.DOTALL)
    read = json.loads(data.group(1))
    assert read["graph"] == document
    assert read["extra"]["features"]["1_7"]["contexts"][0]["tokens"] == [text(4), text(5)]
    assert read["extra"]["bias"]["1_7_1"] == 0.25 and len(read["extra"]["shares"]) == len(document["links"])
    assert "default-src 'none'" in page and "<b>ab</b>" not in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", page)


def test_shares_of_links_rise_to_one_from_the_most_important(graph, parts):
    kept, document = parts
    shares = link_shares(graph, kept, document)
    assert max(shares) == pytest.approx(1.0) and min(shares) > 0 and len(set(shares)) == len(shares)
    weights = {(link["source"], link["target"]): share for link, share in zip(document["links"], shares, strict=True)}
    assert weights["1_7_1", "3_4_1"] < weights["1_7_1", "3_6_1"]  # the same source, a more probable target


def test_a_document_that_breaks_the_schema_is_refused(graph, parts, tmp_path):
    kept, _ = parts
    with pytest.raises(UserError, match="no 'links'"):
        write_graph_page(
            graph, kept, {"metadata": {}, "qParams": {}, "nodes": []}, tmp_path / "g.html", token_text=text
        )
