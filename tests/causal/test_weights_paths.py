"""Paths from weights: sources add up to what is read, and a planted greater-than circuit is found, head and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.causal.weights_circuits import strengths
from jaxinterp.causal.weights_paths import (
    Reading,
    feature_reading,
    logit_reading,
    prompt_run,
    sources,
    weights_paths,
)
from jaxinterp.core.errors import UserError
from jaxinterp.models.transformer import initialise
from tests.causal.greater_than import DIGITS, TO, greater_than
from tests.causal.small_models import GPT2, LLAMA, PROMPT, weights, with_random_biases


def total(found):
    return sum(source.effect for source in found)


@pytest.mark.parametrize(("config", "skip"), [(LLAMA, False), (GPT2, True)])
def test_the_sources_of_a_reading_add_up(config, skip):
    model = with_random_biases(initialise(config, jax.random.key(1)))
    transcoders = from_arrays(**weights(config, skip=skip), dtype=jnp.float32)
    text = prompt_run(model, transcoders, PROMPT)
    v, last = np.random.default_rng(0).normal(size=config.d_model).astype(np.float32), config.layers - 1
    mid = text.pre[last] + text.attention_out[last]
    for layer, before, x in (
        (last, "attn", text.pre[last]),
        (last, "mlp", mid),
        (last + 1, "end", mid + text.mlp_out[last]),
    ):
        found = sources(model, transcoders, text, Reading(v, layer, before, 2))
        assert total(found) == pytest.approx(float(x[2] @ v), abs=1e-4)
        assert abs(total([s for s in found if s.kind != "head"]) - float(x[2] @ v)) > 0.05
    # One step on: a feature's own sources are its strength times its pre-activation, a head's its whole effect.
    found = sources(model, transcoders, text, Reading(v, last + 1, "end", 2))
    feature = next(s for s in found if s.kind == "feature" and s.layer == last)
    reader = transcoders.readers[last]
    pre = text.codes[last][2, feature.index] - float(reader.encoder_bias[feature.index])
    norm_bias = model.blocks[last].mlp_norm.bias
    pre -= 0 if norm_bias is None else float(reader.encoder[feature.index] @ norm_bias)
    strength = feature.effect / text.codes[last][2, feature.index]
    assert total(sources(model, transcoders, text, feature.onward)) == pytest.approx(strength * pre, abs=1e-4)
    head = max((s for s in found if s.kind == "head" and s.layer == last), key=lambda s: abs(s.effect))
    assert total(sources(model, transcoders, text, head.onward)) == pytest.approx(head.effect, abs=1e-4)


def later(digit):
    """Logits of later digits less those of the others, means."""
    direction = np.zeros(7, np.float32)
    direction[digit + 1 : DIGITS], direction[: digit + 1] = 1 / (DIGITS - 1 - digit), -1 / (digit + 1)
    return direction


def test_a_planted_greater_than_circuit_is_found_from_weights():
    model, transcoders = greater_than()
    for digit in (1, 3):
        text = prompt_run(model, transcoders, np.array([digit, TO]))
        paths = weights_paths(model, transcoders, text, logit_reading(model, text, later(digit)), width=30, steps=4)
        first = [path for path in paths if len(path.sources) == 1]
        raised = {path.sources[0].index for path in first[: DIGITS - 1 - digit]}
        assert raised == set(range(digit + 1, DIGITS)) and all(
            path.sources[0].layer == 1 for path in first[: len(raised)]
        )
        whole = [path for path in paths if len(path.sources) == 4][: len(raised)]
        assert {path.sources[0].index for path in whole} == raised
        for path in whole:
            feature, head, seen, token = path.sources
            assert (head.kind, head.layer, head.index, head.position) == ("head", 1, 0, 0)
            assert (seen.kind, seen.layer, seen.index) == ("feature", 0, digit) and token.kind == "token"
            assert path.effect == pytest.approx(feature.effect, rel=0.1)
    # The same without any text: feature j reads digits below j through head 0, and only those.
    for j in range(1, DIGITS):
        through = np.asarray(strengths(model, transcoders, 0, 1, j).heads[0, :DIGITS])
        assert through[:j].min() > 10 * np.abs(through[j:]).max()


def test_another_circuit_gives_other_paths():
    model, transcoders = greater_than(turn=1)
    text = prompt_run(model, transcoders, np.array([1, TO]))
    start = logit_reading(model, text, later(1))
    raised = {
        path.sources[0].index for path in weights_paths(model, transcoders, text, start, steps=1) if path.effect > 0.1
    }
    assert raised == {3, 4, 5}, "digit 1 was moved as 2"
    through = np.asarray(strengths(model, transcoders, 0, 1, 2).heads[0, :DIGITS])
    assert through[0] > 10 * np.abs(through[1:-1]).max() and through[-1] > 10 * np.abs(through[1:-1]).max()
    # Where the heads look at their own position, the path from the digit is gone.
    paths = lambda text: weights_paths(model, transcoders, text, start, width=30, steps=2)
    moved = lambda text: max(
        (abs(p.effect) for p in paths(text) if p.sources[-1].kind == "head" and p.sources[-1].position == 0),
        default=0.0,
    )
    assert moved(text) > 0.2 > 100 * moved(text._replace(pattern=np.broadcast_to(np.eye(2), text.pattern.shape)))


def test_a_feature_is_read_as_the_model_reads_it():
    model, transcoders = greater_than()
    text = prompt_run(model, transcoders, np.array([0, TO]))
    found = sources(model, transcoders, text, feature_reading(model, transcoders, text, 1, 3, 1))
    assert total(found) == pytest.approx(text.codes[1][1, 3], rel=1e-4)
    with pytest.raises(UserError, match="width=0"):
        weights_paths(model, transcoders, text, found[0].onward or Reading(text.embed[0], 1, "mlp", 1), width=0)
