"""Train a small language model with a chosen kind of MLP, to have a subject whose every weight and text is known.

Command: python -m experiments.train_language_model --out runs/bilinear                     (4 x 128, bilinear, docs)
         python -m experiments.train_language_model --mlp gated --layers 2 --out runs/gated

The tokenizer is trained on the training documents, a tenth of the documents is held out by content, and what `load`
takes is written to OUT/model: weights as float16, tokenizer, a sample of the held-out documents as token ids
(heldout.npy), the loss curve (loss.csv), and recipe.json: the settings, the corpus and its hash, the held-out
cross-entropy of the float16 weights. `load("bilinear-4x128")` is what the first command gave.

A plain transformer: RMSNorm before each sublayer, rotary positions, no biases, untied embeddings. The kinds of MLP:

    gelu, relu    f(x W_up) W_down
    gated         (SiLU(x W_gate) * (x W_up)) W_down           Shazeer 2020, arXiv 2002.05202
    bilinear      ((x W_gate) * (x W_up)) W_down               the same paper; Pearce et al. 2024, arXiv 2410.08417
    moe_x, switch, monet_horizontal, monet_vertical, linear_neurons, peer, mixer, permuted, kat
                  see jaxinterp.models.mixtures.config:  --mlp moe_x --experts 8 --active 2 --d-mlp 256
                                                         --mlp monet_horizontal --experts 32 --active 8 --d-mlp 16

Expected of the first command: held-out cross-entropy 3.26 nats a token (uniform: 7.62), training loss 3.08, after 2,000
steps of 2,048 tokens, 1.4 epochs; half an hour at the 2,200 tokens a second of two cores that others used too. The text
differs with the versions of the installed packages, and so does the loss.
"""

import platform
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.own_text import Text, text_of
from jaxinterp.commands.shell import (
    check_folder,
    check_positive,
    command,
    folder_of_a_run,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.data.token_files import read_token_file
from jaxinterp.data.tokens import TokenCorpus
from jaxinterp.data.windows import epochs_needed, windows
from jaxinterp.evaluation.language_loss import language_loss
from jaxinterp.methods import Method
from jaxinterp.methods.language_model import LanguageModel
from jaxinterp.methods.mixture_language_model import MixtureLanguageModel
from jaxinterp.models.load import Subject, load, save_subject
from jaxinterp.models.mixtures.config import KindOfMLP, MixtureConfig
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import Activation
from jaxinterp.models.transformer import Transformer, TransformerConfig, initialise
from jaxinterp.training.fit import check_sizes, fit
from jaxinterp.training.hosts import join
from jaxinterp.training.loop import Tracker
from jaxinterp.training.mesh import fetch, parse_mesh
from jaxinterp.training.tracking import JsonLines, check_tracker, read_rows, tracker, training_seconds

MLPS: dict[str, tuple[bool, Activation]] = {
    "gelu": (False, "gelu"),
    "relu": (False, "relu"),
    "gated": (True, "silu"),
    "bilinear": (True, "identity"),
}
"""Kind of MLP -> whether it is gated, and its activation."""


@dataclass(frozen=True)
class Config:
    """The defaults are the recipe of the model `bilinear-4x128`."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    mlp: Literal["gelu", "relu", "gated", "bilinear"] | KindOfMLP = "bilinear"
    """Kind of MLP."""
    layers: int = 4
    """Blocks."""
    d_model: int = 128
    """Width of the residual stream."""
    d_mlp: int = 512
    """Hidden neurons of an MLP."""
    experts: int = 8
    """Of the kinds of MLP after bilinear: see MixtureConfig (jaxinterp.models.mixtures.config)."""
    active: int = 2
    """Experts that a token uses: of moe_x and switch; of Monet on each side, on average; of neurons in each channel."""
    routers: int = 4
    """Heads of Monet's router, channels of product keys."""
    heads: int = 4
    """Attention heads; d_model must be a multiple of twice as many."""
    vocabulary: int = 2048
    """Ids of the tokenizer that is trained first."""
    text: str = "docs"
    """Text: docs, kjv, shakespeare, several joined by +, a mixture (docs:0.7+kjv:0.3), or a path."""
    tokens: int = 4_096_000
    """Training tokens."""
    heldout_tokens: int = 65_536
    """Held-out tokens that are kept beside the model, and that its loss is measured on."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 2048
    """Tokens a step."""
    learning_rate: float = 6e-3
    """Peak learning rate of AdamW."""
    seed: int = 0
    """Of the start values and the data order."""
    mesh: str = "data=1"
    """Devices along each axis."""
    hosts: str = "auto"
    """Processes of one run: auto (Cloud TPU, Slurm, experiments.launch), alone, or ADDRESS:PORT,COUNT,INDEX."""
    save_every: int = 100
    """The newest written checkpoint is never more steps old than this."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """What a full disk does: stop the run, or continue it with a warning (several processes stop)."""
    spike: float | None = 100.0
    """A loss so many times the size of the usual one above it ends the run; None: any finite loss is good."""
    track: str = ""
    """Another place for the run's numbers: tensorboard:FOLDER, wandb:PROJECT/RUN, or a .jsonl file."""
    resume: bool = False
    """Continue the run in the output folder."""


def main(config: Config) -> None:
    """Tokenizer, tokens, training, and the model with its recipe.

    With several processes each makes the same tokenizer and tokens; the first one alone keeps a log and the model.
    """
    join(config.hosts)
    check_positive(config, "batch_size", "layers", "d_model", "d_mlp", "heads", "heldout_tokens")
    check_sizes(
        steps=steps_of(config),
        batch_size=config.batch_size,
        seq=config.seq,
        mesh=parse_mesh(config.mesh),
        save_every=config.save_every,
        spike=config.spike,
    )
    if config.track:
        check_tracker(config.track)
    start = start_model(shape_of(config), config.seed)
    settings = settings_of(config, "track", "hosts")
    check_folder(config.out, settings, resume=config.resume)
    first = jax.process_index() == 0

    with ExitStack() as opened:
        out = opened.enter_context(folder_of_a_run(config.out, settings))
        text = text_of(config.text, config.vocabulary, out)
        if first:
            say(f"{config.text}: {text.train.tokens:,} tokens, {text.heldout.tokens:,} held out")
        subject = Subject(start, text.tokenizer, f"{config.mlp}-{config.layers}x{config.d_model}")
        track = trackers(config, settings, out, opened) if first else []
        trained = replace(subject, model=train(config, subject, text, out, track))
        if not first:
            return
        held = finish(config, trained, text, out)["heldout"]
    say(f"Held-out cross-entropy {held['ce']:.4f} nats a token, over {held['counted']:,} next tokens.")
    say(f"Model: {out / 'model'}")


def trackers(config: Config, settings: dict[str, Any], out: Path, opened: ExitStack) -> list[Tracker]:
    """Where the run's numbers go: its log, and the place that --track names; closed with `opened`."""
    made: list[Tracker] = [JsonLines(out / "log.jsonl", resume=config.resume)]
    if config.track:
        also = tracker(config.track, resume=config.resume, config=settings)
        opened.callback(getattr(also, "close", lambda: None))
        made.append(also)
    return made


def train(config: Config, subject: Subject, text: Text, out: Path, track: Iterable[Tracker]) -> Any:
    """The model after all steps, with checkpoints in the output folder; the first process shows a bar.

    All processes of a run must call it together.
    """
    trained = fit(
        method_of(config),
        subject,
        windows(text.train, config.seq),
        steps=steps_of(config),
        batch_size=config.batch_size,
        buffer_batches=1,
        seed=config.seed,
        mesh=parse_mesh(config.mesh),
        checkpoint=out / "checkpoints",
        save_every=config.save_every,
        on_failed_save=config.on_failed_save,
        spike=config.spike,
        resume=config.resume,
        track=track,
    )
    return fetch(trained.decomposition)


def method_of(config: Config) -> Method:
    """The method that trains this kind of MLP."""
    if config.mlp in MLPS:
        return LanguageModel(learning_rate=config.learning_rate)
    return MixtureLanguageModel(learning_rate=config.learning_rate)


def steps_of(config: Config) -> int:
    """Training steps."""
    return config.tokens // config.batch_size


class Sizes(Protocol):
    """What `transformer_of` reads of an experiment's configuration."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def d_mlp(self) -> int: ...
    @property
    def seq(self) -> int: ...


def shape_of(config: Config) -> TransformerConfig:
    """The transformer that the options describe.

    Raises:
      UserError: its sizes contradict each other.
    """
    if config.mlp in MLPS:
        gated, activation = MLPS[config.mlp]
        return transformer_of(config, activation, gated=gated)
    kind = cast(KindOfMLP, config.mlp)
    mixture = MixtureConfig(kind, config.experts, config.d_mlp, config.active, config.routers)
    return replace(transformer_of(config, "relu", gated=False), mixture=mixture)


def transformer_of(sizes: Sizes, activation: Activation, *, gated: bool) -> TransformerConfig:
    """A small transformer with rotary positions, without grouped heads and with a read-out of its own.

    Raises:
      UserError: d_model is not a multiple of heads.
    """
    if sizes.d_model % sizes.heads:
        raise UserError(f"d_model={sizes.d_model} must be a multiple of heads={sizes.heads}, which share it.")
    return TransformerConfig(
        vocab_size=sizes.vocabulary,
        d_model=sizes.d_model,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.heads,
        head_dim=sizes.d_model // sizes.heads,
        d_mlp=sizes.d_mlp,
        context=sizes.seq,
        activation=activation,
        gated=gated,
        rotary_dimensions=sizes.d_model // sizes.heads,
        tied=False,
    )


def start_model(shape: TransformerConfig, seed: int) -> Transformer:
    """Random weights; what writes into the residual stream starts at zero: every block starts as the identity."""

    def of_mlp(mlp: Any) -> list[Any]:
        return [mlp.down_proj.weight] if isinstance(mlp, MLP) else mlp.writers()

    def writers(model: Transformer) -> list[Any]:
        return [weight for block in model.blocks for weight in (block.attn.o_proj.weight, *of_mlp(block.mlp))]

    return eqx.tree_at(writers, initialise(shape, jax.random.key(seed)), replace_fn=jnp.zeros_like)


def finish(config: Config, subject: Subject, text: Text, out: Path) -> dict[str, Any]:
    """Write OUT/model, weights as float16, and return its recipe, with the loss of the model that is read back."""
    unfinished, final = out / ".model.unfinished", out / "model"
    shutil.rmtree(unfinished, ignore_errors=True)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), subject.model)
    save_subject(Subject(half, subject.tokenizer, subject.name), unfinished)
    np.save(unfinished / "heldout.npy", beginning_of(text.heldout, config.heldout_tokens))
    measured = heldout_loss(unfinished)
    rows = read_rows(out / "log.jsonl")
    recipe = {
        "command": command_of(config),
        "settings": settings_of(config, "track", "hosts"),
        "corpus": {
            "name": text.corpus.name,
            "content_hash": text.corpus.content_hash,
            "training_documents": text.train.documents,
            "training_tokens": text.train.tokens,
            "epochs": round(epochs_needed(text.train, config.seq, config.tokens), 2),
        },
        "heldout": measured,
        "seconds": round(training_seconds(rows)),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "tokenizers")},
    }
    curve = [f"{row['step']},{row['tokens']},{row['loss']:.4f}\n" for row in rows]
    (unfinished / "loss.csv").write_text("step,tokens,loss\n" + "".join(curve))
    write_json(unfinished / "recipe.json", recipe)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    return recipe


def beginning_of(corpus: TokenCorpus, tokens: int) -> np.ndarray:
    """The first documents of a corpus, as many as fit into so many tokens whole, and the next one cut."""
    ids: list[np.ndarray] = []
    for index in range(corpus.documents):
        ids.append(corpus.document(index)[:tokens])
        tokens -= len(ids[-1])
        if not tokens:
            break
    return np.concatenate(ids).astype(np.uint16 if max(map(np.max, ids)) < 2**16 else np.uint32)


def heldout_loss(model: Path) -> dict[str, Any]:
    """The cross-entropy of a saved model on the held-out tokens beside it, in float32."""
    subject = load(model, dtype=jnp.float32)
    assert subject.tokenizer is not None
    assert isinstance(subject.model, Transformer)
    corpus = read_token_file(model / "heldout.npy", subject.tokenizer)
    loss = language_loss(subject.model, windows(corpus, subject.model.config.context))
    return {"ce": round(loss["ce"], 5), "counted": int(loss["tokens"]), "tokens": corpus.tokens}


def command_of(config: Config) -> str:
    """The command line of this run, for its recipe; the folder is left to whoever repeats it."""
    options, defaults = settings_of(config, "track", "hosts"), settings_of(Config(out=config.out), "track", "hosts")
    changed = [f" --{name.replace('_', '-')} {value}" for name, value in options.items() if value != defaults[name]]
    return f"python -m experiments.train_language_model{''.join(changed)} --out OUT"


if __name__ == "__main__":
    command(Config, main, __doc__)
