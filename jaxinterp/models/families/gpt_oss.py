"""gpt-oss: attention sinks, windows in every other layer, biases everywhere, experts with a clipped gate."""

from jaxtyping import PyTree

from jaxinterp.models.families.base import ATTENTION_BIAS, HEADS, LLAMA_COPIED, LLAMA_DEFAULTS, Family
from jaxinterp.models.families.fields import Fields, Rule, number, windows
from jaxinterp.models.families.mixtures import experts_of
from jaxinterp.models.families.rope import ROPE_FIELDS, whole_rotary
from jaxinterp.models.families.tensors import LLAMA_TENSORS, block
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED, Layout
from jaxinterp.models.mixtures.routed import RoutedConfig

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
YARN |= {"original_max_position_embeddings": 4096}


def _routed(fields: Fields) -> dict[str, PyTree]:
    config = RoutedConfig(
        experts_of(fields, 128),
        number(fields, "num_experts_per_tok"),
        number(fields, "intermediate_size"),
        scores="chosen",
        router_bias=True,
        bias=True,
        limit=number(fields, "swiglu_limit", float),
        alpha=number(fields, "swiglu_alpha", float),
    )
    return {"routed": config, "attention_sinks": True}


GPT_OSS = Family(
    architectures=("GptOssForCausalLM", "GptOssModel"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, ATTENTION_BIAS),
        Rule(
            ROPE_FIELDS,
            lambda fields: whole_rotary(150_000.0)(
                fields
                if fields.get("rope_scaling")
                else {**fields, "rope_parameters": fields["rope_parameters"] or YARN}
            ),
        ),
        Rule(
            ("sliding_window", "layer_types"),
            lambda fields: windows(fields, fields["sliding_window"], lambda layer: layer % 2 == 0),
        ),
        Rule(("num_local_experts", "num_experts", "num_experts_per_tok", "swiglu_limit", "swiglu_alpha"), _routed),
    ),
    defaults={**LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "attention_bias": True, "head_dim": 64, "sliding_window": 128}
    | {"num_key_value_heads": 8, "num_experts_per_tok": 4, "rope_parameters": None}
    | {"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    required={"hidden_act": ("silu",)},
    no_effect=("output_router_logits", "router_aux_loss_coef", "experts_per_token", "initial_context_length"),
    tensors={
        **LLAMA_TENSORS,
        **block({"mlp/router": ("mlp.router", TRANSPOSED)}, "model.layers"),
        "blocks/*/attn/sinks": ("model.layers.*.self_attn.sinks", PLAIN),
        **{
            f"blocks/*/mlp/experts/{ours}_proj/{kind}": (f"model.layers.*.mlp.experts.{theirs}{end}", layout)
            for ours, theirs, layout in (
                ("gate", "gate_up_proj", Layout(order="alternating", part=0, parts=2)),
                ("up", "gate_up_proj", Layout(order="alternating", part=1, parts=2)),
                ("down", "down_proj", PLAIN),
            )
            for kind, end in (("weight", ""), ("bias", "_bias"))
        },
    },
)
