"""sparsify on a GPU, in a process and under an interpreter of its own: `PYTHON -m benchmarks.gpu_peer`.

`benchmarks.gpu --peers PYTHON` starts it (benchmarks/workers.py). The environment needs torch for CUDA, triton and
`eai-sparsify`. What is measured is the library's own: `SparseCoder.forward` under its bfloat16 autocast with float32
parameters, its Triton decoder, its fused encoder, AuxK off, and a step as the loop of its `Trainer` has it, with
torch.optim.Adam (fused). Calls follow one another without waiting, as in benchmarks/gpu_programs.py.
"""

import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from benchmarks.timing import timed
from benchmarks.workers import Part, Shape, Start, activations, serve

SPAN = 0.02
LEARNING_RATE = 1e-3


def load() -> Start:
    """Imports torch and sparsify, and returns how their parts are made ready."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.utils import decoder_impl

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    def repeat(call: Callable[[], Any]) -> Part:
        def several(calls: int) -> dict[str, Any]:
            for _ in range(calls):
                call()
            wait()
            return {"calls": calls}

        for _ in range(3):  # Triton tunes itself
            several(1)
        sample, _ = timed(lambda: several(1))
        calls = min(200, max(1, math.ceil(SPAN / sample.wall)))
        return lambda: several(calls)

    def started(shape: Shape) -> tuple[dict[str, Any], dict[str, Part]]:
        torch.manual_seed(0)
        x = torch.from_numpy(activations(shape)[0]).to(device)
        narrow = x.bfloat16()
        coder = SparseCoder(shape.width, SparseCoderConfig(num_latents=shape.features, k=shape.k), device=device)
        optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE, fused=cuda)
        total_variance = (x - x.mean(0)).pow(2).sum()

        def gradient() -> None:
            coder(x=x, y=x, dead_mask=None, total_variance=total_variance).fvu.backward()

        def forward_backward() -> None:
            gradient()
            optimizer.zero_grad()

        def step() -> None:
            coder.set_decoder_norm_to_unit_norm()
            gradient()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()

        parts = {"step": repeat(step)}
        about = {
            "version": version("eai-sparsify"),
            "torch": torch.__version__,
            "device": device,
            "decoder": decoder_impl.__name__,
            "device_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }
        parts["forward+backward"] = repeat(forward_backward)
        with torch.no_grad():
            rows = coder.encoder.weight.bfloat16()
        parts["matmul"] = repeat(lambda: narrow @ rows.T)
        return about | {"parts": list(parts), "failed": {}}, parts

    return started


if __name__ == "__main__":
    serve(load)
