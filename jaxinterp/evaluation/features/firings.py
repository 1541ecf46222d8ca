"""Every firing of every feature on a text, kept as numbers on the host; what a page shows is read from them.

A feature j fires on token t where its code a_tj is not zero. The firings are kept twice, sorted by feature and sorted
by token, so that a feature's whole activation (or a token's whole code) is one slice:

    by feature   where[starts[j] : starts[j + 1]]      the tokens, values[...] their activations
    by token     features[token_starts[t] : ...]       the features, token_values[...] their activations

Tokens are numbered window after window: t = window * seq + place. From the slices, exactly and without a model:

    density_j          n_j / n                                    n tokens that count, n_j of them with a_tj != 0
    correlation_ij     (sum_t a_ti a_tj / n - m_i m_j) / (s_i s_j)    Pearson's, silent tokens count as 0
    match_j(S)         2 p r / (p + r)     p = sum_S |a_tj| / sum |a_tj|,   r = |{t in S: a_tj != 0}| / |S|
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.decomposition import Shown
from jaxinterp.core.sites import several
from jaxinterp.data.activations import harvest
from jaxinterp.decompositions.codes import SparseCodes
from jaxinterp.evaluation.features.peaks import Window, batches


class Found(NamedTuple):
    """Firings of one batch in any order: feature, token, activation."""

    features: Int[np.ndarray, " firings"]
    where: Int[np.ndarray, " firings"]
    values: Float[np.ndarray, " firings"]


class Firings(NamedTuple):
    """The module's two orders; arrays may lie on disk (memory maps)."""

    starts: Int[np.ndarray, " features_1"]
    where: Int[np.ndarray, " firings"]
    values: Float[np.ndarray, " firings"]
    token_starts: Int[np.ndarray, " tokens_1"]
    features: Int[np.ndarray, " firings"]
    token_values: Float[np.ndarray, " firings"]

    def of(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, activations) of one feature, in the order of the text."""
        here = slice(int(self.starts[feature]), int(self.starts[feature + 1]))
        return np.asarray(self.where[here]), np.asarray(self.values[here])

    def at(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(which of `tokens`, features, activations) of everything that fires on these tokens."""
        first = np.asarray(self.token_starts[tokens], np.int64)
        count = np.asarray(self.token_starts[tokens + 1], np.int64) - first
        row = np.repeat(np.arange(len(tokens)), count)
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        return row, np.asarray(self.features[place]), np.asarray(self.token_values[place])


def find_firings(
    decomposition: Shown, model: PyTree, windows: Sequence[Window], skip: int = 0
) -> Iterator[tuple[int, Found]]:
    """Batch after batch: (the number of windows read so far, the batch's firings).

    Args:
      skip: windows that were read before; whole batches of them are left out.
    """
    seq, features = len(windows[0]["tokens"]), decomposition.decoder.shape[0]
    for first, batch in batches(windows, features):
        done = min(first + batch["tokens"].shape[0], len(windows))
        if done <= skip:
            continue
        codes = _codes(decomposition, model, batch)
        if isinstance(codes, tuple):
            values, indices = (np.asarray(part).reshape(-1, part.shape[-1]) for part in codes)
            token, slot = np.nonzero(values)
            feature, value = indices[token, slot], values[token, slot]
        else:
            dense = np.asarray(codes).reshape(-1, features)
            token, feature = np.nonzero(dense)
            value = dense[token, feature]
        yield done, Found(feature.astype(np.int32), token + first * seq, value.astype(np.float32))


@eqx.filter_jit
def _codes(decomposition: Shown, model: PyTree, batch: Mapping[str, Array]) -> PyTree:
    """(values, indices) of sparse codes, else dense codes; 0 where the token has no weight."""
    reads = decomposition.sites.reads
    rows = harvest(model, batch, several(reads))
    codes = decomposition.encode(rows.at(reads))
    counts = rows.weight[..., None] > 0
    if isinstance(codes, SparseCodes):
        return jnp.where(counts, codes.values, 0.0), codes.indices
    return jnp.where(counts, codes.dense(), 0.0)


def sort_firings(found: Sequence[Found], features: int, tokens: int) -> Firings:
    """All firings in both orders: a feature's by token, a token's by size of activation."""
    feature, where, value = (np.concatenate(parts) if parts else np.zeros(0) for parts in zip(*found, strict=True))
    by_feature = np.lexsort((where, feature))
    by_token = np.lexsort((-np.abs(value), where))
    return Firings(
        _starts(feature, features),
        where[by_feature].astype(np.int32),
        value[by_feature].astype(np.float32),
        _starts(where, tokens),
        feature[by_token].astype(np.int32),
        value[by_token].astype(np.float32),
    )


def _starts(keys: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(keys.astype(np.int64), minlength=count))])


class Sums(NamedTuple):
    """Of every feature over all tokens: firings, sum of activations, of sizes, of squares, and the largest in size."""

    fired: Int[np.ndarray, " features"]
    total: Float[np.ndarray, " features"]
    size: Float[np.ndarray, " features"]
    square: Float[np.ndarray, " features"]
    largest: Float[np.ndarray, " features"]


def sums_of(firings: Firings) -> Sums:
    """Sums over each feature's slice, in float64."""
    fired = np.diff(firings.starts)
    feature = np.repeat(np.arange(len(fired)), fired)
    values = np.asarray(firings.values, np.float64)
    total, size, square = (np.bincount(feature, each, len(fired)) for each in (values, np.abs(values), values**2))
    largest = np.zeros(len(fired))
    live = fired > 0
    if live.any():
        first = np.asarray(firings.starts[:-1])[live]
        high, low = np.maximum.reduceat(values, first), np.minimum.reduceat(values, first)
        largest[live] = np.where(high >= -low, high, low)
    return Sums(fired.astype(np.int64), total, size, square, largest)


def correlations(firings: Firings, sums: Sums, feature: int, tokens: int) -> Float[np.ndarray, " features"]:
    """Pearson's correlation of one feature's activation with every feature's: the module's equation.

    Args:
      tokens: how many tokens count. A feature that never fires (or never varies) has 0.
    """
    where, values = firings.of(feature)
    row, others, strengths = firings.at(where)
    products = np.bincount(others, values[row].astype(np.float64) * strengths, len(sums.total)) / tokens
    mean = sums.total / tokens
    deviation = np.sqrt(np.maximum(sums.square / tokens - mean**2, 0))
    scale = deviation * deviation[feature]
    return np.where(scale > 0, (products - mean * mean[feature]) / np.where(scale > 0, scale, 1), 0.0)


def matches(firings: Firings, sums: Sums, chosen: Int[np.ndarray, " chosen"]) -> Float[np.ndarray, " features"]:
    """How well each feature's firing picks out the chosen tokens, 0 to 1: match_j of the module's equations."""
    _, features, values = firings.at(chosen)
    inside = np.bincount(features, np.abs(values.astype(np.float64)), len(sums.size))
    hits = np.bincount(features, minlength=len(sums.size))
    precision = inside / np.where(sums.size > 0, sums.size, 1)
    recall = hits / max(len(chosen), 1)
    both = precision + recall
    return np.where(both > 0, 2 * precision * recall / np.where(both > 0, both, 1), 0.0)


def at_quantile(
    where: Int[np.ndarray, " firings"],
    values: Float[np.ndarray, " firings"],
    quantile: float,
    count: int,
    seq: int,
    used: set[int],
) -> list[int]:
    """Places in `where` of the firings nearest to a quantile of |activation|, of different windows.

    Args:
      quantile: 1 is the largest; 0.5 the median of the activations that are not zero.
      used: windows that may not come again; those that are chosen are added to it.
    """
    order = np.argsort(-np.abs(values), kind="stable")
    target = (1 - quantile) * (len(order) - 1)
    chosen: list[int] = []
    for rank in np.argsort(np.abs(np.arange(len(order)) - target), kind="stable"):
        place = int(order[rank])
        window = int(where[place]) // seq
        if window not in used:
            used.add(window)
            chosen.append(place)
        if len(chosen) == count:
            break
    return sorted(chosen, key=lambda place: -abs(values[place]))
