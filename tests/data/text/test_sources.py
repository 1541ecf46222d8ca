"""Mixtures with weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinterp.core.errors import UserError
from jaxinterp.data.text import sources
from jaxinterp.data.text.documents import Document
from jaxinterp.data.text.load_text import load_text
from jaxinterp.data.text.sources import documents_of, load_corpus, mixture, weighted_parts
from jaxinterp.data.tokens import TokenCorpus, split
from jaxinterp.data.windows import windows
from jaxinterp.models.files.tokenizer import byte_tokenizer


def corpus(lengths, first, name="part"):
    """A corpus whose token ids say where they come from."""
    lengths = np.asarray(lengths)
    ids = first + np.arange(lengths.sum(), dtype=np.int32)
    keys = np.random.default_rng(first).integers(0, 2**63, len(lengths)).astype(np.uint64)
    return TokenCorpus(name, ids, np.cumsum(lengths) - lengths, lengths, keys, frozenset({0}), None)


def all_tokens(mixed):
    return np.concatenate([mixed.document(index) for index in range(mixed.documents)])


LENGTHS = st.lists(st.integers(1, 30), min_size=3, max_size=60)


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.data())
def test_a_mixture_has_its_shares_and_takes_nothing_twice(lengths, data):
    """Invariant 25."""
    parts = [corpus(each, 10_000 * index) for index, each in enumerate(lengths)]
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(parts), max_size=len(parts)))
    shares = [weight / sum(weights) for weight in weights]
    total = min(part.tokens / share for part, share in zip(parts, shares, strict=True))
    if min(round(share * total) for share in shares) == 0:
        return
    mixed = mixture(parts, shares, name="mixed")
    tokens = all_tokens(mixed)
    counts = np.bincount(tokens // 10_000, minlength=len(parts))
    assert len(set(tokens.tolist())) == len(tokens) == mixed.tokens
    assert np.abs(counts - np.asarray(shares) * total).max() <= 0.5
    assert any(count == part.tokens for count, part in zip(counts, parts, strict=True)), "it could have been more"
    for index, part in enumerate(parts):
        own = tokens[tokens // 10_000 == index]
        assert np.array_equal(own, part.ids[: len(own)]), "each part in its own order, from its beginning"


def test_any_beginning_has_about_the_shares():
    parts = [corpus([20] * 1000, 0), corpus([5] * 900, 10_000_000)]
    mixed = mixture(parts, [0.8, 0.2], name="mixed")
    tokens = all_tokens(mixed)
    for beginning in (200, 1000, 5000):
        assert abs(np.mean(tokens[:beginning] < 10_000_000) - 0.8) <= 25 / beginning


def test_a_mixture_reads_its_parts_files_and_splits_by_content():
    one, two = corpus([7] * 80, 0), corpus([7] * 80, 100_000)
    mixed = mixture([one, mixture([two], [1.0], name="inner")], [0.5, 0.5], name="mixed")
    assert mixed.ids.arrays == (one.ids, two.ids) or all(
        ours is theirs for ours, theirs in zip(mixed.ids.arrays, (one.ids, two.ids), strict=True)
    )
    for side, first, second in zip(split(mixed, 0.3), split(one, 0.3), split(two, 0.3), strict=True):
        assert set(side.keys.tolist()) == {*first.keys.tolist(), *second.keys.tolist()}
        assert len(windows(side, 8)) == side.tokens // 8


@pytest.fixture
def named(monkeypatch):
    """Two named corpora, of 3000 and 1000 documents of 13 tokens."""
    made = {
        name: [Document(f"{name} {index:07}", name) for index in range(count)]
        for name, count in (("docs", 3000), ("kjvs", 1000))
    }
    monkeypatch.setattr(sources, "NAMED", {name: (lambda texts=texts: texts) for name, texts in made.items()})


def share_of_docs(found):
    text = [byte_tokenizer().decode(found.document(index).tolist()) for index in range(found.documents)]
    return np.mean([each.startswith("docs") for each in text])


@pytest.mark.parametrize(
    ("source", "documents", "share"),
    [
        ("docs+kjvs", 4000, 0.75),
        ("docs:0.5+kjvs:0.5", 2000, 0.5),
        ("docs:7+kjvs:3", 3333, 0.7),
        ("kjvs:0.1+docs:0.9", 3333, 0.9),
        ("docs:1", 3000, 1.0),
    ],
)
def test_weights_in_the_notation(named, source, documents, share):
    found = load_corpus(source, byte_tokenizer())
    assert abs(found.documents - documents) <= 2 and abs(share_of_docs(found) - share) < 0.01
    assert found.name == source


def test_max_tokens_keeps_the_shares(named):
    found = load_corpus("docs:0.5+kjvs:0.5", byte_tokenizer(), max_tokens=1300)
    assert found.tokens == 1300 and abs(share_of_docs(found) - 0.5) < 0.02


def test_paths_and_names_are_mixed_with_weights(named, tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(f'{{"text": "mine {index:07}"}}\n' for index in range(500)))
    source = f"docs:0.5+{tmp_path}/own.jsonl:0.5"
    assert share_of_docs(load_corpus(source, byte_tokenizer())) == 0.5
    train, heldout = load_text(source, byte_tokenizer(), seq=32, heldout=0.2, cache=tmp_path / "cache")
    assert len(train) > 3 * len(heldout) > 0 and len(list((tmp_path / "cache").iterdir())) == 2
    with pytest.raises(UserError, match=r"give every part a weight: docs:1\+.*own\.jsonl:1"):
        load_corpus(f"docs+{tmp_path}/own.jsonl", byte_tokenizer())


def test_the_field_that_holds_the_text_can_be_named(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"body": "mine {index:07}"}}\n' for index in range(100)))
    train, heldout = load_text(str(path), byte_tokenizer(), seq=16, heldout=0.2, text_field="body")
    assert len(train) > len(heldout) > 0


def test_a_path_that_looks_like_a_mixture_is_a_path(tmp_path):
    path = tmp_path / "a+b:0.5.txt"
    path.write_text("one file")
    assert weighted_parts(str(path)) is None
    assert [document.text for document in documents_of(str(path))] == ["one file"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("docs:0.5+kjvs", "'kjvs' has no weight, but another part has: write kjvs:1"),
        ("docs:0+kjvs:1", "the weight 0 of 'docs' must be positive"),
        ("docs:-1+kjvs:1", "the weight -1 of 'docs' must be positive"),
        ("docs:nan+kjvs:1", "the weight nan of 'docs' must be positive"),
        ("docs:inf+kjvs:1", "the weight inf of 'docs' must be positive"),
        ("docs:1+docs:1", "'docs' stands there twice"),
        ("docs:1+kjb:1", "no corpus and no path 'kjb'"),
        ("docs:0.9999999+kjvs:0.0000001", "'kjvs' gets 0 tokens"),
    ],
)
def test_weights_that_are_none_are_refused(named, source, message):
    with pytest.raises(UserError, match=message):
        load_corpus(source, byte_tokenizer())
