"""What the tests of every method share: planted samples, the same fit on a mesh, on disk and in the leaf's place."""

from functools import cache

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.files import load_dictionary
from jaxinterp.evaluation.planted import laboratory
from jaxinterp.evaluation.planted.recovery import mcc
from jaxinterp.models.load import load
from jaxinterp.models.tiny import unit_rows
from jaxinterp.training.fit import fit
from tests.decompositions.older import save_dictionary

FEATURES, D, ACTIVE = 48, 32, 3
SITE = "blocks/1/mlp"

STEPS = 1500
"""At high learning rates; experiments/recovery.py asks the same thresholds of 6000 steps."""


def planted_dictionary(seed, samples=65_536):
    """V: 48 unit rows in 32 dimensions; samples h V with exactly 3 active h ~ U(0.5, 1.5)."""
    rows_key, choice_key, size_key = jax.random.split(jax.random.key(seed), 3)
    rows = unit_rows(rows_key, FEATURES, D)
    chosen = jax.lax.top_k(jax.random.uniform(choice_key, (samples, FEATURES)), ACTIVE)[1]
    sizes = jax.random.uniform(size_key, (samples, ACTIVE), minval=0.5, maxval=1.5)
    codes = jnp.zeros((samples, FEATURES)).at[jnp.arange(samples)[:, None], chosen].set(sizes)
    return rows, codes @ rows


def train(method, draw, sites, *, steps, batch_size, seed):
    """Train on fresh batches from `draw(key, size) -> arrays by site`; returns (decomposition, mean late metrics)."""
    trained, metrics = laboratory.train(
        method, lambda _, key, size: draw(key, size), [None], sites, steps=steps, batch_size=batch_size, seed=seed
    )
    return trained[0], metrics[0]


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


def fitted(method, mesh=None, site=SITE):
    """20 steps at a sublayer of the tiny model."""
    sizes = {"steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 1}
    return fit(method, subject(), text(), site=site, **sizes, **({} if mesh is None else {"mesh": mesh}))


def is_kept_on_disk(dictionary, folder, activation):
    """Invariant 7."""
    loaded = load_dictionary(save_dictionary(dictionary, folder), activations=[activation])
    assert jax.tree.structure(loaded) == jax.tree.structure(dictionary)
    for name, leaf in named_leaves(dictionary).items():
        np.testing.assert_array_equal(leaf, named_leaves(loaded)[name], err_msg=name)


@cache
def trained_on_plants(method, seeds, steps=STEPS):
    """(planted rows, dictionaries, late metrics), lists over seeds that follow each other: one compiled program."""
    plants = [planted_dictionary(seed) for seed in seeds]

    def draw(samples, key, size):
        return {"x": samples[jax.random.randint(key, (size,), 0, len(samples))]}

    assert list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    trained, metrics = laboratory.train(
        method, draw, [samples for _, samples in plants], Sites("x", "x"), steps=steps, batch_size=256, seed=seeds[0]
    )
    return [rows for rows, _ in plants], trained, metrics


@cache
def recovered(method, seed=0, steps=STEPS):
    """(mean matched cosine with the plant, dictionary, late metrics); all seeds have one program in the cache."""
    (rows,), (dictionary,), (metrics,) = trained_on_plants(method, (seed,), steps)
    return mcc(rows, dictionary.decoder), dictionary, metrics


def recovery(method, seeds, steps=STEPS):
    """(mean matched cosine, active features, fraction of variance unexplained), means over seeds."""
    found = [
        (mcc(rows, dictionary.decoder), late["l0"], late["fvu"])
        for rows, dictionary, late in zip(*trained_on_plants(method, tuple(seeds), steps), strict=True)
    ]
    return np.mean(found, axis=0)
