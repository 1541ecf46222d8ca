"""Resampling against its equations, its draws, its calendar; and what each policy does for a dictionary half dead.

Thresholds of the plant (24 rows in 16 dimensions, 2 active, 48 learned, half of them dead at the start, 1500 steps; the
fraction of that half which is dead at the end). Measured, ReLU at bias -10: nothing and AuxK 1.00 (a ReLU that far
below zero has no gradient), ghost 0.13, resampling 0.00; TopK at bias -3: nothing 0.96, AuxK 0.50, ghost 0.17,
resampling 0.79 with shrink 0.2 and 0.08 with shrink 1. Invariant 5.
"""

from dataclasses import replace as change

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import BatchTopK
from jaxinterp.methods import (
    CrossLayerTranscoder,
    GatedSparseAutoencoder,
    GradientSparseAutoencoder,
    GroupBiasAdaptation,
    JumpReLUSparseAutoencoder,
    PerLayerTranscoders,
    SparseAutoencoder,
    Transcoder,
)
from jaxinterp.methods.combine import resampling
from jaxinterp.methods.combine.resampling import Resampling, draw, resample
from jaxinterp.objectives import l1, reconstruction, scale, total
from jaxinterp.objectives.ghost import ghost
from tests.methods.dead import ROWS, HalfDead, outcome

DEAD_AFTER = 2000
RELU = SparseAutoencoder(features=ROWS, activation="relu", l1=0.05, auxk=0.0, learning_rate=3e-3, dead_after=DEAD_AFTER)
TOPK = SparseAutoencoder(features=ROWS, k=2, auxk=0.0, learning_rate=3e-3, dead_after=DEAD_AFTER)
LATE = jnp.arange(20) >= 15


def started(method=None, steps=3, seed=0):
    """A method's state after a few steps at `m/in` and `m/out`, and the last batch."""
    method = method or SparseAutoencoder(features=20, k=3)
    sites = method.needs("m")
    rng = np.random.default_rng(seed)
    weight = np.ones(64, np.float32)
    weight[::9] = 0
    arrays = {name: 1 + 2 * rng.normal(size=(64, 8)).astype(np.float32) for name in sites.names()}
    batch = make_batch(arrays, weight, sites)
    recipe = method.recipe(100)
    state = recipe.init(jax.random.key(0), batch, None)
    step = jax.jit(recipe.step)
    for number in range(steps):
        state, _ = step(state, batch, jax.random.key(number), None)
    return state, batch


def moments(state):
    return [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim and leaf.shape[0] == 20]


@pytest.mark.parametrize(
    "method", [SparseAutoencoder(features=20, k=3), Transcoder(features=20, activation="relu", l1=0.01)]
)
def test_new_rows_are_badly_reconstructed_inputs(method):
    state, batch = started(method)
    before, after = state.decomposition, resample(state, batch, jax.random.key(5), LATE)
    d, late = after.decomposition, np.asarray(LATE)
    for name in ("encoder", "encoder_bias", "decoder", "tokens_since_fired"):
        np.testing.assert_array_equal(getattr(d, name)[~late], getattr(before, name)[~late], err_msg=name)
        assert name == "tokens_since_fired" or bool((getattr(d, name)[late] != getattr(before, name)[late]).any())
    y = (np.asarray(batch.targets) - np.asarray(before.output_mean)) / float(before.output_scale)
    y = y - np.asarray(before.decoder_bias)
    cosine = np.asarray(d.decoder)[late] @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T
    drawn = cosine.argmax(1)
    np.testing.assert_allclose(cosine.max(1), 1, rtol=1e-5)
    assert len(set(drawn)) == 5 and (np.asarray(batch.weight)[drawn] > 0).all(), "no row twice, none without weight"
    read = np.asarray(d.encoder)[late]
    live_length = np.linalg.norm(np.asarray(before.encoder)[~late], axis=1).mean()
    np.testing.assert_allclose(np.linalg.norm(read, axis=1), 0.2 * live_length, rtol=1e-5)
    if isinstance(method, SparseAutoencoder):
        direction = np.asarray(d.decoder)[late]
    else:
        direction = ((np.asarray(batch.inputs) - np.asarray(d.input_mean)) / float(d.input_scale))[drawn]
        direction = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(read / np.linalg.norm(read, axis=1, keepdims=True), direction, atol=1e-5)
    assert not d.encoder_bias[late].any() and not d.tokens_since_fired[late].any()


def test_moments_of_new_rows_are_forgotten_and_no_others():
    state, batch = started()
    before, after = moments(state), moments(resample(state, batch, jax.random.key(5), LATE))
    assert len(before) == 6, "first and second moments of encoder, its bias and decoder"
    for old, new in zip(before, after, strict=True):
        assert bool(jnp.any(old[LATE] != 0)) and not new[LATE].any()
        np.testing.assert_array_equal(new[~LATE], old[~LATE])


def test_rows_are_drawn_with_the_square_of_their_error():
    state, batch = started(SparseAutoencoder(features=20, activation="relu", l1=0.01))
    one = jnp.arange(20) == 4
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(jax.vmap(lambda key: draw(state.decomposition, batch, key, one)[4]))(keys)
    found = np.bincount(np.asarray(drawn), minlength=64) / len(keys)
    error = np.asarray(jnp.sum((batch.targets - state.decomposition(batch.inputs)) ** 2, axis=1)) * batch.weight
    expected = error**2 / (error**2).sum()
    assert np.abs(found - expected).max() < 0.006 < np.abs(error / error.sum() - expected).max()


def test_when_more_are_dead_than_there_are_rows_every_row_is_used():
    state, batch = started(SparseAutoencoder(features=200, k=3))
    rows = np.asarray(draw(state.decomposition, batch, jax.random.key(0), jnp.ones(200, bool)))
    counted = np.bincount(rows, minlength=64)
    assert set(counted[np.asarray(batch.weight) > 0]) <= {3, 4} and not counted[np.asarray(batch.weight) == 0].any()
    after = resample(state, batch, jax.random.key(0), jnp.ones(200, bool)).decomposition
    assert np.isfinite(after.encoder).all() and float(jnp.linalg.norm(after.encoder, axis=1).min()) > 0.1


@pytest.mark.parametrize(
    ("every", "last", "expected"), [(2, 8, [2, 4, 6, 8]), (3, 5, [3]), (50, None, []), (None, None, [1, 2, 3, 4, 5])]
)
def test_the_calendar(every, last, expected):
    """Of ten steps; without numbers: every eighth of them (at least every step), up to half."""
    method = Resampling(
        SparseAutoencoder(features=20, activation="relu", l1=0.01), every=every, last=last, dead_after=1
    )
    recipe, (state, batch) = method.recipe(10), started(method.method, steps=0)
    step, seen = jax.jit(recipe.step), []
    for number in range(10):
        silent = jnp.where(LATE, -50.0, state.decomposition.encoder_bias)  # dead again before every step
        state = eqx.tree_at(lambda s: s.decomposition.encoder_bias, state, silent)
        state, _ = step(state, eqx.tree_at(lambda b: b.step, batch, jnp.int32(number)), jax.random.key(0), None)
        seen += [number + 1] if float(jnp.abs(state.decomposition.encoder_bias[LATE]).max()) == 0 else []
    assert seen == expected


def test_what_is_dead_is_the_method_s_own_matter_unless_said_otherwise(monkeypatch):
    given = []
    monkeypatch.setattr(resampling, "with_resampling", lambda recipe, **options: given.append(options) or recipe)
    method = SparseAutoencoder(features=20, k=3, dead_after=200)
    for own in (None, 100):
        Resampling(method, dead_after=own).recipe(10)
    assert [options["dead_after"] for options in given] == [200, 100]


@pytest.mark.parametrize(
    ("method", "leaf"),
    [
        (GatedSparseAutoencoder(features=20, learning_rate=0.1), lambda d: d.activation.gate_bias),
        (JumpReLUSparseAutoencoder(features=20, learning_rate=0.1), lambda d: d.activation.threshold_parameter),
    ],
)
def test_parameters_of_the_activation_start_at_the_mean_of_live_ones(method, leaf):
    state, batch = started(method, steps=8)
    before, after = (leaf(s.decomposition) for s in (state, resample(state, batch, jax.random.key(5), LATE)))
    assert float(jnp.std(before)) > 1e-4
    np.testing.assert_allclose(after[LATE], float(before[~LATE].mean()), rtol=1e-5)
    np.testing.assert_array_equal(after[~LATE], before[~LATE])


def test_a_threshold_that_belongs_to_no_feature_stays():
    state, batch = started(SparseAutoencoder(features=20, activation=BatchTopK(3)))
    after = resample(state, batch, jax.random.key(5), LATE)
    assert float(state.decomposition.activation.threshold) == float(after.decomposition.activation.threshold) > 0


def test_what_is_no_dictionary_is_refused_and_methods_of_several_take_it_inside():
    sites = Sites(("m0/in", "m1/in"), ("m0/out", "m1/out"))
    x = jax.random.normal(jax.random.key(0), (64, 8))
    batch = make_batch({name: x for name in sites.names()}, jnp.ones(64), sites)
    own = Resampling(Transcoder(features=200, k=3), every=1, last=9, dead_after=1)  # 64 tokens cannot use them all
    for wrong, words in (
        (Resampling(CrossLayerTranscoder(features=20)), "not for CrossLayer: take AuxK"),
        (Resampling(PerLayerTranscoders(own.method), dead_after=1), r"not for several: put it inside, as in Per"),
    ):
        with pytest.raises(UserError, match=words):
            jax.eval_shape(wrong.recipe(10).init, jax.random.key(0), batch, None)
    for method, words in (
        (GradientSparseAutoencoder(features=20, k=3), "not for EffectDictionary: take AuxK"),
        (GroupBiasAdaptation(features=20, groups=2), "activation=GroupBias adapts features by counts of its own"),
    ):
        with pytest.raises(UserError, match=words):
            started(Resampling(method))
    with pytest.raises(UserError, match="dead_after=None: method=PerLayerTranscoders has none"):
        Resampling(PerLayerTranscoders(own.method))
    silent = change(own.method, auxk=0.0, objective=lambda *given, model=None: (total(reconstruction())(*given)[0], {}))
    with pytest.raises(UserError, match="resampling needs the metric 'fired'"):
        started(Resampling(silent))
    recipe = PerLayerTranscoders(own).recipe(10)
    states = recipe.init(jax.random.key(0), batch, None)
    for number in range(4):
        states, _ = jax.jit(recipe.step)(states, batch, jax.random.key(number), None)
    decoders = recipe.finish(states).parts[0].decoder
    assert float(jnp.linalg.norm(decoders, axis=1).max()) > 0.9, "a transcoder's write vectors start at 0"
    for field, value in (("every", 0), ("last", 0), ("dead_after", 0), ("shrink", 0.0)):
        with pytest.raises(UserError, match=f"{field}={value}"):
            Resampling(Transcoder(), **{field: value})


def with_ghost(method):
    terms = [reconstruction(), *([scale(l1(), method.l1)] if method.l1 else []), ghost(dead_after=DEAD_AFTER)]
    return change(method, objective=total(*terms))


@pytest.mark.slow
def test_relu_features_far_below_zero_are_revived_by_ghosts_and_resampling():
    nothing, _ = outcome(HalfDead(RELU))
    assert nothing == 1
    for method, limit in ((HalfDead(with_ghost(RELU)), 0.3), (Resampling(HalfDead(RELU), dead_after=DEAD_AFTER), 0.1)):
        assert outcome(method)[0] <= limit


@pytest.mark.slow
def test_topk_features_below_zero_are_revived_by_each_policy():
    nothing, matched = outcome(HalfDead(TOPK, -3.0))
    assert nothing > 0.9 and matched < 0.95
    policies = (
        (HalfDead(change(TOPK, auxk=1 / 32), -3.0), 0.6),
        (HalfDead(with_ghost(TOPK), -3.0), 0.3),
        (Resampling(HalfDead(TOPK, -3.0), dead_after=DEAD_AFTER, shrink=1.0), 0.2),
    )
    for method, limit in policies:
        dead, better = outcome(method)
        assert dead <= limit and better > matched
