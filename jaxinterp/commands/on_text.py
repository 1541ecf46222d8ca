"""What experiments that train on a text share: their options, what must be ready before training, and the training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
from jaxtyping import PyTree

from jaxinterp.commands.shell import check_folder, check_positive, folder_of_a_run, settings_of
from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.data.text.load_text import load_text
from jaxinterp.evaluation.effects import check_effect
from jaxinterp.evaluation.next_token import NEXT_TOKEN
from jaxinterp.methods import Method, Together
from jaxinterp.models.load import Subject, load
from jaxinterp.models.sites import check_site, sites
from jaxinterp.training.fit import Fit, check_sizes, fit
from jaxinterp.training.mesh import parse_mesh
from jaxinterp.training.tracking import JsonLines


@dataclass(frozen=True)
class OnText:
    """One sublayer of one model, one text. Experiments re-declare a field to give it another default."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """smollm2-135m, bilinear-4x128, tiny, a Hugging Face directory, a .gguf file, or a saved jaxinterp model."""
    site: str = "blocks/1/mlp"
    """The MLP leaf."""
    features: int = 2304
    """Size of every dictionary."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam."""
    text: str = "docs"
    """Training text: docs, kjv, shakespeare, several joined by +, or a path."""
    tokens: int = 400_000
    """Training tokens."""
    heldout_tokens: int = 32_768
    """Held-out tokens for FVU, L0 and dead features."""
    ce_tokens: int = 8_192
    """How many of them the cross-entropies are measured on."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 1024
    """Tokens a step."""
    seed: int = 0
    """Of the data order, the start values and everything random."""
    mesh: str = "data=1,feature=1"
    """Devices along each axis."""
    resume: bool = False
    """Continue the run in the output folder."""

    @property
    def steps(self) -> int:
        """Training steps."""
        return self.tokens // self.batch_size


class Prepared(NamedTuple):
    """The model, windows of training and of held-out text, the output folder and the settings that it will keep."""

    subject: Subject
    train: grain.MapDataset
    heldout: grain.MapDataset
    out: Path
    record: dict[str, Json]

    @property
    def facts(self) -> dict[str, str]:
        """The checkpoint and the settings, for a page."""
        checkpoint = {"checkpoint": self.subject.source or self.subject.name}
        return checkpoint | {name: str(value) for name, value in self.record.items()}


def check_steps(tokens: int, batch_size: int) -> int:
    """How many steps so many tokens are.

    Raises:
      UserError: they are fewer than one step takes.
    """
    if batch_size >= 1 and tokens < batch_size:
        raise UserError(
            f"tokens={tokens} are fewer than the batch_size={batch_size} of one step: train on at least {batch_size}, "
            "or take a smaller batch_size."
        )
    return tokens // max(batch_size, 1)


def check_mlp(model: PyTree, site: str) -> str:
    """`site`, if it is the leaf of an MLP.

    Raises:
      UserError: it is not.
    """
    if not check_site(model, site).endswith("/mlp"):
        leaves = ", ".join(sites(model, "**/mlp")[:3])
        raise UserError(f"site={site!r} is not an MLP: name the leaf itself, such as {leaves}.")
    return site


def prepared(config: OnText, *, check: Callable[[Any, str], Any] = check_mlp) -> Prepared:
    """Check everything that can be checked before compute, and load model and text; nothing is written.

    A tenth of the text is held out by document; no more of it is read than is asked for.

    Args:
      check: called with the model and the site, which it refuses by a UserError.
    Raises:
      UserError: a size, the folder, the model (one without logits among them), the site or the text is invalid.
    """
    check_positive(config, "heldout_tokens", "ce_tokens")
    check_sizes(
        steps=check_steps(config.tokens, config.batch_size),
        batch_size=config.batch_size,
        seq=config.seq,
        mesh=parse_mesh(config.mesh),
    )
    record = settings_of(config, "hosts")
    check_folder(config.out, record, resume=config.resume)
    subject = load(config.model)
    check(subject.model, config.site)
    check_effect(subject.model, NEXT_TOKEN)
    enough = 2 * (config.tokens + 10 * config.heldout_tokens)
    train, heldout = load_text(config.text, subject.tokenizer, seq=config.seq, max_tokens=enough)
    return Prepared(subject, train, heldout, config.out, record)


def train_together(methods: Mapping[str, Method], ready: Prepared, config: OnText) -> Fit:
    """All methods in one run, with checkpoints and a log in the output folder, which is made here."""
    with folder_of_a_run(ready.out, ready.record) as out:
        return fit(
            Together(methods),
            ready.subject,
            ready.train,
            site=config.site,
            steps=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            mesh=parse_mesh(config.mesh),
            checkpoint=out / "checkpoints",
            save_every=max(10, config.steps // 40 * 10),
            resume=config.resume,
            track=(JsonLines(out / "log.jsonl", resume=config.resume),),
        )
