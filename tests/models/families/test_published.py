"""config.json as published: every model that README names loads; inert fields pass, others are still refused."""

from typing import Any

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.configs import OWN_NULL, family_config, family_of
from jaxinterp.models.families.tables import FAMILIES
from jaxinterp.models.transformer import TransformerConfig
from tests.models.families.published import GEMMA_2_9B, PUBLISHED, QWEN2_5, SMOLLM2


def config_of(fields: dict[str, Any]) -> TransformerConfig:
    return family_config(family_of(fields), fields)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_read(name: str) -> None:
    fields = PUBLISHED[name]
    config = config_of(fields)
    assert config.d_model == fields.get("hidden_size", fields.get("n_embd"))
    assert config.layers == fields.get("num_hidden_layers", fields.get("n_layer"))
    assert config.vocab_size == fields["vocab_size"]
    mirror = PUBLISHED.get(name.removeprefix("unsloth/"), PUBLISHED.get(name.split("/")[-1].replace("-it", "-pt"), {}))
    if name.startswith("unsloth/") and mirror:
        assert config == config_of(mirror), "a mirror is the same model"


def test_every_supported_family_is_among_them() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt2", "gpt_neox",
            "bert"} == {fields["model_type"] for fields in PUBLISHED.values()} <= set(FAMILIES)  # fmt: skip


@pytest.mark.parametrize(
    "inert",
    [
        {"is_llama_config": True, "rope_interleaved": False}, {"use_mrope": False}, {"auto_map": {}},
        {"transformers.js_config": {"dtype": "q4"}}, {"unsloth_fixed": True, "unsloth_anything": [1]},
        {"neftune_noise_alpha": 5}, {"attention_bias": None}, {"mlp_bias": None}, {"hidden_act": None},
        {"rms_norm_eps": None}, {"quantization_config": {}}, {"is_decoder": None}, {"add_cross_attention": None},
        {"clip_qkv": None}, {"resid_pdrop": 0.1}, {"unk_token_id": 0},
    ],
    ids=lambda inert: next(iter(inert)),
)  # fmt: skip
def test_what_changes_nothing_passes(inert: dict[str, Any]) -> None:
    without = {name: value for name, value in SMOLLM2.items() if name not in inert}
    assert config_of(without | inert) == config_of(without)


def test_a_second_name_that_differs_is_told() -> None:
    """transformers reads `sliding_window` alone."""
    with pytest.warns(UserWarning, match="sliding_window_size=2048 is not sliding_window=4096, which is used"):
        assert config_of(GEMMA_2_9B | {"sliding_window_size": 2048}) == config_of(GEMMA_2_9B)


@pytest.mark.parametrize("model_type", sorted({fields["model_type"] for fields in PUBLISHED.values()}))
def test_null_is_the_default_of_a_field_that_has_one(model_type: str) -> None:
    fields = next(fields for fields in PUBLISHED.values() if fields["model_type"] == model_type)
    family = FAMILIES[model_type]
    tried = 0
    for name, default in family.defaults.items():
        if default is not True and name not in OWN_NULL:
            without = {other: value for other, value in fields.items() if other != name}
            assert config_of(without | {name: None}) == config_of(without), name
            tried += 1
    assert tried


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        (SMOLLM2, {"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        (SMOLLM2, {"residual_multiplier": 0.2}, "unknown config field residual_multiplier"),
        (SMOLLM2, {"use_qk_norm": True}, "unknown config field use_qk_norm"),
        (SMOLLM2, {"attention_bias": "no"}, "should be true or false"),
        (QWEN2_5, {"use_mrope": True}, "use_mrope=True is not supported"),
        (GEMMA_2_9B, {"sliding_window": None}, "sliding_window is null or switched off"),
        (SMOLLM2, {"sliding_window_size": 4096}, "unknown config field sliding_window_size"),
        (GEMMA_2_9B, {"auto_map": {"AutoModel": "own.Code"}}, "auto_map=.* is not supported"),
    ],
)
def test_what_changes_the_computation_is_still_refused(fields: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(fields | change)
