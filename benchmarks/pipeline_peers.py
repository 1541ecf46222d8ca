"""Whole training jobs of two PyTorch libraries, each in a process of its own, under an interpreter of their own.

    sparsify   EleutherAI's `Trainer.fit` on transformers' `LlamaModel` without a head: the whole model runs, as its
               hook lets it. bfloat16 weights, as its command loads SmolLM2's file; its own parameters are float32
    saelens    `SAETrainer.fit`, fed by the same model's layers up to the hooked MLP, float32: what comes behind the
               hook is not run, rows are not shuffled

`benchmarks.pipeline --peers PYTHON` starts `PYTHON -m benchmarks.pipeline_peers LIBRARY JOB`. Both train on the MLP's
output with Adam, k a token, AuxK off; benchmarks/peers.py says how to install them.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

from benchmarks.peers import LEARNING_RATE, PACKAGES
from benchmarks.pipeline_job import Job, Turns
from benchmarks.workers import Part, Shape, Start, serve

STEPS = 100_000
WINDOWS = 1024
Runs = Callable[[Job, Shape, Any], Callable[[Turns], Any]]


def load(library: str, job: Job) -> Start:
    """Imports a library, and returns how its job is made ready."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    runs: Runs = {"sparsify": _sparsify, "saelens": _saelens}[library]()

    def start(shape: Shape) -> tuple[dict[str, Any], dict[str, Part]]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=job.vocab, hidden_size=job.width, intermediate_size=job.d_mlp, num_hidden_layers=job.layers,
            num_attention_heads=job.heads, num_key_value_heads=job.kv_heads, max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, use_cache=False,
        )  # fmt: skip
        model = LlamaModel(config).to(getattr(torch, job.dtype)).eval()
        turns = Turns(runs(job, shape, model))

        def turn() -> dict[str, Any]:
            turns.turn()
            return {"tokens": job.steps * shape.tokens}

        about = {"version": version(PACKAGES[library]), "threads": torch.get_num_threads(), "dtype": job.dtype}
        return about, {"job": turn}

    return start


class Windows:
    """Random windows as a dataset without end, which pauses where a turn ends."""

    def __init__(self, job: Job, turns: Turns, batch: int):
        import torch

        self._ids = torch.from_numpy(job.tokens(WINDOWS)).long()
        self._turns, self._turn, self._batch = turns, job.steps * batch, batch

    def __len__(self) -> int:
        return STEPS * self._batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index and index % self._turn == 0:
            self._turns.pause()
        return {"input_ids": self._ids[index % len(self._ids)]}


def _sparsify() -> Runs:
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    def runs(job: Job, shape: Shape, model: Any) -> Callable[[Turns], Any]:
        batch = shape.tokens // job.seq
        config = TrainConfig(
            SparseCoderConfig(num_latents=shape.features, k=shape.k), batch_size=batch, optimizer="adam",
            lr=LEARNING_RATE, hookpoints=[f"layers.{job.layer}.mlp"], log_to_wandb=False, save_every=10 * STEPS,
        )  # fmt: skip
        return lambda turns: Trainer(config, Windows(job, turns, batch), model).fit()  # type: ignore[arg-type]

    return runs


class Behind(Exception):
    """The hook has been reached."""


def _saelens() -> Runs:
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def rows(job: Job, shape: Shape, model: Any, turns: Turns) -> Iterator[Any]:
        batch = shape.tokens // job.seq
        ids = torch.from_numpy(job.tokens(WINDOWS)).long()
        found: list[Any] = []

        def hook(_module: Any, _given: Any, out: Any) -> None:
            found.append(out)
            raise Behind

        model.layers[job.layer].mlp.register_forward_hook(hook)
        for step in range(STEPS):
            if step and step % job.steps == 0:
                turns.pause()
            first = step * batch % (len(ids) - batch + 1)
            try:
                with torch.no_grad():
                    model(ids[first : first + batch])
            except Behind:
                yield found.pop().reshape(-1, job.width)

    def runs(job: Job, shape: Shape, model: Any) -> Callable[[Turns], Any]:
        config = TopKTrainingSAEConfig(
            d_in=shape.width, d_sae=shape.features, k=shape.k, device="cpu", dtype="float32", aux_loss_coefficient=0.0
        )
        settings = SAETrainerConfig(
            total_training_samples=STEPS * shape.tokens, train_batch_size_samples=shape.tokens, lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10, lr_warm_up_steps=1000, device="cpu", logger=LoggingConfig(log_to_wandb=False),
            n_checkpoints=0,
        )  # fmt: skip
        return lambda turns: SAETrainer(settings, TopKTrainingSAE(config), rows(job, shape, model, turns)).fit()

    return runs


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], Job.parse(sys.argv[2])))
