"""OLMo 3: OLMo 2's tensors; three layers in four have a window, and each type of layer its own rotary positions."""

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.base import ATTENTION_BIAS, HEADS, LLAMA_COPIED, LLAMA_DEFAULTS, Family
from jaxinterp.models.families.fields import Fields, Rule, activation, windows
from jaxinterp.models.families.rope import LAYER_TYPES, ROPE_FIELDS, rotary_by_layer_type
from jaxinterp.models.families.tensors import OLMO2_TENSORS

BASE = 500_000.0


def _rotary(fields: Fields) -> dict[str, PyTree]:
    given = fields.get("rope_parameters")
    if given and not (isinstance(given, dict) and all(name in LAYER_TYPES for name in given)):
        raise UserError(f"config field rope_parameters={given!r} should have an object for each type of layer.")
    return rotary_by_layer_type(BASE, BASE)(fields)


OLMO3 = Family(
    architectures=("Olmo3ForCausalLM", "Olmo3Model"),
    copied=LLAMA_COPIED,
    rules=(
        *(HEADS, activation("hidden_act"), ATTENTION_BIAS),
        Rule(ROPE_FIELDS, _rotary),
        Rule(
            ("sliding_window", "layer_types"),
            lambda fields: windows(fields, fields["sliding_window"], lambda layer: (layer + 1) % 4 != 0),
        ),
    ),
    constants={"pre_norms": False, "post_norms": True, "query_key_norm": True, "query_key_norm_over": "projection"},
    defaults={**LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": 4096},
    tensors=OLMO2_TENSORS,
)
