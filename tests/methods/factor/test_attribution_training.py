"""APD as a method: its terms and what it keeps against NumPy, parts that sum to an MLP, and the toy model's parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.parameter_parts import AttributionParts, Blocks
from jaxinterp.evaluation.planted.superposition import IN, OUT, Superposition
from jaxinterp.methods.factor.attribution_training import AttributionParameters, kept, losses, start
from jaxinterp.methods.factor.targets import LeafTarget
from tests.methods.laboratory import SITE, subject


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def toy_batch(x):
    return make_batch({"x": x}, jnp.ones(len(x)), Sites("x", "x"))


def test_terms_and_what_is_kept_are_those_of_the_paper(float64):
    """Gradients written out: dy/dW_in and dy/dW_out of relu(x W_in W_out + b)."""
    model = Superposition(normal(0, 4, 2), normal(1, 2, 4), normal(2, 4))
    blocks = {IN: Blocks(normal(3, 3, 4, 1), normal(4, 3, 1, 2)), OUT: Blocks(normal(5, 3, 2, 1), normal(6, 3, 1, 4))}
    x = jnp.abs(normal(7, 6, 4))
    method = AttributionParameters(parts=3, k=1.5, simple=0.1, p=0.9)
    mask = np.asarray(kept(method, AttributionParts(blocks), toy_batch(x), model))
    w, v, b, rows = (np.asarray(each) for each in (model.weight_in, model.weight_out, model.bias, x))
    first = np.einsum("cim,cmo->cio", blocks[IN].read, blocks[IN].write)
    second = np.einsum("cim,cmo->cio", blocks[OUT].read, blocks[OUT].write)
    open_ = rows @ w @ v + b > 0
    along = np.einsum("ti,cij,jo->tco", rows, first, v) + np.einsum("ti,ij,cjo->tco", rows, w, second)
    attribution = np.sum((along * open_[:, None]) ** 2, axis=-1)
    wanted = attribution >= np.sort(attribution.ravel())[-9]  # int(1.5 * 6) of the whole batch
    np.testing.assert_array_equal(mask, wanted)
    each = attribution >= np.sort(attribution, axis=1)[:, -2:-1]  # the broken variant: two of every input
    assert np.any(each != wanted)

    loss, metrics = losses(method, AttributionParts(blocks), toy_batch(x), model)
    hidden = np.einsum("ti,cij,tc->tj", rows, first, mask)
    made = np.maximum(np.einsum("tj,cjo,tc->to", hidden, second, mask) + b, 0)
    output = np.mean((np.maximum(rows @ w @ v + b, 0) - made) ** 2)
    match = (np.sum((w - first.sum(0)) ** 2) + np.sum((v - second.sum(0)) ** 2)) / 16
    np.testing.assert_allclose(metrics["output"].value(), output, rtol=1e-5)
    np.testing.assert_allclose(metrics["match"].value(), match, rtol=1e-5)
    simple = float(metrics["simple"].value())
    np.testing.assert_allclose(loss, match + output + 0.1 * simple, rtol=1e-5)


def test_parts_that_sum_to_an_mlp_lose_nothing_when_all_are_kept():
    """One part of full rank and one of zeros; the part of zeros is not kept where one of two is."""
    model = subject().model
    mlp = model.blocks[1].mlp
    x = jax.random.normal(jax.random.key(0), (12, mlp.up_proj.weight.shape[0]))
    batch = make_batch(
        {f"{SITE}/in": x, f"{SITE}/out": mlp(x)}, jnp.ones(12).at[3].set(0), Sites(f"{SITE}/in", f"{SITE}/out")
    )
    target = LeafTarget(SITE)
    blocks = {}
    for name, weight in target.weights(model).items():
        nothing = jnp.zeros_like(weight)
        blocks[name] = Blocks(
            jnp.stack([weight, nothing]), jnp.stack([jnp.eye(weight.shape[1]), jnp.zeros((weight.shape[1],) * 2)])
        )
    method = AttributionParameters(target, parts=2, k=1.0)
    found = AttributionParts(blocks)
    np.testing.assert_array_equal(kept(method, found, batch, model)[:, 0], batch.weight)
    _, metrics = losses(method, found, batch, model)
    assert float(metrics["output"].value()) < 1e-8 and float(metrics["match"].value()) < 1e-12
    made = start(method, jax.random.key(1), model)
    _, metrics = losses(method, made, batch, model)
    assert float(metrics["output"].value()) > 0.1, "the broken variant: random parts"


def test_more_parts_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"k=6\.0 .*parts=5"):
        AttributionParameters(parts=5, k=6.0)
