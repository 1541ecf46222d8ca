"""An autoencoder of any array: trained, scored, saved, loaded and shown."""

import grain
import jax
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import load_text
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.evaluation.features.vectors import direct_logits, neuron_cosines
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.methods import SparseAutoencoder, Transcoder
from jaxinterp.models.edits import SetTo
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.report.features import feature_pages
from jaxinterp.training.fit import expand, fit

CONFIG = TransformerConfig(
    vocab_size=257, d_model=16, layers=2, heads=2, kv_heads=1, head_dim=8, d_mlp=24, context=32, rotary_dimensions=8,
    post_norms=True, tied=False,
)  # fmt: skip
METHOD = SparseAutoencoder(features=32, k=4, auxk=0.0, learning_rate=1e-2)


@pytest.fixture(scope="module")
def subject():
    return Subject(jax.jit(lambda key: initialise(CONFIG, key))(jax.random.key(0)), byte_tokenizer(), "small")


@pytest.fixture(scope="module")
def text():
    rng, weight = np.random.default_rng(0), np.ones(16, np.float32)
    weight[0] = 0
    documents = [np.full(16, number, np.int32) for number in range(64)]
    tokens = [rng.integers(32, 127, 16, np.int32) for _ in documents]
    windows = zip(tokens, documents, strict=True)
    return grain.MapDataset.source([{"tokens": t, "weight": weight, "document": d} for t, d in windows])


def trained(method, subject, text, site, **sizes):
    result = fit(method, subject, text, site=site, buffer_batches=2, progress=False, **sizes)
    assert result.decomposition.sites == Sites(site, site)
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    return result.decomposition


def scored(sae, subject, text, site, tokens):
    row = score(sae, subject, text, tokens=tokens, ce_tokens=tokens)
    assert row["reads"] == row["writes"] == site and 0 < row["fvu"] < 1 and 0 < row["l0"] <= sae.activation.k
    assert row["ce_clean"] < row["ce_zero"] and np.isfinite(row["ce_replaced"])
    return row


def test_an_autoencoder_of_the_residual_stream(subject, text):
    """Trained and scored in a small model."""
    site = "blocks/1/resid/post"
    sae = trained(METHOD, subject, text, site, steps=20, batch_size=64)
    row = score(sae, subject, text, tokens=128, ce_tokens=128)
    assert row["reads"] == row["writes"] == site and 0 < row["fvu"] < 1 and 0 < row["l0"] <= 4


@pytest.fixture(scope="module")
def smollm2():
    """The model, and text to train and to score on."""
    subject = load("smollm2-135m")
    return subject, *load_text("docs", subject.tokenizer, seq=64, max_tokens=40_000)


@pytest.mark.slow
@pytest.mark.parametrize(("site", "steps"), [("blocks/3/resid/post", 40), ("blocks/3/attn/out", 12)])
def test_an_autoencoder_of_an_array_of_smollm2(smollm2, site, steps, tmp_path):
    """Trained, scored, saved, loaded, and shown on a page."""
    subject, train, heldout = smollm2
    method = SparseAutoencoder(features=256, k=16, auxk=0.0, learning_rate=3e-3)
    sae = trained(method, subject, train, site, steps=steps, batch_size=256)
    row = scored(sae, subject, heldout, site, 512)
    loaded = load_dictionary(save_dictionary(sae, tmp_path / "sae"))
    assert score(loaded, subject, heldout, tokens=512, ce_tokens=512) == row
    density, pages = feature_pages(loaded, subject, heldout, features=3, contexts=2, tokens=512)
    assert len(pages) == 3 and density.shape == (256,) and all(page.raised for page in pages)
    print(site, {name: row[name] for name in ("fvu", "l0", "ce_clean", "ce_replaced", "ce_zero")})


def test_what_is_not_an_array_or_a_leaf_is_refused(subject):
    with pytest.raises(
        UserError, match="site='blocks/1/resid/post' is an array, and this method reads and writes a leaf"
    ):
        Transcoder(features=32).needs("blocks/1/resid/post")
    with pytest.raises(UserError, match="array='hidden' names another: leave array away"):
        SparseAutoencoder(features=32, array="hidden").needs("blocks/1/resid/post")
    with pytest.raises(UserError, match="'blocks/1/mlp/up_proj' is a linear map"):
        expand(subject.model, "blocks/1/mlp/up_proj")
    assert SparseAutoencoder(features=32).needs("blocks/1/mlp") == Sites("blocks/1/mlp/out", "blocks/1/mlp/out")
    assert expand(subject.model, "blocks/*/resid/mid") == ("blocks/0/resid/mid", "blocks/1/resid/mid")
    assert expand(subject.model, "blocks/*/*") == tuple(
        f"blocks/{n}/{leaf}" for n in range(2) for leaf in ("attn", "mlp")
    )


def test_direct_logits_of_what_is_added_to_the_stream(subject):
    """Zero in, the rest of the model silent: unit vectors at an array of the last block move the logits as is said."""
    model, vectors = subject.model, np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    stream = direct_logits(model, "blocks/1/resid/post", vectors)
    for row, vector in zip(stream, vectors, strict=True):
        final = vector / np.sqrt(np.mean(vector**2))
        logits = run(model, np.zeros((1, 1), np.int32), edits={"blocks/1/resid/post": SetTo(final)}).logits[0, 0]
        scaled = np.asarray(logits) * np.sqrt(np.mean(vector**2))
        np.testing.assert_allclose(row, scaled - scaled.mean(), rtol=1e-3, atol=1e-3)
    gained = vectors * np.asarray(model.blocks[1].attn_post_norm.weight)
    through_norm = direct_logits(model, "blocks/1/attn/out", vectors)
    np.testing.assert_allclose(through_norm, direct_logits(model, "blocks/0/resid/pre", gained), rtol=1e-5)
    assert direct_logits(model, "blocks/1/attn/z", vectors) is None
    assert neuron_cosines(model, "blocks/1/attn/out", vectors) is None
