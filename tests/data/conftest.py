"""A small real tokenizer, and documents to read with it."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, trainers

SENTENCES = (
    "The heaven and the earth were finished, and all the host of them.",
    "A transcoder reads what the sublayer reads and writes what it writes.",
    "Return the sum of the squares along the given axis.",
)


@dataclass(frozen=True)
class SmallTokenizer:
    """Byte-level BPE of a few merges, behind the protocol that `jaxinterp.data.tokens` asks for."""

    backend: tokenizers.Tokenizer
    end: int | None
    begin: int | None = None

    @property
    def special(self) -> frozenset[int]:
        return frozenset({0, 1})

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)


def train_tokenizer() -> tokenizers.Tokenizer:
    """256 bytes, 40 merges, and the special tokens 0 (end) and 1 (begin)."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=298,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken("<|endoftext|>", special=True), AddedToken("<|begin|>", special=True)],
            show_progress=False,
        ),
    )
    return backend


@pytest.fixture(scope="session")
def tokenizer() -> SmallTokenizer:
    """Ends documents with token 0."""
    return SmallTokenizer(train_tokenizer(), end=0)


@pytest.fixture(scope="session")
def beginning_tokenizer() -> SmallTokenizer:
    """For a model that expects token 1 before every sequence."""
    return SmallTokenizer(train_tokenizer(), end=0, begin=1)


@pytest.fixture(scope="session")
def endless_tokenizer() -> SmallTokenizer:
    """Has no end token."""
    return SmallTokenizer(train_tokenizer(), end=None)
