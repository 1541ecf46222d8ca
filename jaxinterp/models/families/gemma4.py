"""Gemma 4's text models without experts: larger heads in layers without a window, upper layers that share keys and
values, vectors of every token for every layer, norms with plain weights."""

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.base import ATTENTION_BIAS, GEMMA_DEFAULTS, GEMMA_SCALE, HEADS, LLAMA_COPIED, Family
from jaxinterp.models.families.fields import Fields, Rule, activation, flag, number, optional, refused, windows
from jaxinterp.models.families.rope import LAYER_TYPES, rope
from jaxinterp.models.families.tensors import GEMMA2_TENSORS, block
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED
from jaxinterp.models.per_layer import PerLayerConfig
from jaxinterp.models.transformer import WholeConfig

ROTARY = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


def _rotary(fields: Fields) -> dict[str, PyTree]:
    given = ROTARY if fields.get("rope_parameters") is None else fields["rope_parameters"]
    if not isinstance(given, dict) or not all(name in LAYER_TYPES for name in given):
        raise UserError(f"config field rope_parameters={given!r} should have an object for each type of layer.")
    found = []
    for kind in LAYER_TYPES:
        name = f"rope_parameters.{kind}"
        base, scaling, fraction = rope({**fields, name: given.get(kind)}, (name,), (), nested=True)
        if fraction not in (None, 1.0) and (scaling is None or scaling.kind != "proportional"):
            raise refused(f"{name}.partial_rotary_factor", fraction, "1.0, or rope_type 'proportional'")
        found += [base, scaling]
    names = ("rotary_base", "rotary_scaling", "local_rotary_base", "local_rotary_scaling")
    return dict(zip(names, found, strict=True)) | {"rotary_dimensions": number(fields, "head_dim")}


def _layers(fields: Fields) -> dict[str, PyTree]:
    """Windows in five layers of six, never in the last; what layers without one have of their own; shared keys."""
    layers, types = number(fields, "num_hidden_layers"), fields.get("layer_types")
    if isinstance(types, list) and types:
        types = [*types[:-1], "full_attention"]  # as transformers does
    slides = lambda layer: (layer + 1) % 6 != 0 and layer != layers - 1
    found = windows({**fields, "layer_types": types}, fields["sliding_window"], slides)
    whole = [layer for layer in range(layers) if not found["windows"] or found["windows"][layer] is None]
    equal = fields["attention_k_eq_v"] is True
    heads = fields.get("num_global_key_value_heads") if equal else None
    said = {"head_dim": number(fields, "global_head_dim")}
    said |= {} if heads is None else {"num_key_value_heads": number(fields, "num_global_key_value_heads")}
    each = fields.get("per_layer_config")
    if "per_layer_config" in fields and not each:  # written, and nothing in it: all layers are alike
        said = {}
    if each:
        if not isinstance(each, dict) or {str(name).lstrip("0") or "0" for name in each} != {*map(str, whole)}:
            raise refused("per_layer_config", each, f"the layers without a window, {whole}")
        said = next(iter(each.values()))
        names = {"head_dim", "num_key_value_heads"}
        if any(one != said for one in each.values()) or not isinstance(said, dict) or not set(said) <= names:
            raise refused("per_layer_config", each, f"the same {', '.join(sorted(names))} for all these layers")
    own = {"head_dim": fields["head_dim"], "num_key_value_heads": fields["num_key_value_heads"], **said}
    config = WholeConfig(number(own, "head_dim"), number(own, "num_key_value_heads"), equal)
    if number(fields, "num_attention_heads") % config.kv_heads:
        raise refused("num_global_key_value_heads", config.kv_heads, "a divisor of num_attention_heads")
    shared = fields["num_kv_shared_layers"]
    if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared < layers:
        raise refused("num_kv_shared_layers", shared, f"0 to {layers - 1}")
    wide = 2 if fields["use_double_wide_mlp"] is True else 1
    return {"windows": found["windows"], "whole": config, "shared_layers": shared, "shared_width": wide}


def _vectors(fields: Fields) -> dict[str, PyTree]:
    if not fields["hidden_size_per_layer_input"]:
        return {"per_layer": None}
    size = number(fields, "hidden_size_per_layer_input")
    return {"per_layer": PerLayerConfig(number(fields, "vocab_size_per_layer_input"), size)}


GEMMA4 = Family(
    architectures=("Gemma4ForCausalLM", "Gemma4TextModel"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, GEMMA_SCALE, ATTENTION_BIAS, activation("hidden_activation")),
        Rule(("rope_parameters",), _rotary),
        Rule(("sliding_window", "layer_types", "global_head_dim", "num_global_key_value_heads"), _layers),
        Rule(("per_layer_config", "num_kv_shared_layers"), lambda fields: {}),  # read by _layers
        flag("attention_k_eq_v"),
        flag("use_double_wide_mlp"),
        Rule(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), _vectors),
        optional("final_logit_softcapping", "logit_cap"),
    ),
    constants={"post_norms": True, "query_key_norm": True, "value_norm": True, "attention_scale": 1.0}
    | {"layer_scale": True},
    defaults={**GEMMA_DEFAULTS, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072}
    | {"sliding_window": 512, "global_head_dim": 512, "num_kv_shared_layers": 0, "attention_k_eq_v": False}
    | {"use_double_wide_mlp": False, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144},
    required={
        "enable_moe_block": (False, None),
        "use_bidirectional_attention": (None, False, "vision"),  # "vision": among the tokens of an image
        **dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size"), (None,)),
    },
    tensors={
        **GEMMA2_TENSORS,
        **block(
            {
                "per_layer/gate_proj": ("per_layer_input_gate", TRANSPOSED),
                "per_layer/out_proj": ("per_layer_projection", TRANSPOSED),
                "per_layer/norm": ("post_per_layer_input_norm", PLAIN),
            },
            "model.layers",
        ),
        "blocks/*/scale": ("model.layers.*.layer_scalar", PLAIN),
        "per_layer/token": ("model.embed_tokens_per_layer.weight", PLAIN),
        "per_layer/projection/weight": ("model.per_layer_model_projection.weight", TRANSPOSED),
        "per_layer/norm/weight": ("model.per_layer_projection_norm.weight", PLAIN),
    },
)
