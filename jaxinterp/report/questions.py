"""Short questions about features, from a shell or a notebook: where does it fire, what does it raise, which one is it.

find_features(dictionary, subject, text, " number")       the features that fire on a word
top_contexts(dictionary, subject, text, features=[606])   where they fire most
logits_of(dictionary, subject, 606)                       the tokens that one raises and lowers directly
codes_table(codes, tokens, subject)                       codes as columns, for pandas or NumPy
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from jaxinterp.core.decomposition import Revivable, Shown
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.sites import several
from jaxinterp.decompositions.codes import Codes
from jaxinterp.evaluation.features.firings import find_firings, matches, sort_firings, sums_of
from jaxinterp.evaluation.features.peaks import Window, collect
from jaxinterp.evaluation.features.vectors import direct_logits
from jaxinterp.models.files.subject import Subject
from jaxinterp.report.content import TokenContext
from jaxinterp.report.features import feature_pages
from jaxinterp.report.passages import token_text

SEQ = 256


class Logits(NamedTuple):
    """(token, logit) by the direct path, per unit of activation, strongest first."""

    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]


def top_contexts(
    decomposition: Shown,
    subject: Subject,
    text: str | Sequence[str] | Iterable[Window],
    features: Sequence[int],
    *,
    contexts: int = 5,
    tokens: int = 50_000,
    seed: int = 0,
) -> dict[int, tuple[TokenContext, ...]]:
    """The passages in which features are strongest, at most one from each window; each prints as a line.

    Args:
      text: a text, several, or windows as from `load_text`.
      features: their numbers.
      contexts, tokens, seed: as in `feature_pages`.
    Raises:
      UserError: as `feature_pages`; or the text is empty.

    Example:
      >>> found = top_contexts(result.decomposition, subject, "a cat sat on a mat", features=[3, 5])
      >>> sorted(found)
      [3, 5]
    """
    chosen = [int(j) for j in features]
    windows = as_windows(subject, text)
    _, pages = feature_pages(
        decomposition, subject, windows, features=chosen, contexts=contexts, tokens=tokens, seed=seed
    )
    return {page.index: page.contexts for page in pages}


@ordinary()
def logits_of(decomposition: Shown, subject: Subject, feature: int, *, count: int = 10) -> Logits:
    """The tokens whose logits a feature raises and lowers by the direct path (see `evaluation.features.vectors`).

    Raises:
      UserError: the feature does not exist, or what it writes does not reach the logits.

    Example:
      >>> len(logits_of(result.decomposition, subject, 3, count=4).raised)
      4
    """
    known = decomposition.decoder.shape[0]
    if not 0 <= feature < known:
        raise UserError(f"feature={feature} is not an index of a feature, 0 to {known - 1}.")
    if count < 1:
        raise UserError(f"count={count} must be at least 1.")
    scale = float(decomposition.output_scale) if isinstance(decomposition, Revivable) else 1.0
    (writes, *_) = several(decomposition.sites.writes)
    vector = scale * np.asarray(decomposition.decoder[feature], np.float32)
    logits = direct_logits(subject.model, writes, vector[None])
    if logits is None:
        raise UserError(f"features at {writes!r} have no direct logits: the model has none, or the array is not added.")
    order = np.argsort(-logits[0], kind="stable")
    words = lambda ids: tuple((token_text(subject.tokenizer, int(t)), float(logits[0, t])) for t in ids)
    return Logits(words(order[:count]), words(order[::-1][:count]))


@ordinary()
def find_features(
    decomposition: Shown,
    subject: Subject,
    text: str | Sequence[str] | Iterable[Window],
    word: str,
    *,
    count: int = 10,
    tokens: int = 50_000,
    seed: int = 0,
) -> list[tuple[int, float]]:
    """The features whose firing picks out a word best: (feature, score from 0 to 1), best first.

    2 p r / (p + r), with p the share of the feature's activation that lies on tokens of the word, and r the share of
    these tokens on which it fires. The word is looked for as the text has it, also across tokens.

    Raises:
      UserError: the word is empty or does not occur in the text.

    Example:
      >>> found = find_features(result.decomposition, subject, ["the cat sat", "a dog and a cat"], "cat", count=3)
      >>> len(found), found[0][1] >= found[1][1]
      (3, True)
    """
    if not word:
        raise UserError("word is empty: give what the feature should fire on.")
    windows = collect(as_windows(subject, text), tokens, seed)
    ids = np.stack([window["tokens"] for window in windows])
    weight = np.stack([window["weight"] for window in windows])
    chosen = np.concatenate([_covered(subject, row, here, word) + at * ids.shape[1]
                             for at, (row, here) in enumerate(zip(ids, weight, strict=True))])  # fmt: skip
    if not chosen.size:
        raise UserError(f"word={word!r} does not occur in the {ids.size:,} tokens that were read: give other text.")
    found = [part for _, part in find_firings(decomposition, subject.model, windows)]
    firings = sort_firings(found, decomposition.decoder.shape[0], ids.size)
    scores = matches(firings, sums_of(firings), chosen)
    return [(int(j), float(scores[j])) for j in np.argsort(-scores, kind="stable")[:count]]


def _covered(subject: Subject, row: np.ndarray, weight: np.ndarray, word: str) -> np.ndarray:
    """The places of a window, of weight above 0, that a text covers."""
    pieces = [token_text(subject.tokenizer, int(token)) for token in row]
    begins = np.cumsum([0, *map(len, pieces)])
    whole, at = "".join(pieces), 0
    places: list[int] = []
    while (at := whole.find(word, at)) >= 0:
        first = int(np.searchsorted(begins, at, "right")) - 1
        places += range(first, int(np.searchsorted(begins, at + len(word), "left")))
        at += len(word)
    return np.asarray(sorted({place for place in places if weight[place] > 0}), np.int64)


def codes_table(
    codes: Codes, tokens: Int[Array, "batch seq"] | None = None, subject: Subject | None = None
) -> dict[str, np.ndarray]:
    """The codes that are not zero as columns of equal length: `pandas.DataFrame(codes_table(codes))`.

    Args:
      codes: of `[batch, seq]` tokens.
      tokens: their ids, for a column "token"; with a subject, their texts too, as "text".
    Returns:
      "row", "place", "feature", "value": a line a firing, in the order of the text, strongest first.
    Raises:
      UserError: the tokens have another shape.

    Example:
      >>> x = run(subject.model, tokens)["blocks/1/mlp/in"]
      >>> sorted(codes_table(result.decomposition.encode(x)))
      ['feature', 'place', 'row', 'value']
    """
    dense = np.asarray(codes.dense())
    if dense.ndim != 3 or (tokens is not None and tuple(tokens.shape) != dense.shape[:2]):
        shape = None if tokens is None else tuple(tokens.shape)
        raise UserError(f"codes of {dense.shape[:-1]} tokens and tokens={shape}: give both as [batch, seq].")
    row, place, feature = np.nonzero(dense)
    value = dense[row, place, feature]
    order = np.lexsort((-np.abs(value), place, row))
    columns = {"row": row[order], "place": place[order], "feature": feature[order], "value": value[order]}
    if tokens is None:
        return columns
    columns["token"] = np.asarray(tokens)[columns["row"], columns["place"]]
    if subject is not None:
        columns["text"] = np.asarray([token_text(subject.tokenizer, int(token)) for token in columns["token"]], object)
    return columns


def as_windows(subject: Subject, text: str | Sequence[str] | Iterable[Window]) -> Iterable[Window]:
    """Windows of one length: those that are given, or texts cut into windows of at most `SEQ` tokens.

    Raises:
      UserError: there is no token.
    """
    if isinstance(text, Mapping):
        raise UserError("text is one window: give a list of them.")
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
        return text  # type: ignore[return-value]
    rows = [(number, subject.ids(each)) for number, each in enumerate(texts)]
    pieces = [(number, ids[at : at + SEQ]) for number, ids in rows for at in range(0, len(ids), SEQ)]
    if not pieces:
        raise UserError("text is empty: give text with at least one token.")
    width = max(len(ids) for _, ids in pieces)
    sink = subject.tokenizer is not None and subject.tokenizer.begin is not None
    windows = []
    for number, ids in pieces:
        tokens, weight = np.zeros(width, np.int32), np.zeros(width, np.float32)
        tokens[: len(ids)], weight[: len(ids)] = ids, 1
        if sink and ids[0] == subject.tokenizer.begin:  # type: ignore[union-attr]
            weight[0] = 0
        windows.append({"tokens": tokens, "weight": weight, "document": np.full(width, number, np.int32)})
    return windows
