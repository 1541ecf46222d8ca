"""Tasks: prompts in pairs (clean, corrupted) of one length, with the token that should follow and one that should not.

    task = make_task("ioi", subject.tokenizer, prompts=64, seed=0)
    score = task_score(subject.model, task)      accuracy, logit difference, top-1; `able` says whether the model can
    train, test = task.split()

The corrupted prompt has as many tokens and another right answer; `other` is the right answer there, or a distractor.
A model that cannot do a task has no circuit for it: check `score.able`, or call `require_able`, before anything is
concluded.

    ioi              When Mary and John went to the store, John gave a drink to    -> Mary (John)
    greater_than     The war lasted from the year 1739 to the year 17              -> later decades (not later)
    colored_objects  ... there is a red pen, a blue cup and a green book. What color is the cup? It is   -> blue
    docstring        the third argument of a Python function, after :param         -> its name
    capitals, languages                The capital of France is                    -> Paris
    numbers, days, months              Monday, Tuesday, Wednesday,                 -> Thursday
    multiple_choice  four options in random order                                  -> the letter
    sums, sums_in_words, copying       three worked examples, then one             -> the result

Sources: Wang et al. 2022, arXiv 2211.00593; Hanna et al. 2023, arXiv 2305.00586; Merullo et al. 2023, arXiv 2310.08744
(colored objects); Heimersheim and Janiak 2023 (docstring); Gould et al. 2023, arXiv 2312.09230 (successors).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxinterp.causal.measure import LogitDifference, ProbabilityDifference
from jaxinterp.causal.task_words import (
    CAPITALS,
    COLOURS,
    DAYS,
    LANGUAGES,
    MONTHS,
    NAMES,
    NUMBERS,
    OBJECTS,
    PLACES,
    THINGS,
    WORDS,
)
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.models.files.tokenizer import Tokenizer
from jaxinterp.models.run import run


class Row(NamedTuple):
    """One pair of prompts in words; `answer` follows the clean prompt, `other` does not."""

    clean: str
    corrupted: str
    answer: str
    other: str


Draw = Callable[[np.random.Generator], Row]
"""Draws one pair."""


@dataclass(frozen=True)
class Task:
    """Pairs of prompts, all of one length in tokens.

    Attributes:
      clean, corrupted: token ids [prompts, seq].
      answer, other: token ids [prompts].
      texts: the clean prompts.
      chance: how often a guess between answer and other is right.
    """

    name: str
    clean: np.ndarray
    corrupted: np.ndarray
    answer: np.ndarray
    other: np.ndarray
    texts: tuple[str, ...]
    chance: float = 0.5

    def __len__(self) -> int:
        return len(self.texts)

    def metric(self) -> LogitDifference:
        """logit(answer) - logit(other) at the last position, for all prompts."""
        return LogitDifference(jnp.asarray(self.answer), jnp.asarray(self.other))

    def take(self, rows: slice | Sequence[int]) -> "Task":
        """The same task with some of the prompts."""
        texts = tuple(np.asarray(self.texts, object)[rows])
        return replace(
            self,
            clean=self.clean[rows],
            corrupted=self.corrupted[rows],
            answer=self.answer[rows],
            other=self.other[rows],
            texts=texts,
        )

    def split(self, share: float = 0.5) -> tuple["Task", "Task"]:
        """The first `share` of the prompts, and the rest: no prompt is in both.

        Raises:
          UserError: one of the parts would be empty.
        """
        cut = round(share * len(self))
        if not 0 < cut < len(self):
            raise UserError(f"share={share} of {len(self)} prompts leaves one part empty.")
        return self.take(slice(cut)), self.take(slice(cut, None))


def make_task(
    name: str, tokenizer: Tokenizer | None, *, prompts: int = 32, seed: int = 0, draw: Draw | None = None
) -> Task:
    """Pairs of prompts for this tokenizer, all different, all of the length that is first found so often.

    Args:
      name: one of the module's tasks; or any name, with `draw`.
      tokenizer: the subject's; where the model expects a first token, it is put there.
      prompts: how many pairs.
      draw: your own task: from a random generator to a Row.
    Raises:
      UserError: an unknown name, or not enough pairs of one length whose answers begin with different tokens.
    """
    if tokenizer is None:
        raise UserError("the subject has no tokenizer: tasks are made of text; load one that has.")
    if prompts < 1:
        raise UserError(f"prompts={prompts} must be positive.")
    if draw is None:
        if name not in TASKS:
            raise UserError(f"no task {name!r}; known: {', '.join(TASKS)}.{suggest(name, TASKS)}")
        draw = TASKS[name]
    random = np.random.default_rng(seed)
    by_length: dict[int, dict[str, tuple[Row, list[int], list[int], int, int]]] = {}
    for _ in range(40 * prompts + 200):
        row = draw(random)
        clean, corrupted = (_encode(tokenizer, text) for text in (row.clean, row.corrupted))
        answer, other = (_next_token(tokenizer, row.clean, text) for text in (row.answer, row.other))
        if len(clean) == len(corrupted) and answer is not None and other is not None and answer != other:
            same = by_length.setdefault(len(clean), {})
            same.setdefault(row.clean, (row, clean, corrupted, answer, other))
            if len(same) == prompts:
                break
    best = max(by_length.values(), key=len, default={})
    if len(best) < prompts:
        raise UserError(
            f"task {name!r}: {len(best)} different prompts of one length in this tokenizer's tokens, prompts={prompts} "
            "asked for: ask for fewer, or take another task."
        )
    rows, cleans, corrupteds, answers, others = zip(*list(best.values())[:prompts], strict=True)
    return Task(
        name,
        np.asarray(cleans, np.int32),
        np.asarray(corrupteds, np.int32),
        np.asarray(answers, np.int32),
        np.asarray(others, np.int32),
        tuple(row.clean for row in rows),
    )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    return begin + tokenizer.encode(text)


def _next_token(tokenizer: Tokenizer, prompt: str, answer: str) -> int | None:
    """The token that follows the prompt where the answer does; None where the two merge into other tokens."""
    before, after = _encode(tokenizer, prompt), _encode(tokenizer, prompt + answer)
    return after[len(before)] if after[: len(before)] == before and len(after) > len(before) else None


def years_after(task: Task, tokenizer: Tokenizer) -> ProbabilityDifference:
    """The metric of greater-than: the probability of all tokens that begin a later year, minus that of all others.

    The start year ends in 9; a token that begins years on both sides of it counts for neither.

    Raises:
      UserError: the task is not greater_than.
    """
    if task.name != "greater_than":
        raise UserError(f"task={task.name!r}: years_after is for 'greater_than'.")
    good, bad = (np.zeros((len(task), tokenizer.vocab_size), np.float32) for _ in range(2))
    for row, text in enumerate(task.texts):
        start = int(text.split(" to the year")[0][-2:])
        first = [_next_token(tokenizer, text, f"{year:02d}") for year in range(100)]
        for token in {token for token in first if token is not None}:
            later = {year > start for year, own in enumerate(first) if own == token}
            if len(later) == 1:
                (good if later.pop() else bad)[row, token] = 1
    return ProbabilityDifference(jnp.asarray(good), jnp.asarray(bad))


class TaskScore(NamedTuple):
    """How well a model does a task.

    Attributes:
      accuracy: how often logit(answer) > logit(other).
      lower: the lower end of the 95 percent interval of the accuracy (Wilson).
      difference: mean logit(answer) - logit(other);  corrupted: the same on the corrupted prompts.
      top1: how often the answer is the most probable token of all.
      able: whether `lower` is above chance.
    """

    task: str
    prompts: int
    accuracy: float
    lower: float
    difference: float
    corrupted: float
    top1: float
    able: bool

    def sentence(self) -> str:
        """What may be said of it."""
        verb = "can do" if self.able else "CANNOT do"
        return (
            f"the model {verb} {self.task!r}: right on {self.accuracy:.0%} of {self.prompts} prompts (at least "
            f"{self.lower:.0%}), logit difference {self.difference:.2f} ({self.corrupted:.2f} corrupted), top-1 "
            f"{self.top1:.0%}."
        )


def task_score(model: PyTree, task: Task, *, chunk: int = 16) -> TaskScore:
    """Run a task, clean and corrupted, `chunk` prompts at once."""
    clean, top1, corrupted = [], [], []
    for start in range(0, len(task), chunk):
        part = task.take(slice(start, start + chunk))
        found, top = _answers(model, jnp.asarray(part.clean), part.metric())
        clean.append(np.asarray(found))
        top1.append(np.asarray(top))
        corrupted.append(np.asarray(_answers(model, jnp.asarray(part.corrupted), part.metric())[0]))
    difference = np.concatenate(clean)
    accuracy, count = float((difference > 0).mean()), len(task)
    lower = _wilson_lower(accuracy, count)
    return TaskScore(
        task.name,
        count,
        accuracy,
        lower,
        float(difference.mean()),
        float(np.concatenate(corrupted).mean()),
        float(np.concatenate(top1).mean()),
        lower > task.chance,
    )


def require_able(score: TaskScore) -> None:
    """Raises UserError if the model cannot do the task: nothing about the task can be concluded from it."""
    if not score.able:
        raise UserError(f"{score.sentence()} Nothing can be concluded from it: take another task or model.")


@eqx.filter_jit
def _answers(model: PyTree, tokens: Array, metric: LogitDifference) -> tuple[Array, Array]:
    trace = run(model, tokens)
    return metric(trace), jnp.argmax(trace.logits[:, -1], axis=-1) == metric.answer


def _wilson_lower(share: float, count: int, z: float = 1.96) -> float:
    centre = share + z * z / (2 * count)
    return float((centre - z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))) / (1 + z * z / count))


def _pick(random: np.random.Generator, words: Sequence[Any], count: int) -> list[Any]:
    return [words[index] for index in random.choice(len(words), count, replace=False)]


def _ioi(random: np.random.Generator) -> Row:
    first, second = _pick(random, NAMES, 2)
    (place,), (thing,) = _pick(random, PLACES, 1), _pick(random, OBJECTS, 1)
    subject, answer = (first, second) if random.integers(2) else (second, first)
    text = f"When {first} and {second} went to the {place}, {{}} gave a {thing} to"
    return Row(text.format(subject), text.format(answer), f" {answer}", f" {subject}")


def _greater_than(random: np.random.Generator) -> Row:
    """The start year ends in 9, so that a greater tens digit is later and no other is, in any tokenizer."""
    century, tens = int(random.integers(11, 20)), int(random.integers(2, 8))
    (thing,) = _pick(random, THINGS, 1)
    text = f"The {thing} lasted from the year {century}{{}}9 to the year {century}"
    later, earlier = int(random.integers(tens + 1, 10)), int(random.integers(0, tens + 1))
    return Row(text.format(tens), text.format(0), f"{later}5", f"{earlier}5")


def _colored_objects(random: np.random.Generator) -> Row:
    things, colours = _pick(random, OBJECTS, 3), _pick(random, COLOURS, 3)
    listed = [f"a {colour} {thing}" for colour, thing in zip(colours, things, strict=True)]
    text = f"On the table, there is {listed[0]}, {listed[1]}, and {listed[2]}. What color is the {{}}? The {{}} is"
    asked, other = _pick(random, range(3), 2)
    clean, corrupted = (text.format(things[place], things[place]) for place in (asked, other))
    return Row(clean, corrupted, f" {colours[asked]}", f" {colours[other]}")


def _docstring(random: np.random.Generator) -> Row:
    name, *words = _pick(random, WORDS, 10)
    arguments, others = words[:3], words[3:6]

    def text(names: Sequence[str]) -> str:
        a, b, c = names
        head = f'def {name}(self, {a}, {b}, {c}):\n    """{words[6]} {words[7]}\n\n'
        return f"{head}    :param {a}: {words[8]}\n    :param {b}: {words[6]}\n    :param"

    return Row(text(arguments), text(others), f" {arguments[2]}", f" {others[2]}")


def _relation(template: str, pairs: Mapping[str, str]) -> Draw:
    def draw(random: np.random.Generator) -> Row:
        (one, answer), (two, other) = _pick(random, list(pairs.items()), 2)
        return Row(template.format(one), template.format(two), f" {answer}", f" {other}")

    return draw


def _successor(words: Sequence[str]) -> Draw:
    def draw(random: np.random.Generator) -> Row:
        start, other = _pick(random, range(len(words)), 2)
        length = int(random.integers(3, 5))
        runs = [[words[(begin + step) % len(words)] for step in range(length + 1)] for begin in (start, other)]
        clean, corrupted = (", ".join(part[:-1]) + "," for part in runs)
        return Row(clean, corrupted, f" {runs[0][-1]}", f" {runs[1][-1]}")

    return draw


def _multiple_choice(random: np.random.Generator) -> Row:
    chosen = _pick(random, list(CAPITALS.items()), 4)
    country, capital = chosen[0]
    orders = [random.permutation(4).tolist() for _ in range(2)]

    def text(order: Sequence[int]) -> str:
        lines = "\n".join(f"{letter}. {chosen[index][1]}" for letter, index in zip("ABCD", order, strict=True))
        return f"Question: What is the capital of {country}?\n{lines}\nAnswer:"

    letters = [f" {'ABCD'[[chosen[index][1] for index in order].index(capital)]}" for order in orders]
    return Row(text(orders[0]), text(orders[1]), letters[0], letters[1])


def _sums(in_words: bool) -> Draw:
    def draw(random: np.random.Generator) -> Row:
        def one(total: int | None = None) -> tuple[str, int]:
            a = int(random.integers(1, 5)) if total is None else int(random.integers(1, total))
            b = int(random.integers(1, 9 - a)) if total is None else total - a
            if in_words:
                return f"{NUMBERS[a - 1]} plus {NUMBERS[b - 1]} is", a + b
            return f"{a} + {b} =", a + b

        worked = [one() for _ in range(3)]
        say = (lambda n: NUMBERS[n - 1]) if in_words else str
        separator = ". " if in_words else "\n"
        shots = separator.join(f"{text} {say(total)}" for text, total in worked)
        (clean, total), (corrupted, other) = one(), one()
        # Some tokenizers write a space and a digit as two tokens, others as one: only one of the two forms is kept.
        tail, follows = ("", " ") if in_words or random.integers(2) else (" ", "")
        return Row(
            f"{shots}{separator}{clean}{tail}",
            f"{shots}{separator}{corrupted}{tail}",
            f"{follows}{say(total)}",
            f"{follows}{say(other)}",
        )

    return draw


def _copying(random: np.random.Generator) -> Row:
    words = _pick(random, WORDS, 5)
    place = int(random.integers(1, 4))
    other = (place + 1) % 4
    listed = ", ".join(words[:4])
    clean = f"{listed}. {listed}. {', '.join(words[:place])},"
    swapped = words[:4]
    swapped[place], swapped[other] = swapped[other], swapped[place]
    again = ", ".join(swapped)
    corrupted = f"{again}. {again}. {', '.join(swapped[:place])},"
    return Row(clean, corrupted, f" {words[place]}", f" {words[other]}")


TASKS: Mapping[str, Draw] = {
    "ioi": _ioi,
    "greater_than": _greater_than,
    "colored_objects": _colored_objects,
    "docstring": _docstring,
    "capitals": _relation("The capital of {} is", CAPITALS),
    "languages": _relation("The language of {} is", LANGUAGES),
    "numbers": _successor(NUMBERS),
    "days": _successor(DAYS),
    "months": _successor(MONTHS),
    "multiple_choice": _multiple_choice,
    "sums": _sums(in_words=False),
    "sums_in_words": _sums(in_words=True),
    "copying": _copying,
}
"""The tasks by name."""
