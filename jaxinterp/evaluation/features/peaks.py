"""Streaming over held-out text: how often every feature fires, and where it peaks highest.

For every feature a count and the n highest peaks are kept, at most one peak a window; never an array of all tokens by
all features. A feature fires on a token where its code is not zero. Tokens of weight 0 (attention sinks, special
tokens) count nowhere.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.decomposition import Codes, Shown
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import several
from jaxinterp.data.activations import harvest
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.kernels import rank, select_topk
from jaxinterp.training.progress import counting

MOST_CODES = 2**24  # entries of a batch's dense codes: 64 MiB

Window = Mapping[str, np.ndarray]


class Peaks(eqx.Module):
    """Running statistics of every feature; the n highest peaks are sorted by |value|, 0 where there are fewer."""

    fired: Float[Array, " features"]  # tokens on which it is active
    weight: Float[Array, ""]  # tokens seen
    values: Float[Array, "features n"]
    windows: Int[Array, "features n"]  # in which window
    places: Int[Array, "features n"]  # at which token of it


MOST_KEPT = 2**28
"""Bytes of sparse codes that stay in memory from the first pass, so that no second one is needed: 256 MiB."""

Kept = SparseCodes | None
"""Sparse codes of a batch on the host, 0 where a token has no weight; None: dense ones, or too many to keep."""


def measure(decomposition: Shown, model: PyTree, windows: Sequence[Window], count: int) -> Peaks:
    """The first pass: firing counts and the `count` highest peaks of every feature, at most one a window."""
    return measure_and_keep(decomposition, model, windows, count, most=0)[0]


def measure_and_keep(
    decomposition: Shown,
    model: PyTree,
    windows: Sequence[Window],
    count: int,
    *,
    most: int = MOST_KEPT,
    progress: bool = False,
) -> tuple[Peaks, list[Kept]]:
    """`measure`, and the codes of every batch.

    Args:
      most: bytes of codes that are kept.
      progress: show how far it is.
    """
    features = decomposition.decoder.shape[0]
    peaks = Peaks(
        jnp.zeros(features, jnp.float32),
        jnp.zeros((), jnp.float32),
        jnp.zeros((features, count), jnp.float32),
        jnp.zeros((features, count), jnp.int32),
        jnp.zeros((features, count), jnp.int32),
    )
    kept: list[Kept] = []
    with counting(len(windows), "reading what the features respond to", "windows", shown=progress) as done:
        for first, batch in batches(windows, features):
            peaks, codes = _update(peaks, decomposition, model, batch, jnp.asarray(first, jnp.int32))
            if codes is not None:
                most -= codes.values.nbytes + codes.indices.nbytes
            kept.append(jax.tree.map(np.asarray, codes) if most >= 0 else None)
            for _ in range(min(len(batch["tokens"]), len(windows) - first)):
                done()
    return peaks, kept


def columns_of(codes: SparseCodes, chosen: Int[np.ndarray, " chosen"]) -> Float[np.ndarray, "batch seq chosen"]:
    """What `chosen_codes` gives, of codes that were kept."""
    column = np.full(codes.features + 1, -1)  # a padded slot may name the feature behind the last
    column[chosen] = np.arange(len(chosen))
    at = column[np.asarray(codes.indices)]
    shown = at >= 0
    found = np.zeros((*at.shape[:-1], len(chosen)), np.float32)
    np.add.at(found, (*np.nonzero(shown)[:-1], at[shown]), np.asarray(codes.values)[shown])
    return found


@eqx.filter_jit
def chosen_codes(
    decomposition: Shown, model: PyTree, batch: Mapping[str, Array], chosen: Int[Array, " chosen"]
) -> Float[Array, "batch seq chosen"]:
    """The codes of the chosen features at every token."""
    return token_codes(decomposition, model, batch)[..., chosen]


def token_codes(decomposition: Shown, model: PyTree, batch: Mapping[str, Array]) -> Float[Array, "batch seq features"]:
    """The codes of every token, 0 where the token has no weight."""
    return _dense(*_encoded(decomposition, model, batch))


def _encoded(decomposition: Shown, model: PyTree, batch: Mapping[str, Array]) -> tuple[Codes, Bool[Array, "batch seq"]]:
    """The codes of every token, and whether it has weight."""
    reads = decomposition.sites.reads
    rows = harvest(model, batch, several(reads))
    return decomposition.encode(rows.at(reads)), rows.weight > 0


def _dense(codes: Codes, counts: Bool[Array, "batch seq"]) -> Float[Array, "batch seq features"]:
    return jnp.where(counts[..., None], codes.dense(), 0.0)


@eqx.filter_jit
def _update(
    peaks: Peaks, decomposition: Shown, model: PyTree, batch: Mapping[str, Array], first: Array
) -> tuple[Peaks, Kept]:
    encoded, counts = _encoded(decomposition, model, batch)
    kept = None
    if isinstance(encoded, SparseCodes):
        values = jnp.where(counts[..., None], encoded.values, 0.0)
        kept = SparseCodes(values, encoded.indices, encoded.features, encoded.capped)
    codes = _dense(encoded, counts)
    places = jnp.argmax(jnp.abs(codes), axis=1)  # [batch, features]
    values = jnp.take_along_axis(codes, places[:, None], axis=1)[:, 0]
    windows = jnp.broadcast_to(first + jnp.arange(codes.shape[0], dtype=jnp.int32)[:, None], places.shape)

    def joined(old: Array, new: Array) -> Array:
        return jnp.concatenate([old, new.T.astype(old.dtype)], axis=1)

    every_value = joined(peaks.values, values)
    # Of equal peaks the first is kept, which is the one in the earlier window.
    largest, best = select_topk(every_value, k=peaks.values.shape[1], rank=rank.by_size())
    found = Peaks(
        peaks.fired + jnp.sum(codes != 0, axis=(0, 1)),
        peaks.weight + jnp.sum(batch["weight"] > 0),
        largest,
        jnp.take_along_axis(joined(peaks.windows, windows), best, axis=1),
        jnp.take_along_axis(joined(peaks.places, places), best, axis=1),
    )
    return found, kept


def collect(dataset: Iterable[Window], tokens: int, seed: int) -> list[Window]:
    """Windows of the dataset, until there are so many tokens; batches are taken apart."""

    def single() -> Iterator[Window]:
        for entry in _sample(dataset, tokens, seed):
            arrays = {name: np.asarray(array) for name, array in entry.items()}
            if arrays["tokens"].ndim == 1:
                yield arrays
            else:
                yield from (
                    {name: array[row] for name, array in arrays.items()} for row in range(len(arrays["tokens"]))
                )

    windows = single()
    first = next(windows, None)
    if first is None:
        raise UserError("there is not one held-out window: give more held-out text or shorter windows.")
    return [first, *itertools.islice(windows, max(tokens // len(first["tokens"]), 1) - 1)]


def _sample(dataset: Any, tokens: int, seed: int) -> Iterable[Window]:
    """A random sample of so many tokens, in the dataset's own order; the dataset itself where it has no length."""
    if not hasattr(dataset, "__len__") or not len(dataset):  # an iterator has no length
        return dataset
    entries = -(-tokens // np.size(dataset[0]["tokens"]))
    places = np.random.default_rng(seed).choice(len(dataset), min(entries, len(dataset)), replace=False)
    return (dataset[int(place)] for place in np.sort(places))


def batches(windows: Sequence[Window], features: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """Batches of one shape with the number of their first window; the last one is filled up with tokens of weight 0."""
    seq = len(windows[0]["tokens"])
    size = min(max(MOST_CODES // (seq * features), 1), len(windows))
    for first in range(0, len(windows), size):
        part = windows[first : first + size]
        missing = ((0, size - len(part)), (0, 0))
        yield (
            first,
            {
                "tokens": jnp.asarray(np.pad(np.stack([window["tokens"] for window in part]), missing)),
                "weight": jnp.asarray(np.pad(np.stack([window["weight"] for window in part]), missing)),
            },
        )
