"""The k largest by rounds: what `lax.top_k` gives, with ties, both zeros, infinities and NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.kernels import tournament, xla

TOKENS, FEATURES, K = 128, 2048, 40


def rows(kind):
    """[TOKENS, FEATURES] float32."""
    random = np.random.default_rng(0)
    normal = random.standard_normal((TOKENS, FEATURES)).astype(np.float32)
    if kind == "ties":  # some twenty different values, so that equal ones lie in one group and in many
        return np.round(3 * normal)
    if kind == "equal":
        return np.zeros_like(normal)
    if kind == "few":  # the rest is -inf: rounds go on through groups of which nothing is left
        return np.where(random.random(normal.shape) < 0.01, normal, -np.inf).astype(np.float32)
    if kind == "strange":
        strange = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45], np.float32)
        return np.where(random.random(normal.shape) < 0.02, random.choice(strange, normal.shape), normal)
    return normal


def expected(pre):
    """By a sort of four tokens: NaN first, both zeros equal, of equal values the first places."""
    places = np.stack([sorted(range(FEATURES), key=lambda j, row=row: _rank(row[j], j))[:K] for row in pre[:4]])
    return np.take_along_axis(pre[:4], places, axis=1), places


def _rank(value, place):
    return (0 if np.isnan(value) else 1, 0.0 if np.isnan(value) else -value, place)


@pytest.fixture(scope="module")
def select():
    return jax.jit(lambda pre: tournament.tournament(pre, K))


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "few", "strange"])
def test_it_selects_what_a_sort_does(select, kind):
    pre = rows(kind)
    values, places = select(pre)
    right, where = expected(pre)
    np.testing.assert_array_equal(places[:4], where)
    np.testing.assert_array_equal(values[:4], right)


def test_every_token_is_that_of_top_k(select):
    pre = rows("ties") + 0.0
    values, places = select(pre)
    right, where = jax.jit(lambda pre: jax.lax.top_k(pre, K))(pre)
    np.testing.assert_array_equal(values, right)
    np.testing.assert_array_equal(places, where)


def test_without_what_was_taken_equal_values_would_come_twice(monkeypatch):
    """Broken: every round forgets which places of its value were taken before."""
    loop = jax.lax.fori_loop

    def forgetting(first, last, body, start):
        def one(rank, state):
            best, after, *found = body(rank, state)
            return best, jnp.full_like(after, -1), *found

        return loop(first, last, one, start)

    monkeypatch.setattr(tournament.jax.lax, "fori_loop", forgetting)
    _, places = jax.jit(lambda pre: tournament.tournament(pre, K))(rows("equal"))
    assert len(set(np.asarray(places[0]).tolist())) < K


def test_by_its_bits_alone_nan_would_come_last(monkeypatch):
    """Broken: the NaN of x86 has its sign bit set."""
    raw = lambda numbers: tournament.ordered(jax.lax.bitcast_convert_type(numbers, jnp.int32))
    monkeypatch.setattr(tournament, "keys", raw)
    pre = rows("normal")
    pre[:, 7] = -np.float32(np.nan)
    _, places = jax.jit(lambda pre: tournament.tournament(pre, K))(pre)
    assert 7 not in np.asarray(places[0])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="chosen on a CPU alone")
def test_it_runs_where_it_pays(monkeypatch):
    """Many tokens, thousands of features in whole groups, few to be chosen: all else goes by top_k."""
    called = []
    monkeypatch.setattr(xla, "tournament", lambda pre, k: called.append(pre.shape) or tournament.tournament(pre, k))
    for tokens, features, k in (
        (128, 2048, 8),
        (127, 2048, 8),
        (128, 2047, 8),
        (128, 1024, 8),
        (128, 2048, 65),
        (128, 8224, 8),
    ):
        jax.eval_shape(lambda pre, k=k: xla.largest(pre, k), jax.ShapeDtypeStruct((tokens, features), jnp.float32))
    assert called == [(128, 2048)]
