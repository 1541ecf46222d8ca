"""Matryoshka: the loss against its definition, planted recovery and what breaks it, mesh, files, leaf. Invariants 5, 7.

Reference value of an independent implementation at the planted setting: mean matched cosine 0.953 (6000 steps at 3e-3,
one seed). Threshold: 0.90, means of three seeds; measured here 0.955 (3000 steps at 1e-2).
"""

from dataclasses import replace as change
from functools import cache

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinterp.data.batch import Sites, make_batch
from jaxinterp.decompositions.activations import ReLU, TopK
from jaxinterp.decompositions.base import StandIn
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.errors import UserError
from jaxinterp.evaluation.recovery import mcc
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods.matryoshka import MatryoshkaSparseAutoencoder
from jaxinterp.models.load import load
from jaxinterp.models.sites import replace, run
from jaxinterp.objectives import total
from jaxinterp.objectives.matryoshka import prefixes
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh
from jaxinterp.trees import named_leaves
from tests.decompositions.test_dictionary import random_dictionary
from tests.methods.laboratory import planted_dictionary, train_on_samples

SIZES = (24, 48, 96)
PLANTED = MatryoshkaSparseAutoencoder(features=96, k=3, prefixes=SIZES, learning_rate=1e-2, auxk=0.0)
SITE = "blocks/1/mlp"


@cache
def recovered(method, seed=0, steps=3000):
    """(mean matched cosine with the plant, dictionary, late metrics)."""
    rows, samples = planted_dictionary(seed)
    dictionary, metrics = train_on_samples(method, samples, seed, steps=steps)
    return mcc(rows, dictionary.decoder), dictionary, metrics


@cache
def subject():
    return load("tiny")


@cache
def text():
    """256 windows of 32 random tokens."""
    tokens = np.random.default_rng(0).integers(0, 256, (256, 32)).astype(np.int32)
    weight = np.ones((256, 32), np.float32)
    weight[:, 0] = 0
    columns = zip(tokens, weight, np.arange(256, dtype=np.int32), strict=True)
    return grain.MapDataset.source([{"tokens": t, "weight": w, "document": np.full(32, i)} for t, w, i in columns])


def fitted(method, mesh=None):
    """20 steps at an MLP of the tiny model."""
    sizes = {"steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 1}
    return fit(method, subject(), text(), site=SITE, **sizes, **({} if mesh is None else {"mesh": mesh}))


def is_the_same_on_a_mesh(method, tolerance=1e-5):
    """Invariant 5: (data, feature) = (2, 4) against one device. Returns the decomposition of one device."""
    one, many = fitted(method), fitted(method, make_mesh(2, 4))
    assert many.decomposition.encoder.sharding.spec == P("feature")
    leaves = named_leaves(many.decomposition)
    for name, leaf in named_leaves(one.decomposition).items():
        np.testing.assert_allclose(np.asarray(leaves[name]), leaf, rtol=0, atol=tolerance, err_msg=name)
    for first, second in zip(one.history, many.history, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=tolerance)
    assert one.history[-1]["fvu"] < one.history[0]["fvu"]
    return one.decomposition


def is_kept_on_disk(dictionary, folder, activation):
    """Invariant 7."""
    loaded = load_dictionary(save_dictionary(dictionary, folder), activations=[activation])
    assert jax.tree.structure(loaded) == jax.tree.structure(dictionary)
    for name, leaf in named_leaves(dictionary).items():
        np.testing.assert_array_equal(leaf, named_leaves(loaded)[name], err_msg=name)


def stands_in_and_scores(dictionary):
    """In its leaf's place it does what an edit of the array does; its row of the scoreboard is finite."""
    model, tokens = subject().model, jnp.arange(16).reshape(2, 8)
    there = replace(model, {SITE: StandIn(model.blocks[1].mlp, dictionary)})
    edited = run(model, tokens, edits={dictionary.sites.writes: lambda value: dictionary(value)})
    np.testing.assert_allclose(run(there, tokens).logits, edited.logits, rtol=1e-4, atol=1e-3)
    assert float(jnp.abs(edited.logits - run(model, tokens).logits).max()) > 1e-3
    row = score(dictionary, subject(), text(), tokens=1024, ce_tokens=1024)
    assert 0 < row["fvu"] < 1.5 and row["l0"] > 0 and np.isfinite(row["ce_replaced"])


@pytest.mark.parametrize("activation", [TopK(5), ReLU()])
def test_the_loss_is_the_mean_over_prefixes_decoded_one_by_one(activation):
    """With sparse and dense codes, a skip path and tokens without weight."""
    dictionary = random_dictionary(activation)  # 24 features, 8 -> 6
    keys = jax.random.split(jax.random.key(3), 2)
    x, y = jax.random.normal(keys[0], (40, 8)), jax.random.normal(keys[1], (40, 6))
    weight = (jnp.arange(40) % 5 > 0).astype(jnp.float32)
    reads, writes = dictionary.sites.reads, dictionary.sites.writes
    batch = make_batch({reads: x, writes: y}, weight, Sites(reads, writes))
    sizes = (3, 10, 24)
    loss, metrics = total(prefixes(*sizes))(dictionary, batch, jax.random.key(0))
    codes = np.asarray(dictionary.encode(x).dense())
    expected = []
    for size in sizes:
        inside = np.where(np.arange(24) < size, codes, 0)
        sparse = inside @ dictionary.decoder + dictionary.decoder_bias + dictionary.normalise(x) @ dictionary.skip
        output = dictionary.output_scale * sparse + dictionary.output_mean
        error = np.sum((np.asarray(y) - output) ** 2, axis=1) / dictionary.target_variance
        expected.append(float(np.sum(error * weight) / np.sum(weight)))
    assert len({round(value, 3) for value in expected}) == 3
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)
    found = [float(metrics[name].value()) for name in ("fvu_first_3", "fvu_first_10", "fvu")]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_plant_is_recovered():
    assert np.mean([recovered(PLANTED, seed)[0] for seed in (0, 1, 2)]) > 0.90


def test_a_k_three_times_too_large_does_not_recover_it():
    assert recovered(change(PLANTED, k=9))[0] < 0.85


def first(dictionary, size):
    """The fraction of variance that the first features leave unexplained."""
    _, samples = planted_dictionary(0)
    batch = make_batch({"x": samples[:4096]}, jnp.ones(4096), Sites("x", "x"))
    _, metrics = total(prefixes(size, 96))(dictionary, batch, jax.random.key(0))
    return float(metrics[f"fvu_first_{size}"].value())


def test_the_first_features_explain_more_than_those_of_one_whole_dictionary():
    """Without smaller prefixes no feature is before any other: half of them explain about half."""
    _, nested, _ = recovered(PLANTED)
    _, whole, _ = recovered(change(PLANTED, prefixes=(96,)))
    assert first(nested, 48) < 0.25
    assert first(whole, 48) > 0.4


def test_prefixes_that_do_not_nest_are_refused():
    for sizes in ((48, 24, 96), (0, 96), (24, 24, 96), ()):
        with pytest.raises(UserError, match="rising numbers"):
            MatryoshkaSparseAutoencoder(features=96, k=3, prefixes=sizes)
    with pytest.raises(UserError, match="must end with features=96"):
        MatryoshkaSparseAutoencoder(features=96, k=3, prefixes=(24, 48))
    assert MatryoshkaSparseAutoencoder(features=64, k=3).sizes == (4, 8, 16, 32, 64)
    with pytest.raises(UserError, match="must end with features=24"):
        batch = make_batch({"m/in": jnp.ones((4, 8)), "m/out": jnp.ones((4, 6))}, jnp.ones(4), Sites("m/in", "m/out"))
        total(prefixes(3, 10))(random_dictionary(TopK(4)), batch, jax.random.key(0))


def test_mesh_files_and_leaf(tmp_path):
    method = MatryoshkaSparseAutoencoder(features=64, k=4, learning_rate=3e-3, dead_after=500)
    dictionary = is_the_same_on_a_mesh(method)
    is_kept_on_disk(dictionary, tmp_path / "d", type(dictionary.activation))
    stands_in_and_scores(dictionary)
