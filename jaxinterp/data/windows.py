"""Tokens -> windows -> batches: the data order, independent of how many hosts read it.

All documents, in their order and each with its end token, make one stream. Window i is its i-th stretch of `seq_len`
tokens (with a model that expects a begin token: that token and the next `seq_len - 1`), so windows have numbers and
can be read in any order. `batches` shuffles the numbers globally, cuts them into global batches, and gives each host
its rows of every global batch:

    hosts = [batches(windows(corpus, 256), 64, seed=0, host_index=h, host_count=4) for h in range(4)]
    # the h-th host's batch t = rows 16 h .. 16 h + 15 of the one-host batch t

The iterator's whole state is a batch number; it saves and restores through Grain and Orbax.

A text larger than the memory is read from a memory-mapped file (a token cache, a file of token ids). `shuffle_within`
then keeps reading nearly sequential: the stream is cut into stretches of so many windows, which come in their order,
shuffled inside. Windows still have numbers, and the state is still one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Float32, Int32

from jaxinterp.core.errors import UserError
from jaxinterp.data.tokens import TokenCorpus

READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
"""Grain's own default reads 500 batches ahead, which is gigabytes at pod sizes."""


ENDLESS = 2**30
"""Epochs; Grain's own endless repeat has a length that overflows in batches of one window."""


class PackedWindows:
    """Random access to the windows of a corpus: a data source for Grain. The tail that fills no window is dropped."""

    def __init__(self, corpus: TokenCorpus, seq_len: int):
        self.corpus = corpus
        self.seq_len = seq_len
        self._stops = np.cumsum(corpus.lengths)
        self._special = np.asarray(sorted(corpus.special), np.int32)

    def __len__(self) -> int:
        return self.corpus.tokens // window_tokens(self.corpus, self.seq_len)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        corpus, count = self.corpus, window_tokens(self.corpus, self.seq_len)
        first = int(index) * count
        documents = np.arange(
            np.searchsorted(self._stops, first, side="right"),
            np.searchsorted(self._stops, first + count, side="left") + 1,
        )
        begins = self._stops[documents] - corpus.lengths[documents]  # of the documents, in the stream
        starts = np.maximum(first - begins, 0)
        stops = np.minimum(first + count - begins, corpus.lengths[documents])
        pieces = np.stack([documents, starts, stops], axis=1).tolist()
        tokens = np.concatenate([corpus.document(*piece) for piece in pieces])
        document = np.repeat(documents.astype(np.int32), stops - starts)
        if corpus.begin is not None:
            tokens = np.concatenate([np.asarray([corpus.begin], np.int32), tokens])
            document = np.concatenate([document[:1], document])
        return {"tokens": tokens, "weight": self._weight(tokens), "document": document}

    def _weight(self, tokens: Int32[np.ndarray, " seq"]) -> Float32[np.ndarray, " seq"]:
        weight = (~np.isin(tokens, self._special)).astype(np.float32)
        weight[0] = 0.0  # the attention sink: its activations are huge and say nothing about text
        return weight


@dataclass(frozen=True)
class HostRows:
    """One host's rows of every global batch: a data source for Grain."""

    dataset: Any
    batch_size: int
    parts: tuple[int, ...]
    host_count: int

    @property
    def rows(self) -> int:
        """Rows of a global batch on this host."""
        return self.share * len(self.parts)

    @property
    def share(self) -> int:
        """Rows of one part."""
        return self.batch_size // self.host_count

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size * self.rows

    def __getitem__(self, index: int) -> Any:
        batch, row = divmod(int(index), self.rows)
        part, place = divmod(row, self.share)
        return self.dataset[batch * self.batch_size + self.parts[part] * self.share + place]


@dataclass(frozen=True)
class Stretches:
    """Epochs of a dataset, shuffled within stretches of so many elements only: a data source for Grain.

    Element i of epoch e stays in its stretch, i // stretch; each stretch of each epoch has an order of its own.
    """

    dataset: Any
    stretch: int
    seed: int
    epochs: int

    def __len__(self) -> int:
        return len(self.dataset) * self.epochs

    def __getitem__(self, index: int) -> Any:
        epoch, place = divmod(int(index), len(self.dataset))
        number, within = divmod(place, self.stretch)
        first = number * self.stretch
        last = min(self.stretch, len(self.dataset) - first) - 1
        seed = int(np.random.SeedSequence([self.seed, epoch, number]).generate_state(1)[0])
        return self.dataset[first + index_shuffle(within, max_index=last, seed=seed, rounds=4)]


def windows(corpus: TokenCorpus, seq_len: int) -> grain.MapDataset:
    """The windows of a corpus: element i is a dict of three arrays `[seq_len]`.

    `tokens` int32; `weight` float32: 0 at position 0 and at special tokens, else 1; `document` int32: the index of the
    document in the corpus (an end token belongs to the document that it ends).

    Raises:
      UserError: seq_len is below 2, or the corpus has too few tokens for one window.
    """
    if seq_len < 2:
        raise UserError(f"seq_len={seq_len} must be at least 2: position 0 of a window carries no weight.")
    packed = PackedWindows(corpus, seq_len)
    if not len(packed):
        raise UserError(
            f"corpus {corpus.name!r} has {corpus.tokens} tokens in {corpus.documents} documents, too few for a window "
            f"of seq_len={seq_len}: give more text or a smaller seq_len."
        )
    return grain.MapDataset.source(packed)


def batches(
    dataset: grain.MapDataset,
    batch_size: int,
    *,
    seed: int,
    shuffle: bool = True,
    shuffle_within: int | None = None,
    epochs: int | None = None,
    host_index: int | Sequence[int] = 0,
    host_count: int = 1,
) -> grain.IterDataset:
    """Batches of windows: dicts of arrays `[batch_size / host_count, seq]`, this host's rows of each global batch.

    Every epoch has its own order; a batch may span two epochs, and the last rows that fill no batch are dropped.

    Args:
      batch_size: windows in a global batch.
      seed: of the global order; must be the same on all hosts.
      host_index: which of `host_count` parts of every batch this host reads; several, one after another.
      shuffle: whether windows are shuffled at all.
      shuffle_within: shuffle within stretches of so many windows, which are read one after another; None: over all.
      epochs: passes over the windows; None: without end.
    Raises:
      UserError: sizes that do not fit together, or fewer windows than one batch needs.
    """
    if batch_size < 1 or host_count < 1 or batch_size % host_count:
        raise UserError(f"batch_size={batch_size} must be a positive multiple of host_count={host_count}.")
    parts = (host_index,) if isinstance(host_index, int) else tuple(host_index)
    if not parts or not all(0 <= part < host_count for part in parts):
        raise UserError(f"host_index={host_index} must lie in 0..{host_count - 1}.")
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative.")
    if shuffle_within is not None and shuffle_within < 1:
        raise UserError(f"shuffle_within={shuffle_within} must be at least 1 (or None: over the whole text).")
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs={epochs} must be at least 1 (or None: without end).")
    if epochs is not None and epochs * len(dataset) < batch_size:
        raise UserError(
            f"batch_size={batch_size} windows, but {len(dataset)} windows x {epochs} epochs are fewer: "
            "give a smaller batch_size, more epochs or more text."
        )
    repeated: Any
    if shuffle and shuffle_within is not None:
        repeated = Stretches(dataset, shuffle_within, seed, epochs or ENDLESS)
    elif shuffle:
        # Grain shuffles epoch e with seed + e, so seeds 0 and 1 would share their orders: spread the seeds first.
        repeated = dataset.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0])).repeat(epochs or ENDLESS)
    else:
        repeated = dataset.repeat(epochs or ENDLESS)
    rows = HostRows(repeated, batch_size, parts, host_count)
    return grain.MapDataset.source(rows).batch(rows.rows).to_iter_dataset(READ_AHEAD)


def window_tokens(corpus: TokenCorpus, seq_len: int) -> int:
    """Tokens of the stream in one window: seq_len, less one where every window starts with a begin token."""
    return seq_len - (corpus.begin is not None)


def epochs_needed(corpus: TokenCorpus, seq_len: int, tokens: int) -> float:
    """How often the windows must be passed over to give `tokens` tokens: above 1, the training text repeats."""
    return tokens / (len(windows(corpus, seq_len)) * seq_len)


def some_places(windows: int, most: int = 64) -> list[int]:
    """Places of windows, evenly apart, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, windows - 1, min(most, windows))})


def fingerprint(windows: grain.MapDataset) -> str:
    """A hash of the number of windows and of 64 of them, the first and the last among them."""
    digest = hashlib.sha256(str(len(windows)).encode())
    for index in some_places(len(windows)):
        digest.update(np.asarray(windows[index]["tokens"], np.int32).tobytes())  # type: ignore[index]
    return digest.hexdigest()[:16]
