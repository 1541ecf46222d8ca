"""The authors' semi-NMF, in a process and under an interpreter of its own: `PYTHON -m benchmarks.factor_peer FOLDER`.

`benchmarks.factor --peers PYTHON --authors FOLDER` starts it (benchmarks/workers.py). FOLDER is a copy of the paper's
repository (2506.10920; ordavid-s/snmf-mlp-decomposition), the interpreter has torch. What is measured is the library's
own `NMFSemiNMF.fit` from its random start, its loss at every update included.
"""

import os
import sys
import tempfile

from benchmarks.workers import Part, Shape, Start, serve

UPDATES = 5
SPARSITY = 0.01


def load() -> Start:
    """Imports torch and the authors' class, and returns how its part is made ready."""
    sys.path.insert(0, os.path.abspath(sys.argv[1]))
    import torch
    from factorization.seminmf import NMFSemiNMF

    os.chdir(tempfile.mkdtemp())  # `fit` appends to a file in the current folder

    def started(shape: Shape) -> tuple[dict[str, object], dict[str, Part]]:
        torch.manual_seed(0)
        rows = torch.randn(shape.width, shape.tokens)

        def fit() -> dict[str, object]:
            model = NMFSemiNMF(shape.features, sparsity=SPARSITY)
            model.fit(rows, max_iter=UPDATES, verbose=False, init="random")
            return {}

        fit()
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}, {"fit": fit}

    return started


if __name__ == "__main__":
    serve(load)
