"""Measures against closed forms and brute force; each with a variant that must fail."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.sparsity.budgets import greedy_levels, ppl_percent
from jaxinterp.evaluation.sparsity.measures import cett, cett_threshold, density, functional_l0, hoyer


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def orthonormal(rng, rows, columns):
    return jnp.asarray(np.linalg.qr(rng.normal(size=(columns, rows)))[0].T)


def test_cett_has_its_closed_form_where_rows_are_orthonormal():
    rng = np.random.default_rng(0)
    a, weight = rng.normal(size=(50, 8)), orthonormal(rng, 8, 12)
    for epsilon in (0.0, 0.3, 1.0, 9.0):
        tail = np.sqrt((np.where(np.abs(a) <= epsilon, a, 0) ** 2).sum(-1) / (a**2).sum(-1)).mean()
        assert float(cett(jnp.asarray(a), weight, epsilon).value()) == pytest.approx(tail, abs=1e-12)
    assert float(cett(jnp.asarray(a), weight, 9.0).value()) == pytest.approx(1.0)
    skewed = weight * jnp.arange(1.0, 9.0)[:, None]
    assert float(cett(jnp.asarray(a), skewed, 0.3).value()) != pytest.approx(
        float(cett(jnp.asarray(a), weight, 0.3).value()), rel=1e-2
    )  # broken: no row norms


def test_cett_is_not_monotone_and_the_search_says_what_it_achieved():
    """Neurons 0 and 1 nearly cancel: with both in the tail the error is smaller than with one."""
    weight, a = jnp.asarray([[1.0, 0.0], [-1.0, 0.05], [0.0, 1.0]]), jnp.asarray([[1.0, 1.2, 2.0]])
    assert float(cett(a, weight, 1.0).value()) == pytest.approx(0.483, abs=1e-3)
    assert float(cett(a, weight, 1.3).value()) == pytest.approx(0.101, abs=1e-3)
    for target in (0.0, 0.05, 0.2, 0.5, 1.0):
        found = cett_threshold(a, weight, target, candidates=np.linspace(0.1, 2.5, 49))
        assert found.achieved <= target
        assert float(cett(a, weight, found.epsilon).value()) == pytest.approx(found.achieved)


def test_the_threshold_is_the_largest_candidate_under_the_target_where_cett_is_monotone():
    rng = np.random.default_rng(1)
    a, weight = jnp.asarray(rng.normal(size=(40, 8))), orthonormal(rng, 8, 12)
    grid = np.linspace(float(jnp.abs(a).min()), float(jnp.quantile(jnp.abs(a), 0.99)), 65_536)
    for target in (0.1, 0.4):
        found = cett_threshold(a, weight, target)
        index = int(np.argmin(np.abs(grid - found.epsilon)))
        assert float(cett(a, weight, grid[index]).value()) <= target < float(cett(a, weight, grid[index + 1]).value())
        assert found.ratio == pytest.approx(float((jnp.abs(a) > found.epsilon).mean()))
    below = cett_threshold(a, weight, 1e-9, candidates=np.asarray([0.5, 1.0]))
    assert below == (0.0, 0.0, 1.0)  # broken in the authors' code: the largest candidate


def test_density_and_hoyer():
    a = jnp.asarray([[0.0, 1e-4, -2.0, 0.0], [3.0, 3.0, 3.0, -3.0]])
    assert float(density(a).value()) == 0.75
    assert float(density(a, 1e-3).value()) == 0.625
    assert float(density(a, weight=jnp.asarray([1.0, 0.0])).value()) == 0.5
    np.testing.assert_allclose(hoyer(jnp.asarray([[0.0, 5.0, 0.0], [1.0, -1.0, 1.0]])), [1.0, 0.0], atol=1e-12)
    assert float(hoyer(jnp.asarray([3.0, 4.0, 0.0]))) == pytest.approx((3**0.5 - 7 / 5) / (3**0.5 - 1))


def test_functional_l0_counts_what_matters():
    """Two strong features a token among ten weak ones: L0 is 12, and 2 are needed."""
    rng = np.random.default_rng(0)
    codes = np.zeros((30, 20))
    for row in codes:
        chosen = rng.permutation(20)
        row[chosen[:2]], row[chosen[2:12]] = 10.0, 0.01
    decoder = orthonormal(rng, 20, 24)
    found = functional_l0(jnp.asarray(codes), decoder, 0.05)
    assert (found.needed, found.active) == (pytest.approx(2), pytest.approx(12)) and found.achieved <= 0.05
    scaled = decoder * jnp.where(jnp.arange(20) < 3, 10.0, 0.01)[:, None]
    equal = functional_l0(jnp.ones((30, 20)), scaled, 0.05)
    assert equal.needed == pytest.approx(3)
    assert functional_l0(jnp.ones((30, 20)), decoder, 0.05).needed == pytest.approx(20)  # broken: without the norms


def test_greedy_levels_are_optimal_for_convex_errors_that_add():
    cost = {"a": 1.0, "b": 3.0, "c": 0.5}
    error = lambda levels: sum(cost[name] * level**2 for name, level in levels.items())
    path = greedy_levels(error, list(cost), 0.5, step=0.25, most=1.0)
    best = min(
        (
            dict(zip(cost, choice, strict=True))
            for choice in product(np.arange(0, 1.25, 0.25), repeat=3)
            if sum(choice) == 1.5
        ),
        key=error,
    )
    assert path[-1] == best and len(path) == 7
    worst = greedy_levels(lambda levels: -error(levels), list(cost), 0.5, step=0.25, most=1.0)[-1]
    assert error(worst) > error(best)  # broken: the largest error first
    sized = greedy_levels(error, list(cost), 0.5, step=0.05, weights={"a": 1, "b": 1, "c": 10})[-1]
    assert (sized["a"] + sized["b"] + 10 * sized["c"]) / 12 == pytest.approx(0.5, abs=0.05)
    for bad in ({"target": 0.99}, {"target": 0.5, "step": 0.0}, {"target": 0.5, "weights": {"a": 0.0}}):
        with pytest.raises(UserError):
            greedy_levels(error, ["a"], **bad)


def test_ppl_percent_finds_the_crossing():
    """loss(c) = 2 + c^2: a rise of 1 percent is at c = sqrt(log 1.01)."""
    found = ppl_percent(lambda c: (2 + c * c, 1 - c), 2.0, 1.0)
    assert found.cett == pytest.approx(np.sqrt(np.log(1.01)), abs=2e-6) and found.percent <= 1.0
    assert found.ratio == pytest.approx(1 - found.cett)
    assert ppl_percent(lambda c: (2 + c * c, 1 - c), 2.0, 5.0).cett > found.cett
    assert ppl_percent(lambda c: (9.0, 0.5), 2.0, 1.0) == (0.0, 1.0, 0.0)
    with pytest.raises(UserError, match=r"percent=0\.0 must"):
        ppl_percent(lambda c: (2.0, 1.0), 2.0, 0.0)
