"""Gemma 4: layers that share keys, vectors of a token for every layer; files, refusals, generation."""

import json
import shutil
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.cache import can_cache
from jaxinterp.models.edits import SetTo
from jaxinterp.models.files.subject import Subject, save_subject
from jaxinterp.models.generate import generate
from jaxinterp.models.layers import cut_axes
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites

GOLDEN = Path(__file__).parents[1] / "parity" / "goldens" / "gemma4"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (1, 6)))


@pytest.fixture(scope="module")
def model():
    return load(GOLDEN, dtype="float32").model


def test_shared_keys_and_vectors_are_sites_where_they_are(model) -> None:
    """Layers 3 and 4 of 5 take keys of layers 2 (with a window) and 1."""
    names = sites(model)
    assert "blocks/2/attn/k_proj" in names and "blocks/3/attn/k_proj" not in names
    assert "blocks/3/attn/q_proj" in names and "blocks/3/per_layer/in" in names
    clean = run(model, TOKENS)
    assert clean["blocks/1/attn/z"].shape == (1, 6, 4, 8) and clean["blocks/2/attn/z"].shape == (1, 6, 4, 4)
    assert clean["blocks/0/per_layer/in"].shape == (1, 6, 6)
    blank = run(model, TOKENS, edits={"blocks/1/attn/in": SetTo(0.0)})  # keys and values of layers 1 and 4
    np.testing.assert_allclose(blank["blocks/4/attn/z"], 0, atol=1e-6)
    assert float(jnp.abs(blank["blocks/3/attn/z"]).max()) > 1e-2
    without = run(model, TOKENS, edits={"blocks/2/per_layer/in": SetTo(0.0)})
    assert float(jnp.abs(without["blocks/2/per_layer/added"]).max()) < 1e-3
    axes = cut_axes(model)
    assert axes["per_layer/token"] == 0 and axes["blocks/0/per_layer/out_proj/weight"] == 0


def test_padding_before_the_text_is_not_noticed(model) -> None:
    padded = jnp.pad(TOKENS, [(0, 0), (3, 0)], constant_values=7)
    found = run(model, padded, mask=jnp.arange(9)[None] >= 3).logits[:, 3:]
    np.testing.assert_allclose(found, run(model, TOKENS).logits, atol=2e-5)


def test_generation_needs_no_cache_and_says_so(model) -> None:
    subject = Subject(model, None, "tiny")
    assert "share keys" in can_cache(model)
    with pytest.raises(UserError, match="cache=False"):
        generate(subject, [3, 1], max_tokens=2, cache=True)
    tokens = list(generate(subject, [3, 1, 4], max_tokens=2).tokens[0])
    expected = [3, 1, 4]
    for _ in range(2):
        expected.append(int(run(model, jnp.asarray([expected])).logits[0, -1].argmax()))
    assert tokens == expected[3:]


def test_own_form_keeps_everything(model, tmp_path: Path) -> None:
    save_subject(Subject(model, None, "small"), tmp_path / "own")
    again = load(tmp_path / "own", dtype="float32").model
    assert again.config == model.config and eqx.tree_equal(again, model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"enable_moe_block": True}, "enable_moe_block=True"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers=5"),
        ({"num_kv_shared_layers": 4}, "no layer before has keys of their kind"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config"),
        ({"per_layer_config": {"1": {"head_dim": 8}, "4": {"sliding_window": 2}}}, "per_layer_config"),
        ({"attention_k_eq_v": 1}, "attention_k_eq_v=1 should be true or false"),
        ({"rope_parameters": {"rope_type": "default"}}, "an object for each type of layer"),
        ({"hidden_size_per_layer_input": 5}, "has shape"),
        ({"surprise": 1}, "unknown config field surprise"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_other_configurations_are_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=words):
        load(tmp_path / "m")
