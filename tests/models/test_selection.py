"""Selection against brute force, closed forms and exact errors; each with a variant that must fail."""

from itertools import combinations

import jax
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models import selection
from jaxinterp.models.sites import SetTo, run
from jaxinterp.models.transformer import TransformerConfig, initialise


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


def test_keep_only_is_the_mask_with_its_fill():
    a = np.random.default_rng(0).normal(size=(2, 3, 8))
    out = np.asarray(selection.KeepOnly(3, fill=7.0)(jax.numpy.asarray(a)))
    assert ((out == 7.0).sum(-1) == 5).all() and (out[out != 7.0] == a[out != 7.0]).all()


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
        (lambda: selection.wanda(np.ones((2, 2)), np.asarray([-2.0, 1.0])), r"norms\[0\]=-2.0 must"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_keep_only_is_an_edit_of_run():
    sizes = {"vocab_size": 20, "d_model": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "d_mlp": 12}
    model = initialise(TransformerConfig(**sizes, context=8, rotary_dimensions=8), jax.random.key(0))
    tokens, name = jax.numpy.asarray([[1, 2, 3]]), "blocks/0/mlp/hidden"
    hidden = np.asarray(run(model, tokens, keep=[name]).arrays[name])

    def logits(edit):
        return np.asarray(run(model, tokens, edits={name: edit}).logits)

    expected = logits(SetTo(jax.numpy.asarray(selection.masked(hidden, selection.top_k(np.abs(hidden), 4)))))
    np.testing.assert_allclose(logits(selection.KeepOnly(4)), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(logits(selection.KeepOnly(12)) - expected).max() > 1e-4  # broken: nothing is left out
