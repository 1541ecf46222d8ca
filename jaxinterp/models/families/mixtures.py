"""Mixtures of experts: Mixtral, OLMoE, Qwen 2 and 3. Files keep each expert's matrices, or one tensor of all."""

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.base import (
    ATTENTION_BIAS,
    HEADS,
    LLAMA_COPIED,
    LLAMA_DEFAULTS,
    QWEN_DEFAULTS,
    Family,
)
from jaxinterp.models.families.fields import (
    ACTIVATION_NAMES,
    Fields,
    Rule,
    activation,
    agreed,
    flag,
    layers_of,
    number,
    optional,
    window_everywhere,
    windows,
)
from jaxinterp.models.families.rope import ROPE_FIELDS, ROTARY, whole_rotary
from jaxinterp.models.families.tensors import LLAMA_TENSORS, block
from jaxinterp.models.files.weights import TRANSPOSED, LeafTable
from jaxinterp.models.mixtures.routed import RoutedConfig

NO_EFFECT = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "attention_dropout")


def experts_of(fields: Fields, default: int) -> int:
    """The number of experts, which has two names."""
    names = ("num_experts", "num_local_experts")
    return int(agreed({name: fields.get(name) for name in names}, default=float(default)))


def routed(experts: int, hidden: str, *, shared: bool = False, renormalise: bool | None = None) -> Rule:
    """The mixture: `experts` if the file does not say how many, neurons in field `hidden`, perhaps a shared expert."""

    def make(fields: Fields) -> dict[str, PyTree]:
        divided = fields.get("norm_topk_prob") if renormalise is None else renormalise
        if not isinstance(divided, bool):
            raise UserError(f"config field norm_topk_prob={divided!r} should be true or false.")
        config = RoutedConfig(
            experts_of(fields, experts),
            number(fields, "num_experts_per_tok"),
            number(fields, hidden),
            renormalise=divided,
            shared=number(fields, "shared_expert_intermediate_size") if shared else 0,
            shared_gate=shared,
            activation=ACTIVATION_NAMES[str(fields["hidden_act"])],
        )
        return {"routed": config}

    sometimes = ("shared_expert_intermediate_size",) * shared + ("norm_topk_prob",) * (renormalise is None)
    return Rule(("num_experts", "num_local_experts", "num_experts_per_tok", hidden, *sometimes), make)


def dense_layers(fields: Fields) -> dict[str, PyTree]:
    """Layers of `mlp_only_layers`, and those that `decoder_sparse_step` leaves out, have a plain MLP."""
    layers, step = number(fields, "num_hidden_layers"), number(fields, "decoder_sparse_step")
    listed = layers_of(fields, "mlp_only_layers", layers)
    return {"dense_layers": tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)}


def experts_in(theirs: str, gate: str, up: str, down: str, router: str = "gate") -> LeafTable:
    """The tensors of a mixture whose experts are kept one by one."""
    table = {
        f"mlp/experts/{ours}_proj": (f"{theirs}.experts.#.{name}", TRANSPOSED)
        for ours, name in (("gate", gate), ("up", up), ("down", down))
    }
    return block({**table, "mlp/router": (f"{theirs}.{router}", TRANSPOSED)}, "model.layers")


EXPERTS = experts_in("mlp", "gate_proj", "up_proj", "down_proj")
SPARSE = Rule(("decoder_sparse_step", "mlp_only_layers"), dense_layers)


def _qwen2_windows(fields: Fields) -> dict[str, PyTree]:
    """Every other one of the first `max_window_layers` layers."""
    slides, first = fields["use_sliding_window"] is True, fields["max_window_layers"]
    window = fields["sliding_window"] if slides else None
    return windows(fields, window, lambda layer: slides and layer % 2 == 0 and layer < first)


def _qwen3_window(fields: Fields) -> dict[str, PyTree]:
    return window_everywhere(fields) if fields["use_sliding_window"] is True else {"windows": ()}


MIXTRAL = Family(
    architectures=("MixtralForCausalLM", "MixtralModel"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, activation("hidden_act"), Rule(ROPE_FIELDS, whole_rotary(1_000_000.0))),
        Rule(("sliding_window",), window_everywhere),
        routed(8, "intermediate_size", renormalise=True),
    ),
    defaults={**LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "sliding_window": None}
    | {"num_experts_per_tok": 2},
    no_effect=NO_EFFECT,
    tensors={**LLAMA_TENSORS, **experts_in("block_sparse_moe", "w1", "w3", "w2")},
)

OLMOE = Family(
    architectures=("OlmoeForCausalLM", "OlmoeModel"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, ROTARY, activation("hidden_act"), ATTENTION_BIAS, optional("clip_qkv", "attention_clip")),
        routed(64, "intermediate_size"),
    ),
    constants={"query_key_norm": True, "query_key_norm_over": "projection"},
    defaults={**LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8}
    | {"norm_topk_prob": False, "clip_qkv": None},
    no_effect=NO_EFFECT,
    tensors={**LLAMA_TENSORS, **EXPERTS},
)

QWEN2_MOE = Family(
    architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, ROTARY, activation("hidden_act"), flag("qkv_bias", "qkv_bias"), SPARSE),
        Rule(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _qwen2_windows),
        routed(60, "moe_intermediate_size", shared=True),
    ),
    defaults={**QWEN_DEFAULTS, "num_key_value_heads": 16, "qkv_bias": True, "decoder_sparse_step": 1}
    | {"mlp_only_layers": None, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
    | {"shared_expert_intermediate_size": 5632, "norm_topk_prob": False},
    no_effect=NO_EFFECT,
    tensors={
        **LLAMA_TENSORS,
        **EXPERTS,
        **block(
            {
                "mlp/shared/gate_proj": ("mlp.shared_expert.gate_proj", TRANSPOSED),
                "mlp/shared/up_proj": ("mlp.shared_expert.up_proj", TRANSPOSED),
                "mlp/shared/down_proj": ("mlp.shared_expert.down_proj", TRANSPOSED),
                "mlp/shared_gate": ("mlp.shared_expert_gate", TRANSPOSED),
            },
            "model.layers",
        ),
    },
)

QWEN3_MOE = Family(
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, ROTARY, activation("hidden_act"), ATTENTION_BIAS, SPARSE),
        Rule(("use_sliding_window", "sliding_window"), _qwen3_window),
        routed(128, "moe_intermediate_size"),
    ),
    constants={"query_key_norm": True},
    defaults={**QWEN_DEFAULTS, "num_key_value_heads": 4, "decoder_sparse_step": 1, "mlp_only_layers": None}
    | {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
    no_effect=(*NO_EFFECT, "max_window_layers"),
    tensors={**LLAMA_TENSORS, **EXPERTS},
)
