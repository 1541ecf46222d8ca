"""Granite: Llama with four multipliers, of embeddings, attention scores, what sublayers add, and (1 over) logits."""

from jaxinterp.models.families.base import ATTENTION_BIAS, HEADS, LLAMA_COPIED, LLAMA_DEFAULTS, Family, factor
from jaxinterp.models.families.fields import activation, flag
from jaxinterp.models.families.rope import ROTARY
from jaxinterp.models.families.tensors import LLAMA_TENSORS

GRANITE = Family(
    architectures=("GraniteForCausalLM", "GraniteModel"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, ROTARY, activation("hidden_act"), ATTENTION_BIAS, flag("mlp_bias", "mlp_bias")),
        factor("embedding_multiplier", "embedding_scale"),
        factor("attention_multiplier", "attention_scale"),
        factor("residual_multiplier", "residual_scale"),
        factor("logits_scaling", "logit_scale", divides=True),
    ),
    defaults={**LLAMA_DEFAULTS, "mlp_bias": False, "embedding_multiplier": 1.0, "attention_multiplier": 1.0}
    | {"residual_multiplier": 1.0, "logits_scaling": 1.0},
    tensors=LLAMA_TENSORS,
)
