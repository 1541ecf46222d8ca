"""What a run will hold in memory, from shapes alone, before anything is computed.

    model     the frozen weights
    state     the decomposition, the optimizer's moments, counters
    buffer    the shuffle buffer, or all kept rows
    step      at least one batch of the arrays that are read and written, in float32

Bytes on one device. What a step needs besides (the model's own activations, the compiler's temporary arrays) is known
only when it is compiled: `jaxinterp preflight` says that.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxinterp.training.program import Program


def memory_needed(program: Program, model: PyTree) -> dict[str, int]:
    """Bytes on one device, by what needs them: the module's list."""
    state = program.abstract_state(model)
    rows = program.take.shapes(model, program.abstract_windows()) if program.rows != "none" else None
    widths = [] if rows is None else [array.size for array in rows.arrays.values()]
    return {
        "model": _bytes(model),
        "state": _bytes((state.method, state.step)),
        "buffer": _bytes(state.buffer),
        "step": sum(widths) * 4 // program.mesh.shape["data"],
    }


def _bytes(tree: PyTree) -> int:
    """Of the arrays of a tree, what lies on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
            total += math.prod(shape) * leaf.dtype.itemsize
    return total


def said(needed: dict[str, int]) -> str:
    """`memory: at least 1.21 GB a device (model 0.54, state 0.09, buffer 0.42, step 0.16)`."""
    gb = {name: size / 1e9 for name, size in needed.items()}
    parts = ", ".join(f"{name} {size:.2g}" for name, size in gb.items())
    return f"memory: at least {sum(gb.values()):.2g} GB a device ({parts}), and what the step's program needs besides"
