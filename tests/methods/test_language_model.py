"""A language model is trained by `fit` as any method is: it learns, resumes bit for bit, and is the same on a mesh."""

import math

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.evaluation.language_loss import language_loss
from jaxinterp.methods import Transcoder
from jaxinterp.methods.language_model import LanguageModel, matrices, next_token, next_token_nll
from jaxinterp.models.load import Subject
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh

SHAPE = TransformerConfig(
    vocab_size=24, d_model=32, layers=1, heads=2, kv_heads=2, head_dim=16, d_mlp=64, context=16,
    activation="identity", rotary_dimensions=16, tied=False,
)  # fmt: skip
SIZES = {"batch_size": 128, "buffer_batches": 1, "log_every": 5}


@pytest.fixture(scope="module")
def subject():
    return Subject(initialise(SHAPE, jax.random.key(0)), None, "small")


def dataset(tokens, document=None):
    weight = np.ones(tokens.shape, np.float32)
    weight[:, 0] = 0
    document = np.zeros_like(tokens) if document is None else document
    return grain.MapDataset.source(
        [{"tokens": t, "weight": w, "document": d} for t, w, d in zip(tokens, weight, document, strict=True)]
    )


@pytest.fixture(scope="module")
def text():
    """A walk on 24 tokens: every one is followed by one of two, so that a model can reach log 2 and no less."""
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 2, (512, 16)) * 6 + 1
    return dataset(((rng.integers(0, 24, (512, 1)) + np.cumsum(steps, axis=1)) % 24).astype(np.int32))


def test_it_learns_what_there_is_to_learn(subject, text):
    """The entropy of the walk is log 2: near it, and not below it, on text that training has repeated five times."""
    result = fit(LanguageModel(learning_rate=1e-2), subject, text, steps=240, **SIZES)
    assert result.history[0]["loss"] > math.log(24) - 0.5
    found = language_loss(result.decomposition, text)
    assert found["tokens"] == 512 * 14 and math.log(2) - 0.02 < found["ce"] < math.log(2) + 0.05
    assert result.decomposition.config == SHAPE


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


@pytest.mark.slow
def test_it_resumes_bit_for_bit_and_leaves_the_subject_as_it_was(subject, text, tmp_path):
    """Invariant 9."""
    before = jax.tree.map(np.array, subject.model)
    options = {"steps": 20, **SIZES}
    whole = fit(LanguageModel(), subject, text, **options)
    first = fit(LanguageModel(), subject, text, **options, checkpoint=tmp_path / "c", stop_after=10)
    again = fit(LanguageModel(), subject, text, **options, checkpoint=tmp_path / "c", resume=True)
    assert same(again.decomposition, whole.decomposition) and not same(first.decomposition, whole.decomposition)
    assert again.history == [
        row | {"tokens_per_second": r["tokens_per_second"]} for row, r in zip(whole.history, again.history, strict=True)
    ]
    assert same(subject.model, before)


@pytest.mark.slow
def test_a_mesh_changes_where_things_lie_and_nothing_else(subject, text):
    """Invariant 5."""
    one, many = (fit(LanguageModel(), subject, text, steps=5, **SIZES, mesh=make_mesh(data=data)) for data in (1, 8))
    for name, leaf in named_leaves(one.decomposition).items():
        np.testing.assert_allclose(named_leaves(many.decomposition)[name], leaf, atol=2e-4, err_msg=name)
    assert abs(one.history[-1]["loss"] - many.history[-1]["loss"]) < 1e-5


def test_next_tokens_of_other_documents_do_not_count_and_end_tokens_do(subject):
    """loss: within a document, its end token too. ce: what the scoreboard counts."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 24, (2, 8)).astype(np.int32)
    document = np.asarray([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 2, 3, 3]], np.int32)
    weight = np.ones((2, 8), np.float32)
    weight[:, 0] = weight[0, 2] = weight[1, 1] = weight[1, 5] = 0  # position 0, and the end tokens of documents
    windows = {"tokens": jnp.asarray(tokens), "weight": jnp.asarray(weight), "document": jnp.asarray(document)}
    batch = make_batch({}, np.zeros(0), Sites((), ()), windows=windows)
    loss, metrics = next_token(subject.model, batch, jax.random.key(0))
    nll = np.asarray(next_token_nll(subject.model, windows["tokens"]))
    same_document = document[:, :-1] == document[:, 1:]
    counted = same_document & (weight[:, :-1] > 0) & (weight[:, 1:] > 0)
    assert same_document.sum() == 11 and counted.sum() == 7
    np.testing.assert_allclose([loss, metrics["loss"].value()], nll[same_document].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["ce"].value(), nll[counted].mean(), rtol=1e-5)
    log_p = jax.nn.log_softmax(subject.model(windows["tokens"]))
    np.testing.assert_allclose(nll[1, 3], -log_p[1, 3, tokens[1, 4]], rtol=1e-4)


def test_language_loss_is_the_mean_over_the_whole_text(subject, text):
    """However many rows are run together, the last ones included; as the training metric has it."""
    some = text[:13]
    found = [language_loss(subject.model, some, rows=rows) for rows in (1, 8, 13, 64)]
    batch = {name: jnp.stack([some[index][name] for index in range(13)]) for name in some[0]}
    _, metrics = next_token(subject.model, make_batch({}, np.zeros(0), Sites((), ()), windows=batch), jax.random.key(0))
    assert [each["tokens"] for each in found] == [13 * 14] * 4
    np.testing.assert_allclose([each["ce"] for each in found], float(metrics["ce"].value()), rtol=1e-5)
    with pytest.raises(UserError, match="no next token of the text counts"):
        language_loss(subject.model, dataset(np.zeros((2, 2), np.int32)))


def test_only_matrices_decay(subject):
    marks = named_leaves(matrices(subject.model))
    assert not marks["final_norm/weight"] and not marks["blocks/0/mlp_norm/weight"]
    assert marks["blocks/0/mlp/up_proj/weight"] and marks["embedding/token"]


def test_a_model_in_bfloat16_is_trained_in_float32(subject, text):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_array(leaf) else leaf, subject.model)
    result = fit(LanguageModel(), Subject(half, None, "half"), text, steps=2, **SIZES)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.decomposition)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"gradient_norm": -1.0}, "gradient_norm=-1.0 must be positive"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
        ({"warmup": 1.5}, "warmup=1.5 is a share of the steps"),
    ],
)
def test_hyperparameters_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        LanguageModel(**settings)


def test_without_windows_or_without_a_site_the_way_out_is_told(subject, text):
    with pytest.raises(
        UserError, match="site=None is not a single leaf, such as blocks/3/mlp, which this method takes"
    ):
        fit(Transcoder(features=64, k=4), subject, text, steps=1, **SIZES)
    with pytest.raises(UserError, match="site='blocks/0/mlp': LanguageModel trains the whole model; leave the site"):
        fit(LanguageModel(), subject, text, site="blocks/0/mlp", steps=1, **SIZES)
    with pytest.raises(UserError, match="trained on windows of text"):
        next_token(subject.model, make_batch({}, np.zeros(0), Sites((), ())), jax.random.key(0))


@pytest.mark.slow
def test_the_order_of_windows_is_part_of_a_run(subject, text, tmp_path):
    """Invariants 9 and 10 for text that is shuffled within stretches."""
    options = {"steps": 10, **SIZES}
    whole = fit(LanguageModel(), subject, text, **options, shuffle_within=16)
    fit(LanguageModel(), subject, text, **options, shuffle_within=16, checkpoint=tmp_path / "c", stop_after=5)
    with pytest.raises(UserError, match="shuffle_within=16, not None"):
        fit(LanguageModel(), subject, text, **options, checkpoint=tmp_path / "c", resume=True)
    again = fit(LanguageModel(), subject, text, **options, shuffle_within=16, checkpoint=tmp_path / "c", resume=True)
    assert same(again.decomposition, whole.decomposition)
    assert not same(whole.decomposition, fit(LanguageModel(), subject, text, **options).decomposition)
