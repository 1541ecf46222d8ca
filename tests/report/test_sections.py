"""Pages of sections and charts of several series: what is drawn where, and that no text can break the page."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinterp.report.scatter import Series, _places, xy_chart
from jaxinterp.report.sections import Chart, Section, write_page


def circles(svg):
    return [(float(x), float(y)) for x, y in re.findall(r'<circle class="mark" cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_points_lie_where_their_values_say():
    svg = xy_chart(
        [Series("one", ((1.0, 0.0), (10.0, 1.0), (100.0, 2.0)), line=True)],
        x_label="L0",
        y_label="FVU",
        title="t",
        log_x=True,
    )
    first, second, third, _ = circles(svg)  # the last is that of the name
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2), "a log axis"
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.2) and first[1] > third[1], "up is more"
    assert svg.count('class="series"') == 1 and "one: 10.00, 1.000" in svg


def test_what_cannot_be_drawn_is_left_out_and_said():
    chart = {"x_label": "x", "y_label": "y", "title": "nothing"}
    assert "nothing to draw" in xy_chart([Series("a", ((math.nan, 1.0),))], **chart)
    assert "nothing to draw" in xy_chart([Series("a", ((0.0, 1.0),))], log_x=True, **chart)
    assert len(circles(xy_chart([Series("a", ((math.inf, 1.0), (1.0, 1.0)))], **chart))) == 2


def test_a_cloud_is_one_path_and_the_identity_a_line_at_equal_scales():
    points = tuple((float(i), float(i)) for i in range(500))
    svg = xy_chart([Series("many", points)], x_label="x", y_label="y", title="t", identity=True)
    assert svg.count('class="cloud"') == 1 and len(re.findall(r"\dh0", svg)) == 500
    assert svg.count('class="reference"') == 1
    across, down = re.search(r'class="cloud" d="M([\d.]+) ([\d.]+)h0', svg).groups()
    low = re.search(r'class="reference" d="M([\d.]+) ([\d.]+)L', svg).groups()
    assert float(across) > float(low[0]) and float(down) < float(low[1])


@given(st.lists(st.floats(24, 300), min_size=1, max_size=30))
def test_names_never_overlap_and_stay_in_order(wanted):
    places = _places(wanted, 24.0, 312.0)
    ordered = sorted(range(len(wanted)), key=lambda index: wanted[index])
    height = min(16, 288 / max(len(wanted) - 1, 1))
    assert all(places[b] - places[a] >= height - 1e-6 for a, b in pairwise(ordered))
    assert min(places) >= 24 - 1e-6 and max(places) <= 312 + 1e-6


def test_a_table_shows_every_kind_of_value(tmp_path):
    def table(rows):
        section = Section("t", rows=tuple(rows))
        return write_page(
            tmp_path / "t.html", title="t", subtitle="", summary="", sections=[section], facts={}
        ).read_text()

    text = table([{"method": "a<b", "fvu": 0.12345, "count": 1200, "none": None, "flag": True, "tiny": 1e-7}])
    for expected in ("a&lt;b", "0.123", "1,200", "–", "yes", "1.00×10⁻⁷"):
        assert expected in text
    assert "–" in table([{"a": 1.0, "b": 2.0}, {"a": 1.0}]), "a row may lack a column"


def test_a_page_holds_its_sections_and_breaks_on_nothing(tmp_path):
    evil = "</script><script>alert(1)</script>"
    path = write_page(
        tmp_path / "deep" / "report.html",
        title=evil,
        subtitle=evil,
        summary=evil,
        sections=[Section(evil, (evil,), ({"name": evil},), (Chart(evil, evil, "<svg></svg>"),))],
        facts={evil: evil},
    )
    text = path.read_text()
    assert "alert(1)</script><" not in text and "<script>alert" not in text
    assert text.count("<section") == 2 and "<svg></svg>" in text
    assert list(path.parent.iterdir()) == [path], "no unfinished file stays behind"
