"""The index and what is read from it: built once, resumed, refused by name; lists, search, pages; labels; matches."""

import json
import os

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.explore import answers, build, live
from jaxinterp.explore.build import build_index, digest, finished
from jaxinterp.explore.compare import nearest_rows, pair, pair_rows
from jaxinterp.explore.export import export
from jaxinterp.explore.index import open_index
from jaxinterp.explore.labels import Labels
from jaxinterp.models.run import run
from jaxinterp.report.features import feature_pages
from tests.explore.conftest import ASKED, SEQ, WINDOWS

SIZE = {"tokens": WINDOWS * SEQ}


@pytest.fixture(scope="module")
def page(index):
    busiest = int(np.argmax(index.sums.fired))
    return busiest, answers.feature(index, busiest, {busiest: "mine"})


def test_a_page_says_what_the_report_s_page_says(index, subject, dictionary, dataset, page):
    """Two ways to the same numbers: density, peaks, direct logits, cosine of the vectors."""
    busiest, found = page
    densities, (report,) = feature_pages(dictionary, subject, dataset, features=[busiest], contexts=8, **SIZE)
    np.testing.assert_allclose(index.sums.fired / index.counted, densities, rtol=1e-6)
    assert found["largest"] == pytest.approx(report.max_activation, rel=1e-3)
    assert found["cosine"] == pytest.approx(report.read_write_cosine, rel=1e-3)
    assert [word for word, _ in found["raised"][:8]] == [word for word, _ in report.raised]
    np.testing.assert_allclose([v for _, v in found["lowered"][:8]], [v for _, v in report.lowered], rtol=1e-3)
    tops = [each for each in found["contexts"] if each["group"] == "top"]
    for ours, theirs in zip(tops, report.contexts, strict=False):
        assert ours["tokens"] == list(theirs.tokens) and ours["peak"] == theirs.peak
        np.testing.assert_allclose(ours["values"], theirs.activations, rtol=1e-3, atol=1e-6)
    assert sum(found["histogram"]["counts"]) == found["fired"] == index.sums.fired[busiest]
    assert found["label"] == "mine" and len({each["window"] for each in found["contexts"]}) == len(found["contexts"])


def test_neighbours_and_correlated_features_do_not_hold_the_feature_itself(index, dictionary, page):
    busiest, found = page
    rows = np.asarray(dictionary.decoder)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.argsort(-(rows @ rows[busiest]))[1:9]
    assert [j for j, _ in found["neighbours"]["write"]] == expected.tolist()
    assert busiest not in [j for j, _ in found["correlated"]] and found["correlated"][0][1] > 0


def test_lists_are_pages_in_three_orders(index):
    everything = [row for first in range(0, index.features, 50) for row in
                  answers.rows(index, {}, order="density", first=first, count=50)["rows"]]  # fmt: skip
    densities = [row["density"] for row in everything]
    assert len(everything) == index.features and densities == sorted(densities, reverse=True)
    assert [row["i"] for row in answers.rows(index, {}, order="index", count=3)["rows"]] == [0, 1, 2]
    for wrong in ({"order": "beauty"}, {"first": -1}, {"count": 0}, {"count": 201}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            answers.rows(index, {}, **wrong)


def test_search_by_number_token_text_logit_and_label(index):
    text = "".join(chr(token) for token in index.tokens.reshape(-1)[:SEQ])
    token = text[5]
    found = answers.search(index, {}, "token", token)
    scores = [row["score"] for row in found["rows"]]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    best = found["rows"][0]["i"]
    where, _ = index.firings.of(best)
    assert (index.tokens.reshape(-1)[where] == ord(token)).any()
    places = answers.positions_of_text(index, text[5:9].upper())  # in lower case, across tokens
    assert {5, 6, 7, 8} <= set(places.tolist())
    assert answers.positions_of_text(index, text[-2:] + "x").size == 0
    boundary = text[-1] + chr(index.tokens[1, 0])  # not from one window into the next
    assert SEQ - 1 not in answers.positions_of_text(index, boundary) or text.count(boundary)
    assert answers.search(index, {}, "text", text[5:9])["rows"]
    word = index.word(index.raised[3][0])
    rows = answers.search(index, {}, "raises", word)["rows"]
    assert 3 in [row["i"] for row in rows] and [r["score"] for r in rows] == sorted([r["score"] for r in rows])[::-1]
    assert [row["i"] for row in answers.search(index, {7: "Latin verbs"}, "label", "verb")["rows"]] == [7]
    assert answers.search(index, {}, "id", "#12")["rows"][0]["i"] == 12
    refused = [("id", "9999", "numbered 0 to 127"), ("id", "-1", "numbered"), ("token", "xyzzy", "as text")]
    for kind, query, said in [*refused, ("text", "", "empty"), ("smell", "a", "kind=")]:
        with pytest.raises(UserError, match=said):
            answers.search(index, {}, kind, query)


def test_an_index_is_built_once_and_refused_for_another_question(
    index, subject, dictionary, dataset, monkeypatch, tmp_path
):
    monkeypatch.setattr(build, "find_firings", lambda *_, **__: pytest.fail("it was read again"))
    again = build_index(index.folder, dictionary, subject, dataset, ASKED, **SIZE)
    np.testing.assert_array_equal(again.firings.where, index.firings.where)
    with pytest.raises(UserError, match=r"dictionary='made for tests', not 'another'.*--rebuild"):
        build_index(index.folder, dictionary, subject, dataset, ASKED | {"dictionary": "another"}, **SIZE)
    assert not finished(tmp_path / "none", {}) and not (index.folder / "parts").exists()


def test_a_build_that_was_stopped_goes_on(index, subject, dictionary, dataset, tmp_path, monkeypatch):
    """Two windows a batch; the second batch is interrupted; what was read is not read again."""
    real, calls = build.find_firings, []
    monkeypatch.setattr("jaxinterp.evaluation.features.peaks.MOST_CODES", 2 * SEQ * dictionary.features)

    def stopped(*given, skip):
        for number, part in enumerate(real(*given, skip=skip)):
            calls.append(part[0])
            if number == 2 and len(calls) == 3:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(build, "find_firings", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path, dictionary, subject, dataset, ASKED, **SIZE)
    with pytest.raises(UserError, match="no index in"):
        open_index(tmp_path)
    told = []
    made = build_index(tmp_path, dictionary, subject, dataset, ASKED, **SIZE, say=lambda *at: told.append(at))
    assert calls == [2, 4, 6, 6, 8, 10] and told[0] == (4 * SEQ, 10 * SEQ) and told[-1] == (10 * SEQ, 10 * SEQ)
    np.testing.assert_array_equal(made.firings.where, index.firings.where)
    np.testing.assert_allclose(made.firings.values, index.firings.values, rtol=1e-4)
    cut = build_index(tmp_path / "cut", dictionary, subject, dataset, ASKED, **SIZE, most_firings=700)
    assert cut.about["windows"] < WINDOWS and not cut.about["whole"]


def test_a_damaged_index_is_one_line(index, tmp_path):
    for name, content in (("index.json", "{"), ("starts.npy", ""), ("vocabulary.json", "[")):
        folder = tmp_path / name
        folder.mkdir()
        for path in index.folder.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=r"damaged.*--rebuild"):
            open_index(folder)


def test_arrays_that_would_run_code_are_not_read(index, tmp_path):
    for path in index.folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    np.save(tmp_path / "where.npy", np.array([os.system], object), allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        open_index(tmp_path)


def test_a_digest_is_of_names_and_bytes(tmp_path):
    (tmp_path / "a").write_text("1")
    first = digest(tmp_path)
    assert first == digest(tmp_path)
    record = tmp_path / "explore" / "digest.json"
    assert digest(tmp_path, record) == first == digest(tmp_path, record)
    (tmp_path / "labels.json").write_text("{}")
    assert digest(tmp_path, record) == first
    (tmp_path / "a").write_text("2")
    assert digest(tmp_path, record) == digest(tmp_path) != first
    record.write_text("[]")
    assert digest(tmp_path, record) == digest(tmp_path)


def test_labels_are_written_in_one_step_and_read_again(tmp_path):
    path = tmp_path / "labels.json"
    labels = Labels(path, 10)
    assert labels.all() == {}
    nasty = "<script>alert(1)</script>  \n {{ 7*7 }}"
    assert labels.write(3, nasty) == {3: "<script>alert(1)</script> {{ 7*7 }}"} and labels.write(2, "b")
    assert Labels(path, 10).all() == {2: "b", 3: "<script>alert(1)</script> {{ 7*7 }}"}
    assert labels.write(3, " ") == {2: "b"} and json.loads(path.read_text())["labels"] == {"2": "b"}
    for feature, text, said in ((10, "a", "feature=10 must be"), (1, "x" * 501, "at most 500")):
        with pytest.raises(UserError, match=said):
            labels.write(feature, text)
    path.write_text("not JSON")
    with pytest.raises(UserError, match="damaged"):
        labels.write(1, "a")
    assert path.read_text() == "not JSON" and not list(tmp_path.glob(".*"))


def test_matches_of_two_dictionaries_are_found_in_any_order(index, tmp_path):
    random = np.random.default_rng(3)
    mixed = random.permutation(index.features)
    nearest, cosine, mutual = nearest_rows(index.write, index.write[mixed], rows=50)
    assert (mixed[nearest] == np.arange(index.features)).all() and cosine.min() > 0.999 and mutual.all()
    other, ours = random.normal(size=(5, 8)).astype(np.float32), random.normal(size=(7, 8)).astype(np.float32)
    nearest, cosine, mutual = nearest_rows(ours, other, rows=3)
    products = ours @ other.T
    np.testing.assert_array_equal(nearest, products.argmax(1))
    assert [bool(products[:, j].argmax() == i) for i, j in enumerate(nearest)] == mutual.tolist()
    same = pair(index, index, ("a", "b"))
    assert pair(index, index, ("a", "b")).cosine.tolist() == same.cosine.tolist()  # read, not made
    rows = pair_rows(index, same, {}, count=5)["rows"]
    assert all(row["ours"]["i"] == row["theirs"]["i"] and row["cosine"] == 1 for row in rows)
    with pytest.raises(UserError, match="order='size' must be"):
        pair_rows(index, same, {}, order="size")


def test_an_export_is_scripts_of_json_and_the_page(explorer, tmp_path):
    explorer.labels.write(1, "</script><script>alert(1)</script>")
    page = export(explorer, tmp_path / "site")
    about, rows, features = ((page.parent / "data" / f"{name}.js").read_text()
                             for name in ("about", "rows-00000", "features-00003"))  # fmt: skip
    assert json.loads(about.removeprefix("window.EXPORT = ").rstrip(";\n"))["live"] is False
    lines = json.loads(rows.removeprefix('explorerData("rows-00000", ').rstrip(");\n") + "")
    assert [line["i"] for line in lines] == list(range(128)) and lines[1]["label"].startswith("</script>")
    last = json.loads(features.removeprefix('explorerData("features-00003", ').rstrip(");\n"))
    assert [one["i"] for one in last] == list(range(96, 128))
    html = page.read_text()
    assert 'src="data/about.js"' in html and "http" not in html and 'src="/' not in html
    with pytest.raises(UserError, match="not empty"):
        export(explorer, tmp_path / "site")


def test_your_own_text_token_by_token(explorer, subject, dictionary):
    text = "abcab"
    found = explorer.fires_on(text)
    codes = np.asarray(dictionary.encode(run(subject.model, subject.tokens(text))["blocks/1/mlp/in"]).dense())[0]
    assert found["tokens"] == list(text)
    for at, fires in enumerate(found["fires"]):
        assert {j for j, _ in fires} == set(np.flatnonzero(codes[at]))
        assert fires[0][1] == pytest.approx(np.abs(codes[at]).max(), rel=1e-2)
    one = found["features"][0]
    np.testing.assert_allclose(one["values"], codes[:, one["i"]], rtol=1e-2, atol=1e-4)


def test_the_kl_of_steering_is_that_of_both_distributions(explorer, subject, dictionary):
    feature = int(np.argmax(explorer.index.sums.fired))
    still = explorer.steered("abc", feature, 0.0, 3, 0.0, 0)
    moved = explorer.steered("abc", feature, 10.0, 3, 0.0, 0)
    assert still["kl"] < 1e-5 and still["agrees"] and still["plain"] == still["steered"] == moved["plain"]
    vector = moved["amount"] * np.asarray(dictionary.decoder[feature])
    tokens, edits = subject.tokens("abc"), {"blocks/1/mlp/out": lambda y: y + vector}
    log_q, log_p = (np.asarray(run(subject.model, tokens, edits=e).logits[0, -1], np.float64) for e in ({}, edits))
    log_q, log_p = (x - np.log(np.exp(x).sum()) for x in (log_q, log_p))
    assert moved["kl"] == pytest.approx(float((np.exp(log_q) * (log_q - log_p)).sum()), rel=1e-2) and moved["kl"] > 0.01
    assert moved["after"][0][1] == pytest.approx(np.exp(log_p).max(), rel=1e-2)


def test_an_effect_is_measured_once(explorer):
    busiest = int(np.argmax(explorer.index.sums.fired))
    effect = explorer.effect(busiest)
    assert effect["where_fires"] is not None and sum(effect["tokens"]) == 8 * (SEQ - 1)
    assert [v for _, v in effect["raised"]] == sorted((v for _, v in effect["raised"]), reverse=True)
    assert effect["lowered"][0][1] < 0 < effect["raised"][0][1] and len(effect["heads"]) == 8
    assert {name.split(".")[0] for name, _ in effect["heads"]} == {"0", "1"}
    path = explorer.index.folder / "effects" / f"{busiest}.json"
    path.write_text(json.dumps({name: effect[name] for name in ("where_fires", "elsewhere", "tokens", "windows")}))
    assert explorer.effect(busiest) == effect, "one of an older version is measured again"
    explorer.load, explorer._loaded = None, None
    assert explorer.effect(busiest) == effect, "it was kept"
    with pytest.raises(UserError, match="no model"):
        explorer.fires_on("a")


def test_a_window_that_fills_the_batch_up_counts_once(subject, dictionary, dataset):
    rows = np.stack([window["tokens"] for window in dataset[:2]])
    fired = np.zeros(rows.shape, np.float32)
    fired[:, 5:9], fired[0, 12] = 1, 2
    plain, again = (live.ablated(dictionary, subject, rows[i], fired[i], 3) for i in ([0, 1], [0, 1, 0]))
    assert again == plain and again["windows"] == 2
