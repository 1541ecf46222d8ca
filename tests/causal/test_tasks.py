"""Tasks: pairs of one length, right answers, held-out parts, and a model that cannot do them is named so."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxinterp.causal.task_words import CAPITALS, DAYS, MONTHS
from jaxinterp.causal.tasks import TASKS, make_task, require_able, task_score, years_after
from jaxinterp.core.errors import UserError
from jaxinterp.models.files.tokenizer import Tokenizer, byte_tokenizer
from jaxinterp.models.rules import EXACT


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-pair merges learned from the tasks' own words; digits stay alone."""
    random = np.random.default_rng(0)
    rows = [draw(random) for draw in TASKS.values() for _ in range(150)]
    backend = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([row.clean + row.answer for row in rows], trainer)
    return Tokenizer(backend, end=None, begin=None, special=frozenset(), pieces="bytes")


class Lookup(eqx.Module):
    """Answers the prompts that it was given, with `right` or with token 0."""

    prompts: jax.Array
    answers: jax.Array
    vocab: int = eqx.field(static=True)

    def __call__(self, tokens, *, tap, rules=EXACT):
        found = (tokens[:, None] == self.prompts[None]).all(-1)
        answer = jnp.where(found.any(1), self.answers[jnp.argmax(found, 1)], 0)
        return tap("final", jnp.broadcast_to(jax.nn.one_hot(answer, self.vocab)[:, None], (*tokens.shape, self.vocab)))


RIGHT = {
    "days": lambda text: DAYS[(DAYS.index(text.split(", ")[-1].strip(",")) + 1) % 7],
    "months": lambda text: MONTHS[(MONTHS.index(text.split(", ")[-1].strip(",")) + 1) % 12],
    "capitals": lambda text: CAPITALS[text.removeprefix("The capital of ").removesuffix(" is")],
    "sums": lambda text: str(sum(int(digit) for digit in text.split("\n")[-1] if digit.isdigit())),
    "copying": lambda text: text.split(". ")[0].split(", ")[text.split(". ")[2].count(",")],
    "docstring": lambda text: text.split("(self, ")[1].split(")")[0].split(", ")[2],
}
"""The right answer, computed anew from the prompt."""


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_makes_pairs_of_one_length(tokenizer, name):
    task = make_task(name, tokenizer, prompts=7 if name == "days" else 12, seed=1)
    again = make_task(name, tokenizer, prompts=len(task), seed=1)
    np.testing.assert_array_equal(task.clean, again.clean)
    assert task.clean.shape == task.corrupted.shape and len(set(task.texts)) == len(task)
    assert (task.answer != task.other).all() and (task.clean != task.corrupted).any(axis=1).all()
    for row, text in enumerate(task.texts):
        assert tokenizer.decode(task.clean[row].tolist()) == text
        word = tokenizer.decode([int(task.answer[row])])
        if name in RIGHT:
            assert RIGHT[name](text).startswith(word.strip()) and word.strip()


def test_greater_than_counts_later_years(tokenizer):
    task = make_task("greater_than", tokenizer, prompts=6)
    metric = years_after(task, tokenizer)
    for row, text in enumerate(task.texts):
        tens = int(text.split(" to the year")[0][-2])
        digit = {value: tokenizer.encode(str(value))[0] for value in range(10)}
        assert [int(metric.good[row, digit[d]]) for d in range(10)] == [int(d > tens) for d in range(10)]
        assert [int(metric.bad[row, digit[d]]) for d in range(10)] == [int(d <= tens) for d in range(10)]
    with pytest.raises(UserError, match="is for 'greater_than'"):
        years_after(make_task("days", tokenizer, prompts=2), tokenizer)


def test_parts_share_no_prompt(tokenizer):
    train, test = make_task("capitals", tokenizer, prompts=20).split(0.75)
    assert (len(train), len(test)) == (15, 5) and not set(train.texts) & set(test.texts)
    with pytest.raises(UserError, match="leaves one part empty"):
        train.split(1.0)


def test_a_model_that_cannot_do_a_task_is_named(tokenizer):
    task = make_task("ioi", tokenizer, prompts=12)
    right, wrong = (
        Lookup(jnp.asarray(task.clean), jnp.asarray(answers), tokenizer.vocab_size)
        for answers in (task.answer, np.where(np.arange(12) % 2, task.answer, task.other))
    )
    good, bad = task_score(right, task, chunk=8), task_score(wrong, task, chunk=8)
    assert (good.accuracy, good.top1, good.difference, good.able) == (1, 1, 1, True)
    assert good.lower == pytest.approx(0.7575, abs=1e-3)  # Wilson's interval for 12 of 12
    assert (bad.accuracy, bad.able) == (0.5, False) and "CANNOT do 'ioi'" in bad.sentence()
    require_able(good)
    with pytest.raises(UserError, match="Nothing can be concluded"):
        require_able(bad)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("ioy", {}, "Did you mean 'ioi'"),
        ("ioi", {"prompts": 0}, "prompts=0 must be positive"),
        ("days", {"prompts": 15}, "ask for fewer"),
    ],
)
def test_bad_tasks_are_refused(tokenizer, name, change, words):
    with pytest.raises(UserError, match=words):
        make_task(name, tokenizer, **change)


def test_a_tokenizer_whose_answers_all_begin_alike_is_refused():
    with pytest.raises(UserError, match="different prompts of one length"):
        make_task("ioi", byte_tokenizer())
    with pytest.raises(UserError, match="has no tokenizer"):
        make_task("ioi", None)
