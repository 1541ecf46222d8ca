"""Fields of a config.json that need more than copying: each rule names the fields that it reads and what it makes.

A rule's function maps the file's fields (defaults filled in) to fields of `TransformerConfig`. Where a value has no
counterpart here, it is refused by name: a field that changes the computation must not be ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import RopeScaling

Fields = Mapping[str, Any]

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "linear": "identity",
}
"""Names of activations in config.json; those that map to one name compute the same function."""

ROPE_BASE = 10_000.0
"""The rotary base of every family here, where a file names none."""


@dataclass(frozen=True)
class Rule:
    """How fields of config.json become fields of `TransformerConfig`."""

    reads: tuple[str, ...]
    make: Callable[[Fields], dict[str, Any]]


def number(fields: Fields, name: str, kind: type = int, limit: int = 2**40) -> Any:
    """The value of a field that must be a positive number below `limit`.

    Raises:
      UserError: it is missing, or of another type, or out of bounds.
    """
    value = fields.get(name)
    if value is None:
        raise UserError(f"config field {name} is missing.")
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < limit:
        bound = f" below {limit}" if isinstance(value, int | float) and value >= limit else ""
        raise UserError(f"config field {name}={value!r} should be a positive {kind.__name__}{bound}.")
    return kind(value)


def refused(name: str, value: Any, supported: str) -> UserError:
    """The error for a value that is understood, but not computed here."""
    return UserError(f"config field {name}={value!r} is not supported; supported: {supported}.")


def heads(fields: Fields) -> dict[str, Any]:
    """Head counts and sizes: as many keys as queries, and d_model split among the heads, unless the file says more."""
    count = number(fields, "num_attention_heads")
    kv_heads = count if fields.get("num_key_value_heads") is None else number(fields, "num_key_value_heads")
    width = number(fields, "hidden_size")
    if fields.get("head_dim") is None and width % count:
        raise UserError(f"config field hidden_size={width} is not a multiple of num_attention_heads={count}.")
    head_dim = width // count if fields.get("head_dim") is None else number(fields, "head_dim")
    return {"heads": count, "kv_heads": kv_heads, "head_dim": head_dim}


def activation(name: str) -> Rule:
    """The activation that field `name` names."""

    def make(fields: Fields) -> dict[str, Any]:
        value = fields.get(name)
        if not isinstance(value, str) or value not in ACTIVATION_NAMES:
            raise refused(name, value, ", ".join(ACTIVATION_NAMES))
        return {"activation": ACTIVATION_NAMES[value]}

    return Rule((name,), make)


def flag(name: str, *ours: str) -> Rule:
    """A truth value that sets every field in `ours`."""

    def make(fields: Fields) -> dict[str, Any]:
        if not isinstance(fields.get(name), bool):
            raise UserError(f"config field {name}={fields.get(name)!r} should be true or false.")
        return dict.fromkeys(ours, fields[name])

    return Rule((name,), make)


def optional(name: str, ours: str, convert: Callable[[float], float] = float) -> Rule:
    """A positive number or null."""

    def make(fields: Fields) -> dict[str, Any]:
        return {ours: None if fields.get(name) is None else convert(number(fields, name, float))}

    return Rule((name,), make)


def rotary(fields: Fields) -> dict[str, Any]:
    """Rotary positions of whole heads, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    The former is how transformers 5 writes them, the latter 4. `rope_type` "default", "linear" and "llama3" are
    computed here; "dynamic", "yarn", "longrope" and others are refused.
    """
    base, scaling, fraction = _rope(fields)
    _check_whole(fraction)
    return {"rotary_dimensions": heads(fields)["head_dim"], "rotary_base": base, "rotary_scaling": scaling}


def partial_rotary(default: float) -> Callable[[Fields], dict[str, Any]]:
    """The first part of every head is rotated: the fraction that the file says, or `default`."""

    def make(fields: Fields) -> dict[str, Any]:
        base, scaling, fraction = _rope(fields)
        fraction = _agreed(
            {name: fields.get(name) for name in ("rotary_pct", "partial_rotary_factor")}
            | {"rope_parameters.partial_rotary_factor": fraction},
            default=default,
        )
        dimensions = int(heads(fields)["head_dim"] * fraction)
        return {"rotary_dimensions": dimensions, "rotary_base": base, "rotary_scaling": scaling}

    return make


def rotary_by_layer_type(fields: Fields) -> dict[str, Any]:
    """Gemma 3: layers with a window have a base of their own (10,000), the others (1,000,000) may be scaled.

    transformers 5 writes `rope_parameters` with a dictionary for each type of layer, 4 `rope_local_base_freq` beside
    the usual fields, which are those of the layers without a window.
    """
    types = ("full_attention", "sliding_attention")
    given = fields.get("rope_parameters") or {}
    nested = isinstance(given, dict) and given and all(name in types for name in given)
    flat = {f"rope_parameters.{name}": given[name] for name in given} if nested else {"rope_parameters": given}
    flat |= {name: value for name, value in fields.items() if name != "rope_parameters"}
    whole, local = (f"rope_parameters.{name}" for name in types)
    base, scaling, fraction = _rope(flat, (whole if nested else "rope_parameters", "rope_scaling"), base=1_000_000.0)
    local_base, local_scaling, local_fraction = _rope(flat, (local,), ("rope_local_base_freq",))
    if local_scaling is not None:
        raise refused(f"{local}.rope_type", local_scaling.kind, "default")
    for each in (fraction, local_fraction):
        _check_whole(each)
    return {
        "rotary_dimensions": heads(fields)["head_dim"],
        "rotary_base": base,
        "rotary_scaling": scaling,
        "local_rotary_base": local_base,
    }


def _check_whole(fraction: float | None) -> None:
    if fraction not in (None, 1.0):
        raise refused("partial_rotary_factor", fraction, "1.0 for this family")


def _rope(
    fields: Fields,
    names: tuple[str, ...] = ("rope_parameters", "rope_scaling"),
    bases: tuple[str, ...] = ("rope_theta", "rotary_emb_base"),
    base: float = ROPE_BASE,
) -> tuple[float, RopeScaling | None, float | None]:
    """Base, scaling and rotated fraction (None where the dictionary does not say).

    Args:
      names: fields that may hold the dictionary.
      bases: fields beside it that may hold the base.
      base: what it is where no field says.
    """
    dictionaries = {name: fields[name] for name in names if fields.get(name)}
    if len(dictionaries) == 2 and fields[names[0]] != fields[names[1]]:
        raise UserError(f"config fields {names[0]} and {names[1]} contradict each other: remove one.")
    where, given = next(iter(dictionaries.items()), (names[0], {}))
    if not isinstance(given, dict):
        raise UserError(f"config field {where}={given!r} should be an object.")
    kind = given.get("rope_type", given.get("type", "default"))
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if not isinstance(kind, str) or kind not in known:
        raise refused(f"{where}.rope_type", kind, ", ".join(known))
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name, value in given.items():
        if name not in common and name not in known[kind]:
            raise UserError(
                f"unknown config field {where}.{name}={value!r}; rope_type {kind!r} is supported with "
                f"{', '.join(sorted(common | set(known[kind])))}: a field that changes the computation must not be "
                "ignored."
            )
    base = _agreed(
        {f"{where}.rope_theta": given.get("rope_theta")} | {name: fields.get(name) for name in bases}, default=base
    )
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling("linear", number(given, "factor", float))
    else:
        context = {"original_max_position_embeddings": fields.get("max_position_embeddings")} | given
        scaling = RopeScaling(
            "llama3",
            number(given, "factor", float),
            number(given, "low_freq_factor", float),
            number(given, "high_freq_factor", float),
            number(context, "original_max_position_embeddings"),
        )
        if scaling.high_frequency_factor <= scaling.low_frequency_factor:
            raise UserError(f"config field {where}.high_freq_factor must exceed {where}.low_freq_factor.")
    return base, scaling, given.get("partial_rotary_factor")


def _agreed(given: Mapping[str, Any], default: float) -> float:
    """The one value that all fields which are given agree on."""
    said = {name: number(given, name, float) for name, value in given.items() if value is not None}
    if len(set(said.values())) > 1:
        raise UserError(f"config fields contradict each other: {', '.join(f'{k}={v}' for k, v in said.items())}.")
    return next(iter(said.values()), default)


def window_everywhere(fields: Fields) -> dict[str, Any]:
    """Mistral: the same sliding window in every layer; null for none."""
    if fields.get("sliding_window") is None:
        return {"windows": ()}
    return {"windows": (number(fields, "sliding_window"),) * number(fields, "num_hidden_layers")}


def window_in_upper_layers(fields: Fields) -> dict[str, Any]:
    """Qwen: where `use_sliding_window`, the layers from `max_window_layers` on, unless `layer_types` says which."""
    sliding = fields["sliding_window"] if fields["use_sliding_window"] is True else None
    first = fields["max_window_layers"] if sliding is not None else number(fields, "num_hidden_layers")
    if isinstance(first, bool) or not isinstance(first, int):
        raise UserError(f"config field max_window_layers={first!r} should be an int.")
    return _windows(fields, sliding, lambda layer: layer >= first)


def window_in_every_other_layer(fields: Fields) -> dict[str, Any]:
    """Gemma 2: the first layer and every other one after it, unless `layer_types` says which."""
    return _windows(fields, fields["sliding_window"], lambda layer: layer % 2 == 0)


def window_in_all_but_every_nth_layer(fields: Fields) -> dict[str, Any]:
    """Gemma 3: every sixth layer sees everything (`sliding_window_pattern`), unless `layer_types` says which."""
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    said = {name: number(fields, name) for name in names if fields.get(name) is not None}
    pattern = int(_agreed(said, default=6.0))
    return _windows(fields, fields["sliding_window"], lambda layer: (layer + 1) % pattern != 0)


def padding(fields: Fields) -> dict[str, Any]:
    """The token that fills short inputs up; null for none."""
    token = fields["pad_token_id"]
    if token is not None and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
        raise UserError(f"config field pad_token_id={token!r} should be a token id or null.")
    return {"padding": token}


def _windows(fields: Fields, window: int | None, slides: Callable[[int], bool]) -> dict[str, Any]:
    layers = number(fields, "num_hidden_layers")
    types = fields.get("layer_types")
    if types is None:
        types = ["sliding_attention" if slides(layer) else "full_attention" for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise UserError(f"config field layer_types={types!r} should name one type for each of {layers} layers.")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise refused("layer_types", kind, "full_attention, sliding_attention")
    if "sliding_attention" not in types:
        return {"windows": ()}
    if window is None:
        raise UserError("config field sliding_window is null or switched off, but layer_types has sliding_attention.")
    size = number({"sliding_window": window}, "sliding_window")
    return {"windows": tuple(size if kind == "sliding_attention" else None for kind in types)}
