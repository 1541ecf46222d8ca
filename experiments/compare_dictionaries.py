"""Every sparse dictionary on one MLP of a real model, on the same tokens, at the same number of active features.

Eleven methods and five baselines, each method at several sparsities, all trained in one run: one forward pass of the
model serves them all. The table is read at one L0, measured or between two settings; the charts show all of them.
Papers stand in the methods' files. Autoencoders read the MLP's output, transcoders its input: a transcoder answers a
harder question, and the table says which is which. The gradient SAE and the cross-layer transcoder need other
forward passes and have experiments of their own.

Command: python -m experiments.compare_dictionaries --out runs/dictionaries
         python -m experiments.compare_dictionaries --out runs/small --preset small

Not yet measured at full size on SmolLM2 (blocks/1/mlp).
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import jax.numpy as jnp
from rich.console import Console

from experiments.command import check_folder, command, open_folder
from experiments.comparison import (
    Row,
    ahead,
    at_l0,
    check_mlp,
    comparable,
    pareto,
    print_rows,
    read_text,
    shown,
    train_together,
)
from jaxinterp.errors import UserError, suggest
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.methods import (
    GatedSparseAutoencoder,
    GroupBiasAdaptation,
    JumpReLUSparseAutoencoder,
    MatryoshkaSparseAutoencoder,
    Method,
    SkipTranscoder,
    SparseAutoencoder,
    TopAFASparseAutoencoder,
    Transcoder,
)
from jaxinterp.models.load import load
from jaxinterp.report.sections import Section, write_page
from jaxinterp.training.fit import check_sizes
from jaxinterp.training.mesh import parse_mesh


@dataclass(frozen=True)
class Plan:
    """How large and how long."""

    features: int
    tokens: int
    heldout_tokens: int
    ce_tokens: int


PRESETS = {
    "full": Plan(features=2304, tokens=400_000, heldout_tokens=32_768, ce_tokens=4096),
    "small": Plan(features=1152, tokens=100_000, heldout_tokens=16_384, ce_tokens=2048),
}


@dataclass(frozen=True)
class Config:
    """Where a field is None, its value is that of the preset."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    preset: Literal["full", "small"] = "full"
    """full: under 40 minutes on two cores; small: under 10."""
    model: str = "smollm2-135m"
    """A known name (smollm2-135m, tiny), a Hugging Face directory, a .gguf file, or a saved jaxinterp model."""
    site: str = "blocks/1/mlp"
    """The MLP leaf."""
    only: str = ""
    """Names of methods, joined by commas; none: all of them."""
    l0: int = 64
    """The number of active features at which methods are compared; half and twice as many are trained too."""
    features: int | None = None
    """Size of every dictionary."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam, of every method."""
    text: str = "docs"
    """Training text: docs, kjv, shakespeare, several joined by +, or a path."""
    tokens: int | None = None
    """Training tokens."""
    heldout_tokens: int | None = None
    """Held-out tokens for FVU and L0."""
    ce_tokens: int | None = None
    """How many of them the cross-entropies are measured on."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 1024
    """Tokens a step."""
    seed: int = 0
    """Of the data order and the start values, which all methods share."""
    mesh: str = "data=1,feature=1"
    """Devices along each axis."""
    resume: bool = False
    """Continue the run in the output folder."""


def methods(features: int, l0: int, learning_rate: float, dead_after: int) -> dict[str, dict[str, Method]]:
    """By name and setting: at half of `l0`, at `l0` and at twice of it, or at coefficients that enclose it."""
    shared: dict[str, Any] = {"features": features, "learning_rate": learning_rate, "dead_after": dead_after}
    faster = {"learning_rate": 5 * learning_rate}  # penalties work through biases, which have far to go in a short run
    counts = tuple(max(1, count) for count in (l0 // 2, l0, 2 * l0))

    def by_k(method: Any, **more: Any) -> dict[str, Method]:
        return {f"k {k}": method(k=k, **shared, **more) for k in counts}

    def by_coefficient(method: Any, name: str, values: tuple[float, ...], **more: Any) -> dict[str, Method]:
        # Calibrated at L0 64; fewer active features want a proportionally larger coefficient.
        scaled = [value * 64 / l0 for value in values]
        return {f"{name} {value:.3g}": method(**{name: value}, **(shared | more)) for value in scaled}

    # Target frequencies of ten groups, a factor of a hundred apart, that add up to the L0 asked for.
    share = float(jnp.mean(jnp.geomspace(1.0, 0.01, 10)))
    groups = features // max(1, features // 10)
    while features % groups:
        groups -= 1
    adapted: dict[str, Method] = {
        f"L0 {count}": GroupBiasAdaptation(
            groups=groups,
            highest=min(0.9, count / features / share),
            lowest=min(0.9, count / features / share) / 100,
            every=4,
            rate=0.06,
            gain=0.2,
            **shared,
        )
        for count in counts
    }
    return {
        "skip transcoder": by_k(SkipTranscoder),
        "transcoder": by_k(Transcoder),
        "transcoder L1": by_coefficient(Transcoder, "l1", L1_TRANSCODER, activation="relu", auxk=0.0, **faster),
        "topk": by_k(SparseAutoencoder),
        "batch topk": by_k(SparseAutoencoder, activation="batch_topk"),
        "relu L1": by_coefficient(SparseAutoencoder, "l1", L1, activation="relu", auxk=0.0, **faster),
        "gated": by_coefficient(GatedSparseAutoencoder, "l1", L1_GATED, **faster),
        "jumprelu": {
            f"target {count}": JumpReLUSparseAutoencoder(
                target_l0=float(count),
                l0=1.0,
                threshold=NormalDist().inv_cdf(1 - min(0.45, 2 * count / features)),
                **shared,
            )
            for count in counts
        },
        "matryoshka": by_k(MatryoshkaSparseAutoencoder),
        "top-AFA": by_coefficient(TopAFASparseAutoencoder, "afa", AFA, cap=min(8 * l0, features - 1)),
        "group bias": adapted,
    }


L1_TRANSCODER = (0.002, 0.006, 0.018)
L1 = (0.002, 0.006, 0.018)
L1_GATED = (0.002, 0.006, 0.018)
AFA = (1.0, 10.0, 100.0)


def main(config: Config) -> None:
    """Train all, score all, compare."""
    console = Console()
    clock = time.perf_counter()
    plan = planned(config)
    mesh = parse_mesh(config.mesh)
    known = methods(plan.features, config.l0, config.learning_rate, plan.tokens // 5)
    wanted = [name.strip() for name in config.only.split(",") if name.strip()] or list(known)
    for name in wanted:
        if name not in known:
            raise UserError(f"only={name!r} is no method.{suggest(name, known)}")
    settings = {f"{name}, {setting}": one for name in wanted for setting, one in known[name].items()}
    belongs = {f"{name}, {setting}": name for name in wanted for setting in known[name]}
    steps = plan.tokens // config.batch_size
    check_sizes(steps=steps, batch_size=config.batch_size, seq=config.seq, mesh=mesh)
    record = {name: value for name, value in (asdict(config) | asdict(plan)).items() if name not in ("out", "resume")}
    check_folder(config.out, record, resume=config.resume)

    subject = load(config.model)
    check_mlp(subject.model, config.site)
    train, heldout = read_text(
        config.text, subject, tokens=plan.tokens, heldout_tokens=plan.heldout_tokens, seq=config.seq
    )
    out = open_folder(config.out, record)
    console.print(f"{len(wanted)} methods at {len(settings)} settings, {steps} steps of {config.batch_size} tokens")
    trained = train_together(settings, subject, train, config, out, tokens=plan.tokens)
    console.print(f"{time.perf_counter() - clock:.0f} s so far; scoring on held-out text ...")
    free = baselines(subject, train, config.site, k=config.l0, features=plan.features, seed=config.seed)
    own = {f"neurons, k {k}": replace(free["neurons"], k=k) for k in (config.l0 // 2, config.l0 * 2) if k}
    board = scoreboard(
        {**trained.decomposition, **free, **own},
        subject,
        heldout,
        tokens=plan.heldout_tokens,
        ce_tokens=plan.ce_tokens,
    )
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in board:
        setting = row["method"]
        name = belongs.get(setting, "neurons" if setting in own else setting)
        by_method[name].append(row | {"method": name, "setting": setting})
    rows = ahead([at_l0(by_method[name], config.l0) for name in wanted], "fvu")
    rivals = [at_l0(by_method[name], config.l0) for name in free]
    (out / "results.json").write_text(json.dumps({"at": rows + rivals, "all": dict(by_method)}, indent=2) + "\n")
    print_rows([*rows, *rivals], console)
    sentences = reading(rows, rivals, config.l0)
    for sentence in sentences:
        console.print(sentence)
    facts = {name: str(value) for name, value in record.items()}
    path = report(out, config, by_method, rows, rivals, sentences, facts)
    console.print(f"{time.perf_counter() - clock:.0f} s in all. Report: {path}")


def planned(config: Config) -> Plan:
    """The preset's sizes, and those that were asked for.

    Raises:
      UserError: a size cannot be.
    """
    asked = {field.name: getattr(config, field.name) for field in fields(Plan)}
    plan = replace(PRESETS[config.preset], **{name: value for name, value in asked.items() if value is not None})
    if not 2 <= config.l0 <= plan.features // 4:
        raise UserError(f"l0={config.l0} must lie between 2 and a quarter of features={plan.features}.")
    return plan


def reading(rows: list[Row], rivals: list[Row], l0: int) -> list[str]:
    """What the numbers say, whichever way they fall."""
    said = []
    equal = comparable(rows)
    for kind, reads in (("autoencoders", "out"), ("transcoders", "in")):
        own = [row for row in equal if str(row["reads"]).endswith(f"/{reads}")]
        if not own:
            continue
        by_fvu, by_ce = ahead(own, "fvu"), ahead(own, "ce_replaced")
        said.append(
            f"Of the {kind} at L0 {l0}, {by_fvu[0]['method']} leaves the least variance unexplained "
            f"({by_fvu[0]['fvu']:.3f}) and {by_fvu[-1]['method']} the most ({by_fvu[-1]['fvu']:.3f}); by cross-entropy "
            f"{by_ce[0]['method']} is first ({by_ce[0]['ce_replaced']:.3f}), {by_ce[-1]['method']} last "
            f"({by_ce[-1]['ce_replaced']:.3f}; unchanged {by_ce[0]['ce_clean']:.3f})."
        )
        agree = [row["method"] for row in by_fvu] == [row["method"] for row in by_ce]
        if len(own) > 1:
            said.append(
                f"By cross-entropy the {kind} stand in {'the same order' if agree else 'another order'}: variance "
                f"explained {'goes with' if agree else 'does not decide'} what the model's predictions need."
            )
        rival = next((row for row in rivals if row["method"] == ("pca" if reads == "out" else "neurons")), None)
        if rival:
            behind = [row["method"] for row in own if row["fvu"] >= rival["fvu"]]
            said.append(
                f"{len(own) - len(behind)} of these {len(own)} are ahead of {rival['method']} in FVU "
                f"({rival['fvu']:.3f})" + (f"; not: {', '.join(behind)}." if behind else ".")
            )
    missing = [row["method"] for row in rows if row["how"] == "nearest"]
    if missing:
        said.append(
            f"No setting of {', '.join(missing)} came to L0 {l0}: the nearest is in the table and not compared."
        )
    said.append("One seed, one layer, one short run with one learning rate for all: an order, not a verdict.")
    return said


def report(
    out: Path,
    config: Config,
    by_method: Mapping[str, list[Row]],
    rows: list[Row],
    rivals: list[Row],
    sentences: list[str],
    facts: Mapping[str, str],
) -> Path:
    """The page."""
    charts = pareto({name: own for name, own in by_method.items() if len(own) > 1})
    every = tuple(
        {"setting": row["setting"]} | {key: row[key] for key in ("l0", "fvu", "ce_replaced", "kl", "dead_fraction")}
        for own in by_method.values()
        for row in own
    )
    return write_page(
        out / "report.html",
        title=f"{config.model}: {config.site}, every dictionary",
        subtitle=f"{len(rows)} methods and {len(rivals)} baselines at {config.l0} active features per token",
        summary=sentences[0],
        sections=[
            Section(
                "At equal L0",
                (
                    "Every row stands in for the MLP's output on the same held-out text. Autoencoders read the output "
                    "itself (out), transcoders the MLP's input (in). Read off: measured within a tenth of the L0, "
                    "between two settings (linear in log L0), or nearest where no setting came close.",
                ),
                shown([*rows, *rivals]),
            ),
            Section("Every setting", charts=charts, wide=True),
            Section("What it says", tuple(sentences)),
            Section("All numbers", rows=every),
        ],
        facts=facts,
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
