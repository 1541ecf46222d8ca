"""Selection against brute force, closed forms and exact errors; each with a variant that must fail."""

from itertools import combinations

import jax
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models import selection


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def cases(seed, orthogonal):
    """x `[d]` and W `[d, 12]`; rows of W orthogonal with unequal norms, or general."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(8, 12))
    if orthogonal:
        weight = np.linalg.qr(weight.T)[0].T
    return rng.normal(size=8), weight * rng.lognormal(size=(8, 1))


def excess(score, orthogonal, seeds=20):
    """How often the top 3 by a score are not the subset of least output error."""
    wrong = 0
    for seed in range(seeds):
        x, weight = cases(seed, orthogonal)
        left = [np.linalg.norm((x * ~np.isin(np.arange(8), kept)) @ weight) for kept in combinations(range(8), 3)]
        mask = np.asarray(selection.top_k(score(x, weight), 3))
        wrong += np.linalg.norm((x * ~mask) @ weight) > min(left) * (1 + 1e-9)
    return wrong


def test_wina_is_optimal_where_rows_are_orthogonal_and_only_there():
    assert excess(selection.wina, True) == 0
    assert excess(selection.wina, False) > 0
    assert excess(lambda x, _: selection.magnitude(x), True) > 0  # broken: no row norm


def test_chess_errs_less_than_cats_at_equal_sparsity():
    rng = np.random.default_rng(0)
    s, u = rng.normal(size=(500, 32)), rng.normal(size=(500, 32)) * rng.lognormal(size=32)

    def error(score):
        return np.sum((~np.asarray(selection.batch_top_k(score, 16)) * s * u) ** 2)

    assert error(selection.chess(s, (u**2).mean(0))) < 0.8 * error(selection.magnitude(s))
    assert error(selection.chess(s, 1 / (u**2).mean(0))) > error(selection.magnitude(s))  # broken: inverted


def test_wanda_squared_is_the_exact_error_of_removing_a_weight():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(20, 4)), rng.normal(size=(4, 3))
    score = np.asarray(selection.wanda(weight, np.linalg.norm(x, axis=0)))
    exact = np.empty_like(weight)
    for j, i in np.ndindex(4, 3):
        pruned = weight.copy()
        pruned[j, i] = 0
        exact[j, i] = np.sum((x @ weight - x @ pruned) ** 2)
    np.testing.assert_allclose(score**2, exact, rtol=1e-12)
    broken = np.asarray(selection.wanda(weight, np.abs(x).sum(axis=0)))  # the other norm
    assert not np.allclose(broken**2, exact, rtol=1e-2)


def test_r_sparse_is_exact_at_full_rank():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(5, 6)), rng.normal(size=(6, 4))
    mask = selection.top_k(selection.wina(x, weight), 2)
    np.testing.assert_allclose(selection.r_sparse(x, weight, mask, 4), x @ weight, atol=1e-12)
    assert np.abs(selection.r_sparse(x, weight, mask, 3) - x @ weight).max() > 1e-2
    np.testing.assert_allclose(selection.r_sparse(x, weight, mask, 0), (x * np.asarray(mask)) @ weight, atol=1e-12)


def test_selectors_keep_exactly_what_they_say():
    ties = np.zeros((3, 8))
    assert (np.asarray(selection.top_k(ties, 3)).sum(-1) == 3).all()
    score = np.random.default_rng(0).normal(size=(3, 8))
    mask = np.asarray(selection.n_of_m(score, 2, 4)).reshape(3, 2, 4)
    assert (mask.sum(-1) == 2).all()
    groups = score.reshape(3, 2, 4)
    assert (np.where(mask, groups, np.inf).min(-1) > np.where(mask, -np.inf, groups).max(-1)).all()
    plain = np.asarray(selection.top_k(score, 4)).reshape(3, 2, 4)  # broken: no groups
    assert (plain.sum(-1) != 2).any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32])
def test_top_k_is_a_stable_sort(dtype):
    """Ties to the lower index, signs, both zeros, infinities; k may be traced."""
    rng = np.random.default_rng(1)
    score = (rng.integers(-4, 5, (40, 12)) * 0.5).astype(dtype)
    if dtype != np.int32:
        score[0, :3], score[1, :2] = [-0.0, 0.0, np.inf], [-np.inf, np.inf]
    order = np.argsort(-score.astype(np.float64), axis=-1, kind="stable")
    traced = jax.jit(selection.top_k)
    for k in (0, 1, 5, 11, 12):
        expected = np.zeros(score.shape, bool)
        np.put_along_axis(expected, order[:, :k], True, axis=-1)
        np.testing.assert_array_equal(selection.top_k(score, k), expected)
        np.testing.assert_array_equal(traced(score, k), expected)
        if 0 < k < 12:
            assert (np.asarray(selection.top_k(-score[:, ::-1], k)[:, ::-1]) != expected).any()  # broken: the order


def test_a_score_that_is_not_a_number_is_kept_so_that_it_shows():
    score = np.asarray([[3.0, np.nan, 2.0, 1.0]])
    for mask in (
        selection.top_k(score, 1),
        selection.above(score, 9.0),
        selection.batch_top_k(score, 1),
        selection.n_of_m(score, 1, 4),
        selection.above_quantile(score, 1.0),
    ):
        np.testing.assert_array_equal(mask, [[False, True, False, False]])
    assert np.isnan(selection.masked(score, selection.top_k(score, 2))).any()
    assert not (score > 9.0).any()  # broken: a plain comparison leaves it out in silence


def test_selectors_of_quantiles_blocks_and_force():
    rng = np.random.default_rng(0)
    score = rng.normal(size=(5, 40))
    assert np.asarray(selection.above_quantile(score, 0.3)).mean() == 0.7
    norms = np.asarray(selection.block_norms(score[:4], (2, 8)))
    np.testing.assert_allclose(norms[1, 2], np.linalg.norm(score[2:4, 16:24]), rtol=1e-12)
    mask = np.asarray(selection.block_top_k(score[:4], (2, 8), 3))
    assert mask.reshape(2, 2, 5, 8).any(axis=(1, 3)).sum() == 3 and mask.mean() == 0.3
    assert norms[mask[::2, ::8]].min() > norms[~mask[::2, ::8]].max()
    one = selection.top_k(score, 4)
    kept = np.asarray(selection.forced(one, on=(3,), off=(7,)))
    assert kept[:, 3].all() and not kept[:, 7].any()
    assert np.asarray(one)[:, 7].any()  # broken: without force it would be kept


def test_core_counts_find_a_planted_set():
    """Neurons 3, 8, 11 are active in most tokens, others here and there: the sentence core is the planted set."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 16)) - 1.5
    a[:, [3, 8, 11]] += 3.5
    weight = np.ones(60)
    k = int(0.6 * (a > 0).sum() / 60)
    expected = np.zeros(16)
    for row in a:
        expected[np.argsort(-row, kind="stable")[:k]] += 1
    counts = np.asarray(selection.core_counts(a, 0.6, weight))
    np.testing.assert_array_equal(counts, expected)
    assert set(np.flatnonzero(selection.top_k(counts, 3))) == {3, 8, 11}
    assert set(np.flatnonzero(selection.top_k(selection.core_counts(-a, 0.6), 3))) != {3, 8, 11}  # broken: sign


def test_gradient_effect_is_exact_for_a_linear_loss():
    rng = np.random.default_rng(0)
    a, w, fill = rng.normal(size=(5, 6)), rng.normal(size=6), rng.normal(size=6)
    exact = np.empty_like(a)
    for row, j in np.ndindex(5, 6):
        other = a.copy()
        other[row, j] = fill[j]
        exact[row, j] = abs((other @ w).sum() - (a @ w).sum())
    found = selection.gradient_effect(a, np.broadcast_to(w, a.shape), fill)
    np.testing.assert_allclose(found, exact, atol=1e-12)
    assert not np.allclose(selection.gradient_effect(a, np.broadcast_to(w, a.shape)), exact)  # broken: no fill


def test_scores_of_heads_are_those_of_each_head_alone():
    rng = np.random.default_rng(0)
    z, weight = rng.normal(size=(7, 2, 3)), rng.normal(size=(6, 4))
    expected = [np.abs(z[:, h] @ weight[3 * h : 3 * h + 3]).sum(-1).mean() for h in range(2)]
    np.testing.assert_allclose(selection.amp_heads(z, weight), expected, rtol=1e-12)
    interleaved = selection.amp_heads(z, weight.reshape(3, 2, 4).swapaxes(0, 1).reshape(6, 4))
    assert not np.allclose(interleaved, expected)  # broken: another layout of heads


def test_chess_by_thresholds_is_chess_by_importance():
    rng = np.random.default_rng(0)
    s, square = rng.normal(size=(50, 8)), rng.lognormal(size=8)
    thresholds = selection.chess_thresholds(0.3, square)
    mask = np.asarray(selection.above(selection.magnitude(s), thresholds))
    np.testing.assert_array_equal(mask, s**2 * square > 0.3)
    assert (np.asarray(selection.above(selection.magnitude(s), 0.3)) != mask).any()  # broken: one for all


def test_which_scores_survive_a_rescaling_of_neurons():
    rng = np.random.default_rng(0)
    gate, up, down = rng.normal(size=(6, 40)), rng.normal(size=(6, 40)), rng.normal(size=(40, 6))
    c = rng.lognormal(size=40)
    x = rng.normal(size=(30, 6))
    s, u = np.maximum(x @ gate, 0), x @ up

    def kept(score):
        return np.asarray(selection.top_k(score, 12))

    def same(score):
        return (kept(score(s, u, up, down)) == kept(score(s, u * c, up * c, down / c[:, None]))).all()

    assert same(lambda s, u, up, down: selection.wina(s * u, down))
    assert same(lambda s, u, up, down: selection.magnitude(s))
    assert not same(lambda s, u, up, down: selection.magnitude(s * u))
    assert not same(lambda s, u, up, down: selection.chess(s, (u**2).mean(0)))
    assert not same(lambda s, u, up, down: selection.amp(s * u))
    assert not same(lambda s, u, up, down: selection.peak_to_peak(gate, up))
    norms = np.linalg.norm
    assert same(lambda s, u, up, down: selection.wanda(down, norms(s * u, axis=0)).T)
    assert not same(lambda s, u, up, down: selection.dass(up, norms(s * u, axis=0)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: selection.top_k(np.zeros(4), 5), "k=5 must"),
        (lambda: selection.n_of_m(np.zeros(6), 2, 4), "m=4 must"),
        (lambda: selection.n_of_m(np.zeros(8), 5, 4), "n=5 must lie in 0 to m=4"),
        (lambda: selection.r_sparse(np.zeros((1, 4)), np.zeros((4, 4)), np.ones((1, 4), bool), 5), "rank=5 must"),
        (lambda: selection.chess(np.ones((2, 2)), np.asarray([1.0, -1.0])), r"mean_square_u\[1\]=-1.0 must"),
        (lambda: selection.chess(np.ones((2, 2)), np.asarray([np.nan, 1.0])), r"mean_square_u\[0\]=nan must"),
        (lambda: selection.dass(np.ones((2, 2)), np.asarray([1.0, -1.0])), r"norms\[1\]=-1.0 must"),
        (lambda: selection.core_counts(np.ones((2, 2)), 2.0), "share=2.0 must"),
        (lambda: selection.block_norms(np.ones((4, 6)), (2, 4)), r"block\[1\]=4 must"),
        (lambda: selection.above_quantile(np.ones(4), 1.5), "sparsity=1.5 must"),
        (lambda: selection.forced(np.ones(4, bool), on=(4,)), "on has channel 4"),
        (lambda: selection.forced(np.ones(4, bool), on=(1,), off=(1,)), "channel 1 is in both"),
        (lambda: selection.wanda(np.ones((2, 2)), np.asarray([-2.0, 1.0])), r"norms\[0\]=-2.0 must"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()
