"""Scales, ticks and charts, also for data that has nothing to show."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from jaxinterp.report.plots import Dot, Reference, bar_chart, dot_plot, line_chart
from jaxinterp.report.scales import Scale, fit_scale, log_labels, tick_labels
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.style import STYLE

NAN = float("nan")


def elements(svg: str, name: str, kind: str) -> list[ElementTree.Element]:
    """Elements of a chart by tag and class; parsing as XML proves that it is well formed."""
    return [one for one in ElementTree.fromstring(svg).iter(name) if kind in one.get("class", "").split()]


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in ElementTree.fromstring(svg).iter("text")]


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_linear_scale_maps_ends_and_middle() -> None:
    scale = Scale(10, 30, 100, 0)
    assert (scale(10), scale(20), scale(30)) == (100, 50, 0)


def test_log_scale_is_even_in_decades_and_clamps_what_has_no_logarithm() -> None:
    scale = Scale(0.01, 100, 0, 400, True)
    assert [round(scale(value), 6) for value in (0.01, 0.1, 1, 10, 100)] == [0, 100, 200, 300, 400]
    assert scale(0.0) == scale(-3.0) == 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (3.49, 3.78, (3.5, 3.55, 3.6, 3.65, 3.7, 3.75)),
        (-1, 1, (-1, -0.5, 0, 0.5, 1)),
        (0, 900_000, (0, 200_000, 400_000, 600_000, 800_000)),
    ],
)
def test_linear_ticks_are_round(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert Scale(low, high, 0, 1).ticks() == pytest.approx(expected, abs=1e-12)


def test_log_ticks_are_decades_or_finer() -> None:
    assert Scale(1e-4, 1, 0, 1, True).ticks() == pytest.approx((1e-4, 1e-3, 1e-2, 1e-1, 1))
    assert Scale(0.15, 1.2, 0, 1, True).ticks() == pytest.approx((0.2, 0.5, 1))
    assert len(Scale(1e-30, 1e30, 0, 1, True).ticks()) <= 8
    assert all(2.1 <= tick <= 2.3 for tick in Scale(2.1, 2.3, 0, 1, True).ticks())
    assert len(Scale(2.1, 2.3, 0, 1, True).ticks()) > 1


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(2.1, 2.3), (0.6, 1.9), (7, 12), (3, 4.9), (0.09, 0.21), (1e-9, 3e-9)])
def test_an_axis_has_two_ticks_at_least(low: float, high: float, log: bool) -> None:
    """From one value alone no distance can be read."""
    for target in (1, 2, 3, 5):
        ticks = Scale(low, high, 0, 1, log).ticks(target)
        assert len(ticks) > 1 and all(low <= tick <= high for tick in ticks), (target, ticks)


def test_the_name_of_an_axis_stays_inside_the_chart_and_is_whole_in_its_title() -> None:
    long = "nats per token with every MLP of the model replaced by its decomposition, lower is better than higher"
    svg = xy_chart([Series("a", ((1.0, 1.0), (2.0, 2.0)))], x_label=long, y_label=long, title="t", width=300)
    labels = elements(svg, "text", "axis-label")
    assert len(labels) == 2
    for label in labels:
        shown, whole = label.text or "", [one.text for one in label.iter() if one.tag == "title"]
        at, wide = float(label.get("x", "")), 6 * len(shown)
        left = at - wide if label.get("text-anchor") == "end" else at
        assert shown.endswith("…") and whole == [long]
        assert left >= 0 and left + wide <= 300
    (short, _) = elements(
        xy_chart([Series("a", ((1.0, 1.0),))], x_label="x", y_label="y", title="t"), "text", "axis-label"
    )
    assert short.text == "x" and not list(short)


def test_a_chart_keeps_its_width_on_a_phone_so_that_its_text_keeps_its_size() -> None:
    """Kind K: text of 11 px was 6 px on a screen 330 px wide."""
    svg = ElementTree.fromstring(line_chart([0, 1], [1, 2], x_label="x", title="t", width=540))
    assert svg.get("width") == "540" and (svg.get("viewBox") or "").split()[2] == "540"
    phone = STYLE[STYLE.index("@media (max-width:600px)") :]
    assert "svg.plot{width:auto;max-width:none}" in phone and ":has(> svg.plot){overflow-x:auto}" in phone


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[], [None, NAN], [0.0], [5.0], [5.0, 5.0], [-2.0], [1e-12], [1e150, 1.0], [3, 4]])
def test_a_fitted_scale_is_usable_for_any_values(values: list, log: bool) -> None:
    scale = fit_scale(values, 0, 100, log=log)
    assert scale.low < scale.high and (scale.low > 0 or not log)
    for value in values:
        if value is not None and math.isfinite(value) and (value > 0 or not log):
            assert scale.holds(value) and 0 <= scale(value) <= 100
    assert all(map(math.isfinite, scale.ticks()))


def test_a_value_too_large_to_compute_with_is_clipped() -> None:
    scale = fit_scale([1e308, 1.0, -1e308], 0, 100)
    assert math.isfinite(scale.low) and math.isfinite(scale.high) and scale.ticks()


def test_an_included_end_is_the_end() -> None:
    assert fit_scale([0.1, 0.2], 0, 1, include=(0.0,)).low == 0.0
    assert fit_scale([0.1, 0.2], 0, 1).low < 0.1


def test_labels_have_the_decimals_that_tell_ticks_apart() -> None:
    assert tick_labels((0.0, 0.2, 0.4)) == ("0.0", "0.2", "0.4")
    assert tick_labels((3.5, 3.55)) == ("3.50", "3.55")
    assert tick_labels((-10.0, 0.0)) == ("−10", "0")
    assert len(set(tick_labels((1e-6, 2e-6, 3e-6)))) == 3
    assert log_labels((1e-5, 0.1, 1, 1000, 1e6)) == ("10⁻⁵", "0.1", "1", "1000", "10⁶")


def test_line_goes_through_the_points_and_breaks_at_gaps() -> None:
    svg = line_chart([0, 1, 2, 3, 4], [1.0, 2.0, NAN, 2.0, 1.0], x_label="x", title="t")
    path = elements(svg, "path", "line")[0].get("d", "")
    assert path.count("M") == 2
    (x0, y0), (x1, y1), (x3, y3), (x4, y4) = points(path)
    assert x1 - x0 == pytest.approx(x4 - x3, abs=0.2) and x3 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2)
    assert y0 == y4 and y1 == y3 and y1 < y0, "larger values are higher up"
    assert len(elements(svg, "g", "hover")) == 4


def test_log_line_leaves_out_what_is_not_positive() -> None:
    svg = line_chart([0, 1, 2, 3], [100.0, 10.0, 0.0, 1.0], x_label="x", title="t", log_y=True)
    drawn = points(elements(svg, "path", "line")[0].get("d", ""))
    assert len(drawn) == 3
    assert drawn[1][1] - drawn[0][1] == pytest.approx(drawn[2][1] - drawn[1][1], abs=0.2), "a decade is a decade"


def test_long_lines_are_thinned_but_keep_both_ends() -> None:
    steps = list(range(5000))
    svg = line_chart(steps, [float(step) for step in steps], x_label="x", title="t")
    drawn = points(elements(svg, "path", "line")[0].get("d", ""))
    short = points(
        elements(line_chart([0, 4999], [0.0, 4999.0], x_label="x", title="t"), "path", "line")[0].get("d", "")
    )
    assert len(drawn) <= 400 and drawn[0] == short[0] and drawn[-1] == short[-1]
    assert len(elements(svg, "g", "hover")) <= 60


def test_line_reference_is_drawn_inside_the_axis() -> None:
    svg = line_chart([0, 1], [1.0, 2.0], x_label="x", title="t", reference=Reference("held out", 9.0))
    at = float(re.search(r"M[\d.]+ ([\d.]+)H", elements(svg, "path", "reference")[0].get("d", "")).group(1))
    assert 0 < at < min(y for _, y in points(elements(svg, "path", "line")[0].get("d", "")))
    assert "held out 9.00" in texts(svg)
    assert not elements(
        line_chart([0], [1], x_label="", title="t", reference=Reference("r", None)), "path", "reference"
    )


@pytest.mark.parametrize("values", [[], [None], [NAN, None]])
def test_nothing_to_draw_is_said(values: list) -> None:
    said = line_chart(list(range(len(values))), values, x_label="x", title="Loss <1>")
    assert said == '<p class="empty">Loss &lt;1&gt;: nothing to draw.</p>'
    assert "nothing to draw" in dot_plot([Dot("a", value) for value in values], title="t")
    assert "nothing to draw" in bar_chart([0.0, 1.0], [0], title="t")
    assert "nothing to draw" in bar_chart([], [], title="t", apart=("dead", 0))


def test_bars_stand_on_the_axis_and_are_as_high_as_their_counts() -> None:
    bars = elements(bar_chart([0.0, 1.0, 2.0, 3.0], [10, 0, 5], title="t"), "rect", "bar")
    assert len(bars) == 2, "an empty bin has no bar"
    tall, small = (float(bar.get("height", "")) for bar in bars)
    assert tall == pytest.approx(2 * small, abs=0.2)
    bottoms = {round(float(bar.get("y", "")) + float(bar.get("height", "")), 1) for bar in bars}
    assert len(bottoms) == 1
    assert bars[0].find("title").text.endswith(": 10")


def test_log_bars_show_a_count_of_one() -> None:
    svg = bar_chart([0.0, 1.0, 2.0, 3.0, 4.0], [1000, 100, 10, 1], title="t", log_y=True)
    heights = [float(bar.get("height", "")) for bar in elements(svg, "rect", "bar")]
    assert heights[3] > 2
    steps = [before - after for before, after in pairwise(heights)]
    assert max(steps) - min(steps) < 0.3, "a factor of ten is the same step everywhere"


def test_dead_features_stand_apart_and_one_path_draws_the_same_bars() -> None:
    svg = bar_chart([0.0, 1.0, 2.0], [3, 4], title="t", apart=("dead", 7), rug=[0.5, 99.0])
    bars = elements(svg, "rect", "bar")
    apart = [bar for bar in bars if "apart" in bar.get("class", "")]
    assert len(apart) == 1 and apart[0].find("title").text == "dead: 7"
    live = [bar for bar in bars if bar not in apart]
    assert len(live) == 2
    assert all(float(bar.get("x", "")) > float(apart[0].get("x", "")) + 30 for bar in live)
    assert elements(svg, "path", "rug")[0].get("d", "").count("M") == 1, "a mark beyond the axis is not drawn"
    compact = bar_chart([0.0, 1.0, 2.0], [3, 4], title="t", hover=False)
    assert not elements(compact, "rect", "bar") and elements(compact, "path", "bar")[0].get("d", "").count("z") == 2
    only_dead = bar_chart([-1.0, 0.0], [0], title="t", apart=("dead", 5))
    assert len(elements(only_dead, "rect", "bar")) == 1


def test_bars_of_degenerate_edges_do_not_fail() -> None:
    for edges, counts in (([0.0, 0.0], [3]), ([NAN, NAN], [3]), ([1.0], [3])):
        assert ElementTree.fromstring(bar_chart(edges, counts, title="t", apart=("dead", 1))).tag.endswith("svg")


def test_dots_and_intervals_stand_at_their_values() -> None:
    rows = [Dot("first", 0.2, [0.1, 0.3], emphasis=True), Dot("second", 0.6, (0.5, 0.7)), Dot("third", 1.0, None)]
    svg = dot_plot(rows, title="t")
    xs = [float(dot.get("cx", "")) for dot in elements(svg, "circle", "dot")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    intervals = [re.match(r"M([\d.]+) [\d.]+H([\d.]+)", one.get("d", "")) for one in elements(svg, "path", "interval")]
    assert len(intervals) == 2, "a row without interval has none"
    for interval, x in zip(intervals, xs, strict=False):
        assert (float(interval.group(1)) + float(interval.group(2))) / 2 == pytest.approx(x, abs=0.2)
    assert len(elements(svg, "circle", "strong")) == 1
    assert {"first", "second", "third", "0.200", "1.00"} <= set(texts(svg))


def test_missing_values_keep_their_row() -> None:
    svg = dot_plot([Dot("a", 1.0, [None, NAN]), Dot("b", None), Dot("c", NAN)], title="t")
    assert len(elements(svg, "circle", "dot")) == 1 and not elements(svg, "path", "interval")
    assert {"a", "b", "c", "–", "NaN"} <= set(texts(svg))


def test_a_far_reference_becomes_an_arrow_and_does_not_squeeze_the_dots() -> None:
    rows = [Dot("a", 3.50, [3.49, 3.51]), Dot("b", 3.60, [3.59, 3.61])]
    lines = [Reference("clean", 3.48), Reference("mean", 3.66), Reference("zero", 14.1), Reference("gone", None)]
    svg = dot_plot(rows, title="t", references=lines)
    assert len(elements(svg, "path", "reference")) == 2
    assert "zero 14.1 →" in texts(svg) and "clean 3.48" in texts(svg) and "mean 3.66" in texts(svg)
    xs = [float(dot.get("cx", "")) for dot in elements(svg, "circle", "dot")]
    assert xs[1] - xs[0] > 100
    below = dot_plot(rows, title="t", references=[Reference("best", -20.0)])
    assert "← best −20.0" in texts(below)


def test_labels_of_near_references_do_not_overlap() -> None:
    rows = [Dot("a", 3.5), Dot("b", 3.9)]
    svg = dot_plot(rows, title="t", references=[Reference("mean", 3.60), Reference("zero", 3.61)])
    labels = elements(svg, "text", "reference-label")
    assert labels[0].get("y") != labels[1].get("y")


def test_labels_are_escaped() -> None:
    svg = dot_plot([Dot('<b>"&', 1.0)], title='<script>"')
    assert "<b>" not in svg and "<script>" not in svg
    assert '<b>"&' in texts(svg)
