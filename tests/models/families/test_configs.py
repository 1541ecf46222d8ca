"""config.json: every field is copied, computed with, required or known to have no effect; all others are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.configs import ANYWHERE, FAMILIES, NO_EFFECT, REQUIRED, family_config, family_of
from jaxinterp.models.families.tables import PHI3_CODE
from jaxinterp.models.families.wrappers import text_fields
from jaxinterp.models.files.quantised import without_quantisation
from jaxinterp.models.files.weights import leaf_shapes, skeleton
from jaxinterp.models.rotary import RopeScaling
from jaxinterp.models.transformer import TransformerConfig

GOLDENS = Path(__file__).parents[2] / "parity" / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())


def fields_of(name: str) -> dict[str, Any]:
    """Of a model that reads images as well, the fields of its text model; of a quantised one, those of its model."""
    fields, _ = without_quantisation(json.loads((GOLDENS / name / "config.json").read_text()))
    return {field: value for field, value in text_fields(fields, ANYWHERE).items() if field != "architectures" or value}


def config_of(fields: dict[str, Any]) -> TransformerConfig:
    return family_config(family_of(fields), fields)


def as_transformers_4(fields: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 4 wrote it."""
    fields = dict(fields)
    fields["torch_dtype"] = fields.pop("dtype", None)
    rope = dict(fields.pop("rope_parameters", None) or {})
    if "sliding_attention" in rope:
        if fields["model_type"] == "gemma3_text":
            fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            fields["sliding_window_pattern"] = fields.pop("_sliding_window_pattern")
        rope = dict(rope["full_attention"])
    if rope:
        theta, kind, fraction = rope.pop("rope_theta"), rope.pop("rope_type"), rope.pop("partial_rotary_factor", None)
        fields["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
        if fields["model_type"] == "gpt_neox":
            fields |= {"rotary_emb_base": theta, "rotary_pct": fraction}
        else:
            fields |= {"rope_theta": theta} | ({"partial_rotary_factor": fraction} if fraction else {})
    if fields["model_type"] == "gemma":
        fields |= {"hidden_act": "gelu", "hidden_activation": None}
    if fields.get("layer_types") in (
        ["full_attention", "sliding_attention", "sliding_attention"],  # Qwen 2, from max_window_layers on
        ["sliding_attention", "full_attention", "sliding_attention"],  # Gemma 2, every other layer
        [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],  # Gemma 3, five of six
    ):
        del fields["layer_types"]
    return fields


ONLY_IN_5 = (
    "gpt-oss-plain",
    "gemma3-both-scaled",
    *(name for name in NAMES if name.startswith("gemma4")),
    "olmo3-sliding-linear",
    "olmo3-yarn",
)  # each type of layer scaled by itself; Gemma 4


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONLY_IN_5])
def test_both_styles_of_config_mean_the_same(name: str) -> None:
    new, old = fields_of(name), as_transformers_4(fields_of(name))
    assert new.keys() != old.keys()
    assert config_of(old) == config_of(new)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_every_golden_matters_or_is_listed(name: str) -> None:
    """A field that is in the tables changes the configuration, is required, or is listed as without effect."""
    fields = fields_of(name)
    family = family_of(fields)
    for field in fields:
        listed = field in NO_EFFECT or field in family.no_effect or field in {**REQUIRED, **family.required}
        read = field in family.copied or any(field in rule.reads for rule in family.rules)
        assert listed or read, field


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_have_a_tensor_for_every_leaf(family: str) -> None:
    names = [name for name in NAMES if fields_of(name)["model_type"] == family]
    assert len(names) >= 2
    for name in names:
        for leaf in leaf_shapes(config_of(fields_of(name))):
            parts = leaf.split("/")
            template = "/".join(["blocks", "*", *parts[2:]] if parts[0] == "blocks" else parts)
            assert template in FAMILIES[family].table(config_of(fields_of(name)))


def test_llama_defaults_are_those_of_transformers() -> None:
    """The first Llama files say nothing about rotary base, biases, keys or head size."""
    config = config_of(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "max_position_embeddings": 2048,
            "pretraining_tp": 1,
        }
    )
    assert config == TransformerConfig(
        vocab_size=100,
        d_model=64,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=16,
        d_mlp=96,
        context=2048,
        norm_epsilon=1e-6,
        rotary_dimensions=16,
        rotary_base=10_000.0,
        tied=False,
    )


def test_llama3_scaling_is_read() -> None:
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    fields = fields_of("llama") | {"rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": scaling}
    config = config_of(fields)
    assert config.rotary_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert config.rotary_base == 500_000.0


def test_gemma3_layers_have_two_kinds_of_rotary_positions() -> None:
    """With a window: a base of their own, no scaling."""
    config = config_of(fields_of("gemma3-linear"))
    assert (config.rotary_base, config.rotary_scaling) == (1000.0, RopeScaling("linear", 4.0))
    whole, local = (block.attn for block in skeleton(config).blocks)
    assert (whole.window, whole.rotary_base, whole.rotary_scaling) == (None, 1000.0, RopeScaling("linear", 4.0))
    assert (local.window, local.rotary_base, local.rotary_scaling) == (6, 50.0, None)


def test_the_published_config_of_gemma_3_1b_is_read() -> None:
    """As it stands beside google/gemma-3-1b-it."""
    config = config_of(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "initializer_range": 0.02,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.52.4",
            "use_cache": True,
            "vocab_size": 262144,
        }
    )
    assert [layer for layer, window in enumerate(config.windows) if window is None] == [5, 11, 17, 23]
    assert set(config.windows) == {512, None} and config.padding is None and config.head
    assert (config.rotary_base, config.local_rotary_base, config.rotary_scaling) == (1e6, 1e4, None)
    sizes = [np.prod(shape, dtype=np.int64) for shape in leaf_shapes(config).values()]
    assert sum(sizes) == 999_885_952  # as counted by others


def test_gemma3_defaults_are_those_of_transformers() -> None:
    """The text part of the larger models' files says only what differs from these."""
    config = config_of(
        {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 6,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            "vocab_size": 262208,
        }
    )
    assert (config.heads, config.kv_heads, config.head_dim, config.context) == (8, 4, 256, 131_072)
    assert (config.rotary_base, config.local_rotary_base) == (1e6, 1e4)
    assert config.rotary_scaling == RopeScaling("linear", 8.0)
    assert config.windows == (1024,) * 5 + (None,)
    assert (config.attention_scale, config.embedding_scale, config.tied) == (1 / 16, 2560**0.5, True)


def test_the_first_phi3_files_are_read() -> None:
    """They name the code that they came with, which is transformers' own by now."""
    first = {"auto_map": PHI3_CODE, "attention_bias": False, "rope_scaling": None}
    assert config_of(fields_of("phi3") | first) == config_of(fields_of("phi3"))


def test_windows_follow_the_family() -> None:
    assert config_of(fields_of("mistral-window")).windows == (5, 5)
    assert config_of(fields_of("mistral-full")).windows == ()
    assert config_of(fields_of("qwen2")).windows == ()
    assert config_of(fields_of("qwen2-window")).windows == (None, 4, 4)
    assert config_of(fields_of("gemma2")).windows == (4, None, 4)
    assert config_of(fields_of("gemma3")).windows == (4, 4, 4, 4, 4, None, 4)
    assert config_of(fields_of("gemma3") | {"layer_types": None}).windows == (4, 4, 4, 4, 4, None, 4)
    assert config_of(fields_of("phi3")).windows == (5, 5)
    absent = {name: value for name, value in fields_of("mistral-full").items() if name != "sliding_window"}
    assert config_of(absent).windows == (4096, 4096)  # what transformers assumes


LLAMA3_INVERTED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
LOCAL_WRONG = {"sliding_attention": {"rope_type": "ntk", "factor": 2.0}}
SHORT_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"residual_multiplier": 0.2}, r"unknown config field residual_multiplier=0\.2"),
    ("llama", {"layer_types": ["full_attention"] * 2}, r"unknown config field layer_types="),
    ("llama", {"hidden_sise": 16}, r"unknown config field hidden_sise=16.*Did you mean 'hidden_size'"),
    ("llama", {"hidden_size": None}, r"config field hidden_size is missing"),
    ("llama", {"hidden_size": "16"}, r"config field hidden_size='16' should be a positive int"),
    ("llama", {"num_hidden_layers": 0}, r"num_hidden_layers=0 should be a positive int"),
    ("llama", {"rms_norm_eps": True}, r"rms_norm_eps=True should be a positive float"),
    ("llama", {"attention_bias": "no"}, r"attention_bias='no' should be true or false"),
    ("llama", {"num_attention_heads": 3, "head_dim": None}, r"hidden_size=16 is not a multiple"),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, r"heads=4 is not a multiple of kv_heads=3"),
    ("llama", {"hidden_act": "quick_gelu"}, r"hidden_act='quick_gelu' is not supported"),
    ("llama", {"rope_interleaved": True}, r"rope_interleaved=True is not supported"),
    ("qwen2", {"use_mrope": True}, r"use_mrope=True is not supported"),
    ("llama", {"sliding_window_size": 4}, r"unknown config field sliding_window_size=4"),
    ("gemma", {"tie_word_embeddings": None}, r"tie_word_embeddings=None is not supported"),  # null of true: which?
    ("llama", {"quantization_config": {"bits": 4}}, r"quantization_config=.* is not supported"),
    ("llama", {"auto_map": {"AutoModel": "x.y"}}, r"auto_map=.* is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, r"rope_type='ntk' is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": "2"}}, r"factor='2' should be a positive float"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, r"config field factor is missing"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2, "beta_fast": 3}},
        r"rope_parameters\.beta_fast=3",
    ),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, r"short_factor=None should be a list of positive"),
    ("llama", {"rope_parameters": SHORT_LONGROPE}, r"short_factors has 1 numbers for 4 rotated dimensions: give 2"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"config field factor is missing"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "mscale": 2}}, r"rope_parameters\.mscale=2"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, r"rope_parameters\.full_attention"),
    ("llama", {"rope_parameters": LLAMA3_INVERTED}, r"high_freq_factor must exceed"),
    ("llama", {"rope_theta": 5.0}, r"contradict each other: rope_parameters\.rope_theta=10000\.0, rope_theta=5\.0"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_parameters and rope_scaling contradict"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5 is not supported"),
    ("gpt-neox", {"rotary_pct": 0.5}, r"contradict each other: rotary_pct=0\.5"),
    ("gpt-neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, r"rotary_dimensions=3 must be even"),
    ("gpt-neox", {"num_key_value_heads": 2}, r"unknown config field num_key_value_heads=2"),
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": "yes"},
        r"scale_attn_by_inverse_layer_idx='yes' should be true or false",
    ),
    ("gpt2", {"scale_attn_weights": "no"}, r"scale_attn_weights='no' is not supported"),
    ("gpt2", {"add_cross_attention": True}, r"add_cross_attention=True is not supported"),
    ("mistral-window", {"sliding_window": 0}, r"sliding_window=0 should be a positive int"),
    ("qwen2-window", {"layer_types": ["full_attention"]}, r"layer_types=.* one type for each of 3 layers"),
    ("qwen2-window", {"layer_types": ["linear_attention"] * 3}, r"layer_types='linear_attention' is not supported"),
    ("qwen2-window", {"use_sliding_window": False}, r"sliding_window is null or switched off"),
    ("qwen2", {"attention_bias": True}, r"unknown config field attention_bias=True"),
    ("gemma", {"hidden_act": "silu"}, r"hidden_act='silu' is not supported"),
    ("gemma", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True is not supported"),
    ("gemma2", {"final_logit_softcapping": -1.0}, r"final_logit_softcapping=-1\.0 should be a positive float"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0 is not supported; supported: None"),
    ("gemma3", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True is not supported"),
    ("gemma3", {"sliding_window": None}, r"sliding_window is null or switched off"),
    ("gemma3", {"sliding_window_pattern": 5}, r"contradict each other: sliding_window_pattern=5"),
    ("gemma3", {"rope_local_base_freq": 7.0}, r"contradict each other: rope_parameters\.sliding_attention\.rope_theta"),
    ("gemma3", {"rope_parameters": LOCAL_WRONG}, r"rope_parameters\.sliding_attention\.rope_type='ntk' is not supp"),
    ("gemma3", {"mm_tokens_per_image": 256}, r"unknown config field mm_tokens_per_image=256"),
    ("olmo2", {"clip_qkv": 8.0}, r"unknown config field clip_qkv=8\.0"),
    ("olmo2", {"sliding_window": 4}, r"unknown config field sliding_window=4"),
    ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, r"short_factor=None should be a list"),
    ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "ntk"}}, r"rope_type='ntk' is not supported"),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] should have a 1 or 0 for each of 4 layers"),
    ("olmo3", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, r"an object for each type of layer"),
    ("gptj", {"rotary": False}, r"rotary=False is not supported"),
    ("gpt-neo", {"attention_types": [[["global"], 1]]}, r"attention_types=.* global or local for each of 2 layers"),
    ("opt", {"layer_norm_elementwise_affine": False}, r"layer_norm_elementwise_affine=False is not supported"),
    ("granite", {"residual_multiplier": 0}, r"residual_multiplier=0 should be a positive float"),
    ("cohere", {"use_qk_norm": 1}, r"use_qk_norm=1 should be true or false"),
    ("phi3", {"attention_bias": True}, r"attention_bias=True is not supported"),
    ("phi3", {"auto_map": {"AutoConfig": "other.Config"}}, r"auto_map=.* is not supported"),
    ("phi3", {"num_experts": 4}, r"unknown config field num_experts=4"),
    ("bert", {"is_decoder": True}, r"is_decoder=True is not supported; supported: False"),
    ("bert", {"position_embedding_type": "relative_key"}, r"position_embedding_type='relative_key' is not supported"),
    ("bert", {"pad_token_id": -1}, r"pad_token_id=-1 should be a token id or null"),
    ("bert", {"type_vocab_size": 0}, r"type_vocab_size=0 should be a positive int"),
    ("bert", {"embedding_size": 128}, r"unknown config field embedding_size=128"),
    ("bert", {"architectures": ["BertForTokenClassification"]}, r"architectures='BertForTokenClassification' is not"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSALS, ids=[f"{n}-{next(iter(c))}" for n, c, _ in REFUSALS])
def test_refused(name: str, change: dict[str, Any], message: str) -> None:
    config_of(fields_of(name))
    with pytest.raises(UserError, match=message):
        config_of(fields_of(name) | change)


def test_other_families_are_refused() -> None:
    with pytest.raises(UserError, match=r"model_type='gemma5' is not supported; supported: gpt2, gpt_neox.*'gemma"):
        family_of({"model_type": "gemma5"})
    with pytest.raises(UserError, match=r"text_config=None should be an object"):
        family_of({"model_type": "gemma3"})
    with pytest.raises(UserError, match=r"text_config\.model_type='llama' is not supported; supported: 'gemma3_text'"):
        family_of({"model_type": "gemma3", "text_config": {"model_type": "llama"}})
    with pytest.raises(UserError, match=r"unknown config field text_cap=3 beside text_config"):
        family_of({"model_type": "gemma3", "text_config": {}, "text_cap": 3})
    with pytest.raises(UserError, match="model_type=None"):
        family_of({"hidden_size": 4})
    with pytest.raises(UserError, match=r"architectures='LlamaForSequenceClassification' .* LlamaForCausalLM"):
        family_of({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
