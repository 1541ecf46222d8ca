"""Arrays in Orbax's files: their names and checksums there, and what a checkpoint of anybody's holds."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32
from orbax.checkpoint import v1 as ocp

from jaxinterp.core.errors import UserError, first_line
from jaxinterp.core.trees import named_leaves


def read_arrays(folder: str | Path) -> Any:
    """What an Orbax checkpoint holds, ours or anybody's: nested dictionaries and lists, arrays as NumPy's on this host.

    Args:
      folder: of one checkpoint; of a run's checkpoints, that of one step.
    Raises:
      UserError: it is not a checkpoint, it cannot be read, or its arrays would not fit into this machine's memory.
    """
    folder = Path(folder).absolute()
    steps = sorted(
        (path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()), key=lambda p: int(p.name)
    )
    if steps:
        raise UserError(
            f"{folder} holds checkpoints of {len(steps)} steps: give the folder of one, such as {steps[-1]}."
        )
    try:
        shapes: Any = ocp.metadata(folder).metadata
    except Exception as error:  # whatever Orbax makes of other or damaged files
        raise UserError(f"{folder} cannot be read as an Orbax checkpoint: {first_line(error)}") from error

    sizes: list[int] = []

    def empty(leaf: PyTree) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        sizes.append(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize)
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # takes no room, and asks for NumPy arrays

    wanted = jax.tree.map(empty, shapes, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(sizes) > memory:
        raise UserError(
            f"{folder}: its arrays would take {sum(sizes) / 2**30:.3g} GiB, and this machine has {memory / 2**30:.3g} "
            "GiB: read it on a larger one, or save the parameters alone."
        )
    try:
        return ocp.load(folder, wanted)
    except Exception as error:
        raise UserError(f"the arrays of checkpoint {folder} cannot be read: {first_line(error)}") from error


def stored(leaves: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The arrays under names that Orbax can write: it takes `/` for a folder."""
    return {
        file_name(name): leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    }


def file_name(name: str) -> str:
    """What Orbax writes a leaf's array under."""
    return name.replace("/", ".")


def weights_hash(tree: PyTree) -> str:
    """A short hash of a tree's arrays: names, shapes, dtypes and checksums; the same on every mesh."""
    arrays = {name: leaf for name, leaf in named_leaves(tree).items() if isinstance(leaf, jax.Array | np.ndarray)}
    sums = jax.device_get(checksums(arrays))
    described = [[name, list(array.shape), str(array.dtype), int(sums[name])] for name, array in arrays.items()]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


@jax.jit
def checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """The sum of every array's words of bits, each hashed with its place, modulo 2^32: the same on every mesh.

    Without its place, a sum of bits is the same for -W and 2 W of most shapes, and for any order of the rows.
    """
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: Array) -> Array:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mixed(bits ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(bits: Array) -> Array:
    """The final mix of MurmurHash3 (Appleby 2011): every bit of the input changes half of the output's."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
