"""What the pages show, as plain JSON, read from the index alone: no model, no dictionary.

Numbers are rounded to what a page can show. Text is as it is: the page escapes it.
"""

from collections.abc import Mapping

import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.evaluation.features.firings import at_quantile, correlations, matches
from jaxinterp.explore.index import Index

ORDERS = ("density", "largest", "index")
KINDS = ("token", "text", "raises", "lowers", "label", "id")
GROUPS = (("top", 1.0, 8), ("90th percentile", 0.9, 3), ("75th percentile", 0.75, 3), ("median", 0.5, 3),
          ("25th percentile", 0.25, 3))  # fmt: skip
"""Contexts of a page: (heading, quantile of the activations that are not zero, how many)."""
AROUND = 20
BINS = 30
NEAREST = 8
MOST_ROWS = 200


def about(index: Index) -> dict[str, Json]:
    """What the index is of, in words and numbers."""
    fired = np.asarray(index.sums.fired)
    return dict(index.about) | {
        "dead": int((fired == 0).sum()),
        "l0": _round(float(fired.sum()) / index.counted),
        "logits": index.raised is not None,
        "seq": index.seq,
    }


def rows(
    index: Index, labels: Mapping[int, str], *, order: str = "density", first: int = 0, count: int = 100
) -> dict[str, Json]:
    """A page of the list.

    Raises:
      UserError: an unknown order, or numbers out of range.
    """
    if order not in ORDERS:
        raise UserError(f"order={order!r} must be one of {', '.join(ORDERS)}.")
    _check("first", first, 0, max(index.features, 1))
    _check("count", count, 1, MOST_ROWS)
    places = np.arange(first, min(first + count, index.features))
    chosen = places if order == "index" else index.order[order][places]
    return {"total": index.features, "first": first, "rows": [row(index, int(j), labels) for j in chosen]}


def row(index: Index, feature: int, labels: Mapping[int, str], score: float | None = None) -> dict[str, Json]:
    """One line of a list."""
    where, values = index.firings.of(feature)
    size = -np.abs(values)
    top = np.argpartition(size, 63)[:64] if len(size) > 64 else np.arange(len(size))
    top = top[np.argsort(size[top], kind="stable")]
    words = dict.fromkeys(index.word(index.tokens.reshape(-1)[where[place]]) for place in top)
    found = {
        "i": feature,
        "density": _round(index.sums.fired[feature] / index.counted),
        "largest": _round(index.sums.largest[feature]),
        "peaks": list(words)[:3],
        "raised": [] if index.raised is None else [index.word(token) for token in index.raised[feature][:3]],
        "label": labels.get(feature, ""),
    }
    return found if score is None else found | {"score": _round(score)}


def search(index: Index, labels: Mapping[int, str], kind: str, query: str, *, count: int = 50) -> dict[str, Json]:
    """Features by number, by what they fire on, by what they raise or lower, or by what you called them.

    token, text: ranked by `matches`: how well a feature's firing picks out the tokens of that text (in lower case;
    `text` looks for it anywhere, also across tokens). raises, lowers: by the direct logit of a token, where it is among
    the feature's `LOGITS` strongest.

    Raises:
      UserError: an unknown kind, an empty query, a number out of range, or a token that is not in the vocabulary.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} must be one of {', '.join(KINDS)}.")
    if not query:
        raise UserError("the query is empty: give a number, a word or a text.")
    _check("count", count, 1, MOST_ROWS)
    features, scores, said = _search(index, labels, kind, query)
    pairs = zip(features[:count], scores[:count], strict=True)
    found = [row(index, int(j), labels, float(score)) for j, score in pairs]
    return {"total": len(features), "rows": found, "said": said}


def _search(index: Index, labels: Mapping[int, str], kind: str, query: str) -> tuple[np.ndarray, np.ndarray, str]:
    if kind == "id":
        number = check_feature(index, query.removeprefix("#"))
        return np.array([number]), np.ones(1), "the feature of this number"
    if kind == "label":
        found = np.array(sorted(j for j, text in labels.items() if query.lower() in text.lower()), np.int64)
        return found, np.ones(len(found)), "features whose label contains this"
    if kind == "text":
        chosen = positions_of_text(index, query)
        return *_ranked(index, chosen), f"features that fire on this text: {len(chosen):,} tokens of the index hold it"
    ids = index.words.get(query.strip().lower() or query, [])
    if not ids:
        raise UserError(f"{query!r} is not one token of the vocabulary: search for it as text.")
    if kind == "token":
        chosen = np.flatnonzero(np.isin(index.tokens.reshape(-1), ids))
        return *_ranked(index, chosen), f"features that fire on this token: it occurs {len(chosen):,} times"
    tokens, values = (index.raised, index.raised_by) if kind == "raises" else (index.lowered, index.lowered_by)
    if tokens is None or values is None:
        raise UserError(f"kind={kind!r}: features at {index.about['writes']!r} have no direct logits.")
    hits = np.isin(tokens, ids)
    strength = np.max(np.where(hits, np.abs(values), 0), axis=1)
    order = np.argsort(-strength, kind="stable")[: int(hits.any(axis=1).sum())]
    return order, np.asarray(values[order, np.argmax(hits[order], axis=1)]), f"features whose write vector {kind} it"


def positions_of_text(index: Index, query: str) -> np.ndarray:
    """The tokens that a text covers, wherever it occurs."""
    text, begins = index.text
    places, at, query = [], 0, query.lower()
    while (at := text.find(query, at)) >= 0:
        first = int(np.searchsorted(begins, at, "right")) - 1
        places.append(np.arange(first, int(np.searchsorted(begins, at + len(query), "left"))))
        at += len(query)
    return np.unique(np.concatenate(places)) if places else np.zeros(0, np.int64)


def _ranked(index: Index, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = matches(index.firings, index.sums, chosen)
    order = np.argsort(-scores, kind="stable")
    order = order[: int((scores > 0).sum())]
    return order, scores[order]


def feature(index: Index, number: int, labels: Mapping[int, str]) -> dict[str, Json]:
    """Everything that the index says of one feature.

    Raises:
      UserError: the feature does not exist.
    """
    check_feature(index, number)
    where, values = index.firings.of(number)
    reach = float(np.abs(values).max()) if len(values) else 0.0
    low = -reach if (values < 0).any() else 0.0
    counts, edges = np.histogram(values, bins=BINS, range=(low, reach or 1.0))
    found = row(index, number, labels) | {
        "fired": len(values),
        "mean": _round(values.mean()) if len(values) else 0.0,
        "histogram": {"edges": [_round(edge) for edge in edges], "counts": counts.tolist()},
        "contexts": contexts(index, where, values),
        "raised": _logits(index, number, index.raised, index.raised_by),
        "lowered": _logits(index, number, index.lowered, index.lowered_by),
        "neighbours": {
            name: _nearest(vectors, number) for name, vectors in (("write", index.write), ("read", index.read))
        },
        "correlated": _correlated(index, number),
        "cosine": _own_cosine(index, number),
    }
    heads = {} if index.heads is None else {"heads": [_round(share) for share in index.heads[number]]}
    return found | heads


def contexts(index: Index, where: np.ndarray, values: np.ndarray) -> list[dict[str, Json]]:
    """Passages by quantile, those of `GROUPS`; each from a window of its own."""
    used: set[int] = set()
    return [
        {"group": name, **_context(index, where, values, place)}
        for name, quantile, count in GROUPS
        for place in at_quantile(where, values, quantile, count, index.seq, used)
    ]


def _context(index: Index, where: np.ndarray, values: np.ndarray, place: int) -> dict[str, Json]:
    """The tokens around a firing, within its document, with the feature's activation at each."""
    window, spot = divmod(int(where[place]), index.seq)
    low, high = max(0, spot - AROUND), min(index.seq, spot + AROUND + 1)
    document = np.asarray(index.document[window])
    inside = [each for each in range(low, high) if document[each] == document[spot]]
    tokens = window * index.seq + np.asarray(inside)
    at = np.searchsorted(where, tokens)
    there = np.isin(tokens, where)
    activations = np.where(there, values[np.minimum(at, len(values) - 1)], 0)
    return {
        "tokens": [index.word(index.tokens[window, each]) for each in inside],
        "values": [_round(value) for value in activations],
        "peak": inside.index(spot),
        "window": window,
    }


def _logits(index: Index, number: int, tokens: np.ndarray | None, values: np.ndarray | None) -> list[Json]:
    if tokens is None or values is None:
        return []
    return [[index.word(t), _round(v)] for t, v in zip(tokens[number], values[number], strict=True)]


def _nearest(vectors: np.ndarray | None, number: int) -> list[Json]:
    """The features with the largest cosine to one, without itself."""
    if vectors is None:
        return []
    cosines = np.asarray(vectors @ np.asarray(vectors[number]))
    cosines[number] = -np.inf
    return _largest(cosines)


def _correlated(index: Index, number: int) -> list[Json]:
    found = correlations(index.firings, index.sums, number, index.counted)
    found[number] = 0
    return [pair for pair in _largest(found) if pair[1] > 0]


def _largest(scores: np.ndarray) -> list[Json]:
    count = min(NEAREST, len(scores) - 1)
    if count < 1:
        return []
    chosen = np.argpartition(-scores, count - 1)[:count]
    return [[int(j), _round(scores[j])] for j in chosen[np.argsort(-scores[chosen], kind="stable")]]


def _own_cosine(index: Index, number: int) -> float | None:
    if index.read is None or index.write is None or index.read.shape != index.write.shape:
        return None
    return _round(index.read[number] @ index.write[number])


def check_feature(index: Index, number: int | str) -> int:
    """The number of a feature.

    Raises:
      UserError: it is not one.
    """
    text = str(number)
    if not (text.isascii() and text.isdigit() and len(text) <= 12 and int(text) < index.features):
        raise UserError(f"{text[:40]!r} is not a feature: they are numbered 0 to {index.features - 1}.")
    return int(text)


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"{name}={value} must be from {low} to {high}.")


def _round(value: float | np.floating | np.integer) -> float:
    """Four significant digits."""
    return float(f"{float(value):.4g}")
