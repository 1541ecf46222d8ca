"""The model that was trained here and comes with the package: it is what its recipe says."""

import csv
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.train_language_model import Config, command_of, heldout_loss
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.data.token_files import read_token_file
from jaxinterp.data.windows import windows
from jaxinterp.evaluation.language_loss import language_loss
from jaxinterp.models.files import wheels
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.models.files.wheels import BILINEAR, bilinear_path
from jaxinterp.models.load import load
from jaxinterp.models.sites import replace


@pytest.fixture(scope="module")
def subject():
    return load(BILINEAR, dtype="float32")


@pytest.fixture(scope="module")
def recipe():
    return json.loads((bilinear_path() / "recipe.json").read_text())


def test_it_reproduces_its_stated_loss_on_its_heldout_documents(recipe):
    """Float16 weights, read as float32; float32 sums differ between machines in the fifth digit."""
    found = heldout_loss(bilinear_path())
    stated = recipe["heldout"]
    assert abs(found.pop("ce") - stated["ce"]) < 5e-4
    assert found == {name: value for name, value in stated.items() if name != "ce"}
    assert stated["counted"] > 60_000


def test_every_mlp_matters_to_that_loss(subject, recipe):
    corpus = read_token_file(bilinear_path() / "heldout.npy", subject.tokenizer, max_tokens=2048)
    text = windows(corpus, 256)
    whole = language_loss(subject.model, text)["ce"]
    for layer in range(4):
        without = replace(subject.model, {f"blocks/{layer}/mlp": jnp.zeros_like})
        assert language_loss(without, text)["ce"] > whole + 0.05


def test_it_is_what_its_name_says(subject):
    config = subject.model.config
    assert (config.layers, config.d_model, config.d_mlp, config.vocab_size) == (4, 128, 512, 2048)
    assert config.gated and config.activation == "identity" and subject.name == BILINEAR
    assert subject.tokenizer.vocab_size == 2048 and subject.tokenizer.end == 0
    text = "Return the sum of the squares along the given axis."
    assert subject.tokenizer.decode(subject.tokenizer.encode(text)) == text
    shapes = {name: leaf.shape for name, leaf in named_leaves(subject.model).items()}
    assert {name: leaf.shape for name, leaf in named_leaves(model_shapes(BILINEAR)).items()} == shapes


def test_it_is_small_and_its_weights_are_float16(subject):
    files = {path.name: path.stat().st_size for path in bilinear_path().iterdir()}
    assert set(files) == {
        "heldout.npy", "jaxinterp.json", "loss.csv", "model.safetensors", "recipe.json", "tokenizer.json"
    }  # fmt: skip
    assert files["model.safetensors"] < 3.3e6 and files["heldout.npy"] < 200_000 and sum(files.values()) < 3.8e6
    for leaf in jax.tree.leaves(subject.model):
        assert np.array_equal(leaf, leaf.astype(jnp.float16).astype(jnp.float32))


def test_the_recipe_is_the_command_of_today(recipe, tmp_path):
    """The settings that made it are the experiment's defaults, and the loss curve is that of its steps."""
    config = Config(out=tmp_path)
    assert recipe["command"] == command_of(config) and recipe["settings"]["tokens"] == config.tokens
    rows = list(csv.DictReader((bilinear_path() / "loss.csv").open()))
    assert int(rows[-1]["step"]) == config.tokens // config.batch_size
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    assert len(recipe["corpus"]["content_hash"]) == len(hashlib.sha256().hexdigest())


def test_an_installation_without_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "__file__", str(tmp_path / "wheels.py"))
    with pytest.raises(UserError, match="model 'bilinear-4x128' is missing from this installation"):
        load(BILINEAR)
