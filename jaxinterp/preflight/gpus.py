"""NVIDIA GPUs that are described, not present: peak figures, and devices to compile for.

jax 0.12 (Python 3.12+) with its CUDA plugin compiles whole programs for a described GPU. Autotuning needs a device and
is off, so that temporary memory may differ by a little on one.

`h100:8` is eight GPUs of one machine, `h100:8x4` four such machines. Inside a machine GPUs exchange over NVLink (or PCI
Express), between machines over the network; a collective whose devices are in several machines is counted at the
network's rate.

Sources: NVIDIA's data sheets and architecture papers of A100, H100, H200, L4, Ada and Blackwell (dense bfloat16
products with float32 sums; bytes per second; NVLink in one direction). The network is what each vendor's
eight-GPU reference machine has per GPU (A100: 200 Gb/s, H100 to B200: 400 Gb/s); L4 and RTX 4090: 100 Gb/s a machine
of eight. Recalled and checked against no page: L2 sizes and clocks, which only the compiler's cost model reads.
"""

import re
from dataclasses import dataclass
from typing import Any

from jaxinterp.core.errors import UserError, suggest

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """What one GPU can do, and what the compiler asks about it.

    flops: bfloat16 operations a second; memory in bytes; memory_bandwidth, link (to its neighbours in the machine) and
    network (to other machines, one GPU's share) in bytes a second; capability: CUDA compute capability; cores:
    streaming multiprocessors; shared: bytes of shared memory per core, and per block where asked for.
    """

    name: str
    flops: float
    memory: int
    memory_bandwidth: float
    link: float
    network: float
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    cache: int
    shared: tuple[int, int]
    product: str

    @property
    def description(self) -> str:
        """The text from which XLA makes a device (`gpu_device_info`)."""
        per_core, per_block = self.shared
        threads = 1536 if self.capability == (8, 9) else 2048
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
  core_count: {self.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth:.0f} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.product}" """


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 80 * 10**9, 2039 * GB, 300 * GB, 25 * GB, (8, 0), 108, 1.41, 40 * 2**20, (167936, 166912),
            "NVIDIA A100-SXM4-80GB"),
        Gpu("h100", 989.4e12, 80 * 10**9, 3350 * GB, 450 * GB, 50 * GB, (9, 0), 132, 1.98, 50 * 2**20, (233472, 232448),
            "NVIDIA H100 80GB HBM3"),
        Gpu("h200", 989.4e12, 141 * 10**9, 4800 * GB, 450 * GB, 50 * GB, (9, 0), 132, 1.98, 50 * 2**20,
            (233472, 232448), "NVIDIA H200"),
        Gpu("b200", 2250e12, 180 * 10**9, 8000 * GB, 900 * GB, 50 * GB, (10, 0), 148, 1.965, 126 * 2**20,
            (233472, 232448), "NVIDIA B200"),
        Gpu("l4", 121e12, 24 * 10**9, 300 * GB, 32 * GB, 1.5 * GB, (8, 9), 58, 2.04, 48 * 2**20, (102400, 101376),
            "NVIDIA L4"),
        Gpu("rtx4090", 165.2e12, 24 * 10**9, 1008 * GB, 32 * GB, 1.5 * GB, (8, 9), 128, 2.52, 72 * 2**20,
            (102400, 101376), "NVIDIA GeForce RTX 4090"),
    )
}  # fmt: skip

UNTUNED: dict[str, str | int] = {"xla_gpu_autotune_level": 0}
"""Compiler options of a program for a GPU that is not here: autotuning would run it."""


def gpus_of(text: str, shape: str) -> tuple[int, int]:
    """GPUs of a machine, and machines, of `8` or `8x4`.

    Raises:
      UserError: another form.
    """
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", shape)
    if found is None:
        name = text.partition(":")[0]
        raise UserError(
            f"preflight={text!r}: write {name}:8 for eight GPUs of one machine, or {name}:8x4 for four such machines."
        )
    return int(found[1]), int(found[2] or 1)


def described(gpu: Gpu, per_machine: int, machines: int) -> tuple[Any, ...]:
    """The devices, from the CUDA compiler: no GPU is needed.

    Raises:
      UserError: the compiler is not installed.
    """
    import jax
    from jax.experimental import topologies

    topology = f"1x{machines}x{per_machine}"
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=gpu.description, topology=topology)
        return tuple(found.devices)
    except Exception as error:  # a missing plugin and an unknown description come in many types
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"preflight={gpu.name}:{per_machine}x{machines}: this jax ({jax.__version__}) does not compile for a GPU "
            f"that is not here ({words}). That takes Python 3.12+, jax 0.12+ and its CUDA plugin: pip install "
            "'jaxinterp[cuda]'."
        ) from error


def unknown(text: str, name: str, others: list[str]) -> UserError:
    """What to say of a chip that is not in the tables."""
    known = [*others, *GPUS, "cpu", "auto"]
    return UserError(f"preflight={text!r}: unknown chip {name!r}; known: {', '.join(known)}.{suggest(name, known)}")
