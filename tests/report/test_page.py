"""The page as a whole: complete in itself, escaped, well formed, and honest about which row is best."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.report.columns import columns_of
from jaxinterp.report.content import FeaturePage, NeuronMatch, Report, TokenContext
from jaxinterp.report.page import density_histogram, render, write_report
from jaxinterp.report.scoreboard import best_rows, summary
from jaxinterp.report.style import EARLY_SCRIPT, SCRIPT, STYLE

VOID = {"meta", "link", "br", "img", "input", "hr"}
NASTY = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!-- ",
    "</style>",
    "&lt;b&gt;",
    "'",
    "\x00\x1b",
    "\u202eevil",
    "\ud83d",
    "😀",
    "\n",
    "",
    "   ",
    "<svg/onload=x>",
    "]]>",
)


class Page(HTMLParser):
    """Every element with its attributes, all text with the element it stands in; fails where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(source)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.text.append((self.stack[-1] if self.stack else "", data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    def words(self) -> str:
        return "".join(data for tag, data in self.text if tag not in ("script", "style"))


COLUMNS = columns_of([])


def board(*rows: dict) -> list[dict]:
    return list(rows)


def cells(source: str, key: str, rows: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """The cells of one column of the scoreboard, as HTML; the columns are those of `rows`."""
    column = 1 + [column.key for column in columns_of(rows)].index(key)
    body = source.split('<table class="board">')[1].split("<tbody>")[1].split("</tbody>")[0]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row)[column] for row in re.findall(r"<tr.*?</tr>", body)]


def test_the_file_is_written_whole_and_again(report: Report, tmp_path) -> None:
    path = write_report(report, tmp_path / "new" / "report.html")
    first = path.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>") and first.endswith("</html>\n")
    assert write_report(report, str(path)).read_text(encoding="utf-8") == first, "the same content, the same file"
    assert [one.name for one in path.parent.iterdir()] == ["report.html"], "nothing is left beside it"


def test_nothing_is_loaded_from_elsewhere(report: Report) -> None:
    source = render(report)
    page = Page(source)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "video", "audio", "image", "use")
        assert not {"src", "srcset", "action", "data", "poster", "xlink:href", "background"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|@import|url\(|//[a-z]+\.", source)
    policies = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert len(policies) == 1 and "default-src 'none'" in policies[0]["content"]


def test_links_and_ids_fit_together(report: Report) -> None:
    page = Page(render(report))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [attributes["href"] for attributes in page.all("a")]
    assert all(target[1:] in ids for target in targets)
    assert {f"#feature-{feature.index}" for feature in report.features} <= set(targets)


def test_without_javascript_everything_is_there(report: Report) -> None:
    """Only the script's own class hides anything, so that what is in the file is what is seen without it."""
    hiding = [rule for rule in re.findall(r"([^{}]+)\{[^{}]*display:none[^{}]*\}", STYLE)]
    assert {rule.strip() for rule in hiding} == {
        ".js .feature",
        ".step",
        ".js-only",
        "nav.bar,.step,.js .js-only",  # in print
    }
    page = Page(render(report))
    assert len(page.all("article")) == len(report.features)
    words = page.words()
    for feature in report.features:
        assert f"Feature {feature.index}" in words
        assert feature.contexts[0].tokens[feature.contexts[0].peak].strip() in words


def nasty_report(report: Report) -> Report:
    context = TokenContext(NASTY, tuple(float(place) for place in range(len(NASTY))), 1)
    feature = dataclasses.replace(
        report.features[0],
        contexts=(context, dataclasses.replace(context, peak=0)),
        raised=tuple((token, 1.0) for token in NASTY),
        lowered=tuple((token, -1.0) for token in NASTY),
    )
    return dataclasses.replace(
        report,
        title=NASTY[0],
        subtitle=NASTY[1],
        facts={token: token for token in NASTY} | {"command": NASTY[0]},
        scoreboard=[{**report.scoreboard[0], "method": NASTY[0]}, {**report.scoreboard[1], "method": NASTY[1]}],
        features=(feature, *report.features[1:]),
    )


def test_no_text_becomes_markup(report: Report) -> None:
    page, plain = Page(render(nasty_report(report))), Page(render(report))
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert {name for _, found in page.elements for name in found} <= {
        name for _, found in plain.elements for name in found
    }
    scripts = [data for tag, data in page.text if tag == "script"]
    assert scripts == [EARLY_SCRIPT, SCRIPT]
    assert len(page.all("article")) == len(report.features)
    words = page.words()
    assert words.count("</script><script>alert(1)</script>") > 5
    assert '"><img src=x onerror=alert(1)>' in words and "&lt;b&gt;" in words and "😀" in words
    assert "\\u202f" not in Page(render(report)).words(), "a narrow space is not an escape"
    assert "\x00" not in words and "\u202e" not in words and "\\u202eevil" in words


def test_any_token_can_be_written_to_the_file(report: Report, tmp_path) -> None:
    path = write_report(nasty_report(report), tmp_path / "report.html")
    assert "\\ud83d" in path.read_text(encoding="utf-8"), "half of a character has no UTF-8 form"


def test_the_peak_is_marked_and_colours_grow_with_activation() -> None:
    context = TokenContext(("a", "b", "c", "d", "e"), (0.0, 1.0, 4.0, 2.0, -4.0), 2)
    feature = FeaturePage(7, 0.1, 4.0, (context,), (0.0, 4.0), (3,), (), (), (), None)
    source = render(Report("t", "s", {}, [], [], np.array([0.1]), (feature,)))
    assert '<div class="snippet">a<i class=a3 title=1>b</i><mark class="a9" title="4">c</mark>' in source
    assert "<i class=a5 title=2>d</i><i class=n9 title=-4>e</i></div>" in source


def test_best_values_are_bold(report: Report) -> None:
    source = render(report)
    assert [cell.startswith("<b>") for cell in cells(source, "fvu")] == [True, False, False, False, False]
    assert [cell.startswith("<b>") for cell in cells(source, "top1_agreement")] == [True, False, False, False, False]
    assert not any("<b>" in cell for key in ("ce_clean", "ce_zero", "l0", "tokens") for cell in cells(source, key))


@pytest.mark.parametrize("key", [column.key for column in COLUMNS])
def test_best_follows_the_direction_of_the_column(key: str) -> None:
    column = next(column for column in COLUMNS if column.key == key)
    rows = board({key: 0.3}, {key: 0.1}, {key: None}, {key: 0.7}, {key: float("nan")}, {})
    expected = {-1: {1}, 0: set(), 1: {3}}[column.better]
    assert best_rows(rows, column) == expected
    higher = {"ce_recovered_zero", "ce_recovered_mean", "top1_agreement"}
    lower = {"fvu", "dead_fraction", "ce_replaced", "kl"}
    assert column.better == (1 if key in higher else -1 if key in lower else 0)


def test_best_is_shared_by_what_reads_the_same_and_needs_a_rival() -> None:
    fvu = COLUMNS[0]
    assert best_rows(board({"fvu": 0.2001}, {"fvu": 0.2004}, {"fvu": 0.21}), fvu) == {0, 1}
    assert best_rows(board({"fvu": 0.2}), fvu) == set()
    assert best_rows(board({"fvu": None}, {"fvu": 0.2}), fvu) == set()
    assert best_rows([], fvu) == set()


def test_every_column_is_explained(report: Report) -> None:
    heads = [found for found in Page(render(report)).all("th", scope="col") if "title" in found]
    titles = [found["title"] for found in heads]
    assert all(column.meaning in titles for column in COLUMNS)
    assert all(column.meaning.endswith(".") for column in COLUMNS)


def test_missing_and_broken_values(report: Report) -> None:
    nothing = {key: None for key in report.scoreboard[0]} | {"method": "broken"}
    nan = {key: float("nan") for key in report.scoreboard[0]} | {
        "method": "diverged",
        "fvu_interval": [float("nan"), 1.0],
        "ce_replaced_interval": None,
    }
    source = render(dataclasses.replace(report, scoreboard=[*report.scoreboard, nothing, nan, {"method": "bare"}]))
    Page(source)
    for column in COLUMNS:
        *_, none, broken, bare = cells(source, column.key)
        assert none == bare == "–"
        assert broken == '<span class="warn">NaN</span>'
    only = render(dataclasses.replace(report, scoreboard=[nothing], curves=[{"step": 1}, {"tokens": None, "fvu": 1.0}]))
    assert "no score could be measured" in only and "nothing to draw" in only


def test_summary_says_who_is_best_whichever_it_is() -> None:
    ours = {"method": "transcoder", "fvu": 0.2, "ce_replaced": 3.6, "ce_clean": 3.5, "l0": 32.0}
    neurons = {"method": "neurons", "fvu": 0.4, "ce_replaced": 3.7, "ce_clean": 3.5}
    ahead = summary([ours, neurons])
    assert ahead.startswith("With 32.0 active features per token, <b>transcoder</b> has the lowest")
    assert "0.200 (next: neurons, 0.400)" in ahead and "3.600 (next: neurons, 3.700)" in ahead and "3.500" in ahead
    behind = summary([{**ours, "fvu": 0.6}, neurons])
    assert "the baseline <b>neurons</b> has the lowest share" in behind
    assert "ahead of <b>transcoder</b> at 0.600" in behind
    assert "<b>transcoder</b> has the lowest cross-entropy" in behind
    both = summary([{**ours, "fvu": 0.6, "ce_replaced": 3.8}, neurons])
    assert "<b>transcoder</b> has" not in both and both.count("ahead of <b>transcoder</b>") == 2
    missing = summary([{**ours, "fvu": float("nan")}, neurons])
    assert "neurons" in missing and "could not be measured" in missing
    assert summary([{"method": "alone", "fvu": 0.2}]) == (
        "<b>alone</b> has the lowest share of unexplained variance (FVU), 0.200."
    )
    assert summary([]) == "No scores were recorded."


def test_summary_warns_where_intervals_overlap() -> None:
    ours = {"method": "a", "fvu": 0.2, "fvu_interval": [0.1, 0.3]}
    assert "intervals overlap" in summary([ours, {"method": "b", "fvu": 0.25, "fvu_interval": [0.2, 0.3]}])
    assert "overlap" not in summary([ours, {"method": "b", "fvu": 0.5, "fvu_interval": [0.4, 0.6]}])
    assert "intervals overlap" in summary(
        [{**ours, "fvu": 0.28}, {"method": "b", "fvu": 0.2, "fvu_interval": [0.1, 0.29]}]
    )


def test_density_histogram_counts_live_and_dead_apart() -> None:
    densities = np.array([0.0, 0.0, float("nan"), 1e-4, 2e-4, 0.5, 1.0])
    edges, counts, dead = density_histogram(densities)
    assert dead == 3 and sum(counts) == 4 and len(edges) == len(counts) + 1
    assert edges[0] <= -4 and edges[-1] >= 0
    assert density_histogram(np.full(5, 0.01))[1] == (5,)
    assert density_histogram(np.zeros(3)) == ((-1.0, 0.0), (0,), 3)


@pytest.mark.parametrize("features", [0, 1])
def test_few_features(report: Report, features: int) -> None:
    page = Page(render(dataclasses.replace(report, features=report.features[:features])))
    assert len(page.all("article")) == features
    assert ("No features were selected." in page.words()) == (features == 0)


def test_an_empty_report_is_still_a_page() -> None:
    words = Page(render(Report("t", "s", {}, [], [], np.zeros(0), ()))).words()
    for said in ("No scores", "No training log", "No densities", "No features", "Nothing was recorded"):
        assert said in words


def test_a_feature_without_anything_is_still_shown() -> None:
    silent = FeaturePage(3, 0.0, 0.0, (), (), (), (), (), (), None)
    odd = FeaturePage(
        4,
        float("nan"),
        float("nan"),
        (TokenContext(("x",), (float("nan"),), 0),),
        (0.0, 0.0),
        (0,),
        (("y", float("nan")),),
        (),
        (NeuronMatch(1, None, None),),
        float("nan"),
    )
    page = Page(render(Report("t", "s", {}, [], [], np.zeros(5), (silent, odd))))
    assert len(page.all("article")) == 2 and "never fired" in page.words()


def test_an_encoder_s_page_speaks_of_embeddings(report: Report) -> None:
    """Higher is better there, and nothing is said of cross-entropy but how it would be read."""
    kept = {"transcoder": 0.98, "skip transcoder": 0.97, "neurons": 0.99}
    rows = [
        {
            "method": method,
            "fvu": 0.2,
            "l0": 32.0,
            "similarity_clean": 1.0,
            "similarity_replaced": value,
            "similarity_replaced_interval": [value - 0.002, value + 0.002],
            "similarity_zero": 0.91,
            "similarity_mean": 0.9,
            "similarity_recovered_zero": (value - 0.91) / 0.09,
            "similarity_recovered_mean": (value - 0.9) / 0.1,
            "compared": 32,
            "tokens": 8_192,
        }
        for method, value in kept.items()
    ]
    page = dataclasses.replace(report, scoreboard=rows)
    source = render(page)
    titles = [found["title"] for found in Page(source).all("th", scope="col") if "title" in found]
    assert [title for title in titles if title in {c.meaning for c in (*columns_of(rows), *COLUMNS)}] == [
        column.meaning for column in columns_of(rows)
    ]
    assert [cell.startswith("<b>") for cell in cells(source, "similarity_replaced", rows)] == [False, False, True]
    assert "0.968–0.972" in cells(source, "similarity_replaced", rows)[1]
    said = summary(rows)
    assert "the baseline <b>neurons</b> has the embeddings most similar" in said
    assert "ahead of <b>transcoder</b> at 0.980" in said and "at 1.000 nothing would have changed" in said
    words = Page(source).words()
    assert (
        "Change of similarity" in words and "-0.020" in words.replace("−", "-") and "Cross-entropy added" not in words
    )
    assert "Similarity of embeddings with the MLP replaced" in words


def test_index_has_a_row_a_feature_with_values_to_sort_by(report: Report) -> None:
    source = render(report)
    body = source.split('aria-label="Index of features"')[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    assert len(rows) == len(report.features)
    for row, feature in zip(rows, report.features, strict=True):
        values = [float(value) for value in re.findall(r'data-value="([^"]*)"', row)]
        expected = [feature.index, feature.density, feature.max_activation, feature.read_write_cosine]
        assert values == expected


def test_contradictions_are_refused(report: Report) -> None:
    with pytest.raises(UserError, match="activations has 1 entries for 2 tokens"):
        TokenContext(("a", "b"), (0.0,), 0)
    with pytest.raises(UserError, match="peak=2"):
        TokenContext(("a", "b"), (0.0, 1.0), 2)
    with pytest.raises(UserError, match="histogram_edges has 2 entries for 2 counts"):
        dataclasses.replace(report.features[0], histogram_edges=(0.0, 1.0), histogram_counts=(1, 2))


def test_the_file_stays_small(big_report: Report) -> None:
    assert len(big_report.features) == 100 and len(big_report.features[0].contexts) == 10
    assert len(big_report.features[0].contexts[0].tokens) == 40
    assert len(render(big_report).encode()) < 1_500_000
