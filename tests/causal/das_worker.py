"""One process of several: `python -m tests.causal.das_worker OUT MESH ...`. Started by test_spread.py."""

import sys
from pathlib import Path

from jaxinterp.training.hosts import join


def method():
    """DAS and LinEAS on the tiny model: what one process and two must find alike."""
    import numpy as np

    from jaxinterp.methods.causal.das import DAS
    from jaxinterp.methods.causal.lineas import LinEAS

    ids = np.random.default_rng(0).integers(0, 256, (2, 8, 6))
    base, source = (tuple(tuple(int(id) for id in row) for row in rows) for rows in ids)
    answer = tuple(range(65, 73))
    site = "blocks/1/resid/post"
    return {
        "das": DAS(base, source, answer, site, k=2, rate=0.05),
        "lineas": LinEAS(base, source, (site,), gamma=0.01, rate=0.01),
    }


def arrays(mesh=None):
    """What `fit` finds in ten steps of each."""
    from jaxinterp.core.trees import named_leaves
    from jaxinterp.models.load import load
    from jaxinterp.training.fit import fit
    from jaxinterp.training.mesh import fetch, model_shardings

    subject = load("tiny") if mesh is None else load("tiny", sharding=model_shardings(mesh))
    found = {}
    for name, own in method().items():
        result = fit(own, subject, steps=10, mesh=mesh, log_every=5)
        leaves = named_leaves(fetch(result.decomposition) if mesh is not None else result.decomposition)
        found |= {f"{name}.{key.replace('/', '.')}": leaf for key, leaf in leaves.items()}
        last = result.history[-1]
        found[f"{name}.loss"] = last["loss"]
    return found


def main(out: str, *meshes: str) -> None:
    join()
    import jax
    import numpy as np

    from jaxinterp.training.mesh import parse_mesh

    for mesh in meshes:
        found = arrays(parse_mesh(mesh))
        if jax.process_index() == 0:
            np.savez(Path(out) / f"{mesh}.npz", **found)
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
