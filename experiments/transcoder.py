"""Train a sparse dictionary on one MLP of a language model, score it against baselines, and write a report.

Papers: transcoders (Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944); skip transcoders (Paulo, Shabalin, Belrose 2025,
arXiv 2501.18823); TopK sparse autoencoders (Gao et al. 2024, arXiv 2406.04093).

Command: python -m experiments.transcoder --out runs/demo            (SmolLM2-135M, blocks/1/mlp; what `make demo` runs)
         python -m experiments.transcoder --model tiny --out runs/tiny    (a planted model, nothing to download)
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import numpy as np
from rich.console import Console

from experiments.command import claim_folder, command, print_scoreboard
from jaxinterp.data.tokens import load_corpus, split
from jaxinterp.data.windows import batches, windows
from jaxinterp.decompositions.files import save_dictionary
from jaxinterp.errors import UserError
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.methods import SkipTranscoder, SparseAutoencoder, Transcoder
from jaxinterp.models.load import Subject, load
from jaxinterp.models.sites import check_site
from jaxinterp.report.content import Report
from jaxinterp.report.features import feature_pages
from jaxinterp.report.page import write_report
from jaxinterp.storage import first_difference
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import parse_mesh
from jaxinterp.training.tracking import JsonLines, ProgressBar, read_rows

METHODS = {"transcoder": Transcoder, "skip_transcoder": SkipTranscoder, "sparse_autoencoder": SparseAutoencoder}


@dataclass(frozen=True)
class Config:
    """Where a field is None, its value depends on the model: see PRESETS."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A known name (smollm2-135m, tiny), a Hugging Face directory, a .gguf file, or a saved jaxinterp model."""
    site: str | None = None
    """The MLP leaf to decompose, such as blocks/1/mlp."""
    method: Literal["transcoder", "skip_transcoder", "sparse_autoencoder"] = "skip_transcoder"
    """How to decompose it."""
    features: int | None = None
    """Size of the dictionary."""
    activation: Literal["topk", "batch_topk", "relu"] = "topk"
    """How codes are made sparse."""
    k: int | None = None
    """Active features per token (topk, batch_topk), and k of the baselines."""
    l1: float = 0.0
    """Coefficient of the L1 penalty."""
    auxk: float = 1 / 32
    """Coefficient of AuxK, which revives dead features."""
    dead_after: int = 100_000
    """A feature is dead when it has not fired for this many tokens."""
    learning_rate: float | None = None
    """Peak learning rate of Adam."""
    text: str = "docs"
    """Training text: docs, kjv, shakespeare, several joined by +, or a path (.txt, .jsonl, .bin, .npy, a folder)."""
    tokens: int | None = None
    """Training tokens."""
    heldout_tokens: int = 32_768
    """Held-out tokens for the scoreboard."""
    ce_tokens: int = 8_192
    """How many of them the cross-entropies are measured on."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 2_048
    """Tokens a step."""
    pages: int = 64
    """How many features get a page in the report."""
    seed: int = 0
    """Of the data order, the start values and everything random."""
    mesh: str = "data=1,feature=1"
    """Devices along each axis."""
    save_every: int = 100
    """Steps between checkpoints."""
    resume: bool = False
    """Continue the run in the output folder."""


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"site": "blocks/1/mlp", "features": 256, "k": 16, "learning_rate": 3e-3, "tokens": 400_000},
    "smollm2-135m": {"site": "blocks/1/mlp", "features": 4608, "k": 32, "learning_rate": 2e-3, "tokens": 900_000},
}
OTHERWISE = {"features": 4096, "k": 32, "learning_rate": 1e-3, "tokens": 1_000_000}


def main(config: Config) -> None:
    """Load, train, score, report."""
    console = Console()
    config = with_preset(config)
    mesh = parse_mesh(config.mesh)
    method = METHODS[config.method](
        features=config.features,
        k=config.k,
        activation=config.activation,
        l1=config.l1,
        auxk=config.auxk,
        dead_after=config.dead_after,
        learning_rate=config.learning_rate,
    )
    out = claim_folder(config.out, resume=config.resume)
    write_config(out / "config.json", config)
    started = time.perf_counter()

    subject = load(config.model)
    check_site(subject.model, config.site)
    train, heldout, facts = text_windows(config, subject)
    console.print(f"{config.model}: {config.site}; {facts}")

    steps = max(1, config.tokens // config.batch_size)
    log = JsonLines(out / "log.jsonl", resume_step=steps if config.resume else None)
    clock = time.perf_counter()
    with ProgressBar(steps) as bar:
        trained = fit(
            method,
            subject,
            train,
            site=config.site,
            steps=steps,
            batch_size=config.batch_size,
            seed=config.seed,
            mesh=mesh,
            checkpoint=out / "checkpoints",
            save_every=config.save_every,
            resume=config.resume,
            track=(log, bar),
        )
    seconds = {config.method: time.perf_counter() - clock}
    save_dictionary(trained.decomposition, out / "dictionary")

    console.print("scoring against baselines on held-out text ...")
    clock = time.perf_counter()
    sample = (batch for batch, _ in zip(batches(train, 8, seed=config.seed + 1), range(64), strict=False))
    rivals = baselines(subject, sample, config.site, k=config.k, features=config.features, seed=config.seed)
    seconds |= dict.fromkeys(rivals, time.perf_counter() - clock)
    held = heldout_batches(heldout, config)
    rows = scoreboard({config.method: trained.decomposition, **rivals}, subject, held, ce_tokens=config.ce_tokens)
    rows = [row | {"seconds": round(seconds[row["method"]], 1)} for row in rows]
    (out / "scoreboard.json").write_text(json.dumps(rows, indent=2) + "\n")

    densities, pages = feature_pages(trained.decomposition, subject, heldout, features=config.pages, seed=config.seed)
    report = Report(
        title=f"{config.model}: {config.site}",
        subtitle=f"{config.method.replace('_', ' ')}, {config.features} features, {config.activation}",
        facts={name: str(value) for name, value in asdict(config).items()} | facts,
        scoreboard=rows,
        curves=read_rows(out / "log.jsonl"),
        densities=densities,
        features=pages,
    )
    path = write_report(report, out / "report.html")
    print_scoreboard(rows, console)
    console.print(f"{time.perf_counter() - started:.0f} s in all. Report: {path}")


def with_preset(config: Config) -> Config:
    """The configuration with every None filled in for its model.

    Raises:
      UserError: a field has no value for this model.
    """
    preset = PRESETS.get(config.model, OTHERWISE)
    filled = replace(config, **{name: value for name, value in preset.items() if getattr(config, name) is None})
    if filled.site is None:
        raise UserError("site is not set: name an MLP leaf of the model, such as --site blocks/1/mlp.")
    return filled


def text_windows(config: Config, subject: Subject) -> tuple[grain.MapDataset, grain.MapDataset, dict[str, str]]:
    """Training and held-out windows, and what to say of the text."""
    corpus = load_corpus(config.text, subject.tokenizer)
    train, heldout = (windows(part, config.seq) for part in split(corpus, 0.1))
    available = len(train) * config.seq
    facts = {"corpus": corpus.name, "corpus_hash": corpus.content_hash[:16], "train_tokens": f"{available:,}"}
    facts["epochs"] = f"{config.tokens / available:.2f}"
    return train, heldout, facts


def heldout_batches(heldout: grain.MapDataset, config: Config) -> Any:
    """Batches of four held-out windows, as many as `heldout_tokens` asks for."""
    count = max(1, config.heldout_tokens // (4 * config.seq))
    return (batch for batch, _ in zip(batches(heldout, 4, seed=0), range(count), strict=False))


def write_config(path: Path, config: Config) -> None:
    """Keep the run's configuration beside its results; on resume, refuse another one.

    Raises:
      UserError: the folder's run has another value for a field that changes the result.
    """
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    del plain["resume"], plain["out"]
    if path.exists():
        difference = first_difference(json.loads(path.read_text()), plain)
        if difference is not None:
            field, saved, asked = difference
            raise UserError(f"{path.parent} was run with {field}={saved!r}, not {asked!r}: resume with the same value.")
    path.write_text(json.dumps(plain, indent=2) + "\n")


if __name__ == "__main__":
    command(Config, main, __doc__)
