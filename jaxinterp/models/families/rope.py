"""Rotary positions as config.json writes them: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

Every `rope_type` of transformers is computed: default, linear, dynamic, yarn, longrope, llama3, proportional. Defaults
and precedence are those of `modeling_rope_utils.py` (transformers 5.24).
"""

from collections.abc import Callable, Mapping

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.fields import Fields, Rule, agreed, heads, number, refused
from jaxinterp.models.rotary import RopeScaling, longrope_attention_factor, yarn_attention_factor

ROPE_BASE = 10_000.0
"""The rotary base where neither the file nor the family names one."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"),
        *("mscale_all_dim", "truncate"),
    ),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", "original_max_position_embeddings"),
    "proportional": ("factor",),
}
"""The fields that each rope_type reads."""

COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
LAYER_TYPES = ("full_attention", "sliding_attention")


def whole_rotary(base: float = ROPE_BASE) -> Callable[[Fields], dict[str, PyTree]]:
    """Whole heads are rotated; `base` where the file says none."""

    def make(fields: Fields) -> dict[str, PyTree]:
        found, scaling, fraction = rope(fields, base=base)
        _check_whole(fraction)
        return {"rotary_dimensions": heads(fields)["head_dim"], "rotary_base": found, "rotary_scaling": scaling}

    return make


ROTARY = Rule(ROPE_FIELDS, whole_rotary())


def partial_rotary(
    default: float, aliases: Mapping[str, str] | None = None, also: tuple[str, ...] = ()
) -> Callable[[Fields], dict[str, PyTree]]:
    """The first part of every head is rotated: the fraction that the file says, or `default`.

    Args:
      aliases: names of rope types that mean another one here.
      also: fields of the dictionary that have no effect on text.
    """

    def make(fields: Fields) -> dict[str, PyTree]:
        base, scaling, fraction = rope(fields, aliases=aliases or {}, also=also)
        fraction = agreed(
            {name: fields.get(name) for name in ("rotary_pct", "partial_rotary_factor")}
            | {"rope_parameters.partial_rotary_factor": fraction},
            default=default,
        )
        dimensions = int(heads(fields)["head_dim"] * fraction)
        return {"rotary_dimensions": dimensions, "rotary_base": base, "rotary_scaling": scaling}

    return make


def rotary_by_layer_type(whole_base: float, local_base: float) -> Callable[[Fields], dict[str, PyTree]]:
    """Gemma 3, OLMo 3: layers with a window have a base and a scaling of their own.

    transformers 5 writes `rope_parameters` with a dictionary for each type of layer, 4 `rope_local_base_freq` beside
    the usual fields, which are those of the layers without a window.
    """

    def make(fields: Fields) -> dict[str, PyTree]:
        given = fields.get("rope_parameters") or {}
        nested = isinstance(given, dict) and given and all(name in LAYER_TYPES for name in given)
        flat = {f"rope_parameters.{name}": given[name] for name in given} if nested else {"rope_parameters": given}
        flat |= {name: value for name, value in fields.items() if name != "rope_parameters"}
        whole, local = (f"rope_parameters.{name}" for name in LAYER_TYPES)
        names = (whole if nested else "rope_parameters", "rope_scaling")
        base, scaling, fraction = rope(flat, names, base=whole_base, nested=bool(nested))
        own, own_scaling, own_fraction = rope(flat, (local,), ("rope_local_base_freq",), local_base, nested=True)
        for each in (fraction, own_fraction):
            _check_whole(each)
        return {
            "rotary_dimensions": heads(fields)["head_dim"],
            "rotary_base": base,
            "rotary_scaling": scaling,
            "local_rotary_base": own,
            "local_rotary_scaling": own_scaling,
        }

    return make


def _check_whole(fraction: float | None) -> None:
    if fraction not in (None, 1.0):
        raise refused("partial_rotary_factor", fraction, "1.0 for this family")


def rope(
    fields: Fields,
    names: tuple[str, ...] = ("rope_parameters", "rope_scaling"),
    bases: tuple[str, ...] = ("rope_theta", "rotary_emb_base"),
    base: float = ROPE_BASE,
    *,
    nested: bool = False,
    aliases: Mapping[str, str] | None = None,
    also: tuple[str, ...] = (),
) -> tuple[float, RopeScaling | None, float | None]:
    """Base, scaling and rotated fraction (None where the dictionary does not say).

    Args:
      names: fields that may hold the dictionary.
      bases: fields beside it that may hold the base.
      base: what it is where no field says.
      nested: the dictionary is that of one type of layer.
      aliases: names of rope types that mean another one in this family.
      also: fields of the dictionary that have no effect on text.
    """
    dictionaries = {name: fields[name] for name in names if fields.get(name)}
    if len(dictionaries) == 2 and fields[names[0]] != fields[names[1]]:
        raise UserError(f"config fields {names[0]} and {names[1]} contradict each other: remove one.")
    where, given = next(iter(dictionaries.items()), (names[0], {}))
    if not isinstance(given, dict):
        raise UserError(f"config field {where}={given!r} should be an object.")
    kind = given.get("rope_type", given.get("type", "default"))
    kind = (aliases or {}).get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in KINDS:
        raise refused(f"{where}.rope_type", kind, ", ".join(KINDS))
    for name, value in given.items():
        if name not in (*COMMON, *also, *KINDS[kind]):
            raise UserError(
                f"unknown config field {where}.{name}={value!r}; rope_type {kind!r} is supported with "
                f"{', '.join(sorted((*COMMON, *KINDS[kind])))}: a field that changes the computation must not be "
                "ignored."
            )
    said = {f"{where}.rope_theta": given.get("rope_theta")} | {name: fields.get(name) for name in bases}
    scaling = None if kind == "default" else _scaling(kind, given, fields, where, nested)
    return agreed(said, default=base), scaling, given.get("partial_rotary_factor")


def _scaling(kind: str, given: Fields, fields: Fields, where: str, nested: bool) -> RopeScaling:
    """The scaling that a dictionary of rope_type `kind` describes."""
    if kind == "linear":
        return RopeScaling("linear", number(given, "factor", float))
    if kind == "proportional":
        factor = 1.0 if given.get("factor") is None else number(given, "factor", float)
        return RopeScaling("proportional", factor, fraction=float(given.get("partial_rotary_factor") or 1.0))
    context = {"original_max_position_embeddings": fields.get("max_position_embeddings")}
    context |= {name: value for name, value in given.items() if value is not None}
    if fields.get("original_max_position_embeddings") is not None:
        context["original_max_position_embeddings"] = fields["original_max_position_embeddings"]
    original = number(context, "original_max_position_embeddings")
    if kind == "dynamic":
        if original != fields.get("max_position_embeddings"):
            raise refused(f"{where}.original_max_position_embeddings", original, "max_position_embeddings")
        return RopeScaling("dynamic", number(given, "factor", float), original_context=original)
    if kind == "llama3":
        low, high = number(given, "low_freq_factor", float), number(given, "high_freq_factor", float)
        if high <= low:
            raise UserError(f"config field {where}.high_freq_factor must exceed {where}.low_freq_factor.")
        return RopeScaling("llama3", number(given, "factor", float), low, high, original)
    if given.get("factor") is None:
        factor = number(fields, "max_position_embeddings") / original
    else:
        factor = number(given, "factor", float)
    said = None if given.get("attention_factor") is None else number(given, "attention_factor", float)
    if kind == "longrope":
        return RopeScaling(
            "longrope",
            factor,
            original_context=original,
            attention_factor=longrope_attention_factor(factor, original) if said is None else said,
            short_factors=_factors(given, "short_factor", where),
            long_factors=_factors(given, "long_factor", where),
        )
    scales = [None if not given.get(name) else number(given, name, float) for name in ("mscale", "mscale_all_dim")]
    return RopeScaling(
        "yarn",
        factor,
        original_context=original,
        attention_factor=yarn_attention_factor(factor, *scales) if said is None else said,
        fast_turns=float(given.get("beta_fast") or 32),
        slow_turns=float(given.get("beta_slow") or 1),
        # transformers looks for `truncate` beside the types of layers, and so not in the dictionary of one of them
        whole_dimensions=nested or bool(given.get("truncate", True)),
    )


def _factors(given: Fields, name: str, where: str) -> tuple[float, ...]:
    factors = given.get(name)
    if not isinstance(factors, list) or not all(
        isinstance(each, int | float) and not isinstance(each, bool) and each > 0 for each in factors
    ):
        raise UserError(f"config field {where}.{name}={factors!r} should be a list of positive numbers.")
    return tuple(float(each) for each in factors)
