"""Click through the explorer in a headless Chromium (packages chromium and chromium-driver).

    python -m tests.browser.explorer RUN OTHER [--axe build/axe/node_modules/axe-core/axe.min.js]

RUN and OTHER: two runs at one array of `jaxinterp transcoder`. The server is started as a user starts it. Then the same
pages as files, without a server; and an index of 100,000 random features, timed. Pictures are written into RUN.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxinterp.evaluation.features.firings import Found, sort_firings, sums_of
from jaxinterp.explore.index import write_index
from tests.browser.driver import browser

READY = "return document.documentElement.dataset.ready"
TEXT = "import os\ndef count(n):\n    # Return the number of rows.\n    return len(n)"
NASTY = "<img src=x onerror=\"document.title='broken'\">"
MANY = 100_000
PATIENCE = 120


@contextmanager
def served(*words):
    """The address of `jaxinterp explore ...`, stopped as Ctrl-C stops it; it must end well."""
    command = [sys.executable, "-u", "-m", "jaxinterp", "explore", *map(str, words), "--port", "0", "--no-open"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
            break
    else:
        raise AssertionError("".join(lines))
    yield found[0]
    process.send_signal(2)
    assert process.wait(30) == 0, "Ctrl-C should end it without an error"


def media(page, features):
    """Light or dark, as a reader's system asks for it."""
    page.send("goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": features})


def soon(page, script):
    """Until a piece of JavaScript returns something true, looked at often enough to be timed."""
    end = time.monotonic() + 20
    while not page.run(script):
        assert time.monotonic() < end, script
        time.sleep(0.01)


def rows(page):
    return page.run("return document.querySelectorAll('.row').length")


def text_of(page, selector):
    return page.run(f"return document.querySelector({selector!r}).textContent")


def search(page, kind, query):
    """The numbers of the features that a search lists."""
    page.run("document.getElementById('q').value = ''")
    page.run(f"document.getElementById('kind').value = {kind!r}")
    page.run("document.getElementById('kind').dispatchEvent(new Event('change'))")
    page.type("#q", f"{query}\ue007")
    page.wait("return document.querySelector('#list .note')?.textContent.includes('features ')")
    time.sleep(0.3)
    return page.run("return [...document.querySelectorAll('.row')].map(row => Number(row.dataset.i))")


def click_through(page, address, out, check):
    """Everything a reader can do; raises AssertionError where it does not work."""
    page.size(1400, 950)
    page.open(address)
    page.wait(READY)
    assert rows(page) == 100
    # Search, and open what was found.
    found = search(page, "token", "number")
    assert found and "fire on this token" in text_of(page, "#list")
    assert search(page, "text", "the number of") and search(page, "raises", "return")
    page.click(".row")
    page.wait("return document.querySelector('#page .feature')")
    panel = text_of(page, "#page")
    for heading in ("Strongest", "Around the median", "Logits it raises", "Write vectors alike", "Fire together"):
        assert heading in panel, heading
    check(page, "feature")
    # Label: saved, escaped, there after the page is loaded again.
    feature = int(page.run("return location.hash.split('/')[2]"))
    page.type("#label", NASTY + "\ue007")
    page.wait("return document.getElementById('status').textContent === 'Label saved.'")
    page.run("location.reload()")
    page.wait(READY)
    page.wait("return document.getElementById('label')")
    assert page.run("return document.getElementById('label').value") == NASTY
    assert search(page, "label", "onerror") == [feature] and "broken" not in page.run("return document.title")
    assert page.run("return document.querySelectorAll('main img').length") == 0
    page.run("document.getElementById('label').value = ''")
    page.type("#label", "numbers of things\ue007")
    page.wait("return document.querySelector('.row .label')?.textContent === 'numbers of things'")
    page.click("#ablate")
    page.wait("return document.querySelector('.effect').textContent.includes('nats')", PATIENCE)
    for heading in ("Next tokens it raises", "Heads that make it fire"):
        assert heading in text_of(page, ".effect"), heading
    check(page, "effect")
    page.picture(out / "explore-feature.png")
    # Your own text.
    page.run("location.hash = '#/text'")
    page.wait("return document.getElementById('own')")
    page.type("#own", TEXT)
    page.click("form.card button")
    page.wait("return document.querySelectorAll('.fired').length > 3", PATIENCE)
    page.click(".snippet button", 5)
    assert "On token 5" in text_of(page, "#fires")
    check(page, "text")
    page.picture(out / "explore-text.png")
    # Steer: a stronger one has a larger KL; none has 0; the same seed gives the same text.
    page.run(f"location.hash = '#/steer/{feature}'")
    page.wait("return document.getElementById('prompt')")
    page.type("#prompt", "Return the")
    kls, texts = [], []
    for strength in (0, 4, 16, 16):
        page.run("document.getElementById('out').replaceChildren(); document.getElementById('temperature').value = 0.8")
        page.run(f"document.getElementById('strength').value = {strength}")
        page.click("form.card button")
        page.wait("return document.querySelector('.kl')", PATIENCE)
        kls.append(float(text_of(page, ".kl b").replace("×10", "e").replace("−", "-")))
        texts.append(page.run("return [...document.querySelectorAll('.generated')].map(p => p.textContent)"))
    assert kls[0] < 1e-5 < kls[1] < kls[2] == kls[3], kls
    assert texts[2] == texts[3] and texts[0][0] == texts[0][1], texts
    check(page, "steer")
    page.picture(out / "explore-steer.png")
    # Compare.
    page.run("location.hash = '#/compare'")
    page.wait("return document.querySelectorAll('.pairing').length === 50")
    cosines = page.run("return [...document.querySelectorAll('.pairing b')].map(b => b.textContent)")
    values = [float(each.removeprefix("= ").replace("−", "-")) for each in cosines]
    assert values == sorted(values, reverse=True)
    page.click(".pairing")
    page.wait("return document.querySelectorAll('#both article').length === 2")
    check(page, "compare")
    page.picture(out / "explore-compare.png")
    # Keys.
    page.run("location.hash = '#/'")
    page.wait("return document.querySelector('#list .note')")
    assert len(search(page, "token", "number")) > 2
    keys = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))"
    page.run("document.activeElement.blur()")
    for key in "jjk":
        page.run(keys, key)
    assert page.run("return document.activeElement.classList.contains('marked')")
    page.run(keys, "/")
    assert page.run("return document.activeElement.id") == "q"
    page.run("document.activeElement.blur()")
    page.run(keys, "?")
    assert page.run("return document.getElementById('help').open")
    page.click("#help button")
    # A phone: nothing is wider than the window, one pane at a time.
    page.size(390, 844)
    for place in ("#/", f"#/f/{feature}", "#/text", "#/steer/1", "#/compare"):
        page.run(f"location.hash = {place!r}")
        time.sleep(0.8)
        width = page.run("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= max(width[1], 390) + 1, (place, width)
    page.run(f"location.hash = '#/f/{feature}'")
    time.sleep(0.8)
    assert page.run("return getComputedStyle(document.querySelector('.side')).display") == "none"
    check(page, "phone")
    page.picture(out / "explore-phone.png")
    assert page.errors() == []
    return feature


def axe_checks(path, found):
    """A function that looks for accessibility issues on the page as it is, in the light and in the dark."""
    if path is None:
        return lambda page, where: None
    source = path.read_text()

    def check(page, where):
        for scheme in ("light", "dark"):
            media(page, {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            page.run(source)
            page.run("window.axeDone = null; axe.run().then(found => { window.axeDone = found })")
            answer = page.wait("return window.axeDone && JSON.stringify(window.axeDone.violations)", 60)
            for one in json.loads(answer):
                nodes = [node["html"][:160] + " " + node["failureSummary"][:200] for node in one["nodes"][:3]]
                found.append((where, scheme, one["impact"], one["id"], nodes))
        media(page, {"features": []})

    return check


def many_features(folder):
    """An index of `MANY` random features, 5 million firings, and labels; as `write_index` writes any."""
    random = np.random.default_rng(0)
    windows, seq, count = 200, 256, 5_000_000
    feature = (MANY * random.random(count) ** 2).astype(np.int32)  # frequent and rare ones
    token = random.integers(0, windows * seq, count)
    once = np.unique(feature.astype(np.int64) * windows * seq + token)
    feature, token = (once // (windows * seq)).astype(np.int32), once % (windows * seq)
    values = random.exponential(size=len(once)).astype(np.float32)
    firings = sort_firings([Found(feature, token, values)], MANY, windows * seq)
    vectors = random.normal(size=(MANY, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    arrays = {
        "tokens": random.integers(0, 5000, (windows, seq)).astype(np.int32),
        "document": np.zeros((windows, seq), np.int32),
        **firings._asdict(),
        **{f"sum_{name}": value for name, value in sums_of(firings)._asdict().items()},
        "read": vectors,
        "write": vectors[::-1],
        **{name: random.integers(0, 5000, (MANY, 10)).astype(np.int32) for name in ("raised", "lowered")},
        **{f"{name}_by": np.sort(random.random((MANY, 10)).astype(np.float32)) for name in ("raised", "lowered")},
    }
    about = {
        "model": "random", "source": "", "reads": "blocks/0/mlp/in", "writes": "blocks/0/mlp/out", "features": MANY,
        "kind": "random", "tokens": windows * seq, "windows": windows, "whole": True,
    }  # fmt: skip
    return write_index(folder, about, [f"w{n}" for n in range(5000)], arrays)


SERVE = """
import sys, time
clock = time.perf_counter()
from jaxinterp.explore.index import open_index
from jaxinterp.explore.labels import Labels
from jaxinterp.explore.server import listener, server_of
from jaxinterp.explore.state import Explorer
loaded = time.perf_counter()
index = open_index(sys.argv[1])
explorer = Explorer(index, Labels(sys.argv[1] + '/labels.json', index.features))
sock = listener(0)
print(sock.getsockname()[1], time.perf_counter() - loaded, loaded - clock, flush=True)
server_of(explorer, sock).run(sockets=[sock])
"""


def large(page):
    """The times of an index of 100,000 features: to open it, to show the first page, a feature, a search."""
    with tempfile.TemporaryDirectory() as folder:
        many_features(Path(folder))
        process = subprocess.Popen([sys.executable, "-c", SERVE, folder], stdout=subprocess.PIPE, text=True)
        try:
            port, opened, imported = process.stdout.readline().split()
            page.size(1400, 950)
            times = {"imports": float(imported), "open the index": float(opened)}
            opens = []
            for _ in range(3):  # the machine may be busy with something else
                page.open("about:blank")
                start = time.perf_counter()
                page.open(f"http://127.0.0.1:{port}/")
                soon(page, READY)
                opens.append(time.perf_counter() - start)
            times["first page"] = min(opens)
            assert rows(page) == 100 and f"of {MANY:,}" in text_of(page, "#list")
            start = time.perf_counter()
            page.run("location.hash = '#/f/70000'")
            soon(page, "return document.querySelector('#page h2')?.textContent === 'Feature #70000'")
            times["a feature"] = time.perf_counter() - start
            start = time.perf_counter()
            page.type("#q", "w17\ue007")
            soon(page, "return document.querySelector('#list .note')?.textContent.includes('fire on')")
            times["a search"] = time.perf_counter() - start
            assert page.errors() == []
        finally:
            process.terminate()
            process.wait(20)
    print(f"{MANY:,} features: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items()))
    assert times["open the index"] < 1 and times["first page"] < 1, times
    return times


def as_files(page, folder, feature):
    """The export, opened from the disk."""
    page.size(1400, 950)
    page.open((folder / "index.html").resolve().as_uri())
    page.wait(READY)
    assert rows(page) == 100 and page.run("return document.querySelectorAll('#nav a').length") == 1
    assert search(page, "label", "numbers of things") == [feature]
    page.click(".row")
    page.wait("return document.querySelector('#page .feature')")
    assert "Strongest" in text_of(page, "#page") and page.errors() == []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--axe", type=Path)
    options = parser.parse_args()
    issues: list = []
    with browser() as page, tempfile.TemporaryDirectory() as folder:
        large(page)
        (options.run / "labels.json").unlink(missing_ok=True)
        for path in (options.run / "explore" / "effects").glob("*.json"):
            path.unlink()
        size = ("--tokens", "20000")
        with served(options.run, "--compare", options.other, *size) as address:
            feature = click_through(page, address, options.run, axe_checks(options.axe, issues))
        start = time.perf_counter()
        with served(options.run, *size):
            print(f"started again in {time.perf_counter() - start:.1f} s: nothing was read anew")
        words = ["explore", options.run, *size, "--export", f"{folder}/site"]
        subprocess.run([sys.executable, "-m", "jaxinterp", *map(str, words)], check=True, capture_output=True)
        as_files(page, Path(folder) / "site", feature)
    for where, scheme, impact, name, nodes in issues:
        print(f"accessibility, {where}, {scheme}: {impact} {name}: {nodes}")
    assert not [one for one in issues if one[2] in ("serious", "critical")], "serious accessibility issues"
    print("explorer: clicked through" + ("" if options.axe is None else "; axe-core found no serious issue"))


if __name__ == "__main__":
    main()
