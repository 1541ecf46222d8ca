"""Decompositions that are plain modules, on disk, in the form of `codec`; and in that of older versions, which is read
and no longer written: `module.json` (classes and what is static) beside `module.safetensors` (every array by its name).

Classes come from a list that the reader gives: a file names them and runs no code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions import codec
from jaxinterp.decompositions.directions import Directions
from jaxinterp.decompositions.experts import DenseNeurons, DenseStudent, Experts, Router, Scaling
from jaxinterp.decompositions.factor_analysers import FactorAnalysers
from jaxinterp.decompositions.on_disk import check_arrays, damage, make_sites, read
from jaxinterp.decompositions.parts import NonnegativeParts

MODULES: tuple[type[eqx.Module], ...] = (
    DenseNeurons, DenseStudent, Directions, Experts, FactorAnalysers, NonnegativeParts, Router, Scaling,
)  # fmt: skip
"""The classes that a file may name without more being said."""

NAME = "module"


def save_module(decomposition: eqx.Module, folder: str | Path) -> Path:
    """Write a module of arrays, numbers, words, sites and other such modules, in the one form of all decompositions.

    Raises:
      UserError: a field holds something else.
    """
    return codec.write_tree(decomposition, Path(folder))


def load_module(
    folder: str | Path, *, classes: Sequence[type[eqx.Module]] = MODULES, activations: Sequence[Any] = ()
) -> PyTree:
    """Read back what `save_module` wrote.

    Args:
      classes: those that the file may name; add your own.
      activations: not used; the loaders of all kinds are called alike.
    Raises:
      UserError: a file is missing or damaged, an array is missing, left over or of another shape than the others, or a
        class is unknown.
    """
    folder = Path(folder)
    if (folder / f"{codec.NAME}.json").is_file():
        return codec.read_tree(folder, tuple(classes))
    with damage(folder):
        static, arrays = read(folder, NAME)
        left = dict(arrays)
        made = _made(static["module"], left, "", {one.__name__: one for one in classes}, folder)
        if left:
            raise UserError(f"the decomposition in {folder} is damaged: arrays {sorted(left)} are unknown.")
        return made


def _made(
    described: Mapping[str, Json], arrays: dict[str, PyTree], prefix: str, known: Mapping[str, type], folder: Path
) -> PyTree:
    name = described["class"]
    if name not in known:
        raise UserError(f"class {name!r} in {folder} is unknown: pass it in classes.{suggest(name, known)}")
    values: dict[str, PyTree] = dict.fromkeys(described["absent"])
    for field, value in described["static"].items():
        values[field] = value
        if isinstance(value, Mapping):
            values[field] = tuple(value["tuple"]) if "tuple" in value else make_sites(value["sites"])
    for field, part in described["parts"].items():
        values[field] = _made(part, arrays, f"{prefix}{field}/", known, folder)
    for field in fields(known[name]):
        if field.name not in values:
            if f"{prefix}{field.name}" not in arrays:
                raise UserError(f"the decomposition in {folder} is damaged: array {prefix + field.name!r} is missing.")
            values[field.name] = arrays.pop(f"{prefix}{field.name}")
    made = known[name](**values)
    check_arrays((made,), folder)
    return made
