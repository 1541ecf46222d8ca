"""Click through the page of a graph in a headless Chromium (packages chromium and chromium-driver).

    python -m tests.browser.graph_page OUT                      graph.html of a run of experiments.graph
    python -m tests.browser.graph_page OUT --frontend ASSETS --libraries NODE_MODULES
                                                                the same run's graph.json in circuit-tracer's frontend

ASSETS: its static files (circuit_tracer/frontend/assets of the wheel circuit-tracer==0.5.0 or of the repository).
NODE_MODULES: what `npm install d3@7 d3-jetpack@2 dagre@0.8.5 pako@2.1.0` installed; they take the place of the scripts
that the frontend loads from elsewhere. Pictures are written beside the page.
"""

import argparse
import functools
import http.server
import json
import re
import shutil
import tempfile
import threading
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


LIBRARIES = ("d3-jetpack/build/d3v7+jetpack.js", "dagre/dist/dagre.min.js", "pako/dist/pako.min.js")
"""d3 and d3-jetpack in one, dagre, pako."""


AXIS = (
    "var make = d3.conventions;"
    "try { d3.conventions = withAxis } catch (e) { window.d3 = Object.assign({}, d3, {conventions: withAxis}) }"
    "function withAxis(o) { var c = make(o); c.drawAxis = function (g) {"
    "return d3.drawAxis(Object.assign({}, c, {svg: g})) }; return c }"
)
"""The frontend's own d3-jetpack gives `conventions` an axis; the published one has a function for it."""


def in_their_frontend(out, assets, libraries):
    """circuit-tracer's frontend draws the nodes and links of our JSON."""
    document = json.loads((out / "graph.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(assets, root, dirs_exist_ok=True)
        for name in LIBRARIES:
            shutil.copy(libraries / name, root)
        # The bundle holds d3-selection twice, and jetpack's methods are on the copy that d3 does not use.
        bundle = root / Path(LIBRARIES[0]).name
        head, mark, methods = bundle.read_text().partition("selection.prototype.translate = ")
        methods = methods.replace("  selection.prototype.", "  selection$1.prototype.")
        bundle.write_text(head + "selection$1.prototype.translate = " + methods if mark else head)
        index = root / "index.html"
        own = "".join(f"<script src='./{Path(name).name}'></script>" for name in LIBRARIES)
        own += f"<script>{AXIS}</script>"
        outside = re.compile(r"(<script src='https://[^>]*></script>\s*)+")
        index.write_text(outside.sub(own, index.read_text()))
        for data in ("graph_data", "data"):
            (root / data).mkdir(exist_ok=True)
            shutil.copy(out / "graph.json", root / data / f"{document['metadata']['slug']}.json")
            shutil.copy(out / "graph-metadata.json", root / data)
        shutil.copytree(out / "features", root / "features", dirs_exist_ok=True)
        handler = functools.partial(_Quiet, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            with browser() as page:
                page.size(1500, 1100)
                page.open(f"http://127.0.0.1:{server.server_port}/index.html?slug={document['metadata']['slug']}")
                drawn = page.wait("return document.querySelectorAll('text.node').length")
                page.picture(out / "their-frontend.png")
            server.shutdown()
    wanted = len(document["nodes"])
    assert drawn >= 0.9 * wanted, f"{drawn} of {wanted} nodes are drawn"
    print(f"circuit-tracer's frontend draws {drawn} of {wanted} nodes")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--frontend", type=Path)
    parser.add_argument("--libraries", type=Path)
    options = parser.parse_args()
    if options.frontend is None:
        click_through(options.out)
    else:
        in_their_frontend(options.out, options.frontend, options.libraries)
