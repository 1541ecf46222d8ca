"""Dictionaries: the equation, folding, codes, files. Invariants 6 and 7."""

import json
from operator import attrgetter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import per_feature, trainable
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.activations import BatchTopK, ReLU, TopK
from jaxinterp.decompositions.adaptive import TopAFA
from jaxinterp.decompositions.codes import DenseCodes, SparseCodes
from jaxinterp.decompositions.dictionary import fold
from jaxinterp.decompositions.files import load_dictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.decompositions.on_disk import check_arrays
from jaxinterp.decompositions.stand_in import StandIn
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.models.tiny import planted_transformer
from jaxinterp.objectives import Ratio, reconstruction, total
from tests.decompositions.older import save_dictionary
from tests.helpers import random_dictionary


@pytest.mark.parametrize("activation", [TopK(4), ReLU(), BatchTopK(4, jnp.asarray(0.3))])
def test_the_equation(activation):
    dictionary = random_dictionary(activation)
    x = jax.random.normal(jax.random.key(1), (30, 8))
    normalised = (x - dictionary.input_mean) / dictionary.input_scale
    a = normalised @ dictionary.encoder.T + dictionary.encoder_bias
    z = jnp.maximum(a, 0)
    if isinstance(activation, TopK):
        z = jnp.where(a >= jnp.sort(a, axis=1)[:, -4:-3], z, 0)
    if isinstance(activation, BatchTopK):
        z = jnp.where(a > 0.3, z, 0)
    y = z @ dictionary.decoder + dictionary.decoder_bias + normalised @ dictionary.skip
    expected = dictionary.output_scale * y + dictionary.output_mean
    np.testing.assert_allclose(dictionary.encode(x).dense(), z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dictionary(x), expected, rtol=1e-4, atol=1e-4)


def test_batch_topk_keeps_k_per_token_on_average_and_no_more():
    dictionary = random_dictionary(BatchTopK(4))
    x = jax.random.normal(jax.random.key(1), (30, 8))
    codes = dictionary.encode(x, training=True)
    assert int(jnp.sum(codes.values > 0)) == 4 * 30
    assert float(jnp.std(codes.active())) > 0
    fewer = dictionary.encode(x, k=jnp.asarray(2), training=True)
    assert int(jnp.sum(fewer.values > 0)) == 2 * 30


@pytest.mark.parametrize("training", [True, False])
def test_nan_shows_in_batch_topk(training):
    """It must: a feature that silently dies would train on."""
    dictionary = random_dictionary(BatchTopK(4, jnp.asarray(0.3)))
    broken = eqx.tree_at(lambda d: d.encoder_bias, dictionary, dictionary.encoder_bias.at[5].set(jnp.nan))
    codes = broken.encode(jax.random.normal(jax.random.key(1), (30, 8)), training=training)
    assert jnp.isnan(codes.dense()[:, 5]).all()


def test_tokens_that_reach_the_cap_of_batch_topk_are_counted():
    """Eight loud tokens of 64 want nearly the whole budget: they get 4 k each, and the rest goes to the others."""
    dictionary = random_dictionary(BatchTopK(1))
    x = jax.random.normal(jax.random.key(1), (64, 8)) * jnp.where(jnp.arange(64) < 8, 100.0, 1.0)[:, None]
    codes = dictionary.encode(x, training=True)
    assert float(codes.active().max()) == 4 and int(codes.active().sum()) == 64
    loud = np.asarray(dictionary.normalise(x) @ dictionary.encoder.T + dictionary.encoder_bias)[:8]
    wanted = (np.sum(loud > 0, axis=1) >= 4).sum()
    batch = make_batch({"x": x, "y": jnp.zeros((64, dictionary.decoder.shape[1]))}, jnp.ones(64), Sites("x", "y"))
    _, metrics = total(reconstruction())(dictionary, batch, jax.random.key(0))
    assert float(metrics["at_cap"].value()) == pytest.approx(float(jnp.mean(codes.at_cap())))
    assert wanted <= float(codes.at_cap().sum()) < 32
    assert "at_cap" not in total(reconstruction())(random_dictionary(TopK(4)), batch, jax.random.key(0))[1]


def test_a_smaller_k_is_a_mask():
    dictionary = random_dictionary(TopK(6))
    x = jax.random.normal(jax.random.key(1), (30, 8))
    small = eqx.tree_at(lambda d: d.encoder, random_dictionary(TopK(2)), dictionary.encoder)
    np.testing.assert_array_equal(dictionary.encode(x, k=jnp.asarray(2)).dense(), small.encode(x).dense())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_folding_changes_nothing(seed, skip):
    """Invariant 6."""
    dictionary = random_dictionary(TopK(4), seed=seed, skip=skip)
    x = jax.random.normal(jax.random.key(seed), (16, 8))
    folded = fold(dictionary)
    assert float(folded.input_scale) == float(folded.output_scale) == 1 and not folded.input_mean.any()
    scale = float(jnp.abs(dictionary(x)).max())
    np.testing.assert_allclose(folded.encode(x).values, dictionary.encode(x).values, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(folded(x), dictionary(x), atol=2e-5 * scale)


def test_a_dictionary_whose_codes_depend_on_the_input_s_length_is_not_folded():
    """The control: with the weights of the folded one, codes differ."""
    dictionary = random_dictionary(TopAFA(), d_out=8)
    with pytest.raises(UserError, match="activation=TopAFA compares the codes with the length"):
        fold(dictionary)
    forced = eqx.tree_at(lambda d: d.activation, fold(random_dictionary(TopK(4), d_out=8)), TopAFA())
    x = jax.random.normal(jax.random.key(1), (50, 8))
    assert bool((forced.encode(x).active() != dictionary.encode(x).active()).any())


def test_trainable_and_per_feature_mark_fields():
    dictionary = random_dictionary(TopK(4))
    trained = {name for name, marked in named_leaves(trainable(dictionary)).items() if marked}
    assert trained == {"encoder", "encoder_bias", "decoder", "decoder_bias", "skip"}
    rows = {name for name, marked in named_leaves(per_feature(dictionary)).items() if marked}
    assert rows == {"encoder", "encoder_bias", "decoder", "tokens_since_fired"}
    threshold = named_leaves(trainable(random_dictionary(BatchTopK(4))))["activation/threshold"]
    assert threshold is False


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_codes_convert(seed):
    rng = np.random.default_rng(seed)
    dense = DenseCodes(jnp.asarray(np.maximum(rng.normal(size=(5, 9)), 0), jnp.float32))
    sparse = dense.sparse(9)
    np.testing.assert_array_equal(sparse.dense(), dense.values)
    np.testing.assert_array_equal(sparse.active(), dense.active())
    weight = jnp.asarray(rng.integers(0, 2, 5), jnp.float32)
    np.testing.assert_array_equal(sparse.fired(weight), dense.fired(weight))
    assert isinstance(sparse.sparse(3), SparseCodes) and sparse.sparse(3).values.shape == (5, 3)
    assert float(sparse.smallest()) == float(dense.smallest()) == float(dense.values[dense.values > 0].min())


@pytest.mark.parametrize("reads", ["in", "hidden", "out"])
def test_stand_in_equals_an_edit(reads):
    """Invariant 19: a decomposition in the leaf's place does what an edit of the array that it writes does."""
    model = planted_transformer(jax.random.key(0))
    tokens = jnp.arange(16).reshape(2, 8)
    width = 128 if reads == "hidden" else 64
    writes = "out" if reads == "in" else reads
    sites = Sites(f"blocks/1/mlp/{reads}", f"blocks/1/mlp/{writes}")
    dictionary = random_dictionary(TopK(4), d_in=width, d_out=width, sites=sites)
    trace = run(model, tokens)
    edited = run(model, tokens, edits={sites.writes: lambda _: dictionary(trace[sites.reads])})
    stand_in = run(replace(model, {"blocks/1/mlp": StandIn(model.blocks[1].mlp, dictionary)}), tokens)
    np.testing.assert_allclose(stand_in.logits, edited.logits, rtol=1e-4, atol=1e-3)
    if reads == "in":
        direct = run(replace(model, {"blocks/1/mlp": dictionary}), tokens)
        np.testing.assert_allclose(direct.logits, edited.logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", [TopK(4), ReLU(), BatchTopK(4, jnp.asarray(0.3))])
@pytest.mark.parametrize("skip", [True, False])
def test_files_round_trip(tmp_path, activation, skip):
    """Invariant 7."""
    dictionary = random_dictionary(activation, skip=skip)
    loaded = load_dictionary(save_dictionary(dictionary, tmp_path / "d"))
    assert jax.tree.structure(loaded) == jax.tree.structure(dictionary)
    for name, leaf in named_leaves(dictionary).items():
        np.testing.assert_array_equal(leaf, named_leaves(loaded)[name], err_msg=name)


def test_damaged_files_are_refused(tmp_path):
    folder = save_dictionary(random_dictionary(TopK(4)), tmp_path / "d")
    with pytest.raises(UserError, match=r"no dictionary\.json"):
        load_dictionary(tmp_path / "elsewhere")
    static = json.loads((folder / "dictionary.json").read_text())
    (folder / "dictionary.json").write_text(json.dumps(static | {"activation": {"kind": "TopKK", "k": 4}}))
    with pytest.raises(UserError, match=r"TopKK.*Did you mean 'TopK'"):
        load_dictionary(folder)
    (folder / "dictionary.json").write_text(json.dumps(static))
    data = (folder / "dictionary.safetensors").read_bytes()
    (folder / "dictionary.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_dictionary(folder)


def test_arrays_that_do_not_agree_are_refused(tmp_path):
    """Sizes, dtypes and the activation's own arrays: anything that would fit a dictionary of another size."""
    good = random_dictionary(JumpReLU.start(24, 0.5, bandwidth=0.1))
    wrong = {
        "decoder": (good.decoder[:23], "decoder is float32"),
        "skip": (good.skip.T, "skip is float32"),
        "tokens_since_fired": (good.tokens_since_fired.astype(jnp.float32), "tokens_since_fired is float32"),
        "activation.threshold_parameter": (jnp.zeros(23), "threshold_parameter is float32"),
    }
    for name, (array, words) in wrong.items():
        bad = eqx.tree_at(attrgetter(name), good, array)
        with pytest.raises(UserError, match=words):
            check_arrays((bad, bad.activation), tmp_path)
        with pytest.raises(UserError, match="damaged"):
            load_dictionary(save_dictionary(bad, tmp_path / name))
    check_arrays((good, good.activation), tmp_path)


def test_another_format_and_broken_sites_are_refused(tmp_path):
    folder = save_dictionary(random_dictionary(TopK(4)), tmp_path / "d")
    static = json.loads((folder / "dictionary.json").read_text())
    for change, words in (
        ({"format": 2}, "format=2 .* is not 1"),
        ({"sites": None}, "damaged"),
        ({"sites": 3}, "damaged"),
    ):
        (folder / "dictionary.json").write_text(json.dumps(static | change))
        with pytest.raises(UserError, match=words):
            load_dictionary(folder)
    del static["format"]
    (folder / "dictionary.json").write_text(json.dumps(static))
    with pytest.raises(UserError, match="damaged"):
        load_dictionary(folder)


def test_a_threshold_that_nothing_moves_is_refused():
    """Left at 0 it would let 4 k features pass at inference."""
    with pytest.raises(UserError, match="BatchTopK needs the metric 'smallest_code'"):
        BatchTopK(4).after_step({}, jnp.int32(0))
    moved = BatchTopK(4).after_step({"smallest_code": Ratio(jnp.asarray(0.5), jnp.ones(()))}, jnp.int32(0))
    assert float(moved.threshold) == 0.5


def test_a_number_of_active_features_is_for_those_that_have_one():
    x = jnp.ones((2, 8))
    with pytest.raises(UserError, match="activation=ReLU has none: leave the schedule 'k' away"):
        random_dictionary(ReLU()).encode(x, k=jnp.asarray(2))
    assert float(random_dictionary(TopK(4)).encode(x, k=jnp.asarray(2)).active().max()) <= 2


def test_k_out_of_range_is_refused():
    with pytest.raises(UserError, match="k=25 must lie between 1 and features=24"):
        random_dictionary(TopK(25))
    with pytest.raises(UserError, match="k=0 must be at least 1"):
        BatchTopK(0)


def test_tokens_without_weight_neither_compete_nor_count_in_batch_topk():
    """Invariant 17."""
    dictionary = random_dictionary(BatchTopK(4))
    x = jax.random.normal(jax.random.key(1), (30, 8))
    weight = jnp.ones(30).at[:3].set(0)
    loud = x.at[:3].multiply(100)  # attention sinks
    codes = dictionary.encode(loud, weight=weight, training=True)
    quiet = dictionary.encode(x[3:], training=True)
    np.testing.assert_array_equal(codes.values[3:], quiet.values)
    assert int(jnp.sum(codes.values[3:] > 0)) == 4 * 27 and not codes.values[:3].any()


def test_a_decomposition_of_something_else_is_not_put_in_the_leaf_s_place():
    model = planted_transformer(jax.random.key(0))
    inside = random_dictionary(TopK(4), d_in=64, d_out=64, sites=Sites("blocks/1/mlp/out", "blocks/1/mlp/out"))
    with pytest.raises(UserError, match="wrap it in StandIn"):
        replace(model, {"blocks/1/mlp": inside})
    other = random_dictionary(TopK(4), d_in=64, d_out=64)
    with pytest.raises(UserError, match="reads 'blocks/1/mlp/in'"):
        replace(model, {"blocks/3/mlp": other})
    with pytest.raises(UserError, match="it belongs at 'blocks/1/mlp'"):
        replace(model, {"blocks/2/mlp": StandIn(model.blocks[2].mlp, inside)})
    assert replace(model, {"blocks/1/mlp": StandIn(model.blocks[1].mlp, inside)}) is not None
    far = random_dictionary(TopK(4), d_in=64, d_out=64, sites=Sites("blocks/1/mlp/pre", "blocks/1/mlp/out"))
    with pytest.raises(UserError, match="'blocks/1/mlp/pre' cannot be reached"):
        StandIn(model.blocks[1].mlp, far)(jnp.zeros((2, 64)))


class AbsoluteTopK(eqx.Module):
    """A new activation: the k largest |a|, with sign."""

    k: int = eqx.field(static=True)

    def codes(self, x, rows, bias, *, k, weight, training):
        return DenseCodes(x @ rows.T + bias).sparse(self.k)

    def after_step(self, metrics, step):
        return self


def test_a_new_activation_is_one_class(tmp_path):
    dictionary = random_dictionary(AbsoluteTopK(3))
    x = jax.random.normal(jax.random.key(1), (10, 8))
    assert bool((dictionary.encode(x).values < 0).any()) and int(dictionary.encode(x).active().max()) == 3
    folder = save_dictionary(dictionary, tmp_path / "d")
    with pytest.raises(UserError, match="pass its class in activations"):
        load_dictionary(folder)
    np.testing.assert_array_equal(load_dictionary(folder, activations=[AbsoluteTopK])(x), dictionary(x))
