"""What older versions wrote: a file form for each kind. Kept here so that reading it stays tested."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import Sites
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.by_effect import EffectDictionary
from jaxinterp.decompositions.cross_layer import CrossLayer
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.on_disk import FORMAT
from jaxinterp.storage.files import write_arrays, write_text


def write(folder: str | Path, name: str, static: Mapping[str, Any], tree: Any) -> Path:
    """Write `<name>.json` and `<name>.safetensors` into a folder, which is made if it is not there."""
    folder = Path(folder)
    arrays = {leaf_name: np.asarray(leaf) for leaf_name, leaf in named_leaves(tree).items()}
    write_arrays(folder / f"{name}.safetensors", arrays)
    write_text(folder / f"{name}.json", json.dumps({"format": FORMAT, **static}, indent=2) + "\n")
    return folder


def describe_activation(activation: Any) -> dict[str, Any]:
    """The class of an activation, and what is static of it."""
    static = [field.name for field in fields(activation) if field.metadata.get("static", False)]
    return {"kind": type(activation).__name__} | {name: getattr(activation, name) for name in static}


def describe_sites(sites: Sites) -> dict[str, Any]:
    """As JSON has it."""
    return asdict(sites)


def save_dictionary(dictionary: Dictionary | EffectDictionary, folder: str | Path) -> Path:
    """Write a dictionary into a folder, which is made if it is not there."""
    by_effect: dict[str, Any] = {}
    if isinstance(dictionary, EffectDictionary):
        settings = {name: getattr(dictionary, name) for name in ("own", "strength")}
        by_effect = {"by_effect": settings | {"sites": describe_sites(dictionary.sites)}}
        dictionary = dictionary.dictionary
    static = {
        "activation": describe_activation(dictionary.activation),
        "sites": describe_sites(dictionary.sites),
    }
    return write(folder, "dictionary", static | by_effect, dictionary)


def save_cross_layer(cross: CrossLayer, folder: str | Path) -> Path:
    """Write a cross-layer transcoder into a folder, which is made if it is not there."""
    activations = [describe_activation(layer.activation) for layer in cross.layers]
    return write(folder, "cross_layer", {"sites": describe_sites(cross.sites), "activations": activations}, cross)


def save_module(decomposition: eqx.Module, folder: str | Path) -> Path:
    """Write a module of arrays, numbers, words, sites and other such modules into a folder.

    Raises:
      UserError: a field holds something else.
    """
    return write(folder, "module", {"module": _described(decomposition)}, decomposition)


def _described(module: eqx.Module) -> dict[str, Any]:
    static: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    absent: list[str] = []
    for field in fields(module):
        value = module.__dict__[field.name]
        if value is None:
            absent.append(field.name)
        elif isinstance(value, Sites):
            static[field.name] = {"sites": describe_sites(value)}
        elif isinstance(value, eqx.Module):
            parts[field.name] = _described(value)
        elif isinstance(value, tuple) and all(isinstance(each, int | float | str) for each in value):
            static[field.name] = {"tuple": list(value)}
        elif isinstance(value, bool | int | float | str):
            static[field.name] = value
        elif not eqx.is_array(value):
            raise UserError(
                f"{type(module).__name__}.{field.name} is a {type(value).__name__}: it has no form on disk."
            )
    return {"class": type(module).__name__, "static": static, "parts": parts, "absent": absent}
