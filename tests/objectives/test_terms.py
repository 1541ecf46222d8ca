"""Terms and their composition, against closed forms; the properties that AuxK must have."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.plain import LinearMap
from jaxinterp.methods import SparseAutoencoder
from jaxinterp.objectives import Ratio, auxk, l1, reconstruction, scale, total

SITES = Sites("y", "y")
KEY = jax.random.key(0)


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(64, 8)).astype(np.float32)
    weight = np.ones(64, np.float32)
    weight[::9] = 0
    batch = make_batch({"y": y}, weight, SITES)
    dictionary = SparseAutoencoder(features=20, k=3).recipe(10).init(KEY, batch, None).decomposition
    return dictionary, batch


def test_reconstruction_is_the_unexplained_variance(case):
    dictionary, batch = case
    loss, metrics = total(reconstruction())(dictionary, batch, KEY)
    kept = np.asarray(batch.weight) > 0
    y = np.asarray(batch.targets)[kept]
    error = y - np.asarray(dictionary(batch.inputs))[kept]
    expected = (error**2).sum() / ((y - y.mean(0)) ** 2).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["fvu"].value(), expected, rtol=1e-5)
    assert float(metrics["l0"].value()) <= 3
    np.testing.assert_allclose(metrics["fired"].total.sum(), metrics["l0"].total)


def test_masked_tokens_do_not_count(case):
    """Invariant 17."""
    dictionary, batch = case
    wild = jnp.where(batch.weight[:, None] > 0, batch.targets, 1e6)
    spoiled = eqx.tree_at(lambda b: b.arrays, batch, {"y": wild})
    for term in (reconstruction(), l1()):
        clean = jax.value_and_grad(lambda d, b=batch, t=term: total(t)(d, b, KEY)[0])(trained(dictionary))
        dirty = jax.value_and_grad(lambda d, b=spoiled, t=term: total(t)(d, b, KEY)[0])(trained(dictionary))
        np.testing.assert_allclose(clean[0], dirty[0], rtol=1e-6)
        np.testing.assert_allclose(clean[1].decoder, dirty[1].decoder, rtol=1e-5, atol=1e-7)


def test_masked_tokens_do_not_count_in_a_batch_topk():
    rng = np.random.default_rng(0)
    weight = np.ones(64, np.float32)
    weight[::9] = 0
    y = rng.normal(size=(64, 8)).astype(np.float32)
    method = SparseAutoencoder(features=20, k=3, activation="batch_topk")
    clean, wild = (make_batch({"y": rows}, weight, SITES) for rows in (y, np.where(weight[:, None] > 0, y, 1e3)))
    dictionary = method.recipe(10).init(KEY, clean, None).decomposition
    one, two = (total(reconstruction())(dictionary, batch, KEY) for batch in (clean, wild))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)
    for name in ("l0", "smallest_code", "fired"):
        np.testing.assert_allclose(one[1][name].value(), two[1][name].value(), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(one[1]["l0"].value(), 3, atol=0.02)


def test_total_works_on_decompositions_without_a_schedule(case):
    _, batch = case
    linear = LinearMap(jnp.eye(8), jnp.zeros(8), jnp.zeros(8), SITES)
    objective = total(lambda d, batch, forward: (jnp.mean((forward.output - batch.targets) ** 2), {}))
    assert float(objective(linear, batch, KEY)[0]) == 0


def trained(dictionary):
    return eqx.tree_at(lambda d: d.tokens_since_fired, dictionary, jnp.zeros(20))


def test_metrics_of_parts_add_to_the_metrics_of_the_whole(case):
    """Invariant 13."""
    dictionary, batch = case
    objective = total(reconstruction(), l1())
    parts = [jax.tree.map(lambda a, s=s: a[s] if a.ndim else a, batch) for s in (slice(0, 24), slice(24, 64))]
    added = jax.tree.map(jnp.add, *(objective(dictionary, part, KEY)[1] for part in parts))
    whole = objective(dictionary, batch, KEY)[1]
    for name in ("fvu", "l0", "l1", "fired"):
        np.testing.assert_allclose(added[name].value(), whole[name].value(), rtol=1e-5, err_msg=name)


def test_l1_and_scale(case):
    dictionary, batch = case
    codes = np.asarray(dictionary.encode(batch.inputs).dense())
    mass = (codes.sum(1) * np.asarray(batch.weight)).sum() / np.asarray(batch.weight).sum()
    np.testing.assert_allclose(total(l1())(dictionary, batch, KEY)[0], mass, rtol=1e-5)
    np.testing.assert_allclose(total(scale(l1(), 0.25))(dictionary, batch, KEY)[0], 0.25 * mass, rtol=1e-5)
    later = eqx.tree_at(lambda b: b.step, batch, jnp.asarray(7))
    ramp = total(scale(l1(), lambda step: step / 10))
    np.testing.assert_allclose(ramp(dictionary, later, KEY)[0], 0.7 * mass, rtol=1e-5)
    named = make_batch(batch.arrays, batch.weight, SITES, sparsity=0.5)
    np.testing.assert_allclose(total(scale(l1(), "sparsity"))(dictionary, named, KEY)[0], 0.5 * mass, rtol=1e-5)
    assert Ratio(jnp.zeros(()), jnp.zeros(())).value() == 0


def test_a_coefficient_that_nobody_gave_is_named(case):
    dictionary, batch = case
    given = make_batch(batch.arrays, batch.weight, SITES, sparsity=0.5)
    with pytest.raises(UserError, match=r"'sparsty'.*schedules=\{'sparsty'.*Did you mean 'sparsity'"):
        total(scale(l1(), "sparsty"))(dictionary, given, KEY)


def test_dead_features_need_to_be_counted():
    """A loss without the metrics of `total`: nothing would ever be dead."""
    rows = jax.random.normal(KEY, (64, 8))
    batch = make_batch({"y": rows}, jnp.ones(64), SITES)
    whole = total(reconstruction(), auxk())

    def keeping(*names):
        def objective(*given, model=None):
            loss, metrics = whole(*given)
            return loss, {name: metrics[name] for name in names}

        recipe = SparseAutoencoder(features=20, k=3, objective=objective).recipe(10)
        return jax.eval_shape(recipe.step, jax.eval_shape(recipe.init, KEY, batch, None), batch, KEY, None)

    with pytest.raises(UserError, match="without the metric 'fired' no feature is ever dead, and auxk never acts"):
        keeping("auxk")
    keeping("auxk", "fired")
    keeping()


def test_auxk_trains_dead_features_and_nothing_else(case):
    dictionary, batch = case
    dead = jnp.arange(20) >= 14
    ageing = eqx.tree_at(lambda d: d.tokens_since_fired, dictionary, jnp.where(dead, 1000, 0))
    # Far below the live ones, so that no token selects them on its own.
    ageing = eqx.tree_at(lambda d: d.encoder_bias, ageing, jnp.where(dead, -0.2, 0.0))
    term = auxk(1.0, dead_after=999)

    def loss(trainables):
        decomposition = eqx.tree_at(lambda d: (d.encoder, d.decoder, d.decoder_bias), ageing, trainables)
        return total(term)(decomposition, batch, KEY)[0]

    value, (encoder, decoder, bias) = jax.value_and_grad(loss)((ageing.encoder, ageing.decoder, ageing.decoder_bias))
    assert float(value) > 0
    assert (encoder[~dead] == 0).all() and (decoder[~dead] == 0).all() and (bias == 0).all()
    assert bool(jnp.any(encoder[dead] != 0, axis=1).all()) and bool(jnp.any(decoder[dead] != 0, axis=1).all())


def test_auxk_is_nothing_without_dead_features(case):
    dictionary, batch = case
    assert float(total(auxk(1.0, dead_after=999))(dictionary, batch, KEY)[0]) == 0


def test_auxk_value(case):
    """|ê - e|^2 / |e|^2 over counted tokens, times dead / k_aux where fewer than k_aux are dead."""
    dictionary, batch = case
    dead = np.arange(20) >= 18
    ageing = eqx.tree_at(lambda d: d.tokens_since_fired, dictionary, jnp.where(dead, 1000, 0))
    value = float(total(auxk(1.0, k=4, dead_after=999))(ageing, batch, KEY)[0])
    x = (np.asarray(batch.inputs) - np.asarray(ageing.input_mean)) / float(ageing.input_scale)
    z = np.maximum(x @ np.asarray(ageing.encoder).T + np.asarray(ageing.encoder_bias), 0) * dead
    residual = (np.asarray(batch.targets) - np.asarray(ageing(batch.inputs))) / float(ageing.output_scale)
    weight = np.asarray(batch.weight)[:, None]
    error = (weight * (z @ np.asarray(ageing.decoder) - residual) ** 2).sum() / (weight * residual**2).sum()
    np.testing.assert_allclose(value, error * 2 / 4, rtol=1e-4)
