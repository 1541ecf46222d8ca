"""Parameter components of a language model's MLP: what it loses under each kind of mask.

    python -m experiments.factor_parameters --out runs/parameters               two matrices of bilinear-4x128
    python -m experiments.factor_parameters --problem leaf --out runs/leaf      one MLP of SmolLM2

model: SPD (arXiv 2506.20790) and VPD (Goodfire 2026, with its adversary) of two projections, by KL of the next token.
leaf: SPD of the three projections of one MLP by the error of its output (`LeafTarget`), which costs no forward pass of
the model; then the same table for the next token. It is not the published objective, which runs and differentiates all
30 blocks in every step.

Expected: with the adversary the same loss under stochastic masks, a lower KL under adversarial ones, more open parts.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinterp.commands.shell import (
    Columns,
    check_folder,
    command,
    folder_of_a_run,
    print_table,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.batch import make_batch
from jaxinterp.core.protocols import Method
from jaxinterp.core.sites import Sites
from jaxinterp.data.activations import on_device
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.decompositions.parameter_parts import ParameterParts
from jaxinterp.evaluation.masks import mask_table
from jaxinterp.methods.factor.parameter_training import AdversarialParameters, StochasticParameters
from jaxinterp.methods.factor.parameters import Coefficients
from jaxinterp.methods.factor.targets import LeafTarget, ProjectionTarget
from jaxinterp.models.load import load
from jaxinterp.training.fit import fit


@dataclass(frozen=True)
class Config:
    """One MLP."""

    out: Path
    """Folder for the results; must be empty or absent."""
    problem: Literal["model", "leaf"] = "model"
    """The next token of a small model, or the output of one MLP of SmolLM2."""
    site: str = "blocks/1/mlp"
    """The MLP."""
    text: str = "docs"
    """Training and held-out text."""
    parts: int = 128
    """Rank-one parts of each matrix."""
    steps: int = 300
    """Training steps of each method."""
    batch_size: int = 512
    """Tokens a step."""
    seq: int = 128
    """Length of a window."""
    importance: float = 1e-3
    """Coefficient of the importance penalty."""
    learning_rate: float = 2e-3
    """Of both methods."""
    heldout_tokens: int = 2048
    """Tokens of the table."""
    ascents: int = 20
    """Steps of the evaluation's adversary."""
    seed: int = 0
    """Of everything random."""


def methods(config: Config, projections: tuple[str, ...]) -> dict[str, Method]:
    """SPD and VPD, or SPD of one MLP."""
    shared: dict[str, Any] = {"parts": config.parts, "learning_rate": config.learning_rate}
    coefficients = Coefficients(layerwise=0.0, importance=config.importance)
    if config.problem == "leaf":
        return {"SPD of the MLP": StochasticParameters(LeafTarget(config.site), coefficients=coefficients, **shared)}
    target = ProjectionTarget(projections)
    vpd: dict[str, Any] = shared | {
        "importance": config.importance, "frequency": 0.0, "faithful": 1.0, "anneal": (1.0, 1.0), "clip": 1.0,
        "scope": "shared", "ascents": 1,
    }  # fmt: skip
    return {
        "SPD": StochasticParameters(target, coefficients=coefficients, **shared),
        "VPD": AdversarialParameters(target, **vpd),
    }


def main(config: Config) -> None:
    """Train, measure, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    with folder_of_a_run(config.out, settings_of(config)) as out:
        rows = measured(config)
        print_table(COLUMNS, rows)
        write_json(out / "results.json", rows)


def measured(config: Config) -> list[dict[str, Any]]:
    """A row for every method and mask."""
    leaf = config.problem == "leaf"
    subject = load("smollm2-135m" if leaf else "bilinear-4x128")
    fields = ("gate_proj", "up_proj", "down_proj") if leaf else ("up_proj", "down_proj")
    target = ProjectionTarget(tuple(f"{config.site}/{name}" for name in fields))
    enough = 4 * config.steps * config.batch_size + 40 * config.heldout_tokens
    train, heldout = load_text(config.text, subject.tokenizer, seq=config.seq, max_tokens=enough)
    windows = take(heldout, config.heldout_tokens, rows=config.heldout_tokens // config.seq)[0]
    held = on_device(windows)
    batch = make_batch({}, jnp.zeros(0), Sites((), ()), windows=held)
    rows: list[dict[str, Any]] = []
    for name, method in methods(config, target.projections).items():
        began = time.process_time()
        result = fit(
            method,
            subject,
            train,
            site=config.site if leaf else None,
            steps=config.steps,
            batch_size=config.batch_size,
            buffer_batches=4 if leaf else 1,
            seed=config.seed,
        )
        learned = result.decomposition
        if leaf:
            parts = {f"{config.site}/{n}": one for n, one in learned.parts.items()}
            learned = ParameterParts(parts, {f"{config.site}/{n}": one for n, one in learned.gates.items()})
        seconds = time.process_time() - began
        last = {key: float(result.history[-1][key]) for key in ("loss", "left_over")}
        say(f"{name}: {seconds:.0f} CPU s, {last}")
        table = mask_table(target, learned, subject.model, batch, jax.random.key(config.seed), ascents=config.ascents)
        rows += [{"method": name} | row | {"cpu_seconds": seconds} | last for row in table]
    return rows


COLUMNS: Columns = {
    "method": ("method", "{}"),
    "mask": ("mask", "{}"),
    "CE": ("ce", "{:.3f}"),
    "KL": ("kl", "{:.4f}"),
    "open parts": ("l0", "{:.1f}"),
}


if __name__ == "__main__":
    command(Config, main, __doc__)
