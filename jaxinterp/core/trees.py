"""Names in a pytree: the key path is the name.

A node reached by `.blocks[3].mlp` is called `blocks/3/mlp`. There is no registry and no hook table: every name that
the framework prints, accepts or writes to disk is made here.
"""

from collections.abc import Mapping

import jax
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json


def path_name(path: tuple[PyTree, ...]) -> str:
    """The name of a key path: its attribute names, keys and indices joined by `/`."""
    return "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)


def named_leaves(tree: PyTree) -> dict[str, PyTree]:
    """Every leaf of `tree` by its name, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def fill_leaves(tree: PyTree, leaves: Mapping[str, PyTree]) -> PyTree:
    """A copy of `tree` with every leaf taken from `leaves` by its name.

    Raises:
      UserError: a leaf of the tree has no entry, or an entry has no leaf in the tree.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [path_name(path) for path, _ in paths]
    missing = [name for name in names if name not in leaves]
    if missing:
        raise UserError(f"missing array {missing[0]!r} ({len(missing)} missing in all).{suggest(missing[0], leaves)}")
    known = set(names)
    extra = [name for name in leaves if name not in known]
    if extra:
        raise UserError(f"unexpected array {extra[0]!r} ({len(extra)} in all).{suggest(extra[0], names)}")
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in names])


def first_difference(saved: Json, asked: Json, field: str = "") -> tuple[str, Json, Json] | None:
    """The first field in which two JSON values differ: (dotted name, saved value, asked value), or None."""
    if isinstance(saved, Mapping) and isinstance(asked, Mapping):
        for key in [*saved, *(key for key in asked if key not in saved)]:
            name = f"{field}.{key}" if field else str(key)
            difference = first_difference(saved.get(key), asked.get(key), name)
            if difference is not None:
                return difference
        return None
    return None if saved == asked else (field, saved, asked)
