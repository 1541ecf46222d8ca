"""Training a tokenizer: byte-level BPE on the text at hand.

Text is cut as SmolLM's and GPT-2's tokenizers cut it (single digits; words with the space before them), then the most
frequent pair of neighbours is merged until the vocabulary is full (Sennrich et al. 2016, arXiv 1508.07909). All 256
bytes are in the vocabulary, so that any text can be written; the end token has id 0. The same texts in the same order
give the same tokenizer.
"""

from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from jaxinterp.core.errors import UserError
from jaxinterp.data.text.documents import Document
from jaxinterp.models.files.tokenizer import DOCUMENT_ENDS, PRE_TOKENIZERS, Tokenizer

SMALLEST = 257
"""Ids: the bytes and the end token."""


def train_tokenizer(documents: Iterable[Document], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of `vocabulary` ids, the end token among them.

    Args:
      documents: what pairs are counted in: of training text only, if held-out text is to be new to it.
    Raises:
      UserError: `vocabulary` is below 257, or the text has too few pairs to fill it.
    """
    if vocabulary < SMALLEST:
        raise UserError(f"vocabulary={vocabulary} must be at least {SMALLEST}: 256 bytes and the end token.")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS["smollm"])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(DOCUMENT_ENDS[0], special=True, normalized=False)],
        show_progress=False,
    )
    backend.train_from_iterator((document.text for document in documents), trainer)
    found = backend.get_vocab_size()
    if found < vocabulary:
        raise UserError(
            f"vocabulary={vocabulary}, but the text has pairs for {found} ids: give more text, or fewer ids."
        )
    return Tokenizer(backend, end=0, begin=None, special=frozenset({0}), pieces="bytes")
