"""From a compiled step to what a run needs: does it fit, how long does a step take, what bounds it.

    compute       the larger of FLOPs / peak and the compiler's own cycles / clock, where it gives any
    memory        bytes accessed / memory bandwidth
    interconnect  bytes of the collectives' operands / interconnect bandwidth
    step          the larger of compute and memory, plus interconnect (nothing is assumed to overlap)

On devices that are here (`cpu:8`), peaks are measured first: virtual devices share the machine.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxinterp.preflight.chips import Chip
from jaxinterp.preflight.compiled import Program
from jaxinterp.training.mesh import make_mesh, over_data

SPARE = 0.9
"""The share of a chip's memory that a program may use: the runtime keeps some."""


@dataclass(frozen=True)
class Estimate:
    """What one step needs on one device, in seconds and bytes."""

    chip: Chip
    program: Program
    devices: int
    tokens: int
    steps: int

    @property
    def bytes_needed(self) -> int:
        return sum(self.program.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes_needed <= SPARE * self.chip.memory

    @property
    def compute(self) -> float:
        by_cycles = (self.program.cycles or 0.0) / self.chip.clock if self.chip.clock else 0.0
        return max(self.program.flops / self.chip.flops, by_cycles)

    @property
    def memory(self) -> float:
        return self.program.bytes_accessed / self.chip.memory_bandwidth

    @property
    def interconnect(self) -> float:
        return self.program.collective_bytes / self.chip.interconnect

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory) + self.interconnect

    @property
    def bound(self) -> str:
        parts = {"compute": self.compute, "memory bandwidth": self.memory, "interconnect": self.interconnect}
        return max(parts, key=lambda name: parts[name])

    @property
    def device_hours(self) -> float:
        return self.seconds * self.steps * self.devices / 3600

    def lines(self) -> list[str]:
        """The estimate in words."""
        chip, program = self.chip, self.program
        share = self.bytes_needed / chip.memory
        memory = ", ".join(f"{name} {_bytes(size)}" for name, size in program.memory.items())
        by_kind: dict[str, list[int]] = {}
        for each in program.collectives:
            by_kind.setdefault(each.kind, []).append(each.operand_bytes * each.times)
        exchanged = ", ".join(f"{len(sizes)} {kind} {_bytes(sum(sizes))}" for kind, sizes in by_kind.items())
        cycles = "none given" if program.cycles is None else f"{program.cycles:,.0f}"
        return [
            f"memory on a device: {_bytes(self.bytes_needed)} of {_bytes(chip.memory)} ({share:.0%}): "
            + ("it fits" if self.fits else f"it DOES NOT FIT (limit {SPARE:.0%})"),
            f"  {memory}",
            f"collectives on a device and step: {_bytes(program.collective_bytes)}"
            + (f": {exchanged}" if exchanged else ""),
            f"work on a device and step: {program.flops:.3g} FLOP, {_bytes(program.bytes_accessed)} accessed, "
            f"compiler's cycles: {cycles}",
            f"step: {_time(self.seconds)} = max(compute {_time(self.compute)}, memory {_time(self.memory)}) + "
            f"interconnect {_time(self.interconnect)}; bound by {self.bound}",
            f"{self.tokens / self.seconds:,.0f} tokens/s; {self.steps} steps: {_time(self.seconds * self.steps)}, "
            f"{self.device_hours:.3g} device-hours",
        ]


def measured(devices: tuple[Any, ...], memory: int) -> Chip:
    """The peaks of one of these devices while all are busy, from a product and a copy in float32."""
    spread = over_data(make_mesh(len(devices), devices=devices))
    side, length = 768, 2**23
    square = jax.device_put(jnp.ones((len(devices), side, side)), spread)
    line = jax.device_put(jnp.ones((len(devices), length)), spread)
    product = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x) / side, out_shardings=spread)
    copy = jax.jit(lambda x: x + 1.0, out_shardings=spread)
    flops = 2 * side**3 / _fastest(product, square)
    bandwidth = 2 * 4 * length / _fastest(copy, line)
    return Chip(devices[0].device_kind, flops, memory, bandwidth, bandwidth)


def _fastest(function: Any, x: Any) -> float:
    function(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _bytes(size: int | float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TB"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
