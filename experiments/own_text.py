"""The text of a language model that is trained here, in the tokens of a tokenizer that is trained on it first."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax

from jaxinterp.data.text.documents import Document
from jaxinterp.data.text.sources import documents_of, load_corpus, weighted_parts
from jaxinterp.data.tokens import TokenCorpus, split
from jaxinterp.data.vocabulary import train_tokenizer
from jaxinterp.models.files.tokenizer import Tokenizer, tokenizer_from_file
from jaxinterp.storage.files import write_text

HELDOUT = 0.1
"""Share of the documents that is held out: what `load_text` holds out, too."""
TOKENIZER_TEXT = 2 * 10**7
"""Characters of training text that the tokenizer is trained on, at most."""


class Text(NamedTuple):
    """The tokenizer, and the text in its tokens: all of it, and its two sides."""

    tokenizer: Tokenizer
    corpus: TokenCorpus
    train: TokenCorpus
    heldout: TokenCorpus


def text_of(text: str, vocabulary: int, out: Path) -> Text:
    """Tokenizer and tokens of this run; what an earlier part of it has made is read again.

    The tokenizer sees the beginning of the training documents, of a mixture that of every part: at most
    `TOKENIZER_TEXT` characters, shared by the weights. A part that has less gives what it has.
    """
    path = out / "tokenizer.json"
    if path.exists():
        tokenizer = tokenizer_from_file(path)
    else:
        weights = weighted_parts(text) or {text: 1.0}
        room = {source: TOKENIZER_TEXT * weight / sum(weights.values()) for source, weight in weights.items()}
        documents = (
            document for source in room for document in _beginning(_training(documents_of(source)), room[source])
        )
        made = train_tokenizer(documents, vocabulary)
        with TemporaryDirectory() as own:  # of the other processes, which make the same
            kept = path if jax.process_index() == 0 else Path(own) / path.name
            tokenizer = tokenizer_from_file(write_text(kept, made.backend.to_str(pretty=True)))
    corpus = load_corpus(text, tokenizer, cache=out / "tokens")
    return Text(tokenizer, corpus, *split(corpus, HELDOUT))


def _training(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents that `split` does not hold out."""
    return (document for document in documents if document.key >= int(HELDOUT * 2**64))


def _beginning(documents: Iterable[Document], room: float) -> Iterator[Document]:
    """Documents until they hold so many characters."""
    characters = 0
    for document in documents:
        yield document
        characters += len(document.text)
        if characters >= room:
            return
