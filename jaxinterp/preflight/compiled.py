"""What a compiled program says of itself: bytes on a device, collectives, work, the compiler's own cycles."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from jaxinterp.trees import named_leaves

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
CALLEES = r"(body|condition|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}


@dataclass(frozen=True)
class Collective:
    """One exchange between devices: its kind, the bytes of its operands on a device, how often a step does it."""

    kind: str
    operand_bytes: int
    times: int


@dataclass(frozen=True)
class Program:
    """A compiled step, on one device.

    memory: bytes by what they are; flops and bytes_accessed: of a step; cycles: what the compiler expects its own
    operations to take, without kernels of ours; None where it says nothing.
    """

    memory: dict[str, int]
    flops: float
    bytes_accessed: float
    collectives: tuple[Collective, ...]
    cycles: float | None

    @property
    def collective_bytes(self) -> int:
        """Bytes of all collectives' operands, per device and step."""
        return sum(each.operand_bytes * each.times for each in self.collectives)


def read(compiled: Any, model: Any, state: Any) -> Program:
    """The numbers of a compiled step ((model, windows), state)."""
    text = compiled.as_text()
    analysis = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    memory = {
        "model weights": _bytes_on_a_device(model),
        "dictionary": _bytes_on_a_device(getattr(state.method, "decomposition", state.method)),
        "optimizer": _bytes_on_a_device(getattr(state.method, "optimizer", ())),
        "activation buffer": _bytes_on_a_device(state.buffer),
        "temporary": int(analysis.temp_size_in_bytes),
    }
    rest = int(analysis.argument_size_in_bytes) - sum(size for name, size in memory.items() if name != "temporary")
    fresh = int(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    memory["text, keys, new outputs"] = max(0, rest) + max(0, fresh)
    computations = _computations(text)
    repeats = _repeats(computations)
    return Program(
        memory,
        flops=float(cost.get("flops", 0.0)),
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=tuple(_collectives(computations, repeats)),
        cycles=_cycles(computations, repeats),
    )


def _bytes_on_a_device(tree: Any) -> int:
    def size(leaf: Any) -> int:
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


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation of an HLO text, by its name; the entry is called ENTRY."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            current = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return found


def _repeats(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often a step runs each computation: loops as often as the compiler knows, else once; fusions not counted."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, ()):
            trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
            for field, callee in re.findall(
                r"(body|condition|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", line
            ):
                if field in ("to_apply", "calls") and " call(" not in line and "async" not in line:
                    continue
                visit(callee, count * (int(trips[1]) if trips and field == "body" else 1))

    visit("ENTRY", 1)
    return times


def _collectives(computations: dict[str, list[str]], repeats: dict[str, int]) -> list[Collective]:
    found = []
    for name, times in repeats.items():
        sizes = {}
        for line in computations.get(name, ()):
            defined = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) [\w\-]+\(", line)
            if defined:
                sizes[defined[1]] = _size(defined[2])
            match = re.search(rf" ({'|'.join(KINDS)})(-start)?\((.*?)\)", line)
            if match and defined:
                operands = re.findall(r"%([\w.\-]+)", match[3])
                given = sum(sizes.get(operand, 0) for operand in operands)
                found.append(Collective(match[1], given or _size(match[3]) or _size(defined[2]), times))
    return found


def _size(types: str) -> int:
    total = 0
    for kind, axes in re.findall(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]", types):
        count = BYTES.get(kind, 4)
        for axis in filter(None, axes.split(",")):
            count *= int(axis)
        total += count
    return total


def _cycles(computations: dict[str, list[str]], repeats: dict[str, int]) -> float | None:
    total, said = 0.0, False
    for name, times in repeats.items():
        for line in computations.get(name, ()):
            match = re.search(r'"estimated_cycles":"(\d+)"', line)
            if match:
                total, said = total + int(match[1]) * times, True
    return total if said else None
