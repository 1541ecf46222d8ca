"""SPD of toy models whose mechanisms are known: does every feature get one part of its own?

    python -m experiments.factor_toy_parameters --out runs/toy                         (TMS 5-2, 40-10, residual MLP)
    python -m experiments.factor_toy_parameters --problems tms-40-10 --out runs/tms

For the first matrix of each model (arXiv 2506.20790): MMCS and ML2R of its mechanisms and the nearest parts that some
input uses; how many parts an input with a single feature opens, on average and at most; how many features have a part
that no other has as its largest. Published: MMCS 1.000, ML2R .99 to 1.01, one part an input.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.commands.shell import (
    Columns,
    check_distinct,
    check_folder,
    check_positive,
    command,
    folder_of_a_run,
    print_table,
    settings_of,
    write_json,
)
from jaxinterp.evaluation.planted import residual_mlp, superposition
from jaxinterp.methods.factor.parameter_training import StochasticParameters
from jaxinterp.methods.factor.parameters import Coefficients, mean_max_cosine
from jaxinterp.methods.factor.targets import ToyTarget

Problem = Literal["tms-5-2", "tms-40-10", "residual"]


@dataclass(frozen=True)
class Config:
    """Small batches and a large step: see docs/evidence/parameters.md."""

    out: Path
    """Folder for the results; must be empty or absent."""
    problems: tuple[Problem, ...] = ("tms-5-2", "tms-40-10", "residual")
    """Which toy models."""
    steps: int | None = None
    """Of SPD; default: 4,000 (40-10), 3,200."""
    batch_size: int | None = None
    """Samples a step; default: 256 (40-10), 128."""
    learning_rate: float = 1e-2
    """Of SPD's Adam."""
    target_steps: int = 3000
    """Training steps of the toy model."""
    seeds: int = 1
    """Seeds of SPD, 0 and on; the models have one."""


class Setting(NamedTuple):
    """Of one problem: parts of each matrix, the importance penalty and its exponent (of TMS the authors'), steps and
    samples a step."""

    parts: int
    importance: float
    p: float
    steps: int
    batch_size: int


SETTINGS: dict[Problem, Setting] = {
    "tms-5-2": Setting(20, 3e-3, 1.0, 3200, 128),
    "tms-40-10": Setting(200, 1e-4, 2.0, 4000, 256),
    "residual": Setting(40, 1e-4, 2.0, 3200, 128),
}


def trained(problem: Problem, steps: int) -> tuple[Any, Any, str]:
    """(model, how samples are drawn, the name of its first matrix)."""
    key = jax.random.key(1)
    if problem == "residual":
        return residual_mlp.train_residual_mlp(key, steps=steps), residual_mlp.draw_signed, residual_mlp.IN
    features, hidden = (5, 2) if problem == "tms-5-2" else (40, 10)
    toy = superposition.train_superposition(key, features, hidden, steps=steps, batch_size=512)
    return toy, superposition.draw_sparse, superposition.IN


def measured(problem: Problem, config: Config) -> list[dict[str, Any]]:
    """A row a seed."""
    model, draw, name = trained(problem, config.target_steps)
    own_setting = SETTINGS[problem]
    method = StochasticParameters(
        ToyTarget(),
        parts=own_setting.parts,
        coefficients=Coefficients(importance=own_setting.importance),
        p=own_setting.p,
        learning_rate=config.learning_rate,
    )
    steps, size = config.steps or own_setting.steps, config.batch_size or own_setting.batch_size
    rows = []
    for seed in range(config.seeds):
        began = time.process_time()
        found, late = superposition.decompose(
            method, model, jax.random.key(seed), steps=steps, batch_size=size, draw=draw
        )
        opened = {each: np.asarray(g) > 0.1 for each, g in superposition.probe(found, model).items()}
        active = opened[name]
        weight, own = model.weights()[name], found.parts[name]
        if isinstance(model, residual_mlp.ResidualMLP):
            weight, own = residual_mlp.mechanisms(model, own)
        cosine, ratio = mean_max_cosine(weight, own, jnp.asarray(active.any(axis=0)))
        largest = np.asarray(superposition.probe(found, model)[name]).argmax(axis=1)
        rows.append(
            {
                "problem": problem,
                "seed": seed,
                "features": model.features,
                "mmcs": float(cosine),
                "ml2r": float(ratio),
                "open": float(active.sum(axis=1).mean()),
                "most": int(active.sum(axis=1).max()),
                "distinct": len(set(largest.tolist())),
                "open in the second": float(next(o for e, o in opened.items() if e != name).sum(axis=1).mean()),
                "stochastic": late["stochastic"],
                "left_over": late["left_over"],
                "cpu": time.process_time() - began,
            }
        )
    return rows


def main(config: Config) -> None:
    """Train, decompose, measure, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    check_distinct("problems", config.problems)
    given = [name for name in ("steps", "batch_size") if getattr(config, name) is not None]
    check_positive(config, "target_steps", "seeds", *given)
    rows: list[dict[str, Any]] = []
    with folder_of_a_run(config.out, settings_of(config)) as out:
        for problem in config.problems:
            rows += measured(problem, config)
            write_json(out / "results.json", rows)
    print_table(COLUMNS, rows)


COLUMNS: Columns = {
    "problem": ("problem", "{}"),
    "features": ("features", "{:d}"),
    "MMCS": ("mmcs", "{:.4f}"),
    "ML2R": ("ml2r", "{:.3f}"),
    "open": ("open", "{:.2f}"),
    "most": ("most", "{:d}"),
    "distinct": ("distinct", "{:d}"),
    "second": ("open in the second", "{:.1f}"),
    "left over": ("left_over", "{:.1e}"),
    "CPU s": ("cpu", "{:.0f}"),
}


if __name__ == "__main__":
    command(Config, main, __doc__)
