"""Fields of a config.json that need more than copying: each rule names the fields that it reads and what it makes.

A rule's function maps the file's fields (defaults filled in) to fields of `TransformerConfig`. Where a value has no
counterpart here, it is refused by name: a field that changes the computation must not be ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.models.rules import Activation

Fields = Mapping[str, Any]

ACTIVATION_NAMES: dict[str, Activation] = {
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
    "relu2": "relu_squared",
}
"""Names of activations in config.json; those that map to one name compute the same function."""


@dataclass(frozen=True)
class Rule:
    """How fields of config.json become fields of `TransformerConfig`."""

    reads: tuple[str, ...]
    make: Callable[[Fields], dict[str, PyTree]]


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


def refused(name: str, value: object, supported: str) -> UserError:
    """The error for a value that is understood, but not computed here."""
    return UserError(f"config field {name}={value!r} is not supported; supported: {supported}.")


def heads(fields: Fields) -> dict[str, PyTree]:
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

    def make(fields: Fields) -> dict[str, PyTree]:
        value = fields.get(name)
        if not isinstance(value, str) or value not in ACTIVATION_NAMES:
            raise refused(name, value, ", ".join(ACTIVATION_NAMES))
        return {"activation": ACTIVATION_NAMES[value]}

    return Rule((name,), make)


def flag(name: str, *ours: str) -> Rule:
    """A truth value that sets every field in `ours`."""

    def make(fields: Fields) -> dict[str, PyTree]:
        if not isinstance(fields.get(name), bool):
            raise UserError(f"config field {name}={fields.get(name)!r} should be true or false.")
        return dict.fromkeys(ours, fields[name])

    return Rule((name,), make)


def optional(name: str, ours: str, convert: Callable[[float], float] = float) -> Rule:
    """A positive number or null."""

    def make(fields: Fields) -> dict[str, PyTree]:
        return {ours: None if fields.get(name) is None else convert(number(fields, name, float))}

    return Rule((name,), make)


def agreed(given: Mapping[str, Json], default: float) -> float:
    """The one value that all fields which are given agree on."""
    said = {name: number(given, name, float) for name, value in given.items() if value is not None}
    if len(set(said.values())) > 1:
        raise UserError(f"config fields contradict each other: {', '.join(f'{k}={v}' for k, v in said.items())}.")
    return next(iter(said.values()), default)


def window_everywhere(fields: Fields) -> dict[str, PyTree]:
    """Mistral: the same sliding window in every layer; null for none."""
    if fields.get("sliding_window") is None:
        return {"windows": ()}
    return {"windows": (number(fields, "sliding_window"),) * number(fields, "num_hidden_layers")}


def window_in_upper_layers(fields: Fields) -> dict[str, PyTree]:
    """Qwen: where `use_sliding_window`, the layers from `max_window_layers` on, unless `layer_types` says which."""
    sliding = fields["sliding_window"] if fields["use_sliding_window"] is True else None
    first = fields["max_window_layers"] if sliding is not None else number(fields, "num_hidden_layers")
    if isinstance(first, bool) or not isinstance(first, int):
        raise UserError(f"config field max_window_layers={first!r} should be an int.")
    return windows(fields, sliding, lambda layer: layer >= first)


def layers_of(fields: Fields, name: str, limit: int) -> tuple[int, ...]:
    """The layer numbers below `limit` that a field lists; none where it is null."""
    listed = fields.get(name) or []
    if not isinstance(listed, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in listed):
        raise UserError(f"config field {name}={fields.get(name)!r} should be a list of layer numbers.")
    return tuple(sorted({each for each in listed if 0 <= each < limit}))


def window_in_every_other_layer(fields: Fields) -> dict[str, PyTree]:
    """Gemma 2: the first layer and every other one after it, unless `layer_types` says which."""
    return windows(fields, fields["sliding_window"], lambda layer: layer % 2 == 0)


def window_in_all_but_every_nth_layer(fields: Fields) -> dict[str, PyTree]:
    """Gemma 3: every sixth layer sees everything (`sliding_window_pattern`), unless `layer_types` says which."""
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    said = {name: number(fields, name) for name in names if fields.get(name) is not None}
    pattern = int(agreed(said, default=6.0))
    return windows(fields, fields["sliding_window"], lambda layer: (layer + 1) % pattern != 0)


def padding(fields: Fields) -> dict[str, PyTree]:
    """The token that fills short inputs up; null for none."""
    token = fields["pad_token_id"]
    if token is not None and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
        raise UserError(f"config field pad_token_id={token!r} should be a token id or null.")
    return {"padding": token}


def windows(fields: Fields, window: int | None, slides: Callable[[int], bool]) -> dict[str, PyTree]:
    """The window of every layer, by `layer_types` where the file has it and else by `slides`; none if no layer slides.

    Raises:
      UserError: `layer_types` has another length than the model has layers, or names an unknown type.
    """
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
