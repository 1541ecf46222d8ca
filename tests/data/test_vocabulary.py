"""A tokenizer trained on the text at hand."""

import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.data.text.documents import Document
from jaxinterp.data.vocabulary import train_tokenizer
from jaxinterp.models.files.tokenizer import byte_tokenizer, tokenizer_from_file

TEXTS = [Document(f"the sum of the {word}s along the given axis, {n}", "") for n, word in enumerate(["square", "root"])]


def test_it_writes_any_text_in_fewer_tokens_and_round_trips(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 285)
    assert (tokenizer.vocab_size, tokenizer.end, tokenizer.special) == (285, 0, frozenset({0}))
    text = "the sum of 1234 squares ☃\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < len(byte_tokenizer().encode(text))
    assert tokenizer.encode("12") == [*tokenizer.encode("1"), *tokenizer.encode("2")]
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    again = tokenizer_from_file(tmp_path / "tokenizer.json")
    assert (again.end, again.special, again.pieces) == (0, frozenset({0}), "bytes")
    assert again.encode(text) == tokenizer.encode(text) and again.content_hash == tokenizer.content_hash


def test_the_hash_sees_vocabulary_and_special_tokens():
    hashes = [train_tokenizer(TEXTS, ids).content_hash for ids in (280, 280, 281)]
    assert hashes[0] == hashes[1] != hashes[2] != byte_tokenizer().content_hash


def test_a_vocabulary_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="vocabulary=256 must be at least 257"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(UserError, match=r"vocabulary=5000, but the text has pairs for \d+ ids"):
        train_tokenizer(TEXTS, 5000)
