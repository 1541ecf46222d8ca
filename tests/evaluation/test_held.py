"""Decompositions scored one after another on kept text have the rows that the scoreboard gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.at_output import at_output
from jaxinterp.decompositions.directions import Directions
from jaxinterp.decompositions.parts import NonnegativeParts
from jaxinterp.decompositions.plain import LinearMap
from jaxinterp.evaluation.held import hold, score_held
from jaxinterp.evaluation.scoreboard import scoreboard
from tests.methods.laboratory import SITE, subject, text

SIZES = {"tokens": 1024, "ce_tokens": 512}


def linear(seed):
    model = subject().model
    d = model.blocks[1].mlp.down_proj.weight.shape[1]
    matrix = 0.3 * jax.random.normal(jax.random.key(seed), (d, d))
    return LinearMap(matrix, jnp.zeros(d), jnp.full(d, 0.1), Sites(f"{SITE}/in", f"{SITE}/out"))


def test_rows_are_those_of_the_scoreboard():
    both = {"one": linear(0), "two": linear(1)}
    wanted = scoreboard(both, subject(), text(), **SIZES)
    held = hold(subject(), text(), SITE, both["one"].target_mean, **SIZES)
    for row in wanted:
        found = score_held(row["method"], both[row["method"]], held)
        assert found.keys() == row.keys()
        for key, value in row.items():
            assert found[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), key
    assert wanted[0]["fvu"] != pytest.approx(wanted[1]["fvu"], rel=1e-3), "the two must differ"
    y = held.counted_rows(f"{SITE}/out", 10**6)
    assert held.variance == pytest.approx(float(np.var(np.asarray(y), axis=0).sum()), rel=1e-5)


def test_what_it_does_not_hold_is_refused():
    held = hold(subject(), text(), SITE, linear(0).target_mean, **SIZES)
    x = jnp.zeros(held.counted_rows(f"{SITE}/in", 1).shape[1])
    eye = jnp.eye(len(x))
    inside = Directions(eye, eye, x, x, jnp.ones(()), Sites(f"{SITE}/in", f"{SITE}/in"))
    with pytest.raises(UserError, match="it must read"):
        score_held("inside", inside, held)
    with pytest.raises(UserError, match="only a decomposition of an MLP's"):
        at_output(linear(0), subject().model.blocks[1].mlp, x)


@pytest.mark.parametrize("port", ["in", "hidden"])
def test_a_decomposition_inside_is_seen_at_the_output(port):
    """What loses nothing of the array is exact at the output; the first of its directions alone is the MLP of those."""
    mlp = subject().model.blocks[1].mlp
    x = jax.random.normal(jax.random.key(0), (6, mlp.up_proj.weight.shape[0]))
    inner = x if port == "in" else mlp.hidden(x)
    d, name = inner.shape[1], f"{SITE}/{port}"
    if port == "in":
        eye, zero = jnp.eye(d), jnp.zeros(d)
        whole = Directions(eye, eye, zero, zero, jnp.ones(()), Sites(name, name))
        wanted = mlp(inner.at[:, 3:].set(0))
        some = whole.first(3)
    else:
        signs = jnp.concatenate([jnp.eye(d), -jnp.eye(d)])
        whole = NonnegativeParts(signs, jnp.zeros(d), jnp.ones(()), 400, Sites(name, name))
        some = NonnegativeParts(jnp.eye(d)[: d // 2], jnp.zeros(d), jnp.ones(()), 400, Sites(name, name))
        wanted = mlp.write(jnp.maximum(inner, 0).at[:, d // 2 :].set(0))
    mean = jnp.zeros(x.shape[1])
    np.testing.assert_allclose(at_output(whole, mlp, mean)(x), mlp(x), atol=1e-3)
    found = at_output(some, mlp, mean)(x)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert float(jnp.abs(found - mlp(x)).max()) > 0.05, "the wrong inner array would be exact too"
