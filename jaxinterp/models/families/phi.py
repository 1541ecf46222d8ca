"""Phi-1, 1.5 and 2: parallel blocks with one norm, partly rotated heads, biases everywhere."""

from jaxinterp.models.families.base import ALL_BIASES, BERT_COPIED, HEADS, Family
from jaxinterp.models.families.fields import Rule, activation, flag
from jaxinterp.models.families.rope import ROPE_FIELDS, partial_rotary
from jaxinterp.models.families.tensors import LLAMA_TENSORS, block, linear
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED

PHI = Family(
    architectures=("PhiForCausalLM", "PhiModel"),
    copied={name: ours for name, ours in BERT_COPIED.items() if ours != "tied"},
    rules=(
        *(HEADS, activation("hidden_act"), flag("qk_layernorm", "query_key_norm")),
        Rule((*ROPE_FIELDS, "partial_rotary_factor"), partial_rotary(0.5)),
    ),
    constants=ALL_BIASES
    | {"norm": "layer", "parallel": True, "gated": False, "head_bias": True, "tied": False}
    | {"query_key_norm_kind": "layer", "query_key_norm_bias": True},
    defaults={"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "qk_layernorm": False, "tie_word_embeddings": False},
    required={"auto_map": (None,)},
    no_effect=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    tensors={
        **LLAMA_TENSORS,
        **linear("final_norm", "model.final_layernorm", PLAIN),
        **block(
            {
                "mlp_norm": ("input_layernorm", PLAIN),
                "attn/o_proj": ("self_attn.dense", TRANSPOSED),
                "attn/query_norm": ("self_attn.q_layernorm", PLAIN),
                "attn/key_norm": ("self_attn.k_layernorm", PLAIN),
                "mlp/up_proj": ("mlp.fc1", TRANSPOSED),
                "mlp/down_proj": ("mlp.fc2", TRANSPOSED),
            },
            "model.layers",
        ),
    },
)
