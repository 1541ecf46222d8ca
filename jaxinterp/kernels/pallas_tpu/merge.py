"""Sorted lists that are merged two by two and kept short, with a record of the greatest value that was dropped.

Each element of an array [levels, ...] is one place of a list; level 0 is the greatest. Where k winners fall into lists
at random, a list of `depth` values loses one of them if depth + 1 share it,

    lost(k, lists, depth) = C(k, depth + 1) / lists^depth        an expectation, and so a bound of the probability

Merges are bitonic: whole levels are compared at a time, so that nothing depends on the data.
"""

from math import comb
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Lists = tuple[Array, ...]
"""Values and places [levels, ...], sorted from level 0 down: a list in each element."""


def lost(k: int, lists: int, depth: int) -> float:
    """The expected number of sets of depth + 1 of the k best in one list, at most the share of tokens that fail."""
    return comb(k, depth + 1) / lists**depth


def enough(k: int, lists: int) -> int:
    """How many values of each of so many lists are kept: fewer would lose one in a thousand tokens."""
    return next(depth for depth in range(1, k + 1) if lost(k, lists, depth) < 1e-3)


def kept_levels(k: int, lists: int) -> int:
    """`enough` while lists are merged: bitonic merges want powers of two."""
    return power(enough(k, lists))


def merged(lists: Lists, gone: Array, width: int, axis: int, k: int) -> tuple[Lists, Array]:
    """Lists, one a place on an axis, merged two by two until `width` are left, and the greatest value dropped."""
    padding = [(0, power(len(lists[0])) - len(lists[0])), (0, 0), (0, 0)]
    lists = tuple(jnp.pad(array, padding, constant_values=-jnp.inf) for array in lists) if padding[0][1] else lists
    while gone.shape[axis] > width:
        levels, half = len(lists[0]), gone.shape[axis] // 2
        halves = [
            [jax.lax.slice_in_dim(array, start, start + half, axis=axis + 1) for array in lists] for start in (0, half)
        ]
        one, other = (
            halves[0],
            [jnp.concatenate([array[i : i + 1] for i in reversed(range(levels))]) for array in halves[1]],
        )
        high, low = compared(one, other)
        gone = jnp.maximum(
            jax.lax.slice_in_dim(gone, 0, half, axis=axis), jax.lax.slice_in_dim(gone, half, 2 * half, axis=axis)
        )
        kept = kept_levels(k, half)
        if kept > levels:
            lists = tuple(jnp.concatenate(pair) for pair in zip(high, low, strict=True))
        else:
            lists, gone = high, jnp.maximum(gone, jnp.max(low[0], axis=0))
        lists = _sorted(lists, levels // 2)
        if kept < levels:
            lists, gone = tuple(array[:kept] for array in lists), jnp.maximum(gone, lists[0][kept])
    return lists, gone


def _sorted(lists: Lists, distance: int) -> Lists:
    """The last rounds of a bitonic sort: levels at a distance are compared, then at half of it, and so on."""
    while distance:
        shape = lists[0].shape
        pairs = [array.reshape(-1, 2, distance, *shape[1:]) for array in lists]
        both = compared([array[:, 0] for array in pairs], [array[:, 1] for array in pairs])
        lists = tuple(jnp.stack(arrays, axis=1).reshape(shape) for arrays in zip(*both, strict=True))
        distance //= 2
    return lists


def compared(a: Any, b: Any) -> tuple[Lists, Lists]:
    """The greater and the smaller of two (value, place); NaN goes into both."""
    first = a[0] >= b[0]
    high = jnp.maximum(a[0], b[0]), jnp.where(first, a[1], b[1])
    return high, (jnp.minimum(a[0], b[0]), jnp.where(first, b[1], a[1]))


def power(number: int) -> int:
    """The least power of two at or above it."""
    return 1 << (number - 1).bit_length()
