"""From the name of a text to windows for training and for scoring, in one call."""

from itertools import islice
from pathlib import Path

import grain
import numpy as np

from jaxinterp.data.text.sources import load_corpus
from jaxinterp.data.tokens import TextTokenizer, split
from jaxinterp.data.windows import batches, windows


def load_text(
    source: str,
    tokenizer: TextTokenizer | None,
    *,
    seq: int = 256,
    heldout: float = 0.1,
    text_field: str = "text",
    max_tokens: int | None = None,
    cache: str | Path | None = None,
    token_dtype: str | None = None,
) -> tuple[grain.MapDataset, grain.MapDataset]:
    """Windows of training and of held-out documents: `train, heldout = load_text("docs", subject.tokenizer)`.

    Args:
      source: docs, kjv, shakespeare, several joined by `+`, a mixture (docs:0.7+kjv:0.3), or a path: see `load_corpus`.
      seq: tokens a window.
      heldout: the fraction of documents held out, chosen by their content.
      tokenizer: the subject's; None for files of token ids (.npy, .bin, rows of `input_ids`) of a model without one.
      text_field: the field of a .jsonl line, or the column of a Parquet file, that holds the text or rows of token ids.
      max_tokens: take no more of the text than these.
      cache: a folder for token caches: see `load_corpus`.
      token_dtype: the type of bare integers in a .bin file, such as "uint32": see `load_corpus`.
    Raises:
      UserError: there is text and no tokenizer, no such text, or too little of it.

    Example:
      >>> train, heldout = load_text("docs", subject.tokenizer, seq=64, max_tokens=20_000)
      >>> sorted(train[0])
      ['document', 'tokens', 'weight']
    """
    corpus = load_corpus(
        source, tokenizer, text_field=text_field, max_tokens=max_tokens, cache=cache, token_dtype=token_dtype
    )
    train, rest = split(corpus, heldout)
    return windows(train, seq), windows(rest, seq)


def take(dataset: grain.MapDataset, tokens: int, *, seed: int = 0, rows: int = 4) -> list[dict[str, np.ndarray]]:
    """A shuffled sample of about `tokens` tokens, each window at most once, in batches of `rows` windows."""
    first: dict[str, np.ndarray] = dataset[0]
    rows = min(rows, len(dataset))
    count = max(1, min(tokens // (rows * len(first["tokens"])), len(dataset) // rows))
    return list(islice(batches(dataset, rows, seed=seed), count))
