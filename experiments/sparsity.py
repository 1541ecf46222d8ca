"""Which neurons may be left out? Perplexity against sparsity for every score, on one model, at equal sparsity.

Command: python -m experiments.sparsity --out runs/sparsity --quick     16 windows of 64 tokens, under 15 CPU minutes
         python -m experiments.sparsity --out runs/sparsity             64 windows of 256

Every row leaves out the same share of neurons (of the MLP's input, for rows that say "input") of every token in every
layer: k = round((1 - sparsity) d) stay, by the score of the row. Differences between two rows are per document, with a
bootstrap interval over documents. Position 0 counts in no statistic and in no loss, and stays dense (--dense-before 0:
not): a few neurons write activations of many thousands there, and a row that drops these measures nothing else.

Claims: |a||w| is ahead of |a| and WINA of TEAL (2505.19427); CHESS is ahead of CATS (2409.01366); Wanda (2306.11695)
and DaSS (2405.01943) are ahead of magnitude; CETT-PPL-1 % (2411.02335). Resumable: rows in results.json stay.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.sparsity_page import write
from experiments.sparsity_results import Measure, OutOfTime, Results
from experiments.sparsity_rows import scores
from experiments.sparsity_searches import budgets, cett_percent, pruning
from experiments.sparsity_statistics import Statistics, statistics
from jaxinterp.commands.shell import check_folder, chosen, command, folder_of_a_run, say, settings_of
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.models.load import load
from jaxinterp.models.sites import sites


@dataclass(frozen=True)
class Config:
    """Sizes."""

    out: Path
    """Folder for results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A model with gated MLPs."""
    text: str = "docs"
    """Text: the calibration windows come from its training part."""
    cache: Path = Path("runs/tokens")
    """Folder for the text's tokens."""
    windows: int = 64
    """Held-out windows."""
    calibration: int = 16
    """Windows of the training text for statistics."""
    seq: int = 256
    """Tokens a window."""
    sparsity: tuple[float, ...] = (0.25, 0.4, 0.5, 0.65, 0.8, 0.9)
    """Shares of neurons left out."""
    only: str = ""
    """Rows by name, joined by ";"; default: all."""
    percents: tuple[float, ...] = (1.0,)
    """For CETT-PPL-p %."""
    quick: bool = False
    """16 windows of 64 tokens, 8 for statistics."""
    dense_before: int = 1
    """Positions that stay as they are."""
    most_seconds: float = math.inf
    """CPU seconds after which no new row is begun; continue with --resume."""
    seed: int = 0
    """Of the sample of windows and of the random row."""
    resume: bool = False
    """Continue the run in the output folder."""


def main(config: Config) -> None:
    """Calibrate, measure every row, compare, write."""
    if config.quick:
        config = dataclasses.replace(config, windows=16, calibration=8, seq=64)
    for share in config.sparsity:
        if not 0 < share < 1:
            raise UserError(f"sparsity={share} must lie between 0 and 1.")
    record = settings_of(config, "most_seconds", "cache")
    check_folder(config.out, record, resume=config.resume)
    subject = load(config.model)
    model: Any = subject.model
    leaves = sites(model, "blocks/*/mlp")
    if not model.config.gated or model.config.mixture is not None:
        raise UserError(f"model={config.model!r} has no gated MLPs: CATS, CHESS and MAW score gates.")
    train, heldout = load_text(
        config.text,
        subject.tokenizer,
        seq=config.seq,
        max_tokens=max(2_000_000, 40 * config.seq * config.windows),
        cache=config.cache,
    )
    rows = 4
    batches = take(heldout, config.windows * config.seq, seed=config.seed, rows=rows)
    calibration = take(train, config.calibration * config.seq, seed=config.seed, rows=rows)
    with folder_of_a_run(config.out, record) as out:
        measure = Measure(model, batches)
        results = Results(out / "results.json", measure, config.most_seconds)
        dense = results.row("dense", 0.0, model, dict)
        say(f"dense: {dense['ce']:.4f} nats over {dense['tokens']} next tokens of {len(measure.documents)} documents")
        clock = time.process_time()
        stats = statistics(model, leaves, calibration)
        say(f"statistics: {time.process_time() - clock:.0f} CPU s")
        known = scores(
            model,
            leaves,
            stats,
            shares=config.sparsity,
            seq=config.seq,
            before=config.dense_before,
            seed=config.seed,
        )
        last = [name for name in known if name.startswith("fixed") or name == "CoreInfer"]
        others = [name for name in known if name not in last]
        names = chosen(config.only, [*others, "pruning", "CETT", "budgets", *last], ";")
        try:
            rows_of(names, known, model, leaves, stats, results, config)
        except OutOfTime:
            say(f"{config.most_seconds:g} CPU s are over: continue with --resume.")
        write(
            out,
            results,
            config.sparsity,
            f"{config.model} on {config.text}",
            {name: str(value) for name, value in record.items()},
        )


def rows_of(
    names: Sequence[str],
    known: Mapping[str, Callable[[float], dict[str, Any]]],
    model: Any,
    leaves: Sequence[str],
    stats: Statistics,
    results: Results,
    config: Config,
) -> None:
    """Measure what is asked for and not measured yet."""
    for name in names:
        for share in config.sparsity if name in known else ():
            results.row(name, share, model, partial(known[name], share))
        if name == "pruning":
            pruning(model, leaves, stats, results)
        if name == "budgets":
            results.also("budgets", lambda: budgets(model, leaves, stats, results, config.dense_before))
        for percent in config.percents if name == "CETT" else ():
            solve = partial(cett_percent, model, stats, results, config.dense_before, percent)
            results.also(f"CETT-PPL-{percent:g}%", solve)


if __name__ == "__main__":
    command(Config, main, __doc__)
