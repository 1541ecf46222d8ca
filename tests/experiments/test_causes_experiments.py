"""The experiments' own steps on planted numbers and on the planted greater-than circuit."""

import numpy as np
import pytest

from experiments.editing import explained, interval
from experiments.weights_circuits import analyse, curves, difference
from jaxinterp.causal.tasks import Task
from jaxinterp.core.errors import UserError
from tests.causal.greater_than import TO, greater_than


def test_tracing_explains_what_was_planted_and_nothing_else():
    rng = np.random.default_rng(0)
    layer, effect, noise = rng.normal(size=(12, 1)), rng.normal(size=(12, 40)), rng.normal(size=(12, 40))
    alone, both = explained(layer + 0 * effect, effect)
    assert alone == pytest.approx(1) and both == pytest.approx(1)
    alone, both = explained(layer + 0.5 * effect, effect)
    assert alone < 0.9 and both == pytest.approx(1)
    alone, both = explained(layer + noise, effect)
    assert both - alone < 0.02
    mean, low, high = interval(noise.ravel())
    assert low < mean < high and high - low == pytest.approx(4 * noise.std() / np.sqrt(noise.size), rel=0.1)


def test_the_difference_of_logits_is_over_the_digits_that_are_given():
    """Two tokenizers of equal size have digits of their own: nothing is kept between calls."""
    task = Task(
        "greater_than", *(np.zeros((1, 2), np.int32),) * 2, *(np.zeros(1, np.int32),) * 2, ("1729 to the year 17",)
    )
    for digits in (range(3, 13), range(13, 3, -1)):
        found = difference(task, 0, 20, list(digits))
        assert (found[list(digits)[3:]] == np.float32(1 / 7)).all() and (
            found[list(digits)[:3]] == np.float32(-1 / 3)
        ).all()
        assert abs(found.sum()) < 1e-6 and not found[[0, 1, 2, 14]].any()
    with pytest.raises(UserError, match="compares all digits"):
        difference(task, 0, 20)


@pytest.mark.parametrize("turn", [0, 1])
def test_the_experiment_finds_the_planted_features_and_their_staircase(turn):
    model, transcoders = greater_than(turn)
    digits = np.array([1, 2, 3])
    prompts = np.stack([digits, np.full(3, TO)], axis=1).astype(np.int32)
    task = Task("greater_than", prompts, prompts, digits, digits, tuple(f"1{d}9 to the year 1" for d in digits))
    ids = list(range(6))
    found = analyse(model, transcoders, task, {"digits": ids}, prompts=3, top=3, draws=3)
    top = [row for row in found["features"] if row["kind"] == "top"]
    assert {row["layer"] for row in top} == {1} and all(row["head"] == [1, 0] for row in top)
    assert found["heads"][0][:2] == [1, 0] and found["removed"] < 3 * min(found["removed_random"]) < 0
    # Feature j reads the digits below j through that head; where the head turns digits round, others.
    for j in (2, 4):
        reads, _ = curves(model, transcoders, (1, j), (1, 0), ids)
        assert (reads[:j].min() > 5 * np.abs(reads[j:]).max()) == (turn == 0)
