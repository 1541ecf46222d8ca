"""Every sparse-dictionary method on a planted dictionary: who finds what was planted, and who only reconstructs it.

48 unit rows in 32 dimensions, 3 active with sizes U(0.5, 1.5), 96 learned rows, 6000 steps of 256 fresh samples, means
over 3 seeds (one plant and one start each). Papers stand in the methods' files.

Command: python -m experiments.recovery --out runs/recovery          (all methods, about 6 minutes on two cores)
         python -m experiments.recovery --only topk,gated --seeds 1

Prints and writes `recovery.json`: MCC (mean matched cosine), FRR (share of planted rows found at cosine .9), FVU, L0,
dead rows, stability (matched cosine of two starts on one plant), and the MCC that the method must reach; below them
the control, TopK with k three times too large, whose FVU is no worse and whose MCC is, and the floor: random rows.
Exit code 1 where a method misses its threshold, or the control or the floor reaches one.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.command import check_folder, command, open_folder
from jaxinterp.data.batch import Sites
from jaxinterp.errors import UserError, suggest
from jaxinterp.evaluation.laboratory import Plant, stability, train
from jaxinterp.evaluation.recovery import frr, mcc
from jaxinterp.methods import (
    GatedSparseAutoencoder,
    GroupBiasAdaptation,
    JumpReLUSparseAutoencoder,
    MatryoshkaSparseAutoencoder,
    Method,
    SparseAutoencoder,
    TopAFASparseAutoencoder,
)
from jaxinterp.models.tiny import unit_rows

PLANT = Plant()
ROWS = 96
VARIANCE = 3.2  # of the planted samples: coefficients of penalties are known in units of squared error


class Entry(NamedTuple):
    """A method and the MCC that it must reach."""

    method: Method
    threshold: float


def methods() -> dict[str, Entry]:
    """By the name of their row."""
    return {
        "relu_l1": Entry(
            SparseAutoencoder(
                features=ROWS, activation="relu", l1=0.2 / VARIANCE, learning_rate=1e-3, auxk=0.0, normalise=False
            ),
            0.97,
        ),
        "topk": Entry(SparseAutoencoder(features=ROWS, k=3, learning_rate=3e-3, auxk=0.0), 0.97),
        "batch_topk": Entry(
            SparseAutoencoder(features=ROWS, k=3, activation="batch_topk", learning_rate=3e-3, auxk=0.0), 0.94
        ),
        "gated": Entry(
            GatedSparseAutoencoder(features=ROWS, l1=0.8 / VARIANCE, learning_rate=1e-3, normalise=False), 0.97
        ),
        "jumprelu": Entry(
            JumpReLUSparseAutoencoder(
                features=ROWS, l0=0.05 / VARIANCE, threshold=0.1, bandwidth=0.2, learning_rate=1e-3, normalise=False
            ),
            0.97,
        ),
        "matryoshka": Entry(
            MatryoshkaSparseAutoencoder(features=ROWS, k=3, prefixes=(24, 48, 96), learning_rate=1e-2, auxk=0.0), 0.90
        ),
        "top_afa": Entry(TopAFASparseAutoencoder(features=ROWS, learning_rate=1e-2, auxk=0.0), 0.96),
        "group_bias": Entry(
            GroupBiasAdaptation(features=ROWS, groups=4, highest=0.1, lowest=0.01, learning_rate=1e-2), 0.94
        ),
    }


def controls() -> dict[str, Entry]:
    """Each must stay below its threshold."""
    wrong = SparseAutoencoder(features=ROWS, k=9, learning_rate=3e-3, auxk=0.0)
    return {"topk, k x 3": Entry(wrong, 0.93)}


@dataclass(frozen=True)
class Config:
    """Which methods, and how long."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    only: str = ""
    """Names of methods, joined by commas; none: all of them."""
    seeds: int = 3
    """Plants and starts to average over."""
    steps: int = 6000
    """Training steps; thresholds are those of the default."""
    resume: bool = False
    """Keep the rows that the folder holds."""


def main(config: Config) -> None:
    """Train, match, print."""
    known, control = methods(), controls()
    wanted = [name for name in config.only.split(",") if name] or list(known)
    for name in wanted:
        if name not in known:
            raise UserError(f"only={name!r} is no method: {suggest(name, known)}")
    if config.seeds < 1 or config.steps < 1:
        raise UserError(f"seeds={config.seeds} and steps={config.steps} must be at least 1.")
    settings = {"seeds": config.seeds, "steps": config.steps}
    check_folder(config.out, settings, resume=config.resume)
    out = open_folder(config.out, settings)
    kept = out / "recovery.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, entry in ({name: known[name] for name in wanted} | control).items():
        if name not in rows:
            rows[name] = recovered(entry.method, config) | {"threshold": entry.threshold, "control": name in control}
            kept.write_text(json.dumps(rows, indent=2) + "\n")
    floor = {"mcc": chance(config.seeds)}
    print_rows(rows, floor, Console())
    print(f"rows: {kept}")
    missed = [name for name, row in rows.items() if (row["mcc"] >= row["threshold"]) == row["control"]]
    if missed or floor["mcc"] >= min(entry.threshold for entry in known.values()):
        print(f"not as expected: {', '.join(missed) or 'the floor'}", file=sys.stderr)
        sys.exit(1)


def recovered(method: Method, config: Config) -> dict[str, float]:
    """Means over seeds."""
    started = time.perf_counter()
    planted = [PLANT.rows(jax.random.key(seed)) for seed in range(config.seeds)]
    # The last run is a second start on the last plant: what two seeds have in common.
    runs = [*planted, planted[-1]]
    dictionaries, metrics = train(method, PLANT.draw, runs, Sites("x", "x"), steps=config.steps)
    decoders = [np.asarray(dictionary.decoder) for dictionary in dictionaries]
    found = list(zip(planted, decoders, strict=False))
    own = dictionaries[: config.seeds]
    dead = [dead_fraction(dictionary, rows) for dictionary, rows in zip(own, planted, strict=True)]
    return {
        "mcc": float(np.mean([mcc(rows, decoder) for rows, decoder in found])),
        "frr": float(np.mean([frr(rows, decoder) for rows, decoder in found])),
        "fvu": float(np.mean([late["fvu"] for late in metrics[: config.seeds]])),
        "l0": float(np.mean([late["l0"] for late in metrics[: config.seeds]])),
        "dead_fraction": float(np.mean(dead)),
        "stability": stability(decoders[-2:]),
        "seconds": time.perf_counter() - started,
    }


def dead_fraction(dictionary: Any, rows: Any) -> float:
    """Rows that are active on none of 16,384 fresh samples."""
    samples = PLANT.draw(rows, jax.random.key(77), 16_384)["x"]
    fired = dictionary.encode(samples).fired(jnp.ones(len(samples)))
    return float(np.mean(np.asarray(fired) == 0))


def chance(seeds: int) -> float:
    """The MCC of random rows."""
    scores = []
    for seed in range(seeds):
        rows = PLANT.rows(jax.random.key(seed))
        scores.append(mcc(rows, unit_rows(jax.random.key(500 + seed), ROWS, PLANT.width)))
    return float(np.mean(scores))


def print_rows(rows: Mapping[str, Mapping[str, Any]], floor: Mapping[str, float], console: Console) -> None:
    """The table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("method", "MCC", "needs", "FRR .9", "FVU", "L0", "dead", "stable", "s"):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for name, row in rows.items():
        needs = f"{'<' if row['control'] else '>='} {row['threshold']:.2f}"
        numbers = [f"{row[key]:.3f}" for key in ("frr", "fvu")]
        numbers += [
            f"{row['l0']:.1f}",
            f"{row['dead_fraction']:.0%}",
            f"{row['stability']:.3f}",
            f"{row['seconds']:.0f}",
        ]
        table.add_row(name, f"{row['mcc']:.3f}", needs, *numbers)
    table.add_row("random rows", f"{floor['mcc']:.3f}", "", *[""] * 6)
    console.print(table)


if __name__ == "__main__":
    command(Config, main, __doc__)
