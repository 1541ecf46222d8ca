"""Every sparse-dictionary method on a planted dictionary: who finds what was planted, and who only reconstructs it.

48 unit rows in 32 dimensions, 3 active with sizes U(0.5, 1.5), 96 learned rows, 6000 steps of 256 fresh samples, means
over 3 seeds (one plant and one start each). Transcoders: an MLP with 48 planted neurons in 32 dimensions, for the skip
transcoder beside a linear map of rank 4, steps of 512 samples.

Command: python -m experiments.recovery --out runs/recovery          (all methods)
         python -m experiments.recovery --only topk,gated --seeds 1 --out runs/two

Columns: MCC (mean matched cosine, Hungarian) and the one that the method must reach; `read`, the same of a
transcoder's read vectors under the matching of the write vectors (at least 0.98); FRR (planted rows found at cosine
0.9) and those found with the wrong sign only; the correlation of matched codes; FVU, L0 and dead rows on 16,384 fresh
samples with inference thresholds; stability: the matched cosine of the live rows of two starts on one plant. Below
them the control, TopK with k three times too large: its FVU must be no worse (within 2 percent) and its MCC must be;
and the floor: random rows. Exit code 1 where something is not as it must be.

Settings, thresholds and papers: experiments/planted_methods.py. Methods that this plant does not test have their own
in tests/methods: gradient SAE (test_gradient_sae.py), attention SAE (test_attention_sae.py), discrete codes
(test_discrete_codes.py), per-layer and cross-layer transcoders (test_several_layers.py, test_cross_layer.py).

Measured, MCC: ReLU+L1 .991, TopK .999, BatchTopK .985, Gated .991, JumpReLU .996, Matryoshka .943, top-AFA .995, GBA
.962, transcoder and skip transcoder 1.000 (read vectors too); the control .884 with FVU .022 beside .023; random rows
.414. Every threshold is met. 8 minutes on two cores.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.planted_methods import PLANT, ROWS, SETTINGS, Entry, controls, methods
from jaxinterp.commands.shell import (
    Columns,
    check_folder,
    check_positive,
    chosen,
    command,
    open_folder,
    print_table,
    read_json,
    say,
    write_json,
)
from jaxinterp.evaluation.planted.laboratory import stability, train
from jaxinterp.evaluation.planted.scores import chance_scores, planted_scores, read_cosine
from jaxinterp.report.plots import Dot, Reference, dot_plot
from jaxinterp.report.sections import Chart, Section, write_page

READ = 0.98
"""The cosine that read vectors must reach."""

NO_WORSE = 1.02
"""The control's FVU may be this many times that of the method."""

SAMPLES = 16_384
"""Fresh samples that dictionaries are scored on."""


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
    wanted = chosen(config.only, known)
    check_positive(config, "seeds", "steps")
    settings = {"seeds": config.seeds, "steps": config.steps}
    check_folder(config.out, settings, resume=config.resume)
    out = open_folder(config.out, settings)
    kept = out / "recovery.json"
    rows: dict[str, dict[str, Any]] = read_json(kept) if kept.exists() else {}
    for name, entry in ({name: known[name] for name in wanted} | control).items():
        if name not in rows:
            say(f"training {name} ...")
            rows[name] = {"method": name, "threshold": entry.threshold, "control": entry.control}
            rows[name] |= recovered(entry, config)
            write_json(kept, rows)
    floor = chance(config.seeds)
    wrong = missed(rows, floor)
    print_table(COLUMNS, shown(rows, floor))
    path = report(config, rows, floor, wrong)
    say(f"Rows: {kept}", f"Report: {path}")
    if wrong:
        print("not as expected: " + "; ".join(wrong), file=sys.stderr)
        sys.exit(1)


def recovered(entry: Entry, config: Config) -> dict[str, Any]:
    """Means over seeds; `mccs`: of each."""
    started, problem = time.perf_counter(), entry.problem
    planted = [problem.plant(jax.random.key(seed)) for seed in range(config.seeds)]
    # The last run is a second start on the last plant: what two seeds have in common.
    runs = [*planted, planted[-1]]
    dictionaries, _ = train(
        entry.method, problem.draw, runs, problem.sites, steps=config.steps, batch_size=entry.batch_size
    )
    scores = [
        planted_scores(dictionary, problem.write(truth), problem.draw(truth, jax.random.key(77), SAMPLES))
        for dictionary, truth in zip(dictionaries, runs, strict=True)
    ]
    own = [score.numbers for score in scores[: config.seeds]]
    row: dict[str, Any] = {name: float(np.mean([numbers[name] for numbers in own])) for name in own[0]}
    row["mccs"] = [numbers["mcc"] for numbers in own]
    if problem.read is not None:
        pairs = zip(dictionaries, planted, strict=False)
        row["read"] = float(
            np.mean([read_cosine(problem.read(truth), problem.write(truth), one) for one, truth in pairs])
        )
    live = [np.asarray(one.decoder)[score.live] for one, score in zip(dictionaries[-2:], scores[-2:], strict=True)]
    return row | {"stability": stability(live), "seconds": time.perf_counter() - started}


def chance(seeds: int) -> dict[str, float]:
    """What random rows score: means over the plants."""
    scores = [
        chance_scores(PLANT.rows(jax.random.key(seed)), ROWS, jax.random.key(500 + seed)) for seed in range(seeds)
    ]
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def missed(rows: Mapping[str, Mapping[str, Any]], floor: Mapping[str, float]) -> list[str]:
    """What is not as it must be, in words. NaN reaches no threshold, and a control that is NaN shows nothing."""
    wrong = []
    for name, row in rows.items():
        score, threshold, right = row["mcc"], row["threshold"], rows.get(row["control"])
        if row["control"]:
            if not score < threshold:
                wrong.append(f"{name} (a control) has MCC {score:.3f}, not below {threshold:.2f}")
            if right is not None and not row["fvu"] <= NO_WORSE * right["fvu"]:
                wrong.append(f"{name} (a control) has FVU {row['fvu']:.3f}, worse than {right['fvu']:.3f}")
        elif not score >= threshold:
            wrong.append(f"{name} has MCC {score:.3f}, not {threshold:.2f}")
        if "read" in row and not row["read"] >= READ:
            wrong.append(f"{name} has read vectors at {row['read']:.3f}, not {READ:.2f}")
    least = min((row["threshold"] for row in rows.values() if not row["control"]), default=1.0)
    if not floor["mcc"] < least:
        wrong.append(f"random rows have MCC {floor['mcc']:.3f}, not below every threshold")
    return wrong


COLUMNS: Columns = {
    "method": ("method", "{}"),
    "MCC": ("mcc", "{:.3f}"),
    "needs": ("needs", "{:>7}"),
    "read": ("read", "{:.2f}"),
    "FRR": ("frr_9", "{:.2f}"),
    "sign": ("sign_errors", "{:.2f}"),
    "codes": ("code_correlation", "{:.2f}"),
    "FVU": ("fvu", "{:.3f}"),
    "L0": ("l0", "{:.1f}"),
    "dead": ("dead_fraction", "{:.0%}"),
    "stable": ("stability", "{:.2f}"),
}


HOW_TO_READ = (
    "MCC: mean cosine of planted with learned write vectors, matched one to one; read: that of read vectors under the "
    "same matching; FRR: planted rows found at cosine 0.9; sign: those found with the wrong sign only; codes: "
    "correlation of matched codes; stable: matched cosine of the live rows of two starts. FVU, L0 and dead rows: on "
    f"{SAMPLES:,} fresh samples, as the dictionary is used."
)


def shown(rows: Mapping[str, Mapping[str, Any]], floor: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of the printed table."""
    needs = {name: ("<" if row["control"] else ">=") + f" {row['threshold']:.2f}" for name, row in rows.items()}
    return [{**row, "needs": needs[name]} for name, row in rows.items()] + [{"method": "random rows", **floor}]


def reading(rows: Mapping[str, Mapping[str, Any]], floor: Mapping[str, float], wrong: list[str]) -> list[str]:
    """What the numbers say, whichever way they fall."""
    own = {name: row for name, row in rows.items() if not row["control"]}
    reached = [name for name, row in own.items() if row["mcc"] >= row["threshold"]]
    said = [
        f"{len(reached)} of {len(own)} methods reach the mean matched cosine that they must"
        f"{' (not: ' + ', '.join(name for name in own if name not in reached) + ')' if len(reached) < len(own) else ''}"
        f"; random rows have {floor['mcc']:.2f}."
    ]
    for name, row in rows.items():
        if row["control"] in rows:
            right = rows[row["control"]]
            said.append(
                f"The control ({name}) has FVU {row['fvu']:.3f} beside {right['fvu']:.3f} of {row['control']}, and MCC "
                f"{row['mcc']:.3f} beside {right['mcc']:.3f}."
            )
    return said + [f"Not as expected: {one}." for one in wrong]


def report(config: Config, rows: Mapping[str, Mapping[str, Any]], floor: Mapping[str, float], wrong: list[str]) -> Path:
    """The page."""
    sentences = reading(rows, floor, wrong)
    table = tuple(
        {title: row.get(key) for title, (key, _) in COLUMNS.items()}
        | {"lowest seed": min(row["mccs"]) if "mccs" in row else None, "seconds": row.get("seconds")}
        for row in shown(rows, floor)
    )
    dots = [Dot(name, row["mcc"], emphasis=not row["control"]) for name, row in rows.items()]
    chart = dot_plot(dots, title="Mean matched cosine", references=[Reference("random rows", floor["mcc"])])
    return write_page(
        config.out / "report.html",
        title="Planted dictionaries, recovered",
        subtitle=f"{PLANT.features} rows in {PLANT.width} dimensions, {ROWS} learned, {config.steps} steps, "
        f"{config.seeds} seeds",
        summary=sentences[0],
        sections=[
            Section("Recovery", (HOW_TO_READ,), table),
            Section("Cosines", tuple(sentences), charts=(Chart("MCC", "controls and methods", chart),), wide=True),
            Section("Where settings come from", (SETTINGS,)),
        ],
        facts={"seeds": str(config.seeds), "steps": str(config.steps)},
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
