"""Train a sparse dictionary on one MLP of a language model, score it against baselines, and write a report.

Papers: transcoders (Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944); skip transcoders (Paulo, Shabalin, Belrose 2025,
arXiv 2501.18823); TopK sparse autoencoders (Gao et al. 2024, arXiv 2406.04093).

Command: python -m experiments.transcoder --out runs/demo            (SmolLM2-135M, blocks/1/mlp; what `make demo` runs)
         python -m experiments.transcoder --model tiny --out runs/tiny    (a planted model, nothing to download)
         python -m experiments.transcoder --model minilm-l6 --out runs/minilm    (an encoder, scored by its embeddings)

Expected on SmolLM2: FVU 0.17 against 0.38 of the best baseline, cross-entropy 2.99 against 3.02 (clean 2.95); five to
eight minutes on two cores, 3.6 GB. On MiniLM (blocks/4/mlp, where a single dimension holds half of the variance): FVU
0.02 against 0.04 of the best baseline, similarity of embeddings 0.976 against 0.959 (with the MLP at zero 0.830).
Options whose default is None take the value that the model's preset has.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import grain
import jax
import jax.numpy as jnp
from rich.console import Console

from experiments.command import check_folder, check_positive, command, open_folder, print_scoreboard, write_json
from experiments.on_text import check_mlp
from experiments.presets import Plan, planned
from jaxinterp.core.errors import UserError
from jaxinterp.data.activation_cache import harvested_once
from jaxinterp.data.text.sources import load_corpus
from jaxinterp.data.tokens import split
from jaxinterp.data.windows import epochs_needed, windows
from jaxinterp.decompositions.files import save_dictionary
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.effects import check_effect
from jaxinterp.evaluation.listed_effects import EFFECTS
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.methods import Method, SkipTranscoder, SparseAutoencoder, Transcoder
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.models.load import Subject, load
from jaxinterp.preflight.check import Setting, announce
from jaxinterp.preflight.chips import find
from jaxinterp.report.content import Report
from jaxinterp.report.features import feature_pages
from jaxinterp.report.page import write_report
from jaxinterp.training.fit import check_sizes, fit
from jaxinterp.training.hosts import join
from jaxinterp.training.mesh import fetch, mesh_sizes, model_shardings, parse_mesh
from jaxinterp.training.program import BUFFER_BATCHES, Activations, kept_in
from jaxinterp.training.tracking import JsonLines, read_rows, training_seconds

METHODS: dict[str, Callable[..., Method]] = {
    "transcoder": Transcoder,
    "skip_transcoder": SkipTranscoder,
    "sparse_autoencoder": SparseAutoencoder,
}


@dataclass(frozen=True)
class Config:
    """Where a field is None, its value depends on the model: see experiments/presets.py."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """smollm2-135m, minilm-l6, bilinear-4x128, tiny, a Hugging Face directory, a .gguf file, or a saved model."""
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
    effect: Literal["next_token", "pooled"] | None = None
    """What is asked of the model with the MLP replaced: cross-entropy, or (of an encoder) its pooled embedding."""
    ce_tokens: int = 8_192
    """How many of them that is measured on."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 2_048
    """Tokens a step."""
    pages: int = 64
    """How many features get a page in the report."""
    seed: int = 0
    """Of the data order, the start values and everything random."""
    activations: Activations = "auto"
    """What activations are kept and multiplied in; auto: bfloat16 on accelerators, float32 on a CPU."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """What Adam's first moment is kept in."""
    harvest_parts: int = 1
    """Forward passes that a batch is cut into, one after another, to save memory."""
    cache: Path | None = None
    """Folder for activations on disk: harvested there once, read by this and later runs of the same model and text."""
    mesh: str = "data=1,feature=1"
    """Devices along each axis: data (tokens), feature (dictionary rows), model (the subject model's weights)."""
    hosts: str = "auto"
    """Processes of one run: auto (Cloud TPU, Slurm, experiments.launch), alone, or ADDRESS:PORT,COUNT,INDEX."""
    preflight: str = ""
    """Compile for v5p:4x4x4 (v5e:2x2, cpu:8, auto: what is here), say what the run needs there, and train
    nothing (it counts the harvest, also with --cache)."""
    save_every: int = 100
    """The newest written checkpoint is never more steps old than this."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """What a full disk does: stop the run, or continue it with a warning (several processes stop)."""
    spike: float | None = 100.0
    """A loss so many times the size of the usual one above it ends the run; None: any finite loss is good."""
    resume: bool = False
    """Continue the run in the output folder."""


NOT_KEPT = ("out", "resume", "hosts", "preflight", "cache")


def main(config: Config) -> None:
    """Load, train, score, report."""
    console = Console()
    plan = planned(config)
    method = METHODS[config.method](
        features=plan.features,
        k=plan.k,
        activation=config.activation,
        l1=config.l1,
        auxk=config.auxk,
        dead_after=config.dead_after,
        learning_rate=plan.learning_rate,
        moments=config.moments,
    )
    steps = plan.tokens // config.batch_size
    if config.preflight:
        sys.exit(preflight_of(config, plan, method, steps))
    join(config.hosts)
    mesh = parse_mesh(config.mesh)
    settings = {name: value for name, value in (asdict(config) | asdict(plan)).items() if name not in NOT_KEPT}
    check_sizes(
        steps=steps,
        batch_size=config.batch_size,
        seq=config.seq,
        mesh=mesh,
        save_every=config.save_every,
        harvest_parts=config.harvest_parts,
        spike=config.spike,
    )
    check_positive(config, "heldout_tokens", "ce_tokens")
    check_folder(config.out, settings, resume=config.resume)
    started = time.perf_counter()

    subject = load(config.model, sharding=model_shardings(mesh))
    check_mlp(subject.model, plan.site)
    check_effect(subject.model, EFFECTS[plan.effect])
    train, heldout, facts = text_windows(config, plan, subject)
    out = open_folder(config.out, settings)
    console.print(f"{config.model}, {plan.site}; " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))

    if config.cache is not None:
        console.print(f"activations on disk: {config.cache}")
        needed = min(len(train), (steps + BUFFER_BATCHES) * config.batch_size // config.seq)
        chosen = train.shuffle(0)[:needed]  # a sample of the text, of which a shorter run takes a beginning
        dtype = kept_in(config.activations, jax.default_backend())
        train = harvested_once(subject, chosen, method.needs(plan.site).names(), config.cache, dtype=dtype)
    log = JsonLines(out / "log.jsonl", resume=config.resume)
    trained = fit(
        method,
        subject,
        train,
        site=plan.site,
        steps=steps,
        batch_size=config.batch_size,
        activations=config.activations,
        harvest_parts=config.harvest_parts,
        seed=config.seed,
        mesh=mesh,
        checkpoint=out / "checkpoints",
        save_every=config.save_every,
        on_failed_save=config.on_failed_save,
        spike=config.spike,
        resume=config.resume,
        track=(log,),
    )
    decomposition = fetch(trained.decomposition)
    subject = replace(subject, model=fetch(subject.model))
    if jax.process_index() > 0:
        return
    name = config.method.replace("_", " ")
    seconds = {name: training_seconds(read_rows(out / "log.jsonl"))}
    save_dictionary(decomposition, out / "dictionary")

    console.print("scoring against baselines on held-out text ...")
    clock = time.perf_counter()
    rivals = baselines(subject, train, plan.site, k=plan.k, features=plan.features, seed=config.seed)
    seconds |= dict.fromkeys(rivals, time.perf_counter() - clock)
    rows = scoreboard(
        {name: decomposition, **rivals},
        subject,
        heldout,
        tokens=config.heldout_tokens,
        ce_tokens=config.ce_tokens,
        effect=EFFECTS[plan.effect],
    )
    rows = [row | {"seconds": round(seconds[row["method"]], 1)} for row in rows]
    write_json(out / "scoreboard.json", rows)

    densities, pages = feature_pages(decomposition, subject, heldout, features=config.pages, seed=config.seed)
    report = Report(
        title=f"{config.model}: {plan.site}",
        subtitle=f"{name}, {plan.features} features, {config.activation}",
        facts={name: str(value) for name, value in settings.items()} | facts,
        scoreboard=rows,
        curves=read_rows(out / "log.jsonl"),
        densities=densities,
        features=pages,
    )
    path = write_report(report, out / "report.html")
    print_scoreboard(rows)
    console.print(f"{time.perf_counter() - started:.0f} s in all. Report: {path}")


def preflight_of(config: Config, plan: Plan, method: Method, steps: int) -> int:
    """Print what the run would need on the devices that --preflight names; 0 where it fits, else 1."""
    target = find(config.preflight)
    dtype = jnp.float32 if target.devices[0].platform == "cpu" else jnp.bfloat16  # as `load` has it there
    check_mlp(model_shapes(config.model, dtype=dtype), plan.site)
    return announce(
        method,
        lambda sharding: model_shapes(config.model, dtype=dtype, sharding=sharding),
        plan.site,
        target=target,
        setting=Setting(mesh_sizes(config.mesh), config.batch_size),
        steps=steps,
        seq=config.seq,
        activations=config.activations,
        harvest_parts=config.harvest_parts,
    )


def text_windows(
    config: Config, plan: Plan, subject: Subject
) -> tuple[grain.MapDataset, grain.MapDataset, dict[str, str]]:
    """Training and held-out windows, and what to say of the text."""
    if subject.tokenizer is None:
        raise UserError(f"model {config.model} came without a tokenizer: give its folder a tokenizer.json.")
    # A tenth is held out by document; a fair sample of the text is enough where it has far more than is asked for.
    enough = 2 * (plan.tokens + 10 * config.heldout_tokens)
    corpus = load_corpus(config.text, subject.tokenizer, max_tokens=enough)
    parts = split(corpus, 0.1)
    train, heldout = (windows(part, config.seq) for part in parts)
    facts = {
        "corpus": corpus.name,
        "corpus hash": corpus.content_hash[:16],
        "training text": f"{parts[0].tokens:,} tokens",
        "epochs": f"{epochs_needed(parts[0], config.seq, plan.tokens):.2f}",
    }
    return train, heldout, facts


if __name__ == "__main__":
    command(Config, main, __doc__)
