"""Adapters: nothing changes at the start, only they are trained, and added to the weights they give the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import trainable
from jaxinterp.core.trees import named_leaves
from jaxinterp.methods.low_rank_adapters import LowRankAdapters, LowRankLinear, adapted, merged
from jaxinterp.methods.sparse_language_model import SparseLanguageModel
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.fit import fit
from tests.methods.counting_text import counting_text

CONFIG = TransformerConfig(16, 16, 2, 2, 2, 8, 48, context=16, activation="relu", rotary_dimensions=8)
MLPS = ("blocks/*/mlp/*_proj",)
TOKENS = jnp.arange(12)[None] % 16


@pytest.fixture(scope="module")
def subject():
    return Subject(initialise(CONFIG, jax.random.key(0)), None, "small")


def test_the_adapted_model_begins_as_the_model_and_trains_its_adapters_alone(subject):
    model = adapted(subject.model, MLPS, jax.random.key(1), rank=3, alpha=6.0)
    assert (run(model, TOKENS).logits == run(subject.model, TOKENS).logits).all()
    marks = {name for name, mark in named_leaves(trainable(model)).items() if mark}
    places = sites(subject.model, MLPS[0])
    assert len(places) == 6 and marks == {f"{name}/{part}" for name in places for part in ("down", "up")}
    down = model.blocks[0].mlp.up_proj.down
    assert (
        down.shape == (16, 3) and np.abs(down).max() <= 0.25 and np.std(down) == pytest.approx(0.25 / 3**0.5, rel=0.3)
    )


def test_an_adapter_is_its_formula_and_merges_to_the_same_map(subject):
    linear = subject.model.blocks[0].mlp.up_proj
    rng = np.random.default_rng(0)
    down, up, x = (rng.normal(size=size) for size in ((16, 3), (3, 48), (5, 16)))
    adapter = LowRankLinear(linear, jnp.float32(down), jnp.float32(up), 2.0)
    weight = np.asarray(linear.weight, np.float64)
    expected = x @ weight + 2.0 * (x @ down) @ up
    np.testing.assert_allclose(adapter(jnp.float32(x)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(adapter.merged().weight, weight + 2.0 * down @ up, rtol=1e-4, atol=1e-5)
    assert np.abs(x @ weight + (x @ down) @ up - expected).max() > 0.1, "broken: without alpha / rank"


def test_a_density_loss_is_trained_through_adapters_and_the_rest_is_frozen(subject):
    penalty = SparseLanguageModel(penalty="density", weight=1.0, epsilon=0.1, relative=True)
    method = LowRankAdapters(MLPS, rank=4, objective=penalty.objective, learning_rate=2e-2)
    found = fit(method, subject, counting_text(), steps=30, batch_size=48, log_every=15)
    before, after = (named_leaves(one) for one in (subject.model, found.decomposition))
    for name, leaf in before.items():
        frozen = after.get(name, after.get(name.replace("_proj/", "_proj/linear/")))
        np.testing.assert_array_equal(frozen, leaf, err_msg=name)
    assert found.history[-1]["penalty"] < 0.9 * found.history[0]["penalty"]
    plain = merged(found.decomposition)
    assert jax.tree.structure(plain) == jax.tree.structure(subject.model)
    np.testing.assert_allclose(run(plain, TOKENS).logits, run(found.decomposition, TOKENS).logits, atol=2e-4)
    assert np.abs(run(plain, TOKENS).logits - run(subject.model, TOKENS).logits).max() > 1e-2


def test_what_cannot_be_adapted_is_refused(subject):
    key = jax.random.key(0)
    with pytest.raises(UserError, match=r"names='blocks/\*/mlp' matches no projection"):
        adapted(subject.model, ("blocks/*/mlp",), key, rank=2, alpha=1.0)
    once = adapted(subject.model, MLPS, key, rank=2, alpha=1.0)
    with pytest.raises(UserError, match=r"is a LowRankLinear, not a linear map|matches no projection"):
        adapted(once, MLPS, key, rank=2, alpha=1.0)
    with pytest.raises(UserError, match="rank=0"):
        LowRankAdapters(rank=0)
    with pytest.raises(UserError, match="site='blocks/0/mlp'"):
        LowRankAdapters().needs("blocks/0/mlp")
