"""Two fine-tuned models in one: task arithmetic against an ensemble of weights chosen by the input (WEMoE).

Command: python -m experiments.merge --out runs/merge         bilinear-4x128, kjv and shakespeare, 6 CPU minutes

The base goes on on each text; the results are merged, and every model is scored on held-out windows of all texts:

    base, tuned on A, tuned on B
    task arithmetic   θ_0 + λ sum of (θ_i - θ_0), at several λ
    WEMoE at start    the same in attention; each MLP's λ by a router, .3 before it is trained
    WEMoE             its routers trained on windows of both texts, on the entropy of predictions alone, as published

Claim (2402.00433): the ensemble is ahead of task arithmetic on every task, close to the tuned models. The shares that
the routers give each task are measured on both texts. Small: one base, one seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxinterp.commands.shell import (
    check_folder,
    check_positive,
    command,
    folder_of_a_run,
    read_json,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.metrics import Ratio
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Needs
from jaxinterp.data.activations import counted, on_device
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.methods.language_model import LanguageModel, in_float32, next_token_nll
from jaxinterp.methods.recipes import gradient_method
from jaxinterp.models.files.subject import Subject, save_subject
from jaxinterp.models.load import load
from jaxinterp.models.merge import WeightEnsemble, ensemble, task_arithmetic
from jaxinterp.models.run import run
from jaxinterp.training.fit import fit


@dataclass(frozen=True)
class Config:
    """Sizes."""

    out: Path
    """Folder for results; must be empty or absent unless --resume."""
    model: str = "bilinear-4x128"
    """The base."""
    texts: tuple[str, str] = ("kjv", "shakespeare")
    """What the two are tuned on."""
    other: str = "docs"
    """A third text for scoring; empty: none."""
    seq: int = 128
    batch_size: int = 1024
    """Tokens a step."""
    steps: int = 80
    """Of fine-tuning each model."""
    router_steps: int = 30
    learning_rate: float = 1e-3
    router_rate: float = 3e-3
    scales: tuple[float, ...] = (0.3, 0.5, 0.7)
    """λ of task arithmetic."""
    heldout: int = 4096
    """Tokens of each text for scoring."""
    max_tokens: int = 400_000
    """Of each text."""
    seed: int = 0
    resume: bool = False
    """Continue the run in the output folder."""


@dataclass(frozen=True)
class RouterEntropy:
    """Trains the routers of weight ensembles, and nothing else, on the entropy of the next token's distribution."""

    learning_rate: float = 3e-3

    def needs(self, site: Any = None) -> Needs:
        """Windows of text; no array of the subject."""
        return Needs(windows=True, rows="none")

    def recipe(self, steps: int) -> Recipe:
        """Adam."""
        start = lambda key, sample, model: in_float32(model)
        return gradient_method(start, entropy, optax.adam(self.learning_rate), trained=routers)


def entropy(decomposition: PyTree, batch: Any, key: Any, *, model: PyTree = None) -> Any:
    """Mean over next tokens of -sum p log p, nats; no label is read."""
    log_p = jax.nn.log_softmax(run(decomposition, batch.windows["tokens"], keep=()).logits[:, :-1])
    counts = counted(batch.windows)
    loss = Ratio(jnp.sum(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1) * counts), jnp.sum(counts))
    return loss.value(), {"entropy": jax.lax.stop_gradient(loss)}


def routers(model: PyTree) -> PyTree:
    """True at the arrays of routers."""
    marks = jax.tree.map(lambda leaf: False, model)
    of = lambda model: [part for block in model.blocks for part in (block.mlp.inner, block.mlp.outer)]
    return eqx.tree_at(of, marks, [jax.tree.map(eqx.is_inexact_array, part) for part in of(model)])


def main(config: Config) -> None:
    """Tune, merge, score."""
    check_positive(config, "steps", "router_steps", "seq", "batch_size")
    record = settings_of(config)
    check_folder(config.out, record, resume=config.resume)
    base = load(config.model, dtype=jnp.float32)
    names = [*config.texts, *([config.other] if config.other else [])]
    texts = {name: load_text(name, base.tokenizer, seq=config.seq, max_tokens=config.max_tokens) for name in names}
    held = {name: take(heldout, config.heldout, seed=1, rows=8) for name, (_, heldout) in texts.items()}
    with folder_of_a_run(config.out, record) as out:
        path = out / "results.json"
        results: dict[str, Any] = read_json(path) if path.exists() else {}

        def scored(name: str, model: Any) -> None:
            if name not in results:
                results[name] = {text: loss(model, batches) for text, batches in held.items()}
                write_json(path, results)
            say(f"{name:24s} " + "  ".join(f"{text} {ce:.4f}" for text, ce in results[name].items()))

        scored("base", base.model)
        tuned = [tuned_on(name, base, texts[name][0], config) for name in config.texts]
        for name, model in zip(config.texts, tuned, strict=True):
            scored(f"tuned on {name}", model)
        for scale in config.scales:
            scored(f"task arithmetic {scale:g}", task_arithmetic(base.model, tuned, [scale] * 2))
        merged = ensemble(base.model, tuned, jax.random.key(config.seed))
        scored("WEMoE at start", merged)
        if "WEMoE" not in results or "shares" not in results:
            both = Mixed(*(texts[name][0] for name in config.texts))
            found = fit(
                RouterEntropy(config.router_rate),
                Subject(merged, base.tokenizer, "ensemble"),
                grain.MapDataset.source(both),
                steps=config.router_steps,
                batch_size=config.batch_size,
                buffer_batches=1,
                seed=config.seed,
                progress=False,
            )
            scored("WEMoE", found.decomposition)
            results["shares"] = {name: shares(found.decomposition, held[name]) for name in config.texts}
            write_json(path, results)
        for name, by_layer in results["shares"].items():
            say(f"on {name}, λ of {config.texts} by layer: {by_layer}")


class Mixed:
    """Windows of two texts in turn."""

    def __init__(self, first: grain.MapDataset, second: grain.MapDataset):
        self.parts = (first, second)

    def __len__(self) -> int:
        return 2 * min(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        return self.parts[index % 2][index // 2]


def tuned_on(name: str, base: Subject, train: grain.MapDataset, config: Config) -> Any:
    """The base after more steps on a text; kept in the folder."""
    folder = config.out / f"tuned-{name.replace('/', '_')}"
    if not folder.exists():
        found = fit(
            LanguageModel(learning_rate=config.learning_rate),
            base,
            train,
            steps=config.steps,
            batch_size=config.batch_size,
            buffer_batches=1,
            seed=config.seed,
            progress=False,
        )
        save_subject(Subject(found.decomposition, base.tokenizer, folder.name), folder)
    return load(folder, dtype=jnp.float32).model


def loss(model: Any, batches: Sequence[Mapping[str, Any]]) -> float:
    """Cross-entropy, nats."""
    sums = [_summed(model, on_device(batch)) for batch in batches]
    return sum(float(total) for total, _ in sums) / sum(float(count) for _, count in sums)


@eqx.filter_jit
def _summed(model: Any, batch: Any) -> Any:
    counts = counted(batch)
    return jnp.sum(next_token_nll(model, batch["tokens"]) * counts), jnp.sum(counts)


def shares(model: Any, batches: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """λ of both tasks in every layer, mean over windows."""
    found = []
    for index, block in enumerate(model.blocks):
        assert isinstance(block.mlp, WeightEnsemble)
        parts = [
            np.asarray(block.mlp.mixture(run(model, jnp.asarray(batch["tokens"]))[f"blocks/{index}/mlp/in"]))
            for batch in batches[:1]
        ]
        found.append([round(float(share), 3) for share in np.concatenate(parts).mean(0)])
    return found


if __name__ == "__main__":
    command(Config, main, __doc__)
