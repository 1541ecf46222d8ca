"""SmolLM3: Llama's tensors; some layers have no rotary positions, and those may have a window."""

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.base import ATTENTION_BIAS, HEADS, LLAMA_COPIED, LLAMA_DEFAULTS, Family
from jaxinterp.models.families.fields import Fields, Rule, activation, flag, number, windows
from jaxinterp.models.families.rope import ROPE_FIELDS, whole_rotary
from jaxinterp.models.families.tensors import LLAMA_TENSORS

UNROTATED_FIELDS = ("no_rope_layers", "no_rope_layer_interval", "num_hidden_layers")


def unrotated(fields: Fields) -> dict[str, PyTree]:
    """Layers whose entry in `no_rope_layers` is 0, or every `no_rope_layer_interval`-th."""
    layers = number(fields, "num_hidden_layers")
    rotated = fields.get("no_rope_layers")
    if rotated is None:
        interval = number(fields, "no_rope_layer_interval")
        rotated = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) != layers or any(each not in (0, 1) for each in rotated):
        raise UserError(f"config field no_rope_layers={rotated!r} should have a 1 or 0 for each of {layers} layers.")
    return {"unrotated": tuple(layer for layer, each in enumerate(rotated) if not each)}


def _windows(fields: Fields) -> dict[str, PyTree]:
    slides = fields["use_sliding_window"] is True and fields["sliding_window"] is not None
    without = unrotated(fields)["unrotated"]
    return windows(fields, fields["sliding_window"], lambda layer: slides and layer in without)


SMOLLM3 = Family(
    architectures=("SmolLM3ForCausalLM", "SmolLM3Model"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, activation("hidden_act"), ATTENTION_BIAS, flag("mlp_bias", "mlp_bias")),
        Rule(ROPE_FIELDS, whole_rotary(2_000_000.0)),
        Rule(UNROTATED_FIELDS, unrotated),
        Rule(("use_sliding_window", "sliding_window", "layer_types"), _windows),
    ),
    defaults={**LLAMA_DEFAULTS, "num_key_value_heads": 4, "mlp_bias": False, "tie_word_embeddings": True}
    | {"no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None},
    no_effect=("max_window_layers",),
    tensors=LLAMA_TENSORS,
)
