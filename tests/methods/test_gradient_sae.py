"""The gradient SAE: its selection on planted loud and quiet features, its training, its place on a mesh and on disk."""

from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import harvest_jit
from jaxinterp.decompositions import codec
from jaxinterp.decompositions.activations import BatchTopK, TopK
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.methods.sparse.gradient_sparse_autoencoder import GradientSparseAutoencoder
from jaxinterp.models.tiny import TINY, planted_transformer, unit_rows

D, LOUD, QUIET, ACTIVE, K = 32, 12, 12, 3, 4
SITES = Sites(("x", "x/gradient"), "x")


def plant(seed=0, samples=2000):
    """Loud features that the loss does not see, and quiet ones that it is made of; 3 + 3 active."""
    keys = jax.random.split(jax.random.key(seed), 6)
    rows = unit_rows(keys[0], LOUD + QUIET, D)

    def chosen(key, count):
        places = jax.lax.top_k(jax.random.uniform(key, (samples, count)), ACTIVE)[1]
        return jnp.zeros((samples, count)).at[jnp.arange(samples)[:, None], places].set(1.0)

    loud = chosen(keys[1], LOUD) * jax.random.uniform(keys[2], (samples, LOUD), minval=1.5, maxval=2.5)
    active = chosen(keys[3], QUIET)
    quiet = active * jax.random.uniform(keys[4], (samples, QUIET), minval=0.3, maxval=0.6)
    dual = jnp.linalg.pinv(rows)  # column j is orthogonal to every row but j
    signs = jnp.where(jax.random.bernoulli(keys[5], shape=quiet.shape), 1.0, -1.0)
    gradient = (active * signs) @ dual[:, LOUD:].T
    return rows, jnp.concatenate([loud, quiet], axis=1) @ rows, gradient


def true_dictionary(rows, own, strength):
    """Read vectors that undo the write vectors exactly."""
    method = GradientSparseAutoencoder(features=LOUD + QUIET, k=K, own=own, strength=strength, normalise=False)
    sample = make_batch({"x": jnp.ones((4, D)), "x/gradient": jnp.ones((4, D))}, jnp.ones(4), SITES)
    state = method.recipe(1).init(jax.random.key(0), sample, None)
    where = lambda d: (d.dictionary.encoder, d.dictionary.decoder)
    return eqx.tree_at(where, state.decomposition, (jnp.linalg.pinv(rows).T, rows))


def picks(own, strength, alone=False):
    """How many quiet features are chosen per token, and the first-order error in the loss."""
    rows, x, gradient = plant()
    dictionary = true_dictionary(rows, own, strength)
    codes = dictionary.encode(x if alone else (x, gradient))
    error = dictionary.decode(codes, x) - x
    quiet = jnp.sum((codes.indices >= LOUD) & (codes.values > 0), axis=1)
    return float(quiet.mean()), float(jnp.abs(jnp.sum(gradient * error, axis=1)).mean())


@pytest.mark.parametrize(("own", "strength"), [(1.0, 20.0), (0.0, 1.0)])
def test_effect_finds_the_quiet_features(own, strength):
    quiet, effect = picks(own, strength)
    assert quiet >= 2.99 and effect < 1e-3


def test_size_alone_does_not():
    """The controls: no gradient, and a strength of nothing."""
    for quiet, effect in (picks(1.0, 20.0, alone=True), picks(1.0, 0.0)):
        assert quiet < 1.5 and effect > 0.3


def test_equal_effects_select_what_topk_selects():
    """Where |D_j . g| is the same for all j, the score is the size."""
    rows, x, _ = plant()
    dictionary = true_dictionary(rows, 1.0, 1.0)
    gradient = jnp.broadcast_to(jnp.linalg.pinv(rows) @ jnp.ones(LOUD + QUIET), x.shape)
    for got, expected in zip(
        jax.tree.leaves(dictionary.encode((x, gradient))), jax.tree.leaves(dictionary.encode(x)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_is_chosen_does_not_depend_on_the_units():
    """x times a number, and its gradient over it: the same features, though the plain size of effects is another."""
    _, x, gradient = plant(samples=400)

    @cache
    def chosen(scale, own=1.0):
        x_now, g_now = scale * x, gradient / scale
        method = GradientSparseAutoencoder(features=48, k=K, own=own)
        batch = make_batch({"x": x_now, "x/gradient": g_now}, jnp.ones(400), SITES)
        dictionary = method.recipe(1).init(jax.random.key(0), batch, None).decomposition
        return np.sort(np.asarray(dictionary.encode((x_now, g_now)).indices), axis=1)

    for unit in (0.01, 100.0):
        assert (chosen(1.0) == chosen(unit)).all(axis=1).mean() > 0.99
        assert (chosen(1.0) == chosen(1.0, own=unit)).all(axis=1).mean() < 0.9, "the mixture matters"


def test_gradients_do_not_cross_documents():
    """Behind the last block an array feeds one prediction: that of the next token, which may be another document's."""
    model = planted_transformer(jax.random.key(0), replace(TINY, layers=1, d_model=32, heads=2, kv_heads=2, d_mlp=64))
    name = "blocks/0/mlp/out"
    windows = {"tokens": jnp.arange(24).reshape(2, 12), "weight": jnp.ones((2, 12))}
    documents = jnp.broadcast_to(jnp.arange(12) // 5, (2, 12))

    def silent(windows):
        gradient = harvest_jit(model, windows, (f"{name}/gradient",)).arrays[f"{name}/gradient"]
        return [int(place) for place in jnp.flatnonzero(~gradient.any(axis=(0, 2)))]

    assert silent(windows) == [11]
    assert silent(windows | {"document": documents}) == [4, 9, 11]


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_token_without_a_gradient_chooses_by_size(own):
    """The last of a window has no next token: if all its scores were 0, the first features would be chosen."""
    rows, x, gradient = plant(samples=64)
    dictionary = true_dictionary(rows, own, 1.0)
    last = jnp.arange(64) % 8 == 7
    codes = dictionary.encode((x, jnp.where(last[:, None], 0.0, gradient))).dense()
    np.testing.assert_array_equal(codes[last], dictionary.encode(x).dense()[last])
    np.testing.assert_array_equal(codes[~last], dictionary.encode((x, gradient)).dense()[~last])
    assert bool((codes[~last] != dictionary.encode(x).dense()[~last]).any())


def test_its_score_is_the_published_one_where_write_vectors_are_units():
    """z_j (own + strength |D_j . g|), g over its root mean square, in a dictionary that normalises."""
    _, x, gradient = plant(samples=64)
    batch = make_batch({"x": 7 * x, "x/gradient": gradient}, jnp.ones(64), SITES)
    method = GradientSparseAutoencoder(features=48, k=K, own=0.5, strength=2.0)
    dictionary = method.recipe(1).init(jax.random.key(0), batch, None).decomposition
    own = dictionary.dictionary
    z = np.maximum(np.asarray(own.normalise(7 * x) @ own.encoder.T + own.encoder_bias), 0)
    unit = np.asarray(gradient) / np.sqrt((np.asarray(gradient) ** 2).mean(1, keepdims=True))
    score = z * (0.5 + 2 * np.abs(unit @ np.asarray(own.decoder).T))
    expected = np.where(score >= np.sort(score, 1)[:, -K:][:, :1], z, 0)
    np.testing.assert_allclose(dictionary.encode((7 * x, gradient)).dense(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"own": -1.0}, "own=-1.0 must not be negative"),
        ({"strength": -1.0}, "strength=-1.0 must not be negative"),
        ({"own": 0.0, "strength": 0.0}, "leave nothing to choose by"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(change, words):
    with pytest.raises(UserError, match=words):
        GradientSparseAutoencoder(**change)


def test_l1_and_auxk_are_what_the_options_say():
    _, x, gradient = plant(samples=64)
    batch = make_batch({"x": x, "x/gradient": gradient}, jnp.ones(64), SITES)
    for options, expected in (({}, {"auxk"}), ({"auxk": 0.0}, set()), ({"auxk": 0.0, "l1": 0.1}, {"l1"})):
        method = GradientSparseAutoencoder(features=48, k=K, **options)
        dictionary = method.recipe(1).init(jax.random.key(0), batch, None).decomposition
        _, metrics = method.make_objective()(dictionary, batch, jax.random.key(0))
        assert {"auxk", "l1"} & set(metrics) == expected and "effect" in metrics


@pytest.mark.slow
def test_training_lowers_the_effect_of_the_error():
    """The mixture leaves a smaller first-order error than TopK does, at some cost in variance."""

    def late(strength):
        method = GradientSparseAutoencoder(features=48, k=K, strength=strength, learning_rate=3e-3, auxk=0.0)
        recipe = method.recipe(2000)
        _, x, gradient = plant(samples=20_000)

        def batch(key, step):
            rows = jax.random.randint(key, (256,), 0, len(x))
            return make_batch({"x": x[rows], "x/gradient": gradient[rows]}, jnp.ones(256), SITES, step=step)

        @jax.jit
        def train():
            def body(state, step):
                state, metrics = recipe.step(state, batch(jax.random.key(step), step), jax.random.key(1), None)
                return state, (metrics["effect"].value(), metrics["fvu"].value())

            state = recipe.init(jax.random.key(0), batch(jax.random.key(10**6), 0), None)
            return jax.lax.scan(body, state, jnp.arange(2000))[1]

        return [float(values[-100:].mean()) for values in train()]

    mixture, plain = late(2.0), late(0.0)
    assert mixture[0] < 0.95 * plain[0]
    assert mixture[1] < 0.1


def test_only_topk_selects_by_a_score():
    rows, _, _ = plant(samples=8)
    dictionary = true_dictionary(rows, 1.0, 1.0)
    with pytest.raises(UserError, match="activation=BatchTopK does not select by a score: take TopK"):
        replace(dictionary, dictionary=replace(dictionary.dictionary, activation=BatchTopK(4)))
    assert isinstance(replace(dictionary, dictionary=dictionary.dictionary), EffectDictionary)
    assert isinstance(dictionary.activation, TopK)


def test_a_file_with_another_field_is_damaged(tmp_path):
    rows, _, _ = plant(samples=8)
    saved = save_dictionary(true_dictionary(rows, 1.0, 1.0), tmp_path / "d") / f"{codec.NAME}.json"
    saved.write_text(saved.read_text().replace("strength", "strenght"))
    with pytest.raises(UserError, match=r"other fields.*strenght"):
        load_dictionary(tmp_path / "d")
