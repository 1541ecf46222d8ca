"""circuit-tracer's frontend draws our graph in a headless Chromium; what it drew is compared with a golden.

    python -m tests.browser.frontend ASSETS NODE_MODULES              goldens/graph, against goldens/drawn.json
    python -m tests.browser.frontend ASSETS NODE_MODULES --write      writes that golden again
    python -m tests.browser.frontend ASSETS NODE_MODULES --graph OUT  any run of experiments.graph: print counts

ASSETS: the static files in the wheel circuit-tracer==0.5.0 (circuit_tracer/frontend/assets); NODE_MODULES: what `npm
install d3@7 d3-jetpack@2 dagre@0.8.5 pako@2.1.0` makes (`make frontend` fetches both). Compared are nodes (id, sign,
label, row, column), tick labels, and for every node that is clicked the lines on the canvas (from, to, colour, width),
the list of its inputs and outputs with their shares, and what is shown of a feature. No pixels.

The frontend loads six scripts from elsewhere. d3 and d3-jetpack (as one bundle), dagre and pako are those of npm; two
are left out: `hotserver-client-ws.js` reloads the page of who develops it, `npy_v0.js` reads a file format that graphs
do not use. Features' files come from a host outside, too; here that address leads to our own files.
"""

import argparse
import functools
import http.server
import json
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

from tests.browser.driver import browser
from tests.browser.golden_graph import FOLDER, SLUG

GOLDEN = FOLDER.parent / "drawn.json"
FEATURE_SIGN = "●"
LIBRARIES = ("d3-jetpack/build/d3v7+jetpack.js", "dagre/dist/dagre.min.js", "pako/dist/pako.min.js")

BEFORE = """
var make = d3.conventions;  // the frontend's own jetpack gives `conventions` an axis, the published one a function
try { d3.conventions = withAxis } catch (e) { window.d3 = Object.assign({}, d3, {conventions: withAxis}) }
function withAxis(o) {
  var c = make(o); c.drawAxis = g => d3.drawAxis(Object.assign({}, c, {svg: g})); return c }
var own = window.fetch;     // what hosts outside would answer: no such repository; and our features' files
window.fetch = function (path, options) {
  if (String(path).startsWith('https://huggingface.co/')) return Promise.resolve(new Response('', {status: 404}));
  return own(String(path).replace(/^https:.*?[/]features[/]/, './features/'), options) };
window.canvases = [];       // lines drawn since each canvas was cleared
var proto = CanvasRenderingContext2D.prototype, clear = proto.clearRect, move = proto.moveTo, line = proto.lineTo,
  stroke = proto.stroke;
proto.clearRect = function () {
  if (!this.lines) canvases.push(this); this.lines = []; return clear.apply(this, arguments) };
proto.moveTo = function (x, y) { this.from = [x, y]; return move.apply(this, arguments) };
proto.lineTo = function (x, y) { this.to = [x, y]; return line.apply(this, arguments) };
proto.stroke = function () {
  if (this.lines) this.lines.push([this.from, this.to, this.strokeStyle, this.lineWidth]);
  return stroke.apply(this, arguments) };
"""

DRAWN = """
var nodes = [...document.querySelectorAll('text.node')].map(e => e.__data__);
var signs = Object.fromEntries([...document.querySelectorAll('text.node')].map(
  e => [e.__data__.nodeId, e.textContent]));
return {
  nodes: nodes.map(d => ({id: d.nodeId, sign: signs[d.nodeId], label: d.ppClerp, row: d.streamIdx, column: d.ctx_idx})),
  tokens: [...document.querySelectorAll('.link-graph .prompt-token text')].map(e => e.textContent),
  logits: [...document.querySelectorAll('.link-graph .axis g text')].map(e => e.textContent)
    .filter(t => !/^(L[0-9]+|Emb|Lgt|)$/.test(t)),
  title: document.title,
}
"""

CLICK = """
var node = [...document.querySelectorAll('text.node')].find(e => e.__data__.nodeId === arguments[0]);
var place = node.getBoundingClientRect();
node.dispatchEvent(new MouseEvent('click', {bubbles: true, clientX: place.x + place.width / 2,
  clientY: place.y + place.height / 2, view: window}));
"""

CLICKED = """
var at = {}; document.querySelectorAll('text.node').forEach(e => { at[e.__data__.pos] = e.__data__.nodeId });
var lines = canvases.flatMap(c => c.lines).filter(l => l[2] !== '#000000' && l[2] !== '#000')
  .map(([from, to, colour, width]) => [at[from], at[to], colour, Math.round(100 * width) / 100]);
var rows = kind => Object.fromEntries([
  ...document.querySelectorAll('.node-connections .' + kind + ' .feature-row')
].map(e => [e.__data__.nodeId, ['.label', '.layer', '.weight'].map(name => e.querySelector(name).textContent)]));
return {
  header: document.querySelector('.node-connections .feature-title')?.textContent,
  inputs: rows('features.input'), outputs: rows('features.output'), lines,
  detail: document.querySelector('.feature-detail .feature-title')?.firstElementChild?.textContent ?? null,
}
"""

EXAMPLES = """
if (document.querySelector('.feature-examples-container').style.opacity !== '1') return null;
var texts = s => [...document.querySelectorAll('.feature-detail ' + s)].map(e => e.textContent);
return texts('.feature-example-list .token').length
  ? {contexts: texts('.feature-example-list .token'), logits: texts('.feature-example-logits .token')} : null;
"""


def assemble(root, assets, libraries, graph):
    """The frontend, its libraries and a graph's files in one folder; the graph's slug."""
    shutil.copytree(assets, root, dirs_exist_ok=True)
    for name in LIBRARIES:
        shutil.copy(libraries / name, root)
    # The bundle holds d3-selection twice, and jetpack's methods are on the copy that d3 does not use.
    bundle = root / Path(LIBRARIES[0]).name
    head, mark, methods = bundle.read_text().partition("selection.prototype.translate = ")
    methods = methods.replace("  selection.prototype.", "  selection$1.prototype.")
    bundle.write_text(head + "selection$1.prototype.translate = " + methods if mark else head)
    index = root / "index.html"
    own = "".join(f"<script src='./{Path(name).name}'></script>" for name in LIBRARIES) + f"<script>{BEFORE}</script>"
    page, replaced = re.subn(r"(<script src='https://[^>]*></script>\s*)+", lambda _: own, index.read_text())
    assert replaced == 1 and "https://" not in page.replace(BEFORE, ""), "the frontend loads other scripts than it did"
    index.write_text(page)
    (document,) = (path for path in graph.glob("*.json") if path.stem not in ("graph-metadata", "checks"))
    slug = json.loads(document.read_text())["metadata"]["slug"]
    scan = json.loads(document.read_text())["metadata"]["scan"]
    for data in ("graph_data", "data"):
        (root / data).mkdir(exist_ok=True)
        shutil.copy(document, root / data / f"{slug}.json")
        shutil.copy(graph / "graph-metadata.json", root / data)
    features = graph / "features"
    shutil.copytree(features / scan if (features / scan).is_dir() else features, root / "features" / scan)
    return slug


def drawn(assets, libraries, graph, picture=None, most=None):
    """What the frontend draws of a graph, as in the module's text; `most` nodes are clicked."""
    with tempfile.TemporaryDirectory() as folder:
        slug = assemble(Path(folder), assets, libraries, graph)
        handler = functools.partial(_Quiet, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            with browser() as page:
                page.size(1500, 1100)
                page.open(f"http://127.0.0.1:{server.server_port}/index.html?slug={slug}")
                page.wait("return document.querySelectorAll('text.node').length")
                found = page.run(DRAWN)
                found["nodes"].sort(key=lambda node: node["id"])
                found["clicked"] = {node["id"]: clicked(page, node) for node in found["nodes"][:most]}
                if picture:
                    page.picture(picture)
                assert page.errors() == []
            server.shutdown()
    return found


def clicked(page, node):
    """What a click on a node shows."""
    page.run(CLICK, node["id"])
    page.wait(f"return new URL(location).searchParams.get('clickedId') === {json.dumps(node['id'])}")
    feature = node["sign"] == FEATURE_SIGN
    if feature:
        time.sleep(0.6)  # the frontend draws examples at most every 200 ms, and until then shows another feature's
    found = page.run(CLICKED) | ({"examples": page.wait(EXAMPLES)} if feature else {})
    found["lines"].sort()
    page.run(CLICK, node["id"])
    return found


def as_lines(found):
    """JSON with a line for every node and every click."""
    line = functools.partial(json.dumps, ensure_ascii=False, sort_keys=True)
    clicks = ",\n".join(f"{line(id)}: {line(seen)}" for id, seen in found["clicked"].items())
    nodes = ",\n".join(map(line, found["nodes"]))
    rest = "".join(f"{line(name)}: {line(found[name])},\n" for name in found if name not in ("clicked", "nodes"))
    return f'{{\n{rest}"nodes": [\n{nodes}\n],\n"clicked": {{\n{clicks}\n}}\n}}\n'


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("libraries", type=Path)
    parser.add_argument("--graph", type=Path, default=FOLDER)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    own = options.graph == FOLDER
    found = drawn(options.assets, options.libraries, options.graph, options.picture, None if own else 3)
    links = {tuple(line[:2]) for node in found["clicked"].values() for line in node["lines"]}
    print(f"circuit-tracer's frontend draws {len(found['nodes'])} nodes and, clicked, {len(links)} links")
    if not own:
        return
    if options.write:
        GOLDEN.write_text(as_lines(found), encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    differ = [name for name in sorted({*golden, *found}) if golden.get(name) != found.get(name)]
    ids = [id for id in golden["clicked"] if golden["clicked"][id] != found["clicked"].get(id)]
    assert found == golden, f"{GOLDEN.name}: another {', '.join(differ)} was drawn; clicked nodes that differ: {ids}"
    print(f"{SLUG}: all as in {GOLDEN.name}")


if __name__ == "__main__":
    main()
