"""How much of a planted dictionary was found.

With planted rows V [n, d] and learned rows D [m, d], all made unit vectors, and C = V D^T:

    mcc                the mean of C over the one-to-one matching of planted to learned rows that maximises it
                       (Hungarian method)
    frr                the fraction of planted rows with some learned row at cosine above a threshold (many-to-one)
    sign_errors        the fraction of planted rows that some learned row has at cosine <= -threshold and none has above
    code_correlation   the mean over matched pairs of the correlation of planted code h_i with learned code z_match(i)

Cosines are signed: codes are non-negative, and an absolute value would hide a flipped feature, which `sign_errors`
counts. A random dictionary does not score 0: always report its score beside. Where a row is not finite, scores are NaN,
which is at least no threshold.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

Matrix = np.ndarray | Array


class Matching(NamedTuple):
    """Planted row `planted[i]` is matched to learned row `learned[i]` at cosine `cosine[i]`."""

    planted: Int[np.ndarray, " pairs"]
    learned: Int[np.ndarray, " pairs"]
    cosine: Float[np.ndarray, " pairs"]


def cosines(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"]) -> Float[np.ndarray, "n m"]:
    """Cosines between all rows; rows of zeros have cosine 0 with everything."""

    def unit(rows: Matrix) -> np.ndarray:
        wide = np.asarray(rows, np.float64)
        return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)

    return unit(planted) @ unit(learned).T


def match(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"]) -> Matching:
    """The one-to-one matching with the largest sum of cosines."""
    similarity = cosines(planted, learned)
    rows, columns = linear_sum_assignment(-similarity)
    return Matching(rows, columns, similarity[rows, columns])


def mcc(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"]) -> float:
    """Mean cosine under the best one-to-one matching (mean correlation coefficient of dictionary rows)."""
    return float(match(planted, learned).cosine.mean()) if finite(planted, learned) else float("nan")


def finite(*matrices: Float[Matrix, "_n _d"]) -> bool:
    """Whether every entry is finite: only then can rows be matched."""
    return all(bool(np.isfinite(np.asarray(matrix)).all()) for matrix in matrices)


def frr(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"], threshold: float = 0.9) -> float:
    """Feature recovery rate: the fraction of planted rows with a learned row above the threshold."""
    if not finite(planted, learned):
        return float("nan")
    return float((cosines(planted, learned).max(axis=1) > threshold).mean())


def sign_errors(planted: Float[Matrix, "n d"], learned: Float[Matrix, "m d"], threshold: float = 0.9) -> float:
    """The fraction of planted rows that were found with the wrong sign only."""
    if not finite(planted, learned):
        return float("nan")
    similarity = cosines(planted, learned)
    flipped, upright = similarity.min(axis=1) <= -threshold, similarity.max(axis=1) >= threshold
    return float((flipped & ~upright).mean())


def code_correlation(
    planted: Float[Matrix, "samples n"], learned: Float[Matrix, "samples m"], matching: Matching
) -> float:
    """The mean correlation over samples of planted with learned codes, matched as rows are; a dead feature counts 0."""

    def standard(codes: Matrix, columns: np.ndarray) -> np.ndarray:
        centred = np.asarray(codes, np.float64)[:, columns]
        centred = centred - centred.mean(axis=0)
        return centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-12)

    pairs = standard(planted, matching.planted) * standard(learned, matching.learned)
    return float(pairs.sum(axis=0).mean())
