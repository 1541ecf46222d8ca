"""What a chip can do at most: the one table of peak figures, and devices that are described, not present.

bf16 FLOP/s, memory and its bandwidth, interconnect bandwidth of a chip in one direction, all links together (half of
the bidirectional figure that is published). `clock` is what the peak and the matrix units give: FLOP/s / (2 * rows *
columns * units). Where JAX sees a chip as two devices, each is half a chip.

Sources: Google Cloud's pages of v5e, v5p, v6e and TPU7x (docs.cloud.google.com/tpu/docs/v6e and so on). Recalled, and
checked against no page: the interconnect of v4.
"""

import os
import re
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxinterp.core.errors import UserError
from jaxinterp.preflight import gpus


@dataclass(frozen=True)
class Chip:
    """Peak figures of one device: FLOP/s, bytes, bytes/s; `clock` in Hz turns the compiler's cycles into seconds.

    overlaps: whether memory is read while products are computed. With several machines, `machine`
    is how many devices one has, `network` what one device sends to the others, in bytes/s.
    """

    name: str
    flops: float
    memory: int
    memory_bandwidth: float
    interconnect: float
    clock: float | None = None
    overlaps: bool = True
    machine: int | None = None
    network: float | None = None


GB = 1e9
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2**30, 1228 * GB, 300 * GB, 1.05e9),
        Chip("v5e", 197e12, 16 * 2**30, 819 * GB, 200 * GB, 1.5e9),
        Chip("v5p", 459e12, 95 * 2**30, 2765 * GB, 600 * GB, 1.75e9),
        Chip("v6e", 918e12, 32 * 2**30, 1638 * GB, 400 * GB, 1.75e9),
        Chip("tpu7x", 2307e12, 192 * 2**30, 7380 * GB, 600 * GB),
    )
}

NOT_A_CLOUD = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Keeps the TPU compiler from asking a cloud for its TPU, and from a lock: it runs nothing."""

TORUS_AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}


@dataclass(frozen=True)
class Target:
    """Devices to compile for, and what one of them can do; `chip` None: measure it, the devices are here."""

    text: str
    devices: tuple[Any, ...]
    chip: Chip | None


def find(text: str) -> Target:
    """The devices that a target names: `v5p:4x4x4`, `h200:8`, `h100:8x4`, `cpu:8`; `auto`: those that are here.

    Raises:
      UserError: an unknown chip, a shape that it does not come in, no TPU compiler, or too few CPU devices.
    """
    if text == "auto":
        devices = tuple(jax.devices())
        kind = devices[0].device_kind.lower()
        known = {"tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5p": "v5p", "tpu v5": "v5p", "tpu v6 lite": "v6e"}
        chip = CHIPS.get(known.get(kind, ""))
        return Target(text, devices, chip and of_a_device(chip, devices))
    name, _, shape = text.partition(":")
    if name == "cpu":
        return _cpu(text, shape)
    if name in gpus.GPUS:
        return _gpus(text, gpus.GPUS[name], shape)
    if name not in CHIPS:
        raise gpus.unknown(text, name, [*CHIPS])
    if not re.fullmatch("x".join([r"[1-9]\d*"] * TORUS_AXES[name]), shape):
        example = "x".join(["4"] * TORUS_AXES[name])
        raise UserError(f"preflight={text!r}: {name} comes in {TORUS_AXES[name]} dimensions, such as {name}:{example}.")
    devices = _described(name, shape)
    return Target(text, devices, of_a_device(CHIPS[name], devices))


def of_a_device(chip: Chip, devices: tuple[Any, ...]) -> Chip:
    """The share of a chip that one of these devices is."""
    share = 1 + max(getattr(device, "core_on_chip", 0) for device in devices)
    return replace(
        chip,
        flops=chip.flops / share,
        memory=chip.memory // share,
        memory_bandwidth=chip.memory_bandwidth / share,
        interconnect=chip.interconnect / share,
    )


def _gpus(text: str, gpu: gpus.Gpu, shape: str) -> Target:
    per_machine, machines = gpus.gpus_of(text, shape)
    devices = gpus.described(gpu, per_machine, machines)
    chip = Chip(gpu.name, gpu.flops, gpu.memory, gpu.memory_bandwidth, gpu.link)
    return Target(text, devices, replace(chip, machine=per_machine, network=gpu.network) if machines > 1 else chip)


def _cpu(text: str, count: str) -> Target:
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"preflight={text!r}: write it as cpu:8, with the number of virtual devices.")
    devices = jax.devices("cpu")
    if int(count) > len(devices):
        raise UserError(
            f"preflight={text!r} needs {count} virtual devices, but there are {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return Target(text, tuple(devices[: int(count)]), None)


def _described(name: str, shape: str) -> tuple[Any, ...]:
    """The devices of a topology, from the TPU compiler: no TPU is needed."""
    from jax.experimental import topologies

    for variable, value in NOT_A_CLOUD.items():
        os.environ.setdefault(variable, value)
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}").devices)
    except Exception as error:  # a missing library and an unknown shape come in many types
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"preflight={name}:{shape}: the TPU compiler does not describe it ({words}). It is in the wheel libtpu: "
            "pip install 'jaxinterp[tpu]'; shapes are those in which the chips are rented."
        ) from error
