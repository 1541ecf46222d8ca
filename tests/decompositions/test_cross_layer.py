"""Cross-layer decompositions: the equation, codes of several layers, the terms, files. Invariants 6 and 7."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import trainable
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.activations import BatchTopK, ReLU, TopK
from jaxinterp.decompositions.adaptive import GroupBias, TopAFA
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer, LayerCodes, fold_layers
from jaxinterp.decompositions.cross_layer_files import load_cross_layer
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.methods.sparse.cross_layer_transcoder import CrossLayerTranscoder
from jaxinterp.objectives import Forward, total
from jaxinterp.objectives.cross_layer import auxk_of_layers, pre_activation, standardised_error, tanh_penalty
from tests.decompositions.older import save_cross_layer


def random_cross_layer(activations, features=12, d=6, reach=3):
    """Three layers of random numbers, scales positive."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    layers = [
        Layer(
            encoder=draw(features, d),
            encoder_bias=draw(features),
            decoder=draw(features, min(reach, 3 - number), d),
            decoder_bias=draw(d),
            input_mean=draw(d),
            input_scale=jnp.exp(draw(d)),
            output_mean=draw(d),
            output_scale=jnp.exp(draw(d)),
            target_mean=draw(d),
            target_variance=jnp.exp(draw()),
            tokens_since_fired=jnp.zeros(features, jnp.int32),
            activation=activation,
        )
        for number, activation in enumerate(activations)
    ]
    names = [f"blocks/{number}/mlp" for number in range(3)]
    sites = Sites(tuple(f"{name}/in" for name in names), tuple(f"{name}/out" for name in names))
    return CrossLayer(tuple(layers), sites), tuple(draw(20, d) for _ in range(3))


@pytest.mark.parametrize("reach", [1, 2, 3])
@pytest.mark.parametrize("activation", [ReLU(), TopK(4)])
def test_the_equation(activation, reach):
    """Decoding all layers, and each on its own, against sums written out; folding changes nothing (invariant 6)."""
    cross, x = random_cross_layer([activation] * 3, reach=reach)
    codes = cross.encode(x)
    z = []
    for layer, array in zip(cross.layers, x, strict=True):
        a = np.asarray((array - layer.input_mean) / layer.input_scale @ layer.encoder.T + layer.encoder_bias)
        kept = a >= np.sort(a, axis=1)[:, -4:-3] if isinstance(activation, TopK) else True
        z.append(np.maximum(a, 0) * kept)
    np.testing.assert_allclose(codes.dense(), np.concatenate(z, axis=1), rtol=1e-4, atol=1e-4)
    folded = fold_layers(cross)
    for target, y in enumerate(cross.decode(codes, x)):
        own = cross.layers[target]
        sums = sum(
            z[source] @ np.asarray(cross.layers[source].decoder[:, target - source])
            for source in range(target + 1)
            if target - source < reach
        )
        expected = own.output_scale * (sums + own.decoder_bias) + own.output_mean
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(cross.decode_layer(target, codes.layers, x[target]), y, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(folded(x)[target], y, rtol=1e-4, atol=1e-3)
        flat = np.concatenate(z, axis=1) @ np.asarray(cross.write_vectors()[:, target])
        np.testing.assert_allclose(flat + own.output_scale * own.decoder_bias + own.output_mean, y, atol=1e-3)


def test_the_diagonal_is_transcoders_that_do_not_know_of_each_other():
    cross, x = random_cross_layer([ReLU()] * 3, reach=1)
    for changed in range(3):
        other = tuple(array + (number == changed) for number, array in enumerate(x))
        differs = [bool(jnp.any(a != b)) for a, b in zip(cross(x), cross(other), strict=True)]
        assert differs == [number == changed for number in range(3)]
    wide, _ = random_cross_layer([ReLU()] * 3)
    other = (x[0] + 1, *x[1:])
    assert all(bool(jnp.any(a != b)) for a, b in zip(wide(x), wide(other), strict=True))


def test_codes_of_layers_stand_layer_after_layer():
    codes = LayerCodes(
        (
            SparseCodes(jnp.array([[2.0, 0.0], [1.0, 3.0]]), jnp.array([[1, 0], [0, 2]]), 3),
            DenseCodes(jnp.array([[0.0, 5.0], [0.5, 0.0]])),
        )
    )
    dense = np.array([[0, 2, 0, 0, 5], [1, 0, 3, 0.5, 0]])
    assert codes.features == 5
    np.testing.assert_array_equal(codes.dense(), dense)
    np.testing.assert_array_equal(codes.active(), [2, 3])
    np.testing.assert_array_equal(codes.smallest(), [1, 0.5])
    np.testing.assert_array_equal(codes.fired(jnp.array([1.0, 0.5])), (dense != 0).T @ [1, 0.5])
    np.testing.assert_allclose(codes.weighted(jnp.arange(5.0)), dense @ np.arange(5))


def terms_of(cross, x, term, weight=None):
    weight = jnp.ones(20) if weight is None else weight
    targets = [array[:, ::-1] for array in x]
    arrays = dict(zip(cross.sites.reads + cross.sites.writes, [*x, *targets], strict=True))
    batch = make_batch(arrays, weight, cross.sites)
    codes = cross.encode(x)
    return term(cross, batch, Forward(codes, cross.decode(codes, x), jax.random.key(0), None)), codes, targets


@pytest.mark.parametrize("activation", [ReLU(), TopK(4)])
def test_the_terms_equal_their_definitions(activation):
    cross, x = random_cross_layer([activation] * 3)
    weight = jnp.arange(20) % 3 / 2
    w = np.asarray(weight) / float(weight.sum())
    (penalty, _), codes, targets = terms_of(cross, x, tanh_penalty(0.7), weight)
    lengths = np.concatenate([np.linalg.norm(np.asarray(c.decoder).reshape(12, -1), axis=1) for c in cross.layers])
    assert float(penalty) == pytest.approx(w @ np.tanh(0.7 * lengths * np.asarray(codes.dense())).sum(1), rel=1e-4)
    (error, metrics), _, _ = terms_of(cross, x, standardised_error(), weight)
    raw = [y - guess for y, guess in zip(targets, cross(x), strict=True)]
    standard = [np.mean((np.asarray(e) / c.output_scale) ** 2, 1) @ w for e, c in zip(raw, cross.layers, strict=True)]
    assert float(error) == pytest.approx(np.mean(standard), rel=1e-4)
    fvu = [np.sum(np.asarray(e) ** 2, 1) @ w / c.target_variance for e, c in zip(raw, cross.layers, strict=True)]
    assert float(metrics["fvu"].value()) == pytest.approx(np.mean(fvu), rel=1e-4)
    (below, _), _, _ = terms_of(cross, x, pre_activation(), weight)
    a = [c.normalise(array) @ c.encoder.T + c.encoder_bias for c, array in zip(cross.layers, x, strict=True)]
    assert float(below) == pytest.approx(np.mean([w @ np.maximum(-np.asarray(each), 0).sum(1) for each in a]), rel=1e-4)


def test_the_penalty_rises_linearly_over_the_run():
    method = CrossLayerTranscoder(features=12, activation="relu", sparsity=0.5)
    cross, x = random_cross_layer([ReLU()] * 3)
    batch = terms_batch = make_batch(
        dict(zip(cross.sites.reads + cross.sites.writes, [*x, *x], strict=True)), jnp.ones(20), cross.sites
    )
    losses = []
    for step in (0, 50, 100):
        batch = eqx.tree_at(lambda b: b.step, terms_batch, jnp.asarray(step))
        loss, metrics = method.loss(100)(cross, batch, jax.random.key(0))
        losses.append(float(loss - metrics["standardised_error"].value()))
    penalty = float(metrics["penalty"].value())
    np.testing.assert_allclose(losses, [0, 0.25 * penalty, 0.5 * penalty], rtol=1e-4, atol=1e-4)


def test_auxk_reaches_dead_features_of_every_layer_and_no_live_one():
    cross, x = random_cross_layer([TopK(2)] * 3)
    dead = jnp.arange(12) < 5
    since = lambda cross: [layer.tokens_since_fired for layer in cross.layers]
    cross = eqx.tree_at(since, cross, [jnp.where(dead, 1000, 0)] * 3)

    def value(parameters, fixed):
        return terms_of(eqx.combine(parameters, fixed), x, auxk_of_layers(500))[0][0]

    gradient = jax.grad(value)(*eqx.partition(cross, trainable(cross)))
    for layer in gradient.layers:
        for rows in (layer.encoder, layer.decoder):
            moved = np.asarray(jnp.abs(rows).reshape(12, -1).sum(1) > 0)
            assert moved[:5].any() and not moved[5:].any()
    nothing = eqx.tree_at(since, cross, [jnp.zeros(12, jnp.int32)] * 3)
    assert float(terms_of(nothing, x, auxk_of_layers(500))[0][0]) == 0


def test_auxk_counts_for_less_where_few_are_dead():
    """Half of d_out a layer may be used: 9 in three layers of 6 dimensions. Twice as many dead, twice the value."""
    value = {}
    for dead in (1, 2, 4, 8):
        cross, x = random_cross_layer([TopK(2)] * 3)
        silent = [layer.decoder.at[:dead].set(0.0) for layer in cross.layers]  # they help nothing: the error is 1
        cross = eqx.tree_at(lambda cross: [layer.decoder for layer in cross.layers], cross, silent)
        since = [jnp.where(jnp.arange(12) < dead, 1000, 0)] * 3
        cross = eqx.tree_at(lambda cross: [layer.tokens_since_fired for layer in cross.layers], cross, since)
        value[dead] = float(terms_of(cross, x, auxk_of_layers(500))[0][0])
    assert value == pytest.approx({1: 3 / 9, 2: 6 / 9, 4: 1, 8: 1}, rel=1e-4)


def test_layers_that_reach_their_cap_are_counted():
    cross, x = random_cross_layer([BatchTopK(1), TopK(2), BatchTopK(1)])
    x = tuple(array.at[:3].multiply(100.0) for array in x)  # loud tokens, which want the budget of all
    codes = cross.encode(x, training=True)
    expected = (codes.layers[0].at_cap() + codes.layers[2].at_cap()) / 2
    np.testing.assert_array_equal(codes.at_cap(), expected)
    assert codes.capped and 0 < float(codes.at_cap().mean()) < 0.5
    batch = make_batch(
        dict(zip(cross.sites.reads + cross.sites.writes, [*x, *x], strict=True)), jnp.ones(20), cross.sites
    )
    _, metrics = total(standardised_error())(cross, batch, jax.random.key(0))
    assert float(metrics["at_cap"].value()) == pytest.approx(float(expected.mean()))
    plain, _ = random_cross_layer([TopK(2)] * 3)
    assert not plain.encode(x).capped and "at_cap" not in total()(plain, batch, jax.random.key(0))[1]


def test_what_layers_cannot_do():
    cross, x = random_cross_layer([TopK(2), ReLU(), TopAFA(3)])
    with pytest.raises(UserError, match="activation=TopAFA compares"):
        fold_layers(cross)
    with pytest.raises(UserError, match="activation=ReLU has none"):
        cross.encode(x, k=jnp.asarray(1))


def test_files_round_trip(tmp_path):
    """Invariant 7; every layer may have an activation of its own."""
    bias = GroupBias.start(12, groups=2, highest=0.5, lowest=0.1, every=5, rate=0.1)
    for activations in (
        [JumpReLU(jnp.linspace(-1, 1, 12), "log", 0.01), BatchTopK(3, jnp.asarray(0.3)), TopK(4)],
        [Gated.start(12), TopAFA(4), bias],
    ):
        round_trip(activations, tmp_path)


def round_trip(activations, tmp_path):
    cross, _ = random_cross_layer(activations)
    again = load_cross_layer(save_cross_layer(cross, tmp_path))
    assert jax.tree.structure(again) == jax.tree.structure(cross)
    for name, leaf in named_leaves(cross).items():
        np.testing.assert_array_equal(named_leaves(again)[name], leaf, err_msg=name)


def test_damaged_files_are_refused(tmp_path):
    cross, _ = random_cross_layer([TopK(2)] * 3)
    with pytest.raises(UserError, match=r"no cross_layer\.json"):
        load_cross_layer(tmp_path)
    save_cross_layer(cross, tmp_path)
    text = (tmp_path / "cross_layer.json").read_text()
    (tmp_path / "cross_layer.json").write_text(text.replace("TopK", "TopKK"))
    with pytest.raises(UserError, match=r"activation 'TopKK' .* is unknown"):
        load_cross_layer(tmp_path)
    static = json.loads(text)
    for change in ({"activations": static["activations"][:2]}, {"sites": {"reads": 3, "writes": None}}, {"sites": 3}):
        (tmp_path / "cross_layer.json").write_text(json.dumps(static | change))
        with pytest.raises(UserError, match="is damaged"):
            load_cross_layer(tmp_path)
    short = eqx.tree_at(lambda cross: cross.layers[1].decoder, cross, cross.layers[1].decoder[:11])
    with pytest.raises(UserError, match="is damaged"):
        load_cross_layer(save_cross_layer(short, tmp_path))


def test_layers_that_are_not_those_of_the_sites_are_refused():
    cross, _ = random_cross_layer([ReLU()] * 3)
    with pytest.raises(UserError, match="2 layers for reads="):
        CrossLayer(cross.layers[:2], cross.sites)
