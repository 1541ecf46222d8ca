"""Masks and thresholds of the authors' code, against that code's rules written out in NumPy, in its own layout.

Weights there are `[d_out, d_in]`, as in a PyTorch `Linear`: the tests make them so, and give ours the transpose.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.sparsity.measures import cett_threshold
from jaxinterp.models import published, selection
from jaxinterp.models.pruning import weight_mask


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rng(seed=7):
    return np.random.default_rng(seed)


def test_wina_keeps_whole_channels_by_the_norm_of_a_column_of_theirs():
    x, theirs = rng().standard_t(3, size=(6, 11)), rng(1).normal(size=(5, 11)) * rng(2).lognormal(size=11)
    norms = np.sqrt((theirs**2).sum(axis=0))  # weight.norm(dim=0)
    for sparsity in (0.25, 0.4, 0.5, 0.65):
        expected = np.zeros(x.shape, bool)
        for row, kept in zip(np.abs(x) * norms, expected, strict=True):
            kept[np.argsort(-row)[: int(11 * (1 - sparsity))]] = True
        np.testing.assert_array_equal(published.wina_mask(x, theirs.T, sparsity), expected)
    square = rng(3).normal(size=(11, 11)) * rng(2).lognormal(size=11)
    wrong = published.wina_mask(x, square, 0.5)  # broken: their layout
    assert (np.asarray(wrong) != np.asarray(published.wina_mask(x, square.T, 0.5))).any()


def test_teal_reads_its_threshold_off_a_histogram():
    """`Distribution.icdf` and `find_histogram`, step by step."""
    x = rng().laplace(size=(500, 8))
    flat = np.sort(x.reshape(-1))
    cut = int(0.01 * len(flat))
    edges = [flat[0], *np.linspace(flat[cut], flat[-cut], 299), flat[-1]]
    counts = np.zeros(300)
    for value in flat:
        counts[min(np.searchsorted(edges, value, side="right") - 1, 299)] += 1
    for sparsity in (0.1, 0.5, 0.9):
        target, seen, index = (0.5 + sparsity / 2) * counts.sum(), 0.0, 0
        while seen + counts[index] < target:
            seen, index = seen + counts[index], index + 1
        centre = lambda i: (edges[i] + edges[i + 1]) / 2
        expected = centre(index - 1) + (target - seen) / counts[index] * (centre(index) - centre(index - 1))
        found = published.teal_threshold(x, sparsity, bins=300)
        assert found == pytest.approx(expected, rel=1e-12)
        assert (np.abs(x) <= found).mean() == pytest.approx(sparsity, abs=0.03)
    skewed = published.teal_threshold(x + 1.0, 0.5)  # what it assumes does not hold: another share goes
    assert (np.abs(x + 1.0) <= skewed).mean() > 0.6
    assert np.asarray(selection.above_quantile(np.abs(x + 1.0), 0.5)).mean() == 0.5


def test_cats_takes_an_edge_and_a_strict_comparison():
    size = np.abs(rng().normal(size=4000)) * 0.3
    edges = np.concatenate([[-np.inf], np.linspace(-1, 1, 998), [np.inf]])
    counts = np.histogram(size, edges)[0]
    for sparsity in (0.3, 0.5, 0.9):
        below, index = counts[0], 0
        while below / 4000 <= sparsity:
            index += 1
            below += counts[index]
        found = published.cats_threshold(edges, counts, sparsity)
        assert found == edges[index]
        assert (~np.asarray(selection.above(size, found))).mean() == pytest.approx(sparsity, abs=0.01)
    s = np.asarray([-0.5, -0.2, 0.0, 0.2, 0.5])
    keeps = np.where(s > 0.2, s, 0) - np.where(-s > 0.2, -s, 0)  # threshold(act) - threshold(-act)
    np.testing.assert_array_equal(selection.masked(s, selection.above(np.abs(s), 0.2)), keeps)


def test_chess_thresholds_leave_out_the_least_important_entries():
    s, u = rng().normal(size=(50, 9)), rng(1).normal(size=(50, 9)) * rng(2).lognormal(size=9)
    square = np.asarray([sum(row[j] ** 2 for row in u) / 50 for j in range(9)])
    importance = sorted(s[i, j] ** 2 * square[j] for i in range(50) for j in range(9))
    t = published.chess_importance(s, square, 0.6)
    assert t == pytest.approx(importance[int(0.6 * 450) - 1], rel=1e-12)
    mask = np.abs(s) > np.asarray(selection.chess_thresholds(t * (1 + 1e-12), square))
    assert (~mask).sum() == int(0.6 * 450)
    assert (np.abs(s) > math.sqrt(t)).sum() != mask.sum()  # broken: one threshold for all channels
    assert published.chess_importance(s, square, 0.0) == 0.0


def test_r_sparse_spends_what_it_says():
    channels, rank = published.r_sparse_sizes(576, 1536, 0.5, 0.9)
    assert (channels, rank) == (259, 21)
    assert channels * 1536 + rank * (576 + 1536) <= 0.5 * 576 * 1536 < channels * 1536 + (rank + 1) * (576 + 1536)
    assert published.r_sparse_sizes(576, 1536, 0.5, 1.0) == (288, 0)


def test_core_neurons_are_the_most_frequent_ones():
    a = rng().normal(size=(40, 20)) + rng(1).normal(size=20)
    k = int(0.4 * (a > 0).sum() / 40)
    count = np.zeros(20)
    for row in a:
        for j in sorted(range(20), key=lambda j: -row[j])[:k]:
            count[j] += 1
    expected = sorted(sorted(range(20), key=lambda j: (-count[j], j))[: int(20 * 0.25)])
    np.testing.assert_array_equal(published.core_neurons(a, 0.4, 0.25), expected)
    by_size = selection.top_k(selection.amp(a), 5)  # broken: sizes in place of signed values
    assert set(np.flatnonzero(by_size)) != set(expected)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.6])
@pytest.mark.parametrize("name", ["wanda", "dass"])
def test_weights_go_as_in_a_stable_sort_of_their_matrix(name, share):
    """`prune_wanda` and `prune_wandinter`: the same number of each group, of equal scores the first."""
    theirs = rng().integers(-3, 4, size=(7, 9)) * 0.5  # many ties
    x = rng(1).normal(size=(30, 9 if name == "wanda" else 7)) * rng(2).lognormal(size=9 if name == "wanda" else 7)
    square = sum(np.linalg.norm(x[i : i + 10], axis=0) ** 2 for i in range(0, 30, 10)) / 3  # three sequences
    if name == "wanda":
        metric, axis = np.abs(theirs) * np.sqrt(square)[None, :], 1
        score, within = selection.wanda(theirs.T, np.linalg.norm(x, axis=0)), "output"
    else:
        metric, axis = np.abs(theirs) * square[:, None] ** 0.25, 0
        score, within = selection.dass(theirs.T, np.linalg.norm(x, axis=0)), "input"
    gone = np.zeros(theirs.shape, bool)
    order = np.argsort(metric, axis=axis, kind="stable")
    np.put_along_axis(gone, np.take(order, range(int(theirs.shape[axis] * share)), axis=axis), True, axis=axis)
    np.testing.assert_array_equal(weight_mask(score, share, within=within).T, ~gone)
    other = weight_mask(score, share, within="input" if name == "wanda" else "output")  # broken: the other axis
    assert (gone == np.asarray(other).T).any()


def test_groups_of_two_in_four_lie_along_the_published_side():
    theirs, norms = rng().normal(size=(8, 12)), rng(1).lognormal(size=12)
    metric, gone = np.abs(theirs) * norms, np.zeros((8, 12), bool)
    for start in range(0, 12, 4):  # topk(W_metric[:, start : start + 4], 2, dim=1, largest=False)
        for i in range(8):
            gone[i, start + np.argsort(metric[i, start : start + 4])[:2]] = True
    np.testing.assert_array_equal(weight_mask(selection.wanda(theirs.T, norms), (2, 4), within="output").T, ~gone)
    hidden, gone = rng(2).lognormal(size=8), np.zeros((8, 12), bool)
    metric = np.abs(theirs) * np.sqrt(hidden)[:, None]
    for start in range(0, 8, 4):  # DaSS, gate and up: along the neurons
        for j in range(12):
            gone[start + np.argsort(metric[start : start + 4, j])[:2], j] = True
    np.testing.assert_array_equal(weight_mask(selection.dass(theirs.T, hidden), (2, 4), within="input").T, ~gone)


def test_magnitude_of_the_whole_matrix_takes_one_more():
    theirs = rng().normal(size=(5, 9))
    threshold = sorted(np.abs(theirs).reshape(-1))[int(45 * 0.5)]
    found = np.asarray(published.magnitude_mask(theirs.T, 0.5))
    np.testing.assert_array_equal(found.T, ~(np.abs(theirs) <= threshold))
    assert (~found).sum() == int(45 * 0.5) + 1
    assert (~np.asarray(weight_mask(np.abs(theirs.T), 0.5, within="layer"))).sum() == int(45 * 0.5)


def test_structured_scores_and_counts():
    """AMP's two scores and its counts; peak to peak of `[d_mlp, d]` matrices."""
    z, theirs = rng().normal(size=(10, 3, 4)), rng(1).normal(size=(5, 12))  # o_proj.weight: [d, heads * head_dim]
    expected = [sum(np.abs(theirs[:, 4 * h : 4 * h + 4] @ z[t, h]).sum() for t in range(10)) / 10 for h in range(3)]
    np.testing.assert_allclose(selection.amp_heads(z, theirs.T), expected, rtol=1e-12)
    np.testing.assert_allclose(selection.amp(z[:, 0]), np.abs(z[:, 0]).mean(0), rtol=1e-12)
    gate, up = rng(2).normal(size=(15, 6)), rng(3).normal(size=(15, 6)) - 1
    score = [sum(w[j].max() + abs(w[j].min()) for w in (gate, up)) for j in range(15)]
    np.testing.assert_allclose(selection.peak_to_peak(gate.T, up.T), score, rtol=1e-12)
    kept = sorted(sorted(range(15), key=lambda j: -score[j])[: 15 - int(0.3 * 15)])
    np.testing.assert_array_equal(published.peak_to_peak_kept(gate.T, up.T, 30), kept)
    assert published.peak_to_peak_kept(gate.T, up.T, 100).size == 1
    gone = published.amp_counts(9, 1536, 0.2)
    assert gone == (round(1.8), round(1536 * (9 / 1536 * (0.2 - 2 / 9) + 0.2))) == (2, 307)
    assert published.amp_counts(2, 10, 1.0) == (1, 9)


@pytest.mark.parametrize("target", [0.05, 0.2, 0.5, 0.9])
def test_the_threshold_of_cett_is_the_authors(target):
    """`calc_thresholds_given_cett`, on inputs where CETT is not monotone: the same of several crossings."""
    a = rng().normal(size=(12, 10))
    theirs = rng(1).normal(size=(3, 10)) * rng(2).lognormal(size=10)  # [d_model, d_mlp]: many cancel
    norm = np.abs(a) * np.linalg.norm(theirs, axis=0)
    grid = np.linspace(norm.min(), np.quantile(norm, 0.99), 65_536)
    left, right = 0, len(grid) - 1
    while left < right:
        middle = (left + right) // 2
        tail = np.where(norm > grid[middle], 0, a) @ theirs.T
        if np.mean(np.linalg.norm(tail, axis=-1) / np.linalg.norm(a @ theirs.T, axis=-1)) > target:
            right = middle
        else:
            left = middle + 1
    found = cett_threshold(jnp.asarray(a), jnp.asarray(theirs.T), target)
    # Where every candidate will do they stop before the last one, and ours is the last.
    assert found.epsilon == pytest.approx(grid[-1] if left == len(grid) - 1 else grid[left - 1], rel=1e-9)
    assert (left == len(grid) - 1) == (target == 0.9)
    assert found.achieved <= target
    swapped = cett_threshold(jnp.asarray(a), jnp.asarray(theirs.T / np.linalg.norm(theirs.T, axis=1)[:, None]), target)
    assert swapped.epsilon != pytest.approx(grid[left - 1], rel=1e-3)  # broken: no norms


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: published.wina_mask(np.ones((2, 4)), np.ones((4, 3)), 1.2), r"sparsity=1\.2 must lie in 0 to 1"),
        (lambda: published.teal_threshold(np.ones(50), 0.5), "of 50 entries"),
        (lambda: published.cats_threshold(np.ones(4), np.ones(4), 0.5), "4 bins have 5"),
        (lambda: published.magnitude_mask(np.ones((2, 4)), 1.0), "below 1"),
        (lambda: published.peak_to_peak_kept(np.ones((2, 4)), np.ones((2, 4)), 101), "percent=101"),
    ],
)
def test_what_is_out_of_range_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()
