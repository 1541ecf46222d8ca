"""Configurations of the goldens of later families: name -> (class, configuration, size above which files are split).

Each family has at least three that are unlike in what they switch on. Sizes are as small as the fields allow. Their
weights are stored in bfloat16 and computed with in float32.
"""

from typing import Any

VOCAB = 48
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.02, "pad_token_id": None}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = COMMON | SIZES
GPT = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
NEO = {"vocab_size": VOCAB, "max_position_embeddings": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 4}
OPT = {"vocab_size": VOCAB, "max_position_embeddings": 24, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24}
OPT |= {"num_attention_heads": 4, "pad_token_id": 1}


def rope(theta: float = 1000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def rope_by_type(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "full_attention": rope(**full)["rope_parameters"],
            "sliding_attention": rope(**sliding)["rope_parameters"],
        }
    }


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
YARN_SCALES = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
YARN_SCALES |= {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 2.0, "beta_slow": 0.2}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}

Golden = tuple[str, dict[str, Any], str | None]

ROPE: dict[str, Golden] = {
    "llama-yarn": ("LlamaForCausalLM", LLAMA | rope(100.0, **YARN) | {"head_dim": 8}, None),
    "llama-yarn-mscale": (
        "LlamaForCausalLM",
        LLAMA | rope(50.0, **YARN_SCALES) | {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        None,
    ),
    "mistral-yarn-factor": (
        "MistralForCausalLM",
        LLAMA | rope(500.0, **YARN, attention_factor=0.8) | {"sliding_window": None, "num_key_value_heads": 2},
        None,
    ),
    "llama-dynamic": (
        "LlamaForCausalLM",
        LLAMA | rope(100.0, rope_type="dynamic", factor=3.0) | {"max_position_embeddings": 8, "head_dim": 8},
        None,
    ),
    "qwen2-dynamic-short": (  # the text is shorter than the context: not scaled
        "Qwen2ForCausalLM",
        LLAMA | rope(100.0, rope_type="dynamic", factor=3.0) | {"num_key_value_heads": 2, "hidden_act": "gelu"},
        None,
    ),
    "qwen3-yarn": ("Qwen3ForCausalLM", LLAMA | rope(100.0, **YARN) | {"num_key_value_heads": 2, "head_dim": 8}, None),
    "llama-longrope": (
        "LlamaForCausalLM",
        LLAMA | rope(100.0, **LONG, original_max_position_embeddings=8, factor=4.0),
        None,
    ),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        LLAMA
        | rope(100.0, **LONG)
        | {"num_key_value_heads": 2, "original_max_position_embeddings": 16, "max_position_embeddings": 64},
        None,
    ),
    "gemma-tanh": (
        "GemmaForCausalLM",
        LLAMA | rope(300.0, rope_type="linear", factor=2.0) | {"num_key_value_heads": 2, "head_dim": 8},
        None,
    ),
    "gemma2-yarn": (
        "Gemma2ForCausalLM",
        LLAMA | rope(300.0, **YARN) | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3},
        None,
    ),
    "gemma3-both-scaled": (
        "Gemma3ForCausalLM",
        LLAMA
        | rope_by_type({"theta": 1000.0, **YARN}, {"theta": 50.0, "rope_type": "linear", "factor": 2.0})
        | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
        None,
    ),
    "olmo2-llama3": (
        "Olmo2ForCausalLM",
        LLAMA
        | rope(
            1000.0,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=24,
        )
        | {"num_key_value_heads": 2},
        None,
    ),
    "bert-wide": (
        "BertModel",
        COMMON | SIZES | {"hidden_act": "silu", "pad_token_id": 0, "intermediate_size": 40, "type_vocab_size": 1},
        None,
    ),
    "gpt2-replica": (
        "GPT2LMHeadModel",
        GPT | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3},
        None,
    ),
    "gpt2-unscaled": (
        "GPT2LMHeadModel",
        GPT | {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        None,
    ),
}

WRAPPED = {"vision_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 14}}
WRAPPED["vision_config"] |= {"num_attention_heads": 2, "patch_size": 14}
GEMMA3 = {key: value for key, value in LLAMA.items() if key != "initializer_range"}

DENSE: dict[str, Golden] = {
    "gemma3-wrapped": (
        "Gemma3ForConditionalGeneration",
        WRAPPED
        | {"text_config": GEMMA3 | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}}
        | {"mm_tokens_per_image": 1, "boi_token_index": 40, "eoi_token_index": 41, "image_token_index": 42},
        None,
    ),
    "gemma3-wrapped-scaled": (
        "Gemma3ForConditionalGeneration",
        WRAPPED
        | {
            "text_config": GEMMA3
            | rope_by_type({"theta": 1000.0, "rope_type": "linear", "factor": 8.0}, {"theta": 20.0})
            | {"num_key_value_heads": 4, "head_dim": 6, "sliding_window": 3, "query_pre_attn_scalar": 7}
            | {"layer_types": ["full_attention", "sliding_attention"], "tie_word_embeddings": False}
        }
        | {"mm_tokens_per_image": 1, "boi_token_index": 40, "eoi_token_index": 41, "image_token_index": 42}
        | {"tie_word_embeddings": False},
        None,
    ),
    "gemma3-wrapped-capped": (
        "Gemma3ForConditionalGeneration",
        WRAPPED
        | {
            "text_config": GEMMA3
            | {"num_key_value_heads": 1, "head_dim": 4, "sliding_window": 6, "final_logit_softcapping": 4.0}
            | {"layer_types": ["full_attention", "sliding_attention"], "attention_bias": True, "rms_norm_eps": 0.05}
        }
        | {"mm_tokens_per_image": 1, "boi_token_index": 40, "eoi_token_index": 41, "image_token_index": 42},
        None,
    ),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | {"num_hidden_layers": 4, "num_key_value_heads": 2}, None),
    "smollm3-window": (
        "SmolLM3ForCausalLM",
        LLAMA
        | rope(100.0)
        | {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [0, 1], "num_key_value_heads": 4}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        None,
    ),
    "smollm3-yarn": (
        "SmolLM3ForCausalLM",
        LLAMA
        | rope(100.0, **YARN)
        | {"no_rope_layer_interval": 2, "num_key_value_heads": 1, "hidden_act": "relu"}
        | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        None,
    ),
    "olmo3": (
        "Olmo3ForCausalLM",
        LLAMA | {"num_hidden_layers": 4, "num_key_value_heads": 2, "sliding_window": 5},
        None,
    ),
    "olmo3-yarn": (
        "Olmo3ForCausalLM",
        LLAMA
        | rope_by_type({"theta": 300.0, **YARN, "attention_factor": 1.2}, {"theta": 100.0})
        | {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"], "attention_bias": True},
        None,
    ),
    "olmo3-sliding-linear": (
        "Olmo3ForCausalLM",
        LLAMA
        | rope_by_type({"theta": 30.0}, {"theta": 100.0, "rope_type": "linear", "factor": 3.0})
        | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"], "rms_norm_eps": 0.05}
        | {"tie_word_embeddings": True, "num_key_value_heads": 1},
        None,
    ),
    "gptj": ("GPTJForCausalLM", GPT | {"rotary_dim": 4, "n_head": 2}, None),
    "gptj-whole": (
        "GPTJForCausalLM",
        GPT | {"rotary_dim": 4, "n_inner": 20, "activation_function": "gelu", "layer_norm_epsilon": 0.05},
        None,
    ),
    "gptj-tied": ("GPTJForCausalLM", GPT | {"rotary_dim": 6, "n_head": 2, "tie_word_embeddings": True}, None),
    "gpt-neo": ("GPTNeoForCausalLM", NEO | {"attention_types": [[["global", "local"], 1]], "window_size": 5}, None),
    "gpt-neo-local": (
        "GPTNeoForCausalLM",
        NEO
        | {"attention_types": [[["local"], 1], [["global"], 1], [["local"], 1]], "window_size": 3, "num_layers": 3}
        | {"intermediate_size": 20, "activation_function": "relu", "layer_norm_epsilon": 0.05},
        None,
    ),
    "gpt-neo-untied": (
        "GPTNeoForCausalLM",
        NEO | {"attention_types": [[["global"], 2]], "num_heads": 2, "tie_word_embeddings": False},
        None,
    ),
    "opt": ("OPTForCausalLM", OPT, None),
    "opt-350m": ("OPTForCausalLM", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 8}, None),
    "opt-bare": (
        "OPTForCausalLM",
        OPT
        | {"enable_bias": False, "_remove_final_layer_norm": True, "activation_function": "gelu"}
        | {"word_embed_proj_dim": 12, "tie_word_embeddings": False},
        None,
    ),
    "phi": ("PhiForCausalLM", LLAMA | rope(10_000.0, partial_rotary_factor=0.5), None),
    "phi-normed": (
        "PhiForCausalLM",
        LLAMA
        | rope(100.0, partial_rotary_factor=1.0, rope_type="linear", factor=2.0)
        | {"qk_layernorm": True, "num_key_value_heads": 2, "layer_norm_eps": 0.05, "hidden_act": "relu"},
        None,
    ),
    "phi-tied": (
        "PhiForCausalLM",
        LLAMA | rope(50.0, partial_rotary_factor=0.25) | {"num_attention_heads": 2, "tie_word_embeddings": True},
        None,
    ),
    "granite": (
        "GraniteForCausalLM",
        LLAMA
        | rope(10_000.0)
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 4.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
        },
        None,
    ),
    "granite-plain": ("GraniteForCausalLM", LLAMA | rope(100.0) | {"num_key_value_heads": 2}, None),
    "granite-bias": (
        "GraniteForCausalLM",
        LLAMA
        | rope(100.0, **YARN)
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "residual_multiplier": 2.0}
        | {"attention_multiplier": 0.7, "num_key_value_heads": 1},
        None,
    ),
    "cohere": ("CohereForCausalLM", LLAMA | {"num_key_value_heads": 2, "logit_scale": 0.5}, None),
    "cohere-normed": (
        "CohereForCausalLM",
        LLAMA
        | rope(100.0)
        | {"use_qk_norm": True, "num_key_value_heads": 2, "attention_bias": True, "layer_norm_eps": 0.05},
        None,
    ),
    "cohere-untied": (
        "CohereForCausalLM",
        LLAMA
        | rope(50.0, rope_type="dynamic", factor=2.0)
        | {"max_position_embeddings": 8, "tie_word_embeddings": False, "logit_scale": 2.0, "hidden_act": "gelu"},
        None,
    ),
    "stablelm": (
        "StableLmForCausalLM",
        LLAMA | rope(10_000.0, partial_rotary_factor=0.5) | {"num_key_value_heads": 4},
        None,
    ),
    "stablelm-parallel": (
        "StableLmForCausalLM",
        LLAMA
        | rope(100.0, partial_rotary_factor=1.0)
        | {"use_parallel_residual": True, "qk_layernorm": True, "num_key_value_heads": 2, "layer_norm_eps": 0.05},
        None,
    ),
    "stablelm-bias": (
        "StableLmForCausalLM",
        LLAMA
        | rope(100.0, partial_rotary_factor=0.25)
        | {"use_qkv_bias": True, "num_key_value_heads": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
        | {"hidden_act": "relu"},
        None,
    ),
}

MOE = LLAMA | {"num_key_value_heads": 2, "intermediate_size": 12}
QWEN_MOE = MOE | {"moe_intermediate_size": 8, "num_experts": 6, "num_experts_per_tok": 2}
OSS = MOE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
LLAMA4 = MOE | {"intermediate_size_mlp": 20, "num_local_experts": 4, "head_dim": 8}
TINY_SIGHT = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
TINY_SIGHT |= {"num_attention_heads": 2, "vision_output_dim": 8, "projector_input_dim": 8, "projector_output_dim": 8}

MIXTURES: dict[str, Golden] = {
    "mixtral": ("MixtralForCausalLM", MOE | rope(10_000.0) | {"num_local_experts": 4}, None),
    "mixtral-window": (
        "MixtralForCausalLM",
        MOE | rope(100.0) | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5, "head_dim": 8},
        None,
    ),
    "mixtral-tied": (
        "MixtralForCausalLM",
        MOE
        | rope(300.0, **YARN)
        | {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "head_dim": 4,
        },
        None,
    ),
    "olmoe": ("OlmoeForCausalLM", MOE | rope() | {"num_experts": 5, "num_experts_per_tok": 2}, None),
    "olmoe-clipped": (
        "OlmoeForCausalLM",
        MOE
        | rope()
        | {"num_experts": 4, "num_experts_per_tok": 3, "clip_qkv": 0.6, "norm_topk_prob": True, "attention_bias": True},
        None,
    ),
    "olmoe-all": (
        "OlmoeForCausalLM",
        MOE | rope(50.0) | {"num_experts": 3, "num_experts_per_tok": 3, "num_key_value_heads": 1, "rms_norm_eps": 0.05},
        None,
    ),
    "qwen2-moe": ("Qwen2MoeForCausalLM", QWEN_MOE | rope() | {"shared_expert_intermediate_size": 10}, None),
    "qwen2-moe-window": (
        "Qwen2MoeForCausalLM",
        QWEN_MOE
        | rope()
        | {"shared_expert_intermediate_size": 6, "norm_topk_prob": True, "qkv_bias": False, "num_hidden_layers": 3}
        | {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
        None,
    ),
    "qwen2-moe-sparse": (
        "Qwen2MoeForCausalLM",
        QWEN_MOE
        | rope()
        | {"shared_expert_intermediate_size": 10, "decoder_sparse_step": 2, "tie_word_embeddings": True}
        | {"num_experts_per_tok": 1, "hidden_act": "relu"},
        None,
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", QWEN_MOE | rope() | {"head_dim": 8, "norm_topk_prob": True}, None),
    "qwen3-moe-dense": (
        "Qwen3MoeForCausalLM",
        QWEN_MOE
        | rope(100.0, **YARN)
        | {"head_dim": 8, "num_hidden_layers": 3, "mlp_only_layers": [0], "decoder_sparse_step": 2}
        | {"attention_bias": True, "num_experts_per_tok": 3},
        None,
    ),
    "qwen3-moe-window": (
        "Qwen3MoeForCausalLM",
        QWEN_MOE
        | rope()
        | {"head_dim": 4, "use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": True},
        None,
    ),
    "gpt-oss": ("GptOssForCausalLM", OSS | {"sliding_window": 5}, None),
    "gpt-oss-clipped": (
        "GptOssForCausalLM",
        OSS
        | rope(500.0, **YARN, truncate=False)
        | {"swiglu_limit": 0.7, "swiglu_alpha": 1.1, "sliding_window": 3, "num_experts_per_tok": 1}
        | {"layer_types": ["full_attention", "sliding_attention"], "tie_word_embeddings": True},
        None,
    ),
    "gpt-oss-plain": (
        "GptOssForCausalLM",
        OSS | rope(100.0) | {"attention_bias": False, "num_experts_per_tok": 4, "num_key_value_heads": 4},
        None,
    ),
    "llama4": ("Llama4ForCausalLM", LLAMA4 | rope() | {"num_hidden_layers": 4, "attention_chunk_size": 5}, None),
    "llama4-dense": (
        "Llama4ForCausalLM",
        LLAMA4
        | rope(100.0)
        | {"interleave_moe_layer_step": 2, "num_experts_per_tok": 2, "no_rope_layers": [0, 1], "floor_scale": 3}
        | {"attn_scale": 0.7, "attention_bias": True, "use_qk_norm": False},
        None,
    ),
    "llama4-chunked": (
        "Llama4ForCausalLM",
        LLAMA4
        | rope(50.0, rope_type="linear", factor=2.0)
        | {"attention_chunk_size": 4, "moe_layers": [0], "no_rope_layers": [1, 0], "attn_temperature_tuning": False}
        | {"layer_types": ["full_attention", "chunked_attention"], "tie_word_embeddings": True},
        None,
    ),
}
PACKED = "gpt-oss-mxfp4"
"""Its experts are stored as gpt-oss's are: blocks of 32 numbers of 4 bits, with a scale each."""
MIXTURES[PACKED] = (
    "GptOssForCausalLM",
    OSS | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 2},
    None,
)
SIGHT = {"boi_token_index": 40, "eoi_token_index": 41, "image_token_index": 42, "vision_config": TINY_SIGHT}
for wrapped in ("llama4", "llama4-dense", "llama4-chunked"):
    TEXT = {key: value for key, value in MIXTURES[wrapped][1].items() if key != "initializer_range"}
    TIED = {"tie_word_embeddings": TEXT.get("tie_word_embeddings", False)}
    MIXTURES[f"{wrapped}-wrapped"] = ("Llama4ForConditionalGeneration", SIGHT | {"text_config": TEXT} | TIED, None)

DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 6}
QWEN35 = LLAMA | DELTA | {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4}
QWEN35_MOE = QWEN35 | {"moe_intermediate_size": 8, "num_experts": 5, "num_experts_per_tok": 2}
QWEN35_MOE |= {"shared_expert_intermediate_size": 6}
LINEAR, WHOLE = "linear_attention", "full_attention"

HYBRIDS: dict[str, Golden] = {
    "qwen3.5": ("Qwen3_5ForCausalLM", QWEN35 | rope(1000.0, partial_rotary_factor=0.5), None),
    "qwen3.5-grouped": (
        "Qwen3_5ForCausalLM",
        QWEN35
        | rope(100.0, partial_rotary_factor=1.0, mrope_section=[2, 1, 1], mrope_interleaved=True)
        | {"layer_types": [WHOLE, LINEAR, LINEAR], "num_hidden_layers": 3, "linear_num_key_heads": 1}
        | {"linear_conv_kernel_dim": 2, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.05},
        None,
    ),
    "qwen3.5-gelu": (
        "Qwen3_5ForCausalLM",
        QWEN35
        | rope(50.0, **YARN)
        | {"layer_types": [LINEAR, WHOLE], "num_hidden_layers": 2, "linear_num_key_heads": 4, "hidden_act": "gelu"}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 4, "num_key_value_heads": 4, "linear_conv_kernel_dim": 5},
        None,
    ),
    "qwen3.5-moe": ("Qwen3_5MoeForCausalLM", QWEN35_MOE | rope(1000.0, partial_rotary_factor=0.5), None),
    "qwen3.5-moe-one": (
        "Qwen3_5MoeForCausalLM",
        QWEN35_MOE
        | rope(100.0)
        | {"layer_types": [LINEAR, WHOLE], "num_hidden_layers": 2, "num_experts_per_tok": 1, "attention_bias": True}
        | {"tie_word_embeddings": True, "linear_num_key_heads": 4},
        None,
    ),
    "qwen3.5-moe-all": (
        "Qwen3_5MoeForCausalLM",
        QWEN35_MOE
        | rope(300.0, partial_rotary_factor=1.0)
        | {"layer_types": [WHOLE, LINEAR], "num_hidden_layers": 2, "num_experts_per_tok": 5, "hidden_act": "relu"}
        | {"linear_conv_kernel_dim": 3, "rms_norm_eps": 0.05},
        None,
    ),
}
SEEN = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}
SEEN |= {
    "vision_config": {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 4}
    | {"out_hidden_size": 16, "num_position_embeddings": 4, "temporal_patch_size": 1}
}
for wrapped in list(HYBRIDS):
    TEXT = {key: value for key, value in HYBRIDS[wrapped][1].items() if key != "initializer_range"}
    TIED = {"tie_word_embeddings": TEXT.get("tie_word_embeddings", False)}
    KIND = HYBRIDS[wrapped][0].replace("CausalLM", "ConditionalGeneration")
    HYBRIDS[f"{wrapped}-wrapped"] = (KIND, SEEN | {"text_config": TEXT} | TIED, None)

GEMMA4 = LLAMA | {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4, "global_head_dim": 8}
GEMMA4 |= {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": VOCAB, "tie_word_embeddings": True}
LOCAL = "sliding_attention"
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.5}
SHARING: dict[str, Golden] = {
    "gemma4": (
        "Gemma4ForCausalLM",
        GEMMA4
        | rope_by_type({"theta": 1000.0, **PROPORTIONAL}, {"theta": 100.0})
        | {"num_hidden_layers": 5, "layer_types": [LOCAL, WHOLE, LOCAL, LOCAL, WHOLE]}
        | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 9.0}
        | {"rms_norm_eps": 0.03},  # with less, one token of 24 is ill-conditioned
        None,
    ),
    "gemma4-equal": (
        "Gemma4ForCausalLM",
        GEMMA4
        | rope_by_type(
            {"theta": 300.0, **PROPORTIONAL, "factor": 3.0}, {"theta": 50.0, "rope_type": "linear", "factor": 2.0}
        )
        | {"layer_types": [LOCAL, WHOLE], "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {
            "hidden_size_per_layer_input": 0,
            "rms_norm_eps": 0.05,
            "hidden_activation": "gelu",
            "num_key_value_heads": 4,
        },
        None,
    ),
    "gemma4-plain": (
        "Gemma4ForCausalLM",
        GEMMA4
        | {"num_hidden_layers": 3, "layer_types": [WHOLE, LOCAL, WHOLE], "global_head_dim": 4}
        | {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 1, "num_kv_shared_layers": 1},
        None,
    ),
}
for wrapped in list(SHARING):
    TEXT = {key: value for key, value in SHARING[wrapped][1].items() if key != "initializer_range"} | {
        "pad_token_id": 0
    }
    TIED = {"tie_word_embeddings": TEXT["tie_word_embeddings"], "image_token_id": 40, "audio_token_id": 41}
    TIED |= {"video_token_id": 42, "vision_config": None, "audio_config": None}
    SHARING[f"{wrapped}-wrapped"] = ("Gemma4ForConditionalGeneration", {"text_config": TEXT} | TIED, None)
# One has parts that see and hear, whose tensors are left out.
SHARING["gemma4-wrapped"][1].update(
    vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "head_dim": 4, "patch_size": 2, "position_embedding_size": 4, "standardize": True},
    audio_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 8}
    | {"subsampling_conv_channels": [4, 2]},
)

LATER = ROPE | DENSE | MIXTURES | HYBRIDS | SHARING
