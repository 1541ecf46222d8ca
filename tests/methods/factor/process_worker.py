"""One process of two: every lifter but that of gradients (see tests/training), through `fit`. Started by
test_processes.py: `python -m tests.methods.factor.process_worker OUT`."""

import sys
from pathlib import Path


def runs():
    """Name -> (method, options of fit)."""
    from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
    from jaxinterp.methods.factor.semi_nmf import SemiNMF
    from tests.extending.closed_form import WriteDirections

    stream = {"site": "blocks/1/mlp", "steps": 4, "batch_size": 256, "buffer_batches": 2, "log_every": 2}
    kept = {"site": "blocks/1/mlp", "steps": 10, "batch_size": 256, "rows": 1024, "log_every": 5}
    return {
        "alternating": (SemiNMF(features=16, sparsity=0.25), kept),
        "streaming": (LocalInteractionBasis(directions=8, probes=4), stream),
        "closed form": (WriteDirections(1), {}),
    }


def main(out: str) -> None:
    from jaxinterp.training.hosts import join

    join()
    import jax
    import numpy as np

    from jaxinterp.core.trees import named_leaves
    from jaxinterp.models.load import load
    from jaxinterp.training.fit import fit
    from jaxinterp.training.mesh import fetch, model_shardings, parse_mesh
    from tests.training.hosted import text

    mesh = parse_mesh("data=2,feature=4")
    subject = load("tiny", sharding=model_shardings(mesh))
    for name, (method, options) in runs().items():
        tokens = () if name == "closed form" else (text(),)
        arrays = named_leaves(fetch(fit(method, subject, *tokens, **options, mesh=mesh).decomposition))
        if jax.process_index() == 0:
            held = {leaf.replace("/", "."): np.asarray(array) for leaf, array in arrays.items()}
            np.savez(Path(out) / f"{name}.npz", **held)
    if jax.process_index() == 0:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
