"""Rivals of the transcoder: do mixtures of decoders, of linear transforms and of single neurons replace an MLP better?

Oldfield et al. 2025 (arXiv 2505.21364) find mixtures of decoders (MxD) more faithful than transcoders at equal
sparsity; Lindsey et al. 2025 propose mixtures of linear transforms (MOLT), of which others report that they collapse to
a single transform; Schug 2026 (arXiv 2606.07414) makes whole models of linear neurons with product keys. Here: one MLP,
the same text, steps and start key, in one run, with about the parameters of a skip transcoder (transforms: half).

Command: python -m experiments.factor_rivals --out runs/factor_rivals
         python -m experiments.factor_rivals --model tiny --features 256 --tokens 20480 --out runs/tiny

L0 counts features that are active: decoders, transforms, neurons. They are of different sizes, so that the table also
gives the parameters of each method, and those that an average token uses.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxinterp.commands.on_text import OnText, prepared, train_together
from jaxinterp.commands.shell import Columns, command, measured_on, print_table, say, write_json
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.decompositions.linear_transforms import LinearTransforms
from jaxinterp.decompositions.mixture_of_decoders import MixtureOfDecoders
from jaxinterp.evaluation.effects import Row
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.methods import Method, SkipTranscoder
from jaxinterp.methods.factor.linear_transforms import LinearTransformsMethod, halving_ranks
from jaxinterp.methods.factor.mixture_of_decoders import MixtureOfDecodersMethod
from jaxinterp.methods.factor.product_key_neurons import ProductKeyNeuronsMethod
from jaxinterp.report.sections import Section, write_page


@dataclass(frozen=True)
class Config(OnText):
    """The defaults are the setting of the README's demo."""

    features: int = 4608
    """Features of the skip transcoder, whose parameters the others match."""
    k: int = 32
    """Active features per token; transforms: a quarter of it."""
    tokens: int = 901_120
    """Training tokens: 440 steps."""
    batch_size: int = 2048
    """Tokens a step."""
    methods: tuple[str, ...] = ("skip transcoder", "mixture of decoders", "linear transforms", "product-key neurons")
    """Which of them; the first is what the others are compared with."""


def main(config: Config) -> None:
    """Train, score, compare."""
    clock = time.perf_counter()
    known = methods(config)
    for name in config.methods:
        if name not in known:
            raise UserError(f"methods: {name!r} must be one of {', '.join(known)}.{suggest(name, known)}")
    ready = prepared(config)
    trained = train_together({name: known[name] for name in config.methods}, ready, config)
    seconds = time.perf_counter() - clock
    say(f"{seconds:.0f} s so far; scoring on held-out text ...")
    found = trained.decomposition
    board = scoreboard(found, ready.subject, ready.heldout, tokens=config.heldout_tokens, ce_tokens=config.ce_tokens)
    late = trained.history[-len(trained.history) // 5 :]
    rows = [
        row | sizes(found[row["method"]], row["l0"]) | {"still_falls": falls(late, f"{row['method']}/loss")}
        for row in board
    ]
    write_json(ready.out / "results.json", rows)
    print_table(COLUMNS, rows)
    sentences = answers(rows)
    say(measured_on(rows), *sentences)
    table = tuple({title: row[key] for title, (key, _) in COLUMNS.items()} for row in rows)
    path = write_page(
        ready.out / "report.html",
        title=f"{config.model}: {config.site}, rivals of the transcoder",
        subtitle=f"{config.tokens:,} tokens each, one run, {seconds:.0f} s",
        summary=sentences[0],
        sections=[Section("Scores", (*sentences, measured_on(rows)), table)],
        facts=ready.facts,
    )
    say(f"{time.perf_counter() - clock:.0f} s in all. Report: {path}")


def methods(config: Config) -> dict[str, Method]:
    """The methods, of about equal parameters."""
    rate, half = config.learning_rate, config.features // 2
    largest = max(2, config.features // 9)  # 512 at the default
    n = max(config.k // 4, int((config.features * 8 // 9 / 4) ** 0.5))  # 32 at the default
    return {
        "skip transcoder": SkipTranscoder(
            features=config.features, k=config.k, learning_rate=rate, dead_after=max(1, config.tokens // 5)
        ),
        "mixture of decoders": MixtureOfDecodersMethod(features=half, hidden=half, k=config.k, learning_rate=rate),
        "linear transforms": LinearTransformsMethod(
            ranks=halving_ranks(largest, max(1, largest // 16)), k=max(1, config.k // 4), learning_rate=rate
        ),
        "product-key neurons": ProductKeyNeuronsMethod(n=n, channels=4, knn=max(1, config.k // 4), learning_rate=rate),
    }


COLUMNS: Columns = {
    "method": ("method", "{}"),
    "features": ("features", "{:d}"),
    "L0": ("l0", "{:.1f}"),
    "parameters": ("parameters", "{:,d}"),
    "used": ("used", "{:,d}"),
    "FVU": ("fvu", "{:.3f}"),
    "CE": ("ce_replaced", "{:.3f}"),
    "rec zero": ("ce_recovered_zero", "{:.3f}"),
    "KL": ("kl", "{:.3f}"),
    "dead": ("dead_fraction", "{:.1%}"),
    "still falls": ("still_falls", "{:.1%}"),
}


def sizes(decomposition: Any, l0: float) -> dict[str, int]:
    """Features, trained numbers, and how many of them an average token multiplies with (routers not counted)."""
    everything = sum(leaf.size for leaf in jax.tree.leaves(decomposition))
    if isinstance(decomposition, MixtureOfDecoders):
        dense = decomposition.encoder.size + decomposition.decoder.size
        return {
            "features": decomposition.features,
            "parameters": everything,
            "used": int(dense + l0 * decomposition.scale.shape[1]),
        }
    if isinstance(decomposition, LinearTransforms):
        share = l0 / decomposition.features
        return {
            "features": decomposition.features,
            "parameters": everything,
            "used": int(share * (decomposition.read.size + decomposition.write.size)),
        }
    widths = 2 * decomposition.target_mean.shape[0]
    skip = getattr(decomposition, "skip", None)
    return {
        "features": decomposition.features,
        "parameters": everything,
        "used": int(l0 * widths + (0 if skip is None else skip.size)),
    }


def falls(late: Sequence[Row], loss: str) -> float:
    """By what share the loss fell from the first to the second half of the last fifth of training."""
    values = [float(row[loss]) for row in late]
    half = len(values) // 2
    first, second = sum(values[:half]) / max(half, 1), sum(values[half:]) / max(len(values) - half, 1)
    return (first - second) / first if half else float("nan")


def answers(rows: Sequence[Row]) -> list[str]:
    """What the numbers say."""
    base = rows[0]
    said = []
    for row in rows[1:]:
        word = "at least as good as" if row["ce_replaced"] <= base["ce_replaced"] else "worse than"
        said.append(
            f"{row['method']}: CE {row['ce_replaced']:.3f} is {word} {base['method']}'s {base['ce_replaced']:.3f}; "
            f"FVU {row['fvu']:.3f} against {base['fvu']:.3f}, L0 {row['l0']:.1f} against {base['l0']:.1f}."
        )
    for row in rows:
        if row["method"] == "linear transforms":
            alive = round(row["features"] * (1 - row["dead_fraction"]))
            fate = "they have collapsed to one" if alive <= 1 else "no collapse to a single one"
            said.append(f"{alive} of {row['features']} transforms are used on held-out text: {fate}.")
    return [*said, "One seed and one layer."]


if __name__ == "__main__":
    command(Config, main, __doc__)
