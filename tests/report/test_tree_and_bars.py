"""Trees, stacked bars and pictures: what is drawn is what was given."""

import re
from itertools import pairwise

import numpy as np
import pytest

from jaxinterp.methods.factor.semi_nmf import Factors
from jaxinterp.methods.factor.semi_nmf_tree import shared_neurons, tree
from jaxinterp.report.image import picture
from jaxinterp.report.stacked import stacked_bars
from jaxinterp.report.tree import _heights, tree_chart

SQUARE = r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)" [^>]*><title>(\w+), (\d)'
PARENTS = [np.asarray([2, 0, 2, 1]), np.asarray([0, 0, 1])]
SHARES = [np.asarray([1.0, 0.5, 0.9, 0.8]), np.asarray([1.0, 0.7, 0.6])]


def test_parents_are_the_largest_parts_and_shared_neurons_those_of_two_children():
    upper = np.asarray([[3.0, 0, 0, 4], [0, 0.1, 0, 0]])
    coefficients = np.asarray([[1.0, 20], [0.1, 60], [1, 0]])
    (level,) = tree([Factors(upper, coefficients)])
    np.testing.assert_array_equal(level.parent, [0, 1, 0])
    np.testing.assert_allclose(level.share, [5 / 7, 6 / 6.5, 1])
    lower = np.asarray([[1.0, 0, 2, 3], [1, 1, 1, 1], [-1, 5, 0, 2]])
    assert shared_neurons(lower, level.parent) == {0: [0, 3]}
    by_coefficient = coefficients.argmax(axis=1)
    assert by_coefficient[0] == 1, "without the parents' lengths another parent is found"


def test_children_of_a_parent_stand_together_and_lines_do_not_cross():
    heights = _heights(PARENTS)
    leaves = np.argsort(heights[0])
    groups = [PARENTS[0][leaf] for leaf in leaves]
    assert [PARENTS[1][group] for group in groups] == sorted(PARENTS[1][group] for group in groups)
    assert sum(a != b for a, b in pairwise(groups)) == 2, "each group once"
    assert heights[1][2] == pytest.approx((heights[0][0] + heights[0][2]) / 2)
    drawn = tree_chart(PARENTS, SHARES, "a tree", names=["a<b", "two", "three", "four"])
    assert drawn.count('class="branch"') == 7 and "a&lt;b" in drawn and "0 of level 0 in 2 of level 1: 100%" in drawn


def test_bars_are_as_high_as_their_numbers():
    drawn = stacked_bars({"one": [10, 30], "two": [20, 0]}, x_label="layer", y_label="neurons", title="bars")
    found = {
        (name, bar): (float(y), float(h))
        for y, h, name, bar in re.findall(
            r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)" [^>]*><title>(\w+), (\d)', drawn
        )
    }
    assert set(found) == {("one", "0"), ("one", "1"), ("two", "0")}, "nothing is drawn for 0"
    unit = found["one", "0"][1] / 10
    assert found["one", "1"][1] == pytest.approx(30 * unit, abs=0.2)
    assert found["two", "0"][1] == pytest.approx(20 * unit, abs=0.2)
    assert sum(found["two", "0"]) == pytest.approx(found["one", "0"][0], abs=0.2), "stacked, not overlapping"


def test_a_picture_has_a_square_for_every_number_that_is_seen():
    drawn = picture(np.asarray([[1.0, -0.5], [0.0, 0.001]]), "two by two")
    assert drawn.count('fill="#c0392b"') == 1 and drawn.count('fill="#2c5aa0"') == 1
    assert 'fill-opacity="0.50"' in drawn
