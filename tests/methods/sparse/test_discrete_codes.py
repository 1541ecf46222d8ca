"""Discrete codes on planted heads: which of 48 take other codes on positive prompts.

60 examples, 32 dimensions, 8 planted heads with two clusters for positive and two others for negative examples; the
other heads have four clusters, or two, whatever the label. Threshold: normalised AUC above 0.93, mean of three seeds.
Where the others have two clusters, the raw score finds "planted" heads under permuted labels too (independent
implementation: AUC 0.67); the z-score does not.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.activations import ReLU
from jaxinterp.evaluation.attention.discrete_codes import node_scores, permutation_z, roc_auc
from jaxinterp.methods.sparse.discrete_codes import DiscreteCodes, codes_of
from jaxinterp.models.tiny import unit_rows
from jaxinterp.training.mesh import make_mesh
from tests.methods.laboratory import is_kept_on_disk

HEADS, PLANTED, EXAMPLES, D, FEATURES = 48, 8, 60, 32, 64
METHOD = DiscreteCodes(features=FEATURES)
POSITIVE = jnp.arange(EXAMPLES) < EXAMPLES // 2
MEMBER = jnp.arange(HEADS) < PLANTED


def contributions(seed, clusters):
    keys = jax.random.split(jax.random.key(seed), 4)
    centers = unit_rows(keys[0], HEADS * 4, D).reshape(HEADS, 4, D)
    by_label = jax.random.randint(keys[1], (EXAMPLES, HEADS), 0, 2) + 2 * (~POSITIVE)[:, None]
    cluster = jnp.where(MEMBER, by_label, jax.random.randint(keys[2], (EXAMPLES, HEADS), 0, clusters))
    return centers[jnp.arange(HEADS), cluster] + 0.05 * jax.random.normal(keys[3], (EXAMPLES, HEADS, D))


@cache
def codes(seed, clusters=4):
    rows = contributions(seed, clusters)
    return codes_of(METHOD.train(rows, jax.random.key(100 + seed)), rows)


def permuted(count=20):
    return [jax.random.permutation(jax.random.key(70 + number), POSITIVE) for number in range(count)]


def auc(score):
    return float(roc_auc(score, MEMBER))


def test_planted_heads_are_found():
    found = [
        (
            auc(node_scores(codes(seed), POSITIVE, FEATURES)),
            auc(node_scores(codes(seed), POSITIVE, FEATURES, normalised=True)),
            auc(permutation_z(codes(seed), POSITIVE, FEATURES, jax.random.key(0))),
        )
        for seed in range(3)
    ]
    raw, normalised, z = np.mean(found, axis=0)
    assert normalised > 0.93 and raw > 0.93 and z > 0.93


def test_training_explains_what_a_dictionary_of_random_directions_does_not():
    """FVU over all examples, ten of them seen in training: measured 0.17 after 500 steps, 0.90 after one.

    This is what training is shown to add. That planted heads are found it does not decide: clusters of one head lie so
    far apart that random directions tell them apart too (normalised AUC 0.95 to 0.99 after one step).
    """

    def unexplained(steps):
        rows = contributions(0, 4)
        dictionary = replace(METHOD, steps=steps).train(rows, jax.random.key(100))
        flat = rows.reshape(-1, D)
        return float(jnp.sum((flat - dictionary(flat)) ** 2) / jnp.sum((flat - flat.mean(0)) ** 2))

    assert unexplained(METHOD.steps) < 0.3 < 0.8 < unexplained(1)


def test_permuted_labels_and_a_single_code_find_nothing():
    """The controls of the scores: permuted labels, and a dictionary with a single code."""
    chance = [auc(node_scores(codes(0), labels, FEATURES, normalised=True)) for labels in permuted()]
    assert np.mean(chance) < 0.75
    rows = contributions(0, 4)
    one = codes_of(DiscreteCodes(features=1).train(rows, jax.random.key(0)), rows)
    assert auc(node_scores(one, POSITIVE, 1, normalised=True)) == 0.5


def test_the_z_score_does_not_favour_heads_that_take_many_codes():
    """Two clusters in the other heads: a planted head takes four codes to their two, whatever the labels."""
    raw, z = [], []
    for seed in range(3):
        for labels in permuted():
            raw.append(auc(node_scores(codes(seed, 2), labels, FEATURES)))
            z.append(auc(permutation_z(codes(seed, 2), labels, FEATURES, jax.random.key(0), permutations=300)))
    assert np.mean(raw) > 0.62
    assert abs(np.mean(z) - 0.5) < 0.06
    true = [auc(permutation_z(codes(seed, 2), POSITIVE, FEATURES, jax.random.key(0))) for seed in range(3)]
    assert np.mean(true) > 0.93


def test_a_mesh_changes_nothing_and_the_dictionary_is_kept_on_disk(tmp_path):
    """Invariants 5 and 7."""
    rows = contributions(0, 4)
    one = METHOD.train(rows, jax.random.key(0))
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        many = METHOD.train(jax.device_put(rows, NamedSharding(mesh, P("data"))), jax.random.key(0))
    for name, leaf in named_leaves(one).items():
        np.testing.assert_allclose(np.asarray(named_leaves(many)[name]), leaf, rtol=0, atol=1e-3, err_msg=name)
    assert float(jnp.mean(codes_of(one, rows) == codes_of(many, rows))) > 0.99
    is_kept_on_disk(one, tmp_path / "d", ReLU)


def test_what_cannot_be_trained():
    with pytest.raises(UserError, match="training_examples=10 exceeds the 4 examples given"):
        METHOD.train(jnp.ones((4, 3, D)), jax.random.key(0))
    with pytest.raises(UserError, match="features=0 must be at least 1"):
        DiscreteCodes(features=0)
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        DiscreteCodes(steps=0)
