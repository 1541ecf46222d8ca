"""Running a pass a few tokens at a time, so that what stands between its input and its output stays small."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

PRE_ACTIVATIONS = 512
"""Tokens whose pre-activations (one number per feature) stand in memory, and in the CPU's cache, at a time."""


def split(arrays: Any, size: int) -> Any:
    """Every array of a tree as [chunks, at most `size`, ...]; all chunks are equal, the last filled up with zeros."""
    tokens = jax.tree.leaves(arrays)[0].shape[0]
    chunks = max(1, -(-tokens // size))
    even = -(-tokens // chunks)

    def one(array: Array) -> Array:
        padded = jnp.pad(array, [(0, chunks * even - tokens)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(chunks, even, *array.shape[1:])

    return jax.tree.map(one, arrays)


def mapped(function: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """function(arrays), computed for at most `size` tokens at a time."""
    tokens = jax.tree.leaves(arrays)[0].shape[0]
    if tokens <= size:
        return function(arrays)
    results = jax.lax.map(function, split(arrays, size))
    return jax.tree.map(lambda result: result.reshape(-1, *result.shape[2:])[:tokens], results)
