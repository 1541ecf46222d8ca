"""The config.json of every model that SAELens's directory has dictionaries of: the fields that its family reads.

Facts of the published files, without what has no effect on the computation. `shrunken` makes a small model of the same
kind of them: what `count` loads, with random weights, to say that a model can be loaded.
"""

from collections.abc import Mapping
from typing import Any

from jaxinterp.core.json_value import Json
from jaxinterp.models.files.shapes import PUBLISHED

Fields = dict[str, Any]


def sizes(d: int, mlp: int, layers: int, heads: int, kv: int, head: int | None = None) -> Fields:
    """The fields that give a model's sizes."""
    found: Fields = {
        "hidden_size": d,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return found | {"num_key_value_heads": kv} | ({} if head is None else {"head_dim": head})


LLAMA3 = PUBLISHED["llama-3.1-8b"]
GEMMA: Fields = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA2 = {
    **GEMMA,
    **{"model_type": "gemma2", "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256},
}
GEMMA3 = {
    **GEMMA,
    **{"model_type": "gemma3_text", "vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512},
    **{"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "query_pre_attn_scalar": 256, "sliding_window_pattern": 6},
}
SEEING: Fields = {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024}
SEEING |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
QWEN3 = {
    **{"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6},
    **{"rope_theta": 1e6, "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    **{"sliding_window": None, "max_window_layers": 28, "tie_word_embeddings": True},
}
QWEN35 = {
    **{"vocab_size": 248320, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    **{"attention_bias": False, "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128},
    **{"linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32},
    **{"full_attention_interval": 4, "tie_word_embeddings": False},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}


def seeing(text: Fields) -> Fields:
    """A text model within a model that reads images as well."""
    return {"model_type": "gemma3", "text_config": text, "vision_config": {}, "mm_tokens_per_image": 256}


def qwen3(d: int, mlp: int, layers: int, heads: int, *, tied: bool = True) -> Fields:
    """Qwen 3 of one size."""
    return QWEN3 | sizes(d, mlp, layers, heads, 8, 128) | {"tie_word_embeddings": tied}


def qwen35(d: int, mlp: int, layers: int, heads: int, kv: int, **more: Any) -> Fields:
    """Qwen 3.5's text model of one size."""
    text = QWEN35 | sizes(d, mlp, layers, heads, kv, 256) | {"model_type": "qwen3_5_text"} | more
    return {"model_type": "qwen3_5", "text_config": text, "vision_config": {}}


MODELS: dict[str, Fields] = {
    "gpt2-small": {
        **{"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
        **{"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    },
    "pythia-70m-deduped": {
        **{"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048},
        **{"num_hidden_layers": 6, "num_attention_heads": 8, "max_position_embeddings": 2048, "rotary_pct": 0.25},
        **{"rotary_emb_base": 10000, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True},
        **{"tie_word_embeddings": False},
    },
    "mistral-7b": {
        **{"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
        **{"rope_theta": 10000.0, "sliding_window": 4096, "hidden_act": "silu", "tie_word_embeddings": False},
        **sizes(4096, 14336, 32, 32, 8),
    },
    "meta-llama/Llama-3.1-8B": LLAMA3,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA3,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": LLAMA3,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3 | {"rope_scaling": None, "max_position_embeddings": 8192},
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA3 | sizes(8192, 28672, 80, 64, 8),
    "Qwen/Qwen2.5-7B-Instruct": {
        **{"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
        **{"rope_theta": 1e6, "hidden_act": "silu", "use_sliding_window": False, "sliding_window": 131072},
        **{"max_window_layers": 28, "tie_word_embeddings": False},
        **sizes(3584, 18944, 28, 28, 4),
    },
    "gemma-2b": GEMMA
    | {"model_type": "gemma", "vocab_size": 256000, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh"}
    | sizes(2048, 16384, 18, 8, 1, 256),
    "gemma-2-2b": GEMMA2 | sizes(2304, 9216, 26, 8, 4, 256),
    "gemma-2-9b": GEMMA2 | sizes(3584, 14336, 42, 16, 8, 256),
    "gemma-2-27b": GEMMA2 | sizes(4608, 36864, 46, 32, 16, 128) | {"query_pre_attn_scalar": 144},
    "google/gemma-3-270m": GEMMA3 | sizes(640, 2048, 18, 4, 1, 256),
    "google/gemma-3-1b-pt": GEMMA3 | sizes(1152, 6912, 26, 4, 1, 256),
    "google/gemma-3-4b-pt": seeing(GEMMA3 | SEEING | sizes(2560, 10240, 34, 8, 4, 256)),
    "google/gemma-3-12b-pt": seeing(GEMMA3 | SEEING | sizes(3840, 15360, 48, 16, 8, 256)),
    "google/gemma-3-27b-pt": seeing(
        GEMMA3 | SEEING | sizes(5376, 21504, 62, 32, 16, 128) | {"query_pre_attn_scalar": 168}
    ),
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16),
    "qwen3-4b": qwen3(2560, 9728, 36, 32),
    "qwen3-8b": qwen3(4096, 12288, 36, 32, tied=False),
    "qwen3-14b": qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-30B-A3B-Base": {
        **QWEN3,
        **sizes(2048, 6144, 48, 32, 4, 128),
        **{"model_type": "qwen3_moe", "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8},
        **{"moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        **{"max_window_layers": 48},
    },
    "openai/gpt-oss-20b": {
        **sizes(2880, 2880, 24, 64, 8, 64),
        **{"model_type": "gpt_oss", "vocab_size": 201088, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
        **{"num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "attention_bias": True},
        **{"hidden_act": "silu", "swiglu_limit": 7.0, "tie_word_embeddings": False, "rope_theta": 150000.0},
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
    },
    "Qwen/Qwen3.5-2B-Base": qwen35(2048, 6144, 24, 8, 2, tie_word_embeddings=True, linear_num_value_heads=16),
    "Qwen/Qwen3.5-9B-Base": qwen35(4096, 12288, 32, 16, 4),
    "Qwen/Qwen3.5-27B": qwen35(5120, 17408, 64, 24, 4, linear_num_value_heads=48),
    "Qwen/Qwen3.5-35B-A3B-Base": {
        "model_type": "qwen3_5_moe",
        "vision_config": {},
        "text_config": {
            **QWEN35,
            **sizes(2048, 512, 40, 16, 2, 256),
            **{"model_type": "qwen3_5_moe_text", "num_experts": 256, "num_experts_per_tok": 8},
            **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
        },
    },
}
"""By SAELens's name of the model; SAME has more names."""

SAME = {
    **{"gemma-2b-it": "gemma-2b", "gemma-2-9b-it": "gemma-2-9b", "google/gemma-3-270m-it": "google/gemma-3-270m"},
    **{f"google/gemma-3-{size}-it": f"google/gemma-3-{size}-pt" for size in ("1b", "4b", "12b", "27b")},
    **{"Qwen/Qwen3-1.7B-Base": "qwen3-1.7b", "Qwen/Qwen3-8B-Base": "qwen3-8b"},
}
"""Models whose configuration is that of another one."""

SMALL: Fields = {
    **{"hidden_size": 32, "n_embd": 32, "intermediate_size": 24, "num_attention_heads": 4, "n_head": 4, "head_dim": 8},
    **{"vocab_size": 48, "max_position_embeddings": 64, "n_positions": 64, "sliding_window": 4, "num_experts": 4},
    **{"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "linear_num_key_heads": 2},
    **{"shared_expert_intermediate_size": 8, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "original_max_position_embeddings": 16, "n_layer": 2},
}
"""What large sizes become."""

LAYERS = 8
"""Layers of a shrunken model: a whole period of windows and kinds of attention."""


def shrunken(fields: Mapping[str, Json]) -> Fields:
    """The same kind of model, small: sizes alone change, and the number of layers."""
    small: Fields = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            small[name] = shrunken(value)
        elif name in SMALL and value is not None:
            small[name] = SMALL[name]
        elif name == "num_key_value_heads":
            small[name] = max(1, 4 * value // fields["num_attention_heads"])
        elif name == "num_hidden_layers":
            small[name] = min(LAYERS, value)
        elif name == "layer_types":
            small[name] = list(value[:LAYERS])
        elif name in ("max_window_layers", "mlp_only_layers"):
            small[name] = min(LAYERS, value) if isinstance(value, int) else value
        else:
            small[name] = value
    return small
