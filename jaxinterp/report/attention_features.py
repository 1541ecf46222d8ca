"""Features of an attention dictionary with their contexts: where each fires most, and what its first peak read."""

from collections.abc import Mapping, Sequence

import equinox as eqx
import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxinterp.core.json_value import Json
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.evaluation.attention.attribution import by_source, reading
from jaxinterp.evaluation.attention.features import SHARES
from jaxinterp.evaluation.features.peaks import collect, measure
from jaxinterp.models.attention import Attention
from jaxinterp.models.load import Subject
from jaxinterp.models.run import run
from jaxinterp.report.features import choose
from jaxinterp.report.passages import token_text

PEAKS = 3
"""Contexts of a feature, and source tokens of the first."""


def feature_examples(
    dictionary: Dictionary,
    attention: Attention,
    subject: Subject,
    heldout: grain.MapDataset,
    site: str,
    table: Mapping[str, np.ndarray],
    shares: np.ndarray,
    *,
    examples: int,
    tokens: int,
    seed: int = 0,
) -> list[dict[str, Json]]:
    """Some features, drawn evenly by how often they fire: their highest peaks, and what the highest one read.

    Args:
      table: what `attention_features.attribute` gives.
      shares: of the heads in every feature's write vector, `[features, heads]`.
      examples: how many features.
      tokens: of held-out text that peaks are looked for in.
    Returns:
      A row for each feature.
    """
    windows = collect(heldout, tokens, seed)
    peaks = measure(dictionary, subject.model, windows, PEAKS)
    densities = np.asarray(peaks.fired, np.float64) / max(float(peaks.weight), 1.0)
    values, where, places = (np.asarray(part) for part in (peaks.values, peaks.windows, peaks.places))
    rows = []
    for j in choose(densities, examples, seed):
        row: dict[str, Json] = {"feature": f"{j}", "density": float(densities[j])}
        row |= {"head": f"{shares[j].argmax()}", "its share": float(shares[j].max())}
        row |= {name: float(table[name][j]) if table["fired"][j] else None for name in ("distance", *SHARES)}
        found = np.flatnonzero(values[j])
        texts = [[token_text(subject.tokenizer, int(t)) for t in windows[where[j, n]]["tokens"]] for n in found]
        row["highest peaks"] = "   |   ".join(
            _around(text, int(places[j, n])) for text, n in zip(texts, found, strict=True)
        )
        first = jnp.asarray(windows[where[j, 0]]["tokens"])[None]
        j_and_place = jnp.asarray(j), jnp.asarray(places[j, 0])
        parts = np.asarray(_sources(dictionary, attention, subject.model, first, site, *j_and_place))
        row["what the first one read"] = ", ".join(
            f"»{texts[0][s]}« {places[j, 0] - s} back ({parts[s] / np.abs(parts).sum():+.0%})"
            for s in np.argsort(-np.abs(parts))[:PEAKS]
        )
        rows.append(row)
    return rows


@eqx.filter_jit
def _sources(
    dictionary: Dictionary, attention: Attention, model: PyTree, tokens: Array, site: str, feature: Array, place: Array
) -> Array:
    """The part of every position of one window in a feature's pre-activation at `place`."""
    trace = run(model, tokens)
    indices = jnp.full((*tokens.shape, 1), feature)
    read = reading(dictionary, attention)
    return by_source(read, attention, trace[f"{site}/in"], trace[f"{site}/pattern"], indices)[0, place, 0]


def _around(tokens: Sequence[str], peak: int) -> str:
    before, after = tokens[max(0, peak - 8) : peak], tokens[peak + 1 : peak + 3]
    return " ".join(f"{''.join(before)}»{tokens[peak]}«{''.join(after)}".split())
