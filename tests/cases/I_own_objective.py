"""Kind I: mistakes in an objective of one's own. Right: one line each that names the mistake, in a second or two."""

import time

import jax.numpy as jnp

from jaxinterp import UserError, fit, load, load_text
from jaxinterp.methods import Transcoder
from jaxinterp.objectives import ratio, reconstruction, total


def attempt(label, objective):
    clock = time.perf_counter()
    try:
        method = Transcoder(features=64, k=4, objective=objective)
        fit(method, subject, train, site="blocks/1/mlp", steps=10, batch_size=256)
        print("PASS   ", label)
    except UserError as error:
        print("REFUSED", label, f"{time.perf_counter() - clock:.1f} s ->", str(error)[:400])
    except Exception as error:
        print("CRASH  ", label, f"{time.perf_counter() - clock:.1f} s ->", type(error).__name__, str(error)[:150])


def fvu(decomposition, batch):
    output = decomposition(batch.inputs)
    return jnp.sum((batch.targets - output) ** 2, -1) / decomposition.target_variance


def only_the_value(decomposition, batch, key, *, model=None):
    return ratio(fvu(decomposition, batch), batch.weight).value()


def float_metric(decomposition, batch, key, *, model=None):
    value = ratio(fvu(decomposition, batch), batch.weight).value()
    return value, {"fvu": value, "half": 0.5}


def vector_loss(decomposition, batch, key, *, model=None):
    errors = fvu(decomposition, batch)
    return errors, {"fvu": ratio(errors, batch.weight)}


def python_if(decomposition, batch, key, *, model=None):
    value = ratio(fvu(decomposition, batch), batch.weight)
    loss = value.value()
    if loss > 0.5:
        loss = 2 * loss
    return loss, {"fvu": value}


def to_float(decomposition, batch, key, *, model=None):
    value = ratio(fvu(decomposition, batch), batch.weight)
    return float(value.value()), {"fvu": value}


def wrong_shapes(decomposition, batch, key, *, model=None):
    loss = jnp.mean(batch.targets - batch.targets[:, :3])
    return loss, {}


def no_model(decomposition, batch, key):
    return jnp.zeros(()), {}


subject = load("tiny")
train, _ = load_text("docs", subject.tokenizer, seq=64, max_tokens=20_000)
for made in (only_the_value, float_metric, vector_loss, python_if, to_float, wrong_shapes, no_model):
    attempt(made.__name__, made)
attempt("forgot total(...)", reconstruction())
attempt("forgot to call", reconstruction)
attempt("right", total(reconstruction()))
