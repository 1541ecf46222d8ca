"""Confidence intervals over documents: tokens of one document are not independent, documents are."""

import numpy as np
from jaxtyping import Float, Int


def ratio_interval(
    numerator: Float[np.ndarray, " tokens"],
    denominator: Float[np.ndarray, " tokens"],
    document: Int[np.ndarray, " tokens"],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of sum(numerator) / sum(denominator), whole documents being resampled.

    Efron and Tibshirani 1993, chapter 13. With a single document the interval is the ratio itself, twice. NaN where the
    ratio is undefined: no denominator is positive.
    """
    if not np.any(denominator > 0):
        return np.nan, np.nan
    _, place = np.unique(document, return_inverse=True)
    above, below = (np.bincount(place, weights=column.astype(np.float64)) for column in (numerator, denominator))
    documents = len(above)
    draws = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (draws @ above) / (draws @ below)
    low, high = np.nanquantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
