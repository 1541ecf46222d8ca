"""Mistakes in an objective of one's own are told in one line, when it is traced with shapes alone."""

import jax
import jax.numpy as jnp
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.methods import Seeds, Transcoder
from jaxinterp.objectives import Ratio, l1, ratio, reconstruction, scale, total
from jaxinterp.objectives.check import check_term, checked
from jaxinterp.training.record import brings_code

BATCH = make_batch({"x": jnp.ones((4, 3)), "y": jnp.ones((4, 3))}, jnp.ones(4), Sites("x", "y"))


def traced(objective):
    """What `checked` says of an objective of a decomposition that is one array."""
    call = checked(objective)
    return jax.eval_shape(lambda w, key: call(w, BATCH, key), jnp.ones(3), jax.random.key(0))


def objective_that(returns):
    def mine(decomposition, batch, key, *, model=None):
        return returns(jnp.mean((batch.targets - batch.inputs * decomposition) ** 2, axis=-1), batch)

    return mine


GOOD = objective_that(lambda errors, batch: (ratio(errors, batch.weight).value(), {"e": ratio(errors, batch.weight)}))


def branching(errors, batch):
    loss = jnp.mean(errors)
    return (loss if loss > 1 else 2 * loss), {}


def counting(errors, batch):
    return sum(errors[i] for i in range(jnp.argmax(errors) + 1)), {}


def looping(errors, batch):
    while jnp.any(errors > 1):
        errors = errors / 2
    return jnp.mean(errors), {}


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        (lambda e, b: jnp.mean(e), r"returned an array of shape \[\] instead of two things: return loss, \{"),
        (lambda e, b: (jnp.mean(e), {}, 1), "returned a tuple of 3 instead of two things"),
        (lambda e, b: None, "returned None instead of two things"),
        (lambda e, b: ({"e": ratio(e, b.weight)}, jnp.mean(e)), "the two are the wrong way round"),
        (lambda e, b: (jnp.mean(e), {"e": 0.5}), "metric 'e' is a float instead of a sum and a count"),
        (lambda e, b: (jnp.mean(e), {"e": jnp.mean(e)}), r"metric 'e' is an array of shape \[\] instead of a sum"),
        (lambda e, b: (jnp.mean(e), {"e": Ratio(jnp.mean(e), 4.0)}), "count of metric 'e' is a float: give an array"),
        (lambda e, b: (e, {}), r"the loss has shape \[4\] instead of \[\]: take a mean over the tokens"),
        (lambda e, b: (e[None, :1], {}), r"the loss has shape \[1, 1\]"),
        (lambda e, b: (jnp.sum(e > 0), {}), "the loss is int32: it must be a float"),
        (branching, r"test_check.py, line \d+: `return \(loss if loss > 1 .*Python's if.* jax.lax.cond"),
        (looping, r"line \d+: `while jnp.any\(errors > 1\):`.*Python's if, while"),
        (lambda e, b: (jnp.float32(float(jnp.mean(e))), {}), r"float\(\), int\(\), .item\(\) and NumPy need a number"),
        (counting, r"float\(\), int\(\)"),
        (lambda e, b: (jnp.mean(e - jnp.ones(3)), {}), r"TypeError: sub got incompatible shapes .* \(4,\), \(3,\)"),
        (lambda e, b: (jnp.mean(e * b.coefficient), {}), "AttributeError: .*coefficient"),
    ],
)
def test_what_it_returns_is_refused_by_name(returns, words):
    with pytest.raises(UserError, match=words) as refused:
        traced(objective_that(returns))
    assert len(str(refused.value).splitlines()) == 1 and "objective 'objective_that.mine'" in str(refused.value)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (reconstruction(), r"is a term: write objective=total\(reconstruction\(...\)\)"),
        (scale(l1(), 0.1), r"is a term: write objective=total\(scale"),
        (reconstruction, r"takes no arguments: call it, reconstruction\(\)"),
        ([reconstruction(), l1()], r"list of terms: write total\(\*terms\)"),
        ("reconstruction", "objective='reconstruction' is not a function"),
        (lambda decomposition, batch, key: 0, r"it must take \(decomposition, batch, key, \*, model=None\)"),
        (lambda decomposition, batch: 0, r"it must take"),
    ],
)
def test_what_is_no_objective_is_refused_before_it_is_traced(objective, words):
    with pytest.raises(UserError, match=words):
        checked(objective)
    if callable(objective):
        with pytest.raises(UserError, match=words):
            Transcoder(features=8, k=2, objective=objective).recipe(10)


def test_terms_are_looked_at_too():
    with pytest.raises(UserError, match=r"total\(a, b\), not total\(\[a, b\]\)"):
        check_term([reconstruction(), l1()])
    with pytest.raises(UserError, match=r"term 'reconstruction' takes no arguments"):
        total(reconstruction)
    with pytest.raises(UserError, match="is an objective already"):
        total(total(reconstruction()))


def test_a_right_objective_is_what_it_was():
    loss, metrics = checked(GOOD)(jnp.full(3, 0.5), BATCH, jax.random.key(0))
    assert float(loss) == 0.25 and float(metrics["e"].total) == 1.0


def test_only_code_of_the_user_s_own_is_traced_beforehand():
    def own_term(decomposition, batch, forward):
        return jnp.zeros(()), {}

    assert not brings_code(Transcoder()) and not brings_code(Seeds(Transcoder(objective=total(reconstruction())), 2))
    assert brings_code(Transcoder(objective=GOOD)) and brings_code(Transcoder(objective=total(scale(own_term, 0.1))))
