"""Gemma 4: layers that share keys, vectors of a token for every layer; files, refusals, generation."""

import json
import math
import shutil
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.attention.attribution import Reading, by_source
from jaxinterp.models.cache import can_cache
from jaxinterp.models.edits import SetTo
from jaxinterp.models.files.subject import Subject, save_subject
from jaxinterp.models.files.wanted import wanted_tensors
from jaxinterp.models.generate import generate
from jaxinterp.models.layers import cut_axes
from jaxinterp.models.load import load
from jaxinterp.models.run import run as one_pass
from jaxinterp.models.sites import sites

GOLDEN = Path(__file__).parents[1] / "parity" / "goldens" / "gemma4"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (1, 6)))


run = eqx.filter_jit(one_pass)  # one program, not one for each operation


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
    text = [3, 1, 4, *generate(subject, [3, 1, 4], max_tokens=2).tokens[0]]
    assert list(run(model, jnp.asarray([text])).logits[0, 2:4].argmax(axis=-1)) == text[3:]


def test_parts_of_sources_need_values_of_the_layers_own(model) -> None:
    reading = Reading(jnp.ones((3, 4, 8)), jnp.zeros(3))
    places = jnp.zeros((1, 2, 1), jnp.int32)
    with pytest.raises(UserError, match="this layer has no v_proj"):
        by_source(reading, model.blocks[4].attn, jnp.ones((1, 2, 16)), jnp.ones((1, 4, 2, 2)), places)


def test_own_form_keeps_everything(model, tmp_path: Path) -> None:
    save_subject(Subject(model, None, "small"), tmp_path / "own")
    again = load(tmp_path / "own", dtype="float32").model
    assert again.config == model.config and eqx.tree_equal(again, model)


WHOLE, LOCAL = "full_attention", "sliding_attention"
PUBLISHED = {
    "vocab_size": 262_144,
    "vocab_size_per_layer_input": 262_144,
    "head_dim": 256,
    "global_head_dim": 512,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "enable_moe_block": False,
    "expert_intermediate_size": None,
    "num_experts": None,
    "rope_parameters": {
        WHOLE: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        LOCAL: {"rope_theta": 1e4, "rope_type": "default"},
    },
}
E2B = {"hidden_size": 1536, "num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 1}
E2B |= {"intermediate_size": 6144, "num_kv_shared_layers": 20, "use_double_wide_mlp": True, "sliding_window": 512}
E2B |= {"layer_types": ([LOCAL] * 4 + [WHOLE]) * 7, "hidden_size_per_layer_input": 256, "attention_k_eq_v": False}
DENSE_31B = {"hidden_size": 5376, "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 16}
DENSE_31B |= {"intermediate_size": 21504, "num_global_key_value_heads": 4, "attention_k_eq_v": True}
DENSE_31B |= {"layer_types": ([LOCAL] * 5 + [WHOLE]) * 10, "hidden_size_per_layer_input": 0, "sliding_window": 1024}
DENSE_31B |= {"use_bidirectional_attention": "vision"}


@pytest.mark.parametrize(("text", "billions"), [(E2B, 4.63), (DENSE_31B, 30.7)], ids=["E2B", "31B"])
def test_published_configurations_ask_for_tensors_of_their_sizes(text: dict[str, object], billions: float) -> None:
    """The 31B's 30.7 billion parameters are all text; E2B's 5.1 are 4.63 and the parts that see and hear."""
    shapes = wanted_tensors(
        {"model_type": "gemma4", "vision_config": {}, "audio_config": None, "vision_soft_tokens_per_image": 280}
        | {"architectures": ["Gemma4ForConditionalGeneration"], "text_config": PUBLISHED | text}
    )
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(billions * 1e9, rel=2e-3)
    if text is DENSE_31B:
        assert shapes["model.layers.5.self_attn.k_proj.weight"] == (4 * 512, 5376)
        assert "model.layers.5.self_attn.v_proj.weight" not in shapes, "of layers without a window"
        assert shapes["model.layers.4.self_attn.v_proj.weight"] == (16 * 256, 5376)
    else:
        assert "model.layers.15.self_attn.k_proj.weight" not in shapes
        assert shapes["model.layers.15.mlp.up_proj.weight"] == (2 * 6144, 1536)


def with_tensors(golden: str, folder: Path, named: dict[str, tuple[int, ...]]) -> Path:
    """A copy of a golden, tensors of noise added to its file."""
    shutil.copytree(GOLDEN.parent / golden, folder)
    whole = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(5)
    added = {name: rng.normal(size=shape).astype(np.float32) for name, shape in named.items()}
    assert not set(added) & set(whole)
    save_file(whole | added, folder / "model.safetensors")
    return folder


def test_keys_of_layers_that_share_are_left_out(model, tmp_path: Path) -> None:
    """Published files keep them; transformers drops them, of these layers alone."""
    unused = {"k_proj.weight": (8, 16), "v_proj.weight": (8, 16), "k_norm.weight": (4,)}
    named = {f"model.layers.3.self_attn.{name}": shape for name, shape in unused.items()}
    folder = with_tensors("gemma4", tmp_path / "m", named)
    assert eqx.tree_equal(load(folder, dtype="float32").model, model)


@pytest.mark.parametrize(
    ("golden", "name"),
    [
        ("gemma4-equal", "model.layers.1.self_attn.v_proj.weight"),  # whose values are its keys
        ("gemma4-equal", "model.layers.2.self_attn.k_proj.weight"),  # of a layer that does not exist
        ("gemma4", "model.layers.0.self_attn.v_proj.bias"),
        ("gemma4", "model.layers.13.self_attn.k_proj.weight"),
    ],
)
def test_keys_and_values_that_would_matter_are_refused(golden: str, name: str, tmp_path: Path) -> None:
    """transformers warns and goes on; the configuration or the file is wrong, and nobody knows which."""
    folder = with_tensors(golden, tmp_path / "m", {name: (8, 16)})
    with pytest.raises(UserError, match=f"unknown tensor '{name}'"):
        load(folder)


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
