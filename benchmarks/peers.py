"""The training steps of three PyTorch libraries, each in a process of its own, under an interpreter of their own.

    sparsify             EleutherAI's `SparseCoder`, trained as the loop of its `Trainer` does
    dictionary_learning  `AutoEncoderTopK`, trained by `TopKTrainer.update`
    saelens              `TopKTrainingSAE`, trained by `SAETrainer.step`
    torch                no step but the encoder matmul alone, PyTorch's own floor

`benchmarks.topk --peers PYTHON` starts `PYTHON -m benchmarks.peers LIBRARY` and talks to it (benchmarks/workers.py).

Every step is the library's own, from forward pass to norm constraint: Adam of torch.optim with a warm-up, AuxK off,
float32. What each does beyond that is left as it is: sparsify and dictionary_learning take the part along the write
vectors out of the decoder's gradient and make its rows unit vectors again, SAELens ranks by code times decoder norm
instead; dictionary_learning and SAELens clip the gradient's norm; all three subtract a trained decoder bias from the
encoder's input, and keep count of what fired. sparsify decodes with `embedding_bag` (Triton is for GPUs). SAELens
keeps dense codes: its option `use_sparse_activations` fails on a CPU with this torch.

The environment (Python 3.11 or newer, 2.3 GB; pinned to what was measured):

    python3 -m venv PEERS
    PEERS/bin/python -m pip install --dry-run --no-deps --report - --quiet torch==2.13.0     # must say 2.13.0+cpu
    PEERS/bin/python -m pip install torch==2.13.0
    PEERS/bin/python -m pip install torch==2.13.0 eai-sparsify==1.3.3 dictionary-learning==0.1.0 sae-lens==6.54.12
    PEERS/bin/python -m pip uninstall --yes torchvision
    python -m benchmarks.topk --peers PEERS/bin/python

Where the dry run says something else than +cpu, install torch from PyTorch's index of CPU builds first. torchvision
comes with nnsight, is not needed, and may not fit a CPU build of torch: then `import transformers` fails in all three.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from benchmarks.workers import Part, Shape, Start, activations, serve

LEARNING_RATE = 1e-3
STEPS = 100_000  # a training run long enough that no schedule ends
Batches = Callable[[], Any]


def load(library: str) -> Start:
    """Imports a library, and returns how its step is made ready."""
    import torch

    makers = {"sparsify": _sparsify, "dictionary_learning": _dictionary_learning, "saelens": _saelens, "torch": _torch}
    make = makers[library]()

    def started(shape: Shape) -> tuple[dict[str, Any], dict[str, Part]]:
        torch.manual_seed(0)
        batches = [torch.from_numpy(batch) for batch in activations(shape)]
        # Losses are sums of squared errors per token but sparsify's, which is divided by the variance already.
        variance = 1.0 if library == "sparsify" else float((batches[0] - batches[0].mean(0)).pow(2).sum(1).mean())
        step = make(shape)
        done = 0

        def one_step() -> dict[str, Any]:
            nonlocal done
            loss = step(done, batches[done % len(batches)])
            done += 1
            return {"fvu": loss / variance, "steps": done}

        return {"version": version(PACKAGES[library]), "threads": torch.get_num_threads()}, {"step": one_step}

    return started


PACKAGES = {
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
    "saelens": "sae-lens",
    "torch": "torch",
}


def _sparsify() -> Callable[[Shape], Callable[[int, Any], float]]:
    import torch
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    def make(shape: Shape) -> Callable[[int, Any], float]:
        coder = SparseCoder(shape.width, SparseCoderConfig(num_latents=shape.features, k=shape.k))
        optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)
        scheduler = get_linear_schedule_with_warmup(optimizer, 1000, STEPS)
        since_fired = torch.zeros(shape.features, dtype=torch.long)
        did_fire = torch.zeros(shape.features, dtype=torch.bool)

        def step(number: int, x: torch.Tensor) -> float:  # sparsify.trainer.Trainer.fit, for one hook and no mask
            if number == 0:
                coder.b_dec.data = x.mean(0)
            coder.set_decoder_norm_to_unit_norm()
            total_variance = (x - x.mean(0)).pow(2).sum()
            out = coder(x=x, y=x, dead_mask=None, total_variance=total_variance)
            did_fire[out.latent_indices.flatten()] = True
            fvu = float(out.fvu.detach())
            (out.fvu + out.multi_topk_fvu / 8).backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            with torch.no_grad():
                since_fired.add_(x.shape[0])
                since_fired[did_fire] = 0
                did_fire.zero_()
            return fvu

        return step

    return make


def _dictionary_learning() -> Callable[[Shape], Callable[[int, Any], float]]:
    from dictionary_learning.trainers.top_k import TopKTrainer

    def make(shape: Shape) -> Callable[[int, Any], float]:
        trainer = TopKTrainer(
            steps=STEPS, activation_dim=shape.width, dict_size=shape.features, k=shape.k, layer=0, lm_name="none",
            lr=LEARNING_RATE, auxk_alpha=0.0, warmup_steps=1000, seed=0, device="cpu",
        )  # fmt: skip
        return trainer.update

    return make


def _saelens() -> Callable[[Shape], Callable[[int, Any], float]]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def make(shape: Shape) -> Callable[[int, Any], float]:
        config = TopKTrainingSAEConfig(
            d_in=shape.width, d_sae=shape.features, k=shape.k, device="cpu", dtype="float32", aux_loss_coefficient=0.0
        )
        settings = SAETrainerConfig(
            total_training_samples=STEPS * shape.tokens, train_batch_size_samples=shape.tokens, lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10, lr_warm_up_steps=1000, device="cpu", logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        trainer = SAETrainer(settings, TopKTrainingSAE(config), data_provider=iter(()))

        def step(number: int, x: Any) -> float:  # what SAETrainer.fit does with a batch
            trainer.maybe_reset_sparsity()
            output = trainer.step(x)
            trainer.n_training_steps += 1
            return float(output.loss.detach())

        return step

    return make


def _torch() -> Callable[[Shape], Callable[[int, Any], float]]:
    import torch

    def make(shape: Shape) -> Callable[[int, Any], float]:
        rows = torch.randn(shape.features, shape.width)
        return lambda number, x: float((x @ rows.T)[0, 0])

    return make


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PACKAGES:
        sys.exit(f"usage: python -m benchmarks.peers {{{','.join(PACKAGES)}}}, started by benchmarks.topk --peers")
    serve(lambda: load(sys.argv[1]))
