"""Ghost gradients: value and gradients against float64, dead features only, and no overflow."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import make_batch
from jaxinterp.methods import SparseAutoencoder, Transcoder
from jaxinterp.objectives import total
from jaxinterp.objectives.ghost import ghost

KEY = jax.random.key(0)
DEAD = np.arange(20) >= 14
PARTS = ("encoder", "encoder_bias", "decoder", "decoder_bias")


def case(method, dead=DEAD, d_out=8):
    """A dictionary whose dead features lie below zero, and a batch with masked tokens; x and y differ."""
    rng = np.random.default_rng(0)
    weight = np.ones(64, np.float32)
    weight[::9] = 0
    arrays = {"x": rng.normal(size=(64, 8)).astype(np.float32)}
    sites = method.needs("m")
    arrays = {sites.reads: arrays["x"]} | (
        {sites.writes: 2 * rng.normal(size=(64, d_out)).astype(np.float32)} if sites.reads != sites.writes else {}
    )
    batch = make_batch(arrays, weight, sites)
    dictionary = method.recipe(10).init(KEY, batch, None).decomposition
    keys = jax.random.split(jax.random.key(1), 2)
    values = (
        jnp.where(dead, 1000, 0),
        jnp.where(dead, -4.0, 0.1 * jax.random.normal(keys[0], (20,))),
        dictionary.decoder + 0.3 * jax.random.normal(keys[1], dictionary.decoder.shape),
    )
    return eqx.tree_at(lambda d: (d.tokens_since_fired, d.encoder_bias, d.decoder), dictionary, values), batch


def measured(dictionary, batch, coefficient=1.0):
    """Loss, metric, and the gradient by every trained array."""

    def loss(parts):
        changed = eqx.tree_at(lambda d: tuple(getattr(d, name) for name in PARTS), dictionary, parts)
        return total(ghost(coefficient, dead_after=999))(changed, batch, KEY)

    parts = tuple(getattr(dictionary, name) for name in PARTS)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(parts)
    return float(value), float(metrics["ghost"].value()), dict(zip(PARTS, gradient, strict=True))


def expected(dictionary, batch, coefficient):
    """The module's equation and its derivative by hand, float64, without the shift of a."""
    wide = lambda array: np.asarray(array, np.float64)
    s_in, s_out = float(dictionary.input_scale), float(dictionary.output_scale)
    x = (wide(batch.inputs) - wide(dictionary.input_mean)) / s_in
    r = (wide(batch.targets) - wide(dictionary(batch.inputs))) / s_out
    w = wide(batch.weight)
    dead = np.asarray(dictionary.tokens_since_fired) > 999
    e = np.exp(x @ wide(dictionary.encoder).T + wide(dictionary.encoder_bias)) * dead
    g = e @ wide(dictionary.decoder)
    c = np.linalg.norm(r, axis=1) / (2 * np.linalg.norm(g, axis=1))
    gap, squares = c[:, None] * g - r, w @ (r**2).sum(1)
    error = w @ (gap**2).sum(1) / squares
    fvu = squares * s_out**2 / float(dictionary.target_variance) / w.sum()
    by_g = 2 * (w * c)[:, None] * gap / squares
    by_a = by_g @ wide(dictionary.decoder).T * e
    size = coefficient * fvu / error
    gradient = {"encoder": by_a.T @ x, "encoder_bias": by_a.sum(0), "decoder": e.T @ by_g}
    return coefficient * fvu, error, {name: size * value for name, value in gradient.items()}


@pytest.mark.parametrize(
    "method", [SparseAutoencoder(features=20, k=3), Transcoder(features=20, activation="relu", l1=0.01)]
)
def test_value_and_gradients_are_those_of_the_equation(method):
    dictionary, batch = case(method)
    value, error, gradient = measured(dictionary, batch, 0.5)
    sure, sure_error, sure_gradient = expected(dictionary, batch, 0.5)
    assert value == pytest.approx(sure, rel=1e-4) and error == pytest.approx(sure_error, rel=1e-4)
    for name, wanted in sure_gradient.items():
        np.testing.assert_allclose(gradient[name], wanted, rtol=2e-3, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_only_dead_features_learn_though_all_lie_below_zero():
    """Encoder and decoder rows alike; AuxK and the reconstruction have nothing there to pass on."""
    dictionary, batch = case(SparseAutoencoder(features=20, k=3))
    _, _, gradient = measured(dictionary, batch)
    for name in PARTS[:3]:
        assert not np.asarray(gradient[name])[~DEAD].any(), name
    assert not gradient["decoder_bias"].any()
    for name in ("encoder", "decoder"):
        assert (np.linalg.norm(gradient[name], axis=1)[DEAD] > 1e-4).all(), name
    assert np.abs(gradient["encoder_bias"])[DEAD].min() > 1e-5
    assert float(dictionary.encode(batch.inputs).dense()[:, DEAD].max()) == 0


def test_nothing_without_dead_features_and_finite_for_all_of_them():
    alive, batch = case(SparseAutoencoder(features=20, k=3), dead=np.zeros(20, bool))
    value, error, gradient = measured(alive, batch)
    assert value == error == 0 and not any(part.any() for part in gradient.values())
    every, batch = case(SparseAutoencoder(features=20, activation="relu", l1=0.01), dead=np.ones(20, bool))
    assert all(np.isfinite(part).all() for part in measured(every, batch)[2].values())


def test_large_pre_activations_do_not_overflow_and_zero_write_vectors_start():
    dictionary, batch = case(SparseAutoencoder(features=20, k=3))
    loud = eqx.tree_at(lambda d: d.encoder_bias, dictionary, jnp.where(DEAD, 200.0, 0.0))
    quiet = eqx.tree_at(lambda d: d.encoder_bias, dictionary, jnp.where(DEAD, -200.0, 0.0))
    for shifted in (loud, quiet):  # exp(200) and exp(-200) are beyond float32
        value, error, gradient = measured(shifted, batch)
        assert np.isfinite([value, error]).all() and np.isfinite(gradient["encoder"]).all()
        assert np.linalg.norm(gradient["encoder"], axis=1)[DEAD].min() > 1e-4
    zero = eqx.tree_at(lambda d: d.decoder, dictionary, jnp.zeros_like(dictionary.decoder))
    _, _, gradient = measured(zero, batch)
    sizes = np.linalg.norm(gradient["decoder"], axis=1)
    assert np.isfinite(sizes).all() and sizes[DEAD].min() > 1e-5 and sizes.max() < 10
