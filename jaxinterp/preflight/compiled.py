"""What a compiled program says of itself: bytes on a device, collectives, work, the compiler's own cycles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jaxinterp.core.trees import named_leaves
from jaxinterp.data.activations import Rows
from jaxinterp.preflight.hlo import Work, read_work


@dataclass(frozen=True)
class Program:
    """A compiled step, on one device.

    memory: bytes by what they are; flops and bytes_accessed: of a step, by the compiler's count, in which a gather
    accesses all of what it gathers from; always: what every step does; besides: what a step does more where every
    conditional takes its costliest branch.
    """

    memory: dict[str, int]
    flops: float
    bytes_accessed: float
    always: Work
    besides: Work

    @property
    def collective_bytes(self) -> int:
        """Bytes of the operands of every step's collectives, per device."""
        return sum(each.total for each in self.always.collectives)


def read(
    compiled: Any, model: PyTree, state: PyTree, count: Callable[[], dict[str, float]], rows: Rows | None = None
) -> Program:
    """The numbers of a compiled step ((model, windows), state); `count` where the compiler counts no operations."""
    analysis = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    if not cost.get("flops"):
        cost = count()  # of a described GPU
    memory = held(model, state, rows)
    rest = int(analysis.argument_size_in_bytes) - sum(memory.values())
    fresh = int(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    memory["temporary"] = int(analysis.temp_size_in_bytes)
    memory["text, keys, new outputs"] = max(0, rest) + max(0, fresh)
    flops, accessed = float(cost.get("flops", 0.0)), float(cost.get("bytes accessed", 0.0))
    return Program(memory, flops, accessed, *read_work(compiled.as_text()))


def held(model: PyTree, state: PyTree, rows: Rows | None = None) -> dict[str, int]:
    """Bytes that a device holds between steps, by what they are; from shapes and shardings alone.

    Args:
      rows: those that are kept, of a method that sweeps over them.
    """
    besides = {
        "kept rows": _bytes_on_a_device(rows),
        "codes, moments, sources": _bytes_on_a_device(getattr(state.method, "aux", ())),
    }
    return {
        "model weights": _bytes_on_a_device(model),
        "dictionary": _bytes_on_a_device(getattr(state.method, "decomposition", state.method)),
        "optimizer": _bytes_on_a_device(getattr(state.method, "optimizer", ())),
        "activation buffer": _bytes_on_a_device(state.buffer),
    } | {name: size for name, size in besides.items() if size}


def _bytes_on_a_device(tree: PyTree) -> int:
    def size(leaf: PyTree) -> int:
        dtype = leaf.dtype
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            return 8
        shape = leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) is not None else leaf.shape
        total = dtype.itemsize
        for axis in shape:
            total *= axis
        return int(total)

    kept = (leaf for leaf in named_leaves(tree).values() if isinstance(leaf, Array | jax.ShapeDtypeStruct))
    return sum(size(leaf) for leaf in kept)
