"""Several processes as one run: how they find each other. Nothing here is needed by a run of one process.

On Cloud TPU and under Slurm the processes find each other; elsewhere each is told ADDRESS:PORT,COUNT,INDEX, by hand or
by `jaxinterp launch`, which starts several on this machine. A process that dies takes the others with it
after at most HEARTBEAT seconds; what is saved stays, and the run is resumed.
"""

import importlib.util
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""

TIMEOUTS: dict[str, Json] = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": 24 * 3600}
"""At the end, the others wait for the first process, which scores and writes the report."""

VARIABLE = "JAXINTERP_HOSTS"
"""What the launcher sets for every process that it starts."""


def join(hosts: str = "auto") -> None:
    """Become part of a run of several processes; to be called before anything asks for a device.

    Args:
      hosts: "auto" (join where Cloud TPU, Slurm or the launcher started several; otherwise stay alone), "alone", or
        ADDRESS:PORT,COUNT,INDEX: where process 0 listens, how many processes there are, which one this is.
    Raises:
      UserError: `hosts` is none of these, or the other processes are not found within five minutes.
    """
    if hosts == "auto":
        hosts = os.environ.get(VARIABLE, "auto")
    if hosts == "alone" or (hosts == "auto" and not _started_by_a_cluster()) or jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and do nothing with it
    try:
        if hosts == "auto":
            _join_cluster()
        else:
            address, count, index = _parsed(hosts)
            jax.distributed.initialize(address, count, index, **TIMEOUTS)
    except RuntimeError as error:
        raise UserError(f"hosts={hosts}: the processes of this run did not find each other: {error}") from error


def check_agreement(settings: Mapping[str, Json]) -> None:
    """To be called by all processes of a run; `settings` are plain JSON values.

    Raises:
      UserError: they were given different ones, such as the text of packages that are not the same on every host.
    """
    sums = [zlib.crc32(json.dumps(value).encode()) for value in settings.values()]
    everyones = multihost_utils.process_allgather(np.array(sums, np.uint32))
    for name, column in zip(settings, np.transpose(everyones), strict=True):
        if len(set(column.tolist())) > 1:
            raise UserError(
                f"the processes of this run differ in {name!r} (here {settings[name]!r}): give each the same command, "
                "files and packages."
            )


def _join_cluster() -> None:
    try:
        jax.distributed.initialize(**TIMEOUTS)
    except ValueError as error:
        if _slurm_tasks() > 1 or "coordinator_address" not in str(error):
            raise UserError(f"hosts=auto: the cluster says too little of its processes: {error}") from error
        # A TPU without a cluster around it, as in Colab: alone.


def _parsed(hosts: str) -> tuple[str, int, int]:
    address, count, index = [*hosts.split(","), "", "", ""][:3]
    host, colon, port = address.rpartition(":")
    well_formed = host and colon and port.isdigit() and count.isdigit() and index.isdigit() and hosts.count(",") == 2
    if not well_formed or not int(index) < int(count):
        raise UserError(
            f"hosts={hosts!r}: write it as ADDRESS:PORT,COUNT,INDEX, such as 10.0.0.2:8476,4,0 for the first of four "
            "processes, or auto, or alone."
        )
    return address, int(count), int(index)


def _slurm_tasks() -> int:
    """Of `srun`: a batch script alone is one process."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def _started_by_a_cluster() -> bool:
    """Whether JAX can find the other processes by itself."""
    if _slurm_tasks() > 1:
        return "SLURM_PROCID" in os.environ
    on_tpu = any(Path("/dev").glob("accel*")) or Path("/dev/vfio/0").exists()
    return on_tpu and importlib.util.find_spec("libtpu") is not None
