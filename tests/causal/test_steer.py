"""Directions, matched strengths and the table of cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.directions import (
    clustered_choice,
    difference_in_means,
    pair_centre_component,
    paired_component,
    unit,
)
from jaxinterp.causal.steer import (
    fragility,
    matched_strength,
    next_token_outcome,
    padded,
    perplexity,
    solve_strength,
    steering_rows,
)
from jaxinterp.core.errors import UserError
from jaxinterp.methods.causal.lineas import Transport
from jaxinterp.models.edits import Add
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.run import run
from tests.causal.toys import small_transformer

SITE = "blocks/0/resid/post"


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_difference_in_means_finds_a_planted_direction():
    v = np.asarray(unit(jnp.asarray(draw(0, 12))))
    positive, negative = draw(1, 3000, 12) + 2 * v, draw(2, 3000, 12)
    assert float(difference_in_means(jnp.asarray(positive), jnp.asarray(negative)) @ v) > 0.99
    weight = jnp.asarray(np.r_[np.ones(1500), np.zeros(1500)], jnp.float32)
    positive[1500:] = 99.0
    assert float(difference_in_means(jnp.asarray(positive), jnp.asarray(negative), weight) @ v) > 0.99


def test_a_centred_component_loses_what_all_pairs_share():
    """The known difference between pca_diff and the uncentred component: only the latter is the difference in means."""
    v, other = np.eye(8, dtype=np.float32)[:2]
    negative = draw(0, 200, 8)
    positive = negative + 2 * v + 0.8 * draw(1, 200, 1) * other + 0.05 * draw(2, 200, 8)
    pair = jnp.asarray(positive), jnp.asarray(negative)
    assert float(paired_component(*pair, centred=False) @ v) > 0.95
    assert abs(float(paired_component(*pair, centred=True) @ v)) < 0.1
    halves = np.concatenate([positive - negative, negative - positive]) / 2
    first = np.linalg.svd(halves, full_matrices=False)[2][0]
    np.testing.assert_allclose(abs(np.asarray(pair_centre_component(*pair)) @ first), 1.0, rtol=1e-5)


def test_a_probe_chooses_the_direction_of_the_cluster():
    """Two kinds of prompts, told apart by channel 2, differ along channels 0 and 1."""
    kind = np.arange(60) % 2
    negative = 0.1 * draw(0, 60, 4)
    negative[:, 2] += np.where(kind, 2.0, -2.0)
    positive = negative + np.where(kind[:, None], [3, 0, 0, 0], [0, 3, 0, 0]).astype(np.float32)
    choice = clustered_choice(jnp.asarray(positive), jnp.asarray(negative), 2, strength=3.0)
    np.testing.assert_allclose(choice(jnp.asarray(negative)), positive, atol=0.05)
    one = clustered_choice(jnp.asarray(positive), jnp.asarray(negative), 1, strength=3.0)
    assert float(jnp.abs(one(jnp.asarray(negative)) - positive).max()) > 0.5, "one direction cannot serve both"
    with pytest.raises(UserError, match="clusters=61"):
        clustered_choice(jnp.asarray(positive), jnp.asarray(negative), 61)


def test_strengths_are_solved_or_said_not_to_be():
    found = solve_strength(lambda alpha: alpha**2, 2.0, high=10.0, steps=30, tolerance=1e-3)
    assert abs(float(found.value) - 2**0.5) < 1e-3 and bool(found.converged)
    never = solve_strength(jnp.tanh, 2.0, high=10.0)
    assert not bool(never.converged) and float(never.reached) == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(UserError, match="low must be below high"):
        solve_strength(lambda alpha: alpha, 1.0, low=3.0, high=2.0)


@pytest.fixture(scope="module")
def subject():
    return Subject(small_transformer(), byte_tokenizer(), "small")


@pytest.mark.slow
def test_a_table_of_cells_at_matched_divergence(subject):
    directions = {(SITE, name): unit(jnp.asarray(draw(seed, 16))) for seed, name in enumerate(("a", "b"))}
    contexts, concept = ["abc", "q", "hello"], [65, 66, 67]
    rows = steering_rows(subject, directions, contexts, concept, targets=(0.05, 40.0), high=50.0, words=2)
    assert len(rows) == 2 * 2 * 3 and all(np.isfinite(row["fluency"]) for row in rows)
    for name in ("a", "b"):
        met = [row for row in rows if row["direction"] == name and row["target"] == 0.05]
        assert all(row["converged"] for row in met)
        assert np.mean([row["kl"] for row in met]) == pytest.approx(0.05, rel=0.06)
    assert not any(row["converged"] for row in rows if row["target"] == 40.0)
    # One cell by hand, from the prompt alone, without padding.
    row = next(row for row in rows if row["context"] == "q" and row["target"] == 0.05 and row["direction"] == "a")
    edits = {SITE: Add(row["alpha"] * directions[SITE, "a"])}
    p, q = (jax.nn.softmax(subject.run("q", edits=some).logits[0, -1]) for some in (edits, {}))
    assert row["concept"] == pytest.approx(float(p[65:68].sum()), rel=1e-4)
    assert row["kl"] == pytest.approx(float((q * jnp.log(q / p)).sum()), rel=1e-2)
    assert row["entropy"] == pytest.approx(float(-(p * jnp.log(p)).sum()), rel=1e-4)
    summary = fragility(rows)
    assert [each["cells"] for each in summary] == [6, 6]
    assert all(each["lowest"] <= each["gain"] <= each["highest"] and each["converged"] == 0.5 for each in summary)


def test_a_map_is_matched_as_a_direction_is(subject):
    """A steering that is not linear in its strength, over two arrays: the table's KL is the target."""
    names = (SITE, "blocks/1/mlp/out")
    ones, shift = jnp.ones(16), jnp.asarray(draw(5, 16))
    maps = Transport((0.5 * ones, ones), (shift, shift), (), names)
    rows = steering_rows(subject, {("both", "map"): maps.edits}, ["abc", "xyz"], [65], targets=(0.05,), high=2.0)
    assert all(row["converged"] and row["site"] == "both" for row in rows)
    assert np.mean([row["kl"] for row in rows]) == pytest.approx(0.05, rel=0.06)
    with pytest.raises(UserError, match="no site 'both'"):
        steering_rows(subject, {("both", "vector"): shift}, ["abc"], [65])


def test_strength_zero_is_no_steering(subject):
    tokens, mask = padded([[1, 2, 3], [4]])
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    still = next_token_outcome(subject.model, tokens, {SITE: Add(jnp.zeros(16))}, jnp.asarray([5]), mask)
    assert float(jnp.abs(still.kl).max()) == 0 and bool(still.agrees.all())


def test_fluency_is_the_perplexity_of_the_unsteered_model(subject):
    """Rows of all lengths in one program: padding changes none, an empty row has no number."""
    found = perplexity(subject.model, [[7, 8], [9], []], [[1, 2, 3], [4, 5, 6, 7, 8, 9], [1]])
    assert np.isnan(found[2])
    np.testing.assert_allclose(perplexity(subject.model, [[9]], [[4, 5, 6, 7, 8, 9]]), found[1:2], rtol=1e-5)
    log_p = jax.nn.log_softmax(run(subject.model, jnp.asarray([[1, 2, 3, 7, 8]])).logits[0])
    assert found[0] == pytest.approx(float(jnp.exp(-(log_p[2, 7] + log_p[3, 8]) / 2)), rel=1e-5)


def test_bad_tables_are_refused(subject):
    with pytest.raises(UserError, match="2 rows behind 1 prompts"):
        perplexity(subject.model, [[1], [2]], [[3]])
    with pytest.raises(UserError, match="rows: token id 99999"):
        perplexity(subject.model, [[99999]], [[3]])
    with pytest.raises(UserError, match="must not be empty"):
        steering_rows(subject, {}, ["a"], [1])
    with pytest.raises(UserError, match=r"target=0\.0 must be positive"):
        matched_strength(subject.model, jnp.asarray([[1]]), SITE, jnp.ones(16), 0.0)
    with pytest.raises(UserError, match="no site 'blocks/9/resid/post'"):
        matched_strength(subject.model, jnp.asarray([[1]]), "blocks/9/resid/post", jnp.ones(16), 0.1)
