"""The graph that circuit-tracer's frontend draws in `make frontend` is the one that our code writes."""

import copy
import json

import pytest

from tests.browser.frontend import FEATURE_SIGN, GOLDEN
from tests.browser.golden_graph import FOLDER, SLUG, write_golden_graph


def near(made, golden):
    """Equal but for the last digits of numbers."""
    if isinstance(golden, dict):
        return made.keys() == golden.keys() and all(near(made[name], golden[name]) for name in golden)
    if isinstance(golden, list):
        return len(made) == len(golden) and all(map(near, made, golden))
    return made == (pytest.approx(golden, rel=1e-5, abs=1e-6) if isinstance(golden, float) else golden)


def test_our_code_still_writes_the_graph_that_the_frontend_drew(tmp_path):
    write_golden_graph(tmp_path)
    names = {path.relative_to(FOLDER) for path in FOLDER.rglob("*.json")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")} == names
    for name in names:
        made, golden = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (tmp_path, FOLDER))
        assert near(made, golden), name


def test_a_graph_that_differs_is_seen():
    golden = json.loads((FOLDER / f"{SLUG}.json").read_text(encoding="utf-8"))
    assert near(copy.deepcopy(golden), golden)
    for change in (
        lambda graph: graph["links"].pop(),
        lambda graph: graph["links"][3].update(weight=1.001 * graph["links"][3]["weight"]),
        lambda graph: graph["nodes"][0].update(clerp="another"),
        lambda graph: graph["metadata"].pop("schema_version"),
    ):
        made = copy.deepcopy(golden)
        change(made)
        assert not near(made, golden)


def test_the_frontend_drew_every_node_and_link_within_the_slider():
    graph = json.loads((FOLDER / f"{SLUG}.json").read_text(encoding="utf-8"))
    drawn = json.loads(GOLDEN.read_text(encoding="utf-8"))
    limit = graph["metadata"]["node_threshold"]
    always = ("embedding", "logit")
    shown = [n for n in graph["nodes"] if n["feature_type"] in always or n["influence"] <= limit]
    assert {node["id"] for node in drawn["nodes"]} == {node["node_id"] for node in shown} == drawn["clicked"].keys()
    assert 0 < len(graph["nodes"]) - len(shown) <= 1, "the node that passes the threshold is beyond the slider"
    links = {
        (link["source"], link["target"]): link["weight"]
        for link in graph["links"]
        if {link["source"], link["target"]} <= drawn["clicked"].keys()
    }
    assert len(links) > 50
    for id, seen in drawn["clicked"].items():
        assert {tuple(line[:2]) for line in seen["lines"]} == {ends for ends in links if id in ends}
        for other, (_, _, weight) in seen["inputs"].items():
            assert float(weight.replace("−", "-")) == pytest.approx(links[other, id], abs=6e-4)
        assert seen["inputs"].keys() == {source for source, target in links if target == id}
        assert seen["outputs"].keys() == {target for source, target in links if source == id}
    features = [node for node in drawn["nodes"] if node["sign"] == FEATURE_SIGN]
    for node in features:
        layer, index, _ = map(int, node["id"].split("_"))
        assert drawn["clicked"][node["id"]]["detail"] == f"L{layer}/{index}"
        peak = drawn["clicked"][node["id"]]["examples"]["contexts"][1]
        assert node["label"] == f"on “{peak.strip() or '␣'}”"
