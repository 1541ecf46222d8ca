"""One codec for every decomposition on disk: what is static as JSON, the arrays as safetensors, under their leaf names.

    decomposition.json          {"format": 2, "tree": {"class": "Dictionary", "fields": {...}}}
    decomposition.safetensors   encoder, encoder_bias, activation/threshold_parameter, ...

A class is described by its name and its declared fields. Loading looks the name up in a given list: no code is loaded
by name, and files from outside are data. Sites, tuples and None are kept as they are; a function, or anything else that
JSON has no word for, is refused when it is saved.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import equinox as eqx
import numpy as np
from jaxtyping import Array, PyTree

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.sites import Needs, Sites
from jaxinterp.decompositions.activations import Activation
from jaxinterp.decompositions.on_disk import check_arrays, damage, read
from jaxinterp.storage.files import write_arrays, write_text

NAME = "decomposition"

FORMAT = 2
"""Raised when older readers could no longer understand what is written; 1 had a file form for each kind."""


PLAIN: tuple[type, ...] = (Sites, Needs)
"""Classes of the vocabulary that any decomposition may hold."""


def write_tree(tree: PyTree, folder: Path) -> Path:
    """Write any module made of declared fields into a folder, which is made if it is not there.

    Raises:
      UserError: a field holds something that has no form on disk; the disk is full.
    """
    arrays: dict[str, np.ndarray] = {}
    described = _described(tree, "", arrays)
    write_arrays(folder / f"{NAME}.safetensors", arrays)
    write_text(folder / f"{NAME}.json", json.dumps({"format": FORMAT, "tree": described}, indent=2) + "\n")
    return folder


def read_tree(folder: Path, kinds: Sequence[type]) -> PyTree:
    """What `write_tree` wrote.

    Args:
      kinds: the classes that the file may name.
    Raises:
      UserError: a file is missing or damaged, an array is missing, left over or of another shape than its field says,
        or a class is not among those given.
    """
    with damage(folder):
        static, arrays = read(folder, NAME, FORMAT)
        known = {kind.__name__: kind for kind in (*PLAIN, *kinds)}
        tree = _made(static["tree"], "", arrays, known, folder)
        if arrays:
            raise UserError(f"the decomposition in {folder} is damaged: unknown arrays {sorted(arrays)[:3]}.")
        return tree


def _described(value: PyTree, name: str, arrays: dict[str, np.ndarray]) -> PyTree:
    """A JSON value for what is static; arrays go into `arrays` by their leaf name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if eqx.is_array(value):
        arrays[name] = np.asarray(value)
        return {"array": name}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_described(each, _below(name, str(place)), arrays) for place, each in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(each, _below(name, key), arrays) for key, each in value.items()}}
    if is_dataclass(value) and not isinstance(value, type):
        own = {f.name: _described(vars(value)[f.name], _below(name, f.name), arrays) for f in fields(value)}
        return {"class": type(value).__name__, "fields": own}
    where = f"field {name!r}" if name else "this"
    raise UserError(
        f"{where} is a {type(value).__name__}, which has no form on disk: save modules made of arrays, numbers, words "
        "and other modules; of a Fit, its .decomposition."
    )


def _made(described: PyTree, name: str, arrays: dict[str, Array], known: Mapping[str, type], folder: Path) -> PyTree:
    """The inverse of `_described`; arrays that are used are taken out."""
    if not isinstance(described, dict):
        return described
    if "array" in described:
        if described["array"] != name or name not in arrays:
            raise UserError(f"the decomposition in {folder} is damaged: array {name!r} is missing.")
        return arrays.pop(name)
    if "tuple" in described or "list" in described:
        entries: list[PyTree] = described["tuple"] if "tuple" in described else described["list"]
        made = [_made(each, _below(name, str(place)), arrays, known, folder) for place, each in enumerate(entries)]
        return tuple(made) if "tuple" in described else made
    if "dict" in described:
        inside = described["dict"]
        return {key: _made(each, _below(name, key), arrays, known, folder) for key, each in inside.items()}
    kind = described["class"]
    if kind not in known:
        raise UserError(f"{kind!r} in {folder} is unknown: pass its class in kinds=(...).{suggest(str(kind), known)}")
    own = described["fields"]
    values = {key: _made(each, _below(name, key), arrays, known, folder) for key, each in own.items()}
    made_one = _filled(known[str(kind)], values, folder)
    if isinstance(made_one, eqx.Module):  # an activation's arrays agree in size with those of what holds it
        check_arrays((made_one, *(each for each in values.values() if isinstance(each, Activation))), folder)
    return made_one


def _filled(kind: type, values: Mapping[str, PyTree], folder: Path) -> PyTree:
    """An object of the class with these fields.

    Raises:
      UserError: its fields are other ones, or its own checks refuse them.
    """
    expected = {field.name for field in fields(kind)}
    if set(values) != expected:
        different = sorted(set(values) ^ expected)
        raise UserError(f"{kind.__name__} in {folder} has other fields than this version's: {different}.")
    settable = {field.name for field in fields(kind) if field.init}
    return kind(**{name: value for name, value in values.items() if name in settable})


def _below(name: str, part: str) -> str:
    return f"{name}/{part}" if name else part
