"""Llama 4's text model: attention in chunks, layers without rotary positions, a shared and one routed expert."""

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.attention import Temperature
from jaxinterp.models.families.base import ATTENTION_BIAS, HEADS, LLAMA_COPIED, LLAMA_DEFAULTS, Family
from jaxinterp.models.families.fields import (
    ACTIVATION_NAMES,
    Fields,
    Rule,
    activation,
    flag,
    layers_of,
    number,
    refused,
)
from jaxinterp.models.families.rope import ROPE_FIELDS, whole_rotary
from jaxinterp.models.families.smollm3 import UNROTATED_FIELDS, unrotated
from jaxinterp.models.families.tensors import LLAMA_TENSORS, block, stacked
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED
from jaxinterp.models.mixtures.routed import RoutedConfig


def _layers(fields: Fields) -> dict[str, PyTree]:
    """Which layers are rotated, which attend within chunks, and how queries grow in those that are not rotated."""
    count = number(fields, "num_hidden_layers")
    without = unrotated({**fields, "no_rope_layers": fields.get("no_rope_layers") or None})["unrotated"]
    size = None if fields["attention_chunk_size"] is None else number(fields, "attention_chunk_size")
    types = fields.get("layer_types")
    if types is None:
        chunked = [layer not in without and size is not None for layer in range(count)]
        types = ["chunked_attention" if each else "full_attention" for each in chunked]
    if not isinstance(types, list) or len(types) != count:
        raise UserError(f"config field layer_types={types!r} should name one type for each of {count} layers.")
    for kind in types:
        if kind != "full_attention" and (kind != "chunked_attention" or size is None):
            raise refused("layer_types", kind, "full_attention, and with attention_chunk_size chunked_attention")
    chunks = tuple(size if kind == "chunked_attention" else None for kind in types)
    warm = Temperature(number(fields, "floor_scale"), number(fields, "attn_scale", float))
    tuned = warm if fields["attn_temperature_tuning"] else None
    return {"unrotated": without, "chunks": chunks if any(chunks) else (), "temperature": tuned}


def _routed(fields: Fields) -> dict[str, PyTree]:
    count, hidden = number(fields, "num_hidden_layers"), number(fields, "intermediate_size")
    step = number(fields, "interleave_moe_layer_step")
    routed = tuple(range(step - 1, count, step))
    if fields.get("moe_layers") is not None:
        routed = layers_of(fields, "moe_layers", count)
    active = number(fields, "num_experts_per_tok")
    kind = ACTIVATION_NAMES[str(fields["hidden_act"])]
    config = RoutedConfig(
        number(fields, "num_local_experts"), active, hidden, "sigmoid", shared=hidden, activation=kind
    )
    dense = tuple(layer for layer in range(count) if layer not in routed)
    return {"routed": config, "dense_layers": dense, "d_mlp": number(fields, "intermediate_size_mlp")}


LLAMA4 = Family(
    architectures=("Llama4ForCausalLM", "Llama4TextModel"),
    copied={name: ours for name, ours in LLAMA_COPIED.items() if ours != "d_mlp"},
    rules=(
        *(HEADS, activation("hidden_act"), ATTENTION_BIAS, flag("use_qk_norm", "unit_query_key")),
        Rule(ROPE_FIELDS, whole_rotary(500_000.0)),
        Rule((*UNROTATED_FIELDS, "layer_types", "attention_chunk_size"), _layers),
        Rule(("attn_temperature_tuning", "floor_scale", "attn_scale"), lambda fields: {}),  # read by _layers
        Rule(("num_local_experts", "num_experts_per_tok", "intermediate_size", "intermediate_size_mlp"), _routed),
        Rule(("moe_layers", "interleave_moe_layer_step"), lambda fields: {}),  # read by _routed
    ),
    constants={"rotary_interleaved": True},
    defaults={**LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128, "use_qk_norm": True}
    | {"no_rope_layer_interval": 4, "attention_chunk_size": 8192, "attn_temperature_tuning": True, "attn_scale": 0.1}
    | {"floor_scale": 8192, "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    | {"intermediate_size_mlp": 16384},
    no_effect=("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "for_llm_compressor"),
    tensors={
        **LLAMA_TENSORS,
        **block(
            {
                f"mlp/{ours}{name}": (f"feed_forward.{theirs}{name}", TRANSPOSED)
                for ours, theirs in (("", ""), ("shared/", "shared_expert."))
                for name in ("gate_proj", "up_proj", "down_proj")
            }
            | {"mlp/router": ("feed_forward.router", TRANSPOSED)},
            "model.layers",
        ),
        **{
            f"blocks/*/{ours}/weight": (f"model.layers.*.{theirs}", layout)
            for ours, (theirs, layout) in (
                stacked("mlp/experts", ("gate_proj", "up_proj"), "feed_forward.experts.gate_up_proj", PLAIN)
                | {"mlp/experts/down_proj": ("feed_forward.experts.down_proj", PLAIN)}
            ).items()
        },
    },
)
