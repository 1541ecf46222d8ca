"""Does a transcoder pay for reading the MLP's input? Transcoders and autoencoders of one MLP, at several sparsities.

Dunefsky, Chlenski, Nanda 2024 (arXiv 2406.11944, section 4) ask whether a transcoder, which must compute the MLP, is as
sparse and as faithful as an autoencoder, which is shown its output; Paulo et al. 2025 (arXiv 2501.18823) add a linear
path. Here: TopK in all of them, the same dictionary size, text, steps and start key, five sparsities, one run.

Command: python -m experiments.transcoder_vs_sae --out runs/transcoder_vs_sae

Not yet measured at full size on SmolLM2 (blocks/1/mlp).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.command import check_folder, command, open_folder
from experiments.comparison import Row, check_mlp, pareto, read_text, train_together
from jaxinterp.errors import UserError
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.methods import Method, SkipTranscoder, SparseAutoencoder, Transcoder
from jaxinterp.models.load import load
from jaxinterp.report.sections import Section, write_page
from jaxinterp.training.fit import check_sizes
from jaxinterp.training.mesh import parse_mesh

KINDS: dict[str, Any] = {
    "autoencoder": SparseAutoencoder,
    "transcoder": Transcoder,
    "skip transcoder": SkipTranscoder,
}


@dataclass(frozen=True)
class Config:
    """One model, one MLP, several k."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A known name (smollm2-135m, tiny), a Hugging Face directory, a .gguf file, or a saved jaxinterp model."""
    site: str = "blocks/1/mlp"
    """The MLP leaf."""
    ks: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Active features per token."""
    features: int = 2304
    """Size of every dictionary."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam."""
    text: str = "docs"
    """Training text: docs, kjv, shakespeare, several joined by +, or a path."""
    tokens: int = 400_000
    """Training tokens."""
    heldout_tokens: int = 32_768
    """Held-out tokens for FVU."""
    ce_tokens: int = 8_192
    """How many of them the cross-entropies are measured on."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 1024
    """Tokens a step."""
    seed: int = 0
    """Of the data order and the start values."""
    mesh: str = "data=1,feature=1"
    """Devices along each axis."""
    resume: bool = False
    """Continue the run in the output folder."""


def main(config: Config) -> None:
    """Train, score, compare."""
    console = Console()
    clock = time.perf_counter()
    mesh = parse_mesh(config.mesh)
    if not config.ks:
        raise UserError("ks is empty: give at least one number of active features.")
    methods: dict[str, Method] = {
        f"{kind}, k {k}": make(
            features=config.features, k=k, learning_rate=config.learning_rate, dead_after=config.tokens // 5
        )
        for kind, make in KINDS.items()
        for k in config.ks
    }
    steps = config.tokens // config.batch_size
    check_sizes(steps=steps, batch_size=config.batch_size, seq=config.seq, mesh=mesh)
    record = {name: value for name, value in asdict(config).items() if name not in ("out", "resume")}
    record["ks"] = list(config.ks)
    check_folder(config.out, record, resume=config.resume)
    subject = load(config.model)
    check_mlp(subject.model, config.site)
    train, heldout = read_text(
        config.text, subject, tokens=config.tokens, heldout_tokens=config.heldout_tokens, seq=config.seq
    )
    out = open_folder(config.out, record)
    trained = train_together(methods, subject, train, config, out, tokens=config.tokens)
    console.print(f"{time.perf_counter() - clock:.0f} s so far; scoring on held-out text ...")
    board = scoreboard(
        trained.decomposition, subject, heldout, tokens=config.heldout_tokens, ce_tokens=config.ce_tokens
    )
    names = [(kind, k) for kind in KINDS for k in config.ks]
    rows = [row | {"method": kind, "k": k} for row, (kind, k) in zip(board, names, strict=True)]
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    sentences = answers(rows)
    for sentence in sentences:
        console.print(sentence)
    path = report(out, config, rows, sentences, {name: str(value) for name, value in record.items()})
    console.print(f"{time.perf_counter() - clock:.0f} s in all. Report: {path}")


def answers(rows: Sequence[Row]) -> list[str]:
    """What the numbers say of the papers' two questions."""
    by = {(row["method"], row["k"]): row for row in rows}
    ks = sorted({row["k"] for row in rows})
    said = []
    for kind, other, question in (
        ("transcoder", "autoencoder", "As faithful as an autoencoder"),
        ("skip transcoder", "transcoder", "Better with a linear path"),
    ):
        for key, name in (("ce_replaced", "cross-entropy"), ("fvu", "FVU")):
            won = [k for k in ks if by[kind, k][key] <= by[other, k][key]]
            pairs = ", ".join(f"k {k}: {by[kind, k][key]:.3f} / {by[other, k][key]:.3f}" for k in ks)
            said.append(
                f"{question}, by {name}? The {kind} is at least as good as the {other} at {len(won)} of {len(ks)} "
                f"sparsities ({pairs})."
            )
    intervals = [
        k
        for k in ks
        if by["transcoder", k]["ce_replaced_interval"][0] <= by["autoencoder", k]["ce_replaced_interval"][1]
        and by["autoencoder", k]["ce_replaced_interval"][0] <= by["transcoder", k]["ce_replaced_interval"][1]
    ]
    said.append(
        f"The 95 % intervals of transcoder and autoencoder overlap in cross-entropy at {len(intervals)} of {len(ks)} "
        "sparsities. One seed and one layer."
    )
    return said


def report(out: Path, config: Config, rows: list[Row], sentences: list[str], facts: dict[str, str]) -> Path:
    """The page."""
    table = tuple(
        {
            "method": row["method"],
            "k": row["k"],
            "FVU": row["fvu"],
            "CE": row["ce_replaced"],
            "CE added": row["ce_replaced"] - row["ce_clean"],
            "recovered, zero": row["ce_recovered_zero"],
            "KL": row["kl"],
            "top-1": row["top1_agreement"],
            "dead": row["dead_fraction"],
        }
        for row in rows
    )
    charts = pareto({kind: [row for row in rows if row["method"] == kind] for kind in KINDS}, emphasis="transcoder")
    return write_page(
        out / "report.html",
        title=f"{config.model}: {config.site}, transcoders against autoencoders",
        subtitle=f"TopK, {config.features} features, {config.tokens:,} tokens each, one run",
        summary=sentences[0],
        sections=[
            Section("Against L0", tuple(sentences), charts=charts),
            Section("All numbers", rows=table),
        ],
        facts=facts,
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
