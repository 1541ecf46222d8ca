"""Qwen 3.5: three layers in four are Gated DeltaNets, the others attention with a gate; its mixtures are Qwen 2's."""

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.models.delta_net import DeltaConfig
from jaxinterp.models.families.base import ATTENTION_BIAS, HEADS, LLAMA_COPIED, LLAMA_DEFAULTS, Family
from jaxinterp.models.families.fields import ACTIVATION_NAMES, Fields, Rule, activation, number, refused
from jaxinterp.models.families.mixtures import NO_EFFECT, QWEN2_MOE, routed
from jaxinterp.models.families.rope import ROPE_FIELDS, partial_rotary
from jaxinterp.models.families.tensors import LLAMA_TENSORS, block
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED, Layout, LeafTable

SIZES = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
DELTA_FIELDS = tuple(f"linear_{name}" for name in SIZES)
TYPES = ("linear_attention", "full_attention")
MROPE = ("mrope_section", "mrope_interleaved")  # how positions of images are interleaved: all of a token of text agree


def _delta(fields: Fields) -> dict[str, PyTree]:
    """Which layers are Gated DeltaNets, and their sizes."""
    layers, types = number(fields, "num_hidden_layers"), fields.get("layer_types")
    if types is None:
        every = number(fields, "full_attention_interval")
        types = [TYPES[(layer + 1) % every == 0] for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise UserError(f"config field layer_types={types!r} should name one type for each of {layers} layers.")
    for kind in types:
        if kind not in TYPES:
            raise refused("layer_types", kind, ", ".join(TYPES))
    key_dim, value_dim, key_heads, value_heads, width = (number(fields, name) for name in DELTA_FIELDS)
    kind = ACTIVATION_NAMES[str(fields["hidden_act"])]
    config = DeltaConfig(key_heads, value_heads, key_dim, value_dim, width, kind)
    return {"delta": config, "delta_layers": tuple(n for n, kind in enumerate(types) if kind == TYPES[0])}


QUERY_AND_GATE = {
    f"attn/{ours}_proj": ("self_attn.q_proj", Layout(transposed=True, order="interleaved", part=part, parts=2))
    for part, ours in enumerate(("q", "gate"))
}
DELTA_TENSORS: LeafTable = {
    **block(QUERY_AND_GATE, "model.layers"),
    **block(
        {
            f"attn/{ours}_proj": (f"linear_attn.{theirs}", TRANSPOSED)
            for ours, theirs in (
                *(("qkv", "in_proj_qkv"), ("z", "in_proj_z"), ("b", "in_proj_b"), ("a", "in_proj_a")),
                ("out", "out_proj"),
            )
        }
        | {"attn/norm": ("linear_attn.norm", PLAIN)},
        "model.layers",
    ),
    "blocks/*/attn/conv": ("model.layers.*.linear_attn.conv1d.weight", PLAIN),
    "blocks/*/attn/decay_log": ("model.layers.*.linear_attn.A_log", PLAIN),
    "blocks/*/attn/step_bias": ("model.layers.*.linear_attn.dt_bias", PLAIN),
}
RULES = (
    *(HEADS, activation("hidden_act"), ATTENTION_BIAS),
    Rule((*ROPE_FIELDS, "partial_rotary_factor"), partial_rotary(0.25, also=MROPE)),
    Rule(("layer_types", "full_attention_interval", *DELTA_FIELDS), _delta),
)
DEFAULTS = {**LLAMA_DEFAULTS, "head_dim": 256, "num_key_value_heads": 4, "full_attention_interval": 4}
DEFAULTS |= dict(zip(DELTA_FIELDS, (128, 128, 16, 32, 4), strict=True))
REQUIRED: dict[str, tuple[Json, ...]] = {
    "attn_output_gate": (True, None),
    "output_gate_type": ("swish", "silu", None),
    "mlp_only_layers": (None, []),
}
UNUSED = ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mtp_loss_coef")
"""The precision of the state, which is float32 here, and layers that predict further tokens, which are left out."""

QWEN3_5 = Family(
    architectures=("Qwen3_5ForCausalLM", "Qwen3_5TextModel"),
    copied=LLAMA_COPIED,
    rules=RULES,
    constants={"norm_offset": 1.0, "query_key_norm": True, "attention_gate": True},
    defaults=DEFAULTS,
    required=REQUIRED,
    no_effect=UNUSED,
    tensors={**LLAMA_TENSORS, **DELTA_TENSORS},
    buffers=r"mtp\..*|.*\.rotary_emb\.inv_freq",
)

QWEN3_5_MOE = Family(
    architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextModel"),
    copied={name: ours for name, ours in LLAMA_COPIED.items() if ours != "d_mlp"},
    rules=(*RULES, routed(256, "moe_intermediate_size", shared=True, renormalise=True)),
    constants={**QWEN3_5.constants, "d_mlp": 1},
    defaults={**DEFAULTS, "num_key_value_heads": 2, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
    | {"shared_expert_intermediate_size": 512},
    required=REQUIRED | {"norm_topk_prob": (True, None), "decoder_sparse_step": (1, None)},
    no_effect=(*UNUSED, *NO_EFFECT, "intermediate_size"),
    tensors={**QWEN2_MOE.tensors, **DELTA_TENSORS},
    buffers=QWEN3_5.buffers,
)
