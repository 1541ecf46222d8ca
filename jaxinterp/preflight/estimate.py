"""From a compiled step to what a run needs: does it fit, how long does a step take, what bounds it.

    operations    what the compiler does itself: its own cycles / clock; where one is not known (CPU, GPU, tpu7x), the
                  larger of FLOPs / peak and bytes accessed / memory bandwidth (on a CPU their sum: a core does one
                  or the other)
    kernels       of ours: the larger of FLOPs / peak and bytes / memory bandwidth, each as the kernel states them
    interconnect  bytes that a device sends in a ring / interconnect bandwidth
    input         tokens / what the hosts read, by this machine's own pace
    step          the larger of input and operations + kernels + interconnect (nothing is assumed to overlap)

On devices that are here (`cpu:8`), peaks are measured first: virtual devices share the machine.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinterp.preflight.chips import Chip
from jaxinterp.preflight.compiled import Program
from jaxinterp.preflight.hlo import Kernel, Work
from jaxinterp.training.mesh import make_mesh, over_data

SPARE = 0.9
"""The share of a chip's memory that a program may use: the runtime keeps some."""


@dataclass(frozen=True)
class Estimate:
    """What one step needs on one device, in seconds and bytes.

    read_per_second: tokens that all hosts read; refused: the compiler said that memory is too small.
    """

    chip: Chip
    program: Program
    devices: int
    tokens: int
    steps: int
    read_per_second: float = float("inf")
    refused: bool = False

    @property
    def bytes_needed(self) -> int:
        return sum(self.program.memory.values())

    @property
    def temporary(self) -> int:
        """What is needed within a step only, as far as it is known."""
        return sum(size for name, size in self.program.memory.items() if name.startswith("temporary"))

    @property
    def fits(self) -> bool:
        return not self.refused and self.bytes_needed <= SPARE * self.chip.memory

    @property
    def compute(self) -> float:
        """At peak: no step is shorter."""
        return self.program.flops / self.chip.flops

    @property
    def memory(self) -> float:
        return self.program.bytes_accessed / self.chip.memory_bandwidth

    @property
    def input(self) -> float:
        return self.tokens / self.read_per_second

    @property
    def by_cycles(self) -> bool:
        """Whether the compiler gives cycles, and the chip's clock is known."""
        return self.chip.clock is not None and self.program.always.cycles is not None

    def operations(self, work: Work) -> float:
        """Seconds of the operations that the compiler gave cycles to."""
        return (work.cycles or 0) / (self.chip.clock or 1.0) if self.by_cycles else 0.0

    def kernel(self, kernel: Kernel) -> float:
        """Seconds of a kernel of this package, in a step."""
        return kernel.times * max(kernel.flops / self.chip.flops, kernel.bytes / self.chip.memory_bandwidth)

    def interconnect(self, work: Work) -> float:
        """Seconds that exchanges take: those between machines at the network's rate."""
        chip = self.chip
        between = chip.network or chip.interconnect
        return 0.0 + sum(
            each.sent / (between if each.crosses(chip.machine) else chip.interconnect) for each in work.collectives
        )

    def _busy(self, work: Work) -> float:
        return self.operations(work) + sum(map(self.kernel, work.kernels))

    @property
    def seconds(self) -> float:
        """A step in which no conditional does more than it must."""
        always = self.program.always
        busy = max(self._busy(always), self.compute)
        if not self.by_cycles:
            busy = max(busy, self.memory) if self.chip.overlaps else max(busy, self.compute + self.memory)
        return max(self.input, busy + self.interconnect(always))

    @property
    def seconds_at_most(self) -> float:
        """A step in which every conditional takes its costliest branch."""
        besides = self.program.besides
        return self.seconds + self._busy(besides) + self.interconnect(besides)

    @property
    def bound(self) -> str:
        always = self.program.always
        parts = {
            "compute": self.compute,
            # Of the compiler's cycles, what products at peak do not take: copies, small operations, waiting for memory.
            "memory bandwidth": max(0.0, self._busy(always) - self.compute) if self.by_cycles else self.memory,
            "interconnect": self.interconnect(always),
            "input": self.input,
        }
        return max(parts, key=lambda name: parts[name])

    @property
    def device_hours(self) -> float:
        return self.seconds * self.steps * self.devices / 3600

    def lines(self) -> list[str]:
        """The estimate in words."""
        chip, program = self.chip, self.program
        memory = ", ".join(f"{name} {in_bytes(size)}" for name, size in program.memory.items())
        always, besides = program.always, program.besides
        found = [
            f"memory on a device: {in_bytes(self.bytes_needed)} of {in_bytes(chip.memory)} "
            f"({self.bytes_needed / chip.memory:.0%}): "
            + ("it fits" if self.fits else f"it DOES NOT FIT (limit {SPARE:.0%})"),
            f"  {memory}",
        ]
        if not program.flops:
            return found
        found += [
            f"collectives on a device and step: {in_bytes(program.collective_bytes)} of operands{_by_kind(always)}",
            f"work on a device and step: {program.flops:.3g} FLOP ({in_time(self.compute)} at peak), at most "
            f"{in_bytes(program.bytes_accessed)} accessed ({in_time(self.memory)})",
        ]
        if self.by_cycles:
            found.append(f"  compiler's own cycles: {always.cycles:,.0f} ({in_time(self.operations(always))})")
        if always.kernels:
            parts = ", ".join(f"{kernel.name} {in_time(self.kernel(kernel))}" for kernel in always.kernels)
            found.append(f"  kernels of this package, as they state their cost: {parts}")
        found.append(
            f"step: {in_time(self.seconds)}, of which interconnect {in_time(self.interconnect(always))}; input "
            f"{in_time(self.input)}; bound by {self.bound}"
        )
        if self.seconds_at_most > 1.01 * self.seconds:
            more = in_bytes(sum(each.total for each in besides.collectives))
            found.append(
                f"  {in_time(self.seconds_at_most)} where every conditional takes its costliest branch (AuxK, while "
                f"features are dead): {more} more exchanged{_by_kind(besides)}"
            )
        found.append(
            f"{self.tokens / self.seconds:,.0f} tokens/s; {self.steps} steps: {in_time(self.seconds * self.steps)}, "
            f"{self.device_hours:.3g} device-hours"
        )
        return found


def _by_kind(work: Work) -> str:
    sizes: dict[str, list[int]] = {}
    for each in work.collectives:
        sizes.setdefault(each.kind, []).append(each.total)
    said = ", ".join(f"{len(each)} {kind} {in_bytes(sum(each))}" for kind, each in sizes.items())
    return f": {said}" if said else ""


def measured(devices: tuple[Any, ...], memory: int, working: int) -> Chip:
    """The peaks of one of these devices while all are busy, from a product and a copy in float32.

    Args:
      memory: bytes that the device has.
      working: bytes that the program works on: what fits a cache is copied faster.
    """
    spread = over_data(make_mesh(len(devices), devices=devices))
    side, length = 768, min(max(working // 8, 2**14), 2**23)
    square = jax.device_put(jnp.ones((len(devices), side, side)), spread)
    line = jax.device_put(jnp.ones((len(devices), length)), spread)
    product = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x) / side, out_shardings=spread)
    copy = jax.jit(lambda x: x + 1.0, out_shardings=spread)
    flops = 2 * side**3 / _usual(product, square)
    bandwidth = 2 * 4 * length / _usual(copy, line)
    overlaps = devices[0].platform != "cpu"
    return Chip(devices[0].device_kind, flops, memory, bandwidth, bandwidth, overlaps=overlaps)


def _usual(function: Any, x: Any) -> float:
    """The median of its seconds, as a step in the middle of others would find the machine."""
    function(x).block_until_ready()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        function(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def in_bytes(size: int | float) -> str:
    """A number of bytes for people: 1.5 GB, with 1024 of each in the next."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TB"


def in_time(seconds: float) -> str:
    """A duration for people: 231 ms."""
    for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
