"""Gradient SAEs: is a dictionary that chooses features by their effect on the loss better for the model's predictions?

Olmo et al. 2025 (arXiv 2411.10397) choose the k features of a token by activation times effect on the model's own loss,
and report a better cross-entropy at the same L0, fewer dead features, and features that move the logits more. Here: one
late MLP's output, TopK (strength 0) beside the mixture at three strengths and the pure effect score, same start, text
and steps, trained in one run with the gradient harvested in it. Each is scored twice: with the gradient, which nobody
has before the loss is known, and without it, falling back to plain TopK.

Command: python -m experiments.gradient_sae --out runs/gradient_sae

Not yet measured at full size on SmolLM2 (blocks/28/mlp).
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console

from experiments.command import check_folder, command, open_folder
from experiments.comparison import Row, check_mlp, read_text, train_together
from jaxinterp.data.text import take
from jaxinterp.errors import UserError
from jaxinterp.evaluation.scoreboard import compare, scoreboard
from jaxinterp.methods import GradientSparseAutoencoder, Method
from jaxinterp.models.load import load
from jaxinterp.models.sites import Add, run
from jaxinterp.report.plots import Dot, dot_plot
from jaxinterp.report.sections import Chart, Section, write_page
from jaxinterp.training.fit import check_sizes
from jaxinterp.training.mesh import parse_mesh

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"own": 1.0, "strength": 0.0},
    "mixture 0.5": {"own": 1.0, "strength": 0.5},
    "mixture 2": {"own": 1.0, "strength": 2.0},
    "mixture 8": {"own": 1.0, "strength": 8.0},
    "effect alone": {"own": 0.0, "strength": 1.0},
}


@dataclass(frozen=True)
class Config:
    """One late MLP, one k."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A known name (smollm2-135m, tiny), a Hugging Face directory, a .gguf file, or a saved jaxinterp model."""
    site: str = "blocks/28/mlp"
    """The MLP leaf; the gradient wants the whole forward pass anyway, so that a late one costs little more."""
    k: int = 16
    """Active features per token."""
    features: int = 1152
    """Size of every dictionary."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam."""
    text: str = "docs"
    """Training text: docs, kjv, shakespeare, several joined by +, or a path."""
    tokens: int = 100_000
    """Training tokens."""
    heldout_tokens: int = 8_192
    """Held-out tokens, for FVU and cross-entropies alike."""
    steered: int = 32
    """Features of each dictionary whose effect on the logits is measured."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 512
    """Tokens a step."""
    seed: int = 0
    """Of the data order and the start values."""
    mesh: str = "data=1,feature=1"
    """Devices along each axis."""
    resume: bool = False
    """Continue the run in the output folder."""


def main(config: Config) -> None:
    """Train, score, steer, compare."""
    console = Console()
    clock = time.perf_counter()
    mesh = parse_mesh(config.mesh)
    shared: dict[str, Any] = {
        "features": config.features,
        "k": config.k,
        "learning_rate": config.learning_rate,
        "dead_after": config.tokens // 5,
    }
    methods: dict[str, Method] = {
        name: GradientSparseAutoencoder(**shared, **variant) for name, variant in VARIANTS.items()
    }
    if not 1 <= config.steered <= config.features:
        raise UserError(f"steered={config.steered} must lie between 1 and features={config.features}.")
    steps = config.tokens // config.batch_size
    check_sizes(steps=steps, batch_size=config.batch_size, seq=config.seq, mesh=mesh)
    record = {name: value for name, value in asdict(config).items() if name not in ("out", "resume")}
    check_folder(config.out, record, resume=config.resume)
    subject = load(config.model)
    check_mlp(subject.model, config.site)
    train, heldout = read_text(
        config.text, subject, tokens=config.tokens, heldout_tokens=config.heldout_tokens, seq=config.seq
    )
    out = open_folder(config.out, record)
    trained = train_together(methods, subject, train, config, out, tokens=config.tokens)
    console.print(f"{time.perf_counter() - clock:.0f} s so far; scoring on held-out text ...")
    entries: dict[str, Any] = {}
    for name, dictionary in trained.decomposition.items():
        alone = replace(dictionary, sites=dictionary.sites.without_gradients)
        entries |= {name: dictionary, f"{name}, no gradient": alone}
    board = scoreboard(entries, subject, heldout, tokens=config.heldout_tokens, ce_tokens=config.heldout_tokens)
    late = trained.history[-1]
    rows: list[Row] = []
    for name, dictionary in trained.decomposition.items():
        own = next(row for row in board if row["method"] == name)
        alone = next(row for row in board if row["method"] == f"{name}, no gradient")
        moved = steering(dictionary, subject.model, heldout, features=config.steered, seed=config.seed)
        rows.append(own | {"no_gradient": alone, "effect": late[f"{name}/effect"], "steering_kl": moved})
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    sentences = answers(rows)
    for sentence in sentences:
        console.print(sentence)
    path = report(out, config, rows, sentences, {name: str(value) for name, value in record.items()})
    console.print(f"{time.perf_counter() - clock:.0f} s in all. Report: {path}")


def steering(dictionary: Any, model: Any, heldout: grain.MapDataset, *, features: int, seed: int) -> float:
    """The mean KL(clean || steered) of the next token when one feature is added everywhere, over features at random.

    Every feature is added with the same length: the root mean square length of the target about its mean. Dead features
    count: a dictionary has them.
    """
    window = take(heldout, 1, seed=seed, rows=1)[0]
    tokens = jnp.asarray(window["tokens"])
    array = dictionary.sites.writes
    length = float(jnp.sqrt(dictionary.target_variance))
    clean = _added(model, tokens, array, jnp.zeros(dictionary.decoder.shape[1]))
    counts = jnp.asarray(window["weight"][:, :-1])
    chosen = np.random.default_rng(seed).choice(dictionary.features, features, replace=False)
    total = 0.0
    for feature in chosen:
        direction = dictionary.decoder[int(feature)]
        steered = _added(model, tokens, array, direction * length / jnp.linalg.norm(direction))
        total += float(jnp.sum(compare(steered, clean, tokens)["kl"] * counts) / jnp.sum(counts))
    return total / features


@eqx.filter_jit
def _added(
    model: Any, tokens: Int[Array, "batch seq"], array: str, delta: Float[Array, " d_out"]
) -> Float[Array, "batch seq vocab"]:
    return run(model, tokens, edits={array: Add(delta)}).logits


def answers(rows: list[Row]) -> list[str]:
    """What the numbers say of the paper's three claims, and of what happens without the gradient."""
    plain, others = rows[0], rows[1:]
    best = min(others, key=lambda row: row["ce_replaced"])
    alone = min(others, key=lambda row: row["no_gradient"]["ce_replaced"])
    fewer = [row["method"] for row in others if row["dead_fraction"] < plain["dead_fraction"]]
    moves = [row["method"] for row in others if row["steering_kl"] > plain["steering_kl"]]
    better = best["ce_replaced"] < plain["ce_replaced"]
    return [
        f"With the gradient, {best['method']} has the lowest cross-entropy of those that use it, "
        f"{best['ce_replaced']:.3f}: {'lower' if better else 'not lower'} than plain TopK's "
        f"{plain['ce_replaced']:.3f} (unchanged {plain['ce_clean']:.3f}). The gradient has seen the "
        "next token: this comparison is not fair to TopK.",
        f"Without it, the best of them is {alone['method']} at {alone['no_gradient']['ce_replaced']:.3f}, "
        f"{'lower' if alone['no_gradient']['ce_replaced'] < plain['ce_replaced'] else 'not lower'} than plain TopK.",
        f"FVU: plain TopK {plain['fvu']:.3f}; "
        + ", ".join(f"{row['method']} {row['fvu']:.3f} ({row['no_gradient']['fvu']:.3f} without)" for row in others)
        + ".",
        f"Fewer dead features than plain TopK ({plain['dead_fraction']:.1%}): {', '.join(fewer) or 'none'}.",
        f"Features that move the predictions more than plain TopK's (KL {plain['steering_kl']:.3f} at equal length): "
        f"{', '.join(moves) or 'none'}.",
        "One seed, one layer, one short run.",
    ]


def report(out: Path, config: Config, rows: list[Row], sentences: list[str], facts: Mapping[str, str]) -> Path:
    """The page."""
    table = tuple(
        {
            "method": row["method"],
            "FVU": row["fvu"],
            "FVU, no gradient": row["no_gradient"]["fvu"],
            "CE": row["ce_replaced"],
            "CE, no gradient": row["no_gradient"]["ce_replaced"],
            "first-order effect of the error": row["effect"],
            "dead": row["dead_fraction"],
            "steering KL": row["steering_kl"],
        }
        for row in rows
    )

    def dots(title: str, of: Any) -> Chart:
        plot = dot_plot(
            [
                Dot(row["method"], of(row)["ce_replaced"], of(row)["ce_replaced_interval"], emphasis=row is rows[0])
                for row in rows
            ],
            title=title,
        )
        return Chart(title, "cross-entropy, nats per token; plain TopK is marked", plot)

    return write_page(
        out / "report.html",
        title=f"{config.model}: {config.site}, chosen by effect",
        subtitle=f"Gradient sparse autoencoders, {config.features} features, {config.k} active",
        summary=sentences[0],
        sections=[
            Section(
                "What came out",
                tuple(sentences),
                table,
                (
                    dots("With the gradient", lambda row: row),
                    dots("Without it", lambda row: row["no_gradient"]),
                ),
            )
        ],
        facts=facts,
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
