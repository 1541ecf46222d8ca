"""Indirect object identification: prompts with two names, and what attention heads do to the model's answer.

Positive prompts repeat a name, "When Mary and John went to the store, John gave a drink to" -> Mary; negative ones have
a third name in its place, and no right answer. The measure is the logit difference, answer minus repeated name. Heads
are ablated by putting their z at its mean over the negative prompts, position by position.

Source of the task: Wang et al. 2022, arXiv 2211.00593 (mean ablation over prompts with other names).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.progress import track

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.tokenizer import Tokenizer
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer

NAMES = "Mary John Tom James Sarah David Paul Anna Mark Lisa Peter Emma Jack Kate Mike Alice Robert Susan George Laura"
TEMPLATES = (
    "When{first} and{second} went to the store,{third} gave a drink to",
    "After{first} and{second} went to the park,{third} gave a book to",
)
SETS = (5, 10, 20, 40)
"""How many heads are ablated together."""

DRAWS = 5
"""Random sets of a size."""


@dataclass(frozen=True)
class Task:
    """Prompts of one length; the first half is positive. The model should prefer `answer` to `other`."""

    tokens: np.ndarray
    answer: np.ndarray
    other: np.ndarray

    @property
    def half(self) -> int:
        """How many prompts of either kind."""
        return len(self.tokens) // 2


class HeadsToMean(eqx.Module):
    """The edit that puts the chosen heads' z at their mean, position by position."""

    chosen: Float[Array, " heads"]
    mean: Float[Array, "seq heads head_dim"]

    def __call__(self, z: Array) -> Array:
        return jnp.where(self.chosen[:, None] > 0, self.mean, z).astype(z.dtype)


def indirect_objects(tokenizer: Tokenizer, prompts: int, seed: int) -> Task:
    """Both templates and both orders of the first two names in turn; names drawn at random.

    Raises:
      UserError: too few names are one token, or the templates differ in length.
    """
    names = [(f" {name}", tokenizer.encode(f" {name}")) for name in NAMES.split()]
    single = [(name, ids[0]) for name, ids in names if len(ids) == 1]
    if len(single) < 6:
        raise UserError(
            f"{len(single)} of {len(names)} names are one token: the task needs at least 6; take another model."
        )
    draw = np.random.default_rng(seed)
    tokens, answers, others = [], [], []
    for positive in (True, False):
        for number in range(prompts):
            (a, answer), (b, other), (c, _) = (single[place] for place in draw.choice(len(single), 3, replace=False))
            first, second = (a, b) if number % 4 < 2 else (b, a)
            text = TEMPLATES[number % 2].format(first=first, second=second, third=b if positive else c)
            tokens.append(tokenizer.encode(text))
            answers.append(answer)
            others.append(other)
    if len({len(prompt) for prompt in tokens}) > 1:
        raise UserError("the templates differ in length in this tokenizer's tokens: take another model.")
    return Task(np.array(tokens, np.int32), np.array(answers), np.array(others))


def differences(model: Transformer, task: Task, part: slice, chosen: Any = None, means: Any = None) -> np.ndarray:
    """logit(answer) - logit(other) behind every prompt of a part, with the chosen heads at their mean."""
    if chosen is None:
        logits = _last_logits(model, jnp.asarray(task.tokens[part]), None, None)
    else:
        shape = (len(model.blocks), model.config.heads)
        logits = _last_logits(
            model, jnp.asarray(task.tokens[part]), jnp.asarray(chosen, jnp.float32).reshape(shape), means
        )
    rows = np.arange(logits.shape[0])
    return np.asarray(logits[rows, task.answer[part]] - logits[rows, task.other[part]], np.float64)


@eqx.filter_jit
def _last_logits(model: Transformer, tokens: Array, chosen: Array | None, means: list[Array] | None) -> Array:
    edits = {}
    if chosen is not None and means is not None:
        edits = {f"blocks/{i}/attn/z": HeadsToMean(chosen[i], mean) for i, mean in enumerate(means)}
    return model.unembed(run(model, tokens, edits=edits)["final"][:, -1])


@eqx.filter_jit
def _mean_z(model: Transformer, tokens: Array) -> list[Array]:
    trace = run(model, tokens)
    return [jnp.mean(trace[f"blocks/{i}/attn/z"], axis=0) for i in range(len(model.blocks))]


def task_numbers(model: Transformer, task: Task) -> dict[str, float]:
    """How well the model does, on both kinds of prompts."""
    positive, negative = (differences(model, task, part) for part in (slice(task.half), slice(task.half, None)))
    return {
        "accuracy": float((positive > 0).mean()),
        "difference": float(positive.mean()),
        "difference_negative": float(negative.mean()),
    }


def single_effects(model: Transformer, task: Task, prompts: int) -> np.ndarray:
    """How much the logit difference falls when each head alone is put at its mean over negative prompts."""
    means, part = _mean_z(model, jnp.asarray(task.tokens[task.half :])), slice(prompts)
    heads = len(model.blocks) * model.config.heads
    base = differences(model, task, part, np.zeros(heads), means).mean()
    alone = (differences(model, task, part, np.arange(heads) == head, means).mean() for head in range(heads))
    return np.array([base - after for after in track(alone, "every head alone ...", total=heads)])


def ablated_sets(
    model: Transformer, task: Task, rankings: Mapping[str, np.ndarray], *, prompts: int, seed: int
) -> list[dict[str, Any]]:
    """The mean logit difference with the first n heads of every ranking at their mean, on the last positive prompts."""
    means, part = (
        _mean_z(model, jnp.asarray(task.tokens[task.half :])),
        slice(task.half - prompts, task.half),
    )
    heads = len(next(iter(rankings.values())))
    draw = np.random.default_rng(seed)

    def left(chosen: np.ndarray) -> float:
        return float(differences(model, task, part, np.isin(np.arange(heads), chosen), means).mean())

    rows = []
    for size in (0, *(size for size in SETS if size < heads)):
        row: dict[str, Any] = {"heads": size} | {name: left(order[:size]) for name, order in rankings.items()}
        random = [left(draw.permutation(heads)[:size]) for _ in range(DRAWS if size else 1)]
        rows.append(row | {"random heads": float(np.mean(random)), "random, lowest draw": min(random)})
    return rows
