"""Train a decomposition of a language model, score it against baselines, and write a report.

Papers: transcoders (Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944); skip transcoders (Paulo, Shabalin, Belrose 2025,
arXiv 2501.18823); TopK sparse autoencoders (Gao et al. 2024, arXiv 2406.04093); the other methods name theirs.

Command: jaxinterp transcoder --out runs/demo         (or `python -m jaxinterp ...`; any method of `jaxinterp --help`)
         jaxinterp skip_transcoder --model tiny --out runs/tiny             (a planted model, nothing to download)
         jaxinterp gated --model tiny --out runs/gated --set l1=0.05        (any hyperparameter of the method)
         jaxinterp transcoder --out runs/demo --resume                      (goes on with the settings of that folder)

"smollm2-135m" is SmolLM2-135M-Instruct, 4-bit (Q4_1), dequantised: its wheel holds no other.

Expected on it (skip_transcoder, what `make demo` runs): FVU 0.17 against 0.38 of the best baseline, cross-entropy 2.99
against 3.02 (clean 2.95); five to eight minutes on two cores, 3.6 GB. On MiniLM (blocks/4/mlp, where a single dimension
holds half of the variance): FVU 0.02 against 0.04 of the best baseline, similarity of embeddings 0.976 against 0.959
(with the MLP at zero 0.830).
"""

import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import grain
import jax
import jax.numpy as jnp
import tyro
from jaxtyping import PyTree

from jaxinterp.commands.methods import SEVERAL, hyperparameters, make_method, read_settings
from jaxinterp.commands.on_text import check_mlp, check_steps
from jaxinterp.commands.presets import Plan, planned, preset_of
from jaxinterp.commands.results import write_results
from jaxinterp.commands.shell import check_folder, check_positive, folder_of_a_run, say
from jaxinterp.core.batch import GRADIENT
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.core.sites import as_needs
from jaxinterp.data.activation_cache import harvested_once
from jaxinterp.data.text.sources import load_corpus
from jaxinterp.data.tokens import split
from jaxinterp.data.windows import epochs_needed, windows
from jaxinterp.decompositions.saved import save
from jaxinterp.evaluation.effects import check_effect
from jaxinterp.evaluation.listed_effects import EFFECTS
from jaxinterp.methods import Method
from jaxinterp.models.files.shapes import model_shapes
from jaxinterp.models.load import Subject, load
from jaxinterp.models.sites import check_site
from jaxinterp.preflight.check import Setting, announce
from jaxinterp.preflight.chips import find
from jaxinterp.training.fit import check_sizes, expand, fit
from jaxinterp.training.hosts import join
from jaxinterp.training.mesh import fetch, mesh_sizes, model_shardings, parse_mesh
from jaxinterp.training.program import BUFFER_BATCHES, Activations, kept_in
from jaxinterp.training.progress import waiting
from jaxinterp.training.tracking import JsonLines, read_rows, training_seconds


@dataclass(frozen=True)
class Config:
    """One run. What is None takes the value of the model's preset or of the method."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """smollm2-135m (SmolLM2-135M-Instruct, 4-bit Q4_1, dequantised), minilm-l6, bilinear-4x128, tiny, a
    Hugging Face directory, a .gguf file, or a saved model."""
    site: str | None = None
    """The leaf to decompose, such as blocks/1/mlp; of attention blocks/1/attn, of several layers blocks/*/mlp."""
    method: str = "skip_transcoder"
    """How to decompose it: one of the methods above."""
    features: int | None = None
    """Size of the dictionary."""
    activation: str | None = None
    """How codes are made sparse: topk, batch_topk, relu; of cross_layer also jumprelu."""
    k: int | None = None
    """Active features per token (topk, batch_topk), and k of the baselines."""
    l1: float | None = None
    """Coefficient of the L1 penalty."""
    auxk: float | None = None
    """Coefficient of AuxK, which revives dead features."""
    dead_after: int = 100_000
    """A feature is dead when it has not fired for this many tokens."""
    learning_rate: float | None = None
    """Peak learning rate of Adam."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE of any other hyperparameter of the method; may be repeated."""
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
    later: int = 0
    """Windows in which each of them is ablated, to show what later layers make of it; 0: not."""
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
    """Processes of one run: auto (Cloud TPU, Slurm, jaxinterp launch), alone, or ADDRESS:PORT,COUNT,INDEX."""
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
    """Continue the run in the output folder, with the settings that are kept in it."""


NOT_KEPT = ("out", "resume", "hosts", "preflight")


def default_of(model: str, method: Any) -> Config:
    """The configuration of a model and a method where nothing else is asked for, its values as --help shows them."""
    plan: dict[str, Json] = {name: value or None for name, value in asdict(preset_of(model, method)).items()}
    own = {name: one.default for name, one in hyperparameters(method).items() if name in ("activation", "l1", "auxk")}
    return Config(Path("runs") / method, model=model, method=method, **plan, **own)


def method_of(config: Config, plan: Plan) -> Method:
    """The method with the hyperparameters that are asked for, and the preset's."""
    usual: dict[str, Json] = {"features": plan.features, "k": plan.k, "learning_rate": plan.learning_rate}
    usual |= {"dead_after": config.dead_after, "moments": config.moments}
    asked = {name: getattr(config, name) for name in ("activation", "l1", "auxk")}
    given = {name: value for name, value in asked.items() if value is not None}
    return make_method(config.method, usual, given | read_settings(config.method, config.set))


def main(config: Config) -> None:
    """Load, train, score, report."""
    plan = planned(config)
    method = method_of(config, plan)
    steps = check_steps(plan.tokens, config.batch_size)
    if config.preflight:
        sys.exit(preflight_of(config, plan, method, steps))
    join(config.hosts)
    mesh = parse_mesh(config.mesh)
    settings = {name: value for name, value in (asdict(config) | asdict(plan)).items() if name not in NOT_KEPT}
    settings = settings | {"set": list(config.set), "cache": None if config.cache is None else str(config.cache)}
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

    with waiting(f"loading {config.model}"):
        subject = load(config.model, sharding=model_shardings(mesh))
    check_leaf(config, method, subject.model, plan.site)
    check_effect(subject.model, EFFECTS[plan.effect])
    with waiting(f"reading {config.text}"):
        train, heldout, facts = text_windows(config, plan, subject)
    facts = {"checkpoint": subject.source or subject.name} | facts
    say(f"{config.model}, {plan.site}; " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
    train = from_cache(config, plan, method, subject, train, steps)
    with folder_of_a_run(config.out, settings) as out:
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
            track=(JsonLines(out / "log.jsonl", resume=config.resume),),
        )
    decomposition = fetch(trained.decomposition)
    subject = replace(subject, model=fetch(subject.model))
    if jax.process_index() > 0:
        return
    save(decomposition, out / "dictionary", overwrite=config.resume)
    seconds = training_seconds(read_rows(out / "log.jsonl"))
    path = write_results(config, plan, decomposition, subject, train, heldout, settings, facts, seconds)
    say(f"{time.perf_counter() - started:.0f} s in all. Report: {path}")


def check_leaf(config: Config, method: Method, model: PyTree, site: str) -> None:
    """Raises UserError where the site is not a leaf that the method takes: before any text is read."""
    if config.method not in SEVERAL and config.method != "attention":
        check_mlp(model, site)
    for name in as_needs(method.needs(expand(model, site))).names():
        check_site(model, name.removesuffix(GRADIENT))


def from_cache(
    config: Config, plan: Plan, method: Method, subject: Subject, train: grain.MapDataset, steps: int
) -> grain.MapDataset:
    """The windows with their activations, where --cache names a folder for them."""
    if config.cache is None:
        return train
    needed = min(len(train), (steps + BUFFER_BATCHES) * config.batch_size // config.seq)
    chosen = train.shuffle(0)[:needed]  # a sample of the text, of which a shorter run takes a beginning
    dtype = kept_in(config.activations, jax.default_backend())
    with waiting(f"activations on disk, {config.cache}"):
        return harvested_once(subject, chosen, method.needs(plan.site).names(), config.cache, dtype=dtype)


def preflight_of(config: Config, plan: Plan, method: Method, steps: int) -> int:
    """Print what the run would need on the devices that --preflight names; 0 where it fits, else 1."""
    target = find(config.preflight)
    dtype = jnp.float32 if target.devices[0].platform == "cpu" else jnp.bfloat16  # as `load` has it there
    check_leaf(config, method, model_shapes(config.model, dtype=dtype), plan.site)
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
