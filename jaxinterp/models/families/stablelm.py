"""StableLM: Llama with LayerNorm and partly rotated heads; some are parallel, some norm each head by itself."""

from jaxinterp.models.families.base import BERT_COPIED, HEADS, Family
from jaxinterp.models.families.fields import Rule, activation, flag
from jaxinterp.models.families.rope import ROPE_FIELDS, partial_rotary
from jaxinterp.models.families.tensors import LLAMA_TENSORS, block
from jaxinterp.models.files.weights import PLAIN

STABLELM = Family(
    architectures=("StableLmForCausalLM", "StableLmModel"),
    copied=BERT_COPIED,
    rules=(
        *(HEADS, activation("hidden_act"), flag("use_qkv_bias", "qkv_bias"), flag("qk_layernorm", "query_key_norm")),
        Rule((*ROPE_FIELDS, "partial_rotary_factor"), partial_rotary(0.25)),
        flag("use_parallel_residual", "parallel"),
    ),
    constants={"norm": "layer", "norm_bias": True, "query_key_norm_kind": "layer", "query_key_norm_over": "each_head"},
    defaults={"hidden_act": "silu", "layer_norm_eps": 1e-5, "use_qkv_bias": False, "qk_layernorm": False}
    | {"use_parallel_residual": False, "tie_word_embeddings": False, "num_key_value_heads": 32},
    tensors={
        **LLAMA_TENSORS,
        **block(
            {
                "attn/query_norm": ("self_attn.q_layernorm.norms.#", PLAIN),
                "attn/key_norm": ("self_attn.k_layernorm.norms.#", PLAIN),
            },
            "model.layers",
        ),
    },
    parallel_tensors=block({"mlp_norm": ("input_layernorm", PLAIN)}, "model.layers"),
)
