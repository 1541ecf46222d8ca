"""Streaming over held-out text: how often every feature fires, and where it peaks highest.

For every feature a count and the n highest peaks are kept, at most one peak a window; never an array of all tokens by
all features. A feature fires on a token where its code is not zero. Tokens of weight 0 (attention sinks, special
tokens) count nowhere.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.decomposition import Shown
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import several
from jaxinterp.data.activations import harvest
from jaxinterp.kernels import rank, select_topk

MOST_CODES = 2**24  # entries of a batch's dense codes: 64 MiB

Window = Mapping[str, np.ndarray]


class Peaks(eqx.Module):
    """Running statistics of every feature; the n highest peaks are sorted by |value|, 0 where there are fewer."""

    fired: Float[Array, " features"]  # tokens on which it is active
    weight: Float[Array, ""]  # tokens seen
    values: Float[Array, "features n"]
    windows: Int[Array, "features n"]  # in which window
    places: Int[Array, "features n"]  # at which token of it


def measure(decomposition: Shown, model: PyTree, windows: Sequence[Window], count: int) -> Peaks:
    """The first pass: firing counts and the `count` highest peaks of every feature, at most one a window."""
    features = decomposition.decoder.shape[0]
    peaks = Peaks(
        jnp.zeros(features, jnp.float32),
        jnp.zeros((), jnp.float32),
        jnp.zeros((features, count), jnp.float32),
        jnp.zeros((features, count), jnp.int32),
        jnp.zeros((features, count), jnp.int32),
    )
    for first, batch in batches(windows, features):
        peaks = _update(peaks, decomposition, model, batch, jnp.asarray(first, jnp.int32))
    return peaks


@eqx.filter_jit
def chosen_codes(
    decomposition: Shown, model: PyTree, batch: Mapping[str, Array], chosen: Int[Array, " chosen"]
) -> Float[Array, "batch seq chosen"]:
    """The codes of the chosen features at every token."""
    return token_codes(decomposition, model, batch)[..., chosen]


def token_codes(decomposition: Shown, model: PyTree, batch: Mapping[str, Array]) -> Float[Array, "batch seq features"]:
    """The codes of every token, 0 where the token has no weight."""
    reads = decomposition.sites.reads
    rows = harvest(model, batch, several(reads))
    codes = decomposition.encode(rows.at(reads)).dense()
    return jnp.where(rows.weight[..., None] > 0, codes, 0.0)


@eqx.filter_jit
def _update(peaks: Peaks, decomposition: Shown, model: PyTree, batch: Mapping[str, Array], first: Array) -> Peaks:
    codes = token_codes(decomposition, model, batch)
    places = jnp.argmax(jnp.abs(codes), axis=1)  # [batch, features]
    values = jnp.take_along_axis(codes, places[:, None], axis=1)[:, 0]
    windows = jnp.broadcast_to(first + jnp.arange(codes.shape[0], dtype=jnp.int32)[:, None], places.shape)

    def joined(old: Array, new: Array) -> Array:
        return jnp.concatenate([old, new.T.astype(old.dtype)], axis=1)

    every_value = joined(peaks.values, values)
    # Of equal peaks the first is kept, which is the one in the earlier window.
    largest, kept = select_topk(every_value, k=peaks.values.shape[1], rank=rank.by_size())
    return Peaks(
        peaks.fired + jnp.sum(codes != 0, axis=(0, 1)),
        peaks.weight + jnp.sum(batch["weight"] > 0),
        largest,
        jnp.take_along_axis(joined(peaks.windows, windows), kept, axis=1),
        jnp.take_along_axis(joined(peaks.places, places), kept, axis=1),
    )


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
