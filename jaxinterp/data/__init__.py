"""Data: text -> documents -> token ids -> windows -> activations.

    corpus = load_corpus("docs:0.7+my_files/:0.3", tokenizer, cache="tokens")
    train, heldout = split(corpus, 0.05)
    for batch in batches(windows(train, 256), 32, seed=0): ...

`windows` and `batches` are in `jaxinterp.data.windows`; `load_text` in `jaxinterp.data.text.load_text` does all of it.
"""

from jaxinterp.data.text.documents import Document, read_documents
from jaxinterp.data.text.sources import load_corpus
from jaxinterp.data.tokens import TokenCorpus, encode_documents, split

__all__ = ["Document", "TokenCorpus", "encode_documents", "load_corpus", "read_documents", "split"]
