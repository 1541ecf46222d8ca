"""Cohere's Command R: parallel blocks with one LayerNorm, neighbours paired in the rotation, logits times a number."""

from jaxinterp.models.families.base import ATTENTION_BIAS, BERT_COPIED, HEADS, Family, factor
from jaxinterp.models.families.fields import Rule, activation, flag
from jaxinterp.models.families.rope import ROPE_FIELDS, whole_rotary
from jaxinterp.models.families.tensors import LLAMA_TENSORS, block
from jaxinterp.models.files.weights import PLAIN

COHERE = Family(
    architectures=("CohereForCausalLM", "CohereModel"),
    copied=BERT_COPIED,
    rules=(
        *(HEADS, activation("hidden_act"), ATTENTION_BIAS, flag("use_qk_norm", "query_key_norm")),
        Rule(ROPE_FIELDS, whole_rotary(500_000.0)),
        factor("logit_scale", "logit_scale"),
    ),
    constants={"norm": "layer", "parallel": True, "rotary_interleaved": True}
    | {"query_key_norm_kind": "layer", "query_key_norm_over": "each_head"},
    defaults={"hidden_act": "silu", "layer_norm_eps": 1e-5, "attention_bias": False, "use_qk_norm": False}
    | {"tie_word_embeddings": True, "logit_scale": 0.0625},
    tensors={**LLAMA_TENSORS, **block({"mlp_norm": ("input_layernorm", PLAIN)}, "model.layers")},
)
