"""A dictionary on disk: `dictionary.json` (what is static) beside `dictionary.safetensors` (every leaf by its name).

Activation, k and sites are saved with the arrays, because a dictionary loaded with another activation or at another
site gives wrong numbers without an error. So is how it chooses its features, where that is by their effect.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxinterp.data.batch import Sites
from jaxinterp.decompositions.activations import Activation, BatchTopK, ReLU, TopK
from jaxinterp.decompositions.adaptive import GroupBias, TopAFA
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.errors import UserError, suggest
from jaxinterp.trees import named_leaves

PREFIX = "activation/"
KNOWN: tuple[type[Activation], ...] = (ReLU, TopK, BatchTopK, Gated, JumpReLU, TopAFA, GroupBias)


def save_dictionary(dictionary: Dictionary | EffectDictionary, folder: str | Path) -> Path:
    """Write a dictionary into a folder, which is made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_effect = None
    if isinstance(dictionary, EffectDictionary):
        by_effect = {name: getattr(dictionary, name) for name in ("own", "strength")}
        by_effect["sites"] = asdict(dictionary.sites)
        dictionary = dictionary.dictionary
    activation = dictionary.activation
    settings = {field.name: getattr(activation, field.name) for field in fields(activation) if _static(field)}  # type: ignore[arg-type]
    static = {
        "format": 1,
        "activation": {"kind": type(activation).__name__, **settings},
        "sites": asdict(dictionary.sites),
    } | ({"by_effect": by_effect} if by_effect else {})
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(dictionary).items()}
    save_file(arrays, folder / "dictionary.safetensors")
    (folder / "dictionary.json").write_text(json.dumps(static, indent=2) + "\n")
    return folder


def load_dictionary(
    folder: str | Path, *, activations: Sequence[type[Activation]] = KNOWN
) -> Dictionary | EffectDictionary:
    """Read a dictionary back.

    Args:
      activations: the classes that the file may name; add your own. No code is loaded by name.
    Raises:
      UserError: a file is missing or damaged, an array is missing or left over, or the activation is unknown.
    """
    folder = Path(folder)
    for name in ("dictionary.json", "dictionary.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"no {name} in {folder}: give the folder that save_dictionary wrote.")
    try:
        static = json.loads((folder / "dictionary.json").read_text())
        arrays = {name: jnp.asarray(array) for name, array in load_file(folder / "dictionary.safetensors").items()}
        settings = dict(static["activation"])
        kind, sites = settings.pop("kind"), _sites(static["sites"])
        by_effect = static.get("by_effect")
        if by_effect is not None:
            by_effect = dict(by_effect, sites=_sites(by_effect["sites"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the dictionary in {folder} is damaged: {error}") from error
    known = {activation.__name__: activation for activation in activations}
    if kind not in known:
        raise UserError(
            f"activation {kind!r} in {folder} is unknown: pass its class in activations.{suggest(kind, known)}"
        )
    own = {name.removeprefix(PREFIX): array for name, array in arrays.items() if name.startswith(PREFIX)}
    leaves: dict[str, Any] = {name: array for name, array in arrays.items() if not name.startswith(PREFIX)}
    expected = {field.name for field in fields(Dictionary)} - {"activation", "sites", "skip"}
    if set(leaves) - {"skip"} != expected:
        different = sorted(set(leaves) ^ expected - {"skip"})
        raise UserError(f"the dictionary in {folder} is damaged: arrays {different} are missing or unknown.")
    try:
        activation = known[kind](**settings, **own)
    except TypeError as error:
        raise UserError(f"the dictionary in {folder} is damaged: {error}") from error
    dictionary = Dictionary(**{"skip": None, **leaves}, activation=activation, sites=sites)
    if by_effect is None:
        return dictionary
    try:
        return EffectDictionary(dictionary, **by_effect)
    except TypeError as error:
        raise UserError(f"the dictionary in {folder} is damaged: {error}") from error


def _sites(names: dict[str, Any]) -> Sites:
    # JSON knows no tuples.
    return Sites(**{port: tuple(name) if isinstance(name, list) else name for port, name in names.items()})


def _static(field: Any) -> bool:
    return bool(field.metadata.get("static", False))
