"""Methods of several layers in training, on a mesh, and in the model. Invariant 5."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import MethodState
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.activations import BatchTopK
from jaxinterp.decompositions.cross_layer import PerLayer
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.evaluation.several import score_layers
from jaxinterp.methods import GradientSparseAutoencoder, Transcoder
from jaxinterp.methods.combine.per_layer_transcoders import PerLayerTranscoders
from jaxinterp.methods.sparse.cross_layer_transcoder import CrossLayerTranscoder, count_layers
from jaxinterp.models.edits import SetTo
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.models.tiny import TINY, planted_transformer
from jaxinterp.objectives import Ratio, total
from jaxinterp.objectives.end_to_end import divergence, spliced
from jaxinterp.training.fit import fit
from tests.methods.two_layers import SITES, draw, plant

CONFIG = dataclasses.replace(TINY, vocab_size=64, d_model=32, layers=2, heads=2, kv_heads=2, d_mlp=64)


@pytest.fixture(scope="module")
def subject():
    return Subject(planted_transformer(jax.random.key(0), CONFIG), None, "two layers")


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    weight = np.ones(32, np.float32)
    weight[0] = 0
    rows = [
        {"tokens": rng.integers(0, 64, 32, np.int32), "weight": weight, "document": np.full(32, i, np.int32)}
        for i in range(64)
    ]
    return grain.MapDataset.source(rows)


SIZES = {"site": "blocks/*/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 1}
SMALL = CrossLayerTranscoder(features=32, learning_rate=3e-3, pre_activation=1e-4)
TOPK = CrossLayerTranscoder(features=96, activation="topk", k=1, sparsity=0.0, learning_rate=3e-3, dead_after=300)


def test_counters_and_thresholds_belong_to_their_layer():
    method = CrossLayerTranscoder(features=4, activation=BatchTopK(2))
    sample = make_batch(draw(plant(0), jax.random.key(0), 64), jnp.ones(64), SITES)
    state = MethodState(method.start(jax.random.key(1), sample), None)
    metrics = {
        "fired": Ratio(jnp.array([0.0, 3, 0, 1, 2, 0, 0, 5]), jnp.full(8, 64.0)),
        "smallest_code": Ratio(jnp.array([0.25, 0.5]), jnp.ones(())),
    }
    first, second = count_layers(state, sample, metrics, jax.random.key(2)).decomposition.layers
    np.testing.assert_array_equal(first.tokens_since_fired, [64, 0, 64, 0])
    np.testing.assert_array_equal(second.tokens_since_fired, [0, 64, 64, 0])
    assert (float(first.activation.threshold), float(second.activation.threshold)) == (0.25, 0.5)


def test_each_of_the_transcoders_is_the_one_that_would_be_trained_alone():
    method = Transcoder(features=16, k=3, learning_rate=3e-3)
    sample = make_batch(draw(plant(0), jax.random.key(0), 256), jnp.ones(256), SITES)
    recipe, one = PerLayerTranscoders(method).recipe(5), method.recipe(5)
    key, step, step_one = jax.random.key(3), jax.jit(recipe.step), jax.jit(one.step)
    states = recipe.init(key, sample, None)
    alone = [
        one.init(own, dataclasses.replace(sample, sites=Sites(f"m{n}/in", f"m{n}/out")), None)
        for n, own in enumerate(jax.random.split(key, 2))
    ]
    for _ in range(3):
        states, metrics = step(states, sample, key, None)
        pairs = [
            step_one(state, dataclasses.replace(sample, sites=Sites(f"m{n}/in", f"m{n}/out")), key, None)
            for n, state in enumerate(alone)
        ]
        alone = [state for state, _ in pairs]
    each = recipe.finish(states)
    assert each.sites == SITES
    for part, state in zip(each.parts, alone, strict=True):
        for name, leaf in named_leaves(state.decomposition).items():
            np.testing.assert_allclose(named_leaves(part)[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
    own = [metrics for _, metrics in pairs]
    assert float(metrics["fvu"].value()) == pytest.approx(np.mean([float(m["fvu"].value()) for m in own]), rel=1e-5)
    assert float(metrics["l0"].value()) == pytest.approx(sum(float(m["l0"].value()) for m in own), rel=1e-5)
    assert metrics["fired"].value().shape == (32,)


def test_in_the_model_later_layers_read_what_earlier_ones_made(subject, text, tmp_path):
    """Splicing against edits one after another; per-layer parts also as leaves, saved and loaded."""
    model, tokens = subject.model, jnp.asarray(np.stack([text[i]["tokens"] for i in range(4)]))
    trace = run(model, tokens)
    rows = [trace[f"blocks/{n}/mlp/{port}"].reshape(-1, 32) for port in ("in", "out") for n in (0, 1)]
    sites = SMALL.needs(("blocks/0/mlp", "blocks/1/mlp"))
    sample = make_batch(dict(zip(sites.reads + sites.writes, rows, strict=True)), jnp.ones(len(rows[0])), sites)
    cross = jax.jit(SMALL.start)(jax.random.key(0), sample)
    first = cross((trace["blocks/0/mlp/in"], trace["blocks/1/mlp/in"]))[0]
    edits = {"blocks/0/mlp/out": SetTo(first)}
    second = cross((trace["blocks/0/mlp/in"], run(model, tokens, edits=edits)["blocks/1/mlp/in"]))[1]
    expected = run(model, tokens, edits=edits | {"blocks/1/mlp/out": SetTo(second)}).logits
    np.testing.assert_allclose(spliced(cross, model, tokens), expected, atol=1e-4)

    method = PerLayerTranscoders(Transcoder(features=16, k=3))
    each = method.recipe(5).finish(jax.jit(method.recipe(5).init)(jax.random.key(0), sample, None))
    for number, part in enumerate(each.parts):
        save_dictionary(part, tmp_path / str(number))
    again = PerLayer(tuple(load_dictionary(tmp_path / str(number)) for number in range(2)))
    leaves = replace(model, {part.sites.leaf: part for part in again.parts})
    np.testing.assert_allclose(spliced(each, model, tokens), run(leaves, tokens).logits, atol=1e-4)


@pytest.mark.slow
def test_all_layers_train_end_to_end_at_once_and_have_scores(subject, text):
    method = dataclasses.replace(TOPK, features=32, k=4, learning_rate=1e-2, objective=total(divergence()))
    result = fit(method, subject, text, **SIZES)
    assert result.history[-1]["kl"] < 0.95 * result.history[0]["kl"]
    rows = score_layers(result.decomposition, subject, text, tokens=512, ce_tokens=512)
    assert [row["method"] for row in rows] == ["all", "blocks/0/mlp/out", "blocks/1/mlp/out"]
    assert rows[0]["l0"] == pytest.approx(8, abs=0.5) and rows[0]["kl"] < result.history[0]["kl"]


def test_a_method_that_reads_two_arrays_of_a_leaf_is_refused():
    method = PerLayerTranscoders(GradientSparseAutoencoder())
    with pytest.raises(UserError, match=r"method=GradientSparseAutoencoder reads .* take one that reads one array"):
        method.needs(("blocks/0/mlp", "blocks/1/mlp"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": 0}, "features=0 must be at least 1"),
        ({"activation": "topk", "k": 99}, "k=99 must lie between 1 and features=32"),
        ({"reach": 0}, "reach=0 must be at least 1"),
        (
            {"activation": "batch_topk"},
            r"'batch_topk' must be one of jumprelu, topk, relu; .* by value: Batch",
        ),
        ({"activation": "topK"}, "Did you mean 'topk'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"threshold": -0.1}, "threshold=-0.1 must be positive"),
        ({"bandwidth": 0.0}, "bandwidth=0.0 must be positive"),
        ({"sparsity": -1e-3}, "sparsity=-0.001 must not be negative"),
        ({"auxk": -1.0}, "auxk=-1.0 must not be negative"),
        ({"dead_after": 0.5}, "dead_after=0.5 must be a whole number"),
    ],
)
@pytest.mark.usefixtures("without_annotations")
def test_bad_values_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SMALL, **change)
