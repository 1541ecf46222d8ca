"""What is asked of the model in the scoreboard: embeddings of an encoder against direct computation, and refusals."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.activations import TopK
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.effects import Effect
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.evaluation.pooled import POOLED
from jaxinterp.evaluation.scoreboard import score, scoreboard
from jaxinterp.evaluation.several import score_layers
from jaxinterp.methods import SkipTranscoder
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.objectives.end_to_end import spliced
from jaxinterp.training.fit import fit
from tests.evaluation.whole import Whole
from tests.helpers import random_dictionary

SITE = "blocks/1/mlp"
SITES = Sites(f"{SITE}/in", f"{SITE}/out")
OPTIONS = {"tokens": 480, "ce_tokens": 480}
BERT = TransformerConfig(
    vocab_size=50, d_model=64, layers=2, heads=4, kv_heads=4, head_dim=16, d_mlp=96, context=32, activation="gelu",
    gated=False, norm="layer", norm_bias=True, pre_norms=False, sum_norms=True, embedding_norm=True, causal=False,
    padding=0, token_types=2, learned_positions=True, qkv_bias=True, attention_out_bias=True, mlp_bias=True, head=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    return Subject(initialise(BERT, jax.random.key(0)), None, "random encoder")


@pytest.fixture(scope="module")
def heldout():
    """24 windows of 20 tokens: position 0 has no weight, the last six of every third window are padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (24, 20)).astype(np.int32)
    tokens[::3, 14:] = 0
    weight = (tokens != 0).astype(np.float32)
    weight[:, 0] = 0
    rows = [
        {"tokens": tokens[i], "weight": weight[i], "document": np.full(20, i // 2, np.int32)}
        for i in range(len(tokens))
    ]
    return grain.MapDataset.source(rows)


def test_similarities_equal_their_definition(encoder, heldout):
    dictionary = random_dictionary(TopK(4), d_in=64, d_out=64)
    row = score(dictionary, encoder, heldout, effect=POOLED, **OPTIONS)
    batches = take(heldout, 480)
    tokens, weight = (np.concatenate([batch[name] for batch in batches]) for name in ("tokens", "weight"))
    clean = run(encoder.model, jnp.asarray(tokens))

    def embedding(value=None):
        """By hand: the mean of `final` over the tokens that are no padding."""
        edits = {} if value is None else {f"{SITE}/out": lambda y: jnp.where(weight[..., None] > 0, value, y)}
        final = np.asarray(run(encoder.model, jnp.asarray(tokens), edits=edits)["final"], np.float64)
        real = (tokens != 0)[..., None]
        return (final * real).sum(1) / real.sum(1)

    def similarity(value):
        one, other = embedding(), embedding(value)
        return np.mean((one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1))

    replaced = similarity(dictionary(clean[f"{SITE}/in"]))
    zero, mean = similarity(0.0), similarity(dictionary.target_mean)
    assert row["similarity_clean"] == pytest.approx(1, abs=1e-6)
    assert row["similarity_replaced"] == pytest.approx(replaced, abs=1e-5) and replaced < 0.99
    assert row["similarity_zero"] == pytest.approx(zero, abs=1e-5)
    assert row["similarity_mean"] == pytest.approx(mean, abs=1e-5)
    assert row["similarity_recovered_zero"] == pytest.approx((zero - replaced) / (zero - 1), abs=1e-3)
    low, high = row["similarity_replaced_interval"]
    assert low < replaced < high and row["compared"] == 24
    assert not any(name.startswith(("ce_", "kl", "top1")) for name in row)


def test_the_mlp_itself_keeps_every_embedding_and_a_worse_one_fewer(encoder, heldout):
    mlp = encoder.model.blocks[1].mlp
    rivals = baselines(encoder, heldout, SITE, k=8, features=32, tokens=480)
    entries = {"whole": Whole(mlp, jnp.zeros(64), SITES), **rivals}
    rows = {row["method"]: row for row in scoreboard(entries, encoder, heldout, effect=POOLED, **OPTIONS)}
    assert rows["whole"]["similarity_replaced"] == pytest.approx(1, abs=1e-6) and rows["whole"]["fvu"] < 1e-10
    assert rows["whole"]["similarity_recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert all(rows[name]["similarity_replaced"] < 1 - 1e-4 for name in rivals)


def test_cross_entropy_of_an_encoder_is_refused_by_name(encoder, heldout):
    """Before anything is computed: the windows are not even looked at."""
    dictionary = random_dictionary(TopK(4), d_in=64, d_out=64)
    nothing = grain.MapDataset.source([])
    with pytest.raises(UserError, match=r"no logits and so no cross-entropy.*effect=POOLED"):
        score(dictionary, encoder, nothing)
    with pytest.raises(UserError, match=r"no site 'pooled' in this model"):
        score(dictionary, load("tiny"), nothing, effect=POOLED)
    with pytest.raises(UserError, match="no logits and so no cross-entropy"):
        spliced(dictionary, encoder.model, jnp.ones((1, 4), jnp.int32))
    layers = Sites(("blocks/0/mlp/in", f"{SITE}/in"), ("blocks/0/mlp/out", f"{SITE}/out"))
    several = dataclasses.replace(dictionary, sites=layers)
    with pytest.raises(UserError, match="no logits and so no cross-entropy"):
        score_layers(several, encoder, nothing)


def test_an_effect_is_a_plain_function(heldout):
    """How far the last hidden states move, of a model that predicts tokens; the numbers follow by themselves."""

    def moved(final, clean, windows):
        return {"moved": jnp.linalg.norm(final - clean, axis=-1), "counted": windows["weight"]}

    subject = load("tiny")
    dictionary = random_dictionary(TopK(4), d_in=64, d_out=64)
    own = Effect(lambda trace: trace["final"], moved)
    row, plain = (score(dictionary, subject, heldout, effect=effect, **OPTIONS) for effect in (own, NEXT_TOKEN))
    assert row["moved_clean"] == 0 < row["moved_replaced"] and row["moved_zero"] > 0
    expected = (row["moved_zero"] - row["moved_replaced"]) / row["moved_zero"]
    assert row["moved_recovered_zero"] == pytest.approx(expected)
    assert row["compared"] == row["tokens"] and row["fvu"] == plain["fvu"] and "ce_clean" in plain


@pytest.mark.slow
def test_an_encoder_s_mlp_is_decomposed_as_any_other(encoder, heldout):
    """A transcoder trained through the same `fit` beats one of random features on both scores."""
    method = SkipTranscoder(features=96, k=8, learning_rate=1e-2)
    trained = fit(method, encoder, heldout, site=SITE, steps=60, batch_size=160).decomposition
    entries = {"trained": trained, **baselines(encoder, heldout, SITE, k=8, features=96, tokens=480)}
    rows = {row["method"]: row for row in scoreboard(entries, encoder, heldout, effect=POOLED, **OPTIONS)}
    trained, random = rows["trained"], rows["random features"]
    assert trained["fvu"] < random["fvu"] and trained["l0"] == pytest.approx(8, abs=0.1)
    assert trained["similarity_replaced"] > random["similarity_replaced"]
