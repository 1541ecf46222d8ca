"""What the text of a compiled program says: collectives, kernels of this package, the compiler's own cycles.

An operation that the compiler says nothing of, or no more than that it does not know (SparseCore scatters), has no
cycles. Loops count as often as the compiler knows them to run, else once. Of a conditional, no branch is among what a
step always does; its costliest branch is among what a step does at most (AuxK, which acts on dead features only).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from jaxinterp.preflight.program_text import KINDS, size_of

UNKNOWN = 2**62
"""Cycles from which on the compiler means that it does not know."""


@dataclass(frozen=True)
class Collective:
    """One exchange: its kind, the bytes of its operands on a device, how many devices take part, how often a step.

    chain: of an exchange that the compiler does bit by bit between other operations, the name that all bits have.
    places: of the group whose devices lie farthest apart, their places in the mesh.
    """

    kind: str
    operand_bytes: int
    times: int
    devices: int
    chain: str = ""
    places: tuple[int, ...] = ()

    def crosses(self, machine: int | None) -> bool:
        """Whether devices of several machines take part, each of which has so many."""
        return machine is not None and len({place // machine for place in self.places}) > 1

    @property
    def total(self) -> int:
        """Bytes of operands, per device and step."""
        return self.operand_bytes * self.times

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, in a ring."""
        share = (self.devices - 1) / self.devices
        factors = {"all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share}
        factors["all-gather"] = self.devices - 1.0
        return self.total * factors.get(self.kind, 1.0)


@dataclass(frozen=True)
class Kernel:
    """One Pallas kernel, as it states its own cost: operations, bytes to and from HBM, how often a step."""

    name: str
    flops: float
    bytes: float
    times: int


@dataclass(frozen=True)
class Work:
    """What a device does: exchanges, kernels, and the cycles of all other operations; None where none are given."""

    collectives: tuple[Collective, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    cycles: float | None = None

    def __add__(self, other: "Work") -> "Work":
        known = [work.cycles for work in (self, other) if work.cycles is not None]
        return Work(self.collectives + other.collectives, self.kernels + other.kernels, sum(known) if known else None)

    def times(self, count: int) -> "Work":
        """The same, so many times as often."""
        return Work(
            tuple(replace(each, times=each.times * count) for each in self.collectives),
            tuple(replace(each, times=each.times * count) for each in self.kernels),
            None if self.cycles is None else self.cycles * count,
        )

    @property
    def weight(self) -> float:
        """A number by which branches are compared."""
        return (self.cycles or 0.0) + sum(c.total for c in self.collectives) + sum(k.bytes for k in self.kernels)


def read_work(text: str) -> tuple[Work, Work]:
    """What a step always does, and what it does besides where every conditional takes its costliest branch."""
    always, besides = _of("ENTRY", _computations(text), fused=False)
    return _once(always), _once(besides)


def _once(work: Work) -> Work:
    """Every chain counted once."""
    chains = {each.chain: each for each in work.collectives if each.chain}
    alone = tuple(each for each in work.collectives if not each.chain)
    return replace(work, collectives=alone + tuple(chains.values()))


def _of(name: str, computations: dict[str, list[str]], *, fused: bool) -> tuple[Work, Work]:
    always, besides = Work(), Work()
    lines = computations.get(name, [])
    sizes = {found[1]: size_of(found[2]) for found in map(_defined, lines) if found}
    for line in lines:
        own = _own(line, sizes, name, fused)
        always = always + own
        trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
        for callee, kind in _callees(line):
            less, more = _of(callee, computations, fused=fused or kind == "fusion")
            count = int(trips[1]) if trips and kind == "body" else 1
            always, besides = always + less.times(count), besides + more.times(count)
        branches = [_of(each, computations, fused=False) for each in _branches(line)]
        if branches:
            besides = besides + max((less + more for less, more in branches), key=lambda work: work.weight)
    return always, besides


def _own(line: str, sizes: dict[str, int], computation: str, fused: bool) -> Work:
    """What one operation does itself."""
    defined = _defined(line)
    match = re.search(rf" ({'|'.join(KINDS)})(-start)?\((.*?)\)", line)
    if match and defined:
        operands = re.findall(r"%([\w.\-]+)", match[3])
        given = sum(sizes.get(operand, 0) for operand in operands) or size_of(match[3]) or size_of(defined[2])
        # A TPU's reduce-scatter is a fusion of that name, of an all-reduce and what cuts it.
        kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else match[1]
        chain = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', line)
        widest = max(groups(line), key=lambda group: max(group) - min(group))
        label = f"{chain[1]}/{chain[2]}" if chain else ""
        return Work((Collective(kind, given, 1, len(widest), label, widest),))
    if defined and '"tpu_custom_call"' in line:
        cost = {field: float(value) for field, value in re.findall(r'"(flops|bytes_accessed)":"(\d+)"', line)}
        name = re.sub(r"[.\d]+$", "", defined[1])
        return Work((), (Kernel(name, cost.get("flops", 0.0), cost.get("bytes_accessed", 0.0), 1),))
    cycles = None if fused else re.search(r'"estimated_cycles":"(\d+)"', line)
    return Work(cycles=float(cycles[1])) if cycles and int(cycles[1]) < UNKNOWN else Work()


def _callees(line: str) -> Iterator[tuple[str, str]]:
    """Computations that an operation runs, and how: as a loop's body, fused into it, or as they are."""
    for field, callee in re.findall(r"(body|condition|to_apply|calls)=\{?%?([\w.\-]+)", line):
        if field == "to_apply" and " call(" not in line:
            continue  # what a reduction adds with
        yield callee, "fusion" if " fusion(" in line else field


def _branches(line: str) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", line)
    if several:
        return re.findall(r"%?([\w.\-]+)", several[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)


def _defined(line: str) -> re.Match[str] | None:
    return re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) [\w\-]+\(", line)


def groups(line: str) -> list[tuple[int, ...]]:
    """The devices of each group that takes part in an exchange side by side with the others, by place in the mesh."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line)
    if listed:
        return [tuple(int(n) for n in re.findall(r"\d+", group)) for group in re.findall(r"\{([^{}]*)\}", listed[1])]
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", line)
    if counted:
        shape = (int(counted[1]), int(counted[2]))
        sizes = [int(n) for n in counted[3].split(",")] if counted[3] else [math.prod(shape)]
        order = [int(n) for n in counted[4].split(",")] if counted[4] else list(range(len(sizes)))
        return _rows(np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(shape))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
    if axes:
        names = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        taking = re.findall(r"'(\w+)'", axes[2])
        order = [list(names).index(axis) for axis in [*(name for name in names if name not in taking), *taking]]
        places = np.arange(math.prod(names.values())).reshape(list(names.values())).transpose(order)
        return _rows(places.reshape(-1, math.prod(names[axis] for axis in taking)))
    return [(0, 1)]


def _rows(places: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(place) for place in row) for row in places]


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation, by its name; the entry is called ENTRY."""
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
