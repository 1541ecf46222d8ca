"""Every sparse dictionary on one MLP of a real model, on the same tokens, at the same number of active features.

Eleven methods and four baselines, each method at several sparsities, all trained in one run: one forward pass of the
model serves them all. The table is read at one L0, measured or between two settings; the charts show all of them.
Papers stand in the methods' files. Autoencoders read the MLP's output, transcoders its input: a transcoder answers a
harder question, and the table says which is which. The gradient SAE and the cross-layer transcoder need other
forward passes and have experiments of their own.

Command: python -m experiments.compare_dictionaries --out runs/dictionaries
         python -m experiments.compare_dictionaries --out runs/small --preset small

Measured on SmolLM2 (blocks/1/mlp), FVU at L0 64 (cross-entropy; unchanged 3.138). Autoencoders: BatchTopK .182 (3.145),
Matryoshka .185 (3.148), TopK .185 (3.144), JumpReLU .199 (3.146), Gated .210 (3.150), GBA .218 (3.142), ReLU+L1 .337
(3.178); top-AFA, whose number of features follows the input, .507 (3.220) at L0 76. Transcoders: skip .259 (3.175),
TopK .281 (3.179), ReLU+L1 .282 (3.178). Neurons .300 (3.158), PCA .392, random features .463. GBA and top-AFA
are of a run of their own (--only). All at once: 18 minutes on two cores; --preset small 7.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from experiments.comparison import print_rows, shown
from experiments.every_dictionary import FASTER, FASTER_BY, check_groups, methods
from jaxinterp.commands.on_text import OnText, Prepared, prepared, train_together
from jaxinterp.commands.shell import chosen, command, measured_on, say, write_json
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.equal_sparsity import Row, agreement, ahead, at_l0, comparable, order
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.report.pareto import pareto
from jaxinterp.report.sections import Section, write_page


@dataclass(frozen=True)
class Plan:
    """How large and how long."""

    features: int
    tokens: int
    heldout_tokens: int
    ce_tokens: int


PRESETS = {
    "full": Plan(features=2304, tokens=250_000, heldout_tokens=32_768, ce_tokens=2048),
    "small": Plan(features=1152, tokens=80_000, heldout_tokens=16_384, ce_tokens=1024),
}


@dataclass(frozen=True)
class Config(OnText):
    """Where a field is None, its value is that of the preset."""

    preset: Literal["full", "small"] = "full"
    """full: under 40 minutes on two cores; small: under 10."""
    only: str = ""
    """Names of methods, joined by commas; none: all of them."""
    l0: int = 64
    """The number of active features at which methods are compared; half and twice as many are trained too."""
    features: int | None = None  # type: ignore[assignment]
    learning_rate: float = 2e-3
    """Peak learning rate of Adam; five times as much for transcoder L1, relu L1 and gated."""
    tokens: int | None = None  # type: ignore[assignment]
    heldout_tokens: int | None = None  # type: ignore[assignment]
    ce_tokens: int | None = None  # type: ignore[assignment]


def main(config: Config) -> None:
    """Train all, score all, compare."""
    clock = time.perf_counter()
    config, plan = planned(config)
    known = methods(plan.features, config.l0, config.learning_rate, max(1, plan.tokens // 5))
    wanted = chosen(config.only, known)
    if "group bias" in wanted:
        check_groups(plan.features)
    settings = {f"{name}, {setting}": one for name in wanted for setting, one in known[name].items()}
    belongs = {f"{name}, {setting}": name for name in wanted for setting in known[name]}
    ready = prepared(config)
    say(f"{len(wanted)} methods at {len(settings)} settings, {config.steps} steps of {config.batch_size} tokens")
    trained = train_together(settings, ready, config)
    say(f"{time.perf_counter() - clock:.0f} s so far; scoring on held-out text ...")
    free = baselines(ready.subject, ready.train, config.site, k=config.l0, features=plan.features, seed=config.seed)
    most = len(free["neurons"].hidden_mean)
    counts = {min(k, most) for k in (config.l0 // 2, 2 * config.l0)} - {min(config.l0, most)}
    own = {f"neurons, k {k}": replace(free["neurons"], k=k) for k in sorted(counts)}
    board = scoreboard(
        {**trained.decomposition, **free, **own},
        ready.subject,
        ready.heldout,
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
    write_json(ready.out / "results.json", {"at": rows + rivals, "all": dict(by_method)})
    print_rows([*rows, *rivals])
    sentences = reading(rows, rivals, config.l0, config.learning_rate)
    say(measured_on(board), *sentences)
    path = report(config, ready, by_method, rows, rivals, sentences)
    say(f"{time.perf_counter() - clock:.0f} s in all. Report: {path}")


def planned(config: Config) -> tuple[Config, Plan]:
    """The configuration with the preset's sizes where none was asked for, and the sizes.

    Raises:
      UserError: a size is invalid.
    """
    asked = {one.name: getattr(config, one.name) for one in fields(Plan)}
    plan = replace(PRESETS[config.preset], **{name: value for name, value in asked.items() if value is not None})
    if not 2 <= config.l0 <= plan.features // 4:
        raise UserError(f"l0={config.l0} must lie between 2 and a quarter of features={plan.features}.")
    return replace(config, **vars(plan)), plan


def reading(rows: Sequence[Row], rivals: Sequence[Row], l0: int, learning_rate: float) -> list[str]:
    """What the numbers say, whichever way they fall."""
    said = []
    equal = comparable(rows)
    for kind, reads in (("autoencoders", "out"), ("transcoders", "in")):
        own = [row for row in equal if str(row["reads"]).endswith(f"/{reads}")]
        if own:
            said += _of_a_kind(own, comparable(rivals), kind, "pca" if reads == "out" else "neurons", l0)
    absent = [row["method"] for row in rows if row["how"] == "nearest"]
    if absent:
        said.append(f"No setting of {', '.join(absent)} came to L0 {l0}: the nearest is in the table and not compared.")
    broken = [row["method"] for row in rows if row not in equal and row["how"] != "nearest"]
    if broken:
        said.append(f"The numbers of {', '.join(broken)} are not finite: not compared.")
    faster = [row["method"] for row in rows if row["method"] in FASTER]
    rates = f", {FASTER_BY} times that for {', '.join(sorted(faster))}" if faster else ""
    said.append(
        f"One seed, one layer, one short run; Adam at a peak of {learning_rate:g}{rates}, not tuned: an order, "
        "not a verdict."
    )
    return said


def _of_a_kind(own: Sequence[Row], rivals: Sequence[Row], kind: str, name: str, l0: int) -> list[str]:
    """What is said of methods that read the same array; `name`: the baseline that they are measured by."""
    by_fvu, by_ce = ahead(own, "fvu"), ahead(own, "ce_replaced")
    first, clean = by_fvu[0], f"unchanged {by_ce[0]['ce_clean']:.3f}"
    ends = (by_ce[0], by_ce[-1])
    level = all("ce_replaced_interval" in row for row in ends) and order(*ends) == "level"
    if len(own) == 1:
        said = [
            f"One of the {kind} is at L0 {l0}, {first['method']}: it leaves {first['fvu']:.3f} of the variance "
            f"unexplained, at a cross-entropy of {first['ce_replaced']:.3f} ({clean})."
        ]
    else:
        said = [
            f"Of the {kind} at L0 {l0}, {first['method']} leaves the least variance unexplained ({first['fvu']:.3f}) "
            f"and {by_fvu[-1]['method']} the most ({by_fvu[-1]['fvu']:.3f}); by cross-entropy {by_ce[0]['method']} is "
            f"first ({by_ce[0]['ce_replaced']:.3f}), {by_ce[-1]['method']} last ({by_ce[-1]['ce_replaced']:.3f}; "
            f"{clean}{'; the 95 % intervals of these two overlap' if level else ''})."
        ]
    rho = agreement(own, "fvu", "ce_replaced")
    if rho is not None:
        word = "nearly the same order" if rho > 0.8 else "a similar order" if rho > 0.5 else "different orders"
        said.append(
            f"FVU and cross-entropy put these {len(own)} {kind} in {word}: their rank correlation is {rho:.2f}."
        )
    rival = next((row for row in rivals if row["method"] == name), None)
    if rival:
        behind = [row["method"] for row in own if row["fvu"] >= rival["fvu"]]
        said.append(
            f"{len(own) - len(behind)} of these {len(own)} are ahead of {name} in FVU ({rival['fvu']:.3f})"
            + (f"; not: {', '.join(behind)}." if behind else ".")
        )
    return said


def report(
    config: Config,
    ready: Prepared,
    by_method: Mapping[str, Sequence[Row]],
    rows: Sequence[Row],
    rivals: Sequence[Row],
    sentences: Sequence[str],
) -> Path:
    """The page."""
    charts = pareto(by_method)
    every = tuple(
        {"setting": row["setting"]} | {key: row[key] for key in ("l0", "fvu", "ce_replaced", "kl", "dead_fraction")}
        for own in by_method.values()
        for row in own
    )
    return write_page(
        ready.out / "report.html",
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
            Section("All numbers", (measured_on([*rows, *rivals]),), every),
        ],
        facts=ready.facts | {f"learning_rate of {', '.join(sorted(FASTER))}": f"{FASTER_BY * config.learning_rate:g}"},
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
