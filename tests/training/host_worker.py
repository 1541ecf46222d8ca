"""One process of several: `python -m tests.training.host_worker OUT MESH STEPS`. Started by test_hosts.py."""

import sys
from pathlib import Path

from jaxinterp.training.guard import PREEMPTED, Preempted
from jaxinterp.training.hosts import join


def main(out: str, mesh: str, steps: str) -> None:
    join()
    import jax
    import numpy as np

    from jaxinterp.core.trees import named_leaves
    from jaxinterp.models.load import load
    from jaxinterp.training.fit import fit
    from jaxinterp.training.mesh import fetch, model_shardings, parse_mesh
    from jaxinterp.training.tracking import JsonLines
    from tests.training.hosted import METHOD, SIZES, text

    where, folder = parse_mesh(mesh), Path(out)
    subject = load("tiny", sharding=model_shardings(where))
    log = JsonLines(folder / "log.jsonl", resume=True) if jax.process_index() == 0 else None
    result = fit(
        METHOD,
        subject,
        text(),
        **SIZES | {"steps": int(steps)},
        mesh=where,
        checkpoint=folder / "checkpoints",
        save_every=10,
        resume=True,
        track=(log,) if log else (),
    )
    arrays = named_leaves(fetch(result.decomposition))
    if jax.process_index() == 0:
        np.savez(folder / "result.npz", **{name.replace("/", "."): array for name, array in arrays.items()})
        print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(PREEMPTED)
