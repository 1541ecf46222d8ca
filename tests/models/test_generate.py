"""Generation: greedy equals the pass without a cache and transformers; edits, sampling, stops, streaming, refusals."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.cache import empty_caches, pass_over_new
from jaxinterp.models.edits import Add, At, SetTo
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.generate import During, generate
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.sampling import Sampling, filtered, next_token
from jaxinterp.models.transformer import TransformerConfig, initialise
from tests.models.model_files import GOLDENS

EXPECTED = json.loads((Path(__file__).parent / "generation_goldens.json").read_text())
CONFIG = TransformerConfig(
    vocab_size=257, d_model=16, layers=2, heads=4, kv_heads=2, head_dim=4, d_mlp=24, context=64, rotary_dimensions=4
)
DIRECTION = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
SITE = "blocks/0/resid/post"
TEXTS = ["ab", "hello there", "q"]  # tests that ask for as many tokens behind them share their programs


@pytest.fixture(scope="module")
def subject():
    return Subject(initialise(CONFIG, jax.random.key(1)), byte_tokenizer(), "small")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_greedy_output_is_that_of_transformers(name):
    """In one batch of unequal prompts; the goldens were made one by one."""
    subject = Subject(load(GOLDENS / name, dtype="float32").model, None, name)
    prompts, expected = EXPECTED[name]["prompts"], EXPECTED[name]["tokens"]
    out = generate(subject, prompts, max_tokens=len(expected[0]))
    assert [list(row) for row in out.tokens] == expected
    assert len({tuple(row) for row in expected}) == len(expected) and out.ended == ("length",) * 3


@eqx.filter_jit
def next_by_everything(model, tokens, last, edits):
    return jnp.argmax(run(model, tokens, edits=edits).logits[0, last])


def without_cache(model, prompt, count, edits=None):
    """Every token from a pass over everything; what lies behind a token does not matter to a causal model."""
    ids = np.zeros((1, 24), np.int32)
    ids[0, : len(prompt)] = prompt
    for last in range(len(prompt) - 1, len(prompt) - 1 + count):
        ids[0, last + 1] = next_by_everything(model, jnp.asarray(ids), jnp.asarray(last), edits or {})
    return tuple(ids[0, len(prompt) : len(prompt) + count].tolist())


def test_greedy_output_equals_passes_over_everything(subject):
    steer = {SITE: Add(3 * DIRECTION)}
    out = generate(subject, TEXTS, max_tokens=5, edits=steer)
    assert list(out.tokens) == [without_cache(subject.model, row, 5, steer) for row in out.prompts]
    anew = generate(subject, TEXTS, max_tokens=5, edits=steer, cache=False)
    assert anew.tokens == out.tokens
    np.testing.assert_allclose(anew.log_probabilities, out.log_probabilities, atol=1e-4)


def test_a_broken_cache_would_be_seen(subject):
    """Keys that are one position off give other logits."""
    pass_once, places = eqx.filter_jit(pass_over_new), jnp.arange(8)[None]
    tokens = jnp.asarray([[5, 60, 7, 90, 0, 0, 0, 0]])
    caches = empty_caches(subject.model, 1, 8)
    _, caches = pass_once(subject.model, tokens[:, :3], caches, places, jnp.asarray(0), {})
    right, off = (
        pass_once(subject.model, tokens[:, 3:4], caches, where, jnp.asarray(3), {})[0]
        for where in (places, places.at[0, 3].set(4))
    )
    whole = eqx.filter_jit(lambda model: run(model, tokens[:, :4]).logits[:, -1])(subject.model)
    np.testing.assert_allclose(right, whole, atol=1e-5)
    assert float(jnp.abs(off - whole).max()) > 1e-3


def test_strength_zero_changes_no_bit(subject):
    plain = generate(subject, TEXTS, max_tokens=5)
    zero = generate(subject, TEXTS, max_tokens=5, edits={SITE: Add(0.0 * DIRECTION)})
    assert zero.tokens == plain.tokens and zero.log_probabilities == plain.log_probabilities


def test_edits_at_positions_and_of_a_part(subject):
    """`At` counts from the prompt's first token; `During` knows where the prompt ends. Against passes over all."""
    strong = Add(6 * DIRECTION)
    for edit, places in (
        (At(strong, (1, 3)), (1, 3)),
        (During(strong, "generated"), range(2, 9)),
        (During(strong, "prompt"), (0, 1)),
    ):
        out = generate(subject, ["ab", "hello"], max_tokens=4, edits={SITE: edit})
        only = jnp.isin(jnp.arange(24), jnp.asarray(places))[None, :, None] * 6 * DIRECTION
        assert out.tokens[0] == without_cache(subject.model, out.prompts[0], 4, {SITE: Add(only)})


@pytest.mark.parametrize(
    ("edit", "count"),
    [
        (SetTo(jnp.zeros((1, 6, 16)).at[0, 2].set(1.0)), 3),
        (lambda x: x.at[:, 3].set(0.0), 1),
        (lambda x: x - x.mean(axis=1, keepdims=True), 1),
    ],
)
def test_edits_with_a_sequence_axis_need_no_cache(subject, edit, count):
    with pytest.raises(UserError, match="one token at a time"):
        generate(subject, "abc", max_tokens=3, edits={SITE: edit})
    generate(subject, "abc", max_tokens=count, edits={SITE: edit}, cache=False)


def test_pattern_edits_need_no_cache(subject):
    uniform = {"blocks/0/attn/pattern": lambda x: x}
    with pytest.raises(UserError, match="cache=False to edit it"):
        generate(subject, "abc", max_tokens=3, edits=uniform)
    assert generate(subject, "abc", max_tokens=3, edits=uniform, cache=False).tokens == (
        generate(subject, "abc", max_tokens=3).tokens
    )


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.1]))[None]
    kept = lambda **how: np.isfinite(np.asarray(filtered(logits, Sampling(1.0, **how)))[0]).tolist()
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.76) == [True, True, True, False]
    many = jnp.tile(logits, (4000, 1))
    drawn, log_p = next_token(many, Sampling(0.5), jax.random.key(0))
    expected = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    shares = np.bincount(np.asarray(drawn), minlength=4) / 4000
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)
    np.testing.assert_allclose(log_p, np.asarray(logits)[0][np.asarray(drawn)], rtol=1e-5)


def test_seeds_and_stops_and_streams(subject):
    first, again, other = (generate(subject, "ab", max_tokens=12, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert first.tokens == again.tokens != other.tokens
    stop = first.tokens[0][4]
    cut = generate(subject, "ab", max_tokens=12, temperature=1.0, seed=3, stop=[int(stop)])
    end = first.tokens[0].index(stop) + 1
    assert cut.tokens[0] == first.tokens[0][:end] and cut.ended == ("end",)
    greedy = generate(subject, TEXTS, max_tokens=5)
    pieces = dict.fromkeys(range(3), "")
    streamed = generate(
        subject, TEXTS, max_tokens=5, on_text=lambda row, text: pieces.update({row: pieces[row] + text})
    )
    assert streamed.tokens == greedy.tokens
    assert all(greedy.texts[row].startswith(text) and text for row, text in pieces.items())


def test_a_stop_text_cuts(subject):
    whole = generate(subject, "hello", max_tokens=8).text
    stop = whole[3:5]
    out = generate(subject, "hello", max_tokens=8, stop=stop)
    assert out.text == whole[: whole.index(stop)] and out.ended == ("stop",)


@pytest.mark.parametrize(
    ("prompt", "how", "words"),
    [
        ("a", {"max_tokens": 0}, "max_tokens=0 must be positive"),
        ("a", {"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ("a", {"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ("a", {"top_k": 0}, "top_k=0 must be at least 1"),
        ("", {}, "prompt 0 is empty"),
        ([], {}, "is empty|no prompt"),
        ([[1, 999]], {"max_tokens": 3}, "token id 999"),
        ("a" * 60, {}, "beyond the model's context of 64: ask for at most 4"),
        ("a", {"chat": True}, "no chat template"),
        ("a", {"stop": ""}, "empty text"),
        ("a", {"max_tokens": 3, "edits": {"blocks/7/mlp/out": Add(0.0)}}, "no site 'blocks/7/mlp/out'"),
        ([[0.5]], {}, "whole numbers"),
    ],
)
def test_bad_input_is_refused(subject, prompt, how, words):
    with pytest.raises(UserError, match=words):
        generate(subject, prompt, **how)


def test_during_is_for_generate(subject):
    with pytest.raises(UserError, match="is for generate"):
        run(subject.model, jnp.asarray([[1, 2]]), edits={SITE: During(Add(0.0), "prompt")})
