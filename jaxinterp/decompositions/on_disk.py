"""What decompositions on disk share: a `.json` file (what is static) beside a `.safetensors` file (the arrays).

Every array stands under its leaf name. Activations are named by their class and looked up among known ones: no code is
loaded by name. Arrays must have the dtypes and the common shapes that the annotations of their fields say.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
from jaxtyping import AbstractArray, Array, PyTree, jaxtyped
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.activations import Activation, BatchTopK, ReLU, TopK
from jaxinterp.decompositions.adaptive import GroupBias, TopAFA
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.decompositions.group_max import GroupMax

KNOWN: tuple[type[Activation], ...] = (ReLU, TopK, BatchTopK, Gated, JumpReLU, TopAFA, GroupBias, GroupMax)
"""The activations that a file may name without being told of them."""

FORMAT = 1
"""Raised when older readers could no longer understand what is written."""


def read(folder: Path, name: str, form: int = FORMAT) -> tuple[dict[str, Json], dict[str, Array]]:
    """(what is static, the arrays by leaf name) of what `write` wrote; to be called inside `damage`.

    Raises:
      UserError: a file is missing, or of another format.
    """
    for file in (f"{name}.json", f"{name}.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"no {file} in {folder}: give the folder that save_{name} wrote.")
    static = json.loads((folder / f"{name}.json").read_text())
    if static["format"] != form:
        raise UserError(
            f"format={static['format']!r} of {folder} is not {form}, which this version reads: read it with the "
            "version that wrote it."
        )
    arrays = load_file(folder / f"{name}.safetensors")
    return static, {leaf_name: jnp.asarray(array) for leaf_name, array in arrays.items()}


@contextmanager
def damage(folder: Path) -> Iterator[None]:
    """Within it, what goes wrong with a file's content is raised as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the decomposition in {folder} is damaged: {type(error).__name__}: {error}") from error


def take(arrays: dict[str, PyTree], prefix: str) -> dict[str, Array]:
    """The arrays below a prefix, taken out."""
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


def make_activation(
    settings: Mapping[str, Json], arrays: Mapping[str, PyTree], folder: Path, activations: Sequence[type[Activation]]
) -> PyTree:
    """The activation that `describe_activation` described, with its arrays.

    Raises:
      UserError: its class is not among those given.
    """
    known = {activation.__name__: activation for activation in activations}
    kind = settings["kind"]
    if kind not in known:
        raise UserError(
            f"activation {kind!r} in {folder} is unknown: pass its class in activations.{suggest(kind, known)}"
        )
    return known[kind](**{name: value for name, value in settings.items() if name != "kind"}, **arrays)


def make_sites(names: Mapping[str, Json]) -> Sites:
    """What `describe_sites` described; JSON knows no tuples."""
    return Sites(**{port: tuple(name) if isinstance(name, list) else name for port, name in names.items()})


def check_arrays(modules: Sequence[Any], folder: Path) -> None:
    """Raises UserError if arrays of these modules have other dtypes than annotated, or sizes that do not agree."""
    with jaxtyped("context"):  # within it, one name of a size stands for one number
        for module in modules:
            for field in fields(module):
                value = getattr(module, field.name)
                kinds = [kind for kind in (field.type, *get_args(field.type)) if _is_array_type(kind)]
                several = tuple(value.values()) if isinstance(value, dict) else value
                for array in several if isinstance(several, tuple) else (several,):
                    if kinds and array is not None and not any(isinstance(array, kind) for kind in kinds):
                        wanted = " or ".join(kind.__name__ for kind in kinds)
                        raise UserError(
                            f"the decomposition in {folder} is damaged: {field.name} is {array.dtype}"
                            f"{list(array.shape)}, which is not a {wanted} that agrees with the arrays before it."
                        )


def _is_array_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, AbstractArray)
