"""Massive entries that were planted; curves whose parameters are known."""

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.sparsity.massive import (
    Curve,
    LogPowerLaw,
    PowerLaw,
    fit_curve,
    fit_log_power_law,
    fit_power_law,
    massive,
    top_and_median,
)


def test_planted_entries_are_found():
    x = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    x[0, 0, 7], x[1, 0, 7], x[1, 3, 2] = 900.0, -2000.0, 300.0
    found = massive(x)
    assert [(entry.row, entry.position, entry.dimension) for entry in found] == [(1, 0, 7), (0, 0, 7)]
    assert found[0].value == -2000.0 and found[0].ratio == pytest.approx(2000 / np.sort(np.abs(x[1]).ravel())[47])
    assert len(massive(x, ratio=100.0)) == 3 and not massive(x, least=3000.0)
    top = top_and_median(x, 2)
    assert top.top[0] == pytest.approx(1450.0) and 0.5 < top.median < 0.9
    assert np.abs(x[1]).max() < 1000 * np.abs(x[1]).mean()  # broken: the mean, which the entry itself raises


def test_the_five_parameter_curve_is_recovered():
    t = np.linspace(0, 100, 40)
    true = Curve(amplitude=300.0, decay=0.3, rate=0.15, offset=1.2, level=20.0)
    found, fit = fit_curve(t, true(t))
    assert fit > 0.9999
    np.testing.assert_allclose(found(t), true(t), atol=1.0)
    straight = np.polyval(np.polyfit(t, true(t), 1), t)
    assert np.abs(straight - true(t)).max() > 30  # broken: a line does not fit
    with pytest.raises(UserError, match="at least 5"):
        fit_curve(t[:4], t[:4])


def test_no_amplitude_and_level_are_better_at_the_curve_s_own_shape():
    """A and K are those of a line through the curve's shape; five points that rise leave hardly anything."""
    t = np.asarray([10.0, 20.0, 40.0, 50.0, 60.0])
    noisy, rising = np.asarray([3.0, 2.6, 3.3, 3.2, 3.6]), np.asarray([2.0, 2.4, 3.3, 3.5, 3.6])
    found, fit = fit_curve(t, noisy)
    shape = found._replace(amplitude=1.0, level=0.0)(t)
    np.testing.assert_allclose(np.polyfit(shape, noisy, 1), [found.amplitude, found.level], rtol=1e-6)
    assert fit == pytest.approx(0.899247, abs=1e-5)  # a search over all five from six starts ends there too
    other, worse = fit_curve(t, noisy, start=Curve(1.0, 1e-6, 1e-6, 1.0, 0.0))
    assert worse < 0.8 and other != found  # broken: one bad start
    assert fit_curve(t, rising)[1] > 0.999999


def test_the_two_laws_are_recovered_and_told_apart():
    data = np.geomspace(1e6, 1e9, 16)
    rising, falling = PowerLaw(0.4, 30.0, 0.35), LogPowerLaw(0.05, 0.002, 0.4, -0.5)
    up, fit = fit_power_law(data, rising(data))
    assert fit > 0.99999 and up.limit == pytest.approx(0.4, abs=1e-3) and up.exponent == pytest.approx(0.35, abs=1e-2)
    down, fit = fit_log_power_law(data, falling(data))
    assert fit > 0.9999
    np.testing.assert_allclose(down(data), falling(data), atol=2e-3)
    _, wrong = fit_power_law(data, falling(data))
    assert wrong < 0.99  # broken: the other law
    with pytest.raises(UserError, match="positive"):
        fit_power_law(np.asarray([0.0, 1.0, 2.0]), np.ones(3))
