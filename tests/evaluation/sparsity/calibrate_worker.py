"""One process of several: `python -m tests.evaluation.sparsity.calibrate_worker OUT MESH`. See test_calibrate.py."""

import sys
from pathlib import Path

from jaxinterp.training.hosts import join

HIDDEN, PRE = "blocks/0/mlp/hidden", "blocks/1/mlp/pre"


def windows(seed):
    """Eight windows of 6 bytes; position 0 has no weight."""
    import numpy as np

    weight = np.ones((8, 6), np.float32)
    weight[:, 0] = 0
    return {"tokens": np.random.default_rng(seed).integers(0, 256, (8, 6)).astype(np.int32), "weight": weight}


def sums(mesh=None):
    """Summaries over two batches: what one process and several must find alike."""
    from jaxinterp.evaluation.sparsity.calibrate import calibrate
    from jaxinterp.models.leave_out import BySize
    from jaxinterp.models.load import load

    wanted = {"hidden": (HIDDEN, BySize()), "pre": (PRE, BySize(activation="gelu"))}
    found = calibrate(load("tiny").model, [windows(0), windows(1)], wanted, mesh=mesh)
    return {f"{key}.{field}": value for key, summary in found.items() for field, value in vars(summary).items()}


def main(out: str, mesh: str) -> None:
    join()
    import jax
    import numpy as np

    from jaxinterp.training.mesh import parse_mesh

    np.savez(Path(out) / f"{jax.process_index()}.npz", **sums(parse_mesh(mesh)))
    print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
