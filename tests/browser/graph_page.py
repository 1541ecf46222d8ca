"""Click through the page of a graph in a headless Chromium (packages chromium and chromium-driver).

    python -m tests.browser.graph_page OUT      graph.html of a run of experiments.graph

Pictures are written beside the page. circuit-tracer's frontend is in `frontend.py`.
"""

import argparse
import json
from pathlib import Path

from tests.browser.driver import browser


def click_through(out):
    """Everything a reader can do with the page; raises AssertionError where it does not."""
    document = json.loads((out / "graph.json").read_text())
    features = [node for node in document["nodes"] if node["feature_type"] == "cross layer transcoder"]
    strongest = max(document["links"], key=lambda link: abs(link["weight"]))
    with browser() as page:
        page.size(1400, 1000)
        page.open((out / "graph.html").resolve().as_uri())
        count = "return document.querySelectorAll('#canvas .node').length"
        everything = page.run(count)
        assert everything > len(features) and page.run("return document.querySelector('#panel h2').textContent")
        # A node: its inputs, outputs, contexts and logits.
        chosen = features[0]["node_id"]
        page.click(f'.node[data-id="{chosen}"]')
        panel = page.run("return document.getElementById('panel').textContent")
        for heading in ("Inputs", "Outputs", "Logits it raises", "Where it fires most", "activation"):
            assert heading in panel, heading
        assert page.run("return document.querySelectorAll('.link.in, .link.out').length") > 0
        page.picture(out / "page-node.png")
        # Along a link.
        page.click(f'.node[data-id="{strongest["target"]}"]')
        page.click(f'#panel [data-go="{strongest["source"]}"]')
        assert page.run("return document.querySelector('.node.selected').dataset.id") == strongest["source"]
        # The sliders prune, and give back.
        move = (
            "var s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('input'))"
        )
        for name in ("node-threshold", "edge-threshold"):
            before, lines = page.run(count), page.run("return document.querySelectorAll('.link').length")
            page.run(move, name, 0.4)
            assert page.run("return document.querySelectorAll('.link').length") < lines and page.run(count) <= before
            page.run(move, name, 1)
        # Supernodes: pin two nodes, tick them, name the group; the address keeps it.
        for node in features[:2]:
            page.click(f'.node[data-id="{node["node_id"]}"]')
            page.click("#pin")
        assert len(page.find("#chips .chip")) == 2
        for place in range(2):
            page.click("#chips input[type=checkbox]", place)
        page.type("#group-name", "my group")
        page.click("#group")
        assert "my group (2)" in page.run("return document.getElementById('chips').textContent")
        assert "my%20group" in page.run("return location.hash")
        page.run("location.reload()")
        page.wait("return document.getElementById('chips').textContent.includes('my group (2)')")
        page.picture(out / "page-groups.png")
        page.size(420, 900)
        assert page.run("return document.documentElement.scrollWidth <= window.innerWidth + 1"), "too wide for a phone"
        page.picture(out / "page-phone.png")
        assert page.errors() == []
    print(f"{out}/graph.html: {everything} nodes drawn, clicked through without an error")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    click_through(parser.parse_args().out)
