"""What a report shows of a feature in words: passages around its firings, and the tokens with the largest logits."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.features.firings import at_quantile
from jaxinterp.evaluation.features.peaks import Window
from jaxinterp.models.files.tokenizer import Tokenizer
from jaxinterp.report.content import TokenContext

AROUND = 20  # tokens shown on either side of a peak
LOGITS = 8  # tokens listed as raised, and as lowered
QUANTILES = (("90th percentile", 0.9), ("median", 0.5), ("25th percentile", 0.25))
BY_QUANTILE = 2  # contexts of each, from windows of their own


def context_at(
    tokenizer: Tokenizer | None, window: Window, activations: Float[np.ndarray, " seq"], place: int
) -> TokenContext:
    """The tokens around a peak, within its document."""
    low, high = max(0, place - AROUND), min(len(activations), place + AROUND + 1)
    document = np.asarray(window.get("document", np.zeros(len(activations))))
    inside = [spot for spot in range(low, high) if document[spot] == document[place]]
    return TokenContext(
        tokens=tuple(token_text(tokenizer, int(window["tokens"][spot])) for spot in inside),
        activations=tuple(float(activations[spot]) for spot in inside),
        peak=inside.index(place),
    )


def by_quantile(
    tokenizer: Tokenizer | None, windows: Sequence[Window], firings: tuple[np.ndarray, np.ndarray], used: set[int]
) -> tuple[tuple[str, tuple[TokenContext, ...]], ...]:
    """Contexts of weaker firings, of windows that are not shown already; nothing for a feature that never fires.

    Args:
      firings: tokens, numbered window after window, and activations.
      used: the windows that are shown already.
    """
    where, values = firings
    seq = len(windows[0]["tokens"])
    groups: list[tuple[str, tuple[TokenContext, ...]]] = []
    for name, quantile in QUANTILES:
        chosen = at_quantile(where, values, quantile, BY_QUANTILE, seq, used) if len(where) else []
        contexts = []
        for place in chosen:
            window, spot = divmod(int(where[place]), seq)
            inside = where // seq == window
            activations = np.zeros(seq, np.float32)
            activations[where[inside] % seq] = values[inside]
            contexts.append(context_at(tokenizer, windows[window], activations, spot))
        groups += [(name, tuple(contexts))] if contexts else []
    return tuple(groups)


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """Readable text of a token; its id in brackets where the tokenizer has no such token, or there is no tokenizer."""
    try:
        return f"[{token}]" if tokenizer is None else tokenizer.token_text(token)
    except UserError:  # a vocabulary padded to a round number has ids without a token
        return f"[{token}]"


def extremes(
    tokenizer: Tokenizer | None, logits: Float[np.ndarray, " vocab"]
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """The tokens with the highest and with the lowest logits, strongest first."""
    order = np.argsort(logits, kind="stable")
    raised, lowered = order[::-1][:LOGITS], order[:LOGITS]
    return tuple(
        tuple((token_text(tokenizer, int(token)), float(logits[token])) for token in tokens)
        for tokens in (raised, lowered)
    )
