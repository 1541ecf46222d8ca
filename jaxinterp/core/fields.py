"""Field marks: how an array is trained and along which axis it is spread. They replace lists of names.

    class Dictionary(eqx.Module):
        encoder: Float[Array, "features d"] = eqx.field(metadata=PARAMETER_ROWS)
        mean: Float[Array, " d"] = eqx.field(metadata=STATE)

`trained`: the gradient trains it. `spread`: "feature" (one row a feature) or "token" (one row a token) along the first
axis, None otherwise. A mark holds for everything below its field; the outermost mark decides. An optimizer's state
carries the decomposition's own tree, and so its marks: see `like_parameters`.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Literal

import equinox as eqx
import jax
from jaxtyping import Array, PyTree, PyTreeDef

Spread = Literal["feature", "token"]

PARAMETER = {"trained": True, "spread": None}
"""Metadata of a field that the gradient trains: `bias: Array = eqx.field(metadata=PARAMETER)`."""

PARAMETER_ROWS = {"trained": True, "spread": "feature"}
"""Likewise, with one row a feature: spread over the mesh axis `feature`."""

STATE = {"trained": False, "spread": None}
"""Metadata of a field that the gradient never touches: scales, thresholds, frozen weights."""

STATE_ROWS = {"trained": False, "spread": "feature"}
"""Likewise, with one row a feature."""

TOKEN_ROWS = {"trained": False, "spread": "token"}
"""Metadata of an array of `MethodState.aux` with one row a kept row: spread over the mesh axis `data`."""


class PerToken(eqx.Module):
    """An array with one row a kept row, for an `aux` that needs no class of its own."""

    array: Array = eqx.field(metadata=TOKEN_ROWS)


def trainable(tree: PyTree) -> PyTree:
    """The filter that keeps untrained leaves out of the gradient: True at every array of a `trained` field."""
    return _marked(tree, "trained", True)


def per_feature(tree: PyTree) -> PyTree:
    """True at every array with one row a feature."""
    return _marked(tree, "spread", "feature")


def per_token(tree: PyTree) -> PyTree:
    """True at every array with one row a token."""
    return _marked(tree, "spread", "token")


def like_parameters(
    optimizer: PyTree, decomposition: PyTree, change: Callable[[Array, Array, bool], PyTree], otherwise: PyTree = None
) -> PyTree:
    """An optimizer's state with every moment changed: every part of it that has the decomposition's own tree.

    Args:
      optimizer: of any optax transformation that was started with the trained leaves of the decomposition.
      change: (moment, its parameter, whether the parameter has one row a feature) -> what replaces the moment. A moment
        may have another shape than its parameter (factored second moments).
      otherwise: what replaces every other leaf; None: it stays.
    """
    wanted, parameters = _shape_of(decomposition), jax.tree.leaves(decomposition, is_leaf=_is_gap)
    rows = jax.tree.leaves(per_feature(decomposition), is_leaf=_is_gap)

    def is_moments(node: PyTree) -> bool:
        return _shape_of(node) == wanted

    def changed(node: PyTree) -> PyTree:
        if not is_moments(node):
            return node if otherwise is None else otherwise
        leaves = iter(zip(parameters, rows, strict=True))
        entries, structure = jax.tree.flatten(node, is_leaf=_is_gap)
        own = [(entry, *next(leaves)) for entry in entries]
        return jax.tree.unflatten(structure, [e if _is_gap(e) else change(e, p, bool(r)) for e, p, r in own])

    return jax.tree.map(changed, optimizer, is_leaf=is_moments)


def _is_gap(node: PyTree) -> bool:
    """What optimizers have in the place of a parameter that they don't train: None, or optax's empty MaskedNode."""
    return node is None or (isinstance(node, tuple) and not node)


def _shape_of(tree: PyTree) -> PyTreeDef:
    filled = jax.tree.map(lambda leaf: 0, tree, is_leaf=_is_gap)
    return jax.tree.structure(filled)


def _marked(tree: PyTree, mark: str, value: bool | str) -> PyTree:
    """True at every array whose outermost marked field has this value of the mark."""

    def found(path: tuple[PyTree, ...], leaf: PyTree) -> bool:
        node = tree
        for key in path:
            metadata = _metadata(node, key)
            if mark in metadata:
                is_array = eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
                return is_array and metadata[mark] == value
            node = _child(node, key)
        return False

    return jax.tree_util.tree_map_with_path(found, tree)


def _metadata(node: PyTree, key: PyTree) -> Mapping[str, PyTree]:
    if isinstance(key, jax.tree_util.GetAttrKey) and is_dataclass(node):
        return next((field.metadata for field in fields(node) if field.name == key.name), {})
    return {}


def _child(node: PyTree, key: PyTree) -> PyTree:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name)
    if isinstance(key, jax.tree_util.DictKey):
        return node[key.key]
    return node[key.idx] if isinstance(key, jax.tree_util.SequenceKey) else None
